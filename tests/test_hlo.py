"""What the compiled program does, read off its optimised HLO."""

import re

import jax
import jax.numpy as jnp
import pytest
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.generate import generate_tokens
from ttq_jax.quant.presets import preset
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, kernels

# Every projection gets a shape of its own, so that a shape names it.
CONFIG = small_config(d_model=48, embed_dim=48, n_heads=5, n_kv_heads=1, head_dim=16, d_ff=112)
PARAMS = small_params(CONFIG)
DENSE = {f"f32[{','.join(map(str, k.shape))}]" for k in kernels(PARAMS["layers"]).values()}


def compiled_text(recipe):
    prompts = prompts_of(random_rows([20]), 32)
    return generate_tokens.lower(
        PARAMS, prompts, Offline(), jax.random.key(0), jnp.asarray(8, jnp.int32),
        config=CONFIG, recipe=recipe, sampling=Sampling(), capacity=8, eos_ids=(0,),
    ).compile().as_text()  # fmt: skip


def loop_operands(text):
    """Types carried by the decode loop: the only while whose body contains another while."""
    bodies = {}
    name = None
    for line in text.splitlines():
        if m := re.match(r"%?([\w.\-]+) \(.*\{$", line.removeprefix("ENTRY ")):
            name = m[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    outer = [
        line
        for lines in bodies.values()
        for line in lines
        if (m := re.search(r" while\(.*body=%?([\w.\-]+)", line))
        and any(" while(" in inner for inner in bodies[m[1]])
    ]
    assert len(outer) == 1, "expected one decode loop with one layer scan inside"
    return set(re.findall(r"\w+\[[\d,]*\]", outer[0].split(" while(")[0]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_decode_loop_reads_only_packed_weights(bits):
    operands = loop_operands(compiled_text(preset("ttq", bits=bits, rank=0)))
    assert not operands & DENSE, "an unquantized block weight is an operand of the decode loop"
    # The codes are there at the width they claim: every weight's planes hold bits/8 bytes a code.
    widths = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}[bits]
    for kernel in kernels(PARAMS["layers"]).values():
        layers, d_in, d_out = kernel.shape
        padded = -(-d_in // 32) * 32
        for width in widths:
            assert f"u8[{layers},{padded * width // 8},{d_out}]" in operands


def test_the_check_sees_dense_weights_where_there_are_some():
    operands = loop_operands(compiled_text(preset("ttq", select="layers/down")))
    down = kernels(PARAMS["layers"])["down"]
    assert DENSE - operands == {f"f32[{','.join(map(str, down.shape))}]"}
