"""What train.py and finetune.py share: launch, precision, schedule, optimiser, one training step's parts.

Nothing here knows of Swin or of masks. Flags are in flags.py, files that a run writes in runs.py.
"""
import ctypes
import math
import os
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from images import DataError


class UserError(Exception):
    """Something a person can mend; ends the program with one line and exit status 2."""


class Unbroken:
    """A text stream whose writes never raise: a full disk under `> output.txt` should not end a run of a week."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # a file's name need not fit the terminal's encoding

    def write(self, text):
        with suppress(OSError):
            return self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def program(main):
    """Run main() with a person's errors as one line on stderr and exit status 2."""
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code
    except (UserError, DataError, OSError) as error:
        status = fail(str(error))
    except torch.cuda.OutOfMemoryError:
        status = fail("the GPU's memory is full: halve --batch-size and double --accumulate (same effective batch), or "
                      "add --activation-checkpointing")
    if dist.is_initialized():
        if status == 2:
            leave(status)
        dist.destroy_process_group()
    sys.exit(status)


def leave(status: int):
    """Exit while other processes may wait for this one in a collective: NCCL's tear-down would wait for them in turn."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # that is being written
            thread.join()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def fail(message: str) -> int:
    print(f"{os.path.basename(sys.argv[0])}: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2


# ------------------------------------------------------------------------------------------- launch and precision

@dataclass
class Launch:
    """Where this process runs. amp: the autocast type, None for fp32. patient: a group that waits for days."""
    device: torch.device
    rank: int = 0
    world: int = 1
    amp: torch.dtype | None = None
    patient: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def say(self, *words):
        if self.first:
            print(*words, flush=True)

    def autocast(self):
        return torch.autocast(self.device.type, self.amp) if self.amp else nullcontext()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value) -> list:
        """Everybody's `value`, a small picklable object, in order of rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gather_first(self, value) -> list | None:
        """Everybody's `value` on the first process, in order of rank; None on the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else None
        dist.gather_object(value, values, group=self.patient)
        return values

    def together(self, function, *arguments):
        """function(*arguments) on the first process, however long; its result, or the person's error it ended in, on all."""
        result, error = None, None
        if self.first:
            try:
                result = function(*arguments)
            except (UserError, DataError, OSError) as failure:
                error = str(failure)
        if self.world > 1:
            values = [(result, error)]
            dist.broadcast_object_list(values, group=self.patient)
            result, error = values[0]
        if error:
            if self.first:
                raise UserError(error)
            sys.exit(2)  # the first process says why
        return result


def launch(device: str, precision: str) -> Launch:
    """Join the processes of torchrun, if it started us, and settle device and precision."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        check_gpu(local)
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
        # evaluation computes as training does: these two serve only passes without gradients
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.mha.set_fastpath_enabled(False)
    else:
        keep_freed_memory()
    patient = None
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))  # a cache of ImageNet takes longer than the usual 30 minutes
    where = torch.device(device, local) if device == "cuda" else torch.device(device)
    return Launch(where, rank, world, amp_type(device, precision), patient)


def keep_freed_memory():
    """Let glibc reuse what a step frees; handing it back to the kernel and faulting it in again costs 6 % of a step."""
    with suppress(AttributeError, OSError):  # another C library: nothing to set
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)      # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD


def check_gpu(local: int):
    """UserError unless the GPU is there and this build of torch has code for it."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if local >= torch.cuda.device_count():
        raise UserError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
                        f"use --nproc_per_node={torch.cuda.device_count()}")
    capability = torch.cuda.get_device_capability(local)
    if not gpu_supported(capability, torch.cuda.get_arch_list()):
        raise UserError(f"this build of torch ({torch.__version__}) has no code for {torch.cuda.get_device_name(local)} "
                        f"(sm_{capability[0]}{capability[1]}), only for {' '.join(torch.cuda.get_arch_list())}: install "
                        "a build for it (README, Install; V100: CUDA 12.6)")


def gpu_supported(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for one of `built_for` ("sm_90", "compute_80") runs on a GPU of this capability.

    Machine code runs on its own major version from its minor version on; intermediate code on anything later.
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        if kind not in ("sm", "compute"):  # another maker's names: nothing to say against it
            return True
        major, minor = int(digits.rstrip("af")[:-1]), int(digits.rstrip("af")[-1])
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or \
                (kind == "compute" and (major, minor) <= tuple(capability)):
            return True
    return False


def amp_type(device: str, precision: str) -> torch.dtype | None:
    if precision == "auto":
        if device != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision fp16 needs a GPU; on {device} use fp32 or bf16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


# ----------------------------------------------------------------------------------------- schedule and optimiser

def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, start: float, end: float) -> float:
    """Linear from `start` to `peak` in warmup_steps, then a cosine to `end` at `steps`: a pure function of the step."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, layer_of, weight_decay: float, layer_decay: float) -> list[dict]:
    """One group per (layer, decayed or not), its `scale` being layer_decay^(layers above it).

    layer_of: parameter name to layer number. Biases, norms and tokens (all with fewer than two axes) and relative
    position tables are not decayed.
    """
    groups, top = {}, max(layer_of(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(".table")
        layer = layer_of(name) if layer_decay != 1 else top  # alike layers in one group: a group costs kernel launches
        group = groups.setdefault((layer, decayed), dict(
            params=[], names=[], layer=layer, scale=layer_decay ** (top - layer), weight_decay=weight_decay * decayed))
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm of all gradients together, (). On a CPU dot products take half the time of torch's own norms."""
    if gradients[0].device.type == "cpu":
        return torch.stack([gradient.flatten().dot(gradient.flatten()) for gradient in gradients]).sum().sqrt()
    return nn.utils.get_total_norm(gradients)


class Trainer:
    """The parts of a training step, between the loop that names them and torch.

    One optimiser step is: set_learning_rate, then for each micro-batch `backward`, then `update`. Loss terms, gradient
    norm and counters stay on the device until `read`. A step whose loss or gradient is not finite changes nothing and
    is counted; fp16 steps that the loss scaler skips are its ordinary work and are not.
    """

    def __init__(self, args, launch: Launch, model: nn.Module, steps: int, warmup_steps: int, peak_lr: float):
        self.args, self.launch, self.model = args, launch, model
        self.schedule = dict(steps=steps, warmup_steps=warmup_steps, peak=peak_lr, start=min(args.warmup_lr, peak_lr),
                             end=min(args.min_lr, peak_lr))
        groups = parameter_groups(model, model.layer_of, args.weight_decay, args.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=tuple(args.betas), eps=args.adam_eps, fused=True)
        self.scaler = torch.amp.GradScaler(launch.device.type, enabled=launch.amp == torch.float16)
        self.parallel = model
        if launch.world > 1:
            arguments = signature(DistributedDataParallel).parameters  # renamed in torch 2.13
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
            self.parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, **{buffers: False},
                                                    device_ids=[launch.device] if launch.device.type == "cuda" else None)
        self.micro = 0
        self.lost = torch.zeros((), device=launch.device)  # whether a loss of this step was not finite
        self.meter = {}  # name: sum since the last log line, on the device; part of a checkpoint
        self.failures = torch.zeros(3, device=launch.device)  # all skipped steps, those in a row now, the longest row
        self.steps_metered = 0

    def set_learning_rate(self, step: int) -> float:
        lr = learning_rate(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        return lr

    def forward(self, *inputs):
        """The model's output under autocast; gradients are exchanged only in the last micro-step's backward pass."""
        self.micro += 1
        if self.launch.world > 1:
            self.parallel.require_backward_grad_sync = self.micro == self.args.accumulate
        with self.launch.autocast():
            return self.parallel(*inputs)

    def backward(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]):
        """Add this micro-batch's gradient. terms: what to log, by name, scalars on the device."""
        # a loss that is not finite makes the gradient so, on every process, and one test of the gradient finds both
        seed = torch.where(loss.detach().isfinite(), 1.0, float("nan")) / self.args.accumulate
        self.lost = torch.maximum(self.lost, seed.isnan().float())
        (self.scaler.scale(loss) if self.scaler.is_enabled() else loss).backward(seed.to(loss.dtype))
        for name, value in terms.items():
            value = value.detach().float() / self.args.accumulate
            self.meter[name] = self.meter[name] + value if name in self.meter else value

    @torch.no_grad()
    def update(self):
        """Clip the whole gradient, step unless it is not finite, forget it. Never waits for the device."""
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = total_norm([p.grad for p in parameters])
        if self.scaler.is_enabled():
            if self.args.clip:
                nn.utils.clip_grads_with_norm_(parameters, self.args.clip, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            bad = self.launch.sum(self.lost).clamp(max=1)  # the gradient may overflow, as is the scaler's way; no loss should
        else:
            bad = (~norm.isfinite()).float()
            self.optimizer.found_inf = bad  # the fused step reads it on the device and leaves all as it was
            if self.args.clip:  # and divides by this, which spares clipping's pass over all gradients: 2 % of a step
                self.optimizer.grad_scale = ((norm + 1e-6) / self.args.clip).clamp(min=1)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.launch.world == 1)
        row = (self.failures[1] + 1) * bad
        self.failures = torch.stack([self.failures[0] + bad, row, torch.maximum(self.failures[2], row)])
        self.meter["grad_norm"] = self.meter["grad_norm"] + norm if "grad_norm" in self.meter else norm
        self.lost = torch.zeros_like(self.lost)
        self.micro = 0
        self.steps_metered += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading, over steps and processes; waits for the device."""
        names = sorted(self.meter)
        values = self.launch.sum(torch.stack([self.meter[name].cpu().double() for name in names]))
        means = dict(zip(names, (values / self.launch.world / self.steps_metered).tolist()))
        self.meter, self.steps_metered = {}, 0
        return means | {"skipped_steps": int(self.failures[0])}

    def check_failures(self, step: int, means: dict):
        """UserError once ten steps in a row have failed, or the loss scale has sunk to nothing; waits for the device."""
        if self.failures[2] >= 10 or self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "skipped_steps")
            raise UserError(f"ten steps in a row had a loss or gradient that is not finite, up to step {step}, learning "
                            f"rate {learning_rate(step - 1, **self.schedule):.3g} ({terms}); the last good checkpoint is "
                            "kept. Try a lower --base-lr, a longer --warmup-epochs, or --precision fp32")

    def state(self) -> dict:
        """Everything that the next step depends on besides the model. All processes call it together."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "failures": self.failures,
                "meters": self.launch.gather({name: float(value) for name, value in self.meter.items()}),
                "steps_metered": self.steps_metered}

    def load(self, state: dict):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.failures = state["failures"].to(self.launch.device)
        self.failures[2] = self.failures[1]  # what an earlier row did not end should not end this run
        self.steps_metered = state["steps_metered"]
        meters = state["meters"]
        if len(meters) == self.launch.world:
            mine = meters[self.launch.rank]
        else:  # another number of processes: each goes on with the mean
            mine = {name: sum(meter[name] for meter in meters) / len(meters) for name in meters[0]}
        self.meter = {name: torch.tensor(value, device=self.launch.device) for name, value in mine.items()}


def micro_batches(batches, count: int, clock: dict):
    """The next `count` of an iterator's batches; the time spent waiting for them is added to clock["data"]."""
    for _ in range(count):
        began = time.perf_counter()
        try:
            batch = next(batches)
        except DataError as error:  # from a worker it comes with a traceback, its own last line is the message
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError("a loader process was killed, most likely for want of memory or shared memory (in a container: "
                            "--shm-size): use fewer --workers") from None
        clock["data"] += time.perf_counter() - began
        yield batch


def timings(clock: dict, step: int, batch: int, progress: dict) -> dict:
    """Fields of a log line since the line before: names begin with time_, for they differ from run to run."""
    now = time.perf_counter()
    seconds, steps = now - clock["began"], step - clock["steps"]
    progress["seconds"] += seconds
    fields = {"time_images_per_second": round(batch * steps / seconds, 2), "time_step_ms": round(1e3 * seconds / steps, 2),
              "time_data_share": round(clock["data"] / seconds, 4), "time_training_seconds": round(progress["seconds"], 2)}
    clock.update(data=0.0, began=now, steps=step)
    return fields


def counted(step) -> float:
    """Floating-point operations of one call, as they run: matrix products and attention, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return float(counter.get_total_flops())


def compile_blocks(model: nn.Module, kind: type):
    """torch.compile every module of a kind in place; shapes are static, so each kind of block compiles once per shape."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # it would cut blocks in two, for the sake of models compiled whole
    for module in model.modules():
        if isinstance(module, kind):
            module.compile(dynamic=False)


def versions() -> dict:
    """Plain strings: torch.__version__ itself is an object that a safe load refuses."""
    import torchvision
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
