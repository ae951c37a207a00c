"""Speed, memory and work of eesmm, greenmim and simmim side by side (Fig. 3): whole training steps, interleaved in one run.

    python bench.py                                        Swin-B at 224 px, eesmm, greenmim and simmim
    python bench.py --methods eesmm mae --model vit_base swin_base
    python bench.py --model swin_tiny --batch-size 32 64 --precision bf16 fp32 --compile --mask-ratio 0.6
    python bench.py --parts                                where a step's time goes
    python bench.py --host [--compile]                     what a step asks of the host: launches, copies, graphs, milliseconds; needs no GPU
    python bench.py --peer timm                            also a SimMIM built on timm's encoder, if timm is installed
    python bench.py --dense                                the dense encoder beside torchvision's and timm's, training and inference
    python bench.py --loader DIR [--cache DIR]             the data pipeline beside torchvision's ImageFolder, per core

Methods take turns step by step, so a noisy machine disturbs all alike; a number is the median, its spread the quartiles.
Any flag of train.py goes through to the methods. Writes bench.json and bench.png.
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import encoders
import finetune
import mixing
import train
import weights
from engine import data, dist, flags, plots, rng, runs
from engine.dist import to_device
from engine.errors import UserError
from engine.files import check_output, write_atomically
from engine.optim import TrainStep, check_compiler, count_flops
from engine.timing import (
    Case,
    describe_machine,
    finished_rows,
    format_table,
    interleave,
    loader_rows,
    matmul_case,
    memory_in_use,
    ratios,
    synchronize,
)
from images import open_train_and_val
from images.crops import format_size, to_2tuple
from model import METHODS, from_settings

COLOURS = {"eesmm": "tab:blue", "greenmim": "tab:green", "dense": "tab:blue"}
RATIOS = (
    ("greenmim", "simmim", "visible units only"),
    ("eesmm", "greenmim", "superposition"),
    ("eesmm", "simmim", "both"),
    ("eesmm compiled", "simmim", "both"),
    ("simmim", "simmim on timm", "our SimMIM over the peer's"),
    ("eesmm", "simmim on timm", "both, over the peer"),
    ("eesmm compiled", "simmim on timm", "both, over the peer"),
    ("dense", "torchvision", "dense"),
    ("dense compiled", "torchvision", "dense"),
    ("dense", "timm", "dense"),
)


def savings(rows: list[dict]) -> list[str]:
    """The two savings apart, visible units only and superposition, and what stands beside peers; a line each."""
    return ratios(rows, RATIOS, memory_pair=("eesmm", "simmim"))


# ------------------------------------------------------------------------------------------------ pre-training steps


def training_case(args, distributed, model, forward, row: dict) -> Case:
    """A step as train.py does it: learning rate, forward, backward, clip, optimiser, metrics left on the device. model: with layer_of and undecayed."""
    trainer = TrainStep(args, distributed, model, 10**6, 0, args.base_lr)
    state = {"step": 0}

    def step():
        trainer.set_learning_rate(state["step"])
        loss = forward(trainer, state["step"])
        trainer.backward(loss, {"loss": loss})
        trainer.update()
        state["step"] += 1

    with torch.compiler.set_stance("force_eager"):  # compiled, it could not be counted
        return Case(row, step, count_flops(step))


def method_arguments(method: str, rest: list[str]):
    """train.py's arguments for one method; eesmm splits unless told otherwise: its network then takes the blend apart itself."""
    given = train.arguments(["--recipe", "paper", *rest, "--method", method])
    if method == "eesmm" and "--decomposition" not in rest:
        given.decomposition = "split"
    return given


def method_case(args, distributed, batches=None) -> tuple[Case, callable]:
    """A training step of a method on synthetic images, or on a loader's `batches`; and its parts, for --parts."""
    torch.manual_seed(0)
    model = from_settings(vars(args)).to(distributed.device)
    images = torch.randn(args.batch_size // args.sources, args.sources, *pixels(args), device=distributed.device)
    row = {
        "method": args.method,
        "model": args.model,
        "image_size": args.image_size,
        "precision": precision(distributed),
        "compiled": bool(args.compile),
        "source_images_per_step": args.batch_size,
        "sources": args.sources,
        "gmacs_per_source_image": train.gmacs(model) / args.sources,
    }

    def masking(step):
        return to_device(model.draw(rng.generator(0, "mask", step)), distributed.device, non_blocking=True)

    def inputs():
        if batches is None:
            return images
        batch = next(batches)
        return train.make_views(args, data.prepare_batch(batch, distributed.device, args.image_size), batch["keys"])

    case = training_case(
        args, distributed, model, lambda trainer, step: trainer.forward(inputs(), masking(step)).loss, row
    )
    return case, lambda rounds: parts(args, distributed, model, images, rounds)


def pixels(args) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    return args.channels or 3, *to_2tuple(args.image_size)


def precision(distributed) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(distributed.amp_dtype, "fp32")


def parts(args, distributed, model, images, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of a step, the device waited for after each."""
    trainer, device = TrainStep(args, distributed, model, 10**6, 0, args.base_lr), distributed.device
    batch = {
        "images": torch.zeros(args.batch_size, *pixels(args), dtype=torch.uint8),
        "flip": torch.zeros(args.batch_size, dtype=torch.bool),
    }
    laps, last = {}, time.perf_counter()

    def lap(name):
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        laps.setdefault(name, []).append(1e3 * (now - last))
        last = now

    for step in range(rounds + 1):
        synchronize(device)
        last = time.perf_counter()
        data.prepare_batch(batch, device, args.image_size, *([0.5] * batch["images"].shape[1],) * 2)
        lap("images to the device, normalised")
        masking = model.draw(rng.generator(0, "mask", step))
        lap("mask and plan")
        masking = to_device(masking, device, non_blocking=True)
        lap("plan to the device")
        out = trainer.forward(images, masking)
        lap("forward")
        terms = {"loss": out.loss} | out.losses
        trainer.backward(out.loss, terms)
        lap("backward")
        trainer.update()
        lap("clip, optimiser, metrics")
        # the bookkeeping among it once more, alone
        trainer.set_learning_rate(step)
        trainer.meter = {name: trainer.meter[name] + value.detach().float() for name, value in terms.items()}
        trainer.lost = torch.maximum(trainer.lost, out.loss.detach().isnan().float())
        trainer.failures = torch.stack([trainer.failures[0] + trainer.lost, trainer.failures[1], trainer.failures[2]])
        lap("schedule and metrics")
        trainer.steps_metered = 20
        json.dumps(trainer.read())
        lap("a log line")
    laps["a log line"] = [ms / 20 for ms in laps["a log line"]]  # the usual --log-every
    return {name: float(np.median(times[1:])) for name, times in laps.items()}


# ----------------------------------------------------------------------------------------------------------- peers


def peer_of(encoder, layout: str, window: int, classes: int = 0):
    """timm's or torchvision's encoder of the same shape as ours, without stochastic depth. UserError without timm, or where there is none."""
    module, name, values, settings = weights.peers_model(layout, encoder, classes)
    try:
        still = {
            "stochastic_depth_prob" if layout == "torchvision" else "drop_path_rate": 0.0
        }  # timm's Swin would drop a tenth
        return getattr(importlib.import_module(module), name)(*values, **settings | still)
    except ImportError:
        raise UserError("timm is not installed here: pip install timm") from None


class PeerSimMIM(nn.Module):
    """SimMIM (Xie et al. 2022) around timm's Swin, ViT or Twins: mask token after the patch embedding, 1 x 1 head, L1.

    Axis letters: b images, h w tokens, c channels, i j units.
    """

    undecayed = ()

    def __init__(self, body, encoder):
        super().__init__()
        self.body, self.unit, self.rows = body, encoder.unit, encoder.rows
        self.mask_token = nn.Parameter(torch.zeros(encoder.stem_width))
        self.head = nn.Conv2d(body.num_features, encoder.channels * self.unit**2, 1)

    def masked(self, x, visible):
        """Tokens (b, h, w, c) with those of hidden units replaced by the mask token."""
        cells = visible.view(self.rows, -1)
        cells = cells.repeat_interleave(x.shape[1] // self.rows, 0).repeat_interleave(x.shape[2] // cells.shape[1], 1)
        return torch.where(cells[..., None], x, self.mask_token.to(x.dtype))

    def encode(self, images, visible):
        """The body's tokens after its final norm, (b, c, i, j)."""
        body = self.body
        if hasattr(body, "layers"):  # Swin
            return rearrange(
                body.norm(body.layers(self.masked(body.patch_embed(images), visible))), "b h w c -> b c h w"
            )
        if hasattr(body, "patch_embeds"):  # Twins
            x, size = body.patch_embeds[0](images)
            x = self.masked(x.unflatten(1, size), visible).flatten(1, 2)
            for number, (blocks, positions) in enumerate(zip(body.blocks, body.pos_block)):
                x, size = (
                    (x, size)
                    if number == 0
                    else body.patch_embeds[number](rearrange(x, "b (h w) c -> b c h w", h=size[0]))
                )
                for k, block in enumerate(blocks):
                    x = block(x, size)
                    x = positions(x, size) if k == 0 else x
        else:  # ViT
            x = self.masked(body.patch_embed(images).unflatten(1, (self.rows, -1)), visible).flatten(1, 2)
            x = body.blocks(body._pos_embed(x))[:, 1:]
        return rearrange(body.norm(x), "b (i j) c -> b c i j", i=self.rows)

    def forward(self, images, visible):
        predicted = F.pixel_shuffle(self.head(self.encode(images, visible)), self.unit).float()
        hidden = ~visible.view(1, 1, self.rows, -1).repeat_interleave(self.unit, 2).repeat_interleave(self.unit, 3)
        return ((predicted - images).abs() * hidden).sum() / (hidden.sum() * images.shape[1] * len(images))

    def layer_of(self, name):
        return 0


def peer_case(args, distributed) -> Case:
    """A training step of SimMIM on timm's encoder, same images, mask ratio and optimiser as our simmim."""
    encoder = from_settings(vars(args)).encoder
    model = PeerSimMIM(peer_of(encoder, "timm", args.window), encoder).to(distributed.device)
    images = torch.randn(args.batch_size, *pixels(args), device=distributed.device)

    def forward(trainer, step):
        visible = mixing.draw_masks(1, encoder.units, args.mask_ratio, rng.generator(0, "mask", step))[0]
        return trainer.forward(images, visible.to(distributed.device, non_blocking=True))

    row = {
        "method": "simmim on timm",
        "model": args.model,
        "image_size": args.image_size,
        "precision": precision(distributed),
        "compiled": bool(args.compile),
        "source_images_per_step": args.batch_size,
        "sources": 1,
    }
    with torch.no_grad():
        visible = torch.arange(encoder.units, device=distributed.device) % 2 == 0
        row["gmacs_per_source_image"] = count_flops(lambda: model(images, visible)) / 2e9 / len(images)
    return training_case(args, distributed, model, forward, row)


def dense_cases(args, distributed) -> list[Case]:
    """Classification with 1000 classes: our dense encoder, torchvision's (of a Swin), timm's if installed; a training step and inference."""
    ours = finetune.Classifier(from_settings(vars(args)).encoder, 1000)
    models = {"dense": ours}
    if not args.compile:  # peers are compared as they come
        if args.model.startswith("swin"):
            models["torchvision"] = peer_of(ours.encoder, "torchvision", args.window, 1000)
        try:
            models["timm"] = peer_of(ours.encoder, "timm", args.window, 1000)
        except UserError as error:
            print(f"without timm: {error}", file=sys.stderr)
    images = torch.randn(args.batch_size, *pixels(args), device=distributed.device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=distributed.device)
    cases = []
    for name, model in models.items():
        model.to(distributed.device)
        if name != "dense":
            model.layer_of, model.undecayed = lambda name: 0, ()
        row = {
            "method": name,
            "model": args.model,
            "image_size": args.image_size,
            "precision": precision(distributed),
            "compiled": bool(args.compile),
            "source_images_per_step": args.batch_size,
            "sources": 1,
        }

        def infer(model=model):
            with torch.inference_mode(), distributed.autocast():
                model.eval()(images)
            model.train()

        def forward(trainer, step):
            return F.cross_entropy(trainer.forward(images).float(), labels)

        inference = Case(row | {"mode": "inference"}, infer, count_flops(infer))
        inference.row["gmacs_per_source_image"] = inference.flops / 2e9 / args.batch_size
        case = training_case(
            args,
            distributed,
            model,
            forward,
            row | {"mode": "training", "gmacs_per_source_image": inference.row["gmacs_per_source_image"]},
        )
        cases += [case, inference]
    return cases


# --------------------------------------------------------------------------------------------------------- loader


def fed_rows(args, rest: list[str], images) -> list[dict]:
    """eesmm's training steps on synthetic images and on the loader's, with its usual number of workers, taking turns."""
    args.methods, cases = ["eesmm"], []
    ((_, settings, distributed),) = settings_of(args, rest)
    workers = distributed.num_workers()
    batches = data.Batches(len(images), settings.batch_size, 0, 0, 10**6)
    if batches.steps_per_epoch < 1:
        raise UserError(
            f"--loader: {len(images)} images, fewer than a batch of {settings.batch_size}; try a lower --batch-size"
        )
    for name, source in {
        "synthetic": None,
        f"fed, {workers} workers": iter(
            data.make_loader(
                data.Crops(images, settings.image_size), batches, workers, pin=distributed.device.type == "cuda"
            )
        ),
    }.items():
        case, _ = method_case(settings, distributed, source)
        case.row["mode"] = name
        cases.append(case)
    cases.insert(0, matmul_case(distributed))
    interleave(cases, distributed.device, args.steps)
    return finished_rows(cases)


# --------------------------------------------------------------------------------------------------------- results


def peak_memory(method: str, argv: list[str]) -> int:
    """Bytes that three steps of one method take in a process of their own, those after importing subtracted."""
    done = subprocess.run([sys.executable, __file__, *argv, "--memory-of", method], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{method} in a process of its own: {(done.stderr.strip() or 'killed, out of memory?').splitlines()[-1]}"
        )
    return int(done.stdout.split()[-1])


def arguments(argv=None):
    parser = flags.Parser(
        description="Time the methods side by side.", epilog="Other flags go to train.py's parser.", allow_abbrev=False
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["eesmm", "greenmim", "simmim"],
        help="default: eesmm greenmim simmim",
    )
    parser.add_argument("--model", nargs="+", default=["swin_base"], help="default: swin_base")
    parser.add_argument(
        "--image-size", nargs="+", type=flags.image_size, default=[224], metavar="PX", help="default: 224"
    )
    parser.add_argument(
        "--batch-size",
        nargs="+",
        type=flags.positive_int,
        metavar="N",
        help="source images a step; default: 16, on a GPU 256",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("auto", "fp32", "bf16", "fp16"), default=["auto"], help="default: auto"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--compile", action="store_true", help="each method also compiled")
    parser.add_argument("--steps", type=flags.positive_int, default=10, metavar="N", help="timed rounds; default: 10")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave peak memory out, which takes a process per method"
    )
    parser.add_argument("--parts", action="store_true", help="break a step into its parts instead")
    parser.add_argument(
        "--host",
        action="store_true",
        help="count instead what a step asks of the host; under torchrun the exchange too",
    )
    parser.add_argument("--peer", choices=("timm",), help="add a SimMIM built on another library's encoder")
    parser.add_argument("--dense", action="store_true", help="time the dense encoder as a classifier instead")
    parser.add_argument("--loader", metavar="DIR", help="time the data pipeline on this folder of images instead")
    parser.add_argument("--cache", metavar="DIR", help="with --loader: also from a decoded cache kept there")
    parser.add_argument("--output", default="bench.json", help="default: bench.json; the chart goes beside it")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_known_args(argv)


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args, rest = arguments(argv)
    output = check_output(args.output, (".json",))
    chart = check_output(str(output.with_suffix(".png")), (".png",))
    distributed = dist.initialize(args.device, "auto")
    device = distributed.device
    if args.memory_of:
        print(memory_child(args, rest))
        return 0
    if args.compile:
        check_compiler(device)
    result = {"machine": describe_machine(device), **runs.provenance(["bench.py", *argv]), "versions": dist.versions()}
    if args.loader:
        images, _, _ = open_train_and_val(args.loader)
        result["rows"] = loader_rows(images, args.cache, args.image_size[0], args.steps) + fed_rows(args, rest, images)
    elif args.host:
        from experiments import host  # it patches private functions of torch

        result["host"] = [
            host.count(settings, one)
            for _, settings, one in settings_of(args, rest)
            if bool(settings.compile) == bool(args.compile)
        ]
        if not distributed.is_main:
            return 0
        print(format_table(result["host"]))
    elif args.parts:
        result["parts"] = {
            method: method_case(settings, distributed)[1](args.steps)
            for method, settings, distributed in settings_of(args, rest)
        }
        for method, times in result["parts"].items():
            print(
                f"{method}: {sum(times.values()):.1f} ms a step\n"
                + "\n".join(f"  {ms:9.2f} ms {ms / sum(times.values()):6.1%}  {name}" for name, ms in times.items())
            )
    else:
        result |= timed(args, rest, device)
    if "rows" in result:
        print("\n".join([format_table(result["rows"]), *savings(result["rows"])]))
    write_atomically(output, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
    bars = [row for row in result.get("rows", []) if "method" in row]
    if bars:
        write_atomically(chart, lambda file: plots.save(plots.speed_bars(bars, result["machine"], COLOURS), file))
    return 0


def can_partition(model: str) -> bool:
    """Whether an encoder can be trained by mixmae."""
    with torch.device("meta"):
        return getattr(encoders.make(model), "partitions", False)


def settings_of(args, rest: list[str]):
    """(method, train.py's arguments, distributed) of everything asked for."""
    for model, size in product(args.model, args.image_size):
        with torch.device("meta"):
            encoders.make(model, image_size=size)  # refuses what cannot be built before anything is measured
    for model, size, precision, compiled in product(
        args.model, args.image_size, args.precision, (False, True) if args.compile else (False,)
    ):
        distributed = dist.initialize(args.device, precision)
        for batch in args.batch_size or [256 if distributed.device.type == "cuda" else 16]:
            for method in ["simmim"] if args.dense else args.methods:
                words = [
                    "--model",
                    model,
                    "--image-size",
                    format_size(size),
                    "--batch-size",
                    str(batch),
                    *["--compile"] * compiled,
                ]
                if len(args.model) > 1 and method == "mixmae" and not can_partition(model):
                    continue  # of several encoders those that can
                settings = method_arguments(method, [*words, *rest])
                if settings.batch_size % settings.sources:
                    raise UserError(f"--batch-size {settings.batch_size}: not a multiple of {settings.sources} sources")
                yield method, settings, distributed


def timed(args, rest, device) -> dict:
    """rows, and the matrix-multiply rate that shares refer to; settings one after the other, methods of one interleaved."""
    rows, rates, groups, memory = [], {}, {}, {}
    for method, settings, distributed in settings_of(args, rest):
        key = (settings.model, settings.image_size, precision(distributed), settings.batch_size)
        groups.setdefault(key, []).append((method, settings, distributed))
        if not args.no_memory and not args.dense:  # before this process itself takes any
            memory[key, method, bool(settings.compile)] = peak_memory(
                method,
                [
                    "--model",
                    key[0],
                    "--image-size",
                    format_size(key[1]),
                    "--precision",
                    key[2],
                    "--batch-size",
                    str(key[3]),
                    "--device",
                    args.device,
                    *["--compile"] * settings.compile,
                    *rest,
                ],
            )
    for key, members in groups.items():
        cases = [matmul_case(members[0][2])]
        for method, settings, distributed in members:
            if args.dense:
                cases += dense_cases(settings, distributed)
                continue
            cases.append(method_case(settings, distributed)[0])
            if method == "simmim" and args.peer and not settings.compile:
                cases.append(peer_case(settings, distributed))
        interleave(cases, device, args.steps)
        rates[key[2]] = cases[0].flops / float(np.median(cases[0].seconds))
        rows += [
            row | {"peak_memory_bytes": memory.get((key, row["method"], row["compiled"]))}
            for row in finished_rows(cases)
        ]
        del cases
        gc.collect()
    return {"matmul_flops_per_second": rates, "rows": rows}


def memory_child(args, rest) -> int:
    """Three steps of one method, in a process that does nothing else."""
    args.methods = [args.memory_of]
    _, settings, distributed = list(settings_of(args, rest))[-1]
    before = memory_in_use(distributed.device, peak=False)
    case, _ = method_case(settings, distributed)
    if distributed.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # counting the work has run a step that is not compiled
    for _ in range(2):
        case.step()
    synchronize(distributed.device)
    return memory_in_use(distributed.device, peak=True) - before


if __name__ == "__main__":
    dist.run_main(main)
