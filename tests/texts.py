"""Random models whose greedy texts are decided, and those texts computed without a cache."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT

VOCAB = 97  # 128 with its padding
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [96, 0, 50], list(range(20, 60))]


def random_theirs(positions: int) -> GPT2LMHeadModel:
    torch.manual_seed(4)
    shape = GPT2Config(
        vocab_size=VOCAB, n_positions=positions, n_embd=48, n_layer=2, n_head=4, bos_token_id=0
    )
    shape.eos_token_id = None
    model = GPT2LMHeadModel(shape).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def with_loud_padding(model: GPT) -> GPT:
    """Make padding win wherever it is looked at: one row of each pair has a positive logit."""
    with torch.no_grad():
        model.lm_head.weight[VOCAB::2] = 1e3
        model.lm_head.weight[VOCAB + 1 :: 2] = -1e3
    return model


@torch.no_grad()
def recomputed(model, prompt: list[int], count: int, decided: float = 1e-4) -> list[int]:
    """Write greedily without a cache; past block_size from the last half, as stream() does."""
    context = list(prompt)
    new = []
    for _ in range(count):
        if len(context) > model.config.block_size:
            context = context[-max(1, model.config.block_size // 2) :]
        logits = model(torch.tensor([context]))[0][0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > decided, "a tie: these weights test nothing"
        new.append(int(logits.argmax()))
        context.append(new[-1])
    return new
