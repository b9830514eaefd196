"""What sft.py and grpo.py share: whole or sharded models, one optimizer step over all ranks, and what stops a run.

Nothing here knows which of the two is running.
"""

import argparse
import copy
import json
import math
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from checkpoint import load, sha256
from evaluate import World
from model import UnifiedModel, UserError, add_adapters, frozen_copy, merged
from resume import load_adapters, whole
from reward import Task, Vocabulary, draw_task, read_tasks, task_key
from sample import use_draw_steps

# ---------------------------------------------------------------------------------------------------------------------
# The models of a run: all on every rank, or their trunks' blocks in shards; all weights learn, or adapters


def load_start(args: argparse.Namespace, device: torch.device) -> UnifiedModel:
    """The starting model, float32; on the CPU where it is still to be sharded, as it may not fit a GPU whole."""
    if args.shard and not dist.is_initialized():
        raise UserError("--shard has no ranks to share between: start it with torchrun")
    try:
        return load(args.model, "cpu" if args.shard else device)
    except UserError as error:
        if args.resume:
            raise UserError(f"{args.resume}: goes on only with its starting model, which the KL is to: {error}") from None
        raise


def compute_type(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What is computed in, while the weights that learn are float32."""
    return torch.bfloat16 if args.bf16 or device.type == "cuda" else torch.float32


def prepare(
    policy: UnifiedModel, args: argparse.Namespace, device: torch.device, folder: Path | None
) -> tuple[UnifiedModel, UnifiedModel]:
    """Makes the starting model the policy: parts frozen, adapters, the weights of the checkpoint in `folder`, shards.

    Returns the reference (the starting model) and the sampler (the policy as a model that draws and answers without
    another rank: itself, unless it is sharded or draws in bfloat16; see `refresh`).
    """
    for part in args.freeze:
        policy.get_submodule(part).requires_grad_(False)
    policy.recompute(args.recompute)
    if args.lora:
        policy.requires_grad_(False)
        if not args.shard:  # what never learns need not be float32
            policy.language_model.layers.to(compute_type(args, device))
    reference = frozen_copy(policy)  # with --lora of the same tensors
    if folder and not args.lora:
        policy.load_state_dict(load(str(folder)).state_dict())
    sampler = policy
    if args.shard or args.sample_bf16:
        sampler = sampler_of(policy, torch.bfloat16 if args.sample_bf16 else compute_type(args, device))
    if args.lora:
        add_adapters(policy, args.lora)
        if folder:
            load_adapters(policy, folder)
    if args.shard:
        shard(policy, compute_type(args, device), device)
        if args.judge == "frozen":  # it answers, which takes another number of passes on every rank, so it stays whole
            reference.language_model.layers.to(compute_type(args, device))
        else:
            shard(reference, compute_type(args, device), device)
        for model in (policy, reference, sampler):
            model.to(device)
    return reference, sampler


def sampler_of(policy: UnifiedModel, dtype: torch.dtype) -> UnifiedModel:
    """A second model of the policy's own tensors, but for its trunk's blocks, of which it has a copy in `dtype`."""
    blocks = {id(weight) for weight in policy.language_model.layers.parameters()}
    shared = [weight for weight in (*policy.parameters(), *policy.buffers()) if id(weight) not in blocks]
    shared += [getattr(policy, "processor", None), policy.tokenizer, policy.config]
    sampler = copy.deepcopy(policy, {id(thing): thing for thing in shared})
    sampler.language_model.layers.requires_grad_(False).to(dtype)
    return sampler


@torch.no_grad()
def refresh(sampler: UnifiedModel, policy: UnifiedModel) -> None:
    """Gives the sampler the policy's weights as they are now, each gathered once; nothing where they are one."""
    if sampler is not policy:
        for mine, block in zip(sampler.language_model.layers, policy.language_model.layers):
            mine.load_state_dict(merged({name: whole(weight) for name, weight in block.state_dict().items()}))


def shard(model: UnifiedModel, dtype: torch.dtype, device: torch.device) -> None:
    """FSDP2 over the blocks of the trunk: every rank keeps 1 / ranks of each, float32, and gathers a block in `dtype`
    when it is run. Everything else stays on every rank."""
    trunk, mesh = model.language_model, init_device_mesh(device.type, (dist.get_world_size(),))
    others = set(trunk.parameters()) - set(trunk.layers.parameters())
    # The inputs stay as autocast has them, so that the sampler, which is run under it alone, computes the same.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in trunk.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(trunk, mesh=mesh, mp_policy=policy, ignored_params=others)
    for part in (trunk, *trunk.layers):  # the sum of all ranks' gradients, as the loss has the global mean's divisor
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def make_optimizer(model: UnifiedModel, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW over what learns, whole and sharded weights in groups of their own, which its fused loops need."""
    kinds = {False: [], True: []}
    for weight in model.parameters():
        if weight.requires_grad:
            kinds[isinstance(weight, DTensor)].append(weight)
    groups = [{"params": weights} for weights in kinds.values() if weights]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step over all ranks


def take(batch: object, rows: slice) -> object:
    """The same dataclass with these rows of every tensor, list and dataclass in it."""

    def part(value):
        return value if value is None else take(value, rows) if is_dataclass(value) else value[rows]

    return replace(batch, **{field.name: part(getattr(batch, field.name)) for field in fields(batch) if field.init})


def in_micro_batches(rollouts: Iterable, size: int) -> list:
    """Rollouts of many images as rollouts of `size` images: an update keeps more of each image than drawing does."""
    return [take(r, slice(first, first + size)) for r in rollouts for first in range(0, len(r.tasks), size)]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(values: Tensor) -> Tensor:
    """Every rank's [B, ...] joined in rank order."""
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def sum_gradients(weights: Iterable[Tensor]) -> None:
    """Each rank holds the gradient of its own trajectories' share of the loss; the whole gradient is their sum, which
    sharded weights have already."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        grads = [weight.grad for weight in weights if weight.grad is not None and not isinstance(weight, DTensor)]
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])  # one message instead of one a tensor
        dist.all_reduce(flat)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


def clip_gradients(groups: list[dict], limit: float) -> float:
    """The norm of the whole gradient, to which at most `limit` is left of it."""
    parts = [[weight for weight in group["params"] if weight.grad is not None] for group in groups]
    norms = [whole(get_total_norm([weight.grad for weight in part])) for part in parts if part]
    norm = norms[0] if len(norms) == 1 else get_total_norm(norms)
    for part in parts:
        clip_grads_with_norm_(part, limit, norm)
    return norm.item()


def update(
    optimizer: torch.optim.Optimizer, objectives: Sequence[Callable], count: int, lr: float, max_grad_norm: float,
    compute: AbstractContextManager,
) -> dict[str, float]:
    """One optimizer step on all ranks' `count` trajectories, accumulated over micro-batches. Each objective is called
    under `compute` and gives its loss summed over its trajectories, and sums over them of what is logged; the means of
    these come back. Where loss or gradient are not finite nothing is changed, and `skipped` is 1."""
    optimizer.zero_grad()
    totals = {}
    for objective in objectives:
        with compute:
            loss, sums = objective()
        (loss / count).backward()
        totals = {key: totals.get(key, 0) + value.detach() for key, value in sums.items()}
    for group in optimizer.param_groups:
        group["lr"] = lr
        sum_gradients(group["params"])
    norm = clip_gradients(optimizer.param_groups, max_grad_norm)
    means = dict(zip(totals, (sum_over_ranks(torch.stack(list(totals.values()))) / count).tolist()))
    finite = math.isfinite(norm) and math.isfinite(means["loss"])
    if finite:
        optimizer.step()
    return {**means, "grad_norm": norm, "lr": lr, "skipped": int(not finite)}


def peak_memory(device: torch.device) -> float:
    """The most GB that this process has used so far: allocated on its GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# The flags


def fill_in(args: argparse.Namespace, defaults: dict, model: UnifiedModel, ranks: int) -> None:
    """The recommended values for the flags that were left out; refuses what cannot be split over the ranks."""
    lr = args.lr
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.lora and not lr:
        args.lr *= LORA_LR
    args.guidance = model.guidance if args.guidance is None else args.guidance
    images = args.prompts * args.group
    if images % ranks:
        raise UserError(f"{args.prompts} prompts x {args.group} images a step cannot be split over {ranks} ranks")
    args.micro_batch = min(args.micro_batch or images, images // ranks)
    if images // ranks % args.micro_batch:
        raise UserError(f"--micro-batch {args.micro_batch} does not divide a rank's {images // ranks} images")
    args.draw_batch = max(args.draw_batch // args.micro_batch, 1) * args.micro_batch  # whole ones
    fill_in_mask_predict(args, model)
    if args.sample_bf16 is None:  # the base below adapters is in bfloat16 already, where that is computed in
        args.sample_bf16 = (args.bf16 or torch.cuda.is_available()) and not args.lora
    model.guidance = args.guidance  # so that checkpoints draw as they were trained to
    parts = [name for name, _ in model.named_children()]
    args.freeze = [p for p in ("vision_model", "vqmodel") if p in parts] if args.freeze is None else args.freeze
    if not set(args.freeze) <= set(parts):
        raise UserError(f"--freeze {' '.join(args.freeze)}: {args.model} has {', '.join(parts)}")
    if set(args.freeze) == set(parts):
        raise UserError(f"--freeze {' '.join(args.freeze)}: nothing is left to learn")
    if args.lora and "language_model" in args.freeze:
        raise UserError("--freeze language_model leaves --lora nothing to adapt")
    if args.entropy[0] >= args.entropy[1]:
        raise UserError(f"--entropy {args.entropy[0]:g} {args.entropy[1]:g}: give the lower bound first")


LORA_LR = 10  # times the learning rate of all weights, unless --lr is given
REPLAY_STEPS = 3  # of a Show-o's trajectory, unless --replay-steps says otherwise: each costs a pass there and back


def fill_in_mask_predict(args: argparse.Namespace, model: UnifiedModel) -> None:
    """The values of the flags that only a Show-o knows; refuses them for a Janus."""
    use_draw_steps(model, args.draw_steps)
    args.draw_steps = model.steps
    if model.steps is None and (args.estimator or args.replay_steps is not None):
        raise UserError("--estimator and --replay-steps have no meaning for a Janus, which scores every token at once")
    if args.estimator == "remask" and args.replay_steps:
        raise UserError("--replay-steps has no meaning with --estimator remask, which replays no steps")
    if args.replay_steps and args.replay_steps > model.steps:
        raise UserError(f"--replay-steps {args.replay_steps}: an image is drawn in {model.steps} steps (--draw-steps)")
    if model.steps is not None and args.estimator != "remask" and args.replay_steps is None:
        args.replay_steps = min(REPLAY_STEPS, model.steps)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then linear decay to 0 at the last step: gradients of so few samples are mostly noise, and what
    late steps at a full rate add of it costs more than they teach."""
    return args.lr * min(1.0, (step + 1) / (args.warmup + 1)) * (1 - step / args.steps)


# ---------------------------------------------------------------------------------------------------------------------
# What stops a run

PATIENCE = {"idle": 10, "skipped": 5, "kl": 3, "entropy": 3}  # steps in a row before a fault stops a run


class Health:
    """Counts the steps in a row in which a run was not well, and stops it with a message and the numbers: nothing was
    learned (`idle`), the update was left out as loss or gradient were not finite (`skipped`), the KL or the entropy of
    the image tokens is out of bounds. `counts` is a part of the run's state."""

    def __init__(self, args: argparse.Namespace, codes: int, counts: dict[str, int] | None = None):
        self.out, self.max_kl = args.out, args.max_kl or math.inf
        self.low, self.high = (share * math.log(codes) for share in args.entropy)
        self.counts = {key: (counts or {}).get(key, 0) for key in PATIENCE}

    def check(self, line: dict, idle: bool, advice: str, rollouts: Sequence, rank: int) -> None:
        """Takes a step's line of metrics. Raises UserError, on every rank, where it is one too many; after writing
        down, for loss and gradient, what had been sampled."""
        kl, entropy = line["kl_image"], line["entropy_image"]
        now = {"idle": idle, "skipped": line["skipped"] > 0, "kl": kl > self.max_kl,
               "entropy": not self.low <= entropy <= self.high and math.isfinite(entropy)}
        self.counts = {key: self.counts[key] + 1 if wrong else 0 for key, wrong in now.items()}
        advice = {
            "idle": advice,
            "skipped": f"loss {line['loss']}, gradient norm {line['grad_norm']}. The batch is in {self.out}; try a lower --lr",
            "kl": f"KL to the reference {kl:.3g} nats an image token, above --max-kl {self.max_kl:g}. The policy has left "
                  "its start; try a lower --lr or a higher --beta",
            "entropy": f"entropy {entropy:.3g} nats an image token, outside {self.low:.3g} to {self.high:.3g} (--entropy). "
                       "The policy collapsed to a few codes or dissolved into noise; try a lower --lr or a higher --beta",
        }
        for key, reason in advice.items():
            if self.counts[key] >= PATIENCE[key]:
                if key == "skipped":
                    write_batch(rollouts, Path(self.out) / f"failed_batch_rank{rank}.safetensors")
                raise UserError(f"stopped at step {line['step']}, {self.counts[key]} such steps in a row: {reason}. "
                                "Checkpoints are as they were")


def write_batch(rollouts: Sequence, path: Path) -> None:
    """What was sampled in a step, to look into: codes, log-probs and answers of each micro-batch, and their texts."""
    tensors, texts = {}, {}
    for i, r in enumerate(rollouts):
        tensors |= {f"{i}.codes": r.images.codes, f"{i}.logprobs": r.images.logprobs, f"{i}.answers": r.answers.ids,
                    f"{i}.answer_logprobs": r.answers.logprobs}
        texts[str(i)] = json.dumps({"prompts": [task.prompt for task in r.tasks], "answers": r.answers.texts})
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, metadata=texts)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts to train on


def task_stream(
    args: argparse.Namespace, model: UnifiedModel, world: World
) -> tuple[Callable[[np.random.Generator], Task], Vocabulary]:
    """What draws a task to train on, and the words that answers are read with: from the world's vocabulary without its
    held-out tasks, or from the user's own file (`--tasks`), which is checked whole.

    Raises:
        UserError: naming every faulty line of the file; or that it is not the one that the run began with.
    """
    held_out = frozenset(task_key(task) for task in world.suite)
    if not args.tasks:
        return lambda rng: draw_task(world.vocabulary, rng, held_out), world.vocabulary
    path = Path(args.tasks)
    try:
        tasks, vocabulary = read_tasks(path.read_bytes(), world.vocabulary, held_out, lambda task: drawable(model, task))
    except OSError as error:
        raise UserError(f"--tasks {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"--tasks {path}: {error}") from None
    known, args.tasks_sha256 = getattr(args, "tasks_sha256", None), sha256(path)
    if args.resume and args.tasks_sha256 != known:
        raise UserError(f"--tasks {path}: is not the file that the run began with")
    return lambda rng: tasks[rng.integers(len(tasks))], vocabulary


def drawable(model: UnifiedModel, task: Task) -> None:
    """Raises ValueError where the model cannot take the task's prompt."""
    try:
        model.generation_prompt([task.prompt])
    except UserError as error:
        raise ValueError(str(error)) from None
