"""Trials are run once, resumed where they were stopped, and leave each other alone."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tiny_trials import tiny_tasks, tiny_trial

from imixer.reproduction import (
    EXPERIMENTS,
    SCALES,
    Ending,
    Sweep,
    Task,
    Trial,
    run_here,
    run_in_processes,
    run_on_ray,
    run_trial,
    shard,
    tables_of,
)
from imixer.reproduction.command_line import main
from imixer.reproduction.data_sets import find_data_sets
from imixer.reproduction.run_trial import has_checkpoint
from imixer.reproduction.trial import ENVIRONMENTS, FAILED, TRAINED, folder_of

ROOT = Path(__file__).resolve().parent.parent


def run_all(tasks: list[Task], output: Path, sweep: str = "one") -> dict[int, Ending]:
    endings: dict[int, Ending] = {}
    run_here(tasks, output, sweep, endings.__setitem__)
    return endings


def training(task: Task, output: Path) -> Any:
    return folder_of(task.trial, output).read(TRAINED)


def top1(task: Task, output: Path) -> list[float]:
    return [row["test_top1"] for row in training(task, output)["metrics"]]


def test_a_trial_is_its_settings_wherever_it_runs() -> None:
    trial = tiny_trial(3)
    turned = dict(reversed(list(trial.settings.items())))
    elsewhere = Trial(data=trial.data, settings=turned, place={"device": "cuda"})
    assert elsewhere.name == trial.name
    names = {tiny_trial(3).name, tiny_trial(4).name, tiny_trial(3, n_iter=4).name, tiny_trial(3, n_iter=4.5).name}
    assert len(names) == 4


@given(st.integers(0, 40), st.integers(1, 12))
def test_shards_have_every_trial_once(count: int, shards: int) -> None:
    tasks = [Task(trial=tiny_trial(seed)) for seed in range(count)]
    parts = [shard(tasks, index, shards) for index in range(1, shards + 1)]
    found = [task.trial.name for part in parts for task in part]
    assert sorted(found) == sorted(task.trial.name for task in tasks)
    assert len(set(found)) == len(found)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("index", "count"), [(0, 2), (3, 2), (-1, 1)])
def test_a_shard_that_is_none_is_refused(index: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"not {index}/{count}"):
        shard([], index, count)


def test_a_complete_trial_is_not_run_again(tmp_path: Path) -> None:
    (task,) = tiny_tasks(1)
    assert run_all([task], tmp_path) == {0: Ending.COMPLETE}
    before = training(task, tmp_path)
    assert run_all([task], tmp_path, "two") == {0: Ending.ALREADY}
    assert training(task, tmp_path) == before
    # A measurement that is asked for later is made without training again.
    more = Task(trial=task.trial, measurements=("certificate",))
    assert run_all([more], tmp_path, "three") == {0: Ending.COMPLETE}
    assert training(task, tmp_path) == before
    assert folder_of(task.trial, tmp_path).read("certificate.json")["bound"] > 0
    (ran_with,) = folder_of(task.trial, tmp_path).read(ENVIRONMENTS)
    assert {"device", "python", "torch", "timm", "threads", "machine"} <= ran_with.keys()


def test_a_failed_trial_says_why_and_leaves_the_others_alone(tmp_path: Path) -> None:
    tasks = tiny_tasks(2)
    tasks.insert(1, Task(trial=tiny_trial(0, h_ratio=-1.0)))
    assert run_all(tasks, tmp_path) == {0: Ending.COMPLETE, 1: Ending.FAILED, 2: Ending.COMPLETE}
    failure = folder_of(tasks[1].trial, tmp_path).read(FAILED)
    assert "h_ratio must be a positive number, got -1.0" in failure["reason"]
    assert "Traceback" in failure["details"]
    # In the same sweep it is not tried again; in the next one it is, and its note goes when it succeeds.
    assert run_trial(tasks[1], tmp_path, "one") is Ending.FAILED
    folder_of(tasks[0].trial, tmp_path).write(FAILED, {"sweep": "one", "reason": "", "details": ""})
    os.remove(folder_of(tasks[0].trial, tmp_path).path / TRAINED)
    assert run_trial(tasks[0], tmp_path, "two") is Ending.COMPLETE
    assert folder_of(tasks[0].trial, tmp_path).read(FAILED) is None


def test_an_unknown_setting_fails_its_trial_by_name(tmp_path: Path) -> None:
    task = Task(trial=tiny_trial(0, h_ration=2.0))
    assert run_trial(task, tmp_path, "one") is Ending.FAILED
    assert "h_ration" in folder_of(task.trial, tmp_path).read(FAILED)["reason"]


@pytest.mark.long
def test_damaged_files_of_one_trial_leave_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a loss of power leaves them; a note of a failure is done without, a result is made again."""
    call = ["depth", "--scale", "smoke", "--output", str(tmp_path), "--seeds", "1"]
    assert main(call) == 0
    trials = sorted((tmp_path / "trials").iterdir())
    for content in ("", "{}", "[]", '{"metrics": []}', '{"metrics": null}', '{"metrics": [{}]}'):
        (trials[0] / TRAINED).unlink()
        (trials[0] / FAILED).write_text(content)
        assert main(call) == 0
        assert not (trials[0] / FAILED).exists()
        kept = (trials[1] / TRAINED).read_bytes()
        (trials[1] / TRAINED).write_text(content)
        capsys.readouterr()
        assert main([*call, "--report"]) == 0
        assert capsys.readouterr().out.count("training.json is damaged") == 1
        assert main(call) == 0
        assert "is damaged" not in capsys.readouterr().out
        assert json.loads((trials[1] / TRAINED).read_bytes())["metrics"] == json.loads(kept)["metrics"]
    (tmp_path / "sweep.json").write_text("{}")
    assert main(call) == 2
    assert "sweep.json is damaged (it has no 'scale'); remove it, and give" in capsys.readouterr().err


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (task,) = tiny_tasks(1)
    folder = folder_of(task.trial, tmp_path)
    folder.write(TRAINED, {})
    (folder.path / TRAINED).write_text('{"metrics": [')
    with pytest.raises(ValueError, match="training.json is damaged"):
        folder.read(TRAINED)


def work(tasks: list[Task], output: Path, report: Path) -> None:
    """Run tasks, and write how each ended to a file."""
    torch.set_num_threads(1)
    endings: list[tuple[int, Ending]] = []
    run_here(tasks, output, str(report), lambda *ending: endings.append(ending))
    report.write_text(json.dumps(endings))


def start(tasks: list[Task], output: Path, report: Path) -> BaseProcess:
    """Start a process that does so. Only the first one takes the time of the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imixer.reproduction", "sklearn.datasets", "sklearn.model_selection"])
    process = context.Process(target=work, args=(tasks, output, report), daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], object], *, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.long
def test_two_processes_at_once_run_no_trial_twice(tmp_path: Path) -> None:
    tasks = tiny_tasks(4)
    reports = [tmp_path / "a.json", tmp_path / "b.json"]
    processes = [start(tasks, tmp_path, report) for report in reports]
    for process in processes:
        process.join(timeout=280)
    assert [process.exitcode for process in processes] == [0, 0]
    run = Counter(
        number for report in reports for number, ending in json.loads(report.read_text()) if ending == "complete"
    )
    assert run == Counter(range(4))
    assert not any(task.missing(tmp_path) for task in tasks)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_trial_goes_on_to_the_same_result(tmp_path: Path, number: signal.Signals) -> None:
    tasks = tiny_tasks(2, epochs=6)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(tasks, stopped, tmp_path / "report.json")
    run = folder_of(tasks[0].trial, stopped).run
    wait_for(lambda: (run / "previous.pt").is_file())
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=100)
    if tasks[0].missing(stopped):  # else it was over before the signal came
        # It may have been killed after the last checkpoint was renamed, and before the new one took its name.
        assert has_checkpoint(run)
    assert tasks[1].missing(stopped) == [TRAINED]
    found = run_all(tasks, stopped, "two")
    assert found[1] is Ending.COMPLETE
    run_all(tasks, whole)
    for task in tasks:
        assert top1(task, stopped) == top1(task, whole)
        assert len(top1(task, stopped)) == 6


@pytest.mark.long
def test_processes_share_the_trials_and_report_one_that_dies(tmp_path: Path) -> None:
    tasks = tiny_tasks(3)
    endings: list[tuple[int, Ending]] = []
    run_in_processes(tasks, tmp_path, "one", lambda *ending: endings.append(ending), jobs=2)
    assert Counter(number for number, ending in endings if ending is Ending.COMPLETE) == Counter(range(3))
    assert all(ending in (Ending.COMPLETE, Ending.ALREADY, Ending.BUSY) for _, ending in endings)


@pytest.mark.long
def test_a_killed_process_fails_its_trial_alone(tmp_path: Path) -> None:
    tasks = [Task(trial=tiny_trial(0, epochs=200)), *tiny_tasks(2)]
    endings: list[tuple[int, Ending]] = []
    killed: list[int] = []

    def on_ending(number: int, ending: Ending) -> None:
        endings.append((number, ending))
        started = folder_of(tasks[0].trial, tmp_path).read("started.json")
        if started is not None and not killed:
            killed.append(started["pid"])
            os.kill(started["pid"], signal.SIGKILL)

    run_in_processes(tasks, tmp_path, "one", on_ending, jobs=2)
    assert killed
    assert (0, Ending.FAILED) in endings
    assert "SIGKILL" in folder_of(tasks[0].trial, tmp_path).read(FAILED)["reason"]
    assert not any(task.missing(tmp_path) for task in tasks[1:])


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"pip install 'implicit-layers\[sweep\]'"):
        run_on_ray(tiny_tasks(1), tmp_path, "one", lambda *_: None, cpus=1, gpus=0)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.timeout(900)  # Ray starts servers, and a process for each core
def test_ray_runs_every_trial_once(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    tasks = [*tiny_tasks(2), Task(trial=tiny_trial(0, h_ratio=-1.0))]
    endings: dict[int, Ending] = {}
    run_on_ray(tasks, tmp_path, "one", endings.__setitem__, cpus=1, gpus=0)
    assert endings == {0: Ending.COMPLETE, 1: Ending.COMPLETE, 2: Ending.FAILED}
    again: dict[int, Ending] = {}
    run_on_ray(tasks[:2], tmp_path, "two", again.__setitem__, cpus=1, gpus=0)
    assert again == {0: Ending.ALREADY, 1: Ending.ALREADY}


def test_experiments_share_their_trials(tmp_path: Path) -> None:
    sweep = Sweep(output=tmp_path, scale="cpu", names=("table2", "table3", "figure3", "inference-steps"))
    names = [task.trial.name for task in sweep.tasks()]
    assert len(set(names)) == len(names)
    arms = {"table2": 9, "table3": 9, "figure3": 3, "inference-steps": 3}
    assert {experiment.name: len(experiment.arms) for experiment in sweep.experiments()} == arms
    assert len(names) == (9 + 6) * SCALES["cpu"].seeds
    measured = Counter(task.measurements for task in sweep.tasks())
    assert measured == {(): 12 * SCALES["cpu"].seeds, ("inference-steps", "iteration"): 3 * SCALES["cpu"].seeds}


def test_an_experiment_runs_from_the_command_line_and_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inference-steps", "--scale", "smoke", "--seeds", "1", "--output", str(tmp_path), "--workers", "0"]
    assert main([*command, "--shard", "1/2"]) == 0
    assert "2 of 2 trials are complete: 2 run now" in capsys.readouterr().out
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "3 of 3 trials are complete: 1 run now" in output
    assert "fixed point" in output
    assert (tmp_path / "report.html").is_file()
    assert main(["all", "--report", "--output", str(tmp_path)]) == 0
    assert "Steps at test time (smoke scale)" in capsys.readouterr().out
    assert main(["depth", "--scale", "cpu", "--output", str(tmp_path)]) == 2
    assert "holds results with scale smoke, not cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["table1", "nowhere"], "there is no folder"),
        (["table1", "."], "there is no data set in"),
        (["table1", "--report"], "there are no results in"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "a/b", "3"])
def test_a_wrong_shard_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["table1", "--shard", text])
    assert "must be I/N" in capsys.readouterr().err


def test_a_trial_that_another_process_runs_is_busy(tmp_path: Path) -> None:
    (task,) = tiny_tasks(1, epochs=200)
    process = start([task], tmp_path, tmp_path / "report.json")
    folder = folder_of(task.trial, tmp_path)
    try:
        wait_for(lambda: folder.read("started.json") is not None)
        assert run_trial(task, tmp_path, "other") is Ending.BUSY
    finally:
        process.kill()
        process.join()


@pytest.mark.long
@pytest.mark.timeout(1200)  # a minute or two on cores that do nothing else
def test_everything_runs_at_smoke_scale(tmp_path: Path) -> None:
    command = ["examples/reproduce.py", "all", "--scale", "smoke", "--jobs", "2", "--output", str(tmp_path)]
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    sweep = Sweep(output=tmp_path, scale="smoke", names=tuple(EXPERIMENTS))
    assert not any(task.missing(tmp_path) for task in sweep.tasks())
    tables = tables_of(sweep)
    for experiment, results, table in tables:
        assert experiment.title in result.stdout
        for arm in results:
            assert len(arm.top1) == len(sweep.seeds(experiment))
            assert all(0 <= accuracy <= 100 for accuracy in arm.top1.values())
        assert "-" not in [cell for row in table.rows for cell in row], experiment.name
    (ablation,) = (results for experiment, results, _ in tables if experiment.name == "solvers")
    # One block: the calls of its map that the method fixes.
    more_calls = {"unrolled": 0, "checkpointed": 1, "implicit": 1, "neumann": 1, "jfb": 1, "phantom": 5}
    for arm in ablation:
        solver, backward = arm.arm.labels["solver"], arm.arm.labels["backward"]
        points = arm.measured["step"][0]["points"]
        assert [point["point"] for point in points] == ["before", "during", "after"]
        assert all(point["exact_converged"] > 0.99 for point in points)
        after = points[-1]
        if solver == "picard, 2 steps":
            assert after["calls"] == 2 + more_calls[backward]
        elif backward in ("unrolled", "checkpointed", "implicit"):
            assert after["cosine"] > 1 - 1e-5
        assert (after["products"] > 0) == (backward in ("implicit", "neumann", "shine"))


def test_data_sets_are_found_where_they_are(tmp_path: Path) -> None:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    for split in ("train", "val"):
        for label in classes:
            (tmp_path / "jpegs" / split / label).mkdir(parents=True)
    for name in ("cifar-100-python", "FashionMNIST", "nothing"):
        (tmp_path / name).mkdir()
    found = {data.name: data for data in find_data_sets(tmp_path)}
    assert list(found) == ["cifar10", "cifar100", "fashion_mnist"]
    assert found["cifar10"].data_dir == str(tmp_path / "jpegs")
    assert found["cifar100"].reading == {"dataset": "torch/cifar100"}
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert find_data_sets(tmp_path)[0].reading == {"dataset": "torch/cifar10"}
