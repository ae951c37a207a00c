"""What bench.py measures against: other libraries' Swin of the same shape, and SimMIM built on one.

Axis letters: b images, h w tokens or pixels, c channels, i j units.
"""
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from torch import nn

from engine import UserError
from swin import Swin


def timm_swin(encoder: Swin, **more):
    """timm's Swin of the same shape."""
    try:
        from timm.models.swin_transformer import SwinTransformer
    except ImportError:
        raise UserError("timm is not installed here: pip install timm") from None
    return SwinTransformer(img_size=encoder.image_size, patch_size=encoder.embed.patch, embed_dim=encoder.embed.proj.out_features,
                           depths=encoder.depths, num_heads=[stage.blocks[0].attention.heads for stage in encoder.stages],
                           window_size=encoder.windows[0], drop_path_rate=0.0, **more)


def torchvision_swin(encoder: Swin):
    """torchvision's Swin of the same shape, without stochastic depth."""
    patch, window = encoder.embed.patch, encoder.windows[0]
    return torchvision.models.SwinTransformer(
        [patch, patch], encoder.embed.proj.out_features, list(encoder.depths),
        [stage.blocks[0].attention.heads for stage in encoder.stages], [window, window], stochastic_depth_prob=0.0)


class SimMIM(nn.Module):
    """SimMIM (Xie et al. 2022) around another library's Swin: mask token after the patch embedding, 1 x 1 head, L1."""

    def __init__(self, body, unit: int, ratio: float):
        super().__init__()
        self.body, self.unit, self.ratio = body, unit, ratio
        self.mask_token = nn.Parameter(torch.zeros(body.embed_dim))
        self.head = nn.Conv2d(body.num_features, 3 * unit ** 2, 1)

    def forward(self, images, visible):
        x = self.body.patch_embed(images)  # (b, h, w, c)
        cells = rearrange(visible, "(i j) -> i j", i=images.shape[-1] // self.unit)
        cells = cells.repeat_interleave(x.shape[1] // len(cells), 0).repeat_interleave(x.shape[2] // len(cells), 1)
        x = self.body.norm(self.body.layers(torch.where(cells[..., None], x, self.mask_token.to(x.dtype))))
        predicted = F.pixel_shuffle(self.head(rearrange(x, "b h w c -> b c h w")), self.unit).float()
        hidden = ~visible.view(1, 1, len(visible) // x.shape[2], -1).repeat_interleave(self.unit, 2).repeat_interleave(self.unit, 3)
        return ((predicted - images).abs() * hidden).sum() / (hidden.sum() * 3 * len(images))

    def layer_of(self, name):
        return 0
