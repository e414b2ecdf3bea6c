"""What a store's description claims, against its files, its arrays and the model it is for.

The checksums find damage. They do not find a description that somebody wrote: Orbax reads an array
in any shape and type that it is asked for, and fills up what is not there.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ttq_jax.checkpoint.errors import StoreError
from ttq_jax.errors import shown
from ttq_jax.foreign import is_file, is_inside, why
from ttq_jax.linear import dense_weight
from ttq_jax.quant.grid import Grid, kind_of
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import MixedLinear, Params, QuantizedLinear, kernels

REMEDY = "copy it again, or save it again"


def file_digest(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_files(place: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compares every file with what was written.

    Args:
      place: the store.
      files: name to "bytes" and "sha256", from its description.

    Raises:
      StoreError: one is missing, cut short, changed, outside the store or no file.
    """
    for name, expected in files.items():
        what = f"{place}: {name if len(name) <= 200 else shown(name)}"
        if not is_inside(name):
            raise StoreError(f"{place}: expected files in it, got {shown(name)}; {REMEDY}")
        file = place / name
        try:
            size = file.stat().st_size
            if not is_file(file):
                raise StoreError(f"{what} is a directory, a pipe or a device; {REMEDY}")
            fits = size == expected["bytes"] and file_digest(file) == expected["sha256"]
        except FileNotFoundError as e:
            raise StoreError(f"{what} is missing; {REMEDY}") from e
        except OSError as e:
            raise StoreError(f"{what} cannot be read: {e.strerror}; {REMEDY}") from e
        if not fits:
            other = f": expected {expected['bytes']} bytes, got {size}"
            found = " (wrong checksum)" if size == expected["bytes"] else other
            raise StoreError(f"{what} is damaged{found}; {REMEDY}")


def check_arrays(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compares the arrays that are described with those that are there, before any is read.

    Args:
      folder: for messages.
      held: name to what Orbax says of the array.
      wanted: name to an object of the described shape and dtype.

    Raises:
      StoreError: one is missing, or has another shape or type.
    """
    for name, one in wanted.items():
        found = held.get(name)
        said = (tuple(one.shape), str(one.dtype))
        there = None if found is None else (tuple(found.shape), str(found.dtype))
        if said != there:
            raise StoreError(
                f"{folder}: the array {shown(name)} is described as {shown(said)}, found "
                f"{shown(there)}; {REMEDY}"
            )


def check_packed(
    path: str | Path, packed: Mapping[str, Any], params: Params, recipe: Recipe
) -> None:
    """Compares packed kernels with the recipe and with the kernels that they stand for.

    Args:
      path: of the store, for messages.
      packed: name to packed kernel, without values.
      params: the model's.
      recipe: of the store.

    Raises:
      StoreError: a kernel is missing or not selected, or has other sizes or widths.
    """
    dense = kernels(params["layers"])
    selected = set(recipe.selected(dense))
    if odd := sorted(set(packed) ^ selected):
        raise StoreError(
            f"{path}: expected the kernels that the recipe selects, but {shown(odd[0])} is only "
            f"{'in the store' if odd[0] in packed else 'selected'}; {REMEDY}"
        )
    for name, kernel in packed.items():
        try:
            fits = _stands_for(kernel, dense[name].shape, recipe.grids(name, len(dense[name])))
        except (TypeError, ValueError, IndexError) as e:
            raise StoreError(f"{path}: {name} is no packed weight ({why(e)}); {REMEDY}") from e
        if not fits:
            raise StoreError(
                f"{path}: {name} has other sizes, bits or groups than the model's kernel of shape "
                f"{dense[name].shape} has in this recipe; {REMEDY}"
            )


def _stands_for(kernel: Any, shape: tuple[int, ...], grids: tuple[Grid, ...]) -> bool:
    """Whether a packed kernel is one of that shape, each layer in its grid."""
    n_layers, *experts, d_in, d_out = shape
    used, mixed = list(dict.fromkeys(grids)), isinstance(kernel, MixedLinear)
    stacks: tuple[QuantizedLinear, ...] = kernel.stacks if mixed else (kernel,)
    if mixed and not kernel.which.shape == kernel.slot.shape == (n_layers,):
        return False
    dense = jax.vmap(jax.vmap(dense_weight) if experts else dense_weight)
    return len(stacks) == len(used) and all(
        (one.bits, one.group_size, one.d_in, one.d_out, kind_of(one.scales))
        == (grid.bits, grid.rows_per_group(d_in), d_in, d_out, grid.scales)
        and jax.eval_shape(dense, one).shape == (grids.count(grid), *experts, d_in, d_out)
        for one, grid in zip(stacks, used, strict=True)
    )
