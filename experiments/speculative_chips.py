"""What drafts could gain where memory is the limit: an estimate from what decoding reads.

Claim     drafts by 4-bit weights make the unquantized answer up to 1.95 times as fast.
Command   python experiments/speculative_chips.py
              --acceptance experiments/results/speculative_smollm2.json
              --out experiments/results/speculative_chips.json
Cost      seconds; no weights, no chip.
Expect    a row per model and number of drafts.

An estimate, not a measurement, for chips whose memory is the limit: a draft takes as long as the
packed weights, the tables and the cache take to be read, and a verification as long as the
unquantized weights do. At one prompt a few tokens more are no work to speak of. Cycle estimates of
the 4-bit kernels reach the memory's speed (`kernels_v5e.jsonl`, `kernels_v6e.jsonl`), so the chip
cancels out. Each draft is taken to be right with the same probability a, whatever came before it:
that with which a single draft was right in the file of `--acceptance`, which a small model
measured. So k drafts give 1 + a + … + a^k tokens. The measured numbers of tokens per pass are
beside those of this formula in the output.
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
DRAFTS = (1, 2, 3, 4, 6, 8)
RECIPE = ttq.preset("fast")
# Any: what is read for a token does not depend on it.
CHIP = "v5e"


def tokens_per_pass(acceptance: float, drafts: int) -> float:
    """Tokens that a verification of so many drafts gives on average, its own one among them.

    Args:
      acceptance: the probability that a draft is right, in [0, 1].
      drafts: how many, >= 0.

    Returns:
      1 to drafts + 1.
    """
    return sum(acceptance**i for i in range(drafts + 1))


def estimated(model: str, acceptance: float) -> list[dict]:
    """A row per number of drafts."""
    config = released_config(model)
    draft, verify = (
        plan(config, CHIP, of, compiled=False).bytes_per_token for of in (RECIPE, None)
    )
    rows = []
    for drafts in DRAFTS:
        tokens = tokens_per_pass(acceptance, drafts)
        rows.append({
            "model": model, "drafts": drafts, "tokens_per_pass": round(tokens, 3),
            "draft_over_unquantized": round(draft / verify, 3),
            "over_unquantized": round(tokens * verify / (drafts * draft + verify), 3),
        })  # fmt: skip
    return rows


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
    by_drafts = {row["drafts"]: row for row in measured["rows"]}
    acceptance = by_drafts[1]["acceptance"]
    results = {
        "command": "python experiments/speculative_chips.py", "versions": versions(),
        "recipe": "fast", "dtype": "bfloat16", "batch": 1,
        "acceptance": acceptance, "acceptance_of": measured["model"],
        "acceptance_recipe": measured["recipe_name"],
        "formula": [
            {
                "drafts": drafts, "measured": row["tokens_per_pass"],
                "formula": round(tokens_per_pass(acceptance, drafts), 3),
            }
            for drafts, row in by_drafts.items()
        ],
        "rows": [row for model in MODELS for row in estimated(model, acceptance)],
    }  # fmt: skip
    columns = list(results["rows"][0])
    print(table([columns, *([str(v) for v in row.values()] for row in results["rows"])], left=1))
    if args.out:
        write_file(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
