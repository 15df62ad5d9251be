"""Recovery: step 0 is the cut, the loss falls, what is written is what was trained, kills change nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.extras import needs
from builders.recovering import SEQ_LEN, Cut, kl_of
from safetensors.torch import load_file

from nirvana_deploy.base.errors import NirvanaError
from nirvana_deploy.model.checkpoint import Checkpoint
from nirvana_deploy.prune.checkpoint import slice_checkpoint
from nirvana_deploy.prune.divergence import masked_divergences
from nirvana_deploy.recover import data, loop, shared, training
from nirvana_deploy.recover.before import require_recovery, work_of
from nirvana_deploy.recover.learning import needs as needs_of
from nirvana_deploy.recover.learning.dtype import in_bfloat16
from nirvana_deploy.recover.learning.student import Student
from nirvana_deploy.recover.learning.teacher import LiveTeacher
from nirvana_deploy.recover.recipe import Recovery

KINDS = ["llama-tied", "qwen3", "gemma3", "phi3", "flan-t5"]


@pytest.fixture(params=KINDS)
def cut(request: pytest.FixtureRequest, tmp_path: Path, text: Path) -> Cut:
    return Cut(tmp_path, request.param, text)


@pytest.fixture
def llama(tmp_path: Path, text: Path) -> Cut:
    return Cut(tmp_path, "llama-tied", text)


def test_from_the_cut_to_a_checkpoint_that_is_what_was_trained(cut: Cut) -> None:
    done = cut.recover(learning_rate=2e-3 if cut.dense.shape.hidden_size < 96 else 4e-4)
    curve, watch = done.course.curve, done.text.watch
    assert [point.step for point in curve] == [0, 3, 6, 9, 12]
    assert curve[0].kl == pytest.approx(masked_divergences(cut.dense, [cut.plan], watch)[0].mean(), rel=1e-4)
    best = min(point.kl for point in curve)
    assert done.course.kept_step > 0 and best < 0.99 * curve[0].kl
    written = load_file(cut.folder / "recovery/model.safetensors")
    before = load_file(cut.folder / "cut/model.safetensors")
    assert all("embed" in name or "head" in name or "shared" in name for name in set(before) - set(written))
    slice_checkpoint(cut.dense, cut.plan, cut.folder / "after", recovery=cut.folder / "recovery")
    assert kl_of(Checkpoint.open(cut.folder / "after"), cut.dense, watch) == pytest.approx(best, rel=1e-4)


def test_a_teacher_on_disk_teaches_what_a_live_one_does(cut: Cut) -> None:
    """Of each family: norms, heads and factors on logits are where they were."""
    live = cut.recover("live", recover_teacher="live")
    stored = cut.recover("stored", recover_teacher="stored")
    assert (live.stored_teacher, stored.stored_teacher) == (False, True)
    for one, other in zip(live.course.curve, stored.course.curve, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=2e-3)


def kept_of(cut: Cut) -> float:
    return cut.cut.shape.linear_parameters / cut.dense.shape.linear_parameters


def test_what_does_not_fit_beside_the_student_goes_to_the_disk(
    llama: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(free_bytes: float) -> None:
        monkeypatch.setattr(needs_of, "free_memory_bytes", lambda: int(free_bytes))

    recipe = Recovery(recover="1200", recover_batch=4, recover_dtype="float32")
    work = work_of(recipe, llama.dense.shape, kept=kept_of(llama), seq_len=SEQ_LEN)
    model_to_train = shared.model_to_train
    monkeypatch.setattr(shared, "model_to_train", lambda *_: pytest.fail("the cut was loaded"))
    leave(0.95 * work.memory_bytes)
    said = r"4 windows of 24 tokens at a time, needs .*\n.*--recover-method layers \(.*--seq-len 12"
    with pytest.raises(NirvanaError, match=said):
        llama.recover()
    leave(0)
    with pytest.raises(NirvanaError, match=r"needs at least .*\nEnd other programs: nothing .* least is "):
        llama.recover()
    monkeypatch.setattr(shared, "model_to_train", model_to_train)
    leave(work.memory_bytes + 0.5 * work.teacher_bytes)
    assert llama.recover().stored_teacher
    with pytest.raises(NirvanaError, match=r"beside the dense model, .*\n.*--recover-teacher stored \("):
        llama.recover(recover_teacher="live")
    leave(work.memory_bytes + work.teacher_bytes + 1)
    assert not llama.recover().stored_teacher


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_training_keeps_for_its_way_back_is_what_autograd_keeps(llama: Cut, dtype: str) -> None:
    """Of four windows more than of two, so that copies of weights go."""
    pruned = shared.model_to_train(llama.cut, Recovery(), llama.folder)
    weights = {one.untyped_storage().data_ptr() for one in pruned.model.parameters()}

    def kept(windows: int) -> int:
        found: dict[int, tuple[int, torch.Tensor]] = {}

        def keep(one: torch.Tensor) -> torch.Tensor:
            storage = one.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes(), one
            return one

        read = torch.from_numpy(llama.windows[:windows])
        back = torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one)
        with back, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            states = pruned.states(read)
        del states
        return sum(size for size, _ in found.values())

    recipe = Recovery(recover="1200", recover_batch=2, recover_dtype=dtype)
    work = work_of(recipe, llama.dense.shape, kept=kept_of(llama), seq_len=SEQ_LEN)
    assert 0.8 < work.kept_back_bytes / (kept(4) - kept(2)) < 1.05
    again = work_of(
        replace(recipe, recover_checkpointing=True), llama.dense.shape, kept=kept_of(llama), seq_len=SEQ_LEN
    )
    assert again.kept_back_bytes < 0.7 * work.kept_back_bytes


@pytest.mark.parametrize("way", [{}, {"recover_teacher": "stored"}, {"recover_method": "layers"}])
def test_both_kinds_that_watch_choose_what_is_kept(
    llama: Cut, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    monkeypatch.setattr(data, "OTHER_KINDS", ("pydoc",))
    done = llama.recover(**way)
    curve, other = done.course.curve, done.text.other
    assert other is not None and all(point.other_kl is not None for point in curve)
    assert curve[0].other_kl == pytest.approx(kl_of(llama.cut, llama.dense, other.tokens), rel=2e-3)
    assert curve[0].kl == pytest.approx(kl_of(llama.cut, llama.dense, done.text.watch), rel=2e-3)
    best = min(curve, key=lambda point: point.kl + (point.other_kl or 0.0))
    assert done.course.kept_step == best.step
    slice_checkpoint(llama.dense, llama.plan, llama.folder / "after", recovery=llama.folder / "recovery")
    after = Checkpoint.open(llama.folder / "after")
    assert best.other_kl == pytest.approx(kl_of(after, llama.dense, other.tokens), rel=2e-3)


def test_merged_adapters_compute_what_unmerged_ones_do(llama: Cut) -> None:
    needs("peft")
    done = llama.recover(recover_method="lora", learning_rate=1e-2)
    assert done.trained_parameters < sum(p.numel() for p in llama.cut.load().parameters()) / 2
    slice_checkpoint(llama.dense, llama.plan, llama.folder / "after", recovery=llama.folder / "recovery")
    kl = kl_of(Checkpoint.open(llama.folder / "after"), llama.dense, done.text.watch)
    assert kl == pytest.approx(min(point.kl for point in done.course.curve), rel=1e-4)
    assert done.course.curve[-1].kl < done.course.curve[0].kl


def test_micro_batches_change_memory_alone(llama: Cut) -> None:
    """With the next token alone as the loss, which is one too."""
    full = {"recover_method": "full", "recover": "400"}
    whole, parts = llama.recover("one", **full), llama.recover("two", **full, recover_micro_batch=1)
    for one, other in zip(whole.course.curve, parts.course.curve, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-4)


def test_products_in_bfloat16_give_nearly_the_same_course(llama: Cut) -> None:
    exact, rounded = llama.recover("one"), llama.recover("two", recover_dtype="bfloat16")
    assert (exact.loop.bfloat16, rounded.loop.bfloat16) == (False, True)
    assert exact.course.curve[0].kl == pytest.approx(rounded.course.curve[0].kl, rel=5e-3)  # before any step
    assert exact.course.curve[-1].kl != rounded.course.curve[-1].kl
    for one, other in zip(exact.course.curve, rounded.course.curve, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=2e-2)


def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in (True, False):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able}, raising=False
        )
        assert in_bfloat16(Recovery()) == (able or torch.cuda.is_available())
        assert in_bfloat16(Recovery(recover_dtype="bfloat16"))
        assert not in_bfloat16(Recovery(recover_method="layers"))


@pytest.mark.parametrize(
    "after_steps", [7, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 2, 3, 4, 5, 6, 8, 9, 11))]
)
def test_a_killed_training_goes_on_as_if_nothing_had_been(
    llama: Cut, monkeypatch: pytest.MonkeyPatch, after_steps: int
) -> None:
    teacher = {"recover_teacher": "stored" if after_steps == 7 else "live"}
    undisturbed = llama.recover("undisturbed", **teacher)
    told = training._Told.on_step_end
    count = 0

    def kill(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == after_steps:
            raise KeyboardInterrupt
        told(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._Told, "on_step_end", kill)
        with pytest.raises(KeyboardInterrupt):
            llama.recover("resumed", **teacher)
    assert not (llama.folder / "resumed").exists()
    torn = llama.folder / "state/checkpoint-99"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"log_history": [')
    resumed = llama.recover("resumed", **teacher)
    for one, other in zip(undisturbed.course.curve, resumed.course.curve, strict=True):
        assert (one.step, one.kl) == (other.step, pytest.approx(other.kl, rel=1e-6))
    second = load_file(llama.folder / "resumed/model.safetensors")
    for name, tensor in load_file(llama.folder / "undisturbed/model.safetensors").items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-7)
    assert not (llama.folder / "state").exists()


@pytest.mark.parametrize("full", ["weights", "moments"])
def test_a_disk_that_fills_up_leaves_the_last_whole_state(
    llama: Cut, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """The limit is of a file, and written by the same writers to the same end."""
    resource = pytest.importorskip("resource", reason="the system has no limits of a process")
    undisturbed = llama.recover("undisturbed")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state, told = llama.folder / "state", training._Told.on_step_end

    def fill(self: Any, args: Any, course: Any, *others: Any, **kwargs: Any) -> None:
        told(self, args, course, *others, **kwargs)
        if course.global_step == 7:  # the state of step 6 is whole
            weights = (state / "checkpoint-6/model.safetensors").stat().st_size
            most = weights // 2 if full == "weights" else weights + weights // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    with monkeypatch.context() as patch:
        patch.setattr(training._Told, "on_step_end", fill)
        try:
            with pytest.raises(NirvanaError) as refused:
                llama.recover("resumed")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"Cannot write {state}: the " in refused.value.message
    assert "What was saved whole stays: the same command goes on from there" in str(refused.value.hint)
    last = training.last_whole(state)
    assert last is not None and last.name == "checkpoint-6"
    resumed = llama.recover("resumed")
    for one, other in zip(undisturbed.course.curve, resumed.course.curve, strict=True):
        assert (one.step, one.kl) == (other.step, pytest.approx(other.kl, rel=1e-6))


def test_another_training_does_not_go_on_from_there(llama: Cut) -> None:
    state = llama.folder / "state"
    state.mkdir()
    begun = {
        "steps": 8,
        "wanted_windows": 32,
        "step_windows": 4,
        "micro_batch": 4,
        "learning_rate": 1,
        "seed": 1,
    }
    (state / "schedule.json").write_text(json.dumps({"identity": {"lr": 1.0}, "loop": begun}))
    assert llama.recover().loop.steps == 12


def test_files_of_somebody_else_are_not_removed(llama: Cut) -> None:
    state = llama.folder / "state"
    state.mkdir()
    (state / "thesis.txt").write_text("all of it")
    with pytest.raises(NirvanaError, match=r"did not write thesis\.txt"):
        llama.recover()
    assert (state / "thesis.txt").read_text() == "all of it"


def test_text_is_drawn_for_the_steps_that_were_planned_first() -> None:
    """A resumed training draws the same windows, though writing them left fewer steps."""
    planned = loop.Loop(
        steps=20, wanted_windows=80, step_windows=4, micro_batch=4, learning_rate=1e-4, seed=1
    )
    left = loop.shortened(planned, Recovery(recover="100s"), seq_len=24, writing_seconds=50.0)
    assert (left.steps, left.wanted_windows) == (10, 80)


def test_activations_that_are_computed_again_give_the_same_course(llama: Cut) -> None:
    usual, again = llama.recover("one"), llama.recover("two", recover_checkpointing=True)
    for one, other in zip(usual.course.curve, again.course.curve, strict=True):
        assert one.kl == pytest.approx(other.kl, rel=1e-5)
    model = shared.model_to_train(llama.cut, Recovery(recover_checkpointing=True), llama.folder).model
    assert model.training and any(getattr(one, "gradient_checkpointing", False) for one in model.modules())


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.05), ("linear", 0.0), ("constant", 1.0)])
def test_the_learning_rate_goes_as_asked(
    llama: Cut, monkeypatch: pytest.MonkeyPatch, schedule: str, last: float
) -> None:
    rates: list[float] = []
    told = training._Told.on_step_end

    def watch(self: Any, *args: Any, **kwargs: Any) -> None:
        rates.append(kwargs["lr_scheduler"].get_last_lr()[0] / 2e-3)
        told(self, *args, **kwargs)

    monkeypatch.setattr(training._Told, "on_step_end", watch)
    llama.recover(recover_schedule=schedule, recover_warm_up=4, recover_patience=99)
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert len(rates) == 12 and rates[-1] == pytest.approx(last, abs=1e-6)


def test_patience_decides_when_training_stops(llama: Cut) -> None:
    stopped = llama.recover("one", learning_rate=0.3, recover_patience=1)
    whole = llama.recover("two", learning_rate=0.3, recover_patience=99)
    assert stopped.course.steps_done < whole.course.steps_done == 12


@pytest.mark.parametrize("terms", [(1.0, 0.3, 0.0), (0.5, 0.0, 2.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_the_loss_is_the_sum_of_its_terms(llama: Cut, terms: tuple[float, float, float]) -> None:
    """Of KL, the next token and the states before the head, on whole logits."""
    options = dict(zip(("kl_weight", "next_token_weight", "states_weight"), terms, strict=True))
    recipe = Recovery(**options)
    windows = torch.from_numpy(llama.windows[:3])
    pruned = shared.model_to_train(llama.cut, recipe, llama.folder)
    teacher = LiveTeacher(llama.dense)
    found = Student(pruned, teacher, recipe)(windows, torch.arange(3))["loss"]
    dense, cut = llama.dense.load(), llama.cut.load()
    log_p, log_q = (model(windows).logits.log_softmax(-1) for model in (dense, cut))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    next_token = -log_q[:, :-1].gather(2, windows[:, 1:, None]).sum() / windows.numel()
    wanted, states = (model.model(windows).last_hidden_state for model in (dense, cut))
    error = ((states - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    expected = terms[0] * kl + terms[1] * next_token + terms[2] * error
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("terms", [{"next_token_weight": 0.3}, {"kl_weight": 0.0, "states_weight": 1.0}])
def test_other_terms_train_too(llama: Cut, terms: dict[str, float]) -> None:
    usual, done = llama.recover("one"), llama.recover("two", **terms)
    curve = done.course.curve
    assert done.course.kept_step > 0 and min(point.kl for point in curve) < 0.99 * curve[0].kl
    assert curve[0].kl == pytest.approx(usual.course.curve[0].kl, rel=1e-6)
    assert curve[-1].kl != pytest.approx(usual.course.curve[-1].kl, rel=1e-6)


def test_a_loss_of_nothing_is_refused(llama: Cut) -> None:
    recipe = Recovery(recover="1k", recover_text="pydoc", kl_weight=0.0)
    with pytest.raises(NirvanaError, match=r"nothing to train by.\n.*--kl-weight 1"):
        require_recovery(recipe, llama.dense, seq_len=SEQ_LEN)
    recipe = Recovery(recover="1k", recover_text="pydoc", recover_method="layers", recover_checkpointing=True)
    with pytest.raises(NirvanaError, match="has one block"):
        require_recovery(recipe, llama.dense, seq_len=SEQ_LEN)


def test_text_that_took_all_the_time_is_named() -> None:
    planned = loop.Loop(
        steps=20, wanted_windows=80, step_windows=4, micro_batch=4, learning_rate=1e-4, seed=1
    )
    said = (
        r"gathering text took 97\.0 s of 1 min 40 s, .* which takes 5\.00 s here\.\nGive at least 1 min 47 s"
    )
    with pytest.raises(NirvanaError, match=said):
        loop.shortened(planned, Recovery(recover="100s"), seq_len=24, writing_seconds=97.0)


def test_what_training_spoils_is_not_kept(llama: Cut) -> None:
    done = llama.recover(learning_rate=0.3)
    assert done.course.kept_step == 0
    written = load_file(llama.folder / "recovery/model.safetensors")
    before = load_file(llama.folder / "cut/model.safetensors")
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_rate_far_too_high_is_told_with_a_quarter_of_it(llama: Cut) -> None:
    """Not with a quarter of what the schedule was at."""
    said = r"The loss is nan at step \d, learning rate .*better than the cut\.\n.*--learning-rate 2\.5e\+29;"
    with pytest.raises(NirvanaError, match=said):
        llama.recover(learning_rate=1e30)
    assert not (llama.folder / "recovery").exists() and not (llama.folder / "state").exists()


@pytest.mark.parametrize("teacher", ["live", "stored"])
def test_what_was_best_before_a_loss_that_is_no_number_is_kept(
    llama: Cut, monkeypatch: pytest.MonkeyPatch, teacher: str
) -> None:
    undisturbed = llama.recover("undisturbed").course.curve
    told = training._Told.on_step_end

    def spoil(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        told(self, args, state, control, **kwargs)
        if state.global_step == 7:
            with torch.no_grad():
                next(one for one in kwargs["model"].parameters() if one.requires_grad).fill_(torch.inf)

    with monkeypatch.context() as patch:
        patch.setattr(training._Told, "on_step_end", spoil)
        done = llama.recover(recover_teacher=teacher)
    assert (done.course.kept_step, done.course.steps_done) == (6, 6)
    assert "is nan at step 8, learning rate 0.00" in done.course.stopped
    assert done.course.stopped.endswith("recover again with --learning-rate 0.0005.")
    assert done.course.curve[-1].kl == pytest.approx(undisturbed[2].kl, rel=2e-3)
    slice_checkpoint(llama.dense, llama.plan, llama.folder / "after", recovery=llama.folder / "recovery")
    kl = kl_of(Checkpoint.open(llama.folder / "after"), llama.dense, done.text.watch)
    assert kl == pytest.approx(done.course.curve[-1].kl, rel=2e-3)
    assert not (llama.folder / "state").exists()


def test_a_text_too_short_says_how_many_windows_there_are(llama: Cut) -> None:
    short = llama.folder / "short.txt"
    short.write_text("A few words, and no more than that.\n" * 4)
    with pytest.raises(NirvanaError, match=r"room for \d windows of 24; .* need 6, .*\n.*--recover-batch 1"):
        llama.recover(recover_text=str(short))


def test_a_budget_in_time_is_planned_without_the_dense_model(
    llama: Cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recovery(recover="1h", recover_batch=2)
    state = llama.folder / "state"
    way = shared.WholeModel(llama.cut, llama.dense, recipe, state, stored_teacher=True)
    monkeypatch.setattr(shared, "LiveTeacher", lambda *_: pytest.fail("the dense model was loaded"))
    assert way.stored_teacher and 0 < way.seconds_of_step(SEQ_LEN) < 60
    assert all(one.grad is None for one in way._model.model.parameters())
