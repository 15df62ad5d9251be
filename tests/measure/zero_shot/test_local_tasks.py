"""Local files of rows: what is refused, and accuracies that equal a computation by hand."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders.extras import needs
from builders.tiny import write_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.measure.zero_shot.local_tasks import is_local, prompt_of, read_task, read_tasks
from nirvana_deploy.measure.zero_shot.tasks import evaluate_tasks
from nirvana_deploy.model.checkpoint import Checkpoint

CHOICE = {"query": "Question: why?", "choices": ["so", "no"], "gold": 1}
CONTEXTS = {"context_options": ["Ann said that Ann", "Ann said that Bob"], "continuation": "ran.", "gold": 0}
WORD = {"context": "I do not care about", "continuation": "signs"}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        (["", " "], "is empty"),
        ([CHOICE, "{"], "line 2 is not valid JSON"),
        ([CHOICE, "", "[1]"], r"line 3 is \[1\], not an object"),
        ([{"text": "a"}], "line 1 has the keys text"),
        ([{}], "line 1 has the keys of nothing"),
        ([CHOICE, {"query": "a", "choices": ["b", "c"]}], "line 2 has no key 'gold'"),
        ([CHOICE, {**CHOICE, "query": 3}], "line 2, key 'query' is 3, not a text that is not blank"),
        ([{**CHOICE, "query": "\ud800"}], "line 1, key 'query'"),
        ([{**CHOICE, "choices": ["so"]}], "line 1, key 'choices' is .* not a list of at least two texts"),
        ([{**CHOICE, "choices": ["so", ""]}], "line 1, key 'choices'"),
        ([{**CHOICE, "choices": "so"}], "line 1, key 'choices' is \"so\""),
        ([{**CHOICE, "gold": 2}], "line 1, key 'gold' is 2, not an index into choices, from 0 to 1"),
        ([{**CHOICE, "gold": -1}], "line 1, key 'gold' is -1"),
        ([{**CHOICE, "gold": True}], "line 1, key 'gold' is true"),
        ([CONTEXTS, {**CONTEXTS, "gold": "0"}], "line 2, key 'gold' is \"0\", not an index into context_opt"),
        ([WORD, {"context": "a"}], "line 2 has no key 'continuation'"),
        ([WORD, {**WORD, "continuation": " "}], "line 2, key 'continuation'"),
        ([CHOICE, CHOICE, WORD], r"line 3 is of another kind \(context, continuation\).*no key 'query'"),
        ([WORD, CONTEXTS], r"line 2 is of another kind .*no key 'context'"),
    ],
)
def test_a_malformed_file_names_line_and_key(tmp_path: Path, rows: list[Any], message: str) -> None:
    path = write_rows(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(NirvanaError, match=f"mine.jsonl.*{message}"):
        read_task(path)


def test_missing_files_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NirvanaError, match=r"nowhere.jsonl does not exist"):
        read_tasks([tmp_path / "nowhere.jsonl"])
    with pytest.raises(NirvanaError, match=r"holds no \.jsonl file"):
        read_tasks([tmp_path])
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9")
    with pytest.raises(NirvanaError, match="is not UTF-8: byte 0xe9 at offset 0"):
        read_tasks([tmp_path / "latin.jsonl"])
    (tmp_path / "latin.jsonl").unlink()
    (tmp_path / "b").mkdir()
    for name in ("b.jsonl", "a.jsonl", "b/a.jsonl"):
        write_rows(tmp_path / name, CHOICE)
    assert [task.name for task in read_tasks([tmp_path])] == ["a", "b"]
    with pytest.raises(NirvanaError, match="are both the task a"):
        read_tasks([tmp_path, tmp_path / "b"])


def test_a_task_has_one_metric_by_its_name(tmp_path: Path) -> None:
    for name, metric in (("hellaswag", "acc_norm"), ("piqa", "acc"), ("mine", "acc")):
        path = write_rows(tmp_path / f"{name}.jsonl", CHOICE)
        record = read_task(path).record()
        assert record == {"file": path.name, "sha256": sha256_of(path), "rows": 1, "metric": metric}


def test_names_of_the_harness_are_told_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert all(map(is_local, ("piqa.jsonl", "../tasks", "folder", str(tmp_path), "tasks/piqa.json")))
    assert not any(map(is_local, ("piqa", "mmlu_pro", "own/task.yaml")))


def test_only_questions_are_answered_on_a_new_line() -> None:
    assert prompt_of("Question: why?\n") == "Question: why?\nAnswer:"
    assert prompt_of("Passage: long.\nQuestion: why?") == "Passage: long.\nQuestion: why?\nAnswer:"
    assert prompt_of("A man is sitting on a roof. He") == "A man is sitting on a roof. He"


class ByHand:
    """Log-likelihoods with transformers alone: one text at a time, whole, without harness."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def __call__(self, context: str, continuation: str) -> tuple[float, bool]:
        """log P(continuation | context), and whether each of its tokens is the likeliest."""
        start = len(self.tokenizer(context)["input_ids"])
        tokens = self.tokenizer(context + continuation, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_p = self.model(tokens).logits[0, start - 1 : -1].log_softmax(-1)
        targets = tokens[0, start:]
        greedy = bool((log_p.argmax(-1) == targets).all())
        return float(log_p.gather(1, targets[:, None]).sum()), greedy

    def likeliest(self, context: str) -> str:
        """The likeliest next character."""
        tokens = self.tokenizer(context, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return str(self.tokenizer.decode([int(self.model(tokens).logits[0, -1].argmax())]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that favours the space and two letters, so that some last words are right."""
    folder = write_tiny(tmp_path_factory.mktemp("favours") / "model", "llama-biased")
    network = AutoModelForCausalLM.from_pretrained(folder)
    favoured = AutoTokenizer.from_pretrained(folder)(" ab")["input_ids"]
    with torch.no_grad():
        network.lm_head.weight[favoured] *= 10
    network.save_pretrained(folder)
    return folder


def made_up_rows(by_hand: ByHand) -> tuple[list[Any], list[Any], list[Any]]:
    """Thirty rows of each kind, with words from a fixed seed."""
    random = np.random.default_rng(3)

    def words(count: int) -> str:
        return " ".join(
            "".join(random.choice(list("abcdefghijéu"), size=random.integers(1, 7))) for _ in range(count)
        )

    choices: list[Any] = []
    contexts: list[Any] = []
    last: list[Any] = []
    for index in range(30):
        query = ["Question: {}?", "Question: {}\n", "{}"][index % 3].format(words(3))
        options = [words(int(random.integers(1, 4))) for _ in range(2 + index % 3)]
        choices.append({"query": query, "choices": options, "gold": int(random.integers(len(options)))})
        two = [words(4), words(4)]
        contexts.append({"context_options": two, "continuation": words(2), "gold": int(random.integers(2))})
        context = next(text for text in iter(lambda: words(3), "") if by_hand.likeliest(text) == " ")
        letter = by_hand.likeliest(f"{context} ")
        last.append({"context": context, "continuation": letter if letter in "ab" else "z"})
    return choices, contexts, last


def accuracies(by_hand: ByHand, rows: tuple[list[Any], list[Any], list[Any]]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, written out."""
    choices, contexts, last = rows
    plain, normed, chosen = [], [], []
    for row in choices:
        query = row["query"]
        prompt = query.strip("\n") + "\nAnswer:" if query.startswith("Question") else query
        found = np.array([by_hand(prompt, " " + choice)[0] for choice in row["choices"]])
        plain.append(found.argmax() == row["gold"])
        normed.append((found / [len(choice) for choice in row["choices"]]).argmax() == row["gold"])
    for row in contexts:
        found = np.array(
            [by_hand(context, " " + row["continuation"])[0] for context in row["context_options"]]
        )
        chosen.append(found.argmax() == row["gold"])
    greedy = [by_hand(row["context"], " " + row["continuation"])[1] for row in last]
    return {
        "choices": {"acc": np.mean(plain), "acc_norm": np.mean(normed)},
        "contexts": {"acc": np.mean(chosen)},
        "last": {"acc": np.mean(greedy)},
    }  # fmt: skip


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
def test_accuracies_equal_a_computation_by_hand(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("lm_eval")
    by_hand = ByHand(model)
    rows = made_up_rows(by_hand)
    names = ("choices", "contexts", "last")
    files = [write_rows(tmp_path / f"{name}.jsonl", *some) for name, some in zip(names, rows, strict=True)]
    expected = accuracies(by_hand, rows)
    assert expected["choices"]["acc"] != expected["choices"]["acc_norm"] and 0 < expected["last"]["acc"] < 1
    onnx_from_checkpoint(Checkpoint.open(model), tmp_path / "onnx")

    def unreachable(*_: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    models = {"checkpoint": model, "onnx": tmp_path / "onnx"}
    found = evaluate_tasks(models, [str(file) for file in files], batch_size=4)
    for variant in found["variants"].values():
        assert list(variant) == list(names)
        for task, metrics in variant.items():
            values = {m.removesuffix(",none"): x for m, x in metrics.items() if "stderr" not in m}
            assert values == pytest.approx(expected[task])
    assert found["files"]["last"]["sha256"] == sha256_of(files[2])
    first, second = found["means"]["variants"].values()
    assert first["mean"] == pytest.approx(np.mean([task["acc"] for task in expected.values()]))
    assert second["difference"] == 0 == second["difference_standard_error"]
    few = evaluate_tasks({"checkpoint": model}, [str(files[1])], limit=1)
    assert few["means"]["variants"]["checkpoint"]["standard_error"] is None
