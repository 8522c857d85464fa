"""A training or inference step in every precision: eager, compiled, or as one CUDA graph."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.on_gpu.cells import UnavailableError, WrongResultError
from benchmarks.on_gpu.setup import NUM_CLASSES, Setup
from benchmarks.on_gpu.timing import Flops
from benchmarks.published_imixer import load_published
from imixer import IMixer

AUTOCAST = {"fp32": None, "TF32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Ways to run a step. "compiled" is block by block, "reduce-overhead" the model as a whole; "one graph" is the whole
# step, optimizer and all, captured and replayed.
EAGER, COMPILED, REDUCED, GRAPH, COMPILED_GRAPH = WAYS = (
    "eager",
    "compiled",
    "reduce-overhead",
    "one graph",
    "compiled, one graph",
)
FLOP_IMAGES = 8


def set_precision(name: str) -> None:
    """TF32 everywhere but in fp32."""
    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "fp32"


def build(model: str, setup: Setup, size: str, **options: Any) -> nn.Module:
    """Mixer, iMixer or the published iMixer on the device, with the paper's stochastic depth."""
    if model == "published":
        if setup.published is None:
            raise UnavailableError("needs --published PATH")
        make: Callable[..., nn.Module] = load_published(setup.published)
    else:
        make = {"Mixer": MlpMixer, "iMixer": IMixer}[model]
    with setup.device:
        return make(drop_path_rate=0.1, **setup.mixer_args(size), **options)


class Step:
    """One step on a batch that stays on the device; calling it trains or infers once and returns the loss or logits."""

    def __init__(self, model: nn.Module, setup: Setup, *, batch: int, precision: str, training: bool, way: str) -> None:
        if not setup.cuda and way not in (EAGER, COMPILED):
            raise UnavailableError("needs CUDA")
        set_precision(precision)
        self.model = model.train(training)
        self.setup = setup
        self.training = training
        self.images = torch.randn(batch, 3, setup.img_size, setup.img_size, device=setup.device)
        self.targets = torch.randint(NUM_CLASSES, (batch,), device=setup.device)
        dtype = AUTOCAST[precision]
        self.autocast: dict[str, Any] = {"device_type": setup.device.type, "dtype": dtype, "enabled": dtype is not None}
        if training:
            # Fused, it takes the scaler's finding of overflows on the device, and does not wait for it.
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True, capturable="graph" in way)
            self.scaler = torch.amp.GradScaler(setup.device.type, enabled=dtype == torch.float16)

    def __call__(self) -> Tensor:
        if not self.training:
            return self.logits(self.images)
        loss = self.loss(self.images, self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()

    def logits(self, images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(**self.autocast):
            logits: Tensor = self.model(images)
            return logits

    def loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(**self.autocast):
            return F.cross_entropy(self.model(images), targets, label_smoothing=0.1)

    def flops(self) -> float:
        """Operations of a step: of one forward (and backward) pass of a few images, eagerly, for the whole batch."""
        images, targets = self.images[:FLOP_IMAGES], self.targets[:FLOP_IMAGES]
        counter = Flops()
        with counter:
            if self.training:
                self.loss(images, targets).backward()
            else:
                self.logits(images)
        self.model.zero_grad()
        return counter.total * (len(self.images) / len(images))

    def prepared(self, way: str) -> Callable[[], Tensor]:
        """The step run in one of ``WAYS``; compiles or captures at once or in its first calls."""
        if way == REDUCED:
            self.model.compile(mode="reduce-overhead")
            return self._after_mark
        if way in (COMPILED, COMPILED_GRAPH):
            # Block by block, which are alike: the first one's kernels are found in the cache for the others. Each is
            # traced for itself, as every parametrized layer has a class of its own.
            torch._dynamo.config.recompile_limit = 64
            for block in self.model.get_submodule("blocks").children():
                block.compile(backend="aot_eager" if self.setup.toy else "inductor")
        return self._captured() if way in (GRAPH, COMPILED_GRAPH) else self

    def _after_mark(self) -> Tensor:
        # The last step's outputs may be overwritten from here on.
        torch.compiler.cudagraph_mark_step_begin()
        return self()

    def _captured(self) -> Callable[[], Tensor]:
        """The step as one CUDA graph, warmed up on a stream of its own as torch.cuda.graph asks for."""
        gc.collect()  # what is left of earlier graphs accumulates gradients on its stream, which capture forbids
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def check_finite(output: Tensor) -> None:
    """Raise WrongResultError for a loss or logits that are not finite: their times would mean nothing."""
    if not output.isfinite().all():
        raise WrongResultError("the loss or the logits are not finite")


def quiet() -> None:
    """No warnings: fixed steps of a fresh model end before the adjoint's tolerance, which is not what is measured."""
    warnings.simplefilter("ignore")
