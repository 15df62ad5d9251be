"""Tiny random models of every supported kind, with a tokenizer, written once per test run."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nirvana_deploy.engine.cuda import CudaDevice
from nirvana_deploy.errors import NirvanaError

VOCABULARY = 272
KINDS: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: LlamaConfig(**_size(), tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**_size(), attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**_size(), head_dim=8, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_size(), tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_size(), head_dim=16),
}


INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""First line of a script that is to be interrupted: a shell's background jobs inherit SIGINT ignored."""


def _size() -> dict[str, Any]:
    return {
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")
    parser.addoption("--consumers", metavar="FILE", help="write what the tests marked consumer found")


_CONSUMERS = pytest.StashKey[list[dict[str, Any]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the outcome of a test that shows an artifact in the program it is made for."""
    report = yield
    if report.when == "call" or not report.passed:
        found = item.config.stash.setdefault(_CONSUMERS, [])
        for mark in item.iter_markers("consumer"):
            told = {"consumer": mark.args[0], **mark.kwargs, "test": item.nodeid, "outcome": report.outcome}
            if package := told.pop("package", None):
                told["version"] = version(package)
            if report.skipped and isinstance(report.longrepr, tuple):
                told["reason"] = report.longrepr[2].removeprefix("Skipped: ")
            found.append(told)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := session.config.getoption("--consumers"):
        Path(file).write_text(json.dumps(session.config.stash.get(_CONSUMERS, []), indent=1) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = _why_no_gpu() if any("gpu" in item.keywords for item in items) else None
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))
        if "gpu" in item.keywords and no_gpu is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {no_gpu}"))


def _why_no_gpu() -> str | None:
    """The driver's own answer: a torch without CUDA says nothing about the machine."""
    try:
        CudaDevice().close()
    except NirvanaError as error:
        return error.message
    return None


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: every text encodes, one token a byte."""
    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_tiny(
    folder: Path,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    head_dim: int | None = None,
    **save: Any,
) -> Path:
    """Save a random model of ``kind`` with weights large enough that its layers matter."""
    torch.manual_seed(7)
    config = KINDS[kind]()
    if head_dim is not None:
        config.head_dim = head_dim
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.15)
    model.to(dtype).save_pretrained(folder, **save)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session", params=list(KINDS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of each kind in turn; read-only."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tied Llama checkpoint folder; read-only."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama-tied")


@pytest.fixture
def tokens() -> NDArray[np.int64]:
    """[6, 20] random token ids."""
    return np.random.default_rng(3).integers(3, VOCABULARY, size=(6, 20))
