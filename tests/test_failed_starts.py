"""A run that cannot start says why in one line, and leaves folders as they were."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import TINY, TINY_FLAGS

from imixer.data import ImageData
from imixer.training import folder_lock, load_data, train
from imixer.training.folder_lock import LOCK, FolderInUseError, locked
from imixer.training.train_command import main

pytestmark = pytest.mark.usefixtures("fresh_accelerate", "in_empty_folder")

# Of the model and the optimizer, of the first weights, and of the loader: they show when they are built.
UNFIT = [
    (
        ["--model-kwargs", "stem=1"],
        "cannot build imixer_ti4_32 with .*stem=1, .*unexpected keyword argument 'stem'; .*; change --num-blocks or "
        "--embed-dim or --model-kwargs",
    ),
    (["--model-kwargs", "mlp_ratio=(-1,2)"], r"cannot build .*mlp_ratio=\(-1, 2\), .*; change .* or --model-kwargs"),
    (["--model-kwargs", "mlp_ratio={}"], r"cannot build .*mlp_ratio=\{\}, .*; change .* or --model-kwargs"),
    (["--img-size", "7", "--patch-size", "2"], "cannot build .*img_size=7 is no multiple of .*; change --img-size or "),
    (
        ["--opt-kwargs", "amsgard=1"],
        "cannot make the optimizer adamw with .*'amsgard'; it takes .*; change .*--opt-kwargs",
    ),
    (
        ["--opt-kwargs", "amsgrad=maybe"],
        "cannot make the optimizer adamw with .*amsgrad must be bool, not 'maybe'; .*; change .*--opt-kwargs",
    ),
    (
        ["--opt-betas", "2", "3"],
        r"cannot make the optimizer adamw with .*betas=\(2.0, 3.0\).*; change --opt-betas or --lr",
    ),
    (["--opt", "fusedadam"], "the optimizer fusedadam cannot be used here: "),
    (["--initial-checkpoint", "nowhere.pt"], "There is no checkpoint file 'nowhere.pt'"),
    (["--compile", "nobackend"], "cannot compile with torchcompile='nobackend'"),
    (["--mixup", "1", "--batch-size", "3000"], "mixup and CutMix mix pairs, and 1297 images in batches of 3000"),
]


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data(TINY)


@pytest.mark.parametrize(("flags", "message"), UNFIT)
def test_start_that_fails_leaves_no_folder(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY_FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error)
    assert error.count("\n") == 1
    assert not list(Path().glob("*/*"))


def test_size_that_a_model_cannot_take_is_an_error_before_the_run(digits: ImageData) -> None:
    config = replace(TINY, model="test_convnext", num_blocks=None, embed_dim=None, output="run")
    message = r"test_convnext cannot take images of 8 x 8 pixels: .*; change --img-size, or choose another --model"
    with pytest.raises(ValueError, match=message):
        train(config, digits, progress=False)
    assert not Path("run").exists()


def test_folder_that_was_there_stays_and_is_used_by_the_next_start(digits: ImageData) -> None:
    Path("run").mkdir()
    config = replace(TINY, epochs=1, output="run")
    with pytest.raises(ValueError, match="Invalid epsilon"):
        train(replace(config, opt_eps=-1.0), digits, progress=False)
    assert [path.name for path in Path("run").iterdir()] == [LOCK]
    assert len(train(config, digits, progress=False).metrics) == 1


def test_run_whose_continuation_cannot_start_stays_as_it_is(digits: ImageData) -> None:
    """Its settings too, and a last checkpoint that was refused; what would go on elsewhere has begun nothing there."""
    config = replace(TINY, epochs=2, log_with=("none",), output="run")
    run = train(config, digits, progress=False).output
    (run / "last.pt").unlink()
    (run / "last.pt").write_bytes(b"damaged")
    before = {path.name: path.read_bytes() for path in run.glob("[!.]*")}
    for start, output in ((run / "best.pt", "elsewhere"), (run, "run")):
        with pytest.raises(ValueError, match="Invalid epsilon"):
            train(replace(config, opt_eps=-1.0, output=output), digits, resume=start, progress=False)
        assert {path.name: path.read_bytes() for path in run.glob("[!.]*")} == before
        assert [path.name for path in Path().iterdir()] == ["run"]
    assert len(train(config, digits, resume=run, progress=False).metrics) == 2
    assert (run / "refused.pt").read_bytes() == b"damaged"


def test_folder_that_is_removed_while_another_process_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = folder_lock._acquire

    def late(file: int, folder: Path) -> None:
        (folder / LOCK).unlink()
        acquire(file, folder)

    monkeypatch.setattr(folder_lock, "_acquire", late)
    with pytest.raises(FolderInUseError, match="was removed just now, by a run that failed to start; start again"):
        locked(tmp_path).__enter__()
