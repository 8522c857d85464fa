"""A solve as one graph: the first test, and a loop whose every step is the same tensor code.

``Iteration`` takes its steps one by one and looks at the host after each. Here ``torch.while_loop`` does, which
``torch.compile`` and ``torch.export`` understand: :func:`begin` makes the first test, and :func:`advance` goes on until
all samples have stopped or something rare has to be done, for which it stops:

- a sample is lost and has to be taken back, which takes an unknown number of calls of the map;
- the solver has no room for what it remembers.

A compiled solve does this on the host, by the code that every solve uses, and goes on with another :func:`advance`. A
solve that is exported, or traced as part of a larger graph, has no host: :func:`complete` does it in the graph.

The step is the solver's own, for a state of fixed shape (:meth:`solvers.Solver.fixed_shape`), and the stopping test is
:func:`solvers._branch_free.take_in`. All numbers that may change from solve to solve are tensors; the tensors of the
map are what ``torch.compile`` finds in it. The state is a fixed list of tensors that a loop writes anew in each step,
apart from the blocks of remembered vectors, into which it writes in place.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from solvers import _rules
from solvers._branch_free import Limits, first, take_in
from solvers._samples import Samples
from solvers.methods.root_map import RootMap
from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem import AutocastMode, FlatMap, Layout, Traced, as_number, with_tensors

# A step that leads to infinity or NaN is replaced by the plain one, or by one so many times shorter, and so on.
SHORTER, MOST_SHORTER = 0.25, 8

# How many tensors that are the same in all turns of a loop can be taken out of it, see solvers/_loop_invariants.py.
NUM_SPARES = 8

M = TypeVar("M", bound=FlatMap)

Loop = Callable[[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclasses.dataclass
class Course:
    """Where a solve stands.

    Attributes:
        state: The solver's state, of fixed shape.
        samples: What is known of each sample.
        before: Entries of the last tested iterate.
        step: () int64.
        lost: (B,) bool, the samples that have to be taken back before the next step.
        num_evals: () int64, calls of the map so far.
    """

    state: Any
    samples: Samples
    before: State
    step: Tensor
    lost: Tensor
    num_evals: Tensor

    def goes_on(self, max_steps: Tensor) -> Tensor:
        """() bool: whether the solve is not done."""
        return self.samples.active.any() & (self.step < max_steps)


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


@dataclasses.dataclass
class LimitedTask(Task):
    """What is solved, and until when.

    Attributes:
        limits: When samples end.
    """

    limits: Limits


@dataclasses.dataclass
class Plan(LimitedTask):
    """What is solved, and how.

    Attributes:
        scaling: (B, 1) for a root: as in :class:`RootMap`; else None.
        solver: The solver.
        max_growth: As in :class:`solvers.Stopping`.
        room: For how many steps there is room at first.
        in_place: Whether a loop may write into the blocks; otherwise every step copies them.
    """

    scaling: Tensor | None
    solver: Solver
    max_growth: float
    room: int
    in_place: bool

    def map(self) -> FlatMap:
        """The map as the solver sees it."""
        map_ = self.map_of(FlatMap if self.scaling is None else RootMap)
        map_.scaling = self.scaling
        return map_


def begin(plan: Plan, fz0: Tensor, num_spares: int = NUM_SPARES) -> tuple[Course, Tensor]:
    """The solve from its first step, whose image is ``fz0`` (B, D), as far as :func:`advance` takes it, likewise."""
    z0 = Layout(plan.z0, plan.batch_dims).pack(plan.z0)
    state = plan.solver.fixed_shape(plan.solver.init(lambda _: fz0, z0), plan.room)
    samples = first(plan.limits, state, plan.max_growth, plan.map().unit)
    one = torch.ones_like(plan.limits.max_steps)
    before = plan.limits.entries_of(State(z0, fz0))
    return advance(plan, Course(state, samples, before, one, torch.zeros_like(samples.active), one), num_spares)


def advance(plan: Plan, course: Course, num_spares: int = NUM_SPARES) -> tuple[Course, Tensor]:
    """The solve when all samples have stopped or something rare has to be done.

    Args:
        plan: What is solved, and how.
        course: Where the solve stands.
        num_spares: How many results the compiler may take out of the loop.

    Returns:
        The solve, and what the host has to know of it, (4,) int64: whether samples are lost, whether some are active,
        the step, and the number of calls.
    """
    limits = plan.limits
    # No two inputs of a loop may be the same memory, and none may be written to that others hold.
    course = _copies(course)
    carry = _Carry(course, course.state.blocks if plan.in_place else ())
    spare = spares(course.samples.error, num_spares)

    def goes_on(*values: Tensor) -> Tensor:
        now = carry.course(values)
        goes_on = now.goes_on(limits.max_steps) & ~now.lost.any()
        room = plan.solver.room(now.state)
        return goes_on if room is None else goes_on & (room > 0)

    def step(*values: Tensor) -> tuple[Tensor, ...]:
        take(spare)
        now = carry.course(values)
        if not plan.in_place:
            now = _copies(now)
        return carry.copies(_stepped(plan, now))

    with plan.tracing():
        course = carry.course(torch.while_loop(goes_on, step, carry.start))
    numbers = (as_number(flags, course.samples.error).sum() > 0 for flags in (course.lost, course.samples.active))
    return course, torch.stack([*(number.to(torch.int64) for number in numbers), course.step, course.num_evals])


def complete(plan: Plan, fz0: Tensor) -> Course:
    """The whole solve from its first step, whose image is ``fz0`` (B, D), in a graph that has no host beside it."""
    course, _ = begin(plan, fz0, num_spares=0)
    course = _copies(course)
    carry = _Carry(course, ())

    def goes_on(*values: Tensor) -> Tensor:
        return carry.course(values).goes_on(plan.limits.max_steps)

    def go_on(*values: Tensor) -> tuple[Tensor, ...]:
        now = _copies(carry.course(values))
        now = recovered(plan, now, held_map(plan, now.samples), torch.while_loop)
        now, _ = advance(plan, now, num_spares=0)
        return carry.copies(now)

    return carry.course(torch.while_loop(goes_on, go_on, carry.start))


def spares(like: Tensor, number: int = NUM_SPARES) -> list[Tensor]:
    """Tensors for what the compiler takes out of a loop, whose body has to :func:`take` them."""
    return [like.new_ones(()) for _ in range(number)]


def take(spares: list[Tensor]) -> None:
    """Make tensors inputs of the loop in whose body this is called."""
    for spare in spares:
        spare.square()


class _Carry:
    """What a loop carries from step to step: the tensors of a solve, except for those that stay the same.

    Args:
        course: The solve before the loop.
        blocks: The tensors into which the loop writes.

    Attributes:
        start: The tensors to carry into the loop.
    """

    def __init__(self, course: Course, blocks: tuple[Tensor, ...]) -> None:
        self._course = course
        constant = (course.samples.start, course.samples.start_size, *blocks)
        tensors = _tensors_of(course)
        self._is_constant = [any(tensor is other for other in constant) for tensor in tensors]
        self.start = self._carried(tensors, course)

    def copies(self, course: Course) -> tuple[Tensor, ...]:
        """Copies of the tensors to carry, as :func:`_copies` makes them."""
        blocks = course.state.blocks
        return tuple(_copy(tensor, blocks) for tensor in self._carried(_tensors_of(course), course))

    def _carried(self, tensors: list[Tensor], course: Course) -> tuple[Tensor, ...]:
        """Those of the tensors of a course that are carried."""
        like = course.samples.error
        carried = (tensor for tensor, constant in zip(tensors, self._is_constant, strict=True) if not constant)
        return tuple(as_number(tensor, like) if tensor.dtype == torch.bool else tensor for tensor in carried)

    def course(self, tensors: tuple[Tensor, ...]) -> Course:
        """The solve with these tensors."""
        supply, is_constant = iter(tensors), iter(self._is_constant)

        def carried(tensor: Tensor) -> Tensor:
            value = tensor if next(is_constant) else next(supply)
            return value > 0 if tensor.dtype == torch.bool != value.dtype else value

        return with_tensors(self._course, carried)


def held_map(plan: Plan, samples: Samples) -> FlatMapping:
    """The map, called with the values at which samples stand for those that have stopped."""
    active, held = samples.active.unsqueeze(1), _rules.held(samples)
    # The map is made where it is called: torch.export finds no shapes in an object that was made outside of a loop.
    return lambda z: plan.map().image(torch.where(active, z, held))


def _stepped(plan: Plan, now: Course) -> Course:
    """A step and its test."""
    limits = plan.limits
    state = plan.solver.step(held_map(plan, now.samples), now.state)
    step = now.step + 1
    samples, lost = take_in(limits, now.samples, now.before, state, step)
    entries, due = limits.entries_of(state), limits.is_due(step)
    tested = (~lost if due is None else ~lost & due).unsqueeze(1)
    before = State(torch.where(tested, entries.z, now.before.z), torch.where(tested, entries.fz, now.before.fz))
    return Course(state, samples, before, step, lost, now.num_evals + 1)


def recovered(plan: Plan, course: Course, f: FlatMapping, loop: Loop) -> Course:
    """The solve with its lost samples taken back."""
    lost = course.lost
    state, calls = take_back(plan.solver, f, course.state, lost, course.samples.value, loop)
    samples, _ = take_in(plan.limits, course.samples, course.before, state, course.step, lost)
    entries, rows = plan.limits.entries_of(state), lost.unsqueeze(1)
    before = State(torch.where(rows, entries.z, course.before.z), torch.where(rows, entries.fz, course.before.fz))
    return Course(state, samples, before, course.step, torch.zeros_like(lost), course.num_evals + calls)


def take_back(solver: Solver, f: FlatMapping, state: Any, lost: Tensor, best: Tensor, loop: Loop) -> tuple[Any, Tensor]:
    """Let samples go on after a plain step from their best value, or a shorter one.

    Args:
        solver: The solver.
        f: The flat map.
        state: The solver's state.
        lost: (B,) bool, the samples.
        best: (B, D) the best values.
        loop: Calls a function again and again while another one returns True.

    Returns:
        The state, and () int64, how often ``f`` was called.
    """
    start = torch.where(lost.unsqueeze(1), best, state.z)
    image = f(start)

    def goes_on(still: Tensor, calls: Tensor, length: Tensor, z: Tensor, fz: Tensor) -> Tensor:
        return still.any() & (calls <= MOST_SHORTER)

    def shortened(still: Tensor, calls: Tensor, length: Tensor, z: Tensor, fz: Tensor) -> tuple[Tensor, ...]:
        rows = still.unsqueeze(1)
        z = torch.where(rows, torch.lerp(start, image, length), z)
        fz = torch.where(rows, f(z), fz)
        return still & ~fz.isfinite().all(dim=1), calls + 1, length * SHORTER, z, fz

    calls = torch.ones((), dtype=torch.int64, device=start.device)
    still, length = lost & image.isfinite().all(dim=1), torch.ones_like(calls, dtype=start.dtype)
    # Copies, since no two inputs of a loop may be the same memory; what its functions capture is an input too.
    _, calls, _, z, fz = loop(goes_on, shortened, (still, calls, length, start.clone(), image.clone()))
    return solver.restarted(state, lost, z, fz), calls


def on_host(
    goes_on: Callable[..., Tensor], body: Callable[..., tuple[Tensor, ...]], values: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A loop that looks at the host before each turn."""
    while bool(goes_on(*values)):
        values = body(*values)
    return values


def _tensors_of(course: Course) -> list[Tensor]:
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with_tensors(course, note)
    return tensors


def _copies(course: Course) -> Course:
    """The solve with copies of its tensors, which lie in memory as a loop expects them in every turn."""
    blocks = course.state.blocks
    return with_tensors(course, lambda tensor: _copy(tensor, blocks))


def _copy(tensor: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
    for block in blocks:
        if tensor is block:  # all samples' vectors in one slot lie together
            return tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    return tensor.clone(memory_format=torch.contiguous_format)
