"""Measures of a trained network: accuracy, linear probe, weighted k-nearest neighbours, effective rank of features, and
IoU of segmentations.

What calls these functions:

    python finetune.py --protocol linear    or knn, finetune; and finetune.py --eval
    python train.py --knn-every 10          measures frozen features during pre-training
    python segment.py                       semantic segmentation

Axis letters: b images of a batch, n images in all, c classes, d features, k neighbours, h w pixels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engine import data, rng
from engine.errors import DataError
from images.crops import normalize, to_2tuple
from images.masks import IGNORE_INDEX

# Images per forward pass. It is fixed because the last bits of a result may depend on it.
BATCH_SIZE = 64


def shard(distributed, images) -> list[list[int]]:
    """The indices of the images that this process evaluates, in batches.

    The batches are the same for any number of processes, which share them out. So no image is evaluated twice, and no
    result depends on the number of processes.
    """
    starts = range(0, len(images), BATCH_SIZE)[distributed.rank :: distributed.world_size]
    return [list(range(start, min(start + BATCH_SIZE, len(images)))) for start in starts]


@torch.no_grad()
def predict_batches(distributed, model, images, size, bad: dict | None = None):
    """Apply a model to the central crops of the readable images of this process's shard.

    Args:
        model: maps normalized images (b, c, *size) to (b, d).
        images: the images, with their pixel format as `form`.
        size: of the crops, in pixels: one number, or height and width.
        bad: receives the indices of unreadable images, with the reasons.

    Yields:
        the indices of a batch's readable images, and the model's outputs (b, d) in 32 bits on the CPU.
    """
    model.eval()
    for indices, crops in data.iterate_center_crops(
        images, shard(distributed, images), size, bad, distributed.num_workers()
    ):
        crops = normalize(crops.to(distributed.device).float(), images.form.mean, images.form.std)
        with distributed.autocast():
            outputs = model(crops)
        yield indices, outputs.float().cpu()
    model.train()


def extract_features(distributed, model, images, size, bad: dict | None = None, dtype: torch.dtype = torch.float32):
    """Apply a model to all images, over all processes. Memory for one copy of the features is needed.

    Args:
        model, images, size, bad: see `predict_batches`.
        dtype: the type in which features are stored.

    Returns:
        on the first process the features (n, d) of the readable images on the CPU and their indices (n,), in ascending
        order; on the other processes None. Without a readable image both are empty.
    """
    features, indices = torch.empty(0, 0, dtype=dtype), []
    for batch_indices, outputs in predict_batches(distributed, model, images, size, bad):
        if not indices:
            features = torch.empty(sum(map(len, shard(distributed, images))), outputs.shape[1], dtype=dtype)
        features[len(indices) : len(indices) + len(outputs)] = outputs
        indices += batch_indices
    return distributed.gather_rows(features[: len(indices)], torch.tensor(indices, dtype=torch.long))


# Accuracy -------------------------------------------------------------------------------------------------------------


def check_every_class(images, readable: torch.Tensor, part: str):
    """Check that every class that has images has a readable one.

    Args:
        images: labelled images.
        readable: how many images of each class can be read, (c,).
        part: the name of this part of the data set, for the message.

    Raises:
        DataError: names the first five classes without a readable image, because their accuracy cannot be measured.
    """
    listed = np.bincount(images.labels, minlength=len(images.classes))
    empty = [name for k, name in enumerate(images.classes) if listed[k] and not readable[k]]
    if empty:
        raise DataError(
            f"no image of {', '.join(empty[:5])} can be read in the {part} part, so the accuracy cannot be measured"
        )


def count_predictions(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The counts that accuracies are made of. Counts of several batches or processes can be added.

    Args:
        scores: of each class, such as logits, (b, c).
        labels: (b,).

    Returns:
        the confusion matrix (c, c), rows true and columns predicted, and the number of images whose label is among the
        five best, ().
    """
    classes = scores.shape[1]
    top5 = scores.topk(min(5, classes), dim=1).indices
    confusion = torch.bincount(labels * classes + top5[:, 0], minlength=classes**2).view(classes, classes)
    return confusion, (top5 == labels[:, None]).any(1).sum()


def accuracy_from_counts(confusion: torch.Tensor, in_top5: torch.Tensor) -> dict:
    """Top-1 and top-5 accuracy in %, from the results of `count_predictions`.

    Returns:
        "top1", "top5", "confusion" (the matrix) and "images" (how many there are).
    """
    images = int(confusion.sum())
    return {
        "top1": 100 * (int(confusion.diag().sum()) / images),
        "top5": 100 * (int(in_top5) / images),
        "confusion": confusion,
        "images": images,
    }


def topk_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict:
    """`accuracy_from_counts` of scores (n, c) and labels (n,)."""
    return accuracy_from_counts(*count_predictions(scores, labels))


def evaluate(distributed, model, images, size, bad: dict | None = None) -> dict:
    """The accuracy of a classifier on labelled images, over all processes.

    Args:
        model: maps images (b, channels, *size) to logits (b, c).
        images, size, bad: see `predict_batches`.

    Returns:
        see `accuracy_from_counts`.

    Raises:
        DataError: no image of a class can be read.
    """
    classes, labels = len(images.classes), torch.from_numpy(images.labels)
    confusion, in_top5 = torch.zeros(classes, classes, dtype=torch.long), torch.zeros((), dtype=torch.long)
    for indices, logits in predict_batches(distributed, model, images, size, bad):
        batch_confusion, batch_in_top5 = count_predictions(logits, labels[indices])
        confusion += batch_confusion
        in_top5 += batch_in_top5
    confusion, in_top5 = distributed.all_reduce(confusion), distributed.all_reduce(in_top5)
    distributed.run_on_main(check_every_class, images, confusion.sum(1), "held-out")
    return accuracy_from_counts(confusion, in_top5)


# Frozen features ------------------------------------------------------------------------------------------------------


def nearest_neighbours(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 2**16,
) -> torch.Tensor:
    """Weighted k-nearest-neighbour classification (Wu et al. 2018): each of the k nearest training images by cosine
    similarity votes for its class with the weight exp(cosine / temperature).

    It computes in 32 bits on the device of `test`. A block of training features at a time is moved there, which limits
    the memory.

    Args:
        train: training features (n_train, d), of any type and on any device.
        train_labels: (n_train,).
        test: test features (n, d).
        classes: number of classes c.
        block: number of training features per block. It does not change the result.

    Returns:
        the sums of votes (n, c), divided for each test image by the vote of its nearest neighbour.
    """
    queries = F.normalize(test.float(), dim=1).split(1024)
    # of the nearest training features so far, for each query
    cosine = torch.empty(len(test), 0, device=test.device)
    index = torch.empty(len(test), 0, dtype=torch.long, device=test.device)
    for start in range(0, len(train), block):
        keys = F.normalize(train[start : start + block].to(test.device).float(), dim=1)
        nearest = [(query @ keys.t()).topk(min(k, len(keys)), dim=1) for query in queries]
        block_cosine = torch.cat([each.values for each in nearest])
        block_index = start + torch.cat([each.indices for each in nearest])
        # the k nearest of this block and those before compete
        cosine, index = torch.cat([cosine, block_cosine], dim=1), torch.cat([index, block_index], dim=1)
        cosine, order = cosine.topk(min(k, cosine.shape[1]), dim=1)
        index = index.gather(1, order)
    # The difference to the nearest one has the same order of classes, and exp cannot overflow at a low temperature.
    votes = ((cosine - cosine[:, :1]) / temperature).exp()
    scores = torch.zeros(len(test), classes, device=test.device)
    return scores.scatter_add_(1, train_labels.to(test.device)[index], votes)


def linear_probe(
    train: torch.Tensor,
    train_labels: torch.Tensor,
    test: torch.Tensor,
    classes: int,
    epochs: float = 100,
    batch: int = 256,
    lr: float = 0.1,
    seed: int = 0,
    max_steps: int | None = None,
) -> torch.Tensor:
    """Train a linear classifier on frozen features, which are normalized without affine parameters, as MAE's linear
    probe does.

    The optimizer is SGD with momentum 0.9 and no weight decay; the learning rate follows a cosine to 0. The features
    are frozen, so mean and standard deviation are computed once over all training features; the running average of a
    batch norm would only approximate them. It computes in 32 bits on the device of `test`.

    Args:
        train: training features (n_train, d), of any type and on any device.
        train_labels: (n_train,).
        test: test features (n, d).
        classes: number of classes c.
        lr: learning rate at a batch size of 256; it is scaled linearly with `batch`.
        max_steps: stop after this many steps of the unchanged schedule.

    Returns:
        the logits of the test images, (n, c).
    """
    # The features move to the device in the type in which they are stored, and are converted in parts, to save memory.
    device = test.device
    train, train_labels = train.to(device), train_labels.to(device)
    columns = train.split(64, dim=1)
    mean = torch.cat([part.float().mean(0) for part in columns])
    std = torch.cat([part.float().std(0) for part in columns]).clamp(min=1e-6)
    classifier = nn.Linear(train.shape[1], classes, device=device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=lr * batch / 256, momentum=0.9)
    steps_per_epoch = max(1, len(train) // batch)
    steps = max(1, round(epochs * steps_per_epoch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps if max_steps is None else min(max_steps, steps)):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step_of_epoch == 0:
            order = torch.randperm(len(train), generator=rng.generator(seed, "probe", epoch)).to(device)
        indices = order[step_of_epoch * batch : (step_of_epoch + 1) * batch]
        logits = classifier((train[indices].float() - mean) / std)
        F.cross_entropy(logits, train_labels[indices]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        return classifier((test.float() - mean) / std)


def effective_rank(features: torch.Tensor) -> float:
    """Effective rank of features (n, d) (RankMe, Garrido et al. 2023): exp of the entropy of their singular values,
    divided by their sum.

    It is 1 if all features are multiples of one vector, which is a collapse, and at most min(n, d).
    """
    singular_values = torch.linalg.eigvalsh(features.double().T @ features.double()).clamp(min=0).sqrt()
    return float(torch.special.entr(singular_values / singular_values.sum()).sum().exp())


def sample_images(images, limit: int, *keys):
    """A random sample of at most `limit` images, in their order. It is a function of `keys`, such as the seed and a
    purpose."""
    if len(images) <= limit:
        return images
    order = np.argsort(rng.hash64(*keys, np.arange(len(images))), kind="stable")
    return images.subset(np.sort(order[:limit]))


class FeatureMonitor:
    """Measures the features of a network while it trains, on samples of the images. It does not touch the random
    numbers of the training.

    The training sample has at most 100 images per class and 10,000 in all, the held-out sample at most 50 per class and
    2,000 in all. Without labels there is only a training sample, of at most 2,000 images.

    Args:
        model: maps images (b, c, *size) to features (b, d).
        train, held_out: the images. If both are labelled, k-NN accuracy is measured.
        size: of the crops.
        seed: of the samples.
    """

    def __init__(self, distributed, model, train, held_out, size, seed: int):
        self.distributed, self.model, self.size = distributed, model, size
        self.labelled = bool(train.classes) and held_out.labels is not None
        classes = max(2, len(train.classes))
        self.samples = [sample_images(train, min(10_000, 100 * classes) if self.labelled else 2000, seed, "k-NN train")]
        if self.labelled:
            self.samples.append(sample_images(held_out, min(2000, 50 * classes), seed, "k-NN held out"))

    def measure(self) -> dict[str, float]:
        """The accuracy of k-NN in %, "knn_top1", if there are labels, and the effective rank of the training sample's
        features, "feature_rank".

        All processes must call it together.
        """
        gathered = [extract_features(self.distributed, self.model, images, self.size) for images in self.samples]

        def measures() -> dict[str, float]:
            if not all(len(indices) for _, indices in gathered):
                raise DataError("none of the images can be read")
            train, indices = gathered[0]
            rank = {"feature_rank": effective_rank(train)}
            if not self.labelled:
                return rank
            test, test_indices = gathered[1]
            train_labels, labels = (torch.from_numpy(images.labels) for images in self.samples)
            scores = nearest_neighbours(train, train_labels[indices], test, len(self.samples[0].classes))
            return {"knn_top1": topk_accuracy(scores, labels[test_indices])["top1"]} | rank

        return self.distributed.run_on_main(measures)


# Semantic segmentation ------------------------------------------------------------------------------------------------


def pixel_confusion(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts of pixels (c, c), rows true and columns predicted. Pixels whose truth is IGNORE_INDEX, 255, are left out.

    Args:
        predicted, truth: class numbers of the same shape.
    """
    labelled = truth != IGNORE_INDEX
    pairs = truth[labelled] * classes + predicted[labelled]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def predict_sliding(distributed, model, image: torch.Tensor, size) -> torch.Tensor:
    """Class probabilities of an image of any size, as the mean over windows that overlap by a third.

    Args:
        model: maps images (b, channels, *size) to logits (b, c, *size).
        image: (channels, h, w), normalized. One that is smaller than a window is extended by its border pixels.
        size: of a window, in pixels: one number, or height and width.

    Returns:
        (c, h, w).
    """
    (height, width), (h, w) = to_2tuple(size), image.shape[1:]
    padded = F.pad(image[None], (0, max(0, width - w), 0, max(0, height - h)), mode="replicate")[0]
    tops, lefts = (
        # the last window ends with the image
        sorted({*range(0, side - window, max(1, window * 2 // 3)), side - window})
        for side, window in zip(padded.shape[1:], (height, width))
    )
    windows = [(..., slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]
    total, count = 0, padded.new_zeros(padded.shape[1:])  # of probabilities, and of windows, for each pixel
    for start in range(0, len(windows), 16):
        batch = windows[start : start + 16]
        with distributed.autocast():
            logits = model(torch.stack([padded[window] for window in batch]))
        if start == 0:
            total = padded.new_zeros(logits.shape[1], *padded.shape[1:])
        for window, probabilities in zip(batch, logits.float().softmax(1)):
            total[window] += probabilities
            count[window] += 1
    return (total / count)[:, :h, :w]


def iou_scores(confusion: torch.Tensor) -> dict:
    """Intersection over union, from the counts (c, c) of `pixel_confusion`.

    Returns:
        "miou", the mean IoU in % over the classes that occur in truth or prediction; "iou", the IoU of each class in %,
        nan for a class that does not occur; "pixel_accuracy" in %.
    """
    intersection, confusion = confusion.diag().double(), confusion.double()
    union = confusion.sum(0) + confusion.sum(1) - intersection
    iou = torch.where(union > 0, 100 * intersection / union, torch.nan)
    return {
        "miou": iou.nanmean().item(),
        "iou": iou.tolist(),
        "pixel_accuracy": (100 * intersection.sum() / confusion.sum()).item(),
    }
