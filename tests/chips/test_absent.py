"""Compiling for chips that are not here."""

import importlib.util
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.choice import Target, chip_of, current_target
from ttq_jax.chips.absent import (
    CHIPS,
    ChipError,
    chip,
    compile_for,
    device,
    libtpu_version,
    tracing_for,
)
from ttq_jax.commands.chip_options import COMPILED, ESTIMATED


def test_the_command_line_knows_the_same_chips():
    assert set(COMPILED) == set(CHIPS)
    assert set(ESTIMATED) == {name for name, it in CHIPS.items() if it.bytes_per_cycle}


@needs_compilers
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_each_compiler_knows_its_chip_by_the_name_that_we_choose_by(name):
    it = device(name)
    assert chip_of(it.device_kind) == name
    if CHIPS[name].platform == "cuda":
        assert it.device_kind == CHIPS[name].name
    with tracing_for(name):
        platform = {"cuda": "gpu"}.get(CHIPS[name].platform, "tpu")
        assert current_target() == Target(platform=platform, chip=name)
    assert current_target() == Target(platform="cpu")


@needs_compilers
@pytest.mark.parametrize("name", sorted(CHIPS))
def test_programs_compile_for_each_chip(name):
    shape = jax.ShapeDtypeStruct((256, 128), jnp.float32)
    seen = []

    def program(tree, b):
        seen.append(current_target())
        return tree["a"].T @ b

    compiled = compile_for(name, program, {"a": shape}, shape)
    assert seen == [Target(platform=seen[0].platform, chip=name)]
    assert compiled.memory_analysis().argument_size_in_bytes == 2 * 256 * 128 * 4
    assert "f32[128,128]" in compiled.as_text()


@needs_compilers
def test_jitted_functions_keep_their_static_arguments():
    fn = jax.jit(lambda a, *, scale: a * scale, static_argnames="scale")
    text = compile_for("v5e", fn, jax.ShapeDtypeStruct((8, 128), jnp.float32), scale=3.0).as_text()
    assert "constant(3)" in text


@needs_compilers
@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_the_persistent_cache_is_left_out(name, tmp_path):
    """It can be written for an absent chip, but not read (jax 0.10.2), which warns every time."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {n: getattr(jax.config, n) for n in names}
    shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    try:
        for n, value in zip(names, (str(tmp_path), 0.0), strict=True):
            jax.config.update(n, value)
        compilation_cache.reset_cache()
        for _ in range(2):
            compile_for(name, lambda a: a * 2, shape)
            jax.clear_caches()
        assert not list(tmp_path.iterdir())
        jax.jit(lambda a: a * 3)(jnp.ones(8))
        assert list(tmp_path.iterdir()), "the cache works again afterwards"
    finally:
        for n, value in before.items():
            jax.config.update(n, value)
        compilation_cache.reset_cache()


def test_chips_that_there_are_not():
    with pytest.raises(ChipError, match=r"expected one of v4, v5e.*got 'v9'"):
        chip("v9")


def test_a_missing_tpu_compiler_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    with pytest.raises(ChipError, match="v5e needs the TPU compiler: pip install libtpu"):
        chip("v5e")


@needs_compilers
def test_the_tpu_compiler_is_named_by_the_version_that_jax_loads(tmp_path, monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert libtpu_version() == metadata.version("libtpu")
    library = tmp_path / "libtpu" / "libtpu.so"
    # jax warns of a library that is not there, and takes the installed one.
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    assert libtpu_version() == metadata.version("libtpu")
    library.parent.mkdir()
    library.touch()
    with pytest.raises(ChipError, match="pip install --no-deps --target"):
        libtpu_version()
    wheel = tmp_path / "libtpu-0.0.1.dist-info"
    wheel.mkdir()
    (wheel / "METADATA").write_text("Metadata-Version: 2.1\nName: libtpu\nVersion: 0.0.1\n")
    assert libtpu_version() == "0.0.1"


@pytest.mark.parametrize("there", [None, "0.1.2"])
def test_a_cuda_compiler_of_another_jax_is_refused(there, monkeypatch):
    real = metadata.version

    def version(name):
        if name != "jax-cuda13-plugin":
            return real(name)
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ChipError) as caught:
        chip("h100")
    for part in (there or "none", f"jax[cuda13-local]=={jax.__version__}", "nvidia-cuda-nvcc"):
        assert part in str(caught.value)
