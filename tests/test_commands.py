"""The commands of training and testing as a shell or a scheduler starts them, and the wheel that brings them."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from training_runs import TINY_FLAGS

import imixer_commands
from imixer.training.checkpoints import read_checkpoint, save_checkpoint
from imixer.training.train_command import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_imixer.py"


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background is started with interrupts ignored, and so would be what it starts.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_resume_auto_starts_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """The same command, as a scheduler repeats it."""
    command = [*TINY_FLAGS, "--output", "run", "--resume", "auto"]
    assert main(command) == 0
    assert "continuing" not in capsys.readouterr().out
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "continuing after epoch 2, step 0 of 20\n" in out
    assert "epoch   1/2" not in out
    assert main([*command, "--epochs", "3"]) == 0
    assert "continuing after epoch 2, step 0 of 20, with epochs 2 -> 3\n" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["run"]
    Path("run/last.pt").write_bytes(b"")
    Path("run/previous.pt").unlink()
    assert main(command) == 2  # it does not begin anew over a damaged run
    assert capsys.readouterr().err.startswith("error: run/last.pt (0 bytes) is damaged")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": "many"}, "error: epochs in the checkpoint must be int, not 'many'"),
        ({"lr": -1.0}, "error: lr must be positive"),
        ({"model": "hf-hub:timm/resnet18"}, "error: unknown model 'hf-hub:timm/resnet18'"),
        (
            {"model_kwargs": {"features_only": True}},
            "error: the checkpoint asks for imixer_ti4_32 with features_only='True', which is not taken from a check",
        ),
        # Where the first weights came from is left out.
        ({"model_kwargs": {"pretrained": True, "pretrained_cfg": {"file": "trace"}}}, None),
        ({"dataset": "wds/data", "data_dir": "pipe:touch trace"}, "error: unknown data set 'wds/data'"),
        (
            {"dataset": "torch/mnist", "data_dir": "nothing", "dataset_download": True},
            "error: data folder /",
        ),
        ({"no_longer": 1}, None),
    ],
)
def test_settings_in_a_checkpoint_are_checked(
    settings: dict[str, object], message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY_FLAGS, "--output", "run", "--epochs", "1"]) == 0
    checkpoint = read_checkpoint(Path("run/last.pt"))
    save_checkpoint(Path("run"), {**checkpoint, "config": {**checkpoint["config"], **settings}})
    capsys.readouterr()
    assert main(["--resume", "run"]) == (0 if message is None else 2)
    if message is not None:
        err = capsys.readouterr().err
        assert err.startswith(message)
        assert err.count("\n") == 1
    assert not Path("trace").exists()


def test_message_where_the_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)

    monkeypatch.setattr(importlib, "import_module", missing)
    for lacking in ("timm", "matplotlib.pyplot"):
        assert imixer_commands.train([]) == imixer_commands.validate([]) == 2
        message = f"error: {lacking} is not installed; run: pip install 'implicit-layers[imixer,train]'\n"
        assert capsys.readouterr().err == 2 * message
    lacking = "imixer.training.nothing"
    with pytest.raises(ModuleNotFoundError):
        imixer_commands.train([])


def test_commands_set_the_environment_before_torch_is_imported() -> None:
    program = "import sys, os, imixer_commands; print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])"
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env={**clean, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert done.stdout == b"False 1000\n"


@pytest.mark.long
def test_wheel_has_the_commands(tmp_path: Path) -> None:
    """Built and installed without the network, and run outside of the checkout."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("LICENSE", "README.md", "imixer_commands.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    for name in ("solvers", "implicit", "imixer"):  # and nothing else: an environment beside them has gigabytes
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("implicit_layers-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "imixer_commands.py" in names
    commands = [f"imixer-{name} = imixer_commands:{name}" for name in ("reproduce", "train", "validate")]
    assert points.split("\n")[:4] == ["[console_scripts]", *commands]
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True)
    clean = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str) -> str:
        done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(str(site / "bin" / "imixer-train"), "--help").startswith("usage: imixer-train [DATA_DIR]")
    run(str(site / "bin" / "imixer-train"), *TINY_FLAGS, "--epochs", "1", "--output", "run")
    assert "500 test images of digits" in run(str(site / "bin" / "imixer-validate"), "run", "--n_iter", "2")
    assert "usage: " in run(sys.executable, "-m", "imixer.training.train_command", "--help")
    assert "usage: " in run(sys.executable, "-m", "imixer.validate_command", "--help")


def test_examples_are_the_commands() -> None:
    for name, command in (("train_imixer", "train"), ("validate_imixer", "validate")):
        text = (ROOT / "examples" / f"{name}.py").read_text("utf-8")
        program = f'from imixer_commands import {command}\n\nif __name__ == "__main__":\n    sys.exit({command}())\n'
        assert text.endswith(f"import sys\n\n{program}")


@pytest.mark.long
def test_only_one_of_two_repeated_commands_runs() -> None:
    """Started at once; the other one says which process is in its way, and the run is whole."""
    command = [*TINY_FLAGS, "--epochs", "4", "--output", "run", "--resume", "auto"]
    processes = [start(*command) for _ in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    winner, loser = sorted(range(2), key=lambda index: processes[index].returncode)
    assert re.search(rf"error: run is in use by process {processes[winner].pid} on \S+ since ", errors[loser])
    assert read_checkpoint(Path("run/last.pt"))["epoch"] == 4


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_exit_code_is_that_of_the_signal(name: str) -> None:
    process = start(*TINY_FLAGS, "--epochs", "100000", "--output", "run")
    for _ in range(1200):
        if Path("run/curves.csv").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + getattr(signal, name)
    assert "saved run/last.pt; continue with --resume run" in err.splitlines()[-1]


@pytest.mark.long
def test_interrupt_saves_and_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    process = start(*TINY_FLAGS, "--epochs", "100000", "--output", "run")
    for _ in range(1200):
        if Path("run/curves.csv").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    pattern = r"stopped in epoch \d+ after step \d+ of 20, saved run/last.pt; continue with --resume run"
    assert re.fullmatch(pattern, err.splitlines()[-1])
    at = torch.load("run/last.pt", weights_only=True)["progress"]
    assert main(["--resume", "run", "--epochs", str(at["epoch"] + 1)]) == 0
    out = capsys.readouterr().out
    assert f"continuing after epoch {at['epoch']}, step {at['step']} of 20, with epochs 100000 -> " in out
    assert "test accuracy" in out
