"""Writing files while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BackgroundWriter:
    """Runs one task at a time in a thread. An error of a task is raised by the call that comes next."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._running: Future[None] | None = None

    def start(self, task: Callable[[], None]) -> None:
        """Run a task when the one before is done."""
        self.join()
        self._running = self._executor.submit(task)

    def join(self) -> None:
        """Wait until everything is written, and raise what went wrong."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.join()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"besides, {failed}")
        finally:
            self._executor.shutdown()
