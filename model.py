"""EESMM: decoder, decomposition and loss (Eq. 4-7) and the forward pass of Algorithm 1.

    model = EESMM(swin_base())
    out = model(images)     # images (b, n, c, h, w), normalized; the model draws a mask
    out.loss.backward()
    out.losses              # {"mix": Loss1, "source_1": Loss2, "source_2": Loss3}

`EESMM.forward` has one line for each step of Algorithm 1. GreenMIM, MAE and SimMIM are settings of EESMM (see
METHODS_TABLE), and MixMAE is a subclass. Eq. 1-3 are in mixing.py. Numbers of
equations and sections are those of the paper in CITATION.cff.

Where to change what:
    a pixel loss      an entry of LOSSES
    a loss term       `terms`, `errors` in `forward`, a row of `loss_mask` in `make_masking`, and the number of
                      `loss_weights` in `check_sources`
    a mask            `EESMM.draw`; `mixing.draw_masks` also makes the masks of validation
    a mixing rule     a subclass that overrides `mix`, `combine` and `decompose`, as MixMAE does; its name in
                      METHOD_CLASSES and METHOD_NAMES, and a column of METHODS_TABLE
    an encoder        a subclass of `backbone.Encoder`, and its name in `encoders.MODELS`
    a setting         an argument of `EESMM.__init__`, and a flag of train.py with the same name

A mask unit is a square of pixels that one final token of the encoder covers: 32 x 32 in a Swin, one patch in a ViT
(`encoder.unit`; the squares that are masked, `EESMM.unit`, may be several mask units wide). It plays the role of MAE's
patch: one row of predictions, targets and loss weights belongs to each mask unit.

Axis letters: b mixed images, n source images, c channels, h w pixels, m masks (1 if shared, n if independent), u mask
units, v mask units that the encoder returns, d values of a mask unit (c * unit * unit), i j rows and columns of mask
units, p q pixels inside a mask unit.
See also `notebooks/05_decoder.ipynb`, `notebooks/06_decomposition.ipynb` and `notebooks/07_loss_and_training.ipynb`.
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
    superpose,
    units_to_encode,
    upsample_mask,
    visible_count,
)


@dataclass
class Masking:
    """The random choices of one training step and what follows from them. `EESMM.make_masking` builds it."""

    visible: torch.Tensor  # M_k, (m, u) bool, True = visible
    weights: torch.Tensor  # lambda_k, (n,)
    ids_keep: torch.Tensor  # (v,) indices of the mask units that the encoder returns; in MixMAE a list, one per source
    # (1 + n, u) float: 1 / count where the loss is taken (masked units, or all), else 0; row 0 is for Loss1, the mixed
    # image, row 1 + k for source k
    loss_mask: torch.Tensor
    plan: Any  # what the encoder needs to know about the mask, see Encoder.plan
    redrawn: int = 0  # number of masks that were rejected before this one, see EESMM.draw


@dataclass
class Output:
    """What a training step and a figure need. Predictions are in the space of `EESMM.targets`."""

    loss: torch.Tensor  # (), Eq. 7
    losses: dict[str, torch.Tensor]  # unweighted, by name: mix (Loss1), source_1 (Loss2), source_2 (Loss3), ...
    visible: torch.Tensor  # (m, u) bool
    predicted_mix: torch.Tensor  # I^_c of Eq. 4, (b, u, d)
    predicted_sources: torch.Tensor  # I^_d, I^_e of Eq. 5 and 6, (b, n, u, d), in the order of the true sources


def patchify(images: torch.Tensor, unit: int) -> torch.Tensor:
    """Images (..., c, h, w) to the pixels of each mask unit (..., u, d)."""
    return rearrange(images, "... c (i p) (j q) -> ... (i j) (c p q)", p=unit, q=unit)


def unpatchify(patches: torch.Tensor, unit: int, rows: int) -> torch.Tensor:
    """The inverse of patchify: (..., u, d) to (..., c, h, w)."""
    return rearrange(patches, "... (i j) (c p q) -> ... c (i p) (j q)", i=rows, p=unit, q=unit)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each mask unit, as in MAE: patches (..., u, d) to two tensors (..., u, 1)."""
    mean = patches.mean(-1, keepdim=True)
    # The unbiased variance, written out because torch.var takes three times as long.
    squares = (patches - mean).square().sum(-1, keepdim=True)
    variance = squares / (patches.shape[-1] - 1)
    return mean, (variance + 1e-6).sqrt()


class Decoder(nn.Module):
    """Section 4.1.1: mask tokens for the masked units, positions, transformer blocks and a final norm, as in MAE."""

    def __init__(self, latent_width: int, rows: int, columns: int, width: int, blocks: int):
        super().__init__()
        self.embed = nn.Linear(latent_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("positions", sincos_positions(rows, columns, width), persistent=False)
        self.blocks = nn.ModuleList(  # each head has 32 channels: 16 heads at the paper's width of 512
            nn.TransformerEncoderLayer(
                width, width // 32, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, latent, ids_keep):
        """Latent tokens (b, v, latent_width) of the mask units ids_keep (v,) to decoded tokens (b, u, width)."""
        latent = self.embed(latent)
        mask_tokens = self.mask_token.expand(len(latent), len(self.positions), -1).to(latent.dtype)
        x = mask_tokens.index_copy(1, ids_keep, latent) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


LOSSES = {"mse": torch.square, "l1": torch.abs}  # error of a pixel, as a function of prediction - target
CHOICES = {
    "decomposition": ("subtract", "split"),
    "assignment": ("permutation", "fixed"),
    "masks": ("shared", "independent"),
    "loss": tuple(LOSSES),
    "loss_units": ("hidden", "all"),  # hidden: the loss is on masked units only
}

# All methods are settings of one program, so that a comparison changes nothing else. None means that the recipe, the
# flag or the constructor decides.
METHOD_NAMES = ("eesmm", "greenmim", "mae", "simmim", "mixmae")
# fmt: off
METHODS_TABLE = {
    #                  eesmm    greenmim  mae       simmim    mixmae
    "sources":        (2,       1,        1,        1,        2),          # source images in a mixed image
    "mask_ratio":     (None,    None,     None,     0.6,      0.5),
    "dense":          (None,    None,     None,     True,     None),       # encode masked tokens too, as mask tokens
    "decoder_blocks": (1,       1,        8,        0,        8),          # 0: a linear layer instead of a decoder
    "normalise":      (None,    None,     None,     False,    None),       # normalize targets per unit
    "loss":           (None,    None,     None,     "l1",     None),
    "loss_units":     (None,    "hidden", "hidden", "hidden", "hidden"),   # mask units in the loss
    "loss_weights":   (None,    None,     None,     None,     (0, 1, 1)),  # of the mixed image and of each source image
}
# fmt: on
METHODS = {
    method: {name: values[k] for name, values in METHODS_TABLE.items() if values[k] is not None}
    for k, method in enumerate(METHOD_NAMES)
}


class EESMM(nn.Module):
    """Superpose n images, mask the mixed image, encode it, reconstruct it and separate it into its source images.

    Args:
        encoder: See encoders.Encoder.
        sources: n, the number of source images in a mixed image.
        weights: lambda_k, (n,). Default: 1 / n each.
        decomposition: "subtract" is Eq. 5 and 6, which subtract true images from the predicted mixed image. "split"
            predicts one image for each source (section 4.1.1).
        assignment: Of the outputs of "split" to the source images. "permutation" takes the best of the n! orders for
            each sample, "fixed" keeps their order.
        decoder_width: A multiple of 32.
        decoder_blocks: With 0 blocks the prediction is a linear layer, as in SimMIM. This requires dense=True.
        dense: Encode all tokens and put a mask token in place of the masked ones, as in SimMIM.
        unit: Side of the masked squares in pixels, a multiple of the encoder's unit. Default: the encoder's unit.
        mask_ratio: Fraction of masked units. 0, no mask, requires loss_units="all".
        masks: "shared" draws one mask for all sources, "independent" draws one for each (Eq. 1 and 2).
        loss: "mse" (Eq. 7) or "l1".
        loss_units: The loss is on "hidden" (masked) units, as in Eq. 7, or on "all".
        loss_weights: Of the loss terms of the mixed image and of each source image. Default: 1 each.
        normalise: Normalize the target pixels of each mask unit, as in MAE.
        redraw: See `draw`.

    Raises:
        ValueError: If a setting is unknown, or if settings contradict each other.
    """

    superposes = True  # the mixed image is a weighted sum; False in MixMAE
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
        weights = torch.as_tensor(equal_weights(sources) if weights is None else weights, dtype=torch.float)
        loss_weights = (1.0,) * (sources + 1) if loss_weights is None else tuple(loss_weights)
        unit = unit or encoder.unit
        split = decomposition == "split"
        permute = split and assignment == "permutation"
        check_choices(decomposition=decomposition, assignment=assignment, masks=masks, loss=loss, loss_units=loss_units)
        check_sources(sources, weights, loss_weights, permute)
        check_decoder(dense, decoder_blocks, decoder_width)
        check_mask(encoder, unit, mask_ratio, may_show_all=loss_units == "all" and not dense)
        self.encoder, self.sources, self.dense, self.normalise, self.redraw = encoder, sources, dense, normalise, redraw
        self.decomposition = decomposition
        self.unit, self.mask_ratio, self.masks = unit, mask_ratio, masks
        self.undecayed = encoder.undecayed
        # With one source image there is one term, because the mixed image is the source image.
        self.terms = ["mix", *(f"source_{k + 1}" for k in range(sources) if sources > 1)]
        self.loss_kind, self.loss_units, self.loss_weights = loss, loss_units, loss_weights[: len(self.terms)]
        self.register_buffer("weights", weights, persistent=False)
        orders = torch.tensor(list(permutations(range(sources))) if permute else [])
        self.register_buffer("permutations", orders, persistent=False)  # (n!, n)

        self.decoder, features = None, encoder.width
        if decoder_blocks:
            self.decoder = Decoder(encoder.width, encoder.rows, encoder.columns, decoder_width, decoder_blocks)
            features = decoder_width
        self.mask_token = nn.Parameter(torch.randn(encoder.stem_width) * 0.02) if dense else None
        outputs = sources if split else 1
        self.head = nn.Linear(features, outputs * encoder.channels * encoder.unit**2)
        for name, parameter in self.named_parameters():
            if name.startswith(("decoder.", "head.")) and parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.head.bias)

    # Algorithm 1

    def forward(self, images: torch.Tensor, visible: torch.Tensor | Masking | None = None) -> Output:
        """Algorithm 1 without the optimizer step.

        Args:
            images: Normalized source images (b, n, c, h, w).
            visible: A bool mask (u,) or (n, u), True = visible, or a Masking. Default: draw a mask.
        """
        masking = self.prepare_masking(images, visible)  # M_k, lambda_k
        mixed = self.mix(images, masking)  # I_mixed, Eq. 1-3
        latent = self.encoder(mixed, masking.plan, self.mask_token)  # Z
        predicted = self.decode(latent, masking)  # Eq. 4
        targets = self.targets(images)  # I_a, I_b, normalized
        mix, sources = self.decompose(predicted, targets, masking)  # I^_c; I^_d, I^_e: Eq. 5, 6
        errors = [self.distance(mix, self.combine(targets, masking))]  # of each mask unit, for Loss1
        if self.sources > 1:
            errors += self.distance(sources, targets).unbind(1)  # for Loss2, Loss3
        masks = masking.loss_mask[: len(self.terms)]
        losses = {name: self.masked_mean(*pair) for name, *pair in zip(self.terms, errors, masks, strict=True)}  # Eq. 7
        # Loss1 + Loss2 + Loss3
        loss = sum(weight * term for weight, term in zip(self.loss_weights, losses.values(), strict=True))
        return Output(loss, losses, masking.visible, mix, sources)

    # masks (Eq. 1, 2) and superposition (Eq. 3)

    def draw(self, generator: torch.Generator | None = None) -> Masking:
        """Draw the mask of a training step. A fork that draws lambda_k too does it here, from the same generator.

        An encoder that computes visible tokens only needs tensors whose shapes depend on the mask. A rare mask with
        unusual shapes would make torch.compile compile the network again, so it is rejected and drawn again, at most
        nine times; the tenth mask is used. Of 300 random masks over 7 x 7 mask units for Swin-T, none is rejected at a
        mask ratio of 0.75, and 9 % at 0.5. Masks of another kind, such as one block of mask units, may be rejected
        nearly always. A fork that draws them sets redraw=False, and every mask is used.
        """
        generator = generator or torch.default_generator
        rows, columns, factor = self.encoder.rows, self.encoder.columns, self.unit // self.encoder.unit
        count = self.sources if self.masks == "independent" else 1
        for redrawn in range(10 if self.redraw else 1):
            visible = draw_masks(count, rows * columns // factor**2, self.mask_ratio, generator)
            visible = upsample_mask(visible, rows // factor, factor)
            masking = self.make_masking(visible, units_to_encode(visible, generator))
            if masking.plan.fits:
                break
        masking.redrawn = redrawn
        return masking

    def make_masking(self, visible: torch.Tensor, encoded: torch.Tensor | None = None) -> Masking:
        """Compute what follows from a mask.

        Args:
            visible: (u,) or (m, u) bool, on the CPU.
            encoded: (u,) bool, the mask units that the encoder reads. Default: those visible in any source image.
        """
        visible = visible.view(-1, visible.shape[-1])
        if len(visible) not in (1, self.sources):
            raise ValueError(f"{len(visible)} masks for {self.sources} sources: give one, or one per source")
        if self.loss_units == "hidden" and visible.all(-1).any():
            raise ValueError("nothing is masked, so no mask unit is left to predict")
        # Loss1 is on mask units that are masked in at least one source, the term of a source on those masked in it.
        masked = torch.cat([~visible.all(0, keepdim=True), (~visible).expand(self.sources, -1)]).float()
        loss_mask = torch.ones_like(masked) if self.loss_units == "all" else masked
        plan, ids_keep = self.plan_encoder(visible, visible.any(0) if encoded is None else encoded)
        return Masking(visible, self.weights, ids_keep, loss_mask / loss_mask.sum(-1, keepdim=True), plan)

    def plan_encoder(self, visible: torch.Tensor, encoded: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """The encoder's plan of masks (m, u) and mask units to encode (u,), and the indices of the units it returns."""
        returned = torch.ones_like(encoded) if self.dense else encoded
        return self.encoder.plan(encoded, self.dense), returned.nonzero().flatten()

    def prepare_masking(self, images: torch.Tensor, visible: torch.Tensor | Masking | None) -> Masking:
        """The Masking of a step on the device of the images: drawn, made from a mask, or the given one."""
        if images.ndim != 5 or images.shape[1:3] != (self.sources, self.encoder.channels):
            raise ValueError(
                f"images must be (b, {self.sources}, {self.encoder.channels}, h, w), got {tuple(images.shape)}"
            )
        if not isinstance(visible, Masking):
            visible = self.draw() if visible is None else self.make_masking(visible)
        return to_device(visible, images.device)

    def mix(self, images: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Eq. 1-3: source images (b, n, c, h, w) to the encoder's input I_mixed (b, c, h, w).

        A mask that all sources share is not applied here, because the encoder skips or replaces masked tokens itself.
        Independent masks act on each source image before the superposition.
        """
        if len(masking.visible) > 1:
            images = mask_pixels(images, masking.visible, self.encoder.unit)
        return superpose(images, masking.weights)

    def combine(self, patches: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Patches of the sources (b, n, u, d) to those of the mixed image (b, u, d): the weighted sum of Eq. 3."""
        return superpose(patches, masking.weights)

    # prediction (Eq. 4)

    def decode(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Eq. 4: I^_c = f(I_0). Decoder and head predict the pixels of every mask unit.

        Args:
            latent: Z, the encoder's output (b, v, width).

        Returns:
            (b, outputs, u, d). "split" has n outputs, one for each source. Otherwise the only output is the mixed
            image.
        """
        x = self.decoder(latent, masking.ids_keep) if self.decoder else latent
        return rearrange(self.head(x), "b u (n d) -> b n u d", d=self.encoder.channels * self.encoder.unit**2).float()

    def targets(self, images: torch.Tensor) -> torch.Tensor:
        """The true sources (b, n, u, d), each normalized on its own.

        The target for the mixed image is the weighted sum of these, not the normalized mixed image.
        """
        patches = patchify(images.float(), self.encoder.unit)
        if self.normalise:
            mean, std = patch_statistics(patches)
            patches = (patches - mean) / std
        return patches

    # decomposition (Eq. 5, 6) and loss (Eq. 7)

    def decompose(
        self, predicted: torch.Tensor, targets: torch.Tensor, masking: Masking
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Eq. 5 and 6: I^_d = I^_c - I_b and I^_e = I^_c - I_a, with the weights of Eq. 3.

        "subtract": I^_k = (I^_c - sum over j != k of lambda_j I_j) / lambda_k, where I_j are true images. Therefore
        I^_k - I_k = (I^_c - I_c) / lambda_k. As printed, without weights,
        I^_d - I_a = I^_e - I_b = I^_c - (I_a + I_b): both sources would have the same error, which would train I^_c
        towards twice the mixed image; see `notebooks/06_decomposition.ipynb`.
        "split": the outputs are the sources, in the best order, and the mixed image is their weighted sum.

        Args:
            predicted: Outputs of `decode` (b, outputs, u, d).
            targets: (b, n, u, d).

        Returns:
            The predicted mixed image (b, u, d) and the predicted sources (b, n, u, d).
        """
        if self.decomposition == "split":
            sources = self.assign(predicted, targets, masking.loss_mask) if len(self.permutations) else predicted
            return superpose(sources, masking.weights), sources
        mix, weights = predicted[:, 0], masking.weights[:, None, None]
        others = superpose(targets, masking.weights)[:, None] - weights * targets
        return mix, (mix[:, None] - others) / weights

    @torch.no_grad()
    def best_order(self, predicted, targets, loss_mask):
        """For each sample, the output that stands for each source (b, n): the order with the least total error."""
        errors = [self.distance(predicted, targets[:, k, None]) * loss_mask[1 + k] for k in range(self.sources)]
        error = torch.stack([e.sum(-1) for e in errors], dim=-1)  # (b, output, source)
        # permutations[p, k] is the output that order p assigns to source k
        total = error[:, self.permutations, torch.arange(self.sources, device=error.device)].sum(-1)  # (b, n!)
        return self.permutations[total.argmin(-1)]

    def assign(self, predicted, targets, loss_mask):
        """Permutation-invariant training (Yu et al. 2017): reorder outputs (b, n, u, d) to match the sources best."""
        order = self.best_order(predicted, targets, loss_mask)
        return predicted.gather(1, order[:, :, None, None].expand_as(predicted))

    def masked_mean(self, error: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
        """Eq. 7: the mean of errors (b, u) over masked units, where loss_mask (u,) is 1 / their number, else 0."""
        return (error * loss_mask).sum(-1).mean()

    def distance(self, predicted, target):
        """(I - I^)^2 of Eq. 7, or |I - I^| for L1, averaged over each mask unit: (..., u, d) to (..., u)."""
        return LOSSES[self.loss_kind](predicted - target).mean(-1)

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter, for layer-wise learning rates: the decoder and the head have the last one."""
        if name == "mask_token":  # SimMIM's mask token enters at the patch embedding
            return 0
        return self.encoder.layer_of(name.removeprefix("encoder."))


class MixMAE(EESMM):
    """MixMAE (Liu et al. 2023): each mask unit of the mixed image shows one of two source images.

    Attention stays inside the mask units of each source image, and the decoder runs once for each source.

    Args:
        encoder: One with `partitions`, which is a Swin.
        both_orders: In training, use each pair of images twice, as (a, b) and as (b, a), like the published code. A
            batch of B source images then gives B mixed images, and the output has twice as many rows.
        settings: Those of EESMM, with two sources that share one mask, and without dense=True.
    """

    superposes = False

    def __init__(self, encoder: Encoder, both_orders: bool = False, **settings):
        if not getattr(encoder, "partitions", False):
            raise ValueError(
                "method mixmae needs an encoder that keeps attention inside each source image, which only a Swin does: "
                "give a swin_... or mixmim_... as --model"
            )
        if settings.get("sources", 2) != 2 or settings.get("masks", "shared") != "shared" or settings.get("dense"):
            raise ValueError(
                "method mixmae needs 2 sources that share one mask: each mask unit shows one source or the other"
            )
        super().__init__(encoder, **settings | {"decomposition": "subtract"})  # one output for each run of the decoder
        self.both_orders = both_orders

    def forward(self, images: torch.Tensor, visible: torch.Tensor | Masking | None = None) -> Output:
        """Like EESMM.forward, for images (b, 2, c, h, w); 2 b mixed images in training with `both_orders`."""
        if self.both_orders and self.training:
            images = torch.cat([images, images.flip(1)])
        return super().forward(images, visible)

    def make_masking(self, visible: torch.Tensor, encoded: torch.Tensor | None = None) -> Masking:
        """The second source is visible where the first one is masked."""
        visible = visible.view(-1, visible.shape[-1])[:1]
        return super().make_masking(torch.cat([visible, ~visible]), encoded)

    def plan_encoder(self, visible: torch.Tensor, encoded: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        """All mask units are encoded. The indices are a list: the visible mask units of each source."""
        return self.encoder.plan(visible[0], partition=True), [mask.nonzero().flatten() for mask in visible]

    def mix(self, images: torch.Tensor, masking: Masking) -> torch.Tensor:
        """The mixed images (b, c, h, w): each mask unit comes from the source that is visible there."""
        return mask_pixels(images, masking.visible, self.encoder.unit).sum(1)

    def combine(self, patches: torch.Tensor, masking: Masking) -> torch.Tensor:
        """For each mask unit, the patch of the source that is masked there and has to be predicted."""
        return torch.where(masking.visible[0, :, None], patches[:, 1], patches[:, 0])

    def decode(self, latent: torch.Tensor, masking: Masking) -> torch.Tensor:
        """Outputs (b, 2, u, d): each source is predicted from its own visible mask units."""
        decoded = [self.decoder(latent.index_select(1, ids_keep), ids_keep) for ids_keep in masking.ids_keep]
        return self.head(torch.stack(decoded, dim=1)).float()

    def decompose(
        self, predicted: torch.Tensor, targets: torch.Tensor, masking: Masking
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs are the sources, in their order."""
        return self.combine(predicted, masking), predicted


METHOD_CLASSES = {"mixmae": MixMAE}  # all other methods are settings of EESMM


def check_choices(**settings: str):
    """Raise a ValueError if a setting is not one of its CHOICES."""
    for name, value in settings.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} {value!r}: choose from {', '.join(CHOICES[name])}")


def check_sources(sources: int, weights: torch.Tensor, loss_weights: tuple, permute: bool):
    """Raise a ValueError if weights or loss weights do not match the sources. permute: the best order is searched."""
    if weights.shape != (sources,) or not (weights > 0).all() or abs(weights.sum() - 1) > 1e-4:
        rounded = [round(weight, 4) for weight in weights.tolist()]
        raise ValueError(f"weights {rounded}: give {sources} positive numbers that sum to 1")
    if sources == 1:
        return
    if permute and weights.max() - weights.min() > 1e-6:
        raise ValueError(
            "unequal weights already determine which output is which source, so the best order cannot be searched: "
            "use assignment fixed, or equal weights"
        )
    if permute and sources > 5:
        raise ValueError(
            f"the search for the best of {sources}! orders is too slow beyond 5 sources: use assignment fixed or "
            "decomposition subtract"
        )
    if len(loss_weights) != sources + 1:
        raise ValueError(
            f"loss weights {loss_weights}: give {sources + 1} numbers, for the mixed image and for each source"
        )


def check_decoder(dense: bool, blocks: int, width: int):
    """Raise a ValueError if the decoder cannot be built, or if the encoder would not learn with it."""
    if not dense and blocks < 1:
        raise ValueError(
            "an encoder of visible tokens only needs at least 1 decoder block: without one, the prediction for masked "
            "units is a constant and the encoder gets no gradient"
        )
    if width % 32:
        raise ValueError(f"decoder width {width}: give a multiple of 32, because each head has 32 channels")


def check_mask(encoder: Encoder, unit: int, mask_ratio: float, may_show_all: bool):
    """Raise a ValueError if squares of this size, or this mask ratio, are not possible. may_show_all: 0 is possible."""
    height, width = encoder.image_size
    if unit % encoder.unit or height % unit or width % unit:
        size = f"{height} x {width}" if width != height else height
        raise ValueError(
            f"unit {unit}: give a multiple of the encoder's unit, {encoder.unit} pixels, that divides the "
            f"image size, {size}"
        )
    visible_count((height // unit) * (width // unit), mask_ratio)
    if mask_ratio == 0 and not may_show_all:
        raise ValueError(
            "mask ratio 0 masks nothing, so that only separation is trained: it needs loss units all, and an encoder "
            "of visible units only"
        )


def build(method: str, encoder: Encoder, **settings) -> EESMM:
    """The model of a method in METHODS. `settings` override the method's own."""
    return METHOD_CLASSES.get(method, EESMM)(encoder, **METHODS[method] | settings)


def from_settings(settings: dict) -> EESMM:
    """Build the model that the flags of train.py describe.

    Args:
        settings: Values by the names of their flags: vars(args), or config["arguments"] of a checkpoint. Whatever is
            missing or None gets the default of the method or of the constructor.

    Raises:
        UserError: If settings contradict each other.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    method = settings.get("method", "eesmm")
    encoder_options = {
        name: settings[name] for name in ("image_size", "window", "drop_path", "channels") if name in settings
    }
    # A new argument of a constructor needs only a flag of the same name to get here.
    names = signature(EESMM).parameters.keys() | signature(METHOD_CLASSES.get(method, EESMM)).parameters.keys()
    options = {name: settings[name] for name in names & settings.keys()}

    default_sources = METHODS[method]["sources"]
    sources = options.setdefault("sources", default_sources)
    if default_sources == 1 and sources != 1:
        raise UserError(f"--method {method} takes one image; use --method eesmm for --sources {sources}")
    if default_sources > 1 and sources < 2:
        raise UserError(f"--method {method} superposes at least 2 sources; --method greenmim is the same with one")
    encoder = encoders.make(settings["model"], settings.get("activation_checkpointing", False), **encoder_options)
    try:
        if settings.get("views") == "four":  # two views of each image are superposed, so there are four sources
            weights = torch.tensor(options["weights"]) if "weights" in options else equal_weights(sources)
            options |= {"sources": 4, "weights": four_view_weights(weights)}
        model = build(method, encoder, **options)
    except ValueError as error:
        raise UserError(str(error)) from None
    if "norm_eps" in settings:
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = settings["norm_eps"]
    if settings.get("xavier"):
        init_xavier(model)
    return model


def init_xavier(model: nn.Module):
    """Xavier-uniform weights and zero biases in all linear layers, as in the code of MAE, GreenMIM and MixMAE."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
