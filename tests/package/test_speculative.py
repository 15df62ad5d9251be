"""A model with its draft in onnxruntime-genai: output is the model's own, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builders.extras import needs
from builders.plans import plan_for
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from click.testing import CliRunner

from nirvana_deploy import benchmark_speculative, package_speculative, verify_folder
from nirvana_deploy.base.errors import MissingExtraError, NirvanaError, VerificationError
from nirvana_deploy.cli.main import commands
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.package.speculative import require_pair, speculative_config, write_speculative
from nirvana_deploy.package.stage import SpeculativePackage
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime import genai as runtime
from nirvana_deploy.runtime.genai import GenaiModel
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.runner import greedy_tokens

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the genai bindings while they load


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(target, draft): ONNX folders of a tiny Llama and of its cut, whose layers differ."""
    needs("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("pair")
    model = write_tiny(folder / "model", "llama-tied", head_dim=16)
    slice_checkpoint(Checkpoint.open(model), plan_for(model), folder / "cut")
    for name, checkpoint in (("target", model), ("draft", folder / "cut")):
        onnx_from_checkpoint(Checkpoint.open(checkpoint), folder / name, flavor="gqa")
    return folder / "target", folder / "draft"


@pytest.fixture(scope="module")
def made(pair: tuple[Path, Path]) -> SpeculativePackage:
    target, draft = pair
    return package_speculative(target, target.parent / "speculative", draft=str(draft))


@pytest.mark.consumer(
    "onnxruntime-genai",
    artifact="speculative folder: a tiny Llama with its cut, global, as the draft",
    proof="greedy tokens of 20 prompts with 1 to 6 draft tokens equal those of the target alone",
    package="onnxruntime-genai",
)
def test_output_is_the_targets_own(made: SpeculativePackage, pair: tuple[Path, Path]) -> None:
    assert made.report.passed and len(made.report.greedy) == 6
    assert all(check.equal_prompts == check.prompts == 20 for check in made.report.greedy)
    assert [one.draft_tokens for one in made.found.rounds] == [1, 2, 3, 4, 5, 6]
    prompt = np.array([[5, 9, 200, 30, 44]], dtype=np.int64)
    with OrtDecoder(pair[0]) as target:
        assert GenaiModel(made.path).generate(prompt, 40) == greedy_tokens(
            target, prompt, max_new_tokens=40, eos_token_ids=()
        )


def test_the_folder_has_a_card_of_its_own_and_the_licence(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    (target / "LICENSE").write_text("theirs")
    (target / "README.md").write_text("of the target alone")
    package_speculative(target, tmp_path / "made", draft=str(pair[1]), draft_tokens=1)
    assert (tmp_path / "made" / "LICENSE").read_text() == "theirs"
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "of the target alone" not in card and "token for token" in card and "og.Model" in card


def test_the_draft_was_at_work(made: SpeculativePackage) -> None:
    for one in made.found.rounds:
        assert 0 < one.acceptance < 1
        assert 1 < one.tokens_per_round <= 1 + one.draft_tokens
        assert 0 < one.draft_ms + one.verify_ms <= one.round_ms


def test_the_record_is_what_was_measured_and_the_fastest_is_kept(made: SpeculativePackage) -> None:
    record = json.loads((made.path / "speculative.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(made.record))
    assert (record["target"], record["draft"]) == ("target", "draft")
    fastest = max(record["rounds"], key=lambda one: one["speedup"])
    config = json.loads((made.path / "genai_config.json").read_text(encoding="utf-8"))
    assert (
        config["speculative"]
        == {"max_draft_tokens": fastest["draft_tokens"]}
        == {"max_draft_tokens": record["chosen"]}
    )


def test_weights_are_linked_not_copied(made: SpeculativePackage, pair: tuple[Path, Path]) -> None:
    target, draft = pair
    for place, source in (("", target), ("draft", draft)):
        for name in ("model.onnx", "model.onnx.data"):
            assert (made.path / place / name).samefile(source / name)


def test_it_is_verified_and_measured_again(made: SpeculativePackage, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made.path, tmp_path / "copy"))
    found = verify_folder(out)
    assert found.passed and found.reports["drafted"].greedy[0].equal_prompts == 20
    again = benchmark_speculative(out, new_tokens=6, threads=1)
    assert again.found.new_tokens == 6 and again.report.passed
    shown = CliRunner().invoke(commands, ["benchmark", str(out), "--new-tokens", "4"], catch_exceptions=False)
    assert shown.exit_code == 0 and "Greedy answers are those of target" in shown.output
    shown = CliRunner().invoke(commands, ["verify", str(out)], catch_exceptions=False)
    assert shown.exit_code == 0 and "20 of 20 equal" in shown.output and "sha256" not in shown.output


def test_a_changed_answer_is_a_failure(
    made: SpeculativePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(made.path, tmp_path / "copy"))
    own = runtime.GenaiAnswers.answer

    def other(self: runtime.GenaiAnswers, prompt: Sequence[int], **how: Any) -> runtime.Answer:
        found = own(self, prompt, **how)
        if how.get("draft_tokens") is None and not found.stats["rounds"]:
            return found
        return runtime.Answer((*found.ids[:-1], (found.ids[-1] + 1) % 272), found.decode_ms, found.stats)

    monkeypatch.setattr(runtime.GenaiAnswers, "answer", other)
    found = verify_folder(out)
    assert not found.passed
    with pytest.raises(VerificationError, match="its target alone"):
        found.require_passed()


def test_a_trial_that_is_interrupted_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nirvana_deploy.package.stage.tried_out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package_speculative(pair[0], tmp_path / "out", draft=str(pair[1]))
    assert not list(tmp_path.iterdir()) and (pair[1] / "model.onnx.data").is_file()


def test_the_shorter_context_is_that_of_both(pair: tuple[Path, Path]) -> None:
    config = json.loads((pair[0] / "genai_config.json").read_text(encoding="utf-8"))
    shorter = {**config, "model": {**config["model"], "context_length": 100}}
    found = speculative_config(config, shorter, draft_tokens=3)
    assert found["model"]["context_length"] == found["search"]["max_length"] == 100
    assert found["model"]["draft"]["filename"] == "draft/model.onnx"
    assert found["model"]["decoder"] == config["model"]["decoder"]


def changed(folder: Path, out: Path, vocabulary: int | None = None, flavor: str | None = None) -> Path:
    """A copy of an ONNX folder that says another vocabulary or flavor of itself."""
    shutil.copytree(folder, out)
    if vocabulary is not None:
        config = json.loads((out / "genai_config.json").read_text(encoding="utf-8"))
        config["model"]["vocab_size"] = vocabulary
        (out / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")
    if flavor is not None:
        graph = onnx.load(out / "model.onnx", load_external_data=False)
        entry = next(one for one in graph.metadata_props if one.key == "nirvana_deploy.flavor")
        entry.value = flavor
        (out / "model.onnx").write_bytes(graph.SerializeToString())
    return out


def test_vocabularies_that_differ_are_refused_with_both_numbers(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = changed(pair[1], tmp_path / "other", vocabulary=300)
    with pytest.raises(NirvanaError, match="vocabulary of 272 tokens, the draft one of 300"):
        require_pair(pair[0], other)


def test_tokenizers_that_differ_are_refused_with_both_numbers(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["zz"] = 259
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(NirvanaError, match="target's has 259 tokens, the draft's 260, and 1 of them"):
        require_pair(pair[0], other)


def test_the_same_tokenizer_in_other_bytes_will_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(pair[1], tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3), encoding="utf-8")
    require_pair(pair[0], other)


@pytest.mark.parametrize("flavor", ["portable", "static-cache"])
def test_other_flavors_are_refused_by_name(pair: tuple[Path, Path], tmp_path: Path, flavor: str) -> None:
    other = changed(pair[1], tmp_path / "other", flavor=flavor)
    with pytest.raises(NirvanaError, match=f"The draft, .* is of flavor {flavor}"):
        require_pair(pair[0], other)
    with pytest.raises(NirvanaError, match=f"The target, .* is of flavor {flavor}"):
        require_pair(other, pair[0])


def test_an_encoder_decoder_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    t5 = write_t5(tmp_path / "t5", "t5")
    onnx_from_checkpoint(Checkpoint.open(t5), tmp_path / "t5-onnx")
    for one in ((tmp_path / "t5-onnx", pair[1]), (pair[0], tmp_path / "t5-onnx")):
        with pytest.raises(NirvanaError, match="is an encoder-decoder"):
            require_pair(*one)


def test_one_model_twice_and_a_pair_as_a_target_are_refused(
    pair: tuple[Path, Path], made: SpeculativePackage
) -> None:
    with pytest.raises(NirvanaError, match="Target and draft are one model"):
        require_pair(pair[0], pair[0])
    with pytest.raises(NirvanaError, match="has a draft already"):
        require_pair(made.path, pair[1])


def test_too_many_draft_tokens_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match="1 to 16 tokens at a time, got 17"):
        write_speculative(*pair, tmp_path / "out", draft_tokens=17)


def test_a_model_that_is_not_there_is_named_with_those_that_are(pair: tuple[Path, Path]) -> None:
    with pytest.raises(NirvanaError, match="has no model 'pruned-w4'"):
        package_speculative(pair[0], pair[0].parent / "new", draft="pruned-w4")


def test_an_old_onnxruntime_genai_is_refused_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("onnxruntime_genai")
    monkeypatch.setattr(runtime, "version", lambda name: "0.9.4")
    with pytest.raises(NirvanaError, match=r"onnxruntime-genai 0\.9\.4 takes no draft.*0\.18") as refused:
        runtime.require_speculative()
    assert refused.value.hint is not None and "'onnxruntime-genai>=0.18'" in refused.value.hint
    monkeypatch.setattr(runtime, "version", lambda name: "0.18.0rc1")
    runtime.require_speculative()
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="onnxruntime-genai"):
        runtime.require_speculative()


@pytest.mark.parametrize(
    "words",
    [["--speculative", "--gguf"], ["--gguf", "--draft", "pruned"], ["--triton", "--draft-tokens", "2"]],
)
def test_options_that_do_not_go_together_are_a_usage_error(words: list[str], tmp_path: Path) -> None:
    assert CliRunner().invoke(commands, ["package", str(tmp_path), *words]).exit_code == 2
