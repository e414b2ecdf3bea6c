"""What a decode step reads: the limit of its speed where memory is slow and arithmetic is not."""

from ttq_jax.config import ModelConfig
from ttq_jax.types import EXPERT_SITES, SITES, Params, stored_bytes


def bytes_per_token(params: Params, config: ModelConfig) -> int:
    """Bytes of the weights that are read for each token that is decoded.

    Everything counts that a step reads once: blocks, norms and the head at their stored size; of an
    embedding that is not the head, and of learned positions, one row; of experts, those that a
    token is sent to. The KV cache does not: it grows with the text.

    Args:
      params: the tree that is decoded, or its shapes.
      config: the model's.

    Returns:
      Bytes; a batch reads them once for all its rows, but for rows and experts.
    """
    total = 0.0
    for name, entry in params.items():
        size = stored_bytes(entry)
        if name == "layers":
            total += size - (_unread(entry, config) if config.n_experts else 0)
        elif name == "positions":
            total += size / config.max_positions
        elif name == "embed" and not config.tie_embeddings:
            total += size / config.vocab_size
        else:
            total += size
    return round(total)


def _unread(layers: Params, config: ModelConfig) -> float:
    """Bytes of the experts that a token is not sent to."""
    names = [name for site in EXPERT_SITES for name in SITES[site] if name in layers]
    size = stored_bytes([layers[name]["kernel"] for name in names])
    return size * (1 - config.experts_per_token / config.n_experts)
