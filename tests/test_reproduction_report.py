"""Tables and the page, from made-up results: what they say is what is in the files, and the page stands by itself."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_trials import make_up

from imixer.reproduction import EXPERIMENTS, Sweep, tables_of, write_report
from imixer.reproduction.command_line import main
from imixer.reproduction.run_trial import record_failure
from imixer.reproduction.trial import TRAINED, folder_of

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Checker(HTMLParser):
    """Collects what is wrong with a page: elements that do not match, names used twice, things fetched from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.names.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def everything(output: Path, **options) -> Sweep:
    return Sweep(output=output, scale="smoke", names=tuple(EXPERIMENTS), **options)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A whole sweep of made-up results, with its report."""
    sweep = everything(tmp_path_factory.mktemp("sweep"))
    make_up(sweep)
    write_report(sweep)
    return sweep


def page_of(sweep: Sweep) -> str:
    return (sweep.output / "report.html").read_text("utf-8")


def checked(text: str) -> Checker:
    page = Checker()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(set(page.names)) == len(page.names), "two elements have one name"
    for link in page.links:
        assert link.startswith(("#", "data:image/")), f"the page needs {link}"
        if link.startswith("#"):
            assert link[1:] in page.names, f"{link} leads nowhere"
    for found in re.findall(r"url\(([^)]*)\)", text):
        assert found.strip("\"'").startswith("#"), f"the page needs {found}"
        assert found.strip("\"'")[1:] in page.names
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    return page


@pytest.mark.long
def test_the_page_stands_by_itself_and_has_everything(written: Sweep) -> None:
    text, folder = page_of(written), written.output / "report"
    page = checked(text)
    titles = [experiment.title for experiment in written.experiments()]
    assert page.headings == [*titles, "Configuration"]
    assert page.tags.count("svg") == len(list(folder.glob("*.pdf"))) >= len(titles)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    for name in EXPERIMENTS:
        assert f"imixer-reproduce {name} --scale smoke --output {written.output}" in text
    for kind, start in (("pdf", b"%PDF"), ("png", b"\x89PNG")):
        files = list(folder.glob(f"*.{kind}"))
        assert {path.read_bytes()[:4] for path in files} == {start}


def test_black_becomes_the_color_of_the_text(written: Sweep) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page_of(written), re.DOTALL)
    assert all("currentColor" in svg and "#000000" not in svg and "<style" not in svg for svg in svgs)
    # White would be a patch on a dark page.
    assert not any("fill: #ffffff" in svg for svg in svgs)


def test_tables_say_what_is_in_the_files(written: Sweep) -> None:
    for experiment, results, table in tables_of(written):
        with (written.output / "report" / f"{experiment.name}.csv").open(newline="") as file:
            records = list(csv.DictReader(file))
        assert len(records) == len(table.rows) == len(experiment.arms)
        for record, row, result, arm in zip(records, table.rows, results, experiment.arms, strict=True):
            trials = arm.trials(written.seeds(experiment), written.place)
            values = [
                folder_of(trial, written.output).read(TRAINED)["metrics"][-1]["test_top1"] for trial in trials.values()
            ]
            assert list(result.top1.values()) == values
            assert float(record["top1_mean"]) == pytest.approx(sum(values) / len(values))
            assert row[len(arm.labels) : len(arm.labels) + 2] == [str(len(values)), f"{sum(values) / len(values):.2f}"]
            assert int(record["top1_count"]) == len(written.seeds(experiment))


def test_only_intervals_that_exclude_zero_are_claims(tmp_path: Path) -> None:
    sweep = everything(tmp_path, num_seeds=3)
    make_up(sweep)
    claims = 0
    for _, _, table in tables_of(sweep):
        for row, record in zip(table.rows, table.records, strict=True):
            text = " ".join(row)
            says = "better" in text or "worse" in text
            excludes = record["difference_low"] is not None and record["difference_low"] * record["difference_high"] > 0
            assert says == excludes
            claims += says
            if record["difference_mean"] is not None:
                assert "(n=3)" in text
    assert claims  # of so many differences of random numbers a few are claims


@pytest.mark.long
def test_a_report_is_made_of_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = Sweep(output=tmp_path, scale="smoke", names=("table1", "solvers"))
    sweep.save()
    checked(write_report(sweep).read_text("utf-8"))  # of nothing
    make_up(sweep, share=0.4)
    missing = [task for task in sweep.tasks() if task.missing(tmp_path)]
    record_failure(folder_of(missing[0].trial, tmp_path), "one", "ValueError: <b>no such thing</b> & more")
    assert main(["all", "--report", "--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "seed 0: ValueError: <b>no such thing</b> & more" in output or "seed 1: ValueError" in output
    assert " to come)" in output
    text = (tmp_path / "report.html").read_text("utf-8")
    checked(text)
    assert "ValueError: &lt;b&gt;no such thing&lt;/b&gt; &amp; more" in text
    assert "1 failed" in text


def test_arms_that_cannot_run_are_left_out_with_the_reason(tmp_path: Path) -> None:
    (experiment,) = Sweep(output=tmp_path, scale="cpu", names=("solvers",)).experiments()
    reasons = dict(experiment.left_out)
    assert len(experiment.arms) + len(reasons) == 8 * 7
    names = {(arm.labels["solver"], arm.labels["backward"]) for arm in experiment.arms}
    assert ("broyden to 0.001", "shine") in names
    assert ("picard, 8 steps", "checkpointed") in names
    assert "estimate of the inverse Jacobian" in reasons["picard, 2 steps, shine"]
    assert "gradients through the steps" in reasons["auto to 0.001, unrolled"]


def test_all_arms_of_an_experiment_have_one_budget(tmp_path: Path) -> None:
    budget = ("epochs", "batch_size", "lr", "weight_decay", "num_blocks", "embed_dim", "patch_size", "opt", "sched")
    for scale in ("smoke", "cpu", "paper"):
        for experiment in Sweep(output=tmp_path, scale=scale, names=tuple(EXPERIMENTS)).experiments():
            groups: dict[str, set[tuple[object, ...]]] = {}
            for arm in experiment.arms:
                group = f"{arm.labels.get('size')} {arm.data.name}"
                groups.setdefault(group, set()).add(tuple(arm.settings.get(name) for name in budget))
            assert all(len(budgets) == 1 for budgets in groups.values()), experiment.name


@pytest.mark.parametrize("scale", ["smoke", "cpu", "paper"])
def test_every_trial_is_a_valid_configuration(scale: str, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    sweep = Sweep(output=tmp_path, scale=scale, names=tuple(EXPERIMENTS), data_dir=tmp_path, num_seeds=1)
    tasks = sweep.tasks()
    for task in tasks:
        config = task.trial.config(tmp_path / "run")
        assert config.dataset == ("torch/cifar10" if task.trial.data == "cifar10" else "")
        assert config.device == "auto"
    models = {task.trial.settings["model"] for task in tasks}
    if scale == "paper":
        assert models == {f"{kind}_{size}16_224" for kind in ("mixer", "imixer") for size in "sbl"}
        small = next(task.trial.settings for task in tasks if task.trial.settings["model"] == "mixer_s16_224")
        assert (small["epochs"], small["batch_size"], small["drop_path"]) == (300, 512, 0.1)
        assert not {"h_ratio", "n_iter", "n_power"} & small.keys()
    else:
        assert models == {"mixer_ti4_32", "imixer_ti4_32"}


@pytest.mark.parametrize("arguments", [["depth", "--output", ""], ["depth", " "]], ids=["output", "data"])
def test_empty_paths_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "the path is empty" in capsys.readouterr().err
