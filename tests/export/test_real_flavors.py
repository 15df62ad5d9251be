"""SmolLM2-135M in every flavor: the tokens of torch, in ONNX Runtime and in onnxruntime-genai."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders.extras import needs
from builders.llama_cpp import REAL_PROMPTS, greedy_share
from builders.plans import plan_for
from safetensors.torch import load_file, save_file

from nirvana_deploy.export.onnx_export import onnx_from_checkpoint
from nirvana_deploy.model.checkpoint import Checkpoint, config_json, load_tokenizer
from nirvana_deploy.model.sources import resolve_model
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.runtime.genai import GenaiModel
from nirvana_deploy.runtime.onnxruntime.decoder import OrtDecoder
from nirvana_deploy.runtime.torch import open_checkpoint
from nirvana_deploy.verify.against_torch import verify_onnx
from nirvana_deploy.verify.tolerance import OWN_ROUNDINGS

og = needs("onnxruntime_genai")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the genai bindings while they load
]


@pytest.fixture(scope="module")
def dense() -> Path:
    return resolve_model("smollm2").path


def cut(dense: Path, out: Path, allocation: str) -> Path:
    """The dense checkpoint, or a pruned one by random scores."""
    if allocation == "dense":
        return dense
    slice_checkpoint(Checkpoint.open(dense), plan_for(dense, sparsity=0.2, allocation=allocation), out)
    return out


def as_qwen2(llama: Path, out: Path) -> Path:
    """The same model under Qwen2's name, which has biases on q, k and v: here zeros."""
    shutil.copytree(llama, out)
    config = config_json(llama) | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    for name in list(tensors):
        if any(f"{kind}_proj.weight" in name for kind in "qkv"):
            tensors[name.replace(".weight", ".bias")] = torch.zeros(len(tensors[name]))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def assert_rounding_of_torch(checkpoint: Path, folder: Path) -> None:
    """From float64, the graph in float32 is about as far as torch in float32.

    At random tokens the six differ from torch's float32 by 4e-6 to 4e-4 of the largest logit. The large ones
    are no fault of a graph: at one position of the uniform cut all three programs are right to 5e-6 as far as
    layer 10, and layer 11's massive activation magnifies each one's rounding (torch's too: to 7e-5 or to 1e-4
    with another attention; noise of one unit roundoff in float64: 2e-5 to 1.2e-4).
    """
    decoder, reference = OrtDecoder(folder), open_checkpoint(checkpoint)
    tokens = np.random.default_rng(11).integers(0, decoder.vocab_size, size=(2, 50))[:, 5:]
    found, own = decoder.prefill(tokens)[0], reference.prefill(tokens)[0]
    with reference.in_float64():
        exact = reference.prefill(tokens)[0]
    assert np.abs(found - exact).max() <= OWN_ROUNDINGS * np.abs(own - exact).max()


def assert_tokens_of_torch(checkpoint: Path, folder: Path, *, new_tokens: int) -> None:
    report = verify_onnx(checkpoint, folder, new_tokens=new_tokens)
    assert report.passed, report
    for check in report.greedy:
        assert check.not_run is None
        assert (check.prompts, check.new_tokens) == (5, new_tokens)
        assert check.equal_prompts + check.ties == 5


@pytest.mark.consumer(
    "onnxruntime-genai",
    artifact="ONNX folder of SmolLM2, global, gqa: chat and stream",
    proof="its chat template gives transformers' token ids; 12 streamed pieces are the text of the tokens",
    package="onnxruntime-genai",
)
def test_layers_that_differ_share_buffers_in_genai_chat_and_stream(dense: Path, tmp_path: Path) -> None:
    checkpoint = cut(dense, tmp_path / "checkpoint", "global")
    folder = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "gqa", flavor="gqa").path
    settings = json.loads((folder / "genai_config.json").read_text())
    assert settings["search"]["past_present_share_buffer"] is True
    assert_tokens_of_torch(checkpoint, folder, new_tokens=8)

    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.apply_chat_template(json.dumps(turn), add_generation_prompt=True))
    wanted = load_tokenizer(dense).apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    assert list(prompt) == wanted["input_ids"]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 12, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    stream, pieces = tokenizer.create_stream(), []
    while not generator.is_done():
        generator.generate_next_token()
        pieces.append(stream.decode(generator.get_next_tokens()[0]))
    generate = GenaiModel(folder).generate
    whole = generate(np.array([prompt], dtype=np.int64), 12)
    assert len(pieces) == 12 and "".join(pieces) == tokenizer.decode(np.array(whole, dtype=np.int32))


@pytest.mark.slow
@pytest.mark.consumer(
    "ONNX Runtime",
    artifact="ONNX folder of SmolLM2: dense, global, uniform; portable and gqa",
    proof="5 x 64 greedy tokens equal torch's, and logits are as close to float64 as torch's",
    package="onnxruntime",
)
@pytest.mark.consumer(
    "onnxruntime-genai",
    artifact="ONNX folder of SmolLM2: dense, global, uniform; portable and gqa",
    proof="5 x 64 greedy tokens equal torch's",
    package="onnxruntime-genai",
)
@pytest.mark.parametrize("flavor", ["portable", "gqa"])
@pytest.mark.parametrize("allocation", ["dense", "global", "uniform"])
def test_64_tokens_of_5_prompts(dense: Path, tmp_path: Path, allocation: str, flavor: str) -> None:
    checkpoint = cut(dense, tmp_path / "checkpoint", allocation)
    folder = onnx_from_checkpoint(Checkpoint.open(checkpoint), tmp_path / "onnx", flavor=flavor).path
    assert_tokens_of_torch(checkpoint, folder, new_tokens=64)
    assert_rounding_of_torch(checkpoint, folder)


@pytest.mark.slow
@pytest.mark.consumer(
    "ONNX Runtime",
    artifact="ONNX folder of SmolLM2 in fp16 and bf16, as Llama and as Qwen2: portable, gqa, static-cache",
    proof="logits and 5 x 16 greedy tokens are the rounded checkpoint's (bf16 computed in float32)",
    package="onnxruntime",
)
@pytest.mark.parametrize("flavor", ["portable", "gqa", "static-cache"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_real_weights_in_half_precision(dense: Path, tmp_path: Path, family: str, flavor: str) -> None:
    checkpoint = dense if family == "llama" else as_qwen2(dense, tmp_path / "qwen2")
    slots = 128 if flavor == "static-cache" else None
    for dtype in ("fp32", "fp16", "bf16"):
        folder = onnx_from_checkpoint(
            Checkpoint.open(checkpoint), tmp_path / dtype, flavor=flavor, dtype=dtype, cache_tokens=slots
        ).path
        report = verify_onnx(checkpoint, folder, new_tokens=16)
        assert report.passed, report


GENERATES = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
folder, prompts, code = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "global"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=code, dtype=torch.float32)
assert "nirvana_deploy" not in sys.modules
assert type(model).__module__.startswith("transformers.models.") != code, type(model)
found = []
for prompt in prompts:
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, pad_token_id=2)
    found.append(answer[0, len(prompt) :].tolist())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.consumer(
    "transformers",
    artifact="HF folder of SmolLM2, uniform (stock class) and global (with its module)",
    proof="a fresh process loads it and generates: 5 x 32 tokens are the greedy ones",
    package="transformers",
)
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_transformers_alone_generates(dense: Path, tmp_path: Path, allocation: str) -> None:
    checkpoint = cut(dense, tmp_path / "checkpoint", allocation)
    assert bool(list(checkpoint.glob("*.py"))) == (allocation == "global")
    prompts = [load_tokenizer(checkpoint)(text)["input_ids"] for text in REAL_PROMPTS]
    result = subprocess.run(
        [sys.executable, "-c", GENERATES, str(checkpoint), json.dumps(prompts), allocation],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout.splitlines()[-1])
    assert sum(map(len, answers)) > 100  # some may end early
    assert greedy_share(checkpoint, prompts, answers) == 1
