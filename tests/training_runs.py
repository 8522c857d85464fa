"""Tiny runs of training for the tests: a model of one block on digits, seconds an epoch."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import os
import socket
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from imixer.training import PRESETS, TrainingConfig, load_data, train

TINY = TrainingConfig(
    **{
        **PRESETS["digits"],
        "num_blocks": 1,
        "embed_dim": 16,
        "epochs": 3,
        "lr": 1e-2,
        "device": "cpu",
    }
)
# A run of this size by flags.
TINY_FLAGS = [
    "--num-blocks",
    "1",
    "--embed-dim",
    "16",
    "--epochs",
    "2",
    "--warmup-epochs",
    "1",
    "--lr",
    "1e-2",
    "--device",
    "cpu",
]
# All that is random or has a state: dropout, stochastic depth, mixing, averages, accumulation; 9 updates an epoch.
LIVELY = replace(
    TINY,
    epochs=2,
    batch_size=48,
    grad_accum_steps=3,
    drop=0.1,
    drop_path=0.1,
    mixup=0.2,
    cutmix=0.5,
    model_ema=True,
    model_ema_decay=0.9,
    layer_decay=0.8,
)


def read_curves(output: Path) -> list[dict[str, str]]:
    with (output / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def saved(path: Path) -> dict[str, Any]:
    """A checkpoint's entries, those that depend on the clock left out."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    for row in checkpoint["progress"]["metrics"]:
        del row["seconds"], row["images_per_second"]
    del checkpoint["progress"]["seconds"], checkpoint["config"], checkpoint["environment"]
    return checkpoint


def difference(found: Any, expected: Any, name: str = "") -> list[str]:
    """Where two nested structures of tensors and values are not bit-equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = sorted({*found, *expected}, key=str)
        return [d for key in keys for d in difference(found.get(key), expected.get(key), f"{name}/{key}")]
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)) and len(found) == len(expected):
        pairs = zip(found, expected, strict=True)
        return [d for number, (a, b) in enumerate(pairs) for d in difference(a, b, f"{name}/{number}")]
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        return [] if torch.equal(found, expected) else [name]
    return [] if found == expected else [f"{name}: {found!r} and {expected!r}"]


def last_written(folder: Path) -> int:
    """When a checkpoint to go on from was last written, in ns; 0 if there is none."""
    times = [0]
    for name in ("last.pt", "previous.pt"):
        with contextlib.suppress(FileNotFoundError):
            times.append((folder / name).stat().st_mtime_ns)
    return max(times)


def run(config: TrainingConfig, *, resume: Path | None = None) -> None:
    """Train in a process of its own."""
    torch.set_num_threads(1)
    train(config, load_data(config), resume=resume, progress=False)


def start(config: TrainingConfig, *, resume: Path | None = None) -> BaseProcess:
    """Start a process that trains."""
    process = forkserver().Process(target=run, args=(config,), kwargs={"resume": resume}, daemon=True)
    process.start()
    return process


def run_in_parallel(config: TrainingConfig, resume: Path | None, rank: int, port: int) -> None:
    """Train in one of two processes, as torchrun starts them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    run(config, resume=resume)
    torch.distributed.destroy_process_group()


def start_parallel(config: TrainingConfig, *, resume: Path | None = None) -> list[BaseProcess]:
    """Start two processes that train together."""
    port = free_port()
    processes: list[BaseProcess] = [
        forkserver().Process(target=run_in_parallel, args=(config, resume, rank, port), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def forkserver() -> ForkServerContext:
    """Starts processes, of which only the first one takes the time of the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imixer.training", "sklearn.datasets", "sklearn.model_selection"])
    return context
