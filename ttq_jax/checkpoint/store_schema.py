"""What `ttq.json` may say: the schema of a store's header and of the trees in it."""

from ttq_jax.foreign import COUNT, Schema

_ARRAY = {"array": str, "shape": [COUNT], "dtype": str}
_MAYBE = (None, _ARRAY)


def _node(name: str, fields: dict[str, Schema], static: dict[str, Schema]) -> Schema:
    """The description of a node of `ttq_jax.types`."""
    return {"node": frozenset({name}), "fields": fields, "static": static}


def _named(schema: Schema) -> Schema:
    return {"dict": {"*": schema}}


_SUMS = {"sums": _ARRAY, "count": _ARRAY, "gram": _MAYBE, "first?": _MAYBE}
_MOMENTS = _named(_node("Moments", _SUMS, {"powers": [float]}))
_LOW_RANK = _node(
    "LowRank", {"down": _ARRAY, "up": _ARRAY, "down_scale": _MAYBE, "up_scale": _MAYBE}, {}
)
_CODED = _node("CodedScales", {"codes": _ARRAY, "columns": _ARRAY}, {})
_PAIRS = _CODED | {"node": frozenset({"CodedPairs"})}
_QUANTIZED = _node(
    "QuantizedLinear",
    {
        "planes": {"tuple": [_ARRAY]}, "scales": (_ARRAY, _CODED, _PAIRS), "zeros": _MAYBE,
        "channel_scale": _MAYBE, "low_rank": (None, _LOW_RANK), "layer": None,
    },
    dict.fromkeys(("bits", "group_size", "d_in", "d_out", "row_blocks?"), COUNT),
)  # fmt: skip
_MIXED = _node(
    "MixedLinear",
    {"stacks": {"tuple": [_QUANTIZED]}, "which": _ARRAY, "slot": _ARRAY, "layer": None},
    {},
)

TREES: dict[str, Schema] = {
    "offline": _node(
        "Offline",
        {
            "moments": _MOMENTS, "carried": _MOMENTS, "low_rank": _named(_LOW_RANK),
            "packed": (None, _named((_QUANTIZED, _MIXED))), "head?": None,
        },
        {},
    ),
    "conversation": _MOMENTS,
    "function": {
        "dict": {
            "dense": _named(_ARRAY),
            "packed": _named({"dict": {
                "views": {"tuple": [_QUANTIZED]}, "rows": {"tuple": [_ARRAY]},
            }}),
        }
    },
}  # fmt: skip
"""By the kind of store."""

_SIZES = [COUNT]
_OPERAND = {
    "steps": [[(str, COUNT, _SIZES)]], "shape": _SIZES, "batch": _SIZES, "contract": _SIZES,
    "free": _SIZES,
}  # fmt: skip
_PACKED = {"shape": _SIZES, "dtype": str, "operands": [_OPERAND]}

_OF_A_MODEL: Schema = {
    "kind": frozenset(TREES) - {"function"},
    "model": {"name": str, "dtype": str, "fingerprint": str},
    "recipe": {"moments": {"of": str, "prior": str}},
    "messages?": [{"role": str, "content": str}],
    "tree": dict,
    "files": {"*": {"bytes": range(2**63), "sha256": str}},
}

_OF_A_FUNCTION: Schema = {
    "kind": frozenset({"function"}),
    "packed": {"*": _PACKED},
    "tree": dict,
    "files": {"*": {"bytes": range(2**63), "sha256": str}},
}

HEADER: Schema = (_OF_A_MODEL, _OF_A_FUNCTION)
