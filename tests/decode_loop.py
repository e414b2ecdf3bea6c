"""Finds the decode loop in optimised HLO, and what it does to packed weights."""

import re

_DEFINITION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


def computations(text):
    """{name: lines} of an HLO module."""
    found, name = {}, None
    for line in text.splitlines():
        if m := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = m[1]
            found[name] = []
        elif name:
            found[name].append(line)
    return found


def decode_loop(text):
    """Every instruction of the decode loop, loops and fusions inside it included, as lines.

    It is the last loop with a loop inside: the other is the prompt's layer scan, which attends to
    long prompts in blocks.
    """
    bodies = computations(text)
    outer = [
        m[1]
        for lines in bodies.values()
        for line in lines
        if (m := re.search(r" while\(.*body=%?([\w.\-]+)", line))
        and any(" while(" in inner for inner in bodies[m[1]])
    ]
    assert outer, "found no loop with a loop inside"
    seen, queue, lines = set(), outer[-1:], []
    while queue:
        name = queue.pop()
        if name in seen or name not in bodies:
            continue
        seen.add(name)
        lines += bodies[name]
        queue += [called for line in bodies[name] for called in _CALLED.findall(line)]
    return lines


def makers(lines, shapes):
    """Instructions that make an array of one of these types: ``[(opcode, line)]``.

    Handing a value on (parameters, tuples and their elements, bitcasts) makes nothing.
    """
    passing = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "opt-barrier"}
    found = []
    for line in lines:
        m = _DEFINITION.match(line)
        if m and m[3] not in passing and any(shape in m[2] for shape in shapes):
            found.append((m[3], line.strip()))
    return found
