"""The models of an output folder in several runtimes: prefill and decode in alternating rounds.

    python benchmarks/runtimes.py OUT [--runtime NAME ...] [--model NAME ...] [--repeats 15] [--json FILE]

NAME of a runtime is one that runs ONNX folders [onnxruntime-cpu, openvino-cpu]; of a model one of the
folder's: dense, pruned, pruned-int8, ... [all]. Every model in every runtime is one variant, and
all of them take turns; ratios are to the first model in the first runtime.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.benchmark import Variant, benchmark, variant_from_folder
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import variants_of
from nirvana_deploy.prune.plan_file import shape_of
from nirvana_deploy.runtime.table import RUNTIMES

RUNTIMES_MEASURED = ("onnxruntime-cpu", "openvino-cpu")


def measured(out: Path, runtimes: Sequence[str], models: Sequence[str]) -> Iterator[Variant]:
    """One variant for each of the ``models`` [all] of ``out`` in each runtime."""
    run = Run(out, read_json(out / MANIFEST))
    for model in variants_of(run):
        for runtime in runtimes:
            if not models or model.name in models:
                yield variant_from_folder(
                    f"{model.name} in {runtime}",
                    out / model.folder,
                    shape_of(out, model),
                    float_arithmetic=model.scheme is None,
                    runtime=runtime,
                )


def print_table(result: Mapping[str, Any]) -> None:
    """Medians of each variant, then how much faster it is than the first, with the interval of each ratio."""
    environment, workload = result["environment"], result["workload"]
    print(
        f"{environment['cpu']}, {environment['threads']} threads, load {environment['load_average_1min']}; "
        f"{workload['prompt_tokens']} + {workload['new_tokens']} tokens, {workload['repeats']} rounds"
    )
    compared = {one["variant"]: one for one in result["comparisons"]}
    print(f"{'':34}{'prefill ms':>12}{'TPOT ms':>10}{'peak MB':>9}   faster: prefill, decode")
    for variant in result["variants"]:
        name, ratios = variant["name"], ""
        if name in compared:
            for metric in ("prefill", "tpot"):
                ratios += f"{compared[name][f'{metric}_speedup']:>10.2f}"
        print(
            f"{name:34}{variant['prefill_ms']['p50']:>12.1f}{variant['tpot_ms']['p50']:>10.2f}"
            f"{variant['peak_rss_bytes'] / 1e6:>9.0f}{ratios}"
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_onnx = [name for name, row in RUNTIMES.items() if row.takes == "onnx"]
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--runtime", action="append", choices=on_onnx, metavar="NAME")
    parser.add_argument("--model", action="append", default=[], metavar="NAME")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    workload = Workload(
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        threads=options.threads,
    )
    variants = list(measured(options.out, options.runtime or RUNTIMES_MEASURED, options.model))
    if not variants:
        parser.error(f"{options.out} has no model of these: {', '.join(options.model)}")
    result = benchmark(variants, workload=workload, baseline=variants[0].name)
    print_table(result)
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
