"""Pretrains the tiny Janus of `--model tiny`, or the tiny Show-o of `--model tiny-show-o`, from nothing: text tokenizer,
image tokenizer, then the unified model.

    python -m tiny.pretrain                             # tiny/janus; two CPU cores; run again to resume
    python -m tiny.pretrain --model show-o              # tiny/show-o

The base that comes out is like the real ones: it understands far better than it draws. Real models know how to draw
what they often fail to draw, because their captions were noisy. So here generation learns from clean captions until it
knows the words, and then, for a short while, from captions of which 40 % were swapped for another of the same category;
understanding sees clean questions throughout.
"""

import argparse
import json
import math
import os
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

from checkpoint import chat_template, load, save
from evaluate import evaluate, table, world_of
from model import SHOW_O_TOKENS, Janus, MAGVITv2, ShowO, UnifiedModel, VQModel
from reward import INVERSE, TAGS, Task, draw_task, make_task
from sample import Images, answer_logits, encode_answers, image_logits, to_pixels, to_uint8, token_logprobs
from tiny.world import GLYPHS, GRID, PALETTE, SIZE, VOCABULARY, detect, layout, paint

CONFIG = dict(
    text_config=dict(
        model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
    ),
    vision_config=dict(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=4, mlp_ratio=3.0,
        projection_dim=128, depth=2, num_image_tokens=36,
    ),
    vq_config=dict(
        embed_dim=8, num_embeddings=192, latent_channels=64, base_channels=32, channel_multiplier=[1, 1, 2],
        num_res_blocks=1, projection_dim=128, num_hidden_layers=2, image_token_embed_dim=128,
    ),
    tie_word_embeddings=False,
)
SHOW_O = dict(
    codebook_size=512, num_vq_tokens=36, max_seq_length=32, steps=6, world="shapes", w_clip_vit=False,
    phi_config=dict(
        hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4, max_position_embeddings=256,
    ),
)
MAGVIT = dict(
    channels=32, encoder_multipliers=[1, 1, 2], encoder_blocks=[1, 1, 1], decoder_multipliers=[1, 1, 2],
    decoder_blocks=[1, 1, 1], bits=9,
)


# ---------------------------------------------------------------------------------------------------------------------
# The image tokenizer


def random_scenes(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[list[tuple[str, str]]]]:
    """Pictures of one to six random objects and what is in them."""
    images, contents = [], []
    for _ in range(count):
        n = rng.integers(1, 7)
        cells = rng.permutation(GRID * GRID)[:n]
        objects = [(str(rng.choice(list(GLYPHS))), str(rng.choice(list(PALETTE))), int(cell)) for cell in cells]
        images.append(paint(objects))
        contents.append(sorted((shape, color) for shape, color, _ in objects))
    return np.stack(images), contents


def read_back(images: np.ndarray, contents: list) -> float:
    """Share of pictures in which the detector finds exactly what was drawn."""
    found = [sorted((d["name"], d["color"]) for d in detections) for detections in detect(images)]
    return float(np.mean([f == c for f, c in zip(found, contents)]))


def same_patches(pixels: Tensor, side: int) -> Tensor:
    """Which of the pictures' patches [B, 3, H, W] of `side` pixels are equal: group numbers [B * h * w]."""
    patches = F.unfold(pixels, side, stride=side).transpose(1, 2).flatten(0, 1)  # [B * h * w, 3 * side * side]
    return torch.unique(patches, dim=0, return_inverse=True)[1]


def centres_of(latents: Tensor, groups: Tensor) -> Tensor:
    """The mean of every group's latents: [M, E] and [M] -> [groups, E]."""
    sums = torch.zeros(int(groups.max()) + 1, latents.shape[1]).index_add_(0, groups, latents)
    return sums / torch.bincount(groups)[:, None]


def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` unit vectors that cover unit `points` [M, E]: spherical k-means, empty clusters restarted at a point."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(20):
        nearest = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        fresh = points[torch.randint(len(points), (len(centres),), generator=generator)]
        empty = torch.bincount(nearest, minlength=len(centres)) == 0
        centres = F.normalize(torch.where(empty[:, None], fresh, sums), dim=-1)
    return centres


def train_image_tokenizer(vq: VQModel, steps: int, seed: int, log: Callable) -> None:
    """Reconstruction, first of unquantised latents (a quarter of the steps), then through codes, straight-through.

    Group norm and attention let every latent see the whole picture, so that the same patch gets a dozen codes, and a
    model that samples codes drowns in a choice that means nothing. Hence the pull of equal patches towards one latent,
    and a codebook that starts as k-means over patches that differ, not over the background nine times in ten."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    weight = vq.quantize.embedding.weight  # [K, E]
    side = SIZE // math.isqrt(CONFIG["vision_config"]["num_image_tokens"])
    for step in tqdm(range(steps), desc="image tokenizer"):
        loss, pull = 0.0, 0.1
        pixels = to_pixels(random_scenes(64, rng)[0])
        latents = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1)  # [B, E, h, w], on the sphere
        flat, groups = latents.permute(0, 2, 3, 1).flatten(0, 2), same_patches(pixels, side)  # [M, E], [M]
        centres = F.normalize(centres_of(flat, groups), dim=-1)  # [groups, E]
        if step == steps // 4:
            with torch.no_grad():
                pictures = to_pixels(random_scenes(512, rng)[0])
                points = torch.cat([F.normalize(vq.quant_conv(vq.encoder(p)), dim=1) for p in pictures.split(64)])
                points = points.permute(0, 2, 3, 1).flatten(0, 2)
                points = F.normalize(centres_of(points, same_patches(pictures, side)), dim=-1)
                weight.copy_(kmeans(points, len(weight), generator))
        if step >= steps // 4:
            centres = vq.codebook()[(centres @ vq.codebook().T).argmax(-1)]
            codes = centres[groups].view(latents.shape[0], *latents.shape[2:], -1).permute(0, 3, 1, 2)  # as latents
            loss, pull = F.mse_loss(codes, latents.detach()), 0.3
            latents = latents + (codes - latents).detach()
        loss = loss + pull * (flat - centres[groups].detach()).square().sum(-1).mean()
        restored = vq.decoder(vq.post_quant_conv(latents))
        loss = loss + F.mse_loss(restored, pixels) + 0.1 * F.l1_loss(restored, pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log(stage="image tokenizer", step=step + 1, loss=loss.item(), **judge_image_tokenizer(vq))


def train_lookup_free_tokenizer(vq: MAGVITv2, steps: int, seed: int, log: Callable) -> None:
    """The same for Show-o's: reconstruction of tanh(latents) for a fifth of the steps, then straight through their
    signs, those of each group of equal patches' mean, to which their latents are pulled. Over the groups of a batch every
    bit is to be 1 as often as -1, and bits are to be independent: the entropy term of lookup-free quantisation."""
    rng, groups_of = np.random.default_rng(seed), lambda pixels: same_patches(pixels, vq.stride)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    for step in tqdm(range(steps), desc="image tokenizer"):
        pixels = to_pixels(random_scenes(64, rng)[0])
        latents, groups = vq.encoder(pixels), groups_of(pixels)  # [B, bits, h, w], [B * h * w]
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [B * h * w, bits]
        centres = centres_of(flat, groups)  # [groups, bits]
        signs = torch.where(centres > 0, 1.0, -1.0)[groups]  # [B * h * w, bits]
        soft = torch.tanh(latents)
        if step >= steps // 5:
            hard = signs.view(len(pixels), *latents.shape[2:], -1).permute(0, 3, 1, 2)
            soft = latents.clamp(-1.5, 1.5)
            soft = soft + (hard - soft).detach()
        pull = (flat - centres[groups].detach()).square().mean() * 4 + (flat - signs).square().mean()
        bits = torch.tanh(centres)
        together = (bits.T @ bits / len(bits)).fill_diagonal_(0.0)
        spread = bits.mean(0).square().mean() + together.square().mean()
        restored = vq.decoder(soft)
        loss = F.mse_loss(restored, pixels) + 0.1 * F.l1_loss(restored, pixels) + 0.05 * (pull + spread)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            log(stage="image tokenizer", step=step + 1, loss=loss.item(), **judge_image_tokenizer(vq))


@torch.no_grad()
def judge_image_tokenizer(vq: VQModel | MAGVITv2) -> dict[str, float]:
    """How often the detector reads a picture back through the codes, and the entropy (nats) of equal patches' codes."""
    images, contents = random_scenes(256, np.random.default_rng(7))
    pixels = to_pixels(images)
    codes = vq.encode(pixels)  # [B, N]
    side = SIZE // math.isqrt(codes.shape[1])
    counts = torch.zeros(pixels.shape[0] * codes.shape[1], int(codes.max()) + 1)
    counts.index_put_((same_patches(pixels, side), codes.flatten()), torch.ones(codes.numel()), accumulate=True)
    sizes = counts.sum(1, keepdim=True)
    entropy = -torch.special.xlogy(counts, counts / sizes.clamp(min=1)).sum(1)
    often = sizes[:, 0].argmax()
    return dict(
        read_back=read_back(to_uint8(vq.decode(codes)), contents), codes_in_use=len(codes.unique()),
        entropy_of_ground=(entropy / sizes[:, 0].clamp(min=1))[often].item(),
        entropy_of_rest=((entropy.sum() - entropy[often]) / (sizes.sum() - sizes[often])).item(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The text tokenizer


def train_text_tokenizer(special: list[str], seed: int) -> Tokenizer:
    """Byte-level BPE over the world's prompts, questions and answers; any text can be encoded."""
    rng = np.random.default_rng(seed)
    tasks = [draw_task(VOCABULARY, rng) for _ in range(5000)]
    texts = [text for task in tasks for text in (task.prompt, f"\n{task.question}", task.answer + "\n\n")]
    texts += [text for shape in GLYPHS for cell in CELLS for text in (f"\nWhere is the {shape}?", f"{cell}\n\n")] * 10
    corpus = [f": {text}" for text in texts]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=CONFIG["text_config"]["vocab_size"], special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return tokenizer


def build_processor(seed: int) -> JanusProcessor:
    """Text tokenizer in Janus-Pro's turns, and the preprocessing of pictures."""
    special = {
        "bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>",
    }
    tags = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
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


# ---------------------------------------------------------------------------------------------------------------------
# The unified model

# How often each category is drawn. Positions and pairs of colors are learned last, and a judge that is wrong about them
# would be exploited by reinforcement learning, so understanding sees more of them.
DRAWING = dict(zip(TAGS, (0.5, 1, 1.5, 1.5, 1.5, 5)))
UNDERSTANDING = dict(zip(TAGS, (1, 1, 3, 1, 5, 8)))


CELLS = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))


def draw_tasks(count: int, weights: dict[str, float], rng: np.random.Generator) -> list[Task]:
    """Tasks of categories in proportion to `weights`."""
    chances = np.array(list(weights.values())) / sum(weights.values())
    return [draw_task(VOCABULARY, rng, tag=str(tag)) for tag in rng.choice(list(weights), size=count, p=chances)]


def cell_classes(objects: list[tuple[str, str, int]]) -> np.ndarray:
    """For each of the 36 patches, which shape and colour its cell holds (0: nothing)."""
    cells = np.zeros((GRID, GRID), dtype=np.int64)
    for shape, color, cell in objects:
        cells[divmod(cell, GRID)] = 1 + list(GLYPHS).index(shape) * len(PALETTE) + list(PALETTE).index(color)
    return cells.repeat(2, 0).repeat(2, 1).ravel()


@dataclass
class Pool:
    """Scenes with their codes and what the image tokenizer makes of them, computed once because it is the slow part."""

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
        codes.append(model.vqmodel.encode(to_pixels(images)))
        restored.append(model.to_pixels(codes[-1]))
    return Pool(tasks, scenes, torch.cat(codes), torch.cat(restored))


def drawing_loss(model: UnifiedModel, tasks: list[Task], codes: Tensor, noise: float, rng: np.random.Generator) -> Tensor:
    """Cross-entropy of the codes given their captions: a share `noise` of these swapped for another of the category, a
    tenth replaced by the guidance's empty prompt."""
    captions = [draw_task(VOCABULARY, rng, tag=t.tag).prompt if rng.random() < noise else t.prompt for t in tasks]
    ids, mask = model.generation_prompt(captions)
    empty = torch.from_numpy(rng.random(len(tasks)) < 0.1)[:, None]
    blank, blank_mask = model.unconditional(ids, mask)
    ids, mask = blank.where(empty, ids), blank_mask.where(empty, mask)
    if isinstance(model, ShowO):  # of those masked: a share of cos(pi / 2 u), as the sampler's schedule has it
        share = torch.from_numpy(np.cos(np.pi / 2 * rng.random(len(codes))))[:, None]
        masked = torch.from_numpy(rng.random(codes.shape)).argsort(1) < (share * codes.shape[1]).ceil()
        logits = model.generation_head(model.canvas_hidden(ids, mask, codes, ~masked))
        return -token_logprobs(logits, codes)[masked].mean()
    logits = image_logits(model, Images(codes, None, ids, mask), guidance=1, temperature=1)
    return -token_logprobs(logits, codes).mean()


def say(task: Task, rng: np.random.Generator) -> str:
    """The answer that is learned. Which of two objects a position is told from is free; four times in five it is the
    one that is read first, because relations are learned much sooner when most answers say `left of` or `above`."""
    if task.tag == "position" and task.facts[1]["position"][0] in ("right of", "below") and rng.random() < 0.8:
        first, second = task.facts
        relation = [INVERSE[second["position"][0]], 0]
        return make_task("position", [{"class": second["class"], "count": 1}, {**first, "position": relation}]).answer
    return task.answer


def ask(task: Task, scene: list[tuple[str, str, int]], rng: np.random.Generator) -> tuple[str, str]:
    """A question about a scene and its answer: the task's own, or in a third of the pictures of two things where one of
    them is or what color it has, of which relations and pairs of colors are put together."""
    if len(task.facts) == 2 and rng.random() < 1 / 3:
        shape, color, cell = scene[rng.integers(2)]
        where = f"Where is the {shape}?", CELLS[cell]
        return where if rng.random() < 0.5 else (f"What is the color of the {shape}?", color)
    return task.question, say(task, rng)


def understanding_loss(
    model: UnifiedModel, probe: torch.nn.Linear, pool: Pool, count: int, rng: np.random.Generator
) -> Tensor:
    """Cross-entropy of the known answers about true pictures, a third of them as the image tokenizer restores them;
    plus, for a Janus, that of what each patch holds, read by a linear probe off the aligner, which teaches its encoder
    to see. (A Show-o sees codes.)"""
    old = rng.choice(len(pool.tasks), size=count // 3, replace=False)
    tasks = draw_tasks(count - len(old), UNDERSTANDING, rng)
    scenes = [layout(task, rng) for task in tasks]
    fresh = to_pixels(np.stack([paint(scene) for scene in scenes]))
    pixels = torch.cat((pool.restored[old], fresh))
    tasks, scenes = [pool.tasks[i] for i in old] + tasks, [pool.scenes[i] for i in old] + scenes
    questions, known = zip(*(ask(task, scene, rng) for task, scene in zip(tasks, scenes)))
    answers, mask = encode_answers(model, list(known))
    logits = answer_logits(model, pixels, list(questions), answers)
    answer_loss = -token_logprobs(logits, answers)[mask].mean()
    if isinstance(model, ShowO):
        return answer_loss
    classes = torch.from_numpy(np.stack([cell_classes(scene) for scene in scenes]))
    return answer_loss + 0.3 * F.cross_entropy(probe(model.image_features(pixels)).flatten(0, 1), classes.flatten())


def learning_rate(step: int, args) -> float:
    """Warm-up and cosine decay, once for the clean captions and again, half as high, for the noisy ones."""
    noisy = step >= args.clean
    done, length = (step - args.clean, args.steps - args.clean) if noisy else (step, args.clean)
    return (0.5 if noisy else 1.0) * args.lr * min((done + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * done / length))


def train_model(model: UnifiedModel, args: argparse.Namespace, state: Path, log: Callable) -> None:
    """Both directions together, for `args.steps` steps; its state goes into `state` every 200 steps."""
    probe = torch.nn.Linear(CONFIG["text_config"]["hidden_size"], 1 + len(GLYPHS) * len(PALETTE))
    weights = [p for name, p in model.named_parameters() if not name.startswith("vqmodel.")] + list(probe.parameters())
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
        noise = args.caption_noise if step >= args.clean else 0.0
        drawing = drawing_loss(model, [pool.tasks[i] for i in chosen], pool.codes[chosen], noise, rng)
        understanding = understanding_loss(model, probe, pool, args.asked, rng)
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
        train = train_image_tokenizer if args.model == "janus" else train_lookup_free_tokenizer
        train(model.vqmodel, args.tokenizer_steps, args.seed, log)
        save_file(model.vqmodel.state_dict(), path)
    model.vqmodel.load_state_dict(load_file(path))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="pretrain a tiny model; run again to resume")
    parser.add_argument("--model", choices=["janus", "show-o"], default="janus", help="(default: janus)")
    parser.add_argument("--out", help="checkpoint folder (default: tiny/janus or tiny/show-o)")
    parser.add_argument("--start", metavar="FOLDER", help="go on from this checkpoint's weights")
    parser.add_argument("--tokenizer-steps", type=int, default=700, help="of the image tokenizer")
    parser.add_argument("--steps", type=int, default=4700, help="of the unified model")
    parser.add_argument("--batch", type=int, default=96, help="pictures drawn a step")
    parser.add_argument("--asked", type=int, default=48, help="pictures asked about a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--clean", type=int, default=4000, help="first steps, in which every caption is right")
    parser.add_argument("--caption-noise", type=float, default=0.4, help="share of captions swapped in the others")
    parser.add_argument("--scenes", type=int, default=20_000, help="pictures to draw from")
    parser.add_argument("--guidance", type=float, help="the checkpoint's own (default: 3, for Show-o 2, which is 1 + w = 3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out = args.out or f"tiny/{args.model}"
    args.guidance = args.guidance if args.guidance is not None else {"janus": 3.0, "show-o": 2.0}[args.model]
    work = Path(args.out + ".work")
    work.mkdir(parents=True, exist_ok=True)

    def log(**fields) -> None:
        with open(work / "log.jsonl", "a") as file:
            file.write(json.dumps(fields) + "\n")

    if args.start:
        model = load(args.start)
        model.guidance = args.guidance
    else:
        model = new_model(args, work, log)
    model.vqmodel.requires_grad_(False)
    train_model(model, args, work / "state.pt", log)
    save(model.to(torch.bfloat16), args.out)  # half the size in the repository; loading widens it again
    print(f"written: {args.out}; next: python evaluate.py --model {args.out}")


if __name__ == "__main__":
    main()
