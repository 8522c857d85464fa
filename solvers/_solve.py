"""The driver loop: one for every solver."""

from collections.abc import Callable
from typing import Any

from solvers._base import FlatMap, Solver
from solvers._batching import Layout
from solvers._convergence import FixedSteps, ToleranceTest
from solvers._failure import OnFailure, report_failure
from solvers._registry import get_solver
from solvers._solution import Solution


def solve(
    f: Callable[..., Any],
    z0: Any,
    solver: Solver | str = "anderson",
    *,
    args: tuple[Any, ...] = (),
    rtol: float | None = 1e-4,
    atol: float | None = 1e-6,
    max_steps: int = 50,
    batch_dims: int = 1,
    history: bool = False,
    on_failure: OnFailure = "warn",
) -> Solution:
    """Find ``z = f(z, *args)`` for a batch of independent problems.

    A sample has converged when ``norm(f(z) - z) <= atol + rtol * norm(f(z))``, where the norm is the root mean square
    over the sample's entries. Converged and failed samples are frozen, so that a sample's answer does not depend on
    its batch mates. Gradients flow through the steps if grad mode is on; for other backward modes see
    :func:`implicit.fixed_point`.

    Args:
        f: The map. Takes the state and ``args``, returns something like the state.
        z0: The start: a tensor or a pytree of tensors, real floating point.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        args: Further arguments of ``f``, the same in every call.
        rtol: Relative tolerance. With ``rtol=None, atol=None`` exactly ``max_steps`` steps are taken and nothing is
            tested: no residual, no copy to the host, status UNTESTED. If only one is None it counts as 0.
        atol: Absolute tolerance, in the units of the state.
        max_steps: Most steps to take. The call of ``f`` at ``z0`` is the first.
        batch_dims: How many leading dimensions of the state index independent problems; 0 is one problem.
        history: Keep the residual of every step (also with a fixed number of steps).
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
    solver = get_solver(solver)
    check_options(rtol, atol, max_steps, on_failure)
    layout = Layout(z0, batch_dims)
    flat_map = FlatMap(f, args, layout)
    progress: FixedSteps | ToleranceTest
    if rtol is None and atol is None:
        progress = FixedSteps(keep_history=history)
    else:
        progress = ToleranceTest(rtol or 0.0, atol or 0.0, keep_history=history)

    state = solver.init(flat_map, layout.pack(z0))
    done = progress.update(state.z, state.fz)
    for _ in range(max_steps - 1):
        if done:
            break
        if progress.any_done:
            flat_map.freeze(progress.done, progress.value.detach())
        state = solver.step(flat_map, state)
        done = progress.update(state.z, state.fz)
    progress.finish()

    solution = Solution(
        value=layout.unpack(progress.value),
        status=layout.unpack_batch(progress.status),
        residual=None if progress.residual is None else layout.unpack_batch(progress.residual),
        num_steps=layout.unpack_batch(progress.num_steps),
        num_evals=flat_map.num_evals,
        history=None if progress.history is None else layout.unpack_batch(progress.history),
        state=state,
    )
    if isinstance(progress, ToleranceTest):
        report_failure(solution, on_failure)
    return solution


def check_options(rtol: float | None, atol: float | None, max_steps: int, on_failure: str) -> None:
    """Raise a ValueError for the first option that is unfit."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"{name} must be a number >= 0 or None, got {tolerance!r}.")
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}.")
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure must be "warn", "raise" or "ignore", got {on_failure!r}.')
