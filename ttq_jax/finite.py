"""Where a result stopped being finite.

Every program returns a flag, or a loss that shows it, which is almost free. Only when it is false
are the stages looked at again, here, to say where infinities or NaN came up first.
"""

from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ttq_jax.config import ModelConfig
from ttq_jax.errors import NotFiniteError
from ttq_jax.host import fetched, on_host
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.prefill import prefill
from ttq_jax.quant.head import joined
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import MixedLinear, Offline, Params, Prompts

_CHECKPOINT = "The checkpoint is damaged, or its numbers do not fit the dtype: load it as float32"
_MODEL = "The unquantized model overflows on this text: load it as float32, or shorten the text"
_RECIPE = (
    "Recipe none shows whether the unquantized model is finite here. If it is, change the recipe: "
    "a smaller scale.p, more rounding.damping, or grid.store_dtype float32"
)


def _floating(tree: Any) -> list[Array]:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]


@jax.jit
def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating number of a tree is finite."""
    flags = [jnp.all(_finite_layers(a) if on_host(a) else jnp.isfinite(a)) for a in _floating(tree)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def _finite_layers(stack: Array) -> Bool[Array, " L"]:
    """Whether each layer is finite; from the host's memory one at a time is fetched."""
    if on_host(stack):
        return jax.lax.map(lambda one: jnp.all(jnp.isfinite(fetched(one))), stack)
    return jnp.all(jnp.isfinite(stack), axis=tuple(range(1, stack.ndim)))


def _by_layer(entry: Any) -> Bool[Array, " L"]:
    """Whether each layer of stacked arrays is finite; of mixed widths, whether all layers are."""
    is_mixed = lambda w: isinstance(w, MixedLinear)  # noqa: E731
    if any(map(is_mixed, jax.tree.leaves(entry, is_leaf=is_mixed))):
        return all_finite(entry)[None]
    flags = [_finite_layers(a) for a in _floating(entry)]
    return jnp.all(jnp.stack(flags), axis=0) if flags else jnp.ones(1, bool)


@jax.jit
def _flags(tree: dict[str, Any]) -> dict[str, Bool[Array, " L"]]:
    return {name: _by_layer(entry) for name, entry in tree.items()}


def _first(tree: dict[str, Any]) -> str | None:
    """The first layer that is not finite, and its entry of the tree; None if all are."""
    bad = [
        (layer, len(by_layer), name)
        for name, by_layer in jax.device_get(_flags(tree)).items()
        for layer, fine in enumerate(by_layer)
        if not fine
    ]
    if not bad:
        return None
    layer, count, name = min(bad)
    return f"layer {layer} ({name})" if count > 1 else name


@partial(jax.jit, static_argnames=("config", "recipe", "chunk"))
def _read(
    params: Params, prompts: Prompts, offline: Offline, *, config: ModelConfig,
    recipe: Recipe | None, chunk: int,
) -> tuple[dict[str, Any], dict[str, Array]]:  # fmt: skip
    """The layers that a prompt makes, and its keys and values."""
    batch, length = prompts.tokens.shape
    cache = empty_cache(config, batch, length, activation_dtype(params))
    _, cache, tree, *_ = prefill(
        params, prompts, cache, config=config, recipe=recipe, offline=offline, chunk=chunk
    )
    real = prompts.valid[None, :, :, None, None]
    read = {"keys": jnp.where(real, cache.k, 0), "values": jnp.where(real, cache.v, 0)}
    return tree["layers"], read


def check_offline(offline: Offline, recipe: Recipe) -> None:
    """Refuses what was prepared for a recipe if it is not finite.

    Args:
      offline: from `prepare`.
      recipe: which.

    Raises:
      NotFiniteError: a moment, a factor or a packed weight is infinite or NaN.
    """
    if jax.device_get(all_finite(offline)):
        return
    parts = {
        "moments": offline.moments,
        "low-rank factors": offline.low_rank,
        "weights": {} if offline.packed is None else offline.packed["layers"],
    }
    where = next((f"{what}: {w}" for what, part in parts.items() if (w := _first(part))), "weights")
    raise NotFiniteError(
        f"what was prepared for this recipe holds infinities or NaN, in its {where}. It reads "
        f"moments of the powers {list(recipe.reads.powers)}. {_RECIPE}"
    )


def raise_not_finite(
    params: Params, prompts: Prompts, offline: Offline, *, config: ModelConfig,
    recipe: Recipe | None, chunk: int = 0,
) -> NoReturn:  # fmt: skip
    """Ends a program whose flag is false.

    Args:
      params: the dense tree.
      prompts: what was read.
      offline: what the recipe needed besides.
      config: the model's.
      recipe: how weights were quantized; None for not.
      chunk: see `prefill`.

    Raises:
      NotFiniteError: always; it names the first layer with infinities or NaN, and what to change.
    """
    params, offline = joined(params, recipe, offline)
    if where := _first(params["layers"]):
        raise NotFiniteError(
            f"the model's weights hold infinities or NaN in {where}. {_CHECKPOINT}"
        )
    if not jax.device_get(all_finite({name: params[name] for name in params if name != "layers"})):
        raise NotFiniteError(
            f"the model's embedding, head or last norm holds infinities or NaN. {_CHECKPOINT}"
        )
    layers, read = _read(params, prompts, offline, config=config, recipe=recipe, chunk=chunk)
    if recipe is not None and (where := _first(layers)):
        raise NotFiniteError(
            f"the quantized weights hold infinities or NaN from {where} on. {_RECIPE}"
        )
    advice, where = _MODEL if recipe is None else _RECIPE, _first(read)
    if where:
        raise NotFiniteError(f"reading the text gave infinities or NaN in {where}. {advice}")
    raise NotFiniteError(f"the logits hold infinities or NaN. {advice}")
