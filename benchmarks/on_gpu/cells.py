"""Measurements that fail alone: each makes one row of a table, or the reason why there is none."""

import contextlib
import dataclasses
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch


class UnavailableError(Exception):
    """What a cell needs is not there."""


class WrongResultError(Exception):
    """A result is not what it should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement.

    Args:
        section: What it belongs to, for ``--only``.
        table: Title of the table that it is a row of.
        labels: The columns that say what is measured.
        run: Measures the other columns.
        rank: Cells of smaller rank run first.
        seconds: About how long it takes on an H200; it is left out when less time than that is left, and ended after
            twice as long, or a minute.
    """

    section: str
    table: str
    labels: Mapping[str, Any]
    run: Callable[[], Mapping[str, Any]]
    rank: int = 0
    seconds: float = 5.0

    @property
    def name(self) -> str:
        return ", ".join(str(label) for label in (self.section, *self.labels.values()) if label != "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a cell: values, or in their place the reason; ``outcome`` is "ok", "failed", "wrong" or "cut"."""

    cell: Cell
    outcome: str
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def plain(self) -> dict[str, Any]:
        """Of strings and numbers alone."""
        cell = self.cell
        place = {"section": cell.section, "table": cell.table, "labels": dict(cell.labels)}
        return {**place, "outcome": self.outcome, "values": dict(self.values), "reason": self.reason}


def run_cells(cells: Iterable[Cell], *, deadline: float) -> Iterator[Row]:
    """Run the cells by their rank, each whatever became of the others, until ``time.monotonic()`` is ``deadline``."""
    gc.freeze()  # what was imported is not looked through again after every cell
    for cell in sorted(cells, key=lambda cell: cell.rank):
        left = deadline - time.monotonic()
        if left < cell.seconds:
            yield Row(
                cell=cell, outcome="cut", reason=f"cut: takes about {cell.seconds:.0f} s, {max(left, 0):.0f} left"
            )
            continue
        start = time.monotonic()
        row = _run(cell, min(left, max(2 * cell.seconds, 60.0)))
        said = row.reason or ", ".join(f"{name} {shown(value)}" for name, value in row.values.items())
        print(f"{cell.name}: {said} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
        yield row


def _run(cell: Cell, seconds: float) -> Row:
    try:
        with _at_most(seconds):
            return Row(cell=cell, outcome="ok", values=cell.run())
    except WrongResultError as error:
        return Row(cell=cell, outcome="wrong", reason=f"WRONG: {error}")
    except Exception as error:  # whatever it is, the other cells can still be measured
        return Row(cell=cell, outcome="failed", reason=in_short(error))
    finally:
        _free()


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so long."""

    def stop(*_: object) -> None:
        raise TimeoutError("cut: the time was up before it ended")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _free() -> None:
    """Give back what a cell held on the device, its compiled code and their graphs too."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()
    if torch.cuda.is_initialized():
        gc.collect()
        with contextlib.suppress(Exception):  # after a failed launch every call fails
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def in_short(error: BaseException) -> str:
    """One line of at most 160 characters."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, UnavailableError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def shown(value: Any) -> str:
    """A value as it stands in a table."""
    if not isinstance(value, float):
        return str(value)
    if value != 0 and abs(value) < 0.01:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A table; a row without values has its reason in the first of their columns."""
    labels = list(dict.fromkeys(name for row in rows for name in row.cell.labels))
    columns = list(dict.fromkeys(name for row in rows for name in row.values)) or ["result"]
    lines = [[*labels, *columns]]
    for row in rows:
        values = [shown(row.values.get(name, "")) for name in columns]
        if row.reason:
            values[0] = row.reason.replace("|", "/")
        lines.append([shown(row.cell.labels.get(name, "")) for name in labels] + values)
    ruler = ["---" if name in labels else "---:" for name in lines[0]]
    table = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ruler, *lines[1:]])
    return f"## {title}\n\n{table}\n"
