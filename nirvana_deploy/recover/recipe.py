"""Options for recovery."""

from __future__ import annotations

from typing import Annotated

from nirvana_deploy.base.recipe import Option, recipe
from nirvana_deploy.calibrate.recipe import source_names
from nirvana_deploy.quantize.schemes import onnx_schemes
from nirvana_deploy.recover.learning.logs import LOGS, NOWHERE

METHODS = ("distill", "lora", "full", "layers")
TEACHERS = ("auto", "live", "stored")
SCHEDULES = ("cosine", "linear", "constant")
RECOVERIES = ("paper",)
AUTO, FLOAT32, BFLOAT16 = DTYPES = ("auto", "float32", "bfloat16")


@recipe
class Length:
    """How long to train, as one of two numbers."""

    minutes: Annotated[float | None, Option("How long to train, text that the model writes included.")] = None
    tokens: Annotated[int | None, Option("How many tokens to train on, instead.", minimum=1)] = None


@recipe
class Ready:
    """Options of recovery under one name."""

    preset: Annotated[
        str | None,
        Option(
            "paper: as NIRVANA's authors recover a cut: adapters of rank 8, trained by the next token, 16 "
            "windows per step, 50 steps of warm-up, then a linear schedule. Options typed beside it win.",
            choices=RECOVERIES,
        ),
    ] = None


@recipe
class Recovery:
    """How long the pruned model is trained toward the dense one, on what, and how."""

    recover: Annotated[
        str | None,
        Option(
            "Train the pruned model toward the dense one, for a time (30m, 2h) or a number of tokens (200k).",
            metavar="TIME|TOKENS",
            resumable=True,
        ),
    ] = None
    recover_steps: Annotated[
        int,
        Option(
            "Cut in so many steps of the same size, and train after each for its part of --recover.",
            minimum=1,
            flag="--steps",
            resumable=True,
        ),
    ] = 1
    recover_method: Annotated[
        str,
        Option(
            "distill: all weights of the layers, by KL from the dense model; lora: adapters on their linears "
            "alone, merged in the end; full: all weights, by the next token; layers: one block at a time, by "
            "the dense model's states behind it, with one block of each model in memory.",
            choices=METHODS,
            resumable=True,
        ),
    ] = "distill"
    recover_teacher: Annotated[
        str,
        Option(
            "live: the dense model is in memory beside the pruned one; stored: its states are computed "
            "before, block by block, and read from disk; auto: live where both fit.",
            choices=TEACHERS,
            resumable=True,
        ),
    ] = "auto"
    recover_for: Annotated[
        str | None,
        Option(
            "Train with weights, and in int8 activations, rounded as this scheme rounds them; the checkpoint "
            "then holds what so many bits hold.",
            choices=onnx_schemes,
            resumable=True,
        ),
    ] = None
    recover_dtype: Annotated[
        str,
        Option(
            "Type of the products in training, not of what is kept: bfloat16 takes half the time where the "
            "device "
            "has instructions for it; auto: there.",
            choices=DTYPES,
            resumable=True,
        ),
    ] = AUTO
    recover_text: Annotated[
        str,
        Option(
            "Text to train on, as --calib takes it, in windows of --seq-len.",
            suggests=source_names,
            resumable=True,
        ),
    ] = "mix"
    recover_batch: Annotated[int, Option("Training windows per step.", minimum=1, resumable=True)] = 4
    recover_micro_batch: Annotated[
        int | None,
        Option("Training windows at a time; changes memory alone. [a step]", minimum=1, resumable=True),
    ] = None
    learning_rate: Annotated[float, Option("Peak learning rate of recovery.", minimum=0, resumable=True)] = (
        1e-4
    )
    recover_schedule: Annotated[
        str,
        Option(
            "Learning rate after the warm-up: along a cosine to a twentieth of the peak, linear to zero, or "
            "constant.",
            choices=SCHEDULES,
            resumable=True,
        ),
    ] = "cosine"
    recover_warm_up: Annotated[
        int | None,
        Option(
            "Steps of warm-up. [a twentieth of all]",
            minimum=0,
            resumable=True,
            command_line=False,
        ),
    ] = None
    recover_checkpointing: Annotated[
        bool,
        Option(
            "Compute activations again in the backward pass: less memory, about a third more time.",
            flag="--recover-checkpointing/--no-recover-checkpointing",
            resumable=True,
        ),
    ] = False
    recover_patience: Annotated[
        int,
        Option(
            "Measurements of the held-out KL without a better one after which training stops.",
            minimum=1,
            resumable=True,
            command_line=False,
        ),
    ] = 4
    recover_log: Annotated[
        str,
        Option(
            "Where the course of training is logged: tensorboard, as files in OUT/recovery/log; wandb, which "
            "also sends it to its server; or nowhere.",
            choices=LOGS,
            resumable=True,
        ),
    ] = NOWHERE
    recover_seq_len: Annotated[
        int | None,
        Option("Tokens of a training window. [--seq-len]", minimum=2, resumable=True, command_line=False),
    ] = None
    kl_weight: Annotated[
        float,
        Option("Weight of the KL from the dense model in the loss.", minimum=0.0, resumable=True),
    ] = 1.0
    next_token_weight: Annotated[
        float,
        Option("Weight of the next token's cross-entropy in the loss.", minimum=0.0, resumable=True),
    ] = 0.0
    states_weight: Annotated[
        float,
        Option(
            "Weight in the loss of the squared error of the last hidden states, relative to their size.",
            minimum=0.0,
            resumable=True,
        ),
    ] = 0.0
    lora_rank: Annotated[
        int, Option("Rank of the adapters.", minimum=1, resumable=True, command_line=False)
    ] = 8


def weights_of(recipe: Recovery) -> tuple[float, float, float]:
    """Of KL, of the next token and of the states in the loss."""
    if recipe.recover_method == "full":
        return 0.0, 1.0, 0.0
    return recipe.kl_weight, recipe.next_token_weight, recipe.states_weight
