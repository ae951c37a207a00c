"""The held-out error of pre-training: one measure, so that runs can be compared (Algorithm 1's test loop).

Algorithm 1 computes an accuracy of reconstructions, which is none. Here it is the normalised squared error on hidden
units at ratio 0.75 under eight fixed masks, on unmixed images, with the error on mixes beside it. simmim predicts raw
pixels, which the true means and contrasts put on that scale: flat units weigh most in its error, and it is above that of
methods that predict normalised units. A model that is trained without a mask is tested without one, on all units.
"""
import torch
from einops import rearrange, repeat

import data
import mixing
from model import EESMM, Masking, unit_statistics
from plans import to_device

EVAL_RATIO, EVAL_MASKS = 0.75, 8


def eval_masks(model: EESMM) -> list[Masking]:
    """The fixed masks of the held-out error: the same for every method, run and process."""
    units, ratio = model.encoder.units, EVAL_RATIO if model.mask_ratio else 0
    return [model.masking(mixing.draw_masks(1, units, ratio, data.generator("eval mask", k))[0]) for k in range(EVAL_MASKS)]


@torch.no_grad()
def evaluate(args, launch, model: EESMM, images, chunk: int = 64) -> dict:
    """Normalised squared error on hidden units of held-out images, (a) unmixed and (b) mixed, over all processes.

    (a) eval_error: every source of a composite is the same image, so the mix is that image. (b) eval_mix_error,
    eval_source_error: images are superposed; eval_mix_for_all_error is that of taking the predicted mix for every
    source. The i-th image is always hidden by mask i % 8, so results do not depend on processes or batches.
    """
    model.eval()
    count = min(args.eval_images, len(images))
    total, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    masks = [to_device(masking, launch.device) for masking in eval_masks(model)]
    chunks = [range(start + mask, min(count, start + EVAL_MASKS * chunk), EVAL_MASKS)
              for start in range(0, count, EVAL_MASKS * chunk) for mask in range(EVAL_MASKS)]
    # shuffled once and for all: neighbours in a folder are alike, and superposing them would be no test
    order = torch.randperm(len(images), generator=data.generator("held out")).tolist()
    place = {index: k for k, index in enumerate(order[:count])}
    chunks = [[order[k] for k in c] for c in chunks if len(c)]
    for indices, batch in data.held_out(images, chunks[launch.rank::launch.world], args.image_size):
        masking = masks[place[indices[0]] % EVAL_MASKS]
        batch = data.normalise(batch.to(launch.device).float())
        same = repeat(batch, "b c h w -> b n c h w", n=model.sources)
        total[0] += errors(model, launch, same, masking)[0] * len(batch)
        counts[0] += len(batch)
        composites = len(batch) // model.sources
        if model.sources > 1 and composites:
            mixed = rearrange(batch[:composites * model.sources], "(b n) c h w -> b n c h w", n=model.sources)
            total[1:] += errors(model, launch, mixed, masking) * composites
            counts[1] += composites
    total, counts = launch.sum(total), launch.sum(counts)
    model.train()
    means = [total[0] / counts[0]] + [x / counts[1] for x in total[1:]]
    names = ("eval_error", "eval_mix_error", "eval_source_error", "eval_mix_for_all_error")
    return {name: float(value) for name, value in zip(names, means) if model.sources > 1 and counts[1] or name == "eval_error"}


def errors(model, launch, images, masking) -> torch.Tensor:
    """(mix, sources, mix taken for every source): normalised squared errors on hidden units, whatever was trained for."""
    with launch.autocast():
        out = model(images, masking)
    targets, mix, sources = model.targets(images), out.predicted_mix, out.predicted_sources
    if not model.normalise:  # one source, raw pixels: SimMIM
        deviation = unit_statistics(targets)[1]
        targets, mix, sources = targets / deviation, mix / deviation[:, 0], sources / deviation
    hidden = ~out.visible[0] if model.mask_ratio else out.visible[0]
    pairs = ((mix, mixing.superpose(targets, model.weights)), (sources, targets), (mix[:, None], targets))
    return torch.stack([(a - b)[..., hidden, :].square().mean() for a, b in pairs]).cpu().double()
