import json

import pytest

from ttq_jax.config import ConfigError
from ttq_jax.foreign import COUNT, check, is_inside, parse_json, parse_toml, read_json

SCHEMA = {"n": COUNT, "name?": (str, None), "parts": [{"kind": frozenset({"a", "b"})}], "x?": float}
EITHER = ({"node": frozenset({"A"}), "v": {"k": int}}, {"node": frozenset({"B"}), "w": [str]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": -Infinity}', "Infinity is no number"),
        ('{"a": [-1e999]}', "no computer holds the number '-1e999'"),
        ('{"a": "\\ud800"}', "expected valid JSON"),
        ("[" * 100 + "]" * 100, "at most 64 levels"),
        ("[" * 100_000, "expected valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "expected valid JSON"),
        (b'{"a": "\xff"}', "expected valid JSON"),
        ("", "expected valid JSON"),
    ],
)
def test_json_that_is_not_what_it_seems(text, says):
    with pytest.raises(ConfigError, match=says) as e:
        parse_json(text, "a.json", ConfigError)
    assert str(e.value).startswith("a.json: ")
    assert len(str(e.value)) < 400


def test_json_as_published():
    assert parse_json(b'\xef\xbb\xbf{"\xc3\xa4": [1e3, null]}', "a", ConfigError) == {
        "ä": [1000.0, None]
    }


def test_a_small_file_is_asked_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(["x" * 100]))
    with pytest.raises(ConfigError, match="expected at most 50 bytes, found 104"):
        read_json(path, ConfigError, [str], most=50)
    assert read_json(path, ConfigError, [str]) == ["x" * 100]
    with pytest.raises(ConfigError, match="expected this file, found none"):
        read_json(tmp_path / "none", ConfigError)
    with pytest.raises(ConfigError, match="found a directory, a pipe or a device"):
        read_json(tmp_path, ConfigError)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"n": -1, "parts": []}, "n: expected an integer from 0"),
        ({"n": True, "parts": []}, "n: expected an integer from 0"),
        ({"n": 1.0, "parts": []}, "n: expected an integer from 0"),
        ({"n": 1}, "expected the key 'parts'"),
        ({"n": 1, "parts": [{"kind": "c"}]}, r"parts\[0\].kind: expected 'a' or 'b', got 'c'"),
        ({"n": 1, "parts": {}}, "parts: expected a list"),
        ({"n": 1, "parts": [], "name": 3}, "name: expected a text or null, got 3"),
        ({"n": 1, "parts": [], "x": float("inf")}, "x: expected a finite number"),
        ([], "its content: expected an object"),
    ],
)
def test_what_does_not_fit_is_named(value, says):
    with pytest.raises(ConfigError, match=says):
        check(value, SCHEMA, "a", ConfigError)


def test_what_fits_and_further_keys_are_accepted():
    whole = {"n": 3, "parts": [{"kind": "a", "more": 1}], "name": None, "x": 1, "other": object()}
    check(whole, SCHEMA, "a", ConfigError)


def test_any_of_several_alternatives_is_accepted():
    check({"node": "A", "v": {"k": 1}}, EITHER, "a", ConfigError)
    check({"node": "B", "w": ["x"]}, EITHER, "a", ConfigError)
    with pytest.raises(ConfigError, match=r"a: v\.k: expected an integer, got 'x'"):
        check({"node": "A", "v": {"k": "x"}}, EITHER, "a", ConfigError)
    with pytest.raises(ConfigError, match="node: expected"):
        check({"node": "C", "v": {"k": 1}}, EITHER, "a", ConfigError)


def test_toml_of_a_bounded_depth():
    assert parse_toml("\ufeffa = 1", "a", ConfigError) == {"a": 1}
    with pytest.raises(ConfigError, match="a: "):
        parse_toml("a = " + "[" * 200 + "]" * 200, "a", ConfigError)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_paths_that_leave(name):
    assert not is_inside(name)
    assert is_inside("sub/model-00001-of-00002.safetensors")
