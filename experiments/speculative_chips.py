"""What drafts could gain where memory is the limit: an estimate from what decoding reads.

Claim     drafts by 4-bit weights make the unquantized answer up to 1.88 times as fast.
Command   python experiments/speculative_chips.py
              --acceptance experiments/results/speculative_smollm2.json
              --out experiments/results/speculative_chips.json
Cost      seconds; no weights, no chip.
Expect    a row per model and number of drafts.

An estimate, not a measurement, for chips whose memory is the limit: a draft takes as long as the
packed weights, the tables and the cache take to be read, and a verification as long as the
unquantized weights do. At one prompt a few tokens more are no work to speak of. Cycle estimates of
the 4-bit kernels reach the memory's speed (`kernels_v5e.jsonl`, `kernels_v6e.jsonl`), so the chip
cancels out. How many tokens a pass gives is what a small model measured, in the largest batch in
the file of `--acceptance`; larger models may keep more.
"""

import argparse
import json
from pathlib import Path

import ttq_jax as ttq
from ttq_jax.chips.plan import plan
from ttq_jax.chips.released import released_config
from ttq_jax.evaluation.describe import table, versions
from ttq_jax.files import check_destination, write_file

MODELS = ("qwen3-1.7b", "llama-3-8b", "llama-3-70b")
RECIPE = ttq.preset("fast")
# Any: what is read for a token does not depend on it.
CHIP = "v5e"


def estimated(model: str, tokens_per_pass: dict[int, float]) -> list[dict]:
    """A row per number of drafts.

    Args:
      model: one of `released.RELEASED`.
      tokens_per_pass: measured, by drafts.

    Returns:
      What a draft takes and what they gain, both over an unquantized step.
    """
    config = released_config(model)
    draft, verify = (
        plan(config, CHIP, of, compiled=False).bytes_per_token for of in (RECIPE, None)
    )
    return [
        {
            "model": model, "drafts": drafts, "tokens_per_pass": tokens,
            "draft_over_unquantized": round(draft / verify, 3),
            "over_unquantized": round(tokens * verify / (drafts * draft + verify), 3),
        }
        for drafts, tokens in tokens_per_pass.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--acceptance", type=Path, required=True, help="from experiments/speculative.py check"
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.out:
        check_destination(args.out)
    measured = json.loads(args.acceptance.read_text())
    batch = max(row["batch"] for row in measured["rows"])
    tokens = {r["drafts"]: r["tokens_per_pass"] for r in measured["rows"] if r["batch"] == batch}
    results = {
        "command": "python experiments/speculative_chips.py", "versions": versions(),
        "recipe": "fast", "dtype": "bfloat16", "batch": 1,
        "measured_with": measured["model"], "measured_recipe": measured["recipe_name"],
        "rows": [row for model in MODELS for row in estimated(model, tokens)],
    }  # fmt: skip
    columns = list(results["rows"][0])
    print(table([columns, *([str(v) for v in row.values()] for row in results["rows"])], left=1))
    if args.out:
        write_file(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
