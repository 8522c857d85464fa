"""Imports go in one direction, the core needs only torch, and public names are sorted and documented."""

import ast
import graphlib
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import typing
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
# Likewise what the figures and eigenvalues of the diagnosis and its command line use if it is installed.
USED_IF_THERE = {
    "implicit/diagnostics/figures.py": {"matplotlib"},
    "implicit/diagnostics/measurements.py": {"scipy"},
    "implicit/diagnostics/diagnosis.py": {"matplotlib"},
    "implicit/__main__.py": {"PIL", "safetensors", "timm"},
}
# What only the optional parts need.
OPTIONAL = {"accelerate", "matplotlib", "PIL", "psutil", "scipy", "sklearn", "tensorboard", "timm", "torchdeq"}
OPTIONAL |= {"torchvision", "tqdm", "yaml"}
# The parts of the core packages, which are files and folders, with the lowest level first. A part imports only from
# itself and from parts of lower levels.
LEVELS: dict[str, list[set[str]]] = {
    "solvers": [
        {"problem"},
        {"_solution", "_stopping"},
        {"_measure"},
        {"_failure"},
        {"linear"},
        {"methods"},
        {"_cuda_graph", "_fixed_steps", "_loop", "_samples", "_secant"},
        {"_rules"},
        {"_branch_free", "_progress"},
        {"_full_steps", "_graph"},
        {"_full_steps_graph"},
        {"_loop_invariants", "_series_graph"},
        {"_compiled", "_untraced", "adapters"},
        {"_compiled_adjoint"},
        {"_registry"},
        {"_solve"},
        {"_solve_root"},
        {"__init__"},
        {"testing"},
    ],
    "implicit": [
        {"autograd.torch_internals"},
        {"autograd", "spectral"},
        {"backward", "log_determinant", "training"},
        {"solve_keywords"},
        {"differentiable", "functional", "optima"},
        {"implicit_layer", "root"},
        {"invertible_residual", "layer"},
        {"diagnostics"},
        {"__init__"},
        {"__main__"},
    ],
}
LEVEL_OF = {
    f"{package}.{part}": i for package, levels in LEVELS.items() for i, parts in enumerate(levels) for part in parts
}
# implicit may import the public names of these, and anything in solvers.problem.
PUBLIC_MODULES = {"solvers", "solvers.adapters", "solvers.linear", "solvers.testing"}
# The files that may use private names of PyTorch, and names with an underscore that PyTorch's documentation describes.
TORCH_INTERNALS = {"implicit/autograd/torch_internals.py", "solvers/_cuda_graph.py", "solvers/problem/window.py"}
DOCUMENTED = {
    "torch._dynamo.config",
    "torch._foreach_",
    "torch._inductor.custom_graph_pass",
    "torch.utils._pytree",
    "torch.utils._python_dispatch",
}
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
        allowed = REQUIRED | (ADAPTED if path.is_relative_to(ADAPTERS) else USED_IF_THERE.get(label(path), set()))
        assert top_levels - MAY_IMPORT.keys() - sys.stdlib_module_names <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "solvers").rglob("*.py")), ids=label)
def test_solvers_know_tensors_and_callables_alone(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    used = {name for name in (*imports(tree), *attributes(tree)) if name.startswith(("torch.nn", "torch.autograd"))}
    # Whether a tensor carries a tangent is a question about a tensor.
    allowed = ("torch.nn.functional", "torch.autograd.forward_ad")
    assert not {name for name in used if not name.startswith(allowed)}


def module_of(path: Path) -> str:
    """The dotted name of the module in a file; a package is that of its ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imported_modules(path: Path) -> set[str]:
    """The modules of the project that a file imports, wherever in the file it does so."""
    found = set()
    for name in imports(ast.parse(path.read_text("utf-8"))):
        # ``from a import b`` imports the module a.b if there is one, and otherwise a.
        found.add(name if name in MODULES else name.rpartition(".")[0])
    return found & MODULES.keys()


def part_of(module: str) -> str:
    """The part of its package that a module belongs to: the longest name in the table that is a prefix of its name."""
    if module in LEVELS:
        return f"{module}.__init__"
    parts = [part for part in LEVEL_OF if f"{module}.".startswith(f"{part}.")]
    assert parts, f"{module} belongs to no part: add it to LEVELS, above everything that it imports"
    return max(parts, key=len)


@pytest.mark.parametrize("path", [path for path in FILES if path.relative_to(ROOT).parts[0] in CORE], ids=label)
def test_parts_of_the_core_import_only_lower_parts(path: Path) -> None:
    module = module_of(path)
    package, own = module.partition(".")[0], part_of(module)
    others = {name for name in imported_modules(path) if name.partition(".")[0] == package and part_of(name) != own}
    upward = {name for name in others if LEVEL_OF[part_of(name)] >= LEVEL_OF[own]}
    assert not upward, f"{own} must not import from parts of its own level or above"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_through_others(package: str) -> None:
    of_package = {name: path for name, path in MODULES.items() if name.partition(".")[0] == package}
    graph = {name: imported_modules(path) - {name} for name, path in of_package.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("path", [path for path in FILES if path.relative_to(ROOT).parts[0] == "implicit"], ids=label)
def test_implicit_imports_public_names_of_solvers(path: Path) -> None:
    private = []
    for name in imports(ast.parse(path.read_text("utf-8"))):
        module, _, attribute = name.rpartition(".")
        if name.partition(".")[0] != "solvers" or name in PUBLIC_MODULES or f"{name}.".startswith("solvers.problem."):
            continue
        if module not in PUBLIC_MODULES or attribute not in importlib.import_module(module).__all__:
            private.append(name)
    assert not private, "import them from solvers, solvers.linear or solvers.problem"


def private_names_of_torch(tree: ast.AST) -> set[str]:
    """The dotted names that are imported from torch or reached through it and have a part with a leading underscore."""
    origin = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level
        for alias in node.names
    }
    chains = (chain.split(".") for chain in attributes(tree))
    reached = {".".join([origin.get(chain[0], chain[0]), *chain[1:]]) for chain in chains}
    found = {name for name in (*imports(tree), *reached) if name.partition(".")[0] == "torch"}
    for prefix in DOCUMENTED:
        found = {name.replace(prefix, "documented") for name in found}
    return {name for name in found if re.search(r"\._(?!_)", name)}


@pytest.mark.parametrize("path", [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES], ids=label)
def test_private_names_of_torch_are_in_one_place(path: Path) -> None:
    found = private_names_of_torch(ast.parse(path.read_text("utf-8")))
    assert not found or label(path) in TORCH_INTERNALS, "use them through implicit/autograd/torch_internals.py"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch\ntorch._C._functorch.peek()", {"torch._C._functorch.peek"}),
        (
            "from torch.nn.utils import parametrize\nparametrize._cache.clear()",
            {"torch.nn.utils.parametrize._cache.clear"},
        ),
        (
            "from torch.autograd import forward_ad as ad\nad._current_level",
            {"torch.autograd.forward_ad._current_level"},
        ),
        ("from torch._C import _functorch", {"torch._C._functorch"}),
        ("from torch.utils._pytree import tree_map\ntree_map(f, x)\nself._layout.pack(x)\ntorch.__version__", set()),
    ],
)
def test_private_names_are_found(source: str, names: set[str]) -> None:
    assert private_names_of_torch(ast.parse(source)) == names


def test_core_loads_nothing_optional() -> None:
    # torch itself loads some of them if they are installed.
    program = (
        "import sys, torch; before = set(sys.modules); import solvers, implicit; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    names = run.stdout.split()
    loaded = {name.partition(".")[0] for name in names}
    assert "implicit" in loaded
    assert "solvers.testing" not in names
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
    """Whether it has a docstring of its own; a dataclass without one gets its signature for a docstring.

    A type alias cannot have one.
    """
    if typing.get_origin(thing) is not None:
        return True
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
