"""What the output folder of a cut says of a point, and how fast points are beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nirvana_deploy.base.errors import NirvanaError, VerificationError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.benchmark import benchmark, variant_from_folder
from nirvana_deploy.measure.gate import perplexity_ratios
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.measure.zero_shot.tasks import evaluate_tasks
from nirvana_deploy.output.layout import QUALITY_FILE
from nirvana_deploy.output.record_kinds import QualityRecord
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.stage import QUALITY, VERIFY
from nirvana_deploy.output.variants import DENSE, ModelVariant, variant_named
from nirvana_deploy.prune.plan_file import shape_of
from nirvana_deploy.quantize.stage import require_quantized
from nirvana_deploy.search.point import Found, Point, nothing_found
from nirvana_deploy.verify.stage import verified


def found_in(out: Path, folder: str, key: str, point: Point, *, failed: NirvanaError | None = None) -> Found:
    """What is known of a point whose models lie in the output folder ``out / folder``.

    ``failed`` is why the folder was not finished. Where that is a verification, each of its models is judged
    by its own.
    """
    found = nothing_found(key, point, folder)
    variant = found.variant
    if failed is not None and not isinstance(failed, VerificationError):
        return replace(found, failed=failed.message)
    with Run.open(out / folder) as cut:
        unverified = _unverified(cut, variant)
        judged = cut.has(QUALITY)
    record = read_json(out / folder / QUALITY_FILE, QualityRecord)["variants"] if judged else {}
    if variant.name not in record:
        why = unverified or (failed.message if failed else f"{folder} has no {variant.name}")
        return replace(found, failed=why)
    quality, dense = record[variant.name], record[DENSE]
    return replace(
        found,
        kl=quality.get("kl_vs_dense"),
        kl_standard_error=quality.get("kl_standard_error"),
        perplexity=quality.get("perplexity"),
        perplexity_ratio=max(perplexity_ratios(quality, dense).values(), default=None),
        weights_bytes=sum(file.stat().st_size for file in (out / folder / variant.folder).glob("*.onnx*")),
        unverified=unverified,
    )


def _unverified(cut: Run, variant: ModelVariant) -> str | None:
    """What was found wrong with a model, or with the one that it was quantized from."""
    of = variant.parent or variant.name
    try:
        if cut.has(VERIFY):
            verified(cut)[of].require_passed(cut.out / variant_named(of).folder, of_input=of == DENSE)
        if variant.scheme is not None and cut.has(variant.stage):
            require_quantized(cut, variant.scheme, of=of)
    except VerificationError as error:
        return error.message
    return None


def timed_points(
    out: Path, points: Sequence[Found], workload: Workload, *, progress: Progress = SILENT
) -> tuple[list[Found], dict[str, Any]]:
    """Time points in one alternating run, the float dense model among them; also returns benchmark.json."""
    variants = [
        variant_from_folder(
            one.name,
            out / one.folder / one.variant.folder,
            shape_of(out / one.folder, one.variant),
            float_arithmetic=one.scheme is None,
        )
        for one in points
    ]
    record = benchmark(variants, workload=workload, baseline=DENSE, progress=progress)
    gains = {one["variant"]: one for one in record["comparisons"]}
    timed = []
    for variant, one in zip(record["variants"], points, strict=True):
        variant["path"] = f"{one.folder}/{one.variant.folder}"
        gain = gains.get(one.name, {"tpot_speedup": 1.0, "tpot_speedup_interval": {"low": 1.0, "high": 1.0}})
        between = gain["tpot_speedup_interval"]
        timed.append(
            replace(
                one,
                tpot_ms=variant["tpot_ms"]["p50"],
                speedup=gain["tpot_speedup"],
                speedup_interval=(between["low"], between["high"]),
            )
        )
    return timed, record


def points_on_tasks(
    out: Path,
    points: Sequence[Found],
    tasks: Sequence[str],
    *,
    limit: int | None,
    progress: Progress = SILENT,
) -> tuple[list[Found], dict[str, Any]]:
    """Zero-shot accuracy of points, the dense model first; also returns tasks.json."""
    models = {one.name: out / one.folder / one.variant.folder for one in points}
    record = evaluate_tasks(models, tasks, limit=limit, progress=progress)
    means = record["means"]["variants"]
    return [
        replace(
            one,
            accuracy=means[one.name]["mean"],
            accuracy_standard_error=means[one.name]["standard_error"],
        )
        for one in points
    ], record
