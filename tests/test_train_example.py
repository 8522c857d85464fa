"""The command line of training; tests/test_commands.py starts it as a command."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from digit_images import write_digit_tree
from image_archives import checksums, write_cifar
from training_runs import TINY_FLAGS

from imixer.training import PRESETS, TrainingConfig, parse
from imixer.training.train_command import main

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "train_imixer.py"


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")


# As the paper's authors published it, after the name of the script.
PUBLISHED = shlex.split("""
    cifar10 --dataset torch/cifar10 --num-classes 10 --model imixer_s16_224
    --batch-size 512 --workers 4 --opt adamw --epochs 300 --sched cosine --amp --img-size 224 --drop-path 0.1
    --lr 5e-4 --weight-decay 0.05 --remode pixel --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --mixup 0.8
    --cutmix 1.0 --warmup-lr 1e-6 --warmup-epochs 20 --h_ratio 2 --n_power 8 --n_iter 2
""")


def test_digits_need_no_arguments_but_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TINY_FLAGS) == 0
    out = capsys.readouterr().out
    assert "1,297 training and 500 test images in 10 classes" in out
    assert "64 x 1 x 1 = 64 images to an update" in out
    assert "epoch   1/2  train loss" in out
    assert "epoch   2/2  train loss" in out
    assert "test accuracy" in out
    assert "blocks.0.mlp_tokens" in out
    for name in ("best.pt", "last.pt", "curves.csv", "curves.png", "summary.json", "tensorboard"):
        assert name in out
        assert Path("runs/digits-imixer_ti4_32", name).exists()


def test_published_command_means_what_timm_means() -> None:
    command = parse(PUBLISHED)
    config = command.config()
    assert command.preset is None
    assert config == TrainingConfig(
        data_dir="cifar10",
        dataset="torch/cifar10",
        num_classes=10,
        model="imixer_s16_224",
        batch_size=512,
        workers=4,
        opt="adamw",
        epochs=300,
        sched="cosine",
        amp=True,
        img_size=224,
        drop_path=0.1,
        lr=5e-4,
        weight_decay=0.05,
        remode="pixel",
        reprob=0.25,
        aa="rand-m9-mstd0.5-inc1",
        smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        warmup_lr=1e-6,
        warmup_epochs=20,
        h_ratio=2.0,
        n_power=8,
        n_iter=2,
    )
    # What the command leaves to timm's train.py.
    assert (config.clip_grad, config.sched_on_updates, config.min_lr, config.cooldown_epochs) == (None, False, 0.0, 0)
    assert (config.hflip, config.color_jitter, config.scale, config.train_interpolation) == (
        0.5,
        0.4,
        (0.08, 1),
        "random",
    )
    assert (config.mixup_prob, config.mixup_switch_prob, config.mixup_mode, config.seed) == (1.0, 0.5, "batch", 42)
    # Table 5 of the paper says the same of the small model, and what train.py's defaults were then; the preset lays
    # images out in memory another way.
    paper = parse(["cifar10", "--preset", "paper-small"]).config()
    same = replace(
        config, cooldown_epochs=10, min_lr=1e-6, opt_eps=1e-8, crop_pct=0.875, workers=None, channels_last=True
    )
    assert paper.peak_lr(512) == config.lr
    rates = {"lr": paper.lr, "lr_base": 5e-4, "lr_base_size": 512, "lr_base_scale": "linear", "global_batch": 512}
    assert replace(same, **rates) == paper  # type: ignore[arg-type]


def test_published_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar(tmp_path / "cifar10", num_train=20, num_test=10)
    for attribute, value in checksums(tmp_path / "cifar10").items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, attribute, value)
    smaller = "--epochs 1 --warmup-epochs 0 --batch-size 10 --num-blocks 1 --workers 1 --device cpu --output run"
    assert main([*PUBLISHED, *smaller.split()]) == 0
    out = capsys.readouterr().out
    assert "torch/cifar10 in cifar10: 20 training and 10 test images in 10 classes, 3 x 224 x 224" in out
    assert "bfloat16, 1 process on cpu; 10 x 1 x 1 = 10 images to an update, 1 epochs" in out
    checkpoint = torch.load("run/last.pt", weights_only=True)
    assert checkpoint["model_args"] == {
        "num_classes": 10,
        "in_chans": 3,
        "img_size": 224,
        "num_blocks": 1,
        "h_ratio": 2.0,
        "n_iter": 2,
        "n_power": 8,
        "drop_path_rate": 0.1,
    }
    assert (checkpoint["progress"]["updates"], checkpoint["mean"]) == (2, [0.5, 0.5, 0.5])


def test_flags_go_before_the_file_and_that_before_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("preset: paper-base\nlr: 1e-3\nweight-decay: 0.1\nscale: [0.5, 1]\namp: false\n")
    command = parse(["data", "--config", "mine.yaml", "--lr", "0.5", "--opt-betas", "0.9", "0.95", "--h-ratio", "3"])
    config = command.config()
    assert (config.model, config.drop_path) == ("imixer_b16_224", 0.2)
    assert (config.lr, config.weight_decay, config.scale, config.amp) == (0.5, 0.1, (0.5, 1.0), False)
    assert (config.opt_betas, config.h_ratio, config.torchcompile) == ((0.9, 0.95), 3.0, None)
    assert parse(["--compile"]).config().torchcompile == "inductor"
    assert parse(["--preset", "paper-small", "--no-amp", "data"]).config().amp is False
    assert main([*TINY_FLAGS, "--epochs", "1", "--output", "one"]) == 0
    assert parse(["--config", "one/config.yaml"]).config() == parse([*TINY_FLAGS, "--epochs", "1"]).config()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset: str) -> None:
    config = parse(["data", "--preset", preset]).config()
    assert timm.is_model(config.model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 1", "error: unknown setting 'learning_rate' in mine.yaml"),
        ("warmup_epoch: 1", "error: unknown setting 'warmup_epoch' in mine.yaml; did you mean warmup_epochs"),
        ("preset: paper-tiny", "error: unknown preset 'paper-tiny' in mine.yaml; did you mean"),
        ("epochs: many", "error: epochs in mine.yaml must be int, not 'many'"),
        ("epochs: 1.5", "error: epochs in mine.yaml must be int, not 1.5"),
        ("amp: 1", "error: amp in mine.yaml must be bool, not 1"),
        ("- 1", "error: mine.yaml must hold settings as `name: value` lines, but holds a list"),
        ("# lr: 1", "error: mine.yaml must hold settings as `name: value` lines, but is empty"),
        ("lr: [", "error: mine.yaml is not YAML: "),
        ("epochs:", "error: epochs in mine.yaml has no value; give one, or leave epochs out"),
        ("seed:", "error: seed in mine.yaml has no value"),
        ("model:", "error: model in mine.yaml has no value"),
        ("opt: null", "error: opt in mine.yaml has no value"),
        ("checkpoint-interval:", "error: checkpoint_interval in mine.yaml has no value"),
        ("sched:", "error: sched in mine.yaml has no value"),
        ("epochs: .inf", "error: epochs in mine.yaml must be int, not inf"),
        ("epochs: .nan", "error: epochs in mine.yaml must be int, not nan"),
        ("lr: 1" + "0" * 400, "error: lr in mine.yaml must be float, not 1000"),
        ("seed: 1" + "0" * 400, "error: seed must be from 0 to 4294967295, not 1000"),
        ("preset: 3", "error: preset in mine.yaml must be one of digits, cifar10-small, "),
        ("preset: [a]", "error: preset in mine.yaml must be one of digits, cifar10-small, "),
        ("preset: {a: 1}", "error: preset in mine.yaml must be one of digits, cifar10-small, "),
        ("model_kwargs: &x {a: *x}", "error: a in model_kwargs is nested too deep, or contains itself"),
        ("[" * 5000, "error: mine.yaml is not a file of settings: its lists or mappings are nested too deep"),
        ("decay_milestones: [90.5]", "error: decay_milestones in mine.yaml must be a list of int, not [90.5]"),
        ("decay_milestones: [90, null]", "error: decay_milestones in mine.yaml must be a list of int, not [90, None]"),
        ("log_with: wandb", "error: log_with in mine.yaml must be a list of str, not 'wandb'"),
        ("scale: [true, 1]", "error: scale in mine.yaml must be a list of float, not [True, 1]"),
        (
            "h-ratio: 1\nh_ratio: 2",
            "error: mine.yaml sets h_ratio twice; leave one of the lines out, also where one has",
        ),
        ("epochs: 1\nseed: 2\nepochs: 3", "error: mine.yaml sets epochs twice; leave one of the lines out"),
        ("model: \udcff", "error: mine.yaml is not YAML: 'utf-8' codec can't decode byte 0xff in position 7"),
        ("aa: 2026-13-01", "error: mine.yaml is not YAML: month must be in 1..12"),
    ],
)
def test_unfit_file_of_settings_is_reported(content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_bytes(content.encode(errors="surrogateescape"))
    assert main(["--config", "mine.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_settings_without_a_default_may_be_null() -> None:
    Path("mine.yaml").write_text("workers:\nclip_grad: null\nscale: [0.5, 1]\ndecay_milestones: [90.0, 180]\npreset:\n")
    settings = parse(["--config", "mine.yaml"]).settings
    assert settings == {"workers": None, "clip_grad": None, "scale": (0.5, 1.0), "decay_milestones": (90, 180)}


def test_folder_of_images_with_the_papers_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digit_tree(tmp_path / "shapes", test="val")
    flags = "--img-size 8 --patch-size 2 --h_ratio 1 --n_iter 30 --n_power 4 --coeff 0.8 --drop-path 0.1 "
    flags += "--solver anderson --rtol 1e-3 --backward implicit --batch-size 16 --smoothing 0 --sched constant "
    flags += "--cache-mb 512 --output here"
    assert main(["shapes", *TINY_FLAGS, *flags.split()]) == 0
    assert "72 training and 24 test images in 3 classes, 3 x 8 x 8, held in memory" in capsys.readouterr().out
    arguments = torch.load("here/last.pt", weights_only=True)["model_args"]
    assert arguments == {
        "num_classes": 3,
        "in_chans": 3,
        "img_size": 8,
        "patch_size": 2,
        "num_blocks": 1,
        "embed_dim": 16,
        "h_ratio": 1.0,
        "n_iter": 30,
        "n_power": 4,
        "coeff": 0.8,
        "solver": "anderson",
        "backward": "implicit",
        "rtol": 1e-3,
        "drop_path_rate": 0.1,
    }


@pytest.mark.long
def test_other_models_of_timm_train_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digit_tree(tmp_path / "shapes")
    assert (
        main(
            [
                "shapes",
                "--model",
                "test_resnet",
                "--workers",
                "0",
                "--epochs",
                "1",
                "--warmup-epochs",
                "0",
                "--compile",
                "eager",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "read in every epoch" in out
    assert "fixed-point" not in out


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for group in ("data:", "augmentation", "model", "optimization:", "computation:", "run:", "examples:"):
        assert f"\n{group}" in out
    assert "[0.003]" in out
    assert "None" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs"),
        (["--wamup-epochs=3"], "unknown flag --wamup-epochs; did you mean --warmup-epochs"),
        (["--no-such-flag-at-all"], "unknown flag --no-such-flag-at-all\n"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["data", "more"], "unexpected argument 'more'; the data folder is the only one without a flag"),
        (["--preset", "paper-tiny"], "argument --preset: invalid choice: 'paper-tiny'"),
    ],
)
def test_unknown_flags_and_abbreviations_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: data folder {here}/nowhere does not exist; {here} holds shapes/"),
        (["shapes/train"], "error: shapes/train has no train/ folder; it holds 0/, 1/, 2/"),
        (["--model", "imixer_s16_24"], "error: unknown model 'imixer_s16_24'; did you mean imixer_s16_224"),
        (["--solver", "picrad"], "error: cannot build imixer_ti4_32 with num_classes=10, in_chans=1, "),
        (["--lr", "-1"], "error: lr must be positive and finite, not -1.0"),
        (["--lr", "1e30", "--clip-grad", "0"], "error: the loss or its gradient was not finite in 10 updates in a row"),
        (["--dataset", "torch/cifar10"], "error: dataset torch/cifar10 needs the folder that holds it: give DATA_DIR"),
        (["shapes", "--num-classes", "4"], "error: num_classes is 4, and shapes has 3 classes; leave it out"),
        (["--config", "nowhere.yaml"], "error: cannot read the settings in nowhere.yaml: No such file or directory"),
        (["--config", "shapes"], "error: cannot read the settings in shapes: Is a directory; give a YAML file"),
        (["--resume", "nowhere"], "error: there is no run or checkpoint at nowhere; give a run's folder"),
        (["--new-head"], "error: new_head and new_token_mixing leave out parts of --initial-checkpoint; give that too"),
        (["--resume", "auto"], "error: --resume auto needs --output, the folder in which the run begins and goes on"),
        (["--aa", "rand-m9"], "error: aa: for images that are read in every epoch, not for those that are decoded"),
        (
            ["--output", "shapes/train/0/000.png"],
            "error: cannot write to the output folder shapes/train/0/000.png",
        ),
        (["--amp", "--amp-dtype", "float16"], "error: amp_dtype float16 needs a CUDA device"),
    ],
)
def test_error_is_one_line_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digit_tree(tmp_path / "shapes", num_train=4, num_test=2)
    assert main([*TINY_FLAGS, *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("training:", "\r"))]
    lines = [line for line in errors if line.strip()]
    assert lines[-1].startswith(message.replace("{here}", str(tmp_path)))


def test_image_broken_inside_is_named_by_worker_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_digit_tree(tmp_path / "shapes")
    path = tmp_path / "shapes" / "train" / "0" / "000.png"
    path.write_bytes(path.read_bytes()[:60])
    flags = ["--img-size", "8", "--patch-size", "2", "--workers", "1"]
    assert main(["shapes", *TINY_FLAGS, *flags]) == 2
    assert "error: cannot read image shapes/train/0/000.png" in capsys.readouterr().err
