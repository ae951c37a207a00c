"""The method's picture: sources, mix, masked mix, predicted mix, predicted sources.

python show.py a.jpg b.jpg --checkpoint runs/demo-eesmm-1/last.pt -o picture.png
python show.py --run runs/demo-eesmm-1                                             # all of a run on one page, report.html
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.figure import Figure

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


def draw(model: EESMM, images: torch.Tensor, masking: Masking) -> dict:
    """Predictions as pixels, normalised like `images` (b, n, c, h, w), and the errors that stand under the picture.

    A source is mean_k + std_k * prediction, with the true mean and deviation of its unit: brightness and contrast are
    given away. The mix is the weighted sum of the drawn sources in split; in subtract it is drawn with the mix's own
    statistics, an approximation. Units that the loss does not count show what the encoder saw.
    """
    out = model(images, masking)
    unit, rows = model.encoder.unit, model.encoder.rows
    partition = not model.superposes  # each patch shows one source
    mixed = model.mix(images, masking) if partition else superpose(images, masking.weights)
    sources, mix = out.predicted_sources, out.predicted_mix
    if model.normalise:
        mean, deviation = patch_statistics(patchify(images, unit))
        sources = mean + deviation * sources
        mean, deviation = patch_statistics(patchify(mixed, unit))
        mix = model.combine(sources, masking) if exact(model) else mean + deviation * mix

    targets = model.targets(images)
    hidden = ~masking.visible if partition else ~masking.visible.all(0)  # in a partition of each source, else of all
    asked = hidden if hidden.any() else ~hidden  # without a mask, all units

    def error(a, b):
        return float((a - b)[..., asked, :].square().mean())

    drawn = unpatchify(sources, unit, rows)
    seen = model.mix(images, masking)
    keep = ~hidden if model.loss_units == "hidden" else torch.zeros_like(hidden)
    kept = keep if partition else keep.expand(model.sources, -1)
    pictures = {
        "mix": mixed,
        "masked": mask_pixels(seen, masking.visible.any(0), unit),
        "predicted_sources": torch.stack(
            [paste(seen, drawn[:, k], kept[k], unit) for k in range(model.sources)], dim=1
        ),
        "source_error": error(out.predicted_sources, targets),
    }
    if partition:
        return pictures
    return pictures | {
        "predicted_mix": paste(seen, unpatchify(mix, unit, rows), keep, unit),
        "mix_error": error(out.predicted_mix, superpose(targets, masking.weights)),
        "mix_for_all_error": error(out.predicted_mix[:, None], targets),
    }


def exact(model: EESMM) -> bool:
    """Whether the drawn mix is exact up to the prediction: where it is the sum of drawn sources, or raw pixels."""
    return model.decomposition == "split" or not model.normalise or model.sources == 1 or not model.superposes


def paste(seen, predicted, keep, unit):
    """`seen` in the units to keep, `predicted` elsewhere."""
    return mask_pixels(seen, keep, unit) + mask_pixels(predicted, ~keep, unit)


def colours(images: torch.Tensor, form: PixelFormat, channels):
    """A function from normalised images (b, c, h, w) to what is drawn, (b, 1 or 3, h, w) in 0-1; and the middle of that scale, as normalised.

    8-bit colour as it is. Of anything else the `channels` (from 1 on; default: the first three), each stretched between the percentiles 1 and 99 that
    it has in the sources of its row: images (b, n, c, h, w); of two channels blue stays empty.
    """
    if form.is_rgb8 and not channels:
        return lambda values: denormalize(values.float()), normalize(torch.full_like(images[:, 0], 127.0))
    values = rearrange(images.float(), "b n c h w -> b c (n h w)")
    low, high = (
        torch.from_numpy(np.percentile(values.cpu().numpy(), share, axis=2)).to(images)[:, :, None, None]
        for share in (1, 99)
    )
    chosen = [k - 1 for k in channels] if channels else list(range(min(3, images.shape[2])))

    def drawn(values):
        out = ((values.float() - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)[:, chosen]
        return torch.cat([out, torch.zeros_like(out[:, :1])], dim=1) if len(chosen) == 2 else out

    return drawn, ((low + high) / 2).expand_as(images[:, 0])


@torch.no_grad()
def picture(
    model: EESMM,
    images: torch.Tensor,
    masking: Masking,
    title: str = "",
    form: PixelFormat = PixelFormat(),
    channels=None,
):
    """A matplotlib figure, one row per composite of images (b, n, c, h, w). form, channels: see `colours`."""
    training = model.training
    model.eval()
    try:
        drawn = draw(model, images, masking)
    finally:
        model.train(training)
    n, (as_drawn, grey) = model.sources, colours(images, form, channels)
    columns = [(f"source {k + 1}" if n > 1 else "image", images[:, k]) for k in range(n)]
    columns += [("mix", drawn["mix"])] if n > 1 else []
    if model.superposes:  # hidden units are drawn in the middle of the grey scale, not in the mean colour of the data
        columns += [
            (
                "masked mix" if n > 1 else "masked",
                paste(drawn["masked"], grey, masking.visible.any(0), model.encoder.unit),
            )
        ]
        note = "" if exact(model) else "\n(approximate)"
        columns += [("predicted mix" + note if n > 1 else "predicted", drawn["predicted_mix"])]
    note = "\n(minus true others)" if model.decomposition == "subtract" and model.superposes else ""
    columns += [(f"predicted source {k + 1}{note}", drawn["predicted_sources"][:, k]) for k in range(n) if n > 1]

    width = 2 * len(columns)
    lines = [line for text in caption(model, drawn) for line in textwrap.wrap(text, round(11 * width))]
    top, bottom = (
        (0.85 if title else 0.5) + 0.2 * any("\n" in name for name, _ in columns),
        0.15 + 0.22 * len(lines),
    )  # inches
    across = 2 * images.shape[-2] / images.shape[-1]  # inches of a row, whose pictures are two wide
    figure = Figure(figsize=(width, across * len(images) + top + bottom), dpi=100, facecolor="white")
    axes = figure.add_axes((0.01, bottom / figure.get_figheight(), 0.98, 1 - (bottom + top) / figure.get_figheight()))
    plots.tile_images(
        axes, [(name, rearrange(as_drawn(values).cpu(), "b c h w -> b h w c").numpy()) for name, values in columns], 14
    )  # a site shows it at half of its size
    figure.suptitle(title, fontsize=15, color="black")
    figure.text(0.01, 0.06 / figure.get_figheight(), "\n".join(lines), fontsize=13, va="bottom", color="black")
    return figure


def caption(model: EESMM, drawn: dict) -> list[str]:
    """The errors behind a picture, and what it owes to the true images."""
    if not model.superposes:
        return [
            f"error on each source's hidden units, normalised: {drawn['source_error']:.3f}",
            "Each unit of the mix shows one source. Hidden "
            "units are drawn with their true mean and contrast, which the network does not predict.",
        ]
    units = "hidden units" if model.mask_ratio else "all units"
    lines = [
        f"error on {units}, normalised: mix {drawn['mix_error']:.3f}"
        if model.sources > 1
        else f"error on {units}: {drawn['mix_error']:.3f}"
    ]
    if model.sources > 1:
        lines[0] += (
            f", sources {drawn['source_error']:.3f} (the predicted mix taken for every source: "
            f"{drawn['mix_for_all_error']:.3f})"
        )
    if model.decomposition == "subtract" and model.sources > 1:
        lines.append(
            "Predicted sources contain the true other images, which Eq. 5 and 6 subtract; the mix is drawn with its own "
            "statistics, an approximation."
        )
    elif model.loss_units == "hidden" and model.sources > 1:
        lines.append("Visible units show the mix: Eq. 7 does not ask to take them apart.")
    if model.normalise:
        drawn_units = "Hidden units" if model.loss_units == "hidden" else "All units"
        lines.append(f"{drawn_units} are drawn with their true mean and contrast, which the network does not predict.")
    return lines


def model_from(checkpoint: dict, path) -> EESMM:
    """The model of a checkpoint of train.py, with its weights. UserError for a checkpoint of another kind or that does not fit."""
    check_kind(checkpoint, path, "pretrain")
    model = from_settings(checkpoint["config"]["arguments"])
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the model it describes: {str(error).splitlines()[1].strip()}") from None
    return model


def main(argv=None):
    parser = flags.Parser(description="Superpose your own photographs and let a pre-trained model take them apart.")
    parser.add_argument("images", nargs="*", help="as many photographs as the model superposes, usually two")
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
        print(f"wrote {report.write(Path(args.run))}")
        return
    if not args.images or not args.checkpoint:
        raise UserError("give images and --checkpoint, or --run DIR (--help lists the flags)")
    output = check_output(args.output, plots.FORMATS)
    checkpoint = load_checkpoint(args.checkpoint)
    model = model_from(checkpoint, args.checkpoint)
    form = PixelFormat.of(checkpoint["config"].get("pixels", {}))
    model.eval()
    if max(args.show_channels or [1]) > form.channels:
        raise UserError(
            f"--show-channels {' '.join(map(str, args.show_channels))}: the model's images have {form.channels}"
        )
    if len(args.images) not in (1, model.sources) and not (model.sources == 4 and len(args.images) == 2):
        raise UserError(f"this model superposes {model.sources} images; {len(args.images)} given")
    if len(args.images) == 1 < model.sources:
        warn(f"one image for {model.sources} sources: it is superposed on itself, which shows nothing of taking apart")
    images = []
    for path in args.images:
        try:
            images.append(
                FileImages(Path(), [path], None, [], form=form).center_crop(0, model.encoder.image_size, crop_pct=1.0)
            )
        except DataError as error:
            raise UserError(f"{path}: {error}") from None
    images = normalize(torch.stack(images).float(), form.mean, form.std)
    images = repeat(images, "k c h w -> 1 (k r) c h w", r=model.sources // len(images))
    masking = model.draw(rng.generator(args.seed, "show"))
    figure = picture(model, images, masking, "", form, args.show_channels)
    try:
        write_atomically(output, lambda file: plots.save(figure, file, output.suffix[1:]))
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written ({error.strerror})") from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
