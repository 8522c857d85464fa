"""The examples do what they say; examples/train_imixer.py has a file of tests of its own."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.long
def test_quickstart_is_that_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    _, program = (ROOT / "examples" / "quickstart.py").read_text("utf-8").split('"""\n\n', 1)
    # The tests of the documentation run the README's.
    assert f"```python\n{program}```" in (ROOT / "README.md").read_text("utf-8")
    assert run("quickstart", capsys).startswith("accuracy 100%\nsolved 500 of 500 samples in ")


def test_custom_solver_is_as_fast_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +(\S+)$", run("custom_solver", capsys), re.MULTILINE)
    steps = {name: int(most) for name, _, most, _ in rows}
    assert list(steps) == ["Picard", "Aitken", "Anderson"]
    assert steps["Aitken"] < steps["Picard"] / 2.5
    assert steps["Aitken"] < steps["Anderson"] * 1.2
    assert all(float(residual) <= 1e-8 for *_, residual in rows)


def test_backward_modes_have_the_errors_and_costs_that_they_should(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("backward_modes", capsys)
    table = re.findall(r"^(\w[^0-9-]*(?:\d \w+)?) +(-?0\.\d+.*)$", output, re.MULTILINE)
    rows = {name.strip(): values.split() for name, values in table}
    error, calls, products, size = ({name: float(row[i]) for name, row in rows.items()} for i in (4, 5, 6, 7))
    assert list(rows)[:4] == ["unrolled", "checkpointed", "implicit", "implicit, GMRES"]
    assert len(rows) == 10
    assert rows["unrolled"][:5] == rows["checkpointed"][:5]
    assert rows["neumann, 5 terms"][:5] == rows["phantom, 5 steps"][:5]
    assert max(error["unrolled"], error["implicit"], error["shine, refined"]) < 1e-4
    assert 1e-3 < error["neumann, 5 terms"] < 1e-2 < error["shine"] <= error["jfb"]
    assert calls["unrolled"] + 1 == calls["implicit"] == calls["jfb"] == calls["phantom, 5 steps"] - 4
    assert [products[name] for name in ("neumann, 5 terms", "phantom, 5 steps", "jfb", "shine")] == [5, 5, 1, 2]
    assert size["jfb"] < size["implicit"] < size["checkpointed"] < size["phantom, 5 steps"] < size["unrolled"]
    assert rows["auto"][-1] == "Implicit"


def test_invertible_resnet_fits_a_density_and_is_inverted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plot = tmp_path / "density.png"
    small = f"--steps 100 --blocks 3 --width 16 --output {plot}"
    monkeypatch.setattr(sys, "argv", ["invertible_resnet.py", *small.split()])
    output = run("invertible_resnet", capsys)
    flow, gaussian, best, integral, lipschitz, error, exact = (
        float(number) for number in re.findall(r"^.+?  +([\d.e-]+)", output, re.MULTILINE)
    )
    assert best < flow < gaussian - 0.3
    assert integral == pytest.approx(1, abs=0.01)
    assert lipschitz < 1
    assert error <= 1e-5
    assert float(re.findall(r"by power series (\S+)", output)[0]) == pytest.approx(exact, abs=0.01)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, not 0"),
        (["--blocks", "0"], "argument --blocks: must be at least 1, not 0"),
        (["--width", "-1"], "argument --width: must be at least 1, not -1"),
        (
            ["--seed", "18446744073709551616"],
            "argument --seed: must be from 0 to 18446744073709551615, not 18446744073",
        ),
        (["--seed", "-1"], "argument --seed: must be from 0 to 18446744073709551615, not -1"),
        (["--output", ""], "argument --output: must be a file that ends in .png, .pdf or .svg, not ''"),
        (["--output", "density.foo"], "argument --output: must be a file that ends in .png, .pdf or .svg"),
        (["--output", f"{__file__}/density.png"], "argument --output: cannot write the plot: "),
    ],
)
def test_invertible_resnet_refuses_what_it_cannot_do_before_it_trains(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["invertible_resnet.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run("invertible_resnet", capsys)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_hopfield_networks_retrieve_what_they_store(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["hopfield.py", "--per-class", "3", "--output", str(tmp_path)])
    output = run("hopfield", capsys)
    rows = re.findall(r"^ *(\S.*?) +(\d\.\d+) +(\d+)% +(\d+)%$", output, re.MULTILINE)
    assert len(rows) == 14
    for table in (rows[:7], rows[7:]):
        overlap = {name: float(value) for name, value, *_ in table}
        corrupted = overlap[table[0][0]]
        assert overlap["two layers, ReLU"] < 0.7
        assert min(overlap["two layers"], overlap["three layers"]) > max(0.85, corrupted + 0.2)
        assert overlap["two layers"] == pytest.approx(overlap["nearest stored"], abs=0.02)
        assert overlap["three layers, told"] == pytest.approx(overlap["nearest stored of the class"], abs=0.02)
    assert re.search(r"any energy between one of 161 times and the next: -\d", output)
    assert (tmp_path / "retrieval.png").stat().st_size > 50_000


@pytest.mark.long
def test_custom_solver_conforms() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "examples/custom_solver.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^\d+ passed in ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "examples" / "implicit_differentiation").glob("*.py"))]
)
def test_implicit_derivatives_agree_with_an_independent_computation(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run(f"implicit_differentiation/{name}", capsys)
    differences = re.findall(r"difference.*: (\d\S*)$", output, re.MULTILINE)
    assert differences
    assert max(float(difference) for difference in differences) < 1e-6
    if ranked := re.search(r"area under the curve.*: (\S+)$", output, re.MULTILINE):
        assert float(ranked[1]) > 0.75
    if conic := re.search(r"spot size .* -> (\S+), conic constant (\S+), Descartes (\S+)$", output, re.MULTILINE):
        assert float(conic[1]) < 1e-4
        assert float(conic[2]) == pytest.approx(float(conic[3]), rel=1e-3)
    if losses := re.search(r"validation loss (\S+) -> (\S+)$", output, re.MULTILINE):
        assert float(losses[2]) < float(losses[1])
