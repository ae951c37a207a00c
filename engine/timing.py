"""Measure speed and memory for bench.py, and print the results as a table and as ratios of speeds.

Cases that are compared take turns, so that a machine that becomes slower or faster affects all of them alike.
"""

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
from torchvision import datasets, transforms

from engine import data
from images.cache import open_cached
from images.formats import MEAN, STD

IMAGENET = 1_281_167  # number of training images of ImageNet-1k


@dataclass
class Case:
    """Something to time.

    Attributes:
        row: what is known of the case: its fields in bench.json.
        step: a function without arguments that does one step.
        flops: floating-point operations of a step.
        repeat: number of steps between two readings of the clock, so that short steps are timed precisely.
        seconds: measured durations of a step.
    """

    row: dict
    step: callable
    flops: float = 0.0
    repeat: int = 1
    seconds: list = field(default_factory=list)


def synchronize(device):
    """Wait until the device has finished all work that was submitted."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_step(case: Case, device) -> float:
    """Seconds of one step: the mean over `case.repeat` steps."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(case.repeat):
        case.step()
    synchronize(device)
    return (time.perf_counter() - start) / case.repeat


def interleave(cases: list[Case], device, rounds: int):
    """Warm up each case with two steps, then time every case once in each round."""
    for case in cases:
        case.step()
        seconds = measure_step(case, device)
        case.repeat = max(1, min(100, round(0.2 / seconds)))  # about 0.2 seconds
    for number in range(1, rounds + 1):
        for case in cases:
            case.seconds.append(measure_step(case, device))
        print(f"round {number} of {rounds}", end="\r" if number < rounds else "\n", file=sys.stderr, flush=True)


def matmul_case(distributed) -> Case:
    """One large matrix product in the precision of the run. The rates of other cases are compared with its rate."""
    n = 8192 if distributed.device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=distributed.device, dtype=distributed.amp_dtype or torch.float32)
    return Case({"method": "matmul"}, lambda: a @ b, 2.0 * n**3)


def finished_rows(cases: list[Case]) -> list[dict]:
    """Rows of bench.json, one for each timed case but the first, which is the matrix product."""
    matmul_rate = cases[0].flops / float(np.median(cases[0].seconds))
    rows = []
    for case in cases[1:]:
        low, median, high = np.percentile(case.seconds, [25, 50, 75])
        speed = case.row["source_images_per_step"] / median
        timings = {
            "source_images_per_second": speed,
            "composites_per_second": speed / case.row["sources"],
            "ms_per_step": 1e3 * median,
            "ms_per_step_quartiles": [1e3 * low, 1e3 * high],
            "steps": len(case.seconds) * case.repeat,
            "share_of_matmul_rate": case.flops / median / matmul_rate,
            "hours_per_imagenet_epoch": IMAGENET / speed / 3600,
        }
        rows.append(case.row | timings)
    return rows


def loader_rows(images, cache: str | None, size: int, rounds: int) -> list[dict]:
    """Time how fast one core makes training crops: decode, crop and flip.

    The reference is torchvision's usual pipeline. It also converts and normalizes images, which our pipeline leaves to
    the device. Pipelines take turns with blocks of 32 images. The first block warms up and is not counted.

    Args:
        images: a folder of classes; its `root` is read by torchvision.
        cache: the path of a cache of these images to time too, or None.
        size: side of the crops.
        rounds: number of timed blocks.

    Returns:
        Rows of bench.json, the reference first. "over_plain" is the speed divided by that of the reference.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    reference = datasets.ImageFolder(images.root, transform)
    pipelines = {
        "ImageFolder, PIL, float": lambda block: torch.stack([reference[k % len(reference)][0] for k in block])
    }
    sources = {"ours": images}
    if cache:
        sources["ours, cached"] = open_cached(images, Path(cache), size)
    for name, source in sources.items():
        crops = data.Crops(source, size)
        pipelines[name] = lambda block, crops=crops: crops.__getitems__([(k, k % len(crops.images)) for k in block])

    seconds = {name: [] for name in pipelines}
    for number in range(rounds + 1):
        block = range(32 * number, 32 * number + 32)
        for name, pipeline in pipelines.items():
            start = time.perf_counter()
            pipeline(block)
            seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)

    speeds = {name: 32 / float(np.median(times[1:])) for name, times in seconds.items()}
    rows = []
    for name, speed in speeds.items():
        over_plain = speed / speeds["ImageFolder, PIL, float"]
        row = {"pipeline": name, "image_size": size, "images_per_second_per_core": speed, "over_plain": over_plain}
        rows.append(row)
    return rows


def memory_in_use(device, peak: bool) -> int:
    """Bytes in use by this process: on the GPU if the device is one, otherwise in main memory.

    Args:
        device: of torch.
        peak: the largest number so far instead of the present one.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # the peak of getrusage would include that of the process that started this one
        name = "VmHWM" if peak else "VmRSS"
        return 1024 * int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_machine(device) -> str:
    """The names of GPU and processor, and the numbers of cores and threads."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model_name = re.search(r"model name\s*:(.*)", cpuinfo.read_text())
        if model_name:
            processor = model_name[1].strip()
    cpu = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}; {cpu}" if device.type == "cuda" else cpu


# Fields of bench.json that are printed, with their formats.
COLUMNS = {
    "pipeline": "{}",
    "method": "{}",
    "mode": "{}",
    "model": "{}",
    "image_size": "{}",
    "precision": "{}",
    "compiled": "{}",
    "source_images_per_step": "{}",
    "source_images_per_second": "{:.1f}",
    "composites_per_second": "{:.1f}",
    "ms_per_step": "{:.1f}",
    "ms_per_step_quartiles": "{0[0]:.0f}-{0[1]:.0f}",
    "peak_memory_bytes": "{:.2e}",
    "gmacs_per_source_image": "{:.3f}",
    "share_of_matmul_rate": "{:.0%}",
    "hours_per_imagenet_epoch": "{:.2f}",
    "images_per_second_per_core": "{:.0f}",
    "over_plain": "{:.2f}",
    "launches_forward": "{}",
    "launches_backward": "{}",
    "launches_update": "{}",
    "casts": "{}",
    "copies": "{}",
    "parameter_groups": "{}",
    "graphs": "{}",
    "graph_breaks": "{}",
    "ms_plan": "{:.2f}",
    "ms_wait_for_plan": "{:.2f}",
    "ms_update": "{:.2f}",
    "ms_exchange": "{:.2f}",
}


def format_table(rows: list[dict]) -> str:
    """The rows of bench.json as a Markdown table, without columns that are empty in all rows."""
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    table = [[name.replace("_", " ") for name in names]]
    for row in rows:
        table.append(["" if row.get(name) is None else COLUMNS[name].format(row[name]) for name in names])
    header, *lines = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([header, "|" + "---|" * len(names), *lines])


def ratios(rows: list[dict], speed_pairs, memory_pair) -> list[str]:
    """Compare methods that were measured in the same setting.

    Args:
        rows: of bench.json.
        speed_pairs: (method, method to compare it with, what the ratio of their speeds shows).
        memory_pair: two methods whose peak memory is compared.

    Returns:
        A line for each pair that was measured, in each setting.
    """
    setting_names = ("model", "image_size", "precision", "source_images_per_step", "mode")
    groups = {}  # rows by setting and method
    for row in rows:
        if "method" in row:
            setting = tuple(row.get(name) for name in setting_names)
            method = row["method"] + (" compiled" if row["compiled"] else "")
            groups.setdefault(setting, {})[method] = row
    lines = []
    for (_, _, precision, images, mode), methods in groups.items():
        setting = f"{precision}, {images} images a step" + (f", {mode}" if mode else "")
        for method, other, meaning in speed_pairs:
            if method in methods and other in methods:
                a, b = (methods[name]["source_images_per_second"] for name in (method, other))
                lines.append(f"{meaning} ({setting}): {method} / {other} = {a:.1f} / {b:.1f} = {a / b:.2f} x")
        a, b = (methods.get(name, {}).get("peak_memory_bytes") for name in memory_pair)
        if a and b:
            pair = " / ".join(memory_pair)
            lines.append(f"peak memory ({setting}): {pair} = {a / 1e9:.2f} GB / {b / 1e9:.2f} GB = {a / b:.0%}")
    return lines
