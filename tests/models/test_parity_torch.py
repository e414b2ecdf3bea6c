"""Logits of every family and variant, against transformers, from one saved checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import VARIANTS, VOCAB, write_checkpoint, write_tokenizer

from ttq_jax.checkpoint import load
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits

LENGTH, PREFILL = 12, 8


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    reference = write_checkpoint(directory, request.param)
    return reference, load(directory)


@pytest.fixture(scope="module")
def run(pair):
    config, params = pair[1].config, pair[1].params

    @jax.jit
    def step(tokens, valid, cache):
        hidden, cache, _ = forward(config, params, tokens, valid, cache)
        return logits(config, params, hidden), cache

    def whole(tokens, valid, prefill=LENGTH):
        """Logits of all tokens; those after `prefill` are read one by one from the cache."""
        cache = empty_cache(config, tokens.shape[0], LENGTH, jnp.float32)
        out, start = [], 0
        for stop in [prefill, *range(prefill + 1, LENGTH + 1)]:
            part, cache = step(tokens[:, start:stop], valid[:, start:stop], cache)
            out.append(part)
            start = stop
        return np.concatenate(out, axis=1)

    return whole


def rows(lengths=(LENGTH, LENGTH)):
    rng = np.random.default_rng(1)
    return [rng.integers(2, VOCAB, n) for n in lengths]


def reference_logits(model, row):
    with torch.no_grad():
        return model(torch.from_numpy(row[None])).logits[0].numpy()


def assert_close(ours, theirs):
    scale = np.abs(theirs).max()
    assert scale > 0.5
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * scale, rtol=0)


def padded(texts, side):
    tokens = np.full((len(texts), LENGTH), 7, np.int32)
    valid = np.zeros((len(texts), LENGTH), bool)
    for i, row in enumerate(texts):
        at = slice(0, len(row)) if side == "right" else slice(LENGTH - len(row), LENGTH)
        tokens[i, at], valid[i, at] = row, True
    return jnp.asarray(tokens), jnp.asarray(valid)


@pytest.mark.parametrize("prefill", [LENGTH, PREFILL])
def test_unpadded(pair, run, prefill):
    texts = rows()
    ours = run(*padded(texts, "right"), prefill)
    for row, got in zip(texts, ours, strict=True):
        assert_close(got, reference_logits(pair[0], row))


@pytest.mark.parametrize("prefill", [LENGTH, PREFILL])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(pair, run, side, prefill):
    texts = rows((LENGTH, 9))
    tokens, valid = padded(texts, side)
    ours = run(tokens, valid, prefill)
    for row, got, real in zip(texts, ours, np.asarray(valid), strict=True):
        assert_close(got[real], reference_logits(pair[0], row))


def test_sharded_files_hold_the_same_model(pair, tmp_path):
    reference, ours = pair
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    write_tokenizer(tmp_path)
    again = load(tmp_path)
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)
