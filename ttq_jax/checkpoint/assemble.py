"""From named tensors to the parameter tree, a few rows at a time.

The tree's shapes come from `decoder.init_params`; each leaf is allocated once in its final layout
(layers stacked, kernels [d_in, d_out]) and filled in place, so no second copy of the weights ever
exists.
"""

import dataclasses
import fnmatch
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.fingerprint import places, said
from ttq_jax.checkpoint.placing import Memory, Parts, allocate, parts_of, placed, shardings
from ttq_jax.checkpoint.source import Source
from ttq_jax.config import ModelConfig
from ttq_jax.foreign import named
from ttq_jax.models.decoder import init_params
from ttq_jax.models.family import Edit
from ttq_jax.partition import TABLE, kernel_specs
from ttq_jax.quant.head import BLOCK, pack_columns
from ttq_jax.types import SITE_OF, Params, QuantizedLinear

Progress = Callable[[int, int, str], None]
# (what to fill, tensor name, its first row there, first row to read, row after the last)
_Job = tuple[list["_Target"], str, int, int, int]

_SUFFIX = {"kernel": ".weight", "embedding": ".weight", "scale": ".weight", "bias": ".bias"}
# Small enough for a chunk and its temporaries to stay in a core's cache.
_CHUNK = 2**18
# What `quant.head` packs.
_TABLES = (("embed", "embedding"), ("head", "kernel"))
_TOGETHER = "configuration and weights are of the same model"


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """One array of the tree and where its parts come from."""

    path: tuple[str, ...]
    stack: tuple[int, ...]  # its axes over layers and experts
    shape: tuple[int, ...]  # of one element of the stack
    names: tuple[str, ...]  # one per element
    edit: Edit | None
    first: int = 0  # row of the tensor; below it are those of others, or of nobody
    stored_rows: int = 0
    together: int = 0  # one layer's experts, if a tensor holds them all

    @property
    def transposed(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def rows(self) -> int:
        """How many rows of each tensor in the file are this leaf's."""
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the array."""
        return (*self.stack, *self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the file."""
        row = self.shape[-2::-1] if self.transposed else self.shape[1:]
        experts = (self.together,) if self.together else ()
        return (*experts, self.stored_rows, *row)


def _leaves(
    config: ModelConfig, modules: Mapping[str, str], edits: Mapping[str, Edit]
) -> list[_Leaf]:
    """The arrays to fill, from the tree that the config implies."""
    tree = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves = []
    for keys, spec in jax.tree_util.tree_leaves_with_path(tree):
        path = tuple(str(k.key) for k in keys)
        module = ".".join(path[:-1])
        name = modules[module] + _SUFFIX[path[-1]]
        own = 2 if path[-1] in {"kernel", "embedding"} else 1
        stack, shape = spec.shape[: spec.ndim - own], spec.shape[spec.ndim - own :]
        places = itertools.product(*map(range, stack))
        names = tuple(name.format(**dict(zip("ie", at, strict=False))) for at in places)
        together = stack[1] if len(stack) == 2 and "{e}" not in name else 0
        leaves.append(_Leaf(path, stack, shape, names, edits.get(module), together=together))
    return _placed(leaves)


def _placed(leaves: list[_Leaf]) -> list[_Leaf]:
    """Says which rows are each leaf's: leaves that name one tensor lie in it one after another."""
    order = {name: i for i, name in enumerate(SITE_OF)}
    taken: dict[str, int] = {}
    placed = {}
    for leaf in sorted(leaves, key=lambda leaf: order.get(leaf.path[-2], 0)):
        first = taken.get(leaf.names[0], 2 if leaf.edit == "skip_two_rows" else 0)
        taken[leaf.names[0]] = first + leaf.rows
        placed[leaf.path] = first
    return [
        dataclasses.replace(leaf, first=placed[leaf.path], stored_rows=taken[leaf.names[0]])
        for leaf in leaves
    ]


def _check_sizes(config: ModelConfig, source: Source) -> None:
    """Compares the configuration's sizes with what the file holds, before anything is built.

    Raises:
      CheckpointError: the file cannot hold a model of that size.
    """
    longest = max(
        (n for shape in source.shapes.values() if 0 not in shape for n in shape), default=0
    )
    heads = config.n_heads * config.head_dim
    for what, size, most in (
        ("layers", config.n_layers, len(source.shapes)),
        ("tokens in the vocabulary", config.vocab_size, longest),
        ("channels", max(config.d_model, config.embed_dim), longest),
        ("channels in all its heads", heads, longest),
        ("channels in the feed-forward layer", config.d_ff, longest),
        ("experts", config.n_experts, longest),
        ("positions", 1 if config.rope else config.max_positions, longest),
    ):
        if size > most:
            raise CheckpointError(
                f"{source.label}: the configuration has {size} {what}, but the weights are of at "
                f"most {most}. Check that {_TOGETHER}"
            )


def _check(source: Source, leaves: list[_Leaf], ignored: tuple[str, ...]) -> None:
    """Checks that the file has every expected tensor in its shape, and no others.

    Raises:
      CheckpointError: a tensor is missing, unknown, or of another shape than expected.
    """
    expected = {name: leaf.stored_shape for leaf in leaves for name in leaf.names}
    missing = [n for n in expected if n not in source.shapes]
    if missing:
        n = missing[0]
        raise CheckpointError(
            f"{source.label}: missing tensor{'s' if len(missing) > 1 else ''} {named(missing)} "
            f"(expected {n} with shape {expected[n]}). Check that the checkpoint is complete and "
            f"that {_TOGETHER}"
        )
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise CheckpointError(
                f"{source.label}: tensor {name}: expected shape {shape}, "
                f"found {source.shapes[name]}. Check that {_TOGETHER}"
            )
    unknown = sorted(
        n for n in set(source.shapes) - set(expected)
        if not any(fnmatch.fnmatchcase(n, pattern) for pattern in ignored)
    )  # fmt: skip
    if unknown:
        raise CheckpointError(
            f"{source.label}: unknown tensor{'s' if len(unknown) > 1 else ''} {named(unknown)}: "
            "the model code does not use it, so its results might be wrong. Check that "
            f"{_TOGETHER}"
        )


@dataclasses.dataclass(frozen=True)
class _Target:
    """A part of one element of a leaf's stack, by the rows of its tensor."""

    out: np.ndarray  # [rows, *row]
    rows: tuple[int, int]
    row: tuple[slice, ...]

    def put(self, rows: np.ndarray, start: int, stop: int) -> None:
        """Writes what it takes of the tensor's rows from start on."""
        first, last = max(start, self.rows[0]), min(stop, self.rows[1])
        if first < last:
            mine = rows[(slice(first - start, last - start), *self.row)]
            self.out[first - self.rows[0] : last - self.rows[0]] = mine


def _targets(leaf: _Leaf, parts: Parts, element: int) -> list[_Target]:
    """The parts that hold some of one element of the stack."""
    at = np.unravel_index(element, leaf.stack) if leaf.stack else ()
    found = []
    for box, array in parts.boxes.items():
        stack, axes = box[: len(leaf.stack)], box[len(leaf.stack) :]
        if all(first <= i < last for i, (first, last) in zip(at, stack, strict=True)):
            own = array[tuple(i - first for i, (first, _) in zip(at, stack, strict=True))]
            rows, *row = axes[::-1] if leaf.transposed else axes
            cut = tuple(slice(*one) for one in row)
            found.append(_Target(own.T if leaf.transposed else own, rows, cut))
    return found


def _edited(rows: np.ndarray, edit: Edit | None, head_dim: int) -> np.ndarray:
    """A chunk of rows after the family's edit."""
    if edit == "minus_one":
        return rows.astype(np.float32) - 1
    if edit == "unpermute":
        pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)
    return rows


def _fill(source: Source, leaf: _Leaf, head_dim: int, job: _Job) -> int:
    """Reads rows into their place in a layer's array; returns their number of elements.

    Raises:
      CheckpointError: a weight is NaN or infinite.
    """
    targets, name, first, start, stop = job
    rows = source.read(name, first + start, first + stop)
    if not np.isfinite(rows).all():
        raise CheckpointError(
            f"{source.label}: tensor {name} holds NaN or infinity; expected finite weights. "
            "Download the checkpoint again or use another"
        )
    rows = _edited(rows, leaf.edit, head_dim)
    for target in targets:
        target.put(rows, start, stop)
    return rows.size


def _jobs(leaf: _Leaf, parts: Parts, head_dim: int) -> Iterator[_Job]:
    """Chunks of rows that one thread reads at a time; what nobody here holds is not read."""
    n_rows, size = leaf.rows, math.prod(leaf.shape)
    step = n_rows if len(leaf.shape) == 1 else max(1, _CHUNK * n_rows // size)
    if leaf.edit == "unpermute":
        step = -(-step // head_dim) * head_dim
    for i, name in enumerate(leaf.names):
        targets = _targets(leaf, parts, i)
        first = leaf.first + (i % leaf.together * leaf.stored_rows if leaf.together else 0)
        for start in range(0, n_rows, step):
            stop = min(start + step, n_rows)
            if any(start < t.rows[1] and t.rows[0] < stop for t in targets):
                yield targets, name, first, start, stop


_pack = jax.jit(pack_columns, static_argnames="bits")


def _packed(
    leaf: _Leaf, fill: Callable[[_Leaf, Parts], None], dtype: np.dtype, bits: int
) -> tuple[QuantizedLinear, str, bytes]:
    """A table that is packed while it is read, so that it never exists as a whole.

    Returns:
      The packed table, its path, and what its fingerprint says of it.
    """
    axis, n = (1 if leaf.transposed else 0), leaf.rows
    size, out = min(BLOCK, n), None
    at = places(leaf.shape)
    sample = np.zeros(at[0].shape, dtype)
    for begin in range(0, n, size):
        start = min(begin, n - size)
        shape = (leaf.shape[0], size) if leaf.transposed else (size, leaf.shape[1])
        parts = parts_of(shape, dtype, None)
        fill(dataclasses.replace(leaf, shape=shape, first=leaf.first + start), parts)
        (rows,) = parts.boxes.values()
        here = (at[axis] >= start) & (at[axis] < start + size)
        inside = [i[here] - (start if j == axis else 0) for j, i in enumerate(at)]
        sample[here] = rows[tuple(inside)]
        given = jax.device_put(rows if leaf.transposed else rows.T)
        made = dataclasses.replace(_pack(given, bits=bits), d_out=n)
        if out is None:
            wide = lambda a: allocate((*a.shape[:-1], n), a.dtype)  # noqa: E731
            out = jax.tree.map(wide, made)
        blocks = jax.device_get(jax.tree.leaves(made))
        for whole, block in zip(jax.tree.leaves(out), blocks, strict=True):
            whole[..., start : start + size] = block
    assert out is not None
    name = "".join(f"[{key!r}]" for key in leaf.path)
    return out, name, said(name, leaf.shape, sample)


def assemble(
    config: ModelConfig,
    source: Source,
    modules: Mapping[str, str],
    edits: Mapping[str, Edit],
    *,
    ignored: tuple[str, ...] = (),
    dtype: Any = np.float32,
    progress: Progress | None = None,
    head: int | None = None,
    mesh: Mesh | None = None,
    memory: Memory = "device",
) -> tuple[Params, dict[str, bytes]]:
    """Loads a parameter tree.

    Args:
      config: the model's.
      source: the checkpoint's tensors.
      modules: dotted module path in the tree to module name in the checkpoint.
      edits: module path to what is done to its tensors' rows.
      ignored: patterns of tensors that are left out on purpose.
      dtype: of every leaf, float32 or bfloat16.
      progress: called as progress(done, total, "weights"), in elements.
      head: packs the vocabulary's tables in this many bits, see `Recipe.head`; None for dense ones.
      mesh: whose devices share the arrays, see `partition`; None for the default device alone. A
        process reads what its own devices hold, and has in its memory that and one array.
      memory: of the blocks' kernels, see `placing`.

    Returns:
      A tree of the form of `decoder.init_params`, on its devices; and of each packed table, by
      path, what its fingerprint says of it.

    Raises:
      CheckpointError: a tensor is missing, unknown, of another shape, or not finite.
    """
    _check_sizes(config, source)
    leaves = _leaves(config, modules, edits)
    _check(source, leaves, ignored)
    total = sum(int(np.prod(leaf.shape)) * len(leaf.names) for leaf in leaves)
    params: Params = {}
    tables: dict[str, bytes] = {}
    done = 0

    def fill(leaf: _Leaf, parts: Parts) -> None:
        nonlocal done
        jobs = _jobs(leaf, parts, config.head_dim)
        for size in pool.map(partial(_fill, source, leaf, config.head_dim), jobs):
            done = min(done + size, total)
            if progress:
                progress(done, total, "weights")

    kind = np.dtype(jnp.dtype(dtype))
    where = shardings(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), mesh, memory)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for leaf in leaves:
            out: Any
            if head is not None and leaf.path in _TABLES:
                out, name, entry = _packed(leaf, fill, kind, head)
                tables[name] = entry
                out = placed(out, kernel_specs(out, TABLE, ()), mesh)
                if mesh is not None:
                    out = dataclasses.replace(out, split=TABLE)
            else:
                parts = parts_of(leaf.whole, kind, where[leaf.path])
                fill(leaf, parts)
                out = parts.on_devices()
            node = params
            for key in leaf.path[:-1]:
                node = node.setdefault(key, {})
            node[leaf.path[-1]] = out
    return params, tables
