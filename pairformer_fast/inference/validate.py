"""Jobs that cannot work are refused before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pairformer_fast.config import ModelConfig
from pairformer_fast.inference import antibody
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job
from pairformer_fast.kernels.flash_bias.reference import SLAB_BYTES

_GIB = 2**30


PAIR_COPIES = 38.0
"""fp32 copies of the pair representation, ``[N, N, C_z]``, held at the peak, with freed ones that are kept.

With it the estimate is 0.8 to 1.1 times the growth of resident memory in the reference runs of
``data/benchmarks/fold.json`` (106 to 231 residues, on a CPU). On a GPU in bf16 less is needed.
"""

LOGIT_COPIES = 3.0
"""fp32 copies of a slab of triangle attention logits held at the peak."""


def estimate_peak_bytes(length: int, config: ModelConfig) -> int:
    """Memory above the weights that folding with the reference needs at its peak.

    ``4 bytes · PAIR_COPIES · N² · C_z + LOGIT_COPIES · slab``: the first term is the pair representation and what
    triangle multiplication, projections and transitions make of it; ``slab`` is ``4 bytes · H · N³`` for all rows of
    a triangle attention, or as many rows as fit into the reference's limit, at least one.

    Parameters
    ----------
    length : int
        Residues over all chains, N.
    config : ModelConfig
        For ``C_z`` and the number of heads ``H``.
    """
    pair = 4 * length**2 * config.pairformer.c_z
    row = 4 * length**2 * config.pairformer.no_heads_pair
    slab = min(row * length, max(row, SLAB_BYTES))
    return int(PAIR_COPIES * pair + LOGIT_COPIES * slab)


def available_bytes(device: torch.device) -> int:
    """Free memory: of the GPU, or the least of what the kernel and the control group leave to this process."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_kernel_bytes(), _control_group_bytes())


def _kernel_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_group_bytes() -> int:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return int(limit) - int(used)
    except (OSError, ValueError):  # no control group, or its limit is the word "max"
        return 2**63


def check_memory(jobs: list[Job], config: ModelConfig, device: torch.device) -> None:
    """Refuse jobs that would not fit into free memory.

    Raises
    ------
    InputError
        Naming record, line, number of residues, the estimate and what is available.
    """
    available = available_bytes(device)
    for job in jobs:
        needed = estimate_peak_bytes(job.length, config)
        if needed > available:
            first = job.chains[0]
            raise InputError(
                f"record '{first.record}', line {first.line}: {job.length} residues need about "
                f"{needed / _GIB:.1f} GiB, but {available / _GIB:.1f} GiB are available on {device}; shorten the "
                "sequence or use a machine with more memory"
            )


def check_domain(jobs: list[Job], config: ModelConfig) -> None:
    """Under antibody weights every chain must be one variable domain.

    Raises
    ------
    InputError
        Naming record, line and reason.
    """
    if config.domain != "antibody":
        return
    for job in jobs:
        for chain in job.chains:
            check = antibody.check_variable_domain(chain.sequence)
            where = f"record '{chain.record}', line {chain.line}, chain {chain.name}"
            if not check.is_variable:
                raise InputError(f"{where}: the weights are for antibody variable domains: {check.reason}")
            if chain.record.endswith(f"|{chain.name}") and check.chain_type != chain.name:
                raise InputError(f"{where}: this is a chain of type {check.chain_type}; rename the record")
