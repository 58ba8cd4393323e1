# ruff: noqa: F401, F811 (fixtures are imported by name)
"""From FASTA to inspect.json and plots, with the real model, small and with random weights."""

import json
import os
import sys
import xml.etree.ElementTree as ET

import pytest

from pairformer_fast.config import BiasMethod
from pairformer_fast.inference import inspection_run
from pairformer_fast.inference.errors import InputError
from pairformer_fast.inference.inspection_run import PLOTS, JobInspection, inspect_biases
from pairformer_fast.inference.pipeline import fold
from pairformer_fast.inference.settings import FoldSettings
from pairformer_fast.model import checkpoint

from .test_end_to_end import SEQUENCE, SMALL, weights

ATTENTIONS = 3 * SMALL.pairformer.no_blocks


@pytest.fixture
def settings(weights) -> FoldSettings:
    return FoldSettings(checkpoint=weights, device="cpu", compare=False, bias="svd", rank=8)


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pairformer_fast.inference.inspection_plots", raising=False)


def test_json_has_every_attention_as_fold_computes_it(settings, without_matplotlib, fasta, tmp_path):
    source = fasta(f">a\n{SEQUENCE}\n")
    report = inspect_biases(source, tmp_path / "deep" / "out", settings, [BiasMethod.SVD, BiasMethod.LANDMARK])
    assert (report.failed, report.plotted) == ({}, False)
    assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["a"]
    assert os.listdir(tmp_path / "deep" / "out" / "a") == ["inspect.json"]
    text = (tmp_path / "deep" / "out" / "a" / "inspect.json").read_text()
    content = json.loads(text)
    assert JobInspection.model_validate_json(text) == report.jobs[0]
    assert set(content) == {"id", "chains", "residues", "run", "tolerance", "tile", "attentions"}
    assert (content["id"], content["residues"], content["tolerance"], content["tile"]) == ("a", len(SEQUENCE), 0.1, 64)
    assert content["run"]["settings"]["bias"] == "svd"
    assert content["run"]["chosen"]["recycles"] == SMALL.recycles

    folded = fold(source, tmp_path / "folded", settings.model_copy(update={"compare": True}))
    assert not folded.failed
    calls = json.loads((tmp_path / "folded" / "a" / "a_comparison.json").read_text())["bias"]
    last = {call["name"]: call for call in calls}
    assert len(last) == len(content["attentions"]) == ATTENTIONS < len(calls)
    for attention in content["attentions"]:
        call = last[attention["name"]]
        assert attention["choice"] == call["choice"] == "factors"
        assert attention["used"] == {name: call[name] for name in attention["used"]}
        assert attention["factors"]["rank"] == attention["used"]["rank"]
        assert len(attention["spectrum"]) == len(attention["tiles"]) == attention["heads"]
        assert [(rung["method"], rung["at"]) for rung in attention["ladder"]] == [
            (method, rank) for method in ("svd", "landmark") for rank in (4, 8, 16, 32)
        ]


def test_labels_leave_out_what_all_names_share(settings, without_matplotlib, fasta, tmp_path):
    (job,) = inspect_biases(fasta(f">a\n{SEQUENCE}\n"), tmp_path, settings).jobs
    assert job.labels[:3] == ["0.pair_stack.tri_att_start", "0.pair_stack.tri_att_end", "0.attn_pair_bias"]
    one = job.model_copy(update={"attentions": job.attentions[:1]})
    assert one.labels == [job.attentions[0].name]


def test_a_job_that_breaks_writes_nothing_and_the_others_finish(settings, fasta, tmp_path, monkeypatch):
    inspect_job = inspection_run.inspect_job

    def breaking(predictor, job, *rest):
        if job.id == "bad":
            raise RuntimeError("it\nbroke")
        return inspect_job(predictor, job, *rest)

    monkeypatch.setattr(inspection_run, "inspect_job", breaking)
    report = inspect_biases(fasta(f">bad\n{SEQUENCE}\n>b\n{SEQUENCE[:9]}\n"), tmp_path / "out", settings)
    assert report.failed == {"bad": "it broke"}
    assert [job.id for job in report.jobs] == os.listdir(tmp_path / "out") == ["b"]


def test_a_plot_that_breaks_leaves_no_half_of_the_results(settings, fasta, tmp_path, monkeypatch):
    def draw(job):
        raise ValueError("no canvas")

    monkeypatch.setattr(inspection_run, "_plotter", lambda: draw)
    report = inspect_biases(fasta(f">a\n{SEQUENCE}\n"), tmp_path / "out", settings)
    assert report.failed == {"a": "no canvas"}
    assert not (tmp_path / "out").exists()


def test_plots_of_an_earlier_run_go_when_none_are_drawn(settings, without_matplotlib, fasta, tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    for name in (*PLOTS, "mine.txt"):
        (tmp_path / "out" / "a" / name).write_text("old")
    inspect_biases(fasta(f">a\n{SEQUENCE}\n"), tmp_path / "out", settings)
    assert sorted(os.listdir(tmp_path / "out" / "a")) == ["inspect.json", "mine.txt"]


@pytest.mark.parametrize(
    ("update", "methods", "message"),
    [
        ({}, ["auto"], "--method auto: makes no factors"),
        ({}, ["svd", "learned"], "--method learned: makes no factors"),
        ({"attention": "reference", "bias": "auto", "rank": None}, [], "nothing to choose"),
        ({"bias": "learned", "rank": None}, ["svd"], "no factor networks"),
        ({"checkpoint": "nowhere"}, [], "no such file"),
    ],
)
def test_requests_that_will_not_do(settings, fasta, tmp_path, monkeypatch, update, methods, message):
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: pytest.fail("the model was loaded"))
    wrong = FoldSettings(**settings.model_dump() | update)
    with pytest.raises(InputError, match=message):
        inspect_biases(fasta(f">a\n{SEQUENCE}\n"), tmp_path / "out", wrong, [BiasMethod(name) for name in methods])
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_way_is_an_error(settings, fasta, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        inspect_biases(fasta(f">a\n{SEQUENCE}\n"), tmp_path / "out", settings)


@pytest.mark.parametrize("bias", ["dense", "structured"])
def test_plots_are_svg_and_name_job_methods_and_blocks(settings, fasta, tmp_path, bias):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]: pip install '.[plot]'")
    from pairformer_fast.inference.inspection_plots import draw

    asked = settings.model_copy(update={"bias": BiasMethod(bias)})
    methods = [BiasMethod.SVD, BiasMethod.RANDOMISED]
    report = inspect_biases(fasta(f">fv\n{SEQUENCE}\n"), tmp_path, asked, methods)
    assert (report.failed, report.plotted) == ({}, True)
    assert sorted(os.listdir(tmp_path / "fv")) == sorted([*PLOTS, "inspect.json"])
    texts = {name: (tmp_path / "fv" / name).read_text() for name in PLOTS}
    assert draw(report.jobs[0]) == texts
    for text in texts.values():
        assert ET.fromstring(text).tag.endswith("svg")
        assert "fv: " in text
    for kind in ("pair_stack.tri_att_start", "pair_stack.tri_att_end", "attn_pair_bias"):
        assert kind in texts["spectra.svg"]
        assert kind in texts["ranks.svg"]
        assert f"{kind} 1 of" in texts["dense_tiles.svg"]
    assert ("1 dense" in texts["ranks.svg"]) == (bias == "dense")
    assert all(method in texts["bound.svg"] for method in methods)


def test_an_exact_bias_can_be_plotted(settings, fasta, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra [plot]: pip install '.[plot]'")
    report = inspect_biases(fasta(">a\nMK\n>b\nM\n"), tmp_path, settings)
    assert report.failed == {}
    assert sorted(os.listdir(tmp_path / "b")) == sorted([*PLOTS, "inspect.json"])
