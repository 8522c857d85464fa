"""The command line of examples/train_imixer.py."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from digit_images import write_digit_tree

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_imixer.py"
TINY = ["--num-blocks", "1", "--embed-dim", "16", "--epochs", "2", "--lr", "1e-2", "--device", "cpu"]

Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    spec = importlib.util.spec_from_file_location("train_imixer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_digits_need_no_arguments_but_speed(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY) == 0
    out = capsys.readouterr().out
    assert "1,297 training and 500 test images in 10 classes" in out
    assert "epoch   1/2  train loss" in out
    assert "epoch   2/2  train loss" in out
    assert "test accuracy" in out
    assert "blocks.0.mlp_tokens" in out
    for name in ("checkpoint.pt", "curves.csv", "curves.png"):
        assert f"runs/digits-imixer_ti4_32/{name}" in out
        assert Path("runs/digits-imixer_ti4_32", name).exists()


def test_folder_of_images_with_the_papers_flags(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digit_tree(tmp_path / "shapes", test="val")
    flags = "--img-size 8 --patch-size 2 --h_ratio 1 --n_iter 30 --n_power 4 --coeff 0.8 --drop-path 0.1 "
    flags += "--solver anderson --rtol 1e-3 --backward implicit --batch-size 16 --smoothing 0 --sched constant "
    flags += "--output here"
    assert main(["shapes", *TINY, *flags.split()]) == 0
    assert "72 training and 24 test images in 3 classes, 3 x 8 x 8" in capsys.readouterr().out
    arguments = torch.load("here/checkpoint.pt", weights_only=True)["model_args"]
    assert arguments == {
        "num_classes": 3,
        "in_chans": 3,
        "img_size": 8,
        "patch_size": 2,
        "num_blocks": 1,
        "embed_dim": 16,
        "h_ratio": 1.0,
        "n_iter": 30,
        "n_power": 4,
        "coeff": 0.8,
        "solver": "anderson",
        "backward": "implicit",
        "rtol": 1e-3,
        "drop_path_rate": 0.1,
    }


def test_other_models_of_timm_train_too(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digit_tree(tmp_path / "shapes")
    assert main(["shapes", "--model", "test_resnet", "--cache-mb", "0", "--workers", "0", "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert "read from disk" in out
    assert "fixed-point" not in out


def test_help_reads_well(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for group in ("data:", "model:", "optimization:", "run:", "examples:"):
        assert f"\n{group}\n" in out
    assert "[0.003]" in out
    assert "None" not in out


@pytest.mark.parametrize("arguments", [["--epoch", "3"], ["--no-such-flag"], ["--epochs", "many"]])
def test_unknown_flags_and_abbreviations_are_refused(
    main: Main, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: data folder nowhere does not exist; . holds shapes/"),
        (["shapes/train"], "error: shapes/train has no train/ folder; it holds 0/, 1/, 2/"),
        (["--model", "imixer_s16_24"], "error: unknown model 'imixer_s16_24'; did you mean imixer_s16_224"),
        (["--solver", "picrad"], "error: cannot build imixer_ti4_32 with num_classes=10, in_chans=1, "),
        (["--lr", "-1"], "error: lr must be positive and finite, not -1.0"),
        (["--lr", "1e30", "--clip-grad", "0"], "error: the training loss is"),
        (
            ["--output", "shapes/train/0/000.png"],
            "error: cannot write to the output folder shapes/train/0/000.png",
        ),
        (["--amp", "--amp-dtype", "float16"], "error: amp_dtype float16 needs a CUDA device"),
    ],
)
def test_error_is_one_line_and_exit_code_2(
    main: Main, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digit_tree(tmp_path / "shapes", num_train=4, num_test=2)
    assert main([*TINY, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("training:", "\r"))]
    lines = [line for line in errors if line.strip()]
    assert lines[-1].startswith(message)


def test_image_broken_inside_is_named_by_worker_processes(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digit_tree(tmp_path / "shapes")
    path = tmp_path / "shapes" / "train" / "0" / "000.png"
    path.write_bytes(path.read_bytes()[:60])
    flags = ["--img-size", "8", "--patch-size", "2", "--cache-mb", "0", "--workers", "1"]
    assert main(["shapes", *TINY, *flags]) == 2
    assert "error: ValueError: cannot read image shapes/train/0/000.png" in capsys.readouterr().err


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


def test_interrupt_exits_130_and_keeps_the_last_epoch() -> None:
    process = start(*TINY, "--epochs", "100000", "--output", "run")
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
    assert "interrupted: the run's folder keeps the epochs that were finished" in err
    rows = Path("run/curves.csv").read_text().splitlines()
    epoch = torch.load("run/checkpoint.pt", weights_only=True)["epoch"]
    assert epoch - (len(rows) - 1) in (0, 1)  # the interrupt may come between the two files
