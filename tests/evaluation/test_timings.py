import pytest
from test_jax_switches import MODEL, RECIPES

import ttq_jax as ttq
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.timings import Timings, time_answers


class Clock:
    """Each run takes what was set: the n-th reading of the clock ends or begins one."""

    def __init__(self, seconds):
        self.left, self.now, self.running = list(seconds), 0.0, False

    def __call__(self):
        self.running = not self.running
        if not self.running:
            self.now += self.left.pop(0)
        return self.now


def test_recipes_take_turns_and_the_medians_count():
    #       none: first, whole   ttq: first, whole
    clock = Clock([1.0, 3.0, 1.5, 2.0, 1.1, 3.1, 1.5, 2.0, 9.0, 3.2, 1.6, 2.5])
    recipes = {"none": None, "ttq": RECIPES["ttq"]}
    got = time_answers(MODEL, ["ab", "c"], recipes, max_new_tokens=6, runs=3, clock=clock)
    assert not clock.left
    assert got["none"].first == (1.0, pytest.approx(1.1), pytest.approx(9.0))
    assert got["none"].first_token == pytest.approx(1.1)
    assert got["ttq"].decode is None  # 0.5 seconds, but the runs of the answer differ by as much
    assert got["ttq"].first_token == pytest.approx(1.5)
    answers = ttq.generate(MODEL, ["ab", "c"], recipe=None, max_new_tokens=6, batch_size=2)
    assert got["none"].new_tokens == sum(min(len(row), 5) for row in answers.tokens)


def test_no_speed_within_the_spread():
    clear = Timings(first=(1.0, 1.1, 1.0), whole=(3.0, 3.1, 3.2), steps=5, new_tokens=10)
    assert clear.decode == pytest.approx(2.1)
    assert clear.tokens_per_second == pytest.approx(10 / 2.1)
    assert "then 4.76 tokens/s (median of 3 runs after the answer)" in clear.in_words()
    noisy = Timings(first=(1.0, 3.5, 1.0), whole=(3.0, 3.1, 3.2), steps=5, new_tokens=10)
    assert noisy.decode is None
    assert noisy.describe()["tokens_per_second"] is None
    assert "less than the runs differ (2.5 s)" in noisy.in_words()
    one_token = Timings(first=(1.0, 1.0, 1.0), whole=(3.0, 3.0, 3.0), steps=0, new_tokens=0)
    assert one_token.decode is None
    assert one_token.in_words() == "first token after 1 s (median of 3 runs after the answer)"


def test_two_runs_have_no_spread():
    with pytest.raises(ConfigError, match="runs: expected at least 3, got 2"):
        time_answers(MODEL, ["a"], {"none": None}, runs=2)
