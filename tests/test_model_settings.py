"""Settings that become arguments of the model and the optimizer: what each model takes, and keyword arguments."""

from __future__ import annotations

import math
import string
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
from digit_images import write_digit_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import MlpMixer
from training_runs import TINY

from imixer import validate_command
from imixer.imlp_options import IMLP_OPTIONS, IMLPOptions, choices
from imixer.training import TrainingConfig, build_model, load_checkpoint, load_data, parse, train
from imixer.training.command_line import read_settings, write_settings
from imixer.training.keyword_arguments import read_keyword_arguments
from imixer.training.model import build_optimizer, catch_up_norms, refused_arguments
from imixer.validation import load_trained_model, read_run, settings_of

MIXER = ["cifar10", "--preset", "paper-small", "--model", "mixer_s16_224"]


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")


# The options of an iMLP


def test_each_option_of_the_imlp_is_a_setting_as_it_is_declared():
    ours, theirs = get_type_hints(TrainingConfig), get_type_hints(IMLPOptions)
    items = {item.name: item for item in fields(TrainingConfig)}
    declared = [name for name, item in items.items() if item.metadata.get("argument") in IMLP_OPTIONS]
    assert declared == list(get_type_hints(IMLPOptions))
    for name, option in IMLP_OPTIONS.items():
        # A flag is text, and None leaves the value to the model.
        expected = (
            str if choices(name) else next((kind for kind in get_args(theirs[name]) if kind is str), theirs[name])
        )
        assert {*get_args(ours[name])} == {*(get_args(expected) or (expected,)), type(None)}, name
        assert items[name].default is None
        assert items[name].metadata["argument"] == name
        assert option.meaning in items[name].metadata["text"]
        assert items[name].metadata.get("choices", ()) == choices(name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_iter": 0}, "n_iter must be a positive integer, got 0"),
        ({"h_ratio": math.nan}, "h_ratio must be a positive number, got nan"),
        ({"norm": "layer"}, "norm must be one of 'spectral', 'none', .*'batch_per_step'.*, got 'layer'"),
    ],
)
def test_values_of_options_are_checked_before_anything_is_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_batch_statistics_in_every_step_train_and_are_refused_with_a_tolerance(tmp_path: Path) -> None:
    config = replace(TINY, norm="batch_per_step", epochs=1, output=str(tmp_path / "run"))
    data = load_data(config)
    model = train(config, data, progress=False).model
    assert model.get_buffer("blocks.0.mlp_tokens.bn2.num_batches_tracked") == 2 * 20  # steps times updates
    with pytest.raises(
        ValueError, match=r'cannot build .*rtol=0\.1.*"batch_per_step" makes each training step another'
    ):
        build_model(replace(config, rtol=0.1), data)


# Presets for other models


def test_the_baseline_takes_the_preset_without_the_options_of_the_imlp(capsys: pytest.CaptureFixture[str]) -> None:
    baseline, imixer = parse(MIXER).config(), parse(MIXER[:3]).config()
    assert capsys.readouterr().out == (
        "mixer_s16_224 does not take n_iter, h_ratio, n_power: these settings of the preset or the file are left out\n"
    )
    assert imixer.h_ratio == 2.0
    assert replace(imixer, model="mixer_s16_224", n_iter=None, h_ratio=None, n_power=None) == baseline
    assert baseline.model_arguments == {"img_size": 224, "drop_path_rate": 0.1}


@pytest.mark.parametrize(
    ("model", "left_out"),
    [
        ("imixer_b16_224", []),
        ("resnet18", ["n_iter", "h_ratio", "n_power"]),
        ("vit_tiny_patch16_224", ["n_iter", "h_ratio", "n_power"]),
        ("caformer_s18", ["n_iter", "h_ratio", "n_power"]),  # which words its complaint otherwise
        ("vgg11", ["n_iter", "h_ratio", "n_power", "drop_path"]),
    ],
)
def test_presets_fit_every_model(model: str, left_out: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = parse([*MIXER[:3], "--model", model]).config()
    said = capsys.readouterr().out
    assert said == (f"{model} does not take {', '.join(left_out)}: {said.partition(': ')[2]}" if left_out else "")
    assert all(getattr(config, name) is None for name in left_out)
    with torch.device("meta"):
        timm.create_model(model, num_classes=10, **{**config.model_arguments, "img_size": None})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--h-ratio", "2"], "mixer_s16_224 does not take --h-ratio; leave that out"),
        (["--n_iter", "4", "--norm", "batch"], "does not take --n-iter, --norm; leave"),
        (
            ["--model", "resnet18", "--num-blocks", "4", "--patch-size", "4"],
            "resnet18 does not take --patch-size, --num",
        ),
        (["--model", "vgg11", "--drop-path", "0.1"], "vgg11 does not take --drop-path;"),
        (["--model", "mixer_s16_24"], "unknown model 'mixer_s16_24'; did you mean mixer_s16_224"),
    ],
)
def test_flags_that_the_model_does_not_take_are_errors(flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse([*MIXER, *flags]).config(say=lambda _: pytest.fail("something was left out"))


def test_settings_of_a_file_are_left_out_too_and_flags_are_not() -> None:
    Path("mine.yaml").write_text("preset: paper-small\nmodel: mixer_s16_224\nn_iter: 3\ncoeff: 0.8\n")
    said: list[str] = []
    config = parse(["data", "--config", "mine.yaml"]).config(say=said.append)
    assert (config.n_iter, config.coeff, len(said)) == (None, None, 1)
    assert "n_iter, h_ratio, n_power, coeff" in said[0]
    assert parse(["data", "--config", "mine.yaml", "--model", "imixer_s16_224"]).config().coeff == 0.8
    with pytest.raises(ValueError, match="does not take --n-iter"):
        parse(["data", "--config", "mine.yaml", "--n-iter", "4"]).config()


def test_nothing_is_built_to_see_what_a_model_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a module was built"))
    arguments = {"h_ratio": 2.0, "img_size": 224, "drop_path_rate": 0.1, "num_blocks": 3}
    assert refused_arguments("mixer_s16_224", arguments) == {"h_ratio", "num_blocks"}
    assert refused_arguments("imixer_s16_224", arguments) == set()
    assert refused_arguments("imixer_s16_224", {"n_iter": "many", "nlhb": True}) == set()
    assert refused_arguments("resnet18", arguments) == {"h_ratio", "img_size", "num_blocks"}


@pytest.mark.long
def test_timm_builds_every_model_with_what_is_left_of_a_preset() -> None:
    preset = parse(MIXER[:3]).config().model_arguments
    del preset["img_size"]
    for name in timm.list_models():
        refused = refused_arguments(name, preset)
        assert {"h_ratio", "n_iter", "n_power"} <= refused or name.startswith("imixer"), name
        left = {argument: value for argument, value in preset.items() if argument not in refused}
        with pytest.raises(TypeError, match="no_such_argument"):
            timm.create_model(name, **left, no_such_argument=1)


def test_the_baseline_trains_with_the_preset_and_is_validated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digit_tree(tmp_path / "shapes")
    smaller = (
        "--num-classes 3 --img-size 32 --global-batch 24 --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --no-amp"
    )
    where = "--workers 1 --device cpu --output run"
    flags = ["shapes", *MIXER[1:], "--dataset", "", *smaller.split(), *where.split()]
    config = parse(flags).config(say=lambda _: None)
    data = load_data(config)
    result = train(config, data, progress=False)
    assert type(result.model) is MlpMixer
    run = read_run(Path("run/last.pt"))
    assert run is not None
    assert run["model_args"] == {"num_classes": 3, "in_chans": 3, "img_size": 32, "drop_path_rate": 0.1}
    tested = load_trained_model(Path("run/last.pt"), run, settings_of(run, {}), data).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(tested(images), result.model(images))
    for flags in (["--solver", "anderson"], ["--rtol", "1e-3"], ["--n_iter", "2"]):
        assert validate_command.main(["run", *flags]) == 2
        assert f"has no solver, and takes no {flags[0]}; leave that out" in capsys.readouterr().err
    assert validate_command.main(["run", "--device", "cpu"]) == 0


def test_images_of_any_size_for_models_that_do_not_ask() -> None:
    config = replace(TINY, model="test_resnet", num_blocks=None, embed_dim=None)
    data = load_data(config)
    model = build_model(config, data)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"cannot build test_resnet with .*h_ratio=2\.0: .*argument 'h_ratio'"):
        build_model(replace(config, h_ratio=2.0), data)


# --model-kwargs and --opt-kwargs


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values).map(tuple) | st.dictionaries(st.text(), values),
    max_leaves=8,
)
NAMES = st.text(string.ascii_letters + "_", min_size=1).map("x_".__add__)


@settings(max_examples=30)
@given(st.dictionaries(NAMES, PLAIN), st.dictionaries(NAMES, PLAIN))
def test_keyword_arguments_come_back_from_the_command_line_files_and_checkpoints(
    model_kwargs: dict[str, Any], opt_kwargs: dict[str, Any]
) -> None:
    command = parse(
        [
            "data",
            "--model-kwargs",
            *(f"{name}={value!r}" for name, value in model_kwargs.items()),
            "--opt-kwargs",
            *(f"{name}={value!r}" for name, value in opt_kwargs.items()),
        ]
    )
    config = command.config()
    assert (config.model_kwargs, config.opt_kwargs) == (model_kwargs, opt_kwargs)
    assert model_kwargs.items() <= config.model_arguments.items()
    Path("config.yaml").write_text(write_settings(config), "utf-8")
    assert TrainingConfig(**read_settings(Path("config.yaml"))) == replace(config, output=None)
    assert parse(["--config", "config.yaml"]).config() == config
    torch.save(config.model_arguments, "arguments.pt")
    assert torch.load("arguments.pt", weights_only=True) == config.model_arguments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=1", 1),
        ("x=1e-3", 1e-3),
        ("x=True", True),
        ("x=None", None),
        ("x=avg", "avg"),
        ("x='1'", "1"),
        ("x=", ""),
        ("x=a=b", "a=b"),
        ("x=(0.5,4)", (0.5, 4)),
        ("x=[1,[2]]", [1, [2]]),
        ("x={'a':1}", {"a": 1}),
        ("x=__import__('os').getcwd()", "__import__('os').getcwd()"),
        ("x={[]:1}", "{[]:1}"),
        ("x=" + "(" * 10_000, "(" * 10_000),
    ],
)
def test_values_are_literals_or_texts(text: str, value: object) -> None:
    assert read_keyword_arguments([text]) == {"x": value}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--model-kwargs", "stem_norm"],
            "argument --model-kwargs: 'stem_norm' is not NAME=VALUE, such as stem_norm=True",
        ),
        (["--model_kwargs", "=1"], "argument --model_kwargs: '=1' is not NAME=VALUE"),
        (["--opt-kwargs", "a-b=1"], "argument --opt-kwargs: 'a-b=1' is not NAME=VALUE"),
        (["--opt-kwargs", "a=1", "a=2"], "argument --opt-kwargs: a is given twice"),
    ],
)
def test_what_is_no_keyword_argument_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_kwargs": {"h_ratio": 3}},
            "model_kwargs sets h_ratio to 3, which has a flag of its own: use --h-ratio",
        ),
        ({"model_kwargs": {"drop_rate": 0.1}}, "sets drop_rate to 0.1, .*: use --drop$"),
        ({"model_kwargs": {"num_classes": 3}}, "use --num-classes"),
        ({"model_kwargs": {"checkpoint_path": "x"}}, "use --initial-checkpoint"),
        ({"model_kwargs": {"in_chans": 1}}, "sets in_chans, which the images decide"),
        ({"opt_kwargs": {"lr": 1}}, "opt_kwargs sets lr to 1, .*: use --lr$"),
        ({"opt_kwargs": {"betas": (0.9, 0.9)}}, "use --opt-betas"),
        ({"model_kwargs": {"x": {1, 2}}}, r"x in model_kwargs must consist of numbers.*not \{1, 2\}"),
        ({"opt_kwargs": {"x": [b"bytes"]}}, "x in opt_kwargs must consist of .*not b'bytes'"),
        ({"opt_kwargs": {"x": {1: 2}}}, "x in opt_kwargs must consist of"),
    ],
)
def test_keyword_arguments_that_cannot_be_taken(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


@pytest.mark.parametrize("content", ["opt_kwargs: 3", "opt_kwargs: [1]", "opt_kwargs: text", "opt_kwargs: true"])
def test_keyword_arguments_of_a_file_must_be_a_mapping(content: str) -> None:
    Path("mine.yaml").write_text(content)
    with pytest.raises(ValueError, match="opt_kwargs in mine.yaml must be dict, not"):
        parse(["--config", "mine.yaml"])


def test_keyword_arguments_reach_model_and_optimizer_and_are_saved(tmp_path: Path) -> None:
    flags = ["--model-kwargs", "stem_norm=True", "mlp_ratio=(1,2)", "--opt-kwargs", "amsgrad=True", "--output", "run"]
    smaller = "--num-blocks 1 --embed-dim 16 --epochs 1 --warmup-epochs 0 --device cpu"
    config = parse([*smaller.split(), *flags]).config()
    data = load_data(config)
    result = train(config, data, progress=False)
    assert isinstance(result.model.get_submodule("stem.norm"), torch.nn.LayerNorm)
    assert result.model.get_parameter("blocks.0.mlp_channels.fc1.weight").shape == (32, 16)
    checkpoint, _ = load_checkpoint(Path("run"))
    assert {"stem_norm": True, "mlp_ratio": (1, 2)}.items() <= checkpoint["model_args"].items()
    assert all("max_exp_avg_sq" in state for state in checkpoint["optimizer"]["state"].values())
    assert TrainingConfig(**checkpoint["config"]) == config
    with pytest.raises(ValueError, match="of another run: opt_kwargs amsgrad=True there, None here"):
        train(replace(config, opt_kwargs=None), data, resume=Path("run"), progress=False)
    run = read_run(Path("run/best.pt"))
    load_trained_model(Path("run/best.pt"), run, settings_of(run, {}), data)


def test_settings_of_the_optimizer_reach_it() -> None:
    changes: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.25, "opt_eps": 1e-3, "opt_betas": (0.5, 0.75)}
    model = build_model(TINY, load_data(TINY))
    groups = build_optimizer(replace(TINY, **changes), model).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert all((group["lr"], group["eps"], group["betas"]) == (0.5, 1e-3, (0.5, 0.75)) for group in groups)
    decayed = build_optimizer(replace(TINY, layer_decay=0.5), model).param_groups
    assert {group["lr_scale"] for group in decayed} == {1.0, 0.5, 0.25}
    momentum = build_optimizer(replace(TINY, opt="momentum", momentum=0.7), model).param_groups
    assert {group["momentum"] for group in momentum} == {0.7}


def test_keyword_arguments_that_do_not_exist_are_named() -> None:
    data = load_data(TINY)
    with pytest.raises(ValueError, match="cannot build imixer_ti4_32 with .*stem=1.*'stem'; did you mean 'stem_norm"):
        build_model(replace(TINY, model_kwargs={"stem": 1}), data)
    model = build_model(TINY, data)
    with pytest.raises(ValueError, match="cannot make the optimizer adamw with .*amsgard=1: .*'amsgard'.*amsgrad"):
        build_optimizer(replace(TINY, opt_kwargs={"amsgard": 1}), model)
    with pytest.raises(ValueError, match="cannot make the optimizer adamw with .*eps=-1.0.*: Invalid epsilon"):
        build_optimizer(replace(TINY, opt_eps=-1.0), model)


def test_norms_of_averaged_weights_catch_up_and_stay_in_eval_mode() -> None:
    model = build_model(TINY, load_data(TINY)).eval()
    layer = model.get_submodule("blocks.0.mlp_tokens.fc_sn1")
    original = layer.get_parameter("parametrizations.weight.original")
    torch.nn.init.normal_(original)  # the singular vectors are those of other weights now
    catch_up_norms(model)
    assert not any(module.training for module in model.modules())
    assert torch.linalg.matrix_norm(layer.weight.detach(), 2) < 1.2 < torch.linalg.matrix_norm(original.detach(), 2)  # type: ignore[operator]
