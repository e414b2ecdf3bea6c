"""What the result files say of each claim: the tables of `experiments/RESULTS.md`, made anew.

One function for each claim, by its heading: it returns the section's tables, cell by cell, and the
figures that its sentences may name.
"""

import re
from pathlib import Path

import numpy as np
from kept import (
    CORPORA,
    GEMMA3,
    RESULTS,
    SMOLLM2,
    bits,
    gap,
    gaps,
    quality,
    read,
    results_of,
    scale_widths,
)

EVIDENCE = {}


def evidence(heading):
    """Registers what a section must show: a function that returns (tables, figures in words)."""

    def register(make):
        EVIDENCE[heading] = make
        return make

    return register


@evidence("The default leaves less than a quarter of the gap of TTQ with 16 ranks")
def _():
    rows = [("ttq-3", 0), ("ttq-3-r16", 0), ("fast", 0), ("fast-p1-f4-h0", 1)]
    table = [["recipe", "SmolLM2: bits", "gap", "Gemma3: bits", "gap"]]
    ratios = [["gap of `fast-p1-f4-h0` over that of", "SmolLM2", "Gemma3"]]
    models = [(SMOLLM2, "default_smollm2.jsonl"), (GEMMA3, "default_gemma3.jsonl")]
    for name, of_default in rows:
        table.append([f"`{name}`"])
        ratios.append([f"`{name}`"])
        for files in models:
            file = files[of_default]
            table[-1] += [bits(file, 40, name), gap(file, 40, name)]
            ours, theirs = gaps(files[1], 40)["fast-p1-f4-h0"], gaps(file, 40)[name]
            ratios[-1].append(f"{ours['gap'][0] / theirs['gap'][0]:.2f}")
    return [table, ratios[:-1]], []


@evidence("With bfloat16 scales, the default leaves two fifths of the gap of TTQ with 16 ranks")
def _():
    names = ["paper-3", "paper-3-r16", "ttq-3", "ttq-3-r16", "awq-4-g64-sym@c4",
             "gptq-4-g64-sym@c4", "fast", "best-n0", "best"]  # fmt: skip
    table = [["recipe", "SmolLM2: bits", "gap", "Gemma3: bits", "gap"]]
    for name in names:
        table.append([f"`{name}`"])
        for file in (SMOLLM2, GEMMA3):
            table[-1] += [bits(file, 40, name), gap(file, 40, name)]
    left = [["gap of … over that of …", "SmolLM2", "Gemma3"]]
    for ours, theirs in [("fast", "ttq-3-r16"), ("best", "ttq-3-r16")]:
        left.append([f"`{ours}` over `{theirs}`"])
        for file, suffix in ((SMOLLM2, "-n0" if ours == "best" else ""), (GEMMA3, "")):
            found = gaps(file, 40)
            left[-1].append(f"{found[ours + suffix]['gap'][0] / found[theirs]['gap'][0]:.2f}")
    return [table, left], [gap(GEMMA3, 4, "paper-3")]


@evidence("One more bit of code is worth more than narrow groups with zero points")
def _():
    table = [["recipe", "grid", "bits", "WikiText-2", "PTB"]]
    rows = quality.Results(RESULTS / SMOLLM2).read()
    for name, grid in [("paper-3", "3 bits, groups of 32, zero points"),
                       ("paper-4-g64-sym", "4 bits, groups of 64, symmetric"),
                       ("fast", "4 bits, groups of 64, symmetric")]:  # fmt: skip
        both = [rows[name, corpus] for corpus in ("wikitext2", "ptb")]
        base = [rows["none", corpus] for corpus in ("wikitext2", "ptb")]
        table.append([f"`{name}`", grid, f"{both[0]['effective_bits']:.2f}"] + [
            f"{np.exp((sum(a['nll'][:8]) - sum(b['nll'][:8])) / 8 / 256) - 1:.3f}"
            for a, b in zip(both, base, strict=True)
        ])  # fmt: skip
    return [table], []


@evidence("Scales in eight bits: much less gap at the same bits, or half a bit less")
def _():
    file = "coded_scales_smollm2.jsonl"
    pairs = [
        ("4 bits, groups of 64", "fast-sym-float", "fast-asym-coded"),
        ("3 bits, groups of 64", "fast-3-sym-float", "fast-3-asym-coded"),
        ("3 bits, groups of 32", "fast-3-g32-asym-float", "fast-3-g32-asym-coded"),
        ("4 bits, groups of 64, second order", "best-sym-float", "best-asym-coded"),
        ("3 bits, groups of 64, second order", "best-3-sym-float", "best-3-asym-coded"),
        ("3 bits, groups of 32, second order", "best-3-g32-asym-float", "best-3-g32-asym-coded"),
    ]
    table = [["codes", "floating-point scales: bits", "gap", "coded scales: bits", "gap"]]
    for codes, *both in pairs:
        rounds = "-p5-f0" if both[0].startswith("fast") else ""
        names = [f"{name}-h0{rounds}" for name in both]
        table.append([codes, *(of(file, 8, name) for name in names for of in (bits, gap))])
    now = [["recipe", "bits", "mean gap", *CORPORA.values()]]
    file = "default_smollm2.jsonl"
    for name in ("fast", "fast-asym-coded-h0-p5-f0"):
        parts = gaps(file, 40)[name]["by_corpus"]
        cells = [f"{parts[c]:.3f}" for c in CORPORA]
        now.append([f"`{name}`", bits(file, 40, name), gap(file, 40, name), *cells])
    return [table, now], []


@evidence("An embedding in eight bits changes perplexity by no more than a few thousandths")
def _():
    table = [["model", "bits of the embedding", "perplexity over that with it as it is, minus 1",
              *CORPORA.values()]]  # fmt: skip
    for model, name in [("smollm2", "fast-h{}-p5-f0"), ("gemma3", "fast-asym-coded-h{}-p1-f4")]:
        rows = quality.Results(RESULTS / f"packed_tables_{model}.jsonl").read()
        over = quality.gaps(rows, 8, name.format(0))
        for width in (8, 5, 4):
            one = over[name.format(width)]
            parts = [f"{one['by_corpus'][c]:+.3f}" for c in CORPORA]
            said = {"smollm2": "SmolLM2", "gemma3": "Gemma3"}[model]
            table.append([said, str(width), quality.interval(one), *parts])
    return [table], []


@evidence("Four bits for a scale and a zero point are worth more in narrower groups")
def _():
    found = gaps("scale_widths_smollm2.jsonl", 8)
    table = [["code", "scale", "zero point", "group", "bits", "gap"]]
    for grid in scale_widths.GRIDS:
        one = found["-".join(map(str, grid))]
        *widths, group = map(str, grid)
        table.append([*widths, group, f"{one['bits']:.2f}", quality.interval(one)])
    built = gaps("built_in_widths_smollm2.jsonl", 8)
    again = [["grid", "simulated", "built in"]] + [
        [f"`{name}`", quality.interval(found[name]), quality.interval(built[name])]
        for name in ("3-4-4-32", "4-4-4-32")
    ]
    return [table, again], []


BETTER = ("better_codes_smollm2.jsonl", "better_codes_gemma3.jsonl")


def beside(cells, base, name):
    """Cells, and per model the gap of a recipe and how far it is from another one's perplexity."""
    cells = list(cells)
    for file in BETTER:
        found = gaps(file, 8)
        if name not in found:
            cells += ["—", "—"]
            continue
        assert found[name]["bits"] == found[base]["bits"]
        over = quality.gaps(quality.Results(RESULTS / file).read(), 8, base)[name]
        cells += [quality.interval(found[name]), "" if name == base else quality.interval(over)]
    return cells


BESIDE = [side for model in ("SmolLM2", "Gemma3")
          for side in (f"{model}: gap", "over the first, minus 1")]  # fmt: skip


@evidence("Scales and zero points fitted to their codes: less gap at the same stored bits")
def _():
    table = [["codes", "ranges tried", "refits of each", *BESIDE]]
    for codes, grid in [
        ("4 bits, groups of 64", "fast-asym-coded-h0"),
        ("3 bits, groups of 32", "fast-3-g32-asym-coded-h0"),
    ]:
        for suffix, ranges, refits in [
            ("p5-f0", "5", "0"), ("p1-f4", "1", "4"), ("p3-f2", "3", "2"), ("p5-f4", "5", "4"),
        ]:  # fmt: skip
            row = beside([codes, ranges, refits], f"{grid}-p5-f0", f"{grid}-{suffix}")
            table += [row] if set(row[3:]) != {"—"} else []
    return [table], []


@evidence("At 4 bits, a second stream through quantized layers gains nothing that 40 windows show")
def _():
    base, both = "fast-asym-coded-h0-p1-f4", "fast-asym-coded-h0-both-a5-k30-p1-f4"
    table = [["prompt is read", *BESIDE]]
    for read_by, name in [("once", base), ("in two streams", both)]:
        table.append(beside([read_by], base, name))
    return [table], []


@evidence("With an importance matrix, llama.cpp's 4-bit formats are ahead of `fast`")
def _():
    file, ours = "frontier_smollm2.jsonl", ("fast-asym-coded-h0-p5-f0", "fast-p1-f4-h0")
    found = gaps(file, 16)
    found |= {name: gaps("default_smollm2.jsonl", 16)[name] for name in ours}
    table = [["codes", "importance", "bits", "gap"]]
    for name, one in sorted(found.items(), key=lambda kv: kv[1]["bits"]):
        if name == "none":
            continue
        kind, _, source = name.partition("@")
        weighs = {"c4": "C4", "prompt": "prompt", "": "none"}[source]
        label = [f"`{name}`", "prompt"] if name in ours else [kind, weighs]
        table.append([*label, f"{one['bits']:.2f}", quality.interval(one)])
    return [table], []


@evidence("Second order with refits and more damping gains only at 3 bits on SmolLM2")
def _():
    table = [["codes", "ranges tried", "refits", "damping", *BESIDE]]
    for codes, base in [
        ("4 bits, groups of 64", "best-asym-coded-h0"),
        ("3 bits, groups of 32", "best-3-g32-asym-coded-h0"),
    ]:
        table.append(beside([codes, "10", "0", "0.3"], base, base))
        table.append(beside([codes, "1", "4", "1"], base, f"{base}-p1-f4-m10"))
    return [table], []


@evidence("Second order gains from refits, damping and descents together, on three texts")
def _():
    file, base = "better_codes_second_smollm2.jsonl", "best-3-g32-asym-coded-h0"
    rows = quality.Results(RESULTS / file).read()
    table = [["recipe", "bits", "gap", "perplexity over the first, minus 1"]]
    over = quality.gaps(rows, 8, base)
    for name, label in [
        (base, "as `best`, damping 0.3, 10 ranges tried"),
        (
            "experiments/recipes/best_descents_3.toml",
            "4 refits, damping 1, 2 descents, 3 ranges tried",
        ),
    ]:
        difference = "" if name == base else quality.interval(over[name])
        table.append([label, bits(file, 8, name), gap(file, 8, name), difference])
    return [table], []


@evidence("Quantization costs little on top of reading the prompt, unless it is second-order")
def _():
    ratios = read("prefill_times_smollm2.json")["over_plain_prefill"]
    names = ("ttq-3", "fast-p5-f0", "fast", "fast-p5-f4", "paper-3", "paper-3-r16", "best")
    return [[["recipe", "time over plain prefill"]] + [
        [f"`{name}`", f"{ratios[name]:.2f}"] for name in names
    ]], []  # fmt: skip


@evidence("Short prompts are served too; a prior makes up for part of what they lack")
def _():
    short = "quality_smollm2_p16.jsonl"
    table = [["recipe", "bits", "after 16 tokens", "after 256 tokens"]]
    three = "fast-3-g32-asym"
    names = ("paper-3", "fast-n0", "fast", "fast-s64", three, f"{three}-s64")
    table += [[f"`{n}`", bits(short, 6, n), gap(short, 6, n), gap(SMOLLM2, 6, n)] for n in names]
    at_16, at_256 = (gaps(file, 6)[f"{three}-s64"]["gap"][0] for file in (short, SMOLLM2))
    over = at_16 / at_256
    return [table], [f"{over:.2f}"]


@evidence("Calibrated on C4, AWQ and GPTQ are nowhere better than the recipe of the same cost")
def _():
    table = [["recipe", *CORPORA.values()]]
    found = gaps(SMOLLM2, 40)
    pairs = [("awq-4-g64-sym@c4", "fast"), ("gptq-4-g64-sym@c4", "best-n0")]
    for offline, ours in pairs:
        assert all(found[offline]["by_corpus"][c] > found[ours]["by_corpus"][c] for c in CORPORA)
    names = [name for pair in pairs for name in pair]
    table += [[f"`{n}`", *(f"{found[n]['by_corpus'][c]:.3f}" for c in CORPORA)] for n in names]
    return [table], []


@evidence("Calibrated on another domain, AWQ and GPTQ are almost never better")
def _():
    rows = results_of("domain_shift_smollm2", "causal")
    means = [["recipe", "bits", "mean gap over nine domains"]]
    means += [[f"`{n}`", rows[label]["bits"], rows[label]["gap"]]
              for n, label in (("best", "best"), ("fast", "fast"), ("ttq", "TTQ"))]  # fmt: skip
    for name in ("awq", "gptq"):
        here = [r for label, r in rows.items() if label.startswith(f"{name.upper()} calibrated")]
        assert len(here) == 9
        found = sorted(float(row["gap"].split()[0]) for row in here)
        means.append([f"`{name}`, by what it was calibrated on", here[0]["bits"],
                      f"{found[0]:.3f} to {found[-1]:.3f}"])  # fmt: skip
    text = (RESULTS / "domain_shift_smollm2" / "report.md").read_text()
    counts = [["calibrated on another domain", "is better than", "in pairs"]]
    for theirs, ours in (("awq", "fast"), ("awq", "best"), ("gptq", "fast"), ("gptq", "best")):
        contest = re.search(rf"^\| {theirs.upper()} \| {ours} \| (\d+) \| (\d+) ", text, re.M)
        better, pairs = contest.groups()
        counts.append([f"`{theirs}`", f"`{ours}`", f"{better} of {pairs}"])
    wikipedia = [["on Wikipedia, 40 windows", "gap"]]
    store = quality.Results(RESULTS / SMOLLM2).read()
    base = store["none", "wikitext2"]["nll"]
    for name in ("awq-4-g64-sym@rights", "awq-4-g64-sym@python", "fast"):
        nll = store[name, "wikitext2"]["nll"]
        assert len(nll) == len(base) == 40
        wikipedia.append([f"`{name}`", f"{np.exp((sum(nll) - sum(base)) / 40 / 256) - 1:.3f}"])
    return [means, counts, wikipedia], []


@evidence("At 2.80 stored bits SmolLM2 has about twice its perplexity")
def _():
    file, name = "quality_smollm2_2.8.jsonl", "experiments/recipes/smollm2_2.8.toml"
    found = gaps(file, 40)[name]
    return [[
        ["recipe", "bits", "mean", *CORPORA.values()],
        ["`smollm2_2.8.toml`", bits(file, 40, name), f"{1 + found['gap'][0]:.2f}",
         *(f"{1 + found['by_corpus'][c]:.2f}" for c in CORPORA)],
    ]], []  # fmt: skip


@evidence("At 5 stored bits Gemma3 is within a few percent, by widths chosen for each layer")
def _():
    table = [["recipe", "bits", "gap, 40 windows", "gap, 4 windows"]]
    names = ("paper-4", "paper-4-r16", "ttq-4", "fast-4-g32-asym",
             "experiments/recipes/gemma3_5.01.toml")  # fmt: skip
    table += [[f"`{Path(n).name}`", bits(GEMMA3, 4, n), gap(GEMMA3, 40, n), gap(GEMMA3, 4, n)]
              for n in names]  # fmt: skip
    return [table], []


@evidence("The window protocol flatters what fits the prompt closely")
def _():
    table = [["recipe, 3 bits", "bits", "causal: perplexity", "gap", "window: perplexity", "gap"]]
    causal, window = (results_of("protocols_smollm2", p) for p in ("causal", "window"))
    for name, label in (("none", "unquantized"), ("ttq", "TTQ"), ("best", "best")):
        table.append([f"`{name}`", causal[label]["bits"]])
        for rows in (causal, window):
            table[-1] += [rows[label]["WikiText-2"], rows[label]["gap"] or "—"]
    return [table], []


@evidence("An independent PyTorch implementation has the same perplexities")
def _():
    rows = {(r["recipe_name"], r["protocol"]["kind"]): r
            for r in read("compare_torch_quality.json")["rows"]}  # fmt: skip
    table = [["difference, causal / window", "2 bits", "3 bits", "4 bits"]]
    largest = []
    for label, name in (("RTN", "rtn-{}"), ("AWQ", "awq-{}@c4"), ("TTQ", "ttq-{}"),
                        ("TTQ, 16 ranks", "ttq-r16-{}"),
                        ("TTQ, symmetric", "ttq-sym-{}")):  # fmt: skip
        table.append([label])
        for width in (2, 3, 4):
            both = [abs(rows[name.format(width), p]["difference"]) for p in ("causal", "window")]
            largest += both if label != "TTQ, symmetric" else []
            table[-1].append(" / ".join(f"{100 * one:.2f} %" for one in both))
    (tied,) = [r for r in read("compare_torch_ties.json")["rows"] if "explanation" in r]
    told = tied["explanation"]
    return [table], [
        f"{100 * max(largest):.2f} %", f"{100 * tied['difference']:.2f} %",
        f"{told['weights_apart']} of {told['weights'] / 1e6:.0f} million",
        f"{100 * told['difference_with_equal_weights']:.3f} %",
    ]  # fmt: skip


@evidence("Learning α, λ and a clipping factor gains little")
def _():
    found = quality.gaps(quality.Results(RESULTS / "learned_recipe_scores.jsonl").read(), 8)
    table = [["recipe, 3 bits", "learns", "gap", "of the closed form's gap"]]
    for label, name in (
        ("closed form: `ttq`", "ttq"),
        ("one α, λ, c for the model", "learned on wikitext2, global"),
        ("one for each kind of projection", "learned on wikitext2, projection"),
        ("one for each projection of each layer", "learned on wikitext2, layer"),
        ("a clip search in each group", "ttq, clip search"),
        ("second-order rounding", "ttq, second order"),
    ):  # fmt: skip
        learns = "yes" if name.startswith("learned") else "no"
        one = found[name]
        table.append([label, learns, quality.interval(one), quality.ratio(one, found["ttq"])])
    return [table], []
