"""Options for packages."""

from __future__ import annotations

from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe


@recipe
class Package:
    """Artifacts for other programs."""

    gguf: Annotated[bool, Option("One GGUF file for llama.cpp, from the checkpoint.")] = False
    triton: Annotated[bool, Option("A Triton model repository, from the ONNX folder.")] = False
    openvino: Annotated[
        bool, Option("An OpenVINO model with its tokenizer for openvino-genai, from the ONNX folder.")
    ] = False
    speculative: Annotated[
        bool, Option("A model and the draft that speeds it up, in one folder for onnxruntime-genai.")
    ] = False
    target_model: Annotated[
        str | None,
        Option(
            "With --speculative: the model whose answers are wanted, for example dense-w4, or an ONNX "
            "folder. [dense]",
            flag="--target",
            metavar="MODEL",
        ),
    ] = None
    draft_model: Annotated[
        str | None,
        Option(
            "With --speculative: the model that proposes tokens, likewise. [the smallest pruned one]",
            flag="--draft",
            metavar="MODEL",
        ),
    ] = None
    draft_tokens: Annotated[
        int | None,
        Option("With --speculative: tokens proposed at a time, 1 to 16. [the fastest of 1 to 6]", minimum=1),
    ] = None
    threads: Annotated[
        int | None,
        Option("With --speculative: threads of onnxruntime-genai. [all physical cores]", minimum=1),
    ] = None
    engines: Annotated[
        tuple[str, ...],
        Option(
            "With --triton: serve this TensorRT engine instead, for example sm89=l4.engine; may be repeated. "
            "For an encoder-decoder, its decoder's engine alone: text in, text out.",
            flag="--engine",
            metavar="[TARGET=]FILE",
        ),
    ] = ()
    weight_type: Annotated[
        str,
        Option("Weights of the GGUF file.", flag="--type", choices=("f32", "f16", "bf16", "q8_0", "q4_0")),
    ] = "f16"
    name: Annotated[str | None, Option("Name of the model in the repository. [the folder's name]")] = None
