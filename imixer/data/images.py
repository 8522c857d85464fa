"""Data sets of labelled images.

What an image looks like is a function of (seed, epoch, index) alone. The `BatchKey` that asks for a batch carries all
three, so that a data set keeps no state, and its copies in worker processes need not be told of a new epoch.

Batches travel to the device as uint8, a quarter of the bytes of float32; what is left to do there is `finish`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from imixer.data.random_streams import generator_of, restored_global_generators, seed_global_generators
from imixer.data.sources import ImageSource
from imixer.data.transforms import TimmTransforms
from imixer.random_affine import RandomAffine

ImageBatch: TypeAlias = tuple[Tensor, Tensor]


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
        images: uint8, (B, C, H, W).
        targets: int64, (B,).
        extras: What else the data set's `finish` needs.
    """

    images: Tensor
    targets: Tensor
    extras: tuple[Tensor, ...] = ()


class Images(Dataset[ImageBatch], ABC):
    """Labelled images; `images[index]` is one as in epoch 0 of seed 0, normalized, with its target.

    Args:
        mean: Per-channel mean of images scaled to [0, 1].
        std: Per-channel standard deviation of images scaled to [0, 1].
    """

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

    def finish(self, batch: RawBatch) -> ImageBatch:
        """Return float32 images, (B, C, H, W), and targets, on the device that `batch` is on."""
        return self.normalize(batch.images.float().div_(255)), batch.targets

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize float images in [0, 1], (B, C, H, W), in place."""
        return images.sub_(_channels(self.mean, images.device)).div_(_channels(self.std, images.device))

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
        mean: Per-channel mean of images scaled to [0, 1].
        std: Per-channel standard deviation of images scaled to [0, 1].
        augment: Moves the images of a float batch in [0, 1], (B, C, H, W); None leaves them as they are.
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
            return RawBatch(self.images[chosen], self.targets[chosen])
        epoch = (key.seed, key.epoch)
        if epoch not in self._draws:
            self._draws = {epoch: self.augment.draw(len(self), generator_of("augment", *epoch))}  # (N, NUM_DRAWS)
        return RawBatch(self.images[chosen], self.targets[chosen], (self._draws[epoch][chosen],))

    def finish(self, batch: RawBatch) -> ImageBatch:
        images = batch.images.float().div_(255)
        if self.augment is not None:
            images = self.augment(images, *batch.extras)
        return self.normalize(images), batch.targets


class TransformedImages(Images):
    """Images read anew each time they are asked for, under timm's transforms.

    Args:
        source: Where they come from.
        transforms: timm's settings.
        img_size: Side of the returned images, in pixels.
        training: Whether they are augmented.
    """

    def __init__(self, source: ImageSource, transforms: TimmTransforms, *, img_size: int, training: bool) -> None:
        super().__init__(mean=transforms.mean, std=transforms.std)
        self.source = source
        self.transform = transforms.create(img_size, training=training)
        self.erasing = transforms.random_erasing() if training else None
        self.canvas = torch.empty(3, img_size, img_size)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, key: BatchKey, on_image: Callable[[int], None] = lambda index: None) -> RawBatch:
        samples, targets, erased = [], [], {}
        with restored_global_generators():
            for row, index in enumerate(key.indices):
                on_image(index)
                image, target = self.source[index]
                seed_global_generators("image", key.seed, key.epoch, index)
                samples.append(self.transform(image))
                targets.append(target)
                if self.erasing is not None:
                    # timm erases after the normalization, with normal noise. Images in uint8 cannot hold that, so it
                    # goes beside them, rounded to float16, with NaN where an image stays.
                    noise = self.erasing(self.canvas.fill_(torch.nan))
                    if not noise[0].isnan().all():
                        erased[row] = noise.half()
        # In a worker process, default_collate stacks into shared memory.
        batch = RawBatch(default_collate(samples), torch.tensor(targets))
        if not erased:
            return batch
        return batch._replace(extras=(torch.tensor(list(erased)), default_collate(list(erased.values()))))

    def finish(self, batch: RawBatch) -> ImageBatch:
        images, targets = super().finish(batch)
        if batch.extras:
            rows, noise = batch.extras  # (E,), (E, C, H, W)
            images[rows] = torch.where(noise.isnan(), images[rows], noise.float())
        return images, targets

    def describe(self, index: int) -> str:
        return self.source.describe(index)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Put one value per channel on a device, once: (C, 1, 1)."""
    return torch.tensor(values, device=device).view(-1, 1, 1)
