"""Frozen features: linear probe, weighted k-nearest neighbours, rank; and the accuracy that all protocols report.

Axis letters: b images, c classes, d features, k neighbours.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine import data, rng
from engine.errors import DataError
from images.crops import normalize, to_2tuple
from images.masks import IGNORE_INDEX


def shard(distributed, images, chunk: int = 64) -> list[list[int]]:
    """Indices of the images that this process looks at, in chunks. These are fixed, so nothing is computed twice and no result depends on the number of processes."""
    return [list(range(start, min(start + chunk, len(images)))) for start in range(0, len(images), chunk)][
        distributed.rank :: distributed.world_size
    ]


@torch.no_grad()
def predict_batches(distributed, model, images, size, bad: dict | None = None):
    """(indices, model(image), float, on the CPU) of the readable images of each of `share`'s chunks. bad: see data.iterate_center_crops."""
    model.eval()
    for indices, batch in data.iterate_center_crops(
        images, shard(distributed, images), size, bad, distributed.num_workers()
    ):
        with distributed.autocast():
            batch = normalize(batch.to(distributed.device).float(), images.form.mean, images.form.std)
            found = model(batch).float().cpu()
        yield indices, found
    model.train()


def extract_features(distributed, model, images, size, bad: dict | None = None, kept: torch.dtype = torch.float32):
    """model(image) of every readable image, on the first process's CPU: what `joined` takes; None on the others. Nothing is held twice.
    bad: see data.iterate_center_crops. kept: the type of what is held."""
    values, done = torch.empty(0, 0, dtype=kept), []
    for indices, found in predict_batches(distributed, model, images, size, bad):
        values = values if done else torch.empty(sum(map(len, shard(distributed, images))), found.shape[1], dtype=kept)
        values[len(done) : len(done) + len(found)] = found
        done += indices
    return distributed.gather_rows(values[: len(done)], torch.tensor(done, dtype=torch.long))


def joined(gathered: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (n, d) and the indices (n,) of their images, in order; DataError if there are none."""
    if not len(gathered[1]):
        raise DataError("none of the images can be read")
    return gathered


def check_every_class(images, read: torch.Tensor, where: str):
    """DataError if no image of a class could be read. read: how many of each class could, (c,)."""
    listed = np.bincount(images.labels, minlength=len(images.classes))
    empty = [name for name, all_of_it, some in zip(images.classes, listed, read.tolist()) if all_of_it and not some]
    if empty:
        raise DataError(
            f"no image of {', '.join(empty[:5])} can be read in the {where} part, so an accuracy would say nothing of "
            f"{'it' if len(empty) == 1 else 'them'}"
        )


def confusion_matrix(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The confusion matrix (c, c), rows true, columns predicted, and how many labels are among the best five, (). scores: (n, c)."""
    classes = scores.shape[1]
    best = scores.topk(min(5, classes), dim=1).indices
    return torch.bincount(labels * classes + best[:, 0], minlength=classes**2).view(classes, classes), (
        best == labels[:, None]
    ).any(1).sum()


def topk_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict:
    """Scores (n, c) and labels (n,): `shares` of their counts."""
    return accuracies(*confusion_matrix(scores, labels))


def accuracies(confusion: torch.Tensor, in_five: torch.Tensor) -> dict:
    """top1 and top5 in per cent, the confusion matrix (rows true, columns predicted) and the number of images."""
    images = int(confusion.sum())
    return {
        "top1": 100 * (int(confusion.diag().sum()) / images),
        "top5": 100 * (int(in_five) / images),
        "confusion": confusion,
        "images": images,
    }


def evaluate(distributed, model, images, size, bad: dict | None = None) -> dict:
    """`shares` of model(image), (b, classes), on a labelled source, each image seen by exactly one process: only counts are exchanged."""
    classes, labels = len(images.classes), torch.from_numpy(images.labels)
    confusion, in_five = torch.zeros(classes, classes, dtype=torch.long), torch.zeros((), dtype=torch.long)
    for indices, scores in predict_batches(distributed, model, images, size, bad):
        for total, part in zip((confusion, in_five), confusion_matrix(scores, labels[indices])):
            total += part
    confusion, in_five = distributed.all_reduce(confusion), distributed.all_reduce(in_five)

    def checked():
        if not confusion.any():
            raise DataError("none of the images can be read")
        check_every_class(images, confusion.sum(1), "held-out")

    distributed.run_on_main(checked)
    return accuracies(confusion, in_five)


def nearest_neighbours(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 2**16,
) -> torch.Tensor:
    """Class scores (n, c): votes of the k nearest by cosine, weighted exp(cosine / temperature) (Wu et al. 2018). In 32 bits, on the device of `test`,
    to which training features go a block at a time, so that besides them little is held."""
    test = test.float()
    asked, cosine, index = (
        F.normalize(test, dim=1).split(1024),
        test.new_empty(len(test), 0),
        torch.empty(len(test), 0, dtype=torch.long, device=test.device),
    )
    for start in range(0, len(train), block):
        part = F.normalize(train[start : start + block].to(test.device).float(), dim=1)
        found = [(query @ part.t()).topk(min(k, len(part)), dim=1) for query in asked]
        near, places = (
            torch.cat([cosine, torch.cat([each.values for each in found])], dim=1),
            torch.cat([index, start + torch.cat([each.indices for each in found])], dim=1),
        )
        cosine, order = near.topk(min(k, near.shape[1]), dim=1)
        index = places.gather(1, order)
    weights = (
        (cosine - cosine[:, :1]) / temperature
    ).exp()  # the nearest counts 1: a low temperature must not overflow
    return torch.zeros(len(test), classes, device=test.device).scatter_add_(
        1, train_labels.to(test.device)[index], weights
    )


def effective_rank(features: torch.Tensor) -> float:
    """Effective rank of features (n, d): exp of the entropy of their singular values as shares of their sum (RankMe, Garrido et al. 2023).

    From 1, all alike but for a factor, a collapse, to min(n, d).
    """
    values = torch.linalg.eigvalsh(features.double().T @ features.double()).clamp(min=0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())


def sample_images(images, most: int, *keys):
    """At most so many of a source's images, chosen by keys, in their order."""
    if len(images) <= most:
        return images
    return images.subset(np.sort(np.argsort(rng.hash64(*keys, np.arange(len(images))), kind="stable")[:most]))


class FeatureMonitor:
    """Rank of a network's features while it trains, on a sample of training images, and where both parts have labels k-NN accuracy (top-1,
    in %) on one of held-out images; draws nothing that the training draws. features: a module of images (b, c, h, w) to (b, d). The samples
    have at most 100 and 50 images for each class, 10,000 and 2,000 in all."""

    def __init__(self, distributed, features, train, held_out, size, seed: int):
        self.distributed, self.features, self.size = distributed, features, size
        self.labelled = bool(train.classes) and held_out.labels is not None
        classes = max(2, len(train.classes))
        self.train = sample_images(train, min(10_000, 100 * classes) if self.labelled else 2000, seed, "k-NN train")
        self.held_out = (
            sample_images(held_out, min(2000, 50 * classes), seed, "k-NN held out") if self.labelled else None
        )

    def look(self) -> dict[str, float]:
        """knn_top1 and feature_rank; all processes call it together."""
        found = [
            extract_features(self.distributed, self.features, images, self.size)
            for images in (self.train, self.held_out)
            if images
        ]

        def measures():
            train, chosen = joined(found[0])
            if not self.labelled:
                return {"feature_rank": effective_rank(train)}
            test, places = joined(found[1])
            scores = nearest_neighbours(
                train, torch.from_numpy(self.train.labels)[chosen], test, len(self.train.classes)
            )
            return {
                "knn_top1": topk_accuracy(scores, torch.from_numpy(self.held_out.labels)[places])["top1"],
                "feature_rank": effective_rank(train),
            }

        return self.distributed.run_on_main(measures)


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    classes: int,
    epochs: float = 100,
    batch: int = 256,
    lr: float = 0.1,
    seed: int = 0,
    most: int | None = None,
    block: int = 64,
) -> torch.Tensor:
    """Class scores (n, c) of a linear classifier on features normalised without affine parameters (as MAE probes).

    Momentum 0.9, no decay, cosine to 0. The statistics are those of all training features: the features are frozen,
    so a batch norm's running average would only approach them. most: stop after so many steps. In 32 bits, on the device of `test`, to which
    the training features of `block` steps go at once.
    """
    columns, device = train.split(64, dim=1), test.device
    mean, deviation = (
        torch.cat([measure(part.float(), 0) for part in columns]).to(device) for measure in (torch.mean, torch.std)
    )
    deviation = deviation.clamp(min=1e-6)
    classifier = nn.Linear(train.shape[1], classes, device=device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr * batch / 256, momentum=0.9)
    per_epoch = max(1, len(train) // batch)
    steps = max(1, round(epochs * per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps if most is None else min(most, steps)):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = torch.randperm(len(train), generator=rng.generator(seed, "probe", epoch))
        if place % block == 0:
            picks = order[place * batch : (place + block) * batch]
            ahead = zip(train[picks].to(device).split(batch), train_labels[picks].to(device).split(batch))
        features, labels = next(ahead)
        F.cross_entropy(classifier((features.float() - mean) / deviation), labels).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    with torch.no_grad():
        return classifier((test.float() - mean) / deviation)


def pixel_confusion(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """(classes, classes) counts of pixels, rows true, columns predicted; 255 left out."""
    asked = truth != IGNORE_INDEX
    return torch.bincount(truth[asked] * classes + predicted[asked], minlength=classes**2).view(classes, classes)


@torch.no_grad()
def predict_sliding(distributed, model, image: torch.Tensor, size) -> torch.Tensor:
    """Class probabilities (classes, h, w) of an image (c, h, w), normalised and of any size, by windows of `size` that overlap by a third.

    model: (b, c, *size) to logits (b, classes, *size). A smaller image is continued by its border.
    """
    (height, width), (_, h, w) = to_2tuple(size), image.shape
    padded = F.pad(image[None], (0, max(0, width - w), 0, max(0, height - h)), mode="replicate")[0]
    starts = [
        sorted({*range(0, side - window, max(1, window * 2 // 3)), side - window})
        for side, window in zip(padded.shape[1:], (height, width))
    ]
    places, total, times = (
        [(top, left) for top in starts[0] for left in starts[1]],
        0,
        padded.new_zeros(padded.shape[1:]),
    )
    for block in range(0, len(places), 16):
        with distributed.autocast():
            logits = model(
                torch.stack(
                    [padded[:, top : top + height, left : left + width] for top, left in places[block : block + 16]]
                )
            )
        if block == 0:
            total = padded.new_zeros(logits.shape[1], *padded.shape[1:])
        for (top, left), share in zip(places[block : block + 16], logits.float().softmax(1)):
            total[:, top : top + height, left : left + width] += share
            times[top : top + height, left : left + width] += 1
    return (total / times)[:, :h, :w]


def iou_scores(confusion: torch.Tensor) -> dict:
    """mean IoU in % over classes that occur in truth or prediction, IoU of each (nan where it does not), pixel accuracy in %."""
    right, confusion = confusion.diag().double(), confusion.double()
    union = confusion.sum(0) + confusion.sum(1) - right
    each = torch.where(union > 0, 100 * right / union, torch.nan)
    return {
        "miou": each.nanmean().item(),
        "iou": each.tolist(),
        "pixel_accuracy": (100 * right.sum() / confusion.sum()).item(),
    }
