"""One output folder being made: which stages are finished, what they cost, and the proof of both.

The manifest is written after each stage, last of its files. A stage counts as finished when the manifest
lists it, every file it lists is there with its sha256, and every stage before it is finished too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nirvana_deploy import __version__
from nirvana_deploy.base.artifact import files_under, read_json, remove_partials, sha256_of, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import cpu_seconds, environment, peak_rss_bytes, reset_peak_rss
from nirvana_deploy.base.progress import SILENT, Progress

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1

_MAY_CHANGE = ("baseline", "benchmark", "engines", "quantize", "threads")
"""Options that a resumed run may change: they add stages and change none that is finished."""


class Run:
    """The lifecycle of one output folder; stages are run through :meth:`stage` in order."""

    def __init__(self, out: Path, manifest: dict[str, Any], *, progress: Progress = SILENT) -> None:
        self.out = out
        self.manifest = manifest
        self.progress = progress
        self._all_finished = True  # every stage asked for so far was taken from disk
        self._passed: list[str] = []  # stages asked for so far, in order

    @classmethod
    def begin(
        cls,
        out: Path,
        *,
        options: Mapping[str, Any],
        model: Mapping[str, Any],
        command: str,
        resume: bool = False,
        force: bool = False,
        progress: Progress = SILENT,
    ) -> Run:
        """Start a new output folder, or continue one.

        An existing folder is refused unless ``resume`` (same options and same model: continue) or ``force``
        (start again; files that are not this tool's stay). Raises NirvanaError otherwise.
        """
        manifest_path = out / MANIFEST
        remove_partials(out)
        if resume and manifest_path.is_file():
            run = cls.open(out, progress=progress)
            run._require_same(options, model)
            run.manifest["options"].update(options)
            run.manifest["environment"] = environment()
            return run
        occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if occupied and not force:
            known = "It holds a run of this tool." if manifest_path.is_file() else "It is not empty."
            raise NirvanaError(
                f"{out} exists already. {known}",
                hint="Pass --resume to continue it, --force to start again, or another --out DIR.",
            )
        manifest = {
            "schema": MANIFEST_SCHEMA,
            "tool": f"nirvana-deploy {__version__}",
            "command": command,
            "options": dict(options),
            "model": dict(model),
            "environment": environment(),
            "stages": {},
        }
        write_json(manifest_path, manifest)
        return cls(out, manifest, progress=progress)

    @classmethod
    def open(cls, out: Path, *, progress: Progress = SILENT) -> Run:
        """Open a folder that this tool made; raises NirvanaError for anything else."""
        if not (out / MANIFEST).is_file():
            raise NirvanaError(
                f"{out} is not an output folder of this tool: it has no {MANIFEST}.",
                hint="Make one: nirvana-deploy prune-export MODEL --sparsity 0.4 --out DIR",
            )
        manifest = read_json(out / MANIFEST)
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != MANIFEST_SCHEMA:
            raise NirvanaError(
                f"{out / MANIFEST} has schema {schema!r}; this version reads schema {MANIFEST_SCHEMA}.",
                hint="pip install --upgrade nirvana-deploy",
            )
        return cls(out, manifest, progress=progress)

    def stage(
        self,
        name: str,
        outputs: Sequence[str],
        work: Callable[[], Mapping[str, Any] | None],
        *,
        redo: bool = False,
    ) -> dict[str, Any]:
        """Run ``work`` unless the stage is finished; returns its result, from now or from the manifest.

        ``outputs`` are the files and folders, relative to the output folder, that ``work`` writes. ``redo``
        runs it although it is finished.
        """
        if not redo and self._all_finished and self.finished(name):
            self._passed.append(name)
            self.progress.note(f"{name}: finished before, sha256 checked")
            result: dict[str, Any] = self.manifest["stages"][name]["result"]
            return result
        if not redo:
            self._forget_from(name)
        self._all_finished = False
        started, cpu_started = time.perf_counter(), cpu_seconds()
        reset_peak_rss()
        result = dict(work() or {})
        self.manifest["stages"][name] = {
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(cpu_seconds() - cpu_started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "files": self._hashes(outputs),
            "result": result,
        }
        if not redo:
            self._passed.append(name)
            self._in_order()
        write_json(self.out / MANIFEST, self.manifest)
        return result

    def finished(self, name: str) -> bool:
        """Whether the stage is in the manifest, did not fail, and its files are what it says."""
        stage = self.manifest["stages"].get(name)
        return stage is not None and not _failed(stage["result"]) and not self.damaged(name)

    def damaged(self, name: str) -> list[str]:
        """Files of a recorded stage that are missing or whose sha256 differs."""
        return [
            file
            for file, sha256 in self.manifest["stages"][name]["files"].items()
            if not (self.out / file).is_file() or sha256_of(self.out / file) != sha256
        ]

    def rehash(self, name: str) -> None:
        """Accept the present bytes of a recorded stage's files: they were rewritten on purpose."""
        stage = self.manifest["stages"][name]
        stage["files"] = self._hashes(list(stage["files"]))
        write_json(self.out / MANIFEST, self.manifest)

    def _in_order(self) -> None:
        """A stage that a resumed run adds stands behind those it followed, ahead of what follows it."""
        stages = self.manifest["stages"]
        names = [*self._passed, *(name for name in stages if name not in self._passed)]
        self.manifest["stages"] = {name: stages[name] for name in names}

    def _forget_from(self, name: str) -> None:
        """Drop ``name`` and whatever was recorded after it: it is about to be made anew."""
        stages = self.manifest["stages"]
        if name in stages:
            names = list(stages)
            for later in names[names.index(name) :]:
                del stages[later]
            write_json(self.out / MANIFEST, self.manifest)

    def _hashes(self, outputs: Sequence[str]) -> dict[str, str]:
        files = [file for output in outputs for file in files_under(self.out / output)]
        return {file.relative_to(self.out).as_posix(): sha256_of(file) for file in files}

    def _require_same(self, options: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        before = {**self.manifest["options"], "model files": self.manifest["model"]["files"]}
        now = {**options, "model files": model["files"]}
        differing = [
            key for key in now if key in before and before[key] != now[key] and key not in _MAY_CHANGE
        ]
        if differing:
            key = differing[0]
            what = "other weights" if key == "model files" else f"{key} {before.get(key)!r}, not {now[key]!r}"
            raise NirvanaError(
                f"{self.out} cannot be resumed: it was made with {what}.",
                hint="Repeat the command with the same options, or pass --force to start again.",
            )


def _failed(result: Mapping[str, Any]) -> bool:
    """Whether a result, or a part of it, says that it did not pass."""
    return any(isinstance(part, Mapping) and part.get("passed") is False for part in result.values())
