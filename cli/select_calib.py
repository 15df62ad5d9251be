"""``nirvana-deploy select-calib MODEL``: choose calibration set, gamma and saliency by KL divergence."""

from __future__ import annotations

import click

from .common import TerminalProgress, echo_json, echo_table, json_option


@click.command("select-calib")
@click.argument("model")
@click.option(
    "--sparsity", type=float, required=True, help="Share of the decoder's linear weights to remove."
)
@click.option(
    "--candidates",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Disjoint calibration sets drawn from each corpus.",
)
@click.option(
    "--corpora",
    default="pydoc",
    show_default=True,
    help="Comma-separated: text or .jsonl files, pydoc, self, c4, bookcorpus, wikitext, lambada.",
)
@click.option(
    "--saliency",
    "saliencies",
    default="nirvana",
    show_default=True,
    help="Comma-separated saliencies to try.",
)
@click.option(
    "--gamma",
    "gammas",
    default="M/A",
    show_default=True,
    help="Comma-separated numbers or M/A to try, or 'auto' for a small grid.",
)
@click.option("--allocation", default="global", show_default=True, help="global or uniform.")
@click.option("--round-to", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--num-sequences", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--heldout-sequences",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    help="Held-out windows, shared equally among the corpora.",
)
@click.option("--heldout-len", type=click.IntRange(min=1), default=64, show_default=True)
@json_option
def select_calib(
    model: str,
    sparsity: float,
    candidates: int,
    corpora: str,
    saliencies: str,
    gammas: str,
    allocation: str,
    round_to: int,
    num_sequences: int,
    seq_len: int,
    seed: int,
    heldout_sequences: int,
    heldout_len: int,
    as_json: bool,
) -> None:
    """Try calibration sets, gammas and saliencies, and rank them by KL(dense || pruned).

    Each candidate is scored, planned and masked, never built. The KL is measured on held-out windows of
    every corpus, which no candidate contains. Writes nothing.

    \b
    Example:
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --candidates 4 --corpora pydoc,self
      nirvana-deploy select-calib smollm2 --sparsity 0.4 --candidates 1 --gamma auto --saliency nirvana,taylor
    """
    from nirvana_deploy.calibrate.windows import calibration_candidates
    from nirvana_deploy.model.checkpoint import Checkpoint
    from nirvana_deploy.model.sources import resolve_model
    from nirvana_deploy.prune.select import gamma_grid, select_calibration

    progress = TerminalProgress()
    source = resolve_model(model, progress=progress)
    checkpoint = Checkpoint.open(source.path)
    tokenizer, shape = checkpoint.tokenizer, checkpoint.shape
    names = _listed(corpora)
    sets = [
        calibration_candidates(
            name,
            tokenizer,
            candidates=candidates,
            num_sequences=num_sequences,
            seq_len=seq_len,
            seed=seed,
            heldout_sequences=-(-heldout_sequences // len(names)),
            heldout_len=heldout_len,
            checkpoint=checkpoint,
            progress=progress,
        )
        for name in names
    ]
    tried_gammas = (
        gamma_grid(shape, sparsity=sparsity, round_to=round_to)
        if gammas == "auto"
        else [_gamma(text) for text in _listed(gammas)]
    )
    selection = select_calibration(
        source.path,
        [calibration for one in sets for calibration in one.calibrations],
        [one.heldout for one in sets],
        sparsity=sparsity,
        saliencies=_listed(saliencies),
        gammas=tried_gammas,
        allocation=allocation,
        round_to=round_to,
        seed=seed,
        model_name=source.name,
        progress=progress,
    )
    if as_json:
        echo_json(selection.to_json())
        return
    echo_table(
        ("candidate (corpus seed.draw saliency gamma)", "KL, nats", "standard error", "behind", "+-"),
        [
            (
                one.name,
                _number(one.kl),
                _number(one.kl_standard_error),
                *_lag(one.behind, one.behind_standard_error),
            )
            for one in sorted(selection.candidates, key=lambda one: one.kl)
        ],
        title=f"KL(dense || pruned) on {selection.heldout_tokens:,} held-out tokens, sparsity {sparsity:g}",
    )
    click.echo(selection.verdict)


def _listed(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _gamma(text: str) -> float | None:
    """A gamma; None is M/A."""
    if text.upper() == "M/A":
        return None
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is neither a number nor M/A.", param_hint="--gamma") from None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _lag(behind: float, standard_error: float | None) -> tuple[str, str]:
    """Distance to the winner; nothing for the winner itself."""
    return (_number(behind), _number(standard_error)) if behind else ("", "")
