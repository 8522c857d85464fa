"""Loops of tensor code, whose every turn is the same, in two forms that ``torch.compile`` understands.

:func:`whole` is one graph with ``torch.while_loop`` in it, which ``torch.export`` understands as well. The state is a
fixed list of tensors that the loop writes anew in each turn, apart from the blocks of remembered vectors, into which it
writes in place. :func:`turn_in_place` is one turn, whose results take the places of what they follow, so that it can be
captured as a CUDA graph and replayed, between :func:`start` and :func:`end`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from solvers.problem import AutocastMode, FlatMap, Layout, Traced, as_number, with_tensors

# How many tensors that are the same in all turns of a loop can be taken out of it, see solvers/_loop_invariants.py.
NUM_SPARES = 8

M = TypeVar("M", bound=FlatMap)


@dataclasses.dataclass
class Task:
    """What is solved.

    Attributes:
        f: The user's map, or function of which a root is sought.
        z0: The start, whose structure and shapes are those of the state.
        args: Further arguments of ``f``.
        batch_dims: As in :func:`solvers.solve`.
        autocast: The mode in which ``f`` runs.
    """

    f: Callable[..., Any]
    z0: Any
    args: tuple[Any, ...]
    batch_dims: int
    autocast: AutocastMode

    def map_of(self, kind: type[M]) -> M:
        """The map as a solver sees it, to be made where it is called: a loop may not change what is made outside."""
        return kind(self.f, self.args, Layout(self.z0, self.batch_dims), self.autocast)

    def tracing(self) -> contextlib.AbstractContextManager[object]:
        """The context in which a loop over ``f`` is traced."""
        return self.f.context() if isinstance(self.f, Traced) else contextlib.nullcontext()


class Run:
    """Where a loop stands: the base class of dataclasses of tensors, and of what holds tensors."""

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """Those that stay the same in all turns."""
        return ()

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """Those into which a turn writes, instead of giving others in their places."""
        return ()


T = TypeVar("T", bound=Task)
R = TypeVar("R", bound=Run)


@dataclasses.dataclass(frozen=True)
class Loop(Generic[T, R]):
    """A loop.

    Attributes:
        start: Where it starts, for a task and (B, D) a right-hand side or first image.
        goes_on: () bool: whether it goes on.
        turn: Where it stands after one more turn.
        numbers: What the host has to know of it, () tensors each.
        end: What is made of where it ends; None for that itself.
    """

    start: Callable[[T, Tensor], R]
    goes_on: Callable[[T, R], Tensor]
    turn: Callable[[T, R], R]
    numbers: Callable[[R], tuple[Tensor, ...]]
    end: Callable[[T, R], Any] | None = None


def whole(
    loop: Loop[T, R], in_place: bool, task: T, like: Tensor, run: R | None = None, num_spares: int = NUM_SPARES
) -> tuple[Any, Tensor]:
    """What is made of where a loop ends, and its numbers, int64.

    Args:
        loop: The loop.
        in_place: Whether it may write into the blocks; otherwise every turn copies them.
        task: What is solved.
        like: (B, D) what the loop starts with.
        run: Where it goes on, instead of its start.
        num_spares: How many results the compiler may take out of the loop.
    """
    with task.tracing():
        return _whole(loop, in_place, task, loop.start(task, like) if run is None else run, num_spares)


def _whole(loop: Loop[T, R], in_place: bool, task: T, run: R, num_spares: int) -> tuple[Any, Tensor]:
    # No two inputs of a loop may be the same memory, and none may be written to that others hold.
    run = copies(run)
    carry = Carry(run, in_place=in_place)
    spares = [carry.like.new_ones(()) for _ in range(num_spares)]

    def goes_on(*values: Tensor) -> Tensor:
        return loop.goes_on(task, carry.run(values))

    def turn(*values: Tensor) -> tuple[Tensor, ...]:
        for spare in spares:
            spare.square()  # which makes it an input of the loop
        now = carry.run(values)
        return carry.copies(loop.turn(task, now if in_place else copies(now)))

    run = carry.run(torch.while_loop(goes_on, turn, carry.start))
    end = run if loop.end is None else loop.end(task, run)
    return end, _stacked(loop.numbers(run))


def start(loop: Loop[T, R], task: T, like: Tensor, run: R | None) -> tuple[R, Tensor]:
    """Where :func:`whole` starts, in tensors of its own, and (n,) int64, whether it goes on, and its numbers."""
    with task.tracing():
        run = copies(loop.start(task, like) if run is None else run)
        return run, _news(loop, task, run)


def turn_in_place(loop: Loop[T, R], task: T, run: R, news: Tensor) -> None:
    """Take one turn.

    Args:
        loop: The loop.
        task: What is solved.
        run: Where it stands; its tensors get the values that they have after the turn.
        news: As :func:`start` gives it; gets the values after the turn.
    """
    with task.tracing():
        now = loop.turn(task, run)
        news.copy_(_news(loop, task, now))
    old = tensors_of(run)
    changes = [pair for pair in zip(old, tensors_of(now), strict=True) if pair[0] is not pair[1]]
    # What is one of the tensors before the turn must not be read where another has been written into it.
    kept = [(place, value.clone() if any(value is other for other in old) else value) for place, value in changes]
    for place, value in kept:
        place.copy_(value)


def end(loop: Loop[T, R], task: T, run: R) -> Any:
    """What is made of where a loop ends."""
    assert loop.end is not None
    with task.tracing():
        return loop.end(task, run)


def _news(loop: Loop[T, R], task: T, run: R) -> Tensor:
    return _stacked((loop.goes_on(task, run), *loop.numbers(run)))


def _stacked(numbers: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([number.to(torch.int64) for number in numbers])


class Carry(Generic[R]):
    """What a loop carries from turn to turn: the tensors of a run, except for those that stay the same.

    Args:
        run: Where the loop starts.
        in_place: Whether the loop writes into the blocks.

    Attributes:
        start: The tensors to carry into the loop.
        like: A tensor of the dtype of the solve.
    """

    def __init__(self, run: R, *, in_place: bool) -> None:
        self._run = run
        constant = (*run.constants, *(run.blocks if in_place else ()))
        tensors = tensors_of(run)
        self._is_constant = [any(tensor is other for other in constant) for tensor in tensors]
        self.like = next(tensor for tensor in tensors if tensor.is_floating_point())
        self.start = self._carried(tensors)

    def copies(self, run: R) -> tuple[Tensor, ...]:
        """Copies of the tensors to carry, as :func:`copies` makes them."""
        blocks = run.blocks
        return tuple(_copy(tensor, blocks) for tensor in self._carried(tensors_of(run)))

    def _carried(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Those of the tensors of a run that are carried."""
        carried = (tensor for tensor, constant in zip(tensors, self._is_constant, strict=True) if not constant)
        return tuple(as_number(tensor, self.like) if tensor.dtype == torch.bool else tensor for tensor in carried)

    def run(self, tensors: tuple[Tensor, ...]) -> R:
        """The run with these tensors."""
        supply, is_constant = iter(tensors), iter(self._is_constant)

        def carried(tensor: Tensor) -> Tensor:
            value = tensor if next(is_constant) else next(supply)
            return value > 0 if tensor.dtype == torch.bool != value.dtype else value

        return with_tensors(self._run, carried)


def tensors_of(run: Run) -> list[Tensor]:
    """All tensors of a run, in an order that depends only on its structure."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with_tensors(run, note)
    return tensors


def copies(run: R) -> R:
    """The run with copies of its tensors, which lie in memory as a loop expects them in every turn."""
    blocks = run.blocks
    return with_tensors(run, lambda tensor: _copy(tensor, blocks))


def _copy(tensor: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
    for block in blocks:
        if tensor is block:  # all samples' vectors in one slot lie together
            return tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    return tensor.clone(memory_format=torch.contiguous_format)
