"""The loop: transformers' ``Trainer`` with the loss of ``student.py`` and a held-out KL that watches.

AdamW (0.9, 0.99) without decay, gradients clipped at 1, a warm-up, then a cosine to a twentieth of the
learning rate unless another schedule is asked for. States are saved at each measurement; a killed run goes on
from the last whole one, and its course is that of an undisturbed one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from nirvana_deploy.base.ownership.temporary import remove
from nirvana_deploy.base.progress import Advance
from nirvana_deploy.base.resources import disk_errors
from nirvana_deploy.prune.streaming.processes import is_first
from nirvana_deploy.recover.learning.dtype import computing
from nirvana_deploy.recover.learning.logs import LOG_FOLDER, NOWHERE, told
from nirvana_deploy.recover.learning.student import Student, parts_of, require_finite
from nirvana_deploy.recover.loop import Course, Loop
from nirvana_deploy.recover.processes import share_of
from nirvana_deploy.recover.record import CurvePoint


class _Windows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, tokens: NDArray[np.int64]) -> None:
        self._tokens = torch.from_numpy(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"windows": self._tokens[index], "numbers": index}


class _Watched(Trainer):  # type: ignore[misc, unused-ignore]
    """Measures the KL of watching windows in place of a loss, and says where a loss is no number."""

    control: TrainerControl

    def __init__(
        self, student: Student, watch: NDArray[np.int64], *, first: int, batch: int, **kwargs: Any
    ) -> None:
        """``first`` is the number of the first watching window."""
        super().__init__(model=student, **kwargs)
        self._student, self._batch = student, batch
        self._watch, self._first = torch.from_numpy(watch), first
        self._wanted: list[torch.Tensor] | None = None
        self._before, self._started = 0.0, time.perf_counter()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        step, rate = self.state.global_step + 1, float(self.lr_scheduler.get_last_lr()[0])
        require_finite(float(loss), step=step, learning_rate=rate)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        was_training = self._student.training
        self._student.eval()
        parts = [one.to(self.args.device) for one in parts_of(self._watch, self._batch)]
        with computing(self.args.bf16):  # as a step does
            if self._wanted is None:  # the dense model stays as it is
                numbers = parts_of(torch.arange(self._first, self._first + len(self._watch)), self._batch)
                self._wanted = [self._student.wanted_states(*one) for one in zip(parts, numbers, strict=True)]
            total = sum(self._student.heldout_kl(*one) for one in zip(parts, self._wanted, strict=True))
        self._student.train(was_training)
        metrics = {"eval_kl": total / self._student.positions(self._watch)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=self._student.trained())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the time that training has taken, over all runs of it."""
        super().log({**logs, "seconds": self.seconds}, *args, **kwargs)

    @property
    def seconds(self) -> float:
        """Since the start, those of a killed run included."""
        return self._before + time.perf_counter() - self._started

    def go_on(self, folder: Path | None) -> None:
        """Train, from a saved state if there is one."""
        if folder is not None:
            history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
            self._before = float(history[-1]["seconds"])
        self._started = time.perf_counter()
        self.train(resume_from_checkpoint=None if folder is None else str(folder))


class _Told(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Advances a task, and nothing on stdout."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._advance(1)


def fit(
    student: Student,
    train: NDArray[np.int64],
    watch: NDArray[np.int64],
    loop: Loop,
    *,
    state: Path,
    begin: Path | None,
    log: str,
    advance: Advance,
) -> Course:
    """Train ``student`` in place on windows [N, T]; it ends as the best state by the watching windows [M, T].

    ``state`` is the folder of saved states, and ``begin`` the one to go on from; ``log`` is told the course.
    Raises NirvanaError for a loss that is not finite (the states before stay) and a full disk.
    """
    every, (schedule, shape) = loop.measured_every, loop.scheduler
    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=loop.steps,
        per_device_train_batch_size=loop.micro_batch,
        gradient_accumulation_steps=share_of(loop.step_windows) // loop.micro_batch,
        learning_rate=loop.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=shape,
        warmup_steps=loop.warm_up_steps,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        seed=loop.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=loop.bfloat16,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="kl",
        greater_is_better=False,
        logging_steps=every,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",  # its callbacks are given below
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    begin_step = 0 if begin is None else int(begin.name.rpartition("-")[2])
    advance(begin_step)
    where = log if is_first() else NOWHERE
    with _quiet(), disk_errors(state), told(where, state / LOG_FOLDER, begin_step=begin_step) as tellers:
        trainer = _Watched(
            student,
            watch,
            first=len(train),
            batch=loop.micro_batch,
            args=arguments,
            train_dataset=_Windows(train),
            eval_dataset=_Windows(watch),
            callbacks=[EarlyStoppingCallback(loop.patience), _Told(advance), *tellers],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.go_on(begin)
    return _course(trainer.state.log_history, loop, train.shape[1], trainer.seconds)


def _course(history: Sequence[dict[str, Any]], loop: Loop, window_tokens: int, seconds: float) -> Course:
    measured = {entry["step"]: entry for entry in history if "eval_kl" in entry}
    curve = tuple(
        CurvePoint(
            step=step,
            tokens=step * loop.step_windows * window_tokens,
            seconds=round(entry["seconds"], 3),
            kl=entry["eval_kl"],
        )
        for step, entry in sorted(measured.items())
    )
    best = min(curve, key=lambda point: point.kl)
    return Course(curve=curve, kept_step=best.step, steps_done=curve[-1].step, seconds=round(seconds, 3))


def last_whole(state: Path) -> Path | None:
    """The newest state that was written to its end, which is trainer_state.json; newer ones are removed."""
    for folder in sorted(state.glob("checkpoint-*"), key=lambda one: int(one.name.rpartition("-")[2]))[::-1]:
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            remove(folder)
        else:
            return folder
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what transformers warns of and is meant so: parameters that no state holds, for one."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
