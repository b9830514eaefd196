"""Tables and figures of what ablate.py measured, from figures/ablation.json alone.

    python report.py                                       # needs matplotlib for the figures, and for nothing else
    python report.py --pair tiny runs/grpo/step_000080     # front.png: what a run changed, prompt by prompt

Writes, beside the results,

    ablation.md         the tables: mean over seeds and a 95 % confidence interval (Student's t)
    ablation.png        every setting's change of the detector's score, seed by seed
    learning.png        the detector's score against images drawn and against minutes, in runs of full length
    learning_short.png  the same of the short runs
    hacking.png         settings that fool themselves beside the same ones that do not

and the tables of README.md. A difference between two settings is taken seed by seed, which gives both the same prompts
(the same in the first step, that is; what follows depends on what was learned).
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ablate import HERE, IMAGES, MODELS, SEEDS, cells, read_results
from checkpoint import load
from evaluate import draw, picture, score_images, world_of, write_whole
from model import UserError
from reward import TAGS, geneval_metadata
from sample import contact_sheet, run, to_uint8
from watch import falls

# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def tables(model: str) -> dict[str, list[str]]:
    """The cells of every table, that to compare with first."""
    others = ["guidance 2", "guidance 5"] if model == "tiny" else ["guidance 1", "guidance 2"]
    return {
        "Optimiser, and way through the image": ["grpo", "grpo end-to-end", "sft", "sft end-to-end"],
        "Log-probability of an image token": [
            "grpo" if model == "tiny" else "guidance 1", "detached", "conditional"
        ],
        "Reward": ["grpo", "partial", "likelihood"],
        "KL to the start": ["grpo", "beta 0", "beta 0.1"],
        "Answers trained too (GRPO)": ["grpo", "answers trained", *([] if model == "tiny" else ["broken"])],
        "Answers trained too (SFT)": ["sft", "sft, answers trained"],
        "Images a prompt, at as many images a step": ["grpo", "group 4", "group 8", "group 16"],
        "Guidance while sampling (scored at the same)": ["grpo", *others],
        FULL: [f"full {name}" for name in METHODS],
    }


NAMES = {  # of cells as the tables say them, where that is not their own name
    "grpo": "GRPO two-stage", "grpo end-to-end": "GRPO end-to-end", "sft": "SFT two-stage", "sft end-to-end": "SFT end-to-end",
    "answers trained": "GRPO, answer weight 0.3", "broken": "GRPO, answer weight 3, beta 0",
    "sft, answers trained": "SFT, answer weight 1",
}
METHODS = {"grpo": ("GRPO two-stage", "#2b6cd9"), "sft": ("SFT two-stage", "#3a9d5d"),
           "grpo end-to-end": ("GRPO end-to-end", "#d9822b"), "sft end-to-end": ("SFT end-to-end", "#a04fb5")}
NAMES |= {f"full {name}": f"{label}, full length" for name, (label, _) in METHODS.items()}
FULL = "The scripts' own defaults"
TITLES = {"tiny": "tiny Janus", "tiny-show-o": "tiny Show-o"}

# ---------------------------------------------------------------------------------------------------------------------
# Tables

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles, 1 to 9 degrees of freedom


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
    """The change of a score over a run."""
    before, after = (result[when]["generation"]["overall"] if key == "detector" else result[when][key]
                     for when in ("before", "after"))
    return after - before


def signed(values: Sequence[float]) -> str:
    """Mean and interval as a table's cell."""
    mean, half = interval(values)
    return "-" if math.isnan(mean) else f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def table(results: list[dict], model: str, names: list[str]) -> list[str]:
    """A table in Markdown, a row a cell: its changes from the start, and of the detector's that beyond the first cell's,
    seed by seed."""
    first = of_cell(results, model, names[0])
    rows = ["| | seeds | detector before | detector, change | beyond the first row | true pictures understood, change "
            "| own pictures understood, change | the two disagree, change | minutes |", "|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        found = of_cell(results, model, name)
        if not found:
            continue
        stopped = sum("stopped" in r for r in results if (r["model"], r["cell"]) == (model, name))
        pairs = [change(r, "detector") - change(first[seed], "detector") for seed, r in found.items() if seed in first]
        before = np.mean([r["before"]["generation"]["overall"] for r in found.values()])
        rows.append(
            f"| {NAMES.get(name, name)} | {len(found)}{f' ({stopped} stopped)' if stopped else ''} | {before:.3f} | "
            + " | ".join([signed([change(r, "detector") for r in found.values()]),
                          "" if name == names[0] else signed(pairs),
                          *(signed([change(r, key) for r in found.values()])
                            for key in ("ground_truth", "own_images", "disagreement")),
                          f"{np.mean([sum(r['seconds']) for r in found.values()]) / 60:.1f}"]) + " |")
    return rows


def category_table(results: list[dict], model: str, length: str) -> list[str]:
    """The four methods' changes of the detector's score in each category, in short runs ("") or "full " ones."""
    rows = [f"| | {' | '.join(TAGS)} |", "|---|" + "---|" * len(TAGS)]
    for name, (label, _) in METHODS.items():
        if found := of_cell(results, model, length + name).values():
            changes = [signed([r["after"]["generation"][tag] - r["before"]["generation"][tag] for r in found]) for tag in TAGS]
            rows.append(f"| {label} | {' | '.join(changes)} |")
    return rows


def settings_table(results: list[dict]) -> list[str]:
    """The other settings of both models in one table: the change of the detector's score beyond that of the first cell of
    their table, seed by seed; of another guidance, which begins elsewhere, the scores at the start and at the end."""
    rows = ["| | tiny Janus | tiny Show-o |", "|---|---|---|"]
    for title in list(tables("tiny"))[1:-1]:  # without the four methods, which have tables of their own
        rows.append(f"| *{title}* | | |")
        names = {model: tables(model)[title] for model in MODELS}
        for name in dict.fromkeys(name for model in MODELS for name in names[model][1:]):
            row = []
            for model in MODELS:
                first, found = of_cell(results, model, names[model][0]), of_cell(results, model, name)
                pairs = [change(r, "detector") - change(first[seed], "detector") for seed, r in found.items() if seed in first]
                if name.startswith("guidance") and found:
                    before, after = ([r[when]["generation"]["overall"] for r in found.values()] for when in ("before", "after"))
                    row.append(f"{np.mean(before):.3f} → {signed(after).removeprefix('+')}")
                else:
                    row.append(signed(pairs) if name in names[model] else "")
                if found and len(found) != SEEDS:
                    row[-1] += f" ({len(found)} seeds)"
            rows.append(f"| {NAMES.get(name, name)} | {' | '.join(row)} |")
    return rows


def write_readme(content: dict, path: Path) -> None:
    """Puts the tables of README.md between their marks."""
    results, text = content["runs"], path.read_text()
    marked = {"full": methods_table(results, "full "), "methods": methods_table(results), "settings": settings_table(results)}
    for mark, lines in marked.items():
        start, end = f"<!-- {mark}: written by report.py -->\n", f"<!-- end of {mark} -->"
        if start not in text or end not in text:
            raise UserError(f"{path}: lacks the marks between which the table of {mark} goes")
        before, rest = text.split(start)
        text = before + start + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    write_whole(path, text)


def methods_table(results: list[dict], length: str = "") -> list[str]:
    """The four methods on both models, runs as short as the other settings' or "full " ones: the scores at the start, and
    their changes."""
    keys = ("detector", "own_images", "ground_truth", "disagreement")
    rows = ["| | seeds | detector | own pictures understood | true pictures understood | the two disagree | minutes |",
            "|---|---|---|---|---|---|---|"]
    for model in MODELS:
        start = of_cell(results, model, f"{length}grpo")
        if not start:
            continue
        scores = next(iter(start.values()))["before"]
        values = [scores["generation"]["overall"], *(scores[key] for key in keys[1:])]
        rows.append(f"| **{TITLES[model]}**, start | | {' | '.join(f'{value:.3f}' for value in values)} | |")
        for name in METHODS:
            if found := of_cell(results, model, length + name):
                minutes = np.mean([sum(r["seconds"]) for r in found.values()]) / 60
                changes = [signed([change(r, key) for r in found.values()]) for key in keys]
                rows.append(f"| {METHODS[name][0]} | {len(found)} | {' | '.join(changes)} | {minutes:.1f} |")
    return rows


def write_tables(content: dict, path: Path) -> None:
    """All tables of all models."""
    runs = content["runs"]
    lines = ["# Ablations on the tiny models", "",
             "Written by `python report.py` from `ablation.json`. Mean over seeds ± half a 95 % confidence interval "
             "(Student's t); scores of held-out prompts before and after. Minutes are those of the training steps, on one core.",
             ""]
    for model in MODELS:
        short = f"`{content['common'][model]}`, {IMAGES} images a step, 240 scored"
        for length, heading in (("", short), ("full ", "the scripts' own defaults, 720 scored")):
            lines += [f"## {TITLES[model]}: {heading}", ""]
            for title, names in tables(model).items():
                if (title == FULL) == (length == "full "):
                    lines += [f"**{title}**", "", *table(runs, model, names), ""]
            lines += ["**The detector's score by category, change**", "", *category_table(runs, model, length), ""]
    made_with = dict.fromkeys(", ".join(f"{key} {value}" for key, value in r["versions"].items()) for r in runs)
    write_whole(path, "\n".join([*lines, f"Made with {'; '.join(made_with)}; a run had one core.", ""]))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def figures(content: dict, folder: Path) -> None:
    """The four figures."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{folder}/ablation.md is written; the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110}
    drawn = {"ablation": draw_cells, "learning": partial(draw_learning, length="full "), "learning_short": draw_learning,
             "hacking": draw_hacking}
    for name, draw_figure in drawn.items():
        figure = draw_figure(pyplot, content["runs"])
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        pyplot.close(figure)


def draw_cells(pyplot, results: list[dict]):
    """Every cell's change of the detector's score: a dot a seed, a line for the mean's interval."""
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(9, 4.2))
    for axis, model in zip(axes, MODELS):
        names = [name for name in cells(model) if of_cell(results, model, name)]
        for row, name in enumerate(names):
            values = [change(r, "detector") for r in of_cell(results, model, name).values()]
            mean, half = interval(values)
            axis.plot(values, [row] * len(values), "o", color="#2b6cd9", alpha=0.35, markersize=3, markeredgewidth=0)
            axis.plot([mean - half, mean + half], [row, row], color="#222222", linewidth=1.2)
            axis.plot(mean, row, "|", color="#222222", markersize=8)
        if of_cell(results, model, "grpo"):
            axis.axvline(interval([change(r, "detector") for r in of_cell(results, model, "grpo").values()])[0],
                         color="#2b6cd9", linewidth=0.6, linestyle=":")
        axis.axvline(0, color="#999999", linewidth=0.6)
        axis.set(yticks=range(len(names)), yticklabels=[NAMES.get(name, name) for name in names], title=TITLES[model],
                 xlabel="change of the detector's score")
        axis.invert_yaxis()
    return figure


def held_out_curve(result: dict, column: int) -> list[tuple[int, float]]:
    """(step, score) from the start to the end; columns as of `record`: 1 detector, 2 own pictures, 3 true pictures."""
    ends = [result[when] for when in ("before", "after")]
    values = [s["generation"]["overall"] if column == 1 else s[("own_images", "ground_truth")[column - 2]] for s in ends]
    return [(0, values[0]), *((row[0], row[column]) for row in result["held_out"]), (len(result["reward"]), values[1])]


def draw_learning(pyplot, results: list[dict], length: str = ""):
    """The detector's score of the four methods, mean and interval over seeds, against images and minutes; of short runs, or
    "full " ones."""
    figure, axes = pyplot.subplots(len(MODELS), 2, figsize=(9, 5), sharey="row")
    for row, model in zip(axes, MODELS):
        for name, (label, color) in METHODS.items():
            found = list(of_cell(results, model, length + name).values())
            if not found:
                continue
            curves = [held_out_curve(r, 1) for r in found]
            steps = [step for step, _ in curves[0]]
            mean, half = np.transpose([interval([curve[i][1] for curve in curves]) for i in range(len(steps))])
            minutes = [np.mean([sum(r["seconds"][:step]) for r in found]) / 60 for step in steps]
            for axis, places in zip(row, ([step * found[0]["images"] for step in steps], minutes)):
                axis.plot(places, mean, color=color, label=label, marker=".", markersize=4)
                axis.fill_between(places, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
        row[0].set(ylabel=f"{TITLES[model]}: detector", xlabel="images drawn")
        row[1].set(xlabel="minutes of training on one core")
    axes[0][1].legend(frameon=False, fontsize=7)
    return figure


def draw_hacking(pyplot, results: list[dict]):
    """What the tiny Show-o says about its pictures, what they show, and what it says about true ones: two settings, and what
    becomes of them when the answers are trained hard. A line a seed; a cross where the gauge warns."""
    names = ("grpo", "broken", "sft", "sft, answers trained")
    colors = {"detector": "#2b6cd9", "self-reward": "#d9822b", "true pictures": "#3a9d5d"}
    figure, axes = pyplot.subplots(1, len(names), figsize=(9, 2.7), sharey=True)
    for axis, name in zip(axes, names):
        for result in of_cell(results, "tiny-show-o", name).values():
            curves = {label: held_out_curve(result, column) for column, label in enumerate(colors, 1)}
            for label, color in colors.items():
                axis.plot(*zip(*curves[label]), color=color, linewidth=0.9, label=label)
            for i, (step, value) in enumerate(curves["true pictures"]):
                before, now = ({label: curves[label][at][1] for label in colors} for at in (0, i))
                if falls(before, now, ({label: 240 for label in colors},) * 2, 0.02):
                    axis.plot(step, value, "x", color="#d03030", markersize=5)
        axis.set(xlabel="steps", ylim=(0, 1.03))
        axis.set_title(NAMES[name], fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[2].legend(handles[:3], labels[:3], frameon=False, fontsize=7, loc=(0.45, 0.5))
    return figure


def draw_pair(names: Sequence[str], path: Path, each: int = 4) -> None:
    """Pictures of the first `each` held-out prompts of every category by two models, from the same seeds, framed and boxed
    as in evaluate.py's report: a row of the first one's, below it the second one's of the same prompts, and again."""
    rows = []  # of each model: (picture, caption)
    for name, when in zip(names, ("before", "after")):
        model = load(name)
        world = world_of(model)
        if not world.detect:
            raise UserError(f"--pair {name}: has no world with a detector; give tiny models")
        prompts = {task.prompt: index for index, task in reversed(list(enumerate(world.suite)))}  # each prompt once
        chosen = [index for tag in TAGS for index in sorted(i for i in prompts.values() if world.suite[i].tag == tag)[:each]]
        seen = model.see(draw(model, world, [(index, 0, index) for index in chosen], model.guidance, 1.0, False))
        lines = [geneval_metadata(world.suite[index]) for index in chosen]
        records = score_images(model, world, lines, to_uint8(model.show(seen)), seen, chosen)
        rows.append([(picture(r, 144), f"{when}: {r['prompt'].removeprefix('a photo of ')}\nsays: {r['answer']}") for r in records])
    columns = math.ceil(len(rows[0]) / 2)
    cells = [cell for at in range(0, len(rows[0]), columns) for row in rows for cell in row[at : at + columns]]
    contact_sheet(np.stack([image for image, _ in cells]), [caption for _, caption in cells], path, columns)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="tables and figures of the ablations", allow_abbrev=False)
    parser.add_argument("--results", default=str(HERE / "figures" / "ablation.json"), help="(default: figures/ablation.json)")
    parser.add_argument("--pair", nargs=2, metavar="MODEL", help="draw front.png of two models instead: before, after")
    args = parser.parse_args()
    path = Path(args.results)
    if args.pair:
        draw_pair(args.pair, path.parent / "front.png")
        return print(f"look at {path.parent}/front.png: {args.pair[0]} above, {args.pair[1]} below")
    content = read_results(path)
    write_tables(content, path.with_suffix(".md"))
    if path.parent == HERE / "figures":
        write_readme(content, HERE / "README.md")
    figures(content, path.parent)
    print(f"{len(content['runs'])} runs; look at {path.with_suffix('.md')} and {path.parent}/*.png")


if __name__ == "__main__":
    run(main)
