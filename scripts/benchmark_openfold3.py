"""Time and memory of a whole OpenFold3 of full size: trunk, sampling, prediction and a training step."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from benchmark_gpu import DeviceLost, describe, release
from benchmark_openfold3_implementations import EAGER, Implementation, biases
from benchmark_openfold3_problem import Problem, Result, build
from benchmark_openfold3_selection import Case, OpenFold3Selection
from benchmark_openfold3_targets import print_summary
from benchmark_rows import machine, read_rows, write_rows
from torch import Tensor

MAX_RUNS, ENOUGH_SECONDS = 5, 8.0
"""Timed runs of a row: this many, or fewer once they took so long together."""
EXACT_BELOW = 512
"""Results of the trunk are also held against OpenFold3 in fp32 below this N."""
LARGEST_ERROR = 0.5
"""Of the trunk, against OpenFold3 in bf16: two that agree differ by their rounding over 52 blocks of random weights."""
WHAT = {
    "trunk": "run_trunk, 1 cycle: embedders, 4 empty templates, MSA module (128 sequences), Pairformer; bf16 autocast",
    "diffusion": "sample_diffusion from a trunk's output, all samples and steps; fp32 with TF32 products",
    "whole": "forward: 1 cycle of the trunk, sampling, confidence; the default has 4 times as many cycles and steps",
    "training": "forward with 1 cycle and the mini rollout, OpenFold3's loss, backward; activation checkpoints",
}
COMPARED = ("s", "z", "x", "loss", "gradients")
Row = dict[str, Any]


def run(selection: OpenFold3Selection, output: Path, commit: str | None, resume: bool, deadline: float) -> list[str]:
    """Measure and write after every row; return our own rows without a valid result.

    No row is begun after ``deadline`` (of :func:`time.monotonic`).

    Raises
    ------
    benchmark_gpu.DeviceLost
        If an implementation destroyed the CUDA context. Its row is written; a fresh process can resume.
    """
    rows: list[Row] = read_rows(output) if resume else []
    origin, left = machine(commit), 0
    for training, of_model in groupby(selection.cases(), key=lambda case: case.training):
        model = None
        for n, of_size in groupby(of_model, key=lambda case: case.n):
            done = {(row["section"], row["n"], row["impl"]) for row in rows}
            open_cases = list(of_size)
            todo = [
                (case, one)
                for one in selection.implementations()
                for case in open_cases
                if (case.section, n, one.name) not in done and (one.trains or not training)
            ]
            if not todo or time.monotonic() > deadline:
                left += len(todo)
                continue
            if model is None:
                began = time.monotonic()
                model = build("train" if training else "predict", selection.size, device()).train(training)
                print(f"built a model in {time.monotonic() - began:.1f} s", flush=True)
            meter = Meter(Problem(model, n))
            for case, implementation in todo:
                began = time.monotonic()
                if began > deadline:
                    left += 1
                    continue
                row = meter.row(case, implementation)
                rows.append({"suite": "openfold3", **row, **origin})
                write_rows(output, rows)
                print(f"{line(row)} [{time.monotonic() - began:.1f} s]", flush=True)
                free()
            del meter
            free()
        del model
        free()
    if left:
        print(f"out of time: {left} rows not measured; --resume measures them")
    print_summary(rows)
    return [line(row) for row in rows if row["impl"].startswith("pairformer_fast") and "error" in row]


def device() -> torch.device:
    """Where the model runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    """Give memory back; find out whether the device survived."""
    release() if torch.cuda.is_available() else gc.collect()


class Meter:
    """Measures every implementation on one problem; results of OpenFold3's own code are kept to compare with."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._own: dict[str, Result] = {}

    def row(self, case: Case, implementation: Implementation) -> Row:
        """One row: differences from OpenFold3 without kernels, then time and memory; or ``error``."""
        row = self._identity(case, implementation)
        try:
            call = self._call(case)
            if case.section not in self._own:
                with EAGER.applied(self.problem.model, self.problem.loss):
                    self._own[case.section] = self._result(case, call)
                free()
            with implementation.applied(self.problem.model, self.problem.loss) as acceleration:
                result = self._own[case.section] if implementation is EAGER else self._result(case, call)
                row["biases"] = biases(acceleration)
                row["errors"] = self._errors(case, result)
                wrong = not all(bool(value.isfinite().all()) for value in result.values())
                if wrong or any(not error <= LARGEST_ERROR for error in row["errors"].values()):
                    return row | {"error": "wrong result" if not wrong else "the result is not finite"}
                del result
                return row | self._measure(call)
        except DeviceLost:
            raise
        except Exception as error:
            return row | {"error": describe(error)}

    def _identity(self, case: Case, implementation: Implementation) -> Row:
        architecture = self.problem.model.config.architecture
        sampling = architecture.shared.diffusion
        mode = "mini" if case.training else "full"
        row = {
            "section": case.section,
            "op": "openfold3",
            "impl": implementation.name,
            "direction": "fwdbwd" if case.training else "fwd",
            "n": case.n,
            "atoms": self.problem.batch["atom_mask"].shape[-1],
            "batch": 1,
            "blocks": architecture.pairformer.no_blocks,
            "diffusion_blocks": architecture.diffusion_module.diffusion_transformer.no_blocks,
            "dtype": "float32" if case.section == "diffusion" else "bfloat16",
            "autocast": case.section != "diffusion",
            "what": WHAT[case.section],
            "version": implementation.version(),
            "weights_bytes": sum(value.nbytes for value in self.problem.model.parameters()),
        }
        if case.section != "trunk":
            row |= {"steps": sampling[f"no_{mode}_rollout_steps"], "samples": sampling[f"no_{mode}_rollout_samples"]}
        return row | ({"noised_samples": sampling.no_samples} if case.training else {})

    def _result(self, case: Case, call: Callable[[], Result]) -> Result:
        return call() | (self.problem.gradients() if case.training else {})

    def _call(self, case: Case) -> Callable[[], Result]:
        problem = self.problem
        match case.section:
            case "trunk":
                self._trunk()
                return problem.trunk
            case "diffusion":
                trunk = self._trunk()
                return lambda: problem.sample(trunk)
            case "whole":
                return problem.predict
        return problem.step

    def _trunk(self) -> Result:
        """What OpenFold3's own trunk computes: the input of all sampling, and what other trunks are compared with."""
        if "trunk" not in self._own:
            with EAGER.applied(self.problem.model, self.problem.loss):
                if self.problem.tokens < EXACT_BELOW:
                    exact = self.problem.trunk(exact=True)
                    self._own["exact"] = {f"{name} (fp32)": exact[name] for name in "sz"}
                self._own["trunk"] = self.problem.trunk()
        return self._own["trunk"]

    def _errors(self, case: Case, result: Result) -> dict[str, float]:
        """Relative differences (Frobenius norm) from what OpenFold3's own code computes."""
        expected = self._own[case.section]
        found = {name: distance(result[name], expected[name]) for name in COMPARED if name in expected}
        if case.section == "trunk":
            exact = self._own.get("exact", {})
            found |= {name: distance(result[name[0]], expected) for name, expected in exact.items()}
        return found

    def _measure(self, call: Callable[[], object]) -> Row:
        """Seconds of calls as Python makes them, the device idle when each begins, and memory above what was held.

        ``peak_bytes`` is what PyTorch had allocated, ``reserved_bytes`` what it had taken from the device: with the
        memory of CUDA graphs, and its unused cache.
        """
        on_gpu = self.problem.device.type == "cuda"
        times: list[float] = []
        before = peak = reserved = 0
        while len(times) < MAX_RUNS and sum(times) < ENOUGH_SECONDS:
            self.problem.model.zero_grad(set_to_none=True)
            if on_gpu:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before
                reserved = torch.cuda.max_memory_reserved() - before
            times.append(time.perf_counter() - began)
        seconds = {"seconds": statistics.median(times), "seconds_all": times}
        memory = {"peak_bytes": peak, "reserved_bytes": reserved} if on_gpu else {"peak_bytes": None}
        return seconds | {"timing": "eager"} | memory


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of ``expected``."""
    return float((found - expected).norm() / expected.norm())


def line(row: Row) -> str:
    """A row in words."""
    details = [f"{row['section']} n={row['n']} {row['impl']}"]
    if "seconds" in row:
        details.append(f"{row['seconds']:.4g} s of {len(row['seconds_all'])}")
    if row.get("peak_bytes"):
        details.append(f"{row['peak_bytes'] / 2**30:.2f} GiB")
    if row.get("reserved_bytes"):
        details.append(f"{row['reserved_bytes'] / 2**30:.2f} GiB reserved")
    details += [f"{name} {error:.1e}" for name, error in row.get("errors", {}).items()]
    if row.get("biases"):
        details.append("biases " + ", ".join(f"{name} {value}" for name, value in row["biases"].items()))
    return " ".join([*details, f"ERROR {row['error'][:160]}" if "error" in row else ""]).strip()
