"""Testing a model on images that are shared out over the processes."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from imixer.data import ImageBatch


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on test images.

    Args:
        loss: Mean cross-entropy.
        top1: Percentage of images whose class is the most likely one.
        top5: Percentage of images whose class is among the five most likely.
    """

    loss: float
    top1: float
    top5: float


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[ImageBatch], accelerator: Accelerator | None = None) -> Evaluation:
    """Test `model`, which is left in eval mode.

    Every image counts once, however the processes share them: sums are added up over the processes before they are
    divided by the true number of images.

    Args:
        model: A classifier, without the wrapper of data-parallel training.
        loader: This process's share of the images.
        accelerator: The run's, for its precision and its processes; None is one process in the model's precision.
    """
    model.eval()
    device = next(model.parameters()).device
    autocast: AbstractContextManager[object] = accelerator.autocast() if accelerator is not None else nullcontext()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    num_images = 0
    with autocast:
        for images, targets in loader:
            targets = targets.to(device, non_blocking=True)
            logits = model(images.to(device, non_blocking=True)).float()  # (B, classes)
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5), the likeliest first
            sums[:3] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
            num_images += len(targets)
    sums[3] = num_images
    if accelerator is not None:
        sums = accelerator.reduce(sums, "sum")
    loss, top1, top5, total = sums.tolist()
    return Evaluation(loss=loss / total, top1=100 * top1 / total, top5=100 * top5 / total)
