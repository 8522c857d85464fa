"""The command line of the experiments, ``imixer-reproduce`` and ``examples/reproduce.py``."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from imixer.reproduction.engines import run_here, run_in_processes, run_on_ray, shard
from imixer.reproduction.report import print_tables, write_report
from imixer.reproduction.run_trial import Ending, Task
from imixer.reproduction.scales import SCALES
from imixer.reproduction.sweep import EXPERIMENTS, Sweep, names_of, read_sweep
from imixer.training.command_line import path_text

EPILOG = """\
examples:
  %(prog)s all --scale smoke
      everything at a tiny size, on digits that come with scikit-learn: a minute or two
  %(prog)s table1 path/to/cifar10 --scale cpu --jobs 2
      Mixer against iMixer on CIFAR-10, two trials at a time
  %(prog)s table1 path/to/cifar10 --scale paper --shard $SLURM_ARRAY_TASK_ID/20 --output runs/paper
      one element of a job array from 1 to 20
  %(prog)s all path/to/data --scale paper --engine ray --cpus-per-trial 8 --gpus-per-trial 1
      on a Ray cluster
  %(prog)s all --output runs/paper --report
      print the tables and write the report from what is there
"""
INTERRUPTED = 130  # the exit code of a command that SIGINT stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if all is there, 1 if a trial failed, 2 for a wrong call, 130 if it was interrupted.
    """
    options = build_parser().parse_args(arguments)
    try:
        sweep = sweep_of(options)
        if not options.report:
            sweep.save()
            tasks = shard(sweep.tasks(), *options.shard)
            outcome = run(tasks, sweep, options)
        else:
            if read_sweep(sweep.output) is None:
                raise FileNotFoundError(f"there are no results in {sweep.output}; run it without --report first")
            sweep.check()
            outcome = 0
        print_tables(sweep)
        print(f"\nreport: {write_report(sweep)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        outcome = INTERRUPTED
    if outcome == INTERRUPTED:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    return outcome


def sweep_of(options: argparse.Namespace) -> Sweep:
    """The sweep that the options ask for; what they leave open is as it was in the output folder."""
    output = options.output or Path("runs") / f"reproduction-{options.scale or 'smoke'}"
    saved = read_sweep(output)
    names = names_of([options.what])
    if options.report and saved is not None and options.what == "all":
        names = saved.names
    data_dir = options.data
    if data_dir is None and saved is not None:
        data_dir = saved.data_dir
    return Sweep(
        output=output,
        scale=options.scale or (saved.scale if saved else "smoke"),
        names=names,
        data_dir=data_dir.resolve() if data_dir is not None else None,
        num_seeds=options.seeds,
        device=options.device,
        workers=options.workers,
    )


def run(tasks: Sequence[Task], sweep: Sweep, options: argparse.Namespace) -> int:
    """Run the trials under a progress bar, and return the exit code."""
    endings: dict[int, Ending] = {}
    complete = sum(not task.missing(sweep.output) for task in tasks)
    with tqdm(total=len(tasks), initial=complete, desc="trials", unit="trial", dynamic_ncols=True, disable=None) as bar:

        def on_ending(number: int, ending: Ending) -> None:
            # Processes that share the work look at each trial once each.
            if ending in (Ending.COMPLETE, Ending.FAILED) and endings.get(number) not in (
                Ending.COMPLETE,
                Ending.FAILED,
            ):
                bar.update()
                bar.set_postfix_str(tasks[number].trial.name, refresh=False)
            if ending is Ending.FAILED and endings.get(number) is not Ending.FAILED:
                bar.write(f"failed: {tasks[number].trial.name}; the report says why")
            if endings.get(number) not in (Ending.COMPLETE, Ending.FAILED):
                endings[number] = ending

        if options.engine == "ray":
            cpus, gpus = options.cpus_per_trial, options.gpus_per_trial
            run_on_ray(tasks, sweep.output, sweep.identifier, on_ending, cpus=cpus, gpus=gpus)
        elif options.jobs > 1:
            run_in_processes(tasks, sweep.output, sweep.identifier, on_ending, jobs=options.jobs)
        else:
            run_here(tasks, sweep.output, sweep.identifier, on_ending)

    counts = Counter(endings.values())
    missing = sum(bool(task.missing(sweep.output)) for task in tasks)
    print(
        f"{len(tasks) - missing} of {len(tasks)} trials are complete: {counts[Ending.COMPLETE]} run now, "
        f"{counts[Ending.FAILED]} failed, {missing - counts[Ending.FAILED]} still to come"
    )
    if counts[Ending.BUSY]:
        print(f"{counts[Ending.BUSY]} trials were being run by other processes; --report shows them when they are done")
    if missing > counts[Ending.FAILED] + counts[Ending.BUSY]:
        return INTERRUPTED
    return 1 if counts[Ending.FAILED] else 0


def build_parser() -> argparse.ArgumentParser:
    """Define the options."""
    parser = argparse.ArgumentParser(
        prog="imixer-reproduce" if os.path.basename(sys.argv[0]) != "reproduce.py" else None,
        description="Run the experiments of the iMixer paper, and those on solvers, backward modes and depth.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=[*EXPERIMENTS, "all"], metavar="WHAT", help=f"{', '.join(EXPERIMENTS)} or all")
    parser.add_argument(
        "data", nargs="?", type=given_path, metavar="DATA", help="folder of the images [digits of scikit-learn]"
    )
    parser.add_argument("--scale", choices=list(SCALES), help="how large: smoke, cpu or paper [smoke]")
    parser.add_argument(
        "--output", type=given_path, metavar="DIR", help="folder of all results [runs/reproduction-<scale>]"
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help="number of seeds to run [the scale's]; tables show all that were run",
    )
    parser.add_argument("--report", action="store_true", help="run nothing; print the tables and write the report")
    running = parser.add_argument_group("running")
    running.add_argument("--jobs", type=positive, default=1, metavar="N", help="trials at a time [%(default)s]")
    running.add_argument(
        "--shard", type=one_of_several, default=(1, 1), metavar="I/N", help="run one of N parts of the trials"
    )
    running.add_argument("--engine", choices=("local", "ray"), default="local", help="where trials run [%(default)s]")
    running.add_argument("--cpus-per-trial", type=float, default=1, metavar="N", help="for Ray [%(default)s]")
    running.add_argument("--gpus-per-trial", type=float, default=0, metavar="N", help="for Ray [%(default)s]")
    running.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    running.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes of a trial that read images [%(default)s]"
    )
    return parser


def given_path(text: str) -> Path:
    """Read a path, which may not be empty."""
    return Path(path_text(text))


def positive(text: str) -> int:
    """Read a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def one_of_several(text: str) -> tuple[int, int]:
    """Read I/N."""
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be I/N, such as 3/20, not {text!r}") from None
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, not {text!r}")
    return index, count


if __name__ == "__main__":
    sys.exit(main())
