"""Quality by kind of text, and what the models write, as tables with a column per variant."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from nirvana_deploy.base.units import format_number
from nirvana_deploy.output import stage
from nirvana_deploy.output.record_kinds import Quality
from nirvana_deploy.output.records import Records
from nirvana_deploy.output.results import AnswersWritten, QualityMeasured
from nirvana_deploy.output.variants import DENSE, PRUNED
from nirvana_deploy.report.pages.recovery import recovery_of
from nirvana_deploy.report.table import ABSENT, format_times

_NOTHING = "(nothing)"
_LEAST_TRIPLES, _DISTINCT = 6, 0.7


@dataclass(frozen=True)
class Section:
    """A sentence and a table, which may be empty."""

    says: str
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Written(Section):
    """What the models write, and a table of rates with a row for each of them."""

    rate_headers: tuple[str, ...] = ()
    rates: tuple[tuple[str, ...], ...] = ()


def kinds(records: Records) -> Section | None:
    """Section on perplexity and KL for each kind of text; None if they were not told apart."""
    record = records.result(stage.QUALITY, QualityMeasured)
    if record is None or not record.calibrated:
        return None
    rows: list[tuple[str, ...]] = []
    for kind, calibrated in record.calibrated.items():
        found = [variant.get("parts", {}).get(kind, {}) for variant in record.variants.values()]
        tokens = next((part["tokens"] for part in found if part.get("tokens")), 0)
        label = kind if calibrated else f"{kind}, not calibrated on"
        rows.append((f"{label}: {tokens:,} tokens", "perplexity", *_perplexities(found)))
        rows.append(("", "KL to dense", *(_kl(part) for part in found)))
    return Section(
        "Perplexity with its ratio to the first model, and KL in nats per token with its standard error",
        headers=("Text", "Measure", *record.variants),
        rows=tuple(rows),
    )


def _perplexities(found: Sequence[Quality]) -> Iterator[str]:
    first = found[0].get("perplexity") if found else None
    for index, part in enumerate(found):
        value = part.get("perplexity")
        ratio = f" ({format_times(value / first)})" if index and value and first else ""
        yield ABSENT if value is None else f"{format_number(value)}{ratio}"


def _kl(part: Quality) -> str:
    value, error = part.get("kl_vs_dense"), part.get("kl_standard_error")
    if value is None:
        return ABSENT
    return format_number(value) + (f" \N{PLUS-MINUS SIGN} {format_number(error, digits=2)}" if error else "")


def answers(records: Records) -> Written | None:
    """Section on what the models write; None if they were not asked."""
    record = records.result(stage.ANSWERS, AnswersWritten)
    if record is None:
        return None
    if record.skipped:
        return Written(f"Not asked: {record.skipped}")
    variants = _with_cut(records, record.variants)
    beside = dict.fromkeys(variants, DENSE)
    return written(record.prompts, variants, new_tokens=record.new_tokens, beside=beside)


def written(
    prompts: Sequence[str],
    variants: Mapping[str, Sequence[str]],
    *,
    new_tokens: int,
    beside: Mapping[str, str],
) -> Written:
    """Continuations of the prompts; ``beside`` names the dense model of each."""
    rows = [
        (prompt, *(_shown(text) for text in texts))
        for prompt, *texts in zip_longest(prompts, *variants.values(), fillvalue="")
    ]
    return Written(
        f"Greedy continuations of at most {new_tokens} tokens, unedited",
        headers=("Prompt", *variants),
        rows=tuple(rows),
        rate_headers=("Answers", "word for word as dense", "repeats itself"),
        rates=tuple(_rates(variants, beside)),
    )


def _rates(variants: Mapping[str, Sequence[str]], beside: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """How many answers of each model are the dense one's, and how many repeat themselves."""
    for name, texts in variants.items():
        dense = variants.get(beside[name])
        same = [one == other for one, other in zip(dense or (), texts, strict=False)]
        as_dense = ABSENT if name == beside[name] or dense is None else f"{sum(same)} of {len(same)}"
        yield name, as_dense, f"{sum(map(repeats, texts))} of {len(texts)}"


def repeats(text: str) -> bool:
    """Whether a text goes round in circles: fewer than seven tenths of its triples of words are distinct."""
    words = text.split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(triples) >= _LEAST_TRIPLES and len(set(triples)) < _DISTINCT * len(triples)


def _with_cut(records: Records, variants: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """The answers; in front of a recovered model's those of the cut before."""
    done = recovery_of(records)
    if done is None or not done.answers_of_cut:
        return dict(variants)
    found: dict[str, Sequence[str]] = {}
    for name, texts in variants.items():
        if name == PRUNED:
            found[f"{name}, before recovery"] = done.answers_of_cut
        found[name] = texts
    return found


def _shown(text: str) -> str:
    """A text without characters that no page may hold."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(one) == "Cc" and one not in "\n\t" else one
        for one in text or _NOTHING
    )
