"""Bits where they matter: a width for each projection of each layer, within a budget.

What a width costs is estimated in nats per token. A text is cut into windows; each is a prompt and
what follows it. Every weight is rounded at every width from the prompt, as the recipe would, and
its output error δ at the following tokens is weighted by the gradient g of the log-likelihood
there: ½ E[(g·δ)²], the second-order estimate of the divergence from the unquantized model (g of
labels drawn from the model itself, so that g gᵀ is the Fisher information; errors of different
weights and tokens are taken as independent). The output error alone would mislead: in some layers a
few huge activations dominate it and matter little.

Widths are then raised in the order of divergence removed per stored bit. The result is a tuple of
`Width` rules, static in the recipe: one program per model, and none per prompt.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.finite import raise_not_finite
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits, plain
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.prompts import check_windows, pad_prompts
from ttq_jax.quant.grid import BITS
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import Source, blend
from ttq_jax.quant.tree import quantize_layer
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import FIXED, make_key
from ttq_jax.types import (
    SITE_OF,
    LowRank,
    Moments,
    Offline,
    Params,
    QuantizedLinear,
    kernels,
    leaf_bits,
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Size and error of each width, per projection.

    Attributes:
      widths: ascending.
      errors: by projection, [L, len(widths)]; estimated divergence, nats per token.
      bits: by projection, [len(widths)]; stored bits of one layer, everything counted.
      weights: by projection, weights of one layer.
    """

    widths: tuple[int, ...]
    errors: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]
    weights: dict[str, int]


@partial(jax.jit, static_argnames="config")
def sensitivities(
    params: Params, tokens: Int[Array, " T"], key: Array, *, config: ModelConfig
) -> tuple[dict[str, Float[Array, "L T d_in"]], dict[str, Float[Array, "L T d_out"]]]:
    """The input of every projection at every token, and the likelihood's gradient at its output.

    Args:
      params: a dense tree.
      tokens: of one window.
      key: draws the label of each position from the model's own prediction.
      config: the model's.

    Returns:
      ({site: inputs}, {projection: gradient of the labels' summed log-likelihood}).
    """
    batch = tokens[None]
    cache = empty_cache(config, 1, len(tokens), activation_dtype(params))
    # An output's gradient is that of zeros added to it.
    probes = {
        name: jnp.zeros((len(kernel), *batch.shape, kernel.shape[-1]), jnp.float32)
        for name, kernel in kernels(params["layers"]).items()
    }

    def project(
        site: str, x: Array, weights: dict[str, Params], at: dict[str, Array]
    ) -> tuple[dict[str, Array], Array]:
        ys = plain(site, x, weights)[0]
        return {n: y + at[n].astype(y.dtype) for n, y in ys.items()}, x[0].astype(jnp.float32)

    def likelihood(probes: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        hidden, _, seen = forward(
            config, params, batch, jnp.ones(batch.shape, bool), cache,
            project=project, per_layer=probes,
        )  # fmt: skip
        return _drawn(config, params, hidden[0], key), seen

    gradient, seen = jax.grad(likelihood, has_aux=True)(probes)
    return seen, {name: g[:, 0] for name, g in gradient.items()}


def _drawn(
    config: ModelConfig, params: Params, hidden: Float[Array, "T D"], key: Array
) -> Float[Array, ""]:
    """Log-likelihood of labels drawn from the predictions, some rows at a time: V is large."""
    rows = 64
    padded = jnp.pad(hidden, ((0, -len(hidden) % rows), (0, 0))).reshape(-1, rows, hidden.shape[-1])
    real = (jnp.arange(padded.shape[0] * rows, dtype=jnp.int32) < len(hidden)).reshape(-1, rows)

    @jax.checkpoint
    def block(args: tuple[Array, Array, Array]) -> Array:
        h, counts, key = args
        log_probs = jax.nn.log_softmax(logits(config, params, h))
        label = jax.random.categorical(key, jax.lax.stop_gradient(log_probs))
        drawn = jnp.take_along_axis(log_probs, label[:, None], axis=1)[:, 0]
        return jnp.sum(jnp.where(counts, drawn, 0.0))

    return jnp.sum(jax.lax.map(block, (padded, real, jax.random.split(key, len(padded)))))


@partial(jax.jit, static_argnames=("name", "recipe", "prompt_tokens"))
def _errors(
    stack: Float[Array, "L d_in d_out"], moments: Moments | None, low_rank: LowRank | None,
    inputs: Float[Array, "L T d_in"], gradient: Float[Array, "L T d_out"], *,
    name: str, recipe: Recipe, prompt_tokens: int,
) -> tuple[Float[Array, " L"], QuantizedLinear]:  # fmt: skip
    """Divergence that rounding one projection costs in every layer, and the packed weight."""

    def one(at: tuple) -> tuple[Array, QuantizedLinear]:
        layer, seen, factors, x, g = at
        made = quantize_layer(
            {name: stack}, seen, recipe, {} if factors is None else {name: factors}, layer=layer
        )[1][name]
        w = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False).astype(jnp.float32)
        off = jnp.matmul(x[prompt_tokens:], w - dense_weight(made), precision="highest")
        return 0.5 * jnp.mean(jnp.square(jnp.sum(off * g[prompt_tokens:], axis=1))), made

    layers = jnp.arange(len(stack), dtype=jnp.int32)
    return jax.lax.map(one, (layers, moments, low_rank, inputs, gradient))


@partial(jax.jit, static_argnames="source")
def _blended(
    seen: dict[str, Moments], prior: dict[str, Moments], source: Source
) -> dict[str, Moments]:
    """A prompt's moments and the prior's, stacked over the layers."""
    mix = jax.vmap(partial(blend, source=source))
    return {site: mix(moments, prior.get(site)) for site, moments in seen.items()}


def measure_widths(
    params: Params, windows: np.ndarray, recipe: Recipe, offline: Offline, *,
    config: ModelConfig, prompt_tokens: int, widths: tuple[int, ...] = BITS,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Measured:  # fmt: skip
    """Rounds every weight at every width, on each window.

    Args:
      params: a dense tree.
      windows: int32[n, W] token ids, n >= 1.
      recipe: its moments, rounding, scale, groups and low rank; its own bits and width rules are
        not read.
      offline: its moments and static factors are used.
      config: the model's.
      prompt_tokens: the first P of a window are the prompt, errors are measured on the rest;
        0 < P < W.
      widths: to try, ascending.
      progress: called with (windows done, windows in all).

    Returns:
      Errors, the mean over windows, and sizes.

    Raises:
      ConfigError: no window, P outside its range, a recipe that selects no projection, or a model
        with experts.
      NotFiniteError: an error is infinite or NaN.
    """
    refuse_experts(config)
    if not len(windows) or not 0 < prompt_tokens < windows.shape[1]:
        raise ConfigError(
            f"allocate: expected at least one window of more than {prompt_tokens} tokens, got "
            f"{len(windows)} of {windows.shape[1]}; give a longer text, or fewer prompt tokens"
        )
    found = kernels(params["layers"])
    dense = {name: found[name] for name in recipe.selected(found)}
    shape = (windows.shape[0], config.n_layers, len(widths))
    errors = {name: np.zeros(shape) for name in dense}
    bits = {name: np.zeros(len(widths)) for name in dense}
    for i, window in enumerate(check_windows(windows, config.vocab_size)):
        moments = offline.moments
        if recipe.source.of == "prompt":
            prompt = jax.device_put(window[None, :prompt_tokens])
            seen = observe_tokens(params, prompt, config=config, reads=recipe.reads)
            moments = _blended(seen, moments, recipe.source)
        key = make_key(i, FIXED)
        inputs, gradient = sensitivities(params, jax.device_put(window), key, config=config)
        for name, stack in dense.items():
            for j, width in enumerate(widths):
                grid = dataclasses.replace(recipe.grid, bits=width)
                uniform = dataclasses.replace(recipe, grid=grid, widths=(), select="layers/.*")
                error, made = _errors(
                    stack, moments.get(SITE_OF[name]), offline.low_rank.get(name),
                    inputs[SITE_OF[name]], gradient[name],
                    name=name, recipe=uniform, prompt_tokens=prompt_tokens,
                )  # fmt: skip
                errors[name][i, :, j] = jax.device_get(error)
                if not np.isfinite(errors[name][i, :, j]).all():
                    read = [window[:prompt_tokens].tolist()]
                    prompts = pad_prompts(read, max_positions=config.max_positions)
                    raise_not_finite(params, prompts, offline, config=config, recipe=uniform)
                bits[name][j] = leaf_bits(made) * math.prod(stack.shape[1:])
        progress(i + 1, len(windows))
    return Measured(
        widths, {name: e.mean(0) for name, e in errors.items()}, bits,
        {name: math.prod(stack.shape[1:]) for name, stack in dense.items()},
    )  # fmt: skip


def refuse_experts(config: ModelConfig) -> None:
    """Refuses a mixture of experts: how far an expert's weights matter is not measured yet.

    Args:
      config: the model's.

    Raises:
      ConfigError: it has experts.
    """
    if config.n_experts:
        raise ConfigError(
            f"allocate: expected a model without experts, got {config.n_experts} of them in each "
            "layer; write the widths into the recipe by hand, as rules for layers/down or "
            "layers/3/down"
        )


def allocate(measured: Measured, budget: float) -> tuple[Width, ...]:
    """Chooses widths within a budget, where they remove most error.

    Every weight starts at the narrowest width; of all upgrades along the lower convex hull of each
    weight's (size, error) points, the one that removes most error per bit comes first, until no
    more fits. For a sum of convex terms this greedy choice is optimal up to the last item.

    Args:
      measured: from `measure_widths`.
      budget: stored bits per weight on average over what the recipe selects, everything counted
        except the two int32 by which a layer of mixed widths is found.

    Returns:
      Rules, a few per projection; `Recipe.widths` takes them.

    Raises:
      ConfigError: even the narrowest width exceeds the budget.
    """
    total = sum(measured.weights[name] * len(errors) for name, errors in measured.errors.items())
    chosen = {name: np.zeros(len(errors), int) for name, errors in measured.errors.items()}
    spent = sum(measured.bits[name][0] * len(errors) for name, errors in measured.errors.items())
    if spent > budget * total:
        raise ConfigError(
            f"allocate: expected a budget of at least {spent / total:.3f} stored bits per weight, "
            f"the size at {measured.widths[0]} bits everywhere, got {budget}"
        )
    upgrades = []
    for name, errors in measured.errors.items():
        for layer, row in enumerate(errors):
            upgrades += [(gain, name, layer, to) for gain, to in _hull(measured.bits[name], row)]
    # Along a hull the gains fall, so a weight's upgrades come in order.
    for _, name, layer, to in sorted(upgrades, key=lambda u: -u[0]):
        bits = measured.bits[name]
        price = bits[to] - bits[chosen[name][layer]]
        if price > 0 and spent + price <= budget * total:
            chosen[name][layer], spent = to, spent + price
    return tuple(rule for name, to in chosen.items() for rule in _rules(name, to, measured.widths))


def _hull(bits: np.ndarray, errors: np.ndarray) -> list[tuple[float, int]]:
    """(error removed per bit, index of the width) along the lower convex hull."""
    steps, at = [], 0
    while at < len(bits) - 1:
        gains = (errors[at] - errors[at + 1 :]) / (bits[at + 1 :] - bits[at])
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        at += best + 1
        steps.append((float(gains[best]), at))
    return steps


def _rules(name: str, chosen: np.ndarray, widths: tuple[int, ...]) -> list[Width]:
    """One projection's widths as rules: one for all layers, or one per width."""
    used = sorted(set(chosen.tolist()))
    if len(used) == 1:
        return [Width(select=f"layers/{name}", bits=widths[used[0]])]
    return [
        Width(
            select=f"layers/({'|'.join(str(i) for i in np.flatnonzero(chosen == to))})/{name}",
            bits=widths[to],
        )
        for to in used
    ]
