"""`ttq sweep`: runs every cell of a grid once; can be interrupted and resumed."""

import argparse
import time
from pathlib import Path

from ttq_jax.commands.output import print_json, print_text
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import sha256
from ttq_jax.evaluation.describe import table
from ttq_jax.evaluation.perplexity import Perplexity
from ttq_jax.evaluation.progress import Progress, clock
from ttq_jax.mesh import parse, undivided
from ttq_jax.processes import ApartError, alike, expect_same
from ttq_jax.sweeps.axes import Cell, read_sweep, varying_axes
from ttq_jax.sweeps.rows import Row, SharedRows, read_rows, state
from ttq_jax.sweeps.run import Runner, git_commit, head_of


def _shard(text: str | None) -> tuple[int, int]:
    """(i, n) of "i/n".

    Raises:
      ConfigError: it is not 1 <= i <= n.
    """
    if text is None:
        return 1, 1
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ConfigError(f"--shard: expected I/N with 1 <= I <= N, as in 1/4, got {text!r}")
    return int(i), int(n)


def _of_others(cells: list[Cell], rows: dict[str, Row], runner: Runner) -> None:
    """Refuses rows whose model or text had the same name and other contents.

    Raises:
      ConfigError: there are such rows.
    """
    for cell in cells:
        row = rows.get(cell.key, {})
        # Rows of older versions do not say which model's they are.
        was = row.get("model", {}).get("fingerprint")
        if was and was != runner.origin(cell.options.model)["fingerprint"]:
            raise ConfigError(
                f"model {cell.values['model']}: expected the model of the rows in --out "
                f"({row['model'].get('file')}, fingerprint {was[:12]}…), got another; choose "
                "another --out, or another label"
            )
        for axis in ("corpus", "calibration"):
            was = row.get(f"{axis}_sha256")
            if was and was != sha256(runner.text(getattr(cell.options, axis))):
                raise ConfigError(
                    f"{axis} {cell.values[axis]}: expected the text of the rows in --out (sha256 "
                    f"{was[:12]}…), got another; choose another --out, or another label"
                )


class _Bar:
    """Cells done, the time left at this process's own pace, and the latest result."""

    def __init__(self, cells: list[Cell], done: int):
        self.total, self.done = len(cells), done
        self.axes = varying_axes(cells)
        self.ours, self.seconds, self.latest = 0, 0.0, ""

    def line(self, cell: Cell) -> str:
        left = ""
        if self.ours:
            left = f", {clock(self.seconds / self.ours * (self.total - self.done))} left"
        latest = f", last {self.latest}" if self.latest else ""
        return f"cell {self.done + 1} of {self.total}{left}{latest}: {cell.name(self.axes)}"

    def finish(self, row: Row, seconds: float) -> None:
        self.ours, self.done, self.seconds = self.ours + 1, self.done + 1, self.seconds + seconds
        self.latest = "failed" if "error" in row else f"{row['perplexity']:.3f}"


def _run_one(cell: Cell, runner: Runner, rows: SharedRows, bar: _Bar, progress: Progress) -> Row:
    """Runs a cell and writes its row; an error is a result too.

    Raises:
      ConfigError: the row cannot be written.
      ApartError: several processes are no longer at the same cell.
    """
    start = time.perf_counter()
    with progress.stage(bar.line(cell)) as update:

        def tell(running: Perplexity, total: int) -> None:
            update(running.windows, total, f"perplexity {running.perplexity:.3f}")

        try:
            row = alike(cell.name(bar.axes), lambda: runner.run(cell, tell))
        except ApartError:
            raise
        except Exception as e:
            row = head_of(cell, git_commit()) | {"error": f"{type(e).__name__}: {e}"}
    try:
        rows.append(row)
    except OSError as e:
        raise ConfigError(
            f"{rows.path}: cannot be written: {e.strerror}; {bar.done} of {bar.total} cells are "
            "kept; make room, or mend what is wrong there, and run the same command again"
        ) from e
    bar.finish(row, time.perf_counter() - start)
    return row


def _list(cells: list[Cell], done: dict[str, Row], as_json: bool) -> None:
    """What `--dry-run` prints."""

    def said(cell: Cell) -> str:
        illegal = cell.error and cell.key not in done
        return f"illegal: {cell.error}" if illegal else state(done.get(cell.key))

    if as_json:
        for cell in cells:
            print_json({"key": cell.key, "cell": cell.values, "state": said(cell)})
        return
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.values))
    rows = [[*axes, "state"]]
    rows += [[*(str(c.values.get(a, "-")) for a in axes), said(c)] for c in cells]
    print_text(table(rows, left=len(rows[0])))


def run(args: argparse.Namespace, progress: Progress) -> None:
    """`ttq sweep`.

    Args:
      args: its options.
      progress: where to show it.

    Raises:
      ConfigError: a sweep that cannot be read, rows of other texts, or cells that failed; their
        rows say why.
    """
    i, n = _shard(args.shard)
    cells = read_sweep(args.file, args.axis)[i - 1 :: n]
    directory = Path(args.out).expanduser()
    if args.dry_run:
        _list(cells, read_rows(directory), args.json)
        return
    expect_same("the cells of the sweep", [cell.name() for cell in cells])
    rows = SharedRows(directory, f"{i}of{n}" if n > 1 else "", progress.note)
    rows.repair()
    done = rows.read()
    mesh = None if args.mesh is None else parse(args.mesh)
    if note := undivided(mesh, 1):
        progress.note(note)
    runner = Runner(progress.note, mesh)
    alike("the rows in --out", lambda: _of_others(cells, done, runner))
    pending = {"to do", "failed"} if args.retry else {"to do"}
    left = [cell for cell in cells if state(done.get(cell.key)) in pending]
    bar = _Bar(cells, len(cells) - len(left))
    progress.note(f"{bar.done} of {bar.total} cells are done")

    def run_all(cells: list[Cell]) -> list[Cell]:
        """Runs what is pending; those that another process has claimed are returned."""
        claimed = []
        for cell in cells:
            with rows.claim(cell.key) as ours:
                if not ours:
                    claimed.append(cell)
                    continue
                # Another process may have finished it since.
                if rows.state(cell.key) not in pending:
                    bar.done += 1
                    continue
                row = _run_one(cell, runner, rows, bar, progress)
            if args.json:
                print_json(row)
        return claimed

    # Once more: the process that had claimed a cell may have been killed.
    claimed = run_all(run_all(left))
    _finish(args, cells, rows.read(), claimed)


def _finish(
    args: argparse.Namespace, cells: list[Cell], done: dict[str, Row], claimed: list[Cell]
) -> None:
    """Prints how many cells are done.

    Raises:
      ConfigError: cells failed, or their rows are gone.
    """
    failed = [cell for cell in cells if "error" in done.get(cell.key, {})]
    missing = sum(cell.key not in done for cell in cells)
    elsewhere = sum(cell.key not in done for cell in claimed)
    if not args.json:
        also = f"; other processes run {elsewhere}" if elsewhere else ""
        print_text(
            f"{len(cells) - missing - len(failed)} of {len(cells)} cells in {args.out}{also}; "
            f"ttq report {args.out} makes tables and pictures of them"
        )
    if missing > elsewhere:
        raise ConfigError(
            f"{args.out}: expected the rows of {len(cells) - elsewhere} cells, found "
            f"{len(cells) - missing}: something else removed them; run the same command again"
        )
    if failed:
        first = done[failed[0].key]["error"]
        raise ConfigError(
            f"{len(failed)} of {len(cells)} cells failed; their rows hold the errors, the first "
            f"({failed[0].name()}): {first}; --retry runs them again"
        )
