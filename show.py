"""The picture of the method: source images, mixed image, masked mixed image and predictions. Also the page of a run.

python show.py a.jpg b.jpg --checkpoint runs/demo-eesmm-1/last.pt -o picture.png
python show.py --run runs/demo-eesmm-1  # writes runs/demo-eesmm-1/report.html

Axis letters: b mixed images, n source images, c channels, h w pixels, u mask units, d values of a mask unit.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat

from engine import flags, plots, report, rng
from engine.checkpoints import check_kind, load_checkpoint
from engine.dist import run_main
from engine.errors import DataError, UserError, warn
from engine.files import check_output, write_atomically
from images.crops import denormalize, normalize
from images.formats import PixelFormat
from images.sources import FileImages
from mixing import mask_pixels, superpose
from model import EESMM, Masking, from_settings, patch_statistics, patchify, unpatchify

# Metrics in log.jsonl that have a curve of their own, with its title. The first one that was logged is drawn.
METRIC_LABELS = {
    "eval_knn_top1": "k-NN top-1, %",
    "eval_top1": "top-1, %",
    "eval_miou": "mean IoU, %",
    "eval_feature_rank": "feature rank",
}


def draw(model: EESMM, images: torch.Tensor, masking: Masking) -> dict:
    """Compute the images of a picture, and the errors for its caption.

    A model with normalized targets predicts each mask unit up to its mean and standard deviation. To draw a source,
    both are taken from the true image: I_k = mean_k + std_k * prediction_k. The mixed image is the weighted sum of
    the sources drawn in this way, or an approximation, see `mix_is_approximate`.

    If the loss is on masked units only, visible units show the encoder's input instead of a prediction.

    Args:
        model: in evaluation mode.
        images: normalized source images (b, n, c, h, w).
        masking: from `EESMM.draw`.

    Returns:
        Images that are normalized like `images`, and mean squared errors of the predictions on masked units (on all
        units if there is no mask):

        mix: (b, c, h, w), Eq. 3 without a mask.
        input: (b, c, h, w), what the encoder gets, Eq. 1-3. Units that are masked in all sources are not hidden yet.
        predicted_mix: (b, c, h, w), Eq. 4.
        predicted_sources: (b, n, c, h, w), Eq. 5 and 6.
        mix_error, source_error: of the predicted mixed image and of the predicted sources.
        mix_for_all_error: of the predicted mixed image if it is taken for every source.

        MixMAE has no predicted_mix, mix_error and mix_for_all_error.
    """
    out = model(images, masking)
    unit, rows = model.encoder.unit, model.encoder.rows
    encoder_input = model.mix(images, masking)
    mixed = superpose(images, masking.weights) if model.superposes else encoder_input
    sources, mix = out.predicted_sources, out.predicted_mix
    if model.normalise:
        mean, std = patch_statistics(patchify(images, unit))
        sources = mean + std * sources
        mean, std = patch_statistics(patchify(mixed, unit))
        mix = mean + std * mix if mix_is_approximate(model) else model.combine(sources, masking)

    # (u,): masked in all sources. In MixMAE, where each unit shows one source, (n, u): masked in this source.
    masked = ~masking.visible.all(0) if model.superposes else ~masking.visible
    evaluated = masked if masked.any() else ~masked
    keep = ~masked & (model.loss_units == "hidden")

    def error(prediction, target):
        return float((prediction - target)[..., evaluated, :].square().mean())

    targets = model.targets(images)
    drawn = {
        "mix": mixed,
        "input": encoder_input,
        "predicted_sources": paste(encoder_input[:, None], unpatchify(sources, unit, rows), keep, unit),
        "source_error": error(out.predicted_sources, targets),
    }
    if model.superposes:
        drawn |= {
            "predicted_mix": paste(encoder_input, unpatchify(mix, unit, rows), keep, unit),
            "mix_error": error(out.predicted_mix, model.combine(targets, masking)),
            "mix_for_all_error": error(out.predicted_mix[:, None], targets),
        }
    return drawn


def mix_is_approximate(model: EESMM) -> bool:
    """Whether the predicted mixed image is drawn with the mean and standard deviation of the true mixed image.

    In "subtract" the network predicts a weighted sum of normalized sources. Each source has its own mean and standard
    deviation, so the pixels of the mixed image do not follow from their sum.
    """
    return model.superposes and model.normalise and model.sources > 1 and model.decomposition == "subtract"


def paste(images: torch.Tensor, others: torch.Tensor, keep: torch.Tensor, unit: int) -> torch.Tensor:
    """`images` in the mask units `keep` and `others` elsewhere, both (..., c, h, w). keep: (..., u) bool."""
    return mask_pixels(images, keep, unit) + mask_pixels(others, ~keep, unit)


def make_to_rgb(images: torch.Tensor, form: PixelFormat, channels):
    """Choose how normalized pixels become colours.

    8-bit RGB is drawn as it is. In all other formats each channel is stretched between the percentiles 1 and 99 of the
    source images in the same row. If two channels are drawn, blue stays empty.

    Args:
        images: (b, n, c, h, w), normalized.
        form: the pixel format of the images.
        channels: numbers of at most three channels to draw, from 1 on. Default: the first three, or RGB.

    Returns:
        A function from normalized images (b, c, h, w) to (b, 1 or 3, h, w) in 0 to 1, and the normalized images
        (b, c, h, w) that it draws in a medium gray.
    """
    if form.is_rgb8 and not channels:
        return lambda values: denormalize(values.float()), normalize(torch.full_like(images[:, 0], 127.0))
    values = rearrange(images.float(), "b n c h w -> b c (n h w)").cpu().numpy()
    low, high = torch.from_numpy(np.percentile(values, (1, 99), axis=2)).to(images)[..., None, None]  # (b, c, 1, 1)
    indices = [number - 1 for number in channels or (1, 2, 3)[: images.shape[2]]]

    def to_rgb(values):
        rgb = ((values.float() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)[:, indices]
        return torch.cat([rgb, torch.zeros_like(rgb[:, :1])], dim=1) if len(indices) == 2 else rgb

    return to_rgb, ((low + high) / 2).expand_as(images[:, 0])


@torch.no_grad()
def picture(model: EESMM, images: torch.Tensor, masking: Masking, title: str, form: PixelFormat, channels):
    """A matplotlib figure with one row of panels for each mixed image.

    Args:
        model: its training mode is restored.
        images: normalized source images (b, n, c, h, w).
        masking: from `EESMM.draw`.
        title: above the panels, or "".
        form, channels: see `make_to_rgb`.
    """
    training = model.training
    model.eval()
    try:
        drawn = draw(model, images, masking)
    finally:
        model.train(training)

    # The panels from left to right, as (b, c, h, w). Masked units are gray, which is not the mean colour of the data.
    to_rgb, gray = make_to_rgb(images, form, channels)
    masked = paste(drawn["input"], gray, masking.visible.any(0), model.encoder.unit)
    if model.sources == 1:
        panels = {"image": images[:, 0], "masked": masked, "predicted": drawn["predicted_mix"]}
    else:
        panels = {f"source {k + 1}": image for k, image in enumerate(images.unbind(1))}  # I_a, I_b
        panels["mix"] = drawn["mix"]  # sum of lambda_k I_k, Eq. 3
        note = ""
        if model.superposes:
            panels["masked mix"] = masked  # I_mixed, Eq. 1-3
            note = "\n(approximate)" if mix_is_approximate(model) else ""
            panels[f"predicted mix{note}"] = drawn["predicted_mix"]  # I^_c, Eq. 4
            note = "\n(minus true others)" if model.decomposition == "subtract" else ""
        for k, image in enumerate(drawn["predicted_sources"].unbind(1)):  # I^_d, I^_e, Eq. 5 and 6
            panels[f"predicted source {k + 1}{note}"] = image

    # All lengths are in inches. A panel is two inches wide, and the names of panels may have a second line.
    width = 2 * len(panels)
    lines = [line for text in caption(model, drawn) for line in textwrap.wrap(text, 11 * width)]
    top = 0.85 if title else 0.5
    if any("\n" in name for name in panels):
        top += 0.2
    bottom = 0.15 + 0.22 * len(lines)
    panel_height = 2 * images.shape[-2] / images.shape[-1]
    height = panel_height * len(images) + top + bottom
    figure = plots.new_figure(width, height)
    axes = figure.add_axes((0.01, bottom / height, 0.98, 1 - (bottom + top) / height))
    columns = [(name, rearrange(to_rgb(values).cpu(), "b c h w -> b h w c").numpy()) for name, values in panels.items()]
    plots.tile_images(axes, columns, 14)  # large letters, because a web page shows the picture at half of its size
    figure.suptitle(title, fontsize=15, color="black")
    figure.text(0.01, 0.06 / height, "\n".join(lines), fontsize=13, va="bottom", color="black")
    return figure


def caption(model: EESMM, drawn: dict) -> list[str]:
    """The errors of the predictions, and what the picture takes from the true images. One string for each statement.

    Args:
        model: see `draw`.
        drawn: its result.
    """
    units = "masked units" if model.mask_ratio else "all units"
    if not model.superposes:
        lines = [
            f"error on each source's masked units, normalized: {drawn['source_error']:.3f}",
            "Each unit of the mix shows one source.",
        ]
    elif model.sources == 1:
        lines = [f"error on {units}: {drawn['mix_error']:.3f}"]
    else:
        lines = [
            f"error on {units}, normalized: mix {drawn['mix_error']:.3f}, sources {drawn['source_error']:.3f} "
            f"(the predicted mix taken for every source: {drawn['mix_for_all_error']:.3f})"
        ]
        if model.decomposition == "subtract":
            lines.append("Predicted sources contain the true other images, which Eq. 5 and 6 subtract.")
        elif model.loss_units == "hidden":
            lines.append("Visible units show the mix, because Eq. 7 has no loss that separates them.")
    if mix_is_approximate(model):
        lines.append("The predicted mix is drawn with the mean and contrast of the true mix, an approximation.")
    if model.normalise:
        units = "Masked units" if model.loss_units == "hidden" else "All units"
        lines.append(f"{units} are drawn with their true mean and contrast, which the network does not predict.")
    return lines


def model_from(checkpoint: dict, path) -> EESMM:
    """The model of a checkpoint of train.py, with its weights.

    Args:
        checkpoint: from `load_checkpoint`.
        path: of its file, for messages.

    Raises:
        UserError: if the checkpoint is of another program, or if its weights do not fit its settings.
    """
    check_kind(checkpoint, path, "pretrain")
    model = from_settings(checkpoint["config"]["arguments"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"{path}: does not fit the model it describes: {reason}") from None
    return model


def load_sources(paths: list[str], model: EESMM, form: PixelFormat) -> torch.Tensor:
    """Read images as the sources of one mixed image, normalized: (1, n, c, h, w).

    Args:
        paths: one image for each source, or fewer images that are repeated.
        model: determines n and the size to which the images are cropped and resized.
        form: the pixel format of the model.

    Raises:
        UserError: for another number of images, or if an image cannot be read.
    """
    n = model.sources
    # The four views of Eq. 3 come from two images, so two are enough for a model with four sources.
    if len(paths) not in (1, n) and (len(paths), n) != (2, 4):
        raise UserError(f"this model superposes {n} images, but {len(paths)} are given")
    if len(paths) == 1 < n:
        warn(f"one image for {n} sources: it is superposed on itself, so the picture does not show separation")
    images = []
    for path in paths:
        try:
            files = FileImages(Path(), [path], None, [], form=form)
            images.append(files.center_crop(0, model.encoder.image_size, crop_pct=1.0))
        except DataError as error:
            raise UserError(f"{path}: {error}") from None
    images = normalize(torch.stack(images).float(), form.mean, form.std)
    return repeat(images, "k c h w -> 1 (k r) c h w", r=n // len(images))


def main(argv=None):
    parser = flags.Parser(description="Superpose your own images and let a pre-trained model separate them.")
    parser.add_argument("images", nargs="*", help="one image for each source of the model, usually two")
    parser.add_argument("--checkpoint", help="of train.py, such as runs/demo-eesmm-1/last.pt")
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="write DIR/report.html, everything of a run on one page, in one file; takes no other argument",
    )
    parser.add_argument("-o", "--output", default="picture.png", help="default: picture.png")
    parser.add_argument("--seed", type=flags.non_negative_int, default=0, help="of the mask; default: 0")
    flags.add_picture_flag(parser)
    args = parser.parse_args(argv)
    if args.run:
        if args.images or flags.explicit_flags(parser, argv) - {"run", "images"}:
            raise UserError("--run takes no other argument")
        print(f"wrote {report.write(Path(args.run), METRIC_LABELS)}")
        return
    if not args.images or not args.checkpoint:
        raise UserError("give images and --checkpoint, or --run DIR (--help lists the flags)")

    output = check_output(args.output, plots.FORMATS)
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from(checkpoint, args.checkpoint)
    form = PixelFormat.of(checkpoint["config"].get("pixels", {}))
    channels = args.show_channels
    if channels and max(channels) > form.channels:
        raise UserError(f"--show-channels {' '.join(map(str, channels))}: the model's images have {form.channels}")
    images = load_sources(args.images, model, form)
    masking = model.draw(rng.generator(args.seed, "show"))
    figure = picture(model, images, masking, "", form, channels)
    try:
        write_atomically(output, lambda file: plots.save(figure, file, output.suffix[1:]))
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
