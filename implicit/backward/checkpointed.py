"""Differentiation through the solver's steps, most of them forgotten and repeated."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from implicit.autograd.constant_weights import ConstantWeights, Weights
from implicit.autograd.torch_internals import Loan, cached_weights, current_loans, lending, transform_active
from implicit.backward.backward import Backward, SolveOptions, require_differentiable
from implicit.backward.unrolled import Unrolled
from solvers import Iteration, Solution, Solver, report_failure
from solvers.problem.hyperparameters import require_positive_int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointed(Backward):
    """The gradient of :class:`implicit.Unrolled`, bit for bit, in memory that grows as the root of the steps.

    The steps are taken in segments, of which only the solver's state at the beginning is kept; the backward pass
    repeats one segment after the other. With s segments of n steps, memory is s states of the solver and what n / s
    steps save, O(sqrt n) for s near sqrt n. Costs one call of ``f`` a step more than unrolling, and as many
    vector-Jacobian products. No bias: what is returned is differentiated, converged or not. The start gets a gradient.

    Use it for the exact gradient of many steps. Where the solve converges, :class:`implicit.Implicit` takes less time
    and memory. A state of Anderson or Broyden is as large as its memory: then fewer segments are better.

    Gradients of gradients are supported; ``torch.func`` transforms and forward mode are not, because PyTorch's
    checkpoints are not.

    Args:
        segments: Into how many segments ``max_steps`` is divided; None is about the root of ``max_steps``. A solve
            that converges early uses the first of them.

    References:
        Griewank, "Achieving logarithmic growth of temporal and spatial complexity in reverse automatic
        differentiation", Optim. Methods Softw. 1 (1992).
        Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", arXiv:1604.06174 (2016).
    """

    segments: int | None = None

    def __post_init__(self) -> None:
        require_positive_int(self, "segments", self.segments, optional=True)

    def check(self, solver: Solver) -> None:
        require_differentiable(self, solver)

    def solve(self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], options: SolveOptions) -> Solution:
        if transform_active():
            raise RuntimeError(
                f"{self!r} works by torch.utils.checkpoint, which torch.func transforms and forward mode do not "
                f"support. Use {Unrolled()!r}, which has the same gradients, or the implicit backward mode."
            )
        if torch.compiler.is_compiling():
            from implicit.autograd import compiled  # which loads PyTorch's compiler

            solution: Solution = compiled.run_outside_graph(self.solve, f, z0, args, options)
            return solution
        constant_map = _ConstantMap(_Opaque(f), ConstantWeights(), {}, current_loans())
        iteration = options.iteration(constant_map, z0, args)
        constant_map.take_weights()
        segments = self.segments or math.isqrt(options.max_steps)
        while not iteration.done:
            iteration = _advanced(iteration, math.ceil(options.max_steps / segments))
        solution = iteration.solution()
        if iteration.tested:
            report_failure(solution, options.on_failure, options.named(options.what))
        return solution


class _Opaque:
    """A callable in which nobody looks for tensors."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f


@dataclasses.dataclass
class _ConstantMap:
    """``f`` as it was in the forward pass, also when a segment is repeated.

    Attributes:
        f: The user's map.
        late_weights: Where parametrized weights are computed.
        weights: Those that the first call computed. Like what is lent, they are among the tensors of an iteration.
        loans: What ``torch.func.functional_call`` lent to modules.
    """

    f: _Opaque
    late_weights: ConstantWeights
    weights: Weights
    loans: list[Loan]

    def take_weights(self) -> None:
        """Move the weights that have been computed to where an iteration finds their tensors."""
        self.weights.update(cached_weights() | self.late_weights.take())

    def __call__(self, z: Any, *args: Any) -> Any:
        with self.late_weights.in_force(), ConstantWeights(self.weights).in_force(), lending(self.loans):
            return self.f.f(z, *args)


def _advanced(iteration: Iteration, steps: int) -> Iteration:
    """The iteration after at most so many steps, which the backward pass repeats."""
    # The tensors are handed to the checkpoint, and nothing else holds them: so hooks on saved tensors see them.
    tensors: list[Tensor] = []
    empty = torch.empty(0)

    def take_out(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return empty

    rest = iteration.with_tensors(take_out)

    def segment(*tensors: Tensor) -> Iteration:
        supply = iter(tensors)
        part = rest.with_tensors(lambda _: next(supply))
        for _ in range(steps):
            part.step()
        return part

    result: Iteration = checkpoint(segment, *tensors, use_reentrant=False)
    return result
