"""What --try means, and what is said of a text that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.pipeline.job import job_of
from nirvana_deploy.pipeline.searching.cuts import job_in, tried_options
from nirvana_deploy.search.point import Point
from nirvana_deploy.search.ways import OWN, Way, ways_of


def way(text: str) -> Way:
    own, other = ways_of([text], tried_options())
    assert own == OWN
    return other


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("saliency=nirvana", "nirvana", {"saliency": "nirvana"}),
        (
            "--saliency=nirvana --allocation=global",
            "nirvana-global",
            {"saliency": "nirvana", "allocation": "global"},
        ),
        ("recover=10m", "recover10m", {"recover": "10m"}),
        ("recover=10m steps=2", "recover10m-recover-steps2", {"recover": "10m", "recover_steps": 2}),
        ("ridge=0.5", "ridge0.5", {"ridge": 0.5}),
        ("ridge=auto", "auto", {"ridge": "auto"}),
        ("reconstruct=false", "reconstructFalse", {"reconstruct": False}),
        ("round-to=32", "round-to32", {"round_to": 32}),
        ("calib=pydoc:0.5,code:0.5", "pydoc-0.5-code-0.5", {"calib": "pydoc:0.5,code:0.5"}),
        ("'calib=/my texts/handbook.txt'", "handbook.txt", {"calib": "/my texts/handbook.txt"}),
        ("gamma=0.5 saliency=taylor", "gamma0.5-taylor", {"gamma": 0.5, "saliency": "taylor"}),
        ("preset=paper", "paper", {"preset": "paper"}),
        ("recover=20m recover-for=w4", "recover20m-recover-forw4", {"recover": "20m", "recover_for": "w4"}),
    ],
)
def test_a_text_says_which_options_are_tried(text: str, name: str, options: dict[str, object]) -> None:
    found = way(text)
    assert (found.name, dict(found.options)) == (name, options)


def test_no_way_has_the_name_of_another_in_a_precision() -> None:
    ways = ways_of(["recover=20m", "recover=20m recover-for=w4", "recover-for=w8"], tried_options())
    points = [Point(0.2, scheme, one) for one in ways for scheme in (None, "w4", "w8")]
    assert len({point.name for point in points}) == len(points) == 12


@pytest.mark.parametrize("text", ["calib=code", "seq-len=64", "preset=paper", "preset=fast ridge=2"])
def test_a_way_of_other_text_needs_one_that_judges_all(text: str, tmp_path: Path) -> None:
    """Also where a preset names the text: a KL on one text says nothing beside a KL on another."""
    alone = job_of("a model", {"sparsity": 0.2})
    with pytest.raises(NirvanaError, match=r"judged on what its own text holds back\.\n.*--eval-text FILE"):
        job_in(alone, way(text))
    judged = job_of("a model", {"sparsity": 0.2, "eval_text": tmp_path / "judge.txt"})
    tried = job_in(judged, way(text))
    assert tried.calibration.eval_text == (tmp_path / "judge.txt",)
    assert tried.calibration != judged.calibration


@pytest.mark.parametrize("own", [{}, {"preset": "fast"}, {"heldout_sequences": 5, "new_tokens": 7}])
@pytest.mark.parametrize("text", ["preset=fast", "preset=best", "preset=paper"])
def test_a_preset_changes_nothing_of_what_all_ways_are_judged_by(
    own: dict[str, object], text: str, tmp_path: Path
) -> None:
    job = job_of("a model", {"sparsity": 0.2, "eval_text": tmp_path / "judge.txt", **own})
    tried = job_in(job, way(text))
    assert tried.measurement == job.measurement
    for name in ("eval_text", "heldout_sequences", "heldout_len"):
        assert getattr(tried.calibration, name) == getattr(job.calibration, name)
    assert tried.pruning == job_of("a model", {"sparsity": 0.2, "preset": tried.pruning.preset}).pruning


def test_a_preset_of_the_same_text_is_judged_on_what_it_holds_back() -> None:
    paper = job_of("a model", {"sparsity": 0.2, "preset": "paper"})
    assert job_in(paper, way("preset=paper ridge=2")).pruning.ridge == 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["saliencyy=taylor"], "cannot try 'saliencyy'. Did you mean 'saliency'"),
        (["sparsity=0.3"], "cannot try 'sparsity'"),
        (["eval-text=x.txt"], "cannot try 'eval-text'"),
        (["ridge"], "'ridge' sets nothing"),
        (["ridge="], "'ridge=' sets nothing"),
        (["ridge=much"], "ridge = 'much' is not allowed; it takes a number or 'auto'"),
        (["round_to=0"], "round_to = '0' is not allowed"),
        (["allocation=globl"], "Did you mean 'global'"),
        ([""], "--try is empty"),
        (["calib='x"], "cannot be read"),
        (["calib=a/x.txt", "calib=b/x.txt"], "is called 'x.txt', as another one is"),
    ],
)
def test_what_cannot_be_tried_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(NirvanaError) as caught:
        ways_of(texts, tried_options())
    assert message in caught.value.message
