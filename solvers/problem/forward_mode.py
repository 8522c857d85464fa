"""Forward mode of one thread at a time."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class _ForwardMode:
    """A context for forward mode that one thread is in at a time.

    PyTorch (2.11 to 2.14) keeps the level of forward mode in global variables. So two threads in it disturb each other:
    derivatives vanish, or an error says that there is no level. And one that is not in it sees the level of another.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._thread: int | None = None
        self._entries = 0

    def __enter__(self) -> None:
        self._lock.acquire()
        if not self._depth:
            self._thread = threading.get_ident()
            self._entries += 1  # after the thread, see below
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._thread = None
        self._lock.release()

    def unless_elsewhere(self, read: Callable[[], T]) -> T | None:
        """What ``read()`` finds; None if another thread was in this context meanwhile."""
        entries, thread = self._entries, self._thread
        if thread not in (None, threading.get_ident()):
            return None
        found = read()
        return found if self._entries == entries else None


FORWARD_MODE = _ForwardMode()
