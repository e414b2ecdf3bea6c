"""Whatever happens while a command writes: an old result stays whole or a new one is, one line says
what went wrong, and nothing is left beside it."""

import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from compilers import QUICKLY

from ttq_jax.checkpoint.store_files import read_header
from ttq_jax.commands import compiled
from ttq_jax.commands.main import main
from ttq_jax.quant.recipe_text import load_recipe
from ttq_jax.sweeps.rows import read_rows

# Shorter tests ask the newest jax the same.
pytestmark = pytest.mark.slow

# Nearly all the time here is XLA's: one projection, one recipe, and short texts.
SMALL = ["--select", "layers/down", "--group-size", "16"]
SHORT = ["--window", "48", "--prompt-tokens", "16", "--max-windows", "1"]
CHAT = ["--recipe", "ttq", "--set", "moments.decay=0.5"]
SWEEP = """
model = "{model}"
corpus = "{text}"
recipe = "ttq"
select = "layers/down"
group_size = 16
window = 48
prompt_tokens = 16
max_windows = 1
bits = [3, 4]
"""

# Each command that writes: its arguments, the option that names the place, and the place's name.
WRITERS = {
    "save-recipe": ("generate", ["--prompt", "a", "--max-new-tokens", "2", *CHAT, *SMALL],
                    "--save-recipe", "mine.toml"),
    "conversation": ("generate", ["--prompt", "a", "--max-new-tokens", "2", *CHAT, *SMALL],
                     "--conversation", "chat"),
    "perplexity": ("perplexity", ["--corpus", "{text}", *SHORT, *CHAT, *SMALL],
                   "--save-recipe", "mine.toml"),
    "prepare": ("prepare", ["--recipe", "rtn", *SMALL], "--out", "store"),
    "allocate": ("allocate", ["--corpus", "{text}", *SHORT, "--recipe", "rtn", *SMALL,
                              "--widths", "2", "4", "--budget", "5"], "--out", "mine.toml"),
    "sweep": ("sweep", ["{sweep}"], "--out", "rows"),
    "report": ("report", [], "", "rows"),
}  # fmt: skip
WHOLE = {"mine.toml": load_recipe, "chat": read_header, "store": read_header, "rows": read_rows}


@pytest.fixture(scope="module")
def inputs(tiny, text_file, tmp_path_factory):
    sweep = tmp_path_factory.mktemp("inputs") / "sweep.toml"
    sweep.write_text(SWEEP.format(model=tiny, text=text_file))
    return {"model": tiny, "text": text_file, "sweep": str(sweep)}


def words_of(writer, inputs, folder):
    command, words, option, name = WRITERS[writer]
    model = [] if command in {"sweep", "report"} else ["--model", inputs["model"]]
    place = [option, str(folder / name)] if option else [str(folder / name)]
    common = ["--no-compilation-cache"]
    return [command, *model, *(w.format(**inputs) for w in words), *place, *common]


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory):
    """By writer, a directory with what an undisturbed run leaves."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "keep_compiled_programs", lambda directory, progress: None)
        for writer in WRITERS:
            made[writer] = folder = tmp_path_factory.mktemp(writer)
            if writer == "report":
                shutil.copytree(made["sweep"] / "rows", folder / "rows")
            assert main(words_of(writer, inputs, folder)) == 0
    return made


def tree(folder):
    """Every file and directory below, with contents."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in sorted(folder.rglob("*"))
        if p.name != ".lock"
    }


def names(folder):
    """What is there; Orbax gives its files random names."""
    return {name for name in tree(folder) if "/arrays/" not in name}


def began(writer, folder, written):
    """Puts what is there before a run: an old result, other than the one that is to be written."""
    shutil.copytree(written[writer], folder, dirs_exist_ok=True)
    if writer == "sweep":
        rows = folder / "rows" / "rows.jsonl"
        rows.write_bytes(rows.read_bytes().split(b"\n")[0] + b"\n")
    return tree(folder)


@contextlib.contextmanager
def nearly_full():
    """No file grows beyond 100 bytes: a write is cut short there, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def unsynced():
    """The disk takes everything, and fails when it has to keep it."""

    def fails(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        yield


def failed(result, *parts):
    code, _, err = result
    (line,) = (line for line in err.splitlines() if "error" in line)
    assert code == 2
    assert line.startswith("ttq: error: ")
    assert "Traceback" not in err
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize("old", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("disk", [nearly_full, unsynced])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fails(cli, inputs, written, tmp_path, writer, disk, old):
    if old:
        before = began(writer, tmp_path, written)
    elif writer == "report":  # of rows there are always some
        shutil.copytree(written["sweep"] / "rows", tmp_path / "rows")
        before = tree(tmp_path)
    else:
        before = {}
    with disk():
        result = cli(*words_of(writer, inputs, tmp_path))
    why = "File too large" if disk is nearly_full else "Input/output error"
    name = WRITERS[writer][-1]
    failed(result, name, "cannot be written: ", why)
    after = tree(tmp_path)
    if writer == "sweep" and not old:
        # The place was made before the work, and nothing came into it.
        assert after == ({"rows": None, "rows/rows.jsonl": b""} if disk is nearly_full else after)
        assert not read_rows(tmp_path / "rows")
    else:
        assert after == before
    if writer == "conversation":
        assert result[1].startswith("a"), "the answer exists, so it is printed"
    if writer == "sweep" and disk is nearly_full:
        failed(result, f"{int(old)} of 2 cells are kept")
    # The disk is mended.
    assert cli(*words_of(writer, inputs, tmp_path))[0] == 0
    assert names(tmp_path) == names(written[writer])
    assert WHOLE[name](tmp_path / name)


@pytest.mark.parametrize(
    ("writer", "place"),
    [(writer, place) for writer in WRITERS for place in ("/sys", "file") if writer != "report"]
    + [("report", "directory")],
)
def test_a_place_that_cannot_be_written_is_refused_before_work(
    cli, inputs, written, tmp_path, writer, place
):
    """Nobody writes into /sys, root neither; and a file holds no files."""
    (tmp_path / "file").write_text("")
    words = words_of(writer, inputs, Path("/sys") if place == "/sys" else tmp_path / "file")
    if writer == "report":  # beside its rows
        shutil.copytree(written["sweep"] / "rows", tmp_path / "rows")
        (tmp_path / "rows" / "report.html").mkdir()
        words = words_of(writer, inputs, tmp_path)
    before = tree(tmp_path)
    result = cli(*words)
    failed(result, WRITERS[writer][-1], "cannot be written: ")
    assert result[1] == ""
    assert not any(work in result[2] for work in ("loading", "reading", "drawing", "cell 1"))
    assert tree(tmp_path) == before


PRINTERS = {
    "recipes": ["recipes"],
    "one recipe": ["recipes", "awq", "--json"],
    "inspect": ["inspect", "--model", "{model}"],
    "kernels": ["kernels", "--model", "opt-6.7b", "--chip", "v5e"],
    "dry run": ["sweep", "{sweep}", "--out", "nowhere", "--dry-run"],
    "help": ["--help"],
}


@pytest.mark.parametrize("reader", ["full", "gone"])
@pytest.mark.parametrize("command", [*PRINTERS, *WRITERS])
def test_standard_output_that_takes_nothing(
    cli, inputs, written, tmp_path, monkeypatch, command, reader
):
    read, write = os.pipe()
    os.close(read)
    if command == "report":
        shutil.copytree(written["sweep"] / "rows", tmp_path / "rows")
    with Path("/dev/full").open("w") if reader == "full" else os.fdopen(write, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        if command in PRINTERS:
            result = cli(*(word.format(**inputs) for word in PRINTERS[command]))
        else:
            result = cli(*words_of(command, inputs, tmp_path))
    if reader == "full":
        os.close(write)
        failed(result, "standard output: No space left on device")
    else:
        assert result[0] == 141
        assert "error" not in result[2]
    if command in WRITERS and command != "conversation":
        # Printing comes last, so what was found is not lost. A turn that nobody saw was none.
        assert names(tmp_path) == names(written[command])


# Stops in the middle of writing: of a line, or where a file is synced.
CHILD = """
import os, signal, sys, time
# Where the tests run under nohup, their children would ignore it too, as they should.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from ttq_jax.commands.main import main
write, where = os.write, sys.argv.pop(1)
def pause(*_):
    write(2, b"in the middle\\n")
    time.sleep(600)
def half(at, data):
    write(at, data[: len(data) // 2])
    pause()
if where == "sweep":
    os.write = half
else:
    os.fsync = pause
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("writer", "number"),
    [
        ("save-recipe", signal.SIGKILL),
        ("prepare", signal.SIGKILL),
        ("report", signal.SIGKILL),
        ("sweep", signal.SIGKILL),
        ("conversation", signal.SIGINT),
        ("sweep", signal.SIGINT),
        ("prepare", signal.SIGTERM),
        ("report", signal.SIGHUP),
    ],
)
def test_a_process_that_is_stopped_in_the_middle(cli, inputs, written, tmp_path, writer, number):
    before, name = began(writer, tmp_path, written), WRITERS[writer][-1]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, writer, *words_of(writer, inputs, tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | QUICKLY,
    )  # fmt: skip
    seen = []
    while "in the middle\n" not in seen:
        seen.append(child.stderr.readline())
        assert seen[-1], seen
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert child.returncode == -number
    else:
        assert child.returncode == 128 + number
        what = "interrupted" if number == signal.SIGINT else f"ended by {number.name}"
        assert err.endswith(f"\nttq: {what}\n")
        assert "Traceback" not in err
        if writer != "sweep":
            assert tree(tmp_path) == before
    # What was there is there, and can be read; of the second row a half may follow the first.
    now = tree(tmp_path)
    for path, was in before.items():
        assert now[path] == was or (path == "rows/rows.jsonl" and now[path].startswith(was))
    assert WHOLE[name](tmp_path / name)
    if writer == "sweep":
        assert len(read_rows(tmp_path / name)) == 1
    # The next one to that place removes what was left, and finishes.
    assert cli(*words_of(writer, inputs, tmp_path))[0] == 0
    assert names(tmp_path) == names(written[writer])


def test_a_swap_that_was_killed_half_way_is_undone(cli, inputs, written, tmp_path):
    """Between two renames nothing has the store's name; both stores are whole, beside it."""
    began("conversation", tmp_path, written)
    shutil.copytree(tmp_path / "chat", tmp_path / ".chat.01234567.draft")
    (tmp_path / "chat").rename(tmp_path / ".chat.01234567.replaced")
    first = read_header(tmp_path / ".chat.01234567.replaced")
    code, _, err = cli(*words_of("conversation", inputs, tmp_path))
    assert code == 0, err
    assert [p.name for p in tmp_path.iterdir()] == ["chat"]
    assert read_header(tmp_path / "chat")["files"] != first["files"], "the next turn, not a first"
