"""Experts that a layer keeps in two tensors, as transformers 5 does: where each one is in them.

`gate_up_proj` is [E, 2F, D] and `down_proj` [E, D, F]; some code keeps their transposes, [E, D, 2F]
and [E, F, D]. The shapes tell which: no F above 0 fits both. A checkpoint saved with
`save_original_format=False` has them; otherwise transformers writes a tensor for each expert.
"""

import dataclasses
from collections.abc import Mapping

from ttq_jax.checkpoint.errors import CheckpointError

_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


@dataclasses.dataclass(frozen=True)
class Part:
    """One expert's projection.

    Attributes:
      tensor: that it is in.
      expert: its index there.
      first: its first row among the expert's.
      shape: [d_out, d_in].
      transposed: whether the tensor has rows as its last axis.
    """

    tensor: str
    expert: int
    first: int
    shape: tuple[int, int]
    transposed: bool


def expert_parts(
    label: str, shapes: Mapping[str, tuple[int, ...]], n_experts: int
) -> dict[str, Part]:
    """The experts of a checkpoint's fused tensors.

    Args:
      label: the checkpoint, for messages.
      shapes: tensor name to shape.
      n_experts: E, as the configuration says it.

    Returns:
      By the name that the tensor of one expert would have; {} for none.

    Raises:
      CheckpointError: one of two tensors is missing, or their shapes do not go together.
    """
    parts = {}
    layers = {n.removesuffix(end) for end in (_GATE_UP, _DOWN) for n in shapes if n.endswith(end)}
    for layer in sorted(layers):
        both, down = layer + _GATE_UP, layer + _DOWN
        lacking = [name for name in (both, down) if name not in shapes]
        if lacking:
            raise CheckpointError(
                f"{label}: missing tensor {lacking[0]}, which belongs beside the other of a "
                "layer's two tensors of experts. Check that the checkpoint is complete"
            )
        width, d_ff, transposed = _sizes(label, both, down, shapes, n_experts)
        for e in range(n_experts):
            for name, tensor, first, shape in (
                ("gate_proj", both, 0, (d_ff, width)),
                ("up_proj", both, d_ff, (d_ff, width)),
                ("down_proj", down, 0, (width, d_ff)),
            ):
                part = Part(tensor, e, first, shape, transposed)
                parts[f"{layer}.experts.{e}.{name}.weight"] = part
    return parts


def _sizes(
    label: str, both: str, down: str, shapes: Mapping[str, tuple[int, ...]], n_experts: int
) -> tuple[int, int, bool]:
    """(D, F, whether the tensors are transposed).

    Raises:
      CheckpointError: the two shapes fit neither way.
    """
    one, other = shapes[both], shapes[down]
    if len(other) == 3 and 0 not in other:
        _, rows, columns = other
        if one == (n_experts, 2 * columns, rows) and other[0] == n_experts:
            return rows, columns, False
        if one == (n_experts, columns, 2 * rows) and other[0] == n_experts:
            return columns, rows, True
    raise CheckpointError(
        f"{label}: {both} and {down}: expected shapes [{n_experts}, 2·F, D] and [{n_experts}, D, "
        f"F], or [{n_experts}, D, 2·F] and [{n_experts}, F, D], for {n_experts} experts of D "
        f"channels and F units, got {list(one)} and {list(other)}. Check that configuration and "
        "weights are of the same model"
    )
