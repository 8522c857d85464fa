"""A training set and a test set with what a model must know of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from imixer.data.images import ImageBatch, Images


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

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What tells these images from others, for a resumed run."""
        return {"name": self.name, "training images": len(self.train), "test images": len(self.test)}

    def some_test_images(self, count: int) -> ImageBatch:
        """Return at most `count` test images, (B, C, H, W), and their classes.

        They are evenly spaced, since folders are sorted by class.
        """
        step = math.ceil(len(self.test) / count)
        images, targets = zip(*[self.test[index] for index in range(0, len(self.test), step)], strict=True)
        return torch.stack(images), torch.stack(targets)
