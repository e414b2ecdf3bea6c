"""The vocabulary's tables in few bits: the embedding, and the head where it is another table.

Both are rounded to nearest in groups of 64, symmetric, with coded scales. That depends on no
prompt, so it is done once per model; a program gets the packed tables in place of the dense ones.
A tied table is stored once: read by rows for the embedding, multiplied for the logits.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from ttq_jax.config import ConfigError
from ttq_jax.partition import TABLE, count, kernel_specs, on_several, shared
from ttq_jax.quant.convert import quantize
from ttq_jax.quant.grid import Grid
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.scaling import NoScale
from ttq_jax.types import Offline, Params, QuantizedLinear

BLOCK = 4096
"""Tokens that are rounded at a time: no float32 copy of a whole table ever exists."""


def grid_of(bits: int) -> Grid:
    """The tables' grid at a width."""
    return Grid(bits=bits, group_size=64, symmetric=True, scales="coded")


def pack_columns(w: Float[Array, "E n"], bits: int) -> QuantizedLinear:
    """Some tokens' columns, packed; each by itself, so that any cut gives the same numbers.

    Args:
      w: the columns.
      bits: width of a code, see `Recipe.head`.

    Returns:
      The packed columns.
    """
    return quantize(w, None, Recipe(moments="none", scale=NoScale(), grid=grid_of(bits)))


def pack_head(params: Params, bits: int) -> Params:
    """Packs the tables of a tree; pure and jittable.

    Args:
      params: a tree with dense tables.
      bits: width of a code, see `Recipe.head`.

    Returns:
      The entries that take the place of the tree's own: "embed", and "head" if it is untied.
    """
    packed: Params = {"embed": {"embedding": _shared(params["embed"]["embedding"], 0, bits)}}
    if "head" in params:
        packed["head"] = {"kernel": _shared(params["head"]["kernel"], 1, bits)}
    return packed


def _shared(table: Array, tokens: int, bits: int) -> QuantizedLinear:
    """`_packed` on one device; on a mesh every device packs its own tokens."""
    run = partial(_packed, tokens=tokens, bits=bits)
    if not on_several():
        return run(table)
    split, axes = TABLE.here(), shared() or None
    assert split is not None
    given = P(axes) if tokens == 0 else P(None, axes)
    shape = list(table.shape)
    shape[tokens] //= count(shared())
    made = jax.eval_shape(run, jax.ShapeDtypeStruct(tuple(shape), table.dtype))
    specs = kernel_specs(made, split, ())
    own = jax.shard_map(run, in_specs=given, out_specs=specs, check_vma=False)(table)
    return dataclasses.replace(own, d_out=table.shape[tokens], split=split)


def _packed(table: Array, tokens: int, bits: int) -> QuantizedLinear:
    """A table whose axis `tokens` counts tokens."""
    n = table.shape[tokens]
    size = min(BLOCK, n)

    def block(start: Any) -> QuantizedLinear:
        part = jax.lax.dynamic_slice_in_dim(table, start, size, axis=tokens)
        made = pack_columns(part.T if tokens == 0 else part, bits)
        return dataclasses.replace(made, d_out=n)

    def write(i: Any, whole: QuantizedLinear) -> QuantizedLinear:
        # The last block begins early; what it shares with the one before comes out the same.
        start = jnp.minimum(i * size, n - size)

        def into(out: Array, part: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=-1)

        return jax.tree.map(into, whole, block(start))

    shapes = jax.eval_shape(block, jnp.zeros((), jnp.int32))
    empty = jax.tree.map(lambda s: jnp.zeros((*s.shape[:-1], n), s.dtype), shapes)
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(-(-n // size)), write, empty)


def head_bits(params: Params | None) -> int | None:
    """The width of a tree's tables; None where they are dense, or there is no tree."""
    table = None if params is None else params["embed"]["embedding"]
    return table.bits if isinstance(table, QuantizedLinear) else None


_jitted = jax.jit(pack_head, static_argnames="bits")


def head_of(params: Params, recipe: Recipe | None) -> Params | None:
    """The tables that take the place of a tree's own, for `Offline.head`.

    Args:
      params: a model's tree.
      recipe: None for the unquantized model.

    Returns:
      What `pack_head` makes; None if nothing takes their place.
    """
    if recipe is None or recipe.head is None or head_bits(params) is not None:
        return None
    return _jitted(params, bits=recipe.head)


def check_head(params: Params, recipe: Recipe | None, offline: Offline | None = None) -> None:
    """Refuses tables in another width than a recipe's.

    Args:
      params: a model's tree.
      recipe: None for the unquantized model.
      offline: what was prepared, whose tables take the place of dense ones; None before that.

    Raises:
      ConfigError: they are in another width.
    """
    wanted, loaded = None if recipe is None else recipe.head, head_bits(params)
    if loaded is not None and loaded != wanted:
        raise ConfigError(
            f"head: this model's table was packed in {loaded} bits while it was loaded, but the "
            f"recipe wants {_said(wanted)}; load the model with head={wanted}, or give the recipe "
            f"head={loaded}"
        )
    prepared = None if offline is None else head_bits(offline.head)
    if offline is not None and loaded is None and prepared != wanted:
        raise ConfigError(
            f"head: the recipe wants {_said(wanted)}, but what was prepared has "
            f"{_said(prepared)}; pass what prepare() returns for this recipe as offline"
        )


def _said(bits: int | None) -> str:
    return "the unquantized table" if bits is None else f"a table of {bits} bits"


def joined(params: Params, recipe: Recipe | None, offline: Offline) -> tuple[Params, Offline]:
    """What a program takes: a tree with the recipe's tables, and what was prepared besides.

    Args:
      params: a model's tree.
      recipe: None for the unquantized model.
      offline: from `prepare`.

    Returns:
      Both. Nothing that the recipe packs is among them as a dense table.

    Raises:
      ConfigError: the tables are in another width than the recipe's.
    """
    check_head(params, recipe, offline)
    if offline.head is None:
        return params, offline
    return {**params, **offline.head}, dataclasses.replace(offline, head=None)
