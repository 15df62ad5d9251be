"""What transformers' reader leaves out of a GGUF file is translated, as llama.cpp computes it, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.extras import needs
from builders.gguf_files import rewritten, write_merges
from builders.llama_cpp import CONSUMER_VERSION, greedy_share, installed_llama_cpp, run_llama_cpp
from builders.odd import CLOSE, edit, far, torch_logits
from builders.tiny import write_tiny
from numpy.typing import NDArray

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.reading import read_json
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.gguf.convert import converted
from nirvana_deploy.package.gguf_export import gguf_from_checkpoint

needs("gguf")
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
RNG = np.random.default_rng(5)


def noise(*shape: int) -> NDArray[np.float32]:
    return RNG.normal(0, 0.5, shape).astype(np.float32)


def written(folder: Path, kind: str, **config: Any) -> tuple[Path, Path]:
    """A checkpoint and the float32 GGUF file that it is written as."""
    checkpoint = edit(write_tiny(folder / "model", kind), **config)
    write_merges(checkpoint)
    gguf_from_checkpoint(Checkpoint.open(checkpoint), folder / "model.gguf", weight_type="f32")
    return checkpoint, folder / "model.gguf"


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama-tied", {"rope_type": "llama3", **ROPE, **LLAMA3}),
        ("llama-tied", {"rope_type": "llama3", **ROPE, **LLAMA3, "original_max_position_embeddings": 8192}),
        ("llama-tied", {"rope_type": "linear", **ROPE, "factor": 4.0}),
        ("qwen2", {"rope_type": "linear", **ROPE, "factor": 4.0}),
        ("qwen3", {"rope_type": "default", "rope_theta": 500.0}),
    ],
)
def test_a_rotary_embedding_comes_back_from_gguf(kind: str, rope: dict[str, Any], tmp_path: Path) -> None:
    checkpoint, gguf = written(tmp_path, kind, rope_parameters=rope)
    back = converted(gguf, cache=tmp_path / "cache").folder
    assert far(torch_logits(back), torch_logits(checkpoint)) < CLOSE
    assert Checkpoint.open(back).shape.layers == Checkpoint.open(checkpoint).shape.layers


def test_biases_come_back_from_gguf(tmp_path: Path) -> None:
    checkpoint, gguf = written(tmp_path, "llama-biased")
    back = converted(gguf, cache=tmp_path / "cache").folder
    assert far(torch_logits(back), torch_logits(checkpoint)) < CLOSE


BIASES = {
    f"blk.{layer}.attn_{part}.bias": noise(size)
    for layer in range(3)
    for part, size in (("q", 48), ("k", 24), ("v", 24))
}
AS_LLAMA_CPP_READS: dict[str, tuple[str, dict[str, Any]]] = {
    "a factor without a type": ("llama-tied", {"keys": {"rope.scaling.factor": 4.0}}),
    "an old linear factor": ("llama-tied", {"keys": {"rope.scale_linear": 3.0}}),
    "a factor that is switched off": (
        "llama-tied",
        {"keys": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}},
    ),
    "divisors of no known kind": (
        "llama-tied",
        {"tensors": {"rope_freqs.weight": np.float32([1.0, 3.0, 1.5, 20.0])}},
    ),
    "divisors and a factor": (
        "llama-tied",
        {"keys": {"rope.scaling.factor": 2.0}, "tensors": {"rope_freqs.weight": np.float32([1, 1, 4, 8])}},
    ),
    "yarn": (
        "qwen2",
        {
            "keys": {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            }
        },
    ),
    "biases of q, k and v alone": ("llama-tied", {"tensors": BIASES}),
}


@pytest.mark.consumer(
    "llama.cpp",
    artifact="GGUF files with scaled rotary embeddings and biases, read as input",
    proof="8 greedy tokens of each equal those of the folder it is converted to",
    version=CONSUMER_VERSION,
)
def test_a_gguf_file_means_what_llama_cpp_computes(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    llama_cpp = installed_llama_cpp(pytestconfig.cache)
    prompts = [[int(token) for token in RNG.integers(3, 270, 40)] for _ in range(2)]
    plain: dict[str, Path] = {}
    jobs = []
    for number, (kind, changes) in enumerate(AS_LLAMA_CPP_READS.values()):
        if kind not in plain:
            plain[kind] = written(tmp_path / kind, kind)[1]
        file = rewritten(plain[kind], tmp_path / f"{number}.gguf", **changes)
        jobs.append({"path": str(file), "prompts": prompts, "new_tokens": 8, "texts": []})
    answers = run_llama_cpp(llama_cpp, jobs, tmp_path)
    for name, job, answer in zip(AS_LLAMA_CPP_READS, jobs, answers, strict=True):
        assert "error" not in answer, (name, answer)
        folder = converted(Path(job["path"]), cache=tmp_path / "cache").folder
        assert greedy_share(folder, prompts, answer["tokens"]) == 1.0, name
        Checkpoint.open(folder)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keys": {"attention.scale": 0.5}}, r"says llama\.attention\.scale = 0\.5"),
    ({"keys": {"expert_count": 4}}, r"says llama\.expert_count = 4"),
    ({"keys": {"attention.head_count_kv": [3, 2, 1]}}, r"layers of different sizes"),
    ({"keys": {"rope.dimension_count": 4}}, r"heads of 8 numbers and rope\.dimension_count 4"),
    ({"keys": {"rope.scaling.attn_factor": 1.5}}, r"attn_factor = 1\.5 and rope\.scaling\.type = 'linear'"),
    ({"keys": {"rope.scaling.attn_factor": 0.5, "rope.scaling.type": "none"}}, r"attn_factor = 0\.5"),
    ({"keys": {"rope.scaling.type": "longrope"}}, r"rope\.scaling\.type = 'longrope'"),
    ({"tensors": {"blk.1.attn_q_norm.weight": noise(8)}}, r"no place for: blk\.1\.attn_q_norm\.weight"),
    ({"tensors": {"blk.3.ffn_up.weight": noise(40, 48)}}, r"no place for: blk\.3\.ffn_up\.weight"),
    ({"drop": ["blk.2.ffn_down.weight"]}, r"missing that it needs: model\.layers\.2\.mlp\.down_proj"),
]


@pytest.fixture(scope="module")
def tied_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("gguf"), "llama-tied")[1]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_has_no_translation_is_refused_by_name(
    changes: dict[str, Any], sentence: str, tied_gguf: Path, tmp_path: Path
) -> None:
    file = rewritten(tied_gguf, tmp_path / "other.gguf", **changes)
    with pytest.raises(NirvanaError, match=sentence):
        converted(file, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_every_token_that_ends_an_answer_is_kept(tied_gguf: Path, tmp_path: Path) -> None:
    stops = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2}
    file = rewritten(tied_gguf, tmp_path / "stops.gguf", extra=stops)
    folder = converted(file, cache=tmp_path / "cache").folder
    assert read_json(folder / "generation_config.json")["eos_token_id"] == [2, 7]
