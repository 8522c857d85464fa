"""What is there of an experiment's results so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imixer.reproduction.experiments import Arm, Experiment
from imixer.reproduction.trial import ENVIRONMENTS, FAILED, TRAINED, folder_of, measurement_file


@dataclass(frozen=True, kw_only=True)
class ArmResults:
    """The finished trials of one arm, by seed.

    Args:
        arm: The arm.
        curves: Rows of epochs, with the fields of :class:`imixer.training.EpochMetrics`.
        measured: Results of each measurement, by its name and the seed.
        failures: Reasons of the trials that failed.
        pending: Seeds whose trials are not complete and have not failed.
        environments: Versions, threads and machines that each trained trial ran with, by their names.
    """

    arm: Arm
    curves: Mapping[int, list[dict[str, Any]]]
    measured: Mapping[str, Mapping[int, dict[str, Any]]]
    failures: Mapping[int, str]
    pending: tuple[int, ...]
    environments: Mapping[int, list[dict[str, str]]]

    @property
    def top1(self) -> dict[int, float]:
        """Test accuracy after the last epoch, in percent; no epoch is chosen by it."""
        return {seed: rows[-1]["test_top1"] for seed, rows in self.curves.items()}

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds of the training."""
        return {seed: rows[-1]["seconds"] for seed, rows in self.curves.items()}


def read_results(experiment: Experiment, output: Path, seeds: range, place: Mapping[str, Any]) -> list[ArmResults]:
    """The results of an experiment's arms.

    Args:
        experiment: The experiment.
        output: Folder of all trials.
        seeds: The seeds.
        place: As :class:`imixer.reproduction.trial.Trial` takes it.
    """
    found = []
    for arm in experiment.arms:
        curves, failures, pending, environments = {}, {}, [], {}
        measured: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in experiment.measurements}
        for seed, trial in arm.trials(seeds, place).items():
            folder = folder_of(trial, output)
            try:
                training = folder.read(TRAINED)
                results = {name: folder.read(measurement_file(name)) for name in experiment.measurements}
            except ValueError as error:
                failures[seed] = str(error)
                continue
            if training is not None:
                curves[seed] = training["metrics"]
                environments[seed] = folder.read_sound(ENVIRONMENTS) or []
            for name, result in results.items():
                if result is not None:
                    measured[name][seed] = result
            if folder.missing(experiment.measurements):
                failure = folder.read_sound(FAILED)
                if failure is not None:
                    failures[seed] = failure["reason"]
                else:
                    pending.append(seed)
        found.append(
            ArmResults(
                arm=arm,
                curves=curves,
                measured=measured,
                failures=failures,
                pending=tuple(pending),
                environments=environments,
            )
        )
    return found
