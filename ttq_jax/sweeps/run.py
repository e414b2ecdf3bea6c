"""One cell -> one row: what is shared between cells is made once.

Models, texts, windows, a corpus's moments and quantized trees are kept for the next cell that needs
them; jax keeps the compiled programs.
"""

import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ttq_jax.checkpoint import Model, load
from ttq_jax.checkpoint.origin import find, origin
from ttq_jax.config import ConfigError
from ttq_jax.evaluation.acceptance import MEASURES
from ttq_jax.evaluation.acceptance import stream as compare
from ttq_jax.evaluation.corpora import calibration_windows, cut_windows, sha256
from ttq_jax.evaluation.describe import device, versions
from ttq_jax.evaluation.perplexity import Perplexity, interval95, stream
from ttq_jax.evaluation.preparation import corpus_text
from ttq_jax.offline.calibrate import calibrate, prepare, with_head
from ttq_jax.partition import on
from ttq_jax.quant.head import head_of as tables_of
from ttq_jax.quant.recipe import Recipe
from ttq_jax.quant.tree import check_selection
from ttq_jax.sweeps.axes import Cell, Options
from ttq_jax.sweeps.rows import Row
from ttq_jax.types import Moments, Offline

# Each program holds memory maps, of which a process has 65530.
_PROGRAMS = 32


def git_commit() -> str | None:
    """The commit of the package's own checkout, "+" after it if Python files differ from it.

    Other files do not count: a committed sweep that is continued writes into a tracked file itself.

    Returns:
      None where it is not a checkout, or there is no git.
    """

    def git(*words: str) -> str:
        here = Path(__file__).parent
        done = subprocess.run(["git", "-C", here, *words], capture_output=True, text=True)
        done.check_returncode()
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ":/*.py")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class PeakMemory:
    """The most memory in use so far.

    On an accelerator: the device's, since the process began. On a CPU: the process's resident set;
    on Linux, where the counter can be reset, since this object was made, elsewhere since the
    process began.
    """

    def __init__(self):
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        stats = jax.local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            return int(stats["peak_bytes_in_use"])
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclasses.dataclass
class _Kept:
    """The last few results of one kind, by key.

    Attributes:
      most: how many are kept.
      made: key -> result, the oldest first.
    """

    most: int
    made: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of that key, made if it is not there."""
        if key not in self.made:
            # Room first: a model or a Gram matrix may take half of the memory.
            while len(self.made) >= self.most:
                self.made.pop(next(iter(self.made)))
            self.made[key] = make()
        return self.made[key]


class Runner:
    """Runs cells, one after the other."""

    def __init__(
        self, note: Callable[[str], Any] = lambda text: None, mesh: Mapping[str, int] | None = None
    ):
        """Begins without anything kept.

        Args:
          note: called with what is to be known of a model's files, once it is loaded.
          mesh: whose devices share the models, see `checkpoint.load`; None for one device.
        """
        self._note, self._mesh = note, mesh
        self._heads = _Kept(1)
        self._models, self._texts, self._windows = _Kept(1), _Kept(16), _Kept(16)
        self._origins = _Kept(16)
        self._moments, self._offline, self._programs = _Kept(1), _Kept(1), set[Any]()
        self._commit = git_commit()

    def text(self, spec: str) -> str:
        """A corpus; see `corpus_text`."""
        return self._texts.get(spec, lambda: corpus_text(spec))

    def origin(self, name: str) -> dict[str, str]:
        """Which files a model's name stands for now; see `checkpoint.origin`."""
        return self._origins.get(name, lambda: origin(find(name)))

    def run(self, cell: Cell, progress: Callable[[Perplexity, int], Any]) -> Row:
        """Scores one cell.

        Args:
          cell: to run.
          progress: called with the running measurement and the number of windows.

        Returns:
          Its row, for `Rows.append`.

        Raises:
          ConfigError: the cell is illegal, or does not fit its model.
          CorpusError: a text cannot be read, or is too short.
          CheckpointError: the model cannot be read.
        """
        if cell.error or cell.protocol is None:
            raise ConfigError(cell.error)
        options, memory, start = cell.options, PeakMemory(), time.perf_counter()
        which = (options.model, options.dtype, options.ignore_key, options.dense_memory)
        dense: Model = self._models.get(which, lambda: self._load(*which))
        with on(dense.mesh):
            check_selection(dense.params, cell.recipe)
        head = None if cell.recipe is None else cell.recipe.head
        model: Model = self._heads.get((which, head), lambda: with_head(dense, cell.recipe))
        text = self.text(options.corpus)
        windows = self._cut(model, options)
        offline = self._offline_of(model, cell)
        self._forget_programs((options.model, cell.recipe, cell.protocol, options.cache_dtype))
        prepared = time.perf_counter()
        for running in stream(
            model, windows, recipe=cell.recipe, offline=offline, protocol=cell.protocol,
            cache_dtype=options.cache_dtype,
        ):  # fmt: skip
            progress(running, len(windows))
        scored = time.perf_counter()
        agreement = {}
        if cell.recipe is not None and cell.values.get("acceptance"):
            agreement["acceptance"] = agreement_of(
                dense, windows, cell.recipe, offline, options.prompt_tokens
            )
        return head_of(cell, self._commit) | {
            "model": dict(model.origin), "notes": list(model.notes),
            "corpus_sha256": sha256(text),
            "calibration_sha256": self._calibration_digest(cell),
            "windows": running.windows, "scored": cell.protocol.scored, "nll": running.nll,
            "perplexity": running.perplexity,
            "interval_95": interval95(running.nll, cell.protocol.scored),
            "effective_bits": round(running.effective_bits, 4),
            "model_bits": round(running.model_bits, 4),
            "bytes_per_token": running.bytes_per_token,
            **agreement,
            "seconds": {
                "prepare": round(prepared - start, 3), "score": round(running.seconds, 3),
                **({"compare": round(time.perf_counter() - scored, 3)} if agreement else {}),
            },
            "peak_memory_bytes": memory.bytes(),
        }  # fmt: skip

    def _load(self, name: str, dtype: Any, ignore_keys: str, dense_memory: Any) -> Model:
        """Another model; everything of the one before is released first."""
        for kept in (self._heads, self._windows, self._moments, self._offline):
            kept.made.clear()
        model = load(
            name, dtype=dtype, ignore_keys=ignore_keys.split(), dense_memory=dense_memory,
            mesh=self._mesh,
        )  # fmt: skip
        for note in model.notes:
            self._note(f"{model.origin['file']}: {note}")
        return model

    def _forget_programs(self, program: Any) -> None:
        if len(self._programs | {program}) > _PROGRAMS:
            jax.clear_caches()
            self._programs.clear()
        self._programs.add(program)

    def _cut(self, model: Model, options: Options) -> np.ndarray:
        """The windows that are scored: the first ones, or a draw of them by the seed."""
        spec, size, most, seed = (
            options.corpus, options.window, options.max_windows, options.seed
        )  # fmt: skip
        first = most if seed is None else None
        windows = self._windows.get(
            (spec, size, first),
            lambda: cut_windows(model.tokenizer, self.text(spec), size, max_windows=first),
        )
        return windows if seed is None else drawn(windows, most, seed)

    def _calibration(self, model: Model, options: Options) -> np.ndarray:
        """The windows of the calibration text: the first ones, or a draw of them by the seed."""
        text, tokens = self.text(options.calibration or ""), options.calibration_tokens
        size = min(512, model.config.max_positions, tokens)
        if options.seed is None:
            return calibration_windows(model.tokenizer, text, tokens=tokens, window=size)
        # One error for a text that is too short, whichever windows are drawn.
        first = calibration_windows(model.tokenizer, text, tokens=tokens, window=size)
        return drawn(cut_windows(model.tokenizer, text, size), len(first), options.seed)

    def _offline_of(self, model: Model, cell: Cell) -> Offline:
        recipe, options = cell.recipe, cell.options
        source = None
        if recipe is not None and recipe.source.reads_corpus:
            source = (options.calibration, options.calibration_tokens, options.seed)

        def moments(recipe: Recipe) -> dict[str, Moments]:
            return self._moments.get(
                (source, recipe.reads, recipe.head),
                lambda: calibrate(model, self._calibration(model, options), recipe.reads),
            )

        return self._offline.get(
            (recipe, source),
            lambda: jax.block_until_ready(
                prepare(model, recipe, moments(recipe) if recipe and source else None)
            ),
        )

    def _calibration_digest(self, cell: Cell) -> str | None:
        read = cell.recipe is not None and cell.recipe.source.reads_corpus
        return sha256(self.text(cell.options.calibration or "")) if read else None


def agreement_of(
    dense: Model, windows: np.ndarray, recipe: Recipe, offline: Offline, prompt_tokens: int
) -> dict[str, Any]:
    """How often quantized weights agree with the unquantized ones, as `ttq acceptance` has it.

    Args:
      dense: the unquantized model, its tables too.
      windows: int32[n, W].
      recipe: how to quantize.
      offline: from `prepare`, of this model or of the one whose tables are packed.
      prompt_tokens: P.

    Returns:
      Per window "greedy", "sampled" and "divergence"; and "compared", tokens of a window.
    """
    made = dataclasses.replace(offline, head=tables_of(dense.params, recipe))
    *_, found = compare(dense, windows, recipe=recipe, offline=made, prompt_tokens=prompt_tokens)
    return {name: getattr(found, name) for name in (*MEASURES, "compared")}


def drawn(windows: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Some of the windows; a larger count adds to the draw of a smaller one.

    Args:
      windows: int32[n, W].
      count: how many, >= 1; None or more than n takes all.
      seed: of the draw.

    Returns:
      int32[min(count, n), W], in the order of the draw.
    """
    return windows[np.random.default_rng(seed).permutation(len(windows))[:count]]


def head_of(cell: Cell, commit: str | None) -> Row:
    """What every row says, of a finished cell and of a failed one.

    Args:
      cell: which.
      commit: from `git_commit`.

    Returns:
      JSON data.
    """
    return {
        "key": cell.key, "cell": cell.values,
        "recipe": None if cell.recipe is None else cell.recipe.describe(),
        "device": device(), "versions": versions(), "git_commit": commit,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "process": os.getpid(),
    }  # fmt: skip
