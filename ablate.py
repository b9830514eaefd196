"""Every setting of the method on both tiny models, five seeds each: one command that can be stopped and called again.

    python ablate.py                                     # what is missing of all the runs, one on each core; hours
    python ablate.py --models tiny --cells grpo sft --seeds 2
    python ablate.py --report                            # tables and figures of the results at hand, no run

A run is a call of grpo.py or sft.py on one core, with the flags that stand in figures/ablation.json beside its result; it
is much shorter than the scripts' defaults, so that all of them fit an evening. A run that was cut off goes on from its
checkpoint. Results are in figures/ablation.json, one line a run, with versions and machine; what is there is not run again.
From it come

    figures/ablation.md     the tables: mean over seeds and a 95 % confidence interval (Student's t)
    figures/ablation.png    every setting's change of the detector's score, seed by seed
    figures/learning.png    the detector's score against images drawn and against minutes
    figures/hacking.png     a run that talks itself into its pictures beside one that does not

The figures need matplotlib, nothing else does.
"""

import argparse
import json
import math
import os
import queue
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluate import versions, write_whole
from model import UserError
from reward import TAGS
from sample import ShortHelp, positive, run
from watch import falls

HERE = Path(__file__).parent
MODELS = ("tiny", "tiny-show-o")
SEEDS = 5
# Images a step, and what all runs of a model have in common.
IMAGES = {"tiny": 96, "tiny-show-o": 96}
COMMON = {"tiny": "--steps 30 --warmup 2 --eval-images 2", "tiny-show-o": "--steps 16 --warmup 2 --eval-images 2"}
LR = {"tiny": "1.2e-4", "tiny-show-o": "6e-4"}  # of GRPO; a shorter run wants another one than a long one
WATCHED = ("grpo", "grpo end-to-end", "sft", "sft end-to-end", "sft, answers trained", "broken")  # measured on the way, too

# ---------------------------------------------------------------------------------------------------------------------
# What is run


def cells(model: str) -> dict[str, tuple[str, str]]:
    """Of every setting the script and the flags besides COMMON."""
    images = IMAGES[model]

    def grpo(flags: str = "", group: int = 12) -> tuple[str, str]:
        return "grpo.py", f"--prompts {images // group} --group {group} --lr {LR[model]} {flags}"

    def sft(flags: str = "") -> tuple[str, str]:
        return "sft.py", f"--prompts {images} --lr 2e-4 {flags}"

    # Where guidance is off, its log-probabilities are one; so a Show-o's are compared at w = 1.
    guided = "" if model == "tiny" else "--guidance 1"
    return {
        "grpo": grpo(),
        "sft": sft(),
        "grpo end-to-end": grpo("--mode end-to-end --lr 3e-5"),
        "sft end-to-end": sft("--mode end-to-end --lr 3e-5"),
        **({} if model == "tiny" else {"guidance 1": grpo("--guidance 1")}),
        "detached": grpo(f"{guided} --logprob detached"),
        "conditional": grpo(f"{guided} --logprob conditional"),
        "partial": grpo("--reward partial"),
        "likelihood": grpo("--reward likelihood"),
        "beta 0": grpo("--beta 0"),
        "beta 0.1": grpo("--beta 0.1"),
        "answers trained": grpo("--answer-weight 0.3"),
        "sft, answers trained": sft("--answer-weight 1"),
        **({} if model == "tiny" else {"broken": grpo("--answer-weight 3 --beta 0")}),
        "group 4": grpo(group=4),
        "group 8": grpo(group=8),
        "group 16": grpo(group=16),
        **({"guidance 2": grpo("--guidance 2"), "guidance 5": grpo("--guidance 5")} if model == "tiny" else
           {"guidance 2": grpo("--guidance 2")}),
    }


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
    }


NAMES = {  # of cells as the tables say them, where that is not their own name
    "grpo": "GRPO two-stage", "grpo end-to-end": "GRPO end-to-end", "sft": "SFT two-stage", "sft end-to-end": "SFT end-to-end",
    "answers trained": "GRPO, answer weight 0.3", "broken": "GRPO, answer weight 3, beta 0",
    "sft, answers trained": "SFT, answer weight 1",
}


@dataclass(frozen=True)
class Job:
    """A run: a cell with a seed."""

    model: str
    cell: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.model}/{self.cell.replace(', ', '-').replace(' ', '-')}/seed{self.seed}"

    @property
    def command(self) -> list[str]:
        script, flags = cells(self.model)[self.cell]
        watch = 5 if self.cell in WATCHED else 0
        return [script, *shlex.split(f"--model {self.model} {COMMON[self.model]} {flags} --eval-every {watch} "
                                     f"--seed {self.seed}")]


def perform(job: Job, runs: Path, cores: queue.Queue) -> dict | None:
    """Runs the job on a core of its own, from its checkpoint if it was begun before; the result, or None where it was
    interrupted."""
    folder, core = runs / job.folder, cores.get()
    start = runs / job.model / f"start-{guidance_of(job)}"  # the same for all runs that begin there: measured once
    if not (folder / "args.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if (start / "before.json").exists():
            shutil.copytree(start, folder, dirs_exist_ok=True)
        command = [*job.command, "--out", str(folder)]
    else:
        command = [job.command[0], "--resume", str(folder)]
    pin = (lambda: os.sched_setaffinity(0, {core})) if hasattr(os, "sched_setaffinity") else None
    with open(f"{folder}.log", "ab") as log:
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=pin)
    cores.put(core)
    if (folder / "summary.json").exists():
        if not start.exists():
            fresh = start.with_name(f"{start.name}.partial{core}")
            fresh.mkdir()
            for name in ("before.png", "before.json"):
                shutil.copy(folder / name, fresh)
            fresh.rename(start) if not start.exists() else shutil.rmtree(fresh)
        shutil.rmtree(folder / f"step_{len(metrics(folder)):06d}", ignore_errors=True)  # 15 MB that nobody looks at
        return record(job, folder)
    if done.returncode in (0, 130, -2, -15):  # it was told to stop
        return None
    last = Path(f"{folder}.log").read_text(errors="replace").strip().splitlines()[-1]
    if not last.startswith("error: stopped at step"):
        raise UserError(f"{' '.join(command)} failed: {last} ({folder}.log)")
    return {**record(job, folder), "stopped": last.removeprefix("error: ")}


def guidance_of(job: Job) -> str:
    """The guidance that the run asks for, or "default"."""
    return job.command[job.command.index("--guidance") + 1] if "--guidance" in job.command else "default"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(job: Job, folder: Path) -> dict:
    """What is kept of a run."""
    lines, path = metrics(folder), folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"before": json.loads((folder / "before.json").read_text())}
    short = lambda value: None if value is None else round(value, 4)

    def scores(s: dict) -> dict:
        return {"generation": {k: short(v) for k, v in s["generation"].items()},
                **{k: short(s["understanding"][k]) for k in ("ground_truth", "own_images")},
                **{k: short(s["imbalance"][k]) for k in ("answered_given_drawn", "drawn_given_answered", "disagreement")}}

    watched = [(line["step"], *(short(line["held_out"][k]) for k in ("detector", "self_reward", "true_pictures")))
               for line in lines if "held_out" in line]
    return {
        "model": job.model, "cell": job.cell, "seed": job.seed, "command": " ".join(job.command),
        "images": IMAGES[job.model], **{key: scores(summary[key]) for key in ("before", "after") if key in summary},
        "reward": [short(line["reward"]) for line in lines], "kl": short(lines[-1]["kl_image"]),
        "entropy": [short(lines[at]["entropy_image"]) for at in (0, -1)], "held_out": watched,
        "seconds": [round(line["seconds"], 2) for line in lines],
    }


def write_results(path: Path, results: list[dict]) -> None:
    """The results, a line each, after what they were made with."""
    order = {job: i for i, job in enumerate(jobs(MODELS, None, 1000))}
    results = sorted(results, key=lambda r: order[Job(r["model"], r["cell"], r["seed"])])
    text = json.dumps({"versions": versions(), "common": COMMON})[:-1]
    write_whole(path, text + ', "runs": [\n' + ",\n".join(map(json.dumps, results)) + "\n]}\n")


def jobs(models: Iterable[str], chosen: Sequence[str] | None, seeds: int) -> list[Job]:
    """All runs, every cell with seed 0 first, so that a stop leaves as even a picture as there can be."""
    return [Job(model, cell, seed) for seed in range(seeds) for cell in {**cells("tiny"), **cells("tiny-show-o")}
            for model in models if cell in cells(model) and cell in (chosen or (cell,))]


def perform_all(wanted: list[Job], path: Path, runs: Path) -> None:
    """Runs what is not among the results yet, and adds it there as it comes."""
    results = read_results(path)["runs"] if path.exists() else []
    known = {(r["model"], r["cell"], r["seed"]): r["command"] for r in results}
    for job in wanted:
        if known.get((job.model, job.cell, job.seed), " ".join(job.command)) != " ".join(job.command):
            raise UserError(f"{path}: {job.cell} of {job.model} was run with other flags; give another --results")
    wanted = [job for job in wanted if (job.model, job.cell, job.seed) not in known]
    cores = queue.Queue()
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    for core in usable:
        cores.put(core)
    bar = tqdm(total=len(wanted), desc="runs", unit="run", smoothing=0)
    with ThreadPoolExecutor(len(usable)) as pool:
        futures = [pool.submit(perform, job, runs, cores) for job in wanted]
        try:
            for future in as_completed(futures):
                if result := future.result():
                    results.append(result)
                    write_results(path, results)
                bar.update()
        except BaseException:  # the runs that are on get the same signal and save; the others are not begun
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------------------------
# Tables

METHODS = {"grpo": ("GRPO two-stage", "#2b6cd9"), "sft": ("SFT two-stage", "#3a9d5d"),
           "grpo end-to-end": ("GRPO end-to-end", "#d9822b"), "sft end-to-end": ("SFT end-to-end", "#a04fb5")}
TITLES = {"tiny": "tiny Janus", "tiny-show-o": "tiny Show-o"}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantiles, 1 to 9 degrees of freedom


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval; nan of fewer than two values."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.nan
    return float(values.mean()), STUDENT[len(values) - 2] * float(values.std(ddof=1)) / math.sqrt(len(values))


def read_results(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds no results ({error})") from None


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


def category_table(results: list[dict], model: str) -> list[str]:
    """The four methods' changes of the detector's score in each category."""
    rows = [f"| | {' | '.join(TAGS)} |", "|---|" + "---|" * len(TAGS)]
    for name, (label, _) in METHODS.items():
        if found := of_cell(results, model, name).values():
            changes = [signed([r["after"]["generation"][tag] - r["before"]["generation"][tag] for r in found]) for tag in TAGS]
            rows.append(f"| {label} | {' | '.join(changes)} |")
    return rows


def settings_table(results: list[dict]) -> list[str]:
    """The other settings of both models in one table: the change of the detector's score beyond the table's first row,
    seed by seed, and what stood out."""
    rows = ["| | tiny Janus | tiny Show-o |", "|---|---|---|"]
    for title in list(tables("tiny"))[1:]:
        rows.append(f"| *{title}* | | |")
        names = {model: tables(model)[title] for model in MODELS}
        for name in dict.fromkeys(name for model in MODELS for name in names[model][1:]):
            row = []
            for model in MODELS:
                first, found = of_cell(results, model, names[model][0]), of_cell(results, model, name)
                pairs = [change(r, "detector") - change(first[seed], "detector") for seed, r in found.items() if seed in first]
                row.append(signed(pairs) if name in names[model] else "")
            rows.append(f"| {NAMES.get(name, name)} | {' | '.join(row)} |")
    return rows


def write_readme(content: dict, path: Path) -> None:
    """Puts the two tables of README.md between their marks."""
    results, text = content["runs"], path.read_text()
    for mark, lines in (("methods", methods_table(results)), ("settings", settings_table(results))):
        start, end = f"<!-- {mark}: written by ablate.py -->\n", f"<!-- end of {mark} -->"
        before, rest = text.split(start)
        text = before + start + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1]
    write_whole(path, text)


def methods_table(results: list[dict]) -> list[str]:
    """The four methods on both models: the scores at the start, and their changes."""
    keys = ("detector", "own_images", "ground_truth", "disagreement")
    rows = ["| | seeds | detector | own pictures understood | true pictures understood | the two disagree | minutes |",
            "|---|---|---|---|---|---|---|"]
    for model in MODELS:
        start = of_cell(results, model, "grpo")
        if not start:
            continue
        scores = next(iter(start.values()))["before"]
        values = [scores["generation"]["overall"], *(scores[key] for key in keys[1:])]
        rows.append(f"| **{TITLES[model]}**, start | | {' | '.join(f'{value:.3f}' for value in values)} | |")
        for name in METHODS:
            if found := of_cell(results, model, name):
                minutes = np.mean([sum(r["seconds"]) for r in found.values()]) / 60
                changes = [signed([change(r, key) for r in found.values()]) for key in keys]
                rows.append(f"| {METHODS[name][0]} | {len(found)} | {' | '.join(changes)} | {minutes:.1f} |")
    return rows


def write_tables(content: dict, path: Path) -> None:
    """All tables of all models."""
    lines = ["# Ablations on the tiny models", "",
             "Written by `python ablate.py --report` from `ablation.json`. Mean over seeds ± half a 95 % confidence interval "
             "(Student's t); 240 images of 120 held-out prompts before and after. Minutes are those of the training steps, on "
             "one core.", ""]
    for model in MODELS:
        lines += [f"## {model}: `{content['common'][model]}`, {IMAGES[model]} images a step", ""]
        for title, names in tables(model).items():
            lines += [f"**{title}**", "", *table(content["runs"], model, names), ""]
        lines += ["**The detector's score by category, change**", "", *category_table(content["runs"], model), ""]
    made_with = ", ".join(f"{key} {value}" for key, value in content["versions"].items())
    write_whole(path, "\n".join([*lines, f"Made with {made_with}; a run had one core.", ""]))


# ---------------------------------------------------------------------------------------------------------------------
# Figures



def figures(content: dict, folder: Path) -> None:
    """The three figures."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{folder}/ablation.md is written; the figures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 110}
    for name, draw in (("ablation", draw_cells), ("learning", draw_learning), ("hacking", draw_hacking)):
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
            values = [change(r, "detector") for r in of_cell(results, model, name).values()]
            mean, half = interval(values)
            axis.plot(values, [row] * len(values), "o", color="#2b6cd9", alpha=0.35, markersize=3, markeredgewidth=0)
            axis.plot([mean - half, mean + half], [row, row], color="#222222", linewidth=1.2)
            axis.plot(mean, row, "|", color="#222222", markersize=8)
        if of_cell(results, model, "grpo"):
            axis.axvline(interval([change(r, "detector") for r in of_cell(results, model, "grpo").values()])[0],
                         color="#2b6cd9", linewidth=0.6, linestyle=":")
        axis.axvline(0, color="#999999", linewidth=0.6)
        axis.set(yticks=range(len(names)), yticklabels=names, title=TITLES[model], xlabel="change of the detector's score")
        axis.invert_yaxis()
    return figure


def held_out_curve(result: dict, column: int) -> list[tuple[int, float]]:
    """(step, score) from the start to the end; columns as of `record`: 1 detector, 2 own pictures, 3 true pictures."""
    ends = [result[when] for when in ("before", "after")]
    values = [s["generation"]["overall"] if column == 1 else s[("own_images", "ground_truth")[column - 2]] for s in ends]
    return [(0, values[0]), *((row[0], row[column]) for row in result["held_out"]), (len(result["reward"]), values[1])]


def draw_learning(pyplot, results: list[dict]):
    """The detector's score of the four methods, mean and interval over seeds, against images and minutes."""
    figure, axes = pyplot.subplots(len(MODELS), 2, figsize=(9, 5), sharey="row")
    for row, model in zip(axes, MODELS):
        for name, (label, color) in METHODS.items():
            found = list(of_cell(results, model, name).values())
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
    axes[0][0].legend(frameon=False)
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
        axis.set(title=f"tiny Show-o\n{NAMES[name]}", xlabel="steps", ylim=(0, 1.03))
    handles, labels = axes[0].get_legend_handles_labels()
    axes[0].legend(handles[:3], labels[:3], frameon=False, fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description="ablations on the tiny models", allow_abbrev=False, formatter_class=ShortHelp
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--cells", nargs="+", metavar="CELL", help=f"of {', '.join({**cells('tiny'), **cells('tiny-show-o')})} (default: all)")
    add("--seeds", type=positive(int), default=SEEDS, help=f"0 to N - 1 (default: {SEEDS})")
    add("--runs", default="runs/ablation", help="where the runs go (default: runs/ablation)")
    add("--results", default=str(HERE / "figures" / "ablation.json"), help="(default: figures/ablation.json)")
    add("--report", action="store_true", help="run nothing: tables and figures of the results")
    args = parser.parse_args()
    if unknown := set(args.cells or ()) - {*cells("tiny"), *cells("tiny-show-o")}:
        parser.error(f"--cells {min(unknown)!r}: there is no such cell")
    path, runs = Path(args.results), Path(args.runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not args.report:
        perform_all(jobs(args.models, args.cells, args.seeds), path, runs)
    content = read_results(path)
    write_tables(content, path.with_suffix(".md"))
    if path.parent == HERE / "figures":
        write_readme(content, HERE / "README.md")
    figures(content, path.parent)
    print(f"{len(content['runs'])} runs in {path}; look at {path.with_suffix('.md')} and {path.parent}/*.png")


if __name__ == "__main__":
    run(main)
