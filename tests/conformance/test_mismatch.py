from tests.support.conformance import every_check, run_check


@every_check("mismatch")
def test_collective_mismatch_raised_everywhere(backend, size, name):
    run_check(backend, size, name)
