"""Parses what lm_eval passes to `harness` by name: the model's arguments and generation_kwargs."""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.preparation import Needs, calibration_text, load_model, prepare_offline
from ttq_jax.evaluation.progress import Progress
from ttq_jax.partition import on
from ttq_jax.quant.names import DEFAULT
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.recipe_text import SHORT, recipe_named
from ttq_jax.quant.tree import check_selection
from ttq_jax.sampling import Sampling

_SHORT = ("bits", "group_size", "rank", "symmetric")
_OTHERS = (
    "model", "recipe", "calibration", "calibration_tokens", "prepared", "dtype", "max_length",
    "seed", "ignore_key", "dense_memory", "mesh",
)  # fmt: skip
OPTIONS = (*_OTHERS, *_SHORT)
"""The model arguments that are not settings of a recipe."""

_AXES = tuple(field.name for field in dataclasses.fields(Recipe))
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_GENERATION = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses model arguments that do not exist.

    Args:
      arguments: what `--model_args` was given.

    Raises:
      ConfigError: one does not, or the model is missing.
    """
    for key in arguments:
        if key not in OPTIONS and key.partition(".")[0] not in _AXES:
            close = difflib.get_close_matches(key, (*OPTIONS, *_AXES), 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"model_args: expected some of {', '.join(OPTIONS)}, or a setting such as "
                f"rounding.damping=0.3 (of {', '.join(_AXES)}), got {key!r}{meant}"
            )
    if not arguments.get("model"):
        raise ConfigError("model_args: expected model=NAME, as in model=smollm2,recipe=fast")


def _text(value: Any) -> str:
    """A value as it was written: lm_eval reads -1 as a float, and none as None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "none" if value is None else str(value)


def recipe_from(arguments: Mapping[str, Any]) -> tuple[str, Recipe | None]:
    """The recipe that model arguments describe.

    Args:
      arguments: `recipe` (a preset's name or a FILE.toml; default `names.DEFAULT`), bits,
        group_size, rank, symmetric, and settings, see `with_settings`.

    Returns:
      Its name, and the recipe; None for "none".

    Raises:
      ConfigError: it does not exist, or a setting has no effect on it.
    """
    name = _text(arguments.get("recipe", DEFAULT))
    settings = [
        f"{SHORT[key] if key in _SHORT else key}={_text(value)}"
        for key, value in arguments.items()
        if key not in _OTHERS
    ]
    return Path(name).name, recipe_named(name, {}, settings)


def load_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the model and prepares the recipe that model arguments name, as a command does.

    Args:
      arguments: what `--model_args` was given.

    Returns:
      What `TTQModel` is made with.
    """
    check_arguments(arguments)
    name, recipe = recipe_from(arguments)
    given = {key: arguments.get(key) for key in OPTIONS}
    needs = Needs(
        method=name, recipe=recipe, calibration=given["calibration"],
        calibration_tokens=given["calibration_tokens"] or 8192, prepared=given["prepared"],
    )  # fmt: skip
    progress = Progress()
    text = calibration_text(needs, progress)
    keys = str(given["ignore_key"] or "").split()
    model, _ = load_model(
        str(given["model"]), given["dtype"] or "float32", progress, keys, recipe,
        dense_memory=given["dense_memory"] or "device", mesh=given["mesh"],
    )  # fmt: skip
    with on(model.mesh):
        check_selection(model.params, recipe)
    offline, _ = prepare_offline(needs, model, text, progress)
    said: dict[str, Any] = {"method": name}
    if text is not None:
        said |= {
            "calibration": Path(str(needs.calibration)).name,
            "calibration_sha256": sha256(text),
            "calibration_tokens": needs.calibration_tokens,
        }
    return {
        "model": model,
        "recipe": recipe,
        "offline": offline,
        "max_length": given["max_length"],
        "seed": given["seed"] or 0,
        "said": said,
    }


def generation_of(kwargs: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """What a task's generation_kwargs ask for.

    Args:
      kwargs: `until` (a text or several), `do_sample`, `temperature`, `top_k`, `top_p`, and a
        number of tokens under any of the names that lm_eval knows (default: 256). Tokens are
        sampled if `do_sample` is true, by default at temperature 1, or if it is absent and the
        temperature is above 0.

    Returns:
      Texts that end the answer, most new tokens, and how they are chosen.

    Raises:
      ConfigError: another name, or a value out of range.
    """
    for name in kwargs:
        if name not in _GENERATION:
            raise ConfigError(
                f"generation_kwargs: expected some of {', '.join(_GENERATION)}, got {name!r}, "
                "which ttq does not support; leave it out"
            )
    given = {key: value for key, value in kwargs.items() if value is not None}
    lengths = [key for key in _LENGTHS if key in given]
    if len(lengths) > 1:
        raise ConfigError(f"generation_kwargs: expected one length, got {' and '.join(lengths)}")
    limit = int(given[lengths[0]]) if lengths else 256
    if limit < 1:
        raise ConfigError(f"{lengths[0]}: expected at least 1 token, got {limit}")
    sampled = given.get("do_sample")
    temperature = float(given.get("temperature", 1.0 if sampled else 0.0))
    if sampled and not temperature:
        raise ConfigError(
            "generation_kwargs: do_sample needs a temperature above 0, got 0; leave out do_sample "
            "to take the likeliest tokens"
        )
    until = given.get("until", [])
    sampling = Sampling(
        temperature=0.0 if sampled is False else temperature,
        top_k=int(given.get("top_k", 0)),
        top_p=float(given.get("top_p", 1.0)),
    )
    return [until] if isinstance(until, str) else [stop for stop in until if stop], limit, sampling
