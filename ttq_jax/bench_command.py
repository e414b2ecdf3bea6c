"""`ttq bench kernels`: what the kernels of this package reach, as text or as JSON lines."""

import argparse
from typing import Any

import jax

from ttq_jax.bench import Case, estimate, sweep
from ttq_jax.bench_device import measure
from ttq_jax.config import ConfigError
from ttq_jax.progress import Progress
from ttq_jax.report import print_json, print_text, table, versions


def _shape(text: str) -> tuple[int, int]:
    """A shape given as KxN.

    Raises:
      ConfigError: it is none.
    """
    k, _, n = text.lower().partition("x")
    if not (k.isdecimal() and n.isdecimal()):
        raise ConfigError(f"shape: expected KxN as in 4096x4096, got {text!r}")
    return int(k), int(n)


def _cases(args: argparse.Namespace) -> list[Case]:
    """The problems that the options describe.

    Raises:
      ConfigError: one that no kernel has.
    """
    shapes = None if args.shape is None else [_shape(s) for s in args.shape]
    try:
        return sweep(
            kernels=args.kernel, bits=args.bits, group_sizes=args.group_size, rows=args.m,
            shapes=shapes, symmetric=args.symmetric,
        )  # fmt: skip
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _text(records: list[dict[str, Any]], measured: bool) -> str:
    """The records as a table."""
    numbers = (
        ["us", "vs dense", "vs xla"] if measured else ["cycles", "floor", "of floor", "vs bf16"]
    )
    rows = [["kernel", "bits", "group", "m", "k", "n", *numbers, "of matmul", "block"]]
    if measured:
        rows[0].remove("of matmul")
    for r in records:
        shown = lambda v, form: "-" if v is None else format(v, form)  # noqa: E731
        group = f"{r['group_size']}{' sym' if r['symmetric'] else ''}"
        row = [r["kernel"], str(r["bits"]), group, *(str(r[x]) for x in "mkn")]
        if measured:
            row += [f"{r['microseconds']['kernel']:.1f}", shown(r["speedup_vs_dense"], ".2f"),
                    shown(r["speedup_vs_xla"], ".2f")]  # fmt: skip
        else:
            row += [shown(r["cycles"], ","), shown(r["floor_cycles"], ","),
                    shown(r["fraction_of_floor"], ".0%"), shown(r["speedup_vs_bf16"], ".2f"),
                    shown(r.get("ratio_to_matmul"), ".3f")]  # fmt: skip
        rows.append([*row, r["block"]])
    return table(rows)


def run_bench(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq bench kernels`.

    Args:
      args: its options.
      progress: where to show it.
    """
    cases, measured = _cases(args), args.chip in {"gpu", "cpu"}
    if not measured:
        # The estimates are compiled in children, which must find no running backend.
        jax.config.update("jax_platforms", "cpu")
    verb = "measuring" if measured else "compiling"
    with progress.stage(f"{verb} {len(cases)} cases for {args.chip}") as update:
        found = measure if measured else estimate
        records = found(cases, args.chip, progress=update)
    if args.json:
        for record in records:
            print_json(record | {"versions": versions()})
        return
    print_text(_text(records, measured))
    if not measured:
        print_text(
            "\ncycles: the compiler's static estimate, not checked on hardware; floor: every stored"
            "\nbyte once over the memory's bandwidth; fractions count the larger of the two"
        )
