"""Data sets made ready for training: scikit-learn's digits, a folder of images, or one of timm's names.

Small ones are decoded once into a uint8 tensor and augmented a batch at a time; under timm's transforms, images are
read anew in every epoch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from imixer.data.decoding import open_image
from imixer.data.image_data import ImageData
from imixer.data.images import ImageBatch, InMemoryImages, TransformedImages
from imixer.data.named_datasets import load_sources
from imixer.data.sources import ImageFiles, ImageSource
from imixer.data.transforms import TimmTransforms
from imixer.random_affine import RandomAffine

Item = TypeVar("Item")


def load_digits(*, img_size: int = 8, augment: bool = True) -> ImageData:
    """Load scikit-learn's 1,797 handwritten digits, 8 x 8 grey pixels, which come with the package.

    The split is stratified and always the same: 1,297 training and 500 test images.

    Args:
        img_size: Side of the returned images; other sizes than 8 are interpolated.
        augment: Whether training images are shifted by up to an eighth, rotated and scaled.
    """
    from sklearn.datasets import load_digits as load_sklearn_digits
    from sklearn.model_selection import train_test_split

    digits = load_sklearn_digits()
    images = torch.from_numpy(digits.images).float()[:, None]  # (1797, 1, 8, 8), values 0 to 16
    if img_size != images.shape[-1]:
        images = F.interpolate(images, size=(img_size, img_size), mode="bilinear", align_corners=False)
    images = (images * (255 / 16)).round().to(torch.uint8)
    targets = torch.from_numpy(digits.target).long()
    train_rows, test_rows = train_test_split(range(len(targets)), test_size=500, stratify=targets, random_state=0)
    return _in_memory_data(
        name="digits",
        origin="scikit-learn's digits",
        train=(images[train_rows], targets[train_rows]),
        test=(images[test_rows], targets[test_rows]),
        classes=tuple(str(name) for name in digits.target_names),
        augment=RandomAffine(shift=1 / 8, degrees=10, scale=0.1) if augment else None,
    )


def load_image_folder(
    root: str | Path,
    *,
    img_size: int,
    augment: bool = True,
    hflip: float = 0.5,
    cache_mb: int = 512,
    progress: bool = False,
) -> ImageData:
    """Load a tree of images `root/<split>/<class>/<image>` with the splits `train` and `test` (or `val`).

    It is `load_dataset` for folders.

    Args:
        root: Folder that holds the splits.
        img_size: Side of the returned images, in pixels.
        augment: Whether training images are augmented.
        hflip: Probability of mirroring a training image left and right.
        cache_mb: Largest size of the decoded images in memory, in MiB; 0 always reads from disk.
        progress: Whether to show a progress bar while decoding.

    Raises:
        FileNotFoundError: `root`, a split, or a class's images are missing.
        NotADirectoryError: `root` is a file.
        ValueError: The splits' classes differ, or a file is not a readable image.
    """
    return load_dataset("", root, img_size=img_size, augment=augment, hflip=hflip, cache_mb=cache_mb, progress=progress)


def load_dataset(
    name: str,
    root: str | Path,
    *,
    img_size: int,
    transforms: TimmTransforms | None = None,
    augment_on: str = "workers",
    augment: bool = True,
    hflip: float = 0.5,
    cache_mb: int = 512,
    train_split: str = "train",
    test_split: str | None = None,
    download: bool = False,
    progress: bool = False,
) -> ImageData:
    """Load a data set by timm's name, such as `torch/cifar10`, or a folder of images.

    Images are converted to RGB. With `transforms`, they are read anew in every epoch and prepared as timm's training
    script does. Without, if all of them fit in `cache_mb` at `img_size`, they are decoded once, resized to `img_size`
    along the shorter side and cropped at the centre; training images are then shifted by up to an eighth of their side
    and mirrored. If they do not fit, they are read anew in every epoch, under timm's usual ImageNet transforms.

    Args:
        name: `torch/<name>`, `hfds/<name>`, or "" for a folder or tars of images; see `load_sources`.
        root: Folder that holds the data.
        img_size: Side of the returned images, in pixels.
        transforms: timm's transforms, the mean and the standard deviation; replaces `augment`, `hflip` and `cache_mb`.
        augment_on: Where training images are augmented by `transforms`: "workers", or "device" (`TransformedImages`).
        augment: Whether training images are augmented.
        hflip: Probability of mirroring a training image left and right.
        cache_mb: Largest size of the decoded images in memory, in MiB; 0 always reads from disk.
        train_split: Name of the training split.
        test_split: Name of the test split; None is whichever there is.
        download: Fetch what is missing, where torchvision can. With several processes, let one of them do so first.
        progress: Whether to show a progress bar while decoding.

    Raises:
        FileNotFoundError: The data is not there; the message says what was looked for, where, and how to get it.
        NotADirectoryError: `root` is a file.
        ValueError: The name is unknown, the splits' classes differ, or a file is damaged.
        ImportError: A package that the data set needs is not installed.
    """
    train, test = load_sources(name, root, train_split=train_split, test_split=test_split, download=download)
    origin = str(root) if not name else f"{name} in {root}"
    short_name = Path(root).resolve().name if not name else name.rpartition("/")[2]
    num_bytes = (len(train) + len(test)) * 3 * img_size**2
    if transforms is None and num_bytes <= cache_mb * 2**20:
        return _in_memory_data(
            name=short_name,
            origin=origin,
            train=_decode(train, img_size, "training images", progress),
            test=_decode(test, img_size, "test images", progress),
            classes=train.classes,
            augment=RandomAffine(shift=1 / 8, hflip=hflip, padding_mode="reflection") if augment else None,
        )
    if transforms is None:
        for source in (train, test):
            if isinstance(source, ImageFiles):
                _check_headers(source, progress)
        transforms = TimmTransforms(no_aug=not augment, hflip=hflip, train_interpolation="bicubic", crop_pct=0.875)
    return ImageData(
        name=short_name,
        train=TransformedImages(train, transforms, img_size=img_size, training=True, augment_on=augment_on),
        test=TransformedImages(test, transforms, img_size=img_size, training=False),
        classes=train.classes,
        img_size=img_size,
        in_chans=3,
        mean=transforms.mean,
        std=transforms.std,
        description=_describe(origin, len(train), len(test), len(train.classes), 3, img_size, "read in every epoch"),
    )


def _in_memory_data(
    *,
    name: str,
    origin: str,
    train: ImageBatch,
    test: ImageBatch,
    classes: tuple[str, ...],
    augment: RandomAffine | None,
) -> ImageData:
    """Wrap decoded splits, of uint8 images (N, C, H, W) and targets (N,)."""
    channels, img_size = train[0].shape[1], train[0].shape[-1]
    # One channel at a time keeps the float copy small.
    moments = [torch.std_mean(train[0][:, channel].float() / 255) for channel in range(channels)]
    mean = tuple(round(channel_mean.item(), 4) for _, channel_mean in moments)
    std = tuple(max(round(channel_std.item(), 4), 1e-4) for channel_std, _ in moments)
    return ImageData(
        name=name,
        train=InMemoryImages(*train, mean=mean, std=std, augment=augment),
        test=InMemoryImages(*test, mean=mean, std=std),
        classes=classes,
        img_size=img_size,
        in_chans=channels,
        mean=mean,
        std=std,
        description=_describe(origin, len(train[1]), len(test[1]), len(classes), channels, img_size, "held in memory"),
    )


def _decode(source: ImageSource, img_size: int, label: str, progress: bool) -> ImageBatch:
    """Decode a split: uint8 images (N, 3, img_size, img_size) and targets (N,)."""
    images = torch.empty(len(source), 3, img_size, img_size, dtype=torch.uint8)
    targets = torch.empty(len(source), dtype=torch.int64)

    def decode(index: int) -> None:
        image, target = source[index]
        if image.size != (img_size, img_size):
            image = TF.center_crop(TF.resize(image, [img_size], antialias=True), [img_size, img_size])
        images[index], targets[index] = TF.pil_to_tensor(image), target

    _for_each(decode, range(len(source)), f"decoding {label}", progress)
    return images, targets


def _check_headers(source: ImageFiles, progress: bool) -> None:
    """Read the head of every file, which finds most broken ones without decoding any."""

    def check(sample: tuple[str, int]) -> None:
        open_image(sample[0], header_only=True)

    _for_each(check, source.samples, "checking images", progress)


def _for_each(work: Callable[[Item], None], items: Iterable[Item], label: str, progress: bool) -> None:
    """Call `work` on every item from a few threads; the first error ends it."""
    items = list(items)
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for _ in tqdm(
            pool.map(work, items), desc=label, total=len(items), leave=False, disable=None if progress else True
        ):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _describe(
    origin: str, num_train: int, num_test: int, num_classes: int, channels: int, img_size: int, storage: str
) -> str:
    return (
        f"{origin}: {num_train:,} training and {num_test:,} test images in {num_classes} classes, "
        f"{channels} x {img_size} x {img_size}, {storage}"
    )
