"""What cycles of drafts cost here: measured with the program that answers, on the prompt at hand.

`stages.go_on` decodes a few cycles of each number of drafts from copies of the answer's state. Its
costs are dynamic, so it is made to draft so many by costs that leave no other choice, and nothing
more is compiled. A call takes some time besides its cycles: on a CPU it lays the unquantized layers
apart, which takes as long as several cycles. A call without a cycle shows how long, and that is
taken off. What was measured is kept for the programs of the same shapes in this process.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttq_jax import speculation
from ttq_jax.draft_costs import LENGTHS, DraftCosts
from ttq_jax.partition import on, put
from ttq_jax.stages import Begun, carried, go_on, of_go_on, start
from ttq_jax.types import Offline, Params

CYCLES = 3
"""Of each number of drafts, per run, at least; fewer where the answer has no room for them."""

RUNS = 2
"""Of each number of drafts; the faster one counts, for what disturbs a run makes it slower."""

LEAST = 0.01
"""The share of a call's time that its cycles take at least: a cost is positive, and two times that
are nearly the same differ by chance."""

_known: dict[Any, DraftCosts] = {}


def forced(index: int) -> np.ndarray:
    """Costs by which every cycle takes this one of `LENGTHS`: float32[n]."""
    costs = np.full(len(LENGTHS), 1e30, np.float32)
    costs[index] = 1.0
    return costs


def measure(
    params: Params, offline: Offline, begun: Begun, state: Any, how: dict[str, Any],
    clock: Callable[[], float] = time.perf_counter,
) -> DraftCosts:  # fmt: skip
    """Times cycles of each number of drafts.

    Args:
      params: see `go_on`.
      offline: see there.
      begun: from `start`.
      state: from `start`, for at least two tokens; left as it is.
      how: the static arguments of `go_on`.
      clock: seconds.

    Returns:
      Seconds per cycle. Of programs that are known it is what was measured before.
    """
    leaves = jax.tree.leaves((params, begun, state))
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    key = jax.sharding.get_mesh(), tuple(sorted(how.items(), key=lambda item: item[0])), shapes
    if key in _known:
        return _known[key]
    before, capacity = jax.device_get(state.passes), state.out.shape[1]

    def timed(index: int, limit: int) -> tuple[float, int]:
        copy = jax.tree.map(jnp.copy, state)
        # Rows that have ended go on: what a cycle costs does not depend on what it says.
        copy = dataclasses.replace(copy, done=copy.done ^ copy.done)
        operands = jax.block_until_ready((copy, put(np.int32(limit)), put(forced(index))))
        began = clock()
        _, after = jax.block_until_ready(go_on(params, offline, begun, *operands, **how))
        seconds = clock() - began
        return seconds, int(np.max(jax.device_get(after.passes) - before))

    no_cycle = (0, 1)
    timed(*no_cycle)  # compiles
    cases = [(i, min(capacity, 1 + CYCLES * (k + 1))) for i, k in enumerate(LENGTHS)]
    runs = [[timed(*case) for case in (no_cycle, *cases)] for _ in range(RUNS)]
    (empty, _), *calls = map(min, *runs)
    _known[key] = DraftCosts(
        tuple(max(seconds - empty, LEAST * seconds) / max(n, 1) for seconds, n in calls)
    )
    return _known[key]


class Choosing:
    """A program like `generate_tokens`, whose cycles choose their number of drafts.

    Attributes:
      costs: what they choose by; None until it was called, if they are measured.
    """

    def __init__(
        self, arrays: tuple[Any, ...], how: dict[str, Any], costs: DraftCosts | None, mesh: Any
    ):
        """Sets everything but the limit.

        Args:
          arrays: what `generate_tokens` takes.
          how: its static arguments.
          costs: None measures them.
          mesh: the model's.
        """
        self.arrays, self.how, self.costs, self._mesh = arrays, how, costs, mesh

    def __call__(self, limit: int) -> Any:
        """What `generate_tokens` returns, computed.

        Args:
          limit: most tokens per row.
        """
        with on(self._mesh):
            return jax.block_until_ready(self._run(limit))

    def _run(self, limit: int) -> Any:
        params, _, offline, _ = self.arrays
        begun, state = start(*self.arrays, **self.how)
        rest = of_go_on(self.how)
        if self.costs is None:
            self.costs = measure(params, offline, begun, state, rest)
        operands = put(np.int32(limit)), put(self.costs.array())
        _, state = go_on(params, offline, begun, state, *operands, **rest)
        moments = carried(rest["recipe"], begun.moments)
        found = state.out, state.counts, state.finite, moments, begun.unreached
        return *found, speculation.stats(state)
