"""Intervals of means over windows: they cover what they claim, and few windows have none."""

import numpy as np
import pytest
from scipy import stats

from ttq_jax.evaluation.intervals import interval95
from ttq_jax.evaluation.perplexity import interval95 as perplexity95


def test_of_one_text_it_is_student_s():
    rng = np.random.default_rng(0)
    for n in (5, 8, 40):
        sample = rng.normal(3, 0.3, n)
        want = stats.t.interval(0.95, n - 1, sample.mean(), stats.sem(sample))
        np.testing.assert_allclose(interval95([sample]), np.exp(want), rtol=1e-9)
        np.testing.assert_allclose(perplexity95(list(7 * sample), 7), np.exp(want), rtol=1e-9)


def test_few_windows_have_none():
    for counts in ((), (1,), (2,), (4,)):
        for n in counts:
            assert interval95([np.arange(n)]) is None
    assert perplexity95([], 10) is None
    assert perplexity95([5.0, 6.0, 5.5, 5.2], 10) is None
    assert perplexity95([5.0, 6.0, 5.5, 5.2, 5.7], 10) is not None
    assert interval95([np.arange(2)] * 3) is None
    assert interval95([np.arange(2)] * 4) is not None
    assert interval95([np.arange(9), np.arange(1)]) is None


@pytest.mark.parametrize(("texts", "windows"), [(1, 5), (3, 4), (5, 8)])
def test_it_covers_the_truth_in_95_of_100_cases(texts, windows):
    rng = np.random.default_rng(1)
    means, spread = rng.uniform(0.1, 1, texts), rng.uniform(0.02, 0.2, texts)
    truth, hits = np.exp(means).mean(), 0
    for _ in range(2000):
        low, high = interval95(list(rng.normal(means[:, None], spread[:, None], (texts, windows))))
        hits += low < truth < high
    assert 0.935 < hits / 2000 < 0.975


def test_windows_that_agree_have_a_point():
    assert interval95([[0.1] * 5, [0.3] * 5]) == pytest.approx(
        [(np.exp(0.1) + np.exp(0.3)) / 2] * 2
    )
