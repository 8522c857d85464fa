"""Settings that belong together, by name."""

from typing import Any

# Ota and Taki (arXiv:2304.13061), Table 5, on CIFAR-10. The rate is linear in the images per update, 5e-4 for 512.
_PAPER: dict[str, Any] = {
    "dataset": "torch/cifar10",
    "num_classes": 10,
    "img_size": 224,
    "h_ratio": 2.0,
    "n_iter": 2,
    "n_power": 8,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "lr_base": 5e-4,
    "lr_base_size": 512,
    "lr_base_scale": "linear",
    "epochs": 300,
    "cooldown_epochs": 10,
    "sched": "cosine",
    "warmup_epochs": 20,
    "warmup_lr": 1e-6,
    "min_lr": 1e-6,
    "weight_decay": 0.05,
    "crop_pct": 0.875,
    "aa": "rand-m9-mstd0.5-inc1",
    "mixup": 0.8,
    "cutmix": 1.0,
    "reprob": 0.25,
    "remode": "pixel",
    "smoothing": 0.1,
    "amp": True,
    "channels_last": True,
}

# For small images and minutes on a processor.
_SMALL: dict[str, Any] = {
    "model": "imixer_ti4_32",
    "opt": "adamw",
    "lr_base": 3e-3,
    "lr_base_size": 64,
    "weight_decay": 0.05,
    "clip_grad": 1.0,
    "sched": "cosine",
    "sched_on_updates": True,
    "warmup_epochs": 1,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "batch_size": 64,
    "smoothing": 0.1,
    "cache_mb": 512,
    "seed": 0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {**_SMALL, "epochs": 60},
    "cifar10-small": {**_SMALL, "epochs": 12},
    "paper-small": {**_PAPER, "model": "imixer_s16_224", "batch_size": 512, "global_batch": 512, "drop_path": 0.1},
    "paper-base": {**_PAPER, "model": "imixer_b16_224", "batch_size": 256, "global_batch": 256, "drop_path": 0.2},
    "paper-large": {**_PAPER, "model": "imixer_l16_224", "batch_size": 64, "global_batch": 64, "drop_path": 0.3},
}
