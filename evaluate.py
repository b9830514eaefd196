"""How well a model draws, how well it understands, and how often the two disagree.

    python evaluate.py --model tiny --out results                 # draws the suite, scores it, asks about it
    torchrun --nproc_per_node 8 evaluate.py --model janus --detector FOLDER --clip FOLDER
    python evaluate.py --images FOLDER                            # scores pictures that anybody drew
    python evaluate.py --images FOLDER --model janus              # and asks a model about them
    python evaluate.py --write-suite evaluation_metadata.jsonl    # GenEval's 553 prompts
    python evaluate.py --compare before/results.json after/results.json

- Generation: pictures for the suite's prompts, judged by GenEval's rules on a detector's output (geneval.py). `overall`
  is the mean of the six categories' shares of right pictures.
- Understanding: the suite's questions about true pictures (in the tiny world, which can draw them) and about the
  model's own, or the folder's; an answer is right when it states all the facts of its prompt and contradicts none
  (`reward.score`, exact). Answers are greedy.
- Imbalance, over the same pictures, by category and over all: `answered_given_drawn`, the share answered right of those
  that the detector calls right; `drawn_given_answered`, the share that the detector calls right of those answered
  right; `disagreement`, the share on which the two differ, and its two parts `drawn_not_understood` and
  `understood_not_drawn`. The paper's released scripts (inference_cycle.py, inference_mmu_t2i.py) compute the first with
  a language model as the judge of answers, and for the second draw a fresh picture of a prompt answered right; here all
  are of one picture.

Pictures lie in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png, ...), so that the official scorer runs
on them unchanged; an interrupted call goes on where it stopped. The tiny checkpoints are scored in their shapes world:
held-out prompts, its renderer's true pictures, its detector. Into --out go images/, report.png and results.json:

    scores        generation, understanding, imbalance: numbers in [0, 1], or null where something was not measured
    conditions    model, images (the folder), suite (name, prompts, sha256 of its lines), guidance, temperature,
                  draw_steps (a Show-o's, else null), images_per_prompt, seed, scorer, nothing_found (share of pictures
                  without a detection), versions
    images        a record a picture: index (of its prompt), file, tag, prompt, question, known, drawn, reason,
                  detections (name, score, box, color), answer, answered, answer_about_true, answered_true
"""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from checkpoint import NAMES, load
from geneval import CLIP, COUNTING_THRESHOLD, DETECTOR, THRESHOLD, Detection, Detector, judge, load_detector
from model import UnifiedModel, UserError
from reward import REAL, TAGS, Task, Vocabulary, geneval_metadata, geneval_suite, score, task_of
from sample import (
    COMPILING, ShortHelp, contact_sheet, non_negative, positive, read_image, run, sample_answers, sample_images,
    start_ranks, to_pixels, to_uint8, use_draw_steps,
)
from tiny import world as shapes

# ---------------------------------------------------------------------------------------------------------------------
# The world that a model is scored in


@dataclass
class World:
    """Where prompts come from, what judges pictures, and where true ones come from (drawn by `render`, or the user's
    `pictures`, as `read_folder` gives them); None where there is no such thing."""

    name: str
    vocabulary: Vocabulary
    suite: list[Task]
    detect: Callable[[Sequence[np.ndarray], Sequence[dict]], list[list[Detection]]] | None = None
    render: Callable[[Task, np.random.Generator], np.ndarray] | None = None
    pictures: list[tuple[dict, list[Path]]] | None = None
    threshold: float = THRESHOLD
    counting_threshold: float = COUNTING_THRESHOLD


def shapes_world() -> World:
    """The tiny checkpoints': held-out prompts, a renderer, a detector that never learned anything."""

    def detect(images: Sequence[np.ndarray], metadata: Sequence[dict]) -> list[list[Detection]]:
        return [[Detection(**fields) for fields in found] for found in shapes.detect(np.stack(images))]

    suite, least = shapes.held_out_tasks(), shapes.MIN_OVERLAP
    return World("shapes", shapes.VOCABULARY, suite, detect, shapes.render, None, least, least)


def world_of(model: UnifiedModel) -> World:
    """The shapes world for a checkpoint that says it lives there, GenEval's for any other."""
    shapes_only = getattr(model.config, "world", None) == "shapes"
    return shapes_world() if shapes_only else World("geneval", REAL, geneval_suite())


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def evaluate(
    model: UnifiedModel, world: World, guidance: float, temperature: float = 1.0, images_per_prompt: int = 6, seed: int = 0,
    batch: int = 144, compiled: bool = True, progress: str = "scoring",
) -> tuple[dict, list[dict]]:
    """Scores of the model in the world, and a record for every image (task, pixels, answers, verdicts), without a file.
    With several ranks each takes its share of the images and all get the scores; the records are this rank's own."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    records = []
    jobs = jobs_of(world, images_per_prompt, seed)[rank::ranks]
    bar = tqdm(range(0, len(jobs), batch), progress, unit="batch", leave=False, disable=None if rank == 0 else True)
    for start in bar:
        part = jobs[start : start + batch]
        seen = model.see(draw(model, world, part, guidance, temperature, compiled and len(part) == batch))
        lines = [geneval_metadata(world.suite[index]) for index, _, _ in part]
        scored = score_images(model, world, lines, to_uint8(model.show(seen)), seen, [s for _, _, s in part])
        records += [{"index": index, **record} for (index, _, _), record in zip(part, scored)]
    scores = summarize(everyones([{k: v for k, v in record.items() if k != "image"} for record in records]))
    if world.pictures:  # to nothing but understanding
        asked = summarize(score_folder(model, replace(world, detect=None), world.pictures, batch))["understanding"]
        scores["understanding"] |= {key.replace("own_images", "ground_truth"): asked[key]
                                    for key in ("own_images", "own_images_by_category")}
    return scores, records


def everyones(records: list[dict]) -> list[dict]:
    """All ranks' records."""
    parts = [records]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, records)
    return [record for part in parts for record in part]


def jobs_of(world: World, images_per_prompt: int, seed: int) -> list[tuple[int, int, int]]:
    """(index of the prompt, number of the image, its seed) for every image of an evaluation."""
    pairs = [(index, number) for index in range(len(world.suite)) for number in range(images_per_prompt)]
    return [(*pair, seed * 1_000_003 + i) for i, pair in enumerate(pairs)]


@torch.no_grad()
def draw(
    model: UnifiedModel, world: World, jobs: list[tuple[int, int, int]], guidance: float, temperature: float,
    compiled: bool,
) -> torch.Tensor:
    """The jobs' codes [B, N]."""
    prompts, seeds = [world.suite[index].prompt for index, _, _ in jobs], [s for _, _, s in jobs]
    return sample_images(model, prompts, seeds, guidance, temperature, compiled).codes


@torch.no_grad()
def score_images(
    model: UnifiedModel | None, world: World, metadata: Sequence[dict], images: Sequence[np.ndarray],
    seen: torch.Tensor | None, seeds: Sequence[int],
) -> list[dict]:
    """A record for every image [H, W, 3] uint8 (for the model as pixels or as what `see` gave): what it shows by the
    detector, by the model's own answer, and the model's answer about a true picture of the same task, drawn from the
    seed."""
    tasks = [task_of(line) for line in metadata]
    questions = [task.question for task in tasks]
    nothing = [None] * len(tasks)
    verdicts, found, own, true = [(None, "")] * len(tasks), nothing, nothing, nothing
    if world.detect:
        found = world.detect(images, metadata)
        verdicts = [judge(m, d, world.threshold, world.counting_threshold) for m, d in zip(metadata, found)]
    if model is not None:
        own = sample_answers(model, seen, questions).texts
    if model is not None and world.render:
        pictures = np.stack([world.render(task, np.random.default_rng(s)) for task, s in zip(tasks, seeds)])
        true = sample_answers(model, to_pixels(pictures, model.device), questions).texts

    def right(answer: str | None, task: Task) -> bool | None:
        return None if answer is None else score(answer, task, world.vocabulary) == 1

    def plain(detections: list[Detection] | None) -> list[dict] | None:
        return None if detections is None else [
            {"name": d.name, "score": d.score, "box": d.box, "color": d.color} for d in detections
        ]

    return [
        {
            "tag": task.tag, "prompt": task.prompt, "question": task.question, "known": task.answer, "seed": seeds[i],
            "image": images[i], "drawn": verdicts[i][0], "reason": verdicts[i][1], "detections": plain(found[i]),
            "answer": own[i], "answered": right(own[i], task),
            "answer_about_true": true[i], "answered_true": right(true[i], task),
        }
        for i, task in enumerate(tasks)
    ]


def share(values: Sequence[bool | None]) -> float | None:
    """Mean of booleans; None where there are none or they were not measured."""
    return None if not len(values) or values[0] is None else float(np.mean(values))


def imbalance(records: list[dict]) -> dict[str, float | None]:
    """How often drawing and understanding disagree; None where one of them was not measured."""
    measured = bool(records) and None not in (records[0]["drawn"], records[0]["answered"])
    pairs = [(r["drawn"], r["answered"]) for r in records] if measured else []
    return {
        "answered_given_drawn": share([answered for drawn, answered in pairs if drawn]),
        "drawn_given_answered": share([drawn for drawn, answered in pairs if answered]),
        "disagreement": share([drawn != answered for drawn, answered in pairs]),
        "drawn_not_understood": share([drawn and not answered for drawn, answered in pairs]),
        "understood_not_drawn": share([answered and not drawn for drawn, answered in pairs]),
    }


def summarize(records: list[dict]) -> dict:
    """The scores S of a run: generation, understanding and imbalance, each a number in [0, 1] or None."""
    tagged = {tag: [r for r in records if r["tag"] == tag] for tag in TAGS}

    def by_tag(key: str) -> dict:
        tags = {tag: share([r[key] for r in part]) for tag, part in tagged.items()}
        known = [v for v in tags.values() if v is not None]
        return {"overall": float(np.mean(known)) if known else None, **tags}

    true, own = by_tag("answered_true"), by_tag("answered")
    return {
        "generation": by_tag("drawn"),
        "understanding": {"ground_truth": true.pop("overall"), "own_images": own.pop("overall"),
                          "ground_truth_by_category": true, "own_images_by_category": own},
        "imbalance": {**imbalance(records), "by_category": {tag: imbalance(part) for tag, part in tagged.items()}},
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


# ---------------------------------------------------------------------------------------------------------------------
# GenEval's folder of pictures


def write_suite(path: Path, suite: Sequence[Task]) -> None:
    """The suite as JSON lines; GenEval's own, to the byte, for its 553 prompts."""
    write_whole(path, "".join(json.dumps(geneval_metadata(task)) + "\n" for task in suite))


def draw_folder(
    model: UnifiedModel, world: World, folder: Path, images_per_prompt: int, guidance: float, temperature: float, seed: int,
    batch: int, compiled: bool, name: str,
) -> None:
    """Draws what is still missing of the suite's pictures, this rank's share of them, each written whole or not at all.
    Refuses a folder that was begun under other conditions."""
    conditions = {"model": name, "prompts": len(world.suite), "images_per_prompt": images_per_prompt,
                  "guidance": guidance, "temperature": temperature, "draw_steps": model.steps, "seed": seed}
    kept = folder / "conditions.json"
    if kept.exists() and read_conditions(folder) != conditions:
        raise UserError(f"{folder}: holds pictures drawn under other conditions ({kept}): give another --out")
    for index, task in enumerate(world.suite):
        (folder / f"{index:05d}" / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{index:05d}" / "metadata.jsonl", json.dumps(geneval_metadata(task)) + "\n")
    write_json(kept, conditions)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = lambda index, number: folder / f"{index:05d}" / "samples" / f"{number:04d}.png"
    jobs = [job for job in jobs_of(world, images_per_prompt, seed)[rank::ranks] if not place(*job[:2]).exists()]
    bar = tqdm(total=len(jobs), desc="drawing", unit="image", disable=None if rank == 0 else True)
    for start in range(0, len(jobs), batch):
        part = jobs[start : start + batch]
        codes = draw(model, world, part, guidance, temperature, compiled and len(part) == batch)
        for (index, number, _), image in zip(part, to_uint8(model.to_pixels(codes))):
            path = place(index, number)
            Image.fromarray(image).save(path.with_suffix(f".partial{rank}"), "PNG")
            os.replace(path.with_suffix(f".partial{rank}"), path)
        bar.update(len(part))
    if dist.is_initialized():
        dist.barrier()


def read_conditions(folder: Path) -> dict:
    """What draw_folder noted of a folder's pictures; nothing for anybody else's."""
    path = folder / "conditions.json"
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UserError(f"{path}: damaged; delete it if the pictures are not evaluate.py's")
    return known


def read_folder(folder: Path) -> list[tuple[dict, list[Path]]]:
    """A line of metadata and its pictures for every prompt of a folder in GenEval's layout.

    Raises:
        UserError: where it is in another layout, a line is not GenEval's (file and line), a picture is damaged, or some
            are missing.
    """
    prompts = sorted(path for path in folder.glob("*") if path.is_dir() and path.name.isdigit())
    if not prompts:
        raise UserError(f"{folder}: is not in GenEval's layout (00000/metadata.jsonl, 00000/samples/0000.png)")
    pictures = []
    for prompt in tqdm(prompts, "checking", unit="prompt", leave=False, disable=None):
        path = prompt / "metadata.jsonl"
        try:
            line = json.loads(path.read_text())
            task_of(line)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path}:{getattr(error, 'lineno', 1)}: not a line of GenEval's metadata ({error})") from None
        files = sorted(file for file in (prompt / "samples").glob("*.png") if re.fullmatch(r"\d+\.png", file.name))
        for file in files:
            try:
                with Image.open(file) as image:
                    image.load()
            except (OSError, SyntaxError) as error:
                raise UserError(f"{file}: cannot be read ({error}); delete it and draw it again") from None
        pictures.append((line, files))
    known, suite = read_conditions(folder), geneval_suite()
    each = known.get("images_per_prompt", max(len(files) for _, files in pictures))
    if not each:
        raise UserError(f"{folder}: has no pictures (00000/samples/0000.png)")
    begun = len(pictures) >= 80 and all(a[0] == geneval_metadata(b) for a, b in zip(pictures, suite))
    count = known.get("prompts", max(int(prompts[-1].name) + 1, len(suite) if begun else 0))
    missing = count * each - sum(min(len(files), each) for _, files in pictures)
    if missing > 0:
        raise UserError(f"{folder}: interrupted: {missing} of {count * each} pictures are missing ({count} prompts, "
                        f"{each} each); draw the rest first (the call that drew these goes on where it stopped)")
    return pictures


def score_folder(model: UnifiedModel | None, world: World, pictures: list[tuple[dict, list[Path]]], batch: int) -> list[dict]:
    """A record a picture, this rank's share of them; pictures are read a batch at a time and not kept."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    jobs = [(index, line, file) for index, (line, files) in enumerate(pictures) for file in files]
    jobs = [(seed, *job) for seed, job in enumerate(jobs)][rank::ranks]
    records = []
    bar = tqdm(total=len(jobs), desc="scoring", unit="image", leave=False, disable=None if rank == 0 else True)
    for start in range(0, len(jobs), batch):
        seeds, indices, lines, files = zip(*jobs[start : start + batch])
        images = [np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) for file in files]
        pixels = None if model is None else torch.cat([read_image(model, str(file)) for file in files])
        for index, file, record in zip(indices, files, score_images(model, world, lines, images, pixels, seeds)):
            del record["image"], record["seed"]
            records.append({"index": index, "file": str(file), **record})
        bar.update(len(files))
    return everyones(records)


# ---------------------------------------------------------------------------------------------------------------------
# Something to look at


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames, so that the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.partial{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def versions() -> dict[str, str]:
    """What a result was made with."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "numpy": np.__version__, "machine": f"{platform.system()} {platform.machine()}"}


def write_json(path: Path, content: dict | list) -> None:
    """The content as a JSON file."""
    write_whole(path, json.dumps(content, indent=1))


def picture(record: dict, side: int) -> np.ndarray:
    """A record's picture [side, side, 3] uint8 with the detector's boxes, in a frame that is green where the detector
    calls it right and red where not."""
    file = None if "image" in record else ImageOps.exif_transpose(Image.open(record["file"]))
    image = file.convert("RGB") if file else Image.fromarray(record["image"])
    scale = side / max(image.size)
    method = Image.NEAREST if scale > 1 else Image.LANCZOS
    image = image.resize((round(image.width * scale), round(image.height * scale)), method)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image)
    pen = ImageDraw.Draw(canvas)
    for detection in record["detections"] or []:
        left, top, right, bottom = (edge * scale for edge in detection["box"])
        pen.rectangle((left, top, right - 1, bottom - 1), outline="#00c8ff")
    frame = {True: "#2e9e4f", False: "#d03030", None: "#999999"}[record["drawn"]]
    pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=frame, width=3)
    return np.asarray(canvas)


def report(records: list[dict], path: Path, columns: int = 12, side: int = 168) -> None:
    """A contact sheet, a row of `columns` pictures a category, the worst first and evenly chosen from there to the
    best: the detector's boxes, prompt, verdict and its reason, the model's answer."""
    chosen = []
    for tag in TAGS:
        tagged = sorted((r for r in records if r["tag"] == tag), key=lambda r: (bool(r["drawn"]), bool(r["answered"])))
        few = [tagged[i] for i in np.linspace(0, len(tagged) - 1, min(columns, len(tagged))).round().astype(int)]
        chosen += few + [None] * (columns - len(few) if few else 0)  # a category begins a row
    verdicts = {True: "RIGHT", False: "WRONG: ", None: "not judged"}
    captions = [
        "" if r is None else f"{r['tag']}: {r['prompt'].removeprefix('a photo of ')}\n"
        + verdicts[r["drawn"]] + r["reason"].removeprefix("expected ")
        + ("" if r["answer"] is None else f"\nsays {'RIGHT' if r['answered'] else 'WRONG'}: {r['answer']}")
        for r in chosen
    ]
    blank = np.full((side, side, 3), 255, np.uint8)
    contact_sheet(np.stack([blank if r is None else picture(r, side) for r in chosen]), captions, path, columns)


# ---------------------------------------------------------------------------------------------------------------------
# Two results


def tally(records: list[dict]) -> dict[str, np.ndarray]:
    """For every category [prompts, 4]: pictures, drawn right, answered right, both; nan where not measured."""
    counts = {tag: {} for tag in TAGS}
    for r in records:
        drawn, answered = (np.nan if r[key] is None else float(r[key]) for key in ("drawn", "answered"))
        row = counts[r["tag"]].setdefault(r["index"], np.zeros(4))
        row += (1, drawn, answered, drawn * answered)
    return {tag: np.stack([rows[index] for index in sorted(rows)]) for tag, rows in counts.items() if rows}


def measures(sums: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scores from sums of `tally`'s columns, {category: [..., 4]} -> {name: [...]}."""
    drawn = {tag: s[..., 1] / s[..., 0] for tag, s in sums.items()}
    answered = {tag: s[..., 2] / s[..., 0] for tag, s in sums.items()}
    total, right, said, both = np.moveaxis(sum(sums.values()), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "generation overall": np.mean(list(drawn.values()), axis=0),
            **{f"generation {tag}": values for tag, values in drawn.items()},
            "understanding own_images": np.mean(list(answered.values()), axis=0),
            **{f"understanding {tag}": values for tag, values in answered.items()},
            "answered_given_drawn": both / right,
            "drawn_given_answered": both / said,
            "disagreement": (right + said - 2 * both) / total,
        }


def compare(paths: Sequence[str], resamples: int = 10_000) -> str:
    """Two results side by side, and a 95 % confidence interval of the difference: bootstrap over prompts within each
    category, the same prompts for both."""
    results = []
    for path in map(Path, paths):
        path = path / "results.json" if path.is_dir() else path
        try:
            results.append(json.loads(path.read_text()))
            results[-1]["conditions"]["suite"]["sha256"], results[-1]["images"][0]["tag"]
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{path}: holds no results of evaluate.py") from None
    suites = [result["conditions"]["suite"] for result in results]
    if suites[0] != suites[1]:
        named = " and ".join(f"{s['name']} ({s['prompts']} prompts, sha256 {s['sha256'][:8]})" for s in suites)
        raise UserError(f"{paths[0]} and {paths[1]} are of different suites: {named}")
    rng = np.random.default_rng(0)
    counts = [tally(result["images"]) for result in results]
    rows = {tag: rng.integers(len(c), size=(resamples, len(c))) for tag, c in counts[0].items()}
    a, b = (measures({tag: values.sum(0) for tag, values in c.items()}) for c in counts)
    # Drawn in pieces: [resamples, prompts, 4] of a hundred prompts is little, of all at once it is not.
    a_drawn, b_drawn = (measures({tag: c[tag][rows[tag]].sum(1) for tag in c}) for c in counts)
    lines = [f"{'':34}{'A':>8}{'B':>8}{'B - A':>9}   95 % interval"]
    for name in a:
        if np.isnan(a[name]) or np.isnan(b[name]):
            continue
        low, high = np.nanpercentile(b_drawn[name] - a_drawn[name], (2.5, 97.5))
        lines.append(f"{name:34}{a[name]:8.3f}{b[name]:8.3f}{b[name] - a[name]:+9.3f}   {low:+.3f} to {high:+.3f}")
    return "\n".join(lines + [f"A = {paths[0]}, B = {paths[1]}; {resamples} resamples of the prompts of each category"])


# ---------------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="score a model, or a folder of pictures", allow_abbrev=False, formatter_class=ShortHelp
    )
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
    add("--no-compile", action="store_true", help="start at once, draw slower")
    add("--detector", default=DETECTOR, help=f"a folder or hub id, or none: draw and ask only (default: {DETECTOR})")
    add("--clip", default=CLIP, help=f"what names colors: a folder or hub id (default: {CLIP})")
    add("--write-suite", metavar="FILE", help="write GenEval's 553 prompts with their metadata, and stop")
    add("--compare", nargs=2, metavar=("A", "B"), help="two results: differences and their confidence, and stop")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.write_suite:
        write_suite(Path(args.write_suite), geneval_suite())
        return print(f"written: {args.write_suite}; next: draw four pictures a prompt, score them with --images FOLDER")
    if args.compare:
        return print(compare(args.compare))
    out, pictures, model = Path(args.out), None, None
    rank, _, device = start_ranks(86_400)  # of a folder begun before, one rank may have hours more to draw
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if args.images:
        pictures = read_folder(Path(args.images))
    if args.model or not args.images:
        args.model = args.model or "tiny"
        model = load(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        use_draw_steps(model, args.draw_steps)
    world = world_of(model) if model else World("geneval", REAL, geneval_suite())
    if pictures:
        classes = {fact["class"] for line, _ in pictures for fact in line["include"]}
        world = shapes_world() if model is None and classes <= set(shapes.GLYPHS) else world
        if unknown := classes - set(world.vocabulary.objects):
            raise UserError(f"{args.images}: asks for {min(unknown)!r}, which the {world.name} world does not know")
    if args.detector != "none" and not world.detect:
        transformers.utils.logging.disable_progress_bar()  # two more bars, of a second each
        world.detect = load_detector(args.detector, args.clip, device)
    small = world.name == "shapes"
    batch = args.batch or (144 if small else 16)
    folder = Path(args.images or out / "images")
    if not pictures:
        guidance = model.guidance if args.guidance is None else args.guidance
        if rank == 0 and not args.no_compile:
            print(COMPILING, file=sys.stderr)
        draw_folder(model, world, folder, args.images_per_prompt or (6 if small else 4), guidance, args.temperature,
                    args.seed, batch, not args.no_compile, args.model)
        pictures = read_folder(folder)
    records = score_folder(model, world, pictures, batch)
    if rank == 0:
        finish(args, world, folder, pictures, records)
    if dist.is_initialized():
        dist.destroy_process_group()


def finish(args: argparse.Namespace, world: World, folder: Path, pictures: list, records: list[dict]) -> None:
    """results.json, report.png and the table, with the conditions of the scores.

    Raises:
        UserError: after writing all that, where a detector found nothing on most pictures: then it is no measure.
    """
    out = Path(args.out)
    lines = "".join(json.dumps(line) + "\n" for line, _ in pictures)
    empty = share([not r["detections"] for r in records]) if world.detect else None
    broken = isinstance(world.detect, Detector) and empty > 0.5
    drawn = read_conditions(folder)
    scorer = f"{args.detector}, {args.clip}" if isinstance(world.detect, Detector) else "the shapes world's detector"
    conditions = {
        "model": args.model, "images": str(folder), "guidance": drawn.get("guidance"),
        "temperature": drawn.get("temperature"), "draw_steps": drawn.get("draw_steps"), "seed": drawn.get("seed"),
        "images_per_prompt": max(len(files) for _, files in pictures),
        "suite": {"name": world.name, "prompts": len(pictures), "sha256": hashlib.sha256(lines.encode()).hexdigest()},
        "scorer": scorer if world.detect else None, "nothing_found": empty,
        "versions": versions(),
    }
    records = [{**r, "drawn": None, "reason": "detector broken"} for r in records] if broken else records
    scores = summarize(records)
    write_json(out / "results.json", {"scores": scores, "conditions": conditions, "images": records})
    report(records, out / "report.png")
    print(table({(args.model or folder.name)[-7:]: scores}))
    print(", ".join(f"{key} {value}" for key, value in conditions.items() if key not in ("versions", "suite")))
    print(f"{len(records)} pictures of {len(pictures)} prompts ({world.name}); written: {out}/results.json")
    if broken:
        raise UserError(f"the detector found nothing with a confidence above {THRESHOLD} on {empty:.0%} of the "
                        "pictures: it is broken, or they are; generation is null in results.json, not 0")
    print(f"look at {out}/report.png; then compare with another: python evaluate.py --compare {out} OTHER")


if __name__ == "__main__":
    run(main)
