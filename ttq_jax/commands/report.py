"""`ttq report`: shows a sweep's rows as tables and pictures."""

import argparse
from pathlib import Path

from ttq_jax.commands.options import check_file
from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.progress import Progress
from ttq_jax.sweeps.checked import checked
from ttq_jax.sweeps.findings import parts_of
from ttq_jax.sweeps.page import write
from ttq_jax.sweeps.rows import Row, read_rows


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq report`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: no rows, rows that contradict themselves, no matplotlib to draw them with, or a
        directory that cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as e:
        raise ConfigError(
            'ttq report needs matplotlib, which is not installed; run: pip install "ttq-jax[plots]"'
        ) from e
    rows: dict[str, Row] = {}
    directories = [Path(name).expanduser() for name in args.directories]
    for directory in directories:
        found = read_rows(directory)
        if not found:
            raise ConfigError(
                f"{directory}: expected the rows of a sweep (rows.jsonl), found none; ttq sweep "
                f"FILE.toml --out {directory} makes them"
            )
        rows |= found
    made = checked(rows.values(), ", ".join(map(str, directories)))
    check_file(str(directories[0] / "report.html"))
    with progress.stage(f"drawing {len(rows)} cells"):
        title = f"ttq sweep: {directories[0].resolve().name}"
        parts = parts_of(made)
        try:
            page, text = write(directories[0], title, parts)
        except OSError as e:
            raise ConfigError(f"{directories[0]}: cannot be written: {e.strerror}") from e
    if args.json:
        print_json({"cells": len(rows), "html": str(page), "markdown": str(text)})
    else:
        print_text(f"{page}\n{text}")
