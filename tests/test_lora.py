"""gpt12/lora.py: adapters by their formula, what is trained, merging, and what PEFT reads."""

import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import GPT2LMHeadModel

from gpt12.lora import LoRALinear, add_lora, load_adapter, save_adapter
from gpt12.weights import from_pretrained, save_config, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import edit_json, read_json, refused
from tests.models import relative, small_model

pytestmark = pytest.mark.usefixtures("own_folder")
BASE = Path("base")
LAST = Path("last")
BEST = Path("best")
X = torch.arange(16).view(2, 8) % 13


def test_an_adapter_computes_the_formula_of_the_lora_paper():
    """W x + b + (alpha / rank) B A x, by Hu et al. 2021."""
    x = torch.randn(5, 8)
    layer = LoRALinear(torch.nn.Linear(8, 12), rank=4, alpha=6.0)
    torch.nn.init.normal_(layer.lora_B)
    weight = layer.weight + 6.0 / 4 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.eval()(x), x @ weight.T + layer.bias, atol=1e-5)
    assert torch.allclose(layer.merged_weight(), weight, atol=1e-5)


def test_only_adapters_are_trained():
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 2, 4.0)
    # B is zero: nothing has changed yet.
    assert torch.equal(model(X)[0], small_model()(X)[0])
    model(X, X)[1].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name
        assert torch.equal(before.get(name, p), p), name


def test_adapters_are_merged_one_layer_at_a_time(monkeypatch):
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
    save_pretrained(model, BEST)
    assert len(most) == 12
    assert max(most) <= 2
    # The merged weights are float32, whatever the model is.
    assert read_json("best/config.json")["dtype"] == "float32"


@pytest.fixture
def adapted(own_folder):
    """A model with trained adapters, its base in base/."""
    model = small_model()
    save_pretrained(model, BASE)
    add_lora(model, 2, 4.0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def last(adapted):
    """A folder that holds the adapters alone, as last/ of a LoRA run is."""
    return save_last(adapted)


def save_last(adapted: GPT) -> Path:
    save_adapter(adapted, LAST, "base")
    save_config(adapted, LAST, None)
    return LAST


def test_peft_opens_the_adapter_and_finds_its_base_from_anywhere(adapted, monkeypatch):
    save_adapter(adapted, BEST / "adapter", "base")
    save_pretrained(adapted, BEST)
    config = read_json("best/adapter/adapter_config.json")
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    monkeypatch.chdir("best")
    ours = adapted(X)[0]
    theirs = AutoPeftModelForCausalLM.from_pretrained("adapter").eval()
    assert relative(theirs(X).logits, ours) < 1e-5
    merged = GPT2LMHeadModel.from_pretrained(".").eval()
    assert relative(merged(X).logits, ours) < 1e-5
    base = GPT2LMHeadModel.from_pretrained("../base").eval()
    assert relative(base(X).logits, ours) > 0.01


def test_adapters_are_added_to_the_weights_of_their_base_wherever_they_are_loaded(adapted, last):
    ours = adapted(X)[0]
    loaded = from_pretrained(last).eval()
    assert relative(loaded(X)[0], ours) < 1e-5
    assert all(p.requires_grad for p in loaded.parameters())
    again = from_pretrained("base")
    add_lora(again, 2, 4.0)
    load_adapter(again, last)
    assert torch.equal(again.eval()(X)[0], ours)


def test_adapters_know_their_base_in_any_precision_and_no_other_model():
    save_pretrained(small_model(), BASE)
    model = from_pretrained(BASE)
    add_lora(model, 2, 4.0, torch.bfloat16)
    from_pretrained(save_last(model))
    other = small_model()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-6
    save_pretrained(other, BASE)
    refused(r"base is not the base model of the adapters in .*last", from_pretrained, LAST)
    shutil.rmtree(BASE)
    refused(r"the adapters in .*last.*is no local folder", from_pretrained, LAST)


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
