"""Quantized weights and perplexities against the independent PyTorch ones, matrix by matrix.

Nothing of the package is used on the PyTorch side, `experiments/torch_quantizers.py`: transformers
runs the model, hooks see each linear layer's input, the weights are replaced by their quantized
values.
"""

import ast
import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint

import ttq_jax as ttq
from ttq_jax.evaluation.perplexity import Protocol, score_window
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.offline.calibrate import prepare
from ttq_jax.prefill import prefill
from ttq_jax.types import Prompts, kernels

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import torch_quantizers  # noqa: E402
from torch_quantizers import FakeQuantized, Rule, linears, score  # noqa: E402

NAMES = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
PROMPT = 64
RULES = {
    "rtn": ("rtn", Rule(scale="none", bits=3)),
    "awq": ("awq", Rule(scale="searched", bits=3)),
    "ttq": ("ttq", Rule(scale="power_law", bits=3)),
}


def as_torch(tokens) -> torch.Tensor:
    return torch.from_numpy(np.asarray(tokens).astype(np.int64))


def weights_of(model) -> dict[tuple[int, str], np.ndarray]:
    """Our name and form of a transformers model's matrices."""
    return {(i, NAMES[n]): m.weight.detach().numpy().T for (i, n), m in linears(model).items()}


@partial(jax.jit, static_argnames=("config", "recipe", "protocol"))
def jax_quantize_and_score(params, window, offline, *, config, recipe, protocol):
    """Ours: the matrices that the packed weights stand for, and the window's score."""
    length = protocol.prompt_tokens if protocol.kind == "causal" else protocol.window
    cache = empty_cache(config, 1, length, jnp.float32)
    prompts = Prompts(window[None, :length], jnp.ones((1, length), bool))
    _, _, packed, *_ = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline
    )
    nll = score_window(params, window, offline, config=config, recipe=recipe, protocol=protocol)
    return {n: dense_weight(k) for n, k in kernels(packed["layers"]).items()}, nll


def check_same(model, reference, method, rule, window, protocol, calibration=None):
    """The same weights, but for a rare tie, and the same score; returns both scores."""
    prompt = protocol.prompt_tokens if protocol.kind == "causal" else None
    pair = FakeQuantized(reference)
    pair.prepare(rule, None if calibration is None else as_torch(calibration))
    theirs = pair.score(as_torch(window), prompt)
    recipe = ttq.preset(
        method, bits=rule.bits, group_size=rule.group_size, symmetric=rule.symmetric,
        rank=rule.rank, store_dtype="float32",
        scales={0: "float", 8: "coded", 4: "coded4"}[rule.coded],
    )  # fmt: skip
    got, ours = jax_quantize_and_score(
        model.params, jnp.asarray(window), prepare(model, recipe, calibration),
        config=model.config, recipe=recipe, protocol=protocol,
    )  # fmt: skip
    want, before = weights_of(pair.copy), weights_of(reference)
    assert {(i, n) for n in got for i in range(model.config.n_layers)} == set(want)
    for (i, name), w in want.items():
        # A tie may break the other way in float32: such a weight sits one step off, all others
        # agree to rounding.
        off = np.abs(np.asarray(got[name][i]) - w) > 1e-4 * np.abs(w).max()
        assert off.mean() < 1e-3, f"layer {i} {name}: {off.mean():.2%} of the weights differ"
        moved = np.abs(w - before[i, name]).max() > 1e-3 * np.abs(w).max()
        assert moved, f"layer {i} {name}: nothing was quantized"
    assert abs(np.exp((float(ours) - theirs) / protocol.scored) - 1) < 0.005
    return float(ours), theirs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    reference = write_checkpoint(path, "llama-gqa-untied")
    return ttq.load(str(path)), reference


def tokens_of(model, *shape, seed=0):
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, shape).astype(np.int32)


# Every width on both kinds of grid; each width, and each kind, with and without a low rank.
CASES = [
    (bits, symmetric, 16 * ((bits + symmetric) % 2))
    for bits in (2, 3, 4, 5) for symmetric in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric", "rank"), CASES)
def test_same_weights_and_same_perplexity(tiny, bits, symmetric, rank):
    rule = Rule(scale="power_law", bits=bits, symmetric=symmetric, rank=rank)
    protocol = Protocol(kind="window", window=96)
    check_same(*tiny, "ttq", rule, tokens_of(tiny[0], 96), protocol)


# 96 input channels of one projection do not fill two groups of 64.
METHODS = [
    ("rtn", "window", -1, {}),
    ("rtn", "causal", 32, {"coded": 8, "symmetric": True}),
    ("awq", "causal", 64, {"coded": 8}),
    ("awq", "window", 32, {}),
    ("ttq", "causal", 32, {"coded": 4}),
]


@pytest.mark.parametrize(("name", "kind", "group_size", "stored"), METHODS)
def test_methods_protocols_and_groups(tiny, name, kind, group_size, stored):
    method, rule = RULES[name]
    rule = dataclasses.replace(rule, group_size=group_size, **stored)
    calibration = tokens_of(tiny[0], 2, 64, seed=1) if name == "awq" else None
    protocol = Protocol(kind=kind, window=96, prompt_tokens=PROMPT)
    check_same(*tiny, method, rule, tokens_of(tiny[0], 96), protocol, calibration)


def test_one_scored_token(tiny):
    protocol = Protocol(kind="causal", window=PROMPT + 1, prompt_tokens=PROMPT)
    method, rule = RULES["rtn"]
    ours, theirs = check_same(*tiny, method, rule, tokens_of(tiny[0], PROMPT + 1), protocol)
    # It is predicted by the unquantized reading of the prompt.
    assert theirs == pytest.approx(ours, rel=1e-4)


def test_the_prompt_decides_the_weights_and_later_tokens_do_not(tiny):
    model, reference = tiny
    window, pair = tokens_of(model, 96), FakeQuantized(reference)
    pair.prepare(RULES["ttq"][1])
    other = np.concatenate([window[:PROMPT], tokens_of(model, 32, seed=5)])

    def weights(tokens, prompt):
        pair.score(as_torch(tokens), prompt)
        return np.concatenate([w.ravel() for w in weights_of(pair.copy).values()])

    np.testing.assert_array_equal(weights(window, PROMPT), weights(other, PROMPT))
    assert np.any(weights(window, None) != weights(other, None))


def test_the_prompt_is_read_by_the_dense_model_and_the_rest_by_the_quantized(tiny):
    """A scorer that is the dense model itself gives the plain likelihood of the same tokens."""
    model, reference = tiny
    tokens = as_torch(tokens_of(model, 96))
    with torch.no_grad():
        logits = reference(tokens[None]).logits[0]
    want = torch.nn.functional.cross_entropy(
        logits[PROMPT - 1 : -1], tokens[PROMPT:], reduction="sum"
    )
    got = score(reference, tokens, PROMPT, lambda _: reference)
    assert got == pytest.approx(float(want), rel=1e-5)


def test_a_group_of_zeros_stays_zero():
    w = torch.zeros(2, 64)
    w[0, :32] = torch.linspace(-1, 1, 32)
    for symmetric in (False, True):
        out = torch_quantizers.round_groups(w, Rule(scale="none", bits=3, symmetric=symmetric))
        assert torch.isfinite(out).all()
        assert not out[1].any() and not out[0, 32:].any() and out[0, :32].any()


def test_awq_needs_a_corpus(tiny):
    with pytest.raises(ValueError, match="calibration"):
        FakeQuantized(tiny[1]).prepare(RULES["awq"][1])


def test_the_pytorch_side_is_independent():
    tree = ast.parse((EXPERIMENTS / "torch_quantizers.py").read_text())
    imported = {
        n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= {
        *sys.stdlib_module_names, "torch", "transformers",
    }  # fmt: skip
