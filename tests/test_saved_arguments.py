"""Arguments of a model that its checkpoint may give: all that a run needs, and none that names files or addresses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from digit_images import write_digit_tree
from training_runs import TINY

from imixer.training import TrainingConfig, load_checkpoint, load_data, train
from imixer.training.command_line import Command, saved_settings
from imixer.training.model import build_model, check_model_arguments, model_arguments
from imixer.validation import load_trained_model, read_run, settings_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")

MODELS = ["imixer_ti4_32", "mixer_s16_224", "resnet18", "efficientvit_b0", "seresnextaa201d_32x8d", "inception_v4"]


def test_models_of_every_file_of_timm_may_be_built_from_their_checkpoints() -> None:
    """Many of the entrypoints do not say which class they return."""
    names = {timm.model_entrypoint(name).__module__: name for name in timm.list_models()}
    for name in (*names.values(), *MODELS):
        check_model_arguments("a run", name, {"num_classes": 3, "in_chans": 1, "img_size": 64, "drop_path_rate": 0.1})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", {"url": "http://127.0.0.1/"}),
        ("pretrained_cfg_overlay", {"file": "evil.pt"}),
        ("checkpoint_path", "evil.pt"),
        ("cache_dir", "here"),
        ("scriptable", True),
        ("features_only", True),
        ("kwargs_filter", ("num_classes",)),
        ("url", "http://127.0.0.1/"),
        ("no_such_argument", 1),
        ("num_classes", print),
        ("global_pool", [b"avg"]),
    ],
)
def test_what_a_checkpoint_may_not_give(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"a run asks for {name} with {argument}=.*, which is not taken from a"):
        check_model_arguments("a run", name, {argument: value})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("efficientvit_b0", {"expand_ratio": 2, "widths": (8, 16, 32, 64, 128)}),
        ("efficientnet_b0", {"channel_multiplier": 0.5}),
        ("resnet18", {"stem_width": 32, "block_args": {"attn_layer": "se"}}),
        ("maxvit_tiny_rw_224", {"transformer_cfg": {"window_size": (7, 7)}}),
    ],
)
def test_arguments_of_a_models_own_may_be_saved(name: str, arguments: dict[str, Any]) -> None:
    check_model_arguments("a run", name, arguments)
    assert saved_settings({"model": name, "model_kwargs": arguments})["model_kwargs"] == arguments


@pytest.mark.parametrize(
    ("argument", "value"), [("features_only", True), ("scriptable", True), ("exportable", True), ("no_jit", True)]
)
def test_a_run_that_could_not_be_resumed_is_refused(argument: str, value: object) -> None:
    config = TrainingConfig(model="test_resnet", model_kwargs={argument: value})
    with pytest.raises(ValueError, match=f"model_kwargs sets {argument} to True, .*neither resumed nor validated"):
        build_model(config, load_data(config))


def test_first_weights_of_timm_are_trained_and_not_asked_for_again(tmp_path: Path) -> None:
    write_digit_tree(tmp_path / "shapes", num_train=8, num_test=4)
    sizes: dict[str, Any] = {"num_blocks": None, "embed_dim": None, "epochs": 1, "warmup_epochs": 0, "workers": 0}
    config = replace(
        TINY, data_dir=str(tmp_path / "shapes"), batch_size=8, model_kwargs={"pretrained": True}, **sizes, output="run"
    )
    data = load_data(config)
    theirs = timm.create_model("imixer_ti4_32", pretrained=True).get_parameter("stem.proj.weight")
    assert torch.equal(build_model(config, data).get_parameter("stem.proj.weight"), theirs)
    trained = train(config, data, progress=False).model
    run = read_run(Path("run/last.pt"))
    assert run is not None
    assert run["model_args"] == model_arguments(config, data) == {"num_classes": 3, "in_chans": 3}
    tested = load_trained_model(Path("run/last.pt"), run, settings_of(run, {}), data)
    assert torch.equal(tested.get_parameter("head.weight"), trained.get_parameter("head.weight"))
    again = Command(settings={"epochs": 2}).config(load_checkpoint(Path("run"))[0]["config"])
    assert again.model_kwargs is None
    train(again, data, resume=Path("run"), progress=False)
    train(replace(config, epochs=3), data, resume=Path("run"), progress=False)  # the same command again
