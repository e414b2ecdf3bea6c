"""Stores: what does not fit, is damaged or was interrupted is refused in one line."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_params
from stores import (
    CASES,
    CHAT,
    CONFIG,
    CORPUS,
    INT8,
    MODEL,
    ROUNDING,
    RTN,
    changed,
    made,
    offline_of,
    refused,
    same_bits,
)

from ttq_jax import files
from ttq_jax.checkpoint import store_files
from ttq_jax.checkpoint.store import (
    fingerprint,
    load_conversation,
    load_offline,
    save_conversation,
    save_offline,
)
from ttq_jax.prefill import first_turn
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.scaling import NoScale, PowerLaw
from ttq_jax.quant.source import Source
from ttq_jax.quant.widths import Width
from ttq_jax.types import Offline

PRIOR = CASES["gram"]
FACTORS = CASES["factors"]


@pytest.mark.parametrize(
    ("case", "recipe", "pattern"),
    [
        ("rtn", changed(RTN, batch="per_prompt", prefill="quantized"), None),
        ("rtn", changed(RTN, grid=Grid(bits=4, group_size=16)), "grid.bits: saved 3, now 4"),
        ("rtn", changed(RTN, select="layers/q"), "select: saved layers/"),
        ("rtn", changed(RTN, widths=(Width(select="layers/q", bits=3),)), "widths: saved"),
        ("rtn", changed(RTN, rounding=ClipSearch()), "rounding.rule: saved nearest, now clip"),
        ("rtn", CASES["gptq"], "moments.of: saved none, now corpus"),
        ("rtn", PRIOR, "moments.of: saved none, now prompt"),
        ("gram", changed(PRIOR, moments=changed(CORPUS, prior_tokens=float("inf"))), None),
        ("gram", changed(PRIOR, moments="corpus"), None),
        ("gram", changed(PRIOR, grid=Grid(bits=2), select="layers/.*"), None),
        ("gram", changed(PRIOR, moments=Source(prior="weights", prior_tokens=64.0)),
         "origin of the moments: saved corpus, now weights"),
        ("gram", changed(PRIOR, moments=Source(prior="samples", prior_tokens=64.0)),
         "origin of the moments: saved corpus, now samples"),
        ("gram", changed(PRIOR, moments="prompt"), "saved corpus, now none"),
        ("gram", changed(PRIOR, rounding=changed(ROUNDING, span=8)),
         "hold .*Gram blocks of 16x16, but the recipe reads .*Gram blocks of 8"),
        ("gram", changed(PRIOR, scale=PowerLaw(p=1.0)), "hold powers .*the recipe reads powers"),
        ("gram", changed(PRIOR, low_rank=LowRankRule(rank=4)), "low_rank.rank: saved 0, now 4"),
        ("gram", changed(PRIOR, low_rank=LowRankRule(mean=True)), "reads .* sums of x and Gram"),
        ("factors", changed(FACTORS, grid=Grid(bits=3)), None),
        ("factors", changed(FACTORS, low_rank=LowRankRule(rank=4, error_rank=2)), None),
        ("factors", changed(FACTORS, low_rank=LowRankRule(rank=5)), "rank: saved 4, now 5"),
        ("factors", changed(FACTORS, low_rank=LowRankRule()), "rank: saved 4, now 0"),
        ("factors", changed(FACTORS, low_rank=INT8), "low_rank.store: saved float, now int8"),
        ("factors", changed(FACTORS, grid=Grid(store_dtype="float32")), "grid.store_dtype: saved"),
        ("factors", changed(FACTORS, select="layers/.*"), "select: saved"),
        ("weighted factors", changed(FACTORS, moments=CORPUS), "low_rank.weighted: saved True"),
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
        (PRIOR, Offline(), "needs the moments of a corpus or of a prior, found none"),
        (PRIOR, other, "hold powers .* but the recipe reads"),
        (
            CHAT,
            Offline(carried=offline_of("gram").moments),
            "hold powers .* the recipe reads",
        ),
    ):
        refused(pattern, save_offline, place, MODEL, recipe, offline)
    refused("got none; use a recipe with moments.decay", save_conversation, place, MODEL, CHAT, {})
    refused("hold", save_conversation, place, MODEL, CHAT, offline_of("gram").moments)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def chat(tmp_path):
    """A small store: a conversation that has not begun."""
    save_conversation(tmp_path / "c", MODEL, CHAT, first_turn(MODEL.params, CONFIG, CHAT))
    return tmp_path / "c"


def test_kinds_are_not_mixed_up(tmp_path, chat):
    refused("expected what a recipe needs .*, found the moments and messages of a conv",
            load_offline, chat, MODEL, CHAT)  # fmt: skip
    save_offline(tmp_path / "o", MODEL, RTN, offline_of("rtn"))
    refused("expected the moments and messages of a conv.*, found what a recipe needs",
            load_conversation, tmp_path / "o", MODEL, CHAT)  # fmt: skip


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
        (ours - 1, f"format version {ours - 1}, written by ttq-jax 0.0.9, is older.*save it again"),
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
        (whole.replace('"powers": [\n      2.0', '"powers": [\n      1.0'), "wrong checksum"),
        ("[]", "expected an object"),
        ("", "damaged"),
        ('{"format": "x"}', "not ttq-jax's: expected format"),
    ):
        assert text != whole
        (chat / "ttq.json").write_text(text)
        refused(pattern, load_conversation, chat, MODEL, CHAT)
    (chat / "ttq.json").write_bytes(b"\xff\xfe{}")
    refused("damaged", load_conversation, chat, MODEL, CHAT)
    (chat / "ttq.json").write_text(whole)
    edited(chat, tree={"node": "Unheard", "static": {}, "fields": {}})
    refused("tree that this ttq-jax does not know", load_conversation, chat, MODEL, CHAT)


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
    refused("cannot be written", save_offline, foreign / "chapter1" / "x", MODEL, RTN,
            offline_of("rtn"))  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    save_offline(tmp_path / "empty", MODEL, RTN, offline_of("rtn"))
    assert load_offline(tmp_path / "empty", MODEL, RTN).packed is not None


def test_a_disk_without_room_is_found_out_before_orbax_writes(tmp_path, chat, monkeypatch):
    def full(_, size):
        raise OSError(28, f"No space left on device ({size} B)")

    moments = load_conversation(chat, MODEL, CHAT)
    size = 2**16 + sum(a.nbytes for a in jax.tree.leaves(moments))
    monkeypatch.setattr(store_files, "reserve", full)
    monkeypatch.setattr(store_files, "_orbax", interrupt)
    pattern = rf"cannot be written: No space left on device \({size} B\)"
    refused(pattern, save_conversation, tmp_path / "new", MODEL, CHAT, moments)
    assert not (tmp_path / "new").exists()


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["_write_arrays", "file_digest", "replace_folder"])
@pytest.mark.parametrize("cleaned", [True, False], ids=["interrupted", "killed"])
def test_an_interrupted_save_leaves_what_was_there(tmp_path, chat, monkeypatch, at, cleaned):
    before = load_conversation(chat, MODEL, CHAT)
    later = jax.tree.map(jnp.ones_like, before)
    with monkeypatch.context() as patch:
        patch.setattr(store_files, at, interrupt)
        if not cleaned:  # a killed process tidies nothing up
            patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        for place in (chat, tmp_path / "fresh"):
            with pytest.raises(KeyboardInterrupt):
                save_conversation(place, MODEL, CHAT, later)
    assert same_bits(load_conversation(chat, MODEL, CHAT), before)
    assert not (tmp_path / "fresh").exists()
    drafts = sorted(p.name for p in tmp_path.iterdir() if p != chat)
    assert len(drafts) == (0 if cleaned else 2)
    assert all(name.startswith(".") for name in drafts)
    if at != "replace_folder":
        for name in drafts:
            refused("has no ttq.json", load_conversation, tmp_path / name, MODEL, CHAT)
    for place in (chat, tmp_path / "fresh"):
        save_conversation(place, MODEL, CHAT, later)
        assert same_bits(load_conversation(place, MODEL, CHAT), later)
    # What the killed ones left is removed.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "fresh"]


def test_a_store_that_a_killed_writer_had_set_aside_is_read(tmp_path, chat):
    before = load_conversation(chat, MODEL, CHAT)
    chat.rename(tmp_path / ".c.01234567.replaced")
    (tmp_path / ".c.01234567.draft").mkdir()
    assert same_bits(load_conversation(chat, MODEL, CHAT), before)
    # A writer that lives is between its two renames: it will finish.
    with files.draft(chat, folder=True) as new:
        chat.rename(new.with_suffix(".replaced"))
        refused("no such directory", load_conversation, chat, MODEL, CHAT)
        new.with_suffix(".replaced").rename(chat)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_rename_that_fails_puts_the_old_store_back(tmp_path, chat, monkeypatch):
    before = load_conversation(chat, MODEL, CHAT)
    rename = Path.rename

    def no_draft(self, target):
        if self.suffix == ".draft":
            raise PermissionError("not here")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", no_draft)
    refused("cannot be written: not here", save_conversation, chat, MODEL, CHAT, before)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert same_bits(load_conversation(chat, MODEL, CHAT), before)


def test_what_orbax_refuses_is_said(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: no space left\nand much more")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    place = tmp_path / "s"
    refused("s: cannot be written: .*RESOURCE_EXHAUSTED: no space left; choose", save_offline,
            place, MODEL, RTN, offline_of("rtn"))  # fmt: skip
    assert not list(tmp_path.iterdir())
