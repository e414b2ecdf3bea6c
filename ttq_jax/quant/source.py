"""The source of the moments: none, a corpus, the prompt, a blend with a prior, a conversation.

Moments are sums over tokens, so every one of these is a weighted sum. A prior worth n tokens is a
prior scaled to count n; with n = 0 a blend is TTQ (arXiv:2603.19296), with n = ∞ it is AWQ (Lin et
al., 2023). A short prompt needs a prior: 16 tokens say little about a channel.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ttq_jax.config import ConfigError
from ttq_jax.errors import check_fields, shown
from ttq_jax.types import Moments

_OF = ("none", "corpus", "prompt")
_PRIORS = ("none", "corpus", "weights", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Whose activation moments a recipe uses.

    Attributes:
      of: "none", "corpus" (a calibration corpus, read before any prompt) or "prompt".
      prior: what a prompt's moments are blended with: "none", "corpus", or without any data
        "weights" (estimated from the model's norms and weights) or "samples" (of text that the
        model writes itself, once per model).
      prior_tokens: n >= 0; the prior counts like n tokens of the prompt; inf: the prior alone.
      decay: the weight of a conversation's earlier turns at the next turn, in [0, 1]; with 0 every
        prompt starts from nothing.
      refresh: n >= 0; after every n generated tokens their moments are added and the weights are
        quantized again; 0 for never.

    Raises:
      ConfigError: a value outside its range, or one that only a prompt's moments have.
    """

    of: str = "prompt"
    prior: str = "none"
    prior_tokens: float = 0.0
    decay: float = 0.0
    refresh: int = 0

    def __post_init__(self):
        check_fields(self, ConfigError)
        for name, allowed in (("of", _OF), ("prior", _PRIORS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"moments.{name}: expected one of {', '.join(allowed)}, "
                    f"got {shown(getattr(self, name))}"
                )
        if not self.prior_tokens >= 0 or not 0 <= self.decay <= 1 or self.refresh < 0:
            raise ConfigError(
                "moments: expected prior_tokens >= 0, 0 <= decay <= 1, refresh >= 0; got "
                f"prior_tokens={self.prior_tokens}, decay={self.decay}, refresh={self.refresh}"
            )
        if (self.prior == "none") != (self.prior_tokens == 0):
            raise ConfigError(
                "moments: expected a prior with prior_tokens above 0, or neither of them, got "
                f"prior={self.prior!r} and prior_tokens={self.prior_tokens}"
            )
        of_prompt = (self.prior_tokens, self.decay, self.refresh)
        if self.of != "prompt" and any(of_prompt):
            raise ConfigError(
                "moments: prior, decay and refresh need moments of the prompt, got "
                f"of={self.of!r}; set moments.of to 'prompt'"
            )

    @property
    def reads_corpus(self) -> bool:
        """Whether a calibration corpus is needed."""
        return "corpus" in {self.of, self.prior}

    @property
    def keeps(self) -> bool:
        """Whether the moments are needed after the prompt was read."""
        return self.decay > 0 or self.refresh > 0


def blend(seen: Moments, prior: Moments | None, source: Source) -> Moments:
    """A prompt's moments and the prior's together.

    Args:
      seen: the prompt's.
      prior: a corpus's, with its count; or a profile estimated from the weights, which has no unit
        and is scaled to the prompt's mean power. None without a prior.
      source: says how many tokens the prior counts for.

    Returns:
      Moments of `seen.count + n` tokens, or the prior's alone for n = ∞.
    """
    if prior is None or source.prior == "none":
        return seen
    if source.prior == "corpus" and math.isinf(source.prior_tokens):
        return prior
    one = prior.scaled(1.0 / jnp.maximum(prior.count, 1.0))
    if source.prior == "weights":
        one = _to_the_power_of(_in_blocks_of(one, seen), seen)
    if math.isinf(source.prior_tokens):
        return one
    return seen + one.scaled(source.prior_tokens)


def blend_expert(seen: Moments, prior: Moments | None, source: Source) -> Moments:
    """`blend` of one expert, which no token may have reached.

    Args:
      seen: the prompt's.
      prior: see `blend`; with a recipe that has none, a profile from the weights. None if the
        recipe reads nothing.
      source: see `blend`.

    Returns:
      Moments; without a token, the prior's.
    """
    if prior is not None and source.prior == "none":
        return seen_or(seen, prior)
    return blend(seen, prior, source)


def blend_all(seen: Moments, prior: Moments | None, source: Source) -> Moments:
    """`blend` of every layer, and of every expert of it.

    Args:
      seen: stacked over the layers, and the experts where there are any.
      prior: likewise.
      source: see `blend`.

    Returns:
      Moments stacked likewise.
    """
    of_one: Callable[..., Moments] = blend if seen.count.ndim == 1 else blend_expert
    mix = jax.vmap(lambda s, p: of_one(s, p, source))
    return mix(seen, prior) if seen.count.ndim == 1 else jax.vmap(mix)(seen, prior)


def seen_or(seen: Moments, profile: Moments) -> Moments:
    """The moments of what was observed; where that was nothing, the profile.

    Args:
      seen: of one layer, or one expert.
      profile: estimated from the weights.

    Returns:
      One of the two.
    """
    other = _in_blocks_of(profile, seen)
    return jax.tree.map(lambda a, b: jnp.where(seen.count > 0, a, b), seen, other)


def _in_blocks_of(profile: Moments, seen: Moments) -> Moments:
    """The profile with its diagonal, kept as blocks of one channel, in the prompt's Gram blocks."""
    if profile.gram is None:
        return profile
    n_block, block = seen.gram.shape[:2]
    diagonal = jnp.pad(profile.gram[:, 0, 0], (0, n_block * block - len(profile.gram)))
    gram = jax.vmap(jnp.diag)(diagonal.reshape(n_block, block))
    return dataclasses.replace(profile, gram=gram)


def _to_the_power_of(profile: Moments, seen: Moments) -> Moments:
    """The profile in the prompt's unit: the same mean of each power over the channels.

    An expert without tokens has no unit, and keeps the profile's.
    """
    per_token = seen.scaled(1.0 / jnp.maximum(seen.count, 1.0))
    have = jnp.mean(profile.sums, axis=1)
    factor = jnp.where(have > 0, jnp.mean(per_token.sums, axis=1) / jnp.where(have > 0, have, 1), 0)
    factor = jnp.where(seen.count > 0, factor, 1)
    gram = profile.gram
    if gram is not None:
        trace = jnp.trace(gram, axis1=1, axis2=2).sum()
        ours = jnp.trace(per_token.gram, axis1=1, axis2=2).sum()
        ratio = jnp.where(trace > 0, ours / jnp.where(trace > 0, trace, 1.0), 0.0)
        gram = gram * jnp.where(seen.count > 0, ratio, 1.0)
    return dataclasses.replace(profile, sums=profile.sums * factor[:, None], gram=gram)
