"""encoders.py: the contract, held by an encoder of twenty lines; and masks whose plans do not fit."""
from dataclasses import dataclass

import pytest
import torch
from einops import rearrange
from helpers import here, log, make_images
from torch import nn

import encoders
import finetune
import mixing
import train
from engine.errors import UserError
from model import EESMM


@dataclass
class ToyPlan:
    seen: torch.Tensor           # (v,) numbers of the units to encode
    hidden: torch.Tensor | None  # (v,) bool, units to take from the mask token
    fits: bool = True


class Toy(nn.Module):
    """A linear patch embedding and one linear layer: no attention."""
    unit, width, stem_width, undecayed, checkpointing = 8, 24, 24, (), False

    def __init__(self, image_size=32, window=1, drop_path=0.0):
        super().__init__()
        self.image_size, self.rows, self.columns = image_size, image_size // 8, image_size // 8
        self.units = self.rows * self.columns
        self.embed, self.blocks = nn.Linear(3 * 64, 24), nn.ModuleList([nn.Linear(24, 24)])

    def plan(self, visible, dense=False):
        return ToyPlan(torch.arange(self.units), ~visible) if dense else ToyPlan(visible.nonzero().flatten(), None)

    def forward(self, images, visible=None, mask_token=None):
        plan = visible if isinstance(visible, ToyPlan) else self.plan(torch.ones(self.units, dtype=torch.bool) if visible is None else visible)
        x = self.embed(rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=8, q=8).index_select(1, plan.seen))
        x = x if mask_token is None else torch.where(plan.hidden[:, None], mask_token, x)
        return self.blocks[0](x)

    def layer_of(self, name):
        return 0 if name.startswith("embed") else 1


class NeverFits(Toy):
    def plan(self, visible, dense=False):
        plan = super().plan(visible, dense)
        plan.fits = False
        return plan


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.setitem(encoders.MODELS, "toy", Toy)
    monkeypatch.setitem(encoders.MODELS, "never fits", NeverFits)
    make_images(tmp_path / "data")
    return ["--data", tmp_path / "data", "--image-size", 32, "--batch-size", 4, "--workers", 0, "--output", tmp_path / "out"]


PRETRAIN = ["--recipe", "cifar", "--base-lr", 1, "--warmup-epochs", 1, "--decoder-width", 32, "--epochs", 8, "--log-every", 5, "--eval-images", 4]


@pytest.mark.parametrize("method, flags", [("eesmm", ["--decomposition", "split", "--masks", "independent"]), ("greenmim", []),
                                           ("simmim", ["--compile", "--layer-decay", 0.9, "--activation-checkpointing"])])
def test_any_encoder_that_keeps_the_contract_trains(words, tmp_path, monkeypatch, method, flags):
    compiled = []
    monkeypatch.setattr(nn.Linear, "compile", lambda self, dynamic: compiled.append(self))
    here(train.main, *words, *PRETRAIN, "--model", "toy", "--method", method, *flags)
    losses = [row["loss"] for row in log(tmp_path / "out") if "loss" in row]
    assert losses[-1] < losses[0] and len(compiled) == (method == "simmim")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"last.pt", "reconstructions.png", "loss.png"}


def test_it_is_fine_tuned_too(words, tmp_path):
    here(finetune.main, *words, "--recipe", "micro", "--model", "toy", "--init", "scratch", "--epochs", 1)
    assert log(tmp_path / "out")[-1]["eval_top1"] >= 0


def test_an_unknown_encoder_is_refused():
    with pytest.raises(UserError, match="swin_huge: unknown; choose from swin_nano, "):
        encoders.make("swin_huge")


def test_masks_that_do_not_fit_are_drawn_again_unless_told_not_to():
    draws = [EESMM(NeverFits(), decoder_width=32, redraw=redraw).draw(torch.Generator().manual_seed(0)) for redraw in (True, False)]
    assert [masking.redrawn for masking in draws] == [9, 0]
    first = mixing.draw_masks(1, 16, 0.75, torch.Generator().manual_seed(0))
    assert torch.equal(draws[1].visible, first) and not torch.equal(draws[0].visible, first)


def test_a_run_says_once_that_most_masks_were_drawn_again(words, tmp_path, capsys):
    here(train.main, *words, *PRETRAIN, "--model", "never fits", "--max-steps", 12)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(warnings) == 1 and "90 of 100 masks" in warnings[0] and log(tmp_path / "out")[-2]["masks_redrawn"] == 108
