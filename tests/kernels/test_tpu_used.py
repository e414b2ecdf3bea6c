"""Where the target is a TPU, the kernels compute: nothing is left to XLA in silence."""

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers
from tpu_cases import (
    LAYER,
    check_packed,
    check_product,
    check_prompt_product,
    mixed_packed,
    mixed_rows,
    mixed_weight,
)

import pallas_kernels
from pallas_kernels import xla
from ttq_jax.chips.absent import compile_for

GROUP, K, N = 32, 128, 136
FUNCTIONS = ("packed_matmul", "dense_matmul", "quantize_pack", "prefill_quantize")


class XlaComputed(Exception):
    pass


@pytest.fixture
def no_xla(monkeypatch):
    """Whoever asks plain XLA to compute fails."""

    def fail(*_, **__):
        raise XlaComputed

    for name in FUNCTIONS:
        assert hasattr(xla, name)
        monkeypatch.setattr(xla, name, fail)


def calls(kind, implementation):
    """The three public calls, of ``(x, planes, scales, zeros, w, d)``."""
    rounding = {**kind, "implementation": implementation}
    reading = {name: rounding[name] for name in ("bits", "group_size", "implementation")}

    def multiply(x, packed, w, d):
        return pallas_kernels.packed_matmul(x, *packed, **reading, layer=LAYER)

    def quantize(x, packed, w, d):
        return pallas_kernels.quantize_pack(w, d, **rounding, layer=LAYER)

    def prefill(x, packed, w, d):
        return pallas_kernels.prefill_quantize(x, w, d, **rounding, layer=LAYER)

    return multiply, quantize, prefill


def inputs(m, kind):
    x = mixed_rows(m, m, K)
    codes, packed = mixed_packed(m, kind["bits"], GROUP, K, N)
    given = mixed_weight(m, K, N, bits=kind["bits"], group_size=GROUP, zero_point="float")
    return codes, given, (x, packed, given.w, given.channel_scale)


KIND = {"bits": 4, "group_size": GROUP, "zero_point": "float", "store_dtype": "bfloat16"}


@pytest.mark.parametrize("m", [3, 40])
def test_simulated_calls_need_nothing_of_xla(no_xla, m):
    codes, given, operands = inputs(m, KIND)
    x, packed = operands[:2]
    multiply, quantize, prefill = (jax.jit(f) for f in calls(KIND, "interpret"))
    check_product(multiply(*operands), x, codes, packed, bits=4, group_size=GROUP)
    check_packed(quantize(*operands), given, **KIND)
    y, got = prefill(*operands)
    check_packed(got, given, **KIND)
    check_prompt_product(y, x, given, got, bits=4, group_size=GROUP, quantized=False)
    # Under vmap too: of activations, and of layers.
    batch = jnp.stack([x, -x])
    many = jax.jit(jax.vmap(calls(KIND, "interpret")[0], (0, None, None, None)))(
        batch, *operands[1:]
    )
    for got, sign in zip(many, (1, -1), strict=True):
        check_product(got, x * jnp.asarray(sign, x.dtype), codes, packed, bits=4, group_size=GROUP)


@needs_compilers
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_choice_on_a_tpu_needs_nothing_of_xla(no_xla, chip):
    """None chooses the kernel, up to the rows at which `packed_matmul` unpacks by intent."""
    for m in (1, 60):
        _, _, operands = inputs(m, KIND)
        for f, name in zip(calls(KIND, None), FUNCTIONS[:1] + FUNCTIONS[2:], strict=True):
            text = compile_for(chip, f, *operands).as_text()
            assert text.count('custom_call_target="tpu_custom_call"') == 1
            assert name in text


@needs_compilers
def test_what_the_kernel_refuses_is_what_reaches_xla(no_xla):
    """The alarm rings: these tests would see it."""
    _, _, operands = inputs(3, KIND)
    for f in calls(KIND, "xla"):
        with pytest.raises(XlaComputed):
            f(*operands)
    refused = {**KIND, "group_size": 16}
    x, w = operands[0], operands[2]
    with pytest.raises(XlaComputed):
        compile_for(
            "v5e", lambda x, w: pallas_kernels.prefill_quantize(x, w, **refused, layer=LAYER), x, w
        )
