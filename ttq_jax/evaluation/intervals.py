"""95 % intervals of means over windows: Student's t, because windows are few.

A window counts as an independent draw of its text. Nothing is said about other texts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

# Five windows of one text, or as much from several. With fewer the spread is hardly known itself.
FEWEST_DEGREES = 4
TOO_FEW = "too few windows, 5 are needed"


def interval95(samples: Sequence[ArrayLike]) -> tuple[float, float] | None:
    """The interval of a mean over texts of exp(mean over a text's windows).

    Made on the scale of the logarithm: by the delta method, with Welch and Satterthwaite's degrees
    of freedom. It is exact for one text with normally distributed windows.

    Args:
      samples: per text, per window, nats per token.

    Returns:
      (low, high), or None with fewer than `FEWEST_DEGREES` degrees of freedom, or a single window
      of a text.
    """
    groups = [np.asarray(each, np.float64) for each in samples]
    counts = np.array([len(each) for each in groups])
    if counts.min() < 2 or sum(counts - 1) < FEWEST_DEGREES:
        return None
    ratios = np.exp([each.mean() for each in groups])
    variances = np.array([each.var(ddof=1) for each in groups]) / counts
    parts = (ratios / ratios.sum()) ** 2 * variances
    half, centre = 0.0, float(np.log(ratios.mean()))
    if total := float(parts.sum()):
        degrees = total**2 / float(np.sum(parts**2 / (counts - 1)))
        half = float(stdtrit(degrees, 0.975)) * total**0.5
    return float(np.exp(centre - half)), float(np.exp(centre + half))


def mean95(samples: Sequence[float]) -> tuple[float, float] | None:
    """The interval of a mean over windows.

    Args:
      samples: per window.

    Returns:
      (low, high), or None with fewer than five.
    """
    values = np.asarray(samples, np.float64)
    if len(values) <= FEWEST_DEGREES:
        return None
    reach = float(stdtrit(len(values) - 1, 0.975)) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - reach), float(values.mean() + reach)
