"""The table of datasheets, against figures that follow from units, clock and memory bus."""

import pytest

from gpt12.cards import CARDS


def test_the_figures_of_the_4070_ti_follow_from_units_clock_and_bus():
    """60 SMs at 2,610 MHz, 192 bits at 21 Gbit/s: NVIDIA's product page."""
    card = CARDS["NVIDIA GeForce RTX 4070 Ti"]
    assert card.tflops == pytest.approx(60 * 512 * 2610 / 1e6, rel=0.005)
    assert card.bandwidth_gbs == 192 / 8 * 21


def test_units_of_a_geforce_do_twice_as_much_in_bf16_as_in_float32():
    """With fp32 accumulation: GA102 whitepaper v2.1, table 3; Ada whitepaper v2.1, appendix A."""
    for name, card in CARDS.items():
        if "GeForce" in name:
            assert card.tflops == pytest.approx(2 * card.fp32_tflops, rel=0.005), name
