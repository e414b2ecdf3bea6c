"""Any Flax model: read a prompt with it, and run it over weights packed for that prompt.

    (logits, cache), packed = ttq.read(fn, recipe)(params, tokens, cache)
    step = ttq.run(fn)
    logits, cache = step(packed, token, cache)

`fn` is any JAX function of a parameter tree: Linen's `model.apply`, what `functional` makes of an
NNX module, or the user's own. `trace` says how.
"""

from ttq_jax.functions.calls import kernels, observe, quantize, read, run
from ttq_jax.functions.modules import functional
from ttq_jax.functions.packed import PackedKernel, dense_tree, effective_bits, is_packed
from ttq_jax.functions.plan import Row, Table
from ttq_jax.functions.sites import Observed
from ttq_jax.functions.static import StaticFactors, static_factors
from ttq_jax.functions.trace import FunctionError

__all__ = [
    "FunctionError",
    "Observed",
    "PackedKernel",
    "Row",
    "StaticFactors",
    "Table",
    "dense_tree",
    "effective_bits",
    "functional",
    "is_packed",
    "kernels",
    "observe",
    "quantize",
    "read",
    "run",
    "static_factors",
]
