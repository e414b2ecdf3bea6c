"""One of two processes of a mesh.

argv is the coordinator's port, which process, a model, and where its dense blocks lie.
"""

import json
import math
import sys

import jax

from ttq_jax.checkpoint import load, placing
from ttq_jax.generate import generate
from ttq_jax.quant.recipe import preset


def main(port: str, rank: str, path: str, memory: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
    taken = []
    allocate = placing.allocate
    placing.allocate = lambda shape, d: taken.append(shape) or allocate(shape, d)
    # Two devices each: the two halves of every weight are in two processes.
    model = load(path, mesh={"model": 4}, dense_memory=memory)
    made = generate(
        model, ["Hello", "A longer prompt."], recipe=preset("ttq", group_size=8), batch_size=2,
        max_new_tokens=8,
    )  # fmt: skip
    print(json.dumps({"tokens": made.tokens, "held": sum(map(math.prod, taken))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
