"""The settings that most families spell alike, and which of a model's layers slide."""

from collections.abc import Callable, Collection
from typing import Any

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.foreign import named
from ttq_jax.models.family import Settings, activation, gguf_rope, head_width


def hf_sizes(s: Settings, **absent: Any) -> dict[str, Any]:
    """Sizes, norms and activation of a config.json with Llama's names.

    Args:
      s: config.json.
      **absent: what transformers takes for a key that is absent. Without one the key must be there,
        but for `num_key_value_heads` (the number of heads) and `head_dim` (their share of the
        width). `activation` is the activation's key and default, where they are not Llama's.

    Returns:
      Arguments of `ModelConfig`.
    """

    def integer(name: str, read: Callable[..., int] = s.integer) -> int:
        return read(name, absent[name]) if name in absent else read(name)

    width, heads = integer("hidden_size"), integer("num_attention_heads")
    # A null is not absence: there it means one key for each query head.
    kv_heads = heads if s.is_null("num_key_value_heads") else absent.get("num_key_value_heads")
    head_dim = s.integer("head_dim", absent.get("head_dim") or head_width(width, heads))
    return {
        "vocab_size": integer("vocab_size"),
        "d_model": width,
        "embed_dim": width,
        "n_layers": integer("num_hidden_layers", s.layers),
        "n_heads": heads,
        "n_kv_heads": s.integer("num_key_value_heads", kv_heads or heads),
        "head_dim": head_dim,
        "d_ff": integer("intermediate_size"),
        "max_positions": integer("max_position_embeddings"),
        "query_scale": head_dim**-0.5,
        "norm_eps": s.number("rms_norm_eps", absent.get("rms_norm_eps", 1e-6)),
        "activation": activation(s, *absent.get("activation", ("hidden_act", "silu"))),
    }


# Lists are made of that many before the weights, which tell the true number, are looked at.
_MOST_EXPERTS = 4096

_NAMES = ("gate", "up", "down")


def gguf_expert_modules(tensors: Collection[str]) -> dict[str, str]:
    """The names of experts in a GGUF file.

    A tensor holds all experts of a layer; gate and up may share one. Files from before April 2024
    have a tensor for each expert.

    Args:
      tensors: the file's.

    Returns:
      As `Family.gguf_modules`.
    """
    if "blk.0.ffn_gate.0.weight" in tensors:
        named = {n: f"blk.{{i}}.ffn_{n}.{{e}}" for n in _NAMES}
    elif "blk.0.ffn_gate_up_exps.weight" in tensors:
        both = dict.fromkeys(("gate", "up"), "blk.{i}.ffn_gate_up_exps")
        named = both | {"down": "blk.{i}.ffn_down_exps"}
    else:
        named = {n: f"blk.{{i}}.ffn_{n}_exps" for n in _NAMES}
    return {"layers.router": "blk.{i}.ffn_gate_inp"} | {f"layers.{n}": m for n, m in named.items()}


HF_EXPERTS = {
    "layers.router": "layers.{i}.mlp.gate",
    "layers.gate": "layers.{i}.mlp.experts.{e}.gate_proj",
    "layers.up": "layers.{i}.mlp.experts.{e}.up_proj",
    "layers.down": "layers.{i}.mlp.experts.{e}.down_proj",
}


def hf_experts(s: Settings, *, experts: int, per_token: int) -> dict[str, Any]:
    """How many experts a config.json names, under either of its names.

    Args:
      s: config.json.
      experts: what transformers takes for their number where the key is absent.
      per_token: the same for those of each token.

    Returns:
      Arguments of `ModelConfig`.

    Raises:
      ConfigError: the two names disagree.
    """
    # They balance the experts in training, or ask for what is no logit.
    s.ignore("router_aux_loss_coef", "output_router_logits", "router_jitter_noise")
    known = [k for k in ("num_experts", "num_local_experts") if k in s]
    found = {s.integer(name, most=_MOST_EXPERTS) for name in known} or {experts}
    if len(found) > 1:
        raise ConfigError(
            f"num_experts and num_local_experts: expected one number, got {sorted(found)}; "
            "correct the model's config.json"
        )
    s.ignore("num_experts", "num_local_experts")
    count = found.pop()
    return {
        "n_experts": count,
        "experts_per_token": s.integer("num_experts_per_tok", per_token, most=count),
    }


def gguf_experts(s: Settings, arch: str, *, norm_topk: bool) -> dict[str, Any]:
    """How many experts a GGUF header names.

    Args:
      s: the header.
      arch: prefix of its keys.
      norm_topk: whether llama.cpp makes the router's weights sum to one for this architecture.

    Returns:
      Arguments of `ModelConfig`.

    Raises:
      ConfigError: it asks for another kind of router.
    """
    s.require(f"{arch}.expert_weights_norm", norm_topk)
    s.require(f"{arch}.expert_weights_scale", 0.0, 1.0)
    s.require(f"{arch}.expert_shared_count", 0)
    # 1 is the softmax.
    s.require(f"{arch}.expert_gating_func", 0, 1)
    count = s.integer(f"{arch}.expert_count", most=_MOST_EXPERTS)
    return {
        "n_experts": count,
        "experts_per_token": s.integer(f"{arch}.expert_used_count", most=count),
        "norm_topk": norm_topk,
    }


def gguf_sizes(s: Settings, arch: str, head_dim: int | None = None) -> dict[str, Any]:
    """Sizes and norms of a GGUF header.

    Args:
      s: the header.
      arch: prefix of its keys.
      head_dim: channels per head where the header does not say it; None for the heads' share of
        the width.

    Returns:
      Arguments of `ModelConfig`.

    Raises:
      ConfigError: keys and values differ in width.
    """
    width, heads = s.integer(f"{arch}.embedding_length"), s.integer(f"{arch}.attention.head_count")
    head_dim = s.integer(f"{arch}.attention.key_length", head_dim or head_width(width, heads))
    s.require(f"{arch}.attention.value_length", head_dim)
    return {
        "d_model": width,
        "embed_dim": width,
        "n_layers": s.layers(f"{arch}.block_count"),
        "n_heads": heads,
        "n_kv_heads": s.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "d_ff": s.integer(f"{arch}.feed_forward_length"),
        "max_positions": s.integer(f"{arch}.context_length"),
        "query_scale": head_dim**-0.5,
        "norm_eps": s.number(f"{arch}.attention.layer_norm_rms_epsilon"),
    }


def gguf_model(
    s: Settings, vocab_size: int, tied: bool, *, arch: str, theta: float = 10000.0,
    norm_topk: bool | None = None, **fields: Any,
) -> ModelConfig:  # fmt: skip
    """The model of a GGUF header that says sizes, a rotation and experts, and nothing more.

    Args:
      s: the header.
      vocab_size: rows of the embedding.
      tied: whether the file has no head of its own.
      arch: prefix of its keys, and name of the family.
      theta: of the rotation where the header does not say it.
      norm_topk: of a mixture of experts, see `gguf_experts`; None for a model without them.
      **fields: what the header does not say.

    Returns:
      Its config; biases are switched on by the loader where the file has them.
    """
    sizes = gguf_sizes(s, arch)
    s.require(f"{arch}.rope.dimension_count", sizes["head_dim"])
    if norm_topk is not None:
        sizes["d_ff"] = s.integer(f"{arch}.expert_feed_forward_length", sizes["d_ff"])
        sizes |= gguf_experts(s, arch, norm_topk=norm_topk)
    known: dict[str, Any] = {
        "family": arch,
        "vocab_size": vocab_size,
        "tie_embeddings": tied,
    } | sizes
    return ModelConfig(**(known | {"rope": gguf_rope(s, arch, theta)} | fields))


def every(pattern: int, n_layers: int) -> tuple[bool, ...]:
    """Flags of which every `pattern`-th is off, from the layer `pattern - 1` on.

    Args:
      pattern: at least 1.
      n_layers: how many flags.

    Returns:
      The flags; () if none is on.
    """
    flags = tuple(bool((i + 1) % pattern) for i in range(n_layers))
    return flags if any(flags) else ()


def sliding_layers(types: Any, n_layers: int) -> tuple[bool, ...]:
    """Reads config.json's `layer_types`.

    Args:
      types: per layer, "full_attention" or "sliding_attention".
      n_layers: how many there must be.

    Returns:
      Per layer, whether its attention slides; () if none does.

    Raises:
      ConfigError: another kind of layer, or another number of them.
    """
    if not isinstance(types, list) or len(types) != n_layers:
        raise ConfigError(f"layer_types: expected a list of {n_layers} entries, got {shown(types)}")
    known = {"full_attention": False, "sliding_attention": True}
    other = sorted({str(t) for t in types} - set(known))
    if other:
        raise ConfigError(f"layer_types: expected {' or '.join(known)}, got {named(other)}")
    flags = tuple(known[t] for t in types)
    return flags if any(flags) else ()


def everywhere(window: int | None, n_layers: int) -> dict[str, Any]:
    """Arguments of `ModelConfig` for one window in all layers; None for no window."""
    return {"sliding_window": window, "sliding_layers": (True,) * n_layers if window else ()}


def qwen_window(s: Settings, n_layers: int) -> dict[str, Any]:
    """Qwen's window: in the last layers, behind a switch.

    Args:
      s: config.json.
      n_layers: of the model.

    Returns:
      Arguments of `ModelConfig`.
    """
    absent = None if s.is_null("sliding_window") else 4096
    window, first = s.integer("sliding_window", absent), s.integer("max_window_layers", 28, 0)
    types = s.take("layer_types", None)
    if not s.flag("use_sliding_window", False):
        window = None
    if types is not None:
        sliding = sliding_layers(types, n_layers)
    else:
        sliding = tuple(window is not None and i >= first for i in range(n_layers))
    return {"sliding_window": window, "sliding_layers": sliding if any(sliding) else ()}
