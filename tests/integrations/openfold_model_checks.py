"""Checks of whole models and of the flag in their configuration that need OpenFold for AlphaFold 2."""

import copy

import pytest
import torch
from openfold.config import model_config
from openfold.model.model import AlphaFold

from pairformer_fast import AttentionConfig, accelerate
from pairformer_fast.bias import Configured, collect_reports
from pairformer_fast.inference.errors import InputError
from pairformer_fast.integrations.openfold_flag import accelerate_as_configured, flashbias_flag
from tests.integrations.comparison import DENSE, distance, full_rank
from tests.integrations.openfold_cases import (
    assert_same_gradients,
    features,
    model_gradients,
    predictions,
    small_model,
)


def test_small_model():
    n = 24
    model, batch = small_model(), features(n)
    expected_gradients = model_gradients(model, batch)
    assert len(expected_gradients) > 400
    with torch.no_grad():
        expected = predictions(model, batch)
        with accelerate(model, DENSE) as acceleration:
            found = {"dense": predictions(model, batch)}
            acceleration.configure(full_rank(n))
            found["factors"] = predictions(model, batch)
            choices = {report["choice"] for report in acceleration.reports()}
            acceleration.configure(DENSE)
            with torch.enable_grad():
                found_gradients = model_gradients(model, batch)
    assert len(acceleration.swapped) == 2 + 3 + 2 * 3, "templates, extra MSA, Evoformer"
    assert len(acceleration.around) == 3 + 4 + 2 * 4
    assert choices == {"factors"}
    for name, value in expected.items():
        assert all(distance(of_kind[name], value) < 1e-5 for of_kind in found.values()), name
    assert_same_gradients(found_gradients, expected_gradients)


def test_flag_of_the_configuration():
    """The same state_dict, numbers and gradients with the flag off and on; factors in evaluation only."""
    n = 16
    plain, batch = small_model(), features(n)
    assert accelerate_as_configured(plain) is None
    with flashbias_flag():
        off = small_model()
        on = small_model(use_flashbias=True, flashbias={"bias": "svd", "rank": n})
    assert not any(isinstance(module, Configured) for module in [*off.modules(), *plain.modules()])
    on.load_state_dict(plain.state_dict())
    plain.load_state_dict(on.state_dict())

    expected_gradients = model_gradients(plain, batch)
    assert_same_gradients(model_gradients(on, batch), expected_gradients)
    with torch.no_grad():
        expected = predictions(plain, batch)
        found = predictions(on, batch)
        reports = collect_reports(on)
        predictions(on, batch)
    assert {report["choice"] for report in reports} == {"factors"}
    assert len(collect_reports(on)) == len(reports), "of the last pass alone"
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name

    duplicate = copy.deepcopy(on)
    with torch.no_grad():
        assert distance(predictions(duplicate, batch)["pair"], expected["pair"]) < 1e-5
    assert_same_gradients(model_gradients(duplicate, batch), expected_gradients)


@torch.no_grad()
def test_flag_in_the_preset_for_inference():
    """In place, and in chunks whose size OpenFold finds by trying."""
    n = 24
    plain, batch = small_model(train=False), features(n)
    with flashbias_flag():
        flagged = small_model(train=False, use_flashbias=True, flashbias={"bias": "svd", "rank": n})
    expected, found = predictions(plain, batch), predictions(flagged, batch)
    assert {report["choice"] for report in collect_reports(flagged)} == {"factors"}
    for name, value in expected.items():
        assert distance(found[name], value) < 1e-5, name


def test_flag_is_undone():
    model = small_model()
    before = {path: (type(module), set(vars(module))) for path, module in model.named_modules()}
    model.globals.use_flashbias = True
    acceleration = accelerate_as_configured(model)
    assert len(acceleration.swapped) == 11
    acceleration.restore()
    assert {path: (type(module), set(vars(module))) for path, module in model.named_modules()} == before
    assert not model._forward_pre_hooks


def test_flag_by_dotted_keys_as_in_openfolds_scripts():
    with flashbias_flag():
        config = model_config("model_1")
        config.update_from_flattened_dict({"globals.use_flashbias": True, "globals.flashbias.rank": 8})
        assert config.globals.flashbias.to_dict() == AttentionConfig(rank=8).model_dump(mode="json")
    assert "use_flashbias" not in model_config("model_1").globals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_flashbias": "yes"}, "globals.use_flashbias must be true or false, but is 'yes'"),
        ({"use_flashbias": True, "flashbias": {"method": "svd"}}, "globals.flashbias.*: method: Extra inputs"),
        ({"use_flashbias": True, "flashbias": {"bias": "flat"}}, "globals.flashbias.*: bias: Input should be 'auto'"),
        ({"use_flashbias": True, "flashbias": {"bias": "learned"}}, "globals.flashbias: .*'learned'"),
        ({"use_flashbias": True, "flashbias": {"rank": 0}}, "rank: Input should be greater than or equal to 1"),
        ({"use_flashbias": False, "flashbias": "svd"}, "globals.flashbias must hold fields such as bias"),
    ],
)
def test_wrong_values_of_the_flag_are_refused_before_a_model_is_built(settings, message, monkeypatch):
    config = model_config("model_1")
    config.globals.update(settings)
    monkeypatch.setattr(AlphaFold, "__init__", lambda self, config: pytest.fail("was built"))
    with flashbias_flag(), pytest.raises(InputError, match=message):
        AlphaFold(config)
