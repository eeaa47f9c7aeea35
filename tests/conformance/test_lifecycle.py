from tests.support.conformance import every_check, run_check


@every_check("lifecycle")
def test_lifecycle_contract_kept(backend, size, name):
    run_check(backend, size, name)
