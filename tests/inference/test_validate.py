import pytest
import torch

from pairformer_fast.config import ModelConfig
from pairformer_fast.inference import validate
from pairformer_fast.inference.antibody import DomainCheck
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.fasta import Chain, Job
from pairformer_fast.inference.predict import resolve_device

from .fakes import make_job

CPU = torch.device("cpu")


def test_available_memory_is_plausible():
    assert 2**26 < validate.available_bytes(CPU) < 2**45


def test_estimate_is_dominated_by_logits_for_short_and_pairs_for_long_sequences():
    estimate = [validate.estimate_peak_bytes(n, ModelConfig()) for n in (1, 100, 200, 2000, 4000)]
    assert 4 < estimate[2] / estimate[1] < 8
    assert 3 < estimate[4] / estimate[3] <= 4.5


def test_too_long_a_sequence_names_record_length_estimate_and_what_is_there(monkeypatch):
    monkeypatch.setattr(validate, "available_bytes", lambda device: 2**30)
    short, long = make_job("A" * 50, name="short"), make_job("A" * 900, "G" * 900, name="long")
    validate.check_memory([short], ModelConfig(), CPU)
    with pytest.raises(InputError, match=r"record 'long\|A', line 1: 1800 residues need about \d+.\d GiB, but 1.0 GiB"):
        validate.check_memory([short, long], ModelConfig(), CPU)


def test_control_group_limits_count(monkeypatch):
    monkeypatch.setattr(validate, "_control_group_bytes", lambda: 12345)
    assert validate.available_bytes(CPU) == 12345


def test_antibody_weights_refuse_other_proteins(monkeypatch):
    def check(sequence):
        return DomainCheck(sequence == "GOOD", "H" if sequence == "GOOD" else None, "", "too few residues")

    monkeypatch.setattr("pairformer_fast.inference.antibody.check_variable_domain", check)
    good, bad = Chain("GOOD", "A", "x", 1), Chain("BAD", "B", "y", 17)
    antibody = ModelConfig(domain="antibody")
    validate.check_domain([Job("x", (good,))], antibody)
    with pytest.raises(InputError, match=r"record 'y', line 17, chain B: .*variable domains: too few residues"):
        validate.check_domain([Job("x", (good,)), Job("y", (bad,))], antibody)
    validate.check_domain([Job("y", (bad,))], ModelConfig())


def test_heavy_chain_named_light_is_refused(monkeypatch):
    monkeypatch.setattr(
        "pairformer_fast.inference.antibody.check_variable_domain", lambda s: DomainCheck(True, "H", "0", "")
    )
    with pytest.raises(InputError, match="line 3, chain L: this is a chain of type H"):
        validate.check_domain([Job("x", (Chain("A", "L", "x|L", 3),))], ModelConfig(domain="antibody"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_an_error_and_auto_is_the_cpu(name):
    with pytest.raises(InputError, match=f"device {name}: torch sees 0 CUDA GPUs; use --device cpu"):
        resolve_device(name)
    assert resolve_device("auto") == CPU
