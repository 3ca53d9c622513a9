"""sample.py from its command line to what it prints."""

import io
import json
import os
import re
import shutil
import signal
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import sample
from data.chat import CHAT_TEMPLATE, ChatTemplate, chat_template
from data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from gpt12 import twin
from gpt12.checkpoint import save_checkpoint
from gpt12.errors import run_main
from gpt12.folder import Progress
from gpt12.settings import SampleConfig
from gpt12.weights import from_pretrained, save_pretrained
from model import GPT, GPTConfig
from tests import processes
from tests.helpers import edit_json
from tests.models import save_nanogpt, use_exact_gelu
from tests.tiny_bpe import END, tiny_library


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
            save_pretrained(model, target, tokenizer.eot)
            tokenizer.save(target)

        save_checkpoint(folder / name, write, Progress(step=7, best_val_loss=1.5))
    return folder


@pytest.fixture
def start(out_dir, monkeypatch, capsys):
    """Run sample.py with options; returns (exit status, standard output, standard error)."""

    def call(*options: str, stdin: bytes | TextIO = b"") -> tuple[int, str, str]:
        argv = ["sample.py", f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", *options]
        monkeypatch.setattr("sys.argv", argv)
        if isinstance(stdin, bytes):
            stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(SystemExit) as end:
            run_main(sample.main)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return (end.value.code or 0, *printed)

    return call


@pytest.fixture
def scripted(monkeypatch):
    """Replace the model: a call of stream yields the next text, or "!"; \\x03 is Ctrl-C."""
    calls: list[list[int]] = []
    configs: list[SampleConfig] = []
    script: list[bytes] = []

    def stream(model, prompts, config):
        calls.extend(list(prompt) for prompt in prompts)
        configs.append(config)
        texts = [script.pop(0) if script else b"!" for _ in prompts]
        for step in zip_longest(*map(ids_of, texts), fillvalue=256):
            if 3 in step:
                signal.raise_signal(signal.SIGINT)
            yield list(step)

    monkeypatch.setattr("sample.stream", stream)
    return SimpleNamespace(calls=calls, configs=configs, script=script)


def save_random(folder: Path, tokenizer: Tokenizer, room: int = 32) -> str:
    """Save a random model with this context and tokenizer. Returns the option that names it."""
    save_pretrained(GPT(GPTConfig(room, tokenizer.vocab_size, 1, 1, 8)), folder, tokenizer.eot)
    tokenizer.save(folder)
    return f"--init_from={folder}"


def ids_of(text: bytes) -> list[int]:
    """Return the ids of bytes, in which `<|endoftext|>` is that token, as in nanoGPT."""
    first, *others = text.split(b"<|endoftext|>")
    return [*first, *(i for other in others for i in (256, *other))]


def rows_of(ended: tuple[int, str, str]) -> list[dict]:
    """Return what --json has printed, from a result of `start`."""
    return [json.loads(line) for line in ended[1].splitlines()]


def test_texts_are_equal_across_batch_sizes(start):
    options = ("--json", "--max_new_tokens=50", "--checkpoint=last", "--start=abc", "--seed=5")
    rows = rows_of(start(*options, "--num_samples=4"))
    assert [row["sample"] for row in rows] == [0, 1, 2, 3]
    texts = {row["text"] for row in rows}
    assert len(texts) == 4
    for row in rows:
        assert row["tokens"] == len(row["text"]) == 50
        assert row["finish"] == "length"
    for count in (1, 3):
        assert rows_of(start(*options, f"--num_samples={count}")) == rows[:count]
    # The next seed is not the next sample's.
    [other] = rows_of(start(*options[:-1], "--seed=6", "--num_samples=1"))
    assert other["text"] not in texts


def test_texts_go_to_standard_output_and_figures_to_standard_error(start):
    """Standard output holds only the texts and nanoGPT's separators."""
    options = ("--max_new_tokens=9", "--checkpoint=last", "--start=abc")
    rows = rows_of(start(*options, "--num_samples=3", "--json"))
    status, out, err = start(*options, "--num_samples=3")
    assert status == 0
    assert out == "".join(f"abc{row['text']}\n---------------\n" for row in rows)
    assert "last, step 7, best val loss 1.5" in err
    assert err.splitlines()[-1].startswith("27 tokens, ")
    assert err.count("tokens/s") == 1


def test_a_warning_about_the_weights_is_no_line_of_the_json(start, out_dir, tmp_path, monkeypatch):
    foreign = shutil.copytree(out_dir / "best", tmp_path / "foreign")
    edit_json(foreign / "config.json", fingerprint=None)
    use_exact_gelu(monkeypatch)
    twin.examine.cache_clear()
    ended = start(f"--init_from={foreign}", "--json", "--num_samples=2", "--max_new_tokens=1")
    assert len(rows_of(ended)) == 2
    assert f"warning: {foreign} is a GPT-2, and model.py computes something else" in ended[2]


def test_without_standard_error_the_json_stays_alone(start, monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    assert len(rows_of(start("--json", "--num_samples=1", "--max_new_tokens=1"))) == 1


def test_greedy_sampling_gives_one_text_unless_more_are_asked_for(start):
    for options, texts in (([], 1), (["--num_samples=2"], 2)):
        ended = start("--temperature=0", "--max_new_tokens=2", "--json", *options)
        assert len(rows_of(ended)) == texts


def test_tokens_appear_as_they_come(start, scripted, monkeypatch):
    scripted.script[:] = ["a\u20acb\n\nc".encode(), b"second\n\n"]
    seen = []
    monkeypatch.setattr("sample.show", seen.append)
    assert start("--start=q", "--num_samples=2", "--stop=\\n\\n")[0] == 0
    rule = "\n---------------\n"
    assert seen == ["q", "a", "\u20ac", "b", rule, "qsecond" + rule]


def test_the_reason_why_a_text_ended_is_reported(start, scripted):
    scripted.script[:] = [b"one\n", b"two<|endoftext|>more", b"\xe2\x82"]
    rows = rows_of(start("--start=q", "--num_samples=3", "--stop=\\n", "--json"))
    assert [row["text"] for row in rows] == ["one", "two", "\ufffd"]
    assert [row["finish"] for row in rows] == ["stop", "end", "end"]
    assert [row["tokens"] for row in rows] == [4, 3, 2]


def test_every_sampling_option_reaches_the_model(start, scripted):
    every = "--temperature=0.7 --top_k=12 --top_p=0.8 --min_p=0.15 --repetition_penalty=1.3"
    assert start("--num_samples=1")[0] == start("--num_samples=1", *every.split())[0] == 0
    values = [(c.temperature, c.top_k, c.top_p, c.min_p) for c in scripted.configs]
    assert values == [(0.8, 200, 1.0, 0.0), (0.7, 12, 0.8, 0.15)]
    assert [c.repetition_penalty for c in scripted.configs] == [1.0, 1.3]


@pytest.mark.parametrize(
    ("option", "prompt"),
    [(r"a\nb", "a\nb"), ("FILE:prompt.txt", "f\u00e9e\n"), ("-", "p\u00efped")],
)
def test_a_prompt_comes_from_the_option_a_file_or_standard_input(
    start, scripted, tmp_path, monkeypatch, option, prompt
):
    monkeypatch.chdir(tmp_path)
    Path("prompt.txt").write_text("f\u00e9e\n", "utf-8-sig")
    status, out, err = start(f"--start={option}", "--num_samples=1", stdin=prompt.encode())
    assert (status, out) == (0, f"{prompt}!\n{sample.SEPARATOR}\n"), err
    assert bytes(scripted.calls[-1]).decode() == prompt


def test_a_prompt_begins_with_the_token_that_transformers_puts_there(start, scripted, tmp_path):
    library = tiny_library()
    end = library.token_to_id(END)
    library.post_processor = TemplateProcessing(f"{END} $A", None, [(END, end)])
    start(save_random(tmp_path, Tokenizer(library)), "--start=the cat", "--num_samples=1")
    assert scripted.calls == [
        transformers.AutoTokenizer.from_pretrained(tmp_path).encode("the cat")
    ]
    assert scripted.calls[0][0] == end


# --------------------------------------------------------------------------------------------------
# Chat templates

DIALOGPT = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
SHORT = (
    "{% for message in messages %}"
    "{{ 'user: ' if message.role == 'user' else 'bot: ' }}{{ message.content }}\n"
    "{% endfor %}bot:"
)
DEFAULT = chat_template("messages", True, system="Be brief.")
STRANGE = """{{ bos_token }}{%- if messages[0].role == 'system' %}
    {{- '<<' + messages[0].content + '>>' }}
{%- endif %}
{% for message in messages if message.role != 'system' %}
    {% if loop.index > 5 %}{% break %}{% endif %}
    [{{ message | tojson }}]
{% endfor %}
{% if add_generation_prompt %}:{% endif %}
"""
QUESTION = {"role": "user", "content": " Hé\n"}
TURNS = [{"role": "system", "content": "Be brief."}, QUESTION]
TURNS += [{"role": "assistant", "content": "a\n"}, {"role": "user", "content": "b ->"}]


@pytest.fixture
def chat(tmp_path):
    """Make a folder with a random model of bytes and this chat template; it has room to talk."""

    def make(template: str, room: int = 256) -> str:
        tokenizer = ByteTokenizer()
        tokenizer.chat_template = template
        return save_random(tmp_path, tokenizer, room)

    return make


@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        chat_template("messages", False),
        chat_template("prompt", True, " ->"),
        chat_template("messages", True, system="Be kind.", single_turn=True),
        DIALOGPT,
        STRANGE,
    ],
    ids=["chat", "characters", "prompt", "single-turn", "DialoGPT", "strange"],
)
def test_a_template_writes_here_what_it_writes_in_transformers(chat, template):
    folder = chat(template).partition("=")[2]
    edit_json(f"{folder}/tokenizer_config.json", bos_token="<s>")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(Path(folder))
    ours = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    for messages in ([QUESTION], TURNS[1:], TURNS):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.write(messages) == expected


@pytest.mark.parametrize(
    ("template", "start_text", "prompt"),
    [
        (CHAT_TEMPLATE, "Hi", "### User:\nHi\n\n### Assistant:\n"),
        (CHAT_TEMPLATE, "### User:\nHi\n\n### Assistant:\n", None),
        (CHAT_TEMPLATE, "### User:\nHi\n\n### Assistant:", "### User:\nHi\n\n### Assistant:\n"),
        (CHAT_TEMPLATE, "### System:\nBe kind.\n\n### User:\nHi\n\n### Assistant:\nWell", None),
        (chat_template("prompt", True, " ->"), "Hi", "Hi ->"),
        (chat_template("prompt", True, " ->"), "Hi ->", None),
        (chat_template("prompt", True, "\n\n##\n"), "Hi\n\n##", "Hi\n\n##\n"),
        (SHORT, "FAQ of the superuser: how?", "user: FAQ of the superuser: how?\nbot:"),
        (SHORT, "user: how?", "user: user: how?\nbot:"),
        (SHORT, "user: how?\nbot: So", None),
        (SHORT, "What is a bot:", "user: What is a bot:\nbot:"),
        (DEFAULT, "### User:\nHi\n\n### Assistant:", "### User:\nHi\n\n### Assistant:\n"),
        (DIALOGPT, "Hi", "Hi<|endoftext|>"),
        (DIALOGPT, "Hi<|endoftext|>", None),
    ],
)
def test_a_start_is_put_into_the_template_once(start, scripted, chat, template, start_text, prompt):
    """prompt: what is continued; None: the start as it is."""
    status, out, err = start(chat(template), f"--start={start_text}", "--num_samples=1")
    assert status == 0, err
    prompt = prompt or start_text
    assert out == f"{prompt}!\n{sample.SEPARATOR}\n"
    assert scripted.calls == [ids_of(prompt.encode())]


def ask(*turns: str) -> str:
    """Return a prompt of CHAT_TEMPLATE: questions, and between them the answers."""
    questions = [f"### User:\n{turn}\n\n### Assistant:\n" for turn in turns[::2]]
    answers = [f"{turn}<|endoftext|>" for turn in turns[1::2]]
    return "".join(map("".join, zip_longest(questions, answers, fillvalue="")))


SYSTEM = "### System:\nBe brief.\n\n"
# Template and options; what is typed; what the model writes; its prompts; what is told.
CONVERSATIONS = {
    "keeps its context": (
        [],
        b"\none\ntwo\nthree\n",
        [b"hi", b"yo<|endoftext|>x", b"\n"],
        ["one", "onehitwo", "onehitwoyo<|endoftext|>three"],
        "The model reads each text together",
    ),
    "an empty line begins anew": (
        [],
        b"one\n\ntwo\n",
        [b"hi", b"yo"],
        ["one", "two"],
        "a new conversation",
    ),
    "a start is the first message": (
        ["--start=one"],
        b"two\n",
        [b"hi", b"yo"],
        ["one", "onehitwo"],
        "> one",
    ),
    "a mistake is told": ([], b"x" * 33 + b"\ngood\n", [b"fine"], ["good"], "33 tokens"),
    "bytes that are no text": ([], b"a\xff\n\xe0", [b"", b""], ["a\ufffd", "a\ufffd\ufffd"], ""),
    "Ctrl-C ends a text": ([], b"one\ntwo\n", [b"par\x03!", b""], ["one", "onepartwo"], ""),
    "Ctrl-C before the first": (
        [],
        b"one\ntwo\n",
        [b"\x03", b""],
        ["one", "onetwo"],
        "0 tokens, 0.0 tokens/s",
    ),
    # Every answer in the context ends as those that the model was trained on.
    "however it ended": (
        [CHAT_TEMPLATE, "--stop=."],
        b"q\nr\ns\nt\n",
        [b"a<|endoftext|>", b"b.", b"cc\x03", b""],
        [
            ask("q"),
            ask("q", "a", "r"),
            ask("q", "a", "r", "b.", "s"),
            ask("q", "a", "r", "b.", "s", "cc", "t"),
        ],
        "",
    ),
    "a full chat forgets its oldest turns": (
        [CHAT_TEMPLATE, "--system=Be brief."],
        b"q\nr\ns\nt\n",
        [b"one", b"two", b"three", b"!"],
        [
            SYSTEM + ask("q"),
            SYSTEM + ask("q", "one", "r"),
            SYSTEM + ask("q", "one", "r", "two", "s"),
            SYSTEM + ask("t"),
        ],
        "",
    ),
    "prompts have no turns": (
        [chat_template("prompt", True, "\n")],
        b"What?\nWhy?\n",
        [b"a", b"b"],
        ["What?\n", "Why?\n"],
        "answers each question without those before it",
    ),
    "single-turn data begin anew": (
        [chat_template("messages", True, system="Be brief.", single_turn=True)],
        b"q\nr\n",
        [b"a", b"b"],
        [SYSTEM + ask("q"), SYSTEM + ask("r")],
        "answers each question without those before it",
    ),
    "a text in the template begins anew": (
        [DIALOGPT],
        b"q\nr<|endoftext|>\ns\n",
        [b"a", b"b", b"c"],
        ["q<|endoftext|>", "r<|endoftext|>", "s<|endoftext|>"],
        "that text was in the model's template already",
    ),
}


@pytest.mark.parametrize(
    ("options", "stdin", "script", "prompts", "told"), CONVERSATIONS.values(), ids=CONVERSATIONS
)
def test_a_conversation(start, scripted, chat, options, stdin, script, prompts, told):
    if options and not options[0].startswith("--"):
        options = [chat(options[0], room=128), *options[1:]]
    scripted.script[:] = script
    texts = [re.split(rb"\x03|<", text)[0].decode() for text in script]
    status, out, err = start("--interactive", *options, stdin=stdin)
    assert (status, out) == (0, "".join(f"{text.rstrip('.')}\n" for text in texts)), err
    assert scripted.calls == [ids_of(prompt.encode()) for prompt in prompts]
    assert told in err


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{% for %}", "TemplateSyntaxError: "),
        ("{{ raise_exception('no roles') }}", "TemplateError: no roles"),
        ("{{ messages[7].content }}", "UndefinedError: "),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ '' }}", "ValueError: it writes nothing"),
    ],
)
@pytest.mark.parametrize("option", ["--interactive", "--start=Hi"])
def test_a_bad_template_ends_with_a_message(start, chat, option, template, told):
    status, out, err = start(chat(template), option, "--num_samples=1", "--max_new_tokens=1")
    assert (status, out) == (2, "")
    assert f"the model's chat template fails ({told}" in err


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot tell pasted lines apart")
def test_lines_that_are_pasted_together_are_one_message(start, scripted, monkeypatch):
    import pty

    keyboard, terminal = pty.openpty()
    os.write(keyboard, b"one\ntwo\n\nthree\n")

    def end(*args, **options):
        os.write(keyboard, b"\x04")  # Ctrl-D
        return original(*args, **options)

    original = sample.stream
    monkeypatch.setattr("sample.stream", end)
    scripted.script[:] = [b"fine"]
    with open(terminal, encoding="utf-8") as stdin:
        status, out, err = start("--interactive", stdin=stdin)
    os.close(keyboard)
    assert (status, out) == (0, "> fine\n> "), err
    assert [bytes(call) for call in scripted.calls] == [b"one\ntwo\n\nthree"]


# --------------------------------------------------------------------------------------------------
# Faults


def test_ctrl_c_outside_of_a_conversation_ends_with_130(start, scripted):
    scripted.script[:] = [b"ab\x03"]
    assert start("--start=q", "--num_samples=1")[:2] == (130, "qab")


def test_sample_ends_quietly_when_nobody_reads_any_more(out_dir, tmp_path):
    """`| head -c 10`: the reader is gone before the first text."""
    errors = tmp_path / "errors"
    options = (f"--out_dir={out_dir}", "--device=cpu", "--num_samples=3")
    started = processes.start(sample.main, *options, errors=errors)
    started.stdout.close()
    assert started.end()[0] == 141
    assert "Traceback" not in errors.read_text()
    assert "Exception" not in errors.read_text()


def test_a_program_without_standard_output_says_so(start, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    status, _, err = start(*ONE_TEXT)
    assert (status, "there is no standard output" in err) == (2, True)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_sample_reports_a_full_disk(start, monkeypatch):
    full = io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True)
    monkeypatch.setattr("sys.stdout", full)
    status, _, err = start("--start=q", "--num_samples=1", "--max_new_tokens=3")
    assert status == 2
    assert err.endswith("error: the text cannot be written: No space left on device\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out_dir=/nowhere", "no checkpoint in /nowhere/best"),
        ("--checkpoint=best --init_from=/nowhere/else", "/nowhere/else"),
        ("--start=", "prompt is empty"),
        ("--start=-", "--start=- cannot be read as UTF-8 text"),
        ("--start=FILE:/nowhere/prompt.txt", "FILE:/nowhere/prompt.txt cannot be read as UTF-8"),
        ("--start=caf\udce9", "cannot be read as UTF-8"),  # as Python reads Latin-1
        ("--start=" + "x" * 33, "33 tokens"),
        ("--start=abcZ --checkpoint=last", "'Z'"),
        ("--stop=", "stop"),
        ("--max_token=5", "max_new_tokens"),
        ("--init_from=" + "a" * 300, "is no local folder"),
        ("--out_dir=" + "a" * 300, "no checkpoint in"),
        ("--system=Brief.", "--system: the model's chat template has no place for it"),
    ],
)
def test_a_users_mistake_ends_with_a_message_and_status_2(start, options, message):
    status, out, err = start(*options.split(), stdin=b"\xff")
    assert (status, out) == (2, "")
    assert message in err


ONE_TEXT = ("--start=ab", "--num_samples=1", "--max_new_tokens=9")


@pytest.fixture
def nanogpt(out_dir, tmp_path, monkeypatch):
    """Write the model of best/ or last/ as nanoGPT's ckpt.pt. Returns the option that names it."""
    letters = {"outside": "\nabcdefghij", "data/letters": "\nabcdefghij", "data/fewer": "abc"}
    for folder in letters:
        (tmp_path / folder).mkdir(parents=True)
        CharTokenizer(letters[folder]).save(tmp_path / folder)
    monkeypatch.setattr("sample.DATA", tmp_path / "data")

    def write(name: str, dataset: str | None = None) -> str:
        model = from_pretrained(out_dir / name)
        save_nanogpt(tmp_path / "ckpt.pt", model, model.config.vocab_size, dataset)
        return f"--init_from={tmp_path / 'ckpt.pt'}"

    return write


@pytest.mark.parametrize(("name", "dataset"), [("best", None), ("last", "letters")])
def test_nanogpts_checkpoint_has_the_tokenizer_beside_it_or_of_its_data_set(
    start, nanogpt, tmp_path, name, dataset
):
    if dataset is None:
        ByteTokenizer().save(tmp_path)
    status, out, err = start(nanogpt(name, dataset), *ONE_TEXT)
    assert (status, out) == (0, start(f"--checkpoint={name}", *ONE_TEXT)[1]), err


@pytest.mark.parametrize("dataset", [None, "unknown", "../outside", "fewer"])
def test_nanogpts_checkpoint_without_a_known_tokenizer_asks_for_one(start, nanogpt, dataset):
    status, out, err = start(nanogpt("last", dataset), *ONE_TEXT)
    assert (status, out) == (2, "")
    assert "ckpt.pt has no tokenizer" in err


def test_nanogpts_checkpoint_of_gpt2s_vocabulary_has_gpt2s_tokenizer(start, tmp_path, monkeypatch):
    save_nanogpt(tmp_path / "ckpt.pt", GPT(GPTConfig(16, 50304, 1, 1, 2)), 50304)
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(tokenizer, "token_bytes", lambda token: b"x")
    monkeypatch.setattr("sample.get_tokenizer", {"gpt2": tokenizer}.get)
    status, out, err = start(f"--init_from={tmp_path / 'ckpt.pt'}", *ONE_TEXT)
    assert (status, out) == (0, f"abxxxxxxxxx\n{sample.SEPARATOR}\n"), err


def test_nanogpts_compile_is_taken_and_has_no_effect(start):
    status, out, err = start("--compile=True", *ONE_TEXT)
    assert (status, out) == start(*ONE_TEXT)[:2]
    assert "compile: has no effect" in err
