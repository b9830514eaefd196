"""Self-improving GRPO: a unified model draws, answers a question about its own picture, and is rewarded for
it.

    torchrun grpo.py                          # the tiny Janus, two CPU cores, four to five minutes
    torchrun grpo.py --model tiny-show-o      # the tiny Show-o, which draws by mask-predict
    torchrun grpo.py --model janus            # Janus-1.3B, one GPU of 80 GB
    torchrun --nproc_per_node 8 grpo.py --model janus-pro-7b --shard     # a model that does not fit one GPU

UniRL (Mao, Yang, Shou, arXiv 2505.23380), whose training code was never published. For every prompt a group
of G trajectories is sampled: image tokens under guidance, then answer tokens about the decoded picture. The
reward compares the answer with what the prompt says, so no external image, label or judge is needed. Two ways
to learn from it:

- `two-stage`: image tokens and answer tokens are actions; both get the group-relative advantage.
- `end-to-end`: only answer tokens are; their gradient goes on through the picture (straight-through
  Gumbel-softmax).

How this differs from the paper, or fixes what the paper leaves open:

1. Two-stage, image and answer tokens are the actions of one trajectory; a trajectory's loss is the mean over
   its image tokens plus --answer-weight times the mean over its answer tokens, so that hundreds do not drown
   a handful.
2. The log-probability of an image token is that of the guided, tempered distribution it was sampled from
   (--logprob); published Janus trainers score the conditional branch alone, whose gradient points mostly
   elsewhere (experiments/RESULTS.md).
3. Ratios are against the log-probabilities recorded while sampling, not against a detached copy of the
   training pass, so that a difference between the two passes shows: `rollout_difference` is logged, and
   should be about 0.
4. End-to-end, images are sampled first; one parallel pass recomputes their logits, and the Gumbel noise is
   drawn conditioned on the sampled codes, so that no gradient has to run through the sampling loop. The
   judge, a frozen copy of the starting model (--judge), passes it back at a picture that is half the sampled
   codes and half their softmax (--soft), where it points better than at the codes, and it is cut to a norm
   in each code (CODE_CLIP).
5. A Show-o draws in steps. The log-probability of an image token is that of the step which committed it,
   given the canvas of that step; the order is taken as given. Of each image a few random steps are replayed
   (--replay-steps), their tokens weighted so that the mean is that over all steps; published trainers of
   masked language models mask anew at random instead (--estimator remask).
6. The detector of `evaluate.py` only measures. It enters no reward but `--reward oracle`, the upper bound
   that self-rewards are compared with, which is no self-improvement.

Files in --out: args.json, metrics.jsonl, samples/step_*.png, step_*/ (checkpoints that --model and
transformers open), before.json, before.png, after.png, curves.png, summary.json. Keys of a line of
metrics.jsonl, all means over the step's trajectories unless said:

    reward, reward_<tag>   self-reward in [0, 1], over all and over one category's trajectories
    zero_spread            share of groups whose rewards are all equal (they give no gradient)
    loss                   the objective, over all ranks
    kl_image, kl_answer    k3 estimate of KL(policy || reference) a token: exp(r - p) - (r - p) - 1; of
                           answers only where they are actions that learn
    ratio, clipped         exp(p - sampler's log-prob) of image tokens; share of them outside 1 +- CLIP
    rollout_difference     |log-prob of the training pass - of the sampler| a code
    entropy_image          of the policy's distribution of a code, nats
    grad_norm, lr          gradient norm before clipping; learning rate
    skipped                1 where the update was left out because loss or gradient were not finite
    seconds, memory        wall-clock, without held-out scores; GB used at most, on the GPU or resident
    held_out               every --eval-every steps, on held-out prompts: self_reward, detector,
                           true_pictures, and which of the latter two `parted` from the first (evaluate.Gauge)
"""

import argparse
import copy
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import evaluate
from evaluate import Gauge, World, curves, report, table
from model import NAMES, PARTS, UnifiedModel, UserError, load, read_json, save, widen
from reward import TAGS, Task, Vocabulary, draw_task, geneval_metadata, read_tasks, score, task_key
from sample import (
    COMPILING, Answers, Images, ShortHelp, agree, answer_logprobs, bound_gradient, choose_scored,
    compiling_pays, contact_sheet, encode_answers, image_logits, image_logprobs, non_negative, positive,
    relaxed_codes, run, sample_answers, sample_images, score_logits, start_ranks, to_uint8, use_draw_steps,
    write_json, write_whole,
)

# ------------------------------------------------------------------------------------------------------------
# Settings: the flags of both trainers


def flag(kind: Callable | list | None, text: str, default=None, **more):
    """A setting that is a flag: of an argparse type, one of a list, or (None) on or off. Without a default,
    and with a place in PRESETS, its value is what is recommended for the model."""
    return field(default=default, metadata={"kind": kind, "text": text, "more": more})


@dataclass
class Settings:
    """What sft.py and grpo.py can be told."""

    model: str = flag(str, f"{', '.join(NAMES)}, a hub id or a folder", "tiny", metavar="NAME")
    mode: str = flag(["two-stage", "end-to-end"], "how the image tokens learn", "two-stage")
    out: str = flag(str, "output folder", "runs/grpo", metavar="FOLDER")
    resume: str | None = flag(str, "go on with the run in this folder, with its flags", metavar="FOLDER")
    seed: int = flag(non_negative(int), "", 0)
    steps: int = flag(positive(int), "optimizer steps")
    save_every: int = flag(positive(int), "steps between checkpoints", 100)
    keep: int = flag(non_negative(int), "checkpoints that stay, the last; 0: all", 3)
    no_compile: bool = flag(None, "never compile the sampler, as is done where a run is long", False)
    # watching
    eval_every: int = flag(non_negative(int), "steps between held-out scores; 0: none, nor before and after")
    eval_images: int = flag(positive(int), "images a held-out prompt, before and after", 4)
    detector: str | None = flag(str, "judges held-out pictures of a real model", metavar="FOLDER")
    detector_clip: str = flag(str, "names colors for it", evaluate.CLIP, metavar="FOLDER")
    true_images: str | None = flag(str, "true pictures in GenEval's layout, to ask about", metavar="FOLDER")
    stop_on_gap: bool = flag(None, "save and stop where self-reward may be hacked (default: warn)")
    tensorboard: bool = flag(None, "metrics and sheets for TensorBoard, too, where it is installed", False)
    # sampling
    prompts: int = flag(positive(int), "prompts a step, over all ranks")
    tasks: str | None = flag(str, "your own prompts, JSON lines as reward.read_tasks says", metavar="FILE")
    group: int = flag(positive(int), "images a prompt")
    micro_batch: int = flag(positive(int), "images an update takes at once on a rank")
    draw_batch: int = flag(positive(int), "images drawn at once on a rank")
    guidance: float = flag(non_negative(float), "w (default: the checkpoint's)")
    temperature: float = flag(positive(float), "of image tokens", 1.0)
    draw_steps: int | None = flag(positive(int), "of mask-predict, Show-o's (default: the checkpoint's)")
    # learning
    logprob: str = flag(
        ["guided", "detached", "conditional"], "whose log-prob image tokens have (default: guided, with "
        "--estimator remask conditional)",
    )
    estimator: str | None = flag(
        ["replay", "remask"], "steps replayed, or masked anew (default: replay, two-stage sft.py remask)"
    )
    replay_steps: int | None = flag(non_negative(int), "random steps replayed, 0: all (default: 3)")
    lr: float = flag(positive(float), "at its highest; falls to 0 over --steps; with --lora ten times")
    beta: float = flag(non_negative(float), "of the KL to the reference")
    answer_weight: float = flag(non_negative(float), "of the answer tokens' loss")
    tau: float = flag(positive(float), "of end-to-end's Gumbel-softmax", 1.0)
    soft: float = flag(non_negative(float), "share of it in what the judge sees; 0: straight-through", 0.5)
    judge: str = flag(["policy", "frozen"], "who answers: the policy, or its frozen start as end-to-end")
    # memory and machines
    bf16: bool = flag(None, "compute in bfloat16 (always on GPUs); weights that learn stay float32", False)
    shard: bool = flag(None, "share the trunk's blocks out among the ranks (FSDP2)", False)
    lora: int | None = flag(positive(int), "learn adapters of this rank of the trunk's linear layers instead")
    freeze: list | None = flag(
        [*PARTS, "none"], f"stay as they are: none, or of {' '.join(PARTS)} (default: vision_model vqmodel)",
        nargs="+", metavar="PART",
    )
    recompute: bool = flag(None, "gradient checkpointing")


@dataclass
class GRPOSettings(Settings):
    """What only grpo.py can be told."""

    reward: str = flag(
        ["exact", "partial", "likelihood", "oracle"], "what an answer earns; oracle: the detector's verdict "
        "instead, to compare with", "exact",
    )


# What is recommended. A line holds where all its words do, of world, model and mode; a later one wins.
PRESETS = {
    "shapes": {"steps": 50, "prompts": 12, "group": 12, "micro_batch": 144, "draw_batch": 144, "lr": 1.5e-4,
               "beta": 0.01, "answer_weight": 0.0, "judge": "policy", "eval_every": 25, "recompute": False},
    "geneval": {"steps": 1000, "prompts": 8, "group": 8, "micro_batch": 4, "draw_batch": 16, "lr": 1e-5,
                "beta": 0.03, "answer_weight": 0.3, "judge": "policy", "eval_every": 100, "recompute": True},
    "end-to-end": {"answer_weight": 1.0, "judge": "frozen"},
    "shapes end-to-end": {"steps": 40, "lr": 3e-5, "beta": 0.05},
    "shapes ShowO": {"micro_batch": 96},
    "shapes ShowO two-stage": {"steps": 40, "prompts": 16, "eval_every": 10},
    "shapes ShowO end-to-end": {"steps": 32, "prompts": 8, "lr": 5e-5, "eval_every": 8},
}


def preset(presets: dict[str, dict], *words: str) -> dict:
    """The recommended settings for a world, model and mode."""
    chosen = {}
    for conditions, values in presets.items():
        if set(conditions.split()) <= set(words):
            chosen |= values
    return chosen


CLIP = 0.2  # of the ratio
CODE_CLIP = 0.1  # of the norm of the end-to-end gradient in each code
WARMUP = 10  # steps in which the learning rate rises
MAX_GRAD_NORM = 1.0
LORA_LR = 10  # times the learning rate of all weights, unless --lr is given
REPLAY_STEPS = 3  # of a Show-o's trajectory, unless --replay-steps says so: each costs a pass there and back
PATIENCE = 10  # steps in a row that teach nothing before a run is stopped
GAUGE_PROMPTS = 10  # a category, that a run on a real model is measured on; all 553 is evaluate.py's job
SHEET_EVERY = 25  # steps

# ------------------------------------------------------------------------------------------------------------
# The objective


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """(r - mean) / (std + eps) within each group, [prompts, group] -> the same; 0 where all rewards are
    equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + eps)


def clipped_objective(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float = CLIP) -> Tensor:
    """PPO's loss a token [B, T]: -min(ratio A, clip(ratio, 1 +- clip) A), ratio against log-probs `old`."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from tokens of the policy (Schulman
    2020)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


@dataclass
class Rollout:
    """B trajectories: an image and an answer about each."""

    tasks: list[Task]
    seeds: list[int]
    images: Images
    image_features: Tensor  # of the images, as `model.image_features` gives them: by a Show-o their codes
    answers: Answers
    reference_images: Tensor | None = None  # [B, N] log-probs by the reference
    reference_answers: Tensor | None = None  # [B, A]

    @property
    def questions(self) -> list[str]:
        """What is asked about each image."""
        return [task.question for task in self.tasks]


def objective(
    policy: UnifiedModel, judge: UnifiedModel, rollout: Rollout, advantages: Tensor, settings: Settings
) -> tuple[Tensor, dict]:
    """The loss summed over these trajectories with advantages [B], and sums over them of what is logged."""
    images, answers = rollout.images, rollout.answers
    if settings.mode == "end-to-end":
        logprobs, entropy, image_features = straight_through(policy, judge, rollout, settings)
        of_answers = answer_logprobs(judge, image_features, rollout.questions, answers.ids)
    else:
        logprobs, entropy, of_answers = trajectory_logprobs(policy, rollout, settings)
    kl = k3(logprobs, rollout.reference_images)  # [B, N]
    tokens = settings.beta * kl
    if settings.mode == "two-stage":  # the image's tokens are actions too, and get the advantage themselves
        tokens = tokens + clipped_objective(logprobs, images.logprobs, advantages)
    loss = (images.weights * tokens).sum()
    with torch.no_grad():
        off = (logprobs - images.logprobs).exp() - 1  # the ratio's distance from 1
        means = {"kl_image": kl, "clipped": (off.abs() > CLIP).float(), "ratio": off,
                 "rollout_difference": (logprobs - images.logprobs).abs(), "entropy_image": entropy}
        sums = {name: (images.weights * values).sum() for name, values in means.items()}
        sums["ratio"] += len(off)
    if of_answers is not None:
        # End-to-end what the judge is shown is not quite the picture that it was asked about.
        old = answers.logprobs if settings.mode == "two-stage" else of_answers.detach()
        tokens = clipped_objective(of_answers, old, advantages)  # [B, A]
        if rollout.reference_answers is not None:
            kl = k3(of_answers, rollout.reference_answers)
            tokens = tokens + settings.beta * kl
            sums["kl_answer"] = (answers.weights * kl).sum()
        loss = loss + settings.answer_weight * (answers.weights * tokens).sum()
    return loss, {"loss": loss, **sums}


def trajectory_logprobs(
    model: UnifiedModel, rollout: Rollout, settings: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of a rollout, teacher-forced: log-probs and entropies [B, N] of its image codes, and, where answers
    are actions that learn, log-probs [B, A] of its answer tokens."""
    logprobs, entropy = image_logprobs(
        model, rollout.images, settings.guidance, settings.temperature, settings.logprob
    )
    if settings.mode == "end-to-end" or not settings.answer_weight:
        return logprobs, entropy, None
    features = rollout.image_features
    if "vision_model" not in settings.freeze:  # it learns: what it sees is computed anew, with gradient
        features = model.image_features(rollout.images.codes)
    return logprobs, entropy, answer_logprobs(model, features, rollout.questions, rollout.answers.ids)


def straight_through(
    policy: UnifiedModel, judge: UnifiedModel, rollout: Rollout, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """End-to-end's way through the image: logits -> relaxed one-hots, which going forward are the codes that
    were sampled, or --soft of the way from them to what they are going backward, softmax((logits + noise) /
    tau) -> the picture, as the judge sees it.

    Returns log-probs and entropies [B, N] of the codes, and the judge's image features, whose gradient
    reaches the policy.
    """
    images = rollout.images
    logits = image_logits(policy, images, settings.guidance, settings.temperature, settings.logprob)
    logprobs, entropy = score_logits(logits, images.codes)
    one_hots = relaxed_codes(
        logits, images.codes, settings.tau, rollout.seeds, settings.soft, images.weights
    )
    one_hots = bound_gradient(one_hots, CODE_CLIP / (settings.prompts * settings.group))
    return logprobs * (images.weights > 0), entropy, judge.image_features(one_hots)


# ------------------------------------------------------------------------------------------------------------
# One step


def roll_out(run: "Run", tasks: list[Task], seeds: list[int], greedy: bool = False) -> Rollout:
    """An image by the policy for every task, and an answer about each, sampled or greedy."""
    settings = run.settings
    prompts, questions = [task.prompt for task in tasks], [task.question for task in tasks]
    w, T = settings.guidance, settings.temperature
    images = sample_images(run.sampler, prompts, seeds, w, T, run.compiled)
    images = choose_scored(
        run.sampler, images, seeds, settings.estimator, settings.replay_steps, w, T, settings.logprob
    )
    with torch.no_grad():
        features = run.answerer.image_features(images.codes)
    answers = sample_answers(run.answerer, features, questions, None if greedy else seeds)
    return Rollout(tasks, seeds, images, features, answers)


def self_reward(run: "Run", rollout: Rollout) -> list[float]:
    """The reward of every trajectory in [0, 1]. Another reward is written here, and nowhere else."""
    kind = run.settings.reward
    if kind == "oracle":
        with torch.no_grad():
            pictures = to_uint8(run.sampler.to_pixels(rollout.images.codes))
        lines = [geneval_metadata(task) for task in rollout.tasks]
        return [float(right) for _, right, _ in evaluate.look(run.world, pictures, lines)]
    if kind != "likelihood":
        answered = zip(rollout.answers.texts, rollout.tasks)
        return [score(text, task, run.vocabulary, kind) for text, task in answered]
    ids, mask = encode_answers(run.answerer, [task.answer for task in rollout.tasks])
    with torch.no_grad():
        logprobs = answer_logprobs(run.answerer, rollout.image_features, rollout.questions, ids)
    return (logprobs * mask).sum(1).exp().tolist()


IDLE = (  # what is said to a run that learned nothing for a while
    "no group had answers of different reward. The task is solved, hopeless or collapsed at this setting: "
    "look at the samples; try a larger --group, --reward partial or likelihood, or another --guidance"
)


def refused(settings: Settings, world: World) -> dict[str, bool]:
    """Settings that would train nothing: what is said, and whether it is so."""
    two_stage = settings.mode == "two-stage"
    return {
        "--group 1 has nothing to compare: give at least 2": settings.group == 1,
        "--answer-weight 0 leaves end-to-end nothing to train": not two_stage and not settings.answer_weight,
        "--judge frozen answers itself, so two-stage has no answers to train: --answer-weight 0":
            settings.judge == "frozen" and two_stage and settings.answer_weight > 0,
        "--reward oracle has no detector here: give --detector":
            settings.reward == "oracle" and not (world.detect or settings.detector),
    }


def main() -> None:
    run = Run("grpo.py", GRPOSettings, PRESETS, refused)
    settings = run.settings
    for step in run.steps():
        # 1. Draw prompts whose facts are known, the same on every rank; this one takes its share.
        tasks, parts = run.draw(step)

        with run.compute:
            # 2. Draw an image for every trajectory and answer its question about it.
            rollouts = [piece for part in parts for piece in split(roll_out(run, *part), run.micro_batch)]

            # 3. Reward the answers.
            mine = [reward for rollout in rollouts for reward in self_reward(run, rollout)]
            rewards = run.gather(torch.tensor(mine)).view(settings.prompts, settings.group)

            # 4. Compare within the group, even where it spans ranks.
            advantages = group_advantages(rewards).flatten()[run.mine].split(run.micro_batch)

            # 5. What does the frozen reference think of the same tokens?
            for rollout in rollouts:
                with torch.no_grad():
                    scores = trajectory_logprobs(run.reference, rollout, settings)
                rollout.reference_images, _, rollout.reference_answers = scores

        # 6. Raise what did better than its group.
        metrics = run.update(step, [
            partial(objective, run.policy, run.judge, rollout, advantage, settings)
            for rollout, advantage in zip(rollouts, advantages)
        ])

        # 7. Log, look, measure, save.
        metrics["zero_spread"] = (rewards.amax(1) == rewards.amin(1)).float().mean().item()
        idle = IDLE if metrics["zero_spread"] == 1 else ""
        run.log(step, tasks, rewards.flatten(), rollouts, metrics, idle)
    run.finish()


# ============================================================================================================
# The run: precision, shards, adapters, optimizer step, log, resume. Nothing below is about UniRL; skip it at
# first reading.
#  A killed run goes on to the bit: the learning rate is a function of the step, and all random numbers come
# from generators made anew from seed and step, so that a checkpoint needs no more than
#
#     step_000100/                               a model's folder, and in it
#     step_000100/trainer/optimizer.safetensors  AdamW's state by the weights' names
#     step_000100/trainer/adapters.safetensors   with --lora: what the model's own weights have merged in
#     step_000100/trainer/buffer.safetensors     sft.py's replayed pictures
#     step_000100/trainer/state.json             step, idle steps so far, the replayed pictures' prompts
#
# It is written beside, flushed and renamed, so that it is whole or not there. One that is damaged later is
# noticed where a file does not open; a flipped bit in its numbers is not.

CHANGEABLE = ("steps", "save_every", "keep", "eval_every", "stop_on_gap", "resume")  # when a run goes on


def read_settings(script: str, kind: type, presets: dict) -> Settings:
    """The command line's settings; what is not given and has no default is None. A run that goes on has its
    own."""
    parser = argparse.ArgumentParser(
        usage=f"torchrun {script} [flags]", formatter_class=ShortHelp, argument_default=argparse.SUPPRESS,
        description="what is left out takes the model's recommended value", allow_abbrev=False,
    )
    tiny, real = preset(presets, "shapes", "two-stage"), preset(presets, "geneval", "two-stage")
    for setting in fields(kind):
        values, text, more = (setting.metadata[key] for key in ("kind", "text", "more"))
        if setting.default not in (None, False):
            text += f" (default: {setting.default})"
        elif setting.name in tiny:
            text += f" (default: {tiny[setting.name]} tiny, {real[setting.name]} real)"
        if values is None:
            on_or_off = "store_true" if setting.default is False else argparse.BooleanOptionalAction
            more = {**more, "action": on_or_off}
        else:
            more = {**more, "choices" if isinstance(values, list) else "type": values}
        parser.add_argument("--" + setting.name.replace("_", "-"), help=text, **more)
    given = vars(parser.parse_args())
    if "resume" not in given:
        return kind(**given)
    folder = given["resume"]
    known = read_json(Path(folder) / "args.json") if (Path(folder) / "args.json").exists() else {}
    if known.pop("script", None) != script:
        raise UserError(f"{folder}: holds no run of {script}")
    known["out"] = folder
    if Path(given.get("out", folder)) == Path(folder):
        given["out"] = folder
    for name, value in given.items():
        if name not in CHANGEABLE and value != known.get(name):
            raise UserError(f"--{name.replace('_', '-')} {value}: the run in {folder} has {known.get(name)}, "
                            "and goes on with its own settings")
    try:
        return kind(**{**known, **given})
    except TypeError as error:
        raise UserError(f"{folder}/args.json: not the settings of {script} ({error})") from None


def recommend(settings: Settings, preset: dict, model: UnifiedModel) -> None:
    """Fills in what was left out, and refuses what has no meaning for the model."""
    use_draw_steps(model, settings.draw_steps)
    steps = settings.draw_steps = model.draw_steps
    learns = {name for name, _ in model.named_children()}
    if settings.freeze is None:
        settings.freeze = sorted(learns & {"vision_model", "vqmodel"})
    frozen = set(settings.freeze) - {"none"}
    replayed = settings.replay_steps or 0
    for message, so in {
        "--estimator and --replay-steps have no meaning for a Janus, which scores every token at once":
            steps is None and (settings.estimator or settings.replay_steps is not None),
        "--replay-steps has no meaning with --estimator remask": settings.estimator == "remask" and replayed,
        f"--replay-steps {replayed}: an image is drawn in {steps} steps": steps and replayed > steps,
        f"--freeze {' '.join(settings.freeze)}: of {', '.join(sorted(learns))} one must learn":
            not frozen < learns,
        "--freeze language_model leaves --lora nothing":
            settings.lora and "language_model" in frozen,
        f"--soft {settings.soft:g}: a share is at most 1": settings.soft > 1,
        "--shard has no ranks to share between: start it with torchrun":
            settings.shard and not dist.is_initialized(),
        "--tensorboard: it is not installed (pip install tensorboard)":
            settings.tensorboard and not find_spec("tensorboard"),
    }.items():
        if so:
            raise UserError(message)
    if steps and not settings.estimator:
        settings.estimator = preset.get("estimator", "replay") if settings.replay_steps is None else "replay"
    if settings.estimator == "replay" and settings.replay_steps is None:
        settings.replay_steps = min(REPLAY_STEPS, steps)
    if settings.lora and not settings.lr:
        settings.lr = LORA_LR * preset["lr"]
    logprob = "conditional" if settings.estimator == "remask" else "guided"
    for name, value in {"guidance": model.guidance, "logprob": logprob, **preset}.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    model.guidance = settings.guidance  # so that checkpoints draw as they were trained to


def task_stream(settings: Settings, model: UnifiedModel, world: World) -> tuple[Callable, Vocabulary]:
    """What draws a task to train on, given a numpy generator, and the words that answers are read with: from
    the world's vocabulary without its held-out tasks, or from the user's own file (`--tasks`), which is
    checked whole."""
    held_out = frozenset(map(task_key, world.held_out or world.suite))
    if not settings.tasks:
        return lambda rng: draw_task(world.vocabulary, rng, held_out), world.vocabulary
    try:
        tasks, vocabulary = read_tasks(Path(settings.tasks).read_bytes(), world.vocabulary, held_out)
    except (OSError, ValueError) as error:
        raise UserError(f"--tasks {settings.tasks}: {error}") from None
    model.generation_prompt([task.prompt for task in tasks])  # refuses one that is too long
    return lambda rng: tasks[rng.integers(len(tasks))], vocabulary


def add_measures(world: World, settings: Settings, device: torch.device) -> None:
    """Gives a real model's world few prompts to be measured on, and the user's detector and true pictures."""
    if not world.render:
        world.suite = evaluate.first_of_each(world.suite, GAUGE_PROMPTS)
    if settings.detector:
        flags = "--detector", "--detector-clip"
        world.detect = evaluate.load_detector(settings.detector, settings.detector_clip, device, flags)
    if settings.true_images:
        world.pictures = evaluate.read_folder(Path(settings.true_images))
        evaluate.refuse_unknown(world, world.pictures, f"--true-images {settings.true_images}")


# -- models: whole on every rank or in shards; all weights learn, or adapters --------------------------------


class Adapted(nn.Linear):
    """A linear layer that stays as it is, plus a product of two thin matrices that learns (Hu et al. 2021).
    `lora_up` starts at zero, so that an untouched adapter changes nothing."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        down = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        self.lora_down = nn.Parameter(down.to(layer.weight.device))  # float32 whatever the layer's weight is
        self.lora_up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_adapters(model: UnifiedModel, rank: int, folder: Path | None) -> None:
    """Freezes the model and gives every linear layer of its trunk an adapter: the same ones at every call, or
    those of the checkpoint in `folder`."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parent in list(model.language_model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Adapted(layer, rank, generator))
    if folder:
        model.load_state_dict(load_file(folder / "trainer" / "adapters.safetensors"), strict=False)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its adapters added into the weights that they belong to, in float32: an ordinary
    one."""
    plain = {name: widen(t) for name, t in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_up"):
            layer = name.removesuffix(".lora_up")
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + state[name] @ state[f"{layer}.lora_down"]
    return plain


def copy_of(model: UnifiedModel, shared: Sequence[Tensor]) -> UnifiedModel:
    """A copy of the model that has the `shared` weights in common with it, to save memory."""
    shared = [*shared, getattr(model, "processor", None), model.tokenizer, model.config]
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def prepare(
    policy: UnifiedModel, settings: Settings, device: torch.device, dtype: torch.dtype, folder: Path | None
) -> tuple[UnifiedModel, UnifiedModel]:
    """Makes the starting model the policy: parts frozen, adapters, the weights of the checkpoint in `folder`,
    shards. With --shard it comes without content, and rank 0 alone reads a whole one, on the CPU.

    Returns the reference, the starting model that never learns, with embeddings, aligners and heads of its
    own; and the sampler, the policy as a model that draws without another rank: itself, or with a copy of the
    trunk's blocks in the compute dtype, where the policy is sharded or computes in bfloat16 (see
    Run.refresh).
    """
    for part in set(settings.freeze) - {"none"}:
        policy.get_submodule(part).requires_grad_(False)
    policy.recompute(settings.recompute)
    if settings.lora:
        policy.requires_grad_(False)
        if not settings.shard:  # what never learns need not be float32
            policy.language_model.layers.to(dtype)
    reference = copy_of(policy, [weight for weight in policy.parameters() if not weight.requires_grad])
    reference.requires_grad_(False)
    if folder and not settings.lora and not settings.shard:
        policy.load_state_dict(load(str(folder)).state_dict())
    sampler = policy
    if settings.shard or dtype == torch.bfloat16 and not settings.lora:
        blocks = set(policy.language_model.layers.parameters())
        sampler = copy_of(policy, [weight for weight in policy.parameters() if weight not in blocks])
        sampler.language_model.layers.requires_grad_(False).to(dtype)
    if settings.lora:
        add_adapters(policy, settings.lora, None if settings.shard else folder)
    if settings.shard:
        shard(policy, dtype, device)
        if settings.judge == "policy":
            shard(reference, dtype, device)
        else:  # it answers, which takes another number of passes on every rank: it stays whole
            reference.language_model.layers.to(dtype)
        materialize((policy, reference, sampler), device)
        fill(reference, settings.model)
        source = folder if folder and not settings.lora else settings.model
        fill(policy, str(source), settings.lora, folder)
    return reference, sampler


def shard(model: UnifiedModel, dtype: torch.dtype, device: torch.device) -> None:
    """FSDP2 over the blocks of the trunk: every rank keeps 1 / ranks of each, float32, and gathers a block in
    `dtype` when it is run. Everything else stays on every rank."""
    trunk, mesh = model.language_model, init_device_mesh(device.type, (dist.get_world_size(),))
    others = set(trunk.parameters()) - set(trunk.layers.parameters())
    # The inputs stay as autocast has them, so that the sampler, which is run under it alone, computes the
    # same.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in trunk.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(trunk, mesh=mesh, mp_policy=policy, ignored_params=others)
    for part in (trunk, *trunk.layers):  # the sum of all gradients, as the loss has the global mean's divisor
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # keys and values are not changed in place


def materialize(models: Sequence[UnifiedModel], device: torch.device) -> None:
    """Memory on the device for weights without content. What models share stays shared, unlike by
    to_empty."""
    made = {}
    for module in (module for model in models for module in model.modules()):
        for name, weight in module.named_parameters(recurse=False):
            if weight not in made:
                made[weight] = nn.Parameter(torch.empty_like(weight, device=device), weight.requires_grad)
            module._parameters[name] = made[weight]


def fill(model: UnifiedModel, source: str, lora: int | None = None, folder: Path | None = None) -> None:
    """Gives every rank its share of the weights in `source`, of which rank 0 alone holds all, and only
    meanwhile."""
    weights = {}
    if dist.get_rank() == 0:
        start = load(source)
        if lora:
            add_adapters(start, lora, folder)
        weights = start.state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def load_optimizer(optimizer: torch.optim.Optimizer, model: UnifiedModel, folder: Path) -> None:
    """Puts back what Run.save wrote of AdamW's state, each rank its share of it. (torch's
    set_optimizer_state_dict refuses weights that have no state, as those have that never had a gradient.)"""
    tensors = load_file(folder / "trainer" / "optimizer.safetensors")
    for name, weight in model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
        for key in keys:
            tensor = tensors[f"{key}.{name}"]
            if key != "step":  # that one stays a number on the CPU
                tensor = tensor.to(weight.device)
                if isinstance(weight, DTensor):
                    place = weight.device_mesh, weight.placements
                    tensor = distribute_tensor(tensor, *place, src_data_rank=None)
            optimizer.state[weight][key] = tensor


# -- the folder ----------------------------------------------------------------------------------------------


def checkpoint(out: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return out / f"step_{step:06d}"


def checkpoints(out: Path) -> list[int]:
    """The steps of which the folder holds a checkpoint, whole or not, in order."""
    return sorted(int(path.name[5:]) for path in out.glob("step_*") if path.name[5:].isdigit())


def newest(out: Path) -> int:
    """The step of the newest checkpoint that loads, 0 where there is none at all. One that does not is said
    to be damaged."""
    steps = checkpoints(out)
    for step in reversed(steps):
        folder = checkpoint(out, step)
        try:
            load(str(folder), "meta")
            state = read_json(folder / "trainer" / "state.json")
            for name in state["files"]:
                safe_open(folder / name, "pt")  # refuses a file that is shorter than its header says
            if state["step"] == step:
                return step
            reason = "holds another step"
        except (UserError, OSError, SafetensorError, KeyError) as error:
            reason = error
        print(f"{folder.name} is damaged, looking for the one before: {reason}", file=sys.stderr)
    if steps:
        raise UserError(f"{out}: none of its checkpoints loads; delete them to begin at step 0")
    return 0


def open_folder(settings: Settings, script: str) -> tuple[Path, int]:
    """The output folder, and the step to start from: 0 in a new one, else that of the newest checkpoint that
    loads, and the folder cleared of what came after it."""
    out, metrics = Path(settings.out), Path(settings.out) / "metrics.jsonl"
    if not settings.resume and (out / "args.json").exists():
        raise UserError(f"{out} already holds a run: give another --out, or go on with --resume {out}")
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    start = newest(out) if settings.resume else 0
    ended = (out / "summary.json").exists() and start == read_json(out / "summary.json").get("steps")
    if start > settings.steps or ended and start == settings.steps:
        raise UserError(f"{out} already has {start} steps: give more with --steps")
    for left in out.glob("*.partial*"):  # what a killed run was writing, or deleting
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    write_whole(metrics, "".join(lines[:start]))  # the rest, perhaps with half a line, comes again
    write_json(out / "args.json", {"script": script, **asdict(settings), "resume": None})
    return out, start


# -- the steps -----------------------------------------------------------------------------------------------


def split(batch: object, size: int) -> list:
    """A dataclass of rows (in tensors, lists and such dataclasses) as a list of dataclasses of `size` rows:
    an update keeps more of each image than drawing does."""
    columns = []
    for value in (getattr(batch, column.name) for column in fields(batch)):
        if value is None:
            columns.append(repeat(None))
        elif is_dataclass(value):
            columns.append(split(value, size))
        else:
            columns.append([value[at : at + size] for at in range(0, len(value), size)])
    return [type(batch)(*values) for values in zip(*columns)]


def sum_over_ranks(gradients: list[Tensor]) -> None:
    """Each rank holds the gradient of its own trajectories' share of the loss; the whole gradient is their
    sum."""
    if gradients:  # as one message instead of one a tensor
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


class Run:
    """A training run: settings, ranks, models (policy, sampler, reference, judge), optimizer, folder."""

    def __init__(self, script: str, kind: type, presets: dict, refused: Callable = lambda *_: {}):
        self.script, self.settings = script, read_settings(script, kind, presets)
        settings = self.settings
        self.rank, self.ranks, self.device = start_ranks()
        self.policy = load(settings.model, "meta" if settings.shard else self.device)
        self.world = evaluate.world_of(self.policy)
        words = self.world.name, type(self.policy).__name__, settings.mode
        recommend(settings, preset(presets, *words), self.policy)
        for message in (message for message, so in refused(settings, self.world).items() if so):
            raise UserError(message)
        self.divide()
        pictures = settings.steps * settings.prompts * settings.group
        self.compiled = not settings.no_compile and compiling_pays(self.policy, pictures)
        self.draw_task, self.vocabulary = task_stream(settings, self.policy, self.world)
        add_measures(self.world, settings, self.device)
        self.out, self.start = agree(partial(open_folder, settings, script))
        self.board = None
        if settings.tensorboard and self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # in no requirement, and asked for by few
            self.board = SummaryWriter(f"{self.out}/tensorboard")
        self.folder = folder = checkpoint(self.out, self.start) if self.start else None
        dtype = torch.bfloat16 if settings.bf16 or self.device.type == "cuda" else torch.float32
        self.compute = torch.autocast(self.device.type, dtype, enabled=dtype == torch.bfloat16)
        self.reference, self.sampler = prepare(self.policy, settings, self.device, dtype, folder)
        frozen = settings.judge == "frozen"
        self.judge = self.reference if frozen else self.policy  # who answers in what is learned from,
        self.answerer = self.reference if frozen else self.sampler  # and in what is drawn
        learns = [weight for weight in self.policy.parameters() if weight.requires_grad]
        kinds = [[w for w in learns if isinstance(w, DTensor) == sharded] for sharded in (False, True)]
        groups = [{"params": weights} for weights in kinds if weights]  # fused loops want one kind each
        self.optimizer = torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.state = read_json(folder / "trainer" / "state.json") if folder else {}
        if folder:
            load_optimizer(self.optimizer, self.policy, folder)
        self.idle, self.signalled, self.began = self.state.get("idle", 0), math.inf, time.time()
        self.before = self.score_before()
        self.gauge = Gauge(self.world, self.before, settings.eval_images) if self.before else None
        if self.rank == 0 and (not self.gauge or self.gauge.blind):
            print("nothing independent of the model is measured: that takes --eval-every, and for a real "
                  "model --detector or --true-images", file=sys.stderr, flush=True)

    def divide(self) -> None:
        """This rank's share of a step's trajectories, and how many of them at once."""
        settings = self.settings
        images, at_once = settings.prompts * settings.group, settings.micro_batch
        if images % self.ranks:
            raise UserError(f"--prompts {settings.prompts} x --group {settings.group} cannot be split over "
                            f"{self.ranks} ranks")
        share = images // self.ranks
        self.mine = slice(self.rank * share, (self.rank + 1) * share)
        self.micro_batch = min(at_once, share)
        if share % self.micro_batch:
            raise UserError(f"--micro-batch {at_once} does not divide a rank's {share} images")
        self.draw_batch = max(settings.draw_batch // self.micro_batch, 1) * self.micro_batch  # whole ones

    def draw(self, step: int) -> tuple[list[Task], list[tuple[list[Task], list[int]]]]:
        """The tasks of all ranks' trajectories; and this rank's with their seeds, as many as are drawn at
        once."""
        self.clock, self.rng = time.time(), np.random.default_rng((self.settings.seed, step))
        self.refresh()
        tasks = [self.draw_task(self.rng) for _ in range(self.settings.prompts)]
        tasks = [task for task in tasks for _ in range(self.settings.group)]
        seeds = self.rng.integers(2**62, size=len(tasks)).tolist()
        mine, size = list(zip(tasks, seeds))[self.mine], self.draw_batch
        return tasks, [tuple(map(list, zip(*mine[at : at + size]))) for at in range(0, len(mine), size)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Gives the sampler the policy's weights as they are now, each gathered once; nothing where they are
        one."""
        if self.sampler is not self.policy:
            for mine, block in zip(self.sampler.language_model.layers, self.policy.language_model.layers):
                weights = {name: whole(weight) for name, weight in block.state_dict().items()}
                mine.load_state_dict(merged(weights))

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's [B, ...] joined in rank order, on the device."""
        values = values.to(self.device)
        parts = [torch.empty_like(values) for _ in range(self.ranks)] if self.ranks > 1 else [values]
        if self.ranks > 1:
            dist.all_gather(parts, values)
        return torch.cat(parts)

    def update(self, step: int, objectives: Sequence[Callable[[], tuple[Tensor, dict]]]) -> dict[str, float]:
        """One optimizer step on all ranks' trajectories, accumulated over micro-batches. Each objective gives
        its loss summed over its trajectories, and sums over them of what is logged; the means of these come
        back. Where loss or gradient are not finite nothing is changed, and `skipped` is 1."""
        settings, count, sums = self.settings, self.settings.prompts * self.settings.group, {}
        self.optimizer.zero_grad()
        for objective in objectives:
            with self.compute:
                loss, logged = objective()
            (loss / count).backward()
            sums = {name: sums.get(name, 0) + value.detach() for name, value in logged.items()}
        means = torch.stack(list(sums.values())) / count
        groups = [[w for w in group["params"] if w.grad is not None] for group in self.optimizer.param_groups]
        if self.ranks > 1:  # sharded weights' gradients are summed already
            dist.all_reduce(means)
            sum_over_ranks([w.grad for weights in groups for w in weights if not isinstance(w, DTensor)])
        norms = [get_total_norm([w.grad for w in weights]) for weights in groups]
        if self.settings.shard:
            norms = [whole(norm) for norm in norms]
        norm = get_total_norm(norms) if len(norms) > 1 else norms[0]
        # Up to its highest in WARMUP steps, and down to 0: gradients of so few samples are mostly noise, and
        # what late steps at a full rate add of it costs more than they teach.
        lr = settings.lr * min(1.0, (step + 1) / (WARMUP + 1)) * (1 - step / settings.steps)
        for group, weights in zip(self.optimizer.param_groups, groups):
            group["lr"] = lr
            clip_grads_with_norm_(weights, MAX_GRAD_NORM, norm)
        metrics = dict(zip(sums, means.tolist()))
        finite = math.isfinite(norm) and math.isfinite(metrics["loss"])
        if finite:
            self.optimizer.step()
        return {**metrics, "grad_norm": norm.item(), "lr": lr, "skipped": int(not finite)}

    def steps(self) -> Iterator[int]:
        """The steps to do, behind a bar. In them SIGTERM and Ctrl-C let the step finish, which `log` saves
        before it leaves; a second one ends the run at once."""
        hide, steps = None if self.rank == 0 else True, range(self.start, self.settings.steps)
        self.bar = tqdm(steps, total=self.settings.steps, initial=self.start, disable=hide)
        handlers = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield from self.bar
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        """Notes the first signal; within a second, another is the same one, as torchrun and a cluster both
        pass it on."""
        if time.monotonic() - self.signalled > 1:
            os._exit(128 + number)
        self.signalled = min(self.signalled, time.monotonic())

    def stopping(self) -> bool:
        """Whether any rank got a signal, on every rank."""
        flag = torch.tensor(float(self.signalled < math.inf), device=self.device)
        if self.ranks > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # -- what is measured and written ------------------------------------------------------------------------

    def measure(self, name: str, images: int) -> tuple[dict, list[dict]]:
        """Scores of the held-out prompts, `images` pictures each, and a record of every picture."""
        settings = self.settings
        self.refresh()
        with self.compute:
            return evaluate.evaluate(
                self.sampler, self.world, settings.guidance, settings.temperature, images, 0, self.draw_batch,
                self.compiled, progress=name,
            )

    def score_before(self) -> dict | None:
        """The scores before training, in the folder or measured and put there; None with --eval-every 0."""
        path, settings, first = self.out / "before.json", self.settings, self.rank == 0
        if first and self.compiled:
            print(COMPILING, flush=True)
        if path.exists():
            return read_json(path)
        if not settings.eval_every or self.start:
            return None
        if first:
            pictures = settings.eval_images * len(self.world.suite)
            print(f"first, {pictures} held-out pictures are drawn and scored (--eval-every 0: none)")
        scores, records = self.measure("before", settings.eval_images)
        if first:
            report(records, self.out / "before.png")
            write_json(path, scores)  # last, as a run that was killed in between measures again
        return scores

    def log(
        self, step: int, tasks: list[Task], rewards: Tensor, rollouts: list[Rollout], metrics: dict,
        idle: str, keep: Callable[[], tuple[dict, dict]] = lambda: ({}, {}),
    ) -> None:
        """A step's end: a line of metrics, now and then held-out scores, a sheet, a checkpoint (with what
        keep() gives, JSON and tensors). Ends a run that is to stop, that may hack its reward, or that learned
        nothing for long.

        Args:
            tasks, rewards: of all ranks' trajectories.
            rollouts: this rank's.
            idle: why the step taught nothing, or empty.
        """
        settings, done, warning = self.settings, step + 1, ""
        last = done == settings.steps
        line = {"step": done, "reward": rewards.mean().item()}
        for tag in TAGS:
            of_tag = [reward for reward, task in zip(rewards.tolist(), tasks) if task.tag == tag]
            line |= {f"reward_{tag}": float(np.mean(of_tag))} if of_tag else {}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        line |= {**metrics, "seconds": time.time() - self.clock, "memory": memory / 1e9}
        if self.gauge and settings.eval_every and done % settings.eval_every == 0 and not last:
            images = min(2, settings.eval_images)
            line["held_out"] = self.gauge.read(self.measure("held-out", images)[0], images)
            warning = self.gauge.warning(line["held_out"])
        if self.rank == 0:
            self.write(line, warning)
            if step == 0 or done % SHEET_EVERY == 0 or last:
                self.sheet(rollouts, rewards[self.mine].tolist(), done)
        if metrics["skipped"]:
            idle = "loss or gradient were not finite: try a lower --lr"
        elif not metrics["grad_norm"]:
            idle = idle or "no gradient came back: try another --guidance"
        self.idle = self.idle + 1 if idle else 0
        if self.idle >= PATIENCE:
            raise UserError(f"stopped at step {done}, {self.idle} such steps in a row: {idle}")
        stop, hacked = self.stopping(), settings.stop_on_gap and warning
        if done % settings.save_every == 0 or last or stop or hacked:
            self.save(done, *keep())
        if hacked:
            raise UserError(f"stopped after step {done}, which is saved: {warning}")
        if stop:
            if self.rank == 0:
                print(f"\nstopped after step {done}, which is saved; go on with: torchrun {self.script} "
                      f"--resume {self.out}")
            self.leave()
            sys.exit(0)

    def write(self, line: dict, warning: str) -> None:
        """Appends a step's metrics, where what is not finite becomes null, which JSON has; shows it on the
        bar."""
        numbers = {name: value for name, value in line.items() if isinstance(value, (int, float))}
        broken = {name: None for name, value in numbers.items() if not math.isfinite(value)}
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({**line, **broken}) + "\n")
        self.bar.set_description(f"{self.script.removesuffix('.py')}, self-reward {line['reward']:.2f}")
        if "held_out" in line:
            self.bar.set_postfix_str(self.gauge.text(line["held_out"]))
            numbers |= {f"held_out/{name}": v for name, v in line["held_out"].items() if isinstance(v, float)}
        if warning:
            advice = "look at samples/; try a lower --answer-weight or --lr, or a higher --beta"
            tqdm.write(f"warning: step {line['step']}: {warning}; {advice}", file=sys.stderr)
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, line["step"])
            self.board.flush()

    def sheet(self, rollouts: list[Rollout], rewards: list[float], step: int, count: int = 24) -> None:
        """A contact sheet of this rank's trajectories, evenly chosen: prompt, answer, reward."""
        with torch.no_grad():
            pixels = np.concatenate([to_uint8(self.sampler.to_pixels(r.images.codes)) for r in rollouts])
        prompts = [task.prompt.removeprefix("a photo of ") for r in rollouts for task in r.tasks]
        texts = [text for r in rollouts for text in r.answers.texts]
        chosen = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int)
        captions = [f"{prompts[i]}\nsays: {texts[i]}\nreward {rewards[i]:.2f}" for i in chosen]
        path = self.out / "samples" / f"step_{step:06d}.png"
        contact_sheet(pixels[chosen], captions, path)
        if self.board:
            self.board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def save(self, step: int, state: dict, buffer: dict[str, Tensor]) -> None:
        """Writes the checkpoint of a step, and then deletes those before the last `keep` (0: none).

        Raises:
            UserError: on rank 0, where it cannot be written; what had been saved is still there.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, moments = get_model_state_dict(self.policy, options=options), {}
        for name, weight in self.policy.named_parameters():
            for key, tensor in self.optimizer.state.get(weight, {}).items():
                tensor = whole(tensor)  # a gathering, in which every rank takes part
                if self.rank == 0:
                    moments[f"{key}.{name}"] = tensor.cpu()
        if self.rank > 0:
            return
        adapters = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
        tensors = {"optimizer": moments, "adapters": adapters, "buffer": buffer}
        files = {f"trainer/{name}.safetensors": content for name, content in tensors.items() if content}
        state = {**state, "step": step, "idle": self.idle, "files": list(files)}
        files["trainer/state.json"] = state
        folder, keep = checkpoint(self.out, step), self.settings.keep
        try:
            save(self.policy, folder, files, merged(weights))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)
            reason = " ".join(str(error).split())
            raise UserError(f"{folder}: cannot be written ({reason}); what was saved before is whole: make "
                            f"room and go on with --resume {self.out}") from None
        older = [old for old in checkpoints(self.out) if old <= step]  # later ones are damaged
        for old in older[:-keep] if keep else []:
            shutil.rmtree(checkpoint(self.out, old).rename(checkpoint(self.out, old).with_suffix(".partial")))

    def finish(self) -> None:
        """The scores after training, summary.json, after.png, curves.png, the table, and what to do next."""
        settings, after, records, warning = self.settings, None, [], ""
        if self.gauge and settings.eval_every:
            after, records = self.measure("after", settings.eval_images)
            warning = self.gauge.warning(self.gauge.read(after, settings.eval_images))
        if self.rank == 0:
            seconds = time.time() - self.began
            write_json(self.out / "summary.json", {
                **{name: getattr(settings, name) for name in ("model", "mode", "seed", "steps")},
                "seconds": seconds, "threads": torch.get_num_threads(), "versions": evaluate.versions(),
                "before": self.before, "after": after,
            })
            curves(self.out, self.out / "curves.png")
            if after:
                report(records, self.out / "after.png")
                print(table({"before": self.before, "after": after}))
                drawn = f"{settings.draw_steps} mask-predict steps, " if settings.draw_steps else ""
                print(f"{settings.eval_images} images for each of {len(self.world.suite)} held-out prompts, "
                      f"guidance {settings.guidance:g}, temperature {settings.temperature:g}, {drawn}"
                      "evaluation seed 0")
            if warning:
                print(f"warning: {warning}", file=sys.stderr)
            prompt, folder = self.world.suite[0].prompt, checkpoint(self.out, settings.steps)
            print(f"{seconds:.0f} s since the start or --resume; look at {self.out}/curves.png and samples/, "
                  f"then: python sample.py \"{prompt}\" --model {folder}")
        self.leave()

    def leave(self) -> None:
        """Waits for the other ranks and lets them go."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
