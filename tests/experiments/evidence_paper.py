"""What the result files say of the paper's tables and figure, measured here; see `evidence`."""

from evidence import evidence
from kept import along, read, results_of


@evidence("The paper's Table 1: AWQ shows no trend with its calibration tokens")
def _():
    table = [["gap, causal", "SmolLM2", "Gemma3"]]
    one, two = (results_of(f"table1_{model}", "causal") for model in ("smollm2", "gemma3"))
    table.append(["TTQ, no calibration", *(r["TTQ as published"]["gap"] for r in (one, two))])
    for power in range(11, 18):
        label = f"AWQ calibrated on {2**power} tokens"
        both = [rows.get(name, {}).get("gap", "—")
                for rows, name in ((one, f"{label} of C4"), (two, label))]  # fmt: skip
        table.append([f"AWQ, {2**power} tokens of C4", *both])
    return [table], []


@evidence("The paper's Table 2: larger groups cost TTQ about what they cost AWQ")
def _():
    sizes = ["8", "16", "32", "64", "128", "512"]
    table = [["gap, causal", *(f"group {size}" for size in sizes)]]
    for model, name in (("SmolLM2", "smollm2"), ("Gemma3", "gemma3")):
        rows = along(f"table2_{name}", "group size", "causal")
        for label, key in (("RTN", "RTN"), ("AWQ", "AWQ"), ("TTQ", "TTQ as published")):
            table.append([f"{model}, {label}", *(rows[key][size] for size in sizes)])
    return [table], []


@evidence("The paper's Table 3: its order of methods is found at 2 and 3 bits")
def _():
    table = [["gap at 3 bits, window / causal", "RTN", "AWQ", "TTQ", "TTQ, 16 ranks"]]
    for model, name in (("SmolLM2", "smollm2"), ("Gemma3", "gemma3")):
        both = [results_of(f"table3_{name}", p) for p in ("window", "causal")]
        table.append([model] + [
            " / ".join(rows[key]["gap"].split()[0] for rows in both)
            for key in ("RTN, 3-bit", "AWQ, 3-bit", "TTQ as published, 3-bit, no ranks",
                        "TTQ as published, 3-bit, rank 16")
        ])  # fmt: skip
        for rows in both:
            for width in (2, 3):
                order = [float(rows[label.format(width)]["gap"].split()[0]) for label in (
                    "RTN, {}-bit", "AWQ, {}-bit", "TTQ as published, {}-bit, rank 16"
                )]  # fmt: skip
                assert order == sorted(order, reverse=True)
    return [table], []


@evidence("The paper's Figure 2: α near 0.5; λ and p hardly matter")
def _():
    tables = []
    for axis, fixed in (("α", "λ 0.4, p 2"), ("λ", "α 0.5, p 2"), ("p", "α 0.5, λ 0.4")):
        table = []
        for model, name in (("SmolLM2", "smollm2"), ("Gemma3", "gemma3")):
            row = along(f"figure2_{name}", axis, "causal")[f"TTQ as published, {fixed}"]
            if not table:
                table.append([axis, *list(row)[1:]])
            table.append([model, *list(row.values())[1:]])
        tables.append(table)
    return tables, ["0.5", "0.4"]


@evidence("The paper's Tables 4 to 8: the query projection, over a dense one")
def _():
    table = [["decoding over dense", *(f"{chip}, {w} bits" for chip in ("v5e", "v6e", "CPU")
                                       for w in (2, 3, 4))]]  # fmt: skip
    chips = {c: read(f"query_projection_{c}.json")["records"] for c in ("v5e", "v6e", "cpu")}
    for model in dict.fromkeys(r["model"] for r in chips["v5e"]):
        for rank in (0, 16):
            table.append([f"{model}, r = {rank}"])
            for records in chips.values():
                for width in (2, 3, 4):
                    (one,) = [r for r in records if (r["model"], r["bits"]) == (model, width)]
                    table[-1].append(f"{one['decode'][f'ttq r={rank}']['speedup']:.2f}")
    return [table], []
