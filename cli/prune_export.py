"""``nirvana-deploy prune-export MODEL``: the whole job."""

from __future__ import annotations

from typing import Any

import click

from .common import (
    TerminalProgress,
    command_line,
    echo_json,
    echo_table,
    json_option,
    pruning_options,
    require_sparsity,
    threads_option,
)


@click.command("prune-export")
@click.argument("model")
@pruning_options
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Type of weights, activations and KV cache in the ONNX graphs.",
)
@click.option(
    "--flavor",
    type=click.Choice(["portable", "gqa"]),
    default="portable",
    show_default=True,
    help="Standard operators, or GroupQueryAttention of ONNX Runtime with a shared KV buffer.",
)
@click.option(
    "--baseline/--no-baseline",
    default=True,
    show_default=True,
    help="Export and measure the dense model too.",
)
@click.option(
    "--benchmark/--no-benchmark", "run_benchmark", default=True, show_default=True, help="Measure latency."
)
@click.option(
    "--quantize",
    multiple=True,
    type=click.Choice(["int8", "w8", "w4"]),
    help="Quantize the pruned model too, on the same calibration set; may be repeated. "
    "int8: weights and activations; w8, w4: weights alone.",
)
@click.option(
    "--quantize-head",
    is_flag=True,
    help="Quantize lm_head as well, and of w8 and w4 the embedding: a large part of a small model.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(["tensorrt-rtx", "tensorrt"]),
    help="Build float16 engines too, of dense, pruned and quantized models; may be repeated. tensorrt-rtx "
    "builds without a GPU. 'build-engine' has all options.",
)
@threads_option
@json_option
def prune_export(model: str, as_json: bool, **options: Any) -> None:
    """Prune MODEL, export it to ONNX, verify it, measure it against dense, write a report.

    MODEL is an alias ('nirvana-deploy models'), a hub id, a folder with safetensors, or a .gguf file.

    \b
    Examples:
      nirvana-deploy prune-export smollm2 --sparsity 0.4
      nirvana-deploy prune-export smollm2 --sparsity 0.2 --quantize int8 --quantize w4 --engine tensorrt-rtx
      nirvana-deploy prune-export ./my-llama --sparsity 0.3 --calib notes.txt --out my-llama-small
    """
    require_sparsity(options)
    from nirvana_deploy import pipeline
    from nirvana_deploy.report.table import format_seconds, summary_table

    done = pipeline.prune_export(model, command=command_line(), progress=TerminalProgress(), **options)
    if as_json:
        echo_json(
            {
                "out": str(done.out),
                "report": str(done.report),
                "manifest": done.manifest,
                "benchmark": done.benchmark,
            }
        )
        return
    stages = done.manifest["stages"]
    echo_table(
        ["Stage", "Seconds", "CPU seconds", "Peak RSS MB"],
        [
            [
                name,
                format_seconds(s["seconds"]),
                format_seconds(s["cpu_seconds"]),
                f"{s['peak_rss_bytes'] / 1e6:,.0f}",
            ]
            for name, s in stages.items()
        ],
        title="Where the time went",
    )
    if done.benchmark is not None:
        table = summary_table(done.benchmark)
        echo_table(
            table.headers, table.rows, title=f"{done.plan.model['name']}, sparsity {done.plan.sparsity:g}"
        )
    click.echo(f"Report: {done.report}")
