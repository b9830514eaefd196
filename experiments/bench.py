"""How fast images are drawn: this sampler beside transformers' `generate` and a plain loop, in one run.

    python -m experiments.bench                                          # the tiny models, a few minutes
    python -m experiments.bench --sizes small --batches 1 8              # 12 layers, 512 wide, 256 tokens
    python -m experiments.bench --sizes 1.3b --dtypes float32 bfloat16 --json bench.json

Every variant draws whole images from the same weights, prompts and guidance, sampling from the whole softmax:

    ours           sample.sample_images, compiled; its compilation is timed apart
    transformers   JanusForConditionalGeneration.generate(generation_mode="image"), with its static cache
    plain          eager, a key-value cache that grows by concatenation, every image's prompt read by itself,
                   softmax, multinomial and a gather out of log-softmax; a Show-o's without a cache

A time is the median over `--repeats` rounds (one of each variant a round), a ratio the median of the rounds'
ratios, in brackets their least and largest. With one thread on a CPU it is the thread's CPU time, which other
processes disturb less than the wall clock; on a GPU the wall clock between two synchronisations. Weights are
random but for the tiny models; 1.3b* is Janus-1.3B with 2 of its 24 layers. `bandwidth` is that of a step's
weights, as a share of what summing 256 MB reaches in the same run; `GB` the weights and the most that drawing
adds to them, in resident memory or on the GPU.
"""

import argparse
import platform
import time
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

from model import Janus, ShowO, UnifiedModel, causal_mask, load, positions_of
from sample import (
    Images, ShortHelp, guided_logits, guided_rows, mask_schedule, pick_device, positive, run, sample_images,
    write_json,
)

PROMPT, GUIDANCE = "a photo of a red circle left of a blue square", 3.0
SIZES = {  # layers, width, heads, MLP width, codes, tokens a side of an image
    "small": (12, 512, 8, 1408, 4096, 16),
    "1.3b": (2, 2048, 16, 5632, 16384, 24),
}
TINY = {"janus": "tiny", "show-o": "tiny-show-o"}

# ---- the models --------------------------------------------------------------------------------------------

def random_model(
    name: str, size: str, dtype: torch.dtype, device: torch.device, side: int | None = None
) -> UnifiedModel:
    """A Janus or a Show-o of a size, with the tiny one's tokenizer and vision, which draw nothing here."""
    layers, width, heads, hidden, codes, tokens = SIZES[size]
    side, tiny = side or tokens, load(TINY[name])
    torch.manual_seed(0)
    trunk = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
             "intermediate_size": hidden, "num_key_value_heads": heads, "max_position_embeddings": 2048}
    if name == "show-o":
        rows, steps = len(tiny.tokenizer) + codes + 1, min(side**2, 50)
        settings = {**vars(tiny.config), "codebook_size": codes, "num_vq_tokens": side**2, "vocab_size": rows,
                    "steps": steps, "phi_config": {**trunk, "qk_layernorm": True}}
        return ShowO(settings, tiny.tokenizer, tiny.vqmodel).to(device, dtype).eval()
    config = tiny.config.to_dict()
    config["text_config"] |= {**trunk, "head_dim": width // heads}
    config["vision_config"] |= {"num_image_tokens": side**2, "projection_dim": width, "image_size": 4 * side}
    config["vq_config"] |= {"num_embeddings": codes, "num_patches": side}
    config["vq_config"] |= {"projection_dim": width, "image_token_embed_dim": width}
    model = Janus(JanusConfig.from_dict(config), tiny.processor)
    for weight in model.generation_head.parameters():
        nn.init.normal_(weight, std=0.02)
    return model.to(device, dtype).eval()


def transformers_twin(model: Janus) -> JanusForConditionalGeneration:
    """transformers' model on the very same tensors."""
    with torch.device("meta"):
        twin = JanusForConditionalGeneration(JanusConfig.from_dict(model.config.to_dict())).eval()
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    weights["lm_head.weight"] = weights.pop("model.lm_head.weight")
    twin.load_state_dict(weights, assign=True)
    for part in (twin.model.language_model, twin.model.vision_model):  # buffers that no checkpoint has
        for module in part.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, key, torch.arange(buffer.numel()).view(buffer.shape))
    rotary = twin.model.language_model.rotary_emb
    twin.model.language_model.rotary_emb = type(rotary)(twin.config.text_config)
    tokens, names = model.tokenizer, ("pad_token_id", "bos_token_id", "eos_token_id")
    twin.generation_config.update(**{name: getattr(tokens, name) for name in names})
    begin = tokens.convert_tokens_to_ids(tokens.boi_token)
    twin.generation_config.generation_kwargs = {"boi_token_id": begin}
    return twin.to(model.device)


# ---- the variants ------------------------------------------------------------------------------------------

def draw_with_transformers(twin: JanusForConditionalGeneration, ids: Tensor, mask: Tensor) -> Tensor:
    """Codes [B, N] of prompts [B, P], its default top-k of 50 off: from the same distribution as ours."""
    return twin.generate(
        input_ids=ids, attention_mask=mask.long(), generation_mode="image", do_sample=True, top_k=0,
        guidance_scale=GUIDANCE, max_new_tokens=twin.config.vision_config.num_image_tokens,
    )


def draw_plainly(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs [B] from logits [B, V] as it is usually written."""
    tokens = torch.multinomial(logits.softmax(-1), 1)
    return tokens[:, 0], logits.log_softmax(-1).gather(-1, tokens)[:, 0]


@torch.no_grad()
def plain_loop(model: UnifiedModel, prompts: list[str], guidance: float = GUIDANCE) -> Images:
    """Images by the loop that one writes first."""
    ids, mask = model.generation_prompt(prompts)
    rows, visible, weight = guided_rows(model, ids, mask, guidance)  # [2 B, P]
    draw = plain_mask_predict if isinstance(model, ShowO) else plain_in_order
    codes, logprobs = draw(model, rows, visible, weight)
    return Images(codes, logprobs, ids, mask, torch.full_like(logprobs, 1 / codes.shape[1]))


def plain_in_order(model: Janus, rows: Tensor, visible: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Codes and log-probs [B, N] after prompts [2 B, P], one code after the other."""
    cache, x, codes, logprobs = [], model.embed_text(rows), [], []
    attention_mask = causal_mask(visible)
    for _ in range(model.num_image_tokens):
        positions, new = positions_of(visible)[:, -x.shape[1] :], []
        hidden = model.language_model(x, positions, attention_mask, cache, keep=new)[:, -1]
        if cache:
            new = [tuple(map(partial(torch.cat, dim=2), zip(*layers))) for layers in zip(cache, new)]
        cache = new
        code, logprob = draw_plainly(guided_logits(model, hidden.unflatten(0, (2, -1)), weight, 1.0))
        codes.append(code)
        logprobs.append(logprob)
        x = model.embed_codes(code[:, None]).repeat(2, 1, 1)  # [2 B, 1, D]
        visible = F.pad(visible, (0, 1), value=True)
        attention_mask = visible[:, None, None]
    return torch.stack(codes, 1), torch.stack(logprobs, 1)


def plain_mask_predict(model: ShowO, rows: Tensor, visible: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Codes and log-probs [B, N] after prompts [2 B, P], every mask-predict step over prompt and image."""
    B, N, S, noise = len(rows) // 2, model.num_image_tokens, model.draw_steps, 1.0
    codes, known = torch.zeros(2, B, N, dtype=torch.long, device=model.device)
    known, logprobs = known.bool(), torch.zeros(B, N, device=model.device)
    for step, masked in enumerate(mask_schedule(N, S)):
        noise *= 1 - (step + 1) / S
        hidden = model.canvas_hidden(rows, visible, codes.repeat(2, 1), known.repeat(2, 1))
        logits = guided_logits(model, hidden.unflatten(0, (2, B)), weight, 1.0)  # [B, N, V]
        drawn, scores = (values.view(B, N) for values in draw_plainly(logits.flatten(0, 1)))
        confidence = scores - noise * (-torch.rand_like(scores).log()).log()
        rank = confidence.masked_fill(known, float("inf")).argsort(1).argsort(1)
        commit = ~known & (rank >= masked)
        codes, logprobs, known = drawn.where(commit, codes), scores.where(commit, logprobs), known | commit
    return codes, logprobs


# ---- clocks ------------------------------------------------------------------------------------------------

def clock(work: Callable, device: torch.device) -> float:
    """Seconds that work() takes: the thread's CPU time if it has one thread, else wall-clock time."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    now = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait()
    begin = now()
    work()
    wait()
    return now() - begin


def in_turn(variants: dict[str, Callable], repeats: int, device: torch.device, name: str) -> dict[str, list]:
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


def step_weights(model: UnifiedModel) -> list[nn.Linear]:
    """The linear layers that a step of sampling runs."""
    parts = [model.language_model.layers]
    parts += [model.generation_head, model.generation_aligner] if isinstance(model, Janus) else []
    return [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]


def added_memory(work: Callable, device: torch.device) -> int | None:
    """Bytes that work() adds at most to what is resident (Linux) or allocated (CUDA); elsewhere None."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except OSError:
        return None
    read = lambda key: int(status.read_text().split(key)[1].split()[0]) * 1024
    before = read("VmRSS:")
    work()
    return read("VmHWM:") - before


# ---- what is measured --------------------------------------------------------------------------------------

def rollouts(name: str, size: str, batch: int, kind: str, args: argparse.Namespace, speed: float) -> dict:
    """One row: drawing `batch` images by each variant. `speed`: the memory's, in bytes a second."""
    device, dtype, tiny = pick_device(), getattr(torch, kind), size == "tiny"
    if tiny:
        model = load(TINY[name], device, dtype)
    else:
        model = random_model(name, size, dtype, device, args.side)
    prompts, N = [PROMPT] * batch, model.num_image_tokens
    ours = partial(sample_images, model, prompts, range(batch), GUIDANCE, 1.0, not args.no_compile)
    variants = {"ours": ours, "plain": partial(plain_loop, model, prompts)}
    if name == "janus":
        inputs = transformers_twin(model), *model.generation_prompt(prompts)
        variants["transformers"] = partial(draw_with_transformers, *inputs)
    begin = time.perf_counter()
    ours()
    first, memory = time.perf_counter() - begin, added_memory(ours, device)
    if tiny or device.type == "cuda":  # where what is done once weighs
        in_turn(variants, 1, device, "warm-up")
    times = in_turn(variants, args.repeats, device, f"{name} {size}, batch {batch}, {kind}")
    seconds, steps = float(np.median(times["ours"])), model.draw_steps or N
    read = steps * sum(layer.weight.nbytes for layer in step_weights(model))
    whole = sum(weight.nbytes for weight in model.parameters())
    return {
        "model": name, "size": size, "tokens": N, "steps": steps, "batch": batch, "dtype": kind,
        "seconds": times, "tokens_per_second": batch * N / seconds,
        "ratio_vs_transformers": ratio(times, "transformers"),
        "ratio_vs_plain_loop": ratio(times, "plain"), "roofline_share": read / seconds / speed,
        "compile_seconds": 0.0 if args.no_compile else max(0.0, first - seconds),
        "peak_bytes": None if memory is None else whole + memory,
    }


COLUMNS = "model|size|tokens|batch|dtype|tokens/s|x transformers|x plain|bandwidth|GB|compile, s"


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    show = lambda r: "" if r is None else f"{r[0]:.2f} ({r[1]:.2f}-{r[2]:.2f})"
    lines = [f"|{COLUMNS}|", "|---" * (COLUMNS.count("|") + 1) + "|"]
    for row in rows:
        size, peak = row["size"] + "*" * (row["size"] == "1.3b"), row["peak_bytes"]
        cells = (
            row["model"], size, row["tokens"], row["batch"], row["dtype"], f"{row['tokens_per_second']:.0f}",
            show(row["ratio_vs_transformers"]), show(row["ratio_vs_plain_loop"]),
            f"{row['roofline_share']:.2f}", "" if peak is None else f"{peak / 1e9:.2f}",
            f"{row['compile_seconds']:.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def machine(device: torch.device) -> dict:
    """What the figures are of. The bandwidth is that of summing 256 MB, the best of nine times."""
    numbers = torch.ones(64 * 2**20, device=device)
    speed = numbers.nbytes / min(clock(numbers.sum, device) for _ in range(9))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line] or [platform.processor()]
    name = torch.cuda.get_device_name() if device.type == "cuda" else names[0]
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "bandwidth_gb_per_second": speed / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description="measure the sampler", formatter_class=ShortHelp)
    add = parser.add_argument
    add("--models", nargs="+", choices=[*TINY], default=[*TINY], help="(default: both)")
    add("--sizes", nargs="+", choices=["tiny", *SIZES], default=["tiny"], help="(default: tiny)")
    add("--batches", nargs="+", type=positive(int), default=[1, 8, 32], help="images (default: 1 8 32)")
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="(float32)")
    add("--side", type=positive(int), help="tokens a side of an image, if not the size's")
    add("--repeats", type=positive(int), default=5, help="rounds (default: 5)")
    add("--threads", type=positive(int), default=1, help="of a CPU (default: 1)")
    add("--no-compile", action="store_true")
    add("--json", metavar="FILE", help="write everything measured")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    result = {"machine": machine(pick_device()), "rows": []}
    print(result["machine"])
    speed = result["machine"]["bandwidth_gb_per_second"] * 1e9
    for name, size, dtype, batch in product(args.models, args.sizes, args.dtypes, args.batches):
        result["rows"].append(rollouts(name, size, batch, dtype, args, speed))
        if args.json:
            write_json(Path(args.json), result)
    print(table(result["rows"]))


if __name__ == "__main__":
    run(main)
