"""The diagnosis of every implicit solve of a model."""

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
from implicit.diagnostics.layer_report import LayerReport, count_statuses
from implicit.diagnostics.map_examination import MapExamination
from implicit.diagnostics.observed_map import restored
from implicit.diagnostics.ordinary_tensors import ordinary_tensors
from implicit.diagnostics.replay import Replay
from implicit.diagnostics.root_examination import RootExamination
from implicit.diagnostics.solve_hook import Around, SolveCall, SolveNames, around_solves
from implicit.implicit_layer import ImplicitLayer
from implicit.invertible_residual import InvertibleResidual
from implicit.spectral.lipschitz import Constant, lipschitz_bound
from solvers import Solution
from solvers.problem import Layout
from solvers.problem.peak_memory import PeakMemory


def diagnose(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    known: Mapping[type[nn.Module], Constant] = MappingProxyType({}),
    seed: int = 0,
) -> Diagnosis:
    """Find out how every implicit layer of a model solves, and why a solve fails.

    Runs ``model(*inputs, **kwargs)`` twice, without gradients, and a third time for solves within F of a root that need
    it. For each layer, and each call of :func:`implicit.fixed_point` or :func:`implicit.root` in the model's methods,
    it reports the statuses, the steps, the residuals, the leading eigenvalues of the Jacobian, the rounding in the map,
    the cost, and a certified contraction bound where :func:`implicit.lipschitz_bound` knows the map. If a solve fails,
    or its result is not to be trusted, it names the :class:`Cause` and proposes a setting that it has tried on the same
    inputs. If a layer solves more than once, the worst solve is examined. Of an :class:`implicit.InvertibleResidual`
    whose inverse the model does not call, the inverse at its own output is examined. Calls are named by the module that
    makes them and the function that they solve, such as ``"head: root of kepler"``. Solves in other threads are not
    seen, and compiled models run as they are written.

    One layer takes at most twenty solves, two checks of its map (as :func:`implicit.check_map`), about 40 products with
    its Jacobian, and the memory of as many states; for a root of D unknowns, D at most 64, up to 11 D products more.
    The parameters, buffers and gradients of the model, and PyTorch's random number generators on the CPU and on the
    model's device, are left as they were. What else the model changes when it is called stays changed: Python
    attributes, such as counters and lists, and the generators of numpy and Python. The causes hold for these inputs:
    call it on a real batch, in the mode (training or evaluation) and under the autocast that you are interested in.

    Args:
        model: A model with implicit layers or calls of ``fixed_point`` and ``root``, or a layer. For a map, pass
            ``FixedPointLayer(f, ...)``.
        *inputs: The inputs of the model.
        kwargs: Its keyword arguments.
        known: Lipschitz constants of module types, as in :func:`implicit.lipschitz_bound`.
        seed: For the random directions of the measurements.

    Returns:
        The :class:`Diagnosis`. ``print`` shows it, ``to_dict()`` is for JSON, ``plot()`` draws it.

    Raises:
        TypeError, ValueError: The model makes no solve that can be seen.

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
    names = SolveNames(model)
    inputs, named = tree_map_only(Tensor, lambda x: x.clone() if x.is_inference() else x, (inputs, dict(kwargs or {})))
    tensors = (leaf for leaf in (*tree_leaves((inputs, named)), *model.parameters(), *model.buffers()))
    device = next((leaf.device for leaf in tensors if isinstance(leaf, Tensor)), torch.device("cpu"))
    survey, visit = _Survey(), _Visit(names, known, seed)

    def run(around: Around) -> None:
        with restored([model], device), _inverting(names.layers), around_solves(names, around, alone=True):
            model(*inputs, **named)

    force_eager = torch.compiler.set_stance("force_eager")
    with torch.inference_mode(False), torch.no_grad(), force_eager, ordinary_tensors(model):
        run(survey)
        visit.examine(survey.worst())
        run(visit)
        if missing := survey.of.keys() - visit.examined.keys():  # solves within the solves of a root
            visit.examine(dict.fromkeys(missing, 0))
            run(visit)
    names.require_solves()
    reports = {
        name: dataclasses.replace(visit.examined[name], **survey.totals(name))
        for name in names.in_order()
        if name in visit.examined
    }
    return Diagnosis(reports, tuple(name for name in names.layers if name not in reports))


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
    """Counts the solves by their names, in the first call of the model."""

    def __init__(self) -> None:
        self.of: dict[str, list[_Solved]] = {}

    def __call__(self, call: SolveCall) -> Solution[Any]:
        # Residuals are those of the examination; roots that full Newton steps reach are found faster without them.
        call = _quiet(call, history=not call.options.root)
        if transform_active():  # a solve within a map that is being differentiated
            return call.solve()
        begin = _now(call.z0)
        solution = call.solve()
        seconds = _now(call.z0) - begin
        status, steps = solution.status.flatten().cpu(), solution.num_steps.flatten().cpu()
        badness = (int(solution.failed.sum()), int(steps.sum()))
        self.of.setdefault(call.name, []).append(_Solved(status, steps, solution.num_evals, seconds, badness))
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


def _quiet(call: SolveCall, *, history: bool) -> SolveCall:
    options = dataclasses.replace(call.options, on_failure="ignore", history=history, compile=False)
    return dataclasses.replace(call, options=options)


class _Visit:
    """Examines the worst solve of each name where it is made, in the second call of the model."""

    def __init__(self, names: SolveNames, known: Mapping[type[nn.Module], Constant], seed: int) -> None:
        self._names = names
        self._known = known
        self._seed = seed
        self._made: dict[str, int] = {}
        self._busy = False
        self._chosen: dict[str, int] = {}
        self.examined: dict[str, LayerReport] = {}

    def examine(self, chosen: dict[str, int]) -> None:
        """Choose the number of the solve of each name that is examined in the next call of the model."""
        self._chosen, self._made = chosen, {}

    def __call__(self, call: SolveCall) -> Solution[Any]:
        call = _quiet(call, history=True)
        name, options = call.name, call.options
        number = self._made.get(name, 0)
        counts = not (self._busy or transform_active())
        self._made[name] = number + counts
        # Solves within a map that is being examined are made as usual.
        if not counts or number != self._chosen.get(name):
            return call.solve()
        layout = Layout(call.z0, options.batch_dims)
        lost = torch.zeros(layout.batch_size, dtype=torch.bool, device=layout.device)
        whole = not options.compact and options.chunk_size is None

        def observed(z: Any, *args: Any) -> Any:
            fz = call.f(z, *args)
            # A product with the Jacobian calls the map under a transform, which allows no change of other tensors.
            if whole and not transform_active():
                values = layout.pack(fz)
                if len(values) == len(lost):
                    lost.logical_or_(~values.isfinite().all(dim=1))
            return fz

        with constant_weights():
            solution = dataclasses.replace(call, f=observed).solve()
            self._busy = True
            try:
                of_layer = name in self._names.layers
                start_option = "init" if of_layer else "z0"
                replay = Replay(call.f, call.z0, call.args, call.mode, options, start_option, num_solves=2)
                with replay.restored():
                    self.examined[name] = self._report(call, replay, solution, lost)
            finally:
                self._busy = False
        return solution

    def _report(self, call: SolveCall, replay: Replay, solution: Solution[Any], lost: Tensor) -> LayerReport:
        options = replay.options
        saved = _bytes_saved(replay, call)
        examination = RootExamination if options.root else MapExamination
        exam = examination(replay, solution, lost, self._seed)
        history = torch.empty(0, replay.layout.batch_size)
        if solution.history is not None:
            history = solution.history.reshape(len(solution.history), -1).cpu().double()
        return LayerReport(
            name=self._names.place_of(call.name),
            settings=f"solver={options.solver!r}, stopping={options.stopping!r}",
            root=options.root,
            statuses={},
            num_steps=solution.num_steps.flatten().cpu(),
            history=history,
            rate=_rate(history, solution.num_steps.flatten().cpu()),
            eigenvalues=exam.spectrum.eigenvalues,
            eigenvalue_error=exam.spectrum.residual,
            transient_growth=exam.spectrum.growth,
            lipschitz=None if options.root else self._lipschitz(replay.f),
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


def _rate(history: Tensor, num_steps: Tensor) -> Tensor:
    """(steps, B) -> (B,) the factor per step, on average up to the step at which each sample stopped."""
    if len(history) < 2:
        return torch.full((history.shape[1],), torch.nan, dtype=torch.float64)
    least = history.nan_to_num(torch.inf).amin(dim=0)
    steps = (num_steps.clamp_max(len(history)) - 1).clamp_min(1)
    return (least / history[0]) ** (1 / steps)


def _bytes_saved(replay: Replay, call: SolveCall) -> int | None:
    """The bytes that a solve with gradients creates and keeps, without its value; None where it does not run."""
    replay.num_solves += 1

    def leaf(x: Tensor) -> Tensor:
        return (x.clone() if x.is_inference() else x.detach()).requires_grad_(x.is_floating_point())

    try:
        with replay.restored(), torch.inference_mode(False), torch.enable_grad(), PeakMemory() as memory:
            inputs = tree_map_only(Tensor, leaf, replay.inputs)
            again = dataclasses.replace(
                call, f=replay.f, z0=replay.z0, args=inputs, mode=replay.backward, options=replay.options
            )
            value = again.solve().value
            kept = memory.held
        return int(max(0, kept - sum(leaf.nbytes for leaf in tree_leaves(value))))
    except (RuntimeError, NotImplementedError):
        return None
