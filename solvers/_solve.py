"""The driver loop: one for every solver."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers._failure import OnFailure, report_failure
from solvers._progress import FixedSteps, ToleranceTest
from solvers._registry import get_solver
from solvers._solution import Solution
from solvers._stopping import ATOL, RTOL, Measure, Stopping, get_stopping
from solvers.methods.solver import Solver, close, take_samples
from solvers.problem.autocast import without_autocast
from solvers.problem.flat_map import FlatMap, InDims
from solvers.problem.hyperparameters import require_positive_int
from solvers.problem.layout import Layout
from solvers.problem.replaced_tensors import copy_with_tensors, with_tensors

# The part of a batch that must be finished before the rest is copied together.
COMPACT_SHARE = 0.25


def solve(
    f: Callable[..., Any],
    z0: Any,
    solver: Solver | str = "anderson",
    *,
    args: tuple[Any, ...] = (),
    rtol: Any = RTOL,
    atol: Any = ATOL,
    stopping: Stopping | None = None,
    max_steps: int = 50,
    batch_dims: int = 1,
    history: bool = False,
    check_every: int = 1,
    compact: bool = False,
    in_dims: InDims = 0,
    on_failure: OnFailure = "warn",
) -> Solution:
    """Find ``z = f(z, *args)`` for a batch of independent problems.

    A sample has converged when ``norm(f(z) - z) <= atol + rtol * norm(f(z))``, where the norm is the root mean square
    over the sample's entries, or another one that ``stopping`` names. Converged and failed samples are frozen, so that
    a sample's answer does not depend on its batch mates. Gradients flow through the steps if grad mode is on; for other
    backward modes see :func:`implicit.fixed_point`.

    Args:
        f: The map. Takes the state and ``args``, returns something like the state.
        z0: The start: a tensor or a pytree of tensors, real floating point.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        args: Further arguments of ``f``, the same in every call.
        rtol: Relative tolerance. With ``rtol=None, atol=None`` exactly ``max_steps`` steps are taken and nothing is
            tested: no residual, no copy to the host, status UNTESTED. If only one is None it counts as 0. A pytree of
            numbers like the state makes the test leaf by leaf.
        atol: Absolute tolerance, in the units of the state; likewise.
        stopping: In the place of both tolerances, a :class:`Stopping` with these and more: the norm, and when there is
            no more hope.
        max_steps: Most steps to take. The call of ``f`` at ``z0`` is the first.
        batch_dims: How many leading dimensions of the state index independent problems; 0 is one problem.
        history: Keep the residual of every step (also with a fixed number of steps).
        check_every: Test for convergence at every so many steps (and the first and last) instead of at each. Between
            tests nothing waits for the device; a sample may take up to so many steps more, and ``history`` holds the
            tested ones.
        compact: Take finished samples out of the call of ``f``, once there are enough of them, instead of only holding
            them. Pays where ``f`` is dear and some samples take much longer. All that ``f`` needs of each sample must
            then come through ``args``.
        in_dims: With ``compact``, which dimension of each of ``args`` indexes the samples, as in ``torch.func.vmap``:
            an int or None for all, or a tuple with one for each; None where it has none.
        on_failure: What to do when a sample fails: "warn", "raise" a ConvergenceError that carries the solution, or
            "ignore". ``solution.status`` says what happened in any case.

    Returns:
        The :class:`Solution`.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: The state, an option or what ``f`` returns is unfit.

    Example:
        >>> import torch
        >>> from solvers import Anderson, solve
        >>> solution = solve(torch.cos, torch.ones(3, 1), Anderson(memory=2), rtol=1e-6)
        >>> solution.value.flatten()
        tensor([0.7391, 0.7391, 0.7391])
    """
    check_options(max_steps, on_failure)
    iteration = Iteration(
        f,
        z0,
        solver,
        args=args,
        rtol=rtol,
        atol=atol,
        stopping=stopping,
        max_steps=max_steps,
        batch_dims=batch_dims,
        history=history,
        check_every=check_every,
        compact=compact,
        in_dims=in_dims,
    )
    while not iteration.done:
        iteration.step()
    close(iteration.state)
    solution = iteration.solution()
    if iteration.tested:
        report_failure(solution, on_failure)
    return solution


class Iteration:
    """A solve that is driven by hand; :func:`solve` is a loop over one.

    The first evaluation of the map, which counts as step 1, is made at construction.

    Args:
        f: As in :func:`solve`, and so on.

    Attributes:
        state: The solver's state, on the flattened (B, D) problem.
        num_steps: Steps taken so far.
        done: Whether every sample has stopped, or the steps are used up.
        tested: Whether convergence is tested, as it is but for a fixed number of steps.

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
        z0: Any,
        solver: Solver | str = "anderson",
        *,
        args: tuple[Any, ...] = (),
        rtol: Any = RTOL,
        atol: Any = ATOL,
        stopping: Stopping | None = None,
        max_steps: int = 50,
        batch_dims: int = 1,
        history: bool = False,
        check_every: int = 1,
        compact: bool = False,
        in_dims: InDims = 0,
    ) -> None:
        self._solver = get_solver(solver)
        check_options(max_steps)
        stopping = get_stopping(rtol, atol, stopping)
        require_positive_int(self, "check_every", check_every)
        if compact and batch_dims != 1:
            raise ValueError(f"compact=True needs batch_dims=1, so that samples can leave the batch; got {batch_dims}.")
        self._layout = Layout(z0, batch_dims)
        self._map = FlatMap(f, args, self._layout)
        if compact:
            self._map.check_in_dims(in_dims)
        self._in_dims = in_dims
        self._max_steps = max_steps
        self._check_every = check_every
        self._compact = compact
        self._progress: FixedSteps | ToleranceTest
        self.tested = stopping is not None
        if stopping is None:
            self._progress = FixedSteps(keep_history=history)
        else:
            measure = Measure(stopping, self._layout)
            self._progress = ToleranceTest(stopping, measure, self._map.eps, keep_history=history)
        # Finished samples, of those in the call of f, that it is held from.
        self._num_apart = 0
        self.num_steps = 1
        with without_autocast(self._layout.device.type):
            self.state = self._solver.init(self._map, self._layout.pack(z0))
            self.done = self._is_done(compiling=torch.compiler.is_compiling()) or max_steps == 1

    def step(self) -> None:
        """Take one step, and test for convergence if one is due; does nothing once the iteration is done."""
        if self.done:
            return
        with without_autocast(self._layout.device.type):
            if isinstance(self._progress, ToleranceTest):
                self._progress.forget_earlier()
                if self._progress.num_done > self._num_apart:
                    self._set_finished_apart(self._progress)
            self._step()

    def _step(self) -> None:
        self.num_steps += 1
        self.state = self._solver.step(self._map, self.state)
        last = self.num_steps == self._max_steps
        due = last or self.num_steps % self._check_every == 0 or isinstance(self._progress, FixedSteps)
        if due:
            # Asked here, because torch.compile compiles no function that neither names torch nor is given a tensor.
            self.done = self._is_done(compiling=torch.compiler.is_compiling()) or last

    def _is_done(self, *, compiling: bool) -> bool:
        """Take in the state; True when every sample is done."""
        progress, news = self._progress, (self.num_steps, self.state.z, self.state.fz)
        if compiling and isinstance(progress, ToleranceTest):
            from solvers import _outside_graphs

            return bool(_outside_graphs.update(progress, *news))
        return progress.update(*news)

    def solution(self) -> Solution:
        """The solution as it stands; a sample that is still active counts as MAX_STEPS."""
        outcome = self._progress.outcome()

        def unpack(per_sample: Tensor | None) -> Tensor | None:
            return None if per_sample is None else self._layout.unpack_batch(per_sample)

        return Solution(
            value=self._layout.unpack(outcome.value),
            status=self._layout.unpack_batch(outcome.status),
            residual=unpack(outcome.residual),
            change=unpack(outcome.change),
            error_estimate=unpack(outcome.error_estimate),
            num_steps=self._layout.unpack_batch(outcome.num_steps),
            num_evals=self._map.num_evals,
            history=unpack(outcome.history),
            state=self.state,
        )

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Iteration":
        """A copy that goes on by itself, with ``change`` of every tensor that the steps so far have left.

        Under ``lambda tensor: tensor`` it is where this iteration is, and stays there while this one takes steps.
        """

        def own(tensor: Tensor) -> Tensor:
            changed = change(tensor)
            return changed.clone() if changed is tensor else changed  # a solver may write to its state

        other = copy.copy(self)
        other.state = with_tensors(self.state, own)
        other._progress = copy_with_tensors(self._progress, own)
        other._map = copy_with_tensors(self._map, own)
        return other

    def _set_finished_apart(self, progress: ToleranceTest) -> None:
        """Keep what is finished from the map: out of its call if enough is, else held at its value."""
        if self._compact and progress.num_done >= COMPACT_SHARE * len(progress.done):
            keep = progress.drop_done()
            self.state = take_samples(self.state, keep)
            self._map.take_samples(keep, self._in_dims)
        else:
            self._map.freeze(progress.done, progress.held())
        self._num_apart = progress.num_done


def check_options(max_steps: int, on_failure: str = "ignore") -> None:
    """Raise a ValueError for the first option that is unfit."""
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}.")
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {on_failure!r}.')
