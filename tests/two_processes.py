"""One of two processes of a mesh.

argv is the coordinator's port, which process, a model, where its dense blocks lie, and which of the
questions.
"""

import json
import math
import sys

import jax

from ttq_jax.checkpoint import load, placing
from ttq_jax.generate import generate
from ttq_jax.quant.presets import preset
from ttq_jax.quant.source import Source

_WRITTEN = Source(prior="samples", prior_tokens=8.0)
# Two devices each. Of "halves" the two halves of every weight are in two processes; of "copies"
# each has every weight, and what the model writes as its own prior is in both.
QUESTIONS = {
    "halves": ({"model": 4}, preset("ttq", group_size=8)),
    "copies": (
        {"data": 2, "model": 2},
        preset("ttq", group_size=8, select="layers/(q|up)", moments=_WRITTEN),
    ),
}


def answers(model, question):
    """Tokens of two prompts together."""
    return generate(
        model, ["Hello", "A longer prompt."], recipe=QUESTIONS[question][1], batch_size=2,
        max_new_tokens=8,
    ).tokens  # fmt: skip


def main(port: str, rank: str, path: str, memory: str, question: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    taken = []
    allocate = placing.allocate
    placing.allocate = lambda shape, d: taken.append(shape) or allocate(shape, d)
    model = load(path, mesh=QUESTIONS[question][0], dense_memory=memory)
    made = answers(model, question)
    print(json.dumps({"tokens": made, "held": sum(map(math.prod, taken))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
