"""Self-improving SFT: a unified model draws, and learns from the known answer to a question about its
picture.

    torchrun sft.py                           # the tiny Janus, two CPU cores, seven minutes
    torchrun sft.py --model tiny-show-o       # the tiny Show-o, which draws by mask-predict
    torchrun sft.py --mode end-to-end         # through the image tokens, by straight-through Gumbel-softmax
    torchrun sft.py --model janus             # Janus-1.3B, one GPU of 80 GB

UniRL (Mao, Yang, Shou, arXiv 2505.23380), whose training code was never published. A prompt is built from
facts, so the answer to its question is known. Two ways to learn from it:

- `end-to-end`: cross-entropy of the known answer about the model's own picture, back-propagated through the
  picture: answer <- trunk <- SigLIP <- pixels <- VQ decoder <- codebook <- relaxed one-hots <- generator in a
  Janus, answer <- trunk <- relaxed one-hots <- generator in a Show-o.
- `two-stage`: cross-entropy of the image tokens of those own pictures whose answer came out right (expert
  iteration), from a buffer of recent ones, and, with --answer-weight, of the known answer.

How this differs from the paper, beside what grpo.py says of both (the guided distribution's likelihood, noise
conditioned on the sample, a frozen judge, replayed steps):

1. A KL to the starting model on the image tokens of fresh pictures (--beta).
2. To raise the conditional branch's likelihood alone would apply guidance on top of what guidance already
   did, round after round; so it is the guided distribution's that is raised (of a Janus), and a tenth of the
   prompts is guidance's empty one.
3. A Show-o's codes are masked anew at random, two-stage, and scored given the others and without guidance,
   much as in its pretraining (--estimator remask). To raise the guided probability of what each step was
   surest of makes a model surer, right or wrong: that harmed the tiny one at every rate. And many right
   pictures are kept (--buffer): where soon all were by a model that learned from such, a run fell apart.
4. The detector of `evaluate.py` only measures. It selects no picture.

Files in --out, and the run: as of grpo.py. Keys of a line of metrics.jsonl that differ from grpo.py's:

    reward, reward_<tag>   share of own pictures answered right (greedy), over all and over one category's
    buffer                 pictures in the replay buffer (two-stage)
    loss_answer            cross-entropy of the known answer's tokens about own pictures, nats a token
    loss_image             cross-entropy of the replayed pictures' codes, nats a code (two-stage)
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from grpo import Rollout, Run, Settings, flag, k3, roll_out, split, straight_through
from model import UnifiedModel
from reward import Task, score
from sample import Images, answer_logprobs, choose_scored, encode_answers, image_logprobs, positive, run


@dataclass
class SFTSettings(Settings):
    """What sft.py can be told that grpo.py cannot, or has another default."""

    out: str = flag(str, "output folder", "runs/sft")
    group: int = flag(positive(int), "images a prompt", 1)
    buffer: int = flag(positive(int), "pictures in the replay buffer; a Show-o's: 10000")


PRESETS = {  # as grpo.PRESETS
    "shapes": {"steps": 50, "prompts": 144, "micro_batch": 144, "draw_batch": 144, "lr": 2e-4, "beta": 0.01,
               "answer_weight": 0.0, "judge": "policy", "eval_every": 25, "recompute": False,
               "buffer": 2000},
    "geneval": {"steps": 1000, "prompts": 64, "micro_batch": 4, "draw_batch": 16, "lr": 1e-5, "beta": 0.03,
                "answer_weight": 0.3, "judge": "policy", "eval_every": 100, "recompute": True,
                "buffer": 2000},
    "end-to-end": {"answer_weight": 0.0, "judge": "frozen"},
    "shapes end-to-end": {"steps": 40, "lr": 3e-5, "beta": 0.05},
    "ShowO two-stage": {"estimator": "remask", "buffer": 10_000},
    "shapes ShowO": {"steps": 32, "prompts": 96, "micro_batch": 96, "lr": 1e-4, "eval_every": 8},
    "shapes ShowO end-to-end": {"lr": 4e-4},
}
CAPTION_DROPOUT = 0.1  # share of replayed pictures that teach the guidance's empty prompt

# ------------------------------------------------------------------------------------------------------------
# The losses


def answer_loss(model: UnifiedModel, tasks: Sequence[Task], image_features: Tensor) -> Tensor:
    """Cross-entropy [B] of the known answers about pictures, a mean over each answer's tokens."""
    ids, mask = encode_answers(model, [task.answer for task in tasks])
    logprobs = answer_logprobs(model, image_features, [task.question for task in tasks], ids)
    return -(logprobs * mask).sum(1) / mask.sum(1)


class Kept(NamedTuple):
    """A picture in the replay buffer, whose answer was right."""

    prompt: str
    codes: Tensor  # [N]
    unmask_step: Tensor | None  # [N], of a Show-o's codes


def replay_loss(
    policy: UnifiedModel, kept: Sequence[Kept], empty: Tensor, seeds: list[int], settings: Settings
) -> Tensor:
    """Cross-entropy [B] of replayed pictures' codes given their prompts, or guidance's empty one where
    `empty` [B]. The seeds choose what is scored of a Show-o's."""
    ids, mask = policy.generation_prompt([picture.prompt for picture in kept])
    other_ids, other_mask = policy.unconditional(ids, mask)
    ids, mask = other_ids.where(empty[:, None], ids), other_mask.where(empty[:, None], mask)
    codes = torch.stack([picture.codes for picture in kept])  # [B, N]
    steps = None if policy.draw_steps is None else torch.stack([picture.unmask_step for picture in kept])
    zeros = torch.zeros(codes.shape, device=codes.device)
    images = Images(codes, zeros, ids, mask, zeros + 1 / codes.shape[1], steps)
    images = choose_scored(policy, images, seeds, settings.estimator, settings.replay_steps)
    logprobs, _ = image_logprobs(policy, images, settings.guidance, settings.temperature, settings.logprob)
    return -(images.weights * logprobs).sum(1)


def objective(
    policy: UnifiedModel, judge: UnifiedModel, reference: UnifiedModel, rollout: Rollout,
    kept: Sequence[Kept], empty: Tensor | None, settings: Settings,
) -> tuple[Tensor, dict]:
    """The loss summed over these trajectories and as many replayed pictures, and sums over them of what is
    logged."""
    images, sums = rollout.images, {}
    scoring = images, settings.guidance, settings.temperature, settings.logprob
    if settings.mode == "end-to-end":
        logprobs, entropy, image_features = straight_through(policy, judge, rollout, settings)
        loss = answer_loss(judge, rollout.tasks, image_features)  # [B]
    else:
        logprobs, entropy = image_logprobs(policy, *scoring)  # [B, N]
        loss = torch.zeros_like(logprobs[:, 0])
        if kept:
            loss = replay_loss(policy, kept, empty, rollout.seeds, settings)
            sums["loss_image"] = loss.sum()
    with torch.no_grad():
        reference_logprobs, _ = image_logprobs(reference, *scoring)
    kl = k3(logprobs, reference_logprobs)  # [B, N]
    difference = (logprobs - images.logprobs).abs()
    means = {"kl_image": kl, "entropy_image": entropy, "rollout_difference": difference}
    sums |= {name: (images.weights * values).sum() for name, values in means.items()}
    with torch.set_grad_enabled(settings.answer_weight > 0):
        frozen = "vision_model" in settings.freeze
        image_features = rollout.image_features if frozen else policy.image_features(images.codes)
        answer = answer_loss(policy, rollout.tasks, image_features)
    loss = (loss + settings.answer_weight * answer).sum() + settings.beta * sums["kl_image"]
    return loss, {"loss": loss, "loss_answer": answer.sum(), **sums}


# ------------------------------------------------------------------------------------------------------------

IDLE = "no answer was right yet: look at the samples; try another --guidance, or an earlier checkpoint"


def main() -> None:
    run = Run("sft.py", SFTSettings, PRESETS)
    settings, buffer = run.settings, deque(maxlen=run.settings.buffer)  # of right pictures, the newest
    if run.folder and (run.folder / "trainer" / "buffer.safetensors").exists():
        columns = load_file(run.folder / "trainer" / "buffer.safetensors", str(run.device))
        steps = columns.get("unmask_step", [None] * len(columns["codes"]))
        buffer.extend(map(Kept, run.state["prompts"], columns["codes"], steps))

    def keep() -> tuple[dict, dict]:
        columns = {name: [getattr(kept, name) for kept in buffer] for name in ("codes", "unmask_step")}
        tensors = {name: torch.stack(rows) for name, rows in columns.items() if rows and rows[0] is not None}
        return {"prompts": [kept.prompt for kept in buffer]}, tensors

    for step in run.steps():
        # 1. Draw prompts whose facts are known, the same on every rank; this rank takes its share of the
        # trajectories.
        tasks, parts = run.draw(step)

        with run.compute:
            # 2. Draw an image for every trajectory and answer its question about it.
            drawn = [roll_out(run, *part, greedy=True) for part in parts]
            rollouts = [piece for rollout in drawn for piece in split(rollout, run.micro_batch)]

            # 3. Which answers are right?
            answered = [pair for rollout in drawn for pair in zip(rollout.answers.texts, rollout.tasks)]
            mine = [score(text, task, run.vocabulary) for text, task in answered]
            rewards = run.gather(torch.tensor(mine))  # [prompts * group]

        # 4. Keep the pictures that were, on every rank the same ones, and choose some of those kept to learn
        # from.
        replay = [((), None)] * len(rollouts)
        if settings.mode == "two-stage":
            codes = run.gather(torch.cat([r.images.codes for r in drawn]))  # [prompts * group, N]
            steps = [None] * len(codes)
            if run.policy.draw_steps:
                steps = run.gather(torch.cat([r.images.unmask_step for r in drawn]))
            right = (rewards == 1).nonzero().flatten().tolist()
            buffer.extend(Kept(tasks[i].prompt, codes[i], steps[i]) for i in right)
            chosen, dropped = run.rng.random(len(tasks)), run.rng.random(len(tasks)) < CAPTION_DROPOUT
            if buffer:
                kept = [buffer[int(place * len(buffer))] for place in chosen[run.mine]]
                empty = torch.from_numpy(dropped[run.mine]).to(run.device)
                size = run.micro_batch
                replay = [(kept[at : at + size], empty[at : at + size]) for at in range(0, len(kept), size)]

        # 5. Learn the known answers, and what led to right ones.
        metrics = run.update(step, [
            partial(objective, run.policy, run.judge, run.reference, rollout, *part, settings)
            for rollout, part in zip(rollouts, replay)
        ])

        # 6. Log, look, measure, save.
        metrics["buffer"] = len(buffer)
        idle = IDLE if settings.mode == "two-stage" and not buffer else ""
        run.log(step, tasks, rewards, rollouts, metrics, idle, keep)
    run.finish()


if __name__ == "__main__":
    run(main)
