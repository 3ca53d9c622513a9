"""gpt12/generate.py against `transformers`, recomputation, and distributions in plain Python."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as theirs_process

from gpt12.config import load_config
from gpt12.generate import (
    LARGEST_DRAW,
    Decoder,
    KVCache,
    TextStream,
    generate,
    sample_token,
    store_by_columns,
)
from gpt12.settings import SampleConfig
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests.helpers import ROOT
from tests.texts import PROMPTS, VOCAB, random_theirs, recomputed, with_loud_padding


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One random GPT-2 as `transformers` has it and as we read it. Our padding is the likeliest."""
    theirs = random_theirs(256)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, with_loud_padding(from_pretrained(folder).eval())


@pytest.fixture(scope="module")
def greedy(both):
    return [recomputed(both[1], prompt, 100) for prompt in PROMPTS]


def test_greedy_with_the_cache_is_full_recomputation_and_transformers(both, greedy):
    theirs, ours = both
    assert len({tuple(text[-20:]) for text in greedy}) > 1  # else any cache would do
    assert generate(ours, PROMPTS, max_new_tokens=100, temperature=0) == greedy
    assert generate(ours, PROMPTS[:1], max_new_tokens=100, temperature=0) == greedy[:1]
    idx = torch.tensor(PROMPTS[1:2])
    options = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0}
    [text] = theirs.generate(idx, attention_mask=torch.ones_like(idx), **options).tolist()
    assert text == PROMPTS[1] + greedy[1]


@pytest.mark.parametrize("block_size", [1, 2, 16, 41])
def test_past_block_size_the_last_half_is_computed_anew(both, tmp_path, block_size):
    both[0].save_pretrained(tmp_path)
    model = with_loud_padding(from_pretrained(tmp_path, block_size).eval())
    prompts = [prompt[:block_size] for prompt in PROMPTS]
    expected = [recomputed(model, prompt, 70, decided=1e-5) for prompt in prompts]
    assert generate(model, prompts, max_new_tokens=70, temperature=0) == expected


def window_of_five(self, query, key, example=None):
    distance = query[:, :, None] - key[:, None, :]
    return (distance >= 0) & (distance < 5)


def test_a_changed_model_writes_with_the_cache_what_it_writes_without(both, monkeypatch):
    """Training and decoding see the same tokens. docs/changes has models with other caches."""
    model = copy.deepcopy(both[1])
    before = recomputed(model, PROMPTS[3], 20)
    monkeypatch.setattr("model.Transformer.sees", window_of_five)
    del model.transformer.is_causal  # it was asked for before sees() was changed
    expected = [recomputed(model, prompt, 40) for prompt in PROMPTS]
    assert expected[3][:20] != before
    assert generate(model, PROMPTS, max_new_tokens=40, temperature=0) == expected


def test_a_text_does_not_depend_on_its_neighbours(both):
    _, model = both
    keys = {"temperature": 1.5, "top_k": 50, "repetition_penalty": 1.2}
    together = generate(model, PROMPTS, max_new_tokens=60, seed=2**62, **keys)
    for i in range(4):  # nor on how long it may become
        prompts = [*[[7]] * i, PROMPTS[i]]
        last = generate(model, prompts, max_new_tokens=65, seed=2**62, **keys)[-1]
        assert last[:60] == together[i]
    assert together[0] != generate(model, [PROMPTS[0]], max_new_tokens=60, seed=4, **keys)[0]


def test_weights_stored_by_columns_are_the_same_model(both, greedy):
    model = copy.deepcopy(both[1])
    store_by_columns(model)
    assert {m.weight.stride(0) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {1}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert generate(model, PROMPTS, max_new_tokens=100, temperature=0) == greedy


class CountOperations(TorchDispatchMode):
    """Count what would be kernels on a GPU: all operations but views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.gpt2
def test_a_step_launches_few_kernels():
    """Decoding on a GPU takes as long as its kernels are many."""
    counts = []
    for n_layer in (1, 2):
        model = GPT(GPTConfig(64, 500, n_layer, 2, 16)).bfloat16().eval()
        decoder = Decoder(
            model, KVCache(1, 64, torch.device("cpu")), SampleConfig(), torch.rand(1, 9)
        )
        with torch.no_grad():
            decoder.read_prompts([[1, 2, 3]])
            with CountOperations() as operations:
                decoder.advance()
        counts.append(operations.count)
    # In a layer: two norms, four products, one store, attention, GELU and two sums.
    assert counts[1] - counts[0] == 11
    assert counts[0] <= 11 + 23


def test_loading_and_writing_do_not_import_the_compiler(both, tmp_path):
    """It takes seconds, and every run of sample.py would wait for it."""
    save_pretrained(both[1], tmp_path)
    program = f"""
import sys
from gpt12.generate import generate
from gpt12.weights import from_pretrained
generate(from_pretrained({str(tmp_path)!r}), [[1, 2]], max_new_tokens=3)
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_no_id_of_the_padding_is_ever_sampled(both):
    ids = generate(both[1], [[1]] * 64, max_new_tokens=40, temperature=50.0, top_k=None)
    assert {token for text in ids for token in text} == set(range(VOCAB))


def choice(line: str) -> SampleConfig:
    """Return a choice among all tokens by their probabilities, but for what the options say."""
    return load_config(SampleConfig, ["--temperature=1", "--top_k=none", *line.split()]).config


def transformers_probabilities(
    logits: torch.Tensor, how: SampleConfig, seen: set[int]
) -> list[float]:
    steps = [
        theirs_process.RepetitionPenaltyLogitsProcessor(how.repetition_penalty),
        theirs_process.TemperatureLogitsWarper(how.temperature),
        theirs_process.TopKLogitsWarper(how.top_k or len(logits)),
        theirs_process.TopPLogitsWarper(how.top_p),
        theirs_process.MinPLogitsWarper(how.min_p),
    ]
    ids = torch.tensor([sorted(seen)])
    scores = logits[None].clone()
    for step in steps:
        scores = step(ids, scores)
    return scores.double().softmax(1)[0].tolist()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--temperature=2",
        "--top_k=7",
        "--top_k=1000",
        "--top_p=0.5",
        "--top_p=1e-6",
        "--min_p=0.1",
        "--repetition_penalty=0.6",
        "--temperature=0.7 --top_k=12 --top_p=0.8 --min_p=0.15 --repetition_penalty=1.3",
    ],
)
def test_tokens_are_drawn_with_exactly_their_probabilities(line):
    """An even grid of draws hits every token as often as its probability says, within one draw."""
    how = choice(line)
    n = 4000
    seen = {0, 3, 4, 11}
    draws = (torch.arange(n) + 0.5) / n
    logits = 3 * torch.randn(30)
    expected = np.array(transformers_probabilities(logits, how, seen))
    mask = torch.zeros(30, dtype=torch.bool)
    mask[list(seen)] = True
    chosen = sample_token(logits.expand(n, -1), draws, how, mask.expand(n, -1))
    count = np.bincount(chosen.numpy(), minlength=30)
    assert np.abs(count - n * expected).max() <= 1.01
    assert not count[expected == 0].any()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--temperature=0",
        "--temperature=1e-30",
        "--temperature=1e-99",
        "--top_p=1e-9",
        "--min_p=0.99",
    ],
)
def test_the_extreme_draws_and_logits_stay_in_the_distribution(line):
    logits = torch.tensor(
        [[3.0, -torch.inf, 2.0, -1e30], [0.0, 0.0, 0.0, 0.0], [-5.0, 1e30, 0.0, 0.0]]
    )
    for draw in (0.0, 0.5, LARGEST_DRAW):
        chosen = sample_token(logits, torch.full((3,), draw), choice(line)).tolist()
        assert chosen[0] in (0, 2)
        assert chosen[2] == 1
        if line:
            assert chosen[0] == 0


def test_the_nucleus_ends_with_the_token_that_reaches_top_p():
    halves = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(5, -1)
    assert len(sample_token(halves, torch.arange(5) / 5, choice("--top_p=0.5")).unique()) == 1


def test_the_repetition_penalty_counts_prompt_and_text(both):
    _, model = both
    prompt = PROMPTS[2]
    how = choice("--temperature=0 --repetition_penalty=1.5")
    [written] = generate(model, [prompt], max_new_tokens=30, temperature=0, repetition_penalty=1.5)
    text = prompt + written
    for end in range(len(prompt), len(text)):
        seen = torch.zeros(1, VOCAB, dtype=torch.bool)
        seen[0, text[:end]] = True
        logits = model(torch.tensor([text[:end]]))[0][:, -1]
        assert text[end] == sample_token(logits, torch.zeros(1), how, seen).item()


def test_a_prompt_of_one_token_works_under_autocast(both):
    """Keys and values have to be bf16 then."""
    with torch.autocast("cpu", torch.bfloat16):
        assert len(generate(both[1], [[1]], max_new_tokens=3)[0]) == 3


# --------------------------------------------------------------------------------------------------
# From ids to shown text


@pytest.mark.parametrize(
    ("tokens", "stops", "steps", "reason"),
    [
        (b"ab|c", "", "ab|c|", None),
        (b"ab\n\ncd|e", "\n\n", "ab||", "stop"),  # inside a token
        (b"ab\n|\ncd", "\n\n", "ab||", "stop"),  # over two tokens
        (b"ab\n|cd|\n", "\n\n", "ab|\ncd||\n", None),  # held back
        (b"a|a|a|b", "aab", "||a||", "stop"),
        (b"one END two STOP", "STOP|END", "one |", "stop"),  # the first in the text
        (b"EN|D", "ENDING|XY", "||END", None),
        (b"\xc3|\xa9", "", "|\u00e9|", None),
        (b"a\xf0\x9f|b", "", "a|\ufffdb|", None),  # half of it stays one
        (b"a\xf0\x9f", "", "a|\ufffd", None),
        (b"\xe2\x82|\xac!", "\u20ac", "||", "stop"),
    ],
)
def test_stop_strings_and_whole_characters(tokens, stops, steps, reason):
    """Tokens, stop strings, and what is shown at each token and at the end, parted by |."""
    pieces = tokens.split(b"|")
    tokenizer = SimpleNamespace(end_ids={len(pieces)}, token_bytes=pieces.__getitem__)
    text = TextStream(tokenizer, tuple(filter(None, stops.split("|"))))
    shown = [text.add(i) for i in range(len(pieces))]
    assert text.finish_reason == reason
    shown.append("" if reason else text.finish("length"))
    assert "|".join(shown) == steps
    assert text.shown == "".join(shown)
