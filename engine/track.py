"""Trackers: the rows of log.jsonl and the pictures are also sent to TensorBoard or Weights & Biases.

A tracker that fails is left out with a warning; it never ends a run.

Any other tracker can be fed from log.jsonl: docs/running.md has the lines.
"""

import importlib
from pathlib import Path

import numpy as np
from PIL import Image

from engine.errors import UserError


def check(kind: str | None):
    """UserError where the tracker's package is not installed."""
    if kind:
        try:
            importlib.import_module(kind)
        except Exception as error:  # an installed one may fail in many ways, too
            raise UserError(
                f"--track {kind}: {error or type(error).__name__}; pip install {kind}, or leave --track out"
            ) from None


class Tracker:
    """One run's tracker on the first process. name: the run's id, kept across resume; step: after which what an earlier process told is void."""

    def __init__(self, kind: str, folder: Path, name: str, config: dict, step: int, warn):
        self.kind, self.folder, self.warn, self.writer = kind, folder, warn, None
        self.attempt(self.open, name, config, step)

    def attempt(self, work, *arguments):
        try:
            work(*arguments)
        except Exception as error:  # a full disk, no network, no account: whatever the package raises
            self.warn(
                f"--track {self.kind}: {type(error).__name__}: {error}; this run is not tracked any further, log.jsonl has everything"
            )
            self.writer = None

    def open(self, name: str, config: dict, step: int):
        if self.kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)
        else:
            import wandb

            self.writer = wandb.init(
                id=name, name=self.folder.name, dir=str(self.folder), config=config["arguments"], resume="allow"
            )
            self.writer.define_metric("*", step_metric="step")

    def row(self, row: dict):
        """A row of log.jsonl."""
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        if self.writer:
            self.attempt(self.tell, numbers)

    def tell(self, numbers: dict):
        if self.kind == "wandb":
            return self.writer.log(numbers)
        for name, value in numbers.items():
            if name != "step":
                self.writer.add_scalar(name, value, numbers["step"])
        if any(name.startswith("eval_") for name in numbers):
            self.writer.flush()

    def picture(self, path: Path, step: int):
        if self.writer:
            self.attempt(self.show, path, step)

    def show(self, path: Path, step: int):
        if self.kind == "wandb":
            import wandb

            return self.writer.log({path.stem: wandb.Image(str(path)), "step": step})
        self.writer.add_image(path.stem, np.array(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self):
        if self.writer:
            self.attempt(self.writer.finish if self.kind == "wandb" else self.writer.close)
            self.writer = None
