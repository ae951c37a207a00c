"""One page for a run: curves, pictures, settings, speed and bad files in one HTML file that loads no other file.

python show.py --run runs/x
"""

import base64
import html
import json
import math
from pathlib import Path

import numpy as np

from engine import plots
from engine.errors import UserError
from engine.files import run_config, write_atomically

STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; \
color: #222; background: #fff }
img { max-width: 100% } \
table { border-collapse: collapse; margin: 0.5rem 0 } \
td, th { border-bottom: 1px solid #ddd; padding: 0.15rem 0.8rem 0.15rem 0;
text-align: left; vertical-align: top; overflow-wrap: anywhere } \
input[type=range] { width: 100% } \
code { overflow-wrap: anywhere }"""
# The script of the slider, which shows the picture of the chosen step and hides the others.
SLIDER = """\
const names = {names}, \
pictures = document.querySelectorAll(".step"), \
slider = document.querySelector("#slider");
slider.oninput = () => {{ \
pictures.forEach((picture, k) => picture.hidden = k != slider.value); \
document.querySelector("#at").textContent = names[slider.value]; \
}};
slider.oninput();"""


def write(folder: Path, labels: dict[str, str]) -> Path:
    """Write report.html into a run folder, from its config, log and pictures.

    Args:
        folder: of a run.
        labels: see `plots.loss_curve`.

    Returns:
        The path of the page.

    Raises:
        UserError: if this is not a run folder, or if the page cannot be written.
    """
    config = run_config(folder)
    if not folder.exists():
        raise UserError(f"{folder}: no such run folder")
    if not config:
        raise UserError(f"{folder}: not a run folder, because there is no valid config.json of a run in it")
    text = page(folder, config, read_log(folder / "log.jsonl"), labels)
    target = folder / "report.html"
    try:
        write_atomically(target, lambda file: file.write(text.encode(errors="replace")))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    return target


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, or none if it does not exist."""
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def read_log(path: Path) -> list[dict]:
    """The valid rows of a log. The last line may be incomplete, and a new run has no log yet."""
    rows = []
    for line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def subsample_rows(items: list) -> list:
    """At most 2,000 items of a list, evenly spaced. The last item is among them."""
    spacing = math.ceil(len(items) / 2000) or 1
    return items[::-1][::spacing][::-1]


def page(folder: Path, config: dict, rows: list[dict], labels: dict[str, str]) -> str:
    """The HTML text of the page.

    Args:
        folder: of the run.
        config: its config.json.
        rows: of its log.jsonl.
        labels: see `plots.loss_curve`.
    """
    names = ("command", "commit", "date", "device", "precision", "processes", "images")
    facts = {name: config.get(name) for name in names}
    facts["effective batch"] = config.get("effective_batch")
    facts["steps in the log"] = max((row["step"] for row in rows), default=0)
    sections = [f"<h1>{escape(folder.name)}</h1>", html_table(facts)]

    last = next((row for row in reversed(rows) if any(name.startswith("eval_") for name in row)), {})
    metrics = {
        name: f"{value:.4g}" for name, value in last.items() if name.startswith("eval_") and isinstance(value, float)
    }
    if metrics:
        sections += [f"<h2>Held out, after step {last['step']}</h2>", html_table(metrics)]
    if len(rows) > 1:
        figure = plots.loss_curve(subsample_rows(rows), labels)
        sections += ["<h2>Curves</h2>", html_image(plots.png(figure), "png", "loss and learning rate")]
    pictures = sorted((folder / "pictures").glob("*-*.jpg"))
    if pictures:
        sections += ["<h2>Pictures</h2>", html_slider(pictures)]

    speeds = [(row["step"], row["time_images_per_second"]) for row in rows if row.get("time_images_per_second")]
    if speeds:
        training_seconds = max(row.get("time_training_seconds") or 0 for row in rows)
        waiting = [row["time_data_share"] for row in rows if "time_data_share" in row]
        times = {
            "source images a second, median": f"{np.median([speed for _, speed in speeds]):.4g}",
            "hours of training": f"{training_seconds / 3600:.3g}",
            "share of time spent waiting for data, median": f"{np.median(waiting or [0]):.1%}",
        }
        figure = plots.speed_curve(subsample_rows(speeds))
        image = html_image(plots.png(figure), "png", "source images a second over steps")
        sections += ["<h2>Speed</h2>", html_table(times), image]

    warnings = [f"step {row['step']}: {row['warning']}" for row in rows if row.get("warning")]
    if warnings:
        sections += ["<h2>Warnings</h2>", *(f"<p>{escape(warning)}</p>" for warning in warnings)]
    bad_files = read_lines(folder / "bad_files.txt")
    if bad_files:  # each line has the name of a file, a tab and the reason
        reasons = dict(line.partition("\t")[::2] for line in bad_files[:1000])
        sections += [f"<h2>Bad files: {len(bad_files)}</h2>", html_table(reasons)]
    else:
        sections.append("<p>No bad files.</p>")

    settings = {name: value for name, value in sorted(config["arguments"].items()) if value is not None}
    sections += ["<h2>Settings</h2>", html_table(settings), "<h2>Pixels</h2>", html_table(config.get("pixels", {}))]
    head = f'<meta charset="utf-8"><title>{escape(folder.name)}</title><style>{STYLE}</style>'
    body = "\n".join(sections)
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def escape(value) -> str:
    """A value as text for HTML; lists and dicts as JSON."""
    return html.escape(json.dumps(value) if isinstance(value, (dict, list)) else str(value))


def html_table(values: dict) -> str:
    """A table with a row for each name and value."""
    rows = [f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items()]
    return f"<table>{''.join(rows)}</table>"


def html_image(data: bytes, kind: str, description: str, attributes: str = "") -> str:
    """An image whose bytes are part of the page.

    Args:
        data: of the image file.
        kind: "png" or "jpeg".
        description: for readers who do not see the image.
        attributes: further attributes of the element.
    """
    encoded = base64.b64encode(data).decode()
    return f'<img {attributes} alt="{escape(description)}" src="data:image/{kind};base64,{encoded}">'


def html_slider(pictures: list[Path]) -> str:
    """All pictures NAME-STEP.jpg and a slider that chooses the one that is shown, at first the last one."""
    names = [f"after step {int(path.stem.rsplit('-', 1)[1])}" for path in pictures]
    last = len(pictures) - 1
    lines = [
        f'<p id="at">{names[-1]}</p><input id="slider" type="range" min="0" max="{last}" value="{last}" '
        'aria-label="step">'
    ]
    for k, (path, name) in enumerate(zip(pictures, names)):
        hidden = "" if k == last else "hidden"
        lines.append(html_image(path.read_bytes(), "jpeg", name, f'class="step" {hidden}'))
    lines.append(f"<script>{SLIDER.format(names=json.dumps(names))}</script>")
    return "\n".join(lines)
