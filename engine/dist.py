"""Processes and devices: a person's errors as one line, torchrun's ranks, the GPU, precision, tensors on their way there."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
import torchvision

from engine.errors import DataError, UserError, warn


class SafeStream:
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


def run_main(main):
    """Run main() to the process's end: status 2 and one line on stderr for a person's errors, 130 and one line for Ctrl-C, 1 and
    the traceback for anything else."""
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one changes nothing any more
        status = fail("stopped by Ctrl-C", 130)
    except (UserError, DataError, OSError) as error:
        status = fail(str(error))
    except torch.cuda.OutOfMemoryError:
        status = fail(
            "the GPU's memory is full: halve --batch-size and double --accumulate (same effective batch), or "
            "add --activation-checkpointing"
        )
    except Exception as error:
        if "DataLoader worker (pid" in str(error):  # torch's words, raised from a signal's handler, anywhere
            status = fail(
                "a loader process was killed, most likely for want of memory or shared memory (in a container: --shm-size): "
                "use fewer --workers"
            )
        elif dist.is_initialized() and "by peer" in str(error):  # gloo's
            status = fail("another process ended, and says why; this one cannot go on alone", 1)
        else:
            traceback.print_exc()
            status = 1
    if status in (1, 2, 130) and (dist.is_initialized() or multiprocessing.active_children()):
        hard_exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def hard_exit(status: int):
    """Exit after a failure, at once: Python's own end would wait for loader processes, which pass over SIGTERM, and NCCL's for
    other processes, which may wait for this one in a collective."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # that is being written
            thread.join()
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def fail(message: str, status: int = 2) -> int:
    print(f"{os.path.basename(sys.argv[0])}: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


# ------------------------------------------------------------------------------------------- launch and precision


@dataclass
class Distributed:
    """Where this process runs. amp_dtype: the autocast type, None for fp32. gloo_group: a group that waits for days. workers: loader processes that were asked for."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    amp_dtype: torch.dtype | None = None
    gloo_group: dist.ProcessGroup | None = None
    workers: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words):
        if self.is_main:
            print(*words, flush=True)

    def warn(self, message: str):
        """Something doubtful that does not end the program, once over all processes."""
        if self.is_main:
            warn(message)

    def print_lines(self, lines: list[str]):
        """Lines of which some begin with "warning: "."""
        for line in lines:
            self.warn(line.removeprefix("warning: ")) if line.startswith("warning: ") else self.print(line)

    def fail(self, message: str):
        """A person's error that all processes found: the first one says it."""
        if self.is_main:
            raise UserError(message)
        sys.exit(2)

    def num_workers(self) -> int:
        """Loader processes for images on disk: as many as asked for, else one a core, at most 16."""
        at_hand = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return (
            max(1, min(16, at_hand // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
            if self.workers is None
            else self.workers
        )

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype else nullcontext()

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, value) -> list:
        """Everybody's `value`, a small picklable object, in order of rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Everybody's rows (n, d) of the CPU and their numbers (n,), in the order of these, on the first process; None on the others. One process
        after the other, as they are: pickled, they would be held several times."""
        if self.world_size == 1:
            return rows, keys
        told = [None] * self.world_size if self.is_main else None
        dist.gather_object((keys, rows.shape[1]), told, group=self.gloo_group)
        if not self.is_main:
            if len(rows):
                dist.send(rows, 0, group=self.gloo_group)
            return None
        order = torch.cat([theirs for theirs, _ in told]).argsort()
        place, joined = order.argsort(), rows.new_empty(len(order), max(width for _, width in told))
        for rank, (theirs, width) in enumerate(told):
            mine, place = place[: len(theirs)], place[len(theirs) :]
            part = rows if rank == 0 else rows.new_empty(len(theirs), width)
            if rank and len(theirs):
                dist.recv(part, rank, group=self.gloo_group)
            if len(theirs):
                joined[mine] = part
        return joined, torch.cat([theirs for theirs, _ in told])[order]

    def check_same_everywhere(self, facts: dict[str, str]):
        """End all processes unless `facts`, short texts by name, are the same on each; the first one says which differ."""
        told = self.all_gather(facts)
        other = next((rank for rank, theirs in enumerate(told) if theirs != told[0]), None)
        if other is not None:
            self.fail(
                "the processes do not agree: "
                + "; ".join(
                    f"{name} is {told[0][name]} on process 0, {told[other][name]} on process {other}"
                    for name in facts
                    if told[0][name] != told[other][name]
                )
                + "; give all the same command and the same data"
            )

    def run_on_main(self, function, *arguments):
        """function(*arguments) on the first process, however long; its result on all. An exception there ends all of them."""
        result, error = None, None
        if self.is_main:
            try:
                result = function(*arguments)
            except BaseException as failure:
                error = failure
        if self.world_size > 1:
            values = [(result, error is not None)]
            dist.broadcast_object_list(values, group=self.gloo_group)
            result, failed = values[0]
            if failed and not self.is_main:
                sys.exit(2)  # the first process says why
        if error:
            raise error
        return result


def initialize(device: str, precision: str, workers: int | None = None, deterministic: bool = False) -> Distributed:
    """Join the processes of torchrun, if it started us, and fix device and precision.

    workers: of loaders; None: by the number of cores. deterministic: use torch's deterministic algorithms, for which cuBLAS needs a fixed workspace.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    rank, world, local = (
        environment_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} not set: start with torchrun --nproc_per_node={world}, or unset WORLD_SIZE"
        )
    if (
        world > 1
        and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and environment_number("TORCHELASTIC_MAX_RESTARTS", 0)
        and not rank
    ):
        warn(
            "restarts by torchrun may take many attempts, for the new processes meet the addresses of the dead ones; put "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before the launch line"
        )
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
    gloo_group = None
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                timeout=timedelta(minutes=10),
                device_id=torch.device(device, local) if device == "cuda" else None,
            )
        gloo_group = dist.new_group(
            backend="gloo", timeout=timedelta(days=2)
        )  # a cache of ImageNet takes longer than ten minutes
    where = torch.device(device, local) if device == "cuda" else torch.device(device)
    return Distributed(where, rank, world, autocast_dtype(device, precision), gloo_group, workers)


def environment_number(name: str, default: int) -> int:
    """A number that a launcher gives in the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment's {name} is {text!r}, not a number: start with torchrun, or unset it")
    return int(text)


def keep_freed_memory():
    """Let glibc reuse what a step frees; handing it back to the kernel and faulting it in again costs 6 % of a step."""
    with suppress(AttributeError, OSError):  # another C library: nothing to set
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check_gpu(local: int):
    """UserError unless the GPU is there and this build of torch has code for it."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}; "
            f"use --nproc_per_node={torch.cuda.device_count()}"
        )
    capability = torch.cuda.get_device_capability(local)
    if not gpu_supported(capability, torch.cuda.get_arch_list()):
        raise UserError(
            f"this build of torch ({torch.__version__}) has no code for {torch.cuda.get_device_name(local)} "
            f"(sm_{capability[0]}{capability[1]}), only for {' '.join(torch.cuda.get_arch_list())}: install "
            "a build for it (docs/running.md, Install notes; V100: CUDA 12.6)"
        )


def gpu_supported(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for one of `built_for` ("sm_90", "compute_80") runs on a GPU of this capability.

    Machine code runs on its own major version from its minor version on; intermediate code on anything later.
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        if kind not in ("sm", "compute"):  # another maker's names: nothing to say against it
            return True
        major, minor = int(digits.rstrip("af")[:-1]), int(digits.rstrip("af")[-1])
        if (kind == "sm" and major == capability[0] and minor <= capability[1]) or (
            kind == "compute" and (major, minor) <= tuple(capability)
        ):
            return True
    return False


def autocast_dtype(device: str, precision: str) -> torch.dtype | None:
    if precision == "auto":
        if device != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision fp16 needs a GPU; on {device} use fp32 or bf16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def to_device(value, device, non_blocking: bool = False):
    """The same nest of dataclasses and lists with every tensor of the CPU on `device`. non_blocking: the host does not wait for copies to a GPU."""
    kind, away = torch.device(device).type, []
    map_tensors(value, lambda tensor: away.append(tensor) if tensor.device.type == "cpu" != kind else None)
    if not away:  # a compiled step then sees the same object
        return value
    pinned = non_blocking and kind == "cuda"  # a copy from pageable memory would make the host wait for the device
    return map_tensors(
        value,
        lambda tensor: (tensor.pin_memory() if pinned and tensor.device.type == "cpu" else tensor).to(
            device, non_blocking=non_blocking
        ),
    )


def map_tensors(value, function):
    """The same nest of dataclasses and lists with function(tensor) in place of every tensor."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, list):
        return [map_tensors(item, function) for item in value]
    if is_dataclass(value):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function) for f in fields(value)})
    return value


def versions() -> dict:
    """Plain strings: torch.__version__ itself is an object that a safe load refuses."""
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
