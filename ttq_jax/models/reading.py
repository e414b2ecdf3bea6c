"""What a layer's attention does with the cache: rotate, write, read, mix."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ttq_jax.config import ModelConfig
from ttq_jax.models.cache import Stack, read_layer, write_layer
from ttq_jax.models.layers import rotate
from ttq_jax.models.prompt_attention import attend_chunk, attend_slots
from ttq_jax.types import Cache


@dataclasses.dataclass(frozen=True)
class Reading:
    """What every layer is told about the tokens that are read.

    Attributes:
      config: the model's.
      cache: with the tokens registered; its keys and values are not read.
      positions: int32[B, T], the tokens'.
      valid: bool[B, T].
      start: the first token's slot.
      slots: how many of the cache's slots are attended to.
      grown: see `layer_constants.growths`.
    """

    config: ModelConfig
    cache: Cache
    positions: Array
    valid: Array
    start: Array
    slots: int
    grown: Array | None

    def part(self, first: Array, count: int) -> "Reading":
        """Some of the tokens.

        Args:
          first: index of the first.
          count: how many.

        Returns:
          The same of these; the cache is the whole one.
        """
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=1)  # noqa: E731
        return dataclasses.replace(
            self, positions=cut(self.positions), valid=cut(self.valid), start=self.start + first
        )

    def attention(
        self, constants: dict[str, Array], stacks: tuple[Stack, Stack], size: int | None = None
    ) -> Callable[[Array, Array, Array], tuple[Array, tuple[Stack, Stack]]]:
        """A layer's attention, for `Block`.

        Args:
          constants: the layer's, see `layer_constants`.
          stacks: keys and values of all layers.
          size: tokens per part of a prompt that is read in parts; None for one that is not.

        Returns:
          (q, k, v)[B, T, heads, H] -> mixed values and the new stacks.
        """
        config, at, grown = self.config, constants["layer"], self.grown

        def turned(x: Array, positions: Array) -> Array:
            if config.rope is None:
                return x
            frequencies = constants["rope"][None]
            if grown is not None:
                frequencies = frequencies * grown[constants["local"]]
            return rotate(x, positions, frequencies, constants.get("magnitude"))

        def attention(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Stack, Stack]]:
            # Keys whose rotation depends on the length are turned when they are read, each time.
            k = k if grown is not None else turned(k, self.positions)
            ks, vs = (
                write_layer(stack, at, self.start, new)
                for stack, new in zip(stacks, (k, v), strict=True)
            )

            def stored(first: Any, count: int) -> tuple[Array, Array, Array, Array]:
                cut = lambda a: jax.lax.dynamic_slice_in_dim(a, first, count, axis=1)  # noqa: E731
                positions = cut(self.cache.positions)
                keys = read_layer(ks, at, count, first, q.dtype)
                keys = keys if grown is None else turned(keys, positions)
                values = read_layer(vs, at, count, first, q.dtype)
                return keys, values, positions, cut(self.cache.valid)

            q = turned(q, self.positions)
            how = {
                "positions": self.positions, "valid": self.valid, "window": constants["window"]
            }  # fmt: skip
            if size is None:
                every = stored(np.int32(0), self.slots)
                return attend_slots(config, q, *every, **how), (ks, vs)
            return attend_chunk(config, q, stored, self.start, size, **how), (ks, vs)

        return attention
