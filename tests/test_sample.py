"""Generation against `transformers` and full recomputation; sample.py from its command line to what it prints."""

import contextlib
import copy
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import logits_process as theirs_process

import sample
from config.machine import Card
from data.run import save_checkpoint
from data.texts import CHAT_TEMPLATE
from data.tokenizers import ByteTokenizer, CharTokenizer
from gpt12 import config_loader
from gpt12.errors import run_main
from gpt12.settings import SampleConfig
from model import GPT, Decoder, GPTConfig, Sampling, WeightsError, sample_token, uniform
from tests.harmless import FEW, harmless
from tests.helpers import ROOT, command, environment

VOCAB = 97  # 128 with its padding
GREEDY = Sampling(temperature=0)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [96, 0, 50], list(range(20, 60))]


# --------------------------------------------------------------------------------------------------------------------
# Which tokens


def random_theirs(positions: int) -> GPT2LMHeadModel:
    torch.manual_seed(4)
    shape = GPT2Config(vocab_size=VOCAB, n_positions=positions, n_embd=48, n_layer=2, n_head=4, bos_token_id=0)
    shape.eos_token_id = None
    model = GPT2LMHeadModel(shape).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One random GPT-2 as `transformers` has it and as we read it, the padding of our vocabulary made the likeliest."""
    theirs = random_theirs(256)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, with_loud_padding(GPT.from_pretrained(folder).eval())


def with_loud_padding(model: GPT) -> GPT:
    """Padding rows that win wherever they are looked at: one of each pair has a positive logit."""
    with torch.no_grad():
        model.lm_head.weight[VOCAB::2], model.lm_head.weight[VOCAB + 1 :: 2] = 1e3, -1e3
    return model


@torch.no_grad()
def recomputed(model, prompt: list[int], count: int, decided: float = 1e-4) -> list[int]:
    """Greedy without a cache; past block_size on the last half, as GPT.stream's docstring says."""
    context, new = list(prompt), []
    for _ in range(count):
        if len(context) > model.config.block_size:
            context = context[-max(1, model.config.block_size // 2) :]
        logits = model(torch.tensor([context]))[0][0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > decided, "a tie: these weights test nothing"
        new.append(int(logits.argmax()))
        context.append(new[-1])
    return new


@pytest.fixture(scope="module")
def greedy(both):
    return [recomputed(both[1], prompt, 200) for prompt in PROMPTS]


def test_greedy_with_the_cache_is_full_recomputation_and_transformers(both, greedy):
    theirs, ours = both
    assert len({tuple(text[-20:]) for text in greedy}) > 1  # else any cache would do
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        options = {"max_new_tokens": 200, "do_sample": False, "attention_mask": torch.ones(1, len(prompt)).long()}
        text = theirs.generate(torch.tensor([prompt]), pad_token_id=0, **options)[0, len(prompt) :].tolist()
        assert text == expected
        assert ours.generate([prompt], 200, sampling=GREEDY) == [expected]
    assert ours.generate(PROMPTS, 200, sampling=GREEDY) == greedy


@pytest.mark.parametrize("block_size", [1, 2, 7, 16, 41])
def test_past_block_size_the_last_half_is_computed_anew(both, tmp_path, block_size):
    both[0].save_pretrained(tmp_path)
    model = with_loud_padding(GPT.from_pretrained(tmp_path, block_size).eval())
    prompts = [prompt[:block_size] for prompt in PROMPTS]
    expected = [recomputed(model, prompt, 100, decided=1e-5) for prompt in prompts]
    assert model.generate(prompts, 100, sampling=GREEDY) == expected


def test_a_text_does_not_depend_on_its_neighbours(both):
    _, model = both
    how, seeds = Sampling(1.5, top_k=50, repetition_penalty=1.2), [3, 99, 2**62, 7]
    together = model.generate(PROMPTS, 60, sampling=how, seeds=seeds)
    for i in range(4):
        assert model.generate([PROMPTS[i]], 60, sampling=how, seeds=[seeds[i]]) == [together[i]]
    pair = model.generate([PROMPTS[2], PROMPTS[0]], 60, sampling=how, seeds=[seeds[2], seeds[0]])
    assert pair == [together[2], together[0]]
    assert together[0] != model.generate([PROMPTS[0]], 60, sampling=how, seeds=[4])[0]
    longer = model.generate([PROMPTS[0]], 80, sampling=how, seeds=[3])[0]
    assert longer[:60] == together[0]  # nor on how long it may become


def test_weights_stored_by_columns_are_the_same_model(both, greedy, tmp_path):
    model = copy.deepcopy(both[1])
    model.store_by_columns()
    assert {m.weight.stride(0) for m in model.modules() if isinstance(m, torch.nn.Linear)} == {1}
    assert model.lm_head.weight is model.transformer["wte"].weight
    assert model.generate(PROMPTS, 200, sampling=GREEDY) == greedy
    for name, m in (("rows", both[1]), ("columns", model)):
        m.save_pretrained(tmp_path / name)
    assert (tmp_path / "rows/model.safetensors").read_bytes() == (tmp_path / "columns/model.safetensors").read_bytes()


@pytest.mark.parametrize(("prompt", "new"), [([1, 2], 2), ([1] * 15, 4)])
def test_warming_up_before_recording_stays_inside_draws_and_context(monkeypatch, prompt, new):
    """The way a GPU goes, with a graph that is the plain step: neither draws nor context reach further than needed."""
    model = GPT(GPTConfig(16, 13, 2, 2, 16)).eval()
    plain = model.generate([prompt], new, seeds=[3])
    side = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in (("Stream", lambda: side), ("current_stream", lambda: side), ("CUDAGraph", lambda: side)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    @contextlib.contextmanager
    def recording(graph):
        with monkeypatch.context() as m:
            m.setattr(Decoder, "forward", lambda self: None)
            yield

    def advance(self):
        if self.graph is None:
            self.capture()
        self.forward()

    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(Decoder, "advance", advance)
    assert model.generate([prompt], new, seeds=[3]) == plain


def test_no_id_of_the_padding_is_ever_sampled(both):
    ids = both[1].generate([[1]] * 64, 40, sampling=Sampling(temperature=50.0))
    assert {token for text in ids for token in text} == set(range(VOCAB))


def test_nothing_asked_for_is_nothing_written(both):
    assert both[1].generate([[1, 2], [3]], 0) == [[], []]
    assert both[1].generate([], 5) == []


def test_a_prompt_must_fit(both):
    for prompt in ([], [1] * 257):
        with pytest.raises(WeightsError, match="block_size=256"):
            both[1].generate([[1], prompt], 1)


def allowed_probabilities(logits: list[float], how: Sampling, seen: set[int]) -> list[float]:
    """The distribution in plain Python, written from the definitions in Sampling's docstring."""
    r, t = how.repetition_penalty, how.temperature
    logits = [(x / r if x > 0 else x * r) if i in seen else x for i, x in enumerate(logits)]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: how.top_k or None]
    weight = {i: math.exp((logits[i] - logits[order[0]]) / t) for i in order}
    total, reached = sum(weight.values()), 0.0
    kept: list[int] = []
    for i in order:
        if reached / total >= how.top_p and kept:
            break
        kept.append(i)
        reached += weight[i]
    kept = [i for i in kept if weight[i] >= how.min_p * weight[order[0]]]
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


def transformers_probabilities(logits: torch.Tensor, how: Sampling, seen: set[int]) -> list[float]:
    steps = [
        theirs_process.RepetitionPenaltyLogitsProcessor(how.repetition_penalty),
        theirs_process.TemperatureLogitsWarper(how.temperature),
        theirs_process.TopKLogitsWarper(how.top_k or len(logits)),
        theirs_process.TopPLogitsWarper(how.top_p),
        theirs_process.MinPLogitsWarper(how.min_p),
    ]
    ids, scores = torch.tensor([sorted(seen)]), logits[None].clone()
    for step in steps:
        scores = step(ids, scores)
    return scores.double().softmax(1)[0].tolist()


@pytest.mark.parametrize(
    "how",
    [
        Sampling(),
        Sampling(0.5),
        Sampling(2.0),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=1000),
        Sampling(top_p=0.5),
        Sampling(top_p=0.9),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.1),
        Sampling(min_p=0.9),
        Sampling(repetition_penalty=1.7),
        Sampling(repetition_penalty=0.6),
        Sampling(0.7, 12, 0.8, 0.15, 1.3),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_exactly_their_probabilities(how):
    """An even grid of draws hits every token as often as its probability says, to within one draw at either end."""
    n, seen = 4000, {0, 3, 4, 11}
    draws = (torch.arange(n) + 0.5) / n
    for seed in range(3):
        logits = 3 * torch.randn(30, generator=torch.Generator().manual_seed(seed))
        expected = allowed_probabilities(logits.tolist(), how, seen)
        assert expected == pytest.approx(transformers_probabilities(logits, how, seen), abs=1e-6)
        mask = torch.zeros(30, dtype=torch.bool)
        mask[list(seen)] = True
        chosen = sample_token(logits.expand(n, -1), draws, how, mask.expand(n, -1))
        count = np.bincount(chosen.numpy(), minlength=30)
        assert np.abs(count - n * np.array(expected)).max() <= 1.01
        assert not count[np.array(expected) == 0].any()


@pytest.mark.parametrize(
    "how", [Sampling(), *map(Sampling, (0, 1e-30, 1e-99)), Sampling(top_p=1e-9), Sampling(min_p=0.99)]
)
def test_the_extreme_draws_and_logits_stay_in_the_distribution(how):
    below_one = 1 - 2.0**-24
    logits = torch.tensor([[3.0, -torch.inf, 2.0, -1e30], [0.0, 0.0, 0.0, 0.0], [-5.0, 1e30, 0.0, 0.0]])
    for draw in (0.0, 0.5, below_one):
        chosen = sample_token(logits, torch.full((3,), draw), how).tolist()
        assert chosen[0] in (0, 2)
        assert chosen[2] == 1
        if how != Sampling():
            assert chosen[0] == 0


def test_the_nucleus_ends_with_the_token_that_reaches_top_p():
    halves = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(5, -1)
    assert len(sample_token(halves, torch.arange(5) / 5, Sampling(top_p=0.5)).unique()) == 1


def test_the_repetition_penalty_counts_prompt_and_text(both):
    """A penalty that forbids what was seen: 57 different tokens follow a prompt of 40 different ones."""
    how = Sampling(temperature=0, repetition_penalty=1e9)
    logits = torch.ones(1, VOCAB)  # all positive, so that dividing forbids
    _, model = both
    ids = model.generate([PROMPTS[3]], 1, sampling=how)[0]
    assert ids[0] not in PROMPTS[3]
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    for _ in range(VOCAB):
        token = sample_token(logits, torch.zeros(1), how, seen)
        assert not seen[0, token]
        seen[0, token] = True
    text = PROMPTS[2] + model.generate([PROMPTS[2]], 30, sampling=Sampling(0, repetition_penalty=1.5))[0]
    for end in range(len(PROMPTS[2]), len(text)):
        row = model(torch.tensor([text[:end]]))[0][0, -1].tolist()
        row = [(x / 1.5 if x > 0 else x * 1.5) if i in text[:end] else x for i, x in enumerate(row)]
        assert text[end] == int(np.argmax(row))


def test_draws_over_seeds_are_uniform():
    """Chi-square over 20,000 texts of one token, and over neighbouring seeds: the seeds that sample.py hands out."""
    n, cells = 20_000, 16
    draws = np.array([uniform(1337 * 1_000_003 + i, 2).tolist() for i in range(n)])
    assert 0 <= draws.min() <= draws.max() < 1
    first, second = (draws * cells).astype(int).T
    for a, b in ((first, second), (first[:-1], first[1:])):
        table = np.bincount(a * cells + b, minlength=cells**2)
        expected = len(a) / cells**2
        statistic = ((table - expected) ** 2 / expected).sum()
        assert 180 < statistic < 340  # 255 degrees of freedom: 0.02% lie below, 0.03% above


def test_sampled_tokens_follow_the_models_distribution(both):
    _, model = both
    n = 6000
    tokens = [text[0] for text in model.generate([[1, 2, 3]] * n, 1, sampling=Sampling(6.0), seeds=range(n))]
    with torch.no_grad():
        expected = n * (model(torch.tensor([[1, 2, 3]]))[0][0, -1] / 6).double().softmax(0).numpy()
    count = np.bincount(tokens, minlength=VOCAB)
    common = expected >= 5
    count = np.append(count[common], count[~common].sum())
    expected = np.append(expected[common], expected[~common].sum() + 1e-9)
    statistic, freedom = ((count - expected) ** 2 / expected).sum(), common.sum() - 1
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_int8_weights_are_near_the_exact_ones_and_decode_alike(both, tmp_path):
    theirs, plain = both
    theirs.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path).eval()
    model.quantize()
    for name, linear in plain.transformer.named_modules():
        if isinstance(linear, torch.nn.Linear):
            quantized = model.transformer.get_submodule(name)
            step = linear.weight.abs().amax(1, keepdim=True) / 127
            error = (quantized.weight * quantized.scale[:, None] - linear.weight).abs()
            assert quantized.weight.dtype == torch.int8
            assert (error <= 0.501 * step).all()
            assert error.max() > 0
    x = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        exact, rounded = plain(x)[0], model(x)[0]
    assert 1e-4 < ((exact - rounded).norm() / exact.norm()).item() < 0.05
    prompts = PROMPTS[1::2]
    expected = [recomputed(model, prompt, 40, decided=1e-5) for prompt in prompts]
    assert model.generate(prompts, 40, sampling=GREEDY) == expected


def test_a_prompt_of_one_token_works_under_autocast(both):
    """The bias of a single row is added apart, where autocast would leave the sum in fp32 and the cache is bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        assert len(both[1].generate([[1]], 3)[0]) == 3


def test_int8_halves_what_decoding_reads():
    shape = GPTConfig(64, 5000, 1, 4, 256, bias=True)
    C, V = 256, shape.padded_vocab_size
    matrices, outputs = 12 * C * C + C * V, 9 * C + V
    vectors = 9 * C + 4 * C  # biases, two norms
    model = GPT(shape).bfloat16()
    assert model.decode_bytes() == 2 * (matrices + vectors)
    model.quantize()
    assert model.decode_bytes() == matrices + 2 * outputs + 2 * vectors
    assert model.decode_bytes() / (2 * matrices) < 0.52


# --------------------------------------------------------------------------------------------------------------------
# A text out of tokens


def pieces(*table: str | bytes) -> SimpleNamespace:
    """A tokenizer whose id i is the i-th piece; the one after the last ends a text."""
    parts = [piece if isinstance(piece, bytes) else piece.encode() for piece in table]
    return SimpleNamespace(eot=len(parts), token_bytes=lambda i: parts[i])


def shown(tokens: list[str | bytes], *stops: str) -> tuple[list[str], str | None]:
    text = sample.Text(pieces(*tokens), stops)
    steps = [text.add(i) for i in range(len(tokens))]
    reason = text.reason
    steps.append("" if reason else text.finish("length"))
    assert text.shown == "".join(steps)
    return steps, reason


@pytest.mark.parametrize(
    ("tokens", "stops", "steps", "reason"),
    [
        (["ab", "c"], (), ["ab", "c", ""], None),
        (["ab\n\ncd", "e"], ("\n\n",), ["ab", "", ""], "stop"),  # inside a token
        (["ab\n", "\ncd"], ("\n\n",), ["ab", "", ""], "stop"),  # over two, and the first newline never shown
        (["ab\n", "cd", "\n"], ("\n\n",), ["ab", "\ncd", "", "\n"], None),  # held back until known
        (["x", "a", "a", "b", "z"], ("aab",), ["x", "", "", "", "", ""], "stop"),
        (["a", "a", "a", "b"], ("aab",), ["", "", "a", "", ""], "stop"),  # a beginning inside a beginning
        (["one END two STOP"], ("STOP", "END"), ["one ", ""], "stop"),  # the first in the text
        (["EN", "D"], ("ENDING", "XY"), ["", "", "END"], None),
        (["\u00e9".encode()[:1], "\u00e9".encode()[1:]], (), ["", "\u00e9", ""], None),
        ([b"a\xf0\x9f", b"\x99", b"\x82b"], (), ["a", "", "\U0001f642b", ""], None),
        ([b"a\xf0\x9f", b"b"], (), ["a", "\ufffdb", ""], None),  # half a character that stays one
        ([b"a\xf0\x9f"], (), ["a", "\ufffd"], None),
        ([b"\xe2\x82", b"\xac!"], ("\u20ac",), ["", "", ""], "stop"),  # a stop string of bytes over two tokens
    ],
)
def test_stop_strings_and_whole_characters(tokens, stops, steps, reason):
    assert shown(tokens, *stops) == (steps, reason)


def test_the_end_of_text_token_ends_a_text():
    text = sample.Text(pieces("ab", "\n"), ("\n\n",))
    assert [text.add(i) for i in (0, 1, 2, 0)] == ["ab", "", "\n", ""]
    assert (text.reason, text.ids, text.shown) == ("end", [0, 1], "ab\n")


# --------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    """A run's folder with a random model of bytes in best/, of characters in last/."""
    folder = tmp_path_factory.mktemp("run")
    for name, tokenizer in (("best", ByteTokenizer()), ("last", CharTokenizer("\nabcdefghij"))):
        torch.manual_seed(1)
        model = GPT(GPTConfig(32, tokenizer.vocab_size, 2, 2, 16))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)

        def write(target, model=model, tokenizer=tokenizer):
            model.save_pretrained(target, tokenizer.eot)
            tokenizer.save(target)

        save_checkpoint(folder / name, write, {"step": 7, "best_val_loss": 1.5}, 0)
    return folder


@pytest.fixture
def start(out_dir, monkeypatch, capsys):
    """Run sample.py with options; returns (exit status, standard output, standard error)."""

    def call(*options: str, stdin: bytes = b"") -> tuple[int, str, str]:
        argv = ["sample.py", f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *options]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        with pytest.raises(SystemExit) as end:
            run_main(sample.main)
        return (end.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture
def scripted(monkeypatch):
    """The model says what we want: each call of stream yields the next of these texts, to the byte; None is Ctrl-C."""
    calls: list[list[int]] = []
    hows: list[Sampling] = []
    script: list[list[str | bytes | None]] = []

    def stream(self, prompts, count, how, *, seeds, compiled):
        calls.extend(list(prompt) for prompt in prompts)
        hows.append(how)
        texts = [script.pop(0) for _ in prompts]
        rows = [[*(t or b"")] if t is None or isinstance(t, bytes) else t for t in texts]
        for step in zip_longest(*rows, fillvalue=256):
            if None in step:
                signal.raise_signal(signal.SIGINT)
            yield list(step)

    monkeypatch.setattr(GPT, "stream", stream)
    return SimpleNamespace(calls=calls, hows=hows, script=script)


def test_texts_are_equal_across_batch_sizes(start):
    options = ("--json", "--max_new_tokens=50", "--checkpoint=last", "--start=abc", "--seed=5")
    rows = [json.loads(line) for line in start(*options, "--num_samples=4")[1].splitlines()]
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    assert len({row["text"] for row in rows}) == 4
    assert all(row["tokens"] == 50 == len(row["text"]) and row["finish"] == "length" for row in rows)
    for count in (1, 3):
        again = [json.loads(line) for line in start(*options, f"--num_samples={count}")[1].splitlines()]
        assert again == rows[:count]
    other = json.loads(start(*options[:-1], "--seed=6", "--num_samples=1")[1])
    assert other["text"] not in {row["text"] for row in rows}  # the next seed is not the next sample's


def test_texts_go_to_standard_output_and_figures_to_standard_error(start):
    """Standard output holds the texts between nanoGPT's rules and nothing else; the figures are on standard error."""
    options = ("--max_new_tokens=9", "--checkpoint=last", "--start=abc")
    rows = [json.loads(line) for line in start(*options, "--num_samples=3", "--json")[1].splitlines()]
    status, out, err = start(*options, "--num_samples=3")
    assert status == 0
    assert out == "".join(f"abc{row['text']}\n---------------\n" for row in rows)
    assert "last, step 7, best val loss 1.5" in err
    assert "27 tokens, first after" in err
    assert "tokens/s" in err


def test_the_pace_counts_from_the_first_token(monkeypatch):
    clock = iter([10.0, 12.0, 16.0])  # begun, first tokens, told
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(clock))
    timing = sample.Timing(started=next(clock))
    for _ in range(5):
        timing.tick(2)
    told = "10 tokens, first after 2.00 s, then 2 tokens/s"
    assert timing.tell(8.0) == f"{told}, 25% of what the memory's speed allows (8)"


def test_the_speed_bound_is_one_reading_of_the_weights_for_all_texts(start, out_dir, monkeypatch):
    bounds, size = [], GPT.from_pretrained(out_dir / "best").decode_bytes()
    monkeypatch.setattr(sample, "CARDS", SimpleNamespace(get=lambda name: Card(1.0, 3.0, 1.0, 1.0)))
    monkeypatch.setattr(sample.Timing, "tell", lambda self, bound: str(bounds.append(bound)))
    for count in (1, 4):
        assert start(f"--num_samples={count}", "--max_new_tokens=1")[0] == 0
    assert bounds == pytest.approx([3e9 / size, 4 * 3e9 / size])


@pytest.mark.parametrize(("options", "texts"), [([], 1), (["--num_samples=2"], 2)])
def test_greedy_sampling_gives_one_text_unless_more_are_asked_for(start, options, texts):
    status, out, _ = start("--temperature=0", "--max_new_tokens=2", "--json", *options)
    assert (status, len(out.splitlines())) == (0, texts)


def test_tokens_appear_as_they_come(start, scripted, monkeypatch):
    scripted.script[:] = ["a\u20acb\n\nc".encode(), b"second\n\n"]
    seen = []
    monkeypatch.setattr(sample, "show", seen.append)
    assert start("--start=q", "--num_samples=2", "--stop=\\n\\n")[0] == 0
    rule = "\n---------------\n"
    assert seen == ["q", "a", "\u20ac", "b", rule, "qsecond" + rule]


def test_the_reason_why_a_text_ended_is_reported(start, scripted):
    scripted.script[:] = [b"one\n", [*b"two", 256, *b"more"], "\u20ac".encode()[:2]]
    _, out, _ = start("--start=q", "--num_samples=3", "--stop=\\n", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["text"], row["finish"]) for row in rows] == [("one", "stop"), ("two", "end"), ("\ufffd", "end")]
    assert [row["tokens"] for row in rows] == [4, 3, 2]


def test_every_sampling_option_reaches_the_model(start, scripted):
    for options in ([], ["--temperature=0.7", "--top_k=12", "--top_p=0.8", "--min_p=0.15", "--repetition_penalty=1.3"]):
        scripted.script[:] = [b"!"]
        assert start("--num_samples=1", *options)[0] == 0
    assert scripted.hows == [Sampling(0.8, top_k=200), Sampling(0.7, 12, 0.8, 0.15, 1.3)]


def test_a_prompt_comes_from_the_option_a_file_or_standard_input(start, scripted, tmp_path):
    (tmp_path / "prompt.txt").write_text("f\u00e9e\n", "utf-8")
    for option, stdin, prompt in (
        ("--start=direct", b"", "direct"),
        (f"--start=FILE:{tmp_path / 'prompt.txt'}", b"", "f\u00e9e\n"),
        ("--start=-", "p\u00efped".encode(), "p\u00efped"),
    ):
        scripted.script[:] = [b"!"]
        status, out, err = start(option, "--num_samples=1", stdin=stdin)
        assert (status, out) == (0, f"{prompt}!\n{sample.RULE}\n"), err
        assert bytes(scripted.calls[-1]).decode() == prompt


def test_the_end_of_text_in_a_start_is_the_token_as_in_nanogpt(start, scripted):
    for prompt, ids in (("<|endoftext|>", [256]), ("a<|endoftext|>b", [97, 256, 98])):
        scripted.script[:] = [b"!"]
        assert start(f"--start={prompt}", "--num_samples=1")[0] == 0
        assert scripted.calls[-1] == ids


def test_a_start_is_a_question_to_a_model_of_conversations(start, out_dir, scripted, tmp_path):
    shutil.copytree(out_dir / "best", tmp_path / "chat")
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save(tmp_path / "chat")
    scripted.script[:] = [b"42"]
    assert start(f"--init_from={tmp_path / 'chat'}", "--start=Hi", "--num_samples=1")[0] == 0
    assert bytes(scripted.calls[-1]) == b"### User:\nHi\n\n### Assistant:\n"


def test_the_command_line_can_ask_for_int8_weights(start):
    status, out, err = start("--quantize=int8", "--num_samples=2", "--max_new_tokens=40", "--json")
    assert status == 0, err
    assert len(out.splitlines()) == 2


def test_a_conversation_keeps_its_context(start, scripted):
    scripted.script[:] = [b"hi", [*b"yo", 256, *b"x"], b"\n"]
    status, out, err = start("--interactive", stdin=b"one\n\ntwo\nthree\n")
    assert status == 0
    assert out == "hi\nyo\n\n\n"  # a text a line; the last one is a newline itself
    one = [*b"one", *b"hi", 256]
    assert scripted.calls == [[*b"one"], [*one[:-1], *b"two"], [*one[:-1], *b"two", *b"yo", 256, *b"three"]]
    assert err.count("tokens/s") == 3
    assert "press Enter, and the model continues it. Ctrl-C" in err


def test_a_full_context_forgets_its_older_half_but_never_the_prompt(start, scripted):
    scripted.script[:] = [b"b" * 20, b"!", b"!"]
    prompts = ["a" * 10, "c" * 5, "d" * 30]
    assert start("--interactive", stdin="\n".join(prompts).encode())[0] == 0
    history = "a" * 10 + "b" * 20 + "c" * 5  # 35 bytes, 32 fit
    assert [bytes(call).decode() for call in scripted.calls] == ["a" * 10, history[-16:], "d" * 30]


@pytest.fixture
def chat(tmp_path):
    """Make a folder of a random model of bytes, with room for a conversation, that bears this chat template."""

    def make(template: str) -> str:
        tokenizer = ByteTokenizer()
        tokenizer.chat_template = template
        GPT(GPTConfig(256, tokenizer.vocab_size, 1, 1, 8)).save_pretrained(tmp_path, tokenizer.eot)
        tokenizer.save(tmp_path)
        return f"--init_from={tmp_path}"

    return make


def test_every_answer_in_the_context_ends_as_those_it_was_trained_on(start, scripted, chat):
    """By itself, by a stop string or by Ctrl-C: the next message never stands in the midst of an answer."""
    options = (chat(CHAT_TEMPLATE), "--interactive", "--stop=.")
    scripted.script[:] = [[*b"a", 256], b"b.", [*b"cc", None], b""]
    assert start(*options, stdin=b"q\nr\ns\nt\n")[0] == 0
    ask = [[*f"### User:\n{c}\n\n### Assistant:\n".encode()] for c in "qrst"]
    first = [*ask[0], *b"a", 256, *ask[1]]
    assert scripted.calls[1:3] == [first, [*first, *b"b.", 256, *ask[2]]]
    assert scripted.calls[3] == [*scripted.calls[2], *b"cc", 256, *ask[3]]


def test_a_template_that_is_not_ours_is_told_and_not_replaced_by_ours(start, scripted, chat):
    scripted.script[:] = [b"!"]
    status, _, err = start(chat("{{ messages[0].content }}<|endoftext|>"), "--interactive", stdin=b"hello\n")
    assert (status, scripted.calls) == (0, [[*b"hello"]])
    assert "chat template is not one of train.py's: texts go in as they are" in err


@pytest.mark.parametrize("before", [b"", b"par"])
def test_ctrl_c_ends_a_text_and_not_the_loop(start, scripted, before):
    scripted.script[:] = [[*before, None, *b"tial"], b"again"]
    status, out, err = start("--interactive", stdin=b"one\ntwo\n")
    assert (status, out) == (0, f"{before.decode()}\nagain\n")
    assert [bytes(call) for call in scripted.calls] == [b"one", b"one" + before + b"two"]
    assert "Traceback" not in err


def test_ctrl_c_while_a_text_is_shown_does_not_end_the_loop(start, scripted, monkeypatch):
    scripted.script[:] = [b"abc", b"again"]
    original = sample.show

    def show(text):
        original(text)
        if text == "b":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sample, "show", show)
    assert start("--interactive", stdin=b"one\ntwo\n")[:2] == (0, "ab\nagain\n")
    assert bytes(scripted.calls[1]) == b"oneabtwo"


def test_ctrl_c_outside_of_a_conversation_ends_with_130(start, scripted):
    scripted.script[:] = [[*b"ab", None]]
    assert start("--start=q", "--num_samples=1")[:2] == (130, "qab")


def test_sample_ends_quietly_when_nobody_reads_any_more(out_dir):
    """`| head -c 10`, or `2>&1 | head -c 10`: the reader is gone before the first text."""
    argv = command("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--num_samples=3")
    processes = []
    for unbuffered in ("", "1"):
        for err in (subprocess.PIPE, subprocess.STDOUT):
            reader, writer = os.pipe()
            os.close(reader)
            env = environment(PYTHONUNBUFFERED=unbuffered)
            processes.append(subprocess.Popen(argv, cwd=ROOT, stdout=writer, stderr=err, env=env))
            os.close(writer)
    for process in processes:
        with process:
            told = process.stderr.read() if process.stderr else b""
            assert process.wait() == 141
        assert b"Traceback" not in told
        assert b"Exception" not in told


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_sample_reports_a_full_disk(start, monkeypatch):
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    status, _, err = start("--start=q", "--num_samples=1", "--max_new_tokens=3")
    assert (status, err.rpartition("error: ")[2]) == (2, "the text cannot be written: No space left on device\n")


def test_a_mistake_in_a_conversation_is_told_and_the_loop_goes_on(start, scripted):
    scripted.script[:] = [b"fine"]
    status, out, err = start("--interactive", stdin=b"x" * 33 + b"\ngood\n")
    assert (status, out) == (0, "fine\n")
    assert "33 tokens" in err
    assert bytes(scripted.calls[0]) == b"good"


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"\xff\n\xe0"], ids=["in a line", "half a character at the end"])
def test_a_line_that_is_no_text_does_not_end_a_conversation(start, line):
    with harmless("/nowhere"):
        status, out, err = start("--interactive", stdin=line)
    assert (status, out) == (0, "")
    assert err.count("not UTF-8") == (1 if line.endswith(b"\n") else 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out_dir=/nowhere"], "no checkpoint in /nowhere/best"),
        (["--checkpoint=best", "--init_from=/nowhere/else"], "/nowhere/else"),
        (["--start="], "prompt is empty"),
        (["--start=-"], "prompt is empty"),
        (["--start=FILE:/nowhere/prompt.txt"], "/nowhere/prompt.txt"),
        (["--start=" + "x" * 33], "33 tokens"),
        (["--start=abcZ", "--checkpoint=last"], "'Z'"),
        (["--max_new_tokens=0"], "max_new_tokens"),
        (["--num_samples=0"], "num_samples"),
        (["--top_p=0"], "top_p"),
        (["--top_p=1.01"], "top_p"),
        (["--min_p=1"], "min_p"),
        (["--top_k=-1"], "top_k"),
        (["--temperature=-0.1"], "temperature"),
        (["--temperature=nan"], "temperature"),
        (["--repetition_penalty=0"], "repetition_penalty"),
        (["--stop="], "stop"),
        (["--max_token=5"], "max_new_tokens"),
    ],
)
def test_a_users_mistake_ends_with_a_message_and_status_2(start, monkeypatch, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, err = start(*options)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_an_adapter_without_its_model_is_told_where_it_is_merged(start, out_dir, tmp_path):
    shutil.copytree(out_dir / "best", tmp_path / "best")
    (tmp_path / "best/adapter").mkdir()
    (tmp_path / "best/adapter/adapter_config.json").write_text("{}")
    status, out, err = start(f"--init_from={tmp_path / 'best/adapter'}")
    assert (status, out) == (2, "")
    assert err.endswith(f"pass {tmp_path / 'best'}, where the adapter is merged\n")


def test_nanogpts_checkpoint_writes_with_the_tokenizer_beside_it(start, out_dir, tmp_path):
    model = GPT.from_pretrained(out_dir / "best")
    state = {
        name: t[:257] if name.endswith(("wte.weight", "lm_head.weight")) else t
        for name, t in model.state_dict().items()
    }
    args = {
        key: getattr(model.config, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    }
    torch.save({"model": state, "model_args": args}, tmp_path / "ckpt.pt")
    options = (f"--init_from={tmp_path / 'ckpt.pt'}", "--start=ab", "--num_samples=1", "--max_new_tokens=9")
    status, _, err = start(*options)
    assert (status, "Put vocab.json and merges.txt beside it" in err) == (2, True)
    ByteTokenizer().save(tmp_path)
    status, out, _ = start(*options)
    assert (status, out) == (0, start("--checkpoint=best", *options[1:])[1])


@pytest.mark.parametrize("options", [[], ["--max_new_tokens=20000"]])
def test_the_compiler_is_tried_only_for_texts_that_it_serves(out_dir, monkeypatch, options):
    argv = [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *options]
    asked = []
    monkeypatch.setattr("config.machine.choose_compile", lambda asked_for, device, long, notes: asked.append(long))
    sample.load(config_loader.load(SampleConfig, argv)[0])
    assert asked == [bool(options)]


def test_standard_input_that_is_no_text_is_refused(start):
    status, out, err = start("--start=-", stdin=b"ab\xff")
    assert (status, out) == (2, "")
    assert "not UTF-8" in err


def test_a_damaged_checkpoint_is_refused_by_name(start, out_dir, tmp_path):
    import shutil

    shutil.copytree(out_dir, tmp_path / "run")
    file = tmp_path / "run/best/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    status, _, err = start(f"--out_dir={tmp_path / 'run'}")
    assert status == 2
    assert str(file) in err
    (tmp_path / "run/last/tokenizer.json").unlink()
    assert "tokenizer.json" in start(f"--out_dir={tmp_path / 'run'}", "--checkpoint=last")[2]


NUMBERS = st.sampled_from(
    ["0", "1", "2", "7", "-1", "0.5", "1e-30", "1e30", "1e999", "nan", "None", "True", "", "'3'", "x"]
)
OPTIONS = st.one_of(
    st.builds("--{}={}".format, st.sampled_from(["temperature", "top_k", "top_p", "min_p", "seed"]), NUMBERS),
    st.builds("--{}={}".format, st.sampled_from(["num_samples", "max_new_tokens", "repetition_penalty"]), NUMBERS),
    st.builds("--stop={}".format, st.text(max_size=3)),
    st.builds(
        "--start={}".format, st.text(max_size=40) | st.sampled_from(["-", "FILE:", "FILE:\0", "FILE:/", "FILE:x" * 900])
    ),
    st.builds("--{}={}".format, st.sampled_from(["out_dir", "init_from", "checkpoint"]), st.text(max_size=9)),
    st.sampled_from(
        ["--init_from=x.pt", "--init_from=/", "--init_from=resume", "--out_dir=/dev/null", "--checkpoint=last"]
    ),
    st.sampled_from(
        ["--json", "--interactive", "--quantize=int8", "--dtype=bfloat16", "--device=mps", "--compile=False"]
    ),
    st.text(max_size=9),
)


@given(options=st.lists(OPTIONS, max_size=5), stdin=st.binary(max_size=50) | st.text(max_size=50).map(str.encode))
@settings(FEW, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_options_give_texts_or_a_message(start, monkeypatch, options, stdin):
    """Texts of at most seven tokens, of both models; no network: the hub has no model of any such name."""

    def no_hub(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", no_hub)
    with harmless("/nowhere"):
        status, out, err = start("--num_samples=2", "--max_new_tokens=7", *options, stdin=stdin)
    assert status == 0 or (status == 2 and err.rpartition("error: ")[2].strip()), (status, out, err)
    assert "Traceback" not in out + err


def test_a_text_too_long_for_memory_ends_with_a_message(start):
    status, _, err = start("--start=ab", f"--max_new_tokens={10**15}")
    assert (status, "out of memory" in err, "Traceback" in err) == (2, True, False)
