"""What ``torch.compile`` leaves out of its graphs. Imported while it traces: the import loads PyTorch's compiler."""

import torch

from solvers._progress import ToleranceTest

_REASON = (
    "The test for convergence waits for the device and decides on the host. For one graph take a fixed number of "
    "steps: rtol=None, atol=None, max_steps=n."
)

update = torch.compiler.disable(ToleranceTest.update, reason=_REASON)
outcome = torch.compiler.disable(ToleranceTest.outcome, reason=_REASON)
