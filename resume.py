"""How a run of sft.py or grpo.py stops and goes on, to the bit.

A run's checkpoint is a model's folder (checkpoint.py) with three or four files more:

    trainer/optimizer.safetensors   AdamW's state by the weights' names
    trainer/adapters.safetensors    with --lora: the adapters, which the model's own weights have merged in
    trainer/buffer.safetensors      sft.py's replayed pictures
    trainer/state.json              the step, the counters of what went wrong, the replayed pictures' prompts
    manifest.json                   the sha256 of every file

Nothing else has to be kept: the learning rate is a function of the step, and all random numbers (prompts, images,
answers, what is replayed) come from generators that are made anew from seed and step. So what follows a checkpoint is
what would have followed without a stop; on another number of ranks but for rounding.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from checkpoint import check_manifest, flush, read_json, save
from evaluate import write_json, write_whole
from model import UnifiedModel, UserError, merged
from sample import agree

CHANGEABLE = {  # beside --resume; a mode only where it is the run's own
    "resume", "mode", "steps", "save_every", "keep", "timeout", "max_kl", "entropy", "gap_margin", "stop_on_gap", "tensorboard",
}

# ---------------------------------------------------------------------------------------------------------------------
# The flags of the run that goes on


def resumed(parser: argparse.ArgumentParser, argv: list[str] | None, script: str) -> argparse.Namespace:
    """The flags of the run that `--resume` names, checked as if they had been typed, with those of CHANGEABLE that are
    given in `argv`; refuses other flags, another script's run, and a mode that is not the run's."""
    not_given = object()  # argparse leaves what is set already; so a flag that is given its default shows, too
    blank = {action.dest: not_given for action in parser._actions if action.dest != "help"}
    args = parser.parse_args(argv, argparse.Namespace(**blank))
    given = {key: value for key, value in vars(args).items() if value is not not_given}
    path = Path(args.resume) / "args.json"
    if not path.exists():
        raise UserError(f"{args.resume}: holds no run of {script} (no args.json)")
    saved = read_json(path)
    if saved.get("script") != script:
        raise UserError(f"{args.resume}: holds a run of {saved.get('script')}; resume it with that")
    if given.get("mode", saved.get("mode")) != saved.get("mode"):
        raise UserError(f"{args.resume}: holds a run of --mode {saved.get('mode')}, which cannot go on as {args.mode}")
    if wrong := given.keys() - CHANGEABLE:
        flags = ", ".join("--" + key.replace("_", "-") for key in sorted(wrong))
        raise UserError(f"--resume goes on with the run's own flags: leave out {flags}")

    def refuse(message: str):
        raise UserError(f"{path}: {message}")

    parser.error = refuse
    run = vars(parser.parse_args(as_flags(parser, saved, refuse)))
    kept = {"tasks_sha256": saved.get("tasks_sha256")}
    return argparse.Namespace(**{**run, **kept, **given, "resume": args.resume, "out": args.resume})


def as_flags(parser: argparse.ArgumentParser, saved: dict, refuse) -> list[str]:
    """The command line that gives these values."""
    words = []
    for action in parser._actions:
        if action.dest in ("help", "resume"):
            continue
        if action.dest not in saved:
            refuse(f"lacks {action.dest!r}")
        value, flag = saved[action.dest], action.option_strings[0]
        if action.nargs == 0:  # it is on or off; where off has a flag of its own, --no-..., that one comes last
            if value not in (True, False, None):
                refuse(f"{action.dest} is {value!r}")
            words += [flag] if value else action.option_strings[1:] if value is False else []
        elif action.nargs:
            words += [flag, *map(str, value)] if isinstance(value, list) else refuse(f"{action.dest} is {value!r}")
        elif value is not None:
            words.append(f"{flag}={value}")
    return words


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run


def open_run(args: argparse.Namespace, model: UnifiedModel) -> tuple[Path, int]:
    """The output folder, and the step to start from. Raises UserError, on all ranks, where the folder holds a run that
    is not resumed, none of its checkpoints is whole, or it cannot be written or has no room."""
    return agree(lambda: go_on(args, model) if args.resume else begin(args, model))


def begin(args: argparse.Namespace, model: UnifiedModel) -> tuple[Path, int]:
    """A new folder, with the flags in it; step 0."""
    out = Path(args.out)
    if (out / "args.json").exists():
        raise UserError(f"{out} already holds a run: give another --out, or go on with --resume {out}")
    try:
        (out / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    probe(out, args, model)
    write_json(out / "args.json", vars(args))
    flush(out / "args.json"), flush(out)
    return out, 0


def go_on(args: argparse.Namespace, model: UnifiedModel) -> tuple[Path, int]:
    """The run's folder, cleared of what came after its last whole checkpoint; that one's step."""
    out = Path(args.out)
    start = last_whole(out)
    finished = out / "summary.json"
    if start > args.steps or start == args.steps and finished.exists() and read_json(finished).get("steps") == start:
        raise UserError(f"{out} already has {start} steps: give more with --steps")
    probe(out, args, model)
    for left in out.glob("*.partial*"):  # what a killed run was writing, or deleting
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    write_whole(path, b"".join(line for line in lines if step_of(line) <= start).decode())  # the rest comes again
    write_json(out / "args.json", {**vars(args), "resume": None})
    return out, start


def step_of(line: bytes) -> float:
    """The step of a line of metrics; infinity where a killed run left half a line."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def checkpoints(out: Path) -> list[int]:
    """The steps of which the folder holds a checkpoint, whole or not, in order."""
    return sorted(int(path.name[5:]) for path in out.glob("step_*") if path.name[5:].isdigit())


def place(out: Path, step: int) -> Path:
    return out / f"step_{step:06d}"


def last_whole(out: Path) -> int:
    """The step of the last checkpoint that is as it was written, 0 where there is none at all. Later ones that are
    damaged are said to be so, and renamed."""
    damaged = []
    for step in reversed(checkpoints(out)):
        try:
            check_manifest(place(out, step))
            saved = read_json(place(out, step) / "trainer" / "state.json").get("step")
            if saved != step:
                raise UserError(f"{place(out, step)}: holds step {saved}")
        except UserError as error:
            damaged.append(place(out, step))
            print(f"{damaged[-1].name} is damaged, looking for the one before: {error}", file=sys.stderr)
            continue
        for folder in damaged:
            shutil.rmtree(folder.with_suffix(".damaged"), ignore_errors=True)
            folder.rename(folder.with_suffix(".damaged"))
        return step
    if damaged:
        raise UserError(f"{out}: none of its checkpoints is whole; delete {', '.join(f.name for f in reversed(damaged))} "
                        "to begin at step 0")
    return 0


def probe(out: Path, args: argparse.Namespace, model: UnifiedModel) -> None:
    """Raises UserError where the folder cannot be written, or the disk has no room for the checkpoints to come."""
    learn = {name: weight.numel() for name, weight in model.named_parameters() if name.split(".")[0] not in args.freeze}
    moments = 0 if args.lora else 8 * sum(learn.values())  # an adapter's are small
    size = 4 * sum(tensor.numel() for tensor in model.state_dict().values()) + moments
    saves = -(-args.steps // args.save_every)
    # One more than what is kept is there while it is written, and what lies there already will make room.
    wanted = max(1, (saves if not args.keep else min(saves, args.keep + 1)) - len(checkpoints(out)))
    path = out / "probe.partial"
    try:
        path.write_bytes(bytes(2**20))
        flush(path)
        path.unlink()
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if free < wanted * size:
        raise UserError(f"{out}: {wanted} checkpoints of {size / 1e9:.2g} GB are to come, and the disk has {free / 1e9:.2g} "
                        "GB left: make room, or give a smaller --keep or a larger --save-every")


# ---------------------------------------------------------------------------------------------------------------------
# What is saved


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gather_to_first(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """All the tensors, whole and on the CPU, on rank 0; the other ranks take part and get nothing."""
    first, kept = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, tensor in tensors:
        tensor = whole(tensor)
        if first:
            kept[name] = tensor.cpu()
    return kept


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: UnifiedModel) -> Iterator[tuple[str, Tensor]]:
    """AdamW's `step`, `exp_avg` and `exp_avg_sq` of each weight that has learned, as `exp_avg.NAME` and so on."""
    for name, weight in model.named_parameters():
        for key, tensor in optimizer.state.get(weight, {}).items():
            yield f"{key}.{name}", tensor


def save_run(
    model: UnifiedModel, optimizer: torch.optim.Optimizer, out: Path, step: int, keep: int, state: dict,
    buffer: dict[str, Tensor] | None = None,
) -> None:
    """Writes the checkpoint of a step, and then deletes those before the last `keep` (0: none).

    Raises:
        UserError: on rank 0, where it cannot be written; what had been saved is still there.
    """
    weights = gather_to_first(model.state_dict().items())
    moments = gather_to_first(optimizer_tensors(optimizer, model))
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    adapters = {name: tensor for name, tensor in weights.items() if ".lora_" in name}
    files = {"trainer/optimizer.safetensors": moments, "trainer/state.json": {**state, "step": step},
             **({"trainer/adapters.safetensors": adapters} if adapters else {}),
             **({"trainer/buffer.safetensors": buffer} if buffer is not None else {})}
    try:
        save(model, place(out, step), files, merged(weights))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(place(out, step).with_suffix(".partial"), ignore_errors=True)
        last = next((place(out, other).name for other in reversed(checkpoints(out))), "none")
        raise UserError(f"{place(out, step)}: cannot be written ({' '.join(str(error).split())}); the last checkpoint is "
                        f"{last}: make room and go on with --resume {out}") from None
    for old in checkpoints(out)[:-keep] if keep else []:
        shutil.rmtree(place(out, old).rename(place(out, old).with_suffix(".partial")), ignore_errors=True)


def load_optimizer(optimizer: torch.optim.Optimizer, model: UnifiedModel, folder: Path) -> None:
    """Puts back what `save_run` wrote, each rank its share of it."""
    tensors = load_file(folder / "trainer" / "optimizer.safetensors")
    for name, weight in model.named_parameters():
        state = {key: tensors.pop(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors}
        if not state:
            continue
        for key in state.keys() - {"step"}:  # that one stays a number on the CPU
            if state[key].shape != weight.shape:
                raise UserError(f"{folder}: the optimizer's {key} of {name} has another shape than the weight")
            state[key] = state[key].to(weight.device)
            if isinstance(weight, DTensor):
                state[key] = distribute_tensor(state[key], weight.device_mesh, weight.placements, src_data_rank=None)
        optimizer.state[weight] = state
    if tensors:
        raise UserError(f"{folder}: the optimizer knows {min(tensors)}, which the model does not train")


def load_adapters(model: UnifiedModel, folder: Path) -> None:
    """Puts back the adapters of a run with --lora."""
    try:
        tensors = load_file(folder / "trainer" / "adapters.safetensors")
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: holds no adapters of this --lora ({str(error).splitlines()[-1].strip()})") from None
    if wrong := [*unknown, *(name for name in missing if ".lora_" in name)]:
        raise UserError(f"{folder}: its adapters are not this model's ({wrong[0]})")


def load_state(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The counters and what else was saved as JSON, and sft.py's buffer."""
    buffer = folder / "trainer" / "buffer.safetensors"
    return read_json(folder / "trainer" / "state.json"), load_file(buffer) if buffer.exists() else {}


# ---------------------------------------------------------------------------------------------------------------------
# Signals


class Signals:
    """SIGTERM and SIGINT. In a step the first one lets it finish: `stop()` then says, on every rank after the same
    step, that the run is to be saved and left. Where there is nothing to save, before and after the steps, it leaves at
    once. A second one always does; within a second of the first it is taken for the same, because torchrun and a
    cluster's scheduler both pass it on."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.how = f"go on with: torchrun {args.script} --resume {args.out}"
        self.device, self.first, self.stepping = device, None, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.receive)

    def receive(self, number: int, frame) -> None:
        if self.first is None:
            self.first = time.monotonic()
            if not self.stepping:
                self.say("stopped; nothing was lost")
                sys.stdout.flush()
                os._exit(0)
        elif time.monotonic() - self.first > 1:
            os._exit(128 + number)

    def during(self, steps: Iterable[int]) -> Iterator[int]:
        """The steps, in which a signal waits."""
        self.stepping = True
        yield from steps
        self.stepping = False

    def stop(self) -> bool:
        """Whether any rank got a signal, on every rank."""
        flag = torch.tensor(float(self.first is not None), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def say(self, what: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"\n{what}; {self.how}", flush=True)
