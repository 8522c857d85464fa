"""Stopping a run between two updates when it is told to."""

import signal
import threading
import time
from types import FrameType
from typing import Any

# Of the terminal and its hang-up, of schedulers, and what SLURM sends if `--signal=USR1@300` asks for it.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class TrainingInterruptedError(Exception):
    """The run was told to stop, and has saved a checkpoint.

    Args:
        message: How far it got, and how to continue.
        signal_number: The signal that told it, or None in a process that another one told.
    """

    def __init__(self, message: str, signal_number: int | None) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopSignals:
    """Inside, the first signal of `STOPPING` is noted in ``received``; a SIGINT some time later interrupts at once.

    A signal that the process was started to ignore, as ``nohup`` does with SIGHUP, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python's signal handlers belong to it
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
        # torchrun passes on to its processes what the terminal has sent them already.
        elif number == signal.SIGINT and time.monotonic() - self._at > 1:
            raise KeyboardInterrupt
