"""timm's augmentation, drawn for each image in the workers and applied to whole batches on the device."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

CUBIC = (InterpolationMode.BICUBIC, 3)  # torchvision's and Pillow's names for it
LINEAR = (InterpolationMode.BILINEAR, 2)
Step = tuple[str, tuple[float, ...]]  # name of a step and its arguments


class Drawn(NamedTuple):
    """What was drawn for one image.

    Args:
        crop: Top, left, height and width of the part that is resized, in pixels, and 1 for bicubic interpolation; None
            if it has been cropped.
        mirrored: Whether left and right, and top and bottom, are exchanged.
        steps: What comes then.
    """

    crop: tuple[float, ...] | None
    mirrored: tuple[bool, bool]
    steps: list[Step]


class DrawnBatch(NamedTuple):
    """What was drawn for a batch, in few tensors, since each travels from a worker by itself.

    Args:
        crops: (B, 5), or None.
        mirrored: (B, 2).
        groups: Images that take the same kind of step at the same time: its name, how many they are, and the number of
            its arguments.
        rows: Their numbers in the batch, one group after the other, (N,).
        arguments: Their arguments, (N, largest number of arguments).
    """

    crops: Tensor | None
    mirrored: Tensor
    groups: list[tuple[str, int, int]]
    rows: Tensor
    arguments: Tensor


class DeviceTransforms:
    """timm's augmentation of training images in two halves.

    `draw` lets the transforms of timm and torchvision draw as they would for an image; calling the object applies what
    was drawn to a batch of uint8 images, with one call for all images that a step is for. The result differs from that
    of the transforms by rounding, and, where RandAugment moves an image with bicubic interpolation, by PyTorch's other
    choice of cubic.

    Covered are random resized crops with bilinear or bicubic interpolation, flips, RandAugment and AutoAugment without
    blurring, color jitter without hue, and random grayscale.

    Args:
        transform: timm's transform of training images to uint8 tensors.
        img_size: Side of the returned images, in pixels.
        crops: Whether the images are still to be cropped.

    Raises:
        ValueError: `transform` has a step that is not covered.
    """

    def __init__(self, transform: Any, *, img_size: int, crops: bool) -> None:
        self.img_size = img_size
        self._steps = list(transform.transforms[0 if crops else 1 : -1])  # the last one makes tensors
        if not isinstance(transform.transforms[0], RandomResizedCropAndInterpolation):
            _refuse(f"the crop {type(transform.transforms[0]).__name__}")
        for step in self._steps:
            self._check(step)

    def draw(self, image: Tensor) -> Drawn:
        """Draw what is done with one image, (C, H, W), from the global generators."""
        crop, mirrored, steps = None, [False, False], list[Step]()
        for step in self._steps:
            if isinstance(step, RandomResizedCropAndInterpolation):
                box = step.get_params(image, step.scale, step.ratio)
                crop = (*box, float(_choice(step.interpolation) in CUBIC))
            elif isinstance(step, v1.RandomHorizontalFlip):
                mirrored[0] = bool(torch.rand(1) < step.p)
            elif isinstance(step, v1.RandomVerticalFlip):
                mirrored[1] = bool(torch.rand(1) < step.p)
            elif isinstance(step, (RandAugment, AutoAugment)):
                step(steps)
            elif isinstance(step, v1.RandomGrayscale):
                steps += [("Color", (0.0,))] if torch.rand(1) < step.p else []
            elif isinstance(step, v1.ColorJitter):
                steps += _draw_jitter(step)
            elif not step.p < torch.rand(1):  # RandomApply
                steps += _draw_jitter(step.transforms[0])
        return Drawn(crop, (mirrored[0], mirrored[1]), steps)

    @staticmethod
    def collate(drawn: Sequence[Drawn]) -> DrawnBatch:
        """Put what was drawn for the images of a batch together."""
        steps = sorted(
            (time, name, row, arguments)
            for row, image in enumerate(drawn)
            for time, (name, arguments) in enumerate(image.steps)
        )
        groups = []
        for (_, name), members in groupby(steps, key=itemgetter(0, 1)):
            together = list(members)
            groups.append((name, len(together), len(together[0][-1])))
        columns = max((count for *_, count in groups), default=0)
        padded = [[*arguments, *[0.0] * (columns - len(arguments))] for *_, arguments in steps]
        crops = [image.crop for image in drawn if image.crop is not None]
        return DrawnBatch(
            crops=torch.tensor(crops) if crops else None,
            mirrored=torch.tensor([image.mirrored for image in drawn]),
            groups=groups,
            rows=torch.tensor([row for *_, row, _ in steps], dtype=torch.int64),
            arguments=torch.tensor(padded, dtype=torch.float32),
        )

    def __call__(self, images: Tensor, drawn: DrawnBatch) -> Tensor:
        """Return the augmented images, uint8 (B, C, img_size, img_size), of uint8 ones, (B, C, H, W)."""
        images = images.clone() if drawn.crops is None else resized_crop(images, drawn.crops, self.img_size)
        for flip, mirrored in zip((TF.horizontal_flip, TF.vertical_flip), drawn.mirrored.unbind(1), strict=True):
            images = torch.where(mirrored[:, None, None, None], flip(images), images)
        start = 0
        for name, size, columns in drawn.groups:
            rows, arguments = drawn.rows[start : start + size], drawn.arguments[start : start + size, :columns]
            images[rows] = STEPS[name](images[rows], *arguments[..., None, None, None].unbind(1))
            start += size
        return images

    def _check(self, step: Any) -> None:
        if isinstance(step, RandomResizedCropAndInterpolation):
            for method in step.interpolation if isinstance(step.interpolation, tuple) else [step.interpolation]:
                if method not in (*CUBIC, *LINEAR):
                    _refuse(f"{method.value} interpolation")
        elif isinstance(step, (RandAugment, AutoAugment)):
            for operation in chain(getattr(step, "ops", ()), *getattr(step, "policy", ())):
                if operation.name not in GEOMETRY and operation.name not in STEPS:
                    _refuse(f"{operation.name}, which this policy of --aa uses")
                fill = tuple(operation.kwargs["fillcolor"])
                operation.aug_fn = partial(_record, operation.name, fill, self.img_size)
        elif isinstance(step, v1.ColorJitter):
            if step.hue is not None:
                _refuse("color jitter of the hue")
        elif isinstance(step, v1.RandomApply) and isinstance(step.transforms[0], v1.ColorJitter):
            self._check(step.transforms[0])
        elif not isinstance(step, (v1.RandomHorizontalFlip, v1.RandomVerticalFlip, v1.RandomGrayscale)):
            _refuse(type(step.transforms[0] if isinstance(step, v1.RandomApply) else step).__name__)


def resized_crop(images: Tensor, crops: Tensor, img_size: int) -> Tensor:
    """Cut a box out of each image and resize it as Pillow does, with antialiasing, as a product with two matrices.

    Args:
        images: uint8, (B, C, H, W).
        crops: Top, left, height and width in pixels, and 1 for bicubic interpolation, 0 for bilinear, (B, 5).
        img_size: Side of the results, in pixels.

    Returns:
        uint8, (B, C, img_size, img_size).
    """
    top, left, height, width, cubic = crops.float()[..., None, None].unbind(1)  # (B, 1, 1) each
    across = _resizing(left, width, images.shape[3], img_size, cubic)  # (B, img_size, W)
    down = _resizing(top, height, images.shape[2], img_size, cubic)  # (B, img_size, H)
    rows = _pixels(images.float() @ across[:, None].transpose(2, 3))
    return _pixels(down[:, None] @ rows).to(torch.uint8)


def _resizing(start: Tensor, length: Tensor, old: int, new: int, cubic: Tensor) -> Tensor:
    """Return the weights of `old` pixels in each of the `new` ones that `length` pixels from `start` on make."""
    scale = length / new
    centers = start + scale * (torch.arange(new, device=start.device)[:, None] + 0.5)  # (B, new, 1)
    pixels = torch.arange(old, device=start.device) + 0.5
    x = ((pixels - centers) / scale.clamp(min=1)).abs()  # (B, new, old), in widths of the filter
    linear = (1 - x).clamp(min=0)
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2  # Catmull and Rom's cubic
    catmull = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    inside = (pixels > start) & (pixels < start + length)
    weights = torch.where(cubic > 0, catmull, linear) * inside
    return weights / weights.sum(dim=2, keepdim=True)


def _pixels(values: Tensor) -> Tensor:
    return (values + 0.5).floor().clamp(0, 255)  # a half is rounded up, as by Pillow


def _refuse(what: str) -> None:
    raise ValueError(
        f"{what} is not done on the device; use --augment-on workers, or leave it out. The device does random resized "
        "crops (bilinear, bicubic), flips, RandAugment and AutoAugment without blurring, color jitter without hue, and "
        "grayscale"
    )


def _choice(methods: Any) -> Any:
    return random.choice(methods) if isinstance(methods, (list, tuple)) else methods


def _draw_jitter(step: v1.ColorJitter) -> list[Step]:
    order, *factors, _ = step.get_params(step.brightness, step.contrast, step.saturation, step.hue)
    named = list(zip(("Brightness", "Contrast", "Color"), factors, strict=True))
    return [(named[k][0], (named[k][1],)) for k in order.tolist() if k < 3 and named[k][1] is not None]


def _record(
    name: str, fill: tuple[int, ...], side: int, steps: list[Step], *arguments: float, resample: Any, **_: Any
) -> list[Step]:
    """Take the place of a function that timm's policies call with an image: keep the call instead."""
    if name in GEOMETRY:
        matrix = GEOMETRY[name](side, *arguments)
        steps.append((("affine", "affine, cubic")[_choice(resample) in CUBIC], (*matrix, *map(float, fill))))
    else:
        steps.append((name, arguments))
    return steps


def _rotation(side: int, degrees: float) -> tuple[float, ...]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    center = side / 2
    return cos, -sin, center * (1 - cos + sin), sin, cos, center * (1 - sin - cos)


# Pillow's matrices, from the place of a pixel in the result to that in the image.
GEOMETRY: dict[str, Callable[..., tuple[float, ...]]] = {
    "Rotate": _rotation,
    "ShearX": lambda side, factor: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda side, factor: (1, 0, 0, factor, 1, 0),
    "TranslateX": lambda side, pixels: (1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda side, pixels: (1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda side, part: (1, 0, part * side, 0, 1, 0),
    "TranslateYRel": lambda side, part: (1, 0, 0, 0, 1, part * side),
}


def _affine(images: Tensor, *arguments: Tensor, mode: str) -> Tensor:
    """Move images, (E, C, S, S); the arguments, (E, 1, 1, 1) each, are a matrix's two rows and a color."""
    a, b, c, d, e, f, *fill = (argument[:, 0] for argument in arguments)  # (E, 1, 1) each
    side = images.shape[-1]
    centers = torch.arange(side, device=images.device) + 0.5
    x, y = a * centers + b * centers[:, None] + c, d * centers + e * centers[:, None] + f  # (E, S, S)
    grid = torch.stack([x, y], dim=-1) * (2 / side) - 1
    moved = torch.nn.functional.grid_sample(images.float(), grid, mode=mode, padding_mode="border", align_corners=False)
    inside = ((x >= 0) & (x < side) & (y >= 0) & (y < side))[:, None]
    return _pixels(torch.where(inside, moved, torch.stack(fill, dim=1))).to(torch.uint8)


def _blend(images: Tensor, factor: Tensor, *, dull: Callable[[Tensor], Tensor]) -> Tensor:
    """Move away from, or towards, what torchvision makes of the images at strength 0."""
    other = dull(images).float()
    return (other + factor * (images.float() - other)).clamp(0, 255).to(torch.uint8)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - bits.clamp(max=8))).to(torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: Tensor, amount: Tensor) -> Tensor:
    return torch.where(images < 128, (images + amount).clamp(max=255), images).to(torch.uint8)


STEPS: dict[str, Callable[..., Tensor]] = {
    "affine": partial(_affine, mode="bilinear"),
    "affine, cubic": partial(_affine, mode="bicubic"),
    "AutoContrast": TF.autocontrast,
    "Equalize": TF.equalize,
    "Invert": TF.invert,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
}
STEPS |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)
DULL: dict[str, Callable[[Tensor], Tensor]] = {
    "Brightness": torch.zeros_like,
    "Contrast": partial(TF.adjust_contrast, contrast_factor=0),
    "Color": partial(TF.adjust_saturation, saturation_factor=0),
    "Sharpness": partial(TF.adjust_sharpness, sharpness_factor=0),
}
STEPS |= {f"{name}{end}": partial(_blend, dull=dull) for name, dull in DULL.items() for end in ("", "Increasing")}
