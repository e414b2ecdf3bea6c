"""How each kind of file is damaged, read, and read once more by something independent.

The second reader says what a damaged file says: where ours gives something else than before, the
file must say something else too, and the weights must be those that the second reader finds.
"""

import dataclasses
import hashlib
import io
import json
import random
import tomllib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import fuzz_mutations as damage
import gguf
import jax
import numpy as np
import sentencepiece
from fuzz_inputs import CHAT, CONFIGS, RTN, leaves_of
from safetensors.numpy import load as load_safetensors

from ttq_jax.checkpoint import Model, load
from ttq_jax.checkpoint.store import load_conversation, load_offline
from ttq_jax.config import ModelConfig
from ttq_jax.evaluation.corpora import read_corpus
from ttq_jax.models.families import FAMILIES
from ttq_jax.quant.recipe_text import from_toml, load_recipe, to_toml
from ttq_jax.sweeps.axes import read_sweep
from ttq_jax.sweeps.checked import checked
from ttq_jax.sweeps.findings import parts_of
from ttq_jax.sweeps.rows import read_rows

_TEXT = "hello, <s> déjà 123"

Damage = Callable[[random.Random, bytes], bytes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
      name: of the kind.
      folder: of the sound files.
      files: patterns of the files that are damaged, one a case.
      read: what this package makes of the folder.
      changes: ways to damage a file's structure; bytes are damaged besides.
      says: what the file says by another reader; raises where that one refuses it.
      agrees: whether ours is what the other reader found.
      fixed: no damage may change what is read.
      head: bytes at the start that are damaged more often.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    changes: tuple[Damage, ...] = ()
    says: Callable[[bytes], Any] = lambda data: data
    agrees: Callable[[Any, Any], bool] = lambda ours, said: True
    fixed: bool = False
    head: int = 0

    def damaged(self, rng: random.Random, data: bytes) -> bytes:
        """A damaged copy, never an equal one."""
        while True:
            change = rng.choice((partial(damage.damaged_bytes, head=self.head), *self.changes))
            made = change(rng, data)
            if made != data:
                return made


def digest(found: Any) -> str:
    """What was read, as a text that is equal for equal trees, configurations and ids."""
    if isinstance(found, Model):
        t = found.tokenizer
        ids = t.encode(_TEXT)
        said = (found.config, ids, t.decode(ids), t.bos_id, t.adds_bos, t.vocab_size, found.eos_ids)
        found = {"params": found.params, "said": repr(said)}
    out = hashlib.sha256()
    leaves, structure = jax.tree.flatten(found)
    out.update(str(structure).encode())
    for leaf in leaves:
        array = isinstance(leaf, jax.Array | np.ndarray)
        out.update(np.asarray(leaf).tobytes() if array else repr(leaf).encode())
    return out.hexdigest()


def _strict(data: bytes) -> Any:
    """JSON without a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=once)


def _ids_exist(found: Model, said: Any) -> bool:
    """Whether every id that a model gives is a row of its embedding."""
    t, size = found.tokenizer, found.config.vocab_size
    ids = [*t.encode(_TEXT), *found.eos_ids, *([] if t.bos_id is None else [t.bos_id])]
    return all(0 <= i < size for i in ids) and t.ordinary_size <= size


def _said_if_sound(data: bytes) -> Any:
    """What a file says that a model can do without; nothing if it is damaged."""
    try:
        return _strict(data)
    except (ValueError, RecursionError):
        return {}


def _ids_of_sentencepiece(data: bytes) -> list[int]:
    """The ids of a text by SentencePiece itself.

    Raises:
      RuntimeError: it does not take the file.
    """
    return sentencepiece.SentencePieceProcessor(model_proto=data).encode(_TEXT)


def _reads_as_sentencepiece(found: Model, said: list[int]) -> bool:
    return _ids_exist(found, said) and found.tokenizer.encode(_TEXT, add_bos=False) == said


def _tensors_of_safetensors(data: bytes) -> dict[str, np.ndarray]:
    (size,) = np.frombuffer(data[:8], "<u8")
    _strict(data[8 : 8 + int(size)])
    return load_safetensors(data)


def _tensors_of_gguf(data: bytes) -> dict[str, Any]:
    """Tensors and keys by llama.cpp's own reader, which leaves the tensors' places unchecked.

    Raises:
      ValueError: two tensors overlap, or one is not aligned or in its turn.
    """
    path = Path("other.gguf")
    path.write_bytes(data)
    reader, end = gguf.GGUFReader(path), 0
    said: dict[str, Any] = {
        name: [np.asarray(reader.fields[name].parts[i]).tobytes() for i in reader.fields[name].data]
        for name in reader.fields
    }
    for tensor in reader.tensors:
        place = tensor.data_offset - reader.data_offset
        if place != -(-end // reader.alignment) * reader.alignment:
            raise ValueError("a tensor is in another place")
        end = place + tensor.n_bytes
        # A copy: the reader maps the file.
        said[tensor.name] = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
    return said


def _weights_agree(config: ModelConfig, params: Any, said: dict[str, Any], in_gguf: bool) -> bool:
    """Whether a tree holds a file's tensors, by the definition of each edit."""
    family = FAMILIES[config.family]
    for leaf in leaves_of(config, family, in_gguf=in_gguf):
        node = params
        for key in leaf.path:
            node = node[key]
        for i, name in enumerate(leaf.names):
            if name not in said:  # in another part
                continue
            theirs = said[name].astype(np.float32)
            if leaf.edit == "minus_one":
                theirs = theirs - 1
            elif leaf.edit == "unpermute":
                heads = theirs.reshape(-1, config.head_dim // 2, 2, theirs.shape[-1])
                theirs = np.concatenate([heads[:, :, 0], heads[:, :, 1]], 1).reshape(theirs.shape)
            ours = np.asarray(node[i] if leaf.stack else node)
            if not np.array_equal(ours, theirs.T if leaf.transposed else theirs):
                return False
    return True


def _holds(found: Model, said: dict[str, Any], *, in_gguf: bool) -> bool:
    return _ids_exist(found, said) and _weights_agree(found.config, found.params, said, in_gguf)


@cache
def _llama(place: Path) -> Model:
    return load(place)


def _sealed(rng: random.Random, data: bytes) -> bytes:
    """A store's header, changed by somebody who made its checksum right again."""
    header = damage.damaged_data(rng, json.loads(data))
    if isinstance(header, dict):
        rest = {key: value for key, value in header.items() if key != "sha256"}
        text = json.dumps(rest, sort_keys=True).encode()
        header["sha256"] = hashlib.sha256(text).hexdigest()
    return json.dumps(header).encode()


def _lines_say(data: bytes) -> str:
    """The texts of JSON lines, by another way to cut lines."""
    lines = io.TextIOWrapper(io.BytesIO(data), "utf-8-sig", newline=None)
    return "\n\n".join(
        text if isinstance(text, str) else "\n".join(text)
        for text in (_strict(line.encode())["text"] for line in lines if line.strip())
    )


def _reported(place: Path) -> Any:
    """Rows of which a report can be made."""
    rows = read_rows(place)
    parts_of(checked(rows.values(), "rows"))
    return rows


def _recipe_agrees(found: Any, said: Any) -> bool:
    return from_toml(to_toml(found)) == found


_JSON = {"changes": (damage.damaged_json,), "says": _strict, "agrees": _ids_exist}
_TOML = {"changes": (damage.damaged_toml,), "says": lambda data: tomllib.loads(data.decode())}
_STORES: dict[str, Callable[[Path], Any]] = {
    "offline": lambda place: load_offline(place, _llama(place.parent / "llama"), RTN),
    "conversation": lambda place: load_conversation(place, _llama(place.parent / "llama"), CHAT),
}

KINDS: tuple[Kind, ...] = (
    *(
        Kind(name=f"config.json, {name}", folder=name, files=("config.json",), read=load, **_JSON)
        for name in CONFIGS
    ),
    Kind(
        name="safetensors", folder="qwen3", files=("model.safetensors",), read=load, head=3000,
        changes=(damage.damaged_safetensors,), says=_tensors_of_safetensors,
        agrees=partial(_holds, in_gguf=False),
    ),
    Kind(
        name="safetensors index", folder="sharded", files=("model.safetensors.index.json",),
        read=load, fixed=True, **_JSON,
    ),
    Kind(name="tokenizer.json", folder="llama", files=("tokenizer.json",), read=load, **_JSON),
    Kind(
        name="tokenizer_config.json", folder="llama", files=("tokenizer_config.json",), read=load,
        **_JSON,
    ),
    Kind(
        name="generation_config.json", folder="llama", files=("generation_config.json",), read=load,
        **_JSON | {"says": _said_if_sound},
    ),
    Kind(
        name="tokenizer.model", folder="sentencepiece", files=("tokenizer.model",), read=load,
        says=_ids_of_sentencepiece, agrees=_reads_as_sentencepiece,
    ),
    *(
        Kind(
            name=f"GGUF, {name}", folder=f"gguf_{name}", files=("model.gguf",), head=8000,
            read=lambda place: load(place / "model.gguf"), changes=(damage.damaged_gguf,),
            says=_tensors_of_gguf, agrees=partial(_holds, in_gguf=True),
        )
        for name in CONFIGS if name != "opt"
    ),
    Kind(
        name="GGUF, a part of three", folder="gguf_split", files=("*.gguf",), head=8000,
        read=lambda place: load(place / "model-00001-of-00003.gguf"),
        changes=(damage.damaged_gguf,), says=_tensors_of_gguf, agrees=partial(_holds, in_gguf=True),
    ),
    Kind(
        name="recipe", folder="recipe", files=("recipe.toml",), agrees=_recipe_agrees,
        read=lambda place: load_recipe(place / "recipe.toml"), **_TOML,
    ),
    Kind(
        name="sweep", folder="sweep", files=("sweep.toml",),
        read=lambda place: [cell.key for cell in read_sweep(str(place / "sweep.toml"))], **_TOML,
    ),
    *(
        Kind(name=f"store, {name}", folder=name, files=("**/*",), read=read, fixed=True)
        for name, read in _STORES.items()
    ),
    *(
        Kind(
            name=f"store with its checksum made right, {name}", folder=name, files=("ttq.json",),
            read=read, changes=(_sealed,) * 4, fixed=True,
        )
        for name, read in _STORES.items()
    ),
    Kind(
        name="JSON lines", folder="lines", files=("corpus.jsonl",), changes=(damage.damaged_lines,),
        read=lambda place: read_corpus(str(place / "corpus.jsonl")), says=_lines_say,
        agrees=lambda found, said: found == said,
    ),
    Kind(
        name="rows", folder="rows", files=("rows.jsonl",), read=_reported,
        changes=(damage.damaged_lines,) * 2,
        says=lambda data: [_strict(line) for line in data.split(b"\n")[:-1]],
    ),
)  # fmt: skip
