"""The table of datasheets, against figures that follow from units, clock and memory bus."""

import pytest

from gpt12.cards import CARDS

# SMs, boost clock in MHz, bits of the memory bus, Gbit/s a pin: NVIDIA's product pages
# (nvidia.com/geforce/graphics-cards/{30,40,50}-series, compare). Per SM and clock their tensor
# cores do 512 operations in bf16 with fp32 accumulation, their other units 256 in fp32 (GA102
# whitepaper v2.1, table 3; Ada whitepaper v2.1, appendix A).
GEFORCE = {
    "3060": (28, 1777, 192, 15),
    "3070": (46, 1725, 256, 14),
    "3080": (68, 1710, 320, 19),
    "3090": (82, 1695, 384, 19.5),
    "3090 Ti": (84, 1860, 384, 21),
    "4060": (24, 2460, 128, 17),
    "4060 Ti": (34, 2535, 128, 18),
    "4070": (46, 2475, 192, 21),
    "4070 SUPER": (56, 2475, 192, 21),
    "4070 Ti": (60, 2610, 192, 21),
    "4070 Ti SUPER": (66, 2610, 256, 21),
    "4080": (76, 2505, 256, 22.4),
    "4080 SUPER": (80, 2550, 256, 23),
    "4090": (128, 2520, 384, 21),
    "5070": (48, 2512, 192, 28),
    "5070 Ti": (70, 2452, 256, 28),
    "5080": (84, 2617, 256, 30),
    "5090": (170, 2407, 512, 28),
}
# bf16 with sparsity (twice the dense rate), memory in GB/s and GB, fp32: NVIDIA's datasheets.
DATACENTER = {
    "NVIDIA L4": (242, 300, 24, 30.3),
    "NVIDIA L40S": (724, 864, 48, 91.6),
    "NVIDIA A100-SXM4-40GB": (624, 1555, 40, 19.5),
    "NVIDIA A100-SXM4-80GB": (624, 2039, 80, 19.5),
    "NVIDIA A100 80GB PCIe": (624, 1935, 80, 19.5),
    "NVIDIA H100 PCIe": (1513, 2000, 80, 51),
    "NVIDIA H100 80GB HBM3": (1979, 3350, 80, 67),
    "NVIDIA H200": (1979, 4800, 141, 67),
}


def test_every_card_in_the_table_is_checked_here():
    assert CARDS.keys() == {f"NVIDIA GeForce RTX {name}" for name in GEFORCE} | DATACENTER.keys()


@pytest.mark.parametrize("name", GEFORCE)
def test_geforce_figures_follow_from_units_clock_and_bus(name):
    sms, mhz, bits, gbit = GEFORCE[name]
    card = CARDS[f"NVIDIA GeForce RTX {name}"]
    assert card.tflops == pytest.approx(sms * 512 * mhz / 1e6, rel=0.005)
    assert card.fp32_tflops == pytest.approx(sms * 256 * mhz / 1e6, rel=0.005)
    assert card.bandwidth_gbs == pytest.approx(bits / 8 * gbit, rel=0.002)


@pytest.mark.parametrize("name", DATACENTER)
def test_datacenter_figures_are_the_datasheets(name):
    card = CARDS[name]
    sparse, bandwidth, memory, fp32 = DATACENTER[name]
    assert card.tflops == pytest.approx(sparse / 2, rel=0.002)
    assert card.bandwidth_gbs == pytest.approx(bandwidth, rel=0.02)
    assert card.vram_gb == memory
    assert card.fp32_tflops == pytest.approx(fp32, rel=0.005)
