"""The sampler of an accelerated OpenFold3 computes once what its steps have in common, and gives the same results."""

import copy
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from pairformer_fast import AttentionConfig, accelerate

pytest.importorskip("openfold3", reason="needs the extra [openfold]: pip install '.[openfold]'")

from openfold3.core.model.structure.diffusion_module import DiffusionModule, SampleDiffusion, create_noise_schedule
from openfold3.core.utils.tensor_utils import tensor_tree_map
from openfold3.projects.of3_all_atom.config.model_config import model_config
from openfold3.tests.utils.data_utils import random_of3_features

from pairformer_fast.integrations import openfold3_kept, openfold3_sampling, openfold3_steps
from pairformer_fast.integrations.openfold3_kept import Keeps
from tests.model import replayed
from tests.model.replayed import repeats  # noqa: F401

C_S, C_S_INPUT, C_Z = 24, 24 + 65, 16
DENSE = AttentionConfig(bias="dense")
STEPS = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRANSITIONS = {f"diffusion_module.diffusion_conditioning.transition_{x}.{i}" for x in "sz" for i in range(2)}
ROUNDING = 2e-6 if DEVICE.type == "cpu" else 2e-5


def sampler() -> SampleDiffusion:
    """Small, with weights that are zero nowhere: OpenFold3 zero-initialises gates and output projections."""
    config = copy.deepcopy(model_config.architecture.diffusion_module)
    with config.unlocked():
        config.diffusion_transformer.update(no_blocks=2, c_a=32, c_s=C_S, c_z=C_Z, c_hidden=8, no_heads=4)
        config.diffusion_module.update(c_s=C_S, c_token=32)
        config.diffusion_conditioning.update(
            c_s_input=C_S_INPUT, c_s=C_S, c_z=C_Z, c_fourier_emb=16, tune_chunk_size=False
        )
        for part in (config.atom_attn_enc, config.atom_attn_dec):
            part.update(c_atom=16, c_atom_pair=8, c_token=32, c_hidden=8, no_heads=2, no_blocks=2)
        config.atom_attn_enc.update(c_s=C_S, c_z=C_Z)
    model = SampleDiffusion(0.8, 1.0, 1.003, 1.5, DiffusionModule(config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = value.shape[-1] ** -0.5 if value.dim() > 1 else 0.2
            value.copy_(scale * torch.randn(value.shape, generator=generator))
            if "layer_norm" in name and name.endswith("weight"):
                value += 1
    return model.eval().to(DEVICE)


def inputs(tokens: int = 19, batch_size: int = 1, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    batch = random_of3_features(batch_size=batch_size, n_token=tokens, n_msa=2, n_templ=1, is_eval=True)
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    batch = tensor_tree_map(lambda x: x.unsqueeze(1).to(DEVICE), batch)
    noise = {"sigma_data": 16, "s_max": 160.0, "s_min": 4e-4, "p": 7}
    return {
        "batch": batch,
        "si_input": torch.randn(batch_size, 1, tokens, C_S_INPUT, device=DEVICE),
        "si_trunk": torch.randn(batch_size, 1, tokens, C_S, device=DEVICE),
        "zij_trunk": torch.randn(batch_size, 1, tokens, tokens, C_Z, device=DEVICE),
        "noise_schedule": create_noise_schedule(STEPS, **noise, dtype=torch.float32, device=DEVICE),
        "no_rollout_samples": 3,
        "use_high_precision_attention": True,
    }


def padded(arguments: dict, tokens: int = 5) -> dict:
    """The last tokens of the last batch entry, and their atoms, are padding."""
    batch = arguments["batch"]
    atoms = int(batch["num_atoms_per_token"][-1, 0, -tokens:].sum())
    batch["token_mask"][-1, 0, -tokens:] = 0
    batch["atom_mask"][-1, 0, -atoms:] = 0
    return arguments


@torch.no_grad()
def denoised(model: SampleDiffusion, arguments: dict) -> list[torch.Tensor]:
    """What the denoiser gives in each step: unlike in samples, small changes are not lost in it beside the noise."""
    outputs: list[torch.Tensor] = []
    handle = model.diffusion_module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    torch.manual_seed(1)
    model(**arguments)
    handle.remove()
    kept = arguments["batch"]["atom_mask"].expand(outputs[0].shape[:-1]) > 0
    return [output[kept] for output in outputs]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Largest relative error of a step."""
    assert len(found) == len(expected)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def model() -> SampleDiffusion:
    return sampler()


@pytest.mark.parametrize("high_precision", [True, False])
@pytest.mark.parametrize(
    "make", [inputs, lambda: inputs(33, seed=3), lambda: padded(inputs(batch_size=2))], ids=["19", "33", "padded"]
)
def test_every_step_gives_what_openfold3_gives(model, make, high_precision):
    arguments = make() | {"use_high_precision_attention": high_precision}
    tokens = arguments["si_trunk"].shape[-2]
    expected = denoised(model, arguments)
    with accelerate(model, DENSE) as acceleration:
        assert len(acceleration.around) == 8 + len(TRANSITIONS)
        for config in (DENSE, AttentionConfig(bias="svd", rank=tokens), AttentionConfig(tolerance=1e-6)):
            acceleration.configure(config)
            assert distance(denoised(model, arguments), expected) < ROUNDING
            assert len(acceleration.reports()) == 2, "one decision for each block, not for each step"
        acceleration.configure(AttentionConfig(bias="svd", rank=1))
        assert distance(denoised(model, arguments), expected) > 1e-3, "the comparison must see the biases"
    # On a GPU OpenFold3 itself sums atoms in no fixed order.
    assert distance(denoised(model, arguments), expected) <= (0 if DEVICE.type == "cpu" else ROUNDING)


@pytest.mark.parametrize("make", [inputs, lambda: padded(inputs(batch_size=2))], ids=["19", "padded"])
def test_steps_are_replayed(model, make, repeats, monkeypatch):  # noqa: F811
    """As on a GPU, with functions for graphs."""
    monkeypatch.setattr(openfold3_steps, "capture", replayed.repeat)
    monkeypatch.setattr(openfold3_steps, "can_capture", lambda x: True)
    arguments = make()
    expected = denoised(model, arguments)
    with accelerate(model, DENSE):
        for _ in range(2):
            repeats.count = 0
            assert distance(denoised(model, arguments), expected) < ROUNDING
            assert repeats.count == STEPS - 1
        repeats.count = 0
        handle = model.diffusion_module.layer_norm_a.register_forward_hook(lambda *_: None)
        assert distance(denoised(model, arguments), expected) < ROUNDING
        assert repeats.count == 0, "a hook is called in every step"
        handle.remove()
        assert model.diffusion_module in openfold3_steps._MEMORIES
    assert model.diffusion_module not in openfold3_steps._MEMORIES, "kept beyond the acceleration"


def nothing_is_kept(model: SampleDiffusion) -> bool:
    parts = [module for module in model.modules() if isinstance(module, Keeps)]
    assert len(parts) == 7
    return all(part.kept is None for part in parts)


def test_what_the_steps_share_is_computed_once_and_freed(model, monkeypatch):
    arguments, calls, biases = inputs(), Counter(), []
    denoiser = model.diffusion_module
    transformers = [denoiser.diffusion_transformer, denoiser.atom_attn_enc.atom_transformer]
    modules = {
        "conditioned pairs": denoiser.diffusion_conditioning.linear_z,
        "atom pairs": denoiser.atom_attn_enc.pair_mlp,
        **{f"bias {i}": module.blocks[1].attention_pair_bias.linear_z for i, module in enumerate(transformers)},
    }
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name])) for name, module in modules.items()
    ]
    attend = openfold3_sampling.flash_bias_attention

    def watched(q, k, v, bias, *others, **options):
        biases.append(bias)
        return attend(q, k, v, bias, *others, **options)

    monkeypatch.setattr(openfold3_sampling, "flash_bias_attention", watched)
    with accelerate(model, DENSE):
        denoised(model, arguments)
        assert set(calls.values()) == {1}
        assert calls.keys() == modules.keys()
        assert len(biases) == 2 * STEPS
        assert all(bias.shape == (1, 4, 19, 19) for bias in biases), "one bias for all samples"
        assert len({bias.data_ptr() for bias in biases}) == 2
        denoised(model, arguments)
        assert set(calls.values()) == {2}
        assert nothing_is_kept(model)
        kept = weakref.ref(biases[0])
        biases.clear()
        assert kept() is None

        monkeypatch.setattr(openfold3_sampling, "flash_bias_attention", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            denoised(model, arguments)
        assert nothing_is_kept(model)
    for handle in handles:
        handle.remove()


def test_no_weights_are_kept():
    """Those of the diffusion transformer may change between steps; what it keeps is its biases."""
    arguments, kept = inputs(), []

    def changing(model: SampleDiffusion, seen: Callable[[nn.Module], None]) -> list[torch.Tensor]:
        transformer = model.diffusion_module.diffusion_transformer

        def change(*_: object) -> None:
            seen(transformer)
            for name, weight in transformer.named_parameters():
                if "_z." not in name:
                    weight.mul_(1.1)

        handle = model.diffusion_module.register_forward_hook(change)
        found = denoised(model, arguments)
        handle.remove()
        return found

    expected = changing(sampler(), lambda _: None)
    assert distance(denoised(sampler(), arguments)[1:], expected[1:]) > 1e-3
    model = sampler()
    with accelerate(model, DENSE):
        found = changing(model, lambda transformer: kept.append(transformer.kept.of(transformer)))
    assert distance(found, expected) < ROUNDING
    assert kept[0].nbytes == 2 * 4 * 19 * 19 * 4


def test_other_inputs_are_not_taken_for_those_that_were_kept(model):
    first, second = inputs(), inputs(seed=7)
    expected = denoised(model, first), denoised(model, second)

    def change_trunk(_module, _arguments, options):
        options["zij_trunk"].mul_(1.5)

    def changing() -> list[torch.Tensor]:
        arguments = inputs()
        handle = model.diffusion_module.register_forward_pre_hook(change_trunk, with_kwargs=True)
        found = denoised(model, arguments)
        handle.remove()
        return found

    changed = changing()
    assert distance(changed, expected[0]) > 1e-3
    with accelerate(model, DENSE):
        assert distance(denoised(model, first), expected[0]) < ROUNDING
        assert distance(denoised(model, second), expected[1]) < ROUNDING
        assert distance(changing(), changed) < ROUNDING


def test_a_token_mask_of_its_own_in_each_step(model):
    arguments, steps = inputs(), Counter()

    def mask_more(_module, positional, options):
        steps.update(["step"])
        mask = options["token_mask"].clone()
        mask[..., -steps["step"] :] = 0
        return positional, options | {"token_mask": mask}

    def masked() -> list[torch.Tensor]:
        steps.clear()
        handle = model.diffusion_module.register_forward_pre_hook(mask_more, with_kwargs=True)
        found = denoised(model, arguments)
        handle.remove()
        return found

    expected = masked()
    assert distance(denoised(model, arguments)[1:], expected[1:]) > 1e-3
    with accelerate(model, DENSE):
        assert distance(masked(), expected) < ROUNDING


def test_a_mask_whose_look_at_failed_is_looked_at_again(monkeypatch):
    state, a = openfold3_sampling._Attention(1), torch.zeros(1, 1, 3, 2)
    assert state.keep(torch.ones(1, 1, 3), a) is None
    mask = torch.tensor([[[1.0, 0.0, 1.0]]])

    def refuse(_mask):
        raise RuntimeError("not permitted when stream is capturing")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "all", refuse)
        with pytest.raises(RuntimeError, match="capturing"):
            state.keep(mask, a)
    assert state.keep(mask, a).equal(mask != 0)


def test_two_threads_sample_with_one_model(model):
    calls, together = [], threading.Barrier(2, timeout=60)

    def note(_module, _arguments, options, output):
        calls.append((options, output))
        together.wait()

    with accelerate(model, DENSE), ThreadPoolExecutor(2) as threads:
        handle = model.diffusion_module.register_forward_hook(note, with_kwargs=True)
        runs = [threads.submit(torch.no_grad()(model), **arguments) for arguments in (inputs(), inputs(seed=7))]
        for run in runs:
            run.result()
        handle.remove()
    assert len(calls) == 2 * STEPS
    with torch.no_grad():
        for options, output in calls:
            assert distance([output], [model.diffusion_module(**options)]) < ROUNDING


@pytest.mark.parametrize("config", [DENSE, AttentionConfig(bias="svd", rank=4)], ids=["dense", "svd"])
@pytest.mark.parametrize("kilobytes", [0, 58, 62, 200, 4000, 10_000])
def test_what_does_not_fit_into_memory_is_computed_in_every_step(model, monkeypatch, caplog, kilobytes, config):
    arguments = inputs()
    with accelerate(model, config) as acceleration:
        expected = denoised(model, arguments)
        acceleration.reset()
        monkeypatch.setattr(openfold3_kept, "free_bytes", lambda _device: 1000 * kilobytes)
        caplog.set_level(logging.WARNING)
        caplog.clear()
        assert distance(denoised(model, arguments), expected) < ROUNDING
        assert len(acceleration.reports()) >= 2
    refused = [record.args[0] for record in caplog.records if "in every step" in record.getMessage()]
    assert (kilobytes == 10_000) == (not refused)
    if kilobytes == 0:
        # The denoiser itself asks for nothing before the others have kept all of theirs.
        assert {*refused} == {cls.__name__ for cls in Keeps.__subclasses__()} - {"FastDiffusionModule"}
    assert len(refused) <= 6, "once each"


def test_gradients_and_training_run_openfold3s_own_code(model):
    arguments = inputs()
    z = arguments["zij_trunk"].requires_grad_()

    def gradient() -> torch.Tensor:
        torch.manual_seed(1)
        return torch.autograd.grad(model(**arguments).sin().sum(), z)[0]

    def step() -> torch.Tensor:
        torch.manual_seed(1)
        noisy = torch.randn(1, 3, arguments["batch"]["atom_mask"].shape[-1], 3, device=DEVICE)
        common = {name: arguments[name] for name in ("batch", "si_input", "si_trunk", "zij_trunk")}
        masks = {name: arguments["batch"][name] for name in ("token_mask", "atom_mask")}
        levels = {
            "t": torch.tensor([[1.0, 2.0, 3.0]], device=DEVICE),
            "use_conditioning": True,
            "use_high_precision_attention": True,
        }
        loss = model.diffusion_module(xl_noisy=noisy, **common, **masks, **levels).sin().sum()
        return torch.autograd.grad(loss, z)[0]

    expected = gradient(), step()
    with accelerate(model.train(), DENSE):
        for found, want in zip((gradient(), step()), expected, strict=True):
            assert distance([found], [want]) < 1e-4
    model.eval()


def test_bfloat16_is_as_near_to_the_truth_as_openfold3(model):
    arguments = inputs() | {"noise_schedule": torch.tensor([160.0, 80.0], device=DEVICE)}
    exact = denoised(model, arguments)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        theirs = distance(denoised(model, arguments), exact)
        with accelerate(model, DENSE):
            ours = distance(denoised(model, arguments), exact)
    assert theirs > 1e-4
    assert ours < 1.2 * theirs


def patched(model: SampleDiffusion) -> None:
    block = model.diffusion_module.atom_attn_dec.atom_transformer.blocks[0]
    block.forward = block.forward


def in_a_precision(model: SampleDiffusion) -> None:
    model.diffusion_module.diffusion_transformer.blocks[0].attention_pair_bias.mha.linear_q.precision = torch.float32


def with_another_activation(model: SampleDiffusion) -> None:
    model.diffusion_module.diffusion_transformer.blocks[0].conditioned_transition.swiglu = nn.Identity()


def with_another_embedding_of_positions(model: SampleDiffusion) -> None:
    embedder = model.diffusion_module.atom_attn_enc.noisy_position_embedder
    forward = embedder.forward
    embedder.forward = lambda rl, **others: forward(rl=2 * rl, **others)


@pytest.mark.parametrize(
    "change", [patched, in_a_precision, with_another_activation, with_another_embedding_of_positions]
)
def test_a_sampler_of_unknown_parts_keeps_nothing(change):
    model = sampler()
    change(model)
    with accelerate(model, DENSE) as acceleration:
        assert set(acceleration.around) == TRANSITIONS
        assert len(acceleration.swapped) == 2
        assert "its diffusion module is" in {skipped.path: skipped.reason for skipped in acceleration.skipped}[""]
        assert not [module for module in model.modules() if isinstance(module, Keeps)]
