"""Prove an ONNX folder against its checkpoint, in torch.

Below float32 the reference is the checkpoint rounded to the same dtype and computed in float32. The graph
and its stored weights, computed in float32 too, must equal it as closely as a float32 model equals its own
(``float32_twin.py``). Then the file runs as it is, unless in bfloat16, which ONNX Runtime's CPU cannot, and
may differ by what rounding explains (``tolerance.py``).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.export.dtypes import DTYPES, Dtype
from nirvana_deploy.model.checkpoint import config_json, load_tokenizer, read_config
from nirvana_deploy.model.config import context_tokens
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.model.text.stops import stop_ids
from nirvana_deploy.output.layout import DECODER_FILE, MODEL_FILE, is_seq2seq
from nirvana_deploy.runtime.genai import GenaiModel
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.onnxruntime.providers import open_on_cpu
from nirvana_deploy.runtime.runner import Runner
from nirvana_deploy.runtime.torch import open_checkpoint
from nirvana_deploy.verify.cases import (
    LONGEST_TOKENS,
    LONGEST_WINDOW_TOKENS,
    NEW_TOKENS,
    Continued,
    decoder_cases,
    encoder_decoder_cases,
    prompts_for,
)
from nirvana_deploy.verify.compare import Continuations, compare_texts, generator, logits_check
from nirvana_deploy.verify.departure import first_departure
from nirvana_deploy.verify.folder_check import check_folder
from nirvana_deploy.verify.report import GreedyCheck, LogitsCheck, TextCheck, VerifyReport
from nirvana_deploy.verify.tolerance import NARROWLY, RELATIVE_TOLERANCE
from nirvana_deploy.verify.tolerance import relative_tolerance as rounding_tolerance


def verify_onnx(
    checkpoint: Path,
    folder: Path,
    *,
    new_tokens: int = NEW_TOKENS,
    threads: int | None = None,
    relative_tolerance: float = RELATIVE_TOLERANCE,
    narrowly: float = NARROWLY,
    heard: Continued | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Compare the ONNX ``folder`` with the ``checkpoint`` folder; reads both, changes neither.

    Logits are compared at lengths, batches, paddings and pasts that the export knew nothing of; greedy tokens
    through ONNX Runtime and, if installed, onnxruntime-genai. ``relative_tolerance`` and ``narrowly`` are
    those of float32. A difference is a result, not an exception: see ``VerifyReport.require_passed``. Greedy
    tokens of ONNX Runtime go into ``heard``, unless the model had no room for all of them.
    Raises NirvanaError when one of the folders cannot be loaded or the ONNX file is not valid.
    """
    with progress.task(f"Verifying {folder.name}", 4) as advance:
        check_folder(folder, checkpoint)
        dtype = dtype_of_graph(folder)
        reference = open_checkpoint(checkpoint, rounded_to=dtype)
        runner = open_on_cpu(folder, threads=threads, in_float32=dtype.half_precision)
        _require_comparable(folder, reference, runner)
        advance(1)
        window_tokens = _window_to_look_beyond(checkpoint, progress)
        checks = logits_checks(
            reference, runner, relative_tolerance, narrowly=narrowly, window_tokens=window_tokens
        )
        tolerance, runs_as_it_is = relative_tolerance, dtype.name != "bf16"
        if dtype.half_precision:
            checks = [replace(check, name=f"in float32: {check.name}") for check in checks]
        if dtype.half_precision and runs_as_it_is:
            tolerance = rounding_tolerance(dtype, layers=attentions_of(checkpoint))
            runner = open_on_cpu(folder, threads=threads)
            checks += logits_checks(reference, runner, tolerance, window_tokens=window_tokens)
        advance(1)
        prompts = prompts_for(checkpoint, runner.vocab_size)
        if (room := _room(runner)) is not None:
            prompts = [prompt[:, : max(1, room // 2)] for prompt in prompts]
            new_tokens = min(new_tokens, room - max(prompt.shape[1] for prompt in prompts))
        stops = frozenset(stop_ids(checkpoint))
        found = list(map(generator(runner, new_tokens, stops), prompts))
        if heard is not None and new_tokens >= NEW_TOKENS:
            heard |= {
                tuple(prompt[0].tolist()): tuple(ids) for prompt, ids in zip(prompts, found, strict=True)
            }
        wanted = Continuations.by(reference, prompts, new_tokens=new_tokens, stops=stops, guesses=found)
        advance(1)
        runtime = "onnxruntime" if runs_as_it_is else "onnxruntime (in float32)"
        in_genai, text = _genai_checks(checkpoint, folder, wanted, tolerance, runs_as_it_is=runs_as_it_is)
        greedy = (wanted.compare(runtime, found, tolerance), in_genai)
        advance(1)
    report = VerifyReport(checks=tuple(checks), greedy=greedy, first_departure=None, text=text)
    if report.passed:
        return report
    where = first_departure(reference, folder, prompts[-1], tolerance=RELATIVE_TOLERANCE)
    return replace(report, first_departure=where)


def dtype_of_graph(folder: Path) -> Dtype:
    """The dtype of an ONNX folder: that of its decoder's cache. Reads the graph only, no weights."""
    path = folder / (DECODER_FILE if is_seq2seq(folder) else MODEL_FILE)
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {value.type.tensor_type.elem_type for value in graph.input if "past_key_values" in value.name}
    return next((dtype for dtype in DTYPES.values() if int(dtype.ir) in kinds), DTYPES["fp32"])


def attentions_of(folder: Path) -> int:
    """Attentions of the model in ``folder``, each with what lies around it: how deep roundings pile up."""
    return len(shape_from_config(config_json(folder)).layers)


def logits_checks(
    reference: Runner,
    runner: OrtDecoder | OrtSeq2Seq,
    tolerance: float,
    *,
    narrowly: float | None = None,
    window_tokens: int | None = None,
) -> list[LogitsCheck]:
    """Compare a graph with its checkpoint in every case that it can be asked; see ``logits_check``.

    ``window_tokens`` is a window to look beyond, of layers that have one.
    """
    if runner.start_token is not None:
        cases = encoder_decoder_cases(runner.vocab_size)
    else:
        left_padding = not (runner.last_logits and runner.in_place)
        cases = decoder_cases(runner.vocab_size, left_padding=left_padding, window_tokens=window_tokens)
        if (room := _room(runner)) is not None:
            cases = (case for case in cases if case.tokens.shape[1] + case.answer.shape[1] <= room)
    return [logits_check(case, reference, runner, tolerance, narrowly=narrowly) for case in cases]


def _window_to_look_beyond(checkpoint: Path, progress: Progress) -> int | None:
    """The widest window of layers that see less than the context, unless every case is longer; says aloud
    where it is too wide for a comparison."""
    config = read_config(checkpoint)
    family = shape_from_config(config_json(checkpoint)).family
    if family.computation is None:
        return None
    windows = [layer.window for layer in family.computation(config).layers if layer.window is not None]
    context = context_tokens(config) or 0
    widest = max((window for window in windows if window < context), default=0)
    if widest > LONGEST_WINDOW_TOKENS:
        progress.note(f"Layers see the last {widest:,} tokens: no comparison is longer")
    return widest if LONGEST_TOKENS // 2 <= widest <= LONGEST_WINDOW_TOKENS else None


def _room(runner: OrtDecoder | OrtSeq2Seq) -> int | None:
    """Tokens that fit, prompt and answer together; None where there is no end."""
    limits = [runner.max_tokens, runner.context_tokens] if isinstance(runner, OrtDecoder) else []
    return min((limit for limit in limits if limit is not None), default=None)


def _require_comparable(folder: Path, reference: Runner, runner: OrtDecoder | OrtSeq2Seq) -> None:
    """Raise NirvanaError for another vocabulary, or a cache without room for the comparisons."""
    if runner.max_tokens is not None and runner.max_tokens < LONGEST_TOKENS:
        raise NirvanaError(
            f"{folder} has a cache of {runner.max_tokens} tokens; verifying needs {LONGEST_TOKENS}.",
            hint=f"Export it with --cache-length {LONGEST_TOKENS} or more to verify the graph.",
        )
    if runner.vocab_size != reference.vocab_size:
        raise NirvanaError(
            f"{folder} has a vocabulary of {runner.vocab_size}, its checkpoint {reference.vocab_size}."
        )


def _genai_checks(
    checkpoint: Path, folder: Path, wanted: Continuations, tolerance: float, *, runs_as_it_is: bool
) -> tuple[GreedyCheck, tuple[TextCheck, ...]]:
    """Greedy tokens of onnxruntime-genai, and whether it makes the same ids of texts, if it can be asked."""
    if (reason := _genai_unasked(folder, runs_as_it_is=runs_as_it_is)) is not None:
        not_run = GreedyCheck("onnxruntime-genai", 0, wanted.new_tokens, 0, 0, passed=True, not_run=reason)
        return not_run, ()
    model = GenaiModel(folder)
    found = [model.generate(prompt, wanted.new_tokens) for prompt in wanted.prompts]
    greedy = wanted.compare("onnxruntime-genai", found, tolerance)
    if not (checkpoint / "tokenizer_config.json").is_file():
        return greedy, ()
    return greedy, (compare_texts("onnxruntime-genai", load_tokenizer(checkpoint), model.encoder()),)


def _genai_unasked(folder: Path, *, runs_as_it_is: bool) -> str | None:
    """Why onnxruntime-genai is not asked."""
    if is_seq2seq(folder):
        return "onnxruntime-genai 0.18 runs no T5: Whisper and Marian are its only encoder-decoders"
    if not runs_as_it_is:
        return "ONNX Runtime has no bfloat16 arithmetic on the CPU"
    if not (folder / "genai_config.json").is_file():
        return "the folder has no genai_config.json: this flavor is not for onnxruntime-genai"
    if find_spec("onnxruntime_genai") is None:
        return "onnxruntime-genai is not installed (the extra 'genai')"
    if not (folder / "tokenizer.json").is_file():
        return "the folder has no tokenizer.json, which onnxruntime-genai needs"
    return None
