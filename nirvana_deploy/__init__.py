"""From a Hugging Face model to a smaller, verified, measured deployment, in one command.

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
    "NirvanaError": "nirvana_deploy.base.errors",
    "PrunePlan": "nirvana_deploy.prune.plan",
    "QualityError": "nirvana_deploy.base.errors",
    "Search": "nirvana_deploy.search.recipe",
    "Target": "nirvana_deploy.search.recipe",
    "VerificationError": "nirvana_deploy.base.errors",
    "benchmark_folder": "nirvana_deploy.pipeline.folder",
    "compare_folders": "nirvana_deploy.pipeline.compare",
    "evaluate_folder": "nirvana_deploy.pipeline.folder",
    "load_checkpoint": "nirvana_deploy.model.checkpoint",
    "prune_export": "nirvana_deploy.pipeline.prune_export",
    "quantize_folder": "nirvana_deploy.pipeline.folder",
    "recover_folder": "nirvana_deploy.pipeline.folder",
    "report_folder": "nirvana_deploy.pipeline.folder",
    "search_points": "nirvana_deploy.pipeline.search",
    "verify_folder": "nirvana_deploy.verify.folder",
}
"""The library, by name: what the command line does, as functions. Where each comes from."""
__all__ = [
    "NirvanaError",
    "PrunePlan",
    "QualityError",
    "Search",
    "Target",
    "VerificationError",
    "benchmark_folder",
    "compare_folders",
    "evaluate_folder",
    "load_checkpoint",
    "prune_export",
    "quantize_folder",
    "recover_folder",
    "report_folder",
    "search_points",
    "verify_folder",
]

if TYPE_CHECKING:
    from nirvana_deploy.base.errors import NirvanaError, QualityError, VerificationError
    from nirvana_deploy.model.checkpoint import load_checkpoint
    from nirvana_deploy.pipeline.compare import compare_folders
    from nirvana_deploy.pipeline.folder import (
        benchmark_folder,
        evaluate_folder,
        quantize_folder,
        recover_folder,
        report_folder,
    )
    from nirvana_deploy.pipeline.prune_export import prune_export
    from nirvana_deploy.pipeline.search import search_points
    from nirvana_deploy.prune.plan import PrunePlan
    from nirvana_deploy.search.recipe import Search, Target
    from nirvana_deploy.verify.folder import verify_folder


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    """What completion shows: the library, and not the rooms behind it."""
    return [*__all__, "__version__"]
