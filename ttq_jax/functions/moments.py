"""The hook that observes: it leaves a product to the user's function, and keeps its moments."""

from typing import Any

import jax
import jax.numpy as jnp

from ttq_jax.experts import for_each_expert, sort_by_expert
from ttq_jax.functions.packed import experts_of
from ttq_jax.functions.sites import Operand, Site
from ttq_jax.functions.trace import Evaluator, FunctionError, Product
from ttq_jax.quant.moments import Reads, observe, observe_expert


class Observing:
    """The hook.

    Attributes:
      operands: those that are observed.
      reads: what is summed; None keeps sites without moments.
      where: bool[B, T], True for real rows; None for all.
      seen: how often each operand was met in the program.
    """

    def __init__(self, operands: set[Operand] | None, reads: Reads | None, where: Any = None):
        self.operands, self.reads, self.where = operands, reads, where
        self.seen: dict[Operand, int] = {}

    def __call__(self, ev: Evaluator, product: Product) -> None:
        """Keeps the moments; the product is left to the user's function."""
        operand, kernel = product.operand, product.kernel
        if self.operands is not None and operand not in self.operands:
            return
        self.seen[operand] = self.seen.get(operand, 0) + 1
        scans = tuple(scan for scan in kernel.scans if scan is not None)
        chosen = [i for i, scan in zip(kernel.index, kernel.scans, strict=True) if scan is None]
        sizes = tuple(step[2] for step in operand.steps if step[0] == "at")[len(scans) :]
        key = (product.key, ev.key("index", *chosen), sizes, scans)
        site = ev.kept.get(key)
        if site is None:
            moments = self._stacked(product, list(zip(chosen, sizes, strict=True)))
            ev.kept[key] = Site(moments, (operand,), (product.source,), scans)
        elif operand not in site.operands:
            ev.kept[key] = site.and_also(operand, product.source)

    def _stacked(self, product: Product, chosen: list[tuple[Any, int]]) -> Any:
        """The moments; in their place of a stack, where the program itself chose a slice of it."""
        if self.reads is None:
            return None
        moments = self._moments(product)
        for i, n in reversed(chosen):
            put = lambda a, i=i, n=n: jnp.zeros((n, *a.shape), a.dtype).at[i].set(a)  # noqa: E731
            moments = jax.tree.map(put, moments)
        return moments

    def _moments(self, product: Product) -> Any:
        """Sums over the rows, for each expert where there are experts."""
        x, operand, reads = product.x, product.operand, self.reads
        assert reads is not None, "a survey sums nothing"
        if product.sizes is not None:
            return self._by_expert(product, reads)
        rows = x.shape[len(operand.batch) : -1]
        valid = self._valid(product, rows).reshape(-1)
        each = lambda x: observe(x.reshape(-1, operand.d_in), valid, reads)  # noqa: E731
        if operand.experts is None:
            return each(x)
        return jax.vmap(each)(x.reshape(operand.experts, *rows, operand.d_in))

    def _valid(self, product: Product, rows: tuple[int, ...]) -> Any:
        """bool[rows]: which are real.

        Raises:
          FunctionError: the mask does not say.
        """
        if self.where is None:
            return jnp.ones(rows, bool)
        mask = self.where
        if product.sizes is None and rows[: mask.ndim] == mask.shape:
            mask = mask.reshape(*mask.shape, *(1,) * (len(rows) - mask.ndim))
        elif product.sizes is None and rows[:1] == (mask.size,):
            mask = mask.reshape(-1, *(1,) * (len(rows) - 1))
        else:
            raise FunctionError(
                f"{product.operand.path}: rows {rows} of its input at {product.source} are not "
                f"those of the mask {mask.shape}; leave it out of select, or read prompts of one "
                "length without a mask"
            )
        return jnp.broadcast_to(mask, rows)

    def _by_expert(self, product: Product, reads: Reads) -> Any:
        """Those of a ragged product, as our own mixtures of experts make them."""
        x, sizes = product.x, product.sizes
        self._valid(product, x.shape[:-1])
        expert, real = experts_of(x, sizes)
        routed = sort_by_expert(x, expert[:, None], real, sizes.shape[0])[0]
        make = lambda e, _: observe_expert(routed, real[None], reads, e)  # noqa: E731
        return for_each_expert(make, None, sizes.shape[0])
