"""A comparison of the backward modes of a model's implicit solves with the exact gradient."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from implicit.autograd.modules_used import modules_used_by
from implicit.backward import Backward, get_backward
from implicit.diagnostics.observed_map import restored
from implicit.diagnostics.ordinary_tensors import ordinary_tensors
from implicit.diagnostics.reference_solve import ReferenceSolves
from implicit.diagnostics.solve_hook import Around, SolveCall, SolveNames, around_solves
from solvers import Solution
from solvers.problem.peak_memory import PeakMemory

MODES = ("unrolled", "checkpointed", "implicit", "neumann", "phantom", "jfb", "shine")

# What a gradient must be good enough for: the smallest cosine, and how far the ratio of norms may be from 1.
USES = {
    "derivatives that must be exact (bilevel problems, sensitivities)": (0.999999, 0.0005),
    "training to the end": (0.99, 0.1),
    "the beginning of training": (0.9, 0.5),
}


@dataclasses.dataclass(frozen=True)
class GroupGradient:
    """The gradient of one group of parameters by one mode, beside the exact one.

    Attributes:
        cosine: Of the angle between the two; NaN where one of them is zero.
        norm_ratio: Its norm divided by that of the exact one.
    """

    cosine: float
    norm_ratio: float


@dataclasses.dataclass(frozen=True)
class ModeAudit:
    """One backward mode on one forward and backward pass of the model.

    Attributes:
        mode: The mode.
        groups: By the name of the module that owns the parameters; ``"(inputs)"`` are the model's inputs.
        calls: Calls of the maps of all solves, forward and backward.
        products: Vector-Jacobian products with these maps.
        seconds: Time of the pass.
        peak_bytes: The largest memory of the tensors that it creates.
        error: Why the mode does not work with this model, or an empty string.
    """

    mode: str
    groups: dict[str, GroupGradient]
    calls: int = 0
    products: int = 0
    seconds: float = math.nan
    peak_bytes: int = 0
    error: str = ""

    @property
    def worst(self) -> GroupGradient:
        """The smallest cosine of any group, and the norm ratio that is farthest from 1."""
        known = [group for group in self.groups.values() if not math.isnan(group.cosine)]
        if not known:
            return GroupGradient(math.nan, math.nan)
        ratio = max((group.norm_ratio for group in known), key=lambda ratio: abs(math.log(max(ratio, 1e-300))))
        return GroupGradient(min(group.cosine for group in known), ratio)

    def is_good_for(self, use: str) -> bool:
        """Whether the gradients of all groups are as close to the exact ones as a use in ``USES`` needs."""
        cosine, deviation = USES[use]
        worst = self.worst
        return not self.error and worst.cosine >= cosine and abs(worst.norm_ratio - 1) <= deviation


@dataclasses.dataclass(frozen=True)
class GradientAudit:
    """The audits of all modes. ``print`` shows them as a table with a recommendation for each use.

    Attributes:
        modes: By name.
        layers: The implicit layers of the model and its calls of ``fixed_point`` and ``root``, and the names of the
            groups of parameters that belong to each.
        exact: What the exact gradient is, in words.
        unsolved: The layers and calls for which no exact gradient was found, and why: the statuses of the solve or of
            its adjoint, or what makes the map one that cannot be solved. The gradients are then compared with one that
            is not exact.
    """

    modes: dict[str, ModeAudit]
    layers: dict[str, tuple[str, ...]]
    exact: str
    unsolved: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def cheapest(self, use: str) -> str | None:
        """Return the mode with the fewest calls and products among those that are good enough; None if there is none.

        It is None as well if a solve is ``unsolved``: no mode can be compared with the exact gradient then.

        Args:
            use: One of ``implicit.diagnostics.USES``.
        """
        good = [mode for mode in self.modes.values() if mode.is_good_for(use) and not self.unsolved]
        best = min(good, key=lambda mode: (mode.calls + mode.products, mode.peak_bytes), default=None)
        return None if best is None else best.mode

    def __str__(self) -> str:
        heads = ("mode", "group", "cosine", "norm ratio", "calls", "products", "ms", "peak KiB")
        rows = [heads]
        for mode in self.modes.values():
            costs = (str(mode.calls), str(mode.products), f"{1e3 * mode.seconds:.1f}", f"{mode.peak_bytes / 1024:.0f}")
            if mode.error:
                continue
            for name, group in mode.groups.items():
                first = not name or name == next(iter(mode.groups))
                cells = (mode.mode if first else "", name, f"{group.cosine:.5f}", f"{group.norm_ratio:.4f}")
                rows.append((*cells, *(costs if first else ("",) * 4)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{mode.mode}: {mode.error}" for mode in self.modes.values() if mode.error]
        if self.unsolved:
            lines += [
                "",
                "No mode can be recommended: the gradient that they are compared with is not exact, because of",
            ]
            lines += [f"- {name or 'the model'}: {reason}" for name, why in self.unsolved.items() for reason in why]
            return "\n".join(lines)
        lines += ["", f"Exact is {self.exact}. The cheapest mode that is good enough"]
        lines += [f"- for {use}: {self.cheapest(use) or 'none'}" for use in USES]
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries that JSON can hold; NaN is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: plain(entry) for name, entry in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        found = plain(dataclasses.asdict(self))
        for field in ("layers", "unsolved"):
            found[field] = {name: list(entries) for name, entries in getattr(self, field).items()}
        found["cheapest"] = {use: self.cheapest(use) for use in USES}
        assert isinstance(found, dict)
        return found


def audit_gradients(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor],
    modes: Mapping[str, Backward | str] | tuple[str, ...] = MODES,
    kwargs: Mapping[str, Any] | None = None,
) -> GradientAudit:
    """Compare the gradients of all backward modes with the exact one, and say which is the cheapest good one.

    For every mode, all implicit layers of the model, and the calls of :func:`implicit.fixed_point` and
    :func:`implicit.root` in its forward pass, are switched to it, and ``loss(model(*inputs, **kwargs))`` is
    differentiated. The gradient of each module's parameters, and that of the inputs, is compared with the exact one.
    For a solve to a tolerance, the exact gradient is that of the implicit function theorem, with the forward solve and
    the adjoint solved a thousand times as accurately, by other solvers where the solve's own does not get so far; for a
    fixed number of steps, it is that of these steps. Where no solver gets there, the adjoint does not converge, or the
    map changes from call to call or mixes samples, ``audit.unsolved`` says so and no mode is recommended. The costs are
    those of one forward and backward pass by the solves' own solvers and tolerances. They take three passes per mode:
    one for the gradients, one for time, and one for memory.

    The parameters, buffers and gradients of the model, and PyTorch's random number generators on the CPU and on the
    model's device, are left as they were, so that each pass draws the same random numbers from them. What else the
    model changes when it is called stays changed: Python attributes, and the generators of numpy and Python.

    Args:
        model: A model with implicit layers or calls of ``fixed_point`` and ``root``.
        *inputs: The inputs of the model.
        loss: Makes a scalar of what the model returns.
        modes: Names of backward modes, or backward modes by a name of your choice. Those that do not go with a
            solver are reported with the reason.
        kwargs: Keyword arguments of the model.

    Raises:
        TypeError, ValueError: The model makes no solve, an option is invalid, or the loss is not a scalar with a
            gradient.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, audit_gradients
        >>> layer = FixedPointLayer(lambda z, x: 0.5 * z + x, solver="picard", rtol=1e-5)
        >>> audit = audit_gradients(layer, torch.ones(2, 3), loss=torch.sum, modes=("implicit", "jfb"))
        >>> round(audit.modes["jfb"].groups["(inputs)"].norm_ratio, 3)  # 1 - 0.5
        0.5
    """
    if not callable(loss):
        raise TypeError(f"loss must be a callable that makes a scalar of the model's output, got {loss!r}.")
    if isinstance(modes, (str, Backward)) or not all(isinstance(name, str) for name in modes):
        raise TypeError(
            'modes must be a tuple of names of backward modes, such as ("jfb",), or a dictionary of backward modes by '
            f"names of your choice, got {modes!r}."
        )
    names = SolveNames(model)
    chosen = dict(modes) if isinstance(modes, Mapping) else {name: name for name in modes}
    backwards = {name: get_backward(mode) for name, mode in chosen.items()}
    with ordinary_tensors(model):
        run, references = _Run(model, inputs, dict(kwargs or {}), loss, names), ReferenceSolves()
        with around_solves(names, references, alone=True):
            exact = run.gradients()
        names.require_solves()
        audits = {}
        for name, mode in backwards.items():
            try:
                with around_solves(names, _by(mode), alone=True), warnings.catch_warnings():
                    # A mode that does not solve the adjoint shows it by its gradient.
                    warnings.simplefilter("ignore")
                    audits[name] = ModeAudit(name, _compared(run.gradients(), exact), **run.costs())
            except (RuntimeError, ValueError) as error:
                audits[name] = ModeAudit(name, {}, error=str(error))
    solved = "the gradient of the solution"
    fixed = references.fixed.values()
    what = solved if not any(fixed) else "the gradient of the steps that are taken"
    if any(fixed) and not all(fixed):
        what = f"{solved}, and of the steps in layers with a fixed number of them"
    groups = tuple(exact)
    owners = _owners(model)
    layers = {name: _groups_of(names.seen[name], groups, owners) for name in names.in_order()}
    return GradientAudit(audits, layers, what, references.unsolved())


def _by(mode: Backward) -> Around:
    """Makes solves with a backward mode in place of their own."""

    def around(call: SolveCall) -> Solution[Any]:
        mode.check(call.options.solver)
        return dataclasses.replace(call, mode=mode).solve()

    return around


class _Run:
    """Forward and backward passes of a model, which leave it as it was."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Callable[[Any], Tensor],
        names: SolveNames,
    ) -> None:
        self._model, self._loss, self._names = model, loss, names

        def leaf(x: Tensor) -> Tensor:
            return x.detach().clone().requires_grad_(x.is_floating_point())

        with torch.inference_mode(False):
            self._inputs, self._kwargs = tree_map_only(Tensor, leaf, (inputs, kwargs))
        self._free = [x for x in tree_leaves((self._inputs, self._kwargs)) if isinstance(x, Tensor) and x.requires_grad]
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._named: dict[str, list[Tensor]] = {}
        for name, parameter in named:
            self._named.setdefault(_owner(name), []).append(parameter)
        tensors = [*self._free, *(p for _, p in named)]
        self._device = tensors[0].device if tensors else torch.device("cpu")

    def gradients(self) -> dict[str, list[Tensor]]:
        """Return the gradients by group."""
        with restored([self._model], self._device), torch.inference_mode(False), torch.enable_grad():
            value = self._loss(self._model(*self._inputs, **self._kwargs))
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                came = repr(value)
                if isinstance(value, Tensor):
                    came = f"shape {tuple(value.shape)}" + ("" if value.requires_grad else ", without a gradient")
                raise ValueError(f"loss must return a scalar that depends on the model's parameters, got {came}.")
            groups: dict[str, list[Tensor]] = dict(self._named)
            if self._free:
                groups["(inputs)"] = self._free
            flat = [x for group in groups.values() for x in group]
            grads = iter(torch.autograd.grad(value, flat, allow_unused=True))
            return {
                name: [torch.zeros_like(x) if (g := next(grads)) is None else g.detach() for x in group]
                for name, group in groups.items()
            }

    def costs(self) -> dict[str, Any]:
        """Return the fields of a :class:`ModeAudit` that say what a pass costs."""
        begin = self._now()
        self.gradients()
        seconds = self._now() - begin
        counted = _Counted()
        with around_solves(self._names, counted), PeakMemory() as memory:
            self.gradients()
        return {
            "calls": counted.calls,
            "products": counted.products,
            "seconds": seconds,
            "peak_bytes": memory.peak,
        }

    def _now(self) -> float:
        if self._device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


class _Counted:
    """Counts the calls of all maps and the products with their Jacobians."""

    def __init__(self) -> None:
        self.calls = self.products = 0

    def __call__(self, call: SolveCall) -> Solution[Any]:
        return dataclasses.replace(call, f=_CountedMap(call.f, self)).solve()


class _CountedMap(nn.Module):
    """A map that counts its calls and the gradients that come back through them."""

    def __init__(self, f: Callable[..., Any], counted: _Counted) -> None:
        super().__init__()
        self.f = f
        self._counted = counted
        if not isinstance(f, nn.Module):
            # Registered as children, so that their parameters are found.
            self.used = nn.ModuleList(dict.fromkeys(modules_used_by(f)))

    def forward(self, z: Any, *inputs: Any) -> Any:
        fz = self.f(z, *inputs)
        self._counted.calls += 1
        first = tree_leaves(fz)[0]
        if first.requires_grad:
            first.register_hook(self._count)
        return fz

    def _count(self, gradient: Tensor) -> None:
        self._counted.products += 1


def _owner(name: str) -> str:
    """The module that a parameter belongs to: ``"net.fc"`` of ``"net.fc.parametrizations.weight.original"``."""
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _owners(model: nn.Module) -> dict[str, set[str]]:
    """By the name of each group, those of all modules that its parameters belong to: several if a module is shared."""
    owners: dict[str, set[str]] = {}
    first: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(first.setdefault(parameter, _owner(name)), set()).add(_owner(name))
    return owners


def _groups_of(name: str, groups: tuple[str, ...], owners: dict[str, set[str]]) -> tuple[str, ...]:
    """The groups within a layer; if it has none, as in an iMLP, those of the module around it."""

    def within(module: str) -> tuple[str, ...]:
        return tuple(
            group
            for group in groups
            if any(module in ("", owner) or owner.startswith(f"{module}.") for owner in owners.get(group, {group}))
        )

    parent = name.rpartition(".")[0]
    return within(name) or (within(parent) if parent else ())


def _compared(found: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> dict[str, GroupGradient]:
    compared = {}
    for name, gradients in exact.items():
        ours, theirs = (torch.cat([g.flatten().cpu().double() for g in gs]) for gs in (found[name], gradients))
        norms = float(ours.norm()), float(theirs.norm())
        cosine = float(ours @ theirs) / (norms[0] * norms[1]) if min(norms) > 0 else math.nan
        compared[name] = GroupGradient(cosine, norms[0] / norms[1] if norms[1] > 0 else math.nan)
    return compared
