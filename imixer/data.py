"""Images to train on: scikit-learn's digits, or any folder of images sorted into classes.

A data set that fits in memory at the model's image size is decoded once into a uint8 tensor, and a whole
batch is augmented in one go; a larger one is read from disk by worker processes, with timm's transforms.
Both arrive in the training loop through a `torch.utils.data.DataLoader` of `(images, targets)` batches.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from imixer.random_affine import RandomAffine

TEST_FOLDERS = ("test", "val", "validation")

ImageBatch = tuple[Tensor, Tensor]
Item = TypeVar("Item")


class InMemoryImages(Dataset[ImageBatch]):
    """Images held as one uint8 tensor and served, a whole batch at a time, as normalized floats.

    Args:
        images: uint8, (N, C, H, W).
        targets: int64, (N,).
        mean: Per-channel mean of images scaled to [0, 1].
        std: Per-channel standard deviation of images scaled to [0, 1].
        augment: Maps a float batch in [0, 1], (B, C, H, W), to another one; None leaves it as it is.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images = images
        self.targets = targets
        self.mean = torch.tensor(mean).view(-1, 1, 1)  # (C, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)  # (C, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> ImageBatch:
        images, targets = self.__getitems__([index])
        return images[0], targets[0]

    def __getitems__(self, indices: list[int]) -> ImageBatch:
        """Return a collated batch; PyTorch's DataLoader calls this method in place of `__getitem__`."""
        chosen = torch.tensor(indices)
        images = self.images[chosen].float() / 255
        if self.augment is not None:
            images = self.augment(images)
        return (images - self.mean) / self.std, self.targets[chosen]


Images: TypeAlias = InMemoryImages | ImageFolder


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A training set and a test set of labelled images.

    Args:
        name: Short name, used for the output folder.
        train: Training images, augmented at every access.
        test: Test images, never augmented.
        classes: Class names; a target is an index into them.
        img_size: Height and width of the images that the data sets return, in pixels.
        in_chans: Channels of these images.
        mean: Per-channel mean subtracted from images scaled to [0, 1].
        std: Per-channel standard deviation they are divided by.
        description: One line for people: where the images come from and how many there are.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    description: str


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
        source="scikit-learn's digits",
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

    Images are converted to RGB. If all of them fit in `cache_mb` at `img_size`, they are decoded once,
    resized to `img_size` along the shorter side and cropped at the centre; training images are then shifted
    by up to an eighth of their side and mirrored. Otherwise they are read anew in every epoch, under timm's
    usual ImageNet transforms.

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
    root = Path(root)
    train_folder, test_folder = find_splits(root)
    train, test = list_images(train_folder), list_images(test_folder)
    if train.classes != test.classes:
        only_train = _listed(sorted(set(train.classes) - set(test.classes)))
        only_test = _listed(sorted(set(test.classes) - set(train.classes)))
        raise ValueError(
            f"the splits of {root} must hold the same class folders; only in train/: {only_train or 'none'}; "
            f"only in {test_folder.name}/: {only_test or 'none'}"
        )

    num_bytes = (len(train) + len(test)) * 3 * img_size**2
    if num_bytes <= cache_mb * 2**20:
        padding = RandomAffine(shift=1 / 8, hflip=hflip, padding_mode="reflection")
        return _in_memory_data(
            name=root.resolve().name,
            source=str(root),
            train=_decode(train, img_size, progress),
            test=_decode(test, img_size, progress),
            classes=tuple(train.classes),
            augment=padding if augment else None,
        )

    for split in (train, test):
        _check_headers(split, progress)
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    train.transform = create_transform(
        img_size,
        is_training=True,
        no_aug=not augment,
        hflip=hflip,
        interpolation="bicubic",
        mean=mean,
        std=std,
    )
    test.transform = create_transform(img_size, interpolation="bicubic", mean=mean, std=std)
    return ImageData(
        name=root.resolve().name,
        train=train,
        test=test,
        classes=tuple(train.classes),
        img_size=img_size,
        in_chans=3,
        mean=mean,
        std=std,
        description=_describe(str(root), len(train), len(test), len(train.classes), 3, img_size, "read from disk"),
    )


def find_splits(root: Path) -> tuple[Path, Path]:
    """Return the folders of the training and the test images below `root`."""
    if not root.exists():
        near = root.parent
        while not near.exists():
            near = near.parent
        raise FileNotFoundError(f"data folder {root} does not exist; {near} {_holds(near)}")
    if not root.is_dir():
        raise NotADirectoryError(f"data folder {root} is a file; give the folder that holds train/ and test/ (or val/)")
    if not (root / "train").is_dir():
        raise FileNotFoundError(f"{root} has no train/ folder; it {_holds(root)}")
    for name in TEST_FOLDERS:
        if (root / name).is_dir():
            return root / "train", root / name
    wanted = ", ".join(f"{name}/" for name in TEST_FOLDERS)
    raise FileNotFoundError(f"{root} has no test folder, which may be one of {wanted}; it {_holds(root)}")


def list_images(split: Path) -> ImageFolder:
    """List a split's classes and images, and check that every class has some."""
    if not any(entry.is_dir() for entry in split.iterdir()):
        raise FileNotFoundError(f"{split} has no class folders; it must hold one per class, and it {_holds(split)}")
    folder = ImageFolder(str(split), loader=open_image, allow_empty=True)
    counts = Counter(folder.targets)
    empty = [name for index, name in enumerate(folder.classes) if not counts[index]]
    if empty:
        class_folder = split / empty[0]
        raise FileNotFoundError(
            f"class folder {class_folder} has no images (files that end in {', '.join(IMG_EXTENSIONS)}); "
            f"it {_holds(class_folder)}" + (f"; so it is with {_listed(empty[1:])}" if empty[1:] else "")
        )
    return folder


def open_image(path: str) -> Image.Image:
    """Decode an image file as RGB; the error for one that cannot be decoded names the file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        size = os.path.getsize(path) if os.path.exists(path) else 0
        raise ValueError(f"cannot read image {path} ({size} bytes): {error}; replace or remove it") from error


def make_loader(dataset: Images, *, batch_size: int, training: bool, workers: int, seed: int) -> DataLoader[ImageBatch]:
    """Batch a data set; in training, shuffled anew in each epoch, and without an incomplete last batch.

    Args:
        dataset: What to batch.
        batch_size: Images in a batch.
        training: Whether the batches are for training.
        workers: Worker processes that read images from disk. Images in memory are served without any.
        seed: Seed of the order of the training images.
    """
    in_memory = isinstance(dataset, InMemoryImages)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=training,
        drop_last=training and len(dataset) >= batch_size,
        num_workers=0 if in_memory else workers,
        persistent_workers=training and workers > 0 and not in_memory,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_already_collated if in_memory else default_collate,
        generator=torch.Generator().manual_seed(seed),
    )


def _already_collated(batch: Any) -> Any:
    """Pass on a batch that `InMemoryImages.__getitems__` made."""
    return batch


def _in_memory_data(
    *,
    name: str,
    source: str,
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
        description=_describe(source, len(train[1]), len(test[1]), len(classes), channels, img_size, "held in memory"),
    )


def _decode(folder: ImageFolder, img_size: int, progress: bool) -> ImageBatch:
    """Decode a split: uint8 images (N, 3, img_size, img_size) and targets (N,)."""
    images = torch.empty(len(folder), 3, img_size, img_size, dtype=torch.uint8)

    def decode(index: int) -> None:
        image = open_image(folder.samples[index][0])
        if image.size != (img_size, img_size):
            image = TF.center_crop(TF.resize(image, [img_size], antialias=True), [img_size, img_size])
        images[index] = TF.pil_to_tensor(image)

    _for_each(decode, range(len(folder)), f"decoding {Path(folder.root).name}", progress)
    return images, torch.tensor(folder.targets)


def _check_headers(folder: ImageFolder, progress: bool) -> None:
    """Read the head of every file, which finds most broken ones without decoding any."""

    def check(path: str) -> None:
        try:
            Image.open(path).close()
        except OSError:
            open_image(path)

    _for_each(check, [path for path, _ in folder.samples], f"checking {Path(folder.root).name}", progress)


def _for_each(work: Callable[[Item], None], items: Iterable[Item], label: str, progress: bool) -> None:
    """Call `work` on every item from a few threads; the first error ends it."""
    items = list(items)
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        for _ in tqdm(pool.map(work, items), desc=label, total=len(items), leave=False, disable=not progress):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _describe(
    source: str, num_train: int, num_test: int, num_classes: int, channels: int, img_size: int, storage: str
) -> str:
    return (
        f"{source}: {num_train:,} training and {num_test:,} test images in {num_classes} classes, "
        f"{channels} x {img_size} x {img_size}, {storage}"
    )


def _holds(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return f"holds {_listed(names)}" if names else "is empty"


def _listed(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
