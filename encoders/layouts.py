"""The names that encoders' weights have here and in other libraries: one table a family, read from left to right and back.

A state dict is a plain dict of tensors: an encoder's own keys, and `head.weight`, `head.bias` beside them where there is a
classifier. Tensors are renamed and reshaped, never computed with, but for two sums that are exact: a Vision Transformer's class
token, which holds its own position here. `StateDictMap.to_ours` and `to_theirs` go both ways; weights.py has the commands.
"""

import re
from collections import Counter

import torch
from einops import rearrange

from engine.errors import UserError

CALLED = {
    "encoder": "this project's layout",
    "torchvision": "torchvision's layout",
    "timm": "timm's layout",
    "microsoft": "Microsoft's layout",
    "openmmlab": "OpenMMLab's layout",
    "huggingface": "Hugging Face's layout",
    "pretrain": "a checkpoint of train.py",
    "finetune": "a checkpoint of finetune.py",
    "segment": "a checkpoint of segment.py",
}
BUFFERS = (
    "relative_position_index",
    "attn_mask",
)  # follow from window and map; written by weights.py where a library wants them


def first_few(items) -> str:
    items = list(items)
    return f"{len(items)} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})"


def has_head(state: dict) -> bool:
    return any(key.startswith("head.") for key in state)


def optional(state: dict, head: str = "head") -> set[str]:
    """Which of the parts that an encoder need not have are in a state dict: a classifier, and the norm of the mean token before it."""
    return {
        part
        for part, name in (("head", head), ("fc_norm", "fc_norm"))
        if any(key.startswith(name + ".") for key in state)
    }


def check_keys(state: dict, expected, layout: str):
    """UserError unless the keys are exactly the expected ones and each holds a tensor of real numbers."""
    expected = set(expected)
    wrong = {
        "missing keys": sorted(expected - set(state)),
        "keys that do not belong": sorted(set(state) - expected),
        "entries that are no tensor of real numbers": sorted(
            key for key, value in state.items() if not (isinstance(value, torch.Tensor) and value.is_floating_point())
        ),
    }
    if any(wrong.values()):
        raise UserError(
            f"{CALLED[layout]}, but " + "; ".join(f"{what}: {first_few(keys)}" for what, keys in wrong.items() if keys)
        )


def table(text: str) -> list[list[str]]:
    """Rows of cells, which two blanks or more part."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.strip().splitlines()]


class StateDictMap:
    """The names of a kind of encoder. Rows of `rows` begin with our name, then one for each column; a last cell with an arrow is how a tensor's
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

    def names(self, layout: str, depths: tuple, parts: set[str]) -> dict[str, tuple[str, str, int]]:
        """{our key: (the layout's key, how axes go, stage)} of an encoder with `depths` blocks per stage, and of its optional parts."""
        found = {}
        for row in self.rows:
            missing = {
                "{head}.{x}": "head" not in parts,
                "fc_norm.{x}": "fc_norm" not in parts,
                "norm.{x}": "fc_norm" in parts,
            }
            if missing.get(row[0]):
                continue
            places = [(0, 0)]
            if "{block}" in row[0]:
                places = [
                    (i, j)
                    for i, depth in enumerate(depths)
                    for j in range(depth)
                    if self.has_parameter(row[0], i, j, len(depths))
                ]
            elif "{merge}" in row[0] or "{i}" in row[0]:
                places = [(i, 0) for i in range(len(depths) - ("{merge}" in row[0]))]
            pattern = row[-1] if "->" in row[-1] and layout != "encoder" else ""
            for i, j in places:
                for x in ("weight", "bias") if "{x}" in row[0] else ("",):
                    found[self.name_of(row, "encoder", i, j, x)] = (self.name_of(row, layout, i, j, x), pattern, i)
        return found

    def has_parameter(self, row: str, i: int, j: int, stages: int) -> bool:
        """Whether block j of stage i has the parameter of a row."""
        return True

    def check_keys(self, state: dict, layout: str) -> dict[str, tuple[str, str, int]]:
        """The names of what a state dict in a layout holds. UserError for a key too many or too few."""
        names = self.names(layout, self.count_blocks(state, layout), optional(state, self.places[layout]["head"]))
        check_keys(state, [part for theirs, _, _ in names.values() for part in split_qkv(theirs)], layout)
        return names

    def count_blocks(self, keys, layout: str) -> tuple:
        """Blocks in each stage. They are counted, so a gap in the numbers shows up as a missing key."""
        pattern = (
            self.places[layout]["block"]
            .replace(".", r"\.")
            .format(i=r"(?P<i>\d+)", j=r"(?P<j>\d+)", odd=r"(?P<i>\d*[13579])")
            + r"\."
        )
        blocks = {(match.groupdict().get("i", "0"), match["j"]) for key in keys if (match := re.match(pattern, key))}
        stages = Counter(stage for stage, _ in blocks)
        return tuple(stages[stage] for stage in sorted(stages, key=int))

    # an encoder ---------------------------------------------------------------------------------------------------------

    def settings(self, encoder) -> dict:
        """What two encoders must share to have the same weights, and besides windows (a Swin's), rows and columns (a ViT's) and channels."""
        return dict(
            patch=encoder.embed.patch, channels=encoder.channels, width=encoder.stem_width, depths=encoder.depths
        )

    def describe(self, encoder) -> str:
        return f"a {self.title} of " + ", ".join(f"{name} {value}" for name, value in self.settings(encoder).items())

    # both ways --------------------------------------------------------------------------------------------------------

    def axes(self, key: str, encoder, i: int) -> dict:
        """Lengths that the pattern of a row needs on our side."""
        return dict(c=encoder.channels, p=encoder.embed.patch)

    def to_theirs(self, state: dict, layout: str, encoder) -> dict:
        """An encoder's state dict, and its classifier's, in a layout's names, without derived buffers. Tensors are shared with `state`."""
        out = {}
        for ours, (theirs, pattern, i) in self.names(
            layout, self.count_blocks(state, "encoder"), optional(state)
        ).items():
            value = rearrange(state[ours], pattern, **self.axes(ours, encoder, i)) if pattern else state[ours]
            keys = split_qkv(theirs)
            out |= dict(zip(keys, value.chunk(3) if len(keys) == 3 else [value]))
        return out

    def to_ours(self, state: dict, layout: str) -> dict:
        """A state dict in our names. Tensors are shared with `state` where they can be. UserError for keys or shapes that do not fit."""
        state = {key: value for key, value in state.items() if key.split(".")[-1] not in BUFFERS}
        out = {}
        for ours, (theirs, pattern, _) in self.check_keys(state, layout).items():
            keys = split_qkv(theirs)
            value = torch.cat([state[key] for key in keys]) if len(keys) == 3 else state[theirs]
            if pattern:
                here, there = (side.strip() for side in pattern.split("->"))
                if value.ndim != len(there.split()) or there.endswith("c p q") and value.shape[-1] != value.shape[-2]:
                    raise UserError(
                        f"{theirs} of shape {tuple(value.shape)}: axes ({there}) are expected, p as long as q"
                    )
                value = rearrange(value, f"{there} -> {here}")
            out[ours] = value
        return self.postprocess(out, layout)

    def postprocess(self, out: dict, layout: str) -> dict:
        """What renaming and reshaping leave to do on the way in."""
        return out


def split_qkv(name: str) -> list[str]:
    """A key, or the three that stand where we have one."""
    return [name.replace("{three}", part) for part in ("query", "key", "value")] if "{three}" in name else [name]


class SwinMap(StateDictMap):
    title = "Swin Transformer"
    places = {  # timm, from 0.9 on, opens stage i + 1 with the merging that closes our stage i
        "encoder": dict(column=0, block="stages.{i}.blocks.{j}", merge="stages.{i}.merge", head="head"),
        "torchvision": dict(column=1, block="features.{odd}.{j}", merge="features.{even}", head="head"),
        "timm": dict(column=2, block="layers.{i}.blocks.{j}", merge="layers.{next}.downsample", head="head.fc"),
        "microsoft": dict(column=2, block="layers.{i}.blocks.{j}", merge="layers.{i}.downsample", head="head"),
        "openmmlab": dict(
            column=3, block="stages.{i}.blocks.{j}", merge="stages.{i}.downsample", head="head.fc"
        ),  # read only
        "huggingface": dict(
            column=4,
            block="swin.encoder.layers.{i}.blocks.{j}",
            merge="swin.encoder.layers.{i}.downsample",
            head="classifier",
        ),
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

    def settings(self, encoder):
        heads = tuple(stage.blocks[0].attention.heads for stage in encoder.stages)
        return super().settings(encoder) | dict(heads=heads, windows=encoder.windows)

    def postprocess(self, out, layout):
        if layout == "openmmlab":  # unfolds channels first, and the four tokens row by row
            out |= {
                key: rearrange(
                    rearrange(value, "... (c k) -> ... k c", k=4)[..., [0, 2, 1, 3], :], "... k c -> ... (k c)"
                )
                for key, value in out.items()
                if ".merge." in key
            }
        return out


class ViTMap(StateDictMap):
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
        fc_norm.{x}                 fc_norm.{x}              none
        {head}.{x}                  {head}.{x}               {head}.{x}
    """)

    def settings(self, encoder):
        return dict(
            patch=encoder.unit,
            channels=encoder.channels,
            width=encoder.width,
            depth=encoder.depth,
            heads=encoder.blocks[0].attention.heads,
            rows=encoder.rows,
            columns=encoder.columns,
        )

    def axes(self, key, encoder, i):
        return super().axes(key, encoder, i) if key == "embed.proj.weight" else {}

    def to_theirs(self, state, layout, encoder):
        """The class token's position is zeros: ours holds their sum."""
        if layout == "huggingface" and optional(state):
            raise UserError(
                "Hugging Face's ViT classifies by its class token, ours by the mean of all tokens: only the encoder can go there"
            )
        return super().to_theirs(
            state | {"positions": torch.cat([torch.zeros_like(state["positions"][:1]), state["positions"]])},
            layout,
            encoder,
        )

    def postprocess(self, out, layout):
        return out | {"class_token": out["class_token"] + out["positions"][0], "positions": out["positions"][1:]}


class TwinsMap(StateDictMap):
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

    def has_parameter(self, row, i, j, stages):
        """Even blocks attend inside windows; odd ones to summaries, which the last stage does not need to make."""
        part = row.split(".")[2] if ".attention." in row else None
        if part in (None, "proj"):
            return True
        return part == "qkv" if j % 2 == 0 else part in ("q", "kv") or part in ("reduce", "norm") and i < stages - 1

    def axes(self, key, encoder, i):
        side = 2 if ".merge." in key else 2 ** (len(encoder.depths) - 1 - i)
        return super().axes(key, encoder, i) if key == "embed.proj.weight" else dict(p=side, q=side)


SWIN, VIT, TWINS = SwinMap(), ViTMap(), TwinsMap()


def family_of(state: dict) -> StateDictMap:
    """The family of a state dict in our names."""
    if "class_token" in state:
        return VIT
    return TWINS if "stages.0.positions.weight" in state else SWIN


ANCHORS = {  # a key that a layout has and no other: (family, layout); timm's and Microsoft's Swin are told apart by where the merging stands
    "stages.0.positions.weight": (TWINS, "encoder"),
    "class_token": (VIT, "encoder"),
    "embed.proj.weight": (SWIN, "encoder"),
    "features.0.0.weight": (SWIN, "torchvision"),
    "patch_embed.projection.weight": (SWIN, "openmmlab"),
    "swin.embeddings.patch_embeddings.projection.weight": (SWIN, "huggingface"),
    "vit.embeddings.patch_embeddings.projection.weight": (VIT, "huggingface"),
    "patch_embeds.0.proj.weight": (TWINS, "timm"),
    "cls_token": (VIT, "timm"),
    "patch_embed.proj.weight": (SWIN, "timm"),
}


def recognise(state: dict) -> tuple[StateDictMap, str]:
    """Which family and layout the keys are in; UserError if none."""
    if any(key.endswith(".logit_scale") for key in state):
        raise UserError("a Swin Transformer V2, whose attention is another one; the first version is read")
    found = next((place for anchor, place in ANCHORS.items() if anchor in state), None)
    if found is None or "conv_proj.weight" in state:
        raise UserError(
            "no encoder of this project, torchvision, timm, Microsoft, OpenMMLab or Hugging Face; its keys: "
            + first_few(map(str, state))
        )
    if found == (SWIN, "timm"):
        opens = any(key.startswith("layers.1.downsample.") for key in state) and not any(
            key.startswith("layers.0.downsample.") for key in state
        )
        return SWIN, "timm" if opens or "head.fc.weight" in state else "microsoft"
    return found
