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
    "VerificationError": "nirvana_deploy.base.errors",
    "PrunePlan": "nirvana_deploy.prune.plan",
    "load_checkpoint": "nirvana_deploy.model.checkpoint",
    "prune_export": "nirvana_deploy.pipeline.prune_export",
}
__all__ = ["NirvanaError", "PrunePlan", "VerificationError", "load_checkpoint", "prune_export"]

if TYPE_CHECKING:
    from nirvana_deploy.base.errors import NirvanaError, VerificationError
    from nirvana_deploy.model.checkpoint import load_checkpoint
    from nirvana_deploy.pipeline.prune_export import prune_export
    from nirvana_deploy.prune.plan import PrunePlan


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
