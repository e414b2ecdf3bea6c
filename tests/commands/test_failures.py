"""Whatever surrounds a command: one line and an exit code, never a trace, unless --debug asks."""

import errno
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from compilers import QUICKLY

from ttq_jax.commands import platform, recipes
from ttq_jax.commands.failures import explain


def nested():
    return nested()


def too_large():
    jnp.zeros(1 << 46, jnp.uint8).block_until_ready()


def raised(make):
    try:
        make()
    except BaseException as e:
        return e
    raise AssertionError("nothing was raised")


FAILURES = {
    "disk": (OSError(errno.EIO, "Input/output error", "/a"), 2, "/a: Input/output error"),
    "network": (ConnectionError("the hub is away"), 2, "the hub is away"),
    "memory": (MemoryError("Unable to allocate 9 GiB"), 2, "Unable to allocate 9 GiB); use a smal"),
    "no words": (MemoryError(), 2, "out of memory; use a smaller model"),
    "depth": (raised(nested), 2, "something is nested too deeply"),
    "device": (raised(too_large), 2, "the device is out of memory (RESOURCE_EXHAUSTED"),
    "package": (ModuleNotFoundError("No module named 'x'"), 2, "No module named 'x'); install"),
    "ours": (KeyError("q"), 1, "KeyError: 'q'; this is a mistake in ttq-jax: please report it"),
    "two lines": (RuntimeError("a\nb"), 1, "RuntimeError: a b; this is a mistake"),
}


@pytest.mark.parametrize("debug", [True, False])
@pytest.mark.parametrize("kind", FAILURES)
def test_an_exception_is_one_line(cli, monkeypatch, kind, debug):
    failure, expected, text = FAILURES[kind]

    def fail(args, progress):
        raise failure

    monkeypatch.setattr(recipes, "run", fail)
    code, out, err = cli("recipes", *(["--debug"] if debug else []))
    *trace, line = err.splitlines()
    assert (code, out) == (expected, "")
    assert line.startswith("ttq: error: ") and text in line
    assert bool(trace) == ("Traceback" in err) == debug
    assert explain(failure) == (code, line.removeprefix("ttq: error: "))


def test_a_platform_without_a_device_is_named(cli, monkeypatch):
    def none():
        raise AssertionError

    monkeypatch.setattr(recipes, "run", lambda *_: none())
    monkeypatch.setattr(jax, "devices", none)
    code, _, err = cli("recipes")
    assert code == 2
    assert "jax finds no device of JAX_PLATFORMS=cpu; set another" in err


def test_an_argument_that_is_not_utf8(cli):
    code, out, err = cli("generate", "--model", "caf\udce9")
    assert (code, out) == (2, "")
    assert err == "ttq: error: expected arguments in UTF-8, got 'caf\\udce9'\n"


def test_letters_that_stdout_does_not_have(cli, monkeypatch):
    import io

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli("recipes", "ttq", "--set", "select=größe", "--json")[0] == 0
    assert b'"select": "gr\\u00f6\\u00dfe"' in out.buffer.getvalue()


@pytest.mark.parametrize(
    ("command", "streams", "code", "out", "err"),
    [
        ("recipes --quiet", ">&-", 2, "", "ttq: error: standard output: it is closed; redirect"),
        ("recipes awq --json", "2>&-", 0, '{"name"', ""),
        ("recipes awq --json", "2>/dev/full", 0, '{"name"', ""),
        ("generate --model {model} --quiet --prompts-file -", "<&-", 2, "",
         "ttq: error: standard input: expected prompts, but it is closed"),
        ("--help", ">/dev/full", 2, "", "ttq: error: standard output: No space left on device"),
        ("sweep {sweep} --out {out} --no-compilation-cache", "<&- 2>&-", 0, "1 of 1 cells", ""),
    ],
)  # fmt: skip
def test_closed_and_full_streams(tiny, text_file, tmp_path, command, streams, code, out, err):
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'model = "{tiny}"\ncorpus = "{text_file}"\nrecipe = "none"\nwindow = 48\n'
        "prompt_tokens = 16\nmax_windows = 1\n"
    )
    words = command.format(model=tiny, sweep=sweep, out=tmp_path / "out")
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m ttq_jax {words} {streams}"],
        capture_output=True, text=True, env=os.environ | QUICKLY,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(out) and done.stderr.startswith(err)
    assert done.stderr.count("\n") == (1 if err else 0)
    # A file that got the number of a closed stream would hold what was meant for that.
    for path in tmp_path.rglob("rows.jsonl"):
        assert all(line.startswith("{") for line in path.read_text().splitlines())


# The platform


@pytest.mark.parametrize(
    ("device", "found"),
    [
        ("null", False), ("dri/renderD128", False), ("vfio/vfio", False), ("nvidia0", True),
        ("nvidiactl", True), ("dxg", True), ("kfd", True), ("accel0", True), ("vfio/0", True),
    ],
)  # fmt: skip
def test_a_chip_is_known_by_its_device_file(tmp_path, monkeypatch, device, found):
    monkeypatch.setattr(platform, "_plugins", lambda: {"jax_plugins.xla_cuda13"})
    path = tmp_path / device
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    assert platform.has_chip(tmp_path) == found
    monkeypatch.setattr(platform, "_plugins", lambda: {"jax_plugins.some_other"})
    assert platform.has_chip(tmp_path), "it may find its chip elsewhere"


def test_the_plugins_are_those_that_jax_finds(monkeypatch):
    from jax._src import xla_bridge

    asked = []
    monkeypatch.setattr(xla_bridge.importlib, "import_module", lambda name: asked.append(name))
    xla_bridge.discover_pjrt_plugins()
    found = {name.split(".")[-1] for name in platform._plugins()}
    assert found == {name.split(".")[-1] for name in asked}


PLATFORM = """
import jax
from ttq_jax.commands import platform
platform.has_chip = lambda: {chip}
platform.choose_platform()
print(jax.config.jax_platforms)
"""


@pytest.mark.parametrize(
    ("asked", "chip", "chosen"),
    [(None, False, "cpu"), (None, True, "None"), ("cuda", False, "cuda"), ("", False, "cpu")],
)
def test_a_choice_of_the_users_stands(asked, chip, chosen):
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    env |= {} if asked is None else {"JAX_PLATFORMS": asked}
    done = subprocess.run(
        [sys.executable, "-c", PLATFORM.format(chip=chip)], capture_output=True, text=True, env=env
    )
    assert done.stdout == f"{chosen}\n", done.stderr


def test_nothing_precedes_an_answer(tiny):
    """Whatever plugins are installed, and whether or not they find their chip."""
    env = {k: v for k, v in (os.environ | QUICKLY).items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "ttq_jax", "generate", "--model", tiny, "--prompt", "a", "--quiet",
         "--select", "layers/q", "--max-new-tokens", "2", "--no-compilation-cache"],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (None, "--xla_cpu_prefer_vector_width=512"),
        ("--xla_some=1", "--xla_some=1 --xla_cpu_prefer_vector_width=512"),
        ("--xla_cpu_prefer_vector_width=128", None),
    ],
)
def test_a_cpus_compiler_starts_with_wide_vectors(monkeypatch, given, seen):
    """The flag is there while XLA reads its flags, and gone when other compilers read them."""
    if given is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", given)
    flags = []
    monkeypatch.setattr(platform.jax, "devices", lambda: flags.append(os.environ["XLA_FLAGS"]))
    platform.choose_platform()
    assert flags == ([seen] if seen else [])
    assert os.environ.get("XLA_FLAGS") == given
    monkeypatch.setattr(platform.jax, "__version_info__", (99, 0))
    flags.clear()
    platform.choose_platform()
    assert flags == [], "a jax whose compiler may not know the flag would abort"
