"""From a Hugging Face model to a smaller, verified, measured deployment, in one command.

    done = prune_export("smollm2", sparsity=0.4, quantize=("w4",), progress=ShownProgress())

Importing this package imports nothing heavy (the public names resolve on first use) and switches the
telemetry of the libraries off that are imported after it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nirvana_deploy.base.privacy import switch_telemetry_off

switch_telemetry_off()
__version__ = "0.1.0"

# In a checkout cli/ and calib_sets/ lie beside this folder; an installed wheel has them inside it.
# Adding the checkout to the package's path makes source runs and editable installs find them too.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "cli" / "main.py").is_file():
    __path__.append(str(_checkout))

_PUBLIC = {
    "Analysis": "nirvana_deploy.measure.recipe",
    "CalibrationText": "nirvana_deploy.quantize.recipe",
    "ContenderError": "nirvana_deploy.base.errors",
    "EngineBuild": "nirvana_deploy.engine.recipe",
    "EngineForm": "nirvana_deploy.engine.recipe",
    "Evaluation": "nirvana_deploy.measure.recipe",
    "Graph": "nirvana_deploy.export.recipe",
    "Lengths": "nirvana_deploy.engine.recipe",
    "MissingExtraError": "nirvana_deploy.base.errors",
    "NirvanaError": "nirvana_deploy.base.errors",
    "Place": "nirvana_deploy.runtime.recipe",
    "Progress": "nirvana_deploy.base.progress",
    "PrunePlan": "nirvana_deploy.prune.plan",
    "QualityError": "nirvana_deploy.base.errors",
    "Quantization": "nirvana_deploy.quantize.recipe",
    "RegressionError": "nirvana_deploy.base.errors",
    "Search": "nirvana_deploy.search.recipe",
    "Selection": "nirvana_deploy.prune.recipe",
    "Serving": "nirvana_deploy.serve.recipe",
    "ShownProgress": "nirvana_deploy.base.shown.progress",
    "Target": "nirvana_deploy.search.recipe",
    "Traffic": "nirvana_deploy.measure.recipe",
    "VerificationError": "nirvana_deploy.base.errors",
    "Where": "nirvana_deploy.search.recipe",
    "Workload": "nirvana_deploy.measure.recipe",
    "benchmark_contenders": "nirvana_deploy.pipeline.contest",
    "benchmark_folder": "nirvana_deploy.pipeline.folder",
    "benchmark_speculative": "nirvana_deploy.pipeline.alone.packages",
    "benchmark_workloads": "nirvana_deploy.pipeline.folder",
    "build_engines": "nirvana_deploy.pipeline.folder",
    "compare_folders": "nirvana_deploy.pipeline.compare",
    "compare_with_earlier": "nirvana_deploy.pipeline.against",
    "evaluate_folder": "nirvana_deploy.pipeline.folder",
    "examine_machine": "nirvana_deploy.runtime.doctor",
    "export_onnx": "nirvana_deploy.pipeline.alone.onnx",
    "generate_text": "nirvana_deploy.pipeline.alone.text",
    "inspect_path": "nirvana_deploy.output.inspection",
    "job_of": "nirvana_deploy.pipeline.job",
    "known_families": "nirvana_deploy.model.families",
    "known_models": "nirvana_deploy.model.sources",
    "load_checkpoint": "nirvana_deploy.model.checkpoint",
    "meet_target": "nirvana_deploy.pipeline.searching.target",
    "package_engines": "nirvana_deploy.package.stage",
    "package_gguf": "nirvana_deploy.package.stage",
    "package_openvino": "nirvana_deploy.pipeline.alone.packages",
    "package_speculative": "nirvana_deploy.pipeline.alone.packages",
    "package_triton": "nirvana_deploy.package.stage",
    "prune_by_plan": "nirvana_deploy.pipeline.prune_export",
    "prune_export": "nirvana_deploy.pipeline.prune_export",
    "quantize_folder": "nirvana_deploy.pipeline.folder",
    "quantize_onnx_folder": "nirvana_deploy.pipeline.alone.onnx",
    "read_engine_record": "nirvana_deploy.runtime.tensorrt.record",
    "read_plan": "nirvana_deploy.prune.plan_file",
    "read_recipe": "nirvana_deploy.pipeline.recipe_file",
    "recipe_toml": "nirvana_deploy.pipeline.recipe_file",
    "recover_folder": "nirvana_deploy.pipeline.folder",
    "report_folder": "nirvana_deploy.pipeline.folder",
    "run_job": "nirvana_deploy.pipeline.prune_export",
    "search_points": "nirvana_deploy.pipeline.searching.search",
    "select_calibration": "nirvana_deploy.pipeline.alone.calibration",
    "serve_folder": "nirvana_deploy.pipeline.alone.serve",
    "verify_folder": "nirvana_deploy.verify.folder",
    "verify_onnx_folder": "nirvana_deploy.verify.folder",
}
"""The library, by name: what the command line does, as functions, and their options; where each lies."""
__all__ = [
    "Analysis",
    "CalibrationText",
    "ContenderError",
    "EngineBuild",
    "EngineForm",
    "Evaluation",
    "Graph",
    "Lengths",
    "MissingExtraError",
    "NirvanaError",
    "Place",
    "Progress",
    "PrunePlan",
    "QualityError",
    "Quantization",
    "RegressionError",
    "Search",
    "Selection",
    "Serving",
    "ShownProgress",
    "Target",
    "Traffic",
    "VerificationError",
    "Where",
    "Workload",
    "benchmark_contenders",
    "benchmark_folder",
    "benchmark_speculative",
    "benchmark_workloads",
    "build_engines",
    "compare_folders",
    "compare_with_earlier",
    "evaluate_folder",
    "examine_machine",
    "export_onnx",
    "generate_text",
    "inspect_path",
    "job_of",
    "known_families",
    "known_models",
    "load_checkpoint",
    "meet_target",
    "package_engines",
    "package_gguf",
    "package_openvino",
    "package_speculative",
    "package_triton",
    "prune_by_plan",
    "prune_export",
    "quantize_folder",
    "quantize_onnx_folder",
    "read_engine_record",
    "read_plan",
    "read_recipe",
    "recipe_toml",
    "recover_folder",
    "report_folder",
    "run_job",
    "search_points",
    "select_calibration",
    "serve_folder",
    "verify_folder",
    "verify_onnx_folder",
]

if TYPE_CHECKING:
    from nirvana_deploy.base.errors import (
        ContenderError,
        MissingExtraError,
        NirvanaError,
        QualityError,
        RegressionError,
        VerificationError,
    )
    from nirvana_deploy.base.progress import Progress
    from nirvana_deploy.base.shown.progress import ShownProgress
    from nirvana_deploy.engine.recipe import EngineBuild, EngineForm, Lengths
    from nirvana_deploy.export.recipe import Graph
    from nirvana_deploy.measure.recipe import Analysis, Evaluation, Traffic, Workload
    from nirvana_deploy.model.checkpoint import load_checkpoint
    from nirvana_deploy.model.families import known_families
    from nirvana_deploy.model.sources import known_models
    from nirvana_deploy.output.inspection import inspect_path
    from nirvana_deploy.package.stage import (
        package_engines,
        package_gguf,
        package_triton,
    )
    from nirvana_deploy.pipeline.against import compare_with_earlier
    from nirvana_deploy.pipeline.alone.calibration import select_calibration
    from nirvana_deploy.pipeline.alone.onnx import export_onnx, quantize_onnx_folder
    from nirvana_deploy.pipeline.alone.packages import (
        benchmark_speculative,
        package_openvino,
        package_speculative,
    )
    from nirvana_deploy.pipeline.alone.serve import serve_folder
    from nirvana_deploy.pipeline.alone.text import generate_text
    from nirvana_deploy.pipeline.compare import compare_folders
    from nirvana_deploy.pipeline.contest import benchmark_contenders
    from nirvana_deploy.pipeline.folder import (
        benchmark_folder,
        benchmark_workloads,
        build_engines,
        evaluate_folder,
        quantize_folder,
        recover_folder,
        report_folder,
    )
    from nirvana_deploy.pipeline.job import job_of
    from nirvana_deploy.pipeline.prune_export import prune_by_plan, prune_export, run_job
    from nirvana_deploy.pipeline.recipe_file import read_recipe, recipe_toml
    from nirvana_deploy.pipeline.searching.search import search_points
    from nirvana_deploy.pipeline.searching.target import meet_target
    from nirvana_deploy.prune.plan import PrunePlan
    from nirvana_deploy.prune.plan_file import read_plan
    from nirvana_deploy.prune.recipe import Selection
    from nirvana_deploy.quantize.recipe import CalibrationText, Quantization
    from nirvana_deploy.runtime.doctor import examine_machine
    from nirvana_deploy.runtime.recipe import Place
    from nirvana_deploy.runtime.tensorrt.record import read_engine_record
    from nirvana_deploy.search.recipe import Search, Target, Where
    from nirvana_deploy.serve.recipe import Serving
    from nirvana_deploy.verify.folder import verify_folder, verify_onnx_folder


if not TYPE_CHECKING:  # which would take any name then

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """What completion shows: the library, and not the rooms behind it."""
    return [*__all__, "__version__"]
