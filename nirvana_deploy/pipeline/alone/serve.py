"""One model of an output folder, or an ONNX folder, behind an HTTP server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.registry import look_up
from nirvana_deploy.output.layout import holds_model, is_checkpoint
from nirvana_deploy.output.records import read_records
from nirvana_deploy.output.run import Run
from nirvana_deploy.output.variants import PRUNED, variants_of
from nirvana_deploy.report.verdict import verdict
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
        if variant is not None:
            raise NirvanaError(
                f"{path} is an ONNX folder, one model.",
                hint="Leave --variant out, or name its output folder.",
            )
        return path, path.resolve().name
    if path.is_file() or is_checkpoint(path):
        raise NirvanaError(
            f"{path} is {'a file' if path.is_file() else 'a checkpoint'}; what is served is an ONNX folder.",
            hint=f"nirvana-deploy export {path} --out DIR, then: nirvana-deploy serve DIR",
        )
    with Run.open(path) as run:
        found = {one.name: one for one in variants_of(run) if holds_model(path / one.folder)}
    if not found:
        raise NirvanaError(
            f"{path} has no ONNX model yet.",
            hint="Export it first: repeat its prune command as prune-export, with --resume.",
        )
    if variant is None:
        recommended = verdict(read_records(path)).recommended
        variant = next((name for name in (recommended, PRUNED) if name in found), next(iter(found)))
        why = "as its report recommends" if variant == recommended else "as its report recommends none"
        progress.note(f"Serving {variant}, {why}; --variant names another: {', '.join(found)}.")
    chosen = look_up(variant, found, what="variant", hint=f"nirvana-deploy inspect {path}")
    return path / chosen.folder, f"{path.resolve().name}/{chosen.name}"
