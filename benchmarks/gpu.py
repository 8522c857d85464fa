"""What the library does on a GPU: the same answers as the CPU's, peaks, training, inference, memory, input, solvers.

python -m benchmarks.gpu [--part PART] [--only SECTION ...] [--published PATH] [--output FOLDER] [--budget-seconds S]

Three calls of at most nine minutes each measure everything on a GPU with 80 GB: ``--part correctness`` (and peaks),
``--part training`` (beside the published code, 50 updates of a run, and inference), ``--part rest``.

Progress goes to stderr; the tables come last, on stdout, with goals beside what was measured. Cells run by importance
until the budget is spent, and say so where they were cut, or what failed. A step is the one that training takes
(`imixer.training.step`), with AdamW, stochastic depth and label smoothing, on one batch that stays on the device; times
are medians of 20 steps between CUDA events. The exit code is 1 if a result was wrong. ``--toy --device cpu`` runs every
path that needs no GPU in seconds.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    # Started by its path, it would be imported in the place of the package of the same name.
    sys.exit("Start it as a module: python -m benchmarks.gpu")

# As in examples/train_imixer.py: PyTorch's threads should not wait for each other in a long busy loop.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import timm
import torch

from benchmarks.on_gpu import correctness, goals, models, peaks, pipeline, solver_bank, training_run, whole_solves
from benchmarks.on_gpu.cells import Cell, Row, markdown, run_cells
from benchmarks.on_gpu.setup import Setup
from benchmarks.on_gpu.steps import quiet

SOURCES: tuple[Callable[[Setup], list[Cell]], ...] = (
    correctness.cells,
    peaks.cells,
    models.cells,
    training_run.cells,
    pipeline.cells,
    solver_bank.cells,
    whole_solves.cells,
)
PARTS = {
    "correctness": ("correctness", "peaks"),
    "training": ("training", "published", "run", "inference"),
    "rest": ("precisions", "modes", "memory", "pipeline", "roots", "compiled", "solvers"),
}
SECTIONS = tuple(section for sections in PARTS.values() for section in sections)
SAVING_SECONDS = 5.0  # of the budget, for what is left to do after the last cell


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    start = time.monotonic()
    options = build_parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device here; --toy --device cpu runs the same code without one")
    if options.published is not None and not options.published.is_dir():
        sys.exit(f"error: --published {options.published} is no folder; give a checkout of the published code")
    quiet()
    torch.manual_seed(0)
    setup = Setup(device=device, toy=options.toy, workers=options.workers, published=options.published)
    chosen = set(PARTS.get(options.part, SECTIONS)) & set(options.only or SECTIONS)
    cells = [cell for source in SOURCES for cell in source(setup) if cell.section in chosen]
    heading = describe(setup)
    rows: list[Row] = []
    for row in run_cells(cells, deadline=start + options.budget_seconds - SAVING_SECONDS):
        rows.append(row)
        if options.output is not None:  # at once: a run that is killed keeps what it had measured
            save(options.output, heading, cells, rows)
    print(report(heading, cells, rows))
    return int(any(row.outcome == "wrong" for row in rows))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[%(default)s]")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: every path in seconds, no number of any worth")
    parser.add_argument(
        "--budget-seconds", type=float, default=540, metavar="S", help="time to measure in [%(default)s]"
    )
    parser.add_argument("--part", choices=PARTS, help="one of the three calls [all in one]")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--published", type=Path, metavar="PATH", help="checkout of github.com/Toshihiro-Ota/imixer")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="of the input pipeline [%(default)s]"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for gpu.md and gpu.json, kept up to date")
    return parser


def describe(setup: Setup) -> dict[str, str]:
    """When, with what and on what."""
    device = torch.cuda.get_device_name() if setup.cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device + (" (toy sizes: the numbers mean nothing)" if setup.toy else ""),
        "processors": str(os.cpu_count()),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"CUDA {torch.version.cuda}",
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
    }


def report(heading: dict[str, str], cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """All tables as Markdown, their rows in the order of the cells."""
    done = {id(row.cell): row for row in rows}
    tables: dict[str, list[Row]] = {}
    for cell in cells:
        if row := done.get(id(cell)):
            tables.setdefault(cell.table, []).append(row)
    lines = [f"- {name}: {value}" for name, value in heading.items()]
    lines.append(f"- measured: {sum(row.outcome == 'ok' for row in rows)} of {len(cells)} cells")
    parts = ["# GPU benchmark\n\n" + "\n".join(lines) + "\n"]
    parts += [markdown(title, table) for title, table in tables.items()]
    return "\n".join([*parts, goals.markdown(goals.goals(rows))])


def save(folder: Path, heading: dict[str, str], cells: Sequence[Cell], rows: Sequence[Row]) -> None:
    """Write the tables, and the same as data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.md").write_text(report(heading, cells, rows), "utf-8")
    found = [dataclasses.asdict(goal) for goal in goals.goals(rows)]
    data = {**heading, "goals": found, "rows": [row.plain() for row in rows]}
    (folder / "gpu.json").write_text(json.dumps(data, indent=1), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
