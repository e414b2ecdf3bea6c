"""Models and stores on a mesh: read by one process or by two, and moved to another mesh."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from compilers import QUICKLY
from tiny_files import write_model
from two_processes import answers

from ttq_jax.checkpoint import load, store
from ttq_jax.checkpoint.fingerprint import fingerprint
from ttq_jax.config import ConfigError
from ttq_jax.generate import generate
from ttq_jax.linear import dense_weight
from ttq_jax.offline.calibrate import prepare
from ttq_jax.partition import param_specs
from ttq_jax.quant.presets import preset
from ttq_jax.quant.source import Source
from ttq_jax.types import kernels

RTN = preset("rtn", bits=3, group_size=8, select="layers/(q|down)")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("head", [None, 8])
def test_a_model_lies_on_its_mesh_with_the_numbers_that_it_has_on_one_device(path, head):
    alone, model = load(path, head=head), load(path, head=head, mesh={"data": 2, "model": 4})
    assert model.mesh.size == 8
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.leaves(model.params), jax.tree.leaves(alone.params)
    )
    specs = jax.tree.leaves(param_specs(model.params))
    for array, spec in zip(jax.tree.leaves(model.params), specs, strict=True):
        wanted = jax.sharding.NamedSharding(model.mesh, spec)
        assert array.sharding.is_equivalent_to(wanted, array.ndim)
    assert fingerprint(model) == fingerprint(alone)


def test_a_store_is_loaded_onto_another_mesh(path, tmp_path):
    models = [load(path, mesh=mesh) for mesh in (None, {"model": 4}, {"model": 2})]
    want = kernels(prepare(models[0], RTN).packed["layers"])
    for saver in models[:2]:
        place = tmp_path / str(saver.mesh is None)
        store.save_offline(place, saver, RTN, prepare(saver, RTN))
        for model in models:
            packed = store.load_offline(place, model, RTN).packed
            for name in ("q", "down"):
                kernel = kernels(packed["layers"])[name]
                shares = 1 if model.mesh is None else model.mesh.size
                assert kernel.row_blocks == (shares if name == "down" else 1)
                np.testing.assert_array_equal(dense_weight(kernel), dense_weight(want[name]))
                if model.mesh is not None:
                    part = kernel.planes[0].addressable_shards[0].data
                    assert part.size * shares == kernel.planes[0].size
    spec = json.loads((tmp_path / "True" / "ttq.json").read_text())["tree"]
    assert "row_blocks" not in json.dumps(spec), "a store of one device is as it always was"
    wide = preset("rtn", bits=3, group_size=32, select="layers/(q|down)")
    store.save_offline(tmp_path / "wide", models[0], wide, prepare(models[0], wide))
    with pytest.raises(ConfigError, match="4 devices share the 96 input channels of down"):
        store.load_offline(tmp_path / "wide", models[1], wide)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("memory", "question"), [("device", "halves"), ("host", "halves"), ("host", "copies")]
)
def test_two_processes_answer_as_one_device(path, memory, question):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).parent.parent / "two_processes.py"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    both = [
        subprocess.Popen(
            [sys.executable, script, port, rank, path, memory, question], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | QUICKLY | flags,
        )
        for rank in "01"
    ]  # fmt: skip
    done = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], done[0][1][-2000:]
    said = [json.loads(out.splitlines()[-1]) for out, _ in done]
    model = load(path)
    assert [one["tokens"] for one in said] == [answers(model, question)] * 2
    held = sum(a.size for a in jax.tree.leaves(model.params))
    share = 0.6 if question == "halves" else 1.1
    assert all(one["held"] < share * held for one in said), "a process holds its own parts"


@pytest.mark.slow
def test_a_conversation_goes_on_on_a_mesh(path, tmp_path):
    recipe = preset("ttq", group_size=8, select="layers/down", moments=Source(decay=0.5))
    model, shared = load(path), load(path, mesh={"model": 4})
    first = generate(model, ["Hello"], recipe=recipe, max_new_tokens=4)
    store.save_conversation(tmp_path / "kept", model, recipe, first.moments)

    def second(model):
        carried = store.load_conversation(tmp_path / "kept", model, recipe)
        offline = dataclasses.replace(prepare(model, recipe), carried=carried)
        return generate(model, ["Go on"], recipe=recipe, offline=offline, max_new_tokens=4)

    alone, other = second(model), second(shared)
    assert other.tokens == alone.tokens
    for one, same in zip(*map(jax.tree.leaves, (alone.moments, other.moments)), strict=True):
        np.testing.assert_allclose(same, one, rtol=1e-4)
