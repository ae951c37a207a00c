"""The names of an encoder's weights here and in other libraries, and the arguments that build the same network there.

A state dict is a plain dict of tensors: the encoder's own keys and, where there is a classifier, `head.weight` and
`head.bias`. Tensors are renamed and reshaped, and not computed with. The one exception is a Vision Transformer's class
token: ours contains its own position, so the two are added on the way in. `StateDictMap.to_ours` and
`StateDictMap.to_theirs` convert in both directions; the commands are in weights.py.
"""

import re
from collections import Counter
from itertools import product

import torch
from einops import rearrange

from engine.errors import UserError

LAYOUT_TITLES = {
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
# Buffers that follow from the window and the map. They are dropped on the way in, and weights.py writes them where a
# library expects them.
DERIVED_BUFFERS = ("relative_position_index", "attn_mask")


def summarize(items) -> str:
    """The number of items and the first four of them, for an error message."""
    items = list(items)
    return f"{len(items)} ({', '.join(items[:4])}{', ...' if len(items) > 4 else ''})"


def parse_table(text: str) -> dict[str, tuple[str, str]]:
    """Parses rows of two or three cells: our name, the library's name, and an einops pattern where the axes differ.

    Returns:
        {our name: (the library's name, the pattern from our axes to theirs, or "")}. Names are templates: {i} is the
        stage and {j} the block; {odd}, {even} and {next} are 2 i + 1, 2 i + 2 and i + 1; {x} stands for weight and
        bias, and {qkv} for query, key and value, three tensors where we have one.
    """
    rows = [line.split(maxsplit=2) for line in text.strip().splitlines()]
    return {ours: (theirs, "".join(axes)) for ours, theirs, *axes in rows}


class StateDictMap:
    """The parameters of one family of encoders, by name, in each layout that the family exists in.

    Attributes:
        title: the family's name in messages.
        tables: for each layout, the library's name and axes of each parameter; see `parse_table`.
        timm_class: module and class of the family in timm.

    Each family also has `timm_arguments(encoder)`: what `timm_class` is called with for the same network, besides image
    size, patch, channels and classes. Families with a Hugging Face layout have `huggingface_config(encoder)`: their
    part of config.json, which holds the sizes and what differs from the defaults of transformers.
    """

    title: str
    tables: dict[str, dict[str, tuple[str, str]]]
    timm_class: tuple[str, str]

    def __init__(self):
        self.tables = {"encoder": {name: (name, "") for name in self.tables["timm"]}} | self.tables

    # ---------------------------------------------------------------------------------------------------------- names

    def names(self, layout: str, depths: tuple, modules: set[str]) -> dict[str, tuple[list[str], str]]:
        """The parameters of an encoder.

        Args:
            layout: the layout to name them in.
            depths: number of blocks in each stage.
            modules: the optional modules that the encoder has, see `optional_modules`.

        Returns:
            {our key: (the layout's keys, pattern from our axes to theirs or "")}. There is one key, or three where the
            layout has query, key and value as three tensors.
        """
        names = {}
        for ours, (theirs, axes) in self.tables[layout].items():
            if ours.removesuffix(".{x}") in {"head", "norm", "fc_norm"} - modules:
                continue
            if "{j}" in ours:
                positions = [(i, j) for i, depth in enumerate(depths) for j in range(depth)]
            elif "{i}" in ours:
                positions = [(i, 0) for i in range(len(depths))]
            else:
                positions = [(0, 0)]
            kinds = ("weight", "bias") if "{x}" in ours else ("",)
            for (i, j), x in product(positions, kinds):
                if self.has_parameter(ours, i, j, len(depths) - 1):
                    numbers = dict(i=i, j=j, x=x, odd=2 * i + 1, even=2 * i + 2, next=i + 1)
                    keys = [theirs.format(qkv=part, **numbers) for part in ("query", "key", "value")]
                    names[ours.format(**numbers)] = list(dict.fromkeys(keys)), axes
        return names

    def has_parameter(self, name: str, i: int, j: int, last: int) -> bool:
        """Whether block j of stage i has the parameter of a row. No merging follows the last stage."""
        return not (".merge." in name and i == last)

    def optional_modules(self, state: dict, layout: str) -> set[str]:
        """Which modules that an encoder may lack are in a state dict.

        These are "head", a classifier, and either "norm", the final norm, or "fc_norm", the norm of the mean token
        that MAE's classifier has in its place.
        """
        head = self.tables[layout]["head.{x}"][0].removesuffix("{x}")
        modules = {"fc_norm" if any(key.startswith("fc_norm.") for key in state) else "norm"}
        if any(key.startswith(head) for key in state):
            modules.add("head")
        return modules

    def count_blocks(self, state: dict, layout: str) -> tuple[int, ...]:
        """The number of blocks in each stage. A gap in the numbers of blocks shows up as a missing key later."""
        name = next(theirs for theirs, _ in self.tables[layout].values() if "{j}" in theirs)
        prefix = name.split("{j}")[0].replace(".", r"\.")
        # torchvision's stages have odd numbers, its mergings even ones
        stage = prefix.format(i=r"(?P<i>\d+)", odd=r"(?P<i>\d*[13579])")
        pattern = re.compile(stage + r"(?P<j>\d+)\.")
        matches = [match.groupdict() for match in map(pattern.match, state) if match]
        blocks = sorted({(int(match.get("i", 0)), int(match["j"])) for match in matches})  # a ViT is a single stage
        return tuple(Counter(i for i, _ in blocks).values())

    def check_keys(self, state: dict, layout: str) -> dict[str, tuple[list[str], str]]:
        """`names` of what a state dict in a layout holds.

        Raises:
            UserError: a key is missing or does not belong, or an entry is not a tensor of real numbers.
        """
        names = self.names(layout, self.count_blocks(state, layout), self.optional_modules(state, layout))
        expected = {key for keys, _ in names.values() for key in keys}
        wrong = {
            "missing keys": expected - state.keys(),
            "keys that do not belong": state.keys() - expected,
            "entries that are no tensor of real numbers": {
                key for key, value in state.items() if not (torch.is_tensor(value) and value.is_floating_point())
            },
        }
        problems = [f"{problem}: {summarize(sorted(keys))}" for problem, keys in wrong.items() if keys]
        if problems:
            raise UserError(f"{LAYOUT_TITLES[layout]}, but {'; '.join(problems)}")
        return names

    # ---------------------------------------------------------------------------------------------------- conversions

    def kernel_size(self, key: str, encoder) -> int:
        """Height and width of the convolution in another library that one of our linear layers is."""
        return encoder.embed.patch

    def to_theirs(self, state: dict, layout: str, encoder) -> dict:
        """Converts a state dict from our layout.

        Args:
            state: of an encoder and perhaps of its classifier, with the right keys and shapes.
            layout: one that the family has.
            encoder: the encoder whose weights they are; only its sizes are read.

        Returns:
            The state dict in the layout, without derived buffers. Tensors share memory with `state` where they can.
        """
        converted = {}
        names = self.names(layout, self.count_blocks(state, "encoder"), self.optional_modules(state, "encoder"))
        for key, (their_keys, axes) in names.items():
            value = state[key]
            if "p q" in axes:
                size = self.kernel_size(key, encoder)
                value = rearrange(value, axes, p=size, q=size)
            elif axes:
                value = rearrange(value, axes)
            converted |= zip(their_keys, value.chunk(len(their_keys)))
        return converted

    def to_ours(self, state: dict, layout: str) -> dict:
        """Converts a state dict in a layout to our layout; tensors share memory with `state` where they can.

        Raises:
            UserError: keys or numbers of axes are not as expected.
        """
        state = {key: value for key, value in state.items() if key.split(".")[-1] not in DERIVED_BUFFERS}
        names = self.check_keys(state, layout)
        if layout == "encoder":
            return state
        converted = {}
        for key, (their_keys, axes) in names.items():
            values = [state[their_key] for their_key in their_keys]
            value = torch.cat(values) if len(values) > 1 else values[0]
            if axes:
                our_axes, their_axes = axes.split(" -> ")
                square = value.shape[-1] == value.shape[-2] if their_axes.endswith("p q") else True
                if value.ndim != len(their_axes.split()) or not square:
                    raise UserError(
                        f"{their_keys[0]} has shape {tuple(value.shape)}; axes ({their_axes}) are expected, with p = q"
                    )
                value = rearrange(value, f"{their_axes} -> {our_axes}")
            converted[key] = value
        return self.postprocess(converted, layout)

    def postprocess(self, state: dict, layout: str) -> dict:
        """Does what remains after renaming and reshaping on the way in."""
        return state

    # ---------------------------------------------------------------------------------------------------------- sizes

    def settings(self, encoder) -> dict:
        """The sizes that define an encoder's parameters, for messages and for the arguments of other libraries."""
        return dict(
            patch=encoder.embed.patch, channels=encoder.channels, width=encoder.stem_width, depths=encoder.depths
        )

    def describe(self, encoder) -> str:
        """The family and the sizes of an encoder, for messages."""
        return f"a {self.title} of " + ", ".join(f"{name} {value}" for name, value in self.settings(encoder).items())


SWIN_TIMM = """
    embed.proj.weight                         patch_embed.proj.weight                        k (c p q) -> k c p q
    embed.proj.bias                           patch_embed.proj.bias
    embed.norm.{x}                            patch_embed.norm.{x}
    stages.{i}.blocks.{j}.norm1.{x}           layers.{i}.blocks.{j}.norm1.{x}
    stages.{i}.blocks.{j}.attention.table     layers.{i}.blocks.{j}.attn.relative_position_bias_table
    stages.{i}.blocks.{j}.attention.qkv.{x}   layers.{i}.blocks.{j}.attn.qkv.{x}
    stages.{i}.blocks.{j}.attention.proj.{x}  layers.{i}.blocks.{j}.attn.proj.{x}
    stages.{i}.blocks.{j}.norm2.{x}           layers.{i}.blocks.{j}.norm2.{x}
    stages.{i}.blocks.{j}.mlp.up.{x}          layers.{i}.blocks.{j}.mlp.fc1.{x}
    stages.{i}.blocks.{j}.mlp.down.{x}        layers.{i}.blocks.{j}.mlp.fc2.{x}
    stages.{i}.merge.norm.{x}                 layers.{next}.downsample.norm.{x}
    stages.{i}.merge.reduction.weight         layers.{next}.downsample.reduction.weight
    norm.{x}                                  norm.{x}
    head.{x}                                  head.fc.{x}
"""
SWIN_TORCHVISION = """
    embed.proj.weight                         features.0.0.weight                            k (c p q) -> k c p q
    embed.proj.bias                           features.0.0.bias
    embed.norm.{x}                            features.0.2.{x}
    stages.{i}.blocks.{j}.norm1.{x}           features.{odd}.{j}.norm1.{x}
    stages.{i}.blocks.{j}.attention.table     features.{odd}.{j}.attn.relative_position_bias_table
    stages.{i}.blocks.{j}.attention.qkv.{x}   features.{odd}.{j}.attn.qkv.{x}
    stages.{i}.blocks.{j}.attention.proj.{x}  features.{odd}.{j}.attn.proj.{x}
    stages.{i}.blocks.{j}.norm2.{x}           features.{odd}.{j}.norm2.{x}
    stages.{i}.blocks.{j}.mlp.up.{x}          features.{odd}.{j}.mlp.0.{x}
    stages.{i}.blocks.{j}.mlp.down.{x}        features.{odd}.{j}.mlp.3.{x}
    stages.{i}.merge.norm.{x}                 features.{even}.norm.{x}
    stages.{i}.merge.reduction.weight         features.{even}.reduction.weight
    norm.{x}                                  norm.{x}
    head.{x}                                  head.{x}
"""
SWIN_OPENMMLAB = """
    embed.proj.weight                         patch_embed.projection.weight                  k (c p q) -> k c p q
    embed.proj.bias                           patch_embed.projection.bias
    embed.norm.{x}                            patch_embed.norm.{x}
    stages.{i}.blocks.{j}.norm1.{x}           stages.{i}.blocks.{j}.norm1.{x}
    stages.{i}.blocks.{j}.attention.table     stages.{i}.blocks.{j}.attn.w_msa.relative_position_bias_table
    stages.{i}.blocks.{j}.attention.qkv.{x}   stages.{i}.blocks.{j}.attn.w_msa.qkv.{x}
    stages.{i}.blocks.{j}.attention.proj.{x}  stages.{i}.blocks.{j}.attn.w_msa.proj.{x}
    stages.{i}.blocks.{j}.norm2.{x}           stages.{i}.blocks.{j}.norm2.{x}
    stages.{i}.blocks.{j}.mlp.up.{x}          stages.{i}.blocks.{j}.ffn.layers.0.0.{x}
    stages.{i}.blocks.{j}.mlp.down.{x}        stages.{i}.blocks.{j}.ffn.layers.1.{x}
    stages.{i}.merge.norm.{x}                 stages.{i}.downsample.norm.{x}
    stages.{i}.merge.reduction.weight         stages.{i}.downsample.reduction.weight
    norm.{x}                                  norm.{x}
    head.{x}                                  head.fc.{x}
"""
SWIN_HUGGINGFACE = """
    embed.proj.weight                       swin.embeddings.patch_embeddings.projection.weight      k (c p q) -> k c p q
    embed.proj.bias                         swin.embeddings.patch_embeddings.projection.bias
    embed.norm.{x}                          swin.embeddings.norm.{x}
    stages.{i}.blocks.{j}.norm1.{x}         swin.encoder.layers.{i}.blocks.{j}.layernorm_before.{x}
    stages.{i}.blocks.{j}.attention.table swin.encoder.layers.{i}.blocks.{j}.attention.self.relative_position_bias_table
    stages.{i}.blocks.{j}.attention.qkv.{x} swin.encoder.layers.{i}.blocks.{j}.attention.self.{qkv}.{x}
    stages.{i}.blocks.{j}.attention.proj.{x} swin.encoder.layers.{i}.blocks.{j}.attention.output.dense.{x}
    stages.{i}.blocks.{j}.norm2.{x}         swin.encoder.layers.{i}.blocks.{j}.layernorm_after.{x}
    stages.{i}.blocks.{j}.mlp.up.{x}        swin.encoder.layers.{i}.blocks.{j}.intermediate.dense.{x}
    stages.{i}.blocks.{j}.mlp.down.{x}      swin.encoder.layers.{i}.blocks.{j}.output.dense.{x}
    stages.{i}.merge.norm.{x}               swin.encoder.layers.{i}.downsample.norm.{x}
    stages.{i}.merge.reduction.weight       swin.encoder.layers.{i}.downsample.reduction.weight
    norm.{x}                                swin.layernorm.{x}
    head.{x}                                classifier.{x}
"""


class SwinMap(StateDictMap):
    title = "Swin Transformer"
    timm_class = "timm.models.swin_transformer", "SwinTransformer"
    tables = {
        "torchvision": parse_table(SWIN_TORCHVISION),
        "timm": parse_table(SWIN_TIMM),
        # Microsoft's stage ends with the merging that opens the next stage in timm from 0.9 on
        "microsoft": parse_table(SWIN_TIMM.replace("{next}.downsample", "{i}.downsample").replace("head.fc", "head")),
        "openmmlab": parse_table(SWIN_OPENMMLAB),  # read only
        "huggingface": parse_table(SWIN_HUGGINGFACE),
    }

    def settings(self, encoder):
        heads = tuple(stage.blocks[0].attention.heads for stage in encoder.stages)
        return super().settings(encoder) | dict(heads=heads, windows=encoder.windows)

    def postprocess(self, state, layout):
        """OpenMMLab merges 2 x 2 tokens with the channels first and then row by row; ours go column by column."""
        if layout == "openmmlab":
            for key, value in state.items():
                if ".merge." in key:
                    pattern = "... (c row column) -> ... (column row c)"
                    state[key] = rearrange(value, pattern, row=2, column=2)
        return state

    def timm_arguments(self, encoder):
        settings = self.settings(encoder)
        return dict(
            window_size=max(settings["windows"]),
            embed_dim=settings["width"],
            depths=settings["depths"],
            num_heads=settings["heads"],
        )

    def huggingface_config(self, encoder):
        return self.timm_arguments(encoder) | dict(
            model_type="swin", architectures=["SwinModel"], drop_path_rate=0.0, layer_norm_eps=1e-5
        )


class ViTMap(StateDictMap):
    title = "Vision Transformer"
    timm_class = "timm.models.vision_transformer", "VisionTransformer"
    tables = {
        # timm's names are those of MAE's encoder, too
        "timm": parse_table("""
            embed.proj.weight            patch_embed.proj.weight       k (c p q) -> k c p q
            embed.proj.bias              patch_embed.proj.bias
            class_token                  cls_token                     k -> 1 1 k
            positions                    pos_embed                     t k -> 1 t k
            blocks.{j}.norm1.{x}         blocks.{j}.norm1.{x}
            blocks.{j}.attention.qkv.{x}   blocks.{j}.attn.qkv.{x}
            blocks.{j}.attention.proj.{x}  blocks.{j}.attn.proj.{x}
            blocks.{j}.norm2.{x}         blocks.{j}.norm2.{x}
            blocks.{j}.mlp.up.{x}        blocks.{j}.mlp.fc1.{x}
            blocks.{j}.mlp.down.{x}      blocks.{j}.mlp.fc2.{x}
            norm.{x}                     norm.{x}
            fc_norm.{x}                  fc_norm.{x}
            head.{x}                     head.{x}
        """),
        "huggingface": parse_table("""
            embed.proj.weight            vit.embeddings.patch_embeddings.projection.weight       k (c p q) -> k c p q
            embed.proj.bias              vit.embeddings.patch_embeddings.projection.bias
            class_token                  vit.embeddings.cls_token                                k -> 1 1 k
            positions                    vit.embeddings.position_embeddings                      t k -> 1 t k
            blocks.{j}.norm1.{x}         vit.encoder.layer.{j}.layernorm_before.{x}
            blocks.{j}.attention.qkv.{x}   vit.encoder.layer.{j}.attention.attention.{qkv}.{x}
            blocks.{j}.attention.proj.{x}  vit.encoder.layer.{j}.attention.output.dense.{x}
            blocks.{j}.norm2.{x}         vit.encoder.layer.{j}.layernorm_after.{x}
            blocks.{j}.mlp.up.{x}        vit.encoder.layer.{j}.intermediate.dense.{x}
            blocks.{j}.mlp.down.{x}      vit.encoder.layer.{j}.output.dense.{x}
            norm.{x}                     vit.layernorm.{x}
            head.{x}                     classifier.{x}
        """),
    }

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

    def to_theirs(self, state, layout, encoder):
        """The position of the class token becomes zeros, because our class token contains it."""
        if layout == "huggingface" and self.optional_modules(state, "encoder") != {"norm"}:
            raise UserError(
                "Hugging Face's ViT classifies by its class token, ours by the mean of all tokens: "
                "only the encoder can go there"
            )
        positions = state["positions"]
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
        return super().to_theirs(state | {"positions": positions}, layout, encoder)

    def postprocess(self, state, layout):
        class_position, *_ = positions = state["positions"]
        return state | {"class_token": state["class_token"] + class_position, "positions": positions[1:]}

    def timm_arguments(self, encoder):
        heads = encoder.blocks[0].attention.heads
        return dict(embed_dim=encoder.width, depth=encoder.depth, num_heads=heads, global_pool="avg")

    def huggingface_config(self, encoder):
        return dict(
            model_type="vit",
            architectures=["ViTModel"],
            hidden_size=encoder.width,
            num_hidden_layers=encoder.depth,
            num_attention_heads=encoder.blocks[0].attention.heads,
            intermediate_size=4 * encoder.width,
            layer_norm_eps=1e-6,
        )


class TwinsMap(StateDictMap):
    title = "Twins-SVT"
    timm_class = "timm.models.twins", "Twins"
    tables = {
        "timm": parse_table("""
            embed.proj.weight                                patch_embeds.0.proj.weight        k (c p q) -> k c p q
            embed.proj.bias                                  patch_embeds.0.proj.bias
            embed.norm.{x}                                   patch_embeds.0.norm.{x}
            stages.{i}.positions.{x}                         pos_block.{i}.proj.0.{x}
            stages.{i}.blocks.{j}.norm1.{x}                  blocks.{i}.{j}.norm1.{x}
            stages.{i}.blocks.{j}.attention.qkv.{x}          blocks.{i}.{j}.attn.qkv.{x}
            stages.{i}.blocks.{j}.attention.q.{x}            blocks.{i}.{j}.attn.q.{x}
            stages.{i}.blocks.{j}.attention.reduce.weight    blocks.{i}.{j}.attn.sr.weight     k (p q c) -> k c p q
            stages.{i}.blocks.{j}.attention.reduce.bias      blocks.{i}.{j}.attn.sr.bias
            stages.{i}.blocks.{j}.attention.norm.{x}         blocks.{i}.{j}.attn.norm.{x}
            stages.{i}.blocks.{j}.attention.kv.{x}           blocks.{i}.{j}.attn.kv.{x}
            stages.{i}.blocks.{j}.attention.proj.{x}         blocks.{i}.{j}.attn.proj.{x}
            stages.{i}.blocks.{j}.norm2.{x}                  blocks.{i}.{j}.norm2.{x}
            stages.{i}.blocks.{j}.mlp.up.{x}                 blocks.{i}.{j}.mlp.fc1.{x}
            stages.{i}.blocks.{j}.mlp.down.{x}               blocks.{i}.{j}.mlp.fc2.{x}
            stages.{i}.merge.reduction.weight                patch_embeds.{next}.proj.weight   k (q p c) -> k c p q
            stages.{i}.merge.reduction.bias                  patch_embeds.{next}.proj.bias
            stages.{i}.merge.norm.{x}                        patch_embeds.{next}.norm.{x}
            norm.{x}                                         norm.{x}
            head.{x}                                         head.{x}
        """),
    }

    def has_parameter(self, name, i, j, last):
        """Even blocks attend inside windows, odd blocks to summaries. The last stage's tokens are the summaries."""
        is_global = j % 2 == 1
        if ".attention.qkv." in name:
            return not is_global
        if ".attention.q." in name or ".attention.kv." in name:
            return is_global
        if ".attention.reduce." in name or ".attention.norm." in name:
            return is_global and i < last
        return super().has_parameter(name, i, j, last)

    def kernel_size(self, key, encoder):
        if key.startswith("embed."):
            return encoder.embed.patch
        stage = int(key.split(".")[1])
        return 2 if ".merge." in key else 2 ** (len(encoder.depths) - 1 - stage)

    def timm_arguments(self, encoder):
        stages = range(len(encoder.depths))
        widths = [encoder.stem_width * 2**i for i in stages]
        return dict(
            embed_dims=widths,
            num_heads=[width // 32 for width in widths],
            mlp_ratios=[4 for _ in stages],
            depths=list(encoder.depths),
            sr_ratios=[2**i for i in reversed(stages)],
            wss=list(encoder.windows),
        )


SWIN, VIT, TWINS = SwinMap(), ViTMap(), TwinsMap()

# A key that a layout has and no layout before it in this table. timm's and Microsoft's Swin share theirs.
SIGNATURE_KEYS = {
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


def detect_layout(state: dict) -> tuple[StateDictMap, str]:
    """The family and the layout that the keys of a state dict are in.

    Raises:
        UserError: the keys are in no known layout.
    """
    if any(key.endswith(".logit_scale") for key in state):
        raise UserError("a Swin Transformer V2, whose attention differs; only the first version can be read")
    matches = [SIGNATURE_KEYS[key] for key in SIGNATURE_KEYS if key in state]
    if not matches or "conv_proj.weight" in state:  # the second is torchvision's ViT
        raise UserError(
            "no encoder of this project, torchvision, timm, Microsoft, OpenMMLab or Hugging Face; its keys: "
            + summarize(map(str, state))
        )
    # Microsoft's first stage ends with a merging; in timm from 0.9 on, each later stage begins with one
    if matches[0] == (SWIN, "timm") and any(key.startswith("layers.0.downsample.") for key in state):
        return SWIN, "microsoft"
    return matches[0]


def family_of(state: dict) -> StateDictMap:
    """The family of a state dict in any layout."""
    return detect_layout(state)[0]
