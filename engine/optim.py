"""One training step: learning rate schedule, parameter groups, mixed precision, DDP, clipping and AdamW."""

import math
import time
from dataclasses import dataclass
from inspect import signature

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from engine.dist import Distributed
from engine.errors import UserError


def learning_rate(step: int, steps: int, warmup_steps: int, peak: float, start: float, end: float) -> float:
    """Linear warm-up from `start` to `peak` in `warmup_steps`, then a cosine to `end` at `steps`."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups for layer-wise learning rate decay and for weight decay.

    Args:
        model: also has `layer_of(name)`, the number of a parameter's layer, and `undecayed`, endings of names to which
            no weight decay applies, besides biases, norms and tokens (all of which have fewer than two axes).
        weight_decay: of the other parameters.
        layer_decay: factor on the learning rate from each layer to the one below it.

    Returns:
        One group for each (layer, with weight decay or without); its `scale` is layer_decay^(number of layers above).
    """
    groups = {}
    top = max(model.layer_of(name) for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and not name.endswith(model.undecayed)
        # without layer decay all layers form one group, because each group costs kernel launches
        layer = model.layer_of(name) if layer_decay != 1 else top
        new_group = {
            "params": [],
            "names": [],
            "layer": layer,
            "scale": layer_decay ** (top - layer),
            "weight_decay": weight_decay * decayed,
        }
        group = groups.setdefault((layer, decayed), new_group)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def total_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all gradients together, (). On a CPU dot products take half the time of torch's own function.

    The last bit of a dot product depends on where its values begin in memory. With several processes, gradients are
    views into DDP's buckets, which DDP lays out again after the first step of a program. Copying those that are not
    aligned keeps a resumed run bit-identical.
    """
    if not gradients[0].is_cpu:
        return nn.utils.get_total_norm(gradients)
    vectors = [gradient.flatten() for gradient in gradients]
    vectors = [vector if vector.data_ptr() % 64 == 0 else vector.clone() for vector in vectors]
    return torch.stack([vector.dot(vector) for vector in vectors]).sum().sqrt()


@dataclass(frozen=True)
class StepConfig:
    """Settings of a training step, by the names of their flags."""

    warmup_lr: float
    min_lr: float
    weight_decay: float
    layer_decay: float
    betas: tuple[float, float]
    adam_eps: float
    clip: float
    accumulate: int
    compile: bool


class TrainStep:
    """One optimiser step: set_learning_rate; forward and backward for each micro-batch; update.

    Loss terms, gradient norm and counters stay on the device until `read`, so a step does not wait for the device. A
    step whose loss or gradient is not finite changes nothing and is counted. Steps that the loss scaler of fp16 skips
    are its normal operation and are not counted.

    Args:
        config: settings of the step.
        distributed: device, precision and processes.
        model: the network, with what `parameter_groups` needs.
        steps: length of the learning rate schedule.
        warmup_steps: of the schedule.
        peak_lr: learning rate after the warm-up.
    """

    def __init__(
        self,
        config: StepConfig,
        distributed: Distributed,
        model: nn.Module,
        steps: int,
        warmup_steps: int,
        peak_lr: float,
    ):
        self.config, self.distributed, self.model = config, distributed, model
        self.schedule = {
            "steps": steps,
            "warmup_steps": warmup_steps,
            "peak": peak_lr,
            "start": min(config.warmup_lr, peak_lr),
            "end": min(config.min_lr, peak_lr),
        }
        groups = parameter_groups(model, config.weight_decay, config.layer_decay)
        self.optimizer = torch.optim.AdamW(
            groups, lr=peak_lr, betas=tuple(config.betas), eps=config.adam_eps, fused=True
        )
        self.scaler = torch.amp.GradScaler(distributed.device.type, enabled=distributed.amp_dtype == torch.float16)
        self.train_model = model  # compiled and wrapped in DDP; evaluation calls `model` itself
        if config.compile:
            self.train_model = torch.compile(model, dynamic=False)  # shapes are static
        if distributed.world_size > 1:
            arguments = signature(DistributedDataParallel).parameters  # renamed in torch 2.13
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
            self.train_model = DistributedDataParallel(
                self.train_model,
                gradient_as_bucket_view=True,
                device_ids=[distributed.device] if distributed.device.type == "cuda" else None,
                **{buffers: False},
            )
        self.parameters = list(model.parameters())
        self.micro_step, self.is_first_call = 0, True
        device = distributed.device
        self.loss_not_finite = torch.zeros((), device=device)  # 1 if a loss of this step was not finite
        self.sums = {}  # by name, since the last log line, on the device; part of a checkpoint
        self.failures = torch.zeros(3, device=device)  # failed steps in all, in a row now, the longest row
        self.steps_summed = 0

    def set_learning_rate(self, step: int) -> float:
        lr = learning_rate(step, **self.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        return lr

    def forward(self, *inputs):
        """The model's output under autocast. DDP exchanges gradients only in the last micro-step's backward pass."""
        self.micro_step += 1
        if self.config.compile and self.is_first_call:
            # what is computed once and cached, such as the plan of a dense image, must not be traced
            self.is_first_call = False
            with torch.no_grad(), self.distributed.autocast(), torch.random.fork_rng():
                self.model(*inputs)
        if self.distributed.world_size > 1:
            self.train_model.require_backward_grad_sync = self.micro_step == self.config.accumulate
        with self.distributed.autocast():
            return self.train_model(*inputs)

    def backward(self, loss: torch.Tensor, terms: dict[str, torch.Tensor]):
        """Add the gradient of this micro-batch.

        Args:
            loss: (), on the device.
            terms: what to log, by name, each () on the device.
        """
        # A loss that is not finite gets a gradient of nan. DDP gives it to every process, so one test of the gradient
        # finds both kinds of failure.
        upstream_gradient = torch.where(loss.detach().isfinite(), 1.0, float("nan")) / self.config.accumulate
        self.loss_not_finite = torch.maximum(self.loss_not_finite, upstream_gradient.isnan().float())
        scaled = self.scaler.scale(loss) if self.scaler.is_enabled() else loss
        scaled.backward(upstream_gradient.to(loss.dtype))
        for name, value in terms.items():
            self.add_to_sum(name, value.detach().float() / self.config.accumulate)

    def add_to_sum(self, name: str, value: torch.Tensor):
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @torch.no_grad()
    def update(self):
        """Clip the norm of the whole gradient, update the weights unless it is not finite, and clear it.

        Nothing here waits for the device.
        """
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.parameters if p.grad is not None]
        norm = total_norm([p.grad for p in parameters])
        if self.scaler.is_enabled():
            if self.config.clip:  # gradient clipping with the loss scaler of fp16
                nn.utils.clip_grads_with_norm_(parameters, self.config.clip, norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            # the scaler lets gradients overflow now and then; a loss should be finite in each process
            failed = self.distributed.all_reduce(self.loss_not_finite).clamp(max=1)
        else:
            failed = (~norm.isfinite()).float()
            self.optimizer.found_inf = failed  # the fused AdamW reads it on the device and then changes nothing
            if self.config.clip:
                # Gradient clipping as in clip_grad_norm_. The fused AdamW divides all gradients by grad_scale, which
                # saves a pass over them: 2 % of a step.
                self.optimizer.grad_scale = ((norm + 1e-6) / self.config.clip).clamp(min=1)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.distributed.world_size == 1)
        in_a_row = (self.failures[1] + 1) * failed
        self.failures = torch.stack([self.failures[0] + failed, in_a_row, torch.maximum(self.failures[2], in_a_row)])
        self.add_to_sum("grad_norm", torch.where(norm.isfinite(), norm, 0.0))
        self.add_to_sum("finite_norms", norm.isfinite().float())
        self.loss_not_finite = torch.zeros_like(self.loss_not_finite)
        self.micro_step = 0
        self.steps_summed += 1

    def read(self) -> dict[str, float]:
        """Means over steps and processes since the last call, by name. Waits for the device."""
        names = sorted(self.sums)
        sums = self.distributed.all_reduce(torch.stack([self.sums[name].cpu().double() for name in names]))
        means = dict(zip(names, (sums / self.distributed.world_size / self.steps_summed).tolist()))
        finite_share = means.pop("finite_norms")
        means["grad_norm"] = means["grad_norm"] / finite_share if finite_share else math.nan
        self.sums, self.steps_summed = {}, 0
        return means | {"skipped_steps": int(self.failures[0])}

    def check_failures(self, step: int, means: dict):
        """Raise an error if ten steps in a row have failed, or the loss scale is near zero. Waits for the device.

        Args:
            step: number of completed steps.
            means: from `read`, for the message.
        """
        if self.failures[2] >= 10 or self.scaler.is_enabled() and self.scaler.get_scale() < 1e-3:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "skipped_steps")
            lr = learning_rate(step - 1, **self.schedule)
            raise UserError(
                f"ten steps in a row had a loss or gradient that is not finite, up to step {step}, learning "
                f"rate {lr:.3g} ({terms}); the last good checkpoint is kept. Try a lower --base-lr, a longer "
                "--warmup-epochs, or --precision fp32"
            )

    def state(self) -> dict:
        """Everything that the next step depends on besides the model. All processes call this together."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "failures": self.failures,
            "meters": self.distributed.all_gather({name: float(value) for name, value in self.sums.items()}),
            "steps_metered": self.steps_summed,
        }

    def load(self, state: dict):
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        device = self.distributed.device
        self.failures = state["failures"].to(device)
        self.failures[2] = self.failures[1]  # a row of failures that has ended should not end the resumed run
        self.steps_summed = state["steps_metered"]
        sums_of_processes = state["meters"]
        if len(sums_of_processes) == self.distributed.world_size:
            sums = sums_of_processes[self.distributed.rank]
        else:  # another number of processes: each continues with the mean
            count = len(sums_of_processes)
            sums = {name: sum(values[name] for values in sums_of_processes) / count for name in sums_of_processes[0]}
        if "grad_norm" in sums:  # checkpoints of early commits have no finite_norms
            sums.setdefault("finite_norms", float(self.steps_summed))
        self.sums = {name: torch.tensor(value, device=device) for name, value in sums.items()}


def count_flops(function) -> float:
    """Floating-point operations of one call: matrix products and attention, forward and backward."""
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return float(counter.get_total_flops())


def check_compiler(device: torch.device):
    """UserError where torch.compile does not work, found by compiling a function."""
    try:
        size = 1 + time.time_ns() % 10**6  # a size that no cache of compiled functions holds
        torch.compile(torch.exp, dynamic=False)(torch.ones(size, device=device))
    except Exception as error:  # of the compiler, Triton or the backend
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--compile: torch.compile does not work here ({reason}); it needs a C++ compiler such as g++ in PATH, "
            "on a GPU Triton and a C compiler too"
        ) from None
