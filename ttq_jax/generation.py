"""What an answer was: its tokens and text, its sizes, its drafts."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ttq_jax.checkpoint import Model
from ttq_jax.draft_costs import LENGTHS, DraftCosts
from ttq_jax.models.traffic import bytes_per_token
from ttq_jax.prefill import decoded_shapes
from ttq_jax.quant.recipe import Recipe
from ttq_jax.types import Moments, Offline, effective_bits, model_bits


@dataclasses.dataclass(frozen=True)
class Drafts:
    """What became of one answer's drafts, see `speculation`.

    Attributes:
      drafted: tokens that the quantized weights drafted.
      kept: drafts that are in the answer.
      passes: of the unquantized weights, each over one cycle's drafts.
      tokens: of the answer after the first, which the prompt's pass gives; its end token included.
      lengths: where each cycle chose: of the passes, those over each of `draft_costs.LENGTHS`
        drafts; else ().
    """

    drafted: int
    kept: int
    passes: int
    tokens: int
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, row: Iterable[Any]) -> "Drafts":
        """From a row of `speculation.stats`."""
        drafted, kept, passes, tokens, *lengths = map(int, row)
        return cls(drafted, kept, passes, tokens, tuple(lengths))

    @property
    def acceptance(self) -> float | None:
        """Kept drafts over drafts; None without any."""
        return self.kept / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens per pass of the unquantized weights; None without any."""
        return self.tokens / self.passes if self.passes else None

    def describe(self) -> dict[str, Any]:
        """JSON data."""
        plain = {k: v for k, v in dataclasses.asdict(self).items() if k != "lengths"}
        return plain | self._chosen() | {
            name: None if share is None else round(share, 4)
            for name, share in (
                ("acceptance", self.acceptance), ("tokens_per_pass", self.tokens_per_pass)
            )
        }  # fmt: skip

    def _chosen(self) -> dict[str, Any]:
        """What the cycles chose; {} where they did not."""
        if not self.lengths:
            return {}
        return {
            "drafts_per_pass": round(self.drafted / self.passes, 4) if self.passes else None,
            "passes_by_drafts": {
                str(k): n for k, n in zip(LENGTHS, self.lengths, strict=True)
            },
        }  # fmt: skip

    def in_words(self) -> str:
        """One line for people."""
        said = "the unquantized weights verified the answer"
        if self.lengths and self.passes and not self.drafted:
            return f"{said}: drafting was not worth its cost, all {self.passes} passes were plain"
        if self.acceptance is None:
            return said
        said += (
            f": {self.acceptance:.0%} of {self.drafted} drafts were kept, "
            f"{self.tokens_per_pass:.3g} tokens per pass"
        )
        if not self.lengths:
            return said
        each = zip(self.lengths, LENGTHS, strict=True)
        return f"{said}; passes by drafts: " + ", ".join(f"{n} of {k}" for n, k in each if n)

    def __add__(self, other: "Drafts") -> "Drafts":
        """Those of both answers, both with chosen numbers of drafts or neither."""
        return Drafts(
            self.drafted + other.drafted, self.kept + other.kept, self.passes + other.passes,
            self.tokens + other.tokens,
            tuple(a + b for a, b in zip(self.lengths, other.lengths, strict=True)),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: per prompt, the new token ids (end-of-text excluded).
      texts: what they add to the prompt's text, see `Tokenizer.continuation`.
      prompt_tokens: per prompt, its length in tokens.
      effective_bits: per weight of the linear layers, of the weights that the decode loop read.
      model_bits: the same per parameter of the whole model.
      bytes_per_token: read for each token that is decoded, see `models.traffic`.
      stopped: per prompt, "end" (an end-of-text token) or "limit" (max_new_tokens).
      seconds: wall clock of the whole call, compilation included.
      moments: per site, for the next turn of a conversation; {} for recipes without a decay.
      unreached_experts: mean share of the experts that a prompt did not reach, quantized by the
        prior; None without experts, or for recipes that read nothing of a prompt.
      drafts: per prompt; [] without speculation.
      draft_costs: by which each cycle chose its drafts, of the last batch; None where none did.
    """

    tokens: list[list[int]]
    texts: list[str]
    prompt_tokens: list[int]
    stopped: list[str]
    effective_bits: float
    model_bits: float
    bytes_per_token: int
    seconds: float
    moments: dict[str, Moments] = dataclasses.field(default_factory=dict)
    unreached_experts: float | None = None
    drafts: list[Drafts] = dataclasses.field(default_factory=list)
    draft_costs: DraftCosts | None = None


def made_of(
    model: Model, recipe: Recipe | None, offline: Offline, rows: Sequence[Sequence[int]],
    new: list[list[int]], stopped: list[str], moments: dict[str, Moments], seconds: float,
    unreached: float | None, drafts: Sequence[Drafts] = (), draft_costs: DraftCosts | None = None,
) -> Generation:  # fmt: skip
    """The result for some answers.

    Args:
      model: see `generate`.
      recipe: see `generate`.
      offline: what the last of them was made with.
      rows: token ids of the prompts.
      new: of the answers.
      stopped: see `Generation`.
      moments: see `Generation`.
      seconds: see `Generation`.
      unreached: see `Generation.unreached_experts`.
      drafts: see `Generation`.
      draft_costs: see `Generation`.

    Returns:
      The result.
    """
    shapes = decoded_shapes(model.params, model.config, recipe, offline)
    return Generation(
        tokens=new,
        texts=list(map(model.tokenizer.continuation, rows, new)),
        prompt_tokens=list(map(len, rows)),
        stopped=stopped,
        effective_bits=effective_bits(shapes),
        model_bits=model_bits(shapes),
        bytes_per_token=bytes_per_token(shapes, model.config),
        seconds=seconds,
        moments=moments,
        unreached_experts=unreached,
        drafts=list(drafts),
        draft_costs=draft_costs,
    )
