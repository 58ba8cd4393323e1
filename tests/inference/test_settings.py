import pytest
from pydantic import ValidationError

from pairformer_fast.config import AttentionConfig, BiasMethod
from pairformer_fast.inference.settings import FoldSettings


def test_auto_is_flashbias_compared_with_the_reference():
    settings = FoldSettings()
    assert settings.accelerated == AttentionConfig(bias=BiasMethod.AUTO)
    assert settings.reference == AttentionConfig.reference()


def test_what_is_asked_for_reaches_the_attention():
    settings = FoldSettings(attention="flashbias", bias="svd", rank=7, compare=False)
    assert (settings.accelerated.bias, settings.accelerated.rank) == (BiasMethod.SVD, 7)
    assert settings.reference is None
    assert FoldSettings(tolerance=0.5).accelerated.tolerance == 0.5


def test_reference_alone():
    settings = FoldSettings(attention="reference", bias="dense")
    assert settings.accelerated is None
    assert settings.reference == AttentionConfig.reference()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"bias": "dense", "rank": 4}, "rank is for factors, but bias is dense"),
        ({"bias": "dense", "tolerance": 0.1}, "tolerance is for factors"),
        ({"rank": 4, "tolerance": 0.1}, "exclude each other"),
        ({"attention": "reference", "bias": "svd"}, "uses the dense bias"),
        ({"attention": "reference", "rank": 4}, "has no factors"),
        ({"attention": "reference", "compare": True}, "nothing to compare"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"tolerance": 0}, "greater than 0"),
        ({"device": "tpu"}, "must be auto, cpu, cuda or cuda:INDEX, but got 'tpu'"),
        ({"recycles": -1}, "greater than or equal to 0"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"precision": "fp16"}, "fp32"),
    ],
)
def test_contradictions_and_values_out_of_range_are_refused(request_, message):
    with pytest.raises(ValidationError, match=message):
        FoldSettings(**request_)
