"""Text while it is decoded, some tokens per call of `stages.go_on`."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ttq_jax import speculation
from ttq_jax.chat.ask import Asked, ask
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError
from ttq_jax.draft_costs import DraftCosts, Speculate
from ttq_jax.finite import raise_not_finite
from ttq_jax.generate import arguments
from ttq_jax.generation import Drafts, Generation, made_of
from ttq_jax.measured_drafts import measure
from ttq_jax.partition import on, on_its_mesh, put
from ttq_jax.prompts import SMALLEST_BUCKET
from ttq_jax.quant.recipe import Recipe
from ttq_jax.sampling import Sampling
from ttq_jax.stages import carried, go_on, of_go_on, start
from ttq_jax.types import Offline

_CHUNK = 8
"""Tokens per call: a call costs about a millisecond, and a reader sees words appear, not lines."""


class Stream:
    """An answer that is being decoded: an iterator over pieces of its text.

    A piece is never taken back: a character of which only some bytes are decoded is held until it
    is whole. A caller may stop early; `generation` is what was decoded until then.

    Attributes:
      first_token: seconds from the call to the first token.
    """

    def __init__(
        self, model: Model, rows: list[list[int]], arrays: tuple[Any, ...], how: dict[str, Any],
        limit: int, began: float, costs: DraftCosts | None = None,
    ):  # fmt: skip
        """Reads the prompt; see `stream`.

        Args:
          model: see `stream`.
          rows: the prompt's token ids.
          arrays: what `start` takes.
          how: its static arguments.
          limit: most new tokens.
          began: when the caller called, by `time.perf_counter`.
          costs: see `generate`; None measures them if each cycle chooses its drafts.
        """
        self._model, self._rows, self._limit, self._began = model, rows, limit, began
        self._params, self._prompts, self._offline, _ = arrays
        self._begun, self._state = start(*arrays, **how)
        self._how = of_go_on(how)
        self._chunk = how["chunk"]
        self._new, self._ended = self._seen()
        self.first_token = time.perf_counter() - began
        self._costs = costs
        if costs is None and isinstance(how["drafts"], tuple) and not self._ended:
            self._costs = measure(
                self._params, self._offline, self._begun, self._state, self._how
            )  # fmt: skip
        self._pieces = self._run()

    def __iter__(self) -> "Stream":
        """Itself."""
        return self

    def __next__(self) -> str:
        """The next piece of text."""
        return next(self._pieces)

    def _seen(self) -> tuple[list[int], bool]:
        """The tokens so far, and whether they end the answer."""
        state = self._state
        # A copy: the next call uses the arrays up.
        out, counts, done, finite = (
            np.array(jax.device_get(a)) for a in (state.out, state.counts, state.done, state.finite)
        )
        if not finite.all():
            how = self._how
            raise_not_finite(
                self._params, self._prompts, self._offline, config=how["config"],
                recipe=how["recipe"], chunk=self._chunk,
            )  # fmt: skip
        new = out.reshape(-1)[: int(counts.reshape(-1)[0])].tolist()
        return new, bool(done.all()) or len(new) >= self._limit

    def _run(self) -> Iterator[str]:
        """The pieces."""
        said = ""
        while True:
            text = self._model.tokenizer.continuation(self._rows[0], self._new)
            # A character whose bytes are not all there is decoded as replacement characters.
            whole = text if self._ended else text.rstrip("\ufffd")
            # Byte fallback spoils whole characters before a broken one, until that is whole.
            if len(whole) > len(said) and (self._ended or whole.startswith(said)):
                yield whole[len(said) :]
                said = whole
            if self._ended:
                return
            limit = min(len(self._new) + _CHUNK, self._limit)
            # Not around the yield: whoever takes the text goes on without our mesh.
            with on(self._model.mesh):
                begun, self._state = go_on(
                    self._params, self._offline, self._begun, self._state,
                    put(np.int32(limit)), self._costs and put(self._costs.array()), **self._how,
                )  # fmt: skip
                self._begun = begun or self._begun
                self._new, self._ended = self._seen()

    @property
    def generation(self) -> Generation:
        """What was decoded so far, as `generate` returns it.

        Its `stopped` is "caller" as long as neither an end token nor the limit has come.
        """
        stopped = "end" if len(self._new) < self._limit else "limit"
        recipe = self._how["recipe"]
        moments, share = carried(recipe, self._begun.moments), self._begun.unreached
        stats = speculation.stats(self._state) if self._how["drafts"] else None
        return made_of(
            self._model, recipe, self._offline, self._rows, [self._new],
            [stopped if self._ended else "caller"], moments, time.perf_counter() - self._began,
            None if share is None else float(np.mean(jax.device_get(share))),
            [] if stats is None else [Drafts.of(np.reshape(jax.device_get(stats), -1))],
            self._costs,
        )  # fmt: skip


@on_its_mesh
def stream(
    model: Model, prompt: Any, *, recipe: Recipe | None, offline: Offline | None = None,
    max_new_tokens: int = 64, sampling: Sampling = Sampling(), seed: int = 0, chat: bool = False,
    smallest: int = SMALLEST_BUCKET, speculate: Speculate = 0, prefill_chunk: int = 0,
    cache_dtype: str | None = None,
) -> Stream:  # fmt: skip
    """Answers one prompt piece by piece; the tokens are those of `generate`.

    Args:
      model: see `generate`.
      prompt: a text; with `chat` also a list of messages.
      recipe: see `generate`.
      offline: see `generate`.
      max_new_tokens: see `generate`.
      sampling: see `generate`.
      seed: see `generate`.
      chat: see `generate`.
      smallest: pad the prompt to this many tokens at least, so that the next ones of a
        conversation, which are longer, need no other program.
      speculate: see `generate`.
      prefill_chunk: see `generate`.
      cache_dtype: see `generate`.

    Returns:
      An iterator over pieces of text; its `generation` is the result.

    Raises:
      PromptError: see `generate`.
      ConfigError: see `generate`; or several processes share the model.
      NotFiniteError: the logits are not finite.
      Error: an argument of another type.
    """
    began = time.perf_counter()
    if jax.process_count() > 1:
        raise ConfigError(
            "stream: expected one process, which has all of an answer while it is decoded, got "
            f"{jax.process_count()}; use generate"
        )
    asked = ask(model, prompt if isinstance(prompt, Asked) else [prompt], chat=chat)
    arrays, how, _ = arguments(
        model, asked, recipe=recipe, offline=offline, max_new_tokens=max_new_tokens,
        sampling=sampling, seed=seed, smallest=smallest, speculate=speculate,
        prefill_chunk=prefill_chunk, cache_dtype=cache_dtype,
    )  # fmt: skip
    costs = speculate if isinstance(speculate, DraftCosts) else None
    return Stream(model, asked.rows, arrays, how, max_new_tokens, began, costs)
