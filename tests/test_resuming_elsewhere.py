"""A run that goes on in another folder, or with images kept in another way, goes on as it was or says why not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from digit_images import write_digit_tree
from training_runs import TINY, difference, saved

from imixer.training import CheckpointError, load_data, train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_run_that_goes_on_elsewhere_takes_its_best_checkpoint_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if no later epoch is better, or none is left; without it the run says so."""
    digits = load_data(TINY)
    config = replace(TINY, epochs=2, output=str(tmp_path / "run"))
    run = train(config, digits, progress=False).output
    worse = replace(TINY, epochs=3, lr=1e-9, warmup_lr=1e-9, output=str(tmp_path / "worse"))
    best = saved(run / "best.pt")
    for settings, start in (
        (worse, run),
        (replace(worse, output=str(tmp_path / "of best")), run / "best.pt"),
        (replace(config, output=str(tmp_path / "complete")), run),
    ):
        folder = train(settings, digits, resume=start).output
        at_best = saved(folder / "best.pt")["progress"]["metrics"]
        rows = saved(folder / "last.pt")["progress"]["metrics"]
        assert at_best[-1] == max(rows, key=lambda row: row["test_top1"])
        if len(at_best) == len(best["progress"]["metrics"]):
            assert (folder / "best.pt").read_bytes() == (run / "best.pt").read_bytes()
    moved = tmp_path / "moved" / "one.pt"
    moved.parent.mkdir()
    torch.save({}, moved.with_name("best.pt"))
    moved.write_bytes((run / "last.pt").read_bytes())
    capsys.readouterr()
    is_best = best["progress"]["metrics"] == saved(run / "last.pt")["progress"]["metrics"]
    train(replace(worse, output=str(tmp_path / "without")), digits, resume=moved)
    assert ("best.pt is not that of epoch" in capsys.readouterr().out) == (not is_best)


def test_memory_for_images_may_change_unless_that_changes_how_they_are_prepared(tmp_path: Path) -> None:
    write_digit_tree(tmp_path / "shapes", num_train=8, num_test=4)
    config = replace(TINY, data_dir=str(tmp_path / "shapes"), img_size=8, patch_size=2, workers=0, batch_size=8)
    config = replace(
        config, cache_mb=512, epochs=2, warmup_epochs=0, sched="constant", report_interval=1, log_with=("none",)
    )
    data = load_data(config)
    whole = train(replace(config, output=str(tmp_path / "whole")), data, progress=False).output
    part = train(replace(config, epochs=1, output=str(tmp_path / "part")), data, progress=False).output
    uncached = replace(config, epochs=1, cache_mb=0, output=str(tmp_path / "uncached"))
    other = train(uncached, load_data(uncached), progress=False).output
    for folder, before, after in ((part, 512, 0), (other, 0, 512)):
        changed = replace(config, cache_mb=after, output=str(folder))
        message = (
            rf"last\.pt is of a run with cache_mb {before}, and with {after} .*; give --cache-mb {before}, or go on"
        )
        with pytest.raises(CheckpointError, match=message):
            train(changed, load_data(changed), resume=folder, progress=False)
    larger = replace(config, cache_mb=1024, output=str(part))
    train(larger, load_data(larger), resume=part, progress=False)
    assert difference(saved(part / "last.pt"), saved(whole / "last.pt")) == []
