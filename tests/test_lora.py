"""gpt12/lora.py: adapters by their formula, what is trained, merging, and what PEFT reads."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import GPT2LMHeadModel

from gpt12.errors import UserError
from gpt12.lora import LoRALinear, add_lora, save_adapter
from gpt12.weights import save_pretrained
from model import GPT, GPTConfig
from tests.models import small_model


def test_an_adapter_computes_the_formula_of_the_lora_paper():
    """W x + b + (alpha / rank) B A dropout(x), by Hu et al. 2021; merged without the dropout."""
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    layer = LoRALinear(torch.nn.Linear(8, 12), 4, 6.0, 0.5)
    torch.nn.init.normal_(layer.lora_B)
    plain = x @ layer.weight.T + layer.bias
    update = 6.0 / 4 * layer.lora_A.T @ layer.lora_B.T
    torch.manual_seed(1)
    adapted = layer.train()(x)
    torch.manual_seed(1)
    assert torch.allclose(adapted, plain + torch.nn.functional.dropout(x, 0.5) @ update, atol=1e-5)
    assert torch.allclose(layer.eval()(x), plain + x @ update, atol=1e-5)
    assert torch.allclose(x @ layer.merged_weight().T + layer.bias, plain + x @ update, atol=1e-5)


@pytest.mark.parametrize("recompute", ["pointwise", "block"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])  # the model's own, beside that of the adapters
def test_recomputation_drops_the_same_values_in_the_adapters_again(recompute, dropout):
    gradients = []
    for kind in ("none", recompute):
        model = small_model(dropout).train()
        add_lora(model, 4, 8.0, dropout=0.4)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # else no gradient reaches A
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
        model.set_recompute(kind)
        x = torch.arange(24).view(3, 8) % 13
        torch.manual_seed(1)
        model(x, x)[1].backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


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
    model = GPT(GPTConfig(16, 65, 3, 2, 32))
    alive = []
    most = []
    add_lora(model, 4, 8.0)
    merged = LoRALinear.merged_weight

    def counted(layer):
        weight = merged(layer)
        alive.append(weakref.ref(weight))
        most.append(sum(ref() is not None for ref in alive))
        return weight

    monkeypatch.setattr(LoRALinear, "merged_weight", counted)
    save_pretrained(model, tmp_path)
    assert len(most) == 12
    assert max(most) <= 2


@pytest.fixture
def adapted(tmp_path, monkeypatch):
    """A model with trained adapters, its base in base/; the working directory is the test's own."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    save_pretrained(model, "base")
    add_lora(model, 2, 4.0, targets=("c_attn", "c_proj"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_peft_opens_the_adapter_and_finds_its_base_from_anywhere(adapted, tmp_path, monkeypatch):
    assert save_adapter(adapted, tmp_path / "best/adapter", "base") is None
    save_pretrained(adapted, tmp_path / "best")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "best/adapter").eval()
    x = torch.randint(0, 13, (2, 8))
    ours = adapted(x)[0]
    assert (theirs(x).logits - ours).abs().max() < 1e-5 * ours.abs().max()
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "best").eval()
    assert (merged(x).logits - ours).abs().max() < 1e-5 * ours.abs().max()
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    assert (base(x).logits - ours).abs().max() > 0.01 * ours.abs().max()
    theirs = PeftModel.from_pretrained(base, tmp_path / "best/adapter").eval()
    assert (theirs(x).logits - ours).abs().max() < 1e-5 * ours.abs().max()


def test_the_adapters_configuration_says_what_was_trained(adapted, tmp_path):
    save_adapter(adapted, tmp_path / "adapter", "owner/name")
    content = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == "owner/name"  # a name on the hub stays as it is
    assert (content["r"], content["lora_alpha"]) == (2, 4.0)
    assert content["target_modules"] == ["c_attn", "c_proj"]


def test_a_base_that_peft_cannot_open_is_reported(adapted, tmp_path):
    """nanoGPT's ckpt.pt has no Hugging Face form."""
    Path("ckpt.pt").touch()
    note = save_adapter(adapted, tmp_path / "adapter", "ckpt.pt")
    assert "ckpt.pt" in note
    assert "PEFT cannot open" in note
    content = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("rank", [-1, 0, 9])
def test_a_rank_that_the_layers_cannot_have_is_refused(rank):
    with pytest.raises(UserError, match=f"lora_rank={rank} must lie between 1 and .* 8"):
        add_lora(small_model(), rank, 1.0)


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
