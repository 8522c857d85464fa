"""What a run measures with: the device and the sizes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

NUM_CLASSES = 10
# The paper's models with patches of 16 pixels, and its batch sizes.
ARCHITECTURES = {
    "S": {"patch_size": 16, "num_blocks": 8, "embed_dim": 512},
    "B": {"patch_size": 16, "num_blocks": 12, "embed_dim": 768},
    "L": {"patch_size": 16, "num_blocks": 24, "embed_dim": 1024},
}
BATCHES = {"S": 512, "B": 256, "L": 64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The device, and real or toy sizes.

    Args:
        device: Where to measure.
        toy: One block, few tokens, few repeats: every path in seconds, and no number that means anything.
        workers: Processes of the input pipeline.
        published: A checkout of the published code, or None.
    """

    device: torch.device
    toy: bool
    workers: int
    published: Path | None

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def img_size(self) -> int:
        return 16 if self.toy else 224

    def some(self, problems: Sequence[str]) -> Sequence[str]:
        """Of problems that have no toy size, two."""
        return problems[:2] if self.toy else problems

    @property
    def repeats(self) -> int:
        """Steps of which the median is taken."""
        return 2 if self.toy else 20

    @property
    def warm_up(self) -> int:
        """Steps before those; CUDA graphs are recorded in the fourth."""
        return 5 if self.cuda else 1

    def batch(self, size: str) -> int:
        return 4 if self.toy else BATCHES[size]

    def mixer_args(self, size: str) -> dict[str, Any]:
        """The architecture of the size, by timm's names."""
        toy = {"patch_size": 8, "num_blocks": 1, "embed_dim": 16}
        return {
            "img_size": self.img_size,
            "num_classes": NUM_CLASSES,
            **(toy if self.toy else ARCHITECTURES[size]),
        }
