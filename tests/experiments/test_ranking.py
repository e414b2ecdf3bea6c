"""How many windows a measure needs, on rows made up."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
import ranking


def row(recipe, corpus, values, sha256="same"):
    """One of a sweep; of every measure the values are those of the first, but the sign."""
    agreement = {name: values.tolist() for name in ranking.MEASURES}
    return {
        "cell": {"recipe": recipe, "corpus": corpus, "bits": 4, "group_size": 64},
        "recipe": None if recipe == "none" else {}, "corpus_sha256": sha256 + corpus,
        "scored": 2, "nll": (2 * values).tolist(), "acceptance": agreement,
    }  # fmt: skip


def test_so_many_windows_find_the_difference_four_times_in_five():
    rng = np.random.default_rng(0)
    many = rng.normal(0.1, 0.5, 200_000)
    windows, told = ranking.needed(many, np.zeros_like(many))
    assert told
    n = int(np.ceil(windows))
    assert n == pytest.approx((2.8 * 5) ** 2, rel=0.05)
    tried = rng.normal(0.1, 0.5, (4000, n))
    assert np.mean(stats.ttest_1samp(tried, 0, axis=1).pvalue < 0.05) == pytest.approx(
        0.8, abs=0.02
    )


def test_windows_are_those_of_every_corpus_and_pairs_are_named():
    rng = np.random.default_rng(1)
    base = {corpus: rng.normal(size=6) for corpus in "ab"}
    noise = rng.normal(size=(2, 6))
    rows = [row("none", "b", base["b"])]
    rows += [row("rtn", corpus, base[corpus]) for corpus in "ba"]
    rows += [
        row("fast", corpus, base[corpus] - 1 + 0.1 * noise[i]) for i, corpus in enumerate("ab")
    ]
    rows += [row("hqq", corpus, base[corpus] + 3 * noise[i]) for i, corpus in enumerate("ab")]
    found = ranking.measured(rows)
    assert list(found) == [f"{name}, 4 bits, groups of 64" for name in ("rtn", "fast", "hqq")]
    difference = found["rtn, 4 bits, groups of 64"]["perplexity"]
    difference = difference - found["fast, 4 bits, groups of 64"]["perplexity"]
    np.testing.assert_allclose(difference, 1 - 0.1 * noise.ravel())
    head, near, far, _ = ranking.cells(found)
    assert head == ["recipes", "perplexity", "same token", "acceptance", "KL divergence"]
    assert near[1:] == ["2"] * 4, "a difference ten times its spread takes two windows"
    assert all(cell.endswith(" ?") for cell in far[1:])


def test_other_windows_are_refused():
    values = np.ones(3)
    with pytest.raises(ValueError, match="every recipe on the same windows; finish the sweep"):
        ranking.measured([row("rtn", "a", values), row("fast", "a", values, sha256="other")])
    with pytest.raises(ValueError, match="finish the sweep"):
        ranking.measured([row("rtn", "a", values), row("fast", "a", values[:2])])
