"""Regenerate data/antibody_profile.json from SAbDab VH annotation and CoV-AbDab light chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pairformer_fast.inference.files import write_atomically
from pairformer_fast.training.antibody_profile import HEAVY, KAPPA, LAMBDA, build_profile, split_heavy, split_light
from pairformer_fast.training.sources import read_covabdab, read_sabdab
from pairformer_fast.user_errors import run_script

ROOT = Path(__file__).resolve().parents[1]
THRESHOLD_BITS = 60.0


def main(
    data: Annotated[Path, typer.Option(help="folder with sabdab_vh.jsonl.gz and covabdab_pairs.csv.gz")],
    output: Annotated[Path, typer.Option(help="file to write")] = ROOT / "data" / "antibody_profile.json",
) -> None:
    """Build the three profiles from the SAbDab train split (heavy) and CoV-AbDab (kappa, lambda)."""
    heavy = [split_heavy(entry.sequence, entry.cdr) for entry in read_sabdab(data) if entry.split == "train"]
    light: dict[str, list[list[str]]] = {"kappa": [], "lambda": []}
    for vl in sorted({pair.vl for pair in read_covabdab(data)[0]}):
        if (parts := split_light(vl)) is not None:
            light[parts[0]].append(parts[1])
    profiles = [
        build_profile(HEAVY, heavy),
        build_profile(KAPPA, light["kappa"]),
        build_profile(LAMBDA, light["lambda"]),
    ]
    document = {
        "source": "SAbDab heavy chains (CC BY 4.0) and CoV-AbDab light chains, August 2021 (CC BY 4.0)",
        "unit_bits": 0.1,
        "threshold_bits": THRESHOLD_BITS,
        "domains": {"heavy": len(heavy), "kappa": len(light["kappa"]), "lambda": len(light["lambda"])},
        "profiles": profiles,
    }
    write_atomically(output, json.dumps(document, separators=(",", ":")) + "\n")
    typer.echo(f"{output}: {document['domains']}")


if __name__ == "__main__":
    run_script(main)
