"""Training where its output goes nowhere, with hidden files, more images to an update than there are, and one class."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from digit_images import write_digit_tree
from training_runs import TINY_FLAGS

from imixer.data import load_image_folder
from imixer.training.train_command import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_imixer.py"

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")

# Where the output of a shell command goes.
NOWHERE = {
    "a pipe that is closed": "| head -n 1",
    "a full disk": "> /dev/full",
    "no output": ">&-",
    "no errors": "2>&- > out.txt",
}


@pytest.mark.long
@pytest.mark.parametrize("where", NOWHERE.values(), ids=NOWHERE)
def test_a_run_does_not_need_to_be_heard(where: str) -> None:
    flags = " ".join([*TINY_FLAGS, "--epochs 3 --warmup-epochs 1 --output run"])
    command = f"set -o pipefail; {sys.executable} {SCRIPT} {flags} {where}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(Path("run/curves.csv").read_text().splitlines()) == 4
    assert "Broken" not in done.stderr
    assert "No space" not in done.stderr


def test_names_that_begin_with_a_dot_are_no_images(tmp_path: Path) -> None:
    write_digit_tree(tmp_path, num_train=4, num_test=2)
    expected = load_image_folder(tmp_path, img_size=8)
    for split in ("train", "test"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / ".ipynb_checkpoints" / "x.png").write_bytes(b"no image")
        (tmp_path / split / "1" / ".hidden").mkdir()
        (tmp_path / split / "1" / ".hidden" / "x.png").write_bytes(b"no image")
        (tmp_path / split / "1" / "._000.png").write_bytes(b"of macOS")
    found = load_image_folder(tmp_path, img_size=8)
    assert found.classes == ("0", "1", "2")
    assert found.fingerprint() == expected.fingerprint()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for path in sorted((tmp_path / split).glob("[0-9]/*.png")):
                tar.add(path, path.relative_to(tmp_path / split))
        (tmp_path / split).rename(tmp_path / f"unpacked {split}")
    archives = load_image_folder(tmp_path, img_size=8)
    assert archives.classes == found.classes
    assert (len(archives.train), len(archives.test)) == (12, 6)


def test_one_class_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digit_tree(tmp_path / "below" / "images")
    for split in ("train", "test"):  # as where the folder above is given
        (tmp_path / split).mkdir()
        (tmp_path / split / "images").symlink_to(tmp_path / "below" / "images" / split / "0")
    assert main([str(tmp_path), *TINY_FLAGS]) == 2
    assert "has one class, images, and nothing can be learned from one" in capsys.readouterr().err


def test_the_rate_is_that_of_the_images_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {}
    for size in (1297, 5000):
        flags = [
            *TINY_FLAGS,
            "--epochs",
            "1",
            "--warmup-epochs",
            "0",
            "--batch-size",
            str(size),
            "--output",
            f"run{size}",
        ]
        assert main(flags) == 0
        lines[size] = next(line for line in capsys.readouterr().out.splitlines() if "to an update" in line)
    assert "5000 x 1 x 1 = 5000 images to an update (there are 1297)" in lines[5000]
    rate = lines[1297].partition("learning rate ")[2].partition(" ")[0]
    assert f"learning rate {rate} " in lines[5000]


def test_closing_lines_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    for tracker, expected in (("none", "run-none/curves.csv\n"), ("tensorboard", "curves.csv and tensorboard/\n")):
        flags = [*TINY_FLAGS, "--epochs", "1", "--warmup-epochs", "0", "--log-with", tracker]
        assert main([*flags, "--output", f"run-{tracker}"]) == 0
        assert expected in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_named_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["../nowhere", *TINY_FLAGS]) == 2
    assert f"data folder {Path.cwd().parent / 'nowhere'} does not exist" in capsys.readouterr().err
