"""A check that a map can be solved: it is the same in every call, changes nothing, and does not mix samples."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from implicit.autograd.constant_weights import constant_weights
from implicit.autograd.modules_used import compute_weights, modules_used_by
from implicit.autograd.torch_internals import transform_active
from implicit.diagnostics.observed_map import Call, ObservedMap, nearby, restored, same
from implicit.diagnostics.solve_hook import SolveCall, SolveNames, around_solves
from implicit.implicit_layer import ImplicitLayer
from solvers import Solution
from solvers.problem.layout import Layout

# Number of calls that must agree with the first one. One is not enough: two small dropout masks may agree by chance.
_REPETITIONS = 3


def check_map(f: Callable[..., Any], z0: Any, *inputs: Any, batch_dims: int = 1) -> None:
    """Raise an error if f cannot be solved for a fixed point; the error names the module that is the cause.

    Call it once in a debug run before training. To check all layers of a model on the inputs they get, use
    :func:`checked_maps`. It checks, near ``z0`` and in the current modes (training, autocast), that

    - f is the same in every call: it has no dropout, draws no other random numbers, and carries no state between calls;
    - f changes neither its arguments nor the buffers and parameters of its modules;
    - f does not mix samples: its result for one sample does not depend on the state of another, as it does with
      BatchNorm in training mode (this needs a batch of at least two);
    - f returns something of the same structure, shapes and dtypes as the state.

    It costs 6 + 2 log2(B) calls of f and copies of all activations. Values are compared bit for bit on the CPU and up
    to rounding on other devices. Parametrized weights are held constant, as they are in a solve. Buffers and PyTorch's
    random number generators are restored afterwards. The module to blame is found by comparing the inputs and outputs
    of all modules that can be found from f: f itself, the modules that a function refers to, and all their children.

    Args:
        f: The map.
        z0: A start, as for a solve.
        *inputs: Passed to ``f`` after the state.
        batch_dims: As in :func:`solvers.solve`.

    Raises:
        ValueError: The map cannot be solved. The message says why, names the module and says what to do.
        TypeError: The result of f does not match the state.

    Example:
        >>> import torch
        >>> from implicit import check_map
        >>> f = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        >>> check_map(f.eval(), torch.zeros(4, 3))
        >>> check_map(f.train(), torch.zeros(4, 3))
        Traceback (most recent call last):
        ValueError: f is not a map that can be solved for a fixed point.
        - A call changes running_mean, running_var, num_batches_tracked of Sequential.1 (BatchNorm1d). ...
        - What Sequential.1 (BatchNorm1d) returns for one sample depends on the others in the batch. ...
    """
    problems = map_problems(f, z0, inputs, batch_dims)
    if problems:
        messages = (problem.message for problem in problems)
        raise ValueError("\n- ".join(["f is not a map that can be solved for a fixed point.", *messages]))


@contextlib.contextmanager
def checked_maps(model: nn.Module) -> Iterator[None]:
    """Within the context, run :func:`check_map` before each solve of a fixed point that a model makes, on its inputs.

    These are the solves of its implicit layers, and the calls of :func:`implicit.fixed_point` in its methods. Solves
    under a transform of ``torch.func``, inside a graph of ``torch.compile`` and in other threads are not checked.

    Args:
        model: A model with implicit layers or calls of ``fixed_point``.

    Raises:
        TypeError, ValueError: The model is no module, or a map cannot be solved. The message names the layer as well.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, checked_maps
        >>> model = torch.nn.Sequential(FixedPointLayer(lambda z, x: 0.5 * z + x))
        >>> with checked_maps(model):
        ...     _ = model(torch.ones(2, 3))
    """

    def check(call: SolveCall) -> Solution[Any]:
        if not call.options.root and not transform_active():
            try:
                check_map(call.f, call.z0, *call.args, batch_dims=call.options.batch_dims)
            except (TypeError, ValueError) as error:
                kind = f"the {type(call.owner).__name__} " if isinstance(call.owner, ImplicitLayer) else ""
                raise type(error)(f"In {kind}{call.name!r}: {error}") from None
        return call.solve()

    with around_solves(SolveNames(model), check):
        yield


@dataclasses.dataclass(frozen=True)
class MapProblem:
    """A reason why a map cannot be solved.

    Attributes:
        message: What is wrong and what to do.
        mixes: Whether it is that samples mix; else the map changes.
        modules: The modules to blame by their names; empty if it is f itself.
    """

    message: str
    mixes: bool
    modules: dict[str, nn.Module]


def map_problems(f: Callable[..., Any], z0: Any, inputs: tuple[Any, ...], batch_dims: int) -> list[MapProblem]:
    """Return what :func:`check_map` finds near ``z0``."""
    layout = Layout(z0, batch_dims)
    unchanged = restored(modules_used_by(f), layout.device)
    with torch.inference_mode(False), torch.no_grad(), unchanged, constant_weights():
        # Advancing a power iteration is not a change by the map.
        compute_weights(f)
        observed = ObservedMap(f, inputs, layout)
        z = nearby(layout.pack(z0))
        return [*_changes(observed, z), *_mixing(observed, z)]


def _changes(observed: ObservedMap, z: Tensor) -> list[MapProblem]:
    """Find what a call changes, and whether the next calls return the same."""
    before = observed.snapshot()
    first = observed(z)
    found = []

    def add(message: str, *modules: nn.Module | None) -> None:
        named = {observed.name_of(module): module for module in modules if module is not None}
        found.append(MapProblem(message, mixes=False, modules=named))

    for argument, module in first.changed_arguments.items():
        add(
            f"{observed.name_of(module)} changes {argument} in place. Write z + x instead of z += x, and construct "
            "activations with inplace=False.",
            module,
        )
    for module, names in observed.changed(before).items():
        add(
            f"A call changes {', '.join(names)} of {observed.name_of(module)}. Use GroupNorm or LayerNorm instead of "
            "BatchNorm, torch.nn.utils.parametrizations instead of hooks on weights, or eval mode.",
            module,
        )
    calls = (observed(z) for _ in range(_REPETITIONS))
    different = next((call for call in calls if not same([first.value], [call.value])), None)
    if different is not None:
        culprits = first.drawing or [first.first_difference(different)]
        blamed = ", ".join(map(observed.name_of, culprits))
        add(
            f"{blamed} {'returns' if len(culprits) == 1 else 'return'} something else in each call for the same "
            "input. Draw random numbers before the solve and pass them to the map as an input (for dropout, use "
            "implicit.dropout_mask; where it is built in, as in nn.MultiheadAttention, construct the module with "
            "dropout=0), carry no state from call to call, or use eval mode.",
            *culprits,
        )
    return found


def _mixing(observed: ObservedMap, z: Tensor) -> list[MapProblem]:
    """Find whether the result for one sample depends on the state of another.

    For each bit of the sample numbers, the samples in which it is set are changed first, and then the others. The
    numbers of any two samples differ in some bit, so each of the two is kept once while the other one is changed.
    """

    def call(z: Tensor) -> Call:
        with observed.restored():
            return observed(z)

    other = nearby(z)
    before = call(z)
    if not same([before.value], [call(z).value]):  # f carries a hidden state, which is reported already
        return []
    number = torch.arange(len(z), device=z.device)
    for bit in range((len(z) - 1).bit_length()):
        for side in (0, 1):
            kept = (number >> bit) & 1 == side  # (B,)
            after = call(torch.where(kept.unsqueeze(1), z, other))
            if not same([before.value[kept]], [after.value[kept]]):
                module = before.first_mixing(after, kept)
                message = (
                    f"What {observed.name_of(module)} returns for one sample depends on the others in the batch. Use "
                    "GroupNorm or LayerNorm instead of BatchNorm, or eval mode; if the samples form one coupled "
                    "problem, solve it with batch_dims=0."
                )
                modules = {} if module is None else {observed.name_of(module): module}
                return [MapProblem(message, mixes=True, modules=modules)]
    return []
