"""Conditions that minimizers satisfy, made from their objective."""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from solvers.problem import require_callable


def stationary(objective: Callable[..., Any]) -> Callable[..., Any]:
    """The condition that the gradient of an objective is zero: ``F(z, *args) = d objective(z, *args) / dz``.

    For :func:`implicit.differentiable` and :func:`implicit.root`, whose linear operator is then the Hessian:
    ``linear_solver="cg"`` suits a minimum of many unknowns.

    Args:
        objective: A function of z and further arguments, to a number, or to a tensor with one number for each of
            several independent problems.

    Returns:
        A function of z and these arguments to something like z.

    Example:
        >>> import torch
        >>> from implicit import differentiable, stationary
        >>> def ridge(w, x, y, penalty):
        ...     return ((x @ w - y) ** 2).sum() + penalty * (w**2).sum()
        >>> @differentiable(optimality=stationary(ridge))
        ... def fit(x, y, penalty):
        ...     return torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)  # any solver
        >>> x, y, penalty = torch.eye(2), torch.ones(2), torch.tensor(1.0, requires_grad=True)
        >>> torch.autograd.grad(fit(x, y, penalty).sum(), penalty)
        (tensor(-0.5000),)
    """
    require_callable("stationary(objective)", objective)

    def gradient(z: Any, *args: Any, **options: Any) -> Any:
        def total(z: Any) -> Tensor:
            value = objective(z, *args, **options)
            if not isinstance(value, Tensor):
                raise TypeError(f"The objective must return a tensor, got a {type(value).__name__}.")
            return value.sum()

        return torch.func.grad(total)(z)

    return _of_objective(gradient, "stationary", objective)


def projected_gradient(
    objective: Callable[..., Any], projection: Callable[[Any], Any], step: float = 1.0
) -> Callable[..., Any]:
    """The map ``T(z, *args) = projection(z - step * gradient)``, whose fixed points are constrained minimizers.

    For ``implicit.differentiable(fixed_point=...)``. Its fixed points do not depend on ``step``.

    Args:
        objective: As for :func:`stationary`.
        projection: The projection of a point onto a convex set, such as :func:`project_simplex`. For a set that depends
            on the arguments use :func:`proximal_gradient`, whose prox may be a projection.
        step: The length of the gradient step.

    Returns:
        A function of z and the arguments of the objective to something like z.

    Example:
        >>> import torch
        >>> from implicit import differentiable
        >>> from implicit.optima import project_simplex, projected_gradient
        >>> def distance(z, x):
        ...     return ((z - x) ** 2).sum()
        >>> @differentiable(fixed_point=projected_gradient(distance, project_simplex))
        ... def nearest(x):
        ...     return project_simplex(x)  # any solver
        >>> x = torch.tensor([0.9, 0.5, -2.0], requires_grad=True)
        >>> torch.autograd.grad(nearest(x)[0], x)
        (tensor([ 0.5000, -0.5000,  0.0000]),)
    """
    require_callable("projected_gradient(objective)", objective)
    require_callable("projected_gradient(projection)", projection)
    condition = proximal_gradient(objective, lambda point, step, *args: projection(point), step)
    return _of_objective(condition, "projected_gradient", objective)


def proximal_gradient(objective: Callable[..., Any], prox: Callable[..., Any], step: float = 1.0) -> Callable[..., Any]:
    """The map ``T(z, *args) = prox(z - step * gradient, step, *args)``.

    Its fixed points are the minimizers of ``objective(z, *args) + g(z, *args)`` for a convex g, with

        prox(v, step, *args) = argmin over z of  |z - v|^2 / 2 + step * g(z, *args).

    For ``implicit.differentiable(fixed_point=...)``. The fixed points do not depend on ``step``.

    Args:
        objective: The smooth part, as for :func:`stationary`.
        prox: The proximal operator of g. It is given the point, the step and all of ``args``.
        step: The length of the gradient step.

    Returns:
        A function of z and ``args`` to something like z.

    Example:
        >>> import torch
        >>> from implicit import differentiable
        >>> from implicit.optima import prox_l1, proximal_gradient
        >>> def loss(w, x, y, penalty):
        ...     return ((x @ w - y) ** 2).sum() / 2
        >>> lasso = proximal_gradient(loss, lambda w, step, x, y, penalty: prox_l1(w, step * penalty))
        >>> @differentiable(fixed_point=lasso)
        ... def fit(x, y, penalty):
        ...     return prox_l1(x.T @ y, penalty)  # any solver; this one is right for an orthogonal x
        >>> x, y, penalty = torch.eye(2), torch.tensor([2.0, 0.1]), torch.tensor(0.5, requires_grad=True)
        >>> torch.autograd.grad(fit(x, y, penalty).sum(), penalty)
        (tensor(-1.),)
    """
    require_callable("proximal_gradient(objective)", objective)
    require_callable("proximal_gradient(prox)", prox)
    if not step > 0:
        raise ValueError(f"The step must be a number > 0, got {step!r}.")
    gradient = stationary(objective)

    def map_(z: Any, *args: Any) -> Any:
        point = tree_map(lambda x, g: x - step * g, z, gradient(z, *args))
        return prox(point, step, *args)

    return _of_objective(map_, "proximal_gradient", objective)


def _of_objective(condition: Callable[..., Any], kind: str, objective: Callable[..., Any]) -> Callable[..., Any]:
    """The condition with a name, and with the objective's parameters for its own."""
    condition.__qualname__ = f"{kind}({getattr(objective, '__qualname__', objective)})"
    with contextlib.suppress(TypeError, ValueError):  # of some functions written in C
        condition.__signature__ = inspect.signature(objective)  # type: ignore[attr-defined]
    return condition
