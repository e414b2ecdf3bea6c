"""`ttq acceptance`, and `--speculate` of the commands that answer."""

import pytest

SMALL = ["--window", 64, "--prompt-tokens", 32, "--max-windows", 5]


def test_json(cli_json, tiny, text_file):
    (got,) = cli_json("acceptance", "--model", tiny, "--corpus", text_file, *SMALL, "--bits", 3)
    assert (got["window"], got["windows"], got["compared"]) == (64, 5, 5 * 31)
    for name in ("greedy", "sampled"):
        low, high = got[f"{name}_interval_95"]
        assert low <= got[name] <= high
        assert 0 < got[name] <= 1
    assert got["divergence"] > 0
    assert got["effective_bits"] < 5
    assert got["recipe"]["grid"]["bits"] == 3


def test_human_output(cli, tiny, text_file):
    code, out, err = cli(
        "acceptance", "--model", tiny, "--corpus", text_file, *SMALL[:-1], 2, "--bits", 8
    )
    assert code == 0, err
    lines = [line.split()[0] for line in out.splitlines()]
    assert lines == ["greedy", "sampled", "divergence", "recipe", "protocol", "time"]
    assert "no interval: too few windows" in out
    assert "2 windows of 64 tokens, weights from the first 32; 62 tokens compared" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "none"], "expected a recipe whose quantized weights draft"),
        (["--window", 34, "--prompt-tokens", 33], "expected 1 <= P < window - 1, got P=33"),
        (["--set", "moments.refresh=8"], "set moments.refresh to 0"),
        (["--window", 1000], "does not fit the model's context"),
    ],
)
def test_wrong_arguments(cli, tiny, text_file, words, message):
    code, out, err = cli("acceptance", "--model", tiny, "--corpus", text_file, *words)
    assert code == 2
    assert message in err
    assert not out


def test_an_answer_with_drafts_is_the_unquantized_models(cli_json, tiny):
    ask = ["generate", "--model", tiny, "--prompt", "Once upon a time", "--max-new-tokens", 9]
    (plain,) = cli_json(*ask, "--method", "none")
    (got,) = cli_json(*ask, "--speculate", 3, "--bits", 3)
    assert got["text"] == plain["text"]
    assert "drafts" not in plain
    drafts = got["drafts"]
    assert drafts["drafted"] == 3 * drafts["passes"]
    assert drafts["acceptance"] == pytest.approx(drafts["kept"] / drafts["drafted"], abs=1e-4)
    assert got["effective_bits"] < 5, "of the weights that draft"


def test_the_number_of_drafts_is_chosen(cli, cli_json, tiny):
    ask = ["generate", "--model", tiny, "--prompt", "Once upon a time", "--max-new-tokens", 9]
    (plain,) = cli_json(*ask, "--method", "none")
    options = ["--speculate", "auto", "--bits", 3, "--select", "layers/q"]
    (got,) = cli_json(*ask, *options)
    assert got["text"] == plain["text"]
    drafts, costs = got["drafts"], got["draft_costs"]
    assert list(costs) == ["0", "1", "2", "4", "8"]
    assert costs["0"] == 1
    assert min(costs.values()) > 0
    assert sum(drafts["passes_by_drafts"].values()) == drafts["passes"]
    assert drafts["drafts_per_pass"] == pytest.approx(
        drafts["drafted"] / drafts["passes"], abs=1e-4
    )
    code, out, err = cli(*ask, *options, "--stream")
    assert code == 0, err
    assert plain["text"] in out
    assert "cycles of drafts take, in plain steps of the unquantized weights: " in err


def test_what_is_said_of_drafts(cli, tiny):
    ask = ["generate", "--model", tiny, "--prompt", "Once", "--max-new-tokens", 9, "--stream"]
    code, _, err = cli(*ask, "--speculate", 3)
    assert code == 0, err
    assert "the unquantized weights verified the answer" in err
    for words, message in (
        (["--speculate", 17], "expected 0 to 16 drafts per cycle, got 17"),
        (["--speculate", 2, "--method", "none"], "expected a recipe whose quantized weights draft"),
        (["--speculate", "x"], "expected a whole number, 0 to 16, or auto, got 'x'"),
        (["--speculate", "Auto"], "or auto, got 'Auto'"),
        (["--speculate", "auto", "--set", "batch=per_prompt"], "set batch to pooled"),
    ):
        code, _, err = cli(*ask, *words)
        assert code == 2
        assert message in err
