"""Augmentation of a batch of small images in one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """Shift, rotate, scale and mirror each image of a batch by its own random amounts.

    torchvision's transforms draw one set of parameters per call, which would move a whole batch alike. Here the random
    numbers are drawn apart from their use: those of a whole data set at once, of which each batch takes its images'.

    Args:
        shift: Largest shift, as a fraction of the image's side, in each direction.
        degrees: Largest rotation, in degrees.
        scale: Largest relative change of size: 0.1 draws factors from 0.9 to 1.1.
        hflip: Probability of mirroring left and right.
        padding_mode: What lies outside the image: "zeros", "border" or "reflection".
    """

    NUM_DRAWS: ClassVar[int] = 5  # random numbers that one image takes

    shift: float = 0.0
    degrees: float = 0.0
    scale: float = 0.0
    hflip: float = 0.0
    padding_mode: str = "zeros"

    def draw(self, num_images: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw what moves `num_images` images: (num_images, NUM_DRAWS), uniform in [0, 1)."""
        return torch.rand(num_images, self.NUM_DRAWS, generator=generator)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return the moved images, (B, C, H, W) like `images`, with the random numbers `draws`, (B, NUM_DRAWS)."""
        angle, zoom, mirror, shift_x, shift_y = draws.unbind(dim=1)  # (B,) each
        angle = torch.deg2rad(self.degrees * _symmetric(angle))
        zoom = 1 + self.scale * _symmetric(zoom)
        mirror = 1 - 2 * (mirror < self.hflip).float()  # -1 mirrors
        # The grid's coordinates run from -1 to 1, so a side is 2 long. Shifts are whole pixels: a fraction of
        # one would blur images that are only a few pixels wide.
        height, width = images.shape[-2:]
        shift_x = torch.round(self.shift * width * _symmetric(shift_x)) * 2 / width
        shift_y = torch.round(self.shift * height * _symmetric(shift_y)) * 2 / height
        cos, sin = zoom * angle.cos(), zoom * angle.sin()
        rows = torch.stack([cos * mirror, -sin, shift_x, sin * mirror, cos, shift_y], dim=1)  # (B, 6)
        grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=self.padding_mode, align_corners=False)


def _symmetric(uniform: Tensor) -> Tensor:
    """Map [0, 1) to [-1, 1)."""
    return 2 * uniform - 1
