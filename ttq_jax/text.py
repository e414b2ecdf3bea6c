"""Text from outside, read in one way: UTF-8, no byte-order mark, every line end a newline."""

from pathlib import Path

from ttq_jax.errors import Error, shown
from ttq_jax.foreign import is_file


def decode(data: bytes, where: str, error: type[Error] = Error) -> str:
    """Bytes as text.

    Args:
      data: UTF-8, with or without a byte-order mark.
      where: a file's name, or "standard input", for the message.
      error: what is raised.

    Returns:
      The text; CR LF and CR have become newlines.

    Raises:
      Error: as `error`; the bytes are not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise error(
            f"{where}: expected UTF-8 text, but byte {e.start} is not; convert the file"
        ) from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(
    path: str | Path, error: type[Error] = Error, *, missing: str = "check the path"
) -> str:
    """The text of a file.

    Args:
      path: of the file; ~ is the home directory.
      error: what is raised.
      missing: what the message advises if there is no such file.

    Returns:
      See `decode`.

    Raises:
      Error: as `error`; there is no such file, or it cannot be read or is not UTF-8. A pipe or a
        device, which may never end, is no file.
    """
    try:
        place = Path(path).expanduser()
        if place.exists() and not place.is_dir() and not is_file(place):
            raise error(f"{path}: cannot be read: expected a file, found a pipe or a device")
        data = place.read_bytes()
    except FileNotFoundError as e:
        raise error(f"{path}: no such file; {missing}") from e
    except Error:
        raise
    except (OSError, RuntimeError, ValueError) as e:  # no home directory; a name with a null byte
        reason = e.strerror if isinstance(e, OSError) else e
        # A sweep may name a text by anything.
        plain = len(str(path)) <= 1000 and str(path).isprintable()
        raise error(f"{path if plain else shown(path)}: cannot be read ({reason})") from e
    return decode(data, str(path), error)
