"""Calls of a map that record the inputs and outputs of every module and what was changed in place."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from implicit.autograd.modules_used import modules_used_by
from solvers.problem.layout import Layout

# The parameters and buffers of modules: (module, name) -> the tensor and a copy of its values.
Snapshot = dict[tuple[nn.Module, str], tuple[Tensor, Tensor]]


@dataclasses.dataclass
class ModuleCall:
    """Copies of the inputs and outputs of a module, and the arguments of the map that changed during its call."""

    module: nn.Module
    inputs: list[Tensor]
    versions: list[int]
    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Call:
    """The record of one call of the map.

    Attributes:
        layout: The layout of the state.
        value: (B, D) the result.
        modules: The calls of modules in the order in which they ended, so inner modules come before outer ones.
        changed_arguments: Maps the name of each argument that was changed in place to the innermost module that changed
            it, or to None if no module did.
        drawing: The modules that draw random numbers by themselves; None if f itself does.
    """

    layout: Layout
    value: Tensor
    modules: list[ModuleCall]
    changed_arguments: dict[str, nn.Module | None]
    drawing: list[nn.Module | None]

    def first_difference(self, other: "Call") -> nn.Module | None:
        """Return the innermost module whose outputs differ in the other call although its inputs are the same."""
        for ours, theirs in self._pairs(other):
            if same(ours.inputs, theirs.inputs) and not same(ours.outputs, theirs.outputs):
                return ours.module
        return None

    def first_mixing(self, other: "Call", kept: Tensor) -> nn.Module | None:
        """Return the innermost module whose outputs for the samples ``kept`` (B,) differ, but not their inputs."""
        for ours, theirs in self._pairs(other):
            tensors = (ours.inputs, theirs.inputs, ours.outputs, theirs.outputs)
            rows = [[self._rows(tensor) for tensor in group] for group in tensors]
            if any(row is None for group in rows for row in group):
                continue
            inputs, their_inputs, outputs, their_outputs = (
                [row[kept] for row in group if row is not None] for group in rows
            )
            if same(inputs, their_inputs) and not same(outputs, their_outputs):
                return ours.module
        return None

    def _pairs(self, other: "Call") -> Iterator[tuple[ModuleCall, ModuleCall]]:
        for ours, theirs in zip(self.modules, other.modules, strict=False):
            if ours.module is not theirs.module:
                return
            yield ours, theirs

    def _rows(self, tensor: Tensor) -> Tensor | None:
        """Return the entries of each sample, (B, ...), or None if the leading dimensions do not index the samples."""
        size, shape = self.layout.batch_size, self.layout.batch_shape
        leading = len(shape) if tensor.shape[: len(shape)] == shape else 1
        count = tensor.shape[:leading].numel()
        return tensor.reshape(size, -1) if tensor.dim() and count and count % size == 0 else None


class ObservedMap:
    """The map f as a function of the flat state (B, D) that works on copies and returns a :class:`Call`."""

    def __init__(self, f: Callable[..., Any], inputs: tuple[Any, ...], layout: Layout) -> None:
        self._f = f
        self._inputs = inputs
        self._layout = layout
        self._roots = modules_used_by(f)
        self._names = {
            module: f"{type(root).__name__}{'.' if path else ''}{path}{f' ({type(module).__name__})' if path else ''}"
            for root in self._roots
            for path, module in root.named_modules()
        }

    def __call__(self, z: Tensor) -> Call:
        state, inputs = tree_map_only(Tensor, torch.clone, (self._layout.unpack(z), self._inputs))
        arguments = {f"its state {i}": leaf for i, leaf in enumerate(tree_leaves(state))}
        arguments |= {f"its input {i}": leaf for i, leaf in enumerate(tree_leaves(inputs)) if isinstance(leaf, Tensor)}
        versions = [leaf._version for leaf in arguments.values()]

        def changed(before: list[int]) -> list[str]:
            return [n for (n, leaf), v in zip(arguments.items(), before, strict=True) if leaf._version != v]

        ended: list[ModuleCall] = []
        running: list[ModuleCall] = []
        drawing: dict[nn.Module | None, None] = {}
        generator = self._generator_state()

        def notice_drawing() -> None:
            nonlocal generator
            before, generator = generator, self._generator_state()
            if not torch.equal(before, generator):
                drawing[running[-1].module if running else None] = None

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            notice_drawing()
            running.append(ModuleCall(module, _copies((args, kwargs)), [leaf._version for leaf in arguments.values()]))

        def end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            notice_drawing()
            call = running.pop()
            call.outputs, call.changed = _copies(output), changed(call.versions)
            ended.append(call)

        with contextlib.ExitStack() as hooks:
            for module in self._names:
                hooks.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(end, with_kwargs=True).remove)
            output = self._f(state, *inputs)
            notice_drawing()
        self._layout.check(output)
        culprits = {
            name: next((call.module for call in ended if name in call.changed), None) for name in changed(versions)
        }
        return Call(self._layout, self._layout.pack(output).clone(), ended, culprits, list(drawing))

    def _generator_state(self) -> Tensor:
        """The state of PyTorch's random number generator on the device of the state of the map."""
        device = self._layout.device
        if device.type in ("cpu", "meta"):
            return torch.get_rng_state()
        state: Tensor = torch.get_device_module(device).get_rng_state(device)
        return state

    def name_of(self, module: nn.Module | None) -> str:
        """Return the name of a module for messages; None stands for f itself."""
        return "f itself" if module is None else self._names[module]

    def snapshot(self) -> Snapshot:
        """Return copies of the current parameters and buffers of the modules."""
        return snapshot(self._roots)

    def changed(self, before: Snapshot) -> dict[nn.Module, list[str]]:
        """Return the parameters and buffers that differ from the snapshot, by module."""
        now = self.snapshot()
        found: dict[nn.Module, list[str]] = {}
        for (module, name), (_, values) in before.items():
            if (module, name) not in now or not same([values], [now[module, name][1]]):
                found.setdefault(module, []).append(name)
        return found

    def restored(self) -> contextlib.AbstractContextManager[None]:
        """Restore the modules' tensors and the random number generators on leaving the context."""
        return restored(self._roots, self._layout.device)


def snapshot(roots: Sequence[nn.Module]) -> Snapshot:
    """Return copies of the parameters and buffers of modules and their children."""
    return {
        (module, name): (tensor, tensor.detach().clone())
        for root in roots
        for module in root.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


@contextlib.contextmanager
def restored(roots: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """On leaving the context, restore the modules' tensors and the random number generators of the CPU and device."""
    before = snapshot(roots)
    accelerated = device.type not in ("cpu", "meta")
    kind = device.type if accelerated else "cuda"
    try:
        with torch.random.fork_rng(devices=[device] if accelerated else [], device_type=kind):
            yield
    finally:
        for (module, name), (tensor, values) in before.items():
            held = module._parameters if name in module._parameters else module._buffers
            held[name] = tensor  # type: ignore[assignment]
            # Through .data, so that a graph that was recorded before accepts the tensor as unchanged.
            tensor.data.copy_(values)


def nearby(z: Tensor) -> Tensor:
    """Return ``z`` plus noise of a tenth of the size of each entry, or of 0.1 where the entry is 0."""
    return z + 0.1 * torch.randn_like(z) * torch.where(z == 0, 1.0, z.abs())


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether tensors are equal: bit for bit on the CPU, up to rounding on other devices. NaN equals NaN."""
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    unequal = (a != b) & ~((a != a) & (b != b))
    if not bool(unequal.any()):
        return True
    if a.device.type == "cpu" or not a.is_floating_point():
        return False
    # Kernels with atomic additions round differently in each call.
    return bool(((a - b).abs() <= 32 * torch.finfo(a.dtype).eps * a.abs().max())[unequal].all())


def _copies(tree: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
