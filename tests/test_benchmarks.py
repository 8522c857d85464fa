"""The benchmarks run, and what does not depend on time is as they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.long
def test_imixer() -> None:
    options = ("--quick", "--no-compile", "--repeats", "1", "--models", "imixer_ti4_32", "--n-iter", "1", "8")
    done = run("benchmarks.imixer", *options)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^imixer_ti4_32 +(\d) +(\S.*\S) +[\d.]+ +[\d.]+ +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    saved = {(int(n_iter), name): float(saved) for n_iter, name, saved, _ in rows}
    assert len(saved) == 8
    assert all(float(peak) >= float(saved) > 0 for *_, saved, peak in rows)
    assert saved[8, "unrolled"] > 1.5 * saved[1, "unrolled"]
    # What the backward pass needs of these does not depend on the number of steps.
    for name in ("JFB", "Implicit", "timm's Mixer"):
        assert saved[8, name] == saved[1, name]


@pytest.mark.long
def test_checkout_that_is_none(tmp_path: Path) -> None:
    done = run("benchmarks.imixer", "--quick", "--published", str(tmp_path))
    assert done.returncode == 2
    assert f"--published: {tmp_path} is no checkout of the published code: it has no utils" in done.stderr


@pytest.mark.long
def test_nonlinear() -> None:
    done = run("benchmarks.nonlinear", "--starts", "1", "--problems", "Boggs", "Freudenstein-Roth")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    header, _, *problems, solved, better, false, calls = rows
    assert [row[0] for row in problems] == ["Boggs", "Freudenstein-Roth"]
    assert all(len(row) == len(header) == 14 for row in rows)
    newton, lm = header.index("NewtonKrylov"), header.index("scipy lm")
    assert (better[newton], better[lm], false[lm]) == ("2", "1", "1")
    # A dash or an exclamation mark where it did not solve the system, which counts with both signs.
    assert re.fullmatch(r"\d / \d", solved[newton])
    assert problems[1][lm] == "!"
    assert all(int(count) > 0 for cell in calls[1:] for count in cell.split(" / "))


@pytest.mark.long
def test_steps() -> None:
    done = run("benchmarks.steps", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| linear", "| mixed", "| tanh"))]
    assert len(rows) == 20
    # At most one look per step, and none beside that of the driver except for Auto's own.
    assert all(int(row[4]) <= int(row[3]) for row in rows if row[2].strip() != "auto")


@pytest.mark.long
def test_kepler() -> None:
    done = run("benchmarks.kepler", "--samples", "2000", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    (difference,) = re.findall(r"^largest difference (\S+)$", done.stdout, re.MULTILINE)
    assert float(difference) < 1e-9
    assert (
        len(re.findall(r"^\| (?:by hand|root|root, backward) \| [\d.]+ \| [\d.]+ \|$", done.stdout, re.MULTILINE)) == 3
    )


@pytest.mark.long
def test_compiled_gradients() -> None:
    done = run("benchmarks.compiled_gradients", "--repeats", "1", "--shapes", "4x8", "--rates", "0.3")
    assert done.returncode == 0, done.stderr
    cells = done.stdout.splitlines()[-1].replace("|", " ").split()
    products = [int(cell) for cell in cells if cell.isdigit()]
    assert len(products) == 2
    assert products[0] == products[1] > 2
