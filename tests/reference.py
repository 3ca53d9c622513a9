"""GPT-2 and AdamW, written from the formulas: what model.py and train.py are tested against.

Everything is computed one row, one head and one position at a time, in float64. No code is shared
with model.py. The weights are a dictionary of tensors with GPT-2's published names and layout
(Conv1D: (in, out)).
"""

import math

import torch

Weights = dict[str, torch.Tensor]


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(rows, w: Weights, prefix: str, n_head: int):
    width = len(rows[0]) // n_head
    qkv = [row @ w[f"{prefix}.c_attn.weight"] + w[f"{prefix}.c_attn.bias"] for row in rows]
    out = []
    for t in range(len(rows)):
        heads = []
        for h in range(n_head):
            part = slice(h * width, (h + 1) * width)
            query = qkv[t][: len(rows[0])][part]
            keys = [qkv[s][len(rows[0]) : 2 * len(rows[0])][part] for s in range(t + 1)]
            values = [qkv[s][2 * len(rows[0]) :][part] for s in range(t + 1)]
            scores = torch.stack([query @ key / math.sqrt(width) for key in keys])
            weights = torch.exp(scores - scores.max().detach())
            weights = weights / weights.sum()
            heads.append(sum(p * value for p, value in zip(weights, values, strict=True)))
        out.append(torch.cat(heads) @ w[f"{prefix}.c_proj.weight"] + w[f"{prefix}.c_proj.bias"])
    return out


def logits(ids: list[int], w: Weights, n_layer: int, n_head: int) -> torch.Tensor:
    """(T, V) logits of one row of token ids."""
    rows = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(ids)]
    for i in range(n_layer):
        p = f"h.{i}"
        normed = [layer_norm(row, w[f"{p}.ln_1.weight"], w[f"{p}.ln_1.bias"]) for row in rows]
        rows = [r + a for r, a in zip(rows, attention(normed, w, f"{p}.attn", n_head), strict=True)]
        normed = [layer_norm(row, w[f"{p}.ln_2.weight"], w[f"{p}.ln_2.bias"]) for row in rows]
        inner = [gelu(row @ w[f"{p}.mlp.c_fc.weight"] + w[f"{p}.mlp.c_fc.bias"]) for row in normed]
        outer = [row @ w[f"{p}.mlp.c_proj.weight"] + w[f"{p}.mlp.c_proj.bias"] for row in inner]
        rows = [r + o for r, o in zip(rows, outer, strict=True)]
    rows = [layer_norm(row, w["ln_f.weight"], w["ln_f.bias"]) for row in rows]
    return torch.stack([w["wte.weight"] @ row for row in rows])


def loss(x, y, w: Weights, n_layer: int, n_head: int) -> torch.Tensor:
    """Mean cross-entropy over the targets of a batch that are not -1."""
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for ids, targets in zip(x.tolist(), y.tolist(), strict=True):
        scores = logits(ids, w, n_layer, n_head)
        for row, target in zip(scores, targets, strict=True):
            if target != -1:
                log_sum_exp = torch.log(torch.exp(row - row.max()).sum()) + row.max()
                total = total + log_sum_exp - row[target]
                count += 1
    return total / max(1, count)


class AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101, algorithm 2).

    The gradients are first clipped by their global norm.
    """

    def __init__(self, w: Weights, betas, weight_decay: float, clip: float):
        self.w = w
        self.betas = betas
        self.weight_decay = weight_decay
        self.clip = clip
        self.t = 0  # finished updates
        self.m = {name: torch.zeros_like(p) for name, p in w.items()}
        self.v = {name: torch.zeros_like(p) for name, p in w.items()}

    def step(self, lr: float) -> None:
        self.t += 1
        grads = {name: torch.as_tensor(p.grad) for name, p in self.w.items()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        scale = min(1.0, self.clip / norm)
        with torch.no_grad():
            for name, p in self.w.items():
                g = grads[name] * scale
                self.m[name] = self.betas[0] * self.m[name] + (1 - self.betas[0]) * g
                self.v[name] = self.betas[1] * self.v[name] + (1 - self.betas[1]) * g * g
                m = self.m[name] / (1 - self.betas[0] ** self.t)
                v = self.v[name] / (1 - self.betas[1] ** self.t)
                decay = self.weight_decay if p.ndim > 1 else 0.0
                p -= lr * (m / (torch.sqrt(v) + 1e-8) + decay * p)
                p.grad = None
