"""JAX's own switches: with any of them set, a public function returns what it returns without.

Two of them change numbers on purpose, and are held here to changing nothing else:
    jax_default_matmul_precision   the model's own products; never a code, a scale or a factor
    jax_default_prng_impl, jax_threefry_partitionable   draws; of the first, only those by a seed
                                   that the user gave
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import QUICKLY, needs_compilers
from jax.extend.core import jaxprs_in_params
from marks import slow_but
from small import in_host, prompts_of, random_rows, small_config, small_params
from stores import same_bits
from tiny_files import write_model

import pallas_kernels
import ttq_jax as ttq
from ttq_jax.checkpoint import Model
from ttq_jax.chips.absent import compile_for
from ttq_jax.evaluation.continuations import continue_until, score_continuations
from ttq_jax.models.cache import empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.offline.allocate import allocate, measure_widths
from ttq_jax.offline.calibrate import observe_tokens, prepare_unpacked
from ttq_jax.offline.prior import prior_from_weights
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.moments import observe
from ttq_jax.quant.presets import PRESETS, preset
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source
from ttq_jax.quant.tree import quantize_tree, static_factors
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling, make_key

CONFIG = small_config(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=48, embed_dim=32)
LETTERS = SimpleNamespace(
    vocab_size=97,
    bos_id=None,
    encode=lambda text, add_bos=True: [ord(letter) % 97 for letter in text],
    continuation=lambda prompt, ids: "".join(chr(200 + i) for i in ids),
)
MODEL = Model(
    config=CONFIG, params=small_params(CONFIG), tokenizer=LETTERS, name="tiny", eos_ids=(5,)
)
MIXED = dataclasses.replace(CONFIG, n_experts=4, experts_per_token=2, norm_topk=True)
IN_HOST = dataclasses.replace(MODEL, params=in_host(MODEL.params))
MIXTURE = dataclasses.replace(MODEL, config=MIXED, params=small_params(MIXED))
WINDOWS = np.asarray(random_rows([24, 24], seed=5), np.int64)
TEXTS = ["The capital", "of France is Paris"]
# Nearly all the time here is compilation: one projection, where one shows all there is.
ONE = "layers/q"
RECIPES = {
    name: known.recipe and preset(name, bits=3, group_size=16, select=ONE)
    for name, known in PRESETS.items()
}
# Everything that a preset leaves out, in one program.
REST = ttq.Recipe(
    moments=Source(prior="weights", prior_tokens=8.0, decay=0.5, refresh=2),
    rounding=SecondOrder(steps=2, span=16, static_groups=False),
    low_rank=LowRankRule(rank=2, error_rank=2, mean=True, store="int8"),
    widths=(Width(select="layers/1/q", bits=2),), select=ONE,
)  # fmt: skip
EXPERTS = dataclasses.replace(
    REST, widths=(Width(select="layers/1/down", bits=2),), select="layers/down"
)
SAMPLES = ttq.Recipe(
    moments=Source(prior="samples", prior_tokens=8.0), select=ONE,
    low_rank=LowRankRule(rank=2, weighted=True, error_rank=2),
)  # fmt: skip
HOT, PARTS = Sampling(temperature=1.0), {"prefill_chunk": 9}
COSTS = ttq.DraftCosts((1.0, 1.1, 1.2, 1.3, 1.4))


def generated(recipe, model=MODEL, **how):
    offline = ttq.prepare(model, recipe, WINDOWS)
    how |= {"max_new_tokens": 6, "batch_size": len(TEXTS)}
    got = ttq.generate(model, TEXTS, recipe=recipe, offline=offline, **how)
    sizes = got.effective_bits, got.unreached_experts, [*map(dataclasses.astuple, got.drafts)]
    return got.tokens, got.moments, sizes, offline


def streamed(recipe):
    offline = ttq.prepare(MODEL, recipe, WINDOWS)
    answer = ttq.stream(MODEL, TEXTS[0], recipe=recipe, offline=offline, max_new_tokens=12)
    pieces = list(answer)
    return pieces, answer.generation.tokens


def scored(kind, recipe):
    protocol = ttq.Protocol(kind=kind, window=24, prompt_tokens=10)
    return ttq.perplexity(MODEL, WINDOWS, recipe=recipe, protocol=protocol).nll


def agreed():
    found = ttq.acceptance(MODEL, WINDOWS, recipe=RECIPES["ttq"], prompt_tokens=10)
    return found.greedy, found.sampled, found.divergence


def continued():
    offline = ttq.prepare(MODEL, RECIPES["ttq"])
    return score_continuations(
        MODEL, [1, 2, 3], [[4, 5], [6]], recipe=RECIPES["ttq"], offline=offline
    )


def stored(tmp_path):
    offline = ttq.prepare(MODEL, RECIPES["gptq"], WINDOWS)
    ttq.save_offline(tmp_path / "store", MODEL, RECIPES["gptq"], offline)
    return ttq.load_offline(tmp_path / "store", MODEL, RECIPES["gptq"])


def allocated():
    offline = prepare_unpacked(MODEL, RECIPES["ttq"])
    measured = measure_widths(
        MODEL.params, WINDOWS, RECIPES["ttq"], offline, config=CONFIG, prompt_tokens=10,
        widths=(2, 3),
    )  # fmt: skip
    return measured.errors, measured.bits, list(map(dataclasses.astuple, allocate(measured, 5.0)))


def kernels():
    """The kernels' public calls, as a user would call them: within a program."""
    kind = {"bits": 3, "group_size": 16}
    x, w = jax.device_put((_X, _W))

    @jax.jit
    def run(x, w):
        made = pallas_kernels.quantize_pack(
            w, zero_point="float", store_dtype="bfloat16", shrinks=(1.0, 0.8), layer=1, **kind
        )
        few, many = (pallas_kernels.packed_matmul(rows, *made, **kind) for rows in (x[:2], x))
        read = pallas_kernels.prefill_quantize(
            x, w[0], x[0] ** 2 + 1.0, x[1] ** 2, (w[0, :, :2], w[1, :2]), zero_point="integer",
            store_dtype="float32", quantized=True, **kind,
        )  # fmt: skip
        return made, few, many, read, pallas_kernels.dequantize(*made, **kind)

    return run(x, w)


def functions():
    """A user's own function: its static parts, a reading, and a run over packed weights."""
    recipe = ttq.Recipe(grid=ttq.Grid(bits=3, group_size=16), low_rank=LowRankRule(rank=2))
    fn = lambda w, x: jax.lax.scan(lambda x, w: (x, jnp.tanh(x @ w)), x, w)[1]  # noqa: E731

    @jax.jit
    def program(w, x):
        _, packed = ttq.read(fn, recipe, static=ttq.static_factors(fn, recipe)(w, x))(w, x)
        return packed, ttq.run(fn)(packed, x)

    return program(*jax.device_put((_W, _X)))


_X = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
_W = np.random.default_rng(1).normal(size=(2, 32, 48)).astype(np.float32)

CASES = {
    **{
        # Packed trees of one form are decoded alike: one of them is enough.
        f"prepare, {n}": functools.partial(ttq.prepare, MODEL, RECIPES[n], WINDOWS)
        for n in ("rtn", "hqq", "awq")
    },
    **{
        f"generate, {n}": functools.partial(generated, RECIPES[n])
        for n in ("none", "gptq", "paper", "ttq", "fast", "best")
    },
    "generate, the rest": functools.partial(generated, REST),
    "stream, the rest": functools.partial(streamed, REST),
    "generate, from the host": functools.partial(generated, RECIPES["fast"], IN_HOST),
    "generate, experts": functools.partial(generated, EXPERTS, MIXTURE),
    "sample": functools.partial(
        generated, None, seed=-3, sampling=Sampling(temperature=1.0, top_k=20, top_p=0.9)
    ),
    "sample, per prompt": functools.partial(
        generated, dataclasses.replace(RECIPES["ttq"], batch="per_prompt"), seed=2**40 + 7,
        sampling=Sampling(temperature=1.0),
    ),
    "speculate": functools.partial(generated, RECIPES["fast"], **PARTS, speculate=3, sampling=HOT),
    "auto": functools.partial(generated, RECIPES["ttq"], seed=1, speculate=COSTS, sampling=HOT),
    "acceptance": agreed,
    "perplexity, causal": functools.partial(scored, "causal", RECIPES["fast"]),
    "perplexity, window": functools.partial(scored, "window", RECIPES["paper"]),
    "score_continuations": continued,
    "prepare, samples": functools.partial(ttq.prepare, MODEL, SAMPLES),
    "allocate": allocated,
    "kernels": kernels,
    "functions": functions,
}  # fmt: skip


@contextlib.contextmanager
def switched(*, wide):
    """Every switch that refuses something, with or without 64-bit types.

    None of these changes a number: each makes an error of what JAX otherwise does in silence.
    """
    with contextlib.ExitStack() as stack:
        for switch in (
            jax.enable_x64(wide),
            jax.numpy_dtype_promotion("strict"),
            jax.numpy_rank_promotion("raise"),
            jax.transfer_guard("disallow"),
            jax.debug_nans(True),
            jax.debug_infs(True),
            jax.legacy_prng_key("error"),
        ):
            stack.enter_context(switch)
        yield


@functools.cache
def plainly(name):
    """What a case returns where no switch is set; the suite's own is set back."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.block_until_ready(CASES[name]())


def assert_same(got, expected):
    """The same structure, types and bits."""
    arrays = [jax.tree.map(np.asarray, jax.device_get(tree)) for tree in (got, expected)]
    assert same_bits(*arrays)


@pytest.mark.parametrize("name", slow_but(CASES, ["generate, the rest"]))
def test_switches_change_nothing(name, wide=True):
    expected = plainly(name)
    with switched(wide=wide):
        got = jax.block_until_ready(CASES[name]())
    if name == "allocate" and wide:
        # The same float32 terms, but indices of another width are fused with other loops, which
        # then add in another order: half an ulp for each of the 97 classes of a softmax.
        np.testing.assert_allclose(got[0]["q"], expected[0]["q"], rtol=97 * 2.0**-24)
        got, expected = got[1:], expected[1:]
    assert_same(got, expected)


def test_they_change_nothing_beside_32_bit_types():
    test_switches_change_nothing("generate, the rest", wide=False)


def test_a_store_is_the_same(tmp_path):
    expected = stored(tmp_path)
    with switched(wide=True):
        assert_same(stored(tmp_path), expected)
        # Written with the switches, read without: the model's fingerprint is the same too.
    assert_same(ttq.load_offline(tmp_path / "store", MODEL, RECIPES["gptq"]), expected)


def test_no_tracer_is_kept():
    expected = plainly("generate, ttq")
    with jax.checking_leaks():
        assert_same(generated(RECIPES["ttq"]), expected)


def products(jaxpr):
    """Every matrix product of a program, as its equation."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


PRECISIONS = pytest.mark.parametrize("default", ["bfloat16", "high"])


@PRECISIONS
@pytest.mark.parametrize("name", [*filter(RECIPES.get, RECIPES), "rest", "samples", "experts"])
def test_quantizing_asks_for_its_precision_itself(name, default):
    """On a TPU the default multiplies in bfloat16, as coarse as a rounding step; on a CPU each
    multiplies in float32, so that what is asked for is all there is to see."""
    recipe = {**RECIPES, "rest": REST, "samples": SAMPLES, "experts": EXPERTS}[name]
    model = MIXTURE if name == "experts" else MODEL
    tokens = jax.ShapeDtypeStruct((1, 24), jnp.int32)
    seen = jax.eval_shape(
        functools.partial(observe_tokens, config=model.config, reads=recipe.reads),
        model.params, tokens,
    )  # fmt: skip

    def quantized(params, seen, x):
        observed = observe(x, jnp.ones(x.shape[:2], bool), recipe.reads)
        prior = prior_from_weights(params, config=model.config, reads=recipe.reads)
        factors = static_factors(params, recipe, seen)
        return quantize_tree(params, recipe, seen, factors), prior, observed

    with jax.default_matmul_precision(default):
        made = jax.make_jaxpr(quantized)(model.params, seen, jnp.ones((1, 24, 32)))
    found = [eqn.params["precision"] for eqn in products(made.jaxpr)]
    assert found
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@PRECISIONS
def test_the_models_own_products_have_the_precision_that_is_asked_for(default):
    def hidden(params, tokens):
        cache = empty_cache(CONFIG, *tokens.shape, jnp.float32)
        return forward(CONFIG, params, tokens, jnp.ones(tokens.shape, bool), cache)[0]

    with jax.default_matmul_precision(default):
        made = jax.make_jaxpr(hidden)(MODEL.params, jnp.zeros((1, 24), jnp.int32))
        expected = (jax.lax.Precision(default),) * 2
    assert {eqn.params["precision"] for eqn in products(made.jaxpr)} == {expected}


@pytest.mark.parametrize(
    ("impl", "name"), [("rbg", "generate, the rest"), ("unsafe_rbg", "prepare, samples")]
)
def test_a_generator_moves_no_draw_of_ours(impl, name):
    expected = plainly(name)
    with jax.default_prng_impl(impl):
        assert_same(CASES[name](), expected)


def test_keys_of_either_kind_draw_alike():
    how = {"recipe": RECIPES["none"], "offline": ttq.prepare(MODEL, None)}
    told = [
        continue_until(
            MODEL, [1, 2, 3], [], 6, key, sampling=Sampling(temperature=1.0), **how
        )
        for key in (jax.random.key(7), jax.random.PRNGKey(7), make_key(7))
    ]  # fmt: skip
    assert told[0] == told[1] == told[2]
    with jax.threefry_partitionable(False):
        assert_same(CASES["generate, ttq"](), plainly("generate, ttq"))


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31, 2**32 - 1, 2**40 + 7])
def test_a_seed_is_one_key(seed):
    expected = jax.random.key_data(jax.random.key(seed))
    np.testing.assert_array_equal(jax.random.key_data(make_key(seed)), expected)
    with switched(wide=True):
        key = make_key(seed)
    np.testing.assert_array_equal(jax.random.key_data(key), expected)


def test_the_command_line_under_every_switch(tmp_path):
    """Set as a notebook or a shell sets them, for the whole process."""
    path = str(write_model(tmp_path / "tiny"))
    command = [
        sys.executable, "-m", "ttq_jax", "generate", "--model", path, "--prompt", "Hello there",
        "--max-new-tokens", "8", "--select", ONE, "--no-compilation-cache", "--json",
    ]  # fmt: skip
    switches = {
        "JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_DEBUG_NANS": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_TRANSFER_GUARD": "disallow",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_ENABLE_CUSTOM_PRNG": "1",
    }  # fmt: skip
    env = os.environ | QUICKLY | switches
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    expected = ttq.generate(
        ttq.load(path), ["Hello there"], recipe=preset("fast", select=ONE), max_new_tokens=8
    )
    assert got["text"] == expected.texts[0]
    assert got["effective_bits"] == round(expected.effective_bits, 4)


@needs_compilers
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_kernels_compile_under_every_switch(chip):
    """Mosaic has no 64-bit integers, and refuses more than one pass of bfloat16."""
    shape, k, n, kind = jax.ShapeDtypeStruct, 256, 256, {"bits": 4, "group_size": 128}

    def both(x, w, d, layer):
        y, made = pallas_kernels.prefill_quantize(
            x, w, d, d, zero_point="float", store_dtype="bfloat16", layer=layer,
            shrinks=(1.0, 0.8), **kind,
        )  # fmt: skip
        return y, pallas_kernels.packed_matmul(x[:1], *made, d, **kind)

    with switched(wide=True), jax.default_matmul_precision("highest"):
        compiled = compile_for(
            chip, both, shape((64, k), jnp.bfloat16), shape((2, k, n), jnp.bfloat16),
            shape((k,), jnp.float32), shape((), jnp.int32),
        )  # fmt: skip
    assert all(name in compiled.as_text() for name in ("prefill_quantize", "packed_matmul"))


def test_prompts_may_be_any_integers():
    """NumPy's are int64, and stay so where 64-bit types are enabled."""
    got = ttq.calibrate(MODEL, WINDOWS, RECIPES["ttq"].reads)
    short = prompts_of(WINDOWS[:1].tolist(), 24)
    assert short.tokens.dtype == jnp.int32
    assert_same(ttq.calibrate(MODEL, WINDOWS.astype(np.int32), RECIPES["ttq"].reads), got)
    with pytest.raises(ValueError, match=r"expected integers, got float64.*tokenizer"):
        ttq.calibrate(MODEL, WINDOWS / 1.0, RECIPES["ttq"].reads)
