"""Weights in the host's memory: the same answers, and a device without dense blocks."""

import dataclasses
import functools
import gc
import math
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
from ttq_jax.mesh import make_mesh
from ttq_jax.offline.allocate import measure_widths
from ttq_jax.offline.calibrate import calibrate, prepare
from ttq_jax.partition import on, put, shard
from ttq_jax.prefill import first_turn
from ttq_jax.quant.head import joined
from ttq_jax.quant.presets import preset
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline, kernels, stored_bytes


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("host") / "tiny"))


CONFIG = small_config(n_layers=2, d_ff=64, vocab_size=98)
EXPERTS = small_config(n_layers=2, d_ff=64, vocab_size=98, n_experts=4, experts_per_token=2)
MESH = {"data": 2, "model": 2}


def both(config, sizes=None):
    """A model on the devices, and with its blocks in the host's memory."""
    params, mesh = small_params(config), sizes and make_mesh(sizes, config)
    tokenizer = SimpleNamespace(vocab_size=config.vocab_size, bos_id=None)
    how = {"config": config, "tokenizer": tokenizer, "name": "tiny", "eos_ids": (), "mesh": mesh}
    device = dict(params) if mesh is None else shard(params, mesh)
    return [Model(params=placed, **how) for placed in (device, in_host(params, mesh))]


pair = functools.cache(lambda experts, on_mesh: both(EXPERTS if experts else CONFIG,
                                                     MESH if on_mesh else None))  # fmt: skip
ON = pytest.mark.parametrize("on_mesh", slow_but([False, True], [False]), ids=["one", "mesh"])
TTQ = preset("ttq", bits=3, group_size=32)
MIXED = dataclasses.replace(TTQ, widths=(Width(select="layers/1/(q|down)", bits=4),))


def changed(recipe, **moments):
    return dataclasses.replace(recipe, moments=dataclasses.replace(recipe.source, **moments))


def answer(model, recipe, drafts=0, decay=False, rows=(13, 9), chunk=0):
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
    with on(model.mesh):
        prompts = put(jax.device_get(prompts_of(random_rows(rows), 16)), batch=True)
        out, counts, finite, *_ = generate_tokens(
            params, prompts, offline, *put((jax.random.key(0), np.int32(7))), config=model.config,
            recipe=recipe, sampling=Sampling(), capacity=8, eos_ids=(), drafts=drafts, chunk=chunk,
        )  # fmt: skip
    assert finite
    return out.tolist(), counts.tolist()


CASES = {
    "default": (preset("fast", group_size=32), {}),
    "quantized prefill, static low rank": (preset("paper", rank=4, group_size=32), {}),
    "second order": (preset("best", group_size=32), {}),
    "corpus": (preset("awq", group_size=32), {}),
    "unquantized": (None, {}),
    "speculation": (TTQ, {"drafts": 3}),
    "a prompt in parts": (TTQ, {"chunk": 8}),
    "a tree per prompt, mixed widths": (dataclasses.replace(MIXED, batch="per_prompt"), {}),
    "refresh in a conversation": (changed(TTQ, refresh=3, decay=0.5), {"decay": True}),
    "samples, some projections": (
        changed(
            dataclasses.replace(TTQ, select="layers/(q|up)"), prior="samples", prior_tokens=8.0
        ),
        {},
    ),
    "experts of mixed widths": (MIXED, {}),
    "experts, few tokens": (None, {"rows": (3,)}),
}  # fmt: skip


@ON
@pytest.mark.parametrize("case", slow_but(CASES, ["default"]))
def test_answers_are_the_same(case, on_mesh):
    recipe, how = CASES[case]
    models = pair(case.startswith("experts"), on_mesh)
    device, host = (answer(model, recipe, **how) for model in models)
    assert device == host


@pytest.mark.slow
@ON
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_measurements_are_the_same(experts, on_mesh):
    device, host = pair(experts, on_mesh)
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
        with on(model.mesh):
            return measure_widths(
                model.params, windows[:1], TTQ, prepare(model, TTQ), config=model.config,
                prompt_tokens=8, widths=(3,),
            ).errors  # fmt: skip

    near(widths)


@ON
def test_texts_are_scored_the_same(on_mesh):
    device, host = pair(False, on_mesh)
    window = np.asarray(random_rows([16])[0], np.int32)

    def scored(model):
        protocol = Protocol(kind="window", window=16)
        with on(model.mesh):
            return window_nll(model, window, recipe=TTQ, offline=Offline(), protocol=protocol)

    def compared(model):
        with on(model.mesh):
            return compare_window(
                model.params, put(window), Offline(), config=CONFIG, recipe=TTQ, length=8
            )

    assert scored(device) == pytest.approx(scored(host), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), compared(device), compared(host)
    )


@ON
def test_what_is_not_finite_is_found_in_the_hosts_memory(on_mesh):
    params, mesh = small_params(CONFIG), make_mesh(MESH, CONFIG) if on_mesh else None
    params["layers"]["up"]["kernel"] = params["layers"]["up"]["kernel"].at[1, 0, 0].set(jnp.nan)
    said = r"weights hold infinities or NaN in layer 1 \(up\)"
    with on(mesh), pytest.raises(NotFiniteError, match=said):
        raise_not_finite(
            in_host(params, mesh), prompts_of(random_rows([5]), 8), Offline(), config=CONFIG,
            recipe=None,
        )  # fmt: skip


def bytes_by_memory():
    """Bytes of the live arrays, of a mesh those of one device, by the kind of memory."""
    found = {"device": 0, "pinned_host": 0}
    for array in jax.live_arrays():
        found[array.sharding.memory_kind] += bytes_of_a_device(array)
    return found


def bytes_of_a_device(tree):
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("mesh", slow_but([None, MESH], [None]), ids=["one", "mesh"])
def test_the_device_holds_no_block(tiny_model, mesh):
    gc.collect()
    before = bytes_by_memory()
    model = load(tiny_model, dense_memory="host", mesh=mesh)
    stacks = kernels(model.params["layers"])
    blocks = bytes_of_a_device(stacks)
    assert blocks * (1 if mesh is None else 2) == stored_bytes(stacks)
    rest = bytes_of_a_device(model.params) - blocks

    def added():
        return {kind: size - before[kind] for kind, size in bytes_by_memory().items()}

    assert added() == {"device": rest, "pinned_host": blocks}
    recipe = preset("ttq", bits=3, group_size=8)
    said = generate(model, ["abc"], recipe=recipe, max_new_tokens=4)
    assert added()["pinned_host"] == blocks
    assert added()["device"] < rest + blocks / 8, "a few scalars, and no copy of a block"
    near = load(tiny_model, mesh=mesh)
    assert said.tokens == generate(near, ["abc"], recipe=recipe, max_new_tokens=4).tokens


def test_another_word_and_a_device_that_cannot_are_refused(monkeypatch):
    with pytest.raises(CheckpointError, match="expected device or host, got 'disk'"):
        check_memory("disk")
    monkeypatch.setattr(placing, "PINNED", "no_such_memory")
    with pytest.raises(CheckpointError, match=r"cpu has .* alone; load without dense_memory"):
        pinned_memory()
    with pytest.raises(CheckpointError, match=r"cpu has .* alone; load without dense_memory"):
        in_host({}, make_mesh(MESH, CONFIG))
