"""The published iMixer code: its outputs and gradients are reproduced, its checkpoints load."""

import json
import math

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_models import relative_error, small, trained_somewhat
from torch import nn
from torch.nn import functional as F

from imixer import IMLP, load_checkpoint
from implicit import Implicit
from solvers.linear import GMRES

REFERENCES = [f"imixer_seed{seed}_n{n}.safetensors" for seed in (0, 1, 2) for n in (1, 2, 4)]


def published(folder, name):
    config = next(c for c in json.loads((folder / "reference/index.json").read_text()) if c["file"] == name)
    tensors = load_file(folder / "reference" / name)
    model = timm.create_model(
        "imixer_s16_224",
        num_classes=config["num_classes"],
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        num_blocks=config["num_blocks"],
        embed_dim=config["embed_dim"],
        h_ratio=config["hidden_ratio"],
        n_iter=config["n_iter"],
        n_power=config["n_power_iterations"],
        backward="unrolled",
    )
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    return model.eval(), tensors, state


@pytest.mark.parametrize("name", REFERENCES)
def test_published_code_is_reproduced(shared_data, name):
    """Features, logits, loss and every gradient, in float32 and eval mode."""
    model, tensors, state = published(shared_data, name)
    model.load_state_dict(state)
    features = model.forward_features(tensors["input"])
    logits = model(tensors["input"])
    loss = F.cross_entropy(logits, tensors["target"])
    loss.backward()
    assert relative_error(features, tensors["features"]) < 1e-5
    assert relative_error(logits, tensors["logits"]) < 1e-5
    assert relative_error(loss, tensors["loss"][0]) < 1e-5
    theirs = {key.removeprefix("grad.") for key in tensors if key.startswith("grad.")}
    ours = {n.replace("parametrizations.weight.original", "weight_orig"): p for n, p in model.named_parameters()}
    assert ours.keys() == theirs
    # The gradient of a bias which a later norm removes is zero but for rounding.
    rounding = 1e-7 * max(tensors[f"grad.{key}"].norm() for key in theirs)
    for key, parameter in ours.items():
        expected = tensors[f"grad.{key}"]
        assert (parameter.grad - expected).norm() < 1e-5 * expected.norm() + rounding, key


@pytest.mark.parametrize("name", REFERENCES[::3])
def test_implicit_is_the_limit_of_unrolled(shared_data, name):
    """In float64, with many steps: outputs and gradients to 1e-8."""
    _, tensors, state = published(shared_data, name)
    gradients, outputs = [], []
    for options in (
        {"backward": "unrolled", "n_iter": 120},
        {"backward": Implicit(linear_solver=GMRES(rtol=1e-13)), "n_iter": 120, "rtol": 1e-14},
        {"backward": Implicit(linear_solver=GMRES(rtol=1e-13)), "n_iter": 120, "rtol": 1e-14, "solver": "anderson"},
    ):
        model = timm.create_model("imixer_s16_224", num_classes=10, **_shape_of(state), **options).double().eval()
        model.load_state_dict(state)
        logits = model(tensors["input"].double())
        F.cross_entropy(logits, tensors["target"]).backward()
        outputs.append(logits)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert relative_error(other, outputs[0]) < 1e-8
        # Some gradients, such as that of a bias which a later norm removes, are zero but for rounding.
        rounding = 1e-12 * max(b.norm() for b in gradients[0])
        for a, b in zip(gradient, gradients[0], strict=True):
            assert (a - b).norm() < 1e-8 * b.norm() + rounding


def _shape_of(state):
    embed, _, patch, _ = state["stem.proj.weight"].shape
    inner, width = state["blocks.0.mlp_tokens.fc_sn1.weight_orig"].shape
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    return {
        "embed_dim": embed,
        "patch_size": patch,
        "num_blocks": blocks,
        "img_size": patch * math.isqrt(state["blocks.0.mlp_tokens.fc1.weight"].shape[1]),
        "h_ratio": inner / width,
    }


def test_published_checkpoints_load_wherever_a_state_dict_is_loaded(tmp_path):
    model = trained_somewhat(small())
    x = torch.randn(2, 3, 16, 16)
    expected = model.eval()(x)
    published_state = {}
    for key, value in model.state_dict().items():
        key = key.replace("parametrizations.weight.original", "weight_orig")
        published_state[key.replace("parametrizations.weight.0.", "weight_")] = value
    for key in [key for key in published_state if key.endswith("weight_u")]:
        published_state[key.removesuffix("u") + "sigma"] = torch.ones(1)
    assert "blocks.0.mlp_tokens.fc_sn1.weight_orig" in published_state

    directly = small().eval()
    directly.load_state_dict(published_state)
    assert torch.equal(directly(x), expected)

    # As timm's training script saves it: with DDP's prefix, epoch and averaged weights.
    path = tmp_path / "model_best.pth.tar"
    torch.save(
        {"epoch": 3, "arch": "imixer", "state_dict": {f"module.{k}": v for k, v in published_state.items()}}, path
    )
    through_timm = small(checkpoint_path=path).eval()
    assert torch.equal(through_timm(x), expected)
    overlay = small(pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 5}).eval()
    assert torch.equal(overlay(x), expected)
    ours = small().eval()
    load_checkpoint(ours, path)
    assert torch.equal(ours(x), expected)
    save_file(published_state, tmp_path / "model.safetensors")
    safe = small().eval()
    load_checkpoint(safe, tmp_path / "model.safetensors")
    assert torch.equal(safe(x), expected)


def test_checkpoints_that_do_not_fit(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(small(h_ratio=1.0).state_dict(), path)
    with pytest.raises(ValueError, match=r"has h_ratio=1: create the model with that"):
        load_checkpoint(small(h_ratio=2.0), path)
    torch.save(small(num_classes=7, h_ratio=1.0).state_dict(), path)
    with pytest.raises(ValueError, match=r"head.weight has shape \(7, 24\) there and \(5, 24\) in the model"):
        load_checkpoint(small(h_ratio=1.0), path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"of another model: it lacks \d+ tensors .* and has 2 others \(bias, weight\)"
    ):
        load_checkpoint(small(), path)
    for norm in ("none", "weight", "batch"):
        torch.save(small(h_ratio=1.5, norm=norm).state_dict(), path)
        with pytest.raises(ValueError, match=r"has h_ratio=1.5: create the model with that"):
            load_checkpoint(small(norm=norm), path)
        with pytest.raises(ValueError, match=r"Create the model with the hidden_layers, the tied and the norm of"):
            load_checkpoint(small(), path)
    imlp = IMLP(4, h_ratio=3.0)
    torch.save(imlp.state_dict(), path)
    with pytest.raises(ValueError, match=r"has h_ratio=3: create"):
        load_checkpoint(IMLP(4), path)
    with pytest.raises(FileNotFoundError, match="no checkpoint file 'nowhere.pt'"):
        load_checkpoint(small(), "nowhere.pt")
