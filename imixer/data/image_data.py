"""A training set and a test set with what a model must know of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from imixer.data.fingerprint import digest
from imixer.data.images import ImageBatch, Images


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A training set and a test set of labeled images.

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

    def some_test_images(self, count: int) -> ImageBatch:
        """Return at most `count` test images, (B, C, H, W), and their classes.

        They are evenly spaced, since folders are sorted by class.
        """
        step = math.ceil(len(self.test) / count)
        images, targets = zip(*[self.test[index] for index in range(0, len(self.test), step)], strict=True)
        return torch.stack(images), torch.stack(targets)

    def fingerprint(self) -> dict[str, str | int]:
        """Return what tells these images from others, for a run that is resumed.

        Moving the files to another folder changes nothing. Takes seconds for a million files.

        Returns:
            `name`; `classes`, a digest of the class names in their order; for both splits `train_images`, the number
            of images, and `train_content`, a digest. For images in memory it is that of their bytes and targets, for
            files that of the names and targets of all and the sizes of some thousands, for other sources that of the
            targets and pixels of some hundreds. Digests are 32 hexadecimal digits.
        """
        return {
            "name": self.name,
            "classes": digest(self.classes),
            "train_images": len(self.train),
            "train_content": self.train.fingerprint(),
            "test_images": len(self.test),
            "test_content": self.test.fingerprint(),
        }
