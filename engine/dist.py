"""Processes and devices: user errors as one line, torchrun's processes, the GPU, precision, tensors moved to it."""

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
        stream.reconfigure(errors="backslashreplace")  # the terminal's encoding may lack characters of a file name

    def write(self, text):
        with suppress(OSError):
            return self.stream.write(text)

    def flush(self):
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_main(main):
    """Run main() and exit with its status.

    A user error prints one line on stderr and exits with status 2, Ctrl-C with status 130. Any other exception prints
    its traceback and exits with status 1.
    """
    sys.stdout, sys.stderr = SafeStream(sys.stdout), SafeStream(sys.stderr)
    try:
        status = main()
    except SystemExit as exit:
        status = exit.code
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the exit
        status = fail("stopped by Ctrl-C", 130)
    except (UserError, DataError, OSError) as error:
        status = fail(str(error))
    except torch.cuda.OutOfMemoryError:
        status = fail(
            "the GPU is out of memory: halve --batch-size and double --accumulate (same effective batch size), or "
            "add --activation-checkpointing"
        )
    except Exception as error:
        if "DataLoader worker (pid" in str(
            error
        ):  # torch raises this from a signal handler, so it can come from anywhere
            status = fail(
                "a data loader worker was killed, most likely because memory or shared memory ran out (in a "
                "container: --shm-size): use fewer --workers"
            )
        elif dist.is_initialized() and "by peer" in str(error):  # gloo lost its connection
            status = fail("another process ended and prints why; this process cannot continue alone", 1)
        else:
            traceback.print_exc()
            status = 1
    if status in (1, 2, 130) and (dist.is_initialized() or multiprocessing.active_children()):
        hard_exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def hard_exit(status: int):
    """Exit immediately after a failure.

    Python's own exit would wait for loader workers, which ignore SIGTERM, and NCCL's for other processes, which may be
    waiting for this one in a collective operation.
    """
    for thread in threading.enumerate():
        if thread.name == "checkpoint":  # a checkpoint is being written: let it finish
            thread.join()
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def fail(message: str, status: int = 2) -> int:
    """Print an error as one line on stderr. Returns the exit status."""
    print(f"{os.path.basename(sys.argv[0])}: error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return status


@dataclass
class Distributed:
    """Where this process runs, and what it exchanges with the other processes of the run.

    Args:
        device: of this process.
        rank: number of this process.
        world_size: number of processes.
        amp_dtype: type for autocast; None for fp32.
        gloo_group: a process group on the CPU whose operations may take days.
        workers: data loader workers that the user requested; None for one per core.
    """

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
        """Print on the main process."""
        if self.is_main:
            print(*words, flush=True)

    def warn(self, message: str):
        """Print a warning on the main process."""
        if self.is_main:
            warn(message)

    def print_lines(self, lines: list[str]):
        """Print lines; those that begin with "warning: " are warnings."""
        for line in lines:
            self.warn(line.removeprefix("warning: ")) if line.startswith("warning: ") else self.print(line)

    def fail(self, message: str):
        """End all processes with a user error that all of them found; the main process prints it."""
        if self.is_main:
            raise UserError(message)
        sys.exit(2)

    def num_workers(self) -> int:
        """Data loader workers for images on disk: as many as requested, else one per core, at most 16."""
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def autocast(self):
        return torch.autocast(self.device.type, self.amp_dtype) if self.amp_dtype else nullcontext()

    def all_reduce(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def all_gather(self, value) -> list:
        """The `value` of each process, a small picklable object, in order of rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Collect the rows of all processes on the main process, in the order of their numbers.

        Rows are sent as they are, by one process after the other: pickled, they would be held in memory several times.

        Args:
            rows: (n, d) on the CPU; n may differ between processes.
            numbers: (n,) number of each row, such as the index of an image.

        Returns:
            All rows (N, d) and their numbers (N,) on the main process; None on the others.
        """
        if self.world_size == 1:
            return rows, numbers
        parts = [None] * self.world_size if self.is_main else None
        dist.gather_object((numbers, rows.shape[1]), parts, group=self.gloo_group)
        if not self.is_main:
            if len(rows):
                dist.send(rows, 0, group=self.gloo_group)
            return None
        all_numbers = torch.cat([part for part, _ in parts])
        order = all_numbers.argsort()
        positions = order.argsort().split([len(part) for part, _ in parts])  # where the rows of each process belong
        result = rows.new_empty(len(order), max(width for _, width in parts))
        for rank, position in enumerate(positions):
            received = rows if rank == 0 else rows.new_empty(len(position), result.shape[1])
            if rank and len(position):
                dist.recv(received, rank, group=self.gloo_group)
            if len(position):
                result[position] = received
        return result, all_numbers[order]

    def check_same_everywhere(self, facts: dict[str, str]):
        """End all processes unless `facts`, short texts by name, are the same on each of them."""
        everywhere = self.all_gather(facts)
        first = everywhere[0]
        for rank, other in enumerate(everywhere):
            differences = [
                f"{name} is {first[name]} on process 0, {other[name]} on process {rank}"
                for name in facts
                if first[name] != other[name]
            ]
            if differences:
                self.fail(
                    f"the processes do not agree: {'; '.join(differences)}; give all the same command and the same data"
                )

    def run_on_main(self, function, *arguments):
        """Run function(*arguments) on the main process, however long it takes.

        Returns:
            Its result, on all processes. An exception ends all of them.
        """
        result, error = None, None
        if self.is_main:
            try:
                result = function(*arguments)
            except BaseException as exception:
                error = exception
        if self.world_size > 1:
            message = [(result, error is not None)]
            dist.broadcast_object_list(message, group=self.gloo_group)
            result, failed = message[0]
            if failed and not self.is_main:
                sys.exit(2)  # the main process prints why
        if error:
            raise error
        return result


def initialize(device: str, precision: str, workers: int | None = None, deterministic: bool = False) -> Distributed:
    """Join the processes of torchrun, if it started this one, and choose device and precision.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: "auto", "fp32", "bf16" or "fp16".
        workers: data loader workers; None for one per core.
        deterministic: use torch's deterministic algorithms.

    Raises:
        UserError: if the device or the precision cannot be used, or the environment of torchrun is incomplete.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic in a fixed workspace
    rank, world_size, local_rank = (
        environment_number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} not set: start with "
            f"torchrun --nproc_per_node={world_size}, or unset WORLD_SIZE"
        )
    restarts = environment_number("TORCHELASTIC_MAX_RESTARTS", 0)
    if world_size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and restarts and not rank:
        warn(
            "restarts by torchrun may take many attempts, because the new processes read the addresses of the ended "
            "ones; put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before the launch line"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        check_gpu(local_rank)
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
        # These two are used in passes without gradients only; without them evaluation computes as training does.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.mha.set_fastpath_enabled(False)
    else:
        keep_freed_memory()
    torch_device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    gloo_group = None
    if world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                timeout=timedelta(minutes=10),
                device_id=torch_device if device == "cuda" else None,
            )
        # filling a cache with ImageNet takes longer than ten minutes
        gloo_group = dist.new_group(backend="gloo", timeout=timedelta(days=2))
    return Distributed(torch_device, rank, world_size, autocast_dtype(device, precision), gloo_group, workers)


def environment_number(name: str, default: int) -> int:
    """A number that torchrun sets in the environment. UserError if it is no number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"the environment's {name} is {text!r}, not a number: start with torchrun, or unset it")
    return int(text)


def keep_freed_memory():
    """Let glibc reuse the memory that a step frees; returning it and requesting it again costs 6 % of a step."""
    with suppress(AttributeError, OSError):  # another C library has no such setting
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def check_gpu(local_rank: int):
    """UserError unless this process has a GPU and this build of torch has code for it."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"process {local_rank} of this machine has no GPU: there are {count}; use --nproc_per_node={count}"
        )
    capability, built_for = torch.cuda.get_device_capability(local_rank), torch.cuda.get_arch_list()
    if not gpu_supported(capability, built_for):
        raise UserError(
            f"this build of torch ({torch.__version__}) has no code for {torch.cuda.get_device_name(local_rank)} "
            f"(sm_{capability[0]}{capability[1]}), only for {' '.join(built_for)}: install "
            "a build for it (docs/running.md, Install notes; V100: CUDA 12.6)"
        )


def gpu_supported(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether code for one of `built_for` ("sm_90", "compute_80") runs on a GPU of this compute capability.

    Machine code (sm) runs on GPUs of its own major version, from its minor version on. Intermediate code (compute) is
    compiled for any later GPU.
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        if kind not in ("sm", "compute"):  # another vendor's names, of which we know nothing
            return True
        digits = digits.rstrip("af")
        version = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and version[0] == capability[0] and version[1] <= capability[1]:
            return True
        if kind == "compute" and version <= tuple(capability):
            return True
    return False


def autocast_dtype(device: str, precision: str) -> torch.dtype | None:
    """The type for autocast; None for fp32. "auto" is bf16 on a GPU that has it, else fp16, and fp32 on a CPU."""
    if precision == "auto":
        if device != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision fp16 needs a GPU; on {device} use fp32 or bf16")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def to_device(value, device, non_blocking: bool = False):
    """Move every CPU tensor of a nest of dataclasses and lists to a device.

    Args:
        value: a tensor, a list, a dataclass, or anything else, which is returned as it is.
        device: the target.
        non_blocking: do not wait for copies to a GPU.

    Returns:
        The same nest with tensors on the device; `value` itself if there is nothing to move, so that a compiled step
        sees the same object.
    """
    kind = torch.device(device).type
    on_cpu = []
    map_tensors(value, lambda tensor: on_cpu.append(tensor.device.type == "cpu"))
    if kind == "cpu" or not any(on_cpu):
        return value

    def move(tensor):
        if tensor.device.type == "cpu" and non_blocking and kind == "cuda":
            tensor = tensor.pin_memory()  # the host waits for a copy from memory that is not pinned
        return tensor.to(device, non_blocking=non_blocking)

    return map_tensors(value, move)


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
    """Versions as plain strings: torch.__version__ itself is an object that a safe load of a checkpoint rejects."""
    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
