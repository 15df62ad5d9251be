"""Cards of the folders of a run, from its records; and of an ONNX folder that stands alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import claim, write_bytes
from nirvana_deploy.base.ownership.marker import CARD, MARKER, marked_names
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.base.units import format_number, format_share
from nirvana_deploy.calibrate.texts import known_sources
from nirvana_deploy.model.text.source_card import legal_files
from nirvana_deploy.output import stage
from nirvana_deploy.output.kinds.speculative import SpeculativeRecord
from nirvana_deploy.output.layout import (
    CHECKPOINT,
    OPENVINO,
    SPECULATIVE,
    SPECULATIVE_FILE,
    is_seq2seq,
    is_speculative,
)
from nirvana_deploy.output.records import Records, read_records
from nirvana_deploy.output.results import Exported
from nirvana_deploy.output.variants import DENSE, PRUNED, ModelVariant, variants_in
from nirvana_deploy.report.cards.card import Card, Source, card_text
from nirvana_deploy.report.cards.packages import package_card
from nirvana_deploy.report.cards.snippets import checkpoint_snippets, looks_up_codes, onnx_snippets
from nirvana_deploy.report.facts import Facts, encoder_decoder
from nirvana_deploy.report.findings import headline
from nirvana_deploy.report.pages import quality
from nirvana_deploy.report.pages.recovery import recovery_of
from nirvana_deploy.report.table import Table, baseline_of, summary_table
from nirvana_deploy.report.verdict import judged

_OWN_SHAPE = (
    "Its layers have widths of their own. transformers, 5.14 or newer, builds them with the module in this "
    "folder; programs that know one shape for all layers do not load it."
)
_GENAI = "onnxruntime-genai needs version 0.15: older ones read one number of KV heads for all layers."
_OPENVINO = "OpenVINO does not load it: its embedding is looked up in 4- or 8-bit codes."
_LOSS = (
    "Pruning and quantization lose most on text unlike that of the calibration: try it on your own text "
    "before you rely on it."
)
_BASE = "Limits, biases and intended uses are those of the model that it was made from; see its card."

_SHARE = re.compile(r"[0-9.e-]+")


def write_cards(out: Path, *, progress: Progress = SILENT) -> None:
    """Write the card of each folder of the output folder ``out`` that people publish."""
    records = read_records(out)
    for folder, card in cards_of(out, records):
        write_card(folder, card, progress=progress)


def write_card(folder: Path, card: Card, *, progress: Progress = SILENT) -> None:
    """Write ``card`` into a folder of this tool, unless a card of somebody's own is there."""
    if os.path.lexists(folder / CARD) and CARD not in marked_names(folder):
        progress.note(f"{folder / CARD} stays as it is: it is not this tool's, or was taken over")
        return
    claim(folder, (CARD,))
    write_bytes(folder / CARD, card_text(card).encode())


def cards_of(out: Path, records: Records) -> Iterator[tuple[Path, Card]]:
    """The checkpoint and the ONNX folders that stages of this tool made, each with its card."""
    stages = records.stages()
    if stage.CHECKPOINT in stages and (out / CHECKPOINT / MARKER).is_file():
        yield out / CHECKPOINT, _checkpoint(out, records)
    for variant in variants_in(stages):
        if (out / variant.folder / MARKER).is_file():
            yield out / variant.folder, _onnx(out, records, variant)
    for name in (OPENVINO, SPECULATIVE):
        if name in stages and (out / name / MARKER).is_file():
            yield out / name, card_of_package(out, records, out / name)


def card_of_package(out: Path, records: Records, folder: Path) -> Card:
    """The card of ``folder``, made from models of the output folder ``out``."""
    name = PRUNED
    if is_speculative(folder):
        name = read_json(folder / SPECULATIVE_FILE, SpeculativeRecord)["target"]
    found = {variant.name: variant for variant in variants_in(records.stages())}
    if name not in found:  # a target from elsewhere
        return package_card(card_alone(folder, model=(records.manifest or {}).get("model") or {}), folder)
    return package_card(_onnx(out, records, found[name]), folder)


def card_alone(folder: Path, *, model: Mapping[str, Any], dtype: str | None = None) -> Card:
    """The card of an ONNX folder outside of any run, made from ``model``, a manifest's record of one."""
    scheme = _scheme_of(folder)
    source = Source.of(model)
    return Card(
        title=source.name,
        source=source,
        form="onnx",
        pruned=False,
        encoder_decoder=is_seq2seq(folder),
        intro=(_exported_as(scheme),),
        recipe=(("Weights", dtype),) if dtype else (),
        snippets=onnx_snippets(folder, dtype=dtype),
        limits=(*_onnx_limits(folder), "Neither its quality nor its speed was measured.", _BASE),
        legal_files=tuple(file.name for file in legal_files(folder)),
        scheme=scheme,
    )


def _scheme_of(folder: Path) -> str | None:
    record = folder / "quantization.json"
    return str(read_json(record)["scheme"]) if record.is_file() else None


def _checkpoint(out: Path, records: Records) -> Card:
    folder, seq2seq = out / CHECKPOINT, encoder_decoder(records)
    own = (_OWN_SHAPE,) if (folder / "modeling_nirvana.py").is_file() else ()
    card = _measured(_started(records, PRUNED), records, PRUNED)
    return replace(
        card,
        form="checkpoint",
        snippets=checkpoint_snippets(folder, encoder_decoder=seq2seq),
        limits=(*card.limits, *own, _LOSS, _BASE),
        legal_files=tuple(file.name for file in legal_files(folder)),
        measured_says=f"{card.measured_says} Measured on its ONNX export." if card.measured_says else "",
    )


def _onnx(out: Path, records: Records, variant: ModelVariant) -> Card:
    folder = out / variant.folder
    exported = records.result(stage.DENSE_ONNX if variant.dense else stage.ONNX, Exported)
    card = _measured(_started(records, DENSE if variant.dense else PRUNED), records, variant.name)
    facts: list[tuple[str, str]] = []
    if exported is not None:
        facts.append(("Export", f"ONNX, opset {exported.opset}, {exported.dtype}, flavor {exported.flavor}"))
    if variant.scheme:
        facts.append(("Quantization", variant.scheme))
    dtype = None if exported is None else exported.dtype
    lossy = (_LOSS,) if card.pruned or variant.scheme else ()
    return replace(
        card,
        title=f"{card.title}, ONNX" + (f", {variant.scheme}" if variant.scheme else ""),
        intro=(*card.intro, _exported_as(variant.scheme)),
        recipe=(*card.recipe, *facts),
        snippets=onnx_snippets(folder, dtype=dtype),
        limits=(*card.limits, *_onnx_limits(folder), *lossy, _BASE),
        legal_files=tuple(file.name for file in legal_files(folder)),
        scheme=variant.scheme,
    )


def _exported_as(scheme: str | None) -> str:
    return f"Exported to ONNX and quantized as {scheme}." if scheme else "Exported to ONNX."


def _onnx_limits(folder: Path) -> Iterator[str]:
    if (folder / "genai_config.json").is_file():
        yield _GENAI
    if looks_up_codes(folder):
        yield _OPENVINO


def _started(records: Records, of: str) -> Card:
    """What all folders of the pruned, or of the dense, model have in common."""
    source = Source.of((records.manifest or {}).get("model") or {})
    pruned = of == PRUNED and records.plan is not None
    share = ((records.plan or {}).get("budget") or {}).get("met_removed_share")
    title = f"{source.name} pruned by {share:.0%}" if pruned and share is not None else source.name
    return Card(
        title=title,
        source=source,
        form="onnx",
        pruned=pruned,
        encoder_decoder=encoder_decoder(records),
        intro=(headline(records),) if pruned else (),
        recipe=_recipe(records) if pruned else (),
        snippets=(),
        limits=(),
        legal_files=(),
    )


def _recipe(records: Records) -> Facts:
    """How the cut was made, without the names of the author's files."""
    plan = records.plan or {}
    budget, calibration = plan.get("budget"), plan.get("calibration") or {}
    facts: list[tuple[str, str]] = []
    if budget:
        asked, met = format_share(budget["asked_removed_share"]), f"{budget['met_removed_share']:.3%}"
        facts.append(("Removed", f"{met} of the linear weights; {asked} was asked for"))
    chosen = {"saliency": "Units chosen by", "allocation": "Shared among layers by", "gamma": "Gamma"}
    facts += [(label, str(plan[key])) for key, label in chosen.items() if plan.get(key) is not None]
    if calibration.get("num_sequences") and calibration.get("seq_len"):
        text = calibration_text(str(calibration.get("source") or ""))
        windows = f"{calibration['num_sequences']} windows of {calibration['seq_len']} tokens"
        facts.append(("Calibration", f"{windows}: {text}"))
    if plan.get("reconstruct"):
        facts.append(("Refit", "output projections, by least squares to the dense model's hidden states"))
    return (*facts, *_recovered(records))


def _recovered(records: Records) -> Facts:
    """How the cut was trained, and how far from the dense model it was before and after."""
    done = recovery_of(records)
    if done is None:
        return ()
    options = done.options
    method = options["recover_method"]
    led = method == "layers" or options.get("kl_weight", 1.0) or options.get("states_weight")
    how = "toward the dense model" if led and method != "full" else "by the next token"
    scheme = options.get("recover_for")
    rounded = f", rounded as in {scheme}" if scheme else ""
    minutes = (done.seconds + done.writing_seconds) / 60
    steps = options.get("recover_steps", 1)
    last = f", in the last of {steps} steps" if steps > 1 else ""
    course = (
        f"{done.tokens:,} tokens of {calibration_text(done.text)}, {minutes:,.1f} minutes, seed {done.seed}, "
        f"learning rate {done.learning_rate:g}{last}"
    )
    kl = {point.step: point.kl for point in done.curve}
    if done.kept_step:
        kept = f"{format_number(kl[0])} nats before, {format_number(kl[done.kept_step])} after"
    else:
        kept = f"{format_number(kl[0])} nats before; training made it no better, and the cut was kept"
    return (
        ("Recovery", f"{method}, {how}{rounded}"),
        ("Trained on", course),
        ("KL to dense on text set aside", kept),
    )


def calibration_text(source: str) -> str:
    """The source of the calibration text as the plan records it; a file of one's own is not named."""
    words = [word for word in source.replace(",", " ").split() if not _SHARE.fullmatch(word)]
    if not words:
        return "not recorded"
    return source if {"mix", "of", *known_sources()}.issuperset(words) else "a text of the author's own"


def _measured(card: Card, records: Records, name: str) -> Card:
    """``card`` with what was measured of the model ``name``, and what the rules say of it."""
    quality_section = quality.kinds(records)
    kinds = None if quality_section is None else _columns(quality_section, name)
    benchmark = records.benchmark or {}
    base = baseline_of(benchmark)
    found = [one for one in benchmark.get("variants") or () if one["name"] in {name, base and base["name"]}]
    limits = tuple(_judged(records, name))
    if not any(one["name"] == name for one in found):
        said = "Its speed was not measured." if kinds else "Neither its quality nor its speed was measured."
        return replace(card, kinds=kinds, limits=(*limits, said))
    table = summary_table({**benchmark, "variants": found})
    return replace(card, measured=table, measured_says=_where(benchmark), kinds=kinds, limits=limits)


def _columns(section: quality.Section, name: str) -> Table | None:
    """The columns of the dense model and of ``name`` in the table of kinds of text."""
    if name not in section.headers:
        return None
    models = dict.fromkeys(section.headers.index(one) for one in (DENSE, name) if one in section.headers)
    wanted = (0, 1, *models)
    rows = tuple(tuple(row[index] for index in wanted) for row in section.rows)
    return Table(tuple(section.headers[index] for index in wanted), rows)


def _where(benchmark: Mapping[str, Any]) -> str:
    """On what it was measured."""
    environment = benchmark.get("environment") or {}
    workload = benchmark.get("workload") or {}
    parts = [str(environment["cpu"])] if environment.get("cpu") else []
    parts += [f"{workload['threads']} threads"] if workload.get("threads") else []
    parts += [f"ONNX Runtime {environment['onnxruntime']}"] if environment.get("onnxruntime") else []
    return f"On {', '.join(parts)}." if parts else ""


def _judged(records: Records, name: str) -> Iterator[str]:
    for one in judged(records):
        if one.name == name and one.against:
            word = {"care": "Use it with care", "no": "By its maker's rules it does not ship"}.get(
                one.level, "Not known"
            )
            yield f"{word}: {'; '.join(one.against)}."
