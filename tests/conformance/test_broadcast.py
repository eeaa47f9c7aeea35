from tests.support.conformance import every_check, run_check


@every_check("broadcast")
def test_broadcast_contract_kept(backend, size, name):
    run_check(backend, size, name)
