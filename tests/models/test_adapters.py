"""LoRA students: what is trained, what merging gives, and adapters as models to load."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from llmdistill.errors import ModelError
from llmdistill.models.adapters import add_adapter, merged_state
from llmdistill.models.load import load_config, load_model, load_tokenizer
from tests import toy
from tests.support.models import family

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
OPTIONS = {"rank": 4, "alpha": 8.0, "targets": "all-linear", "dropout": 0.0, "seed": 0}


def adapted(model, **options):
    """With changes that matter: LoRA starts at none."""
    made = add_adapter(model, **OPTIONS | options)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return made.eval()


def test_only_the_adapter_is_trained_and_it_starts_as_the_base():
    model = toy.model()
    before = model(IDS).logits
    made = add_adapter(model, **OPTIONS).eval()
    torch.testing.assert_close(made(input_ids=IDS).logits, before)
    trained = [name for name, p in made.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def test_the_start_depends_on_the_seed_alone_and_draws_from_no_global_generator():
    def start(seed):
        state = torch.get_rng_state()
        made = add_adapter(toy.model(), **OPTIONS | {"seed": seed})
        found = torch.cat([p.flatten() for n, p in made.named_parameters() if "lora_A" in n])
        return found, state

    torch.manual_seed(5)
    first, _ = start(0)
    torch.manual_seed(6)
    again, _ = start(0)
    assert torch.equal(first, again)
    assert not torch.equal(first, start(1)[0])


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "GPT2"])
@torch.no_grad()
def test_the_merged_weights_are_the_adapted_model(name):
    plain = family(name)
    made = adapted(family(name))
    expected = made(input_ids=IDS).logits
    assert (expected - plain(IDS).logits).abs().max() > 0.1
    state = merged_state(made, made.state_dict())
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_merging_leaves_the_student_as_it_was():
    made = adapted(toy.model())
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    merged_state(made, made.state_dict())
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())


def test_an_adapter_that_is_no_plain_lora_is_not_merged():
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)
    made = peft.get_peft_model(toy.model(), config)
    with pytest.raises(ModelError, match=r"q_proj is not plain LoRA.*save: adapter"):
        merged_state(made, made.state_dict())


def test_a_target_that_is_no_layer_is_named_with_those_there_are():
    with pytest.raises(ModelError, match=r"student\.peft\.targets: .*q_prj[\s\S]*down_proj"):
        add_adapter(toy.model(), **OPTIONS | {"targets": ["q_prj"]})


# ---- adapters on disk ----


@pytest.fixture
def saved(pair, tmp_path):
    """An adapter of the toy student on disk, and the logits it should give."""
    made = adapted(load_model(pair[1], dtype="float32"))
    made.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", made(input_ids=IDS).logits


@torch.no_grad()
def test_an_adapter_is_loaded_onto_its_base(saved, pair):
    folder, expected = saved
    model = load_model(str(folder), dtype="float32")
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert load_tokenizer(str(folder)).vocab_size == toy.tokenizer().vocab_size
    assert load_config(str(folder)).num_hidden_layers == 3


def test_an_adapter_whose_base_is_gone_names_it(saved):
    folder, _ = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, said in (("/gone/base", "no such model folder: /gone/base"), (None, "names no base")):
        config["base_model_name_or_path"] = base
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=said):
            load_model(str(folder))


def test_an_adapter_in_a_pickle_is_refused(saved):
    """S3: PEFT would read it if there were no safetensors."""
    folder, _ = saved
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="no adapter_model.safetensors, and llmdistill reads no"):
        load_model(str(folder))
