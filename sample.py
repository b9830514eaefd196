"""Prompt -> image, and image + question -> answer, with the probability of every token that is drawn.

    python sample.py "a photo of a red circle" -n 8 --seed 0 --out circles.png
    python sample.py --image circle.png --question "What is the color of the object?"
    python sample.py "a photo of a bench" --model janus-pro-1b

What is sampled is softmax((l_uncond + w (l_cond - l_uncond)) / T), w the guidance and T the temperature; for
a Show-o softmax(((1 + w) l_cond - w l_uncond) / T), which is the same with 1 + w. `sample_images` records the
log-probability of each code under exactly that distribution; `image_logprobs` computes it again, with
gradient, in one parallel pass. A test holds the two together for every w, T and padding.

A Janus draws code after code. A Show-o starts from masks and draws all codes at once, keeps those that it is
surest of, and again, for some tens of steps; a code's probability is that of the step that kept it, given
what was kept before. FAMILIES is the one place where the two part.

Each image has a seed, from which come its uniform numbers, one a token: the same seed gives the same image
whatever else is in the batch. The token is where the cumulative sum of the softmax passes the uniform number.
"""

import argparse
import errno
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import (
    NAMES, Janus, KVCache, ShowO, UnifiedModel, UserError, causal_mask, load, positions_of, widen,
)

# ------------------------------------------------------------------------------------------------------------
# From hidden states to a token


def guided_logits(
    model: UnifiedModel, hidden: Tensor, weight: float | Tensor, temperature: float | Tensor,
    detach: bool = False,
) -> Tensor:
    """Guided, tempered logits [B, ..., V] of image codes, float32, from hidden states [G, B, ..., D]: those
    of the prompt and, with guidance (G = 2), of its other branch: (l_uncond + weight (l_cond - l_uncond)) /
    T. `detach`: no gradient through that branch."""
    logits = widen(model.generation_head(hidden))  # [G, B, ..., V]
    cond = logits[0]
    if len(logits) == 2:
        uncond = logits[1].detach() if detach else logits[1]
        cond = uncond + weight * (cond - uncond)
    return cond / temperature


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits) [B, V] by inversion: the first whose cumulative probability
    exceeds the row's uniform number in [0, 1) [B]. Returns tokens and their log-probabilities, both [B]."""
    logits = widen(logits)
    top = logits.amax(dim=-1, keepdim=True)
    cumulative = (logits - top).exp().cumsum(dim=-1)  # times the sum, which scales the uniforms
    total = cumulative[:, -1:]
    tokens = (cumulative <= uniforms[:, None] * total).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return tokens, (logits.gather(1, tokens[:, None]) - top - total.log())[:, 0]


def score_logits(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] of tokens [B, T] under logits [B, T, V], with gradient, and the distributions'
    entropies [B, T] in nats, without."""
    logprobs = widen(logits).log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[..., None])[..., 0]  # first: a checkpoint that is run again ends here
    with torch.no_grad():
        return chosen, -(logprobs.exp() * logprobs).sum(-1)


# Uses of an image's seed, each with numbers of its own. (A CPU's generator knows the last 32 bits of a seed.)
IMAGE, ANSWER, NOISE, REPLAY = 0, 1, 2, 2**31


def generator(seed: int, use: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one image for one use."""
    return torch.Generator(device).manual_seed((3 * int(seed) + use) % 2**64)


def uniform_numbers(seeds: Sequence[int], use: int, count: int, device: torch.device) -> Tensor:
    """[B, count] numbers in [0, 1), a row from each image's own generator."""
    return torch.stack([torch.rand(count, generator=generator(seed, use)) for seed in seeds]).to(device)


# ------------------------------------------------------------------------------------------------------------
# Images


@dataclass
class Images:
    """What was sampled and what is needed to compute its probability again."""

    codes: Tensor  # [B, N]
    logprobs: Tensor  # [B, N], of the guided and tempered distribution; 0 where a code is not scored
    ids: Tensor  # [B, P], the prompts
    mask: Tensor  # [B, P], False on padding
    weights: Tensor  # [B, N], a code's share in its image's mean: 1 / N, or S / (K N), K of S steps replayed
    unmask_step: Tensor | None = None  # [B, N], the mask-predict step that committed each code (Show-o)
    replayed: Tensor | None = None  # [B, K], the mask-predict steps whose codes are scored (None: all)


@torch.no_grad()
def sample_images(
    model: UnifiedModel, prompts: Sequence[str], seeds: Sequence[int], guidance: float = 5.0,
    temperature: float = 1.0, compiled: bool = True,
) -> Images:
    """An image for every prompt, from the seed of the same index."""
    ids, mask = model.generation_prompt(prompts)  # [B, P]
    rows, visible, weight = guided_rows(model, ids, mask, guidance)
    w, T = torch.tensor(float(weight), device=model.device), torch.tensor(temperature, device=model.device)
    draw_codes, _ = FAMILIES[type(model)]
    codes, logprobs, unmask_step = draw_codes(model, rows, visible, seeds, w, T, compiled)
    return Images(codes, logprobs, ids, mask, torch.full_like(logprobs, 1 / codes.shape[1]), unmask_step)


def guided_rows(
    model: UnifiedModel, ids: Tensor, mask: Tensor, guidance: float, logprob: str = "guided"
) -> tuple[Tensor, Tensor, float]:
    """The rows that an image's codes are drawn or scored with: prompts [B, P] and below them guidance's other
    branch, so [G B, P], their mask, and the conditional branch's weight. Where that is 1, the other branch
    cancels out and is left out, as it is for the "conditional" log-probability."""
    weight = 1.0 if logprob == "conditional" else model.conditional_weight(guidance)
    if weight != 1:
        other_ids, other_mask = model.unconditional(ids, mask)
        ids, mask = torch.cat((ids, other_ids)), torch.cat((mask, other_mask))
    return ids, mask, weight


def read_prompts(model: UnifiedModel, ids: Tensor, mask: Tensor) -> tuple[KVCache, Tensor, Tensor]:
    """The trunk's pass over prompts [R, P], each different one once: the images of a group share theirs, and
    all rows of guidance's other branch with as much padding are the same.

    Returns the U different prompts' keys and values and last hidden states [U, D], and which each row has
    [R].
    """
    P = ids.shape[1]
    rows, index = torch.unique(torch.cat((ids, mask), dim=1), dim=0, return_inverse=True)  # [U, 2 P], [R]
    ids, mask, kept = rows[:, :P], rows[:, P:].bool(), []
    hidden = model.language_model(model.embed_text(ids), positions_of(mask), causal_mask(mask), keep=kept)
    return kept, hidden[:, -1], index


def make_cache(model: UnifiedModel, kept: KVCache, index: Tensor | slice, rows: int, length: int) -> KVCache:
    """A cache of `rows` rows and `length` columns that begins with the rows `index` of `kept`, which is used
    up."""
    cache = model.language_model.new_cache(rows, length)
    for layer in cache:
        for column, first in zip(layer, kept.pop(0)):
            column[:, :, : first.shape[2]] = first[index]
    return cache


# -- code after code: Janus ----------------------------------------------------------------------------------

BLOCK = 32  # columns by which a cache and what is read of it grow


def draw_in_order(
    model: Janus, ids: Tensor, visible: Tensor, seeds: Sequence[int], weight: Tensor, temperature: Tensor,
    compiled: bool,
) -> tuple[Tensor, Tensor, None]:
    """Code after code of prompts [R, P], where R = G B (`guided_rows`): codes and their log-probs, both [B,
    N]."""
    B, N, P, device = len(seeds), model.num_image_tokens, ids.shape[1], model.device
    uniforms = uniform_numbers(seeds, IMAGE, N, device)  # [B, N]
    length = -(-(P + N) // BLOCK) * BLOCK  # rounded up, or every P is compiled anew
    kept, hidden, index = read_prompts(model, ids, visible)
    cache = make_cache(model, kept, index, len(ids), length)
    codes, logprobs = torch.zeros(B, N, dtype=torch.long, device=device), torch.zeros(B, N, device=device)
    logits = guided_logits(model, hidden[index].unflatten(0, (-1, B)), weight, temperature)
    codes[:, 0], logprobs[:, 0] = draw(logits, uniforms[:, 0])
    n, prompt = torch.tensor([[0], [P]], device=device)
    positions = visible.sum(1, keepdim=True)  # [R, 1]
    visible = F.pad(visible, (0, length - P), value=True)  # [R, length]
    step = compiled_step_image if compiled else step_image
    # Columns that are not filled yet need not be read; but what a GPU has recorded cannot grow.
    block = BLOCK if device.type == "cpu" else N
    for begin in range(0, N - 1, block):
        columns = visible[:, : min(P + begin + block, length - 1)]
        if block < N:
            torch._dynamo.mark_dynamic(columns, 1)
        drawn = model, cache, codes, logprobs, n, prompt, positions, columns, uniforms, weight, temperature
        record = device.type == "cuda"
        repeat(partial(step, *drawn), min(block, N - 1 - begin), record)
    return codes, logprobs, None


def step_image(
    model: Janus, cache: KVCache, codes: Tensor, logprobs: Tensor, n: Tensor, prompt: Tensor,
    positions: Tensor, visible: Tensor, uniforms: Tensor, weight: Tensor, temperature: Tensor,
) -> None:
    """Feeds code number `n` [1] of every image and draws the next one, with its log-prob, into codes and
    logprobs [B, N], in place, and counts `n` on: every step of a rollout is the same call. `prompt` [1] is
    the number of cache columns before the image, `positions` [R, 1] code 0's, `visible` [R, S] the columns
    that are not padding."""
    x = model.embed_codes(codes.index_select(1, n))  # [B, 1, D]
    x = x.repeat(len(visible) // len(codes), 1, 1)  # [R, 1, D]
    slot = prompt + n
    attention_mask = visible & (torch.arange(visible.shape[1], device=x.device) <= slot)
    hidden = model.language_model(x, positions + n, attention_mask[:, None, None], cache, slot)[:, 0]
    logits = guided_logits(model, hidden.view(-1, len(codes), hidden.shape[-1]), weight, temperature)
    code, logprob = draw(logits, uniforms.index_select(1, n + 1)[:, 0])
    n += 1
    codes.index_copy_(1, n, code[:, None])
    logprobs.index_copy_(1, n, logprob[:, None])


def repeat(step: Callable[[], None], times: int, record: bool) -> None:
    """Calls step() so many times; on a GPU recorded once and then replayed, without a call from Python for
    every kernel."""
    warm = min(times, 3) if record else 1  # what is compiled or chosen at first use cannot be recorded
    for _ in range(warm):
        step()
    if record and times > warm:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):  # as the arguments are the same ones
        for _ in range(times - warm):
            step()


def forced_hidden(model: Janus, images: Images, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [G, B, N, D] that predict all codes after prompts [G B, P], each given those before
    it."""
    kept, first, index = read_prompts(model, ids, mask)  # the last token, begin-of-image, predicts code 0
    x = model.embed_codes(images.codes[:, :-1])  # [B, N - 1, D]
    x = x.repeat(len(ids) // len(x), 1, 1)  # [R, N - 1, D]
    T = x.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().expand(len(x), 1, -1, -1)
    prompt = mask[:, None, None].expand(-1, -1, T, -1)
    attention_mask = torch.cat((prompt, causal), dim=-1)  # [R, 1, N - 1, P + N - 1]
    hidden = after_prompts(model, x, attention_mask, kept, index, mask)
    hidden = torch.cat((first.index_select(0, index)[:, None], hidden), dim=1)  # [R, N, D]
    return hidden.unflatten(0, (-1, len(images.codes)))


def after_prompts(
    model: UnifiedModel, x: Tensor, attention_mask: Tensor, kept: KVCache, index: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states [R, T, D] of x [R, T, D], which stands after prompts with `mask` [R, P], the rows `index`
    [R] of `kept`."""
    kept = [tuple(part.index_select(0, index) for part in layer) for layer in kept]  # [R, Hkv, P, d]
    positions = mask.sum(1, keepdim=True) + torch.arange(x.shape[1], device=x.device)
    return model.language_model(x, positions, attention_mask, kept)


# -- all at once, the surest first: Show-o -------------------------------------------------------------------


def mask_schedule(tokens: int, steps: int) -> list[int]:
    """How many of an image's tokens are still masked after each step of mask-predict: the cosine schedule, in
    float32 as published, and at least one token a step. Raises UserError where there are more steps than
    tokens."""
    if not 0 < steps <= tokens:
        raise UserError(f"{steps} mask-predict steps: an image's {tokens} tokens allow 1 to {tokens}")
    masked, left = tokens, []
    for step in range(1, steps):
        masked = max(1, min(masked - 1, int(tokens * torch.cos(torch.tensor(step / steps) * math.pi * 0.5))))
        left.append(masked)
    return [*left, 0]


def use_draw_steps(model: UnifiedModel, steps: int | None) -> None:
    """Makes the model draw with this many mask-predict steps, unless None."""
    if steps is not None:
        if model.draw_steps is None:
            raise UserError("--draw-steps has no meaning for a Janus, which draws one token after the other")
        mask_schedule(model.num_image_tokens, steps)  # refuses too many
        model.draw_steps = steps


def mask_predict(
    model: ShowO, ids: Tensor, visible: Tensor, seeds: Sequence[int], weight: Tensor, temperature: Tensor,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.draw_steps` steps from all masks to an image of prompts [R, P], whose keys and values are
    computed once, as text does not see the image. Codes, their log-probs, and the step that committed each,
    all [B, N].

    The noise on the confidence is as published: multiplied by (1 - share of steps done) at *every* step, so
    that it dies much sooner than the linear fall that the published comment suggests.
    """
    B, N, P, S = len(seeds), model.num_image_tokens, ids.shape[1], model.draw_steps
    device, image = model.device, N + 2  # with <|soi|> and <|eoi|>
    uniforms = uniform_numbers(seeds, IMAGE, S * 2 * N, device).view(B, S, 2, N)
    length = -(-(P + image) // BLOCK) * BLOCK  # rounded up, or every P is compiled anew
    kept, _, index = read_prompts(model, ids, visible)
    cache = make_cache(model, kept, index, len(ids), length)
    slots = torch.arange(P, P + image, device=device)
    positions = visible.sum(1, keepdim=True) + torch.arange(image, device=device)  # [R, N + 2]
    attention_mask = F.pad(F.pad(visible, (0, image), value=True), (0, length - P - image))[:, None, None]
    codes, unmask_step = torch.zeros(2, B, N, dtype=torch.long, device=device)
    known, logprobs, noise = torch.zeros_like(codes, dtype=torch.bool), torch.zeros(B, N, device=device), 1.0
    step_once = compiled_step_canvas if compiled else step_canvas
    for step, masked in enumerate(mask_schedule(N, S)):
        noise *= 1 - (step + 1) / S
        drawn, scores, commit = step_once(
            model, cache, codes, known, slots, positions, attention_mask, uniforms[:, step],
            torch.tensor(noise, device=device), torch.tensor(masked, device=device), weight, temperature,
        )
        codes, logprobs = drawn.where(commit, codes), scores.where(commit, logprobs)
        unmask_step, known = unmask_step.masked_fill(commit, step), known | commit
    return codes, logprobs, unmask_step


def step_canvas(
    model: ShowO, cache: KVCache, codes: Tensor, known: Tensor, slots: Tensor, positions: Tensor,
    attention_mask: Tensor, uniforms: Tensor, noise: Tensor, masked: Tensor, weight: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of mask-predict: from codes [B, N], those `known` [B, N], to codes, their log-probabilities,
    and which of them are now committed, all [B, N]. (MaskGIT; models/modeling_showo.py and sampling.py of
    showlab/Show-o.)

    Args:
        slots, positions, attention_mask: cache columns [N + 2], rotary positions [R, N + 2], [R, 1, 1, S].
        uniforms: [B, 2, N], for the codes and for the Gumbel noise on their confidence.
        noise, masked: how much of that noise, and how many codes stay masked, the least confident.
    """
    x = model.embed_canvas(codes, known).repeat(len(attention_mask) // len(codes), 1, 1)  # [R, N + 2, D]
    attention_mask = attention_mask.expand(-1, -1, x.shape[1], -1)
    hidden = model.language_model(x, positions, attention_mask, cache, slots)[:, 1:-1]
    logits = guided_logits(model, hidden.view(-1, *codes.shape, hidden.shape[-1]), weight, temperature)
    drawn, logprobs = draw(logits.flatten(0, 1), uniforms[:, 0].flatten())  # from [B N, V]
    drawn, logprobs = drawn.view_as(codes), logprobs.view_as(codes)
    confidence = logprobs - noise * (-uniforms[:, 1].log()).log()
    confidence = confidence.masked_fill(known, math.inf)
    rank = confidence.argsort(dim=1, stable=True).argsort(1)  # 0: the least confident
    return drawn, logprobs, ~known & (rank >= masked)


def replayed_hidden(model: ShowO, images: Images, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [G, B, N, D] that predict each code that is scored, after prompts [G B, P], given the
    codes that were committed before it. Which step commits which code is taken as given."""
    codes, unmask_step, hidden = images.codes, images.unmask_step, 0.0
    B, N = codes.shape
    kept, _, index = read_prompts(model, ids, mask)
    attention_mask = F.pad(mask, (0, N + 2), value=True)[:, None, None].expand(-1, -1, N + 2, -1)
    every = torch.arange(model.draw_steps, device=codes.device).expand(B, -1)  # [B, S]
    for step in (every if images.replayed is None else images.replayed).T:  # [B], an image's own
        x = model.embed_canvas(codes, unmask_step < step[:, None])  # [B, N + 2, D]
        x = x.repeat(len(ids) // B, 1, 1)  # [R, N + 2, D]
        now = after_prompts(model, x, attention_mask, kept, index, mask)[:, 1:-1].unflatten(0, (-1, B))
        hidden = now.where((unmask_step == step[:, None])[..., None], hidden)
    return hidden


@torch.no_grad()
def choose_scored(
    model: UnifiedModel, images: Images, seeds: Sequence[int], estimator: str | None, count: int | None,
    *scoring,
) -> Images:
    """The same images, with the choice of what is scored of a masked-diffusion trajectory. A Janus' stay as
    they are.

    - "replay": each code given the canvas of the step that committed it; all steps (`count` 0), or `count`
      random ones of each image, whose codes then count (all steps) / count times. The subsets' mean is that
      over all steps.
    - "remask": a share of each image's codes, uniform in [0.6, 1), is masked anew at random, and scored all
      at once given the others: one pass, of a distribution they were not sampled from. Their old log-probs
      are then `model`'s, scored by image_logprobs(model, images, *scoring) with these very masks (left out
      without `scoring`). (MaskGRPO, arXiv 2510.02880, which scores the conditional branch: `--logprob
      conditional`.)
    """
    if images.unmask_step is None:
        return images
    N, S = images.codes.shape[1], model.draw_steps
    if estimator != "remask":
        if not count or count == S:
            return images
        order = uniform_numbers(seeds, REPLAY, S, model.device).argsort(1)  # [B, S]
        replayed = order[:, :count]
        scored = (images.unmask_step[..., None] == replayed[:, None]).any(-1)  # [B, N]
        weights = scored * S / (count * N)
        return replace(images, replayed=replayed, weights=weights, logprobs=images.logprobs * scored)
    uniforms = uniform_numbers(seeds, REPLAY, N + 1, model.device)
    masked = (N * (0.6 + 0.4 * uniforms[:, :1])).round()  # [B, 1]
    step = (uniforms[:, 1:].argsort(1).argsort(1) < masked).long()  # step 1 scores what is masked
    images = replace(images, unmask_step=step, replayed=torch.ones_like(step[:, :1]), weights=step / masked)
    return replace(images, logprobs=image_logprobs(model, images, *scoring)[0]) if scoring else images


# -- the two families, and what is fast ----------------------------------------------------------------------


# How a kind of model draws an image's codes, and what gives the hidden states that predict given ones.
FAMILIES = {
    Janus: (draw_in_order, forced_hidden),
    ShowO: (mask_predict, replayed_hidden),
}


class LoopAttention(TorchFunctionMode):
    """Replaces the library's attention of one query. Few rows make a step a matter of memory bandwidth, of
    which the library uses a third at best; written as sums of products it becomes the compiler's own loops on
    a CPU, which read keys and values once, in order."""

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and args[0].shape[2] == 1:
            return attend_with_one(*args, kwargs["attn_mask"])
        return func(*args, **(kwargs or {}))


def attend_with_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """scaled_dot_product_attention [B, H, 1, d] of one query a head, over keys and values [B, Hkv, S, d]."""
    B, H, _, d = q.shape
    q = widen(q).view(B, k.shape[1], -1, 1, d)  # [B, Hkv, H / Hkv, 1, d]
    # As strided, each is stored: else the compiler computes it again in every iteration of the loop that
    # reads it.
    scores = (q.as_strided(q.shape, q.stride()) * widen(k)[:, :, None]).sum(-1) * d**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    weights = weights.as_strided(weights.shape, weights.stride())[..., None]
    # Sums over tiles of a vector's width share one loop, which reads v in the order in which it lies in
    # memory.
    out = [(weights * widen(tile)[:, :, None]).sum(-2) for tile in v.split(16, -1)]
    return torch.cat(out, dim=-1).view(B, H, 1, d).to(v.dtype)


def step_image_in_loops(*arguments) -> None:
    """step_image as it is compiled for a CPU."""
    with LoopAttention():
        step_image(*arguments)


torch._dynamo.config.recompile_limit = 64  # a graph for every batch size and cache length
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}  # on a CPU: product and sum at once
in_loops = step_image if torch.cuda.is_available() else step_image_in_loops
compiled_step_image = torch.compile(in_loops, dynamic=False, options=OPTIONS)
compiled_step_canvas = torch.compile(step_canvas, dynamic=False, options=OPTIONS)
COMPILING = "compiling the sampler on first use: up to a minute (--no-compile avoids it)"
PAYS = 500_000  # codes to be drawn from which compiling is made up for: it saves some 0.1 ms a code


def compiling_pays(model: UnifiedModel, pictures: int) -> bool:
    """Whether so many pictures make up for the minute that compiling the sampler takes."""
    return pictures * model.num_image_tokens >= PAYS


# -- their log-probabilities, again --------------------------------------------------------------------------


def image_logits(
    model: UnifiedModel, images: Images, guidance: float, temperature: float, logprob: str = "guided"
) -> Tensor:
    """The logits [B, N, V] that each code of `images` was drawn from, with gradient.

    logprob: "guided", the distribution that is sampled; "detached", the same without gradient through the
    unconditional branch; "conditional", the prompt's branch alone, which is *not* what is sampled unless the
    unconditional branch cancels out, but is what published Janus trainers score.
    """
    ids, mask, weight = guided_rows(model, images.ids, images.mask, guidance, logprob)
    _, hidden_of = FAMILIES[type(model)]
    hidden = hidden_of(model, images, ids, mask)  # [G, B, N, D]
    return guided_logits(model, hidden, weight, temperature, logprob == "detached")


CHUNK = 64  # codes of each image whose logits exist at once


def image_logprobs(
    model: UnifiedModel, images: Images, guidance: float, temperature: float, logprob: str = "guided"
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, N] of the codes under `image_logits`, with gradient, and 0 for those that are not
    scored; and each distribution's entropy [B, N], without. The logits of a few codes at a time are made, and
    made again in the backward pass: nothing of size [B, N, V] ever exists."""
    ids, mask, weight = guided_rows(model, images.ids, images.mask, guidance, logprob)
    _, hidden_of = FAMILIES[type(model)]
    hidden = hidden_of(model, images, ids, mask)  # [G, B, N, D]
    detach = logprob == "detached"
    score = lambda h, codes: score_logits(guided_logits(model, h, weight, temperature, detach), codes)
    if torch.is_grad_enabled():
        score = partial(checkpoint, score, use_reentrant=False)
    chunks = zip(hidden.split(CHUNK, dim=2), images.codes.split(CHUNK, dim=1))
    pieces = [score(h, codes) for h, codes in chunks]
    logprobs, entropy = (torch.cat(kind, dim=1) for kind in zip(*pieces))
    return logprobs * (images.weights > 0), entropy


# -- as something that a gradient goes through ---------------------------------------------------------------


def relaxed_codes(
    logits: Tensor, codes: Tensor, tau: float, seeds: Sequence[int], soft: float = 0.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Gumbel-softmax of an image that has been sampled: going backward it is softmax((logits + noise) / tau)
    [B, N, V], the noise being what made these codes win; going forward a share `soft` of that, and of the
    codes' one-hots the rest. With 0 these alone: straight-through.

    Given the arg-max c, the largest perturbed logit m is logsumexp(logits) + Gumbel, and the others are
    Gumbels cut off at m (Maddison et al. 2014; Paulus et al. 2020, "Rao-Blackwellizing the straight-through
    Gumbel-softmax"). Over sampled codes the noise is plain Gumbel(0, 1) again. Each image's comes from its
    own seed. The backward pass goes through each code N `weights` [B, N] times, so that it has no bias where
    only a random part of them is replayed; the others stay one-hot.
    """
    with torch.no_grad():
        noise = gumbel_given(widen(logits).detach(), codes, seeds)
    relaxed = ((widen(logits) + noise) / tau).softmax(-1)
    hard = F.one_hot(codes, logits.shape[-1]).to(relaxed.dtype)
    shown = torch.lerp(hard, relaxed.detach(), soft)
    bracket = relaxed - relaxed.detach()  # exactly zero
    if weights is None:
        return shown + bracket
    weights = weights[..., None]
    return shown.where(weights > 0, hard) + bracket * codes.shape[1] * weights


def gumbel_given(logits: Tensor, codes: Tensor, seeds: Sequence[int]) -> Tensor:
    """Gumbel noise [B, N, V] of which arg-max(logits + noise) is `codes` [B, N], from one seed an image."""
    exponential = torch.empty_like(logits)  # [B, N, V]
    for row, seed in zip(exponential, seeds):
        row.exponential_(generator=generator(seed, NOISE, row.device))
    chosen = codes[..., None]
    top = logits.logsumexp(-1, keepdim=True) - exponential.gather(-1, chosen).log()  # [B, N, 1]
    cut = -torch.logaddexp(exponential.log() - logits, -top)  # Gumbels, given that they are less
    cut = torch.minimum(cut, top - 1e-5 * top.abs().clamp(min=1))  # also after rounding
    return cut.scatter(-1, chosen, top) - logits


def bound_gradient(images: Tensor, norm: float) -> Tensor:
    """The same one-hots [B, N, V], in each of which the gradient that comes back is cut to a norm. Of the
    judge's gradient at a picture a few codes have nearly all, which say little of what another code would
    do (experiments/RESULTS.md)."""
    if images.requires_grad:
        images.register_hook(lambda g: g * (norm / g.norm(dim=-1, keepdim=True).clamp(min=norm)))
    return images


# ------------------------------------------------------------------------------------------------------------
# Answers


@dataclass
class Answers:
    """Sampled answers, right-padded."""

    texts: list[str]
    ids: Tensor  # [B, A], up to and including the end-of-sentence token
    logprobs: Tensor  # [B, A], of softmax(logits)
    weights: Tensor  # [B, A], a token's share in its answer's mean: 1 / length, and 0 on padding


@torch.no_grad()
def sample_answers(
    model: UnifiedModel, image_features: Tensor, questions: Sequence[str], seeds: Sequence[int] | None = None,
    max_tokens: int = 40,
) -> Answers:
    """An answer to each question about the image (of `model.image_features`) of the same index: sampled, or
    greedy without seeds. Ends at the end-of-sentence token or after `max_tokens`."""
    ids, mask = model.question_prompt(questions)  # [B, Q]
    Q, end, kept = ids.shape[1], model.tokenizer.eos_token_id, []
    uniforms = None if seeds is None else uniform_numbers(seeds, ANSWER, max_tokens, model.device)
    x, attention_mask = model.embed_question(ids, image_features), model.question_attention_mask(ids, mask)
    hidden = model.language_model(x, positions_of(mask), attention_mask, keep=kept)
    cache = make_cache(model, kept, slice(None), len(ids), Q + max_tokens)
    logits = model.lm_head(hidden[:, -1])
    position = mask.sum(1, keepdim=True)  # [B, 1]
    visible = F.pad(mask, (0, max_tokens), value=True)
    columns = torch.arange(Q + max_tokens, device=model.device)
    alive = torch.ones_like(mask[:, 0])
    tokens, logprobs, masks = [], [], []
    for t in range(max_tokens):
        if uniforms is None:
            token = logits.argmax(-1)
            logprob = score_logits(logits[:, None], token[:, None])[0][:, 0]
        else:
            token, logprob = draw(logits, uniforms[:, t])
        tokens.append(token.where(alive, model.tokenizer.pad_token_id))
        logprobs.append(logprob.where(alive, 0.0))
        masks.append(alive)
        alive = alive & (token != end)
        if not alive.any() or t + 1 == max_tokens:
            break
        attention_mask = (visible & (columns <= Q + t))[:, None, None]
        x = model.embed_text(token[:, None])
        hidden = model.language_model(x, position + t, attention_mask, cache, columns[Q + t : Q + t + 1])
        logits = model.lm_head(hidden[:, 0])
    ids, mask = torch.stack(tokens, 1), torch.stack(masks, 1)  # [B, A]
    decode = partial(model.tokenizer.decode, skip_special_tokens=True)
    texts = [decode(row[keep]).strip() for row, keep in zip(ids, mask)]
    return Answers(texts, ids, torch.stack(logprobs, 1), mask / mask.sum(1, keepdim=True))


def encode_answers(model: UnifiedModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Known answers as token ids [B, A], right-padded, each ended by the end-of-sentence token, and their
    mask."""
    tokens = model.tokenizer
    # A reply starts with a space after the colon of the assistant's tag, as in the original's conversations.
    rows = [tokens.encode(" " + text, add_special_tokens=False) + [tokens.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    padded = [row + [tokens.pad_token_id] * (longest - len(row)) for row in rows]
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    return torch.tensor(padded, device=model.device), mask


def answer_logprobs(
    model: UnifiedModel, image_features: Tensor, questions: Sequence[str], answers: Tensor
) -> Tensor:
    """Log-probabilities [B, A] of the answers' tokens [B, A], teacher-forced, with gradient also into the
    image."""
    ids, mask = model.question_prompt(questions)  # [B, Q]
    x = torch.cat((model.embed_question(ids, image_features), model.embed_text(answers[:, :-1])), dim=1)
    mask = F.pad(mask, (0, answers.shape[1] - 1), value=True)  # padding on the right is seen only by itself
    attention_mask = model.question_attention_mask(torch.cat((ids, answers[:, :-1]), dim=1), mask)
    hidden = model.language_model(x, positions_of(mask), attention_mask)  # [B, Q + A - 1, D]
    logits = model.lm_head(hidden[:, ids.shape[1] - 1 :])  # the prompt's last token predicts the first
    return score_logits(logits, answers)[0]


# ------------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8. Rounded, where both originals cut off the fraction: so a
    picture is not half a level darker, and one that is read and written again stays as it was."""
    levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def upright(path: str | Path) -> Image.Image:
    """The picture in a file in RGB, turned as its EXIF data say, which the originals do not read: a question
    about a photograph is about what its viewer sees. Raises OSError where it is damaged or not there."""
    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def read_image(model: UnifiedModel, path: str) -> Tensor:
    """Pixels [1, 3, H, W] of an image file, made the model's square. Raises UserError where it is none."""
    try:
        image = upright(path)
    except OSError as error:
        raise UserError(f"{path}: not an image that can be read ({error.strerror or error})") from None
    return model.preprocess(image).to(model.device)


def contact_sheet(images: np.ndarray, captions: Sequence[str], path: str | Path, columns: int = 6) -> None:
    """Writes pictures [B, H, W, 3] uint8 with a caption of a few lines under each, small ones enlarged."""
    side = max(images.shape[1], 144)
    wrap = lambda text: "\n".join(textwrap.fill(line, side // 6) for line in text.split("\n"))
    wrapped = [wrap(caption).split("\n") for caption in captions]
    tops = [0]  # of rows, each as high as its longest caption wants
    for start in range(0, len(images), columns):
        tops.append(tops[-1] + side + 14 * max(map(len, wrapped[start : start + columns])) + 14)
    sheet = Image.new("RGB", ((side + 12) * min(columns, len(images)), tops[-1]), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        left, top = (side + 12) * (i % columns) + 6, tops[i // columns] + 6
        sheet.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (left, top))
        pen.multiline_text((left, top + side + 2), "\n".join(lines), fill="black")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------
# What every script shares: files that are whole or not there, ranks, one-line errors, flags


def write_whole(path: Path, text: str) -> None:
    """Writes beside and renames, so that the file is whole or not there."""
    temporary = path.with_name(f"{path.name}.partial{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, content: dict | list) -> None:
    """The content as a JSON file, whole or not there."""
    write_whole(path, json.dumps(content, indent=1))


def pick_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_ranks(patience: float = 600) -> tuple[int, int, torch.device]:
    """This process' rank, the number of ranks, and its device; joins the others when started by torchrun. A
    rank that waits for another one for more than `patience` seconds gives up (`run` says so)."""
    device = pick_device()
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    gpu = device if device.type == "cuda" else None
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=patience), device_id=gpu)
    return dist.get_rank(), dist.get_world_size(), device


def agree(decide: Callable):
    """What decide() gives on rank 0, on every rank; and so with its UserError."""
    if not dist.is_initialized():
        return decide()
    result = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = decide()
        except UserError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def first_to_say() -> bool:
    """Whether no other rank has said yet why the run ends: every rank fails, and one says why."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("said why", 1) == 1
    except RuntimeError:  # the rank that kept the count is gone
        return True


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)


def run(main: Callable[[], None]) -> None:
    """Calls main(); a user's mistake, a disk's, or the loss of another rank becomes one line on stderr and
    exit code 1, a programmer's mistake keeps its traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}" if first_to_say() else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in DISK:
            raise
        name = f"{error.filename}: " if error.filename else ""
        what = f"error: {name}cannot be written ({error.strerror}); what is saved is whole"
        sys.exit(what if first_to_say() else 1)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if first_to_say():
            reason = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:120]
            rank = os.environ["RANK"]
            print(f"error: rank {rank} lost another rank, which died or fell silent ({reason}); what is "
                  "saved is whole: go on with --resume", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out would wait for the lost rank


def positive(kind: type, zero: bool = False) -> Callable:
    """argparse type: a finite number above zero, or from `zero` on."""

    def parse(text: str):
        value = kind(text)
        if not 0 <= value < math.inf or value == 0 and not zero:
            wrong = "negative" if zero else "not above 0"
            raise argparse.ArgumentTypeError(f"{text} is {wrong} or not finite")
        return value

    return parse


non_negative = partial(positive, zero=True)


class ShortHelp(argparse.HelpFormatter):
    """--help with N for every number, and room for what it means."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26, width=118)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type else super()._get_default_metavar_for_optional(action)


# ------------------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """The command line; exits with 2 and a line on what is wrong with it."""
    parser = argparse.ArgumentParser(description="draw images, or ask about one", formatter_class=ShortHelp)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw")
    add("--model", default="tiny", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny)")
    add("-n", type=positive(int), default=8, help="images (default: 8)")
    add("--seed", type=non_negative(int), default=0, help="of the first image (default: 0)")
    add("--guidance", type=non_negative(float), help="w (default: the checkpoint's)")
    add("--temperature", type=positive(float), default=1.0, help="of image tokens (default: 1)")
    add("--draw-steps", type=positive(int), help="of mask-predict, Show-o's (default: the checkpoint's)")
    add("--out", default="samples.png", help="where the pictures go (default: samples.png)")
    add("--image", metavar="FILE", help="a picture to ask about")
    add("--question", metavar="TEXT", help="what to ask")
    add("--no-compile", action="store_true", help="never compile the sampler, as is done for many images")
    args = parser.parse_args()
    if bool(args.image) != bool(args.question) or bool(args.prompt) == bool(args.image):
        parser.error("give a prompt to draw, or --image and --question")
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--out {args.out}: give a name that ends in .png or .jpg")
    return args


def main() -> None:
    args, device = parse_args(), pick_device()
    model = load(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    use_draw_steps(model, args.draw_steps)
    if args.image:
        with torch.no_grad():
            features = model.image_features(read_image(model, args.image))
        print(sample_answers(model, features, [args.question]).texts[0])
        return
    guidance = model.guidance if args.guidance is None else args.guidance
    compiled = not args.no_compile and compiling_pays(model, args.n)
    if compiled:
        print(COMPILING, file=sys.stderr)
    pictures, seeds = [], range(args.seed, args.seed + args.n)
    for start in tqdm(range(0, args.n, 16), desc="drawing", unit="batch", disable=None):
        part = seeds[start : start + 16]
        images = sample_images(model, [args.prompt] * len(part), part, guidance, args.temperature, compiled)
        with torch.no_grad():
            pictures.append(to_uint8(model.to_pixels(images.codes)))
    contact_sheet(np.concatenate(pictures), [f"seed {seed}" for seed in seeds], args.out)
    print(f"{args.n} images of {args.prompt!r}, guidance {guidance:g}, temperature {args.temperature:g}")
    print(f"look at {args.out}; then train it: torchrun grpo.py --model {args.model}")


if __name__ == "__main__":
    run(main)
