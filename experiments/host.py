"""Count what a training step requests from the host, on a machine without a GPU: kernel launches, copies, milliseconds.

The step runs on fake tensors, which have shapes and types but no numbers, and every call is counted. `python bench.py
--host` calls this. It patches private functions of torch.

    with pretended(model), Launches() as launches:
        ...
    launches.counts                       # {"launches": ..., "casts": ..., "copies": ...}
"""

import re
import statistics
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

# Calls that launch no kernel: allocations and questions about a tensor.
FREE = set(
    "_unsafe_view detach lift_fresh device empty empty_like empty_strided new_empty new_empty_strided set_ "
    "sym_size".split()
)


class Launches(TorchDispatchMode):
    """Count the kernels that a GPU would launch: every call of torch's that is not a view or in FREE.

    A call on lists of tensors counts once. `casts` are launches that change a type; `copies` are copies from the host.
    """

    def __init__(self):
        super().__init__()
        self.counts = Counter(launches=0, casts=0, copies=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func.name().split(".")[0].split("::")
        device = kwargs.get("device")
        if name == "_to_copy" and device is not None and torch.device(device).type != args[0].device.type:
            self.counts["copies"] += 1
        elif not func.is_view and name not in FREE and namespace == "aten":
            self.counts["launches"] += 1
            self.counts["casts"] += name == "_to_copy"
        return func(*args, **kwargs)


class AsOnGPU(TorchFunctionMode):
    """Compute as on a GPU: attention is one fused kernel, and layer norms are in 32 bits under autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.is_cuda.__get__, torch.Tensor.is_cpu.__get__):
            return func == torch.Tensor.is_cuda.__get__
        if func is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            # Torch copies a mask whose rows are not aligned into longer rows.
            if mask is not None and any(stride % 8 for stride in mask.stride()[:-1]):
                mask = F.pad(mask, (0, -mask.shape[-1] % 8))[..., : mask.shape[-1]]
            return FusedAttention.apply(*args[:3], mask)
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = args[0].float(), *args[1:]
        return func(*args, **kwargs)


class FusedAttention(torch.autograd.Function):
    """Shapes and launches of fused attention, without its numbers: one launch forward, one backward."""

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
    """Inside, all tensors are fake and calls are those of a GPU. The model's parameters stay fake afterwards."""
    previous = torch.__future__.get_overwrite_module_params_on_conversion()
    model.to("meta")
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # the numbers of a fake tensor cannot be replaced
    # Clipping in one call for all parameters is otherwise reserved to ordinary tensors.
    foreach = mock.patch("torch.nn.utils.clip_grad._has_foreach_support", return_value=True)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), AsOnGPU(), foreach:
            model.to_empty(device="cpu")
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(previous)


class Shrunk(nn.Module):
    """A model's parameters with one number each, of the same names and groups.

    Their update is the work of the host alone.
    """

    def __init__(self, model):
        super().__init__()
        self.undecayed, self.layer_of, self.names = model.undecayed, model.layer_of, {}
        for number, (name, parameter) in enumerate(model.named_parameters()):
            self.names[f"p{number}"] = name
            one = torch.ones((1,) * parameter.ndim, device=parameter.device)
            self.register_parameter(f"p{number}", nn.Parameter(one))

    def named_parameters(self, *args, **kwargs):
        return ((self.names[name], parameter) for name, parameter in super().named_parameters(*args, **kwargs))


def graphs(model, inputs: list[tuple]) -> dict[str, int]:
    """Count the graphs that torch.compile makes of model(*values) for all values in `inputs`, and the graph breaks."""
    graph_list = []

    def backend(graph, example_inputs):
        graph_list.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch.no_grad():
        for values in inputs:
            compiled(*values)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    torch._dynamo.reset()
    return {"graphs": len(graph_list), "graph_breaks": breaks}


CALL = re.compile(r"^ +(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.aten\.[\w.]+)\(", re.MULTILINE)


def compiled(model, inputs: tuple) -> int:
    """Count the launches of a compiled forward and backward pass of model(*inputs): fused kernels and library calls.

    Kernels are fused for a CPU, and nothing is built or run. For a GPU the compiler may fuse otherwise.
    """
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


def milliseconds(function, between=lambda: None) -> float:
    """Median time of 21 calls, function(1), function(2), ..., after one that is not counted.

    Args:
        function: of the number of the call.
        between: called before each call and not timed.
    """
    times = []
    for step in range(22):
        between()
        start = time.perf_counter()
        function(step)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def count(args, distributed) -> dict:
    """Count what a step of one method requests from the host, as on a GPU in bf16.

    Args:
        args: of train.py.
        distributed: the processes.

    Returns:
        Launches, casts and copies of a step, graphs of the whole model over ten masks, and milliseconds of the host
        without anything to compute.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for each other would be counted as work of the host
    model = from_settings(vars(args))
    config = replace(select(StepConfig, vars(args)), compile=None)  # only `compiled` below counts the compiled step
    single = replace(distributed, amp_dtype=torch.bfloat16, world_size=1)

    def draw(step):
        return model.draw(rng.generator(0, "mask", step))

    row = {"method": args.method, "model": args.model, "ms_plan": milliseconds(draw)}
    shrunk = TrainStep(config, single, Shrunk(model), 10, 0, 1e-4)
    for parameter in shrunk.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    shrunk.optimizer.zero_grad = lambda set_to_none: None
    row["parameter_groups"] = len(shrunk.optimizer.param_groups)
    row["ms_update"] = milliseconds(lambda step: shrunk.update())
    # The host works between two masks, as in a step, so that the next one is drawn meanwhile.
    row["ms_wait_for_plan"] = milliseconds(rng.Prefetch(draw).take, between=lambda: [shrunk.update() for _ in range(5)])
    if distributed.world_size > 1:
        signals = runs.StopSignals(distributed, None)
        row["ms_exchange"] = milliseconds(lambda step: signals.all_reduce_requests())
    size = (args.channels or 3, *to_2tuple(args.image_size))
    images, masking = torch.randn(1, args.sources, *size), draw(0)
    row |= graphs(model, [(images, draw(step)) for step in range(10)])
    if args.compile:
        row["launches_compiled"] = compiled(model, (images, masking))
    with pretended(model):
        train_step = TrainStep(config, single, model, 10, 0, 1e-4)
        images = images.new_zeros(args.batch_size // args.sources, args.sources, *size)
        for _ in range(2):  # the first step makes the state of the optimizer
            with Launches() as copies:
                to_device(masking, "meta")
            with Launches() as forward:
                out = train_step.forward(images, masking)
            terms = {"loss": out.loss} | {f"loss_{name}": term for name, term in out.losses.items()}
            with Launches() as backward:
                train_step.backward(out.loss, terms)
            with Launches() as update:
                train_step.update()
    for name, launches in (("forward", forward), ("backward", backward), ("update", update)):
        row[f"launches_{name}"] = launches.counts["launches"]
    row["casts"] = sum(launches.counts["casts"] for launches in (forward, backward, update))
    row["copies"] = copies.counts["copies"]
    return row
