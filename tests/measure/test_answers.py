"""Every model continues the same prompts, as ``generate`` would."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5

from nirvana_deploy import prune_export
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.answers import NEW_TOKENS, continuations, known_continuations
from nirvana_deploy.measure.stage import answers
from nirvana_deploy.output import stage
from nirvana_deploy.output.records import read_records
from nirvana_deploy.output.results import AnswersWritten
from nirvana_deploy.output.run import Run
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.registry import open_runner
from nirvana_deploy.runtime.text import load_text_side, stream_text
from nirvana_deploy.verify.cases import NEW_TOKENS as HEARD_TOKENS
from nirvana_deploy.verify.cases import PROMPTS, Continued, prompts_for
from nirvana_deploy.verify.compare import generator


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny", "llama-tied")


def test_the_texts_are_those_that_generate_gives(tiny: Path) -> None:
    text_side, stops = load_text_side(tiny)
    steps: list[int] = []
    with open_runner(tiny, runtime="torch", threads=1) as runner:
        found = continuations(runner, text_side, stops=stops, advance=steps.append)
        again = stream_text(runner, text_side, PROMPTS[1], max_new_tokens=NEW_TOKENS, stops=stops)
    assert len(found) == len(steps) == len(PROMPTS) == 5 and found[1] == again.text


def test_ids_that_were_heard_give_the_same_texts(tiny: Path) -> None:
    text_side, stops = load_text_side(tiny)
    known: Continued = {}
    with open_runner(tiny, runtime="torch", threads=1) as runner:
        found = continuations(runner, text_side, stops=stops)
        generate = generator(runner, HEARD_TOKENS, stops)
        for prompt in prompts_for(tiny, runner.vocab_size):
            assert known_continuations(known, text_side, stops=stops) is None
            known[tuple(prompt[0].tolist())] = tuple(generate(prompt))
    assert known_continuations(known, text_side, stops=stops) == found
    assert NEW_TOKENS <= HEARD_TOKENS


def test_prompts_lie_on_one_line_and_differ() -> None:
    assert len(set(PROMPTS)) == 5 and not any("\n" in prompt for prompt in PROMPTS)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_the_stage_asks_every_model_or_says_why_not(kind: str, tiny: Path, tmp_path: Path) -> None:
    model = tiny if kind == "decoder" else write_t5(tmp_path / "t5", "flan-t5")
    out = tmp_path / "out"
    prune_export(
        str(model),
        out=out,
        sparsity=0.3,
        round_to=4,
        num_sequences=4,
        seq_len=16,
        heldout_sequences=3,
        heldout_len=24,
        threads=1,
        quantize=["w8"],
        baseline_quantized=False,
        run_benchmark=False,
    )
    record = read_records(out).result(stage.ANSWERS, AnswersWritten)
    assert record is not None and list(record.variants) == ["dense", "pruned", "pruned-w8"]
    assert read_json(out / "answers.json")["variants"].keys() == record.variants.keys()
    asked = kind == "decoder"
    assert {len(texts) for texts in record.variants.values()} == {5 if asked else 0}
    assert (record.skipped is None) == asked
    page = (out / "report.html").read_text(encoding="utf-8")
    assert ("Not asked: t5 " in page) != asked and "What the models write" in page
    run = Run.open(out)
    again = answers(run, Place(threads=1))
    assert not again.always and run.finished(again.name)
    with run:
        run.run(again, redo=True)  # asks all models, where verification was heard before
    assert read_records(out).result(stage.ANSWERS, AnswersWritten) == record
