"""What ``--dry-run`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nirvana_deploy.base.units import format_bytes, format_count, format_number

from .common import echo, echo_json, echo_table

if TYPE_CHECKING:
    from nirvana_deploy.pipeline.forecast.forecast import Forecast, Planned, Speed
    from nirvana_deploy.pipeline.forecast.search import SearchForecast
    from nirvana_deploy.pipeline.forecast.target import TargetForecast


def show_forecast(planned: Planned, *, as_json: bool) -> None:
    """Print what a job would take; then raises NirvanaError where it would be refused for lack of room."""
    found = planned.forecast
    if as_json:
        echo_json(found.to_json())
        return
    echo_table(
        ["Stage", "Would write", "Would take about"],
        [
            [one.name, "", "finished before"]
            if one.finished
            else [one.name, format_bytes(one.written_bytes) if one.written_bytes else "", _time(one.seconds)]
            for one in found.stages
        ],
        title=f"{found.model} ({format_count(found.parameters)} parameters), sparsity {found.sparsity:g}, "
        f"into {found.out}",
    )
    for line in _lines(found):
        echo(line)
    planned.require_room()


def show_search(found: SearchForecast, *, as_json: bool) -> None:
    """Print what a search would take."""
    if as_json:
        echo_json(found.to_json())
        return
    rows = [
        [cut.out.name, format_bytes(cut.written_bytes), _time(sum(one.seconds for one in cut.left))]
        if cut.left
        else [cut.out.name, "", "finished before"]
        for cut in found.cuts
    ]
    title = f"{len(found.cuts) + len(found.refused)} cuts, {found.points} points, into {found.out}"
    echo_table(["Cut", "Would write", "Would take about"], rows, title=title)
    for name, why in found.refused.items():
        echo(f"{name} cannot be made, and would be left out: {why}")
    if not any(cut.left for cut in found.cuts):
        echo("All of it is finished.")
        return
    cut = found.cuts[0]
    written = sum(cut.written_bytes for cut in found.cuts)
    echo(f"Disk: {format_bytes(written)} of files; {format_bytes(cut.free_disk_bytes)} are free.")
    memory = max(cut.largest.memory_bytes for cut in found.cuts if cut.largest is not None)
    echo(f"Memory: about {format_bytes(memory)} at most; {format_bytes(cut.free_memory_bytes)} are free.")
    echo(time_line(*found.seconds, cut.speed))
    echo("One after another, timing of the best points left out. Nothing was written.")


def show_target(found: TargetForecast, *, as_json: bool) -> None:
    """Print what a job with a budget would take."""
    if as_json:
        echo_json(found.to_json())
        return
    parts = {
        "the first cut": found.first,
        f"each further cut, {found.most_further} at most": found.further,
        "the job at the sparsity found": found.job,
    }
    rows = [
        [name, format_bytes(part.written_bytes), _time(sum(one.seconds for one in part.left))]
        for name, part in parts.items()
    ]
    title = f"{found.first.model} under a budget, into {found.out}"
    echo_table(["Part", "Would write", "Would take about"], rows, title=title)
    first = found.first
    most = first.written_bytes + found.most_further * found.further.written_bytes
    echo(f"Disk: {format_bytes(most)} of files at most; {format_bytes(first.free_disk_bytes)} are free.")
    echo(time_line(*found.seconds, first.speed))
    echo(f"Counted at sparsity {first.sparsity:g}; timing of what is tried left out. Nothing was written.")


def time_line(least_s: float, most_s: float, speed: Speed) -> str:
    """How long a job takes, and how that is known."""
    return (
        f"Time: {_time(least_s)} to {_time(most_s)}. An estimate: operations counted, over the "
        f"{format_number(speed.operations_per_s / 1e9)} GFLOP/s of float32 products and "
        f"{format_number(speed.read_bytes_per_s / 1e9)} GB/s of reads that this machine reached just now."
    )


def _lines(found: Forecast) -> list[str]:
    if not found.left:
        return ["All of it is finished."]
    spilled = f", and {format_bytes(found.spilled_bytes)} on the way" if found.spilled_bytes else ""
    largest = found.largest
    assert largest is not None
    written = f"{format_bytes(found.written_bytes)} of files" if found.written_bytes else "records alone"
    return [
        f"Disk: {written}{spilled}; {format_bytes(found.free_disk_bytes)} are free.",
        f"Memory: about {format_bytes(largest.memory_bytes)} at most, in {largest.name}; "
        f"{format_bytes(found.free_memory_bytes)} are free.",
        time_line(*found.seconds, found.speed),
        "Nothing was written.",
    ]


def _time(value_s: float) -> str:
    """Two digits: an estimate has no more."""
    if value_s < 99.5:
        return f"{max(1.0, float(f'{value_s:.2g}')):g} s"
    minutes = float(f"{value_s / 60:.2g}")
    return f"{minutes:g} min" if minutes < 100 else f"{value_s / 3600:,.2g} h"
