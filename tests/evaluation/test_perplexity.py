"""The two protocols: what they score, and what cannot influence it."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from small import small_config, small_params

from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.perplexity import Protocol, perplexity, score_window
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward, logits
from ttq_jax.offline.calibrate import calibrate, prepare
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.presets import preset
from ttq_jax.types import Offline

CONFIG = small_config()
PARAMS = small_params(CONFIG)
LETTERS = SimpleNamespace(vocab_size=97, bos_id=None)
MODEL = Model(config=CONFIG, params=PARAMS, tokenizer=LETTERS, name="small", eos_ids=())
WINDOWS = np.random.default_rng(0).integers(1, 97, (3, 48)).astype(np.int32)
CAUSAL = Protocol(kind="causal", window=48, prompt_tokens=20)
WINDOW = Protocol(kind="window", window=48)


def nll_by_hand(window):
    cache = empty_cache(CONFIG, 1, 48, jnp.float32)
    tokens = jnp.asarray(window)[None]
    hidden, _, _ = forward(CONFIG, PARAMS, tokens, jnp.ones((1, 48), bool), cache)
    z = np.asarray(logits(CONFIG, PARAMS, hidden)[0], np.float64)
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -logp[np.arange(47), window[1:]]


def test_unquantized_perplexity_is_token_weighted():
    each = np.stack([nll_by_hand(w) for w in WINDOWS])
    got = perplexity(MODEL, WINDOWS, recipe=None, protocol=WINDOW)
    np.testing.assert_allclose(got.perplexity, np.exp(each.mean()), rtol=1e-5)
    assert (got.windows, got.scored_tokens) == (3, 3 * 47)
    got = perplexity(MODEL, WINDOWS, recipe=None, protocol=CAUSAL)
    np.testing.assert_allclose(got.perplexity, np.exp(each[:, 19:].mean()), rtol=1e-5)
    assert got.scored_tokens == 3 * 28
    np.testing.assert_allclose(got.nll, each[:, 19:].sum(1), rtol=1e-5)


def scores(window, recipe, protocol):
    """Scores of growing prefixes of the scored part."""
    out = []
    for end in (protocol.prompt_tokens + 1, 26, 28):
        cut = Protocol(kind="causal", window=end, prompt_tokens=protocol.prompt_tokens)
        nll = score_window(PARAMS, jnp.asarray(window[:end]), Offline(), config=CONFIG,
                           recipe=recipe, protocol=cut)  # fmt: skip
        out.append(float(nll))
    return np.array(out)


@pytest.mark.parametrize("flavour", ["full", "quantized"])
def test_causal_protocol_never_looks_ahead(flavour):
    recipe = preset("ttq", bits=2, prefill=flavour)
    window, other = WINDOWS[0].copy(), WINDOWS[0].copy()
    other[26:] = (other[26:] + 7) % 97
    a, b = (scores(w, recipe, CAUSAL) for w in (window, other))
    np.testing.assert_array_equal(a[:2], b[:2])
    assert a[2] != b[2]
    # The weights do come from the prompt: change it and every score moves.
    other = window.copy()
    other[3] = (other[3] + 7) % 97
    assert np.abs(a - scores(other, recipe, CAUSAL)).min() > 0


def test_window_protocol_does_look_ahead():
    recipe = preset("ttq", bits=2)
    score = lambda w: float(score_window(PARAMS, jnp.asarray(w), Offline(), config=CONFIG,  # noqa: E731
                                         recipe=recipe, protocol=WINDOW))  # fmt: skip
    other = WINDOWS[0].copy()
    other[-1] = (other[-1] + 7) % 97
    # Only the last token's own score could differ if the weights did not see it.
    plain = [float(score_window(PARAMS, jnp.asarray(w), Offline(), config=CONFIG, recipe=None,
                                protocol=WINDOW)) for w in (WINDOWS[0], other)]  # fmt: skip
    assert abs((score(WINDOWS[0]) - score(other)) - (plain[0] - plain[1])) > 1e-3


EACH = [(name, kind) for name in ("rtn", "awq", "ttq") for kind in ("causal", "window")]
QUICK = [("rtn", "window"), ("awq", "window"), ("ttq", "causal")]


@pytest.mark.parametrize(("name", "kind"), slow_but(EACH, QUICK))
def test_eight_bits_lose_next_to_nothing_and_two_bits_much(name, kind):
    protocol = CAUSAL if kind == "causal" else WINDOW
    base = perplexity(MODEL, WINDOWS, recipe=None, protocol=protocol)
    gaps = []
    for bits in (2, 8):
        recipe = preset(name, bits=bits)
        offline = prepare(MODEL, recipe, WINDOWS)
        got = perplexity(MODEL, WINDOWS, recipe=recipe, offline=offline, protocol=protocol)
        gaps.append(np.abs(np.subtract(got.nll, base.nll)).mean() / protocol.scored)
    assert gaps[1] < 0.02
    assert gaps[0] > 5 * gaps[1]


def test_calibration_is_a_sum_over_windows():
    both = calibrate(MODEL, WINDOWS[:2], Reads((1.0, 2.0)))
    first, second = (calibrate(MODEL, WINDOWS[i : i + 1], Reads((1.0, 2.0))) for i in (0, 1))
    for site, moments in both.items():
        np.testing.assert_allclose(moments.sums, first[site].sums + second[site].sums, rtol=1e-5)
        assert moments.count.tolist() == [96] * CONFIG.n_layers


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"kind": "strided"}, "expected 'causal' or 'window'"),
        ({"window": 1}, "at least 2 tokens"),
        ({"window": 64, "prompt_tokens": 64}, "1 <= P < window"),
        ({"window": 64, "prompt_tokens": 0}, "P=0 and window=64"),
    ],
)
def test_bad_protocols_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        Protocol(**kwargs)


def test_bad_windows_are_refused():
    with pytest.raises(ConfigError, match="windows of 48 tokens, got 40"):
        perplexity(MODEL, WINDOWS[:, :40], recipe=None, protocol=CAUSAL)
    with pytest.raises(ConfigError, match="at least one window"):
        perplexity(MODEL, WINDOWS[:0], recipe=None, protocol=CAUSAL)
    with pytest.raises(ConfigError, match="context of 512"):
        long = np.zeros((1, 600), np.int32)
        perplexity(MODEL, long, recipe=None, protocol=Protocol(window=600))
    with pytest.raises(ConfigError, match="this recipe needs a calibration corpus"):
        perplexity(MODEL, WINDOWS, recipe=preset("awq"), protocol=CAUSAL)
