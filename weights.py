"""Exact exchange of encoder weights with timm, Hugging Face, torchvision and Microsoft's Swin; files of these and other kinds, read.

    python weights.py to-timm runs/x/last.pt encoder.pt              also to-torchvision, to-microsoft: a Swin's
    python weights.py to-huggingface runs/x/last.pt folder           a folder for from_pretrained: a Swin's or a ViT's
    python weights.py from-microsoft swin_tiny.pth encoder.pt        also from-timm, from-torchvision, from-openmmlab, from-huggingface

The names stand in layouts.py. Buffers that follow from the window and the map (position index, attention mask) are dropped on
the way in, and written where the peer wants them.
"""
import engine  # noqa: F401  first: from here on Ctrl-C ends in one line

# isort: split
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

from encoders import MODELS, Encoder
from engine import flags
from engine.checkpoints import FORMATS, PROGRAMS, check_output, check_run, load_tensors, save_tensors, write_whole
from engine.errors import UserError
from engine.formats import PixelFormat
from engine.images import both_sides, told
from engine.processes import program
from layouts import ANCHORS, CALLED, SWIN, TWINS, VIT, Family, family_of, has_head, recognise
from swin import window_numbers
from vit import resize_positions

# ------------------------------------------------------------------------------------------------- derived buffers

def position_index(window: int) -> torch.Tensor:
    """(window^2, window^2): row of the position table for each pair, query first (Liu et al. 2021, Eq. 4)."""
    token, span = torch.arange(window * window), 2 * window - 1
    place = token // window * span + token % window
    return place[:, None] - place + (window - 1) * (span + 1)


def attention_mask(height: int, width: int, window: int) -> torch.Tensor:
    """(windows, window^2, window^2): 0 where two tokens of a cyclically shifted map share a window, else -100."""
    number = torch.from_numpy(window_numbers(np.arange(height * width), height, width, window, True)).view(height, width)
    number = rearrange(number.roll((-(window // 2),) * 2, (0, 1)), "(i p) (j q) -> (i j) (p q)", p=window, q=window)
    return torch.where(number[:, :, None] == number[:, None, :], 0.0, -100.0)


def whole_units(image_size, unit: int) -> tuple[int, int]:
    """Height and width; UserError where they are not made of whole units."""
    height, width = both_sides(image_size)
    if min(height, width) < unit or height % unit or width % unit:
        raise UserError(f"image size {told((height, width))} is not a multiple of {unit} pixels, which one final token covers")
    return height, width


def map_sides(shape: dict, image_size, shifts_alike: bool = False) -> list[tuple[int, int]]:
    """Height and width in tokens of each stage's map; UserError where a peer would not compute at this size what we do.

    shifts_alike: the peer shifts windows along both sides or along none.
    """
    windows, image_size = shape["windows"], whole_units(image_size, SWIN.unit(shape))
    maps = [tuple(side // shape["patch"] // 2 ** i for side in image_size) for i in range(len(windows))]
    for i, (window, sides) in enumerate(zip(windows, maps)):
        fitting = min(max(windows), max(sides))
        if window != fitting:
            raise UserError(f"stage {i} has windows of {window} tokens, where {told(image_size)} px make a map of {told(sides)} and windows "
                            f"of {fitting}: give the image size of the encoder (--image-size)")
        if any(side % window for side in sides):
            raise UserError(f"windows of {window} tokens do not divide the map of {told(sides)} that stage {i} has at {told(image_size)} px; "
                            "our border windows are smaller there, those of other libraries padded or shrunken: give the image size of "
                            "the encoder (--image-size)")
        if shifts_alike and min(sides) == window < max(sides) and shape["depths"][i] > 1:
            raise UserError(f"stage {i} has a map of {told(sides)} tokens at {told(image_size)} px, whose windows of {window} are shifted along the "
                            "longer side only; there this library does not shift at all")
    return maps


# ------------------------------------------------------------------------------------------------- functions of a state dict

def infer_shape(state: dict, channels: int | None = None, image_size: tuple | None = None) -> dict:
    """Settings of the encoder that a state dict in our names belongs to: patch, channels, width, depths, heads, windows (per stage) of a Swin.

    The constructor takes the largest window, and shrinks it by itself where the image size makes a map smaller. channels, image_size:
    see Family.shape. UserError for a key too many or too few, and for shapes that no such encoder has.
    """
    return family_of(state).shape(state, channels, image_size)


def from_layout(state: dict, layout: str) -> dict:
    """A state dict of a layout in our names, whatever the family."""
    family, found = recognise(state)
    if layout not in family.places:
        raise UserError(f"{CALLED[layout]} holds no {family.title} that is read here")
    return family.to_ours(state, layout)


from_torchvision = partial(from_layout, layout="torchvision")  # swin_t, swin_s, swin_b, any SwinTransformer of its first version
from_timm = partial(from_layout, layout="timm")                # 0.9 or later; older files of Swin are in Microsoft's layout
from_microsoft = partial(from_layout, layout="microsoft")      # what stands under "model" in the files of the original Swin
from_huggingface = partial(from_layout, layout="huggingface")  # what a model.safetensors of SwinModel or ViTModel holds


def of_kind(state: dict, layout: str, channels: int | None, image_size) -> tuple[Family, dict]:
    """Family and shape of a state dict in our names that is to go into a layout. UserError where the layout has no such encoder."""
    family = family_of(state)
    if layout not in family.places:
        raise UserError(f"{CALLED[layout]} holds no {family.title}; its layouts: {', '.join(name for name in family.places if name in EXPORTS)}")
    return family, family.shape(state, channels, image_size and both_sides(image_size))


def index_buffers(state: dict) -> dict:
    """The position index beside each position table of a state dict in torchvision's or Microsoft's names."""
    return {key.replace("bias_table", "index"): position_index((math.isqrt(len(table)) + 1) // 2)
            for key, table in state.items() if key.endswith("relative_position_bias_table")}


def to_torchvision(state: dict, image_size=None, channels: int | None = None) -> dict:
    """For a strict load into torchvision's Swin. image_size, here and below: of the model that loads them, one number or height and width;
    channels: of its images, which the weights alone do not tell (see Family.shape). With image_size it is checked that torchvision computes the same there.

    UserError for shrunken windows: torchvision has one window for all stages, and pads maps that are smaller.
    """
    family, shape = of_kind(state, "torchvision", channels, image_size)
    if len(set(shape["windows"])) > 1:
        raise UserError(f"torchvision cannot hold windows of {shape['windows']} tokens: it pads small maps, where ours and "
                        "Microsoft's code shrink the window and its position table")
    if image_size:
        map_sides(shape, image_size)
    out = family.to_theirs(state, "torchvision", shape)
    return out | {key: index.flatten() for key, index in index_buffers(out).items()}


def to_timm(state: dict, image_size=224, window: int = 7, channels: int | None = None) -> dict:
    """For a strict load into timm's model of that img_size. Its buffers are not kept in state dicts since 0.9. window: of Twins,
    whose weights do not tell it; timm pads where it does not divide a map, which is refused."""
    family, shape = of_kind(state, "timm", channels, image_size)
    check_size(family, shape, image_size, window)
    return family.to_theirs(state, "timm", shape)


def to_microsoft(state: dict, image_size=224, channels: int | None = None) -> dict:
    """For a strict load into the original Swin of that img_size, position indices and attention masks included."""
    family, shape = of_kind(state, "microsoft", channels, image_size)
    maps = map_sides(shape, image_size, shifts_alike=True)
    out = family.to_theirs(state, "microsoft", shape)
    masks = {f"layers.{i}.blocks.{j}.attn_mask": attention_mask(*sides, window)
             for i, (sides, window, depth) in enumerate(zip(maps, shape["windows"], shape["depths"]))
             for j in range(1, depth, 2) if 1 < window < min(sides)}
    return out | index_buffers(out) | masks


def to_huggingface(state: dict, image_size=224, channels: int | None = None) -> dict:
    """The names of a model.safetensors for SwinModel, SwinForImageClassification or ViTModel of that image_size.

    UserError for shrunken windows, whose position tables Hugging Face keeps at full size, and for a classifier of a ViT.
    """
    family, shape = of_kind(state, "huggingface", channels, image_size)
    check_size(family, shape, image_size, shifts_alike=True)
    if len(set(shape.get("windows", (0,)))) > 1:
        raise UserError(f"Hugging Face cannot hold windows of {shape['windows']} tokens: its position tables are all of one size")
    return family.to_theirs(state, "huggingface", shape)


def check_size(family: Family, shape: dict, image_size, window: int = 7, shifts_alike: bool = False):
    """UserError where a peer would not compute at this size what we do."""
    sides = whole_units(image_size, family.unit(shape))
    if family is not VIT:
        map_sides(shape | ({"windows": twins_windows(shape, sides, window)} if family is TWINS else {}), sides, shifts_alike and family is SWIN)
    elif sides != (shape["rows"] * shape["patch"], shape["columns"] * shape["patch"]):
        raise UserError(f"the file holds positions for {told((shape['rows'] * shape['patch'], shape['columns'] * shape['patch']))} px: give that image "
                        "size (--image-size), or interpolate them where they are loaded")


def twins_windows(shape: dict, image_size: tuple, window: int) -> list[int]:
    """Of each stage, which the weights do not tell."""
    return [min(window, max(image_size) // shape["patch"] // 2 ** i) for i in range(len(shape["depths"]))]


EXPORTS = {"torchvision": to_torchvision, "timm": to_timm, "microsoft": to_microsoft, "huggingface": to_huggingface}


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


@torch.no_grad()
def fit(state: dict, encoder: Encoder, channels: int | None = None, image_size: tuple | None = None, geometric: bool = False) -> str:
    """Load a state dict in our names into an encoder of its kind, of any image size, window and number of channels; returns one line that
    says what was done.

    A Swin's position tables of another window and a ViT's positions of another map are interpolated, a patch embedding of other channels
    is adapted (`to_channels`), a classifier in `state` is left out. geometric: interpolate tables as SimMIM does (`resize_table_geometric`), not as
    Microsoft's code does (`resize_table`). channels, image_size: of what `state` was trained on, if not the
    encoder's own channels or 3, and a square. UserError for another family, and where patch, width, depths or heads differ.
    """
    family, other = family_of(encoder.state_dict()), family_of(state)
    ours = family.shape(encoder.state_dict(), encoder.channels, encoder.image_size)
    alike = family is other and getattr(state.get("embed.proj.weight"), "shape", None) == encoder.state_dict()["embed.proj.weight"].shape
    theirs = other.shape(state, channels or (ours["channels"] if alike else None), image_size)
    if family is not other:
        raise UserError(f"the file holds a {other.title}; the model is a {family.title}")
    if family.describe(theirs) != family.describe(ours):
        raise UserError(f"the file holds {family.describe(theirs)}; the model is {family.describe(ours)}")
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    changes = []
    changed = [(i, old, new) for i, (old, new) in enumerate(zip(theirs.get("windows", ()), ours.get("windows", ()))) if old != new]
    if changed:
        tables = [(f"stages.{i}.blocks.{j}.attention.table", new) for i, _, new in changed for j in range(ours["depths"][i])]
        state |= {key: (resize_table_geometric if geometric else resize_table)(state[key], new) for key, new in tables}
        windows = ", ".join(dict.fromkeys(f"{old} to {new}" for _, old, new in changed))
        changes.append(f"interpolated {len(tables)} relative position bias tables (window {windows})")
    if family is VIT and (theirs["rows"], theirs["columns"]) != (ours["rows"], ours["columns"]):
        state["positions"] = resize_positions(state["positions"], theirs["rows"], ours["rows"], ours["columns"])
        changes.append(f"interpolated the position embedding ({theirs['rows']} x {theirs['columns']} to {ours['rows']} x {ours['columns']})")
    old, new = theirs["channels"], ours["channels"]
    if old != new:
        state["embed.proj.weight"] = to_channels(state["embed.proj.weight"], old, new)
        changes.append(f"adapted the patch embedding from {old} to {new} channels ({'their sum' if new == 1 else f'repeated, times {old} / {new}'})")
    encoder.load_state_dict(state)
    return "; ".join([f"loaded all {len(state)} tensors of the encoder", *changes])


def load(path, encoder: Encoder, geometric: bool = False) -> str:
    """`fit` of what a file of weights holds; the line begins with the file and its layout."""
    state, layout, config = open_weights(path)
    return f"{path} ({layout}): {fit(state, encoder, **known(config), geometric=geometric)}"


# ------------------------------------------------------------------------------------------------- files

WRAPPERS = ("teacher", "model", "state_dict")  # what a file's dict may hold the state dict under
PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder")  # what other programs call the network that holds the encoder


def unwrapped(file: dict) -> dict:
    """The state dict in a file's dict, without what data parallelism, torch.compile, Lightning, SimMIM, MoBY or OpenMMLab put before its keys.

    What stands beside the encoder there (decoders, projectors, momentum encoders, a mask token) is passed over.
    """
    for key in WRAPPERS:
        file = file[key] if isinstance(file.get(key), dict) else file
    state = {str(key).replace("_orig_mod.", ""): value for key, value in file.items()}
    prefixes = {key.removesuffix(anchor) for key in state for anchor in ANCHORS if key == anchor or key.endswith("." + anchor)}
    known = sorted((prefix for prefix in prefixes if set(prefix.split(".")[:-1]) <= set(PREFIXES)), key=len)
    if known and known[0]:
        state = {key.removeprefix(known[0]): value for key, value in state.items() if key.startswith(known[0])}
        state.pop("mask_token", None)
    if "cls_token" in state:  # MAE's file holds its decoder too
        state = {key: value for key, value in state.items() if not key.startswith("decoder_") and key != "mask_token"}
    if "embeddings.patch_embeddings.projection.weight" in state:  # Hugging Face's encoder without a head
        state = {("vit." if "embeddings.cls_token" in state else "swin.") + key: value for key, value in state.items()}
    if any(key.endswith(".embeddings.patch_embeddings.projection.weight") for key in state):  # its SimMIM and MAE hold more
        state = {key: value for key, value in state.items() if not key.startswith("decoder.") and not key.endswith("embeddings.mask_token")}
    if "patch_embed.projection.weight" in state:  # a norm for each stage that is put out; the last is Swin's own
        last = max((key.split(".")[0] for key in state if re.match(r"norm\d\.", key)), default="norm")
        state = {key.replace(last + ".", "norm.", 1) if key.startswith(last) else key: value for key, value in state.items()
                 if not re.match(r"norm\d\.", key) or key.startswith(last)}
    return state


def known(config: dict) -> dict:
    """What a checkpoint's config says of its encoder that the weights do not tell; see Family.shape."""
    given = config.get("arguments", {})
    size = given.get("image_size")
    return dict(channels=given.get("channels") or 3 if config else None, image_size=both_sides(size) if size else None)


def detect(state: dict) -> str:
    """Which layout the keys are in; UserError if none."""
    return recognise(state)[1]


def unpack(file: dict) -> tuple[dict, str, dict]:
    """(state dict in our names, classifier included; layout name; a checkpoint's config, else {}) of what a file holds."""
    kind = file.get("kind")
    if kind in PROGRAMS:
        model = file["model"]
        if "ema" in file:  # what `finetune.py --eval` measures; torch keeps it as a wrapped module
            model = {key.removeprefix("module."): value for key, value in file["ema"].items()}
        model = {key.replace("fc_norm.", "encoder.norm."): value for key, value in model.items()}  # the norm of a ViT's mean token, see `fc_norm`
        kept = ("encoder.", "head.") if kind == "finetune" else "encoder."  # other heads predict pixels, or classes of each
        state = {key.removeprefix("encoder."): value for key, value in model.items() if key.startswith(kept)}
        infer_shape(state, **known(file["config"]))
        return state, kind, file["config"]
    state = unwrapped(file)
    family, layout = recognise(state)
    if layout != "encoder":
        return family.to_ours(state, layout), layout, {}
    infer_shape(state)
    return state, layout, {}


def open_weights(path) -> tuple[dict, str, dict]:
    """`unpack` of a file, which is read once as long as it is the same; errors name the path. A folder: its model.safetensors."""
    path = Path(path) / "model.safetensors" if (Path(path) / "model.safetensors").is_file() else path
    try:
        return _unpacked(str(path), os.path.getmtime(path) if os.path.exists(path) else 0.0)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


@lru_cache(maxsize=1)
def _unpacked(path: str, written: float) -> tuple[dict, str, dict]:
    file = load_tensors(path)
    return unpack(check_run(file, path, file["kind"]) if file.get("kind") in PROGRAMS else file)


def model_in(path) -> str:
    """The name of the model whose shapes a file of weights has, whatever its window. UserError if there is none."""
    def shapes(state):  # of any window, size and number of channels
        return {key: value.shape for key, value in state.items() if not key.endswith("table") and key not in ("positions", "embed.proj.weight")}

    name = open_weights(path)[2].get("arguments", {}).get("model")  # a run says it; mixmim_base has the shapes of swin_base
    if name in MODELS:
        return name
    here = shapes(read(path)[0])
    for name, make in MODELS.items():
        with torch.device("meta"):
            encoder = make()
        if here == shapes(encoder.state_dict()):
            return name
    raise UserError(f"{path}: holds none of {', '.join(MODELS)}; name the one it should start with --model")


def read(path) -> tuple[dict, dict | None, str]:
    """(encoder's state dict in our names, {"head.weight", "head.bias"} or None, layout name) of any file of weights.

    Layout names: pretrain, finetune (checkpoints), encoder (ours), torchvision, timm, microsoft. UserError, with the
    path, for a file that is none of these, is damaged, or holds pickled objects besides tensors.
    """
    state, layout, _ = open_weights(path)
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    return {key: value for key, value in state.items() if key not in head}, head or None, layout


def peers_model(layout: str, family: Family, shape: dict, image_size, window: int, classes: int) -> tuple[str, str, list, dict]:
    """A peer's model of a shape: its module and class, and what the class is called with. window: of a Twins."""
    patch, sides = shape["patch"], both_sides(image_size)
    first = dict(img_size=sides[0] if sides[0] == sides[1] else sides, patch_size=patch) | (dict(in_chans=shape["channels"]) if shape["channels"] != 3 else {})
    if layout == "torchvision":
        return ("torchvision.models.swin_transformer", "SwinTransformer", [[patch, patch], shape["width"], list(shape["depths"]), list(shape["heads"]),
                                                                           [max(shape["windows"])] * 2], dict(num_classes=classes) if classes else {})
    if family is VIT:
        return "timm.models.vision_transformer", "VisionTransformer", [], first | dict(
            embed_dim=shape["width"], depth=shape["depth"], num_heads=shape["heads"], global_pool="avg", fc_norm=False, num_classes=classes)
    if family is TWINS:
        stages = range(len(shape["depths"]))
        widths = [shape["width"] * 2 ** i for i in stages]
        return "timm.models.twins", "Twins", [], first | dict(
            embed_dims=widths, num_heads=[width // 32 for width in widths], mlp_ratios=[4 for _ in stages], depths=list(shape["depths"]),
            sr_ratios=[2 ** i for i in reversed(stages)], wss=twins_windows(shape, sides, window), num_classes=classes)
    return {"timm": "timm.models.swin_transformer", "microsoft": "models.swin_transformer"}[layout], "SwinTransformer", [], first | dict(
        window_size=max(shape["windows"]), embed_dim=shape["width"], depths=shape["depths"], num_heads=shape["heads"], num_classes=classes)


def loading_code(layout: str, path: Path, family: Family, shape: dict, image_size, window: int, classes: int) -> str:
    """A line of Python that makes a peer's model and loads an exported file, every key."""
    if layout == "huggingface":
        model, more = ("ViTModel", ", add_pooling_layer=False") if family is VIT else ("SwinForImageClassification", "") if classes else ("SwinModel", "")
        return f"from transformers import {model}; model = {model}.from_pretrained({str(path)!r}{more})"
    read, load = ("safetensors.torch", f"safetensors.torch.load_file({str(path)!r})") if path.suffix == ".safetensors" else \
        ("torch", f"torch.load({str(path)!r}, weights_only=True)" + ("['model']" if layout == "microsoft" else ""))
    if layout == "torchvision" and read != "torch":
        read = f"torch, {read}"
    module, name, values, settings = peers_model(layout, family, shape, image_size, window, classes)
    words = ", ".join([*map(repr, values), *(f"{key}={value!r}" for key, value in settings.items())])
    bare = "; model.head = torch.nn.Identity()" if layout == "torchvision" and not classes else ""
    if layout == "torchvision" and shape["channels"] != 3:
        bare += "; model.features[0][0] = torch.nn.Conv2d({channels}, {width}, {patch}, {patch})".format_map(shape)
    return f"import {read}; from {module} import {name}; model = {name}({words}){bare}; model.load_state_dict({load})"


def huggingface_config(family: Family, shape: dict, image_size, classes: list[str]) -> dict:
    """What config.json says of an encoder, and of its classifier if it has classes."""
    config = dict(image_size=image_size, patch_size=shape["patch"], num_channels=shape["channels"], hidden_act="gelu", qkv_bias=True, hidden_dropout_prob=0.0,
                  attention_probs_dropout_prob=0.0)
    if family is VIT:
        return config | dict(model_type="vit", architectures=["ViTModel"], hidden_size=shape["width"], num_hidden_layers=shape["depth"],
                             num_attention_heads=shape["heads"], intermediate_size=4 * shape["width"], layer_norm_eps=1e-6)
    config |= dict(model_type="swin", architectures=["SwinForImageClassification" if classes else "SwinModel"], embed_dim=shape["width"],
                   depths=shape["depths"], num_heads=shape["heads"], window_size=shape["windows"][0], mlp_ratio=4.0, layer_norm_eps=1e-5,
                   drop_path_rate=0.0, use_absolute_embeddings=False)
    return config | (dict(id2label=dict(enumerate(classes)), label2id={name: k for k, name in enumerate(classes)}) if classes else {})


def save_folder(folder: Path, config: dict, state: dict, form: PixelFormat):
    """config.json, preprocessor_config.json and model.safetensors in a new or empty folder, as from_pretrained reads them. UserError for any other."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something already, which was left as it is; give a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{str(folder)!r}: there is no folder {folder.parent}")
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    height, width = both_sides(config["image_size"])
    prepared = dict(do_resize=True, size=dict(height=height, width=width), resample=3, do_normalize=True, image_mean=form.mean, image_std=form.std)
    for name, values in (("config.json", config), ("preprocessor_config.json", prepared | {"pixels": form.saved})):
        write_whole(folder / name, lambda file: file.write((json.dumps(values, indent=2) + "\n").encode()))


def save_file(target: Path, state: dict, form: PixelFormat, wrapped: bool):
    """A file of weights, with the format of pixels that they were trained on: in a .safetensors file's metadata, else in a file beside it."""
    save_tensors(target, {"model": state} if wrapped else state, {"format": "pt", "pixels": json.dumps(form.saved)})
    if target.suffix != ".safetensors" and not form.ordinary:
        write_whole(target.with_name(target.name + ".pixels.json"), lambda file: file.write((json.dumps(form.saved, indent=1) + "\n").encode()))


def main(argv=None):
    parser = flags.Parser(description="Exchange encoder weights with timm, Hugging Face, torchvision and Microsoft's Swin.")
    parser.add_argument("command", choices=[*(f"to-{layout}" for layout in EXPORTS), *(f"from-{layout}" for layout in (*EXPORTS, "openmmlab"))])
    parser.add_argument("source", help="to: any file of weights or checkpoint; from: one in that layout, or Hugging Face's folder")
    parser.add_argument("target", help="the file to write, as its suffix says; of to-huggingface a folder")
    parser.add_argument("--image-size", type=flags.image_size, metavar="PX",
                        help="of the model that will load it, 224 or 224x160 (height x width); default: a checkpoint's own, else 224")
    args = parser.parse_args(argv)
    way, layout = args.command.split("-")
    folder = way == "to" and layout == "huggingface"
    target = Path(args.target) if folder else check_output(args.target, FORMATS)
    if target.resolve() == Path(args.source).resolve():
        raise UserError(f"{args.target}: would overwrite the file that is read")

    state, holds, trained = open_weights(args.source)
    told_of = known(trained) | ({"image_size": both_sides(args.image_size)} if args.image_size else {})
    family, shape = family_of(state), infer_shape(state, **told_of)
    given = trained.get("arguments", {})
    size, window = args.image_size or given.get("image_size") or 224, given.get("window") or 7
    classes = len(state["head.bias"]) if has_head(state) else 0
    if way == "to":
        state = EXPORTS[layout](state, channels=shape["channels"], **{"image_size": size} if told_of["image_size"] else {},
                                **{"window": window} if family is TWINS and layout == "timm" else {})
    elif holds != layout:
        raise UserError(f"{args.source}: holds {CALLED[holds]}, not {CALLED[layout]}")
    form = PixelFormat.of(trained.get("pixels", {}))
    if folder:
        config = huggingface_config(family, shape, size, trained.get("classes") or [f"class {k}" for k in range(classes)] if classes else [])
        save_folder(target, config, state, form)
    else:
        save_file(target, state, form, way == "to" and layout == "microsoft" and target.suffix != ".safetensors")  # which holds nothing but tensors
    print(f"wrote {args.target}: {len(state)} tensors, {', '.join(f'{name} {value}' for name, value in shape.items() if (name, value) != ('channels', 3))}")
    if way == "to":
        print(f"load it: {loading_code(layout, target, family, shape, size, window, classes)}")
        if not form.ordinary:
            ends = f"{form.low} to {form.high}" if form.low else form.value_range if isinstance(form.value_range, str) else "{:g} to {:g}".format(*form.value_range)
            print(f"its images: {form.channels} channels, values {ends} as 0 to 1, minus {form.mean}, over {form.std}")
    return 0


if __name__ == "__main__":
    program(main)
