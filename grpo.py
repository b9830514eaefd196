"""Self-improving GRPO: a unified model draws, answers a question about its own picture, and is rewarded for the answer.

    torchrun grpo.py                                   # the tiny Janus, two CPU cores, under ten minutes
    torchrun grpo.py --model tiny-show-o               # the tiny Show-o, which draws by mask-predict
    torchrun grpo.py --mode end-to-end                 # the answers' gradient goes through the image tokens
    torchrun --nproc_per_node 8 grpo.py --model janus-pro-1b --out runs/janus
    torchrun --nproc_per_node 8 grpo.py --model janus-pro-7b --shard        # a model that does not fit one GPU
    torchrun grpo.py --model janus --lora 16 --micro-batch 1                # adapters, which fit 24 GB
    torchrun grpo.py --resume runs/grpo --steps 300    # go on with a run

UniRL (Mao, Yang, Shou, arXiv 2505.23380), whose training code was never published. For every prompt a group of G
trajectories is sampled: image tokens under guidance, then answer tokens about the decoded picture. The reward compares
the answer with what the prompt says, so no external image, label or judge is needed. Two ways to learn from it:

- `two-stage`: image tokens and answer tokens are actions; both get the group-relative advantage.
- `end-to-end`: only answer tokens are; their gradient goes on through the picture (straight-through Gumbel-softmax).

How this differs from the paper, or fixes what the paper leaves open:

1. Two-stage, image and answer tokens are the actions of one trajectory, with weights.
2. The log-probability of an image token is that of the guided, tempered distribution it was sampled from (--logprob);
   published Janus trainers score the conditional branch alone.
3. Ratios are against the log-probabilities recorded while sampling, not against a detached copy of the training pass,
   so that a difference between the two passes shows: `rollout_difference` is logged and should be about 0.
4. Each trajectory's loss is the mean over its image tokens plus the mean over its answer tokens (weighted), so that
   hundreds of image tokens do not drown a handful of answer tokens.
5. End-to-end, images are sampled first; one parallel pass recomputes their logits, and the Gumbel noise is drawn
   conditioned on the sampled codes, so that no gradient has to run through the sampling loop. A frozen copy of the
   starting model answers and passes the gradient on (--judge), cut to a norm in each picture (--picture-clip).
6. A Show-o draws in steps. The log-probability of an image token is that of the step which committed it, given the
   canvas of that step; the order is taken as given. Of each image a few random steps are replayed (--replay-steps),
   their tokens weighted so that the mean is that over all steps; published trainers of masked language models mask
   anew at random instead (--estimator remask).
7. The detector of `evaluate.py` only measures. It never enters the reward.

Files in --out: args.json, metrics.jsonl, samples/step_*.png, step_*/ (checkpoints that --model and transformers open),
before.json, before.png, after.png, curves.png, summary.json. Keys of a line of metrics.jsonl, all means over the step's
trajectories unless said:

    reward, reward_<tag>   self-reward in [0, 1], over all and over one category's trajectories
    zero_spread            share of groups whose rewards are all equal (they give no gradient)
    loss                   the objective below, summed over ranks
    kl_image, kl_answer    k3 estimate of KL(policy || reference) a token: exp(r - p) - (r - p) - 1, p and r log-probs
    ratio, clipped         mean of exp(p - sampler's log-prob) over image tokens; share of them outside 1 +- clip (with
                           --importance-cap against the training pass's own before the step's first update)
    importance             mean of min(exp(training pass's log-prob - sampler's), cap) over image tokens; 1 without a cap
    rollout_difference     |log-prob of the training pass - of the sampler| a token, before the step's first update
    entropy_image          of the policy's distribution of a code, nats
    grad_norm, lr, seconds gradient norm before clipping; learning rate; wall-clock seconds, without held-out scores
    skipped                updates left out because loss or gradient were not finite
    memory                 GB this process has used at most: allocated on its GPU, or resident
    held_out               every --eval-every steps, of held-out prompts: self_reward, detector, true_pictures, and which of
                           the latter two had `parted` from the first (watch.py)
"""

import argparse
import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from checkpoint import NAMES
from evaluate import evaluate, world_of
from geneval import CLIP
from model import PARTS, UnifiedModel, UserError
from resume import Signals, load_optimizer, load_state, open_run, place, resumed, save_run
from reward import Task, Vocabulary, score
from sample import (
    COMPILING, Answers, Images, ShortHelp, answer_logits, bound_gradient, choose_scored, encode_answers, image_logits,
    image_logprobs, k3, non_negative, positive, relaxed_codes, run, sample_answers, sample_images, start_ranks,
    token_logprobs, trajectory_mean,
)
from training import (
    Health, compute_type, fill_in, gather, in_micro_batches, learning_rate, load_start, make_optimizer, peak_memory,
    prepare, refresh, task_stream, update,
)
from watch import Watch, add_measures, mean_rewards, score_before

MODES = ("two-stage", "end-to-end")
# The recommended runs in the tiny world and for real models (there the paper's learning rate and group), two-stage, and
# with what is different end-to-end.
TINY = {"steps": 80, "prompts": 24, "group": 12, "micro_batch": 144, "draw_batch": 144, "lr": 1.5e-4, "beta": 0.01,
        "answer_weight": 0.0, "eval_every": 20, "eval_images": 6, "max_tokens": 16, "recompute": False, "judge": "policy"}
REAL = {"steps": 1000, "prompts": 8, "group": 8, "micro_batch": 4, "draw_batch": 16, "lr": 1e-5, "beta": 0.03,
        "answer_weight": 0.3, "eval_every": 100, "eval_images": 1, "max_tokens": 40, "recompute": True, "judge": "policy"}
TINY_END_TO_END = {
    **TINY, "steps": 40, "prompts": 12, "lr": 3e-5, "beta": 0.05, "answer_weight": 1.0, "judge": "frozen"
}
REAL_END_TO_END = {**REAL, "answer_weight": 1.0, "judge": "frozen"}
TINY_SHOW_O = {  # without guidance, which leaves it too little to explore; fewer steps, as each takes longer
    "two-stage": {"guidance": 0.0, "steps": 40, "prompts": 16, "micro_batch": 96, "lr": 3e-4, "eval_every": 10},
    "end-to-end": {"guidance": 0.0, "steps": 15, "prompts": 8, "micro_batch": 96, "eval_every": 5},
}
IDLE = (  # what is said to a run that learned nothing for a while
    "no group had answers of different reward, or no gradient came back, so nothing was learned. The task is solved, "
    "hopeless or collapsed at this setting: look at the samples; try a larger --group, --reward partial or "
    "likelihood, or another --guidance"
)

# ---------------------------------------------------------------------------------------------------------------------
# The objective, as pure functions


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each group, [prompts, group] -> the same; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + eps)


def clipped_objective(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's loss a token [B, T]: -min(ratio A, clip(ratio, 1 +- clip) A), ratio against log-probs `old`."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])


def importance(logprobs: Tensor, sampled: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(exp(log-prob - sampler's log-prob), cap) of tokens [B, T] (Ionides 2008)."""
    return (logprobs - sampled).exp().clamp(max=cap)


# ---------------------------------------------------------------------------------------------------------------------
# One step's parts


@dataclass
class Rollout:
    """A micro-batch of trajectories: B images and an answer about each."""

    tasks: list[Task]
    seeds: list[int]
    images: Images
    seen: Tensor  # of the images: codes [B, N] by a Show-o, by a Janus SigLIP's features or, if it learns, pixels
    answers: Answers
    reference_images: Tensor | None = None  # [B, N] log-probs
    reference_answers: Tensor | None = None  # [B, A]
    first: dict[str, Tensor] = field(default_factory=dict, init=False)  # log-probs of the step's first training pass


def roll_out(
    policy: UnifiedModel, judge: UnifiedModel, tasks: list[Task], seeds: list[int], args: argparse.Namespace
) -> Rollout:
    """An image by the policy for every task, and the judge's answer about each image."""
    prompts, questions = [task.prompt for task in tasks], [task.question for task in tasks]
    images = sample_images(policy, prompts, seeds, args.guidance, args.temperature, not args.no_compile)
    images = choose_scored(
        policy, images, seeds, args.estimator, args.replay_steps, args.guidance, args.temperature, args.logprob
    )
    with torch.no_grad():
        seen = policy.see(images.codes)
        if "vision_model" in args.freeze:  # the same for every pass over the answers
            seen = policy.look(seen)
    return Rollout(tasks, seeds, images, seen, sample_answers(judge, seen, questions, seeds, 1.0, args.max_tokens))


def self_reward(judge: UnifiedModel, rollout: Rollout, vocabulary: Vocabulary, kind: str) -> list[float]:
    """The reward of every trajectory in [0, 1]. Another reward is written here, and nowhere else."""
    if kind != "likelihood":
        return [score(text, task, vocabulary, kind) for text, task in zip(rollout.answers.texts, rollout.tasks)]
    ids, mask = encode_answers(judge, [task.answer for task in rollout.tasks])
    with torch.no_grad():
        logits = answer_logits(judge, rollout.seen, [task.question for task in rollout.tasks], ids)
    return (token_logprobs(logits, ids) * mask).sum(1).exp().tolist()


def trajectory_scores(
    model: UnifiedModel, judge: UnifiedModel, rollout: Rollout, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a rollout, teacher-forced: log-probs and entropies [B, N] of its image codes, and log-probs [B, A] of its answer
    tokens. End-to-end the answers' gradient reaches the image's logits through the picture."""
    scoring, seen = (rollout.images, args.guidance, args.temperature, args.logprob), rollout.seen
    if args.mode == "end-to-end" and torch.is_grad_enabled():
        logits = image_logits(model, *scoring)  # [B, N, V]
        logprobs, entropy = rollout.images.score(logits)
        relaxed = relaxed_codes(logits, rollout.images.codes, args.tau, rollout.seeds, rollout.images.weights)
        seen = model.see(bound_gradient(relaxed, args.picture_clip / (args.prompts * args.group)))
    else:
        logprobs, entropy = image_logprobs(model, *scoring)
    if not args.answer_weight:
        return logprobs, entropy, None
    logits = answer_logits(judge, seen, [task.question for task in rollout.tasks], rollout.answers.ids)
    return logprobs, entropy, token_logprobs(logits, rollout.answers.ids)


def objective(
    policy: UnifiedModel, judge: UnifiedModel, rollout: Rollout, advantages: Tensor, args: argparse.Namespace
) -> tuple[Tensor, dict]:
    """The loss summed over these trajectories, and sums over them of what is logged."""
    logprobs, entropy, answer_logprobs = trajectory_scores(policy, judge, rollout, args)
    images, sampled = rollout.images, rollout.images.logprobs
    old, weights = proximal(rollout, "image", logprobs, sampled, args.importance_cap)
    kl = images.mean(k3(logprobs, rollout.reference_images))
    loss = args.beta * kl
    if args.mode == "two-stage":  # the image's tokens are actions too, and get the advantage themselves
        tokens = weights * clipped_objective(logprobs, old, advantages, args.clip)
        loss = args.image_weight * (loss + images.mean(tokens))
    with torch.no_grad():
        ratio = (logprobs - old).exp()
        sums = {
            "kl_image": kl.sum(),
            "ratio": (1 + images.mean(ratio - 1)).sum(),
            "clipped": images.mean(((ratio - 1).abs() > args.clip).float()).sum(),
            "rollout_difference": images.mean((logprobs - sampled).abs()).sum(),
            "importance": (1 + images.mean(weights - 1)).sum(),
            "entropy_image": images.mean(entropy).sum(),
        }
    if answer_logprobs is not None:
        mask = rollout.answers.mask
        old, weights = proximal(rollout, "answer", answer_logprobs, rollout.answers.logprobs, args.importance_cap)
        kl = k3(answer_logprobs, rollout.reference_answers)
        tokens = weights * clipped_objective(answer_logprobs, old, advantages, args.clip) + args.beta * kl
        loss = loss + args.answer_weight * trajectory_mean(tokens, mask)
        sums["kl_answer"] = trajectory_mean(kl, mask).sum()
    return loss.sum(), {"loss": loss.sum(), **sums}


def proximal(
    rollout: Rollout, kind: str, logprobs: Tensor, sampled: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    """What the ratio is against, [B, T], and each token's importance weight. Without a cap these are the sampler's own
    log-probs and 1. With one, the training pass's of this step's first update, and how much likelier that pass finds the
    token than the sampler did, at most `cap`: the sampler may then compute in lower precision."""
    if not cap:
        return sampled, torch.ones_like(sampled)
    old = rollout.first.setdefault(kind, logprobs.detach())
    return old, importance(old, sampled, cap)


def score_by_reference(reference: UnifiedModel, rollout: Rollout, args: argparse.Namespace) -> None:
    """Adds the reference's log-probs of the rollout's tokens."""
    with torch.no_grad():
        rollout.reference_images, _, rollout.reference_answers = trajectory_scores(reference, reference, rollout, args)


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; those left out take the recommended value for the model's world once it is loaded (`fill_in`)."""

    def both(key: str) -> str:
        values = (f"{a[key]:g}" + f" ({b[key]:g} end-to-end)" * (a[key] != b[key])
                  for a, b in ((TINY, TINY_END_TO_END), (REAL, REAL_END_TO_END)))
        return "(default: {} in the tiny world, {} else)".format(*values)

    parser = argparse.ArgumentParser(
        description="self-improving GRPO; flags left out take the model's own defaults", allow_abbrev=False,
        usage="torchrun grpo.py [flags]", formatter_class=ShortHelp,
    )
    add = parser.add_argument_group("run").add_argument
    add("--model", default="tiny", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny)")
    add("--mode", choices=MODES, help="how the image tokens learn (default: two-stage)")
    add("--out", default="runs/grpo", help="output folder (default: runs/grpo)")
    add("--resume", metavar="FOLDER", help="go on with the run in this folder, with its flags")
    add("--seed", type=non_negative(int), default=0)
    add("--steps", type=positive(int), help=both("steps"))
    add("--save-every", type=positive(int), default=100, help="steps between checkpoints (default: 100)")
    add("--keep", type=non_negative(int), default=3, help="checkpoints that stay, the last; 0: all (default: 3)")
    add("--no-compile", action="store_true", help="start at once, sample slower")
    add = parser.add_argument_group("watching").add_argument
    add("--eval-every", type=non_negative(int), help="steps between held-out scores, 0: never " + both("eval_every"))
    add("--eval-images", type=positive(int), help="images a held-out prompt, before and after " + both("eval_images"))
    add("--detector", metavar="FOLDER", help="judges held-out pictures of a real model, as in evaluate.py (default: none)")
    add("--detector-clip", metavar="FOLDER", default=CLIP, help=f"names colors for it (default: {CLIP})")
    add("--true-images", metavar="FOLDER",
        help="true pictures in GenEval's layout, to measure understanding on (default: the tiny world draws its own)")
    add("--gap-margin", type=non_negative(float), default=0.02,
        help="fall of detector's score or understanding that warns if self-reward does not fall (default: 0.02)")
    add("--stop-on-gap", action=argparse.BooleanOptionalAction, help="save and stop then (default: warn)")
    add("--tensorboard", action="store_true", help="metrics and sheets for TensorBoard, too, where it is installed")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts", type=positive(int), help="prompts a step, over all ranks " + both("prompts"))
    add("--tasks", metavar="FILE", help="your own prompts, JSON lines as reward.read_tasks says, to train on")
    add("--group", type=positive(int), help="images a prompt " + both("group"))
    add("--micro-batch", type=positive(int), help="images an update takes at once on a rank " + both("micro_batch"))
    add("--draw-batch", type=positive(int), help="images drawn at once on a rank " + both("draw_batch"))
    add("--guidance", type=non_negative(float), help="w (default: the checkpoint's; a tiny Show-o learns at 0)")
    add("--temperature", type=positive(float), default=1.0, help="of image tokens (default: 1)")
    add("--draw-steps", type=positive(int), help="of mask-predict, Show-o's (default: the checkpoint's)")
    add("--max-tokens", type=positive(int), help="of an answer " + both("max_tokens"))
    add = parser.add_argument_group("learning").add_argument
    add("--reward", choices=["exact", "partial", "likelihood"], default="exact", help="(default: exact)")
    add("--logprob", choices=["guided", "detached", "conditional"], default="guided",
        help="whose log-probability of an image token (default: guided, the distribution that is sampled)")
    add("--estimator", choices=["replay", "remask"],
        help="of that of a Show-o's: in the steps that committed them, or masked anew at random (default: replay)")
    add("--replay-steps", type=non_negative(int), help="random steps replayed of a Show-o's image, 0: all (default: 3)")
    add("--lr", type=positive(float), help="at its highest; falls to 0 over --steps; with --lora ten times " + both("lr"))
    add("--warmup", type=non_negative(int), default=10, help="steps of linear warm-up (default: 10)")
    add("--beta", type=non_negative(float), help="of the KL to the reference " + both("beta"))
    add("--clip", type=positive(float), default=0.2, help="of the ratio (default: 0.2)")
    add("--importance-cap", type=non_negative(float), default=0.0, metavar="C",
        help="weigh tokens by how much likelier the training pass finds them than the sampler, at most C (default: 0, off)")
    add("--epochs", type=positive(int), default=1, help="updates a rollout (default: 1)")
    add("--image-weight", type=non_negative(float), default=1.0, help="of the image tokens' loss, two-stage (default: 1)")
    add("--answer-weight", type=non_negative(float), help="of the answer tokens' loss " + both("answer_weight"))
    add("--tau", type=positive(float), default=1.0, help="of the straight-through Gumbel-softmax (default: 1)")
    add("--picture-clip", type=positive(float), default=1.0,
        help="of the norm of the end-to-end gradient in each picture's codes (default: 1)")
    add("--judge", choices=["policy", "frozen"],
        help="who answers: the policy or its frozen start (default: frozen end-to-end, whose gradient it passes on)")
    add("--max-grad-norm", type=positive(float), default=1.0, help="(default: 1)")
    add("--max-kl", type=non_negative(float), default=10.0,
        help="nats an image token, above which a run is stopped, 0: none (default: 10)")
    add("--entropy", type=non_negative(float), nargs=2, default=[0.002, 0.99], metavar=("LOW", "HIGH"),
        help="of image tokens, as shares of that of noise, outside which a run is stopped (default: 0.002 0.99)")
    add = parser.add_argument_group("memory and machines").add_argument
    add("--bf16", action="store_true", help="compute in bfloat16 (always on GPUs); weights that learn stay float32")
    add("--sample-bf16", action=argparse.BooleanOptionalAction,
        help="draw and answer with a bfloat16 copy of the trunk (default: on GPUs and with --bf16, without --lora)")
    add("--shard", action="store_true", help="share the trunk's blocks out among the ranks (FSDP2); needs torchrun")
    add("--lora", type=positive(int), metavar="R", help="learn adapters of rank R of the trunk's linear layers instead")
    add("--freeze", nargs="*", choices=PARTS, metavar="PART",
        help=f"parts that stay as they are, of {', '.join(PARTS)} (default: those that it has of vision_model vqmodel)")
    add("--recompute", action=argparse.BooleanOptionalAction, help="gradient checkpointing " + both("recompute"))
    add("--timeout", type=positive(float), default=600, help="seconds that ranks wait for another one (default: 600)")
    args = parser.parse_args(argv)
    if args.resume:
        args = resumed(parser, argv, "grpo.py")
    if args.group == 1:
        parser.error("--group 1 has nothing to compare: give at least 2")
    if args.image_weight == args.answer_weight == 0:
        parser.error("--image-weight and --answer-weight are both 0: nothing would be trained")
    args.script, args.mode = "grpo.py", args.mode or "two-stage"
    return args


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    rank, ranks, device = start_ranks(args.timeout)
    policy = load_start(args, device)
    world = world_of(policy)
    two_stage, end_to_end = (TINY, TINY_END_TO_END) if world.detect else (REAL, REAL_END_TO_END)
    defaults = two_stage if args.mode == "two-stage" else end_to_end
    fill_in(args, {**defaults, **(TINY_SHOW_O[args.mode] if world.detect and policy.steps else {})}, policy, ranks)
    if not args.answer_weight and (args.mode == "end-to-end" or not args.image_weight):
        raise UserError("--answer-weight is 0, and nothing else would be trained")
    if args.judge == "frozen" and args.mode == "two-stage" and args.answer_weight:
        raise UserError("--judge frozen answers itself, so that two-stage has no answers to train: --answer-weight 0")
    add_measures(world, args, device)
    draw_task, vocabulary = task_stream(args, policy, world)
    out, start = open_run(args, policy)
    signals = Signals(args, device)
    checkpoint = place(out, start) if start else None
    reference, sampler = prepare(policy, args, device, checkpoint)
    judge, asked = (reference, reference) if args.judge == "frozen" else (policy, sampler)  # to learn from, to answer
    optimizer, state = make_optimizer(policy, args), {}
    if checkpoint:
        load_optimizer(optimizer, policy, checkpoint)
        state, _ = load_state(checkpoint)
    health = Health(args, policy.num_codes, state.get("health"))
    dtype = compute_type(args, device)
    compute = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)
    began, compiled = time.time(), not args.no_compile

    def measure(name: str, images: int) -> tuple[dict, list[dict]]:
        refresh(sampler, policy)
        with compute:
            return evaluate(
                sampler, world, args.guidance, args.temperature, images, 0, args.draw_batch, compiled, progress=name
            )

    if rank == 0 and compiled:
        print(COMPILING, flush=True)
    before = score_before(out, rank, lambda: measure("before", args.eval_images))
    watch = Watch(args, world, before, rank, start)

    bar = tqdm(range(start, args.steps), "grpo", args.steps, initial=start, disable=None if rank == 0 else True)
    for step in signals.during(bar):
        clock = time.time()
        # 1. Draw prompts whose facts are known, the same on every rank; this rank takes its share of the trajectories.
        rng = np.random.default_rng((args.seed, step))
        tasks = [draw_task(rng) for _ in range(args.prompts)]
        tasks = [task for task in tasks for _ in range(args.group)]
        seeds = rng.integers(2**62, size=len(tasks)).tolist()
        share = len(tasks) // ranks
        first, last = rank * share, (rank + 1) * share
        rows = [slice(at, at + args.micro_batch) for at in range(first, last, args.micro_batch)]
        draws = [slice(at, min(at + args.draw_batch, last)) for at in range(first, last, args.draw_batch)]

        refresh(sampler, policy)
        with compute:
            # 2. Draw an image for every trajectory and answer its question about it.
            rollouts = in_micro_batches(
                (roll_out(sampler, asked, tasks[part], seeds[part], args) for part in draws), args.micro_batch
            )

            # 3. Reward the answers, and compare within the group, even where it spans ranks.
            mine = [reward for rollout in rollouts for reward in self_reward(asked, rollout, vocabulary, args.reward)]
            rewards = gather(torch.tensor(mine, device=device)).view(args.prompts, args.group)
            advantages = group_advantages(rewards).flatten()  # [prompts * group]

            # 4. What the frozen reference thinks of the same tokens.
            for rollout in rollouts:
                score_by_reference(reference, rollout, args)

        # 5. Raise what did better than its group.
        objectives = [
            partial(objective, policy, judge, rollout, advantages[part], args) for rollout, part in zip(rollouts, rows)
        ]
        lr, updates = learning_rate(step, args), []
        for _ in range(args.epochs):
            updates.append(update(optimizer, objectives, len(tasks), lr, args.max_grad_norm, compute))

        # 6. Log, look, measure, save.
        zero_spread = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        line = {
            "step": step + 1, **mean_rewards(tasks, rewards.flatten().tolist()), "zero_spread": zero_spread, **updates[-1],
            "rollout_difference": updates[0]["rollout_difference"], "skipped": sum(means["skipped"] for means in updates),
        }
        line |= {"seconds": time.time() - clock, "memory": peak_memory(device)}
        last = step + 1 == args.steps
        if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
            scores, _ = measure("held-out", watch.images)
            line["held_out"] = watch.gauge(scores, step + 1, watch.images)
            bar.set_postfix_str(watch.text(line["held_out"]))
        if rank == 0:
            watch.line(line)
            bar.set_description(f"grpo, self-reward {line['reward']:.2f}")
            if step == 0 or (step + 1) % 25 == 0 or last:
                watch.sheet(sampler, rollouts, mine, step + 1)
        health.check(line, zero_spread == 1 or updates[-1]["grad_norm"] == 0, IDLE, rollouts, rank)
        stop = signals.stop()
        fooled = watch.gap if args.stop_on_gap else ""
        if (step + 1) % args.save_every == 0 or last or stop or fooled:
            save_run(policy, optimizer, out, step + 1, args.keep, {"health": health.counts})
        if fooled:
            raise UserError(f"stopped after step {step + 1}, which is saved: {fooled}")
        if stop:
            signals.say(f"stopped after step {step + 1}, which is saved")
            break
    else:
        after, records = measure("after", args.eval_images)
        if rank == 0:
            watch.finish(after, records, time.time() - began)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
