"""The paper's tables (arXiv:2603.19296) as data, as far as they are known here.

The paper itself was not available: every number was taken from independent summaries of it that
agree with each other, and the report says so. Perplexity, lower is better; group size 32; AWQ is
calibrated on C4; "macro" is the mean over the test sets of WikiText-2, PTB and C4. The paper scores
the window that the weights were made from (our protocol "window").
"""

import dataclasses

SOURCE = "arXiv:2603.19296, from summaries of it"
MACRO = ("wikitext2", "ptb", "c4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One number of the paper.

    Attributes:
      table: where it stands.
      model: as the paper calls it.
      hub: hub ids under which the model is found; which of them the paper used is not known.
      method: "none", "RTN", "AWQ" or "TTQ".
      rank: of TTQ's static low-rank part.
      bits: None for the unquantized model, or where the summaries do not say.
      perplexity: the number.
      unquantized: of the same model in the same table; None if not known.
      note: what else is known of it.
    """

    table: str
    model: str
    hub: tuple[str, ...]
    method: str
    rank: int = 0
    bits: int | None
    perplexity: float
    unquantized: float | None = None
    note: str = ""


_HUB = {
    "OPT-6.7B": ("facebook/opt-6.7b",),
    "Qwen3-1.7B": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B-Base"),
    "Gemma3-1B": ("google/gemma-3-1b-pt", "google/gemma-3-1b-it"),
    "OPT-125M": ("facebook/opt-125m",),
    "OPT-350M": ("facebook/opt-350m",),
}

_UNQUANTIZED = {"OPT-6.7B": 13.1}

_INFERRED = {"OPT-125M": "the row's model name is inferred: a summary calls it OPT series"}

# Table 3: perplexity at 2, 3, 4 and 5 bits.
_TABLE_3 = {
    ("OPT-6.7B", "RTN", 0): (5716.5, 26.2, 13.7, 13.2),
    ("OPT-6.7B", "AWQ", 0): (16.9, 13.6, 13.2, 13.1),
    ("OPT-6.7B", "TTQ", 16): (16.3, 13.4, 13.1, 13.1),
    ("Qwen3-1.7B", "RTN", 0): (1.4e6, 162.8, 30.6, 26.1),
    ("Qwen3-1.7B", "AWQ", 0): (2364.7, 28.2, 24.9, 24.4),
    ("Qwen3-1.7B", "TTQ", 16): (264.6, 26.4, 24.3, 24.1),
    ("Gemma3-1B", "RTN", 0): (8.6e5, 209.4, 111.1, 96.6),
    ("Gemma3-1B", "AWQ", 0): (5486.9, 150.8, 93.5, 93.6),
    ("Gemma3-1B", "TTQ", 16): (1804.9, 114.5, 91.7, 90.3),
    ("OPT-125M", "RTN", 0): (5058.5, 56.3, 33.5, 31.8),
    ("OPT-125M", "AWQ", 0): (381.7, 37.4, 32.3, 31.4),
    ("OPT-125M", "TTQ", 16): (141.7, 35.8, 31.8, 31.1),
}

_BITS_UNKNOWN = "bits and corpora are not in the summaries"

PUBLISHED: tuple[Published, ...] = (
    *(
        Published(
            table="Table 3", model=model, hub=_HUB[model], method=method, rank=rank, bits=bits,
            perplexity=value, unquantized=_UNQUANTIZED.get(model), note=_INFERRED.get(model, ""),
        )
        for (model, method, rank), row in _TABLE_3.items()
        for bits, value in zip((2, 3, 4, 5), row, strict=True)
    ),
    Published(
        table="Table 1", model="OPT-350M", hub=_HUB["OPT-350M"], method="TTQ", bits=None,
        perplexity=25.02, note=f"no calibration tokens; {_BITS_UNKNOWN}",
    ),
    Published(
        table="Table 1", model="OPT-350M", hub=_HUB["OPT-350M"], method="AWQ", bits=None,
        perplexity=25.07, note=f"2^17 calibration tokens; {_BITS_UNKNOWN}",
    ),
)  # fmt: skip
