"""timm's image transforms, by the names of its training script's flags."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from PIL import Image
from timm.data.auto_augment import posterize
from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.data.transforms_factory import create_transform
from torchvision.transforms import Compose

from imixer.data.erasing import BoxErasing

# Half of timm's kernel of 23 pixels is reflected at the border, which must be less than the image.
SMALLEST_BLURRED = 12


@dataclass(frozen=True, kw_only=True)
class TimmTransforms:
    """How timm's training script prepares images; fields and defaults are those of its flags.

    `timm.data.resolve_data_config` gives the values of `interpolation`, `mean`, `std`, `crop_pct` and `crop_mode` that
    belong to a model; the defaults here are the Mixers'.

    Args:
        no_aug: Only resize and crop the training images.
        train_crop_mode: "rrc" (random resized crop, also for None), "rkrc" or "rkrr".
        scale: Range of the random crop's area, relative to the image's.
        ratio: Range of its aspect ratio.
        hflip: Probability of mirroring left and right.
        vflip: Probability of mirroring up and down.
        color_jitter: Strength of random brightness, contrast and saturation; not used beside `aa`.
        color_jitter_prob: Its probability; None always applies it.
        grayscale_prob: Probability of taking the colors away.
        gaussian_blur_prob: Probability of blurring.
        aa: Policy of RandAugment or AutoAugment, such as "rand-m9-mstd0.5-inc1".
        reprob: Probability of random erasing.
        remode: What erases: "const", "rand" (one colour) or "pixel" (noise).
        recount: Largest number of erased boxes.
        train_interpolation: Interpolation of training images: "random" (bilinear or bicubic), or a method's name.
        interpolation: Interpolation of test images, and of training images with `no_aug`.
        crop_pct: Side of the test images' central crop, relative to the resized image's shorter side.
        crop_mode: How test images are resized: "center", "squash" or "border".
        mean: Per-channel mean subtracted from images scaled to [0, 1].
        std: Per-channel standard deviation they are divided by.

    Raises:
        ValueError: timm refuses a value.
    """

    no_aug: bool = False
    train_crop_mode: str | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | tuple[float, ...] = 0.4
    color_jitter_prob: float | None = None
    grayscale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    aa: str | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    train_interpolation: str = "random"
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    mean: tuple[float, ...] = IMAGENET_INCEPTION_MEAN
    std: tuple[float, ...] = IMAGENET_INCEPTION_STD

    def __post_init__(self) -> None:
        try:
            self.create(32, training=True)
            self.create(32, training=False)
            self.random_erasing()
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"timm refuses {self}: {type(error).__name__} {error}") from error

    def create(self, img_size: int, *, training: bool) -> Compose:
        """Return timm's transform to uint8 tensors, (C, img_size, img_size), without normalization and erasing.

        Raises:
            ValueError: The images are too small to be blurred.
        """
        if training and self.gaussian_blur_prob and not self.no_aug and img_size < SMALLEST_BLURRED:
            raise ValueError(
                f"gaussian_blur_prob needs images of at least {SMALLEST_BLURRED} pixels, since timm's kernel has 23, "
                f"not of {img_size}; leave it out, or choose a larger --img-size"
            )
        train_interpolation = self.interpolation if self.no_aug else self.train_interpolation
        transform = create_transform(
            img_size,
            is_training=training,
            no_aug=self.no_aug,
            train_crop_mode=self.train_crop_mode,
            scale=self.scale,
            ratio=self.ratio,
            hflip=self.hflip,
            vflip=self.vflip,
            color_jitter=self.color_jitter,
            color_jitter_prob=self.color_jitter_prob,
            grayscale_prob=self.grayscale_prob,
            gaussian_blur_prob=self.gaussian_blur_prob,
            auto_augment=self.aa,
            interpolation=train_interpolation if training else self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            normalize=False,
        )
        _allow_no_bits(transform)
        return transform

    def random_erasing(self) -> BoxErasing | None:
        """Return timm's random erasing, which comes after the normalization; None for none."""
        if self.no_aug or not self.reprob:
            return None
        return BoxErasing(self.reprob, mode=self.remode, max_count=self.recount)


def _allow_no_bits(transform: Any) -> None:
    """Let RandAugment's and AutoAugment's posterize keep 0 bits of each pixel, which the strongest level asks for."""
    for step in transform.transforms:
        for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    # Pillow 13 refuses 0 bits; before, they made an image black.
    return posterize(image, bits_to_keep, **options) if bits_to_keep else Image.new(image.mode, image.size)
