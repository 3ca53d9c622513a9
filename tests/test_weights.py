"""gpt12/weights.py: models to and from Hugging Face folders, nanoGPT's ckpt.pt, what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, GPT2LMHeadModel

from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import edit_json, refused
from tests.models import SHAPE, random_batch, relative, save_nanogpt


@pytest.fixture
def folder(theirs, tmp_path) -> Path:
    """A folder with the files of a model of `transformers`."""
    return Path(shutil.copytree(theirs[1], tmp_path / "theirs"))


@pytest.fixture
def x() -> torch.Tensor:
    return random_batch()[0]


@pytest.fixture
def ours(tmp_path) -> GPT:
    """A model without biases, saved in the folder `ours`."""
    model = GPT(GPTConfig(block_size=32, bias=False, **SHAPE))
    save_pretrained(model, tmp_path / "ours")
    return model


@pytest.mark.gpt2
def test_transformers_opens_what_we_save(theirs, x, tmp_path):
    model, folder = theirs
    ours = from_pretrained(folder)
    save_pretrained(ours, tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x).logits)
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(folder / "model.safetensors").keys()
    )
    assert torch.equal(from_pretrained(tmp_path)(x)[0], ours(x)[0])


@pytest.mark.gpt2
def test_a_model_without_biases_is_saved_and_loaded_unchanged(ours, tmp_path, x):
    again = from_pretrained(tmp_path / "ours")
    assert not again.config.bias
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert torch.equal(again(x)[0], ours(x)[0])
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    assert relative(theirs(x).logits, ours(x)[0]) < 1e-5


@pytest.mark.gpt2
def test_a_smaller_block_size_keeps_the_first_positions(theirs, x):
    model, folder = theirs
    cropped = from_pretrained(folder, block_size=16, dropout=0.1)
    assert (cropped.config.block_size, cropped.config.dropout) == (16, 0.1)
    cropped.eval()
    assert relative(cropped(x[:, :16])[0], model(x[:, :16]).logits) < 1e-5
    context = "the model in .* has a context of 32 tokens: pass --block"
    refused(context, from_pretrained, folder, 33)
    refused("block_size=16", cropped, x)


@pytest.mark.gpt2
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
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"n_head": 7}, "n_embd=48 is not a multiple of n_head=7"),
        ({"n_layer": 4}, "h.3.* is missing"),
        ({"n_embd": 96}, "shape"),
        ({"n_layer": None}, "n_layer: Input should be a valid integer"),
    ],
)
def test_other_architectures_are_refused_by_name(folder, change, message):
    edit_json(folder / "config.json", **change)
    refused(message, from_pretrained, folder)


@pytest.mark.parametrize(
    ("change", "message", "not_made"),
    [
        ({"n_layer": 1000}, "asks for more than its tensors hold", "weights.meta_model"),
        ({"vocab_size": 2**62}, "impossible shape", "weights.meta_model"),
        ({"n_head": 0}, "impossible shape", "weights.meta_model"),
        ({"n_positions": 30_000}, r"wpe\.weight has shape \(32, 48\)", "twin.make_twin"),
        ({"fingerprint": "x"}, "valid list", "twin.make_twin"),
        ({"fingerprint": [1.0, float("nan")]}, "finite", "twin.make_twin"),
    ],
)
def test_a_config_that_lies_is_refused_before_memory_is_asked_for(
    folder, monkeypatch, change, message, not_made
):
    """It is compared with the tensors before the model's shape or a twin of it is made."""
    edit_json(folder / "config.json", **change)
    monkeypatch.setattr(f"gpt12.{not_made}", pytest.fail)
    refused(message, from_pretrained, folder)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.wte.weight": Bomb()}, "without running code"),
        (dict.fromkeys("abc", torch.zeros(10_000)), "does not hold all numbers"),
        ({"transformer.wte.weight": torch.zeros(1).expand(97, 48)}, "does not hold all numbers"),
        ({"transformer.wte.weight": torch.zeros(1, device="meta")}, "does not hold all numbers"),
        ({"transformer.wte.weight": 3}, "instance of Tensor"),
        ([torch.zeros(3)], "valid dictionary"),
        ({str(i): torch.zeros(3)[:1] for i in range(3)}, "is missing"),
    ],
)
def test_a_pickle_that_runs_code_or_holds_no_tensors_is_refused(folder, tensors, message):
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    arguments = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 97, "block_size": 32}
    torch.save({"model": tensors, "model_args": arguments}, folder / "ckpt.pt")
    for source in (folder, folder / "ckpt.pt"):
        refused(message, from_pretrained, source)


@pytest.mark.parametrize(
    "weight_map", [["a"], {"a": 3}, {"a": "../model.safetensors"}, {"a": "/tmp/x"}, {"a": "b\\c"}]
)
def test_an_index_names_files_beside_it(folder, tmp_path, weight_map):
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(r"index\.json", from_pretrained, folder)


@pytest.mark.gpt2
@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_weights_in_several_files_and_in_a_pickle_of_tensors_are_read(theirs, folder, x, form):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if form == "pickle":
        torch.save(theirs[0].state_dict(), folder / "pytorch_model.bin")
    else:
        files = {name: f"{len(name) % 2}.safetensors" for name in tensors}
        for file in files.values():
            part = {name: tensors[name] for name in files if files[name] == file}
            save_file(part, folder / file)
        index = json.dumps({"weight_map": files})
        (folder / "model.safetensors.index.json").write_text(index)
    assert relative(from_pretrained(folder)(x)[0], theirs[0](x).logits) < 1e-5


def test_damaged_safetensors_are_refused(folder):
    for damage in (b"", b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"):
        (folder / "model.safetensors").write_bytes(damage)
        refused("damaged", from_pretrained, folder)


@pytest.mark.gpt2
def test_a_compiled_checkpoint_of_nanogpt_is_read(theirs, tmp_path, x):
    ours = from_pretrained(theirs[1])
    save_nanogpt(tmp_path / "ckpt.pt", ours, 97)
    content = torch.load(tmp_path / "ckpt.pt")
    content["model"] = {f"_orig_mod.{name}": t for name, t in content["model"].items()}
    torch.save(content, tmp_path / "ckpt.pt")
    assert torch.equal(from_pretrained(tmp_path / "ckpt.pt")(x)[0], ours(x)[0])


def test_nanogpts_padded_vocabulary_of_gpt2_is_cut_to_its_ids(tmp_path):
    shape = {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 2}
    padded = GPT(GPTConfig(vocab_size=50304, **shape))
    content = {"model": padded.state_dict(), "model_args": shape | {"vocab_size": 50304}}
    torch.save(content, tmp_path / "ckpt.pt")
    ours = from_pretrained(tmp_path / "ckpt.pt")
    x = torch.arange(50249, 50257).view(1, 8)
    assert ours.config.bias  # checkpoints from before nanoGPT had the key have them
    assert torch.equal(ours(x)[0], padded(x)[0][..., :50257])


@pytest.mark.gpt2
@pytest.mark.usefixtures("ours")
def test_biases_that_another_program_trained_are_read_whatever_the_configuration_says(tmp_path, x):
    """A model of ours without biases gets zero biases on disk, and other programs train them."""
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    torch.nn.init.normal_(theirs.transformer.h[1].attn.c_attn.bias)
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/config.json").read_text())["bias"] is False
    again = from_pretrained(tmp_path / "theirs")
    assert again.config.bias
    assert relative(again(x)[0], theirs(x).logits) < 1e-5


def test_openais_upload_has_no_prefix_and_causal_masks_that_are_no_biases(ours, tmp_path, x):
    file = tmp_path / "ours/model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    for i in range(SHAPE["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, metadata={"format": "pt"})
    read = from_pretrained(tmp_path / "ours")
    assert not read.config.bias
    assert torch.equal(read(x)[0], ours(x)[0])


@pytest.mark.gpt2
@pytest.mark.parametrize(("dtype", "eot"), [(torch.float32, None), (torch.bfloat16, 96)])
def test_transformers_learns_the_dtype_and_the_end_of_a_text(tmp_path, dtype, eot):
    save_pretrained(GPT(GPTConfig(block_size=32, **SHAPE)).to(dtype), tmp_path, eot=eot)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == dtype
    written = GenerationConfig.from_pretrained(tmp_path)
    assert (written.bos_token_id, written.eos_token_id) == (eot, eot)
    # GGUF's converter reads the length of the context by its old name.
    assert json.loads((tmp_path / "config.json").read_text())["n_ctx"] == 32


@pytest.mark.gpt2
def test_loading_draws_no_random_numbers(theirs):
    state = torch.random.get_rng_state()
    from_pretrained(theirs[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    fresh = GPT(GPTConfig(block_size=32, **SHAPE))  # and afterwards drawing works again
    assert fresh.transformer.wte.weight.std() > 0.01
