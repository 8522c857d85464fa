"""A solve as one loop of tensor code, whose every step is the same.

``Iteration`` takes its steps one by one and looks at the host after each. The loop of this module, in the forms of
:mod:`solvers._loop`, goes on until all samples have stopped or something rare has to be done, for which it stops:

- a sample is lost and has to be taken back, which takes an unknown number of calls of the map;
- the solver has no room for what it remembers.

A compiled solve does this on the host, by the code that every solve uses, and goes on with the loop. A solve that is
exported, or traced as part of a larger graph, has no host: :func:`complete` does it in the graph.

The step is the solver's own, for a state of fixed shape (:meth:`solvers.Solver.fixed_shape`), and the stopping test is
:func:`solvers._branch_free.take_in`. All numbers that may change from solve to solve are tensors; the tensors of the
map are what ``torch.compile`` finds in it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers import _loop, _rules
from solvers._branch_free import Limits, first, take_in
from solvers._loop import Carry, Run, Task, copies
from solvers._samples import Samples
from solvers.methods.root_map import RootMap
from solvers.methods.solver import FlatMapping, Solver, State
from solvers.problem import FlatMap, Layout

# A step that leads to infinity or NaN is replaced by the plain one, or by one so many times shorter, and so on.
SHORTER, MOST_SHORTER = 0.25, 8

LoopFunction = Callable[
    [Callable[..., Tensor], Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]
]


@dataclasses.dataclass
class Course(Run):
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

    @property
    def constants(self) -> tuple[Tensor, ...]:
        return (self.samples.start, self.samples.start_size)

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        blocks: tuple[Tensor, ...] = self.state.blocks
        return blocks

    def goes_on(self, max_steps: Tensor) -> Tensor:
        """() bool: whether the solve is not done."""
        return self.samples.active.any() & (self.step < max_steps)


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
    """

    scaling: Tensor | None
    solver: Solver
    max_growth: float
    room: int

    def map(self) -> FlatMap:
        """The map as the solver sees it."""
        map_ = self.map_of(FlatMap if self.scaling is None else RootMap)
        map_.scaling = self.scaling
        return map_


def _start(plan: Plan, fz0: Tensor) -> Course:
    """Where the solve stands after its first step, whose image is ``fz0`` (B, D)."""
    z0 = Layout(plan.z0, plan.batch_dims).pack(plan.z0)
    state = plan.solver.fixed_shape(plan.solver.init(lambda _: fz0, z0), plan.room)
    samples = first(plan.limits, state, plan.max_growth, plan.map().unit)
    one = torch.ones_like(plan.limits.max_steps)
    before = plan.limits.entries_of(State(z0, fz0))
    return Course(state, samples, before, one, torch.zeros_like(samples.active), one)


def _goes_on(plan: Plan, now: Course) -> Tensor:
    """() bool: whether there is a next step, before which nothing else is to be done."""
    goes_on = now.goes_on(plan.limits.max_steps) & ~now.lost.any()
    room = plan.solver.room(now.state)
    return goes_on if room is None else goes_on & (room > 0)


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


def _numbers(now: Course) -> tuple[Tensor, ...]:
    """Whether samples are lost, whether some are active, the step, and the number of calls."""
    return now.lost.any(), now.samples.active.any(), now.step, now.num_evals


LOOP: _loop.Loop[Plan, Course] = _loop.Loop(_start, _goes_on, _stepped, _numbers)


def complete(plan: Plan, fz0: Tensor) -> Course:
    """The whole solve from its first step, whose image is ``fz0`` (B, D), in a graph that has no host beside it."""

    def advanced(course: Course | None) -> Course:
        course, _ = _loop.whole(LOOP, False, plan, fz0, course, num_spares=0)
        return course

    course = copies(advanced(None))
    carry = Carry(course, in_place=False)

    def goes_on(*values: Tensor) -> Tensor:
        return carry.run(values).goes_on(plan.limits.max_steps)

    def go_on(*values: Tensor) -> tuple[Tensor, ...]:
        now = copies(carry.run(values))
        return carry.copies(advanced(recovered(plan, now, held_map(plan, now.samples), torch.while_loop)))

    return carry.run(torch.while_loop(goes_on, go_on, carry.start))


def held_map(plan: Plan, samples: Samples) -> FlatMapping:
    """The map, called with the values at which samples stand for those that have stopped."""
    active, held = samples.active.unsqueeze(1), _rules.held(samples)
    # The map is made where it is called: torch.export finds no shapes in an object that was made outside of a loop.
    return lambda z: plan.map().image(torch.where(active, z, held))


def recovered(plan: Plan, course: Course, f: FlatMapping, loop: LoopFunction) -> Course:
    """The solve with its lost samples taken back."""
    lost = course.lost
    state, calls = take_back(plan.solver, f, course.state, lost, course.samples.value, loop)
    samples, _ = take_in(plan.limits, course.samples, course.before, state, course.step, lost)
    entries, rows = plan.limits.entries_of(state), lost.unsqueeze(1)
    before = State(torch.where(rows, entries.z, course.before.z), torch.where(rows, entries.fz, course.before.fz))
    return Course(state, samples, before, course.step, torch.zeros_like(lost), course.num_evals + calls)


def take_back(
    solver: Solver, f: FlatMapping, state: Any, lost: Tensor, best: Tensor, loop: LoopFunction
) -> tuple[Any, Tensor]:
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
