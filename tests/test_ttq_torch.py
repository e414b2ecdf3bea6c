"""TTQ against an independent PyTorch fake-quant, written from the method's definition.

Nothing of the package is used on the PyTorch side: transformers runs the model, forward hooks see
each linear layer's input, and the weights are replaced by their quantized values.
"""

import copy
import warnings
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_models import write_checkpoint

import ttq_jax as ttq
from ttq_jax.checkpoint import ALIASES
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import empty_cache
from ttq_jax.perplexity import Protocol, score_window
from ttq_jax.prefill import prefill
from ttq_jax.quant.tree import static_factors
from ttq_jax.types import Offline, Prompts, kernels

GROUP, ALPHA, LAM = 32, 0.5, 0.4
NAMES = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v",
    "self_attn.o_proj": "o", "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip


def torch_round(w: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    """Group-wise quantize-dequantize of w[d_out, d_in] along d_in."""
    d_out, d_in = w.shape
    g = torch.nn.functional.pad(w, (0, -d_in % GROUP)).reshape(d_out, -1, GROUP)
    if symmetric:
        scale = g.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        q = torch.round(g / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        out = q * scale
    else:
        low, high = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero = -low / scale
        out = (torch.round(g / scale + zero).clamp(0, 2**bits - 1) - zero) * scale
    return out.reshape(d_out, -1)[:, :d_in]


def torch_ttq(w: torch.Tensor, x: torch.Tensor, bits: int, symmetric: bool, rank: int):
    """Q((W − BA) D) D⁻¹ + BA with D from the layer's inputs x[T, d_in]."""
    rms = x.square().mean(0).sqrt()
    d = (rms / rms.mean() + LAM) ** ALPHA
    low_rank = torch.zeros_like(w)
    if rank:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        low_rank = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return torch_round((w - low_rank) * d, bits, symmetric) / d + low_rank


def torch_quantize_model(model, tokens, **how) -> dict[tuple[int, str], np.ndarray]:
    """Replaces every block weight, each from the full-precision model's activations."""
    seen = {}

    def hook(name):
        return lambda module, args, out: seen.__setitem__(name, args[0][0].detach())

    layers = {
        (i, NAMES[n]): m
        for i, block in enumerate(model.model.layers)
        for n, m in block.named_modules()
        if n in NAMES
    }
    handles = [m.register_forward_hook(hook(key)) for key, m in layers.items()]
    with torch.no_grad():
        model(tokens)
        for handle in handles:
            handle.remove()
        for key, module in layers.items():
            module.weight.copy_(torch_ttq(module.weight, seen[key], **how))
    return {key: m.weight.detach().numpy().T for key, m in layers.items()}


def torch_nll(model, tokens) -> float:
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))


@partial(jax.jit, static_argnames=("config", "recipe"))
def jax_quantize_and_score(params, window, offline, *, config, recipe):
    """Ours: the matrices that the packed weights stand for, and the window's score."""
    cache = empty_cache(config, 1, len(window), jnp.float32)
    prompts = Prompts(window[None], jnp.ones((1, len(window)), bool))
    _, _, packed, _ = prefill(params, prompts, cache, config=config, recipe=recipe, offline=offline)
    nll = score_window(params, window, offline, config=config, recipe=recipe,
                       protocol=Protocol(kind="window", window=len(window)))  # fmt: skip
    return {n: dense_weight(k) for n, k in kernels(packed["layers"]).items()}, nll


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    reference = write_checkpoint(path, "llama-gqa-untied")
    return reference, ttq.load(str(path))


CASES = [(bits, symmetric, rank) for bits in (2, 3, 4, 5) for symmetric in (False, True)
         for rank in (0, 16)]  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric", "rank"), CASES)
def test_same_weights_and_same_perplexity(tiny, bits, symmetric, rank):
    reference, model = tiny
    recipe = ttq.preset("ttq", bits=bits, symmetric=symmetric, rank=rank, store_dtype="float32")
    offline = Offline(low_rank=static_factors(model.params, recipe))
    window = np.random.default_rng(0).integers(3, model.config.vocab_size, 96).astype(np.int32)
    tokens = torch.from_numpy(window.astype(np.int64))[None]

    quantized = copy.deepcopy(reference)
    want = torch_quantize_model(quantized, tokens, bits=bits, symmetric=symmetric, rank=rank)

    got, ours = jax_quantize_and_score(
        model.params, jnp.asarray(window), offline, config=model.config, recipe=recipe
    )
    assert {(i, n) for n in got for i in range(model.config.n_layers)} == set(want)
    for (i, name), w in want.items():
        # A tie may break the other way in float32: such a weight sits one step off, all others
        # agree to rounding.
        off = np.abs(np.asarray(got[name][i]) - w) > 2e-5 * np.abs(w).max()
        assert off.mean() < 1e-3, f"layer {i} {name}: {off.mean():.2%} of the weights differ"
        before = np.asarray(model.params["layers"][name]["kernel"][i])
        assert np.abs(w - before).max() > 1e-3 * np.abs(before).max(), "nothing was quantized"

    theirs = torch_nll(quantized, tokens)
    assert abs(np.exp((float(ours) - theirs) / 95) - 1) < 0.005


def test_same_perplexity_on_a_real_model():
    """SmolLM2 at 3 bits on a page of English, both sides starting from the same GGUF file."""
    path = ALIASES["smollm2"]()
    model = ttq.load("smollm2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries warn about
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        ).eval()
    recipe = ttq.preset("ttq", bits=3, store_dtype="float32")
    window = np.array(model.tokenizer.encode(topics["objects"])[:256], np.int32)
    tokens = torch.from_numpy(window.astype(np.int64))[None]
    plain = torch_nll(reference, tokens)
    want = torch_quantize_model(reference, tokens, bits=3, symmetric=False, rank=0)
    theirs = torch_nll(reference, tokens)
    got, ours = jax_quantize_and_score(
        model.params, jnp.asarray(window), Offline(), config=model.config, recipe=recipe
    )
    for (i, name), w in want.items():
        off = np.abs(np.asarray(got[name][i]) - w) > 1e-4 * np.abs(w).max()
        assert off.mean() < 1e-3, f"layer {i} {name}: {off.mean():.2%} of the weights differ"
    assert abs(np.exp((float(ours) - theirs) / 255) - 1) < 0.005
    assert np.exp((theirs - plain) / 255) > 1.1, "3 bits cost something"
