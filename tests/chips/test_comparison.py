"""What `ttq bench kernels` counts: bytes, floors, fractions, and what it does about refusals."""

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_compilers

from ttq_jax.chips import comparison, device_times
from ttq_jax.chips.absent import CHIPS, ChipError
from ttq_jax.chips.comparison import Case, estimate, sweep
from ttq_jax.chips.cycles import CompileError, Estimate
from ttq_jax.chips.device_times import measure

KEYS = {
    "kernel", "bits", "group_size", "symmetric", "scales", "m", "k", "n", "cycles", "floor_cycles",
    "fraction_of_floor", "speedup_vs_bf16", "block", "chip",
}  # fmt: skip


def case(kernel="packed_matmul", **changes):
    facts = {"bits": 4, "group_size": 128, "symmetric": False, "m": 16, "k": 4096, "n": 1024}
    return Case(kernel=kernel, **(facts | changes))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_floor_is_every_stored_byte_once(bits, symmetric):
    k, n, m, g = 4096, 1024, 16, 32
    packed = k * n * bits / 8 + (1 if symmetric else 2) * 2 * (k // g) * n
    facts = {"bits": bits, "group_size": g, "symmetric": symmetric, "k": k, "n": n}
    read, written = 2 * m * k, 2 * m * n
    assert case(**facts, m=m).floor_bytes() == packed + read + written
    weight = 2 * k * n + 4 * k
    assert case("quantize_pack", **facts, m=0).floor_bytes() == packed + weight
    assert case("prefill_quantize", **facts, m=m).floor_bytes() == (
        packed + weight + read + written
    )
    assert case(**facts, m=m).dense_bytes() == 2 * k * n + read + written


@pytest.mark.parametrize("kernel", comparison.KERNELS)
@pytest.mark.parametrize(
    ("bits", "scales"), [(3, "float"), (8, "float"), (4, "coded"), (4, "coded4")]
)
def test_the_floor_is_of_the_arrays_that_the_call_takes_and_returns(kernel, bits, scales):
    m = 0 if kernel == "quantize_pack" else 8
    it = case(kernel, bits=bits, k=256, n=128, m=m, scales=scales)
    operands = it.operands()
    made = jax.eval_shape(lambda x, w: it.run(x, w, implementation="xla"), *operands)
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, made))]
    assert sum(sizes) == it.floor_bytes()


@needs_compilers
@pytest.mark.parametrize("kernel", ["packed_matmul", "prefill_quantize"])
@pytest.mark.parametrize(("cycles", "dense"), [(10, 10), (10**6, 10), (10, 10**6), (10**6, 10**7)])
def test_no_time_is_less_than_what_memory_allows(kernel, cycles, dense, monkeypatch):
    it = case(kernel)

    def answer(chip, fn, *shapes, note=str):
        if fn is comparison.dense_product:
            return Estimate({"convolution": dense}, "")
        return Estimate({f"{kernel}.1": cycles - 3, "copy": 3}, "columns=1024")

    monkeypatch.setattr(comparison, "estimate_program", answer)
    seen = []
    (record,) = estimate([it], "v5e", progress=lambda *at: seen.append(at))
    per_cycle = CHIPS["v5e"].bytes_per_cycle
    floor = it.floor_bytes() / per_cycle
    took, plain = max(cycles, floor), max(dense, it.dense_bytes() / per_cycle)
    extra = {"ratio_to_matmul"} if kernel == "prefill_quantize" else set()
    assert set(record) == KEYS | extra
    assert (record["cycles"], record["block"], record["chip"]) == (cycles, "columns=1024", "v5e")
    assert record["floor_cycles"] == round(floor)
    assert record["fraction_of_floor"] == pytest.approx(floor / took, abs=1e-4)
    assert record["speedup_vs_bf16"] == pytest.approx(plain / took, abs=1e-3)
    if extra:
        assert record["ratio_to_matmul"] == pytest.approx(took / plain, abs=1e-4)
    assert seen == [(1, 1)]


@needs_compilers
def test_a_sweep_goes_on_past_what_has_no_estimate(monkeypatch):
    def answer(chip, fn, *shapes, note=str):
        if fn is comparison.dense_product:
            return Estimate({"convolution": 10**6}, "")
        (weight,) = shapes[1][0][:1]
        if weight.shape[-1] == 512:
            raise CompileError("RESOURCE_EXHAUSTED:\n  out of vmem")
        if weight.shape[-1] == 640:
            return Estimate({"copy.1": 7}, "columns=640", aborted=True)
        return Estimate({"packed_matmul.1": 7}, "columns=768", aborted=True)

    monkeypatch.setattr(comparison, "estimate_program", answer)
    cases = [case(n=512), case(n=640), case(n=768), case(group_size=8), case(k=1152, bits=3)]
    records = estimate(cases, "v5e")
    for record, words in zip(
        records,
        ("out of vmem", "no estimate", "aborted after the kernel", "group_size 8", "3-bit"),
        strict=True,
    ):
        assert words in record["note"]
        assert "\n" not in record["note"]
        assert set(record) == KEYS | {"note"}
    for record in (*records[:2], *records[3:]):
        assert record["cycles"] is None
        assert record["fraction_of_floor"] is None
        assert record["speedup_vs_bf16"] is None
        assert record["floor_cycles"] > 0
    assert records[2]["cycles"] == 7


@needs_compilers
def test_estimates_are_of_tpus_that_have_them():
    for chip, words in (("v4", "no cycle estimates"), ("h100", "no cycle"), ("v9", "expected one")):
        with pytest.raises(ChipError, match=words):
            estimate([case()], chip)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"bits": [6]}, ["2, 3, 4, 5, 8", "bits 6"]),
        ({"group_sizes": [96]}, ["group size", "divides K", "group size 96"]),
        ({"group_sizes": [12]}, ["multiple of 8", "group size 12"]),
        ({"rows": [0]}, ["at least 1 row", "0 rows"]),
        ({"shapes": [(4092, 8)], "group_sizes": [4]}, ["4092x8"]),
        ({"shapes": [(4096, 0)]}, ["4096x0"]),
        ({"scales": "coded4", "bits": [8]}, ["bits of 2 to 5", "8"]),
        ({"scales": "coded4", "symmetric": True}, ["zero_point 'float'", "'none'"]),
    ],
)
def test_problems_that_no_kernel_has_are_refused(options, parts):
    with pytest.raises(ValueError) as caught:
        sweep(**options)
    for part in parts:
        assert part in str(caught.value)


def test_a_sweep_is_the_product_of_its_axes():
    made = sweep(kernels=["packed_matmul", "quantize_pack"], bits=[3, 4], group_sizes=[32],
                 rows=[1, 7], shapes=[(64, 32), (32, 8)], symmetric=True,
                 scales="coded")  # fmt: skip
    assert len(made) == 2 * 2 * 2 + 2 * 2
    assert len({*made}) == len(made)
    assert {c.m for c in made if c.kernel == "quantize_pack"} == {0}
    assert all(c.symmetric and c.scales == "coded" for c in made)
    assert {c.kernel for c in sweep()} == {*comparison.KERNELS}
    assert {c.bits for c in sweep(scales="coded4")} == {2, 3, 4, 5}


@pytest.mark.parametrize("kernel", comparison.KERNELS)
def test_measuring_here(kernel, monkeypatch):
    monkeypatch.setitem(device_times._SECONDS, "cpu", 0.001)
    m = 0 if kernel == "quantize_pack" else 2
    (record,) = measure([case(kernel, k=64, n=32, m=m, group_size=32)], "cpu", turns=1)
    assert set(record) == KEYS | {"dtype", "speedup_vs_dense", "speedup_vs_xla", "microseconds"}
    assert (record["chip"], record["block"], record["dtype"]) == ("cpu", "xla", "float32")
    times = record["microseconds"]
    assert set(times) == {"kernel", "xla"} | ({"dense"} if m else set())
    assert min(times.values()) > 0
    assert record["speedup_vs_xla"] == pytest.approx(times["xla"] / times["kernel"], rel=0.02)
    # Nobody multiplies bfloat16 on a CPU, and its bandwidth is not known.
    assert record["speedup_vs_bf16"] is None
    assert record["fraction_of_floor"] is None


def test_a_case_that_does_not_run_is_noted_and_the_rest_measured(monkeypatch):
    monkeypatch.setitem(device_times._SECONDS, "cpu", 0.001)
    real = device_times._contenders

    def contenders(case, platform):
        if case.n == 40:
            raise RuntimeError("no memory\nleft")
        return real(case, platform)

    monkeypatch.setattr(device_times, "_contenders", contenders)
    cases = [case(k=64, n=n, group_size=32) for n in (40, 32)]
    failed, ran = measure(cases, "cpu", turns=1)
    assert failed["note"] == "RuntimeError: no memory left"
    assert failed["microseconds"] == {}
    assert failed["speedup_vs_xla"] is None
    assert set(failed) == set(ran) | {"note"}
    assert ran["microseconds"]["kernel"] > 0


def test_a_device_that_is_not_there():
    with pytest.raises(ChipError, match="measures on a GPU, but jax finds none"):
        measure([case()], "gpu")


def counting(seen, pick):
    """A product that notes each run; pure, so that a compiler may drop or merge runs."""

    def note(value):
        seen.append(float(value))
        return value

    def call(x, weight, *layer):
        w = pick(weight, *layer)
        return x[0] * jax.pure_callback(note, jax.ShapeDtypeStruct((), jnp.float32), w)

    return call


def test_every_step_of_a_measured_loop_runs_and_reads_the_next_weight():
    x = (jnp.float32(1),)
    seen = []
    indexed = counting(seen, lambda stack, layer: stack[layer])
    device_times._indexed(indexed, x, jnp.arange(3.0), 3, 7).seconds()
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    for steps, turns in ((1, 3), (13, 4)):
        seen = []
        weights = [jnp.float32(i) for i in range(3)]
        made = device_times._apart(counting(seen, lambda w: w), x, weights, steps)
        made.seconds()
        assert made.steps == 3 * turns
        assert sorted(seen) == sorted([0, 1, 2] * turns)
