"""Weights of a run become files of the package, and timm loads them by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from image_archives import digit_pictures
from PIL import Image
from safetensors.torch import load_file, save_file

import imixer  # noqa: F401  registers the models
from imixer.reproduction.release import MAX_BYTES, main, release, round_to_half
from imixer.shipped_weights import FOLDER, pretrained_cfgs
from imixer.training import PRESETS, TrainingConfig, load_data, train

CLASSES = ["cat", "dog"]


def write_folder(root: Path) -> Path:
    """Two classes of pictures as folders."""
    pictures, _ = digit_pictures(32)
    for number, picture in enumerate(pictures):
        folder = root / ("train" if number < 24 else "test") / CLASSES[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return root


def trained(tmp_path: Path, **changes: object) -> Path:
    """The folder of a run of one epoch on these pictures."""
    settings = {**PRESETS["cifar10-small"], "data_dir": str(write_folder(tmp_path / "pictures")), "epochs": 1}
    settings |= {"batch_size": 8, "workers": 0, "device": "cpu", "output": str(tmp_path / "run"), **changes}
    config = TrainingConfig(**settings)
    return train(config, load_data(config), progress=False).output


def test_a_run_becomes_weights_that_timm_loads(tmp_path: Path) -> None:
    run, output = trained(tmp_path), tmp_path / "weights"
    made = release(run, output)
    assert made.weights == output / "imixer_ti4_32.safetensors"
    assert made.weights.stat().st_size == made.num_bytes < MAX_BYTES
    tensors = load_file(made.weights)
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() >= 2} == {torch.float16}
    assert {tensor.dtype for tensor in tensors.values() if tensor.dim() == 1} == {torch.float32}

    about = json.loads((output / "imixer_ti4_32.json").read_text())
    assert about["classes"] == CLASSES
    assert about["top1"] == made.top1
    card = (output / "imixer_ti4_32.md").read_text()
    assert f"{made.top1:.2f}% top-1 on the 8 test images" in card
    assert f"{made.num_bytes:,} bytes" in card

    cfgs = pretrained_cfgs("imixer_ti4_32", {"num_classes": 10, "classifier": "head"}, folder=output)
    ((name, cfg),) = cfgs.items()
    assert name == "imixer_ti4_32.pictures"
    assert (cfg["num_classes"], cfg["mean"]) == (2, tuple(about["mean"]))
    overlay = {name: cfg[name] for name in ("file", "num_classes", "mean", "std", "label_names")}
    model = timm.create_model("imixer_ti4_32", pretrained=True, num_classes=2, pretrained_cfg_overlay=overlay)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[key].to(tensor.dtype)), key
    assert timm.data.resolve_model_data_config(model)["mean"] == tuple(about["mean"])


def test_other_classes_take_the_body_and_a_new_head(tmp_path: Path) -> None:
    model = timm.create_model("imixer_ti4_32", num_classes=2)
    file = tmp_path / "imixer_ti4_32.safetensors"
    save_file({name: round_to_half(tensor) for name, tensor in model.state_dict().items()}, file)
    overlay = {"file": str(file), "num_classes": 2}
    other = timm.create_model("imixer_ti4_32", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert other.state_dict()["head.weight"].shape == (7, 64)
    for name in ("stem.proj.weight", "blocks.0.mlp_tokens.fc1.bias"):
        assert torch.equal(other.state_dict()[name], round_to_half(model.state_dict()[name]).float())


def test_without_a_file_pretrained_weights_are_refused(tmp_path: Path) -> None:
    cfg = {"num_classes": 10}
    assert pretrained_cfgs("imixer_ti4_32", cfg, folder=tmp_path) == {"imixer_ti4_32.untrained": cfg}
    for name in ("imixer_ti4_32", "imixer_s4_32"):
        if not (FOLDER / f"{name}.safetensors").is_file():
            with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
                timm.create_model(name, pretrained=True)


def test_a_model_that_its_name_does_not_describe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, n_iter=4)
    assert main([str(run), "--output", str(tmp_path / "weights")]) == 2
    assert "trained with other arguments" in capsys.readouterr().err
    assert not list((tmp_path / "weights").glob("*"))


def test_a_check_of_weights_that_are_not_there_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imixer_b16_224", str(tmp_path), "--check"]) == 2
    assert "no weights of imixer_b16_224 come with this package" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "last.pt" in capsys.readouterr().err


def test_shipped_weights_are_checked_against_their_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = trained(tmp_path), tmp_path / "weights"
    made = release(run, output)
    monkeypatch.setattr("imixer.reproduction.release.FOLDER", output)
    create = timm.create_model
    overlay = {"file": str(made.weights), "num_classes": 2}
    monkeypatch.setattr(
        "imixer.reproduction.release.timm.create_model",
        lambda name, **options: create(name, num_classes=2, pretrained_cfg_overlay=overlay, **options),
    )
    assert main(["imixer_ti4_32", str(tmp_path / "pictures"), "--check"]) == 0
    assert f"{made.top1:.2f}% here, {made.top1:.2f}% on its model card" in capsys.readouterr().out
    about = json.loads((output / "imixer_ti4_32.json").read_text())
    (output / "imixer_ti4_32.json").write_text(json.dumps(about | {"top1": about["top1"] + 1}))
    assert main(["imixer_ti4_32", str(tmp_path / "pictures"), "--check"]) == 1
