"""What a prefill does at a site: observe its input, quantize what reads it, multiply.

Each function makes a `Project` of the decoder, or what takes its place for a prompt in parts.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from ttq_jax.config import ModelConfig
from ttq_jax.experts import Routed, for_each_expert, for_own_experts, routed_linear
from ttq_jax.linear import add_bias, linear
from ttq_jax.models.chunks import Chunks
from ttq_jax.models.decoder import plain
from ttq_jax.quant.moments import Reads, observe_expert
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import blend, blend_expert
from ttq_jax.quant.streams import apart
from ttq_jax.quant.tree import at_its_width, quantize_layer
from ttq_jax.types import EXPERT_SITES, Moments, Offline, Params, Stacked


def observing(valid: Bool[Array, "B T"], reads: Reads) -> Callable[..., Any]:
    """A `Project` that multiplies and keeps the moments of each site's input, or expert's."""

    def project(
        site: str, x: Array | Routed, weights: dict[str, Params]
    ) -> tuple[dict[str, Array], Moments]:
        def make(expert: Array | None, _: None) -> Moments:
            return observe_expert(x, valid, reads, expert)

        return plain(site, x, weights)[0], for_each_expert(make, None, n_experts(x))

    return project


def n_experts(x: Array | Routed) -> int | None:
    """How many experts these activations are sorted by; None for plain ones."""
    return x.n_experts if isinstance(x, Routed) else None


def reads_prompt(recipe: Recipe) -> bool:
    """Whether what the weights become depends on the prompt."""
    return recipe.source.of == "prompt" and recipe.reads != Reads()


def quantizing(
    valid: Bool[Array, "B T"], config: ModelConfig, recipe: Recipe
) -> Callable[..., Any]:
    """A `Project` that observes, quantizes and multiplies, given a layer's `Offline`.

    Args:
      valid: the prompts' real tokens.
      config: the model's.
      recipe: how to quantize; with both streams it is given the activations of either.

    Returns:
      It keeps (packed weights; moments or None; share of unreached experts or None).
    """
    source = recipe.source
    both = recipe.prefill == "both"

    def project(
        site: str, x: Any, weights: dict[str, Params], layer: Offline
    ) -> tuple[dict[str, Array], tuple[dict[str, Any], Moments | None, Array | None]]:
        stacks, at = _dense({n: w["kernel"] for n, w in weights.items() if recipe.selects(n)})
        routed = isinstance(x, Routed)
        streams = apart(x, valid, recipe.correction) if both else None
        seen_by = x if streams is None else streams.drifted

        def make(
            expert: Array | None, here: Array | None, mine: _Known, stacks: dict[str, Array]
        ) -> tuple[dict, dict, Moments | None]:
            seen = None
            if source.of == "prompt":
                seen = observe_expert(seen_by, valid, recipe.reads, expert)
            seen, moments = mine.with_prompt(seen, recipe, expert)
            if not stacks:
                return {}, {}, seen
            beside = None if routed else streams or x
            ys, packed = quantize_layer(
                stacks, moments, recipe, mine.low_rank, layer=at, expert=here, x=beside
            )
            return ys, packed, seen

        mine = _Known.of(site, stacks, layer)
        ys, packed, seen = for_own_experts(make, mine, stacks, n_experts(x))
        if routed:
            made = packed if recipe.prefill == "quantized" else {}
            ys = routed_linear(x, weights | _as_weights(made, recipe, config.n_layers, at))
        for name, w in weights.items():
            if name not in ys:
                ys[name] = linear(x, w["kernel"], w.get("bias"))
            elif not routed:
                ys[name] = add_bias(ys[name], w.get("bias")).astype(x.dtype)
        return ys, _kept(packed, seen, recipe, routed and bool(stacks))

    return project


def quantizing_after(chunk: int, config: ModelConfig, recipe: Recipe) -> Chunks:
    """`quantizing` for a prompt in parts: each observes, and their sum quantizes.

    Args:
      chunk: tokens per part.
      config: the model's.
      recipe: how to quantize; the unquantized weights read the prompt.

    Returns:
      For `forward`; what is kept is that of `quantizing`.
    """

    def finish(site: str, seen: Moments | None, weights: dict[str, Params], layer: Offline) -> Any:
        stacks, at = _dense({n: w["kernel"] for n, w in weights.items() if recipe.selects(n)})
        experts = config.n_experts if site in EXPERT_SITES else 0

        def make(
            expert: Array | None, here: Array | None, mine: tuple, stacks: dict[str, Array]
        ) -> tuple[dict, Moments | None]:
            known, seen = mine
            seen, moments = known.with_prompt(seen, recipe, expert)
            if not stacks:
                return {}, seen
            _, packed = quantize_layer(
                stacks, moments, recipe, known.low_rank, layer=at, expert=here
            )
            return packed, seen

        mine = (_Known.of(site, stacks, layer), seen)
        packed, seen = for_own_experts(make, mine, stacks, experts or None)
        return _kept(packed, seen, recipe, bool(experts and stacks))

    observed = recipe.source.of == "prompt"
    return Chunks(
        chunk, lambda valid: observing(valid, recipe.reads) if observed else plain, finish
    )


@struct.dataclass
class _Known:
    """What is known of a site before the prompt.

    Attributes:
      moments: of a corpus or a prior, or None.
      carried: of a conversation so far, or None.
      low_rank: static factors by projection.
    """

    moments: Moments | None
    carried: Moments | None
    low_rank: dict[str, Any]

    @classmethod
    def of(cls, site: str, stacks: dict[str, Array], layer: Offline) -> "_Known":
        """A layer's."""
        factors = {name: layer.low_rank[name] for name in stacks if name in layer.low_rank}
        return cls(layer.moments.get(site), layer.carried.get(site), factors)

    def with_prompt(
        self, seen: Moments | None, recipe: Recipe, expert: Array | None
    ) -> tuple[Moments | None, Moments | None]:
        """The moments so far, and those that the weights are quantized by."""
        source = recipe.source
        if seen is None:
            return None, self.moments
        if self.carried is not None:
            seen = seen + self.carried.scaled(source.decay)
        mix = blend if expert is None else blend_expert
        return seen, mix(seen, self.moments, source)


def _kept(
    packed: dict[str, Any], seen: Moments | None, recipe: Recipe, experts: bool
) -> tuple[dict[str, Any], Moments | None, Array | None]:
    """What is kept of a site; of experts also the share that no token reached."""
    unreached = None
    if experts and reads_prompt(recipe) and seen is not None:
        unreached = jnp.mean(seen.count == 0, dtype=jnp.float32)
    return packed, seen if recipe.source.keeps else None, unreached


def _dense(kernels: dict[str, Any]) -> tuple[dict[str, Array], Any]:
    """The stacks of a site's dense kernels, and the layer's index.

    Raises:
      ValueError: one is packed.
    """
    for name, kernel in kernels.items():
        if not isinstance(kernel, Stacked):
            raise ValueError(
                f"{name}: expected a dense weight to quantize, got a packed one; pass the tree "
                "that load() returned"
            )
    layer = next((kernel.layer for kernel in kernels.values()), None)
    return {name: kernel.kernels for name, kernel in kernels.items()}, layer


def _as_weights(
    packed: dict[str, Any], recipe: Recipe, n_layers: int, layer: Any
) -> dict[str, Params]:
    """One layer's packed experts as a site's weights."""
    return {
        name: {"kernel": at_its_width(name, one, recipe, n_layers, layer)}
        for name, one in packed.items()
    }
