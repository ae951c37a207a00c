"""The training loop's parts that pre-training and fine-tuning share, from the run folder to the progress bar.

    loop = Loop("pretrain", args, distributed, run, checkpoint, model, crops, held_out)
    loop.begin(lines)
    for step in loop.steps():
        for batch in loop.micro_batches():
            ...                     # forward, loop.train_step.backward
        loop.train_step.update()
        loop.log()
        if loop.checkpoint(): return runs.STOPPED
        if loop.evaluation_due(): loop.log_evaluation(...)

What may fail or take long comes after the checkpoint; a run that was killed before its evaluation makes up for it when it goes on.
"""

import hashlib
import os
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from engine import checkpoints, data, runs, track
from engine.dist import device_name, versions
from engine.errors import DataError, UserError
from engine.optim import TrainStep, check_compiler
from images import open_train_and_val
from images.crops import format_size, to_2tuple
from images.formats import PixelFormat
from images.sources import FileImages, MemoryImages, download


def micro_batch_size(args, distributed, group: int, images: int) -> int:
    """Source images per process and micro-step; UserError where composites of `group` images cannot be dealt out evenly."""
    parts = distributed.world_size * args.accumulate
    effective = args.batch_size * parts if args.batch_size else args.effective_batch
    if effective % (group * parts):
        raise UserError(
            f"an effective batch of {effective} source images cannot be dealt out: {distributed.world_size} processes x "
            f"{args.accumulate} micro-steps x composites of {group} need a multiple of {group * parts}; try "
            f"--batch-size {max(1, round(effective / parts / group)) * group}"
        )
    if effective > images:
        most = images // (2 * parts * group) * group
        raise UserError(
            f"an effective batch of {effective} source images exceeds the {images} training images; "
            + (f"try --batch-size {most}" if most else f"at least {2 * parts * group} images are needed")
        )
    return effective // parts


def load_images(args, distributed, labelled: bool = False):
    """The training and held-out images that the arguments name. One process fetches, measures and caches what all then read.

    `args` get the channels, pages and range of the format that was settled, which the images have as `form`.
    """
    if args.download:
        distributed.run_on_main(lambda: download(args.data))
    form, measured = resolve_format(args)
    if args.cache and distributed.world_size > 1:
        distributed.run_on_main(
            lambda: open_train_and_val(args.data, False, args.image_size, args.cache, False, form, measured) and None
        )
    train, held_out, lines = open_train_and_val(
        args.data, args.in_memory, args.image_size, args.cache, labelled, form, measured, distributed.run_on_main
    )
    vars(args).update(train.form.requested)
    if measured and not train.form.is_rgb8:
        where = args.output or args.resume if args.resume else args.checkpoint
        distributed.print(
            f"pixels: {train.form.channels} channel{'s' * (train.form.channels > 1)}, values, mean and deviation as {where} has them"
        )
    distributed.print_lines(lines)
    side, needed = median_short_side(train), min(to_2tuple(args.image_size))
    if side and side < needed / 2:
        distributed.warn(
            f"the images' shorter side is {side} pixels, less than half of an input of {needed}: a recipe for small images may serve "
            "better (train.py --recipe small, finetune.py --recipe micro)"
        )
    return train, held_out


def resolve_format(args) -> tuple[PixelFormat, bool]:
    """The format of pixels that flags and an earlier run settle, and whether all of it is measured: a run that goes on has its own; one
    that begins from a checkpoint has that run's, unless flags ask for another."""
    asked = {name: getattr(args, name) for name in PixelFormat().requested if getattr(args, name) is not None}
    before = checkpoints.resumed_config(args)
    most = args.max_megapixels
    if before:
        return replace(
            PixelFormat.of(before.get("pixels", {})), max_megapixels=most
        ), True  # a run of before there were formats has the first one
    start = checkpoint_format(args.checkpoint) if getattr(args, "checkpoint", None) else None
    if start and not start.is_rgb8 and all(asked.get(name, value) == value for name, value in start.requested.items()):
        return replace(
            start, max_megapixels=most
        ), True  # of ordinary images nothing was measured, and the new ones may be others
    kept = {name: value for name, value in start.requested.items() if value != "type"} if start else {}
    return PixelFormat(max_megapixels=most, **{"value_range": "auto"} | kept | asked), False


def checkpoint_format(path) -> PixelFormat | None:
    """The format of pixels of a checkpoint's run; None for weights of another origin, and for runs of before there were formats."""
    config = None if os.path.isdir(path) else checkpoints.load_tensors(path).get("config")
    return PixelFormat.of(config["pixels"]) if isinstance(config, dict) and "pixels" in config else None


def median_short_side(images) -> int | None:
    """The median shorter side of some of a folder's images; None for others."""
    sides = []
    for index in np.linspace(0, len(images) - 1, 20).astype(int) if isinstance(images, FileImages) else ():
        with suppress(DataError):
            sides.append(min(images.open(index).sides))
    return int(np.median(sides)) if sides else None


def micro_batches(batches, count: int, clock: dict):
    """The next `count` of an iterator's batches; the time spent waiting for them is added to clock["data"]."""
    for _ in range(count):
        began = time.perf_counter()
        try:
            batch = next(batches)
        except DataError as error:  # from a worker it comes with a traceback, its own last line is the message
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        clock["data"] += time.perf_counter() - began
        yield batch


def checksum(names) -> str:
    """How many names, and a hash of them."""
    digest, count = hashlib.sha256(), 0
    for count, name in enumerate(names, 1):
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    return f"{count} of checksum {digest.hexdigest()[:12]}"


def timings(clock: dict, step: int, batch: int, progress: dict) -> dict:
    """Fields of a log line since the line before: names begin with time_, for they differ from run to run."""
    now = time.perf_counter()
    seconds, steps = now - clock["began"], step - clock["steps"]
    progress["seconds"] += seconds
    fields = {
        "time_images_per_second": round(batch * steps / seconds, 2),
        "time_step_ms": round(1e3 * seconds / steps, 2),
        "time_data_share": round(clock["data"] / seconds, 4),
        "time_training_seconds": round(progress["seconds"], 2),
    }
    clock.update(data=0.0, began=now, steps=step)
    return fields


def report_unreadable_val(run, train, held_out, bad: dict, most: float):
    """Report unreadable held-out images to the run, by names that tell them from training files."""
    prefix = f"{held_out.root.name}/" if bad and held_out.root != train.root else ""
    run.report_bad_held_out(
        [(prefix + held_out.name(index), reason) for index, reason in bad.items()], len(held_out), most
    )


class Loop:
    """Steps from where the run stands to where it ends. `done` is the number of steps completed.

    model: trained whole, with what optim.parameter_groups asks for. crops: a data.Crops. group: source images in a composite.
    state: what else to save, by name, each an object with state_dict and load_state_dict. labelled: every class must have readable images.
    """

    def __init__(
        self,
        kind: str,
        args,
        distributed,
        run,
        checkpoint,
        model,
        crops,
        held_out,
        group: int = 1,
        state=None,
        labelled: bool = False,
    ):
        self.labelled = labelled
        self.kind, self.args, self.distributed, self.run, self.resumed = kind, args, distributed, run, checkpoint
        self.model, self.crops, self.held_out, self.state, self.form = (
            model,
            crops,
            held_out,
            state or {},
            crops.images.form,
        )
        images = len(crops.images)
        self.size = micro_batch_size(args, distributed, group, images)
        if args.compile:
            check_compiler(distributed.device)
        track.check(args.track)
        effective = self.size * distributed.world_size * args.accumulate
        self.batches = data.BatchSampler(
            images, effective, args.seed, 0, 0, distributed.rank, distributed.world_size, args.accumulate
        )
        self.per_epoch = self.batches.steps_per_epoch
        self.peak = args.base_lr * effective / 512
        self.total = steps = max(1, round(args.epochs * self.per_epoch))
        self.batches.stop = steps if args.max_steps is None else min(steps, args.max_steps)
        self.train_step = TrainStep(
            args, distributed, model, steps, round(args.warmup_epochs * self.per_epoch), self.peak
        )
        self.config = {
            "kind": kind,
            "arguments": vars(args),
            "effective_batch": effective,
            "images": images,
            "classes": crops.images.classes,
            "image_size": args.image_size,
            "pixels": self.form.to_dict(),
            "mean": list(self.form.mean),
            "std": list(self.form.std),
            "processes": distributed.world_size,
            "device": device_name(distributed.device),
            "precision": f"{distributed.amp_dtype or torch.float32} on {distributed.device.type}",
            "versions": versions(),
            **runs.provenance(sys.argv),
        }
        self.progress, self.changed, self.before = (
            {"seconds": 0.0, "bad": {}},
            [],
            {},
        )  # before: the config that a resumed run had
        self.done = 0
        if checkpoint:
            self.load(checkpoints.load_checkpoint(checkpoint), checkpoint)

    def load(self, saved: dict, path):
        checkpoints.check_kind(
            saved,
            f"--resume {path}",
            self.kind,
            ("optimizer", "scaler", "failures", "meters", "steps_metered", "step", "progress", *self.state),
        )
        self.changed = runs.check_same_run(saved["config"], vars(self.args), self.batches.batch, self.config)
        before = self.before = saved["config"]
        self.config["earlier_commits"] = before.get("earlier_commits", []) + [before["commit"]] * (
            before["commit"] != self.config["commit"]
        )
        then, now = (
            [group.get("names") for group in state["param_groups"]]
            for state in (saved["optimizer"], self.train_step.optimizer.state_dict())
        )
        if then != now:  # the optimiser's state goes by places in these lists
            raise UserError(
                f"--resume {path}: the code of commit {before['commit']}, which wrote it, had other parameters or groups of them; "
                "go on with that code, or begin a new run"
            )
        if before["commit"] != self.config["commit"]:
            self.distributed.print(
                f"going on with other code: commit {before['commit']} before, {self.config['commit']} now"
            )
        self.model.load_state_dict(saved["model"])
        self.train_step.load(saved)
        for name, item in self.state.items():
            item.load_state_dict(saved[name])
        self.progress, self.done = saved["progress"], saved["step"]
        self.run.checkpoints.step = self.done

    def lines(self) -> list[str]:
        """Derived quantities as equations, those that both programs have."""
        args, batch = self.args, self.batches.batch
        lines = [
            f"recipe {args.recipe}, {args.model} at {format_size(args.image_size)} px on {device_name(self.distributed.device)}, "
            f"{str(self.distributed.amp_dtype or 'torch.float32').removeprefix('torch.')}",
            f"effective batch size {batch} = {self.distributed.world_size} process{'es' * (self.distributed.world_size > 1)} x {self.size} x "
            f"{args.accumulate} accumulation step{'s' * (args.accumulate > 1)}",
            f"steps: {args.epochs} epochs x {self.per_epoch} ({self.batches.count} images / {batch}) = {self.total}",
            f"learning rate: {args.base_lr:g} x {batch} / 512 = {self.peak:g}; warm-up {args.warmup_epochs:g} epochs from "
            f"{self.train_step.schedule['start']:g}, cosine to {self.train_step.schedule['end']:g}",
        ]
        if args.layer_decay != 1:
            layers = {group["layer"]: group["scale"] for group in self.train_step.optimizer.param_groups}
            lines.append(
                f"layer-wise learning rate decay: the first layer has {args.layer_decay:g}^{max(layers) - min(layers)} = {layers[min(layers)]:.3g} "
                "times the learning rate of the last"
            )
        return lines

    def begin(self, lines: list[str]):
        """Start writing: folder, config, file lists, the log cut back to the checkpoint. Before that, all processes must agree."""
        if self.distributed.world_size > 1:
            self.distributed.check_same_everywhere(
                {
                    "the step": str(self.done),
                    "the classes": checksum(self.crops.images.classes or []),
                    "the list of training images": checksum(map(self.crops.images.name, range(len(self.crops.images)))),
                    "the list of held-out images": checksum(map(self.held_out.name, range(len(self.held_out)))),
                }
            )
        self.batches.start = self.done
        if self.args.track:
            self.config["track_id"] = self.distributed.run_on_main(
                lambda: runs.run_config(self.run.folder).get("track_id") or uuid.uuid4().hex[:12]
            )
        runs.create_folder(
            self.run, self.config, {"files.txt": self.crops.images, "held_out.txt": self.held_out}, not self.resumed
        )
        newest = self.run.folder / "last.pt"  # the folder is locked from here on
        if (
            self.resumed
            and self.resumed.name == "previous.pt"
            and self.distributed.is_main
            and newest.exists()
            and checkpoints.find_corruption(newest)
        ):
            newest.unlink()  # it must not become the next previous.pt
        if self.args.track and self.distributed.is_main:
            self.run.tracker = track.Tracker(
                self.args.track, self.run.folder, self.config["track_id"], self.config, self.done, self.distributed.warn
            )
        self.run.resume_at(self.done, self.progress["bad"], self.progress.get("bad_held_out", {}))
        for words in self.changed:
            self.distributed.warn(f"going on with another setting: {words}")
            self.run.log(step=self.done, epoch=self.done // self.per_epoch, warning=words)
        if 0 < self.args.epochs <= self.args.warmup_epochs:
            self.distributed.warn(
                f"a warm-up of {self.args.warmup_epochs:g} epochs in a run of {self.args.epochs:g}: the learning rate never reaches its peak"
            )
        self.evaluated = self.distributed.run_on_main(lambda: self.run.evaluation.get("step", 0))
        self.clock = {"data": 0.0, "began": time.perf_counter(), "steps": self.done}
        where = f", going on after step {self.done} from {self.resumed.name}" if self.resumed else ""
        self.distributed.print("\n".join([*lines, f"run folder: {self.run.folder}{where}"]))

    def steps(self):
        """Each step's number, with the learning rate set; the loader, the bar and the signals live as long as this."""
        args, device = self.args, self.distributed.device
        in_memory = isinstance(self.crops.images, MemoryImages) and not self.crops.augment
        workers = 0 if in_memory and args.workers is None else self.distributed.num_workers()
        self.stream = iter(data.make_loader(self.crops, self.batches, workers, pin=device.type == "cuda"))
        self.control, self.unreadable = runs.StopSignals(self.distributed, args.checkpoint_every), []
        self.clock["began"] = time.perf_counter()
        with tqdm(
            total=self.batches.stop,
            initial=self.done,
            disable=not self.distributed.is_main,
            unit="step",
            mininterval=1.0,
        ) as self.bar:
            for step in range(self.done, self.batches.stop):
                self.lr = self.train_step.set_learning_rate(step)
                yield step
        self.control.answer()
        self.run.checkpoints.finish()
        self.run.close()

    def micro_batches(self):
        for batch in micro_batches(self.stream, self.args.accumulate, self.clock):
            self.unreadable += [(self.crops.images.name(index), reason) for index, reason in batch["bad"]]
            yield batch
        self.done += 1

    @property
    def at_epoch_end(self) -> bool:
        """Also at the last step of a run that stops early."""
        return self.done % self.per_epoch == 0 or self.done == self.batches.stop

    def log(self, **fields):
        """A line of log.jsonl every --log-every steps and at the end of an epoch; only here the device is waited for."""
        if self.done % self.args.log_every and not self.at_epoch_end:
            return
        means = self.train_step.read()
        self.train_step.check_failures(self.done, means)
        self.report_bad()
        times = timings(self.clock, self.done, self.batches.batch, self.progress)
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

    def report_bad(self):
        images = self.crops.images
        self.run.report_bad(self.unreadable, len(images), self.args.max_bad_share)
        self.unreadable = []
        if self.labelled and self.run.bad:
            lost, sizes = (
                Counter(name.split("/")[0] for name in self.run.bad),
                np.bincount(images.labels, minlength=len(images.classes)),
            )
            gone = [name for name, size in zip(images.classes, sizes) if size and lost[name] >= size]
            if gone:
                self.distributed.fail(f"no image of {', '.join(gone[:5])} can be read in the training part")

    def evaluation_due(self, every: int = 1) -> bool:
        """Whether the step just done ends an epoch, each `every`th or the last, that has not been evaluated."""
        ends = self.at_epoch_end and (self.done // self.per_epoch % every == 0 or self.done == self.batches.stop)
        return ends and self.evaluated < self.done

    def log_evaluation(self, bad: dict, **fields):
        """An evaluation line; the time it took is not training time. bad: indices of unreadable held-out images, with reasons."""
        report_unreadable_val(self.run, self.crops.images, self.held_out, bad, self.args.max_bad_share)
        self.run.log(step=self.done, epoch=self.done // self.per_epoch, **fields)
        self.evaluated = self.done
        self.clock["began"] = time.perf_counter()

    def checkpoint(self) -> bool:
        """Save if it is time; True if a signal asks to stop here."""
        self.bar.update()
        every = self.args.checkpoint_every_steps
        stop, due = self.control.agree()
        stop = stop and self.done < self.batches.stop
        if self.at_epoch_end or stop or due or (every and self.done % every == 0):
            self.train_step.check_failures(self.done, {})  # what must not go on is not saved
            self.report_bad()
            state = {
                "kind": self.kind,
                "model": self.model.state_dict(),
                "step": self.done,
                "epoch": self.done // self.per_epoch,
                "config": self.config,
                "progress": self.progress | {"bad": self.run.bad, "bad_held_out": self.run.bad_held_out},
                **self.train_step.state(),
                **{name: item.state_dict() for name, item in self.state.items()},
            }
            if self.distributed.is_main:
                self.run.checkpoints.save(state)
        if stop:
            self.control.answer()
            self.run.checkpoints.finish()
            self.run.close()
            self.distributed.print(
                f"\nstopped by a signal after step {self.done}; go on with --resume {self.run.folder}"
            )
        return stop
