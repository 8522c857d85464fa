"""Runs that are killed at any moment go on to the very weights of an undisturbed one.

`KILLS=20 pytest tests/test_kills.py` kills each run twenty times.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from training_runs import LIVELY, difference, last_written, saved, start, start_parallel

from imixer.training import TrainingConfig

KILLS = int(os.environ.get("KILLS", "4"))
# Enough updates to be killed between; a checkpoint after each.
CONFIG = replace(LIVELY, epochs=max(2, KILLS // 4), checkpoint_interval="1")

pytestmark = [pytest.mark.long, pytest.mark.timeout(100 + 60 * KILLS)]

Start = Callable[[TrainingConfig, Path | None], list[BaseProcess]]


def alone(config: TrainingConfig, resume: Path | None) -> list[BaseProcess]:
    return [start(config, resume=resume)]


def two(config: TrainingConfig, resume: Path | None) -> list[BaseProcess]:
    """Two processes that compute gradients in parallel, over gloo."""
    return start_parallel(replace(config, batch_size=config.batch_size // 2), resume=resume)


@pytest.fixture(params=[alone, two])
def begin(request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start the processes of a run; at the end of the test none is left."""
    processes: list[BaseProcess] = []

    def started(config: TrainingConfig, resume: Path | None) -> list[BaseProcess]:
        new: list[BaseProcess] = request.param(config, resume)
        processes.extend(new)
        return new

    yield started
    for process in processes:
        process.kill()


def test_killed_run_goes_on_bit_by_bit(begin: Start, tmp_path: Path) -> None:
    for process in begin(replace(CONFIG, output=str(tmp_path / "undisturbed")), None):
        process.join()
        assert process.exitcode == 0
    folder = tmp_path / "killed"
    config = replace(CONFIG, output=str(folder))
    moments = random.Random(0)
    num_kills = num_unfinished = 0
    while num_kills < KILLS:
        before = last_written(folder)
        processes = begin(config, folder if before else None)
        if num_kills % 2:  # while a checkpoint is written
            wait_for(lambda: any(folder.glob(".*.tmp")), processes)
        else:
            wait_for(lambda: last_written(folder) != before, processes)  # noqa: B023
            time.sleep(moments.uniform(0, 0.3))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        if processes[0].exitcode == 0:
            break  # too late, the run was done
        assert processes[0].exitcode == -signal.SIGKILL
        num_kills += 1
        num_unfinished += any(folder.glob(".*.tmp"))
    print(f"{num_kills} kills, {num_unfinished} of them while a checkpoint was written")
    assert num_kills >= max(2, KILLS - 2)
    for process in begin(config, folder):
        process.join()
        assert process.exitcode == 0
    for name in ("last.pt", "best.pt"):
        assert difference(saved(folder / name), saved(tmp_path / "undisturbed" / name)) == []
    assert not list(folder.glob(".*.tmp"))
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == CONFIG.epochs


def wait_for(happened: Callable[[], bool], processes: list[BaseProcess]) -> None:
    while not happened() and all(process.is_alive() for process in processes):
        time.sleep(0.0005)
