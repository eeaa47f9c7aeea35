"""The launcher: ``python -m cobre_shm.spawn -n N program`` starts N ranks and looks after them.

    __main__      arguments, and errors as text or JSON
    program       what a rank runs, checked before anything starts
    environment   what a rank finds in its environment
    launcher      the group: start, watch, stop, exit code
    report        which rank decides the exit code, and how that is told
    tcp           what the ranks inherit to meet over tcp, also on several machines
    rank          one process: start, signal, how it ended, reap
    signals       signals as events of the launcher's loop
    output        lines of the ranks passed on whole
    terminal      typed input passed on to rank 0
    guard         the process that cleans up if the launcher itself is killed

Nothing here imports numpy or numba: the launcher must be up long before the ranks are.
"""
