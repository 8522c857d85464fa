"""Solvers of other packages that call the map themselves, run so that each of these calls is a step of ours."""

import abc
import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from solvers.methods.solver import FlatMapping, Resource, Solver, State

T = TypeVar("T")


class ForeignSolve(Generic[T]):
    """A solver that calls the map itself, in a thread of its own that is paused at every call.

    The thread runs only while the constructor or :meth:`resume` waits for it, so that the two take turns. It ends when
    the solver returns, by :meth:`close`, or when this object is collected.

    Args:
        run: The solver: takes the map and returns the answer. An exception in it is raised by the constructor or by
            :meth:`resume`.

    Attributes:
        point: The point at which the solver needs the map; its answer once the solver has ended.
    """

    point: T

    def __init__(self, run: Callable[[Callable[[T], T]], T]) -> None:
        self._points: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._images: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = False
        # The thread refers to the queues and not to this object, so that this can be collected while the thread waits.
        self._thread = threading.Thread(
            target=_work, args=(run, self._points, self._images), name="foreign solve", daemon=True
        )
        self._let_go = weakref.finalize(self, self._images.put, _CLOSE)
        self._thread.start()
        self._wait()

    def resume(self, image: T) -> None:
        """Continue with the map at ``point`` until the next call; does nothing once the solver has ended."""
        if not self._ended:
            self._images.put(image)
            self._wait()

    def close(self) -> None:
        """End the thread at the call where it is paused."""
        self._let_go()
        self._thread.join()

    def _wait(self) -> None:
        message = self._points.get()
        if not isinstance(message, _End):
            self.point = message
            return
        self._ended = True
        if message.error is not None:
            raise message.error
        self.point = message.answer


class _Closed(BaseException):
    """Raised in a paused thread to end it. Not an Exception, so that no solver handles it as an error of its own."""


_CLOSE = object()


@dataclasses.dataclass(frozen=True)
class _End:
    answer: Any = None
    error: BaseException | None = None


def _work(run: Callable[..., Any], points: "queue.SimpleQueue[Any]", images: "queue.SimpleQueue[Any]") -> None:
    def f(point: Any) -> Any:
        points.put(point)
        image = images.get()
        if image is _CLOSE:
            raise _Closed
        return image

    try:
        end = _End(answer=run(f))
    except _Closed:
        return
    except BaseException as error:
        end = _End(error=error)
    points.put(end)


class Progress(Resource):
    """The running foreign solvers of a batch. After ``close``, the next ``advance`` starts new ones."""

    @abc.abstractmethod
    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        """Continue with the map at z (B, D), which is the start at first; returns the next points (B, D)."""


@dataclasses.dataclass
class ForeignState(State):
    """A point at which a foreign solver needs the map, the map there, and the solver, which waits for it.

    Attributes:
        progress: The running solver; None once a step was taken from this state, because the solver cannot go back.
    """

    progress: Progress | None


class ForeignSolver(Solver):
    """A solver of another package behind the contract of ours.

    The package's own loop runs in a thread that is paused at every call of the map, and each call is a step, even if it
    only tries a step length or measures a derivative. The package's stopping tests are switched off. If it gives up on
    a row, or asks for a point that is not finite, the row stays at its last point and is tested there as any other.

    A foreign solver cannot be moved to another point. ``restarted`` therefore is the default, which replaces only ``z``
    and ``fz`` in the state. The next step gives the solver this image, or this residual, in answer to the point that it
    had asked for, and what it remembers stays. Some solvers find the solution from there, and others do not.
    """

    differentiable: ClassVar[bool] = False

    @abc.abstractmethod
    def _begin(self) -> Progress:
        """The foreign solvers of a batch, not started yet."""

    def init(self, f: FlatMapping, z0: Tensor) -> ForeignState:
        return ForeignState(z=z0, fz=f(z0), progress=self._begin())

    @torch.no_grad()
    def step(self, f: FlatMapping, state: ForeignState) -> ForeignState:
        progress, state.progress = state.progress, None
        if progress is None:
            raise RuntimeError(
                f"{type(self).__name__} has already stepped from this state and cannot go back. Step from the newest "
                "state."
            )
        try:
            z = progress.advance(state.z, state.fz)
            z = torch.where(z.isfinite().all(dim=1, keepdim=True), z, state.z)
            return ForeignState(z=z, fz=f(z), progress=progress)
        except BaseException:
            progress.close()
            raise
