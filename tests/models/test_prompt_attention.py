"""The kernel for prompts against `attend`, simulated; compiled for TPUs; and when it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compilers
from small import small_config, small_params

from pallas_kernels.choice import Target
from ttq_jax.chips.absent import compile_for
from ttq_jax.models import decoder, prompt_attention
from ttq_jax.models.attention import attend
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.models.prompt_attention import FROM, attend_prompt, refusal
from ttq_jax.prefill import reading

FAR = np.iinfo(np.int32).max


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("window", [FAR, 150])
def test_it_is_attention(window, cap):
    """In blocks of 128: a triangle of them, and with the window a band."""
    rng = np.random.default_rng(0)
    length, windows = 512, (150, FAR)
    q = jnp.asarray(rng.normal(size=(2, length, 4, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(2, length, 2, 64)), jnp.float32) for _ in range(2))
    valid = np.ones((2, length), bool)
    valid[0, :200], valid[1, -90:] = False, False
    positions = jnp.asarray(np.maximum(np.cumsum(valid, 1) - 1, 0), jnp.int32)
    how = {"window": jnp.asarray(window, jnp.int32), "scale": 0.3, "cap": cap}
    want = attend(
        q, k, v, q_positions=positions, k_positions=positions, k_valid=jnp.asarray(valid), **how
    )
    got = attend_prompt(
        q, k, v, valid=jnp.asarray(valid), windows=windows, block=128, interpret=True, **how
    )
    np.testing.assert_allclose(np.asarray(got)[valid], np.asarray(want)[valid], atol=1e-5)
    assert np.isfinite(np.asarray(got)).all()


def test_a_model_reads_its_prompt_with_it(monkeypatch):
    config = small_config(
        head_dim=64, sliding_window=40, sliding_layers=(True, False), attn_softcap=20.0
    )
    params, calls = small_params(config), []
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 97, (2, 128)), jnp.int32)
    valid = np.ones((2, 128), bool)
    valid[0, :50] = False

    def simulated(*args, **how):
        calls.append(how["windows"])
        return attend_prompt(*args, **how, block=128, interpret=True)

    def read(capacity):
        cache = empty_cache(config, 2, capacity, jnp.float32)
        return forward(config, params, tokens, jnp.asarray(valid), cache, slots=128)

    want, filled, _ = read(130)
    monkeypatch.setattr(prompt_attention, "serves", lambda length, head_dim: True)
    monkeypatch.setattr(prompt_attention, "attend_prompt", simulated)
    got, cache, _ = read(130)
    assert calls == [(40, FAR)], "one call serves every layer of the scan"
    np.testing.assert_allclose(
        np.asarray(got)[valid], np.asarray(want)[valid], rtol=1e-4, atol=1e-4
    )
    keys, others = (np.asarray(each.k)[:, :, :128][:, valid] for each in (cache, filled))
    np.testing.assert_allclose(keys, others, rtol=1e-4, atol=1e-4)
    one = jnp.ones((2, 1), bool)
    forward(config, params, tokens[:, :1], one, cache)
    assert len(calls) == 1, "what follows a prompt sees the cache"


@needs_compilers
def test_tpus_compile_it():
    config = small_config(
        n_heads=4, n_kv_heads=2, head_dim=128, sliding_window=512, sliding_layers=(True, False)
    )
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, 2048), jnp.bool_)

    def read(params, tokens, valid):
        cache = empty_cache(config, 1, 2176, jnp.float32)
        return forward(config, params, tokens, valid, cache, slots=2048)[0]

    text = compile_for("v5e", read, shapes, tokens, valid).as_text()
    assert "splash" in text


@pytest.mark.slow
@needs_compilers
def test_tpus_compile_it_for_a_prompt_in_parts():
    config = small_config(n_heads=4, n_kv_heads=2, head_dim=128)
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, 2048), jnp.bool_)

    def read(params, tokens, valid):
        cache, chunks = empty_cache(config, 1, 2176, "int8"), reading(1024, 2048)
        return forward(config, params, tokens, valid, cache, slots=2048, chunks=chunks)[0]

    assert "splash" in compile_for("v5e", read, shapes, tokens, valid).as_text()


def test_when_it_is_chosen():
    v5e = Target(platform="tpu", chip="v5e")
    assert refusal(FROM, 128, v5e) is None
    assert refusal(32768, 64, v5e) is None
    assert "runs on TPUs, this is a CPU" in refusal(4096, 128, Target(platform="cpu"))
    assert "heads of 80; the kernel has 64, 128, 256" in refusal(4096, 80, v5e)
    assert "512 tokens; from 1024 on" in refusal(512, 128, v5e)
    assert "1536 tokens are no multiple of 1024" in refusal(1536, 128, v5e)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("model",))):
        assert "a mesh cannot cut" in refusal(4096, 128, v5e)
    assert prompt_attention.serves(4096, 128) is False
