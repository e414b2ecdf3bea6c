import itertools

import pytest

from ttq_jax.commands.parsers import build_parser
from ttq_jax.config import ConfigError
from ttq_jax.quant.clip import ClipSearch
from ttq_jax.quant.presets import preset
from ttq_jax.sweeps.axes import AXES, Options, make_cell, read_sweep

HEAD = 'model = "m"\ncorpus = "c.txt"\n'


def cells_of(tmp_path, text, *changes, head=HEAD):
    path = tmp_path / "sweep.toml"
    path.write_text(head + text)
    return read_sweep(str(path), changes)


def test_the_product_of_the_axes(tmp_path):
    cells = cells_of(tmp_path, 'recipe = ["rtn", "ttq"]\nbits = [2, 3, 4]\ngroup-size = [16, 32]')
    got = {(c.values["recipe"], c.values["bits"], c.values["group_size"]) for c in cells}
    assert got == set(itertools.product(("rtn", "ttq"), (2, 3, 4), (16, 32)))
    assert len(cells) == 12
    assert len({c.key for c in cells}) == 12
    for cell in cells:
        want = preset(
            cell.values["recipe"], bits=cell.values["bits"], group_size=cell.values["group_size"]
        )
        assert cell.recipe == want


def test_what_is_not_read_is_no_axis(tmp_path):
    text = (
        'method = ["none", "rtn", "awq"]\nbits = [3, 4]\ncalibration = ["a", "b"]\nalpha=[0.5]'
        '\nprotocol = ["causal", "window"]\nprompt_tokens = [16, 32]\n'
    )
    cells = cells_of(tmp_path, text.replace("alpha=[0.5]", ""))
    counts = {name: sum(c.values["recipe"] == name for c in cells) for name in
              ("none", "rtn", "awq")}  # fmt: skip
    # causal at two P, window at none: 3 settings.
    assert counts == {"none": 3, "rtn": 3 * 2, "awq": 3 * 2 * 2}
    assert all("prompt_tokens" not in c.values for c in cells if c.options.protocol == "window")
    # What the unquantized model does not read is no mistake for it.
    none, *_ = cells_of(tmp_path, 'recipe = ["none", "ttq"]\nalpha = 0.3')
    assert (none.recipe, none.error) == (None, "")


def test_any_field_of_a_recipe(tmp_path):
    text = (
        'recipe = "ttq"\nrounding = "clip"\n"rounding.steps" = [3, 5]\nscale.alpha = 0.25\n'
        "clip = false\n"
    )
    three, five = cells_of(tmp_path, text + "symmetric = true\nprefill = 'quantized'")
    assert three.recipe.rounding == ClipSearch(steps=3)
    assert (five.recipe.rounding.steps, five.recipe.scale.alpha) == (5, 0.25)
    assert five.recipe.grid.symmetric
    assert five.recipe.prefill == "quantized"


def test_the_axes_are_the_options_of_ttq_perplexity():
    given = build_parser().parse_args(["perplexity", "--model", "m", "--corpus", "c"])
    options = {"recipe" if name == "method" else name: v for name, v in vars(given).items()}
    no_axes = {"with_baseline", "prepared", "save_recipe", "settings", "json", "quiet", "debug",
               "cache_dir", "no_compilation_cache", "command", "mesh",
               "processes", "prefill_chunk"}  # fmt: skip
    assert options.keys() - no_axes == AXES.keys() - {"seed", "acceptance"}
    for name, value in vars(Options(model="m", corpus="c")).items():
        # Of an option that may be repeated none is an empty list.
        assert name in {"seed", "acceptance"} or (value or None) == (options[name] or None)


def test_parts_are_a_union_and_a_change_holds_for_all(tmp_path):
    text = 'bits = 3\n[[part]]\nrecipe = "rtn"\n[[part]]\nrecipe = ["ttq", "rtn"]\nbits = [3, 4]\n'
    assert [(c.values["recipe"], c.values["bits"]) for c in cells_of(tmp_path, text)] == [
        ("rtn", 3), ("rtn", 4), ("ttq", 3), ("ttq", 4),
    ]  # fmt: skip
    changed = cells_of(tmp_path, text, "bits=2", "corpus=a=x.txt,b=y.txt")
    assert [(c.values["corpus"], c.values["bits"]) for c in changed] == [("a", 2), ("b", 2)] * 2
    assert [c.options.corpus for c in changed] == ["x.txt", "y.txt"] * 2
    assert changed[0].key == cells_of(tmp_path, 'recipe="rtn"\nbits=2', "corpus=a=z.txt")[0].key


def test_cells_that_share_work_stand_together(tmp_path):
    text = 'corpus = ["x", "y"]\nbits = [3, 4]\nmodel = ["m", "n"]\nrecipe = ["ttq", "rtn"]\n'
    cells = cells_of(tmp_path, text, head="")
    order = [(c.values["model"], c.values["recipe"], c.values["bits"]) for c in cells]
    runs = [key for key, _ in itertools.groupby(order)]
    assert len(runs) == len(set(runs)) == 8
    assert [c.values["corpus"] for c in cells[:2]] == ["x", "y"]


def test_an_illegal_cell_knows_why(tmp_path):
    good, bad = cells_of(tmp_path, 'recipe = ["ttq", "gptq"]\nalpha = 0.5\ncalibration = "t"')
    assert not good.error
    assert "belongs to a power-law scale" in bad.error
    (odd,) = cells_of(tmp_path, "bits = 7")
    assert "bits" in odd.error
    (uncalibrated,) = cells_of(tmp_path, 'recipe = "awq"')
    assert "give the axis calibration" in uncalibrated.error
    (both,) = cells_of(tmp_path, 'cache_dtype = "int8"\nacceptance = true')
    assert "leave out the axis acceptance or cache_dtype" in both.error
    (protocol,) = cells_of(tmp_path, "prompt_tokens = 512")
    assert "1 <= P < window" in protocol.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bots = 3", "bots is not an axis; expected one of .*bits"),
        ("json = true", "json is not an axis"),
        ("rounding.dumping = 3", "no such key"),
        ("bits = []", "bits: expected a value or a list"),
        ("bits = [[3]]", "bits: expected a value or a list"),
        ('bits = "three"', "bits: expected an integer, got 'three'"),
        ("window = 3.5", "window: expected an integer, got 3.5"),
        ('dtype = "int8"', "dtype: expected one of float32, bfloat16, got 'int8'"),
        ('recipe = "tqq"', "did you mean ttq"),
        ("symmetric = 1", "symmetric: expected true or false"),
        ("seed = -1", "seed: expected an integer >= 0"),
        ("bits = ", "not TOML"),
        ("part = 3", "part: expected tables"),
    ],
)
def test_mistakes_name_the_axis(tmp_path, text, message):
    try:
        cells = cells_of(tmp_path, text)
    except ConfigError as e:
        found = str(e)
        assert "sweep.toml" in found
    else:
        found = cells[0].error
    import re

    assert re.search(message, found), found


def test_missing_axes_files_and_changes(tmp_path):
    with pytest.raises(ConfigError, match=r"the axis corpus is missing; give it, as in corpus ="):
        cells_of(tmp_path, 'model = "m"', head="")
    with pytest.raises(ConfigError, match=r"no such file; check the path$"):
        read_sweep(str(tmp_path / "none.toml"))
    for bad in ("bits", "=3", "bits="):
        with pytest.raises(ConfigError, match="--axis: expected KEY=VALUE"):
            cells_of(tmp_path, "", bad)
    with pytest.raises(ConfigError, match=r"got group_size twice.* --axis group_size=32,64,128$"):
        cells_of(tmp_path, "", "group-size=32,64", "bits=3", "group_size=128")


def test_a_key_depends_on_what_is_measured_and_on_nothing_else():
    point = {"model": "m", "corpus": "a=x.txt", "recipe": "ttq", "bits": 3}
    key = make_cell(point).key
    assert make_cell(point | {"corpus": "a=y.txt"}).key == key
    assert make_cell(point | {"bits": "3"}).key == key
    assert make_cell(point | {"calibration": "z"}).key == key
    for change in ({"corpus": "b=x.txt"}, {"bits": 4}, {"window": 256}, {"seed": 1}, {"rank": 4}):
        assert make_cell(point | change).key != key
