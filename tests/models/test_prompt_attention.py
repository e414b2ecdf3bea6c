"""The kernel for prompts against `attend`, simulated; compiled for TPUs; and when it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import needs_compilers
from jax.sharding import AbstractMesh, use_abstract_mesh
from small import small_config, small_params

from pallas_kernels.choice import Target
from ttq_jax.chips.absent import compile_for
from ttq_jax.chips.slices import collectives, compile_on_slice
from ttq_jax.mesh import make_mesh
from ttq_jax.models import decoder, prompt_attention
from ttq_jax.models.attention import attend
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.models.prompt_attention import FROM, attend_part_by_kernel, attend_prompt, refusal
from ttq_jax.partition import on
from ttq_jax.prefill import reading
from ttq_jax.quant.presets import preset

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


@pytest.mark.parametrize(
    ("sizes", "batch"),
    [({"data": 2, "model": 4}, 2), ({"model": 2}, 1), ({"data": 4}, 2)],
    ids=["copies of key-value heads", "heads", "prompts that are not dealt out"],
)
def test_every_device_of_a_mesh_has_its_own_heads(sizes, batch):
    """Of a whole prompt, in a layer with a window, and of a part."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(batch, 256, 4, 64)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(batch, 256, 2, 64)), jnp.float32) for _ in range(2))
    valid = np.ones((batch, 256), bool)
    valid[0, :70] = False
    how = {"scale": 0.3, "cap": None, "block": 128, "interpret": True}

    @jax.jit
    def mixed(q, k, v, valid, window):
        whole = attend_prompt(q, k, v, valid=valid, window=window, windows=(50, FAR), **how)
        parts = attend_part_by_kernel(q, k, v, valid=valid, k_valid=valid, own=False, **how)
        return whole, *parts

    operands = q, k, v, jnp.asarray(valid), jnp.asarray(50, jnp.int32)
    want = jax.device_get(mixed(*operands))
    with on(make_mesh(sizes, small_config(n_heads=4, n_kv_heads=2, vocab_size=96))):
        got = mixed(*operands)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), want)
    share = got[0].sharding.shard_shape(got[0].shape)
    data = sizes.get("data", 1)
    assert share == (batch // data or batch, 256, 4 // sizes.get("model", 1), 64)


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
    monkeypatch.setattr(prompt_attention, "serves", lambda config, length, dtype: True)
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


@pytest.mark.slow
@needs_compilers
def test_tpus_compile_it_under_every_switch():
    """Mosaic has no 64-bit integers, and refuses more than one pass over bfloat16."""
    config = small_config(
        n_heads=4, n_kv_heads=2, head_dim=128, sliding_window=512, sliding_layers=(True, False)
    )
    shapes = jax.eval_shape(lambda key: decoder.init_params(config, key), jax.random.key(0))
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16), shapes)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    valid = jax.ShapeDtypeStruct((1, 2048), jnp.bool_)

    def read(params, tokens, valid):
        cache = empty_cache(config, 1, 2176, jnp.bfloat16)
        return forward(config, params, tokens, valid, cache, slots=2048)[0]

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        text = compile_for("v5e", read, shapes, tokens, valid).as_text()
    assert "splash" in text


SLICES = {
    "prompts": ({"data": 2, "model": 2}, {"batch": 2}),
    "parts": ({"model": 4}, {"prompt_tokens": 2048, "prefill_chunk": 1024}),
}


@pytest.mark.slow
@needs_compilers
@pytest.mark.parametrize("case", SLICES)
def test_a_slice_of_tpus_runs_it_without_gathering(case):
    sizes, how = SLICES[case]
    config = small_config(
        n_heads=8, n_kv_heads=2, head_dim=128, embed_dim=256, d_ff=512, vocab_size=512
    )
    recipe = preset("ttq", group_size=128)
    compiled = compile_on_slice(
        config, "v5e:2x2", sizes, recipe, new_tokens=8, **{"prompt_tokens": 1024} | how
    )
    text = compiled.as_text()
    own = 8 // sizes["model"]
    calls = [line for line in text.splitlines() if "splash" in line and " custom-call(" in line]
    assert calls
    assert all(f"[{own},1024,128]" in line for line in calls), "a device's own heads"
    said = collectives(text)
    layer = said["prompt's layer"] or said["once"]
    assert all(one.endswith(" all-reduce") for one in layer), layer


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
    of = {width: small_config(head_dim=width, n_heads=4, n_kv_heads=2) for width in (64, 80, 128)}
    assert refusal(of[128], FROM, "float32", v5e) is None
    assert refusal(of[64], 32768, "float32", v5e) is None
    assert "kernels run on TPUs and GPUs, this is a CPU" in refusal(
        of[128], 4096, "float32", Target(platform="cpu")
    )
    assert "heads of 80; the kernel has 64, 128, 256" in refusal(of[80], 4096, "float32", v5e)
    assert "512 tokens; from 1024 on" in refusal(of[128], 512, "float32", v5e)
    assert "1536 tokens are no multiple of 1024" in refusal(of[128], 1536, "float32", v5e)
    with use_abstract_mesh(AbstractMesh((2, 2, 2), ("data", "kv", "rep"))):
        assert refusal(of[128], 4096, "float32", v5e) is None
    with use_abstract_mesh(AbstractMesh((3, 2), ("data", "rep"))):
        assert refusal(of[128], 4096, "float32", v5e) is None
    with use_abstract_mesh(AbstractMesh((4,), ("kv",))):
        assert "2 heads of k, which 4 devices cannot share" in refusal(
            of[128], 4096, "float32", v5e
        )
    assert prompt_attention.serves(of[128], 4096, "float32") is False
