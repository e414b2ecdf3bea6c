"""A loaded model: config, weights and tokenizer."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from ttq_jax.checkpoint.chat_template import ChatTemplate
from ttq_jax.checkpoint.errors import CheckpointError
from ttq_jax.checkpoint.tokenizer import Tokenizer
from ttq_jax.config import ModelConfig
from ttq_jax.models.cache import activation_dtype
from ttq_jax.types import Params


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A loaded model.

    Attributes:
      config: its architecture and sizes.
      params: its weights, of the form of `decoder.init_params`.
      tokenizer: its tokenizer.
      name: what it was loaded as.
      eos_ids: tokens that end a text.
      format: how the file's weights were quantized, as in "Q4_1"; "" if they were not.
      origin: which files it came from, see `checkpoint.origin`; empty if from none.
      notes: what its files left open or got wrong, and how it was read; a sentence each.
      chat: how it wants messages to be written; None for a model that has no such form.
      tables: of each table that is packed already, what its fingerprint says of it; by path.
      mesh: whose devices share it, see `partition.make_mesh`; None on one.
    """

    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    name: str
    eos_ids: tuple[int, ...]
    format: str = ""
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    chat: ChatTemplate | None = None
    tables: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None

    @property
    def dtype(self) -> str:
        """Of the unquantized weights and of the activations."""
        return str(activation_dtype(self.params))

    def __repr__(self) -> str:
        """One line: a notebook prints a model when it is the last value of a cell."""
        sizes = f"{self.config.n_layers} layers, width {self.config.d_model}"
        return f"Model({self.name!r}: {self.config.family}, {sizes}, {self.dtype})"

    def __post_init__(self):
        rows = self.config.vocab_size
        # Tokens without a row are common, such as Gemma 3's for an image; `encode` refuses them.
        if self.tokenizer.vocab_size > rows and self.tokenizer.ordinary_size > rows:
            raise CheckpointError(
                f"{self.name}: the tokenizer has {self.tokenizer.vocab_size} tokens, the embedding "
                f"only {rows} rows. Use the tokenizer of this model"
            )
        for what, ids in (("begins", [self.tokenizer.bos_id]), ("ends", self.eos_ids)):
            for i in ids:
                if i is not None and not 0 <= i < self.config.vocab_size:
                    raise CheckpointError(
                        f"{self.name}: expected a token below {self.config.vocab_size}, the rows "
                        f"of the embedding, as the one that {what} a text, got {i}. Correct the "
                        "model's configuration"
                    )
