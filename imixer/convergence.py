"""How far the fixed-point iteration of each iMLP of a model converges on given images."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from imixer.imlp import IMLP
from implicit import FixedPointLayer, record_solutions
from solvers import Picard, Solution, solve


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
        steps_needed: Picard steps from the start until 99% of the rows are below ``rtol``; None if ``max_steps`` are
            not enough.
        sigmas: Spectral norms of the weights of the map, ``sn1``, ``sn2`` ..., before normalization.
    """

    name: str
    n_iter: int
    median_residual: float
    worst_residual: float
    rate: float
    rtol: float
    steps_needed: int | None
    sigmas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class ObservedSolve:
    """The solve of an iMLP for given images.

    Attributes:
        imlp: The iMLP.
        layer: Its layer that solves.
        inputs: The inputs of ``layer``: the injection y (rows, D) and the couplings.
        solution: Its solution, with residuals.
    """

    imlp: IMLP
    layer: FixedPointLayer
    inputs: tuple[Any, ...]
    solution: Solution

    def picard_history(self, rtol: float, max_steps: int) -> Tensor:
        """(steps, rows) residuals of Picard steps from the same start to another tolerance."""
        start = self.layer.start(*self.inputs)
        solution = solve(
            self.layer.f,
            start,
            Picard(),
            args=self.inputs,
            rtol=rtol,
            atol=0.0,
            max_steps=max_steps,
            history=True,
            on_failure="ignore",
        )
        assert solution.history is not None
        return solution.history


def implicit_imlps(model: nn.Module) -> dict[str, tuple[IMLP, FixedPointLayer]]:
    """The iMLPs of a model that solve for a fixed point, each with the layer that solves, by name.

    Raises:
        ValueError: There is none.
    """
    found = {
        name: (module, module.fixed_point)
        for name, module in model.named_modules()
        if isinstance(module, IMLP) and module.fixed_point is not None
    }
    if not found:
        raise ValueError(
            f"The model has no IMLP with two hidden layers or more, so nothing iterates: got a {type(model).__name__}."
        )
    return found


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and takes no gradients; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def observe_solves(model: nn.Module, images: Tensor) -> dict[str, ObservedSolve]:
    """Run the model on images and keep the solve of each of its iMLPs, by name."""
    found = implicit_imlps(model)
    given: dict[str, tuple[Any, ...]] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: given.__setitem__(name, inputs))
        for name, (_, layer) in found.items()
    ]
    try:
        with record_solutions(model) as record:
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: ObservedSolve(imlp, layer, given[name], record[f"{name}.fixed_point".removeprefix(".")][-1])
        for name, (imlp, layer) in found.items()
    }


def measure_convergence(
    model: nn.Module, images: Tensor, *, rtol: float = 1e-4, max_steps: int = 100
) -> list[IMLPConvergence]:
    """Run the model on images and measure how the iteration of each of its iMLPs converges.

    The model runs in eval mode, and its own mode is restored. Where solves are nested, only the outermost is measured;
    the inner ones are part of its map.

    Args:
        model: A model with :class:`IMLP` modules.
        images: (B, C, H, W) a batch for the model; 16 images are enough.
        rtol: The residual that counts as converged for ``steps_needed``.
        max_steps: Largest number of Picard steps to try for that.

    Raises:
        ValueError: The model has no iMLP with two hidden layers or more.
    """
    rows = []
    with evaluating(model):
        for name, observed in observe_solves(model, images).items():
            residual = observed.solution.residual
            assert residual is not None
            history = observed.picard_history(rtol, max_steps)
            rows.append(
                IMLPConvergence(
                    name=name,
                    n_iter=int(observed.solution.num_steps.max()),
                    median_residual=float(residual.median()),
                    worst_residual=float(residual.max()),
                    rate=local_rate(history),
                    rtol=rtol,
                    steps_needed=_steps_needed(history, rtol),
                    sigmas=observed.imlp.sigmas,
                )
            )
    return rows


def format_convergence(rows: list[IMLPConvergence]) -> str:
    """The rows as a table to print."""
    width = max((len(row.name) for row in rows), default=4)
    goal = f"steps to {rows[0].rtol:.0e}" if rows else "steps"
    num_sigmas = max((len(row.sigmas) for row in rows), default=0)
    sigmas = "".join(f"  sigma {i}" for i in range(1, num_sigmas + 1))
    header = f"{'iMLP':<{width}}  steps  median residual    worst   rate  {goal}{sigmas}"
    lines = [header, "-" * len(header)]
    for row in rows:
        needed = "not reached" if row.steps_needed is None else str(row.steps_needed)
        lines.append(
            f"{row.name:<{width}}  {row.n_iter:5d}  {row.median_residual:15.1e}  {row.worst_residual:7.1e}  "
            f"{row.rate:5.3f}  {needed:>{len(goal)}}" + "".join(f"  {sigma:7.3f}" for sigma in row.sigmas)
        )
    return "\n".join(lines)


def local_rate(history: Tensor) -> float:
    """Median over rows of the last ratio of two residuals, both measured before the row stopped."""
    before, after = history[:-1], history[1:]
    ratios = torch.where((after != before) & (before > 0), after / before, math.nan)
    return float(ratios[-1].nanmedian()) if len(ratios) else math.nan


def _steps_needed(history: Tensor, rtol: float) -> int | None:
    """The first step at which 99% of the rows are below ``rtol``."""
    share = (history <= rtol).double().mean(dim=1)  # (steps,)
    reached = (share >= 0.99).nonzero().flatten()
    return int(reached[0]) + 1 if len(reached) else None
