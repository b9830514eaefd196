"""Every setting of the method on both tiny models, five seeds each: one command that can be stopped and called again.

    python ablate.py                                     # what is missing of all the runs, one on each core; hours
    python ablate.py --models tiny --cells grpo sft --seeds 2

A run is a call of grpo.py or sft.py on one core, with the flags that stand in figures/ablation.json beside its result.
Most are much shorter than the scripts' defaults, so that all of them fit an evening; the "full" ones are these defaults.
A run that was cut off goes on from its checkpoint. Results are in figures/ablation.json, one line a run, with the versions
that made it; what is there is not run again. report.py makes the tables and figures of it.
"""

import argparse
import json
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

from tqdm import tqdm

from evaluate import versions, write_whole
from model import UserError
from sample import ShortHelp, positive, run

HERE = Path(__file__).parent
MODELS = ("tiny", "tiny-show-o")
SEEDS = 5
IMAGES = 96  # a step, of all runs but the full ones
COMMON = {"tiny": "--steps 30 --warmup 2 --eval-images 2", "tiny-show-o": "--steps 16 --warmup 2 --eval-images 2"}
LR = {"tiny": "1.2e-4", "tiny-show-o": "6e-4"}  # of GRPO; a shorter run wants another one than a long one
WATCHED = ("grpo", "grpo end-to-end", "sft", "sft end-to-end", "sft, answers trained", "broken")  # measured on the way, too

# ---------------------------------------------------------------------------------------------------------------------
# What is run


def cells(model: str) -> dict[str, tuple[str, str]]:
    """Of every setting the script and the flags besides COMMON, which the "full" ones go without."""

    def grpo(flags: str = "", group: int = 12) -> tuple[str, str]:
        return "grpo.py", f"--prompts {IMAGES // group} --group {group} --lr {LR[model]} {flags}"

    def sft(flags: str = "") -> tuple[str, str]:
        return "sft.py", f"--prompts {IMAGES} --lr 2e-4 {flags}"

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
        "guidance 2": grpo("--guidance 2"),
        **({"guidance 5": grpo("--guidance 5")} if model == "tiny" else {}),
        "full grpo": ("grpo.py", ""),
        "full sft": ("sft.py", ""),
        "full grpo end-to-end": ("grpo.py", "--mode end-to-end"),
        "full sft end-to-end": ("sft.py", "--mode end-to-end"),
    }


ALL = list(cells("tiny") | cells("tiny-show-o"))


@dataclass(frozen=True)
class Job:
    """A run: a cell with a seed."""

    model: str
    cell: str
    seed: int

    @property
    def full(self) -> bool:
        """Whether the run is of the length that its script has by default."""
        return self.cell.startswith("full ")

    @property
    def folder(self) -> str:
        return f"{self.model}/{self.cell.replace(', ', '-').replace(' ', '-')}/seed{self.seed}"

    @property
    def command(self) -> list[str]:
        script, flags = cells(self.model)[self.cell]
        if not self.full:
            flags = f"{COMMON[self.model]} {flags} --eval-every {5 if self.cell in WATCHED else 0}"
        return [script, *shlex.split(f"--model {self.model} {flags} --seed {self.seed}")]

    @property
    def line(self) -> str:
        """The command as it is written down."""
        return " ".join(self.command)


def call(job: Job, folder: Path, start: Path, core: int) -> int:
    """Runs the job's script on one core, from its checkpoint if it was begun before, else from the scores of the start
    where these are known; its exit code."""
    if not (folder / "args.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        Path(f"{folder}.command").write_text(job.line)
        if (start / "before.json").exists():
            shutil.copytree(start, folder, dirs_exist_ok=True)
        command = [*job.command, "--out", str(folder)]
    else:
        command = [job.command[0], "--resume", str(folder)]
    pin = (lambda: os.sched_setaffinity(0, {core})) if hasattr(os, "sched_setaffinity") else None
    with open(f"{folder}.log", "ab") as log:
        return subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], stdout=log, stderr=log,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=pin).returncode


def perform(job: Job, runs: Path, cores: queue.Queue) -> dict | None:
    """The job's result, for which it is run on a core of its own if it has not ended before; None where it was
    interrupted."""
    folder, code = runs / job.folder, 0
    begun = Path(f"{folder}.command")
    if begun.exists() and begun.read_text() != job.line:
        raise UserError(f"{folder} was begun with other flags; give another --runs")
    start = runs / job.model / f"start-{start_of(job)}"  # the same for all runs that begin there: measured once
    if not (folder / "summary.json").exists():
        core = cores.get()
        code = call(job, folder, start, core)
        cores.put(core)
    if (folder / "summary.json").exists():
        if not start.exists():
            fresh = Path(f"{folder}.start")
            fresh.mkdir(exist_ok=True)
            for name in ("before.png", "before.json"):
                shutil.copy(folder / name, fresh)
            fresh.rename(start) if not start.exists() else shutil.rmtree(fresh)
        shutil.rmtree(folder / f"step_{len(metrics(folder)):06d}", ignore_errors=True)  # 15 MB that nobody looks at
        return record(job, folder)
    if code in (0, 130, -2, -15):  # it was told to stop
        return None
    last = ["it said nothing", *Path(f"{folder}.log").read_text(errors="replace").strip().splitlines()][-1]
    if not last.startswith("error: stopped at step"):
        raise UserError(f"{job.line} failed: {last} ({folder}.log)")
    return {**record(job, folder), "stopped": last.removeprefix("error: ")}


def start_of(job: Job) -> str:
    """What the scores of the start depend on: the guidance that is asked for, and how many pictures are drawn."""
    if job.full:
        return "full"
    return job.command[job.command.index("--guidance") + 1] if "--guidance" in job.command else "default"


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(job: Job, folder: Path) -> dict:
    """What is kept of a run."""
    lines, path = metrics(folder), folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"before": json.loads((folder / "before.json").read_text())}
    args = json.loads((folder / "args.json").read_text())
    short = lambda value: None if value is None else round(value, 4)

    def scores(s: dict) -> dict:
        return {"generation": {k: short(v) for k, v in s["generation"].items()},
                **{k: short(s["understanding"][k]) for k in ("ground_truth", "own_images")},
                **{k: short(s["imbalance"][k]) for k in ("answered_given_drawn", "drawn_given_answered", "disagreement")}}

    watched = [(line["step"], *(short(line["held_out"][k]) for k in ("detector", "self_reward", "true_pictures")))
               for line in lines if "held_out" in line]
    return {
        "model": job.model, "cell": job.cell, "seed": job.seed, "command": job.line, "versions": versions(),
        "images": args["prompts"] * args["group"], **{key: scores(summary[key]) for key in ("before", "after") if key in summary},
        "reward": [short(line["reward"]) for line in lines], "kl": short(lines[-1]["kl_image"]),
        "entropy": [short(lines[at]["entropy_image"]) for at in (0, -1)], "held_out": watched,
        **({"loss_answer": [short(lines[at]["loss_answer"]) for at in (0, -1)]} if "loss_answer" in lines[0] else {}),
        "seconds": [round(line["seconds"], 2) for line in lines],
    }


def read_results(path: Path) -> dict:
    """What `write_results` wrote. Raises UserError where the file holds something else, or is not there."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds no results ({error})") from None
    if not isinstance(content, dict) or not content.keys() >= {"common", "runs"}:
        raise UserError(f"{path}: holds no results of ablate.py")
    return content


def write_results(path: Path, results: list[dict]) -> None:
    """The results, a line each, by seed, in the order of the cells."""
    results = sorted(results, key=lambda r: (r["seed"], ALL.index(r["cell"]), MODELS.index(r["model"])))
    text = json.dumps({"common": COMMON})[:-1]
    write_whole(path, text + ', "runs": [\n' + ",\n".join(map(json.dumps, results)) + "\n]}\n")


def jobs(models: Iterable[str], chosen: Sequence[str] | None, seeds: int) -> list[Job]:
    """All runs, every cell with seed 0 first, so that a stop leaves as even a picture as there can be."""
    return [Job(model, cell, seed) for seed in range(seeds) for cell in ALL
            for model in models if cell in cells(model) and cell in (chosen or (cell,))]


def perform_all(wanted: list[Job], path: Path, runs: Path) -> None:
    """Runs what is not among the results yet, and adds it there as it comes."""
    results = read_results(path)["runs"] if path.exists() else []
    known = {(r["model"], r["cell"], r["seed"]): r["command"] for r in results}
    for job in wanted:
        if known.get((job.model, job.cell, job.seed), job.line) != job.line:
            raise UserError(f"{path}: {job.cell} of {job.model} was run with other flags; give another --results and --runs")
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
        except BaseException:  # no other run begins; after Ctrl-C those that are on save, after a fault they run to their end
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description="ablations on the tiny models", allow_abbrev=False, formatter_class=ShortHelp
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add("--cells", nargs="+", metavar="CELL", help=f"of {', '.join(map(repr, ALL))} (default: all)")
    add("--seeds", type=positive(int), default=SEEDS, help=f"0 to N - 1 (default: {SEEDS})")
    add("--runs", default="runs/ablation", help="where the runs go (default: runs/ablation)")
    add("--results", default=str(HERE / "figures" / "ablation.json"), help="(default: figures/ablation.json)")
    args = parser.parse_args()
    if unknown := set(args.cells or ()) - set(ALL):
        parser.error(f"--cells {min(unknown)!r}: there is no such cell")
    path, runs = Path(args.results), Path(args.runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    perform_all(jobs(args.models, args.cells, args.seeds), path, runs)
    print(f"{len(read_results(path)['runs'])} runs in {path}; next: python report.py")


if __name__ == "__main__":
    run(main)
