"""A store on disk: a directory with `ttq.json`, which describes it, and arrays in Orbax's format.

`ttq.json` describes the pytree with every static field, so that nothing is pickled, and lists each
file with its size and checksum, so that a damaged copy is refused before anything reads it. A store
is written into a draft beside its destination, `ttq.json` last, and then renamed.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttq_jax._version import __version__
from ttq_jax.checkpoint.errors import StoreError
from ttq_jax.checkpoint.store_checks import REMEDY, check_arrays, check_files, file_digest
from ttq_jax.checkpoint.store_schema import HEADER, TREES
from ttq_jax.errors import shown
from ttq_jax.files import clear, draft, replace_folder, reserve
from ttq_jax.foreign import check, parse_json, read_bytes
from ttq_jax.quant.grid import CodedPairs, CodedScales
from ttq_jax.types import LowRank, MixedLinear, Moments, Offline, QuantizedLinear

VERSION = 1
"""Of the format; a change that older code would misread increases it."""

ShardingOf = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]
Shardings = jax.sharding.Sharding | ShardingOf | None

_MARK = "ttq-jax store"
_HEADER, _ARRAYS = "ttq.json", "arrays"
_NODES: dict[str, type] = {
    node.__name__: node
    for node in (CodedPairs, CodedScales, LowRank, MixedLinear, Moments, Offline, QuantizedLinear)
}


def plain(value: Any) -> Any:
    """Data as it comes back from JSON: lists for tuples, "inf" for infinity.

    Args:
      value: dicts, lists, tuples and scalars.

    Returns:
      The same in JSON's own types.
    """
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _taken_apart(tree: Any, name: str, arrays: dict[str, Any]) -> Any:
    """A tree's description; its arrays are added to `arrays`, by name."""

    def below(key: Any, value: Any) -> Any:
        return _taken_apart(value, f"{name}.{key}" if name else str(key), arrays)

    if tree is None:
        return None
    if isinstance(tree, dict):
        return {"dict": {key: below(key, value) for key, value in tree.items()}}
    if isinstance(tree, tuple):
        return {"tuple": [below(i, value) for i, value in enumerate(tree)]}
    if type(tree) in _NODES.values():
        fields, static = {}, {}
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name)
            if field.metadata.get("pytree_node", True):
                fields[field.name] = below(field.name, value)
            elif field.name != "split" and value != field.default:
                # Which devices share a weight is the mesh's that it is loaded onto.
                static[field.name] = plain(value)
        return {"node": type(tree).__name__, "static": static, "fields": fields}
    arrays[name] = tree
    return {"array": name, "shape": list(tree.shape), "dtype": str(tree.dtype)}


def _stated(spec: Any) -> Any:
    """A description without fields that hold nothing: older stores do not name the newest ones."""
    if isinstance(spec, dict):
        return {key: _stated(one) for key, one in spec.items() if one is not None}
    return [_stated(one) for one in spec] if isinstance(spec, list) else spec


def _put_together(spec: Any, leaf: Callable[[str, tuple[int, ...], Any], Any]) -> Any:
    """The tree of a description, `leaf(name, shape, dtype)` in place of every array."""
    if spec is None:
        return None
    if "dict" in spec:
        return {key: _put_together(one, leaf) for key, one in spec["dict"].items()}
    if "tuple" in spec:
        return tuple(_put_together(one, leaf) for one in spec["tuple"])
    if "node" in spec:
        fields = {key: _put_together(one, leaf) for key, one in spec["fields"].items()}
        static = {k: tuple(v) if isinstance(v, list) else v for k, v in spec["static"].items()}
        return _NODES[spec["node"]](**fields, **static)
    return leaf(spec["array"], tuple(spec["shape"]), jnp.dtype(spec["dtype"]))


def _digest_of(header: dict[str, Any]) -> str:
    """The checksum of everything in `ttq.json` except the checksum itself."""
    rest = {key: value for key, value in header.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def write(path: str | Path, about: dict[str, Any], tree: Any) -> None:
    """Writes a store; an old one is replaced only when the new one is complete.

    Args:
      path: a directory that does not exist, is empty or is a store, which is then replaced.
      about: further keys of `ttq.json`, in plain JSON types.
      tree: of dicts, tuples, arrays and the nodes of `ttq_jax.types`.

    Raises:
      StoreError: the path is in use, or cannot be written.
    """
    if jax.process_count() > 1:
        raise StoreError(
            f"{path}: not saved: expected one process, got {jax.process_count()}; save from a "
            "program that has all devices in one process, and load it in any"
        )
    place = Path(path).expanduser().resolve()
    with _writing(path):
        _refuse_to_replace(place)
        with draft(place, folder=True, parents=True) as new:
            _write_draft(new, about, tree)
            replace_folder(new, place)


def check_destination(path: str | Path) -> None:
    """Finds out whether a store can be written, and removes what a killed writer left there.

    Args:
      path: see `write`.

    Raises:
      StoreError: it cannot.
    """
    place = Path(path).expanduser().resolve()
    with _writing(path):
        clear(place)
        _refuse_to_replace(place)
        with draft(place, folder=True, parents=True):
            pass


@contextlib.contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    """Turns what goes wrong into an error that names the store.

    Raises:
      StoreError: it cannot be written.
    """
    try:
        yield
    except OSError as e:
        why = e.strerror or e
        raise StoreError(f"{path}: cannot be written: {why}; choose another directory") from e


def _write_draft(new: Path, about: dict[str, Any], tree: Any) -> None:
    """All files of a store, `ttq.json` last."""
    arrays: dict[str, Any] = {}
    spec = _taken_apart(tree, "", arrays)
    _write_arrays(new / _ARRAYS, arrays)
    files = {
        file.relative_to(new).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_digest(file),
        }
        for file in sorted(new.rglob("*"))
        if file.is_file()
    }
    header = {"format": _MARK, "version": VERSION, "ttq_jax": __version__, **about}
    header |= {"tree": spec, "files": files}
    text = json.dumps(header | {"sha256": _digest_of(header)}, indent=1)
    # No newline at the end: no shorter text is valid JSON.
    (new / _HEADER).write_text(text, encoding="utf-8")


def _refuse_to_replace(place: Path) -> None:
    """Accepts a new path, an empty directory, or a store.

    Raises:
      StoreError: the path holds something else, or more than a store.
    """
    if not place.exists():
        return
    if place.is_dir():
        names = {file.name for file in place.iterdir()}
        if not names:
            return
        try:
            ours = names <= {_HEADER, _ARRAYS} and _parsed(place).get("format") == _MARK
        except StoreError:
            ours = False
        if ours:
            return
    raise StoreError(
        f"{place}: exists and is not a ttq-jax store, or holds other files too, so it is not "
        "replaced; choose another directory, or remove this one"
    )


def _orbax() -> tuple[Any, Any]:
    """Orbax's synchronous checkpointer, and the module of its arguments."""
    import orbax.checkpoint as ocp  # type: ignore[import-untyped]

    return ocp.Checkpointer(ocp.StandardCheckpointHandler()), ocp.args


def _full(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays that Orbax can write: it refuses those without elements, which need no data."""
    return {name: a for name, a in arrays.items() if math.prod(a.shape)}


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    """Writes all arrays that have elements.

    Raises:
      OSError: Orbax cannot.
    """
    if not _full(arrays):
        return
    # Orbax writes in threads: on a full disk each ends in a trace. 64 KiB describe the arrays.
    reserve(folder.parent, sum(a.nbytes for a in arrays.values()) + 2**16)
    checkpointer, args = _orbax()
    try:
        with checkpointer:
            checkpointer.save(folder, args=args.StandardSave(_full(arrays)))
    except Exception as e:  # its errors have no common class
        raise OSError(f"{type(e).__name__}: {_first_line(e)}") from e


def _parsed(place: Path) -> dict[str, Any]:
    """`ttq.json` as it is.

    Raises:
      StoreError: there is none, or it is not a JSON object.
    """
    if not (place / _HEADER).exists():
        what = f"has no {_HEADER}" if place.exists() else "no such directory"
        what = "Not a directory" if place.is_file() else what
        raise StoreError(
            f"{place}: {what}; expected a directory that ttq-jax saved (an interrupted save leaves "
            "none)"
        )
    text = read_bytes(place / _HEADER, StoreError)
    header = parse_json(text, f"{place}: {_HEADER} is damaged", StoreError)
    if not isinstance(header, dict):
        raise StoreError(f"{place}: {_HEADER} is damaged (expected an object); {REMEDY}")
    return header


def read_header(path: str | Path) -> dict[str, Any]:
    """What `ttq.json` says, after everything that can be checked without the arrays.

    Args:
      path: a store.

    Returns:
      Its keys, among them what `write` was given as `about`.

    Raises:
      StoreError: not a store, another version of the format, or damaged.
    """
    place = Path(path).expanduser()
    if not place.exists():  # a writer may have been killed while it had the store set aside
        clear(place.resolve())
    header = _parsed(place)
    if header.get("format") != _MARK:
        raise StoreError(
            f"{place}: {_HEADER} is not ttq-jax's: expected format {_MARK!r}, got "
            f"{shown(header.get('format'))}; choose a directory that ttq-jax saved"
        )
    version, by = header.get("version"), header.get("ttq_jax")
    by = by if isinstance(by, str) and len(by) < 80 else "an unknown version"
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        which, remedy = ("newer", "upgrade ttq-jax, or ") if newer else ("older", "")
        raise StoreError(
            f"{place}: format version {shown(version)}, written by ttq-jax {by}, is {which} than "
            f"version {VERSION}, the only one that this ttq-jax {__version__} reads; {remedy}save "
            "it again"
        )
    if header.get("sha256") != _digest_of(header):
        raise StoreError(f"{place}: {_HEADER} is damaged (wrong checksum); {REMEDY}")
    check(header, HEADER, f"{place}: {_HEADER} is damaged", StoreError)
    return header


def shapes(path: str | Path, header: dict[str, Any]) -> Any:
    """The tree of a store without its values.

    Args:
      path: for messages.
      header: from `read_header`.

    Returns:
      The tree that was written, with a `jax.ShapeDtypeStruct` for every array.

    Raises:
      StoreError: the description makes no sense.
    """
    unknown = f"{path}: {_HEADER} describes a tree that this ttq-jax does not know"
    check(header["tree"], TREES[header["kind"]], unknown, StoreError)
    try:
        tree = _put_together(header["tree"], lambda _, shape, dtype: _shape(shape, dtype))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise StoreError(f"{unknown} ({type(e).__name__}: {_first_line(e)}); {REMEDY}") from e
    # An array's name follows from its place: of two of one shape, none may stand for the other.
    if _stated(_taken_apart(tree, "", {})) != _stated(header["tree"]):
        raise StoreError(f"{unknown} (an array has the name of another place); {REMEDY}")
    return tree


def _shape(shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def read(path: str | Path, header: dict[str, Any], sharding: Shardings = None) -> Any:
    """The tree of a store, every file of it checked first.

    Args:
      path: the store.
      header: from `read_header`.
      sharding: where arrays go: None for JAX's default device, not committed to it; a sharding
        for all of them; or a function of an array's name ("packed.q.planes.0") and shape that
        gives its sharding or None.

    Returns:
      The tree that was written, bit for bit.

    Raises:
      StoreError: a file is missing or damaged, or an array does not fit its sharding.
    """
    place = Path(path).expanduser().resolve()
    check_files(place, header["files"])
    wanted: dict[str, jax.ShapeDtypeStruct] = {}

    def want(name: str, shape: tuple[int, ...], dtype: Any) -> None:
        of_this = sharding(name, shape) if callable(sharding) else sharding
        wanted[name] = _shape(shape, dtype, of_this)

    _put_together(header["tree"], want)
    try:
        arrays = _read_arrays(place / _ARRAYS, wanted)
    except StoreError:
        raise
    except Exception as e:  # Orbax's errors have no common class
        raise StoreError(
            f"{path}: its arrays could not be restored ({type(e).__name__}: {_first_line(e)}); "
            "check that each fits its sharding and the device's memory"
        ) from e
    return _put_together(header["tree"], lambda name, *_: arrays[name])


def _read_arrays(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays, each with its sharding."""
    found: dict[str, Any] = {}
    # Asked for without a sharding, Orbax takes the saved one, whose devices may not be here: an
    # array that has none is asked for as NumPy's (of one element, so that it costs nothing).
    targets = {
        name: a if a.sharding else np.broadcast_to(np.zeros((), a.dtype), a.shape)
        for name, a in _full(wanted).items()
    }
    if targets:
        checkpointer, args = _orbax()
        with checkpointer:
            check_arrays(folder, checkpointer.metadata(folder).item_metadata, targets)
            found = checkpointer.restore(folder, args=args.StandardRestore(targets))
    for name, a in wanted.items():
        if name not in found:
            found[name] = jax.device_put(np.zeros(a.shape, a.dtype), a.sharding)
        elif a.sharding is None:
            found[name] = jax.device_put(found[name])
    return found
