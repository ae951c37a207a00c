"""What a step asks of the host, counted where there is no GPU: a step on tensors that have shapes and types and no numbers, every call counted.
`python bench.py --host` calls it. It patches private functions of torch.

    with pretended(model), Launches() as seen:
        ...
    seen.counts                       # {"launches": ..., "casts": ..., "copies": ...}
"""

import re
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine import rng, runs
from engine.dist import to_device
from engine.flags import select
from engine.optim import StepConfig, TrainStep
from images.crops import to_2tuple
from model import from_settings

FREE = {
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "set_",
    "sym_size",
}


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would be given: every call of torch's that is not a view, an allocation or a question. casts are those of
    them that change a type; copies are from the host. A call on lists counts once; attention by fused kernels is one forward, one backward."""

    def __init__(self):
        super().__init__()
        self.counts = Counter(launches=0, casts=0, copies=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        home, name = func.name().split(".")[0].split("::")
        if (
            name == "_to_copy"
            and kwargs.get("device") is not None
            and torch.device(kwargs["device"]).type != args[0].device.type
        ):
            self.counts["copies"] += 1
        elif not func.is_view and name not in FREE and home == "aten":
            self.counts["launches"] += 1
            self.counts["casts"] += name == "_to_copy"
        return func(*args, **kwargs)


class AsOnGPU(TorchFunctionMode):
    """Takes the way that a GPU takes: fused attention, which is one call, and under autocast layer norms in 32 bits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return func == torch.Tensor.is_cuda.__get__
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None and any(
                stride % 8 for stride in mask.stride()[:-1]
            ):  # torch then copies it into longer rows
                mask = F.pad(mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
            return OneCall.apply(*args[:3], mask)
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = args[0].float(), *args[1:]
        return func(*args, **kwargs)


class OneCall(torch.autograd.Function):
    """Attention's shapes and counts, without its numbers: one launch forward, one backward."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.inputs = q, k, v, bias
        return torch.neg(v)

    @staticmethod
    def backward(ctx, gradient):
        torch.neg(gradient)
        return tuple(torch.empty_like(x) if x is not None and x.requires_grad else None for x in ctx.inputs)


@contextmanager
def pretended(model: nn.Module):
    """Inside, all tensors are without numbers, the model's too from then on, and what is done with them is what a GPU would be asked to do."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    model.to("meta")
    torch.__future__.set_overwrite_module_params_on_conversion(
        True
    )  # a parameter cannot be given numbers that there are not
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            AsOnGPU(),
            mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True),
        ):  # it asks for plain tensors
            model.to_empty(device="cpu")
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class Shrunk(nn.Module):
    """As many parameters as a model has, of the same names and groups and of one number each: their update is the host's work alone."""

    def __init__(self, model):
        super().__init__()
        self.undecayed, self.layer_of, self.names = model.undecayed, model.layer_of, {}
        for number, (name, parameter) in enumerate(model.named_parameters()):
            self.names[f"p{number}"] = name
            self.register_parameter(
                f"p{number}", nn.Parameter(torch.ones((1,) * parameter.ndim, device=parameter.device))
            )

    def named_parameters(self, *args, **kwargs):
        return ((self.names[name], parameter) for name, parameter in super().named_parameters(*args, **kwargs))


def graphs(model, inputs: list[tuple]) -> dict[str, int]:
    """How many graphs torch.compile makes of model(*inputs) for all of these inputs, and how many breaks it meets."""
    found = []

    def backend(graph, example):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for values in inputs:
            compiled(*values)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    torch._dynamo.reset()
    return {"graphs": len(found), "graph_breaks": breaks}


CALL = re.compile(r"^ +(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.[\w.]+)\(", re.MULTILINE)


def compiled(model, inputs: tuple) -> int:
    """Launches of a forward and a backward pass of model(*inputs) as torch's compiler makes them: fused kernels, and calls of a library's. They are
    fused for a CPU, and nothing is built or run; for a GPU the compiler may fuse otherwise."""
    codes, stop = [], mock.Mock(side_effect=InterruptedError)
    torch._dynamo.reset()
    with (
        mock.patch("torch._inductor.graph.GraphLowering.save_output_code", codes.append),
        functorch_config.patch(force_non_lazy_backward_lowering=True),
        mock.patch("torch._inductor.async_compile.AsyncCompile.cpp_pybinding", lambda *_, **__: stop),
        inductor_config.patch(force_disable_caches=True),
        torch.autocast("cpu", torch.bfloat16),
        suppress(InterruptedError),
    ):
        torch.compile(model, dynamic=False)(*inputs)
    torch._dynamo.reset()
    return sum(len(CALL.findall(code)) for code in codes)


def milliseconds(function, times: int = 21, between=lambda: None) -> float:
    """Median time of function(0), function(1), ..., but for the first; between() is called before each and not timed."""
    taken = []
    for step in range(times + 1):
        between()
        began = time.perf_counter()
        function(step)
        taken.append(1e3 * (time.perf_counter() - began))
    return sorted(taken[1:])[times // 2]


def count(args, distributed) -> dict:
    """Launches a step, as on a GPU in bf16, copies of a plan, graphs of the whole model over ten masks, and the host's milliseconds, with nothing to compute."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for each other say nothing of the host's work
    compiling, args.compile = args.compile, None  # but for the one count that is of it
    model, row, alone = (
        from_settings(vars(args)),
        {"method": args.method, "model": args.model},
        replace(distributed, amp_dtype=torch.bfloat16, world_size=1),
    )
    row["ms_plan"] = milliseconds(lambda step: model.draw(rng.generator(0, "mask", step)))
    step_config = select(StepConfig, vars(args))
    shrunk = TrainStep(step_config, alone, Shrunk(model), 10, 0, 1e-4)
    for parameter in shrunk.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    shrunk.optimizer.zero_grad = lambda set_to_none: None
    row |= {
        "parameter_groups": len(shrunk.optimizer.param_groups),
        "ms_update": milliseconds(lambda step: shrunk.update()),
    }
    masks = rng.Prefetch(lambda step: model.draw(rng.generator(0, "mask", step)))
    row["ms_wait_for_plan"] = milliseconds(
        masks.take, between=lambda: [shrunk.update() for _ in range(5)]
    )  # the host at work, as in a step
    if distributed.world_size > 1:
        signals = runs.StopSignals(distributed, None)
        row["ms_exchange"] = milliseconds(lambda step: signals.all_reduce_requests())
    size = (args.channels or 3, *to_2tuple(args.image_size))
    images = torch.randn(1, args.sources, *size)
    row |= graphs(model, [(images, model.draw(rng.generator(0, "mask", step))) for step in range(10)])
    masking = model.draw(rng.generator(0, "mask", 0))
    row |= {"launches_compiled": compiled(model, (images, masking))} if compiling else {}
    with pretended(model):
        trainer, images = (
            TrainStep(step_config, alone, model, 10, 0, 1e-4),
            images.new_zeros(args.batch_size // args.sources, args.sources, *size),
        )
        for _ in range(2):  # the first one makes the optimiser's state
            with Launches() as copies:
                to_device(masking, "meta")
            with Launches() as forward:
                out = trainer.forward(images, masking)
            with Launches() as backward:
                trainer.backward(
                    out.loss, {"loss": out.loss} | {f"loss_{name}": term for name, term in out.losses.items()}
                )
            with Launches() as update:
                trainer.update()
    row |= {
        f"launches_{name}": seen.counts["launches"]
        for name, seen in (("forward", forward), ("backward", backward), ("update", update))
    }
    return row | {
        "casts": sum(seen.counts["casts"] for seen in (forward, backward, update)),
        "copies": copies.counts["copies"],
    }
