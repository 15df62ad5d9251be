"""Files of an output folder are what was made: their bytes have the sha256 of its manifest."""

from __future__ import annotations

from pathlib import Path

from nirvana_deploy.base.artifact import sha256_of
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.run import Run


def require_undamaged(part: Path, *, done: str = "packaged", progress: Progress = SILENT) -> None:
    """Raise NirvanaError if a file of ``part``, a folder of an output folder, is missing or was changed.

    ``done`` says in the message what ``part`` is not. A folder outside of any output folder passes: nothing
    says what its files were.
    """
    part = part.resolve()
    out = next((folder for folder in (part, *part.parents[:2]) if (folder / MANIFEST).is_file()), None)
    if out is None:
        return
    run = Run.open(out)
    listed = run.listed()
    inside = {name: sha256 for name, sha256 in listed.items() if (out / name).is_relative_to(part)}
    if not inside and part.relative_to(out).as_posix() in run.manifest.get("makes", ()):
        raise NirvanaError(
            f"{part} is not {done}: {MANIFEST} does not list it; another run left it there.",
            hint="Complete the folder: repeat the command that made it, with --resume.",
        )
    damaged = []
    with progress.task(f"Checking {part.name}", len(inside)) as advance:
        for name, sha256 in inside.items():
            if not (out / name).is_file() or sha256_of(out / name) != sha256:
                damaged.append(name)
            advance(1)
    if damaged:
        raise NirvanaError(
            f"{out} is not {done}: {', '.join(damaged[:3])} is not the file that {MANIFEST} lists.",
            hint=f"See what else differs: nirvana-deploy verify {out}. Make it again: repeat the command "
            "that made the folder, with --resume.",
        )
