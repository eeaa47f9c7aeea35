from tests.support.conformance import every_check, run_check


@every_check("arguments")
def test_arguments_mistaken_refused(backend, size, name):
    run_check(backend, size, name)
