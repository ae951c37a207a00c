"""Make results/README.md, its plots and results/cifar10/summary.json from the logs and bench.json files in results/.

make results          the same logs give the same bytes
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import cifar10
import nuclei
import trees
from matplotlib.figure import Figure
from scipy import stats
from study import PRETRAIN, ROOT, check_settings, recorded, slug

import bench
import train
from engine import plots, timing
from engine.dist import run_main
from model import from_settings

INTRODUCTION = """# Results

Made by `make results` from the logs and `bench.json` files in this folder; nothing here is typed by hand. What it says and
what limits it: [cifar10](cifar10/README.md), [dense](dense/README.md). Speed: [bench](bench/README.md). [demo](demo/README.md) and [check](check/README.md) hold
the logs of the demo and of runs on real images.

In all tables `mixmae` has MixMAE's mixing, masks and decoder on a Swin with shifted windows, and uses each pair of images once. The published
network and settings are `--recipe mixmae` ([paper](../docs/paper.md)); they have not been run here.
"""  # noqa: E501


# ------------------------------------------------------------------------------------------------- numbers and tables


def table(headers: list, rows: list[list]) -> list[str]:
    """Lines of a Markdown table and an empty line."""
    header, *lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (headers, *rows)]
    return [header, "|---" * len(headers) + "|", *lines, ""]


def mean_and_std(values: list, digits: int = 2) -> str:
    """Mean ± standard deviation over seeds, and the number of values if some seeds have none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    text = f"{statistics.mean(numbers):.{digits}f}"
    if len(numbers) > 1:
        text += f" ± {statistics.stdev(numbers):.{digits}f}"
    return text if len(numbers) == len(values) else f"{text} ({len(numbers)})"


def standard_deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0


def paired_differences(values: dict[int, float], others: dict[int, float]) -> list[float]:
    """Differences of the seeds that both configurations have. Both are values by seed."""
    return [values[seed] - others[seed] for seed in values if seed in others]


def interval(differences: list[float]) -> tuple[str, str]:
    """The 95 % confidence interval of a mean, and p of the hypothesis that it is 0, by Student's t.

    Both are empty for one value.
    """
    if len(differences) < 2:
        return "", ""
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval()
    return f"{low:.2f} to {high:.2f}", f"{test.pvalue:.3f}" if test.pvalue >= 0.001 else f"{test.pvalue:.1g}"


def last(phases: dict, phase: str, name: str):
    """The last value that a phase logged under a name; None if there is none."""
    _, log = phases.get(phase, ({}, []))
    return next((row[name] for row in reversed(log) if row.get(name) is not None), None)


def date_range(configs: list[dict]) -> str:
    """The dates of the first and the last run."""
    dates = sorted(config["date"] for config in configs)
    return dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"


def read_speeds(path: Path) -> tuple[dict, str]:
    """A file of speeds, and its training speeds as text."""
    speeds = json.loads(path.read_text())
    rows = [row for row in speeds["rows"] if row.get("mode") != "inference"]
    return speeds, ", ".join(f"{row.get('arm', row['method'])} {row['source_images_per_second']:.0f}" for row in rows)


# ------------------------------------------------------------------------------------------------- CIFAR-10


def collect(folder: Path, scale: str) -> list[dict]:
    """The numbers of every run that was fine-tuned, in the order of the studies.

    A run that stands in several studies has a row for each.
    """
    rows, args = [], cifar10.arguments(["--scale", scale])
    for name, study in cifar10.STUDIES.items():
        for variant in study.variants:
            for seed in study.other_seeds.get(variant, study.seeds):
                path = folder / scale / f"{cifar10.folder(name, variant, seed)}.jsonl"
                phases = recorded(path)
                for step in cifar10.steps(args, name, variant, seed):
                    if step.phase in phases:
                        check_settings(step, phases[step.phase][0])
                if "finetune" in phases:
                    run = {"scale": scale, "study": name, "arm": variant, "seed": seed}
                    rows.append(run | measured(phases) | {"log": str(path.relative_to(folder))})
    return rows


def measured(phases: dict) -> dict:
    """The numbers of one run, from the logs of its phases."""
    config, _ = phases["finetune"]
    pretrain_config, pretrain_log = phases.get("pretrain", ({"arguments": {"epochs": 0}}, []))
    speeds = [row["time_images_per_second"] for row in pretrain_log if row.get("time_images_per_second") is not None]
    seconds = [last(phases, phase, "time_training_seconds") or 0 for phase in ("pretrain", "finetune")]
    return {
        "top1": last(phases, "finetune", "eval_top1"),
        "linear": last(phases, "linear", "eval_top1"),
        "knn": last(phases, "knn", "eval_top1"),
        "eval_error": last(phases, "pretrain", "eval_error"),
        "pretrain_epochs": pretrain_config["arguments"]["epochs"],
        "finetune_epochs": config["arguments"]["epochs"],
        "logged_seconds": sum(seconds),
        "logged_images_per_second": statistics.median(speeds) if speeds else None,
        **{name: config[name] for name in ("commit", "date", "device", "versions")},
    }


def million_macs(scale: str, variant: str) -> float:
    """Multiply-accumulates of the forward pass of pre-training for each source image, in millions."""
    args = cifar10.pretraining(scale, variant)
    return 1000 * train.gmacs(from_settings(vars(args))) / args.sources


def study_table(scale: str, groups: dict[str, list[dict]]) -> list[str]:
    """One row for each configuration. groups: the rows of `collect` by configuration."""
    # The speeds of the other configurations were not measured side by side.
    timed = cifar10.MAIN | cifar10.PRETRAIN_SHARE | cifar10.RATES | cifar10.BASELINES | cifar10.FAMILY
    labelled_images = cifar10.SCALES[scale]["labels"] * cifar10.IMAGES
    headers = ["arm", "pre-training epochs", "fine-tuning epochs", "top-1", "linear probe", "k-NN", "held-out error"]
    headers += ["M multiply-adds", "source images/s", "minutes", "seeds"]
    lines = []
    for variant, rows in groups.items():
        if not rows:
            lines.append([variant, "not run", *[""] * 9])
            continue
        pretrain_epochs, finetune_epochs = rows[0]["pretrain_epochs"], rows[0]["finetune_epochs"]
        cells = [variant, f"{pretrain_epochs:g}", f"{finetune_epochs:g}"]
        cells += [mean_and_std([row[name] for row in rows]) for name in ("top1", "linear", "knn")]
        cells.append(mean_and_std([row["eval_error"] for row in rows], 3))
        cells.append(f"{million_macs(scale, variant):.1f}" if pretrain_epochs else "")
        speed = minutes = ""
        if variant in timed:
            model = cifar10.model(scale, variant)
            seconds = finetune_epochs * labelled_images / cifar10.speed(scale, "dense", model)
            if pretrain_epochs:
                pretrain_speed = cifar10.speed(scale, cifar10.method(variant), model)
                seconds += pretrain_epochs * cifar10.IMAGES / pretrain_speed
                speed = f"{pretrain_speed:.0f}"
            minutes = f"{seconds / 60:.1f}"
        lines.append([*cells, speed, minutes, len(rows)])
    return table(headers, lines)


def by_seed(rows: list[dict], name: str) -> dict[int, float]:
    return {row["seed"]: row[name] for row in rows}


def differences(groups: dict[str, list[dict]]) -> list[str]:
    """Top-1 of each eesmm configuration minus that of each other configuration, paired by seed, with intervals."""
    top1 = {variant: by_seed(rows, "top1") for variant, rows in groups.items() if rows}
    ours = [variant for variant in top1 if variant.startswith("eesmm")]
    others = [variant for variant in top1 if variant not in ours]
    if not ours or not others:
        return []
    lines = []
    for variant in ours:
        cells = [variant]
        for other in others:
            pairs = paired_differences(top1[variant], top1[other])
            counts = ", ".join(filter(None, (interval(pairs)[0], str(len(pairs)))))
            cells.append(f"{mean_and_std(pairs)} ({counts})" if pairs else "")
        lines.append(cells)
    return [
        "Difference of top-1, paired by seed; in brackets the 95 % interval of Student's t and the number of seeds:",
        "",
        *table(["", *(f"minus {other}" for other in others)], lines),
    ]


def bars(groups: dict[str, list[dict]], title: str) -> Figure:
    """Mean top-1 of each configuration, every seed as a point."""
    top1 = {variant: [row["top1"] for row in rows] for variant, rows in groups.items()}
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(top1)), dpi=100, facecolor="white")
    axes = figure.subplots()
    axes.barh(
        list(top1),
        [statistics.mean(values) for values in top1.values()],
        color=["tab:blue" if variant.startswith("eesmm") else "tab:gray" for variant in top1],
        alpha=0.6,
    )
    for position, values in enumerate(top1.values()):
        axes.plot(values, [position] * len(values), "k.", markersize=5)
    axes.set_xlim(min(map(min, top1.values())) - 3, max(map(max, top1.values())) + 1)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("top-1 after fine-tuning, per cent (points: seeds; the axis does not begin at 0)", fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


class FrontierResult(NamedTuple):
    """Results of one configuration of the frontier; accuracies by seed."""

    variant: str
    sources: int
    mask_ratio: float
    top1: dict[int, float]
    linear: dict[int, float]

    def visible_units(self) -> float:
        """Encoded units for each source image, of its 16."""
        return round(16 * (1 - self.mask_ratio) / self.sources, 6)


def frontier_lines(folder: Path, scale: str, groups: dict[str, list[dict]]) -> list[str]:
    """A table of pairs of configurations that encode as many units of a source image, and the figure.

    Superpositions are compared with one image; one image with the loss on all patches, with the loss on masked patches.
    """
    results = []
    for variant, rows in groups.items():
        if rows:
            args = cifar10.pretraining(scale, variant)
            accuracies = by_seed(rows, "top1"), by_seed(rows, "linear")
            results.append(FrontierResult(variant, args.sources, args.mask_ratio, *accuracies))
    headers = ["units a source image", "arm", "top-1", "minus", "difference", "95 % interval", "p", "seeds"]
    headers += ["linear probe: difference", "95 % interval", "p"]
    lines = []
    for result in results:
        for single in results:
            has_other_loss = "all" in result.variant and "all" not in single.variant
            if single.sources > 1 or single.visible_units() != result.visible_units():
                continue
            if result.sources > 1 or has_other_loss:
                top1 = paired_differences(result.top1, single.top1)
                linear = paired_differences(result.linear, single.linear)
                cells = [f"{result.visible_units():g}", result.variant, mean_and_std(list(result.top1.values()))]
                cells += [single.variant, mean_and_std(top1), *interval(top1), len(top1)]
                lines.append([*cells, mean_and_std(linear), *interval(linear)])
    speeds, _ = read_speeds(folder / f"speed-{scale}-frontier.json")
    by_variant = {row["arm"]: row["source_images_per_second"] for row in speeds["rows"]}
    plots.save(curves(scale, results, by_variant), folder / f"{scale}-frontier-curves.png")
    return [
        "Minus one image of which as many units are encoded, paired by seed; intervals and p are those of Student's t, "
        "not corrected for the number of comparisons:",
        "",
        *table(headers, lines),
        f"![top-1 over work and over time]({folder.name}/{scale}-frontier-curves.png)",
        "",
        f"Minutes by `{speeds['command']}` on {speeds['machine']}, {speeds['date']}. Bars: the standard deviation over "
        "seeds.",
        "",
    ]


CURVES = {  # colour and label, by the first words of a configuration's name
    "greenmim": ("tab:gray", "one image, error of hidden units"),
    "greenmim all": ("tab:orange", "one image, error of all units"),
    "eesmm split all": ("tab:blue", "blends, error of all units"),
}


def curves(scale: str, results: list[FrontierResult], speeds: dict[str, float]) -> Figure:
    """Top-1 over the compute and over the time of pre-training.

    Args:
        scale: key of cifar10.SCALES.
        results: of the frontier.
        speeds: source images per second of each configuration.
    """
    figure = Figure(figsize=(10, 4), dpi=100, facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    images = cifar10.SCALES[scale]["epochs"] * cifar10.IMAGES
    for axes, cost, label in (
        (panels[0], lambda variant: million_macs(scale, variant), "million multiply-adds of a source image, forward"),
        (panels[1], lambda variant: images / speeds[variant] / 60, "minutes of pre-training, measured side by side"),
    ):
        for name, (colour, curve_label) in CURVES.items():
            points = sorted(
                (cost(result.variant), list(result.top1.values()), f"({result.sources}, {result.mask_ratio:g})")
                for result in results
                if result.variant.partition(",")[0] == name
            )
            axes.errorbar(
                [x for x, _, _ in points],
                [statistics.mean(values) for _, values, _ in points],
                [standard_deviation(values) for _, values, _ in points],
                color=colour,
                marker="o",
                markersize=4,
                capsize=3,
                label=curve_label,
            )
            for x, values, text in points:
                y, position = statistics.mean(values), dict(xytext=(3, -10))
                if name.startswith("eesmm"):  # above its error bar
                    y += standard_deviation(values)
                    position = dict(xytext=(0, 4), rotation=90, ha="center", va="bottom")
                axes.annotate(text, (x, y), textcoords="offset points", fontsize=7, color=colour, **position)
        axes.set_xlabel(label, fontsize=8)
        axes.grid(alpha=0.3)
        axes.margins(y=0.25)
    panels[0].legend(fontsize=7, loc="lower right", title="(images in a blend, ratio)", title_fontsize=7)
    panels[0].set_ylabel("top-1 after fine-tuning, per cent", fontsize=8)
    figure.tight_layout()
    return figure


MEANINGS = """- **scratch**: no pre-training. **greenmim**: one image, visible units only. **simmim**: one image, all tokens, linear head, L1 on raw pixels, ratio 0.6.
  **eesmm**: two images superposed, visible units only, ratio 0.75; `subtract` is the paper's Eq. 5 and 6, `split` predicts one image per source in
  free order; `all` counts the error of all units, the others that of hidden units (Eq. 7).
- **top-1**: test accuracy in per cent after fine-tuning; **linear probe**, **k-NN** (k = 20): of frozen features, with the same labels. Scratch: random features.
- **held-out error**: normalised squared error on hidden units of {images} unmixed test images at ratio 0.75 under eight fixed masks; predicting
  each unit's mean gives about 1. Not comparable are simmim's, whose raw pixels are put on that scale by true means and contrasts, so
  that flat units weigh most, and those of ratio 0, which never saw a mask.
- **M multiply-adds**: of pre-training's forward pass, per source image. **Source images/s**, **minutes**: by the speeds measured side by
  side, evaluation left out; eesmm's was measured for `split`. Wall times of the runs, on a machine with other work, are in `cifar10/summary.json`.
- A seed changes weights, order, crops, masks and the labelled images. ± is the standard deviation over seeds, not the error of the mean; (n): of n
  seeds only. A batch counts source images, so that at equal epochs eesmm has as many steps as the others and encodes half as many composites.
"""  # noqa: E501


NOT_KEPT = {  # by the name of the file: study, configuration and seed of the run without the change, and the change
    "beta-1": ("equal epochs", "eesmm split all", 0, "the weights of each composite drawn from Beta(1, 1)"),
    "unmixed-0.25": ("equal epochs", "eesmm split all", 0, "a quarter of the composites, at random, of one image"),
    "unmixed-last-0.25": (
        "four times as long",
        "eesmm split all",
        1,
        "all composites of the last quarter of the steps of one image",
    ),
    "one-image-late": (
        "does it last",
        "eesmm split all, batch 64",
        0,
        "every image alone, at the same ratio, in the last half of the steps, for 1.5 times the work",
    ),
}


def cifar_section(folder: Path, scale: str, rows: list[dict]) -> list[str]:
    """The study's tables at one scale, as far as they have been run, and their plots. rows: of `collect`."""
    values = cifar10.SCALES[scale]
    commits = {config["commit"] for path in (folder / scale).rglob("*.jsonl") for config, _ in recorded(path).values()}
    devices, versions = ({row["device"] for row in rows}, {row["versions"]["torch"] for row in rows})
    lines = [
        f"## CIFAR-10: does superposition pay? Scale {scale}",
        "",
        "CIFAR-10 as JPEG (the public folder CIFAR-10-images, quality 75; `--download` gives other pixels; 50,000 "
        f"training, 10,000 test images, all tested), {values['model']}, {', '.join(sorted(devices))}, torch "
        f"{', '.join(sorted(versions))}, {date_range(rows)}. Pre-training: `{values['pretrain']}`, warm-up over "
        f"{values['warmup']:.1%} of the epochs. Fine-tuning on {values['labels']:.0%} of the labels: "
        f"`{values['finetune']}`; base learning rate {values['lr']:g}, from scratch {values['scratch_lr']:g} without "
        "layer decay. Command, seed, commit, versions and device of each run: the line before its log in "
        f"`cifar10/{scale}/ARM/seedN.jsonl`; {len(commits)} commits.",
        "",
        MEANINGS.format(images=values["pretrain"].split("--eval-images ")[1]),
        "The speeds:",
        "",
    ]
    for path in sorted(folder.glob(f"speed-{scale}-*.json")):
        speeds, text = read_speeds(path)
        lines.append(f"- `{speeds['command']}`: {text} source images/s on {speeds['machine']}")
    lines.append("")
    for name, study in cifar10.STUDIES.items():
        groups = {
            variant: [row for row in rows if row["study"] == name and row["arm"] == variant]
            for variant in study.variants
        }
        lines += [f"### {name.capitalize()}", "", study.text, ""]
        done = {variant: group for variant, group in groups.items() if group}
        if not done:
            lines += ["Not run.", ""]
            continue
        picture = f"{scale}-{slug(name)}.png"
        plots.save(bars(done, f"CIFAR-10, {name}"), folder / picture)
        lines += study_table(scale, groups)
        lines += frontier_lines(folder, scale, groups) if name == "frontier" else differences(groups)
        lines += [f"![top-1 of each arm]({folder.name}/{picture})", ""]
    return lines


def sweep_section(folder: Path) -> list[str]:
    """The learning rates tried beforehand."""
    rates = []
    for path in sorted(folder.glob("*.jsonl")):
        phases = recorded(path)
        if "finetune" in phases:
            settings, top1 = phases["finetune"][0]["arguments"], last(phases, "finetune", "eval_top1")
            rates.append((settings["init"] or "pre-trained", settings["layer_decay"], settings["base_lr"], top1))
    if not rates:
        return []
    command = recorded(folder / "pretrain.jsonl")["pretrain"][0]["command"]
    return [
        "### Learning rates tried beforehand",
        "",
        "Fine-tuning rates, one seed, judged on the test images and used for all arms; that from scratch "
        f"only at the length of equal epochs. The pre-trained network of these runs: `{command}`",
        "",
        *table(
            ["start", "layer decay", "base learning rate", "top-1"],
            [[start, f"{decay:g}", f"{lr:g}", f"{top1:.2f}"] for start, decay, lr, top1 in sorted(rates)],
        ),
    ]


SCORES = {
    "finetune": "top1",
    "linear": "linear",
    "knn": "knn",
}  # phases that measure an accuracy, as `measured` names it


def not_kept_section(folder: Path, rows: list[dict]) -> list[str]:
    """Changes that did not pay and did not enter the program: one seed each, next to the run without the change."""
    references = {(row["study"], row["arm"], row["seed"]): row for row in rows}
    lines = []
    for name, (study, variant, seed, change) in NOT_KEPT.items():
        reference, phases = references.get((study, variant, seed), {}), recorded(folder / f"{name}.jsonl")
        cells = [f"{change}; {study}, {variant}, seed {seed}"]
        for phase, score in SCORES.items():
            cells += [mean_and_std([last(phases, phase, "eval_top1")]), mean_and_std([reference.get(score)])]
        lines.append(cells)
    return [
        "### Tried and not kept",
        "",
        "One seed each, beside the same run without the change. The program has no flag for them: each patch, and "
        f"the commit it was made to, are in `cifar10/{folder.parent.name}/not-kept`.",
        "",
        *table(["change", "top-1", "without", "linear probe", "without", "k-NN", "without"], lines),
    ]


def decoder_section(folder: Path) -> list[str]:
    """What the positions of GreenMIM's published decoder cost: the same runs with and without decoder.patch."""
    right, shuffled = (
        [recorded(path) for path in sorted((folder / name).glob("*.jsonl"))] for name in ("right", "shuffled")
    )
    rows = [["their own"], ["as published"], ["difference, paired by seed (95 % interval)"]]
    for phase in SCORES:
        own, published = ([last(run, phase, "eval_top1") for run in runs] for runs in (right, shuffled))
        pairs = [b - a for a, b in zip(own, published, strict=True)]
        cells = mean_and_std(own), mean_and_std(published), f"{mean_and_std(pairs)} ({interval(pairs)[0]})"
        for row, cell in zip(rows, cells):
            row.append(cell)
    config, _ = right[0]["pretrain"]
    return [
        "### GreenMIM's published decoder",
        "",
        "`--method greenmim` with each visible patch at its own place in the decoder, and with the places of the "
        "published code ([paper](../docs/paper.md#greenmims-published-decoder)), by a patch of one line for which the "
        "program has no flag. Four epochs of pre-training and five of fine-tuning, as in the table of equal epochs; "
        f"{len(right)} seeds, the same masks, crops and first weights in each pair. {config['device']}, torch "
        f"{config['versions']['torch']}, {config['date']}, commit {config['commit'][:8]}; patch and logs: "
        f"`cifar10/{folder.parent.name}/{folder.name}`.",
        "",
        *table(["places of visible patches", "top-1", "linear probe", "k-NN"], rows),
    ]


# ------------------------------------------------------------------------------------------------- the other sections


def bench_section(folder: Path) -> list[str]:
    """Every bench.json, as a table, with its command."""
    lines = ["## Speed", ""]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        commit = f", commit {result['commit'][:8]}" if result.get("commit") else ""
        lines += [
            f"### {path.stem}",
            "",
            f"`{result['command']}` on {result['machine']}, torch {result['versions']['torch']}, "
            f"{result['date']}{commit}",
            "",
        ]
        if "rows" in result:
            lines += [timing.format_table(result["rows"]), ""]
            lines += [*(f"- {line}" for line in bench.savings(result["rows"])), ""]
        if "host" in result:
            lines += [timing.format_table(result["host"]), ""]
        for method, parts in result.get("parts", {}).items():
            total = sum(parts.values())
            rows = [[name, f"{ms:.2f}", f"{ms / total:.1%}"] for name, ms in parts.items()]
            lines += [f"{method}, {total:.0f} ms a step:", "", *table(["part", "ms", "share"], rows)]
        if path.with_suffix(".png").exists():
            lines += [f"![source images per second]({folder.name}/{path.stem}.png)", ""]
    return lines if len(lines) > 2 else [*lines, "Not run.", ""]


def encoders_section(folder: Path) -> list[str]:
    """Short runs of every encoder with every method. The first line of a log holds its command, commit and versions."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        start, *log = map(json.loads, path.read_text().splitlines())
        cells = [*path.stem.split("-"), log[-1]["step"]]
        for name in ("loss", "eval_error"):
            values = [row[name] for row in log if name in row]
            cells.append(f"{values[0]:.3f} to {values[-1]:.3f}")
        rows.append([*cells, start["date"]])
    if not rows:
        return []
    return [
        "## Every encoder with every method: a check, not a result",
        "",
        "6,000 images of CIFAR-10, minutes each, one seed: does the loss fall? Losses of different methods cannot be "
        "compared. Command, commit and versions: the first line of `check/encoders/MODEL-METHOD.jsonl`.",
        "",
        *table(["encoder", "method", "steps", "loss", "held-out error", "date"], rows),
    ]


def nuclei_section(folder: Path) -> list[str]:
    """IoU of nuclei on the other microscope's image, by configuration and number of labelled slices, and the curves."""
    runs = {path.stem: recorded(path) for path in sorted((folder / "nuclei").glob("*.jsonl"))}
    if not runs:
        return []
    iou, rows = {}, []  # iou: by seed, by configuration and number of slices
    for variant in nuclei.VARIANTS:
        cells, minutes = [variant], []
        for size in nuclei.SIZES:
            names = {seed: nuclei.run_name(variant, size, seed) for seed in nuclei.SEEDS}
            done = {seed: runs[name] for seed, name in names.items() if name in runs}
            iou[variant, size] = {seed: last(run, "run", "eval_iou_1") for seed, run in done.items()}
            minutes += [last(run, "run", "time_training_seconds") / 60 for run in done.values()]
            cells.append(mean_and_std([iou[variant, size].get(seed) for seed in nuclei.SEEDS], 1))
        rows.append([*cells, f"{statistics.median(minutes):.1f}" if minutes else ""])
    comparisons = []
    for variant, other in nuclei.PAIRS:
        pairs = [paired_differences(iou[variant, size], iou[other, size]) for size in nuclei.SIZES]
        comparisons.append([f"{variant} minus {other}", *(mean_and_std(values, 1) for values in pairs)])
    speeds, speeds_text = read_speeds(folder / "speed-nuclei.json")
    configs = [run["run"][0] for run in runs.values()]
    epochs = [runs[f"pretrain-{method}-seed0"]["run"][0]["arguments"]["epochs"] for method in PRETRAIN]
    plots.save(nuclei_curves(iou), folder / "nuclei.png")
    return [
        "## Nuclei: segmentation in another microscope's image",
        "",
        "Trained on so many labelled slices of one stack, tested on one image of another microscope; IoU of nuclei in "
        "%, mean ± standard deviation of seeds; (n): of n seeds. Pre-training: all 60 slices without labels, "
        f"{' and '.join(f'{value:g}' for value in epochs)} epochs of 600 entries for {' and '.join(PRETRAIN)}, equal "
        f"times by the speeds {speeds_text} source images/s (`{speeds['command']}`). `{nuclei.SEGMENT}`, 105 steps. "
        f"{configs[0]['device']}, torch {configs[0]['versions']['torch']}, {date_range(configs)}, commit "
        f"{configs[0]['commit'][:8]}. Command of each run: the first line of `dense/nuclei/NAME.jsonl`.",
        "",
        *table(["labelled slices", *nuclei.SIZES, "minutes a run"], rows),
        "Differences, paired by seed:",
        "",
        *table(["labelled slices", *nuclei.SIZES], comparisons),
        "![IoU over labelled slices](dense/nuclei.png)",
        "",
    ]


def nuclei_curves(iou: dict[tuple[str, int], dict[int, float]]) -> Figure:
    """IoU over labelled slices. iou: by seed, by configuration and number of slices."""
    figure = Figure(figsize=(8, 4), dpi=100, facecolor="white")
    axes = figure.subplots()
    for k, variant in enumerate(nuclei.VARIANTS):
        points = [(size, list(iou[variant, size].values())) for size in nuclei.SIZES if iou[variant, size]]
        axes.errorbar(
            [size * 1.03**k for size, _ in points],  # moved, so that error bars do not hide each other
            [statistics.mean(values) for _, values in points],
            capsize=2,
            marker="o",
            markersize=3,
            yerr=[standard_deviation(values) for _, values in points],
            linestyle="--" if "frozen" in variant or "alone" in variant else "-",
            label=variant,
        )
    axes.set_xscale("log")
    axes.set_xticks(nuclei.SIZES, nuclei.SIZES)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    axes.set_xlabel("labelled slices")
    axes.set_ylabel("IoU of nuclei, %")
    figure.tight_layout()
    return figure


def trees_section(folder: Path) -> list[str]:
    """Average precision of tree crowns at other sites, by configuration."""
    rows, configs = [], []
    for variant in trees.VARIANTS:
        paths = [folder / "trees" / f"{variant}-seed{seed}.json" for seed in trees.SEEDS]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        cells = [mean_and_std([result[name] for result in results], 1) for name in ("ap50", "ap", "time_minutes")]
        rows.append([variant, *cells, len(results)])
        configs += [result["config"] for result in results]
    if not configs:
        return []
    config = configs[0]
    _, speeds_text = read_speeds(folder / "speed-trees.json")
    return [
        "## Trees: detection at other sites",
        "",
        "Trained on two photographs of one site with 853 boxes, tested on two of two other sites with 98; average "
        "precision in %, mean ± standard deviation of seeds. Pre-training: tiles of the training photographs and 500 "
        f"photographs, {trees.EPOCHS} epochs for eesmm, as much time for greenmim by the speeds {speeds_text} source "
        f"images/s. `experiments/detect.py {trees.DETECT}`. torch {config['versions']['torch']}, {config['date']}, "
        f"commit {config['commit'][:8]}. Commands: in `dense/trees/NAME`.",
        "",
        *table(["arm", "AP at 0.5", "AP, 0.5:0.95", "minutes of detection", "seeds"], rows),
        *(["![Boxes at other sites](dense/trees.jpg)", ""] if (folder / "trees.jpg").exists() else []),
    ]


def main(results: Path = ROOT / "results"):
    lines, summary, cifar = [INTRODUCTION], [], results / "cifar10"
    for scale in cifar10.SCALES:
        folder = cifar / scale
        rows = collect(cifar, scale) if folder.exists() else []
        if rows:
            lines += [*cifar_section(cifar, scale, rows), *sweep_section(folder / "sweep")]
            lines += not_kept_section(folder / "not-kept", rows) if (folder / "not-kept").exists() else []
            lines += decoder_section(folder / "published-decoder") if (folder / "published-decoder").exists() else []
        summary += rows
    (cifar / "summary.json").write_text(json.dumps({"rows": summary}, indent=1) + "\n")
    if not summary:
        lines += ["## CIFAR-10: does superposition pay?", "", "Not run.", ""]
    lines += nuclei_section(results / "dense") + trees_section(results / "dense")
    lines += bench_section(results / "bench") + encoders_section(results / "check" / "encoders")
    (results / "README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    run_main(main)
