"""The models of examples/zoo, and the same models on torchdeq: lines of code, time per training step and quality.

python -m benchmarks.zoo [--models mdeq ...]

Each model is trained twice from the same seed, for fewer steps than its example takes by default: as it is, and with
its equilibrium solved by torchdeq with the solver of the same name, tolerance and implicit gradient. "lines" are those
of code, without docstrings, in the classes of the model; torchdeq's contain the module `OnTorchdeq` instead of the
statement that makes a FixedPointLayer. "ms" is processor time per training step on one thread. "unsolved" is the share
of the test samples whose relative residual exceeds twice the tolerance. The monotone network has no
splitting method in torchdeq, whose Anderson acceleration is used.
"""

import ast
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from benchmarks.timing import begin, parser

ZOO = Path(__file__).resolve().parent.parent / "examples" / "zoo"


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", ZOO / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"There is no example {name} in {ZOO}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class OnTorchdeq(nn.Module):
    """What a model on torchdeq has instead of a FixedPointLayer."""

    def __init__(self, f, start, solver, tolerance, max_steps, batch_dims):
        from torchdeq import get_deq

        super().__init__()
        self.f, self.start, self.batch_dims = f, start, batch_dims
        forward = {"f_solver": solver, "f_tol": tolerance, "f_max_iter": max_steps, "f_stop_mode": "rel"}
        backward = {"b_solver": solver, "b_tol": tolerance, "b_max_iter": max_steps, "b_stop_mode": "rel"}
        self.deq = get_deq(ift=True, **forward, **backward)

    def forward(self, *inputs):
        start = self.start(*inputs)
        several = isinstance(start, tuple)
        if self.batch_dims == 0:  # one problem: torchdeq takes the first dimension for that of the samples
            with parametrize.cached():
                found, _ = self.deq(lambda z: self.f(z[0], *inputs)[None], start[None])
            return found[-1][0]
        with parametrize.cached():
            found, _ = self.deq(lambda *z: self.f(z if several else z[0], *inputs), start)
        return tuple(found[-1]) if several else found[-1]


@dataclasses.dataclass
class Entry:
    """A model of the zoo.

    Attributes:
        name: The name of the example.
        solver: The name of the solver in torchdeq.
        make: Makes the model from the module of the example.
        train: Trains it, and returns the number of steps.
        score: The quality of the trained model, in words.
        inputs: What the equilibrium is given for the test samples.
    """

    name: str
    solver: str
    make: Callable[[Any], Any]
    train: Callable[[Any, Any], int]
    score: Callable[[Any, Any], str]
    inputs: Callable[[Any, Any], tuple[Tensor, ...]]


def transformer() -> Entry:
    def texts(zoo):
        text, _ = zoo.load_text()
        return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :][:4000]

    def bits(zoo, model):
        sequences = texts(zoo)[1].unfold(0, 65, 64)
        logits = model(sequences[:, :-1]).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, sequences[:, 1:].flatten())
        return f"{loss.item() / torch.log(torch.tensor(2.0)).item():.2f} bits"

    return Entry(
        "deq_transformer",
        "broyden",
        lambda zoo: zoo.DEQTransformer(zoo.load_text()[1], context=64, width=64, heads=4),
        lambda zoo, model: zoo.train(model, texts(zoo)[0], steps=25) or 25,
        bits,
        lambda zoo, model: (model.injected(texts(zoo)[1].unfold(0, 64, 64)),),
    )


def classifier(name: str, make: Callable[[Any], Any], inject: str, solver: str, epochs: int) -> Entry:
    def accuracy(zoo, model):
        _, images, _, labels = zoo.load_split()
        return f"{(model(images).argmax(dim=1) == labels).double().mean():.1%}"

    def train(zoo, model):
        images, _, labels, _ = zoo.load_split()
        zoo.train(model, images, labels, epochs=epochs)
        return epochs * (len(images) // 64)

    def inputs(zoo, model):
        return (getattr(model, inject)(zoo.load_split()[1]),)

    return Entry(name, solver, make, train, accuracy, inputs)


def graph_network() -> Entry:
    length, steps = 20, 100

    def data(zoo):
        torch.manual_seed(0)
        adjacency, features, labels = zoo.make_chains(length)
        return features, adjacency, labels, *zoo.split(labels, length)

    def train(zoo, model):
        *graph, training, _ = data(zoo)
        zoo.train(model, *graph, training, steps)
        return steps

    def score(zoo, model):
        *graph, _, rest = data(zoo)
        return f"{zoo.accuracy(model, *graph, rest):.1%}"

    return Entry(
        "implicit_graph_network",
        "fixed_point_iter",
        lambda zoo: zoo.ImplicitGraphNetwork(16),
        train,
        score,
        lambda zoo, model: (model.inject(data(zoo)[0]), data(zoo)[1]),
    )


def deblurring() -> Entry:
    epochs = 2

    def blurred(zoo):
        torch.manual_seed(0)
        return zoo.measure(zoo.load_images()[1])

    def train(zoo, model):
        images, _ = zoo.load_images()
        zoo.train(model, images, epochs)
        return epochs * -(-len(images) // 64)

    return Entry(
        "deblurring",
        "anderson",
        lambda zoo: zoo.Deblurring(),
        train,
        lambda zoo, model: f"{zoo.psnr(model(blurred(zoo)), zoo.load_images()[1]):.2f} dB",
        lambda zoo, model: (blurred(zoo),),
    )


def entries() -> list[Entry]:
    return [
        transformer(),
        classifier("mdeq", lambda zoo: zoo.MDEQ(), "stem", "broyden", epochs=1),
        classifier("monotone_operator_network", lambda zoo: zoo.MonotoneNetwork(), "inject", "anderson", epochs=4),
        graph_network(),
        deblurring(),
    ]


def code_lines(nodes: list[Any]) -> int:
    """How many lines these pieces of code have, formatted in one way, without comments and docstrings."""
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part) is not None:
                part.body = part.body[1:] or [ast.Pass()]
    return sum(len([line for line in ast.unparse(node).splitlines() if line.strip()]) for node in nodes)


def lines(zoo: ModuleType) -> tuple[int, int]:
    """Of the model's classes as they are, and on torchdeq, which has no use for our solvers."""
    classes = [node for node in ast.parse(inspect.getsource(zoo)).body if isinstance(node, ast.ClassDef)]
    modules = [node for node in classes if any("Module" in ast.unparse(base) for base in node.bases)]
    making = [
        part
        for node in modules
        for part in ast.walk(node)
        if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "self.equilibrium"
    ]
    adapter = code_lines(ast.parse(inspect.getsource(OnTorchdeq)).body)
    shared = code_lines(modules)
    return code_lines(classes), shared - code_lines(making) + adapter


@torch.no_grad()
def unsolved(model: Any, inputs: tuple[Tensor, ...], tolerance: float, batch_dims: int) -> float:
    z = model.equilibrium(*inputs)
    fz = model.map_of_zoo(z, *inputs)
    flat = [torch.cat([leaf.flatten(batch_dims).double() for leaf in tree_leaves(state)], dim=-1) for state in (z, fz)]
    residual = (flat[1] - flat[0]).norm(dim=-1) / flat[1].norm(dim=-1)
    return float((residual > 2 * tolerance).double().mean())


def main() -> None:
    """Print one table."""
    options = parser(__doc__, threads=1)
    names = [entry.name for entry in entries()]
    options.add_argument("--models", nargs="+", choices=names, default=names, help="those to compare %(default)s")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")
    versions = {}
    libraries = ["ours"]
    if importlib.util.find_spec("torchdeq"):
        versions, libraries = {"torchdeq": importlib.metadata.version("torchdeq")}, ["ours", "torchdeq"]
    begin(chosen.threads, **versions)
    print("\n| model | library | lines | ms per step | quality | unsolved |\n|---|---|---|---|---|---|")
    for entry in entries():
        if entry.name not in chosen.models:
            continue
        zoo = load(entry.name)
        for library, count in zip(libraries, lines(zoo), strict=False):
            torch.manual_seed(0)
            model = entry.make(zoo)
            layer = model.equilibrium
            tolerance = float(layer.rtol)
            object.__setattr__(model, "map_of_zoo", layer.f)
            if library == "torchdeq":
                model.equilibrium = OnTorchdeq(
                    layer.f, layer.start, entry.solver, tolerance, layer.max_steps, layer.batch_dims
                )
            began = time.process_time()
            steps = entry.train(zoo, model)
            spent = 1e3 * (time.process_time() - began) / steps
            with torch.no_grad():
                score, share = (
                    entry.score(zoo, model),
                    unsolved(model, entry.inputs(zoo, model), tolerance, layer.batch_dims),
                )
            print(f"| {entry.name} | {library} | {count} | {spent:.0f} | {score} | {share:.1%} |", flush=True)


if __name__ == "__main__":
    main()
