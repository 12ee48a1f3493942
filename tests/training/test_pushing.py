"""Uploads of a run: what goes to the Hub, and that no failed upload stops the training."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerCallback

from llmdistill import recipe as recipes
from llmdistill import run
from llmdistill.errors import HubError, RecipeError
from llmdistill.models.adapters import add_adapter
from llmdistill.rollouts.sampled import SampledRollout
from llmdistill.run import distill
from tests import toy
from tests.support.files import write_jsonl
from tests.support.hub_server import TOKEN, Repo
from tests.training.helpers import trainer

MODEL = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "push_to_hub": True}


class AtStep(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **options):
        if state.global_step == self.step:
            self.do()


def files(hub, name="me/mine"):
    return hub.repos["models", name].branches["main"]


# ---- where it goes, and what ----


def test_the_repository_is_private_and_has_the_name_of_the_run(tmp_path, hub):
    trainer(tmp_path / "mine" / "checkpoints", push_to_hub=True)
    trainer(tmp_path / "other", push_to_hub=True, hub_private_repo=False)
    assert {name: repo.private for (_, name), repo in hub.repos.items()} == {
        "me/mine": True, "me/other": False,
    }  # fmt: skip
    hub.repos["models", "me/open"] = Repo(private=False)
    with pytest.raises(HubError, match="me/open is public .* set training.hub_private_repo: false"):
        trainer(tmp_path, push_to_hub=True, hub_model_id="me/open")


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_what_a_run_resumes_from_is_not_uploaded(tmp_path, hub, strategy):
    with pytest.raises(RecipeError, match=f"end or every_save, got '{strategy}'"):
        trainer(tmp_path, push_to_hub=True, hub_strategy=strategy)
    assert hub.asked == []
    given = {
        "output": "x",
        "teacher": {"model": "a"},
        "student": {"model": "b"},
        "data": {"train": "c"},
    }
    with pytest.raises(RecipeError, match=rf"hub_strategy.* end or every_save, got '{strategy}'"):
        recipes.build(given | {"training": {"hub_strategy": strategy}})


def test_pushes_the_student_and_its_card_and_nothing_else(tmp_path, hub):
    made = trainer(tmp_path, model_card="# A card")
    made.train()
    (tmp_path / "secret.txt").write_text("not yours")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "optimizer.pt").write_text("not yours")
    made.args.hub_model_id = "me/mine"
    assert made.push_to_hub() == f"{hub.url}/me/mine"
    assert (set(files(hub)), files(hub)["README.md"]) == (MODEL, b"# A card")
    assert (tmp_path / "student" / "README.md").read_text() == "# A card"
    exported = (tmp_path / "student" / "model.safetensors").read_bytes()
    assert files(hub)["model.safetensors"] == exported
    made.model_card = None
    assert (
        made.push_to_hub(blocking=False, revision="dev").result() == f"{hub.url}/me/mine/tree/dev"
    )
    assert (
        b"It has no model card yet." in hub.repos["models", "me/mine"].branches["dev"]["README.md"]
    )


def test_pushes_checkpoints_without_their_training_state(tmp_path, hub):
    made = trainer(
        tmp_path / "mine", rollout=SampledRollout("teacher", max_new_tokens=3), **EVERY_STEP
    )
    made.train()
    ((message, uploaded),) = hub.repos["models", "me/mine"].commits
    assert message == "Training in progress, step 1"
    assert set(uploaded) == MODEL
    saved = tmp_path / "mine" / "checkpoint-1" / "model.safetensors"
    assert uploaded["model.safetensors"] == saved.read_bytes()
    assert not (tmp_path / "mine" / "uploading").exists()
    made = trainer(tmp_path / "end", hub_strategy="end", **EVERY_STEP)
    made.train()
    assert hub.repos["models", "me/end"].commits == []


def test_the_card_of_an_adapter_is_ours_and_no_path_is_shown(tmp_path, hub):
    base = tmp_path / "secret" / "base"
    toy.model().save_pretrained(base)
    student = toy.model().from_pretrained(base, trust_remote_code=False)
    adapted = add_adapter(student, rank=2, alpha=4, targets=["q_proj"], dropout=0.0, seed=0)
    made = trainer(tmp_path / "mine", student=adapted, model_card="# Ours", **EVERY_STEP)
    made.train()
    uploaded = files(hub)
    assert uploaded["README.md"] == b"# Ours"
    assert {"adapter_model.safetensors", "adapter_config.json"} < set(uploaded)
    assert json.loads(uploaded["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert not any(b"secret" in data for data in uploaded.values())
    assert not (tmp_path / "mine" / "checkpoint-1" / "README.md").exists()
    made.push_to_hub()  # merged
    assert set(uploaded) == MODEL


# ---- an upload that fails ----


def test_a_failed_upload_does_not_stop_the_training(tmp_path, hub, caplog):
    made = trainer(tmp_path / "mine", max_steps=2, **EVERY_STEP)
    hub.faults["commit"] = [500, "cut"]
    made.train()
    assert made.state.global_step == 2
    assert "an upload failed, and training goes on: cannot upload to me/mine" in caplog.text
    assert "500 Internal Server Error" in caplog.text
    hub.faults["commit"] = [403]
    with pytest.raises(HubError, match="cannot upload to me/mine on the Hub: 403 Forbidden"):
        made.push_to_hub()
    assert made.push_to_hub() == f"{hub.url}/me/mine"
    assert set(files(hub)) == MODEL


def test_a_full_disk_stops_no_training(tmp_path, hub, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("llmdistill.uploads.stage", full)
    made = trainer(tmp_path / "mine", **EVERY_STEP)
    made.train()
    assert "an upload failed, and training goes on: no space left" in caplog.text


@pytest.mark.parametrize("always", [False, True])
def test_an_upload_outlives_its_checkpoint_and_others_wait_for_it_or_are_skipped(
    tmp_path, hub, caplog, always
):
    folder = tmp_path / "mine"
    hub.faults["preupload"] = ["wait"]  # before the weights are read

    def deleted_then_go():
        assert always or not (folder / "checkpoint-1").exists()
        hub.waits.set()

    # With `hub_always_push` the save of step 2 would wait.
    callbacks = [AtStep(2 if always else 3, deleted_then_go)]
    options = {"max_steps": 3, "save_total_limit": 1, "hub_always_push": always, **EVERY_STEP}
    made = trainer(folder, callbacks=callbacks, **options)
    made.train()
    steps = [message.rpartition(" ")[2] for message, _ in hub.repos["models", "me/mine"].commits]
    if always:
        assert steps == ["1", "2", "3"]
    else:
        assert steps in (["1"], ["1", "3"])
        assert "the checkpoint of step 2 is not uploaded, because another upload" in caplog.text
    weights = [one["model.safetensors"] for _, one in hub.repos["models", "me/mine"].commits]
    assert len(set(weights)) == len(weights)
    assert not (folder / "uploading").exists()


def test_a_token_is_in_no_file_and_in_no_message(tmp_path, hub, caplog, capfd):
    """S9: this test covers uploads, also failed ones."""
    hub.faults |= {"commit": [500], "yaml": [400]}
    caplog.set_level("DEBUG", "llmdistill")
    options = {"hub_token": TOKEN, "model_card": "# A card", "max_steps": 2, **EVERY_STEP}
    made = trainer(tmp_path / "mine", **options)
    made.train()
    hub.faults["commit"] = [500]
    with pytest.raises(HubError, match="a fault with Bearer") as caught:
        made.push_to_hub()
    made.push_to_hub()
    shown = capfd.readouterr()
    texts = [shown.out, shown.err, caplog.text, str(caught.value)]
    assert not any(TOKEN in text for text in texts)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN.encode() in data for data in files(hub).values())


# ---- a run of a recipe ----


@pytest.mark.slow
def test_a_run_is_finished_although_its_last_upload_fails(pair, tmp_path, hub, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(8))
    folder = tmp_path / "runs" / "mine"
    given = {
        "output": str(folder), "teacher": {"model": pair[0], "dtype": "float32"},
        "student": {"model": pair[1]}, "data": {"train": str(tmp_path / "rows.jsonl"), "hold_back": 2},
        "evaluate": {"max_new_tokens": 3},
        "training": {
            "use_cpu": True, "max_steps": 2, "save_steps": 2, "dataloader_pin_memory": False, "push_to_hub": True,
        },
    }  # fmt: skip
    # The first upload is of the checkpoint, the second of the result.
    hub.faults["commit"] = [None, 500]
    with pytest.raises(HubError) as caught:
        distill(recipes.build(given), show_progress=False)
    assert "cannot upload to me/mine on the Hub: 500" in str(caught.value)
    assert f"To upload them later, run `llmdistill push {folder} mine`." in str(caught.value)
    repo = hub.repos["models", "me/mine"]
    assert repo.private
    ((_, first),) = repo.commits
    assert b"**Training is in progress.**" in first["README.md"]
    assert set(first) == MODEL
    assert (folder / "evaluation.json").is_file()
    card = (folder / "student" / "README.md").read_bytes()
    assert b"kl_teacher_text" in card
    # The same command again uploads, and does nothing else.
    monkeypatch.setattr(run, "load_pair", lambda *a: pytest.fail("loaded"))
    distill(recipes.build(given), show_progress=False)
    names = {one for one in repo.branches["main"] if not one.startswith("plots/")}
    assert names == MODEL | {"evaluation.json", "recipe.yaml", "report.html"}
    assert not any(str(tmp_path).encode() in data for data in repo.branches["main"].values())
    assert repo.branches["main"]["README.md"] == card
