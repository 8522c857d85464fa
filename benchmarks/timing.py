"""What the benchmarks that take times share: their options, the line about the machine, and times taken in turns."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def parser(description: str, *, threads: int = 2, repeats: int = 7) -> argparse.ArgumentParser:
    """A parser with the options ``--threads`` and ``--repeats``, described by the first line of a docstring."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--threads", type=int, default=threads, help="threads of PyTorch [%(default)s]")
    options.add_argument("--repeats", type=int, default=repeats, help="runs of which the median is taken [%(default)s]")
    return options


def begin(threads: int, **versions: str) -> None:
    """Set the number of threads, and print the machine and the versions of Python, PyTorch and other packages."""
    torch.set_num_threads(threads)
    packages = {"Python": platform.python_version(), "torch": torch.__version__, **versions}
    print(f"{platform.machine()}, {threads} threads, {', '.join(f'{name} {is_}' for name, is_ in packages.items())}")


def seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Times of each, taken in turns after a first call."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for run, series in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if repeat:
                series.append(time.perf_counter() - start)
    return times


def medians_ms(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median times in milliseconds, taken in turns after a first call of each."""
    return [1e3 * statistics.median(series) for series in seconds(runs, repeats)]
