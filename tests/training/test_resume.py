"""R1: k steps and a resume end like a straight run, bit for bit."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from llmdistill.data.collate import PromptStream
from llmdistill.data.validate import Rules
from llmdistill.errors import CheckpointError
from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.mixed import MixedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.sampling import Sampling
from tests import toy
from tests.support.objectives import Projected
from tests.training.helpers import dataset, trainer, weights

pytestmark = [pytest.mark.upgrade, pytest.mark.slow]
ROLLOUTS = {
    "fixed": FixedRollout,
    "on_policy": lambda: SampledRollout("student", max_new_tokens=6),
    "seqkd": lambda: SampledRollout(
        "teacher", max_new_tokens=6, samples=2, sampling=Sampling(temperature=0.8)
    ),
    "interleaved": lambda: InterleavedRollout(
        block_size=3, max_new_tokens=6, student_sampling=Sampling()
    ),
    "replay": lambda: ReplayRollout(SampledRollout("student", max_new_tokens=6), capacity=4),
    "mixed": lambda: MixedRollout(SampledRollout("student", max_new_tokens=6), FixedRollout()),
}


def made(folder, rollout="fixed", **options):
    defaults = {
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_steps": 5,
        "max_grad_norm": 1.0,
        "save_strategy": "steps",
        "save_steps": 1,
        "rows": toy.rows(10),
        "student": toy.model(attention_dropout=0.3),
    }
    rollout = options.pop("rollout_object", None) or ROLLOUTS[rollout]()
    return trainer(folder, rollout=rollout, **defaults | options)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize(  # in epoch 1, at the start of epoch 2, in epoch 2
    "step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_resumed_run_ends_like_a_straight_one(tmp_path, rollout, step):
    """10 rows in batches of 4 make three steps per epoch, the last one smaller; dropout is on."""
    straight = made(tmp_path / "straight", rollout)
    straight.train()
    resumed = made(tmp_path / "resumed", rollout)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed.model.student), weights(straight.model.student))
    assert losses(resumed) == losses(straight)
    for ours, theirs in zip(states(resumed), states(straight), strict=True):
        assert torch.equal(ours, theirs)


def states(trainer):
    values = trainer.optimizer.state_dict()["state"].values()
    return [tensor for state in values for tensor in state.values() if torch.is_tensor(tensor)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3, 4])
def test_rows_grouped_by_length_resume_too(tmp_path, step):
    options = {"train_sampling_strategy": "group_by_length"}
    straight, resumed = made(tmp_path / "a", **options), made(tmp_path / "b", **options)
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert torch.equal(weights(resumed.model.student), weights(straight.model.student))


def test_dropout_matters_in_this_test(tmp_path):
    """Without this the random state would not be tested."""
    with_dropout, without = made(tmp_path / "a"), made(tmp_path / "b", student=toy.model())
    with_dropout.train(), without.train()
    assert not torch.equal(weights(with_dropout.model.student), weights(without.model.student))


def test_with_accumulation_in_the_middle_of_an_epoch(tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    straight = made(tmp_path / "straight", **options)
    straight.train()
    resumed = made(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model.student), weights(straight.model.student))


def test_the_weights_after_a_resume_are_those_saved(tmp_path):
    """With a learning rate of zero the final weights are those that were loaded."""
    made(tmp_path / "first").train()
    saved = safetensors.torch.load_file(tmp_path / "first" / "checkpoint-4" / "model.safetensors")
    resumed = made(tmp_path / "second", learning_rate=0.0)
    fresh = weights(resumed.model.student)
    resumed._load_from_checkpoint(str(tmp_path / "first" / "checkpoint-4"))
    loaded = resumed.model.student.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    assert not torch.equal(weights(resumed.model.student), fresh)


def test_projectors_are_saved_and_loaded(tmp_path):
    def with_projector(folder):
        torch.manual_seed(7)
        return made(folder, objectives=[ResponseObjective(), Projected()])

    straight = with_projector(tmp_path / "straight")
    straight.train()
    resumed = with_projector(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(straight.model))


def test_a_peft_student_resumes(tmp_path):
    """R1: only the adapter is saved, and resuming gives the weights of the straight run."""
    from peft import LoraConfig, get_peft_model

    def adapted(folder):
        torch.manual_seed(7)
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        return made(folder, student=get_peft_model(toy.model(), config), rollout="on_policy")

    straight = adapted(tmp_path / "straight")
    straight.train()
    names = {path.name for path in (tmp_path / "straight" / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    resumed = adapted(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model.student), weights(straight.model.student))


def test_what_the_teacher_wrote_is_not_written_again(tmp_path):
    straight = made(tmp_path / "straight", "seqkd", num_train_epochs=3, max_steps=-1)
    straight.train()
    assert len(straight.rollout.kept) == 20
    resumed = made(tmp_path / "straight", "seqkd", num_train_epochs=3, max_steps=-1)
    resumed.teacher.write = None  # would raise if it were called
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-6"))


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    made(tmp_path / "first").train()
    other = made(tmp_path / "second", student=toy.model(layers=4))
    with pytest.raises(CheckpointError, match="does not fit this run: missing"):
        other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))


class Seen(SampledRollout):
    """Records the pass and the rows of each step."""

    def __init__(self) -> None:
        super().__init__("student", max_new_tokens=3)
        self.seen = []

    def write(self, prompts, student, teacher, progress):
        self.seen.append((progress.epoch, prompts.row_ids_B.tolist()))
        return super().write(prompts, student, teacher, progress)


def streamed(folder, *, accumulation=1, **options):
    """10 rows come in batches of 4 in order; the last two rows of each pass are left out."""
    stream = PromptStream(
        lambda: ((f"x:{i}", row) for i, row in enumerate(toy.rows(10))), toy.tokenizer(), Rules()
    )
    seen = Seen()
    options = {"max_steps": 7, "dataloader_drop_last": True} | options
    run = made(
        folder, rows=stream, rollout_object=seen, gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4 // accumulation, **options,
    )  # fmt: skip
    return run, seen.seen


FIRST, SECOND = [0, 1, 2, 3], [4, 5, 6, 7]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_resumes_at_the_right_row_of_the_right_pass(tmp_path, accumulation):
    """F7: in the second pass, at the end of a pass, and with other draws in each pass."""
    straight, seen = streamed(tmp_path / "straight", accumulation=accumulation)
    straight.train()
    passes = [(number, rows) for number in range(4) for rows in (FIRST, SECOND)]
    assert seen == passes[:7]
    for step in (1, 2, 3, 4):
        resumed, rest = streamed(tmp_path / f"from-{step}", accumulation=accumulation)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert rest == passes[step:7]
        assert torch.equal(weights(resumed.model.student), weights(straight.model.student))
        assert losses(resumed) == losses(straight)


def test_a_stream_resumes_with_smaller_batches_of_the_same_step(tmp_path):
    straight, _ = streamed(tmp_path / "straight")
    straight.train()
    resumed, rest = streamed(tmp_path / "resumed", accumulation=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert rest == [(1, SECOND), (2, FIRST), (2, SECOND), (3, FIRST)]


def test_the_last_rows_of_a_stream_are_trained_if_nothing_is_dropped(tmp_path):
    run, seen = streamed(tmp_path, dataloader_drop_last=False, max_steps=4)
    run.train()
    assert seen == [(0, FIRST), (0, SECOND), (0, [8, 9]), (1, FIRST)]


# ---- a run that is over ----


def finished(folder, steps=5, resume=None, **options):
    """Train 10 rows in batches of 4: three steps per epoch, so step 5 is within an epoch."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps} | options
    made = trainer(folder, rows=dataset(10), **options)
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("how", ["by path", "the last one"])
def test_a_finished_run_is_not_trained_further(tmp_path, how):
    straight = finished(tmp_path)
    last = str(tmp_path / "checkpoint-5")
    again = finished(tmp_path, resume=last if how == "by path" else True)
    assert again.state.global_step == 5
    assert torch.equal(weights(again.model.student), weights(straight.model.student))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2", "checkpoint-4", "checkpoint-5",
    ]  # fmt: skip


def test_a_finished_run_goes_further_if_it_is_given_more_steps(tmp_path):
    finished(tmp_path)
    longer = finished(tmp_path, steps=7, resume=str(tmp_path / "checkpoint-5"))
    straight = finished(tmp_path / "straight", steps=7)
    assert longer.state.global_step == 7
    assert torch.equal(weights(longer.model.student), weights(straight.model.student))


def test_a_finished_run_of_whole_epochs_is_not_trained_further(tmp_path):
    options = {"max_steps": -1, "num_train_epochs": 2, "save_steps": 3}
    straight = finished(tmp_path, **options)
    again = finished(tmp_path, resume=str(tmp_path / "checkpoint-6"), **options)
    assert again.state.global_step == 6
    assert torch.equal(weights(again.model.student), weights(straight.model.student))


class StopsAndSaves(TrainerCallback):
    """Stops as a signal handler does, before the run is over."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            control.should_save = control.should_training_stop = True


def test_a_run_that_was_stopped_from_outside_goes_on(tmp_path):
    options = {"steps": 6, "save_steps": 100}
    stopped = finished(tmp_path / "a", callbacks=[StopsAndSaves()], **options)
    assert stopped.state.global_step == 2
    again = finished(tmp_path / "a", resume=True, **options)
    straight = finished(tmp_path / "b", **options)
    assert again.state.global_step == 6
    assert torch.equal(weights(again.model.student), weights(straight.model.student))


def diverging(steps):
    """Return options of a run whose held-out loss soon rises."""
    return {
        "steps": steps, "eval_dataset": dataset(4, seed=3), "eval_strategy": "steps", "eval_steps": 2,
        "load_best_model_at_end": True, "learning_rate": 20.0,
    }  # fmt: skip


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path):
    options = diverging(steps=12)
    early = finished(tmp_path, callbacks=[EarlyStoppingCallback(1)], **options)
    assert early.state.global_step < 12
    again = finished(tmp_path, callbacks=[EarlyStoppingCallback(50)], resume=True, **options)
    assert again.state.global_step == 12


def test_a_run_that_stopped_early_stays_stopped_with_its_best_student(tmp_path):
    options = diverging(steps=20)
    straight = finished(tmp_path, callbacks=[EarlyStoppingCallback(2)], **options)
    steps = straight.state.global_step
    assert steps < 20
    assert straight.state.best_model_checkpoint != str(tmp_path / f"checkpoint-{steps}")
    again = finished(tmp_path, callbacks=[EarlyStoppingCallback(2)], resume=True, **options)
    assert again.state.global_step == steps
    assert torch.equal(weights(again.model.student), weights(straight.model.student))
