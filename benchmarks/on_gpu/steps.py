"""A training step, which is the library's own, or inference: in every precision, eager, compiled or as CUDA graphs."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from benchmarks.on_gpu.cells import UnavailableError, WrongResultError
from benchmarks.on_gpu.setup import NUM_CLASSES, Setup
from benchmarks.on_gpu.timing import Flops
from benchmarks.published_imixer import load_published
from imixer import IMixer
from imixer.training.step import TrainingStep, compile_blocks, make_optimizer

AUTOCAST = {"fp32": None, "TF32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Ways to run a step. "compiled" is block by block; in "CUDA graphs" everything on the device is captured and replayed.
EAGER, COMPILED, GRAPH, COMPILED_GRAPH = WAYS = ("eager", "compiled", "CUDA graphs", "compiled, CUDA graphs")
FLOP_IMAGES = 8


def set_precision(name: str) -> None:
    """TF32 everywhere but in fp32."""
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"


def build(model: str, setup: Setup, size: str, **options: Any) -> nn.Module:
    """Mixer, iMixer or the published iMixer on the device, channels last, with the paper's stochastic depth."""
    if model == "published":
        if setup.published is None:
            raise UnavailableError("needs --published PATH")
        make: Callable[..., nn.Module] = load_published(setup.published)
    else:
        make = {"Mixer": MlpMixer, "iMixer": IMixer}[model]
    with setup.device:
        network = make(drop_path_rate=0.1, **setup.mixer_args(size), **options)
    return network.to(memory_format=torch.channels_last)


class Step:
    """One step on a batch that stays on the device; calling it trains or infers once.

    It returns what has to be finite: the loss and the norm of the gradient, or the logits.
    """

    def __init__(self, model: nn.Module, setup: Setup, *, batch: int, precision: str, training: bool, way: str) -> None:
        graphs = way in (GRAPH, COMPILED_GRAPH)
        if graphs and not setup.cuda:
            raise UnavailableError("needs CUDA")
        set_precision(precision)
        self.model = model.train(training)
        images = torch.randn(batch, 3, setup.img_size, setup.img_size, device=setup.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.targets = torch.randint(NUM_CLASSES, (batch,), device=setup.device)
        dtype = AUTOCAST[precision]
        self.autocast: dict[str, Any] = {"device_type": setup.device.type, "dtype": dtype, "enabled": dtype is not None}
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.flops = self._count_flops()
        if way in (COMPILED, COMPILED_GRAPH):
            compile_blocks(model, "aot_eager" if setup.toy else "inductor")
        self._step = self._infer
        if training:
            scaled = dtype == torch.float16
            training_step = TrainingStep(
                model,
                self.loss,
                make_optimizer(model, opt="adamw", lr=5e-4, weight_decay=0.05, capturable=graphs),
                autocast=lambda: torch.autocast(**self.autocast),
                scaler=torch.amp.GradScaler(setup.device.type) if scaled else None,
                cuda_graph=graphs,
            )
            self._step = lambda: training_step(self.images, self.targets)[:2]
        elif graphs:
            self._step = _captured(self._infer)

    def __call__(self) -> Tensor:
        return self._step()

    def _count_flops(self) -> float:
        """Operations of a step: of one forward (and backward) pass of a few images, eagerly, for the whole batch."""
        images, targets = self.images[:FLOP_IMAGES], self.targets[:FLOP_IMAGES]
        counter = Flops()
        with counter, torch.set_grad_enabled(self.model.training):
            with torch.autocast(**self.autocast):
                logits = self.model(images)
            if self.model.training:
                self.loss(logits.float(), targets).backward()
        self.model.zero_grad()
        return counter.total * (len(self.images) / len(images))

    def _infer(self) -> Tensor:
        with torch.no_grad(), torch.autocast(**self.autocast):
            logits: Tensor = self.model(self.images)
            return logits


def _captured(infer: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Inference as one CUDA graph, warmed up on a stream of its own as torch.cuda.graph asks for."""
    gc.collect()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            infer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = infer()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def check_finite(output: Tensor) -> None:
    """Raise WrongResultError for a loss or logits that are not finite: their times would mean nothing."""
    if not output.isfinite().all():
        raise WrongResultError("the loss, its gradient or the logits are not finite")


def quiet() -> None:
    """No warnings: fixed steps of a fresh model end before the adjoint's tolerance, which is not what is measured."""
    warnings.simplefilter("ignore")
