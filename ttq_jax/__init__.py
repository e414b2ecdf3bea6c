"""Test-time quantization of language models in JAX (TTQ, arXiv:2603.19296).

While a prompt is read, each linear layer looks at the activations it receives, scales its weights
by them and rounds them to a few bits; the answer is decoded from those weights. Reading,
quantizing and decoding are one XLA program.

Axis legend, used in every signature:

    B batch        T prompt tokens   S cache slots   L layers        V vocabulary
    D model width  F feed-forward    N query heads   K key heads     H head width
    d_in, d_out    a linear layer's input and output channels (kernels are [d_in, d_out])
    n_group        groups of input channels that share a scale, per output channel
    m, k, n        rows, inner and outer size of a kernel's matrix product

A *group* shares a scale; a *block* is what a kernel loads at once.
"""

from ttq_jax._version import __version__
from ttq_jax.calibrate import calibrate, prepare
from ttq_jax.checkpoint import Model, load
from ttq_jax.corpora import cut_windows, read_corpus
from ttq_jax.generate import generate
from ttq_jax.perplexity import Protocol, perplexity
from ttq_jax.quant.recipe import PRESETS, Recipe, preset
from ttq_jax.sampling import Sampling

__all__ = [
    "PRESETS",
    "Model",
    "Protocol",
    "Recipe",
    "Sampling",
    "__version__",
    "calibrate",
    "cut_windows",
    "generate",
    "load",
    "perplexity",
    "prepare",
    "preset",
    "read_corpus",
]
