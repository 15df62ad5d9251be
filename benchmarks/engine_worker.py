"""Build the engine of one ONNX folder and print its cost as JSON: the process that engine/stage.py measures.

    python benchmarks/engine_worker.py ONNX_FOLDER OUT MAX_LENGTH

Imports what a build needs and no more, so that the memory it reports is the build's.
"""

from __future__ import annotations

import json
import mmap
import sys
import zlib
from pathlib import Path
from typing import Any

from nirvana_deploy.base.machine import peak_rss_bytes
from nirvana_deploy.engine.build import engine_from_onnx
from nirvana_deploy.engine.recipe import Lengths
from nirvana_deploy.runtime.tensorrt.record import EngineRecord

_PRELUDE = b"__myln_cast___myln_bf16___myln_bool(__myln_bool x)"
"""A line that stands once in the source text of each kernel that an RTX 1.7 engine carries."""


def programs_of(engine: Path, record: EngineRecord) -> dict[str, Any]:
    """What an engine holds beside its weights: bytes, how far they compress, kernels kept as source text."""
    programs_bytes = record.engine_bytes - record.weights_bytes
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as whole:
        programs = whole[:programs_bytes]  # they come first
    return {
        "bytes": programs_bytes,
        "zlib_bytes": len(zlib.compress(programs, 1)),
        "kernel_sources": programs.count(_PRELUDE),
    }


def main(onnx: Path, out: Path, max_length: int) -> None:
    """Build, then print."""
    imports_bytes = peak_rss_bytes()
    engine = engine_from_onnx(onnx, out, lengths=Lengths(max_length=max_length))
    record = engine.record
    print(
        json.dumps(
            {
                "seconds": record.build.seconds,
                "cpu_s": record.build.cpu_seconds,
                "system_s": record.build.system_seconds,
                "peak_rss_bytes": record.build.peak_rss_bytes,
                "imports_rss_bytes": imports_bytes,
                "engine_bytes": record.engine_bytes,
                "weights_bytes": record.weights_bytes,
                "programs": programs_of(engine.path, record),
                "layers": dict(record.layers),
                "notes": list(record.notes),
                "version": record.runtime_version,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
