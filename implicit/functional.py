"""The fixed point of a map as a differentiable function."""

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, Unpack, overload

import torch

from implicit.autograd.torch_internals import transform_active
from implicit.backward import Backward, SolveOptions, get_backward
from implicit.solve_keywords import SolveKeywords
from solvers import (
    NOT_GIVEN,
    NotGiven,
    Solution,
    Solver,
    Stopping,
    StopRule,
    Tolerance,
    get_solver,
    stop_rule,
)
from solvers.problem import InDims, OnFailure, S, names_options, require_callable

# Takes the map, the start, its other arguments, the backward mode, the options and the owner of a solve.
Solve = Callable[[Callable[..., Any], Any, tuple[Any, ...], Backward, SolveOptions, object], Solution[Any]]
# What makes the solves of this thread while implicit.diagnostics looks at them; None makes them as they are.
solve_in_force: ContextVar[Solve | None] = ContextVar("solve_in_force", default=None)


@overload
def fixed_point(
    f: Callable[..., Any],
    z0: S,
    *args: Any,
    return_solution: Literal[False] = ...,
    **options: Unpack[SolveKeywords],
) -> S: ...


@overload
def fixed_point(
    f: Callable[..., Any],
    z0: S,
    *args: Any,
    return_solution: Literal[True],
    **options: Unpack[SolveKeywords],
) -> tuple[S, Solution[S]]: ...


@names_options
def fixed_point(
    f: Callable[..., Any],
    z0: S,
    *args: Any,
    solver: Solver | str = "anderson",
    backward: Backward | str = "implicit",
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
    return_solution: bool = False,
) -> S | tuple[S, Solution[S]]:
    """The solution of ``z = f(z, *args)``, differentiable in ``args`` and in all that ``f`` depends on.

    Gradients reach the tensors in ``args``, the parameters of ``f`` if it is a module, and the modules and tensors that
    its code refers to, in closures, global variables, attributes, partials, lists and dicts. Other tensors, such as
    global variables of another file, get theirs if ``f`` uses them at ``z0``. An intermediate result of a network is
    best passed in ``args``: if ``f`` closes over it and over a tensor that it was computed from, its history is
    differentiated again in the backward pass. Gradients depend on ``torch.is_grad_enabled()`` alone, not on a
    module's training mode; the value does not depend on it.

    Args:
        f: The map, taking the state and ``args``. It must not mix samples, and must be the same in every call.
        z0: The start, a tensor or a pytree of tensors. It gets no gradient, except under ``Unrolled`` and
            ``Checkpointed``.
        *args: Further arguments of ``f``: tensors, pytrees of tensors, or anything else.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        backward: A backward mode such as ``Implicit()``, or its name.
        stopping: When to stop, as in :func:`solvers.solve`, as are the options up to ``in_dims``.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        max_steps: The largest number of steps.
        check_every: Test at every so many steps.
        batch_dims: How many leading dimensions of the state index independent problems.
        history: Keep the residual of every step.
        compact: Take finished samples out of the call of ``f``.
        in_dims: With ``compact``, which dimension of each of ``args`` indexes the samples.
        compile: Run the loop of the solve as one compiled graph, as :func:`solvers.solve` does. Gradients are as
            without it: the implicit mode does not need the steps.
        on_failure: "warn", "raise" or "ignore", for the forward solve and for linear solves of derivatives.
        return_solution: Return ``(z, solution)``. After a backward pass ``solution.adjoint`` tells how its linear
            solve went, if it made one.

    Returns:
        The fixed point, like ``z0``, or the pair.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: The state, an option or what ``f`` returns is not valid.

    Example:
        >>> import torch
        >>> from implicit import fixed_point
        >>> x = torch.tensor([[2.0]], requires_grad=True)
        >>> z = fixed_point(lambda z, x: 0.5 * (z + x / z), torch.ones(1, 1), x)  # the square root of x
        >>> z.backward()
        >>> x.grad  # 1 / (2 sqrt(x))
        tensor([[0.3536]])
    """
    require_callable("fixed_point(f)", f)
    mode = get_backward(backward)
    options = SolveOptions(
        solver=get_solver(solver),
        stopping=stop_rule(stopping, rtol=rtol, atol=atol, max_steps=max_steps, check_every=check_every),
        batch_dims=batch_dims,
        history=history,
        compact=compact,
        in_dims=in_dims,
        compile=compile,
        on_failure=on_failure,
    )
    mode.check(options.solver)
    solution = solve_with_gradient(f, z0, args, mode, options)
    return (solution.value, solution) if return_solution else solution.value


def solve_with_gradient(
    f: Callable[..., Any], z0: S, args: tuple[Any, ...], mode: Backward, options: SolveOptions, owner: object = None
) -> Solution[S]:
    """The solution of ``z = f(z, *args)``; its value carries the gradient of a backward mode where one is recorded.

    The owner is the layer whose solve this is; that of a call of a function is ``f`` itself.
    """
    if options.compile and isinstance(options.stopping, Stopping) and torch.compiler.is_dynamo_compiling():
        from solvers.problem import untraced

        apart: Solution[S] = untraced.call(solve_with_gradient, f, z0, args, mode, options, owner)
        return apart
    solve = None if torch.compiler.is_compiling() else solve_in_force.get()
    if solve is None:
        return solve_unobserved(f, z0, args, mode, options)
    return solve(f, z0, args, mode, options, f if owner is None else owner)


def solve_unobserved(
    f: Callable[..., Any], z0: S, args: tuple[Any, ...], mode: Backward, options: SolveOptions
) -> Solution[S]:
    """The same, whatever is in force."""
    # Not while torch.compile traces, when PyTorch 2.11 says that it is exporting too.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting and isinstance(options.stopping, Stopping):
        if not options.solver.compiles or options.compact or options.history:
            raise ValueError(
                f"A solve to a tolerance, got rtol={options.stopping.rtol!r}, is exported as a loop, for which "
                f"{options.solver!r} has no form, nor has any solver with compact=True or a history. Use Picard, "
                "Anderson or Broyden (without a limited memory or a line search), or a fixed number of steps: "
                "rtol=None, atol=None, max_steps=n."
            )
        return mode.evaluate(f, z0, args, dataclasses.replace(options, compile=True))
    mode = mode.chosen(options)
    if not exporting and (torch.is_grad_enabled() or transform_active()):
        solution = mode.solve(f, z0, args, options)
        if not isinstance(solution, Solution):
            raise TypeError(f"{mode!r}.solve must return a solvers.Solution, got a {type(solution).__name__}.")
        solution.backward = mode
        return solution
    return mode.evaluate(f, z0, args, options)
