"""Trackers: rows of log.jsonl and pictures are also sent to TensorBoard or Weights & Biases (--track).

A tracker that fails costs a warning and is not used any further. It never ends a run. docs/running.md shows how any
other tracker can read log.jsonl.
"""

import importlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from engine.errors import UserError


def check(kind: str | None):
    """Raise a UserError if the package of the tracker cannot be imported. None is no tracker."""
    if kind:
        try:
            importlib.import_module(kind)
        except Exception as error:  # a package that is installed can also fail, in many ways
            reason = error or type(error).__name__
            raise UserError(f"--track {kind}: {reason}; pip install {kind}, or leave --track out") from None


class Tracker:
    """The tracker of a run, on its first process.

    Args:
        kind: "tensorboard" or "wandb".
        folder: of the run.
        name: the id of the run, which stays the same when the run is resumed.
        config: of the run.
        step: number of completed steps. TensorBoard discards what an earlier process wrote for later steps.
        warn: called with a message if the tracker fails.
    """

    def __init__(self, kind: str, folder: Path, name: str, config: dict, step: int, warn):
        self.kind, self.folder, self.warn, self.writer = kind, folder, warn, None
        with self.warn_on_failure():
            if kind == "wandb":
                import wandb

                self.writer = wandb.init(
                    id=name, name=folder.name, dir=str(folder), config=config["arguments"], resume="allow"
                )
                self.writer.define_metric("*", step_metric="step")
            else:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    @contextmanager
    def warn_on_failure(self):
        """Turn an error of the tracker's package into a warning, after which the tracker is not used any further."""
        try:
            yield
        except Exception as error:  # a full disk, no network, no account: whatever the package raises
            self.warn(
                f"--track {self.kind}: {type(error).__name__}: {error}; this run is not tracked any further, "
                "log.jsonl has everything"
            )
            self.writer = None

    def row(self, row: dict):
        """Send the numbers in a row of log.jsonl."""
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        with self.warn_on_failure():
            if self.writer and self.kind == "wandb":
                self.writer.log(numbers)
            elif self.writer:
                for name, value in numbers.items():
                    if name != "step":
                        self.writer.add_scalar(name, value, row["step"])
                if any(name.startswith("eval_") for name in numbers):
                    self.writer.flush()

    def picture(self, path: Path, step: int):
        """Send an image file under its name, as the picture after a step."""
        with self.warn_on_failure():
            if self.writer and self.kind == "wandb":
                import wandb

                self.writer.log({path.stem: wandb.Image(str(path)), "step": step})
            elif self.writer:
                pixels = np.array(Image.open(path).convert("RGB"))
                self.writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def close(self):
        """Wait until everything is sent."""
        with self.warn_on_failure():
            if self.writer and self.kind == "wandb":
                self.writer.finish()
            elif self.writer:
                self.writer.close()
        self.writer = None
