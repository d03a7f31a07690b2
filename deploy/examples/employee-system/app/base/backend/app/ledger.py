"""The application's own record of what happened to it.

A deployment tool has its own opinion of how often it started a service or ran a migration. These lines are
written by the thing itself, so they can be held against that opinion.
"""

import os


def append_line(path, *words):
    """One durable line. O_APPEND keeps the lines of concurrent writers whole."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(fd, (" ".join(words) + "\n").encode())
        os.fsync(fd)
    finally:
        os.close(fd)
