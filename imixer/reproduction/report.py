"""The report of a sweep: tables in the terminal, CSV files, figures, and one page of HTML with all of them."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from imixer.reproduction.experiments import Experiment
from imixer.reproduction.figures import make_figures
from imixer.reproduction.page import (
    code,
    contents,
    figure_element,
    folded,
    heading,
    page,
    paragraph,
    table_element,
    table_of,
)
from imixer.reproduction.results import ArmResults, read_results
from imixer.reproduction.sweep import Sweep
from imixer.reproduction.tables import Table, make_table
from imixer.reproduction.trial import replace_file

READING = (
    "Numbers are means over seeds of the test accuracy after the last epoch; no epoch was chosen by it. Deviations are "
    "sample standard deviations, intervals 95% intervals of Student's t over seeds, and differences are paired by "
    "seed. A difference is called better or worse only where its interval, of three seeds or more, excludes 0. "
    "Intervals are not corrected for the number of comparisons: of twenty differences that do not exist, one is "
    "expected to be called so."
)


def tables_of(sweep: Sweep) -> list[tuple[Experiment, list[ArmResults], Table]]:
    """The experiments of a sweep with their results and tables, as far as they are there.

    Tables have all seeds that an experiment was run with in the output folder.
    """
    found = []
    for experiment in sweep.experiments():
        results = read_results(experiment, sweep.output, sweep.seeds_of_tables(experiment), sweep.place)
        found.append((experiment, results, make_table(experiment, results)))
    return found


def print_tables(sweep: Sweep) -> None:
    """Print the tables of a sweep."""
    for experiment, results, table in tables_of(sweep):
        print(f"\n{experiment.title} ({sweep.scale} scale)\n\n{table.text()}")
        for name, reason in experiment.left_out:
            print(f"left out: {name}: {reason}")
        for result in results:
            for seed, reason in result.failures.items():
                print(f"failed: {result.arm.name}, seed {seed}: {reason}")


def write_report(sweep: Sweep) -> Path:
    """Write ``report.html``, and the tables and figures in ``report/``.

    They are those of all experiments that were run in the output folder.

    Returns:
        The page.
    """
    tables = tables_of(sweep.with_all_names())
    sections, entries = [], []
    for experiment, results, table in tables:
        entries.append((experiment.name, experiment.title))
        replace_file(sweep.output / "report" / f"{experiment.name}.csv", table.csv().encode())
        sections += [heading(experiment.title, experiment.name), paragraph(experiment.question), table_element(table)]
        for figure in make_figures(experiment, results):
            for kind, content in (("png", figure.png()), ("pdf", figure.pdf())):
                replace_file(sweep.output / "report" / f"{figure.name}.{kind}", content)
            sections.append(figure_element(figure.svg(), figure.caption))
        failures = [
            (result.arm.name, str(seed), reason) for result in results for seed, reason in result.failures.items()
        ]
        if failures:
            sections.append(f"<h3>Failed trials</h3>{table_of(('arm', 'seed', 'reason'), failures)}")
        if experiment.left_out:
            sections.append(
                folded(f"Left out: {len(experiment.left_out)}", table_of(("arm", "reason"), experiment.left_out))
            )
        sections += [paragraph("To run it again:", "muted"), code(command(sweep, experiment))]
        settings = [
            (result.arm.name, ", ".join(f"{name}={value!r}" for name, value in sorted(result.arm.settings.items())))
            for result in results
        ]
        sections.append(folded("Settings of every arm", table_of(("arm", "settings"), settings)))
    about = [
        ("scale", sweep.scale),
        ("images", str(sweep.data_dir or "scikit-learn's digits")),
        *environments_of([result for _, results, _ in tables for result in results]),
    ]
    body = [paragraph(READING), contents(entries), *sections, heading("Configuration", "configuration")]
    body += [
        table_of(("what", "value"), about),
        code("\n".join(command(sweep, experiment) for experiment, _, _ in tables)),
    ]
    path = sweep.output / "report.html"
    replace_file(path, page(f"iMixer experiments, {sweep.scale} scale", body).encode())
    return path


def command(sweep: Sweep, experiment: Experiment) -> str:
    """The command line that runs an experiment again, and goes on where it was stopped."""
    data = "" if sweep.data_dir is None else f" {shlex.quote(str(sweep.data_dir))}"
    count = len(sweep.seeds_of_tables(experiment))
    seeds = "" if count == (experiment.num_seeds or sweep.sizes.seeds) else f" --seeds {count}"
    output = shlex.quote(str(sweep.output))
    return f"imixer-reproduce {experiment.name}{data} --scale {sweep.scale}{seeds} --output {output}"


def environments_of(results: Sequence[ArmResults]) -> list[tuple[str, str]]:
    """Versions, threads and machines of the trials, with the number of trials of each where they differ."""
    trials = {}
    for result in results:
        for seed, environments in result.environments.items():
            trials[result.arm.data.name, repr(sorted(result.arm.settings.items())), seed] = environments
    names = dict.fromkeys(name for environments in trials.values() for found in environments for name in found)
    rows = []
    for name in names:
        counts = Counter(
            value
            for environments in trials.values()
            for value in dict.fromkeys(found.get(name, "not recorded") for found in environments or [{}])
        )
        several = [f"{value} ({n} trial{'s' * (n > 1)})" for value, n in counts.items()]
        rows.append((name, ", ".join(several if len(several) > 1 else counts)))
    return rows or [("versions", "not recorded")]
