"""How well a model draws, how well it understands, and how often the two disagree.

    python evaluate.py --model tiny --out results               # draws the suite, scores it, asks about it
    torchrun --nproc_per_node 8 evaluate.py --model janus --detector FOLDER --clip FOLDER
    python evaluate.py --images FOLDER                          # scores pictures that anybody drew
    python evaluate.py --images FOLDER --model janus            # and asks a model about them
    python evaluate.py --write-suite evaluation_metadata.jsonl  # GenEval's 553 prompts
    python evaluate.py --compare before/results.json after/results.json

- Generation: pictures for the suite's prompts, judged by GenEval's rules on a detector's output; `overall` is
  the mean of six categories. The rules are the benchmark's own; the detector's weights are another training
  run of the same architecture, so that a number for a paper wants the official scorer.
- Understanding: the suite's questions about true pictures (in the tiny world, which can draw them) and about
  the model's own, or the folder's, answered greedily; right as in `reward.score` (exact).
- Imbalance, of the same pictures: `answered_given_drawn`, the share answered right of those drawn right;
  `drawn_given_answered`, that drawn right of those answered right; `disagreement` and its two parts. (The
  paper's inference_cycle.py and inference_mmu_t2i.py have a language model judge answers, and for the second
  share draw a fresh picture of a prompt answered right.)

Pictures lie in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png, ...), as the official scorer
wants them; an interrupted call goes on where it stopped. The tiny checkpoints are scored in their shapes
world: held-out prompts, true pictures, a detector. Into --out go images/, report.png and results.json:

    scores      generation, understanding, imbalance: in [0, 1], or null where something was not measured
    conditions  model, images (the folder), suite (name, prompts, sha256 of its lines), guidance, temperature,
                draw_steps (a Show-o's, else null), images_per_prompt, seed, scorer, nothing_found (share of
                pictures without a detection), versions
    images      of every picture: index (of its prompt), file, tag, prompt, question, known, drawn, reason,
                detections (name, score, box, color), answer, answered, answer_about_true, answered_true
"""

import argparse
import hashlib
import json
import platform
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from tqdm import tqdm

from model import NAMES, UnifiedModel, UserError, from_uint8, load, read_json, user_error
from reward import GENEVAL, REAL, TAGS, Task, Vocabulary, geneval_metadata, geneval_suite, score, task_of
from sample import (
    COMPILING, ShortHelp, agree, compiling_pays, contact_sheet, non_negative, positive, run, sample_answers,
    sample_images, start_ranks, to_uint8, upright, use_draw_steps, write_json, write_whole,
)
from tiny import world as shapes

# ---- GenEval's rules: from detections to a verdict ---------------------------------------------------------
# After evaluate_images.py of github.com/djghosh13/geneval (Ghosh et al. 2023).

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence that an object must exceed, anywhere and to be counted
MAX_OBJECTS = 16  # of one class, the most confident ones
POSITION_THRESHOLD = 0.1  # share of the two boxes' sizes that an offset must exceed to count


@dataclass(eq=False)
class Detection:
    """One object that a detector found in a picture."""

    name: str  # class
    score: float  # confidence in [0, 1]
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: np.ndarray | None = None  # [H, W] bool
    color: str | None = None


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """What holds of box a as seen from box b: the offset of the centres, less a tenth of the two sizes, over
    their distance; beyond 0.5 a direction holds, so that two can hold at once on a diagonal."""
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)  # rows: left-top and right-bottom
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():  # almost the same place
        return set()
    x, y = beyond / np.linalg.norm(offset)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}


def confident(metadata: dict, detections: Sequence[Detection], threshold: float, counting: float) -> dict:
    """The objects that count, as lists by class, the most confident first."""
    least = counting if metadata["tag"] == "counting" else threshold
    objects = {}
    for detection in sorted((d for d in detections if d.score > least), key=lambda d: -d.score):
        objects.setdefault(detection.name, []).append(detection)
    return {name: group[:MAX_OBJECTS] for name, group in objects.items()}


def verdict(
    metadata: dict, detections: Sequence[Detection], threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
) -> tuple[bool, str]:
    """GenEval's verdict on one picture, and the reason in words ("" when right).

    For every entry of `include` in turn, its `count` most confident objects of the class must be there, have
    the color, and stand in the relation to every object that an earlier entry matched. Of no entry of
    `exclude` may there be `count` objects or more.
    """
    objects = confident(metadata, detections, threshold, counting_threshold)
    matched, faults = [], []  # an entry's objects, none where they are wrong; what is wrong
    for fact in metadata["include"]:
        name, count = fact["class"], fact["count"]
        group, fault = objects.get(name, [])[:count], ""
        if len(group) < count:
            fault = f"expected {name} >= {count}, found {len(group)}"
        elif "color" in fact and any(d.color != fact["color"] for d in group):
            found = ", ".join(str(d.color) for d in group)
            fault = f"expected {fact['color']} {name} >= {count}, found {found}"
        elif "position" in fact:
            relation, target = fact["position"]
            found = [relations(d.box, other.box) for d in group for other in matched[target]]
            wrong = [" and ".join(sorted(one)) or "neither side" for one in found if relation not in one]
            if not found:
                fault = f"no target for {name} to be {relation}"
            elif wrong:
                fault = f"expected {name} {relation} target, found {wrong[0]}"
        matched.append([] if fault else group)
        faults.append(fault)
    for fact in metadata.get("exclude", []):
        found = len(objects.get(fact["class"], []))
        if found >= fact["count"]:
            faults.append(f"expected {fact['class']} < {fact['count']}, found {found}")
    return not any(faults), "; ".join(filter(None, faults))


# ---- the world that a model is scored in -------------------------------------------------------------------


@dataclass
class World:
    """Where prompts come from, what judges pictures, and where true ones come from: drawn by `render`, or the
    user's `pictures` (as `read_folder` gives them). None where there is no such thing."""

    name: str
    vocabulary: Vocabulary
    suite: list[Task]
    detect: Callable[[Sequence[np.ndarray], Sequence[dict]], list[list[Detection]]] | None = None
    render: Callable[[Task, np.random.Generator], np.ndarray] | None = None
    pictures: list[tuple[dict, list[Path]]] | None = None
    thresholds: tuple[float, float] = (THRESHOLD, COUNTING_THRESHOLD)
    held_out: Sequence[Task] = ()  # what training must not draw, where that is more than the suite


def shapes_world(part: str = "validation") -> World:
    """The tiny checkpoints': held-out prompts, of which runs see the validation's and results report the
    test's; a renderer; a detector that never learned anything."""

    def detect(images: Sequence[np.ndarray], metadata: Sequence[dict]) -> list[list[Detection]]:
        return [[Detection(**fields) for fields in found] for found in shapes.detect(np.stack(images))]

    thresholds = shapes.MIN_OVERLAP, shapes.MIN_OVERLAP
    parts = {name: shapes.held_out_tasks(name) for name in ("validation", "test")}
    return World(
        "shapes", shapes.VOCABULARY, parts[part], detect, shapes.render, thresholds=thresholds,
        held_out=sum(parts.values(), []),
    )


def world_of(model: UnifiedModel | None, part: str = "validation") -> World:
    """The shapes world for a checkpoint that says it lives there, GenEval's for any other."""
    lives_in = getattr(model.config, "world", None) if model else None
    return shapes_world(part) if lives_in == "shapes" else World("geneval", REAL, geneval_suite())


def asked_for(pictures: list[tuple[dict, list[Path]]]) -> set[str]:
    """The objects that the lines of `read_folder` ask for."""
    return {fact["class"] for line, _ in pictures for fact in line["include"]}


def refuse_unknown(world: World, pictures: list[tuple[dict, list[Path]]], given: str) -> None:
    """Raises UserError where a line asks for an object that answers are not read with."""
    if unknown := asked_for(pictures) - set(world.vocabulary.objects):
        raise UserError(f"{given}: asks for {min(unknown)!r}, unknown to the {world.name} world")


def look(world: World, images: Sequence[np.ndarray], lines: Sequence[dict]) -> list[tuple]:
    """What the world's detector finds in each picture [H, W, 3] uint8, and the verdict on it given GenEval's
    line; three times None or "" where there is no detector."""
    if not world.detect:
        return [(None, None, "")] * len(lines)
    found = world.detect(images, lines)
    return [(objects, *verdict(line, objects, *world.thresholds)) for line, objects in zip(lines, found)]


def first_of_each(suite: Sequence[Task], count: int) -> list[Task]:
    """The first `count` tasks of every category, in order."""
    tagged = {tag: [task for task in suite if task.tag == tag] for tag in TAGS}
    return [task for tasks in tagged.values() for task in tasks[:count]]


# ---- measuring ---------------------------------------------------------------------------------------------

# A picture to be drawn or read, and scored: its prompt's number and GenEval's line, a seed, a file or None.
Job = namedtuple("Job", "index metadata seed file")


def jobs_of(world: World, images_per_prompt: int, seed: int, folder: Path | None = None) -> list[Job]:
    """The pictures of an evaluation, in GenEval's layout if they have a folder."""
    jobs = []
    for index, task in enumerate(world.suite):
        for number in range(images_per_prompt):
            file = folder and folder / f"{index:05d}" / "samples" / f"{number:04d}.png"
            jobs.append(Job(index, geneval_metadata(task), seed * 1_000_003 + len(jobs), file))
    return jobs


def batches(jobs: list[Job], size: int, doing: str) -> tqdm:
    """This rank's share of the jobs in batches, with a progress bar on the first rank."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    jobs = jobs[rank::ranks]
    parts = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    return tqdm(parts, doing, unit="batch", leave=False, disable=None if rank == 0 else True)


def everyones(records: list[dict]) -> list[dict]:
    """All ranks' records."""
    parts = [records]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, records)
    return [record for part in parts for record in part]


@torch.no_grad()
def draw(model, jobs: list[Job], guidance, temperature, batch: int, compiled: bool, doing: str) -> Iterator:
    """Draws this rank's share: batches of jobs with their codes [B, N] and images [B, H, W, 3] uint8."""
    for part in batches(jobs, batch, doing):
        prompts, seeds = [job.metadata["prompt"] for job in part], [job.seed for job in part]
        compile_this = compiled and len(part) == batch  # another size would be compiled anew
        codes = sample_images(model, prompts, seeds, guidance, temperature, compile_this).codes
        yield part, codes, to_uint8(model.to_pixels(codes))


@torch.no_grad()
def evaluate(
    model: UnifiedModel, world: World, guidance: float, temperature: float = 1.0, images_per_prompt: int = 6,
    seed: int = 0, batch: int = 144, compiled: bool = True, progress: str = "scoring",
) -> tuple[dict, list[dict]]:
    """Scores S of the model in the world, and a record of every image (task, pixels, answers, verdict),
    without a file. With several ranks each takes its share of the images and all get S; the records are this
    rank's own."""
    records, jobs = [], jobs_of(world, images_per_prompt, seed)
    for part, codes, images in draw(model, jobs, guidance, temperature, batch, compiled, progress):
        scored = score_images(model, world, part, images, model.image_features(codes))
        records += [{**record, "codes": row} for record, row in zip(scored, codes.cpu().numpy())]
    scores = summarize(everyones([{**record, "image": None, "codes": None} for record in records]))
    if world.pictures:
        asking = replace(world, detect=None, render=None)
        asked = summarize(score_folder(model, asking, world.pictures, batch))["understanding"]
        scores["understanding"] |= {"ground_truth": asked["own_images"],
                                    "ground_truth_by_category": asked["own_images_by_category"]}
    return scores, records


@torch.no_grad()
def score_images(model, world: World, jobs: list[Job], images, image_features: Tensor | None) -> list[dict]:
    """A record of every image [H, W, 3] uint8, of which the model is given the features: what it shows by the
    detector, by the model's own answer, and the model's answer about a true picture of the same task, drawn
    from the seed. None where something is not measured."""
    tasks, nothing = [task_of(job.metadata) for job in jobs], [None] * len(jobs)
    questions = [task.question for task in tasks]
    seen = look(world, images, [job.metadata for job in jobs])
    own = sample_answers(model, image_features, questions).texts if model else nothing
    true = nothing
    if model and world.render:
        pictures = [world.render(task, np.random.default_rng(job.seed)) for task, job in zip(tasks, jobs)]
        true_features = model.image_features(from_uint8(np.stack(pictures), model.device))
        true = sample_answers(model, true_features, questions).texts
    records, keys = [], ("name", "score", "box", "color")
    for job, task, image, (detections, drawn, reason), *answers in zip(jobs, tasks, images, seen, own, true):
        kept = {"file": str(job.file)} if job.file else {"seed": job.seed, "image": image}
        plain = detections and [{key: getattr(detection, key) for key in keys} for detection in detections]
        right = [None if text is None else score(text, task, world.vocabulary) == 1 for text in answers]
        records.append({
            "index": job.index, **kept, "tag": task.tag, "prompt": task.prompt, "question": task.question,
            "known": task.answer, "drawn": drawn, "reason": reason, "detections": plain,
            "answer": answers[0], "answered": right[0],
            "answer_about_true": answers[1], "answered_true": right[1],
        })
    return records


def tally(records: list[dict]) -> dict[str, np.ndarray]:
    """Counts [prompts, 5] of every category: pictures, drawn right, answered right, both, true pictures
    answered right; nan where not measured."""
    counts = {tag: {} for tag in TAGS}
    for record in records:
        verdicts = [record.get(key) for key in ("drawn", "answered", "answered_true")]
        drawn, answered, true = np.array(verdicts, float)  # None becomes nan
        row = counts[record["tag"]].setdefault(record.get("index"), np.zeros(5))
        row += (1, drawn, answered, drawn * answered, true)
    return {tag: np.array([rows[i] for i in sorted(rows)] or [np.zeros(5)]) for tag, rows in counts.items()}


def imbalance(counts: np.ndarray) -> dict[str, np.ndarray]:
    """How often drawing and understanding disagree, from sums [..., 5] of `tally`'s columns."""
    pictures, drawn, answered, both, _ = np.moveaxis(counts, -1, 0)
    return {
        "answered_given_drawn": both / drawn,
        "drawn_given_answered": both / answered,
        "disagreement": (drawn + answered - 2 * both) / pictures,
        "drawn_not_understood": (drawn - both) / pictures,
        "understood_not_drawn": (answered - both) / pictures,
    }


@np.errstate(invalid="ignore", divide="ignore")
def scores_of(counts: dict[str, np.ndarray]) -> dict:
    """The scores S [...] from every category's sums [..., 5] of `tally`'s columns; nan where not measured."""

    def by_tag(column: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        shares = {tag: sums[..., column] / sums[..., 0] for tag, sums in counts.items()}
        values = np.array(list(shares.values()))
        return np.nansum(values, axis=0) / np.sum(~np.isnan(values), axis=0), shares

    (drawn, drawn_by_tag), (own, own_by_tag), (true, true_by_tag) = by_tag(1), by_tag(2), by_tag(4)
    return {
        "generation": {"overall": drawn, **drawn_by_tag},
        "understanding": {"ground_truth": true, "own_images": own,
                          "ground_truth_by_category": true_by_tag, "own_images_by_category": own_by_tag},
        "imbalance": {**imbalance(sum(counts.values())),
                      "by_category": {tag: imbalance(sums) for tag, sums in counts.items()}},
    }


def summarize(records: list[dict]) -> dict:
    """The scores S of a run: generation, understanding and imbalance, each a number in [0, 1] or None."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(part) for name, part in value.items()}
        return None if np.isnan(value) else float(value)

    return plain(scores_of({tag: counts.sum(0) for tag, counts in tally(records).items()}))


def overall(scores: dict) -> dict[str, float]:
    """The scores that are not by category, as "generation overall" and the like."""
    named = {f"{part} {name}": value for part in scores for name, value in scores[part].items()}
    return {name: value for name, value in named.items() if not isinstance(value, dict)}


def table(columns: dict[str, dict]) -> str:
    """Scores side by side, one column for every named S, and the last less the first where there are
    several."""
    lines = [" " * 34 + " ".join(f"{name:>7}" for name in columns) + " change" * (len(columns) > 1)]
    rows = [overall(scores) for scores in columns.values()]
    for name in rows[0]:
        values = [row[name] for row in rows]
        cells = ["      -" if value is None else f"{value:7.3f}" for value in values]
        if len(values) > 1 and None not in (values[0], values[-1]):
            cells.append(f"{values[-1] - values[0]:+.3f}")
        lines.append(f"{name:34}" + " ".join(cells))
    return "\n".join(lines)


def compare(paths: Sequence[str], resamples: int = 10_000) -> str:
    """Two results side by side, and a 95 % confidence interval of the difference: bootstrap over prompts
    within each category, the same prompts for both."""
    suites, records = [], []
    for path in map(Path, paths):
        with user_error(f"{path}: holds no results of evaluate.py"):
            results = json.loads((path / "results.json" if path.is_dir() else path).read_text())
            suites.append(results["conditions"]["suite"])
            records.append(results["images"])
            summarize(results["images"])
    if suites[0] != suites[1]:
        raise UserError(f"{paths[0]} and {paths[1]} are of different suites: {suites[0]} and {suites[1]}")
    lines = table({"A": summarize(records[0]), "B": summarize(records[1])}).split("\n")
    rng, counts = np.random.default_rng(0), [tally(part) for part in records]
    rows = {tag: rng.integers(len(c), size=(resamples, len(c))) for tag, c in counts[0].items()}
    # A category at a time: [resamples, prompts, 5] of a hundred prompts is little, of all of them it is not.
    sums = [{tag: c[rows[tag]].sum(1) for tag, c in part.items()} for part in counts]
    a, b = (overall(scores_of(part)) for part in sums)
    for i, name in enumerate(a, 1):  # line 0 is the heading
        if not np.isnan(b[name] - a[name]).all():
            low, high = np.nanpercentile(b[name] - a[name], (2.5, 97.5))
            lines[i] += f"   {low:+.3f} to {high:+.3f}"
    about = f"A = {paths[0]}, B = {paths[1]}; {resamples} resamples of the prompts of each category"
    return "\n".join([f"{lines[0]}   95 % interval", *lines[1:], about])


# ---- the gap gauge: whether a run fools itself -------------------------------------------------------------

GAP_MARGIN = 0.02  # a smaller fall is no gap, however many pictures show it


def measures(scores: dict) -> dict[str, float | None]:
    """Means over categories: the share of its own pictures about which the model says what the prompt says
    (what training raises), that which the detector calls right, and that of true pictures about which it is
    right."""
    understanding = scores["understanding"]
    return {"self_reward": understanding["own_images"], "detector": scores["generation"]["overall"],
            "true_pictures": understanding["ground_truth"]}


def fell(old: float | None, new: float | None, old_count: int, new_count: int) -> bool:
    """Whether a share of pictures fell by more than GAP_MARGIN and two standard errors of the difference."""
    if old is None or new is None:
        return False
    error = (old * (1 - old) / old_count + new * (1 - new) / new_count) ** 0.5
    return old - new > max(GAP_MARGIN, 2 * error)


class Gauge:
    """Compares with the scores S `before` training, of `images` pictures a prompt. A model that rewards
    itself can learn to say the known answer about any picture: its self-reward holds while another measure
    falls. Where it is `blind`, there is no other, neither a detector nor true pictures."""

    def __init__(self, world: World, before: dict, images: int):
        self.world, self.before, self.images = world, measures(before), images
        self.blind = self.before["detector"] is None and self.before["true_pictures"] is None

    def count(self, images: int) -> dict[str, int]:
        """How many pictures each measure is of, where `images` are drawn a prompt."""
        drawn = images * len(self.world.suite)
        given = sum(len(files) for _, files in self.world.pictures or [])
        return {"self_reward": drawn, "detector": drawn, "true_pictures": given or drawn}

    def read(self, scores: dict, images: int) -> dict:
        """What is logged of scores S of `images` pictures a prompt: the measures, and which of them parted:
        fell while the self-reward did not."""
        now, counts, first = measures(scores), self.count(images), self.count(self.images)
        fallen = [key for key in now if fell(self.before[key], now[key], first[key], counts[key])]
        parted = [] if "self_reward" in fallen else [key.replace("_", " ") for key in fallen]
        by_category = scores["understanding"]["ground_truth_by_category"]
        return {**now, "parted": parted, "true_pictures_by_category": by_category}

    def warning(self, reading: dict) -> str:
        """What a user should know of a reading; empty where all is well."""
        whose = {"detector": "the detector's score", "true pictures": "understanding of true pictures"}
        change = lambda key: f"({self.before[key]:.2f} -> {reading[key]:.2f})"
        parts = []
        for name in reading["parted"]:
            key = name.replace(" ", "_")
            parts.append(f"{whose[name]} fell {self.before[key] - reading[key]:.2f} {change(key)}")
        held = f"possible reward hacking: self-reward held {change('self_reward')} while "
        return held + " and ".join(parts) if parts else ""

    def text(self, reading: dict) -> str:
        """A reading in a progress bar's words."""
        known = [key for key in self.before if reading[key] is not None]
        words = ", ".join(f"{key.replace('_', ' ')} {reading[key]:.2f}" for key in known)
        return f"held-out: {words}{' (possible reward hacking)' * bool(reading['parted'])}"


def curves(run_folder: Path, path: Path, width: int = 640, height: int = 320) -> None:
    """A picture of a run against its steps: the reward on training prompts (mean of five steps), the measures
    of the gauge where there are any, and a red line where they had parted."""
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    summary = read_json(run_folder / "summary.json")
    end, rewards = summary["steps"], [line["reward"] for line in steps]
    means = [np.mean(rewards[max(i - 4, 0) : i + 1]) for i in range(len(rewards))]
    lines = {"training reward": [(line["step"], mean) for line, mean in zip(steps, means)]}
    if summary["before"] and summary["after"]:
        before, after = measures(summary["before"]), measures(summary["after"])
        for key in before:
            held_out = [(line["step"], line["held_out"][key]) for line in steps if "held_out" in line]
            lines[key.replace("_", " ")] = [(0, before[key]), *held_out, (end, after[key])]
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    place = lambda step, value: (36 + (width - 48) * step / end, height - 24 - (height - 48) * value)
    for level in (0, 0.2, 0.4, 0.6, 0.8, 1):
        pen.line([place(0, level), place(end, level)], "#dddddd")
        pen.text((8, place(0, level)[1] - 6), f"{level:.1f}", "black")
    for step in (line["step"] for line in steps if line.get("held_out", {}).get("parted")):
        pen.line([place(step, 0), place(step, 1)], "#d03030")
        pen.text((520, 4), "parted", "#d03030")
    for i, (color, name) in enumerate(zip(("#c9c9c9", "#d9822b", "#2b6cd9", "#3a9d5d"), lines)):
        if None not in dict(lines[name]).values():
            pen.line([place(*point) for point in lines[name]], color, 2)
            pen.text((40 + 120 * i, 4), name, color)
    pen.text((width - 90, height - 16), f"{end} steps", "black")
    picture.save(path)


# ---- pictures in files -------------------------------------------------------------------------------------


DAMAGED = "cannot be read; delete it and draw it again"


def write_suite(path: Path, suite: Sequence[Task]) -> None:
    """The suite as JSON lines; GenEval's own, to the byte, for its 553 prompts."""
    with user_error(f"{path}: cannot be written"):
        write_whole(path, "".join(json.dumps(geneval_metadata(task)) + "\n" for task in suite))


def draw_folder(model, world: World, folder: Path, conditions: dict, batch: int, compiled: bool) -> None:
    """Draws what a folder still lacks of the suite's pictures, each written whole or not at all.
    `conditions`: model, prompts, images_per_prompt, guidance, temperature, draw_steps, seed; to mix them
    raises UserError."""
    each, note = conditions["images_per_prompt"], folder / "conditions.json"
    jobs = jobs_of(world, each, conditions["seed"], folder)

    def begin() -> list[Job]:
        if note.exists() and read_json(note) != conditions:
            raise UserError(f"{note}: the pictures were drawn under other conditions: give another --out")
        for job in jobs[::each]:
            job.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(job.file.parents[1] / "metadata.jsonl", json.dumps(job.metadata) + "\n")
        write_json(note, conditions)
        return [job for job in jobs if not job.file.exists()]

    missing, settings = agree(begin), (conditions["guidance"], conditions["temperature"])
    for part, _, images in draw(model, missing, *settings, batch, compiled, "drawing"):
        for job, image in zip(part, images):
            partial = job.file.with_suffix(".partial")
            Image.fromarray(image).save(partial, "PNG")
            partial.replace(job.file)
    everyones([])  # waits for the other ranks


def open_picture(file: str | Path) -> Image.Image:
    """A picture in RGB, the right way up. Raises UserError where it is damaged."""
    with user_error(f"{file}: {DAMAGED}"):
        return upright(file)


def read_folder(folder: Path) -> list[tuple[dict, list[Path]]]:
    """A line of metadata and its pictures for every prompt of a folder in GenEval's layout. Raises UserError
    where it is in another, a line is not GenEval's, or pictures are missing."""
    prompts, pictures = sorted(path for path in folder.glob("*") if path.name.isdigit()), []
    for prompt in prompts:
        with user_error(f"{prompt}/metadata.jsonl: not a line of GenEval's metadata"):
            line = json.loads((prompt / "metadata.jsonl").read_text())
            task_of(line)
        files = sorted(file for file in (prompt / "samples").glob("*.png") if file.stem.isdigit())
        for file in files:
            with user_error(f"{file}: {DAMAGED}"):
                Image.open(file).verify()  # checksums alone: a quick look, before hours of scoring
        pictures.append((line, files))
    each = max((len(files) for _, files in pictures), default=0)
    if not each:
        raise UserError(f"{folder}: has no pictures in GenEval's layout (00000/samples/0000.png)")
    count = each * (int(prompts[-1].name) + 1)
    missing = count - sum(len(files) for _, files in pictures)
    if missing:
        raise UserError(f"{folder}: interrupted, {missing} of {count} pictures are missing, {each} a prompt: "
                        "draw them first (the call that drew the others goes on where it stopped)")
    return pictures


@torch.no_grad()
def score_folder(model: UnifiedModel | None, world: World, pictures: list, batch: int) -> list[dict]:
    """A record of every picture, of all ranks' shares; they are read a batch at a time and not kept."""
    jobs, records, image_features = [], [], None
    for index, (line, files) in enumerate(pictures):
        jobs += [Job(index, line, len(jobs) + number, file) for number, file in enumerate(files)]
    for part in batches(jobs, batch, "scoring"):
        opened = [open_picture(job.file) for job in part]
        images = [np.asarray(image) for image in opened]
        if model:
            pixels = torch.cat([model.preprocess(image) for image in opened])  # [B, 3, H, W]
            image_features = model.image_features(pixels.to(model.device))
        records += score_images(model, world, part, images, image_features)
    return everyones(records)


def picture(record: dict, side: int) -> np.ndarray:
    """A record's picture [side, side, 3] uint8 with the detector's boxes, in a frame that is green where the
    detector calls it right and red where not."""
    image = Image.fromarray(record["image"]) if "image" in record else open_picture(record["file"])
    scale = side / max(image.size)
    image = ImageOps.pad(image, (side, side), Image.NEAREST if scale > 1 else Image.LANCZOS, "white", (0, 0))
    pen = ImageDraw.Draw(image)
    for detection in record["detections"] or []:
        left, top, right, bottom = (edge * scale for edge in detection["box"])
        pen.rectangle((left, top, right - 1, bottom - 1), outline="#00c8ff")
    color = {True: "#2e9e4f", False: "#d03030", None: "#999999"}[record["drawn"]]
    pen.rectangle((0, 0, side - 1, side - 1), outline=color, width=3)
    return np.asarray(image)


def report(records: list[dict], path: Path, columns: int = 12, side: int = 168) -> None:
    """A contact sheet, a row of `columns` pictures a category, the worst first and evenly chosen from there
    to the best: prompt, verdict and its reason, the model's answer."""
    cells = []
    for tag in TAGS:
        tagged = [record for record in records if record["tag"] == tag]
        tagged.sort(key=lambda record: (bool(record["drawn"]), bool(record["answered"])))
        for i in np.linspace(0, len(tagged) - 1, min(columns, len(tagged))).round().astype(int):
            record = tagged[i]
            lines = [f"{tag}: {record['prompt'].removeprefix('a photo of ')}"]
            drawn = {True: "RIGHT", False: "WRONG: ", None: "not judged"}[record["drawn"]]
            lines.append(drawn + record["reason"].removeprefix("expected "))
            if record["answer"] is not None:
                lines.append(f"says {'RIGHT' if record['answered'] else 'WRONG'}: {record['answer']}")
            cells.append((picture(record, side), "\n".join(lines)))
        blank = np.full((side, side, 3), 255, np.uint8)
        cells += [(blank, "")] * (-len(cells) % columns)  # a category begins a row
    images, captions = zip(*cells)
    contact_sheet(np.stack(images), captions, path, columns)


# ---- the detector: Mask2Former's objects, CLIP's colors ----------------------------------------------------
# After mmdetection 2's instance head (maskformer_fusion_head.py) and CLIP_benchmark's zero-shot classifier.

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
SHORT, LONG = 800, 1333  # pixels of the input's shorter side; of its longer one, at most
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_DETECTIONS = 100  # of an image, over queries and classes
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COLOR_PROMPTS = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


def instances(class_logits: Tensor, mask_logits: Tensor, padded, resized, size) -> list[Detection]:
    """The objects of one image with a confidence above THRESHOLD, from Mask2Former's class logits [Q, C + 1]
    (the last: no object) and mask logits [Q, h, w]; (height, width) of its input with and without padding,
    and of the image. The MAX_DETECTIONS likeliest of queries x classes; confidence = that probability x the
    mean mask probability inside the binary mask; box = the mask's extent."""
    classes = class_logits.shape[-1] - 1
    likely = class_logits.float().softmax(-1)[:, :-1].flatten()  # [Q * C]
    likely, chosen = likely.topk(min(MAX_DETECTIONS, len(likely)))
    likely, chosen = likely[likely > THRESHOLD], chosen[likely > THRESHOLD]  # the mean is at most one
    masks = F.interpolate(mask_logits[chosen // classes, None].float(), padded, mode="bilinear")
    masks = F.interpolate(masks[..., : resized[0], : resized[1]], size, mode="bilinear")[:, 0]  # [K, H, W]
    binary = masks > 0
    inside = (masks.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    found, confidences = [], (likely * inside).tolist()
    for confidence, label, mask in zip(confidences, (chosen % classes).tolist(), binary.cpu().numpy()):
        if confidence > THRESHOLD:
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            box = float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
            found.append(Detection(GENEVAL.objects[label], confidence, box, mask))
    return found


class Detector:
    """Mask2Former and CLIP: pictures -> detections, with colors where the prompt asks for one."""

    def __init__(self, segmenter, clip, tokenizer):
        self.segmenter, self.clip, self.tokenizer = segmenter.eval(), clip.eval(), tokenizer

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], metadata: Sequence[dict]) -> list[list[Detection]]:
        """What is on each image [H, W, 3] uint8, asked for by the line of metadata of the same index."""
        found = [self.segment(image) for image in images]
        for image, line, detections in zip(images, metadata, found):
            objects = confident(line, detections, THRESHOLD, COUNTING_THRESHOLD)
            for fact in (fact for fact in line["include"] if "color" in fact):
                for detection in objects.get(fact["class"], [])[: fact["count"]]:
                    detection.color = self.color_of(image, detection)
        return found

    def segment(self, image: np.ndarray) -> list[Detection]:
        """Detections without color in an image [H, W, 3] uint8."""
        size = height, width = image.shape[:2]
        scale = min(LONG / max(size), SHORT / min(size))
        resized = int(height * scale + 0.5), int(width * scale + 0.5)
        padded = tuple(-(-side // 32) * 32 for side in resized)
        if scale >= 1:
            image = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.BILINEAR))
        x = torch.tensor(image, device=self.segmenter.device).permute(2, 0, 1)[None].float()
        if scale < 1:  # without antialiasing, as OpenCV does it; Pillow would smooth
            x = F.interpolate(x, resized, mode="bilinear").round()
        x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
        x = F.pad(x, (0, padded[1] - resized[1], 0, padded[0] - resized[0]))  # [1, 3, H', W']
        out = self.segmenter(pixel_values=x)
        return instances(out.class_queries_logits[0], out.masks_queries_logits[0], padded, resized, size)

    def color_of(self, image: np.ndarray, detection: Detection) -> str:
        """The color word whose embedding is closest to that of the object's crop, gray outside its mask."""
        visible = Image.fromarray(np.where(detection.mask[..., None], image, np.uint8(0x99)))
        pixels = self.clip_pixels(visible.crop(detection.box)).to(self.clip.device)
        feature = self.clip.get_image_features(pixels[None]).pooler_output[0]
        return GENEVAL.colors[(self.color_classifier(detection.name) @ feature).argmax().item()]

    def clip_pixels(self, image: Image.Image) -> Tensor:
        """A picture [3, side, side] as open_clip gives it to CLIP: the shorter side resized, the centre cut
        out (halves of a pixel rounded to even)."""
        side, short = self.clip.config.vision_config.image_size, min(image.size)
        size = tuple(side * edge // short for edge in image.size)
        left, top = (round((edge - side) / 2) for edge in size)
        cut = image.resize(size, Image.BICUBIC).crop((left, top, left + side, top + side))
        pixels = (np.asarray(cut, np.float32) / 255 - CLIP_MEAN) / CLIP_STD
        return torch.from_numpy(pixels).float().permute(2, 0, 1)

    @cache
    def color_classifier(self, name: str) -> Tensor:
        """A unit vector for every color [10, D]: the mean of the normalised embeddings of its
        COLOR_PROMPTS."""
        texts = [prompt.format(color, name) for color in GENEVAL.colors for prompt in COLOR_PROMPTS]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.clip.device)
        vectors = F.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)  # [30, D]
        return F.normalize(vectors.unflatten(0, (-1, len(COLOR_PROMPTS))).mean(1), dim=-1)


def load_detector(
    detector: str = DETECTOR, clip: str = CLIP, device: str | torch.device = "cpu",
    flags: tuple[str, str] = ("--detector", "--clip"),
) -> Detector:
    """The detector from two folders or hub ids, which the user gave by these flags. Raises UserError where
    one is not at hand (saying what to download), not of its kind, or lacks a tensor."""
    transformers.utils.logging.disable_progress_bar()  # two more bars, of a second each
    segmenter = read_pretrained(transformers.Mask2FormerForUniversalSegmentation, detector, flags[0])
    names = segmenter.config.id2label
    # The published labels spell some classes otherwise ("aeroplane"): a few tell the order.
    same = (names[i] in (GENEVAL.objects[i], f"LABEL_{i}") for i in (0, 5, 22, 53, 79))
    if len(names) != len(GENEVAL.objects) or not all(same):
        raise UserError(f"{flags[0]} {detector}: knows {len(names)} classes, which are not COCO's 80")
    encoder = read_pretrained(transformers.CLIPModel, clip, flags[1]).to(device)
    tokenizer = read_pretrained(transformers.CLIPTokenizer, clip, flags[1])
    return Detector(segmenter.to(device), encoder, tokenizer)


def read_pretrained(kind: type, name: str, flag: str):
    """What a class of transformers reads from a folder or hub id, every tensor of it there."""
    with user_error(f"{flag} {name}: is no {kind.__name__}; without the hub, give {flag} FOLDER"):
        if kind is transformers.CLIPTokenizer:
            return kind.from_pretrained(name)
        model, info = kind.from_pretrained(name, output_loading_info=True, use_safetensors=True)
    lacking = [key for key in sorted(info["missing_keys"]) if not key.startswith("criterion.")]  # of the loss
    if lacking:
        raise UserError(f"{flag} {name}: tensor {lacking[0]} is missing")
    return model


# ---- the command line --------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The command line; exits with 2 and a line on what is wrong with it."""
    about = "score a model, or a folder of pictures"
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, formatter_class=ShortHelp)
    add = parser.add_argument
    add("--model", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny; with --images none)")
    add("--out", default="results", help="folder for images/, results.json and report.png (default: results)")
    add("--images", metavar="FOLDER", help="score these pictures, in GenEval's layout, instead of drawing")
    add("--images-per-prompt", type=positive(int), help="default: 6 (tiny), 4 (others)")
    add("--seed", type=non_negative(int), default=0)
    add("--guidance", type=non_negative(float), help="default: the checkpoint's")
    add("--temperature", type=positive(float), default=1.0)
    add("--draw-steps", type=positive(int), help="of mask-predict, Show-o's (default: the checkpoint's)")
    add("--batch", type=positive(int), help="images at once (default: 144 on tiny, 16 on others)")
    add("--no-compile", action="store_true", help="never compile the sampler, as is done for many images")
    add("--detector", default=DETECTOR, help=f"folder, hub id, none: only draw and ask; default: {DETECTOR}")
    add("--clip", default=CLIP, help=f"what names colors: a folder or hub id (default: {CLIP})")
    add("--write-suite", metavar="FILE", help="write GenEval's 553 prompts with their metadata, and stop")
    add("--compare", nargs=2, metavar=("A", "B"), help="two results: differences and confidence, and stop")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.write_suite:
        write_suite(Path(args.write_suite), geneval_suite())
        return print(f"written: {args.write_suite}; next: draw its pictures, score them with --images FOLDER")
    if args.compare:
        return print(compare(args.compare))
    rank, _, device = start_ranks(86_400)  # of a folder begun before, one rank may have hours more to draw
    out, model = Path(args.out), None
    with user_error(f"{out}: cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
    pictures = read_folder(Path(args.images)) if args.images else []
    if args.model or not args.images:
        args.model = args.model or "tiny"
        model = load(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        use_draw_steps(model, args.draw_steps)
    of_shapes = model is None and asked_for(pictures) <= set(shapes.GLYPHS)
    world = shapes_world() if of_shapes else world_of(model, "test")
    refuse_unknown(world, pictures, f"--images {args.images}")
    if args.detector != "none" and not world.detect:
        world.detect = load_detector(args.detector, args.clip, device)
    small = world.name == "shapes"
    folder, batch = Path(args.images or out / "images"), args.batch or (144 if small else 16)
    if not pictures:
        conditions = {
            "model": args.model, "prompts": len(world.suite),
            "images_per_prompt": args.images_per_prompt or (6 if small else 4),
            "guidance": model.guidance if args.guidance is None else args.guidance,
            "temperature": args.temperature, "draw_steps": model.draw_steps, "seed": args.seed,
        }
        count = len(world.suite) * conditions["images_per_prompt"]
        compiled = not args.no_compile and compiling_pays(model, count)
        if rank == 0 and compiled:
            print(COMPILING, flush=True)
        draw_folder(model, world, folder, conditions, batch, compiled)
        pictures = read_folder(folder)
    note = folder / "conditions.json"
    known = read_json(note) if note.exists() else {}
    records = score_folder(model, world, pictures, batch)
    if rank == 0:
        finish(args, world, folder, known, pictures, records)
    if dist.is_initialized():
        dist.destroy_process_group()


def versions() -> dict[str, str]:
    """What a result was made with."""
    machine = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__, "machine": machine}


def finish(args, world: World, folder: Path, known: dict, pictures: list, records: list[dict]) -> None:
    """results.json, report.png and the table, with what is known of how the pictures were drawn. Raises
    UserError after that where the detector found nothing on most pictures: then it is no measure."""
    out, learned = Path(args.out), isinstance(world.detect, Detector)
    empty = float(np.mean([not record["detections"] for record in records])) if world.detect else None
    broken = learned and empty > 0.5
    if broken:
        records = [{**record, "drawn": None, "reason": "detector broken"} for record in records]
    digest = hashlib.sha256("".join(json.dumps(line) + "\n" for line, _ in pictures).encode()).hexdigest()
    scorer = f"{args.detector}, {args.clip}" if learned else world.detect and "the shapes world's detector"
    conditions = {
        "model": args.model, "images": str(folder),
        **{key: known.get(key) for key in ("guidance", "temperature", "draw_steps", "seed")},
        "images_per_prompt": max(len(files) for _, files in pictures), "scorer": scorer,
        "suite": {"name": world.name, "prompts": len(pictures), "sha256": digest},
        "nothing_found": empty, "versions": versions(),
    }
    scores = summarize(records)
    write_json(out / "results.json", {"scores": scores, "conditions": conditions, "images": records})
    report(records, out / "report.png")
    print(table({(args.model or folder.name)[-7:]: scores}))
    print(", ".join(f"{key} {value}" for key, value in conditions.items() if not isinstance(value, dict)))
    print(f"{len(records)} pictures of {len(pictures)} prompts ({world.name}); written: {out}/results.json")
    if broken:
        raise UserError(f"the detector found nothing with a confidence above {THRESHOLD} on {empty:.0%} of "
                        "the pictures: it is broken, or they are; generation is null in results.json, not 0")
    print(f"look at {out}/report.png; then compare with another: python evaluate.py --compare {out} OTHER")


if __name__ == "__main__":
    run(main)
