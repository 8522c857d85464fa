"""Testing a trained model: the numbers, the table, the plot, and which files are refused."""

from __future__ import annotations

import argparse
import http.server
import json
import os
import re
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from digit_images import write_digit_tree
from PIL import Image
from small_models import Evil
from training_runs import TINY, read_curves

from imixer.confusion_plot import plot_confusion
from imixer.data import load_digits, make_loader
from imixer.training import build_model, load_data, parse, train
from imixer.training.checkpoints import save_checkpoint
from imixer.training.model import model_arguments
from imixer.training.plots import plot_curves
from imixer.validate_command import main
from imixer.validation import Validation, find_checkpoint, format_validations, validate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, with averaged weights."""
    config = replace(TINY, epochs=2, n_iter=2, model_ema=True, model_ema_decay=0.8)
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(replace(config, output=str(folder)), load_data(config), progress=False)
    return folder


def digits_model(n_iter: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"in_chans": 1, "img_size": 8, "patch_size": 2, "num_blocks": 1, "embed_dim": 16}
    model = timm.create_model("imixer_ti4_32", num_classes=10, n_iter=n_iter, **shape).eval()
    torch.nn.init.normal_(model.get_parameter("head.weight"))  # zeros, at first
    return model


def test_numbers_are_those_of_the_logits() -> None:
    data = load_digits()
    model = digits_model()
    results = validate(
        model, make_loader(data.test, batch_size=64, training=False, workers=0, seed=0), num_classes=10, n_iters=[1, 6]
    )
    images, targets = next(iter(make_loader(data.test, batch_size=500, training=False, workers=0, seed=0)))
    for result in results:
        assert result.n_iter is not None
        other = digits_model(result.n_iter)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits = other(images)
        ranks = logits.argsort(dim=1, descending=True)
        assert result.top1 == pytest.approx(100 * (ranks[:, 0] == targets).float().mean().item())
        assert result.top5 == pytest.approx(100 * (ranks[:, :5] == targets[:, None]).any(dim=1).float().mean().item())
        assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
        for index, accuracy in enumerate(result.class_accuracies):
            assert accuracy == pytest.approx(100 * (ranks[targets == index, 0] == index).float().mean().item())
        taken = [[int((ranks[targets == row, 0] == column).sum()) for column in range(10)] for row in range(10)]
        assert result.confusion.tolist() == taken
        assert result.images_per_second > 0
    assert results[0].residual is not None
    assert results[1].residual is not None
    assert results[1].residual < results[0].residual


def test_models_without_steps_and_data_without_images_are_refused() -> None:
    loader = make_loader(load_digits().test, batch_size=500, training=False, workers=0, seed=0)
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    (result,) = validate(linear, loader, num_classes=10)
    assert (result.n_iter, result.residual) == (None, None)
    with pytest.raises(ValueError, match="a Sequential takes no solver steps"):
        validate(linear, loader, num_classes=10, n_iters=[2])
    with pytest.raises(ValueError, match="no images"):
        validate(linear, [], num_classes=10)


def test_table_lists_the_worst_of_many_classes() -> None:
    confusion = torch.diag(torch.arange(30)) + 5 * torch.eye(30, dtype=torch.int64).roll(1, dims=1)
    confusion[3] = 0
    result = Validation(n_iter=2, confusion=confusion)
    assert result.class_accuracies[3] is None
    table = format_validations([result], [f"c{index}" for index in range(30)], most_classes=4).splitlines()
    assert [line.split()[1] for line in table[6:-1]] == ["c0", "c1", "c2", "c4"]
    assert table[-1] == "(4 of 30 classes, those with the lowest accuracy in the last column)"
    table = format_validations([result], [f"c{index}" for index in range(30)], most_classes=30).splitlines()
    assert table[9].split() == ["class", "c3", "%", "-"]


def test_plot_has_room_for_the_names_of_100_classes(tmp_path: Path) -> None:
    confusion = 9 * torch.eye(100, dtype=torch.int64) + 1
    plot_confusion(confusion, [f"class {index}" for index in range(100)], tmp_path / "plot.png", title="all")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.height > 20 * 100


def test_plots_take_names_that_look_like_formulas_or_are_not_text(tmp_path: Path) -> None:
    names = ["$5_$", "$x^$", os.fsdecode(b"\xff\xfe"), "a\\$b$"]
    plot_confusion(torch.eye(4), names, tmp_path / "plot.png", title="a_$x_$b")
    (tmp_path / "curves.csv").write_text("epoch,train_loss,test_loss,test_top1\n1,2,2,50\n")
    plot_curves(tmp_path / "curves.csv", tmp_path / "curves.png", title=names[0] + names[2])
    assert (tmp_path / "plot.png").stat().st_size > 1000 < (tmp_path / "curves.png").stat().st_size


def test_run_is_tested_on_its_own_images(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--n_iter", "1", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert "best.pt: imixer_ti4_32; 500 test images of digits; cpu" in out
    assert re.search(r"^solver steps +1 +2 +4$", out, re.MULTILINE)
    summary = json.loads((run / "validation.json").read_text())
    results = {result["n_iter"]: result for result in summary["results"]}
    assert set(results) == {1, 2, 4}
    best = max(float(row["ema_top1"]) for row in read_curves(run))
    assert results[2]["top1"] == pytest.approx(best)
    assert f"{results[4]['top1']:.2f}" in out
    assert sum(map(sum, results[1]["confusion"])) == summary["images"] == 500
    with Image.open(run / "confusion.png") as image:
        assert image.size > (700, 700)


def test_averaged_weights_can_be_left_out(run: Path, tmp_path: Path) -> None:
    top1 = {}
    for flags in ([], ["--no-ema"]):
        assert main([str(run / "last.pt"), "--n_iter", "2", "--output", str(tmp_path), *flags]) == 0
        top1[bool(flags)] = json.loads((tmp_path / "validation.json").read_text())["results"][0]["top1"]
    last = read_curves(run)[-1]
    assert (top1[False], top1[True]) == (
        pytest.approx(float(last["ema_top1"])),
        pytest.approx(float(last["test_top1"])),
    )


def test_other_solver_tolerance_and_precision(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--solver", "anderson", "--rtol", "1e-3", "--n_iter", "20", "--amp", "--output", str(tmp_path / "new")]
    assert main([str(run), *flags]) == 0
    assert "median residual" in capsys.readouterr().out
    summary = json.loads((tmp_path / "new" / "validation.json").read_text())
    assert (summary["solver"], summary["rtol"], summary["precision"]) == ("anderson", 1e-3, "bfloat16")
    assert summary["results"][0]["residual"] < 1e-3


def test_published_weights_need_the_models_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = timm.create_model("imixer_ti4_32", num_classes=10, in_chans=1, img_size=8, patch_size=2, h_ratio=1.0)
    path = tmp_path / "model_best.pth.tar"
    torch.save({"state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3}, path)
    assert main([str(path)]) == 2
    assert "does not say which model it is of; give --model" in capsys.readouterr().err
    assert main([str(path), "--model", "imixer_ti4_32"]) == 2
    assert "create the model with that" in capsys.readouterr().err
    assert main([str(path), "--model", "imixer_ti4_32", "--h_ratio", "1", "--n_iter", "2"]) == 0
    assert (tmp_path / "confusion.png").is_file()
    assert find_checkpoint(path) == path


def test_wrong_checkpoints_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*arguments: str) -> str:
        assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    assert f"there is no checkpoint {tmp_path / 'nothing.pt'}" in error(str(tmp_path / "nothing.pt"))
    (tmp_path / "empty").mkdir()
    assert "empty/last.pt; give a run's folder, its best.pt or its last.pt" in error(str(tmp_path / "empty"))
    content = (run / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    assert f"cut.pt ({len(content) // 2:,} bytes) is damaged or no checkpoint:" in error(str(tmp_path / "cut.pt"))
    (tmp_path / "flipped.pt").write_bytes(content[:-500] + bytes([content[-500] ^ 1]) + content[-499:])
    assert "flipped.pt" in (message := error(str(tmp_path / "flipped.pt")))
    assert "is damaged: its SHA-256 digest is wrong" in message
    torch.save([1, 2], tmp_path / "list.pt")
    assert "list.pt holds a list, not a model's weights" in error(str(tmp_path / "list.pt"))
    torch.save({**torch.load(run / "best.pt", weights_only=True), "format": "", "mean": 3}, tmp_path / "mean.pt")
    assert "mean.pt is no checkpoint of a training run: mean is '3'" in error(str(tmp_path / "mean.pt"))
    torch.save({"head.weight": torch.ones(2)}, tmp_path / "foreign.pt")
    message = error(str(tmp_path / "foreign.pt"), "--model", "imixer_ti4_32")
    assert "foreign.pt' is of another model: it lacks" in message
    assert "leave --model and --h_ratio out" in error(str(run), "--h_ratio", "1")
    write_digit_tree(tmp_path / "tree")
    assert "tells 10 classes apart (0, 1, 2, 3 ...), and tree has 3 (0, 1, 2 ...)" in error(
        str(run), "--data-dir", str(tmp_path / "tree")
    )
    message = error(str(run), "--img-size", "16")
    assert "best.pt takes images of 8 x 8 pixels, not 16 x 16; leave --img-size out" in message
    assert "unknown model 'imixer'" in error(str(tmp_path / "foreign.pt"), "--model", "imixer")
    assert "no solver 'secant'" in error(str(run), "--solver", "secant")
    assert not (tmp_path / "out").exists()


def test_models_for_images_of_any_size_are_tested_at_another_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "test_resnet", "--epochs", "1", "--warmup-epochs", "0", "--output", str(tmp_path)]
    config = parse(flags).config(say=lambda _: None)
    data = load_data(config)
    model = build_model(config, data)
    run = {"model": config.model, "model_args": model_arguments(config, data), "classes": list(data.classes)}
    rest: dict[str, Any] = {"mean": list(data.mean), "std": list(data.std), "config": asdict(config)}
    save_checkpoint(tmp_path, {"state_dict": model.state_dict(), **run, **rest})
    assert main([str(tmp_path / "last.pt"), "--img-size", "16"]) == 0
    assert "test_resnet; 500 test images of digits" in capsys.readouterr().out


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """An address, and what was asked for there."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/weights.pt", asked
        running.shutdown()
        thread.join()


@pytest.mark.long
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_args": {"pretrained": True, "pretrained_cfg": {"url": "URL"}}}, "with pretrained='True'"),
        ({"model_args": {"pretrained_cfg": {"url": "URL"}}}, "with pretrained_cfg="),
        ({"model_args": {"pretrained_cfg_overlay": {"url": "URL"}}}, "with pretrained_cfg_overlay="),
        ({"model_args": {"checkpoint_path": "evil.pt"}}, "with checkpoint_path='evil.pt'"),
        ({"model_args": {"cache_dir": "here"}}, "with cache_dir='here'"),
        ({"model_args": {"num_classes": {"a": 1}}}, "cannot build the imixer_ti4_32 of "),
        ({"model_args": {"patch_size": 0}}, "cannot build the imixer_ti4_32 of "),
        ({"model_args": {"block_layer": "x"}}, "cannot build the imixer_ti4_32 of "),
        ({"model_args": {1: 2}}, "with 1='2'"),
        ({"model": "hf-hub:someone/model"}, "unknown model 'hf-hub:someone/model'"),
        ({"model": "local-dir:evil"}, "unknown model 'local-dir:evil'"),
        ({"model": 7}, "no checkpoint of a training run: model is '7'"),
        ({"classes": "0123456789"}, "no checkpoint of a training run: classes is"),
        ({"classes": [1, 2]}, "tells 2 classes apart (1, 2 ...)"),
        ({"mean": ["x"]}, "no checkpoint of a training run: mean is"),
        ({"config": {"epochs": []}}, "epochs in the checkpoint must be int"),
        ({"config": {"dataset": "hfds/x", "data_dir": "d", "dataset_download": True}}, "/d does not exist; "),
    ],
)
def test_what_a_checkpoint_says_is_never_followed(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    server: tuple[str, list[str]],
    entries: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", pytest.fail, raising=False)
    monkeypatch.setattr(sys.modules["datasets"], "load_from_disk", pytest.fail, raising=False)
    torch.save(Evil(tmp_path / "trace"), "evil.pt")
    url, asked = server
    entries = json.loads(json.dumps(entries).replace("URL", url)) if "URL" in str(entries) else entries
    save_checkpoint(tmp_path, {**torch.load(run / "last.pt", weights_only=True), **entries})
    assert main([str(tmp_path / "last.pt")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert asked == []
    assert not (tmp_path / "trace").exists()
