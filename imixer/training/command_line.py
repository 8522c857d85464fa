"""The command line of training: a flag for every field of the configuration, presets, files of settings."""

import argparse
import difflib
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from imixer.training.checkpoints import holds_run
from imixer.training.config import TrainingConfig
from imixer.training.keyword_arguments import ReadKeywordArguments
from imixer.training.model import FIRST_WEIGHTS, check_model_arguments, settings_for_model
from imixer.training.presets import PRESETS

HEADINGS = {
    "data": "data",
    "augmentation": "augmentation of training images",
    "model": "model (without a value: the model's own)",
    "optimization": "optimization",
    "computation": "computation",
    "run": "run",
}
TYPES = get_type_hints(TrainingConfig)
DEFAULTS = {item.name: item.default for item in fields(TrainingConfig)}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for.

    Args:
        settings: The settings that a file or a flag names.
        flags: Names of the settings that a flag names.
        preset: The settings below them, by name.
        resume: A run's folder, or a checkpoint, to continue.
        allow_other_data: Whether to continue it with other images.
    """

    settings: dict[str, Any]
    flags: frozenset[str] = frozenset()
    preset: str | None = None
    resume: Path | None = None
    allow_other_data: bool = False

    def config(self, saved: dict[str, Any] | None = None, say: Callable[[str], None] = print) -> TrainingConfig:
        """The whole configuration: defaults, then the preset or ``saved`` settings of a run, then what was named.

        Settings that the model does not take are left out, which ``say`` is told, unless a flag names them.

        Raises:
            ValueError: A value is not valid, or a flag names what the model does not take.
        """
        below = saved_settings({name: value for name, value in (saved or {}).items() if name not in self.settings})
        preset = self.preset
        if preset is None and saved is None and not (self.settings.get("data_dir") or self.settings.get("dataset")):
            preset = "digits"
        if preset is not None:
            below |= PRESETS[preset]
        return TrainingConfig(**settings_for_model(below | self.settings, explicit=self.flags, say=say))


class Parser(argparse.ArgumentParser):
    """A parser that lists near matches of a flag that it does not know."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            flag = word.partition("=")[0]
            if flag.startswith("-"):
                known = [option for option in self._option_string_actions if "_" not in option]
                self.error(f"unknown flag {flag}{_near(flag, known)}")
            self.error(f"unexpected argument {word!r}; the data folder is the only one without a flag")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, the message last; the usage of a hundred flags would hide it."""
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help lists all flags\n")


def parse(arguments: Sequence[str] | None = None, *, epilog: str = "") -> Command:
    """Read the command line.

    Raises:
        SystemExit: A flag is unknown or its value unfit, or help was asked for.
        ValueError, OSError: The file of settings cannot be used.
    """
    options = vars(build_parser(epilog).parse_args(arguments))
    preset, file, resume = options.pop("preset"), options.pop("config"), options.pop("resume")
    allow_other_data = options.pop("allow_other_data")
    settings: dict[str, Any] = {}
    if file is not None:
        settings = read_settings(Path(file))
        named = settings.pop("preset", None)
        if named is not None:
            _check_known("preset", [named], PRESETS, file)
        preset = preset or named
    settings |= options
    if resume == "auto":
        if settings.get("output") is None:
            raise ValueError("--resume auto needs --output, the folder in which the run begins and goes on")
        resume = settings["output"] if holds_run(Path(settings["output"])) else None
    return Command(
        settings=settings,
        flags=frozenset(options),
        preset=preset,
        resume=Path(resume) if resume else None,
        allow_other_data=allow_other_data,
    )


def saved_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """The settings that a checkpoint gives to a run that goes on from it, or to a test of it.

    They are those of today's names, except the folder of the results, `dataset_download`, and where the model's first
    weights came from: nothing is fetched because a checkpoint says so.

    Raises:
        ValueError: A value is not valid, or the model's arguments are not those that a checkpoint may give.
    """
    left_out = ("output", "dataset_download")
    names = [name for name in saved if name in TYPES and name not in left_out]
    settings = {name: _converted(name, saved[name], "the checkpoint") for name in names}
    if settings.get("model_kwargs"):
        given = settings["model_kwargs"].items()
        settings["model_kwargs"] = {name: value for name, value in given if name not in FIRST_WEIGHTS} or None
    if settings.get("model_kwargs"):
        check_model_arguments("the checkpoint", settings.get("model", TrainingConfig.model), settings["model_kwargs"])
    return settings


def build_parser(epilog: str = "") -> Parser:
    """Make the parser: its options hold what was given, and the command's own, such as ``resume``."""
    parser = Parser(
        usage="%(prog)s [DATA_DIR] [--preset NAME] [--config FILE] [--resume RUN] [FLAGS]",
        description="Train an iMixer, or another image classifier of timm. Flags go before --config, that before "
        "--preset,\nand that before the defaults in brackets. Without data or a preset, --preset digits is taken.\n"
        "--img-size may be written --img_size, and so on; --no-amp takes --amp back.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("data_dir", nargs="?", type=path_text, metavar="DATA_DIR", help="like --data-dir")
    parser.add_argument("--preset", choices=list(PRESETS), default=None, help="settings that belong together")
    parser.add_argument(
        "--config", "-c", type=path_text, metavar="FILE", default=None, help="YAML file of settings by their names"
    )
    parser.add_argument(
        "--resume",
        type=path_text,
        metavar="RUN",
        default=None,
        help="continue a run: its folder, or one of its checkpoints; auto: the one in --output, if there is one",
    )
    parser.add_argument(
        "--allow-other-data", action="store_true", default=False, help="continue with other images of the same classes"
    )
    groups = {name: parser.add_argument_group(heading) for name, heading in HEADINGS.items()}
    for item in fields(TrainingConfig):
        _add_flag(groups[item.metadata["group"]], item)
    return parser


def path_text(text: str) -> str:
    """Check that a path is not empty, as that of a variable of the shell that is not set.

    Raises:
        argparse.ArgumentTypeError: It is.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; give one, or set the variable of the shell that holds it")
    return text


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings, by the names of `TrainingConfig` or of the flags.

    Raises:
        ValueError: It cannot be read, is no mapping, or a name or a value is unfit.
    """
    try:
        text = path.read_text("utf-8")
        found, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"cannot read the settings in {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter for text that is not UTF-8, and days such as 2026-13-01
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{path} is not a file of settings: its lists or mappings are nested too deep") from None
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"holds a {type(found).__name__}"
        raise ValueError(f"{path} must hold settings as `name: value` lines, but {what}")
    written = Counter(str(key.value).replace("-", "_") for key, _ in tree.value)
    twice = [name for name, number in written.items() if number > 1]
    if twice:
        raise ValueError(f"{path} sets {twice[0]} twice; leave one of the lines out, also where one has - for _")
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = str(key).replace("-", "_")
        _check_known("setting", [name], {*TYPES, "preset"}, path)
        settings[name] = value if name == "preset" else _converted(name, value, path)
    return settings


def write_settings(config: TrainingConfig) -> str:
    """The configuration as YAML, which ``--config`` reads; without the folder of its results."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    del settings["output"]
    return str(yaml.safe_dump(settings, sort_keys=False))


def _add_flag(group: argparse._ArgumentGroup, item: "Field[Any]") -> None:
    kind, several = _kind(item.name)
    flag = item.name.replace("_", "-")
    shown = "" if item.default in (None, "", False) else f" [{_text(item.default)}]"
    options: dict[str, Any] = {"dest": item.name, "help": (item.metadata["text"] + shown).replace("%", "%%")}
    if kind is bool:
        options["action"] = "store_true"
        if not flag.startswith("no-"):
            group.add_argument(f"--no-{flag}", action="store_false", dest=item.name, help=argparse.SUPPRESS)
    else:
        options |= {
            option: item.metadata[option] for option in ("choices", "const", "metavar") if option in item.metadata
        }
        if kind is dict:
            options |= {"action": ReadKeywordArguments, "nargs": "*"}
        else:
            options |= {"type": path_text if options.get("metavar") in ("DIR", "FILE") else kind}
            options |= {"nargs": "?" if "const" in options else "+" if several else None}
    group.add_argument(f"--{flag}", *item.metadata.get("aliases", ()), **options)
    if "_" in item.name:
        group.add_argument(f"--{item.name}", **{**options, "help": argparse.SUPPRESS})


def _kind(name: str) -> tuple[type, bool]:
    """The type of a setting's value, or of its entries, and whether there are several."""
    hint = TYPES[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Mapping:
        return dict, False
    if get_args(hint):
        return get_args(hint)[0], True
    return hint, False


def _converted(name: str, value: Any, source: Path | str) -> Any:
    """A value of a file as the setting's type: YAML reads 1e-3 as text, and 3 as no float."""
    if value is None:
        if DEFAULTS[name] is None:
            return None
        raise ValueError(f"{name} in {source} has no value; give one, or leave {name} out")
    kind, several = _kind(name)
    try:
        if not several:
            return _entry(kind, value)
        if isinstance(value, (list, tuple)):
            return tuple(_entry(kind, entry) for entry in value)
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = f"a list of {kind.__name__}" if several else kind.__name__
    raise ValueError(f"{name} in {source} must be {wanted}, not {value!r}")


def _entry(kind: type, value: Any) -> Any:
    """A value that is not a list as this type.

    Raises:
        TypeError, ValueError, OverflowError: It is of another type.
    """
    if isinstance(value, bool) != (kind is bool) or isinstance(value, dict) != (kind is dict):
        raise TypeError
    if value is None or isinstance(value, (list, tuple, set)):
        raise TypeError
    converted = kind(value)
    if kind is int and not isinstance(value, int) and converted != float(value):
        raise TypeError
    return converted


def _check_known(what: str, names: Iterable[Any], known: Collection[str], path: Path) -> None:
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{what} in {path} must be one of {', '.join(known)}, not {name!r}")
        if name not in known:
            raise ValueError(f"unknown {what} {name!r} in {path}{_near(name, known)}")


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, [entry for entry in known if not entry.startswith("--no-")], n=4, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(_text(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
