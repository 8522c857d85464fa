"""Random erasing by timm's rule: boxes are drawn beside the image, on the CPU, and filled on the device."""

from __future__ import annotations

import random
from functools import cache
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from imixer.data.random_streams import generator_of

NOISE_STARTS = 2**20  # number of places at which the noise of an image may start


class Erased(NamedTuple):
    """What random erasing does to a batch.

    Args:
        rows: Numbers of the erased images in the batch, (E,).
        boxes: Their top, bottom, left and right edges, (E, K, 4), in pixels; unused boxes are empty.
        starts: Where the noise of each image starts in the common store of noise, (E,).
    """

    rows: Tensor
    boxes: Tensor
    starts: Tensor


class BoxErasing:
    """timm's `RandomErasing` in two parts, so that a GPU need not be told about each image by itself.

    Normal noise is read from one store, at a random start for each image. Therefore an image looks the same in any
    batch and on any device.

    Args:
        probability: Probability that an image is erased.
        mode: What erases: "const" (zero, which is the mean), "rand" (one color for each box) or "pixel" (noise).
        max_count: Largest number of boxes in an image.

    Raises:
        AssertionError: timm does not know the mode.
    """

    def __init__(self, probability: float, *, mode: str, max_count: int) -> None:
        RandomErasing(probability, mode=mode, max_count=max_count, device="cpu")  # raises for an unknown mode
        self.mode = mode.lower() or "const"
        self.max_count = max_count
        self._draw_boxes = RandomErasing(probability, mode="const", max_count=max_count, device="cpu")

    def draw(self, height: int, width: int) -> tuple[list[tuple[int, ...]], int] | None:
        """Draw boxes and the start of the noise for one image from Python's generator; None leaves it as it is."""
        canvas = _BoxRecorder(height, width)
        self._draw_boxes(canvas)
        if not canvas.boxes:
            return None
        unused = [(0, 0, 0, 0)] * (self.max_count - len(canvas.boxes))
        return canvas.boxes + unused, random.randrange(NOISE_STARTS)

    def __call__(self, images: Tensor, erased: Erased) -> Tensor:
        """Erase boxes of normalized images, (B, C, H, W), in place."""
        rows, boxes, starts = erased
        channels, height, width = images.shape[1:]
        chosen = images[rows]  # (E, C, H, W)
        windows = _noise(NOISE_STARTS + chosen[0].numel(), images.device).unfold(0, chosen[0].numel(), 1)
        noise = windows[starts].view_as(chosen)
        y = torch.arange(height, device=images.device)[:, None]  # (H, 1)
        x = torch.arange(width, device=images.device)  # (W,)
        for slot in range(self.max_count):
            top, bottom, left, right = boxes[:, slot, :, None, None, None].unbind(1)  # (E, 1, 1, 1) each
            inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # (E, 1, H, W)
            if self.mode == "pixel":
                fill = noise
            elif self.mode == "rand":
                fill = noise.flatten(2)[..., slot].view(-1, channels, 1, 1)
            else:
                fill = noise.new_zeros(())
            chosen = torch.where(inside, fill, chosen)
        images[rows] = chosen
        return images


class _BoxRecorder:
    """Takes the place of the image that timm's `RandomErasing` writes boxes into, and keeps their edges."""

    dtype = torch.uint8

    def __init__(self, height: int, width: int) -> None:
        self.shape = (1, height, width)
        self.boxes: list[tuple[int, ...]] = []

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, place: Any, value: Tensor) -> None:
        _, rows, columns = place
        self.boxes.append((rows.start, rows.stop, columns.start, columns.stop))


@cache
def _noise(length: int, device: torch.device) -> Tensor:
    return torch.randn(length, generator=generator_of("noise")).to(device)
