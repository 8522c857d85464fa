"""Training, inference and memory of Mixer, iMixer and the published iMixer.

Not the full product of sizes, precisions, ways to run, steps and backward modes, but lines through it: everything is
varied around iMixer-S with 2 unrolled steps in bf16, the paper's model, and fits in 80 GB. MFU is the rate of the
model's operations, as counted in a forward and backward pass (what Checkpointed repeats included), over the measured
peak in bf16, whatever the precision.
"""

import functools
from collections.abc import Mapping
from typing import Any

from benchmarks.on_gpu.cells import Cell
from benchmarks.on_gpu.peaks import matmul_tflops
from benchmarks.on_gpu.setup import Setup
from benchmarks.on_gpu.steps import COMPILED, COMPILED_GRAPH, EAGER, GRAPH, Step, build, check_finite
from benchmarks.on_gpu.timing import median_seconds, peak_bytes, start_peak

TRAINING, INFERENCE, MEMORY = "Training", "Inference", "Peak memory of a training step under Implicit"
MODES = ("checkpointed", "implicit", "phantom", "jfb", "neumann", "shine", "auto")
GIB = 2**30
COMPILING = 15.0  # seconds, for the one block that is compiled
DEEP = 16  # steps from which half a batch is taken, to fit in 80 GB


def measure(setup: Setup, *, training: bool, way: str, **labels: Any) -> Mapping[str, float]:
    """Time, rate, memory and MFU of a step."""
    start_peak(setup)
    step = _step(setup, training=training, way=way, **labels)
    seconds = median_seconds(step, setup)
    check_finite(step())
    return {
        "ms": 1e3 * seconds,
        "images/s": len(step.images) / seconds,
        "peak GiB": peak_bytes(step, setup) / GIB,
        "TFLOP a step": step.flops / 1e12,
        "MFU %": 100 * step.flops / seconds / 1e12 / matmul_tflops("bf16", setup),
    }


def memory(setup: Setup, *, n_iter: int) -> Mapping[str, float]:
    """The peak of a few training steps."""
    start_peak(setup)
    step = _step(
        setup, training=True, way=EAGER, model="iMixer", size="S", precision="bf16", n_iter=n_iter, backward="implicit"
    )
    for _ in range(3):
        check_finite(step())
    return {"peak GiB": peak_bytes(step, setup) / GIB}


def _step(
    setup: Setup,
    *,
    training: bool,
    way: str,
    model: str,
    size: str,
    precision: str,
    batch: int | None = None,
    n_iter: int | str = "",
    backward: str = "",
) -> Step:
    options: dict[str, Any] = {}
    if model != "Mixer":
        options |= {"n_iter": n_iter, "n_power": 1 if setup.toy else 8}
    if model == "iMixer":
        options["backward"] = backward or "unrolled"
        # SHINE takes its inverse from Broyden's method.
        options["solver"] = "broyden" if backward == "shine" else "picard"
    network = build(model, setup, size, **options)
    return Step(network, setup, batch=batch or setup.batch(size), precision=precision, training=training, way=way)


def cells(setup: Setup) -> list[Cell]:
    found: dict[str, Cell] = {}

    def add(
        rank: int,
        seconds: float = 6.0,
        *,
        model: str = "iMixer",
        size: str = "S",
        precision: str = "bf16",
        way: str = EAGER,
        n_iter: int | str = 2,
        backward: str = "unrolled",
        training: bool = True,
        section: str = "",
    ) -> None:
        if model == "Mixer":
            n_iter = backward = ""
        batch = setup.batch(size)
        labels: dict[str, Any] = {
            "model": model,
            "size": size,
            "batch": batch // 2 if training and n_iter == DEEP and not setup.toy else batch,
            "precision": precision,
            "way": way,
            "n_iter": n_iter,
        }
        if training:
            labels["backward"] = backward
        table = TRAINING if training else INFERENCE
        section = "published" if model == "published" else section or table.lower()
        run = functools.partial(measure, setup, training=training, **labels)
        cell = Cell(section=section, table=table, labels=labels, run=run, rank=rank, seconds=seconds)
        found.setdefault(cell.name, cell)

    for way, seconds in ((EAGER, 6.0), (GRAPH, 8.0), (COMPILED, COMPILING), (COMPILED_GRAPH, COMPILING)):
        add(2, seconds, way=way)
    for n_iter in (2, 4):  # like with like: both eager, and both compiled
        add(3, model="published", n_iter=n_iter)
        add(4, COMPILING, model="published", n_iter=n_iter, way=COMPILED)
    add(4, COMPILING, n_iter=4, way=COMPILED)
    for n_iter in (1, 4, 8, DEEP):
        add(3 if n_iter == 4 else 7, 8.0, n_iter=n_iter, way=GRAPH)
        add(6, n_iter=n_iter)
    add(3, COMPILING, n_iter=4, way=COMPILED_GRAPH)
    add(4, model="Mixer")
    add(4, COMPILING, model="Mixer", way=COMPILED_GRAPH)
    for precision in ("fp32", "TF32", "fp16"):
        add(6, precision=precision, section="precisions")
        add(8, COMPILING, precision=precision, way=COMPILED, section="precisions")
        add(6, model="Mixer", precision=precision, section="precisions")
    for n_iter in (4, DEEP):
        for backward in MODES:
            add(7, 8.0, n_iter=n_iter, backward=backward, section="modes")
    add(10, COMPILING, n_iter=DEEP, way=COMPILED_GRAPH)
    for size in ("B", "L"):
        for model in ("Mixer", "iMixer"):
            add(8, 12.0, model=model, size=size)
        add(9, COMPILING, size=size, way=COMPILED_GRAPH)

    for model in ("Mixer", "iMixer"):
        for way, rank, seconds in ((EAGER, 5, 5.0), (GRAPH, 7, 5.0), (COMPILED_GRAPH, 8, COMPILING)):
            add(rank, seconds, model=model, way=way, training=False)
        add(7, 5.0, model=model, precision="fp32", training=False)
    for n_iter in (1, 4, 8, 16):
        add(7, 5.0, n_iter=n_iter, training=False)

    peaks = [
        Cell(
            section="memory",
            table=MEMORY,
            labels={"model": "iMixer", "size": "S", "batch": setup.batch("S"), "precision": "bf16", "n_iter": n_iter},
            run=functools.partial(memory, setup, n_iter=n_iter),
            rank=3,
        )
        for n_iter in (1, 16)
    ]
    return [*found.values(), *peaks]
