"""The command line of the vendor's own tool that builds the same engine: for reports, and to build elsewhere.

``tensorrt_rtx`` for RTX, ``trtexec`` for TensorRT. ``--skipInference`` keeps it from measuring: TensorRT 11
changed what its numbers mean (transfers left out, spin wait and CUDA graph on), so they compare neither with
10.x nor with this tool's. ``--stronglyTyped`` is needed by 10.x and accepted by 11, which knows nothing else.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from nirvana_deploy.engine.targets import RTX, BuilderOptions
from nirvana_deploy.runtime.tensorrt.record import ProfileRecord


def trtexec_command(
    onnx: Path, engine: str, options: BuilderOptions, *, profiles: Sequence[ProfileRecord]
) -> str:
    """One shell command; marks that only the API can set (a decomposable attention) are not in it."""
    rtx = options.runtime == RTX
    words = [
        "tensorrt_rtx" if rtx else "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        "--skipInference",
    ]
    if rtx:
        targets = (target.removeprefix("sm") for target in options.resolved_targets())
        words.append("--computeCapabilities=" + ",".join(targets))
    else:
        words.append("--stronglyTyped")
    if options.workspace_bytes is not None:
        words.append(f"--memPoolSize=workspace:{max(1, options.workspace_bytes >> 20)}M")
    flags = {
        "--allowWeightStreaming": options.weight_streaming,
        "--stripWeights": options.strip_weights,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
        "--versionCompatible": options.version_compatible,
    }
    words += [flag for flag, wanted in flags.items() if wanted]
    for index, profile in enumerate(profiles):
        words.append(f"--profile={index}")
        for option, end in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = (f"{name}:{'x'.join(map(str, shape[end]))}" for name, shape in profile.shapes.items())
            words.append(f"--{option}Shapes=" + ",".join(shapes))
    return shlex.join(words)
