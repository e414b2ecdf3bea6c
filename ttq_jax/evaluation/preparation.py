"""Loads a model by name and prepares what its recipe needs besides the prompt.

Every step shows its progress. Texts are read before anything slow begins.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from ttq_jax.checkpoint import Model, load
from ttq_jax.checkpoint.placing import Memory
from ttq_jax.checkpoint.store import load_offline
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.corpora import calibration_windows, read_corpus, sha256
from ttq_jax.evaluation.progress import Progress
from ttq_jax.mesh import parse as parse_mesh
from ttq_jax.mesh import undivided
from ttq_jax.offline.calibrate import prepare
from ttq_jax.processes import expect_same
from ttq_jax.quant.names import lacks_corpus
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Offline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """A recipe, and the sources of what it needs besides the prompt.

    Attributes:
      method: the recipe's name, for messages.
      recipe: None for the unquantized model.
      calibration: the calibration corpus, see `read_corpus`; None for none.
      calibration_tokens: how many of its first tokens are read.
      prepared: a directory of `ttq prepare`; None for none.
    """

    method: str
    recipe: Recipe | None
    calibration: str | None = None
    calibration_tokens: int = 8192
    prepared: str | None = None

    @property
    def anything(self) -> bool:
        """Whether anything is made before a prompt: a packed tree, moments or static factors."""
        if self.recipe is None:
            return False
        source = self.recipe.source
        return source.of != "prompt" or source.prior != "none" or self.recipe.low_rank.rank > 0


def load_model(
    name: str, dtype: Literal["float32", "bfloat16"], progress: Progress,
    ignore_keys: Sequence[str] = (), recipe: Recipe | None = None, *,
    mesh: str | None = None, dense_memory: Memory = "device", batches: Iterable[int] = (1,),
) -> tuple[Model, float]:  # fmt: skip
    """Loads a model, and prints what is to be known of its files.

    Args:
      name: see `checkpoint.load`.
      dtype: see `checkpoint.load`.
      progress: where to show it.
      ignore_keys: see `checkpoint.load`.
      recipe: the only one that the model is for, whose tables are packed while they are read; None
        for several, or the unquantized model.
      mesh: such as "data=2,model=4"; None for one device.
      dense_memory: see `checkpoint.load`.
      batches: how many prompts will be read together; a mesh that does not divide one of these
        numbers gets a note.

    Returns:
      The model and the seconds it took.
    """
    sizes, start = None if mesh is None else parse_mesh(mesh), time.perf_counter()
    with progress.stage(f"loading {name}") as update:
        model = load(
            name, dtype=dtype, progress=lambda done, total, _: update(done, total),
            ignore_keys=ignore_keys, head=None if recipe is None else recipe.head,
            mesh=sizes, dense_memory=dense_memory,
        )  # fmt: skip
    for note in (*model.notes, *filter(None, (undivided(sizes, n) for n in batches))):
        progress.note(note)
    return model, time.perf_counter() - start


def corpus_text(spec: str) -> str:
    """A corpus for this command, which may run in several processes.

    Args:
      spec: see `read_corpus`.

    Returns:
      The text, the same in all of them.

    Raises:
      CorpusError: see there.
      ConfigError: another process has read another text.
    """
    text = read_corpus(spec)
    expect_same("the text of a corpus", sha256(text))
    return text


def calibration_text(needs: Needs, progress: Progress) -> str | None:
    """The calibration corpus of a recipe that reads one.

    Args:
      needs: of the recipe.
      progress: gets a note if a corpus was given that is not used.

    Returns:
      The text; None if the recipe reads none.

    Raises:
      ConfigError: it needs one and none was given.
    """
    recipe = needs.recipe
    needed = recipe is not None and recipe.source.reads_corpus and not needs.prepared
    if needed and needs.calibration is None:
        give = "pass --calibration FILE, or --prepared DIR with what ttq prepare saved"
        raise ConfigError(lacks_corpus(f"recipe {needs.method}", give))
    if not needed and needs.calibration is not None:
        unread = f"recipe {needs.method} needs none"
        why = f"{needs.prepared} is used instead" if needs.prepared else unread
        progress.note(f"the calibration corpus is not used: {why}")
    return corpus_text(needs.calibration) if needed and needs.calibration else None


def windows_read(needs: Needs, model: Model, text: str | None) -> np.ndarray | None:
    """The windows of a calibration text that a recipe's moments come from.

    Args:
      needs: of the recipe.
      model: its tokenizer cuts them, no longer than its context.
      text: from `calibration_text`.

    Returns:
      int32[n, W]; None without a text.
    """
    if text is None:
        return None
    return calibration_windows(
        model.tokenizer, text, tokens=needs.calibration_tokens,
        window=min(512, model.config.max_positions),
    )  # fmt: skip


def prepare_offline(
    needs: Needs, model: Model, text: str | None, progress: Progress
) -> tuple[Offline, float]:
    """What the recipe needs besides the prompt.

    Args:
      needs: of the recipe.
      model: the unquantized model.
      text: from `calibration_text`.
      progress: where to show it.

    Returns:
      What `generate` takes as `offline`, and the seconds it took.
    """
    start, recipe = time.perf_counter(), needs.recipe
    if recipe is None:
        if needs.prepared:
            progress.note(f"recipe {needs.method} quantizes nothing: {needs.prepared} is not used")
        return Offline(), 0.0
    if needs.prepared:
        with progress.stage(f"loading {needs.prepared}"):
            kept = load_offline(Path(needs.prepared).expanduser(), model, recipe)
        return kept, time.perf_counter() - start
    if not needs.anything:
        return prepare(model, recipe), 0.0
    windows = windows_read(needs, model, text)
    with progress.stage(f"preparing {needs.method}") as update:
        offline = jax.block_until_ready(prepare(model, recipe, windows, update))
    return offline, time.perf_counter() - start
