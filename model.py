"""EESMM: encoder, decoder, decomposition and loss (Eq. 4-7, Algorithm 1). Pixels in, a loss and a picture's parts out.

    model = EESMM(swin_base())
    out = model(images)                # images (b, n, c, h, w), normalised; draws a mask by itself
    out.loss.backward()
    out.losses                         # {"mix": Loss1, "source_1": Loss2, "source_2": Loss3}

`EESMM.forward` is Algorithm 1, a line for each equation. GreenMIM, MAE and SimMIM are settings of it: see METHODS. MixMAE is a subclass.
Axis letters: b composites, n sources, c channels, h w pixels, i j units, p q pixels inside a unit, u units,
v units that the encoder returns, d values of a unit (c * unit^2), m masks (1 if shared, n if independent).
Seen in `notebooks/05_decoder.ipynb`, `notebooks/06_decomposition.ipynb` and `notebooks/07_loss_and_training.ipynb`.
"""

from dataclasses import dataclass
from inspect import signature
from itertools import permutations
from typing import Any

import torch
from einops import rearrange
from torch import nn

import encoders
from encoders import Encoder, sincos_positions
from engine.dist import to_device
from engine.errors import UserError
from mixing import (
    draw_masks,
    equal_weights,
    four_view_weights,
    mask_pixels,
    spread_mask,
    superpose,
    units_to_encode,
    visible_count,
)


@dataclass
class Masking:
    """What is drawn for a step, and what follows from it; but for the weights on the CPU until `to_device` moves it. Built by `EESMM.masking`."""

    visible: torch.Tensor  # (m, u) bool
    weights: torch.Tensor  # (n,) lambda_k
    ids_keep: torch.Tensor  # (v,) numbers of the units that the encoder returns: those it sees, all of them if dense; of MixMAE a list, one for each source
    loss_mask: torch.Tensor  # (1 + n, u) weight of each unit in Loss1 and in the term of each source; rows sum to 1
    plan: Any  # the encoder's, of `seen`
    redrawn: int = 0  # masks passed over because they did not fit the usual shapes


@dataclass
class Output:
    """What a training step and a figure need. Predictions are in target space (see `targets`)."""

    loss: torch.Tensor  # ()
    losses: dict[str, torch.Tensor]  # by name, unweighted: mix (Loss1), source_1 (Loss2), source_2 (Loss3), ...
    visible: torch.Tensor  # (m, u) bool
    predicted_mix: torch.Tensor  # (b, u, d), Eq. 4
    predicted_sources: torch.Tensor  # (b, n, u, d), Eq. 5 and 6, in the order of the true sources


def patchify(images: torch.Tensor, unit: int) -> torch.Tensor:
    """Pixels of each unit: (..., c, h, w) to (..., u, d)."""
    return rearrange(images, "... c (i p) (j q) -> ... (i j) (c p q)", p=unit, q=unit)


def unpatchify(values: torch.Tensor, unit: int, rows: int) -> torch.Tensor:
    """The way back: (..., u, d) to (..., c, h, w)."""
    return rearrange(values, "... (i j) (c p q) -> ... c (i p) (j q)", i=rows, p=unit, q=unit)


def patch_statistics(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (unbiased, eps 1e-6 in the variance; MAE's) of each unit, (..., u, 1) both."""
    mean = values.mean(-1, keepdim=True)
    variance = (values - mean).square().sum(-1, keepdim=True) / (
        values.shape[-1] - 1
    )  # torch's var takes three times as long
    return mean, (variance + 1e-6).sqrt()


class Decoder(nn.Module):
    """Mask tokens into the hidden units, positions, transformer blocks, norm (section 4.1.1)."""

    def __init__(self, latent_width: int, rows: int, columns: int, width: int, blocks: int):
        super().__init__()
        self.embed = nn.Linear(latent_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("positions", sincos_positions(rows, columns, width), persistent=False)
        self.blocks = nn.ModuleList(  # 32 channels a head: 16 heads at the paper's width of 512
            nn.TransformerEncoderLayer(
                width, width // 32, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, latent, seen):
        tokens = self.mask_token.expand(len(latent), len(self.positions), -1)
        latent = self.embed(latent)
        x = tokens.to(latent.dtype).index_copy(1, seen.long(), latent) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


LOSSES = {"mse": torch.square, "l1": torch.abs}  # of a pixel's difference
CHOICES = {
    "decomposition": ("subtract", "split"),
    "assignment": ("permutation", "fixed"),
    "masks": ("shared", "independent"),
    "loss": tuple(LOSSES),
    "loss_units": ("hidden", "all"),
}

# fmt: off
METHODS_TABLE = {  # settings of one program, so that comparisons compare like with like; None: the recipe's, the flag's or the constructor's
    #                  eesmm    greenmim  mae       simmim    mixmae
    "sources":        (2,       1,        1,        1,        2),            # images in a composite
    "mask_ratio":     (None,    None,     None,     0.6,      0.5),          # hidden share
    "dense":          (None,    None,     None,     True,     None),         # encoded: visible units, or all, hidden ones from a mask token
    "decoder_blocks": (1,       1,        8,        0,        8),            # 0: a linear layer
    "normalise":      (None,    None,     None,     False,    None),         # targets: pixels normalised per unit, or as they are
    "loss":           (None,    None,     None,     "l1",     None),
    "loss_units":     (None,    "hidden", "hidden", "hidden", "hidden"),     # whose error counts
    "loss_weights":   (None,    None,     None,     None,     (0, 1, 1)),    # of the mix and of each source
}
# fmt: on
METHODS = {
    method: {name: values[k] for name, values in METHODS_TABLE.items() if values[k] is not None}
    for k, method in enumerate(("eesmm", "greenmim", "mae", "simmim", "mixmae"))
}


class EESMM(nn.Module):
    """Superpose n images, hide units of the mix, encode, rebuild the mix and take it apart.

    encoder: see encoders.Encoder. sources: n. weights: lambda_k, (n,), default 1 / n each.
    decomposition: "subtract", Eq. 5 and 6 on the true images, or "split", one predicted image per source (4.1.1).
    assignment, for split: "permutation", the best of the n! orders per sample, or "fixed".
    decoder_width, decoder_blocks: 0 blocks only with dense=True. dense: encode all tokens, hidden ones from a mask
    token, and predict with one linear layer (SimMIM) if there are no blocks. unit: side of a masked square in pixels, a
    multiple of the encoder's unit. mask_ratio, masks ("shared" or "independent"): how `draw` draws; ratio 0, nothing
    hidden, only with loss_units="all". loss: "mse" or "l1", over loss_units "hidden" (Eq. 7) or "all".
    loss_weights: of the mix and of each source. normalise: targets normalised per unit (MAE), else the images as they
    come in. redraw: see `draw`. Raises ValueError for settings that are unknown or contradict each other.
    """

    superposes = True  # a mixed image is a weighted sum; a subclass may mix in another way
    both_orders = False  # see MixMAE

    def __init__(
        self,
        encoder: Encoder,
        sources: int = 2,
        weights=None,
        decomposition: str = "subtract",
        assignment: str = "permutation",
        decoder_width: int = 512,
        decoder_blocks: int = 1,
        dense: bool = False,
        unit: int | None = None,
        mask_ratio: float = 0.75,
        masks: str = "shared",
        loss: str = "mse",
        loss_units: str = "hidden",
        loss_weights=None,
        normalise: bool = True,
        redraw: bool = True,
    ):
        super().__init__()
        weights = equal_weights(sources) if weights is None else torch.as_tensor(weights, dtype=torch.float)
        loss_weights = (1.0,) * (sources + 1) if loss_weights is None else tuple(loss_weights)
        check_choices(decomposition=decomposition, assignment=assignment, masks=masks, loss=loss, loss_units=loss_units)
        split = decomposition == "split"
        check_sources(sources, weights, loss_weights, ordered=not split or assignment != "permutation")
        check_decoder(dense, decoder_blocks, decoder_width)
        check_mask(encoder, unit, mask_ratio, alone=loss_units == "all" and not dense)
        self.encoder, self.sources, self.dense, self.normalise, self.redraw = encoder, sources, dense, normalise, redraw
        self.decomposition = decomposition
        self.terms = ["mix", *(f"source_{k + 1}" for k in range(sources) if sources > 1)]  # the only source is the mix
        self.loss_kind, self.loss_units, self.loss_weights = loss, loss_units, loss_weights[: len(self.terms)]
        self.unit, self.mask_ratio, self.masks = unit or encoder.unit, mask_ratio, masks
        self.undecayed = encoder.undecayed
        self.register_buffer("weights", weights, persistent=False)
        orders = list(permutations(range(sources))) if split and assignment == "permutation" else []
        self.register_buffer("orders", torch.tensor(orders), persistent=False)  # (n!, n)

        self.decoder = (
            Decoder(encoder.width, encoder.rows, encoder.columns, decoder_width, decoder_blocks)
            if decoder_blocks
            else None
        )
        self.mask_token = nn.Parameter(torch.randn(encoder.stem_width) * 0.02) if dense else None
        outputs = sources if split else 1
        self.head = nn.Linear(
            decoder_width if decoder_blocks else encoder.width, outputs * encoder.channels * encoder.unit**2
        )
        for module in (self.decoder, self.head):
            for parameter in module.parameters() if module else ():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.head.bias)

    # Algorithm 1 ------------------------------------------------------------------------------------------------

    def forward(self, images: torch.Tensor, visible: torch.Tensor | Masking | None = None) -> Output:
        """Algorithm 1 for images (b, n, c, h, w). visible: None draws a mask; a bool mask (u,) or (n, u); a Masking."""
        masking = self.masking_for(images, visible)  # M_k, lambda_k
        mixed = self.mix(images, masking)  # I_mixed, Eq. 1-3
        latent = self.encoder(mixed, masking.plan, self.mask_token)  # Z
        predicted = self.decode(latent, masking)  # the head's images, Eq. 4
        targets = self.targets(images)  # I_a, I_b, normalised
        mix, sources = self.decompose(predicted, targets, masking)  # I^_c; I^_d, I^_e: Eq. 5, 6
        errors = [self.distance(mix, self.combine(targets, masking))]  # of each unit, for Loss1
        errors += self.distance(sources, targets).unbind(1) if self.sources > 1 else ()  # for Loss2, Loss3
        losses = {
            name: (error * counted).sum(-1).mean()  # over counted units: Eq. 7
            for name, error, counted in zip(self.terms, errors, masking.loss_mask[: len(self.terms)], strict=True)
        }
        loss = sum(
            weight * term for weight, term in zip(self.loss_weights, losses.values(), strict=True)
        )  # Loss1 + Loss2 + Loss3
        return Output(loss, losses, masking.visible, mix, sources)

    # masks (Eq. 1, 2) and the mix (Eq. 3) -----------------------------------------------------------------------------

    def draw(self, generator: torch.Generator | None = None) -> Masking:
        """What a step draws: a fresh mask. Who wants the weights drawn too draws them here, from the same generator.

        A mask whose plan does not fit the usual shapes is drawn again, up to ten times, and counted in `redrawn`: plans of
        other shapes are right too, but a compiled network would be compiled anew for them. So some masks are never seen: of 300
        random ones over 7 x 7 units for Swin-T none at a ratio of 0.75, 9 % at 0.5. Masks of another kind may hardly ever fit
        (one block of units); a fork that draws them sets redraw=False, and every mask is used.
        """
        generator = generator or torch.default_generator
        rows, columns, factor = self.encoder.rows, self.encoder.columns, self.unit // self.encoder.unit
        for redrawn in range(10 if self.redraw else 1):
            visible = draw_masks(
                self.sources if self.masks == "independent" else 1,
                rows * columns // factor**2,
                self.mask_ratio,
                generator,
            )
            visible = spread_mask(visible, rows // factor, factor)
            masking = self.masking(visible, units_to_encode(visible, generator))
            if masking.plan.fits:
                break
        masking.redrawn = redrawn
        return masking

    def masking(self, visible: torch.Tensor, seen: torch.Tensor | None = None) -> Masking:
        """What follows from a CPU mask (u,) or (m, u), bool; seen: the units to encode, default the union."""
        visible = visible.view(-1, visible.shape[-1])
        if len(visible) not in (1, self.sources):
            raise ValueError(f"{len(visible)} masks for {self.sources} sources: give one, or one per source")
        if self.loss_units == "hidden" and visible.all(-1).any():
            raise ValueError("a mask hides nothing: no unit is left to predict")
        seen = visible.any(0) if seen is None else seen
        hidden = torch.cat([~visible.all(0, keepdim=True), (~visible).expand(self.sources, -1)]).float()
        counted = torch.ones_like(hidden) if self.loss_units == "all" else hidden
        plan, seen = self.plan(visible, seen)
        return Masking(visible, self.weights, seen, counted / counted.sum(-1, keepdim=True), plan)

    def plan(self, visible: torch.Tensor, seen: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The encoder's plan of masks (m, u) and of the units to encode (u,), and the numbers of the units that it returns."""
        plan = self.encoder.plan(visible[0] if self.dense and len(visible) == 1 else seen, self.dense)
        return plan, (torch.ones_like(seen) if self.dense else seen).nonzero().flatten()

    def masking_for(self, images: torch.Tensor, visible: torch.Tensor | Masking | None) -> Masking:
        """The Masking of a step, on the images' device: drawn, made of a mask, or as given. ValueError for wrong shapes."""
        if images.ndim != 5 or images.shape[1:3] != (self.sources, self.encoder.channels):
            raise ValueError(
                f"images must be (b, {self.sources}, {self.encoder.channels}, h, w), got {tuple(images.shape)}"
            )
        if not isinstance(visible, Masking):
            visible = self.draw() if visible is None else self.masking(visible)
        return to_device(visible, images.device)

    def mix(self, images: torch.Tensor, masking: Masking) -> torch.Tensor:
        """What the encoder looks at, (b, c, h, w). One mask for all sources needs none here: the encoder leaves hidden
        units out. Independent masks act on each source before it is mixed (Eq. 1-3)."""
        if len(masking.visible) > 1:
            images = mask_pixels(images, masking.visible, self.encoder.unit)
        return superpose(images, masking.weights)

    def combine(self, values: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Values of sources (b, n, u, d) to those of the mix (b, u, d): the weighted sum."""
        return superpose(values, masking.weights)

    # prediction (Eq. 4) -----------------------------------------------------------------------------------------

    def decode(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Head outputs (b, outputs, u, d) for latent (b, v, width): n images in split, else the mix alone."""
        x = self.decoder(latent, masking.ids_keep) if self.decoder else latent
        return rearrange(self.head(x), "b u (n d) -> b n u d", d=self.encoder.channels * self.encoder.unit**2).float()

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """True sources (b, n, u, d); each source's units normalised first, so that mixing stays linear."""
        values = patchify(images.float(), self.encoder.unit)
        if self.normalise:
            mean, deviation = patch_statistics(values)
            values = (values - mean) / deviation
        return values

    # decomposition and loss (Eq. 5-7) -----------------------------------------------------------------------------

    def decompose(
        self, predicted: torch.Tensor, targets: torch.Tensor, masking: Masking
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The predicted mix (b, u, d) and sources (b, n, u, d) from head outputs.

        split: the outputs are the sources, put into the order that suits them best; the mix is their weighted sum.
        subtract: I^_k = (I^_c - sum over j != k of lambda_j I_j) / lambda_k, with true I_j: Eq. 5 and 6 with the
        weights of Eq. 3, so that the error of a source is that of the mix over lambda_k. As printed, without weights, both sources
        would have one error, against a target of twice the mix: see `notebooks/06_decomposition.ipynb`.
        """
        if self.decomposition == "split":
            sources = self.assign(predicted, targets, masking.loss_mask) if len(self.orders) else predicted
            return superpose(sources, masking.weights), sources
        mix, weights = predicted[:, 0], masking.weights[:, None, None]
        others = superpose(targets, masking.weights)[:, None] - weights * targets
        return mix, (mix[:, None] - others) / weights

    @torch.no_grad()
    def cheapest_order(self, predicted, targets, counted):
        """For each sample, which output stands for which source (b, n): the least total error of all n! orders."""
        error = torch.stack(
            [(self.distance(predicted, targets[:, k, None]) * counted[1 + k]).sum(-1) for k in range(self.sources)],
            dim=-1,
        )  # (b, output, source)
        total = error[:, self.orders, torch.arange(self.sources, device=error.device)].sum(-1)  # (b, n!)
        return self.orders[total.argmin(-1)]

    def assign(self, predicted, targets, counted):
        """Permutation-invariant training (Yu et al. 2017): outputs reordered to the sources they come closest to."""
        order = self.cheapest_order(predicted, targets, counted)
        return predicted.gather(1, order[:, :, None, None].expand_as(predicted))

    def distance(self, a, b):
        """Error of each unit, the mean over its values: (..., u, d) to (..., u)."""
        return LOSSES[self.loss_kind](a - b).mean(-1)

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter: the encoder's, then the decoder and the head with the last."""
        if name == "mask_token":  # SimMIM's enters at the patch embedding
            return 0
        return self.encoder.layer_of(name.removeprefix("encoder."))


class MixMAE(EESMM):
    """MixMAE (Liu et al. 2023): each unit of the mixed image shows one of two images, attention stays inside each, and the decoder runs once for each.

    encoder: one with `partitions`, a Swin. both_orders: in training each pair of images is used twice, as (a, b) and as (b, a), as in the published
    code, so that a batch of B source images gives B mixed images; the output then has twice as many rows. settings: EESMM's. ValueError for an encoder
    without `partitions`, for another number of sources than two, for a mask for each source, and for dense=True.
    """

    superposes = False

    def __init__(self, encoder: Encoder, both_orders: bool = False, **settings):
        if not getattr(encoder, "partitions", False):
            raise ValueError(
                "method mixmae keeps attention inside each source image, which only a Swin does here: give a swin_... or mixmim_... as --model"
            )
        if settings.get("sources", 2) != 2 or settings.get("masks", "shared") != "shared" or settings.get("dense"):
            raise ValueError(
                "method mixmae is of 2 sources, which share one mask: each unit shows the one or the other"
            )
        super().__init__(encoder, **settings | {"decomposition": "subtract"})  # one image for each pass of the decoder
        self.both_orders = both_orders

    def forward(self, images: torch.Tensor, visible: torch.Tensor | Masking | None = None) -> Output:
        """EESMM's, for images (b, 2, c, h, w); in training, of 2 b mixed images where `both_orders` is set."""
        return super().forward(
            torch.cat([images, images.flip(1)]) if self.both_orders and self.training else images, visible
        )

    def masking(self, visible: torch.Tensor, seen: torch.Tensor | None = None) -> Masking:
        """What the first source does not show, the second does."""
        visible = visible.view(-1, visible.shape[-1])[:1]
        return super().masking(torch.cat([visible, ~visible]), seen)

    def plan(self, visible: torch.Tensor, seen: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """All units are encoded; the numbers of each source's own."""
        return self.encoder.plan(visible[0], partition=True), [own.nonzero().flatten() for own in visible]

    def mix(self, images: torch.Tensor, masking: Masking) -> torch.Tensor:
        """The mixed images (b, c, h, w): each unit from the source that is visible there."""
        return mask_pixels(images, masking.visible, self.encoder.unit).sum(1)

    def combine(self, values: torch.Tensor, masking: Masking) -> torch.Tensor:
        """The values of the source that is hidden in a unit, and has to be predicted there."""
        return torch.where(masking.visible[0, :, None], values[:, 1], values[:, 0])

    def decode(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Head outputs (b, 2, u, d): each source from its own units."""
        x = torch.stack([self.decoder(latent.index_select(1, units), units) for units in masking.ids_keep], dim=1)
        return self.head(x).float()

    def decompose(
        self, predicted: torch.Tensor, targets: torch.Tensor, masking: Masking
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs are the sources, in their order."""
        return self.combine(predicted, masking), predicted


# settings ---------------------------------------------------------------------------------------------------------


def check_choices(**settings: str):
    """ValueError for a setting that is none of its CHOICES."""
    for name, value in settings.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} {value!r}: choose from {', '.join(CHOICES[name])}")


def check_sources(sources: int, weights: torch.Tensor, loss_weights: tuple, ordered: bool):
    """ValueError unless the weights do for these sources. ordered: which output stands for which source is settled."""
    if sources < 1 or weights.shape != (sources,) or not (weights > 0).all() or abs(weights.sum() - 1) > 1e-4:
        raise ValueError(
            f"weights {[round(w, 4) for w in weights.tolist()]}: give {sources} positive numbers that sum to 1"
        )
    if not ordered and sources > 1:
        if weights.max() - weights.min() > 1e-6:
            raise ValueError(
                "unequal weights tell the sources apart, so their order is not free: use assignment fixed, "
                "or equal weights"
            )
        if sources > 5:
            raise ValueError(
                f"the best of {sources}! orders is too costly beyond 5 sources: use assignment fixed or "
                "decomposition subtract"
            )
    if len(loss_weights) != sources + 1 and not (sources == 1 and len(loss_weights) >= 1):
        raise ValueError(f"loss weights {loss_weights}: give {sources + 1} numbers, for the mix and for each source")


def check_decoder(dense: bool, blocks: int, width: int):
    """ValueError for a decoder that cannot be built, or with which an encoder of visible units cannot learn."""
    if not dense and blocks < 1:
        raise ValueError(
            "a visible-only encoder needs at least 1 decoder block: without one, hidden units see a "
            "constant and the encoder gets no gradient"
        )
    if blocks < 0 or width < 32 or width % 32:
        raise ValueError(
            f"a decoder of {blocks} blocks, width {width}: give a width that is a multiple "
            "of 32 (32 channels a head), and 1 to 8 blocks"
        )


def check_mask(encoder: Encoder, unit: int | None, mask_ratio: float, alone: bool):
    """ValueError for a unit or a ratio that cannot be had. alone: separation alone is a task, so that nothing need be hidden."""
    height, width = encoder.image_size
    unit = unit or encoder.unit
    if unit < encoder.unit or unit % encoder.unit or height % unit or width % unit:
        raise ValueError(
            f"unit {unit}: give a multiple of the encoder's unit, {encoder.unit} pixels, that divides the "
            f"image size, {height}" + (f" x {width}" if width != height else "")
        )
    visible_count((height // unit) * (width // unit), mask_ratio)
    if mask_ratio == 0 and not alone:
        raise ValueError(
            "mask ratio 0 hides nothing, which leaves separation alone: it needs loss units all, and "
            "an encoder of visible units only"
        )


CLASSES = {"mixmae": MixMAE}  # of the methods that are more than settings


def build(method: str, encoder: Encoder, **settings) -> EESMM:
    """The model of a method in METHODS; settings override the method's own."""
    return CLASSES.get(method, EESMM)(encoder, **METHODS[method] | settings)


def from_settings(settings: dict) -> EESMM:
    """The model that settings describe, by their flags' names: train.py's arguments, or those that a checkpoint keeps.

    What is missing or None has the method's or the constructor's default. UserError for settings that contradict each other.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    method = given.get("method", "eesmm")
    sources, weights = given.get("sources", METHODS[method]["sources"]), given.get("weights")
    if METHODS[method]["sources"] == 1 and sources != 1:
        raise UserError(f"--method {method} takes one image; use --method eesmm for --sources {sources}")
    if METHODS[method]["sources"] > 1 and sources < 2:
        raise UserError(f"--method {method} superposes at least 2 sources; --method greenmim is the same with one")
    encoder = encoders.make(
        given["model"],
        given.get("activation_checkpointing", False),
        **{name: given[name] for name in ("image_size", "window", "drop_path", "channels") if name in given},
    )
    own = (
        signature(EESMM).parameters.keys() | signature(CLASSES.get(method, EESMM)).parameters.keys()
    )  # a new setting of the constructor needs only its flag
    own -= {"encoder", "sources", "weights", "settings"}
    try:
        if given.get("views") == "four":
            sources, weights = (
                4,
                four_view_weights(equal_weights(sources) if weights is None else torch.tensor(weights)),
            )
        model = build(
            method, encoder, sources=sources, weights=weights, **{name: given[name] for name in own if name in given}
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for layer in model.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = given.get("norm_eps", layer.eps)
    if given.get("xavier"):
        initialise_linear_layers(model)
    return model


def initialise_linear_layers(model: nn.Module):
    """Xavier-uniform weights and zero biases in every linear layer of encoder and decoder, as in the code of MAE, GreenMIM and MixMAE."""
    for layer in model.modules():
        if isinstance(layer, nn.MultiheadAttention):
            nn.init.xavier_uniform_(layer.in_proj_weight)
            nn.init.zeros_(layer.in_proj_bias)
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
