from tests.support.conformance import every_check, run_check


@every_check("sequences")
def test_sequences_of_collectives_undisturbed(backend, size, name):
    run_check(backend, size, name)
