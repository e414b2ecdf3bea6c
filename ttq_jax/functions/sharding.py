"""How a function's parameters lie on a mesh, and what that makes of their packed weights.

A product's weight is a matrix, which devices may share by whole runs of its columns, or of its
rows; of a stack of experts, by whole experts. So the axes of a parameter's sharding are followed
through the steps that lead to the product. What does not end in such runs is refused, with its
name: packed planes could not be cut alike.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding

from ttq_jax.functions.sites import Operand
from ttq_jax.functions.trace import FunctionError
from ttq_jax.mesh import check_rows
from ttq_jax.partition import Split
from ttq_jax.quant.recipe import Recipe

# The mesh axes of each axis of an array.
Axes = list[tuple[str, ...]]


class _RefusedError(Exception):
    """A step after which no run of a matrix is a device's own; the message says which."""


def sharding_of(path: str, leaf: Any, given: Any = None) -> NamedSharding | None:
    """Where a parameter lies, if that is on a mesh of several devices.

    Args:
      path: of the parameter.
      leaf: an array, maybe of a program that is being traced.
      given: its sharding, as the user says; None to look.

    Returns:
      Its sharding; None for one device, and for what nobody can see inside of a program.

    Raises:
      FunctionError: another kind of sharding than a `NamedSharding` of automatic axes.
    """
    found = given
    if given is None and not isinstance(leaf, jax.core.Tracer):
        found = getattr(leaf, "sharding", None)
    elif given is None and any(axis is not None for axis in jax.typeof(leaf).sharding.spec):
        found = jax.typeof(leaf).sharding
    if found is None or isinstance(found, SingleDeviceSharding) or found.num_devices == 1:
        return None
    if not isinstance(found, NamedSharding):
        raise FunctionError(
            f"{path} is on several devices by a {type(found).__name__}: expected a NamedSharding, "
            "which says by which axes of a mesh it is split; put it there with jax.device_put"
        )
    if any(kind != AxisType.Auto for kind in found.mesh.axis_types):
        raise FunctionError(
            f"{path} is sharded over explicit axes of a mesh ({found.spec}): expected automatic "
            "ones, for which no product has to name its output's sharding; make the mesh with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(found.mesh.axis_names)}"
        )
    return found


def unseen_mesh(leaf: Any) -> str:
    """The mesh of several devices over which a traced parameter may be split, in words, or ""."""
    if not isinstance(leaf, jax.core.Tracer):
        return ""
    mesh = jax.typeof(leaf).sharding.mesh
    automatic = {axis: mesh.shape[axis] for axis in mesh.auto_axes}
    return str(automatic) if max(automatic.values(), default=1) > 1 else ""


def split_of(operand: Operand, sharding: NamedSharding, shape: tuple[int, ...]) -> Split:
    """How the devices share the matrix that a product reads.

    Args:
      operand: how it reads the parameter.
      sharding: of the parameter.
      shape: of the parameter.

    Returns:
      The mesh axes of its rows, columns and experts, and the mesh.

    Raises:
      FunctionError: devices do not have runs of rows or of columns, or whole experts.
    """
    try:
        return _followed(operand, sharding, shape)
    except _RefusedError as e:
        raise FunctionError(
            f"{operand.path} is sharded as {sharding.spec}, and read as {operand}: {e}; shard it "
            "by its product's input channels, its output channels or whole experts, or leave it "
            "out of select"
        ) from None


def _followed(operand: Operand, sharding: NamedSharding, shape: tuple[int, ...]) -> Split:
    """`split_of`.

    Raises:
      _RefusedError: see there.
    """
    mesh, spec = sharding.mesh, [*sharding.spec, *[None] * len(shape)]
    axes: Axes = [_several(spec[d], mesh) for d in range(len(shape))]
    for step in operand.steps:
        axes, shape = _after(step, axes, shape, mesh)
    found = Split(
        _run(operand.contract, axes, operand.shape, "input channels"),
        _run(operand.free, axes, operand.shape, "output channels"), mesh,
        _run(operand.batch, axes, operand.shape, "experts"),
    )  # fmt: skip
    if found.experts and (found.rows or found.columns):
        raise _RefusedError("its experts are dealt out, and so are the channels of each")
    return found


def _several(entry: Any, mesh: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec that have several devices."""
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(axis for axis in names if mesh.shape[axis] > 1)


def _after(
    step: tuple[Any, ...], axes: Axes, shape: tuple[int, ...], mesh: Any
) -> tuple[Axes, tuple[int, ...]]:
    """Mesh axes and shape after a step.

    Raises:
      _RefusedError: what a device has after it is no run.
    """
    name, *how = step
    if name == "transpose":
        return [axes[d] for d in how[0]], tuple(shape[d] for d in how[0])
    if name == "reshape":
        return _reshaped(axes, shape, tuple(how[0]), mesh), tuple(how[0])
    if name == "slice":
        cuts = list(zip(*how, strict=True))
        if any(axes[d] and cut != (0, shape[d], 1) for d, cut in enumerate(cuts)):
            raise _RefusedError("what is sliced of an axis that devices share is on some of them")
        return axes, tuple(-(-(stop - start) // step) for start, stop, step in cuts)
    at = how[0]
    if axes[at]:
        raise _RefusedError("its layers are dealt out, and each has to be on all devices")
    return [*axes[:at], *axes[at + 1 :]], (*shape[:at], *shape[at + 1 :])


def _reshaped(axes: Axes, before: tuple[int, ...], after: tuple[int, ...], mesh: Any) -> Axes:
    """Mesh axes after axes were joined or taken apart.

    Raises:
      _RefusedError: a shared axis comes after another one in what is joined, or does not divide.
    """
    out: Axes = [()] * len(after)
    ins = [d for d, n in enumerate(before) if n > 1]
    outs = [d for d, n in enumerate(after) if n > 1]
    while ins and outs:
        # The fewest axes of both that are the same numbers.
        joined, first = [ins.pop(0)], outs.pop(0)
        n, m = before[joined[0]], after[first]
        while n != m:
            if n < m:
                joined.append(ins.pop(0))
                n *= before[joined[-1]]
            else:
                m *= after[outs.pop(0)]
        shared = [d for d in joined if axes[d]]
        if not shared:
            continue
        count = math.prod(mesh.shape[axis] for axis in axes[joined[0]])
        if shared != joined[:1]:
            raise _RefusedError("an axis that devices share is joined to one before it")
        if after[first] % count:
            raise _RefusedError(f"{count} devices cannot share an axis of {after[first]}")
        out[first] = axes[joined[0]]
    return out


def _run(dims: tuple[int, ...], axes: Axes, shape: tuple[int, ...], what: str) -> tuple[str, ...]:
    """The mesh axes of several axes of an operand as one.

    Raises:
      _RefusedError: one after the first is shared.
    """
    long = [d for d in dims if shape[d] > 1]
    if any(axes[d] for d in long[1:]):
        raise _RefusedError(f"a device's {what} are not one run of the matrix")
    return axes[long[0]] if long else ()


def splits_of(
    shardings: Mapping[str, NamedSharding], leaves: Mapping[str, Any], operands: Iterable[Operand],
    recipe: Recipe,
) -> dict[Operand, Split]:  # fmt: skip
    """How the devices share what is packed.

    Args:
      shardings: of the parameters on a mesh, by path.
      leaves: the parameters, by path.
      operands: what is packed.
      recipe: how.

    Returns:
      By operand; without those on one device, and without experts whose channels devices share.

    Raises:
      FunctionError: parameters of two meshes, or see `split_of`.
      ConfigError: a group of input channels would lie on several devices.
    """
    found: dict[Operand, Split] = {}
    meshes: dict[Any, str] = {}
    for operand in sorted(operands, key=lambda one: (one.path, str(one))):
        if operand.path not in shardings:
            continue
        sharding = shardings[operand.path]
        meshes.setdefault(sharding.mesh, operand.path)
        if len(meshes) > 1:
            one, other = meshes.values()
            raise FunctionError(
                f"{one} and {other} are on two meshes: expected one mesh for all; put them on it "
                "with jax.device_put"
            )
        split = split_of(operand, sharding, tuple(leaves[operand.path].shape))
        check_rows(operand.path, operand.d_in, recipe.grid.group_size, split)
        # Only whole experts are mapped over devices: XLA's partitioner does the others.
        if operand.experts is None or not (split.rows or split.columns):
            found[operand] = split
    return found


def of_experts(operands: tuple[Operand, ...], splits: tuple[Split | None, ...]) -> Split | None:
    """How the devices share the experts that read one input.

    Args:
      operands: of one site.
      splits: theirs.

    Returns:
      What is theirs together; None for XLA's partitioner, and where there are no experts.

    Raises:
      FunctionError: they are not shared alike.
    """
    if operands[0].experts is None:
        return None
    for operand, split in zip(operands, splits, strict=True):
        if split != splits[0]:
            raise FunctionError(
                f"the experts of {operands[0].path} and {operand.path} read one input, and devices "
                f"share them as {_said(splits[0])} and as {_said(split)}: expected one sharding of "
                "both, for they are packed together; put them so with jax.device_put"
            )
    return splits[0]


def _said(split: Split | None) -> str:
    """Which experts a device has."""
    if split is None:
        return "parts of each expert"
    return f"runs of them over {', '.join(split.experts)}" if split.experts else "all on each"
