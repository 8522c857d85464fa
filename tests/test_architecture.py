"""The packages import in one direction, the core stays light, and the public names are in order."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("solvers", "implicit", "imixer")

# Folder -> the project's own packages that its files may import.
MAY_IMPORT = {
    "solvers": {"solvers"},
    "implicit": {"solvers", "implicit"},
    "imixer": {"solvers", "implicit", "imixer"},
    "examples": {"solvers", "implicit", "imixer"},
    "benchmarks": {"solvers", "implicit", "imixer", "benchmarks"},
    "tests": {"solvers", "implicit", "imixer"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# What a plain `pip install` brings. The core packages import nothing else from outside the standard library.
REQUIRED = {re.split(r"\W", requirement)[0] for requirement in PROJECT["dependencies"]}
CORE = {"solvers", "implicit"}
# The exception: what the adapters of other packages' solvers import, and not before it is asked for.
ADAPTED = {"numpy", "scipy", "torchdeq"}
ADAPTERS = ROOT / "solvers" / "adapters"
# What only the optional parts need.
OPTIONAL = {"accelerate", "matplotlib", "PIL", "psutil", "scipy", "sklearn", "tensorboard", "timm", "torchdeq"}
OPTIONAL |= {"torchvision", "tqdm", "yaml"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}

FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
MAX_LINES = 400


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted name of everything imported: ``from torch import nn`` gives ``torch.nn``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def attributes(tree: ast.AST) -> Iterator[str]:
    """Every attribute access, as far as it goes: ``torch.nn.functional.gelu``, but not its part ``torch.nn``."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    parts = {node.value for node in found}
    yield from (ast.unparse(node) for node in found if node not in parts)


@pytest.mark.parametrize("path", FILES, ids=label)
def test_imports_go_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    top_levels = {name.partition(".")[0] for name in imports(ast.parse(path.read_text("utf-8")))}
    assert "" not in top_levels, "a relative import"
    assert top_levels & MAY_IMPORT.keys() <= MAY_IMPORT[folder]
    if folder in CORE:
        allowed = REQUIRED | ADAPTED if path.is_relative_to(ADAPTERS) else REQUIRED
        assert top_levels - MAY_IMPORT.keys() - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "solvers").rglob("*.py")), ids=label)
def test_solvers_know_tensors_and_callables_alone(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    used = {name for name in (*imports(tree), *attributes(tree)) if name.startswith(("torch.nn", "torch.autograd"))}
    assert not {name for name in used if not name.startswith("torch.nn.functional")}


def test_core_loads_nothing_optional() -> None:
    # torch itself loads some of them where they are installed.
    program = (
        "import sys, torch; before = set(sys.modules); import solvers, implicit; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "implicit" in loaded
    assert loaded.isdisjoint(OPTIONAL)


def with_subpackages(package: str) -> list[ModuleType]:
    below = pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")
    return [importlib.import_module(name) for name in (package, *(info.name for info in below if info.ispkg))]


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_sorted_and_documented(package: str) -> None:
    for module in with_subpackages(package):
        assert list(module.__all__) == sorted(set(module.__all__)), module
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, module
        undocumented = [name for name in module.__all__ if not is_documented(getattr(module, name), name)]
        assert not undocumented, module


@pytest.mark.parametrize("package", PACKAGES)
def test_public_methods_are_documented(package: str) -> None:
    public = [getattr(module, name) for module in with_subpackages(package) for name in module.__all__]
    undocumented = [
        f"{cls.__name__}.{name}"
        for cls in filter(inspect.isclass, public)
        for name in vars(cls)
        if not name.startswith("_")
        and inspect.isroutine(getattr(cls, name, None))
        and not inspect.getdoc(getattr(cls, name))
    ]
    assert not undocumented


def is_documented(thing: object, name: str) -> bool:
    """Whether it has a docstring of its own; a dataclass without one gets its signature for a docstring."""
    docstring = getattr(thing, "__doc__", None) or ""
    return bool(docstring.strip()) and not docstring.startswith(f"{name}(")


@pytest.mark.parametrize("path", FILES, ids=label)
def test_file_is_named_after_what_is_in_it_and_short(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    assert not {part.strip("_") for part in parts} & VAGUE_NAMES
    num_lines = len(path.read_text("utf-8").splitlines())
    assert num_lines <= MAX_LINES, "split the file"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
