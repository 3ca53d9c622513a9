"""Datasheet figures of NVIDIA GPUs: the basis of MFU and of the plan."""

from __future__ import annotations

from typing import NamedTuple

from gpt12.errors import UserError


class Card(NamedTuple):
    """What a GPU's datasheet promises."""

    tflops: float  # dense bf16 on the tensor cores with fp32 accumulation, without sparsity
    bandwidth_gbs: float  # memory bandwidth in GB/s
    vram_gb: float
    fp32_tflops: float  # float32 outside the tensor cores


# Keys are the names that the driver reports. A card that is missing here gets no MFU, not a wrong
# one.
CARDS = {
    # NVIDIA Ampere GA102 whitepaper v2.1, tables 2, 9, appendix A; 3090 Ti, 3060: product pages
    "NVIDIA GeForce RTX 3060": Card(25.5, 360, 12, 12.7),
    "NVIDIA GeForce RTX 3070": Card(40.6, 448, 8, 20.3),
    "NVIDIA GeForce RTX 3080": Card(59.5, 760, 10, 29.8),
    "NVIDIA GeForce RTX 3090": Card(71.0, 936, 24, 35.6),
    "NVIDIA GeForce RTX 3090 Ti": Card(80.0, 1008, 24, 40.0),
    # NVIDIA Ada whitepaper v2.1, appendix A and B; 4060, 4060 Ti, SUPER: product pages
    "NVIDIA GeForce RTX 4060": Card(30.2, 272, 8, 15.1),
    "NVIDIA GeForce RTX 4060 Ti": Card(44.1, 288, 16, 22.1),
    "NVIDIA GeForce RTX 4070": Card(58.3, 504, 12, 29.1),
    "NVIDIA GeForce RTX 4070 SUPER": Card(71.0, 504, 12, 35.5),
    "NVIDIA GeForce RTX 4070 Ti": Card(80.2, 504, 12, 40.1),
    "NVIDIA GeForce RTX 4070 Ti SUPER": Card(88.2, 672, 16, 44.1),
    "NVIDIA GeForce RTX 4080": Card(97.5, 717, 16, 48.7),
    "NVIDIA GeForce RTX 4080 SUPER": Card(104.4, 736, 16, 52.2),
    "NVIDIA GeForce RTX 4090": Card(165.2, 1008, 24, 82.6),
    # NVIDIA RTX Blackwell whitepaper v1.1, appendix A to C
    "NVIDIA GeForce RTX 5070": Card(61.7, 672, 12, 30.9),
    "NVIDIA GeForce RTX 5070 Ti": Card(87.9, 896, 16, 43.9),
    "NVIDIA GeForce RTX 5080": Card(112.6, 960, 16, 56.3),
    "NVIDIA GeForce RTX 5090": Card(209.5, 1792, 32, 104.8),
    # Datasheets of the L4, L40S, A100, H100 and H200, which print twice these rates, with sparsity
    "NVIDIA L4": Card(121.0, 300, 24, 30.3),
    "NVIDIA L40S": Card(362.0, 864, 48, 91.6),
    "NVIDIA A100-SXM4-40GB": Card(312.0, 1555, 40, 19.5),
    "NVIDIA A100-SXM4-80GB": Card(312.0, 2039, 80, 19.5),
    "NVIDIA A100 80GB PCIe": Card(312.0, 1935, 80, 19.5),
    "NVIDIA H100 PCIe": Card(756.0, 2039, 80, 51.0),
    "NVIDIA H100 80GB HBM3": Card(989.4, 3352, 80, 66.9),
    "NVIDIA H200": Card(989.4, 4800, 141, 66.9),
}


def find_card(name: str) -> str:
    """Return the full name of a card in the table. The end of it, in any case, is enough."""
    names = [known for known in CARDS if known.lower().endswith(name.lower())]
    if len(names) == 1:
        return names[0]
    part = name.lower().replace(" ", "")
    near = [known for known in CARDS if part in known.lower().replace(" ", "")]
    raise UserError(
        f"card={name} names no single card. Add a line with its datasheet's figures to "
        "gpt12/cards.py, or choose one of\n  " + "\n  ".join(near or CARDS)
    )
