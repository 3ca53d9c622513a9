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
from tests.helpers import edit_json, read_json, refused
from tests.models import SHAPE, random_batch, relative, save_nanogpt

pytestmark = pytest.mark.usefixtures("own_folder")
OURS = Path("ours")
THEIRS = Path("theirs")
CKPT = Path("ckpt.pt")
WEIGHTS = Path("theirs/model.safetensors")


@pytest.fixture
def copied(theirs, own_folder) -> None:
    """Let the files of a model of `transformers` be in theirs/."""
    shutil.copytree(theirs[1], THEIRS)


@pytest.fixture
def x() -> torch.Tensor:
    return random_batch()[0]


@pytest.fixture
def ours(own_folder) -> GPT:
    """A model without biases, saved in ours/."""
    model = GPT(GPTConfig(block_size=32, bias=False, **SHAPE))
    save_pretrained(model, OURS)
    return model


@pytest.mark.gpt2
def test_transformers_opens_what_we_save(theirs, x):
    model, folder = theirs
    ours = from_pretrained(folder)
    save_pretrained(ours, OURS)
    again = GPT2LMHeadModel.from_pretrained(OURS).eval()
    assert torch.equal(again(x).logits, model(x).logits)
    assert (
        load_file("ours/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    )
    assert torch.equal(from_pretrained(OURS)(x)[0], ours(x)[0])


@pytest.mark.gpt2
def test_a_model_without_biases_is_saved_and_loaded_unchanged(ours, x):
    again = from_pretrained(OURS)
    assert not again.config.bias
    assert again.state_dict().keys() == ours.state_dict().keys()
    assert torch.equal(again(x)[0], ours(x)[0])
    theirs = GPT2LMHeadModel.from_pretrained(OURS).eval()
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
def test_other_architectures_are_refused_by_name(copied, change, message):
    edit_json("theirs/config.json", **change)
    refused(message, from_pretrained, THEIRS)


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
    copied, monkeypatch, change, message, not_made
):
    """It is compared with the tensors before the model's shape or a twin of it is made."""
    edit_json("theirs/config.json", **change)
    monkeypatch.setattr(f"gpt12.{not_made}", pytest.fail)
    refused(message, from_pretrained, THEIRS)


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
def test_a_pickle_that_runs_code_or_holds_no_tensors_is_refused(copied, tensors, message):
    WEIGHTS.unlink()
    torch.save(tensors, "theirs/pytorch_model.bin")
    torch.save({"model": tensors, "model_args": {"block_size": 32, **SHAPE}}, CKPT)
    for source in (THEIRS, CKPT):
        refused(message, from_pretrained, source)


def write_index(weight_map: object) -> None:
    Path(f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "weight_map", [["a"], {"a": 3}, {"a": "../model.safetensors"}, {"a": "/tmp/x"}, {"a": "b\\c"}]
)
def test_an_index_names_files_beside_it(copied, weight_map):
    WEIGHTS.rename("model.safetensors")
    write_index(weight_map)
    refused(r"index\.json", from_pretrained, THEIRS)


@pytest.mark.gpt2
@pytest.mark.parametrize("form", ["shards", "pickle"])
def test_weights_in_several_files_and_in_a_pickle_of_tensors_are_read(copied, theirs, x, form):
    tensors = load_file(WEIGHTS)
    WEIGHTS.unlink()
    if form == "pickle":
        torch.save(theirs[0].state_dict(), "theirs/pytorch_model.bin")
    else:
        files = {name: f"{len(name) % 2}.safetensors" for name in tensors}
        for file in files.values():
            part = {name: tensors[name] for name in files if files[name] == file}
            save_file(part, THEIRS / file)
        write_index(files)
    assert relative(from_pretrained(THEIRS)(x)[0], theirs[0](x).logits) < 1e-5


def test_damaged_safetensors_are_refused(copied):
    for damage in (b"", b"\xff" * 8, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"):
        WEIGHTS.write_bytes(damage)
        refused("damaged", from_pretrained, THEIRS)


@pytest.mark.gpt2
def test_a_compiled_checkpoint_of_nanogpt_is_read(theirs, x):
    ours = from_pretrained(theirs[1])
    save_nanogpt(CKPT, ours, 97)
    content = torch.load(CKPT)
    content["model"] = {f"_orig_mod.{name}": t for name, t in content["model"].items()}
    torch.save(content, CKPT)
    assert torch.equal(from_pretrained(CKPT)(x)[0], ours(x)[0])


def test_nanogpts_padded_vocabulary_of_gpt2_is_cut_to_its_ids():
    shape = {"block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 2}
    padded = GPT(GPTConfig(vocab_size=50304, **shape))
    content = {"model": padded.state_dict(), "model_args": shape | {"vocab_size": 50304}}
    torch.save(content, CKPT)
    ours = from_pretrained(CKPT)
    x = torch.arange(50249, 50257).view(1, 8)
    assert ours.config.bias  # checkpoints from before nanoGPT had the key have them
    assert torch.equal(ours(x)[0], padded(x)[0][..., :50257])


@pytest.mark.gpt2
@pytest.mark.usefixtures("ours")
def test_biases_that_another_program_trained_are_read_whatever_the_configuration_says(x):
    """A model of ours without biases gets zero biases on disk, and other programs train them."""
    theirs = GPT2LMHeadModel.from_pretrained(OURS).eval()
    torch.nn.init.normal_(theirs.transformer.h[1].attn.c_attn.bias)
    theirs.save_pretrained(THEIRS)
    assert read_json("theirs/config.json")["bias"] is False
    again = from_pretrained(THEIRS)
    assert again.config.bias
    assert relative(again(x)[0], theirs(x).logits) < 1e-5


def test_openais_upload_has_no_prefix_and_causal_masks_that_are_no_biases(ours, x):
    file = "ours/model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    for i in range(SHAPE["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, metadata={"format": "pt"})
    read = from_pretrained(OURS)
    assert not read.config.bias
    assert torch.equal(read(x)[0], ours(x)[0])


@pytest.mark.gpt2
@pytest.mark.parametrize(("dtype", "eot"), [(torch.float32, None), (torch.bfloat16, 96)])
def test_transformers_learns_the_dtype_and_the_end_of_a_text(dtype, eot):
    save_pretrained(GPT(GPTConfig(block_size=32, **SHAPE)).to(dtype), OURS, eot=eot)
    model = GPT2LMHeadModel.from_pretrained(OURS, dtype="auto")
    assert model.dtype == dtype
    written = GenerationConfig.from_pretrained(OURS)
    assert (written.bos_token_id, written.eos_token_id) == (eot, eot)
    # GGUF's converter reads the length of the context by its old name.
    assert read_json("ours/config.json")["n_ctx"] == 32


@pytest.mark.gpt2
def test_loading_draws_no_random_numbers(theirs):
    state = torch.random.get_rng_state()
    from_pretrained(theirs[1])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    fresh = GPT(GPTConfig(block_size=32, **SHAPE))  # and afterwards drawing works again
    assert fresh.transformer.wte.weight.std() > 0.01
