"""Names of files and folders: of an output folder, and inside an ONNX folder."""

from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError, upgrade

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
"""External data of the graphs in the same folder: of MODEL_FILE, or of the two below."""
ENCODER_FILE = "encoder_model.onnx"
DECODER_FILE = "decoder_model_merged.onnx"
"""An encoder-decoder's graphs, named as optimum and transformers.js look for them."""
SCHEMA_KEY, FLAVOR_KEY, DTYPE_KEY, CONTEXT_KEY = (
    f"nirvana_deploy.{key}" for key in ("schema", "flavor", "dtype", "context_tokens")
)
"""What a graph says of itself, in its metadata."""
GRAPH_SCHEMA = 1
CALIBRATION_FILE = "calibration.safetensors"
SCORES_FILE = "scores.safetensors"
CURVES_FILE = "curves.safetensors"
RECONSTRUCTION = "reconstruction"
RECOVERY = "recovery"
STEP_FOLDERS = "step-"
"""Followed by a number: folders of the cuts on the way to the target, each with these four."""
RECOVERY_STATE = ".nirvana-deploy.recovery"
"""What a killed recovery goes on from; gone when it is finished."""
QUALITY_FILE = "quality.json"
ANSWERS_FILE = "answers.json"
BENCHMARK_FILE = "benchmark.json"
WORKLOADS_FILE = "workloads.json"
CHECKPOINT = "checkpoint"
PLAN_FILE = "plan.json"
ONNX = "onnx"
DENSE_ONNX = "dense/onnx"
ENGINES = "engine"
NTK_FILE = "ntk.json"
TASKS_FILE = "tasks.json"
REPORT_MARKDOWN, REPORT_HTML = "report.md", "report.html"
OPENVINO, IR_FILE = "openvino", "openvino_model.xml"
"""A model for openvino-genai, and the graph in that folder."""
SPECULATIVE, DRAFT = "speculative", "draft"
"""A model with its draft for onnxruntime-genai, and the folder of the draft in it."""
SPECULATIVE_FILE = "speculative.json"
"""What the draft gains, in that folder."""
GENAI_FILE = "genai_config.json"
TARGET_FILE = "target.json"
"""The budget that a sparsity was found for, and the cuts that were tried."""
SEARCH_FILE, SEARCH_CSV, SEARCH_HTML = "search.json", "search.csv", "search.html"
POINTS = "points"
"""Results of a search, each under the hash of what its point is."""
PARTS = "parts"
"""Which parts of a search, made apart, a folder holds."""
RECIPE_FILE = "recipe.toml"
MANIFEST = "manifest.json"
NAMES_OF_A_RUN = (
    MANIFEST,
    RECIPE_FILE,
    CALIBRATION_FILE,
    SCORES_FILE,
    CURVES_FILE,
    PLAN_FILE,
    RECONSTRUCTION,
    RECOVERY,
    f"{STEP_FOLDERS}[0-9]*",
    CHECKPOINT,
    ONNX,
    f"{ONNX}-*",
    "dense",
    ENGINES,
    QUALITY_FILE,
    ANSWERS_FILE,
    BENCHMARK_FILE,
    WORKLOADS_FILE,
    NTK_FILE,
    TASKS_FILE,
    REPORT_MARKDOWN,
    REPORT_HTML,
    SEARCH_FILE,
    SEARCH_CSV,
    SEARCH_HTML,
    POINTS,
    PARTS,
    TARGET_FILE,
)
"""What a run may write into its output folder, as patterns of the names there."""


def is_seq2seq(folder: Path) -> bool:
    """Whether an ONNX folder holds an encoder-decoder."""
    return (folder / ENCODER_FILE).is_file()


def holds_model(folder: Path) -> bool:
    """Whether a folder is an ONNX folder, of a decoder or an encoder-decoder."""
    return (folder / MODEL_FILE).is_file() or is_seq2seq(folder)


def is_speculative(folder: Path) -> bool:
    """Whether a folder holds a model with its draft."""
    return (folder / DRAFT / MODEL_FILE).is_file() and (folder / GENAI_FILE).is_file()


def is_openvino(folder: Path) -> bool:
    """Whether a folder holds an OpenVINO model, an IR, and no ONNX model."""
    return (folder / IR_FILE).is_file() and not holds_model(folder)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint and no ONNX folder or IR (which may have a config.json too)."""
    return (folder / "config.json").is_file() and not holds_model(folder) and not is_openvino(folder)


def require_schema(model: Path, found: str | None) -> None:
    """Raise NirvanaError unless ``found``, what a graph says under SCHEMA_KEY, is known; None is no claim."""
    if found not in (None, str(GRAPH_SCHEMA)):
        raise NirvanaError(
            f"{model} was written with schema {found}; this version reads schema {GRAPH_SCHEMA}.",
            hint=upgrade(),
        )
