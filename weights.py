"""Exact exchange of encoder weights with timm, Hugging Face, torchvision and Microsoft's Swin; files of these and other kinds, read.

    python weights.py to-timm runs/x/last.pt encoder.pt              also to-torchvision, to-microsoft: a Swin's
    python weights.py to-huggingface runs/x/last.pt folder           a folder for from_pretrained: a Swin's or a ViT's
    python weights.py from-microsoft swin_tiny.pth encoder.pt        also from-timm, from-torchvision, from-openmmlab, from-huggingface

The names stand in layouts.py. Buffers that follow from the window and the map (position index, attention mask) are dropped on
the way in, and written where the peer wants them.
"""

import json
import math
import os
import re
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import RectBivariateSpline

import encoders
from encoders import MODELS, Encoder
from encoders.layouts import ANCHORS, CALLED, TWINS, VIT, family_of, first_few, has_head, optional, recognise
from encoders.vit import ViT, resize_positions
from engine import flags
from engine.checkpoints import FORMATS, check_kind, load_tensors, save_tensors
from engine.dist import run_main
from engine.errors import UserError, warn
from engine.files import check_output, write_atomically
from images.crops import format_size, to_2tuple
from images.formats import PixelFormat
from plan import window_numbers
from swin import Swin

# ------------------------------------------------------------------------------------------------- derived buffers

PROGRAMS = {"pretrain": "train.py", "finetune": "finetune.py", "segment": "segment.py"}  # by kind of checkpoint


def position_index(window: int) -> torch.Tensor:
    """(window^2, window^2): row of the position table for each pair, query first (Liu et al. 2021, Eq. 4)."""
    token, span = torch.arange(window * window), 2 * window - 1
    place = token // window * span + token % window
    return place[:, None] - place + (window - 1) * (span + 1)


def attention_mask(height: int, width: int, window: int) -> torch.Tensor:
    """(windows, window^2, window^2): 0 where two tokens of a cyclically shifted map share a window, else -100."""
    number = torch.from_numpy(window_numbers(np.arange(height * width), height, width, window, True)).view(
        height, width
    )
    number = rearrange(number.roll((-(window // 2),) * 2, (0, 1)), "(i p) (j q) -> (i j) (p q)", p=window, q=window)
    return torch.where(number[:, :, None] == number[:, None, :], 0.0, -100.0)


# ------------------------------------------------------------------------------------------------- to and from other libraries


def from_layout(state: dict, layout: str) -> dict:
    """A state dict of a layout in our names, whatever the family. UserError for another layout, and for a key too many or too few."""
    family, _ = recognise(state)
    if layout not in family.places:
        raise UserError(f"{CALLED[layout]} holds no {family.title} that is read here")
    return family.to_ours(state, layout)


from_torchvision = partial(
    from_layout, layout="torchvision"
)  # swin_t, swin_s, swin_b, any SwinTransformer of its first version
from_timm = partial(from_layout, layout="timm")  # 0.9 or later; older files of Swin are in Microsoft's layout
from_microsoft = partial(from_layout, layout="microsoft")  # what stands under "model" in the files of the original Swin
from_huggingface = partial(from_layout, layout="huggingface")  # what a model.safetensors of SwinModel or ViTModel holds


def check_shapes(state: dict, encoder: Encoder):
    """UserError for a key too many or too few, and for a tensor of another shape than the encoder's own. A classifier may be there."""
    family = family_of(encoder.state_dict())
    other = family_of(state)
    if family is not other:
        raise UserError(f"the file holds a {other.title}; the model is a {family.title}")
    family.check_keys(state, "encoder")
    norm = "fc_norm." if "fc_norm.weight" in state else "norm."
    expected = {
        norm + key.removeprefix("norm.") if key.startswith("norm.") else key: tuple(value.shape)
        for key, value in encoder.state_dict().items()
    }
    if has_head(state):
        classes = state["head.bias"].numel()
        expected |= {"head.weight": (classes, encoder.width), "head.bias": (classes,)}
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = {
        key: f"{key} {found.get(key, 'missing')} where {expected.get(key, 'nothing')} is expected"
        for key in expected | found
        if found.get(key) != expected.get(key)
    }
    if wrong:
        hint = ""
        if all(key == "positions" or key.endswith("table") for key in wrong):
            hint = (
                ": the weights are of another image size or window; give the image size of the encoder (--image-size)"
            )
        raise UserError(f"the tensors do not fit {family.describe(encoder)}: {first_few(wrong.values())}{hint}")


def check_computes_the_same(encoder: Encoder, layout: str):
    """UserError where a library would compute something else with an encoder's weights."""
    if isinstance(encoder, ViT):
        return
    swin = isinstance(encoder, Swin)
    if swin and not (encoder.shift and encoder.positions is None):
        raise UserError(
            f"{CALLED[layout]} holds no Swin without shifted windows or with positions, such as mixmim_base: there its weights would compute something else"
        )
    if layout in ("torchvision", "huggingface") and len(set(encoder.windows)) > 1:
        raise UserError(
            {
                "torchvision": f"torchvision cannot hold windows of {encoder.windows} tokens: it pads small maps, where ours and "
                "Microsoft's code shrink the window and its position table",
                "huggingface": f"Hugging Face cannot hold windows of {encoder.windows} tokens: its position tables are all of one size",
            }[layout]
        )
    for i, (window, (height, width)) in enumerate(zip(encoder.windows, map_sides(encoder))):
        size, sides = format_size(encoder.image_size), format_size((height, width))
        if height % window or width % window:
            raise UserError(
                f"windows of {window} tokens do not divide the map of {sides} that stage {i} has at {size} px; our border windows are smaller "
                "there, those of other libraries padded or shrunken: give the image size of the encoder (--image-size)"
            )
        if (
            swin
            and layout in ("microsoft", "huggingface")
            and min(height, width) == window < max(height, width)
            and encoder.depths[i] > 1
        ):
            raise UserError(
                f"stage {i} has a map of {sides} tokens at {size} px, whose windows of {window} are shifted along the longer side only; there "
                "this library does not shift at all"
            )


def map_sides(encoder: Encoder) -> list[tuple[int, int]]:
    """Height and width in tokens of each stage's map, of a Swin or a Twins."""
    return [
        tuple(side // encoder.embed.patch // 2**i for side in encoder.image_size) for i in range(len(encoder.depths))
    ]


def to_layout(state: dict, encoder: Encoder, layout: str) -> dict:
    """A state dict in our names, of an encoder and perhaps its classifier, in a layout: for a strict load into the library's model.

    encoder: whose weights they are, built for the image size of the model that will load them. It may be on the meta device. Microsoft's layout has
    position indices and attention masks, torchvision's position indices; timm keeps neither since 0.9. UserError for tensors that are
    not the encoder's, and where the library has no such encoder or would compute something else.
    """
    family = family_of(encoder.state_dict())
    if layout not in family.places:
        raise UserError(
            f"{CALLED[layout]} holds no {family.title}; its layouts: {', '.join(name for name in family.places if name in EXPORTS)}"
        )
    check_shapes(state, encoder)
    check_computes_the_same(encoder, layout)
    out = family.to_theirs(state, layout, encoder)
    if layout in ("torchvision", "microsoft"):
        index = {
            key.replace("bias_table", "index"): position_index((math.isqrt(len(table)) + 1) // 2)
            for key, table in out.items()
            if key.endswith("relative_position_bias_table")
        }
        out |= index if layout == "microsoft" else {key: value.flatten() for key, value in index.items()}
    if layout == "microsoft":
        out |= {
            f"layers.{i}.blocks.{j}.attn_mask": attention_mask(*sides, window)
            for i, (sides, window, depth) in enumerate(zip(map_sides(encoder), encoder.windows, encoder.depths))
            for j in range(1, depth, 2)
            if 1 < window < min(sides)
        }
    return out


EXPORTS = {layout: partial(to_layout, layout=layout) for layout in ("torchvision", "timm", "microsoft", "huggingface")}
to_torchvision, to_timm, to_microsoft, to_huggingface = EXPORTS.values()


# ------------------------------------------------------------------------------------------------- into a model


def resize_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """A position table ((2w - 1)^2, heads) for another window: bicubic over the grid of offsets, each head by itself."""
    old = math.isqrt(len(table))
    grid = rearrange(table.float(), "(r c) h -> 1 h r c", r=old)
    grid = F.interpolate(grid, size=(2 * window - 1, 2 * window - 1), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 h r c -> (r c) h").to(table.dtype)


def resize_table_geometric(table: torch.Tensor, window: int) -> torch.Tensor:
    """A position table ((2w - 1)^2, heads) for a larger window, as SimMIM fine-tunes (Xie et al. 2022): the old offsets 0, 1, 2, ... are placed at
    0, 1, 1 + q, 1 + q + q^2, ..., with q such that the last one is the new last offset, and a cubic spline goes through them. Near offsets, which
    matter most, keep their values; bicubic interpolation stretches all alike. A smaller window is interpolated bicubically."""
    old, last = math.isqrt(len(table)) // 2, window - 1
    if last <= old or old < 3:  # a cubic spline needs four points
        return resize_table(table, window)
    places = lambda q: np.cumsum(q ** np.arange(old))
    low, high = 1.01, 1.5  # SimMIM's bounds and precision, to which its values are sensitive
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (q, high) if places(q)[-1] < last else (low, q)
    known = np.concatenate([-places(q)[::-1], [0], places(q)])
    wanted = np.arange(-last, last + 1)
    grids = rearrange(table.double().cpu().numpy(), "(r c) h -> h r c", r=2 * old + 1)
    out = np.stack([RectBivariateSpline(known, known, grid)(wanted, wanted) for grid in grids])
    return rearrange(torch.from_numpy(out), "h r c -> (r c) h").to(table)


def to_channels(weight: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """A patch embedding (k, old * p * p) for images of other channels, (k, new * p * p), by timm's rule: one channel takes the sum over
    the old ones, n take them in turns, times old / n, so that alike channels give what they gave."""
    weight = rearrange(weight, "k (c p) -> k c p", c=old)
    weight = weight.sum(1, keepdim=True) if new == 1 else weight[:, torch.arange(new) % old] * (old / new)
    return rearrange(weight, "k c p -> k (c p)")


def source_channels(weight: torch.Tensor, encoder: Encoder, channels: int | None) -> int:
    """Channels of the images that a patch embedding (k, channels * patch^2) is for. channels: if known; else the encoder's own, or 3, or what the patch leaves."""
    values, patch = weight.shape[-1], encoder.embed.patch
    if channels is None and weight.shape[-1] == encoder.channels * patch**2:
        return encoder.channels
    channels = channels or (3 if math.isqrt(values // 3) ** 2 * 3 == values else values // patch**2)
    if channels * patch**2 != values:
        raise UserError(
            f"the patch embedding of the file has {values} values, which are not {channels} channels of the model's patch of {patch} x {patch}"
        )
    return channels


def source_map(count: int, encoder: Encoder, image_size: tuple | None) -> tuple[int, int]:
    """Rows and columns of the map that `count` positions of a ViT are for. image_size: of the file, if known. Else the encoder's own map if it has as many
    patches, a square, or a map of the encoder's shape. UserError for any other."""
    own = encoder.rows, encoder.columns
    if image_size:
        rows, columns = (side // encoder.unit for side in image_size)
    elif count == encoder.units:
        rows, columns = own
        if rows != columns and math.isqrt(count) ** 2 == count:
            warn(
                f"the file does not say which image size its {count} positions are for; they are taken to be those of a map of {rows} x {columns} patches, as the model has it"
            )
    else:
        rows = math.isqrt(count) if math.isqrt(count) ** 2 == count else round(math.sqrt(count * own[0] / own[1]))
        columns = count // max(rows, 1)
    if rows * columns != count:
        raise UserError(
            f"the file has positions of {count} patches and does not say for which image size; give that size (--image-size)"
        )
    return rows, columns


@torch.no_grad()
def load_into(
    state: dict, encoder: Encoder, channels: int | None = None, image_size: tuple | None = None, geometric: bool = False
) -> str:
    """Load a state dict in our names into an encoder of its kind, of any image size, window and number of channels; returns one line that
    says what was done.

    A Swin's position tables of another window and a ViT's positions of another map are interpolated, a patch embedding of other channels
    is adapted (`to_channels`), a classifier in `state` is left out. geometric: interpolate tables as SimMIM does (`resize_table_geometric`), not as
    Microsoft's code does (`resize_table`). channels, image_size: of what `state` was trained on, if they are known; see `source_channels` and
    `source_map`. UserError for another family, and for tensors that do not fit the encoder.
    """
    own, family = encoder.state_dict(), family_of(encoder.state_dict())
    if family is family_of(state):
        family.check_keys(state, "encoder")
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    changes = []
    if "fc_norm.weight" in state:
        state = {key: value for key, value in state.items() if not key.startswith("fc_norm.")} | {
            key: own[key] for key in ("norm.weight", "norm.bias") if key in own
        }
        changes.append("the final norm is initialised, because the file has a norm of the mean token in its place")
    resized, windows = 0, {}
    for key, table in own.items():
        old = state.get(key)
        if (
            key.endswith(".table")
            and old is not None
            and old.ndim == 2
            and len(old) != len(table)
            and math.isqrt(len(old)) ** 2 == len(old)
        ):
            before, after = ((math.isqrt(len(values)) + 1) // 2 for values in (old, table))
            state[key] = (resize_table_geometric if geometric else resize_table)(old, after)
            resized, windows[f"{before} to {after}"] = resized + 1, None
    if resized:
        changes.append(f"interpolated {resized} relative position bias tables (window {', '.join(windows)})")
    if family is VIT and getattr(state.get("positions"), "ndim", 0) == 2:
        here, there = source_map(len(state["positions"]), encoder, image_size), (encoder.rows, encoder.columns)
        if here != there:
            state["positions"] = resize_positions(state["positions"], here[0], *there)
            changes.append(f"interpolated the position embedding ({here[0]} x {here[1]} to {there[0]} x {there[1]})")
    embed, new = state.get("embed.proj.weight"), encoder.channels
    if embed is not None and embed.ndim == 2 and len(embed) == encoder.stem_width:
        old = source_channels(embed, encoder, channels)
        if old != new:
            state["embed.proj.weight"] = to_channels(embed, old, new)
            changes.append(
                f"adapted the patch embedding from {old} to {new} channels ({'their sum' if new == 1 else f'repeated, times {old} / {new}'})"
            )
    check_shapes(state, encoder)
    encoder.load_state_dict(state)
    return "; ".join([f"loaded all {len(state)} tensors of the encoder", *changes])


def load(path, encoder: Encoder, geometric: bool = False) -> str:
    """`load_into` of what a file of weights holds; the line begins with the file and its layout."""
    state, layout, config = open_weights(path)
    try:
        return f"{path} ({layout}): {load_into(state, encoder, **config_hints(config), geometric=geometric)}"
    except UserError as error:
        name = model_of(state, config)
        raise UserError(f"{path}: " + (f"holds {name}; " if name else "") + str(error)) from None


# ------------------------------------------------------------------------------------------------- files

WRAPPERS = ("teacher", "model", "state_dict")  # what a file's dict may hold the state dict under
PREFIXES = (
    "module",
    "_orig_mod",
    "model",
    "backbone",
    "encoder",
)  # what other programs call the network that holds the encoder


def unwrapped(file: dict) -> dict:
    """The state dict in a file's dict, without what data parallelism, torch.compile, Lightning, SimMIM, MoBY or OpenMMLab put before its keys.

    What stands beside the encoder there (decoders, projectors, momentum encoders, a mask token) is passed over.
    """
    for key in WRAPPERS:
        file = file[key] if isinstance(file.get(key), dict) else file
    state = {str(key).replace("_orig_mod.", ""): value for key, value in file.items()}
    prefixes = {
        key.removesuffix(anchor) for key in state for anchor in ANCHORS if key == anchor or key.endswith("." + anchor)
    }
    known = sorted((prefix for prefix in prefixes if set(prefix.split(".")[:-1]) <= set(PREFIXES)), key=len)
    if known and known[0]:
        state = {key.removeprefix(known[0]): value for key, value in state.items() if key.startswith(known[0])}
        state.pop("mask_token", None)
    if "cls_token" in state:  # MAE's file holds its decoder too
        state = {key: value for key, value in state.items() if not key.startswith("decoder_") and key != "mask_token"}
    if "embeddings.patch_embeddings.projection.weight" in state:  # Hugging Face's encoder without a head
        state = {("vit." if "embeddings.cls_token" in state else "swin.") + key: value for key, value in state.items()}
    if any(
        key.endswith(".embeddings.patch_embeddings.projection.weight") for key in state
    ):  # its SimMIM and MAE hold more
        state = {
            key: value
            for key, value in state.items()
            if not key.startswith("decoder.") and not key.endswith("embeddings.mask_token")
        }
    if "patch_embed.projection.weight" in state:  # a norm for each stage that is put out; the last is Swin's own
        last = max((key.split(".")[0] for key in state if re.match(r"norm\d\.", key)), default="norm")
        state = {
            key.replace(last + ".", "norm.", 1) if key.startswith(last) else key: value
            for key, value in state.items()
            if not re.match(r"norm\d\.", key) or key.startswith(last)
        }
    return state


def config_hints(config: dict) -> dict:
    """What a checkpoint's config says of its encoder that the weights do not tell: channels and image size of its images."""
    given = config.get("arguments", {})
    size = given.get("image_size")
    return dict(channels=given.get("channels") or 3 if config else None, image_size=to_2tuple(size) if size else None)


def read_state(file: dict) -> tuple[dict, str, dict]:
    """(state dict in our names, classifier included; layout name; a checkpoint's config, else {}) of what a file holds."""
    layout, config = file.get("kind"), {}
    if layout in PROGRAMS:
        model = file["model"]
        if "ema" in file:  # what `finetune.py --eval` measures; torch keeps it as a wrapped module
            model = {key.removeprefix("module."): value for key, value in file["ema"].items()}
        kept = (
            ("encoder.", "head.", "fc_norm.") if layout == "finetune" else "encoder."
        )  # other heads predict pixels, or classes of each
        state, config = (
            {key.removeprefix("encoder."): value for key, value in model.items() if key.startswith(kept)},
            file["config"],
        )
    else:
        state = unwrapped(file)
        family, layout = recognise(state)
        if layout != "encoder":
            return family.to_ours(state, layout), layout, {}
    family_of(state).check_keys(state, "encoder")
    return state, layout, config


def open_weights(path) -> tuple[dict, str, dict]:
    """`read_state` of a file, which is read once as long as it is the same; errors name the path. A folder: Hugging Face's model.safetensors, with the
    image size and the channels of its config.json."""
    folder, path = (
        Path(path),
        Path(path) / "model.safetensors" if (Path(path) / "model.safetensors").is_file() else path,
    )
    try:
        state, layout, config = _unpacked(str(path), os.path.getmtime(path) if os.path.exists(path) else 0.0)
        if path != folder and (folder / "config.json").is_file():
            try:
                given = json.loads((folder / "config.json").read_text())
                config = {"arguments": {"image_size": given.get("image_size"), "channels": given.get("num_channels")}}
            except (ValueError, AttributeError):
                raise UserError(
                    f"{folder / 'config.json'}: is not Hugging Face's; delete it to read the weights alone"
                ) from None
        return state, layout, config
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


@lru_cache(maxsize=1)
def _unpacked(path: str, written: float) -> tuple[dict, str, dict]:
    file = load_tensors(path)
    return read_state(check_kind(file, path, file["kind"]) if file.get("kind") in PROGRAMS else file)


def model_of(state: dict, config: dict) -> str | None:
    """The name of the model in MODELS whose weights they are: a run says it, else it has the same shapes, whatever its window, map and channels."""

    def shapes(state):
        return {
            key.replace("fc_norm.", "norm."): value.shape
            for key, value in state.items()
            if not key.startswith("head.")
            and not key.endswith("table")
            and key not in ("positions", "embed.proj.weight")
        }

    name = config.get("arguments", {}).get("model")  # mixmim_base has the shapes of swin_base
    if name in MODELS:
        return name
    here = shapes(state)
    for name, make in MODELS.items():
        with torch.device("meta"):
            encoder = make()
        if here == shapes(encoder.state_dict()):
            return name
    return None


def model_in(path) -> str:
    """The name of the model whose weights a file holds. UserError if there is none."""
    state, _, config = open_weights(path)
    name = model_of(state, config)
    if name is None:
        raise UserError(f"{path}: holds none of {', '.join(MODELS)}; name the one it should start with --model")
    return name


def encoder_of(path, image_size=None) -> Encoder:
    """The encoder whose weights a file holds, on the meta device. image_size: in place of its run's, or where none is known of 224 px, and of a ViT of a
    square. UserError for weights of none of MODELS: a new encoder needs its name there."""
    state, _, config = open_weights(path)
    name, given = model_in(path), config.get("arguments", {})
    with torch.device("meta"):
        plain = MODELS[name]()
        size = image_size or given.get("image_size") or 224
        if "positions" in state and not image_size and not given.get("image_size"):
            side = math.isqrt(len(state["positions"]))
            if side * side != len(state["positions"]):
                raise UserError(
                    f"{path}: has positions of {len(state['positions'])} patches and does not say for which image size; give that size (--image-size)"
                )
            size = side * plain.unit
        tables = [(math.isqrt(len(value)) + 1) // 2 for key, value in state.items() if key.endswith(".table")]
        channels = source_channels(state["embed.proj.weight"], plain, given.get("channels"))
        return encoders.make(
            name, image_size=size, window=max(tables, default=given.get("window") or 7), channels=channels
        )


def read(path) -> tuple[dict, dict | None, str]:
    """(encoder's state dict in our names, {"head.weight", "head.bias"} or None, layout name) of any file of weights.

    Layout names: pretrain, finetune (checkpoints), encoder (ours), torchvision, timm, microsoft. UserError, with the
    path, for a file that is none of these, is damaged, or holds pickled objects besides tensors.
    """
    state, layout, _ = open_weights(path)
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    return {key: value for key, value in state.items() if key not in head}, head or None, layout


def peers_model(layout: str, encoder: Encoder, classes: int, fc_norm: bool = False) -> tuple[str, str, list, dict]:
    """A library's model like an encoder: its module and class, and what the class is called with."""
    family, sides = family_of(encoder.state_dict()), encoder.image_size
    shape = family.settings(encoder)
    patch = shape["patch"]
    first = dict(img_size=sides[0] if sides[0] == sides[1] else sides, patch_size=patch) | (
        dict(in_chans=shape["channels"]) if shape["channels"] != 3 else {}
    )
    if layout == "torchvision":
        return (
            "torchvision.models.swin_transformer",
            "SwinTransformer",
            [[patch, patch], shape["width"], list(shape["depths"]), list(shape["heads"]), [max(shape["windows"])] * 2],
            dict(num_classes=classes) if classes else {},
        )
    if family is VIT:
        return (
            "timm.models.vision_transformer",
            "VisionTransformer",
            [],
            first
            | dict(
                embed_dim=shape["width"],
                depth=shape["depth"],
                num_heads=shape["heads"],
                global_pool="avg",
                fc_norm=fc_norm,
                num_classes=classes,
            ),
        )
    if family is TWINS:
        stages = range(len(shape["depths"]))
        widths = [shape["width"] * 2**i for i in stages]
        return (
            "timm.models.twins",
            "Twins",
            [],
            first
            | dict(
                embed_dims=widths,
                num_heads=[width // 32 for width in widths],
                mlp_ratios=[4 for _ in stages],
                depths=list(shape["depths"]),
                sr_ratios=[2**i for i in reversed(stages)],
                wss=list(encoder.windows),
                num_classes=classes,
            ),
        )
    return (
        {"timm": "timm.models.swin_transformer", "microsoft": "models.swin_transformer"}[layout],
        "SwinTransformer",
        [],
        first
        | dict(
            window_size=max(shape["windows"]),
            embed_dim=shape["width"],
            depths=shape["depths"],
            num_heads=shape["heads"],
            num_classes=classes,
        ),
    )


def loading_code(layout: str, path: Path, encoder: Encoder, classes: int, fc_norm: bool) -> str:
    """A line of Python that makes a library's model and loads an exported file, every key."""
    family = family_of(encoder.state_dict())
    shape = family.settings(encoder)
    if layout == "huggingface":
        model, more = (
            ("ViTModel", ", add_pooling_layer=False")
            if family is VIT
            else ("SwinForImageClassification", "")
            if classes
            else ("SwinModel", "")
        )
        return f"from transformers import {model}; model = {model}.from_pretrained({str(path)!r}{more})"
    read, load = (
        ("safetensors.torch", f"safetensors.torch.load_file({str(path)!r})")
        if path.suffix == ".safetensors"
        else ("torch", f"torch.load({str(path)!r}, weights_only=True)" + ("['model']" if layout == "microsoft" else ""))
    )
    if layout == "torchvision" and read != "torch":
        read = f"torch, {read}"
    module, name, values, settings = peers_model(layout, encoder, classes, fc_norm)
    words = ", ".join([*map(repr, values), *(f"{key}={value!r}" for key, value in settings.items())])
    bare = "; model.head = torch.nn.Identity()" if layout == "torchvision" and not classes else ""
    if layout == "torchvision" and shape["channels"] != 3:
        bare += "; model.features[0][0] = torch.nn.Conv2d({channels}, {width}, {patch}, {patch})".format_map(shape)
    return f"import {read}; from {module} import {name}; model = {name}({words}){bare}; model.load_state_dict({load})"


def huggingface_config(encoder: Encoder, classes: list[str]) -> dict:
    """What config.json says of an encoder, and of its classifier if it has classes."""
    family, sides = family_of(encoder.state_dict()), encoder.image_size
    shape = family.settings(encoder)
    config = dict(
        image_size=sides[0] if sides[0] == sides[1] else sides,
        patch_size=shape["patch"],
        num_channels=shape["channels"],
        hidden_act="gelu",
        qkv_bias=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    if family is VIT:
        return config | dict(
            model_type="vit",
            architectures=["ViTModel"],
            hidden_size=shape["width"],
            num_hidden_layers=shape["depth"],
            num_attention_heads=shape["heads"],
            intermediate_size=4 * shape["width"],
            layer_norm_eps=1e-6,
        )
    config |= dict(
        model_type="swin",
        architectures=["SwinForImageClassification" if classes else "SwinModel"],
        embed_dim=shape["width"],
        depths=shape["depths"],
        num_heads=shape["heads"],
        window_size=shape["windows"][0],
        mlp_ratio=4.0,
        layer_norm_eps=1e-5,
        drop_path_rate=0.0,
        use_absolute_embeddings=False,
    )
    return config | (
        dict(id2label=dict(enumerate(classes)), label2id={name: k for k, name in enumerate(classes)}) if classes else {}
    )


def save_folder(folder: Path, config: dict, state: dict, form: PixelFormat):
    """config.json, preprocessor_config.json and model.safetensors in a new or empty folder, as from_pretrained reads them. UserError for any other."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something already, which was left as it is; give a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{str(folder)!r}: there is no folder {folder.parent}")
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    height, width = to_2tuple(config["image_size"])
    prepared = dict(
        do_resize=True,
        size=dict(height=height, width=width),
        resample=3,
        do_normalize=True,
        image_mean=form.mean,
        image_std=form.std,
    )
    for name, values in (("config.json", config), ("preprocessor_config.json", prepared | {"pixels": form.to_dict()})):
        write_atomically(folder / name, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def save_file(target: Path, state: dict, form: PixelFormat, wrapped: bool):
    """A file of weights, with the format of pixels that they were trained on: in a .safetensors file's metadata, else in a file beside it."""
    save_tensors(target, {"model": state} if wrapped else state, {"format": "pt", "pixels": json.dumps(form.to_dict())})
    if target.suffix != ".safetensors" and not form.is_rgb8:
        write_atomically(
            target.with_name(target.name + ".pixels.json"),
            lambda file: file.write((json.dumps(form.to_dict(), indent=1) + "\n").encode()),
        )


def main(argv=None):
    parser = flags.Parser(
        description="Exchange encoder weights with timm, Hugging Face, torchvision and Microsoft's Swin."
    )
    parser.add_argument(
        "command",
        choices=[*(f"to-{layout}" for layout in EXPORTS), *(f"from-{layout}" for layout in (*EXPORTS, "openmmlab"))],
    )
    parser.add_argument(
        "source", help="to: any file of weights or checkpoint; from: one in that layout, or Hugging Face's folder"
    )
    parser.add_argument("target", help="the file to write, as its suffix says; of to-huggingface a folder")
    parser.add_argument(
        "--image-size",
        type=flags.image_size,
        metavar="PX",
        help="of the model that will load it, 224 or 224x160 (height x width); default: a checkpoint's own, else 224",
    )
    args = parser.parse_args(argv)
    way, layout = args.command.split("-")
    folder = way == "to" and layout == "huggingface"
    target = Path(args.target) if folder else check_output(args.target, FORMATS)
    if target.resolve() == Path(args.source).resolve():
        raise UserError(f"{args.target}: would overwrite the file that is read")

    state, holds, trained = open_weights(args.source)
    if way == "from" and holds != layout:
        raise UserError(f"{args.source}: holds {CALLED[holds]}, not {CALLED[layout]}")
    encoder = encoder_of(args.source, args.image_size)
    classes, parts = len(state["head.bias"]) if has_head(state) else 0, optional(state)
    if way == "to":
        state = EXPORTS[layout](state, encoder)
    else:
        check_shapes(state, encoder)
    form = PixelFormat.of(trained.get("pixels", {}))
    if folder:
        config = huggingface_config(
            encoder, trained.get("classes") or [f"class {k}" for k in range(classes)] if classes else []
        )
        save_folder(target, config, state, form)
    else:
        save_file(
            target, state, form, way == "to" and layout == "microsoft" and target.suffix != ".safetensors"
        )  # which holds nothing but tensors
    print(f"wrote {args.target}: {len(state)} tensors of {family_of(encoder.state_dict()).describe(encoder)}")
    if way == "to":
        print(f"load it: {loading_code(layout, target, encoder, classes, 'fc_norm' in parts)}")
        if not form.is_rgb8:
            ends = (
                f"{form.low} to {form.high}"
                if form.low
                else form.value_range
                if isinstance(form.value_range, str)
                else "{:g} to {:g}".format(*form.value_range)
            )
            print(f"its images: {form.channels} channels, values {ends} as 0 to 1, minus {form.mean}, over {form.std}")
    return 0


if __name__ == "__main__":
    run_main(main)
