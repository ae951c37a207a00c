"""results/README.md, its plots and results/cifar10/summary.json, from the logs and bench.json files in results/.

    make results          the same logs give the same bytes
"""
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import cifar10  # noqa: E402
import show  # noqa: E402
import tables  # noqa: E402

INTRODUCTION = """# Results

Made by `make results` from the logs and `bench.json` files in this folder; nothing here is typed by hand. `demo/` and
`check/` hold the logs behind the numbers of the main README.
"""


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last(rows: list[dict], name: str):
    """The last value logged under a name."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def median(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None


def seconds(rows: list[dict]) -> float:
    """Steps times the median step: pauses of the process do not count."""
    return rows[-1]["step"] * median(rows, "time_step_ms") / 1000 if rows else 0.0


def measured(folder: Path, study: str, arm: str, seed: int) -> dict | None:
    """One arm's numbers, from the logs of its phases; None if it was not fine-tuned yet."""
    place = cifar10.folder(study, arm, seed)
    logs = {name: read(folder / place / name / "log.jsonl") for name in ("pretrain", "finetune", "linear", "knn")
            if (folder / place / name / "log.jsonl").exists()}
    if "finetune" not in logs:
        return None
    config = json.loads((folder / place / "finetune" / "config.json").read_text())
    before = json.loads((folder / place / "pretrain" / "config.json").read_text())["arguments"]["epochs"] if "pretrain" in logs else 0
    return {"study": study, "arm": arm, "seed": seed, "top1": last(logs["finetune"], "eval_top1"),
            "linear": last(logs.get("linear", []), "eval_top1"), "knn": last(logs.get("knn", []), "eval_top1"),
            "eval_error": last(logs.get("pretrain", []), "eval_error"), "pretrain_epochs": before,
            "finetune_epochs": config["arguments"]["epochs"],
            "pretrain_seconds": seconds(logs.get("pretrain", [])), "finetune_seconds": seconds(logs["finetune"]),
            "pretrain_images_per_second": median(logs.get("pretrain", []), "time_images_per_second"),
            "commit": config["commit"], "date": config["date"], "device": config["device"], "model": config["arguments"]["model"],
            "versions": config["versions"], "log": str(place / "finetune" / "log.jsonl")}


def collect(folder: Path) -> list[dict]:
    """All finished arms, in the order of the studies; equal time includes the arms that define it."""
    rows = []
    for study, (arms, seeds) in cifar10.STUDIES.items():
        for arm in arms:
            rows += [row for row in (measured(folder, study, arm, seed) for seed in seeds) if row]
    return rows


def spread(values: list, digits: int = 2) -> str:
    """Mean and standard deviation over seeds."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def grouped(rows: list[dict], study: str, arms: list[str]) -> list[tuple[str, list[dict]]]:
    return [(arm, [row for row in rows if row["arm"] == arm and row["study"] == study]) for arm in arms]


def with_references(rows: list[dict], study: str) -> list[tuple[str, list[dict]]]:
    """A study's arms, and those of the first table that they are read beside."""
    arms, seeds = cifar10.STUDIES[study]
    groups = grouped(rows, study, arms)
    if study == "equal time":
        return groups + grouped(rows, "equal epochs", [arm for arm in cifar10.MAIN if arm.startswith("eesmm")])
    if study in ("levers", "ablations") and any(rows for _, rows in groups):  # what one setting changes: the same seeds without it
        return grouped([row for row in rows if row["seed"] in seeds], "equal epochs", ["greenmim", "eesmm split", "eesmm split all"]) + groups
    return groups


def study_table(groups: list[tuple[str, list[dict]]]) -> list[str]:
    lines = ["| arm | pre-training epochs | fine-tuning epochs | top-1 | linear probe | k-NN | held-out error | source images/s | minutes | seeds |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for arm, rows in groups:
        if not rows:
            lines.append(f"| {arm} | not run | | | | | | | | |")
            continue
        of = {name: [row[name] for row in rows] for name in rows[0]}
        minutes = [(before + after) / 60 for before, after in zip(of["pretrain_seconds"], of["finetune_seconds"])]
        cells = (arm, f"{of['pretrain_epochs'][0]:g}", f"{of['finetune_epochs'][0]:g}", spread(of["top1"]), spread(of["linear"]), spread(of["knn"]),
                 spread(of["eval_error"], 3), spread(of["pretrain_images_per_second"], 0), spread(minutes, 1), len(rows))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def verdict(groups: list[tuple[str, list[dict]]]) -> list[str]:
    """Differences of top-1 to the best of the arms that pre-train by superposition, paired by seed."""
    means = {arm: statistics.mean(row["top1"] for row in rows) for arm, rows in groups if rows}
    ours = {arm: mean for arm, mean in means.items() if arm.startswith("eesmm")}
    if not ours:
        return []
    best = max(ours, key=ours.get)
    of_seed = {row["seed"]: row["top1"] for row in dict(groups)[best]}
    lines = []
    for arm, rows in groups:
        differences = [of_seed[row["seed"]] - row["top1"] for row in rows if row["seed"] in of_seed]
        if differences and not arm.startswith("eesmm"):
            lines.append(f"- {best} minus {arm}: {spread(differences)} points ({len(differences)} seeds)")
    return lines


def bars(groups: list[tuple[str, list[dict]]], title: str):
    """Mean top-1 of each arm, every seed as a point."""
    groups = [(arm, rows) for arm, rows in groups if rows]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(groups)), dpi=100, facecolor="white")
    axes = figure.subplots()
    axes.barh([arm for arm, _ in groups], [statistics.mean(row["top1"] for row in rows) for _, rows in groups],
              color=["tab:blue" if arm.startswith("eesmm") else "tab:gray" for arm, _ in groups], alpha=0.6)
    for place, (_, rows) in enumerate(groups):
        axes.plot([row["top1"] for row in rows], [place] * len(rows), "k.", markersize=5)
    tops = [row["top1"] for _, rows in groups for row in rows]
    axes.set_xlim(min(tops) - 3, max(tops) + 1)
    axes.invert_yaxis(), axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("top-1 after fine-tuning, per cent (points: seeds; the axis does not begin at 0)", fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def cifar_section(folder: Path, rows: list[dict]) -> list[str]:
    """The study's tables, as far as they have been run, and their plots."""
    lines = ["## CIFAR-10: does superposition pay?", ""]
    if not rows:
        return [*lines, "Not run.", ""]
    dates = sorted({row["date"] for row in rows})
    scale = next(scale for scale in cifar10.SCALES.values() if scale["model"] == rows[0]["model"])
    lines += [f"CIFAR-10 as JPEG (50,000 training, 10,000 test images, all tested), {rows[0]['model']}, {', '.join(sorted({row['device'] for row in rows}))}, "
              f"torch {rows[0]['versions']['torch']}, {dates[0]} to {dates[-1]}. Pre-training: `{scale['pretrain']}`; fine-tuning on "
              f"{scale['labels']:.0%} of the labels: `{scale['finetune']}`, base learning rate {scale['lr']:g}, from scratch "
              f"{scale['scratch_lr']:g} without layer decay. Mean ± standard deviation over seeds. Command, seed, commit, versions and "
              "device of each run: `config.json` beside its `log.jsonl`. Source images/s (the median of pre-training) and minutes "
              "(steps times the median step, pre-training and fine-tuning) are read from the logs of a machine with other work, one "
              "thread a run: they vary more than the speeds measured side by side below.", ""]
    for study in cifar10.STUDIES:
        groups = with_references(rows, study)
        done = [group for group in groups if group[1]]
        lines += [f"### {study.capitalize()}", ""]
        if study == "equal time":
            lines += ["Every arm gets the time that eesmm takes for its pre-training and fine-tuning, by the speeds of "
                      "`cifar10/speed-*.json`; from scratch, all of it goes into fine-tuning. The eesmm arms are those of the table "
                      "above. The speeds, side by side:", ""]
            for path in sorted(folder.glob("speed-*.json")):
                found = json.loads(path.read_text())
                speeds = ", ".join(f"{row['method']} {row['source_images_per_second']:.0f}" for row in found["rows"] if row.get("mode") != "inference")
                lines.append(f"- `{found['command']}`: {speeds} source images/s")
            lines.append("")
        if not done:
            lines += ["Not run.", ""]
            continue
        lines += [*study_table(groups), "", *verdict(groups), ""]
        name = f"{cifar10.slug(study)}.png"
        show.save(bars(done, f"CIFAR-10, {study}"), folder / name)
        lines += [f"![top-1 of each arm]({folder.name}/{name})", ""]
    return lines


def sweep_section(folder: Path) -> list[str]:
    """The learning rates tried beforehand."""
    found = []
    for path in sorted(folder.glob("*/config.json")):
        config = json.loads(path.read_text())
        if config["kind"] == "finetune":
            arguments = config["arguments"]
            found.append((arguments["init"] or "pre-trained", arguments["layer_decay"], arguments["base_lr"], last(read(path.with_name("log.jsonl")), "eval_top1")))
    if not found:
        return []
    return ["### Learning rates tried beforehand", "", "Fine-tuning rates, one seed; the pre-trained network of these runs is `sweep/pretrain` "
            "(eesmm split all, two epochs). The rate of pre-training was not swept.", "", "| start | layer decay | base learning rate | top-1 |", "|---|---|---|---|",
            *(f"| {start} | {decay:g} | {lr:g} | {top1:.2f} |" for start, decay, lr, top1 in sorted(found)), ""]


def bench_section(folder: Path) -> list[str]:
    """Every bench.json, as a table, with its command."""
    lines = ["## Speed", ""]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        lines += [f"### {path.stem}", "", f"`{found['command']}` on {found['machine']}, torch {found['versions']['torch']}, {found['date']}", ""]
        if "rows" in found:
            lines += [tables.table(found["rows"]), ""]
            lines += [*(f"- {line}" for line in tables.ratios(found["rows"])), ""]
        for method, parts in found.get("parts", {}).items():
            total = sum(parts.values())
            lines += [f"{method}, {total:.0f} ms a step:", "", "| part | ms | share |", "|---|---|---|",
                      *(f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in parts.items()), ""]
        if path.with_suffix(".png").exists():
            lines += [f"![source images per second]({folder.name}/{path.stem}.png)", ""]
    return lines if len(lines) > 2 else [*lines, "Not run.", ""]


def main(results: Path = ROOT / "results"):
    rows = collect(results / "cifar10")
    (results / "cifar10").mkdir(exist_ok=True)
    (results / "cifar10" / "summary.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    lines = [INTRODUCTION, *cifar_section(results / "cifar10", rows), *sweep_section(results / "cifar10" / "sweep"),
             *bench_section(results / "bench")]
    (results / "README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
