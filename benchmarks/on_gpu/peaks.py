"""Peaks as measured here: what the other figures are held against."""

import functools
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.on_gpu.cells import Cell
from benchmarks.on_gpu.setup import Setup
from benchmarks.on_gpu.steps import AUTOCAST, set_precision
from benchmarks.on_gpu.timing import median_seconds

TABLE = "Measured peaks: matrix product of side 8192, copy of 4 GiB"


@functools.cache
def matmul_tflops(precision: str, setup: Setup) -> float:
    """The rate of a square matrix product of normal random numbers, in TFLOP/s."""
    set_precision(precision)
    side = 64 if setup.toy else 8192
    dtype = AUTOCAST[precision] or torch.float32
    a, b = (torch.randn(side, side, device=setup.device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    _warm_up(lambda: torch.mm(a, b, out=out), setup)
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), setup)
    return 2 * side**3 / seconds / 1e12


def copy_gbytes(setup: Setup) -> float:
    """The rate of a copy on the device in GB/s, read and written bytes together."""
    source = torch.randn(2**18 if setup.toy else 2**30, device=setup.device)
    target = torch.empty_like(source)
    _warm_up(lambda: target.copy_(source), setup)
    seconds = median_seconds(lambda: target.copy_(source), setup)
    return 2 * source.nbytes / seconds / 1e9


def _warm_up(work: Callable[[], object], setup: Setup) -> None:
    """Work for a second, so that the device is at the clock rate that it keeps under load."""
    end = time.perf_counter() + (0.01 if setup.toy else 1.0)
    while time.perf_counter() < end:
        work()
        if setup.cuda:
            torch.cuda.synchronize()


def cells(setup: Setup) -> list[Cell]:
    def product(precision: str) -> Mapping[str, float]:
        return {"TFLOP/s": matmul_tflops(precision, setup)}

    found = [
        Cell(
            section="peaks",
            table=TABLE,
            labels={"peak": f"matrix product, {precision}"},
            run=functools.partial(product, precision),
            rank=1,
        )
        for precision in ("bf16", "fp16", "TF32", "fp32")
    ]
    labels = {"peak": "copy, read and write"}
    return [*found, Cell(section="peaks", table=TABLE, labels=labels, run=lambda: {"GB/s": copy_gbytes(setup)}, rank=1)]
