"""Train a deep-equilibrium transformer (Bai, Kolter and Koltun 2019) to predict the next character of a text.

python examples/zoo/deq_transformer.py
    The text is the language reference that Python's own help() shows, which comes with every Python. Prints the bits
    per character on the last tenth of it beside what letter frequencies alone reach, the share of the sequences that
    were solved, the solver's steps, and the memory that the backward pass needs by the number of steps. About three
    minutes on two cores.

One transformer block is applied until its output no longer changes: z = block(z, x), where x are the embedded
characters, which are injected again in every step. The gradient follows from the equilibrium alone, so that memory does
not grow with the number of steps.

The block normalizes after each residual connection. That matters: LayerNorm maps everything into a ball, and a
continuous map of a ball into itself has a fixed point (Brouwer). A pre-norm block z + g(norm(z)) has a fixed point only
where g is zero, which may be nowhere, and its iterates grow without bound.
"""

import argparse
import math
import pydoc_data.topics
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from implicit import FixedPointLayer, Implicit, Unrolled, jacobian_regularization
from implicit.backward import Backward
from solvers import Solution, Steps
from solvers.linear import Richardson
from solvers.testing import PeakMemory

HEADS = 4
# Of the term of the loss that keeps the Jacobian small (Bai, Koltun and Kolter 2021), and the map easy to solve.
JACOBIAN_WEIGHT = 0.02


class Block(nn.Module):
    """The map z -> norm(h + mlp(h)) with h = norm(z + attention(z, x)), and causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """z: (B, T, width), x: (B, T, 3 width), which enters the queries, keys and values."""
        q, k, v = (self.qkv(z) + x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, ...)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, heads, T, T)
        future = torch.ones(scores.shape[2:], dtype=torch.bool, device=z.device).triu(1)
        attended = (scores.masked_fill(future, -torch.inf).softmax(dim=3) @ v).transpose(1, 2).flatten(2)
        z = self.norm1(z + self.out(attended))
        return self.norm2(z + self.mlp(z))  # type: ignore[no-any-return]


class DEQTransformer(nn.Module):
    """Characters (B, T) -> logits (B, T, characters) of the next ones."""

    def __init__(self, num_characters: int, context: int, width: int, heads: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(num_characters, width), nn.Embedding(context, width)
        self.inject = nn.Linear(width, 3 * width)
        self.block = Block(width, heads)
        self.equilibrium = FixedPointLayer(
            self.block,
            solver="broyden",
            init=lambda x: x.new_zeros(*x.shape[:2], width),
            backward=Implicit(linear_solver=Richardson(rtol=1e-2)),
            rtol=1e-2,
            max_steps=100,
        )
        self.head = nn.Linear(width, num_characters)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.equilibrium(self.injected(characters)))  # type: ignore[no-any-return]

    def injected(self, characters: Tensor) -> Tensor:
        """What enters the block in every step (B, T, 3 width)."""
        embedded = self.embedding(characters) + self.position.weight[: characters.shape[1]]
        return self.inject(embedded)  # type: ignore[no-any-return]


def load_text() -> tuple[Tensor, int]:
    """The text (N,) as numbers, without what stands in it twice, and how many different characters it has."""
    topics = pydoc_data.topics.topics
    paragraphs = dict.fromkeys("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n"))
    text = "\n\n".join(paragraphs).encode("ascii", "ignore")
    characters, numbers = torch.tensor(list(text)).unique(return_inverse=True)
    return numbers, len(characters)


def frequency_bits(train: Tensor, test: Tensor, num_characters: int, order: int) -> float:
    """Bits per character on the test text by the frequencies of characters after the last order - 1 ones."""
    seen = Counter(tuple(gram) for gram in train.unfold(0, order, 1).tolist())
    before = Counter(tuple(gram) for gram in train.unfold(0, order, 1)[:, :-1].tolist())
    bits = 0.0
    grams = test.unfold(0, order, 1).tolist()
    for gram in grams:
        bits -= math.log2((seen[tuple(gram)] + 0.1) / (before[tuple(gram[:-1])] + 0.1 * num_characters))
    return bits / len(grams)


def train(model: DEQTransformer, text: Tensor, steps: int, batch_size: int = 16) -> None:
    context = model.position.num_embeddings
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    for _ in trange(steps, desc="training", unit="step", leave=False):
        start = torch.randint(len(text) - context, (batch_size, 1))
        batch = text[start + torch.arange(context + 1)]
        x = model.injected(batch[:, :-1])
        z = model.equilibrium(x)
        size = jacobian_regularization(model.block, z.detach(), x.detach()).mean()
        loss = F.cross_entropy(model.head(z).flatten(0, 1), batch[:, 1:].flatten()) + JACOBIAN_WEIGHT * size
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: DEQTransformer, text: Tensor) -> tuple[float, Solution[Tensor]]:
    """Bits per character on the text, cut into sequences, and the solution for all of these."""
    context = model.position.num_embeddings
    sequences = text.unfold(0, context + 1, context)
    z, solution = model.equilibrium(model.injected(sequences[:, :-1]), return_solution=True)
    loss = F.cross_entropy(model.head(z).flatten(0, 1), sequences[:, 1:].flatten())
    return loss.item() / math.log(2), solution


def saved_bytes(model: DEQTransformer, characters: Tensor, backward: Backward, steps: int) -> int:
    """The memory that a forward pass of a number of steps keeps for the backward pass."""
    start = model.equilibrium.init
    layer = FixedPointLayer(model.block, solver="picard", backward=backward, init=start, stopping=Steps(steps))
    with PeakMemory() as memory:
        logits = model.head(layer(model.injected(characters)))
        return int(memory.held - logits.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=800, help="training steps [%(default)s]")
    parser.add_argument("--width", type=int, default=64, help="of the state of a character [%(default)s]")
    parser.add_argument("--context", type=int, default=64, help="characters of a sequence [%(default)s]")
    parser.add_argument("--test-characters", type=int, default=20_000, help="of the last tenth [%(default)s]")
    options = parser.parse_args()
    if min(options.steps, options.width, options.context) < 1 or options.width % HEADS:
        parser.error(f"--steps, --width and --context must be at least 1, and --width a multiple of {HEADS}")
    torch.manual_seed(0)
    text, num_characters = load_text()
    training, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :][: max(options.test_characters, 0)]
    if len(test) <= options.context:
        parser.error(f"--test-characters must be more than --context; {len(test):,} are {options.context:,} or less")
    model = DEQTransformer(num_characters, options.context, options.width, heads=HEADS)
    train(model, training, options.steps)
    bits, solution = evaluate(model, test)
    print(f"{len(text):,} characters, {num_characters} different ones; bits per character on {len(test):,} of them:")
    print(f"  frequencies of characters        {frequency_bits(training, test, num_characters, order=1):.2f}")
    print(f"  frequencies of pairs             {frequency_bits(training, test, num_characters, order=2):.2f}")
    print(f"  equilibrium transformer          {bits:.2f}")
    share, steps = solution.converged.double().mean(), solution.num_steps.double()
    print(f"solved {share:.1%} of the sequences, in {steps.median():.0f} steps (median), at most {steps.max():.0f}")
    print("MiB kept for the backward pass:")
    for name, backward in {"implicit": Implicit(), "unrolled": Unrolled()}.items():
        sizes = {steps: saved_bytes(model, test[None, : options.context], backward, steps) for steps in (5, 20, 80)}
        print(f"  {name}", *(f"{size / 2**20:.2f} ({steps} steps)" for steps, size in sizes.items()), sep="  ")


if __name__ == "__main__":
    main()
