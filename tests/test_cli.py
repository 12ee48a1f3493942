"""The command line: S12, `check`, `evaluate`, `env`, and how fast it answers."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.text import Text

from llmdistill import __version__
from llmdistill.cli import look, show
from llmdistill.cost import disk, memory
from llmdistill.data.build import load_data
from llmdistill.data.collate import PromptDataset
from llmdistill.data.table import Row
from llmdistill.models.load import load_model
from llmdistill.models.vocabulary import VocabularyComparison, VocabularyMatch
from llmdistill.recipe import load
from tests import toy
from tests.support.commands import run, short_recipe
from tests.support.files import write_jsonl


@pytest.fixture
def recipe(tmp_path, pair):
    return short_recipe(tmp_path, pair)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rolout.kind=fixed"], "unknown key 'rolout'. Did you mean 'rollout'?"),
        (
            ["training.learning_rate=fast"],
            "'training.learning_rate': should be float or int, got 'fast' (str)",
        ),
        (["rollout.kind=sampled", "rollout.max_new_tokens=0"], "'rollout.max_new_tokens'"),
        (["objectives.0.beta=0.5"], "is not an index of a list"),
    ],
)
def test_a_mistake_ends_with_2_a_path_and_no_traceback(recipe, overrides, message):
    """S12: in under 2 seconds, before torch is imported."""
    start = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "llmdistill",
        "train",
        str(recipe),
        "objectives=[]",
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 2


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"llmdistill {__version__}\n"


def test_a_shell_can_complete_commands():
    """What bash asks after `llmdistill ex` and the tabulator key."""
    asked = {
        "_LLMDISTILL_COMPLETE": "complete_bash",
        "COMP_WORDS": "llmdistill ex",
        "COMP_CWORD": "1",
    }
    program = Path(sys.executable).with_name("llmdistill")
    done = subprocess.run(
        [program], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    assert done.stdout == "export\n"


def test_no_color_means_no_colour(monkeypatch):
    """Whatever else asks for colour."""
    shown = []
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.setenv(name, "1")
        console = importlib.reload(show).console
        with console.capture() as capture:
            console.print(Text("trained", style="red"))
        shown.append(capture.get())
    monkeypatch.undo()
    importlib.reload(show)
    assert "\x1b[31m" in shown[0]
    assert "\x1b[3" not in shown[1]


def test_help_is_quick():
    """P5: the best of three; 0.5 s, twice that while the suite's other worker takes its share."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "llmdistill", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
    assert all(
        command in done.stdout
        for command in ("train", "evaluate", "carve", "check", "env", "recipes")
    )
    assert min(seconds) < 1.0


def test_trains_and_says_where_the_student_is(recipe, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "train", str(recipe)) == 0
    shown = capsys.readouterr()
    assert "kl_teacher_text" in shown.out
    assert "student before" in shown.out
    assert "run/student" in shown.out
    assert "%" not in shown.err  # no bar where stderr is no terminal


def test_a_run_ends_with_its_files_and_what_to_do_next(recipe, monkeypatch, capsys, tmp_path):
    """Prompts without control tokens, responses, a table, the files and two commands."""
    assert run(monkeypatch, "train", str(recipe)) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>" not in shown
    assert "Prompt: " in shown
    for name in ("student", "evaluation.json", "metrics.jsonl", "recipe.yaml"):
        assert re.search(rf"^  {re.escape(name)} ", shown, flags=re.MULTILINE)
        assert (tmp_path / "run" / name).exists()
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}/run/student')" in shown
    assert f"llmdistill evaluate {tmp_path}/run/student --teacher" in shown
    assert max(map(len, re.findall(r"^[│┏┡└].*", shown, flags=re.MULTILINE))) <= 80


@pytest.mark.slow
def test_a_run_prints_its_steps_and_no_noise(recipe, tmp_path):
    """In a process as a user's: the steps with the time, and nothing that libraries print."""
    command = [sys.executable, "-m", "llmdistill", "train", str(recipe), f"output={tmp_path}/"]
    done = [
        subprocess.run([*command[:-1], command[-1] + name, *flags], capture_output=True, text=True, check=True)
        for name, flags in (("a", []), ("b", ["--quiet"]))
    ]  # fmt: skip
    steps = re.findall(r"^\[ *\d+:\d\d\] (.*)$", done[0].stderr, flags=re.MULTILINE)
    for step in ("reading ", "loading the teacher", "measuring the student before", "training"):
        assert any(line.startswith(step) for line in steps), step
    rest = re.sub(r"^\[ *\d+:\d\d\] .*$|^.*step.*$", "", done[0].stderr, flags=re.MULTILINE)
    assert rest.split() == []
    assert done[1].stderr == ""
    assert done[1].stdout == f"{tmp_path}/b/student\n"


def test_quiet_commands_print_the_result_alone(pair, monkeypatch, capsys, tmp_path):
    teacher, student = pair
    data = str(write_jsonl(tmp_path / "data.jsonl", toy.rows(3)))
    small = f"{tmp_path}/small"
    carve = ["carve", teacher, small, "--layers", "2", "--data", data]
    assert run(monkeypatch, *carve, "--quiet") == 0
    assert capsys.readouterr().out == f"{small}\n"
    evaluate = ["evaluate", student, "--teacher", teacher, "--data", data, "--max-new-tokens", "5"]
    assert run(monkeypatch, *evaluate, "--quiet") == 0
    assert set(json.loads(capsys.readouterr().out)) == {student, "teacher"}
    assert run(monkeypatch, *carve, "--quiet") == 2
    assert "is not empty" in capsys.readouterr().err  # an error is never hidden


def test_check_prints_tokens_that_look_like_markup(recipe, monkeypatch, capsys):
    """A tokenizer with `[/INST]` ended with a traceback of rich."""
    other = VocabularyComparison(
        VocabularyMatch.DIFFERENT, 3, "token 5 is '[/INST]' here, '[b]' there"
    )
    monkeypatch.setattr("llmdistill.models.vocabulary.compare", lambda *_: other)
    assert run(monkeypatch, "check", str(recipe)) == 2
    assert "token 5 is '[/INST]' here, '[b]' there" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_folder_is_not_reused_by_another_run(recipe, monkeypatch, capsys, tmp_path):
    """R10."""
    assert run(monkeypatch, "train", str(recipe), "training.max_steps=2") == 0
    assert run(monkeypatch, "train", str(recipe), "--resume", "never") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(monkeypatch, "train", str(recipe), "training.max_steps=2", "seed=5") == 2
    assert "'seed' was " in capsys.readouterr().err
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run(monkeypatch, "train", str(recipe), "training.max_steps=2") == 0  # nothing to do
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    first = str(tmp_path / "run/checkpoints/checkpoint-2")
    more = ("training.max_steps=3", "--resume", first)
    assert run(monkeypatch, "train", str(recipe), *more, "--overwrite") == 2
    assert "Choose one" in capsys.readouterr().err
    elsewhere = ("training.max_steps=3", "--resume", str(tmp_path / "checkpoint-2"))
    assert run(monkeypatch, "train", str(recipe), *elsewhere) == 2
    assert "in the folder of no run of this recipe" in capsys.readouterr().err
    assert run(monkeypatch, "train", str(recipe), *more) == 0
    more = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert more.startswith(metrics)
    assert '"step": 3' in more
    assert '"step": 1' not in more[len(metrics) :]
    assert run(monkeypatch, "train", str(recipe), "--overwrite") == 0
    assert '"step": 2' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_overwrite_leaves_other_folders_alone(recipe, monkeypatch, capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert run(monkeypatch, "train", str(recipe), f"output={tmp_path}/mine", "--overwrite") == 2
    assert "has files but no run" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_a_checkpoint_of_no_run_is_refused(recipe, monkeypatch, capsys, tmp_path):
    place = str(tmp_path / "run" / "checkpoints" / "checkpoint-1")
    assert run(monkeypatch, "train", str(recipe), "--resume", place) == 2
    assert "in the folder of no run of this recipe" in capsys.readouterr().err


def test_check_shows_the_verdicts_and_marks_what_is_trained(recipe, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "check", str(recipe)) == 0
    shown = capsys.readouterr().out
    assert "same vocabulary" in shown
    assert "render the rows as the same tokens" in shown
    assert "train 4 rows" in shown
    assert "<|im_end|>]" in shown  # the end token is the last one trained
    assert not (tmp_path / "run").exists()


def test_check_marks_no_answer_that_a_model_replaces(recipe, monkeypatch, capsys):
    assert run(monkeypatch, "check", str(recipe), "rollout.kind=sampled") == 0
    shown = capsys.readouterr().out
    assert "[written during the run]" in shown
    assert "<|im_end|>]" not in shown


def test_evaluate_writes_the_figures(pair, monkeypatch, capsys, tmp_path):
    """In float32, whatever this machine prefers: the bound below is float32's."""
    monkeypatch.setattr("llmdistill.models.load.native_bfloat16", lambda device: False)
    teacher, student = pair
    write_jsonl(tmp_path / "data.jsonl", toy.rows(3))
    options = ["--teacher", teacher, "--data", f"{tmp_path}/data.jsonl", "--max-new-tokens", "5"]
    options += ["--output", f"{tmp_path}/out.json", "--answer-pattern", "[a-z]+"]
    assert run(monkeypatch, "evaluate", student, teacher, *options) == 0
    shown = capsys.readouterr().out
    assert "kl_own_text" in shown
    assert "exact_match" in shown
    figures = json.loads((tmp_path / "out.json").read_text())
    assert set(figures) == {student, teacher, "teacher"}
    assert figures[student]["kl_teacher_text"] > 0.1
    assert figures[teacher]["kl_teacher_text"] == pytest.approx(0, abs=1e-6)


def test_evaluate_finds_a_wrong_pattern_first(pair, monkeypatch, capsys):
    options = ["--teacher", "none", "--data", "none", "--answer-pattern", "("]
    assert run(monkeypatch, "evaluate", "none", *options) == 2
    assert "--answer-pattern: '(' is not a valid regular expression" in capsys.readouterr().err


def test_carve_saves_a_smaller_model(pair, monkeypatch, capsys, tmp_path):
    teacher, _ = pair
    write_jsonl(tmp_path / "data.jsonl", toy.rows(3))
    cut = [
        "--layers",
        "0,2",
        "--mlp-width",
        "40",
        "--heads",
        "2",
        "--data",
        f"{tmp_path}/data.jsonl",
    ]
    assert run(monkeypatch, "carve", teacher, f"{tmp_path}/small", *cut) == 0
    assert "parameters" in capsys.readouterr().out
    model = load_model(f"{tmp_path}/small", device="cpu")
    config = model.config
    assert config.num_hidden_layers == 2
    assert (config.intermediate_size, config.num_attention_heads) == (40, 2)
    assert run(monkeypatch, "carve", teacher, f"{tmp_path}/small", *cut) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "set 'layers', 'mlp_width' or 'heads'"),
        (["--layers", "two"], "'layers'"),
        (["--layers", "2", "--by", "luck"], "'by'"),
    ],
)
def test_carve_says_what_is_wrong(pair, monkeypatch, capsys, tmp_path, options, message):
    assert run(monkeypatch, "carve", pair[0], f"{tmp_path}/small", *options) == 2
    assert message in capsys.readouterr().err


def test_recipes_are_listed_and_copied(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "recipes", "list") == 0
    shown = capsys.readouterr().out
    assert "gkd " in shown
    assert "Generalised knowledge distillation" in shown
    train, generate = shown.split("Generate a dataset (llmdistill generate):")
    assert "gkd " in train
    assert "magpie_cpu " in generate
    assert "magpie_cpu" not in train
    target = tmp_path / "mine" / "gkd.yaml"
    assert run(monkeypatch, "recipes", "copy", "gkd", str(target)) == 0
    assert load(target).output == "runs/gkd"
    assert run(monkeypatch, "recipes", "copy", "gkd", str(target)) == 2
    assert "exists. Choose another" in capsys.readouterr().err
    assert run(monkeypatch, "recipes", "copy", "gdk") == 2
    assert "Did you mean 'gkd'?" in capsys.readouterr().err


def test_check_tells_memory_and_time(recipe, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "check", str(recipe), "--time") == 0
    shown = capsys.readouterr().out
    assert "teacher's weights" in shown
    assert re.search(
        r"time +\d+\.\d s per step on this machine, with responses of the dataset", shown
    )
    assert "1 steps: at most 0.0 minutes" in shown
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file_ends_with_2(pair, monkeypatch, capsys):
    teacher, student = pair
    assert run(monkeypatch, "evaluate", student, "--teacher", teacher, "--data", "no.jsonl") == 2
    assert "DataError: no such file: no.jsonl" in capsys.readouterr().err


def test_env_names_versions_and_the_meaning_of_auto(monkeypatch, capsys):
    assert run(monkeypatch, "env") == 0
    shown = capsys.readouterr().out
    assert "transformers" in shown
    assert "dtype auto" in shown


def test_check_times_each_way_of_writing(recipe, monkeypatch, capsys):
    mixed = [
        "rollout.kind=mixed",
        "rollout.share=0.25",
        "rollout.student={max_new_tokens: 3, kind: sampled}",
    ]
    more = ["training.eval_on_start=true", "training.report_to=none"]
    assert run(monkeypatch, "check", str(recipe), "--time", *mixed, *more) == 0
    shown = capsys.readouterr().out
    assert "with responses of the student" in shown
    assert "with responses of the dataset" in shown


def test_the_memory_counts_both_caches_where_both_models_write(recipe):
    rows = PromptDataset.of(toy.rows(4), toy.tokenizer())
    writers = (
        "{kind: sampled}",
        "{kind: interleaved}",
        "{kind: mixed, student: {kind: interleaved}}",
    )
    caches = [
        memory(load(recipe, [f"rollout={writer}"]), rows)["cache while writing"]
        for writer in writers
    ]
    assert caches[1] == pytest.approx(caches[0] * (1 + 4 * 48 / (3 * 32)))  # layers times width
    assert caches[2] == caches[1]


@pytest.mark.parametrize(
    "writer",
    [
        "{kind: sampled, batch_size: 2}",
        "{kind: replay, rollout: {kind: sampled, batch_size: 2}}",
        "{kind: mixed, student: {kind: sampled, batch_size: 2}}",
    ],
)
def test_the_memory_of_writing_is_bounded_by_the_batch_size(recipe, writer):
    rows = PromptDataset.of(toy.rows(4), toy.tokenizer())
    batch = "training.per_device_train_batch_size=8"
    caches = [
        memory(load(recipe, [f"rollout={one}", batch]), rows)["cache while writing"]
        for one in ("{kind: sampled}", writer)
    ]
    assert caches[1] == caches[0] / 4


def test_check_times_both_models_together(recipe, monkeypatch, capsys):
    options = ["rollout.kind=interleaved", "rollout.max_new_tokens=4"]
    assert run(monkeypatch, "check", str(recipe), "--time", *options) == 0
    assert "both models" in capsys.readouterr().out


# ---- what would lose the figures of `evaluate`, or cannot be meant ----


def test_evaluate_makes_the_folder_of_its_output(pair, monkeypatch, tmp_path):
    teacher, student = pair
    data, output = str(tmp_path / "rows.jsonl"), tmp_path / "no/such/x.json"
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(3))
    options = [
        "--teacher",
        teacher,
        "--data",
        data,
        "--max-new-tokens",
        "3",
        "--output",
        str(output),
    ]
    assert run(monkeypatch, "evaluate", student, *options) == 0
    assert json.loads(output.read_text())


@pytest.mark.parametrize(
    ("students", "output", "said"),
    [
        (["none"], "folder", "is a folder. Name a file"),
        (["none"], "file/x.json", "cannot write"),
        (["teacher"], None, "'teacher' would name two columns"),
        (["a", "b", "a"], None, "'a' would name two columns"),
    ],
)
def test_evaluate_looks_first_at_what_would_lose_its_figures(
    monkeypatch, capsys, tmp_path, students, output, said
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    options = ["--teacher", "none", "--data", "none.jsonl"]
    if output is not None:
        options += ["--output", str(tmp_path / output)]
    assert run(monkeypatch, "evaluate", *students, *options) == 2
    assert said in capsys.readouterr().err


def evaluate_options(teacher: str, folder: Path) -> list[str]:
    return ["--teacher", teacher, "--data", f"{folder}/rows.jsonl", "--max-new-tokens", "3"]


def test_evaluate_drops_prompts_beyond_the_context(pair, monkeypatch, capsys, tmp_path):
    teacher, student = pair  # 512 positions
    rows = [*toy.rows(3), {"instruction": "x" * 700, "output": "y"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    options = evaluate_options(teacher, tmp_path)
    assert run(monkeypatch, "evaluate", student, *options) == 0
    assert "1 dropped: prompt too long" in capsys.readouterr().out


def test_a_comma_without_a_number_is_named(monkeypatch, capsys):
    assert run(monkeypatch, "carve", "none", "out", "--layers", "2,") == 2
    assert "has a comma without a number" in capsys.readouterr().err


def test_check_tells_control_tokens_from_text_that_looks_like_them(
    recipe, monkeypatch, capsys, tmp_path
):
    rows = [{"text": f"<|im_start|>user\nhi {i}<|im_end|>\n"} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert run(monkeypatch, "check", str(recipe)) == 0
    shown = capsys.readouterr().out
    assert "hi 0\\<|im_end|>\n<|im_end|>]" in shown  # a text, and the token behind it
    assert "6 rows have text that looks like control tokens" in " ".join(shown.split())
    assert "\\ marks text that only looks like a control token" in shown


def test_check_colours_control_tokens_and_what_is_trained(recipe, tmp_path):
    """A control token, a text that only looks like one, and plain text each have their style."""
    rows = [{"text": f"<|im_start|>user\nhi {i}<|im_end|>\n"} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    train, _ = load_data(load(recipe, []), toy.tokenizer())
    text = look.marked(train.head(1)[0], toy.tokenizer(), written=False)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["\\<|im_end|>"] == "yellow reverse"
    assert styles["<|im_end|>"] == "cyan reverse"
    assert [style for part, style in styles.items() if "hi 0" in part] == ["reverse"]


def test_check_says_what_the_tokenizers_do(recipe, monkeypatch, capsys):
    assert run(monkeypatch, "check", str(recipe)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for whose in ("teacher's", "student's"):
        assert f"{whose} 259 tokens; a response ends at <|im_end|> (2)" in shown
    assert "chat template with system messages, without tools" in shown


def test_check_shows_lengths_licences_disk_and_the_command(recipe, monkeypatch, capsys, tmp_path):
    options = ["data.max_response_tokens=3"]
    assert run(monkeypatch, "check", str(recipe), *options) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "100.0% of the responses are cut" in shown
    assert "data train.jsonl: could not be read" in shown
    assert "the card will state: other (they differ, or could not be read)" in shown
    assert f"GiB free in {tmp_path}" in shown
    assert shown.endswith(f"Train it: llmdistill train {recipe} data.max_response_tokens=3")


def test_check_finds_a_disk_that_is_too_small(recipe, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    assert run(monkeypatch, "check", str(recipe)) == 2
    assert "too little" in capsys.readouterr().out


def test_lengths_are_counted_in_equal_steps():
    rows = [Row(i, [0] * 10, [0] * length) for i, length in enumerate((0, 1, 1, 7, 15))]
    header, *bins = look.lengths(rows, answers=True)
    assert header == ["tokens", "rows", ""]
    assert [row[0] for row in bins] == [f"{a} to {a + 1}" for a in range(10, 26, 2)]
    assert [int(row[1]) for row in bins] == [3, 0, 0, 1, 0, 0, 0, 1]
    assert bins[0][2] == "█" * 30
    # A rollout that writes its own responses reads only the prompts.
    [[tokens, count, _]] = look.lengths(rows, answers=False)[1:]
    assert (tokens, count) == ("10 to 10", "5")


@pytest.mark.parametrize(
    ("training", "copies"),
    [
        ({"save_strategy": "no"}, 0),
        ({"max_steps": 10, "save_steps": 3}, 4),  # and the last step
        ({"max_steps": 10, "save_steps": 1, "save_total_limit": 2}, 3),
        ({"max_steps": 10, "save_steps": 0.5}, 2),
        ({"num_train_epochs": 5, "save_steps": 1, "per_device_train_batch_size": 3}, 10),
        ({"num_train_epochs": 5, "save_strategy": "epoch"}, 5),
        ({}, 1),
    ],
)
def test_the_disk_holds_the_student_and_its_checkpoints(recipe, training, copies):
    """A checkpoint has the state of each optimizer; there are 6 rows."""
    parts = {"student's weights": 100.0, "optimizer": 150.0, "peer 1: optimizer": 50.0}
    changed = load(recipe, []).model_copy(update={"training": training})
    rows = PromptDataset([Row(i, [5], [6]) for i in range(6)])
    assert disk(changed, rows, parts) == 100 + copies * 300


def test_check_shows_what_is_not_read(recipe, monkeypatch, capsys, tmp_path):
    rows = [row | {"topic": "x"} for row in toy.rows(6)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert run(monkeypatch, "check", str(recipe)) == 0
    assert "fields that nothing reads: 'topic' (6 rows)" in capsys.readouterr().out


def test_check_shows_where_a_pair_differs(recipe, monkeypatch, capsys, tmp_path, pair):
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    template = "{{ 'Be kind. ' }}" + toy.TEMPLATE
    (other / "chat_template.jinja").write_text(template)
    assert run(monkeypatch, "check", str(recipe), f"student.model={other}") == 2
    shown = capsys.readouterr().out
    assert "render this row as different tokens" in shown
    assert "student.tokenizer: teacher" in shown
    override = [f"student.model={other}", "student.tokenizer=teacher"]
    assert run(monkeypatch, "check", str(recipe), *override) == 0


def test_check_finds_rows_that_make_no_batch(recipe, monkeypatch, capsys):
    options = ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=64"]
    assert run(monkeypatch, "check", str(recipe), *options) == 2
    assert "rows make no batch of 64" in capsys.readouterr().err


def test_evaluate_says_if_a_student_reads_other_prompts(pair, monkeypatch, caplog, tmp_path):
    teacher, student = pair
    shutil.copytree(student, tmp_path / "other")
    (tmp_path / "other/chat_template.jinja").write_text("{{ 'Be kind. ' }}" + toy.TEMPLATE)
    write_jsonl(tmp_path / "rows.jsonl", toy.rows(3))
    options = evaluate_options(teacher, tmp_path)
    assert run(monkeypatch, "evaluate", str(tmp_path / "other"), *options) == 0
    assert "is measured on the teacher's rendering" in caplog.text
