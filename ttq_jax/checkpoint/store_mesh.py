"""Where what a store holds lies on a model's mesh; packed weights get the blocks of its devices."""

import dataclasses
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ttq_jax.checkpoint.store_files import ShardingOf
from ttq_jax.linear import repacked
from ttq_jax.mesh import check_rows
from ttq_jax.partition import SPLITS, TABLE, kernel_specs, param_specs, split_of
from ttq_jax.types import MixedLinear, Offline, QuantizedLinear


def _stacks(kernel: Any) -> tuple[QuantizedLinear, ...]:
    return kernel.stacks if isinstance(kernel, MixedLinear) else (kernel,)


def _blocks_of(name: str, kernel: Any) -> int:
    """How many blocks the rows of a projection are in on the current mesh."""
    split = SPLITS[name].here() if name in SPLITS else None
    experts = jax.tree.leaves(kernel)[0].ndim == 4
    return 1 if split is None or experts else split.row_blocks


def shardings(shapes: Offline, mesh: Mesh) -> ShardingOf:
    """Where a store's arrays are read to.

    Args:
      shapes: what it holds.
      mesh: the current one.

    Returns:
      What `store_files.read` takes. Weights that have to be packed anew come by columns.
    """
    everywhere = jax.tree.map(lambda _: PartitionSpec(), shapes)
    factors = {
        name: kernel_specs(one, *split_of(name, one.down)) for name, one in shapes.low_rank.items()
    }
    packed = None
    if shapes.packed is not None:
        packed = {}
        for name, kernel in shapes.packed.items():
            again = any(s.row_blocks != _blocks_of(name, kernel) for s in _stacks(kernel))
            own = param_specs({"layers": {name: {"kernel": kernel}}})["layers"][name]["kernel"]
            packed[name] = kernel_specs(kernel, TABLE, (None,)) if again else own
    specs = dataclasses.replace(everywhere, low_rank=factors, packed=packed)
    found = {
        ".".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))))
                 for key in path): NamedSharding(mesh, spec)
        for path, spec in jax.tree.leaves_with_path(specs)
    }  # fmt: skip
    return lambda name, _: found.get(name)


def on_this_mesh(packed: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """Packed kernels with the blocks, and on the devices, of the current mesh.

    Args:
      packed: by projection.
      mesh: the current one; None for one device.

    Returns:
      The kernels.

    Raises:
      ConfigError: a group of input channels would lie on several devices.
    """
    return {name: _on_this_mesh(name, kernel, mesh) for name, kernel in packed.items()}


def _on_this_mesh(name: str, kernel: Any, mesh: Mesh | None) -> Any:
    split = SPLITS[name].here() if name in SPLITS else None
    blocks = _blocks_of(name, kernel)
    if jax.tree.leaves(kernel)[0].ndim == 4:
        split = None

    def one(w: QuantizedLinear) -> QuantizedLinear:
        if blocks > 1:
            check_rows(name, w.d_in, w.group_size)
        if w.row_blocks != blocks:
            w = jax.jit(partial(repacked, row_blocks=blocks))(w)
        return dataclasses.replace(w, split=split)

    if isinstance(kernel, MixedLinear):
        kernel = dataclasses.replace(kernel, stacks=tuple(map(one, kernel.stacks)))
    else:
        kernel = one(kernel)
    if mesh is None:
        return kernel
    specs = param_specs({"layers": {name: {"kernel": kernel}}})["layers"][name]["kernel"]
    return jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), kernel, specs)
