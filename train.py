"""Pre-training (Algorithm 1): superpose, mask, encode, decode, decompose.

    python train.py                                                   the demo: photographs of scikit-image, minutes on a CPU
    torchrun --nproc_per_node=4 train.py --data /path/to/imagenet     the paper's run (section 4.1.1)
    python train.py --data cifar10 --download --method greenmim       another method, another data set
"""
import argparse
import os
import sys
import time

import numpy as np
import torch
from einops import rearrange
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import engine
import mixing
import runs
import show
import swin
from engine import UserError, number, positive, rate
from heldout import evaluate, read_held_out
from model import METHODS, EESMM, build
from plans import to_device

RECIPES = {  # READING of sections 4.1.1 and 4.3; cifar and demo are ours
    "paper": dict(model="swin_base", image_size=224, window=7, epochs=800, warmup_epochs=100, base_lr=2e-4, warmup_lr=1e-6,
                  min_lr=1e-5, weight_decay=0.05, layer_decay=0.9, clip=5.0, drop_path=0.0, effective_batch=256,
                  crop_scale=(0.2, 1.0), mask_ratio=0.75, loss="mse", decomposition="subtract", decoder_width=512),
    "ablation": dict(model="swin_base", image_size=192, window=6, epochs=100, warmup_epochs=10, base_lr=2e-4, warmup_lr=1e-6,
                     min_lr=1e-5, weight_decay=0.05, layer_decay=1.0, clip=5.0, drop_path=0.0, effective_batch=2048,
                     crop_scale=(0.67, 1.0), mask_ratio=0.6, loss="l1", decomposition="subtract", decoder_width=512),
    "cifar": dict(model="swin_micro", image_size=32, window=4, epochs=200, warmup_epochs=10, base_lr=1e-3, warmup_lr=1e-6,
                  min_lr=1e-5, weight_decay=0.05, layer_decay=1.0, clip=5.0, drop_path=0.0, effective_batch=512,
                  crop_scale=(0.2, 1.0), mask_ratio=0.75, loss="mse", decomposition="subtract", decoder_width=192),
    "demo": dict(model="swin_micro", image_size=64, window=4, epochs=12, warmup_epochs=1, base_lr=8e-3, warmup_lr=1e-6,
                 min_lr=1e-5, weight_decay=0.05, layer_decay=1.0, clip=5.0, drop_path=0.0, effective_batch=64,
                 crop_scale=(0.5, 1.0), mask_ratio=0.75, loss="mse", decomposition="split", decoder_width=192),
}
METHOD_DEFAULTS = {"eesmm": dict(sources=2, decoder_blocks=1), "greenmim": dict(sources=1, decoder_blocks=1),
                   "simmim": dict(sources=1, decoder_blocks=0, loss="l1", mask_ratio=0.6)}


def arguments(argv=None):
    parser = engine.Parser(description="Pre-train by superposing images.", epilog="A recipe sets the defaults; any flag overrides it.")
    parser.add_argument("--recipe", choices=RECIPES, help="default: demo without --data, cifar for cifar10 and cifar100, paper for a folder")
    parser.add_argument("--method", choices=METHODS, default="eesmm", help="eesmm (2 images, visible units only), greenmim (the "
                        "same with 1), simmim (1, all tokens, linear head); default: eesmm")
    engine.add_shared_flags(parser)
    group = parser.add_argument_group("masks and superposition (Eq. 1-3)")
    group.add_argument("--mask-ratio", type=number(float, 0, 1), help="share of units that is hidden")
    group.add_argument("--masks", choices=("shared", "independent"), default="shared", help="one mask for all sources, or one each; default: shared")
    group.add_argument("--unit", type=positive, metavar="PX", help="side of a masked square; default: what one final token covers")
    group.add_argument("--sources", type=positive, metavar="N", help="images in a composite; default: 2 for eesmm")
    group.add_argument("--weights", type=rate, nargs="+", metavar="W", help="lambda_k, summing to 1; default: 1/n each")
    group.add_argument("--views", choices=("single", "four"), default="single", help="four: the form of Eq. 3, two views of each of two images; default: single")
    group.add_argument("--view-angle", type=number(float, 0, 180), default=30.0, metavar="DEGREES", help="largest rotation; default: 30")
    group.add_argument("--view-scale", type=number(float, 0, 1, open_low=True), nargs=2, default=(0.7, 1.0), metavar=("LOW", "HIGH"),
                       help="size of the scaled view; default: 0.7 1.0")
    group.add_argument("--view-crop", type=number(float, 0, 1, open_low=True), nargs=2, default=(0.3, 1.0), metavar=("LOW", "HIGH"),
                       help="area of the cropped view; default: 0.3 1.0")
    group = parser.add_argument_group("decoder, decomposition and loss (Eq. 4-7)")
    group.add_argument("--decomposition", choices=("split", "subtract"), help="one predicted image per source, or the predicted mix minus the true others")
    group.add_argument("--assignment", choices=("permutation", "fixed"), default="permutation", help="of split's outputs to sources; default: permutation")
    group.add_argument("--decoder-blocks", type=number(int, 0, 8), metavar="N", help="default: 1; 0 for simmim")
    group.add_argument("--decoder-width", type=positive, metavar="C", help="a multiple of 32")
    group.add_argument("--loss", choices=("mse", "l1"), help="error of a pixel")
    group.add_argument("--loss-units", choices=("hidden", "all"), default="hidden", help="units whose error counts; default: hidden, as in Eq. 7")
    group.add_argument("--loss-weights", type=rate, nargs="+", metavar="W", help="of the mix and of each source; default: 1 each")
    group.add_argument("--adam-eps", type=number(float, 0, open_low=True), default=1e-6, help="AdamW's epsilon; default: 1e-6")
    group.add_argument("--eval-images", type=positive, default=5000, metavar="N", help="held-out images used for eval_error; default: 5000")
    parser.set_defaults(effective_batch=None)
    args = engine.parse_with_recipe(parser, argv, RECIPES, layers=[lambda args: METHOD_DEFAULTS[args.method]], choose=lambda args: (
        "demo" if args.data is None else "cifar" if args.data in ("cifar10", "cifar100") else "paper"))
    return args


def batch_size(args, world: int) -> int:
    """Source images per process and micro-step; UserError where the numbers do not divide."""
    parts = world * args.accumulate
    effective = args.batch_size * parts if args.batch_size else args.effective_batch
    if effective % (args.sources * parts):
        raise UserError(f"an effective batch of {effective} source images cannot be dealt out as composites of {args.sources} to "
                        f"{world} processes x {args.accumulate} micro-steps: it must be a multiple of {args.sources * parts}; try "
                        f"--batch-size {max(1, round(effective / parts / args.sources)) * args.sources}")
    return effective // parts


def make_model(args) -> EESMM:
    """The model that the arguments describe; UserError for settings that contradict each other."""
    if args.model not in swin.MODELS:
        raise UserError(f"--model {args.model}: unknown; choose from {', '.join(swin.MODELS)}")
    if args.method != "eesmm" and args.sources != 1:
        raise UserError(f"--method {args.method} takes one image; use --method eesmm for --sources {args.sources}")
    if args.method == "eesmm" and args.sources < 2:
        raise UserError("--method eesmm superposes at least 2 sources; --method greenmim is the same with one")
    sources, weights = args.sources, args.weights
    try:
        if args.views == "four":
            weights = mixing.four_view_weights(mixing.equal_weights(args.sources) if weights is None else torch.tensor(weights))
            sources = 4
        encoder = swin.MODELS[args.model](image_size=args.image_size, window=args.window, drop_path=args.drop_path)
        encoder.checkpointing = args.activation_checkpointing
        return build(args.method, encoder, sources=sources, weights=weights, unit=args.unit, loss_weights=args.loss_weights,
                     **{name: getattr(args, name) for name in ("decomposition", "assignment", "decoder_width", "decoder_blocks",
                                                               "mask_ratio", "masks", "loss", "loss_units")})
    except ValueError as error:
        raise UserError(str(error)) from None


def model_from(checkpoint: dict, path) -> EESMM:
    """The model of a checkpoint of this program, with its weights."""
    if checkpoint.get("kind") != "pretrain":
        raise UserError(f"{path}: not a pre-training checkpoint of train.py")
    model = make_model(argparse.Namespace(**checkpoint["config"]["arguments"]))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit the model it describes: {str(error).splitlines()[1].strip()}") from None
    return model


def views(args, images: torch.Tensor, keys) -> torch.Tensor:
    """Batches (b * n, 3, h, w) as composites (b, n, 3, h, w), through the four views of Eq. 3 if asked for."""
    images = rearrange(images, "(b n) c h w -> b n c h w", n=args.sources)
    if args.views == "single":
        return images
    draws = data.uniform(5, args.seed, "views", keys[::args.sources, 0], keys[::args.sources, 1])
    return mixing.four_views(images, torch.from_numpy(draws), args.view_angle, args.view_scale, args.view_crop)


def gmacs(model: EESMM, image_size: int, device) -> float:
    """Multiply-accumulates of one forward pass per source image, in units of 10^9, counted while it runs."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, model.sources, 3, image_size, image_size, device=device), model.draw(data.generator(0)))
    return counter.get_total_flops() / 2e9


def start_up_lines(args, launch, model: EESMM, batches, size: int, peak: float, trainer) -> list[str]:
    """Derived quantities as equations."""
    hidden = model.draw(data.generator(0)).visible
    scales = [group["scale"] for group in trainer.optimizer.param_groups]
    parameters = sum(p.numel() for p in model.parameters())
    of_encoder = sum(p.numel() for p in model.encoder.parameters())
    work = gmacs(model, args.image_size, launch.device)
    return [
        f"recipe {args.recipe}, method {args.method}, {args.model} on {engine.device_name(launch.device)}, "
        f"{str(launch.amp or torch.float32).removeprefix('torch.')}",
        f"batch: {launch.world} processes x {size} x {args.accumulate} accumulation = {batches.batch} source images, "
        f"{batches.batch // args.sources} composites of {args.sources}",
        f"steps: {args.epochs} epochs x {batches.steps_per_epoch} ({batches.count} images / {batches.batch}) = "
        f"{args.epochs * batches.steps_per_epoch}",
        f"learning rate: {args.base_lr:g} x {batches.batch} / 512 = {peak:g}, warm-up {args.warmup_epochs:g} epochs from "
        f"{min(args.warmup_lr, peak):g}, cosine to {min(args.min_lr, peak):g}",
        f"layer decay: {args.layer_decay:g}^{max(g['layer'] for g in trainer.optimizer.param_groups)}: scales {min(scales):.3g} to {max(scales):g}",
        f"visible units: floor((1 - {args.mask_ratio:g}) x {hidden.shape[1]} + 0.5) = {int(hidden[0].sum())} of {hidden.shape[1]}"
        + (f", {args.unit} px squares" if args.unit else f", {model.encoder.unit} px each"),
        f"parameters: encoder {of_encoder / 1e6:.2f} M + rest {(parameters - of_encoder) / 1e6:.2f} M",
        f"forward pass: {work:.3f} GMACs / {model.sources} sources = {work / model.sources:.3f} per source image",
    ]


def setup(args, launch):
    """Data, model, batches, run folder and trainer, checked before anything is written."""
    where = (args.data, args.download and launch.first, args.in_memory, args.image_size)
    if args.download:
        launch.together(lambda: data.load(*where) and None)  # one process fetches, then all read
    train_images, held_out, line = data.load(*where)
    launch.say(line)
    run, checkpoint = runs.open_run(args, launch, args.recipe, args.method)
    train_images, held_out = (runs.as_listed(images, checkpoint, name) for images, name in
                              ((train_images, "files.txt"), (held_out, "held_out.txt")))
    size = batch_size(args, launch.world)
    effective = size * launch.world * args.accumulate
    if effective > len(train_images):
        raise UserError(f"an effective batch of {effective} source images exceeds the {len(train_images)} training images; "
                        f"try --batch-size {max(args.sources, len(train_images) // 2 // (launch.world * args.accumulate) // args.sources * args.sources)}")
    torch.manual_seed(args.seed)
    model = make_model(args).to(launch.device)
    batches = data.Batches(len(train_images), effective, args.seed, 0, 0, launch.rank, launch.world, args.accumulate)
    peak = args.base_lr * effective / 512
    steps = args.epochs * batches.steps_per_epoch
    trainer = engine.Trainer(args, launch, model, model.layer_of, steps, round(args.warmup_epochs * batches.steps_per_epoch), peak)
    batches.stop = steps if args.max_steps is None else min(steps, args.max_steps)
    lines = start_up_lines(args, launch, model, batches, size, peak, trainer)
    return train_images, held_out, run, checkpoint, model, batches, trainer, lines


def main(argv=None) -> int:
    args = arguments(argv)
    launch = engine.launch(args.device, args.precision)
    train_images, held_out, run, checkpoint, model, batches, trainer, lines = setup(args, launch)
    config = {"arguments": vars(args), "effective_batch": batches.batch, "classes": train_images.classes,
              "image_size": args.image_size, "mean": list(data.MEAN), "std": list(data.STD), "images": len(train_images),
              "processes": launch.world, "device": engine.device_name(launch.device), "versions": engine.versions(),
              **runs.provenance(sys.argv)}
    progress = {"seconds": 0.0, "masks_redrawn": 0, "bad": {}}
    if checkpoint:
        state = runs.load_checkpoint(checkpoint)
        runs.check_same_run(state["config"], vars(args), batches.batch)
        model.load_state_dict(state["model"])
        trainer.load(state)
        progress, batches.start = state["progress"], state["step"]
    runs.begin(run, config, {"files.txt": train_images, "held_out.txt": held_out}, fresh=checkpoint is None)
    run.resume_at(batches.start, progress["bad"])
    launch.say("\n".join(lines))
    launch.say(f"run folder: {run.folder}" + (f", going on after step {batches.start} from {checkpoint.name}" if checkpoint else ""))
    if args.compile:
        engine.compile_blocks(model, swin.Block)
    status = train(args, launch, data.Crops(train_images, args.image_size, args.crop_scale, seed=args.seed), held_out, run, model,
                   batches, trainer, config, progress)
    if status == 0:
        source = f" --data {args.data}" if args.data else ""
        launch.say(f"next: python finetune.py{source} --checkpoint {run.folder / 'last.pt'}")
    return status


def train(args, launch, crops, held_out, run, model, batches, trainer, config, progress) -> int:
    """Steps batches.start to batches.stop; returns the exit status."""
    device, control, found = launch.device, runs.Control(launch, args.checkpoint_every), []
    clock = {"data": 0.0, "began": time.perf_counter(), "steps": batches.start}
    in_memory = isinstance(crops.images, data.MemoryImages)
    workers = args.workers if args.workers is not None else 0 if in_memory else min(16, (os.cpu_count() or 1) // launch.world)
    stream = iter(data.loader(crops, batches, workers, pin=device.type == "cuda"))
    bar = tqdm(total=batches.stop, initial=batches.start, disable=not launch.first, unit="step", mininterval=1.0)

    def save(step):
        state = {"kind": "pretrain", "model": model.state_dict(), "step": step, "epoch": step // batches.steps_per_epoch,
                 "config": config, "progress": progress | {"bad": run.bad}, **trainer.state()}
        run.checkpoints.save(state) if launch.first else None

    for step in range(batches.start, batches.stop):
        # rates and randomness, both functions of the step
        lr = trainer.set_learning_rate(step)
        masking = model.draw(data.generator(args.seed, "mask", step))
        progress["masks_redrawn"] += masking.redrawn
        masking = to_device(masking, device, non_blocking=True)
        if args.drop_path:
            torch.manual_seed(int(data.hashed(args.seed, "drop path", step, launch.rank) >> 1))

        # forward and backward
        for batch in engine.micro_batches(stream, args.accumulate, clock):
            images = data.prepare(batch, device, args.image_size)
            out = trainer.forward(views(args, images, batch["keys"]), masking)
            trainer.backward(out.loss, {"loss": out.loss, **{f"loss_{name}": term for name, term in out.losses.items()}})
            found += [(crops.images.name(index), reason) for index, reason in batch["bad"]]

        # update
        trainer.update()
        bar.update()
        done = step + 1
        epoch, ends = step // batches.steps_per_epoch, done % batches.steps_per_epoch == 0

        # log
        if done % args.log_every == 0 or ends or done == batches.stop:
            means = trainer.read()
            trainer.check_failures(done, means)
            run.report_bad(found, len(crops.images), args.max_bad_share)
            found.clear()
            timings = engine.timings(clock, done, batches.batch, progress)
            run.log(step=done, epoch=epoch, lr=lr, **means, masks_redrawn=progress["masks_redrawn"], bad_files=len(run.bad), **timings)
            bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{timings['time_images_per_second']:.0f}",
                            waiting=f"{timings['time_data_share']:.0%}")

        # evaluate
        if ends or done == batches.stop:
            run.log(step=done, epoch=epoch + ends, **evaluate(args, launch, model, held_out))
            pictures(args, launch, run, model, held_out, done)
            clock["began"] = time.perf_counter()  # held-out time is not training time

        # save
        stop, due = control.agree()
        if ends or stop or due or done == batches.stop or (args.checkpoint_every_steps and done % args.checkpoint_every_steps == 0):
            save(done)
        if stop and done < batches.stop:
            run.checkpoints.wait()
            bar.close()
            launch.say(f"stopped by a signal after step {done}; go on with --resume auto --output {run.folder}")
            return runs.STOPPED
    bar.close()
    run.checkpoints.wait()
    row = next((row for row in reversed(run.rows()) if "eval_error" in row), None)
    if row and launch.first:
        launch.say(f"held-out error on hidden units {row['eval_error']:.4f} (unmixed)"
                   + (f", mix {row['eval_mix_error']:.4f}, sources {row['eval_source_error']:.4f} (mix taken for all: "
                      f"{row['eval_mix_for_all_error']:.4f})" if "eval_mix_error" in row else "")
                   + f"; pictures in {run.folder}")
    return 0


def pictures(args, launch, run, model, held_out, step: int):
    """loss.png and reconstructions.png, from the log and from three held-out composites."""
    if not launch.first:
        return
    indices = (data.uniform(3 * args.sources, "picture") * len(held_out)).astype(int)
    images = read_held_out(held_out, indices, args.image_size)
    images = images[:len(images) // args.sources * args.sources]
    if len(images):
        images = views(args, data.normalise(images.to(launch.device).float()), np.zeros((len(images), 2), int))
        masking = to_device(model.draw(data.generator("picture")), launch.device)
        figure = show.picture(model, images, masking, f"{args.method}, held-out images after step {step}")
        run.write("reconstructions.png", lambda file: show.save(figure, file))
    run.write("loss.png", lambda file: show.save(show.loss_curve(run.rows()), file))


if __name__ == "__main__":
    engine.program(main)
