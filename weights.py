"""Exact exchange of encoder weights with timm, Hugging Face, torchvision and Microsoft's Swin.

    python weights.py to-timm runs/x/last.pt encoder.pt           # a Swin: also to-torchvision, to-microsoft
    python weights.py to-huggingface runs/x/last.pt folder        # a folder for from_pretrained: a Swin or a ViT
    python weights.py from-microsoft swin_tiny.pth encoder.pt     # also -timm, -torchvision, -openmmlab, -huggingface

The names of the weights are in encoders/layouts.py. Buffers that follow from the window and the map (position indices
and attention masks) are dropped on the way in, and written where the other library expects them.
"""

import json
import math
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.interpolate import RectBivariateSpline

import encoders
from encoders import MODELS, Encoder
from encoders.layouts import LAYOUT_TITLES, SIGNATURE_KEYS, VIT, StateDictMap, detect_layout, family_of, summarize
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

EXPORTS = ("torchvision", "timm", "microsoft", "huggingface")  # layouts that are written; OpenMMLab's is only read

# ---------------------------------------------------------------------------------------------------- derived buffers

PROGRAMS = {"pretrain": "train.py", "finetune": "finetune.py", "segment": "segment.py"}  # by kind of checkpoint


def relative_position_index(window: int) -> torch.Tensor:
    """Row of the relative position table for each pair of tokens in a window, query first (Liu et al. 2021, Eq. 4).

    Returns:
        (window^2, window^2) integers.
    """
    tokens, offsets = torch.arange(window * window), 2 * window - 1
    # A row number is (row difference) * offsets + (column difference), which is linear in the tokens' places.
    places = tokens // window * offsets + tokens % window
    return places[:, None] - places + (window - 1) * (offsets + 1)


def attention_mask(height: int, width: int, window: int) -> torch.Tensor:
    """The mask that Microsoft's code adds to attention scores in the windows of a cyclically shifted map.

    Args:
        height, width: of the map, in tokens.
        window: tokens per side.

    Returns:
        (windows, window^2, window^2): 0 where two tokens share a window before the shift, else -100.
    """
    numbers = window_numbers(np.arange(height * width), height, width, window, True)
    shifted = torch.from_numpy(numbers).view(height, width).roll((-(window // 2),) * 2, (0, 1))
    windows = rearrange(shifted, "(i p) (j q) -> (i j) (p q)", p=window, q=window)
    return torch.where(windows[:, :, None] == windows[:, None, :], 0.0, -100.0)


# ---------------------------------------------------------------------------------------- to and from other libraries


def from_layout(state: dict, layout: str) -> dict:
    """Converts a library's state dict to our names.

    Args:
        state: the state dict of a library's model, with or without its classifier.
        layout: "torchvision" (its first Swin, such as swin_t), "timm" (0.9 or later; older files of Swin are in
            Microsoft's layout), "microsoft" (what is under "model" in the files of the original Swin), "openmmlab" or
            "huggingface" (what model.safetensors of a SwinModel or ViTModel holds).

    Raises:
        UserError: the state dict is of another layout, or keys are missing or do not belong.
    """
    family = family_of(state)
    if layout not in family.tables:
        raise UserError(f"{LAYOUT_TITLES[layout]} holds no {family.title} that can be read here")
    return family.to_ours(state, layout)


def check_family(state: dict, encoder: Encoder) -> StateDictMap:
    """The family of an encoder.

    Raises:
        UserError: a state dict in our names is of another family, or lacks keys or has others.
    """
    family, other = family_of(encoder.state_dict()), family_of(state)
    if family is not other:
        raise UserError(f"the file holds a {other.title}; the model is a {family.title}")
    family.check_keys(state, "encoder")
    return family


def check_shapes(state: dict, encoder: Encoder):
    """Checks that a state dict in our names, with or without a classifier, is of an encoder's family and shapes.

    Raises:
        UserError: keys are missing or do not belong, or a tensor has another shape than the encoder's own.
    """
    family = check_family(state, encoder)
    expected = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    if "fc_norm.weight" in state:  # the norm of the mean token, which replaces the final norm
        for part in ("weight", "bias"):
            expected[f"fc_norm.{part}"] = expected.pop(f"norm.{part}")
    if "head.bias" in state:
        classes = state["head.bias"].numel()
        expected |= {"head.weight": (classes, encoder.width), "head.bias": (classes,)}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [key for key in expected | shapes if shapes.get(key) != expected.get(key)]
    if wrong:
        differences = [
            f"{key} {shapes.get(key, 'missing')} where {expected.get(key, 'nothing')} is expected" for key in wrong
        ]
        message = f"the tensors do not fit {family.describe(encoder)}: {summarize(differences)}"
        if all(key == "positions" or key.endswith("table") for key in wrong):
            message += (
                ": the weights are of another image size or window; give the image size of the encoder (--image-size)"
            )
        raise UserError(message)


def map_sizes(encoder: Encoder) -> list[tuple[int, int]]:
    """Height and width in tokens of each stage's map, of a Swin or a Twins."""
    height, width = (side // encoder.embed.patch for side in encoder.image_size)
    return [(height // 2**i, width // 2**i) for i in range(len(encoder.depths))]


def check_exportable(encoder: Encoder, layout: str):
    """Raises UserError where a library would compute something else with an encoder's weights."""
    if isinstance(encoder, ViT):
        return
    is_swin = isinstance(encoder, Swin)
    if is_swin and not (encoder.shift and encoder.positions is None):
        raise UserError(
            f"{LAYOUT_TITLES[layout]} holds no Swin without shifted windows or with positions, such as mixmim_base: "
            "its weights would compute something else there"
        )
    if len(set(encoder.windows)) > 1:
        reasons = {
            "torchvision": "it pads small maps, where our and Microsoft's code shrink the window and its table",
            "huggingface": "its position tables are all of one size",
        }
        if layout in reasons:
            raise UserError(
                f"{LAYOUT_TITLES[layout]} cannot hold windows of {encoder.windows} tokens: {reasons[layout]}"
            )
    for i, (window, (height, width)) in enumerate(zip(encoder.windows, map_sizes(encoder))):
        stage_map = (
            f"the map of {format_size((height, width))} tokens in stage {i} at {format_size(encoder.image_size)} px"
        )
        if height % window or width % window:
            raise UserError(
                f"windows of {window} tokens do not divide {stage_map}: our windows are smaller at the border, and "
                "other libraries pad the map or shrink the window; give the image size of the encoder (--image-size)"
            )
        one_sided = min(height, width) == window < max(height, width) and encoder.depths[i] > 1
        if is_swin and one_sided and layout in ("microsoft", "huggingface"):
            raise UserError(
                f"the windows of {window} tokens in {stage_map} are shifted along the longer side only; "
                "this library does not shift at all there"
            )


def window_of(table: torch.Tensor) -> int:
    """The window w of a relative position table ((2w - 1)^2, heads)."""
    return (math.isqrt(len(table)) + 1) // 2


def to_layout(state: dict, encoder: Encoder, layout: str) -> dict:
    """Converts a state dict in our names to a layout, for a strict load into the library's model.

    Args:
        state: of an encoder and perhaps of its classifier.
        encoder: the encoder whose weights they are, built for the image size of the model that will load them. It may
            be on the meta device.
        layout: one of EXPORTS. Microsoft's has position indices and attention masks, torchvision's has position
            indices, and timm stores neither since 0.9.

    Raises:
        UserError: the tensors are not the encoder's, the library has no such encoder, or it would compute something
            else.
    """
    family = family_of(encoder.state_dict())
    if layout not in family.tables:
        layouts = ", ".join(name for name in EXPORTS if name in family.tables)
        raise UserError(f"{LAYOUT_TITLES[layout]} holds no {family.title}; its layouts: {layouts}")
    check_shapes(state, encoder)
    check_exportable(encoder, layout)
    converted = family.to_theirs(state, layout, encoder)
    if layout in ("torchvision", "microsoft"):
        for key in [key for key in converted if key.endswith("bias_table")]:
            index = relative_position_index(window_of(converted[key]))
            converted[key.replace("bias_table", "index")] = index if layout == "microsoft" else index.flatten()
    if layout == "microsoft":
        for i, (size, window) in enumerate(zip(map_sizes(encoder), encoder.windows)):
            if 1 < window < min(size):  # a map of one window is not shifted
                for j in range(1, encoder.depths[i], 2):
                    converted[f"layers.{i}.blocks.{j}.attn_mask"] = attention_mask(*size, window)
    return converted


# --------------------------------------------------------------------------------------------------------- into a model


def resize_table(table: torch.Tensor, window: int) -> torch.Tensor:
    """A position table ((2w - 1)^2, heads) for another window: bicubic over the grid of offsets, as in Swin's code."""
    grid = rearrange(table.float(), "(r c) h -> 1 h r c", r=2 * window_of(table) - 1)
    grid = F.interpolate(grid, size=2 * window - 1, mode="bicubic", align_corners=False)
    return rearrange(grid, "1 h r c -> (r c) h").to(table.dtype)


def resize_table_geometric(table: torch.Tensor, window: int) -> torch.Tensor:
    """A position table ((2w - 1)^2, heads) for a larger window, as SimMIM fine-tunes (Xie et al. 2022).

    The old offsets 0, 1, 2, ... are placed at 0, 1, 1 + q, 1 + q + q^2, ..., with q such that the last one is the new
    last offset, and a cubic spline goes through them. Near offsets, which matter most, keep their values; bicubic
    interpolation stretches all of them alike. A smaller window is interpolated bicubically.
    """
    old_last, last = window_of(table) - 1, window - 1
    if last <= old_last or old_last < 3:  # a cubic spline needs four points
        return resize_table(table, window)

    def positive_offsets(q):
        return np.cumsum(q ** np.arange(old_last))

    low, high = 1.01, 1.5  # SimMIM's bounds and precision, to which its values are sensitive
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (q, high) if positive_offsets(q)[-1] < last else (low, q)
    offsets = np.concatenate([-positive_offsets(q)[::-1], [0], positive_offsets(q)])
    new_offsets = np.arange(-last, last + 1)
    grids = rearrange(table.double().cpu().numpy(), "(r c) h -> h r c", r=2 * old_last + 1)
    resized = np.stack([RectBivariateSpline(offsets, offsets, grid)(new_offsets, new_offsets) for grid in grids])
    return rearrange(torch.from_numpy(resized), "h r c -> (r c) h").to(table)


def to_channels(weight: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """A patch embedding for images of other channels, by timm's rule.

    One channel takes the sum over the old ones. n channels take the old ones in turns, times old / n, so that equal
    channels give what they gave before.

    Args:
        weight: (k, old * p * p).
        old, new: numbers of channels.

    Returns:
        (k, new * p * p).
    """
    weight = rearrange(weight, "k (c p) -> k c p", c=old)
    if new == 1:
        weight = weight.sum(1, keepdim=True)
    else:
        weight = weight[:, torch.arange(new) % old] * (old / new)
    return rearrange(weight, "k c p -> k (c p)")


def source_channels(weight: torch.Tensor, encoder: Encoder, channels: int | None) -> int:
    """The number of channels of the images that a patch embedding is for.

    Args:
        weight: (k, channels * patch^2).
        encoder: whose patch it should have. If `channels` is unknown and the weight fits the encoder, the encoder's
            number is taken.
        channels: if known. Else 3, or what the patch leaves where 3 channels would leave no square patch.

    Raises:
        UserError: the weight is not of so many channels of the encoder's patch.
    """
    values, patch = weight.shape[-1], encoder.embed.patch
    if channels is None and values == encoder.channels * patch**2:
        return encoder.channels
    rgb_patch = math.isqrt(values // 3)
    channels = channels or (3 if 3 * rgb_patch**2 == values else values // patch**2)
    if channels * patch**2 != values:
        raise UserError(
            f"the patch embedding of the file has {values} values, which are not {channels} channels of the model's "
            f"patch of {patch} x {patch}"
        )
    return channels


def source_map(count: int, encoder: Encoder, image_size: tuple | None) -> tuple[int, int]:
    """Rows and columns of the map that the positions of a ViT are for.

    Args:
        count: number of positions.
        encoder: if the image size is unknown, the map is the encoder's own if it has as many patches, else a square,
            else a map of the encoder's aspect ratio.
        image_size: of the images that the file was trained on, if known.

    Raises:
        UserError: no such map has `count` patches.
    """
    side = math.isqrt(count)
    if image_size:
        rows, columns = (side // encoder.unit for side in image_size)
    elif count == encoder.units:
        rows, columns = encoder.rows, encoder.columns
        if rows != columns and side * side == count:
            warn(
                f"the file does not say which image size its {count} positions are for; they are taken to be those "
                f"of a map of {rows} x {columns} patches, as the model has it"
            )
    elif side * side == count:
        rows = columns = side
    else:
        scale = math.sqrt(count / encoder.units)
        rows, columns = round(encoder.rows * scale), round(encoder.columns * scale)
    if rows * columns != count:
        raise UserError(
            f"the file has positions of {count} patches and does not say for which image size; "
            "give that size (--image-size)"
        )
    return rows, columns


@torch.no_grad()
def load_into(
    state: dict, encoder: Encoder, channels: int | None = None, image_size: tuple | None = None, geometric: bool = False
) -> str:
    """Loads a state dict in our names into an encoder of its kind, of any image size, window and number of channels.

    Position tables of another window and a ViT's positions of another map are interpolated, a patch embedding of other
    channels is adapted (`to_channels`), and a classifier is left out.

    Args:
        state: stays as it is.
        encoder: takes the weights.
        channels, image_size: of the images that `state` was trained on, if known; see `source_channels`, `source_map`.
        geometric: resize tables as SimMIM does (`resize_table_geometric`), not as Swin's code does (`resize_table`).

    Returns:
        One line that says what was done.

    Raises:
        UserError: the state dict is of another family, or its tensors do not fit the encoder.
    """
    family, own = check_family(state, encoder), encoder.state_dict()
    changes = []
    if "fc_norm.weight" in state:
        state = state | {"norm.weight": own["norm.weight"], "norm.bias": own["norm.bias"]}
        changes.append("the final norm is initialised, because the file has a norm of the mean token in its place")
    state = {key: value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))}

    windows = []  # of each resized table, before and after
    for key in [key for key in state if key.endswith(".table") and key in own]:
        table, new = state[key], own[key]
        if table.ndim == 2 and len(table) != len(new) and math.isqrt(len(table)) ** 2 == len(table):
            resize = resize_table_geometric if geometric else resize_table
            state[key] = resize(table, window_of(new))
            windows.append(f"{window_of(table)} to {window_of(new)}")
    if windows:
        distinct = ", ".join(dict.fromkeys(windows))
        changes.append(f"interpolated {len(windows)} relative position bias tables (window {distinct})")

    if family is VIT and state["positions"].ndim == 2:
        rows, columns = source_map(len(state["positions"]), encoder, image_size)
        if (rows, columns) != (encoder.rows, encoder.columns):
            state["positions"] = resize_positions(state["positions"], rows, encoder.rows, encoder.columns)
            new_map = f"{encoder.rows} x {encoder.columns}"
            changes.append(f"interpolated the position embedding ({rows} x {columns} to {new_map})")

    embedding = state["embed.proj.weight"]
    if embedding.ndim == 2 and len(embedding) == encoder.stem_width:
        old, new = source_channels(embedding, encoder, channels), encoder.channels
        if old != new:
            state["embed.proj.weight"] = to_channels(embedding, old, new)
            rule = "their sum" if new == 1 else f"repeated, times {old} / {new}"
            changes.append(f"adapted the patch embedding from {old} to {new} channels ({rule})")

    check_shapes(state, encoder)
    encoder.load_state_dict(state)
    return "; ".join([f"loaded all {len(state)} tensors of the encoder", *changes])


def load(path, encoder: Encoder, geometric: bool = False) -> str:
    """Loads a file of weights with `load_into`. The line that is returned begins with the file and its layout."""
    state, layout, config = open_weights(path)
    try:
        return f"{path} ({layout}): {load_into(state, encoder, **config_hints(config), geometric=geometric)}"
    except UserError as error:
        name = model_of(state, config)
        raise UserError(f"{path}: {f'holds {name}; ' if name else ''}{error}") from None


# ---------------------------------------------------------------------------------------------------------------- files


def unwrap(file: dict) -> dict:
    """The encoder's state dict in the dict that another program saved, with or without a classifier.

    Removes what data parallelism, torch.compile, Lightning, SimMIM, MoBY and OpenMMLab put before its keys, and the
    parameters beside the encoder: decoders, projectors, momentum encoders and mask tokens.
    """
    for key in ("teacher", "model", "state_dict"):
        file = file[key] if isinstance(file.get(key), dict) else file
    state = {str(key).replace("_orig_mod.", ""): value for key, value in file.items()}

    # The shortest prefix under which an encoder is, made of the names that modules around an encoder have.
    signatures = "|".join(map(re.escape, SIGNATURE_KEYS))
    pattern = re.compile(rf"((?:module\.|model\.|backbone\.|encoder\.)*)(?:{signatures})")
    prefixes = [match[1] for match in map(pattern.fullmatch, state) if match]
    prefix = min(prefixes, key=len, default="")
    state = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not re.match(r"decoder[._]", key) and not key.endswith("mask_token")
    }

    stage_norms = sorted(key for key in state if re.match(r"norm\d\.", key))
    for key in stage_norms:  # OpenMMLab has one for each stage that its detectors read; the last is Swin's final norm
        value, (module, part) = state.pop(key), key.split(".")
        if stage_norms[-1].startswith(module):
            state[f"norm.{part}"] = value
    if "embeddings.patch_embeddings.projection.weight" in state:  # Hugging Face's encoder without a classifier
        name = "vit" if "embeddings.cls_token" in state else "swin"
        state = {f"{name}.{key}": value for key, value in state.items()}
    return state


def config_hints(config: dict) -> dict:
    """What a checkpoint's config says of its encoder's images that the weights do not: number of channels and size."""
    arguments = config.get("arguments", {})
    image_size = arguments.get("image_size")
    channels = arguments.get("channels") or 3 if config else None  # older runs had 3 and did not save it
    return dict(channels=channels, image_size=to_2tuple(image_size) if image_size else None)


def read_state(file: dict) -> tuple[dict, str, dict]:
    """Reads the dict that a file of weights holds.

    Returns:
        The state dict in our names, with the classifier if there is one; the name of the layout; and the config of a
        checkpoint, else {}.
    """
    kind = file.get("kind")
    if kind not in PROGRAMS:
        state = unwrap(file)
        family, layout = detect_layout(state)
        return family.to_ours(state, layout), layout, {}
    model = file["model"]
    if "ema" in file:  # what `finetune.py --eval` evaluates; torch stores it as a wrapped module
        model = {key.removeprefix("module."): value for key, value in file["ema"].items()}
    # other programs' heads predict pixels, or the class of each pixel
    prefixes = ("encoder.", "head.", "fc_norm.") if kind == "finetune" else ("encoder.",)
    state = {key.removeprefix("encoder."): value for key, value in model.items() if key.startswith(prefixes)}
    return family_of(state).to_ours(state, "encoder"), kind, file["config"]


@lru_cache(maxsize=1)
def _read_cached(path: str, modified: float) -> tuple[dict, str, dict]:
    """`read_state` of a file. `modified` is the time of its last change, so that a changed file is read again."""
    file = load_tensors(path)
    if file.get("kind") in PROGRAMS:
        check_kind(file, path, file["kind"])
    return read_state(file)


def open_weights(path) -> tuple[dict, str, dict]:
    """`read_state` of a file, or of Hugging Face's folder, whose config.json gives image size and channels.

    A file is read once as long as it does not change. Errors name the path.
    """
    path, config_file = Path(path), None
    if (path / "model.safetensors").is_file():
        path, config_file = path / "model.safetensors", path / "config.json"
    try:
        state, layout, config = _read_cached(str(path), path.stat().st_mtime if path.exists() else 0.0)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    if config_file and config_file.is_file():
        try:
            saved = json.loads(config_file.read_text())
            config = {"arguments": {"image_size": saved.get("image_size"), "channels": saved.get("num_channels")}}
        except (ValueError, AttributeError):
            raise UserError(f"{config_file}: is not Hugging Face's; delete it to read the weights alone") from None
    return state, layout, config


def model_of(state: dict, config: dict) -> str | None:
    """The name in MODELS of the model whose weights they are, None if there is none.

    A run's config has the name. Else it is the model with the same shapes, whatever its window, map and channels.
    """

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
    state_shapes = shapes(state)
    with torch.device("meta"):
        return next((name for name, make in MODELS.items() if shapes(make().state_dict()) == state_shapes), None)


def model_in(path) -> str:
    """The name of the model whose weights a file holds. UserError if there is none."""
    state, _, config = open_weights(path)
    name = model_of(state, config)
    if name is None:
        raise UserError(f"{path}: holds none of {', '.join(MODELS)}; name the one it should start with --model")
    return name


def encoder_of(path, image_size=None) -> Encoder:
    """The encoder whose weights a file holds, on the meta device.

    Args:
        path: a file of weights.
        image_size: if not given, the one in the file's config, or else the one that a ViT's positions are for if their
            map is a square, or else 224.

    Raises:
        UserError: the weights are of none of MODELS (a new encoder needs its name there), or the image size is unknown.
    """
    state, _, config = open_weights(path)
    name, hints = model_in(path), config_hints(config)
    image_size = image_size or hints["image_size"]
    with torch.device("meta"):
        default = MODELS[name]()
        if "positions" in state and not image_size:
            image_size = [side * default.unit for side in source_map(len(state["positions"]), default, None)]
        windows = [window_of(value) for key, value in state.items() if key.endswith(".table")]
        return encoders.make(
            name,
            image_size=image_size or 224,
            window=max(windows, default=config.get("arguments", {}).get("window") or 7),
            channels=source_channels(state["embed.proj.weight"], default, hints["channels"]),
        )


def read(path) -> tuple[dict, dict | None, str]:
    """Reads any file of weights.

    Returns:
        The encoder's state dict in our names; {"head.weight", "head.bias"} or None; and the name of the layout:
        pretrain, finetune or segment for checkpoints, encoder for ours, or that of another library.

    Raises:
        UserError: the file is none of these, is corrupt, or holds pickled objects besides tensors. The path is named.
    """
    state, layout, _ = open_weights(path)
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    return {key: value for key, value in state.items() if key not in head}, head or None, layout


# ------------------------------------------------------------------------------------------ models of other libraries


def size_argument(encoder: Encoder) -> int | tuple[int, int]:
    """The image size as other libraries take it: one number for a square, else height and width."""
    height, width = encoder.image_size
    return height if height == width else (height, width)


def peers_model(layout: str, encoder: Encoder, classes: int, fc_norm: bool = False) -> tuple[str, str, list, dict]:
    """A library's model with the same parameters as an encoder.

    Returns:
        Its module, its class, and the positional and keyword arguments of the class.
    """
    family = family_of(encoder.state_dict())
    settings = family.settings(encoder)
    patch = settings["patch"]
    if layout == "torchvision":
        depths, heads, window = list(settings["depths"]), list(settings["heads"]), max(settings["windows"])
        sizes = [[patch, patch], settings["width"], depths, heads, [window, window]]
        keywords = dict(num_classes=classes) if classes else {}
        return "torchvision.models.swin_transformer", "SwinTransformer", sizes, keywords
    module, name = family.timm_class
    if layout == "microsoft":
        module = "models.swin_transformer"
    keywords = dict(img_size=size_argument(encoder), patch_size=patch)
    if encoder.channels != 3:
        keywords["in_chans"] = encoder.channels
    keywords |= family.timm_arguments(encoder) | dict(num_classes=classes)
    if family is VIT:
        keywords["fc_norm"] = fc_norm
    return module, name, [], keywords


def loading_code(layout: str, path: Path, encoder: Encoder, classes: int, fc_norm: bool) -> str:
    """A line of Python that builds a library's model and loads an exported file into it, every key."""
    if layout == "huggingface":
        name = huggingface_config(encoder, [""] * classes)["architectures"][0]
        pooling = ", add_pooling_layer=False" if name == "ViTModel" else ""
        return f"from transformers import {name}; model = {name}.from_pretrained({str(path)!r}{pooling})"
    imports, load = "torch", f"torch.load({str(path)!r}, weights_only=True)"
    if path.suffix == ".safetensors":
        imports, load = "torch, safetensors.torch", f"safetensors.torch.load_file({str(path)!r})"
    elif layout == "microsoft":
        load += "['model']"
    module, name, values, keywords = peers_model(layout, encoder, classes, fc_norm)
    arguments = ", ".join([*map(repr, values), *(f"{key}={value!r}" for key, value in keywords.items())])
    statements = [f"import {imports}", f"from {module} import {name}", f"model = {name}({arguments})"]
    if layout == "torchvision" and not classes:
        statements.append("model.head = torch.nn.Identity()")
    if layout == "torchvision" and encoder.channels != 3:  # torchvision's class takes images of 3 channels only
        patch = encoder.embed.patch
        convolution = f"torch.nn.Conv2d({encoder.channels}, {encoder.stem_width}, {patch}, {patch})"
        statements.append(f"model.features[0][0] = {convolution}")
    return "; ".join([*statements, f"model.load_state_dict({load})"])


def huggingface_config(encoder: Encoder, classes: list[str]) -> dict:
    """The config.json of an encoder, and of its classifier if there are class names, as transformers reads it.

    It is written without transformers, which is then not needed for an export. Settings that have the default of
    transformers are left out, as transformers itself leaves them out.
    """
    family = family_of(encoder.state_dict())
    config = dict(image_size=size_argument(encoder), patch_size=encoder.embed.patch, num_channels=encoder.channels)
    config |= family.huggingface_config(encoder)
    if classes:  # a Swin's: a ViT goes to Hugging Face without its classifier
        config |= dict(
            architectures=["SwinForImageClassification"],
            id2label=dict(enumerate(classes)),
            label2id={name: k for k, name in enumerate(classes)},
        )
    return config


def write_json(path: Path, values: dict):
    write_atomically(path, lambda file: file.write(f"{json.dumps(values, indent=2)}\n".encode()))


def save_folder(folder: Path, config: dict, state: dict, form: PixelFormat):
    """Writes config.json, preprocessor_config.json and model.safetensors, as from_pretrained reads them.

    Raises:
        UserError: the folder is not new and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something already, which was left as it is; give a new folder")
    if not folder.parent.is_dir():
        raise UserError(f"{str(folder)!r}: there is no folder {folder.parent}")
    folder.mkdir(exist_ok=True)
    save_tensors(folder / "model.safetensors", state, {"format": "pt"})
    height, width = to_2tuple(config["image_size"])
    preprocessor = dict(
        do_resize=True,
        size=dict(height=height, width=width),
        resample=3,  # bicubic
        do_normalize=True,
        image_mean=form.mean,
        image_std=form.std,
        pixels=form.to_dict(),
    )
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor)


def save_file(target: Path, state: dict, form: PixelFormat, layout: str | None):
    """Writes a file of weights with the format of the pixels that they were trained on.

    The format goes into the metadata of a .safetensors file, else into a JSON file beside the weights if it is not that
    of 8-bit colour images. Microsoft's layout has the weights under "model", but .safetensors holds only tensors.
    """
    if layout == "microsoft" and target.suffix != ".safetensors":
        state = {"model": state}
    save_tensors(target, state, {"format": "pt", "pixels": json.dumps(form.to_dict())})
    if target.suffix != ".safetensors" and not form.is_rgb8:
        write_json(target.with_name(f"{target.name}.pixels.json"), form.to_dict())


def main(argv=None):
    parser = flags.Parser(
        description="Exchange encoder weights with timm, Hugging Face, torchvision and Microsoft's Swin."
    )
    commands = [f"to-{layout}" for layout in EXPORTS] + [f"from-{layout}" for layout in (*EXPORTS, "openmmlab")]
    parser.add_argument("command", choices=commands)
    parser.add_argument(
        "source", help="to: any file of weights or checkpoint; from: one in that layout, or Hugging Face's folder"
    )
    parser.add_argument("target", help="the file to write, in the format of its suffix; for to-huggingface a folder")
    parser.add_argument(
        "--image-size",
        type=flags.image_size,
        metavar="PX",
        help="of the model that will load it, 224 or 224x160 (height x width); default: a checkpoint's own, else 224",
    )
    args = parser.parse_args(argv)
    direction, layout = args.command.split("-")
    is_folder = args.command == "to-huggingface"
    target = Path(args.target) if is_folder else check_output(args.target, FORMATS)
    if target.resolve() == Path(args.source).resolve():
        raise UserError(f"{args.target}: would overwrite the file that is read")

    state, source_layout, trained = open_weights(args.source)
    if direction == "from" and source_layout != layout:
        raise UserError(f"{args.source}: holds {LAYOUT_TITLES[source_layout]}, not {LAYOUT_TITLES[layout]}")
    encoder = encoder_of(args.source, args.image_size)
    classes, fc_norm = len(state.get("head.bias", [])), "fc_norm.weight" in state
    if direction == "to":
        state = to_layout(state, encoder, layout)
    else:
        check_shapes(state, encoder)
    form = PixelFormat.of(trained.get("pixels", {}))
    if is_folder:
        names = trained.get("classes") or [f"class {k}" for k in range(classes)]
        save_folder(target, huggingface_config(encoder, names if classes else []), state, form)
    else:
        save_file(target, state, form, layout if direction == "to" else None)
    print(f"wrote {args.target}: {len(state)} tensors of {family_of(encoder.state_dict()).describe(encoder)}")
    if direction == "to":
        print(f"load it: {loading_code(layout, target, encoder, classes, fc_norm)}")
        if not form.is_rgb8:
            value_range = form.value_range
            if form.low:
                value_range = f"{form.low} to {form.high}"
            elif not isinstance(value_range, str):
                value_range = "{:g} to {:g}".format(*value_range)
            normalization = f"minus {form.mean}, over {form.std}"
            print(f"its images: {form.channels} channels, values {value_range} as 0 to 1, {normalization}")
    return 0


if __name__ == "__main__":
    run_main(main)
