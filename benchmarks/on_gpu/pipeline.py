"""The input pipeline alone: how many augmented images a second reach the device, with no model to feed.

The loader of training runs with the recipe of the paper (random resized crop, flip, RandAugment, random erasing) over
real photographs, as files of the size of CIFAR-10's images and of ImageNet's. The workers augment the images, or the
device does (``--augment-on device``).
"""

import functools
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.on_gpu.cells import Cell
from benchmarks.on_gpu.setup import Setup
from imixer.data import ImageLoader, TimmTransforms, TransformedImages, make_loader
from imixer.data.sources import ImageFiles

TABLE = "Input pipeline alone"
FILES = {"JPEG 500 x 375": ("jpg", (500, 375)), "PNG 32 x 32": ("png", (32, 32))}
ERASING = 0.25


def images_per_second(batches: Iterable[Tensor], setup: Setup, *, skip: int) -> float:
    """The rate over some seconds, after so many batches that were under way before anything was waited for."""
    duration, counted, start = (0.05 if setup.toy else 6.0), 0, 0.0
    for index, images in enumerate(batches):
        if index < skip:
            continue
        if setup.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if index == skip:
            start = now
        else:
            counted += len(images)
            if now - start > duration:
                break
    return counted / (now - start)


def from_files(kind: str, workers: int, augment_on: str, setup: Setup) -> Mapping[str, float]:
    """The rate of the loader over files of this kind."""
    batch = 4 if setup.toy else 64
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder), *FILES[kind], count=8 if setup.toy else 64)
        source = ImageFiles(2 * files if setup.toy else 1000 * files, classes=("china", "flower"))
        transforms = TimmTransforms(aa="rand-m9-mstd0.5-inc1", reprob=ERASING)
        images = TransformedImages(source, transforms, img_size=224, training=True, augment_on=augment_on)
        loader = make_loader(images, batch_size=batch, training=True, workers=workers, seed=0, device=setup.device)
        rate = images_per_second(_forever(loader), setup, skip=1 if setup.toy else 3 * workers)
        del loader  # its workers end before their files do
    return {"images/s": rate, "images/s a worker": rate / max(workers, 1)}


def write_photographs(folder: Path, suffix: str, size: tuple[int, int], *, count: int) -> list[tuple[str, int]]:
    """Crops of the two photographs that come with scikit-learn, in two classes: their paths and classes."""
    from sklearn.datasets import load_sample_images

    written = []
    for label, pixels in enumerate(load_sample_images().images):
        photograph = Image.fromarray(pixels)  # 640 x 427
        target = folder / str(label)
        target.mkdir()
        for index in range(count // 2):
            corner = (index * 7 % 140, index * 5 % 52)
            crop = photograph.crop((*corner, corner[0] + 500, corner[1] + 375))
            path = str(target / f"{index}.{suffix}")
            crop.resize(size).save(path, quality=90)
            written.append((path, label))
    return written


def _forever(loader: ImageLoader) -> Iterator[Tensor]:
    while True:
        for images, _ in loader:
            yield images


def cells(setup: Setup) -> list[Cell]:
    found = []
    few = min(setup.workers, 1)
    for kind in FILES:
        ways = [("workers", setup.workers), ("workers", few), ("device", setup.workers)]
        for augment_on, workers in dict.fromkeys(ways):
            labels = {"images": kind, "augmented on": augment_on, "workers": workers}
            run = functools.partial(from_files, kind, workers, augment_on, setup)
            rank = 5 if workers == setup.workers else 7
            found.append(Cell(section="pipeline", table=TABLE, labels=labels, run=run, rank=rank, seconds=15))
    return found
