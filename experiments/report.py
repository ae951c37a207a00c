"""results/README.md, its plots and results/cifar10/summary.json, from the logs and bench.json files in results/.

make results          the same logs give the same bytes
"""

import json
import statistics
from pathlib import Path

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
"""


def last(rows: list[dict], name: str):
    """The last value logged under a name."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def median(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(values) if values else None


def measured(folder: Path, scale: str, study: str, arm: str, seed: int) -> dict | None:
    """One arm's numbers, from the logs of its phases; None if it was not fine-tuned yet."""
    path = folder / scale / f"{cifar10.folder(study, arm, seed)}.jsonl"
    phases = recorded(path)
    for step in cifar10.steps(cifar10.arguments(["--scale", scale]), study, arm, seed):
        if step.phase in phases:
            check_settings(step, phases[step.phase][0])
    logs = {name: rows for name, (_, rows) in phases.items()}
    if "finetune" not in logs:
        return None
    config, before = phases["finetune"][0], phases["pretrain"][0]["arguments"]["epochs"] if "pretrain" in logs else 0
    return {
        "scale": scale,
        "study": study,
        "arm": arm,
        "seed": seed,
        "top1": last(logs["finetune"], "eval_top1"),
        "linear": last(logs.get("linear", []), "eval_top1"),
        "knn": last(logs.get("knn", []), "eval_top1"),
        "eval_error": last(logs.get("pretrain", []), "eval_error"),
        "pretrain_epochs": before,
        "finetune_epochs": config["arguments"]["epochs"],
        "logged_seconds": sum(
            last(logs.get(name, []), "time_training_seconds") or 0 for name in ("pretrain", "finetune")
        ),
        "logged_images_per_second": median(logs.get("pretrain", []), "time_images_per_second"),
        **{name: config[name] for name in ("commit", "date", "device", "versions")},
        "log": str(path.relative_to(folder)),
    }


def collect(folder: Path, scale: str) -> list[dict]:
    """All finished arms in the order of the studies, an arm that stands in several tables once for each."""
    rows = [
        measured(folder, scale, name, arm, seed)
        for name, study in cifar10.STUDIES.items()
        for arm in study.variants
        for seed in study.other_seeds.get(arm, study.seeds)
    ]
    return [row for row in rows if row]


def work(scale: str, arm: str) -> float:
    """Multiply-accumulates of pre-training's forward pass per source image, in units of 10^6."""
    args = cifar10.pretraining(scale, arm)
    return 1000 * train.gmacs(from_settings(vars(args)), args.image_size, "cpu") / args.sources


def minutes(scale: str, arm: str, before: float, after: float) -> float:
    """Pre-training and fine-tuning at the speeds measured side by side."""
    pretraining = (
        before * cifar10.IMAGES / cifar10.speed(scale, cifar10.method(arm), cifar10.model(scale, arm)) if before else 0
    )
    return (
        pretraining
        + after
        * cifar10.SCALES[scale]["labels"]
        * cifar10.IMAGES
        / cifar10.speed(scale, "dense", cifar10.model(scale, arm))
    ) / 60


def spread(values: list, digits: int = 2) -> str:
    """Mean and standard deviation over seeds; their number where some have no value."""
    found = [value for value in values if value is not None]
    if not found:
        return ""
    mean = f"{statistics.mean(found):.{digits}f}"
    return (
        mean
        + (f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else "")
        + (f" ({len(found)})" if len(found) < len(values) else "")
    )


def study_table(scale: str, groups: list[tuple[str, list[dict]]]) -> list[str]:
    lines = [
        "| arm | pre-training epochs | fine-tuning epochs | top-1 | linear probe | k-NN | held-out error | M multiply-adds | source images/s | minutes | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, rows in groups:
        if not rows:
            lines.append(f"| {arm} | not run | | | | | | | | | |")
            continue
        before, after = rows[0]["pretrain_epochs"], rows[0]["finetune_epochs"]
        timed = (
            arm in cifar10.MAIN | cifar10.PRETRAIN_SHARE | cifar10.RATES | cifar10.BASELINES | cifar10.FAMILY
        )  # the others' speeds were not measured side by side
        cells = (
            arm,
            f"{before:g}",
            f"{after:g}",
            *(spread([row[name] for row in rows]) for name in ("top1", "linear", "knn")),
            spread([row["eval_error"] for row in rows], 3),
            f"{work(scale, arm):.1f}" if before else "",
            f"{cifar10.speed(scale, cifar10.method(arm), cifar10.model(scale, arm)):.0f}" if before and timed else "",
            f"{minutes(scale, arm, before, after):.1f}" if timed else "",
            len(rows),
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def differences(groups: list[tuple[str, list[dict]]]) -> list[str]:
    """Top-1 of each arm that superposes minus that of each that does not, paired by seed, with intervals."""
    top1 = {arm: {row["seed"]: row["top1"] for row in rows} for arm, rows in groups if rows}
    ours, others = ([arm for arm in top1 if arm.startswith("eesmm") == ours] for ours in (True, False))
    if not ours or not others:
        return []
    lines = [
        "Difference of top-1, paired by seed; in brackets the 95 % interval of Student's t and the number of seeds:",
        "",
        "| | " + " | ".join(f"minus {arm}" for arm in others) + " |",
        "|---" * (1 + len(others)) + "|",
    ]
    for arm in ours:
        pairs = [[top1[arm][seed] - top1[other][seed] for seed in top1[arm] if seed in top1[other]] for other in others]
        lines.append(
            f"| {arm} | "
            + " | ".join(
                f"{spread(pair)} ({' to '.join(interval(pair)[0])}{', ' * (len(pair) > 1)}{len(pair)})" if pair else ""
                for pair in pairs
            )
            + " |"
        )
    return [*lines, ""]


def interval(differences: list[float]) -> tuple[list[str], str]:
    """The ends of the 95 % interval of a mean, and p that it is 0, by Student's t; empty for one value."""
    if len(differences) < 2:
        return [], ""
    test = stats.ttest_1samp(differences, 0)
    return [
        f"{end:.2f}" for end in test.confidence_interval()
    ], f"{test.pvalue:.3f}" if test.pvalue >= 0.001 else f"{test.pvalue:.1g}"


def bars(groups: list[tuple[str, list[dict]]], title: str):
    """Mean top-1 of each arm, every seed as a point."""
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(groups)), dpi=100, facecolor="white")
    axes = figure.subplots()
    axes.barh(
        [arm for arm, _ in groups],
        [statistics.mean(row["top1"] for row in rows) for _, rows in groups],
        color=["tab:blue" if arm.startswith("eesmm") else "tab:gray" for arm, _ in groups],
        alpha=0.6,
    )
    for place, (_, rows) in enumerate(groups):
        axes.plot([row["top1"] for row in rows], [place] * len(rows), "k.", markersize=5)
    tops = [row["top1"] for _, rows in groups for row in rows]
    axes.set_xlim(min(tops) - 3, max(tops) + 1)
    axes.invert_yaxis(), axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("top-1 after fine-tuning, per cent (points: seeds; the axis does not begin at 0)", fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def sources_and_ratio(scale: str, arm: str) -> tuple[int, float]:
    args = cifar10.pretraining(scale, arm)
    return args.sources, args.mask_ratio


def frontier_lines(folder: Path, scale: str, groups: list[tuple[str, list[dict]]]) -> list[str]:
    """Pairs of arms that encode as many units of a source image, by seed: blends minus one image, one image judged on all units minus one on hidden; and the figure."""
    done = [
        (arm, *sources_and_ratio(scale, arm), {row["seed"]: row["top1"] for row in rows})
        for arm, rows in groups
        if rows
    ]
    probes = {arm: {row["seed"]: row["linear"] for row in rows} for arm, rows in groups}
    lines = [
        "Minus one image of which as many units are encoded, paired by seed; intervals and p are those of Student's t, not corrected for the number of comparisons:",
        "",
        "| units a source image | arm | top-1 | minus | difference | 95 % interval | p | seeds | linear probe: difference | 95 % interval | p |",
        "|---" * 11 + "|",
    ]
    for arm, sources, ratio, top1 in done:
        for alone, _, _, other in (
            one
            for one in done
            if one[1] == 1
            and abs((1 - one[2]) * sources - (1 - ratio)) < 1e-6
            and (sources > 1 or "all" in arm and "all" not in one[0])
        ):
            cells = [f"{16 * (1 - ratio) / sources:g}", arm, spread(list(top1.values())), alone]
            for ours, theirs in ((top1, other), (probes[arm], probes[alone])):
                differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                ends, p = interval(differences)
                cells += [spread(differences), " to ".join(ends), p, *([str(len(differences))] if ours is top1 else [])]
            lines.append("| " + " | ".join(cells) + " |")
    speeds = json.loads((folder / f"speed-{scale}-frontier.json").read_text())
    plots.save(
        curves(scale, done, {row["arm"]: row["source_images_per_second"] for row in speeds["rows"]}),
        folder / f"{scale}-frontier-curves.png",
    )
    return [
        *lines,
        "",
        f"![top-1 over work and over time]({folder.name}/{scale}-frontier-curves.png)",
        "",
        f"Minutes by `{speeds['command']}` on {speeds['machine']}, {speeds['date']}. Bars: the standard deviation over seeds.",
        "",
    ]


CURVES = {
    "greenmim": ("tab:gray", "one image, error of hidden units"),
    "greenmim all": ("tab:orange", "one image, error of all units"),
    "eesmm split all": ("tab:blue", "blends, error of all units"),
}  # by the first words of an arm's name


def curves(scale: str, done, speeds: dict[str, float]):
    """Top-1 over the work and over the time of pre-training. done: (arm, sources, ratio, {seed: top-1}); speeds: source images/s of each arm."""
    figure = Figure(figsize=(10, 4), dpi=100, facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    images = cifar10.SCALES[scale]["epochs"] * cifar10.IMAGES
    for axes, place, told in (
        (panels[0], lambda arm: work(scale, arm), "million multiply-adds of a source image, forward"),
        (panels[1], lambda arm: images / speeds[arm] / 60, "minutes of pre-training, measured side by side"),
    ):
        for name, (colour, label) in CURVES.items():
            points = sorted(
                (place(arm), list(top1.values()), f"({sources}, {ratio:g})")
                for arm, sources, ratio, top1 in done
                if arm.partition(",")[0] == name
            )
            axes.errorbar(
                [x for x, _, _ in points],
                [statistics.mean(y) for _, y, _ in points],
                [statistics.stdev(y) if len(y) > 1 else 0 for _, y, _ in points],
                color=colour,
                marker="o",
                markersize=4,
                capsize=3,
                label=label,
            )
            for x, y, text in points:
                where = (
                    dict(xytext=(0, 4), rotation=90, ha="center", va="bottom")
                    if name.startswith("eesmm")
                    else dict(xytext=(3, -10))
                )
                top = statistics.stdev(y) if name.startswith("eesmm") and len(y) > 1 else 0
                axes.annotate(
                    text, (x, statistics.mean(y) + top), textcoords="offset points", fontsize=7, color=colour, **where
                )
        axes.set_xlabel(told, fontsize=8), axes.grid(alpha=0.3), axes.margins(y=0.25)
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
"""


NOT_KEPT = {  # file: study, arm and seed of the run without the change, and what it was
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
    """The study's tables at one scale, as far as they have been run, and their plots."""
    values, (first, *_, final) = cifar10.SCALES[scale], sorted(row["date"] for row in rows + rows)
    commits = {config["commit"] for path in (folder / scale).rglob("*.jsonl") for config, _ in recorded(path).values()}
    dates = first if first == final else f"{first} to {final}"
    lines = [
        f"## CIFAR-10: does superposition pay? Scale {scale}",
        "",
        f"CIFAR-10 as JPEG (the public folder CIFAR-10-images, quality 75; `--download` gives other pixels; 50,000 training, 10,000 test images, all tested), {values['model']}, {', '.join(sorted({row['device'] for row in rows}))}, "
        f"torch {', '.join(sorted({row['versions']['torch'] for row in rows}))}, {dates}. Pre-training: `{values['pretrain']}`, warm-up over "
        f"{values['warmup']:.1%} of the epochs. Fine-tuning on {values['labels']:.0%} of the labels: `{values['finetune']}`; base learning rate "
        f"{values['lr']:g}, from scratch {values['scratch_lr']:g} without layer decay. Command, seed, commit, versions and device of each run: "
        f"the line before its log in `cifar10/{scale}/ARM/seedN.jsonl`; {len(commits)} commits.",
        "",
        MEANINGS.format(images=values["pretrain"].split("--eval-images ")[1]),
        "The speeds:",
        "",
    ]
    for path in sorted(folder.glob(f"speed-{scale}-*.json")):
        found = json.loads(path.read_text())
        speeds = ", ".join(
            f"{row.get('arm', row['method'])} {row['source_images_per_second']:.0f}"
            for row in found["rows"]
            if row.get("mode") != "inference"
        )
        lines.append(f"- `{found['command']}`: {speeds} source images/s on {found['machine']}")
    lines.append("")
    for name, study in cifar10.STUDIES.items():
        groups = [(arm, [row for row in rows if row["study"] == name and row["arm"] == arm]) for arm in study.variants]
        lines += [f"### {name.capitalize()}", "", study.text, ""]
        done = [group for group in groups if group[1]]
        if not done:
            lines += ["Not run.", ""]
            continue
        picture = f"{scale}-{slug(name)}.png"
        plots.save(bars(done, f"CIFAR-10, {name}"), folder / picture)
        lines += [
            *study_table(scale, groups),
            "",
            *(frontier_lines(folder, scale, groups) if name == "frontier" else differences(groups)),
            f"![top-1 of each arm]({folder.name}/{picture})",
            "",
        ]
    return lines


def sweep_section(folder: Path) -> list[str]:
    """The learning rates tried beforehand."""
    rates = []
    for path in sorted(folder.glob("*.jsonl")):
        for config, rows in (phase for name, phase in recorded(path).items() if name == "finetune"):
            arguments = config["arguments"]
            rates.append(
                (
                    arguments["init"] or "pre-trained",
                    arguments["layer_decay"],
                    arguments["base_lr"],
                    last(rows, "eval_top1"),
                )
            )
    if not rates:
        return []
    start = recorded(folder / "pretrain.jsonl")["pretrain"][0]["command"]
    return [
        "### Learning rates tried beforehand",
        "",
        "Fine-tuning rates, one seed, judged on the test images and used for all arms; that from scratch "
        f"only at the length of equal epochs. The pre-trained network of these runs: `{start}`",
        "",
        "| start | layer decay | base learning rate | top-1 |",
        "|---|---|---|---|",
        *(f"| {start} | {decay:g} | {lr:g} | {top1:.2f} |" for start, decay, lr, top1 in sorted(rates)),
        "",
    ]


def not_kept_section(folder: Path, rows: list[dict]) -> list[str]:
    """Changes that did not pay and did not enter the program: one seed each, beside the same run without the change."""
    lines = [
        "### Tried and not kept",
        "",
        "One seed each, beside the same run without the change. The program has no flag for them: each patch, and "
        "the commit it was made to, are in `cifar10/" + folder.parent.name + "/not-kept`.",
        "",
        "| change | top-1 | without | linear probe | without | k-NN | without |",
        "|---|---|---|---|---|---|---|",
    ]
    references = {(row["study"], row["arm"], row["seed"]): row for row in rows}
    for name, (study, arm, seed, change) in NOT_KEPT.items():
        without, phases = references.get((study, arm, seed), {}), recorded(folder / f"{name}.jsonl")
        cells = [
            spread([value])
            for phase, field in (("finetune", "top1"), ("linear", "linear"), ("knn", "knn"))
            for value in (last(phases[phase][1], "eval_top1"), without.get(field))
        ]
        lines.append(f"| {change}; {study}, {arm}, seed {seed} | {' | '.join(cells)} |")
    return [*lines, ""]


def decoder_section(folder: Path) -> list[str]:
    """What the places of GreenMIM's published decoder cost: the same runs with and without decoder.patch."""
    found = {}
    for name in ("right", "shuffled"):
        found[name] = [recorded(path) for path in sorted((folder / name).glob("*.jsonl"))]
    config = found["right"][0]["pretrain"][0]
    lines = [
        "### GreenMIM's published decoder",
        "",
        "`--method greenmim` with each visible patch at its own place in the decoder, and with the places of the published "
        "code ([paper](../docs/paper.md#greenmims-published-decoder)), by a patch of one line for which the program has no flag. Four epochs of pre-training and five of "
        f"fine-tuning, as in the table of equal epochs; {len(found['right'])} seeds, the same masks, crops and first weights in each pair. "
        f"{config['device']}, torch {config['versions']['torch']}, {config['date']}, commit {config['commit'][:8]}; patch and logs: `cifar10/{folder.parent.name}/{folder.name}`.",
        "",
        "| places of visible patches | top-1 | linear probe | k-NN |",
        "|---|---|---|---|",
    ]
    scores = {
        name: {phase: [last(run[phase][1], "eval_top1") for run in runs] for phase in ("finetune", "linear", "knn")}
        for name, runs in found.items()
    }
    for name, called in (("right", "their own"), ("shuffled", "as published")):
        lines.append(f"| {called} | " + " | ".join(spread(values) for values in scores[name].values()) + " |")
    cells = []
    for phase in scores["right"]:
        pairs = [b - a for a, b in zip(scores["right"][phase], scores["shuffled"][phase], strict=True)]
        cells.append(f"{spread(pairs)} ({' to '.join(interval(pairs)[0])})")
    return [*lines, f"| difference, paired by seed (95 % interval) | {' | '.join(cells)} |", ""]


def bench_section(folder: Path) -> list[str]:
    """Every bench.json, as a table, with its command."""
    lines = ["## Speed", ""]
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        lines += [
            f"### {path.stem}",
            "",
            f"`{found['command']}` on {found['machine']}, torch {found['versions']['torch']}, {found['date']}"
            + (f", commit {found['commit'][:8]}" if found.get("commit") else ""),
            "",
        ]
        if "rows" in found:
            lines += [timing.format_table(found["rows"]), ""]
            lines += [*(f"- {line}" for line in bench.savings(found["rows"])), ""]
        lines += [timing.format_table(found["host"]), ""] if "host" in found else []
        for method, parts in found.get("parts", {}).items():
            total = sum(parts.values())
            lines += [
                f"{method}, {total:.0f} ms a step:",
                "",
                "| part | ms | share |",
                "|---|---|---|",
                *(f"| {name} | {ms:.2f} | {ms / total:.1%} |" for name, ms in parts.items()),
                "",
            ]
        if path.with_suffix(".png").exists():
            lines += [f"![source images per second]({folder.name}/{path.stem}.png)", ""]
    return lines if len(lines) > 2 else [*lines, "Not run.", ""]


def encoders_section(folder: Path) -> list[str]:
    """Short runs of every encoder with every method: the first line of a log says what it was, the others are the run's."""
    lines = [
        "## Every encoder with every method: a check, not a result",
        "",
        "6,000 images of CIFAR-10, minutes each, one seed: does the loss fall? Losses of "
        "different methods cannot be compared. Command, commit and versions: the first line of `check/encoders/MODEL-METHOD.jsonl`.",
        "",
        "| encoder | method | steps | loss | held-out error | date |",
        "|---|---|---|---|---|---|",
    ]
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        start, *rows = map(json.loads, path.read_text().splitlines())
        ends = [[row[name] for row in rows if name in row] for name in ("loss", "eval_error")]
        lines.append(
            f"| {' | '.join(path.stem.split('-'))} | {rows[-1]['step']} | "
            + " | ".join(f"{values[0]:.3f} to {values[-1]:.3f}" for values in ends)
            + f" | {start['date']} |"
        )
    return [*lines, ""] if paths else []


def nuclei_section(folder: Path) -> list[str]:
    """IoU of nuclei on the other microscope's image, by arm and number of labelled slices, and the curve."""
    logs = {path.stem: recorded(path)["run"] for path in sorted((folder / "nuclei").glob("*.jsonl"))}
    if not logs:
        return []
    found = {
        (arm, size): [
            last(logs[name][1], "eval_iou_1")
            for seed in nuclei.SEEDS
            if (name := nuclei.run_name(arm, size, seed)) in logs
        ]
        for arm in nuclei.VARIANTS
        for size in nuclei.SIZES
    }
    speeds = json.loads((folder / "speed-nuclei.json").read_text())
    told = ", ".join(f"{row['method']} {row['source_images_per_second']:.0f}" for row in speeds["rows"])
    configs = [config for config, _ in logs.values()]
    dates, pre = (
        sorted(config["date"] for config in configs),
        [
            logs[name][0]["arguments"]["epochs"]
            for name in (f"pretrain-{method}-seed0" for method in PRETRAIN)
            if name in logs
        ],
    )
    lines = [
        "## Nuclei: segmentation in another microscope's image",
        "",
        "Trained on so many labelled slices of one stack, tested on one image of another microscope; IoU of nuclei in %, mean ± standard deviation of seeds; (n): of n "
        f"seeds. Pre-training: all 60 slices without labels, {' and '.join(f'{epochs:g}' for epochs in pre)} epochs of 600 entries for {' and '.join(PRETRAIN)}, equal "
        f"times by the speeds {told} source images/s (`{speeds['command']}`). "
        f"`{nuclei.SEGMENT}`, 105 steps. {configs[0]['device']}, torch {configs[0]['versions']['torch']}, {dates[0]}"
        + (f" to {dates[-1]}" if dates[-1] != dates[0] else "")
        + f", commit {configs[0]['commit'][:8]}. Command of each run: the first line of `dense/nuclei/NAME.jsonl`.",
        "",
        "| labelled slices | " + " | ".join(map(str, nuclei.SIZES)) + " | minutes a run |",
        "|---" * (len(nuclei.SIZES) + 2) + "|",
    ]
    for arm in nuclei.VARIANTS:
        times = [
            last(logs[name][1], "time_training_seconds") / 60
            for name in logs
            if name.startswith(tuple(f"{slug(arm)}-{size}-" for size in nuclei.SIZES))
        ]
        cells = [
            spread(found[arm, size], 1)
            + f" ({len(found[arm, size])})" * (0 < len(found[arm, size]) < len(nuclei.SEEDS))
            for size in nuclei.SIZES
        ]
        lines.append(
            f"| {arm} | " + " | ".join(cells) + f" | {statistics.median(times):.1f} |"
            if times
            else f"| {arm} |" + " |" * (len(nuclei.SIZES) + 1)
        )
    pairs = {
        (a, b, size): [x - y for x, y in zip(found[a, size], found[b, size])]
        for a, b in nuclei.PAIRS
        for size in nuclei.SIZES
        if len(found[a, size]) == len(found[b, size]) > 1
    }
    lines += [
        "",
        "Differences, paired by seed:",
        "",
        "| labelled slices | " + " | ".join(map(str, nuclei.SIZES)) + " |",
        "|---" * (len(nuclei.SIZES) + 1) + "|",
    ]
    lines += [
        f"| {a} minus {b} | " + " | ".join(spread(pairs.get((a, b, size), []), 1) for size in nuclei.SIZES) + " |"
        for a, b in nuclei.PAIRS
    ]
    figure = Figure(figsize=(8, 4), dpi=100, facecolor="white")
    axes = figure.subplots()
    for k, arm in enumerate(nuclei.VARIANTS):
        points = [(size, found[arm, size]) for size in nuclei.SIZES if found[arm, size]]
        axes.errorbar(
            [size * 1.03**k for size, _ in points],
            [statistics.mean(values) for _, values in points],
            capsize=2,
            marker="o",
            markersize=3,
            yerr=[statistics.stdev(values) if len(values) > 1 else 0 for _, values in points],
            linestyle="--" if "frozen" in arm or "alone" in arm else "-",
            label=arm,
        )
    (
        axes.set_xscale("log"),
        axes.set_xticks(nuclei.SIZES, nuclei.SIZES),
        axes.minorticks_off(),
        axes.grid(alpha=0.3),
        axes.legend(fontsize=7),
    )
    axes.set_xlabel("labelled slices"), axes.set_ylabel("IoU of nuclei, %")
    figure.tight_layout()
    plots.save(figure, folder / "nuclei.png")
    return [*lines, "", "![IoU over labelled slices](dense/nuclei.png)", ""]


def trees_section(folder: Path) -> list[str]:
    """Average precision of tree crowns at other sites, by arm."""
    found = {
        arm: [
            json.loads(path.read_text())
            for seed in trees.SEEDS
            if (path := folder / "trees" / f"{arm}-seed{seed}.json").exists()
        ]
        for arm in trees.VARIANTS
    }
    if not any(found.values()):
        return []
    config, speeds = (
        next(result["config"] for results in found.values() for result in results),
        json.loads((folder / "speed-trees.json").read_text()),
    )
    told = ", ".join(f"{row['method']} {row['source_images_per_second']:.0f}" for row in speeds["rows"])
    lines = [
        "## Trees: detection at other sites",
        "",
        "Trained on two photographs of one site with 853 boxes, tested on two of two other sites with 98; average precision in %, mean ± standard deviation of seeds. "
        f"Pre-training: tiles of the training photographs and 500 photographs, {trees.EPOCHS} epochs for eesmm, as much time for greenmim by the speeds {told} source "
        f"images/s. `experiments/detect.py {trees.DETECT}`. torch {config['versions']['torch']}, {config['date']}, commit {config['commit'][:8]}. Commands: in "
        "`dense/trees/NAME`.",
        "",
        "| arm | AP at 0.5 | AP, 0.5:0.95 | minutes of detection | seeds |",
        "|---|---|---|---|---|",
    ]
    for arm, results in found.items():
        cells = (
            [spread([result[name] for result in results], 1) for name in ("ap50", "ap", "time_minutes")]
            if results
            else ["", "", ""]
        )
        lines.append(f"| {arm} | {' | '.join(cells)} | {len(results)} |")
    return (
        [*lines, "", "![Boxes at other sites](dense/trees.jpg)", ""]
        if (folder / "trees.jpg").exists()
        else [*lines, ""]
    )


def main(results: Path = ROOT / "results"):
    lines, everything = [INTRODUCTION], []
    for scale in cifar10.SCALES:
        rows = collect(results / "cifar10", scale) if (results / "cifar10" / scale).exists() else []
        if rows:
            folder = results / "cifar10" / scale
            lines += [*cifar_section(results / "cifar10", scale, rows), *sweep_section(folder / "sweep")]
            lines += not_kept_section(folder / "not-kept", rows) if (folder / "not-kept").exists() else []
            lines += decoder_section(folder / "published-decoder") if (folder / "published-decoder").exists() else []
        everything += rows
    (results / "cifar10" / "summary.json").write_text(json.dumps({"rows": everything}, indent=1) + "\n")
    if not everything:
        lines += ["## CIFAR-10: does superposition pay?", "", "Not run.", ""]
    lines += nuclei_section(results / "dense") + trees_section(results / "dense")
    lines += bench_section(results / "bench") + encoders_section(results / "check" / "encoders")
    (results / "README.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    run_main(main)
