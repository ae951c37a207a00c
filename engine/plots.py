"""Figures that any training makes: curves, a confusion matrix, bars of speed. Each is a matplotlib Figure; `save` writes it."""

import io

import torch
from matplotlib.figure import Figure

from images.crops import format_size


def drawable_text(text: str) -> str:
    """A name as a figure can draw it: no mathematics between dollar signs, no bytes outside UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("$", r"\$")


WATCHED = {
    "eval_knn_top1": "k-NN top-1, %",
    "eval_top1": "top-1, %",
    "eval_miou": "mean IoU, %",
    "eval_feature_rank": "feature rank",
}  # the first of these is drawn


def tile_images(axes, columns: list[tuple], fontsize: float):
    """Columns of pictures in one axes, in units of a picture's width; an axes for each picture would take twice as long.
    columns: (name, pictures), each (h, w, channels) in 0-1, in rows of equal height over width."""
    axes.axis("off")
    for column, (name, pictures) in enumerate(columns):
        left, top = 1.04 * column, 0
        axes.text(left + 0.5, -0.04, name, fontsize=fontsize, ha="center", va="bottom", color="black")
        for picture in pictures:
            bottom = top + picture.shape[0] / picture.shape[1]
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(left, left + 1, bottom, top))
            top = bottom + 0.04
    axes.set_xlim(0, left + 1), axes.set_ylim(bottom, 0)


def loss_curve(rows: list[dict]):
    """Loss terms and held-out errors over steps, and the learning rate; what was looked at in features beside them, if it was."""
    series = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("loss", "eval_")) and value is not None:
                series.setdefault(name, []).append((row["step"], value))
    watched = {
        name: series.pop(name) for name in list(series) if name.startswith("eval_") and not name.endswith("error")
    }
    figure = Figure(figsize=(11 if watched else 8, 4), dpi=100, facecolor="white")
    left, right, *beside = figure.subplots(1, 2 + bool(watched), width_ratios=(3, 1, 1.3) if watched else (3, 1))
    for name, points in series.items():
        left.plot(*zip(*points), marker="o" if name.startswith("eval_") else None, markersize=3, label=name)
    for axes in beside:
        name = next((name for name in WATCHED if name in watched), next(iter(watched)))
        start = [(0, value) for _, value in watched.get("eval_knn_top1_at_start", ())][:1]
        axes.plot(*zip(*start, *watched[name]), "o-", markersize=3)
        if start:
            axes.axhline(start[0][1], linestyle="--", color="gray", label="before the first step")
            axes.legend(fontsize=7)
        axes.set_xlabel("step"), axes.grid(alpha=0.3)
        axes.set_title(WATCHED.get(name, name), fontsize=9)
    left.set_xlabel("step"), left.set_ylabel("error"), left.legend(fontsize=7), left.grid(alpha=0.3)
    right.plot([row["step"] for row in rows if "lr" in row], [row["lr"] for row in rows if "lr" in row])
    right.set_xlabel("step"), right.set_title("learning rate", fontsize=9), right.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def speed_curve(points: list[tuple]):
    """(step, source images a second)."""
    figure = Figure(figsize=(8, 2.5), dpi=100, facecolor="white")
    axes = figure.subplots()
    axes.plot(*zip(*points))
    axes.set_xlabel("step"), axes.set_ylabel("source images a second"), axes.set_ylim(bottom=0), axes.grid(alpha=0.3)
    figure.tight_layout()
    return figure


def confusion_matrix(confusion: torch.Tensor, classes: list[str]):
    """True classes in rows, predicted in columns, each row as shares of its images. confusion: (c, c) counts."""
    few = len(classes) <= 30
    figure = Figure(figsize=(6.5, 6) if few else (9, 8.5), dpi=100, facecolor="white")
    axes = figure.subplots()
    classes = [drawable_text(name) for name in classes]
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    drawn = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted"), axes.set_ylabel("true")
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
    figure.colorbar(drawn, label="share of the true class", shrink=0.8)
    figure.tight_layout()
    return figure


def speed_bars(rows: list[dict], machine: str, colours: dict[str, str]):
    """Bars: source images/s of each row of bench.json. colours: by method, gray for others."""
    figure = Figure(figsize=(8, 1.4 + 0.32 * len(rows)), dpi=100, facecolor="white")
    axes = figure.subplots()
    values = [row["source_images_per_second"] for row in rows]
    names = [
        " ".join(
            str(word)
            for word in (
                row["method"],
                row.get("mode", ""),
                row["model"],
                f"{format_size(row['image_size'])} px",
                row["precision"],
                "compiled" if row["compiled"] else "",
                f"x {row['source_images_per_step']}",
            )
            if word
        )
        for row in rows
    ]
    bars = axes.barh(names, values, color=[colours.get(row["method"], "tab:gray") for row in rows])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(values))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("source images per second, whole training steps (x: source images a step)", fontsize=8)
    axes.set_title(machine, fontsize=8)
    figure.tight_layout()
    return figure


FORMATS = (".png", ".jpg", ".pdf", ".svg")


def save(figure, file, kind: str = "png"):
    """Write a figure; equal figures give equal bytes as PNG."""
    figure.savefig(file, format=kind, metadata={"Software": None} if kind == "png" else None)


def png(figure) -> bytes:
    file = io.BytesIO()
    save(figure, file)
    return file.getvalue()
