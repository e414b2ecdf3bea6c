"""Small stores of every kind, and what is said of them."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.checkpoint import CheckpointError
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.store import (
    StoreError,
)
from ttq_jax.generate import generate_tokens
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import first_turn
from ttq_jax.quant.lowrank import LowRankRule, stored_factors
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline

CONFIG = small_config(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=48, embed_dim=32)


def made(params, config=CONFIG, name="tiny"):
    return Model(
        config=config, params=params, name=name, eos_ids=(),
        tokenizer=SimpleNamespace(
            vocab_size=97, bos_id=None, encode=lambda text, **_: [ord(c) % 97 for c in text],
            continuation=lambda _, new: " ".join(map(str, new)),
        ),
    )  # fmt: skip


MODEL = made(small_params(CONFIG))
MIXED = dataclasses.replace(CONFIG, n_experts=4, experts_per_token=2)
MIXTURE = made(small_params(MIXED), MIXED, "mixture")
WINDOWS = np.asarray(random_rows([24, 24], seed=5), np.int32)
PROMPT = prompts_of(random_rows([11]), 16)
LATER = prompts_of(random_rows([7], seed=3), 16)

# Nearly all the time here is XLA's, compiling `generate_tokens`: few projections, and few recipes
# that are decoded with, which the cases share where they can.
FEW = "layers/(q|down)"
RTN = preset("rtn", bits=3, group_size=16, select=FEW)
INT8 = LowRankRule(rank=4, store="int8")
CORPUS = Source(prior="corpus", prior_tokens=64.0)
CHAT = Recipe(
    moments=dataclasses.replace(CORPUS, decay=0.5), low_rank=INT8, select="layers/q"
)  # fmt: skip
ROUNDING = SecondOrder(steps=2, span=16)


def decoded(recipe, offline, prompt=PROMPT, model=MODEL):
    """(Tokens, moments) of the one program."""
    # Of a packed tree's recipe nothing is read: without it, trees of one form share a program.
    recipe = recipe if offline.packed is None else None
    if recipe and recipe.source.decay and not offline.carried:
        begin = first_turn(model.params, model.config, recipe)
        offline = dataclasses.replace(offline, carried=begin)
    out, _, _, moments, *_ = generate_tokens(
        model.params, prompt, offline, jax.random.key(0), jnp.asarray(6, jnp.int32),
        config=model.config, recipe=recipe, sampling=Sampling(), capacity=6, eos_ids=(),
    )  # fmt: skip
    return np.asarray(out).tolist(), moments


def same_bits(a, b) -> bool:
    """Whether two trees are the same in structure, static fields, types, shapes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes())
        for x, y in leaves
    )


CASES = {
    "rtn": RTN,
    "gptq": preset("gptq", bits=3, group_size=16, select=FEW),
    "awq, widths": preset(
        "awq", bits=3, group_size=16, select=FEW, scales="coded",
        widths=(Width(select="layers/1/down", bits=2),),
    ),
    "factors": preset("ttq", rank=4, group_size=16, select="layers/q"),
    "prior, int8 factors": CHAT,
    "gram": Recipe(moments=CORPUS, rounding=ROUNDING, select="layers/q"),
    "prior from weights": Recipe(moments=Source(prior="weights", prior_tokens=8.0)),
    "prior from samples": Recipe(
        moments=Source(prior="samples", prior_tokens=8.0), rounding=ROUNDING, select="layers/q",
        low_rank=LowRankRule(mean=True),
    ),
    "weighted factors": Recipe(
        moments=CORPUS, low_rank=LowRankRule(rank=4, weighted=True), select="layers/q"
    ),
    "packed int8 factors": dataclasses.replace(RTN, low_rank=INT8),
    "everything, symmetric": preset("rtn", bits=5, group_size=16, symmetric=True),
    "integer zero points": preset("rtn", zero_point="integer", select=FEW),
    "coded in four bits": preset(
        "rtn", scales="coded4", group_size=16, select=FEW,
        widths=(Width(select="layers/1/down", bits=2),),
    ),
    "coded, symmetric": preset("rtn", scales="coded", symmetric=True, select=FEW),
}  # fmt: skip
DECODED = ("rtn", "gptq", "awq, widths", "factors", "prior, int8 factors")


@cache
def offline_of(case: str) -> Offline:
    recipe = CASES[case]
    offline = prepare(MODEL, recipe, WINDOWS)
    if recipe.low_rank.store != "int8" or not offline.low_rank:
        return offline
    # As a packed weight keeps them, with scales.
    kept = {n: stored_factors(f, INT8, "bfloat16") for n, f in offline.low_rank.items()}
    return dataclasses.replace(offline, low_rank=kept)


def refused(pattern, load, *args, **kwargs):
    with pytest.raises(StoreError, match=pattern) as caught:
        load(*args, **kwargs)
    assert isinstance(caught.value, CheckpointError)
    assert "\n" not in str(caught.value)


def changed(value, **changes):
    return dataclasses.replace(value, **changes)
