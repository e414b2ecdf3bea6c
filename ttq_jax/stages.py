"""The stages of an answer, and the two programs that run them apart.

`read` and `answer` are the stages of `generate_tokens`. `start` reads the prompt and quantizes;
`go_on` decodes some tokens and hands its state to the next call. Both are compiled once per shape.
The tokens are those of `generate_tokens`.
"""

from functools import partial
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float, Int

from ttq_jax import auto_drafts, speculation
from ttq_jax.config import ModelConfig
from ttq_jax.decode import Refresh, advance, begin
from ttq_jax.draft_costs import Lengths, most
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.prefill import last_hidden, prefill, requantize
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

STATIC = (
    "config", "recipe", "sampling", "capacity", "eos_ids", "drafts", "chunk", "cache_dtype"
)  # fmt: skip
"""What a program that begins an answer is compiled for, besides shapes."""

_OF_START = ("capacity", "chunk", "cache_dtype")


def read(
    params: Params, prompts: Prompts, offline: Offline, key: Array, *, config: ModelConfig,
    recipe: Recipe | None, sampling: Sampling, capacity: int, eos_ids: tuple[int, ...],
    drafts: Lengths, chunk: int = 0, cache_dtype: str | None = None,
) -> tuple[Params, dict[str, Moments], Any, Array | None]:  # fmt: skip
    """Prompts that share one quantized tree, up to their answers' first token.

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
      The tree to decode from, the moments so far, the answers, and the share of experts that no
      token reached, None for a model without.
    """
    batch, length = prompts.tokens.shape
    dtype = cache_dtype or activation_dtype(params)
    cache = empty_cache(config, batch, length + capacity + most(drafts), dtype)
    reader: Any = speculation.read if drafts else prefill
    hidden, cache, packed, moments, unreached = reader(
        params, prompts, cache, config=config, recipe=recipe, offline=offline, chunk=chunk
    )
    state: Any = begin(
        params if drafts else packed, cache, last_hidden(hidden, prompts), key, config=config,
        sampling=sampling, capacity=capacity, eos_ids=eos_ids,
    )  # fmt: skip
    return packed, moments, speculation.begin(state, drafts) if drafts else state, unreached


def answer(
    params: Params, packed: Params, moments: dict[str, Moments], state: Any,
    offline: Offline, key: Array, limit: Array, *, config: ModelConfig, recipe: Recipe | None,
    sampling: Sampling, eos_ids: tuple[int, ...], drafts: Lengths, costs: Array | None = None,
) -> tuple[Params | None, dict[str, Moments], Any]:  # fmt: skip
    """The answers of `read`, decoded up to a limit.

    Args:
      params: see `generate_tokens`.
      packed: from `read`; with a refresh, from the last call.
      moments: likewise.
      state: from `read`, or from the last call.
      offline: see `generate_tokens`.
      key: see there.
      limit: see there.
      config: see there.
      recipe: see there.
      sampling: see there.
      eos_ids: see there.
      drafts: see there; or what each cycle chooses from.
      costs: float32[n], of a cycle with each number of drafts; None where nothing is chosen.

    Returns:
      With a refresh the new tree, else None; the moments so far; and the answers.
    """
    if drafts:
        trees = params, speculation.drafter(packed, offline)
        how: Any = {"config": config, "sampling": sampling, "eos_ids": eos_ids}
        if isinstance(drafts, tuple):
            assert costs is not None
            state = auto_drafts.advance(*trees, state, key, limit, costs, lengths=drafts, **how)
        else:
            state = speculation.advance(*trees, state, key, limit, drafts=drafts, **how)
        return None, moments, state
    refresh = None
    if recipe is not None and recipe.source.refresh:
        again = lambda seen, _: requantize(params, seen, recipe, offline)  # noqa: E731
        refresh = Refresh(recipe.source.refresh, recipe.reads, moments, again)
    tree, grown, state = advance(
        packed, state, key, limit, config=config, sampling=sampling, eos_ids=eos_ids,
        refresh=refresh,
    )  # fmt: skip
    return tree, grown or moments, state


def of_go_on(how: dict[str, Any]) -> dict[str, Any]:
    """Of the static arguments of `start` those of `go_on`."""
    return {name: value for name, value in how.items() if name not in _OF_START}


def carried(recipe: Recipe | None, moments: dict[str, Moments]) -> dict[str, Moments]:
    """Of the moments after an answer, what the next turn of a conversation gets."""
    return moments if recipe is not None and recipe.source.decay > 0 else {}


def separately(prompts: Prompts, key: Array) -> tuple[Prompts, Array]:
    """Each prompt as a batch of its own, and a key for each; to be mapped over."""
    rows = jax.tree.map(lambda x: x[:, None], prompts)
    return rows, jax.random.split(key, prompts.tokens.shape[0])


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
    drafts: Lengths = 0,
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
    costs: Float[Array, " n"] | None = None,
    *,
    config: ModelConfig,
    recipe: Recipe | None,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    drafts: Lengths = 0,
) -> tuple[Begun | None, Any]:
    """Some tokens more.

    Args:
      params: see `generate_tokens`.
      offline: see there.
      begun: from `start`; after a refresh from the last call.
      state: the answers so far; the call uses it up.
      limit: most tokens per answer, up to this call's end; dynamic.
      costs: see `answer`; dynamic.
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
            costs=costs,
        )  # fmt: skip
        new = None if tree is None else Begun(_quantized(tree), moments, begun.key, begun.unreached)
        return new, state

    if recipe is None or recipe.batch == "pooled":
        return one(begun, state)
    return jax.vmap(one)(begun, state)
