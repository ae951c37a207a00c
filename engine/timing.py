"""Timing: cases that take turns step by step, what a machine is, rows as a table and the ratios they are read for."""

import os
import platform
import re
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torchvision

from engine import data
from images.cache import open_cached
from images.formats import MEAN, STD

IMAGENET = 1_281_167  # training images


@dataclass
class Case:
    """Something to time. step() does one step; row holds what is known of it; seconds: of each step timed."""

    row: dict
    step: callable
    flops: float = 0.0  # of a step, counted
    repeat: int = 1  # steps between two looks at the clock, so that short ones are timed well
    seconds: list = field(default_factory=list)


def synchronize(device):
    """Wait until the device has finished all work that was submitted."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleave(cases: list[Case], device, rounds: int):
    """Warm up twice, then time every case once in each round."""
    for case in cases:
        case.step()
        synchronize(device)
        began = time.perf_counter()
        case.step()
        synchronize(device)
        case.repeat = max(1, min(100, round(0.2 / (time.perf_counter() - began))))
    for number in range(rounds):
        for case in cases:
            began = time.perf_counter()
            for _ in range(case.repeat):
                case.step()
            synchronize(device)
            case.seconds.append((time.perf_counter() - began) / case.repeat)
        print(f"round {number + 1} of {rounds}", end="\r" if number + 1 < rounds else "\n", file=sys.stderr, flush=True)


def matmul_case(distributed) -> Case:
    """One large matrix product in the precision of the run, whose rate other cases are compared with."""
    n = 8192 if distributed.device.type == "cuda" else 2048
    a, b = (
        torch.randn(n, n, device=distributed.device, dtype=distributed.amp_dtype or torch.float32) for _ in range(2)
    )
    return Case({"method": "matmul"}, lambda: a @ b, 2.0 * n**3)


def finished_rows(cases: list[Case]) -> list[dict]:
    """Rows of bench.json; the first case is the matrix product that shares refer to."""
    rate, rows = cases[0].flops / float(np.median(cases[0].seconds)), []
    for case in cases[1:]:
        low, median, high = np.percentile(case.seconds, [25, 50, 75])
        speed = case.row["source_images_per_step"] / median
        rows.append(
            case.row
            | {
                "source_images_per_second": speed,
                "composites_per_second": speed / case.row["sources"],
                "ms_per_step": 1e3 * median,
                "ms_per_step_quartiles": [1e3 * low, 1e3 * high],
                "steps": len(case.seconds) * case.repeat,
                "share_of_matmul_rate": case.flops / median / rate,
                "hours_per_imagenet_epoch": IMAGENET / speed / 3600,
            }
        )
    return rows


def loader_rows(images, cache: str | None, size: int, rounds: int) -> list[dict]:
    """Images/s of one core: decode, crop, flip; torchvision's plain pipeline also converts and normalises, which ours
    leaves to the device. Blocks of 32 images take turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(
                size, (0.2, 1.0), interpolation=torchvision.transforms.InterpolationMode.BICUBIC
            ),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(MEAN, STD),
        ]
    )
    plain = torchvision.datasets.ImageFolder(images.root, transform)
    pipelines = {"ImageFolder, PIL, float": lambda block: torch.stack([plain[k % len(plain)][0] for k in block])}
    sources = {"ours": images} | ({"ours, cached": open_cached(images, Path(cache), size)} if cache else {})
    for name, source in sources.items():
        crops = data.Crops(source, size)
        pipelines[name] = lambda block, crops=crops: crops.__getitems__([(k, k % len(crops.images)) for k in block])
    rows = [Case({"pipeline": name, "image_size": size}, None) for name in pipelines]
    for number in range(rounds + 1):
        block = range(32 * number, 32 * number + 32)
        for case, pipeline in zip(rows, pipelines.values()):
            began = time.perf_counter()
            pipeline(block)
            case.seconds.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    for case in rows:
        case.row["images_per_second_per_core"] = 32 / float(np.median(case.seconds[1:]))
        case.row["over_plain"] = case.row["images_per_second_per_core"] / rows[0].row["images_per_second_per_core"]
    return [case.row for case in rows]


def memory_in_use(device, peak: bool) -> int:
    """Bytes in use by this process, now or at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak would include that of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)" if peak else r"VmRSS:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_machine(device) -> str:
    """Device, cores and threads, in words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        name = next(
            (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), name
        )
    cpu = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {cpu}" if device.type == "cuda" else cpu


COLUMNS = (
    ("pipeline", "{}"),
    ("method", "{}"),
    ("mode", "{}"),
    ("model", "{}"),
    ("image_size", "{}"),
    ("precision", "{}"),
    ("compiled", "{}"),
    ("source_images_per_step", "{}"),
    ("source_images_per_second", "{:.1f}"),
    ("composites_per_second", "{:.1f}"),
    ("ms_per_step", "{:.1f}"),
    ("ms_per_step_quartiles", "{0[0]:.0f}-{0[1]:.0f}"),
    ("peak_memory_bytes", "{:.2e}"),
    ("gmacs_per_source_image", "{:.3f}"),
    ("share_of_matmul_rate", "{:.0%}"),
    ("hours_per_imagenet_epoch", "{:.2f}"),
    ("images_per_second_per_core", "{:.0f}"),
    ("over_plain", "{:.2f}"),
    ("launches_forward", "{}"),
    ("launches_backward", "{}"),
    ("launches_update", "{}"),
    ("casts", "{}"),
    ("copies", "{}"),
    ("parameter_groups", "{}"),
    ("graphs", "{}"),
    ("graph_breaks", "{}"),
    *((f"ms_{name}", "{:.2f}") for name in ("plan", "wait_for_plan", "update", "exchange")),
)


def format_table(rows: list[dict]) -> str:
    """The rows as a Markdown table, without the columns that none of them fills."""
    columns = [(name, form) for name, form in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(name.replace("_", " ") for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(
            "| " + " | ".join("" if row.get(name) is None else form.format(row[name]) for name, form in columns) + " |"
        )
    return "\n".join(lines)


def ratios(rows: list[dict], speed_pairs, memory_pair) -> list[str]:
    """A line for each speed pair (method, the one it is held against, what their ratio shows), and for the memory of one pair."""
    lines, settings = [], ("model", "image_size", "precision", "source_images_per_step", "mode")
    for setting in dict.fromkeys(tuple(row.get(k) for k in settings) for row in rows if "method" in row):
        same = [row for row in rows if setting == tuple(row.get(k) for k in settings)]
        speed = {row["method"] + " compiled" * row["compiled"]: row["source_images_per_second"] for row in same}
        memory = {row["method"] + " compiled" * row["compiled"]: row.get("peak_memory_bytes") for row in same}
        where = f"{setting[2]}, {setting[3]} images a step" + (f", {setting[4]}" if setting[4] else "")
        lines += [
            f"{what} ({where}): {over} / {under} = {speed[over]:.1f} / {speed[under]:.1f} = {speed[over] / speed[under]:.2f} x"
            for over, under, what in speed_pairs
            if over in speed and under in speed
        ]
        ours, theirs = (memory.get(method) for method in memory_pair)
        if ours and theirs:
            lines.append(
                f"peak memory ({where}): {' / '.join(memory_pair)} = {ours / 1e9:.2f} GB / {theirs / 1e9:.2f} GB = {ours / theirs:.0%}"
            )
    return lines
