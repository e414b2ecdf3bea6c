"""The section of a report on what its numbers depend on besides their cells."""

from collections.abc import Sequence

from ttq_jax.sweeps.parts import Heading, Part, Table
from ttq_jax.sweeps.rows import Row


def provenance(rows: Sequence[Row]) -> list[Part]:
    """The environment that made the rows.

    Args:
      rows: finished ones, checked.

    Returns:
      A section, nothing for no rows.
    """
    if not rows:
        return []
    facts: dict[str, dict[str, None]] = {}

    def fact(name: str, value: object) -> None:
        if value:
            facts.setdefault(name, {})[str(value)] = None

    for row in rows:
        fact("packages", ", ".join(f"{k} {v}" for k, v in row["versions"].items()))
        fact("devices", row["device"])
        fact("commits", row.get("git_commit") or "not known")
        for name, digest, title in (
            ("corpus", "corpus_sha256", "texts scored (sha256)"),
            ("calibration", "calibration_sha256", "texts calibrated on (sha256)"),
        ):
            if row.get(digest):
                fact(title, f"{row['cell'][name]} {row[digest][:16]}")
    dates = sorted(row["finished"] for row in rows)
    seconds = sum(sum(row.get("seconds", {}).values()) for row in rows)
    peaks = [row["peak_memory_bytes"] for row in rows if row.get("peak_memory_bytes")]
    table = [[name, "; ".join(values)] for name, values in facts.items()]
    table += [
        ["rows finished", f"{dates[0]} to {dates[-1]}"],
        ["time", f"{seconds / 60:.1f} minutes in all"],
    ]
    if peaks:
        table.append(["peak memory", f"{max(peaks) / 1e9:.2f} GB"])
    return [Heading("How these numbers were made"), Table(["what", "value"], table, left=2)]
