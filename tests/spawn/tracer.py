"""Hold a process as a debugger does: python tracer.py PID, until standard input ends.

Its end, by SIGKILL too, is told to us and not to its parent, to which it seems to be there still.
"""

import ctypes
import os
import sys

_PTRACE_SEIZE = 0x4206

if __name__ == "__main__":
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(_PTRACE_SEIZE, int(sys.argv[1]), None, None) != 0:
        sys.exit(f"ptrace: {os.strerror(ctypes.get_errno())}")
    print("held", flush=True)
    sys.stdin.read()
