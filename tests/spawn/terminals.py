"""A terminal for a launcher, and what it shows."""

import fcntl
import os
import pty
import termios


class Terminal:
    """A terminal whose foreground job is a launcher."""

    def __init__(self, spawn, *arguments, **options):
        self.master, slave = pty.openpty()
        # Echo would mix what is typed into what is shown.
        settings = termios.tcgetattr(slave)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, settings)
        self.process = spawn.start(
            *arguments,
            stdin=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            **options,
        )
        os.close(slave)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.master)


def expect(process, count, line):
    assert [process.stdout.readline() for _ in range(count)] == [line] * count
