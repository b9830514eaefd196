"""Every setting of the method on both tiny models, five seeds each: one command that can be stopped any time.

    python -m experiments.ablate                            # all that is missing, a run on each core; hours
    python -m experiments.ablate --models tiny --cells grpo sft --seeds 2

A run is a call of grpo.py or sft.py on one thread, with the flags that stand beside its result. Most are much
shorter than the scripts' defaults, so that all fit an evening; the "full" ones are these defaults. A run that
was cut off goes on from its checkpoint; one whose result is there is not run again. Tables and figures are
report.py's. (figures/ablation.json is of an earlier state of the code and has flags that are gone, so results
go elsewhere until somebody replaces it: RESULTS.md.)
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from evaluate import versions
from model import UserError, read_json
from sample import ShortHelp, positive, run, write_whole

ROOT = Path(__file__).parents[1]
MODELS = ("tiny", "tiny-show-o")
SEEDS = 5
IMAGES = 96  # a step, of all runs but the full ones
STEPS = {"tiny": 30, "tiny-show-o": 16}
COMMON = {model: f"--steps {count} --eval-images 2" for model, count in STEPS.items()}
LR = {"tiny": "1.2e-4", "tiny-show-o": "6e-4"}  # of GRPO; a shorter run wants another one than a long one
WATCHED = [f"{script}{mode}" for script in ("grpo", "sft") for mode in ("", " end-to-end")]  # on the way, too
WATCHED += ["sft, answers trained", "broken"]

# ---- what is run -------------------------------------------------------------------------------------------

def cells(model: str) -> dict[str, tuple[str, str]]:
    """Of every setting the script and its own flags."""

    def grpo(flags: str = "", group: int = 12) -> tuple[str, str]:
        return "grpo.py", f"--prompts {IMAGES // group} --group {group} --lr {LR[model]} {flags}"

    def sft(flags: str = "") -> tuple[str, str]:
        return "sft.py", f"--prompts {IMAGES} --lr 2e-4 {flags}"

    janus = model == "tiny"
    # Where guidance is off, its log-probabilities are one; so a Show-o's are compared at w = 1.
    guided = "" if janus else "--guidance 1"
    return {
        "grpo": grpo(),
        "sft": sft(),
        "grpo end-to-end": grpo("--mode end-to-end --lr 3e-5"),
        "sft end-to-end": sft("--mode end-to-end --lr 3e-5"),
        **({} if janus else {"guidance 1": grpo("--guidance 1")}),
        "detached": grpo(f"{guided} --logprob detached"),
        "conditional": grpo(f"{guided} --logprob conditional"),
        "partial": grpo("--reward partial"),
        "likelihood": grpo("--reward likelihood"),
        "beta 0": grpo("--beta 0"),
        "beta 0.1": grpo("--beta 0.1"),
        "answers trained": grpo("--answer-weight 0.3"),
        "sft, answers trained": sft("--answer-weight 1"),
        **({} if janus else {"broken": grpo("--answer-weight 3 --beta 0")}),
        **{f"group {size}": grpo(group=size) for size in (4, 8, 16)},
        "guidance 2": grpo("--guidance 2"),
        **({"guidance 5": grpo("--guidance 5")} if janus else {}),
        **{f"full {name}": (f"{name}.py", "") for name in ("grpo", "sft")},
        **{f"full {name} end-to-end": (f"{name}.py", "--mode end-to-end") for name in ("grpo", "sft")},
    }


ALL = list(cells("tiny") | cells("tiny-show-o"))


class Job(NamedTuple):
    """A run: a cell with a seed."""

    model: str
    cell: str
    seed: int

    def command(self) -> str:
        script, flags = cells(self.model)[self.cell]
        if not self.cell.startswith("full "):
            every = 5 if self.cell in WATCHED else STEPS[self.model]
            flags = f"{COMMON[self.model]} --eval-every {every} {flags}"
        return shlex.join([script, "--model", self.model, *flags.split(), "--seed", str(self.seed)])


def jobs(models: Iterable[str], chosen: Sequence[str] | None, seeds: int) -> list[Job]:
    """All runs, every cell with seed 0 first, so that a stop leaves as even a picture as there can be."""
    places = [(seed, cell, model) for seed in range(seeds) for cell in chosen or ALL for model in models]
    return [Job(model, cell, seed) for seed, cell, model in places if cell in cells(model)]


def perform(job: Job, runs: Path) -> dict | None:
    """The job's result, for which it is run, or goes on from its checkpoint, if it has not ended before; None
    where it was interrupted. Raises UserError where it was begun with other flags, or fails."""
    folder, code = runs / job.model / job.cell.replace(",", "").replace(" ", "-") / f"seed{job.seed}", 0
    told, log, command = folder.with_suffix(".command"), folder.with_suffix(".log"), job.command()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if told.exists() and told.read_text() != command:
        raise UserError(f"{folder} was begun with other flags; give another --runs")
    told.write_text(command)
    if not (folder / "summary.json").exists():
        script, *flags = shlex.split(command)
        begun = (folder / "args.json").exists()
        flags = ["--resume", str(folder)] if begun else [*flags, "--out", str(folder)]
        with open(log, "ab") as out:
            code = subprocess.run([sys.executable, str(ROOT / script), *flags], stdout=out, stderr=out,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if (folder / "summary.json").exists():
        for left in folder.glob("step_*"):  # 15 MB each, which nobody looks at
            shutil.rmtree(left)
        return record(job, folder)
    if code in (0, 130, -2, -15):  # it was told to stop
        return None
    last = ["it said nothing", *log.read_text(errors="replace").strip().splitlines()][-1]
    if not last.startswith("error: stopped at step"):
        raise UserError(f"{command} failed: {last} ({log})")
    return {**record(job, folder), "stopped": last.removeprefix("error: ")}


def record(job: Job, folder: Path) -> dict:
    """What is kept of a run."""
    short = lambda value: None if value is None else round(value, 4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    args, path = read_json(folder / "args.json"), folder / "summary.json"
    summary = read_json(path) if path.exists() else {"before": read_json(folder / "before.json")}
    images = args["prompts"] * args["group"]
    kept = {**job._asdict(), "command": job.command(), "versions": versions(), "images": images}
    for when in summary.keys() & {"before", "after"}:
        scores = summary[when]
        kept[when] = {"generation": {tag: short(value) for tag, value in scores["generation"].items()}}
        others = {**scores["understanding"], **scores["imbalance"]}
        kept[when] |= {name: short(value) for name, value in others.items() if not name.endswith("_category")}
    kept["held_out"] = []
    for step, scores in ((line["step"], line["held_out"]) for line in lines if "held_out" in line):
        measured = [scores[key] for key in ("detector", "self_reward", "true_pictures")]
        kept["held_out"].append((step, *map(short, measured)))
    for name in ("reward", "kl_image", "entropy_image", "seconds"):
        kept[name] = [short(line[name]) for line in lines]
    return kept


def read_results(path: Path) -> dict:
    """What `write_results` wrote. Raises UserError where the file holds something else, or is not there."""
    content = read_json(path)
    if not content.keys() >= {"common", "runs"}:
        raise UserError(f"{path}: holds no results of ablate.py")
    return content


def write_results(path: Path, results: list[dict]) -> None:
    """The results, a line each, by seed, in the order of the cells."""
    order = lambda result: (result["seed"], ALL.index(result["cell"]), MODELS.index(result["model"]))
    lines = ",\n".join(json.dumps(result) for result in sorted(results, key=order))
    write_whole(path, f'{{"common": {json.dumps(COMMON)}, "runs": [\n{lines}\n]}}\n')


def perform_all(wanted: list[Job], path: Path, runs: Path) -> None:
    """Runs what is not among the results yet, and adds it there as it comes."""
    results = read_results(path)["runs"] if path.exists() else []
    known = {Job(r["model"], r["cell"], r["seed"]): r["command"] for r in results}
    for job in wanted:
        if known.get(job, job.command()) != job.command():
            raise UserError(f"{path}: {job} was run with other flags; give another --results and --runs")
    missing = [job for job in wanted if job not in known]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    bar = tqdm(total=len(missing), desc="runs", unit="run", smoothing=0)
    with ThreadPoolExecutor(cores) as pool:
        futures = [pool.submit(perform, job, runs) for job in missing]
        try:
            for future in as_completed(futures):
                if result := future.result():
                    results.append(result)
                    write_results(path, results)
                bar.update()
        except BaseException:  # no other run begins; those that are on save, or end as they would
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description="ablations on the tiny models", formatter_class=ShortHelp)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--cells", nargs="+", metavar="CELL", help=f"of {', '.join(map(repr, ALL))} (default: all)")
    add("--seeds", type=positive(int), default=SEEDS, help=f"0 to N - 1 (default: {SEEDS})")
    add("--runs", default="runs/ablation", help="where the runs go (default: runs/ablation)")
    add("--results", default="runs/ablation/ablation.json", help="(default: runs/ablation/ablation.json)")
    args = parser.parse_args()
    if unknown := set(args.cells or ()) - set(ALL):
        parser.error(f"--cells {min(unknown)!r}: there is no such cell")
    path = Path(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    perform_all(jobs(args.models, args.cells, args.seeds), path, Path(args.runs))
    print(f"results are in {path}; next: python -m experiments.report --results {path}")


if __name__ == "__main__":
    run(main)
