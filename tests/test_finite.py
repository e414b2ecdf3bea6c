"""Infinities and NaN end every program with an error that says where they came up."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import random_rows
from test_jax_switches import MODEL, ONE
from tiny_files import write_model

import ttq_jax as ttq
from ttq_jax.commands.main import main
from ttq_jax.errors import NotFiniteError
from ttq_jax.evaluation.continuations import continue_until, score_continuations
from ttq_jax.finite import all_finite, check_offline
from ttq_jax.offline.allocate import measure_widths
from ttq_jax.quant.scaling import PowerLaw
from ttq_jax.sampling import Sampling, make_key
from ttq_jax.sweeps.rows import read_rows
from ttq_jax.types import Offline

WINDOWS = np.asarray(random_rows([12], seed=5))
PROTOCOL = ttq.Protocol(window=12, prompt_tokens=6)
HIGH_POWER = ttq.preset("ttq", group_size=8, scale=PowerLaw(p=8.0), select=ONE)
MIXED = dataclasses.replace(HIGH_POWER, widths=(ttq.Width(select="layers/1/q", bits=2),))


def changed(path, value):
    """The model with one array's second layer, or its fourth row, set to a value."""

    def one(at, a):
        here = jax.tree_util.keystr(at, simple=True, separator="/") == path
        return a.at[1 if path.startswith("layers") else 3].set(value) if here else a

    return dataclasses.replace(MODEL, params=jax.tree.map_with_path(one, MODEL.params))


# What is changed, the recipe, and what the message says.
BROKEN = {
    "a weight": (("layers/down/kernel", jnp.nan), None, r"model's weights .* layer 1 \(down\)"),
    "a weight that is quantized": (
        ("layers/q/kernel", jnp.inf), HIGH_POWER, r"model's weights .* layer 1 \(q\)"
    ),
    "the embedding": (("embed/embedding", jnp.nan), None, "embedding, head or last norm"),
    "the model's own numbers": (
        ("layers/attn_norm/scale", 3e38), None, r"reading the text .* layer 1 \(keys\)"
    ),
    "a high power of large activations": (
        ("layers/attn_norm/scale", 1e6), HIGH_POWER, r"quantized weights .* layer 1 \(q\) on\. Rec"
    ),
    "the same in mixed widths": (
        ("layers/attn_norm/scale", 1e6), MIXED, r"quantized weights .* from q on\. Recipe none"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_an_answer_and_a_score_say_where(case):
    change, recipe, says = BROKEN[case]
    model = changed(*change)
    with pytest.raises(NotFiniteError, match=says):
        # The prompt's tokens are rows 3 and 7 of the embedding.
        ttq.generate(model, [chr(3) + chr(7)], recipe=recipe, max_new_tokens=2)
    if case != "the embedding":
        with pytest.raises(NotFiniteError, match=says):
            ttq.perplexity(model, WINDOWS, recipe=recipe, protocol=PROTOCOL)


def test_what_is_left_out_of_the_text_does_not_matter():
    # No token of the prompt or of the answer is read from this row.
    model = changed("embed/embedding", 1.0)
    made = ttq.generate(model, [chr(3) + chr(7)], recipe=None, max_new_tokens=2)
    assert made.stopped == ["limit"]


def test_continuations_say_where():
    model = changed("layers/attn_norm/scale", 1e6)
    how = {"recipe": HIGH_POWER, "offline": Offline()}
    with pytest.raises(NotFiniteError, match=r"layer 1 \(q\)"):
        score_continuations(model, [3, 7], [[1, 2]], **how)
    with pytest.raises(NotFiniteError, match=r"layer 1 \(q\)"):
        continue_until(model, [3, 7], [], 2, make_key(0), sampling=Sampling(), **how)


def test_each_row_s_own_tree_counts():
    recipe = dataclasses.replace(HIGH_POWER, batch="per_prompt")
    with pytest.raises(NotFiniteError, match=r"quantized weights"):
        ttq.generate(
            changed("layers/attn_norm/scale", 1e6), [chr(3), chr(7)], recipe=recipe, batch_size=2,
            max_new_tokens=2,
        )  # fmt: skip


def test_what_is_prepared_and_allocated_is_checked():
    model = changed("layers/attn_norm/scale", 1e6)
    corpus = dataclasses.replace(HIGH_POWER, moments="corpus")
    with pytest.raises(NotFiniteError, match=r"moments: layer 1 \(attn_in\).*powers \[8\.0\]"):
        ttq.prepare(model, corpus, WINDOWS)
    with pytest.raises(NotFiniteError, match=r"quantized weights"):
        measure_widths(
            model.params, WINDOWS, HIGH_POWER, Offline(), config=model.config, prompt_tokens=6,
            widths=(3,),
        )  # fmt: skip


def test_integers_and_empty_trees_are_finite():
    assert all_finite({"a": jnp.arange(3), "b": None})
    assert all_finite({})
    assert not all_finite({"a": jnp.arange(3), "b": jnp.asarray([1.0, -jnp.inf])})
    check_offline(Offline(), HIGH_POWER)


def test_a_failed_cell_is_a_row_and_the_rest_goes_on(tmp_path, capsys):
    model, text = write_model(tmp_path / "tiny"), tmp_path / "text.txt"
    text.write_text("Some lines of text.\n" * 40)
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'model = "tiny={model}"\ncorpus = "text={text}"\nwindow = 24\nprompt_tokens = 12\n'
        'max_windows = 1\nrecipe = "ttq"\nselect = "layers/q"\np = [40, 2]\n'
    )
    out = tmp_path / "out"
    words = ["sweep", str(sweep), "--out", str(out), "--no-compilation-cache"]
    assert main(words) == 2
    assert "1 of 2 cells failed" in capsys.readouterr().err
    rows = list(read_rows(out).values())
    assert [("error" in row) for row in rows] == [True, False]
    assert "scale.p: expected 0.1 to 8" in rows[0]["error"]
    assert main(words) == 2  # resumed: nothing is run again, nothing ends it early
    assert [json.dumps(row) for row in read_rows(out).values()] == [json.dumps(r) for r in rows]
