"""``compile=True`` notices what a module runs beside its code: hooks, and a forward that was replaced."""

import threading

import pytest
import torch
import torch._dynamo
from torch import nn

from implicit import FixedPointLayer
from solvers import _compiled

pytestmark = [
    pytest.mark.usefixtures("double", "without_a_compiler"),
    # PyTorch's own, while it compiles.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, z, x):
        return 0.4 * torch.tanh(self.linear(z)) + x


def other_forward(self, z, x):
    return 0.3 * torch.sin(self.linear(z)) - x


# What is done to a module or its class, and how it is undone.
CHANGES = {
    "hook of a part": lambda cell: cell.linear.register_forward_hook(lambda module, args, out: 2 * out).remove,
    "hook": lambda cell: cell.register_forward_hook(lambda module, args, out: 0.5 * out).remove,
    "hook before": lambda cell: cell.register_forward_pre_hook(lambda module, args: (args[0] / 2, args[1])).remove,
    "forward": lambda cell: replaced(cell, "forward", other_forward.__get__(cell)),
    "forward of a part": lambda cell: replaced(cell.linear, "forward", lambda z: z / 2),
    "forward of the class": lambda cell: replaced(Cell, "forward", other_forward),
}


def replaced(owner, name, value):
    before = vars(owner).get(name)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is None else setattr(owner, name, before)


@pytest.mark.parametrize(
    ("change", "same"),
    [*((change, True) for change in CHANGES), ("hook of a part", False), ("forward of the class", False)],
)
def test_a_module_that_runs_other_code_is_compiled_anew(change, same):
    x = torch.rand(3, 4)
    cell = Cell()

    def both():
        options = {"solver": "picard", "rtol": 1e-10}
        with torch.no_grad():
            return [FixedPointLayer(cell, compile=compile, **options)(x) for compile in (True, False)]

    torch.testing.assert_close(*both(), rtol=1e-9, atol=1e-9)
    cell = cell if same else Cell()
    undo = CHANGES[change](cell)
    try:
        compiled, expected = both()
    finally:
        undo()
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*both(), rtol=1e-9, atol=1e-9)
    assert not _compiled._refused


def test_settings_of_the_compiler_are_those_of_the_solve_alone():
    """In a map they are those of solves, also while another thread leaves; after the solve, what they were."""
    names = list(_compiled._SETTINGS)
    both_inside, one_left = threading.Barrier(2), threading.Event()
    found = {}

    def settings():
        return {name: getattr(torch._dynamo.config, name) for name in names}

    def run(number):
        with _compiled._configured():
            both_inside.wait(60)
            if number:
                one_left.wait(60)
            found[number] = settings()
        one_left.set()
        found[f"after {number}"] = settings() == before

    before = settings()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] == _compiled._SETTINGS
    assert found["after 1"]
    assert settings() == before


def test_no_memory_is_no_property_of_a_map():
    calls = []

    def run(*_):
        calls.append(1)
        raise torch.OutOfMemoryError("no memory")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            _compiled._unless_refused(("a key",), run)
    assert len(calls) == 2
