"""What is done with a trained model: evaluation, classes of images without labels, export of features.

    python finetune.py --data DIR --checkpoint runs/y/last.pt --eval                  accuracy on labelled images
    python finetune.py --checkpoint runs/y/last.pt --predict DIR                      predictions.csv
    python finetune.py --data DIR --checkpoint runs/x/last.pt --protocol features     features.npy and names.txt

The classifier of fine-tuning (section 4.1.2) is defined here, because all of these need it.
"""

import csv
import io
import sys
from dataclasses import replace

import numpy as np
import torch
from torch import nn

import encoders
from encoders import Encoder
from engine import dist, probes, runs
from engine.checkpoints import check_kind, load_checkpoint
from engine.errors import DataError, UserError
from engine.files import write_atomically
from images import open_labelled_part
from images.folders import all_images
from images.formats import PixelFormat, measure_format

PREDICTION_COLUMNS = (
    "file class probability class_2 probability_2 class_3 probability_3 class_4 probability_4 class_5 probability_5"
).split()


class Classifier(nn.Module):
    """Average-pooled encoder tokens and a linear layer (section 4.1.2): images (b, c, h, w) to logits (b, classes).

    Args:
        encoder: see `encoders.Encoder`.
        classes: 0: no linear layer; the output is the pooled features (b, width), as in timm.
        fc_norm: as MAE fine-tunes a ViT: the mean is taken over tokens before the final norm and goes through a new
            norm, and the linear layer is initialised close to zero.
    """

    def __init__(self, encoder: Encoder, classes: int, fc_norm: bool = False):
        super().__init__()
        self.encoder, self.undecayed = encoder, encoder.undecayed
        self.head = nn.Linear(encoder.width, classes) if classes else nn.Identity()
        if classes:
            nn.init.trunc_normal_(self.head.weight, std=2e-5 if fc_norm else 0.02)
            nn.init.zeros_(self.head.bias)
        self.fc_norm = None
        if fc_norm:
            self.fc_norm = nn.LayerNorm(encoder.width, eps=encoder.norm.eps)
            encoder.norm = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.encoder(images).mean(1)
        return self.head(pooled if self.fc_norm is None else self.fc_norm(pooled))

    def layer_of(self, name: str) -> int:
        """Layer number of a parameter, for layer-wise learning rates. Head and fc_norm have the number of the final
        norm."""
        return self.encoder.layer_of(name.removeprefix("encoder."))


def load_classifier(args, distributed) -> tuple[Classifier, dict, PixelFormat]:
    """The classifier in a checkpoint of finetune.py. Of a run with --ema it has the average of the weights.

    Returns:
        the classifier on the device, the config of its run, and the format of its pixels.

    Raises:
        UserError: --checkpoint is missing, or not a checkpoint of finetune.py.
    """
    if not args.checkpoint:
        raise UserError(f"{'--eval' if args.eval else '--predict'} needs --checkpoint, a checkpoint of finetune.py")
    saved = check_kind(load_checkpoint(args.checkpoint), args.checkpoint, "finetune")
    config, settings = saved["config"], saved["config"]["arguments"]
    form = replace(PixelFormat.of(config.get("pixels", {})), max_megapixels=args.max_megapixels)
    encoder = encoders.make(
        settings["model"], image_size=settings["image_size"], window=settings["window"], channels=form.channels
    )
    model = Classifier(encoder, len(config["classes"]), settings.get("fc_norm", False))
    state = saved["model"]
    if "ema" in saved:  # a torch.optim.swa_utils.AveragedModel, which wraps the model as `module`
        state = {name.removeprefix("module."): value for name, value in saved["ema"].items() if name != "n_averaged"}
    model.load_state_dict(state)
    return model.to(distributed.device), config, form


def evaluate_checkpoint(args, distributed) -> dict:
    """--eval: the accuracy of a checkpoint of finetune.py on labelled images; see `probes.evaluate`.

    Raises:
        UserError: the images have other classes than the checkpoint, or the same ones in another order.
    """
    model, config, form = load_classifier(args, distributed)
    size, classes = model.encoder.image_size, config["classes"]
    images, line = open_labelled_part(args.data, args.split, size, form)
    distributed.print(line)
    if images.classes != classes:
        pairs = [(ours, theirs) for ours, theirs in zip(classes, images.classes) if ours != theirs]
        raise UserError(
            f"{args.checkpoint} has {len(classes)} classes, {args.data or 'the photographs'} has {len(images.classes)}"
            + (f"; the first that differ: {pairs[0][0]!r} and {pairs[0][1]!r}" if pairs else "")
        )
    bad = {}
    result = probes.evaluate(distributed, model, images, size, bad)
    unreadable = [(images.name(index), reason) for index, reason in bad.items()]
    runs.report_unreadable(distributed, unreadable, {}, len(images), args.max_bad_share, "left out")
    return result


def run_settings(kind: str, arguments: dict, classes: list[str] | None, form: PixelFormat, distributed) -> dict:
    """The config of a run without a training loop, for config.json."""
    return {
        "kind": kind,
        "arguments": arguments,
        "classes": classes,
        "pixels": form.to_dict(),
        "versions": dist.versions(),
        "device": dist.device_name(distributed.device),
        **runs.provenance(sys.argv),
    }


def export(args, distributed, model: Classifier, images, config: dict, write) -> int:
    """Apply a model to all images of a folder, and write its outputs into a new run folder.

    Args:
        config: for config.json; its "kind" begins the name of the run folder.
        write: write(folder, names, outputs) writes the outputs (n, d) of the readable images and their names, and
            returns a line that says what was written. It is called on the main process.

    Returns:
        the exit status.
    """
    run, _ = runs.open_run(vars(args), distributed, config["kind"], images.root.resolve().name)
    runs.create_folder(run, config, {}, is_new=True)
    distributed.print(f"{len(images)} images in {images.root}; run folder: {run.folder}")
    bad = {}
    gathered = probes.extract_features(distributed, model, images, model.encoder.image_size, bad)
    run.report_bad_held_out([(images.name(index), reason) for index, reason in bad.items()], len(images), max_share=1.0)

    def finish():
        outputs, indices = gathered
        if not len(indices):
            raise DataError("none of the images can be read")
        print(write(run.folder, [images.name(index) for index in indices.tolist()], outputs))

    distributed.run_on_main(finish)
    return 0


def write_predictions(args, distributed) -> int:
    """--predict: predictions.csv with the five most probable classes of each image and their probabilities."""
    model, config, form = load_classifier(args, distributed)
    classes = config["classes"]

    def write(folder, names, logits) -> str:
        probabilities, order = logits.softmax(1).topk(min(5, len(classes)), dim=1)
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(PREDICTION_COLUMNS[: 1 + 2 * probabilities.shape[1]])
        for name, row, best in zip(names, probabilities.tolist(), order.tolist()):
            cells = [name]
            for probability, k in zip(row, best):
                cells += [classes[k], f"{probability:.4f}"]
            writer.writerow(cells)
        # a file name need not be valid UTF-8
        data = table.getvalue().encode(errors="surrogateescape")
        write_atomically(folder / "predictions.csv", lambda file: file.write(data))
        return f"wrote {folder / 'predictions.csv'}: {len(names)} images"

    arguments = vars(args) | {name: config["arguments"][name] for name in ("model", "image_size", "window")}
    images = all_images(args.predict, form)
    return export(
        args, distributed, model, images, run_settings("predict", arguments, classes, form, distributed), write
    )


def export_features(args, distributed, model: Classifier, form: PixelFormat, measured: bool) -> int:
    """--protocol features: features.npy, the features (n, d) of all images of --data in float32, and names.txt, a line
    for each row.

    Args:
        model: without a linear layer.
        form: the format of the pixels. If it is not `measured`, it is completed from a sample of the images.
    """
    images = all_images(args.data, form)
    if not measured:
        images.form, lines = distributed.run_on_main(measure_format, images, form)
        distributed.print_lines(lines)

    def write(folder, names, features) -> str:
        write_atomically(folder / "features.npy", lambda file: np.save(file, features.numpy()))
        lines = "".join(f"{name}\n" for name in names).encode(errors="surrogateescape")
        write_atomically(folder / "names.txt", lambda file: file.write(lines))
        return f"wrote {folder / 'features.npy'}: {len(names)} images x {features.shape[1]}"

    arguments = vars(args) | {"channels": form.channels}
    config = run_settings("features", arguments, None, images.form, distributed)
    return export(args, distributed, model, images, config, write)
