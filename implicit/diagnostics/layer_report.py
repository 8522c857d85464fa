"""What a diagnosis reports of a layer."""

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from implicit.diagnostics.causes import Cause
from solvers import Status


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the solves of a layer or call.

    Attributes:
        cause: What it is.
        num_samples: The number of samples that it concerns.
        evidence: What was measured, in words.
        modules: The names of the modules of the map to blame, where these are known.
    """

    cause: Cause
    num_samples: int
    evidence: str
    modules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A setting that was tried on the same inputs, and how the solve went with it.

    Attributes:
        setting: The options as they are written in a program, such as ``solver=Anderson(memory=5)``.
        num_converged: The number of samples that converged.
        num_samples: The number of samples.
        worst_steps: The largest number of steps that a sample took.
        num_evals: The number of calls of the map, or of F.
    """

    setting: str
    num_converged: int
    num_samples: int
    worst_steps: int
    num_evals: int

    def __str__(self) -> str:
        return (
            f"{self.setting}: {self.num_converged} of {self.num_samples} samples converge, in at most "
            f"{self.worst_steps} steps and {self.num_evals} calls"
        )


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What was measured of one layer, or of one call of ``fixed_point`` or ``root``.

    Samples are those of all its solves, or of the one examined where that is said.

    Attributes:
        name: Its name in the model, and its type and that of the module around it.
        settings: Its solver and stopping.
        root: Whether the root of a function is sought instead of a fixed point.
        statuses: How many samples ended with which status.
        num_steps: (N,) the steps of each sample.
        history: (steps, B) the relative residuals in the solve examined.
        rate: (B,) the factor by which a step of the layer's solver shrinks the residual there, on average.
        eigenvalues: (B, k) leading eigenvalues of the map's Jacobian at the equilibrium, or at the best point; for a
            root, of that of F.
        eigenvalue_error: (B,) relative backward error of the first of them.
        transient_growth: (B,) the largest norm of a power of the Jacobian; says nothing of a root.
        lipschitz: Certified bound of the map's Lipschitz constant, or None if there is none.
        precision_floor: (B,) relative size of rounding in the map; for a root, of the error of the root that rounding
            in F makes.
        num_solves_of_model: The number of solves in one call of the model.
        num_evals: Calls of the map in these solves.
        seconds: Time of these solves.
        bytes_saved: Memory that one solve keeps for its backward pass, or None where that cannot be measured.
        num_solves: The number of solves that the diagnosis took.
        findings: What is wrong; empty if nothing is.
        proposal: The cheapest setting that cures it among those tried, or the best if none does; None without one.
        advice: What else can be done; it was not tried.
    """

    name: str
    settings: str
    root: bool
    statuses: dict[str, int]
    num_steps: Tensor
    history: Tensor
    rate: Tensor
    eigenvalues: Tensor
    eigenvalue_error: Tensor
    transient_growth: Tensor
    lipschitz: float | None
    precision_floor: Tensor
    num_solves_of_model: int
    num_evals: int
    seconds: float
    bytes_saved: int | None
    num_solves: int
    findings: tuple[Finding, ...]
    proposal: Proposal | None
    advice: str

    @property
    def causes(self) -> tuple[Cause, ...]:
        """The causes, the one that concerns most samples first."""
        return tuple(finding.cause for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.settings}"]
        for finding in self.findings:
            lines.append(f"  {finding.cause.value.upper()} ({finding.num_samples} samples). {finding.cause.meaning}")
            lines.append(f"    {finding.evidence}")
        if self.proposal is not None:
            lines.append(f"  Tried: {self.proposal}.")
        if self.advice:
            lines.append(f"  Advice, not tried: {self.advice}")
        if not self.findings:
            lines.append("  Nothing is wrong.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries that JSON can hold; NaN and infinity are None."""
        found = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        assert isinstance(found, dict)
        return found


def largest(values: Tensor) -> float:
    """The largest entry that is not NaN; NaN if there is none."""
    known = values[~values.isnan()]
    return float(known.max()) if known.numel() else math.nan


def leading(eigenvalues: Tensor) -> complex:
    """The largest eigenvalue of all samples, (B, k) -> one."""
    known = eigenvalues[~eigenvalues.isnan()]
    return complex(known[known.abs().argmax()]) if known.numel() else complex(math.nan, 0.0)


def complex_text(value: complex) -> str:
    """``0.95``, or ``0.3 +- 0.8i`` for a pair."""
    if math.isnan(value.real) or abs(value.imag) <= 1e-4 * abs(value):
        return f"{value.real:.3g}"
    return f"{value.real:.3g} +- {abs(value.imag):.3g}i"


def _plain(value: Any) -> Any:
    """Tensors, dataclasses and enumerations as JSON values."""
    if isinstance(value, Tensor):
        if value.is_complex():
            return _plain(torch.view_as_real(value))
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, Cause):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count_statuses(statuses: Tensor) -> dict[str, int]:
    """(N,) codes -> how many of each, by name."""
    counts = Counter(statuses.tolist())
    return {status.name: counts[status] for status in Status if counts[status]}
