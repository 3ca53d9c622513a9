"""model.py against `transformers`, against the loop-written reference, and against what causality and masks demand."""

import copy
import json
import math
import shutil

import pytest
import reference
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, MASKED, GPTConfig, WeightsError, cross_entropy_chunk

SHAPE = {"vocab_size": 97, "n_layer": 3, "n_head": 4, "n_embd": 48}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A random GPT-2 whose every tensor matters: biases and norms are away from their initial 0 and 1."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, bos_token_id=0, eos_token_id=0, **SHAPE)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, SHAPE["vocab_size"], (2, 3, 32), generator=generator)
    y[0, 5:20] = MASKED
    y[2, 31] = MASKED
    return x, y


def published_gradients(model: GPT) -> dict[str, torch.Tensor]:
    """Our gradients by GPT-2's published names and layout."""
    grads = {}
    for name, p in model.transformer.named_parameters():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        grad = torch.as_tensor(p.grad)
        grads[f"transformer.{name}"] = grad.t() if linear else grad
    grads["transformer.wte.weight"] = grads["transformer.wte.weight"][: SHAPE["vocab_size"]]
    return grads


def as_openai_uploaded(folder, target):
    """The same weights in the form of OpenAI's upload: no prefix, and the causal masks as tensors."""
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    for i in range(SHAPE["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize("recompute", ["none", "pointwise", "block"])
@pytest.mark.parametrize("upload", ["transformers", "openai"])
def test_logits_loss_and_every_gradient_equal_transformers(theirs, batch, tmp_path, upload, recompute):
    model, folder = theirs
    ours = GPT.from_pretrained(folder if upload == "transformers" else as_openai_uploaded(folder, tmp_path / "openai"))
    ours.set_recompute(recompute)
    x, y = batch
    logits = model(x).logits
    expected = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1), ignore_index=MASKED)
    model.zero_grad()
    expected.backward()
    assert relative(ours(x)[0], logits) < 1e-5
    _, loss = ours(x, y)
    loss.backward()
    assert relative(loss, expected) < 1e-5
    names = {name: p.grad for name, p in model.named_parameters()}
    grads = published_gradients(ours)
    assert names.keys() == grads.keys()
    for name, grad in grads.items():
        assert relative(grad, names[name]) < 1e-5, name


def test_transformers_opens_what_we_save(theirs, batch, tmp_path):
    model, folder = theirs
    ours = GPT.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(batch[0]).logits, model(batch[0]).logits)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert torch.equal(GPT.from_pretrained(tmp_path)(batch[0])[0], ours(batch[0])[0])


def test_a_model_without_biases_is_saved_and_loaded_unchanged(tmp_path, batch):
    torch.manual_seed(3)
    ours = GPT(GPTConfig(block_size=32, bias=False, **SHAPE))
    ours.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert not again.config.bias
    assert again.num_params() == ours.num_params()
    assert torch.equal(again(batch[0])[0], ours(batch[0])[0])
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert relative(theirs(batch[0]).logits, ours(batch[0])[0]) < 1e-5


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "parameters"),
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_our_models_have_the_published_numbers_of_parameters(n_layer, n_head, n_embd, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert model.num_params() == parameters


def test_initial_weights_have_gpt2s_standard_deviations():
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 1000, 8, 4, 256))
    block = model.blocks[3]
    for weight, expected in (
        (model.transformer["wte"].weight[:1000], 0.02),
        (model.transformer["wpe"].weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.mlp.c_proj.weight, 0.02 / 4),
        (block.attn.c_proj.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not model.transformer["wte"].weight[1000:].any()
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    # A fresh model knows nothing: its loss is that of a uniform guess.
    x = torch.randint(0, 1000, (4, 64))
    assert model(x, x.roll(1, 1))[1].item() == pytest.approx(torch.log(torch.tensor(1000.0)).item(), abs=0.1)


def small(dropout: float = 0.0) -> GPT:
    torch.manual_seed(5)
    model = GPT(GPTConfig(8, 13, 2, 2, 8, dropout, bias=True))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def reference_weights(model: GPT) -> reference.Weights:
    weights = {}
    for name, p in model.transformer.named_parameters():
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name] = (p.t() if linear else p).detach().double().clone().requires_grad_()
    weights["wte.weight"] = weights["wte.weight"][: model.config.vocab_size].detach().clone().requires_grad_()
    return weights


def test_the_reference_written_with_loops_gives_our_logits_and_gradients():
    model = small()
    w = reference_weights(model)
    x, y = torch.randint(0, 13, (2, 2, 8), generator=torch.Generator().manual_seed(2))
    y[0, 3] = MASKED
    expected = reference.loss(x, y, w, 2, 2)
    expected.backward()
    logits = torch.stack([reference.logits(row.tolist(), w, 2, 2) for row in x])
    assert relative(model(x)[0].double(), logits) < 1e-5
    _, loss = model(x, y)
    loss.backward()
    assert relative(loss.double(), expected) < 1e-5
    for name, p in w.items():
        grad = model.transformer.get_parameter(name).grad[: len(p) if name == "wte.weight" else None].double()
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert relative(grad.t() if linear else grad, p.grad) < 1e-5, name


def test_no_position_sees_the_future():
    model = small()
    x = torch.randint(0, 13, (1, 8))
    embedded = model.transformer["wte"].weight[x].detach().requires_grad_()
    model.transformer["wte"].register_forward_hook(lambda *_: embedded)
    for t in range(8):
        (grad,) = torch.autograd.grad(model(x)[0][0, t].sum(), embedded)
        seen = grad[0].abs().sum(1) > 0
        assert seen.tolist() == [True] * (t + 1) + [False] * (7 - t)


class LargeTensors(TorchDispatchMode):
    """Notes every storage of so many numbers that is made inside, and keeps it, so that no address comes twice."""

    def __init__(self, numel: int):
        super().__init__()
        self.numel = numel
        self.made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                self.made[t.untyped_storage().data_ptr()] = t
        return out


@pytest.mark.parametrize(("dtype", "more"), [(torch.float32, 0), (torch.bfloat16, 4)])
def test_the_loss_holds_its_logits_in_fp32_and_nothing_else_so_large(dtype, more):
    logits, targets = torch.randn(64, 128).to(dtype), torch.randint(100, (64,))
    with LargeTensors(64 * 100) as large:
        cross_entropy_chunk(logits, targets, 100)
    large.made.pop(logits.data_ptr(), None)
    assert sum(t.untyped_storage().nbytes() for t in large.made.values()) == more * logits.numel()


@pytest.mark.parametrize("scale", [3.0, 30.0])
def test_the_loss_and_its_gradient_are_those_of_float64(scale):
    """GPT-2's number of columns: sums of so many have to be summed well."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50304, generator=generator) * scale
    targets = torch.randint(50257, (64,), generator=generator)
    targets[::7] = MASKED
    exact = logits.double()[:, :50257].requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, ignore_index=MASKED, reduction="sum")
    wanted.backward()
    logits[3, 50257:] = math.inf  # whatever stands in the padding
    assert cross_entropy_chunk(logits, targets, 50257).item() == pytest.approx(wanted.item(), rel=3e-7)
    assert (logits[:, :50257] - exact.grad).abs().max() < 3e-7
    assert not logits[:, 50257:].any()


def test_a_masked_row_takes_no_part_whatever_its_logits():
    logits, targets = torch.full((2, 4), math.inf), torch.tensor([MASKED, 1])
    logits[1] = 0.0
    assert cross_entropy_chunk(logits, targets, 4).item() == pytest.approx(math.log(4))
    assert logits.tolist() == [[0.0] * 4, [0.25, -0.75, 0.25, 0.25]]


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_chunks_do_not_change_loss_or_gradients(monkeypatch, chunk):
    model, (x, y) = small(), torch.randint(0, 13, (2, 4, 8))
    y[1] = MASKED
    whole = torch.autograd.grad(model(x, y)[1], list(model.parameters()))
    monkeypatch.setattr("model.LOSS_CHUNK_ROWS", chunk)
    parts = torch.autograd.grad(model(x, y)[1], list(model.parameters()))
    for a, b in zip(parts, whole, strict=True):
        assert relative(a, b) < 1e-5


def test_evaluating_makes_no_gradient(monkeypatch):
    model, idx = GPT(GPTConfig(64, 97, 2, 2, 32)), torch.arange(120).view(2, 60) % 97
    with_gradient = model(idx, idx)[1]
    monkeypatch.setattr("model.accumulate_product", lambda *args: pytest.fail("a product for the head's gradient"))
    with torch.no_grad():
        assert torch.equal(model(idx, idx)[1], with_gradient)


def test_padding_of_the_vocabulary_takes_no_part():
    model, (x, y) = small(), torch.randint(0, 13, (2, 4, 8))
    before, logits = model(x, y)[1], model(x)[0]
    with torch.no_grad():
        model.lm_head.weight[13:] = 7.0
    loss = model(x, y)[1]
    loss.backward()
    assert loss.item() == before.item()
    assert torch.equal(model(x)[0], logits)
    assert logits.shape == (4, 8, 13)
    assert not model.lm_head.weight.grad[13:].any()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("targets", [0, 1, 7, 32])
def test_the_loss_is_the_mean_over_however_few_targets(targets, known):
    """Mean over the targets there are; nothing, not NaN, where there is none; both ends of the vocabulary."""
    model, x = small(), torch.randint(0, 13, (4, 8))
    y = torch.full((32,), MASKED)
    chosen = torch.randperm(32)[:targets]
    y[chosen] = torch.tensor([0, 12] * 16)[:targets]
    _, loss = model(x, y.view(4, 8), rows=targets if known else None)
    loss.backward()
    log_probs = model(x)[0].view(-1, 13).log_softmax(1)
    expected = -sum(log_probs[i, y[i]] for i in chosen) / max(1, targets)
    assert loss.item() == pytest.approx(float(torch.as_tensor(expected).detach()), rel=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("targets", [1023, 1024, 1025, 2047])
def test_masked_rows_that_are_left_out_of_many_change_nothing(targets):
    model, (x, y) = small(), torch.randint(0, 13, (2, 256, 8), generator=torch.Generator().manual_seed(2))
    y.view(-1)[torch.randperm(2048, generator=torch.Generator().manual_seed(3))[targets:]] = MASKED
    known, asked = (torch.autograd.grad(model(x, y, rows=n)[1], list(model.parameters())) for n in (targets, None))
    assert model(x, y, rows=targets)[1].item() == pytest.approx(model(x, y)[1].item(), rel=1e-5)
    assert all(relative(a, b) < 1e-4 for a, b in zip(known, asked, strict=True))


@pytest.mark.parametrize("recompute", ["none", "pointwise", "block"])
def test_dropout_lies_where_transformers_has_it(theirs, batch, recompute):
    """From one seed both draw the same numbers for the same four places, and recomputing draws them once more."""
    (model, folder), (x, y) = theirs, batch
    ours, model = GPT.from_pretrained(folder, dropout=0.1).train(), copy.deepcopy(model).train()
    ours.set_recompute(recompute)
    torch.manual_seed(6)
    logits = model(x).logits
    torch.nn.functional.cross_entropy(logits.view(-1, 97), y.view(-1), ignore_index=MASKED).backward()
    torch.manual_seed(6)
    assert relative(ours(x)[0], logits) < 1e-5
    torch.manual_seed(6)
    ours(x, y)[1].backward()
    grads = published_gradients(ours)
    for name, p in model.named_parameters():
        assert relative(grads[name], p.grad) < 1e-5, name


def test_dropout_acts_only_while_training():
    model, x = small(dropout=0.5), torch.randint(0, 13, (4, 8))
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler on this machine")
def test_a_compiled_model_has_the_gradients_of_the_plain_one(tmp_path, monkeypatch):
    """Compiled anew, into a cache of its own. Inductor is told the width of vectors: finding it out takes 7 s."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, (x, y) = small(), torch.randint(0, 13, (2, 4, 8))
    plain = torch.autograd.grad(model(x, y)[1], list(model.parameters()))
    model.compile_parts()
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 256}):
        compiled = torch.autograd.grad(model(x, y)[1], list(model.parameters()))
    assert any(tmp_path.rglob("*.cpp"))
    for a, b in zip(compiled, plain, strict=True):
        assert relative(a, b) < 1e-4
    assert all("_orig_mod" not in name for name in model.state_dict())


def test_lower_precision_stays_near_fp32(batch, monkeypatch):
    """bf16 autocast: every parameter's gradient within 3% of fp32's in norm, on a CPU without fused kernels."""
    monkeypatch.setattr("model.LOSS_CHUNK_ROWS", 40)  # of 96: all three chunks count
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, **SHAPE))
    exact = torch.autograd.grad(model(*batch)[1], list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = torch.autograd.grad(model(*batch)[1], list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), rounded, exact, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 0.03, name


def test_a_smaller_block_size_keeps_the_first_positions(theirs, batch):
    model, folder = theirs
    cropped = GPT.from_pretrained(folder, block_size=16, dropout=0.1)
    assert (cropped.config.block_size, cropped.config.dropout) == (16, 0.1)
    cropped.eval()
    assert relative(cropped(batch[0][:, :16])[0], model(batch[0][:, :16]).logits) < 1e-5
    with pytest.raises(WeightsError, match="32 positions"):
        GPT.from_pretrained(folder, block_size=33)
    with pytest.raises(WeightsError, match="block_size=16"):
        cropped(batch[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 100}, "n_inner=100"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"bias": False}, '"bias": false, but h.0.ln_1.bias is not zero'),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"n_head": 7}, "impossible shape"),
        ({"n_layer": 4}, "h.3.* is missing"),
        ({"n_embd": 96}, "shape"),
        ({"n_layer": None}, "not a number"),
    ],
)
def test_other_architectures_are_refused_by_name(theirs, tmp_path, change, message):
    _, folder = theirs
    content = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(WeightsError, match=message):
        GPT.from_pretrained(tmp_path)


def test_weights_in_several_files_are_read_by_their_index(theirs, tmp_path, batch):
    model, folder = theirs
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert relative(GPT.from_pretrained(tmp_path)(batch[0])[0], model(batch[0]).logits) < 1e-5
    index["weight_map"][names[0]] = "../a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="own folder"):
        GPT.from_pretrained(tmp_path)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_pickles_are_refused_and_not_executed(theirs, tmp_path):
    _, folder = theirs
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(Bomb(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickle"):
        GPT.from_pretrained(tmp_path)
    torch.save({"model": Bomb(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(WeightsError, match="without running code"):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8, b"\x00" * 64, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"])
def test_damaged_safetensors_are_refused(theirs, tmp_path, damage):
    _, folder = theirs
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(damage)
    with pytest.raises(WeightsError, match="damaged"):
        GPT.from_pretrained(tmp_path)


def test_a_checkpoint_of_nanogpt_is_read(theirs, tmp_path, batch):
    _, folder = theirs
    ours = GPT.from_pretrained(folder)
    state = {f"_orig_mod.{name}": t for name, t in ours.state_dict().items()}
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"][:97].clone()
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    args = {"block_size": 32, "bias": True, "dropout": 0.0, **SHAPE}
    torch.save({"model": state, "model_args": args, "iter_num": 7, "config": {}}, tmp_path / "ckpt.pt")
    assert torch.equal(GPT.from_pretrained(tmp_path / "ckpt.pt")(batch[0])[0], ours(batch[0])[0])


def test_nanogpts_padded_vocabulary_of_gpt2_is_cut_to_its_ids(tmp_path):
    shape = {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 2}
    padded = GPT(GPTConfig(vocab_size=50304, **shape))
    torch.save({"model": padded.state_dict(), "model_args": shape | {"vocab_size": 50304}}, tmp_path / "ckpt.pt")
    ours, x = GPT.from_pretrained(tmp_path / "ckpt.pt"), torch.arange(50249, 50257).view(1, 8)
    assert ours.config.bias  # checkpoints from before nanoGPT had the key have them
    assert torch.equal(ours(x)[0], padded(x)[0][..., :50257])
