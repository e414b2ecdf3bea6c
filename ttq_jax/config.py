"""The configuration of a model: one frozen dataclass for every family.

A family (Llama, Qwen3, Gemma3, …) is a preset of these fields plus a checkpoint key map; the
mathematics is in `models.decoder` once.
"""

import dataclasses
from typing import Any, Literal

import numpy as np

from ttq_jax.errors import Error


class ConfigError(Error):
    """A configuration that cannot be used; the message says what to change."""


def _added(default: Any) -> Any:
    """A field that later versions added: at its default it says nothing, see `identity`."""
    return dataclasses.field(default=default, metadata={"added": True})


def identity(config: Any) -> dict[str, Any]:
    """What tells a config from another, the same in every version of this package.

    Args:
      config: a `ModelConfig`, or a `Rope` in it.

    Returns:
      Field to value; without the fields that were added later and are at their default.
    """
    return {
        f.name: identity(value) if dataclasses.is_dataclass(value) else value
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default or "added" not in f.metadata
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al., 2021): the frequencies of one kind of layer.

    Where the scaling is "dynamic" or "longrope", the frequencies follow from how many tokens a text
    has so far, with those that are being read. Each row of a batch has its own, and cached keys are
    turned by the same ones as the queries that meet them. A text that is read in one piece gives
    what transformers gives. Otherwise transformers differs: a batch's longest row decides for all,
    cached keys stay as they were turned, and dynamic scaling remembers the longest text of before.

    Attributes:
      theta: base of the geometric progression of wavelengths, > 1.
      scaling: "none"; "linear" (all frequencies divided by `factor`); "llama3" (low frequencies
        divided by `factor`, high ones kept, a linear blend in between); "yarn" (Peng et al., 2023:
        the same, with a blend over the channels); "dynamic" (a larger theta for texts beyond
        `original_positions`); "longrope" (Ding et al., 2024: divided by `short_factors`, for texts
        beyond `original_positions` by `long_factors`).
      factor: the divisor, >= 1.
      low_freq_factor: llama3: wavelengths above `original_positions / low_freq_factor` are low.
      high_freq_factor: llama3: wavelengths below `original_positions / high_freq_factor` are high.
      original_positions: context length of the pre-training before the extension, tokens.
      beta_fast: yarn: channels that turn more often than this within `original_positions` are kept.
      beta_slow: yarn: those that turn less often are divided by `factor`.
      truncate: yarn: the ends of the blend are rounded to whole channels.
      short_factors: longrope: a divisor for each pair of channels.
      long_factors: longrope: the same, for long texts.
      attention_factor: on the rotated channels of queries and keys.
      partial: the share of a head's channels that rotates, the first ones; above 0, up to 1.
    """

    theta: float
    scaling: Literal["none", "linear", "llama3", "yarn", "dynamic", "longrope"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: float = 8192
    beta_fast: float = _added(32.0)
    beta_slow: float = _added(1.0)
    truncate: bool = _added(True)
    short_factors: tuple[float, ...] = _added(())
    long_factors: tuple[float, ...] = _added(())
    attention_factor: float = _added(1.0)
    partial: float = _added(1.0)

    def __post_init__(self):
        if self.theta <= 1 or self.factor < 1:
            raise ConfigError(
                f"rope: expected theta > 1 and factor >= 1, got theta={self.theta}, "
                f"factor={self.factor}; correct the model's config.json"
            )
        if self.scaling == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(
                f"rope: expected 0 < low_freq_factor < high_freq_factor, got {self.low_freq_factor}"
                f" and {self.high_freq_factor}; correct the model's config.json"
            )
        if not 0 < self.partial <= 1:
            raise ConfigError(
                f"rope: expected partial_rotary_factor above 0 and up to 1, got {self.partial}"
            )

    @property
    def grows(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.scaling in {"dynamic", "longrope"}

    @property
    def reach(self) -> int:
        """How many tokens the scaling is made for, 0 where the model's own context says it."""
        stretches = self.scaling in {"dynamic", "yarn"}
        return int(self.original_positions * self.factor) if stretches else 0

    def channels(self, head_dim: int) -> int:
        """How many channels of a head rotate.

        Args:
          head_dim: channels per head.

        Returns:
          An even number of them.

        Raises:
          ConfigError: they do not come in pairs, or there are more or fewer factors than pairs.
        """
        count = int(head_dim * self.partial)
        if count < 2 or count % 2 or (self.scaling == "dynamic" and count == 2):
            raise ConfigError(
                f"rope needs an even number of channels that rotate, got {count} of a head's "
                f"{head_dim} (head_dim, partial_rotary_factor)"
            )
        for name in ("short_factors", "long_factors") if self.scaling == "longrope" else ():
            if len(getattr(self, name)) != count // 2:
                raise ConfigError(
                    f"rope: expected {count // 2} {name.removesuffix('s')} numbers, one for each "
                    f"pair of channels that rotate, got {len(getattr(self, name))}"
                )
        return count

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Angular frequency of each pair of channels, for texts within the original context.

        Args:
          head_dim: channels per head.

        Returns:
          float32[R / 2], radians per token, of the R channels that rotate.
        """
        count = self.channels(head_dim)
        freq = self.theta ** -(np.arange(0, count, 2, dtype=np.float64) / count)
        if self.scaling == "linear":
            freq = freq / self.factor
        elif self.scaling == "llama3":
            freq = self._blended_by_wavelength(freq)
        elif self.scaling == "yarn":
            freq = self._blended_by_channel(freq)
        elif self.scaling == "longrope":
            freq = freq / np.array(self.short_factors)
        return freq.astype(np.float32)

    def _blended_by_wavelength(self, freq: np.ndarray) -> np.ndarray:
        """Llama 3's scaling."""
        wavelength = 2 * np.pi / freq
        low = self.original_positions / self.low_freq_factor
        high = self.original_positions / self.high_freq_factor
        blend = (self.original_positions / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        mixed = (1 - blend) * freq / self.factor + blend * freq
        return np.where(
            wavelength > low, freq / self.factor, np.where(wavelength < high, freq, mixed)
        )

    def _blended_by_channel(self, freq: np.ndarray) -> np.ndarray:
        """YaRN's scaling."""
        count = 2 * len(freq)

        def channel(turns: float) -> float:
            """The pair of channels that turns that often within the original context."""
            length = self.original_positions / (turns * 2 * np.pi)
            return count * np.log(length) / (2 * np.log(self.theta))

        first, last = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0), min(last, count - 1)
        divided = np.clip((np.arange(len(freq)) - first) / (last - first or 0.001), 0, 1)
        return freq / self.factor * divided + freq * (1 - divided)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      family: name of the preset that made it ("llama", "qwen3", …).
      vocab_size: V.
      d_model: D, width of the residual stream.
      n_layers: L.
      n_heads: N, query heads.
      n_kv_heads: K, key and value heads; divides N.
      head_dim: H.
      d_ff: F, width of the feed-forward layer; of each expert's where there are experts.
      n_experts: E, feed-forward layers that a router chooses from; 0 for one, without a router.
      experts_per_token: how many of them each token runs through.
      norm_topk: whether the router's weights of the chosen ones are made to sum to one.
      max_positions: longest context the model was made for, tokens.
      embed_dim: width of the token embedding; differs from D only in OPT-350M, which projects.
      norm: "rms" (x̂·w), "rms_plus_one" (x̂·(1+w), Gemma) or "layer" (mean and bias, OPT).
      norm_eps: added to the variance.
      norm_placement: "pre"; "post" (after the residual sum, OPT-350M); "branch" (after each
        sublayer, inside the residual branch, OLMo 2); "sandwich" (before each sublayer and there,
        Gemma).
      final_norm: whether a norm precedes the head.
      activation: of the feed-forward layer.
      gated: feed-forward is down(act(gate(x)) * up(x)) rather than down(act(up(x))).
      qkv_bias: biases on q, k, v.
      o_bias: bias on o.
      mlp_bias: biases on the feed-forward projections.
      qk_norm: RMS norm of queries and keys before the rotation (Qwen3, Gemma3, OLMo 2).
      qk_norm_over: "head", each head by itself; "all", the heads of q together, and those of k
        (OLMo 2).
      rope: rotation of the full-attention layers; None means learned positions (OPT).
      rope_local: rotation of the sliding layers; None means `rope`.
      rotated_layers: per layer, whether it rotates at all (SmolLM3); () means that all do.
      sliding_window: a sliding layer's query sees keys less than this many tokens back.
      sliding_layers: per layer, whether its attention slides; () means none does.
      embed_scale: factor on the token embedding.
      residual_scale: factor on what each sublayer adds (Granite).
      logit_divisor: divides the logits (Granite).
      query_scale: factor on the query, usually H ** -0.5.
      tie_embeddings: the head is the transposed token embedding.
      attn_softcap: attention scores become c·tanh(s/c).
      logit_softcap: logits become c·tanh(s/c).

    Raises:
      ConfigError: fields that contradict each other.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    query_scale: float
    embed_dim: int
    n_experts: int = _added(0)
    experts_per_token: int = _added(0)
    norm_topk: bool = _added(False)
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_placement: Literal["pre", "post", "branch", "sandwich"] = "pre"
    final_norm: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: Literal["head", "all"] = _added("head")
    rope: Rope | None = None
    rope_local: Rope | None = None
    rotated_layers: tuple[bool, ...] = _added(())
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    embed_scale: float = 1.0
    residual_scale: float = _added(1.0)
    logit_divisor: float = _added(1.0)
    tie_embeddings: bool = True
    attn_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                     "d_ff", "max_positions", "embed_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_kv_heads must divide n_heads, got {self.n_kv_heads} and {self.n_heads}"
            )
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise ConfigError(
                f"experts_per_token: expected 1 to {self.n_experts}, the number of experts, got "
                f"{self.experts_per_token}"
            )
        if self.rope is not None and self.head_dim % 2:
            raise ConfigError(f"rope needs an even head_dim, got {self.head_dim}")
        for name in ("sliding_layers", "rotated_layers"):
            flags = getattr(self, name)
            if flags and len(flags) != self.n_layers:
                raise ConfigError(
                    f"{name}: expected one entry for each of {self.n_layers} layers, "
                    f"got {len(flags)}"
                )
        if any(self.sliding_layers) and not self.sliding_window:
            raise ConfigError(
                "sliding_window: layers with sliding attention (layer_types) need a window of at "
                f"least 1 token, got {self.sliding_window}, as also where use_sliding_window is off"
            )
        ropes = {r.channels(self.head_dim) for r in (self.rope, self.rope_local) if r is not None}
        if len(ropes) > 1:
            raise ConfigError(
                f"rope: expected as many channels to rotate in all layers, got {sorted(ropes)}"
            )
