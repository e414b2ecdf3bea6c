"""A problem as the GPU kernels' keywords: they do not take the problem itself yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.problem import Problem


def refusal_of(problem: Problem, chip: str | None) -> dict[str, Any]:
    """The arguments of a GPU kernel's `refusal`."""
    facts = {**vars(problem), "k": problem.k, "chip": chip, "shrinks": len(problem.shrinks)}
    del facts["kernel"]
    if problem.kernel == "quantize_pack":
        del facts["m"]
    return facts


def call_of(run: Callable[..., Any], problem: Problem) -> Callable[..., Any]:
    """A GPU kernel as a function of its arrays, with the low-rank pair as one of them."""
    p = problem
    static: dict[str, Any] = {"bits": p.bits, "group_size": p.group_size}
    if p.kernel == "packed_matmul":
        return lambda *arrays: run(*arrays, **static)
    static |= {"zero_point": p.zero_point, "store_dtype": p.store_dtype, "shrinks": p.shrinks}
    if p.kernel == "prefill_quantize":
        static["quantized"] = p.quantized
    return lambda *arrays: run(*arrays[:-2], *(arrays[-2] or (None, None)), arrays[-1], **static)
