"""Every command of the front page and the site runs, in the order of its page, on tiny models.

A line that is neither typed nor listed in ``NOT_HERE`` fails, and so does an entry of a table that no page
needs.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.documents import SITE, blocks, command_named, lines_of
from builders.extras import needs
from builders.gguf_files import write_merges
from builders.jobs import SHORT_ROUNDS
from builders.tiny import write_tiny
from builders.transformers_js import installed_transformers_js
from builders.typed import PROGRAM, exported, in_bash, typed, workers_in_threads

from nirvana_deploy.measure.rounds import watch
from nirvana_deploy.measure.workloads import named
from nirvana_deploy.pipeline.presets import PRESETS
from nirvana_deploy.pipeline.searching import target
from nirvana_deploy.search.point import Found

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the genai bindings while they load
]
PAGES = ("README.md", *SITE)

_INSTALLS = "installs into an environment, as make test has done"
_GPU = "needs an NVIDIA GPU"
NOT_HERE = {
    "git clone <this repository> && cd nirvana-deploy": "benchmarks/newcomer.py clones",
    "make demo": "benchmarks/newcomer.py makes the demo",
    "make test": "is what runs this test",
    "pip install -e '.[cpu,genai,gguf,recover]'": _INSTALLS,
    "pip install -e '.[rtx]'": _INSTALLS,
    "pip install 'nirvana-deploy[cpu,serve]'": _INSTALLS,
    "pip install 'nirvana-deploy[openvino]'": _INSTALLS,
    "pip install onnxruntime-genai": _INSTALLS,
    "hf auth login": "needs an account on the hub",
    'hf upload YOUR-NAME/smollm2-s0.2-w4 smollm2-s0.2/onnx-w4 . --exclude ".made-by*"': "uploads to the hub",
    'llama-cli -m smollm2-s0.2/gguf/smollm2-s0.2-q8_0.gguf -p "The capital of France is"': (
        "llama.cpp's own programs are not installed; tests/package/test_gguf.py runs its library"
    ),
    "tritonserver --model-repository repository": "Triton's server is not installed",
    "vllm serve stock/checkpoint": "vLLM's wheel is built for CUDA",
    "nirvana-deploy search smollm2 --cluster auto": (
        "needs a Ray cluster; tests/search/test_cluster.py starts one"
    ),
    "nirvana-deploy search smollm2 --cluster ray://head:10001 --cpus-per-cut 8 --gpus-per-cut 1": (
        "needs a Ray cluster with GPUs"
    ),
    "accelerate launch --config_file fsdp.yaml -m nirvana_deploy recover smollm2-s0.4 --tokens 2000000": (
        "is of eight GPUs; tests/recover/test_sharding.py launches two processes"
    ),
    "nirvana-deploy verify smollm2-s0.2 --runtime tensorrt-rtx": _GPU,
    "nirvana-deploy benchmark smollm2-s0.2 --runtime tensorrt-rtx": _GPU,
    'nirvana-deploy generate smollm2-s0.2/engine/pruned.engine --prompt "Hello" --chat': _GPU,
    "nirvana-deploy package smollm2-s0.2 --triton --engine sm89=l4.engine --engine sm86=a10.engine": (
        "needs engines that two GPUs have built: tests/package/test_triton_engine.py has stand-ins"
    ),
}
"""Lines that are not typed, and why."""

SLOW = ("torchrun ", "--processes 4", "--tasks ")
"""Parts of lines that start several processes, which import everything anew, or lm-evaluation-harness."""

NEEDS = {
    r"\.gguf\b": "gguf",
    r"benchmark .*\.gguf\b": "llama_cpp",
    "--gguf": "gguf",
    "--openvino": "openvino_tokenizers",
    "--runtime openvino": "openvino",
    "--speculative": "onnxruntime_genai",
    "--flavor gqa": "onnxruntime_genai",
    "build-engine": "tensorrt_rtx",
    "pruned.engine": "tensorrt_rtx",
    " --tokens": "peft",
    "serve ": "uvicorn",
    "curl ": "uvicorn",
}
"""Pattern of a line: the package that it needs."""

OTHER_PROGRAMS = {"curl", "jq"}
"""Programs of others that lines call."""

MODELS = {"smollm2": "./smollm2", "MODEL": "./my-llama"}
"""A page's model, the first word behind a command: the tiny one that is typed in its place."""

SHORTER = {
    "--minutes 30": "--tokens 64",
    "--minutes 60": "--tokens 64",
    "--tokens 2000000": "--tokens 64",
    "--recover 30m": "--recover 64",
    "recover=20m": "recover=64",
    "--num-sequences 120 --seq-len 256": "--num-sequences 8 --seq-len 16",
    "--round-to 128": "--round-to 4",
    "--window 512": "--window 32",
    "--prompt-tokens 512": "--prompt-tokens 16",
    "--precision 3%": "--precision 3% --max-minutes 0",
    "--new-tokens 128": "--new-tokens 8",
    "context=128,512,2048": "context=8,16",
    "batch=1,2,4,8": "batch=1,2",
    # what a random model keeps, and no noise of a busy machine breaks
    "--max-kl 0.2": "--max-kl 99",
    "--max-perplexity-ratio 1.3": "--max-perplexity-ratio 99",
    "--max-weights-bytes 300MB": "--max-weights-bytes 225kB",
    "--min-speedup 1.3": "--min-speedup 1.1",
    "--target-tpot-ms 20": "--target-tpot-ms 0.3",
    "--require-kl 0.1": "--require-kl 99",
    "--require-perplexity-ratio 1.1": "--require-perplexity-ratio 99",
    "--shard 2/8": "--shard 1/1",
    "--tolerance 5%": "--tolerance 9900%",
    "--against last-week/benchmark.json": "--against last-week/benchmark.json --tolerance 9900%",
}
"""What a page says: what is typed in its place."""

_CUT = {"--preset": "best", "--calib": "pydoc", "--num-sequences": "4", "--seq-len": "16", "--round-to": "4"}
ADDED: dict[str, dict[str, str]] = {
    "prune-export": {**_CUT, "--threads": "1", "--force": ""},
    "prune": {**_CUT, "--force": ""},
    "recipe": _CUT,
    "search": {**_CUT, "--threads": "1", "--sparsity": "0,0.2", "--precision": "none,w4", "--force": ""},
    "select-calib": {"--num-sequences": "4", "--seq-len": "16", "--round-to": "4"},
    "benchmark": {"--prompt-tokens": "8", "--new-tokens": "4", "--repeats": "2", "--threads": "1"},
    "build-engine": {"--max-length": "64", "--opt-prompt": "16", "--opt-length": "32"},
    "serve": {"--threads": "1"},
}
"""By command, options that are typed too where a line has none of that name.

A page cuts one model several times; each cut takes the place of the one before, by ``--force``.
"""


OTHERWISE = {
    "--curves": {"--force": ""},
    "--workload": {"--threads": "1"},
    "/speculative": {"--new-tokens": "4", "--threads": "1"},
}
"""What is added in the place of these to a line that has such an option: text and lengths are its own."""


def shortened(line: str) -> str:
    """What is typed for a line of a page."""
    start = re.match(r"(?:nirvana-deploy|torchrun .* nirvana_deploy) (?P<command>\S+) (?P<model>\S+)", line)
    if start is None:
        return line
    model = start["model"]
    line = line[: start.start("model")] + MODELS.get(model, model) + line[start.end("model") :]
    for said, instead in SHORTER.items():
        line = line.replace(said, instead)
    line, *rest = re.split(r"(?= [|>] )", line)
    options = ADDED.get(start["command"], {})
    for said, options_there in OTHERWISE.items():
        options = options_there if options and said in line else options
    added = [f" {name} {value}".rstrip() for name, value in options.items() if name not in line]
    return "".join([line, *added, *rest])


def by_bytes(_: Path, points: list[Found], *__: Any, **___: Any) -> tuple[list[Found], dict[str, Any]]:
    """In place of ``timed_points``: a nanosecond for each byte of weights, however busy the machine."""
    sizes = [one.weights_bytes or 0 for one in points]
    return [
        replace(one, tpot_ms=size / 1e6, speedup=sizes[0] / size)
        for one, size in zip(points, sizes, strict=True)
    ], {}


@pytest.fixture(scope="module", autouse=True)
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Presets and workloads without an option of their own are short, and workers are threads."""
    folder = tmp_path_factory.mktemp("workloads")
    for name in named.embedded_names():
        open_at_once = "concurrency = 2\n" if name == "server" else ""
        short = f"prompt_tokens = [8, 16]\nnew_tokens = 4\nrequests = 4\n{open_at_once}"
        (folder / f"{name}.toml").write_text(short)
    with pytest.MonkeyPatch.context() as patched, workers_in_threads():
        patched.setitem(PRESETS, "best", {**SHORT_ROUNDS, "heldout_sequences": 3, "heldout_len": 24})
        patched.setitem(PRESETS, "fast", {**PRESETS["fast"], **PRESETS["best"]})
        patched.setattr(target, "timed_points", by_bytes)
        patched.setattr(watch, "BUSY_CORES", 1_000.0)  # no machine is too busy to begin
        patched.setattr(watch, "_IDLE_SECONDS", 0.0)
        patched.setattr(named, "resources", SimpleNamespace(files=lambda _: folder, as_file=nullcontext))
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: models, texts, and what was made and measured before."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("smollm2", "my-llama"):
        model = write_tiny(folder / name, "llama-tied", head_dim=16)
        write_merges(model)
        (model / "chat_template.jinja").write_text("{% for one in messages %}{{ one.content }}{% endfor %}")
    for name in ("handbook", "tickets", "mails"):
        lines = (f"{name} {n}: {n * 7919 % 1000} apples and {n * 104729 % 997} pears.\n" for n in range(1600))
        (folder / f"{name}.txt").write_text("".join(lines))
    row = {"query": "Two and two are", "choices": ["four", "five"], "gold": 0}
    (folder / "mine.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    (folder / "mine.toml").write_text("prompt_tokens = 8\nnew_tokens = 4\nrequests = 4\n")
    job = "nirvana-deploy prune-export smollm2 --sparsity 0.2 --quantize int8,w4 --no-baseline-quantized"
    typed(shortened(job), folder, {})
    made = folder / "smollm2-s0.2"
    for name in ("smollm2-s0.4", "released", "last-week"):
        shutil.copytree(made, folder / name)
    shutil.copytree(made / "onnx", folder / "my-onnx")
    shutil.copyfile(made / "recipe.toml", folder / "recipe.toml")
    if find_spec("gguf"):
        typed("nirvana-deploy package ./smollm2 --gguf --type f32 --out model.gguf", folder, {})
        shutil.copyfile(folder / "model.gguf", folder / "smollm2-q8_0.gguf")
    return folder


@dataclass
class Desk:
    """Where the lines of a page are typed, and the variables that they have exported."""

    folder: Path
    variables: dict[str, str]


@pytest.fixture(scope="module")
def desks(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Desk]:
    """The desk of each page."""

    @cache
    def desk(page: str) -> Desk:
        return Desk(shutil.copytree(given, tmp_path_factory.mktemp("page") / "desk"), {})

    return desk


def on_the_pages() -> Iterator[Any]:
    for page in PAGES:
        for number, line in enumerate(lines_of(page), start=1):
            marks = [pytest.mark.slow] if any(part in line for part in SLOW) else []
            yield pytest.param(page, line, id=f"{page}-{number}", marks=marks)


@pytest.mark.parametrize("page, line", list(on_the_pages()))
def test_a_command_runs(page: str, line: str, desks: Callable[[str], Desk]) -> None:
    if line in NOT_HERE:
        pytest.skip(f"{line}: {NOT_HERE[line]}")
    for program in OTHER_PROGRAMS & set(line.split()):
        if shutil.which(program) is None:
            pytest.skip(f"{line}: needs {program}")
    for module in (module for pattern, module in NEEDS.items() if re.search(pattern, line)):
        needs(module)
    run(line, desks(page))


def run(line: str, desk: Desk) -> None:
    """Do what a line of a page says."""
    program = line.split()[0]
    if program == PROGRAM:
        typed(shortened(line), desk.folder, desk.variables)
    elif program == "torchrun":
        in_bash(shortened(line).replace(program, f"{sys.executable} -m torch.distributed.run"), desk.folder)
    elif program == "curl":
        from builders.serving import served

        with served(desk.folder / "smollm2-s0.2" / "onnx") as server:
            said = in_bash(line.replace("http://127.0.0.1:8000/v1", server.url), desk.folder)
        assert "[DONE]" in said, said
    else:
        assert program == "export", f"{line}: neither run nor listed in NOT_HERE"
        desk.variables |= exported(line, desk.folder)


def test_the_script_of_a_page_runs_in_node(desks: Callable[[str], Desk], pytestconfig: pytest.Config) -> None:
    page = "docs/runtimes/transformers-js.md"
    assert pytestconfig.cache is not None
    installed, desk = installed_transformers_js(pytestconfig.cache), desks(page)
    if not (desk.folder / "stock").is_dir():
        for line in lines_of(page):
            run(line, desk)
    (script,) = blocks(page, "js")
    (installed / "page.mjs").write_text(script, encoding="utf-8")
    assert in_bash(f"node {installed / 'page.mjs'}", desk.folder).startswith("The capital of France is")


def test_the_tables_name_what_pages_have() -> None:
    lines = [line for page in PAGES for line in lines_of(page)]
    assert set(NOT_HERE) <= set(lines)
    for part in (*map(re.escape, (*SLOW, *SHORTER, *OTHERWISE)), *NEEDS):
        assert any(re.search(part, line) for line in lines), part
    for command, options in ADDED.items():
        known = {name for one in command_named(command).params for name in one.opts}
        assert options.keys() <= known, command
        assert any(f"{PROGRAM} {command} " in line for line in lines), command
