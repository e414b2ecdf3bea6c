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

JAX's switches stay the user's. 64-bit types, strict dtypes and ranks, a transfer guard that
disallows implicit transfers, and the checks for NaNs and leaked tracers change no result. Three
change some on purpose:

    jax_default_matmul_precision   the products of the model; weights are always quantized in full
                                   float32
    jax_default_prng_impl          what a `seed` of the user's draws; what we draw for a prior, an
                                   allocation or a factor is drawn by threefry whatever it says
    jax_threefry_partitionable     every draw
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ttq_jax._version import __version__

if TYPE_CHECKING:
    from ttq_jax.checkpoint import Model, load
    from ttq_jax.checkpoint.packed_store import load_packed, save_packed
    from ttq_jax.checkpoint.store import (
        load_conversation,
        load_messages,
        load_offline,
        save_conversation,
        save_offline,
    )
    from ttq_jax.draft_costs import DraftCosts
    from ttq_jax.errors import Error
    from ttq_jax.evaluation.acceptance import acceptance
    from ttq_jax.evaluation.corpora import cut_windows, read_corpus
    from ttq_jax.evaluation.perplexity import Protocol, perplexity
    from ttq_jax.evaluation.timings import time_answers
    from ttq_jax.functions import (
        FunctionError,
        Observed,
        functional,
        kernels,
        observe,
        quantize,
        read,
        run,
        static_factors,
    )
    from ttq_jax.generate import generate
    from ttq_jax.offline.calibrate import calibrate, prepare
    from ttq_jax.quant.clip import ClipSearch
    from ttq_jax.quant.grid import Grid, Nearest
    from ttq_jax.quant.half_quadratic import HalfQuadratic
    from ttq_jax.quant.lowrank import LowRankRule
    from ttq_jax.quant.presets import PRESETS, preset
    from ttq_jax.quant.recipe import Recipe
    from ttq_jax.quant.recipe_text import load_recipe, save_recipe, with_settings
    from ttq_jax.quant.scaling import NoScale, PowerLaw, SearchedAlpha
    from ttq_jax.quant.second_order import SecondOrder
    from ttq_jax.quant.source import Source
    from ttq_jax.quant.widths import Width
    from ttq_jax.sampling import Sampling
    from ttq_jax.stream import Stream, stream

__all__ = [
    "PRESETS",
    "ClipSearch",
    "DraftCosts",
    "Error",
    "FunctionError",
    "Grid",
    "HalfQuadratic",
    "LowRankRule",
    "Model",
    "Nearest",
    "NoScale",
    "Observed",
    "PowerLaw",
    "Protocol",
    "Recipe",
    "Sampling",
    "SearchedAlpha",
    "SecondOrder",
    "Source",
    "Stream",
    "Width",
    "__version__",
    "acceptance",
    "calibrate",
    "cut_windows",
    "functional",
    "generate",
    "kernels",
    "load",
    "load_conversation",
    "load_messages",
    "load_offline",
    "load_packed",
    "load_recipe",
    "observe",
    "perplexity",
    "prepare",
    "preset",
    "quantize",
    "read",
    "read_corpus",
    "run",
    "save_conversation",
    "save_offline",
    "save_packed",
    "save_recipe",
    "static_factors",
    "stream",
    "time_answers",
    "with_settings",
]

# Imported at first use: `ttq --help` and a mistyped option must not wait for jax.
_HOME = {
    "PRESETS": "ttq_jax.quant.presets",
    "ClipSearch": "ttq_jax.quant.clip",
    "DraftCosts": "ttq_jax.draft_costs",
    "Error": "ttq_jax.errors",
    "FunctionError": "ttq_jax.functions",
    "Grid": "ttq_jax.quant.grid",
    "HalfQuadratic": "ttq_jax.quant.half_quadratic",
    "LowRankRule": "ttq_jax.quant.lowrank",
    "Model": "ttq_jax.checkpoint",
    "Nearest": "ttq_jax.quant.grid",
    "NoScale": "ttq_jax.quant.scaling",
    "Observed": "ttq_jax.functions",
    "PowerLaw": "ttq_jax.quant.scaling",
    "Protocol": "ttq_jax.evaluation.perplexity",
    "Recipe": "ttq_jax.quant.recipe",
    "Sampling": "ttq_jax.sampling",
    "SearchedAlpha": "ttq_jax.quant.scaling",
    "SecondOrder": "ttq_jax.quant.second_order",
    "Source": "ttq_jax.quant.source",
    "Stream": "ttq_jax.stream",
    "Width": "ttq_jax.quant.widths",
    "acceptance": "ttq_jax.evaluation.acceptance",
    "calibrate": "ttq_jax.offline.calibrate",
    "cut_windows": "ttq_jax.evaluation.corpora",
    "functional": "ttq_jax.functions",
    "generate": "ttq_jax.generate",
    "kernels": "ttq_jax.functions",
    "load": "ttq_jax.checkpoint",
    "load_conversation": "ttq_jax.checkpoint.store",
    "load_messages": "ttq_jax.checkpoint.store",
    "load_offline": "ttq_jax.checkpoint.store",
    "load_packed": "ttq_jax.checkpoint.packed_store",
    "load_recipe": "ttq_jax.quant.recipe_text",
    "observe": "ttq_jax.functions",
    "perplexity": "ttq_jax.evaluation.perplexity",
    "prepare": "ttq_jax.offline.calibrate",
    "preset": "ttq_jax.quant.presets",
    "quantize": "ttq_jax.functions",
    "read": "ttq_jax.functions",
    "read_corpus": "ttq_jax.evaluation.corpora",
    "run": "ttq_jax.functions",
    "save_conversation": "ttq_jax.checkpoint.store",
    "save_offline": "ttq_jax.checkpoint.store",
    "save_packed": "ttq_jax.checkpoint.packed_store",
    "save_recipe": "ttq_jax.quant.recipe_text",
    "static_factors": "ttq_jax.functions",
    "stream": "ttq_jax.stream",
    "time_answers": "ttq_jax.evaluation.timings",
    "with_settings": "ttq_jax.quant.recipe_text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `ttq_jax.generate` bound to the function, not to the module of the same name.

    On import Python binds a submodule to its package's attribute of that name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
