from tests.support.conformance import every_check, run_check


@every_check("allreduce")
def test_allreduce_contract_kept(backend, size, name):
    run_check(backend, size, name)
