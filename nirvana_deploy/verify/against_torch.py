"""Prove an ONNX folder against the checkpoint that it was exported from.

Logits are compared at lengths, batches, paddings and pasts that the export knew nothing of; greedy tokens
are compared through ONNX Runtime and, where it is installed, onnxruntime-genai. When logits differ, the
hidden states are compared layer by layer, and the first one that departs is named.

Below float32 the reference is the checkpoint rounded to the same dtype and computed in float32, and two
things are shown. The graph and its stored weights, computed in float32 too, must equal it as closely as a
float32 model equals its own (``float32_twin.py``). Then the file runs as it is, where ONNX Runtime's CPU can
(float16; bfloat16 has no arithmetic there, and the report says that it was not run), and may differ by what
rounding explains: see :func:`logits.relative_tolerance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.decoder import hidden_state_name
from nirvana_deploy.export.dtypes import DTYPES, Dtype
from nirvana_deploy.model.checkpoint import load_checkpoint, load_tokenizer, stop_token_ids
from nirvana_deploy.output.layout import MODEL_FILE, is_seq2seq
from nirvana_deploy.runtime.genai import genai_tokens
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder, session_outputs
from nirvana_deploy.verify.folder_check import check_folder
from nirvana_deploy.verify.tolerance import (
    RELATIVE_TOLERANCE,
    LogitsCheck,
    logits_checks,
    relative_tolerance,
    torch_logits,
)

_LONGEST_TOKENS = 64
"""Of the comparisons, prompts and answers included."""

PROMPTS = (
    "The capital of France is",
    "To make a good cup of coffee, you",
    "def fibonacci(n):",
    "Once upon a time, in a small village by the sea,",
    "The three laws of thermodynamics say that",
)


@dataclass(frozen=True)
class GreedyCheck:
    """Greedy continuations of the same prompts by another runtime."""

    runtime: str
    prompts: int
    new_tokens: int
    equal_prompts: int
    ties: int
    """Prompts that parted where the two best logits were closer than the tolerance; they count as equal."""
    passed: bool
    not_run: str | None = None
    """Why this runtime was not asked, when it was not."""


@dataclass(frozen=True)
class VerifyReport:
    """Everything that was compared, and the verdict."""

    checks: tuple[LogitsCheck, ...]
    greedy: tuple[GreedyCheck, ...]
    first_departure: str | None
    """Where the two first differ, when they do: "layer 3", "encoder layer 3" or "final norm or head"."""

    @property
    def passed(self) -> bool:
        """Whether every comparison that was run passed."""
        return all(check.passed for check in self.checks) and all(check.passed for check in self.greedy)

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "passed": self.passed}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> VerifyReport:
        """What :meth:`to_json` wrote."""
        return cls(
            checks=tuple(LogitsCheck(**check) for check in data["checks"]),
            greedy=tuple(GreedyCheck(**check) for check in data["greedy"]),
            first_departure=data["first_departure"],
        )

    def require_passed(self, folder: Path, *, against: str = "its checkpoint") -> None:
        """Raise VerificationError (exit code 3) that names what failed and where it starts."""
        if self.passed:
            return
        failed = [
            f"{check.name}: logits differ by {check.max_abs_diff:.2e} (allowed {check.tolerance:.2e})"
            for check in self.checks
            if not check.passed
        ] + [
            f"{check.runtime}: {check.prompts - check.equal_prompts - check.ties} of {check.prompts} prompts "
            "continue differently"
            for check in self.greedy
            if not check.passed
        ]
        where = f" The first departure is at: {self.first_departure}." if self.first_departure else ""
        raise VerificationError(
            f"{folder} does not compute what {against} computes. {'; '.join(failed)}.{where}",
            hint="The artifacts are kept. 'nirvana-deploy doctor' lists the versions in use.",
        )


def verify_onnx(
    checkpoint: Path,
    folder: Path,
    *,
    new_tokens: int = 32,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare the ONNX ``folder`` with the ``checkpoint`` folder; reads both, changes neither.

    A difference is a result, not an exception: see ``VerifyReport.require_passed``. Raises NirvanaError
    when one of the folders cannot be loaded or the ONNX file is not valid.
    """
    if is_seq2seq(folder):
        from nirvana_deploy.verify import against_torch_seq2seq

        return against_torch_seq2seq.verify_seq2seq(
            checkpoint, folder, new_tokens=new_tokens, threads=threads, progress=progress
        )
    with progress.task(f"Verifying {folder.name}", 4) as advance:
        check_folder(folder, checkpoint)
        dtype = dtype_of_graph(folder / MODEL_FILE)
        model = _reference(checkpoint, dtype)
        decoder = OrtDecoder(folder, threads=threads, in_float32=dtype.half_precision)
        if decoder.max_tokens is not None and decoder.max_tokens < _LONGEST_TOKENS:
            raise NirvanaError(
                f"{folder} has a cache of {decoder.max_tokens} tokens; verifying needs {_LONGEST_TOKENS}.",
                hint=f"Export it with --cache-length {_LONGEST_TOKENS} or more to verify the graph.",
            )
        if decoder.vocab_size != model.config.vocab_size:
            raise NirvanaError(
                f"{folder} has a vocabulary of {decoder.vocab_size}, "
                f"its checkpoint {model.config.vocab_size}."
            )
        advance(1)
        checks = tuple(logits_checks(model, decoder, RELATIVE_TOLERANCE))
        tolerance, runs_as_it_is = RELATIVE_TOLERANCE, dtype.name != "bf16"
        if dtype.half_precision:
            checks = tuple(replace(check, name=f"in float32: {check.name}") for check in checks)
        if dtype.half_precision and runs_as_it_is:
            tolerance = relative_tolerance(dtype, layers=len(decoder.kv_heads))
            decoder = OrtDecoder(folder, threads=threads)
            checks += tuple(logits_checks(model, decoder, tolerance))
        advance(1)
        prompts = prompts_for(checkpoint, decoder.vocab_size)
        if decoder.max_tokens is not None:
            longest = max(prompt.shape[1] for prompt in prompts)
            new_tokens = min(new_tokens, decoder.max_tokens - longest)
        stops = stop_token_ids(model.config)
        expected = [_torch_tokens(model, prompt, new_tokens, stops) for prompt in prompts]
        advance(1)
        oracle = _Oracle(
            model=model,
            prompts=prompts,
            continuations=expected,
            new_tokens=new_tokens,
            relative_tolerance=tolerance,
        )
        runtime = "onnxruntime" if runs_as_it_is else "onnxruntime (in float32)"
        greedy = (
            oracle.compare(runtime, lambda prompt: _ort_tokens(decoder, prompt, new_tokens, stops)),
            _genai_check(folder, oracle, runs_as_it_is=runs_as_it_is),
        )
        advance(1)
    report = VerifyReport(checks=checks, greedy=greedy, first_departure=None)
    if report.passed:
        return report
    return replace(report, first_departure=_first_departure(model, folder, prompts[-1]))


def dtype_of_graph(path: Path) -> Dtype:
    """The dtype of an ONNX decoder: that of its KV cache. Reads the graph only, no weights."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {value.type.tensor_type.elem_type for value in graph.input if "past_key_values" in value.name}
    return next((dtype for dtype in DTYPES.values() if int(dtype.ir) in kinds), DTYPES["fp32"])


def _reference(checkpoint: Path, dtype: Dtype) -> PreTrainedModel:
    """The checkpoint in float32, after rounding to ``dtype`` what the graph stores or casts to it."""
    if not dtype.half_precision:
        return load_checkpoint(checkpoint)
    model = load_checkpoint(checkpoint, dtype=dtype.torch).float()

    def rounded(_module: Any, _inputs: Any, angles: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(angle.to(dtype.torch).float() for angle in angles)

    model.model.rotary_emb.register_forward_hook(rounded)
    return model


def prompts_for(checkpoint: Path, vocab_size: int) -> list[NDArray[np.int64]]:
    """Token ids [1, T] of the prompts; random ids where the folder has no tokenizer."""
    if not (checkpoint / "tokenizer_config.json").is_file():
        generator = np.random.default_rng(5)
        return [generator.integers(0, vocab_size, size=(1, 6)) for _ in PROMPTS]
    tokenizer = load_tokenizer(checkpoint)
    return [np.array([tokenizer(prompt)["input_ids"]], dtype=np.int64) for prompt in PROMPTS]


def _torch_tokens(
    model: PreTrainedModel, prompt: NDArray[np.int64], new_tokens: int, stops: frozenset[int]
) -> list[int]:
    """Greedy continuation by transformers, up to the first stop token, which is left out."""
    cache: Any = None
    tokens, new_ids = torch.from_numpy(prompt), []
    with torch.no_grad():
        for _ in range(new_tokens):
            output = model(tokens, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            tokens = output.logits[:, -1:].argmax(-1)
            if int(tokens) in stops:
                break
            new_ids.append(int(tokens))
    return new_ids


def _ort_tokens(
    decoder: OrtDecoder, prompt: NDArray[np.int64], new_tokens: int, stops: frozenset[int]
) -> list[int]:
    """The same by ONNX Runtime."""
    new_ids = decoder.generate(prompt, max_new_tokens=new_tokens, eos_token_ids=stops)
    return new_ids[:-1] if new_ids[-1] in stops else new_ids


@dataclass(frozen=True)
class _Oracle:
    """What torch says about the prompts."""

    model: PreTrainedModel
    prompts: list[NDArray[np.int64]]
    continuations: list[list[int]]
    """Greedy ids up to the first stop token, which is left out."""
    new_tokens: int
    relative_tolerance: float

    def compare(self, runtime: str, generate: Callable[[NDArray[np.int64]], list[int]]) -> GreedyCheck:
        """Ask another runtime to continue every prompt and compare token by token."""
        equal = ties = 0
        for prompt, wanted in zip(self.prompts, self.continuations, strict=True):
            found = generate(prompt)
            if found == wanted:
                equal += 1
            else:
                ties += self._parted_at_a_tie(prompt, wanted, found)
        return GreedyCheck(
            runtime=runtime,
            prompts=len(self.prompts),
            new_tokens=self.new_tokens,
            equal_prompts=equal,
            ties=ties,
            passed=equal + ties == len(self.prompts),
        )

    def _parted_at_a_tie(self, prompt: NDArray[np.int64], wanted: list[int], found: list[int]) -> bool:
        """Whether the continuations part where torch itself sees both tokens as equally likely."""
        pairs = enumerate(zip(wanted, found, strict=False))
        at = next((index for index, (a, b) in pairs if a != b), None)
        if at is None:
            return False  # one is shorter: no tie explains that
        context = np.concatenate([prompt, np.array([wanted[:at]], dtype=np.int64)], axis=1)
        last = torch_logits(self.model, context)[0, -1]
        return bool(abs(last[wanted[at]] - last[found[at]]) <= self.relative_tolerance * np.abs(last).max())


def _genai_check(folder: Path, oracle: _Oracle, *, runs_as_it_is: bool) -> GreedyCheck:
    reason = None
    if not runs_as_it_is:
        reason = "ONNX Runtime has no bfloat16 arithmetic on the CPU"
    elif not (folder / "genai_config.json").is_file():
        reason = "the folder has no genai_config.json: this flavor is not for onnxruntime-genai"
    elif find_spec("onnxruntime_genai") is None:
        reason = "onnxruntime-genai is not installed (pip install 'nirvana-deploy[genai]')"
    elif not (folder / "tokenizer.json").is_file():
        reason = "the folder has no tokenizer.json, which onnxruntime-genai needs"
    if reason:
        return GreedyCheck("onnxruntime-genai", 0, oracle.new_tokens, 0, 0, passed=True, not_run=reason)
    with genai_tokens(folder) as generate:
        return oracle.compare("onnxruntime-genai", lambda prompt: generate(prompt, oracle.new_tokens))


def _first_departure(model: PreTrainedModel, folder: Path, tokens: NDArray[np.int64]) -> str:
    """Where hidden states first differ by more than the tolerance, going down the layers."""
    layers = model.model.layers
    names = [hidden_state_name(index) for index in range(len(layers))]
    found = session_outputs(folder, tokens, names)
    with _recorded([model.model.embed_tokens, *layers]) as recorded:
        torch_logits(model, tokens)
    for index, (name, expected) in enumerate(zip(names, recorded[1:], strict=True)):
        difference = np.abs(found[name] - expected).max()
        if not difference <= RELATIVE_TOLERANCE * np.abs(expected).max():
            return f"layer {index}"
    return "final norm or head"


@contextmanager
def _recorded(modules: list[torch.nn.Module]) -> Iterator[list[NDArray[np.float32]]]:
    """Collect the outputs of ``modules`` in the order in which they run."""
    outputs: list[NDArray[np.float32]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.numpy()))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
