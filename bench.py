"""How fast images are drawn: this sampler beside transformers' `generate` and a plain loop, taken in turn in one run.

    python sample.py --bench                                     # the tiny models, a few minutes
    python bench.py --sizes small --batches 1 8                  # 12 layers, 512 wide, 4,096 codes, 256 tokens
    python bench.py --sizes 1.3b --dtypes float32 bfloat16 --json bench.json
    python bench.py --step small                                 # one step of grpo.py, phase by phase, and the plain way

Every variant draws whole images from the same weights, prompts and guidance (cond and uncond rows), sampling from the
whole softmax:

    ours           sample.sample_images, compiled; its compilation is timed apart
    transformers   JanusForConditionalGeneration.generate(generation_mode="image"), its static cache, as it comes
    plain          eager, a key-value cache that grows by concatenation, every image's prompt read by itself, softmax,
                   multinomial and a gather out of log-softmax (published loops work like that); Show-o without a cache

A time is the median over `--repeats` rounds (one of each variant a round: A B C A B C), the ratio the median of the
rounds' ratios, in brackets their least and largest. With one thread on a CPU it is the thread's CPU time, which other
processes disturb less than the wall clock. Random weights but for the tiny models; 1.3b* is Janus-1.3B with 2 of its 24
layers.

floor       time that the products of a step alone take at as many rows, by F.linear; its share of a step's time
bandwidth   weights that a step reads / its time, as a share of what summing 256 MB reaches in the same run
memory      the most that drawing adds to the resident memory (or the GPU's), over weights and cache
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import JanusConfig, JanusForConditionalGeneration

import grpo
import training
from checkpoint import load
from evaluate import world_of, write_json
from model import Janus, ShowO, UnifiedModel, causal, positions_of
from sample import (
    OPTIONS, Images, draw, guide, image_logits, mask_schedule, pick_device, positive, run, sample_answers, sample_images,
)

PROMPT, GUIDANCE = "a photo of a red circle left of a blue square", 3.0
SIZES = {  # layers, width, heads, MLP width, codes, tokens a side of an image
    "small": (12, 512, 8, 1408, 4096, 16),
    "1.3b": (2, 2048, 16, 5632, 16384, 24),  # of 24 layers
}

# ---------------------------------------------------------------------------------------------------------------------
# The models


def random_model(name: str, size: str, dtype: torch.dtype, device: torch.device, side: int | None = None) -> UnifiedModel:
    """A Janus or a Show-o of a size, with the tiny one's tokenizer and the tiny one's vision, which draw nothing here."""
    layers, width, heads, hidden, codes, tokens = SIZES[size]
    tokens = (side or tokens) ** 2
    tiny = load("tiny" if name == "janus" else "tiny-show-o")
    torch.manual_seed(0)
    trunk = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": hidden,
             "num_key_value_heads": heads, "head_dim": width // heads, "max_position_embeddings": 2048}
    if name == "show-o":
        del trunk["head_dim"]
        vocabulary = len(tiny.tokenizer) + codes + 1
        settings = {**vars(tiny.config), "codebook_size": codes, "num_vq_tokens": tokens, "vocab_size": vocabulary,
                    "steps": min(tokens, 50), "phi_config": {**trunk, "qk_layernorm": True}}
        return ShowO(settings, tiny.tokenizer, tiny.vqmodel).to(device, dtype).eval()
    config = tiny.config.to_dict()
    config["text_config"] |= trunk
    side = round(tokens**0.5)
    config["vision_config"] |= {"num_image_tokens": tokens, "projection_dim": width, "image_size": 4 * side}
    config["vq_config"] |= {"num_embeddings": codes, "num_patches": side, "projection_dim": width,
                            "image_token_embed_dim": width}
    model = Janus(JanusConfig.from_dict(config), tiny.processor)
    for weight in model.generation_head.parameters():
        nn.init.normal_(weight, std=0.02)
    return model.to(device, dtype).eval()


def transformers_twin(model: Janus) -> JanusForConditionalGeneration:
    """transformers' model on the very same tensors."""
    with torch.device("meta"):
        twin = JanusForConditionalGeneration(JanusConfig.from_dict(model.config.to_dict())).eval()
    names = {name if name == "lm_head.weight" else f"model.{name}": t for name, t in model.state_dict().items()}
    twin.load_state_dict(names, assign=True)
    for part in (twin.model.language_model, twin.model.vision_model):  # buffers that no checkpoint has
        for module in part.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, key, torch.arange(buffer.numel()).view(buffer.shape))
    rotary = twin.model.language_model.rotary_emb
    twin.model.language_model.rotary_emb = type(rotary)(twin.config.text_config)
    tokens = model.tokenizer
    twin.generation_config.update(
        pad_token_id=tokens.pad_token_id, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id
    )
    twin.generation_config.generation_kwargs = {"boi_token_id": tokens.convert_tokens_to_ids(tokens.boi_token)}
    return twin.to(model.device)


# ---------------------------------------------------------------------------------------------------------------------
# The variants


def draw_with_transformers(twin: JanusForConditionalGeneration, ids: Tensor, mask: Tensor) -> Tensor:
    """Codes [B, N] of prompts [B, P]. Its default top-k of 50 is switched off, to sample from the same distribution."""
    return twin.generate(
        input_ids=ids, attention_mask=mask.long(), generation_mode="image", do_sample=True, guidance_scale=GUIDANCE,
        top_k=0, max_new_tokens=twin.config.vision_config.num_image_tokens,
    )


def draw_plainly(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs [B] from logits [B, V] as it is usually written."""
    tokens = torch.multinomial(logits.softmax(-1), 1)
    return tokens[:, 0], logits.log_softmax(-1).gather(-1, tokens)[:, 0]


@torch.no_grad()
def plain_loop(model: UnifiedModel, prompts: list[str], guidance: float = GUIDANCE) -> Images:
    """Images by the loop that one writes first."""
    ids, mask = model.generation_prompt(prompts)
    rows, look = (torch.cat(pair) for pair in zip((ids, mask), model.unconditional(ids, mask)))  # [2 B, P]
    weight = model.conditional_weight(guidance)
    draw_all = plain_mask_predict if isinstance(model, ShowO) else plain_in_order
    return Images(*draw_all(model, rows, look, weight), ids, mask)


def plain_in_order(model: Janus, rows: Tensor, look: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Codes and log-probs [B, N] after prompts [2 B, P], one code after the other."""
    past, x, codes, logprobs = [], model.embed_text(rows), [], []
    attend = causal(look)
    for _ in range(model.num_image_tokens):
        positions, new = positions_of(look)[:, -x.shape[1] :], []
        hidden = model.language_model(x, positions, attend, past, keep=new)[:, -1]
        past = [tuple(map(partial(torch.cat, dim=2), zip(*pair))) for pair in zip(past, new)] if past else new
        code, logprob = draw_plainly(guide(*model.generation_head(hidden).chunk(2), weight, 1.0))
        codes.append(code)
        logprobs.append(logprob)
        x = model.embed_codes(code[:, None]).repeat(2, 1, 1)  # [2 B, 1, D]
        look = F.pad(look, (0, 1), value=True)
        attend = look[:, None, None]
    return torch.stack(codes, 1), torch.stack(logprobs, 1)


def plain_mask_predict(model: ShowO, rows: Tensor, look: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Codes and log-probs [B, N] after prompts [2 B, P], every step of mask-predict over prompt and image."""
    B, N, S, noise = len(rows) // 2, model.num_image_tokens, model.steps, 1.0
    codes, known = torch.zeros(2, B, N, dtype=torch.long, device=model.device)
    known, logprobs = known.bool(), torch.zeros(B, N, device=model.device)
    for step, masked in enumerate(mask_schedule(N, S)):
        noise *= 1 - (step + 1) / S
        hidden = model.canvas_hidden(rows, look, codes.repeat(2, 1), known.repeat(2, 1))
        drawn, scores = draw_plainly(guide(*model.generation_head(hidden).chunk(2), weight, 1.0).flatten(0, 1))
        drawn, scores = drawn.view(B, N), scores.view(B, N)
        confidence = scores - noise * (-torch.rand_like(scores).log()).log()
        rank = confidence.masked_fill(known, float("inf")).argsort(1).argsort(1)
        commit = ~known & (rank >= masked)
        codes, logprobs, known = drawn.where(commit, codes), scores.where(commit, logprobs), known | commit
    return codes, logprobs


# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def clock(work: Callable, device: torch.device) -> float:
    """Seconds that work() takes: the thread's CPU time if it has one thread, else wall-clock time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    now = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = now()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return now() - begin


def in_turn(variants: dict[str, Callable], repeats: int, device: torch.device, name: str) -> dict[str, list[float]]:
    """Seconds of each variant, taken in turn."""
    times = {key: [] for key in variants}
    for _ in tqdm(range(repeats), desc=name, unit="round", disable=None):
        for key, work in variants.items():
            times[key].append(clock(work, device))
    return times


def ratio(times: dict[str, list[float]], other: str) -> list[float] | None:
    """[median, least, largest] of other's time over ours, round by round."""
    if other not in times:
        return None
    rounds = np.array(times[other]) / np.array(times["ours"])
    return [float(np.median(rounds)), float(rounds.min()), float(rounds.max())]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that summing 256 MB reads: the best of nine."""
    numbers = torch.ones(64 * 2**20, device=device)
    return 4 * numbers.numel() / min(clock(numbers.sum, device) for _ in range(9))


def step_weights(model: UnifiedModel) -> list[nn.Linear]:
    """The linear layers that a step of sampling runs."""
    parts = [model.language_model.layers]
    parts += [model.generation_head, model.generation_aligner] if isinstance(model, Janus) else []
    return [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]


@torch.no_grad()
def floor(model: UnifiedModel, rows: int) -> float:
    """Seconds that the products of a step take alone, by F.linear: the median of nine."""
    layers = step_weights(model)
    inputs = [torch.randn(rows, layer.in_features, device=model.device, dtype=layer.weight.dtype) for layer in layers]

    def products():
        for layer, x in zip(layers, inputs):
            F.linear(x, layer.weight, layer.bias)

    products()
    return float(np.median([clock(products, model.device) for _ in range(9)]))


def added_memory(work: Callable, device: torch.device) -> int:
    """Bytes that work() adds at most to what is resident (Linux) or allocated (CUDA); -1 where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return -1
    read = lambda key: int(status.read_text().split(key)[1].split()[0]) * 1024
    before = read("VmRSS:")
    work()
    return read("VmHWM:") - before


def cache_bytes(model: UnifiedModel, rows: int, prompt: int) -> int:
    """Bytes of the keys and values of `rows` whole sequences."""
    config, extra = model.language_model.config, 2 * isinstance(model, ShowO)
    tokens = prompt + model.num_image_tokens + extra
    return 2 * config.num_hidden_layers * rows * config.num_key_value_heads * config.head_dim * tokens * model.dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def rollouts(name: str, size: str, batch: int, dtype: torch.dtype, args: argparse.Namespace, speed: float) -> dict:
    """One row: drawing `batch` images by each variant."""
    device = pick_device()
    tiny = size == "tiny"
    model = load("tiny" if name == "janus" else "tiny-show-o", device, dtype) if tiny else random_model(
        name, size, dtype, device, args.side)
    prompts, seeds = [PROMPT] * batch, range(batch)
    ids, mask = model.generation_prompt(prompts)
    ours = partial(sample_images, model, prompts, seeds, GUIDANCE, 1.0, not args.no_compile)
    variants = {"ours": ours}
    if name == "janus" and "transformers" not in args.skip:
        variants["transformers"] = partial(draw_with_transformers, transformers_twin(model), ids, mask)
    if "plain" not in args.skip:
        variants["plain"] = partial(plain_loop, model, prompts)
    begin = time.perf_counter()
    ours()
    first = time.perf_counter() - begin
    memory = added_memory(ours, device)
    if len(variants) > 1 and tiny:
        in_turn(variants, 1, device, "warm-up")
    times = in_turn(variants, args.repeats, device, f"{name} {size}, batch {batch}, {str(dtype)[6:]}")
    seconds = float(np.median(times["ours"]))
    steps = model.steps or model.num_image_tokens
    rows = 2 * batch * (1 if model.steps is None else model.num_image_tokens + 2)
    weights = sum(layer.weight.numel() * layer.weight.element_size() for layer in step_weights(model))
    kept = cache_bytes(model, 2 * batch, ids.shape[1])
    whole = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {
        "model": name, "size": size, "layers": model.language_model.config.num_hidden_layers,
        "tokens": model.num_image_tokens, "steps": steps, "batch": batch, "dtype": str(dtype)[6:], "seconds": times,
        "tokens_per_second": batch * model.num_image_tokens / seconds, "ratio_vs_transformers": ratio(times, "transformers"),
        "ratio_vs_plain_loop": ratio(times, "plain"), "floor_share": floor(model, rows) * steps / seconds,
        "roofline_share": weights * steps / seconds / speed, "compile_seconds": max(0.0, first - seconds),
        "peak_bytes": whole + memory, "over_weights_and_cache": (memory - kept) / (whole + kept) if memory >= 0 else None,
    }


def kernel(rows: int, codes: int, repeats: int, device: torch.device) -> dict:
    """The draw alone, of logits [2, rows, codes]: guidance, token and log-prob."""
    generator = torch.Generator(device).manual_seed(0)
    cond, uncond = torch.randn(2, rows, codes, generator=generator, device=device) * 3
    compiled = torch.compile(lambda c, u, x: draw(guide(c, u, GUIDANCE, 1.0), x), dynamic=False, options=OPTIONS)
    uniforms = lambda: torch.rand(rows, generator=generator, device=device)
    variants = {
        "ours": lambda: compiled(cond, uncond, uniforms()),
        "plain": lambda: draw_plainly(guide(cond, uncond, GUIDANCE, 1.0)),
    }
    in_turn(variants, 3, device, "warm-up")
    times = in_turn(variants, max(21, repeats), device, f"draw {rows} x {codes}")
    return {"rows": rows, "codes": codes, "milliseconds": {k: float(np.median(v)) * 1e3 for k, v in times.items()},
            "ratio_vs_plain": ratio(times, "plain")}


FIRST_CALL = """
import time, torch
torch.set_num_threads({threads})
from checkpoint import load
from sample import sample_images
model = load("tiny")
begin = time.perf_counter()
sample_images(model, ["{prompt}"] * 8, range(8), 3.0)
print(time.perf_counter() - begin)
"""


def first_call(threads: int) -> dict:
    """Seconds of the first eight images of the tiny Janus in a new process: without the compiler's cache on the disk,
    and with it."""
    with tempfile.TemporaryDirectory() as folder:
        code = FIRST_CALL.format(threads=threads, prompt=PROMPT)
        run = lambda: float(subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}, check=True,
            cwd=Path(__file__).parent, capture_output=True, text=True).stdout.split()[-1])
        return {"cold": run(), "warm": run()}


def scaling(args: argparse.Namespace) -> dict:
    """Seconds of drawing at the small size, and the fit a tokens + b images * tokens + c images * tokens^2 by
    relative least squares: reading the weights in every step, each image's products, and its attention."""
    device, points = pick_device(), []
    for side in (8, 12, 16):
        model = random_model("janus", "small", torch.float32, device, side)
        for batch in (8, 16, 32):
            work = partial(sample_images, model, [PROMPT] * batch, range(batch), GUIDANCE, 1.0, not args.no_compile)
            work()
            points.append((batch, side**2, min(clock(work, device) for _ in range(2))))
    batch, tokens, seconds = np.array(points).T
    terms = np.stack((tokens, batch * tokens, batch * tokens**2), 1)
    fit, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds), rcond=None)
    error = np.abs(terms @ fit / seconds - 1)
    return {"points": points, "fit": fit.tolist(), "largest_error": float(error.max())}


def plain_forced_hidden(model: Janus, images: Images, ids: Tensor, mask: Tensor) -> Tensor:
    """sample.forced_hidden, with every image's prompt read by itself."""
    x = torch.cat((model.embed_text(ids), model.embed_codes(images.codes[:, :-1])), dim=1)  # [B, P + N - 1, D]
    mask = F.pad(mask, (0, images.codes.shape[1] - 1), value=True)
    return model.language_model(x, positions_of(mask), causal(mask))[:, ids.shape[1] - 1 :]


def plain_image_logprobs(model: Janus, images: Images, *scoring) -> tuple[Tensor, Tensor]:
    """sample.image_logprobs, out of the logits of whole images."""
    return images.score(image_logits(model, images, *scoring))


PLAIN = {  # what the plain way does instead
    "grpo.sample_images": lambda model, prompts, seeds, guidance, *_: plain_loop(model, prompts, guidance),
    "sample.forced_hidden": plain_forced_hidden,
    "grpo.image_logprobs": plain_image_logprobs,
}


def one_step(size: str, plain: bool, bf16: bool, repeats: int) -> dict[str, float]:
    """Seconds of the phases of a step of grpo.py, two-stage, after one that is not counted: of a random model with 2
    prompts x 8 images, 8 in a micro-batch, or of the tiny Janus with its defaults."""
    device, times = pick_device(), {}
    sizes = "--prompts 2 --group 8 --micro-batch 8 --draw-batch 16 --answer-weight 0.3" if size != "tiny" else ""
    args = grpo.parse_args(["--no-compile"] * plain + ["--bf16"] * bf16 + sizes.split())
    dtype = training.compute_type(args, device)
    policy = load("tiny", device) if size == "tiny" else random_model("janus", size, torch.float32, device)
    training.fill_in(args, grpo.TINY, policy, 1)
    draw_task, _ = training.task_stream(args, policy, world_of(load("tiny")))
    reference, sampler = training.prepare(policy, args, device, None)
    optimizer = training.make_optimizer(policy, args)
    compute = torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)

    def phase(name: str, work: Callable):
        kept = []
        times.setdefault(name, [0.0] * (repeats + 1))[step] += clock(lambda: kept.append(work()), device)
        return kept[0]

    def roll_out(tasks: list, seeds: range) -> grpo.Rollout:
        prompts, questions = [task.prompt for task in tasks], [task.question for task in tasks]
        images = phase("draw", lambda: grpo.sample_images(sampler, prompts, seeds, args.guidance, 1.0, not plain))
        seen = phase("decode", lambda: policy.see(images.codes) if plain else policy.look(policy.see(images.codes)))
        answers = phase("answer", lambda: sample_answers(sampler, seen, questions, seeds, 1.0, args.max_tokens))
        return grpo.Rollout(tasks, list(seeds), images, seen, answers)

    for step in range(repeats + 1):
        rng = np.random.default_rng(step)
        tasks = [task for task in [draw_task(rng) for _ in range(args.prompts)] for _ in range(args.group)]
        together = args.micro_batch if plain else args.draw_batch
        parts = [range(first, min(first + together, len(tasks))) for first in range(0, len(tasks), together)]
        with compute, torch.no_grad():
            training.refresh(sampler, policy)
            rollouts = training.in_micro_batches(
                [roll_out([tasks[i] for i in part], part) for part in parts], args.micro_batch
            )
            for rollout in rollouts:
                phase("reference", lambda: grpo.score_by_reference(reference, rollout, args))
        advantages = torch.ones(args.micro_batch, device=device)
        objectives = [partial(grpo.objective, policy, policy, rollout, advantages, args) for rollout in rollouts]
        phase("update", lambda: training.update(optimizer, objectives, len(tasks), 1e-6, 1.0, compute))
    return {name: float(np.median(seconds[1:])) for name, seconds in times.items()}


def steps_of_both(size: str, repeats: int) -> dict[str, dict[str, float]]:
    """The phases of a step the plain way and ours, in float32 and bfloat16."""
    phases = {}
    for dtype, bf16 in (("float32", False), ("bfloat16", True)):
        with contextlib.ExitStack() as stack:
            for target, replacement in PLAIN.items():
                stack.enter_context(unittest.mock.patch(target, replacement))
            phases[f"plain, {dtype}"] = one_step(size, True, bf16, repeats)
        phases[f"ours, {dtype}"] = one_step(size, False, bf16, repeats)
    return phases


# ---------------------------------------------------------------------------------------------------------------------


COLUMNS = ("model", "size", "tokens", "batch", "dtype", "tokens/s", "x transformers", "x plain", "floor", "bandwidth",
           "memory", "compile, s")


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    show = lambda r: "" if r is None else f"{r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})"
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in rows:
        memory = row["over_weights_and_cache"]
        cells = (
            row["model"], row["size"] + "*" * (row["size"] == "1.3b"), row["tokens"], row["batch"], row["dtype"],
            f"{row['tokens_per_second']:.0f}", show(row["ratio_vs_transformers"]), show(row["ratio_vs_plain_loop"]),
            f"{row['floor_share']:.2f}", f"{row['roofline_share']:.2f}", "" if memory is None else f"{memory:+.0%}",
            f"{row['compile_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict:
    """What the figures are of."""
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = torch.cuda.get_device_name() if device.type == "cuda" else names[0] if names else platform.processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "bandwidth_gb_per_second": round(bandwidth(device) / 1e9, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "bench.py", description="measure the sampler", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=["janus", "show-o"], default=["janus", "show-o"])
    add("--sizes", nargs="+", choices=["tiny", *SIZES], default=["tiny"])
    add("--batches", nargs="+", type=positive(int), default=[1, 8, 32], help="images at once")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    add("--side", type=positive(int), help="tokens a side of an image, if not the size's")
    add("--skip", nargs="*", choices=["transformers", "plain"], default=[])
    add("--repeats", type=positive(int), default=5, help="rounds")
    add("--threads", type=positive(int), default=1, help="of a CPU")
    add("--step", choices=["tiny", "small"], help="instead, the phases of a step of grpo.py and of the plain way's")
    add("--extras", action="store_true", help="also the draw alone, the first call, and the cost's fit to images and tokens")
    add("--no-compile", action="store_true")
    add("--json", metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    device = pick_device()
    result = {"machine": machine(device), "rows": []}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))

    def keep(**measured) -> None:
        result.update(measured)
        if args.json:
            write_json(Path(args.json), result)

    if args.step:
        keep(step=steps_of_both(args.step, args.repeats))
        for kind, phases in result["step"].items():
            each = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.items())
            print(f"{kind:16s} {each}  together {sum(phases.values()):.2f} s")
        return
    speed = result["machine"]["bandwidth_gb_per_second"] * 1e9
    for name, size, dtype, batch in product(args.models, args.sizes, args.dtypes, args.batches):
        row = rollouts(name, size, batch, getattr(torch, dtype), args, speed)
        keep(rows=[*result["rows"], row])
    print(table(result["rows"]))
    if args.extras:
        keep(draw=kernel(32, 16384, args.repeats, device), first_call=first_call(args.threads), scaling=scaling(args))
        print(json.dumps({key: result[key] for key in ("draw", "first_call", "scaling")}, indent=1))


if __name__ == "__main__":
    run(main)
