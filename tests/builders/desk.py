"""The environment of a user at a desk, whatever machine the tests run on."""

from __future__ import annotations

import os

from nirvana_deploy.base.privacy import SWITCHES

_BUILD_SERVERS = (
    "CI",
    "TF_BUILD",
    "GITHUB_ACTIONS",
    "GITLAB_CI",
    "CIRCLECI",
    "TRAVIS",
    "JENKINS_URL",
    "CODEBUILD_BUILD_ID",
    "BUILDKITE",
    "TEAMCITY_VERSION",
)
"""Variables by which ONNX Runtime 1.32 knows a build server, where it reports nothing."""


def environment_at_a_desk() -> dict[str, str]:
    """What this process passes on, without our switches, caches of its own and signs of a build server."""
    hidden = (*SWITCHES, *_BUILD_SERVERS)
    return {
        name: value
        for name, value in os.environ.items()
        if name not in hidden and not name.startswith(("XDG_", "HF_"))
    }
