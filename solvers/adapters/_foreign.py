"""Solvers of other packages, which call the map themselves, turned inside out: a call of theirs is a step of ours."""

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
    """A solver that calls the map itself, in a thread of its own that is held at every call.

    The thread runs only while the constructor or :meth:`resume` waits for it, so that the two take turns. It ends with
    the solver, by :meth:`close`, and when nobody holds this object any more.

    Args:
        run: The solver: takes the map, and returns its answer. What it raises is raised where it is waited for.

    Attributes:
        point: Where the map is asked for; the answer once the solver has ended.
    """

    point: T

    def __init__(self, run: Callable[[Callable[[T], T]], T]) -> None:
        self._points: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._images: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = False
        # The thread holds the queues and not this object, so that this can be collected while the thread is held.
        self._thread = threading.Thread(
            target=_work, args=(run, self._points, self._images), name="foreign solve", daemon=True
        )
        self._let_go = weakref.finalize(self, self._images.put, _CLOSE)
        self._thread.start()
        self._wait()

    def resume(self, image: T) -> None:
        """Go on with the map at the point, up to the next one; does nothing once the solver has ended."""
        if not self._ended:
            self._images.put(image)
            self._wait()

    def close(self) -> None:
        """End the thread, where it is held."""
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
    """Raised in a thread where it is held, to end it; no Exception, so that no solver takes it for one of its own."""


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
    """The foreign solvers of a batch on their way. Once closed, they begin anew where they are asked to go on."""

    @abc.abstractmethod
    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        """Take in the map at z (B, D), at first the start, and return where it is asked for next (B, D)."""


@dataclasses.dataclass
class ForeignState(State):
    """A point that a foreign solver asks for, the map there, and the solver itself, which waits for it.

    Attributes:
        progress: The solver on its way; None once a step was taken from this state, because it cannot go back.
    """

    progress: Progress | None


class ForeignSolver(Solver):
    """A solver of another package behind the contract of ours.

    The package's own loop runs in a thread that is held at every call of the map, and each call is a step, also one
    that tries a step length or measures a derivative. Its own stopping tests are switched off. A row for which it gives
    up, or asks for a point that is not finite, stays at the last point and is judged there as any other.
    """

    differentiable: ClassVar[bool] = False

    @abc.abstractmethod
    def _begin(self) -> Progress:
        """The foreign solvers of a batch before their start."""

    def init(self, f: FlatMapping, z0: Tensor) -> ForeignState:
        return ForeignState(z=z0, fz=f(z0), progress=self._begin())

    @torch.no_grad()
    def step(self, f: FlatMapping, state: ForeignState) -> ForeignState:
        progress, state.progress = state.progress, None
        if progress is None:
            raise RuntimeError(
                f"{type(self).__name__} has stepped from this state already, and cannot go back. Step from the newest."
            )
        try:
            z = progress.advance(state.z, state.fz)
            z = torch.where(z.isfinite().all(dim=1, keepdim=True), z, state.z)
            return ForeignState(z=z, fz=f(z), progress=progress)
        except BaseException:
            progress.close()
            raise
