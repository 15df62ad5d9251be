"""Figure of a recovery: held-out KL against tokens, from the cut on."""

from __future__ import annotations

from nirvana_deploy.base.units import format_number
from nirvana_deploy.output import stage
from nirvana_deploy.output.records import Records
from nirvana_deploy.recover.record import Recovered
from nirvana_deploy.report.drawing import COLOURS, bare, entitle, inline_svg, name_axes, new_figure


def recovery_of(records: Records) -> Recovered | None:
    """The record of a recovery, if there was one."""
    return records.result(stage.RECOVER, Recovered)


def recovery_figure(done: Recovered) -> str:
    """Draw the KL of the watching windows against the tokens read; the state that was kept is marked."""
    figure = new_figure(2.8)
    axes = figure.subplots()
    bare(axes, ticks=True)
    thousands = [point.tokens / 1000 for point in done.curve]
    divergences = [point.kl for point in done.curve]
    axes.plot(thousands, divergences, color=COLOURS["first"], linewidth=1.6, marker="o", markersize=4)
    if done.other_text is not None:
        others = [point.other_kl or 0.0 for point in done.curve]
        axes.plot(thousands, others, color=COLOURS["first"], linewidth=1.2, linestyle="--")
        divergences = [*divergences, *others]
    kept = next(point for point in done.curve if point.step == done.kept_step)
    axes.plot([kept.tokens / 1000], [kept.kl], color=COLOURS["second"], marker="o", markersize=8)
    axes.set_ylim(0, 1.1 * max(divergences))
    axes.margins(x=0.02)
    name_axes(axes, x="thousands of tokens", y="nats per token")
    entitle(axes, "Recovery: KL to dense on text set aside")
    alt = (
        f"KL to the dense model on text set aside, from {format_number(done.curve[0].kl)} nats before "
        f"training to {format_number(kept.kl)} after {kept.tokens:,} tokens."
    )
    return inline_svg(figure, name="recovery", alt=alt)


def caption(done: Recovered) -> str:
    """What was done, and what the cut was like before."""
    of_quality = f"perplexity {format_number(done.cut_perplexity)}, KL {format_number(done.cut_kl)}"
    steps = done.options.get("recover_steps", 1)
    last = f"The last of {steps} steps: " if steps > 1 else ""
    return (
        f"{last}{done.options['recover_method']}, {done.tokens:,} tokens of {done.text} "
        f"({done.train_windows:,} windows of {done.window_tokens}), {done.seconds / 60:,.1f} minutes and "
        f"{done.writing_seconds / 60:,.1f} for the text, learning rate {done.learning_rate:g}. Orange: the "
        f"state that was kept. Before, on the text of the quality table: {of_quality}."
        + (f" Dashed: {done.other_text}, not trained on; it has half a say." if done.other_text else "")
        + (f" {done.stopped}" if done.stopped else "")
    )
