"""benchmarks/gpu.py at toy sizes on the CPU: every section, cells that fail, the budget, the published code."""

import json
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import timm
import torch

import imixer.data  # registers the models

ROOT = Path(__file__).resolve().parent.parent

# Has the imports and names of the published code, and timm's Mixer for a model.
STAND_IN = """
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.models.helpers import build_model_with_cfg, named_apply, checkpoint_seq
from timm.models.layers import PatchEmbed, Mlp, DropPath, lecun_normal_, to_2tuple
from timm.models.registry import register_model
from timm.models.mlp_mixer import MlpMixer as TimmMixer
from utils.spectral_norm_fc import spectral_norm_fc

class MlpMixer(TimmMixer):
    def __init__(self, hidden_ratio, n_repeat, n_power_iterations, **mixer_args):
        super().__init__(**mixer_args)

@register_model
def imixer_s16_224():
    raise AssertionError("in timm's registry this would take the place of ours")
"""


@pytest.fixture(scope="module")
def gpu():
    """What benchmarks/gpu.py defines and imports, by name."""
    return types.SimpleNamespace(**runpy.run_module("benchmarks.gpu"))


@pytest.fixture(autouse=True)
def _precision():
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    for file, content in {
        "utils/spectral_norm_fc.py": "spectral_norm_fc = None",
        "models/mlp_imixer.py": STAND_IN,
    }.items():
        (folder / file).parent.mkdir()
        (folder / file).write_text(content)
    return folder


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory, published):
    folder = tmp_path_factory.mktemp("gpu")
    options = ["--toy", "--device", "cpu", "--workers", "0", "--published", str(published), "--output", str(folder)]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def rows(data, section, **labels):
    chosen = [row for row in data["rows"] if row["section"] == section and row["labels"].items() >= labels.items()]
    assert chosen, (section, labels)
    return chosen


@pytest.mark.long
def test_every_cell_measures_or_needs_cuda(toy_run, gpu):
    done, data, page = toy_run
    reasons = {row["reason"] for row in data["rows"] if row["outcome"] != "ok"}
    assert reasons == {"needs CUDA"}
    ways = {row["labels"].get("way") for row in data["rows"] if row["outcome"] != "ok"}
    assert ways == {"CUDA graphs", "compiled, CUDA graphs"}
    assert {row["section"] for row in data["rows"]} == set(gpu.SECTIONS)
    assert done.stdout.strip() == page.strip()
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert sorted(headings) == sorted({row["table"] for row in data["rows"]} | {"Goals"})
    assert page.index("## Models against float64") < page.index("## Training") < page.index("## Goals")


@pytest.mark.long
def test_values_are_what_they_should_be(toy_run):
    _, data, _ = toy_run
    for row in rows(data, "correctness"):
        assert all(0 <= error < 1e-4 for error in row["values"].values())
    flops = {
        row["labels"]["n_iter"]: row["values"]["TFLOP a step"]
        for row in rows(data, "training", model="iMixer", size="S", precision="bf16", way="eager", backward="unrolled")
    }
    assert sorted(flops) == [1, 2, 4, 8, 16]
    assert flops[16] - flops[8] == pytest.approx(8 * (flops[2] - flops[1]))
    (mixer,) = rows(data, "training", model="Mixer", size="S", precision="bf16", way="eager")
    assert flops[2] - 2 * (flops[2] - flops[1]) == pytest.approx(mixer["values"]["TFLOP a step"])
    (training,), (inference,) = (
        rows(data, section, model="Mixer", size="S", precision="fp32", way="eager")
        for section in ("precisions", "inference")
    )
    # Nothing is differentiated by the images.
    assert 2 < training["values"]["TFLOP a step"] / inference["values"]["TFLOP a step"] < 3
    peaks = {row["labels"]["n_iter"]: row["values"]["peak GiB"] for row in rows(data, "memory")}
    assert 0.9 < peaks[16] / peaks[1] < 1.1
    assert all(row["values"]["images/s"] > 0 for row in rows(data, "pipeline"))
    for row in rows(data, "solvers"):
        assert row["values"]["residual"] < 1.5e-5


@pytest.mark.long
def test_goals_are_beside_what_was_measured(toy_run):
    _, data, page = toy_run
    assert len(data["goals"]) == 9
    assert all(isinstance(goal["measured"], float) and goal["met"] is not None for goal in data["goals"])
    assert page.count("| NO |") + page.count("| yes |") == 9


def test_a_budget_that_is_too_short_is_said(gpu, capsys):
    assert gpu.main(["--toy", "--device", "cpu", "--only", "peaks", "memory", "--budget-seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert "- measured: 0 of 7 cells\n" in printed
    assert printed.count("| cut: takes about ") == 7
    assert printed.count("| not measured |") == 9


def test_three_calls_measure_everything_in_nine_minutes_each(gpu, published):
    setup = gpu.Setup(device=torch.device("cuda"), toy=False, workers=16, published=published)
    cells = [cell for source in gpu.SOURCES for cell in source(setup)]
    assert {cell.section for cell in cells} == set(gpu.SECTIONS)
    for part, sections in gpu.PARTS.items():
        assert sum(cell.seconds for cell in cells if cell.section in sections) < 540 - gpu.SAVING_SECONDS, part


def test_a_part_measures_its_sections_alone(gpu, tmp_path):
    options = ["--toy", "--device", "cpu", "--part", "correctness", "--only", "peaks", "run", "--output", str(tmp_path)]
    assert gpu.main(options) == 0
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["section"] for row in data["rows"]} == {"peaks"}


def test_a_run_is_measured_beside_its_step(gpu, tmp_path):
    assert gpu.main(["--toy", "--device", "cpu", "--only", "run", "--output", str(tmp_path)]) == 0
    eager, graphs = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    values = eager["values"]
    assert values["share %"] == pytest.approx(100 * values["images/s of train()"] / values["images/s of the step"])
    assert graphs["reason"] == "needs CUDA"
    run = runpy.run_module("benchmarks.on_gpu.training_run")
    images = run["RepeatedImages"](torch.arange(2, dtype=torch.uint8).view(2, 1, 1, 1), torch.arange(2), length=5)
    assert len(images) == 5
    assert images.read(gpu_key([4, 3, 0])).targets.tolist() == [0, 1, 0]


def gpu_key(indices):
    return imixer.data.BatchKey(indices)


def test_a_cell_that_fails_leaves_the_others(gpu):
    def never():
        while True:
            time.sleep(0.01)

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def wrong():
        gpu.correctness.check({"logits": 1e-5, "gradients": 1e-2}, 1e-4)

    def broken():
        raise RuntimeError("x" * 300 + "| and more")

    def long():
        raise AssertionError("starts although no time is left for it")

    # Rank and function; the order is that of the table.
    runs = {"last": (1, lambda: {"ms": 1.5}), "memory": (0, out_of_memory), "wrong": (0, wrong), "broken": (0, broken)}
    runs |= {"never": (3, never), "long": (2, long)}
    cells = [
        gpu.Cell(section="s", table="t", labels={"what": what}, run=run, rank=rank, seconds=1e6 * (run is long))
        for what, (rank, run) in runs.items()
    ]
    found = list(gpu.run_cells(cells, deadline=time.monotonic() + 1))
    assert [(row.cell.labels["what"], row.outcome) for row in found] == [
        ("memory", "failed"),
        ("wrong", "wrong"),
        ("broken", "failed"),
        ("last", "ok"),
        ("long", "cut"),
        ("never", "failed"),
    ]
    *rows, cut, timeout = gpu.markdown("t", found).splitlines()
    assert rows == [
        "## t",
        "",
        "| what | ms |",
        "| --- | ---: |",
        "| memory | out of memory |",
        "| wrong | WRONG: gradients off by 1.0e-02, which may be 1e-04 |",
        f"| broken | RuntimeError: {'x' * 143}... |",
        "| last | 1.5 |",
    ]
    assert cut.startswith("| long | cut: takes about 1000000 s, ")
    assert timeout == "| never | TimeoutError: cut: the time was up before it ended |"


def test_wrong_answers_are_found_and_are_the_exit_code(gpu, monkeypatch, capsys):
    solve = gpu.correctness.solve

    def wrong(*args, **options):
        solution = solve(*args, **options)
        solution.value.mul_(1.001)
        return solution

    monkeypatch.setattr(gpu.correctness, "solve", wrong)
    monkeypatch.setattr(gpu.correctness, "MODELS", {})
    assert gpu.main(["--toy", "--device", "cpu", "--only", "correctness"]) == 1
    assert capsys.readouterr().out.count("WRONG: picard off by 1.0e-03, which may be 1e-06") == 2


def test_published_code_stays_out_of_the_way(published):
    load_published = runpy.run_path(str(ROOT / "benchmarks" / "published_imixer.py"))["load_published"]
    model = load_published(published)(n_iter=4, num_classes=7, img_size=32, patch_size=8, embed_dim=16)
    assert model.head.out_features == 7
    assert not {"utils", "models", "utils.spectral_norm_fc", "models.mlp_imixer"} & sys.modules.keys()
    assert timm.model_entrypoint("imixer_s16_224").__module__ == "imixer.imixer"
    with pytest.raises(FileNotFoundError, match="it has no utils/spectral_norm_fc.py. Get it by: git clone"):
        load_published("/nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "training", "speed"], "invalid choice: 'speed'"),
        (["--published", "/nowhere"], "error: --published /nowhere is no folder"),
    ],
)
def test_bad_options_are_refused(gpu, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--toy", "--device", "cpu", *options])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_it_says_how_it_is_started():
    with pytest.raises(SystemExit, match="python -m benchmarks.gpu"):
        runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"))
