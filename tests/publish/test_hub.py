"""Uploads by the real client to a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmdistill
from llmdistill import cli, uploads
from llmdistill import recipe as recipes
from llmdistill.errors import HubError
from llmdistill.publish.hub import content_of, push, push_result
from tests import toy
from tests.support.files import write_jsonl
from tests.support.hub_server import TOKEN, environment, serving_hub

MODEL = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json",
    "model.safetensors", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip
ROOT = Path(llmdistill.__file__).parents[1]


@pytest.fixture
def made(tmp_path):
    """A student as a run leaves it."""
    folder = tmp_path / "made" / "student"
    toy.model().save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A card\n")
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A finished run, with much that does not belong on the Hub."""
    folder = tmp_path / "runs" / "mine"
    (folder / "student").mkdir(parents=True)
    for file in made.iterdir():
        (folder / "student" / file.name).write_bytes(file.read_bytes())
    local = tmp_path / "secret"
    given = {
        "output": str(folder), "teacher": {"model": str(local / "teacher")},
        "student": {"model": str(local / "base")}, "data": {"train": str(local / "rows.jsonl")},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(recipes.dump(recipes.build(given)))
    (folder / "evaluation.json").write_text("{}")
    for name in (
        "before.json", "rows.json", "metrics.jsonl", "responses/0/a.arrow", "checkpoints/x.pt",
        "student/optimizer.pt", "student/training_args.bin", "student/rng_state.pth", "student/latest",
        "student/global_step2/mp_rank_00_model_states.pt", "student/zero_to_fp32.py", "student/notes.txt",
        "student/pytorch_model_fsdp_0/__0_0.distcp", "student/pytorch_model.bin", "student/trainer_state.json",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not yours")
    return folder


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(
        "output: x\nteacher: {model: m}\ngenerator: {kind: magpie}\n"
    )
    write_jsonl(folder / "rows.jsonl", [{"id": "0-0", "messages": []}])
    for name in ("train.jsonl", "train.parquet", "README.md", "calls.jsonl", "notes.txt"):
        (folder / name).write_text("text")
    return folder


# ---- what is uploaded ----


def test_a_run_goes_to_a_private_repository_with_what_belongs_there(run, hub):
    (run / "student" / "plots").mkdir()
    (run / "student" / "plots" / "loss.png").write_text("a chart")
    (run / "report.html").write_text("<html/>")
    assert push(run, "me/mine") == f"{hub.url}/me/mine"
    repo = hub.repos["models", "me/mine"]
    files = repo.branches["main"]
    assert repo.private
    assert set(files) == MODEL | {"plots/loss.png", "report.html", "recipe.yaml", "evaluation.json"}
    assert files["model.safetensors"] == (run / "student" / "model.safetensors").read_bytes()
    assert "put" in hub.asked  # by LFS
    assert b"model: teacher" in files["recipe.yaml"]
    assert b"secret" not in b"".join(files.values())


def test_a_model_folder_is_uploaded_and_the_next_upload_leaves_no_old_weights(made, hub, tmp_path):
    push(made, "me/mine")
    files = hub.repos["models", "me/mine"].branches["main"]
    assert set(files) == MODEL
    before = list(hub.asked)
    push(made, "me/mine")  # nothing has changed
    assert "commit" not in hub.asked[len(before) :]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "README.md").write_text("# An adapter\n")
    settings = {"base_model_name_or_path": str(tmp_path / "base"), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    push(adapter, "me/mine")
    weights = {"adapter_model.safetensors", "adapter_config.json"}
    assert set(files) == MODEL - {"model.safetensors"} | weights
    assert json.loads(files["adapter_config.json"]) == settings | {
        "base_model_name_or_path": "base"
    }


def test_a_dataset_is_uploaded_as_one(dataset, hub):
    assert push(dataset, "me/set") == f"{hub.url}/datasets/me/set"
    files = hub.repos["datasets", "me/set"].branches["main"]
    assert set(files) == {"README.md", "train.jsonl", "train.parquet"}
    hub.repos["datasets", "me/set"].branches["main"]["held.jsonl"] = b"of an older version"
    (dataset / "README.md").write_text("another")
    push(dataset, "me/set")
    assert "held.jsonl" not in files


# ---- where it goes ----


def test_a_public_repository_is_refused_unless_it_is_asked_for(made, hub):
    assert push(made, "me/open", private=False) == f"{hub.url}/me/open"
    assert not hub.repos["models", "me/open"].private
    with pytest.raises(HubError, match="me/open is public on the Hub.* pass private=False"):
        push(made, "me/open")
    push(made, "me/mine")
    hub.faults["commit"] = [500]
    (hub.repos["models", "me/mine"].branches["main"]).clear()
    with pytest.raises(HubError):
        push(made, "me/mine", private=False)
    assert hub.repos["models", "me/mine"].private  # not before it is uploaded
    push(made, "me/mine", private=False)
    assert not hub.repos["models", "me/mine"].private


def test_branches_and_pull_requests_leave_main_as_it_is(made, hub):
    address = push(made, "me/mine", revision="a/b", message="Try it")
    repo = hub.repos["models", "me/mine"]
    assert address == f"{hub.url}/me/mine/tree/a/b"
    assert (set(repo.branches["a/b"]), repo.branches["main"]) == (MODEL, {})
    assert [message for message, _ in repo.commits] == ["Try it"]
    push(made, "me/mine", revision="a/b")  # the branch exists
    assert push(made, "me/mine", create_pr=True) == f"{hub.url}/me/mine/discussions/1"
    assert (set(repo.pulls[0]), repo.branches["main"]) == (MODEL, {})
    (made / "README.md").write_text("# Another card\n")
    push(made, "me/mine", revision="refs/pr/1")
    assert repo.pulls[0]["README.md"] == b"# Another card\n"
    with pytest.raises(HubError, match="a pull request is always made to the branch main"):
        push(made, "me/mine", revision="a/b", create_pr=True)


# ---- what is refused before anything is sent ----


def test_what_is_not_finished_is_refused_with_what_to_do(run, dataset, tmp_path):
    (dataset / "train.jsonl").unlink()
    with pytest.raises(HubError, match="the dataset in .* is not finished.* Pass resume"):
        content_of(dataset)
    with pytest.raises(HubError, match="is a checkpoint, which only resumes a run"):
        content_of(run / "student")
    (run / "student" / "trainer_state.json").unlink()
    (run / "student" / "README.md").unlink()
    with pytest.raises(HubError, match="the run in .* is not finished.* the same recipe"):
        content_of(run)
    with pytest.raises(HubError, match="has no README.md. Write one"):
        content_of(run / "student")
    (run / "student" / "model.safetensors").unlink()
    with pytest.raises(HubError, match="has no weights in the format of safetensors"):
        content_of(run / "student")
    with pytest.raises(HubError, match="is no folder"):
        content_of(tmp_path / "none")


def test_a_row_with_an_image_of_this_machine_is_not_pushed(dataset, tmp_path):
    write_jsonl(dataset / "rows.jsonl", [{"id": "0-0", "images": [str(tmp_path / "1.png")]}])
    with pytest.raises(HubError, match="row 0-0 names an image by its path"):
        content_of(dataset)


# ---- errors ----


@pytest.mark.parametrize(
    ("route", "faults", "said"),
    [
        ("create", [401] * 9, "cannot use me/mine on the Hub: 401 Unauthorized.* Log in"),
        ("create", [403] * 9, "cannot use me/mine on the Hub: 403 Forbidden.* a token that may write"),
        ("create", [500] * 9, "500 Internal Server Error.* Try again later"),
        ("tree", [404], "cannot upload to me/mine on the Hub: 404 Not Found.* Check the name"),
        ("commit", [409], "409 Conflict.* at the same time. Try again"),
        ("commit", [429], "429 Too Many Requests.* Wait a few minutes"),
        ("commit", [500], "cannot upload to me/mine on the Hub: 500 Internal Server Error"),
        ("commit", ["cut"], "no connection, or it was cut.* Check the network"),
        ("put", [500] * 9, "500 Internal Server Error"),
        ("put", ["cut"] * 9, "no connection, or it was cut"),
        ("yaml", [400], "400 Bad Request.* Correct what the answer names"),
    ],
)  # fmt: skip
def test_each_fault_is_told_with_what_to_do_and_without_the_token(made, hub, route, faults, said):
    hub.faults[route] = faults
    with pytest.raises(HubError, match=said) as caught:
        push(made, "me/mine")
    assert TOKEN not in str(caught.value)
    assert not any(repo.commits for repo in hub.repos.values())


def test_the_pipeline_of_xet_takes_the_same_arguments(dataset, hub, monkeypatch):
    """Without a large file: these would go to the storage of Xet, which this Hub does not have."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    (dataset / "train.parquet").unlink()
    push(dataset, "me/set", revision="dev", message="By Xet")
    repo = hub.repos["datasets", "me/set"]
    assert set(repo.branches["dev"]) == {"README.md", "train.jsonl"}
    assert repo.commits[0][0] == "By Xet"
    assert push(dataset, "me/set", create_pr=True) == f"{hub.url}/datasets/me/set/discussions/1"
    assert (set(repo.pulls[0]), repo.branches["main"]) == ({"README.md", "train.jsonl"}, {})
    hub.faults["commit"] = [403] * 9
    (dataset / "README.md").write_text("another")
    with pytest.raises(HubError, match="cannot upload to me/set on the Hub: 403"):
        push(dataset, "me/set")


def test_a_fault_that_passes_is_not_seen(made, hub):
    hub.faults |= {"preupload": [429, 500], "put": ["cut", 503], "batch": [429]}
    push(made, "me/mine")
    assert set(hub.repos["models", "me/mine"].branches["main"]) == MODEL


def test_a_token_that_is_given_is_used_and_never_shown(made, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_AnotherOne1234567890")
    with pytest.raises(HubError, match="401"):
        push(made, "me/mine")
    push(made, "me/mine", token=TOKEN)
    assert TOKEN not in repr(uploads.Repository("me/mine", token=TOKEN))
    hub.faults["commit"] = [500]
    hub.repos["models", "me/mine"].branches["main"].clear()
    with pytest.raises(HubError) as caught:
        push(made, "me/mine", token=TOKEN)
    assert "a fault with Bearer" in str(caught.value)  # the server repeats it
    assert TOKEN not in str(caught.value)


def test_no_network_and_a_wrong_name(made, hub, monkeypatch):
    with pytest.raises(HubError, match="Repo id must use alphanumeric .* such as me/my-model"):
        push(made, "me/my model")
    with pytest.raises(HubError, match="cannot use other/x on the Hub: 403"):
        push(made, "other/x")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="no connection"):
        push(made, "me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set. Unset it"):
        push(made, "me/mine")


def test_a_failed_upload_of_a_result_says_how_to_repeat_it(made, hub):
    hub.faults["commit"] = [500]
    with pytest.raises(HubError) as caught:
        push_result(made, "me/mine", private=False, revision="dev")
    command = f"`llmdistill push {made} me/mine` (pass private=False, pass revision=dev)."
    assert str(caught.value).endswith(
        f"All results are in {made}. To upload them later, run {command}"
    )


# ---- the command ----


def test_the_command_uploads_and_prints_the_address(run, hub, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmdistill", "push", str(run), "me/mine", *arguments])
        monkeypatch.setattr("llmdistill.cli.output.set_up", lambda **options: None)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        return stop.value.code or 0, shown

    code, shown = command("--quiet", "--revision", "dev", "--message", "Try it")
    assert (code, shown.out) == (0, f"{hub.url}/me/mine/tree/dev\n")
    assert (
        command("--create-pr")[1].out == f"Uploaded to {hub.url}/me/mine/discussions/1 (private).\n"
    )
    assert command("--public")[1].out == f"Uploaded to {hub.url}/me/mine (public).\n"
    code, shown = command()
    assert code == 2
    assert "HubError: me/mine is public on the Hub" in shown.err
    assert "To publish it, pass --public; or choose another name." in shown.err


@pytest.mark.slow
def test_the_command_reaches_the_hub_of_the_environment(run):
    """In a new process, in which the client reads the environment."""
    with serving_hub() as hub:
        done = subprocess.run(
            [sys.executable, "-m", "llmdistill", "push", str(run), "me/mine"],
            env=os.environ | environment(hub), cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"Uploaded to {hub.url}/me/mine (private).\n")
    assert set(hub.repos["models", "me/mine"].branches["main"]) > MODEL
    assert TOKEN not in done.stdout + done.stderr


def test_the_lists_hold_no_pickle_and_no_state_of_training():
    """By their names: those of Trainer, of DeepSpeed and of FSDP."""
    from huggingface_hub.utils import filter_repo_objects

    names = [
        "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
        "training_args.bin", "trainer_state.json", "objectives.safetensors", "teacher.safetensors",
        "rollout.json", "rollout_0.json", "stream.json", "manifest.json", "latest", "zero_to_fp32.py",
        "global_step2/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/__0_0.distcp",
        "pytorch_model.bin", "model.pt", "optimizer_0/.metadata",
    ]  # fmt: skip
    assert list(filter_repo_objects(names, allow_patterns=list(uploads.MODEL_FILES))) == []
