"""Cases of worker.py with FSDP2: by hand, and as Accelerate shards the model on GPUs.

Accelerate shards only on GPUs.  `shard_on_cpus` makes this one decision for it, and everything else
is as on a GPU: how it wraps the model, and what Trainer does with the result.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llmdistill import recipe as recipes
from llmdistill.errors import TrainingError
from llmdistill.models.layers import decoder_layers
from llmdistill.models.sharding import has_sharded_weights
from llmdistill.objectives.embed_distill import EmbedDistillObjective
from llmdistill.objectives.features import HiddenObjective
from llmdistill.objectives.minilm import MiniLMObjective
from llmdistill.objectives.rtk import RtkObjective
from llmdistill.rollouts.interleaved import InterleavedRollout
from llmdistill.rollouts.replay import ReplayRollout
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.run import distill
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.step import Distillation
from tests import toy
from tests.support.spies import spy
from tests.training.helpers import INTERLEAVED, dataset, trained, trainer, weights

REFUSED = ("online", "resting", "mutual", "context", "average")  # teachers
REFUSED_BY_ZERO3 = (*REFUSED, "adversarial", "changes-together")


def sharded_alone(folder: Path) -> None:
    """D7: each objective on states alone, with FSDP2 and bfloat16 parameters, trains the student."""
    mesh, half = init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for made in (HiddenObjective, MiniLMObjective, RtkObjective, EmbedDistillObjective):
        teacher = LocalTeacher(toy.teacher_model(), toy.tokenizer())
        module = Distillation(toy.model().train(), teacher, [made()], toy.tokenizer())
        for layer in decoder_layers(module.student):
            fully_shard(layer, mesh=mesh, mp_policy=half)
        fully_shard(module, mesh=mesh, mp_policy=half)
        module(toy.sequences(6, seed=dist.get_rank())).loss.backward()
        first = decoder_layers(module.student)[0].mlp.up_proj.weight.grad.full_tensor()
        assert first.abs().max() > 0, made.__name__
        assert torch.isfinite(first).all(), made.__name__


# ---- as Accelerate does it ----

FSDP2 = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": False,
    },
}


# DeepSpeed supports CPUs, so nothing is changed for it.
ZERO2 = {
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
}


ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # or toys would stay whole
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def launch_with_zero3(folder: Path) -> None:
    """Set what `accelerate launch --config_file recipes/accelerate/zero3.yaml` would set."""
    file = folder / f"zero3-{dist.get_rank()}.json"
    file.write_text(json.dumps(ZERO3))
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }


@cache
def shard_on_cpus() -> None:
    """Let Accelerate shard the models of this process, although there is no GPU."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def sharded_conformance(folder: Path) -> None:
    """Every objective, rollout and teacher that a recipe can have, or its refusal."""
    shard_on_cpus()
    _conformance(folder, FSDP2, REFUSED)


def zero_conformance(folder: Path) -> None:
    _conformance(folder, ZERO2, ("resting",))


def zero3_conformance(folder: Path) -> None:
    launch_with_zero3(folder)
    _conformance(folder, {}, REFUSED_BY_ZERO3)


def _conformance(folder: Path, scaling: dict, refused: tuple[str, ...]) -> None:
    from tests.distributed.worker import every_entry

    for name, options in every_entry():
        if name.startswith("response-"):
            continue  # divergences differ in what they make of the logits alone
        rows = {"rows": dataset(7), "per_device_train_batch_size": 4}
        if name.removeprefix("teacher-") in refused:
            with pytest.raises(TrainingError, match=r"not work with FSDP|[wW]ith DeepSpeed"):
                trainer(folder / "run", **rows, **scaling, **options())
            continue
        made = trainer(folder / "run", **rows, **scaling, **options())
        made.train()
        assert has_sharded_weights(made.model.student) == (scaling is not ZERO2)
        everything = trained(made)
        if dist.get_rank() == 0:
            torch.save(everything, folder / f"{name}.pt")


def sharded_runs(folder: Path) -> None:
    """A run under FSDP2 that measures, clips and saves, its resumes, and its exported student."""
    shard_on_cpus()
    _runs(folder, FSDP2)


def zero_runs(folder: Path) -> None:
    _runs(folder, ZERO2)


def zero3_runs(folder: Path) -> None:
    launch_with_zero3(folder)
    _runs(folder, {})


def _runs(folder: Path, scaling: dict) -> None:
    for name, options in WHOLE_RUNS.items():
        options = options() | scaling
        if (
            name == "sampled" and scaling is FSDP2
        ):  # the checkpoints of this one are spread over the ranks, too
            config = FSDP2["fsdp_config"] | {"state_dict_type": "SHARDED_STATE_DICT"}
            options |= {"fsdp_config": config}
        for resumed in (None, "checkpoint-2", True):  # a straight run, part of it, the end of it
            made = trainer(folder / name, **options, student=student_of(name))
            start = folder / name / resumed if isinstance(resumed, str) else resumed
            made.train(resume_from_checkpoint=start)
            assert made.state.global_step == 4
            made.export_student(folder / name / f"student-{resumed}")
        if dist.get_rank() == 0:
            losses = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
            torch.save(torch.tensor(losses), folder / f"{name}-losses.pt")


def student_of(name: str):
    torch.manual_seed(0)
    model = toy.model()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    return get_peft_model(model, config) if name == "lora" else model


SAVING = {
    "max_steps": 4,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "max_grad_norm": 0.5,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
    "per_device_train_batch_size": 4,
}
WHOLE_RUNS = {
    name: lambda rollout=rollout: {
        "rows": dataset(16),
        "eval_dataset": dataset(5, seed=4),
        **({"rollout": rollout()} if rollout else {}),
        **SAVING,
    }
    for name, rollout in {
        "fixed": None,
        "lora": None,
        "sampled": lambda: SampledRollout("student", max_new_tokens=4),
        "replay": lambda: ReplayRollout(SampledRollout(max_new_tokens=4), capacity=4),
        "interleaved": lambda: InterleavedRollout(**INTERLEAVED),
    }.items()
}


def sharded_bfloat16(folder: Path) -> None:
    """The loss and the scale of the gradient are not rounded, although the weights are."""
    shard_on_cpus()
    made = trainer(
        folder / "run", rows=dataset(16), bf16=True, per_device_train_batch_size=4, **FSDP2
    )
    scales, losses = [], spy(made, "compute_loss")
    forward = Distillation.forward

    def watched(self, sequences, scales_K, progress):
        scales.append(scales_K)
        return forward(self, sequences, scales_K, progress)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "forward", watched)
        made.train()
    assert {one.dtype for one in (*scales, *losses)} == {torch.float32}
    policy = made.accelerator.state.fsdp_plugin.mixed_precision_policy
    assert policy.param_dtype is torch.bfloat16
    mine = weights(made.model.student)
    if dist.get_rank() == 0:
        torch.save(mine, folder / "weights.pt")
        torch.save(torch.tensor(made.state.log_history[0]["loss"]), folder / "loss.pt")


ROLLOUTS = {
    "fixed": {"kind": "fixed"},
    "seqkd": {"kind": "sampled", "by": "teacher", "max_new_tokens": 4, "batch_size": 3},
    "interleaved": {"kind": "interleaved", "top_k": 120, "block_size": 3, "max_new_tokens": 4},
}


def sharded_teacher(folder: Path) -> None:
    """Whole runs with a teacher whose layers are spread over the ranks, which have unequal work."""
    from tests.distributed.worker import measured_run

    with pytest.MonkeyPatch.context() as patch:
        loaded = spy(LocalTeacher, "load", patch)
        for name, rollout in ROLLOUTS.items():
            given = measured_run(folder, f"{name}-two") | {"rollout": rollout}
            given["teacher"]["placement"] = "sharded"
            given["training"]["max_steps"] = 2
            distill(recipes.build(given), show_progress=False)
    assert len(loaded) == len(ROLLOUTS)
    assert all(has_sharded_weights(teacher.model) for teacher in loaded)


def zero3_measured(folder: Path) -> None:
    """A whole recipe under ZeRO-3."""
    from tests.distributed.worker import measured_run

    launch_with_zero3(folder)
    distill(recipes.build(measured_run(folder, "two")), show_progress=False)


_TOGETHER = (sharded_alone, sharded_conformance, sharded_runs, sharded_bfloat16)
TOGETHER = tuple(case.__name__ for case in _TOGETHER)  # these share a launch
CASES = (
    *_TOGETHER,
    zero_conformance,
    zero_runs,
    zero3_conformance,
    zero3_runs,
    zero3_measured,
)
