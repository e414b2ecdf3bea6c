"""Saves and loads what is made once per model: moments, priors, low-rank factors, packed trees.

Stored data is right only for the model and the recipe that it was made for, and a mismatch still
writes fluent text. So a store names both, and loading refuses a mismatch.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from ttq_jax.checkpoint.fingerprint import fingerprint
from ttq_jax.checkpoint.model import Model
from ttq_jax.checkpoint.store_checks import check_packed
from ttq_jax.checkpoint.store_files import (
    Shardings,
    StoreError,
    check_destination,
    read,
    read_header,
    shapes,
    write,
)
from ttq_jax.checkpoint.store_mesh import on_this_mesh, shardings
from ttq_jax.foreign import named
from ttq_jax.partition import on
from ttq_jax.quant.head import check_head, head_of
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import replace_kernels
from ttq_jax.types import MixedLinear, Moments, Offline, QuantizedLinear, kernels

__all__ = [
    "StoreError",
    "check_destination",
    "fingerprint",
    "load_conversation",
    "load_messages",
    "load_offline",
    "save_conversation",
    "save_offline",
]

_KINDS = {
    "offline": "what a recipe needs before any prompt (save_offline)",
    "conversation": "the moments and messages of a conversation (save_conversation)",
    "function": "the packed parameters of a function (save_packed)",
}

_UNQUANTIZED = {"moments": {"of": "none", "prior": "none"}}

# Choices of a recipe that do not change a tree quantized before any prompt.
_OF_THE_PROMPT = ("batch", "prefill")

# A store holds no tables: `load_offline` packs the model's.
_OF_THE_MODEL = ("head",)


def _identity(model: Model) -> dict[str, str]:
    """What identifies the model: the fingerprint; the rest is for messages."""
    return {"name": model.name, "dtype": model.dtype, "fingerprint": fingerprint(model)}


def _about(kind: str, model: Model, recipe: Recipe | None) -> dict[str, Any]:
    """What a store's header says of its contents."""
    described = _UNQUANTIZED if recipe is None else recipe.describe()
    return {"kind": kind, "recipe": described, "model": _identity(model)}


def save_offline(path: str | Path, model: Model, recipe: Recipe, offline: Offline) -> None:
    """Saves what `prepare` made.

    Of a packed tree only the blocks' packed kernels are written; the rest is the model's, the
    packed tables too. An interrupted
    save leaves an old store as it was. What a killed one leaves, a hidden directory beside it, is
    removed by the next save to that place.

    Args:
      path: a directory; a store in it is replaced.
      model: the one it was made for, dense.
      recipe: the one it was made for.
      offline: moments, factors or a packed tree, as the recipe needs them.

    Raises:
      StoreError: the recipe needs something else, or the path is in use or cannot be written.
    """
    _check_parts(f"{path}: not saved", offline, recipe)
    if offline.packed is not None:
        packed = {
            name: kernel
            for name, kernel in kernels(offline.packed["layers"]).items()
            if isinstance(kernel, QuantizedLinear | MixedLinear)
        }
        offline = dataclasses.replace(offline, packed=packed)
    write(path, _about("offline", model, recipe), dataclasses.replace(offline, head=None))


def load_offline(
    path: str | Path, model: Model, recipe: Recipe, *, sharding: Shardings = None
) -> Offline:
    """Loads what `save_offline` wrote; every bit is as it was.

    A tree that was packed on one mesh, or on one device, may be loaded onto another: what devices
    share by rows is packed anew where their number differs.

    The recipe may differ from the saved one in settings that do not change the saved data: a
    corpus's moments serve any number of prior tokens, but a packed tree only its own recipe.

    Args:
      path: the directory.
      model: the model it was made for, dense.
      recipe: the one that will use it.
      sharding: where the arrays go: None for where the model's are; a sharding for all of them; or
        a function of an array's name ("packed.q.planes.0", "moments.attn_in.sums") and shape
        that gives its sharding or None. The model's own arrays stay where they are.

    Returns:
      What `generate` and `perplexity` take as `offline`.

    Raises:
      StoreError: not such a store, of another format, model or recipe, incomplete or damaged.
      ConfigError: a group of input channels would lie on several devices of the model's mesh.
    """
    header, offline = _fitting(path, "offline", model)
    _check_recipe(path, header["recipe"], recipe, offline)
    _check_parts(str(path), offline, recipe)
    check_head(model.params, recipe)
    if offline.packed is not None:
        check_packed(path, offline.packed, model.params, recipe)
    with on(model.mesh):
        if model.mesh is not None and sharding is None:
            sharding = shardings(offline, model.mesh)
        offline = read(path, header, sharding)
        offline = dataclasses.replace(offline, head=head_of(model.params, recipe))
        if offline.packed is None:
            return offline
        packed = on_this_mesh(offline.packed, model.mesh)
    tree = {**model.params, **(offline.head or {})}
    return dataclasses.replace(offline, packed=replace_kernels(tree, packed))


def save_conversation(
    path: str | Path, model: Model, recipe: Recipe | None, moments: dict[str, Moments],
    messages: Sequence[Mapping[str, str]] = (),
) -> None:  # fmt: skip
    """Saves a conversation's state.

    Args:
      path: a directory; a store in it is replaced.
      model: the one it was held with.
      recipe: one with a decay, or any if there are messages.
      moments: per site, of the turns so far; `Generation.moments`.
      messages: of the turns so far, each with a role and a content.

    Raises:
      StoreError: nothing to save, not this recipe's moments, or the path is in use or cannot be
        written.
    """
    if not moments and not messages:
        raise StoreError(
            f"{path}: not saved: expected the moments of a conversation, got none; use a recipe "
            "with moments.decay above 0, which keeps them"
        )
    if moments and recipe is not None:
        _check_moments(f"{path}: not saved", moments, recipe)
    about = _about("conversation", model, recipe)
    said = {"messages": [dict(one) for one in messages]} if messages else {}
    write(path, about | said, moments)


def load_messages(path: str | Path, model: Model) -> list[dict[str, str]]:
    """The messages of a conversation that `save_conversation` wrote.

    Args:
      path: the directory.
      model: the model it was held with, dense.

    Returns:
      The messages; none if it kept only moments.

    Raises:
      StoreError: not such a store, of another format or model, or damaged.
    """
    return _fitting(path, "conversation", model)[0].get("messages", [])


def load_conversation(
    path: str | Path, model: Model, recipe: Recipe, *, sharding: Shardings = None
) -> dict[str, Moments]:
    """Loads what `save_conversation` wrote; every bit is as it was.

    Args:
      path: the directory.
      model: the model it was held with, dense.
      recipe: of the next turn; it must read what the saved one read.
      sharding: see `load_offline`; names are "attn_in.sums", ….

    Returns:
      What `Offline.carried` takes.

    Raises:
      StoreError: not such a store, of another format, model or recipe, incomplete or damaged.
    """
    header, moments = _fitting(path, "conversation", model)
    _check_moments(str(path), moments, recipe)
    if sharding is None and model.mesh is not None:
        sharding = NamedSharding(model.mesh, PartitionSpec())
    return read(path, header, sharding)


def _fitting(path: str | Path, kind: str, model: Model) -> tuple[dict[str, Any], Any]:
    """A store's header and the shapes of its tree.

    Raises:
      StoreError: it cannot be read, is of another kind, or was made for another model.
    """
    header = read_header(path)
    if header["kind"] != kind:
        held = _KINDS.get(header["kind"], repr(header["kind"]))
        raise StoreError(f"{path}: expected {_KINDS[kind]}, found {held}")
    stored, ours = header["model"], _identity(model)
    if stored["fingerprint"] != ours["fingerprint"]:
        names = [f"{named([of['name']])} in {of['dtype'][:80]}" for of in (stored, ours)]
        what = f"made for {names[0]}, not for {names[1]}"
        if names[0] == names[1]:
            what = f"made for other weights or another config of {names[0]}"
        raise StoreError(f"{path}: {what}; load that model, or save a store for this one")
    return header, shapes(path, header)


def _check_moments(
    what: str, moments: dict[str, Moments], recipe: Recipe, *, diagonal: bool = False
) -> None:
    """Compares moments with what the recipe reads, or with the diagonal of its Gram matrix.

    Raises:
      StoreError: they hold something else.
    """
    reads = recipe.reads
    for site, one in moments.items():
        if one.sums.ndim < 2 or (one.gram is not None and one.gram.ndim < 3):
            raise StoreError(f"{what}: the moments of {site} are no power sums; save them again")
        block = 0 if one.gram is None else one.gram.shape[-1]
        wanted = reads.block(one.sums.shape[-1])
        wanted = min(wanted, 1) if diagonal else wanted
        if one.powers != reads.powers or block != wanted or (one.first is None) == reads.first:
            gram = f"Gram blocks of {wanted}" if wanted else "no Gram matrix"
            gram = f"sums of x and {gram}" if reads.first else gram
            raise StoreError(
                f"{what}: the moments of {site} hold {one.holds()}, but the recipe reads powers "
                f"{reads.powers} and {gram}; use the recipe they were observed for, or observe "
                "them again for this one"
            )


def _check_parts(what: str, offline: Offline, recipe: Recipe) -> None:
    """Checks that every part is there that the recipe needs before a prompt.

    Raises:
      StoreError: something is missing, or holds something else.
    """
    # Without a prior of the recipe, those are moments for experts that a prompt does not reach.
    profile = recipe.source.of == "prompt" and recipe.source.prior in {"weights", "none"}
    _check_moments(what, offline.moments, recipe, diagonal=profile)
    _check_moments(what, offline.carried, recipe)
    if offline.packed is not None:
        return
    rank = recipe.low_rank.rank
    needs = {
        "the moments of a corpus or of a prior": recipe.reads_offline and not offline.moments,
        f"static factors of rank {rank}": rank and not offline.low_rank,
    }
    missing = [part for part, absent in needs.items() if absent]
    if missing:
        raise StoreError(
            f"{what}: the recipe needs {' and '.join(missing)}, found none; save what prepare() "
            "makes for this recipe"
        )


def _origin(recipe: dict[str, Any]) -> str:
    """The source of the moments that a described recipe needs before a prompt."""
    source = recipe["moments"]
    return "corpus" if "corpus" in {source["of"], source["prior"]} else source["prior"]


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A description's values by their dotted names."""
    out: dict[str, Any] = {}
    for key, value in recipe.items():
        below = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return out


def _check_recipe(path: str | Path, stored: dict[str, Any], recipe: Recipe, held: Offline) -> None:
    """Checks that the stored recipe and the given one agree on what changes the stored data.

    Raises:
      StoreError: they differ.
    """
    described = recipe.describe()
    there, here = _flat(stored), _flat(described)
    keys: Iterable[str]
    if held.packed is not None:
        keys = [key for key in {**there, **here} if key not in _OF_THE_PROMPT + _OF_THE_MODEL]
    else:
        origin = "the origin of the moments"
        there[origin], here[origin] = _origin(stored), _origin(described)
        keys = [origin, "low_rank.rank", "low_rank.weighted"]
        if held.low_rank:
            keys += ["low_rank.store", "grid.store_dtype", "select"]
    absent = "absent"
    pairs = {key: (there.get(key, absent), here.get(key, absent)) for key in keys}
    pairs = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if pairs:
        # Of two rules only the names are given, not the settings of each.
        shared = {key: pair for key, pair in pairs.items() if absent not in pair} or pairs
        different = [
            f"{key}: saved {str(a)[:80]}, now {str(b)[:80]}" for key, (a, b) in shared.items()
        ]
        raise StoreError(
            f"{path}: made for another recipe: {'; '.join(different)}. Use the recipe it was made "
            "for, or prepare again for this one"
        )
