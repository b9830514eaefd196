"""What sft.py and grpo.py share: one optimizer step over all ranks, and the folder of a run.

Nothing here knows which of the two is running. A run's folder holds args.json (its flags), metrics.jsonl (a line a step),
samples/ (contact sheets), step_*/ (checkpoints), before.json and before.png (scores of the starting point), and at the
end after.png, curves.png and summary.json.
"""

import argparse
import json
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor

from evaluate import World, report, table, write_json
from model import UnifiedModel, UserError
from reward import Task
from sample import contact_sheet, to_uint8, use_draw_steps

# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step over all ranks


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(values: Tensor) -> Tensor:
    """Every rank's [B, ...] joined in rank order."""
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


def update(
    optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], objectives: Sequence[Callable], count: int,
    max_grad_norm: float, compute,
) -> dict[str, float]:
    """One optimizer step on all ranks' `count` trajectories, accumulated over micro-batches. Each objective is called
    under `compute` and gives its loss summed over its trajectories, and sums over them of what is logged; the means of
    these come back. Nothing is changed where loss or gradient are not finite."""
    optimizer.zero_grad()
    totals = {}
    for objective in objectives:
        with compute:
            loss, sums = objective()
        (loss / count).backward()
        totals = {key: totals.get(key, 0) + value.detach() for key, value in sums.items()}
    sum_gradients(weights)
    norm = torch.nn.utils.clip_grad_norm_(weights, max_grad_norm).item()
    means = dict(zip(totals, (sum_over_ranks(torch.stack(list(totals.values()))) / count).tolist()))
    if np.isfinite(norm) and np.isfinite(means["loss"]):
        optimizer.step()
    return {**means, "grad_norm": norm}


def peak_memory(device: torch.device) -> float:
    """The most GB that this process has used so far: allocated on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a training run, written by sft.py and grpo.py alike


def resumed(args: argparse.Namespace, script: str) -> argparse.Namespace:
    """The flags of the run that `--resume` names, with more steps if they are given; refuses another script's run, and
    a mode that is not the run's."""
    path = Path(args.resume) / "args.json"
    if not path.exists():
        raise UserError(f"{args.resume}: holds no run of {script} (no args.json)")
    saved = json.loads(path.read_text())
    if saved["script"] != script:
        raise UserError(f"{args.resume}: holds a run of {saved['script']}; resume it with that")
    if args.mode not in (None, saved["mode"]):
        raise UserError(f"{args.resume}: holds a run of --mode {saved['mode']}, which cannot go on as {args.mode}")
    changes = {"resume": args.resume, "out": args.resume, **({"steps": args.steps} if args.steps else {})}
    return argparse.Namespace(**{**saved, **changes})


def fill_in(args: argparse.Namespace, defaults: dict, model: UnifiedModel, ranks: int) -> None:
    """The recommended values for the flags that were left out; refuses what cannot be split over the ranks."""
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.guidance = model.guidance if args.guidance is None else args.guidance
    images = args.prompts * args.group
    if images % ranks:
        raise UserError(f"{args.prompts} prompts x {args.group} images a step cannot be split over {ranks} ranks")
    args.micro_batch = min(args.micro_batch or images, images // ranks)
    if images // ranks % args.micro_batch:
        raise UserError(f"--micro-batch {args.micro_batch} does not divide a rank's {images // ranks} images")
    fill_in_mask_predict(args, model)
    parts = [name for name, _ in model.named_children()]
    args.freeze = [p for p in ("vision_model", "vqmodel") if p in parts] if args.freeze is None else args.freeze
    if not set(args.freeze) <= set(parts):
        raise UserError(f"--freeze {' '.join(args.freeze)}: {args.model} has {', '.join(parts)}")


REPLAY_STEPS = 3  # of a Show-o's trajectory, unless --replay-steps says otherwise: each costs a pass there and back


def fill_in_mask_predict(args: argparse.Namespace, model: UnifiedModel) -> None:
    """The values of the flags that only a Show-o knows; refuses them for a Janus."""
    use_draw_steps(model, args.draw_steps)
    args.draw_steps = model.steps
    if model.steps is None and (args.estimator or args.replay_steps is not None):
        raise UserError("--estimator and --replay-steps have no meaning for a Janus, which scores every token at once")
    if args.estimator == "remask" and args.replay_steps:
        raise UserError("--replay-steps has no meaning with --estimator remask, which replays no steps")
    if args.replay_steps and args.replay_steps > model.steps:
        raise UserError(f"--replay-steps {args.replay_steps}: an image is drawn in {model.steps} steps (--draw-steps)")
    if model.steps is not None and args.estimator != "remask" and args.replay_steps is None:
        args.replay_steps = min(REPLAY_STEPS, model.steps)


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


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then linear decay to 0 at the last step: gradients of so few samples are mostly noise, and what
    late steps at a full rate add of it costs more than they teach."""
    return args.lr * min(1.0, (step + 1) / (args.warmup + 1)) * (1 - step / args.steps)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restores the optimizer's state from a checkpoint folder."""
    try:
        optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: no optimizer state to resume from ({str(error).splitlines()[0]})") from None


def score_before(out: Path, rank: int, measure: Callable[[], tuple[dict, list[dict]]]) -> dict:
    """The scores before training: those in the folder, or what `measure` says, which is then put there."""
    if (out / "before.json").exists():
        return json.loads((out / "before.json").read_text())
    scores, records = measure()
    if rank == 0:
        write_json(out / "before.json", scores)
        report(records, out / "before.png")
    return scores


def stop_unless_finite(means: dict[str, float], rollouts: Sequence, out: Path, rank: int, step: int) -> None:
    """Raises UserError where an update's loss or gradient was not finite, after writing down what had been sampled, to
    look into: torch.load(path, weights_only=True)."""
    if np.isfinite(means["loss"]) and np.isfinite(means["grad_norm"]):
        return
    torch.save([
        {"prompts": [task.prompt for task in r.tasks], "codes": r.images.codes, "logprobs": r.images.logprobs,
         "answers": r.answers.texts, "answer_logprobs": r.answers.logprobs} for r in rollouts
    ], out / f"failed_batch_rank{rank}.pt")
    raise UserError(f"step {step + 1}: loss {means['loss']}, gradient norm {means['grad_norm']}. The batch "
                    f"is in {out}, the last checkpoint is intact; try a lower --lr")


def mean_rewards(tasks: Sequence[Task], rewards: Sequence[float]) -> dict[str, float]:
    """The rewards' mean over all trajectories, and over those of each category that occurs."""
    by_tag = {}
    for task, reward in zip(tasks, rewards):
        by_tag.setdefault(f"reward_{task.tag}", []).append(reward)
    return {"reward": float(np.mean(rewards)), **{key: float(np.mean(by_tag[key])) for key in sorted(by_tag)}}


def contact_sheet_of(
    model: UnifiedModel, rollouts: Sequence, rewards: Sequence[float], path: Path, count: int = 24
) -> None:
    """A contact sheet of this rank's trajectories (tasks, what was seen, answers), evenly chosen: prompt, answer,
    reward."""
    with torch.no_grad():
        pixels = np.concatenate([to_uint8(model.show(r.seen)) for r in rollouts])
    prompts = [task.prompt.removeprefix("a photo of ") for r in rollouts for task in r.tasks]
    texts = [text for r in rollouts for text in r.answers.texts]
    chosen = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int)
    captions = [f"{prompts[i]}\nsays: {texts[i]}\nreward {rewards[i]:.2f}" for i in chosen]
    contact_sheet(pixels[chosen], captions, path)


CURVES = {"self-reward": "#d9822b", "detector": "#2b6cd9", "understanding": "#3a9d5d"}


def curves(runs: Sequence[Path], path: Path, width: int = 640, height: int = 320) -> None:
    """A picture of runs' self-reward on training prompts (mean of five steps), and of the detector's score and the
    understanding of true pictures on held-out prompts, against steps; one thin line a run."""
    lines = []  # (name, [(step, value)])
    for run_ in runs:
        steps = [json.loads(line) for line in (run_ / "metrics.jsonl").read_text().splitlines()]
        scores = json.loads((run_ / "summary.json").read_text())
        held_out = [(line["step"], line["held_out"]) for line in steps if "held_out" in line]
        rewards = [line["reward"] for line in steps]
        smooth = [(line["step"], np.mean(rewards[max(i - 4, 0) : i + 1])) for i, line in enumerate(steps)]
        lines.append(("self-reward", smooth))
        for name, part, key, short in (("detector", "generation", "overall", "generation"),
                                       ("understanding", "understanding", "ground_truth", "ground_truth")):
            ends = [(step, scores[when][part][key]) for step, when in ((0, "before"), (scores["steps"], "after"))]
            lines.append((name, ends[:1] + [(step, values[short]) for step, values in held_out] + ends[1:]))
    last = max(step for _, points in lines for step, _ in points)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    place = lambda step, value: (36 + (width - 48) * step / last, height - 24 - (height - 48) * value)
    for tenth in range(0, 11, 2):
        pen.line([place(0, tenth / 10), place(last, tenth / 10)], "#dddddd")
        pen.text((8, place(0, tenth / 10)[1] - 6), f"{tenth / 10:.1f}", "black")
    for name, points in lines:
        if all(value is not None for _, value in points):
            pen.line([place(step, value) for step, value in points], CURVES[name], 2)
    for i, (name, color) in enumerate(CURVES.items()):
        pen.text((40 + 130 * i, 4), name, color)
    pen.text((width - 90, height - 16), f"{last} steps", "black")
    picture.save(path)


def finish(args, before: dict, after: dict, records: list[dict], world: World, seconds: float) -> None:
    """summary.json, after.png and the table, with the conditions of the scores and what to do next."""
    out = Path(args.out)
    summary = {"model": args.model, "mode": args.mode, "seed": args.seed, "steps": args.steps, "seconds": seconds}
    write_json(out / "summary.json", {**summary, "before": before, "after": after})
    report(records, out / "after.png")
    curves([out], out / "curves.png")
    print(table({"before": before, "after": after}))
    steps = f"{args.draw_steps} mask-predict steps, " if args.draw_steps else ""
    print(f"{args.eval_images} images for each of {len(world.suite)} held-out prompts, guidance {args.guidance:g}, "
          f"temperature {args.temperature:g}, {steps}evaluation seed 0; {seconds:.0f} s in all")
    print(f"look at {out}/curves.png, before.png and after.png; then: python sample.py \"{world.suite[0].prompt}\" "
          f"--model {out}/step_{args.steps:06d}")
