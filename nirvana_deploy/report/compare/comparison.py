"""Finished folders side by side: a row for each model, and the one to take, by the rules of the verdict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from nirvana_deploy.measure.gate import perplexity_ratios
from nirvana_deploy.output import stage
from nirvana_deploy.output.record_kinds import Quality
from nirvana_deploy.output.results import AnswersWritten, QualityMeasured
from nirvana_deploy.output.variants import DENSE
from nirvana_deploy.report.compare.alike import Alike, Folder, alike
from nirvana_deploy.report.pages.quality import Written, written
from nirvana_deploy.report.table import ABSENT, Table, baseline_of, gain, median_of
from nirvana_deploy.report.verdict import Judged, Level, best_of, judged, reasons, verdict

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One model of one folder; None where something was not measured."""

    folder: str
    model: str
    variant: str
    sparsity: float | None
    """Share of the linear weights that was removed."""
    scheme: str | None
    weights_bytes: int | None
    kl: float | None
    """To the dense model, nats per token."""
    kl_standard_error: float | None
    perplexity_ratios: Mapping[str, float]
    """In times of dense's, by kind of text."""
    ttft_ms: float | None
    tpot_ms: float | None
    speedup: float | None
    """Of decoding, over the dense model of the same folder."""
    interval: tuple[float, float] | None
    shows_difference: bool | None
    level: Level | None
    """None for the dense model itself."""
    against: tuple[str, ...]
    take: bool = False

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.folder}: {self.variant}"


@dataclass(frozen=True)
class Comparison:
    """What the folders say together."""

    level: Level
    title: str
    why: str
    alike: Alike
    rows: tuple[Row, ...]
    recipe: Table
    """The options that differ, with a column for each folder."""
    answers: Written | None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "schema": SCHEMA,
            "level": self.level,
            "title": self.title,
            "why": self.why,
            "take": [{"folder": one.folder, "variant": one.variant} for one in self.rows if one.take],
            "comparable": asdict(self.alike),
            "rows": [asdict(one) for one in self.rows],
            "recipe": {
                option: dict(zip(self.recipe.headers[1:], values, strict=True))
                for option, *values in self.recipe.rows
            },
            "answers": None if self.answers is None else asdict(self.answers),
        }


def compare(folders: Sequence[Folder]) -> Comparison:
    """Set folders side by side; their labels differ."""
    common = alike(folders)
    of_base: dict[str, dict[str, Judged]] = {}
    for one in folders:
        named = {f"{one.label}: {found.name}": found for found in judged(one.records)}
        of_base.setdefault(one.base, {}).update(named)
    best = [_best(found) for found in of_base.values()]
    level, title, why = _decision(best, common)
    taken = {one.name for one in best if one is not None and one.level in ("ship", "care")}
    rows = tuple(replace(row, take=row.name in taken) for one in folders for row in _rows_of(one))
    return Comparison(level, title, why, common, rows, recipe_table(folders), _answers(folders))


def _best(found: Mapping[str, Judged]) -> Judged | None:
    """The one to take, under the name that has its folder."""
    return best_of([replace(one, name=name) for name, one in found.items()])


def _decision(best: Sequence[Judged | None], common: Alike) -> tuple[Level, str, str]:
    """Level, title and reason; one clause for each model that the folders begin with."""
    known = [one for one in best if one is not None]
    ships = [one for one in known if one.level in ("ship", "care")]
    if not known:
        return "open", "No verdict", "Quality was measured in none of the folders."
    if not ships:
        said = " ".join(f"The best of them, {one.name}: {'; '.join(one.against)}." for one in known)
        return "no", "Take none", said
    level: Level = "care" if any(one.level == "care" for one in ships) else "ship"
    names = " or ".join(one.name for one in ships)
    title = f"Take {names}" + (", with care" if level == "care" else "")
    why = [f"{one.name} is {reasons(one)}" for one in ships]
    if not common.one_model:
        why.append("Which of the models is the better one, KL does not tell: run the same tasks on both.")
    elif not common.quality:
        why.append("It is the best by the quality that its own folder measured, on a text of its own.")
    if not common.times:
        why.append("Speed-ups are over the dense model of the same folder.")
    return level, title, " ".join(why)


def _rows_of(folder: Folder) -> Iterator[Row]:
    records = folder.records
    benchmark = records.benchmark or {}
    baseline = baseline_of(benchmark)
    found = {one.name: one for one in judged(records)}
    budget = (records.plan or {}).get("budget") or {}
    for variant in benchmark.get("variants") or ():
        name = str(variant["name"])
        quality = quality_of(folder, variant)
        dense = quality_of(folder, baseline) if baseline else {}
        speed = gain(benchmark, variant, "tpot") if variant is not baseline else None
        verdict_of = found.get(name)
        yield Row(
            folder=folder.label,
            model=folder.model,
            variant=name,
            sparsity=0.0 if name.startswith(DENSE) else budget.get("met_removed_share"),
            scheme=name.partition("-")[2] or None,
            weights_bytes=variant.get("weights_bytes"),
            kl=quality.get("kl_vs_dense"),
            kl_standard_error=quality.get("kl_standard_error"),
            perplexity_ratios=perplexity_ratios(quality, dense),
            ttft_ms=median_of(variant, "ttft_ms"),
            tpot_ms=median_of(variant, "tpot_ms"),
            speedup=speed.speedup if speed else None,
            interval=speed.interval if speed else None,
            shows_difference=speed.shows_difference if speed else None,
            level=verdict_of.level if verdict_of else None,
            against=verdict_of.against if verdict_of else (),
        )


def quality_of(folder: Folder, variant: Mapping[str, Any]) -> Quality:
    """Quality as the stage of that name has it, kinds of text included, else as the benchmark has."""
    record = folder.records.result(stage.QUALITY, QualityMeasured)
    of_stage = record.variants.get(str(variant["name"]), {}) if record else {}
    return cast(Quality, {**(variant.get("quality") or {}), **of_stage})


def recipe_table(folders: Sequence[Folder]) -> Table:
    """The options that differ."""
    options = [(one.records.manifest or {}).get("options") or {} for one in folders]
    names = dict.fromkeys(name for found in options for name in found)
    rows = [
        (name.replace("_", "-"), *(_said(found, name) for found in options))
        for name in names
        if len({repr(found.get(name)) for found in options}) > 1
    ]
    return Table(("Option", *(one.label for one in folders)), tuple(rows))


def _said(options: Mapping[str, Any], name: str) -> str:
    value = options.get(name)
    if value is None or value == []:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _answers(folders: Sequence[Folder]) -> Written | None:
    """What each dense model writes, and of each folder the recommended one, else the first beside dense."""
    columns: dict[str, Mapping[str, str]] = {}
    beside: dict[str, str] = {}
    dense_of: dict[str, str] = {}
    tokens = 0
    for one in folders:
        record = one.records.result(stage.ANSWERS, AnswersWritten)
        if record is None or record.skipped:
            continue
        tokens = max(tokens, record.new_tokens)
        shown = verdict(one.records).recommended or next((n for n in record.variants if n != DENSE), DENSE)
        texts = {
            name: dict(zip(record.prompts, found, strict=False)) for name, found in record.variants.items()
        }
        dense = dense_of.setdefault(one.base, f"{one.label}: {DENSE}")
        if DENSE in texts:
            columns.setdefault(dense, texts[DENSE])
            beside[dense] = dense
        if shown != DENSE and shown in texts:
            columns[f"{one.label}: {shown}"] = texts[shown]
            beside[f"{one.label}: {shown}"] = dense
    if not columns:
        return None
    prompts = list(dict.fromkeys(prompt for found in columns.values() for prompt in found))
    variants = {name: [found.get(prompt, ABSENT) for prompt in prompts] for name, found in columns.items()}
    return written(prompts, variants, new_tokens=tokens, beside=beside)
