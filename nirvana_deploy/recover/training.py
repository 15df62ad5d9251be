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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import register_fsdp_forward_method
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
from nirvana_deploy.recover.learning.sharding import is_sharded, let_cpu_take_part, plugin_for
from nirvana_deploy.recover.learning.student import NotFiniteError, Student, parts_of, require_finite
from nirvana_deploy.recover.loop import Course, Loop
from nirvana_deploy.recover.processes import share_of
from nirvana_deploy.recover.record import CurvePoint

_ELSEWHERE = (
    "move the folder to another disk. What was saved whole stays: the same command goes on from there, prune "
    "and prune-export with --resume"
)
"""Where states find room."""


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
    is_fsdp_enabled: bool

    def __init__(
        self, student: Student, watch: Sequence[NDArray[np.int64]], *, first: int, batch: int, **kwargs: Any
    ) -> None:
        """``first`` is the number of the first watching window, of those of each kind."""
        super().__init__(model=student, **kwargs)
        self._student, self._batch = student, batch
        self._watch, self._first = [torch.from_numpy(kind) for kind in watch], first
        self._wanted: dict[int, list[torch.Tensor]] = {}
        self._before, self._started = 0.0, time.perf_counter()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        if is_sharded():
            kwargs["fsdp_plugin"] = plugin_for(self.model, bfloat16=self.args.bf16)
        found: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        return found

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if is_sharded() and not self.is_fsdp_enabled:
            let_cpu_take_part(self.accelerator, plugin_for(self.model, bfloat16=self.args.bf16))
            self.is_fsdp_enabled = True

    def autocast_smart_context_manager(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        """That of the loss; accelerate has none for a model in parts."""
        return computing(self.args.bf16) if self.is_fsdp_enabled else nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._require_finite(float(self.accelerator.gather(loss).mean()), step=self.state.global_step + 1)
        return loss

    def _require_finite(self, loss: float, *, step: int) -> None:
        """In all processes, or in none."""
        rate = float(self.lr_scheduler.get_last_lr()[0])
        require_finite(loss, step=step, learning_rate=rate, peak_rate=self.args.learning_rate)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        was_training = self._student.training
        self._student.eval()
        with computing(self.args.bf16):  # as a step does
            found = [self._kl(kind) for kind in range(len(self._watch))]
        self._student.train(was_training)
        metrics = dict(zip(("eval_kl", "eval_other_kl"), found, strict=False))
        metrics["eval_chosen"] = sum(found) / len(found)
        self._require_finite(metrics["eval_chosen"], step=self.state.global_step)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _kl(self, kind: int) -> float:
        """Mean KL of the watching windows of one kind."""
        windows, first = self._watch[kind], self._first + sum(map(len, self._watch[:kind]))
        parts = [one.to(self.args.device) for one in parts_of(windows, self._batch)]
        if kind not in self._wanted:  # the dense model stays as it is
            numbers = parts_of(torch.arange(first, first + len(windows)), self._batch)
            asked = zip(parts, numbers, strict=True)
            self._wanted[kind] = [self._student.wanted_states(*one) for one in asked]
        total = sum(self._student.heldout_kl(*one) for one in zip(parts, self._wanted[kind], strict=True))
        return total / self._student.positions(windows)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a model in parts the weights go with the moments, gathered once."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)

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

    def end_as_best(self) -> None:
        """Take the weights of the best saved state, as a training that comes to its end does."""
        self._load_best_model()


class _Told(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Advances a task, and nothing on stdout."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Let a model in parts gather its weights for the held-out KL, too."""
        register_fsdp_forward_method(model, "heldout_kl")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._advance(1)


def fit(
    student: Student,
    train: NDArray[np.int64],
    watch: Sequence[NDArray[np.int64]],
    loop: Loop,
    *,
    state: Path,
    begin: Path | None,
    log: str,
    advance: Advance,
) -> Course:
    """Train ``student`` in place on windows [N, T]; it ends as the best state by the watching windows
    [M, T] of each kind.

    ``state`` is the folder of saved states, and ``begin`` the one to go on from; ``log`` is told the course.
    A loss that is not finite ends the training; raises NotFiniteError where no state before it is better than
    the cut, and NirvanaError for a full disk (the states before stay).
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
        metric_for_best_model="chosen",
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
    full = disk_errors(state, elsewhere=_ELSEWHERE)
    with _quiet(), full, told(where, state / LOG_FOLDER, begin_step=begin_step) as tellers:
        trainer = _Watched(
            student,
            watch,
            first=len(train),
            batch=loop.micro_batch,
            args=arguments,
            train_dataset=_Windows(train),
            eval_dataset=_Windows(watch[0]),
            callbacks=[EarlyStoppingCallback(loop.patience), _Told(advance), *tellers],
        )
        trainer.remove_callback(PrinterCallback)
        spoilt: NotFiniteError | None = None
        try:
            trainer.go_on(begin)
        except NotFiniteError as error:
            spoilt = error
        course = _course(trainer.state.log_history, loop, train.shape[1], trainer.seconds)
        if spoilt is None:
            return course
        if not course.kept_step:
            raise spoilt
        trainer.end_as_best()
        stopped = f"{spoilt.what}: training ended there. The best state before it is kept."
        return replace(course, stopped=f"{stopped} To train on, recover again with {spoilt.gentler}.")


def _course(history: Sequence[dict[str, Any]], loop: Loop, window_tokens: int, seconds: float) -> Course:
    measured = {entry["step"]: entry for entry in history if "eval_kl" in entry}
    curve = tuple(
        CurvePoint(
            step=step,
            tokens=step * loop.step_windows * window_tokens,
            seconds=round(entry["seconds"], 3),
            kl=entry["eval_kl"],
            other_kl=entry.get("eval_other_kl"),
        )
        for step, entry in sorted(measured.items())
    )
    kept = min(curve, key=lambda point: point.chosen_by).step if curve else 0
    done = curve[-1].step if curve else 0
    return Course(curve=curve, kept_step=kept, steps_done=done, seconds=round(seconds, 3))


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
