"""The fixed point of a map as a differentiable function."""

from collections.abc import Callable
from typing import Any, Literal, overload

import torch

from implicit.autograd.torch_internals import transform_active
from implicit.backward import Backward, SolveOptions, get_backward
from solvers import Solution, Solver, Stopping, get_solver
from solvers._failure import OnFailure
from solvers._stopping import ATOL, RTOL, get_stopping


@overload
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | str = ...,
    backward: Backward | str = ...,
    rtol: Any = ...,
    atol: Any = ...,
    stopping: Stopping | None = ...,
    max_steps: int = ...,
    batch_dims: int = ...,
    history: bool = ...,
    on_failure: OnFailure = ...,
    return_solution: Literal[False] = ...,
) -> Any: ...


@overload
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | str = ...,
    backward: Backward | str = ...,
    rtol: Any = ...,
    atol: Any = ...,
    stopping: Stopping | None = ...,
    max_steps: int = ...,
    batch_dims: int = ...,
    history: bool = ...,
    on_failure: OnFailure = ...,
    return_solution: Literal[True],
) -> tuple[Any, Solution]: ...


def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver | str = "anderson",
    backward: Backward | str = "implicit",
    rtol: Any = RTOL,
    atol: Any = ATOL,
    stopping: Stopping | None = None,
    max_steps: int = 50,
    batch_dims: int = 1,
    history: bool = False,
    on_failure: OnFailure = "warn",
    return_solution: bool = False,
) -> Any:
    """The solution of ``z = f(z, *args)``, differentiable in ``args`` and in all that ``f`` depends on.

    Gradients reach the tensors in ``args``, the parameters of ``f`` where it is a module, and leaf tensors that it
    closes over. An intermediate result of a network is best passed in ``args``: if ``f`` closes over it, its history
    is differentiated again in the backward pass. Gradients depend on ``torch.is_grad_enabled()`` alone, not on a
    module's training mode.

    Args:
        f: The map, taking the state and ``args``. It must not mix samples, and must be the same in every call.
        z0: The start, a tensor or a pytree of tensors. It gets no gradient, except under ``Unrolled`` and
            ``Checkpointed``.
        *args: Further arguments of ``f``: tensors, pytrees of tensors, or anything else.
        solver: A solver such as ``Anderson(memory=5)``, or its name.
        backward: A backward mode such as ``Implicit()``, or its name.
        rtol: As in :func:`solvers.solve`.
        atol: As in :func:`solvers.solve`.
        stopping: As in :func:`solvers.solve`.
        max_steps: As in :func:`solvers.solve`.
        batch_dims: As in :func:`solvers.solve`.
        history: As in :func:`solvers.solve`.
        on_failure: As in :func:`solvers.solve`, for the forward solve and for linear solves of derivatives.
        return_solution: Return ``(z, solution)``. After a backward pass ``solution.adjoint`` tells how its linear
            solve went, if it made one.

    Returns:
        The fixed point, like ``z0``.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: The state, an option or what ``f`` returns is unfit.

    Example:
        >>> import torch
        >>> from implicit import fixed_point
        >>> x = torch.tensor([[2.0]], requires_grad=True)
        >>> z = fixed_point(lambda z, x: 0.5 * (z + x / z), torch.ones(1, 1), x)  # the square root of x
        >>> z.backward()
        >>> x.grad  # 1 / (2 sqrt(x))
        tensor([[0.3536]])
    """
    mode = get_backward(backward)
    options = SolveOptions(
        solver=get_solver(solver),
        stopping=get_stopping(rtol, atol, stopping),
        max_steps=max_steps,
        batch_dims=batch_dims,
        history=history,
        on_failure=on_failure,
    )
    mode.check(options.solver)
    # Not while torch.compile traces, when PyTorch 2.11 says that it is exporting too.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting and options.stopping is not None:
        raise ValueError(
            f"A solve to a tolerance, got rtol={rtol!r}, cannot be exported: its test for convergence decides by the "
            "values, and a graph has none. Export a fixed number of steps: rtol=None, atol=None, max_steps=n."
        )
    mode = mode.chosen(options)
    if not exporting and (torch.is_grad_enabled() or transform_active()):
        solution = mode.solve(f, z0, args, options)
        solution.backward = mode
    else:
        solution = mode.evaluate(f, z0, args, options)
    return (solution.value, solution) if return_solution else solution.value
