"""A cut of a tiny model, trained on a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from builders.plans import logits_of, plan_for
from builders.tiny import write_tiny
from builders.tiny_t5 import write_t5
from nirvana_deploy.base.progress import SILENT
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.recover.recipe import Recovery
from nirvana_deploy.recover.recovery import TextWanted, Trained, recover_checkpoint

SEQ_LEN = 24
SHORT = {"recover": "1200", "recover_batch": 4, "learning_rate": 2e-3, "recover_dtype": "float32"}
"""Float32, for equations."""


def model_of(kind: str, folder: Path) -> Path:
    return write_t5(folder, kind) if "t5" in kind else write_tiny(folder, kind)


class Cut:
    """A model, a cut of it, and what recovering it takes."""

    def __init__(self, folder: Path, kind: str, text: Path) -> None:
        self.folder, self.text = folder, text
        self.dense = Checkpoint.open(model_of(kind, folder / "dense"))
        self.plan = plan_for(self.dense.path, sparsity=0.3)
        slice_checkpoint(self.dense, self.plan, folder / "cut")
        self.cut = Checkpoint.open(folder / "cut")
        self.windows = np.random.default_rng(4).integers(3, self.dense.shape.vocab_size, (16, SEQ_LEN))

    def recover(self, out: str = "recovery", **options: Any) -> Trained:
        recipe = Recovery(**{**SHORT, "recover_text": str(self.text), **options})
        return recover_checkpoint(
            self.cut,
            self.dense,
            recipe,
            TextWanted(seq_len=SEQ_LEN, segment_tokens=SEQ_LEN, seed=1),
            self.folder / out,
            state=self.folder / "state",
            identity={"lr": recipe.learning_rate},
            calibration=self.windows,
            progress=SILENT,
        )


def kl_of(pruned: Checkpoint, dense: Checkpoint, windows: NDArray[np.int64]) -> float:
    """KL(dense || pruned) from whole logits of transformers, in float64."""
    if dense.shape.family.encoder_decoder:
        from nirvana_deploy.model.reading import stack_tokens

        inputs = [torch.from_numpy(t) for t in stack_tokens(dense.shape.family, dense.config, windows)]
        given = {"input_ids": inputs[0], "decoder_input_ids": inputs[1]}
        with torch.no_grad():
            log_p, log_q = (one.load()(**given).logits.double().log_softmax(-1) for one in (dense, pruned))
    else:
        log_p, log_q = (logits_of(one.path, windows).double().log_softmax(-1) for one in (dense, pruned))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
