"""The diagnosis of every implicit layer of a model."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.torch_internals import transform_active
from implicit.diagnostics.diagnosis import Diagnosis
from implicit.diagnostics.examination import Examination
from implicit.diagnostics.layer_report import LayerReport, count_statuses
from implicit.diagnostics.observed_map import restored
from implicit.diagnostics.replay import Replay
from implicit.diagnostics.solve_hook import around_solves, implicit_layers, place_of
from implicit.implicit_layer import ImplicitLayer
from implicit.invertible_residual import InvertibleResidual
from implicit.spectral.lipschitz import Constant, lipschitz_bound
from solvers import Solution, stop_rule
from solvers.problem import Layout
from solvers.testing import PeakMemory


def diagnose(
    model: nn.Module, *inputs: Any, known: Mapping[type[nn.Module], Constant] = MappingProxyType({}), seed: int = 0
) -> Diagnosis:
    """Find out how every implicit layer of a model solves, and why a solve fails.

    Runs ``model(*inputs)`` twice, without gradients. For each layer it reports the statuses, the steps, the residuals,
    the leading eigenvalues of the Jacobian, the rounding in the map, the cost, and a certified contraction bound where
    :func:`implicit.lipschitz_bound` knows the map. If a solve fails, or its result is not to be trusted, it names the
    :class:`Cause` and proposes a setting that it has tried on the same inputs. If a layer solves more than once, the
    worst solve is examined. Of an :class:`implicit.InvertibleResidual` whose inverse the model does not call, the
    inverse at its own output is examined.

    One layer takes at most twenty solves, a check of its map (as :func:`implicit.check_map`), about 40 products with
    its Jacobian, and the memory of as many states. The model, its buffers and gradients, and PyTorch's random number
    generators are left as they were. The causes hold for these inputs: call it on a real batch, in the mode (training
    or evaluation) and under the autocast that you are interested in.

    Args:
        model: A model with implicit layers, or a layer. For a map, pass ``FixedPointLayer(f, ...)``.
        *inputs: The inputs of the model.
        known: Lipschitz constants of module types, as in :func:`implicit.lipschitz_bound`.
        seed: For the random directions of the measurements.

    Returns:
        The :class:`Diagnosis`. ``print`` shows it, ``to_dict()`` is for JSON, ``plot()`` draws it.

    Raises:
        TypeError, ValueError: The model has no implicit layer, or none that solves.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, diagnose
        >>> layer = FixedPointLayer(lambda z, x: x - 1.5 * z, solver="picard", on_failure="ignore")
        >>> diagnosis = diagnose(layer, torch.ones(2, 3))
        >>> [cause.value for cause in diagnosis.causes]
        ['oscillation']
        >>> diagnosis.layers[""].proposal.num_converged
        2
    """
    layers = implicit_layers(model)
    inputs = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, inputs)
    tensors = (leaf for leaf in (*tree_leaves(inputs), *model.parameters(), *model.buffers()))
    device = next((leaf.device for leaf in tensors if isinstance(leaf, Tensor)), torch.device("cpu"))
    survey = _Survey()
    with torch.inference_mode(False), torch.no_grad():
        for visit in (survey, worst := _Visit(model, known, seed)):
            if visit is worst:
                worst.chosen = survey.worst()
            with restored([model], device), _quiet(layers), _inverting(layers), around_solves(layers, visit):
                model(*inputs)
    if not worst.examined:
        raise ValueError(f"None of the implicit layers {list(layers)} made a solve in this call of the model.")
    reports = {
        name: dataclasses.replace(worst.examined[name], **survey.totals(name)) for name in layers if name in survey.of
    }
    return Diagnosis(reports, tuple(name for name in layers if name not in reports))


@contextlib.contextmanager
def _quiet(layers: dict[str, ImplicitLayer]) -> Iterator[None]:
    """Within the context, failures are not reported, and solutions have a history."""
    before = {name: (layer.on_failure, layer._observer) for name, layer in layers.items()}
    for layer in layers.values():
        layer.on_failure, layer._observer = "ignore", lambda _: None
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.on_failure, layer._observer = before[name]


@contextlib.contextmanager
def _inverting(layers: dict[str, ImplicitLayer]) -> Iterator[None]:
    """Within the context, an invertible block computes the inverse at its output after each forward pass."""

    def invert(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(block, InvertibleResidual)
        block.inverse(output[0] if isinstance(output, tuple) else output, *args[1:])

    blocks = [layer for layer in layers.values() if isinstance(layer, InvertibleResidual)]
    handles = [block.register_forward_hook(invert, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclasses.dataclass
class _Solved:
    """What is kept of a solve: the statuses, steps, cost, and how bad it was."""

    status: Tensor
    num_steps: Tensor
    num_evals: int
    seconds: float
    badness: tuple[int, int]


class _Survey:
    """Counts the solves of each layer, in the first call of the model."""

    def __init__(self) -> None:
        self.of: dict[str, list[_Solved]] = {}

    def __call__(
        self,
        solve: Callable[..., Solution[Any]],
        name: str,
        layer: ImplicitLayer,
        f: Callable[..., Any],
        z0: Any,
        inputs: tuple[Any, ...],
        **options: Any,
    ) -> Solution[Any]:
        begin = _now(z0)
        solution = solve(f, z0, inputs, **options)
        seconds = _now(z0) - begin
        status, steps = solution.status.flatten().cpu(), solution.num_steps.flatten().cpu()
        badness = (int(solution.failed.sum()), int(steps.sum()))
        self.of.setdefault(name, []).append(_Solved(status, steps, solution.num_evals, seconds, badness))
        return solution

    def worst(self) -> dict[str, int]:
        """Return the number of each layer's worst solve."""
        return {
            name: max(range(len(solves)), key=lambda i: (solves[i].badness, -i)) for name, solves in self.of.items()
        }

    def totals(self, name: str) -> dict[str, Any]:
        """Return the fields of a report that concern all solves of a layer."""
        solves = self.of[name]
        return {
            "statuses": count_statuses(torch.cat([solved.status for solved in solves])),
            "num_steps": torch.cat([solved.num_steps for solved in solves]),
            "num_solves_of_model": len(solves),
            "num_evals": sum(solved.num_evals for solved in solves),
            "seconds": sum(solved.seconds for solved in solves),
        }


def _now(z0: Any) -> float:
    """The time when everything on the device of the state is done."""
    device = next((leaf.device for leaf in tree_leaves(z0) if isinstance(leaf, Tensor)), torch.device("cpu"))
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class _Visit:
    """Examines the chosen solve of each layer where it is made, in the second call of the model."""

    def __init__(self, model: nn.Module, known: Mapping[type[nn.Module], Constant], seed: int) -> None:
        self._model = model
        self._known = known
        self._seed = seed
        self._made: dict[str, int] = {}
        self._busy = False
        self.chosen: dict[str, int] = {}
        self.examined: dict[str, LayerReport] = {}

    def __call__(
        self,
        solve: Callable[..., Solution[Any]],
        name: str,
        layer: ImplicitLayer,
        f: Callable[..., Any],
        z0: Any,
        inputs: tuple[Any, ...],
        **options: Any,
    ) -> Solution[Any]:
        number = self._made.get(name, 0)
        # Layers within the map of a layer that is being examined solve as usual.
        if self._busy or number != self.chosen.get(name):
            self._made[name] = number + (not self._busy)
            return solve(f, z0, inputs, **options)
        self._made[name] = number + 1
        layout = Layout(z0, layer.batch_dims)
        lost = torch.zeros(layout.batch_size, dtype=torch.bool, device=layout.device)

        def observed(z: Any, *args: Any) -> Any:
            fz = f(z, *args)
            # A product with the Jacobian calls the map under a transform, which allows no change of other tensors.
            if not (layer.compact or transform_active()):
                lost.logical_or_(~layout.pack(fz).isfinite().all(dim=1))
            return fz

        with constant_weights():
            solution = solve(observed, z0, inputs, **options)
            self._busy = True
            try:
                replay = Replay(layer, f, z0, inputs, stop_rule(**_given(options), default=layer.stopping), 2)
                with replay.restored():
                    self.examined[name] = self._report(name, replay, solution, lost, solve, options)
            finally:
                self._busy = False
        return solution

    def _report(
        self,
        name: str,
        replay: Replay,
        solution: Solution[Any],
        lost: Tensor,
        solve: Callable[..., Solution[Any]],
        options: dict[str, Any],
    ) -> LayerReport:
        saved = _bytes_saved(replay, solve, options)
        exam = Examination(replay, solution, lost, self._seed)
        history = torch.empty(0, replay.layout.batch_size)
        if solution.history is not None:
            history = solution.history.reshape(len(solution.history), -1).cpu().double()
        return LayerReport(
            name=place_of(name, self._model),
            settings=f"solver={replay.layer.solver!r}, stopping={replay.stopping!r}",
            statuses={},
            num_steps=solution.num_steps.flatten().cpu(),
            history=history,
            rate=_rate(history, solution.num_steps.flatten().cpu()),
            eigenvalues=exam.spectrum.eigenvalues,
            eigenvalue_error=exam.spectrum.residual,
            transient_growth=exam.spectrum.growth,
            lipschitz=self._lipschitz(replay.f),
            precision_floor=exam.floor,
            num_solves_of_model=1,
            num_evals=solution.num_evals,
            seconds=0.0,
            bytes_saved=saved,
            num_solves=replay.num_solves,
            findings=tuple(exam.findings),
            proposal=exam.proposal,
            advice=exam.advice,
        )

    def _lipschitz(self, f: Callable[..., Any]) -> float | None:
        g = getattr(f, "g", f)  # the map of an inverse is y - g(x)
        if not isinstance(g, nn.Module):
            return None
        try:
            return float(lipschitz_bound(g, known=self._known))
        except (TypeError, ValueError):
            return None


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("stopping", "rtol", "atol", "max_steps")}


def _rate(history: Tensor, num_steps: Tensor) -> Tensor:
    """(steps, B) -> (B,) the factor per step, on average up to the step at which each sample stopped."""
    if len(history) < 2:
        return torch.full((history.shape[1],), torch.nan, dtype=torch.float64)
    least = history.nan_to_num(torch.inf).amin(dim=0)
    steps = (num_steps.clamp_max(len(history)) - 1).clamp_min(1)
    return (least / history[0]) ** (1 / steps)


def _bytes_saved(replay: Replay, solve: Callable[..., Solution[Any]], options: dict[str, Any]) -> int | None:
    """The bytes that a solve with gradients creates and keeps, without its value; None where it does not run."""
    replay.num_solves += 1
    inputs = tree_map_only(Tensor, lambda x: x.requires_grad_() if x.is_floating_point() else x, replay.inputs)
    try:
        with replay.restored(), torch.enable_grad(), PeakMemory() as memory:
            value = solve(replay.f, replay.z0, inputs, **options).value
            kept = memory.held
        return int(max(0, kept - sum(leaf.nbytes for leaf in tree_leaves(value))))
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        tree_map_only(Tensor, lambda x: x.requires_grad_(False), replay.inputs)
