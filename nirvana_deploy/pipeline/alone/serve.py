"""One model of an output folder, or an ONNX folder, behind an HTTP server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.output.layout import holds_model, is_checkpoint
from nirvana_deploy.pipeline.alone.chosen import chosen_variant, refuse_variant
from nirvana_deploy.runtime.openvino.ir import refuse_ir
from nirvana_deploy.runtime.recipe import Place
from nirvana_deploy.runtime.table import runtime_named
from nirvana_deploy.serve.recipe import Serving
from nirvana_deploy.serve.server import Served, serve_onnx_folder


def serve_folder(
    path: Path | str,
    options: Serving | None = None,
    place: Place | None = None,
    *,
    on_ready: Callable[[Served], None] | None = None,
    progress: Progress = SILENT,
) -> Served:
    """Serve a model of an output folder, or an ONNX folder, as OpenAI's clients ask for it, until Ctrl-C.

    Of an output folder the model that its report recommends, else the pruned one in float. ``on_ready`` hears
    when the server listens. Returns what was served, after the open answers. Raises NirvanaError for a folder
    that cannot be served, a missing extra, and an address that is not free.
    """
    options, place, path = options or Serving(), place or Place(), Path(path)
    if place.runtime is not None and runtime_named(place.runtime).takes != "onnx":
        raise NirvanaError(
            f"The runtime {place.runtime} runs no ONNX folders, which are what is served.",
            hint="Leave --runtime out, or name one that does: nirvana-deploy doctor",
        )
    folder, name = served_model(path, options.variant, progress=progress)
    return serve_onnx_folder(
        folder,
        name=name,
        options=options,
        runtime=place.runtime,
        threads=place.threads,
        on_ready=on_ready,
        progress=progress,
    )


def served_model(path: Path, variant: str | None, *, progress: Progress = SILENT) -> tuple[Path, str]:
    """The ONNX folder to serve, and the name that clients know it by.

    Raises NirvanaError for a folder without ONNX model, and for a variant that it does not have.
    """
    refuse_ir(path)
    if holds_model(path):
        refuse_variant(path, variant)
        return path, path.resolve().name
    if path.is_file() or is_checkpoint(path):
        raise NirvanaError(
            f"{path} is {'a file' if path.is_file() else 'a checkpoint'}; what is served is an ONNX folder.",
            hint=f"nirvana-deploy export {path} --out DIR, then: nirvana-deploy serve DIR",
        )
    chosen = chosen_variant(path, variant, doing="Serving", progress=progress)
    return path / chosen.folder, f"{path.resolve().name}/{chosen.name}"
