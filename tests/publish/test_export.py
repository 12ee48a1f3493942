"""What is exported loads again with the same logits, and nothing of a user's is overwritten."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmdistill.errors import CheckpointError, ModelError, RecipeError
from llmdistill.models.adapters import add_adapter
from llmdistill.models.load import load_model, load_tokenizer
from llmdistill.publish.export import _card_of, export
from tests import toy

LLAMA_CPP = Path(__file__).parents[1] / "support" / "llama_cpp"
IDS = torch.tensor([[5, 9, 80, 200, 31, 7]])


def finish(folder: Path) -> Path:
    """Add what a run writes next to the weights."""
    toy.tokenizer().save_pretrained(folder)
    config = toy.model().generation_config
    config.eos_token_id = [2, 7]
    config.save_pretrained(folder)
    (folder / "README.md").write_text("# card\n")
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run folder with a merged student."""
    run = tmp_path_factory.mktemp("plain") / "my_run"
    toy.model(seed=4).save_pretrained(run / "student")
    finish(run / "student")
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A run folder whose student is an adapter alone, with weights that matter."""
    folder = tmp_path_factory.mktemp("adapter")
    base = toy.model(seed=4)
    base.save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "base")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base")
    made = add_adapter(loaded, rank=4, alpha=8, targets="all-linear", dropout=0.0, seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    made.save_pretrained(folder / "run" / "student", save_embedding_layers=False)
    finish(folder / "run" / "student")
    return folder / "run"


@pytest.fixture
def converter(monkeypatch):
    """The stand-in for llama.cpp, which uses the real package `gguf`."""
    pytest.importorskip("gguf")
    monkeypatch.setenv("LLAMA_CPP", str(LLAMA_CPP))


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits[..., : toy.NUM_TOKENS]


def adapted(run: Path, folder: Path | None = None):
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder or run / "student")


def test_the_merged_weights_give_the_logits_of_the_adapter(adapter, tmp_path):
    export(adapter, tmp_path / "out", "safetensors", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(adapted(adapter)), rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    assert (logits(merged) - logits(base)).abs().max() > 0.1


def test_the_adapter_alone_gives_the_same_logits(adapter, tmp_path):
    export(adapter, tmp_path / "out", "adapter")
    found = adapted(adapter, tmp_path / "out")
    assert torch.equal(logits(found), logits(adapted(adapter)))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)],
)
def test_weights_are_rounded_to_the_dtype(plain, tmp_path, dtype, expected):
    files = export(plain, tmp_path / "out", "safetensors", dtype=dtype)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    weights = dict(found.named_parameters())
    assert {one.dtype for one in weights.values()} == {expected}
    for name, one in load_model(str(plain / "student"), dtype="float32").named_parameters():
        assert torch.equal(weights[name], one.to(expected))
    assert str(expected).removeprefix("torch.") in files["model.safetensors"]


@pytest.mark.parametrize("format", ["safetensors", "adapter", "gguf"])
def test_tokenizer_template_ends_and_card_go_along(adapter, tmp_path, format, converter):
    options = {} if format == "adapter" else {"dtype": "float32"}
    export(adapter, tmp_path / "out", format, **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == toy.TEMPLATE
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [
        2,
        7,
    ]
    assert (tmp_path / "out/README.md").read_text() == "# card\n"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]  # no temporary folder stays
    (tmp_path / "usual").mkdir()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "usual")}
    assert len(modes) == 1


def test_a_gguf_file_has_the_logits_of_the_merged_student(adapter, tmp_path, converter):
    files = export(adapter, tmp_path / "out", "gguf", dtype="float32")
    assert list(files) == ["run-F32.gguf"]
    name = str(tmp_path / "out" / "run-F32.gguf")
    found = load_model(name, dtype="float32")
    torch.testing.assert_close(logits(found), logits(adapted(adapter)), rtol=1e-4, atol=1e-4)
    text = "the sea <|im_end|>"
    assert load_tokenizer(name).encode(text) == toy.tokenizer().encode(text)


LLAMA = """
import itertools, sys, llama_cpp
loaded = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=1, verbose=False)
tokens = loaded.generate([int(one) for one in sys.argv[2:]], temp=0.0, repeat_penalty=1.0)
print(*itertools.islice(tokens, 8))
"""


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_writes_the_same_tokens(plain, tmp_path, converter):
    (name,) = export(plain, tmp_path / "out", "gguf", dtype="float32")
    # In a new process, because llama_cpp leaves files open.
    command = [
        sys.executable,
        "-c",
        LLAMA,
        str(tmp_path / "out" / name),
        *map(str, IDS[0].tolist()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(plain / "student", dtype=torch.float32)
    expected = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert done.stdout.split() == [str(one) for one in expected[0, IDS.shape[1] :].tolist()]


# ---- llama.cpp's programs ----


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env python3\nimport sys\n{text}\n")
    (folder / name).chmod(0o755)


WRITES = "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').write(' '.join(sys.argv[2:]))"


def test_q8_0_is_written_by_the_converter_itself(plain, tmp_path, monkeypatch):
    program(tmp_path / "cpp", "convert_hf_to_gguf.py", WRITES)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "cpp"))
    (name,) = export(plain, tmp_path / "out", "gguf", quantize="q8_0")
    assert name == "my_run-Q8_0.gguf"
    assert "--outtype q8_0" in (tmp_path / "out" / name).read_text()


def test_others_are_written_by_a_second_program(plain, tmp_path, monkeypatch):
    program(tmp_path / "cpp", "convert_hf_to_gguf.py", WRITES)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "cpp"))
    with pytest.raises(ModelError, match="needs llama.cpp's llama-quantize.*Use q8_0"):
        export(plain, tmp_path / "out", "gguf", quantize="q4_k_m")
    text = "open(sys.argv[2], 'w').write(open(sys.argv[1]).read() + sys.argv[3])"
    program(tmp_path / "cpp/build/bin", "llama-quantize", text)
    (name,) = export(plain, tmp_path / "out", "gguf", quantize="q4_k_m")
    assert name == "my_run-Q4_K_M.gguf"
    written = (tmp_path / "out" / name).read_text()
    assert "--outtype bf16" in written
    assert written.endswith("Q4_K_M")
    assert [one.name for one in (tmp_path / "out").glob("*.gguf")] == [name]


def test_a_converter_on_path_is_used(plain, tmp_path, monkeypatch):
    program(tmp_path / "bin", "convert_hf_to_gguf.py", WRITES)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    assert list(export(plain, tmp_path / "out", "gguf", dtype="float16")) == ["my_run-F16.gguf"]


@pytest.mark.parametrize("format", ["gguf", "ollama"])
def test_without_a_converter_the_commands_are_given(plain, tmp_path, monkeypatch, format):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("llmdistill.publish.export.load_model", None)  # before a model is loaded
    with pytest.raises(ModelError, match="git clone https://github.com/ggml-org/llama.cpp"):
        export(plain, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ModelError, match=f"in LLAMA_CPP={tmp_path}"):
        export(plain, tmp_path / "out", format)


def test_a_converter_that_fails_says_why_and_leaves_nothing(plain, tmp_path, monkeypatch):
    program(tmp_path / "cpp", "convert_hf_to_gguf.py", "sys.exit('Model Odd is not supported')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "cpp"))
    with pytest.raises(ModelError, match="Model Odd is not supported"):
        export(plain, tmp_path / "out", "gguf")
    assert [one.name for one in tmp_path.iterdir()] == ["cpp"]


def test_ollama_gets_a_modelfile_beside_the_gguf(plain, tmp_path, converter):
    files = export(plain, tmp_path / "out", "ollama", dtype="float32")
    assert list(files) == ["my_run-F32.gguf", "Modelfile"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith('FROM ./my_run-F32.gguf\nTEMPLATE """{{ range .Messages }}')
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert text.count("PARAMETER stop") == 2  # both end tokens of the generation config


def test_a_template_that_ollama_cannot_write_is_found_before_the_conversion(
    plain, tmp_path, converter, monkeypatch
):
    monkeypatch.setattr("llmdistill.publish.export.load_model", None)
    shutil.copytree(plain, tmp_path / "run")
    template = toy.TEMPLATE.replace("{{ m.content }}", "{{ m.content | upper }}")
    (tmp_path / "run/student/chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match="cannot write a Modelfile for 'student'"):
        export(tmp_path / "run", tmp_path / "out", "ollama")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("format", "options", "error", "message"),
    [
        ("adapter", {}, ModelError, "has no adapter"),
        ("onnx", {}, RecipeError, "format: 'onnx' is not one of safetensors, adapter"),
        ("safetensors", {"dtype": "int8"}, RecipeError, "dtype: 'int8' is not one of"),
        ("adapter", {"dtype": "float16"}, RecipeError, "an adapter keeps its own"),
        ("safetensors", {"quantize": "q8_0"}, RecipeError, "is not quantised"),
    ],
)
def test_what_has_no_meaning_is_refused(plain, tmp_path, format, options, error, message):
    with pytest.raises(error, match=message):
        export(plain, tmp_path / "out", format, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="has no model"):
        export(tmp_path, tmp_path / "out", "safetensors")


def test_only_an_exported_model_is_replaced_and_only_if_asked(adapter, plain, tmp_path):
    out = tmp_path / "out"
    export(adapter, out, "adapter")
    with pytest.raises(CheckpointError, match="out is not empty.*pass overwrite"):
        export(plain, out, "safetensors")
    assert (out / "adapter_config.json").is_file()
    export(plain, out, "safetensors", overwrite=True)
    assert not (out / "adapter_config.json").exists()
    assert (out / "config.json").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    for folder, said in (
        (tmp_path / "mine", "are no exported model"),
        (plain, "are no exported model"),  # a run has folders
        (plain / "student", "is the model itself"),
        (tmp_path / "mine" / "diary.txt", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            export(plain, folder, "safetensors", overwrite=True)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "x"
    assert (plain / "student" / "config.json").is_file()


def test_a_failed_export_keeps_the_old_one(adapter, plain, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(adapter, out, "adapter")
    program(tmp_path / "cpp", "convert_hf_to_gguf.py", "sys.exit(1)")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "cpp"))
    with pytest.raises(ModelError, match="exit status 1"):
        export(plain, out, "gguf", overwrite=True)
    assert (out / "adapter_config.json").is_file()


def test_an_exported_card_fits_what_is_exported():
    """Charts stay with the run, and a merged adapter is loaded by transformers alone."""
    text = "library_name: peft\n\nfrom peft import AutoPeftModelForCausalLM\n\n![Loss](plots/loss.png)\n\nEnd\n"
    assert _card_of(text, "adapter") == text.replace("![Loss](plots/loss.png)\n\n", "")
    merged = _card_of(text, "safetensors")
    assert "library_name: transformers" in merged
    assert "from transformers import AutoModelForCausalLM" in merged
    assert "plots/" not in merged
    assert merged.endswith("End\n")
