"""What an experiment is: arms that differ in one thing, trained with the same seeds, and what is measured on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imixer.reproduction.data_sets import DataSet
from imixer.reproduction.trial import Trial


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of a table.

    Args:
        labels: What stands in the first columns, by the columns' names.
        data: The images.
        settings: Settings of the training, without the seed.
        baseline: Labels of the arm that this one is compared with; None for one that is a baseline itself.
        published: Top-1 accuracy that the paper prints for it, in percent.
    """

    labels: Mapping[str, str]
    data: DataSet
    settings: Mapping[str, Any]
    baseline: Mapping[str, str] | None = None
    published: float | None = None

    @property
    def name(self) -> str:
        """The labels as one line."""
        return ", ".join(f"{column} {value}" if value[:1].isdigit() else value for column, value in self.labels.items())

    def trials(self, seeds: range, place: Mapping[str, Any]) -> dict[int, Trial]:
        """Its trials, by seed."""
        where = {**place, "data_dir": self.data.data_dir}
        return {
            seed: Trial(data=self.data.name, settings={**self.settings, "seed": seed}, place=where) for seed in seeds
        }


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper, or one of this library's own.

    Args:
        name: Its name on the command line.
        title: Its heading.
        question: What it asks, and how to read it, in a few sentences.
        arms: The rows.
        measurements: What is measured on every trained model; see :mod:`imixer.reproduction.measurements`.
        left_out: Arms that cannot run, with the reason.
        num_seeds: Number of seeds, if not the scale's.
    """

    name: str
    title: str
    question: str
    arms: tuple[Arm, ...]
    measurements: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    num_seeds: int | None = None
