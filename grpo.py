"""Self-improving GRPO: a unified model draws, answers a question about its own picture, and is rewarded for the answer.

    torchrun grpo.py                                   # the tiny Janus, two CPU cores, under ten minutes
    torchrun --nproc_per_node 8 grpo.py --model janus-pro-1b --out runs/janus
    python grpo.py --resume runs/grpo --steps 300      # go on with a run

UniRL (Mao, Yang, Shou, arXiv 2505.23380), whose training code was never published. For every prompt a group of G
trajectories is sampled: image tokens under guidance, then answer tokens about the decoded picture. The reward compares
the answer with what the prompt says, so no external image, label or judge is needed. How this differs from the paper,
or fixes what the paper leaves open:

1. Image and answer tokens are the actions of one trajectory; both get the group-relative advantage, with weights.
2. The log-probability of an image token is that of the guided, tempered distribution it was sampled from (--logprob);
   published Janus trainers score the conditional branch alone.
3. Ratios are against the log-probabilities recorded while sampling, not against a detached copy of the training pass,
   so that a difference between the two passes shows: `rollout_difference` is logged and should be about 0.
4. Each trajectory's loss is the mean over its image tokens plus the mean over its answer tokens (weighted), so that
   hundreds of image tokens do not drown a handful of answer tokens.
5. The detector of `evaluate.py` only measures. It never enters the reward.

Files in --out: args.json, metrics.jsonl, samples/step_*.png, step_*/ (checkpoints that --model and transformers open),
before.json, summary.json. Keys of a line of metrics.jsonl, all means over the step's trajectories unless said:

    reward, reward_<tag>   self-reward in [0, 1], over all and over one category's trajectories
    zero_spread            share of groups whose rewards are all equal (they give no gradient)
    loss                   the objective below, summed over ranks
    kl_image, kl_answer    k3 estimate of KL(policy || reference) a token: exp(r - p) - (r - p) - 1, p and r log-probs
    ratio, clipped         mean of exp(p - sampler's log-prob) over image tokens; share of them outside 1 +- clip
    rollout_difference     |log-prob of the training pass - of the sampler| a token, before the step's first update
    entropy_image          of the policy's distribution of a code, nats
    grad_norm, lr, seconds gradient norm before clipping; learning rate; wall-clock seconds of the step
    held_out               every --eval-every steps: overall detector score and understanding of held-out prompts
"""

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from evaluate import World, evaluate, report, table, world_of, write_json
from model import NAMES, Janus, UserError, load, save
from reward import Task, draw_task, score, task_key
from sample import (
    Answers, Images, answer_logits, contact_sheet, encode_answers, image_logits, non_negative, pick_device, positive,
    run, sample_answers, sample_images, to_uint8, token_logprobs,
)

# What differs between the run recommended in the tiny world and for real models (there the paper's lr and group).
TINY = {"steps": 70, "prompts": 12, "group": 12, "lr": 1e-4, "beta": 0.01, "answer_weight": 0.0, "eval_every": 35,
        "eval_images": 7, "max_tokens": 16}
REAL = {"steps": 1000, "prompts": 8, "group": 8, "lr": 1e-5, "beta": 0.03, "answer_weight": 0.3, "eval_every": 0,
        "eval_images": 1, "max_tokens": 40}
PATIENCE = 10  # steps in a row without any spread of rewards, or with no gradient, before a run is stopped

# ---------------------------------------------------------------------------------------------------------------------
# The objective, as pure functions


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each group, [prompts, group] -> the same; 0 where all rewards are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + eps)


def clipped_objective(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's loss a token [B, T]: -min(ratio A, clip(ratio, 1 +- clip) A), ratio against the sampler's log-probs."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from tokens of the policy (Schulman 2020)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def trajectory_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each trajectory: [B, T] -> [B]."""
    return (values * mask).sum(1) / mask.sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# One step's parts


@dataclass
class Rollout:
    """A micro-batch of trajectories: B images and an answer about each."""

    tasks: list[Task]
    images: Images
    pixels: Tensor  # [B, 3, H, W]
    answers: Answers
    reference_images: Tensor | None = None  # [B, N] log-probs
    reference_answers: Tensor | None = None  # [B, A]


def roll_out(model: Janus, tasks: list[Task], seeds: list[int], args) -> Rollout:
    """An image for every task, and an answer about each image."""
    prompts, questions = [task.prompt for task in tasks], [task.question for task in tasks]
    images = sample_images(model, prompts, seeds, args.guidance, args.temperature, not args.no_compile)
    with torch.no_grad():
        pixels = model.to_pixels(images.codes)
    return Rollout(tasks, images, pixels, sample_answers(model, pixels, questions, seeds, 1.0, args.max_tokens))


def self_reward(model: Janus, rollout: Rollout, world: World, kind: str) -> list[float]:
    """The reward of every trajectory in [0, 1]. Another reward is written here, and nowhere else."""
    if kind != "likelihood":
        return [score(text, task, world.vocabulary, kind) for text, task in zip(rollout.answers.texts, rollout.tasks)]
    ids, mask = encode_answers(model, [task.answer for task in rollout.tasks])
    with torch.no_grad():
        logits = answer_logits(model, rollout.pixels, [task.question for task in rollout.tasks], ids)
    return (token_logprobs(logits, ids) * mask).sum(1).exp().tolist()


def trajectory_logits(model: Janus, rollout: Rollout, args) -> tuple[Tensor, Tensor | None]:
    """Logits of the image codes [B, N, V] and of the answer tokens [B, A, vocabulary] of a rollout, teacher-forced."""
    images = image_logits(model, rollout.images, args.guidance, args.temperature, args.logprob)
    if not args.answer_weight:
        return images, None
    questions = [task.question for task in rollout.tasks]
    return images, answer_logits(model, rollout.pixels, questions, rollout.answers.ids)


def objective(model: Janus, rollout: Rollout, advantages: Tensor, args) -> tuple[Tensor, dict[str, float]]:
    """The loss summed over these trajectories, and sums over them of what is logged."""
    image_logits_, answer_logits_ = trajectory_logits(model, rollout, args)
    codes, old = rollout.images.codes, rollout.images.logprobs
    logprobs = token_logprobs(image_logits_, codes)  # [B, N]
    kl = k3(logprobs, rollout.reference_images)
    loss = args.image_weight * (clipped_objective(logprobs, old, advantages, args.clip) + args.beta * kl).mean(1)
    with torch.no_grad():
        ratio, distribution = (logprobs - old).exp(), image_logits_.log_softmax(-1)
        sums = {
            "kl_image": kl.mean(1).sum(),
            "ratio": ratio.mean(1).sum(),
            "clipped": ((ratio - 1).abs() > args.clip).float().mean(1).sum(),
            "rollout_difference": (logprobs - old).abs().mean(1).sum(),
            "entropy_image": -(distribution.exp() * distribution).sum(-1).mean(1).sum(),
        }
    if answer_logits_ is not None:
        answers = rollout.answers
        logprobs = token_logprobs(answer_logits_, answers.ids)  # [B, A]
        kl = k3(logprobs, rollout.reference_answers)
        tokens = clipped_objective(logprobs, answers.logprobs, advantages, args.clip) + args.beta * kl
        loss = loss + args.answer_weight * trajectory_mean(tokens, answers.mask)
        sums["kl_answer"] = trajectory_mean(kl, answers.mask).sum()
    return loss.sum(), {"loss": loss.sum(), **sums}


def score_by_reference(reference: Janus, rollout: Rollout, args) -> None:
    """Adds the reference's log-probs of the rollout's tokens."""
    with torch.no_grad():
        images, answers = trajectory_logits(reference, rollout, args)
        rollout.reference_images = token_logprobs(images, rollout.images.codes)
        if answers is not None:
            rollout.reference_answers = token_logprobs(answers, rollout.answers.ids)


def update(policy: Janus, optimizer, weights: list, rollouts: list[Rollout], advantages: list[Tensor], args, compute):
    """One optimizer step on all ranks' trajectories, accumulated over micro-batches. Means over them of what is logged;
    nothing is changed where loss or gradient are not finite."""
    optimizer.zero_grad()
    count, totals = args.prompts * args.group, {}
    for rollout, part in zip(rollouts, advantages):
        with compute:
            loss, sums = objective(policy, rollout, part, args)
        (loss / count).backward()
        totals = {key: totals.get(key, 0) + value.detach() for key, value in sums.items()}
    sum_gradients(weights)
    norm = torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item()
    means = dict(zip(totals, (sum_over_ranks(torch.stack(list(totals.values()))) / count).tolist()))
    if np.isfinite(norm) and np.isfinite(means["loss"]):
        optimizer.step()
    return {**means, "grad_norm": norm}


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def start_ranks() -> tuple[int, int, torch.device]:
    """This process' rank, the number of ranks, and its device; joins the others when started by torchrun."""
    device = pick_device()
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(values: Tensor) -> Tensor:
    """Every rank's [B] joined in rank order."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def sum_gradients(weights: list[torch.nn.Parameter]) -> None:
    """Each rank holds the gradient of its own trajectories' share of the loss; the whole gradient is their sum."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        grads = [weight.grad for weight in weights if weight.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])  # one message instead of one a tensor
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def open_run(args, rank: int) -> tuple[Path, int]:
    """The output folder, and the step to start from. A folder that holds a run is refused unless it is resumed."""
    out = Path(args.out)
    if args.resume:
        start = max((int(path.name[5:]) for path in out.glob("step_*") if path.name[5:].isdigit()), default=0)
        if start >= args.steps:
            raise UserError(f"{out} already has {start} steps: give more with --steps")
        if rank == 0 and (out / "metrics.jsonl").exists():  # steps after the checkpoint are run, and logged, again
            lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
            (out / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
        return out, start
    if (out / "args.json").exists():
        raise UserError(f"{out} already holds a run: give another --out, or go on with --resume {out}")
    if dist.is_initialized():
        dist.barrier()  # every rank has looked before the first one writes
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        if rank == 0:
            write_json(out / "args.json", vars(args))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return out, 0


def freeze_reference(policy: Janus) -> Janus:
    """A frozen copy of the whole policy: the KL is to what the reference thinks through its *own* embeddings, aligners
    and heads. Only what never changes, SigLIP and the image tokenizer, is shared to save memory."""
    same = (policy.vision_model, policy.vqmodel, policy.processor, policy.tokenizer, policy.config)
    shared = {id(part): part for part in same}
    return copy.deepcopy(policy, shared).requires_grad_(False)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restores the optimizer's state from a checkpoint folder."""
    try:
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: no optimizer state to resume from ({str(error).splitlines()[0]})") from None


def save_batch(rollouts: list[Rollout], path: Path) -> None:
    """What was sampled, to look into what went wrong: torch.load(path, weights_only=True)."""
    torch.save([
        {"prompts": [task.prompt for task in r.tasks], "codes": r.images.codes, "logprobs": r.images.logprobs,
         "answers": r.answers.texts, "answer_logprobs": r.answers.logprobs} for r in rollouts
    ], path)


def sheet(rollouts: list[Rollout], rewards: list[float], path: Path, count: int = 24) -> None:
    """A contact sheet of this rank's trajectories, evenly chosen: prompt, answer, reward."""
    pixels = np.concatenate([to_uint8(r.pixels) for r in rollouts])
    prompts = [task.prompt.removeprefix("a photo of ") for r in rollouts for task in r.tasks]
    texts = [text for r in rollouts for text in r.answers.texts]
    chosen = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int)
    captions = [f"{prompts[i]}\nsays: {texts[i]}\nreward {rewards[i]:.2f}" for i in chosen]
    contact_sheet(pixels[chosen], captions, path)


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; those left out take the recommended value for the model's world once it is loaded (`fill_in`)."""

    def both(key: str) -> str:
        return f"(default: {TINY[key]:g} in the tiny world, {REAL[key]:g} else)"

    parser = argparse.ArgumentParser(description="self-improving GRPO", allow_abbrev=False)
    add = parser.add_argument_group("run").add_argument
    add("--model", default="tiny", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny)")
    add("--mode", choices=["two-stage"], default="two-stage", help="the way through the image")
    add("--out", default="runs/grpo", help="output folder (default: runs/grpo)")
    add("--resume", metavar="FOLDER", help="go on with the run in this folder, with its flags")
    add("--seed", type=non_negative(int), default=0)
    add("--steps", type=positive(int), help=both("steps"))
    add("--save-every", type=positive(int), default=100, help="steps between checkpoints (default: 100)")
    add("--eval-every", type=non_negative(int), help="steps between held-out scores, 0: never " + both("eval_every"))
    add("--eval-images", type=positive(int), help="images a held-out prompt, before and after " + both("eval_images"))
    add("--no-compile", action="store_true", help="start at once, sample slower")
    add("--bf16", action="store_true", help="compute in bfloat16 (always on GPUs); weights stay float32")
    add = parser.add_argument_group("sampling").add_argument
    add("--prompts", type=positive(int), help="prompts a step, over all ranks " + both("prompts"))
    add("--group", type=positive(int), help="images a prompt " + both("group"))
    add("--micro-batch", type=positive(int), help="images at once on a rank (default: all of a step's)")
    add("--guidance", type=non_negative(float), help="w (default: the checkpoint's)")
    add("--temperature", type=positive(float), default=1.0, help="of image tokens (default: 1)")
    add("--max-tokens", type=positive(int), help="of an answer " + both("max_tokens"))
    add = parser.add_argument_group("learning").add_argument
    add("--reward", choices=["exact", "partial", "likelihood"], default="exact", help="(default: exact)")
    add("--logprob", choices=["guided", "detached", "conditional"], default="guided",
        help="whose log-probability of an image token (default: guided, the distribution that is sampled)")
    add("--lr", type=positive(float), help=both("lr"))
    add("--warmup", type=non_negative(int), default=10, help="steps of linear warm-up (default: 10)")
    add("--beta", type=non_negative(float), help="of the KL to the reference " + both("beta"))
    add("--clip", type=positive(float), default=0.2, help="of the ratio (default: 0.2)")
    add("--epochs", type=positive(int), default=1, help="updates a rollout (default: 1)")
    add("--image-weight", type=non_negative(float), default=1.0, help="of the image tokens' loss (default: 1)")
    add("--answer-weight", type=non_negative(float), help="of the answer tokens' loss " + both("answer_weight"))
    add("--max-grad-norm", type=positive(float), default=1.0, help="(default: 1)")
    args = parser.parse_args(argv)
    if args.group == 1:
        parser.error("--group 1 has nothing to compare: give at least 2")
    if args.image_weight == 0 and args.answer_weight == 0:
        parser.error("--image-weight and --answer-weight are both 0: nothing would be trained")
    if args.resume:
        path = Path(args.resume) / "args.json"
        if not path.exists():
            raise UserError(f"{args.resume}: holds no run of grpo.py (no args.json)")
        changes = {"resume": args.resume, "out": args.resume, **({"steps": args.steps} if args.steps else {})}
        args = argparse.Namespace(**{**json.loads(path.read_text()), **changes})
    return args


def fill_in(args, world: World, model: Janus, ranks: int) -> None:
    """The recommended values for the flags that were left out; refuses what cannot be split over the ranks."""
    for key, value in (TINY if world.detect else REAL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.guidance = model.guidance if args.guidance is None else args.guidance
    if not args.image_weight and not args.answer_weight:
        raise UserError("--image-weight is 0, and so is the default of --answer-weight here: nothing would be trained")
    images = args.prompts * args.group
    if images % ranks:
        raise UserError(f"{args.prompts} prompts x {args.group} images a step cannot be split over {ranks} ranks")
    args.micro_batch = min(args.micro_batch or images, images // ranks)
    if images // ranks % args.micro_batch:
        raise UserError(f"--micro-batch {args.micro_batch} does not divide a rank's {images // ranks} images")


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = parse_args()
    rank, ranks, device = start_ranks()
    policy = load(args.model, device)
    world = world_of(policy)
    fill_in(args, world, policy, ranks)
    reference = freeze_reference(policy)
    out, start = open_run(args, rank)
    if start:
        policy = load(str(out / f"step_{start:06d}"), device)
    # SigLIP and the image tokenizer stay as they are; trunk, embeddings, aligners and heads learn.
    policy.vision_model.requires_grad_(False)
    policy.vqmodel.requires_grad_(False)
    weights = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    if start:
        load_optimizer(optimizer, out / f"step_{start:06d}")
    compute = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 or device.type == "cuda")
    held_out = frozenset(task_key(task) for task in world.suite)
    began, idle, compiled = time.time(), 0, not args.no_compile

    def measure(name: str, images: int) -> tuple[dict, list[dict]]:
        with compute:
            return evaluate(
                policy, world, args.guidance, args.temperature, images, 0, args.micro_batch, compiled, progress=name
            )

    if rank == 0 and compiled:
        print("compiling the sampler on first use: about a minute (--no-compile avoids it)", flush=True)
    if (out / "before.json").exists():
        before = json.loads((out / "before.json").read_text())
    else:
        before, records = measure("before", args.eval_images)
        if rank == 0:
            write_json(out / "before.json", before)
            report(records, out / "before.png")

    bar = tqdm(range(start, args.steps), "grpo", args.steps, initial=start, disable=None if rank == 0 else True)
    for step in bar:
        clock = time.time()
        # 1. Draw prompts whose facts are known, the same on every rank; this rank takes its share of the trajectories.
        rng = np.random.default_rng((args.seed, step))
        tasks = [draw_task(world.vocabulary, rng, held_out) for _ in range(args.prompts)]
        tasks = [task for task in tasks for _ in range(args.group)]
        seeds = rng.integers(2**62, size=len(tasks)).tolist()
        share = len(tasks) // ranks
        starts = range(rank * share, (rank + 1) * share, args.micro_batch)
        rows = [slice(first, first + args.micro_batch) for first in starts]

        with compute:
            # 2. Draw an image for every trajectory and answer its question about it.
            rollouts = [roll_out(policy, tasks[part], seeds[part], args) for part in rows]

            # 3. Reward the answers, and compare within the group, even where it spans ranks.
            mine = [reward for rollout in rollouts for reward in self_reward(policy, rollout, world, args.reward)]
            rewards = gather(torch.tensor(mine, device=device)).view(args.prompts, args.group)
            advantages = group_advantages(rewards).flatten()  # [prompts * group]

            # 4. What the frozen reference thinks of the same tokens.
            for rollout in rollouts:
                score_by_reference(reference, rollout, args)

        # 5. Raise what did better than its group.
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / (args.warmup + 1))
        for epoch in range(args.epochs):
            means = update(policy, optimizer, weights, rollouts, [advantages[part] for part in rows], args, compute)
            first = means if epoch == 0 else first
            if not (np.isfinite(means["loss"]) and np.isfinite(means["grad_norm"])):
                save_batch(rollouts, out / f"failed_batch_rank{rank}.pt")
                raise UserError(f"step {step + 1}: loss {means['loss']}, gradient norm {means['grad_norm']}. The batch "
                                f"is in {out}, the last checkpoint is intact; try a lower --lr")

        # 6. Log, look, measure, save.
        by_tag = {}
        for task, group in zip(tasks[:: args.group], rewards.tolist()):
            by_tag.setdefault(f"reward_{task.tag}", []).extend(group)
        zero_spread = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        line = {
            "step": step + 1, "reward": rewards.mean().item(), "zero_spread": zero_spread, **means,
            "rollout_difference": first["rollout_difference"], "lr": optimizer.param_groups[0]["lr"],
            **{key: float(np.mean(values)) for key, values in sorted(by_tag.items())},
        }
        last = step + 1 == args.steps
        if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
            scores, _ = measure("held-out", min(2, args.eval_images))
            line["held_out"] = {"generation": scores["generation"]["overall"], **scores["understanding"]}
            bar.set_postfix_str(f"held-out {line['held_out']['generation'] or 0:.3f}")
        line["seconds"] = time.time() - clock
        if rank == 0:
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            bar.set_description(f"grpo, self-reward {line['reward']:.2f}")
            if step == 0 or (step + 1) % 25 == 0 or last:
                sheet(rollouts, mine, out / "samples" / f"step_{step + 1:06d}.png")
            if (step + 1) % args.save_every == 0 or last:
                save(policy, out / f"step_{step + 1:06d}", {"optimizer.pt": optimizer.state_dict()})
        idle = idle + 1 if zero_spread == 1 or means["grad_norm"] == 0 else 0
        if idle == PATIENCE:
            raise UserError(
                f"stopped at step {step + 1}: for {PATIENCE} steps no group had answers of different reward, so "
                "nothing was learned. The task is solved, hopeless or collapsed at this setting: look at the samples; "
                "try a larger --group, --reward partial or likelihood, or another --guidance"
            )

    after, records = measure("after", args.eval_images)
    if rank == 0:
        finish(args, out, before, after, records, world, time.time() - began)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def finish(args, out: Path, before: dict, after: dict, records: list[dict], world: World, seconds: float) -> None:
    """summary.json, after.png and the table, with the conditions of the scores and what to do next."""
    summary = {"model": args.model, "mode": args.mode, "seed": args.seed, "steps": args.steps, "seconds": seconds}
    write_json(out / "summary.json", {**summary, "before": before, "after": after})
    report(records, out / "after.png")
    print(table({"before": before, "after": after}))
    print(f"{args.eval_images} images for each of {len(world.suite)} held-out prompts, guidance {args.guidance:g}, "
          f"temperature {args.temperature:g}, evaluation seed 0; {seconds:.0f} s in all")
    print(f"look at {out}/before.png and {out}/after.png; then: python sample.py \"{world.suite[0].prompt}\" "
          f"--model {out}/step_{args.steps:06d}")


if __name__ == "__main__":
    run(main)
