"""The paper's numbers beside ours, and how the settings differ."""

from collections.abc import Sequence

from ttq_jax.sweeps import words
from ttq_jax.sweeps.parts import Heading, Part, Table, Text
from ttq_jax.sweeps.published import MACRO, PUBLISHED, SOURCE, Published
from ttq_jax.sweeps.tables import SETTING, Summary, plain_of, settings, varying

# The paper's D.
_SCALE = {"rule": "power_law", "alpha": 0.5, "lam": 0.4, "p": 2.0}
_METHODS = {"RTN": ("rtn",), "AWQ": ("awq",), "TTQ": ("paper", "ttq"), "none": ("none",)}


def _is_macro(one: Summary) -> bool:
    """Whether it was scored on the three test sets of the paper's mean."""
    return {c.removeprefix("hf:").partition(":")[0] for c in one.rows} >= set(MACRO)


def _macro(one: Summary) -> float:
    rows = [row for c, row in one.rows.items() if c.removeprefix("hf:").partition(":")[0] in MACRO]
    return sum(row["perplexity"] for row in rows) / len(rows)


def _differs(cell: Published, one: Summary, same_model: bool) -> str:
    """How our measurement differs from the paper's."""
    recipe, said = one.row["recipe"], []
    if not same_model:
        said.append(f"model {words.model(one.row)}")
    if one.values["protocol"] != "window":
        said.append(f"protocol {one.values['protocol']} (prompts of {one.values['prompt_tokens']})")
    if one.reader == "unquantized" and cell.method == "TTQ":
        said.append("unquantized weights read the prompt")
    if cell.method == "TTQ" and recipe["scale"] != _SCALE:
        said.append("scale " + ", ".join(f"{k} {v}" for k, v in recipe["scale"].items()))
    if recipe["grid"]["group_size"] != 32:
        said.append(f"group {recipe['grid']['group_size']}")
    if recipe["grid"]["symmetric"]:
        said.append("symmetric grid")
    return ", ".join(said)


def _ours(cell: Published, found: Sequence[Summary]) -> list[tuple[Summary, bool]]:
    """Our measurements of a published cell: of that model, or else of others."""
    names = {name for hub in cell.hub for name in (hub.lower(), hub.split("/")[-1].lower())}
    alike = [
        one for one in found
        if one.values["recipe"] in _METHODS[cell.method]
        and _is_macro(one)
        and (recipe := one.row["recipe"]) is not None
        and recipe["grid"]["bits"] == cell.bits
        and recipe["low_rank"]["rank"] == cell.rank
    ]  # fmt: skip

    def same(one: Summary) -> bool:
        return str(one.values["model"]).lower().rstrip("/").split("/")[-1] in names

    def published_grid(one: Summary) -> bool:
        recipe = one.row["recipe"]
        return recipe["grid"]["group_size"] == 32 and not recipe["grid"]["symmetric"]

    # Of a sweep over groups, only the paper's group stands beside it.
    alike = list(filter(published_grid, alike)) or alike
    exact = [one for one in alike if same(one)]
    return [(one, True) for one in exact] or [(one, False) for one in alike]


def beside_paper(found: Sequence[Summary]) -> list[Part]:
    """Every published cell with ours beside it; one sentence if none of ours is comparable.

    Args:
      found: from `tables.summaries`.

    Returns:
      A section of the report.
    """
    if not any(_ours(cell, found) for cell in PUBLISHED):
        return [Heading("Beside the paper"), Text(
            f"No row has the method, bits and rank of one of the {len(PUBLISHED)} published cells "
            f"({SOURCE}) on all of WikiText-2, PTB and C4 (corpora named wikitext2, ptb, c4)."
        )]  # fmt: skip
    plains = {repr(s): plain_of(group) for s, group in settings(found)}
    axes = [axis for axis in varying(found) if axis not in SETTING]
    windows = sorted({one.values["window"] for one in found})
    texts: list[list[str]] = []
    numbers: list[list[float | None]] = []
    for cell in PUBLISHED:
        rank = f" r={cell.rank}" if cell.method == "TTQ" else ""
        head = [f"{cell.table}: {cell.model}", f"{cell.method}{rank}",
                "?" if cell.bits is None else str(cell.bits)]  # fmt: skip
        theirs = [cell.perplexity, _ratio(cell.perplexity, cell.unquantized)]
        ours = _ours(cell, found)
        for one, same in ours:
            plain = plains.get(repr(one.setting))
            base = _macro(plain) if plain is not None and _is_macro(plain) else None
            # Several of ours beside one cell are told apart.
            name = one.label(axes) if len(ours) > 1 else ""
            notes = [n for n in (name, _differs(cell, one, same), cell.note) if n]
            texts.append([*head, "; ".join(notes)])
            numbers.append([*theirs, _macro(one), _ratio(_macro(one), base)])
        if not ours:
            texts.append([*head, "; ".join(filter(None, ["not run", cell.note]))])
            numbers.append([*theirs, None, None])
    text = (
        f"Published perplexities ({SOURCE}) are means over WikiText-2, PTB and C4. Ours are beside "
        "them where a recipe has the same method, bits and rank and was scored on all three. These "
        "means are arithmetic, as the paper's. The length of its windows is not known here; "
        f"ours have {' or '.join(map(str, windows))} tokens. Where the model differs, compare only "
        "the ratios to the unquantized model, and only roughly."
    )
    header = ["published", "method", "bits", "ours differs in", "paper", "paper over unquantized",
              "ours", "ours over unquantized"]  # fmt: skip
    columns = [words.column(column, 2) for column in zip(*numbers, strict=True)]
    rows = [[*told, *row] for told, row in zip(texts, zip(*columns, strict=True), strict=True)]
    return [Heading("Beside the paper"), Text(text), Table(header, rows, left=4)]


def _ratio(value: float, base: float | None) -> float | None:
    return None if base is None else value / base
