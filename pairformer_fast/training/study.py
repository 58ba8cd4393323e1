"""Compare training runs that differ in their pair bias only: dense, or factors of several ranks, over several seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

SCORES = ("lddt", "lddt_h3", "rmsd")
DENSE = "dense"

_OWN = {"seed"}
"""Settings in which runs of a study differ."""
_EQUAL_SECONDS = 0.01
"""Relative difference of seconds that counts as the same time."""


@dataclass(frozen=True)
class StudyRun:
    """What one log of :func:`~pairformer_fast.training.loop.train` says.

    Attributes
    ----------
    arm : str
        ``dense``, or the rank and the table of the factors.
    seed : int
    facts : dict
        The last row, with the evaluation.
    curve : list of dict
        The rows before it: losses by step.
    stops : list of dict
        The rows with an evaluation where the run was stopped before its last step and went on later.
    """

    arm: str
    seed: int
    facts: dict[str, Any]
    curve: list[dict[str, Any]]
    stops: list[dict[str, Any]]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a log, of a run that is at its end or not.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it has no row of a step.
    """
    try:
        rows = _rows(path)
        if losses(rows):
            return rows
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no log of scripts/train.py: {error!r}") from None
    raise ValueError(f"{path} has no training step: give a log.jsonl of scripts/train.py")


def losses(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with losses, each step once: a run that was stopped logs some twice."""
    return list({row["step"]: row for row in rows if "total" in row}.values())


def read_run(path: Path) -> StudyRun:
    """Run of a log.

    Raises
    ------
    OSError
        If there is no such file.
    ValueError
        If it is no log of a run that reached its last step.
    """
    try:
        rows = _rows(path)
        facts, settings, attention = rows[-1], rows[-1]["train"], rows[-1]["attention"]
        unfinished = facts["step"] < settings["steps"]
        arm = _arm(attention)
        stops = [row for row in rows[:-1] if "evaluation" in row]
        run = StudyRun(arm, settings["seed"], facts, losses(rows), stops)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no log of a finished run of scripts/train.py: {error!r}") from None
    if unfinished:
        raise ValueError(f"{path} stopped at step {facts['step']} of {settings['steps']}: let it finish first")
    return run


def summarize(runs: Sequence[StudyRun], split: str) -> dict[str, Any]:
    """Scores of each arm and their differences from the dense runs of the same seeds.

    Parameters
    ----------
    runs : sequence of StudyRun
        The same settings but for the seed, and equally trained weights to start from.
    split : str
        Evaluated split that scores are of.

    Returns
    -------
    dict
        ``settings`` that all runs share, ``runs`` with their scores and seconds, and ``arms``: mean and standard
        deviation over seeds (None for a single one) of the scores and of their differences from dense. If all runs were
        stopped once after the same seconds, ``equal_time`` has the same of that moment, with the steps made until then.

    Raises
    ------
    ValueError
        If runs differ in more than bias and seed, an arm has a seed twice, or the arms have different seeds.
    """
    _check(runs, split)
    settings = {name: value for name, value in runs[0].facts["train"].items() if name not in _OWN}
    summary = {
        "suite": "factors_study",
        "split": split,
        "device": runs[0].facts["device"],
        "torch": runs[0].facts["torch"],
        "settings": settings,
        "arms": _arms([(run, run.facts) for run in runs], split),
        "runs": [
            {"arm": run.arm, "seed": run.seed, "gpu_seconds": _seconds(run.facts), **run.facts["evaluation"][split]}
            for run in runs
        ],
    }
    stopped = _stopped_together(runs)
    return summary | ({"equal_time": _arms(stopped, split, steps=True)} if stopped else {})


def _arms(
    evaluated: Sequence[tuple[StudyRun, dict[str, Any]]], split: str, steps: bool = False
) -> list[dict[str, Any]]:
    """Scores of each arm by the given rows of its runs, dense first and then by rank."""
    seeds: dict[str, dict[int, dict[str, Any]]] = {}
    for run, facts in evaluated:
        seeds.setdefault(run.arm, {})[run.seed] = facts
    dense = seeds.get(DENSE, {})
    arms = []
    for arm, members in sorted(seeds.items(), key=lambda item: (item[0] != DENSE, _rank(item[1]), item[0])):
        row: dict[str, Any] = {"arm": arm, "seeds": sorted(members)}
        if steps:
            row["steps"] = _spread([facts["step"] for facts in members.values()])
        row["gpu_seconds"] = _spread([_seconds(facts) for facts in members.values()])
        for name in SCORES:
            scores = {seed: facts["evaluation"][split][name] for seed, facts in members.items()}
            row[name] = _spread(list(scores.values()))
            if arm != DENSE and dense:
                less = [scores[seed] - dense[seed]["evaluation"][split][name] for seed in scores]
                row[f"{name}_minus_dense"] = _spread(less)
        arms.append(row)
    return arms


def _stopped_together(runs: Sequence[StudyRun]) -> list[tuple[StudyRun, dict[str, Any]]]:
    """Each run and its first stop, if all stopped after the same seconds."""
    if not all(run.stops for run in runs):
        return []
    stopped = [(run, run.stops[0]) for run in runs]
    seconds = [_seconds(row) for _, row in stopped]
    return stopped if max(seconds) <= (1 + _EQUAL_SECONDS) * min(seconds) else []


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _arm(attention: dict[str, Any]) -> str:
    if attention["bias"] == DENSE:
        return DENSE
    table = attention.get("table")
    return f"rank {attention['rank']}" + ("" if table is None else f" + table {table}")


def _rank(members: dict[int, dict[str, Any]]) -> int:
    return next(iter(members.values()))["attention"].get("rank") or 0


def _seconds(facts: dict[str, Any]) -> float:
    return round(facts["seconds"] * facts["gpus"], 1)


def _check(runs: Sequence[StudyRun], split: str) -> None:
    if not runs:
        raise ValueError("no runs to compare")
    first = runs[0]
    seen: dict[str, list[int]] = {}
    for run in runs:
        name = f"{run.arm}, seed {run.seed}"
        for key, value in first.facts["train"].items():
            if key not in _OWN and run.facts["train"].get(key) != value:
                raise ValueError(
                    f"runs differ in {key}: {value} ({first.arm}) and {run.facts['train'].get(key)} ({name})"
                )
        steps = [(one.facts.get("origin") or {}).get("steps", 0) for one in (first, run)]
        if steps[0] != steps[1]:
            raise ValueError(
                f"runs start after different training: {steps[0]} steps ({first.arm}), {steps[1]} ({name})"
            )
        if split not in run.facts["evaluation"]:
            raise ValueError(f"{name} was not evaluated on {split}: it has {sorted(run.facts['evaluation'])}")
        seen.setdefault(run.arm, []).append(run.seed)
    for arm, seeds in seen.items():
        if sorted(seeds) != sorted(set(seen[first.arm])):
            raise ValueError(f"seeds differ: {first.arm} has {sorted(seen[first.arm])}, {arm} has {sorted(seeds)}")


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    deviation = round(stdev(values), 5) if len(values) > 1 else None
    return {"mean": round(fmean(values), 5), "deviation": deviation}
