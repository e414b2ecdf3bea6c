"""Meshes: how a user asks for one, how it is made for a model, and what is refused."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, use_abstract_mesh

from ttq_jax.config import ConfigError, ModelConfig
from ttq_jax.errors import shown
from ttq_jax.partition import DATA, SPLITS, WIDE, Split


def parse(text: str) -> dict[str, int]:
    """A mesh as a user writes it.

    Args:
      text: such as "data=2,model=4"; an axis that is left out has one device.

    Returns:
      Devices by axis, "data" and "model".

    Raises:
      ConfigError: it is none.
    """
    sizes = {"data": 1, "model": 1}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ConfigError(
                f"mesh: expected sizes of data and model, as in data=2,model=4, got {shown(text)}"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], config: ModelConfig, devices: Any = None) -> Mesh:
    """The mesh for a model.

    Args:
      sizes: devices by axis: "data", over which prompts are dealt out, and "model", over which
        every weight is; 1 where one is left out.
      config: the model's.
      devices: to take them from; None for jax's, of all processes.

    Returns:
      A mesh with the axes "data", "kv" and "rep"; "kv" times "rep" is "model".

    Raises:
      ConfigError: sizes that are none, more devices than there are, not those of every process, or
        a model that cannot be dealt out so.
    """
    unknown = sorted(set(sizes) - {"data", "model"})
    data, model = sizes.get("data", 1), sizes.get("model", 1)
    whole = all(isinstance(n, int | np.integer) and n >= 1 for n in (data, model))
    if unknown or not whole:
        raise ConfigError(
            'mesh: expected numbers of devices for "data" and "model", such as '
            f'{{"data": 2, "model": 4}}, got {shown(dict(sizes))}'
        )
    there = list(jax.devices() if devices is None else np.ravel(devices))
    if data * model > len(there):
        raise ConfigError(
            f"mesh: data={data} and model={model} take {data * model} devices, and there are "
            f"{len(there)}; choose sizes whose product is at most that"
        )
    if devices is None and jax.process_count() > 1 and data * model < len(there):
        raise ConfigError(
            f"mesh: data={data} and model={model} take {data * model} of the {len(there)} devices "
            f"of {jax.process_count()} processes; every process needs its own among them, so "
            "choose sizes whose product is all"
        )
    shape = _shape(config, int(data), int(model))
    return jax.make_mesh(
        shape, (DATA, *WIDE), axis_types=(AxisType.Auto,) * 3, devices=there[: data * model]
    )


def _shape(config: ModelConfig, data: int, model: int) -> tuple[int, int, int]:
    """Devices over "data", "kv" and "rep"."""
    check_model(config, model)
    kv = math.gcd(config.n_kv_heads, model)
    return data, kv, model // kv


def in_shape(sizes: Mapping[str, int], config: ModelConfig) -> contextlib.AbstractContextManager:
    """The context of a mesh whose devices are not there, in which shapes can be asked for.

    Args:
      sizes: from `parse`.
      config: the model's.

    Returns:
      The context.
    """
    shape = _shape(config, sizes["data"], sizes["model"])
    return use_abstract_mesh(AbstractMesh(shape, (DATA, *WIDE), (AxisType.Auto,) * 3))


def undivided(sizes: Mapping[str, int] | None, batch: int) -> str:
    """Says of a batch that "data" does not divide that every device reads it whole.

    Args:
      sizes: of a mesh, by axis; None for one device.
      batch: prompts read together.

    Returns:
      A line; "" if the batch is dealt out.
    """
    data = (sizes or {}).get(DATA, 1)
    if batch % data == 0:
        return ""
    prompts = "a prompt by itself" if batch == 1 else f"a batch of {batch} prompts"
    return (
        f"data={data} of the mesh does not divide {prompts}: each of its {data} groups of devices "
        "reads it whole, and none is faster for it"
    )


def check_model(config: ModelConfig, model: int) -> None:
    """Refuses a model that so many devices cannot share.

    Args:
      config: the model's.
      model: devices that share every weight.

    Raises:
      ConfigError: a size that does not divide; the message names it.
    """
    sizes = {"heads": config.n_heads, "tokens of the vocabulary": config.vocab_size}
    if config.n_experts:
        sizes["experts"] = config.n_experts
    else:
        sizes["channels of the feed-forward layer"] = config.d_ff
    for what, size in sizes.items():
        if size % model:
            raise ConfigError(
                f"mesh: the model has {size} {what}, which {model} devices cannot share equally; "
                f"expected model= to divide {size}"
            )
    kv = config.n_kv_heads
    if kv % model and model % kv:
        raise ConfigError(
            f"mesh: the model has {kv} key-value heads, which {model} devices can neither share "
            f"equally nor have equally many copies of; expected model= to divide {kv}, or a "
            "multiple of it"
        )


def check_rows(name: str, d_in: int, group_size: int, split: Split | None = None) -> None:
    """Refuses groups of input channels that would lie on several devices of the current mesh.

    Args:
      name: of a projection.
      d_in: its input channels.
      group_size: of its grid; -1 for all input channels.
      split: how devices share it; None for as one of our own decoder's with that name.

    Raises:
      ConfigError: a device would have a part of a group.
    """
    if split is None:
        split = SPLITS[name].here() if name in SPLITS else None
    blocks = 1 if split is None else split.row_blocks
    if blocks == 1 or (group_size != -1 and (d_in // blocks) % group_size == 0):
        return
    rows = d_in // blocks
    asked = "one group per column (-1)" if group_size == -1 else f"groups of {group_size}"
    fits = [g for g in range(8, rows + 1, 8) if rows % g == 0]
    advice = f"a group size of {fits[-1]}, or any that divides it" if fits else "fewer devices"
    raise ConfigError(
        f"mesh: {blocks} devices share the {d_in} input channels of {name}, {rows} each, and "
        f"{asked} would lie on several of them; use {advice}"
    )
