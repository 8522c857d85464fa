"""``compile=True`` notices what a module runs beside its code: hooks, and a forward that was replaced."""

import pytest
import torch
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


@pytest.mark.parametrize("same", [True, False], ids=["the same module", "another module"])
@pytest.mark.parametrize("change", CHANGES)
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
