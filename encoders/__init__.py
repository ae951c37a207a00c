"""The encoders by name: what everything above knows of them. Their contract is `backbone.Encoder`.

    encoder = make("swin_base", image_size=224, window=7, drop_path=0.1)

A new encoder is a subclass of `Encoder`, or a module that keeps its contract, in a file of its own, with its name in
MODELS.
"""

import swin
from backbone import Encoder, sincos_positions  # noqa: F401  the decoder has such positions too
from encoders import twins, vit
from engine.errors import UserError
from engine.flags import Parser, number, positive_int

MODELS = swin.MODELS | vit.MODELS | twins.MODELS


def make(name: str, checkpointing: bool = False, **settings) -> Encoder:
    """Build an encoder.

    Args:
        name: A name in MODELS.
        checkpointing: Whether blocks are recomputed in the backward pass.
        settings: Arguments of the constructor that override those of the model.

    Raises:
        UserError: For an unknown name, or settings that the constructor refuses.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: unknown; choose from {', '.join(MODELS)}")
    try:
        encoder = MODELS[name](**settings)
    except ValueError as error:
        raise UserError(str(error)) from None
    encoder.checkpointing = checkpointing
    return encoder


def add_flags(parser: Parser):
    """Add the flags of every program that builds an encoder."""
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
