"""The jitted Anderson acceleration of jaxopt on the problems that a file holds; other benchmarks start it.

python benchmarks/jaxopt_anderson.py problems.npz > results.json

Every sample is a problem of its own, as in ours (``jax.vmap`` of jaxopt's step), and the whole is one compiled loop
that ends when the relative residual of every sample is below the tolerance, or at the most calls.
"""

import functools
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxopt import AndersonAcceleration

# The maps of the bank, row by row, with the names that the bank gives to their tensors.
MAPS = {
    "linear": lambda z, a, b: b + a @ z,
    "tanh": lambda z, w, x: jnp.tanh(x + w @ z),
    "imlp": lambda z, w1, w2, y: y + w2 @ jax.nn.gelu(w1 @ jax.nn.gelu(z, approximate=False), approximate=False),
    "H-equation": lambda z, kernel: 1 / (1 - kernel @ z),
}
# Of those, the tensors that have a row a sample.
BATCHED = {"b", "x", "y"}


@functools.partial(jax.jit, static_argnames=("kind", "memory", "rtol", "max_calls"))
def solve(z0, tensors, *, kind, memory, rtol, max_calls):
    """The fixed points (B, D) and the number of steps, each of which calls the map of every sample once."""
    f = MAPS[kind]
    solver = AndersonAcceleration(f, history_size=memory)
    in_axes = {name: 0 if name in BATCHED else None for name in tensors}

    def update(z, state, tensors):
        z, state = solver.update(z, state, **tensors)
        return z, state, state.error <= rtol * jnp.linalg.norm(z)

    def unfinished(carry):
        _, _, done, calls = carry
        return jnp.logical_and(~done.all(), calls < max_calls)

    def body(carry):
        z, state, _, calls = carry
        z, state, done = jax.vmap(update, in_axes=(0, 0, in_axes))(z, state, tensors)
        return z, state, done, calls + 1

    states = jax.vmap(lambda z, tensors: solver.init_state(z, **tensors), in_axes=(0, in_axes))(z0, tensors)
    done = jnp.zeros(len(z0), bool)
    z, _, _, calls = jax.lax.while_loop(unfinished, body, (z0, states, done, 0))
    return z, calls


def residual(kind, z, tensors):
    """The largest relative residual of a sample."""
    in_axes = {name: 0 if name in BATCHED else None for name in tensors}
    image = jax.vmap(lambda z, tensors: MAPS[kind](z, **tensors), in_axes=(0, in_axes))(z, tensors)
    return float((jnp.linalg.norm(image - z, axis=1) / jnp.linalg.norm(image, axis=1)).max())


def main():
    file = np.load(sys.argv[1])
    options = json.loads(str(file["options"]))
    results = {}
    for name in options["problems"]:
        arrays = {key.split("/")[1]: jnp.asarray(file[key]) for key in file.files if key.startswith(f"{name}/")}
        z0 = arrays.pop("z0")
        kind = name.split()[0]
        for memory in options["memories"]:
            run = functools.partial(
                solve, z0, arrays, kind=kind, memory=memory, rtol=options["rtol"], max_calls=options["max_calls"]
            )
            z, calls = run()
            times, processor_times = [], []
            for _ in range(options["repeats"]):
                start, processor_start = time.perf_counter(), time.process_time()
                run()[0].block_until_ready()
                times.append(time.perf_counter() - start)
                processor_times.append(time.process_time() - processor_start)
            results[f"{name}/{memory}"] = {
                "calls": int(calls),
                "ms": 1e3 * statistics.median(times),
                "processor_ms": 1e3 * statistics.median(processor_times),
                "residual": residual(kind, z, arrays),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
