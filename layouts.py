"""The names that encoders' weights have here and in other libraries: one table a family, read from left to right and back.

A state dict is a plain dict of tensors: an encoder's own keys, and `head.weight`, `head.bias` beside them where there is a
classifier. Tensors are renamed and reshaped, never computed with, but for two sums that are exact: a Vision Transformer's class
token, which holds its own position here. `Family.to_ours` and `Family.to_theirs` go both ways; weights.py has the commands.
"""
import math
import re
from abc import ABC, abstractmethod
from collections import Counter

import torch
from einops import rearrange

from engine.errors import UserError
from swin import Swin
from twins import Twins
from vit import ViT

CALLED = {"encoder": "this project's layout", "torchvision": "torchvision's layout", "timm": "timm's layout", "microsoft": "Microsoft's layout",
          "openmmlab": "OpenMMLab's layout", "huggingface": "Hugging Face's layout", "pretrain": "a checkpoint of train.py",
          "finetune": "a checkpoint of finetune.py", "segment": "a checkpoint of segment.py"}
BUFFERS = ("relative_position_index", "attn_mask")  # follow from window and map; written by weights.py where a library wants them


def first_few(items) -> str:
    items = list(items)
    return f"{len(items)} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})"


def has_head(state: dict) -> bool:
    return any(key.startswith("head.") for key in state)


def check_keys(state: dict, expected, layout: str):
    """UserError unless the keys are exactly the expected ones and each holds a tensor of real numbers."""
    expected = set(expected)
    wrong = {"missing keys": sorted(expected - set(state)), "keys that do not belong": sorted(set(state) - expected),
             "entries that are no tensor of real numbers": sorted(
                 key for key, value in state.items() if not (isinstance(value, torch.Tensor) and value.is_floating_point()))}
    if any(wrong.values()):
        raise UserError(f"{CALLED[layout]}, but " + "; ".join(f"{what}: {first_few(keys)}" for what, keys in wrong.items() if keys))


def table(text: str) -> list[list[str]]:
    """Rows of cells, which two blanks or more part."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()]


class Family(ABC):
    """A kind of encoder. Rows of `rows` begin with our name, then one for each column; a last cell with an arrow is how a tensor's
    axes go from ours to theirs, and, read backwards, from theirs to ours. {x}: weight and bias. {three}: query, key and value,
    three tensors where we have one. `places`: what {block}, {merge}, {head} stand for in a layout; {i}, {j}: stage and block;
    {odd}, {even}, {next}: 2i + 1, 2i + 2, i + 1.
    """
    title: str
    places: dict[str, dict]
    rows: list[list[str]]

    # names ------------------------------------------------------------------------------------------------------------

    def name_of(self, row: list, layout: str, i: int, j: int, x: str) -> str:
        place, numbers = self.places[layout], dict(i=i, j=j, odd=2 * i + 1, even=2 * i + 2, next=i + 1)
        parts = {part: place[part].format(**numbers) for part in ("block", "merge", "head") if part in place}
        return row[place["column"]].format(x=x, three="{three}", **parts, **numbers)

    def names(self, layout: str, depths: tuple, head: bool) -> dict[str, tuple[str, str, int]]:
        """{our key: (the layout's key, how axes go, stage)} of an encoder with `depths` blocks per stage, and of its classifier."""
        found = {}
        for row in self.rows:
            if "{head}" in row[0] and not head:
                continue
            places = [(0, 0)]
            if "{block}" in row[0]:
                places = [(i, j) for i, depth in enumerate(depths) for j in range(depth) if self.has(row[0], i, j, len(depths))]
            elif "{merge}" in row[0] or "{i}" in row[0]:
                places = [(i, 0) for i in range(len(depths) - ("{merge}" in row[0]))]
            pattern = row[-1] if "->" in row[-1] and layout != "encoder" else ""
            for i, j in places:
                for x in ("weight", "bias") if "{x}" in row[0] else ("",):
                    found[self.name_of(row, "encoder", i, j, x)] = (self.name_of(row, layout, i, j, x), pattern, i)
        return found

    def has(self, row: str, i: int, j: int, stages: int) -> bool:
        """Whether block j of stage i has the parameter of a row."""
        return True

    def keys(self, layout: str, depths: tuple, head: bool) -> list[str]:
        """All keys of a layout."""
        return [part for theirs, _, _ in self.names(layout, depths, head).values() for part in spread(theirs)]

    def count_blocks(self, keys, layout: str) -> tuple:
        """Blocks in each stage. They are counted, so a gap in the numbers shows up as a missing key."""
        pattern = self.places[layout]["block"].replace(".", r"\.").format(i=r"(?P<i>\d+)", j=r"(?P<j>\d+)", odd=r"(?P<i>\d*[13579])") + r"\."
        blocks = {(match.groupdict().get("i", "0"), match["j"]) for key in keys if (match := re.match(pattern, key))}
        stages = Counter(stage for stage, _ in blocks)
        return tuple(stages[stage] for stage in sorted(stages, key=int))

    # shapes -----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def settings(self, state: dict, depths: tuple, image_size: tuple | None) -> dict:
        """What a state dict in our names says of its encoder: width, depths and so on, unchecked. ValueError if it says nothing."""

    @abstractmethod
    def sizes(self, shape: dict) -> dict[str, tuple]:
        """{our key: shape} of an encoder of such settings, made without numbers. ValueError where there is no such encoder."""

    def shape(self, state: dict, channels: int | None = None, image_size: tuple | None = None) -> dict:
        """Settings of the encoder that a state dict in our names belongs to. UserError for keys or shapes that no encoder has.

        channels of an image, and the image size of a ViT's positions, are not in the weights: 3 and a square unless told, and where 3 cannot
        be, the fewest that leave a patch of 2, 4, 8 or 16 pixels.
        """
        depths = self.count_blocks(state, "encoder")
        check_keys(state, self.keys("encoder", depths, has_head(state)), "encoder")
        try:
            shape = patch_and_channels(state["embed.proj.weight"], channels) | self.settings(state, depths, image_size)
            sizes = self.sizes(shape)
        except (ValueError, ZeroDivisionError, IndexError) as error:
            raise UserError(f"not a {self.title} that can be built here: {error}") from None
        if "head.weight" in state:
            classes = state["head.bias"].numel()
            sizes |= {"head.weight": (classes, sizes["norm.weight"][0]), "head.bias": (classes,)}
        wrong = [f"{key} {tuple(state[key].shape)} where {size} is expected" for key, size in sizes.items() if tuple(state[key].shape) != size]
        if wrong:
            raise UserError(f"not a {self.title} of {self.describe(shape)}: {first_few(wrong)}")
        return shape

    def describe(self, shape: dict) -> str:
        """What two encoders must share to have the same weights."""
        return ", ".join(f"{name} {value}" for name, value in shape.items() if name not in ("windows", "rows", "columns", "channels"))

    def unit(self, shape: dict) -> int:
        """Pixels per side that one final token covers."""
        return shape["patch"] * 2 ** (len(shape.get("depths", [0])) - 1)

    # both ways --------------------------------------------------------------------------------------------------------

    def axes(self, key: str, shape: dict, i: int) -> dict:
        """Lengths that the pattern of a row needs on our side."""
        return dict(c=shape["channels"], p=shape["patch"])

    def to_theirs(self, state: dict, layout: str, shape: dict) -> dict:
        """A state dict in a layout's names, without derived buffers. Tensors are shared with `state`."""
        out = {}
        for ours, (theirs, pattern, i) in self.names(layout, self.depths(shape), has_head(state)).items():
            value = rearrange(state[ours], pattern, **self.axes(ours, shape, i)) if pattern else state[ours]
            keys = spread(theirs)
            out |= dict(zip(keys, value.chunk(3) if len(keys) == 3 else [value]))
        return out

    def to_ours(self, state: dict, layout: str) -> dict:
        """A state dict in our names. Tensors are shared with `state` where they can be. UserError for keys or shapes that do not fit."""
        state = {key: value for key, value in state.items() if key.split(".")[-1] not in BUFFERS}
        names = self.names(layout, self.count_blocks(state, layout), any(key.startswith(self.places[layout]["head"] + ".") for key in state))
        check_keys(state, [part for theirs, _, _ in names.values() for part in spread(theirs)], layout)
        out, channels = {}, None
        for ours, (theirs, pattern, _) in names.items():
            keys = spread(theirs)
            value = torch.cat([state[key] for key in keys]) if len(keys) == 3 else state[theirs]
            if pattern:
                here, there = (side.strip() for side in pattern.split("->"))
                if value.ndim != len(there.split()) or there.endswith("c p q") and value.shape[-1] != value.shape[-2]:
                    raise UserError(f"{theirs} of shape {tuple(value.shape)}: axes ({there}) are expected, p as long as q")
                channels = value.shape[1] if ours == "embed.proj.weight" else channels
                value = rearrange(value, f"{there} -> {here}")
            out[ours] = value
        out = self.adjusted(out, layout)
        self.shape(out, channels)
        return out

    def adjusted(self, out: dict, layout: str) -> dict:
        """What renaming and reshaping leave to do on the way in."""
        return out

    def depths(self, shape: dict) -> tuple:
        return shape["depths"]


def patch_and_channels(embed: torch.Tensor, channels: int | None) -> dict:
    """Settings of a patch embedding (k, c * p * q) in our form. ValueError where there are none. channels: see `Family.shape`."""
    if embed.ndim != 2:
        raise ValueError("the patch embedding must be a matrix")
    values = embed.shape[1]
    squares = [c for c in (3, *(values // patch ** 2 for patch in (16, 8, 4, 2)), channels or 0) if c and math.isqrt(values // c) ** 2 * c == values]
    if not squares or channels and channels not in squares:
        raise ValueError(f"a patch embedding of {values} values is of no square patch" + (f" of {channels} channels" if channels else ""))
    channels = channels or squares[0]
    return dict(patch=math.isqrt(embed.shape[1] // channels), channels=channels)


def spread(name: str) -> list[str]:
    """A key, or the three that stand where we have one."""
    return [name.replace("{three}", part) for part in ("query", "key", "value")] if "{three}" in name else [name]


class SwinFamily(Family):
    title = "Swin Transformer"
    places = {  # timm, from 0.9 on, opens stage i + 1 with the merging that closes our stage i
        "encoder": dict(column=0, block="stages.{i}.blocks.{j}", merge="stages.{i}.merge", head="head"),
        "torchvision": dict(column=1, block="features.{odd}.{j}", merge="features.{even}", head="head"),
        "timm": dict(column=2, block="layers.{i}.blocks.{j}", merge="layers.{next}.downsample", head="head.fc"),
        "microsoft": dict(column=2, block="layers.{i}.blocks.{j}", merge="layers.{i}.downsample", head="head"),
        "openmmlab": dict(column=3, block="stages.{i}.blocks.{j}", merge="stages.{i}.downsample", head="head.fc"),  # read only
        "huggingface": dict(column=4, block="swin.encoder.layers.{i}.blocks.{j}", merge="swin.encoder.layers.{i}.downsample", head="classifier"),
    }
    rows = table("""
        embed.proj.weight          features.0.0.weight                        patch_embed.proj.weight                    patch_embed.projection.weight                    swin.embeddings.patch_embeddings.projection.weight     k (c p q) -> k c p q
        embed.proj.bias            features.0.0.bias                          patch_embed.proj.bias                      patch_embed.projection.bias                      swin.embeddings.patch_embeddings.projection.bias
        embed.norm.{x}             features.0.2.{x}                           patch_embed.norm.{x}                       patch_embed.norm.{x}                             swin.embeddings.norm.{x}
        {block}.norm1.{x}          {block}.norm1.{x}                          {block}.norm1.{x}                          {block}.norm1.{x}                                {block}.layernorm_before.{x}
        {block}.attention.table    {block}.attn.relative_position_bias_table  {block}.attn.relative_position_bias_table  {block}.attn.w_msa.relative_position_bias_table  {block}.attention.self.relative_position_bias_table
        {block}.attention.qkv.{x}  {block}.attn.qkv.{x}                       {block}.attn.qkv.{x}                       {block}.attn.w_msa.qkv.{x}                       {block}.attention.self.{three}.{x}
        {block}.attention.proj.{x}  {block}.attn.proj.{x}                     {block}.attn.proj.{x}                      {block}.attn.w_msa.proj.{x}                      {block}.attention.output.dense.{x}
        {block}.norm2.{x}          {block}.norm2.{x}                          {block}.norm2.{x}                          {block}.norm2.{x}                                {block}.layernorm_after.{x}
        {block}.mlp.up.{x}         {block}.mlp.0.{x}                          {block}.mlp.fc1.{x}                        {block}.ffn.layers.0.0.{x}                       {block}.intermediate.dense.{x}
        {block}.mlp.down.{x}       {block}.mlp.3.{x}                          {block}.mlp.fc2.{x}                        {block}.ffn.layers.1.{x}                         {block}.output.dense.{x}
        {merge}.norm.{x}           {merge}.norm.{x}                           {merge}.norm.{x}                           {merge}.norm.{x}                                 {merge}.norm.{x}
        {merge}.reduction.weight   {merge}.reduction.weight                   {merge}.reduction.weight                   {merge}.reduction.weight                         {merge}.reduction.weight
        norm.{x}                   norm.{x}                                   norm.{x}                                   norm.{x}                                         swin.layernorm.{x}
        {head}.{x}                 {head}.{x}                                 {head}.{x}                                 {head}.{x}                                       {head}.{x}
    """)

    def settings(self, state, depths, image_size):
        tables = [state[f"stages.{i}.blocks.0.attention.table"] for i in range(len(depths))]
        if not tables or any(table.ndim != 2 for table in tables):
            raise ValueError("position tables must be matrices")
        return dict(width=len(state["embed.proj.weight"]), depths=depths, heads=tuple(table.shape[1] for table in tables),
                    windows=tuple((math.isqrt(len(table)) + 1) // 2 for table in tables))

    def sizes(self, shape):
        settings = {key: value for key, value in shape.items() if key != "windows"}
        with torch.device("meta"):
            twin = Swin(image_size=self.unit(shape), window=1, **settings)
        sizes = {key: tuple(value.shape) for key, value in twin.state_dict().items()}
        for i, (window, heads) in enumerate(zip(shape["windows"], shape["heads"])):
            sizes |= {f"stages.{i}.blocks.{j}.attention.table": ((2 * window - 1) ** 2, heads) for j in range(shape["depths"][i])}
        return sizes

    def adjusted(self, out, layout):
        if layout == "openmmlab":  # unfolds channels first, and the four tokens row by row
            out |= {key: rearrange(rearrange(value, "... (c k) -> ... k c", k=4)[..., [0, 2, 1, 3], :], "... k c -> ... (k c)")
                    for key, value in out.items() if ".merge." in key}
        return out


class ViTFamily(Family):
    title = "Vision Transformer"
    places = {
        "encoder": dict(column=0, block="blocks.{j}", head="head"),
        "timm": dict(column=1, block="blocks.{j}", head="head"),  # and MAE's encoder
        "huggingface": dict(column=2, block="vit.encoder.layer.{j}", head="classifier"),
    }
    rows = table("""
        embed.proj.weight           patch_embed.proj.weight  vit.embeddings.patch_embeddings.projection.weight   k (c p q) -> k c p q
        embed.proj.bias             patch_embed.proj.bias    vit.embeddings.patch_embeddings.projection.bias
        class_token                 cls_token                vit.embeddings.cls_token                            k -> 1 1 k
        positions                   pos_embed                vit.embeddings.position_embeddings                  t k -> 1 t k
        {block}.norm1.{x}           {block}.norm1.{x}        {block}.layernorm_before.{x}
        {block}.attention.qkv.{x}   {block}.attn.qkv.{x}     {block}.attention.attention.{three}.{x}
        {block}.attention.proj.{x}  {block}.attn.proj.{x}    {block}.attention.output.dense.{x}
        {block}.norm2.{x}           {block}.norm2.{x}        {block}.layernorm_after.{x}
        {block}.mlp.up.{x}          {block}.mlp.fc1.{x}      {block}.intermediate.dense.{x}
        {block}.mlp.down.{x}        {block}.mlp.fc2.{x}      {block}.output.dense.{x}
        norm.{x}                    norm.{x}                 vit.layernorm.{x}
        {head}.{x}                  {head}.{x}               {head}.{x}
    """)

    def settings(self, state, depths, image_size):
        width, positions = len(state["embed.proj.weight"]), state["positions"]
        if positions.ndim != 2:
            raise ValueError("positions must be a matrix")
        rows, columns = image_size or (1, 1)  # only their ratio counts: the patch is not known here
        rows = round(math.sqrt(len(positions) * rows / columns))
        rows = rows if rows and len(positions) % rows == 0 else math.isqrt(len(positions))
        if rows * (len(positions) // rows) != len(positions):
            raise ValueError(f"positions of {len(positions)} patches are no square map: the image size must be told")
        # 64 channels a head, as in every published size: the weights themselves do not say
        return dict(width=width, depth=sum(depths), heads=max(1, width // 64), rows=rows, columns=len(positions) // rows)

    def sizes(self, shape):
        settings = {key: value for key, value in shape.items() if key not in ("rows", "columns")}
        with torch.device("meta"):
            twin = ViT(image_size=(shape["rows"] * shape["patch"], shape["columns"] * shape["patch"]), **settings)
        return {key: tuple(value.shape) for key, value in twin.state_dict().items()}

    def depths(self, shape):
        return (shape["depth"],)

    def axes(self, key, shape, i):
        return super().axes(key, shape, i) if key == "embed.proj.weight" else {}

    def to_theirs(self, state, layout, shape):
        """The class token's position is zeros: ours holds their sum."""
        if layout == "huggingface" and has_head(state):
            raise UserError("Hugging Face's ViT classifies by its class token, ours by the mean of all tokens: only the encoder can go there")
        return super().to_theirs(state | {"positions": torch.cat([torch.zeros_like(state["positions"][:1]), state["positions"]])}, layout, shape)

    def adjusted(self, out, layout):
        return out | {"class_token": out["class_token"] + out["positions"][0], "positions": out["positions"][1:]}


class TwinsFamily(Family):
    title = "Twins-SVT"
    places = {
        "encoder": dict(column=0, block="stages.{i}.blocks.{j}", merge="stages.{i}.merge", head="head"),
        "timm": dict(column=1, block="blocks.{i}.{j}", merge="patch_embeds.{next}", head="head"),
    }
    rows = table("""
        embed.proj.weight              patch_embeds.0.proj.weight   k (c p q) -> k c p q
        embed.proj.bias                patch_embeds.0.proj.bias
        embed.norm.{x}                 patch_embeds.0.norm.{x}
        stages.{i}.positions.{x}       pos_block.{i}.proj.0.{x}
        {block}.norm1.{x}              {block}.norm1.{x}
        {block}.attention.qkv.{x}      {block}.attn.qkv.{x}
        {block}.attention.q.{x}        {block}.attn.q.{x}
        {block}.attention.reduce.weight  {block}.attn.sr.weight     k (p q c) -> k c p q
        {block}.attention.reduce.bias  {block}.attn.sr.bias
        {block}.attention.norm.{x}     {block}.attn.norm.{x}
        {block}.attention.kv.{x}       {block}.attn.kv.{x}
        {block}.attention.proj.{x}     {block}.attn.proj.{x}
        {block}.norm2.{x}              {block}.norm2.{x}
        {block}.mlp.up.{x}             {block}.mlp.fc1.{x}
        {block}.mlp.down.{x}           {block}.mlp.fc2.{x}
        {merge}.reduction.weight       {merge}.proj.weight          k (q p c) -> k c p q
        {merge}.reduction.bias         {merge}.proj.bias
        {merge}.norm.{x}               {merge}.norm.{x}
        norm.{x}                       norm.{x}
        {head}.{x}                     {head}.{x}
    """)

    def has(self, row, i, j, stages):
        """Even blocks attend inside windows; odd ones to summaries, which the last stage does not need to make."""
        part = row.split(".")[2] if ".attention." in row else None
        if part in (None, "proj"):
            return True
        return part == "qkv" if j % 2 == 0 else part in ("q", "kv") or part in ("reduce", "norm") and i < stages - 1

    def settings(self, state, depths, image_size):
        if not depths:
            raise ValueError("there are no blocks")
        return dict(width=len(state["embed.proj.weight"]), depths=depths)

    def sizes(self, shape):
        with torch.device("meta"):
            twin = Twins(image_size=self.unit(shape), **shape)
        return {key: tuple(value.shape) for key, value in twin.state_dict().items()}

    def axes(self, key, shape, i):
        side = 2 if ".merge." in key else 2 ** (len(shape["depths"]) - 1 - i)
        return super().axes(key, shape, i) if key == "embed.proj.weight" else dict(p=side, q=side)


SWIN, VIT, TWINS = FAMILIES = SwinFamily(), ViTFamily(), TwinsFamily()


def family_of(state: dict) -> Family:
    """The family of a state dict in our names. UserError if there is none."""
    if "class_token" in state:
        return VIT
    return TWINS if "stages.0.positions.weight" in state else SWIN


ANCHORS = {  # a key that a layout has and no other: (family, layout); timm's and Microsoft's Swin are told apart by where the merging stands
    "stages.0.positions.weight": (TWINS, "encoder"), "class_token": (VIT, "encoder"), "embed.proj.weight": (SWIN, "encoder"),
    "features.0.0.weight": (SWIN, "torchvision"), "patch_embed.projection.weight": (SWIN, "openmmlab"),
    "swin.embeddings.patch_embeddings.projection.weight": (SWIN, "huggingface"),
    "vit.embeddings.patch_embeddings.projection.weight": (VIT, "huggingface"),
    "patch_embeds.0.proj.weight": (TWINS, "timm"), "cls_token": (VIT, "timm"), "patch_embed.proj.weight": (SWIN, "timm"),
}


def recognise(state: dict) -> tuple[Family, str]:
    """Which family and layout the keys are in; UserError if none."""
    if any(key.endswith(".logit_scale") for key in state):
        raise UserError("a Swin Transformer V2, whose attention is another one; the first version is read")
    found = next((place for anchor, place in ANCHORS.items() if anchor in state), None)
    if found is None or "conv_proj.weight" in state:
        raise UserError("no encoder of this project, torchvision, timm, Microsoft, OpenMMLab or Hugging Face; its keys: "
                        + first_few(map(str, state)))
    if found == (SWIN, "timm"):
        opens = any(key.startswith("layers.1.downsample.") for key in state) and not any(key.startswith("layers.0.downsample.") for key in state)
        return SWIN, "timm" if opens or "head.fc.weight" in state else "microsoft"
    return found
