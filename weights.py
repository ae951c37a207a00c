"""Exact exchange of encoder weights with torchvision, timm and Microsoft's Swin; files of these and other kinds, read.

    python weights.py to-torchvision runs/x/last.pt encoder.pt       also to-timm, to-microsoft
    python weights.py from-microsoft swin_tiny.pth encoder.pt        also from-timm, from-torchvision, from-openmmlab

A state dict is a plain dict of tensors: the encoder's own keys, and `head.weight`, `head.bias` beside them where there is
a classifier. Tensors are renamed, never computed with: all layouts hold one patch merging order (but for OpenMMLab's), one order of q, k
and v, one position table, and the convolution that embeds patches is the linear layer (c p q). Buffers that follow from
the window and the map (position index, attention mask) are dropped on the way in, and written where the peer wants them.
"""
import engine  # noqa: F401  first: from here on Ctrl-C ends in one line

# isort: split
import math
import os
import re
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from encoders import MODELS
from engine import flags
from engine.checkpoints import FORMATS, check_output, check_run, load_tensors, save_tensors
from engine.errors import UserError
from engine.processes import program
from swin import Swin, window_numbers

# {x}: weight and bias. {i}, {j}: stage and block; {odd}, {even}, {next}: 2i + 1, 2i + 2, i + 1.
PLACES = {  # timm, from 0.9 on, opens stage i + 1 with the merging that closes our stage i
    "encoder": dict(column=0, block="stages.{i}.blocks.{j}", merge="stages.{i}.merge", head="head"),
    "torchvision": dict(column=1, block="features.{odd}.{j}", merge="features.{even}", head="head"),
    "timm": dict(column=2, block="layers.{i}.blocks.{j}", merge="layers.{next}.downsample", head="head.fc"),
    "microsoft": dict(column=2, block="layers.{i}.blocks.{j}", merge="layers.{i}.downsample", head="head"),
    "openmmlab": dict(column=3, block="stages.{i}.blocks.{j}", merge="stages.{i}.downsample", head="head.fc"),  # read only
}
NAMES = [row.split() for row in """
    embed.proj.{x}               features.0.0.{x}                             patch_embed.proj.{x}                         patch_embed.projection.{x}
    embed.norm.{x}               features.0.2.{x}                             patch_embed.norm.{x}                         patch_embed.norm.{x}
    {block}.norm1.{x}            {block}.norm1.{x}                            {block}.norm1.{x}                            {block}.norm1.{x}
    {block}.attention.table      {block}.attn.relative_position_bias_table    {block}.attn.relative_position_bias_table    {block}.attn.w_msa.relative_position_bias_table
    {block}.attention.qkv.{x}    {block}.attn.qkv.{x}                         {block}.attn.qkv.{x}                         {block}.attn.w_msa.qkv.{x}
    {block}.attention.proj.{x}   {block}.attn.proj.{x}                        {block}.attn.proj.{x}                        {block}.attn.w_msa.proj.{x}
    {block}.norm2.{x}            {block}.norm2.{x}                            {block}.norm2.{x}                            {block}.norm2.{x}
    {block}.mlp.up.{x}           {block}.mlp.0.{x}                            {block}.mlp.fc1.{x}                          {block}.ffn.layers.0.0.{x}
    {block}.mlp.down.{x}         {block}.mlp.3.{x}                            {block}.mlp.fc2.{x}                          {block}.ffn.layers.1.{x}
    {merge}.norm.{x}             {merge}.norm.{x}                             {merge}.norm.{x}                             {merge}.norm.{x}
    {merge}.reduction.weight     {merge}.reduction.weight                     {merge}.reduction.weight                     {merge}.reduction.weight
    norm.{x}                     norm.{x}                                     norm.{x}                                     norm.{x}
    {head}.{x}                   {head}.{x}                                   {head}.{x}                                   {head}.{x}
""".strip().splitlines()]
CALLED = {"encoder": "this project's layout", "torchvision": "torchvision's layout", "timm": "timm's layout",
          "microsoft": "Microsoft's layout", "openmmlab": "OpenMMLab's layout", "pretrain": "a checkpoint of train.py", "finetune": "a checkpoint of finetune.py"}


# ------------------------------------------------------------------------------------------------- names and shapes

def name_of(row: list, layout: str, i: int, j: int, x: str) -> str:
    """The key of a row of NAMES in a layout, for stage i and block j."""
    place, numbers = PLACES[layout], dict(i=i, j=j, odd=2 * i + 1, even=2 * i + 2, next=i + 1)
    return row[place["column"]].format(x=x, **{part: place[part].format(**numbers) for part in ("block", "merge", "head")})


def names(layout: str, depths: tuple, head: bool) -> dict[str, str]:
    """{our key: the layout's key} of an encoder with `depths` blocks per stage, and of its classifier if it has one."""
    pairs = {}
    for row in NAMES if head else NAMES[:-1]:
        places = [(0, 0)]
        if "{block}" in row[0]:
            places = [(i, j) for i, depth in enumerate(depths) for j in range(depth)]
        if "{merge}" in row[0]:
            places = [(i, 0) for i in range(len(depths) - 1)]
        for i, j in places:
            for x in ("weight", "bias") if "{x}" in row[0] else ("",):
                pairs[name_of(row, "encoder", i, j, x)] = name_of(row, layout, i, j, x)
    return pairs


def has_head(state: dict) -> bool:
    return any(key.startswith("head.") for key in state)


def count_blocks(keys, layout: str) -> tuple:
    """Blocks in each stage. They are counted, so a gap in the numbers shows up as a missing key."""
    pattern = PLACES[layout]["block"].replace(".", r"\.").format(i=r"(\d+)", j=r"(\d+)", odd=r"(\d*[13579])") + r"\."
    blocks = {match.groups() for key in keys if (match := re.match(pattern, key))}
    stages = Counter(stage for stage, _ in blocks)
    return tuple(stages[stage] for stage in sorted(stages, key=int))


def first_few(items) -> str:
    items = list(items)
    return f"{len(items)} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})"


def check_keys(state: dict, expected, layout: str):
    """UserError unless the keys are exactly the expected ones and each holds a tensor of real numbers."""
    expected = set(expected)
    wrong = {"missing keys": sorted(expected - set(state)), "keys that do not belong": sorted(set(state) - expected),
             "entries that are no tensor of real numbers": sorted(
                 key for key, value in state.items() if not (isinstance(value, torch.Tensor) and value.is_floating_point()))}
    if any(wrong.values()):
        raise UserError(f"{CALLED[layout]}, but " + "; ".join(f"{what}: {first_few(keys)}" for what, keys in wrong.items() if keys))


def check_shapes(state: dict, shape: dict):
    """UserError unless every tensor has the shape that it has in a Swin of patch, width, depths, heads and windows."""
    settings = {key: value for key, value in shape.items() if key != "windows"}
    try:
        with torch.device("meta"):
            twin = Swin(image_size=unit_of(shape), window=1, **settings)
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"not a Swin Transformer that can be built here: {error}") from None
    sizes = {key: tuple(value.shape) for key, value in twin.state_dict().items()}
    for i, (window, heads) in enumerate(zip(shape["windows"], shape["heads"])):
        sizes |= {f"stages.{i}.blocks.{j}.attention.table": ((2 * window - 1) ** 2, heads) for j in range(shape["depths"][i])}
    if "head.weight" in state:
        classes = state["head.bias"].numel()
        sizes |= {"head.weight": (classes, twin.width), "head.bias": (classes,)}
    wrong = [f"{key} {tuple(state[key].shape)} where {size} is expected" for key, size in sizes.items()
             if tuple(state[key].shape) != size]
    if wrong:
        raise UserError(f"not a Swin Transformer of {describe(shape)}: {first_few(wrong)}")


def infer_shape(state: dict) -> dict:
    """Settings of the Swin that a state dict in our names belongs to: patch, width, depths, heads, windows (per stage).

    The constructor takes the largest window, and shrinks it by itself where the image size makes a map smaller.
    UserError for a key too many or too few, and for shapes that no such Swin has.
    """
    depths = count_blocks(state, "encoder")
    check_keys(state, names("encoder", depths, has_head(state)), "encoder")
    tables = [state[f"stages.{i}.blocks.0.attention.table"] for i in range(len(depths))]
    embed = state["embed.proj.weight"]
    if not tables or embed.ndim != 2 or any(table.ndim != 2 for table in tables):
        raise UserError("not a Swin Transformer: patch embedding and position tables must be matrices")
    shape = dict(patch=math.isqrt(embed.shape[1] // 3), width=embed.shape[0], depths=depths,
                 heads=tuple(table.shape[1] for table in tables),
                 windows=tuple((math.isqrt(len(table)) + 1) // 2 for table in tables))
    check_shapes(state, shape)
    return shape


def describe(shape: dict) -> str:
    return ", ".join(f"{name} {shape[name]}" for name in ("patch", "width", "depths", "heads"))


def unit_of(shape: dict) -> int:
    """Pixels per side that one final token covers."""
    return shape["patch"] * 2 ** (len(shape["depths"]) - 1)


# ------------------------------------------------------------------------------------------------- derived buffers

def position_index(window: int) -> torch.Tensor:
    """(window^2, window^2): row of the position table for each pair, query first (Liu et al. 2021, Eq. 4)."""
    token, span = torch.arange(window * window), 2 * window - 1
    place = token // window * span + token % window
    return place[:, None] - place + (window - 1) * (span + 1)


def attention_mask(side: int, window: int) -> torch.Tensor:
    """(windows, window^2, window^2): 0 where two tokens of a cyclically shifted map share a window, else -100."""
    number = torch.from_numpy(window_numbers(np.arange(side * side), side, side, window, True)).view(side, side)
    number = rearrange(number.roll((-(window // 2),) * 2, (0, 1)), "(i p) (j q) -> (i j) (p q)", p=window, q=window)
    return torch.where(number[:, :, None] == number[:, None, :], 0.0, -100.0)


def map_sides(shape: dict, image_size: int) -> tuple:
    """Tokens per side of each stage's map; UserError where a peer would not compute at this size what we do."""
    windows, unit = shape["windows"], unit_of(shape)
    if image_size < unit or image_size % unit:
        raise UserError(f"image size {image_size} is not a multiple of {unit} pixels, which one final token covers")
    sides = tuple(image_size // shape["patch"] // 2 ** i for i in range(len(windows)))
    for i, (window, side) in enumerate(zip(windows, sides)):
        if window != min(max(windows), side):
            raise UserError(f"stage {i} has windows of {window} tokens, where {image_size} px make a map of {side} and windows "
                            f"of {min(max(windows), side)}: give the image size of the encoder (--image-size)")
        if side % window:
            raise UserError(f"windows of {window} tokens do not divide the map of {side} that stage {i} has at {image_size} px; "
                            "our border windows are smaller there, those of other libraries padded: give the image size of "
                            "the encoder (--image-size)")
    return sides


# ------------------------------------------------------------------------------------------------- the three layouts

def to_ours(state: dict, layout: str) -> dict:
    """A state dict in our names. Tensors are shared with `state`. UserError for keys or shapes that do not fit."""
    state = {key: value for key, value in state.items() if key.split(".")[-1] not in ("relative_position_index", "attn_mask")}
    pairs = names(layout, count_blocks(state, layout), has_head(state))
    check_keys(state, pairs.values(), layout)
    out = {ours: state[theirs] for ours, theirs in pairs.items()}
    conv = out["embed.proj.weight"]
    if conv.ndim != 4 or conv.shape[1] != 3 or conv.shape[2] != conv.shape[3]:
        raise UserError(f"patch embedding of shape {tuple(conv.shape)}: (width, 3, patch, patch) is expected")
    out["embed.proj.weight"] = rearrange(conv, "k c p q -> k (c p q)")
    if layout == "openmmlab":  # unfolds channels first, and the four tokens row by row
        out |= {key: rearrange(rearrange(value, "... (c k) -> ... k c", k=4)[..., [0, 2, 1, 3], :], "... k c -> ... (k c)")
                for key, value in out.items() if ".merge." in key}
    infer_shape(out)
    return out


def to_theirs(state: dict, layout: str, shape: dict) -> dict:
    """A state dict in a layout's names, without derived buffers. Tensors are shared with `state`."""
    pairs = names(layout, shape["depths"], "head.weight" in state)
    out = {theirs: state[ours] for ours, theirs in pairs.items()}
    embed = pairs["embed.proj.weight"]
    out[embed] = rearrange(out[embed], "k (c p q) -> k c p q", c=3, p=shape["patch"])
    return out


def index_buffers(state: dict) -> dict:
    """The position index beside each position table of a state dict in torchvision's or Microsoft's names."""
    return {key.replace("bias_table", "index"): position_index((math.isqrt(len(table)) + 1) // 2)
            for key, table in state.items() if key.endswith("relative_position_bias_table")}


# functions of a state dict
from_torchvision = partial(to_ours, layout="torchvision")  # swin_t, swin_s, swin_b, any SwinTransformer of its first version
from_timm = partial(to_ours, layout="timm")                # 0.9 or later; older files are in Microsoft's layout
from_microsoft = partial(to_ours, layout="microsoft")      # what stands under "model" in the files of the original Swin


def to_torchvision(state: dict, image_size: int | None = None) -> dict:
    """For a strict load into torchvision. With image_size it is checked that torchvision computes the same there.

    UserError for shrunken windows: torchvision has one window for all stages, and pads maps that are smaller.
    """
    shape = infer_shape(state)
    if len(set(shape["windows"])) > 1:
        raise UserError(f"torchvision cannot hold windows of {shape['windows']} tokens: it pads small maps, where ours and "
                        "Microsoft's code shrink the window and its position table")
    if image_size:
        map_sides(shape, image_size)
    out = to_theirs(state, "torchvision", shape)
    return out | {key: index.flatten() for key, index in index_buffers(out).items()}


def to_timm(state: dict, image_size: int = 224) -> dict:
    """For a strict load into timm's model of that img_size. Its buffers are not kept in state dicts since 0.9."""
    shape = infer_shape(state)
    map_sides(shape, image_size)
    return to_theirs(state, "timm", shape)


def to_microsoft(state: dict, image_size: int = 224) -> dict:
    """For a strict load into the original Swin of that img_size, position indices and attention masks included."""
    shape = infer_shape(state)
    sides = map_sides(shape, image_size)
    out = to_theirs(state, "microsoft", shape)
    masks = {f"layers.{i}.blocks.{j}.attn_mask": attention_mask(side, window)
             for i, (side, window, depth) in enumerate(zip(sides, shape["windows"], shape["depths"]))
             for j in range(1, depth, 2) if 1 < window < side}
    return out | index_buffers(out) | masks


EXPORTS = {"torchvision": to_torchvision, "timm": to_timm, "microsoft": to_microsoft}


# ------------------------------------------------------------------------------------------------- into a model

def resize_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """A position table ((2w - 1)^2, heads) for another window: bicubic over the grid of offsets, each head by itself."""
    old = math.isqrt(len(table))
    grid = rearrange(table.float(), "(r c) h -> 1 h r c", r=old)
    grid = F.interpolate(grid, size=(2 * window - 1, 2 * window - 1), mode="bicubic", align_corners=False)
    return rearrange(grid, "1 h r c -> (r c) h").to(table.dtype)


@torch.no_grad()
def fit(state: dict, encoder: Swin) -> str:
    """Load a state dict in our names into a Swin of any image size and window; returns one line that says what was done.

    Position tables of another window are interpolated; a classifier in `state` is passed over. UserError where patch,
    width, depths or heads differ.
    """
    theirs, ours = infer_shape(state), infer_shape(encoder.state_dict())
    if describe(theirs) != describe(ours):
        raise UserError(f"the file holds {describe(theirs)}; the model is {describe(ours)}")
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    changed = [(i, old, new) for i, (old, new) in enumerate(zip(theirs["windows"], ours["windows"])) if old != new]
    tables = [(f"stages.{i}.blocks.{j}.attention.table", new) for i, _, new in changed for j in range(ours["depths"][i])]
    state |= {key: resize_table(state[key], new) for key, new in tables}
    encoder.load_state_dict(state)
    windows = ", ".join(dict.fromkeys(f"{old} to {new}" for _, old, new in changed))
    interpolated = f"{len(tables)} position tables (window {windows})" if tables else "none"
    return f"loaded {len(state)} tensors, interpolated {interpolated}, left at random: none"


# ------------------------------------------------------------------------------------------------- files

WRAPPERS = ("teacher", "model", "state_dict")  # what a file's dict may hold the state dict under
PREFIXES = ("module", "_orig_mod", "model", "backbone", "encoder")  # what other programs call the network that holds the encoder
ANCHORS = {"embed.proj.weight": "encoder", "features.0.0.weight": "torchvision", "patch_embed.projection.weight": "openmmlab",
           "patch_embed.proj.weight": "timm or microsoft"}


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
    if "patch_embed.projection.weight" in state:  # a norm for each stage that is put out; the last is Swin's own
        last = max((key.split(".")[0] for key in state if re.match(r"norm\d\.", key)), default="norm")
        state = {key.replace(last + ".", "norm.", 1) if key.startswith(last) else key: value for key, value in state.items()
                 if not re.match(r"norm\d\.", key) or key.startswith(last)}
    return state


def detect(state: dict) -> str:
    """Which layout the keys are in; UserError if none. timm and Microsoft differ in where the merging stands."""
    if any(key.endswith(".logit_scale") for key in state):
        raise UserError("a Swin Transformer V2, whose attention is another one; the first version is read")
    if "cls_token" in state or "pos_embed" in state:
        raise UserError("a Vision Transformer (ViT), not a Swin Transformer")
    for anchor, layout in list(ANCHORS.items())[:3]:
        if anchor in state:
            return layout
    if "patch_embed.proj.weight" in state:
        opens = any(key.startswith("layers.1.downsample.") for key in state) and not any(
            key.startswith("layers.0.downsample.") for key in state)
        return "timm" if opens or "head.fc.weight" in state else "microsoft"
    raise UserError("no Swin Transformer of this project, torchvision, timm, Microsoft or OpenMMLab; its keys: "
                    + first_few(map(str, state)))


def unpack(file: dict) -> tuple[dict, str, int | None]:
    """(state dict in our names, classifier included; layout name; a checkpoint's image size) of what a file holds."""
    kind = file.get("kind")
    if kind in ("pretrain", "finetune"):
        model = file["model"]
        if "ema" in file:  # what `finetune.py --eval` measures; torch keeps it as a wrapped module
            model = {key.removeprefix("module."): value for key, value in file["ema"].items()}
        kept = ("encoder.", "head.") if kind == "finetune" else "encoder."  # in pre-training the head predicts pixels
        state = {key.removeprefix("encoder."): value for key, value in model.items() if key.startswith(kept)}
        infer_shape(state)
        return state, kind, file["config"]["arguments"]["image_size"]
    state = unwrapped(file)
    layout = detect(state)
    if layout != "encoder":
        return to_ours(state, layout), layout, None
    infer_shape(state)
    return state, layout, None


def open_weights(path) -> tuple[dict, str, int | None]:
    """`unpack` of a file, which is read once as long as it is the same; errors name the path."""
    try:
        return _unpacked(str(path), os.path.getmtime(path) if os.path.exists(path) else 0.0)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


@lru_cache(maxsize=1)
def _unpacked(path: str, written: float) -> tuple[dict, str, int | None]:
    file = load_tensors(path)
    return unpack(check_run(file, path, file["kind"]) if file.get("kind") in ("pretrain", "finetune") else file)


def model_in(path) -> str:
    """The name of the model whose shapes a file of weights has, whatever its window. UserError if there is none."""
    state, _, _ = read(path)
    shapes = {key: value.shape for key, value in state.items() if not key.endswith("table")}
    for name, make in MODELS.items():
        with torch.device("meta"):
            encoder = make()
        if shapes == {key: value.shape for key, value in encoder.state_dict().items() if not key.endswith("table")}:
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


def loading_code(layout: str, path: Path, shape: dict, image_size: int, state: dict) -> str:
    """A line of Python that makes a peer's model and loads an exported file, every key."""
    classes = len(next(value for key, value in state.items() if key.startswith("head.") and key.endswith("weight"))) if has_head(state) else 0
    read, load = ("safetensors.torch", f"safetensors.torch.load_file({str(path)!r})") if path.suffix == ".safetensors" else \
        ("torch", f"torch.load({str(path)!r}, weights_only=True)" + ("['model']" if layout == "microsoft" else ""))
    if layout == "torchvision":
        window, patch = max(shape["windows"]), shape["patch"]
        model = (f"from torchvision.models.swin_transformer import SwinTransformer; model = SwinTransformer([{patch}, {patch}], {shape['width']}, "
                 f"{list(shape['depths'])}, {list(shape['heads'])}, [{window}, {window}]" + (f", num_classes={classes})" if classes else
                                                                                             "); model.head = torch.nn.Identity()"))
        read = "torch" if read == "torch" else f"torch, {read}"
    else:
        module = {"timm": "timm.models.swin_transformer", "microsoft": "models.swin_transformer"}[layout]
        model = (f"from {module} import SwinTransformer; model = SwinTransformer(img_size={image_size}, patch_size={shape['patch']}, "
                 f"window_size={max(shape['windows'])}, embed_dim={shape['width']}, depths={shape['depths']}, num_heads={shape['heads']}, num_classes={classes})")
    return f"import {read}; {model}; model.load_state_dict({load})"


def main(argv=None):
    parser = flags.Parser(description="Exchange encoder weights with torchvision, timm and Microsoft's Swin.")
    parser.add_argument("command", choices=[*(f"to-{layout}" for layout in EXPORTS), *(f"from-{layout}" for layout in (*EXPORTS, "openmmlab"))])
    parser.add_argument("source", help="to: any file of weights or checkpoint; from: one in that layout")
    parser.add_argument("target", help="the file to write; one named .safetensors needs that package")
    parser.add_argument("--image-size", type=flags.positive, metavar="PX",
                        help="of the model that will load it; default: a checkpoint's own, else 224")
    args = parser.parse_args(argv)
    target = check_output(args.target, FORMATS)
    if target.resolve() == Path(args.source).resolve():
        raise UserError(f"{args.target}: would overwrite the file that is read")

    way, layout = args.command.split("-")
    state, holds, size = open_weights(args.source)
    shape = infer_shape(state)
    if way == "to":
        size = args.image_size or size
        state = EXPORTS[layout](state, **{"image_size": size} if size else {})
    elif holds != layout:
        raise UserError(f"{args.source}: holds {CALLED[holds]}, not {CALLED[layout]}")
    wrapped = way == "to" and layout == "microsoft" and target.suffix != ".safetensors"  # which holds nothing but tensors
    save_tensors(target, {"model": state} if wrapped else state)
    print(f"wrote {args.target}: {len(state)} tensors, {describe(shape)}, windows {shape['windows']}")
    if way == "to":
        print(f"load it: {loading_code(layout, target, shape, size or 224, state)}")
    return 0


if __name__ == "__main__":
    program(main)
