"""The door to Pallas' Triton backend: jax's warning stays outside, and a jax without it works."""

import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers
from jax.experimental import pallas as pl

from pallas_kernels.choice import KERNELS, Problem, Target, choose
from pallas_kernels.gpu import triton
from ttq_jax.chips.absent import compile_for

GPUS = ("a100", "l4", "h100", None)


def problem(kernel, **changes):
    facts = {
        "m": 0 if kernel == "quantize_pack" else 1, "d_in": 4096, "n": 4096, "bits": 4,
        "group_size": 128, "zero_point": "float", "dtype": "bfloat16",
        "shrinks": () if kernel == "packed_matmul" else (1.0,),
    }  # fmt: skip
    return Problem(kernel=kernel, **(facts | changes))


def double(x_ref, y_ref):
    y_ref[...] = x_ref[...] + x_ref[...]


OUT = jax.ShapeDtypeStruct((128,), jnp.float32)


def heard_while_compiling(pallas_call):
    call = pallas_call(
        double, interpret=False, out_shape=OUT, compiler_params=triton.plgpu.CompilerParams()
    )
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        text = compile_for("l4", call, OUT).as_text()
        assert warnings.filters == before
    assert "__gpu$xla.gpu.triton" in text
    return [str(warning.message) for warning in heard]


@needs_compilers
def test_the_one_warning_of_this_jax_is_not_heard():
    said = heard_while_compiling(pl.pallas_call)
    assert len(said) == (0 if triton.NOTICE is None else 1)
    assert all(text.startswith("The Pallas Triton backend is deprecated") for text in said)
    assert heard_while_compiling(triton.pallas_call) == []


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chip", GPUS)
def test_without_the_backend_another_serves_and_the_choice_says_why(kernel, chip, monkeypatch):
    monkeypatch.setattr(triton, "plgpu", None)
    target = Target(platform="gpu", chip=chip)
    made = choose(problem(kernel), target)
    hopper = kernel == "packed_matmul" and chip == "h100"
    assert made.implementation == ("mosaic_gpu" if hopper else "xla")
    assert made.fallback != hopper
    assert f"triton: jax {jax.__version__} has no Pallas Triton backend" in made.reason
    with pytest.raises(ValueError, match="has no Pallas Triton backend") as caught:
        choose(problem(kernel), target, "triton")
    assert "implementation=None" in str(caught.value)


def test_without_the_backend_a_hopper_is_told_what_mosaic_refuses_too(monkeypatch):
    monkeypatch.setattr(triton, "plgpu", None)
    made = choose(problem("packed_matmul", bits=3), Target(platform="gpu", chip="h100"))
    assert (made.implementation, made.fallback) == ("xla", True)
    assert "no Pallas Triton backend" in made.reason
    assert "mosaic_gpu: 3-bit codes" in made.reason


ABSENT = """
    import importlib, pkgutil, sys

    # What an import finds once jax has removed them.
    sys.modules["jax.experimental.pallas.triton"] = sys.modules["jax._src.pallas.triton"] = None
    import jax, jax.numpy as jnp
    import pallas_kernels
    from ttq_jax.chips.absent import compile_for

    for module in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
        importlib.import_module(module.name)
    assert pallas_kernels.gpu.triton.plgpu is None

    kind = {"bits": 4, "group_size": 32, "zero_point": "float", "store_dtype": "bfloat16"}
    x, w = jnp.ones((2, 64)), jnp.linspace(-1.0, 1.0, 64 * 48).reshape(64, 48)
    y, packed = pallas_kernels.prefill_quantize(x, w, **kind)
    again = pallas_kernels.quantize_pack(w, **kind)
    assert all(map(jnp.array_equal, jax.tree.leaves(packed), jax.tree.leaves(again)))
    grid = {"bits": 4, "group_size": 32}
    got = pallas_kernels.packed_matmul(x, *packed, **grid)
    want = x @ pallas_kernels.dequantize(*packed, **grid)
    assert jnp.allclose(got, want, rtol=1e-5, atol=1e-5)
    assert jnp.allclose(y, x @ w, rtol=1e-5, atol=1e-5)

    shape = jax.ShapeDtypeStruct
    operands = (shape((1, 1024), jnp.bfloat16), (shape((512, 256), jnp.uint8),),
                shape((32, 256), jnp.bfloat16), None)
    run = lambda *operands: pallas_kernels.packed_matmul(*operands, **grid)
    for chip, kernels in {"l4": 0, "a100": 0, "h100": 1}.items():
        text = compile_for(chip, run, *operands).as_text()
        assert "triton_kernel" not in text and "xla.gpu.triton" not in text
        assert text.count('custom_call_target="mosaic_gpu') == kernels, chip
"""


@needs_compilers
def test_everything_imports_computes_and_compiles_without_the_backend():
    code = textwrap.dedent(ABSENT)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
