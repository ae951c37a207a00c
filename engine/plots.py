"""Figures that every training makes: curves, a confusion matrix, bars of speed, rows of pictures.

Each function returns a matplotlib Figure, and `save` writes one to a file.
"""

import io

import torch
from matplotlib.figure import Figure

from images.crops import format_size

FORMATS = (".png", ".jpg", ".pdf", ".svg")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of a size in inches. It needs no window system, unlike the figures of pyplot."""
    return Figure(figsize=(width, height), dpi=100, facecolor="white")


def save(figure: Figure, file, kind: str = "png"):
    """Write a figure. Equal figures give equal bytes as PNG, where the version of matplotlib is left out.

    Args:
        figure: what to write.
        file: an open binary file.
        kind: a format of matplotlib, such as "png" or "pdf".
    """
    figure.savefig(file, format=kind, metadata={"Software": None} if kind == "png" else None)


def png(figure: Figure) -> bytes:
    """The bytes of a figure as PNG."""
    file = io.BytesIO()
    save(figure, file)
    return file.getvalue()


def drawable_text(text: str) -> str:
    """A name in a form that matplotlib can draw: dollar signs do not start a formula, and all bytes are valid UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("$", r"\$")


def tile_images(axes, columns: list[tuple], fontsize: float):
    """Draw columns of pictures, with their names above, into one axes.

    The unit of the axes is the width of a picture. An axes for each picture would take twice as long to draw.

    Args:
        axes: of matplotlib.
        columns: (name, pictures). A picture is an array (h, w, channels) of values from 0 to 1. The pictures of a row
            have the same ratio of height to width.
        fontsize: of the names, in points.
    """
    axes.axis("off")
    for column, (name, pictures) in enumerate(columns):
        left, top = 1.04 * column, 0
        axes.text(left + 0.5, -0.04, name, fontsize=fontsize, ha="center", va="bottom", color="black")
        for picture in pictures:
            bottom = top + picture.shape[0] / picture.shape[1]
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(left, left + 1, bottom, top))
            top = bottom + 0.04
    axes.set(xlim=(0, left + 1), ylim=(bottom, 0))


def loss_curve(rows: list[dict], labels: dict[str, str]) -> Figure:
    """Losses and validation errors over steps, the learning rate, and one validation metric if there is any.

    Args:
        rows: of log.jsonl. Fields "loss..." and "eval_...error" share one axes. Other fields "eval_..." are metrics.
        labels: metrics and the titles of their axes. The first of these metrics that was logged is drawn.
    """
    errors, metrics = {}, {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("loss", "eval_")) and value is not None:
                is_metric = name.startswith("eval_") and not name.endswith("error")
                series = metrics if is_metric else errors
                series.setdefault(name, []).append((row["step"], value))

    widths = (3, 1, 1.3) if metrics else (3, 1)
    figure = new_figure(11 if metrics else 8, 4)
    error_axes, lr_axes, *metric_axes = figure.subplots(1, len(widths), width_ratios=widths)
    for name, points in errors.items():
        marker = "o" if name.startswith("eval_") else None
        error_axes.plot(*zip(*points), marker=marker, markersize=3, label=name)
    error_axes.set_ylabel("error")
    error_axes.legend(fontsize=7)
    lr_rows = [row for row in rows if "lr" in row]
    lr_axes.plot([row["step"] for row in lr_rows], [row["lr"] for row in lr_rows])
    lr_axes.set_title("learning rate", fontsize=9)
    if metrics:
        axes = metric_axes[0]
        name = next(name for name in [*labels, *metrics] if name in metrics)
        # The metric before the first step has a field of its own, which all rows repeat.
        start = [(0, value) for _, value in metrics.get(f"{name}_at_start", [])][:1]
        axes.plot(*zip(*start, *metrics[name]), "o-", markersize=3)
        if start:
            axes.axhline(start[0][1], linestyle="--", color="gray", label="before the first step")
            axes.legend(fontsize=7)
        axes.set_title(labels.get(name, name), fontsize=9)
    for axes in figure.axes:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def speed_curve(points: list[tuple]) -> Figure:
    """Speed over steps. points: (step, source images per second)."""
    figure = new_figure(8, 2.5)
    axes = figure.subplots()
    axes.plot(*zip(*points))
    axes.set(xlabel="step", ylabel="source images a second", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def confusion_matrix(confusion: torch.Tensor, classes: list[str]) -> Figure:
    """A confusion matrix, with each row divided by its sum.

    Args:
        confusion: (c, c) numbers of images, true classes in rows and predicted classes in columns.
        classes: their names, which are written beside the axes if there are at most 30.
    """
    few = len(classes) <= 30
    figure = new_figure(6.5, 6) if few else new_figure(9, 8.5)
    axes = figure.subplots()
    fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    image = axes.imshow(fractions.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true")
    if few:
        names = [drawable_text(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    figure.tight_layout()
    return figure


def speed_bars(rows: list[dict], machine: str, colours: dict[str, str]) -> Figure:
    """A bar for each row of bench.json: its source images per second.

    Args:
        rows: those of bench.json that have a method.
        machine: the title.
        colours: of the bars by method. The bars of other methods are gray.
    """
    figure = new_figure(8, 1.4 + 0.32 * len(rows))
    axes = figure.subplots()
    names = []
    for row in rows:
        words = [row["method"], row.get("mode"), row["model"], f"{format_size(row['image_size'])} px", row["precision"]]
        words += ["compiled" if row["compiled"] else "", f"x {row['source_images_per_step']}"]
        names.append(" ".join(word for word in words if word))
    speeds = [row["source_images_per_second"] for row in rows]
    bars = axes.barh(names, speeds, color=[colours.get(row["method"], "tab:gray") for row in rows])
    axes.bar_label(bars, [f"{speed:.3g}" for speed in speeds], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(speeds))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("source images per second, whole training steps (x: source images a step)", fontsize=8)
    axes.set_title(machine, fontsize=8)
    figure.tight_layout()
    return figure
