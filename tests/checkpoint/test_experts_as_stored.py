"""Experts as files have them: one tensor each, two tensors of a layer, or GGUF's three forms."""

import jax
import numpy as np
import pytest
from parity import assert_same_logits
from safetensors.numpy import load_file, save_file
from tiny_gguf import header_of, tensors_of, tokenizer_header, write_gguf
from tiny_models import VOCAB, make_model, write_tokenizer

from ttq_jax.checkpoint import CheckpointError, load

TOKENS = np.random.default_rng(0).integers(2, VOCAB, (2, 12))
KINDS = {"qwen3-moe": "qwen3moe", "mixtral": "llama", "olmoe": "olmoe"}


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, load(one).params, load(other).params)


def saved(directory, variant, **how):
    """A checkpoint as transformers writes it; its model."""
    model = make_model(variant)
    model.save_pretrained(directory, **how)
    write_tokenizer(directory)
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def fused(request, tmp_path_factory):
    """(transformers' model, a directory as transformers holds it, one with a tensor per expert)."""
    place = tmp_path_factory.mktemp(request.param)
    saved(place / "split", request.param)
    model = saved(place / "fused", request.param, save_original_format=False)
    return model, place / "fused", place / "split"


def edited(directory, target, edit):
    """A copy of a checkpoint with other tensors."""
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = edit(load_file(directory / "model.safetensors"))
    save_file(tensors, target / "model.safetensors")
    return target


def test_fused_experts_are_the_split_ones(fused):
    model, directory, split = fused
    names = load_file(directory / "model.safetensors")
    assert {n.rpartition(".")[2] for n in names if ".experts." in n} == {
        "gate_up_proj", "down_proj",
    }  # fmt: skip
    same(directory, split)
    assert_same_logits(model, load(directory), TOKENS)


def turned(tensors):
    return {
        n: np.ascontiguousarray(t.swapaxes(1, 2)) if ".experts." in n else t
        for n, t in tensors.items()
    }


def test_either_order_of_axes_is_known_by_the_shapes(fused, tmp_path):
    _, directory, split = fused
    same(edited(directory, tmp_path / "turned", turned), split)


@pytest.mark.parametrize("transposed", [False, True])
def test_gate_and_up_of_a_model_as_wide_as_both(transposed, tmp_path, monkeypatch):
    """Then one tensor has one shape either way, and the other tells."""
    from tiny_models import VARIANTS

    kind, base = VARIANTS["qwen3-moe"]
    wide = base | {"moe_intermediate_size": base["hidden_size"] // 2}
    monkeypatch.setitem(VARIANTS, "here", (kind, wide))
    saved(tmp_path / "split", "here")
    saved(tmp_path / "fused", "here", save_original_format=False)
    directory = tmp_path / "fused"
    if transposed:
        directory = edited(directory, tmp_path / "turned", turned)
    shapes = {n: t.shape for n, t in load_file(directory / "model.safetensors").items()}
    assert shapes["model.layers.0.mlp.experts.gate_up_proj"] == (8, 64, 64)
    same(directory, tmp_path / "split")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("olmoe") / "fused"
    saved(directory, "olmoe", save_original_format=False)
    return directory


UP, DOWN = (f"model.layers.1.mlp.experts.{n}_proj" for n in ("gate_up", "down"))
ODD = {
    "missing-down": (lambda t: t.pop(DOWN), rf"missing tensor {DOWN}"),
    "missing-up": (lambda t: t.pop(UP), rf"missing tensor {UP}"),
    "fewer": (lambda t: t.update({UP: t[UP][:7]}), r"expected shapes \[8, 2·F, D\]"),
    "odd": (lambda t: t.update({UP: t[UP][:, :-1]}), rf"{UP} and {DOWN}: .* got \[8, 191, 64\]"),
    "flat": (lambda t: t.update({DOWN: t[DOWN].reshape(-1)}), rf"{DOWN}: expected shapes"),
    "unknown": (lambda t: t.update({f"{UP}_bias": t[UP][:, :, 0]}), rf"unknown tensor {UP}_bias"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_tensors_that_do_not_go_together_are_refused(name, olmoe, tmp_path):
    change, message = ODD[name]

    def edit(tensors):
        change(tensors)
        return {n: np.ascontiguousarray(t) for n, t in tensors.items()}

    with pytest.raises(CheckpointError, match=message):
        load(edited(olmoe, tmp_path / "odd", edit))


def one_by_one(tensors):
    """As llama.cpp's converter wrote them until April 2024."""
    out = {}
    for name, tensor in tensors.items():
        if "_exps." in name:
            for e, one in enumerate(tensor):
                out[name.replace("_exps.", f".{e}.")] = one
        else:
            out[name] = tensor
    return out


def gate_with_up(tensors):
    """As it writes them if asked to fuse both."""
    out = dict(tensors)
    for name in tensors:
        if ".ffn_gate_exps." in name:
            parts = [out.pop(name.replace("gate", n)) for n in ("gate", "up")]
            out[name.replace("gate_exps", "gate_up_exps")] = np.concatenate(parts, axis=1)
    return out


@pytest.mark.parametrize("form", [one_by_one, gate_with_up])
@pytest.mark.parametrize("variant", list(KINDS))
def test_all_forms_of_gguf_experts_are_one_model(variant, form, tmp_path):
    reference, arch = make_model(variant), KINDS[variant]
    header = header_of(reference, arch) | tokenizer_header(VOCAB)
    tensors = tensors_of(reference, arch)
    write_gguf(tmp_path / "m.gguf", arch, header, tensors)
    write_gguf(tmp_path / "n.gguf", arch, header, form(tensors))
    assert form(tensors).keys() != tensors.keys()
    same(tmp_path / "n.gguf", tmp_path / "m.gguf")


def test_a_missing_expert_is_named(tmp_path):
    reference = make_model("mixtral")
    header = header_of(reference, "llama") | tokenizer_header(VOCAB)
    tensors = one_by_one(tensors_of(reference, "llama"))
    del tensors["blk.1.ffn_up.3.weight"]
    write_gguf(tmp_path / "m.gguf", "llama", header, tensors)
    with pytest.raises(CheckpointError, match=r"missing tensor blk\.1\.ffn_up\.3\.weight"):
        load(tmp_path / "m.gguf")
