"""Tables that are packed while they are read: the same bits, fingerprint and texts."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_files import VOCAB, WIDTH, tensors, write_model

from ttq_jax.checkpoint import CheckpointError, assemble, load, placing
from ttq_jax.checkpoint.store import fingerprint, load_offline, save_offline
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.perplexity import Protocol, perplexity
from ttq_jax.generate import generate
from ttq_jax.offline.calibrate import prepare, with_head
from ttq_jax.quant.head import head_bits, pack_head
from ttq_jax.quant.presets import preset
from ttq_jax.stream import stream

RTN = preset("rtn", head=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tied")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    place = write_model(tmp_path_factory.mktemp("models") / "untied")
    head = np.random.default_rng(1).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    save_file(tensors() | {"lm_head.weight": head}, str(place / "model.safetensors"))
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("which", ["tiny", "untied"])
def test_the_bits_and_the_fingerprint_are_those_of_the_dense_model(
    which, bits, dtype, request, monkeypatch
):
    path = request.getfixturevalue(which)
    dense = load(path, dtype=dtype)
    largest = []
    allocate = placing.allocate
    monkeypatch.setattr(assemble, "BLOCK", 100)  # 264 tokens: the last block begins early
    for module in (assemble, placing):
        monkeypatch.setattr(
            module, "allocate", lambda shape, d: largest.append((shape, d)) or allocate(shape, d)
        )
    told = []
    packed = load(path, dtype=dtype, head=bits, progress=lambda *now: told.append(now))
    want = jax.jit(pack_head, static_argnames="bits")(dense.params, bits=bits)
    jax.tree.map(np.testing.assert_array_equal, {n: packed.params[n] for n in want}, want)
    assert packed.dtype == dense.dtype == dtype
    assert fingerprint(packed) == fingerprint(dense)
    assert fingerprint(with_head(dense, preset("ttq", head=bits))) == fingerprint(dense)
    assert {done for done, *_ in told} <= set(range(told[-1][1] + 1))
    # No dense table was ever there as a whole.
    sizes = [shape for shape, d in largest if VOCAB in shape and d != np.uint8 and len(shape) > 1]
    assert not sizes


def test_a_changed_weight_changes_the_fingerprint(tiny, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    assert fingerprint(load(other, head=8)) != fingerprint(load(tiny, head=8))


def test_everything_runs_the_same_on_it(tiny):
    dense, packed = load(tiny), load(tiny, head=8)
    windows = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)
    for recipe in (preset("fast", select="layers/down"), RTN):
        offline = prepare(dense, recipe)
        assert head_bits(offline.head) == 8
        assert prepare(packed, recipe).head is None
        protocol = Protocol(window=24, prompt_tokens=12)
        a, b = (perplexity(m, windows, recipe=recipe, protocol=protocol) for m in (dense, packed))
        assert a.nll == b.nll
        assert a.bytes_per_token == b.bytes_per_token
        made = [generate(dense, ["ab", "cd"], recipe=recipe, offline=offline, max_new_tokens=4),
                generate(packed, ["ab", "cd"], recipe=recipe, max_new_tokens=4)]  # fmt: skip
        assert made[0].tokens == made[1].tokens
        assert made[0].bytes_per_token == made[1].bytes_per_token == a.bytes_per_token
    last = stream(dense, "cd", recipe=RTN, max_new_tokens=4)
    assert "".join(last) == made[0].texts[1]
    with pytest.raises(ConfigError, match=r"packed in 8 bits.*head=None.*head=8"):
        generate(packed, ["ab"], recipe=None)
    with pytest.raises(CheckpointError, match="head: expected one of 2, 3, 4, 5, 8, or None"):
        load(tiny, head=7)


def test_a_store_serves_both_and_holds_no_table(tiny, tmp_path):
    dense, packed = load(tiny), load(tiny, head=8)
    offline = prepare(dense, RTN)
    save_offline(tmp_path / "store", dense, RTN, offline)
    header = json.loads((tmp_path / "store" / "ttq.json").read_text())
    assert header["recipe"]["head"] == 8
    assert header["tree"]["fields"]["head"] is None
    texts = []
    for model in (dense, packed):
        again = load_offline(tmp_path / "store", model, RTN)
        assert head_bits(again.packed) == 8
        assert (head_bits(again.head) == 8) == (model is dense)
        texts.append(generate(model, ["ab"], recipe=RTN, offline=again, max_new_tokens=4).tokens)
    assert texts[0] == texts[1]
    # The blocks do not depend on the tables' width, nor on whether older stores name it.
    other = load_offline(tmp_path / "store", dense, dataclasses.replace(RTN, head=None))
    assert other.head is None
    assert head_bits(other.packed) is None
    with pytest.raises(ConfigError, match="packed in 8 bits"):
        load_offline(tmp_path / "store", packed, preset("rtn"))
