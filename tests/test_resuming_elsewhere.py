"""A run that goes on in another folder leaves nothing behind that it needs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import TINY, saved

from imixer.training import load_data, train

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
