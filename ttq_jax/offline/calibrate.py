"""Prepares what is made once per model, before any prompt: moments, static factors, packed trees.

AWQ is TTQ with a calibration corpus's moments in place of the prompt's; they are observed here.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ttq_jax.checkpoint import Model
from ttq_jax.checkpoint.fingerprint import said_of
from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import expect
from ttq_jax.finite import check_offline
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward
from ttq_jax.offline.prior import for_unreached, prior_from_weights
from ttq_jax.offline.samples import sample_windows
from ttq_jax.partition import on_its_mesh, put
from ttq_jax.prompts import check_windows
from ttq_jax.quant.head import check_head, head_of
from ttq_jax.quant.moments import Reads
from ttq_jax.quant.names import lacks_corpus
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import quantize_params, static_factors
from ttq_jax.sites import observing
from ttq_jax.types import Moments, Offline, Params


@partial(jax.jit, static_argnames=("config", "reads"))
def observe_tokens(
    params: Params, tokens: Int[Array, "B T"], *, config: ModelConfig, reads: Reads
) -> dict[str, Moments]:
    """Moments of what every linear layer sees when the model reads these tokens.

    Args:
      params: a dense tree; the moments are those of the unquantized model.
      tokens: without padding.
      config: the model's.
      reads: what to observe, see `Recipe.reads`.

    Returns:
      Per site, moments stacked over the layers, and over the experts where there are any.
    """
    valid = jnp.ones(tokens.shape, bool)
    batch, length = tokens.shape
    cache = empty_cache(config, batch, length, activation_dtype(params))
    _, _, moments = forward(config, params, tokens, valid, cache, project=observing(valid, reads))
    return moments


@on_its_mesh
def calibrate(
    model: Model,
    windows: np.ndarray | Array,
    reads: Reads,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> dict[str, Moments]:
    """The moments of a calibration corpus: the sum over its windows.

    Args:
      model: the unquantized model.
      windows: int32[n, W] token ids, n >= 1.
      reads: what to observe, see `Recipe.reads`.
      progress: called with (windows done, windows in all).

    Returns:
      Per site, moments stacked over the layers.

    Raises:
      ConfigError: no window.
    """
    if not len(windows):
        raise ConfigError("calibration: expected at least one window of text, got none")
    total: dict[str, Moments] | None = None
    checked = check_windows(windows, model.config.vocab_size, model.tokenizer)
    for i, window in enumerate(checked):
        tokens = put(window[None])
        seen = observe_tokens(model.params, tokens, config=model.config, reads=reads)
        total = seen if total is None else {site: total[site] + m for site, m in seen.items()}
        progress(i + 1, len(windows))
    assert total is not None
    return total


@on_its_mesh
def prepare(
    model: Model,
    recipe: Recipe | None,
    calibration: np.ndarray | dict[str, Moments] | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Offline:
    """Everything that a recipe needs besides the prompt.

    With a recipe that reads no prompt the weights are quantized here, once. For other recipes this
    makes the prior and the static factors; the weights are quantized at every prompt. The tables
    of the vocabulary are packed here for every recipe that packs them.

    Args:
      model: the unquantized model.
      recipe: how to quantize; None for the unquantized model.
      calibration: for a recipe that reads a corpus's moments: int32[n, W] token ids, or what
        `calibrate` made of them.
      progress: called with (windows done, windows in all) of the calibration.

    Returns:
      What `generate` and `perplexity` take as `offline`.

    Raises:
      ConfigError: the recipe needs a calibration corpus and none was given.
      NotFiniteError: the moments, factors or packed weights are not finite.
    """
    made = prepare_unpacked(model, recipe, calibration, progress)
    if recipe is None or recipe.source.of == "prompt":
        return made
    tree = {**model.params, **(made.head or {})}
    packed = Offline(packed=quantize_params(tree, recipe, made), head=made.head)
    check_offline(packed, recipe)
    return packed


def _replaced(model: Model, head: Params | None) -> Model:
    """The model with these tables."""
    if head is None:
        return model
    dense = {name: model.params[name] for name in head}
    return dataclasses.replace(
        model, params={**model.params, **head}, tables=said_of(dense, model.tables)
    )


@on_its_mesh
def with_head(model: Model, recipe: Recipe | None) -> Model:
    """The model with its tables as a recipe packs them, for many uses of one width.

    Args:
      model: as loaded.
      recipe: None for the unquantized model.

    Returns:
      The model; itself if there is nothing to pack.
    """
    return _replaced(model, head_of(model.params, recipe))


@on_its_mesh
def prepare_unpacked(
    model: Model,
    recipe: Recipe | None,
    calibration: np.ndarray | dict[str, Moments] | None = None,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Offline:
    """The moments and static factors that a recipe reads; quantizes no weight.

    Args:
      model: see `prepare`.
      recipe: see `prepare`.
      calibration: see `prepare`.
      progress: see `prepare`.

    Returns:
      What `quantize_params` and `allocate.measure_widths` take.

    Raises:
      ConfigError: the recipe needs a calibration corpus and none was given.
      NotFiniteError: the moments, factors or packed weights are not finite.
    """
    expect("model", model, Model, "a model, from load()")
    expect("recipe", recipe, (Recipe, type(None)), 'a recipe, as in preset("fast"), or None')
    if recipe is None:
        return Offline()
    check_head(model.params, recipe)
    head = head_of(model.params, recipe)
    # What follows sees the model as the recipe has it, whether its tables came packed or not.
    model = _replaced(model, head)
    source, moments = recipe.source, {}
    if source.reads_corpus:
        if calibration is None:
            raise ConfigError(lacks_corpus("this recipe", "pass calibration= to prepare()"))
        if not isinstance(calibration, dict):
            calibration = calibrate(model, calibration, recipe.reads, progress)
        moments = calibration
    elif source.prior == "weights":
        moments = prior_from_weights(model.params, config=model.config, reads=recipe.reads)
    elif source.prior == "samples":
        moments = calibrate(model, sample_windows(model), recipe.reads, progress)
    if source.of != "none":
        moments = for_unreached(model.params, moments, config=model.config, reads=recipe.reads)
    made = Offline(
        moments=moments, low_rank=static_factors(model.params, recipe, moments), head=head
    )
    check_offline(made, recipe)
    return made
