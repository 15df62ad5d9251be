"""One output folder being made: which stages are finished, what they cost, and the proof of both.

The manifest is written after each stage, last of its files. A stage counts as finished when the manifest
lists it, and every file it lists is there with its sha256.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from nirvana_deploy import __version__
from nirvana_deploy.base.artifact import files_under, sha256_of, take, write_bytes, write_json
from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.base.machine import cpu_seconds, environment, peak_rss_bytes, reset_peak_rss
from nirvana_deploy.base.ownership.lock import FolderLock
from nirvana_deploy.base.ownership.marker import TOOL, foreign, require_apart
from nirvana_deploy.base.ownership.temporary import remove_abandoned
from nirvana_deploy.base.progress import SILENT, Progress
from nirvana_deploy.base.reading import typed
from nirvana_deploy.base.resources import disk_errors, exhaustion_errors
from nirvana_deploy.base.units import format_bytes, format_seconds
from nirvana_deploy.output import manifest as manifests
from nirvana_deploy.output import owned
from nirvana_deploy.output.layout import MANIFEST
from nirvana_deploy.output.stage import Stage

Kind = TypeVar("Kind")


class Run:
    """The lifecycle of one output folder; :meth:`run` runs its stages in order.

    It holds the folder's lock from :meth:`begin`, or the first thing that it writes, until :meth:`close`,
    which is also what ``with`` calls. One that is refused before it has made a stage leaves its place as it
    was; :meth:`keep` is for work that is no stage.
    """

    def __init__(self, out: Path, manifest: dict[str, Any], *, progress: Progress = SILENT) -> None:
        self.out = out
        self.manifest = manifest
        self.progress = progress
        self.beside: tuple[Run, ...] = ()
        """Runs on the same model, whose stages are taken where they would come out the same."""
        self.expected: tuple[str, ...] = ()
        """Names of the stages that this command is going to ask for, in order, where they are known."""
        self.changed: frozenset[str] = frozenset()
        """Names of the options that a resumed run sets otherwise than the run before it."""
        self._lock: FolderLock | None = None
        self._made: set[str] = set()  # stages that this run made anew
        self._passed: list[str] = []  # stages asked for so far, in order
        self._claimed: set[str] = set()  # names that this run was the first to claim
        self._before: dict[Path, bytes | None] | None = None  # what it wrote over before its stages

    def __repr__(self) -> str:
        return f"Run({str(self.out)!r}, stages: {', '.join(self.manifest.get('stages', ())) or 'none'})"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        if isinstance(error[1], NirvanaError):
            self._put_back()
        self.close()

    @classmethod
    def begin(
        cls,
        out: Path,
        *,
        options: Mapping[str, Any],
        model: Mapping[str, Any],
        command: str,
        reads: Iterable[Path] = (),
        may_change: Collection[str] = (),
        resume: bool = False,
        force: bool = False,
        progress: Progress = SILENT,
    ) -> Run:
        """Start a new output folder, or continue one.

        An existing folder is refused unless ``resume`` (same options and same model: continue) or ``force``
        (start again; what is not this tool's stays, and is refused where it stands in the way). Options in
        ``may_change`` may differ in a resumed run. Raises NirvanaError otherwise, also for a place that is,
        contains or lies in what the run ``reads``; nothing is touched then.
        """
        require_apart(out, reads=reads, replaced=False)
        require_free(out, resume=resume, force=force)
        new = [folder for folder in (out, *out.parents) if not folder.exists()]
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        resumed = resume and (out / MANIFEST).is_file()
        run = cls.open(out, progress=progress) if resumed else cls(out, {}, progress=progress)
        try:
            run._take_lock()
            run._before = dict.fromkeys(reversed(new))
            if resumed:
                run.require_same(options, model, may_change)
                run.changed = run.differing(options)
                run.manifest["options"].update(options)
                run.manifest.pop("out", None)
                run.manifest |= {"environment": environment(), "complete": False}
                run.manifest |= manifests.seen_from_here(out)
            else:
                require_free(out, resume=resume, force=force)  # nobody has come in between
                run._start_again(options, model, command)
            for folder in {out, *((out / name).parent for name in run.manifest["makes"])}:
                remove_abandoned(folder)
        except BaseException as error:
            run.__exit__(type(error), error)
            raise
        return run

    def close(self) -> None:
        """Let others write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _start_again(self, options: Mapping[str, Any], model: Mapping[str, Any], command: str) -> None:
        self.manifest = {
            "schema": manifests.SCHEMA,
            "tool": f"{TOOL} {__version__}",
            "command": command,
            **manifests.seen_from_here(self.out),
            "options": dict(options),
            "model": dict(model),
            "environment": environment(),
            "run": secrets.token_hex(8),
            "complete": False,
            "makes": owned.names(self.out),
            "files": {},
            "stages": {},
        }
        self._write()

    @classmethod
    def open(cls, out: Path, *, writing: bool = False, progress: Progress = SILENT) -> Run:
        """Open a folder that this tool made; raises NirvanaError for anything else.

        ``writing`` takes the lock at once; otherwise the first stage that runs does.
        """
        if not (out / MANIFEST).is_file():
            raise NirvanaError(
                f"{out} is not an output folder of this tool: it has no {MANIFEST}.",
                hint=f"Did you mean {out.parent}?"
                if (out.parent / MANIFEST).is_file()
                else "Make one: nirvana-deploy prune-export MODEL --sparsity 0.4 --out DIR",
            )
        run = cls(out, manifests.read_manifest(out), progress=progress)
        if writing:
            run._take_lock()
        return run

    def run(self, stage: Stage, *, redo: bool = False) -> dict[str, Any]:
        """Run a stage unless it is finished; returns its result, from now or from the manifest.

        ``redo`` runs it although it is finished, and leaves what was made from it as it is.
        """
        self._take_lock()
        with ExitStack() as headings:
            for heading in self._headings(stage):
                headings.enter_context(self.progress.within(heading, otherwise=stage.name))
            return self._run(stage, redo=redo or stage.always)

    def _headings(self, stage: Stage) -> Iterator[str]:
        """Which of how many stages, and which model it is about."""
        if stage.name in self.expected:
            yield f"{self.expected.index(stage.name) + 1} of {len(self.expected)}"
        if stage.of is not None:
            yield stage.of

    def _run(self, stage: Stage, *, redo: bool) -> dict[str, Any]:
        if not redo and self._made.isdisjoint(stage.needs) and self.finished(stage.name):
            self._passed.append(stage.name)
            self.progress.note(f"{stage.name}: finished before, sha256 checked")
            return self.result(stage.name, dict[str, Any])
        self.claim(stage.makes)
        if not redo:
            self.forget(stage.name)
        self._made.add(stage.name)
        started, cpu_started = time.perf_counter(), cpu_seconds()
        reset_peak_rss()
        with self._tidy(stage), exhaustion_errors(f"The stage {stage.name!r}"):
            taken = self._taken(stage)
            result = manifests.plain(stage.work() if taken is None else taken)
        files = self._hashes(stage.makes)
        for file in files:  # what belongs to a stage from now on
            self.manifest["files"].pop(file, None)
        self.manifest["stages"][stage.name] = {
            "run": self.manifest["run"],
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(cpu_seconds() - cpu_started, 3),
            "peak_rss_bytes": peak_rss_bytes(),
            "needs": [name for name in stage.needs if self.has(name)],
            "files": files,
            "result": result,
        }
        if not redo:
            self._passed.append(stage.name)
            self.manifest["stages"] = manifests.in_order(self.manifest["stages"], self._passed)
        self._before = None
        self._write()
        self.progress.detail(self._said(stage))
        return result

    def _said(self, stage: Stage) -> str:
        """What a stage that has just run took and wrote."""
        done = self.manifest["stages"][stage.name]
        wrote = [name for name in stage.makes if (self.out / name).exists()]
        took, cpu = format_seconds(done["seconds"]), format_seconds(done["cpu_seconds"])
        at_most = format_bytes(done["peak_rss_bytes"])
        return f"{stage.name} took {took}, {cpu} of CPU, at most {at_most}" + (
            f"; wrote {', '.join(wrote)}" if wrote else ""
        )

    def _taken(self, stage: Stage) -> dict[str, Any] | None:
        """The result of a stage, its files taken from a run beside; None if none has made the same."""
        for other in self.beside:
            if not (other.has(stage.name) and self._same(stage, other) and other.finished(stage.name)):
                continue
            self.progress.note(f"{stage.name}: taken from {other.out}")
            for name in stage.makes:
                if (other.out / name).exists():
                    take(other.out / name, self.out / name)
            return other.result(stage.name, dict[str, Any])
        return None

    def _same(self, stage: Stage, other: Run) -> bool:
        """Whether ``other`` made a stage of the same options, and of the same files and results."""
        mine, its = self.manifest, other.manifest
        names = {*mine["options"], *its["options"]} if stage.reads is None else stage.reads
        if any(mine["options"].get(name) != its["options"].get(name) for name in names):
            return False
        needs = [name for name in stage.needs if self.has(name)]
        return its["stages"][stage.name]["needs"] == needs and all(
            mine["stages"][name][key] == its["stages"][name][key]
            for name in needs
            for key in ("files", "result")
        )

    def claim(self, names: Iterable[str]) -> None:
        """Say in the manifest that ``names`` are this tool's, before they are written.

        Raises NirvanaError if one of them is there and somebody else's.
        """
        self._take_lock()
        names = list(names)
        if others := list(owned.strangers(self.out, names, self.manifest)):
            raise foreign(self.out / others[0], others)
        if new := set(names).difference(self.manifest["makes"]):
            self._claimed |= new
            self.manifest["makes"] = sorted(new.union(self.manifest["makes"]))
            self._write()

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The place of a file that belongs to no stage; the manifest knows it afterwards."""
        self.claim([name])
        self._remember(name)
        yield self.out / name
        self.manifest["files"][name] = sha256_of(self.out / name)
        self._write()

    def keep(self) -> None:
        """From now on a refusal leaves what was made."""
        self._before = None

    def finish(self) -> None:
        """Say that the command has made all that it promised; remove what a run before this one left."""
        self.keep()
        listed = self.listed()
        for name in list(self.manifest["makes"]):
            if name in listed or any(file.startswith(f"{name}/") for file in listed):
                continue
            if not list(owned.strangers(self.out, [name], self.manifest)):
                if os.path.lexists(self.out / name):
                    self.progress.note(f"Removed {self.out / name}, which the run before had made")
                owned.remove(self.out, name)
                self.manifest["makes"].remove(name)
        self.manifest["complete"] = True
        self._write()

    @contextmanager
    def _tidy(self, stage: Stage) -> Iterator[None]:
        """Leave no empty folder around what a stage that fails was to make."""
        try:
            yield
        except BaseException:
            for around in {(self.out / name).parent for name in stage.makes} - {self.out}:
                with suppress(OSError):
                    around.rmdir()
            raise

    def _take_lock(self) -> None:
        """Keep others out; the manifest is as they left it."""
        if self._lock is None:
            with disk_errors(self.out):
                self._lock = FolderLock(self.out)
            if self.manifest:
                self.manifest = manifests.read_manifest(self.out)
                if not manifests.is_ours(self.manifest):
                    raise NirvanaError(
                        f"{self.out / MANIFEST} does not say which files are this tool's.",
                        hint="Another version wrote it, or it was edited: make the folder again, elsewhere.",
                    )

    def _write(self) -> None:
        self._remember(MANIFEST)
        write_json(self.out / MANIFEST, self.manifest)

    def _remember(self, name: str) -> None:
        """Keep what is about to be written over, while this run has made nothing."""
        path = self.out / name
        if self._before is not None and path not in self._before:
            self._before[path] = path.read_bytes() if path.is_file() else None

    def _put_back(self) -> None:
        """Leave the place as it was, if this run has made nothing."""
        if self._before is None:
            return
        before, self._before = self._before, None
        for name in self._claimed:
            owned.remove(self.out, name)
        self.close()  # the lock's file lies in the folder
        for path, content in reversed(before.items()):
            with suppress(OSError):
                if content is not None:
                    write_bytes(path, content)
                elif path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()

    @property
    def model_name(self) -> str:
        """The name of the dense model."""
        name: str = self.manifest["model"]["name"]
        return name

    def has(self, name: str) -> bool:
        """Whether the manifest knows a stage."""
        return name in self.manifest["stages"]

    @property
    def dense(self) -> Path:
        """Where the dense model was; raises NirvanaError for a manifest that does not say it."""
        path = self.manifest["model"].get("path")
        if path is None:
            raise NirvanaError(f"{self.out / MANIFEST}: model has no 'path'.")
        return Path(path)

    def result(self, name: str, kind: type[Kind]) -> Kind:
        """What a stage recorded.

        Raises KeyError when the run has none of that name, and NirvanaError when it recorded something else.
        """
        where = f"{self.out / MANIFEST}: the result of stage {name!r}"
        return typed(self.manifest["stages"][name]["result"], kind, where)

    def finished(self, name: str) -> bool:
        """Whether the stage is in the manifest, did not fail, and its files are what it says."""
        stage = self.manifest["stages"].get(name)
        return stage is not None and not manifests.failed(stage["result"]) and not self.damaged(name)

    def listed(self) -> dict[str, str]:
        """Every file that the manifest knows -> its sha256."""
        return manifests.listed(self.manifest)

    def damaged(self, name: str | None = None) -> list[str]:
        """Files of a recorded stage [of the manifest] that are missing or whose sha256 differs."""
        files = self.listed() if name is None else self.manifest["stages"][name]["files"]
        return [
            file
            for file, sha256 in files.items()
            if not (self.out / file).is_file() or sha256_of(self.out / file) != sha256
        ]

    def rehash(self, name: str) -> None:
        """Accept the present bytes of a recorded stage's files: they were rewritten on purpose."""
        stage = self.manifest["stages"][name]
        stage["files"] = self._hashes(list(stage["files"]))
        self._write()

    def forget(self, name: str) -> None:
        """Drop a stage and all that was made from it: it is about to be made anew."""
        if not self.has(name):
            return
        for one in manifests.made_from(self.manifest, name):
            del self.manifest["stages"][one]
        self._write()

    def drop(self, names: Collection[str]) -> None:
        """Forget those of the stages ``names`` that it has, and remove their files: they hold no more."""
        if gone := [name for name in names if self.has(name)]:
            for name in gone:
                for file in self.manifest["stages"][name]["files"]:
                    self._remember(file)
                    owned.remove(self.out, file)
                del self.manifest["stages"][name]
            self._write()

    def _hashes(self, outputs: Sequence[str]) -> dict[str, str]:
        files = [file for output in outputs for file in files_under(self.out / output)]
        return {file.relative_to(self.out).as_posix(): sha256_of(file) for file in files}

    def differing(self, options: Mapping[str, Any]) -> frozenset[str]:
        """The names of ``options`` that the folder was made with other values of."""
        before = self.manifest["options"]
        return frozenset(name for name in options if name in before and before[name] != options[name])

    def require_same(
        self, options: Mapping[str, Any], model: Mapping[str, Any], may_change: Collection[str]
    ) -> None:
        """Raise NirvanaError unless the folder was made with these options, of the same weights."""
        before = {**self.manifest["options"], "model files": self.manifest["model"]["files"]}
        now = {**options, "model files": model["files"]}
        differing = [
            key for key in now if key in before and before[key] != now[key] and key not in may_change
        ]
        if differing:
            key = differing[0]
            what = "other weights" if key == "model files" else f"{key} {before.get(key)!r}, not {now[key]!r}"
            raise NirvanaError(
                f"{self.out} cannot be resumed: it was made with {what}.",
                hint="Repeat the command with the same options, or pass --force to start again.",
            )


def require_free(out: Path, *, resume: bool, force: bool) -> None:
    """Raise NirvanaError if something stands in the way of a new run."""
    if resume and (out / MANIFEST).is_file():
        return
    if not out.exists() or (out.is_dir() and not owned.occupied(out)):
        return
    if not out.is_dir():
        raise foreign(out, [out.name])
    if others := owned.in_the_way(out):
        raise foreign(out, others)
    if not force:
        known = "It holds a run of this tool." if (out / MANIFEST).is_file() else "It is not empty."
        raise NirvanaError(
            f"{out} exists already. {known}",
            hint="Pass --resume to continue it, --force to start again, or another --out DIR.",
        )
