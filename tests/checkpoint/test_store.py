"""Stores: what comes back is what was saved, bit for bit, and nothing else comes back."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small import prompts_of, random_rows, small_config, small_params

from ttq_jax.calibrate import calibrate, prepare
from ttq_jax.checkpoint import CheckpointError, store_files
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.store import (
    StoreError,
    fingerprint,
    load_conversation,
    load_offline,
    save_conversation,
    save_offline,
)
from ttq_jax.generate import generate_tokens
from ttq_jax.prefill import first_turn
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.lowrank import LowRankRule, stored_factors
from ttq_jax.quant.recipe import Recipe, preset
from ttq_jax.quant.scaling import NoScale, PowerLaw
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import Sampling
from ttq_jax.types import LowRank, MixedLinear, Offline, QuantizedLinear, kernels

CONFIG = small_config(d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=48, embed_dim=32)


def made(params, config=CONFIG, name="tiny"):
    return Model(
        config=config, params=params, tokenizer=SimpleNamespace(vocab_size=97), name=name,
        eos_ids=(),
    )  # fmt: skip


MODEL = made(small_params(CONFIG))
WINDOWS = np.asarray(random_rows([24, 24], seed=5), np.int32)
PROMPT = prompts_of(random_rows([11]), 16)
LATER = prompts_of(random_rows([7], seed=3), 16)

# Nearly all the time here is XLA's, compiling `generate_tokens`: few projections, and few recipes
# that are decoded with, which the cases share where they can.
FEW = "layers/(q|down)"
RTN = preset("rtn", bits=3, group_size=16, select=FEW)
INT8 = LowRankRule(rank=4, store="int8")
CORPUS = Source(prior="corpus", prior_tokens=64.0)
CHAT = Recipe(
    moments=dataclasses.replace(CORPUS, decay=0.5), low_rank=INT8, select="layers/q"
)  # fmt: skip
ROUNDING = SecondOrder(steps=2, span=16)


def decoded(recipe, offline, prompt=PROMPT, model=MODEL):
    """(Tokens, moments) of the one program."""
    # Of a packed tree's recipe nothing is read: without it, trees of one form share a program.
    recipe = recipe if offline.packed is None else None
    if recipe and recipe.source.decay and not offline.carried:
        begin = first_turn(model.params, model.config, recipe)
        offline = dataclasses.replace(offline, carried=begin)
    out, _, moments = generate_tokens(
        model.params, prompt, offline, jax.random.key(0), jnp.asarray(6, jnp.int32),
        config=model.config, recipe=recipe, sampling=Sampling(), capacity=6, eos_ids=(),
    )  # fmt: skip
    return np.asarray(out).tolist(), moments


def same_bits(a, b) -> bool:
    """Whether two trees are the same in structure, static fields, types, shapes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        (x.dtype, x.shape, np.asarray(x).tobytes()) == (y.dtype, y.shape, np.asarray(y).tobytes())
        for x, y in leaves
    )


CASES = {
    "rtn": RTN,
    "gptq": preset("gptq", bits=3, group_size=16, select=FEW),
    "awq, widths": preset(
        "awq", bits=3, group_size=16, select=FEW, widths=(Width(select="layers/1/down", bits=2),)
    ),
    "factors": preset("ttq", rank=4, group_size=16, select="layers/q"),
    "prior, int8 factors": CHAT,
    "gram": Recipe(moments=CORPUS, rounding=ROUNDING, select="layers/q"),
    "prior from weights": Recipe(moments=Source(prior="weights", prior_tokens=8.0)),
    "weighted factors": Recipe(
        moments=CORPUS, low_rank=LowRankRule(rank=4, weighted=True), select="layers/q"
    ),
    "packed int8 factors": dataclasses.replace(RTN, low_rank=INT8),
    "everything, symmetric": preset("rtn", bits=5, group_size=16, symmetric=True),
    "integer zero points": preset("rtn", zero_point="integer", select=FEW),
}  # fmt: skip
DECODED = ("rtn", "gptq", "awq, widths", "factors", "prior, int8 factors")


@cache
def offline_of(case: str) -> Offline:
    recipe = CASES[case]
    offline = prepare(MODEL, recipe, WINDOWS)
    if recipe.low_rank.store != "int8" or not offline.low_rank:
        return offline
    # As a packed weight keeps them, with scales.
    kept = {n: stored_factors(f, INT8, "bfloat16") for n, f in offline.low_rank.items()}
    return dataclasses.replace(offline, low_rank=kept)


@pytest.mark.parametrize("case", CASES)
def test_what_is_restored_decodes_as_before(tmp_path, case):
    recipe, offline = CASES[case], offline_of(case)
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    restored = load_offline(tmp_path / "store", MODEL, recipe)
    assert same_bits(restored, offline)
    if case in DECODED:
        assert decoded(recipe, restored)[0] == decoded(recipe, offline)[0]


def test_the_cases_hold_every_kind_of_thing():
    trees = [offline_of(case) for case in CASES]
    assert {str(a.dtype) for a in jax.tree.leaves(trees)} >= {
        "bfloat16", "float32", "int8", "uint8", "int32"
    }  # fmt: skip
    packed = [k for t in trees if t.packed for k in kernels(t.packed["layers"]).values()]
    assert {type(k) for k in packed} > {QuantizedLinear, MixedLinear}
    assert any(t.moments and t.moments["attn_in"].gram is not None for t in trees)


def test_a_packed_tree_does_not_store_the_model_again(tmp_path):
    save_offline(tmp_path / "store", MODEL, RTN, offline_of("rtn"))
    header = json.loads((tmp_path / "store" / "ttq.json").read_text())
    assert header["recipe"]["grid"]["bits"] == 3
    packed = header["tree"]["fields"]["packed"]["dict"]
    assert set(packed) == {"q", "down"}
    assert packed["down"]["static"] == {"bits": 3, "group_size": 16, "d_in": 48, "d_out": 32}
    restored = load_offline(tmp_path / "store", MODEL, RTN).packed
    for name in ("embed", "final_norm"):
        for a, b in zip(
            jax.tree.leaves(restored[name]), jax.tree.leaves(MODEL.params[name]), strict=True
        ):
            assert a is b
    assert restored["layers"]["up"]["kernel"] is MODEL.params["layers"]["up"]["kernel"]


def test_a_conversation_goes_on_where_it_was(tmp_path):
    begin = offline_of("prior, int8 factors")
    _, moments = decoded(CHAT, begin)
    save_conversation(tmp_path / "chat", MODEL, CHAT, moments)
    restored = load_conversation(tmp_path / "chat", MODEL, CHAT)
    assert same_bits(restored, moments)
    second, after = decoded(CHAT, dataclasses.replace(begin, carried=moments), LATER)
    again, after_again = decoded(CHAT, dataclasses.replace(begin, carried=restored), LATER)
    assert again == second and same_bits(after, after_again)
    assert not same_bits(after, decoded(CHAT, begin, LATER)[1])


def test_moments_without_a_power_are_restored(tmp_path):
    recipe = CASES["gptq"]
    offline = Offline(moments=calibrate(MODEL, WINDOWS, recipe.reads))
    assert offline.moments["attn_in"].sums.shape == (2, 0, 32)
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    assert same_bits(load_offline(tmp_path / "store", MODEL, recipe), offline)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint8"])
def test_every_bit_pattern_of_a_type_survives(tmp_path, dtype):
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(dtype)
    size = dtype.itemsize
    # Not a number, infinities, subnormals and minus zero are among 65536 random patterns.
    patterns = rng.integers(0, 256, (2, 32 * 32, 32, size), np.uint8)
    patterns[0, 0, 0] = 0
    patterns[0, 0, 0, -1] = 128
    a = jnp.asarray(patterns.view(dtype)[..., 0])
    assert np.asarray(a).tobytes() == patterns.tobytes()
    recipe = Recipe(low_rank=LowRankRule(rank=4))
    offline = Offline(low_rank={"q": LowRank(a, a[:, :3], down_scale=a[0, 0], up_scale=None)})
    save_offline(tmp_path / "store", MODEL, recipe, offline)
    assert same_bits(load_offline(tmp_path / "store", MODEL, recipe), offline)


def test_an_empty_store_is_a_store(tmp_path):
    save_offline(tmp_path / "store", MODEL, Recipe(), Offline())
    assert same_bits(load_offline(tmp_path / "store", MODEL, Recipe()), Offline())


# What else is there


def refused(pattern, load, *args, **kwargs):
    with pytest.raises(StoreError, match=pattern) as caught:
        load(*args, **kwargs)
    assert isinstance(caught.value, CheckpointError)
    assert "\n" not in str(caught.value)


def changed(value, **changes):
    return dataclasses.replace(value, **changes)


PRIOR = CASES["gram"]
FACTORS = CASES["factors"]


@pytest.mark.parametrize(
    ("case", "recipe", "pattern"),
    [
        ("rtn", changed(RTN, batch="per_prompt", prefill="quantized"), None),
        ("rtn", changed(RTN, grid=Grid(bits=4, group_size=16)), "grid.bits is 3 there and 4 here"),
        ("rtn", changed(RTN, select="layers/q"), "select is layers/"),
        ("rtn", changed(RTN, widths=(Width(select="layers/q", bits=3),)), "widths is"),
        ("rtn", changed(RTN, rounding=ClipSearch()), "rounding.rule is nearest there and clip"),
        ("rtn", CASES["gptq"], "moments.of is none there and corpus here"),
        ("rtn", PRIOR, "moments.of is none there and prompt here"),
        ("gram", changed(PRIOR, moments=changed(CORPUS, prior_tokens=float("inf"))), None),
        ("gram", changed(PRIOR, moments="corpus"), None),
        ("gram", changed(PRIOR, grid=Grid(bits=2), select="layers/.*"), None),
        ("gram", changed(PRIOR, moments=Source(prior="weights", prior_tokens=64.0)),
         "origin of the moments is corpus there and weights here"),
        ("gram", changed(PRIOR, moments="prompt"), "corpus there and none here"),
        ("gram", changed(PRIOR, rounding=changed(ROUNDING, span=8)),
         "hold .*Gram blocks of 16x16, but the recipe reads .*Gram blocks of 8"),
        ("gram", changed(PRIOR, scale=PowerLaw(p=1.0)), "hold powers .*the recipe reads powers"),
        ("gram", changed(PRIOR, low_rank=LowRankRule(rank=4)), "low_rank.rank is 0 there and 4"),
        ("factors", changed(FACTORS, grid=Grid(bits=3)), None),
        ("factors", changed(FACTORS, low_rank=LowRankRule(rank=4, error_rank=2)), None),
        ("factors", changed(FACTORS, low_rank=LowRankRule(rank=5)), "rank is 4 there and 5 here"),
        ("factors", changed(FACTORS, low_rank=LowRankRule()), "rank is 4 there and 0 here"),
        ("factors", changed(FACTORS, low_rank=INT8), "low_rank.store is float there and int8"),
        ("factors", changed(FACTORS, grid=Grid(store_dtype="float32")), "grid.store_dtype is"),
        ("factors", changed(FACTORS, select="layers/.*"), "select is"),
        ("weighted factors", changed(FACTORS, moments=CORPUS), "low_rank.weighted is True there"),
        ("weighted factors", changed(CASES["weighted factors"], scale=NoScale()), None),
    ],
)  # fmt: skip
def test_another_recipe_is_refused_where_it_matters(tmp_path, case, recipe, pattern):
    save_offline(tmp_path / "store", MODEL, CASES[case], offline_of(case))
    if pattern is None:
        load_offline(tmp_path / "store", MODEL, recipe)
    else:
        refused(pattern, load_offline, tmp_path / "store", MODEL, recipe)


def test_a_conversation_is_refused_by_a_recipe_that_reads_something_else(tmp_path, chat):
    load_conversation(chat, MODEL, changed(CHAT, grid=Grid(bits=2), prefill="quantized"))
    second = changed(CHAT, rounding=ROUNDING)
    refused("attn_in hold powers .2.0,. and no Gram", load_conversation, chat, MODEL, second)


def test_what_a_recipe_needs_is_saved_or_nothing_is(tmp_path):
    place = tmp_path / "store"
    other = offline_of("prior from weights")
    for recipe, offline, pattern in (
        (FACTORS, Offline(), "not saved: the recipe needs static factors of rank 4"),
        (PRIOR, Offline(), "needs a corpus's or a prior's moments"),
        (PRIOR, other, "hold powers .* but the recipe reads"),
        (
            CHAT,
            Offline(carried=offline_of("gram").moments),
            "hold powers .* the recipe reads",
        ),
    ):
        refused(pattern, save_offline, place, MODEL, recipe, offline)
    refused("only a recipe with moments.decay", save_conversation, place, MODEL, CHAT, {})
    refused("hold", save_conversation, place, MODEL, CHAT, offline_of("gram").moments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def chat(tmp_path):
    """A small store: a conversation that has not begun."""
    save_conversation(tmp_path / "c", MODEL, CHAT, first_turn(MODEL.params, CONFIG, CHAT))
    return tmp_path / "c"


def test_kinds_are_not_mixed_up(tmp_path, chat):
    refused("expected what a recipe needs .*it holds the moments of a conv", load_offline, chat,
            MODEL, CHAT)  # fmt: skip
    save_offline(tmp_path / "o", MODEL, RTN, offline_of("rtn"))
    refused("expected the moments of a conv.*it holds what", load_conversation, tmp_path / "o",
            MODEL, CHAT)  # fmt: skip


def test_another_model_is_refused(chat):
    bfloat16 = jax.tree.map(lambda a: a.astype(jnp.bfloat16), MODEL.params)
    for other, pattern in (
        (made(small_params(CONFIG, seed=1)), "other weights or another config of tiny in float32"),
        (made(bfloat16), "made for tiny in float32, not for tiny in bfloat16"),
        (made(small_params(CONFIG, seed=1), name="else"), "not for else in float32"),
        (made(MODEL.params, changed(CONFIG, query_scale=0.5)), "another config of tiny"),
    ):
        refused(f"{pattern}.*load that model", load_conversation, chat, other, CHAT)
    load_conversation(chat, made(MODEL.params, name="the same under another name"), CHAT)


def test_the_fingerprint_sees_every_array_and_no_device():
    ours = fingerprint(MODEL)
    assert fingerprint(made(jax.tree.map(np.asarray, MODEL.params))) == ours
    leaves, structure = jax.tree.flatten(MODEL.params)
    assert max(leaf.size for leaf in leaves) > 3 * 1024, "some arrays are only sampled"
    seen = {ours}
    for i, leaf in enumerate(leaves):
        trained = leaf + 1e-3 * jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
        seen.add(fingerprint(made(structure.unflatten([*leaves[:i], trained, *leaves[i + 1 :]]))))
    assert len(seen) == 1 + len(leaves)
    for axis in range(3):  # one layer, row or column of a kernel alone
        down = MODEL.params["layers"]["down"]["kernel"]
        at = tuple(1 if i == axis else slice(None) for i in range(3))
        layers = MODEL.params["layers"] | {"down": {"kernel": down.at[at].mul(1.01)}}
        seen.add(fingerprint(made(MODEL.params | {"layers": layers})))
    assert len(seen) == 4 + len(leaves)


def edited(place: Path, **changes):
    """Changes keys of ttq.json as another version of this program would have written them."""
    header = json.loads((place / "ttq.json").read_text()) | changes
    header["sha256"] = store_files._digest_of(header)
    (place / "ttq.json").write_text(json.dumps(header))


def test_other_versions_of_the_format_say_what_to_do(chat):
    ours = store_files.VERSION
    for version, pattern in (
        (ours - 1, f"format version {ours - 1}, written by ttq-jax 0.0.9, is older than.*anew"),
        (None, "format version None, written by ttq-jax 0.0.9, is older"),
        (ours + 1, f"format version {ours + 1}, .* is newer than version {ours}.*upgrade ttq-jax"),
    ):
        edited(chat, version=version, ttq_jax="0.0.9")
        refused(pattern, load_conversation, chat, MODEL, CHAT)
    edited(chat, version=ours)
    load_conversation(chat, MODEL, CHAT)


def test_a_changed_description_is_refused(chat):
    whole = (chat / "ttq.json").read_text()
    for text, pattern in (
        (whole.replace('"powers": [\n      2.0', '"powers": [\n      1.0'), "digest does not fit"),
        ("[]", "expected an object"),
        ("", "damaged"),
        ('{"format": "x"}', "not ttq-jax's .expected format"),
    ):
        assert text != whole
        (chat / "ttq.json").write_text(text)
        refused(pattern, load_conversation, chat, MODEL, CHAT)
    (chat / "ttq.json").write_bytes(b"\xff\xfe{}")
    refused("damaged", load_conversation, chat, MODEL, CHAT)
    (chat / "ttq.json").write_text(whole)
    edited(chat, tree={"node": "Unheard", "static": {}, "fields": {}})
    refused("describes no tree that this ttq-jax knows", load_conversation, chat, MODEL, CHAT)


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    for name, pattern in (
        ("nowhere", "no such directory"), ("empty", "has no ttq.json"), ("file", "Not a directory")
    ):  # fmt: skip
        refused(pattern, load_offline, tmp_path / name, MODEL, RTN)
        refused(pattern, load_conversation, str(tmp_path / name), MODEL, CHAT)


def test_every_file_is_needed_whole(tmp_path, chat):
    files = [file.relative_to(chat) for file in sorted(chat.rglob("*")) if file.is_file()]
    assert len(files) > 5 and Path("ttq.json") in files
    # A store that lost any of its folders, too.
    folders = [folder.relative_to(chat) for folder in chat.rglob("*") if folder.is_dir()]
    for i, folder in enumerate(f for f in folders if any((chat / f).rglob("*"))):
        broken = shutil.copytree(chat, tmp_path / f"folder{i}")
        shutil.rmtree(broken / folder)
        refused("missing", load_conversation, broken, MODEL, CHAT)
    for name in files:
        broken = shutil.copytree(chat, tmp_path / "broken")
        file, whole = broken / name, (chat / name).read_bytes()
        file.unlink()
        refused("missing|has no ttq.json", load_conversation, broken, MODEL, CHAT)
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        for content in (b"", whole[:middle], whole[:-1], whole + b"x", flipped):
            file.write_bytes(content)
            refused("damaged|not ttq-jax's|format version", load_conversation, broken, MODEL, CHAT)
        file.write_bytes(whole)
        load_conversation(broken, MODEL, CHAT)
        shutil.rmtree(broken)


# Saving


def test_a_store_is_replaced_by_a_store(tmp_path):
    place = tmp_path / "new" / "store"
    for case in ("rtn", "gram", "rtn"):
        save_offline(place, MODEL, CASES[case], offline_of(case))
        assert same_bits(load_offline(place, MODEL, CASES[case]), offline_of(case))
    assert [p.name for p in place.parent.iterdir()] == ["store"]


def test_what_is_not_ours_is_not_replaced(tmp_path, chat):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1").write_text("…")
    (tmp_path / "ttq.json").write_text("{}")
    (chat / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for place in (foreign, foreign / "chapter1", chat, tmp_path, Path("/")):
        refused("not replaced; choose another", save_offline, place, MODEL, RTN, offline_of("rtn"))
    refused("could not be written", save_offline, foreign / "chapter1" / "x", MODEL, RTN,
            offline_of("rtn"))  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    save_offline(tmp_path / "empty", MODEL, RTN, offline_of("rtn"))
    assert load_offline(tmp_path / "empty", MODEL, RTN).packed is not None


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["_write_arrays", "_file_digest", "_move"])
@pytest.mark.parametrize("cleaned", [True, False], ids=["interrupted", "killed"])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, chat, monkeypatch, at, cleaned):
    before = load_conversation(chat, MODEL, CHAT)
    later = jax.tree.map(jnp.ones_like, before)
    with monkeypatch.context() as patch:
        patch.setattr(store_files, at, interrupt)
        if not cleaned:  # a killed process tidies nothing up
            patch.setattr(store_files.shutil, "rmtree", lambda *_, **__: None)
        for place in (chat, tmp_path / "fresh"):
            with pytest.raises(KeyboardInterrupt):
                save_conversation(place, MODEL, CHAT, later)
    assert same_bits(load_conversation(chat, MODEL, CHAT), before)
    assert not (tmp_path / "fresh").exists()
    drafts = sorted(p.name for p in tmp_path.iterdir() if p != chat)
    assert len(drafts) == (0 if cleaned else 2)
    assert all(name.startswith(".") for name in drafts)
    if at != "_move":
        for name in drafts:
            refused("has no ttq.json", load_conversation, tmp_path / name, MODEL, CHAT)
    save_conversation(chat, MODEL, CHAT, later)
    assert same_bits(load_conversation(chat, MODEL, CHAT), later)


def test_a_rename_that_fails_puts_the_old_store_back(tmp_path, chat, monkeypatch):
    before = load_conversation(chat, MODEL, CHAT)
    rename = Path.rename

    def no_draft(self, target):
        if self.suffix == ".saving":
            raise PermissionError("not here")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", no_draft)
    refused("could not be written: not here", save_conversation, chat, MODEL, CHAT, before)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert same_bits(load_conversation(chat, MODEL, CHAT), before)


def test_what_orbax_refuses_is_said(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left\nand much more")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    place = tmp_path / "s"
    refused("s: could not be written: .*RESOURCE_EXHAUSTED: no space left; choose", save_offline,
            place, MODEL, RTN, offline_of("rtn"))  # fmt: skip
    assert not list(tmp_path.iterdir())


# Sharding


def reshard(folder: Path) -> None:
    """One device to four and back; run where JAX sees four."""
    assert len(jax.devices()) == 4
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("x"))
    names = set()

    def columns(name, shape):
        names.add(name)
        if not shape or shape[-1] % 4:
            return whole
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 1), "x"))

    spread = made(jax.device_put(MODEL.params, whole))
    in_parts = jax.tree.map(lambda a: jax.device_put(a, columns("", a.shape)), MODEL.params)
    assert fingerprint(spread) == fingerprint(made(in_parts)) == fingerprint(MODEL)
    offline = offline_of("rtn")
    save_offline(folder / "rtn", MODEL, RTN, offline)
    restored = load_offline(folder / "rtn", MODEL, RTN, sharding=columns)
    assert same_bits(restored, offline)
    assert decoded(RTN, restored)[0] == decoded(RTN, offline)[0]
    scales = restored.packed["layers"]["down"]["kernel"].scales
    assert len(scales.sharding.device_set) == 4 and scales.addressable_data(0).shape[-1] == 8
    everywhere = load_offline(folder / "rtn", spread, RTN, sharding=whole)
    assert same_bits(everywhere, offline)
    # Back: what was saved from four devices is restored on one.
    save_offline(folder / "back", spread, RTN, restored)
    single = load_offline(folder / "back", MODEL, RTN)
    assert same_bits(single, offline)
    assert all(a.devices() == {jax.devices()[0]} for a in jax.tree.leaves(single))
    # What has no sharding is not committed to its device: it goes with what has.
    column = single.packed["layers"]["down"]["kernel"].scales
    assert len((column + scales).sharding.device_set) == 4

    moments = jax.tree.map(
        lambda a: jax.random.normal(jax.random.key(1), a.shape),
        first_turn(MODEL.params, CONFIG, CHAT),
    )
    save_conversation(folder / "chat", MODEL, CHAT, moments)
    spread_out = load_conversation(folder / "chat", MODEL, CHAT, sharding=columns)
    assert same_bits(spread_out, moments)
    assert len(spread_out["mlp_out"].sums.sharding.device_set) == 4
    assert {"packed.q.planes.0", "packed.down.scales", "mlp_out.sums", "mlp_out.count"} <= names
    refused("could not be restored", load_offline, folder / "rtn", MODEL, RTN, sharding=split)


def test_restored_into_another_sharding(tmp_path):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": path,
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    }  # fmt: skip
    program = (
        "from pathlib import Path; import test_store; "
        f"test_store.reshard(Path({str(tmp_path)!r})); print('resharded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and done.stdout == "resharded\n", done.stderr
    # Here is one device; the store comes from four.
    back = load_offline(tmp_path / "back", MODEL, RTN)
    assert same_bits(back, offline_of("rtn"))
    leaves = jax.tree.leaves(back.packed["layers"]["q"])
    assert all(isinstance(a, jax.Array) and not a.committed for a in leaves)
