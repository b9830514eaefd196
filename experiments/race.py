"""The four methods on both tiny models, each at its own best setting; the oracle and other estimators beside
them: one command that can be stopped at any time.

    python -m experiments.race                               # all that is missing, a run on each core; hours
    python -m experiments.race --models tiny --cells grpo sft

1. Each model's guidance: where its start draws best. All train at that, their checkpoint's own.
2. Search: with seed 0 every cell tries five learning rates a factor of two apart, and on if the best is the
   last or first; at the best rate two more values of a setting of its own. 3,072 images a run, scored by the
   detector on validation prompts.
3. Race: the chosen setting with seeds 1 to 3, 12,000 images a run. What comes out is scored on test prompts,
   which nothing before looked at: at the guidance of the training, and at the one of those in GUIDANCES at
   which it draws best on validation prompts. So is the start.

A run is a call of grpo.py or sft.py on one thread, with the flags that stand beside its result. One that was
cut off goes on from its checkpoint; one whose result is there is not run again. Tables and figures are
report.py's.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluate import evaluate, versions, world_of
from model import UserError, load, read_json
from reward import TAGS
from sample import ShortHelp, pick_device, run, write_whole

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "figures" / "race.json"
GUIDANCES = {"tiny": (1, 1.5, 2, 3, 5), "tiny-show-o": (0, 1, 2, 3, 5)}
MODELS = tuple(GUIDANCES)
SEEDS = range(1, 4)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
IMAGES = 96  # a step
SEARCH, RACE = 32, 125  # steps

# ---- what is run -------------------------------------------------------------------------------------------

RATES = tuple(5e-5 * 2**k for k in range(5))
GROUP = "--prompts 16 --group 6", "--prompts 4 --group 24"


class Cell(NamedTuple):
    """What takes part in the race."""

    script: str  # and what it is given before its flags
    flags: str  # what makes it this cell
    others: tuple[str, str] = GROUP  # two values of a setting of its own, beside the default
    rates: tuple[float, ...] = RATES  # the first that are tried
    tier: int = 0  # lower ones are run first
    models: tuple[str, ...] = MODELS
    races: bool = True  # its search leaves something to race for
    settings_of: str = ""  # the cell whose chosen setting it has, instead of a search of its own


BUFFER, SOFT = ("--buffer 200", "--buffer 600"), ("--soft 0", "--soft 1")
ANSWERS = "--answer-weight 0.1", "--answer-weight 1"
BRANCHES = "--logprob guided", "--logprob detached"
GRPO, SFT = f"--prompts {IMAGES // 12} --group 12", f"--prompts {IMAGES}"
LOWER = tuple(rate / 2 for rate in RATES)
LEAST = 1e-5  # what does best at a rate near this one does best unlearned
JANUS, SHOW_O = MODELS[:1], MODELS[1:]
# Steps of pretraining, which make the better judges: runs/judges/tiny-800 is what
# `python -m tiny.pretrain --clean 800 --steps 800 --out runs/judges/tiny-800` writes.
JUDGES = 400, 600, 800, 1200, 2000, 2800
CELLS = {
    "grpo": Cell("grpo.py", GRPO),
    "sft": Cell("sft.py", SFT, BUFFER),
    "grpo answers": Cell("grpo.py", f"{GRPO} --answer-weight 0.3", ANSWERS),
    "grpo end-to-end": Cell("grpo.py", f"{GRPO} --mode end-to-end", SOFT, LOWER),
    "sft end-to-end": Cell("sft.py", f"{SFT} --mode end-to-end", SOFT, LOWER),
    "oracle": Cell("grpo.py", f"{GRPO} --reward oracle", tier=1),
    "replay 1": Cell("grpo.py", f"{GRPO} --replay-steps 1", tier=2, models=SHOW_O),
    "replay all": Cell("grpo.py", f"{GRPO} --replay-steps 0", tier=2, models=SHOW_O),
    "remask": Cell("grpo.py", f"{GRPO} --estimator remask", BRANCHES, tier=2, models=SHOW_O),
    "sft replay": Cell("sft.py", f"{SFT} --estimator replay", BUFFER, tier=2, models=SHOW_O, races=False),
    **{f"judge {steps}": Cell(f"experiments/judged.py runs/judges/tiny-{steps}", GRPO, tier=3, models=JANUS,
                              settings_of="grpo") for steps in JUDGES},
}
# Of the Show-o's SFT a short run cannot choose the buffer, which only longer ones fill.
OTHERS = {("tiny-show-o", "sft"): ("--beta 0.1", "--beta 1")}


class Job(NamedTuple):
    """A run: of the start alone where there is no cell; a search's where the seed is 0."""

    model: str
    cell: str = ""
    rate: float = 0.0
    other: str = ""
    seed: int = 0

    def flags(self) -> list[str]:
        steps = RACE if self.seed else SEARCH
        watch = f"--eval-every {RACE // 5} --eval-images 2" if self.seed else "--eval-every 0"
        flags = f"{CELLS[self.cell].flags} --lr {self.rate:g} {self.other} --steps {steps} {watch} --model "
        return f"{flags} {self.model} --seed {self.seed} --save-every 25 --keep 1 --no-compile".split()

    def command(self) -> str:
        return " ".join([CELLS[self.cell].script, *self.flags()])

    def folder(self, runs: Path) -> Path:
        setting = "-".join([f"{self.rate:g}", *self.other.replace("--", "").split()])
        return runs / self.model / self.cell.replace(" ", "-") / setting / f"seed{self.seed}"


def search(model: str, name: str, scores: dict[Job, float]) -> list[Job]:
    """The runs of a cell's search, those that can begin and those that have a score; the chosen one alone
    once all have."""
    cell = CELLS[name]
    tried = [job.rate for job in scores if job[:2] == (model, name)]
    rates = sorted({*cell.rates, *tried})
    jobs = [Job(model, name, rate) for rate in rates]
    if not all(job in scores for job in jobs):
        return jobs
    best = max(jobs, key=scores.get)
    if best.rate == rates[-1] or best.rate == rates[0] and best.rate > 2 * LEAST:
        return [best._replace(rate=best.rate * (0.5 if best.rate == rates[0] else 2))]
    jobs += [best._replace(other=other) for other in OTHERS.get((model, name), cell.others)]
    if not all(job in scores for job in jobs):
        return jobs
    return [max(jobs, key=scores.get)]


def missing(model: str, name: str, scores: dict[Job, float]) -> list[Job]:
    """The runs of a cell that can begin and have no score yet."""
    jobs = search(model, CELLS[name].settings_of or name, scores)
    if len(jobs) == 1 and jobs[0] in scores:
        jobs = [jobs[0]._replace(cell=name, seed=seed) for seed in SEEDS if CELLS[name].races]
    elif CELLS[name].settings_of:  # that cell's search comes first
        return []
    return [job for job in jobs if job not in scores]


def plan(models: list[str], names: list[str], scores: dict[Job, float]) -> list[Job]:
    """All runs that can begin, the first ones first: starts, searches, then seed by seed, so that a stop
    leaves as even a picture as there can be."""
    jobs = [Job(model) for model in models if Job(model) not in scores]
    jobs += [job for name in names for model in models if model in CELLS[name].models
             for job in missing(model, name, scores)]
    tier = lambda job: CELLS[job.cell].tier if job.cell else 0
    return sorted(jobs, key=lambda job: (tier(job), job.seed))


# ---- a run and its scores ----------------------------------------------------------------------------------

def diversity(records: list[dict]) -> float:
    """Share of codes in which two pictures of one prompt differ, mean over prompts."""
    drawn, shares = defaultdict(list), []
    for record in records:
        drawn[record["prompt"]].append(record["codes"])
    for rows in map(np.stack, drawn.values()):  # [n, N]
        same = (rows[:, None] == rows).mean(-1)  # [n, n], 1 on the diagonal
        shares.append((1 - same).sum() / (len(rows) * (len(rows) - 1)))
    return float(np.mean(shares))


def measured(model, part: str, guidance: float, images_per_prompt: int) -> dict[str, float]:
    """What is kept of the scores on half of the held-out prompts; true pictures, whose answers are the same
    at any guidance, are asked about with the test prompts only."""
    world = world_of(model, part)
    if part == "validation":
        world.render = None
    scores, records = evaluate(
        model, world, guidance, images_per_prompt=images_per_prompt, batch=96,
        seed={"validation": 0, "test": 1}[part], compiled=False, progress=f"{part}, guidance {guidance:g}",
    )
    generation, understanding = scores["generation"], scores["understanding"]
    kept = {
        "detector": generation["overall"], **{tag: generation[tag] for tag in TAGS},
        "own": understanding["own_images"], "true": understanding["ground_truth"],
        **{f"true {tag}": share for tag, share in understanding["ground_truth_by_category"].items()},
        "disagree": scores["imbalance"]["disagreement"], "diversity": diversity(records),
    }
    return {name: round(value, 4) for name, value in kept.items() if value is not None}


def score_model(job: Job, folder: str) -> dict:
    """The scores of a checkpoint: at its own guidance on validation prompts after a search; else of all
    guidances there, and on test prompts at its own and the best one."""
    model = load(folder, pick_device())
    if job.cell and not job.seed:
        return {"validation": {f"{model.guidance:g}": measured(model, "validation", model.guidance, 6)}}
    scan = {f"{w:g}": measured(model, "validation", w, 4) for w in GUIDANCES[job.model]}
    best = max(scan, key=lambda w: scan[w]["detector"])
    own, images = f"{model.guidance:g}", 6 if job.cell else 24  # every change is measured from the start
    test = {w: measured(model, "test", float(w), images) for w in {own, best}}
    if not job.cell:  # and true pictures are to be the same ones
        fewer = measured(model, "test", model.guidance, 6)
        for scores in test.values():
            scores |= {key: value for key, value in fewer.items() if key.startswith("true")}
    return {"validation": scan, "test": test, "guidance": own, "best": best}


def perform(job: Job, runs: Path) -> dict | None:
    """The job's result, for which it is run, or goes on from its checkpoint, if it has not ended before; None
    where it was interrupted. Raises UserError where it fails."""
    torch.set_num_threads(1)
    result = {**job._asdict(), "versions": versions()}
    if not job.cell:
        return {**result, **score_model(job, job.model)}
    command, folder = job.command(), job.folder(runs)
    script, *given = CELLS[job.cell].script.split()
    log, result["command"] = folder.with_suffix(".log"), command
    if not (folder / "summary.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        begun = (folder / "args.json").exists()
        flags = ["--resume", str(folder)] if begun else [*job.flags(), "--out", str(folder)]
        with open(log, "ab") as out:
            code = subprocess.run([sys.executable, str(ROOT / script), *given, *flags], stdout=out,
                                  stderr=out, env={**os.environ, **ENVIRONMENT}).returncode
        if not (folder / "summary.json").exists():
            if code in (0, 130, -2, -15):  # it was told to stop
                return None
            last = ["it said nothing", *log.read_text(errors="replace").strip().splitlines()][-1]
            if not last.startswith("error: stopped at step"):
                raise UserError(f"{command} failed: {last} ({log})")
            return {**result, "stopped": last.removeprefix("error: ")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result["seconds"] = round(sum(line["seconds"] for line in lines), 1)
    result["reward"] = [round(line["reward"], 3) for line in lines]
    keys = "detector", "self_reward", "true_pictures"
    result["course"] = [[line["step"], *(round(line["held_out"][key], 4) for key in keys)]
                        for line in lines if "held_out" in line]
    result |= score_model(job, str(folder / f"step_{len(lines):06d}"))
    if given:  # another judged: how good is it?
        judge = load(given[0], pick_device())
        result["judge"] = measured(judge, "test", judge.guidance, 6)["true"]
    for checkpoint in folder.glob("step_*"):  # 15 MB each, which nobody looks at
        shutil.rmtree(checkpoint)
    return result


# ---- all runs ----------------------------------------------------------------------------------------------

def read_results(path: Path) -> list[dict]:
    """The results in a file. Raises UserError where it holds something else, or is not there."""
    runs = read_json(path).get("runs", [{}])
    if not all(set(Job._fields) <= run.keys() for run in runs):
        raise UserError(f"{path}: holds no results of race.py")
    return runs


def job_of(result: dict) -> Job:
    """The job that a result is of."""
    return Job(*(result[field] for field in Job._fields))


def score_of(result: dict) -> float:
    """What a search is decided by: the detector's score on validation prompts; the lowest where a run ended
    early."""
    if "stopped" in result:
        return -1.0
    return max(scores["detector"] for scores in result["validation"].values())


def perform_all(models: list[str], names: list[str], path: Path, runs: Path) -> None:
    """Runs what has no result yet, as soon as it is known what it is, and adds the results as they come."""
    results = read_results(path) if path.exists() else []
    for result in results:
        job = job_of(result)
        if result.get("command", "") != (job.command() if job.cell else ""):
            raise UserError(f"{path}: {job} was run with other flags; give another --results and --runs")
    cores, running = len(os.sched_getaffinity(0)), {}
    bar = tqdm(desc="runs", unit="run", smoothing=0)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        while True:
            scores = {job_of(result): score_of(result) for result in results}
            for job in plan(models, names, scores):
                if len(running) < cores and job not in running.values():
                    running[pool.submit(perform, job, runs)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if result := future.result():
                    results.append(result)
                    lines = ",\n".join(map(json.dumps, sorted(results, key=job_of)))
                    write_whole(path, f'{{"runs": [\n{lines}\n]}}\n')
                    bar.set_postfix_str(f"{job.model} {job.cell} {job.rate:g}: {score_of(result):.3f}")
                bar.update()


def main() -> None:
    parser = argparse.ArgumentParser(description="the race on the tiny models", formatter_class=ShortHelp)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS), metavar="CELL",
        help=f"of {', '.join(map(repr, CELLS))} (default: all)")
    add("--runs", default="runs/race", help="where the runs go (default: runs/race)")
    add("--results", default=RESULTS, help="(default: experiments/figures/race.json)")
    args = parser.parse_args()
    perform_all(args.models, args.cells, Path(args.results), Path(args.runs))
    print(f"results are in {args.results}; next: python -m experiments.report --results {args.results}")


if __name__ == "__main__":
    run(main)
