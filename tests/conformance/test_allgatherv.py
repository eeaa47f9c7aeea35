from tests.support.conformance import every_check, run_check


@every_check("allgatherv")
def test_allgatherv_contract_kept(backend, size, name):
    run_check(backend, size, name)
