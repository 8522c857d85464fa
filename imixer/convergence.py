"""How far the fixed-point iteration of each iMLP of a model converges on given images."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from imixer.imlp import IMLP
from implicit import record_solutions
from solvers import Picard, solve


@dataclasses.dataclass(frozen=True)
class IMLPConvergence:
    """One iMLP's iteration over all rows (images times channels) of a batch.

    Attributes:
        name: The iMLP's name in the model.
        n_iter: Steps that the model takes.
        median_residual: Median over rows of ``|z_{k+1} - z_k| / |z_{k+1}|`` at the last step.
        worst_residual: The largest of them.
        rate: Median factor by which one more Picard step shrinks the residual, measured at the solution: the local
            contraction factor.
        rtol: The residual asked for in ``steps_needed``.
        steps_needed: Picard steps from z = y until 99% of the rows are below ``rtol``; None if ``max_steps`` were not
            enough.
        sigma1: Spectral norm of the block's first weight before normalization.
        sigma2: Of its second.
    """

    name: str
    n_iter: int
    median_residual: float
    worst_residual: float
    rate: float
    rtol: float
    steps_needed: int | None
    sigma1: float
    sigma2: float


@torch.no_grad()
def measure_convergence(
    model: nn.Module, images: Tensor, *, rtol: float = 1e-4, max_steps: int = 100
) -> list[IMLPConvergence]:
    """Run the model on images and look at the iteration of each of its iMLPs.

    The model is run in eval mode and put back as it was.

    Args:
        model: A model with :class:`IMLP` modules.
        images: (B, C, H, W) a batch as the model takes it; 16 images are enough.
        rtol: The residual that counts as converged for ``steps_needed``.
        max_steps: Most Picard steps to try for it.

    Raises:
        ValueError: The model has no iMLP.
    """
    imlps = {name: module for name, module in model.named_modules() if isinstance(module, IMLP)}
    if not imlps:
        raise ValueError(f"The model has no IMLP, so nothing iterates: got a {type(model).__name__}.")
    injections: dict[str, Tensor] = {}
    hooks = [
        module.fc1.register_forward_hook(lambda _m, _i, out, name=name: injections.__setitem__(name, out))
        for name, module in imlps.items()
    ]
    training = model.training
    model.eval()
    try:
        with record_solutions(model) as record:
            model(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    rows = []
    for name, module in imlps.items():
        prefix = f"{name}." if name else ""
        solution = record[f"{prefix}fixed_point"][-1]
        assert solution.residual is not None
        y = injections[name].float().flatten(0, -2)
        sn1, sn2 = module.normalized_layers
        block = module.fixed_point.f
        longer = solve(
            block,
            y,
            Picard(),
            args=(y, sn1.weight, sn1.bias, sn2.weight, sn2.bias),
            rtol=rtol,
            atol=0.0,
            max_steps=max_steps,
            history=True,
            on_failure="ignore",
        )
        assert longer.history is not None
        sigma1, sigma2 = module.sigmas
        rows.append(
            IMLPConvergence(
                name=name,
                n_iter=int(solution.num_steps.max()),
                median_residual=float(solution.residual.median()),
                worst_residual=float(solution.residual.max()),
                rate=_rate(longer.history),
                rtol=rtol,
                steps_needed=_steps_needed(longer.history, rtol),
                sigma1=sigma1,
                sigma2=sigma2,
            )
        )
    return rows


def format_convergence(rows: list[IMLPConvergence]) -> str:
    """The rows as a table to print."""
    width = max((len(row.name) for row in rows), default=4)
    goal = f"steps to {rows[0].rtol:.0e}" if rows else "steps"
    header = f"{'iMLP':<{width}}  steps  median residual    worst   rate  {goal}  sigma 1  sigma 2"
    lines = [header, "-" * len(header)]
    for row in rows:
        needed = "not reached" if row.steps_needed is None else str(row.steps_needed)
        lines.append(
            f"{row.name:<{width}}  {row.n_iter:5d}  {row.median_residual:15.1e}  {row.worst_residual:7.1e}  "
            f"{row.rate:5.3f}  {needed:>{len(goal)}}  {row.sigma1:7.3f}  {row.sigma2:7.3f}"
        )
    return "\n".join(lines)


def _rate(history: Tensor) -> float:
    """Median over rows of the last ratio of two residuals that were both taken while the row was iterating."""
    before, after = history[:-1], history[1:]
    ratios = torch.where((after != before) & (before > 0), after / before, math.nan)
    return float(ratios[-1].nanmedian()) if len(ratios) else math.nan


def _steps_needed(history: Tensor, rtol: float) -> int | None:
    """The first step at which 99% of the rows are below ``rtol``."""
    share = (history <= rtol).double().mean(dim=1)  # (steps,)
    reached = (share >= 0.99).nonzero().flatten()
    return int(reached[0]) + 1 if len(reached) else None
