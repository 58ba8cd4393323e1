"""A loaded model, and one measured prediction at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from pairformer_fast import bias as pair_bias
from pairformer_fast.config import AttentionConfig, BiasMethod, ModelConfig
from pairformer_fast.features import Prediction, TokenFeatures
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Job
from pairformer_fast.inference.heap import keep_freed_memory
from pairformer_fast.inference.learned import attention_paths, networks_file
from pairformer_fast.inference.measure import Usage, measure
from pairformer_fast.inference.settings import FoldSettings, Precision
from pairformer_fast.model import checkpoint
from pairformer_fast.model.clashes import relieve_clashes
from pairformer_fast.model.factors import load_factors


@dataclass(frozen=True)
class PathResult:
    """A prediction (on the CPU), what it cost, and what became of every pair bias on the way."""

    prediction: Prediction
    usage: Usage
    reports: list[dict]

    @property
    def mean_plddt(self) -> float:
        """Over all residues, 0 to 100."""
        return self.prediction.plddt.mean().item()


def resolve_device(name: str) -> torch.device:
    """Device of a setting; ``auto`` takes a GPU if there is one.

    Raises
    ------
    InputError
        If there is no such device, or CUDA is asked for and that GPU does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name}: unknown; use auto, cpu, cuda or cuda:INDEX") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA GPUs; use --device cpu or auto")
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """``auto`` is bf16 on CUDA and fp32 elsewhere."""
    if precision is Precision.AUTO:
        return Precision.BF16 if device.type == "cuda" else Precision.FP32
    return precision


def resolve_checkpoint(settings: FoldSettings) -> Path:
    """Path of the weights to use; bundled ones fit the bias, unless factor networks come from elsewhere.

    Raises
    ------
    InputError
        If there is no such file.
    """
    path = settings.checkpoint
    bias = settings.bias if settings.factors is None else BiasMethod.DENSE
    chosen = checkpoint.default_checkpoint(bias) if path is None else path
    if not chosen.is_file():
        hint = "this installation lacks its weights; pass --checkpoint FILE" if path is None else "no such file"
        raise InputError(f"checkpoint {chosen}: {hint}")
    return chosen


def read_model_config(path: Path) -> ModelConfig:
    """Dimensions and domain of a model from its file's header; the weights are not read.

    Raises
    ------
    InputError
        If the file is no checkpoint of this package.
    """
    try:
        return checkpoint.read_config(path)
    except checkpoint.CheckpointError:
        raise InputError(f"checkpoint {path}: not a safetensors file written by pairformer_fast") from None


class Predictor:
    """A model on its device; on a CPU the process reuses freed memory from then on (:mod:`.heap`).

    Parameters
    ----------
    settings : FoldSettings
        What to do.

    Attributes
    ----------
    accelerated, reference : AttentionConfig, optional
        Attention of the two paths with these weights; None for one that does not run.
    factors : Path, optional
        Side file of the factor networks that they take, if any.

    Raises
    ------
    InputError
        If the device, the checkpoint, factor networks or what relaxation needs do not exist or do not load.
    """

    def __init__(self, settings: FoldSettings) -> None:
        self._relax = _relaxation() if settings.relax else None
        self.device = resolve_device(settings.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = resolve_precision(settings.precision, self.device)
        self.checkpoint = resolve_checkpoint(settings)
        try:
            model = checkpoint.load_checkpoint(self.checkpoint)
        except checkpoint.CheckpointError as error:
            raise InputError(" ".join(str(error).split())) from error
        self.model = model.to(self.device).eval()
        self.accelerated, self.reference = attention_paths(settings, self.checkpoint)
        self.factors = networks_file(settings, self.checkpoint)
        if self.factors is not None:
            self._attach(self.factors)
        self.recycles = model.config.recycles if settings.recycles is None else settings.recycles
        self.seed = settings.seed

    def _attach(self, file: Path) -> None:
        try:
            networks = load_factors(file, self.model, self.checkpoint)
        except pair_bias.FactorsError as error:
            raise InputError(" ".join(str(error).split())) from error
        pair_bias.attach_factors(self.model, networks.to(self.device))

    def predict(self, job: Job, attention: AttentionConfig) -> PathResult:
        """Fold a job; on CUDA after an untimed pass without recycling, which compiles and tunes kernels.

        Afterwards, on the CPU and outside the time measured, peptide and disulfide bonds that the model left open are
        closed and clashes relieved; relaxation follows where it is asked for.

        Parameters
        ----------
        job : Job
            The chains.
        attention : AttentionConfig
            How attention with a pair bias is computed.
        """
        features = TokenFeatures.from_chains([chain.sequence for chain in job.chains]).to(self.device)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision is Precision.BF16)
        with torch.inference_mode(), autocast:
            if self.device.type == "cuda":
                pair_bias.set_attention(self.model, attention)
                self.model(features, 0)
            pair_bias.set_attention(self.model, attention)
            torch.manual_seed(self.seed)
            with measure(self.device) as usage, pair_bias.warm_starts(self.model):
                prediction = self.model(features, self.recycles)
        on_host = Prediction(**{f.name: _to_host(getattr(prediction, f.name)) for f in fields(prediction)})
        tokens = features.chain_index.cpu(), features.aatype.cpu()
        atom14 = relieve_clashes(on_host.atom14, on_host.atom14_mask, *tokens)
        on_host = replace(on_host, atom14=atom14)
        if self._relax is not None:
            on_host = replace(on_host, atom14=self._relax(job, on_host))
        return PathResult(on_host, usage, pair_bias.collect_reports(self.model))


def _relaxation() -> Callable[[Job, Prediction], Tensor]:
    """Imported where it is asked for: training takes this module, and needs nothing of what relaxation stands on."""
    from pairformer_fast.inference.relaxation import need_openmm, relax

    need_openmm()
    return relax


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu()
