"""What a run of sft.py or grpo.py shows, and whether it fools itself.

The gap gauge: before training, every --eval-every steps and at the end the model draws held-out prompts. Three numbers are
set side by side, each a mean over the suite's categories:

    self-reward     the share of its own pictures about which it says what the prompt says: what training raises
    detector        the share of them that the detector calls right, which training never sees
    true pictures   the share of true pictures about which its answers are right: whether it can still see

A model that rewards itself can learn to say the known answer about any picture. Then the first rises, or stays, while one
of the others falls. Where one falls by more than --gap-margin and two standard errors and the first does not, the run
says so, and with --stop-on-gap saves and ends. In the tiny world both are at hand. For a real model there are the detector of
evaluate.py (--detector) and a folder of true pictures in GenEval's layout (--true-images).

Files in a run's folder: metrics.jsonl (a line a step), samples/ (contact sheets), before.json and before.png (scores of
the starting point), at the end after.png, curves.png and summary.json, and with --tensorboard tensorboard/.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from evaluate import World, load_detector, read_folder, report, table, versions, write_json
from model import UnifiedModel, UserError
from reward import Task
from sample import contact_sheet, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
# The gap gauge


def add_measures(world: World, args: argparse.Namespace, device: torch.device) -> None:
    """Gives the world the user's detector and true pictures.

    Raises:
        UserError: where one of them cannot be read, or TensorBoard is asked for and not installed.
    """
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard: it is not installed (pip install tensorboard)")
    if args.detector:
        world.detect = load_detector(args.detector, args.detector_clip, device, ("--detector", "--detector-clip"))
    if args.true_images:
        world.pictures = read_folder(Path(args.true_images))
        asked = {fact["class"] for line, _ in world.pictures for fact in line["include"]}
        if unknown := asked - set(world.vocabulary.objects):
            raise UserError(f"--true-images {args.true_images}: asks for {min(unknown)!r}, which the {world.name} world "
                            "does not know")


def measures(scores: dict) -> dict[str, float | None]:
    """The three numbers of the gauge."""
    understanding = scores["understanding"]
    return {"self-reward": understanding["own_images"], "detector": scores["generation"]["overall"],
            "true pictures": understanding["ground_truth"]}


def falls(
    before: dict[str, float | None], now: dict[str, float | None], counts: tuple[dict[str, int], dict[str, int]],
    margin: float,
) -> list[str]:
    """The independent measures that fell while the self-reward did not. To fall is to lose more than `margin` and more than
    two standard errors (of a difference of shares of `counts` pictures)."""

    def fell(name: str) -> bool:
        shares = before[name], now[name]
        if None in shares:
            return False
        error = math.sqrt(sum(share * (1 - share) / count[name] for share, count in zip(shares, counts)))
        return shares[0] - shares[1] > max(margin, 2 * error)

    return [] if fell("self-reward") else [name for name in ("detector", "true pictures") if fell(name)]


class Watch:
    """What a run writes down as it goes, and its gap gauge. `gap` is what the last measurement found wrong, or empty."""

    def __init__(self, args: argparse.Namespace, world: World, before: dict, rank: int, start: int):
        self.args, self.world, self.before, self.out, self.first = args, world, before, Path(args.out), rank == 0
        self.gap, self.board = "", None
        self.images = min(2, args.eval_images)  # of each held-out prompt on the way
        if self.first and args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # only here, as it need not be installed

            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=start + 1)
        known = measures(before)
        if self.first and args.eval_every and known["detector"] is None and known["true pictures"] is None:
            tqdm.write("nothing independent is measured: the gap gauge needs --detector or --true-images", file=sys.stderr)

    def count(self, images: int) -> dict[str, int]:
        """How many pictures a measurement looks at."""
        drawn = images * len(self.world.suite)
        folder = self.world.pictures and sum(len(files) for _, files in self.world.pictures)
        return {"self-reward": drawn, "detector": drawn, "true pictures": folder or drawn}

    def gauge(self, scores: dict, step: int, images: int) -> dict:
        """What is logged of a measurement; says so where self-reward and what is so have parted."""
        before, now = measures(self.before), measures(scores)
        counts = self.count(self.args.eval_images), self.count(images)
        fallen, self.gap = falls(before, now, counts, self.args.gap_margin), ""
        if fallen:
            change = lambda name: f"{name} {before[name]:.3f} -> {now[name]:.3f}"
            self.gap = (f"what the model says and what is so have parted: {change('self-reward')}, but "
                        f"{', '.join(map(change, fallen))} (held-out prompts, since the start)")
            if self.first:
                tqdm.write(f"warning: step {step}: {self.gap}. It may be learning to say what the prompt says: look at samples/, try "
                           "a lower --answer-weight or --lr, a higher --beta, or --judge frozen (--stop-on-gap ends here)",
                           file=sys.stderr)
        return {**{key.replace(" ", "_").replace("-", "_"): value for key, value in now.items()}, "parted": fallen,
                "true_pictures_by_category": scores["understanding"]["ground_truth_by_category"]}

    def text(self, held_out: dict) -> str:
        """A measurement in a progress bar's words."""
        words = [f"{short} {held_out[key]:.2f}" for short, key in
                 (("self", "self_reward"), ("detector", "detector"), ("true", "true_pictures")) if held_out[key] is not None]
        return f"held-out: {' '.join(words)}{' PARTED' * bool(held_out['parted'])}"

    def line(self, line: dict) -> None:
        """Appends a step's metrics; what is not finite becomes null, which JSON has."""
        infinite = lambda value: isinstance(value, float) and not math.isfinite(value)
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({key: None if infinite(value) else value for key, value in line.items()}) + "\n")
        if self.board:
            inside = {f"held_out/{key}": value for key, value in line.get("held_out", {}).items()}
            for key, value in {**line, **inside}.items():
                if isinstance(value, (int, float)) and key != "step":
                    self.board.add_scalar(key, value, line["step"])
            self.board.flush()

    def sheet(self, model: UnifiedModel, rollouts: Sequence, rewards: Sequence[float], step: int, count: int = 24) -> None:
        """A contact sheet of this rank's trajectories (tasks, images, answers), evenly chosen: prompt, answer,
        reward."""
        with torch.no_grad():
            pixels = np.concatenate([to_uint8(model.to_pixels(r.images.codes)) for r in rollouts])
        prompts = [task.prompt.removeprefix("a photo of ") for r in rollouts for task in r.tasks]
        texts = [text for r in rollouts for text in r.answers.texts]
        chosen = np.linspace(0, len(pixels) - 1, min(count, len(pixels))).round().astype(int)
        captions = [f"{prompts[i]}\nsays: {texts[i]}\nreward {rewards[i]:.2f}" for i in chosen]
        path = self.out / "samples" / f"step_{step:06d}.png"
        contact_sheet(pixels[chosen], captions, path)
        if self.board:
            self.board.add_image("samples", np.asarray(Image.open(path)), step, dataformats="HWC")

    def finish(self, after: dict, records: list[dict], seconds: float) -> None:
        """summary.json, after.png, curves.png and the table, with the conditions of the scores and what to do next."""
        args, out = self.args, self.out
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        last = self.gauge(after, args.steps, args.eval_images)
        parted = {line["step"]: line["held_out"]["parted"] for line in lines if line.get("held_out", {}).get("parted")}
        summary = {"model": args.model, "mode": args.mode, "seed": args.seed, "steps": args.steps, "seconds": seconds,
                   "threads": torch.get_num_threads(), "versions": versions(),
                   "parted": {**parted, **({args.steps: last["parted"]} if last["parted"] else {})}}
        report(records, out / "after.png")
        write_json(out / "summary.json", {**summary, "before": self.before, "after": after})
        curves(out, out / "curves.png")
        if self.board:
            self.board.add_image("after", np.asarray(Image.open(out / "after.png")), args.steps, dataformats="HWC")
            self.board.close()
        print(table({"before": self.before, "after": after}))
        steps = f"{args.draw_steps} mask-predict steps, " if args.draw_steps else ""
        print(f"{args.eval_images} images for each of {len(self.world.suite)} held-out prompts, guidance {args.guidance:g}, "
              f"temperature {args.temperature:g}, {steps}evaluation seed 0; {seconds:.0f} s since the start or --resume")
        if summary["parted"]:
            print(f"warning: self-reward and what is so had parted at step {', '.join(map(str, summary['parted']))}")
        print(f"look at {out}/curves.png, before.png and after.png; then: python sample.py \"{self.world.suite[0].prompt}\" "
              f"--model {out}/step_{args.steps:06d}")


# ---------------------------------------------------------------------------------------------------------------------
# Beside the steps


def score_before(out: Path, rank: int, measure: Callable[[], tuple[dict, list[dict]]]) -> dict:
    """The scores before training: those in the folder, or what `measure` says, which is then put there."""
    if (out / "before.json").exists():
        return json.loads((out / "before.json").read_text())
    scores, records = measure()
    if rank == 0:
        report(records, out / "before.png")
        write_json(out / "before.json", scores)  # last, as a run that was killed in between measures again
    return scores


def mean_rewards(tasks: Sequence[Task], rewards: Sequence[float]) -> dict[str, float]:
    """The rewards' mean over all trajectories, and over those of each category that occurs."""
    by_tag = {}
    for task, reward in zip(tasks, rewards):
        by_tag.setdefault(f"reward_{task.tag}", []).append(reward)
    return {"reward": float(np.mean(rewards)), **{key: float(np.mean(by_tag[key])) for key in sorted(by_tag)}}


CURVES = {"training reward": "#c9c9c9", "self-reward": "#d9822b", "detector": "#2b6cd9", "true pictures": "#3a9d5d"}


def curves(run: Path, path: Path, width: int = 640, height: int = 320) -> None:
    """A picture of a run: its reward on training prompts (mean of five steps), and against steps the three numbers of the
    gauge; a red line where they had parted."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    rewards = [line["reward"] for line in steps]
    lines = {"training reward": [(line["step"], np.mean(rewards[max(i - 4, 0) : i + 1])) for i, line in enumerate(steps)]}
    before, after = measures(summary["before"]), measures(summary["after"])
    for name in before:
        key = name.replace(" ", "_").replace("-", "_")
        held_out = [(line["step"], line["held_out"][key]) for line in steps if "held_out" in line]
        lines[name] = [(0, before[name]), *held_out, (summary["steps"], after[name])]
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    place = lambda step, value: (36 + (width - 48) * step / summary["steps"], height - 24 - (height - 48) * value)
    for tenth in range(0, 11, 2):
        pen.line([place(0, tenth / 10), place(summary["steps"], tenth / 10)], "#dddddd")
        pen.text((8, place(0, tenth / 10)[1] - 6), f"{tenth / 10:.1f}", "black")
    for step in map(int, summary["parted"]):
        pen.line([place(step, 0), place(step, 1)], "#d03030", 1)
    for i, (name, color) in enumerate(CURVES.items()):
        if all(value is not None for _, value in lines[name]):
            pen.line([place(*point) for point in lines[name]], color, 2)
            pen.text((40 + 120 * i, 4), name, color)
    if summary["parted"]:
        pen.text((40 + 120 * len(CURVES), 4), "parted", "#d03030")
    pen.text((width - 90, height - 16), f"{summary['steps']} steps", "black")
    picture.save(path)
