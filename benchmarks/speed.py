"""Dense against pruned: latencies in alternating rounds, beside the speed-up that the removed work allows.

    python benchmarks/speed.py OUT [--prompt-tokens 128] [--new-tokens 64] [--repeats 15] [--json FILE]

OUT is a folder that `nirvana-deploy prune-export` made, with its dense baseline. Shares of the bound are
set beside the promises: 0.9 for decode, 0.8 for prefill. Exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nirvana_deploy.base.artifact import write_json
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.measure.benchmark import Variant, benchmark, variant_from_folder
from nirvana_deploy.measure.recipe import Workload
from nirvana_deploy.model.families import shape_from_config
from nirvana_deploy.prune.plan import dense_shape
from nirvana_deploy.prune.plan_file import read_plan

SHARE_OF_BOUND_PROMISES = {"tpot": 0.9, "prefill": 0.8}


def variants_of(out: Path) -> tuple[Variant, Variant]:
    """The dense and the pruned variant of an output folder; plan.json knows the dense widths."""
    pruned = shape_from_config(read_json(out / "checkpoint" / "config.json"))
    dense = dense_shape(pruned, read_plan(out / "plan.json"))
    return (
        variant_from_folder("dense", out / "dense" / "onnx", dense),
        variant_from_folder("pruned", out / "onnx", pruned),
    )


def print_table(result: Mapping[str, Any]) -> None:
    """Latencies per variant, then each speed-up beside its bound."""
    environment, workload = result["environment"], result["workload"]
    print(
        f"{environment['cpu']}, {environment['threads']} threads, "
        f"{environment['memory_bandwidth_gb_per_s']:.1f} GB/s read bandwidth, "
        f"load {environment['load_average_1min']}; {workload['prompt_tokens']} + {workload['new_tokens']} "
        f"tokens, batch {workload['batch_size']}, {workload['repeats']} rounds"
    )
    print(f"{'':8}{'prefill ms':>22}{'TTFT ms':>10}{'TPOT ms':>20}{'GB/s':>7}{'GFLOP/s':>9}{'peak MB':>9}")
    for v in result["variants"]:
        prefill, tpot = (
            f"{m['p50']:.2f} ({m['min']:.1f}-{m['max']:.1f})" for m in (v["prefill_ms"], v["tpot_ms"])
        )
        print(
            f"{v['name']:8}{prefill:>22}{v['ttft_ms']['p50']:>10.2f}{tpot:>20}"
            f"{v['achieved_gb_per_s']:>7.1f}{v['achieved_gflop_per_s']:>9.1f}"
            f"{v['peak_rss_bytes'] / 1e6:>9.0f}"
        )
    (comparison,) = result["comparisons"]
    for metric, promise in SHARE_OF_BOUND_PROMISES.items():
        low, high = comparison[f"{metric}_speedup_p10_p90"]
        print(
            f"{metric:8}{comparison[f'{metric}_speedup']:.3f}x (p10-p90 {low:.3f}-{high:.3f}), "
            f"bound {comparison[f'bound_{metric}_speedup']:.3f}x, "
            f"share {comparison[f'{metric}_share_of_bound']:.3f} (promise {promise})"
        )


def main() -> None:
    """Measure, print the table, and say whether the promises hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
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
    result = benchmark(variants_of(options.out), workload=workload)
    print_table(result)
    if options.json:
        write_json(options.json, result)
    (comparison,) = result["comparisons"]
    kept = all(
        comparison[f"{metric}_share_of_bound"] >= promise
        for metric, promise in SHARE_OF_BOUND_PROMISES.items()
    )
    print("Promises kept." if kept else "A promise is broken.")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
