"""The contract of an encoder, and the encoders there are: what everything above knows of them.

    encoder = make("swin_base", image_size=224, window=7, drop_path=0.1)

A new one: a module that keeps the contract, in a file of its own, and its names in MODELS.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

import swin
from backbone import sincos_positions  # noqa: F401  the decoder's positions too
from encoders import twins, vit
from engine.errors import UserError
from engine.flags import Parser, number, positive_int

MODELS = swin.MODELS | vit.MODELS | twins.MODELS


class Encoder(Protocol):
    """What a model, a training program and the figures may ask of an encoder, which is also an nn.Module.

    Called with images (b, channels, h, w), normalised, it returns final tokens (b, units encoded, width) in raster order.
    visible: None, all units; else a bool mask (units,) or a plan. With a mask_token (stem_width,), which takes the place
    of hidden patches after the embedding, all units are encoded. ValueError for a mask with images of another size than image_size.
    """

    image_size: tuple[int, int]  # height and width in pixels that masks are for
    channels: int  # of an image
    unit: int  # pixels per side of what one final token stands for
    rows: int
    columns: int
    units: int  # rows * columns
    width: int  # of final tokens
    stem_width: int  # of tokens as they leave the patch embedding
    blocks: Iterable[nn.Module]  # in the order in which they compute; what activation checkpointing wraps
    checkpointing: bool  # set by a program: recompute each block in the backward pass
    undecayed: tuple[str, ...]  # endings of names that weight decay leaves alone, besides parameters of one axis
    # optional: `partitions` = True where `plan` takes partition=True, for all units, with attention inside visible and inside hidden
    # ones (MixMAE); `pyramid(images)`, feature maps of all stages

    def plan(self, visible: torch.Tensor, dense: bool = False) -> Any:
        """What follows from a mask (units,), on the CPU: a dataclass of tensors. `dense`: for use with a mask token.

        Its attribute `fits` is False where a mask needs other shapes than most of its size do. The result is right all the
        same, only slower where the network is compiled; see model.EESMM.draw. ValueError for what is no such mask.
        """

    def __call__(
        self, images: torch.Tensor, visible: Any = None, mask_token: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter, from 0 at the patch embedding upwards, for layer-wise learning rates."""


def make(name: str, checkpointing: bool = False, **settings) -> Encoder:
    """The encoder of a name in MODELS. settings: of its constructor, in place of its own. UserError where they do not do."""
    if name not in MODELS:
        raise UserError(f"--model {name}: unknown; choose from {', '.join(MODELS)}")
    try:
        encoder = MODELS[name](**settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    encoder.checkpointing = checkpointing
    return encoder


def add_flags(parser: Parser):
    """The flags of every program that makes an encoder."""
    *first, last = MODELS
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"{', '.join(first)} or {last}")
    group.add_argument(
        "--window", type=positive_int, help="attention window, tokens per side; a ViT has none, and ignores it"
    )
    group.add_argument(
        "--drop-path", type=number(float, 0, 0.99), help="stochastic depth of the last block, a probability"
    )
    group.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="recompute blocks in the backward pass: less memory, slower",
    )
