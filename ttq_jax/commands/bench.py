"""`ttq bench kernels`: the speed of the kernels, as text or as JSON lines."""

import argparse
from typing import Any

import jax

from ttq_jax.chips.comparison import Case, estimate, sweep
from ttq_jax.chips.device_times import measure
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.describe import table, versions
from ttq_jax.evaluation.progress import Progress


def _shape(text: str) -> tuple[int, int]:
    """A shape given as KxN.

    Raises:
      ConfigError: it has another form.
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
            shapes=shapes, symmetric=args.symmetric, scales=args.scales,
        )  # fmt: skip
    except ValueError as e:
        raise ConfigError(str(e)) from e


def _shown(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _numbers(record: dict[str, Any], measured: bool) -> list[str]:
    """The cells of a record that differ between estimates and measurements."""
    if measured:
        return [_shown(record["microseconds"].get("kernel"), ".1f"),
                _shown(record["speedup_vs_dense"], ".2f"),
                _shown(record["speedup_vs_xla"], ".2f")]  # fmt: skip
    return [_shown(record["cycles"], ","), _shown(record["floor_cycles"], ","),
            _shown(record["fraction_of_floor"], ".0%"), _shown(record["speedup_vs_bf16"], ".2f"),
            _shown(record.get("ratio_to_matmul"), ".3f")]  # fmt: skip


def _text(records: list[dict[str, Any]], measured: bool) -> str:
    """The records as a table, with their notes below it."""
    numbers = (
        ["us", "vs dense", "vs xla"]
        if measured
        else ["cycles", "floor", "of floor", "vs bf16", "of matmul"]
    )
    rows = [["kernel", "bits", "group", "m", "k", "n", *numbers, "block"]]
    notes: list[str] = []
    for r in records:
        group = f"{r['group_size']}{' sym' if r['symmetric'] else ''}"
        group += "" if r["scales"] == "float" else f" {r['scales']}"
        mark = ""
        if "note" in r:
            if r["note"] not in notes:
                notes.append(r["note"])
            mark = f" [{notes.index(r['note']) + 1}]"
        row = [r["kernel"], str(r["bits"]), group, *(str(r[x]) for x in "mkn")]
        rows.append([*row, *_numbers(r, measured), f"{r['block']}{mark}".strip()])
    lines = [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
    return "\n".join([table(rows), *lines])


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq bench kernels`.

    Args:
      args: its options.
      progress: where to show it.
    """
    cases, measured = _cases(args), args.chip in {"gpu", "cpu"}
    if not measured:
        # The estimates are compiled in children, which must find no running backend.
        jax.config.update("jax_platforms", "cpu")
    made_by = versions(*([] if measured else ["libtpu"]))
    verb = "measuring" if measured else "compiling"
    with progress.stage(f"{verb} {len(cases)} cases for {args.chip}") as update:
        found = measure if measured else estimate
        records = found(cases, args.chip, progress=update)
    if args.json:
        for record in records:
            print_json(record | {"versions": made_by})
        return
    print_text(_text(records, measured))
    if not measured:
        print_text(
            f"\ncycles: the static estimate of libtpu {made_by['libtpu']}, not checked on hardware"
            "\nfloor: the cycles that the memory needs to move every stored byte once"
            "\nof floor, vs bf16, of matmul: ratios; a program counts as its cycles or its floor, "
            "whichever is larger"
        )
