"""The registry of odd constructions, and what is asked of each."""

import jax
import jax.numpy as jnp
from function_checks import check, sites

import ttq_jax as ttq

X = jax.random.normal(jax.random.key(0), (2, 8, 32)) * jnp.exp(
    jax.random.normal(jax.random.key(1), (32,))
)


def matrix(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) * shape[-2] ** -0.5


class Zoo(dict):
    """Constructions by name."""

    def case(self, *found, dense=None, **how):
        """Registers one: the sites that it has, and what stays dense with a reason."""

        def add(make):
            self[make.__name__] = (make, list(found), dense or {}, how)
            return make

        return add

    def check(self, name):
        """Its table is as registered, and it runs packed as over fake-quantized weights."""
        make, found, dense, how = self[name]
        fn, params, *args = make()
        select = {k: v for k, v in how.items() if k != "tolerance"}
        table = ttq.kernels(fn, **select)(params, *args)
        assert sorted(sites(table)) == sorted(found)
        reasons = {row.path: row.dense for row in table if row.dense}
        for path, why in dense.items():
            assert why in reasons[path]
        check(fn, params, *args, **how)
