"""Pretrains the tiny Janus of `--model tiny`, or the tiny Show-o of `--model tiny-show-o`, from nothing: text
tokenizer, image tokenizer, then the unified model.

    python -m tiny.pretrain                             # tiny/janus; two CPU cores; run again to resume
    python -m tiny.pretrain --model show-o              # tiny/show-o

The base that comes out is like the real ones: it understands far better than it draws. Real models know how
to draw what they often fail to draw, because their captions were noisy. So here generation learns from clean
captions until it knows the words, and then, for a short while, from captions of which a share was swapped for
another of the same category; understanding sees clean questions throughout.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import JanusConfig, JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from evaluate import evaluate, table, world_of
from model import (
    SHOW_O_TOKENS, Janus, MAGVITv2, ShowO, UnifiedModel, VQModel, chat_template, from_uint8, save,
)
from reward import INVERSE, TAGS, Task, draw_task, make_task
from sample import Images, answer_logprobs, encode_answers, image_logits, score_logits, to_uint8
from tiny.world import GLYPHS, GRID, PALETTE, SIZE, VOCABULARY, detect, layout, paint

CONFIG = dict(
    text_config=dict(
        model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    ),
    vision_config=dict(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=4,
        mlp_ratio=3.0, projection_dim=128, depth=2, num_image_tokens=36,
    ),
    vq_config=dict(
        embed_dim=8, num_embeddings=256, latent_channels=64, base_channels=32, channel_multiplier=[1, 1, 2],
        num_res_blocks=1, projection_dim=128, num_hidden_layers=2, image_token_embed_dim=128,
    ),
    tie_word_embeddings=False,
)
SHOW_O = dict(
    codebook_size=512, num_vq_tokens=36, max_seq_length=32, steps=9, world="shapes", w_clip_vit=False,
    phi_config=dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
        max_position_embeddings=256,
    ),
)
MAGVIT = dict(
    channels=32, encoder_multipliers=[1, 1, 2], encoder_blocks=[1, 1, 1], decoder_multipliers=[1, 1, 2],
    decoder_blocks=[1, 1, 1], bits=9,
)
SIDE = 4  # pixels a side of what a code, or a patch of SigLIP's, stands for

# ------------------------------------------------------------------------------------------------------------
# The image tokenizer


def random_scenes(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[list[tuple[str, str]]]]:
    """Pictures of one to nine random objects and what is in them."""
    images, contents = [], []
    for _ in range(count):
        n = rng.integers(1, 10)
        cells = rng.permutation(GRID * GRID)[:n]
        names = [(str(rng.choice(list(GLYPHS))), str(rng.choice(list(PALETTE)))) for _ in cells]
        images.append(paint([(*name, int(cell)) for name, cell in zip(names, cells)]))
        contents.append(sorted(names))
    return np.stack(images), contents


def read_back(images: np.ndarray, contents: list) -> float:
    """Share of pictures in which the detector finds exactly what was drawn."""
    found = [sorted((d["name"], d["color"]) for d in detections) for detections in detect(images)]
    return float(np.mean([f == c for f, c in zip(found, contents)]))


def same_patches(pixels: Tensor) -> Tensor:
    """Which of the pictures' patches [B, 3, H, W] of SIDE pixels are equal: group numbers [B * h * w]."""
    patches = F.unfold(pixels, SIDE, stride=SIDE).transpose(1, 2).flatten(0, 1)  # [B * h * w, 3 * SIDE ** 2]
    return torch.unique(patches, dim=0, return_inverse=True)[1]


def centres_of(latents: Tensor, groups: Tensor) -> Tensor:
    """The mean of every group's latents: [M, E] and [M] -> [groups, E]."""
    sums = torch.zeros(int(groups.max()) + 1, latents.shape[1]).index_add_(0, groups, latents)
    return sums / torch.bincount(groups)[:, None]


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` unit vectors that cover unit `points` [M, E]: spherical k-means, empty clusters restarted at a
    point."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(20):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        fresh = points[torch.randint(len(points), (len(centres),), generator=generator)]
        empty = torch.bincount(nearest, minlength=len(centres)) == 0
        centres = F.normalize(torch.where(empty[:, None], fresh, sums), dim=-1)
    return centres


def latents_of(vq: VQModel, pixels: Tensor) -> Tensor:
    """The latents [B, E, h, w] of pixels [B, 3, H, W] before they are quantised, on the unit sphere."""
    return F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)


def flat(latents: Tensor) -> Tensor:
    """[B, E, h, w] -> [B * h * w, E]"""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


def unflat(vectors: Tensor, latents: Tensor) -> Tensor:
    """[B * h * w, E] -> [B, E, h, w], as `latents`"""
    return vectors.view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)


@torch.no_grad()
def start_codebook(vq: VQModel, rng: np.random.Generator, generator: torch.Generator) -> None:
    """k-means over patches that differ, not over the background nine times in ten."""
    pictures = from_uint8(random_scenes(512, rng)[0])
    points = torch.cat([flat(latents_of(vq, part)) for part in pictures.split(64)])
    points = F.normalize(centres_of(points, same_patches(pictures)), dim=-1)
    codebook = vq.quantize.embedding.weight  # [V, E]
    codebook.copy_(kmeans(points, len(codebook), generator))


def codebook_loss(vq: VQModel, pixels: Tensor, quantise: bool) -> Tensor:
    """The loss of a Janus' image tokenizer: reconstruction of pixels [B, 3, H, W] from their latents, or,
    straight through, from the codes nearest to each group of equal patches' mean; and a pull to that mean, or
    code."""
    loss, pull = 0.0, 0.1
    latents, groups = latents_of(vq, pixels), same_patches(pixels)  # [B, E, h, w], [B h w]
    centres = F.normalize(centres_of(flat(latents), groups), dim=-1)  # [groups, E]
    restored = latents
    if quantise:
        centres = vq.codebook()[(centres @ vq.codebook().T).argmax(-1)]
        codes = unflat(centres[groups], latents)
        loss, pull = F.mse_loss(codes, latents.detach()), 0.3
        restored = latents + (codes - latents).detach()
    loss = loss + pull * (flat(latents) - centres[groups].detach()).square().sum(-1).mean()
    restored = vq.decoder(vq.post_quant_conv(restored))
    return loss + F.mse_loss(restored, pixels) + 0.1 * F.l1_loss(restored, pixels)


def lookup_free_loss(vq: MAGVITv2, pixels: Tensor, quantise: bool) -> Tensor:
    """The same of a Show-o's: reconstruction of pixels [B, 3, H, W] from tanh(latents), or, straight through,
    from the signs of each group of equal patches' mean, to which latents are pulled. Over all groups every
    bit is to be 1 as often as -1, and bits are to be independent: the entropy term of lookup-free
    quantisation."""
    latents, groups = vq.encoder(pixels), same_patches(pixels)  # [B, bits, h, w], [B h w]
    centres = centres_of(flat(latents), groups)  # [groups, bits]
    signs = torch.where(centres > 0, 1.0, -1.0)[groups]  # [B h w, bits]
    soft = torch.tanh(latents)
    if quantise:
        soft = latents.clamp(-1.5, 1.5)
        soft = soft + (unflat(signs, latents) - soft).detach()
    pull = 4 * F.mse_loss(flat(latents), centres[groups].detach()) + F.mse_loss(flat(latents), signs)
    bits = torch.tanh(centres)
    together = (bits.T @ bits / len(bits)).fill_diagonal_(0.0)
    spread = bits.mean(0).square().mean() + together.square().mean()
    restored = vq.decoder(soft)
    return F.mse_loss(restored, pixels) + 0.1 * F.l1_loss(restored, pixels) + 0.05 * (pull + spread)


def train_image_tokenizer(vq: VQModel | MAGVITv2, steps: int, seed: int, log: Callable) -> None:
    """Reconstruction, for the first quarter or fifth of the steps of unquantised latents, then through codes.

    Group norm and attention let every latent see the whole picture, so that equal patches get a dozen codes,
    and a model that samples codes drowns in a choice that means nothing. Hence they are pulled together."""
    rng, has_codebook = np.random.default_rng(seed), isinstance(vq, VQModel)
    loss_of, unquantised = (codebook_loss, steps // 4) if has_codebook else (lookup_free_loss, steps // 5)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in tqdm(range(steps), desc="image tokenizer"):
        pixels = from_uint8(random_scenes(32, rng)[0])
        if has_codebook and step == unquantised:
            start_codebook(vq, rng, torch.Generator().manual_seed(seed))
        loss = loss_of(vq, pixels, quantise=step >= unquantised)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log(stage="image tokenizer", step=step + 1, loss=loss.item(), **measure_image_tokenizer(vq))


@torch.no_grad()
def measure_image_tokenizer(vq: VQModel | MAGVITv2) -> dict[str, float]:
    """How often the detector reads a picture back through the codes, and the entropy (nats) of equal patches'
    codes."""
    images, contents = random_scenes(256, np.random.default_rng(7))
    pixels = from_uint8(images)
    codes = vq.encode(pixels)  # [B, N]
    counts, groups = torch.zeros(codes.numel(), int(codes.max()) + 1), same_patches(pixels)
    counts.index_put_((groups, codes.flatten()), torch.ones(codes.numel()), accumulate=True)
    sizes = counts.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(counts, counts / sizes.clamp(min=1)).sum(1)
    often = sizes[:, 0].argmax()
    return dict(
        read_back=read_back(to_uint8(vq.decode(codes)), contents), codes_in_use=len(codes.unique()),
        entropy_of_ground=(entropy / sizes[:, 0].clamp(min=1))[often].item(),
        entropy_of_rest=((entropy.sum() - entropy[often]) / (sizes.sum() - sizes[often])).item(),
    )


# ------------------------------------------------------------------------------------------------------------
# The text tokenizer

CELLS = tuple(
    f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")
)


def train_text_tokenizer(special: list[str], seed: int) -> Tokenizer:
    """Byte-level BPE over the world's prompts, questions and answers; any text can be encoded."""
    rng = np.random.default_rng(seed)
    tasks = [draw_task(VOCABULARY, rng) for _ in range(5000)]
    texts = [text for task in tasks for text in (task.prompt, f"\n{task.question}", task.answer + "\n\n")]
    texts += [
        text for shape in GLYPHS for cell in CELLS for text in (f"\nWhere is the {shape}?", f"{cell}\n\n")
    ] * 10 + ["USER:", "ASSISTANT:"] * 1000  # a Show-o's turns
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([f": {text}" for text in texts], trainers.BpeTrainer(
        vocab_size=CONFIG["text_config"]["vocab_size"], special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return tokenizer


def build_processor(seed: int) -> JanusProcessor:
    """Text tokenizer in Janus-Pro's turns, and the preprocessing of pictures."""
    special = {
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜▁pad▁｜>",
    }
    tags = {
        "image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>",
    }
    tokenizer = train_text_tokenizer([*special.values(), *tags.values(), "<|User|>", "<|Assistant|>"], seed)
    begin = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return JanusProcessor(
        JanusImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, min_size=14, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=tags, **special),
        chat_template=chat_template("<|User|>", "<|Assistant|>"),
        num_image_tokens=CONFIG["vision_config"]["num_image_tokens"],
    )


def build_show_o_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Text tokenizer as Phi's, with one token that begins and ends, and then Show-o's own."""
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_text_tokenizer([end], seed), bos_token=end, eos_token=end, pad_token="[PAD]"
    )
    tokenizer.add_tokens(list(SHOW_O_TOKENS), special_tokens=True)
    return tokenizer


# ------------------------------------------------------------------------------------------------------------
# The unified model

# How often each category is drawn. Positions and pairs of colors are learned last, and a model that is wrong
# about them would be exploited as its own judge, so understanding sees more of them.
DRAWING = dict(zip(TAGS, (0.5, 1, 1.5, 1.5, 1.5, 5)))
UNDERSTANDING = dict(zip(TAGS, (1, 1, 3, 1, 5, 8)))

def draw_tasks(count: int, weights: dict[str, float], rng: np.random.Generator) -> list[Task]:
    """Tasks of categories in proportion to `weights`."""
    chances = np.array(list(weights.values())) / sum(weights.values())
    tags = rng.choice(list(weights), size=count, p=chances)
    return [draw_task(VOCABULARY, rng, tag=str(tag)) for tag in tags]


def cell_classes(objects: list[tuple[str, str, int]]) -> np.ndarray:
    """For each of the 36 patches, which shape and colour its cell holds (0: nothing)."""
    cells = np.zeros((GRID, GRID), dtype=np.int64)
    for shape, color, cell in objects:
        cells[divmod(cell, GRID)] = 1 + list(GLYPHS).index(shape) * len(PALETTE) + list(PALETTE).index(color)
    return cells.repeat(2, 0).repeat(2, 1).ravel()


@dataclass
class Pool:
    """Scenes with their codes and what the image tokenizer makes of them, computed once, as that is slow."""

    tasks: list[Task]
    scenes: list[list[tuple[str, str, int]]]
    codes: Tensor  # [M, N]
    restored: Tensor  # [M, 3, H, W] in [-1, 1]


@torch.no_grad()
def make_pool(model: UnifiedModel, count: int, rng: np.random.Generator) -> Pool:
    """`count` scenes, categories in the proportions of DRAWING."""
    tasks = draw_tasks(count, DRAWING, rng)
    scenes = [layout(task, rng) for task in tasks]
    codes, restored = [], []
    for start in tqdm(range(0, count, 250), desc="encoding scenes", leave=False):
        images = np.stack([paint(scene) for scene in scenes[start : start + 250]])
        codes.append(model.vqmodel.encode(from_uint8(images)))
        restored.append(model.to_pixels(codes[-1]))
    return Pool(tasks, scenes, torch.cat(codes), torch.cat(restored))


def drawing_loss(
    model: UnifiedModel, tasks: list[Task], codes: Tensor, noise: float, rng: np.random.Generator
) -> Tensor:
    """Cross-entropy of the codes [B, N] given their captions: a share `noise` of these swapped for another of
    the category, a tenth replaced by the guidance's empty prompt."""
    swapped = lambda task: draw_task(VOCABULARY, rng, tag=task.tag) if rng.random() < noise else task
    ids, mask = model.generation_prompt([swapped(task).prompt for task in tasks])
    empty = torch.from_numpy(rng.random(len(tasks)) < 0.1)[:, None]
    blank, blank_mask = model.unconditional(ids, mask)
    ids, mask = blank.where(empty, ids), blank_mask.where(empty, mask)
    learned = torch.ones_like(codes, dtype=torch.bool)
    if isinstance(model, ShowO):  # of those masked: a share of cos(pi / 2 u), as in the sampler's schedule
        share = torch.from_numpy(np.cos(np.pi / 2 * rng.random(len(codes))))[:, None]
        learned = torch.from_numpy(rng.random(codes.shape)).argsort(1) < (share * codes.shape[1]).ceil()
        logits = model.generation_head(model.canvas_hidden(ids, mask, codes, ~learned))
    else:
        zeros = torch.zeros(codes.shape)  # in place of what a sampler records
        logits = image_logits(model, Images(codes, zeros, ids, mask, zeros), guidance=1, temperature=1)
    return -score_logits(logits, codes)[0][learned].mean()


def say(task: Task, rng: np.random.Generator) -> str:
    """The answer that is learned. Which of two objects a position is told from is free; four times in five it
    is the one that is read first, as relations are learned much sooner when most answers say `left of` or
    `above`."""
    relation = task.facts[-1].get("position", [""])[0]
    if relation not in ("right of", "below") or rng.random() >= 0.8:
        return task.answer
    first, second = task.facts
    turned = {**first, "position": [INVERSE[relation], 0]}
    return make_task("position", [{"class": second["class"], "count": 1}, turned]).answer


def ask(task: Task, scene: list[tuple[str, str, int]], rng: np.random.Generator) -> tuple[str, str]:
    """A question about a scene and its answer: the task's own, or in a third of the pictures of two things
    where one of them is or what color it has, of which relations and pairs of colors are put together."""
    if len(task.facts) == 2 and rng.random() < 1 / 3:
        shape, color, cell = scene[rng.integers(2)]
        where = f"Where is the {shape}?", CELLS[cell]
        return where if rng.random() < 0.5 else (f"What is the color of the {shape}?", color)
    return task.question, say(task, rng)


def understanding_loss(
    model: UnifiedModel, probe: torch.nn.Linear, pool: Pool, count: int, rng: np.random.Generator
) -> Tensor:
    """Cross-entropy of the known answers about true pictures, a third of them as the image tokenizer restores
    them; plus, for a Janus, that of what each patch holds, read by a linear probe off the aligner, which
    teaches its encoder to see. (A Show-o sees codes.)"""
    old = rng.choice(len(pool.tasks), size=count // 3, replace=False)
    tasks = draw_tasks(count - len(old), UNDERSTANDING, rng)
    scenes = [layout(task, rng) for task in tasks]
    fresh = from_uint8(np.stack([paint(scene) for scene in scenes]))
    features = model.image_features(torch.cat((pool.restored[old], fresh)))
    tasks, scenes = [pool.tasks[i] for i in old] + tasks, [pool.scenes[i] for i in old] + scenes
    questions, known = zip(*(ask(task, scene, rng) for task, scene in zip(tasks, scenes)))
    ids, mask = encode_answers(model, known)
    answer_loss = -answer_logprobs(model, features, questions, ids)[mask].mean()
    if isinstance(model, ShowO):
        return answer_loss
    classes = torch.from_numpy(np.stack([cell_classes(scene) for scene in scenes]))
    return answer_loss + 0.3 * F.cross_entropy(
        probe(model.aligner(features)).flatten(0, 1), classes.flatten()
    )


def learning_rate(step: int, args) -> float:
    """Warm-up, then constant while captions are clean, so that when these end can be decided on the way; half
    of that, falling to 0 by a cosine, while they are noisy."""
    if step < args.clean:
        return args.lr * min((step + 1) / 100, 1)
    return 0.5 * args.lr * (0.5 + 0.5 * math.cos(math.pi * (step - args.clean) / (args.steps - args.clean)))


def train_model(model: UnifiedModel, args: argparse.Namespace, state: Path, log: Callable) -> None:
    """Both directions together, for `args.steps` steps; its state goes into `state` every 200 steps."""
    probe = torch.nn.Linear(CONFIG["text_config"]["hidden_size"], 1 + len(GLYPHS) * len(PALETTE))
    weights = [weight for name, weight in model.named_parameters() if not name.startswith("vqmodel.")]
    weights += probe.parameters()
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02)
    start = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        start = saved["step"]
        for part, name in ((model, "model"), (probe, "probe"), (optimizer, "optimizer")):
            part.load_state_dict(saved[name])
    pool = make_pool(model, args.scenes, np.random.default_rng(args.seed))
    world = world_of(model)
    model.language_model.compile(dynamic=True)  # a minute to compile, then half again as fast
    for step in tqdm(range(start, args.steps), initial=start, total=args.steps, desc="model"):
        rng = np.random.default_rng((args.seed, step))
        chosen = rng.choice(len(pool.tasks), size=args.batch, replace=False)
        noise, asked = (0.0, args.asked) if step < args.clean else (args.caption_noise, args.then_asked)
        drawing = drawing_loss(model, [pool.tasks[i] for i in chosen], pool.codes[chosen], noise, rng)
        understanding = understanding_loss(model, probe, pool, asked, rng)
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.zero_grad()
        (drawing + understanding).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            log(stage="model", step=step + 1, drawing=drawing.item(), understanding=understanding.item())
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            content = {"step": step + 1, "model": model.state_dict(), "probe": probe.state_dict(),
                       "optimizer": optimizer.state_dict()}
            torch.save(content, state.with_suffix(".partial"))
            os.replace(state.with_suffix(".partial"), state)
        if (step + 1) % 400 == 0 or step + 1 == args.steps:
            scores, _ = evaluate(model, world, model.guidance, images_per_prompt=2, compiled=False)
            log(stage="model", step=step + 1, scores=scores)
            tqdm.write(table({"guided": scores}))


def new_model(args: argparse.Namespace, work: Path, log: Callable) -> UnifiedModel:
    """Random weights around an image tokenizer, which is trained first unless an earlier call did."""
    torch.manual_seed(args.seed)
    if args.model == "janus":
        config = JanusConfig(**CONFIG, world="shapes")
        model = Janus(config, build_processor(args.seed), args.guidance)
        config.image_token_id = model.tokenizer.convert_tokens_to_ids(model.tokenizer.image_token)
    else:
        tokenizer = build_show_o_tokenizer(args.seed)
        rows = len(tokenizer) + SHOW_O["codebook_size"] + 1
        settings = {**SHOW_O, "vocab_size": rows, "llm_vocab_size": len(tokenizer), "guidance": args.guidance}
        model = ShowO(settings, tokenizer, MAGVITv2(MAGVIT))
    for module in model.modules():  # the usual small start; the image tokenizer keeps PyTorch's
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=0.02)
    path = work / "image_tokenizer.safetensors"
    if not path.exists():
        train_image_tokenizer(model.vqmodel, args.tokenizer_steps, args.seed, log)
        save_file(model.vqmodel.state_dict(), path)
    model.vqmodel.load_state_dict(load_file(path))
    return model


CHOSEN = {  # what made the two checkpoints
    "janus": dict(asked=16, then_asked=8, clean=4600, steps=5300, caption_noise=0.4, guidance=2.0),
    "show-o": dict(asked=8, then_asked=24, clean=4200, steps=4900, caption_noise=0.3, guidance=2.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="pretrain a tiny model; run again to resume")
    add = parser.add_argument
    add("--model", choices=["janus", "show-o"], default="janus", help="(default: janus)")
    add("--out", help="checkpoint folder (default: tiny/janus or tiny/show-o)")
    add("--tokenizer-steps", type=int, default=800, help="of the image tokenizer")
    add("--steps", type=int, help="of the unified model (default: 5300; Show-o 4900)")
    add("--batch", type=int, default=64, help="pictures drawn a step")
    add("--asked", type=int, help="pictures asked about a step; fewer: it sees less (default: 16; Show-o 8)")
    add("--then-asked", type=int, help="the same while captions are noisy (default: 8; Show-o 24)")
    add("--lr", type=float, default=1.2e-3)
    add("--clean", type=int, help="first steps, whose captions are right (default: 4600; Show-o 4200)")
    add("--caption-noise", type=float, help="share swapped in the others (default: 0.4; Show-o 0.3)")
    add("--scenes", type=int, default=10_000, help="pictures to draw from")
    add("--guidance", type=float, help="the checkpoint's own: where it draws best (default: 2)")
    add("--seed", type=int, default=0)
    parser.set_defaults(**CHOSEN[parser.parse_known_args()[0].model])
    args = parser.parse_args()
    args.out = args.out or f"tiny/{args.model}"
    work = Path(args.out + ".work")
    work.mkdir(parents=True, exist_ok=True)

    def log(**fields) -> None:
        with open(work / "log.jsonl", "a") as file:
            file.write(json.dumps({**fields, "seconds": round(time.perf_counter() - begun)}) + "\n")

    begun = time.perf_counter()
    log(stage="start", **vars(args))
    model = new_model(args, work, log)
    model.vqmodel.requires_grad_(False)
    train_model(model, args, work / "state.pt", log)
    save(model.to(torch.bfloat16), args.out)  # half the size in the repository; loading widens it again
    print(f"written: {args.out}; next: python evaluate.py --model {args.out}")


if __name__ == "__main__":
    main()
