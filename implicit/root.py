"""The root of a function, differentiable."""

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import torch
from torch.utils._pytree import tree_leaves

from implicit.backward import Backward, Implicit, SolveOptions, get_backward
from implicit.functional import solve_with_gradient
from implicit.solve_keywords import RootKeywords
from solvers import NOT_GIVEN, NotGiven, Solution, Solver, Stopping, StopRule, Tolerance, get_solver, stop_rule
from solvers.problem import InDims, OnFailure, S, names_options, require_callable


@overload
def root(
    F: Callable[..., Any],  # noqa: N803
    z0: S,
    *args: Any,
    return_solution: Literal[False] = ...,
    **options: Unpack[RootKeywords],
) -> S: ...


@overload
def root(
    F: Callable[..., Any],  # noqa: N803
    z0: S,
    *args: Any,
    return_solution: Literal[True],
    **options: Unpack[RootKeywords],
) -> tuple[S, Solution[S]]: ...


@names_options
def root(
    F: Callable[..., Any],  # noqa: N803
    z0: S,
    *args: Any,
    solver: Solver | str = "newton",
    backward: Backward | str = Implicit(linear_solver="auto"),
    stopping: StopRule | None = None,
    rtol: Tolerance = NOT_GIVEN,
    atol: Tolerance = NOT_GIVEN,
    max_steps: int | NotGiven = NOT_GIVEN,
    check_every: int | NotGiven = NOT_GIVEN,
    batch_dims: int = 1,
    history: bool = False,
    compact: bool = False,
    in_dims: InDims = 0,
    chunk_size: int | None = None,
    compile: bool = False,
    on_failure: OnFailure = "warn",
    return_solution: bool = False,
) -> S | tuple[S, Solution[S]]:
    """The solution of ``F(z, *args) = 0``, differentiable in ``args`` and in all that ``F`` depends on.

    With u the solution of the linear system ``F_z' u = -w`` for the incoming gradient w, the gradient to each input or
    parameter t is ``F_t' u``. What :func:`fixed_point` says of gradients, transforms and backward modes holds here.

    ``F`` is given as it is, in any units and with either sign. The solver sees the fixed point of ``z - c F(z)``, with
    a number c for each sample that it takes from the slope of F at the start, and a sample has converged when

        norm(c F(z)) <= rtol * norm(z) + |c| * atol,

    and when the error that the last step shows is within this bound as well. So ``rtol`` bounds the relative error of
    the root, as far as the iterates tell; multiplying F, or the units of z, by a number changes neither the status nor
    the number of steps. :class:`solvers.Newton` tests its step instead of ``c F(z)``, which does not depend on the
    units of single equations either.

    Args:
        F: The function, taking the state and ``args``. It returns something of the structure and shapes of the state,
            must not mix samples, and must be the same in every call.
        z0: The start, a tensor or a pytree of tensors. It gets no gradient, except under ``Unrolled`` and
            ``Checkpointed``.
        *args: Further arguments of ``F``: tensors, pytrees of tensors, or anything else.
        solver: A solver or its name. ``Newton()`` is for samples of few unknowns; for many, use ``NewtonKrylov()``,
            ``Broyden()`` or ``Anderson()``.
        backward: A backward mode or its name. By default :class:`Implicit` with a direct solve for samples of at most
            32 unknowns and an iterative one otherwise.
        stopping: When to stop, as in :func:`solvers.solve`, as are the options up to ``in_dims``.
        rtol: Relative tolerance; the square root of the rounding unit of the dtype of ``z0`` if nothing is given.
        atol: Absolute tolerance, in the units of F.
        max_steps: The largest number of steps.
        check_every: Test at every so many steps.
        batch_dims: How many leading dimensions of the state index independent problems; 0 is one problem.
        history: Keep the residual of every step.
        compact: Take finished samples out of the call of ``F``.
        in_dims: With ``compact`` or ``chunk_size``, which dimension of each of ``args`` indexes the samples, as in
            ``torch.func.vmap``: an int or None for all, or a tuple with one for each.
        chunk_size: Solve so many samples at a time, whose intermediate results then fit into the cache or the memory.
            All that ``F`` needs of each sample must then come through ``args``.
        compile: Run the loop of the solve as one compiled graph, as :func:`solvers.solve` does; of ``Newton``, all full
            steps, after which samples that need shorter ones go on step by step. With ``chunk_size``, one graph serves
            all parts. Gradients are as without it: the implicit mode does not need the steps.
        on_failure: "warn", "raise" or "ignore", for the forward solve and for linear solves of derivatives.
        return_solution: Return ``(z, solution)``. ``solution.change`` is ``norm(F(z))``, in the units of F.

    Returns:
        The root, like ``z0``, or the pair.

    Raises:
        ConvergenceError: A sample failed and ``on_failure="raise"``.
        TypeError, ValueError: The state, an option or what ``F`` returns is not valid.

    Example:
        >>> import torch
        >>> from implicit import root
        >>> x = torch.tensor([[2.0]], requires_grad=True)
        >>> z = root(lambda z, x: z**3 - x, torch.ones(1, 1), x)
        >>> z.backward()
        >>> z.item(), x.grad.item()  # the cube root of 2, and a third of its quotient with 2
        (1.259921..., 0.20998...)
    """
    require_callable("root(F)", F)
    mode = get_backward(backward)
    leaves = [leaf for leaf in tree_leaves(z0) if isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point]
    rtol_by_default = max((torch.finfo(leaf.dtype).eps ** 0.5 for leaf in leaves), default=1e-4)
    options = SolveOptions(
        solver=get_solver(solver),
        stopping=stop_rule(
            stopping,
            rtol=rtol,
            atol=atol,
            max_steps=max_steps,
            check_every=check_every,
            default=Stopping(rtol=rtol_by_default),
        ),
        batch_dims=batch_dims,
        history=history,
        compact=compact,
        in_dims=in_dims,
        chunk_size=chunk_size,
        compile=compile,
        on_failure=on_failure,
        root=True,
    )
    mode.check(options.solver)
    solution = solve_with_gradient(F, z0, args, mode, options)
    return (solution.value, solution) if return_solution else solution.value
