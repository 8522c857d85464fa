"""Augmentation on the device does to a batch what timm's transforms do to its images, from the same random numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_archives import photographs
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torch import Tensor

from imixer.data import ImageData, TimmTransforms, TransformedImages, load_dataset, make_loader
from imixer.data.device_transforms import GEOMETRY, STEPS, DeviceTransforms, resized_crop
from imixer.data.images import BatchKey
from imixer.data.random_streams import restored_global_generators, seed_global_generators
from imixer.data.sources import ImageArrays, ImageFiles
from imixer.training import TrainingConfig

PAPER = TimmTransforms(aa="rand-m9-mstd0.5-inc1", reprob=0.25)


class Pictures:
    """What a torchvision data set holds in memory."""

    def __init__(self, pictures: np.ndarray) -> None:
        self.data = pictures

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index]), index % 2


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return photographs(96, size=40)


def both(pictures: np.ndarray, transforms: TimmTransforms, img_size: int = 32) -> tuple[Tensor, Tensor]:
    """The same images as the workers and as the device augment them: pixels from 0 to 255."""
    source = ImageArrays(Pictures(pictures), ["a", "b"], Path("nowhere"))
    transforms = replace(transforms, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    found = []
    for place in ("workers", "device"):
        images = TransformedImages(source, transforms, img_size=img_size, training=True, augment_on=place)
        found.append(images.finish(images.read(BatchKey(list(range(len(pictures))), epoch=1, seed=2)))[0])
    return found[0], found[1]


@pytest.mark.parametrize("img_size", [32, 56, 13])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_crops_and_flips_are_pillows_up_to_rounding(pictures: np.ndarray, interpolation: str, img_size: int) -> None:
    transforms = TimmTransforms(train_interpolation=interpolation, vflip=0.3, color_jitter=0.0)
    expected, found = both(pictures, transforms, img_size)
    difference = (expected - found).abs().round()
    assert difference.max() <= 3  # a pixel is rounded once across, and once down
    assert (difference > 0).float().mean() < 0.03


def test_a_crop_of_everything_at_its_own_size_is_the_image(pictures: np.ndarray) -> None:
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    crops = torch.tensor([[0.0, 0.0, 40.0, 40.0, 0.0]]).expand(len(images), 5)
    assert torch.equal(resized_crop(images, crops, 40), images)


@pytest.mark.parametrize("name", sorted({*GEOMETRY, *STEPS} - {"affine", "affine, cubic"}))
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_each_operation_is_timms(pictures: np.ndarray, name: str, interpolation: str) -> None:
    policy = TimmTransforms(
        aa="rand-m7-n1-inc1", train_interpolation=interpolation, scale=(1, 1), ratio=(1, 1), hflip=0
    )
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    hparams = {
        "translate_const": 14,
        "img_mean": (128, 100, 60),
        "interpolation": 2 if interpolation == "bilinear" else 3,
    }
    differences = []
    for magnitude in (3, 5, 9):
        operation = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
        recording = policy.create(40, training=True)
        recording.transforms[1].ops = [AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)]
        device = DeviceTransforms(recording, img_size=40, crops=False)
        with restored_global_generators():
            drawn, expected = [], []
            for index, picture in enumerate(pictures):
                seed_global_generators("operation", index)
                expected.append(torch.from_numpy(np.array(operation(Image.fromarray(picture)))))
                seed_global_generators("operation", index)
                np.random.choice(1, 1)
                drawn.append(device.draw(images[index]))
        # Both drew the sign of the magnitude after the same seed.
        found = device(images, device.collate(drawn))
        differences.append((found.float() - torch.stack(expected).permute(0, 3, 1, 2)).abs().mean().item())
    assert max(differences) < (2.0 if interpolation == "bicubic" and name in GEOMETRY else 0.8)


@pytest.mark.parametrize(
    "transforms",
    [
        PAPER,
        TimmTransforms(aa="original-mstd0.5", hflip=0.2),
        TimmTransforms(aa="v0"),
        TimmTransforms(color_jitter=0.4, grayscale_prob=0.3),
        TimmTransforms(color_jitter=(0.2, 0.0, 0.9), color_jitter_prob=0.5),
    ],
    ids=["paper", "original", "v0", "jitter", "some jitter"],
)
def test_images_are_those_of_the_workers(pictures: np.ndarray, transforms: TimmTransforms) -> None:
    expected, found = both(pictures, transforms)
    difference = (expected - found).abs().mean(dim=(1, 2, 3))  # (96,)
    assert difference.median() < 1
    assert difference.mean() < 2
    # One level of difference before an equalization or a threshold can become many.
    assert (difference < 12).float().mean() > 0.97
    assert (expected.mean() - found.mean()).abs() < 0.5


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (TimmTransforms(gaussian_blur_prob=0.5), "GaussianBlur is not done on the device"),
        (TimmTransforms(color_jitter=(0.4, 0.4, 0.4, 0.1)), "color jitter of the hue is not done"),
        (TimmTransforms(aa="3a"), "GaussianBlurRand, which this policy of --aa uses, is not done|Desaturate, which"),
        (TimmTransforms(aa="augmix-m5"), "AugMixAugment is not done"),
        (TimmTransforms(train_crop_mode="rkrc"), "the crop ResizeKeepRatio is not done"),
        (TimmTransforms(train_interpolation="lanczos"), "lanczos interpolation is not done"),
        (TimmTransforms(no_aug=True), "the crop Resize is not done on the device; use --augment-on workers"),
    ],
)
def test_what_is_not_covered_is_refused(pictures: np.ndarray, transforms: TimmTransforms, message: str) -> None:
    source = ImageArrays(Pictures(pictures), ["a", "b"], Path("nowhere"))
    with pytest.raises(ValueError, match=message):
        TransformedImages(source, transforms, img_size=32, training=True, augment_on="device")


def test_images_that_are_decoded_once_are_refused() -> None:
    with pytest.raises(ValueError, match="augment_on: for images that are read in every epoch"):
        TrainingConfig(cache_mb=512, augment_on="device")
    with pytest.raises(ValueError, match="augment_on 'gpu' is unknown; known are workers, device"):
        TrainingConfig(augment_on="gpu")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, pictures: np.ndarray) -> Path:
    """Files of several sizes."""
    root = tmp_path_factory.mktemp("tree")
    for number, picture in enumerate(pictures[:48]):
        folder = root / ("train" if number < 40 else "test") / str(number % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((30 + number, 40)).save(folder / f"{number:02}.png")
    return root


def data_of(tree: Path) -> ImageData:
    return load_dataset("", tree, img_size=32, transforms=PAPER, augment_on="device")


@pytest.mark.parametrize("workers", [0, 2])
def test_files_depend_on_seed_epoch_and_index_alone(tree: Path, workers: int) -> None:
    dataset = data_of(tree).train
    whole = make_loader(dataset, batch_size=40, training=True, workers=0, seed=5)
    parts = make_loader(dataset, batch_size=8, training=True, workers=workers, seed=5)
    for epoch, start in ((1, 0), (2, 3)):
        whole.sampler.set_epoch(epoch)
        parts.sampler.set_epoch(epoch, start)
        expected, found = next(iter(whole))[0], torch.cat([images for images, _ in parts])
        torch.testing.assert_close(found, expected[8 * start :], atol=1e-5, rtol=0)


def test_files_are_augmented_as_by_the_workers(tree: Path) -> None:
    on_device = data_of(tree)
    in_workers = load_dataset("", tree, img_size=32, transforms=PAPER)
    assert torch.equal(on_device.test[3][0], in_workers.test[3][0])
    differences = [(on_device.train[index][0] - in_workers.train[index][0]).abs().mean().item() for index in range(40)]
    assert np.median(differences) < 2 / 128  # in standard deviations of 127.5 levels
    assert isinstance(on_device.train, TransformedImages)
    assert isinstance(on_device.train.source, ImageFiles)


@pytest.mark.gpu
def test_on_cuda(tree: Path) -> None:
    dataset = data_of(tree).train
    images: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        images[device] = torch.cat(
            [batch.cpu() for batch, _ in make_loader(dataset, batch_size=8, training=True, seed=0, device=device)]
        )
    assert (images["cpu"] - images["cuda"]).abs().mean() < 0.02
