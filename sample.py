"""Prompt -> image, and image + question -> answer, with the probability of every token that is drawn.

    python sample.py "a photo of a red circle" -n 8 --seed 0 --out circles.png
    python sample.py --image circle.png --question "What is the color of the object?"
    python sample.py "a photo of a bench" --model janus-pro-1b
    python sample.py --bench                       # how fast, beside transformers and a plain loop (bench.py)

What is sampled is softmax((l_uncond + w (l_cond - l_uncond)) / T), w the guidance and T the temperature; for a Show-o
softmax(((1 + w) l_cond - w l_uncond) / T), which is the same with 1 + w. `sample_images` records the log-probability of
each code under exactly that distribution; `image_logits` computes the same distribution again, with gradient. A test
holds the two together for every w, T and padding.

A Janus draws code after code. A Show-o starts from masks and draws all codes at once, keeps those that it is surest of,
and again, for some tens of steps; a code's probability is that of the step that kept it, given what was kept before.

Each image has a seed, from which come its uniform numbers, one a token: the same seed gives the same image whatever
else is in the batch. The token is where the cumulative sum of the softmax passes the uniform number.
"""

import argparse
import errno
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
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoint import NAMES, load
from model import Cache, Janus, ShowO, UnifiedModel, UserError, causal, positions_of, widen

# ---------------------------------------------------------------------------------------------------------------------
# The hot path: one step of the trunk, one draw


def guide(cond: Tensor, uncond: Tensor | None, guidance: float | Tensor, temperature: float | Tensor) -> Tensor:
    """Guided, tempered logits in float32: (l_uncond + w (l_cond - l_uncond)) / T. Without an unconditional branch the
    conditional logits alone, which is w = 1."""
    cond = widen(cond)
    if uncond is not None:
        uncond = widen(uncond)
        cond = uncond + guidance * (cond - uncond)
    return cond / temperature


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits) [B, V] by inversion: the first whose cumulative probability exceeds the
    row's uniform number in [0, 1) [B]. Returns tokens and their log-probabilities, both [B]."""
    logits = widen(logits)
    top = logits.amax(dim=-1, keepdim=True)
    cumulative = (logits - top).exp().cumsum(dim=-1)  # of probabilities times their sum, which scales the uniform number
    total = cumulative[:, -1:]
    tokens = (cumulative <= uniforms[:, None] * total).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return tokens, (logits.gather(1, tokens[:, None]) - top - total.log())[:, 0]


def draw_code(model: Janus, hidden: Tensor, uniforms: Tensor, guidance: Tensor, temperature: Tensor):
    """Hidden states [R, D] of the last position -> image codes and log-probabilities [B]; R = B, or 2 B with the
    unconditional rows below the conditional ones."""
    logits = model.generation_head(hidden)
    cond, uncond = logits.chunk(2) if len(hidden) == 2 * len(uniforms) else (logits, None)
    return draw(guide(cond, uncond, guidance, temperature), uniforms)


def step_image(
    model: Janus, cache: Cache, codes: Tensor, logprobs: Tensor, n: Tensor, prompt: Tensor, positions: Tensor,
    visible: Tensor, uniforms: Tensor, guidance: Tensor, temperature: Tensor,
) -> None:
    """Feeds code number `n` [1] of every image and draws the next one, with its log-prob, into codes and logprobs
    [B, N], in place, and counts `n` on: every step of a rollout is the same call. `prompt` [1] is the number of cache
    columns before the image, `positions` [R, 1] code 0's, `visible` [R, S] the columns that are not padding."""
    x = model.embed_codes(codes.index_select(1, n))  # [B, 1, D]
    x = x.repeat(len(visible) // len(codes), 1, 1)  # [R, 1, D]
    slot = prompt + n
    mask = visible & (torch.arange(visible.shape[1], device=x.device) <= slot)
    hidden = model.language_model(x, positions + n, mask[:, None, None], cache, slot)[:, 0]
    code, logprob = draw_code(model, hidden, uniforms.index_select(1, n + 1)[:, 0], guidance, temperature)
    n += 1
    codes.index_copy_(1, n, code[:, None])
    logprobs.index_copy_(1, n, logprob[:, None])


torch._dynamo.config.recompile_limit = 64  # a graph for every batch size and cache length, which grows in BLOCKs
# On a CPU a product and its sum are one instruction.
OPTIONS = {} if torch.cuda.is_available() else {"cpp.enable_floating_point_contract_flag": "fast"}
compiled_step_image = torch.compile(step_image, dynamic=False, options=OPTIONS)


def step_canvas(
    model: ShowO, cache: Cache, codes: Tensor, known: Tensor, slots: Tensor, positions: Tensor, look: Tensor,
    uniforms: Tensor, noise: Tensor, masked: Tensor, guidance: Tensor, temperature: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of mask-predict: from codes [B, N], those `known` [B, N], to codes, their log-probabilities, and which
    of them are now committed, all [B, N]. (MaskGIT; models/modeling_showo.py and sampling.py of showlab/Show-o.)

    Args:
        slots, positions, look: cache columns [N + 2], rotary positions [R, N + 2] and attention mask [R, 1, 1, S].
        uniforms: [B, 2, N], for the codes and for the Gumbel noise on their confidence.
        noise, masked: how much of that noise, and how many codes stay masked, the least confident.
    """
    x = model.embed_canvas(codes, known).repeat(len(look) // len(codes), 1, 1)  # [R, N + 2, D]
    hidden = model.language_model(x, positions, look.expand(-1, -1, x.shape[1], -1), cache, slots)[:, 1:-1]
    logits = model.generation_head(hidden)  # [R, N, V]
    cond, uncond = logits.chunk(2) if len(look) == 2 * len(codes) else (logits, None)
    drawn, logprobs = draw(guide(cond, uncond, guidance, temperature).flatten(0, 1), uniforms[:, 0].flatten())
    drawn, logprobs = drawn.view_as(codes), logprobs.view_as(codes)
    confidence = logprobs - noise * (-uniforms[:, 1].log()).log()
    rank = confidence.masked_fill(known, float("inf")).argsort(dim=1, stable=True).argsort(1)  # 0: the least confident
    return drawn, logprobs, ~known & (rank >= masked)


compiled_step_canvas = torch.compile(step_canvas, dynamic=False, options=OPTIONS)


IMAGE, ANSWER, NOISE, REPLAY = 0, 1, 2, 2**63  # what an image's seed is used for, each with numbers of its own


def generator(seed: int, use: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one image for one use."""
    return torch.Generator(device).manual_seed((3 * int(seed) + use) % 2**64)


def uniform_numbers(seeds: Sequence[int], use: int, count: int, device: torch.device) -> Tensor:
    """[B, count] numbers in [0, 1), a row from each image's own generator."""
    return torch.stack([torch.rand(count, generator=generator(seed, use)) for seed in seeds]).to(device)


def read_prompts(model: UnifiedModel, ids: Tensor, mask: Tensor) -> tuple[Cache, Tensor, Tensor]:
    """The trunk's pass over prompts [R, P], each different one once: the images of a group share theirs, and all rows
    of guidance's other branch with as much padding are the same.

    Returns the U different prompts' keys and values and last hidden states [U, D], and which each row has [R].
    """
    P = ids.shape[1]
    rows, index = torch.unique(torch.cat((ids, mask), dim=1), dim=0, return_inverse=True)  # [U, 2 P], [R]
    ids, mask, past = rows[:, :P], rows[:, P:].bool(), []
    hidden = model.language_model(model.embed_text(ids), positions_of(mask), causal(mask), keep=past)
    return past, hidden[:, -1], index


def make_cache(model: UnifiedModel, past: Cache, index: Tensor | slice, rows: int, length: int) -> Cache:
    """A cache of `rows` rows and `length` columns that begins with the rows `index` of `past`, which is used up."""
    cache = model.language_model.new_cache(rows, length)
    for layer in cache:
        for column, kept in zip(layer, past.pop(0)):
            column[:, :, : kept.shape[2]] = kept[index]
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclass
class Images:
    """What was sampled and what is needed to compute its probability again."""

    codes: Tensor  # [B, N]
    logprobs: Tensor  # [B, N], of the guided and tempered distribution
    ids: Tensor  # [B, P], the prompts
    mask: Tensor  # [B, P], False on padding
    steps: Tensor | None = None  # [B, N], when each code was drawn: its place, or the mask-predict step that kept it
    replay: Tensor | None = None  # [B, K], the mask-predict steps whose codes are scored (None: all)
    weights: Tensor | None = None  # [B, N], how much each code counts in a mean; 0 where it is not scored

    def __post_init__(self):
        if self.weights is None:
            self.weights = torch.ones_like(self.codes, dtype=torch.float32)

    def score(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, N] of the codes under logits [B, N, V], 0 for those that are not scored, and the
        distributions' entropies [B, N], without gradient."""
        logprobs, entropy = score_logits(logits, self.codes)
        return logprobs * (self.weights > 0), entropy

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each image's codes: [B, N] -> [B], without bias where only a random part of them is scored."""
        return (values * self.weights).mean(1)


@torch.no_grad()
def sample_images(
    model: UnifiedModel, prompts: Sequence[str], seeds: Sequence[int], guidance: float = 5.0, temperature: float = 1.0,
    compiled: bool = True,
) -> Images:
    """An image for every prompt, from the seed of the same index. Without guidance (where the conditional branch weighs
    1) the unconditional branch cancels out and is not computed."""
    ids, mask = model.generation_prompt(prompts)  # [B, P]
    rows, visible, weight = ids, mask, model.conditional_weight(guidance)  # [R, P]
    if weight != 1:
        rows, visible = (torch.cat(pair) for pair in zip((ids, mask), model.unconditional(ids, mask)))
    w, T = torch.tensor(float(weight), device=model.device), torch.tensor(temperature, device=model.device)
    draw_all = mask_predict if isinstance(model, ShowO) else draw_in_order
    codes, logprobs, steps = draw_all(model, rows, visible, seeds, w, T, compiled)
    return Images(codes, logprobs, ids, mask, steps)


def draw_in_order(
    model: Janus, ids: Tensor, visible: Tensor, seeds: Sequence[int], guidance: Tensor, temperature: Tensor,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Code after code of prompts [R, P] (R = B, or 2 B with guidance's other branch below them): codes, their
    log-probs, and when each was drawn, all [B, N]."""
    B, N, P = len(seeds), model.num_image_tokens, ids.shape[1]
    device = model.device
    uniforms = uniform_numbers(seeds, IMAGE, N, device)  # [B, N]
    length = -(-(P + N) // BLOCK) * BLOCK  # rounded up, or every P is compiled anew
    past, hidden, index = read_prompts(model, ids, visible)
    cache = make_cache(model, past, index, len(ids), length)
    codes, logprobs = torch.zeros(B, N, dtype=torch.long, device=device), torch.zeros(B, N, device=device)
    codes[:, 0], logprobs[:, 0] = draw_code(model, hidden[index], uniforms[:, 0], guidance, temperature)
    n, prompt = torch.tensor([[0], [P]], device=device)
    positions = visible.sum(1, keepdim=True)  # [R, 1]
    visible = F.pad(visible, (0, length - P), value=True)  # [R, length]
    step = compiled_step_image if compiled else step_image
    if device.type == "cuda":
        arguments = model, cache, codes, logprobs, n, prompt, positions, visible, uniforms, guidance, temperature
        repeat(partial(step, *arguments), N - 1, graph=compiled)
    else:
        for begin in range(0, N - 1, BLOCK):  # columns that are filled; the others need not be read
            look = visible[:, : min(P + begin + BLOCK, length - 1)]
            torch._dynamo.mark_dynamic(look, 1)
            arguments = model, cache, codes, logprobs, n, prompt, positions, look, uniforms, guidance, temperature
            step(*arguments)
            with torch.compiler.set_stance(skip_guard_eval_unsafe=True):  # as these arguments are the same ones
                for _ in range(begin + 1, min(begin + BLOCK, N - 1)):
                    step(*arguments)
    return codes, logprobs, torch.arange(N, device=device).repeat(B, 1)


BLOCK = 32  # columns of a cache


def repeat(step: Callable[[], None], times: int, graph: bool) -> None:
    """Calls step() so many times on a GPU: recorded once, then replayed without a call from Python for every kernel."""
    warm = min(times, 3) if graph else times  # what is compiled or chosen at first use cannot be recorded
    for _ in range(warm):
        step()
    if times > warm:
        recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording):
            step()
        for _ in range(times - warm):
            recording.replay()


def mask_schedule(tokens: int, steps: int) -> list[int]:
    """How many of an image's tokens are still masked after each step of mask-predict: the cosine schedule, in float32
    as published, and at least one token a step. Raises UserError where there are more steps than tokens."""
    if not 0 < steps <= tokens:
        raise UserError(f"{steps} mask-predict steps: an image has {tokens} tokens, and a step commits at least one")
    masked, left = tokens, []
    for step in range(1, steps):
        masked = max(1, min(masked - 1, int(tokens * torch.cos(torch.tensor(step / steps) * math.pi * 0.5))))
        left.append(masked)
    return [*left, 0]


def use_draw_steps(model: UnifiedModel, steps: int | None) -> None:
    """Makes the model draw with this many mask-predict steps, unless None."""
    if steps is not None:
        if model.steps is None:
            raise UserError("--draw-steps has no meaning for a Janus, which draws one token after the other")
        mask_schedule(model.num_image_tokens, steps)  # refuses too many
        model.steps = steps


def mask_predict(
    model: ShowO, ids: Tensor, visible: Tensor, seeds: Sequence[int], guidance: Tensor, temperature: Tensor,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.steps` steps from all masks to an image of prompts [R, P], whose keys and values are computed once, as
    text does not see the image. Codes, their log-probs, and the step that committed each, all [B, N].

    The noise on the confidence is as published: multiplied by (1 - share of steps done) at *every* step, so that it
    dies much sooner than the linear fall that the published comment suggests.
    """
    B, N, P, S = len(seeds), model.num_image_tokens, ids.shape[1], model.steps
    device, image = model.device, N + 2  # with <|soi|> and <|eoi|>
    uniforms = uniform_numbers(seeds, IMAGE, S * 2 * N, device).view(B, S, 2, N)
    length = -(-(P + image) // 32) * 32  # rounded up, or every P is compiled anew
    past, _, index = read_prompts(model, ids, visible)
    cache = make_cache(model, past, index, len(ids), length)
    slots = torch.arange(P, P + image, device=device)
    positions = visible.sum(1, keepdim=True) + torch.arange(image, device=device)  # [R, N + 2]
    look = F.pad(F.pad(visible, (0, image), value=True), (0, length - P - image))[:, None, None]  # [R, 1, 1, S]
    codes, steps = torch.zeros(2, B, N, dtype=torch.long, device=device)
    known, logprobs, noise = torch.zeros_like(codes, dtype=torch.bool), torch.zeros(B, N, device=device), 1.0
    step_once = compiled_step_canvas if compiled else step_canvas
    for step, masked in enumerate(mask_schedule(N, S)):
        noise *= 1 - (step + 1) / S
        drawn, scores, commit = step_once(
            model, cache, codes, known, slots, positions, look, uniforms[:, step], torch.tensor(noise, device=device),
            torch.tensor(masked, device=device), guidance, temperature,
        )
        codes, logprobs = drawn.where(commit, codes), scores.where(commit, logprobs)
        steps, known = steps.masked_fill(commit, step), known | commit
    return codes, logprobs, steps


def image_hidden(model: UnifiedModel, images: Images, guidance: float, mode: str) -> tuple[Tensor, Tensor | None]:
    """Hidden states [B, N, D] that predict each code of `images`: after its prompt, and in guidance's other branch, where
    that counts. In one teacher-forced pass each for a Janus, in one for each step that is replayed for a Show-o."""
    branch = replayed_hidden if isinstance(model, ShowO) else forced_hidden
    uncond = None
    if mode != "conditional" and model.conditional_weight(guidance) != 1:
        with torch.set_grad_enabled(torch.is_grad_enabled() and mode == "guided"):
            uncond = branch(model, images, *model.unconditional(images.ids, images.mask))
    return branch(model, images, images.ids, images.mask), uncond


def head_logits(
    model: UnifiedModel, cond: Tensor, uncond: Tensor | None, guidance: float, temperature: float, mode: str
) -> Tensor:
    """Guided, tempered logits [B, T, V] from hidden states [B, T, D] of both branches."""
    if uncond is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and mode == "guided"):
            uncond = model.generation_head(uncond)
    return guide(model.generation_head(cond), uncond, model.conditional_weight(guidance), temperature)


def image_logits(
    model: UnifiedModel, images: Images, guidance: float, temperature: float, mode: str = "guided"
) -> Tensor:
    """The logits [B, N, V] that each code of `images` was drawn from, with gradient.

    mode: "guided", the distribution that is sampled; "detached", the same without gradient through the unconditional
    branch; "conditional", the prompt's branch alone, which is *not* what is sampled unless the unconditional branch
    cancels out, but is what published Janus trainers score.
    """
    return head_logits(model, *image_hidden(model, images, guidance, mode), guidance, temperature, mode)


CHUNK = 64  # codes of each image whose logits exist at once


def image_logprobs(
    model: UnifiedModel, images: Images, guidance: float, temperature: float, mode: str = "guided"
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, N] of the codes under `image_logits`, with gradient, and 0 for those that are not scored;
    and each distribution's entropy [B, N], without. The logits of a few codes at a time are made, and made again in the
    backward pass: nothing of size [B, N, V] ever exists."""

    def part(cond: Tensor, uncond: Tensor | None, codes: Tensor) -> tuple[Tensor, Tensor]:
        return score_logits(head_logits(model, cond, uncond, guidance, temperature, mode), codes)

    cond, uncond = image_hidden(model, images, guidance, mode)
    pieces = [tensor.split(CHUNK, dim=1) for tensor in (cond, images.codes)]
    others = [None] * len(pieces[0]) if uncond is None else uncond.split(CHUNK, dim=1)
    again = partial(checkpoint, part, use_reentrant=False) if torch.is_grad_enabled() else part
    scores = [again(c, u, codes) for c, u, codes in zip(pieces[0], others, pieces[1])]
    logprobs, entropy = (torch.cat(kind, dim=1) for kind in zip(*scores))
    return logprobs * (images.weights > 0), entropy


def score_logits(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] of codes [B, T] under logits [B, T, V], and the entropies [B, T], without gradient."""
    logprobs = widen(logits).log_softmax(-1)
    chosen = logprobs.gather(-1, codes[..., None])[..., 0]  # first: a checkpoint that is run again ends here
    with torch.no_grad():
        return chosen, -(logprobs.exp() * logprobs).sum(-1)


def forced_hidden(model: Janus, images: Images, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, N, D] that predict all codes after prompts [B, P], each given those before it."""
    past, first, index = read_prompts(model, ids, mask)  # whose last token, the begin-of-image tag, predicts code 0
    x = model.embed_codes(images.codes[:, :-1])  # [B, N - 1, D]
    T = x.shape[1]
    look = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().expand(len(x), 1, -1, -1)
    look = torch.cat((mask[:, None, None].expand(-1, -1, T, -1), look), dim=-1)  # [B, 1, N - 1, P + N - 1]
    hidden = after_prompts(model, x, look, past, index, mask)
    return torch.cat((first.index_select(0, index)[:, None], hidden), dim=1)


def replayed_hidden(model: ShowO, images: Images, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, N, D] that predict each code that is scored, after prompts [B, P], given the codes that were
    committed before it. Which step commits which code is taken as given."""
    codes, steps, hidden = images.codes, images.steps, 0.0
    past, _, index = read_prompts(model, ids, mask)
    N = codes.shape[1]
    look = F.pad(mask, (0, N + 2), value=True)[:, None, None].expand(-1, -1, N + 2, -1)  # [B, 1, N + 2, P + N + 2]
    everything = torch.arange(model.steps, device=codes.device).expand(len(codes), -1)
    for step in (everything if images.replay is None else images.replay).T:  # [B], an image's own
        x = model.embed_canvas(codes, steps < step[:, None])  # [B, N + 2, D]
        now = after_prompts(model, x, look, past, index, mask)[:, 1:-1]
        hidden = now.where((steps == step[:, None])[..., None], hidden)
    return hidden


def after_prompts(model: UnifiedModel, x: Tensor, look: Tensor, past: Cache, index: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, T, D] of x [B, T, D], which stands after prompts with `mask` [B, P], the rows `index` [B] of
    `past`."""
    past = [tuple(kept.index_select(0, index) for kept in layer) for layer in past]  # [B, Hkv, P, d]
    positions = mask.sum(1, keepdim=True) + torch.arange(x.shape[1], device=x.device)
    return model.language_model(x, positions, look, past)


@torch.no_grad()
def choose_scored(
    model: UnifiedModel, images: Images, seeds: Sequence[int], estimator: str, count: int | None, *scoring
) -> Images:
    """The same images, with the choice of what is scored of a masked-diffusion trajectory. A Janus' stay as they are.

    - "replay": each code given the canvas of the step that committed it; all steps (`count` 0), or `count` random ones
      of each image, whose codes then count (all steps) / count times. The subsets' mean is that over all steps.
    - "remask": each image's codes are masked anew at random, as many as in Show-o's pretraining (a share cos(pi/2 u) of
      them, u uniform), and scored all at once given the others: one pass, of a distribution they were not sampled from.
      Their old log-probs are then `model`'s, scored by image_logprobs(model, images, *scoring) with these very masks
      (left out without `scoring`).
    """
    if model.steps is None:
        return images
    N, S = images.codes.shape[1], model.steps
    if estimator != "remask":
        if not count or count == S:
            return images
        order = uniform_numbers(seeds, REPLAY, S, model.device).argsort(1)  # [B, S]
        replay = order[:, :count]
        weights = S / count * (images.steps[..., None] == replay[:, None]).any(-1)
        return replace(images, replay=replay, weights=weights, logprobs=images.logprobs * (weights > 0))
    uniforms = uniform_numbers(seeds, REPLAY, N + 1, model.device)
    masked = (N * torch.cos(math.pi / 2 * uniforms[:, :1])).round().clamp(1, N)  # [B, 1]
    steps = (uniforms[:, 1:].argsort(1).argsort(1) < masked).long()  # step 1 scores what is masked, given the rest
    images = replace(images, steps=steps, replay=torch.ones_like(steps[:, :1]), weights=steps * N / masked)
    return replace(images, logprobs=image_logprobs(model, images, *scoring)[0]) if scoring else images


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, T] of tokens [B, T] under logits [B, T, V], in float32."""
    logits = widen(logits)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative estimate of KL(policy || reference) from tokens of the policy (Schulman 2020)."""
    difference = reference - logprobs
    return difference.exp() - difference - 1


def trajectory_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each trajectory: [B, T] -> [B]."""
    return (values * mask).sum(1) / mask.sum(1)


def relaxed_codes(
    logits: Tensor, codes: Tensor, tau: float, seeds: Sequence[int], weights: Tensor | None = None
) -> Tensor:
    """Straight-through Gumbel-softmax of an image that has been sampled: exactly its one-hots [B, N, V] going forward,
    softmax((logits + noise) / tau) going backward, the noise being what made these codes win.

    Given the arg-max c, the largest perturbed logit m is logsumexp(logits) + Gumbel, and the others are Gumbels cut off
    at m (Maddison et al. 2014; Paulus et al. 2020, "Rao-Blackwellizing the straight-through Gumbel-softmax"). Over
    sampled codes the noise is plain Gumbel(0, 1) again. Each image's comes from its own seed. The backward pass goes
    through each code `weights` [B, N] times, so that it has no bias where only a random part of them is replayed.
    """
    with torch.no_grad():
        noise = gumbel_given(widen(logits).detach(), codes, seeds)
    soft = ((widen(logits) + noise) / tau).softmax(-1)
    hard = F.one_hot(codes, logits.shape[-1]).to(soft.dtype)
    bracket = soft - soft.detach()  # exactly zero
    return hard + (bracket if weights is None else bracket * weights[..., None])


def bound_gradient(images: Tensor, norm: float) -> Tensor:
    """The same images [B, ...], for each of which the gradient that comes back is cut to a norm. Through decoder and
    encoder its length is heavy-tailed, and a few pictures would decide every step."""
    if images.requires_grad:
        rest = (1,) * (images.dim() - 1)
        images.register_hook(lambda g: g * (norm / g.flatten(1).norm(dim=1).clamp(min=norm)).view(-1, *rest))
    return images


def gumbel_given(logits: Tensor, codes: Tensor, seeds: Sequence[int]) -> Tensor:
    """Gumbel noise [B, N, V] of which arg-max(logits + noise) is `codes` [B, N], from one seed an image."""
    exponential = torch.empty_like(logits)  # [B, N, V]
    for row, seed in zip(exponential, seeds):
        row.exponential_(generator=generator(seed, NOISE, row.device))
    chosen = codes[..., None]
    top = logits.logsumexp(-1, keepdim=True) - exponential.gather(-1, chosen).log()  # [B, N, 1]
    cut = -torch.logaddexp(exponential.log() - logits, -top)  # Gumbels with these logits, given that they are below
    cut = torch.minimum(cut, top - 1e-5 * top.abs().clamp(min=1))  # rounding must not make two of them the largest
    return cut.scatter(-1, chosen, top) - logits


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclass
class Answers:
    """Sampled answers, right-padded."""

    texts: list[str]
    ids: Tensor  # [B, A], up to and including the end-of-sentence token
    mask: Tensor  # [B, A], False on padding
    logprobs: Tensor  # [B, A], of the tempered distribution (of softmax(logits) where the answer is greedy)


def step_answer(
    model: UnifiedModel, cache: Cache, tokens: Tensor, slot: Tensor, positions: Tensor, visible: Tensor
) -> Tensor:
    """Feeds the last tokens [B] at cache column `slot` [1]; logits [B, vocabulary] of the next."""
    mask = visible & (torch.arange(visible.shape[1], device=visible.device) <= slot)
    hidden = model.language_model(model.embed_text(tokens[:, None]), positions, mask[:, None, None], cache, slot)
    return model.lm_head(hidden[:, 0])


@torch.no_grad()
def sample_answers(
    model: UnifiedModel, image: Tensor, questions: Sequence[str], seeds: Sequence[int] | None = None,
    temperature: float = 1.0, max_tokens: int = 40,
) -> Answers:
    """An answer to each question about the image (of `see`, or pixels [B, 3, H, W]) of the same index: greedy without
    seeds, else sampled at `temperature`. Ends at the end-of-sentence token or after `max_tokens`."""
    ids, mask = model.question_prompt(questions)  # [B, Q]
    Q, end = ids.shape[1], model.tokenizer.eos_token_id
    uniforms = None if seeds is None else uniform_numbers(seeds, ANSWER, max_tokens, model.device)
    x, past = model.embed_question(ids, image), []  # [B, Q, D]
    hidden = model.language_model(x, positions_of(mask), model.question_mask(ids, mask), keep=past)
    cache = make_cache(model, past, slice(None), len(ids), Q + max_tokens)
    logits = model.lm_head(hidden[:, -1])
    position = mask.sum(1, keepdim=True)  # [B, 1]
    visible = F.pad(mask, (0, max_tokens), value=True)
    alive = torch.ones_like(mask[:, 0])
    tokens, logprobs, masks = [], [], []
    for t in range(max_tokens):
        if uniforms is None:
            token = logits.argmax(-1)
            logprob = token_logprobs(logits[:, None], token[:, None])[:, 0]
        else:
            token, logprob = draw(widen(logits) / temperature, uniforms[:, t])
        tokens.append(token.where(alive, model.tokenizer.pad_token_id))
        logprobs.append(logprob.where(alive, 0.0))
        masks.append(alive)
        alive = alive & (token != end)
        if not alive.any() or t + 1 == max_tokens:
            break
        logits = step_answer(model, cache, token, torch.tensor([Q + t], device=model.device), position + t, visible)
    ids, mask = torch.stack(tokens, 1), torch.stack(masks, 1)  # [B, A]
    texts = [model.tokenizer.decode(row[keep], skip_special_tokens=True).strip() for row, keep in zip(ids, mask)]
    return Answers(texts, ids, mask, torch.stack(logprobs, 1))


def encode_answers(model: UnifiedModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Known answers as token ids [B, A], right-padded, each ended by the end-of-sentence token, and their mask."""
    tokens = model.tokenizer
    # A reply starts with a space after the colon of the assistant's tag, as in the original's conversations.
    rows = [tokens.encode(" " + text, add_special_tokens=False) + [tokens.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokens.pad_token_id] * (longest - len(row)) for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)
    return ids, torch.arange(longest, device=model.device) < lengths[:, None]


def answer_logits(model: UnifiedModel, image: Tensor, questions: Sequence[str], answers: Tensor) -> Tensor:
    """Logits [B, A, vocabulary] of the answers' tokens [B, A], teacher-forced, with gradient also into the image."""
    ids, mask = model.question_prompt(questions)  # [B, Q]
    x = torch.cat((model.embed_question(ids, image), model.embed_text(answers[:, :-1])), dim=1)  # [B, Q + A - 1, D]
    mask = F.pad(mask, (0, answers.shape[1] - 1), value=True)  # padding on the right is seen only by itself
    look = model.question_mask(torch.cat((ids, answers[:, :-1]), dim=1), mask)
    hidden = model.language_model(x, positions_of(mask), look)
    return model.lm_head(hidden[:, ids.shape[1] - 1 :])  # the last prompt token predicts the first answer token


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8"""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]"""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def read_image(model: UnifiedModel, path: str) -> Tensor:
    """Pixels [1, 3, H, W] of an image file, made the model's square."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from None
    return model.preprocess(image).to(model.device)


def contact_sheet(images: np.ndarray, captions: Sequence[str], path: str | Path, columns: int = 6) -> None:
    """Writes pictures [B, H, W, 3] uint8 with a caption of a few lines under each, small ones enlarged."""
    side = max(images.shape[1], 144)
    wrapped = [[part for line in c.split("\n") for part in textwrap.wrap(line, side // 6) or [""]] for c in captions]
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


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes


COMPILING = "compiling the sampler on first use: up to a minute (--no-compile avoids it)"


def pick_device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_ranks(patience: float = 600) -> tuple[int, int, torch.device]:
    """This process' rank, the number of ranks, and its device; joins the others when started by torchrun. A rank that
    waits for another one for more than `patience` seconds gives up (`run` says so)."""
    device = pick_device()
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=patience))
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


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def positive(kind):
    """argparse type: a finite number above zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


class ShortHelp(argparse.HelpFormatter):
    """--help with N for every number, and room for what it means."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=26)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type else super()._get_default_metavar_for_optional(action)


def non_negative(kind):
    """argparse type: a finite number of at least zero."""

    def parse(text: str):
        value = kind(text)
        if not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is negative or not finite")
        return value

    return parse


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES)  # full, read-only or broken


def run(main) -> None:
    """Calls main(); a user's mistake, a disk's, or the loss of another rank becomes one line on stderr and exit code 1,
    a programmer's mistake keeps its traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}" if first_to_say() else 1)
    except OSError as error:
        if error.errno not in DISK:
            raise
        name = f"{error.filename}: " if error.filename else ""
        sys.exit(f"error: {name}cannot be written ({error.strerror}); what is saved is whole" if first_to_say() else 1)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        if first_to_say():
            reason = str(error).split("] ", 1)[-1].split(". ")[0].splitlines()[0][:120]
            print(f"error: rank {os.environ['RANK']} lost another rank, which died or was silent for too long ({reason}); "
                  "what is saved is whole: go on with --resume", file=sys.stderr, flush=True)
        os._exit(1)  # the usual way out would wait for the lost rank


def main() -> None:
    parser = argparse.ArgumentParser(description="draw images, or ask about one", formatter_class=ShortHelp)
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument("--model", default="tiny", help=f"{', '.join(NAMES)}, a hub id or a folder (default: tiny)")
    parser.add_argument("-n", type=positive(int), default=8, help="images (default: 8)")
    parser.add_argument("--seed", type=non_negative(int), default=0, help="of the first image; the next has the next")
    parser.add_argument("--guidance", type=non_negative(float), default=None, help="default: the checkpoint's")
    parser.add_argument("--temperature", type=positive(float), default=1.0)
    parser.add_argument("--draw-steps", type=positive(int), help="of mask-predict, Show-o's; default: the checkpoint's")
    parser.add_argument("--out", default="samples.png", help="where the pictures go (default: samples.png)")
    parser.add_argument("--image", help="a picture to ask about")
    parser.add_argument("--question", help="what to ask")
    parser.add_argument("--no-compile", action="store_true", help="start at once, run slower")
    parser.add_argument("--bench", nargs=argparse.REMAINDER, help="measure the sampler; what follows is for bench.py")
    args = parser.parse_args()
    if args.bench is not None:  # which imports this file, so that this one does not import it
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("bench.py")), *args.bench])
    if bool(args.image) != bool(args.question) or bool(args.prompt) == bool(args.image):
        parser.error("give a prompt to draw, or --image and --question")
    if Path(args.out).suffix.lower() not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--out {args.out}: give a name that ends in .png or .jpg")
    device = pick_device()
    model = load(args.model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    use_draw_steps(model, args.draw_steps)
    if args.image:
        print(sample_answers(model, read_image(model, args.image), [args.question]).texts[0])
        return
    seeds = range(args.seed, args.seed + args.n)
    if not args.no_compile:
        print(COMPILING, file=sys.stderr)
    batches = tqdm(range(0, args.n, 16), desc="drawing", unit="batch", disable=None)
    guidance = model.guidance if args.guidance is None else args.guidance
    pictures = [
        to_uint8(model.to_pixels(sample_images(
            model, [args.prompt] * len(part), part, guidance, args.temperature, not args.no_compile
        ).codes))
        for part in (seeds[start : start + 16] for start in batches)
    ]
    contact_sheet(np.concatenate(pictures), [f"seed {seed}" for seed in seeds], args.out)
    print(f"{args.n} images of {args.prompt!r}, guidance {guidance:g}, temperature {args.temperature:g}")
    print(f"look at {args.out}; then train it: torchrun grpo.py --model {args.model}")


if __name__ == "__main__":
    run(main)
