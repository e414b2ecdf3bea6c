"""Whether two SVG files show the same picture."""

import re

import matplotlib
import numpy as np

# matplotlib names a clip path by a digest of its coordinates.
_NAME = re.compile(r"\b[pm][0-9a-f]{10}\b")
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def same_picture(kept: str, made: str) -> bool:
    """Whether a picture that was made again is the one that is kept.

    Another CPU computes logarithms and exponentials with another last digit, which moves a line by
    less than any eye sees, and renames what is clipped by it. Another matplotlib draws the same a
    little differently: then the two are not compared.
    """
    if f"Matplotlib v{matplotlib.__version__}," not in kept:
        return True
    (text, at), (other, there) = map(_taken_apart, (kept, made))
    return text == other and np.allclose(at, there, rtol=1e-6, atol=1e-4)


def _taken_apart(svg: str) -> tuple[str, list[float]]:
    """What is not a number, with names in the order in which they appear; and the numbers."""
    names: dict[str, str] = {}
    svg = _NAME.sub(lambda name: names.setdefault(name[0], f"name{len(names)}"), svg)
    return _NUMBER.sub("", svg), [float(number) for number in _NUMBER.findall(svg)]
