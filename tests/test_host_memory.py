"""Weights in the host's memory: the same answers, and a device without dense blocks."""

import dataclasses
import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_but
from small import in_host, prompts_of, random_rows, small_config, small_params
from tiny_files import write_model

from ttq_jax.checkpoint import CheckpointError, load, placing
from ttq_jax.checkpoint.fingerprint import fingerprint
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.placing import check_memory, pinned_memory
from ttq_jax.errors import NotFiniteError
from ttq_jax.evaluation.acceptance import compare_window
from ttq_jax.evaluation.perplexity import Protocol, window_nll
from ttq_jax.finite import raise_not_finite
from ttq_jax.generate import generate, generate_tokens
from ttq_jax.offline.allocate import measure_widths
from ttq_jax.offline.calibrate import calibrate, prepare
from ttq_jax.prefill import first_turn
from ttq_jax.quant.head import joined
from ttq_jax.quant.recipe import preset
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, kernels, stored_bytes


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("host") / "tiny"))


CONFIG = small_config(n_layers=2, d_ff=64)
EXPERTS = small_config(n_layers=2, d_ff=64, n_experts=4, experts_per_token=2)


def model_of(config, params):
    tokenizer = SimpleNamespace(vocab_size=97, bos_id=None)
    return Model(config=config, params=params, tokenizer=tokenizer, name="tiny", eos_ids=())


BOTH = {
    config: [model_of(config, place(small_params(config))) for place in (dict, in_host)]
    for config in (CONFIG, EXPERTS)
}
TTQ = preset("ttq", bits=3, group_size=32)
MIXED = dataclasses.replace(TTQ, widths=(Width(select="layers/1/(q|down)", bits=4),))


def changed(recipe, **moments):
    return dataclasses.replace(recipe, moments=dataclasses.replace(recipe.source, **moments))


def answer(model, recipe, drafts=0, decay=False, rows=(13, 9)):
    """Tokens and whether they are finite."""
    corpus = np.asarray(random_rows([24, 24]), np.int32)
    needed = recipe is not None and recipe.source.reads_corpus
    offline = prepare(model, recipe, corpus if needed else None)
    params = model.params
    if decay:
        first = first_turn(params, model.config, recipe)
        offline = dataclasses.replace(offline, carried=first)
    if not drafts:
        params, offline = joined(params, recipe, offline)
    out, counts, finite, *_ = generate_tokens(
        params, prompts_of(random_rows(rows), 16), offline, jax.random.key(0),
        jnp.asarray(7, jnp.int32), config=model.config, recipe=recipe, sampling=Sampling(),
        capacity=8, eos_ids=(), drafts=drafts,
    )  # fmt: skip
    assert finite
    return out.tolist(), counts.tolist()


CASES = {
    "default": (CONFIG, preset("fast", group_size=32), {}),
    "quantized prefill, static low rank": (CONFIG, preset("paper", rank=4, group_size=32), {}),
    "second order": (CONFIG, preset("best", group_size=32), {}),
    "corpus": (CONFIG, preset("awq", group_size=32), {}),
    "unquantized": (CONFIG, None, {}),
    "speculation": (CONFIG, TTQ, {"drafts": 3}),
    "a tree per prompt, mixed widths": (CONFIG, dataclasses.replace(MIXED, batch="per_prompt"), {}),
    "refresh in a conversation": (CONFIG, changed(TTQ, refresh=3, decay=0.5), {"decay": True}),
    "samples, some projections": (
        CONFIG,
        changed(
            dataclasses.replace(TTQ, select="layers/(q|up)"), prior="samples", prior_tokens=8.0
        ),
        {},
    ),
    "experts of mixed widths": (EXPERTS, MIXED, {}),
    "experts, few tokens": (EXPERTS, None, {"rows": (3,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", slow_but(CASES, ["default"]))
def test_answers_are_the_same(case):
    config, recipe, how = CASES[case]
    device, host = (answer(model, recipe, **how) for model in BOTH[config])
    assert device == host


@pytest.mark.parametrize("config", [CONFIG, EXPERTS], ids=["dense", "experts"])
def test_measurements_are_the_same(config):
    device, host = BOTH[config]
    windows = np.asarray(random_rows([16, 16]), np.int32)
    assert fingerprint(device) == fingerprint(host)

    def near(measure):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6),
            measure(device), measure(host),
        )  # fmt: skip

    near(lambda model: prepare(model, changed(TTQ, prior="weights", prior_tokens=8.0)).moments)
    near(lambda model: calibrate(model, windows, TTQ.reads))

    def widths(model):
        return measure_widths(
            model.params, windows[:1], TTQ, prepare(model, TTQ), config=config,
            prompt_tokens=8, widths=(3,),
        ).errors  # fmt: skip

    near(widths)


def test_texts_are_scored_the_same():
    device, host = BOTH[CONFIG]
    recipe, window = (
        preset("ttq", bits=3, group_size=32),
        np.asarray(random_rows([16])[0], np.int32),
    )

    def scored(model):
        protocol = Protocol(kind="window", window=16)
        return window_nll(model, window, recipe=recipe, offline=Offline(), protocol=protocol)

    def compared(model):
        return compare_window(
            model.params, jnp.asarray(window), Offline(), config=CONFIG, recipe=recipe, length=8
        )

    assert scored(device) == pytest.approx(scored(host), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), compared(device), compared(host)
    )


def test_what_is_not_finite_is_found_in_the_hosts_memory():
    params = small_params(CONFIG)
    params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(NotFiniteError, match=r"weights hold infinities or NaN in layer 1 \(up\)"):
        raise_not_finite(
            in_host(params), prompts_of(random_rows([5]), 8), Offline(), config=CONFIG, recipe=None
        )


def bytes_by_memory():
    """Bytes of the live arrays, by the kind of memory they are in."""
    found = {"device": 0, "pinned_host": 0}
    for array in jax.live_arrays():
        found[array.sharding.memory_kind] += array.nbytes
    return found


def test_the_device_holds_no_block(tiny_model):
    gc.collect()
    before = bytes_by_memory()
    model = load(tiny_model, dense_memory="host")
    blocks = stored_bytes(kernels(model.params["layers"]))
    rest = stored_bytes(model.params) - blocks

    def added():
        return {kind: size - before[kind] for kind, size in bytes_by_memory().items()}

    assert added() == {"device": rest, "pinned_host": blocks}
    said = generate(model, ["abc"], recipe=TTQ, max_new_tokens=4)
    assert added()["pinned_host"] == blocks
    assert added()["device"] < rest + blocks / 8, "a few scalars, and no copy of a block"
    assert said.tokens == generate(load(tiny_model), ["abc"], recipe=TTQ, max_new_tokens=4).tokens


def test_another_word_and_a_device_that_cannot_are_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="expected device or host, got 'disk'"):
        check_memory("disk", None)
    with pytest.raises(CheckpointError, match="is for one device, and mesh was given, too"):
        check_memory("host", {"model": 2})
    monkeypatch.setattr(placing, "PINNED", "no_such_memory")
    with pytest.raises(CheckpointError, match=r"cpu has .* alone; load without dense_memory"):
        pinned_memory()
