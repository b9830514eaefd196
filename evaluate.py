"""How well a model draws, how well it understands, and how often the two disagree.

    python evaluate.py --model tiny --out results

- Generation: images for the suite's prompts, judged by GenEval's rules on a detector's output. `overall` is the mean of
  the six categories' shares of right images.
- Understanding: the suite's questions about true pictures and about the model's own images; an answer is right when it
  states all the facts of its prompt and contradicts none (`reward.score`, exact).
- Imbalance, over own images: `answered_given_drawn`, the share answered right of those that the detector calls right;
  `drawn_given_answered`, the share that the detector calls right of those answered right; `disagreement`, the share on
  which the two differ, and its two parts `drawn_not_understood` and `understood_not_drawn`.

The tiny checkpoint is scored in its shapes world: held-out prompts, its renderer's true pictures, its detector. Other
models have no detector here yet: they get GenEval's prompts and what can be measured without one, and `null` elsewhere.
Writes results.json (scores, conditions, one record an image) and report.png into --out.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import NAMES, UnifiedModel, UserError, load
from reward import REAL, TAGS, Task, Vocabulary, geneval_suite, score
from sample import (
    contact_sheet, non_negative, pick_device, positive, run, sample_answers, sample_images, to_pixels, to_uint8,
    use_draw_steps,
)
from tiny import world as shapes

# ---------------------------------------------------------------------------------------------------------------------
# GenEval's rules: from detections to a verdict. They never know where the detections come from.


class Detection(NamedTuple):
    """One object that a detector found in a picture."""

    name: str  # class
    score: float  # confidence in [0, 1]
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: np.ndarray | None = None  # [H, W] bool
    color: str | None = None


MAX_OBJECTS = 16  # of one class, the most confident ones
POSITION_THRESHOLD = 0.1  # share of the two boxes' sizes that an offset must exceed to count


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """What holds of box a seen from box b (`relative_position` of GenEval's evaluate_images.py): the offset of the
    centres, less a tenth of the two sizes, over the distance of the centres; beyond 0.5 a direction holds, so that two
    can hold at once on a diagonal. Boxes that overlap almost wholly have no relation."""
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)  # rows: left-top and right-bottom
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}


def judge(task: Task, detections: Sequence[Detection], threshold: float, counting_threshold: float) -> tuple[bool, str]:
    """GenEval's verdict on one picture, and the reason in words ("" when right).

    For every fact in turn, its `count` most confident objects of the class must be there, have the colour, and stand in
    the relation to every object that the earlier fact matched. Counting also fails on one object too many.
    """
    least = counting_threshold if task.tag == "counting" else threshold
    found = sorted((d for d in detections if d.score > least), key=lambda d: -d.score)
    groups, reasons = [], []
    for fact in task.facts:
        name, count = fact["class"], fact["count"]
        objects = [d for d in found if d.name == name][:MAX_OBJECTS]
        group, problem = objects[:count], ""
        if len(group) < count:
            problem = f"expected {name} >= {count}, found {len(group)}"
        elif "color" in fact and sum(d.color == fact["color"] for d in group) < count:
            colors = ", ".join(str(d.color) for d in group)
            problem = f"expected {fact['color']} {name} >= {count}, found {colors}"
        elif "position" in fact:
            relation, other = fact["position"]
            if groups[other] is None:
                problem = f"no target for {name} to be {relation}"
            elif not all(relation in relations(d.box, t.box) for d in group for t in groups[other]):
                problem = f"expected {name} {relation} target"
        elif task.tag == "counting" and len(objects) > count:
            problem = f"expected {name} <= {count}, found {len(objects)}"
        groups.append(None if problem else group)
        reasons += [problem] if problem else []
    return not reasons, "; ".join(reasons)


# ---------------------------------------------------------------------------------------------------------------------
# The world that a model is scored in


@dataclass
class World:
    """Where prompts come from and what judges pictures; `detect` and `render` are None where there is no such thing."""

    vocabulary: Vocabulary
    suite: list[Task]
    detect: Callable[[np.ndarray], list[list[Detection]]] | None
    render: Callable[[Task, np.random.Generator], np.ndarray] | None
    threshold: float
    counting_threshold: float


def world_of(model: UnifiedModel) -> World:
    """The shapes world for a checkpoint that says it lives there, the real one for any other."""
    if getattr(model.config, "world", None) == "shapes":
        return World(
            shapes.VOCABULARY,
            shapes.held_out_tasks(),
            lambda images: [[Detection(**d) for d in found] for found in shapes.detect(images)],
            shapes.render,
            shapes.MIN_OVERLAP,
            shapes.MIN_OVERLAP,
        )
    return World(REAL, geneval_suite(), None, None, 0.3, 0.9)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def evaluate(
    model: UnifiedModel, world: World, guidance: float, temperature: float = 1.0, images_per_prompt: int = 6,
    seed: int = 0, batch: int = 144, compiled: bool = True, progress: str = "scoring",
) -> tuple[dict, list[dict]]:
    """Scores of the model in the world, and a record for every image (task, pixels, answers, verdicts). With several
    ranks each takes its share of the images and all get the scores; the records are then this rank's own."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tasks = [task for task in world.suite for _ in range(images_per_prompt)]
    jobs = [(task, seed * 1_000_003 + i) for i, task in enumerate(tasks)][rank::ranks]
    records = []
    bar = tqdm(range(0, len(jobs), batch), progress, unit="batch", leave=False, disable=None if rank == 0 else True)
    for start in bar:
        part = jobs[start : start + batch]
        tasks, seeds = [task for task, _ in part], [s for _, s in part]
        whole = len(part) == batch  # a last batch of another size would be compiled anew, which takes longer than it
        prompts = [task.prompt for task in tasks]
        codes = sample_images(model, prompts, seeds, guidance, temperature, compiled and whole).codes
        records += score_images(model, world, tasks, model.see(codes), seeds)
    mine = [{key: value for key, value in record.items() if key != "image"} for record in records]
    everyone = [mine]
    if ranks > 1:
        everyone = [None] * ranks
        dist.all_gather_object(everyone, mine)
    return summarize([record for part in everyone for record in part]), records


@torch.no_grad()
def score_images(
    model: UnifiedModel, world: World, tasks: Sequence[Task], seen: torch.Tensor, seeds: Sequence[int]
) -> list[dict]:
    """One record an image, given as pixels or as what `see` gave: what it shows by the detector and by the model's own
    answer, and the model's answer about a true picture of the same task."""
    images = to_uint8(model.show(seen))
    questions = [task.question for task in tasks]
    answers = sample_answers(model, seen, questions).texts
    verdicts = [(None, "")] * len(tasks)
    if world.detect:
        found = world.detect(images)
        verdicts = [judge(t, d, world.threshold, world.counting_threshold) for t, d in zip(tasks, found)]
    about_true = [None] * len(tasks)
    if world.render:
        true = np.stack([world.render(task, np.random.default_rng(s)) for task, s in zip(tasks, seeds)])
        about_true = sample_answers(model, to_pixels(true, model.device), questions).texts
    return [
        {
            "tag": task.tag, "prompt": task.prompt, "question": task.question, "known": task.answer, "seed": s,
            "image": image, "answer": answer, "drawn": drawn, "reason": reason, "answer_about_true": true,
            "answered": score(answer, task, world.vocabulary) == 1,
            "answered_true": None if true is None else score(true, task, world.vocabulary) == 1,
        }
        for task, s, image, answer, (drawn, reason), true in zip(tasks, seeds, images, answers, verdicts, about_true)
    ]


def share(values: Sequence[bool | None]) -> float | None:
    """Mean of booleans; None where there are none or they were not measured."""
    return None if not len(values) or values[0] is None else float(np.mean(values))


def summarize(records: list[dict]) -> dict:
    """The scores S of a run: generation, understanding and imbalance, each a number in [0, 1] or None."""

    def by_tag(key: str) -> dict:
        tags = {tag: share([r[key] for r in records if r["tag"] == tag]) for tag in TAGS}
        known = [v for v in tags.values() if v is not None]
        return {"overall": float(np.mean(known)) if known else None, **tags}

    true, own = by_tag("answered_true"), by_tag("answered")
    detected = bool(records) and records[0]["drawn"] is not None
    only_drawn = share([r["drawn"] and not r["answered"] for r in records]) if detected else None
    only_answered = share([r["answered"] and not r["drawn"] for r in records]) if detected else None
    return {
        "generation": by_tag("drawn"),
        "understanding": {"ground_truth": true.pop("overall"), "own_images": own.pop("overall"),
                          "ground_truth_by_category": true, "own_images_by_category": own},
        "imbalance": {
            "answered_given_drawn": share([r["answered"] for r in records if r["drawn"]]),
            "drawn_given_answered": share([r["drawn"] for r in records if r["answered"]]),
            "disagreement": only_drawn + only_answered if detected else None,
            "drawn_not_understood": only_drawn,
            "understood_not_drawn": only_answered,
        },
    }


def table(columns: dict[str, dict]) -> str:
    """Scores side by side, one column for every named S, and the last less the first where there are two or more."""

    def cell(value: float | None) -> str:
        return "      -" if value is None else f"{value:7.3f}"

    first, last = list(columns.values())[0], list(columns.values())[-1]
    lines = [" " * 38 + " ".join(f"{name:>7}" for name in columns) + (" change" if len(columns) > 1 else "")]
    for part, scores in first.items():
        for name, value in scores.items():
            if isinstance(value, dict):
                continue
            row = [column[part][name] for column in columns.values()]
            line = f"{part:14}{name:24}" + " ".join(map(cell, row))
            if len(columns) > 1 and None not in (value, last[part][name]):
                line += f" {last[part][name] - value:+.3f}"
            lines.append(line)
    return "\n".join(lines)


def write_json(path: Path, content: dict | list) -> None:
    """Writes beside and renames, so that the file is whole or not there."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)


def report(records: list[dict], path: Path, columns: int = 12) -> None:
    """A contact sheet, a row of `columns` pictures a category, evenly chosen, wrong ones first: prompt, the detector's
    verdict and its reason, the model's answer."""
    chosen = []
    for tag in TAGS:
        tagged = sorted((r for r in records if r["tag"] == tag), key=lambda r: (bool(r["drawn"]), r["answered"]))
        chosen += [tagged[i] for i in np.linspace(0, len(tagged) - 1, min(columns, len(tagged))).round().astype(int)]
    verdicts = {True: "right", False: "wrong: ", None: "not judged"}
    captions = [
        f"{r['prompt'].removeprefix('a photo of ')}\n{verdicts[r['drawn']]}{r['reason'].removeprefix('expected ')}\n"
        f"says: {r['answer']}\n{'as' if r['answered'] else 'not as'} the prompt says"
        for r in chosen
    ]
    contact_sheet(np.stack([r["image"] for r in chosen]), captions, path, columns)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="score a model")
    parser.add_argument("--model", default="tiny", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny)")
    parser.add_argument("--out", default="results", help="folder for results.json and report.png (default: results)")
    parser.add_argument("--images-per-prompt", type=positive(int), default=None, help="default: 6 (tiny), 4 (others)")
    parser.add_argument("--seed", type=non_negative(int), default=0)
    parser.add_argument("--guidance", type=non_negative(float), default=None, help="default: the checkpoint's")
    parser.add_argument("--temperature", type=positive(float), default=1.0)
    parser.add_argument("--draw-steps", type=positive(int), help="of mask-predict, Show-o's; default: the checkpoint's")
    parser.add_argument("--batch", type=positive(int), default=None, help="images at once (default: 144 on tiny, 16)")
    parser.add_argument("--no-compile", action="store_true", help="start at once, run slower")
    args = parser.parse_args()
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    device = pick_device()
    model = load(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    use_draw_steps(model, args.draw_steps)
    world = world_of(model)
    small = world.detect is not None
    guidance = model.guidance if args.guidance is None else args.guidance
    images = args.images_per_prompt or (6 if small else 4)
    batch = args.batch or (144 if small else 16)
    scores, records = evaluate(
        model, world, guidance, args.temperature, images, args.seed, batch, compiled=not args.no_compile
    )
    conditions = {
        "model": args.model, "guidance": guidance, "temperature": args.temperature, "images_per_prompt": images,
        "images": len(records), "seed": args.seed, "scorer": "shapes world's detector" if small else None,
        "torch": torch.__version__, **({"draw_steps": model.steps} if model.steps else {}),
    }
    plain = [{key: value for key, value in record.items() if key != "image"} for record in records]
    write_json(out / "results.json", {"scores": scores, "conditions": conditions, "images": plain})
    report(records, out / "report.png")
    print(table({args.model[-12:]: scores}))
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    print(f"written: {out}/results.json; look at {out}/report.png")


if __name__ == "__main__":
    run(main)
