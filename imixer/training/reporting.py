"""What is seen of a run while it goes on, by the first process alone: a progress bar, lines, TensorBoard."""

from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from imixer.training.run_folder import EpochMetrics


class Report:
    """The reports of one process; those of all but the first say nothing.

    Args:
        folder: The run's folder; TensorBoard's files go to a folder in it.
        first: Whether this is the first process.
        progress: Whether it shows a progress bar, and prints lines.
    """

    def __init__(self, folder: Path, *, first: bool, progress: bool) -> None:
        self.folder = folder
        self.first = first
        self.speaks = first and progress
        self._process = psutil.Process()
        self._bar: Any = None
        self._writer: Any = None

    def start(self, images: int, done: int, updates: int) -> None:
        """Begin to show progress: of so many training images in all, ``done`` of them in ``updates`` updates before."""
        if self.first:
            # What was written after the checkpoint that a run continues from did not happen.
            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=updates)
        self._bar = tqdm(
            total=images, initial=done, unit=" images", unit_scale=True, smoothing=0.1, disable=not self.speaks
        )

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.speaks:
            tqdm.write(text)

    def update(self, images: int, **shown: str) -> None:
        """Count the images of one update, and show something beside the bar."""
        self._bar.set_postfix({**shown, "memory": f"{self._memory_gb():.1f} GB"} if self.speaks else {}, refresh=False)
        self._bar.update(images)

    def write(self, values: dict[str, float], updates: int) -> None:
        """Write points of curves to TensorBoard."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, updates)

    def epoch(self, row: EpochMetrics, num_epochs: int, imlps: list[dict[str, Any]], updates: int) -> None:
        """Report the end of an epoch."""
        self.say(f"epoch {row.epoch:>3}/{num_epochs}  {row.summary()}")
        shown = {"test/loss": row.test_loss, "test/top1": row.test_top1, "test/top5": row.test_top5}
        if row.ema_top1 is not None:
            shown["test/ema_top1"] = row.ema_top1
        for imlp in imlps:
            numbers = {name: value for name, value in imlp.items() if isinstance(value, (int, float))}
            shown |= {f"{imlp['name']}/{name}": value for name, value in numbers.items() if name != "epoch"}
        self.write(shown, updates)
        if self._writer is not None:
            self._writer.flush()

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
        if self._writer is not None:
            self._writer.close()
