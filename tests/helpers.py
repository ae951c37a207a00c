"""What several tests share: command lines in a subprocess, small folders of images, small runs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = ["--model", "swin_micro", "--image-size", "16", "--window", "2", "--decoder-width", "32", "--workers", "0"]


def environment(threads=1):
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def command(script, *arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, arguments)]


def run(script, *arguments, processes=1, cwd=None, status=0):
    """Run a script to its end and hold its exit status against `status`; returns the completed process."""
    done = subprocess.run(command(script, *arguments, processes=processes), cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == status, f"status {done.returncode}, expected {status}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def here(main, *arguments):
    """The same command line without a process of its own, for what does not need one: main(arguments) in this process."""
    assert main([str(argument) for argument in arguments]) == 0


def make_images(folder, classes=2, each=12, size=16, seed=0):
    """Class folders of small smooth random images."""
    rng = np.random.default_rng(seed)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True, exist_ok=True)
        for k in range(each):
            small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
            small[..., c % 3] = 255 - small[..., c % 3] // 4  # learnable: a class has its colour
            Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"class{c}" / f"{k:03}.png")
    return folder


def log(folder, timings=False):
    """Lines of log.jsonl, without the fields that differ from run to run."""
    rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return rows if timings else [{k: v for k, v in row.items() if not k.startswith("time_")} for row in rows]
