"""Tasks that SLURM's srun started find each other without torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import difference, free_port, saved

from imixer.training.distributed import join_slurm_step

ROOT = Path(__file__).resolve().parent.parent
# Task 5 of 7, the second on the second of two nodes.
STEP = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
}
TORCH_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_variables_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environ = dict(STEP)
    join_slurm_step(environ)
    assert [environ[name] for name in TORCH_NAMES] == ["5", "7", "1", "3", "gpu003", "21450"]
    before = dict(environ)
    join_slurm_step(environ)  # a second time changes nothing
    assert environ == before
    of_another_step = {**STEP, "SLURM_STEP_ID": "3", "MASTER_ADDR": "here"}
    join_slurm_step(of_another_step)
    assert (of_another_step["MASTER_PORT"], of_another_step["MASTER_ADDR"]) == ("22447", "here")


def test_task_that_sees_one_gpu_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    environ = dict(STEP)
    join_slurm_step(environ)
    assert environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[003-008,12],login", "gpu003"),
        ("gpu[12,14]", "gpu12"),
        ("rack[1-2]-node[01-16]", "rack1-node01"),
        ("c[1-3].example.org,d", "c1.example.org"),
        ("10.0.0.7", "10.0.0.7"),
    ],
)
def test_first_host_of_every_form_of_list(nodes: str, first: str) -> None:
    environ = {**STEP, "SLURM_STEP_NODELIST": nodes}
    join_slurm_step(environ)
    assert environ["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("4(x2),3", "1", "4"), ("4(x2),3", "2", "3"), ("8", "0", "8"), ("1(x64)", "63", "1")]
)
def test_tasks_of_a_node(tasks: str, node: str, here: str) -> None:
    environ = {**STEP, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    join_slurm_step(environ)
    assert environ["LOCAL_WORLD_SIZE"] == here


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},  # which may run torchrun
        {**STEP, "RANK": "2"},  # torchrun in a task of srun
        # A batch script that starts one process without srun: SLURM tells it of the job, not of a step.
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"},
    ],
)
def test_others_are_left_alone(environ: dict[str, str]) -> None:
    after = dict(environ)
    join_slurm_step(after)
    assert after == environ


@pytest.mark.parametrize("name", [name for name in STEP if name != "SLURM_STEP_NUM_TASKS"])
def test_what_is_missing_is_named(name: str) -> None:
    environ = {key: value for key, value in STEP.items() if key != name}
    with pytest.raises(ValueError, match=f"srun started 7 tasks, but {name} is not set.*; start one task on each node"):
        join_slurm_step(environ)


@pytest.mark.long
def test_two_tasks_train_together(tmp_path: Path) -> None:
    """As `srun --ntasks 2 imixer-train ...` starts them, and beside it the same by torchrun's variables."""
    flags = "--num-blocks 1 --embed-dim 16 --epochs 1 --warmup-epochs 0 --batch-size 32 --device cpu --output"
    command = [sys.executable, str(ROOT / "examples" / "train_imixer.py"), *flags.split()]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    for way in ("slurm", "torchrun"):
        processes = []
        port = str(free_port())
        for rank in ("0", "1"):
            if way == "slurm":
                task = {**STEP, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}
                task |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
            else:
                task = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environ = {**clean, **task, "MASTER_PORT": port}
            processes.append(
                subprocess.Popen(
                    [*command, str(tmp_path / way)],
                    env=environ,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        outputs = [process.communicate(timeout=200)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert "2 processes on cpu; 32 x 2 x 1 = 64 images to an update" in outputs[0]
    assert difference(saved(tmp_path / "slurm" / "last.pt"), saved(tmp_path / "torchrun" / "last.pt")) == []
