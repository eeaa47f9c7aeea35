"""The launcher: ``python -m cobre_shm.spawn -n N program`` starts N ranks and looks after them.

    __main__      errors as text or JSON, exit code
    options       the command line, turned into a job
    job           what to launch, and how
    program       what a rank runs, checked before anything starts
    environment   what a rank finds in its environment
    binding       on which CPUs it runs
    plan          what would be started, for --dry-run

    launcher      from a job to its exit code: segment, guard, attempts
    group         the ranks of one run: watch, stop, exit code
    starting      two ways in which ranks come into being
    forking       the zygote as the launcher sees it
    boot, zygote  the process that imports what ranks need and is forked into them
    direct        runs a program in a forked rank as if started directly
    ladder        the steps by which a group is brought to its end
    loop          the one place to wait
    rank          one process: signal, how it ended, reap
    signals       signals as events of the loop
    terminal      typed input passed on to rank 0
    guard         the process that cleans up if the launcher itself is killed

    output        lines of the ranks passed on whole
    rank_output   shown or not, labelled, copied to files
    report        which rank decides the exit code, and how that is told
    table         how each rank is, or ended
    stacks        Python stacks of all ranks, for --timeout
    memory        whether the kernel killed a rank for want of memory
    events        one JSON object a line, for tools

Nothing here imports numpy or numba, except the zygote at run time: the launcher must be up long
before the ranks are.
"""
