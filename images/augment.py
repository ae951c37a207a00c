"""RandAugment (Cubuk et al. 2020) as timm applies it for fine-tuning, on crops of training images.

`python finetune.py --randaugment 27` has timm's rand-m9-mstd0.5-inc1, which MAE uses. timm's magnitude goes from 0 to
10 and ours from 0 to 30.
"""

import math

import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode, v2

from images.formats import PixelFormat

# A run keeps one of these in its config, so that it resumes with the augmentation that it started with. The runs of the
# earliest commits have none: they are EARLIER_AUGMENTATION.
AUGMENTATION = "rand-m9-mstd0.5-inc1, erasing by noise"
EARLIER_AUGMENTATION = "operations with a chance of one half, erasing by noise"
FILL = (124, 116, 104)  # ImageNet's mean color, where an operation moves pixels out of the image


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Pillow's affine transform: with the matrix (a, b, c, d, e, f) pixel (x, y) is read at (a x + b y + c, d x + e y +
    f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def enhance(enhancer):
    """The operation that scales one property of an image by 1 + 0.9 times the level, at least by 0.1."""
    return lambda image, level: enhancer(image).enhance(max(0.1, 1 + 0.9 * level))


def posterize(image: Image.Image, level: float) -> Image.Image:
    """Keep 4 bits of each value, and fewer with a higher level; without any bit the image is black."""
    bits = 4 - int(4 * level)
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def solarize_add(image: Image.Image, level: float) -> Image.Image:
    """Add up to 110 to the values below 128."""
    table = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


# timm's "increasing" operations, whose effect grows with the level. An operation takes an image and a level, which is
# from 0 to 1 for an unsigned operation and from -1 to 1 for a signed one.
UNSIGNED = {
    "AutoContrast": lambda image, level: ImageOps.autocontrast(image),
    "Equalize": lambda image, level: ImageOps.equalize(image),
    "Invert": lambda image, level: ImageOps.invert(image),
    "PosterizeIncreasing": posterize,
    "SolarizeIncreasing": lambda image, level: ImageOps.solarize(image, 256 - int(256 * level)),
    "SolarizeAdd": solarize_add,
}
SIGNED = {
    "Rotate": lambda image, level: image.rotate(30 * level, Image.Resampling.BICUBIC, fillcolor=FILL),
    "ColorIncreasing": enhance(ImageEnhance.Color),
    "ContrastIncreasing": enhance(ImageEnhance.Contrast),
    "BrightnessIncreasing": enhance(ImageEnhance.Brightness),
    "SharpnessIncreasing": enhance(ImageEnhance.Sharpness),
    "ShearX": lambda image, level: affine(image, 1, 0.3 * level, 0, 0, 1, 0),
    "ShearY": lambda image, level: affine(image, 1, 0, 0, 0.3 * level, 1, 0),
    "TranslateXRel": lambda image, level: affine(image, 1, 0, 0.45 * level * image.width, 0, 1, 0),
    "TranslateYRel": lambda image, level: affine(image, 1, 0, 0, 0, 1, 0.45 * level * image.height),
}


class RandAugment:
    """Draws two of the fifteen operations, with replacement, and applies each with a probability of one half.

    Args:
        magnitude: from 0 to 30. Each operation draws its level from a normal distribution with the mean magnitude / 30
        and
            a standard deviation of 0.05.
    """

    def __init__(self, magnitude: int):
        self.magnitude, self.names = magnitude, [*UNSIGNED, *SIGNED]

    def __call__(self, image: Image.Image) -> Image.Image:
        for _ in range(2):
            # every operation makes the same draws, whether it is applied or not
            name = self.names[int(torch.randint(len(self.names), ()))]
            skip, sign = torch.rand(2).tolist()
            level = min(1.0, max(0.0, self.magnitude / 30 + 0.05 * torch.randn(()).item()))
            if skip >= 0.5:
                continue
            if name in UNSIGNED:
                image = UNSIGNED[name](image, level)
            else:
                image = SIGNED[name](image, level if sign < 0.5 else -level)
        return image


def randaugment(magnitude: int, form: PixelFormat, kind: str = AUGMENTATION):
    """The augmentation of a crop by RandAugment.

    Args:
        magnitude: from 0 to 30.
        form: the pixel format of the crops. Operations on color need three 8-bit channels; for other images there are
        only
            rotation, translation and shear, up to the same limits.
        kind: AUGMENTATION, or EARLIER_AUGMENTATION for a run that started with it: torchvision's operations, which
        change
            pixels by a fifth less on average.

    Returns:
        a transform of crops (c, h, w), uint8 or float32; None at magnitude 0.
    """
    if not magnitude:
        return None
    if not form.is_rgb8:
        level = magnitude / 30
        shear = math.degrees(math.atan(0.3 * level))
        settings = dict(interpolation=InterpolationMode.BILINEAR, fill=[255 * mean for mean in form.mean])
        moves = [
            v2.RandomAffine(30 * level, **settings),
            v2.RandomAffine(0, translate=(0.45 * level, 0.45 * level), **settings),
            v2.RandomAffine(0, shear=(-shear, shear, -shear, shear), **settings),
            v2.Identity(),
        ]
        operation = v2.RandomApply([v2.RandomChoice(moves)], 0.5)
        return v2.Compose([operation, operation])
    operations = [RandAugment(magnitude)]
    if kind != AUGMENTATION:
        earlier = v2.RandAugment(1, magnitude, interpolation=InterpolationMode.BILINEAR, fill=list(FILL))
        operations = [v2.RandomApply([earlier], 0.5)] * 2
    return v2.Compose([v2.ToPILImage(), *operations, v2.PILToTensor()])
