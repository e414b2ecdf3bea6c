import math
import re
from pathlib import Path

import pytest

from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.perplexity import interval95

SMALL = ["--window", 64, "--prompt-tokens", 32, "--max-windows", 3]


@pytest.mark.parametrize("protocol", ["causal", "window"])
@pytest.mark.parametrize("method", ["none", "rtn", "awq", "ttq"])
def test_json(cli_json, tiny, text_file, method, protocol):
    calibration = ["--calibration", text_file, "--calibration-tokens", 100]
    (got,) = cli_json(
        "perplexity", "--model", tiny, "--corpus", text_file, "--protocol", protocol, *SMALL,
        "--method", method, "--with-baseline", *(calibration if method == "awq" else []),
    )  # fmt: skip
    assert (got["protocol"], got["window"], got["windows"]) == (protocol, 64, 3)
    assert got["prompt_tokens"] == (32 if protocol == "causal" else None)
    assert got["scored_tokens"] == 3 * (32 if protocol == "causal" else 63)
    assert got["corpus_sha256"] == sha256(Path(text_file).read_text("utf-8"))
    assert got["bos"] is True
    assert got["seconds"] > 0
    assert 1 < got["perplexity"] < 1e6
    assert got["interval_95"] is None, "three windows are too few"
    assert got["model_bits"] == pytest.approx(32) if method == "none" else got["model_bits"] < 32
    if method == "none":
        assert got["perplexity"] == got["unquantized_perplexity"]
    else:
        # Random weights: rounding may go either way, but must go somewhere.
        assert got["perplexity"] != got["unquantized_perplexity"]


def test_more_bits_are_closer_to_unquantized(cli_json, tiny, text_file):
    def gap(bits):
        (got,) = cli_json(
            "perplexity", "--model", tiny, "--corpus", text_file, *SMALL, "--bits", bits,
            "--with-baseline", "--head", "none",
        )  # fmt: skip
        return abs(math.log(got["perplexity"] / got["unquantized_perplexity"]))

    assert gap(8) < 0.02
    assert gap(8) < gap(2)


def test_human_output(cli, tiny, text_file):
    code, out, err = cli(
        "perplexity", "--model", tiny, "--corpus", text_file, *SMALL, "--with-baseline",
        "--no-compilation-cache",
    )  # fmt: skip
    assert code == 0, err
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines == ["perplexity", "unquantized", "recipe", "protocol", "time"]
    assert "first 32 tokens" in out
    assert "3 windows of 64" in out
    assert "no 95 % interval: too few windows, 5 are needed" in out
    assert re.search(
        r"[\d.]+ bits per weight of the linear layers, [\d.]+ over the whole model", out
    )
    assert "scoring" in err


def test_no_baseline_unless_asked(cli_json, tiny, text_file):
    (got,) = cli_json("perplexity", "--model", tiny, "--corpus", text_file, *SMALL)
    assert got["unquantized_perplexity"] is None


def test_interval_holds_the_mean_and_shrinks():
    assert interval95([5.0, 6.0, 7.0, 8.0], 10) is None
    low, high = interval95([10.0, 20.0] * 3, 10)
    assert low < math.exp(1.5) < high
    wide = high - low
    low, high = interval95([10.0, 20.0] * 50, 10)
    assert high - low < wide / 4
