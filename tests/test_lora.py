"""gpt12/lora.py: adapters by their formula, what is trained, merging, and what PEFT reads."""

import json
import shutil
import weakref

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import GPT2LMHeadModel

from gpt12.lora import LoRALinear, add_lora, load_adapter, save_adapter
from gpt12.weights import from_pretrained, save_config, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import edit_json, refused
from tests.models import relative, small_model


def test_an_adapter_computes_the_formula_of_the_lora_paper():
    """W x + b + (alpha / rank) B A x, by Hu et al. 2021."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    layer = LoRALinear(torch.nn.Linear(8, 12), rank=4, alpha=6.0)
    torch.nn.init.normal_(layer.lora_B)
    plain = x @ layer.weight.T + layer.bias
    update = 6.0 / 4 * layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(layer.eval()(x), plain + x @ update, atol=1e-5)
    assert torch.allclose(x @ layer.merged_weight().T + layer.bias, plain + x @ update, atol=1e-5)


def test_only_adapters_are_trained():
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 2, 4.0)
    x = torch.randint(0, 13, (2, 8))
    first = model(x)[0]
    with torch.no_grad():
        # B is zero: nothing has changed yet.
        assert torch.equal(first, small_model()(x)[0])
    model(x, x)[1].backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(
        torch.equal(before[name], p) for name, p in model.named_parameters() if name in before
    )


def test_adapters_are_merged_one_layer_at_a_time(tmp_path, monkeypatch):
    """Saving may need no second model beside the one that fills the card."""
    model = GPT(GPTConfig(16, 65, 3, 2, 32)).bfloat16()
    alive = []
    most = []
    add_lora(model, 4, 8.0)
    merged = LoRALinear.merged_weight

    def counted(layer):
        weight = merged(layer)
        alive.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr("gpt12.lora.LoRALinear.merged_weight", counted)
    save_pretrained(model, tmp_path)
    assert len(most) == 12
    assert max(most) <= 2
    # The merged weights are float32, whatever the model is.
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """A model with trained adapters, its base in base/; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    save_pretrained(model, tmp_path / "base")
    add_lora(model, 2, 4.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def last(adapted, tmp_path):
    """A folder that holds the adapters alone, as last/ of a LoRA run is."""
    save_adapter(adapted, tmp_path / "last", "base")
    save_config(adapted, tmp_path / "last", None)
    return tmp_path / "last"


def test_peft_opens_the_adapter_and_finds_its_base_from_anywhere(adapted, tmp_path, monkeypatch):
    save_adapter(adapted, tmp_path / "best/adapter", "base")
    save_pretrained(adapted, tmp_path / "best")
    config = json.loads((tmp_path / "best/adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "best/adapter").eval()
    x = torch.randint(0, 13, (2, 8))
    ours = adapted(x)[0]
    assert relative(theirs(x).logits, ours) < 1e-5
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()
    assert relative(merged(x).logits, ours) < 1e-5
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    assert relative(base(x).logits, ours) > 0.01


def test_adapters_are_added_to_the_weights_of_their_base_wherever_they_are_loaded(adapted, last):
    x = torch.randint(0, 13, (2, 8))
    ours = adapted(x)[0]
    loaded = from_pretrained(last).eval()
    assert relative(loaded(x)[0], ours) < 1e-5
    assert all(p.requires_grad for p in loaded.parameters())
    again = from_pretrained("base")
    add_lora(again, 2, 4.0)
    load_adapter(again, last)
    assert torch.equal(again.eval()(x)[0], ours)


def test_adapters_know_their_base_in_any_precision_and_no_other_model(tmp_path):
    save_pretrained(small_model(), tmp_path / "base")
    model = from_pretrained(tmp_path / "base")
    add_lora(model, 2, 4.0, torch.bfloat16)
    save_adapter(model, tmp_path / "last", str(tmp_path / "base"))
    save_config(model, tmp_path / "last", None)
    from_pretrained(tmp_path / "last")
    other = small_model()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-6
    save_pretrained(other, tmp_path / "base")
    other_base = r"base is not the base model of the adapters in .*last"
    refused(other_base, from_pretrained, tmp_path / "last")
    shutil.rmtree(tmp_path / "base")
    refused(r"the adapters in .*last.*is no local folder", from_pretrained, tmp_path / "last")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_adapters_are_refused_by_the_files_name(last, file):
    (last / file).write_bytes(b"{}")
    refused(f"{file} is damaged", from_pretrained, last)


def test_a_rank_that_the_layers_cannot_have_is_refused():
    refused(r"lora_rank=9 must lie between 1 and .* 8", add_lora, small_model(), 9, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, r"adapter_config\.json is damaged or of another kind \(r: "),
        ({"lora_alpha": float("inf")}, "kind .lora_alpha: "),
        ({"base_model_name_or_path": "last"}, "last is its own base"),
    ],
)
def test_what_no_adapter_can_be_is_refused(last, change, message):
    edit_json(last / "adapter_config.json", **change)
    refused(message, from_pretrained, "last")


@pytest.mark.parametrize("share", ["layer", "weight"])
def test_a_matrix_that_two_layers_share_is_refused(share):
    model = small_model()
    first, second = model.transformer.h
    if share == "layer":
        second.mlp = first.mlp
    else:
        second.mlp.c_fc.weight = first.mlp.c_fc.weight
    refused(r"h\.1\.mlp\.c_fc\.weight and .*h\.0\.mlp.* one matrix", add_lora, model, 2, 4.0)


def test_adapters_are_drawn_as_before():
    """The order in which layers draw their adapters: a seed gives the run that it always gave."""
    model = small_model()
    torch.manual_seed(7)
    add_lora(model, 1, 1.0)
    torch.manual_seed(7)
    for block in model.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj, block.mlp.c_fc):
            expected = torch.nn.init.kaiming_uniform_(torch.empty_like(layer.lora_A), a=5**0.5)
            assert torch.equal(layer.lora_A, expected)
