"""llama.cpp's quantizers compared, with the gguf package's own in the place of its library.

That package writes Q8_0 and Q4_0 as llama.cpp does, which is enough to see that rows, channels and
importance come where they belong.
"""

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from tiny_files import write_model

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import compare_gguf  # noqa: E402

pytestmark = pytest.mark.slow
Q8, Q4 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0


@pytest.fixture
def asked(monkeypatch):
    """The importance that the library was given, a call each."""
    calls = []

    def view(address, count, kind):
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), (count,))

    def quantize(kind, rows, made, start, n, width, importance):
        weights = view(rows, n * width, ctypes.c_float).reshape(n, width)
        out = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(kind))
        view(made, out.size, ctypes.c_uint8)[:] = out.reshape(-1)
        calls.append(importance and view(importance, width, ctypes.c_float).copy())
        assert start == 0
        return out.size

    library = SimpleNamespace(
        ggml_quantize_chunk=quantize, ggml_quantize_requires_imatrix=lambda kind: kind == 16
    )
    monkeypatch.setattr(compare_gguf, "library", lambda: library)
    monkeypatch.setattr(compare_gguf, "versions", lambda *names: dict.fromkeys(names, "0"))
    return calls


def test_a_weight_comes_back_where_it_was(asked):
    """Of 48 input channels two rows make whole blocks of 32."""
    w = np.random.default_rng(0).normal(size=(48, 10)).astype(np.float32)
    importance = np.arange(1, 49, dtype=np.float32)
    out = compare_gguf.rounded(w, Q8, importance)
    assert np.abs(out - w).max() < np.abs(w).max() / 100
    (given,) = asked
    assert given.shape == (96,)
    np.testing.assert_array_equal(given[:48], given[48:])
    np.testing.assert_array_equal(np.sort(given[:48]), importance)
    assert (given[:48] != importance).any(), "the channels are permuted"


def test_a_grid_along_the_channels_is_not_found_again(asked):
    """A weight that Q4_0 holds exactly is rounded like any other once its channels are permuted."""
    w = np.random.default_rng(0).normal(size=(7, 256)).astype(np.float32)
    held = gguf.quants.dequantize(gguf.quants.quantize(w, Q4), Q4)
    np.testing.assert_allclose(gguf.quants.dequantize(gguf.quants.quantize(held, Q4), Q4), held)
    out = compare_gguf.rounded(held.T, Q4, None).T
    assert asked == [None]
    assert np.abs(out - held).max() > 0.01


def test_bits_are_those_of_the_blocks():
    found = {kind: compare_gguf.bits_of(gguf.GGMLQuantizationType[kind])
             for kind in ("Q4_K", "IQ4_XS", "Q3_K", "Q2_K", "Q8_0")}  # fmt: skip
    assert found == {"Q4_K": 4.5, "IQ4_XS": 4.25, "Q3_K": 3.4375, "Q2_K": 2.625, "Q8_0": 8.5}


@pytest.mark.parametrize(
    ("name", "said"),
    [("Q4_X", "expected a type of GGUF such as Q4_K, got 'Q4_X'"),
     ("IQ2_XXS", "expected an importance matrix; add @prompt or @NAME")],
)  # fmt: skip
def test_formats_that_cannot_be_made(name, said, asked):
    with pytest.raises(SystemExit, match=said):
        compare_gguf.format_named(name)


def test_rows_that_make_no_whole_blocks():
    with pytest.raises(SystemExit, match=r"2 rows of 48 make whole blocks of 32, and 9 rows"):
        compare_gguf.rows_joined(48, 9, Q8)


def test_rows_are_kept_for_every_source_of_importance(asked, tmp_path, capsys):
    model, text = write_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(900)))
    out = tmp_path / "rows.jsonl"
    arguments = [
        "--model", str(model), "--corpus", f"numbers={text}", "--calibration", f"same={text}",
        "--windows", "1", "--window", "64", "--prompt-tokens", "32", "--out", str(out),
    ]  # fmt: skip
    for name in ("Q8_0", "Q8_0@same", "Q4_0@prompt"):
        arguments += ["--format", name]
    compare_gguf.main(arguments)
    rows = {row["recipe_name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["none", "Q8_0", "Q8_0@same", "Q4_0@prompt"]
    assert [row["effective_bits"] for row in rows.values()] == [32.0, 8.5, 8.5, 4.5]
    assert [*rows["none"]["versions"]] == []
    assert [*rows["Q8_0"]["versions"]] == ["llama-cpp-python"]
    plain = rows["none"]["nll"]
    assert rows["Q8_0"]["nll"] == rows["Q8_0@same"]["nll"], "Q8_0 weighs nothing"
    np.testing.assert_allclose(rows["Q8_0"]["nll"], plain, rtol=0.01)
    assert abs(rows["Q4_0@prompt"]["nll"][0] - plain[0]) > abs(rows["Q8_0"]["nll"][0] - plain[0])
    kernels = 2 * 7
    assert [one is None for one in asked] == kernels * [True] + 2 * kernels * [False]
    capsys.readouterr()
    compare_gguf.main(arguments)
    assert capsys.readouterr().out == "", "rows that are there are not measured again"
