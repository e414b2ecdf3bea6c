"""Who serves a problem, and why: the decisions, without tracing or compiling anything."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import choice
from pallas_kernels.choice import (
    IMPLEMENTATIONS,
    KERNELS,
    Problem,
    Target,
    chip_of,
    choose,
    current_target,
    refusal,
)

CPU = Target(platform="cpu")
TPUS = [Target(platform="tpu", chip=c) for c in ("v4", "v5e", "v5p", "v6e", "tpu7x", None)]
GPUS = [Target(platform="gpu", chip=c) for c in ("a100", "l4", "h100", None)]


def problem(kernel, **changes):
    """4096 x 4096 at 4 bits, groups of 128, bfloat16: what every kernel is made for."""
    facts = {
        "m": {"packed_matmul": 1, "quantize_pack": 0, "prefill_quantize": 512}[kernel],
        "d_in": 4096, "n": 4096, "bits": 4, "group_size": 128, "zero_point": "float",
        "dtype": "bfloat16", "shrinks": () if kernel == "packed_matmul" else (1.0,),
    }  # fmt: skip
    return Problem(kernel=kernel, **(facts | changes))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", [*TPUS, *GPUS], ids=str)
def test_each_accelerator_is_served_by_its_kernel(kernel, target):
    made = choose(problem(kernel), target)
    assert made.implementation == ("tpu" if target.platform == "tpu" else "triton")
    assert not made.fallback
    assert (target.chip or made.implementation) in made.reason


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("platform", ["cpu", "METAL"])
def test_plain_xla_elsewhere_is_a_decision_not_a_fallback(kernel, platform):
    made = choose(problem(kernel), Target(platform=platform))
    assert made.implementation == "xla"
    assert not made.fallback
    assert platform in made.reason


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_t4_falls_back_and_says_which_compiler_does_not_serve_it(kernel):
    made = choose(problem(kernel, dtype="float16"), Target(platform="gpu", chip="t4"))
    assert made.implementation == "xla"
    assert made.fallback
    for part in ("triton", "8.0", "T4", "7.5"):
        assert part in made.reason


@pytest.mark.parametrize(
    ("kernel", "target", "changes", "parts"),
    [
        ("packed_matmul", TPUS[1], {"dtype": "float32"}, ["tpu", "float32", "bfloat16"]),
        ("packed_matmul", TPUS[1], {"group_size": 8}, ["tpu", "group_size 8"]),
        ("packed_matmul", TPUS[1], {"d_in": 1152, "bits": 3}, ["tpu", "1152", "3-bit"]),
        ("quantize_pack", TPUS[3], {"group_size": 8}, ["tpu", "group_size 8"]),
        ("quantize_pack", TPUS[3], {"n": 96}, ["tpu", "96 columns"]),
        ("quantize_pack", TPUS[3], {"store_dtype": "float16"}, ["tpu", "float16"]),
        ("prefill_quantize", TPUS[1], {"m": 5000}, ["tpu", "5000"]),
        ("prefill_quantize", TPUS[1], {"rank": 2000}, ["tpu", "2000"]),
        ("packed_matmul", GPUS[2], {"group_size": 8}, ["triton", "groups of 8"]),
        ("quantize_pack", GPUS[2], {"group_size": 1024}, ["triton", "1024"]),
        ("prefill_quantize", GPUS[2], {"group_size": 512}, ["triton", "512"]),
    ],
)
def test_a_fallback_carries_what_the_kernel_refused(kernel, target, changes, parts):
    asked = problem(kernel, **changes)
    made = choose(asked, target)
    assert (made.implementation, made.fallback) == ("xla", True)
    name = parts[0]
    for part in parts:
        assert part in made.reason
    # The same reason, whoever asks: forced, the very implementation raises with it.
    why = refusal(asked, name, target)
    assert why and why in made.reason
    with pytest.raises(ValueError, match="cannot serve") as caught:
        choose(asked, target, name)
    assert why in str(caught.value)
    assert "implementation=None" in str(caught.value)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("name", "target", "here"),
    [
        ("tpu", CPU, "this is a CPU"),
        ("tpu", GPUS[2], "this is a GPU"),
        ("triton", TPUS[1], "this is a TPU"),
        ("triton", CPU, "this is a CPU"),
        ("interpret", TPUS[1], "this is a TPU"),
        ("mosaic_gpu", GPUS[0], "no mosaic_gpu kernel|Hopper"),
    ],
)
def test_a_forced_implementation_raises_where_it_cannot_run(kernel, name, target, here):
    with pytest.raises(ValueError, match=here):
        choose(problem(kernel), target, name)


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_can_serve_may_be_forced(kernel):
    asked = problem(kernel)
    for name, target in (
        ("tpu", TPUS[1]), ("triton", GPUS[0]), ("interpret", CPU),
        ("xla", CPU), ("xla", TPUS[1]), ("xla", GPUS[2]),
    ):  # fmt: skip
        made = choose(asked, target, name)
        assert (made.implementation, made.reason, made.fallback) == (name, "asked for", False)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="expected None or one of") as caught:
        choose(problem("packed_matmul"), CPU, "cuda")
    for name in (*IMPLEMENTATIONS, "'cuda'"):
        assert name in str(caught.value)


def test_more_rows_than_the_table_says_are_multiplied_densely(monkeypatch):
    monkeypatch.setitem(choice.DENSE_ROWS, "v5e", (64, 32))
    for group_size, limit in ((32, 32), (128, 64)):
        for m, name in ((limit, "tpu"), (limit + 1, "xla")):
            made = choose(problem("packed_matmul", m=m, group_size=group_size), TPUS[1])
            assert (made.implementation, made.fallback) == (name, False)
    assert "more than 64 rows" in made.reason
    assert choose(problem("packed_matmul", m=65), TPUS[3]).implementation == "tpu"
    assert choose(problem("prefill_quantize", m=65), TPUS[1]).implementation == "tpu"


def test_mosaic_is_asked_first_where_the_table_says_so_and_is_no_fallback_if_it_refuses(
    monkeypatch,
):
    h100, a100 = GPUS[2], GPUS[0]
    monkeypatch.setattr(choice, "MOSAIC_ROWS", {"h100": 128})
    assert choose(problem("packed_matmul", m=128), h100).implementation == "mosaic_gpu"
    assert choose(problem("packed_matmul", m=127), h100).implementation == "triton"
    assert choose(problem("packed_matmul", m=128), a100).implementation == "triton"
    assert choose(problem("prefill_quantize", m=128), h100).implementation == "triton"
    made = choose(problem("packed_matmul", m=128, bits=3), h100)
    assert (made.implementation, made.fallback) == ("triton", False)
    assert "mosaic_gpu: 3-bit" in made.reason
    made = choose(problem("packed_matmul", m=128, group_size=8), h100)
    assert (made.implementation, made.fallback) == ("xla", True)
    assert "mosaic_gpu: " in made.reason
    assert "triton: " in made.reason


@pytest.mark.parametrize("kernel", ["quantize_pack", "prefill_quantize"])
def test_quantizers_have_no_mosaic_kernel(kernel):
    with pytest.raises(ValueError, match="no mosaic_gpu kernel"):
        choose(problem(kernel), GPUS[2], "mosaic_gpu")
    assert choose(problem("packed_matmul"), GPUS[2], "mosaic_gpu").reason == "asked for"


def test_a_choice_is_a_pure_function_of_hashable_values():
    asked = problem("packed_matmul")
    assert hash(asked) == hash(dataclasses.replace(asked))
    assert choose(asked, TPUS[1]) == choose(dataclasses.replace(asked), Target(
        platform="tpu", chip="v5e",
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v6e", "v6e"), ("TPU7x", "tpu7x"),
        ("TPU v7x", "tpu7x"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h100"),
        ("NVIDIA GH200 480GB", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "l4"), ("Tesla T4", "t4"),
        # Neither is an L4 or a T4, and their names contain the letters.
        ("NVIDIA L40S", None), ("NVIDIA T400", None), ("NVIDIA B200", None), ("cpu", None),
    ],
)  # fmt: skip
def test_device_kinds(kind, chip):
    assert chip_of(kind) == chip


def test_the_target_is_the_abstract_device_of_the_mesh():
    kinds = {"TPU v5 lite": ("tpu", "v5e"), "NVIDIA H100 80GB HBM3": ("gpu", "h100")}
    for kind, (platform, chip) in kinds.items():
        device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
        with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            assert current_target() == Target(platform=platform, chip=chip)
    device = AbstractDevice(device_kind="Tesla T4", num_cores=None, platform="cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        assert current_target() == Target(platform="gpu", chip="t4")
    assert current_target() == CPU


def test_the_target_is_the_default_device_given_as_a_device_or_a_string(monkeypatch):
    with jax.default_device(jax.devices("cpu")[0]):
        assert current_target() == CPU
    with jax.default_device("cpu"):
        assert current_target() == CPU

    # No accelerator is here: what jax would answer for one.
    class Device:
        platform, device_kind, compute_capability = "gpu", "NVIDIA L4", "8.9"

    monkeypatch.setattr(jax, "devices", lambda name=None: [Device] if name in {None, "gpu"} else [])
    assert current_target() == Target(platform="gpu", chip="l4")
    monkeypatch.setitem(jax.config.values, "jax_default_device", "gpu")
    assert current_target() == Target(platform="gpu", chip="l4")
    monkeypatch.setattr(Device, "device_kind", "Tesla V100-SXM2-16GB")
    assert current_target().chip is None
    # Older than what Triton is compiled for: served like a T4.
    monkeypatch.setattr(Device, "compute_capability", "7.0")
    assert current_target().chip == "t4"
