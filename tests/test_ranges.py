"""Values of settings that cannot be meant: each is refused before anything is read or written."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_runs import TINY, TINY_FLAGS

from imixer import validate_command
from imixer.training import TrainingConfig, build_model, load_data
from imixer.training.model import build_optimizer, check_model_name
from imixer.training.train_command import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")

FLOATS = (
    *("hflip", "color_jitter", "grayscale_prob", "mixup", "cutmix", "mixup_prob", "smoothing", "crop_pct", "drop"),
    *("opt_eps", "momentum", "weight_decay", "layer_decay", "clip_grad", "lr", "lr_base", "min_lr", "warmup_lr"),
    *("decay_epochs", "decay_rate", "bce_target_thresh", "model_ema_decay"),
)


@pytest.mark.parametrize("name", FLOATS)
def test_nan_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a number, not nan"):
        TrainingConfig(**{name: math.nan})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutmix_minmax": (0.5,)}, "cutmix_minmax must be the least and the largest value, such as 0.2 0.8, not 0.5"),
        ({"cutmix_minmax": (0.8, 0.2)}, "cutmix_minmax must be the least and the largest value, .* not 0.8 0.2"),
        ({"cutmix_minmax": (0.5, 0.5)}, "cutmix_minmax must be two different numbers, not 0.5 0.5"),
        ({"cutmix_minmax": (0.5, 1.5)}, "cutmix_minmax must be parts of the image's side, from 0 to 1, not 1.5"),
        ({"scale": (0.5,)}, "scale must be the least and the largest value, .* not 0.5"),
        ({"scale": (0.1, 0.2, 0.3)}, "scale must be the least and the largest value, .* not 0.1 0.2 0.3"),
        ({"scale": ()}, "scale must be the least and the largest value, .* not no number"),
        ({"ratio": (0.0, 0.0)}, "ratio must be positive and finite, not 0.0"),
        ({"ratio": (1.0, math.inf)}, "ratio must be positive and finite, not inf"),
        ({"mean": (0.5, 0.5)}, "mean must be one number, or one for each of 3 channels, not 0.5 0.5"),
        ({"mean": (0.5, math.nan, 0.5)}, "mean must be a number, not nan"),
        ({"std": (0.0,)}, "std must be positive and finite, not 0.0"),
        ({"crop_pct": -1.0}, "crop_pct must be positive and finite, not -1.0"),
        ({"decay_epochs": 0.0}, "decay_epochs must be positive and finite, not 0.0"),
        ({"decay_milestones": (-1,)}, "decay_milestones must not be negative, but is -1"),
        ({"mixup": math.inf}, "mixup must be finite, not inf"),
        ({"weight_decay": math.inf}, "weight_decay must be finite, not inf"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295, not 4294967296"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, not -1"),
        ({"recount": -3}, "recount must not be negative, but is -3"),
        ({"grayscale_prob": 2.0}, "grayscale_prob is a probability, from 0 to 1, not 2.0"),
        ({"output": ""}, "output is empty; give a folder, or set the variable"),
        ({"data_dir": " "}, "data_dir is empty; give a folder, or set the variable"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_no_gradient_is_clipped_by_an_infinite_norm() -> None:
    assert TrainingConfig(clip_grad=math.inf).clip_grad == math.inf


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt_betas": (0.9,)}, "cannot make the optimizer adamw with .*: betas must be 2 numbers, not 1; it takes"),
        ({"opt_betas": (0.9, 0.9, 0.9)}, "betas must be 2 numbers, not 3"),
        ({"opt": "adan", "opt_betas": (0.9, 0.9)}, "betas must be 3 numbers, not 2"),
        ({"opt_kwargs": {"amsgrad": "["}}, r"amsgrad must be bool, not '\['"),
        ({"opt": "sgd", "opt_kwargs": {"dampening": "x"}}, "dampening must be int, not 'x'|must be float, not 'x'"),
        ({"opt": "adahessian"}, "the optimizer adahessian takes second derivatives, which are not computed; choose"),
        (
            {"opt": "adafactorbv"},
            "the optimizer adafactorbv keeps momentum_dtype=torch.bfloat16, .* not be saved",
        ),
        ({"opt": "fusedadam"}, "the optimizer fusedadam cannot be used here: APEX and CUDA required|fusedadam .*APEX"),
    ],
)
def test_arguments_that_an_optimizer_notices_late_are_refused(changes: dict[str, Any], message: str) -> None:
    config = replace(TINY, **changes)
    model = build_model(TINY, load_data(TINY))
    with pytest.raises(ValueError, match=message):
        build_optimizer(config, model)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"amp": True, "amp_dtype": "bfloat16", "model_ema": True, "model_ema_decay": 0.9}, []),
        ({"amp_dtype": "bfloat16"}, ["amp_dtype has no effect without amp"]),
        ({"bce_target_thresh": 0.2}, ["bce_target_thresh has no effect without bce_loss"]),
        ({"model_ema_warmup": True}, ["model_ema_warmup has no effect without model_ema"]),
        ({"torchcompile_mode": "max-autotune"}, ["torchcompile_mode has no effect without torchcompile"]),
        (
            {"no_aug": True, "cache_mb": 0, "aa": "rand-m9", "hflip": 0.0, "crop_pct": 0.9},
            ["hflip has no effect with no_aug", "aa has no effect with no_aug"],
        ),
    ],
)
def test_what_has_no_effect_is_said(changes: dict[str, Any], lines: list[str]) -> None:
    assert replace(TINY, **changes).without_effect == lines


def test_a_run_says_what_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY_FLAGS, "--epochs", "1", "--amp-dtype", "bfloat16"]) == 0
    assert "amp_dtype has no effect without amp" in capsys.readouterr().out


def test_digits_have_no_splits() -> None:
    changed: list[dict[str, Any]] = [{"val_split": "test"}, {"train_split": "all"}]
    for changes in changed:
        with pytest.raises(ValueError, match="--train-split and --val-split name splits of DATA_DIR; digits have none"):
            load_data(replace(TINY, **changes))


@pytest.mark.parametrize("changes", [{"gaussian_blur_prob": 0.5}, {"reprob": 0.2}, {"augment_on": "device"}])
def test_digits_are_not_augmented_as_images_that_are_read_in_every_epoch(changes: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=f"^{next(iter(changes))}: for images that are read in every epoch, and digits"
    ):
        load_data(replace(TINY, cache_mb=0, **changes))


def test_names_of_weights_that_do_not_exist_are_refused() -> None:
    check_model_name("imixer_ti4_32.cifar10")
    with pytest.raises(ValueError, match=r"no weights of the name 'imixer_ti4_32.foo'; give imixer_ti4_32, or one of"):
        check_model_name("imixer_ti4_32.foo")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--torchcompile", "foo"], "cannot compile with torchcompile='foo' and torchcompile_mode=None: Invalid"),
        (
            ["--torchcompile", "--torchcompile-mode", "foo"],
            "cannot compile with torchcompile='inductor' and torch.*foo",
        ),
        (["there", "--dataset", "hfds/x"], "hfds/ data sets need the package datasets; run: pip install datasets"),
    ],
)
def test_errors_of_libraries_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    Path("there").mkdir()
    assert main([*TINY_FLAGS, *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0])


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (main, [""]),
        (main, ["--data-dir", ""]),
        (main, ["--output", ""]),
        (main, ["--resume", ""]),
        (main, ["--config", ""]),
        (main, ["--initial-checkpoint", " "]),
        (main, ["--initial_checkpoint="]),
        (validate_command.main, [""]),
        (validate_command.main, ["run", "--data-dir", ""]),
        (validate_command.main, ["run", "--output", ""]),
    ],
)
def test_empty_paths_are_errors(command: Any, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As those of a variable of the shell that is not set; they began a new run, or wrote to the current folder."""
    with pytest.raises(SystemExit) as stop:
        command(flags)
    assert stop.value.code == 2
    assert "the path is empty; give one, or set the variable of the shell that holds it" in capsys.readouterr().err
    assert not list(Path().iterdir())
