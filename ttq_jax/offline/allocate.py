"""Bits where they matter: a width for each projection of each layer, within a budget.

What a width costs is estimated in nats per token. A text is cut into windows; each is a prompt and
what follows it. Every weight is rounded at every width from the prompt, as the recipe would, and
its output error δ at the following tokens is weighted by the gradient g of the log-likelihood
there: ½ E[(g·δ)²], the second-order estimate of the divergence from the unquantized model (g of
labels drawn from the model itself, so that g gᵀ is the Fisher information; errors of different
weights and tokens are taken as independent). The output error alone would mislead: in some layers a
few huge activations dominate it and matter little.

The experts of a layer have one width together. Their bits all count, also of those that a token
does not read. Their errors count as often as the text's tokens reach them: g·δ of a token is the
sum over its experts. An expert that a prompt did not reach is rounded by the prior, as when it
answers. On a mesh every device rounds its own experts, and a token's sum is over the devices. That
rounding can send a token to another expert is not in the estimate; where little error is left, that
may be most of it.

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
from ttq_jax.experts import Routed, for_own_experts
from ttq_jax.finite import raise_not_finite
from ttq_jax.linear import dense_weight
from ttq_jax.models.cache import activation_dtype, empty_cache
from ttq_jax.models.decoder import forward, logits, plain
from ttq_jax.offline.calibrate import observe_tokens
from ttq_jax.partition import put
from ttq_jax.prefill import check_prior
from ttq_jax.prompts import check_windows, pad_prompts
from ttq_jax.quant.grid import BITS
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.source import Source, blend_all
from ttq_jax.quant.tree import quantize_layer
from ttq_jax.quant.widths import Width
from ttq_jax.sampling import FIXED, make_key
from ttq_jax.sites import n_experts
from ttq_jax.types import (
    SITE_OF,
    LowRank,
    Moments,
    Offline,
    Params,
    QuantizedLinear,
    Stacked,
    kernels,
    leaf_bits,
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Size and error of each width, per projection.

    Attributes:
      widths: ascending.
      errors: by projection, [L, len(widths)]; estimated divergence, nats per token.
      bits: by projection, [len(widths)]; stored bits of one layer, with all its experts, everything
        counted.
      weights: by projection, weights of one layer, with all its experts.
    """

    widths: tuple[int, ...]
    errors: dict[str, np.ndarray]
    bits: dict[str, np.ndarray]
    weights: dict[str, int]


@partial(jax.jit, static_argnames="config")
def sensitivities(
    params: Params, tokens: Int[Array, " T"], key: Array, *, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, Array]]:
    """The input of every projection at every token, and the likelihood's gradient at its output.

    Args:
      params: a dense tree.
      tokens: of one window.
      key: draws the label of each position from the model's own prediction.
      config: the model's.

    Returns:
      ({site: inputs}, {projection: gradient of the labels' summed log-likelihood}), float32,
      stacked over the layers: [L, T, d_in] and [L, T, d_out]; of experts `Routed` rows and
      [L, N, R, d_out].
    """
    batch = tokens[None]
    cache = empty_cache(config, 1, len(tokens), activation_dtype(params))

    def read(project: Callable[..., Any], per_layer: Any = None) -> tuple[Array, dict[str, Any]]:
        hidden, _, kept = forward(
            config, params, batch, jnp.ones(batch.shape, bool), cache,
            project=project, per_layer=per_layer,
        )  # fmt: skip
        return hidden[0], kept

    def outputs(site: str, x: Any, weights: dict[str, Params]) -> tuple[dict, dict]:
        ys = plain(site, x, weights)[0]
        return ys, ys

    # An output's gradient is that of zeros added to it.
    shapes = jax.eval_shape(lambda: read(outputs)[1])
    probes = {
        name: jnp.zeros(y.shape, jnp.float32) for ys in shapes.values() for name, y in ys.items()
    }

    def project(
        site: str, x: Any, weights: dict[str, Params], at: dict[str, Array]
    ) -> tuple[dict[str, Array], Any]:
        # What the gradient needs of the weights would be a copy of them: it reads them again.
        ys = jax.checkpoint(lambda x: plain(site, x, weights)[0])(x)
        ys = {n: y + at[n].astype(y.dtype) for n, y in ys.items()}
        if isinstance(x, Routed):
            return ys, dataclasses.replace(x, rows=x.rows.astype(jnp.float32))
        return ys, x[0].astype(jnp.float32)

    def likelihood(probes: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
        hidden, seen = read(project, probes)
        return _drawn(config, params, hidden, key), seen

    gradient, seen = jax.grad(likelihood, has_aux=True)(probes)
    return seen, {n: g if isinstance(seen[SITE_OF[n]], Routed) else g[:, 0]
                  for n, g in gradient.items()}  # fmt: skip


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


@partial(jax.jit, static_argnames=("name", "recipe", "scored"))
def _errors(
    stack: Float[Array, "L *E d_in d_out"], moments: Moments | None, low_rank: LowRank | None,
    inputs: Any, gradient: Array, *, name: str, recipe: Recipe, scored: tuple[int, int],
) -> tuple[Float[Array, " L"], QuantizedLinear]:  # fmt: skip
    """Divergence that rounding one projection costs in every layer, and the packed weight."""

    def one(at: tuple) -> tuple[Array, QuantizedLinear]:
        layer, seen, factors, x, g = at
        experts = n_experts(x)

        def of(
            expert: Array | None, own: Array | None, mine: tuple, stack: Array
        ) -> tuple[Array, QuantizedLinear]:
            seen, factors = mine
            made = quantize_layer(
                {name: stack}, seen, recipe, {} if factors is None else {name: factors},
                layer=layer, expert=own,
            )[1][name]  # fmt: skip
            at = layer if own is None else layer * stack.shape[1] + own
            w = Stacked(stack.reshape(-1, *stack.shape[-2:]), at).kernel.astype(jnp.float32)
            return _change(x, g, w - dense_weight(made), expert, scored), made

        change, made = for_own_experts(of, (seen, factors), stack, experts)
        total = change if experts is None else jnp.sum(change, axis=0)
        return 0.5 * jnp.mean(jnp.square(total)), made

    layers = jnp.arange(len(stack), dtype=jnp.int32)
    return jax.lax.map(one, (layers, moments, low_rank, inputs, gradient))


def _change(
    x: Any, gradient: Array, off: Float[Array, "d_in d_out"], expert: Array | None,
    scored: tuple[int, int],
) -> Float[Array, " S"]:  # fmt: skip
    """g·δ at the scored tokens, from the first to before the last, if a weight is off by this."""
    first, last = scored

    def of(rows: Array, g: Array) -> Array:
        return jnp.sum(jnp.matmul(rows, off, precision="highest") * g, axis=1)

    if not isinstance(x, Routed):
        return of(x[first:last], gradient[first:last])
    assert expert is not None, "sorted activations are one expert's or another's"

    def add(block: Array, total: Array) -> Array:
        return total.at[x.token[block]].add(of(x.rows[block], gradient[block]), mode="drop")

    nothing = jnp.zeros(last, jnp.float32)
    return jax.lax.fori_loop(x.first[expert], x.first[expert + 1], add, nothing)[first:]


@partial(jax.jit, static_argnames="source")
def _blended(
    seen: dict[str, Moments], prior: dict[str, Moments], source: Source
) -> dict[str, Moments]:
    """A prompt's moments and the prior's, stacked over the layers."""
    return {site: blend_all(moments, prior.get(site), source) for site, moments in seen.items()}


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
      ConfigError: no window, P outside its range, or a recipe that selects no projection.
      NotFiniteError: an error is infinite or NaN.
      ValueError: `offline` has no prior for experts.
    """
    check_prior(config, recipe, offline)
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
            prompt = put(window[None, :prompt_tokens])
            seen = observe_tokens(params, prompt, config=config, reads=recipe.reads)
            moments = _blended(seen, moments, recipe.source)
        key = put(make_key(i, FIXED))
        inputs, gradient = sensitivities(params, put(window), key, config=config)
        for name, stack in dense.items():
            for j, width in enumerate(widths):
                grid = dataclasses.replace(recipe.grid, bits=width)
                uniform = dataclasses.replace(recipe, grid=grid, widths=(), select="layers/.*")
                error, made = _errors(
                    stack, moments.get(SITE_OF[name]), offline.low_rank.get(name),
                    inputs[SITE_OF[name]], gradient[name],
                    name=name, recipe=uniform, scored=(prompt_tokens, len(window)),
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
