"""Write data/attention_costs.json, what attention costs by the form of its bias, from the rows of the benchmark."""

from __future__ import annotations

import json
from typing import Any

from benchmark_rows import RESULTS, ROOT

SOURCE, TARGET = RESULTS / "attention.json", ROOT / "data" / "attention_costs.json"
FORMS = {"triangle": ("targets", "sizes", "long"), "single": ("single",)}
RANK, SHARE = 32, 0.25
"""At which factors, and factors with dense tiles, are measured at every N."""


def costs(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Times of the forward pass in bf16 at every N in ms, and by rank and share of dense tiles at one N."""
    rows = [row for row in rows if row.get("direction") == "fwd" and "ms_median" in row]
    kinds = [
        row for row in rows if row["impl"] in {f"pairformer_fast {kind}" for kind in ("dense", "factors", "mixed")}
    ]
    origin = {key: kinds[0][key] for key in ("device", "torch", "triton", "commit")}
    found: dict[str, Any] = {"source": SOURCE.relative_to(ROOT).as_posix(), **origin, "rank": RANK, "share": SHARE}
    for form, sections in FORMS.items():
        times: dict[str, dict[int, float]] = {"dense": {}, "factors": {}, "mixed": {}}
        for row in kinds:
            if row["section"] in sections:
                times[row["bias"]][row["n"]] = round(row["ms_median"], 5)
        found[form] = {kind: dict(sorted(by_n.items())) for kind, by_n in times.items()}
    found["by_rank"] = {row["rank"]: round(row["ms_median"], 5) for row in kinds if row["section"] == "ranks"}
    found["by_share"] = {row["dense_share"]: round(row["ms_median"], 5) for row in kinds if row["section"] == "shares"}
    return found


def main() -> None:
    """Write the table, and print what it says."""
    table = costs(json.loads(SOURCE.read_text(encoding="utf-8")))
    TARGET.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {TARGET}: {table['device']}, relative to the dense bias, and ms that factors leave for making them")
    for form in FORMS:
        for n, dense in table[form]["dense"].items():
            factors, mixed = (table[form][kind][n] for kind in ("factors", "mixed"))
            shares = f"factors {factors / dense:.3f}, {SHARE:.0%} dense tiles {mixed / dense:.3f}"
            print(f"{form} n={n}: {shares}, room {dense - factors:.4f} ms")


if __name__ == "__main__":
    main()
