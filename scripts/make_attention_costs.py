"""Write data/attention_costs.json, what attention costs by the form of its bias, from the rows of the benchmarks."""

from __future__ import annotations

import json
from typing import Any

from benchmark_rows import RESULTS, ROOT

from pairformer_fast.bias.policy import AUTO_METHOD

TARGET = ROOT / "data" / "attention_costs.json"
SOURCES = {
    "gpu": (RESULTS / "attention.json", RESULTS / "factorisation.json"),
    "cpu": (RESULTS / "attention_cpu.json",),
}
FORMS = {"triangle": ("targets", "sizes", "long"), "single": ("single",)}
MAKING = f"pairformer_fast {AUTO_METHOD}, checked and certified"
RANK, SHARE = 32, 0.25
"""At which factors, and factors with dense tiles, are measured at every N."""

Rows = list[dict[str, Any]]


def costs(rows: Rows, sources: list[str]) -> dict[str, Any]:
    """Times of the forward pass at every N in ms, and by rank and share of dense tiles at one N; of making factors."""
    making = [row for row in rows if row["impl"] == MAKING and row["rank"] == RANK]
    rows = [row for row in rows if row.get("direction") == "fwd" and "ms_median" in row]
    kinds = [
        row for row in rows if row["impl"] in {f"pairformer_fast {kind}" for kind in ("dense", "factors", "mixed")}
    ]
    origin = {key: kinds[0][key] for key in ("device", "torch", "triton", "commit")}
    found: dict[str, Any] = {"sources": sources, **origin, "method": AUTO_METHOD, "rank": RANK, "share": SHARE}
    for form, sections in FORMS.items():
        times: dict[str, dict[int, float]] = {"dense": {}, "factors": {}, "mixed": {}, "making": {}}
        for row in kinds:
            if row["section"] in sections:
                times[row["bias"]][row["n"]] = _ms(row)
        for row in making:
            # On a GPU factors were made of 4 heads alone, less than those of single attention.
            if row["n"] in times["dense"] and row.get("form", form) == form:
                times["making"][row["n"]] = round(row["ms_median"], 5)
        found[form] = {kind: dict(sorted(by_n.items())) for kind, by_n in times.items()}
    found["by_rank"] = {row["rank"]: _ms(row) for row in kinds if row["section"] == "ranks"}
    found["by_share"] = {row["dense_share"]: _ms(row) for row in kinds if row["section"] == "shares"}
    return found


def _ms(row: dict[str, Any]) -> float:
    """Of all N rows of triangle attention, of which a CPU computed some."""
    return round(row["ms_median"] * row["n"] / (row["rows"] or row["n"]), 5)


def tables() -> dict[str, Any]:
    """What the file holds."""
    found = {}
    for device, sources in SOURCES.items():
        rows = [row for source in sources for row in json.loads(source.read_text(encoding="utf-8"))]
        found[device] = costs(rows, [source.relative_to(ROOT).as_posix() for source in sources])
    return found


def main() -> None:
    """Write the tables, and print what they say."""
    found = tables()
    TARGET.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}; relative to the dense bias:")
    for table in found.values():
        for form in FORMS:
            for n, dense in table[form]["dense"].items():
                factors, mixed = (table[form][kind][n] / dense for kind in ("factors", "mixed"))
                shares = f"factors {factors:.3f}, {SHARE:.0%} dense tiles {mixed:.3f}"
                making = table[form]["making"].get(n)
                made = "" if making is None else f", making factors {making / dense:.3f}"
                print(f"{table['device']}, {form} n={n}: {shares}{made}")


if __name__ == "__main__":
    main()
