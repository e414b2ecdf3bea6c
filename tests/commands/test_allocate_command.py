"""`ttq allocate`: a budget in, a recipe out that other commands take."""

import pytest
from tiny_gguf import random_mixtral, write_gguf

from ttq_jax.checkpoint import load
from ttq_jax.commands import allocate
from ttq_jax.config import ConfigError
from ttq_jax.quant.presets import preset
from ttq_jax.quant.recipe_text import from_toml, load_recipe

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

# Nearly all the time here is XLA's: few projections, two widths.
FEW = ["--select", "layers/(o|down)", "--widths", 2, 4, "--group-size", 16]
SMALL = ["--window", 48, "--prompt-tokens", 16, "--max-windows", 2]


def test_the_recipe_keeps_the_budget_and_scores(cli, cli_json, tiny, text_file, tmp_path):
    out = tmp_path / "mine.toml"
    common = ["--model", tiny, "--corpus", text_file, *SMALL]
    (made,) = cli_json("allocate", *common, *FEW, "--recipe", "rtn", "--budget", 5, "--out", out)
    assert 4 < made["stored_bits"] <= 5
    assert load_recipe(out).describe() == made["recipe"]
    worst, best = made["uniform_divergence"]["2"], made["uniform_divergence"]["4"]
    assert best < made["divergence"] < worst
    (scored,) = cli_json("perplexity", *common, "--recipe", out)
    assert scored["recipe"] == made["recipe"]
    code, printed, _ = cli(
        "allocate", *common, *FEW, "--recipe", "rtn", "--budget", 5, "--out", out,
        "--no-compilation-cache",
    )  # fmt: skip
    assert code == 0
    lines = printed.splitlines()
    assert lines[0].split() == ["layers", "at", "2", "bits", "4", "bits"]
    assert {line.split()[0] for line in lines[1:3]} == {"o", "down"}
    assert f"{made['stored_bits']:.3f} stored bits per quantized weight" in printed


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--budget", "2.0"], "more than the 2 bits of the narrowest codes"),
        (["--budget", "nan"], "more than the 2 bits of the narrowest codes"),
        (["--budget", "2.1"], "expected 3.000 to 5.000 stored bits per weight, the sizes at 2 and"),
        (["--budget", "5.1"], "at 4 bits everywhere, got 5.1"),
        (["--budget", "4", "--widths", "4"], "--widths: expected at least two of 2, 3, 4, 5, 8"),
        (["--budget", "4", "--widths", "4", "6"], "got 4 6"),
        (["--budget", "4", "--recipe", "none"], "recipe none quantizes nothing"),
        (["--budget", "4", "--recipe", "awq"], "recipe awq needs a calibration corpus"),
        (["--budget", "4", "--prompt-tokens", "48"], "more than 48 tokens"),
    ],
)
def test_what_cannot_be_allocated_is_refused_and_nothing_written(
    cli, tiny, text_file, tmp_path, monkeypatch, options, pattern
):
    if "--prompt-tokens" not in options:
        monkeypatch.setattr(allocate, "prepare_unpacked", None)  # nothing is measured
    out = tmp_path / "mine.toml"
    code, printed, err = cli(
        "allocate", "--model", tiny, "--corpus", text_file, "--recipe", "rtn", *SMALL,
        "--select", "layers/o", "--widths", 2, 4, *options, "--out", out, "--no-compilation-cache",
    )  # fmt: skip
    assert (code, printed) == (2, "")
    assert pattern in err
    assert not out.exists()


def test_the_sizes_are_those_of_quantized_weights(cli_json, tiny, text_file, tmp_path):
    options = ["--group-size", 16, "--select", "layers/(o|down)", "--recipe", "ttq", "--rank", 2]
    common = ["--model", tiny, "--corpus", text_file, *SMALL, *options, "--widths", 2, 4]
    recipe = preset("ttq", group_size=16, select="layers/(o|down)", rank=2)
    low, high = allocate.sizes(load(tiny), recipe, (2, 4))
    out = tmp_path / "mine.toml"
    for budget in (low, high):
        (made,) = cli_json("allocate", *common, "--budget", budget, "--out", out)
        assert made["stored_bits"] == pytest.approx(budget)


def test_a_recipe_that_cannot_be_saved_is_printed(cli, tiny, text_file, tmp_path, monkeypatch):
    def full(*_):
        raise ConfigError("mine.toml: cannot be written: No space left on device")

    monkeypatch.setattr(allocate, "save_recipe", full)
    out = tmp_path / "mine.toml"
    code, printed, err = cli(
        "allocate", "--model", tiny, "--corpus", text_file, *SMALL, *FEW, "--recipe", "rtn",
        "--budget", 5, "--out", out, "--no-compilation-cache",
    )  # fmt: skip
    assert code == 2 and err.endswith("No space left on device\n")
    summary, toml = printed.split("\n\n", 2)[1:]
    assert "stored bits per quantized weight" in summary and "saved to" not in printed
    assert from_toml(toml).widths
    assert not out.exists()


def test_a_recipe_with_a_prior_is_measured_with_it(cli_json, tiny, text_file, tmp_path):
    common = ["--model", tiny, "--corpus", text_file, *SMALL, *FEW, "--budget", 5]
    found = [
        cli_json("allocate", *common, "--recipe", "ttq", *prior, "--out", tmp_path / "mine.toml")[0]
        for prior in ([], ["--set", "moments.prior=weights", "--set", "moments.prior_tokens=64"])
    ]
    plain, leaning = (one["uniform_divergence"] for one in found)
    assert plain.keys() == leaning.keys()
    assert all(0 < leaning[bits] != plain[bits] for bits in plain)


def test_a_mixture_of_experts_within_a_budget(cli_json, text_file, tmp_path):
    place = tmp_path / "mixtral.gguf"
    write_gguf(place, "llama", *random_mixtral())
    common = ["--model", place, "--corpus", text_file, *SMALL]
    few = ["--select", "layers/(q|down)", "--widths", 2, 4, "--group-size", 16]
    out = tmp_path / "mine.toml"
    (made,) = cli_json("allocate", *common, *few, "--recipe", "ttq", "--budget", 5, "--out", out)
    assert 4.5 < made["stored_bits"] <= 5
    worst, best = made["uniform_divergence"]["2"], made["uniform_divergence"]["4"]
    assert best < made["divergence"] < worst
    (scored,) = cli_json("perplexity", *common, "--recipe", out)
    assert scored["recipe"] == made["recipe"]


def test_bits_that_the_budget_chooses_are_noted(cli, tiny, text_file, tmp_path):
    _, _, err = cli(
        "allocate", "--model", tiny, "--corpus", text_file, "--recipe", "rtn", "--bits", 3,
        "--budget", 9, "--out", tmp_path / "mine.toml", "--no-compilation-cache",
    )  # fmt: skip
    assert "--bits has no effect: the budget chooses among --widths" in err
