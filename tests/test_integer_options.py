"""All options that count something take integers of any type, and refuse bools and all else by name and value."""

import numpy as np
import pytest
import torch

from implicit import WarmStart, jacobian_regularization, root, spectral_norm
from implicit.diagnostics import spectral_radius
from solvers import Anderson, Steps, Stopping, solve

ZEROS = torch.zeros(4, 3)


OPTIONS = {
    "max_steps": lambda n: Stopping(max_steps=n),
    "check_every": lambda n: Stopping(check_every=n),
    "n of Steps": lambda n: Steps(n),
    "memory": lambda n: Anderson(memory=n),
    "chunk_size": lambda n: root(lambda z: z - 1, ZEROS, chunk_size=n),
    "batch_dims": lambda n: solve(torch.cos, ZEROS, batch_dims=n),
    "WarmStart": lambda n: WarmStart(n, ZEROS),
    "num_samples": lambda n: jacobian_regularization(torch.cos, ZEROS, num_samples=n),
    "steps": lambda n: spectral_radius(torch.cos, ZEROS, steps=n),
    "n_power_iterations": lambda n: spectral_norm(torch.nn.Linear(3, 3), n_power_iterations=n),
    "n_gram_iterations": lambda n: spectral_norm(torch.nn.Linear(3, 3), method="gram", n_gram_iterations=n),
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_integers_alone(make):
    for number in (1, np.int64(1), np.uint8(1)):
        make(number)
    for bad in (True, -1, 1.0, np.float64(2), "2", torch.tensor(2)):
        with pytest.raises(ValueError, match="must be (a positive integer|an integer >= 0)( or None)?, got ") as raised:
            make(bad)
        assert repr(bad) in str(raised.value)
