"""How long one compiled program takes to answer: its first token, and each further one.

A program cannot be stopped between its stages, so the first token's time is that of the same
program with a limit of one token. What is decoded after it is the difference to the whole answer.
Both are run alternately, several times. A difference within the spread of the runs is no result.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ttq_jax.chat.ask import Asked
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError
from ttq_jax.draft_costs import Speculate
from ttq_jax.generate import program
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling
from ttq_jax.types import Offline

RUNS = 5


@dataclasses.dataclass(frozen=True)
class Timings:
    """Wall-clock times of one batch, nothing compiled in them.

    Attributes:
      first: seconds of the runs that end with the first token: the prompts are read and the
        weights quantized.
      whole: seconds of the runs of the whole answer.
      steps: decode steps after the first token; one step is a token of every row. With
        speculation, as many as tokens.
      new_tokens: tokens after the first, of all rows together.
    """

    first: tuple[float, ...]
    whole: tuple[float, ...]
    steps: int
    new_tokens: int

    @property
    def first_token(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(self.first)

    @property
    def spread(self) -> float:
        """Seconds between the fastest and the slowest run, of the worse of the two kinds."""
        return max(max(runs) - min(runs) for runs in (self.first, self.whole))

    @property
    def decode(self) -> float | None:
        """Seconds of all steps after the first token; None within the spread, or without a step."""
        seconds = statistics.median(self.whole) - self.first_token
        return seconds if self.steps and seconds > self.spread else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the whole batch per second of decoding; None where `decode` is."""
        return None if self.decode is None else self.new_tokens / self.decode

    def describe(self) -> dict[str, Any]:
        """JSON data, seconds."""
        return {
            "runs": len(self.first),
            "first_token": round(self.first_token, 4),
            "decode": None if self.decode is None else round(self.decode, 4),
            "spread": round(self.spread, 4),
            "steps": self.steps,
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second, 2),
        }

    def in_words(self) -> str:
        """One line for people."""
        said = f"first token after {self.first_token:.3g} s"
        if self.decode is not None:
            said += f", then {self.tokens_per_second:.3g} tokens/s"
        elif self.steps:
            said += f"; decoding took less than the runs differ ({self.spread:.2g} s)"
        return f"{said} (median of {len(self.first)} runs after the answer)"


def time_answers(
    model: Model, texts: Sequence[str] | Asked, recipes: Mapping[str, Recipe | None], *,
    offline: Mapping[str, Offline] | None = None, max_new_tokens: int = 64,
    sampling: Sampling = Sampling(), seed: int = 0, speculate: Speculate = 0,
    prefill_chunk: int = 0, cache_dtype: str | None = None, runs: int = RUNS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timings]:  # fmt: skip
    """Times the programs that `generate` runs for one batch, side by side: all take turns.

    Args:
      model: see `generate`.
      texts: one batch, read together; or what `ask` made of it.
      recipes: name -> recipe, see `generate`.
      offline: name -> what `prepare` made for that recipe; what is missing is prepared here.
      max_new_tokens: see `generate`; an end token may stop an answer before.
      sampling: see `generate`.
      seed: see `generate`.
      speculate: see `generate`; for every recipe.
      prefill_chunk: likewise.
      cache_dtype: likewise.
      runs: of each kind and recipe, >= 3.
      clock: seconds.

    Returns:
      The times by name. Every program is run once before, so that none holds a compilation.

    Raises:
      ConfigError: fewer than three runs.
      Error: see `generate`.
    """
    if runs < 3:
        raise ConfigError(f"runs: expected at least 3, got {runs}")
    programs = {
        name: program(
            model, texts, recipe=recipe, offline=(offline or {}).get(name),
            max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, speculate=speculate,
            prefill_chunk=prefill_chunk, cache_dtype=cache_dtype,
        )[0]
        for name, recipe in recipes.items()
    }  # fmt: skip
    counts = {name: [int(n) for n in run(max_new_tokens)[1]] for name, run in programs.items()}
    took: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in programs}
    for _ in range(runs):
        for name, run in programs.items():
            for limit, seconds in zip((1, max_new_tokens), took[name], strict=True):
                start = clock()
                run(limit)
                seconds.append(clock() - start)
    after = {name: [min(n, max_new_tokens - 1) for n in each] for name, each in counts.items()}
    return {
        name: Timings(tuple(first), tuple(whole), max(after[name]), sum(after[name]))
        for name, (first, whole) in took.items()
    }
