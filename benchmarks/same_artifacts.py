"""Proof that a refactoring changed nothing for users: what two checkouts write and say, compared.

``record CHECKOUT OUT.json`` runs the commands of the README with the code of CHECKOUT: on a tiny random model
of every family, then (unless ``--families-only``) the main job on a real one. It keeps exit codes, stdout,
stderr, the sha256 of every file a command wrote or changed, manifests and quality as data, and the options of
all commands. ``compare OLD.json NEW.json`` prints one line a case and exits 1 on a difference. Both records
must be made with one interpreter, on one machine, from the same ``--models``.

Left out, because two runs of the same code differ in it: what was measured of time and memory (keys in
VOLATILE, seconds and tables that commands print, numbers, hashes and drawings of report pages), paths of the
checkout, work and model folders, and the bytes and log of TensorRT engines, whose builder chooses kernels by
timing. ``benchmark`` and ``doctor`` tell of nothing but time and machine, and are not run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOLATILE = {"peak_rss_bytes", "environment", "ttft_ms", "tpot_ms", "build", "log", "engine_bytes"}
VOLATILE |= {"engine_sha256", "."}
"""Keys of records; ``.`` counts the bytes of a folder's manifest and report. Those of seconds go as well."""
TIME = re.compile(r"(?:(?:\\?<|&lt;) )?[\d#][\d#.,]*(?: min [\d#]+)? s\b")
SIZE = re.compile(r"(?:#|^ *\.) +[\d.,]+ [kMG]B|[\d.,]+ MB of host memory")
"""What is printed behind a time, or of a folder itself, or of the memory that a build took."""
AS_DATA = ("manifest.json", "quality.json", "quantization.json")
"""Records whose fields are compared by name; an engine's sidecar is one too."""
CACHE_NOTES = ("The hub cannot be reached", "Converting ")
"""Beginnings of lines that only the first run with an empty cache prints."""
WIDTH = 48
VOCABULARY = 272
FAMILIES = """
llama: prune-export models/llama --sparsity 0.4 SMALL --calib pydoc --reconstruct --quantize int8
    --quantize w8 --quantize w4 --quantize-head --out llama
llama-biased: prune-export models/llama-biased --sparsity 0.3 SMALL --saliency auto --gamma auto
    --calib auto --candidates 1 --dtype bf16 --no-baseline --out biased --json
mistral: prune-export models/mistral --sparsity 0.4 SMALL --saliency wanda-sp --allocation uniform
    --flavor gqa --quantize w4 --no-baseline --out mistral
qwen2: prune-export models/qwen2 --sparsity 0.5 SMALL --saliency taylor --gamma 1.5 --dtype fp16
    --flavor gqa --reconstruct --no-baseline --out qwen2
qwen3: prune-export models/qwen3 --sparsity 0.3 SMALL --saliency nirvana-vocab --calib self --seed 3
    --eval-text models/notes.txt --quantize int8 --out qwen3
t5: prune-export models/t5 --sparsity 0.3 SMALL --saliency taylor --quantize w8 --no-baseline --out t5
flan-t5: prune-export models/flan-t5 --sparsity 0.3 SMALL --calib pydoc --saliency nirvana,magnitude
    --allocation uniform --reconstruct --quantize int8 --out flan-t5
flap: prune models/llama-biased --sparsity 0.4 --saliency flap --allocation uniform CUT --out flap
prune: prune models/llama --sparsity 0.3 --saliency random CUT --out cut --json
resume: prune-export models/llama --sparsity 0.3 --saliency random SMALL --out cut --resume
magnitude: prune models/qwen3 --sparsity 0.4 --saliency magnitude CUT --out magnitude
default: prune models/llama --sparsity 0.4 BEST --out default
default T5: prune models/t5 --sparsity 0.3 BEST --out default-t5
fast: prune models/mistral --sparsity 0.3 --preset fast BEST --out fast
"""
"""Name of a case, then its command: all in one work folder, in which ``models`` are the models."""
COMMANDS = """
prune --plan: prune models/llama --plan llama/plan.json --out planned
quantize int8: quantize llama --scheme int8 --smooth 0.5 --ranges percentile --keep-fp 2 --force
quantize int8 of ONNX: quantize llama/onnx --scheme int8 --calib models/notes.txt --num-sequences 4
    --seq-len 32 --ranges mse --sensitivity --out int8
quantize w4: quantize llama --scheme w4 --block-size 16 --rounding search --head --force --json
quantize w8 for TensorRT: quantize llama/onnx --scheme w8 --writing tensorrt --out w8
export: export llama/checkpoint --out static --dtype fp16 --flavor static-cache --cache-length 64
    --last-logits
export T5: export t5/checkpoint --out t5-onnx --json
build-engine: build-engine cut --target sm86 --max-batch 2 --max-length 64 --opt-prompt 16
package --gguf: package llama --gguf
package --gguf, uniform: package mistral --gguf --type f32 --out uniform.gguf --json
prune GGUF: prune uniform.gguf --sparsity 0.2 CUT --out from-gguf
package --triton: package llama --triton
evaluate: evaluate llama --eval-text models/notes.txt --window 64 --max-windows 4 --ntk --threads 1
    --json
report: report llama
inspect: inspect llama
inspect --json: inspect llama --json
generate: generate llama --prompt Once --max-new-tokens 12 --json
select-calib: select-calib models/llama --sparsity 0.3 --corpora models/notes.txt --gamma 1,M/A
    --saliency nirvana,flap --candidates 2 --num-sequences 2 --seq-len 16 --heldout-sequences 4 --json
verify: verify llama --threads 1 --json
verify ONNX: verify t5-onnx --checkpoint t5/checkpoint --threads 1 --json
models: models --json
"""
MISTAKES = """
no such command: prune-exprot models/llama
no sparsity: prune-export models/llama
unknown model: prune-export smolm2 --sparsity 0.4
no such folder: export no/such/folder --out new
unsupported family: prune models/gpt2 --sparsity 0.4 --out new
unknown saliency: prune models/llama --sparsity 0.4 --saliency nirvanna --out new
unknown corpus: prune models/llama --sparsity 0.4 --calib c5 --out new
sparsity 1.5: prune models/llama --sparsity 1.5 --out new
seq_len too long: prune-export models/llama --sparsity 0.4 --seq-len 1024 --out new
existing --out: prune-export models/llama --sparsity 0.4 --out llama
resumed otherwise: prune-export models/llama --sparsity 0.2 SMALL --out llama --resume
quantize without ONNX: quantize planned --scheme int8
unknown scheme: quantize llama --scheme int3
unknown ranges: quantize llama --scheme int8 --ranges max --force
package T5 for Triton: package t5 --triton
calibration cache: build-engine llama --calib-cache cache
verify another folder: verify models
verify damaged: verify damaged --json
"""
DEMO = """
the main job: prune-export smollm2 --sparsity 0.4 --preset paper --reconstruct --quantize int8 --quantize w4
    --quantize-head --out demo --force --no-benchmark
"""
BEST = "--round-to 4 --num-sequences 8 --seq-len 32 --calib models/notes.txt"
CUT = f"--preset paper {BEST}"
SHORT = {"SMALL": f"{CUT} --no-benchmark --threads 1", "CUT": CUT, "BEST": BEST}
"""Words of the tables; of an option given twice the last counts."""

SERVER = """
import json, os, sys, traceback
import matplotlib.pyplot, onnxscript, torch
from transformers import AutoTokenizer, LlamaForCausalLM, T5ForConditionalGeneration
def job(code, words, texts, environment):
    for number, path in enumerate([os.devnull, *texts]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    sys.argv = ["nirvana-deploy", *words]
    try:
        exec(code, {"__name__": "same"})
    except SystemExit as done:
        return done.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
for line in sys.stdin:
    child = os.fork()
    if not child:
        code = job(*json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Imports other people's packages once, since that takes longer than most cases, and forks for each job.
ONNX Runtime is left to the jobs: it starts a thread, which a fork loses."""
COMMAND = "import runpy; runpy.run_module('nirvana_deploy', run_name='__main__')"
INTROSPECT = """
import importlib, json, sys
import click
commands = next(v for v in vars(importlib.import_module(sys.argv[1])).values() if isinstance(v, click.Group))
def option(parameter, context):
    told = parameter.to_info_dict()
    default = told.get("default")
    told["default"] = default if isinstance(default, (str, int, float, list)) else None
    told["help"] = " ".join(parameter.get_help_record(context) or ())
    word = parameter.opts[0] if told["param_type_name"] == "option" else parameter.make_metavar(context)
    inside = ("name", "opts") if word not in parameter.opts else ("name",)
    return word, {key: value for key, value in told.items() if key not in inside}
context, said = click.Context(commands), {}
for name in commands.list_commands(context):
    command = commands.get_command(context, name)
    inner = click.Context(command, parent=context, info_name=name)
    options = dict(option(parameter, inner) for parameter in command.params)
    said[name] = {"text": command.get_help(inner), "options": options}
print(json.dumps(said))
"""


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    todo = parser.add_subparsers(dest="todo", required=True)
    recording = todo.add_parser("record")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("out", type=Path)
    recording.add_argument("--models", type=Path, default=Path("same-models"), help="made where missing")
    recording.add_argument("--families-only", action="store_true", help="without the main job")
    comparing = todo.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    given = parser.parse_args()
    if given.todo == "compare":
        old, new = (json.loads(path.read_text()) for path in (given.old, given.new))
        sys.exit(1 if compare(old, new) else 0)
    tables = [FAMILIES, COMMANDS, MISTAKES, *([] if given.families_only else [DEMO])]
    result = record(given.checkout.resolve(), given.models.resolve(), cases_of("".join(tables)))
    given.out.write_text(json.dumps(result, indent=1) + "\n")


def cases_of(table: str) -> dict[str, str]:
    """Name -> command of a table in which indented lines continue the one before."""
    lines = table.replace("\n    ", " ").strip().splitlines()
    pairs = (line.split(": ", 1) for line in lines if line)
    return {name: " ".join(SHORT.get(word, word) for word in command.split(" ")) for name, command in pairs}


def record(checkout: Path, models: Path, cases: dict[str, str]) -> dict[str, Any]:
    """Run ``cases`` with the code of ``checkout`` in a new work folder, which goes afterwards."""
    if not models.is_dir():
        write_models(models)
    with tempfile.TemporaryDirectory(prefix="same-") as folder:
        work = Path(folder).resolve() / "work"
        work.mkdir()
        (work / "models").symlink_to(models, target_is_directory=True)
        runner = Runner(checkout, models, work)
        options = runner.options()
        return {"options": options, "cases": {name: runner.run(name, cases[name]) for name in cases}}


class Runner:
    """Runs commands of one checkout in one work folder, and sees what each of them wrote."""

    def __init__(self, checkout: Path, models: Path, work: Path) -> None:
        self.work = work
        self.names = {str(work): "<work>", str(models): "<models>", str(checkout): "<checkout>"}
        self.seen: dict[str, tuple[int, int]] = {}
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        more = {"PYTHONPATH": str(checkout), "PYTHONPYCACHEPREFIX": str(work.parent / "pycache")}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=work,
            env=kept | more | {"COLUMNS": "110", "OMP_WAIT_POLICY": "PASSIVE"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.entry = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]
        where = self.python("import nirvana_deploy; print(nirvana_deploy.__file__)")[1].strip()
        if not Path(where).is_relative_to(checkout):
            sys.exit(f"The code would come from {where}, not from {checkout}.")

    def python(self, code: str, *words: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``code`` in a process that has imported none of ours before."""
        assert self.server.stdin is not None and self.server.stdout is not None
        texts = [self.work.parent / name for name in ("stdout", "stderr")]
        job = [code, words, [str(text) for text in texts], environment]
        print(json.dumps(job), file=self.server.stdin, flush=True)
        exit_code = int(self.server.stdout.readline())
        out, err = (text.read_text(encoding="utf-8") for text in texts)
        return exit_code, out, err

    def options(self) -> dict[str, Any]:
        """The options of all commands, as click and --help have them."""
        module = self.entry["nirvana-deploy"].partition(":")[0]
        found: dict[str, Any] = json.loads(self.python(INTROSPECT, module)[1])
        return found

    def run(self, name: str, command: str) -> dict[str, Any]:
        """What one case says and writes."""
        if "damaged" in command:
            damage(self.work / "llama", self.work / "damaged")
            list(self.changed())
        started, own_cache = time.perf_counter(), {}
        if ".gguf" in command:  # a conversion is kept by the bytes of its source: convert anew
            own_cache = {"NIRVANA_DEPLOY_CACHE": str(self.work / "cache")}
        exit_code, out, err = self.python(COMMAND, *command.split(), **own_cache)
        print(f"{time.perf_counter() - started:6.1f} s  exit code {exit_code}  {name}", flush=True)
        return {
            "exit code": exit_code,
            "stdout": self.said(out),
            "stderr": self.said(err),
            "files": {file: self.content(self.work / file) for file in self.changed()},
        }

    def changed(self) -> Iterator[str]:
        """Files that were written since the last call."""
        for path in sorted(self.work.rglob("*")):
            if path.is_file() and "models" not in path.relative_to(self.work).parts[:1]:
                name, now = path.relative_to(self.work).as_posix(), path.stat()
                if self.seen.get(name) != (now.st_mtime_ns, now.st_ino):
                    self.seen[name] = (now.st_mtime_ns, now.st_ino)
                    yield name

    def said(self, text: str) -> Any:
        """Output without what changes from run to run: JSON as data, else lines."""
        text = self.placed(text)
        try:
            return stable(json.loads(text))
        except json.JSONDecodeError:
            lines = [line for line in text.splitlines() if not line.startswith(CACHE_NOTES)]
            return [quiet(line) for line in lines]

    def placed(self, text: str) -> str:
        """``text`` with names for folders, and without lines of source files."""
        for path, name in self.names.items():
            text = text.replace(path, name)
        return re.sub(r"<checkout>/\S+\.py:\d+", "<source>", text)

    def content(self, path: Path) -> Any:
        """The sha256 of a file, of its stable part, or that part itself where it is a record."""
        if path.suffix == ".engine" or (path.parent.name == "engine" and path.suffix == ".log"):
            return "not compared"
        if path.suffix not in (".json", ".md", ".html", ".svg"):
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        text = self.placed(path.read_text(encoding="utf-8"))
        if path.name in AS_DATA or path.with_suffix(".engine").is_file():
            return stable(json.loads(text))
        if path.name.startswith("report.") or path.name == "README.md":  # a model card
            text = re.sub(r"<svg.*?</svg>|\b[0-9a-f]{64}\b", "", text, flags=re.DOTALL)
            text = TIME.sub("#", re.sub(r"\d[\d.,]*", "#", text))
        return hashlib.sha256(text.encode()).hexdigest()


def quiet(line: str) -> str:
    """A printed line without times, and without the widths of columns that depend on them."""
    line = SIZE.sub("#", TIME.sub("#", line))
    if "│" in line or "┃" in line:
        line = re.sub(r"\d[\d.,]*", "#", line)
    return re.sub(r"[\s━─]+", " ", line)


def stable(value: Any) -> Any:
    """``value`` without what was measured; of files the names alone, their bytes being recorded beside it."""
    if isinstance(value, list):
        return [stable(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: stable(one) for key, one in value.items() if not measured(key)}
    if "stages" in kept:
        for stage in kept["stages"].values():
            stage["files"] = sorted(stage.get("files", ()))
        kept["stage names"] = list(kept["stages"])
    return kept


def measured(key: str) -> bool:
    """Whether a key of a record is about the run and not about what it made."""
    return key in VOLATILE or key.endswith("seconds")


def compare(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print a line for each case and command; returns how many differ. What was added does not count."""
    found = compare_options(old["options"], new["options"])
    for name in old["cases"] | new["cases"]:
        if name not in new["cases"] or name not in old["cases"]:
            differences = ["only in one record"]
        else:
            differences = list(differing(old["cases"][name], new["cases"][name]))
        added = [one for one in differences if one.endswith(" added")]
        changes = [one for one in differences if one not in added]
        verdict = f"differs: {'; '.join(changes)}" if changes else "same"
        print(f"{name}: {verdict}" + (f" (not counted: {len(added)} added)" if added else ""))
        found += bool(changes)
    total = len(old["cases"] | new["cases"]) + len(old["options"] | new["options"])
    print(f"{total - found} of {total} cases and commands: same, {found} differ")
    return found


def differing(old: Any, new: Any, at: str = "") -> Iterator[str]:
    """The places where two values differ, with the values where these are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old | new:
            if key not in old:
                yield f"{at}{key} added"
            elif key not in new:
                yield f"{at}{key} gone"
            else:
                yield from differing(old[key], new[key], f"{at}{key}: ")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differing(before, after, f"{at}[{index}] ")
    elif isinstance(old, list) and isinstance(new, list):
        yield from (f"{at}{str(one)[:60]} gone" for one in old if one not in new)
        yield from (f"{at}{str(one)[:60]} added" for one in new if one not in old)
        yield f"{at}{len(old)} -> {len(new)} entries"
    elif old != new:
        yield f"{at}{str(old)[:60]} -> {str(new)[:60]}"


def compare_options(old: dict[str, Any], new: dict[str, Any]) -> int:
    """Print a line for each command; returns how many lost or changed an option. Added ones do not count."""
    found = 0
    for name in old | new:
        if name not in new or name not in old:
            print(f"--help {name}: {'differs: gone' if name in old else 'added (not counted)'}")
            found += name in old
            continue
        before, after = (one[name]["options"] for one in (old, new))
        changes = [f"{key} gone" for key in before if key not in after]
        for key in (key for key in before if key in after):
            changes += [f"{key}: {one}" for one in changed_fields(before[key], after[key])]
        notes = [f"{key} added" for key in after if key not in before]
        notes += ["other words in --help"] if old[name]["text"] != new[name]["text"] and not notes else []
        verdict = f"differs: {'; '.join(changes)}" if changes else "same"
        print(f"--help {name}: {verdict}" + (f" (not counted: {', '.join(notes)})" if notes else ""))
        found += bool(changes)
    return found


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Differences of one option; a default that --help already showed in brackets may become click's own."""
    shown, now = (told_default(one["help"]) for one in (old, new))
    moved = old["default"] is None and str(new["default"]) in re.split(r"[,; ]+", shown)
    for key in old | new:
        if key != "help" and old.get(key) != new.get(key) and not (key == "default" and moved):
            yield f"{key} {old.get(key)!r} -> {new.get(key)!r}"
    if shown != now:
        yield f"shown default [{shown}] -> [{now}]"


def told_default(words: str) -> str:
    """What --help has in brackets, but for lists of choices."""
    brackets = (one for one in re.findall(r"\[([^\]]*)\]", words) if "|" not in one)
    return "; ".join(brackets).replace("default: ", "")


def damage(folder: Path, copy: Path) -> None:
    """A copy of a finished folder in which one bit of the weights differs."""
    shutil.copytree(folder, copy)
    weights = copy / "checkpoint/model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def write_models(folder: Path) -> None:
    """A random model of every family and kind, a text, and a model that is not supported."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, T5Config

    size = {
        "hidden_size": WIDTH, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 40,
        "num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    t5 = {
        "d_model": WIDTH, "d_kv": 8, "d_ff": 40, "num_heads": 5, "num_layers": 3, "num_decoder_layers": 2,
        "vocab_size": VOCABULARY, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        made = Path(partial) / "models"
        write_model(made / "llama", LlamaConfig(**size, tie_word_embeddings=True))
        write_model(made / "llama-biased", LlamaConfig(**size, attention_bias=True, mlp_bias=True))
        write_model(made / "mistral", MistralConfig(**size, head_dim=16, sliding_window=None))
        write_model(made / "qwen2", Qwen2Config(**size, head_dim=16, tie_word_embeddings=True))
        write_model(made / "qwen3", Qwen3Config(**size, head_dim=16))
        write_model(made / "t5", T5Config(**t5, feed_forward_proj="relu"), tie_word_embeddings=None)
        write_model(made / "flan-t5", T5Config(**t5, **gated), **gated)
        shutil.copytree(made / "llama", made / "gpt2")
        rewrite_config(made / "gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"])
        (made / "notes.txt").write_text(text())
        made.rename(folder)


def write_model(folder: Path, config: Any, **changes: Any) -> None:
    """A seeded random model whose layers matter; the head of an encoder-decoder, where untied, its own."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(7)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 1.0 if "relative_attention_bias" in name else 0.15)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if config.is_encoder_decoder:  # as the hub's checkpoints are saved
        rewrite_config(folder, scale_decoder_outputs=None, **changes)
        if changes["tie_word_embeddings"] is False:
            weights = load_file(folder / "model.safetensors")
            weights["lm_head.weight"] = torch.randn(VOCABULARY, WIDTH) * 0.15
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: Any) -> None:
    """Set keys of a config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with few merges: every text encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, special = Tokenizer(models.BPE()), ["<pad>", "<s>", "</s>"]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text().splitlines(), trainer)
    named = dict(zip(("pad_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def text() -> str:
    """A text to calibrate on."""
    return "".join(f"Line {i} says that {i} times {i % 7} is {i * (i % 7)}.\n" for i in range(1500))


if __name__ == "__main__":
    main()
