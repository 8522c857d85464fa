"""Whether a map is one that can be solved: the same in every call, changing nothing, its samples independent."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from implicit.autograd.constant_weights import constant_weights
from implicit.diagnostics.modules_used import modules_used_by
from implicit.diagnostics.observed_map import Call, ObservedMap, nearby, same, untouched
from implicit.layer import FixedPointLayer
from solvers.problem.layout import Layout

# Calls beyond the first that must agree with it: two small dropout masks may be equal by chance.
_REPETITIONS = 3


def check_map(f: Callable[..., Any], z0: Any, *inputs: Any, batch_dims: int = 1) -> None:
    """Raise an error if f is not a map that can be solved for a fixed point; it names the module that is to blame.

    What is checked, near ``z0`` and in the modes (training, autocast) in force:

    - f is the same in every call: no dropout, no other random numbers, no state carried from call to call;
    - it changes none of its arguments, and no buffer or parameter of its modules;
    - it does not mix samples: what it returns for one does not depend on the state of another, as with BatchNorm in
      training. (Seen in batches of two and more.)
    - what it returns is like the state.

    Values are compared bit for bit on the CPU, up to rounding elsewhere. Parametrized weights are held constant, as
    they are in a solve. Afterwards the buffers and PyTorch's random numbers are as they were. The module is found by
    comparing what goes into and comes out of each, as far as they can be seen from f: f itself, the modules that a
    function refers to, and all their children.

    For a debug run before a training; it costs 6 + 2 log2(B) calls of f and copies of all activations. The solver has a
    check of its own, always on, for a state that is changed in place. To check the layers of a model on what they are
    given, use :func:`checked_maps`.

    Args:
        f: The map.
        z0: A start, as for a solve.
        *inputs: Handed to ``f`` after the state.
        batch_dims: As in :func:`solvers.solve`.

    Raises:
        ValueError: The map is unfit. The message says how, which module it is, and what to do.
        TypeError: What f returns is not like the state.

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
    findings = _findings(f, z0, inputs, batch_dims)
    if findings:
        raise ValueError("\n- ".join(["f is not a map that can be solved for a fixed point.", *findings]))


@contextlib.contextmanager
def checked_maps(model: nn.Module) -> Iterator[None]:
    """Inside, :func:`check_map` is run on every FixedPointLayer of the model, at each call, with what it is given.

    Args:
        model: Any module; the layers are found by type among its submodules.

    Raises:
        ValueError: The map of a layer is unfit. The message names the layer too.

    Example:
        >>> import torch
        >>> from implicit import FixedPointLayer, checked_maps
        >>> model = torch.nn.Sequential(FixedPointLayer(lambda z, x: 0.5 * z + x))
        >>> with checked_maps(model):
        ...     _ = model(torch.ones(2, 3))
    """

    def check(layer: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert isinstance(layer, FixedPointLayer)
        z0 = options.get("z0")
        if z0 is None:
            tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            with untouched([], next((tensor.device for tensor in tensors), torch.device("cpu"))):
                z0 = layer.start(*inputs)
        try:
            check_map(layer.f, z0, *inputs, batch_dims=layer.batch_dims)
        except (TypeError, ValueError) as error:
            raise type(error)(f"In the FixedPointLayer {names[layer]!r}: {error}") from None

    names = {module: name for name, module in model.named_modules() if isinstance(module, FixedPointLayer)}
    handles = [layer.register_forward_pre_hook(check, with_kwargs=True) for layer in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _findings(f: Callable[..., Any], z0: Any, inputs: tuple[Any, ...], batch_dims: int) -> list[str]:
    layout = Layout(z0, batch_dims)
    modules = modules_used_by(f)
    kept = untouched(modules, layout.device)
    with torch.inference_mode(False), torch.no_grad(), kept, constant_weights():
        for parametrized in (child for module in modules for child in module.modules()):
            if isinstance(parametrized, ParametrizationList):
                parametrized()  # once a solve, which is no change from call to call
        observed = ObservedMap(f, inputs, layout)
        z = nearby(layout.pack(z0))
        return [*_changes(observed, z), *_mixing(observed, z)]


def _changes(observed: ObservedMap, z: Tensor) -> list[str]:
    """What a call changes, and whether the next ones return the same."""
    before = observed.snapshot()
    first = observed(z)
    found = []
    for argument, module in first.changed_arguments.items():
        found.append(
            f"{observed.name_of(module)} changes {argument} in place. Write z + x in the place of z += x, and "
            "give activations inplace=False."
        )
    for module, names in observed.changed(before).items():
        found.append(
            f"A call changes {', '.join(names)} of {observed.name_of(module)}. Use GroupNorm or LayerNorm in "
            "the place of BatchNorm, torch.nn.utils.parametrizations in that of hooks on weights, or eval mode."
        )
    calls = (observed(z) for _ in range(_REPETITIONS))
    different = next((call for call in calls if not same([first.value], [call.value])), None)
    if different is not None:
        found.append(
            f"{observed.name_of(first.first_difference(different))} returns something else in each call for the same "
            "input. Draw random numbers before the solve and give them to the map as an input (a dropout mask by "
            "implicit.dropout_mask), carry no state from call to call, or use eval mode."
        )
    return found


def _mixing(observed: ObservedMap, z: Tensor) -> list[str]:
    """Whether the result for a sample depends on the state of another.

    Half of the samples are changed at a time, those with a certain bit in their number, and then the others. The
    numbers of any two differ in some bit, so each of them is once kept while the other is changed.
    """

    def call(z: Tensor) -> Call:
        with observed.untouched():
            return observed(z)

    other = nearby(z)
    before = call(z)
    if not same([before.value], [call(z).value]):  # it carries a state that cannot be seen: reported already
        return []
    number = torch.arange(len(z), device=z.device)
    for bit in range((len(z) - 1).bit_length()):
        for side in (0, 1):
            kept = (number >> bit) & 1 == side  # (B,)
            after = call(torch.where(kept.unsqueeze(1), z, other))
            if not same([before.value[kept]], [after.value[kept]]):
                module = before.first_mixing(after, kept)
                return [
                    f"What {observed.name_of(module)} returns for one sample depends on the others in the batch. Use "
                    "GroupNorm or LayerNorm in the place of BatchNorm, or eval mode; if the samples are one coupled "
                    "problem, solve it with batch_dims=0."
                ]
    return []
