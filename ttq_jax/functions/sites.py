"""What is observed of a function: for each input of a product its moments, and who reads it.

An `Operand` says how a product reads a parameter. It names a kernel as a projection's name does in
our own decoder, but by what is done instead of by where. A `Site` is an input and the operands that
read it: they share the moments, D, and one wide rounding. Sites add, like their moments.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ttq_jax.errors import Error
from ttq_jax.types import Leaf

Step = tuple[Any, ...]
"""("transpose", axes), ("reshape", shape, shape before), ("slice", starts, ends, strides), or
("at", axis, size): one slice of a stack of that size, without the axis."""


def moved(w: Any, step: Step) -> Any:
    """A step on an array, JAX's or NumPy's; "at" moves the stack's axis to the front."""
    name, *how = step
    if name == "transpose":
        return w.transpose(how[0])
    if name == "reshape":
        return w.reshape(how[0])
    if name == "slice":
        return w[tuple(slice(*cut) for cut in zip(*how, strict=True))]
    return w.transpose((how[0], *(d for d in range(w.ndim) if d != how[0])))


def joined(before: tuple[Step, ...], after: tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps after others; reshaping twice is reshaping once, so that one reading has one name."""
    steps = list(before)
    for step in after:
        if step[0] == "reshape" and steps and steps[-1][0] == "reshape":
            step = ("reshape", step[1], steps.pop()[2])
        if step[0] != "reshape" or step[1] != step[2]:
            steps.append(step)
    return tuple(steps)


@dataclasses.dataclass(frozen=True)
class Operand:
    """How a product reads a parameter; hashable, and the same in every program.

    Attributes:
      path: of the leaf.
      steps: from the leaf to the operand.
      shape: of the operand.
      batch: its axes that are batched: experts.
      contract: those that are summed over: together d_in.
      free: the others: together d_out.
    """

    path: str
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contract: tuple[int, ...]
    free: tuple[int, ...]

    @property
    def kind(self) -> "Operand":
        """The operand named by nothing but its layout: equal layers of a model are one program."""
        return dataclasses.replace(self, path="")

    def size(self, axes: Iterable[int]) -> int:
        """Elements along some of its axes."""
        return int(np.prod([self.shape[d] for d in axes], dtype=int))

    @property
    def d_in(self) -> int:
        """Input channels."""
        return self.size(self.contract)

    @property
    def d_out(self) -> int:
        """Output channels."""
        return self.size(self.free)

    @property
    def experts(self) -> int | None:
        """Matrices along the batched axes; None where there are none."""
        return self.size(self.batch) if self.batch else None

    def matrix(self, w: Any) -> Any:
        """[d_in, d_out] of the operand's value; [experts, d_in, d_out] if it is batched."""
        w = w.transpose((*self.batch, *self.contract, *self.free))
        experts = () if self.experts is None else (self.experts,)
        return w.reshape(*experts, self.d_in, self.d_out)

    def places(self, shape: tuple[int, ...]) -> np.ndarray:
        """[*stacks, (experts,) d_in, d_out]: where each of its numbers is in the flat leaf."""

        def through(numbers: np.ndarray, steps: tuple[Step, ...]) -> np.ndarray:
            for i, step in enumerate(steps):
                numbers = moved(numbers, step)
                if step[0] == "at":
                    return np.stack([through(one, steps[i + 1 :]) for one in numbers])
            return self.matrix(numbers)

        return through(np.arange(np.prod(shape, dtype=np.int64)).reshape(shape), self.steps)

    def __str__(self) -> str:
        steps = ", ".join(" ".join(map(str, step[:2])) for step in self.steps)
        batched = f", batched over {self.batch}" if self.batch else ""
        after = f" after {steps}" if steps else ""
        return f"{self.shape} contracted over {self.contract}{batched}{after}"


@struct.dataclass
class Site:
    """The moments of one input, and the operands that it is multiplied with.

    Attributes:
      moments: with a leading axis for each "at" among an operand's steps, and one for experts; None
        where nothing was summed.
      operands: who reads it.
      sources: where in the user's code, one for each.
      scans: those that slice the operands and have not ended, the innermost last.
    """

    moments: Leaf
    operands: tuple[Operand, ...] = struct.field(pytree_node=False)
    sources: tuple[str, ...] = struct.field(pytree_node=False)
    scans: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def only(self, keep: Iterable[int]) -> "Site":
        """The site with some of its operands."""
        at = list(keep)
        pick = lambda items: tuple(items[i] for i in at)  # noqa: E731
        return Site(self.moments, pick(self.operands), pick(self.sources), self.scans)

    def and_also(self, operand: Operand, source: str) -> "Site":
        """The site with one operand more."""
        return Site(self.moments, (*self.operands, operand), (*self.sources, source), self.scans)


def added(a: Any, b: Any) -> Any:
    """Two pytrees of one structure, added."""
    return jax.tree.map(jnp.add, a, b)


def merged(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Sites in which every operand occurs once: one that several inputs reach has their sum.

    Args:
      sites: of one program.

    Returns:
      The sites, in the order of their first operands.
    """
    sites = list(sites)
    sources: dict[Operand, str] = {}
    read_at: dict[Operand, list[int]] = {}
    for i, site in enumerate(sites):
        for operand, source in zip(site.operands, site.sources, strict=True):
            sources.setdefault(operand, source)
            read_at.setdefault(operand, []).append(i)
    # Operands that meet the same inputs, all of them, stay together.
    together: dict[tuple[int, ...], list[Operand]] = {}
    for operand, inputs in read_at.items():
        together.setdefault(tuple(inputs), []).append(operand)
    out = []
    for at, operands in together.items():
        total = functools.reduce(added, [sites[i].moments for i in at])
        named = tuple(sources[operand] for operand in operands)
        out.append(Site(total, tuple(operands), named))
    return tuple(out)


@struct.dataclass
class Observed:
    """The moments of a function's products: a commutative monoid under `+`.

    Attributes:
      sites: one for each input.
    """

    sites: tuple[Site, ...]

    def __add__(self, other: "Observed") -> "Observed":
        """Moments of both sets of calls together.

        Raises:
          Error: a kernel shares its input with other kernels in one of them than in the other.
        """
        ours = {site.operands: site for site in self.sites}
        for site in other.sites:
            known = ours.get(site.operands)
            if known is not None:
                ours[site.operands] = dataclasses.replace(
                    known, moments=known.moments + site.moments
                )
                continue
            for operands in ours:
                if both := set(operands) & set(site.operands):
                    raise Error(
                        f"{min(one.path for one in both)}: expected observations of functions that "
                        f"read it alike, but it shares an input with {_paths(operands)} in one and "
                        f"with {_paths(site.operands)} in the other; observe one function"
                    )
            ours[site.operands] = site
        return Observed(tuple(ours.values()))

    def scaled(self, factor: jax.Array | float) -> "Observed":
        """The moments as if every row had been read `factor` times, factor >= 0."""
        return jax.tree.map(lambda a: a * factor, self)


def _paths(operands: tuple[Operand, ...]) -> str:
    return ", ".join(operand.path for operand in operands)
