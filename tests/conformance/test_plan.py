from tests.support.conformance import every_check, run_check


@every_check("plans")
def test_plan_contract_kept(backend, size, name):
    run_check(backend, size, name)
