"""The stored accuracy is complete, and the model card says what it says."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")


@pytest.fixture
def rows(repository: Path) -> list[dict]:
    return json.loads((repository / "data" / "benchmarks" / "accuracy.json").read_text(encoding="utf-8"))


def test_stored_rows_are_of_one_code_and_one_machine(rows: list[dict]) -> None:
    assert len({(row["commit"], row["device"], row["torch"]) for row in rows}) == 1
    counts = {(row["split"], row["impl"]): len(row["scores"]) for row in rows}
    (ours,) = {row["impl"] for row in rows if row["impl"].startswith("pairformer_fast")}
    names = ["crystal structure", "reference", ours]
    assert counts == {**{("val", n): 100 for n in names}, **{("crystal", n): 15 for n in [*names, "flash-abb"]}}


def test_the_card_has_the_tables_of_the_stored_rows(script, rows: list[dict], repository: Path) -> None:
    plots = script("plot_accuracy")
    card = (repository / "data" / "weights" / "README.md").read_text(encoding="utf-8")
    learned = plots.read_rows(repository / "data" / "benchmarks" / "accuracy_learned.json")
    for table in plots.tables(plots.by_name(rows), learned):
        assert table in card


def test_a_target_is_missed_or_met_by_its_number(script, rows: list[dict]) -> None:
    plots = script("plot_accuracy")
    better = deepcopy(rows)
    for row in better:
        if row["impl"] == "reference":
            row |= {"lddt": 0.96, "rmsd": 0.5, "lddt_h3": 0.9}
            row["plddt_agreement"]["pearson"] = 0.59
            row["geometry_written"] = deepcopy(plots.by_name(rows)["crystal", "flash-abb"]["geometry"])
            row["geometry_written"]["clashes"]["mean"] += 1
    verdicts = [line.rsplit("|", 2)[1].strip() for line in plots.targets(plots.by_name(better))[2:]]
    assert verdicts == [*["met"] * 5, *["**missed**"] * 2, *["met"] * 3, "**missed**"]


def test_the_plot_is_the_same_on_every_run(run_script, rows: list[dict], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("a.svg", "b.svg"):
        script_arguments = ("--rows", tmp_path / "rows.json", "--output", tmp_path / name)
        status, _, err = run_script("plot_accuracy", *script_arguments)
        assert (status, err) == (0, "")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
