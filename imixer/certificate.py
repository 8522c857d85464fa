"""What is certain about the fixed-point iteration of each iMLP of a model."""

import copy
import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn

from imixer.contraction import joint_bound, nested_bound
from imixer.contractive_block import JointBlock
from imixer.convergence import ObservedSolve, evaluating, implicit_imlps, local_rate, observe_solves
from imixer.imlp import IMLP
from implicit import FixedPointLayer, lipschitz_bound
from solvers import Picard, Stopping, solve

_TOLERANCES = (1e-3, 1e-6)


@dataclasses.dataclass(frozen=True)
class IMLPCertificate:
    """One iMLP's contraction.

    Attributes:
        name: The iMLP's name in the model.
        bound: Certain bound q on the Lipschitz constant of the map that is iterated, in the Euclidean norm, from exact
            spectral norms of its weights in eval mode and the largest slope of its activation. It is infinite where
            nested solves have no bound, or where no Lipschitz constant of the activation is known. With
            ``hidden_solve="nested"`` the map is ``z -> y + g(z)``.
        rate: Median over rows of the factor by which a Picard step shrinks the residual near the solution for the
            given images; None without images.
        error_bound: Certain bound, the largest over rows, on the root mean square distance between the state that the
            model uses for the given images and the fixed point: ``rms(f(z) - z) / (1 - q)``, where f solves inner
            layers exactly. None without images, or where q >= 1.
    """

    name: str
    bound: float
    rate: float | None = None
    error_bound: float | None = None

    def steps_by_bound(self, tolerance: float) -> int | None:
        """Picard steps that are certain to shrink the first error by the factor ``tolerance``; None where q >= 1."""
        return _steps(self.bound, tolerance)

    def steps_by_rate(self, tolerance: float) -> int | None:
        """The same by the measured rate for the given images; None where that is unknown or >= 1."""
        return None if self.rate is None else _steps(self.rate, tolerance)


def certify(model: nn.Module, images: Tensor | None = None, *, show: bool = True) -> list[IMLPCertificate]:
    """Print and return, for each iMLP of a model, what is certain about its fixed-point iteration and what is measured.

    With ``contraction="paper"`` the bounds are usually above 1, and nothing is certain: GELU's slope reaches 1.129, and
    power iteration underestimates spectral norms. That does not mean that the iteration diverges; look at the rate.

    Args:
        model: A model with :class:`imixer.IMLP` modules. It runs in eval mode; its own mode is restored.
        images: (B, C, H, W) a batch for the model, needed for the rate and the error bound.
        show: Whether to print the table.

    Raises:
        ValueError: The model has no iMLP with two hidden layers or more.

    Example:
        >>> import timm
        >>> import imixer
        >>> model = timm.create_model("imixer_ti4_32", contraction="certified", coeff=0.5)
        >>> rows = imixer.certify(model, show=False)
        >>> rows[0].bound <= 0.5, rows[0].steps_by_bound(1e-6)
        (True, 20)
    """
    with evaluating(model):
        solves = {} if images is None else observe_solves(model, images)
        rows = [_certificate(name, imlp, solves.get(name)) for name, (imlp, _) in implicit_imlps(model).items()]
    if show:
        print(format_certificates(rows))
    return rows


def format_certificates(rows: list[IMLPCertificate]) -> str:
    """The rows as a table to print, with a line that says what is certain in it and what is measured."""
    width = max((len(row.name) for row in rows), default=4)
    goals = "".join(f"  {f'steps to {tolerance:.0e}':>14}" for tolerance in _TOLERANCES)
    header = f"{'iMLP':<{width}}  bound   rate{goals}  error bound"
    lines = [header, "-" * len(header)]
    for row in rows:
        bound = f"{row.bound:5.3f}" if math.isfinite(row.bound) else f"{'none':>5}"
        rate = "-" if row.rate is None else f"{row.rate:5.3f}"
        steps = "".join(
            f"  {f'{_shown(row.steps_by_bound(tolerance))} / {_shown(row.steps_by_rate(tolerance))}':>14}"
            for tolerance in _TOLERANCES
        )
        error = "none" if row.error_bound is None else f"{row.error_bound:.1e}"
        lines.append(f"{row.name:<{width}}  {bound}  {rate:>5}{steps}  {error:>11}")
    lines.append("Bound and error bound are certain, the rate is measured; steps are by the bound / by the rate.")
    return "\n".join(lines)


def _certificate(name: str, imlp: IMLP, observed: ObservedSolve | None) -> IMLPCertificate:
    bound = map_bound(imlp)
    if observed is None:
        return IMLPCertificate(name, bound)
    rate = local_rate(observed.picard_history(rtol=1e-4, max_steps=100))
    return IMLPCertificate(name, bound, rate, _error_bound(observed, bound) if bound < 1 else None)


def map_bound(imlp: IMLP) -> float:
    """A certain bound on the Lipschitz constant of the map that an iMLP in eval mode iterates; inf if there is none."""
    couplings = imlp.couplings()
    up, down = ([_norm(getattr(coupling, name)) for coupling in couplings] for name in ("up", "down"))
    try:
        slope = float(lipschitz_bound(imlp.act))
    except (TypeError, ValueError):
        return math.inf
    assert imlp.fixed_point is not None
    return (joint_bound if isinstance(imlp.fixed_point.f, JointBlock) else nested_bound)(up, down, slope)


def _norm(weight: Tensor) -> float:
    norm: Tensor = torch.linalg.matrix_norm(weight.double(), 2)
    return float(norm)


def _error_bound(observed: ObservedSolve, bound: float) -> float:
    """From one more call of the map, which bounds the error of any solver's result."""
    f = cast(nn.Module, copy.deepcopy(observed.layer.f))
    for inner in f.modules():
        if isinstance(inner, FixedPointLayer):
            dtype = observed.inputs[0].dtype
            inner.solver = Picard()
            inner.stopping = Stopping(rtol=4 * torch.finfo(dtype).eps, atol=0.0, max_steps=1000)
            inner.on_failure = "ignore"
    call = solve(
        f, observed.solution.value, Picard(), args=observed.inputs, rtol=None, atol=None, max_steps=1, history=True
    )
    assert call.change is not None
    return float(call.change.max()) / (1 - bound)


def _steps(factor: float, tolerance: float) -> int | None:
    if not 0 < factor < 1:
        return None
    return max(1, math.ceil(math.log(tolerance) / math.log(factor)))


def _shown(steps: int | None) -> str:
    return "-" if steps is None else str(steps)
