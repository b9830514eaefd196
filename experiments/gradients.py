"""Does the gradient through the image point where the loss falls? Ways to estimate it, against REINFORCE.

    python -m experiments.gradients                          # the tiny Janus, ten minutes
    python -m experiments.gradients --model tiny-show-o      # twenty

The loss is the starting model's cross-entropy of the known answer about a picture it draws, of two prompts of
every category. REINFORCE, with the mean of a prompt's other pictures as baseline, estimates its gradient for
the weights without bias. Every other estimator is one of end-to-end's: the judge's gradient at the picture,
sent back into the logits. Batch after batch draws the same prompts anew; per estimator g, REINFORCE's being
r:

    mean    cosine of E g with E r: what many pictures would agree on, and its jackknife standard error
    batch   expected cosine of one batch's g with E r: what one batch is worth

Inner products of expectations are means over pairs of different batches, so they have no bias from noise.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluate import versions, world_of
from model import UnifiedModel, load
from reward import TAGS, Task, draw_task, task_key
from sample import (
    ShortHelp, answer_logprobs, encode_answers, gumbel_given, image_logits, positive, relaxed_codes,
    run, sample_images, write_whole,
)

GROUP = 6  # pictures of each prompt in a batch
NOISES = 8
PLACES = 4  # of each picture, where the exact gradient is enumerated
LIKELY = 8  # codes at each place
PIXELS = 0.2  # standard deviation of the noise before SigLIP
RESULTS = Path(__file__).parent / "figures"


def losses(judge: UnifiedModel, tasks: list[Task], features: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy [B] of the known answers, nats a token, and minus their probability [B]."""
    ids, mask = encode_answers(judge, [task.answer for task in tasks])
    logprobs = answer_logprobs(judge, features, [task.question for task in tasks], ids) * mask
    return -logprobs.sum(1) / mask.sum(1), -logprobs.sum(1).exp()


def pull(judge: UnifiedModel, tasks: list[Task], image: Tensor, loss: int = 0, noise: float = 0.0) -> Tensor:
    """The gradient [B, N, V] of a loss of `losses` for one-hots or mixtures [B, N, V]."""
    image = image.detach().requires_grad_()
    features = image
    if noise:
        pixels = judge.to_pixels(image)
        features = pixels + noise * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    return torch.autograd.grad(losses(judge, tasks, judge.image_features(features))[loss].sum(), image)[0]


def cut(pulls: Tensor, norm: float, dims: tuple[int, ...] = (-1,)) -> Tensor:
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
    rows, weights = [], []
    for picture, row in enumerate(entropy.double().numpy()):
        chances = row / row.sum()
        for place in rng.choice(len(row), PLACES, p=chances):
            for code in p[picture, place].topk(min(LIKELY, p.shape[-1])).indices.tolist():
                rows.append((picture, place, code))
                weights.append(1 / (PLACES * chances[place]))
    picture, place, code = torch.tensor(np.array(rows)).T
    codes = codes[picture]
    codes[torch.arange(len(rows)), place] = code
    with torch.no_grad():
        values = [losses(judge, [tasks[i] for i in part.tolist()], judge.image_features(codes[at]))[0]
                  for part, at in zip(picture.split(192), torch.arange(len(rows)).split(192))]
    change = torch.cat(values) - before[picture]
    return (torch.tensor(weights) * change * logprobs[picture, place, code].exp()).sum().float()


def estimates(
    policy: UnifiedModel, judge: UnifiedModel, tasks: list[Task], seeds: range, rng: np.random.Generator
) -> dict[str, Callable[[], Tensor]]:
    """By name, what gives a batch's loss; its gradient is an estimate."""
    images = sample_images(policy, [task.prompt for task in tasks], seeds, policy.guidance, compiled=False)
    logits = image_logits(policy, images, policy.guidance, 1.0)  # [B, N, V]
    codes = images.codes
    hard = F.one_hot(codes, logits.shape[-1]).to(logits.dtype)
    with torch.no_grad():
        loss = losses(judge, tasks, judge.image_features(codes))[0]
    groups = loss.view(-1, GROUP)
    advantage = (groups - groups.mean(1, keepdim=True)) * GROUP / (GROUP - 1)
    drawn = logits.log_softmax(-1).gather(-1, codes[..., None]).sum((1, 2))
    relaxed = lambda tau, seeds=seeds: relaxed_codes(logits, codes, tau, seeds)
    plain, by_chance = pull(judge, tasks, hard), pull(judge, tasks, hard, loss=1)
    soft = (logits + gumbel_given(logits, codes, seeds)).softmax(-1)
    between, default = pull(judge, tasks, (hard + soft) / 2), cut(plain, 0.1)

    def many() -> Tensor:
        others = [[seed + 10**6 * k for seed in seeds] for k in range(1, NOISES + 1)]
        return (sum(relaxed(1.0, other) for other in others) / NOISES * default).sum()

    ways = {
        "REINFORCE": lambda: (advantage.flatten() * drawn).sum(),
        "cut to 0.1 in each code, tau 1": lambda: (relaxed(1.0) * default).sum(),
        "cut to 0.03": lambda: (relaxed(1.0) * cut(plain, 0.03)).sum(),
        "cut to 0.3": lambda: (relaxed(1.0) * cut(plain, 0.3)).sum(),
        "cut to 1 in each picture": lambda: (relaxed(1.0) * cut(plain, 1.0, (1, 2))).sum(),
        "not cut": lambda: (relaxed(1.0) * plain).sum(),
        "tau 0.5": lambda: (relaxed(0.5) * default).sum(),
        "tau 2": lambda: (relaxed(2.0) * default).sum(),
        f"{NOISES} noises a picture (Gumbel-Rao)": many,
        "no noise": lambda: (logits.softmax(-1) * default).sum(),
        "ReinMax": lambda: (reinmax(logits, codes) * default).sum(),
        "the judge sees half one-hot, half softmax": lambda: (relaxed(1.0) * cut(between, 0.1)).sum(),
        "of minus the answer's probability, not cut": lambda: (relaxed(1.0) * by_chance).sum(),
    }
    if policy.draw_steps is None:
        noisy = cut(pull(judge, tasks, hard, noise=PIXELS), 0.1)
        ways[f"noise of {PIXELS} on the pixels"] = lambda: (relaxed(1.0) * noisy).sum()
        exact = lambda: enumerated(judge, tasks, codes, logits, loss, rng)
        ways["exact for each code, all others fixed"] = exact
    return ways


def compare(gradients: Tensor, reference: Tensor) -> dict[str, list[float]]:
    """Of an estimator's and REINFORCE's gradients [K, D] of K batches: both cosines, each with its standard
    error; no number where E g is not told apart from 0."""
    pairs = (gradients, reference), (gradients, gradients), (reference, reference)
    tables = [(a @ b.T).double().numpy() for a, b in pairs]  # [K, K]

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
    policy, judge = load(args.model), load(args.model).requires_grad_(False)
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
