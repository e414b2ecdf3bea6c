"""What processes tell each other, with the others' messages made up."""

import json

import jax
import pytest

from ttq_jax import processes
from ttq_jax.config import ConfigError
from ttq_jax.processes import ApartError, alike, everyone, expect_same, of_first


@pytest.fixture
def second(monkeypatch):
    """This process is the second of three; called with what the others say, in their order."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(jax, "process_index", lambda: 1)

    def others(*meetings):
        left = list(meetings)

        def exchanged(own):
            first, third = left.pop(0)
            return [json.dumps(first).encode(), own, json.dumps(third).encode()]

        monkeypatch.setattr(processes, "_exchanged", exchanged)
        return left

    return others


def test_a_process_by_itself_asks_nobody():
    assert everyone("a place", {"a": 1}) == [{"a": 1}]
    assert of_first("a place", lambda: 3) == alike("a place", lambda: 3) == 3
    expect_same("a place", 4)


def test_everyone_has_what_each_says(second):
    left = second((["it", "one"], ["it", None]))
    assert everyone("it", [2]) == ["one", [2], None]
    assert not left


def test_what_fails_in_one_process_fails_in_all(second):
    second((["work", None], ["work", None]))
    assert alike("work", lambda: 5) == 5
    second((["work", None], ["work", "MemoryError: no room"]))
    with pytest.raises(
        ConfigError, match=r"work: failed in process 2 of 3 \(MemoryError: no room\)"
    ):
        alike("work", lambda: 5)

    def fails():
        raise OSError("broken here")

    second((["work", None], ["work", "OSError: broken there"]))
    with pytest.raises(OSError, match="broken here"):
        alike("work", fails)


def test_only_the_first_makes_what_is_its_own(second):
    def never():
        raise AssertionError("made in another process")

    second((["it", None], ["it", None]), (["it", "made"], ["it", None]))
    assert of_first("it", never) == "made"
    second((["it", "OSError: full"], ["it", None]))
    with pytest.raises(ConfigError, match=r"it: failed in process 0 of 3 \(OSError: full\)"):
        of_first("it", never)


def test_what_changes_results_has_to_be_the_same(second):
    second((["bits", 4], ["bits", 4]), (["bits", 4], ["bits", 3]))
    expect_same("bits", 4)
    with pytest.raises(ConfigError, match="bits: expected the same in every process, got 4 in the"):
        expect_same("bits", 4)


def test_processes_at_other_places_stop(second):
    second((["one", 1], ["one", 1]))
    with pytest.raises(ApartError, match="process 1 of 3 is at two, and another at one; look at"):
        everyone("two", 1)
    second((["one", 1], ["one", 1]))
    with pytest.raises(ApartError, match=r"is at two.*; here it failed \(KeyError: 'x'\)"):
        alike("two", lambda: {}["x"])


def test_who_does_not_come_is_waited_for_within_time(second, monkeypatch):
    second()

    def late(own):
        raise ApartError("one did not come within 300 seconds")

    monkeypatch.setattr(processes, "_exchanged", late)
    said = "process 1 of 3 is at it, and one did not come within 300 seconds; look at what"
    with pytest.raises(ApartError, match=said):
        everyone("it", 1)
