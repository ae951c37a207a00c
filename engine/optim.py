"""Schedule, parameter groups and the parts of a training step between the loop that names them and torch."""

import math
import time
from inspect import signature

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from engine.dist import Distributed
from engine.errors import UserError


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, start: float, end: float) -> float:
    """Linear from `start` to `peak` in warmup_steps, then a cosine to `end` at `steps`: a pure function of the step."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """One group per (layer, decayed or not), its `scale` being layer_decay^(layers above it).

    model: also has layer_of(parameter's name), its layer's number, and `undecayed`, endings of names that weight decay
    leaves alone besides biases, norms and tokens (all with fewer than two axes).
    """
    groups, top = {}, max(model.layer_of(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(model.undecayed)
        layer = (
            model.layer_of(name) if layer_decay != 1 else top
        )  # alike layers in one group: a group costs kernel launches
        group = groups.setdefault(
            (layer, decayed),
            dict(
                params=[],
                names=[],
                layer=layer,
                scale=layer_decay ** (top - layer),
                weight_decay=weight_decay * decayed,
            ),
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """Norm of all gradients together, (). On a CPU dot products take half the time of torch's own norms.

    The last bit of a dot product depends on where its values begin in memory. With several processes gradients are views into DDP's buckets, which it
    lays out again after the first step of a program; a copy of an unaligned one keeps a resumed run bit-identical."""
    if gradients[0].is_cpu:
        flat = [gradient.flatten() for gradient in gradients]
        flat = [values if values.data_ptr() % 64 == 0 else values.clone() for values in flat]
        return torch.stack([values.dot(values) for values in flat]).sum().sqrt()
    return nn.utils.get_total_norm(gradients)


class TrainStep:
    """The parts of a training step, between the loop that names them and torch.

    One optimiser step is: set_learning_rate, then for each micro-batch `backward`, then `update`. Loss terms, gradient
    norm and counters stay on the device until `read`. A step whose loss or gradient is not finite changes nothing and
    is counted; fp16 steps that the loss scaler skips are its ordinary work and are not.
    """

    def __init__(self, args, distributed: Distributed, model: nn.Module, steps: int, warmup_steps: int, peak_lr: float):
        self.args, self.distributed, self.model = args, distributed, model
        self.schedule = dict(
            steps=steps,
            warmup_steps=warmup_steps,
            peak=peak_lr,
            start=min(args.warmup_lr, peak_lr),
            end=min(args.min_lr, peak_lr),
        )
        groups = parameter_groups(model, args.weight_decay, args.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=tuple(args.betas), eps=args.adam_eps, fused=True)
        self.scaler = torch.amp.GradScaler(distributed.device.type, enabled=distributed.amp_dtype == torch.float16)
        self.parallel = model  # what trains; evaluation calls the model itself, which stays as it is
        if args.compile:  # shapes are static
            self.parallel = torch.compile(model, dynamic=False)
        if distributed.world_size > 1:
            arguments = signature(DistributedDataParallel).parameters  # renamed in torch 2.13
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
            self.parallel = DistributedDataParallel(
                self.parallel,
                gradient_as_bucket_view=True,
                **{buffers: False},
                device_ids=[distributed.device] if distributed.device.type == "cuda" else None,
            )
        self.parameters = list(model.parameters())
        self.micro, self.untried = 0, True
        self.lost = torch.zeros((), device=distributed.device)  # whether a loss of this step was not finite
        self.meter = {}  # name: sum since the last log line, on the device; part of a checkpoint
        self.failures = torch.zeros(
            3, device=distributed.device
        )  # all skipped steps, those in a row now, the longest row
        self.steps_metered = 0

    def set_learning_rate(self, step: int) -> float:
        lr = learning_rate(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        return lr

    def forward(self, *inputs):
        """The model's output under autocast; gradients are exchanged only in the last micro-step's backward pass."""
        self.micro += 1
        if (
            self.args.compile and self.untried
        ):  # what is made once and kept, such as the plan of whole images, should not be traced
            self.untried = False
            with torch.no_grad(), self.distributed.autocast(), torch.random.fork_rng():
                self.model(*inputs)
        if self.distributed.world_size > 1:
            self.parallel.require_backward_grad_sync = self.micro == self.args.accumulate
        with self.distributed.autocast():
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
        parameters = [p for p in self.parameters if p.grad is not None]
        norm = total_norm([p.grad for p in parameters])
        if self.scaler.is_enabled():
            if self.args.clip:
                nn.utils.clip_grads_with_norm_(parameters, self.args.clip, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            bad = self.distributed.all_reduce(self.lost).clamp(
                max=1
            )  # the gradient may overflow, as is the scaler's way; no loss should
        else:
            bad = (~norm.isfinite()).float()
            self.optimizer.found_inf = bad  # the fused step reads it on the device and leaves all as it was
            if self.args.clip:  # and divides by this, which spares clipping's pass over all gradients: 2 % of a step
                self.optimizer.grad_scale = ((norm + 1e-6) / self.args.clip).clamp(min=1)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.distributed.world_size == 1)
        row = (self.failures[1] + 1) * bad
        self.failures = torch.stack([self.failures[0] + bad, row, torch.maximum(self.failures[2], row)])
        for name, value in (
            ("grad_norm", torch.where(norm.isfinite(), norm, 0.0)),
            ("finite_norms", norm.isfinite().float()),
        ):
            self.meter[name] = self.meter[name] + value if name in self.meter else value
        self.lost = torch.zeros_like(self.lost)
        self.micro = 0
        self.steps_metered += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading, over steps and processes; waits for the device."""
        names = sorted(self.meter)
        values = self.distributed.all_reduce(torch.stack([self.meter[name].cpu().double() for name in names]))
        means = dict(zip(names, (values / self.distributed.world_size / self.steps_metered).tolist()))
        if "grad_norm" in means:  # of steps whose gradient did not overflow
            share = means.pop("finite_norms")
            means["grad_norm"] = means["grad_norm"] / share if share else math.nan
        self.meter, self.steps_metered = {}, 0
        return means | {"skipped_steps": int(self.failures[0])}

    def check_failures(self, step: int, means: dict):
        """UserError once ten steps in a row have failed, or the loss scale has sunk to nothing; waits for the device."""
        if self.failures[2] >= 10 or self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "skipped_steps")
            raise UserError(
                f"ten steps in a row had a loss or gradient that is not finite, up to step {step}, learning "
                f"rate {learning_rate(step - 1, **self.schedule):.3g} ({terms}); the last good checkpoint is "
                "kept. Try a lower --base-lr, a longer --warmup-epochs, or --precision fp32"
            )

    def state(self) -> dict:
        """Everything that the next step depends on besides the model. All processes call it together."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "failures": self.failures,
            "meters": self.distributed.all_gather({name: float(value) for name, value in self.meter.items()}),
            "steps_metered": self.steps_metered,
        }

    def load(self, state: dict):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.failures = state["failures"].to(self.distributed.device)
        self.failures[2] = self.failures[1]  # what an earlier row did not end should not end this run
        self.steps_metered = state["steps_metered"]
        meters = state["meters"]
        if len(meters) == self.distributed.world_size:
            mine = meters[self.distributed.rank]
        else:  # another number of processes: each goes on with the mean
            mine = {name: sum(meter[name] for meter in meters) / len(meters) for name in meters[0]}
        if "grad_norm" in mine:  # of an earlier commit
            mine.setdefault("finite_norms", float(self.steps_metered))
        self.meter = {name: torch.tensor(value, device=self.distributed.device) for name, value in mine.items()}


def count_flops(step) -> float:
    """Floating-point operations of one call, as they run: matrix products and attention, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return float(counter.get_total_flops())


def check_compiler(device: torch.device):
    """UserError where torch.compile does not work, found by compiling a function of a size that no cache holds."""
    try:
        torch.compile(torch.exp, dynamic=False)(torch.ones(1 + time.time_ns() % 10**6, device=device))
    except Exception as error:  # the compiler's own, Triton's, the backend's
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--compile: torch.compile does not work here ({reason}); it needs a C++ compiler such as g++ in PATH, on a GPU "
            "Triton and a C compiler too"
        ) from None
