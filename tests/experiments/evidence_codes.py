"""What the result files say of ideas for better codes: more functions for `evidence.py`."""

from evidence import BESIDE, beside, evidence
from kept import RESULTS, bits, gap, gaps, quality

BETTER = {"SmolLM2": "better_codes_smollm2.jsonl", "Gemma3": "better_codes_gemma3.jsonl"}


def over(file, base, name):
    """Perplexity over another recipe's on the same windows, minus 1; "" for itself."""
    if name == base or base not in gaps(file, 8):
        return "" if base in gaps(file, 8) else "—"
    found = quality.gaps(quality.Results(RESULTS / file).read(), 8, base)
    return quality.interval(found[name]) if name in found else "—"


@evidence("At 3 bits, correcting what the mean input makes of the error takes a fifth of the gap")
def _():
    sides = [side for model in BETTER
             for side in (f"{model}: bits", "gap", "over the first, minus 1")]  # fmt: skip
    table = [["codes", "corrected", *sides]]
    for codes, base in [
        ("4 bits, groups of 64", "fast-asym-coded-h0-p1-f4"),
        ("3 bits, groups of 16", "fast-3-g16-asym-coded4-h0-p1-f4"),
    ]:
        for said, name in [("no", base), ("yes", f"{base}-mean")]:
            row = [codes, said]
            for file in BETTER.values():
                row += [bits(file, 8, name), gap(file, 8, name), over(file, base, name)]
            table.append(row)
    return [table], []


@evidence("Four bits for a scale in groups of 16: at 3 bits a third less gap in second order")
def _():
    table = [["codes", "scales", "groups", *BESIDE]]
    for codes, wide, narrow, sizes in [
        ("3 bits", "fast-3-g32-asym-coded-h0-p1-f4", "fast-3-g16-asym-coded4-h0-p1-f4", (32, 16)),
        ("3 bits, second order", "best-3-g32-asym-coded-h0", "best-3-g16-asym-coded4-h0", (32, 16)),
        ("4 bits", "fast-asym-coded-h0-p1-f4", "fast-g32-asym-coded4-h0-p1-f4", (64, 32)),
        ("4 bits, second order", "best-asym-coded-h0", "best-g32-asym-coded4-h0", (64, 32)),
    ]:
        for scales, size, name in [("8 bits", sizes[0], wide), ("4 bits", sizes[1], narrow)]:
            table.append(beside([codes, scales, str(size)], wide, name))
    bases = ("best-3-g32-asym-coded-h0", "best-asym-coded-h0")
    return [table], [bits(BETTER["SmolLM2"], 8, base) for base in bases]


@evidence("Rotating the residual stream gains nothing, and loses much without second order")
def _():
    file = "rotations_smollm2.jsonl"
    kinds = {"": "as it is", "@heads": "heads rotated", "@rotated": "stream and heads rotated"}
    three = "fast-3-g32-asym-coded-h0-p1-f4"
    names = (three, f"{three}-unscaled", "best-3-g32-asym-coded-h0")
    cells = [[f"`{n}`", *(gap(file, 8, n + kind) for kind in kinds)] for n in names]
    assert abs(gap(file, 8, "none@rotated", lambda one: one["gap"][0])) < 0.0005
    return [[["recipe", *kinds.values()], *cells]], []


@evidence("Second order gains nothing sure from the model's own samples beside the prompt")
def _():
    file = "sample_prior_smollm2.jsonl"
    table = [["codes", "prior", "gap", "over the first, minus 1"]]
    for codes, base in [
        ("3 bits, groups of 32", "best-3-g32-asym-coded-h0"),
        ("4 bits, groups of 64", "best-asym-coded-h0"),
    ]:
        for prior, name in [("weights, 16 tokens", base), ("samples, 256 tokens", f"{base}-s256")]:
            table.append([codes, prior, gap(file, 8, name), over(file, base, name)])
    return [table], []
