"""One update of a model's weights: the code that `train` runs and that `benchmarks/gpu.py` times.

It never waits for the device before the weights change. Whether the loss and the gradient are finite is decided on the
device; an update that is not leaves the weights, the optimizer, the average and all buffers as they were.
"""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from timm.optim import Lookahead, create_optimizer_v2, get_optimizer_class
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm, parametrize
from torch.optim import SGD, Adam, AdamW, Optimizer

from imixer.training.config import LOOKAHEAD

GRAPH_WARM_UP = 3  # updates that run one kernel at a time before they are captured


def make_optimizer(model: nn.Module, *, opt: str, capturable: bool = False, **arguments: Any) -> Optimizer:
    """Create timm's optimizer of this name, fused where it then leaves updates out by itself.

    Args:
        model: Its parameters are grouped by timm: biases and other vectors have no weight decay.
        opt: timm's name.
        capturable: Whether its steps will be captured in a CUDA graph.
        **arguments: Further arguments of ``timm.optim.create_optimizer_v2``, such as ``lr`` and ``betas``.

    Raises:
        ValueError: It cannot be captured.
    """
    kind = optimizer_class(opt)
    if kind in (Adam, AdamW, SGD) and not {"fused", "foreach"} & arguments.keys():
        arguments["fused"] = True
    if capturable:
        if kind not in (Adam, AdamW) or not arguments.get("fused") or opt.startswith(LOOKAHEAD):
            raise ValueError(f"--cuda-graph needs an optimizer that can be captured, fused adam or adamw, not {opt}")
        arguments["capturable"] = True
    return create_optimizer_v2(model, opt, **arguments)


def optimizer_class(opt: str) -> Callable[..., Any]:
    """The class of timm's optimizer of this name, without the Lookahead around it."""
    kind: Callable[..., Any] = get_optimizer_class(opt.removeprefix(LOOKAHEAD), bind_defaults=False)
    return kind


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor", mode: str | None = None) -> None:
    """Compile a model in place: once for all of its repeated blocks, or as a whole if it has none.

    The blocks of timm's mixers and transformers stand in ``model.blocks``. PyTorch gives each parametrized layer a
    class of its own, for which each block would be compiled anew, so equal layers share one class from here on.
    Removing a parametrization afterwards (`torch.nn.utils.parametrize.remove_parametrizations`) is an error.
    """
    blocks = list(getattr(model, "blocks", nn.ModuleList()).children())
    if len({type(block) for block in blocks}) != 1:
        cast(Any, model).compile(backend=backend, mode=mode)
        return
    shared: dict[object, type] = {}
    for module in model.modules():
        if parametrize.is_parametrized(module):
            alike = (type(module).__bases__, tuple(cast(Any, module.parametrizations)))
            module.__class__ = shared.setdefault(alike, type(module))
    for block in blocks:
        block.compile(backend=backend, mode=mode)


class TrainingStep:
    """The update of a model: gradients of one or several batches, clipping, the optimizer's step, the average.

    `add_gradient` for each batch, then `update`. With a fused optimizer neither waits for the device, except in the
    first update, in which the optimizer makes its state. Other optimizers cannot leave a step out by themselves:
    with them `update` waits for the verdict.

    Args:
        model: In training mode; it may be wrapped for data-parallel training, or compiled.
        loss: Of logits (B, classes) in float32 and targets.
        optimizer: From `make_optimizer`.
        plain: The model without its wrapper, whose buffers are protected and whose weights are averaged.
        autocast: Makes the context of mixed precision.
        scaler: The loss scaler of float16.
        clip_grad: Largest norm of the gradient; None or 0 clips nothing.
        ema: timm's average of the weights.
        exchange: Makes the context of a backward pass, told whether processes exchange gradients in it.
        cuda_graph: Whether gradients and updates are captured in two CUDA graphs after some updates, and replayed. The
            model must be on a CUDA device, in one process; a batch of another shape runs without them.

    Raises:
        ValueError: ``cuda_graph`` cannot be had.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Optimizer,
        *,
        plain: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad: float | None = None,
        ema: ModelEmaV3 | None = None,
        exchange: Callable[[bool], AbstractContextManager[Any]] = lambda _: nullcontext(),
        cuda_graph: bool = False,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        self._plain = plain if plain is not None else model
        self._loss = loss
        self._autocast = autocast
        self._clip_grad = clip_grad
        self._ema = ema
        self._exchange = exchange
        self._parameters = list(model.parameters())
        self._device = self._parameters[0].device
        self._world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        # Lookahead does not tell the optimizer in it to leave a step out.
        self._skips = bool(optimizer.defaults.get("fused")) and not isinstance(optimizer, Lookahead)
        self._has_state = bool(optimizer.state)
        self._buffers = list(self._plain.buffers())
        self._buffers_before: list[Tensor] = []
        self._averages = list(ema.module.state_dict().values()) if ema is not None else []
        self._loss_sum = torch.zeros((), device=self._device)
        self._mean_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._graphs = _Graphs(self._device, self._world_size) if cuda_graph else None
        self._updates = 0

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Take one batch as a whole update; return the loss, the gradient's norm and 1 if they are finite."""
        self.add_gradient(images, targets)
        return self.update(self._updates + 1)

    def add_gradient(self, images: Tensor, targets: Tensor, *, share: float = 1.0, last: bool = True) -> None:
        """Add the gradient of ``share`` of a batch's loss.

        Args:
            images: (B, C, H, W), on the device.
            targets: (B,) classes, or (B, classes) probabilities.
            share: One over the number of batches to the update.
            last: Whether the update comes next, so that processes exchange their gradients now.
        """
        if not self._buffers_before:
            self._buffers_before = [buffer.clone() for buffer in self._buffers]
        if self._graphs is None:
            self._add_gradient(images, targets, share, last)
        else:
            self._graphs.add_gradient(self, images, targets, share)

    def update(self, number: int, notes: Sequence[float] = ()) -> Tensor:
        """Change the weights by the gradient if the loss and the gradient are finite in all processes; forget it.

        Args:
            number: How many updates there have been with this one, the ones left out too.
            notes: Numbers of this process to be added up over the processes on the way.

        Returns:
            (3 + notes,) float64 on the device: the mean loss of all processes, the norm of the gradient before
            clipping, 1 if both are finite and else 0, and the sums of the notes.
        """
        shared = torch.stack(
            [self._loss_sum.double() / self._world_size]
            + [torch.full((), note, dtype=torch.float64, device=self._device) for note in notes]
        )
        if self._world_size > 1:
            distributed.all_reduce(shared)
        self._mean_loss.copy_(shared[0])
        norm, finite = self._update() if self._graphs is None else self._graphs.update(self)
        if self._ema is not None:
            before = [value.clone() for value in self._averages]
            self._ema.update(self._plain, step=number)
            _keep(finite, self._averages, before)
        self._updates += 1
        return torch.cat([torch.stack([shared[0], norm.double(), finite.double()]), shared[1:]])

    def forget(self) -> None:
        """Drop the gradient that was added up, and what its forward passes did to the buffers."""
        self.optimizer.zero_grad(set_to_none=self._graphs is None)
        self._loss_sum.zero_()
        if self._buffers_before:
            _keep(torch.zeros((), dtype=torch.bool, device=self._device), self._buffers, self._buffers_before)
            self._buffers_before = []

    def _add_gradient(self, images: Tensor, targets: Tensor, share: float | Tensor, last: bool) -> None:
        with self._exchange(last):
            with self._autocast():
                logits = self.model(images)  # (B, classes)
            loss = self._loss(logits.float(), targets) * share
            (self.scaler.scale(loss) if self.scaler is not None else loss).backward()
        self._loss_sum += loss.detach()

    def _update(self) -> tuple[Tensor, Tensor]:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._clip_grad:
            clip_grads_with_norm_(self._parameters, self._clip_grad, norm)
        finite = self._mean_loss.isfinite() & norm.isfinite()
        if self._skips and self._has_state:
            optimizer = cast(Any, self.optimizer)
            optimizer.found_inf = (~finite).float()  # its kernels leave the step out where this is 1
            optimizer.step()
            del optimizer.found_inf
        elif finite:  # waits for the device
            self.optimizer.step()
            self._has_state = True
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=self._graphs is None)
        self._loss_sum.zero_()
        _keep(finite, self._buffers, self._buffers_before)
        self._buffers_before = []
        return norm, finite


class _Graphs:
    """A step's two CUDA graphs, of the gradient of a batch and of the update.

    The first updates run on a side stream without them: they make the optimizer's state and the gradients, which the
    graphs then use in place. Capturing computes nothing, so that no update is done twice. Meanwhile the threads of the
    loader may pin memory, hence the capture is of this thread alone.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        if device.type != "cuda" or world_size > 1:
            where = f"{world_size} processes" if world_size > 1 else f"device {device.type}"
            raise ValueError(f"--cuda-graph needs a CUDA device and one process, not {where}; leave it out")
        self._side = torch.cuda.Stream(device)
        self._gradient: torch.cuda.CUDAGraph | None = None
        self._updating: torch.cuda.CUDAGraph | None = None

    def add_gradient(self, step: TrainingStep, images: Tensor, targets: Tensor, share: float) -> None:
        if step._updates < GRAPH_WARM_UP or not step._has_state:
            self._beside(lambda: step._add_gradient(images, targets, share, True))
            return
        if self._gradient is None:
            self._images, self._targets = images.clone(), targets.clone()
            self._share = torch.full((), share, device=images.device)
            gc.collect()  # graphs of autograd that are left over accumulate on their own stream, which capture forbids
            self._gradient = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._gradient, capture_error_mode="thread_local"):
                step._add_gradient(self._images, self._targets, self._share, True)
        if images.shape != self._images.shape or targets.shape != self._targets.shape:
            self._beside(lambda: step._add_gradient(images, targets, share, True))
            return
        self._images.copy_(images)
        self._targets.copy_(targets)
        self._share.fill_(share)
        self._gradient.replay()

    def update(self, step: TrainingStep) -> tuple[Tensor, Tensor]:
        if self._gradient is None:
            found: list[tuple[Tensor, Tensor]] = []
            self._beside(lambda: found.append(step._update()))
            return found[0]
        groups = step.optimizer.param_groups
        if self._updating is None:
            # Captured with tensors for rates, which the schedule's numbers are copied to before every replay.
            self._rates = [torch.full((), group["lr"], device=step._device) for group in groups]
            self._before = step._buffers_before
            rates = [group["lr"] for group in groups]
            self._updating = torch.cuda.CUDAGraph()
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate
            try:
                with torch.cuda.graph(self._updating, capture_error_mode="thread_local"):
                    self._found = step._update()
            finally:
                for group, number in zip(groups, rates, strict=True):
                    group["lr"] = number
        elif self._before:
            torch._foreach_copy_(self._before, step._buffers_before)
        step._buffers_before = []
        for group, rate in zip(groups, self._rates, strict=True):
            rate.fill_(group["lr"])
        self._updating.replay()
        norm, finite = self._found
        return norm.clone(), finite.clone()

    def _beside(self, run: Callable[[], None]) -> None:
        """Run on the side stream, between what the current stream has and will get."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            run()
        torch.cuda.current_stream().wait_stream(self._side)


@torch.no_grad()
def _keep(finite: Tensor, values: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Put back what the values were before, in place, unless ``finite``."""
    for value, old in zip(values, before, strict=True):
        torch.where(finite, value, old, out=value)
