"""What is minimized: timm's losses, on images that the loader mixes by timm's Mixup."""

import numpy as np
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from imixer.training.config import TrainingConfig


def make_mixup(config: TrainingConfig, num_classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix for the loader, or None if both are off."""
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def make_loss(config: TrainingConfig) -> nn.Module:
    """Return the training loss. Mixed targets are soft and smoothed already."""
    if config.bce_loss:
        # It smooths classes, and leaves soft targets alone.
        loss: nn.Module = BinaryCrossEntropy(config.smoothing, target_threshold=config.bce_target_thresh)
    elif config.mixes:
        loss = SoftTargetCrossEntropy()
    elif config.smoothing:
        loss = LabelSmoothingCrossEntropy(config.smoothing)
    else:
        loss = nn.CrossEntropyLoss()
    return loss


def seed_step(seed: int, epoch: int, step: int, rank: int) -> None:
    """Make all that is random in one step of one process, such as dropout, a function of its place in the run.

    No state of a random number generator has to be carried from step to step, or into a checkpoint.
    """
    set_seed(int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1)[0]))
