"""OpenVINO's packages, or the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

from nirvana_deploy.base.errors import MissingExtraError


def openvino_module(name: str = "openvino", *, what_for: str = "OpenVINO") -> Any:
    """Import ``name``, of the extra ``openvino``; raises MissingExtraError without its package."""
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(what_for, package=package.replace("_", "-"), extra="openvino") from None
