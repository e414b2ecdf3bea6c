"""JAX's attention in Triton: `attend`, simulated; compiled for GPUs; and when it is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compilers
from jax.sharding import AbstractMesh, use_abstract_mesh
from marks import slow_but
from small import small_config, small_params

from pallas_kernels.choice import Target
from pallas_kernels.gpu import triton
from ttq_jax.chips.absent import compile_for
from ttq_jax.mesh import make_mesh
from ttq_jax.models import decoder, prompt_attention, triton_attention
from ttq_jax.models.attention import attend
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.models.prompt_attention import FROM, refusal, serves_parts
from ttq_jax.models.triton_attention import attend_prompt
from ttq_jax.partition import on

FAR = np.iinfo(np.int32).max
L4 = Target(platform="gpu", chip="l4")
TRITON = "__gpu$xla.gpu.triton"


@pytest.mark.parametrize(
    ("width", "dtype", "near"), [(64, "float32", 1e-5), (80, "bfloat16", 0.02)]
)
def test_it_is_attention(width, dtype, near):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 384, 4, width)), dtype)
    k, v = (jnp.asarray(rng.normal(size=(2, 384, 2, width)), dtype) for _ in range(2))
    valid = np.ones((2, 384), bool)
    valid[0, :200], valid[1, -90:] = False, False
    positions = jnp.asarray(np.maximum(np.cumsum(valid, 1) - 1, 0), jnp.int32)
    want = attend(
        q, k, v, q_positions=positions, k_positions=positions, k_valid=jnp.asarray(valid),
        window=jnp.asarray(FAR, jnp.int32), scale=0.3, cap=None,
    )  # fmt: skip
    got = attend_prompt(q, k, v, jnp.asarray(valid), scale=0.3, interpret=True)
    assert got.dtype == q.dtype
    got, want = (np.asarray(each, np.float32) for each in (got, want))
    np.testing.assert_allclose(got[valid], want[valid], rtol=near, atol=near)
    assert np.isfinite(got).all()


def test_a_model_reads_its_prompt_with_it_on_a_mesh_too(monkeypatch):
    config = small_config(head_dim=64, n_heads=4, n_kv_heads=2, n_layers=1, vocab_size=96)
    params, calls = small_params(config), []
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 96, (2, 128)), jnp.int32)
    valid = np.ones((2, 128), bool)
    valid[0, :50] = False

    def simulated(q, *rest, scale):
        calls.append(q.shape)
        return attend_prompt(q, *rest, scale=scale, interpret=True)

    @jax.jit
    def read(params, tokens, valid):
        cache = empty_cache(config, 2, 130, jnp.float32)
        return forward(config, params, tokens, valid, cache, slots=128)[0]

    want = read(params, tokens, jnp.asarray(valid))
    monkeypatch.setattr(prompt_attention, "serves", lambda config, length, dtype: True)
    monkeypatch.setattr(prompt_attention, "current_target", lambda: L4)
    monkeypatch.setattr(triton_attention, "attend_prompt", simulated)
    with on(make_mesh({"data": 2, "model": 4}, config)):
        got = read(params, tokens, jnp.asarray(valid))
    assert calls == [(1, 128, 1, 64)]
    got, want = (np.asarray(each)[valid] for each in (got, want))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


COMPILED = [("l4", 128, "bfloat16"), ("a100", 64, "float16"), ("h100", 96, "bfloat16")]


@needs_compilers
@pytest.mark.parametrize(("chip", "width", "dtype"), slow_but(COMPILED, COMPILED[:1]))
def test_gpus_compile_it(chip, width, dtype):
    """A model that reads a prompt; a map over prompts, with JAX's wide integers."""
    config = small_config(n_heads=4, n_kv_heads=2, head_dim=width, n_layers=1)
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), shapes)
    tokens = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    valid = jax.ShapeDtypeStruct((2, 1024), jnp.bool_)

    def read(params, tokens, valid):
        batch = len(tokens)
        cache = empty_cache(config, batch, 1152, jnp.dtype(dtype))
        return forward(config, params, tokens, valid, cache, slots=1024)[0]

    def each(params, tokens, valid):
        one = lambda tokens, valid: read(params, tokens[None], valid[None])  # noqa: E731
        return jax.vmap(one)(tokens, valid)

    for run, wide in ((read, False), (each, True)):
        with jax.enable_x64(wide):
            text = compile_for(chip, run, shapes, tokens, valid).as_text()
        assert text.count(TRITON) == 1


def test_when_it_is_chosen(monkeypatch):
    config = partial(small_config, n_heads=4, n_kv_heads=2, head_dim=128)
    why = partial(refusal, config(), 4096, "bfloat16")
    for chip in ("a100", "l4", "h100", None):
        assert why(Target(platform="gpu", chip=chip)) is None
    assert "a T4 has 7.5" in why(Target(platform="gpu", chip="t4"))
    with use_abstract_mesh(AbstractMesh((4,), ("kv",))):
        assert "2 heads of k, which 4 devices cannot share" in why(L4)
    assert "512 tokens; from 1024 on" in refusal(config(), 512, "bfloat16", L4)
    assert refusal(config(), FROM, "float16", L4) is None
    assert "1100 tokens are no multiple of 128" in refusal(config(), 1100, "float16", L4)
    assert "float32 products, which the kernel would round" in refusal(
        config(), 4096, "float32", L4
    )
    assert "heads of 256; the kernel has 64" in refusal(config(head_dim=256), 4096, "bfloat16", L4)
    capped = config(attn_softcap=20.0)
    assert "a soft cap, which the kernel" in refusal(capped, 4096, "bfloat16", L4)
    slides = config(sliding_window=2048, sliding_layers=(True, False))
    assert "a sliding window of 2048 tokens, which" in refusal(slides, 4096, "bfloat16", L4)
    assert refusal(slides, 2048, "bfloat16", L4) is None
    monkeypatch.setattr(prompt_attention, "current_target", lambda: L4)
    assert not serves_parts(config(), 4096, 1024, "bfloat16")
    monkeypatch.setattr(triton_attention, "_attention", lambda: None)
    assert f"jax {jax.__version__} has no attention in Triton" in why(L4)
    monkeypatch.setattr(triton, "plgpu", None)
    assert "has no Pallas Triton backend" in why(L4)
