"""Data sets of labeled images.

An augmented image is a function of (seed, epoch, index). The `BatchKey` that asks for a batch carries all three, so
that a data set keeps no state, and its copies in worker processes need not be told of a new epoch.

Batches travel to the device as uint8, a quarter of the bytes of float32. The rest happens there, in `finish`, in the
order of timm's training script: mixup and CutMix on whole pixel values, normalization, random erasing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import Compose

from imixer.data.device_transforms import DeviceTransforms, DrawnBatch
from imixer.data.erasing import BoxErasing, Erased
from imixer.data.fingerprint import digest
from imixer.data.random_streams import generator_of, restored_global_generators, seed_global_generators
from imixer.data.sources import ImageArrays, ImageSource
from imixer.data.transforms import TimmTransforms
from imixer.random_affine import RandomAffine

ImageBatch: TypeAlias = tuple[Tensor, Tensor]
HASHED_BYTES = 2**28  # a fingerprint takes every image up to this size of them all, and fewer above


class BatchKey(NamedTuple):
    """Which images make a batch, and what decides how they are augmented.

    Args:
        indices: Their numbers in the data set.
        epoch: Number of the epoch.
        seed: Seed of the run.
    """

    indices: list[int]
    epoch: int = 0
    seed: int = 0


class RawBatch(NamedTuple):
    """A batch on its way to the device.

    Args:
        key: What asked for it.
        images: uint8, (B, C, H, W).
        targets: int64, (B,).
        moves: What moves the images, (B, `RandomAffine.NUM_DRAWS`), if anything does.
        drawn: What augments them on the device, if anything does.
        erased: What erases parts of them, if anything does.
    """

    key: BatchKey
    images: Tensor
    targets: Tensor
    moves: Tensor | None = None
    drawn: DrawnBatch | None = None
    erased: Erased | None = None


class Images(Dataset[ImageBatch], ABC):
    """Labeled images; `images[index]` is one as in epoch 0 of seed 0, normalized, with its target.

    Args:
        mean: Mean of each channel, of images scaled to [0, 1].
        std: Standard deviation of each channel, of images scaled to [0, 1].
    """

    augment: RandomAffine | None = None
    on_device: DeviceTransforms | None = None
    erasing: BoxErasing | None = None

    def __init__(self, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean = mean
        self.std = std

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, key: BatchKey, on_image: Callable[[int], None] = lambda index: None) -> RawBatch:
        """Return a batch.

        Args:
            key: Which one.
            on_image: Called with the number of each image before it is read.

        Raises:
            UnreadableImageError: An image cannot be read.
        """

    def finish(self, batch: RawBatch, mixup: Mixup | None = None) -> ImageBatch:
        """Do what is left to do with a batch, on the device that it is on.

        Args:
            batch: What `read` returned.
            mixup: timm's mixup and CutMix. Its random numbers depend on the seed, the epoch and the first index.

        Returns:
            Normalized images, float32 (B, C, H, W), and int64 targets (B,); with `mixup`, float32 ones (B, classes).
        """
        images, targets = batch.images, batch.targets
        if self.on_device is not None and batch.drawn is not None:
            images = self.on_device(images, batch.drawn)
        images = images.float()
        if self.augment is not None and batch.moves is not None:
            images = self.augment(images, batch.moves)
        if mixup is not None:
            with restored_global_generators():
                seed_global_generators("mixup", batch.key.seed, batch.key.epoch, batch.key.indices[0])
                images, targets = mixup(images, targets)
            images.round_()  # as if uint8 images had been mixed
        images.sub_(_channels(self.mean, images.device)).div_(_channels(self.std, images.device))
        if self.erasing is not None and batch.erased is not None:
            images = self.erasing(images, batch.erased)
        return images, targets

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest that other images would most likely not have; see `ImageData.fingerprint`."""

    def describe(self, index: int) -> str:
        """Say which image this is, for error messages: its file if it has one."""
        return f"image {index}"

    def __getitem__(self, index: int) -> ImageBatch:
        images, targets = self.finish(self.read(BatchKey([index])))
        return images[0], targets[0]


class InMemoryImages(Images):
    """Images held as one uint8 tensor and served a whole batch at a time.

    Args:
        images: uint8, (N, C, H, W).
        targets: int64, (N,).
        mean: Mean of each channel, of images scaled to [0, 1].
        std: Standard deviation of each channel, of images scaled to [0, 1].
        augment: Moves the images of a batch; None leaves them as they are.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: RandomAffine | None = None,
    ) -> None:
        super().__init__(mean=mean, std=std)
        self.images = images
        self.targets = targets
        self.augment = augment
        self._draws: dict[tuple[int, int], Tensor] = {}  # the last epoch's, for all images

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, key: BatchKey, on_image: Callable[[int], None] = lambda index: None) -> RawBatch:
        chosen = torch.tensor(key.indices)
        if self.augment is None:
            return RawBatch(key, self.images[chosen], self.targets[chosen])
        epoch = (key.seed, key.epoch)
        if epoch not in self._draws:
            self._draws = {epoch: self.augment.draw(len(self), generator_of("augment", *epoch))}  # (N, NUM_DRAWS)
        return RawBatch(key, self.images[chosen], self.targets[chosen], moves=self._draws[epoch][chosen])

    def fingerprint(self) -> str:
        some = self.images[:: max(1, -(-self.images.nbytes // HASHED_BYTES))]
        return digest([tuple(self.images.shape), some.numpy().tobytes(), self.targets.numpy().tobytes()])


class TransformedImages(Images):
    """Images read anew each time they are asked for, under timm's transforms.

    Args:
        source: Where they come from.
        transforms: timm's settings.
        img_size: Side of the returned images, in pixels.
        training: Whether they are augmented.
        augment_on: "workers", or "device" to augment batches where the model is. Then the workers only draw random
            numbers, and decode and crop files, whose sizes differ; pictures that the source holds in memory at one size
            are cropped on the device, too.

    Raises:
        ValueError: `transforms` asks for something that is not done on the device; see `DeviceTransforms`.
    """

    def __init__(
        self,
        source: ImageSource,
        transforms: TimmTransforms,
        *,
        img_size: int,
        training: bool,
        augment_on: str = "workers",
    ) -> None:
        super().__init__(mean=transforms.mean, std=transforms.std)
        self.source, self.img_size = source, img_size
        self.transform = transforms.create(img_size, training=training)
        if training and augment_on == "device":
            in_memory = isinstance(source, ImageArrays)
            self.on_device = DeviceTransforms(self.transform, img_size=img_size, crops=in_memory)
            steps = transforms.create(img_size, training=True).transforms
            self.transform = Compose([*([] if in_memory else steps[:1]), steps[-1]])
        self.erasing = transforms.random_erasing() if training else None

    def __len__(self) -> int:
        return len(self.source)

    def read(self, key: BatchKey, on_image: Callable[[int], None] = lambda index: None) -> RawBatch:
        samples, targets, drawn, erased = [], [], [], {}
        with restored_global_generators():
            for row, index in enumerate(key.indices):
                on_image(index)
                image, target = self.source[index]
                seed_global_generators("image", key.seed, key.epoch, index)
                samples.append(self.transform(image))
                targets.append(target)
                if self.on_device is not None:
                    drawn.append(self.on_device.draw(samples[-1]))
                if self.erasing is not None and (boxes := self.erasing.draw(self.img_size, self.img_size)):
                    erased[row] = boxes
        # In a worker process, default_collate stacks into shared memory.
        batch = RawBatch(key, default_collate(samples), torch.tensor(targets))
        if drawn:
            batch = batch._replace(drawn=DeviceTransforms.collate(drawn))
        if erased:
            parts = (torch.tensor(part) for part in zip(*erased.values(), strict=True))
            batch = batch._replace(erased=Erased(torch.tensor(list(erased)), *parts))
        return batch

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def describe(self, index: int) -> str:
        return self.source.describe(index)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Put one value per channel, scaled to pixels from 0 to 255, on a device, once: (C, 1, 1)."""
    return torch.tensor([255 * value for value in values], device=device).view(-1, 1, 1)
