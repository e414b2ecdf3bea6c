"""Damaged files of every kind that the package reads: what becomes of them.

Claim     a damaged file is refused by an error of the package's own, in one short line; or it is
          read as if nothing had happened; or it says something else, and exactly that is read.
          There is no other outcome: no other exception, no end of the process, no wrong weights,
          no case of more than 20 seconds or 2 GB.
Command   python experiments/fuzz_files.py --cases 20026 --seed 0
              --out experiments/results/fuzz_files.md
Cost      about 2 minutes on one CPU core.
Expect    exit status 0 and a table without other outcomes. With status 1 the table is followed by
          each of them: --kind NAME --case NUMBER --keep FILE writes the damaged file again.

Every case has its own random numbers, made of the seed, its kind and its number. Cases run in
processes of limited memory, forked from one that has imported everything and started nothing.
"""

import argparse
import collections
import dataclasses
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from fuzz_inputs import write_inputs
from fuzz_kinds import KINDS, Kind, digest

from ttq_jax.errors import Error
from ttq_jax.files import write_file

GOOD = ("refused", "as before", "as the file says")
PACKAGES = ("ttq-jax", "jax", "numpy", "safetensors", "tokenizers", "sentencepiece", "gguf")
_SECONDS, _BYTES, _BATCH, _LONGEST = 20, 2 * 2**30, 400, 700


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case: one of `GOOD`, or another word with its detail."""

    case: int
    what: str
    detail: str = ""


def random_of(seed: int, kind: Kind, case: int) -> random.Random:
    """The random numbers of a case."""
    return random.Random(f"{seed} {kind.name} {case}")


def damaged_file(kind: Kind, seed: int, case: int, place: Path) -> tuple[Path, bytes, bytes]:
    """(file, what is in it, what is put there)."""
    rng = random_of(seed, kind, case)
    files = sorted({f for pattern in kind.files for f in place.glob(pattern) if f.is_file()})
    file = rng.choice(files)
    whole = file.read_bytes()
    return file, whole, kind.damaged(rng, whole)


def judged(kind: Kind, place: Path, before: str, whole: bytes, data: bytes) -> tuple[str, str]:
    """(what became of a damaged file that is in its place, detail)."""
    try:
        found = kind.read(place)
        after = digest(found)
    except Error as e:
        message = str(e).replace(str(place), "")
        short = len(message) <= _LONGEST and "\n" not in message
        return ("refused", "") if short else ("refused at length", message[:2000])
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(e.__traceback__) if "ttq_jax" in f.filename]
        at = f"{Path(where.filename).name}:{where.lineno} via {ours[-1].name if ours else '?'}"
        return f"other exception: {type(e).__name__}", f"{at}: {str(e)[:300]}"
    if after == before:
        return "as before", ""
    if kind.fixed:
        return "changed", "nothing in this file may change what is read"
    try:
        said, said_before = kind.says(data), kind.says(whole)
    except Exception as e:
        return "read, though another reader refuses it", f"{type(e).__name__}: {e}"[:300]
    if digest(said) == digest(said_before) or not kind.agrees(found, said):
        return "not what the file says", ""
    return "as the file says", ""


def run_batch(kind: Kind, root: Path, seed: int, cases: Iterable[int], out: int) -> None:
    """Runs cases in this process; writes a line before and a line after each of them."""

    def tell(**what: Any) -> None:
        os.write(out, (json.dumps(what) + "\n").encode())

    place = root / kind.folder
    before = digest(kind.read(place))
    used = sum(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text()
               .splitlines() if line.startswith("VmData:"))  # fmt: skip
    resource.setrlimit(resource.RLIMIT_DATA, (used + _BYTES, used + _BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for case in cases:
        file, whole, data = damaged_file(kind, seed, case, place)
        file.write_bytes(data)
        tell(start=case)
        what, detail = judged(kind, place, before, whole, data)
        file.write_bytes(whole)
        tell(case=case, what=what, detail=detail)


def _forked(work: Any, *args: Any) -> tuple[int, int]:
    """(id of a process that does some work, the end of a pipe that it writes to)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(*args, writing)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _lines(child: int, pipe: int, seconds: float) -> Iterator[dict[str, Any] | None]:
    """A process's lines; None, once, if nothing comes for that long."""
    text = b""
    while True:
        if not select.select([pipe], [], [], seconds)[0]:
            yield None
            return
        got = os.read(pipe, 2**16)
        if not got:
            return
        *lines, text = (text + got).split(b"\n")
        yield from map(json.loads, lines)


def outcomes(kind: Kind, root: Path, seed: int, count: int) -> Iterator[Outcome]:
    """What becomes of a kind's cases, in their order.

    Raises:
      RuntimeError: the sound files cannot be read.
    """
    done = 0
    while done < count:
        todo = range(done, min(done + _BATCH, count))
        fresh = Path(tempfile.mkdtemp(dir=root.parent))
        shutil.copytree(root, fresh / "files")
        child, pipe = _forked(run_batch, kind, fresh / "files", seed, todo)
        started, what = None, ""
        for line in _lines(child, pipe, _SECONDS if done else 3 * _SECONDS):
            if line is None:
                what = f"more than {_SECONDS} seconds"
                os.kill(child, signal.SIGKILL)
            elif "start" in line:
                started = line["start"]
            else:
                yield Outcome(**line)
                started, done = None, line["case"] + 1
        os.close(pipe)
        _, status = os.waitpid(child, 0)
        shutil.rmtree(fresh)
        if started is not None:
            end = os.waitstatus_to_exitcode(status)
            yield Outcome(started, what or f"the process ended with status {end}")
            done = started + 1
        elif done != todo.stop:
            raise RuntimeError(f"{kind.name}: the sound files cannot be read")


def table(found: dict[str, list[Outcome]], args: argparse.Namespace) -> str:
    """The counts by kind and outcome, as Markdown."""
    total = sum(map(len, found.values()))
    bad = [(kind, one) for kind, all_ in found.items() for one in all_ if one.what not in GOOD]
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    lines = [
        "# Damaged files", "",
        f"Made by `python experiments/fuzz_files.py --cases {args.cases} --seed {args.seed}`, with "
        f"Python {platform.python_version()}, {versions}. {total} cases, "
        f"{len(bad)} other outcomes.",
        "", "| file | cases | " + " | ".join(GOOD) + " | other |", "| --- " + "| ---: " * 5 + "|",
    ]  # fmt: skip
    for kind, all_ in [*found.items(), ("all", [one for each in found.values() for one in each])]:
        count = collections.Counter(one.what for one in all_)
        known = [count[what] for what in GOOD]
        cells = [len(all_), *known, len(all_) - sum(known)]
        lines.append(f"| {kind} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", *(f"- {kind}, case {one.case}: {one.what}: {one.detail}" for kind, one in bad)]
    return "\n".join(lines).strip() + "\n"


def _inputs(root: Path, _: int) -> None:
    write_inputs(root)


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="in all, shared by the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only the kinds whose name contains this")
    parser.add_argument("--case", type=int, help="with --kind and --keep: one case's number")
    parser.add_argument("--keep", type=Path, help="where its damaged file is written")
    parser.add_argument("--out", type=Path, help="where the table is written too")
    args = parser.parse_args()
    kinds = [kind for kind in KINDS if args.kind is None or args.kind in kind.name]
    with tempfile.TemporaryDirectory() as folder:
        root, start = Path(folder) / "files", time.monotonic()
        child, pipe = _forked(_inputs, root)
        os.close(pipe)
        if os.waitpid(child, 0)[1]:
            return 2
        args.out = args.out and args.out.resolve()
        os.chdir(folder)
        if args.keep:
            data = damaged_file(kinds[0], args.seed, args.case, root / kinds[0].folder)[2]
            args.keep.write_bytes(data)
            return 0
        found = {}
        for kind in kinds:
            found[kind.name] = list(outcomes(kind, root, args.seed, args.cases // len(kinds)))
            print(f"{kind.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    text = table(found, args)
    print(text)
    if args.out:
        write_file(args.out, text)
    return int(any(one.what not in GOOD for all_ in found.values() for one in all_))


if __name__ == "__main__":
    sys.exit(main())
