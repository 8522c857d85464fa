"""The output folder of a training run.

- `config.json`: the settings of the run;
- `curves.csv`: one row per epoch;
- `checkpoint.pt`: the weights after the last finished epoch, for `timm.create_model(...,
  checkpoint_path=...)`;
- `curves.png`: the plot of `curves.csv`.

Every file is replaced in one step, so that a run stopped at any moment leaves whole files of its last
finished epoch.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from imixer.data import ImageData
from imixer.training_config import TrainingConfig

RUN_FILES = ("config.json", "curves.csv", "checkpoint.pt", "curves.png")


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What one epoch showed: a row of `curves.csv`.

    Args:
        epoch: Number of the epoch, from 1.
        lr: Learning rate of its last update.
        train_loss: Mean over its updates of the loss that is minimized (label smoothing, augmented images).
        test_loss: Mean cross-entropy on the test images.
        test_top1: Test accuracy, in percent.
        seconds: Time since the start of the training.
    """

    epoch: int
    lr: float
    train_loss: float
    test_loss: float
    test_top1: float
    seconds: float

    def summary(self) -> str:
        """Return the numbers as one line of text."""
        return (
            f"train loss {self.train_loss:.4f}  test loss {self.test_loss:.4f}  "
            f"test top-1 {self.test_top1:.2f}%  lr {self.lr:.2e}  {self.seconds:.0f} s"
        )


def prepare_output(config: TrainingConfig, data: ImageData, say: Callable[[str], None]) -> Path:
    """Make the run's folder and write the settings there, so that one that cannot be written fails early.

    A folder that holds a run of the same settings is used again. One of another run is left alone: the
    default name gets a number, and a chosen one is refused.
    """
    settings = asdict(config)
    del settings["output"]
    if config.output is not None:
        output = Path(config.output)
        difference = _difference_to_run_in(output, settings)
        if difference:
            raise ValueError(f"{output} holds another run ({difference}); choose another --output or remove it")
    else:
        base = Path("runs") / f"{data.name}-{config.model}"
        output, number = base, 1
        while _difference_to_run_in(output, settings):
            number += 1
            output = base.with_name(f"{base.name}-{number}")
        if number > 1:
            say(f"{base} holds a run with other settings, which stays")
    if _has_run(output):
        say(f"{output} holds an earlier run with the same settings, which this one replaces")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (output / name).unlink(missing_ok=True)
        write_atomically(output / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
    except OSError as error:
        raise OSError(f"cannot write to the output folder {output}: {error}; choose another --output") from error
    return output


def _has_run(output: Path) -> bool:
    # os.path's function is false for a folder that may not be looked into, where Path's raises.
    return any(os.path.exists(output / name) for name in RUN_FILES)


def _difference_to_run_in(output: Path, settings: dict[str, Any]) -> str:
    """Say how the run in a folder differs from `settings`; empty if there is none, or none that differs."""
    if not _has_run(output):
        return ""
    try:
        found = dict(json.loads((output / "config.json").read_text()))
    except (OSError, TypeError, ValueError):
        return "its config.json is missing or unreadable"
    names = [name for name in settings if found.get(name) != settings[name]]
    return ", ".join(f"{name} {found.get(name)} there, {settings[name]} here" for name in names)


def save_checkpoint(
    path: Path,
    weights: dict[str, Tensor],
    *,
    config: TrainingConfig,
    model_args: dict[str, Any],
    data: ImageData,
    metrics: EpochMetrics,
) -> None:
    """Save weights and what is needed to use them, in tensors and plain Python values alone.

    `timm.create_model(checkpoint["model"], checkpoint_path=path, **checkpoint["model_args"])` rebuilds the
    model. `torch.load(path, weights_only=True)` gives the rest: `classes`, `mean` and `std` of the images,
    `metrics`.
    """
    checkpoint = {
        "state_dict": {name: tensor.detach().cpu() for name, tensor in weights.items()},
        "model": config.model,
        "model_args": model_args,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "epoch": metrics.epoch,
        "metrics": asdict(metrics),
        "config": asdict(config),
        "versions": {"torch": str(torch.__version__), "timm": str(timm.__version__)},
    }
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(path, buffer.getbuffer())


def write_curves(path: Path, metrics: list[EpochMetrics]) -> None:
    """Write one CSV row per epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(EpochMetrics)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in metrics)
    write_atomically(path, text.getvalue().encode())


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file in one step: readers, and a crash at any moment, see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
