"""The ranges of the settings that are numbers, and of the paths that must not be empty."""

import math
from collections.abc import Callable, Mapping
from typing import Any

AT_LEAST_1 = (
    "num_classes",
    "img_size",
    "patch_size",
    "num_blocks",
    "embed_dim",
    "epochs",
    "batch_size",
    "validation_batch_size",
    "grad_accum_steps",
    "global_batch",
    "lr_base_size",
    "log_interval",
    "report_interval",
    "max_nonfinite",
)
NOT_NEGATIVE = (
    "workers",
    "cache_mb",
    "weight_decay",
    "clip_grad",
    "warmup_epochs",
    "cooldown_epochs",
    "decay_milestones",
    "decay_rate",
    "warmup_lr",
    "min_lr",
    "color_jitter",
    "recount",
    "mixup",
    "cutmix",
    "mixup_off_epoch",
)
BELOW_1 = ("smoothing", "drop", "drop_path", "model_ema_decay")
PROBABILITIES = (
    "hflip",
    "vflip",
    "color_jitter_prob",
    "grayscale_prob",
    "gaussian_blur_prob",
    "reprob",
    "mixup_prob",
    "mixup_switch_prob",
    "bce_target_thresh",
)
POSITIVE = ("lr", "lr_base", "layer_decay", "decay_epochs", "scale", "ratio", "crop_pct", "std")
MAY_BE_INFINITE = ("clip_grad",)
RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (AT_LEAST_1, lambda value: value >= 1, "must be at least 1, not"),
    (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative, but is"),
    (BELOW_1, lambda value: 0 <= value < 1, "must be at least 0 and below 1, not"),
    (PROBABILITIES, lambda value: 0 <= value <= 1, "is a probability, from 0 to 1, not"),
    (POSITIVE, lambda value: 0 < value < math.inf, "must be positive and finite, not"),
    (("cutmix_minmax",), lambda value: 0 <= value <= 1, "must be parts of the image's side, from 0 to 1, not"),
    (("seed",), lambda value: 0 <= value < 2**32, "must be from 0 to 4294967295, not"),
)
PAIRS = ("scale", "ratio", "cutmix_minmax")
CHANNELS = ("mean", "std")


def check_ranges(settings: Mapping[str, Any]) -> None:
    """Check the numbers and the paths of a configuration.

    Args:
        settings: The values of all settings, by name.

    Raises:
        ValueError: One is out of its range; the message says which.
    """
    numbers = {name: _numbers(value) for name, value in settings.items()}
    for name, values in numbers.items():
        if any(value != value for value in values):
            raise ValueError(f"{name} must be a number, not nan")
    for names, fits, complaint in RANGES:
        for name in names:
            for value in numbers[name]:
                if not fits(value):
                    raise ValueError(f"{name} {complaint} {value}")
    for name, values in numbers.items():
        if name not in MAY_BE_INFINITE and any(abs(value) == math.inf for value in values):
            raise ValueError(f"{name} must be finite, not {_text(values)}")
    for name in PAIRS:
        value = settings[name]
        if value is not None and not (len(value) == 2 and value[0] <= value[1]):
            raise ValueError(f"{name} must be the least and the largest value, such as 0.2 0.8, not {_text(value)}")
    if settings["cutmix_minmax"] is not None and len({*settings["cutmix_minmax"]}) == 1:
        raise ValueError(f"cutmix_minmax must be two different numbers, not {_text(settings['cutmix_minmax'])}")
    for name in CHANNELS:
        value = settings[name]
        if value is not None and len(value) not in (1, 3):
            raise ValueError(f"{name} must be one number, or one for each of 3 channels, not {_text(value)}")
    for name in ("data_dir", "output"):
        if settings[name] is not None and not str(settings[name]).strip():
            raise ValueError(f"{name} is empty; give a folder, or set the variable of the shell that holds it")


def _numbers(value: Any) -> tuple[float, ...]:
    """The numbers of a setting: none, one, or several."""
    entries = value if isinstance(value, tuple) else (value,)
    return tuple(entry for entry in entries if isinstance(entry, (int, float)))


def _text(values: tuple[float, ...]) -> str:
    return " ".join(map(str, values)) or "no number"
