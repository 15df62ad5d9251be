"""Workloads and sweeps as they are asked for: read, and held against the models before any work."""

from __future__ import annotations

from collections.abc import Sequence

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.measure.recipe import Traffic, Workload
from nirvana_deploy.measure.rounds.processes import Model
from nirvana_deploy.measure.workloads.named import NamedWorkload, load_workloads, require_within_context
from nirvana_deploy.measure.workloads.sweep import Sweep, sweeps_of
from nirvana_deploy.runtime.registry import KINDS, kind_of
from nirvana_deploy.serve.model import require_servable
from nirvana_deploy.serve.server import require_extra

Asked = tuple[tuple[NamedWorkload, ...], tuple[Sweep, ...]]


def traffic_asked(asked: Traffic, base: Workload, *, again: str) -> Asked:
    """The workloads and sweeps of ``asked``; ``again`` is the command without them.

    Raises NirvanaError for nothing, for an unknown name, and for a file that says something impossible.
    """
    workloads, sweeps = load_workloads(asked.workloads), sweeps_of(asked.sweeps, base)
    if not workloads and not sweeps:
        raise NirvanaError(
            "No workload and no sweep is asked for.", hint=f"{again} --workload chat --sweep batch=1,2,4"
        )
    return workloads, sweeps


def require_context(asked: Asked, context_tokens: int | None, *, again: str) -> None:
    """Raise NirvanaError where a context, None for an endless one, has no room for what is asked."""
    workloads, sweeps = asked
    for one in workloads:
        hint = f"Write a shorter one, and name its file: {again} --workload mine.toml"
        require_within_context(one.name, one.longest(), context_tokens=context_tokens, hint=hint)
    for sweep in sweeps:
        fitting = sweep.within(context_tokens) if context_tokens is not None else ()
        less = f" --sweep {sweep.axis}={','.join(map(str, fitting))}" if len(fitting) > 1 else ""
        hint = f"{again}{less}" if less else f"Ask for less: {again} --prompt-tokens N --new-tokens N"
        require_within_context(sweep.label, sweep.longest(), context_tokens=context_tokens, hint=hint)


def require_served(workloads: Sequence[NamedWorkload], models: Sequence[Model]) -> None:
    """Raise NirvanaError where a workload asks servers, and one of ``models`` has none, or nothing serves."""
    asking = next((one for one in workloads if one.file.concurrency), None)
    if asking is None:
        return
    require_extra()
    for model in models:
        try:
            if (kind := kind_of(model.path)) != "onnx":
                raise NirvanaError(f"{model.path} is {KINDS[kind]}, and what is served is {KINDS['onnx']}.")
            require_servable(model.path)
        except NirvanaError as error:
            raise NirvanaError(
                f"{asking.name} has concurrency = {asking.file.concurrency}, so each model is asked through "
                f"a server, and {model.name} cannot be: {error.message}",
                hint="Leave that model out, or concurrency: in batches and one by one all are timed.",
            ) from error
