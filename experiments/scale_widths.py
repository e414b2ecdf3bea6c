"""How many bits a group's scale and zero point should take, at equal stored bits.

Claim     at 3 bits and below, four bits for a scale and four for a zero point in groups half as
          wide leave 25 to 78 % less of the gap; at 4 bits the intervals overlap.
Command   python experiments/scale_widths.py --model smollm2 --corpus wikitext2=FILE …
              --windows 8 --out experiments/results/scale_widths_smollm2.jsonl
          python experiments/scale_widths.py --report experiments/results/scale_widths_smollm2.jsonl
          python experiments/scale_widths.py … --built-in --grid 3-4-4-32 --grid 4-4-4-32
              --out experiments/results/built_in_widths_smollm2.jsonl
Cost      SmolLM2 on one core, 8 windows of four texts: about 35 minutes.
Expect    a row per grid and corpus. `--report` prints their gaps: 3-bit codes at 3.30 bits 0.690
          with scales of 8 bits, 0.510 with 6 and 0.447 with 4.

Widths are simulated: a rounding of its own fits scales and zero points that have so many levels,
and keeps them as float32 numbers; the bits are counted as they would be stored. Eight and four bits
are built in too, and `--built-in` measures those. The channel scale, the prior and the clip search
are those of `fast`.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from quality import Results, corpus_text, gaps, interval, protocol_data, spread

import ttq_jax as ttq
from ttq_jax.evaluation.describe import device, table, versions
from ttq_jax.evaluation.perplexity import Protocol, window_nll
from ttq_jax.files import check_destination
from ttq_jax.offline.calibrate import prepare
from ttq_jax.quant.clip import shrink_factors
from ttq_jax.quant.grid import Grid, decode, encode, split_groups
from ttq_jax.sweeps.words import fixed
from ttq_jax.types import kernels

# Grids of equal stored bits: (bits of a code, of a scale, of a zero point, group). A zero point of
# 0 bits is symmetric.
GRIDS = (
    (2, 8, 8, 64), (2, 6, 6, 48), (2, 4, 4, 32), (2, 4, 0, 16), (2, 8, 0, 32),
    (3, 8, 8, 64), (3, 6, 6, 48), (3, 4, 4, 32), (3, 4, 0, 16), (3, 8, 0, 32),
    (3, 8, 8, 32), (3, 6, 6, 24), (3, 4, 4, 16),
    (4, 8, 8, 64), (4, 6, 6, 48), (4, 4, 4, 32), (4, 4, 0, 16), (4, 8, 0, 32),
)  # fmt: skip


def named(grid: tuple[int, ...]) -> str:
    """A grid's name: its four numbers, with dashes."""
    return "-".join(map(str, grid))


def grid_named(name: str) -> tuple[int, ...]:
    """The grid of a name.

    Raises:
      SystemExit: no name of a grid.
    """
    parts = name.split("-")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise SystemExit(f"--grid {name}: expected CODE-SCALE-ZERO-GROUP, as in 3-4-4-32")
    return tuple(map(int, parts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewLevels:
    """Clip search over scales and zero points that have few levels.

    Attributes:
      scale_bits: of a scale, a whole multiple of its column's largest over the number of levels.
      zero_bits: of a zero point, a fraction of the grid; 0 for a symmetric grid.
      steps: factors on a group's range, as in `ClipSearch`.
      smallest: the last factor.
    """

    scale_bits: int
    zero_bits: int
    steps: int = 5
    smallest: float = 0.6
    powers: ClassVar[tuple[float, ...]] = ()
    span: ClassVar[int] = 8  # of the Gram matrix only the diagonal is read

    def round(self, w: jax.Array, gram: jax.Array, grid: Grid) -> tuple[Any, Any, Any]:
        """Codes, scales and zero points of a scaled weight, see `SecondOrder.round`."""
        rows = grid.rows_per_group(len(w))
        groups, padding = split_groups(w, rows), -len(w) % rows
        h = jnp.diagonal(gram, axis1=1, axis2=2).reshape(-1)[: len(w)]
        h = jnp.pad(h, (0, padding)).reshape(-1, rows)
        low = jnp.minimum(jnp.min(groups, 1), 0.0)
        high = jnp.maximum(jnp.max(groups, 1), 0.0)
        top, most = 2**grid.bits - 1, 2**self.scale_bits - 1

        def step(low: jax.Array, high: jax.Array) -> jax.Array:
            wide = jnp.maximum(-low, high) / (2 ** (grid.bits - 1) - 1)
            return (high - low) / top if self.zero_bits else wide

        unit = jnp.max(step(low, high), 0, keepdims=True) / most
        unit = jnp.where(unit > 0, unit, 1.0)

        def fit(shrink: jax.Array) -> tuple[jax.Array, jax.Array]:
            scales = jnp.clip(jnp.round(step(low * shrink, high * shrink) / unit), 1, most) * unit
            if not self.zero_bits:
                return scales, jnp.full_like(scales, 2.0 ** (grid.bits - 1))
            levels = 2.0 ** (self.zero_bits - grid.bits)
            zeros = jnp.round(-low * shrink / scales * levels)
            return scales, jnp.clip(zeros, 0, 2**self.zero_bits - 1) / levels

        def error(shrink: jax.Array) -> jax.Array:
            scales, zeros = fit(shrink)
            wrong = groups - decode(encode(groups, scales, zeros, grid), scales, zeros)
            return jnp.einsum("gr,grn->gn", h, jnp.square(wrong), precision="highest")

        factors = jnp.asarray(shrink_factors(self.steps, self.smallest), jnp.float32)
        best = factors[jnp.argmin(jax.lax.map(error, factors), 0)]
        scales, zeros = fit(best)
        codes = encode(groups, scales, zeros, grid).astype(jnp.uint8)
        return codes.reshape(-1, w.shape[1]), scales, zeros


BUILT_IN = {8: "coded", 4: "coded4"}


def recipe_of(bits: int, scale: int, zero: int, group: int, *, built_in: bool) -> ttq.Recipe:
    """The preset `fast` on such a grid.

    Raises:
      SystemExit: a grid that is not built in.
    """
    made = ttq.preset("fast")
    assert made is not None, "fast quantizes"
    if built_in:
        if scale not in BUILT_IN or zero != scale:
            raise SystemExit(f"--built-in: expected 8 or 4 bits of each, got {scale} and {zero}")
        grid = Grid(bits=bits, group_size=group, scales=BUILT_IN[scale])
        return dataclasses.replace(made, grid=grid)
    rule: Any = FewLevels(scale_bits=scale, zero_bits=zero)
    grid = Grid(bits=bits, group_size=group, store_dtype="float32")
    return dataclasses.replace(made, grid=grid, rounding=rule)


def bits_of(model: ttq.Model, bits: int, scale: int, zero: int, group: int) -> float:
    """Bits per weight as they would be stored: codes, scales, zero points, 16 bits per column for
    the unit of its scales and 16 bits per row for D."""
    stored, weights = 0, 0
    for kernel in kernels(model.params["layers"]).values():
        layers, d_in, d_out = kernel.shape
        groups = math.ceil(d_in / group)
        one = groups * (group * bits + scale + zero) * d_out + 16 * (d_out + d_in)
        stored, weights = stored + layers * one, weights + layers * d_in * d_out
    return stored / weights


def measure(args: argparse.Namespace) -> None:
    """Scores every grid on every corpus; rows that are there are kept."""
    check_destination(args.out, parents=True)
    names = args.grid or list(map(named, GRIDS))
    grids = {"none": None} | {name: grid_named(name) for name in names}
    recipes = {
        name: None if grid is None else recipe_of(*grid, built_in=args.built_in)
        for name, grid in grids.items()
    }
    protocol = Protocol(window=args.window, prompt_tokens=args.prompt_tokens)
    model = ttq.load(args.model)
    store = Results(args.out)
    texts = dict(map(corpus_text, args.corpus))
    for name, grid in grids.items():
        recipe = recipes[name]
        offline = prepare(model, recipe)
        for corpus, text in texts.items():
            rows = store.read()
            if (name, corpus) in rows:
                continue
            windows = ttq.cut_windows(model.tokenizer, text, protocol.window)
            at = spread(len(windows), args.windows)
            nll = [
                window_nll(model, windows[i], recipe=recipe, offline=offline, protocol=protocol)
                for i in at
            ]
            bits = 32.0 if grid is None else round(bits_of(model, *grid), 4)
            rows[name, corpus] = {
                "model": args.model, "recipe_name": name, "corpus": corpus,
                "recipe": recipe.describe() if recipe and args.built_in else None,
                "protocol": protocol_data(protocol), "scored": protocol.scored,
                "effective_bits": bits, "windows": at, "nll": nll, "device": device(),
                "versions": versions(),
            }  # fmt: skip
            store.write(rows)
            print(name, corpus, np.mean(nll) / protocol.scored, flush=True)
        jax.clear_caches()


def report(path: Path) -> None:
    """Prints the gaps, narrowest grids first."""
    rows = Results(path).read()
    found = gaps(rows)
    cells = [["code", "scale", "zero point", "group", "bits", "gap", *found["none"]["by_corpus"]]]
    for grid in GRIDS:
        if named(grid) not in found:
            continue
        one = found[named(grid)]
        cells.append([
            *map(str, grid), f"{one['bits']:.2f}", interval(one),
            *(fixed(v, 3) for v in one["by_corpus"].values()),
        ])  # fmt: skip
    print(table(cells, left=0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=8, help="per corpus, default: %(default)s")
    parser.add_argument("--grid", action="append", metavar="CODE-SCALE-ZERO-GROUP",
                        help="bits of each, rows of a group (default: all kept)")  # fmt: skip
    parser.add_argument("--built-in", action="store_true", help="simulate nothing")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, help="a row per grid and corpus is kept here")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the table of such rows")
    args = parser.parse_args(argv)
    if args.report:
        report(args.report)
    elif not args.corpus or not args.out:
        parser.error("expected --corpus NAME=FILE and --out FILE, or --report FILE")
    else:
        measure(args)


if __name__ == "__main__":
    main()
