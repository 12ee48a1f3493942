"""`llmdistill export`: from a run to a folder that plain transformers loads."""

from __future__ import annotations

from transformers import AutoModelForCausalLM

from tests.support.commands import run, short_recipe


def test_the_student_of_a_run_is_exported(pair, monkeypatch, capsys, tmp_path):
    recipe = short_recipe(tmp_path, pair)
    assert run(monkeypatch, "train", str(recipe), "evaluate.max_new_tokens=2", "--quiet") == 0
    capsys.readouterr()
    source, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert run(monkeypatch, "export", source, out) == 0
    shown = capsys.readouterr().out
    assert "model.safetensors  the weights in bfloat16" in shown
    assert f"AutoModelForCausalLM.from_pretrained('{out}')" in shown
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").num_parameters() > 0
    assert "llmdistill" in (tmp_path / "out" / "README.md").read_text()
    assert run(monkeypatch, "export", source, out, "--dtype", "float16") == 2
    assert "pass --overwrite to replace" in capsys.readouterr().err
    options = ["--dtype", "float16", "--overwrite", "--quiet"]
    assert run(monkeypatch, "export", source, out, *options) == 0
    assert capsys.readouterr().out == f"{out}\n"


def test_what_cannot_be_exported_ends_with_2(pair, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for options, said in (
        (["--format", "gguf"], "git clone https://github.com/ggml-org/llama.cpp"),
        (["--format", "adapter"], "has no adapter"),
        (["--quantize", "q8_0"], "the format safetensors is not quantised"),
    ):
        assert run(monkeypatch, "export", pair[1], str(tmp_path / "out"), *options) == 2
        assert said in capsys.readouterr().err
