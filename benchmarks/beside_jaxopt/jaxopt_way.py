"""Three hypergradients in jaxopt's way; :mod:`benchmarks.beside_jaxopt.ours` has the same in this library's.

python benchmarks/beside_jaxopt/jaxopt_way.py

Needs an environment with jax and jaxopt 0.8.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxopt import Bisection, ProximalGradient, implicit_diff, prox


def ridge(x: Array, y: Array, x_test: Array, y_test: Array, penalty: Array) -> Array:
    def objective(w: Array, penalty: Array) -> Array:
        return 0.5 * jnp.sum((x @ w - y) ** 2) + 0.5 * penalty * jnp.sum(w**2)

    @implicit_diff.custom_root(jax.grad(objective))
    def fit(init: None, penalty: Array) -> Array:
        return jnp.linalg.solve(x.T @ x + penalty * jnp.eye(x.shape[1]), x.T @ y)

    return jax.grad(lambda penalty: jnp.mean((x_test @ fit(None, penalty) - y_test) ** 2))(penalty)


def lasso(x: Array, y: Array, x_test: Array, y_test: Array, strength: Array) -> Array:
    def objective(w: Array) -> Array:
        return 0.5 * jnp.mean((x @ w - y) ** 2)

    def error(strength: Array) -> Array:
        solver = ProximalGradient(fun=objective, prox=prox.prox_lasso, tol=1e-12, maxiter=10_000)
        w = solver.run(jnp.zeros(x.shape[1]), hyperparams_prox=strength).params
        return jnp.mean((x_test @ w - y_test) ** 2)

    return jax.grad(error)(strength)


def kepler(mean: Array, eccentricity: Array) -> Array:
    def equation(anomaly: Array, mean: Array, eccentricity: Array) -> Array:
        return anomaly - eccentricity * jnp.sin(anomaly) - mean

    def one(mean: Array, eccentricity: Array) -> Array:
        solver = Bisection(optimality_fun=equation, lower=0.0, upper=7.0, maxiter=100, tol=1e-14, check_bracket=False)
        return solver.run(None, mean, eccentricity).params

    return jax.grad(lambda eccentricity: jnp.sum(jax.vmap(one)(mean, eccentricity)))(eccentricity)


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    angle = jnp.arange(120.0).reshape(2, 20, 3) ** 2
    (x, x_test), truth = jnp.sin(angle), jnp.array([1.0, -2.0, 0.0])
    y, y_test = x @ truth + 0.3 * jnp.cos(angle[0, :, 0]), x_test @ truth
    print("ridge ", f"{ridge(x, y, x_test, y_test, jnp.array(3.0)):.10f}")
    print("lasso ", f"{lasso(x, y, x_test, y_test, jnp.array(0.1)):.10f}")
    print("kepler", [f"{entry:.10f}" for entry in kepler(jnp.array([0.5, 2.0]), jnp.array([0.3, 0.8]))])


if __name__ == "__main__":
    main()
