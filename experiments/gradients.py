"""Does the gradient through the image point where the loss falls? Ways to estimate it, against REINFORCE.

    python -m experiments.gradients --batches 48                       # an hour, on a GPU two minutes
    python -m experiments.gradients --model tiny-show-o --batches 24

The loss is the starting model's cross-entropy of the known answer about a picture it draws, of two prompts of
every category. REINFORCE, with the mean of a prompt's other pictures as baseline, estimates its gradient for
the weights without bias. With flags beside its name it scores what grpo.py does with these in place of every
code's guided log-probability; and of a Show-o it is there in two parts, the last step's codes and all
others'. The rest is end-to-end's: the judge's gradient at the picture, sent back into the logits; the first
of them as the trainers do it, each other with what it is called by changed. Batch after batch draws the same
prompts anew; per estimator g, REINFORCE's being r:

    mean    cosine of E g with E r: what many pictures would agree on, and its jackknife standard error
    batch   expected cosine of one batch's g with E r: what one batch is worth

Inner products of expectations are means over pairs of different batches, so they have no bias from noise.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluate import versions, world_of
from grpo import CODE_CLIP, Settings
from model import UnifiedModel, load
from reward import TAGS, Task, draw_task, task_key
from sample import (
    ShortHelp, choose_scored, image_logits, image_logprobs, pick_device, positive, relaxed_codes, run,
    sample_images, score_logits, write_whole,
)
from sft import answer_loss

GROUP = 6  # pictures of each prompt in a batch
NOISES, SOFT = 8, Settings.soft
PLACES = 4  # of each picture, where the exact gradient is enumerated
LIKELY = 8  # codes at each place
PIXELS = 0.2  # standard deviation of the noise before SigLIP
RESULTS = Path(__file__).parent / "figures"


def pull(judge: UnifiedModel, tasks: list[Task], image: Tensor, noise: float = 0.0) -> Tensor:
    """The loss's gradient [B, N, V] at one-hots or mixtures [B, N, V]."""
    image = image.detach().requires_grad_()
    features = image
    if noise:
        pixels = judge.to_pixels(image)
        numbers = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        features = pixels + noise * numbers.to(pixels)
    return torch.autograd.grad(answer_loss(judge, tasks, judge.image_features(features)).sum(), image)[0]


def cut(pulls: Tensor, norm: float = CODE_CLIP, dims: tuple[int, ...] = (-1,)) -> Tensor:
    """The gradient, not longer than a norm in each code, or with `dims` (1, 2) in each picture."""
    return pulls * (norm / pulls.norm(dim=dims, keepdim=True).clamp(min=norm))


def reinmax(logits: Tensor, codes: Tensor) -> Tensor:
    """Zeros [B, N, V], whose gradient is that of ReinMax (Liu et al. 2023, "Bridging discrete and
    backpropagation", algorithm 2)."""
    p = logits.softmax(-1)
    half = ((p + F.one_hot(codes, p.shape[-1])) / 2).detach()
    second = (half.log() - logits.detach() + logits).softmax(-1)
    return 2 * (second - second.detach()) - (p - p.detach()) / 2


def enumerated(
    judge: UnifiedModel, tasks: list[Task], codes: Tensor, logits: Tensor, before: Tensor,
    rng: np.random.Generator,
) -> Tensor:
    """A loss [1] whose gradient is the exact one for single codes, all others fixed: the judge is shown the
    pictures, whose losses are `before` [B], with every likely code at random places, drawn in proportion to
    their entropy."""
    logprobs = logits.log_softmax(-1)
    p = logprobs.detach().exp()
    entropy = -(p * logprobs.detach()).nan_to_num().sum(-1) + 1e-3  # [B, N]
    likely = p.topk(min(LIKELY, p.shape[-1])).indices.cpu()
    rows, weights = [], []
    for picture, row in enumerate(entropy.double().cpu().numpy()):
        chances = row / row.sum()
        for place in rng.choice(len(row), PLACES, p=chances):
            for code in likely[picture, place].tolist():
                rows.append((picture, place, code))
                weights.append(1 / (PLACES * chances[place]))
    picture, place, code = torch.tensor(np.array(rows), device=codes.device).T
    codes, every = codes[picture], torch.arange(len(rows), device=codes.device)
    codes[every, place] = code
    with torch.no_grad():
        values = [answer_loss(judge, [tasks[i] for i in part.tolist()], judge.image_features(codes[at]))
                  for part, at in zip(picture.split(192), every.split(192))]
    change = torch.cat(values) - before[picture]
    return (torch.tensor(weights).to(change) * change * logprobs[picture, place, code].exp()).sum()


def estimates(
    policy: UnifiedModel, judge: UnifiedModel, tasks: list[Task], seeds: range, rng: np.random.Generator
) -> dict[str, Callable[[], Tensor]]:
    """By name, what gives a batch's loss; its gradient is an estimate."""
    images = sample_images(policy, [task.prompt for task in tasks], seeds, policy.guidance, compiled=False)
    logits = image_logits(policy, images, policy.guidance, 1.0)  # [B, N, V]
    codes = images.codes
    with torch.no_grad():
        loss = answer_loss(judge, tasks, judge.image_features(codes))
    groups = loss.view(-1, GROUP)
    advantage = (groups - groups.mean(1, keepdim=True)) * GROUP / (GROUP - 1)
    drawn, _ = score_logits(logits, codes)  # [B, N]
    reinforce = lambda logprobs=drawn: (advantage.flatten() * logprobs.sum(1)).sum()
    relaxed = lambda tau=1.0, soft=SOFT, seeds=seeds: relaxed_codes(logits, codes, tau, seeds, soft)
    # The judge's gradients at what it is shown.
    seen = {soft: pull(judge, tasks, relaxed(soft=soft)) for soft in (0, 0.25, SOFT, 0.75, 1)}
    seen |= {f"tau {tau}": pull(judge, tasks, relaxed(tau)) for tau in (0.5, 2)}
    half, p = seen[SOFT], logits.softmax(-1)
    mean = pull(judge, tasks, p)

    def back(pulls: Tensor, tau: float = 1.0) -> Tensor:
        return (relaxed(tau) * pulls).sum()

    def many() -> Tensor:
        others = [[seed + 10**6 * k for seed in seeds] for k in range(1, NOISES + 1)]
        return sum((relaxed(seeds=other) * cut(half)).sum() for other in others) / NOISES

    def scored(estimator: str, count: int, logprob: str) -> Tensor:
        chosen = choose_scored(policy, images, seeds, estimator, count)
        logprobs, _ = image_logprobs(policy, chosen, policy.guidance, 1.0, logprob)  # [B, N]
        return reinforce(chosen.weights * logprobs)

    ways = {
        "REINFORCE": reinforce,
        f"Gumbel-softmax, soft {SOFT}, tau 1, cut to {CODE_CLIP} in each code": lambda: back(cut(half)),
        **{f"soft {soft}": partial(lambda soft: back(cut(seen[soft])), soft) for soft in (0, 0.25, 0.75, 1)},
        "soft 1, no noise: the mean of all codes": lambda: (p * cut(mean)).sum(),
        **{f"cut to {norm}": partial(lambda norm: back(cut(half, norm)), norm) for norm in (0.03, 0.3)},
        "cut to 1 in each picture": lambda: back(cut(half, 1.0, (1, 2))),
        "not cut": lambda: back(half),
        "soft 1, not cut": lambda: back(seen[1]),
        "tau 0.5": lambda: back(cut(seen["tau 0.5"]), 0.5),
        "tau 2": lambda: back(cut(seen["tau 2"]), 2),
        f"{NOISES} noises a picture (Gumbel-Rao)": many,
        "ReinMax": lambda: (reinmax(logits, codes) * cut(half)).sum(),
    }
    for logprob in ("detached", "conditional"):
        ways[f"REINFORCE, --logprob {logprob}"] = partial(scored, "replay", 0, logprob)
    if policy.draw_steps is None:
        noisy = cut(pull(judge, tasks, relaxed(), noise=PIXELS))
        ways[f"noise of {PIXELS} on the pixels"] = lambda: back(noisy)
        exact = lambda: enumerated(judge, tasks, codes, logits, loss, rng)
        ways["exact for each code, all others fixed"] = exact
    else:
        last = images.unmask_step == policy.draw_steps - 1
        ways["REINFORCE, all steps but the last"] = partial(reinforce, drawn * ~last)
        ways["REINFORCE, the last step alone"] = partial(reinforce, drawn * last)
        for count in (3, 1):
            ways[f"REINFORCE, --replay-steps {count}"] = partial(scored, "replay", count, "guided")
        for logprob in ("conditional", "guided"):
            ways[f"REINFORCE, --estimator remask --logprob {logprob}"] = partial(scored, "remask", 0, logprob)
    return ways


def compare(gradients: Tensor, reference: Tensor) -> dict[str, list[float]]:
    """Of an estimator's and REINFORCE's gradients [K, D] of K batches: both cosines, each with its standard
    error; no number where E g is not told apart from 0."""
    pairs = (gradients, reference), (gradients, gradients), (reference, reference)
    tables = [(a @ b.T).double().cpu().numpy() for a, b in pairs]  # [K, K]

    def cosines(kept: np.ndarray) -> np.ndarray:
        gr, gg, rr = (table[np.ix_(kept, kept)] for table in tables)
        between = lambda table: (table.sum() - np.trace(table)) / (len(kept) * (len(kept) - 1))
        lengths = np.sqrt(np.array([between(gg), np.diag(gg).mean()]) * between(rr))
        return between(gr) / lengths

    every = np.arange(len(gradients))
    with np.errstate(invalid="ignore", divide="ignore"):
        left_out = np.array([cosines(np.delete(every, k)) for k in every])
        errors = left_out.std(0) * (len(every) - 1) ** 0.5
        both = np.array([cosines(every), errors]).T.round(4)
    mean, batch = (pair.tolist() if np.isfinite(pair).all() else None for pair in both)
    return {"mean": mean, "batch": batch}


def main() -> None:
    parser = argparse.ArgumentParser(description="end-to-end's gradient", formatter_class=ShortHelp)
    add = parser.add_argument
    add("--model", default="tiny", help="tiny, tiny-show-o or a folder (default: tiny)")
    add("--batches", type=positive(int), default=12, help="(default: 12)")
    args = parser.parse_args()
    policy, judge = load(args.model, pick_device()), load(args.model, pick_device()).requires_grad_(False)
    for part in ("vision_model", "vqmodel"):
        if hasattr(policy, part):
            getattr(policy, part).requires_grad_(False)
    learn = [weight for weight in policy.parameters() if weight.requires_grad]
    world, rng = world_of(policy), np.random.default_rng(0)
    held_out, drawn = frozenset(map(task_key, world.held_out)), {tag: [] for tag in TAGS}
    while min(map(len, drawn.values())) < 2:
        task = draw_task(world.vocabulary, rng, held_out)
        drawn[task.tag].append(task)
    tasks = [task for some in drawn.values() for task in some[:2] for _ in range(GROUP)]
    gradients = defaultdict(list)
    for batch in tqdm(range(args.batches), "batches"):
        seeds = range(batch * len(tasks), (batch + 1) * len(tasks))
        for name, loss in estimates(policy, judge, tasks, seeds, rng).items():
            parts = torch.autograd.grad(loss(), learn, None, True, allow_unused=True, materialize_grads=True)
            gradients[name].append(torch.cat([part.flatten() for part in parts]))
    reference = torch.stack(gradients["REINFORCE"])
    lines = {name: compare(torch.stack(rows), reference) for name, rows in gradients.items()}
    for name, cosines in lines.items():
        cells = ("{:.2f} ± {:.2f}".format(*pair) if pair else "-" for pair in cosines.values())
        print(f"| {name} | {' | '.join(cells)} |")
    result = {"versions": versions(), **vars(args), "estimators": lines}
    write_whole(RESULTS / f"gradients_{Path(args.model).name}.json", json.dumps(result) + "\n")


if __name__ == "__main__":
    run(main)
