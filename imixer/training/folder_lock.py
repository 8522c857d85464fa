"""A lock on a run's folder, so that no two processes write into the same one."""

import contextlib
import datetime
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"
_held: set[int] = set()  # file descriptors


class FolderInUseError(OSError):
    """Another run is writing into the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock inside; the operating system gives it back when the process ends, however it ends.

    The lock is the kernel's, on the file ``.lock``, which also says who holds it. A file left by a dead process locks
    nothing. On NFS the lock holds between machines if the server's lock service runs (NFSv4 has it built in). A file
    system without locks gets a warning; on Windows folders are not locked.

    Raises:
        FolderInUseError: Another process, or another run in this one, holds it; the message names it.
        OSError: The folder cannot be written.
    """
    owner = os.getpid()
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _acquire(file, folder)
        if not os.fstat(file).st_nlink:
            raise FolderInUseError(f"{folder} was removed just now, by a run that failed to start; start again")
        _held.add(file)
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        os.ftruncate(file, 0)
        os.write(file, f"process {owner} on {socket.gethostname()} since {since}".encode())
        yield
    finally:
        if os.getpid() == owner:  # and not in a child that was forked inside, where it is closed
            if file in _held:
                _held.remove(file)
                _release(file)
            os.close(file)


def _acquire(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = b""
        for _ in range(20):  # one that has just got it may not have written who it is
            if holder := os.pread(file, 200, 0):
                break
            time.sleep(0.05)
        raise FolderInUseError(
            f"{folder} is in use by {holder.decode(errors='replace') or 'another process'}; wait for it to end, stop "
            "it, or choose another --output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        warnings.warn(
            f"the file system of {folder} has no locks ({error.strerror}), so a second run in this folder would not "
            "be noticed; start only one",
            stacklevel=2,
        )


def _release(file: int) -> None:
    # Closing is enough, except where a child was forked just now and has not closed its own yet.
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)


def _close_inherited() -> None:
    # A worker that outlives the process that it was forked from must not hold the lock for it.
    for file in _held:
        os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
