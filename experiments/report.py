"""Tables and figures of what race.py measured, from its results alone.

    python -m experiments.report                          # figures/race.json; figures need matplotlib
    python -m experiments.report --pair tiny runs/grpo/step_000050   # front.png: what a run changed

Writes, beside the results,

    race.md             the tables: mean over seeds and half a 95 % confidence interval (Student's t)
    race.png            the detector's score of validation prompts on the way, against images
    estimators.png      the same of what scores a Show-o's trajectory, against images and seconds
    judges.png          the gain by GRPO, against the share of true pictures that the judge understands
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evaluate import evaluate, first_of_each, picture, world_of
from experiments.race import CELLS, IMAGES, JANUS, MODELS, SHOW_O, read_results, score_of
from model import UserError, load
from reward import TAGS
from sample import contact_sheet, run, write_whole

FIGURES = Path(__file__).parent / "figures"
TITLES = {"tiny": "tiny Janus", "tiny-show-o": "tiny Show-o"}
METHODS = {
    "grpo": ("GRPO two-stage", "#2b6cd9"), "grpo answers": ("GRPO two-stage, answers too", "#16b8c4"),
    "sft": ("SFT two-stage", "#3a9d5d"),
    "grpo end-to-end": ("GRPO end-to-end", "#d9822b"), "sft end-to-end": ("SFT end-to-end", "#a04fb5"),
    "oracle": ("GRPO, oracle reward", "#777777"),
}
ESTIMATORS = {
    "replay 1": ("one step replayed", "#d9822b"), "grpo": ("three steps", "#2b6cd9"),
    "replay all": ("all nine steps", "#3a9d5d"), "remask": ("masked anew", "#a04fb5"),
}
JUDGES = ("grpo", *(cell for cell in CELLS if CELLS[cell].settings_of))  # the policy itself, and others
COLUMNS = {  # of the tables, beside the detector's score
    "own": "own pictures understood", "true": "true pictures understood", "disagree": "the two disagree",
    "diversity": "diversity",
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


def signed(values: Sequence[float]) -> str:
    """Mean and interval as a table's cell."""
    mean, half = interval(values)
    return "-" if math.isnan(mean) else f"{mean:+.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def row(*cells) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(map(str, cells))} |"


def header(*cells) -> list[str]:
    """The first two lines of one."""
    return [row(*cells), "|---" * len(cells) + "|"]


def start_of(results: list[dict], model: str) -> dict:
    """The scores of a model before training. Raises UserError where they are not among the results."""
    for result in results:
        if (result["model"], result["cell"]) == (model, ""):
            return result
    raise UserError(f"no scores of {model}'s start yet: python -m experiments.race")


def races(results: list[dict], model: str, cell: str) -> list[dict]:
    """A cell's runs of the race that came to their end."""
    return [result for result in results
            if (result["model"], result["cell"]) == (model, cell) and result["seed"] and "test" in result]


def changes(results: list[dict], model: str, cell: str, key: str, when: str = "guidance") -> list[float]:
    """The change of a score on test prompts, seed by seed: at the guidance of the training, or between the
    "best" of start and end."""
    start = start_of(results, model)
    before = start["test"][start[when]][key]
    return [result["test"][result[when]][key] - before for result in races(results, model, cell)]


def on_gpu(result: dict) -> bool:
    """Whether it was run on one, which several runs shared."""
    return "," in result["versions"]["machine"]


def seconds_a_step(results: list[dict], model: str, cell: str) -> float:
    """Of a cell's training on one core: the least of its runs there, those of the search too, as others had
    to share it; nan where there is none."""
    mine = [r for r in results if (r["model"], r["cell"]) == (model, cell) and "reward" in r]
    return min((r["seconds"] / len(r["reward"]) for r in mine if not on_gpu(r)), default=math.nan)


def race_table(
    results: list[dict], cells: dict[str, tuple[str, str]], models: Sequence[str] = MODELS
) -> list[str]:
    """What the cells changed. Seconds on a GPU, which several runs shared, are marked."""
    lines = header("", "seeds", "detector, best against best", "detector, as trained", *COLUMNS.values(),
                   "seconds")
    for model in models:
        start = start_of(results, model)
        test, best = start["test"][start["guidance"]], start["test"][start["best"]]["detector"]
        scores = [f"{value:.3f}" for value in (best, test["detector"], *(test[key] for key in COLUMNS))]
        found = {cell: races(results, model, cell) for cell in cells}
        if any(found.values()):
            lines.append(row(f"**{TITLES[model]}**, start", "", *scores, ""))
        for cell, runs in found.items():
            if runs:
                parts = [changes(results, model, cell, "detector", "best")]
                parts += [changes(results, model, cell, key) for key in ("detector", *COLUMNS)]
                seconds = min(result["seconds"] for result in runs)  # the others may have shared a core
                shared = " (GPU)" if on_gpu(runs[0]) else ""
                lines.append(row(cells[cell][0], len(runs), *map(signed, parts), f"{seconds:.0f}{shared}"))
    return lines


def category_table(results: list[dict], model: str) -> list[str]:
    """The changes by category: the detector's score, and understanding of true pictures."""
    lines, start = header("", *TAGS), start_of(results, model)
    for prefix, what in (("", "detector"), ("true ", "true pictures")):
        keys, test = [prefix + tag for tag in TAGS], start["test"][start["guidance"]]
        lines.append(row(f"{what}, start", *(f"{test[key]:.3f}" for key in keys)))
        for cell, (label, _) in METHODS.items():
            if races(results, model, cell):
                lines.append(row(label, *(signed(changes(results, model, cell, key)) for key in keys)))
    return lines


def scan_table(results: list[dict], model: str) -> list[str]:
    """The detector's score of validation prompts by guidance: the start's, and each cell's mean."""
    scan = start_of(results, model)["validation"]
    lines = header("guidance", *scan)
    lines.append(row("start", *(f"{scores['detector']:.3f}" for scores in scan.values())))
    for cell in CELLS:
        if runs := races(results, model, cell):
            means = [np.mean([result["validation"][w]["detector"] for result in runs]) for w in scan]
            lines.append(row(cell, *(f"{mean:.3f}" for mean in means)))
    return lines


def search_table(results: list[dict], model: str) -> list[str]:
    """All runs of the searches, the chosen setting in bold."""
    lines = header("cell", "detector, validation prompts, by learning rate", "at the best rate")
    for cell in CELLS:
        runs = [r for r in results if (r["model"], r["cell"], r["seed"]) == (model, cell, 0)]
        runs.sort(key=lambda result: (result["other"], result["rate"]))
        best = max(runs, key=score_of, default=None)

        def text(result: dict) -> str:
            told = result["other"].replace("--", "") or f"{result['rate']:g}"
            score = "stopped" if "stopped" in result else f"{score_of(result):.3f}"
            return f"**{told}: {score}**" if result is best else f"{told}: {score}"

        if runs:
            rates, others = [r for r in runs if not r["other"]], [r for r in runs if r["other"]]
            lines.append(row(cell, ", ".join(map(text, rates)), ", ".join(map(text, others))))
    return lines


def judges(results: list[dict], model: str, cells: Sequence[str]) -> dict[str, float]:
    """By cell that was run: the share of true test pictures that the judge understands, the worst one
    first."""
    start, shares = start_of(results, model), {}
    itself = start["test"][start["guidance"]]["true"]
    for cell in cells:
        if runs := races(results, model, cell):
            shares[cell] = runs[0].get("judge", itself)
    return dict(sorted(shares.items(), key=lambda item: item[1]))


def write_tables(results: list[dict], path: Path) -> None:
    """All tables."""
    lines = ["# The race on the tiny models", "",
             "Written by report.py: changes of scores on test prompts, mean over seeds ± half a 95 % "
             "confidence interval (Student's t). The start's own score, of 2,880 pictures, has a standard "
             "error of up to 0.01 beside it. Seconds are the fastest seed's training steps', on one core or "
             "a shared GPU.", "",
             *race_table(results, METHODS), ""]
    labels = {cell: (f"understands {share:.3f} ({'itself' if cell == 'grpo' else cell})", "")
              for cell, share in judges(results, *JANUS, JUDGES).items()}
    for title, cells, models in (("What scores a Show-o's trajectory", ESTIMATORS, SHOW_O),
                                 ("How good must a judge be?", labels, JANUS)):
        table = race_table(results, cells, models)
        if len(table) > 4:  # more than the start and one cell
            lines += [f"## {title}", "", *table, ""]
    for model in MODELS:
        tables = {
            "By category, at the guidance of the training:": category_table(results, model),
            "The detector's score of validation prompts by guidance:": scan_table(results, model),
            "The searches, 3,072 images a run:": search_table(results, model),
        }
        lines += [f"## {TITLES[model]}", ""]
        for title, table in tables.items():
            lines += [title, "", *table, ""]
    versions = {", ".join(f"{key} {value}" for key, value in r["versions"].items()): None for r in results}
    lines += [f"Made with {'; '.join(versions)}. A run had one core; where a GPU is named it shared that, "
              "and trained in bfloat16.", ""]
    write_whole(path, "\n".join(lines))


# ---- figures -----------------------------------------------------------------------------------------------

def figures(results: list[dict], folder: Path) -> None:
    """The figures. Raises UserError where matplotlib is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("tables are written; the figures need matplotlib: pip install matplotlib") from None
    pyplot.switch_backend("Agg")
    pyplot.rcParams |= {"font.size": 8, "savefig.dpi": 110}
    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    score = "detector, validation prompts"
    for name, label, draw, panels in (
        ("race", score, draw_cells, [(model, METHODS, False) for model in MODELS]),
        ("estimators", score, draw_cells, [(*SHOW_O, ESTIMATORS, seconds) for seconds in (False, True)]),
        ("judges", "detector's gain, test prompts", draw_judges, [(*JANUS, JUDGES)]),
    ):
        panels = [panel for panel in panels if sum(bool(races(results, panel[0], c)) for c in panel[1]) > 1]
        if not panels:  # not yet
            continue
        figure, (axes,) = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False)
        for axis, panel in zip(axes, panels):
            draw(axis, results, *panel)
        axes[0].set(ylabel=label)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        pyplot.close(figure)


def draw_judges(axis, results: list[dict], model: str, cells: Sequence[str]) -> None:
    """Each seed's gain at the guidance of the training against what its judge understands, and a line through
    their means."""
    color, shares = METHODS["grpo"][1], judges(results, model, cells)
    gains = [changes(results, model, cell, "detector") for cell in shares]
    for share, values in zip(shares.values(), gains):
        axis.plot([share] * len(values), values, ".", color=color, alpha=0.5)
    axis.plot(list(shares.values()), [np.mean(values) for values in gains], color=color)
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.set(xlabel="true pictures understood by the judge", title=TITLES[model])


def draw_course(axis, runs: list[dict], label: str, color: str, start: float, per_step: float) -> None:
    """A cell's mean course over its seeds with its interval: the detector's score of validation prompts at
    the guidance of the training, from the start's through those on the way to the end's."""
    courses = []
    for result in runs:
        end = result["validation"][result["guidance"]]["detector"]
        courses.append([start, *(detector for _, detector, *_ in result["course"]), end])
    steps = [0, *(step for step, *_ in runs[0]["course"]), len(runs[0]["reward"])]
    mean, half = np.transpose([interval(place) for place in np.transpose(courses)])
    places = np.array(steps) * per_step
    axis.plot(places, mean, color=color, label=label, marker=".", markersize=4)
    if len(runs) > 2:  # that of two would dwarf everything else
        axis.fill_between(places, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)


def draw_cells(axis, results: list[dict], model: str, cells: dict, seconds: bool) -> None:
    """The courses of cells, against images or seconds."""
    start = start_of(results, model)
    start = start["validation"][start["guidance"]]["detector"]
    for cell, (label, color) in cells.items():
        if runs := races(results, model, cell):
            a_step = seconds_a_step(results, model, cell) if seconds else IMAGES
            draw_course(axis, runs, label, color, start, a_step)
    axis.legend(frameon=False, fontsize=7)
    axis.set(xlabel="seconds of training on a core" if seconds else "images drawn", title=TITLES[model])


def draw_pair(names: Sequence[str], path: Path, each: int = 4) -> None:
    """Pictures of the first `each` held-out prompts of every category by two models, from the same seeds, as
    in evaluate.py's report: a row of the first one's, below it the second one's of the same, and again."""
    cells = []  # (picture, caption)
    for name, when in zip(names, ("before", "after")):
        model = load(name)
        world = world_of(model, "test")
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
    parser = argparse.ArgumentParser(description="tables and figures of the race")
    parser.add_argument("--results", default=FIGURES / "race.json", help="of race.py")
    parser.add_argument("--pair", nargs=2, metavar="MODEL", help="draw front.png instead: before, after")
    args = parser.parse_args()
    path = Path(args.results)
    if args.pair:
        draw_pair(args.pair, path.with_name("front.png"))
        return print(f"look at {path.with_name('front.png')}: {args.pair[0]} above, {args.pair[1]} below")
    results = read_results(path)
    write_tables(results, path.with_suffix(".md"))
    figures(results, path.parent)
    print(f"{len(results)} results; look at {path.with_suffix('.md')} and {path.parent}/*.png")


if __name__ == "__main__":
    run(main)
