"""Tables and figures of what ablate.py measured, from its results alone.

    python -m experiments.report                          # figures/ablation.json; figures need matplotlib
    python -m experiments.report --pair tiny runs/grpo/step_000080   # front.png: what a run changed

Writes, beside the results,

    ablation.md         the tables: mean over seeds and half a 95 % confidence interval (Student's t)
    ablation.png        every setting's change of the detector's score, seed by seed
    learning.png        the detector's score against images and minutes, in runs of full length
    learning_short.png  the same of the short runs
    hacking.png         settings that fool themselves beside the same ones that do not
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from evaluate import Gauge, evaluate, first_of_each, picture, shapes_world, world_of
from experiments.ablate import IMAGES, MODELS, cells, read_results
from model import UserError, load
from reward import TAGS
from sample import contact_sheet, run, write_whole

FIGURES = Path(__file__).parent / "figures"
TITLES = {"tiny": "tiny Janus", "tiny-show-o": "tiny Show-o"}
METHODS = {
    "grpo": ("GRPO two-stage", "#2b6cd9"), "sft": ("SFT two-stage", "#3a9d5d"),
    "grpo end-to-end": ("GRPO end-to-end", "#d9822b"), "sft end-to-end": ("SFT end-to-end", "#a04fb5"),
}
NAMES = {  # of cells as the tables say them, where that is not their own name
    "answers trained": "GRPO, answer weight 0.3", "broken": "GRPO, answer weight 3, beta 0",
    "sft, answers trained": "SFT, answer weight 1", **{name: label for name, (label, _) in METHODS.items()},
    **{f"full {name}": f"{label}, full length" for name, (label, _) in METHODS.items()},
}
FULL = "The scripts' own defaults"


def tables(model: str) -> dict[str, list[str]]:
    """The cells of every table, that to compare with first."""
    janus = model == "tiny"
    return {
        "Optimiser, and way through the image": ["grpo", "grpo end-to-end", "sft", "sft end-to-end"],
        "Log-probability of an image token": ["grpo" if janus else "guidance 1", "detached", "conditional"],
        "Reward": ["grpo", "partial", "likelihood"],
        "KL to the start": ["grpo", "beta 0", "beta 0.1"],
        "Answers trained too (GRPO)": ["grpo", "answers trained", *([] if janus else ["broken"])],
        "Answers trained too (SFT)": ["sft", "sft, answers trained"],
        "Images a prompt, at as many images a step": ["grpo", "group 4", "group 8", "group 16"],
        "Guidance while sampling (scored at the same)": [
            "grpo", *(["guidance 2", "guidance 5"] if janus else ["guidance 1", "guidance 2"])
        ],
        FULL: [f"full {name}" for name in METHODS],
    }


# ---- tables ------------------------------------------------------------------------------------------------

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 degrees


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval; nan of fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan
    quantile = STUDENT[len(values) - 2] if len(values) < len(STUDENT) + 2 else 1.96
    return float(values.mean()), quantile * float(values.std(ddof=1)) / math.sqrt(len(values))


def of_cell(results: list[dict], model: str, cell: str) -> dict[int, dict]:
    """A cell's finished runs by seed."""
    return {r["seed"]: r for r in results if (r["model"], r["cell"]) == (model, cell) and "after" in r}


def change(result: dict, key: str) -> float:
    """The change of a score over a run: the detector's ("overall", or of a category), or another."""
    before, after = ({**result[when], **result[when]["generation"]}[key] for when in ("before", "after"))
    return after - before


def signed(values: Sequence[float]) -> str:
    """Mean and interval as a table's cell."""
    mean, half = interval(values)
    return "-" if math.isnan(mean) else f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def table(results: list[dict], model: str, names: list[str]) -> list[str]:
    """A table in Markdown, a row a cell: its changes from the start, and of the detector's that beyond the
    first cell's, seed by seed, as a seed gives both the same prompts in the first step."""
    first = of_cell(results, model, names[0])
    rows = ["| | seeds | detector before | detector, change | beyond the first row "
            "| true pictures understood, change | own pictures understood, change | the two disagree, change "
            "| minutes |", "|---" * 9 + "|"]
    for name in names:
        found = of_cell(results, model, name)
        if not found:
            continue
        stopped = sum("stopped" in r for r in results if (r["model"], r["cell"]) == (model, name))
        pairs = [change(r, "overall") - change(first[s], "overall") for s, r in found.items() if s in first]
        keys = ("overall", "ground_truth", "own_images", "disagreement")
        detector, *others = [signed([change(r, key) for r in found.values()]) for key in keys]
        before = np.mean([r["before"]["generation"]["overall"] for r in found.values()])
        minutes = np.mean([sum(r["seconds"]) / 60 for r in found.values()])
        seeds = f"{len(found)} ({stopped} stopped)" if stopped else f"{len(found)}"
        beyond = "" if name == names[0] else signed(pairs)
        row = [NAMES.get(name, name), seeds, f"{before:.3f}", detector, beyond, *others, f"{minutes:.1f}"]
        rows.append(f"| {' | '.join(row)} |")
    return rows


def category_table(results: list[dict], model: str, length: str) -> list[str]:
    """The four methods' changes of the detector's score by category, in short runs ("") or "full " ones."""
    rows = [f"| | {' | '.join(TAGS)} |", "|---" * (len(TAGS) + 1) + "|"]
    for name, (label, _) in METHODS.items():
        if found := of_cell(results, model, length + name).values():
            changes = [signed([change(r, tag) for r in found]) for tag in TAGS]
            rows.append(f"| {label} | {' | '.join(changes)} |")
    return rows


def write_tables(content: dict, path: Path) -> None:
    """All tables of all models."""
    runs = content["runs"]
    lines = ["# Ablations on the tiny models", "",
             "Written by report.py: mean over seeds ± half a 95 % confidence interval (Student's t), scores "
             "of held-out prompts before and after. Minutes are of the training steps, on one core.", ""]
    for model in MODELS:
        short = f"`{content['common'][model]}`, {IMAGES} images a step, 240 scored"
        for length, heading in (("", short), ("full ", "the scripts' own defaults, 720 scored")):
            lines += [f"## {TITLES[model]}: {heading}", ""]
            for title, names in tables(model).items():
                if (title == FULL) == (length == "full "):
                    lines += [f"**{title}**", "", *table(runs, model, names), ""]
            lines += ["**The detector's score by category, change**", ""]
            lines += [*category_table(runs, model, length), ""]
    versions = {", ".join(f"{key} {value}" for key, value in r["versions"].items()): None for r in runs}
    write_whole(path, "\n".join([*lines, f"Made with {'; '.join(versions)}; a run had one core.", ""]))


# ---- figures -----------------------------------------------------------------------------------------------

def figures(content: dict, folder: Path) -> None:
    """The four figures. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("tables are written; the figures need matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")
    pyplot.rcParams |= {"font.size": 8, "savefig.dpi": 110}
    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    drawn = {"ablation": draw_cells, "learning": partial(draw_learning, length="full "),
             "learning_short": draw_learning, "hacking": draw_hacking}
    for name, draw in drawn.items():
        figure = draw(pyplot, content["runs"])
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        pyplot.close(figure)


def draw_cells(pyplot, results: list[dict]):
    """Every cell's change of the detector's score: a dot a seed, a line for the mean's interval."""
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(9, 4.2))
    for axis, model in zip(axes, MODELS):
        names = [name for name in cells(model) if of_cell(results, model, name)]
        for row, name in enumerate(names):
            values = [change(r, "overall") for r in of_cell(results, model, name).values()]
            mean, half = interval(values)
            axis.plot(values, [row] * len(values), "o", color="#2b6cd9", alpha=0.35, markersize=3, mew=0)
            axis.plot([mean - half, mean + half], [row, row], color="#222222", linewidth=1.2)
            axis.plot(mean, row, "|", color="#222222", markersize=8)
            if name == "grpo":
                axis.axvline(mean, color="#2b6cd9", linewidth=0.6, linestyle=":")
        axis.axvline(0, color="#999999", linewidth=0.6)
        axis.set(yticks=range(len(names)), yticklabels=[NAMES.get(name, name) for name in names],
                 title=TITLES[model], xlabel="change of the detector's score")
        axis.invert_yaxis()
    return figure


def course(result: dict) -> list[tuple[int, float, float, float]]:
    """From start to end: step, the detector's score, shares of own and of true pictures understood."""
    places = list(map(tuple, result["held_out"]))
    for step, scores in ((0, result["before"]), (len(result["reward"]), result["after"])):
        places.append((step, scores["generation"]["overall"], scores["own_images"], scores["ground_truth"]))
    return sorted(places)


def draw_learning(pyplot, results: list[dict], length: str = ""):
    """The detector's score of the four methods, mean and interval over seeds, against images and minutes; of
    short runs, or "full " ones."""
    figure, axes = pyplot.subplots(len(MODELS), 2, figsize=(9, 5), sharey="row")
    for row, model in zip(axes, MODELS):
        for name, (label, color) in METHODS.items():
            found = list(of_cell(results, model, length + name).values())
            if not found:
                continue
            steps = [step for step, *_ in course(found[0])]
            scores = np.array([[score for _, score, *_ in course(r)] for r in found])  # [seeds, places]
            mean, half = np.transpose([interval(place) for place in scores.T])
            times = [np.mean([sum(r["seconds"][:step]) / 60 for r in found]) for step in steps]
            for axis, places in zip(row, ([step * found[0]["images"] for step in steps], times)):
                axis.plot(places, mean, color=color, label=label, marker=".", markersize=4)
                axis.fill_between(places, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
        row[0].set(ylabel=f"{TITLES[model]}: detector", xlabel="images drawn")
        row[1].set(xlabel="minutes of training on one core")
    axes[0][1].legend(frameon=False, fontsize=7)
    return figure


def parted(start: tuple, now: tuple) -> bool:
    """Whether the gap gauge warns at a place of a course."""
    scores = [{"generation": {"overall": detector},
               "understanding": {"own_images": own, "ground_truth": true, "ground_truth_by_category": {}}}
              for _, detector, own, true in (start, now)]
    return bool(Gauge(shapes_world(), scores[0], 2).read(scores[1], 2)["parted"])


def draw_hacking(pyplot, results: list[dict]):
    """What the tiny Show-o says about its pictures, what they show, and what it says about true ones: two
    settings, and the same with answers trained hard. A line a seed; a cross where the gauge warns."""
    names = ("grpo", "broken", "sft", "sft, answers trained")
    colors = {"detector": "#2b6cd9", "self-reward": "#d9822b", "true pictures": "#3a9d5d"}
    figure, axes = pyplot.subplots(1, len(names), figsize=(9, 2.7), sharey=True)
    for axis, name in zip(axes, names):
        for result in of_cell(results, "tiny-show-o", name).values():
            places = course(result)
            steps, *lines = zip(*places)
            for line, (label, color) in zip(lines, colors.items()):
                axis.plot(steps, line, color=color, linewidth=0.9, label=label)
            for place in places:
                if parted(places[0], place):
                    axis.plot(place[0], place[-1], "x", color="#d03030", markersize=5)
        axis.set(xlabel="steps", ylim=(0, 1.03))
        axis.set_title(NAMES[name], fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[2].legend(handles[:3], labels[:3], frameon=False, fontsize=7, loc=(0.45, 0.5))
    return figure


def draw_pair(names: Sequence[str], path: Path, each: int = 4) -> None:
    """Pictures of the first `each` held-out prompts of every category by two models, from the same seeds, as
    in evaluate.py's report: a row of the first one's, below it the second one's of the same, and again."""
    cells = []  # (picture, caption)
    for name, when in zip(names, ("before", "after")):
        model = load(name)
        world = world_of(model)
        if not world.detect:
            raise UserError(f"--pair {name}: has no world with a detector; give tiny models")
        world.suite = first_of_each({task.prompt: task for task in world.suite}.values(), each)
        _, records = evaluate(model, world, model.guidance, images_per_prompt=1, compiled=False)
        for record in records:
            prompt = record["prompt"].removeprefix("a photo of ")
            cells.append((picture(record, 144), f"{when}: {prompt}\nsays: {record['answer']}"))
    columns = len(cells) // 4
    upper, lower, upper_after, lower_after = (cells[row * columns :][:columns] for row in range(4))
    images, captions = zip(*upper, *upper_after, *lower, *lower_after)
    contact_sheet(np.stack(images), captions, path, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="tables and figures of the ablations")
    parser.add_argument("--results", default=FIGURES / "ablation.json", help="of ablate.py")
    parser.add_argument("--pair", nargs=2, metavar="MODEL", help="draw front.png instead: before, after")
    args = parser.parse_args()
    path = Path(args.results)
    if args.pair:
        draw_pair(args.pair, path.with_name("front.png"))
        return print(f"look at {path.with_name('front.png')}: {args.pair[0]} above, {args.pair[1]} below")
    content = read_results(path)
    write_tables(content, path.with_suffix(".md"))
    figures(content, path.parent)
    print(f"{len(content['runs'])} runs; look at {path.with_suffix('.md')} and {path.parent}/*.png")


if __name__ == "__main__":
    run(main)
