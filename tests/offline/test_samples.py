"""Text that a model writes itself, and the prior that is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_rows, small_config, small_params
from stores import made

from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.offline.calibrate import calibrate, observe_tokens, prepare
from ttq_jax.offline.samples import sample_windows
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import Source

CONFIG = small_config(n_layers=2)
MODEL = made(small_params(CONFIG), CONFIG)
SHORT = small_config(n_layers=1, max_positions=16)
ROWS, LENGTH = 64, 24


@pytest.fixture(scope="module")
def windows():
    return sample_windows(MODEL, rows=ROWS, length=LENGTH)


def test_windows_are_what_the_model_says_at_temperature_1(windows):
    assert windows.shape == (ROWS, LENGTH)
    assert windows.dtype == jnp.int32
    cache = empty_cache(CONFIG, ROWS, LENGTH, jnp.float32)
    valid = jnp.ones((ROWS, LENGTH), bool)
    hidden, _, _ = forward(CONFIG, MODEL.params, windows, valid, cache)
    said = np.asarray(jax.nn.log_softmax(logits(CONFIG, MODEL.params, hidden)), np.float64)[:, :-1]
    found = np.take_along_axis(said, np.asarray(windows)[:, 1:, None], axis=-1)
    # A draw's surprise is the entropy on average, its variance is known: independent of anything
    # the sampler computes.
    p = np.exp(said)
    mean = (p * said).sum(-1)
    variance = (p * said**2).sum(-1) - mean**2
    deviations = (found[..., 0] - mean).sum() / np.sqrt(variance.sum())
    assert abs(deviations) < 4
    # Another temperature would be seen: the distribution is far from flat and from greedy.
    assert np.sqrt(variance.sum()) < 0.05 * np.abs(mean - said.mean(-1)).sum()
    assert (np.asarray(windows)[:, 1:] != said.argmax(-1)).mean() > 0.2


def test_windows_begin_anywhere_and_are_the_same_every_time(windows):
    assert len(np.unique(windows[:, 0])) > ROWS / 3
    np.testing.assert_array_equal(windows, sample_windows(MODEL, rows=ROWS, length=LENGTH))
    other = sample_windows(MODEL, rows=ROWS, length=LENGTH, seed=1)
    assert (np.asarray(windows) != np.asarray(other)).mean() > 0.5


def test_windows_fit_the_context():
    model = made(small_params(SHORT), SHORT)
    assert sample_windows(model).shape == (8, 16)


def test_a_prior_from_samples_is_a_corpus_of_them():
    model = made(small_params(SHORT), SHORT)
    ours = Recipe(moments=Source(prior="samples", prior_tokens=64.0), select="layers/q")
    corpus = Recipe(moments=Source(prior="corpus", prior_tokens=64.0), select="layers/q")
    seen = []
    got = prepare(model, ours, progress=lambda done, total: seen.append((done, total)))
    wanted = prepare(model, corpus, np.asarray(sample_windows(model)))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert got.moments["attn_in"].count.tolist() == [8 * 16]
    assert seen == [(i, 8) for i in range(1, 9)]


def test_samples_are_read_as_any_text_is(windows):
    """The moments are sums over all tokens, whatever window they stand in."""
    reads = Recipe().reads
    moments = calibrate(MODEL, windows[:4], reads)
    pooled = observe_tokens(MODEL.params, windows[:4], config=CONFIG, reads=reads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moments, pooled)
    noise = jnp.asarray(random_rows([LENGTH] * 4), jnp.int32)
    other = observe_tokens(MODEL.params, noise, config=CONFIG, reads=reads)
    assert np.abs(other["mlp_out"].sums / pooled["mlp_out"].sums - 1).max() > 0.1
