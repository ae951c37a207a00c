"""The parts of a training loop that all training programs share, from the run folder to the progress bar.

    loop = Loop("pretrain", vars(args), distributed, run, checkpoint, model, crops, held_out, rules)
    loop.begin(lines)
    for step in loop.steps():               # sets the learning rate
        for batch in loop.micro_batches():
            ...                             # loop.train_step.forward, loop.train_step.backward
        loop.train_step.update()
        loop.log()
        if loop.checkpoint():
            return runs.STOPPED
        if loop.evaluation_due():
            loop.log_evaluation(...)

Whatever may fail or take long comes after the checkpoint. A run that was killed before an evaluation does it when it is
resumed.
"""

import hashlib
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from engine import checkpoints, data, runs, track
from engine.dist import Distributed, device_name, versions
from engine.errors import DataError, UserError
from engine.files import run_config
from engine.flags import ResumeRules, select
from engine.optim import StepConfig, TrainStep, check_compiler
from images.sources import MemoryImages


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the loop, by the names of their flags. The learning rate is base_lr x effective batch size / 512."""

    epochs: float
    warmup_epochs: float
    max_steps: int | None
    base_lr: float
    batch_size: int | None
    effective_batch: int | None
    accumulate: int
    seed: int
    workers: int | None
    compile: bool
    track: str | None
    log_every: int
    checkpoint_every: float | None
    checkpoint_every_steps: int | None
    max_bad_share: float


def micro_batch_size(config: LoopConfig, world_size: int, group: int, images: int) -> int:
    """Source images per process and micro-step.

    Args:
        config: its batch_size, or its effective_batch, which is divided over processes and micro-steps.
        world_size: number of processes.
        group: source images in one mixed image.
        images: number of training images.

    Raises:
        UserError: if mixed images cannot be distributed evenly, or the training images do not fill one batch.
    """
    parts = world_size * config.accumulate
    effective = config.batch_size * parts if config.batch_size else config.effective_batch
    if effective % (group * parts):
        possible = max(1, round(effective / parts / group)) * group
        raise UserError(
            f"an effective batch size of {effective} source images cannot be distributed evenly: {world_size} "
            f"processes x {config.accumulate} micro-steps x {group} sources need a multiple of {group * parts}; try "
            f"--batch-size {possible}"
        )
    if effective > images:
        possible = images // (2 * parts * group) * group
        advice = f"try --batch-size {possible}" if possible else f"at least {2 * parts * group} images are needed"
        raise UserError(
            f"an effective batch size of {effective} source images exceeds the {images} training images; {advice}"
        )
    return effective // parts


def checksum(names) -> str:
    """The number of names, and a hash of them."""
    digest, count = hashlib.sha256(), 0
    for count, name in enumerate(names, 1):
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    return f"{count} of checksum {digest.hexdigest()[:12]}"


def report_unreadable_val(run, train, held_out, bad: dict, max_share: float):
    """Report unreadable validation images.

    Args:
        run: to which they are reported.
        train, held_out: sources of images. If they have different folders, the validation folder is named.
        bad: reasons by the index of the validation image.
        max_share: raise UserError if a larger share is unreadable.
    """
    prefix = f"{held_out.root.name}/" if bad and held_out.root != train.root else ""
    unreadable = [(prefix + held_out.name(index), reason) for index, reason in bad.items()]
    run.report_bad_held_out(unreadable, len(held_out), max_share)


class Loop:
    """Steps from where the run stands to where it ends.

    Args:
        kind: of the checkpoints that it writes, such as "pretrain".
        settings: all settings of the run by the names of flags, to be kept in config.json and checkpoints.
        distributed: the processes.
        run, checkpoint: from runs.open_run.
        model: trained with what optim.parameter_groups needs.
        crops: a data.Crops of the training images.
        held_out: validation images.
        rules: which settings a resumed run may change.
        group: source images in one mixed image.
        state: what else to save, by name: objects with state_dict and load_state_dict.
        labelled: require readable images of every class.

    Attributes:
        done: number of completed steps.
        per_epoch, total: number of steps of an epoch, and of the whole schedule.
        progress: dict that is saved in checkpoints.
    """

    def __init__(
        self,
        kind: str,
        settings: dict,
        distributed: Distributed,
        run,
        checkpoint,
        model,
        crops,
        held_out,
        rules: ResumeRules,
        group: int = 1,
        state=None,
        labelled: bool = False,
    ):
        self.loop_config = config = select(LoopConfig, settings)
        self.kind, self.distributed, self.run, self.resumed = kind, distributed, run, checkpoint
        self.model, self.crops, self.held_out, self.state = model, crops, held_out, state or {}
        self.labelled, self.form = labelled, crops.images.form
        images = len(crops.images)
        self.micro_batch = micro_batch_size(config, distributed.world_size, group, images)
        if config.compile:
            check_compiler(distributed.device)
        track.check(config.track)
        self.batch_size = self.micro_batch * distributed.world_size * config.accumulate
        self.batches = data.BatchSampler(
            images,
            self.batch_size,
            config.seed,
            0,
            0,
            distributed.rank,
            distributed.world_size,
            config.accumulate,
        )
        self.per_epoch = self.batches.steps_per_epoch
        self.peak_lr = config.base_lr * self.batch_size / 512
        self.total = max(1, round(config.epochs * self.per_epoch))
        self.batches.stop = self.total if config.max_steps is None else min(self.total, config.max_steps)
        warmup_steps = round(config.warmup_epochs * self.per_epoch)
        self.train_step = TrainStep(
            select(StepConfig, settings), distributed, model, self.total, warmup_steps, self.peak_lr
        )
        self.config = {
            "kind": kind,
            "arguments": settings,
            "effective_batch": self.batch_size,
            "images": images,
            "classes": crops.images.classes,
            "image_size": settings["image_size"],
            "pixels": self.form.to_dict(),
            "mean": list(self.form.mean),
            "std": list(self.form.std),
            "processes": distributed.world_size,
            "device": device_name(distributed.device),
            "precision": f"{distributed.amp_dtype or torch.float32} on {distributed.device.type}",
            "versions": versions(),
            **runs.provenance(sys.argv),
        }
        self.progress = {"seconds": 0.0, "bad": {}}
        self.changed = []  # texts about settings that differ from those of the resumed run
        self.old_config = {}  # of the resumed run
        self.done = 0
        if checkpoint:
            self.load(checkpoints.load_checkpoint(checkpoint), checkpoint, rules)

    def load(self, saved: dict, path, rules: ResumeRules):
        """Continue from a checkpoint. UserError if it is not of this run's kind, settings and parameters."""
        entries = ("optimizer", "scaler", "failures", "meters", "steps_metered", "step", "progress", *self.state)
        checkpoints.check_kind(saved, f"--resume {path}", self.kind, entries)
        old = self.old_config = saved["config"]
        self.changed = runs.check_same_run(old, self.config, rules)
        is_other_commit = old["commit"] != self.config["commit"]
        self.config["earlier_commits"] = old.get("earlier_commits", []) + [old["commit"]] * is_other_commit
        old_groups, new_groups = (
            [group.get("names") for group in optimizer["param_groups"]]
            for optimizer in (saved["optimizer"], self.train_step.optimizer.state_dict())
        )
        if old_groups != new_groups:  # the optimiser's state refers to positions in these lists
            raise UserError(
                f"--resume {path}: commit {old['commit']}, which wrote it, had other parameters or groups of them; "
                "resume with that commit, or start a new run"
            )
        if is_other_commit:
            self.distributed.print(f"resuming with another commit: {old['commit']} before, {self.config['commit']} now")
        self.model.load_state_dict(saved["model"])
        self.train_step.load(saved)
        for name, item in self.state.items():
            item.load_state_dict(saved[name])
        self.progress, self.done = saved["progress"], saved["step"]
        self.run.checkpoints.step = self.done

    def lines(self, name: str) -> list[str]:
        """Derived quantities as equations, for the start of a program. name: what is trained."""
        config, schedule = self.loop_config, self.train_step.schedule
        world_size, accumulate = self.distributed.world_size, config.accumulate
        precision = str(self.distributed.amp_dtype or torch.float32).removeprefix("torch.")
        lines = [
            f"{name} on {device_name(self.distributed.device)}, {precision}",
            f"effective batch size {self.batch_size} = {world_size} process{'es' * (world_size > 1)} x "
            f"{self.micro_batch} x {accumulate} accumulation step{'s' * (accumulate > 1)}",
            f"steps: {config.epochs} epochs x {self.per_epoch} ({self.batches.count} images / {self.batch_size}) "
            f"= {self.total}",
            f"learning rate: {config.base_lr:g} x {self.batch_size} / 512 = {self.peak_lr:g}; warm-up "
            f"{config.warmup_epochs:g} epochs from {schedule['start']:g}, cosine to {schedule['end']:g}",
        ]
        layer_decay = self.train_step.config.layer_decay
        if layer_decay != 1:
            scales = {group["layer"]: group["scale"] for group in self.train_step.optimizer.param_groups}
            first, last = min(scales), max(scales)
            lines.append(
                f"layer-wise learning rate decay: the first layer has {layer_decay:g}^{last - first} = "
                f"{scales[first]:.3g} times the learning rate of the last"
            )
        return lines

    def begin(self, lines: list[str]):
        """Start writing: the folder, its config and file lists, and the log, which is cut back to the checkpoint.

        Args:
            lines: to print first.
        """
        config, distributed, train = self.loop_config, self.distributed, self.crops.images
        if distributed.world_size > 1:
            distributed.check_same_everywhere(
                {
                    "the step": str(self.done),
                    "the classes": checksum(train.classes or []),
                    "the list of training images": checksum(map(train.name, range(len(train)))),
                    "the list of validation images": checksum(map(self.held_out.name, range(len(self.held_out)))),
                }
            )
        self.batches.start = self.done
        if config.track:
            self.config["track_id"] = distributed.run_on_main(
                lambda: run_config(self.run.folder).get("track_id") or uuid.uuid4().hex[:12]
            )
        file_lists = {"files.txt": train, "held_out.txt": self.held_out}
        runs.create_folder(self.run, self.config, file_lists, is_new=not self.resumed)
        if distributed.is_main:  # the folder is locked from here on
            self.remove_corrupt_checkpoint()
            if config.track:
                self.run.tracker = track.Tracker(
                    config.track, self.run.folder, self.config["track_id"], self.config, self.done, distributed.warn
                )
        self.run.resume_at(self.done, self.progress["bad"], self.progress.get("bad_held_out", {}))
        for difference in self.changed:
            distributed.warn(f"resuming with another setting: {difference}")
            self.run.log(step=self.done, epoch=self.done // self.per_epoch, warning=difference)
        if 0 < config.epochs <= config.warmup_epochs:
            distributed.warn(
                f"a warm-up of {config.warmup_epochs:g} epochs in a run of {config.epochs:g}: the learning rate "
                "never reaches its peak"
            )
        self.evaluated_step = distributed.run_on_main(lambda: self.run.evaluation.get("step", 0))
        self.data_seconds, self.timer_start, self.timer_step = 0.0, time.perf_counter(), self.done
        resumed = f", resuming after step {self.done} from {self.resumed.name}" if self.resumed else ""
        distributed.print("\n".join([*lines, f"run folder: {self.run.folder}{resumed}"]))

    def remove_corrupt_checkpoint(self):
        """Remove a corrupt last.pt if the run resumes from previous.pt, so that it does not replace previous.pt."""
        newest = self.run.folder / "last.pt"
        if self.resumed and self.resumed.name == "previous.pt" and newest.exists():
            if checkpoints.find_corruption(newest):
                newest.unlink()

    def steps(self):
        """Yield the number of each step, with its learning rate set. Loader, bar and signal handlers live as long."""
        config, distributed = self.loop_config, self.distributed
        in_memory = isinstance(self.crops.images, MemoryImages) and not self.crops.augment
        workers = 0 if in_memory and config.workers is None else distributed.num_workers()
        pin = distributed.device.type == "cuda"
        self.stream = iter(data.make_loader(self.crops, self.batches, workers, pin))
        self.signals, self.unreadable = runs.StopSignals(distributed, config.checkpoint_every), []
        self.timer_start = time.perf_counter()
        stop = self.batches.stop
        with tqdm(
            total=stop, initial=self.done, disable=not distributed.is_main, unit="step", mininterval=1.0
        ) as self.bar:
            for step in range(self.done, stop):
                self.lr = self.train_step.set_learning_rate(step)
                yield step
        self.finish()

    def finish(self):
        self.signals.wait_for_pending()
        self.run.checkpoints.finish()
        self.run.close()

    def micro_batches(self):
        """Yield the batches of one step. The time spent waiting for them is measured."""
        for _ in range(self.loop_config.accumulate):
            start = time.perf_counter()
            try:
                batch = next(self.stream)
            except DataError as error:  # a worker sends its traceback as text, whose last line is the message
                raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
            self.data_seconds += time.perf_counter() - start
            self.unreadable += [(self.crops.images.name(index), reason) for index, reason in batch["bad"]]
            yield batch
        self.done += 1

    @property
    def at_epoch_end(self) -> bool:
        """Also at the last step of a run that stops early."""
        return self.done % self.per_epoch == 0 or self.done == self.batches.stop

    def log(self, **fields):
        """Write a line of log.jsonl every --log-every steps and at each epoch's end. Only this waits for the device."""
        if self.done % self.loop_config.log_every and not self.at_epoch_end:
            return
        means = self.train_step.read()
        self.train_step.check_failures(self.done, means)
        self.report_bad()
        times = self.timings()
        self.run.log(
            step=self.done,
            epoch=(self.done - 1) // self.per_epoch,
            lr=self.lr,
            **means,
            **fields,
            bad_files=len(self.run.bad),
            **times,
        )
        self.bar.set_postfix(
            loss=f"{means['loss']:.4f}",
            images_per_s=f"{times['time_images_per_second']:.0f}",
            waiting=f"{times['time_data_share']:.0%}",
            refresh=False,
        )

    def timings(self) -> dict:
        """Fields of a log line about the time since the previous line. Their names begin with time_."""
        now = time.perf_counter()
        seconds, steps = now - self.timer_start, self.done - self.timer_step
        self.progress["seconds"] += seconds
        fields = {
            "time_images_per_second": round(self.batch_size * steps / seconds, 2),
            "time_step_ms": round(1e3 * seconds / steps, 2),
            "time_data_share": round(self.data_seconds / seconds, 4),
            "time_training_seconds": round(self.progress["seconds"], 2),
        }
        self.data_seconds, self.timer_start, self.timer_step = 0.0, now, self.done
        return fields

    def report_bad(self):
        """Report unreadable training files. UserError if no image of a class can be read, where labels are needed."""
        images = self.crops.images
        self.run.report_bad(self.unreadable, len(images), self.loop_config.max_bad_share)
        self.unreadable = []
        if self.labelled and self.run.bad:
            bad = Counter(name.split("/")[0] for name in self.run.bad)
            sizes = np.bincount(images.labels, minlength=len(images.classes))
            empty = [name for name, size in zip(images.classes, sizes) if size and bad[name] >= size]
            if empty:
                self.distributed.fail(f"no image of {', '.join(empty[:5])} can be read in the training part")

    def evaluation_due(self, every: int = 1) -> bool:
        """Whether the completed step ends each `every`th epoch, or the run, and has not been evaluated."""
        is_last = self.done == self.batches.stop
        is_due = self.at_epoch_end and (self.done // self.per_epoch % every == 0 or is_last)
        return is_due and self.evaluated_step < self.done

    def log_evaluation(self, bad: dict, **fields):
        """Write a line of validation results. The time they took does not count as training time.

        Args:
            bad: reasons by index of unreadable validation images.
            fields: of the line.
        """
        report_unreadable_val(self.run, self.crops.images, self.held_out, bad, self.loop_config.max_bad_share)
        self.run.log(step=self.done, epoch=self.done // self.per_epoch, **fields)
        self.evaluated_step = self.done
        self.timer_start = time.perf_counter()

    def picture(self, name: str, figure, keep: bool = False):
        """Write figure() as NAME.png of the run; keep: and, for some epochs, as pictures/NAME-STEP.jpg."""
        number, total = (-(-steps // self.per_epoch) for steps in (self.done, self.total))
        self.run.picture(name, figure, self.done, number if keep else None, total)

    def checkpoint(self) -> bool:
        """Save a checkpoint if it is due. Returns True if a signal requests to stop here."""
        self.bar.update()
        every = self.loop_config.checkpoint_every_steps
        stop, time_is_up = self.signals.all_reduce_requests()
        stop = stop and self.done < self.batches.stop
        if self.at_epoch_end or stop or time_is_up or (every and self.done % every == 0):
            self.train_step.check_failures(self.done, {})  # a failed run must not replace its last good checkpoint
            self.report_bad()
            state = self.state_dict()
            if self.distributed.is_main:
                self.run.checkpoints.save(state)
        if stop:
            self.finish()
            self.distributed.print(
                f"\nstopped by a signal after step {self.done}; continue with --resume {self.run.folder}"
            )
        return stop

    def state_dict(self) -> dict:
        """The contents of a checkpoint. All processes call this together."""
        return {
            "kind": self.kind,
            "model": self.model.state_dict(),
            "step": self.done,
            "epoch": self.done // self.per_epoch,
            "config": self.config,
            "progress": self.progress | {"bad": self.run.bad, "bad_held_out": self.run.bad_held_out},
            **self.train_step.state(),
            **{name: item.state_dict() for name, item in self.state.items()},
        }
