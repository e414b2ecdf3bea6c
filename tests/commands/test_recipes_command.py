"""Recipes on the command line: listed, printed, changed, saved; and what is made for them, kept."""

import json
import shutil
from itertools import pairwise

import pytest

from ttq_jax.commands.main import main
from ttq_jax.quant.names import DEFAULT
from ttq_jax.quant.presets import PRESETS
from ttq_jax.quant.recipe import RULES
from ttq_jax.quant.recipe_text import from_toml, load_recipe, save_recipe, with_settings

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

NEW = ["--max-new-tokens", 6, "--prompt", "Hello there"]
CORPUS_PRIOR = ["--set", "moments.prior=corpus", "--set", "moments.prior_tokens=64"]
CHAT = ["--set", "moments.decay=0.5"]
# Nearly all the time here is XLA's: one projection is quantized where all would tell no more.
FEW = ["--select", "layers/down"]


@pytest.fixture
def settings_of(cli_json):
    """The recipe that the options of `inspect` describe."""
    return lambda *options: cli_json("inspect", "--model", *options)[0]["recipe"]


def test_the_list(cli):
    code, out, err = cli("recipes", "--no-compilation-cache")
    assert (code, err) == (0, "")
    what, chosen, hint = out.split("\n\n")
    assert [line.split()[0] for line in what.splitlines()] == ["recipe", *PRESETS]
    assert [line.split()[0] for line in chosen.splitlines()] == ["recipe", *PRESETS]
    for name, one in PRESETS.items():
        line = next(line for line in what.splitlines() if line.startswith(f"{name} "))
        assert all(text in line for text in (one.about, one.cost, one.use))
    # A line per recipe, on a screen that is wide but not endless.
    assert max(map(len, out.splitlines())) <= 160
    gptq = next(line for line in chosen.splitlines() if line.startswith("gptq "))
    assert gptq.split() == ["gptq", "corpus", "none", "second_order", "none"]
    assert "--set" in hint


def test_the_list_as_json(cli_json):
    listed = {one["name"]: one for one in cli_json("recipes")}
    assert list(listed) == list(PRESETS)
    assert all(one["about"] and one["cost"] and one["use"] for one in listed.values())
    assert listed["none"]["recipe"] is None
    assert listed["gptq"]["recipe"]["rounding"]["damping"] == 0.01


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "none"])
def test_a_recipe_printed_is_a_recipe_s_file(cli, tmp_path, name):
    code, out, err = cli("recipes", name, "--no-compilation-cache")
    assert (code, err) == (0, "")
    assert from_toml(out) == PRESETS[name].recipe
    lines = out.splitlines()
    for before, line in pairwise(lines):
        if " = " in line and not line.startswith(("#", "rule = ")):
            assert before.startswith("# "), f"{line} is not explained"
    assert max(map(len, lines)) <= 100
    path = tmp_path / "edited.toml"
    path.write_text(out.replace("bits = 4", "bits = 3"))
    _, again, _ = cli("recipes", path, "--set", "low_rank.error_rank=0", "--no-compilation-cache")
    assert from_toml(again) == with_settings(PRESETS[name].recipe, ["grid.bits=3"])


def test_an_infinite_prior_is_said_in_json(cli_json, tiny):
    prior = ["--set", "moments.prior=weights", "--set", "moments.prior_tokens=inf"]
    (shown,) = cli_json("recipes", DEFAULT, *prior)
    assert shown["recipe"]["moments"]["prior_tokens"] == "inf"
    (inspected,) = cli_json("inspect", "--model", tiny, *prior)
    assert inspected["recipe"] == shown["recipe"]


@pytest.mark.parametrize(
    ("options", "axis", "wanted"),
    [
        (["--recipe", "gptq"], "rounding", {"steps": 1, "damping": 0.01, "static_groups": False}),
        (["--recipe", "gptq", "--bits", 3], "grid", {"bits": 3, "group_size": 32}),
        (["--recipe", "best", "--no-symmetric"], "grid", {"symmetric": False}),
        (["--symmetric", "--set", "grid.symmetric=false"], "grid", {"symmetric": False}),
        (["--bits", 3, "--set", "grid.bits=5", "--set", "grid.bits=2"], "grid", {"bits": 2}),
        (["--recipe", "awq", "--set", "scale=power_law", "--alpha", 1], "scale",
         {"rule": "power_law", "alpha": 1.0, "lam": 0.4}),
        (["--alpha", 0.7, "--set", "scale.alpha=0.6", "--lam", 0], "scale",
         {"alpha": 0.6, "lam": 0.0}),
        (["--recipe", "rtn", "--clip"], "rounding", {"rule": "clip", "steps": 10}),
        (["--clip", "--set", "rounding.steps=5"], "rounding", {"rule": "clip", "steps": 5}),
        (["--set", "moments.prior=weights", "--set", "moments.prior_tokens=64"], "moments",
         {"prior": "weights", "prior_tokens": 64.0}),
        (["--rank", 4, "--set", "low_rank.store=int8"], "low_rank", {"rank": 4, "store": "int8"}),
    ],
)  # fmt: skip
def test_options_apply_on_top_of_a_recipe(settings_of, tiny, options, axis, wanted):
    got = settings_of(tiny, *options)[axis]
    assert got == got | wanted


def test_options_that_are_not_given_leave_a_file_as_it_is(settings_of, tiny, tmp_path):
    path = tmp_path / "mine.toml"
    mine = with_settings(
        PRESETS["best"].recipe,
        ["grid.bits=2", "grid.group_size=64", "grid.symmetric=true", "low_rank.rank=3",
         "prefill=quantized", "batch=per_prompt", "select=layers/(q|down)",
         'widths=[{select = "layers/0/down", bits = 5}]'],
    )  # fmt: skip
    save_recipe(path, mine)
    assert settings_of(tiny, "--recipe", path) == json.loads(json.dumps(mine.describe()))
    # --method is the older spelling.
    assert settings_of(tiny, "--method", path, "--bits", 3)["grid"]["bits"] == 3


def test_every_rule_can_be_asked_for(settings_of, tiny):
    for axis, rules in RULES.items():
        for rule in rules:
            assert settings_of(tiny, "--set", f"{axis}={rule}")[axis]["rule"] == rule


def test_the_recipe_that_was_used_is_saved(cli_json, tiny, tmp_path):
    path = tmp_path / "used.toml"
    (one,) = cli_json(
        "generate", "--model", tiny, *NEW, "--bits", 3, *FEW, "--set",
        "scale.alpha=0.6", "--save-recipe", path,
    )  # fmt: skip
    assert load_recipe(path) == with_settings(
        PRESETS[DEFAULT].recipe, ["grid.bits=3", "scale.alpha=0.6", "select=layers/down"]
    )
    (two,) = cli_json("generate", "--model", tiny, *NEW, "--recipe", path)
    assert (two["recipe"], two["text"]) == (one["recipe"], one["text"])
    assert two["method"] == str(path)


@pytest.fixture(scope="module")
def chosen(tiny, text_file):
    """What `prepare` and `generate` have in common, and the corpus."""
    corpus = ["--calibration", text_file, "--calibration-tokens", 128]
    return ["--model", tiny, "--bits", 3, *FEW, "--no-compilation-cache"], corpus


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        (["--recipe", "gptq"], {"quantized weights"}),
        ([*CORPUS_PRIOR, "--rank", 2], {"moments", "static factors"}),
    ],
)
def test_what_was_prepared_is_used(cli, cli_json, chosen, tmp_path, text_file, recipe, parts):
    common, corpus = chosen
    where = tmp_path / "kept"
    (made,) = cli_json("prepare", *common, *recipe, *corpus, "--out", where)
    assert set(made["bytes"]) == parts
    assert all(size > 0 for size in made["bytes"].values())
    (asked,) = cli_json("generate", *common, *recipe, *corpus, *NEW)
    # Without a corpus there is no other way to come by the same answer.
    (kept,) = cli_json("generate", *common, *recipe, *NEW, "--prepared", where)
    assert kept["text"] == asked["text"]
    assert kept["effective_bits"] == asked["effective_bits"]
    scored = [
        cli_json(
            "perplexity", *common, *recipe, "--corpus", text_file, "--window", 32,
            "--prompt-tokens", 16, "--max-windows", 2, *given,
        )[0]
        for given in (corpus, ["--prepared", where])
    ]  # fmt: skip
    assert scored[0]["perplexity"] == scored[1]["perplexity"]
    assert (scored[0]["calibration"], scored[1]["calibration"]) == (text_file, None)
    code, _, err = cli("generate", *common, *recipe, *NEW, *corpus, "--prepared", where)
    assert code == 0, err
    assert f"calibration corpus is not used: {where} is used instead" in err


def test_a_model_writes_its_own_corpus(cli_json, chosen, tmp_path):
    common, _ = chosen
    where = tmp_path / "kept"
    own = ["--set", "moments.prior=samples", "--set", "moments.prior_tokens=64"]
    (made,) = cli_json("prepare", *common, *own, "--out", where)
    assert set(made["bytes"]) == {"moments"}
    asked, kept = (
        cli_json("generate", *common, *own, *NEW, *given)[0]
        for given in ([], ["--prepared", where])
    )
    assert (asked["text"], asked["recipe"]) == (kept["text"], kept["recipe"])


def test_prepare_for_people(cli, tiny, tmp_path):
    where = tmp_path / "kept"
    code, out, err = cli(
        "prepare", "--model", tiny, "--recipe", "rtn", "--out", where, "--no-compilation-cache"
    )
    assert code == 0, err
    assert "quantized weights 0." in out
    assert f"--prepared {where}" in out
    assert "preparing rtn" in err


def test_a_conversation_goes_on_from_call_to_call(cli, cli_json, tiny, tmp_path):
    turns = ["first words, none of them like", "0123456789 9876543210", "and now?"]
    everything = tmp_path / "turns.txt"
    everything.write_text("\n".join(turns) + "\n")
    common = ["generate", "--model", tiny, "--max-new-tokens", 24, "--bits", 2, *FEW, *CHAT]
    at_once = cli_json(
        *common, "--prompts-file", everything, "--conversation", tmp_path / "at-once"
    )
    apart = [
        cli_json(*common, "--prompt", turn, "--conversation", tmp_path / "apart")[0]
        for turn in turns
    ]
    assert [a["text"] for a in at_once] == [a["text"] for a in apart]
    # Its memory is what makes a turn differ from a first one.
    code, out, err = cli(*common, "--prompts-file", everything, "--json", "--no-compilation-cache")
    assert code == 0
    assert "no effect without --conversation" in err
    alone = [json.loads(line) for line in out.splitlines()]
    assert alone[0]["text"] == apart[0]["text"]
    assert [a["text"] for a in alone[1:]] != [a["text"] for a in apart[1:]]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--recipe", "gtpq"], ["gtpq", "did you mean gptq", "awq", ".toml"]),
        (["--recipe", "no.toml"], ["no.toml", "no such file"]),
        (["--recipe", "none", "--set", "grid.bits=3"], ["none", "nothing", "--set"]),
        (["--recipe", "none", "--alpha", 1], ["none", "nothing", "--alpha"]),
        (["--recipe", "none", "--save-recipe", "a.toml"], ["none", "nothing", "--save-recipe"]),
        (["--save-recipe", "a.txt"], ["--save-recipe", ".toml", "a.txt"]),
        (["--save-recipe", "/no/such/place/a.toml"], ["/no/such/place/a.toml", "written"]),
        (["--set", "grid.bit=3"], ["grid.bit", "group_size"]),
        (["--set", "scale=awq"], ["searched", "'awq'"]),
        (["--set", "rounding.damping=0.3"], ["rounding.damping", "second_order"]),
        (["--set"], ["--set"]),
        (["--recipe", "awq", "--p", 2], ["--p", "power-law", "searched"]),
        (["--recipe", "rtn", "--alpha", 1], ["--alpha", "power-law", "none"]),
        (["--recipe", "best", "--clip"], ["--clip", "second_order", "rounding=clip"]),
        (["--recipe", "gptq"], ["gptq", "--calibration", "--prepared"]),
        (CORPUS_PRIOR, ["corpus", "--calibration", "--prepared"]),
        (["--recipe", "ttq", "--set", "moments.prior=weights"], ["prior", "prior_tokens"]),
        (["--conversation", "c"], ["--conversation", "ttq", "moments.decay=0.5"]),
        (["--recipe", "none", "--conversation", "c"], ["--conversation", "none"]),
        (
            [*CHAT, "--conversation", "c", "--batch-size", 2],
            ["--conversation", "--batch-size 1", "got 2"],
        ),
        ([*CHAT, "--per-prompt"], ["decay", "pooled"]),
        (["--recipe", "rtn", "--prepared", "/no/such/store"], ["/no/such/store"]),
        ([*CHAT, "--conversation", "{tmp}"], ["ttq"]),
    ],
)
def test_refused(cli, tiny, tmp_path, options, parts):
    (tmp_path / "something").write_text("else")
    options = [str(o).replace("{tmp}", str(tmp_path)) for o in options]
    code, out, err = cli("generate", "--model", tiny, *NEW, "--no-compilation-cache", *options)
    lines = [line for line in err.splitlines() if "error" in line]
    assert (code, out, len(lines)) == (2, "", 1), err
    for part in parts:
        assert part in lines[0]


def test_what_was_kept_for_something_else_is_refused(cli, tiny, tmp_path):
    where, common = tmp_path / "kept", ["--model", tiny, "--no-compilation-cache"]
    assert cli("prepare", *common, "--recipe", "rtn", "--bits", 3, "--out", where)[0] == 0
    code, out, err = cli("generate", *common, *NEW, "--recipe", "rtn", "--prepared", where)
    assert (code, out) == (2, "")
    assert "grid.bits: saved 3, now 4" in err
    half = tmp_path / "half"
    shutil.copytree(where, half)
    next(p for p in sorted(half.rglob("*")) if p.is_file() and p.name != "ttq.json").unlink()
    code, out, err = cli(
        "generate", *common, *NEW, "--recipe", "rtn", "--bits", 3, "--prepared", half
    )
    assert (code, out) == (2, "")
    assert str(half) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["recipes", "none"], "nothing to print"),
        (["recipes", "--set", "grid.bits=3"], "expected a recipe to change"),
        (["recipes", "ttq", "--set", "grid.bits=7"], "2, 3, 4, 5, 8"),
        (["recipes", "nobody"], "expected one of none, rtn"),
        (["recipes", "nobody.toml"], "no such file"),
        (["prepare", "--model", "m"], "--out"),
        (
            ["prepare", "--model", "m", "--out", "o", "--recipe", "ttq"],
            "ttq needs nothing besides the prompt",
        ),
        (["prepare", "--model", "m", "--out", "o", "--recipe", "none"], "none needs nothing"),
    ],
)
def test_refused_before_a_model_is_loaded(cli, arguments, part):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert part in err.splitlines()[-1]


def test_the_help_says_that_options_default_to_the_recipe(capsys):
    assert main(["inspect", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split()).split("quantization:")[1]
    assert "Options that are not given keep the recipe's own value" in said
    for option in ("bits", "group-size", "rank", "symmetric", "alpha", "prefill", "select"):
        described = said.split(f"--{option}")[1].split(" --")[0]
        assert "default" not in described, option
