"""Measure speed, memory and compute of EESMM, GreenMIM and SimMIM side by side (Fig. 3), in whole training steps.

    python bench.py                                        Swin-B at 224 px, eesmm, greenmim and simmim
    python bench.py --methods eesmm mae --model vit_base swin_base
    python bench.py --model swin_tiny --batch-size 32 64 --precision bf16 fp32 --compile --mask-ratio 0.6
    python bench.py --parts                                the time of each part of a step
    python bench.py --host [--compile]                     launches, copies and graphs of a step; needs no GPU
    python bench.py --peer timm                            also a SimMIM built on timm's encoder, if timm is installed
    python bench.py --dense                                dense encoders of this project, torchvision and timm
    python bench.py --loader DIR [--cache DIR]             the data pipeline and torchvision's ImageFolder, per core

The methods take turns step by step, so that a noisy machine disturbs all of them alike. A time is the median over the
rounds; its spread is the two quartiles. Any flag of train.py is passed on to the methods. The results are written to
bench.json and bench.png.
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from itertools import count, product

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
from engine.flags import select
from engine.optim import StepConfig, TrainStep, check_compiler, count_flops
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
    """A line for each measured pair of RATIOS: the gains from visible-only encoding and from superposition."""
    return ratios(rows, RATIOS, memory_pair=("eesmm", "simmim"))


# ------------------------------------------------------------------------------------------------ pre-training steps


def make_row(args, distributed, method: str, sources: int = 1, **fields) -> dict:
    """The fields of a row of bench.json that are known before anything is timed. fields: others of the row."""
    return {
        "method": method,
        "model": args.model,
        "image_size": args.image_size,
        "precision": precision(distributed),
        "compiled": bool(args.compile),
        "source_images_per_step": args.batch_size,
        "sources": sources,
        "peak_memory_bytes": None,
        **fields,
    }


def training_case(args, distributed, model, forward, row: dict) -> Case:
    """A training step as train.py does it: learning rate, forward, backward, clipping, optimiser, metrics.

    Args:
        model: what TrainStep trains; it has `layer_of` and `undecayed`.
        forward: called with the TrainStep and the number of the step; returns the loss.
        row: see `make_row`.
    """
    trainer = TrainStep(select(StepConfig, vars(args)), distributed, model, 10**6, 0, args.base_lr)
    numbers = count()

    def step():
        number = next(numbers)
        trainer.set_learning_rate(number)
        loss = forward(trainer, number)
        trainer.backward(loss, {"loss": loss})
        trainer.update()

    with torch.compiler.set_stance("force_eager"):  # operations of a compiled step cannot be counted
        return Case(row, step, count_flops(step))


def method_arguments(method: str, rest: list[str]):
    """train.py's arguments for one method.

    EESMM uses `split` unless a flag says otherwise, because its network then separates the images itself.
    """
    args = train.arguments(["--recipe", "paper", *rest, "--method", method])
    if method == "eesmm" and "--decomposition" not in rest:
        args.decomposition = "split"
    return args


def synthetic_images(args, distributed, sources: int = 1) -> torch.Tensor:
    """Noise in place of the normalised images of a step, (b, n, c, h, w) for n source images in a mixed image."""
    return torch.randn(args.batch_size, *image_shape(args), device=distributed.device).unflatten(0, (-1, sources))


def method_model(args, distributed):
    """The model of a method, always with the same weights."""
    torch.manual_seed(0)
    return from_settings(vars(args)).to(distributed.device)


def method_case(args, distributed, batches=None) -> Case:
    """A training step of a method. batches: an iterator of a loader's batches; None: synthetic images."""
    model = method_model(args, distributed)
    images = synthetic_images(args, distributed, args.sources)
    gmacs = train.gmacs(model) / args.sources

    def forward(trainer, step):
        inputs = images
        if batches is not None:
            batch = next(batches)
            inputs = data.prepare_batch(batch, distributed.device, args.image_size)
            inputs = train.make_views(args, inputs, batch["keys"])
        masking = model.draw(rng.generator(0, "mask", step))
        return trainer.forward(inputs, to_device(masking, distributed.device, non_blocking=True)).loss

    row = make_row(args, distributed, args.method, args.sources, gmacs_per_source_image=gmacs)
    return training_case(args, distributed, model, forward, row)


def image_shape(args) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    return args.channels or 3, *to_2tuple(args.image_size)


def precision(distributed) -> str:
    """The precision of autocast, as --precision names it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(distributed.amp_dtype, "fp32")


def time_parts(args, distributed, rounds: int) -> dict[str, float]:
    """Median milliseconds of each part of a method's training step. After each part the host waits for the device."""
    model, device = method_model(args, distributed), distributed.device
    images = synthetic_images(args, distributed, args.sources)
    trainer = TrainStep(select(StepConfig, vars(args)), distributed, model, 10**6, 0, args.base_lr)
    batch = {
        "images": torch.zeros(args.batch_size, *image_shape(args), dtype=torch.uint8),
        "flip": torch.zeros(args.batch_size, dtype=torch.bool),
    }
    mean_and_std = [(0.5,) * batch["images"].shape[1]] * 2
    times, last = {}, 0.0

    def lap(name):
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        times.setdefault(name, []).append(1e3 * (now - last))
        last = now

    for step in range(rounds + 1):
        synchronize(device)
        last = time.perf_counter()
        data.prepare_batch(batch, device, args.image_size, *mean_and_std)
        lap("images to the device, normalised")
        masking = model.draw(rng.generator(0, "mask", step))
        lap("mask and plan")
        masking = to_device(masking, device, non_blocking=True)
        lap("plan to the device")
        out = trainer.forward(images, masking)
        lap("forward")
        trainer.backward(out.loss, {"loss": out.loss} | out.losses)
        lap("backward")
        trainer.update()
        lap("clip, optimiser, metrics")
        trainer.set_learning_rate(step)
        lap("learning rate")
        json.dumps(trainer.read())
        lap("a log line")
    times["a log line"] = [ms / 20 for ms in times["a log line"]]  # it is written every 20 steps by default
    return {name: float(np.median(laps[1:])) for name, laps in times.items()}  # the first step fills caches


# ----------------------------------------------------------------------------------------------------------- peers


def peer_of(encoder, layout: str, classes: int = 0):
    """An encoder of another library with the same shape, without stochastic depth.

    Args:
        encoder: the encoder of this project.
        layout: "timm" or "torchvision".
        classes: of its classifier; 0: none.

    Raises:
        UserError: timm is not installed, or the library has no such encoder.
    """
    module, name, values, settings = weights.peers_model(layout, encoder, classes)
    # timm's Swin would drop a tenth of its paths by default
    drop_path = "stochastic_depth_prob" if layout == "torchvision" else "drop_path_rate"
    try:
        return getattr(importlib.import_module(module), name)(*values, **settings | {drop_path: 0.0})
    except ImportError:
        raise UserError("timm is not installed here: pip install timm") from None


class PeerSimMIM(nn.Module):
    """SimMIM (Xie et al. 2022) around timm's Swin, ViT or Twins: masked after the patch embedding, 1 x 1 head, L1 loss.

    A forward hook on timm's patch embedding replaces the masked tokens; all the rest of the encoder is timm's own.
    """

    undecayed = ()

    def __init__(self, body, encoder):
        super().__init__()
        self.body, self.unit, self.rows, self.units = body, encoder.unit, encoder.rows, encoder.units
        self.mask_token = nn.Parameter(torch.zeros(encoder.stem_width))
        self.head = nn.Conv2d(body.num_features, encoder.channels * self.unit**2, 1)
        embedding = body.patch_embeds[0] if hasattr(body, "patch_embeds") else body.patch_embed  # Twins has one a stage
        embedding.register_forward_hook(self.insert_mask_tokens)

    def insert_mask_tokens(self, embedding, inputs, output):
        """The tokens of the patch embedding with the masked ones replaced by the mask token.

        They are (b, h, w, c) in a Swin and (b, h * w, c) in the others. Twins returns them with their height and width.
        """
        tokens = output[0] if isinstance(output, tuple) else output
        shape = tokens.shape[1:-1]
        factor = round((shape.numel() / self.units) ** 0.5)  # tokens along a side of a unit
        visible = mixing.upsample_mask(self.visible[None], self.rows, factor).view(*shape, 1)
        tokens = torch.where(visible, tokens, self.mask_token.to(tokens.dtype))
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def forward(self, images, visible):
        """The loss on masked pixels of images (b, c, h, w). visible: (units,) bool."""
        self.visible = visible
        tokens = self.body.forward_features(images).flatten(1, -2)[:, -self.units :]  # without a ViT's class token
        features = rearrange(tokens, "b (i j) c -> b c i j", i=self.rows)
        predicted = F.pixel_shuffle(self.head(features), self.unit).float()
        hidden = mixing.mask_pixels(torch.ones_like(predicted[:1, :1]), ~visible, self.unit)
        return ((predicted - images).abs() * hidden).sum() / (hidden.sum() * images.shape[1] * len(images))

    def layer_of(self, name):
        return 0


def peer_case(args, distributed) -> Case:
    """A training step of SimMIM on timm's encoder, with the images, mask ratio and optimiser of our simmim."""
    encoder = from_settings(vars(args)).encoder
    model = PeerSimMIM(peer_of(encoder, "timm"), encoder).to(distributed.device)
    images = synthetic_images(args, distributed)[:, 0]

    def draw(step):
        visible = mixing.draw_masks(1, encoder.units, args.mask_ratio, rng.generator(0, "mask", step))[0]
        return visible.to(distributed.device, non_blocking=True)

    with torch.no_grad():
        gmacs = count_flops(lambda: model(images, draw(0))) / 2e9 / len(images)
    row = make_row(args, distributed, "simmim on timm", gmacs_per_source_image=gmacs)
    return training_case(args, distributed, model, lambda trainer, step: trainer.forward(images, draw(step)), row)


def dense_cases(args, distributed) -> list[Case]:
    """Classification with 1000 classes by dense encoders: for each a training step and inference.

    The encoders are ours, torchvision's if it is a Swin, and timm's if timm is installed.
    """
    ours = finetune.Classifier(from_settings(vars(args)).encoder, 1000)
    models = {"dense": ours}
    if not args.compile:  # encoders of other libraries are measured as they come
        if args.model.startswith("swin"):
            models["torchvision"] = peer_of(ours.encoder, "torchvision", 1000)
        try:
            models["timm"] = peer_of(ours.encoder, "timm", 1000)
        except UserError as error:
            print(f"without timm: {error}", file=sys.stderr)
    images = synthetic_images(args, distributed)[:, 0]
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=distributed.device)
    cases = []
    for name, model in models.items():
        model.to(distributed.device)
        if name != "dense":
            model.layer_of, model.undecayed = lambda name: 0, ()

        def infer(model=model):
            with torch.inference_mode(), distributed.autocast():
                model.eval()(images)
            model.train()

        def forward(trainer, step):
            return F.cross_entropy(trainer.forward(images).float(), labels)

        flops = count_flops(infer)
        row = make_row(args, distributed, name, gmacs_per_source_image=flops / 2e9 / args.batch_size)
        cases.append(training_case(args, distributed, model, forward, row | {"mode": "training"}))
        cases.append(Case(row | {"mode": "inference"}, infer, flops))
    return cases


# --------------------------------------------------------------------------------------------------------- loader


def fed_rows(args, rest: list[str], images) -> list[dict]:
    """EESMM's training steps on synthetic images and on a loader's batches, with the usual number of workers."""
    ((_, settings, distributed),) = settings_of(args, rest, ["eesmm"])
    workers = distributed.num_workers()
    batches = data.BatchSampler(len(images), settings.batch_size, 0, 0, 10**6)
    if batches.steps_per_epoch < 1:
        raise UserError(
            f"--loader: {len(images)} images are fewer than a batch of {settings.batch_size}; try a lower --batch-size"
        )
    crops = data.Crops(images, settings.image_size)
    loader = data.make_loader(crops, batches, workers, pin=distributed.device.type == "cuda")
    synthetic, fed = method_case(settings, distributed), method_case(settings, distributed, iter(loader))
    synthetic.row["mode"], fed.row["mode"] = "synthetic", f"fed, {workers} workers"
    cases = [matmul_case(distributed), synthetic, fed]
    interleave(cases, distributed.device, args.steps)
    return finished_rows(cases)


# --------------------------------------------------------------------------------------------------------- results


def peak_memory(args, rest: list[str], settings, precision: str) -> int:
    """Bytes that three training steps of a method take at most, without the bytes in use before.

    They are measured in a process of their own, because the peak of a process never falls again.
    """
    words = ["--model", settings.model, "--image-size", format_size(settings.image_size), "--precision", precision]
    words += ["--batch-size", str(settings.batch_size), "--device", args.device, *["--compile"] * settings.compile]
    command = [sys.executable, __file__, *words, *rest, "--memory-of", settings.method]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip() or "killed, out of memory?").splitlines()[-1]
        raise UserError(f"{settings.method} in a process of its own: {reason}")
    return int(process.stdout.split()[-1])


def measure_memory(args, rest: list[str]) -> int:
    """What the process that `peak_memory` starts does: the bytes that three training steps of --memory-of take."""
    *_, (_, settings, distributed) = settings_of(args, rest, [args.memory_of])  # the last one, compiled with --compile
    before = memory_in_use(distributed.device, peak=False)
    case = method_case(settings, distributed)  # runs a first step, not compiled, to count its operations
    if distributed.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        case.step()
    synchronize(distributed.device)
    return memory_in_use(distributed.device, peak=True) - before


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
        help="source images per step; default: 16, on a GPU 256",
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("auto", "fp32", "bf16", "fp16"), default=["auto"], help="default: auto"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--compile", action="store_true", help="measure each method also with torch.compile")
    parser.add_argument("--steps", type=flags.positive_int, default=10, metavar="N", help="timed rounds; default: 10")
    parser.add_argument(
        "--no-memory", action="store_true", help="skip peak memory, which is measured in a process per method"
    )
    parser.add_argument("--parts", action="store_true", help="time each part of a step instead")
    parser.add_argument(
        "--host",
        action="store_true",
        help="count what a step needs of the host instead; under torchrun also the exchange of requests",
    )
    parser.add_argument("--peer", choices=("timm",), help="add a SimMIM built on another library's encoder")
    parser.add_argument("--dense", action="store_true", help="time the dense encoder as a classifier instead")
    parser.add_argument("--loader", metavar="DIR", help="time the data pipeline on this folder of images instead")
    parser.add_argument(
        "--cache", metavar="DIR", help="with --loader: also from a cache of decoded images in this folder"
    )
    parser.add_argument(
        "--output", default="bench.json", help="default: bench.json; the chart has the same name with .png"
    )
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
        print(measure_memory(args, rest))
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
            method: time_parts(settings, distributed, args.steps)
            for method, settings, distributed in settings_of(args, rest)
        }
        for method, times in result["parts"].items():
            total = sum(times.values())
            print(f"{method}: {total:.1f} ms a step")
            for name, ms in times.items():
                print(f"  {ms:9.2f} ms {ms / total:6.1%}  {name}")
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


def settings_of(args, rest: list[str], methods=None):
    """Every configuration that the command line asks for: (method, train.py's arguments, distributed).

    Args:
        args: of this program.
        rest: flags that are passed on to train.py.
        methods: default: --methods.
    """
    methods = methods or (["simmim"] if args.dense else args.methods)
    for model, size in product(args.model, args.image_size):
        with torch.device("meta"):
            encoders.make(model, image_size=size)  # an encoder that cannot be built fails before anything is measured
    for model, size, precision, compiled in product(
        args.model, args.image_size, args.precision, (False, True) if args.compile else (False,)
    ):
        distributed = dist.initialize(args.device, precision)
        for batch in args.batch_size or [256 if distributed.device.type == "cuda" else 16]:
            for method in methods:
                if len(args.model) > 1 and method == "mixmae" and not can_partition(model):
                    continue  # with several encoders, mixmae is measured on those that it can train
                words = ["--model", model, "--image-size", format_size(size), "--batch-size", str(batch)]
                settings = method_arguments(method, [*words, *["--compile"] * compiled, *rest])
                if settings.batch_size % settings.sources:
                    raise UserError(f"--batch-size {settings.batch_size}: not a multiple of {settings.sources} sources")
                yield method, settings, distributed


def timed(args, rest: list[str], device) -> dict:
    """The rows of all configurations, and the rate of a matrix product in each precision, which shares refer to.

    Methods that differ in nothing else take turns; one group of such methods is measured after the other.
    """
    groups, rows, rates = {}, [], {}
    for method, settings, distributed in settings_of(args, rest):
        memory = None
        if not args.no_memory and not args.dense:  # measured before this process uses the device itself
            memory = peak_memory(args, rest, settings, precision(distributed))
        key = (settings.model, settings.image_size, precision(distributed), settings.batch_size)
        groups.setdefault(key, []).append((method, settings, distributed, memory))
    for (*_, amp, _), members in groups.items():
        cases = [matmul_case(members[0][2])]
        for method, settings, distributed, memory in members:
            if args.dense:
                cases += dense_cases(settings, distributed)
                continue
            cases.append(method_case(settings, distributed))
            cases[-1].row["peak_memory_bytes"] = memory
            if method == "simmim" and args.peer and not settings.compile:
                cases.append(peer_case(settings, distributed))
        interleave(cases, device, args.steps)
        rates[amp] = cases[0].flops / float(np.median(cases[0].seconds))
        rows += finished_rows(cases)
        del cases
        gc.collect()
    return {"matmul_flops_per_second": rates, "rows": rows}


if __name__ == "__main__":
    dist.run_main(main)
