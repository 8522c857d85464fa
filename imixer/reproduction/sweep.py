"""A sweep: experiments at a scale on the images of a folder, and where their results are."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imixer.reproduction import ablations, paper
from imixer.reproduction.data_sets import find_data_sets
from imixer.reproduction.experiments import Experiment
from imixer.reproduction.run_trial import Task
from imixer.reproduction.scales import SCALES, Scale
from imixer.reproduction.trial import Trial, read_json, replace_file

EXPERIMENTS = {
    "table1": paper.table1,
    "table2": paper.table2,
    "table3": paper.table3,
    "table4": paper.table4,
    "figure3": paper.figure3,
    "feature-maps": paper.feature_maps,
    "solvers": ablations.solvers,
    "depth": ablations.depth,
    "inference-steps": ablations.inference_steps,
    "certified": ablations.certified,
}
SETTINGS = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to run, at which scale, on which images.

    Args:
        output: Folder of the results.
        scale: Name in :data:`imixer.reproduction.scales.SCALES`.
        names: Names of the experiments.
        data_dir: Folder of the images; None for scikit-learn's digits.
        num_seeds: Number of seeds to run, from 0; None for those of the scale.
        device: As :class:`imixer.training.TrainingConfig` takes it.
        workers: Processes of each trial that read images, where they are not held in memory.
        identifier: The same in all processes of the sweep.
    """

    output: Path
    scale: str
    names: tuple[str, ...]
    data_dir: Path | None = None
    num_seeds: int | None = None
    device: str = "auto"
    workers: int = 2
    identifier: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in EXPERIMENTS:
                raise ValueError(f"unknown experiment {name!r}; known are {', '.join(EXPERIMENTS)}, and all")
        if self.scale not in SCALES:
            raise ValueError(f"unknown scale {self.scale!r}; known are {', '.join(SCALES)}")
        if self.num_seeds is not None and self.num_seeds < 1:
            raise ValueError(f"the number of seeds must be at least 1, not {self.num_seeds}")
        if self.workers < 0:
            raise ValueError(f"the number of workers must not be negative, but is {self.workers}")

    @property
    def sizes(self) -> Scale:
        """The scale itself."""
        return SCALES[self.scale]

    def seeds(self, experiment: Experiment) -> range:
        """The seeds that an experiment is run with."""
        return range(self.num_seeds or experiment.num_seeds or self.sizes.seeds)

    def seeds_of_tables(self, experiment: Experiment) -> range:
        """All seeds that an experiment was ever run with in the output folder; of a new folder, those of this sweep."""
        noted = (read_settings(self.output) or {}).get("seeds", {})
        return range(noted.get(experiment.name) or len(self.seeds(experiment)))

    def with_all_names(self) -> "Sweep":
        """The same with all experiments that were run in the output folder."""
        before = (read_settings(self.output) or {}).get("names", ())
        return replace(self, names=tuple(name for name in EXPERIMENTS if name in {*before, *self.names}))

    @property
    def place(self) -> dict[str, Any]:
        """Settings of all trials that say where they run."""
        return {"device": self.device, "workers": self.workers}

    def experiments(self) -> list[Experiment]:
        """The experiments, in the order of :data:`EXPERIMENTS`.

        Raises:
            FileNotFoundError: The images are not there.
        """
        data_sets = find_data_sets(self.data_dir)
        return [make(self.sizes, data_sets) for name, make in EXPERIMENTS.items() if name in self.names]

    def tasks(self) -> list[Task]:
        """The trials of all experiments, each once, with all that is measured on it.

        All arms of a seed come before the next seed, so that tables fill evenly.
        """
        measurements: dict[str, set[str]] = {}
        trials: dict[str, Trial] = {}
        experiments = self.experiments()
        for seed in range(max(len(self.seeds(experiment)) for experiment in experiments)):
            for experiment in experiments:
                if seed not in self.seeds(experiment):
                    continue
                for arm in experiment.arms:
                    trial = arm.trials(range(seed, seed + 1), self.place)[seed]
                    trials.setdefault(trial.name, trial)
                    measurements.setdefault(trial.name, set()).update(experiment.measurements)
        return [
            Task(trial=trial, measurements=tuple(sorted(measurements[name])), test_steps=self.sizes.test_steps)
            for name, trial in trials.items()
        ]

    def check(self) -> dict[str, Any]:
        """Compare the sweep with what the output folder holds.

        Returns:
            What belongs to the folder, this sweep included, for :meth:`save`.

        Raises:
            ValueError: The folder holds results at another scale, on other data sets or on other images.
            OSError: The images cannot be read.
        """
        before = read_settings(self.output) or {}
        here = {"scale": self.scale, "data_sets": [data.name for data in find_data_sets(self.data_dir)]}
        for what, value in here.items():
            if before.get(what, value) != value:
                raise ValueError(
                    f"{self.output} holds results with {what} {before[what]}, not {value}; choose another --output"
                )
        experiments, images, seeds = self.experiments(), before.get("images", {}), before.get("seeds", {})
        used = {arm.data.name: arm.data for experiment in experiments for arm in experiment.arms}
        for name, data in used.items():
            found = data.fingerprint()
            if images.setdefault(name, found) != found:
                raise ValueError(
                    f"{self.output} holds results on other images than those of {name} in {self.data_dir}; choose "
                    "another --output"
                )
        for experiment in experiments:
            seeds[experiment.name] = max(len(self.seeds(experiment)), seeds.get(experiment.name, 0))
        data_dir = None if self.data_dir is None else str(self.data_dir)
        return here | {"names": self.with_all_names().names, "data_dir": data_dir, "seeds": seeds, "images": images}

    def save(self) -> None:
        """Note in the output folder what belongs to it, together with the experiments that were run there before.

        Raises:
            ValueError, OSError: As :meth:`check`, or the folder cannot be written.
        """
        replace_file(self.output / SETTINGS, json.dumps(self.check(), indent=1).encode() + b"\n")


def read_sweep(output: Path) -> Sweep | None:
    """The sweep of an output folder, with all experiments that were run there; None if there is none."""
    content = read_settings(output)
    if content is None:
        return None
    data_dir = None if content["data_dir"] is None else Path(content["data_dir"])
    return Sweep(output=output, scale=content["scale"], names=tuple(content["names"]), data_dir=data_dir)


def read_settings(output: Path) -> dict[str, Any] | None:
    """What :meth:`Sweep.save` wrote, as plain values; None if it has written nothing.

    Raises:
        ValueError: The file is damaged, or the output is no folder.
    """
    for folder in (output, *output.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, and no folder for results; choose another --output")
    found: dict[str, Any] | None = read_json(output / SETTINGS, then="give the data and the scale again")
    return found


def names_of(words: Sequence[str]) -> tuple[str, ...]:
    """The experiments that words on the command line stand for."""
    return tuple(EXPERIMENTS) if "all" in words else tuple(words)
