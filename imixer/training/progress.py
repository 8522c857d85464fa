"""Where a run stands."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from imixer.training.run_folder import EpochMetrics, write_json, write_rows


@dataclass(kw_only=True)
class Progress:
    """Where a run stands, in plain values; a checkpoint holds it.

    Args:
        epoch: Epochs that are finished and tested.
        step: Batches of the epoch after them that are done.
        updates: Updates of the weights in all, the ones left out counted.
        nonfinite: Updates of this epoch that were left out, for a loss or gradient that was not finite.
        nonfinite_in_row: Of these, the ones since the last good update.
        loss_sum: Sum of the finite losses of this epoch, of the updates.
        num_losses: How many these are.
        lr: Learning rate of the last update.
        seconds: Time spent in training, over all its parts.
        metrics: A row for each finished epoch.
        imlps: A row for each of them and each iMLP.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    nonfinite: int = 0
    nonfinite_in_row: int = 0
    loss_sum: float = 0.0
    num_losses: int = 0
    lr: float = 0.0
    seconds: float = 0.0
    metrics: list[EpochMetrics] = field(default_factory=list)
    imlps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def best(self) -> EpochMetrics | None:
        """The epoch with the highest test accuracy; the first of equal ones."""
        return max(self.metrics, key=lambda row: row.score, default=None)

    @property
    def train_loss(self) -> float:
        """Mean loss of the epoch so far; NaN if none was finite."""
        return self.loss_sum / self.num_losses if self.num_losses else float("nan")

    def count(self, step: int, loss: float, *, finite: bool, lr: float) -> None:
        """Count an update, after which so many steps of the epoch are done."""
        self.step, self.lr = step, lr
        self.updates += 1
        self.nonfinite_in_row = 0 if finite else self.nonfinite_in_row + 1
        if finite:
            self.loss_sum += loss
            self.num_losses += 1
        else:
            self.nonfinite += 1

    def finish_epoch(self, row: EpochMetrics, imlps: list[dict[str, Any]]) -> None:
        """Go on to the next epoch."""
        self.metrics.append(row)
        self.imlps += [{"epoch": row.epoch, **imlp} for imlp in imlps]
        self.epoch += 1
        self.step = self.nonfinite = self.num_losses = 0
        self.loss_sum = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """The progress that `as_dict` described. A row of failed updates starts anew.

        Raises:
            KeyError, TypeError: The values are not such a description.
        """
        known = {item.name: item.default for item in fields(cls)}
        for name, value in values.items():
            if isinstance(known.get(name), (int, float)) and not isinstance(value, (int, float)):
                raise TypeError(f"{name} is {value!r}")
        progress = cls(**{name: value for name, value in values.items() if name in known})
        progress.metrics = [EpochMetrics(**row) for row in values["metrics"]]
        progress.nonfinite_in_row = 0
        return progress


def write_results(folder: Path, at: Progress, about: dict[str, Any]) -> None:
    """Write what the run showed so far, ``curves.csv`` and ``convergence.csv``, and with ``about`` ``summary.json``."""
    write_rows(folder / "curves.csv", [asdict(row) for row in at.metrics])
    if at.imlps:
        write_rows(folder / "convergence.csv", at.imlps)
    assert at.best is not None
    summary = {
        "epochs": at.epoch,
        "updates": at.updates,
        "seconds": round(at.seconds, 2),
        "best": asdict(at.best),
        "last": asdict(at.metrics[-1]),
        "nonfinite_updates": sum(row.nonfinite for row in at.metrics),
    }
    write_json(folder / "summary.json", {**summary, **about})
