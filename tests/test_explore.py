"""explore: the slider redraws when it rests, once a value, and says what the audit says. No kernel, no browser."""

import asyncio

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch

from tnlib.audit import audit
from tnlib.explore import Explorer, bit_explorer, fit_explorer
from tnlib.low_rank import LowRank
from tnlib.quant import FakeQuantize, Quantize

mpl.use("Agg")


def draw(value):
    figure, _ = plt.subplots(figsize=(1, 1))
    return figure, f"value {value}"


def test_draws_at_once_without_a_loop_and_keeps_pictures():
    explorer = Explorer(draw, [1, 2, 3], "rank", start=1)
    assert bytes(explorer.picture.value).startswith(b"\x89PNG")
    explorer.slider.value = 3
    assert "value 3" in explorer.sentence.value
    explorer.slider.value = 1
    assert "value 1" in explorer.sentence.value
    assert explorer.draws == 2  # 1 was kept


def test_fast_changes_draw_once():
    async def drag():
        explorer = Explorer(draw, range(20), "rank", start=0, delay=0.02)
        for value in range(1, 9):
            explorer.slider.value = value
        assert explorer.draws == 1
        await asyncio.sleep(0.15)
        return explorer

    explorer = asyncio.run(drag())
    assert explorer.draws == 2
    assert "value 8" in explorer.sentence.value


def test_fit_explorer_agrees_with_the_audit():
    weight = torch.randn(32, 24)
    explorer = fit_explorer(weight, lambda r: LowRank(rank=r), [2, 6, 12], "rank", start=6)
    assert f"misses {audit(weight, LowRank(rank=6)).error:.3f} of the weight" in explorer.sentence.value
    table = explorer.table()
    assert table["rank"] == [2, 6, 12]
    assert torch.allclose(torch.tensor(table["error"]), torch.tensor(table["low-rank error"]), atol=1e-6)
    figure, _ = explorer.figure(12)
    assert len(figure.axes) == 3
    plt.close(figure)


def test_buttons_redraw_and_pictures_are_kept_for_each_position():
    explorer = Explorer(draw, [1, 2], "bits", start=1, choices={"scales": ["tensor", 64]})
    assert "value (1, 'tensor')" in explorer.sentence.value
    explorer.buttons[0].value = 64
    assert "value (1, 64)" in explorer.sentence.value
    explorer.buttons[0].value = "tensor"
    assert explorer.draws == 2


def test_bit_explorer_agrees_with_the_grid():
    tensor = torch.randn(16, 24)
    explorer = bit_explorer(tensor, bits=(2, 4), scales=("tensor", 64), starts=("max", "mse"))
    explorer.buttons[1].value = "mse"
    fake = FakeQuantize(tensor, Quantize(bits=4, start="mse"))
    error = float((fake(tensor).detach() - tensor).norm() / tensor.norm())
    assert f"{error:.3f} of the tensor is missed" in explorer.sentence.value
    assert explorer.table("tensor", "mse")["error"][1] == error
    figure, text = explorer.figure((2, 64, "max"))
    assert "2.50 bits a number" in text  # 384 numbers, 6 scales of 32 bits
    plt.close(figure)
