"""Options for measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.runtime.recipe import Threads


@recipe
class Gate:
    """Quality that the pruned models must have; exit code 3 where they do not."""

    require_kl: Annotated[
        float | None,
        Option(
            "Fail where a KL to dense is above this, nats per token, on held-out text or on --eval-text.",
            minimum=0,
            resumable=True,
        ),
    ] = None
    require_perplexity_ratio: Annotated[
        float | None,
        Option(
            "Fail where a perplexity is above this many times the dense model's, on any kind of text, one "
            "that nothing was calibrated on among them.",
            minimum=0,
            resumable=True,
        ),
    ] = None


@recipe
class Measurement(Gate):
    """Measurements of a new output folder."""

    run_benchmark: Annotated[
        bool, Option("Measure latency.", flag="--benchmark/--no-benchmark", resumable=True)
    ] = True
    threads: Threads = None
    prompt_tokens: Annotated[
        int, Option("Prompt length in tokens.", minimum=1, command_line=False, resumable=True)
    ] = 128
    new_tokens: Annotated[int, Option("Tokens decoded.", minimum=2, command_line=False, resumable=True)] = 64
    repeats: Annotated[int, Option("Measured rounds.", minimum=1, command_line=False, resumable=True)] = 11


@recipe
class Workload:
    """The measured request, and how often it is repeated."""

    prompt_tokens: Annotated[int, Option("Prompt length in tokens.", minimum=1)] = 128
    new_tokens: Annotated[int, Option("Tokens decoded.", minimum=2)] = 64
    batch_size: Annotated[int, Option("Batch size.", minimum=1)] = 1
    repeats: Annotated[int, Option("Number of measured rounds.", minimum=1)] = 11
    precision: Annotated[
        float | None,
        Option(
            "More rounds until every decode speed-up is known so well, for example 3%: the longer side of "
            "the interval that holds its true median with a confidence of 95 %.",
            minimum=0,
            share=True,
        ),
    ] = None
    max_minutes: Annotated[float, Option("When --precision and --wait-until-idle give up.", minimum=0)] = 10.0
    wait_until_idle: Annotated[bool, Option("Begin when other programs leave the machine alone.")] = False
    warmup: Annotated[int, Option("Number of warm-up rounds.", minimum=0, command_line=False)] = 1
    threads: Threads = None
    seed: Annotated[
        int,
        Option(
            "Random seed of the prompts: uniform token ids, the same for every variant.",
            minimum=0,
            command_line=False,
        ),
    ] = 0


def _embedded_workloads() -> tuple[str, ...]:
    from nirvana_deploy.measure.workloads.named import embedded_names

    return embedded_names()


@recipe
class Traffic:
    """Which requests are timed, in the place of the one of :class:`Workload`."""

    workloads: Annotated[
        tuple[str, ...],
        Option(
            "Time the requests of a workload: chat, rag, batch, edge, server, or a TOML file. Repeat it for "
            "several.",
            flag="--workload",
            metavar="NAME",
            suggests=_embedded_workloads,
        ),
    ] = ()
    sweeps: Annotated[
        tuple[str, ...],
        Option(
            "Time the request along an axis, context (the prompt's length), batch or threads: "
            "context=128,512,2048. Repeat it for several.",
            flag="--sweep",
            metavar="AXIS=N,N,...",
        ),
    ] = ()


@recipe
class Analysis:
    """What else a benchmark says of the models."""

    profile: Annotated[
        bool, Option("Also profile each model: where the time goes, by operator and by layer.")
    ] = False
    fresh_ceilings: Annotated[
        bool,
        Option("Measure anew what this machine reaches, in place of what was kept of an earlier run."),
    ] = False


@recipe
class Tolerance:
    """What counts as a regression."""

    tolerance: Annotated[
        float,
        Option(
            "With --against: the least change that counts, for example 5%. Two runs of one model differ by "
            "some per cent on their own, which neither of them shows.",
            minimum=0,
            share=True,
        ),
    ] = 0.03


@recipe
class Evaluation(Gate):
    """Quality, measured again."""

    eval_text: Annotated[
        tuple[Path, ...],
        Option(
            "Text to measure on. Repeat it for several. [the windows that calibration held out, and a text "
            "in the package that nothing is calibrated on]"
        ),
    ] = ()
    window_tokens: Annotated[
        int | None,
        Option(
            "Tokens per window of --eval-text, for example 512 or 2048. [256]", minimum=2, flag="--window"
        ),
    ] = None
    max_windows: Annotated[
        int | None, Option("Number of windows from the start of each --eval-text. [16]", minimum=1)
    ] = None
    ntk: Annotated[bool, Option("Also measure how far the cut changed the tangent kernel.")] = False
    ntk_windows: Annotated[int, Option("Number of held-out windows for --ntk.", minimum=1)] = 4
    tasks: Annotated[
        str | None,
        Option(
            "Tasks, separated by commas: .jsonl files, folders of them, "
            "or names that lm-evaluation-harness fetches."
        ),
    ] = None
    tasks_on: Annotated[
        str | None,
        Option(
            "Which models --tasks runs on. [onnx, what is deployed, if any]",
            choices=("onnx", "checkpoint", "both"),
        ),
    ] = None
    task_folder: Annotated[
        Path | None, Option("Folder with the yaml files of further tasks.", flag="--include-path")
    ] = None
    limit: Annotated[int | None, Option("Examples per task, from its start. [all]", minimum=1)] = None
    batch_size: Annotated[
        int,
        Option(
            "Sequences per step of --tasks on a checkpoint (of 64 tokens where packed). ONNX: 1.", minimum=1
        ),
    ] = 8
