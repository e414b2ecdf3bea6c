"""The rotation that a configuration describes, in config.json's old and new keys and in a GGUF's.

config.json spells it twice: `rope_theta` and `rope_scaling` (old), `rope_parameters` (new). Both
may be there if they mean the same.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ttq_jax.config import ConfigError, ModelConfig, Rope
from ttq_jax.errors import shown
from ttq_jax.models.settings import Settings, disagree

# Old names of two kinds; of several position ids per token, a text has equal ones.
_OLD_KINDS = {"su": "longrope", "mrope": "default"}
_ORIGINAL = "original_max_position_embeddings"


def _default(s: Settings, positions: int | float | None) -> dict[str, Any]:
    del positions
    s.ignore("factor", _ORIGINAL)
    return {}


def _linear(s: Settings, positions: int | float | None) -> dict[str, Any]:
    del positions
    s.ignore(_ORIGINAL)
    return {"scaling": "linear", "factor": s.number("factor")}


def _llama3(s: Settings, positions: int | float | None) -> dict[str, Any]:
    return {
        "scaling": "llama3", "factor": s.number("factor"),
        "low_freq_factor": s.number("low_freq_factor"),
        "high_freq_factor": s.number("high_freq_factor"),
        "original_positions": _original(s, positions),
    }  # fmt: skip


def _dynamic(s: Settings, positions: int | float | None) -> dict[str, Any]:
    # transformers stretches from the model's context, whatever the original one is said to be.
    s.ignore(_ORIGINAL)
    return {
        "scaling": "dynamic", "factor": s.number("factor"),
        "original_positions": _known(positions),
    }  # fmt: skip


def _yarn(s: Settings, positions: int | float | None) -> dict[str, Any]:
    original = _original(s, positions)
    factor = _factor(s, positions, original)

    def magnitude(scale: float) -> int | float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attn_factor" in s:
        s.notes.append(
            f"{s.label('attn_factor')} = {shown(s.take('attn_factor'))} is not read, as in "
            "transformers, whose key is attention_factor; vLLM multiplies by it"
        )
    one, all_dim = s.number("mscale", 0.0, zero=True), s.number("mscale_all_dim", 0.0, zero=True)
    implied = magnitude(one) / magnitude(all_dim) if one and all_dim else magnitude(1.0)
    return {
        "scaling": "yarn", "factor": factor, "original_positions": original,
        "beta_fast": s.number("beta_fast", 32.0), "beta_slow": s.number("beta_slow", 1.0),
        "truncate": s.flag("truncate", True),
        "attention_factor": s.number("attention_factor", implied),
    }  # fmt: skip


def _longrope(s: Settings, positions: int | float | None) -> dict[str, Any]:
    original = _original(s, positions)
    factor = _factor(s, positions, original)
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "scaling": "longrope", "original_positions": original,
        "short_factors": s.numbers("short_factor"), "long_factors": s.numbers("long_factor"),
        "attention_factor": s.number("attention_factor", implied),
    }  # fmt: skip


_KINDS = {
    "default": _default, "linear": _linear, "llama3": _llama3, "dynamic": _dynamic, "yarn": _yarn,
    "longrope": _longrope,
}  # fmt: skip


def _known(positions: int | float | None) -> int | float:
    """The model's context, where the rotation depends on it.

    Raises:
      ConfigError: the configuration does not say it.
    """
    if positions is None:
        raise ConfigError(
            "expected the model's context, which its rope scaling needs (max_position_embeddings), "
            "found none; add it"
        )
    return positions


def _original(s: Settings, positions: int | float | None) -> int | float:
    """The context of the pre-training; without it, the model's.

    Raises:
      ConfigError: too short to be one.
    """
    original = s.number(_ORIGINAL, None) or float(_known(positions))
    if original < 2:
        raise ConfigError(f"{s.label(_ORIGINAL)}: expected at least 2 tokens, got {original}")
    return original


def _factor(s: Settings, positions: int | float | None, original: int | float) -> int | float:
    """How far the context is stretched; without it, how far it was."""
    return s.number("factor", None) or _known(positions) / original


def make_rope(
    s: Settings, default_theta: int | float | None = None, *, positions: int | None = None,
    partial: int | float | None = None,
) -> Rope:  # fmt: skip
    """A rotation from one `rope_scaling` or `rope_parameters` entry.

    Args:
      s: the entry.
      default_theta: used where the entry has none.
      positions: the model's context, tokens; None if it is not known.
      partial: the share of a head's channels that rotates, used where the entry has none; None
        for a family whose heads rotate whole.

    Returns:
      The rotation.

    Raises:
      ConfigError: a kind of scaling that is not implemented, or an unknown key in it.
    """
    theta = s.number("rope_theta", default_theta)
    if theta is None:
        raise ConfigError("expected a rope_theta, found none; add it")
    old, new = (_OLD_KINDS.get(k, k) if isinstance(k, str) else k
                for k in (s.take("type", None), s.take("rope_type", None)))  # fmt: skip
    if None not in (new, old) and new != old:
        disagree(s.label("rope_type"), new, s.label("type"), old)
    kind = next(k for k in (new, old, "default") if k is not None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(
            f"{s.label('rope_type')}: rope scaling {shown(kind)} is not implemented; expected one "
            f"of {', '.join(_KINDS)}. Use a checkpoint without it"
        )
    # Positions in an image: a text's are equal on all axes.
    s.ignore("mrope_section", "mrope_interleaved")
    share = 1.0 if partial is None else s.number("partial_rotary_factor", partial)
    rope = Rope(theta=theta, partial=share, **_KINDS[kind](s, positions))
    s.finish()
    return rope


def stretched(config: ModelConfig) -> ModelConfig:
    """A config whose context is what its rotation is made for, where files give the original one.

    Args:
      config: as the settings say it.

    Returns:
      The config.
    """
    reach = 0 if config.rope is None else config.rope.reach
    return dataclasses.replace(config, max_positions=max(config.max_positions, reach))


def hf_rope(settings: Settings, default_theta: float = 10000.0, *, partial: bool = False) -> Rope:
    """The rotation of a model with one kind of layer, from old or new config.json keys.

    Args:
      settings: config.json.
      default_theta: used where none is given.
      partial: whether the family knows `partial_rotary_factor`.

    Returns:
      The rotation.

    Raises:
      ConfigError: two spellings that disagree, or a kind of scaling that is not implemented.
    """
    names = ("rope_theta", _ORIGINAL, *(("partial_rotary_factor",) if partial else ()))
    outside = {name: (settings.label(name), settings.number(name, None)) for name in names}

    def read(name: str) -> Rope:
        return make_rope(
            settings.inside(name, outside), default_theta, partial=1.0 if partial else None,
            positions=settings.integer("max_position_embeddings", None),
        )  # fmt: skip

    given = [name for name in ("rope_parameters", "rope_scaling") if settings.mapping(name)]
    ropes = [read(name) for name in given or ["rope_parameters"]]
    if ropes[0] != ropes[-1]:
        new, old = ((settings.label(name), settings.mapping(name)) for name in given)
        disagree(*new, *old)
    return ropes[-1]


def _note_unread(settings: Settings, at: Callable[[str], str]) -> None:
    """Notes keys of yarn that llama.cpp's converter writes for every architecture.

    llama.cpp reads them for none of the architectures that are served here.
    """
    usual = {"ext_factor": 1.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    for name, value in usual.items():
        key = at(f"scaling.yarn_{name}")
        found = settings.number(key, value, zero=True)
        if found != value:
            settings.notes.append(
                f"{key} = {found:.6g} is not read, as in llama.cpp for this architecture"
            )


def gguf_rope(
    settings: Settings, arch: str, default_theta: float = 10000.0, *, head_dim: int | None = None
) -> Rope:
    """The rotation of a GGUF model's full-attention layers.

    Args:
      settings: the GGUF header; the rotation's own tensors are in it as `rope.long_factors` and
        `rope.short_factors`.
      arch: prefix of its keys.
      default_theta: used where none is given.
      head_dim: channels per head, for an architecture whose heads may rotate in part.

    Returns:
      The rotation.

    Raises:
      ConfigError: a kind of scaling that is not implemented.
    """

    def at(name: str) -> str:
        return f"{arch}.rope.{name}"

    given = settings.take(at("scaling.type"), None)
    # A factor by itself scales, as in llama.cpp.
    kind = "linear" if given is None else given
    # llama.cpp writes 0 for none.
    factor = settings.number(at("scaling.factor"), None, zero=True)
    older = settings.number(at("scale_linear"), 1.0, zero=True)
    factor = (older if factor is None else factor) or 1.0
    original = settings.number(at("scaling.original_context_length"), None, zero=True)
    original = original or settings.number(f"{arch}.context_length", None)
    magnitude = settings.number(at("scaling.attn_factor"), 1.0)
    long, short = (settings.numbers(at(f"{n}_factors"), ()) for n in ("long", "short"))
    settings.ignore(at("scaling.finetuned"))
    _note_unread(settings, at)
    how: dict[str, Any] = {"theta": settings.number(at("freq_base"), default_theta)}
    if head_dim is not None:
        how["partial"] = settings.integer(at("dimension_count"), head_dim) / head_dim
    if not isinstance(kind, str):
        kind = shown(kind)
    if long or short:
        kind = "longrope" if given in {None, "none", "longrope"} else f"{kind} with factors"
    if kind == "none" or (kind == "linear" and factor == 1):
        return Rope(**how, attention_factor=magnitude)
    if kind == "linear":
        return Rope(**how, scaling="linear", factor=factor, attention_factor=magnitude)
    if kind == "yarn":
        return Rope(
            **how, scaling="yarn", factor=factor, original_positions=_known(original),
            attention_factor=magnitude * (0.1 * math.log(factor) + 1),
        )  # fmt: skip
    if kind == "longrope" and long and short and factor == 1:
        return Rope(
            **how, scaling="longrope", original_positions=_known(original), long_factors=long,
            short_factors=short, attention_factor=magnitude,
        )  # fmt: skip
    raise ConfigError(
        f"{at('scaling.type')} = {shown(kind)} is not implemented; expected none, linear, yarn, or "
        "longrope with its tensors of factors. Use a checkpoint without it"
    )
