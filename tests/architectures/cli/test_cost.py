"""What networks cost: counted by hand for a small one, the paper's table for FIAS, and the command that says it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from trifuse.architectures.cli.cost import count_costs, format_costs, network_costs
from trifuse.architectures.cli.main import main
from trifuse.architectures.fias import fias
from trifuse.blocks import MemoryEfficientAttention

WITHOUT_ATTENTION = {"full": 18.73, "four classes": 18.73, "no DMK": 17.69, "sum": 17.37, "plain": 18.05}
WITH_ATTENTION = {"full": 24.25, "four classes": 24.25, "no DMK": 23.21, "sum": 22.89, "plain": 18.05}
OPTIONS = {
    "full": {},
    "four classes": {"num_classes": 4},
    "no DMK": {"no_dmk": "dup"},
    "sum": {"fusion": "sum"},
    "plain": {"mixatt": False},
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.tail = nn.ModuleList([MemoryEfficientAttention(8, 2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail[0](self.conv(x).flatten(2).transpose(1, 2))


def test_a_network_counted_by_hand():
    with torch.device("meta"):
        model = Small()
    costs = {cost.part: cost for cost in network_costs(model, (1, 3, 4, 5))}
    pixels = 4 * 5
    conv = 2 * pixels * 3 * 8 * 9
    attention = 2 * 2 * pixels**2 * 8
    linear = 2 * pixels * (8 * 24 + 8 * 8)
    assert costs["conv"].gflops * 1e9 == pytest.approx(conv)
    assert costs["tail"].gflops * 1e9 == pytest.approx(linear + attention)
    assert costs["tail"].attention_gflops * 1e9 == pytest.approx(attention)
    assert costs["all"].gflops * 1e9 == pytest.approx(conv + linear + attention)
    assert [costs[part].parameters for part in ("conv", "tail", "all")] == [224, 288, 512]


@pytest.mark.parametrize("variant", OPTIONS)
def test_gflops_of_the_paper_s_table(variant):
    """Within 1 %: with the decoder's attention over pixels, and without."""
    with torch.device("meta"):
        model = fias(**OPTIONS[variant])
    costs = {cost.part: cost for cost in network_costs(model, (1, 1, 256, 256))}
    assert costs["all"].gflops == pytest.approx(WITH_ATTENTION[variant], rel=0.01)
    without = costs["all"].gflops - costs["decoder"].attention_gflops
    assert without == pytest.approx(WITHOUT_ATTENTION[variant], rel=0.01)
    parts = sum(cost.gflops for part, cost in costs.items() if part != "all")
    assert parts == pytest.approx(costs["all"].gflops, rel=1e-6)


def test_decoder_attention_is_the_analytic_number():
    costs = {cost["part"]: cost for cost in count_costs("fias")["costs"]}
    analytic = sum(4 * tokens**2 * dim for tokens, dim in ((64, 576), (256, 288), (1024, 144), (4096, 72)))
    assert costs["decoder"]["attention_gflops"] * 1e9 == pytest.approx(analytic)
    assert costs["all"]["parameters"] == 45_071_917


def test_dino_unet_is_described_too():
    text = format_costs(count_costs("dino_unet"))
    assert "dino_unet, one image of 3 x 448 x 448" in text
    assert "1,136,480,768" in text


def test_the_doctor_says_it(capsys):
    assert main(["doctor", "--model", "fias"]) == 0
    assert "45,071,917" in capsys.readouterr().out
    assert main(["doctor", "--model", "fias", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"] == "fias"
