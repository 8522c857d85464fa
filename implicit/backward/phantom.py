"""Differentiation through a few steps from the solution."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.torch_internals import transform_active
from implicit.backward.backward import Backward, SolveOptions
from implicit.backward.implicit import solve_under_transform
from implicit.backward.scaled_root import as_fixed_point
from solvers import Solution
from solvers.linear import Richardson
from solvers.problem.hyperparameters import require_damping, require_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phantom(Backward):
    """Differentiate a few damped steps that are taken from the solution, which itself counts as a constant.

    After the solve, ``steps`` times,

        z <- z + damping * (f(z) - z),

    and the last z is returned: where the map contracts, closer to the fixed point than the solver's. With J = df/dz,
    taken as constant over these steps, and w the incoming gradient,

        u = damping * sum_{k < steps} (damping J' + (1 - damping) I)^k w,    gradient to each t = (df/dt)' u.

    This is the sum that converges to :class:`implicit.Implicit`'s u, cut off; the bias is the rest, (damping J' +
    (1 - damping) I)^steps u: small where the map contracts, and a direction of descent under conditions given in the
    paper. Costs ``steps`` calls of ``f`` with gradients and as many vector-Jacobian products, always, and the memory of
    ``steps`` calls, whatever the number of the solver's. The start gets no gradient.

    Use it to train where exactness matters less than a small, certain cost per step.

    For a root, f(z) is ``z - c F(z)`` with a number c for each sample: the inverse of the slope of F at the solution,
    along the way from the start. With one unknown per sample this makes one step exact.

    Every order of derivative is that of these steps with their start held constant, and tends to the exact one with
    more of them. ``torch.func`` transforms and forward mode are supported; under a transform, tensors that ``f``
    depends on must be its arguments, or parameters of ``f`` where it is a module.

    Args:
        steps: How many steps to differentiate.
        damping: Their length in (0, 1]. Less than 1 tames Jacobian eigenvalues near or below -1, and makes more steps
            necessary.

    References:
        Geng, Zhang, Bai, Wang and Lin, "On training implicit models", NeurIPS (2021), section 3.
    """

    steps: int = 5
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_positive_int(self, "steps", self.steps)
        require_damping(self, self.damping)

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        with constant_weights():
            if transform_active():  # the solver must not see what the transform has wrapped
                solution = solve_under_transform(f, z0, args, options, Richardson(), constant=True)
            else:
                with torch.no_grad():
                    solution = options.solve(f, z0, args)
            return self._stepped(f, z0, args, solution, options)

    def evaluate(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        with constant_weights():
            return self._stepped(f, z0, args, options.solve(f, z0, args), options)

    def _stepped(
        self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], solution: Solution, options: SolveOptions
    ) -> Solution:
        """The solution after the steps that are differentiated."""
        if options.root:
            f = as_fixed_point(f, solution.value, z0, args, options.batch_dims)

        def step(z: Tensor, fz: Tensor) -> Tensor:
            fz = fz.to(z.dtype)  # under autocast
            return fz if self.damping == 1.0 else z.lerp(fz, self.damping)

        z = tree_map(torch.Tensor.detach, solution.value)
        for _ in range(self.steps):
            z = tree_map(step, z, f(z, *args))
        return dataclasses.replace(solution, value=z)
