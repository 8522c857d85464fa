"""The settings of a training run."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass

from timm.optim import list_optimizers

SCHEDULERS = ("cosine", "tanh", "poly", "step", "constant")
AMP_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}  # torch's names and Accelerate's
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that a training run depends on, besides the images.

    `None` stands for the model's own value, in `img_size` to `drop_path`.

    Args:
        data_dir: Folder of images with `train` and `test` (or `val`) splits; None is scikit-learn's digits.
        hflip: Probability of mirroring a training image of `data_dir` left and right.
        no_aug: Leave the training images as they are.
        cache_mb: Decode the images once if they fit in this many MiB, else read them anew in every epoch.
        workers: Processes that read images from disk, for data that does not fit in `cache_mb`.
        model: Name in timm's registry.
        img_size: Side of the images, in pixels.
        patch_size: Side of the patches that become tokens, in pixels.
        num_blocks: Number of mixer blocks.
        embed_dim: Channels of a token.
        h_ratio: Inner width of the iMLP's map, relative to the width of its state.
        n_iter: Fixed-point steps of each iMLP (at most, if `rtol` is set).
        n_power: Power iterations of the spectral normalization.
        coeff: Bound that the spectral normalization puts on each weight.
        solver: Fixed-point solver of each iMLP.
        backward: How gradients are taken through the fixed point.
        rtol: Relative tolerance at which a solve ends early.
        drop_path: Stochastic depth rate.
        opt: Optimizer, by timm's name.
        lr: Peak learning rate.
        weight_decay: Weight decay of weight matrices; biases and norms have none.
        clip_grad: Largest norm of the gradient of all weights together; 0 does not clip.
        sched: Learning rate schedule, stepped at every update.
        epochs: Passes over the training images, warm-up included.
        warmup_epochs: Epochs of linear warm-up from `warmup_lr`.
        warmup_lr: Learning rate at the first update.
        min_lr: Learning rate at the end.
        batch_size: Images per update.
        smoothing: Label smoothing of the training loss.
        seed: Seed of the initial weights, the order and the augmentation of the images.
        device: "auto", "cpu" or "cuda".
        amp: Whether to compute in mixed precision.
        amp_dtype: Its lower precision: "bfloat16", or "float16" with loss scaling, on CUDA alone.
        output: Folder for the run's files; None is a folder of `runs` named after data and model.

    Raises:
        ValueError: A value is out of its range.
    """

    data_dir: str | None = None
    hflip: float = 0.5
    no_aug: bool = False
    cache_mb: int = 512
    workers: int = 2
    model: str = "imixer_ti4_32"
    img_size: int | None = None
    patch_size: int | None = None
    num_blocks: int | None = None
    embed_dim: int | None = None
    h_ratio: float | None = None
    n_iter: int | None = None
    n_power: int | None = None
    coeff: float | None = None
    solver: str | None = None
    backward: str | None = None
    rtol: float | None = None
    drop_path: float | None = None
    opt: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.05
    clip_grad: float = 1.0
    sched: str = "cosine"
    epochs: int = 60
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    min_lr: float = 1e-5
    batch_size: int = 64
    smoothing: float = 0.1
    seed: int = 0
    device: str = "auto"
    amp: bool = False
    amp_dtype: str = "bfloat16"
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "num_blocks", "embed_dim", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        not_negative = ("workers", "cache_mb", "seed", "weight_decay", "clip_grad", "warmup_epochs")
        for name in (*not_negative, "warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("smoothing", "drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, not {self.lr}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is a probability, from 0 to 1, not {self.hflip}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs counts as part of epochs, but is {self.warmup_epochs} of {self.epochs} epochs"
            )
        choices: dict[str, Collection[str]] = {
            "device": DEVICES,
            "amp_dtype": AMP_DTYPES,
            "sched": SCHEDULERS,
            "opt": [str(name) for name in list_optimizers()],
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                near = difflib.get_close_matches(getattr(self, name), known, n=5) if len(known) > 10 else []
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; known are {', '.join(near or known)}")
