"""Code that runs a result, for its page."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from nirvana_deploy.output import stage
from nirvana_deploy.output.layout import ONNX
from nirvana_deploy.output.records import Records
from nirvana_deploy.output.variants import PRUNED, variant_named
from nirvana_deploy.report.facts import encoder_decoder

RUN_GENAI = """\
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
tokenizer.update_options(add_special_tokens="true")
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, parameters)
prompt = tokenizer.encode("The capital of France is")
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))"""

RUN_SEQ2SEQ = """\
from pathlib import Path

from nirvana_deploy.runtime.onnxruntime.encoder_decoder import OrtSeq2Seq
from nirvana_deploy.runtime.runner import greedy_tokens
from nirvana_deploy.runtime.text import load_text_side

folder = Path("FOLDER")
tokenizer, stops = load_text_side(folder)
model = OrtSeq2Seq(folder)
prompt = tokenizer("The capital of France is", return_tensors="np")
tokens = greedy_tokens(
    model,
    prompt["input_ids"],
    max_new_tokens=32,
    eos_token_ids=stops,
)
print(tokenizer.decode(tokens))"""

RUN_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "checkpoint"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True
)
prompt = tokenizer("The capital of France is", return_tensors="pt")
tokens = model.generate(**prompt, max_new_tokens=32)
print(tokenizer.decode(tokens[0]))"""
SEQ2SEQ_CLASS = "AutoModelForSeq2SeqLM"
"""What takes the place of AutoModelForCausalLM for an encoder-decoder."""


@dataclass(frozen=True)
class Snippet:
    """Code that runs the result from inside the output folder."""

    title: str
    language: str
    code: str


def upload_command(place: str, *, is_file: bool = False) -> str:
    """What uploads a folder, but for its marker, or one file, by the hub's own client."""
    command = f"hf upload YOUR-NAME/YOUR-MODEL {shlex.quote(place)}"
    return command if is_file else f'{command} . --exclude ".made-by*"'


def snippets(records: Records, recommended: str | None) -> tuple[Snippet, ...]:
    """How to run the recommended model [the pruned one] from inside the output folder."""
    folder = _folder(recommended or PRUNED)
    verify = Snippet("Compare every file with its model again", "sh", "nirvana-deploy verify .")
    upload = upload_command(folder)
    publish = Snippet("Publish it with the card in its folder, once you have read that", "sh", upload)
    if encoder_decoder(records):  # which onnxruntime-genai does not run
        transformers = RUN_TRANSFORMERS.replace("AutoModelForCausalLM", SEQ2SEQ_CLASS)
        run_onnx = Snippet("Generate with ONNX Runtime", "python", RUN_SEQ2SEQ.replace("FOLDER", folder))
    else:
        transformers = RUN_TRANSFORMERS
        run_onnx = Snippet("Generate with onnxruntime-genai", "python", RUN_GENAI.replace("FOLDER", folder))
    return tuple(
        snippet
        for needed, snippet in (
            (stage.ONNX, run_onnx),
            (stage.CHECKPOINT, Snippet("Generate with transformers, in float", "python", transformers)),
            (stage.ONNX, verify),
            (stage.ONNX, publish if recommended else None),
        )
        if snippet is not None and records.stage(needed)
    )


def _folder(variant: str) -> str:
    """Where an ONNX model lies; of an engine its float model."""
    try:
        return variant_named(variant).folder
    except KeyError:
        return ONNX
