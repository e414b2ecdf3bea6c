"""Where a model's arrays lie on a mesh of devices.

Megatron's split (Shoeybi et al., 2019): every device has whole heads and whole channels of the
feed-forward layer, so that a layer sums over the devices twice, after its two last products. A
mixture's experts are dealt out whole. XLA's partitioner does the rest: all that is not a kernel's
call, quantization rules above all, is written for whole arrays and stays so.

    axis    of the mesh        q, gate, up   k, v       o, down   embedding, head   experts
    data    the prompts
    kv      key-value heads    columns       columns    rows      vocabulary        experts
    rep     a group's queries  columns       (copies)   rows      vocabulary        experts
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import Split, mesh_sizes
from ttq_jax.types import Params, QuantizedLinear

_Function = TypeVar("_Function", bound=Callable[..., Any])

DATA = "data"
WIDE = ("kv", "rep")
"""The axes that "model" stands for: more devices than key-value heads have copies of these."""

SPLITS: dict[str, Split] = {
    "q": Split(columns=WIDE), "k": Split(columns=("kv",)), "v": Split(columns=("kv",)),
    "o": Split(rows=WIDE), "gate": Split(columns=WIDE), "up": Split(columns=WIDE),
    "down": Split(rows=WIDE),
}  # fmt: skip
"""How the devices share each projection."""

TABLE = Split(columns=WIDE)
"""How they share a packed table of the vocabulary, whose columns are tokens."""

EXPERTS = Split(experts=WIDE)
"""How they share the experts of a layer, each of which is whole."""


def own_shape(name: str, d_in: int, d_out: int) -> tuple[int, int]:
    """What a device of the current mesh has of a projection.

    Args:
      name: of the projection.
      d_in: input channels.
      d_out: output channels.

    Returns:
      The device's own; the same numbers without a mesh.
    """
    split = SPLITS[name].here()
    if split is None:
        return d_in, d_out
    return d_in // split.row_blocks, d_out // count(split.columns)


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Programs that are traced in this context are for this mesh; None changes nothing."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def on_its_mesh(run: _Function) -> _Function:
    """Makes a function of a model trace its programs for the model's mesh.

    Args:
      run: its first argument is a model.

    Returns:
      The same function.
    """

    @functools.wraps(run)
    def there(model: Any, *args: Any, **kwargs: Any) -> Any:
        with on(getattr(model, "mesh", None)):
            return run(model, *args, **kwargs)

    return cast(_Function, there)


def put(tree: Any, *, batch: bool = False) -> Any:
    """Arrays of the host on the devices of the current mesh, or on JAX's default device.

    Args:
      tree: of arrays.
      batch: whether their first axis counts prompts, to be dealt out over "data" where that
        divides them; every device has all else.

    Returns:
      The tree.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.device_put(tree)
    size = mesh.shape.get(DATA, 1)

    def one(a: Any) -> Any:
        spec = P(DATA) if batch and size > 1 and a.shape[0] % size == 0 else P()
        return jax.device_put(a, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def each_of(run: Callable[..., Any], *prompts: Any) -> Any:
    """A map over prompts that have weights of their own, dealt out over "data" where it divides.

    Args:
      run: of one prompt.
      *prompts: what it takes, stacked.

    Returns:
      What it returns, stacked.
    """
    size = mesh_sizes().get(DATA, 1)
    count = len(jax.tree.leaves(prompts)[0])
    return jax.vmap(run, spmd_axis_name=DATA if size > 1 and count % size == 0 else None)(*prompts)


def whole(tree: Any) -> Any:
    """Arrays of a program that every device is to have whole, so that any process can read them."""
    if not mesh_sizes():
        return tree
    return jax.tree.map(lambda a: jax.lax.with_sharding_constraint(a, P()), tree)


def with_batch(a: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """An array of a program with its axes over these of the mesh, where they divide it."""
    sizes = mesh_sizes()
    counts = [sizes.get(axis or "", 1) for axis in axes]
    fits = [
        axis if n > 1 and length % n == 0 else None
        for axis, n, length in zip(axes, counts, a.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(a, P(*fits)) if any(fits) else a


def kernel_specs(kernel: Any, split: Split, lead: tuple[Any, ...]) -> Any:
    """How the arrays of one projection lie.

    Args:
      kernel: an array or a node of `types`; shapes are enough.
      split: the axes of its rows and columns.
      lead: mesh axes of its axes over layers and experts; of arrays that have fewer, the last.

    Returns:
      The same tree with specs in place of arrays.
    """
    rows, columns = split.rows or None, split.columns or None
    ends = {
        "channel_scale": (rows,), "columns": (columns,), "down": (rows, None),
        "up": (None, columns), "down_scale": (None,), "up_scale": (None,),
    }  # fmt: skip

    def spec(path: Any, a: Any) -> P:
        name = getattr(path[-1], "name", "") if path else ""
        if name in {"layer", "which", "slot"}:
            return P()
        end = ends.get(name, (rows, columns))
        return P(*lead[len(lead) - (a.ndim - len(end)) :], *end)

    return jax.tree.map_with_path(spec, kernel)


def split_of(name: str, stack: Any) -> tuple[Split, tuple[Any, ...]]:
    """How a projection is split.

    Args:
      name: the projection.
      stack: an array of it, over layers or over layers and experts.

    Returns:
      Its split, and the mesh axes of its leading ones.
    """
    return (SPLITS[name], (None,)) if stack.ndim == 3 else (EXPERTS, (None, WIDE))


def own_rows(batch: int) -> int:
    """How many prompts of a batch a device of the current mesh has."""
    size = mesh_sizes().get(DATA, 1)
    return batch // size if batch % size == 0 else batch


def param_specs(params: Params) -> Any:
    """How a model's arrays lie.

    Args:
      params: a tree of the form of `decoder.init_params`, dense, packed or mixed, or its shapes;
        any part of one.

    Returns:
      The same tree with specs in place of arrays.
    """

    def of_layer(name: str, leaf: Params) -> Params:
        if name not in SPLITS:
            return jax.tree.map(lambda _: P(), leaf)
        kernel = leaf["kernel"]
        split, lead = split_of(name, jax.tree.leaves(kernel)[0])
        bias = {k: P(None, split.columns or None) for k in leaf if k != "kernel"}
        return {"kernel": kernel_specs(kernel, split, lead), **bias}

    specs = jax.tree.map(lambda _: P(), {k: v for k, v in params.items() if k not in _OWN})
    if "layers" in params:
        specs["layers"] = {name: of_layer(name, leaf) for name, leaf in params["layers"].items()}
    for name, dense in (("embed", Split(rows=WIDE)), ("head", TABLE)):
        if name in params:
            specs[name] = {
                k: kernel_specs(a, TABLE if isinstance(a, QuantizedLinear) else dense, ())
                for k, a in params[name].items()
            }
    return specs


_OWN = ("layers", "embed", "head")


def shard(params: Params, mesh: Mesh) -> Params:
    """A model's arrays, moved to where they lie on a mesh.

    Args:
      params: see `param_specs`; on one device, or in the host's memory.
      mesh: from `make_mesh`.

    Returns:
      The tree.
    """
    specs = param_specs(params)
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), params, specs)


def shared() -> tuple[str, ...]:
    """Of the axes `WIDE`, those that have several devices on the mesh of this program."""
    sizes = mesh_sizes()
    return tuple(axis for axis in WIDE if sizes.get(axis, 1) > 1)


def count(axes: tuple[str, ...]) -> int:
    """How many devices these axes of the mesh of this program have together."""
    return math.prod(mesh_sizes().get(axis, 1) for axis in axes)


def on_several() -> bool:
    """Whether the program that is traced is for several devices."""
    return any(size > 1 for size in mesh_sizes().values())


def lookup(take: Callable[[Any, jax.Array], jax.Array], table: Any, at: jax.Array) -> jax.Array:
    """Rows of a table of the vocabulary: every device looks for its own tokens, then they add.

    XLA by itself would gather the whole table before it looks.

    Args:
      take: (table, tokens) -> [*tokens, d].
      table: dense or packed, its tokens over `WIDE`.
      at: tokens, in range.

    Returns:
      What `take` does.
    """
    axes = shared()
    if not axes:
        return take(table, at)
    data = mesh_sizes().get(DATA, 1)
    rows = P(DATA if data > 1 and at.shape[0] % data == 0 else None)
    specs = param_specs({"embed": {"embedding": table}})["embed"]["embedding"]

    def run(table: Any, at: jax.Array) -> jax.Array:
        count = table.planes[0].shape[-1] if isinstance(table, QuantizedLinear) else len(table)
        mine = at - jax.lax.axis_index(axes).astype(jnp.int32) * count
        inside = (mine >= 0) & (mine < count)
        found = take(table, jnp.where(inside, mine, 0))
        return jax.lax.psum(jnp.where(inside[..., None], found, jnp.zeros_like(found)), axes)

    return jax.shard_map(run, in_specs=(specs, rows), out_specs=rows, check_vma=False)(table, at)
