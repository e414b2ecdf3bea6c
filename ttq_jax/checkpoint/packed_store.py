"""Saves and loads the packed parameters of a user's function, whole: no dense kernel is needed."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax

from ttq_jax.checkpoint.errors import StoreError
from ttq_jax.checkpoint.store_files import Shardings, read, read_header, shapes, write
from ttq_jax.foreign import named
from ttq_jax.functions.modules import path_of
from ttq_jax.functions.packed import PackedKernel, is_packed
from ttq_jax.functions.sites import Operand
from ttq_jax.linear import repacked
from ttq_jax.types import QuantizedLinear

_PARTS = ("shape", "batch", "contract", "free")


def save_packed(path: str | Path, packed: Any) -> None:
    """Saves what `ttq.read` or `ttq.quantize` returned; see `save_offline` for interruptions.

    Args:
      path: a directory; a store in it is replaced.
      packed: the whole tree, its dense leaves too.

    Raises:
      StoreError: nothing in it is packed, a leaf is no array, or the path is in use or cannot be
        written.
    """
    leaves = _by_path(packed)
    kernels = {name: leaf for name, leaf in leaves.items() if is_packed(leaf)}
    dense = {name: leaf for name, leaf in leaves.items() if name not in kernels}
    if not kernels:
        raise StoreError(
            f"{path}: not saved: expected packed parameters, got none; pass what read returned"
        )
    for name, leaf in dense.items():
        if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        ):
            raise StoreError(
                f"{path}: not saved: {name} is {type(leaf).__name__} and no array of numbers; keep "
                "it apart from the parameters"
            )
    about = {name: _described(kernel) for name, kernel in kernels.items()}
    parts = {name: {"views": _whole(one), "rows": one.rows} for name, one in kernels.items()}
    write(path, {"kind": "function", "packed": about}, {"dense": dense, "packed": parts})


def load_packed(path: str | Path, like: Any, *, sharding: Shardings = None) -> Any:
    """Loads what `save_packed` wrote; every bit is as it was.

    Args:
      path: the directory.
      like: a tree of the same structure: the dense parameters or their shapes, from
        `jax.eval_shape`.
      sharding: see `load_offline`; names are "dense.PATH" and "packed.PATH.views.0.planes.0".

    Returns:
      The packed tree, for `ttq.run`.

    Raises:
      StoreError: not such a store, of other parameters, incomplete or damaged.
    """
    header = read_header(path)
    if header["kind"] != "function":
        raise StoreError(
            f"{path}: expected the packed parameters of a function (save_packed), found a store of "
            f"kind {header['kind']!r}; load it with load_offline or load_conversation"
        )
    stored, wanted = shapes(path, header), _by_path(like)
    of_packed = header["packed"]
    there = {name: (tuple(a.shape), str(a.dtype)) for name, a in stored["dense"].items()}
    there |= {name: (tuple(one["shape"]), one["dtype"]) for name, one in of_packed.items()}
    here = {name: (tuple(a.shape), str(a.dtype)) for name, a in wanted.items()}
    odd = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if odd or stored["packed"].keys() != of_packed.keys():
        raise StoreError(
            f"{path}: made for other parameters: {named(odd or of_packed)} differ in path, shape "
            "or dtype; pass the parameters of the function that was read as like"
        )
    tree = read(path, header, sharding)
    made = {name: _restored(name, tree["packed"][name], about) for name, about in of_packed.items()}
    leaves = [made[name] if name in made else tree["dense"][name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_packed), leaves)


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path."""
    found = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_packed)[0]
    return {path_of(path): leaf for path, leaf in found}


def _whole(kernel: PackedKernel) -> tuple[QuantizedLinear, ...]:
    """Its packed weights as one device has them: a store of a function knows no mesh."""
    again = jax.jit(partial(repacked, row_blocks=1))
    one = [again(view) if view.row_blocks > 1 else view for view in kernel.views]
    return tuple(dataclasses.replace(view, split=None) for view in one)


def _described(kernel: PackedKernel) -> dict[str, Any]:
    """How a packed parameter is read, in JSON's types."""
    operands = [
        {"steps": one.steps, **{part: getattr(one, part) for part in _PARTS}}
        for one in kernel.operands
    ]
    return {"shape": kernel.shape, "dtype": kernel.dtype, "operands": operands}


def _restored(name: str, parts: dict[str, Any], about: dict[str, Any]) -> PackedKernel:
    """A packed parameter from its parts."""
    operands = tuple(
        Operand(path=name, steps=_tuples(one["steps"]), **{p: tuple(one[p]) for p in _PARTS})
        for one in about["operands"]
    )
    shape, dtype = tuple(about["shape"]), about["dtype"]
    return PackedKernel(tuple(parts["views"]), tuple(parts["rows"]), operands, shape, dtype)


def _tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
