"""A run on one page: curves, pictures over the epochs, settings, speed, bad files, in one HTML file that asks for no other."""

import base64
import html
import json
from pathlib import Path

import numpy as np

from engine import plots
from engine.errors import UserError
from engine.files import run_config, write_atomically

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }
img { max-width: 100% } table { border-collapse: collapse; margin: 0.5rem 0 } td, th { border-bottom: 1px solid #ddd; padding: 0.15rem 0.8rem 0.15rem 0;
text-align: left; vertical-align: top; overflow-wrap: anywhere } input[type=range] { width: 100% } code { overflow-wrap: anywhere }"""
SLIDER = """const names = {names}, pictures = document.querySelectorAll(".step"), slider = document.querySelector("#slider");
slider.oninput = () => {{ pictures.forEach((picture, k) => picture.hidden = k != slider.value); document.querySelector("#at").textContent = names[slider.value]; }};
slider.oninput();"""


def write(folder: Path) -> Path:
    """report.html in a run's folder, from its config, log and pictures. UserError for a folder of no run."""
    config = run_config(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    if not config:
        raise UserError(f"{folder}: no run: it has no config.json of one, or a damaged one")
    rows = read_log(folder / "log.jsonl")
    target = folder / "report.html"
    try:
        write_atomically(target, lambda file: file.write(page(folder, config, rows).encode(errors="replace")))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return target


def read_log(path: Path) -> list[dict]:
    """The valid rows of a log. The last line may be incomplete, and a new run has no log yet."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
        except ValueError:
            continue
    return rows


def page(folder: Path, config: dict, rows: list[dict]) -> str:
    pictures = sorted((folder / "pictures").glob("*-*.jpg"))
    arguments, last = (
        config["arguments"],
        next((row for row in reversed(rows) if any(name.startswith("eval_") for name in row)), {}),
    )
    measures = {
        name: f"{value:.4g}" for name, value in last.items() if name.startswith("eval_") and isinstance(value, float)
    }
    facts = {
        "command": config.get("command"),
        "commit": config.get("commit"),
        "date": config.get("date"),
        "device": config.get("device"),
        "precision": config.get("precision"),
        "processes": config.get("processes"),
        "images": config.get("images"),
        "effective batch": config.get("effective_batch"),
        "steps in the log": max((row["step"] for row in rows), default=0),
    }
    speeds = [(row["step"], row["time_images_per_second"]) for row in rows if row.get("time_images_per_second")]
    trained = max((row.get("time_training_seconds") or 0 for row in rows), default=0)
    parts = [f"<h1>{said(folder.name)}</h1>", table(facts)]
    if measures:
        parts += [f"<h2>Held out, after step {last['step']}</h2>", table(measures)]
    if len(rows) > 1:
        parts += [
            "<h2>Curves</h2>",
            embedded(plots.png(plots.loss_curve(subsample_rows(rows))), "png", "loss and learning rate"),
        ]
    if pictures:
        parts += ["<h2>Pictures</h2>", slider(pictures)]
    if speeds:
        waiting = [row["time_data_share"] for row in rows if "time_data_share" in row]
        parts += [
            "<h2>Speed</h2>",
            table(
                {
                    "source images a second, median": f"{np.median([speed for _, speed in speeds]):.4g}",
                    "hours of training": f"{trained / 3600:.3g}",
                    "share of time spent waiting for data, median": f"{np.median(waiting or [0]):.1%}",
                }
            ),
            embedded(plots.png(plots.speed_curve(subsample_rows(speeds))), "png", "source images a second over steps"),
        ]
    warnings = [f"step {row['step']}: {row['warning']}" for row in rows if row.get("warning")]
    parts += ["<h2>Warnings</h2>", *(f"<p>{said(warning)}</p>" for warning in warnings)] if warnings else []
    bad = (
        (folder / "bad_files.txt").read_text(errors="replace").splitlines()
        if (folder / "bad_files.txt").exists()
        else []
    )
    parts += (
        [f"<h2>Bad files: {len(bad)}</h2>", table(dict((line.split("\t", 1) + [""])[:2] for line in bad[:1000]))]
        if bad
        else ["<p>No bad files.</p>"]
    )
    parts += [
        "<h2>Settings</h2>",
        table({name: value for name, value in sorted(arguments.items()) if value is not None}),
        "<h2>Pixels</h2>",
        table(config.get("pixels", {})),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{said(folder.name)}</title><style>{STYLE}</style></head><body>'
        + "\n".join(parts)
        + "</body></html>\n"
    )


def subsample_rows(items: list) -> list:
    """At most 2,000 of a list, evenly spaced, the last among them."""
    return items[::-1][:: -(-len(items) // 2000) or 1][::-1]


def said(value) -> str:
    return html.escape(json.dumps(value) if isinstance(value, (dict, list)) else str(value))


def table(values: dict) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th>{said(name)}</th><td>{said(value)}</td></tr>" for name, value in values.items())
        + "</table>"
    )


def embedded(data: bytes, kind: str, words: str, more: str = "") -> str:
    return f'<img {more} alt="{said(words)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def slider(pictures: list[Path]) -> str:
    """The pictures, of which the slider shows one."""
    names = [f"after step {int(path.stem.rsplit('-', 1)[1])}" for path in pictures]
    last = len(pictures) - 1
    return "\n".join(
        [
            f'<p id="at">{names[-1]}</p><input id="slider" type="range" min="0" max="{last}" value="{last}" aria-label="step">',
            *(
                embedded(path.read_bytes(), "jpeg", name, f'class="step" {"" if k == last else "hidden"}')
                for k, (path, name) in enumerate(zip(pictures, names))
            ),
            f"<script>{SLIDER.format(names=json.dumps(names))}</script>",
        ]
    )
