"""Kepler's equation E - e sin E = M for many anomalies: root() beside a hand-written loop of Newton's method.

python -m benchmarks.kepler [--samples 1000000] [--repeats 5]

In float64, from the same start and to the same relative tolerance on the step. The loop updates all samples until the
last one has converged. CPU time, medians of runs that alternate.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from implicit import root

RTOL = 1e-8


def kepler(anomaly: Tensor, eccentricity: Tensor, mean: Tensor) -> Tensor:
    return anomaly - eccentricity * torch.sin(anomaly) - mean


def by_hand(start: Tensor, eccentricity: Tensor, mean: Tensor) -> Tensor:
    anomaly = start
    for _ in range(50):
        slope = 1 - eccentricity * torch.cos(anomaly)
        step = kepler(anomaly, eccentricity, mean) / slope
        anomaly = anomaly - step
        if bool((step.abs() <= RTOL * anomaly.abs()).all()):
            break
    return anomaly


def milliseconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median CPU time of each function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            began = time.process_time()
            function()
            if number:  # the first call warms up
                times[name].append(time.process_time() - began)
    return {name: 1e3 * statistics.median(spent) for name, spent in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    mean, eccentricity = torch.rand(2, options.samples, dtype=torch.float64, generator=generator)
    mean, eccentricity = 2 * torch.pi * mean, 0.9 * eccentricity
    start = mean + eccentricity * torch.sin(mean)
    leaf = eccentricity.clone().requires_grad_()
    value = root(kepler, start, leaf, mean, rtol=RTOL)
    reference = by_hand(start, eccentricity, mean)
    print(f"torch {torch.__version__}, {options.samples} samples, one thread")
    print(f"largest difference {float((value.detach() - reference).abs().max()):.1e}\n")
    ones = torch.ones_like(value)
    rows: dict[str, Callable[[], object]] = {
        "by hand": lambda: by_hand(start, eccentricity, mean),
        "root": lambda: root(kepler, start, eccentricity, mean, rtol=RTOL),
        "root, compact=True": lambda: root(kepler, start, eccentricity, mean, rtol=RTOL, compact=True),
        "root, chunk_size=2**17": lambda: root(kepler, start, eccentricity, mean, rtol=RTOL, chunk_size=2**17),
        "root, compile=True": lambda: root(kepler, start, eccentricity, mean, rtol=RTOL, compile=True),
        "root, compile=True, chunk_size=2**17": lambda: root(
            kepler, start, eccentricity, mean, rtol=RTOL, compile=True, chunk_size=2**17
        ),
        "root, backward": lambda: torch.autograd.grad(value, leaf, ones, retain_graph=True),
    }
    times = milliseconds(rows, options.repeats)
    print("| | ms | times by hand |\n|---|---|---|")
    for name, spent in times.items():
        print(f"| {name} | {spent:.1f} | {spent / times['by hand']:.1f} |")


if __name__ == "__main__":
    main()
