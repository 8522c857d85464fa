"""Batches: what an image looks like and its place depend on seed, epoch and index alone; failures name the file."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from digit_images import write_digit_tree
from image_archives import photographs
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader

from imixer.data import (
    EpochBatches,
    ImageData,
    ImageLoader,
    Images,
    LoaderError,
    TimmTransforms,
    TransformedImages,
    UnreadableImageError,
    load_dataset,
    load_digits,
    loader,
    make_loader,
)
from imixer.data.random_streams import restored_global_generators, seed_global_generators
from imixer.data.sources import Sample

# Every flag that draws random numbers, so that each generator is used: Python's, NumPy's and PyTorch's.
EVERYTHING = TimmTransforms(
    scale=(0.5, 1.0),
    ratio=(0.4, 2.5),
    hflip=0.4,
    vflip=0.3,
    gaussian_blur_prob=0.2,
    crop_pct=0.7,
    aa="3a",
    color_jitter=0.3,
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
    reprob=0.8,
    recount=2,
    mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.3, 0.4),
)
PAPER = TimmTransforms(aa="rand-m9-mstd0.5-inc1", reprob=0.25)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of 3 x 8 training and 3 x 4 test images."""
    root = tmp_path_factory.mktemp("tree")
    write_digit_tree(root, num_train=8, num_test=4)
    return root


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_digits()


def pass_over(loader: ImageLoader, epoch: int, start_batch: int = 0) -> dict[int, Tensor]:
    """Image by index, in the order of one pass."""
    loader.sampler.set_epoch(epoch, start_batch)
    keys, batches = list(loader.sampler), list(loader)
    assert [len(key.indices) for key in keys] == [len(images) for images, _ in batches]
    return {
        index: image
        for key, (images, _) in zip(keys, batches, strict=True)
        for index, image in zip(key.indices, images, strict=True)
    }


def dataset_of(kind: str, tree: Path) -> Images:
    if kind == "memory":
        return load_dataset("", tree, img_size=16).train
    return load_dataset("", tree, img_size=16, transforms=EVERYTHING if kind == "everything" else PAPER).train


@pytest.mark.parametrize("kind", ["memory", "everything", "paper"])
def test_images_depend_on_seed_epoch_and_index_alone(tree: Path, kind: str) -> None:
    dataset = dataset_of(kind, tree)
    whole = make_loader(dataset, batch_size=24, training=True, workers=0, seed=5)
    expected = {epoch: pass_over(whole, epoch) for epoch in (1, 2)}
    assert sorted(expected[1]) == list(range(24))

    found: dict[int, dict[int, Tensor]] = {1: {}, 2: {}}
    for rank in range(2):
        part = make_loader(dataset, batch_size=5, training=True, workers=1, seed=5, rank=rank, world_size=2)
        for epoch in (2, 1):  # the second pass is in the same worker process
            found[epoch] |= pass_over(part, epoch)
    for epoch in (1, 2):
        assert len(found[epoch]) == 20
        for index, image in found[epoch].items():
            assert torch.equal(image, expected[epoch][index])

    other_seed = pass_over(make_loader(dataset, batch_size=24, training=True, workers=0, seed=6), 1)
    for other in (expected[2], other_seed):
        assert list(other) != list(expected[1])
        assert sum(torch.equal(other[index], expected[1][index]) for index in range(24)) < 4


@pytest.mark.parametrize("kind", ["memory", "everything"])
def test_global_generators_neither_matter_nor_change(tree: Path, kind: str) -> None:
    batches = make_loader(dataset_of(kind, tree), batch_size=24, training=True, workers=0, seed=0)
    expected = pass_over(batches, 0)
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        draws = random.random(), np.random.rand(), torch.rand(3)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        found = pass_over(batches, 0)
        assert all(torch.equal(found[index], image) for index, image in expected.items())
        assert (random.random(), np.random.rand()) == draws[:2]
        assert torch.equal(torch.rand(3), draws[2])


@pytest.mark.parametrize("transforms", [EVERYTHING, PAPER], ids=["everything", "paper"])
def test_images_are_those_of_timms_transforms(tmp_path: Path, transforms: TimmTransforms) -> None:
    for number, picture in enumerate(photographs(32, size=40)):  # digits would be gray anyway
        path = tmp_path / ("train" if number < 24 else "test") / str(number % 2) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    transforms = replace(transforms, remode="const")  # noise is from a source of our own
    data = load_dataset("", tmp_path, img_size=16, transforms=transforms)
    assert isinstance(data.train, TransformedImages)
    flags: dict[str, Any] = {
        "scale": transforms.scale,
        "ratio": transforms.ratio,
        "hflip": transforms.hflip,
        "gaussian_blur_prob": transforms.gaussian_blur_prob,
        "vflip": transforms.vflip,
        "color_jitter": transforms.color_jitter,
        "color_jitter_prob": transforms.color_jitter_prob,
        "grayscale_prob": transforms.grayscale_prob,
        "auto_augment": transforms.aa,
        "re_prob": transforms.reprob,
        "re_mode": transforms.remode,
        "re_count": transforms.recount,
        "mean": transforms.mean,
        "std": transforms.std,
    }
    with restored_global_generators():
        theirs = create_transform(16, is_training=True, interpolation="random", **flags)
        erased = 0
        for index in range(len(data.train)):
            seed_global_generators("image", 0, 0, index)
            expected = theirs(data.train.source[index][0])
            torch.testing.assert_close(data.train[index][0], expected, atol=2e-6, rtol=1e-5)
            erased += bool((expected == 0).all(dim=0).any())
        assert erased
        theirs = create_transform(
            16, interpolation="bicubic", crop_pct=transforms.crop_pct, mean=transforms.mean, std=transforms.std
        )
        assert isinstance(data.test, TransformedImages)
        for index in range(len(data.test)):
            torch.testing.assert_close(data.test[index][0], theirs(data.test.source[index][0]), atol=1e-6, rtol=1e-6)


def test_strongest_posterize_makes_an_image_black() -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 150))
    seen = set()
    for seed in range(60):
        with restored_global_generators():
            seed_global_generators("posterize", seed)
            seen.add(TimmTransforms(scale=(1, 1), aa="rand-m10-n1-inc1").create(8, training=True)(image).sum().item())
    assert 0 in seen


def test_timms_refusal_shows_its_reason() -> None:
    with pytest.raises(ValueError, match="timm refuses .*remode='stripes'"):
        TimmTransforms(reprob=0.5, remode="stripes")
    with pytest.raises(ValueError, match="timm refuses .*interpolation='cubic'.*KeyError"):
        TimmTransforms(interpolation="cubic")
    without = replace(EVERYTHING, no_aug=True)
    assert without.random_erasing() is None


@pytest.mark.parametrize("training", [True, False], ids=["training", "test"])
@pytest.mark.parametrize(
    ("num_images", "batch_size", "world_size"), [(100, 8, 3), (96, 8, 3), (7, 8, 3), (25, 8, 3), (5, 8, 1)]
)
def test_processes_share_the_batches_of_one(num_images: int, batch_size: int, world_size: int, training: bool) -> None:
    one = EpochBatches(num_images, batch_size=batch_size * world_size, training=training, seed=3)
    parts = [
        EpochBatches(num_images, batch_size=batch_size, training=training, seed=3, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for sampler in (one, *parts):
        sampler.set_epoch(4)
    steps = [list(sampler) for sampler in parts]
    assert {len(part) for part in steps} == {len(one)} == {len(part) for part in parts}
    for whole, *pieces in zip(one, *steps, strict=True):
        assert whole.indices == [index for piece in pieces for index in piece.indices]
        sizes = [len(piece.indices) for piece in pieces]
        assert 1 <= min(sizes) >= max(sizes) - 1
        assert max(sizes) <= batch_size

    used = [index for key in one for index in key.indices]
    full = num_images // (batch_size * world_size) * batch_size * world_size
    assert len(set(used)) == len(used) == (full or num_images if training else num_images)
    assert (used == sorted(used)) == (not training)


def test_impossible_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images in batches of 4 leave a batch of one of 3 processes empty"):
        EpochBatches(2, batch_size=4, training=False, seed=0, world_size=3)
    with pytest.raises(ValueError, match="images and a batch size, not 0 and 4"):
        EpochBatches(0, batch_size=4, training=True, seed=0)
    with pytest.raises(ValueError, match="rank must be .* 2 of 2"):
        EpochBatches(9, batch_size=4, training=True, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="start_batch must be from 0 to 2, not 3"):
        EpochBatches(9, batch_size=4, training=True, seed=0).set_epoch(0, 3)


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 4, 1), (64, 8, 7)])
def test_workers_are_the_cores_of_the_process(
    monkeypatch: pytest.MonkeyPatch, tree: Path, cores: int, processes: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loader.default_workers() == workers
    for dataset, given, expected in (("paper", None, workers), ("paper", 0, 0), ("paper", 1, 1), ("memory", None, 0)):
        made = make_loader(dataset_of(dataset, tree), batch_size=4, training=True, workers=given, seed=0)
        assert made._batches.num_workers == expected


class WatchedFiles:
    """Image files; `before` is called with the path of each that is read."""

    def __init__(self, dataset: Images, before: Callable[[str], None]) -> None:
        assert isinstance(dataset, TransformedImages)
        self.files = dataset.source
        self.classes = self.files.classes
        self.before = before

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        self.before(self.describe(index))
        return self.files[index]

    def describe(self, index: int) -> str:
        return self.files.describe(index)

    def fingerprint(self) -> str:
        return self.files.fingerprint()


def watched(tree: Path, before: Callable[[str], None]) -> Images:
    dataset = load_dataset("", tree, img_size=16, transforms=PAPER).train
    return TransformedImages(WatchedFiles(dataset, before), PAPER, img_size=16, training=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_pass_from_the_middle_reads_only_what_is_left(tree: Path, tmp_path: Path, workers: int) -> None:
    log = tmp_path / "log"

    def before(path: str) -> None:
        with log.open("a") as file:
            file.write(f"{path}\n")

    batches = make_loader(watched(tree, before), batch_size=5, training=True, workers=workers, seed=0)
    whole = pass_over(batches, 3)
    log.unlink()
    rest = pass_over(batches, 3, start_batch=3)
    assert len(batches) == 4
    assert list(rest) == list(whole)[15:]
    assert all(torch.equal(image, whole[index]) for index, image in rest.items())
    assert log.read_text().split() == [batches.dataset.describe(index) for index in rest]


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    write_digit_tree(tmp_path, num_train=8, num_test=4)
    data = load_dataset("", tmp_path, img_size=16, transforms=PAPER)
    path = tmp_path / "train" / "1" / "003.png"
    path.write_bytes(path.read_bytes()[:60])
    (tmp_path / "test" / "2" / "001.png").unlink()
    loaders = [
        make_loader(dataset, batch_size=4, training=training, workers=workers, seed=0)
        for dataset, training in ((data.train, True), (data.test, False))
    ]
    with pytest.raises(UnreadableImageError, match=r"^cannot read image .*train/1/003\.png \(60 bytes\): .*[^\n]$"):
        list(loaders[0])
    with pytest.raises(UnreadableImageError, match=r"^cannot read image .*test/2/001\.png: .*No such file.*[^\n]$"):
        list(loaders[1])


def test_dying_worker_is_reported_with_its_image(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.2)

    def die(path: str) -> None:
        if path.endswith("2/005.png"):
            os.kill(os.getpid(), signal.SIGKILL)

    batches = make_loader(watched(tree, die), batch_size=4, training=True, workers=2, seed=0)
    with pytest.raises(
        LoaderError, match=r"^a loader worker \(process \d+\) died while it read .*train/2/005\.png; .*[^\n]$"
    ):
        list(batches)


def test_death_of_a_worker_interrupts_nothing_but_the_wait_for_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.2)
    batches = make_loader(watched(tree, lambda path: time.sleep(0.05)), batch_size=4, training=True, workers=1, seed=0)
    iterator = iter(batches)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    time.sleep(0.1)  # a handler of SIGCHLD would have raised here
    with pytest.raises(LoaderError, match="died while it read"):
        list(iterator)


def test_worker_that_dies_while_it_sends_a_batch_is_reported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_pass = loader._iterate

    def interrupted(batches: DataLoader[Any]) -> Iterator[Any]:
        received = start_pass(batches)
        yield next(received)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(loader, "_iterate", interrupted)
    batches = make_loader(watched(tree, lambda path: None), batch_size=4, training=True, workers=1, seed=0)
    with pytest.raises(LoaderError, match="died while it read"):
        list(batches)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_a_worker_is_left_to_the_main_process(tree: Path, number: signal.Signals) -> None:
    batches = make_loader(watched(tree, lambda path: time.sleep(0.02)), batch_size=4, training=True, workers=1, seed=0)
    iterator = iter(batches)
    next(iterator)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, number)
    assert len(list(iterator)) == 5


def test_worker_outlives_a_sigterm_by_its_grace_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "GRACE_SECONDS", 1)
    batches = make_loader(watched(tree, lambda path: None), batch_size=4, training=True, workers=1, seed=0)
    list(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(0.5)
    assert worker.is_alive()
    worker.join(30)
    assert worker.exitcode == -signal.SIGALRM


def test_hanging_read_ends_in_an_error(tree: Path) -> None:
    batches = make_loader(
        watched(tree, lambda path: time.sleep(0.4)), batch_size=4, training=True, workers=1, seed=0, timeout=0.5
    )
    with pytest.raises(LoaderError, match=r"no batch for 0\.5 s, while workers read .*train/\d/00\d\.png; look"):
        list(batches)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["memory", "paper"])
def test_batches_on_cuda_are_those_on_the_cpu(tree: Path, kind: str) -> None:
    dataset = dataset_of(kind, tree)
    on_cpu, on_cuda = (
        make_loader(dataset, batch_size=5, training=True, workers=1, seed=0, device=device)
        for device in ("cpu", "cuda")
    )
    expected, found = pass_over(on_cpu, 1), pass_over(on_cuda, 1)
    assert list(expected) == list(found)
    for index, image in expected.items():
        assert found[index].is_cuda
        torch.testing.assert_close(found[index].cpu(), image)
