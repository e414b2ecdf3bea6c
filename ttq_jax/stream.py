"""Text while it is decoded: the stages of `generate_tokens`, some tokens per call.

`start` reads the prompt and quantizes; `go_on` decodes a few tokens and hands its state to the next
call. Both are compiled once per shape. The tokens are those of `generate`.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from ttq_jax import speculation
from ttq_jax.chat.ask import Asked, ask
from ttq_jax.checkpoint import Model
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.finite import raise_not_finite
from ttq_jax.generate import STATIC, answer, arguments, carried, read, separately
from ttq_jax.generation import Drafts, Generation, made_of
from ttq_jax.partition import on, on_its_mesh, put
from ttq_jax.prompts import SMALLEST_BUCKET
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import replace_kernels
from ttq_jax.sampling import Sampling
from ttq_jax.types import (
    Leaf,
    MixedLinear,
    Moments,
    Offline,
    Params,
    Prompts,
    QuantizedLinear,
    kernels,
)

_OF_START = ("capacity", "chunk", "cache_dtype")
_CHUNK = 8
"""Tokens per call: a call costs about a millisecond, and a reader sees words appear, not lines."""


@struct.dataclass
class Begun:
    """What `start` made of the prompts; a refresh makes it again.

    Attributes:
      packed: the quantized projections by name; {} for an unquantized model, or one packed ahead.
      moments: per site, of everything read so far; {} unless the recipe keeps them.
      key: for every draw of the answers.
      unreached: float32[], the share of experts that no token reached; None without experts.
    """

    packed: dict[str, Any]
    moments: dict[str, Moments]
    key: Leaf
    unreached: Leaf


def _quantized(tree: Params) -> dict[str, Any]:
    """The projections of a tree that were quantized for these prompts."""
    found = kernels(tree["layers"])
    return {n: k for n, k in found.items() if isinstance(k, QuantizedLinear | MixedLinear)}


def _base(params: Params, offline: Offline) -> Params:
    """The tree that `Begun.packed` is a part of."""
    return params if offline.packed is None else offline.packed


@partial(jax.jit, static_argnames=STATIC)
def start(
    params: Params,
    prompts: Prompts,
    offline: Offline,
    key: Array,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    sampling: Sampling,
    capacity: int,
    eos_ids: tuple[int, ...],
    drafts: int = 0,
    chunk: int = 0,
    cache_dtype: str | None = None,
) -> tuple[Begun, Any]:
    """Prompts to the first token of each answer.

    Args:
      params: see `generate_tokens`, as all the others.
      prompts: see there.
      offline: see there.
      key: see there.
      config: see there.
      recipe: see there.
      sampling: see there.
      capacity: see there.
      eos_ids: see there.
      drafts: see there.
      chunk: see there.
      cache_dtype: see there.

    Returns:
      What the following calls need, and the answers; with a tree per prompt, by prompt.
    """

    def one(prompts: Prompts, key: Array) -> tuple[Begun, Any]:
        tree, moments, state, unreached = read(
            params, prompts, offline, key, config=config, recipe=recipe, sampling=sampling,
            capacity=capacity, eos_ids=eos_ids, drafts=drafts, chunk=chunk,
            cache_dtype=cache_dtype,
        )  # fmt: skip
        packed = {} if offline.packed is not None else _quantized(tree)
        return Begun(packed, moments, key, unreached), state

    if recipe is None or recipe.batch == "pooled":
        return one(prompts, key)
    return jax.vmap(one)(*separately(prompts, key))


@partial(
    jax.jit, static_argnames=("config", "recipe", "sampling", "eos_ids", "drafts"),
    donate_argnames="state",
)  # fmt: skip
def go_on(
    params: Params,
    offline: Offline,
    begun: Begun,
    state: Any,
    limit: Int[Array, ""],
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    drafts: int = 0,
) -> tuple[Begun | None, Any]:
    """Some tokens more.

    Args:
      params: see `generate_tokens`.
      offline: see there.
      begun: from `start`; after a refresh from the last call.
      state: the answers so far; the call uses it up.
      limit: most tokens per answer, up to this call's end; dynamic.
      config: see `generate_tokens`.
      recipe: see there.
      sampling: see there.
      eos_ids: see there.
      drafts: see there.

    Returns:
      With a refresh what takes the place of `begun`, else None; and the answers.
    """
    base = _base(params, offline)

    def one(begun: Begun, state: Any) -> tuple[Begun | None, Any]:
        tree, moments, state = answer(
            params, replace_kernels(base, begun.packed), begun.moments, state, offline, begun.key,
            limit, config=config, recipe=recipe, sampling=sampling, eos_ids=eos_ids, drafts=drafts,
        )  # fmt: skip
        new = None if tree is None else Begun(_quantized(tree), moments, begun.key, begun.unreached)
        return new, state

    if recipe is None or recipe.batch == "pooled":
        return one(begun, state)
    return jax.vmap(one)(begun, state)


class Stream:
    """An answer that is being decoded: an iterator over pieces of its text.

    A piece is never taken back: a character of which only some bytes are decoded is held until it
    is whole. A caller may stop early; `generation` is what was decoded until then.

    Attributes:
      first_token: seconds from the call to the first token.
    """

    def __init__(
        self, model: Model, rows: list[list[int]], arrays: tuple[Any, ...], how: dict[str, Any],
        limit: int, began: float,
    ):  # fmt: skip
        """Reads the prompt; see `stream`.

        Args:
          model: see `stream`.
          rows: the prompt's token ids.
          arrays: what `start` takes.
          how: its static arguments.
          limit: most new tokens.
          began: when the caller called, by `time.perf_counter`.
        """
        self._model, self._rows, self._limit, self._began = model, rows, limit, began
        self._params, self._prompts, self._offline, _ = arrays
        self._begun, self._state = start(*arrays, **how)
        self._how = {k: value for k, value in how.items() if k not in _OF_START}
        self._chunk = how["chunk"]
        self._new, self._ended = self._seen()
        self.first_token = time.perf_counter() - began
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
                    put(np.int32(limit)), **self._how,
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
        stats = speculation.stats(self._state)
        return made_of(
            self._model, recipe, self._offline, self._rows, [self._new],
            [stopped if self._ended else "caller"], moments, time.perf_counter() - self._began,
            None if share is None else float(np.mean(jax.device_get(share))),
            [] if stats is None else [Drafts(*map(int, np.reshape(jax.device_get(stats), -1)))],
        )  # fmt: skip


@on_its_mesh
def stream(
    model: Model, prompt: Any, *, recipe: Recipe | None, offline: Offline | None = None,
    max_new_tokens: int = 64, sampling: Sampling = Sampling(), seed: int = 0, chat: bool = False,
    smallest: int = SMALLEST_BUCKET, speculate: int = 0, prefill_chunk: int = 0,
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
    return Stream(model, asked.rows, arrays, how, max_new_tokens, began)
