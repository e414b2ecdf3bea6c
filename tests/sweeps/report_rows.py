"""Rows with known numbers, and reports of them."""

import json

import numpy as np

from ttq_jax.commands.main import main
from ttq_jax.sweeps.axes import make_cell

CORPORA = ("wikitext2", "ptb", "c4")
SCORED, WINDOWS = 10, 6


def row(point, extra, *, model="m", error=None):
    """A row of `point` that costs `extra` nats per token more than the unquantized model."""
    cell = make_cell({"model": model, "protocol": "window", "window": 16} | point)
    rng = np.random.default_rng([CORPORA.index(point["corpus"]), len(model)])
    plain = rng.normal(30, 3, WINDOWS)
    noise = 0 if point["recipe"] == "none" else rng.normal(0, 0.3, WINDOWS)
    nll = plain + SCORED * extra + noise
    made = {
        "key": cell.key, "cell": cell.values, "device": "abacus", "versions": {"jax": "0"},
        "recipe": None if cell.recipe is None else cell.recipe.describe(),
        "git_commit": None, "finished": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    if error:
        return made | {"error": error}
    return made | {
        "nll": list(nll), "scored": SCORED, "windows": WINDOWS,
        "perplexity": float(np.exp(nll.sum() / SCORED / WINDOWS)),
        "effective_bits": 32.0 if cell.recipe is None else cell.recipe.grid.bits + 1.0,
        "seconds": {"prepare": 1.0, "score": 59.0}, "peak_memory_bytes": 2e9,
        "corpus_sha256": "ab" * 32,
        "calibration_sha256": "cd" * 32 if "calibration" in cell.values else None,
    }  # fmt: skip


def sweep_rows():
    rows = []
    for corpus in CORPORA:
        rows.append(row({"corpus": corpus, "recipe": "none"}, 0))
        for bits in (2, 3, 4):
            base = 2.0**-bits
            rows.append(row({"corpus": corpus, "recipe": "rtn", "bits": bits}, 4 * base))
            rows.append(row({"corpus": corpus, "recipe": "ttq", "bits": bits}, 2 * base))
            for calibration in CORPORA:
                cost = 1.5 * base if calibration == corpus else 3 * base
                rows.append(row(
                    {"corpus": corpus, "recipe": "awq", "bits": bits, "calibration": calibration},
                    cost,
                ))  # fmt: skip
    rows.append(row({"corpus": "c4", "recipe": "hqq", "bits": 2}, 0, error="Oops: a\n b | c"))
    return rows


def write_rows(directory, rows):
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def report_of(directory, rows):
    """The Markdown of the report of rows."""
    write_rows(directory, rows)
    assert main(["report", str(directory), "--no-compilation-cache", "--quiet"]) == 0
    return (directory / "report.md").read_text("utf-8")
