"""Run a program to which the kernel refuses some system calls, as a container's filter would.

python refusing.py ERRNO CALL[,CALL...] PROGRAM ARGUMENT...

A call is a name of ``CALLS``. The filter holds for all descendants. Ends with code 77 where the
system does not let us install it.
"""

import ctypes
import errno
import os
import struct
import sys

# Number, and the value of the second argument with which alone it is refused.
CALLS = {
    "memfd_create": (319, None),
    "pidfd_open": (434, None),
    "set_robust_list": (273, None),
    "process_vm_readv": (310, None),
    "epoll_ctl": (233, None),
    "shutdown": (48, None),
    # Without the private flag: between processes.
    "futex_wait": (202, 0),
    "futex_wake": (202, 1),
    "futex_waitv": (449, None),
}
NOT_PERMITTED = 77

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
# Of struct seccomp_data.
_NUMBER, _ARCHITECTURE, _SECOND_ARGUMENT = 0, 4, 24
_X86_64 = 0xC000003E


def refuse(names, code):
    """Install the filter in this process; raise OSError where that is not permitted."""
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_IF_EQUAL, 1, 0, _X86_64)]
    program.append((_RETURN, 0, 0, _ALLOW))
    for name in names:
        number, argument = CALLS[name]
        refusal = (_RETURN, 0, 0, _ERRNO | code)
        if argument is None:
            body = [refusal]
        else:
            body = [(_LOAD, 0, 0, _SECOND_ARGUMENT), (_JUMP_IF_EQUAL, 0, 1, argument), refusal]
        program += [(_LOAD, 0, 0, _NUMBER), (_JUMP_IF_EQUAL, 0, len(body), number), *body]
    program.append((_RETURN, 0, 0, _ALLOW))
    code_bytes = b"".join(struct.pack("<HBBI", *each) for each in program)
    memory = ctypes.create_string_buffer(code_bytes, len(code_bytes))
    described = ctypes.create_string_buffer(
        struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(memory))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _FILTER, ctypes.c_void_p(ctypes.addressof(described)), 0, 0),
    ):
        if libc.prctl(*call):
            failed = ctypes.get_errno()
            raise OSError(failed, os.strerror(failed))


if __name__ == "__main__":
    try:
        refuse(sys.argv[2].split(","), getattr(errno, sys.argv[1]))
    except OSError as error:
        print(f"seccomp: {error}", file=sys.stderr)
        sys.exit(NOT_PERMITTED)
    os.execv(sys.argv[3], sys.argv[3:])
