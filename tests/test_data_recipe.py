"""The recipe beside timm's script: mixing, normalization and erasing, exactly and in distribution."""

from __future__ import annotations

import random
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
from scipy.stats import ks_2samp
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import Dataset

from imixer.data import ImageBatch, Images, InMemoryImages, TimmTransforms, TransformedImages, make_loader
from imixer.data.erasing import BoxErasing, Erased
from imixer.data.images import BatchKey
from imixer.data.random_streams import restored_global_generators, seed_global_generators
from imixer.data.sources import ImageArrays
from imixer.random_affine import RandomAffine
from imixer.training import TrainingConfig, load_data
from imixer.training.objective import make_mixup

PAPER = TimmTransforms(aa="rand-m9-mstd0.5-inc1", reprob=0.25)
CLASSES = 64  # as many as pictures, so that targets show what was mixed with what
SIZE, BATCH, PASSES = 32, 8, 48
MIXING: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "num_classes": CLASSES}
ON, OFF = 0.9 + 0.1 / CLASSES, 0.1 / CLASSES  # smoothed targets


class Pictures(Dataset[Any]):
    """Pictures of one class each, for timm's loader, which sets `transform`, and for ours."""

    def __init__(self, pictures: np.ndarray) -> None:
        self.data = pictures
        self.transform: Callable[[Image.Image], Any] = lambda picture: picture

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.transform(Image.fromarray(self.data[index])), index


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return photographs(CLASSES, size=40)


def ours(pictures: np.ndarray, transforms: TimmTransforms = PAPER, augment_on: str = "workers") -> TransformedImages:
    source = ImageArrays(Pictures(pictures), [str(index) for index in range(CLASSES)], Path("nowhere"))
    return TransformedImages(source, transforms, img_size=SIZE, training=True, augment_on=augment_on)


def normalized(images: Tensor, targets: Tensor) -> Tensor:
    """What timm's prefetcher makes of a batch of uint8 images."""
    loader: Any = [(images, targets)]
    ((found, _),) = PrefetchLoader(loader, mean=PAPER.mean, std=PAPER.std, device=torch.device("cpu"))
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=["both", "mixup", "cutmix"])
def test_mixing_is_timms_in_every_bit(pictures: np.ndarray, mode: str, alphas: tuple[float, float]) -> None:
    options = MIXING | {"mode": mode, "mixup_alpha": alphas[0], "cutmix_alpha": alphas[1], "prob": 0.9}
    dataset = ours(pictures, TimmTransforms())
    mixed = 0
    for first in range(20):
        batch = dataset.read(BatchKey([first, 7, 50, 21, 33, 40], epoch=3, seed=9))
        with restored_global_generators():
            seed_global_generators("mixup", 9, 3, first)
            samples = list(zip(batch.images.clone().numpy(), batch.targets.tolist(), strict=True))
            expected, expected_targets = FastCollateMixup(**options)(samples)
        images, targets = dataset.finish(batch, Mixup(**options))
        torch.testing.assert_close(targets, expected_targets.float(), atol=1e-6, rtol=0)
        difference = images - normalized(expected, expected_targets)
        assert difference.abs().max() <= 1.01 / 127.5  # a half may be rounded the other way
        assert (difference != 0).float().mean() < 0.002
        mixed += not torch.equal(expected, batch.images)
    assert mixed >= 14


class Observed:
    """What can be seen of a recipe in its batches, one row for each batch."""

    def __init__(self, batches: Iterator[ImageBatch]) -> None:
        rows = []
        for images, targets in batches:
            outside = images[images.abs() > 1.001]  # pictures end at 1, erasing noise does not
            top = (targets.amax(dim=1) - OFF) / (ON - OFF)
            largest = images.abs().amax(dim=(1, 2, 3))
            row: dict[str, Any] = {
                "mean": images.mean(),
                "deviation": images.std(),
                "erased pixels": len(outside) / images.numel(),
                "erased images": (largest > 1.001).float().mean(),
                "size of the noise": outside.abs().mean() if len(outside) else torch.nan,
                "mixed": (top < 0.9999).float().mean(),
                "cutmix": ((top * SIZE**2 - (top * SIZE**2).round()).abs() < 1e-3).float().mean(),
                "share": top[0],
                "roughness": images.diff(dim=3).abs().mean(),
                "left and right": (images[..., : SIZE // 2].mean() - images[..., SIZE // 2 :].mean()).abs(),
            }
            rows.append(row)
        self.columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}

    def compare(self, other: Observed) -> dict[str, float]:
        """The differences of the means, in standard deviations of those."""
        found = {}
        for name, here in self.columns.items():
            here, there = here[~np.isnan(here)], other.columns[name][~np.isnan(other.columns[name])]
            error = np.sqrt(here.var() / len(here) + there.var() / len(there))
            found[name] = (here.mean() - there.mean()) / max(error, 1e-12)
        return found


def posterize_of_old(image: Image.Image, bits: int) -> Image.Image:
    """Pillow's before it refused 0 bits, which timm asks for at the strongest level."""
    return image.point([value & (256 - 2 ** (8 - bits)) for value in range(256)] * 3)


@pytest.fixture(scope="module")
def timms(pictures: np.ndarray) -> Observed:
    """timm's own script's loader, with its prefetcher, and the flags of the paper."""
    with restored_global_generators(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.ImageOps.posterize", posterize_of_old)
        seed_global_generators("timm")
        loader = create_loader(
            Pictures(pictures),  # type: ignore[arg-type]
            input_size=(3, SIZE, SIZE),
            batch_size=BATCH,
            is_training=True,
            re_prob=0.25,
            re_mode="pixel",
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="random",
            mean=PAPER.mean,
            std=PAPER.std,
            num_workers=0,
            collate_fn=FastCollateMixup(**MIXING),
            device=torch.device("cpu"),
            use_prefetcher=True,
        )
        return Observed(batch for _ in range(PASSES) for batch in loader)


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_distributions_are_those_of_timms_script(pictures: np.ndarray, timms: Observed, augment_on: str) -> None:
    loader = make_loader(
        ours(pictures, augment_on=augment_on), batch_size=BATCH, training=True, workers=0, seed=0, mixup=Mixup(**MIXING)
    )

    def batches() -> Iterator[ImageBatch]:
        for epoch in range(PASSES):
            loader.sampler.set_epoch(epoch)
            yield from loader

    found = Observed(batches())
    assert len(found.columns["mean"]) == len(timms.columns["mean"]) == PASSES * CLASSES // BATCH
    differences = found.compare(timms)
    assert {name: value for name, value in differences.items() if abs(value) > 3.5} == {}
    for name in ("share", "mean", "deviation", "erased pixels"):
        assert ks_2samp(found.columns[name], timms.columns[name]).pvalue > 0.005, name
    # And what the flags say.
    columns = {name: np.nanmean(values) for name, values in found.columns.items()}
    assert columns["mixed"] > 0.97
    assert columns["cutmix"] == pytest.approx(0.5, abs=0.08)
    assert columns["erased images"] == pytest.approx(0.25, abs=0.03)
    # Of normal noise, 31.7% is outside of [-1, 1], and has a mean size of 1.525 there.
    assert columns["size of the noise"] == pytest.approx(1.525, abs=0.01)
    assert columns["erased pixels"] == pytest.approx(0.25 * 0.317 * (0.02 + 1 / 3) / 2, rel=0.12)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_what_fills_erased_boxes(mode: str) -> None:
    erasing = BoxErasing(1.0, mode=mode, max_count=3)
    with restored_global_generators():
        seed_global_generators("boxes")
        drawn = [erasing.draw(24, 32) for _ in range(200)]
    assert all(boxes is not None for boxes in drawn)
    boxes, starts = (torch.tensor(part) for part in zip(*[entry for entry in drawn if entry], strict=True))
    used = (boxes[..., 1] > boxes[..., 0]).sum(dim=1)  # (200,)
    assert used.unique().tolist() == [1, 2, 3]
    assert len(starts.unique()) > 195

    outside = torch.full((200, 3, 24, 32), 7.0)
    images = erasing(outside.clone(), Erased(torch.arange(200), boxes, starts))
    for image, places in zip(images, boxes.tolist(), strict=True):
        mask = torch.zeros(24, 32, dtype=torch.bool)
        for top, bottom, left, right in places:
            mask[top:bottom, left:right] = True
        assert (image[:, ~mask] == 7).all()
        assert (image[:, mask] != 7).all()
        colors = len(image[:, mask].unique(dim=1).T)
        assert (colors > mask.sum() / 2) if mode == "pixel" else (1 <= colors <= (3 if mode == "rand" else 1))
    noise = images[images != 7]
    if mode == "const":
        assert (noise == 0).all()
    else:
        assert abs(noise.mean()) < (0.02 if mode == "pixel" else 0.15)
        assert abs(noise.std() - 1) < (0.02 if mode == "pixel" else 0.15)
    if mode == "pixel":
        top, bottom, left, right = boxes[0, 0].tolist()
        red, green, _ = images[0, :, top:bottom, left:right].flatten(1)
        assert abs(torch.corrcoef(torch.stack([red, green]))[0, 1]) < 0.5


def test_rows_that_are_not_erased_stay() -> None:
    erasing = BoxErasing(1.0, mode="pixel", max_count=1)
    erased = Erased(torch.tensor([2]), torch.tensor([[[0, 4, 0, 4]]]), torch.tensor([5]))
    images = erasing(torch.zeros(4, 3, 4, 4), erased)
    assert [bool(image.any()) for image in images] == [False, False, True, False]


def in_memory(pictures: np.ndarray) -> InMemoryImages:
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    augment = RandomAffine(shift=1 / 8, hflip=0.5)
    return InMemoryImages(images, torch.arange(CLASSES), mean=(0.5,) * 3, std=(0.25,) * 3, augment=augment)


@pytest.mark.parametrize("kind", ["workers", "device", "memory"])
def test_mixed_batches_depend_on_nothing_but_their_place(pictures: np.ndarray, kind: str) -> None:
    def made(workers: int) -> Any:
        dataset: Images = in_memory(pictures) if kind == "memory" else ours(pictures, augment_on=kind)
        return make_loader(
            dataset, batch_size=BATCH, training=True, workers=workers, seed=4, mixup=Mixup(**MIXING), mixup_off_epoch=2
        )

    def passed(loader: Any, epoch: int, start: int = 0) -> list[ImageBatch]:
        loader.sampler.set_epoch(epoch, start)
        return list(loader)

    def random_state() -> str:
        return repr((random.getstate(), torch.get_rng_state().tolist(), np.random.get_state(legacy=False)))

    before = random_state()
    expected = {epoch: passed(made(0), epoch) for epoch in range(3)}
    assert random_state() == before
    other = made(2)
    for epoch, start in ((2, 0), (1, 3), (0, 0), (1, 0)):
        found = passed(other, epoch, start)
        assert len(found) == CLASSES // BATCH - start
        for (images, targets), (expected_images, expected_targets) in zip(found, expected[epoch][start:], strict=True):
            assert torch.equal(images, expected_images)
            assert torch.equal(targets, expected_targets)
    tops = {epoch: torch.cat([targets.amax(dim=1) for _, targets in batches]) for epoch, batches in expected.items()}
    assert (tops[0] < ON - 1e-4).float().mean() > 0.9
    assert not torch.equal(tops[0], tops[1])
    torch.testing.assert_close(tops[2], torch.full((CLASSES,), ON))  # from mixup_off_epoch on, only smoothed
    assert len({round(top, 5) for top in tops[0].tolist()}) >= CLASSES // BATCH - 1  # each batch has its own share


def test_images_in_memory_are_moved_before_they_are_mixed(pictures: np.ndarray) -> None:
    dataset = in_memory(pictures)
    key = BatchKey(list(range(8)), epoch=1, seed=2)
    moved, _ = dataset.finish(dataset.read(key))
    mixed, targets = dataset.finish(dataset.read(key), Mixup(**MIXING | {"cutmix_alpha": 0.0, "label_smoothing": 0.0}))
    share = targets[0, 0]
    assert 0 < share < 1
    expected = moved * share + moved.flip(0) * (1 - share)
    torch.testing.assert_close(mixed, expected, atol=0.51 / 255 / 0.25 + 1e-5, rtol=0)


def test_odd_batches_are_refused_where_pairs_are_mixed(pictures: np.ndarray) -> None:
    with pytest.raises(
        ValueError, match="64 images in batches of 7, shared by 1 processes, leave a batch of 7; choose"
    ):
        make_loader(ours(pictures), batch_size=7, training=True, seed=0, mixup=Mixup(**MIXING))
    with pytest.raises(ValueError, match="64 images in batches of 50, shared by 3 processes, leave a batch of 21;"):
        make_loader(ours(pictures), batch_size=50, training=True, seed=0, world_size=3, mixup=Mixup(**MIXING))
    make_loader(ours(pictures), batch_size=8, training=True, seed=0, world_size=4, mixup=Mixup(**MIXING))


def test_every_setting_of_mixing_reaches_timm() -> None:
    config = TrainingConfig(
        mixup=0.3,
        cutmix=0.4,
        cutmix_minmax=(0.2, 0.8),
        mixup_prob=0.5,
        mixup_switch_prob=0.6,
        mixup_mode="pair",
        smoothing=0.07,
    )
    mixup = make_mixup(config, 11)
    expected = Mixup(0.3, 0.4, (0.2, 0.8), 0.5, 0.6, "pair", label_smoothing=0.07, num_classes=11)
    assert mixup is not None
    assert vars(mixup) == vars(expected)
    assert make_mixup(TrainingConfig(), 11) is None


def test_every_setting_of_augmentation_reaches_timm(tmp_path: Path) -> None:
    for number, picture in enumerate(photographs(8, size=40)):
        path = tmp_path / ("train", "test")[number // 4] / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    settings: dict[str, Any] = {
        "scale": (0.3, 0.9),
        "ratio": (0.8, 1.2),
        "hflip": 0.3,
        "vflip": 0.2,
        "color_jitter": 0.3,
        "color_jitter_prob": 0.7,
        "grayscale_prob": 0.1,
        "aa": "v0",
        "reprob": 0.4,
        "remode": "rand",
        "recount": 3,
        "train_interpolation": "bilinear",
        "interpolation": "bilinear",
        "crop_pct": 0.7,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    config = TrainingConfig(data_dir=str(tmp_path), img_size=SIZE, augment_on="device", **settings)
    data = load_data(config)
    expected = TimmTransforms(**settings)
    assert isinstance(data.train, TransformedImages)
    assert isinstance(data.test, TransformedImages)
    assert data.train.on_device is not None
    assert data.train.erasing is not None
    assert (data.train.mean, data.train.std) == (expected.mean, expected.std)
    for split, place in ((data.train, "device"), (data.test, "workers")):
        made = TransformedImages(split.source, expected, img_size=SIZE, training=split is data.train, augment_on=place)
        for index in range(len(split)):
            assert torch.equal(split[index][0], made[index][0])
    others: dict[str, Any] = {"no_aug": True, "gaussian_blur_prob": 0.5, "train_crop_mode": "rkrc"}
    for name, value in others.items():
        data = load_data(TrainingConfig(data_dir=str(tmp_path), img_size=SIZE, **{name: value}))
        assert isinstance(data.train, TransformedImages)
        transforms = TimmTransforms(mean=data.mean, std=data.std, **{name: value})
        made = TransformedImages(data.train.source, transforms, img_size=SIZE, training=True)
        assert torch.equal(
            torch.stack([data.train[k][0] for k in range(4)]), torch.stack([made[k][0] for k in range(4)])
        )


def test_images_that_are_too_small_to_be_blurred_are_refused(tmp_path: Path) -> None:
    write_digit_tree(tmp_path)
    config = TrainingConfig(data_dir=str(tmp_path), img_size=12, gaussian_blur_prob=1.0)
    assert load_data(config).train[0][0].shape == (3, 12, 12)
    assert load_data(replace(config, img_size=11, no_aug=True)).train[0][0].shape == (3, 11, 11)
    for size in (8, 11):
        with pytest.raises(
            ValueError, match=f"^gaussian_blur_prob needs images of at least 12 .*, not of {size}; leave"
        ):
            load_data(replace(config, img_size=size))
