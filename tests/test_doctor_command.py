"""The command line ``python -m implicit doctor``."""

import base64
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from implicit.__main__ import main

ROOT = Path(__file__).resolve().parent.parent

MODULE = """
import torch
from torch import nn
from implicit import FixedPointLayer

class Net(nn.Module):
    def __init__(self, rate=-1.5):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))
        self.layer = FixedPointLayer(lambda z, x: self.rate * z + x, solver="picard")

    def forward(self, x):
        return self.layer(x)

def with_inputs():
    return Net(), torch.ones(2, 3)

def wrong():
    return "no model"

def no_key():
    return {}["rate"]

def needs(size):
    return Net()

class Broken(Net):
    def forward(self, x):
        return self.layer(x) * (1 // 0)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_nets"
    sys.modules.pop("my_nets", None)


def test_sick_model_of_a_module(nets, capsys, tmp_path):
    assert main(["doctor", "--model", "my_nets:with_inputs", "--json", "found.json"]) == 1
    assert "OSCILLATION" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["layers"]["layer"]["findings"][0]["cause"] == "oscillation"


def test_checkpoint_and_random_inputs(nets, capsys):
    torch.save({"state_dict": {"module.rate": torch.tensor(0.5)}}, "weights.pt")
    assert main(["doctor", "--model", "my_nets:Net", "--checkpoint", "weights.pt", "--shape", "3"]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out


def test_checkpoint_is_not_executed(nets, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    with open("evil.pt", "wb") as file:
        pickle.dump({"rate": Evil()}, file, protocol=2)  # the one that PyTorch writes
    assert main(["doctor", "--model", "my_nets:Net", "--checkpoint", "evil.pt", "--shape", "3"]) == 2
    caught = capsys.readouterr()
    assert "executed" not in caught.out
    assert caught.err.startswith("error:")


def test_page_is_self_contained(nets, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["doctor", "--model", "my_nets:with_inputs", "--html", "page.html"]) == 1
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 1
    assert base64.b64decode(images[0]).startswith(b"\x89PNG")
    assert "OSCILLATION" in page


def test_timm_model_on_images(capsys, tmp_path):
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    for i in range(3):
        (tmp_path / "class").mkdir(exist_ok=True)
        image.new("RGB", (40, 30), (80 * i, 10, 200)).save(tmp_path / "class" / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    options = ["--import", "imixer", "--model", "imixer_ti4_32", "--images", str(tmp_path), "--batch", "2"]
    assert main(["doctor", *options]) == 0
    out = capsys.readouterr().out
    assert "FixedPointLayer of IMLP" in out
    assert "Nothing is wrong." in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "my_nets:missing"], "has no callable 'missing'"),
        (["--model", "my_nets:wrong"], "must return a torch.nn.Module"),
        (["--model", "my_nets:no_key"], "the callable, without arguments, raised KeyError: 'rate' ("),
        (["--model", "my_nets:needs"], "raised TypeError: needs() missing 1 required positional argument"),
        (
            ["--model", "my_nets:Broken", "--shape", "3"],
            "error: ZeroDivisionError: integer division or modulo by zero (",
        ),
        (["--model", "no_such_module:Net"], "No module named 'no_such_module'"),
        (["--model", "my_nets:Net"], "give --shape, for example"),
        (["--model", "my_nets:Net", "--shape", "3", "--checkpoint", "none.pt"], "none.pt"),
        (["--model", "my_nets:Net", "--shape", "3", "--images", "."], "there is no image in this folder"),
        (["--model", "no_such_model"], "timm knows no such model. Models of other packages are known when"),
        (["--model", "mixer_s16_244"], "no such model, but mixer_s16_224"),
    ],
)
def test_wrong_arguments(nets, capsys, options, message):
    assert main(["doctor", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no_key", "Broken"])
def test_error_of_the_model_says_where_it_was_raised(nets, capsys, tmp_path, name):
    arguments = ["doctor", "--model", f"my_nets:{name}", "--shape", "3"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{re.escape(str(tmp_path / 'my_nets.py'))}, line \d+", error)
    assert "Traceback" not in error
    assert main([*arguments, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_images_of_other_formats_are_refused(capsys, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("PIL")
    (tmp_path / "plot.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    assert main(["doctor", "--import", "imixer", "--model", "imixer_ti4_32", "--images", str(tmp_path)]) == 2
    assert "cannot identify image file" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["doctor"], ["doctor", "--model", "a:b", "--batch", "0"]])
def test_unusable_command_lines(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2


def test_runs_as_a_module():
    command = [sys.executable, "-m", "implicit", "doctor", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0
    assert "--checkpoint" in run.stdout


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pt", b""),
        ("cut.pt", b"PK\x03\x04"),
        ("cut.safetensors", b"\x10"),
        ("text.pt", b"epoch 1: loss 0.3"),
    ],
)
def test_damaged_checkpoints_are_wrong_arguments(nets, capsys, name, content):
    Path(name).write_bytes(content)
    assert main(["doctor", "--model", "my_nets:Net", "--checkpoint", name, "--shape", "3"]) == 2
    assert f"{name} cannot be read: it is no checkpoint that holds only tensors" in capsys.readouterr().err


def test_a_checkpoint_with_numbers_for_names_is_a_wrong_argument(nets, capsys):
    torch.save({0: torch.ones(1)}, "numbers.pt")
    assert main(["doctor", "--model", "my_nets:Net", "--checkpoint", "numbers.pt", "--shape", "3"]) == 2
    assert "numbers.pt holds no state dict" in capsys.readouterr().err
