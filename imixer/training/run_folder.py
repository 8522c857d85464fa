"""The output folder of a training run.

- ``config.yaml``: the settings, for ``--config``; ``environment.json``: versions and git commit;
- ``last.pt``, ``previous.pt``, ``best.pt``: see :mod:`imixer.training.checkpoints`;
- ``curves.csv``: one row per epoch; ``curves.png``: its plot; ``convergence.csv``: one row per epoch and iMLP;
- ``summary.json``: the run in short; ``tensorboard/``: the curves as they grow;
- ``solves.csv``: see :mod:`imixer.training.solve_statistics`;
- ``.lock``: which process writes here, see :mod:`imixer.training.folder_lock`.

Every file but TensorBoard's and ``solves.csv`` is replaced in one step, so that a run stopped at any moment leaves
whole files.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from imixer.training.checkpoints import holds_run, remove_unfinished, write_atomically
from imixer.training.command_line import write_settings
from imixer.training.config import TrainingConfig
from imixer.training.folder_lock import LOCK, FolderInUseError, locked


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """What one epoch showed: a row of `curves.csv`.

    Args:
        epoch: Number of the epoch, from 1.
        lr: Learning rate of its last update.
        train_loss: Mean over its batches of the loss that is minimized (augmented images, soft targets).
        test_loss: Mean cross-entropy on the test images.
        test_top1: Test accuracy, in percent.
        test_top5: Percentage of test images whose class is among the five most likely.
        ema_top1: Test accuracy of the averaged weights, if there are any.
        nonfinite: Updates of the epoch that were left out, for a loss or gradient that was not finite.
        images_per_second: Training images per second, of all processes together.
        seconds: Time since the start of the training, over all its parts.
    """

    epoch: int
    lr: float
    train_loss: float
    test_loss: float
    test_top1: float
    test_top5: float
    ema_top1: float | None
    nonfinite: int
    images_per_second: float
    seconds: float

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: the accuracy of the averaged weights if there are any."""
        return self.test_top1 if self.ema_top1 is None else self.ema_top1

    def summary(self) -> str:
        """Return the numbers as one line of text."""
        ema = "" if self.ema_top1 is None else f"  averaged {self.ema_top1:.2f}%"
        nonfinite = f"  {self.nonfinite} updates not finite" if self.nonfinite else ""
        return (
            f"train loss {self.train_loss:.4f}  test loss {self.test_loss:.4f}  test top-1 {self.test_top1:.2f}%{ema}  "
            f"lr {self.lr:.2e}{nonfinite}  {self.images_per_second:,.0f} images/s  {self.seconds:.0f} s"
        )


@contextlib.contextmanager
def claimed_new_folder(config: TrainingConfig, data_name: str) -> Iterator[Path]:
    """Claim the folder of a new run, for as long as the context lasts. One that holds a run is never used again.

    Raises:
        ValueError: The folder asked for holds a run.
        FolderInUseError: Another process writes into the folder asked for.
        OSError: It cannot be written.
    """
    asked_for = config.output is not None
    base = Path(config.output) if config.output is not None else Path("runs") / f"{data_name}-{config.model}"
    with contextlib.ExitStack() as stack:
        for number in itertools.count(1):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with contextlib.ExitStack() as claim:
                try:
                    # That another process is at work in the one asked for says more than that it holds a run.
                    if not holds_run(folder) or (asked_for and (folder / LOCK).exists()):
                        claim.enter_context(claimed(folder))
                except FolderInUseError:
                    if asked_for:
                        raise
                    continue
                # Another run may have begun and ended there before this one had the lock.
                if not holds_run(folder):
                    stack.push(claim.pop_all())
                    break
            if asked_for:
                raise ValueError(
                    f"{folder} holds a run; continue it with --resume {folder}, or choose another --output"
                )
        yield folder


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Make the folder, and hold its lock for as long as the context lasts. One that stays empty is removed again.

    Raises:
        FolderInUseError: Another process holds it.
        OSError: It cannot be written.
    """
    is_new = not os.path.exists(folder)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder))
        except FolderInUseError:
            raise
        except OSError as error:
            raise cannot_write(folder, error) from error
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                if is_new and os.listdir(folder) == [LOCK]:  # the run failed before it began
                    (folder / LOCK).unlink()
                    folder.rmdir()


def prepare_folder(folder: Path, config: TrainingConfig) -> None:
    """Write the settings, so that a folder that cannot be written fails before the training.

    Raises:
        OSError: It cannot be written.
    """
    try:
        remove_unfinished(folder)
        write_atomically(folder / "config.yaml", write_settings(config).encode())
        write_json(folder / "environment.json", environment())
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(folder: Path, error: OSError) -> OSError:
    """The error for a folder that cannot be written, with what to do."""
    return OSError(f"cannot write to the output folder {folder}: {error}; choose another --output")


def environment() -> dict[str, Any]:
    """What a run depends on besides its settings: versions, threads, commit of the code, machine."""
    packages = ("implicit-layers", "torchvision", "timm", "accelerate", "numpy", "pillow")
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # used from a checkout
            versions[package] = "not installed"
    return {
        "versions": versions,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "machine": platform.platform(),
        "command": sys.argv,
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV file; the columns are those of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def _git_commit() -> str | None:
    """The commit of this code, with `+` for changes since; None outside of a repository."""

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
