from tests.support.conformance import every_check, run_check


@every_check("shared_arrays")
def test_shared_array_contract_kept(backend, size, name):
    run_check(backend, size, name)
