"""A store whose description somebody wrote, with a right checksum: it has to fit what is there."""

import json
import os

import numpy as np
import pytest
from stores import CASES, CHAT, MODEL, changed, offline_of, refused

from ttq_jax.checkpoint import store_files
from ttq_jax.checkpoint.store import (
    load_conversation,
    load_offline,
    save_conversation,
    save_offline,
)
from ttq_jax.prefill import first_turn


def nodes(spec):
    """Every object of a description."""
    if isinstance(spec, dict):
        yield spec
        for one in spec.values():
            yield from nodes(one)
    elif isinstance(spec, list):
        for one in spec:
            yield from nodes(one)


def rewrite(place, change):
    """Changes a store's description, and makes its checksum right again."""
    path = place / "ttq.json"
    header = json.loads(path.read_text())
    change(header)
    header["sha256"] = store_files._digest_of(header)
    path.write_text(json.dumps(header))


def set_static(name, value):
    def change(header):
        for node in nodes(header["tree"]):
            if name in node.get("static", {}):
                node["static"][name] = value

    return change


def set_array(name, value):
    def change(header):
        for node in nodes(header["tree"]):
            if "array" in node:
                node[name] = value(node[name])

    return change


def swap_two_arrays(header):
    (fields, *_) = [
        n["fields"] for n in nodes(header["tree"]) if n.get("node") == "QuantizedLinear"
    ]
    (first, zeros) = fields["planes"]["tuple"][0], fields["zeros"]
    first["array"], zeros["array"] = zeros["array"], first["array"]


def forget_a_kernel(header):
    header["tree"]["fields"]["packed"]["dict"].popitem()


def rename_a_kernel(header):
    kernels = header["tree"]["fields"]["packed"]["dict"]
    kernels["embed"] = kernels.pop("q")
    for node in nodes(kernels["embed"]):
        if "array" in node:
            node["array"] = node["array"].replace("packed.q.", "packed.embed.")


@pytest.mark.parametrize("case", ["rtn", "awq, widths"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_static("bits", 5), "other sizes, bits or groups"),
        (set_static("bits", 7), "other sizes, bits or groups"),
        (set_static("group_size", 0), "other sizes, bits or groups"),
        (set_static("group_size", 32), "other sizes, bits or groups"),
        (set_static("d_in", 16), "other sizes, bits or groups"),
        (set_static("d_out", 2**31 - 1), "other sizes, bits or groups"),
        (set_array("shape", lambda old: [*old[:-1], 2 * old[-1]]), "other sizes, bits or groups"),
        (set_array("shape", lambda old: []), "is no packed weight|other sizes"),
        (set_array("dtype", lambda old: "float16"), "is no packed weight"),
        (swap_two_arrays, "an array has the name of another place"),
        (forget_a_kernel, "is only selected"),
        (rename_a_kernel, "'embed' is only in the store"),
    ],
)
def test_packed_weights_fit_the_recipe_and_the_model(tmp_path, case, change, says):
    save_offline(tmp_path / "s", MODEL, CASES[case], offline_of(case))
    rewrite(tmp_path / "s", lambda header: None)
    load_offline(tmp_path / "s", MODEL, CASES[case])
    rewrite(tmp_path / "s", change)
    refused(says, load_offline, tmp_path / "s", MODEL, CASES[case])


@pytest.fixture
def conversation(tmp_path):
    moments = first_turn(MODEL.params, MODEL.config, CHAT)
    save_conversation(tmp_path / "c", MODEL, CHAT, moments)
    return tmp_path / "c"


@pytest.mark.parametrize(
    "change",
    [
        # Orbax fills up what is not there, and cuts off what is not asked for.
        set_array("shape", lambda old: [*old[:-1], 2 * old[-1]]),
        set_array("shape", lambda old: [*old[:-1], 2**31 - 1]),
        set_array("shape", lambda old: [*old[:-1], max(1, old[-1] // 2)]),
        set_array("dtype", lambda old: "int8"),
        set_array("dtype", lambda old: "V1000000000"),
        set_array("array", lambda old: f"{old}.other"),
    ],
)
def test_arrays_are_those_that_are_there(conversation, change):
    rewrite(conversation, change)
    says = r"the array '.*' is described as .*, found|an array has the name of another place"
    refused(says, load_conversation, conversation, MODEL, CHAT)


def test_files_of_a_store_are_files(conversation):
    os.mkfifo(conversation / "arrays" / "pipe")
    claim = {"bytes": 0, "sha256": ""}
    rewrite(conversation, lambda header: header["files"].update({"arrays/pipe": claim}))
    refused("arrays/pipe is a directory, a pipe", load_conversation, conversation, MODEL, CHAT)


@pytest.mark.parametrize("name", ["x" * 5000, "a" * 150])
def test_messages_quote_little(conversation, name):
    def change(header):
        header["files"][name] = {"bytes": 0, "sha256": ""}

    rewrite(conversation, change)
    refused(r"^.{10,400}$", load_conversation, conversation, MODEL, CHAT)
    rewrite(conversation, lambda header: header["model"].update(name=name * 10, fingerprint="0"))
    refused(r"^.{10,400}$", load_conversation, conversation, MODEL, CHAT)


def test_sound_moments_load(conversation):
    found = load_conversation(conversation, MODEL, CHAT)
    expected = first_turn(MODEL.params, MODEL.config, CHAT)
    assert changed(found["attn_in"], gram=None).powers == expected["attn_in"].powers
    np.testing.assert_array_equal(found["attn_in"].sums, expected["attn_in"].sums)
