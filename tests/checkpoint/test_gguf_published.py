"""GGUF files as they are published: every storage type, split files, and headers full of
provenance. The oracle of a storage type is the gguf package's own `dequantize`."""

import shutil

import gguf
import jax
import numpy as np
import pytest
from tiny_gguf import random_llama, write_gguf, write_parts

from ttq_jax.checkpoint import CheckpointError, load
from ttq_jax.checkpoint.gguf_file import GgufFile, supported_types
from ttq_jax.checkpoint.gguf_split import named_parts, part_name
from ttq_jax.checkpoint.origin import origin
from ttq_jax.checkpoint.source import RandomAccess

# A newer gguf package may have more.
KNOWN = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K",
    "Q6_K", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
)  # fmt: skip
FINE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


def encoded(values, kind):
    """Values as the package encodes them; random bytes where it decodes only."""
    code = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(values, code)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[code]
        shape = (values.shape[0], values.shape[1] // block * size)
        return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def decoded(data, kind):
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", KNOWN)
def test_storage_types(kind, tmp_path):
    values = np.random.default_rng(0).standard_normal((300, 512)).astype(np.float32)
    data = encoded(values, kind)
    write_gguf(tmp_path / "m.gguf", "llama", {}, {"w": data}, {"w": kind}, encoded=True)
    expected = decoded(data, kind)
    with RandomAccess(tmp_path / "m.gguf") as access:
        file = GgufFile(access)
        assert file.shapes == {"w": values.shape}
        np.testing.assert_array_equal(file.read("w", 0, 300).astype(np.float32), expected)
        np.testing.assert_array_equal(file.read("w", 17, 40).astype(np.float32), expected[17:40])
    if kind in FINE:
        assert np.abs(expected - values).max() < 0.25 * np.abs(values).max()


def test_all_that_the_package_decodes_is_read():
    assert set(supported_types()) >= set(KNOWN)
    for kind in supported_types():
        assert decoded(encoded(np.ones((1, 512), np.float32), kind), kind).shape == (1, 512)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "IQ2_XXS", "MXFP4"])
def test_a_model_of_such_blocks_loads_as_its_dequantized_weights(kind, tmp_path):
    header, tensors = random_llama(width=256)
    code = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[code]
    names = [name for name in tensors if ".attn_q." in name or ".ffn_up." in name]
    rng = np.random.default_rng(2)
    blocks, plain = dict(tensors), dict(tensors)
    for name in names:
        rows, columns = tensors[name].shape
        # Scales of many types are two bytes of a half: bytes below 0x3c make no NaN.
        data = rng.integers(0, 0x3C, (rows, columns // block * size)).astype(np.uint8)
        blocks[name], plain[name] = data, decoded(data, kind)
        assert np.isfinite(plain[name]).all() and plain[name].any()
    types = dict.fromkeys(names, kind)
    write_gguf(tmp_path / "q.gguf", "llama", header, blocks, types, encoded=True)
    write_gguf(tmp_path / "f.gguf", "llama", header, plain)
    ours, expected = load(tmp_path / "q.gguf"), load(tmp_path / "f.gguf")
    jax.tree.map(np.testing.assert_array_equal, ours.params, expected.params)
    blocks[names[0]][0] = 0xFF
    write_gguf(tmp_path / "n.gguf", "llama", header, blocks, types, encoded=True)
    if not np.isfinite(decoded(blocks[names[0]], kind)).all():
        with pytest.raises(CheckpointError, match=rf"{names[0]} holds NaN or infinity"):
            load(tmp_path / "n.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    write_gguf(path, "llama", *random_llama())
    return path


@pytest.fixture
def parts(tmp_path):
    return write_parts(tmp_path / "tiny-Q4_K_M", *random_llama(), count=3)


def test_any_part_stands_for_all(whole, parts):
    expected = load(whole)
    for path in parts:
        model = load(path)
        jax.tree.map(np.testing.assert_array_equal, model.params, expected.params)
        assert model.tokenizer.encode("ab c") == expected.tokenizer.encode("ab c")
        assert model.origin == origin(parts[0]) | {"format": ""}
        assert model.origin["file"] == parts[0].name


def test_the_fingerprint_covers_all_parts(parts):
    before = origin(parts[0])["fingerprint"]
    seen = {before}
    for path in parts:
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        seen.add(origin(parts[1])["fingerprint"])
    assert len(seen) == 4


def test_links_as_in_the_hubs_cache(whole, parts, tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, path in enumerate(parts):
        shutil.move(path, tmp_path / "blobs" / f"{i}")
        (tmp_path / "snapshot" / path.name).symlink_to(tmp_path / "blobs" / f"{i}")
    load(tmp_path / "snapshot" / parts[1].name)
    # A link of any name leads to the parts too.
    again = write_parts(tmp_path / "again", *random_llama(), count=2)
    (tmp_path / "link.gguf").symlink_to(again[0])
    assert load(tmp_path / "link.gguf").origin["file"] == again[0].name


def test_missing_parts_are_named(parts):
    parts[0].unlink()
    parts[2].unlink()
    with pytest.raises(CheckpointError, match=f"{parts[0].name}, {parts[2].name}"):
        load(parts[1])


def test_parts_that_do_not_belong_together(parts, tmp_path):
    other = write_parts(tmp_path / "other", *random_llama(), count=3)
    shutil.copy(parts[1], other[2])
    with pytest.raises(CheckpointError, match=r"expected part 3 of 3, .* is part 1, count"):
        load(other[0])
    header, tensors = random_llama()
    few = dict(list(tensors.items())[:-1])
    shutil.copy(write_parts(tmp_path / "few", header, few, count=3)[2], other[2])
    with pytest.raises(CheckpointError, match=rf"expected {len(tensors)} tensors in all 3 parts"):
        load(other[0])
    shutil.copy(parts[1], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"expected a whole model, .* NAME-00001-of-00003\.g"):
        load(tmp_path / "renamed.gguf")
    shutil.copy(parts[0], other[0])
    header["general.name"] = "x"
    twice = write_parts(tmp_path / "twice", header, tensors, count=2)
    one = write_parts(tmp_path / "one", header, tensors, count=2, first=2)
    shutil.copy(twice[1], one[1])
    with pytest.raises(CheckpointError, match="is in another part too"):
        load(one[0])


def test_a_joined_file_under_the_name_of_its_first_part(whole, tmp_path):
    path = tmp_path / "m-00001-of-00004.gguf"
    shutil.copy(whole, path)
    load(path)
    for count in (0, 1):
        header, tensors = random_llama()
        write_gguf(path, "llama", header | {"split.count": count}, tensors)
        load(path)


def test_names_of_parts(tmp_path):
    path = tmp_path / part_name("a-00001-of-00002", 2, 3)
    assert [p.name[-20:] for p in named_parts(path)] == [
        f"-0000{i}-of-00003.gguf"[-20:] for i in (1, 2, 3)
    ]
    for name in ("a.gguf", "a-1-of-3.gguf", "a-00004-of-00003.gguf", "a-00000-of-00003.gguf"):
        assert named_parts(tmp_path / name) == (tmp_path / name,)


@pytest.mark.parametrize(
    "key", ["mradermacher.quantized_by", "quantize.imatrix.file", "imatrix.note", "Odd.Key", "x"]
)
def test_who_made_a_file_changes_nothing(key, whole, tmp_path):
    header, tensors = random_llama()
    write_gguf(tmp_path / "m.gguf", "llama", header | {key: "somebody"}, tensors)
    jax.tree.map(
        np.testing.assert_array_equal, load(tmp_path / "m.gguf").params, load(whole).params
    )


def test_keys_of_the_architecture_are_still_read_or_refused(tmp_path):
    header, tensors = random_llama()
    write_gguf(tmp_path / "m.gguf", "llama", header | {"llama.odd_key": 1}, tensors)
    with pytest.raises(CheckpointError, match=r"llama\.odd_key"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
@pytest.mark.parametrize("value", ["x", [1, 2], 1.5])
def test_what_a_part_says_of_itself_is_a_number(key, value, parts, tmp_path):
    header, _ = random_llama()
    write_gguf(parts[0], "llama", header | {"split.count": 3} | {key: value}, {})
    for path in parts[:2]:
        with pytest.raises(CheckpointError, match="expected"):
            load(path)
    if key == "split.count":
        parts[2].unlink()
        with pytest.raises(CheckpointError, match="missing beside it"):
            load(parts[0])


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", 3, [1.5]])
def test_a_file_that_is_no_model_says_what_it_is(kind, tmp_path):
    header, tensors = random_llama()
    write_gguf(tmp_path / "m.gguf", "llama", header | {"general.type": kind}, tensors)
    with pytest.raises(CheckpointError, match=f"its general.type is .*{kind}"):
        load(tmp_path / "m.gguf")
