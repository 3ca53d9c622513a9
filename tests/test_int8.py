"""gpt12/int8.py: how weights are rounded, what a quantized model writes, what decoding reads."""

import torch

from gpt12.generate import decode_bytes, generate
from gpt12.int8 import quantize
from gpt12.weights import from_pretrained
from model import GPT, GPTConfig
from tests.models import relative, small_model
from tests.texts import GREEDY, PROMPTS, random_theirs, recomputed, with_loud_padding


def test_int8_weights_are_near_the_exact_ones_and_decode_alike(tmp_path):
    random_theirs(256).save_pretrained(tmp_path)
    plain = with_loud_padding(from_pretrained(tmp_path).eval())
    model = from_pretrained(tmp_path).eval()
    quantize(model)
    for name, linear in plain.transformer.named_modules():
        if isinstance(linear, torch.nn.Linear):
            quantized = model.transformer.get_submodule(name)
            step = linear.weight.abs().amax(1, keepdim=True) / 127
            error = (quantized.weight - linear.weight).abs()
            assert quantized.int8_weight.dtype == torch.int8
            assert (error <= 0.501 * step).all()
            assert error.max() > 0
    x = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        exact = plain(x)[0]
        rounded = model(x)[0]
    assert 1e-4 < ((exact - rounded).norm() / exact.norm()).item() < 0.05
    prompts = PROMPTS[1::2]
    expected = [recomputed(model, prompt, 40, decided=1e-5) for prompt in prompts]
    assert generate(model, prompts, 40, sampling=GREEDY) == expected


def test_int8_halves_what_decoding_reads():
    shape = GPTConfig(64, 5000, 1, 4, 256, bias=True)
    C = 256
    V = shape.padded_vocab_size
    matrices = 12 * C * C + C * V
    outputs = 9 * C + V
    vectors = 9 * C + 4 * C  # biases, two norms
    model = GPT(shape).bfloat16()
    assert decode_bytes(model) == 2 * (matrices + vectors)
    quantize(model)
    assert decode_bytes(model) == matrices + 2 * outputs + 2 * vectors
    assert decode_bytes(model) / (2 * matrices) < 0.52


def test_the_loss_of_a_quantized_model_is_that_of_its_logits():
    model = small_model()
    quantize(model)
    x, y = torch.randint(0, 13, (2, 4, 8))
    logits = model(x)[0]
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 13), y.view(-1))
    assert relative(model(x, y)[1], expected) < 1e-5
