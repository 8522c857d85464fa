"""What an output folder holds: seeds, images, experiments and files, of which some may be unusable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_trials import make_up, tiny_tasks

from imixer.reproduction import Ending, Sweep, Task, print_tables, run_here, run_trial, tables_of
from imixer.reproduction import command_line as commands
from imixer.reproduction.command_line import main
from imixer.reproduction.figures import make_figures
from imixer.reproduction.sweep import read_sweep
from imixer.reproduction.trial import ENVIRONMENTS, TRAINED, folder_of


def write_images(root: Path, side: int) -> Path:
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = root / "pets" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(folder / "0.bmp")
    return root


def made_up(output: Path, *names: str, **options: Any) -> Sweep:
    """A folder of results that never ran."""
    sweep = Sweep(output=output, scale="smoke", names=names, **options)
    sweep.save()
    make_up(sweep)
    return sweep


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which take most of their time."""
    monkeypatch.setattr("imixer.reproduction.report.make_figures", lambda experiment, results: [])


def counts(sweep: Sweep) -> list[str]:
    """The cells "seeds" of all tables."""
    return [row[table.header.index("seeds")] for _, _, table in tables_of(sweep) for row in table.rows]


def test_images_may_move_and_other_images_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    Sweep(output=output, scale="cpu", names=("depth",), data_dir=write_images(tmp_path / "here", 8)).save()
    moved = Sweep(output=output, scale="cpu", names=("table1",), data_dir=write_images(tmp_path / "there", 8))
    moved.save()
    elsewhere = write_images(tmp_path / "elsewhere", 9)
    with pytest.raises(ValueError, match="holds results on other images than those of pets in .*elsewhere; choose"):
        Sweep(output=output, scale="cpu", names=("table1",), data_dir=elsewhere).save()
    found = read_sweep(output)
    assert found is not None
    assert (found.names, found.data_dir) == (("table1", "depth"), moved.data_dir)
    with pytest.raises(ValueError, match=r"holds results with data_sets \['pets'\], not \['digits'\]"):
        Sweep(output=output, scale="cpu", names=("depth",)).save()
    (output / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="sweep.json is damaged"):
        read_sweep(output)


@pytest.mark.parametrize("option", [[], ["--report"]], ids=["run", "report"])
def test_images_that_were_replaced_in_their_place_are_refused(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "data", 8)
    made_up(tmp_path / "out", "depth", data_dir=data)
    write_images(data, 9)
    assert main(["depth", str(data), "--scale", "smoke", "--output", str(tmp_path / "out"), *option]) == 2
    assert "holds results on other images than those of pets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("other", "complaint"),
    [(["--scale", "cpu"], "with scale smoke, not cpu"), (["{data}"], r"with data_sets ['digits'], not ['pets']")],
    ids=["scale", "data"],
)
@pytest.mark.usefixtures("without_figures")
def test_a_report_of_another_sweep_is_refused_and_leaves_the_page(
    other: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    made_up(output, "depth")
    assert main(["depth", "--report", "--output", str(output)]) == 0
    before = (output / "report.html").read_bytes()
    data = str(write_images(tmp_path / "data", 8))
    other = [word.format(data=data) for word in other]
    assert main(["depth", *other, "--report", "--output", str(output)]) == 2
    assert complaint in capsys.readouterr().err
    assert (output / "report.html").read_bytes() == before


@pytest.mark.usefixtures("without_figures")
def test_tables_have_every_seed_that_was_run_and_a_run_those_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def run(tasks: list[Task], sweep: Sweep, options: object) -> int:
        ran.append(1 + max(task.trial.settings["seed"] for task in tasks))
        make_up(sweep)
        return 0

    monkeypatch.setattr(commands, "run", run)
    call = ["--scale", "smoke", "--output", str(tmp_path)]
    for seeds in (["--seeds", "1"], [], ["--seeds", "3"], ["--seeds", "1"]):
        assert main(["depth", *call, *seeds]) == 0
    assert ran == [1, 2, 3, 1]
    assert main(["table1", *call, "--seeds", "1"]) == 0
    found = Sweep(output=tmp_path, scale="smoke", names=("depth",)).with_all_names()
    assert found.names == ("table1", "depth")
    assert counts(found) == ["1"] * 6 + ["3"] * 4
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "imixer-reproduce depth --scale smoke --seeds 3 --output" in text
    assert "imixer-reproduce table1 --scale smoke --seeds 1 --output" in text


@pytest.mark.usefixtures("without_figures")
def test_the_page_has_all_experiments_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("depth", "table1"):
        made_up(tmp_path, name)
        assert main([name, "--report", "--output", str(tmp_path)]) == 0
    assert "Depth" not in capsys.readouterr().out.partition("Table 1")[2]
    text = (tmp_path / "report.html").read_text("utf-8")
    assert 'id="depth"' in text
    assert 'id="table1"' in text


@pytest.mark.usefixtures("without_figures")
def test_a_trial_that_cannot_be_used_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = made_up(tmp_path, "depth", num_seeds=1)
    first, *others = sweep.tasks()
    folder = folder_of(first.trial, tmp_path).path
    shutil.rmtree(folder)
    folder.touch()
    call = ["depth", "--scale", "smoke", "--seeds", "1", "--output", str(tmp_path)]
    assert main(call) == 1
    output, errors = capsys.readouterr()
    assert f"{folder} has to be a folder" in errors
    assert "3 of 4 trials are complete: 0 run now, 1 failed, 0 still to come" in output
    assert f"{TRAINED} cannot be read (Not a directory); make {folder} a folder" in output
    assert [count[0] for count in counts(sweep)] == ["0", "1", "1", "1"]
    assert not any(task.missing(tmp_path) for task in others)


def test_a_trial_that_cannot_be_used_leaves_those_after_it_to_run(tmp_path: Path) -> None:
    sweep = made_up(tmp_path, "depth", num_seeds=1)
    tasks = sweep.tasks()
    folder = folder_of(tasks[0].trial, tmp_path).path
    shutil.rmtree(folder)
    folder.touch()
    endings: dict[int, Ending] = {}
    run_here(tasks, tmp_path, "one", endings.__setitem__)
    assert endings == {0: Ending.FAILED} | dict.fromkeys(range(1, 4), Ending.ALREADY)


WRONG: list[tuple[str, str, Any]] = [
    ("depth", TRAINED, {"metrics": [{"test_top1": "abc", "seconds": 1}]}),
    ("depth", TRAINED, {"metrics": [{"test_top1": 50.0, "seconds": None}]}),
    ("depth", TRAINED, {"metrics": {"test_top1": 50.0, "seconds": 1}}),
    ("depth", TRAINED, [1, 2]),
    ("figure3", "iteration.json", {"layers": {}}),
    ("figure3", "iteration.json", {"layers": {"blocks.0": {"step": [0.1] * 16}}}),
    ("figure3", "iteration.json", {"layers": {"blocks.0": {"step": [0.1] * 16, "cosine": [1.0] * 15}}}),
    ("feature-maps", "feature-maps.json", {"steps": [0, 1], "images": [[[0.5]]], "maps": []}),
    ("inference-steps", "inference-steps.json", {"top1": {"1": "60"}}),
    ("certified", "certificate.json", {"bound": 0.9}),
    ("certified", "certificate.json", {"bound": 0.9, "rate": True}),
    ("solvers", "step.json", {"points": [{"point": "after", "seconds": 1.0}]}),
]


@pytest.mark.parametrize(("experiment", "file", "content"), WRONG)
def test_a_result_of_a_wrong_shape_is_damaged_and_the_others_are_shown(
    experiment: str, file: str, content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = made_up(tmp_path, experiment, num_seeds=1)
    task = sweep.tasks()[0]
    path = folder_of(task.trial, tmp_path).path / file
    path.write_text(json.dumps(content))
    print_tables(sweep)
    output = capsys.readouterr().out
    assert output.count(f"{path} is damaged (") == 1
    assert [cell[0] for cell in counts(sweep)].count("1") == len(counts(sweep)) - 1
    assert task.missing(tmp_path) == [file]  # the next run makes it again


def test_results_of_other_layers_and_steps_leave_the_others_figures(tmp_path: Path) -> None:
    sweep = made_up(tmp_path, "figure3", "inference-steps", num_seeds=1)
    folder = folder_of(sweep.tasks()[0].trial, tmp_path)
    curve = {"step": [0.1] * 16, "cosine": [1.0] * 16}
    folder.write("iteration.json", {"layers": {"blocks.7": curve}})
    folder.write("inference-steps.json", {"top1": {"3": 50.0}})
    figures = [len(make_figures(experiment, results)) for experiment, results, _ in tables_of(sweep)]
    assert figures == [1, 0]


def test_damaged_checkpoints_say_what_to_remove(tmp_path: Path) -> None:
    (task,) = tiny_tasks(1)
    folder = folder_of(task.trial, tmp_path)
    folder.run.mkdir(parents=True)
    (folder.run / "last.pt").write_bytes(b"PK" * 500)
    assert run_trial(task, tmp_path, "one") is Ending.FAILED
    assert f"remove {folder.run}, and the next command" in folder.read("failure.json")["reason"]


@pytest.mark.usefixtures("without_figures")
def test_the_page_has_versions_and_threads_of_the_trials(tmp_path: Path) -> None:
    sweep = made_up(tmp_path, "depth", num_seeds=1)
    first, second, third, _ = (folder_of(task.trial, tmp_path) for task in sweep.tasks())
    first.write(ENVIRONMENTS, [{"torch": "9.8.7", "threads": "31"}, {"torch": "9.8.7", "threads": "32"}])
    second.write(ENVIRONMENTS, [{"torch": "9.8.7", "threads": "31"}])
    (third.path / ENVIRONMENTS).write_text("{")
    assert main(["depth", "--report", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<td>torch</td><td>9.8.7 (2 trials), not recorded (2 trials)</td>" in text
    assert "<td>threads</td><td>31 (2 trials), 32 (1 trial), not recorded (2 trials)</td>" in text


def test_bounds_and_rates_are_means_with_deviations(tmp_path: Path) -> None:
    sweep = made_up(tmp_path, "certified")
    arm = sweep.experiments()[0].arms[0]
    for trial, rate in zip(arm.trials(range(2), sweep.place).values(), (0.25, 0.75), strict=True):
        folder_of(trial, tmp_path).write("certificate.json", {"bound": 0.9, "rate": rate})
    ((_, _, table),) = tables_of(sweep)
    shown = dict(zip(table.header, table.rows[0], strict=True))
    assert (shown["mean bound"], shown["deviation of bound"]) == ("0.900", "0.000")
    assert (shown["mean rate"], shown["deviation of rate"]) == ("0.500", "0.354")


def test_an_interrupted_run_says_that_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "run_here", lambda tasks, output, sweep, on_ending: on_ending(0, Ending.INTERRUPTED))
    assert main(["depth", "--scale", "smoke", "--output", str(tmp_path)]) == 130
    output, errors = capsys.readouterr()
    assert "8 still to come" in output
    assert errors.endswith("interrupted; the same command goes on from here\n")


@pytest.mark.parametrize("below", ["", "below"])
def test_an_output_that_is_a_file_is_refused(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["depth", "--output", str(tmp_path / "file" / below)]) == 2
    assert (
        f"{tmp_path / 'file'} is a file, and no folder for results; choose another --output" in capsys.readouterr().err
    )


def test_an_output_that_cannot_be_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("imixer.reproduction.trial.write_atomically", refuse)
    assert main(["depth", "--output", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'sweep.json'} (Permission denied); make room, allow writing there" in errors


@pytest.mark.parametrize("content", ["[]", '{"scale": 3}', '{"scale": "smoke", "names": [], "data_dir": null}'])
def test_a_damaged_note_of_the_sweep_is_named(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(content)
    assert main(["depth", "--output", str(tmp_path)]) == 2
    assert "sweep.json is damaged" in capsys.readouterr().err
