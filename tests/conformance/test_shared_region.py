from tests.support.conformance import every_check, run_check


@every_check("regions")
def test_shared_region_contract_kept(backend, size, name):
    run_check(backend, size, name)
