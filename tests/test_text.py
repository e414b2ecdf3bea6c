"""Texts from outside: what is no file, or has an impossible name, is refused at once."""

import os
import socket

import pytest

from ttq_jax.config import ConfigError
from ttq_jax.quant.recipe_text import load_recipe
from ttq_jax.sweeps.axes import read_sweep
from ttq_jax.text import read_text


def a_pipe(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def a_socket(folder):
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(folder / "socket"))  # its name may have 107 bytes
    return folder / "socket"


@pytest.mark.parametrize(
    "made", [a_pipe, a_socket, lambda _: "/dev/zero"], ids=["pipe", "socket", "device"]
)
@pytest.mark.parametrize(
    "read", [read_text, load_recipe, lambda path, _: read_sweep(str(path))],
    ids=["text", "recipe", "sweep"],
)  # fmt: skip
def test_what_may_never_end_is_no_text(tmp_path, made, read):
    words = (ConfigError,) if read is not load_recipe else ()
    with pytest.raises(ConfigError, match=r"expected a file, found a pipe or a device"):
        read(made(tmp_path), *words)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-that-name/x"])
def test_a_name_that_no_file_has(name):
    with pytest.raises(ConfigError, match="cannot be read") as e:
        read_text(name, ConfigError)
    assert len(str(e.value)) < 200
    assert str(e.value).isprintable()


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "a").write_text("text\r\n")
    (tmp_path / "b").symlink_to("a")
    assert read_text(tmp_path / "b") == "text\n"
