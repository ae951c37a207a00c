"""What every notebook uses: the set-up, photographs, small models, and drawing that is not the lesson.

Imported first; it finds the repository by its own place, makes torch repeatable and sets how figures look.
"""
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
from IPython import get_ipython
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mixing.py, swin.py, model.py, ...

from engine import rng, data, optim
from images.crops import normalize  # noqa: E402
from images.crops import to_2tuple  # noqa: E402
from mixing import mask_pixels  # noqa: E402
from model import EESMM  # noqa: E402
from swin import swin_micro  # noqa: E402

FAST = os.environ.get("EESMM_NOTEBOOK_FAST", "0") != "0"  # fewer steps and repetitions, for the tests
HIDDEN = 0.85  # the grey of hidden units, in every notebook
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "retina.jpg",
               "hubble_deep_field.jpg")

torch.manual_seed(0)
torch.set_num_threads(1)  # sums then come out the same on any number of cores
plt.rcParams.update({
    "figure.dpi": 100, "figure.facecolor": "white", "savefig.facecolor": "white", "figure.constrained_layout.use": True,
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.grid": False})
if get_ipython():  # figures as large as they say, and no version of matplotlib inside
    get_ipython().run_line_magic("config", 'InlineBackend.print_figure_kwargs = {"bbox_inches": None, "metadata": {"Software": None}}')


def photograph(name: str, size=224) -> torch.Tensor:
    """The middle of one of scikit-image's photographs, (3, h, w) in 0-1. size: one number, or height and width."""
    image = Image.open(Path(skimage.data.__file__).parent / name).convert("RGB")
    return torch.from_numpy(np.array(ImageOps.fit(image, to_2tuple(size)[::-1]))).permute(2, 0, 1) / 255


def hide(image: torch.Tensor, visible: torch.Tensor, unit: int = 32) -> torch.Tensor:
    """Eq. 1 for the eye: images (..., 3, h, w) in 0-1 with hidden units grey."""
    return mask_pixels(image, visible, unit) + mask_pixels(torch.full_like(image, HIDDEN), ~visible, unit)


def picture(axis, image: torch.Tensor, title: str = ""):
    """An image (3, h, w) in 0-1, without ticks."""
    axis.imshow(image.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])


def row(pictures, titles, width: float = 9.0, height: float | None = None):
    """A row of images (3, h, w) with their titles. Returns the axes."""
    figure, axes = plt.subplots(1, len(pictures), figsize=(width, height or width / len(pictures) + 0.35), squeeze=False)
    for axis, image, title in zip(axes[0], pictures, titles):
        picture(axis, image, title)
    return axes[0]


def table(rows, titles, height: float, width: float = 9.4):
    """Rows of images (3, h, w) under one row of titles. Returns the axes."""
    rows = list(rows)
    figure, axes = plt.subplots(len(rows), len(titles), figsize=(width, height), squeeze=False)
    for line, images in zip(axes, rows):
        for axis, image in zip(line, images):
            picture(axis, image)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title)
    return axes


def mask_map(axis, visible: torch.Tensor, title: str = "", rows: int | None = None):
    """A mask (units,), of a square map if `rows` is not given: hidden units grey, visible ones blue and numbered."""
    rows = rows or int(len(visible) ** 0.5)
    columns = len(visible) // rows
    colours = torch.where(visible.view(rows, columns, 1), torch.tensor([0.6, 0.78, 0.92]), torch.tensor([HIDDEN] * 3))
    axis.imshow(colours)
    for number in visible.nonzero().flatten().tolist():
        axis.text(number % columns, number // columns, number, ha="center", va="center", fontsize=9)
    axis.set(title=title, xticks=np.arange(0.5, columns), yticks=np.arange(0.5, rows), xticklabels=[], yticklabels=[])
    axis.grid(color="white")
    axis.tick_params(length=0)


def textures(names=("brick.png", "grass.png", "gravel.png", "ihc.png")) -> torch.Tensor:
    """Grey photographs of 512 x 512 pixels with equal means and contrasts, (len(names), 512, 512) in 0-1: what tells them apart is their texture."""
    found = torch.stack([photograph(name, 512).mean(dim=0) for name in names])
    mean, deviation = found.mean(dim=(1, 2), keepdim=True), found.std(dim=(1, 2), keepdim=True)
    return ((found - mean) / deviation * 0.2 + 0.5).clamp(0, 1)


def mosaic(number: int, found: torch.Tensor, size: int = 128, seeds: int = 6):
    """Mosaic `number` of these textures: an image (3, size, size) and its truth (size, size), the texture of each pixel.

    A pixel shows the texture of the nearest of some random points. Mosaics of other numbers show other regions of the textures.
    """
    across = found.shape[-1] // size
    top, left = size * (number // across), size * (number % across)
    draws = rng.uniform(3 * seeds, 0, "mosaic", number)
    order = [*range(len(found)), *(int(draw * len(found)) for draw in draws[2 * seeds + len(found):])]  # each texture at least once
    y, x = np.mgrid[:size, :size]
    nearest = np.hypot(y - size * draws[:seeds, None, None], x - size * draws[seeds:2 * seeds, None, None]).argmin(axis=0)
    truth = torch.tensor(order)[torch.from_numpy(nearest)]
    return found[:, top:top + size, left:left + size].gather(0, truth[None]).expand(3, -1, -1), truth


def small_model(size=64, decoder_width: int = 96, depths=(1, 2, 1), seed: int = 0, **settings) -> EESMM:
    """A model that can be trained in a notebook: units of 8 px, 64 of them at 64 px. With the same first weights for a seed."""
    torch.manual_seed(seed)
    return EESMM(swin_micro(image_size=size, width=48, depths=depths), decoder_width=decoder_width, **settings)


def composites(crops, numbers, sources: int = 2) -> torch.Tensor:
    """Crops of these numbers, normalised and joined: (b, sources, 3, h, w)."""
    return normalize(crops.pixels[torch.tensor(numbers)].float()).unflatten(0, (-1, sources))


def own_loss(model: EESMM, images: torch.Tensor, masking) -> torch.Tensor:
    """The loss that the model computes."""
    return model(images, masking).loss


def pretrain(model: EESMM, crops, steps: int, look=None, loss_of=own_loss, batch: int = 32, peak: float = 2e-3) -> EESMM:
    """Algorithm 1 on crops; notebook 7 takes this loop apart. look(step): called before the first step and after each."""
    size = model.encoder.image_size
    cutter, optimizer = data.Crops(crops, size, scale=(0.5, 1.0)), torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step, keys in enumerate(data.BatchSampler(len(crops), batch, seed=0, start=0, stop=steps)):
        if look:
            look(step)
        optimizer.param_groups[0]["lr"] = optim.learning_rate(step, steps, steps // 7, peak, 1e-6, 1e-5)
        images = data.prepare_batch(cutter.__getitems__(keys), "cpu", size).unflatten(0, (-1, model.sources))
        loss_of(model, images, model.draw(rng.generator(0, "mask", step))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step(), optimizer.zero_grad()
    if look:
        look(steps)
    return model.eval()


# the map of the method, for notebook 0 ----------------------------------------------------------------------------------

def schematic(sources, mixed, visible, shapes: dict, numbers: bool = True):
    """The method from photographs (n, 3, h, w) to losses. shapes: what is written on each arrow; numbers: whether it is."""
    figure, axis = plt.subplots(figsize=(9.6, 5.2))
    axis.set(xlim=(0, 96), ylim=(-0.5, 52))
    axis.axis("off")

    def image(x, y, content, title, size=11):
        axis.imshow(content.permute(1, 2, 0).clamp(0, 1), extent=(x, x + size, y, y + size), aspect="auto")
        axis.text(x + size / 2, y + size + 0.6, title, ha="center", va="bottom")

    def box(x, y, width, height, text, colour):
        axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="black", linewidth=0.8))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center")

    def arrow(start, end, name, place, ha="center"):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black"})
        axis.text(*place, shapes[name] if numbers else f"({list(shapes).index(name) + 1})", ha=ha, va="bottom", color="tab:blue")

    for k, (source, y) in enumerate(zip(sources, (37, 22)), 1):
        image(1, y, source, f"$I_{k}$, source {k}")
        arrow((12.4, y + 5.5), (30.6, 36 if k == 1 else 34), f"source {k}", (21, y + (6.5 if k == 1 else 4.2)))
    image(31, 29.5, mixed, r"$I_{mixed}$, Eq. 3")
    arrow((42.4, 35), (53.2, 35), "mix", (47.8, 35.7))
    image(53.6, 29.5, hide(mixed, visible), "masked, Eq. 1, 2")
    arrow((65, 35), (76.2, 35), "visible", (70.6, 35.7))
    box(76.6, 29.5, 16, 11, "encoder, Z\nSwin-B, 4 stages", "#cfe3f5")
    arrow((84.6, 29.2), (84.6, 18.4), "latent", (85.4, 23), ha="left")
    box(76.6, 10, 16, 8, "decoder\n1 block", "#fbe3c5")
    arrow((76.2, 14), (67.4, 14), "decoded", (71.8, 14.7))
    box(57, 10, 10, 8, "head\nlinear", "#fbe3c5")
    for k, (name, content, y) in enumerate(((r"$\hat I_c$, Eq. 4", mixed, 15.2), (r"$\hat I_d$, Eq. 5", sources[0], 7.6),
                                            (r"$\hat I_e$, Eq. 6", sources[1], 0)), 1):
        box(31, y, 11, 6.6, name, "#dff0d8")
        axis.imshow(content.permute(1, 2, 0).clamp(0, 1), extent=(7, 13.6, y, y + 6.6), aspect="auto")
        axis.annotate("", (14.2, y + 3.3), (30.6, y + 3.3), arrowprops={"arrowstyle": "<|-|>", "color": "tab:red"})
        axis.text(22.4, y + 3.8, f"Loss{k}", ha="center", va="bottom", color="tab:red")
    arrow((56.6, 15), (42.4, 18.5), "mix out", (50, 19))
    arrow((56.6, 13), (42.4, 8), "sources out", (50, 6.5))
    axis.text(84.6, 8.5, "decoder and head are thrown\naway after pre-training", ha="center", va="top", color="gray")
    return figure
