"""The command line of the vendor's own tool that builds the same engine: for reports, and to build elsewhere.

``tensorrt_rtx`` for RTX, ``trtexec`` for TensorRT. ``--skipInference`` keeps it from measuring: TensorRT 11
changed what its numbers mean (transfers left out, spin wait and CUDA graph on), so they compare neither with
10.x nor with this tool's. ``--stronglyTyped`` is needed by 10.x and accepted by 11, which knows nothing else.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from nirvana_deploy.runtime.tensorrt.record import ProfileRecord


def trtexec_command(
    onnx: Path,
    engine: str,
    *,
    runtime: str,
    profiles: Sequence[ProfileRecord],
    targets: Sequence[str],
    workspace_bytes: int | None = None,
    weight_streaming: bool = False,
    strip_weights: bool = False,
    hardware_compatible: bool = False,
    version_compatible: bool = False,
) -> str:
    """One shell command; marks that only the API can set (a decomposable attention) are not in it."""
    rtx = runtime == "tensorrt-rtx"
    words = [
        "tensorrt_rtx" if rtx else "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        "--skipInference",
    ]
    if rtx:
        words.append("--computeCapabilities=" + ",".join(target.removeprefix("sm") for target in targets))
    else:
        words.append("--stronglyTyped")
    if workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{max(1, workspace_bytes >> 20)}M")
    flags = {
        "--allowWeightStreaming": weight_streaming,
        "--stripWeights": strip_weights,
        "--hardwareCompatibilityLevel=ampere+": hardware_compatible,
        "--versionCompatible": version_compatible,
    }
    words += [flag for flag, wanted in flags.items() if wanted]
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        for option, end in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = (f"{name}:{'x'.join(map(str, shape[end]))}" for name, shape in profile.shapes.items())
            words.append(f"--{option}Shapes=" + ",".join(shapes))
    return shlex.join(words)
