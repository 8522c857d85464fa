"""The driver loop: one for every solver."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Generic

import torch
from torch import Tensor

from solvers import _compiled as compiled
from solvers._branch_free import Limits
from solvers._failure import report_failure, warn_caller
from solvers._fixed_steps import FixedSteps
from solvers._graph import Plan, complete, on_host, take_back
from solvers._measure import Measure
from solvers._progress import ToleranceTest
from solvers._registry import get_solver
from solvers._solution import ConvergenceWarning, Solution
from solvers._stopping import NOT_GIVEN, NotGiven, Stopping, StopRule, Tolerance, stop_rule
from solvers.methods.newton import Newton, NewtonState
from solvers.methods.newton_krylov import FEW_UNKNOWNS
from solvers.methods.root_map import RootMap
from solvers.methods.solver import Solver, checked_state, close, take_samples
from solvers.problem import (
    FlatMap,
    InDims,
    Layout,
    OnFailure,
    S,
    Traceable,
    check_compile,
    check_on_failure,
    copy_with_tensors,
    mixing_advice,
    names_options,
    with_tensors,
    without_autocast,
)

# The part of a batch that must be finished before the rest is copied together.
COMPACT_SHARE = 0.25


@names_options
def solve(
    f: Callable[..., Any],
    z0: S,
    solver: Solver | str = "anderson",
    *,
    args: tuple[Any, ...] = (),
    stopping: StopRule | None = None,
    rtol: Tolerance = NOT_GIVEN,
    atol: Tolerance = NOT_GIVEN,
    max_steps: int | NotGiven = NOT_GIVEN,
    check_every: int | NotGiven = NOT_GIVEN,
    batch_dims: int = 1,
    history: bool = False,
    compact: bool = False,
    in_dims: InDims = 0,
    compile: bool = False,
    on_failure: OnFailure = "warn",
) -> Solution[S]:
    """Find ``z = f(z, *args)`` for a batch of independent problems.

    A sample has converged when ``norm(f(z) - z) <= atol + rtol * norm(f(z))``, where the norm is the root mean square
    over the sample's entries, and when at least one digit of its value is right, as far as the iterates tell; see
    :class:`Stopping`. Converged and failed samples are frozen, so a sample's answer does not depend on the other
    samples of the batch. A sample whose next iterate is not finite goes back to its best one. Gradients flow through
    the steps if grad mode is on; for other backward modes see :func:`implicit.fixed_point`.

    Args:
        f: The map. It takes the state and ``args``, and returns something like the state.
        z0: The start: a tensor or a pytree of tensors, real floating point.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        args: Further arguments of ``f``, the same in every call.
        stopping: When to stop: a :class:`Stopping` with tolerances, or :class:`Steps` for a fixed number of steps. The
            next four options are a shorthand for it; of these only ``max_steps`` and ``check_every`` go with it.
        rtol: Relative tolerance, 1e-4 if it is not given. With ``rtol=None, atol=None`` exactly ``max_steps`` steps
            are taken and nothing is tested, as with :class:`Steps`. A pytree of numbers like the state makes the test
            leaf by leaf.
        atol: Absolute tolerance, in the units of the state; if it is not given, a small one that is relative to the
            size of the start. See :class:`Stopping`.
        max_steps: The largest number of steps, 50 if it is not given. The call of ``f`` at ``z0`` is the first.
        check_every: Test for convergence at every so many steps instead of at each. ``history`` holds the tested ones.
        batch_dims: How many leading dimensions of the state index independent problems; 0 is one problem.
        history: Keep the residual of every step (also with a fixed number of steps).
        compact: Take finished samples out of the call of ``f``, once there are enough of them, instead of only holding
            them. Pays where ``f`` is expensive and some samples take much longer. All that ``f`` needs of each sample
            must then come through ``args``.
        in_dims: With ``compact``, which dimension of each of ``args`` indexes the samples, as in ``torch.func.vmap``:
            an int or None for all, or a tuple with one for each; None where it has none.
        compile: Run the whole loop as one graph of ``torch.compile``, which takes a fraction of the time of a step
            where the state is small, after some seconds in which it is compiled. Statuses are the same; values and
            numbers of steps are, up to rounding. For solves to a tolerance by Picard, Anderson and Broyden without
            a limited memory or a line search, of which no gradients are recorded; others run step by step, and a
            warning says so, but for those with ``history``. What is compiled is kept and runs other data, tolerances
            and numbers of steps as well.
        on_failure: What to do when a sample fails: "warn", "raise" a ConvergenceError that carries the solution, or
            "ignore". ``solution.status`` says what happened in any case.

    Returns:
        The :class:`Solution`.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: The state, an option or what ``f`` returns is not valid.

    Example:
        >>> import torch
        >>> from solvers import Anderson, solve
        >>> solution = solve(torch.cos, torch.ones(3, 1), Anderson(memory=2), rtol=1e-6)
        >>> solution.value.flatten()
        tensor([0.7391, 0.7391, 0.7391])
    """
    check_on_failure(on_failure)
    rule = stop_rule(stopping, rtol=rtol, atol=atol, max_steps=max_steps, check_every=check_every)
    options: dict[str, Any] = {
        "args": args,
        "stopping": rule,
        "batch_dims": batch_dims,
        "history": history,
        "compact": compact,
        "in_dims": in_dims,
        "compile": compile,
    }
    if compile and isinstance(rule, Stopping) and torch.compiler.is_dynamo_compiling():
        from solvers.problem import untraced

        apart: Solution[S] = untraced.call(solve, f, z0, solver, **options, on_failure=on_failure)
        return apart
    return Iteration(f, z0, solver, **options).run(on_failure)


class Iteration(Generic[S]):
    """A solve that is driven by hand; :func:`solve` is a loop over one.

    The first evaluation of the map, which counts as step 1, is made at construction.

    Args:
        f: As in :func:`solve`, as are the others.
        root: Solve ``f(z, *args) = 0`` instead, as :func:`implicit.root` does.

    Attributes:
        state: The solver's state, on the flattened (B, D) problem.
        num_steps: Steps taken so far.
        done: Whether every sample has stopped, or the steps are used up.
        tested: Whether convergence is tested: False for a fixed number of steps.

    Example:
        >>> import torch
        >>> from solvers import Iteration
        >>> iteration = Iteration(torch.cos, torch.ones(1, 1), "picard", rtol=1e-3)
        >>> while not iteration.done:
        ...     iteration.step()
        >>> iteration.num_steps, iteration.solution().value
        (18, tensor([[0.7393]]))
    """

    def __init__(
        self,
        f: Callable[..., Any],
        z0: S,
        solver: Solver | str = "anderson",
        *,
        args: tuple[Any, ...] = (),
        stopping: StopRule | None = None,
        rtol: Tolerance = NOT_GIVEN,
        atol: Tolerance = NOT_GIVEN,
        max_steps: int | NotGiven = NOT_GIVEN,
        check_every: int | NotGiven = NOT_GIVEN,
        batch_dims: int = 1,
        history: bool = False,
        compact: bool = False,
        in_dims: InDims = 0,
        compile: bool = False,
        root: bool = False,
    ) -> None:
        self._solver = get_solver(solver)
        rule = stop_rule(stopping, rtol=rtol, atol=atol, max_steps=max_steps, check_every=check_every)
        check_compile(compile, compact=compact)
        if compact and batch_dims != 1:
            raise ValueError(f"compact=True needs batch_dims=1, so that samples can leave the batch; got {batch_dims}.")
        self._layout = Layout(z0, batch_dims)
        self._map = RootMap(f, args, self._layout) if root else FlatMap(f, args, self._layout)
        rule = rule.resolved(self._map.eps)
        # For F at the end, with the arguments of all samples.
        self._whole_map = copy.copy(self._map) if isinstance(self._map, RootMap) else None
        if compact:
            self._map.check_in_dims(in_dims)
        self._in_dims = in_dims
        self._compact = compact
        self._in_graph = False
        self._max_steps = rule.max_steps
        self._goal = rule.tolerances if isinstance(rule, Stopping) else ""
        self._check_every = 1
        self._progress: FixedSteps | ToleranceTest
        self.tested = isinstance(rule, Stopping)
        if isinstance(rule, Stopping):
            self._check_every = rule.check_every
            self._measure = Measure(rule, self._layout, root=root)
            self._progress = ToleranceTest(
                rule,
                self._measure,
                self._map.eps,
                remembers=type(self._solver).restarted is not Solver.restarted,
                confirms=root and (isinstance(self._solver, Newton) or sum(self._layout.sizes) <= FEW_UNKNOWNS),
                keep_history=history,
            )
        else:
            self._progress = FixedSteps(keep_history=history)
        self.num_steps: Any = 1
        self.done = True
        with without_autocast(self._layout.device.type):
            z = self._layout.pack(z0)
            # What torch.compile traces of an iteration runs step by step: its graph breaks at the tests.
            compile = compile and not (history or torch.compiler.is_dynamo_compiling())
            fz = self._map(z) if compile else None
            if fz is None or not self._runs_compiled(rule, z0, args, f, fz):
                state = self._solver.init(self._map if fz is None else lambda _: fz, z)
                self.state = checked_state(self._solver, "init", state, z)
                self.done = self._is_done(compiling=torch.compiler.is_compiling()) or self._max_steps == 1

    def _runs_compiled(
        self, stopping: StopRule, z0: S, args: tuple[Any, ...], f: Callable[..., Any], fz: Tensor
    ) -> bool:
        """Take all steps after the first, whose image is ``fz`` (B, D), in a compiled loop; False if that cannot be."""
        progress, map_ = self._progress, self._map
        confirmed = isinstance(progress, ToleranceTest) and progress.confirms and not isinstance(self._solver, Newton)
        if compiled.is_refused(self._solver, stopping, fz, confirmed=confirmed):
            return False
        assert isinstance(stopping, Stopping)
        assert isinstance(progress, ToleranceTest)
        limits = Limits.of(stopping, self._measure, fz, eps=map_.eps, remembers=progress.remembers)
        in_graph = torch.compiler.is_compiling()
        plan = Plan(
            f=f.traced() if isinstance(f, Traceable) and not in_graph else f,
            z0=z0,
            args=args,
            batch_dims=len(self._layout.batch_shape),
            autocast=map_.autocast,
            scaling=map_.scaling,
            solver=self._solver,
            limits=limits,
            max_growth=stopping.max_growth,
            room=stopping.max_steps if in_graph else min(compiled.FIRST_ROOM, stopping.max_steps),
        )
        step: Any  # numbers, but in a graph
        num_evals: Any
        if in_graph:
            course = complete(plan, fz)
            some_active, num_evals, step = True, course.num_evals, course.step
        else:
            done = compiled.run(plan, fz)
            if done is None:
                return False
            course, some_active, step, num_evals = done
        self.state, self._in_graph, self.num_steps = course.state, in_graph, step
        map_.num_evals += num_evals - 1
        progress.take_over(course.samples, course.state, step, some_active=some_active)
        if not in_graph:
            progress.judge_again(map_, course.samples.num_steps < step, course.state.fz)
        return True

    def run(self, on_failure: OnFailure = "warn", *, what: str = "") -> Solution[S]:
        """Take all the steps that are left, and report failures.

        Args:
            on_failure: As in :func:`solve`.
            what: What is solved, as the beginning of a message; "The fixed-point solve" or "The root solve" if empty.
        """
        with without_autocast(self._layout.device.type):
            while not self.done:
                self._step()
        close(self.state)
        solution = self.solution()
        if self.tested and not self._in_graph:
            kind = "root" if isinstance(self._map, RootMap) else "fixed-point"
            what = what or f"The {kind} solve"
            report_failure(solution, on_failure, what, goal=self._goal, advice=self._advice)
            moved = self._progress.moved if isinstance(self._progress, ToleranceTest) else None
            if moved is not None and on_failure != "ignore" and bool(moved.any()) and not bool(solution.failed.any()):
                advice = mixing_advice(self._map, self.state.z, self._layout.batch_shape)
                if advice:
                    message = f"{what} converged for every sample by itself, but {advice}"
                    warn_caller(message, ConvergenceWarning, same=what)
        return solution

    def step(self) -> None:
        """Take one step, and test for convergence if a test is due; does nothing once the iteration is done."""
        if self.done:
            return
        with without_autocast(self._layout.device.type):
            self._step()

    def _step(self) -> None:
        if isinstance(self._progress, ToleranceTest) and self._progress.may_have_ended:
            self._set_finished_apart(self._progress)
        self.num_steps += 1
        state = self._solver.step(self._map, self.state)
        self.state = checked_state(self._solver, "step", state, self.state.z)
        last = self.num_steps == self._max_steps
        if last or self.num_steps % self._check_every == 0 or not self.tested:
            # Asked here, because torch.compile compiles no function that neither names torch nor is given a tensor.
            self.done = self._is_done(compiling=torch.compiler.is_compiling()) or last

    def _is_done(self, *, compiling: bool) -> bool:
        """Take in the state; True when every sample is done."""
        progress = self._progress
        if not isinstance(progress, ToleranceTest):
            return progress.update(self.num_steps, self.state)
        update = progress.update
        if compiling:
            from solvers import _untraced

            update = functools.partial(_untraced.update, progress)
        done = bool(update(self.num_steps, self.state, self._map))
        if progress.lost is not None:
            self.state, _ = take_back(self._solver, self._map, self.state, progress.lost, progress.value, on_host)
            done = bool(update(self.num_steps, self.state, self._map, taken_back=True))
        return done

    def solution(self) -> Solution[S]:
        """The solution as it stands; a sample that is still active counts as MAX_STEPS."""
        if torch.compiler.is_compiling() and isinstance(self._progress, ToleranceTest) and not self._in_graph:
            from solvers import _untraced

            outcome = _untraced.outcome(self._progress)
        else:
            outcome = self._progress.outcome()

        def unpack(per_sample: Tensor | None) -> Tensor | None:
            return None if per_sample is None else self._layout.unpack_batch(per_sample)

        change, num_evals = outcome.change, self._map.num_evals
        if self._whole_map is not None and self.tested:
            with torch.no_grad(), without_autocast(self._layout.device.type):
                residual = self._whole_map.residual(outcome.value.detach())
            change, num_evals = self._measure.norm(residual), num_evals + 1
        return Solution(
            value=self._layout.unpack(outcome.value),
            is_image=self._layout.unpack_batch(outcome.is_image),
            status=self._layout.unpack_batch(outcome.status),
            residual=unpack(outcome.residual),
            change=unpack(change),
            error_estimate=unpack(outcome.error_estimate),
            num_steps=self._layout.unpack_batch(outcome.num_steps),
            num_evals=num_evals,
            history=unpack(outcome.history),
            state=self.state,
            scaling=unpack(self._map.scaling_of_all),
        )

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Iteration[S]":
        """A copy that goes on by itself, with ``change`` of every tensor that the steps so far have left.

        A tensor that ``change`` returns as it is gets copied, because steps may write into it.
        """

        def apart(tensor: Tensor) -> Tensor:
            changed = change(tensor)
            return changed.clone() if changed is tensor else changed

        other = copy.copy(self)
        other.state = with_tensors(self.state, apart)
        other._progress = copy_with_tensors(self._progress, apart)
        other._map = copy_with_tensors(self._map, apart)
        if self._whole_map is not None:
            other._whole_map = copy_with_tensors(self._whole_map, apart)
        return other

    def _set_finished_apart(self, progress: ToleranceTest) -> None:
        """Keep what is finished from the map: out of its call if enough is, else held at its value."""
        if self._compact and progress.num_done and progress.num_done >= COMPACT_SHARE * progress.active.shape[0]:
            keep = progress.drop_done()
            self.state = take_samples(self.state, keep)
            self._map.take_samples(keep, self._in_dims)
        else:
            self._map.freeze(progress.active, progress.held())

    def _advice(self) -> str:
        return advice_on(self._map, [self.state], self.state.z, self._layout.batch_shape)


def advice_on(f: FlatMap, states: list[Any], z: Tensor, batch_shape: torch.Size) -> str:
    """What may be wrong with the map, as far as failed solves that ended in ``states`` can find out at ``z`` (B, D)."""
    if number := sum(state.num_stuck for state in states if isinstance(state, NewtonState)):
        return (
            f"Newton's matrix is singular where {number} samples ended, so that there may be "
            "no solution near, or a continuum of them. Start elsewhere, or add the equation that is missing."
        )
    return mixing_advice(f, z, batch_shape)
