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

    Attributes:
      theta: base of the geometric progression of wavelengths, > 1.
      scaling: "none"; "linear" (all frequencies divided by `factor`); "llama3" (low frequencies
        divided by `factor`, high ones kept, a linear blend in between).
      factor: the divisor, >= 1.
      low_freq_factor: llama3: wavelengths above `original_positions / low_freq_factor` are low.
      high_freq_factor: llama3: wavelengths below `original_positions / high_freq_factor` are high.
      original_positions: llama3: context length of the pre-training before the extension, tokens.
    """

    theta: float
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

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

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Angular frequency of each pair of channels.

        Args:
          head_dim: channels per head, even.

        Returns:
          float32[head_dim / 2], radians per token.
        """
        freq = self.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.scaling == "linear":
            freq = freq / self.factor
        elif self.scaling == "llama3":
            wavelength = 2 * np.pi / freq
            low = self.original_positions / self.low_freq_factor
            high = self.original_positions / self.high_freq_factor
            blend = (self.original_positions / wavelength - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            mixed = (1 - blend) * freq / self.factor + blend * freq
            freq = np.where(
                wavelength > low, freq / self.factor, np.where(wavelength < high, freq, mixed)
            )
        return freq.astype(np.float32)


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
                "sliding_window: layers with sliding attention need a window of at least 1 token, "
                f"got {self.sliding_window}"
            )
