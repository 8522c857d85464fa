"""What ``torch.compile`` leaves out of its graphs. Imported while it traces: the import loads PyTorch's compiler."""

import torch

from implicit.autograd import compiled

with_eager_adjoint = torch.compiler.disable(
    compiled.with_eager_adjoint,
    reason="The linear solver of the implicit backward mode tests convergence on the host. For one graph take one that "
    "does not, such as Implicit(linear_solver=NeumannSeries(terms=n)).",
)
