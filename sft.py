"""Self-improving SFT: a unified model draws, and learns from the known answer to a question about its own picture.

    torchrun sft.py                                    # the tiny Janus, two CPU cores, under ten minutes
    torchrun sft.py --model tiny-show-o                # the tiny Show-o, which draws by mask-predict
    torchrun sft.py --mode end-to-end                  # through the image tokens, by straight-through Gumbel-softmax
    torchrun --nproc_per_node 8 sft.py --model janus-pro-1b --out runs/janus-sft
    torchrun --nproc_per_node 8 sft.py --model janus-pro-7b --shard        # a model that does not fit one GPU
    torchrun sft.py --resume runs/sft                  # go on with a run

UniRL (Mao, Yang, Shou, arXiv 2505.23380), whose training code was never published. A prompt is built from facts, so the
answer to its question is known. Two ways to learn from it:

- `end-to-end`: cross-entropy of the known answer about the model's own picture, back-propagated through the picture:
  answer <- trunk <- SigLIP <- pixels <- VQ decoder <- codebook <- relaxed one-hots <- generator in a Janus,
  answer <- trunk <- relaxed one-hots <- generator in a Show-o.
- `two-stage`: cross-entropy of the known answer, and cross-entropy of the image tokens of those own pictures whose
  answer came out right (expert iteration), from a buffer of recent ones.

How this differs from the paper, or fixes what the paper leaves open:

1. No gradient runs through the sampling loop. Images are sampled first; one parallel pass recomputes their logits, and
   the Gumbel noise is drawn conditioned on the sampled codes, so that the relaxed image is the very image sampled.
2. The likelihood of image tokens is that of the guided, tempered distribution they were sampled from (--logprob). To
   raise the conditional branch's alone applies guidance on top of what guidance already did, round after round.
3. A KL to the starting model on the image tokens of fresh pictures (--beta), as in grpo.py.
4. End-to-end, a frozen copy of the starting model answers and passes the gradient on (--judge). The policy itself would
   at the same time be taught the known answers about pictures that do not show them, and forget how to see. Each
   picture's gradient is cut to a norm, or a few pictures would decide every step (--picture-clip).
5. A Show-o's image tokens are scored in the steps that committed them, a few random ones of each picture
   (--replay-steps), or masked anew at random (--estimator remask), as grpo.py says.
6. The detector of `evaluate.py` only measures. It selects no picture.

Files in --out: as of grpo.py. Keys of a line of metrics.jsonl, all means over the step's trajectories unless said:

    reward, reward_<tag>   share of own pictures answered right (greedy), over all and over one category's
    buffer                 pictures in this rank's replay buffer (two-stage)
    loss                   the objective below, summed over ranks
    loss_answer            cross-entropy of the known answer's tokens about own pictures, nats a token
    loss_image             cross-entropy of the replayed pictures' codes, nats a code (two-stage)
    kl_image               k3 estimate of KL(policy || reference) a code of fresh pictures
    rollout_difference     |log-prob of the training pass - of the sampler| a code
    entropy_image          of the policy's distribution of a code, nats
    grad_norm, lr, seconds gradient norm before clipping; learning rate; wall-clock seconds, without held-out scores
    skipped                updates left out because loss or gradient were not finite
    memory                 GB this process has used at most: allocated on its GPU, or resident
    held_out               every --eval-every steps, of held-out prompts: self_reward, detector, true_pictures, and which of
                           the latter two had `parted` from the first (watch.py)
"""

import argparse
import time
from collections import deque
from dataclasses import dataclass
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
from reward import Task, score
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
# The recommended runs in the tiny world and for real models (there the paper's learning rate and batch), two-stage, and
# with what is different end-to-end.
TINY = {"steps": 80, "prompts": 144, "micro_batch": 144, "draw_batch": 144, "lr": 2e-4, "beta": 0.01, "image_weight": 1.0,
        "answer_weight": 0.0, "eval_every": 20, "eval_images": 6, "max_tokens": 16, "recompute": False,
        "judge": "policy"}
REAL = {"steps": 1000, "prompts": 64, "micro_batch": 4, "draw_batch": 16, "lr": 1e-5, "beta": 0.03, "image_weight": 1.0,
        "answer_weight": 0.3, "eval_every": 100, "eval_images": 1, "max_tokens": 40, "recompute": True, "judge": "policy"}
TINY_END_TO_END = {**TINY, "steps": 40, "lr": 3e-5, "beta": 0.05, "answer_weight": 0.0, "judge": "frozen"}
REAL_END_TO_END = {**REAL, "answer_weight": 0.0, "judge": "frozen"}
TINY_SHOW_O = {  # without guidance, which leaves it too little to explore; fewer steps, as each takes longer
    "two-stage": {"guidance": 0.0, "steps": 25, "prompts": 192, "micro_batch": 96, "eval_every": 10},
    "end-to-end": {"guidance": 0.0, "steps": 15, "prompts": 96, "micro_batch": 96, "eval_every": 5},
}
IDLE = (  # what is said to a run that learned nothing for a while
    "no answer was right, or no gradient came back, so no image token learned anything. The task is hopeless or the "
    "model collapsed at this setting: look at the samples; try another --guidance, or an earlier checkpoint"
)

# ---------------------------------------------------------------------------------------------------------------------
# One step's parts


@dataclass
class Rollout:
    """A micro-batch of trajectories: B images and an answer about each."""

    tasks: list[Task]
    seeds: list[int]
    images: Images
    seen: Tensor  # of the images: codes [B, N] by a Show-o, by a Janus SigLIP's features or, if it learns, pixels
    answers: Answers  # greedy


@dataclass
class Kept:
    """A picture in the replay buffer, whose answer was right."""

    prompt: str
    codes: Tensor  # [N]
    steps: Tensor  # [N], when each code was drawn


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
    return Rollout(tasks, seeds, images, seen, sample_answers(judge, seen, questions, max_tokens=args.max_tokens))


def answer_loss(model: UnifiedModel, rollout: Rollout, seen: Tensor) -> Tensor:
    """Cross-entropy [B] of the known answers about pictures, a mean over each answer's tokens."""
    ids, mask = encode_answers(model, [task.answer for task in rollout.tasks])
    logits = answer_logits(model, seen, [task.question for task in rollout.tasks], ids)
    return trajectory_mean(-token_logprobs(logits, ids), mask)


def replay_loss(
    policy: UnifiedModel, kept: list[Kept], empty: Tensor, seeds: list[int], args: argparse.Namespace
) -> Tensor:
    """Cross-entropy [B] of replayed pictures' codes given their prompts, or guidance's empty one where `empty`. The
    seeds choose what is scored of a Show-o's."""
    ids, mask = policy.generation_prompt([picture.prompt for picture in kept])
    blank, blank_mask = policy.unconditional(ids, mask)
    ids, mask = blank.where(empty[:, None], ids), blank_mask.where(empty[:, None], mask)
    codes, steps = (torch.stack([getattr(picture, name) for picture in kept]) for name in ("codes", "steps"))
    images = Images(codes, torch.zeros_like(codes), ids, mask, steps)
    images = choose_scored(policy, images, seeds, args.estimator, args.replay_steps)
    logprobs, _ = image_logprobs(policy, images, args.guidance, args.temperature, args.logprob)
    return -images.mean(logprobs)


def objective(
    policy: UnifiedModel, judge: UnifiedModel, reference: UnifiedModel, rollout: Rollout, replay: list[Kept],
    empty: Tensor, args: argparse.Namespace,
) -> tuple[Tensor, dict]:
    """The loss summed over these trajectories, and sums over them of what is logged."""
    images, sampled = rollout.images, rollout.images.logprobs
    scoring = images, args.guidance, args.temperature, args.logprob
    if args.mode == "end-to-end":
        logits = image_logits(policy, *scoring)  # [B, N, V]
        logprobs, entropy = images.score(logits)
    else:
        logprobs, entropy = image_logprobs(policy, *scoring)  # [B, N]
    with torch.no_grad():
        before, _ = image_logprobs(reference, *scoring)
    kl = images.mean(k3(logprobs, before))
    loss, sums = args.beta * kl, {}
    if args.mode == "end-to-end":
        relaxed = relaxed_codes(logits, images.codes, args.tau, rollout.seeds, images.weights)
        seen = policy.see(bound_gradient(relaxed, args.picture_clip / (args.prompts * args.group)))
        loss = loss + args.image_weight * answer_loss(judge, rollout, seen)
    elif replay:
        image = replay_loss(policy, replay, empty, rollout.seeds, args)
        loss, sums["loss_image"] = loss + args.image_weight * image, image.sum()
    with torch.set_grad_enabled(args.answer_weight > 0):
        answer = answer_loss(policy, rollout, rollout.seen)
    loss = loss + args.answer_weight * answer
    return loss.sum(), {
        "loss": loss.sum(), "loss_answer": answer.sum(), **sums, "kl_image": kl.sum(),
        "rollout_difference": images.mean((logprobs - sampled).abs()).sum(),
        "entropy_image": images.mean(entropy).sum(),
    }


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags; those left out take the recommended value for the model's world once it is loaded (`fill_in`)."""

    def both(key: str) -> str:
        values = (f"{a[key]:g}" + f" ({b[key]:g} end-to-end)" * (a[key] != b[key])
                  for a, b in ((TINY, TINY_END_TO_END), (REAL, REAL_END_TO_END)))
        return "(default: {} in the tiny world, {} else)".format(*values)

    parser = argparse.ArgumentParser(
        description="self-improving SFT; flags left out take the model's own defaults", allow_abbrev=False,
        usage="torchrun sft.py [flags]", formatter_class=ShortHelp,
    )
    add = parser.add_argument_group("run").add_argument
    add("--model", default="tiny", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny)")
    add("--mode", choices=MODES, help="how the image tokens learn (default: two-stage)")
    add("--out", default="runs/sft", help="output folder (default: runs/sft)")
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
    add("--group", type=positive(int), default=1, help="images a prompt (default: 1)")
    add("--micro-batch", type=positive(int), help="images an update takes at once on a rank " + both("micro_batch"))
    add("--draw-batch", type=positive(int), help="images drawn at once on a rank " + both("draw_batch"))
    add("--guidance", type=non_negative(float), help="w (default: the checkpoint's; a tiny Show-o learns at 0)")
    add("--temperature", type=positive(float), default=1.0, help="of image tokens (default: 1)")
    add("--draw-steps", type=positive(int), help="of mask-predict, Show-o's (default: the checkpoint's)")
    add("--max-tokens", type=positive(int), help="of an answer " + both("max_tokens"))
    add = parser.add_argument_group("learning").add_argument
    add("--logprob", choices=["guided", "detached", "conditional"], default="guided",
        help="whose log-probability of an image token (default: guided, the distribution that is sampled)")
    add("--estimator", choices=["replay", "remask"],
        help="of that of a Show-o's: in the steps that committed them, or masked anew at random (default: replay)")
    add("--replay-steps", type=non_negative(int), help="random steps replayed of a Show-o's image, 0: all (default: 3)")
    add("--lr", type=positive(float), help="at its highest; falls to 0 over --steps; with --lora ten times " + both("lr"))
    add("--warmup", type=non_negative(int), default=10, help="steps of linear warm-up (default: 10)")
    add("--beta", type=non_negative(float), help="of the KL to the reference " + both("beta"))
    add("--image-weight", type=non_negative(float), help="of what image tokens learn from " + both("image_weight"))
    add("--answer-weight", type=non_negative(float), help="of the known answers' loss " + both("answer_weight"))
    add("--replay", type=positive(int), default=2000, help="pictures in the replay buffer (default: 2000)")
    add("--caption-dropout", type=non_negative(float), default=0.1,
        help="share of replayed pictures that teach the guidance's empty prompt (default: 0.1)")
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
        args = resumed(parser, argv, "sft.py")
    if args.caption_dropout > 1:
        parser.error(f"--caption-dropout {args.caption_dropout:g} is not a share: give at most 1")
    if args.image_weight == args.answer_weight == 0:
        parser.error("--image-weight and --answer-weight are both 0: nothing would be trained")
    args.script, args.mode = "sft.py", args.mode or "two-stage"
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
    if not args.answer_weight and not args.image_weight:
        raise UserError("--image-weight and --answer-weight are both 0: nothing would be trained")
    add_measures(world, args, device)
    draw_task, vocabulary = task_stream(args, policy, world)
    out, start = open_run(args, policy)
    signals = Signals(args, device)
    checkpoint = place(out, start) if start else None
    reference, sampler = prepare(policy, args, device, checkpoint)
    judge, asked = (reference, reference) if args.judge == "frozen" else (policy, sampler)  # to learn from, to answer
    optimizer, state = make_optimizer(policy, args), {}
    buffer = deque(maxlen=args.replay)  # of right pictures, the newest
    if checkpoint:
        load_optimizer(optimizer, policy, checkpoint)
        state, pictures = load_state(checkpoint)
        if pictures:
            buffer.extend(map(Kept, state["prompts"], pictures["codes"].to(device), pictures["steps"].to(device)))
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

    bar = tqdm(range(start, args.steps), "sft", args.steps, initial=start, disable=None if rank == 0 else True)
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

            # 3. Which answers are right?
            mine = [
                score(text, task, vocabulary) for r in rollouts for text, task in zip(r.answers.texts, r.tasks)
            ]
            rewards = gather(torch.tensor(mine, device=device))  # [prompts * group]

        # 4. Keep the pictures that were, on every rank the same ones, and choose some of those kept to learn from.
        replay = [([], None)] * len(rows)
        if args.mode == "two-stage":
            codes = gather(torch.cat([rollout.images.codes for rollout in rollouts]))  # [prompts * group, N]
            drawn = gather(torch.cat([rollout.images.steps for rollout in rollouts]))
            right = (rewards == 1).nonzero().flatten().tolist()
            buffer.extend(Kept(tasks[i].prompt, codes[i], drawn[i]) for i in right)
            chosen, dropped = rng.random(len(tasks)), torch.from_numpy(rng.random(len(tasks)) < args.caption_dropout)
            if buffer:
                again = [buffer[int(place * len(buffer))] for place in chosen]
                replay = [(again[part], dropped[part].to(device)) for part in rows]

        # 5. Learn the known answers, and what led to right ones.
        objectives = [
            partial(objective, policy, judge, reference, rollout, *part, args)
            for rollout, part in zip(rollouts, replay)
        ]
        means = update(optimizer, objectives, len(tasks), learning_rate(step, args), args.max_grad_norm, compute)

        # 6. Log, look, measure, save.
        line = {
            "step": step + 1, **mean_rewards(tasks, rewards.tolist()), "buffer": len(buffer), **means,
        }
        line |= {"seconds": time.time() - clock, "memory": peak_memory(device)}
        last = step + 1 == args.steps
        if args.eval_every and (step + 1) % args.eval_every == 0 and not last:
            scores, _ = measure("held-out", watch.images)
            line["held_out"] = watch.gauge(scores, step + 1, watch.images)
            bar.set_postfix_str(watch.text(line["held_out"]))
        if rank == 0:
            watch.line(line)
            bar.set_description(f"sft, self-reward {line['reward']:.2f}")
            if step == 0 or (step + 1) % 25 == 0 or last:
                watch.sheet(sampler, rollouts, mine, step + 1)
        idle = means["grad_norm"] == 0 or args.mode == "two-stage" and args.image_weight > 0 and not buffer
        health.check(line, idle, IDLE, rollouts, rank)
        stop = signals.stop()
        fooled = watch.gap if args.stop_on_gap else ""
        if (step + 1) % args.save_every == 0 or last or stop or fooled:
            state = {"health": health.counts, "prompts": [kept.prompt for kept in buffer]}
            pictures = {key: torch.stack([getattr(kept, key) for kept in buffer]) for key in ("codes", "steps") if buffer}
            save_run(policy, optimizer, out, step + 1, args.keep, state, pictures or None)
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
