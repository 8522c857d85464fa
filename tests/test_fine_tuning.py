"""Weights for other classes and image sizes: parts are left out only on request, and named; models for the Hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from digit_images import write_digit_tree
from training_runs import TINY

import imixer
from imixer.training import TrainingConfig, load_data, train
from imixer.training.train_command import main

MODELS = ["imixer_ti4_32", "mixer_s16_224"]


def make(name: str, **changes: int) -> torch.nn.Module:
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "num_classes": 5, **changes}
    if name.startswith("imixer"):
        sizes["num_blocks"] = 2
        return timm.create_model(name, **sizes)
    del sizes["patch_size"], sizes["embed_dim"]
    return timm.create_model(name, **{**sizes, "img_size": 4 * sizes["img_size"]})


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_new_head_keeps_all_but_the_classifier(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained = make(name)
    torch.nn.init.normal_(trained.get_parameter("head.bias"))
    torch.save(trained.state_dict(), path)
    model = make(name, num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = (
        r"head\.weight has shape \(5, \d+\) there and \(3, \d+\) in the model. The checkpoint tells 5 classes apart"
    )
    with pytest.raises(
        ValueError, match=rf"{message}: test it on .*, or train a new classifier with new_head=True \(--new-head in tr"
    ):
        imixer.load_checkpoint(model, path)
    assert imixer.load_checkpoint(model, path, new_head=True) == ["head.bias", "head.weight"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("head.") else trained.state_dict()[key]), key
    # Also where it would fit: it is what was asked for.
    same = make(name)
    bias = same.get_parameter("head.bias").clone()
    imixer.load_checkpoint(same, path, new_head=True)
    assert torch.equal(same.get_parameter("head.bias"), bias)
    assert imixer.load_checkpoint(same, path) == []
    assert torch.equal(same.get_parameter("head.bias"), trained.get_parameter("head.bias"))


def test_file_without_a_classifier_fits_a_new_head(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({key: value for key, value in make(name).state_dict().items() if not key.startswith("head.")}, path)
    with pytest.raises(ValueError, match=r"it lacks 2 tensors \(head\.bias, head\.weight\)"):
        imixer.load_checkpoint(make(name), path)
    assert imixer.load_checkpoint(make(name), path, new_head=True) == ["head.bias", "head.weight"]


def test_other_number_of_patches_needs_new_token_mixers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    trained, larger = make(name), make(name, img_size=32)
    torch.save(trained.state_dict(), path)
    with pytest.raises(
        ValueError, match=r"The checkpoint mixes 16 patches and the model 64: create .* new_token_mixing=True"
    ):
        imixer.load_checkpoint(larger, path)
    with pytest.raises(ValueError, match="The checkpoint mixes 16 patches and the model 64"):
        imixer.load_checkpoint(larger, path, new_head=True)  # which does not ask for that
    before = {key: value.clone() for key, value in larger.state_dict().items()}
    fresh = imixer.load_checkpoint(larger, path, new_token_mixing=True)
    assert fresh == sorted(key for key in before if ".mlp_tokens." in key)
    for key, value in larger.state_dict().items():
        assert torch.equal(value, before[key] if key in fresh else trained.state_dict()[key]), key


def test_other_patches_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(make(MODELS[0]).state_dict(), path)
    larger = make(MODELS[0], img_size=32, patch_size=8)  # as many patches, of another size
    with pytest.raises(ValueError, match=r"stem\.proj\.weight has shape \(24, 3, 4, 4\) there and \(24, 3, 8, 8\)"):
        imixer.load_checkpoint(larger, path, new_head=True, new_token_mixing=True)


def test_model_without_a_known_classifier_says_so(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="a Linear has no classifier that timm knows; leave new_head out"):
        imixer.load_checkpoint(torch.nn.Linear(2, 2), tmp_path / "weights.pt", new_head=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(TINY, epochs=1, warmup_epochs=0, output=str(tmp_path_factory.mktemp("run")))
    return train(config, load_data(config), progress=False).output


def test_run_begins_with_weights_of_another(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_digit_tree(tmp_path / "shapes")  # of three classes
    tiny = "shapes --num-blocks 1 --embed-dim 16 --epochs 1 --warmup-epochs 0 --lr 1e-9 --device cpu --cache-mb 64"
    flags = [*tiny.split(), "--patch-size", "2", "--initial-checkpoint", str(run / "best.pt"), "--output", "tuned"]
    assert main([*flags, "--img-size", "8"]) == 2
    assert "does not fit: stem.proj.weight has shape (16, 1, 2, 2) there" in capsys.readouterr().err
    torch.manual_seed(0)
    gray = timm.create_model("imixer_ti4_32", num_blocks=1, embed_dim=16, patch_size=2, img_size=8, num_classes=7)
    torch.save(gray.state_dict(), "other.pt")
    flags[flags.index(str(run / "best.pt"))] = "other.pt"
    assert main([*flags, "--img-size", "8"]) == 2
    assert capsys.readouterr().err.endswith("new_head=True (--new-head in training).\n")
    assert main([*flags, "--img-size", "8", "--new-head"]) == 0
    message = "the first weights are those of other.pt, except 2 tensors that start anew: head.bias, head.weight\n"
    assert message in capsys.readouterr().out
    found = torch.load("tuned/last.pt", weights_only=True)["state_dict"]
    name = "blocks.0.mlp_channels.fc1.weight"
    assert torch.allclose(found[name], gray.state_dict()[name])
    Path("other.pt").unlink()  # a run that goes on does not need it
    assert main(["--resume", "tuned", "--epochs", "2"]) == 0
    assert "first weights" not in capsys.readouterr().out
    assert main([*flags, "--img-size", "8", "--output", "third"]) == 2
    assert capsys.readouterr().err.endswith("error: There is no checkpoint file 'other.pt'.\n")


def test_the_hubs_form_of_a_run_gives_the_same_model(run: Path, tmp_path: Path) -> None:
    """As docs/runs.md shows it, without the network."""
    checkpoint = torch.load(run / "best.pt", weights_only=True)
    model = timm.create_model(checkpoint["model"], **checkpoint["model_args"])
    imixer.load_checkpoint(model, run / "best.pt")
    timm.models.save_for_hf(model, str(tmp_path / "hub"), model_args=checkpoint["model_args"], safe_serialization=True)
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["architecture"] == "imixer_ti4_32"
    again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    # The same weights start a run, and are tested.
    config: TrainingConfig = replace(TINY, initial_checkpoint=str(tmp_path / "hub" / "model.safetensors"))
    assert "are those of" in _first_note(config)


def _first_note(config: TrainingConfig) -> str:
    from imixer.training.model import create_model, load_first_weights

    return load_first_weights(create_model(config, load_data(config)), config)
