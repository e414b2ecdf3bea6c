"""What one device of a mesh has of a model, and what the devices of a slice are to each other.

Sizes are those of `partition`: every array is cut where its spec says so, and is whole elsewhere.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ttq_jax.config import ModelConfig
from ttq_jax.partition import param_specs
from ttq_jax.types import Params

# The compilers' names of slices, by number of devices. A tpu7x has two devices on each chip. So has
# a v4 for the compiler, but not where one runs: it is left out.
_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBE = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
SLICES: dict[str, dict[int, str]] = {
    "v5e": _FLAT, "v5p": _CUBE, "v6e": _FLAT,
    "tpu7x": {2 * chips: shape for chips, shape in _CUBE.items()},
}  # fmt: skip
"""Shapes of TPU slices that the compiler knows, by chip and number of devices."""

# Devices of a host: the most that one host has, and those of each host where there are several.
# TPUs' are Google Cloud's figures: a v5e-8 and a v6e-8 are one host, larger slices are hosts of
# four chips. A server of GPUs is taken to have eight.
_HOSTS = {"v4": (4, 4), "v5e": (8, 4), "v5p": (4, 4), "v6e": (8, 4), "tpu7x": (8, 8)}


def slice_of(chip: str, devices: int) -> str | None:
    """A slice with so many devices, as the TPU compiler writes it.

    Args:
      chip: a key of `absent.CHIPS`.
      devices: how many, at least 1.

    Returns:
      Such as "v5e:2x4"; None if the compiler knows none.
    """
    shape = SLICES.get(chip, {}).get(devices)
    return None if shape is None else f"{chip}:{shape}"


def devices_per_host(chip: str, devices: int) -> int:
    """How many devices of a slice one host has.

    Args:
      chip: a key of `absent.CHIPS`.
      devices: of the slice.

    Returns:
      The number.
    """
    most, each = _HOSTS.get(chip, (8, 8))
    return devices if devices <= most else each


def own(tree: Any, specs: Any, sizes: Mapping[str, int]) -> Any:
    """What a device has of some arrays.

    Args:
      tree: of arrays or shapes.
      specs: the same tree of specs.
      sizes: of the mesh, by axis.

    Returns:
      The tree of its shapes.
    """

    def one(a: Any, spec: Any) -> Any:
        cut = [1] * len(a.shape)
        for i, axes in enumerate(spec):
            names = (axes,) if isinstance(axes, str) else axes or ()
            cut[i] = math.prod(sizes.get(axis, 1) for axis in names)
        shape = tuple(n // by for n, by in zip(a.shape, cut, strict=True))
        return jax.ShapeDtypeStruct(shape, a.dtype)

    return jax.tree.map(one, tree, specs)


def own_params(params: Params, sizes: Mapping[str, int]) -> Params:
    """What a device has of a parameter tree, dense or packed; see `own`."""
    return own(params, param_specs(params), sizes)


def own_cache(config: ModelConfig, sizes: Mapping[str, int]) -> ModelConfig:
    """A model whose cache is what a device has of this one's."""
    return dataclasses.replace(config, n_kv_heads=config.n_kv_heads // sizes.get("kv", 1))


def largest_read(params: Params, sizes: Mapping[str, int], devices: int) -> int:
    """Bytes of the largest array of a checkpoint that a host holds while it is read.

    Args:
      params: the dense tree, or its shapes.
      sizes: of the mesh, by axis.
      devices: of the host.

    Returns:
      Those of all its devices' parts, of which a copy is held once.
    """
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(own_params(params, sizes)), strict=True)
    return max(
        math.prod(own.shape) * min(devices, math.prod(a.shape) // math.prod(own.shape))
        * a.dtype.itemsize
        for a, own in pairs
    )  # fmt: skip


def sums(config: ModelConfig, sizes: Mapping[str, int], batch: int, dtype: str) -> dict[str, Any]:
    """What the devices exchange in a layer of a decoded token, by the way a model is split.

    Args:
      config: the model's.
      sizes: of the mesh, by axis.
      batch: a device's own prompts.
      dtype: of the activations.

    Returns:
      As `slices.collectives` has it: two sums, after attention and after the feed-forward layer. {}
      for one device, and for a mixture of experts, of which only the compiler tells.
    """
    if config.n_experts or not sizes:
        return {}
    short = {"bfloat16": "bf16", "float32": "f32"}[jnp.dtype(dtype).name]
    one = f"{short}[{batch},1,{config.d_model}] all-reduce"
    shared = sizes.get("kv", 1) * sizes.get("rep", 1) > 1
    return {"token's layer": [one] * 2 if shared else []}


def exchange_seconds(exchanged: Mapping[str, list[str]], layers: int, speed: float) -> float | None:
    """What the exchanges of a decoded token take at least, by their bytes alone.

    Of a sum every device's own numbers leave it once, however it is computed; of what is gathered
    or dealt out anew it may have half. All its links carry it, and each exchange begins at once.

    Args:
      exchanged: from `sums` or `slices.collectives`.
      layers: L.
      speed: of a device's links to the others, one way, bytes per second.

    Returns:
      Seconds; None where it is not known what a token exchanges.
    """
    if "token's layer" not in exchanged:
        return None
    each = [*exchanged["token's layer"] * layers, *exchanged.get("token", [])]
    return sum(map(_least_bytes, each)) / speed


def _least_bytes(exchange: str) -> float:
    """Bytes that leave a device, of such as "bf16[1,1,4096] all-reduce"; of several arrays too."""
    size = 0.0
    for kind, shape in re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", exchange):
        bits = int(re.sub(r"\D", "", kind) or 8)  # pred: a byte
        size += math.prod(map(int, filter(None, shape.split(",")))) * bits / 8
    return size if exchange.endswith("all-reduce") else size / 2
