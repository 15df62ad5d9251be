"""What each stage of a job costs, counted from the shape of the model: operations, bytes, memory.

Constants are of SmolLM2-135M, from the records that ``benchmarks/NOTES.md`` tells of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from nirvana_deploy.base.machine import peak_rss_bytes
from nirvana_deploy.calibrate.mixture import parts_of
from nirvana_deploy.calibrate.stage import windows_wanted
from nirvana_deploy.engine.stage import engine_name
from nirvana_deploy.export.dtypes import dtype_named
from nirvana_deploy.measure.answers import NEW_TOKENS
from nirvana_deploy.measure.units.unit_cost import weight_bytes
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.model.weights import stored_shapes
from nirvana_deploy.output import stage
from nirvana_deploy.output.stage import in_steps
from nirvana_deploy.output.variants import DENSE, quantized_variant
from nirvana_deploy.pipeline.before import work_of_job
from nirvana_deploy.pipeline.forecast.stages import engine_forms, quantized_models
from nirvana_deploy.pipeline.job import Job
from nirvana_deploy.prune.checkpoint import DEFAULT_SHARD_BYTES
from nirvana_deploy.prune.choosing.choices import Choices
from nirvana_deploy.prune.curves.measure_curves import CURVE_TOKENS
from nirvana_deploy.prune.curves.operations import curve_operations, refit_operations
from nirvana_deploy.prune.cutting import reads_curves
from nirvana_deploy.prune.recipe import REFIT
from nirvana_deploy.prune.refit.dense_states import kept_bytes
from nirvana_deploy.prune.saliency.gradient import saliency_named
from nirvana_deploy.quantize.schemes import weight_schemes
from nirvana_deploy.recover.budget import budget_of, part_of
from nirvana_deploy.recover.learning.needs import stores_teacher
from nirvana_deploy.verify.cases import PROMPTS

_FLOAT32_BYTES = 4
_SCORING_PASSES = 4
"""Forward, forward again on the way back, and two backward."""
_WRITING_TAKES = 2.2
"""Times as long a token takes to write as its products would."""
_VERIFIED_STEPS, _VERIFIED_TOKENS = 480, 180
"""Five prompts of 32 new tokens in three programs, and the tokens of the other comparisons."""
_INT8_PASSES, _ROUNDING_PASSES = 1.0, 2.5
"""Over the calibration windows: to observe and choose; to observe, to sum products and to round."""
_PROBABILITY_OPERATIONS = 25
"""For each token and word of the vocabulary: logarithms and exponentials in float64."""
_ENGINE_S, _ENGINE_S_PER_BYTE = 10.0, 2e-8
_LOADED_S, _REPORT_S, _SMALL_S, _UNITS_TIMED_S = 4.0, 3.0, 0.5, 40.0
"""Seconds that depend on no size: a process that loads a model, the report, other stages, timing units."""
_LARGEST_STATES_BYTES = 2e9
"""Hidden states beyond it lie on the disk."""


@dataclass(frozen=True)
class Cost:
    """What one stage costs."""

    operations: float = 0.0
    """In float32, or as many as take as long."""
    read_bytes: float = 0.0
    """Weights that products with a single row read."""
    seconds: float = 0.0
    """That depend on no size, or are asked for."""
    written_bytes: float = 0.0
    """Files that stay."""
    spilled_bytes: float = 0.0
    """Files that go when the stage ends."""
    memory_bytes: float = 0.0
    """Held at once, at most; by processes of its own too."""


@dataclass(frozen=True)
class Sizes:
    """Weights of a model, dense or cut, by what becomes of them."""

    linear: float
    """In the layers: what is cut and quantized."""
    table: int
    """V D: the embedding, and the head if they are one."""
    tied: bool
    other: int
    """Norms, biases, positions."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return round(self.linear) + self.table * (1 if self.tied else 2) + self.other

    @property
    def step_operations(self) -> float:
        """Products of one token, head included."""
        return 2 * (self.linear + self.table)


class Costs:
    """The stages of one job on one model."""

    def __init__(self, job: Job, choices: Choices, checkpoint: Checkpoint) -> None:
        self._job, self._choices, self._shape = job, choices, checkpoint.shape
        shape = checkpoint.shape
        table = shape.vocab_size * shape.hidden_size
        stored = sum(map(prod, stored_shapes(shape).values()))
        other = stored - shape.linear_parameters - shape.embedding_parameters
        self.dense = Sizes(shape.linear_parameters, table, shape.tied_embeddings, other)
        kept = (1 - job.pruning.sparsity) * shape.linear_parameters
        self.pruned = Sizes(kept, table, shape.tied_embeddings, other)
        files = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
        self._stored_bytes = files / max(1, self.dense.parameters)
        self._element_bytes = dtype_named(job.export.dtype).element_bytes
        text = job.calibration
        self._tokens = windows_wanted(text, shape) * text.seq_len
        self._heldout = text.heldout_sequences * text.heldout_len

    def of(self, name: str) -> Cost:
        """What the stage ``name`` costs."""
        cost = self._by_name[name]
        return replace(cost, memory_bytes=max(cost.memory_bytes, self._program(0)))

    @cached_property
    def _by_name(self) -> dict[str, Cost]:
        found = {
            stage.UNIT_COST: Cost(seconds=_UNITS_TIMED_S if self._job.pruning.cost == "ms" else _SMALL_S),
            stage.CALIBRATE: self._calibrate(self._choices.corpora[0]),
            stage.CURVES: self._curves(),
            stage.SCORE: self._score(),
            stage.SELECT: self._select(),
            stage.PLAN: Cost(seconds=_SMALL_S),
            stage.ONNX: self._exported(self.pruned),
            stage.DENSE_ONNX: self._exported(self.dense),
            stage.VERIFY: self._verify(),
            stage.QUALITY: self._quality(),
            stage.ANSWERS: self._answers(),
            stage.BENCHMARK: self._benchmark(),
            stage.REPORT: Cost(seconds=_REPORT_S),
        }
        for step in in_steps(self._job.recovery.recover_steps):
            found[step.named(stage.RECONSTRUCT)] = self._reconstruct()
            found[step.named(stage.RECOVER)] = self._recover()
            written = self._stored_bytes * self.pruned.parameters
            found[step.named(stage.CHECKPOINT)] = Cost(
                written_bytes=written, memory_bytes=self._program(min(written, DEFAULT_SHARD_BYTES))
            )
        for of, scheme in quantized_models(self._job):
            found[quantized_variant(scheme, of=of).stage] = self._quantized(self._sizes(of), scheme)
        for runtime in dict.fromkeys(self._job.engine.engines):
            for form in engine_forms(self._job):
                found[stage.engine(engine_name(form, runtime))] = self._engine(form.variant, form.quantize)
        return found

    def _sizes(self, of: str) -> Sizes:
        return self.dense if of == DENSE else self.pruned

    def weights_bytes(self, sizes: Sizes, scheme: str | None, element_bytes: int | None = None) -> float:
        """The weight file of a model in a scheme."""
        element = element_bytes or self._element_bytes
        if scheme is None:
            return element * sizes.parameters
        per_weight = weight_bytes(scheme, element)
        tables = 1 if sizes.tied else 2
        if not self._job.quantization.quantize_head:
            table_bytes = float(tables * element * sizes.table)
        elif scheme in weight_schemes():
            table_bytes = tables * per_weight * sizes.table
        else:
            table_bytes = (element + per_weight) * sizes.table
        return per_weight * sizes.linear + table_bytes + element * sizes.other

    def _measured(self) -> list[float]:
        """Bytes of the weight files of all models that are measured."""
        float_models = [self.pruned, *([self.dense] if self._job.export.baseline else [])]
        return [
            *(self.weights_bytes(sizes, None) for sizes in float_models),
            *(self.weights_bytes(self._sizes(of), scheme) for of, scheme in quantized_models(self._job)),
        ]

    def _program(self, more_bytes: float) -> float:
        """Memory of this process with ``more_bytes``."""
        return peak_rss_bytes() + more_bytes

    def _streamed(self, states_bytes: float) -> tuple[float, float]:
        """(memory, disk) of a pass with one layer in memory, and states of all windows."""
        shape = self._shape
        spilled = states_bytes if states_bytes > _LARGEST_STATES_BYTES else 0.0
        widest = max(max(shape.head_dim * one.query_heads, one.ffn_width) for one in shape.layers)
        layer = shape.linear_parameters / len(shape.layers)
        held = states_bytes - spilled + 1.5 * _FLOAT32_BYTES * self.dense.table
        return self._program(held + 20 * widest**2 + 2 * _FLOAT32_BYTES * layer), spilled

    def _states_bytes(self, tokens: float, levels: float) -> float:
        return _FLOAT32_BYTES * levels * tokens * self._shape.hidden_size

    def _self_written(self, text: str, tokens: float) -> float:
        """Operations of writing the model's own share of ``tokens``."""
        parts = parts_of(text, writes_text=self._shape.family.writes_text)
        share = sum(part.share for part in parts if part.source == "self")
        return _WRITING_TAKES * share * tokens * self.dense.step_operations

    def _calibrate(self, corpus: str) -> Cost:
        heldout = 0 if self._job.calibration.eval_text else self._heldout
        written = self._self_written(corpus, self._tokens + heldout)
        return Cost(written, seconds=4 * _SMALL_S, memory_bytes=self._program(4 * self.dense.parameters))

    def _curves(self) -> Cost:
        tokens = min(self._tokens, CURVE_TOKENS)
        states = self._states_bytes(tokens, len(self._shape.layers) + 1)
        memory, spilled = self._streamed(states)
        operations = curve_operations(self._shape, self._tokens)
        return Cost(operations, spilled_bytes=spilled, memory_bytes=memory)

    def _score(self) -> Cost:
        sizes = self.dense
        operations = 2 * self._tokens * (_SCORING_PASSES * sizes.linear + 3 * sizes.table)
        levels = 2 if self._scores_features else len(self._shape.layers) + 1
        memory, spilled = self._streamed(self._states_bytes(self._tokens, levels))
        return Cost(operations, spilled_bytes=spilled, memory_bytes=memory + self._kept_for_refit())

    @property
    def _scores_features(self) -> bool:
        """Whether every score is of features, which one pass forward tells."""
        named = [one for one in self._choices.saliencies if one != REFIT]
        return bool(named) and all(saliency_named(one).features is not None for one in named)

    def _kept_for_refit(self) -> int:
        """States of the dense model that scores leave to the refit."""
        both = self._choices.single and self._job.pruning.reconstruct and self._scores_features
        return kept_bytes(self._shape, self._tokens) if both else 0

    def _reconstruct(self) -> Cost:
        operations = refit_operations(self._shape, self._tokens)
        memory, spilled = self._streamed(self._states_bytes(self._tokens, 2))
        memory += self._kept_for_refit()
        readers = sum(one.query_heads * self._shape.head_dim + one.ffn_width for one in self._shape.layers)
        kept = (1 - self._job.pruning.sparsity) * readers * self._shape.hidden_size
        return Cost(
            operations,
            written_bytes=_FLOAT32_BYTES * kept,
            spilled_bytes=spilled,
            memory_bytes=memory,
        )

    def _select(self) -> Cost:
        """Every set of windows is drawn, scored and tried in every way."""
        choices, recipe, text = self._choices, self._job.pruning, self._job.calibration
        sets = len(choices.corpora) * choices.candidates
        drawn = sum(self._calibrate(corpus).operations for corpus in choices.corpora) * choices.candidates
        curves = any(reads_curves(recipe, one) for one in choices.saliencies)
        scored = (
            curves * self._curves().operations + len(choices.saliencies) * self._score().operations
        ) * sets
        tried = sets * len(choices.saliencies) * len(choices.gammas)
        compared = text.selection_sequences * text.selection_len * 2 * self.dense.step_operations
        refit = self._reconstruct().operations if recipe.reconstruct else 0.0
        memory = max(self._score().memory_bytes, self._curves().memory_bytes)
        return Cost(drawn + scored + tried * (compared + refit), memory_bytes=memory)

    def _recover(self) -> Cost:
        recipe = self._job.recovery
        if recipe.recover is None:
            return Cost()
        budget = budget_of(part_of(recipe.recover, recipe.recover_steps))
        work = work_of_job(self._job, self._shape)
        stored = stores_teacher(work)
        live = not stored and recipe.recover_method != "layers"
        cost = Cost(
            written_bytes=_FLOAT32_BYTES * self.pruned.linear,
            spilled_bytes=work.saved_bytes + stored * work.stored_teacher_bytes,
            memory_bytes=self._program(work.memory_bytes + live * work.teacher_bytes),
        )
        if budget.seconds is not None:
            return replace(cost, seconds=budget.seconds)
        tokens = budget.tokens or 0
        products = 2 * tokens * (self.dense.linear + 3 * self.pruned.linear + 3 * self.dense.table)
        return replace(cost, operations=products + self._self_written(recipe.recover_text, tokens))

    def _exported(self, sizes: Sizes) -> Cost:
        written = self.weights_bytes(sizes, None)
        return Cost(written_bytes=written, memory_bytes=self._program(2 * _FLOAT32_BYTES * sizes.table))

    def _verify(self) -> Cost:
        models = [self.pruned, *([self.dense] if self._job.export.baseline else [])]
        return Cost(
            operations=3 * _VERIFIED_TOKENS * sum(sizes.step_operations for sizes in models),
            read_bytes=_VERIFIED_STEPS * sum(_FLOAT32_BYTES * sizes.parameters for sizes in models),
            memory_bytes=self._program(max(2 * _FLOAT32_BYTES * sizes.parameters for sizes in models)),
        )

    def _quantized(self, sizes: Sizes, scheme: str) -> Cost:
        rounds = scheme in weight_schemes()
        products = 2 * self._tokens * (_ROUNDING_PASSES * sizes.linear if rounds else 0.0)
        products += 0.0 if rounds else _INT8_PASSES * self._tokens * sizes.step_operations
        return Cost(
            products,
            written_bytes=self.weights_bytes(sizes, scheme),
            memory_bytes=self._program(_FLOAT32_BYTES * sizes.parameters),
        )

    def _engine(self, of: str, scheme: str | None) -> Cost:
        graph = self.weights_bytes(self._sizes(of), scheme, element_bytes=2)
        return Cost(
            seconds=_ENGINE_S + _ENGINE_S_PER_BYTE * graph,
            written_bytes=2 * graph,
            memory_bytes=self._program(3 * graph),
        )

    @property
    def _judged_tokens(self) -> float:
        """Tokens of the texts that quality is measured on."""
        if texts := self._job.calibration.eval_text:
            return len(texts) * self._heldout
        parts = parts_of(self._choices.corpora[0], writes_text=self._shape.family.writes_text)
        return (1 + max(part.share for part in parts)) * self._heldout  # beside them, the unseen text

    def _quality(self) -> Cost:
        models, tokens = self._measured(), self._judged_tokens
        operations = tokens * (self.dense.step_operations + _PROBABILITY_OPERATIONS * self._shape.vocab_size)
        logits = len(models) * _FLOAT32_BYTES * self._job.calibration.heldout_len * self._shape.vocab_size
        return Cost(len(models) * operations, memory_bytes=self._program(sum(models) + logits))

    def _answers(self) -> Cost:
        jobs = quantized_models(self._job)  # verification has heard the others
        models = [self.weights_bytes(self._sizes(of), scheme) for of, scheme in jobs]
        steps = len(PROMPTS) * NEW_TOKENS
        return Cost(
            read_bytes=steps * sum(models),
            seconds=_SMALL_S,
            memory_bytes=self._program(max(models, default=0)),
        )

    def _benchmark(self) -> Cost:
        models, work = self._measured(), self._job.measurement
        rounds = work.repeats + 1
        prompts = rounds * work.prompt_tokens * self.dense.step_operations
        return Cost(
            operations=prompts * len(models),
            read_bytes=rounds * work.new_tokens * sum(models),
            seconds=_LOADED_S * len(models),
            memory_bytes=self._program(1.1 * sum(models)),
        )


def taken_stages(names: Sequence[str], job: Job, others: Sequence[Job]) -> tuple[str, ...]:
    """Those of ``names`` that a job takes from folders of ``others``, on the same model: they come out alike.

    What is known before is counted: text, curves, scores and the dense model.
    """

    def same(name: str, other: Job) -> bool:
        mine, its = job.pruning, other.pruning
        text = job.calibration == other.calibration
        if name == stage.CURVES:
            return text and (mine.round_to, mine.min_neurons) == (its.round_to, its.min_neurons)
        if name == stage.SCORE:
            return text and (mine.saliency, mine.micro_batch) == (its.saliency, its.micro_batch)
        if name.startswith(stage.DENSE_ONNX):
            return job.export == other.export
        return name in {stage.UNIT_COST, stage.CALIBRATE} and text

    return tuple(name for name in names if any(same(name, other) for other in others))
