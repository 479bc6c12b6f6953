"""Terminals for processes to write to."""

import fcntl
import os
import pty
import struct
import termios
import threading
from contextlib import contextmanager


def read_all(descriptor, found):
    while True:
        try:
            data = os.read(descriptor, 1 << 16)
        except OSError:  # nobody has the other end open any more
            return
        if not data:
            return
        found.append(data)


@contextmanager
def terminal(columns, rows=24):
    """(its name, what is written to it), which is whole after the `with` block; processes have to end within."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    written = []
    reader = threading.Thread(target=read_all, args=(ours, written), daemon=True)
    reader.start()
    try:
        yield os.ttyname(theirs), written
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
