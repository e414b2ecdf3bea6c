"""Recipes as text: what is written is what is read, what is mistyped is refused by name."""

import dataclasses
import math
import random
import stat
import typing

import pytest

import ttq_jax
from ttq_jax import files
from ttq_jax.config import ConfigError
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.grid import BITS, STORE_DTYPES, Grid, Nearest
from ttq_jax.quant.half_quadratic import HalfQuadratic
from ttq_jax.quant.lowrank import LowRankRule
from ttq_jax.quant.presets import PRESETS
from ttq_jax.quant.recipe import RULES, Recipe
from ttq_jax.quant.recipe_text import (
    from_toml,
    load_recipe,
    save_recipe,
    to_toml,
    with_settings,
)
from ttq_jax.quant.scaling import NoScale, PowerLaw, SearchedAlpha
from ttq_jax.quant.second_order import SecondOrder
from ttq_jax.quant.source import Source
from ttq_jax.quant.widths import Width

GPTQ = PRESETS["gptq"].recipe
SELECTS = ["layers/.*", r"layers/(0|1)/\w+", 'a"=#[b]\\\\', "größe\t\n"]


def random_recipe(rng):
    """A recipe in which every rule, every field and awkward values of each type occur."""

    def size():
        return rng.choice([1.0, 3.0, 1e-7, 1e22, 0.1 + 0.2, rng.lognormvariate(0, 9)])

    def unit():
        return rng.choice([0.0, 1.0, 1 / 3, rng.random()])

    def whole(least=0):
        return rng.randint(least, 99)

    def group():
        return rng.choice([-1, 8, 128])

    def yes():
        return rng.random() < 0.5

    source = rng.choice([
        lambda: Source(of="corpus"),
        lambda: Source(decay=unit(), refresh=whole()),
        lambda: Source(
            prior=rng.choice(["corpus", "weights", "samples"]),
            prior_tokens=rng.choice([size(), math.inf]),
        ),
    ])
    scale = rng.choice([
        NoScale,
        lambda: PowerLaw(alpha=2 * unit(), lam=size(), p=rng.uniform(0.1, 8)),
        lambda: SearchedAlpha(steps=whole(1), p=rng.uniform(0.1, 8), shared=yes()),
    ])
    rounding = rng.choice([
        Nearest,
        lambda: ClipSearch(steps=whole(1), smallest=max(unit(), 0.01), refits=whole()),
        lambda: SecondOrder(
            steps=whole(1),
            damping=size(),
            shrinkage=unit(),
            span=group(),
            act_order=yes(),
            refits=whole(),
            descents=whole(),
        ),
        lambda: SecondOrder(static_groups=False),
        lambda: HalfQuadratic(p=rng.uniform(0.1, 0.9), beta=size(), kappa=1 + size()),
    ])
    rules = [
        Width(select=rng.choice(SELECTS), bits=rng.choice(BITS), group_size=rng.choice([None, 64]))
        for _ in range(rng.randint(0, 3))
    ]
    return Recipe(
        moments=source(), scale=scale(), rounding=rounding(), widths=tuple(rules),
        low_rank=LowRankRule(
            rank=whole(), error_rank=whole(), iterations=whole(1), mean=yes(),
            store=rng.choice(["float", "int8"]),
        ),
        grid=Grid(
            bits=rng.choice(BITS), group_size=group(), symmetric=yes(),
            zero_point=rng.choice(["float", "integer"]), store_dtype=rng.choice(STORE_DTYPES),
        ),
        prefill=rng.choice(["full", "quantized"]), select=rng.choice(SELECTS),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_is_read_back(seed):
    rng = random.Random(seed)
    for _ in range(100):
        recipe = random_recipe(rng)
        text = to_toml(recipe)
        back = from_toml(text)
        assert back == recipe
        assert hash(back) == hash(recipe)
        assert to_toml(back) == text


def test_a_file_names_every_choice():
    text = to_toml(dataclasses.replace(GPTQ, widths=(Width(select="layers/q", bits=8),)))
    for axis in ("moments", "scale", "rounding", "low_rank", "grid"):
        assert f"\n[{axis}]\n" in text
    assert 'rule = "second_order"' in text
    assert '[[widths]]\nselect = "layers/q"\nbits = 8\n' in text
    assert text.count(" = ") == sum(
        len(value) if isinstance(value, dict) else 2 if isinstance(value, list) else 1
        for value in [*GPTQ.describe().values(), "none"]  # the head
    )


def test_what_a_file_leaves_out_has_its_default():
    assert from_toml("") == Recipe()
    assert from_toml('[rounding]\nrule = "second_order"\ndamping = 1') == Recipe(
        rounding=SecondOrder(damping=1.0)
    )
    # An integer is a number; what comes out of it is traced as the float that was meant.
    alpha = from_toml("[scale]\nalpha = 1").scale.alpha
    assert (alpha, type(alpha)) == (1.0, float)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prefill = ", ["TOML", "line 1"]),
        ('prefill = "full"\n[grid]\nbits = = 3', ["TOML", "line 3"]),
        ("[grid]\nbits = 3\nbits = 4", ["TOML", "line 3"]),
        ("a = " + "[" * 5000, ["TOML"]),
        ("colour = 3", ["colour", "moments", "rounding", "select"]),
        ("[grid]\nbit = 3", ["grid.bit", "group_size"]),
        ("grid = 3", ["grid", "[grid]", "3"]),
        ("[grid]\nbits = 3.0", ["grid.bits", "integer", "3.0"]),
        ("[grid]\nbits = true", ["grid.bits", "integer", "True"]),
        ('[grid]\nbits = "3"', ["grid.bits", "integer", "'3'"]),
        ("[grid]\nsymmetric = 1", ["grid.symmetric", "true or false"]),
        ("[scale]\nalpha = nan", ["scale.alpha", "number", "nan"]),
        ("[scale]\nalpha = true", ["scale.alpha", "number", "True"]),
        (f"[scale]\nlam = {10**400}", ["scale.lam", "number"]),
        ("[grid]\nbits = 7", ["bits", "2, 3, 4, 5, 8", "7"]),
        ('[rounding]\nrule = "up"', ["rounding", "half_quadratic", "'up'"]),
        ("[rounding]\nrule = 3", ["rounding.rule", "string", "3"]),
        ("[rounding]\ndamping = 0.3",
         ["rounding.damping", "nearest", "damping belongs to rule second_order"]),
        ("prefill = 3", ["prefill", "string", "3"]),
        ('head = "x"', ["head", "an integer, or none", "'x'"]),
        ("head = 8.5", ["head", "an integer, or none", "8.5"]),
        ('prefill = "half"', ["prefill", "full, quantized", "half"]),
        ('widths = "down"', ["widths", "[[widths]]", "down"]),
        ("widths = [3]", ["widths", "[[widths]]"]),
        ("[[widths]]\nbits = 3", ["widths", "rule 1", "select"]),
        ('[[widths]]\nselect = "x"\nbit = 3', ["widths", "rule 1", "'bit'", "bits"]),
        ('[[widths]]\nselect = "x"\nbits = 3.5', ["widths.bits", "3.5"]),
        ('[moments]\nprior = "weights"', ["prior", "prior_tokens"]),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_recipe(text, parts):
    with pytest.raises(ConfigError) as error:
        from_toml(text)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ([], GPTQ),
        (["scale=searched"], dataclasses.replace(GPTQ, scale=SearchedAlpha())),
        (["scale.rule=searched", "scale.shared=true"],
         dataclasses.replace(GPTQ, scale=SearchedAlpha(shared=True))),
        (["rounding.damping=0.3"],
         dataclasses.replace(GPTQ, rounding=dataclasses.replace(GPTQ.rounding, damping=0.3))),
        # Its own rule changes nothing; another one begins with its defaults.
        (["rounding=second_order"], GPTQ),
        (["rounding=clip"], dataclasses.replace(GPTQ, rounding=ClipSearch())),
        (["rounding.static_groups=True", "rounding.act_order=true", "rounding.span=64"],
         dataclasses.replace(GPTQ, rounding=dataclasses.replace(
             GPTQ.rounding, static_groups=True, act_order=True, span=64))),
        (["moments=prompt"], dataclasses.replace(GPTQ, moments="prompt")),
        (["moments.of=prompt", "moments.prior=weights", "moments.prior_tokens=inf"],
         dataclasses.replace(GPTQ, moments=Source(prior="weights", prior_tokens=math.inf))),
        (["low_rank.error_rank=16", "grid.bits=3", "grid.bits=5"],
         dataclasses.replace(GPTQ, low_rank=LowRankRule(error_rank=16), grid=Grid(bits=5))),
        (["prefill = quantized", "batch=per_prompt", "select=layers/(q|k).?=*"],
         dataclasses.replace(GPTQ, prefill="quantized", batch="per_prompt",
                             select="layers/(q|k).?=*")),
        (['widths=[{select = "layers/down", bits = 5}]'],
         dataclasses.replace(GPTQ, widths=(Width(select="layers/down", bits=5),))),
        (["widths=[]"], GPTQ),
    ],
)  # fmt: skip
def test_settings(changes, wanted):
    assert with_settings(GPTQ, changes) == wanted


def test_the_order_of_settings_does_not_matter():
    changes = [
        "rounding.damping=0.1", "rounding=second_order", "moments.prior_tokens=64",
        "moments.prior=weights", "scale.shared=true", "scale=searched",
    ]  # fmt: skip
    one = with_settings(Recipe(), changes)
    assert one == with_settings(Recipe(), changes[::-1])
    assert one == Recipe(
        moments=Source(prior="weights", prior_tokens=64.0), scale=SearchedAlpha(shared=True),
        rounding=SecondOrder(damping=0.1),
    )  # fmt: skip


def test_a_choice_that_may_be_none_says_so():
    kinds = typing.get_type_hints(Recipe)
    optional = [name for name, kind in kinds.items() if type(None) in typing.get_args(kind)]
    assert optional == ["head"]
    for name in optional:
        with pytest.raises(ConfigError, match=f"{name}: expected .*, or none, got 'x'"):
            with_settings(Recipe(), [f"{name}=x"])
        assert getattr(with_settings(Recipe(head=4), [f"{name}=none"]), name) is None


def test_every_knob_of_every_rule_can_be_set():
    """A field whose type the reader does not know would only fail when someone sets it."""
    recipes = [PRESETS["ttq"].recipe]
    recipes += [Recipe(scale=rule()) for rule in RULES["scale"].values()]
    recipes += [Recipe(rounding=rule()) for rule in RULES["rounding"].values()]
    for recipe in recipes:
        for axis, value in recipe.describe().items():
            for key, one in value.items() if isinstance(value, dict) else [(None, value)]:
                name = axis if key is None else f"{axis}.{key}"
                if axis != "widths":
                    assert with_settings(recipe, [f"{name}={one}"]) == recipe, name


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("damping", ["AXIS.KEY=VALUE", "'damping'"]),
        ("scale.=3", ["AXIS.KEY=VALUE"]),
        ("damping=3", ["'damping'", "moments", "rounding", "grid"]),
        ("=3", ["''", "moments"]),
        ("grid=3", ["grid.bits", "grid.group_size"]),
        ("prefill.full=true", ["prefill=VALUE"]),
        ("scale=gptq", ["scale", "power_law", "searched", "'gptq'"]),
        ("scale.damping=3", ["scale.damping", "power_law", "alpha, lam, p"]),
        ("scale.steps=3", ["steps belongs to rule searched"]),
        ("low_rank.ranks=3", ["low_rank.ranks", "error_rank"]),
        ("grid.bits=three", ["grid.bits", "integer", "'three'"]),
        ("grid.bits=3.0", ["grid.bits", "integer", "'3.0'"]),
        ("grid.bits=", ["grid.bits", "integer", "''"]),
        ("grid.symmetric=yes", ["grid.symmetric", "true or false", "'yes'"]),
        ("scale.alpha=nan", ["scale.alpha", "number"]),
        ("scale.alpha=3", ["alpha", "3.0"]),
        ("moments.decay=2", ["decay", "2.0"]),
        ("moments.prior=weights", ["prior", "prior_tokens"]),
        ("moments=none", ["PowerLaw", "moments.of"]),
        ("batch=all", ["batch", "pooled, per_prompt", "'all'"]),
        ("select=(", ["select", "regular expression"]),
        ("widths=5", ["widths", "select", "5"]),
        ("widths=[{", ["widths", "TOML", "line 1"]),
    ],
)
def test_settings_that_mean_nothing(setting, parts):
    with pytest.raises(ConfigError) as error:
        with_settings(Recipe(), [setting])
    for part in parts:
        assert part in str(error.value)


def test_files(tmp_path):
    path = tmp_path / "mine.toml"
    save_recipe(path, GPTQ)
    assert load_recipe(path) == load_recipe(str(path)) == GPTQ
    save_recipe(path, Recipe())
    assert load_recipe(path) == Recipe()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "mine.toml"
    save_recipe(path, GPTQ)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ConfigError, match=r"mine.toml: cannot be written: No space"):
        save_recipe(path, Recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]
    assert load_recipe(path) == GPTQ


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "mine.toml"
    with pytest.raises(ConfigError, match=r"mine.toml: no such file"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory"):
        load_recipe(tmp_path)
    path.write_bytes(b'select = "\xff"')
    with pytest.raises(ConfigError, match=r"mine.toml: expected UTF-8 text, but byte 10"):
        load_recipe(path)
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"mine.toml: expected at least one choice"):
        load_recipe(path)
    path.write_text("[grid]\nbits = 7")
    with pytest.raises(ConfigError, match=r"mine.toml: bits: expected"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"x/mine.toml: cannot be written: No such file"):
        save_recipe(tmp_path / "x" / "mine.toml", Recipe())
    with pytest.raises(ConfigError, match=r"cannot be written"):
        save_recipe(tmp_path, Recipe())
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_every_name_that_the_package_offers_is_there():
    """They are imported at first use, so a wrong home would show only then."""
    for name in ttq_jax.__all__:
        value = getattr(ttq_jax, name)
        assert getattr(value, "__name__", name) == name
    assert ttq_jax.with_settings(ttq_jax.Recipe(), ["rounding=clip"]) == ttq_jax.Recipe(
        rounding=ttq_jax.ClipSearch()
    )
