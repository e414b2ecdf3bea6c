"""The command as a process: start-up, Ctrl-C, a closed pipe, the compilation cache."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from compilers import QUICKLY

TTQ = [sys.executable, "-m", "ttq_jax"]
# Nearly all the time here is XLA's.
ONE = ["--select", "layers/q"]


def environment(**more):
    return os.environ | QUICKLY | more


def test_help_and_mistakes_do_not_import_jax():
    program = (
        "import sys\nfrom ttq_jax.commands.main import main\n"
        "codes = [main(['--help']), main(['generate', '--help']), main(['generate', '--nope'])]\n"
        "assert codes == [0, 0, 2], codes\n"
        "assert not {'jax', 'numpy', 'datasets'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "XDG_CACHE_HOME" in done.stdout


def test_cold_start_leaves_slow_libraries_alone(tiny):
    program = (
        "import sys\nfrom ttq_jax.commands.main import main\n"
        f"code = main(['generate', '--model', {tiny!r}, '--prompt', 'a', '--max-new-tokens', '2',"
        f" '--no-compilation-cache', *{ONE}])\n"
        "slow = {'transformers', 'torch', 'datasets', 'orbax', 'optax', 'pandas'}\n"
        "assert code == 0\nassert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr


def test_compiled_programs_are_kept_where_documented(tiny, tmp_path):
    command = [*TTQ, "generate", "--model", tiny, "--prompt", "ä", "--max-new-tokens", "3"]
    command += ["--json", *ONE]
    env = environment(XDG_CACHE_HOME=str(tmp_path))
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    first = subprocess.run(command, capture_output=True, text=True, env=env)
    assert first.returncode == 0, first.stderr
    kept = {p.name for p in (tmp_path / "ttq_jax" / "xla").glob("*-cache")}
    assert any("generate_tokens" in name for name in kept)
    second = subprocess.run(command, capture_output=True, text=True, env=env)
    # Found there, as nothing new was written.
    assert {p.name for p in (tmp_path / "ttq_jax" / "xla").glob("*-cache")} == kept
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert one["text"] == two["text"]


@pytest.mark.parametrize("when", ["loading", "scoring"])
def test_ctrl_c(tiny, tmp_path, when):
    corpus = tmp_path / "long.txt"
    corpus.write_text("All work and no play. " * 100_000)
    process = subprocess.Popen(
        [*TTQ, "perplexity", "--model", tiny, "--corpus", corpus, "--window", "64",
         "--prompt-tokens", "32", "--no-compilation-cache"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    seen = ""
    while when not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    # Long before the text is scored.
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("ttq: interrupted\n")


def test_closed_pipe_ends_quietly(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n" * 50)
    process = subprocess.Popen(
        [*TTQ, "generate", "--model", tiny, "--prompts-file", prompts, "--max-new-tokens", "2",
         "--json", "--quiet", "--no-compilation-cache", *ONE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


SECOND_CTRL_C_DURING_THE_FIRST = """
import os, signal, threading, time
from ttq_jax.commands.interrupts import interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
interruptible(lambda: time.sleep(60), lambda: signal.raise_signal(signal.SIGINT))
"""


def test_a_second_ctrl_c_that_comes_at_once_ends_it():
    command = [sys.executable, "-c", SECOND_CTRL_C_DURING_THE_FIRST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    assert done.stderr == "\nttq: interrupted\n"
