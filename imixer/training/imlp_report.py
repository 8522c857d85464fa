"""A look at every iMLP of a model in training: does its iteration converge, and its gradient?"""

import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from imixer.convergence import measure_convergence
from imixer.imlp import IMLP
from implicit import record_solutions


def look_at_imlps(model: nn.Module, images: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    """One row for each iMLP of `model`: steps, residuals, rate and spectral norms on a few test images.

    ``adjoint_residual`` is the worst residual of the linear solve that its gradient takes, and ``adjoint_failed`` the
    share of rows that did not meet the tolerance; None for gradients that take none. The model is left as it was.

    Args:
        model: Any model; one without iMLPs has no rows.
        images: (B, C, H, W); 16 images are enough.
        targets: (B,) their classes.
    """
    if not iterates(model):
        return []
    rows = [_flat(asdict(row)) for row in measure_convergence(model, images)]
    training = model.training
    model.eval()  # else the power iterations would advance
    try:
        with record_solutions(model) as record, warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # what they would say is in the rows
            loss = nn.functional.cross_entropy(model(images).float(), targets)
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    finally:
        model.train(training)
    for row in rows:
        name = f"{row['name']}.fixed_point" if row["name"] else "fixed_point"
        adjoints = [solution.adjoint for solution in record[name] if solution.adjoint is not None]
        residuals = [adjoint.residual.max() for adjoint in adjoints if adjoint.residual is not None]
        failed = [adjoint.failed.float().mean() for adjoint in adjoints]
        row["adjoint_residual"] = float(torch.stack(residuals).max()) if residuals else None
        row["adjoint_failed"] = float(torch.stack(failed).mean()) if failed else None
    return rows


def iterates(model: nn.Module) -> bool:
    """Whether the model has an iMLP that solves for its hidden layers."""
    return any(isinstance(module, IMLP) and module.fixed_point is not None for module in model.modules())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose values are numbers and names: ``sigmas`` of several become ``sigma1``, ``sigma2`` ..."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, tuple):
            flat |= {f"{name.removesuffix('s')}{number}": entry for number, entry in enumerate(value, start=1)}
        else:
            flat[name] = value
    return flat
