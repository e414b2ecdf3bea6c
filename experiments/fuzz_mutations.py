"""Damage to files: bytes of any file, and the structure of JSON, TOML and GGUF ones.

Every function takes a `random.Random` and returns bytes, so that a seed names a file.
"""

import copy
import json
import random
import struct
import tomllib
from typing import Any

import tomli_w

_NUMBERS = (0, 1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 257, 20_000_000, 2**31, 2**63, 10**30, 10**400, -0.5, 0.5,
    1e-46, 1e300, float("inf"), float("nan"), "", "x", "true", "../../etc/passwd", "/dev/zero",
    "a\0b", "\ud800", "x" * 100_000, "([", "a{999999999999}", [], [[]], {}, {"": None}, [1, 2, 3],
    [None] * 10_000, {"a": {"b": {}}}, {"content": 3}, ["full_attention"] * 2, "linear", "llama3",
)  # fmt: skip


def damaged_bytes(rng: random.Random, data: bytes, head: int = 0) -> bytes:
    """One to four changes, half of them among the first `head` bytes if that is given."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = len(out) if not head or rng.random() < 0.5 else min(head, len(out))
        at, other = rng.randrange(end + 1), rng.randrange(end + 1)
        size = rng.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = rng.randrange(9)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = bytes(rng.randrange(256) for _ in range(size))
        elif kind == 4:
            out[at:at] = out[other : other + size]
        elif kind == 5:
            out[at : at + size] = out[other : other + size]
        elif kind == 6:
            del out[at:]
        elif kind == 7:
            width = rng.choice((4, 8))
            number = (rng.choice(_NUMBERS) + rng.choice((-1, 0, 0, 1))) % 2 ** (8 * width)
            out[at : at + width] = number.to_bytes(width, "little")
        else:
            out += bytes(size)
    return bytes(out)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON data; of a long list or object a few."""
    found = [path]
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = list(value)
    elif isinstance(value, list):
        inside = list(range(len(value)))
    for key in inside if len(inside) < 40 else [*inside[:8], *inside[-8:]]:
        found += _places(value[key], (*path, key))
    return found


def damaged_data(rng: random.Random, value: Any) -> Any:
    """JSON data with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *way, last = rng.choice(_places(value)[1:] or [(None,)])
        if last is None:
            return rng.choice(_VALUES)
        holder = value
        for key in way:
            holder = holder[key]
        there, kind = holder[last], rng.randrange(8)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("new", "", "a.b", last + "x"))] = rng.choice(_VALUES)
        elif kind == 2:
            other = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[last], holder[other] = holder[other], holder[last]
        elif kind == 3 and type(there) in {int, float}:
            change = (there + 1, there - 1, -there, there * 1000, there // 2, there * 2, str(there))
            holder[last] = rng.choice(change)
        elif kind == 4:
            deep: Any = there
            for _ in range(rng.choice((1, 3, 100, 300))):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            holder[last] = deep
        else:
            holder[last] = copy.deepcopy(rng.choice(_VALUES))
    return value


def damaged_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON file with its data changed, or a key twice, or very deep, or with another start."""
    value, kind = json.loads(data), rng.randrange(12)
    if kind == 0 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        again = json.dumps({key: rng.choice((value[key], None, 1, "x"))})[1:-1]
        return f"{json.dumps(value)[:-1]}, {again}}}".encode()
    if kind == 1:
        return rng.choice((b"[", b'{"a":')) * rng.choice((50, 5000, 500_000))
    if kind == 2:
        return rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b"//\n", b"\0")) + data
    text = json.dumps(damaged_data(rng, value), ensure_ascii=rng.random() < 0.7)
    return text.encode("utf-8", "surrogatepass")


def damaged_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines with a line damaged, missing, twice, or empty."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(at, rng.choice((lines[at], b"\n", b"null\n", b"[]\n")))
    else:
        lines[at] = damaged_json(rng, lines[at]) + b"\n"
    return b"".join(lines)


def damaged_toml(rng: random.Random, data: bytes) -> bytes:
    """A TOML file with its data or its lines changed."""
    if rng.random() < 0.6:
        try:
            return tomli_w.dumps(damaged_data(rng, tomllib.loads(data.decode()))).encode()
        except (TypeError, ValueError, AttributeError, RecursionError):
            pass  # a change that TOML cannot write
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    values = (b"[[[[" * 300, b"0x" + b"f" * 5000, b"1" * 5000, b"nan", b"-inf", b"9" * 30, b"[[",
              b"1979-05-27", b"'''", b'"\\ud800"', b"{a=1}", b"true", b"[1, 'a']", b"''", b"[]",
              b"[" + b"1," * 3000 + b"]")  # fmt: skip
    kind = rng.randrange(4)
    if kind == 0:
        lines.insert(at, lines[other])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        lines[at] = lines[at].split(b"=")[0] + b"= " + rng.choice(values)
    else:
        lines.insert(
            at, rng.choice((b"[a.b]", b"[[part]]", b"a.b.c = 1", b"=", b"[grid]", b"x = 1"))
        )
    return b"\n".join(lines)


def _gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def parts_of_gguf(data: bytes) -> tuple[list[list[Any]], list[list[Any]], bytes]:
    """A sound GGUF file: keys (name, type, value), tensors (name, shape, type, offset), data."""
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    at = 24
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)

    def string() -> bytes:
        nonlocal at
        (size,) = struct.unpack_from("<Q", data, at)
        at += 8 + size
        return data[at - size : at]

    keys, tensors = [], []
    for _ in range(n_keys):
        name = string()
        (kind,) = struct.unpack_from("<I", data, at)
        start = at = at + 4
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = struct.unpack_from("<IQ", data, at)
            at += 12
            for _ in range(count if inner == 8 else 0):
                string()
            at += 0 if inner == 8 else sizes[inner] * count
        else:
            at += sizes[kind]
        keys.append([name, kind, data[start:at]])
    for _ in range(n_tensors):
        name = string()
        (axes,) = struct.unpack_from("<I", data, at)
        shape = list(struct.unpack_from(f"<{axes}Q", data, at + 4))
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * axes)
        at += 16 + 8 * axes
        tensors.append([name, shape, kind, offset])
    return keys, tensors, data[-(-at // 32) * 32 :]


def gguf_of(keys: list[list[Any]], tensors: list[list[Any]], data: bytes, extra: int = 0) -> bytes:
    """The file of such parts; its count of tensors is `extra` too large."""
    out = b"GGUF" + struct.pack("<IQQ", 3, (len(tensors) + extra) % 2**64, len(keys))
    for name, kind, value in keys:
        out += _gguf_string(name) + struct.pack("<I", kind) + value
    for name, shape, kind, offset in tensors:
        shape = [size % 2**64 for size in shape]
        out += _gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", kind, offset % 2**64)
    return out + bytes(-len(out) % 32) + data


def damaged_gguf(rng: random.Random, data: bytes) -> bytes:
    """A GGUF file of which a key or a tensor's entry was changed."""
    keys, tensors, rest = parts_of_gguf(data)
    extra = 0
    for _ in range(rng.choice((1, 1, 2))):
        key, tensor, kind = rng.choice(keys), rng.choice(tensors), rng.randrange(12)
        if kind == 0:
            keys.insert(rng.randrange(len(keys)), list(key))
        elif kind == 1:
            keys.remove(key)
        elif kind == 2:
            number = (rng.choice(_NUMBERS) % 2**63).to_bytes(8, "little")
            kinds = [(4, number[:4]), (10, number), (5, number[:4]), (7, number[:1]),
                     (6, number[:4]),
                     (8, _gguf_string(rng.choice((b"", b"x", b"\xff", b"llama")))),
                     (9, struct.pack("<IQ", 4, 2) + number), (9, struct.pack("<IQ", 9, 1) + number),
                     (9, struct.pack("<IQ", 8, 1) + _gguf_string(b"a")), (77, b"")]  # fmt: skip
            key[1:] = rng.choice(kinds)
        elif kind == 3 and key[1] == 9:
            inner, count = struct.unpack_from("<IQ", key[2])
            count = (count + rng.choice((-1, 1, 1000, 2**40, 2**63))) % 2**64
            key[2] = struct.pack("<IQ", inner, count) + key[2][12:]
        elif kind == 4:
            tensors.insert(rng.randrange(len(tensors)), list(tensor))
        elif kind == 5:
            other = rng.choice(tensors)
            tensor[3], other[3] = other[3], tensor[3]
        elif kind == 6:
            tensor[3] += rng.choice((-32, 32, 1, -1, 64, 2**40, 2**63))
        elif kind == 7:
            axis = rng.randrange(len(tensor[1]))
            tensor[1][axis] = rng.choice((0, 1, tensor[1][axis] * 2, tensor[1][axis] + 32, 2**62))
        elif kind == 8:
            tensor[1] = rng.choice((tensor[1][::-1], [*tensor[1], 1], tensor[1][:1], [1] * 9, []))
        elif kind == 9:
            tensor[2] = rng.choice((0, 1, 2, 3, 8, 12, 14, 20, 30, 99))
        elif kind == 10:
            other = rng.choice(tensors)
            tensor[0], other[0] = other[0], tensor[0]
        else:
            extra = rng.choice((-1, 1, 2**40, 2**63))
    return gguf_of(keys, tensors, rest, extra)


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file of which the header was changed."""
    (size,) = struct.unpack_from("<Q", data)
    header = damaged_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]
