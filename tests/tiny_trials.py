"""Trials of about a second each, and made-up results of all experiments, for the tests of the reproduction."""

from __future__ import annotations

import random
from typing import Any

from imixer.reproduction import SCALES, Sweep, Task, Trial
from imixer.reproduction.data_sets import DIGITS
from imixer.reproduction.trial import TRAINED, folder_of, measurement_file

PLACE = {"device": "cpu", "workers": 0, "data_dir": None}


def tiny_trial(seed: int = 0, **changes: Any) -> Trial:
    """A model of one block of width 16, one epoch on digits."""
    settings = SCALES["smoke"].imixer(DIGITS, "S") | {"seed": seed} | changes
    return Trial(data="digits", settings=settings, place=PLACE)


def tiny_tasks(count: int, **changes: Any) -> list[Task]:
    return [Task(trial=tiny_trial(seed, **changes)) for seed in range(count)]


def make_up(sweep: Sweep, *, seed: int = 0, share: float = 1.0) -> None:
    """Write results of trials that never ran: of all, or of the first so many."""
    numbers = random.Random(seed)
    tasks = sweep.tasks()
    for task in tasks[: round(share * len(tasks))]:
        folder = folder_of(task.trial, sweep.output)
        base = 50 + numbers.gauss(0, 2)
        rows = [
            {"epoch": epoch, "test_top1": base + 5 * epoch + numbers.random(), "seconds": 2.0 * epoch}
            for epoch in (1, 2)
        ]
        folder.write(TRAINED, {"metrics": rows})
        for name in task.measurements:
            folder.write(measurement_file(name), measured(name, numbers, sweep.sizes.test_steps))


def measured(name: str, numbers: random.Random, steps: tuple[int, ...]) -> dict[str, Any]:
    """A result such as the measurement of that name has."""
    match name:
        case "iteration":
            curve = {"step": [0.1 * 0.3**k for k in range(16)], "cosine": [1 - 0.1 * 0.3**k for k in range(16)]}
            return {"layers": {f"blocks.{i}.mlp_tokens": curve for i in range(2)}}
        case "feature-maps":
            picture = [[numbers.random() for _ in range(4)] for _ in range(4)]
            maps = [[[picture] * 3 for _ in range(4)] for _ in range(2)]
            return {"steps": [0, 1, 2], "channels": [0, 1, 2, 3], "images": [[[[0.5]] * 8] * 8] * 2, "maps": maps}
        case "inference-steps":
            return {"top1": {**{str(step): 50 + numbers.random() for step in steps}, "fixed point": 51.0}}
        case "certificate":
            return {"bound": 0.9, "rate": numbers.random()}
        case "step":
            row = {"seconds": 0.01, "calls": 4, "products": 0, "bytes_saved": 2**20, "exact_converged": 1.0}
            cosine = 1 - 1e-4 * numbers.random()
            return {"points": [{"point": point, **row, "cosine": cosine} for point in ("before", "during", "after")]}
    raise AssertionError(name)
