"""Frozen features: linear probe, weighted k-nearest neighbours, rank; and the accuracy that all protocols report.

Axis letters: b images, c classes, d features, k neighbours.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine import chance, data
from engine.errors import DataError


@torch.no_grad()
def outputs(launch, model, images, size, chunk: int = 64, most: int | None = None, bad: dict | None = None):
    """model(image) of every readable image, on the first process's CPU: what `joined` takes; None on the others. bad: see data.held_out.

    Each process takes its share of fixed chunks, so nothing is computed twice and no result depends on their number. Nothing is held twice either.
    """
    model.eval()
    chunks = [list(range(start, min(start + chunk, len(images)))) for start in range(0, len(images), chunk)][:most]
    mine, values, done = chunks[launch.rank::launch.world], torch.empty(0, 0), []
    for indices, batch in data.held_out(images, mine, size, bad):
        with launch.autocast():
            batch = data.normalise(batch.to(launch.device).float(), images.form.mean, images.form.std)
            found = model(batch).float().cpu()
        values = values if done else torch.empty(sum(map(len, mine)), found.shape[1])
        values[len(done):len(done) + len(found)] = found
        done += indices
    model.train()
    return launch.gather_rows(values[:len(done)], torch.tensor(done, dtype=torch.long))


def joined(gathered: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs (n, d), float, and the indices (n,) of their images, in order; DataError if there are none."""
    if not len(gathered[1]):
        raise DataError("none of the images can be read")
    return gathered


def check_every_class(images, indices: torch.Tensor, where: str):
    """DataError if none of a class's images is among the readable ones, `indices`."""
    listed, read = (np.bincount(labels, minlength=len(images.classes)) for labels in (images.labels, images.labels[indices.numpy()]))
    empty = [name for name, all_of_it, some in zip(images.classes, listed, read) if all_of_it and not some]
    if empty:
        raise DataError(f"no image of {', '.join(empty[:5])} can be read in the {where} part, so an accuracy would say nothing of "
                        f"{'it' if len(empty) == 1 else 'them'}")


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict:
    """top1 and top5 in per cent, and the confusion matrix (c, c): rows true, columns predicted. scores: (n, c)."""
    classes = scores.shape[1]
    best = scores.topk(min(5, classes), dim=1).indices
    hit = best == labels[:, None]
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    confusion.index_put_((labels, best[:, 0]), torch.tensor(1), accumulate=True)
    return {"top1": 100 * hit[:, 0].double().mean().item(), "top5": 100 * hit.any(1).double().mean().item(),
            "confusion": confusion}


def nearest_neighbours(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, classes: int, k: int = 20,
                       temperature: float = 0.07, block: int = 2 ** 16) -> torch.Tensor:
    """Class scores (n, c): votes of the k nearest by cosine, weighted exp(cosine / temperature) (Wu et al. 2018). On the device of `test`, to which
    training features go a block at a time, so that besides them little is held."""
    asked, cosine, index = F.normalize(test, dim=1).split(1024), test.new_empty(len(test), 0), torch.empty(len(test), 0, dtype=torch.long, device=test.device)
    for start in range(0, len(train), block):
        part = F.normalize(train[start:start + block].to(test.device), dim=1)
        found = [(query @ part.t()).topk(min(k, len(part)), dim=1) for query in asked]
        near, places = torch.cat([cosine, torch.cat([each.values for each in found])], dim=1), torch.cat([index, start + torch.cat([each.indices for each in found])], dim=1)
        cosine, order = near.topk(min(k, near.shape[1]), dim=1)
        index = places.gather(1, order)
    weights = ((cosine - cosine[:, :1]) / temperature).exp()  # the nearest counts 1: a low temperature must not overflow
    return torch.zeros(len(test), classes, device=test.device).scatter_add_(1, train_labels.to(test.device)[index], weights)


def rank(features: torch.Tensor) -> float:
    """Effective rank of features (n, d): exp of the entropy of their singular values as shares of their sum (RankMe, Garrido et al. 2023).

    From 1, all alike but for a factor, a collapse, to min(n, d).
    """
    values = torch.linalg.eigvalsh(features.double().T @ features.double()).clamp(min=0).sqrt()
    return float(torch.special.entr(values / values.sum()).sum().exp())


def sampled(images, most: int, *keys):
    """At most so many of a source's images, chosen by keys, in their order."""
    if len(images) <= most:
        return images
    return images.subset(np.sort(np.argsort(chance.hashed(*keys, np.arange(len(images))), kind="stable")[:most]))


class Watch:
    """Rank of a network's features while it trains, on a sample of training images, and where both parts have labels k-NN accuracy (top-1,
    in %) on one of held-out images; draws nothing that the training draws. features: a module of images (b, c, h, w) to (b, d). The samples
    have at most 100 and 50 images for each class, 10,000 and 2,000 in all."""

    def __init__(self, launch, features, train, held_out, size, seed: int):
        self.launch, self.features, self.size = launch, features, size
        self.labelled = bool(train.classes) and held_out.labels is not None
        classes = max(2, len(train.classes))
        self.train = sampled(train, min(10_000, 100 * classes) if self.labelled else 2000, seed, "k-NN train")
        self.held_out = sampled(held_out, min(2000, 50 * classes), seed, "k-NN held out") if self.labelled else None

    def look(self) -> dict[str, float]:
        """knn_top1 and feature_rank; all processes call it together."""
        found = [outputs(self.launch, self.features, images, self.size) for images in (self.train, self.held_out) if images]

        def measures():
            train, chosen = joined(found[0])
            if not self.labelled:
                return {"feature_rank": rank(train)}
            test, places = joined(found[1])
            scores = nearest_neighbours(train, torch.from_numpy(self.train.labels)[chosen], test, len(self.train.classes))
            return {"knn_top1": accuracy(scores, torch.from_numpy(self.held_out.labels)[places])["top1"], "feature_rank": rank(train)}
        return self.launch.run_on_first(measures)


def linear_probe(train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, classes: int, epochs: float = 100,
                 batch: int = 256, lr: float = 0.1, seed: int = 0, most: int | None = None) -> torch.Tensor:
    """Class scores (n, c) of a linear classifier on features normalised without affine parameters (as MAE probes).

    Momentum 0.9, no decay, cosine to 0. The statistics are those of all training features: the features are frozen,
    so a batch norm's running average would only approach them. most: stop after so many steps.
    """
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    classifier = nn.Linear(train.shape[1], classes, device=train.device)
    nn.init.zeros_(classifier.weight), nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr * batch / 256, momentum=0.9)
    steps = max(1, round(epochs * max(1, len(train) // batch)))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps if most is None else min(most, steps)):
        epoch, place = divmod(step, max(1, len(train) // batch))
        if place == 0:
            order = torch.randperm(len(train), generator=chance.generator(seed, "probe", epoch)).to(train.device)
        pick = order[place * batch:(place + 1) * batch]
        F.cross_entropy(classifier((train[pick] - mean) / deviation), train_labels[pick]).backward()
        optimizer.step(), optimizer.zero_grad(), schedule.step()
    with torch.no_grad():
        return classifier((test - mean) / deviation)
