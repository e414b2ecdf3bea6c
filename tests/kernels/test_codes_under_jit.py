"""Codes are chosen from the scales and zero points that are stored, as users compile it.

XLA drops a conversion to a narrower type and back. Codes would then be chosen from what was never
stored: at 8 bits every fifth one would be another. Each check compiles with XLA's default flags, in
a process of its own, as this one compiles without optimizing, see `compilers.QUICK`.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from marks import slow_but
from packed_weights import EPS, stored_grid

from pallas_kernels import grid, quantize_pack, reference
from pallas_kernels.gpu import quantize_pack as triton
from pallas_kernels.layout import PLANES, unpack
from pallas_kernels.problem import rounding_problem
from pallas_kernels.tpu import quantize_pack as mosaic
from pallas_kernels.tpu import refit
from pallas_kernels.tpu.activations import split3

K, N, GROUP = 128, 128, 32
KINDS = [
    {"zero_point": zero_point, "scales": scales, "shrinks": shrinks}
    for zero_point in grid.ZERO_POINTS
    for scales in grid.SCALES
    for shrinks in ((1.0,), (1.0, 0.9, 0.8))
    if scales != "coded4" or zero_point == "float"
]


def operands():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_t(5, size=(K, N)), jnp.float32)
    return w, jnp.asarray(np.exp(0.3 * rng.normal(size=K)), jnp.float32)


def check(got, bits, **kind):
    """The oracle's, but for codes of weights midway between two, up to float32's rounding."""
    w, d = operands()
    problem = rounding_problem(w, d, bits=bits, group_size=GROUP, store_dtype="bfloat16", **kind)
    with jax.disable_jit():
        want = reference.quantize_pack(w, d, problem=problem)
    for one, other in zip(jax.tree.leaves(got[1:]), jax.tree.leaves(want[1:]), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=f"{bits} {kind}")
    s, z = stored_grid(*want[1:], bits)
    s, z = (
        np.repeat(a, GROUP, 0) for a in (s, np.full_like(s, 2 ** (bits - 1)) if z is None else z)
    )
    target = np.asarray(w, np.float64) * np.asarray(d, np.float64)[:, None]
    value = target / s + z
    slack = EPS * (4 * np.abs(target / s) + np.abs(value))
    tie = np.abs(value - np.floor(value) - 0.5) <= slack
    differ = np.asarray(unpack(got[0], bits=bits)) != np.asarray(unpack(want[0], bits=bits))
    assert not np.any(differ & ~tie), f"{bits} {kind}: {np.sum(differ & ~tie)} codes differ"


def check_xla(widths=PLANES, coded=grid.SCALES):
    """All kinds of a width in one program: that is compiled once."""
    for bits in sorted(widths):
        kinds = [kind for kind in KINDS if kind["scales"] in coded]
        kinds = [kind for kind in kinds if bits < 8 or kind["scales"] != "coded4"]

        @jax.jit
        def every(w, d, bits=bits, kinds=kinds):
            call = functools.partial(
                quantize_pack, bits=bits, group_size=GROUP, store_dtype="bfloat16"
            )
            return [call(w, d, **kind) for kind in kinds]

        for got, kind in zip(every(*operands()), kinds, strict=True):
            check(got, bits, **kind)


def check_simulated():
    """The kernels for TPUs and GPUs; each of the grid's roundings occurs in both."""
    w, d = operands()
    # The same conversions, and the product of a split number: nothing of it is lost.
    parts = jax.jit(split3)(w)
    np.testing.assert_array_equal(sum(np.asarray(p, np.float64) for p in parts), np.asarray(w))
    tpu = functools.partial(mosaic.quantize_pack, interpret=pltpu.InterpretParams())
    gpu = functools.partial(triton.quantize_pack, interpret=True)
    for bits, at in ((8, 4), (5, 6), (4, 0), (3, 9)):
        kind = KINDS[at]
        problem = rounding_problem(
            w, d, bits=bits, group_size=GROUP, store_dtype="bfloat16", **kind
        )
        for kernel in (tpu, gpu):
            run = jax.jit(functools.partial(kernel, problem=problem))
            check(run(w[None], d, None, None, jnp.zeros((), jnp.int32)), bits, **kind)


CHECKS = {
    # Of 8 bits most would differ, and pairs of four bits have a form of their own.
    "some": "check_xla([8]); t.check_xla([3], ['coded4'])",
    "all": "check_xla()",
    "simulated": "check_simulated()",
}


@pytest.mark.parametrize("what", slow_but(CHECKS, ["some"]))
def test_codes_chosen_under_jit_are_the_oracles(what):
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, here.parents[1])))
    program = f"import test_codes_under_jit as t\nt.{CHECKS[what]}\n"
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=True
    )


@pytest.mark.parametrize("stored", [grid.as_stored, refit.as_stored])
def test_rounding_to_bfloat16_is_the_conversions(stored):
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    # Ties to even, both signs, and the largest that stay finite.
    words[:64] = words[:64] & 0xFFFF0000 | 0x8000
    words[64:68] = 0x7F7F7FFF, 0xFF7F7FFF, 0, 0x80000000
    x = words.view(np.float32)
    # Scales and zero points are no numbers so small that a machine may flush them.
    x = x[np.isfinite(x) & ((np.abs(x) >= 2.0**-120) | (x == 0)) & (np.abs(x) < 2.0**127)]
    got = jax.jit(functools.partial(stored, dtype="bfloat16"))(jnp.asarray(x))
    want = x.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), want.view(np.uint32))
