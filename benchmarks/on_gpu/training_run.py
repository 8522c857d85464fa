"""Updates of `imixer.training.train` on images that lie in memory, beside the bare step that it takes."""

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.cells import Cell, UnavailableError
from benchmarks.on_gpu.setup import NUM_CLASSES, Setup
from benchmarks.on_gpu.steps import EAGER, GRAPH, Step, build
from benchmarks.on_gpu.timing import median_seconds
from imixer.data import BatchKey, ImageData, InMemoryImages, RawBatch
from imixer.training import TrainingConfig, train

TABLE = "Updates of train() beside the bare step: iMixer-S in bf16, 2 unrolled steps"
UPDATES = 50


class RepeatedImages(InMemoryImages):
    """A few images in memory that come again and again, as a data set of another length.

    Args:
        images: uint8, (N, C, H, W).
        targets: int64, (N,).
        length: Images that the data set pretends to have.
    """

    def __init__(self, images: Tensor, targets: Tensor, *, length: int) -> None:
        super().__init__(images, targets, mean=(0.5,) * 3, std=(0.5,) * 3)
        self.length = length

    def __len__(self) -> int:
        return self.length

    def read(self, key: BatchKey, on_image: Callable[[int], None] = lambda index: None) -> RawBatch:
        return super().read(key._replace(indices=[index % len(self.targets) for index in key.indices]))


def compare(way: str, setup: Setup) -> Mapping[str, float]:
    """Images per second of 50 updates, after as many to warm up, and of the step alone."""
    if way == GRAPH and not setup.cuda:
        raise UnavailableError("needs CUDA")
    batch, updates = setup.batch("S"), 2 if setup.toy else UPDATES
    shape = (batch, 3, setup.img_size, setup.img_size)
    images, targets = torch.randint(256, shape, dtype=torch.uint8), torch.randint(NUM_CLASSES, (batch,))
    data = ImageData(
        name="random",
        train=RepeatedImages(images, targets, length=batch * updates),
        test=RepeatedImages(images, targets, length=batch),
        classes=tuple(map(str, range(NUM_CLASSES))),
        img_size=setup.img_size,
        in_chans=3,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        description="random images in memory",
    )
    mixer = setup.mixer_args("S")
    architecture = {name: mixer[name] for name in ("img_size", "patch_size", "num_blocks", "embed_dim")}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            data_dir=folder,
            model="imixer_s16_224",
            **architecture,
            n_iter=2,
            n_power=1 if setup.toy else 8,
            drop_path=0.1,
            batch_size=batch,
            epochs=2,
            warmup_epochs=0,
            lr=5e-4,
            device=setup.device.type,
            amp=True,
            amp_dtype="bfloat16",
            tf32=True,
            channels_last=True,
            cuda_graph=way == GRAPH,
            log_with=("none",),
            report_interval=100,
            output=str(Path(folder) / "run"),
        )
        result = train(config, data, progress=False)
    options: dict[str, Any] = {"n_iter": 2, "n_power": config.n_power}
    model = build("iMixer", setup, "S", **options)
    step = Step(model, setup, batch=batch, precision="bf16", training=True, way=way)
    alone = batch / median_seconds(step, setup)
    trained = result.metrics[-1].images_per_second
    return {"images/s of train()": trained, "images/s of the step": alone, "share %": 100 * trained / alone}


def cells(setup: Setup) -> list[Cell]:
    return [
        Cell(
            section="run",
            table=TABLE,
            labels={"batch": setup.batch("S"), "updates": 2 if setup.toy else UPDATES, "way": way},
            run=functools.partial(compare, way, setup),
            rank=2,
            seconds=45.0,
        )
        for way in (EAGER, GRAPH)
    ]
