"""A model knows how its file was quantized, and the packaged files are what we call them."""

import numpy as np
import pytest
from tiny_files import write_model
from tiny_gguf import write_gguf

from ttq_jax.checkpoint import ALIASES, load
from ttq_jax.checkpoint.gguf_file import GgufFile
from ttq_jax.checkpoint.packaged import CONTENTS
from ttq_jax.checkpoint.source import RandomAccess


def format_of(path):
    with RandomAccess(path) as file:
        return GgufFile(file).quantization


@pytest.mark.parametrize(
    ("kind", "told", "expected"),
    [("Q4_1", 3, "Q4_1"), ("Q5_0", 15, "Q4_K_M"), ("Q8_0", None, "Q8_0"), ("F32", None, ""),
     ("F16", 3, ""), ("Q5_0", 0, "Q5_0"), ("Q5_0", 1, "Q5_0"), ("Q5_0", 9999, "Q5_0")],
)  # fmt: skip
def test_of_a_file_with_one_kind_of_blocks(tmp_path, kind, told, expected):
    """A mixture's name is the file's own; a name that cannot be right is not believed."""
    rng = np.random.default_rng(0)
    names = ("token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.0.attn_norm")
    shapes = [(999, 64), (64, 64), (64, 64), (64,)]
    tensors = {name: rng.standard_normal(shape).astype(np.float32)
               for name, shape in zip(names, shapes, strict=True)}  # fmt: skip
    header = {} if told is None else {"general.file_type": told}
    types = dict.fromkeys(names[1:3], kind) | {"token_embd.weight": "Q8_0"}
    write_gguf(tmp_path / "m.gguf", "llama", header, tensors, types)
    assert format_of(tmp_path / "m.gguf") == expected


@pytest.mark.parametrize("alias", ALIASES)
def test_the_packaged_files_are_what_reports_call_them(alias):
    assert format_of(ALIASES[alias]()) == CONTENTS[alias][1]
    assert set(CONTENTS) == set(ALIASES)


def test_a_directory_of_plain_weights_has_none(tmp_path):
    assert load(write_model(tmp_path / "m")).format == ""
