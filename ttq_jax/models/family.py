"""What defines a model family: how its settings are read, and the names of its weights.

All families share one parameter tree (`decoder.init_params`). A family maps the *modules* of that
tree to the checkpoint's names; which leaves a module has follows from the config.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ttq_jax.config import ConfigError, ModelConfig, Rope
from ttq_jax.errors import shown
from ttq_jax.foreign import named

_REQUIRED: Any = object()

# What float32 holds at full precision.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
# Lists are made of that many before the weights, which tell the true number, are looked at.
_MOST_LAYERS = 10_000

# What is done to a tensor's rows on the way in: undo llama.cpp's reordering of the rotated
# channels; undo its +1 on Gemma's norms; leave out OPT's two unused leading positions.
Edit = Literal["unpermute", "minus_one", "skip_two_rows"]


class Settings:
    """A checkpoint's settings; one that is neither read nor ignored on purpose is an error.

    A setting that the model code does not know may change the model's mathematics, and a wrong
    model still produces fluent text. So nothing is skipped silently.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        """Wraps settings.

        Args:
          values: name to value, as in config.json or a GGUF header.
          prefix: put before each name in messages.
        """
        self._values = dict(values)
        self._prefix = prefix
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether a setting is there and null, which in some places is not the same as absent."""
        return name in self._values and self._values[name] is None

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a setting; a null counts as absent.

        Args:
          name: of the setting.
          default: what absence means; without it absence is an error.

        Returns:
          The value.

        Raises:
          ConfigError: the setting is absent and has no default.
        """
        self._read.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ConfigError(f"expected the key {self._prefix + name!r}, found none; add it")
        return default

    def _typed(self, name: str, default: Any, fits: Callable[[Any], bool], what: str) -> Any:
        """`take`, with the value (not the default) checked.

        Raises:
          ConfigError: it is absent without default, or does not fit.
        """
        value = self.take(name, default)
        if name in self and not fits(value):
            raise ConfigError(f"{self._prefix + name}: expected {what}, got {shown(value)}")
        return value

    def integer(
        self, name: str, default: Any = _REQUIRED, least: int = 1, most: int = 2**31 - 1
    ) -> Any:
        """An integer from `least` to `most`. Other arguments as for `take`."""
        fits = lambda v: type(v) is int and least <= v <= most  # noqa: E731
        return self._typed(name, default, fits, f"an integer from {least} to {most}")

    def layers(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number of layers. Arguments as for `take`."""
        return self.integer(name, default, most=_MOST_LAYERS)

    def number(self, name: str, default: Any = _REQUIRED, zero: bool = False) -> Any:
        """A number above 0 that float32 holds, or 0 if `zero`. Other arguments as for `take`."""

        def fits(v: Any) -> bool:
            return type(v) in {int, float} and (_SMALLEST <= v <= _LARGEST or (zero and v == 0))

        value = self._typed(name, default, fits, "a number above 0 that float32 holds")
        return float(value) if name in self else value

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Arguments as for `take`."""
        return self._typed(name, default, lambda v: isinstance(v, bool), "true or false")

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty where there is none. Arguments as for `take`."""
        return self._typed(name, {}, lambda v: isinstance(v, dict), "an object")

    def ignore(self, *names: str) -> None:
        """Ignores settings that do not change inference."""
        self._read.update(names)

    def ignore_prefix(self, *prefixes: str) -> None:
        """Ignores all settings whose names start with one of these."""
        self._read.update(n for n in self._values if n.startswith(prefixes))

    def require(self, name: str, *allowed: Any) -> None:
        """Accepts a setting only at the values that the model code implements.

        Args:
          name: of the setting; absent or null is accepted.
          *allowed: the values.

        Raises:
          ConfigError: another value.
        """
        value = self.take(name, None)
        # An array of a GGUF header has no truth value when it is compared.
        plain = isinstance(value, bool | int | float | str | list | dict)
        if value is not None and not (plain and value in allowed):
            raise ConfigError(
                f"{self._prefix + name} = {shown(value)} is not implemented; expected "
                f"{' or '.join(map(repr, allowed)) or 'no such key'}. Use a checkpoint without it"
            )

    def finish(self) -> None:
        """Checks that every setting was read or ignored.

        Raises:
          ConfigError: naming the ones that were not.
        """
        unread = sorted(self._prefix + n for n in set(self._values) - self._read)
        if unread:
            raise ConfigError(
                f"unknown key{'s' if len(unread) > 1 else ''} {named(unread)}: the model code "
                "neither uses nor knowingly ignores it, so its results might be wrong. If it does "
                "not change inference, remove it from the configuration or report it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: its settings and the names of its weights.

    Module names map a dotted path of the parameter tree ("embed", "layers.q", …) to the
    checkpoint's; "{i}" stands for the layer, "{e}" for the expert.

    Attributes:
      name: as in `ModelConfig.family`.
      hf_types: values of config.json's `model_type`.
      hf_config: reads config.json.
      hf_modules: names in safetensors files, without prefix.
      hf_prefixes: prefixes that the names may have; the first that matches is used.
      hf_heads: full names of the head; not loaded where it is tied to the embedding.
      hf_ignored: patterns (fnmatch) of tensors that are left out on purpose.
      hf_edits: module to edit.
      gguf_arch: value of a GGUF's `general.architecture`, or None where llama.cpp has none.
      gguf_config: reads a GGUF header, given the vocabulary size and whether the head is tied.
      gguf_modules: names in GGUF files.
      gguf_edits: module to edit.
    """

    name: str
    hf_types: tuple[str, ...]
    hf_config: Callable[[Settings], ModelConfig]
    hf_modules: Mapping[str, str]
    hf_prefixes: tuple[str, ...] = ("model.", "")
    hf_heads: tuple[str, ...] = ("lm_head",)
    # Old Llama files hold the rotation's frequencies, which follow from the config.
    hf_ignored: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    hf_edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)
    gguf_arch: str | None = None
    gguf_config: Callable[[Settings, int, bool], ModelConfig] | None = None
    gguf_modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_edits: Mapping[str, Edit] = dataclasses.field(default_factory=dict)


HF_MODULES = {
    "embed": "embed_tokens",
    "final_norm": "norm",
    "layers.attn_norm": "layers.{i}.input_layernorm",
    "layers.mlp_norm": "layers.{i}.post_attention_layernorm",
    "layers.q": "layers.{i}.self_attn.q_proj",
    "layers.k": "layers.{i}.self_attn.k_proj",
    "layers.v": "layers.{i}.self_attn.v_proj",
    "layers.o": "layers.{i}.self_attn.o_proj",
    "layers.q_norm": "layers.{i}.self_attn.q_norm",
    "layers.k_norm": "layers.{i}.self_attn.k_norm",
    "layers.gate": "layers.{i}.mlp.gate_proj",
    "layers.up": "layers.{i}.mlp.up_proj",
    "layers.down": "layers.{i}.mlp.down_proj",
}

GGUF_MODULES = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "head": "output",
    "layers.attn_norm": "blk.{i}.attn_norm",
    "layers.mlp_norm": "blk.{i}.ffn_norm",
    "layers.q": "blk.{i}.attn_q",
    "layers.k": "blk.{i}.attn_k",
    "layers.v": "blk.{i}.attn_v",
    "layers.o": "blk.{i}.attn_output",
    "layers.q_norm": "blk.{i}.attn_q_norm",
    "layers.k_norm": "blk.{i}.attn_k_norm",
    "layers.gate": "blk.{i}.ffn_gate",
    "layers.up": "blk.{i}.ffn_up",
    "layers.down": "blk.{i}.ffn_down",
}

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh", "relu"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def activation(settings: Settings, key: str, default: str) -> Any:
    """The activation that a config.json names.

    Args:
      settings: config.json.
      key: its key.
      default: the name to use where the key is absent, as config.json spells it.

    Returns:
      The name in `layers.ACTIVATIONS`.

    Raises:
      ConfigError: an activation that is not implemented.
    """
    name = settings.take(key, default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ConfigError(f"{key}: expected one of {sorted(_ACTIVATIONS)}, got {shown(name)}")
    return _ACTIVATIONS[name]


def head_width(width: int, heads: int) -> int:
    """Channels per head of a model that does not say it.

    Args:
      width: of the model.
      heads: how many.

    Returns:
      Their quotient, rounded down.

    Raises:
      ConfigError: there are more heads than channels.
    """
    if heads > width:
        raise ConfigError(f"expected at least as many channels as heads, got {width} and {heads}")
    return width // heads


def ignore_common(settings: Settings) -> None:
    """Ignores keys that any config.json may have and that do not change inference.

    Args:
      settings: config.json, whose unknown-key check this prepares.

    Raises:
      ConfigError: one of these keys has a value that does change the model.
    """
    settings.ignore(
        "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map",
        "use_cache", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id",
        "pad_token_id", "sep_token_id", "unk_token_id", "tokenizer_class", "prefix",
        "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
        "id2label", "label2id", "num_labels", "problem_type", "task_specific_params",
        "torchscript", "name_or_path", "is_llama_config", "transformers.js_config",
        "gradient_checkpointing", "cache_implementation", "finetuning_task", "is_decoder",
        "tf_legacy_loss",
        # Old configs carry the defaults of text generation.
        "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "temperature",
        "num_beam_groups", "diversity_penalty", "top_k", "top_p", "typical_p",
        "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
        "encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores",
        "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "decoder_start_token_id",
    )  # fmt: skip
    settings.ignore("_name_or_path", "_attn_implementation", "_attn_implementation_autoset")
    for key in ("is_encoder_decoder", "add_cross_attention", "rope_interleaved", "use_bfloat16",
                "tie_encoder_decoder", "cross_attention_hidden_size", "pruned_heads"):  # fmt: skip
        settings.require(key, False, {})
    settings.require("pretraining_tp", 1)
    settings.require("partial_rotary_factor", 1, 1.0)
    settings.require("quantization_config")


def make_rope(values: Mapping[str, Any], default_theta: float | None = None) -> Rope:
    """A rotation from one `rope_scaling` or `rope_parameters` entry.

    Args:
      values: the entry, with its `rope_theta`.
      default_theta: used where the entry has none.

    Returns:
      The rotation.

    Raises:
      ConfigError: a kind of scaling that is not implemented, or an unknown key in it.
    """
    s = Settings(values, "rope parameters: ")
    theta = s.number("rope_theta", default_theta)
    old = s.take("type", "default")
    kind = s.take("rope_type", old)
    s.require("partial_rotary_factor", 1, 1.0)
    if theta is None:
        raise ConfigError("expected a rope_theta, found none; add it")
    if kind == "default":
        s.ignore("factor", "original_max_position_embeddings")
        rope = Rope(theta=theta)
    elif kind == "linear":
        s.ignore("original_max_position_embeddings")
        rope = Rope(theta=theta, scaling="linear", factor=s.number("factor"))
    elif kind == "llama3":
        rope = Rope(
            theta=theta,
            scaling="llama3",
            factor=s.number("factor"),
            low_freq_factor=s.number("low_freq_factor"),
            high_freq_factor=s.number("high_freq_factor"),
            original_positions=s.number("original_max_position_embeddings"),
        )
    else:
        raise ConfigError(
            f"rope scaling {shown(kind)} is not implemented; expected default, linear or llama3. "
            "Use a checkpoint without it"
        )
    s.finish()
    return rope


def hf_rope(settings: Settings, default_theta: float = 10000.0) -> Rope:
    """The rotation of a model with one kind of layer, from old or new config.json keys.

    Args:
      settings: config.json.
      default_theta: used where none is given.

    Returns:
      The rotation.
    """
    new, old = settings.mapping("rope_parameters"), settings.mapping("rope_scaling")
    return make_rope({**old, **new}, settings.number("rope_theta", default_theta))


def gguf_rope(settings: Settings, arch: str, default_theta: float = 10000.0) -> Rope:
    """The rotation of a GGUF model's full-attention layers.

    Args:
      settings: the GGUF header.
      arch: prefix of its keys.
      default_theta: used where none is given.

    Returns:
      The rotation.

    Raises:
      ConfigError: a kind of scaling that is not implemented.
    """
    theta = settings.number(f"{arch}.rope.freq_base", default_theta)
    kind = settings.take(f"{arch}.rope.scaling.type", "none")
    # llama.cpp writes 0 for none.
    factor = settings.number(f"{arch}.rope.scaling.factor", None, zero=True)
    older = settings.number(f"{arch}.rope.scale_linear", 1.0, zero=True)
    factor = older if factor is None else factor
    settings.ignore(f"{arch}.rope.scaling.original_context_length")
    settings.ignore(f"{arch}.rope.scaling.finetuned")
    if not isinstance(kind, str) or kind not in {"none", "linear"}:
        raise ConfigError(
            f"{arch}.rope.scaling.type = {shown(kind)} is not implemented; expected none or "
            "linear. Use a checkpoint without it"
        )
    if kind == "none" or factor in (0, 1):
        return Rope(theta=theta)
    return Rope(theta=theta, scaling="linear", factor=factor)
