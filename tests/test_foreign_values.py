"""Files that nobody vouches for: what JSON may be, what a schema says, and what a path may name."""

import json
import os

import pytest

from ttq_jax.foreign import (
    COUNT,
    check,
    is_file,
    is_inside,
    named,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    shown,
)


class Refusal(ValueError):
    pass


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 2, "c": 2}}', "the key 'c' is there twice"),
        ('{"a": NaN}', "NaN is no number"), ("[-Infinity]", "-Infinity is no number"),
        ("[" * 65 + "]" * 65, "at most 64 levels"), ("[" * 10**6, "valid JSON"),
        ('{"a":' * 65 + "1" + "}" * 65, "at most 64 levels"),
        ('["\\ud800"]', "surrogates not allowed"), ("1" * 5000, "valid JSON"),
        ("", "valid JSON"), ("{} {}", "valid JSON"), (b"\xff\xfe{}", "valid JSON"),
    ],
)  # fmt: skip
def test_json_that_is_not_what_it_seems_is_refused(text, said):
    with pytest.raises(Refusal, match="here") as found:
        parse_json(text, "here", Refusal)
    assert said in str(found.value)
    assert len(str(found.value)) < 300 and "\n" not in str(found.value)


def test_json_that_is_sound_is_read():
    value = {"a": [1, -2.5, None, True, {"b": "déjà \U0001f600"}], "deep": [[[[[]]]]]}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text, "", Refusal) == value
        assert parse_json(b"\xef\xbb\xbf" + text.encode(), "", Refusal) == value
    assert parse_json("[" * 64 + "]" * 64, "", Refusal)


def test_toml_is_bounded_too():
    assert parse_toml("\ufeffa.b = 1", "", Refusal) == {"a": {"b": 1}}
    for text in (f"a = {'[' * 100}{']' * 100}", f"a = {'[' * 10**5}", "a = 1\na = 2", "a ="):
        with pytest.raises(Refusal, match="here"):
            parse_toml(text, "here", Refusal)


SCHEMA = {
    "ids": (None, COUNT, [COUNT]), "map": {"*": {"kind": frozenset({"x", "y"})}}, "name?": str,
    "size?": float, "flag?": bool, "any?": object, "inside?": {"deep": [[int]]},
}  # fmt: skip
SOUND = {"ids": [0, 2**31 - 1], "map": {"a": {"kind": "x", "more": 1}}, "more": None}


@pytest.mark.parametrize(
    "change",
    [
        {}, {"ids": None}, {"ids": 3}, {"map": {}}, {"name": ""}, {"size": 1}, {"size": -0.5},
        {"flag": False}, {"any": [{}]}, {"inside": {"deep": [[], [-1, 10**400]]}},
    ],
)  # fmt: skip
def test_what_fits(change):
    check(SOUND | change, SCHEMA, "here", Refusal)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": -1}, "ids: expected null or an integer from 0 to 2147483647 or a list, got -1"),
        ({"ids": True}, "ids: expected null or"), ({"ids": [1, 2**31]}, r"ids\[1\]: expected"),
        ({"ids": [1.0]}, r"ids\[0\]"), ({"ids": "1"}, "ids"), ({"map": []}, "map: expected an ob"),
        ({"map": {"a": {}}}, r"map\.a: expected the key 'kind', found none"),
        ({"map": {"a": {"kind": "z"}}}, r"map\.a\.kind: expected 'x' or 'y', got 'z'"),
        ({"map": {"a": {"kind": ["x"]}}}, r"map\.a\.kind"),
        ({"name": None}, "name: expected a text"),
        ({"size": 10**400}, "size: expected a finite number, got 1000"), ({"size": True}, "size"),
        ({"size": float("nan")}, "size: expected a finite number, got nan"),
        ({"flag": 1}, "flag: expected true or false"),
        ({"inside": {"deep": [[], [0, "x"]]}}, r"inside\.deep\[1\]\[1\]: expected an integer"),
        ({"name": ["x" * 10**6]}, "name: expected a text, got"),
        ({"map": {"k" * 10**6: 3}}, "map.k+: expected an object, got 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_short_line(change, said):
    with pytest.raises(Refusal, match=f"^here: {said}") as found:
        check(SOUND | change, SCHEMA, "here", Refusal)
    assert len(str(found.value)) < 250


def test_a_value_is_quoted_in_80_characters():
    for value in ("x" * 10**6, list(range(10**5)), {"a": {"b": "\n" * 99}}, int("f" * 9999, 16)):
        assert len(shown(value)) <= 80 and "\n" not in shown(value)
    assert shown([1, "a"]) == "[1, 'a']"
    assert named(["a", "b"]) == "a, b"
    assert named("abcdefgh") == "a, b, c, d, e and 3 more"
    assert len(named(["x" * 999] * 999)) < 450


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    for name, said in (
        ("pipe", "a pipe or a device"), ("link", "a pipe or a device"), (".", "a directory"),
        ("/dev/zero", "a device"), ("none", "expected this file, found none"),
        ("large", "at most 10 bytes, found 11"),
    ):  # fmt: skip
        with pytest.raises(Refusal, match=said):
            read_bytes(tmp_path / name, Refusal, 10)
    assert not is_file(tmp_path / "pipe") and not is_file(tmp_path / ("x" * 999))
    assert not is_file(tmp_path / "a\0b") and is_file(tmp_path / "large")
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to("blob")  # as a hub's cache has them
    assert read_json(tmp_path / "link.json", Refusal, {"a": int}) == {"a": 1}


def test_a_name_stays_in_its_directory():
    assert all(map(is_inside, ("a", "a/b", "a..b", "...", "a b")))
    assert not any(map(is_inside, ("", "/a", "..", "../a", "a/../../b", "a\0", "a/..")))
