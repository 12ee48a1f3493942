"""A trainer on toys, and its gradients."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from llmdistill.data.collate import PromptDataset
from llmdistill.models.sharding import whole
from llmdistill.objectives.response import ResponseObjective
from llmdistill.rollouts.fixed import FixedRollout
from llmdistill.sampling import Sampling
from llmdistill.teachers.local import LocalTeacher
from llmdistill.training.trainer import DistillTrainer
from tests import toy

INTERLEAVED = {  # its acceptance on the toys is neither 0 nor 1
    "top_k": 120,
    "block_size": 3,
    "max_new_tokens": 6,
    "student_sampling": Sampling(),
}


def arguments(folder, **options) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "optim": "sgd",  # AdamW would hide a wrongly scaled gradient
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**defaults | options)


def trainer(
    folder, *, student=None, teacher=None, rows=None, rollout=None, objectives=None, **options
):
    """Build a trainer on toys; arguments replace its parts, and `options` go to TrainingArguments."""
    tokenizer = toy.tokenizer()
    kept = {
        name: options.pop(name)
        for name in ("eval_dataset", "callbacks", "model_card")
        if name in options
    }
    args = options.pop("args", None) or arguments(folder, **options)
    return DistillTrainer(
        student=student or toy.model(),
        teacher=teacher or LocalTeacher(toy.teacher_model(), tokenizer),
        rollout=rollout or FixedRollout(),
        objectives=objectives or [ResponseObjective("forward_kl")],
        args=args,
        train_dataset=toy.rows(8) if rows is None else rows,
        processing_class=tokenizer,
        **kept,
    )


def dataset(number: int = 8, **options) -> PromptDataset:
    return PromptDataset.of(toy.rows(number, **options), toy.tokenizer())


def weights(model) -> torch.Tensor:
    """Return all weights of a model.  All ranks must call it: the weights may be spread over them."""
    return torch.cat([_full(p) for p in model.parameters()])


def trained(trainer) -> torch.Tensor:
    """Return everything that a trainer trains, including the teacher's part, as `weights` does."""
    return torch.cat([_full(p) for p in trainer.model.parameters() if p.requires_grad])


def _full(parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_id"):
        return whole(parameter.detach()).flatten().clone()
    from deepspeed.utils import safe_get_full_fp32_param  # ZeRO-3

    return safe_get_full_fp32_param(parameter).detach().flatten().clone()


def gradient(folder, **options) -> torch.Tensor:
    """Return the gradient of one SGD step at learning rate 1: old weights minus new ones."""
    made = trainer(folder, learning_rate=1.0, **options)
    before = weights(made.model.student)
    made.train()
    return before - weights(made.model.student)
