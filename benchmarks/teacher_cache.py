"""How to keep a teacher on disk: its states in float16, or its k largest log-probabilities.

    python benchmarks/teacher_cache.py OUT --text test.txt

OUT is a folder that `nirvana-deploy prune` or `prune-export` made. For both ways: the bytes a position, and
how much of the KL between the dense model and the cut is lost on windows of 256 tokens of --text. With the k
largest alone, the KL within what they leave out cannot be seen; with states, it is what float16 rounds away.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from nirvana_deploy.calibrate.texts import read_text_file
from nirvana_deploy.calibrate.windows import windows_of_text
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.output.layout import CHECKPOINT
from nirvana_deploy.output.run import Run
from nirvana_deploy.recover.learning.states import StatesOf

_BYTES_OF_A_PAIR = 6
"""An id below 2^32 and a float16."""


def lost_in_rest(log_p: torch.Tensor, log_q: torch.Tensor, k: int) -> float:
    """Share of sum KL(p || q) of rows [P, V] that is within all but the k largest p of each row."""
    top = log_p.topk(k, dim=-1).indices
    rest = torch.ones_like(log_p, dtype=torch.bool).scatter_(-1, top, False)
    p, q = log_p.exp() * rest, log_q.exp() * rest
    mass = p.sum(-1) * (p.sum(-1).log() - q.sum(-1).log())
    within = (p * (log_p - log_q)).sum(-1) - mass.nan_to_num()
    return float(within.sum() / (log_p.exp() * (log_p - log_q)).sum())


@torch.no_grad()
def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    with Run.open(options.out) as run:
        dense = Checkpoint.open(run.dense)
    cut = Checkpoint.open(options.out / CHECKPOINT)
    text = read_text_file(options.text)
    drawn = windows_of_text(text, dense.tokenizer, seq_len=256, max_sequences=options.windows).tokens
    windows = torch.from_numpy(drawn)
    teacher, student = StatesOf(dense, dense.load()), StatesOf(cut, cut.load())
    states = teacher.states(windows).flatten(0, 1)
    log_p = teacher.logits()(states).double().log_softmax(-1)
    log_q = student.logits()(student.states(windows).flatten(0, 1)).double().log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    print(f"KL(dense || cut) {kl:.3f} nats a position, {len(states):,} positions")
    for k in 2 ** np.arange(4, 15):
        lost = lost_in_rest(log_p, log_q, int(k))
        print(f"{k:6} largest: {_BYTES_OF_A_PAIR * k:7,} bytes a position, {lost:.2%} of the KL is not seen")
    sizes = states.abs().amax(-1, keepdim=True)
    log_s = teacher.logits()((states / sizes).half().float() * sizes).double().log_softmax(-1)
    stored = float((log_s.exp() * (log_s - log_q)).sum(-1).mean())
    position_bytes = 2 * dense.shape.hidden_size + 4
    print(f"states in float16: {position_bytes:,} bytes a position, the KL differs by {stored / kl - 1:+.4%}")


if __name__ == "__main__":
    main()
