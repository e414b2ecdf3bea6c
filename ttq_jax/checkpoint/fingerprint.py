"""Identifies a model by a sample of its weights, also among those of the same shape.

A table that is packed while it is read is sampled before, so that a model has one fingerprint
however it is loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.store_files import plain
from ttq_jax.config import identity
from ttq_jax.host import on_host
from ttq_jax.types import Params, QuantizedLinear, Stacked

# Elements of each array that are looked at.
_SAMPLE = 1024


def places(shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Indices of some elements, spread so that no axis's period can hide from them.

    Args:
      shape: of an array.

    Returns:
      int32 per axis, at most `_SAMPLE` of them.
    """
    size = int(np.prod(shape, dtype=np.int64))
    if size <= _SAMPLE:
        flat = np.arange(size)
    else:
        golden = np.arange(_SAMPLE) * ((5**0.5 - 1) / 2) % 1.0
        flat = (golden * size).astype(np.int64)
    return tuple(i.astype(np.int32) for i in np.unravel_index(flat, shape))


def said(name: str, shape: tuple[int, ...], sample: np.ndarray) -> bytes:
    """What is digested of an array.

    Args:
      name: its path in the tree, as `jax.tree_util.keystr` writes it.
      shape: its shape.
      sample: its elements at `places`.

    Returns:
      Bytes.
    """
    return f"{name} {shape} {sample.dtype}".encode() + sample.tobytes()


@jax.jit
def _elements(arrays: tuple[Any, ...], at: list[tuple[Any, ...]]) -> list[jax.Array]:
    return [_chosen(a, one) if on_host(a) else a[one] for a, one in zip(arrays, at, strict=True)]


def _chosen(stack: Any, at: tuple[Any, ...]) -> jax.Array:
    """Elements of a stack in the host's memory; one layer at a time is fetched."""
    layer, *inside = at

    def add(found: jax.Array, i: Any) -> tuple[jax.Array, None]:
        return jnp.where(layer == i, Stacked(stack, i).kernel[tuple(inside)], found), None

    layers = jnp.arange(len(stack), dtype=jnp.int32)
    return jax.lax.scan(add, jnp.zeros(layer.shape, stack.dtype), layers)[0]


def said_of(params: Params, tables: Mapping[str, bytes]) -> dict[str, bytes]:
    """What is digested of every array of a tree, in its order.

    Args:
      params: a tree; only the vocabulary's tables may be packed.
      tables: what `said` gave of the packed ones.

    Returns:
      By name.
    """
    is_packed = lambda leaf: isinstance(leaf, QuantizedLinear)  # noqa: E731
    found = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree.leaves_with_path(params, is_leaf=is_packed)
    ]
    dense = {name: leaf for name, leaf in found if not is_packed(leaf)}
    at = jax.device_put([places(leaf.shape) for leaf in dense.values()])
    samples = jax.device_get(_elements(tuple(dense.values()), at))
    of_dense = {
        name: said(name, leaf.shape, sample)
        for (name, leaf), sample in zip(dense.items(), samples, strict=True)
    }
    return {name: of_dense[name] if name in of_dense else tables[name] for name, _ in found}


def fingerprint(model: Model) -> str:
    """Identifies a model, also among those of the same shape.

    It is a digest of the config and of every array's name, shape, type and a sample of its values:
    weights that were trained further differ nearly everywhere. It depends neither on the device,
    nor on the sharding, nor on whether the vocabulary's tables were packed while they were read.

    Args:
      model: as loaded.

    Returns:
      64 hexadecimal digits.
    """
    config = json.dumps(plain(identity(model.config)), sort_keys=True)
    digest = hashlib.sha256(config.encode())
    for entry in said_of(model.params, model.tables).values():
        digest.update(entry)
    return digest.hexdigest()
