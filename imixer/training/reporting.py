"""What is seen of a run while it goes on, by the first process alone: a progress bar or lines, and trackers."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from tqdm import tqdm

from imixer.training.config import TrainingConfig
from imixer.training.run_folder import EpochMetrics

LINE_SECONDS = 60.0  # between lines that say how far a run is, where no bar shows it


def check_trackers(config: TrainingConfig) -> None:
    """Raise a ValueError if a tracker is not installed."""
    available = {str(name) for name in get_available_trackers()}
    for name in config.log_with:
        if name not in available and name != "none":
            raise ValueError(
                f"log_with {name} needs a package that is not installed; install it (pip install {name}), or leave it "
                "out: --log-with none"
            )


class Report:
    """The reports of one process; those of all but the first say nothing.

    Args:
        folder: The run's folder, in which the trackers keep their files.
        config: The settings; trackers other than TensorBoard record them.
        accelerator: The run's.
        progress: Whether the first process shows a progress bar, and prints lines. Where stderr is no terminal, there
            is no bar, and every line begins with the time.

    Attributes:
        seconds: How long the parts of the epoch took so far, by name.
    """

    def __init__(self, folder: Path, config: TrainingConfig, accelerator: Accelerator, *, progress: bool) -> None:
        self.folder = folder
        self.config = config
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._accelerator = accelerator
        self._speaks = accelerator.is_main_process and progress
        self._at_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._process = psutil.Process()
        self._bar: Any = None
        self._last_line = time.monotonic()
        self._trackers = [name for name in config.log_with if name != "none"]

    def start(self, images: int, done: int, updates: int) -> None:
        """Begin to show progress: of so many training images in all, ``done`` of them in ``updates`` updates before."""
        # TensorBoard forgets the points after the checkpoint that a run continues from: they did not happen.
        board = TensorBoardTracker("tensorboard", self.folder, purge_step=updates + 1)
        run = self.folder.name
        self._accelerator.project_configuration.set_directories(str(self.folder))
        self._accelerator.log_with = [board if name == "tensorboard" else name for name in self._trackers]
        self._accelerator.init_trackers(
            "imixer", init_kwargs={"wandb": {"name": run, "dir": str(self.folder)}, "mlflow": {"run_name": run}}
        )
        settings = {name: _plain(value) for name, value in asdict(self.config).items()}
        for tracker in self._accelerator.trackers:
            if tracker.name != "tensorboard":  # where it would be a run of its own
                tracker.store_init_configuration(settings)
        self._total, self._done = images, done
        self._bar = tqdm(
            total=images,
            initial=done,
            unit=" images",
            unit_scale=True,
            smoothing=0.1,
            disable=not (self._speaks and self._at_terminal),
        )

    def say(self, text: str) -> None:
        """Print a line, above the progress bar or after the time."""
        try:
            if self._speaks and self._at_terminal:
                tqdm.write(text)
            elif self._speaks:
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                print("\n".join(f"{now} {line}" for line in text.splitlines()), flush=True)
                self._last_line = time.monotonic()
        except OSError:  # of a pipe that nobody reads, or a full disk; the run goes on, and its files tell the same
            self._speaks, sys.stdout = False, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def update(self, images: int, **shown: str) -> None:
        """Count the images of one update, and show something beside the bar."""
        self._done += images
        if not self._bar.disable:
            self._bar.set_postfix({**shown, "memory": f"{self._memory_gb():.1f} GB"}, refresh=False)
            self._bar.update(images)
        elif self._speaks and time.monotonic() - self._last_line >= LINE_SECONDS:
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"{self._done:,} of {self._total:,} images  {numbers}  memory {self._memory_gb():.1f} GB")

    def log(self, values: dict[str, float], step: int) -> None:
        """Write points of curves, after so many updates, to the trackers."""
        self._accelerator.log(values, step=step)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Inside, the time counts as that of a part of the epoch."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - started

    def epoch(self, row: EpochMetrics, num_epochs: int, imlps: list[dict[str, Any]], updates: int) -> None:
        """Report the end of an epoch, and where its time went."""
        self.say(f"epoch {row.epoch:>3}/{num_epochs}  {row.summary()}")
        shown = {"test/loss": row.test_loss, "test/top1": row.test_top1, "test/top5": row.test_top5}
        if row.ema_top1 is not None:
            shown["test/ema_top1"] = row.ema_top1
        for imlp in imlps:
            numbers = {name: value for name, value in imlp.items() if isinstance(value, (int, float))}
            shown |= {f"{imlp['name']}/{name}": value for name, value in numbers.items() if name != "epoch"}
        shown |= {f"seconds/{part}": seconds for part, seconds in self.seconds.items()}
        self.log(shown, updates)
        self.seconds.clear()

    def _memory_gb(self) -> float:
        """The most memory of the GPU that was in use at once, or this process's memory."""
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() / 2**30
        return float(self._process.memory_info().rss) / 2**30

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []


def _plain(value: Any) -> Any:
    """A setting as trackers take it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else value
