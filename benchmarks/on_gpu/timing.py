"""Times, memory and operations of a step."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.on_gpu.setup import Setup
from solvers.testing import PeakMemory


def median_seconds(step: Callable[[], Any], setup: Setup) -> float:
    """The median time of a step, after some to warm up.

    On CUDA between events that the stream passes: the host runs ahead, as in training, and waits at the end alone.
    """
    for _ in range(setup.warm_up):
        step()
    if not setup.cuda:
        marks = [time.perf_counter()]
        for _ in range(setup.repeats):
            step()
            marks.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(setup.repeats + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(milliseconds) / 1e3


def start_peak(setup: Setup) -> None:
    """Begin what :func:`peak_bytes` looks back to."""
    if setup.cuda:
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(step: Callable[[], Any], setup: Setup) -> int:
    """The most memory that tensors took since :func:`start_peak`; on the CPU, that of tensors made in a step.

    What a CUDA graph holds counts from its capture on: replays allocate nothing.
    """
    if setup.cuda:
        return torch.cuda.max_memory_allocated()
    memory = PeakMemory()
    with memory:
        step()
    return memory.peak


class Flops(TorchDispatchMode):
    """Counts floating-point operations of matrix products and convolutions, by the formulas of torch's own counter.

    torch.utils.flop_counter.FlopCounterMode counts by module as well, for which it puts hooks on their inputs, and
    those fail in a backward pass that calls ``torch.autograd.grad``, as that of implicit layers does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=output)
        return output
