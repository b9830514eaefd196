"""Every test. They need no network, no GPU and no downloaded weights, and take a few minutes on two cores.

    python -m pytest test_unirl.py

In the order of the files: model.py and sample.py against transformers' Janus, the original layout, enumerations and
chi-squares, on small random models; reward.py against a table of answers written by hand; the formulas and runs of
grpo.py and sft.py; the shapes world and evaluate.py's rules. Where a fault was found in a published trainer, a test
plants it and sees it.
"""

import argparse
import copy
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig, CLIPModel, CLIPTokenizer, JanusConfig, JanusForConditionalGeneration, JanusProcessor, Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation, PhiConfig, PhiModel, PreTrainedTokenizerFast, SwinConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import ablate
import bench
import checkpoint
import evaluate as evaluate_module
import geneval
import grpo
import model as model_module
import report
import resume
import reward
import sample
import sft
import training
import watch
from checkpoint import chat_template, load, save
from evaluate import evaluate, summarize, world_of
from geneval import Detection, judge, load_detector
from model import SHOW_O_TOKENS, Janus, MAGVITv2, Phi, ShowO, UserError, frozen_copy, generation_mask, merged
from reward import (
    GENEVAL, INVERSE, OUR_OBJECTS, REAL, TAGS, Vocabulary, article, draw_task, geneval_metadata, geneval_suite,
    is_geneval_prompt, make_task, plural, read_tasks, score, task_key,
)
from sample import (
    Images, answer_logits, draw, encode_answers, gumbel_given, image_logits, relaxed_codes, sample_answers,
    sample_images, to_pixels, token_logprobs,
)
from tiny import world as shapes
from training import fill_in, learning_rate

torch.set_num_threads(1)  # the models here are too small to gain from more
ROOT = Path(__file__).parent

PROMPTS = ["a red circle", "two blue squares left of a ring", "a"]  # of unequal lengths: two rows are padded
EQUAL = ["a red ring", "a red ring"]
QUESTIONS = ["What is it?", "How many blue squares are there in the picture?", "Which color?"]

# =====================================================================================================================
# model.py and sample.py

# ---- small Januses --------------------------------------------------------------------------------------------------

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE_TAGS = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
ROLES = ["<|User|>", "<|Assistant|>"]


def bpe(special: list[str]) -> Tokenizer:
    """A byte-level tokenizer: the special tokens, the 256 bytes and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(PROMPTS + QUESTIONS, trainers.BpeTrainer(
        vocab_size=288, special_tokens=special, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def processor_for(config: JanusConfig, system_prompt: bool = False) -> JanusProcessor:
    side = config.vision_config.image_size
    return JanusProcessor(
        JanusImageProcessorPil(size={"height": side, "width": side}, min_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        PreTrainedTokenizerFast(
            tokenizer_object=bpe([BOS, EOS, PAD, *IMAGE_TAGS.values(), *ROLES]), extra_special_tokens=IMAGE_TAGS,
            bos_token=BOS, eos_token=EOS, pad_token=PAD,
        ),
        chat_template=chat_template(*ROLES),
        use_default_system_prompt=system_prompt,
        num_image_tokens=config.vision_config.num_image_tokens,
    )


def small_config(
    image_size=16, patch_size=4, channels=(1, 1, 2), codes=32, width=64, kv_heads=2, vision_heads=4, depth=2, blocks=1, layers=2,
    tied=False, text=None,
) -> JanusConfig:
    return JanusConfig(
        text_config=dict(
            model_type="llama", vocab_size=300, hidden_size=width, intermediate_size=96, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=512, **(text or {}),
        ),
        vision_config=dict(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=vision_heads, image_size=image_size,
            patch_size=patch_size, mlp_ratio=3.0, projection_dim=width, depth=depth,
            num_image_tokens=(image_size // patch_size) ** 2,
        ),
        vq_config=dict(
            embed_dim=8, num_embeddings=codes, latent_channels=24, base_channels=32, channel_multiplier=list(channels),
            num_res_blocks=blocks, projection_dim=width, num_hidden_layers=depth, image_token_embed_dim=width,
        ),
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "grouped": dict(),
    "tied": dict(kv_heads=4, tied=True, depth=1, image_size=8, patch_size=2, channels=(1, 2),
                 text=dict(rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "deep": dict(kv_heads=1, depth=3, blocks=2, image_size=32, patch_size=16, channels=(1, 1, 2, 2, 4), text=dict(head_dim=32)),
}


def small_janus(seed: int = 0, system_prompt: bool = False, guidance: float = 5.0, **settings) -> Janus:
    """Random weights large enough that the logits are far from uniform, so that mistakes show."""
    config = small_config(**settings)
    model = Janus(config, processor_for(config, system_prompt), guidance).eval()
    config.image_token_id = model.tokenizer.convert_tokens_to_ids(model.tokenizer.image_token)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                is_scale = "norm" in name and name.endswith("weight")
                parameter.copy_(0.1 * noise + (1 if is_scale else 0))
            elif "embed" in name and "patch" not in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        model.generation_head.vision_head.weight.mul_(2)
        model.lm_head.weight.mul_(0.3 if config.tie_word_embeddings else 2)
    return model


def transformers_twin(model: Janus) -> JanusForConditionalGeneration:
    twin = JanusForConditionalGeneration(JanusConfig.from_dict(model.config.to_dict())).eval()
    names = {name if name == "lm_head.weight" else f"model.{name}": t for name, t in model.state_dict().items()}
    twin.load_state_dict(names)
    return twin


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    model = small_janus(**CONFIGS[request.param])
    return model, transformers_twin(model)


@pytest.fixture(scope="module")
def janus():
    return small_janus()


@pytest.fixture(scope="module")
def saved(janus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    save(janus, folder)
    return folder


@pytest.fixture
def copy_of(saved, tmp_path):
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def random_pixels(model: Janus, count: int, seed: int = 1) -> torch.Tensor:
    side = model.config.vision_config.image_size
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_images(model: Janus, prompts: list[str], seed: int = 2) -> Images:
    """Any codes, as if they had been sampled."""
    shape = len(prompts), model.num_image_tokens
    codes = torch.randint(model.num_codes, shape, generator=torch.Generator().manual_seed(seed))
    return Images(codes, None, *model.generation_prompt(prompts))


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance


def same_tensors(a: Janus, b: Janus):
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- parity with transformers ---------------------------------------------------------------------------------------


@torch.no_grad()
def their_image_logits(twin, model: Janus, images: Images, guidance: float) -> torch.Tensor:
    """Guided logits [B, N, V] out of transformers' own modules, the unconditional branch as its `generate` makes it."""
    tokens = model.tokenizer
    keep = [tokens.convert_tokens_to_ids(token) for token in (BOS, IMAGE_TAGS["boi_token"])]
    blank = images.ids.masked_fill(~torch.isin(images.ids, torch.tensor(keep)), tokens.convert_tokens_to_ids(PAD))
    N = images.codes.shape[1]

    def branch(ids):
        embedded = twin.get_input_embeddings()(ids), twin.prepare_embeddings_for_image_generation(images.codes[:, :-1])
        mask = torch.cat((images.mask, torch.ones_like(images.codes[:, :-1], dtype=torch.bool)), 1).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        trunk = twin.model.language_model(
            inputs_embeds=torch.cat(embedded, 1), attention_mask=mask, position_ids=positions
        ).last_hidden_state
        return twin.model.generation_head(trunk[:, -N:])

    return branch(blank) + guidance * (branch(images.ids) - branch(blank))


@torch.no_grad()
def test_image_decoder_agrees_with_transformers(pair):
    model, twin = pair
    codes = random_images(model, PROMPTS).codes
    theirs = twin.decode_image_tokens(codes).permute(0, 3, 1, 2)
    close(model.vqmodel.decode(codes), theirs)
    close(model.vqmodel.decode(F.one_hot(codes, model.num_codes).float()), theirs)
    assert theirs.std() > 0.1


@torch.no_grad()
def test_image_features_agree_with_transformers(pair):
    model, twin = pair
    pixels = random_pixels(model, 2)
    close(model.image_features(pixels), twin.model.get_image_features(pixels).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_image_logits_agree_with_transformers(pair, guidance):
    model, twin = pair
    images = random_images(model, PROMPTS)
    ours = image_logits(model, images, guidance, temperature=1.0)
    close(ours, their_image_logits(twin, model, images, guidance))
    close(image_logits(model, images, guidance, temperature=0.5), 2 * ours)
    assert ours.std() > 0.5


@torch.no_grad()
def test_conditional_logits_agree_with_transformers(pair):
    model, twin = pair
    images = random_images(model, PROMPTS)
    close(image_logits(model, images, 5.0, 1.0, mode="conditional"), their_image_logits(twin, model, images, 1.0))


@torch.no_grad()
def test_answer_logits_agree_with_transformers(pair):
    model, twin = pair
    pixels = random_pixels(model, len(QUESTIONS))
    ids, mask = model.question_prompt(QUESTIONS)
    answers, answer_mask = encode_answers(model, ["ring", "two blue squares", "red"])
    theirs = twin(
        input_ids=torch.cat((ids, answers), 1), pixel_values=pixels,
        attention_mask=torch.cat((mask, answer_mask), 1).long(),
        position_ids=(torch.cat((mask, torch.ones_like(answer_mask)), 1).cumsum(1) - 1).clamp(min=0),
    ).logits[:, ids.shape[1] - 1 : -1]
    ours = answer_logits(model, pixels, QUESTIONS, answers)
    close(ours[answer_mask], theirs[answer_mask])
    assert ours.std() > 0.5


def ends_early(model: Janus, pixels: torch.Tensor) -> Janus:
    """The same model, but the third greedy token of the first answer is the end-of-sentence token."""
    swap = [sample_answers(model, pixels, QUESTIONS, max_tokens=3).ids[0, 2].item(), model.tokenizer.eos_token_id]
    with torch.no_grad():
        model.lm_head.weight[swap] = model.lm_head.weight[swap[::-1]]
    return model


def test_greedy_answers_are_those_of_transformers():
    model = small_janus(seed=3)
    pixels = random_pixels(model, len(QUESTIONS))
    twin = transformers_twin(ends_early(model, pixels))
    ids, mask = model.question_prompt(QUESTIONS)
    theirs = twin.generate(
        input_ids=ids, attention_mask=mask.long(), pixel_values=pixels, generation_mode="text", do_sample=False,
        max_new_tokens=8, pad_token_id=model.tokenizer.pad_token_id, eos_token_id=model.tokenizer.eos_token_id,
    )[:, ids.shape[1] :]
    ours = sample_answers(model, pixels, QUESTIONS, max_tokens=8)
    assert torch.equal(ours.ids, theirs)
    assert ours.mask.sum(1)[0] == 3 and len(ours.mask.sum(1).unique()) > 1
    assert ours.texts == [text.strip() for text in model.tokenizer.batch_decode(theirs, skip_special_tokens=True)]


def test_greedy_image_of_transformers_is_the_argmax_of_image_logits(pair):
    model, twin = pair
    ids, mask = model.generation_prompt(PROMPTS)
    tokens = model.tokenizer
    twin.generation_config.generation_kwargs = {"boi_token_id": tokens.convert_tokens_to_ids(IMAGE_TAGS["boi_token"])}
    codes = twin.generate(
        input_ids=ids, attention_mask=mask.long(), generation_mode="image", do_sample=False, guidance_scale=3.0,
        bos_token_id=tokens.bos_token_id, pad_token_id=tokens.pad_token_id,
    )
    assert torch.equal(image_logits(model, Images(codes, None, ids, mask), 3.0, 1.0).argmax(-1), codes)
    assert len(codes.unique(dim=0)) > 1


@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_recorded_logprobs_are_those_transformers_gives_the_codes(pair, guidance):
    model, twin = pair
    images = sample_images(model, PROMPTS, [4, 5, 6], guidance, 0.7, compiled=False)
    logits = their_image_logits(twin, model, images, guidance) / 0.7
    theirs = torch.distributions.Categorical(logits=logits.double()).log_prob(images.codes)
    close(images.logprobs.double(), theirs)


# ---- the image encoder ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_image_encoder_takes_the_nearest_code_on_the_sphere(pair):
    """The original normalises latents and codebook before it compares them; transformers 5.23.0 compares them raw, so
    that with vectors of unequal length it finds other codes, and decoding (which does normalise) another image."""
    model, twin = pair
    with torch.no_grad():
        model.vqmodel.quantize.embedding.weight.mul_(torch.linspace(0.2, 5, model.num_codes)[:, None])
    twin.load_state_dict(transformers_twin(model).state_dict())
    pixels = random_pixels(model, 3)
    latents = twin.model.vqmodel.quant_conv(twin.model.vqmodel.encoder(pixels)).permute(0, 2, 3, 1).flatten(1, 2)
    on_sphere = latents / latents.norm(dim=-1, keepdim=True)
    codebook = twin.model.vqmodel.quantize.embedding.weight
    distances = (on_sphere[:, :, None] - codebook / codebook.norm(dim=-1, keepdim=True)).square().sum(-1)  # [B, N, V]
    ours = model.vqmodel.encode(pixels)
    assert torch.equal(ours, distances.argmin(-1))
    theirs = twin.model.vqmodel.encode(pixels).image_tokens.view_as(ours)
    assert not torch.equal(ours, theirs)


@torch.no_grad()
def test_decoding_is_differentiable_in_one_hots(janus):
    codes = random_images(janus, ["a"]).codes
    with torch.enable_grad():
        one_hot = F.one_hot(codes, janus.num_codes).float().requires_grad_()
        janus.to_pixels(one_hot).sum().backward()
    assert one_hot.grad.abs().sum() > 0
    assert janus.to_pixels(codes).abs().max() <= 1


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_opens_here_and_in_transformers(name, tmp_path):
    model = small_janus(**CONFIGS[name], guidance=2.5)
    save(model, tmp_path / "saved")
    twin, report = JanusForConditionalGeneration.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    theirs = {name.removeprefix("model."): tensor for name, tensor in twin.state_dict().items()}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert theirs.keys() == model.state_dict().keys()
    again = load(str(tmp_path / "saved"))
    same_tensors(model, again)
    assert again.guidance == 2.5 and not again.training
    assert (again.lm_head.weight is again.language_model.embed_tokens.weight) == bool(CONFIGS[name].get("tied"))
    images = random_images(model, PROMPTS)
    assert torch.equal(image_logits(model, images, 5.0, 1.0), image_logits(again, images, 5.0, 1.0))


def test_saved_generation_config_lets_transformers_draw(saved):
    twin = JanusForConditionalGeneration.from_pretrained(saved)
    processor = JanusProcessor.from_pretrained(saved)
    inputs = processor(text=["a red circle"] * 2, generation_mode="image", return_tensors="pt")
    codes = twin.generate(**inputs, generation_mode="image")
    assert codes.shape == (2, 16)
    assert twin.decode_image_tokens(codes).shape == (2, 16, 16, 3)


def test_save_replaces_what_was_there_and_keeps_the_extra(janus, tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "stale").touch()
    save(janus, folder, {"more/state.json": {"step": 7}, "more.safetensors": {"a": torch.ones(2)}})
    assert json.loads((folder / "more" / "state.json").read_text()) == {"step": 7}
    assert load_file(folder / "more.safetensors")["a"].tolist() == [1, 1]
    assert not (folder / "stale").exists()
    assert os.listdir(tmp_path) == ["step"]


def test_sharded_transformers_checkpoint_loads_identically(janus, copy_of):
    os.remove(copy_of / "model.safetensors")
    transformers_twin(janus).save_pretrained(copy_of, max_shard_size="200KB")
    assert len(list(copy_of.glob("model-*.safetensors"))) > 2
    same_tensors(janus, load(str(copy_of)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_load_casts_to_the_dtype_asked_for(saved, janus, dtype):
    model = load(str(saved), dtype=dtype)
    assert all(torch.equal(t, janus.state_dict()[name].to(dtype)) for name, t in model.state_dict().items())


@pytest.mark.parametrize("system_prompt", [False, True])
def test_saved_processor_makes_the_same_prompts(system_prompt, tmp_path):
    model = small_janus(system_prompt=system_prompt)
    save(model, tmp_path / "saved")
    processor = JanusProcessor.from_pretrained(tmp_path / "saved")

    def chat(content):
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    prompts = [chat([{"type": "text", "text": prompt}]) for prompt in PROMPTS]
    drawing = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    questions = [chat([{"type": "image"}, {"type": "text", "text": question}]) for question in QUESTIONS]
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    asking = processor(text=questions, images=pictures, padding=True, return_tensors="pt")
    for again in (model, load(str(tmp_path / "saved"))):
        for theirs, (ids, mask) in (
            (drawing, again.generation_prompt(PROMPTS)), (asking, again.question_prompt(QUESTIONS))
        ):
            assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask.long(), theirs["attention_mask"])


# ---- the original layout --------------------------------------------------------------------------------------------

SIGLIP_HEADS = 16


def original_tensors(model: Janus) -> dict[str, torch.Tensor]:
    """The tensors as DeepSeek's classes name them, made from ours by the inverse of what loading does."""
    ours = dict(model.state_dict())
    out = {}
    for name, tensor in ours.items():
        parts = name.split(".")
        if name.startswith("language_model."):
            out["language_model.model." + name.removeprefix("language_model.")] = tensor
        elif parts[0] == "lm_head":
            out["language_model.lm_head.weight"] = tensor
        elif parts[0] in ("aligner", "generation_aligner"):
            number = 0 if parts[1] == "fc1" else 2 * (int(parts[2]) + 1)
            out[f"{parts[0].replace('generation', 'gen')}.layers.{number}.{parts[-1]}"] = tensor
        elif parts[0] == "generation_embeddings":
            out["gen_embed.weight"] = tensor
        elif parts[0] == "generation_head":
            out[f"gen_head.{parts[1].replace('proj_out', 'output_mlp_projector')}.{parts[2]}"] = tensor
        elif parts[0] == "vqmodel":
            new = name.replace("vqmodel", "gen_vision_model")
            for old, original in ((".down.", ".conv_blocks."), (".up.", ".conv_blocks."), (".block.", ".res."),
                                  (".mid.block_1.", ".mid.0."), (".mid.attn_1.", ".mid.1."), (".mid.block_2.", ".mid.2.")):
                new = new.replace(old, original)
            out[new] = tensor
    tower = "vision_model.vision_tower."
    for end in ("weight", "bias"):
        out[f"{tower}patch_embed.proj.{end}"] = ours[f"vision_model.embeddings.patch_embedding.{end}"]
        out[f"{tower}norm.{end}"] = ours[f"vision_model.post_layernorm.{end}"]
        for i in range(model.config.vision_config.num_hidden_layers):
            old, new = f"vision_model.encoder.layers.{i}.", f"{tower}blocks.{i}."
            out[f"{new}attn.qkv.{end}"] = torch.cat([ours[f"{old}self_attn.{part}_proj.{end}"] for part in "qkv"])
            out[f"{new}attn.proj.{end}"] = ours[f"{old}self_attn.projection_layer.{end}"]
            for n in "12":
                out[f"{new}norm{n}.{end}"] = ours[f"{old}layer_norm{n}.{end}"]
                out[f"{new}mlp.fc{n}.{end}"] = ours[f"{old}mlp.fc{n}.{end}"]
    out[f"{tower}pos_embed"] = ours["vision_model.embeddings.position_embedding.weight"][None]
    out[f"{tower}attn_pool.latent"] = torch.zeros(1, 1, 48)  # SigLIP's pooling head and a counter: unused by Janus
    out[f"{tower}attn_pool.kv.weight"] = torch.zeros(96, 48)
    out["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    return {name: tensor.clone() for name, tensor in out.items()}


def original_config(model: Janus) -> dict:
    text, vision, vq = model.config.text_config, model.config.vision_config, model.config.vq_config

    def projector(width_in, depth):
        params = dict(depth=depth, input_dim=width_in, n_embed=text.hidden_size, projector_type="mlp_gelu")
        return dict(cls="MlpProjector", model_type="aligner", params=params)

    return dict(
        model_type="multi_modality", architectures=["MultiModalityCausalLM"], torch_dtype="float32",
        language_config=dict(
            model_type="llama", vocab_size=text.vocab_size, hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size, num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads, num_key_value_heads=text.num_key_value_heads,
            max_position_embeddings=text.max_position_embeddings,
        ),
        vision_config=dict(cls="CLIPVisionTower", model_type="vision", params=dict(
            image_size=vision.image_size, model_name="siglip_large_patch16_384", select_feature="same", select_layer=-1,
        )),
        aligner_config=projector(vision.hidden_size, vision.depth),
        gen_aligner_config=projector(vq.embed_dim, vq.num_hidden_layers),
        gen_vision_config=dict(cls="VQ-16", model_type="gen_vision", params=dict(
            image_token_size=vq.num_embeddings, n_embed=vq.embed_dim,
        )),
        gen_head_config=dict(cls="vision_head", model_type="gen_head", params=dict(
            image_token_embed=vq.image_token_embed_dim, image_token_size=vq.num_embeddings, n_embed=text.hidden_size,
        )),
    )


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], form: str) -> None:
    ending = "bin" if form.endswith("bin") else "safetensors"
    stem = "pytorch_model" if ending == "bin" else "model"
    write = torch.save if ending == "bin" else save_file
    if "sharded" not in form:
        return write(tensors, folder / f"{stem}.{ending}")
    places = {name: f"{stem}-0000{1 + i % 3}-of-00003.{ending}" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        write({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_original(model: Janus, folder: Path, form: str = "safetensors", roles: bool = True, **settings) -> Path:
    """A folder as DeepSeek published them; its tokenizer's settings name neither the pad token nor the image tags."""
    folder.mkdir()
    write_weights(folder, original_tensors(model), form)
    (folder / "config.json").write_text(json.dumps(original_config(model)))
    bpe([BOS, EOS, PAD, *IMAGE_TAGS.values(), *(ROLES if roles else [])]).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "LlamaTokenizerFast"}
    ))
    (folder / "processor_config.json").write_text(json.dumps(dict(
        add_special_token=False, ignore_id=-100, image_tag=IMAGE_TAGS["image_token"], mask_prompt=True,
        num_image_tokens=model.num_image_tokens, processor_class="VLChatProcessor", **{"sft_format": "deepseek", **settings},
    )))
    return folder


@pytest.fixture(scope="module")
def sixteen():
    return small_janus(vision_heads=SIGLIP_HEADS)


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_original_layout_gives_the_same_model(sixteen, form, tmp_path):
    model = load(str(write_original(sixteen, tmp_path / "original", form)))
    same_tensors(sixteen, model)
    images, pixels = random_images(sixteen, PROMPTS), random_pixels(sixteen, 1)
    assert torch.equal(image_logits(sixteen, images, 5.0, 1.0), image_logits(model, images, 5.0, 1.0))
    assert torch.equal(sixteen.to_pixels(images.codes), model.to_pixels(images.codes))
    assert torch.equal(sixteen.image_features(pixels), model.image_features(pixels))
    assert torch.equal(sixteen.vqmodel.encode(pixels), model.vqmodel.encode(pixels))


def test_original_layout_is_saved_as_transformers_layout(sixteen, tmp_path):
    model = load(str(write_original(sixteen, tmp_path / "original")))
    save(model, tmp_path / "saved")
    twin = JanusForConditionalGeneration.from_pretrained(tmp_path / "saved")
    close(model.image_features(random_pixels(model, 1)), twin.model.get_image_features(random_pixels(model, 1)).pooler_output)
    again = load(str(tmp_path / "saved"))
    same_tensors(sixteen, again)
    assert torch.equal(model.question_prompt(QUESTIONS)[0], again.question_prompt(QUESTIONS)[0])


def text_of(model: Janus, ids: torch.Tensor) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("roles, settings, user, assistant", [
    (True, {}, "<|User|>", "<|Assistant|>"),
    (False, {}, "User", "Assistant"),
    (True, {"sft_format": "deepseek_old"}, "User", "Assistant"),
])
def test_prompts_of_the_original_layout(sixteen, tmp_path, roles, settings, user, assistant):
    model = load(str(write_original(sixteen, tmp_path / "original", roles=roles, **settings)))
    system = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
              "user provides, and assist the user with a variety of tasks using natural language.")
    drawing, asking = model.generation_prompt(["a red ring"])[0][0], model.question_prompt(["Which color?"])[0][0]
    assert text_of(model, drawing) == f"{BOS}{user}: a red ring\n\n{assistant}:<begin_of_image>"
    placeholders = "<image_placeholder>" * 16
    assert text_of(model, asking) == (
        f"{BOS}{system}\n\n{user}: <begin_of_image>{placeholders}<end_of_image>\nWhich color?\n\n{assistant}:"
    )
    tokens = model.tokenizer
    assert drawing[-1] == tokens.convert_tokens_to_ids("<begin_of_image>")
    assert (asking == model.config.image_token_id).sum() == 16
    assert tokens.convert_tokens_to_ids(user) in drawing if user in ROLES else user in text_of(model, drawing)


# ---- prompts and padding --------------------------------------------------------------------------------------------


def test_unconditional_prompt_keeps_first_and_last_and_padding(janus):
    pad, bos, boi = janus.tokenizer.convert_tokens_to_ids([PAD, BOS, IMAGE_TAGS["boi_token"]])
    ids = torch.tensor([[bos, 21, 22, 23, 24, boi], [pad, pad, bos, 25, 26, boi], [pad, pad, pad, pad, bos, boi]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    blank, blank_mask = janus.unconditional(ids, mask)
    assert blank.tolist() == [
        [bos, pad, pad, pad, pad, boi], [pad, pad, bos, pad, pad, boi], [pad, pad, pad, pad, bos, boi]
    ]
    assert torch.equal(blank_mask, mask)


def test_prompts_are_padded_on_the_left(janus):
    ids, mask = janus.generation_prompt(PROMPTS)
    for prompt, row, real in zip(PROMPTS, ids, mask):
        alone, _ = janus.generation_prompt([prompt])
        assert torch.equal(row[real], alone[0])
        assert (row[~real] == janus.tokenizer.pad_token_id).all() and not real[: (~real).sum()].any()


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_batch_gives_the_image_logprobs_of_one_at_a_time(janus, guidance):
    images = random_images(janus, PROMPTS)
    together = token_logprobs(image_logits(janus, images, guidance, 0.7), images.codes)
    for i, prompt in enumerate(PROMPTS):
        one = Images(images.codes[i : i + 1], None, *janus.generation_prompt([prompt]))
        close(token_logprobs(image_logits(janus, one, guidance, 0.7), one.codes), together[i : i + 1])


def test_batch_gives_the_answers_of_one_at_a_time(janus):
    pixels = random_pixels(janus, len(QUESTIONS))
    for seeds in (None, [1, 2, 3]):
        together = sample_answers(janus, pixels, QUESTIONS, seeds, max_tokens=6)
        for i, question in enumerate(QUESTIONS):
            one = sample_answers(janus, pixels[i : i + 1], [question], seeds and seeds[i : i + 1], max_tokens=6)
            length = one.ids.shape[1]
            assert torch.equal(one.ids[0], together.ids[i, :length])
            close(one.logprobs[0], together.logprobs[i, :length])


# ---- the sampler's log-probabilities --------------------------------------------------------------------------------


def image_gap(model, prompts, guidance, temperature, before_scoring=None, scoring=None) -> float:
    """Largest difference between the log-probs that were recorded and those computed again."""
    images = sample_images(model, prompts, range(len(prompts)), guidance, temperature, compiled=False)
    if before_scoring:
        before_scoring()
    with torch.no_grad():
        logits = image_logits(model, images, **{"guidance": guidance, "temperature": temperature, **(scoring or {})})
    return (token_logprobs(logits, images.codes) - images.logprobs).abs().max().item()


def answer_gap(model, temperature, seeds, before_scoring=None) -> float:
    pixels = random_pixels(model, len(QUESTIONS))
    answers = sample_answers(model, pixels, QUESTIONS, seeds, temperature, max_tokens=6)
    if before_scoring:
        before_scoring()
    with torch.no_grad():
        logits = answer_logits(model, pixels, QUESTIONS, answers.ids) / (1 if seeds is None else temperature)
    gap = (token_logprobs(logits, answers.ids) - answers.logprobs).abs()
    return gap[answers.mask].max().item()


@pytest.mark.parametrize("prompts", [EQUAL, PROMPTS], ids=["equal", "unequal"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_recorded_image_logprobs_are_those_computed_again(janus, prompts, guidance, temperature):
    assert image_gap(janus, prompts, guidance, temperature) <= 1e-4


@pytest.mark.parametrize("seeds", [None, [1, 2, 3]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_recorded_answer_logprobs_are_those_computed_again(temperature, seeds):
    model = small_janus(seed=3)
    ends_early(model, random_pixels(model, len(QUESTIONS)))
    assert answer_gap(model, temperature, seeds) <= 1e-4


def test_compiled_sampler_draws_the_same_codes_with_the_same_logprobs():
    """81 codes, so that attention's width grows twice within an image, on prompts of two lengths: one compilation."""
    janus = small_janus(layers=1, image_size=36, text=dict(head_dim=24))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompts in (PROMPTS, ["a", *PROMPTS[:2]]):
        eager, compiled = (sample_images(janus, prompts, [1, 2, 3], 5.0, 0.7, compiled) for compiled in (False, True))
        assert torch.equal(eager.codes, compiled.codes)
        close(eager.logprobs, compiled.logprobs)
        with torch.no_grad():
            logits = image_logits(janus, compiled, 5.0, 0.7)
        close(token_logprobs(logits, compiled.codes), compiled.logprobs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_each_different_prompt_is_read_once(janus, monkeypatch):
    """Two groups of three images, guided: two prompts and, as their lengths differ, two unconditional ones."""
    read, forward = [], janus.language_model.forward
    monkeypatch.setattr(janus.language_model, "forward", lambda x, *rest, **named: read.append(len(x)) or forward(x, *rest, **named))
    prompts = ["a red circle"] * 3 + ["two rings left of a square"] * 3
    images = sample_images(janus, prompts, range(6), 5.0, compiled=False)
    assert read == [4] + [12] * (janus.num_image_tokens - 1)
    read.clear()
    image_logits(janus, images, 5.0, 1.0)
    assert read == [2, 6, 2, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width, bias", [(1, 512, True), (3, 512, False), (8, 512, True), (2, 5000, False), (40, 2048, True)])
def test_compiled_products_of_few_rows_are_those_of_linear(dtype, rows, width, bias):
    """By loops, where the rows are few and short, and by the library's other product, for float32; all against float64."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 1, width, generator=generator, dtype=torch.float64)
    weight, shift = torch.randn(1037, width, generator=generator).double(), torch.randn(1037, generator=generator).double()
    x, weight, shift = (t.to(dtype) for t in (x, weight, shift))
    with torch.no_grad():
        torch._dynamo.reset()
        ours = torch.compile(model_module.linear, dynamic=False)(x, weight, shift if bias else None)
        expected = F.linear(x.double(), weight.double(), shift.double() if bias else None)
    assert ours.shape == expected.shape and ours.dtype == dtype
    assert ((ours - expected).abs() / expected.std()).max() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("heads, width", [(2, 32), (4, 24)])
def test_attention_of_one_query_is_the_librarys(heads, width):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 1, width, generator=generator)
    k, v = (torch.randn(3, heads, 40, width, generator=generator).narrow(2, 0, 33) for _ in range(2))
    mask = torch.rand(3, 1, 1, 33, generator=generator) < 0.7
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).flatten(1)
    with torch.no_grad():
        for attend in (model_module.attend_with_one, torch.compile(model_module.attend_with_one, dynamic=False)):
            close(attend(q, k, v, mask)[:, 0], expected, 1e-5)


def test_detached_and_guided_modes_have_one_value_and_two_gradients(janus):
    images = random_images(janus, PROMPTS)
    guided, detached = (image_logits(janus, images, 5.0, 1.0, mode) for mode in ("guided", "detached"))
    assert torch.equal(guided, detached)
    weight = janus.generation_head.vision_head.weight
    conditional, free = (image_logits(janus, images, w, 1.0, "guided") for w in (1.0, 0.0))
    for logits, parts in ((guided, (5.0, -4.0)), (detached, (5.0, 0.0))):
        gradient = torch.autograd.grad(logits.square().sum() / 2, weight, retain_graph=True)[0]
        expected = sum(
            torch.autograd.grad(branch, weight, share * guided.detach(), retain_graph=True)[0]
            for share, branch in zip(parts, (conditional, free))
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-2)


# Each fault is planted between sampling and scoring; the check above must see every one of them.
IMAGE_FAULTS = {
    "hidden states off by one": lambda patch, model: patch.setattr(
        model.language_model, "forward",
        lambda *inputs, forward=model.language_model.forward, **named: forward(*inputs, **named).roll(1, dims=1)
    ),
    "codes shifted by one": lambda patch, model: patch.setattr(
        model, "embed_codes", lambda codes, embed=model.embed_codes: embed(codes.roll(1, dims=1))
    ),
    "end of sentence instead of pad": lambda patch, model: patch.setattr(
        Janus, "unconditional", lambda self, ids, mask, right=Janus.unconditional: (right(self, ids, mask)[0].masked_fill(
            mask & (right(self, ids, mask)[0] == self.tokenizer.pad_token_id), self.tokenizer.eos_token_id), mask)
    ),
    "unconditional pads hidden": lambda patch, model: patch.setattr(
        sample, "causal", lambda mask, right=sample.causal: right(mask & (mask.cumsum(1) != 2))
    ),
    "padding is looked at": lambda patch, model: [
        patch.setattr(module, "causal", lambda mask, right=sample.causal: right(torch.ones_like(mask)))
        for module in (sample, model_module)
    ],
    "positions doubled": lambda patch, model: patch.setattr(
        sample, "positions_of", lambda mask, right=sample.positions_of: 2 * right(mask)
    ),
    "future is looked at": lambda patch, model: patch.setattr(
        sample, "causal", lambda mask: mask[:, None, None].expand(-1, -1, mask.shape[1], -1)
    ),
    "codes to come are looked at": lambda patch, model: patch.setattr(
        sample, "after_prompts", lambda model, x, look, *rest, right=sample.after_prompts: right(
            model, x, look | (torch.arange(look.shape[-1]) >= look.shape[-1] - x.shape[1]), *rest)
    ),
    "prompts exchanged": lambda patch, model: patch.setattr(
        sample, "after_prompts", lambda model, x, look, past, index, mask, right=sample.after_prompts: right(
            model, x, look, past, index.roll(1), mask)
    ),
    "guidance and temperature swapped": lambda patch, model: patch.setattr(
        sample, "guide", lambda c, u, w, t, right=sample.guide: right(c, u, t, w)
    ),
    "branches swapped": lambda patch, model: patch.setattr(
        sample, "guide", lambda c, u, w, t, right=sample.guide: right(u, c, w, t)
    ),
}


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_planted_fault_in_image_scoring_is_seen(fault, monkeypatch):
    model = small_janus()
    assert image_gap(model, PROMPTS, 5.0, 0.7, before_scoring=lambda: IMAGE_FAULTS[fault](monkeypatch, model)) > 1e-2


@pytest.mark.parametrize("wrong", [dict(mode="conditional"), dict(guidance=1.0), dict(temperature=1.0)], ids=str)
def test_scoring_another_distribution_than_the_sampled_is_seen(janus, wrong):
    assert image_gap(janus, PROMPTS, 5.0, 0.7, scoring=wrong) > 1e-2


@pytest.mark.parametrize("fault", ["hidden states off by one", "padding is looked at"])
def test_planted_fault_in_answer_scoring_is_seen(fault, monkeypatch):
    model = small_janus()
    plant = lambda: IMAGE_FAULTS[fault](monkeypatch, model)
    assert answer_gap(model, 1.0, [1, 2, 3], before_scoring=plant) > 1e-2


# ---- what the sampler is measured against -----------------------------------------------------------------------------


def test_plain_loop_draws_from_the_same_distribution(janus):
    """Its recorded log-probs are those of one teacher-forced pass: it is slow, not wrong."""
    torch.manual_seed(0)
    images = bench.plain_loop(janus, PROMPTS, 5.0)
    with torch.no_grad():
        logprobs, _ = sample.image_logprobs(janus, images, 5.0, 1.0)
    close(images.logprobs, logprobs)
    assert images.codes.unique().numel() > 8


def test_plain_mask_predict_draws_from_the_same_distribution():
    """In one step, whose log-probs a replay gives; and in five, whatever they commit."""
    model = small_show_o(steps=1)
    torch.manual_seed(0)
    images = bench.plain_loop(model, PROMPTS, 2.0)
    images.steps = torch.zeros_like(images.codes)
    with torch.no_grad():
        close(images.logprobs, sample.image_logprobs(model, images, 2.0, 1.0)[0])
    model.steps = 5
    images = bench.plain_loop(model, PROMPTS, 2.0)
    assert (images.logprobs < 0).all() and images.codes.max() < model.num_codes


def test_plain_scoring_gives_the_same_logits(janus):
    images = random_images(janus, PROMPTS)
    with torch.no_grad():
        whole = bench.plain_forced_hidden(janus, images, images.ids, images.mask)
        close(whole, sample.forced_hidden(janus, images, images.ids, images.mask))


@pytest.mark.parametrize("size", ["tiny", "random"])
def test_benchmark_compares_with_transformers_on_the_same_weights(size, tiny, monkeypatch):
    """The twin's logits are ours, on the very tensors; its images have as many codes."""
    monkeypatch.setitem(bench.SIZES, "random", (2, 64, 4, 96, 50, 4))
    model = tiny if size == "tiny" else bench.random_model("janus", "random", torch.float32, torch.device("cpu"))
    twin = bench.transformers_twin(model)
    assert twin.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    images = random_images(model, ["a red circle", "two blue squares and a ring"])
    with torch.no_grad():
        x = torch.cat((model.embed_text(images.ids), model.embed_codes(images.codes)), dim=1)
        mask = F.pad(images.mask, (0, images.codes.shape[1]), value=True).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        theirs = twin.model.language_model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
        ours = sample.forced_hidden(model, images, images.ids, images.mask)
        close(ours, theirs[:, images.ids.shape[1] - 1 : -1])
        codes = bench.draw_with_transformers(twin, images.ids, images.mask)
    assert codes.shape == images.codes.shape and codes.max() < model.num_codes and codes.unique().numel() > 4


def test_benchmark_counts_what_a_step_reads(tiny):
    text, vq = tiny.config.text_config, tiny.config.vq_config
    D, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    layer = 2 * D * D + 2 * D * kv + 3 * D * text.intermediate_size
    extra = D * (vq.embed_dim + D) + D * (D + vq.num_embeddings)
    assert sum(w.weight.numel() for w in bench.step_weights(tiny)) == text.num_hidden_layers * layer + extra
    cache = tiny.language_model.new_cache(6, 20 + tiny.num_image_tokens)
    assert bench.cache_bytes(tiny, 6, 20) == sum(t.numel() * t.element_size() for layer in cache for t in layer)
    assert 0.9 < bench.added_memory(lambda: torch.ones(2**26).sum(), torch.device("cpu")) / (4 * 2**26) < 1.3


def test_benchmark_from_the_command_line(tmp_path):
    flags = f"--models janus --batches 2 --repeats 1 --no-compile --json {tmp_path / 'bench.json'}".split()
    done = subprocess.run([sys.executable, "sample.py", "--bench", *flags], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    row, = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert row["batch"] == 2 and row["tokens"] == 36 and len(row["seconds"]["plain"]) == 1
    first = row["seconds"]["transformers"][0] / row["seconds"]["ours"][0]
    assert row["ratio_vs_transformers"] == pytest.approx([first] * 3) and "| janus | tiny |" in done.stdout


# ---- seeds ----------------------------------------------------------------------------------------------------------


def test_seed_decides_the_image_whatever_else_is_in_the_batch(janus):
    alone = sample_images(janus, ["a red circle"], [7], 5.0, compiled=False)
    batch = sample_images(janus, [*PROMPTS, "a red circle"], [1, 2, 3, 7], 5.0, compiled=False)
    first = sample_images(janus, ["a red circle", PROMPTS[1]], [7, 9], 5.0, compiled=False)
    for images, row in ((batch, 3), (first, 0)):
        assert torch.equal(images.codes[row], alone.codes[0])
        close(images.logprobs[row], alone.logprobs[0])


def test_other_seeds_give_other_images(janus):
    codes = sample_images(janus, ["a red circle"] * 8, range(8), 1.0, compiled=False).codes
    assert len(codes.unique(dim=0)) == 8


def test_sampling_leaves_the_global_generator_alone(janus):
    before = torch.get_rng_state()
    sample_images(janus, ["a"], [0], 5.0, compiled=False)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the draw -------------------------------------------------------------------------------------------------------


def chi_square_excess(counts, expected) -> float:
    """Chi-square of the counts, in standard deviations above its mean (Wilson and Hilferty's cube root), the cells
    expected fewer than 5 times taken together."""
    counts, expected = np.asarray(counts, float), np.asarray(expected, float)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    spread = 2 / (9 * (len(counts) - 1))
    return ((np.sum((counts - expected) ** 2 / expected) / (len(counts) - 1)) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def test_draw_follows_the_softmax():
    logits = 1.5 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    tokens, _ = draw(logits.expand(20_000, 16), uniforms)
    counts = torch.bincount(tokens, minlength=16)
    assert chi_square_excess(counts, 20_000 * logits.double().softmax(0)) < 3
    assert chi_square_excess(counts, 20_000 * (logits.double() / 1.1).softmax(0)) > 6


def test_draw_gives_exact_logprobs():
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(64, 1000, generator=generator)
    tokens, logprobs = draw(logits, torch.rand(64, generator=generator))
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    close(logprobs.double(), exact, 1e-5)
    close(token_logprobs(logits[:, None], tokens[:, None])[:, 0].double(), exact, 1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_draw_takes_the_first_possible_code_at_zero_and_the_last_at_the_top(scale):
    logits = scale * torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    logits[:, :3] = logits[:, -2:] = -math.inf
    possible = logits.exp() > 1e-4 * logits.exp().sum(-1, keepdim=True)
    bottom, _ = draw(logits, torch.zeros(200))
    top, logprobs = draw(logits, torch.full((200,), 1 - 2**-24))
    assert (bottom == 3).all()
    assert (top <= 497).all() and (top >= (possible * torch.arange(500)).max(-1).values).all()
    assert logprobs.isfinite().all()


def test_draw_never_takes_a_code_of_no_probability():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 16, generator=generator)
    impossible = torch.rand(20_000, 16, generator=generator) < 0.5
    impossible[:, 5] = False
    logits[impossible] = torch.where(torch.arange(20_000) % 2 == 0, -math.inf, -1e4).repeat_interleave(impossible.sum(1))
    for uniforms in (torch.rand(20_000, generator=generator), torch.zeros(20_000), torch.full((20_000,), 1 - 2**-24)):
        tokens, logprobs = draw(logits, uniforms)
        assert not impossible.gather(1, tokens[:, None]).any()
        assert logprobs.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True])
def test_first_code_follows_the_softmax_over_seeds(compiled):
    model = small_janus(codes=16, image_size=8, patch_size=4)
    images = sample_images(model, ["a"] * 2000, range(2000), 2.0, 0.8, compiled)
    one = Images(images.codes[:1], None, images.ids[:1], images.mask[:1])
    with torch.no_grad():
        chances = image_logits(model, one, 2.0, 0.8)[0, 0].double().softmax(0)
    counts = torch.bincount(images.codes[:, 0], minlength=16)
    assert chi_square_excess(counts, 2000 * chances) < 3
    assert chi_square_excess(counts, np.full(16, 2000 / 16)) > 6


@pytest.mark.parametrize("compiled", [False, True])
def test_whole_images_follow_their_enumerated_probabilities(compiled):
    model = small_janus(codes=3, image_size=8, patch_size=4)
    every = torch.tensor(list(product(range(3), repeat=4)))  # [81, 4]
    ids, mask = model.generation_prompt(["a"] * 81)
    with torch.no_grad():
        logits = image_logits(model, Images(every, None, ids, mask), 2.0, 1.0)
    chances = token_logprobs(logits, every).sum(1).double().exp()
    assert abs(chances.sum().item() - 1) < 1e-5
    codes = sample_images(model, ["a"] * 2000, range(2000), 2.0, 1.0, compiled).codes
    counts = torch.bincount(codes @ torch.tensor([27, 9, 3, 1]), minlength=81)
    assert chi_square_excess(counts, 2000 * chances) < 3


# ---- mistakes of the user's -----------------------------------------------------------------------------------------


@contextmanager
def user_error(*words):
    """The block raises a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_unknown_name_lists_the_names(tmp_path):
    for name in ("no-such-model", str(tmp_path / "nowhere")):
        with user_error(repr(name), "tiny", "janus-pro-1b", "janus-pro-7b", "folder"):
            load(name)


def test_empty_folder_is_said_to_lack_a_config(tmp_path):
    with user_error(str(tmp_path), "config.json"):
        load(str(tmp_path))


@pytest.mark.parametrize("content, word", [
    ("{", "JSON"), ("[]", "JSON"), ("{}", "None"), ('{"model_type": "llama"}', "llama"),
])
def test_config_of_something_else_is_refused(copy_of, content, word):
    (copy_of / "config.json").write_text(content)
    with user_error(str(copy_of), word):
        load(str(copy_of))


@pytest.mark.parametrize("part, change", [
    ("text_config", {"hidden_size": "wide"}), ("text_config", {"hidden_act": "relu"}), ("text_config", {"mlp_bias": True}),
    ("text_config", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    ("vision_config", {"use_qk_norm": True}), ("vision_config", {"patch_size": 0}),
], ids=str)
def test_config_of_an_unsupported_kind_is_refused(copy_of, part, change):
    settings = json.loads((copy_of / "config.json").read_text())
    edit_json(copy_of / "config.json", **{part: {**settings[part], **change}})
    with user_error():
        load(str(copy_of))


def test_original_config_with_a_part_missing_is_refused(sixteen, tmp_path):
    folder = write_original(sixteen, tmp_path / "original")
    config = json.loads((folder / "config.json").read_text())
    del config["gen_vision_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with user_error("config.json", "gen_vision_config"):
        load(str(folder))


def test_hub_out_of_reach_is_one_line_that_says_what_to_do(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(checkpoint, "snapshot_download", unreachable)
    for name, repository in (("janus-pro-1b", "deepseek-ai/Janus-Pro-1B"), ("some/model", "some/model")):
        with user_error(repository, "--model FOLDER"):
            load(name)


def test_missing_tensor_is_named(copy_of):
    edit_tensors(copy_of, lambda tensors: tensors.pop("model.vqmodel.quant_conv.bias"))
    with user_error("vqmodel.quant_conv.bias", "missing"):
        load(str(copy_of))


def test_unexpected_tensor_is_named(copy_of):
    edit_tensors(copy_of, lambda tensors: tensors.update({"model.surplus.weight": torch.zeros(1)}))
    with user_error("surplus.weight"):
        load(str(copy_of))


def test_misshapen_tensor_is_named_with_both_shapes(copy_of):
    edit_tensors(copy_of, lambda tensors: tensors.update({"model.generation_head.vision_head.bias": torch.zeros(31)}))
    with user_error("generation_head.vision_head.bias", "[31]", "[32]"):
        load(str(copy_of))


@pytest.mark.parametrize("name, word", [
    ("gen_vision_model.encoder.conv_in.weight", "vqmodel.encoder.conv_in.weight"),
    ("language_model.model.layers.1.mlp.up_proj.weight", "language_model.layers.1.mlp.up_proj.weight"),
])
def test_missing_tensor_of_the_original_layout_is_named(sixteen, tmp_path, name, word):
    folder = write_original(sixteen, tmp_path / "original")
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    with user_error(word, "missing"):
        load(str(folder))


def test_no_weights_are_said_to_be_missing(copy_of):
    os.remove(copy_of / "model.safetensors")
    with user_error(str(copy_of), "model.safetensors", "pytorch_model.bin"):
        load(str(copy_of))


def test_missing_shard_is_named(janus, copy_of):
    tensors = load_file(copy_of / "model.safetensors")
    write_weights(copy_of, tensors, "sharded safetensors")
    os.remove(copy_of / "model-00002-of-00003.safetensors")
    with user_error("model-00002-of-00003.safetensors"):
        load(str(copy_of))


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"", lambda data: b"rubbish" * 100])
def test_damaged_safetensors_is_named(copy_of, damage):
    path = copy_of / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with user_error(str(path)):
        load(str(copy_of))


class Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_is_never_executed(copy_of, tmp_path, zipped):
    os.remove(copy_of / "model.safetensors")
    content, mark = io.BytesIO(), tmp_path / "executed"
    if zipped:
        torch.save({"lm_head.weight": Malice(mark)}, content)
    else:
        pickle.dump({"lm_head.weight": Malice(mark)}, content)
    (copy_of / "pytorch_model.bin").write_bytes(content.getvalue())
    with user_error("pytorch_model.bin"):
        load(str(copy_of))
    assert not mark.exists()


@pytest.mark.parametrize("token, name", [
    (PAD, "pad_token"), (BOS, "bos_token"), (EOS, "eos_token"), *((tag, name) for name, tag in IMAGE_TAGS.items()),
])
@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_tokenizer_without_a_special_token_is_refused(layout, token, name, sixteen, saved, tmp_path):
    folder = tmp_path / "copy"
    if layout == "original":
        write_original(sixteen, folder)
    else:
        shutil.copytree(saved, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [added for added in tokenizer["added_tokens"] if added["content"] != token]
    del tokenizer["model"]["vocab"][token]
    tokenizer["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with user_error(name, token):
        load(str(folder))


def test_token_outside_the_embedding_is_named(copy_of):
    vocabulary = Tokenizer.from_file(str(copy_of / "tokenizer.json")).get_vocab()
    settings = json.loads((copy_of / "config.json").read_text())
    edit_json(copy_of / "config.json", text_config={**settings["text_config"], "vocab_size": len(vocabulary) - 1})
    with user_error(repr(max(vocabulary, key=vocabulary.get)), f"{len(vocabulary) - 1} rows"):
        load(str(copy_of))


def test_missing_or_damaged_tokenizer_is_said(copy_of):
    (copy_of / "tokenizer.json").write_text("{")
    with user_error(str(copy_of), "tokenizer"):
        load(str(copy_of))
    os.remove(copy_of / "tokenizer.json")
    with user_error(str(copy_of), "tokenizer.json"):
        load(str(copy_of))


def test_file_that_is_no_image_is_refused(janus, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    with user_error("text.png", "not an image"):
        sample.read_image(janus, str(tmp_path / "text.png"))
    with user_error("nothing.png", "no such file"):
        sample.read_image(janus, str(tmp_path / "nothing.png"))
    with user_error(str(tmp_path)):
        sample.read_image(janus, str(tmp_path))


def test_truncated_image_is_refused(janus, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with user_error("cut.png"):
        sample.read_image(janus, str(tmp_path / "cut.png"))


# ---- pictures and the command line ----------------------------------------------------------------------------------


def test_image_file_of_the_models_size_is_read_exactly(janus, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    pixels = sample.read_image(janus, str(tmp_path / "noise.png"))
    close(pixels, to_pixels(noise[None]), 1e-6)
    assert np.array_equal(sample.to_uint8(pixels)[0], noise)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (16, 3), (1, 1)])
@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "P"])
def test_image_file_of_any_size_is_made_square(janus, tmp_path, size, kind):
    Image.new(kind, size).save(tmp_path / "any.png")
    pixels = sample.read_image(janus, str(tmp_path / "any.png"))
    assert pixels.shape == (1, 3, 16, 16) and pixels.min() >= -1 and pixels.max() <= 1


def run_sample(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sample, "pick_device", lambda: torch.device("cpu"))
    sample.run(sample.main)


def shell_sample(*arguments):
    command = [sys.executable, str(Path(sample.__file__)), *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_command_draws_a_sheet(saved, tmp_path, janus):
    sheet = tmp_path / "new folder" / "sheet.png"
    done = shell_sample("a red ring", "-n", 3, "--seed", 5, "--model", saved, "--no-compile", "--out", sheet)
    assert done.returncode == 0, done.stderr
    assert "3 images" in done.stdout and str(sheet) in done.stdout and "guidance 5" in done.stdout
    picture = np.asarray(Image.open(sheet).convert("RGB"))
    codes = sample_images(janus, ["a red ring"] * 3, [5, 6, 7], 5.0, compiled=False).codes
    with torch.no_grad():
        expected = sample.to_uint8(janus.to_pixels(codes))  # [3, 16, 16, 3]
    cell = picture.shape[1] // 3
    for i, image in enumerate(expected):
        tile = picture[6 : 6 + 144, 6 + i * cell : 6 + i * cell + 144]
        assert np.array_equal(tile[4::9, 4::9], image)


def test_unknown_model_is_one_line_and_exit_code_1():
    done = shell_sample("a red ring", "--model", "no-such-model", "--no-compile")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no-such-model" in done.stderr and "Traceback" not in done.stderr


def test_command_answers_a_question(saved, tmp_path, janus, monkeypatch, capsys):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    run_sample(monkeypatch, "--image", tmp_path / "red.png", "--question", "Which color?", "--model", saved)
    pixels = sample.read_image(janus, str(tmp_path / "red.png"))
    assert capsys.readouterr().out == sample_answers(janus, pixels, ["Which color?"]).texts[0] + "\n"


@pytest.mark.parametrize("arguments", [
    [], ["a", "--image", "b.png", "--question", "c?"], ["a", "--image", "b.png"], ["--image", "b.png"],
    ["--question", "c?"], ["a", "--question", "c?"], ["a", "-n", "0"], ["a", "-n", "x"], ["a", "--guidance", "-1"],
    ["a", "--out", "b.txt"], ["a", "--guidance", "nan"], ["a", "--temperature", "0"], ["a", "--temperature", "inf"], ["a", "--seed", "-1"],
], ids=" ".join)
def test_bad_usage_exits_with_2(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_sample(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err

# =====================================================================================================================
# reward.py

SHAPES = Vocabulary(objects=("circle", "square", "triangle", "cross", "diamond", "ring", "heart", "arrow"),
                    colors=("red", "green", "blue", "yellow", "purple", "white"), counts=(2, 3, 4, 5),
                    relations=("left of", "right of", "above", "below"))


# ---- tasks and prompts ------------------------------------------------------------------------------

def single(noun):
    return make_task("single_object", [{"class": noun, "count": 1}])


def two(first, second):
    return make_task("two_object", [{"class": first, "count": 1}, {"class": second, "count": 1}])


def counting(count, noun):
    return make_task("counting", [{"class": noun, "count": count}])


def colored(color, noun):
    return make_task("colors", [{"class": noun, "count": 1, "color": color}])


def position(subject, relation, reference):
    return make_task("position", [{"class": reference, "count": 1},
                                  {"class": subject, "count": 1, "position": [relation, 0]}])


def color_attr(color_a, noun_a, color_b, noun_b):
    return make_task("color_attr", [{"class": noun_a, "count": 1, "color": color_a},
                                    {"class": noun_b, "count": 1, "color": color_b}])


@pytest.mark.parametrize("task, prompt, answer", [
    (single("bench"), "a photo of a bench", "bench"),
    (single("hourglass"), "a photo of an hourglass", "hourglass"),
    (single("unicycle"), "a photo of a unicycle", "unicycle"),
    (single("umbrella"), "a photo of an umbrella", "umbrella"),
    (single("scissors"), "a photo of a pair of scissors", "scissors"),
    (two("bench", "sports ball"), "a photo of a bench and a sports ball",
     "There is a bench and a sports ball"),
    (two("skis", "orange"), "a photo of a pair of skis and an orange",
     "There is a pair of skis and an orange"),
    (two("broccoli", "axe"), "a photo of a head of broccoli and an axe",
     "There is a head of broccoli and an axe"),
    (counting(2, "clock"), "a photo of two clocks", "two clocks"),
    (counting(3, "knife"), "a photo of three knives", "three knives"),
    (counting(4, "scissors"), "a photo of four pairs of scissors", "four pairs of scissors"),
    (counting(5, "cross"), "a photo of five crosses", "five crosses"),
    (colored("blue", "fire hydrant"), "a photo of a blue fire hydrant", "blue"),
    (colored("orange", "orange"), "a photo of an orange orange", "orange"),
    (colored("red", "scissors"), "a photo of a pair of red scissors", "red"),
    (position("dog", "right of", "teddy bear"), "a photo of a dog right of a teddy bear",
     "The dog is right of the teddy bear"),
    (position("scissors", "above", "oven"), "a photo of a pair of scissors above an oven",
     "The scissors are above the oven"),
    (color_attr("purple", "wine glass", "black", "apple"),
     "a photo of a purple wine glass and a black apple",
     "The wine glass is purple and the apple is black"),
    (color_attr("orange", "skis", "red", "tie"), "a photo of a pair of orange skis and a red tie",
     "The skis are orange and the tie is red"),
])
def test_prompt_and_answer(task, prompt, answer):
    assert (task.prompt, task.answer) == (prompt, answer)


@pytest.mark.parametrize("noun, one, many", [
    ("person", "a person", "people"), ("bus", "a bus", "buses"), ("sheep", "a sheep", "sheep"),
    ("computer mouse", "a computer mouse", "computer mice"), ("wine glass", "a wine glass", "wine glasses"),
    ("couch", "a couch", "couches"), ("toothbrush", "a toothbrush", "toothbrushes"),
    ("broccoli", "a head of broccoli", "heads of broccoli"), ("wolf", "a wolf", "wolves"),
    ("strawberry", "a strawberry", "strawberries"), ("monkey", "a monkey", "monkeys"),
    ("fox", "a fox", "foxes"), ("tomato", "a tomato", "tomatoes"), ("octopus", "an octopus", "octopuses"),
    ("skis", "a pair of skis", "pairs of skis"), ("arrow", "an arrow", "arrows"), ("axe", "an axe", "axes"),
])
def test_article_and_plural(noun, one, many):
    assert (article(noun), plural(noun)) == (one, many)


def test_vocabulary():
    assert len(GENEVAL.objects) == len(OUR_OBJECTS) == 80
    assert len(set(REAL.objects)) == 160


def test_task_key_is_the_meaning():
    assert task_key(position("dog", "left of", "cat")) == task_key(position("cat", "right of", "dog"))
    assert task_key(position("dog", "above", "cat")) == task_key(position("cat", "below", "dog"))
    assert task_key(position("dog", "above", "cat")) != task_key(position("cat", "above", "dog"))
    assert task_key(two("bench", "kite")) == task_key(two("kite", "bench"))
    assert task_key(color_attr("red", "car", "blue", "cup")) == task_key(color_attr("blue", "cup", "red", "car"))
    assert task_key(color_attr("red", "car", "blue", "cup")) != task_key(color_attr("red", "cup", "blue", "car"))


def test_draws_are_uniform_over_tags_and_never_test_prompts():
    rng = np.random.default_rng(0)
    tasks = [draw_task(REAL, rng) for _ in range(20_000)]
    counts = Counter(task.tag for task in tasks)
    assert set(counts) == set(TAGS)
    assert all(3_100 < count < 3_570 for count in counts.values())  # 3333 +- 4.5 standard deviations
    prompts = {task.prompt for task in geneval_suite()}
    keys = {task_key(task) for task in geneval_suite()}
    for task in tasks:
        assert task.prompt not in prompts and task_key(task) not in keys
        assert not is_geneval_prompt(task.prompt), task.prompt


def test_draws_leave_out_what_is_excluded_and_say_when_nothing_is_left():
    tiny, rng = Vocabulary(("circle", "square"), ("red", "blue"), (2, 3), ("left of",)), np.random.default_rng(0)
    circle, square = task_key(single("circle")), task_key(single("square"))
    drawn = {task_key(draw_task(tiny, rng, {circle}, "single_object")) for _ in range(20)}
    assert drawn == {square}
    with pytest.raises(ValueError, match="no single_object task left"):
        draw_task(tiny, rng, {circle, square}, "single_object")


# ---- GenEval's test prompts -------------------------------------------------------------------------

def sha256(lines):
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def test_suite_equals_the_official_files():
    suite = geneval_suite()
    assert len(suite) == 553
    assert (sha256(json.dumps(geneval_metadata(task)) for task in suite)
            == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13")
    assert (sha256(task.prompt for task in suite)
            == "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680")


def test_every_test_prompt_is_recognised_in_disguise():
    for task in geneval_suite():
        wordings = [task.prompt, task.prompt.upper() + ".", task.prompt.removeprefix("a photo of "),
                    "  " + task.prompt.replace(" ", "   ") + " . ", task.prompt.replace(" a ", " the "),
                    make_task(task.tag, task.facts).prompt, make_task(task.tag, task.facts[::-1]).prompt
                    if task.tag in ("two_object", "color_attr") else task.prompt]
        if task.tag == "position":
            reference, subject = (fact["class"] for fact in task.facts)
            inverse = INVERSE[task.facts[1]["position"][0]]
            wordings += [f"{reference} {inverse} {subject}", f"An image of a {reference} {inverse} a {subject}"]
        for wording in wordings:
            assert is_geneval_prompt(wording), wording


@pytest.mark.parametrize("prompt, expected", [
    # All 80 classes are single-object test prompts; of the others the suite holds samples only.
    ("A bench.", True), ("An image of a sofa", True), ("scissors", True), ("one pair of scissors", True),
    ("a photo of a hot dog", True), ("a photo of an orange", True), ("A PHOTO OF PEOPLE", True),
    ("a photo of a hourglass", False), ("a photo of a circle", False), ("", False), ("a photo of", False),
    ("a photo of a red circle and a blue square", False),
    ("a photo of a bench and a sports ball", True), ("a sports ball and a bench", True),
    ("A ball, and a bench", True), ("a photo of a bench and an accordion", False),
    ("a photo of two clocks", True), ("2 clocks", True), ("a pair of clocks", True),
    ("a photo of three clocks", False), ("three people", True), ("a photo of three persons", True),
    ("a blue fire hydrant", True), ("a photo of a fire hydrant that is blue", True),
    ("a photo of a red fire hydrant", False), ("a photo of a blue hourglass", False),
    ("a dog to the right of a teddy bear", True), ("a teddy bear to the left of the dog", True),
    ("To the left of a dog is a teddy bear", True), ("a photo of a dog left of a teddy bear", False),
    ("a photo of a dog above a teddy bear", False), ("a pizza on top of a toilet", False),
    ("a black apple and a purple wine glass", True), ("a wine glass in purple and a black apple", True),
    ("a black wine glass and a purple apple", False), ("a photo of a purple wine glass and an apple", False),
])
def test_is_geneval_prompt(prompt, expected):
    assert is_geneval_prompt(prompt) is expected


# ---- the scorer -------------------------------------------------------------------------------------

BENCH, SOFA, PERSON = single("bench"), single("couch"), single("person")
HOTDOG, DOG, BEAR, TEDDY = single("hot dog"), single("dog"), single("bear"), single("teddy bear")
FRUIT, SCISSORS, TV, HOURGLASS = single("orange"), single("scissors"), single("tv"), single("hourglass")
BENCH_BALL, KNIFE_SHEEP = two("bench", "sports ball"), two("knife", "sheep")
BAT_GLOVE, ORANGE_CAT = two("baseball bat", "baseball glove"), two("orange", "cat")
CLOCKS, PEOPLE, PAIRS = counting(2, "clock"), counting(3, "person"), counting(2, "scissors")
HYDRANT, ORANGE_ORANGE = colored("blue", "fire hydrant"), colored("orange", "orange")
PURPLE_ORANGE, ORANGE_DOG = colored("purple", "orange"), colored("orange", "dog")
DOG_TEDDY, CAT_SINK = position("dog", "right of", "teddy bear"), position("cat", "above", "sink")
GLASS_APPLE = color_attr("purple", "wine glass", "black", "apple")
CUP_ORANGE = color_attr("orange", "cup", "green", "orange")
SCISSORS_TIE = color_attr("red", "scissors", "white", "tie")
CIRCLE, CROSS_RING, SQUARES = single("circle"), two("cross", "ring"), counting(5, "square")
RED_HEART, SQUARE_CIRCLE = colored("red", "heart"), position("square", "left of", "circle")
ARROW_DIAMOND = position("arrow", "below", "diamond")
RED_BLUE = color_attr("red", "circle", "blue", "square")

# (answer, task, exact, partial); partial is written only where it is not the same as exact.
REAL_ANSWERS = [
    # single_object: taken
    ("bench", BENCH, 1), ("Bench.", BENCH, 1), ("A BENCH", BENCH, 1), ("an bench", BENCH, 1),
    ("benches", BENCH, 1), ("one bench", BENCH, 1), ("a single bench", BENCH, 1),
    ("In this image, the main item is a bench.", BENCH, 1), ("The main item in this image is a bench.", BENCH, 1),
    ("It's a wooden park bench in a garden.", BENCH, 1), ("**Bench**", BENCH, 1), ("bench\n", BENCH, 1),
    ("This appears to be a red bench.", BENCH, 1), ("There is only one bench here.", BENCH, 1),
    ("sofa", SOFA, 1), ("a leather couch", SOFA, 1), ("a man", PERSON, 1), ("two women", PERSON, 0),
    ("People", PERSON, 1), ("a little girl smiling", PERSON, 1),
    ("a hot dog", HOTDOG, 1), ("hotdog", HOTDOG, 1), ("hot-dog", HOTDOG, 1), ("teddy bear", TEDDY, 1),
    ("a stuffed bear", TEDDY, 1), ("a brown bear", BEAR, 1), ("dog", DOG, 1), ("a black and white dog", DOG, 1),
    ("orange", FRUIT, 1), ("an orange", FRUIT, 1), ("The main item is orange.", FRUIT, 1),
    ("two oranges", FRUIT, 0), ("an orange fruit", FRUIT, 1), ("an orange cat", single("cat"), 1),
    ("The cat is orange.", single("cat"), 1), ("a orange tabby cat", single("cat"), 1),
    ("scissors", SCISSORS, 1), ("a pair of scissors", SCISSORS, 1), ("a pair of red scissors", SCISSORS, 1),
    ("TV", TV, 1), ("a television set", TV, 1), ("a flat-screen TV", TV, 1), ("hour glass", HOURGLASS, 0),
    ("an hourglass", HOURGLASS, 1), ("remote", single("tv remote"), 1), ("a mobile phone", single("cell phone"), 1),
    ("smartphone", single("cell phone"), 1), ("a hairdryer", single("hair drier"), 1),
    ("doughnut", single("donut"), 1), ("motorbike", single("motorcycle"), 1), ("a bike", single("bicycle"), 1),
    ("plane", single("airplane"), 1), ("a microwave oven", single("microwave"), 1),
    ("mice", single("computer mouse"), 1), ("racket", single("tennis racket"), 1),
    ("a glass of wine", single("wine glass"), 1), ("that's right, a cat", single("cat"), 1),
    # single_object: refused
    ("", BENCH, 0), ("   ", BENCH, 0), ("...", BENCH, 0), ("image", BENCH, 0), ("chair", BENCH, 0),
    ("There is no bench.", BENCH, 0), ("not a bench", BENCH, 0), ("It isn't a bench", BENCH, 0),
    ("It isn’t a bench", BENCH, 0), ("It cannot be a bench", BENCH, 0), ("a park without a bench", BENCH, 0),
    ("a bench or a chair", BENCH, 0), ("bench/chair", BENCH, 0), ("maybe a bench", BENCH, 0),
    ("Is it a bench?", BENCH, 0), ("It could be a bench", BENCH, 0), ("a bench instead of a chair", BENCH, 0),
    ("a bench and a chair", BENCH, 0), ("a dog on a bench", BENCH, 0), ("three benches", BENCH, 0),
    ("zero benches", BENCH, 0), ("bench bench bench bench", BENCH, 0), ("a bench, a bench, a bench", BENCH, 0),
    ("a bench " + "in the park " * 3, BENCH, 0),
    ("bench " + " ".join(f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(70)), BENCH, 0),
    ("dog", HOTDOG, 0), ("hot dog", DOG, 0), ("bear", TEDDY, 0), ("teddy bear", BEAR, 0),
    ("orange cat", FRUIT, 0), ("an orange and a cat", FRUIT, 0), ("baseball bat", single("baseball glove"), 0),
    ("benchmark", BENCH, 0), ("doghouse", DOG, 0), ("wine", single("wine glass"), 0),
    (", ".join(REAL.objects), BENCH, 0), (" ".join(REAL.objects[10:40]), BENCH, 0),
    # two_object
    ("There is a bench and a sports ball", BENCH_BALL, 1), ("a sports ball and a bench", BENCH_BALL, 1),
    ("Bench, ball", BENCH_BALL, 1), ("1. A bench\n2. A soccer ball", BENCH_BALL, 1),
    ("The two items are a bench and a ball.", BENCH_BALL, 1), ("a ball on a bench", BENCH_BALL, 1),
    ("benches and balls", BENCH_BALL, 1), ("a bench with a basketball next to it", BENCH_BALL, 1),
    ("A bench & a football.", BENCH_BALL, 1), ("an orange ball on a bench", BENCH_BALL, 1),
    ("There are two items: a bench and a tennis ball", BENCH_BALL, 1),
    ("There is a bench", BENCH_BALL, 0, .5), ("ball", BENCH_BALL, 0, .5), ("a bench and a unicorn", BENCH_BALL, 0, .5),
    ("", BENCH_BALL, 0), ("There are two items.", BENCH_BALL, 0), ("a bench and a chair", BENCH_BALL, 0),
    ("a bench, a ball and a cat", BENCH_BALL, 0), ("a bench but no ball", BENCH_BALL, 0),
    ("a bench, and there isn't a ball", BENCH_BALL, 0), ("a bench or a ball", BENCH_BALL, 0),
    ("two benches and a ball", BENCH_BALL, 0), ("bench, ball, bench, ball, bench, ball", BENCH_BALL, 0),
    ("either a bench or a ball", BENCH_BALL, 0), (", ".join(REAL.objects), BENCH_BALL, 0),
    ("a knife and a sheep", KNIFE_SHEEP, 1), ("knives and sheep", KNIFE_SHEEP, 1),
    ("a lamb and knifes", KNIFE_SHEEP, 1), ("sheep", KNIFE_SHEEP, 0, .5),
    ("a baseball bat and a baseball glove", BAT_GLOVE, 1), ("a bat and a glove", BAT_GLOVE, 1),
    ("a baseball and a baseball bat", BAT_GLOVE, 0), ("a baseball glove", BAT_GLOVE, 0, .5),
    ("an orange and a cat", ORANGE_CAT, 1), ("an orange cat", ORANGE_CAT, 0, .5),
    ("a cat and oranges", ORANGE_CAT, 1), ("an orange cat and an orange", ORANGE_CAT, 1),
    ("a cat and orange", ORANGE_CAT, 1), ("The cat is orange", ORANGE_CAT, 0, .5),
    # counting
    ("two clocks", CLOCKS, 1), ("2", CLOCKS, 1), ("Two.", CLOCKS, 1), ("There are two clocks", CLOCKS, 1),
    ("There are 2 items in this image.", CLOCKS, 1), ("Two wall clocks", CLOCKS, 1), ("a pair of clocks", CLOCKS, 1),
    ("There are two items, both clocks.", CLOCKS, 1), ("The answer is 2.", CLOCKS, 1),
    ("There are two clocks, one on the left and one on the right.", CLOCKS, 1),
    ("two blue clocks", CLOCKS, 1), ("a couple of clocks", CLOCKS, 1),
    ("two clocks in the image: two.", CLOCKS, 1),
    ("three clocks", CLOCKS, 0), ("3", CLOCKS, 0), ("clocks", CLOCKS, 0), ("a clock", CLOCKS, 0),
    ("", CLOCKS, 0), ("two dogs", CLOCKS, 0), ("two clocks and a dog", CLOCKS, 0), ("two, three", CLOCKS, 0),
    ("2 or 3", CLOCKS, 0), ("2-3", CLOCKS, 0), ("one, two, three, four", CLOCKS, 0), ("one two", CLOCKS, 0),
    ("not two clocks", CLOCKS, 0), ("more than two clocks", CLOCKS, 0), ("at least two", CLOCKS, 0),
    ("twenty two", CLOCKS, 0), ("two hundred", CLOCKS, 0), ("22", CLOCKS, 0), ("2.5", CLOCKS, 0),
    ("two clocks and one clock", CLOCKS, 0), ("two clocks and a clock", CLOCKS, 0), ("several clocks", CLOCKS, 0),
    ("two clocks and another clock", CLOCKS, 0), ("maybe two", CLOCKS, 0), ("two?", CLOCKS, 0),
    ("2 2 2 2 2", CLOCKS, 0), ("a dozen clocks", CLOCKS, 0), ("2" * 5000, CLOCKS, 0), ("one clock", CLOCKS, 0), ("one", CLOCKS, 0),
    ("three people", PEOPLE, 1), ("3 men", PEOPLE, 1), ("three persons", PEOPLE, 1), ("Three women.", PEOPLE, 1),
    ("two men and a woman", PEOPLE, 0), ("three dogs", PEOPLE, 0),
    ("two pairs of scissors", PAIRS, 1), ("two scissors", PAIRS, 1), ("a pair of scissors", PAIRS, 0),
    # colors
    ("blue", HYDRANT, 1), ("Blue.", HYDRANT, 1), ("The fire hydrant is blue", HYDRANT, 1), ("It's blue.", HYDRANT, 1),
    ("The color of the object is blue.", HYDRANT, 1), ("a blue fire hydrant", HYDRANT, 1), ("light blue", HYDRANT, 1),
    ("navy blue", HYDRANT, 1), ("The hydrant is a bright blue color.", HYDRANT, 1), ("Color: blue", HYDRANT, 1),
    ("red", HYDRANT, 0), ("", HYDRANT, 0), ("fire hydrant", HYDRANT, 0), ("red or blue", HYDRANT, 0),
    ("red and blue", HYDRANT, 0), ("blue, red", HYDRANT, 0), ("not blue", HYDRANT, 0), ("blue and silver", HYDRANT, 0),
    ("a blue bench", HYDRANT, 0), ("The bench is blue", HYDRANT, 0), ("It is blue, not red", HYDRANT, 0),
    ("a red and blue hydrant", HYDRANT, 0), ("blue/green", HYDRANT, 0), ("blue-green", HYDRANT, 0),
    (" ".join(REAL.colors), HYDRANT, 0), ("blue blue blue", HYDRANT, 0), ("bluish", HYDRANT, 0),
    ("two blue hydrants", HYDRANT, 0), ("violet", colored("purple", "book"), 1), ("gray", colored("black", "book"), 0),
    ("orange", ORANGE_ORANGE, 1), ("The orange is orange.", ORANGE_ORANGE, 1), ("an orange orange", ORANGE_ORANGE, 1),
    ("an orange", ORANGE_ORANGE, 0), ("It is orange", ORANGE_ORANGE, 1), ("orange color", ORANGE_ORANGE, 1),
    ("purple", PURPLE_ORANGE, 1), ("The orange is purple.", PURPLE_ORANGE, 1), ("a purple orange", PURPLE_ORANGE, 1),
    ("orange", PURPLE_ORANGE, 0), ("purple and orange", PURPLE_ORANGE, 0), ("an orange orange", PURPLE_ORANGE, 0),
    ("The dog is orange", ORANGE_DOG, 1), ("an orange dog", ORANGE_DOG, 1), ("orange", ORANGE_DOG, 1),
    ("The dog is orange and white", ORANGE_DOG, 0), ("an orange and a dog", ORANGE_DOG, 0),
    # position
    ("The dog is right of the teddy bear", DOG_TEDDY, 1), ("The dog is to the right of the teddy bear.", DOG_TEDDY, 1),
    ("The teddy bear is to the left of the dog.", DOG_TEDDY, 1), ("a dog right of a teddy bear", DOG_TEDDY, 1),
    ("A dog is on the right side of a teddy bear.", DOG_TEDDY, 1), ("To the right of the teddy bear is a dog.", DOG_TEDDY, 1),
    ("The teddy bear is on the left and the dog is on the right.", DOG_TEDDY, 1),
    ("On the left is a teddy bear, and on the right is a dog.", DOG_TEDDY, 1),
    ("A dog on the right side of the image and a teddy bear on the left side of the image.", DOG_TEDDY, 1),
    ("There is a dog and a teddy bear. The dog is to the right of the teddy bear.", DOG_TEDDY, 1),
    ("The dog is right of the teddy bear and the teddy bear is left of the dog.", DOG_TEDDY, 1),
    ("The two objects are a dog and a teddy bear, and the dog is right of the teddy bear.", DOG_TEDDY, 1),
    ("The teddy bear sits on the left hand side of the puppy.", DOG_TEDDY, 1),
    ("That's right, the dog is right of the teddy bear.", DOG_TEDDY, 1),
    ("The teddy bear is left, the dog is right.", DOG_TEDDY, 1),
    ("The dog is positioned to the right of the teddy bear, looking to the left.", DOG_TEDDY, 1),
    ("The dog, which is brown, is to the right of the teddy bear", DOG_TEDDY, 1),
    ("The dog is left of the teddy bear", DOG_TEDDY, 0), ("The teddy bear is right of the dog", DOG_TEDDY, 0),
    ("To the right of the dog is a teddy bear.", DOG_TEDDY, 0),
    ("The dog is on the left and the teddy bear is on the right.", DOG_TEDDY, 0),
    ("the dog is left and right of the teddy bear", DOG_TEDDY, 0),
    ("the dog is right and left of the teddy bear", DOG_TEDDY, 0),
    ("the dog is to the right of the teddy bear and to the left of the teddy bear", DOG_TEDDY, 0),
    ("the dog is above and to the right of the teddy bear", DOG_TEDDY, 0),
    ("the dog is right of the teddy bear or above it", DOG_TEDDY, 0),
    ("the dog is right of, left of, above, below the teddy bear", DOG_TEDDY, 0),
    ("the dog is not right of the teddy bear", DOG_TEDDY, 0), ("the dog is right of the bear", DOG_TEDDY, 0),
    ("the dog is right of the teddy bear and the cat", DOG_TEDDY, 0), ("the hot dog is right of the teddy bear", DOG_TEDDY, 0),
    ("two dogs right of the teddy bear", DOG_TEDDY, 0), ("", DOG_TEDDY, 0), ("right of", DOG_TEDDY, 0), ("right", DOG_TEDDY, 0),
    ("the dog is right of the teddy bear. the teddy bear is right of the dog.", DOG_TEDDY, 0),
    ("a dog and a teddy bear", DOG_TEDDY, 0, 2 / 3), ("The dog is next to the teddy bear", DOG_TEDDY, 0, 2 / 3),
    ("The dog is right next to the teddy bear", DOG_TEDDY, 0, 2 / 3), ("a dog", DOG_TEDDY, 0, 1 / 3),
    ("The dog is right of it", DOG_TEDDY, 0, 1 / 3), ("that's right, a dog and a teddy bear", DOG_TEDDY, 0, 2 / 3),
    # A place may stand before or behind what it is the place of; a pronoun's place is left unread.
    ("There is a dog and to the right of it is a teddy bear.", DOG_TEDDY, 0, 2 / 3),
    ("There is a dog and on the right is a teddy bear.", DOG_TEDDY, 0),
    ("There is a teddy bear and on the right is a dog.", DOG_TEDDY, 1),
    ("A dog, on its right is a teddy bear", DOG_TEDDY, 0, 2 / 3),
    ("The teddy bear is to the dog's right", DOG_TEDDY, 0, 2 / 3),
    ("There is a teddy bear and to the right of the teddy bear is a dog.", DOG_TEDDY, 1),
    ("Left: teddy bear, right: dog", DOG_TEDDY, 1), ("dog (right), teddy bear (left)", DOG_TEDDY, 1),
    ("The left object is a teddy bear; the right object is a dog.", DOG_TEDDY, 1),
    ("In the image, a dog is sitting to the right, and a teddy bear to the left.", DOG_TEDDY, 1),
    ("The dog and the teddy bear are right of each other", DOG_TEDDY, 0, 2 / 3),
    ("The dog and the teddy bear are on the right", DOG_TEDDY, 0), ("dog teddy bear right of", DOG_TEDDY, 0, 2 / 3),
    ("Above the sink there is a cat", CAT_SINK, 1), ("The cat is above it", CAT_SINK, 0, 1 / 3),
    ("The cat is above, the sink is below.", CAT_SINK, 1), ("The top one is a cat, the bottom one is a sink", CAT_SINK, 1),
    ("The cat is above the sink", CAT_SINK, 1), ("a cat on top of a sink", CAT_SINK, 1), ("The sink is below the cat", CAT_SINK, 1),
    ("The sink is under a cat.", CAT_SINK, 1), ("The sink is beneath the cat.", CAT_SINK, 1), ("a cat over a sink", CAT_SINK, 1),
    ("The cat is at the top and the sink is at the bottom.", CAT_SINK, 1), ("Underneath the cat is a sink", CAT_SINK, 1),
    ("The cat is directly above the sink", CAT_SINK, 1), ("The cat is right above the sink", CAT_SINK, 1),
    ("The cat is under the sink", CAT_SINK, 0), ("The cat is in the sink", CAT_SINK, 0, 2 / 3),
    ("The cat is left of the sink", CAT_SINK, 0), ("The cat is above and below the sink", CAT_SINK, 0),
    # color_attr
    ("The wine glass is purple and the apple is black", GLASS_APPLE, 1), ("The apple is black and the wine glass is purple.", GLASS_APPLE, 1),
    ("a purple wine glass and a black apple", GLASS_APPLE, 1), ("purple wine glass, black apple", GLASS_APPLE, 1),
    ("A wine glass that is purple and an apple that is black", GLASS_APPLE, 1), ("Wine glass: purple, apple: black", GLASS_APPLE, 1),
    ("Wine glass (purple), apple (black)", GLASS_APPLE, 1), ("Wine glass - purple\nApple - black", GLASS_APPLE, 1),
    ("- Purple wine glass\n- Black apple", GLASS_APPLE, 1), ("The wine glass is purple, the apple black.", GLASS_APPLE, 1),
    ("The image shows a dark purple wine glass next to a shiny black apple.", GLASS_APPLE, 1),
    ("a wine glass in purple and an apple in black", GLASS_APPLE, 1), ("There is a violet wine glass with a black apple", GLASS_APPLE, 1),
    ("The color of the wine glass is purple and the color of the apple is black.", GLASS_APPLE, 1),
    ("The two objects are a purple wine glass and a black apple.", GLASS_APPLE, 1),
    ("The wine glass looks purple, and the apple looks black.", GLASS_APPLE, 1), ("a purple-colored wine glass and a black apple", GLASS_APPLE, 1),
    ("There is a wine glass and an apple. The wine glass is purple. The apple is black.", GLASS_APPLE, 1),
    ("The wine glass is black and the apple is purple", GLASS_APPLE, 0), ("a black wine glass and a purple apple", GLASS_APPLE, 0),
    ("The wine glass and the apple are purple and black", GLASS_APPLE, 0), ("both the wine glass and the apple are black", GLASS_APPLE, 0),
    ("The wine glass is purple and black and the apple is purple and black", GLASS_APPLE, 0),
    ("a purple and black wine glass and a black apple", GLASS_APPLE, 0), ("a purple wine glass and a purple apple", GLASS_APPLE, 0),
    ("a purple wine glass and a red apple", GLASS_APPLE, 0), ("a purple wine glass and a black chair", GLASS_APPLE, 0),
    ("The wine glass is purple and the apple is not black", GLASS_APPLE, 0), ("The wine glass is purple or black and the apple is black", GLASS_APPLE, 0),
    ("two purple wine glasses and a black apple", GLASS_APPLE, 0), ("a purple wine glass, a black apple and a red chair", GLASS_APPLE, 0),
    ("purple and black", GLASS_APPLE, 0), ("a purple wine glass", GLASS_APPLE, 0, .5),
    ("a wine glass and an apple", GLASS_APPLE, 0, .5), ("a purple wine glass and an apple", GLASS_APPLE, 0, .75),
    ("The wine glass and the apple, purple and black", GLASS_APPLE, 0, .5),
    ("wine glass apple red orange yellow green blue purple pink brown black white", GLASS_APPLE, 0),
    ("wine glass apple purple black", GLASS_APPLE, 0), ("an apple", GLASS_APPLE, 0, .25),
    (", ".join(REAL.objects + REAL.colors), GLASS_APPLE, 0),
    ("The wine glass is purple, while the apple is jet black.", GLASS_APPLE, 1),
    ("The wine glass's color is purple and the apple's color is black", GLASS_APPLE, 1),
    ("The wine glass's purple and the apple's black", GLASS_APPLE, 1),
    ("The wine glass is filled with purple liquid and the apple is black", GLASS_APPLE, 0, .75),
    ("The wine glass is purple and the apple is black and the apple is purple", GLASS_APPLE, 0),
    ("purple wine glass, black wine glass, purple apple, black apple", GLASS_APPLE, 0),
    ("A black apple and a wine glass are purple", GLASS_APPLE, 0),
    ("The wine glass is purple and the apple is black?", GLASS_APPLE, 0),
    ("The cup is orange and the orange is green", CUP_ORANGE, 1), ("an orange cup and a green orange", CUP_ORANGE, 1),
    ("a green orange next to an orange cup", CUP_ORANGE, 1), ("a green cup and an orange orange", CUP_ORANGE, 0),
    ("The orange is orange and the cup is green", CUP_ORANGE, 0), ("an orange mug and an orange", CUP_ORANGE, 0, .75),
    ("The scissors are red and the tie is white", SCISSORS_TIE, 1), ("The tie is white and the scissors are red.", SCISSORS_TIE, 1),
    ("a pair of red scissors and a white necktie", SCISSORS_TIE, 1), ("The scissors are white and the tie is red", SCISSORS_TIE, 0),
]
SHAPE_ANSWERS = [
    ("circle", CIRCLE, 1), ("A red circle.", CIRCLE, 1), ("a white disc on a black background", CIRCLE, 1),
    ("square", CIRCLE, 0), ("a circle and a square", CIRCLE, 0), ("circles", CIRCLE, 1), ("a red square", CIRCLE, 0),
    ("two circles", CIRCLE, 0), ("semicircle", CIRCLE, 0),
    ("There is a cross and a ring", CROSS_RING, 1), ("ring, cross", CROSS_RING, 1), ("a plus sign and a ring", CROSS_RING, 1),
    ("a cross", CROSS_RING, 0, .5), ("a cross and a circle", CROSS_RING, 0), (", ".join(SHAPES.objects), CROSS_RING, 0),
    ("five squares", SQUARES, 1), ("5", SQUARES, 1), ("5 red squares", SQUARES, 1), ("four squares", SQUARES, 0),
    ("five circles", SQUARES, 0), ("2 3 4 5", SQUARES, 0), ("squares", SQUARES, 0),
    ("red", RED_HEART, 1), ("The heart is red.", RED_HEART, 1), ("a red heart", RED_HEART, 1), ("a red circle", RED_HEART, 0),
    ("red orange", RED_HEART, 0), ("red green blue yellow purple white", RED_HEART, 0),
    ("The square is left of the circle", SQUARE_CIRCLE, 1), ("The circle is right of the square", SQUARE_CIRCLE, 1),
    ("a blue square to the left of a red circle", SQUARE_CIRCLE, 1), ("a red circle to the right of a blue square", SQUARE_CIRCLE, 1),
    ("The circle is left of the square", SQUARE_CIRCLE, 0), ("The square is above the circle", SQUARE_CIRCLE, 0),
    ("square circle left right above below", SQUARE_CIRCLE, 0), ("square left circle", SQUARE_CIRCLE, 1),
    ("The arrow is below the diamond", ARROW_DIAMOND, 1), ("an arrow pointing right under a rhombus", ARROW_DIAMOND, 1),
    ("The arrow is above the diamond", ARROW_DIAMOND, 0), ("The diamond is over the arrow", ARROW_DIAMOND, 1),
    ("The circle is red and the square is blue", RED_BLUE, 1), ("a blue square and a red circle", RED_BLUE, 1),
    ("The circle is blue and the square is red", RED_BLUE, 0), ("a red circle and a red square", RED_BLUE, 0),
    ("a red and blue circle and a red and blue square", RED_BLUE, 0), ("a red circle and a square", RED_BLUE, 0, .75),
]
ROWS = [(row, REAL) for row in REAL_ANSWERS] + [(row, SHAPES) for row in SHAPE_ANSWERS]


@pytest.mark.parametrize("row, vocabulary", ROWS, ids=lambda value: repr(value[0])[:60] if type(value) is tuple else "")
def test_score(row, vocabulary):
    answer, task, exact = row[:3]
    partial = row[3] if len(row) > 3 else exact
    assert score(answer, task, vocabulary) == exact
    assert score(answer, task, vocabulary, "partial") == pytest.approx(partial)


def everything(vocabulary, separator):
    return separator.join(vocabulary.objects + vocabulary.colors + vocabulary.relations
                          + tuple(map(str, vocabulary.counts)))


@pytest.mark.parametrize("vocabulary", [REAL, SHAPES], ids=["real", "shapes"])
def test_known_answers_and_lists_of_everything(vocabulary):
    rng = np.random.default_rng(1)
    tasks = [draw_task(vocabulary, rng) for _ in range(1_500)]
    if vocabulary is REAL:
        tasks += geneval_suite()
    for task in tasks:
        for kind in ("exact", "partial"):
            assert score(task.answer, task, vocabulary, kind) == 1, task
            assert score(task.prompt, task, vocabulary, kind) == 1, task
            assert score(everything(vocabulary, " "), task, vocabulary, kind) == 0
            assert score(everything(vocabulary, ", a "), task, vocabulary, kind) == 0


@pytest.mark.parametrize("vocabulary", [REAL, SHAPES], ids=["real", "shapes"])
@pytest.mark.parametrize("tag", TAGS)
def test_known_answer_of_another_task_is_wrong(vocabulary, tag):
    rng = np.random.default_rng(2)
    tasks = [draw_task(vocabulary, rng, tag=tag) for _ in range(40)]
    for task in tasks:
        for other in tasks:
            same_color = tag == "colors" and task.answer == other.answer  # that is all it asks for
            if task_key(task) != task_key(other) and not same_color:
                assert score(other.answer, task, vocabulary) == 0, (other.answer, task)


def test_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="kind"):
        score("bench", BENCH, REAL, "strict")

# =====================================================================================================================
# grpo.py, tiny/world.py and evaluate.py

@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


# ---------------------------------------------------------------------------------------------------------------------
# grpo.py: the objective


def test_group_advantages_by_hand():
    """Rewards 0 and 1 have mean 0.5 and deviation 0.5; an all-equal group gives no gradient."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    advantages = grpo.group_advantages(rewards, eps=0.0 + 1e-12)
    assert torch.allclose(advantages[0], torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert (advantages[1] == 0).all()
    assert torch.allclose(advantages[2], torch.tensor([-1.0, -1.0, -1.0, 3.0]) / 3**0.5)


def test_clipped_objective_by_hand():
    """With A > 0 a ratio above 1 + clip earns no more; with A < 0 a ratio below 1 - clip saves no more."""
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    up = grpo.clipped_objective(ratio.log(), torch.zeros(1, 3), torch.tensor([2.0]), 0.2)
    down = grpo.clipped_objective(ratio.log(), torch.zeros(1, 3), torch.tensor([-2.0]), 0.2)
    assert torch.allclose(up, torch.tensor([[-1.0, -2.0, -2.4]]))
    assert torch.allclose(down, torch.tensor([[1.6, 2.0, 3.0]]))


def test_learning_rate_warms_up_and_falls_to_zero():
    args = argparse.Namespace(lr=0.8, warmup=3, steps=8)
    rates = [learning_rate(step, args) for step in range(8)]
    assert np.allclose(rates, [0.2, 0.35, 0.45, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_k3_is_an_unbiased_estimate_of_the_kl():
    """Its mean under the policy, enumerated over the five tokens, is KL(policy || reference); no value is negative."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 5, generator=generator).log_softmax(-1)
    values = grpo.k3(policy, reference)
    assert (values >= 0).all()
    assert torch.allclose((policy.exp() * values).sum(), (policy.exp() * (policy - reference)).sum(), atol=1e-6)


def enumerated_policy(monkeypatch):
    """Two tokens, three codes: nine images, each with its probability, under logits that are the parameters."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    second = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    codes = torch.tensor([[a, b] for a in range(3) for b in range(3)])

    def logits(model, images, *settings):
        return torch.stack((first.expand(len(images.codes), 3), second[images.codes[:, 0]]), dim=1)

    for script in (grpo, sft):
        monkeypatch.setattr(script, "token_logprobs", lambda l, t: l.log_softmax(-1).gather(-1, t[..., None])[..., 0])
        monkeypatch.setattr(script, "image_logits", logits)
        monkeypatch.setattr(
            script, "image_logprobs", lambda model, images, *settings: sample.score_logits(logits(model, images), images.codes)
        )
    logprobs = first.log_softmax(0)[codes[:, 0]] + second.log_softmax(1)[codes[:, 0], codes[:, 1]]
    return (first, second), codes, logprobs.exp()


def flags(**changes):
    return argparse.Namespace(**{**dict(
        guidance=1.0, temperature=1.0, logprob="guided", image_weight=1.0, answer_weight=0.0, beta=0.0, clip=0.2,
        mode="two-stage", picture_clip=1e9, prompts=1, group=1, estimator=None, replay_steps=None, importance_cap=0.0,
        freeze=[],
    ), **changes})


def test_policy_gradient_equals_the_enumerated_one(monkeypatch):
    """Weighting each of the nine images' advantage by its probability, the objective's gradient is that of minus the
    expected reward (over the number of tokens), which autograd computes through the probabilities themselves."""
    weights, codes, probabilities = enumerated_policy(monkeypatch)
    rewards = torch.rand(9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = torch.autograd.grad(-(probabilities * rewards).sum() / 2, weights, retain_graph=True)
    with torch.no_grad():
        old = grpo.token_logprobs(grpo.image_logits(None, Images(codes, None, None, None)), codes)
    rollout = grpo.Rollout([], [], Images(codes, old, None, None), None, None, reference_images=old)
    loss, _ = grpo.objective(None, None, rollout, (probabilities * rewards).detach(), flags())
    for mine, true in zip(torch.autograd.grad(loss, weights), exact):
        assert torch.allclose(mine, true, atol=1e-12)


@pytest.mark.parametrize("cap", [0.9, 1.5, 1e6])
def test_importance_weights_correct_for_a_sampler_of_another_distribution(cap, monkeypatch):
    """One token of five codes, drawn from q while the policy is p: each code's advantage weighted by q, the gradient is
    minus sum of q min(p / q, cap) A grad log p, which without truncation is the exact policy gradient; and at a second
    update, the policy having moved, the ratio is against what the first one found."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    q = torch.randn(5, generator=generator, dtype=torch.float64).softmax(0)
    rewards, codes = torch.rand(5, generator=generator, dtype=torch.float64), torch.arange(5)[:, None]
    monkeypatch.setattr(grpo, "image_logprobs", lambda model, images, *settings: sample.score_logits(
        logits.expand(5, 1, 5), images.codes))
    p = logits.softmax(0)
    weights = (p / q).clamp(max=cap).detach()
    exact = torch.autograd.grad(-(q * weights * rewards * p.log()).sum(), logits, retain_graph=True)[0]
    if cap == 1e6:
        close(exact, torch.autograd.grad(-(p * rewards).sum(), logits, retain_graph=True)[0], 1e-12)
    else:
        assert 0 < (weights == cap).sum() < 5
    rollout = grpo.Rollout([], [], Images(codes, q.log()[:, None], None, None), None, None, reference_images=q.log()[:, None])
    loss, sums = grpo.objective(None, None, rollout, q * rewards, flags(importance_cap=cap))
    close(torch.autograd.grad(loss, logits)[0], exact, 1e-12)
    assert sums["importance"].item() / 5 == pytest.approx(weights.mean().item())
    with torch.no_grad():
        old = p.log()
        logits[0] += 3
        ratio = (logits.log_softmax(0) - old).exp()
        moved = -(weights * torch.minimum(ratio * q * rewards, ratio.clamp(0.8, 1.2) * q * rewards)).sum()
    assert grpo.objective(None, None, rollout, q * rewards, flags(importance_cap=cap))[0].item() == pytest.approx(moved.item())


@pytest.mark.parametrize("mode", ["guided", "detached", "conditional"])
@pytest.mark.parametrize("kind", ["janus", "show-o"])
def test_logprobs_in_pieces_are_those_of_whole_logits(kind, mode, monkeypatch):
    """Values, entropies and gradients; and nothing as large as the logits is kept for the backward pass."""
    monkeypatch.setattr(sample, "CHUNK", 4)
    model = small_janus(codes=640) if kind == "janus" else small_show_o(tokens=16, codes=640)
    images = sample_images(model, PROMPTS, [1, 2, 3], 2.0, 0.8, compiled=False)
    images = sample.choose_scored(model, images, [1, 2, 3], "replay", 2)
    sizes, weight = [], model.language_model.embed_tokens.weight
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logprobs, entropy = sample.image_logprobs(model, images, 2.0, 0.8, mode)
    assert max(sizes) < images.codes.numel() * model.num_codes
    logits = image_logits(model, images, 2.0, 0.8, mode)
    distribution = torch.distributions.Categorical(logits=logits)
    close(logprobs, distribution.log_prob(images.codes) * (images.weights > 0), 1e-5)
    close(entropy, distribution.entropy(), 1e-5)
    ours, theirs = (torch.autograd.grad(values.sum(), weight)[0] for values in (logprobs, images.score(logits)[0]))
    close(ours / theirs.abs().max(), theirs / theirs.abs().max(), 1e-4)


@pytest.mark.parametrize("kind", ["janus", "show-o"])
def test_many_images_drawn_at_once_are_those_drawn_a_few_at_a_time(kind):
    """Rollouts of six cut into micro-batches of two: the same trajectories, the same objective, nothing shared. With
    SigLIP frozen its features are kept, and the objective is that of the pixels."""
    model = small_janus() if kind == "janus" else small_show_o()
    args = flags(temperature=0.9, no_compile=True, max_tokens=4, answer_weight=0.3, estimator="replay", replay_steps=2)
    prompts = [*PROMPTS, "two rings", "a ring left of a red square", "a"]
    tasks, seeds = [reward.Task("single_object", text, [], "What is it?", "a ring") for text in prompts], list(range(6))
    frozen = argparse.Namespace(**vars(args) | {"freeze": ["vision_model"] if kind == "janus" else []})
    cut = training.in_micro_batches([grpo.roll_out(model, model, tasks, seeds, frozen)], 2)
    assert cut[0].seen.dim() == (3 if kind == "janus" else 2)
    assert [len(part.tasks) for part in cut] == [2, 2, 2]
    for first, part in zip((0, 2, 4), cut):
        alone = grpo.roll_out(model, model, tasks[first : first + 2], seeds[first : first + 2], args)
        assert torch.equal(part.images.codes, alone.images.codes) and part.answers.texts == alone.answers.texts
        losses = []
        for rollout in (part, alone):
            grpo.score_by_reference(model, rollout, args)
            losses.append(grpo.objective(model, model, rollout, torch.tensor([1.0, -0.5]), args)[0].item())
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)
        assert part.first is not alone.first and part.first == {}


@pytest.mark.parametrize("adapters", [0, 4])
@pytest.mark.parametrize("kind", ["janus", "show-o"])
def test_bfloat16_sampler_draws_from_the_policy_as_it_is_now(kind, adapters):
    """Its blocks are the policy's rounded, everything else is the policy's own, and what it says about its codes is
    what the float32 policy says, as near as bfloat16 is."""
    model = small_janus() if kind == "janus" else small_show_o()
    args = argparse.Namespace(freeze=[], recompute=False, lora=adapters, shard=False, sample_bf16=True, bf16=False, judge="policy")
    reference, sampler = training.prepare(model, args, torch.device("cpu"), None)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * weight.std()
    training.refresh(sampler, model)
    whole = merged(model.state_dict())
    for name, weight in sampler.state_dict().items():
        block = name.startswith("language_model.layers")
        assert weight.dtype == (torch.bfloat16 if block else torch.float32)
        assert torch.equal(weight, whole[name].bfloat16() if block else whole[name])
    images = sample_images(sampler, PROMPTS, [1, 2, 3], 1.0, compiled=False)
    with torch.no_grad():
        gap = (sample.image_logprobs(model, images, 1.0, 1.0)[0] - images.logprobs).abs()
    assert 1e-5 < gap.mean() < 0.1
    answers = sample_answers(sampler, sampler.see(images.codes), ["What is it?"] * 3, [1, 2, 3])
    assert answers.logprobs.isfinite().all()


def test_kl_gradient_equals_the_enumerated_one(monkeypatch):
    """On policy, the expected gradient of k3's path is not the KL's (the sampling changes too), so it is the pathwise
    part alone that must match: sum over images of p times the gradient of k3 along it."""
    weights, codes, probabilities = enumerated_policy(monkeypatch)
    reference = torch.randn(9, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        old = grpo.token_logprobs(grpo.image_logits(None, Images(codes, None, None, None)), codes)
    rollout = grpo.Rollout([], [], Images(codes, old, None, None), None, None, reference_images=reference)
    loss, sums = grpo.objective(None, None, rollout, torch.zeros(9, dtype=torch.float64), flags(beta=0.5))
    difference = reference - old
    assert torch.allclose(loss, 0.5 * (difference.exp() - difference - 1).mean(1).sum())
    step = 1e-6
    with torch.no_grad():  # finite differences in one logit
        weights[0][1] += step
        moved = grpo.objective(None, None, rollout, torch.zeros(9, dtype=torch.float64), flags(beta=0.5))[0]
        weights[0][1] -= step
    assert torch.autograd.grad(loss, weights)[0][1].item() == pytest.approx((moved - loss).item() / step, rel=1e-4)


def test_reference_does_not_move_with_the_policy(tiny):
    """After every trainable weight of the policy has moved, the reference says the same to the bit. A reference that
    borrows the policy's embeddings, as one published trainer's does, is caught."""
    policy = copy.deepcopy(tiny)
    policy.vision_model.requires_grad_(False), policy.vqmodel.requires_grad_(False)
    trainable = [w for w in policy.parameters() if w.requires_grad]
    reference = frozen_copy(policy)
    images = sample_images(policy, ["a photo of a circle"], [0], 3.0, compiled=False)

    def says():
        with torch.no_grad():
            return image_logits(reference, images, 3.0, 1.0)

    before = says()
    with torch.no_grad():
        for weight in trainable:
            weight.add_(0.1)
    assert torch.equal(says(), before)
    reference.language_model.embed_tokens = policy.language_model.embed_tokens
    assert not torch.equal(says(), before)


# ---------------------------------------------------------------------------------------------------------------------
# grpo.py: runs


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tiny checkpoint cut to one layer, so that runs take seconds. It draws badly, which these tests do not mind."""
    folder = tmp_path_factory.mktemp("small") / "janus"
    model = load("tiny")
    model.language_model.layers = model.language_model.layers[:1]
    model.config.text_config.num_hidden_layers = 1
    save(model, folder)
    return str(folder)


SHORT = ["--no-compile", "--eval-every", "0", "--eval-images", "1", "--max-tokens", "4", "--reward", "likelihood",
         "--answer-weight", "0.3"]


def run_grpo(*arguments, ranks=0, script="grpo"):
    """grpo.py (or sft.py) in a process of its own, by python or by torchrun with so many ranks."""
    start = [sys.executable]
    if ranks:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    start.append(f"{script}.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True)


def read_metrics(folder):
    return [json.loads(line) for line in open(Path(folder) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Four steps of six trajectories on one rank."""
    out = tmp_path_factory.mktemp("runs") / "one"
    result = run_grpo("--model", small, "--out", out, "--steps", 4, "--save-every", 2, "--prompts", 3, "--group", 2, *SHORT)
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_writes_what_it_promises(finished):
    out, result = finished
    summary = json.loads((out / "summary.json").read_text())
    assert {"model", "mode", "seed", "steps", "seconds", "before", "after"} <= summary.keys()
    assert {"overall", *TAGS} == summary["after"]["generation"].keys()
    assert {"ground_truth", "own_images"} <= summary["after"]["understanding"].keys()
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4]
    documented = grpo.__doc__
    for key in read_metrics(out)[0]:
        assert key in documented or key.startswith("reward_") or key == "step", f"{key} is not documented"
    for name in ("before.png", "after.png", "curves.png", "samples/step_000001.png"):
        Image.open(out / name).verify()
    assert "python sample.py" in result.stdout.splitlines()[-1]


def test_a_runs_checkpoint_opens_in_transformers(finished):
    folder = finished[0] / "step_000004"
    theirs, ours = JanusForConditionalGeneration.from_pretrained(folder).state_dict(), load(str(folder)).state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name.removeprefix("model.")])


def test_first_update_is_on_policy(finished):
    """Before the first update policy, sampler and reference are one model: ratio 1, KL 0, whatever the padding."""
    first = read_metrics(finished[0])[0]
    assert first["rollout_difference"] < 1e-4 and abs(first["ratio"] - 1) < 1e-4
    assert first["kl_image"] < 1e-7 and first["kl_answer"] < 1e-7 and first["clipped"] == 0
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("prompts, group", [(3, 2), (1, 6)])
def test_two_ranks_equal_one(small, finished, tmp_path, prompts, group):
    """Same loss, gradients (through their norm and the updated weights) and rewards, also where one group of six spans
    both ranks. The rows are padded differently, so equal to 1e-5, not to the bit."""
    one, two = tmp_path / "one", tmp_path / "two"
    shape = ["--model", small, "--steps", 1, "--prompts", prompts, "--group", group, "--lr", "1e-3", "--warmup", 0, *SHORT]
    for out, ranks in ((one, 0), (two, 2)):
        result = run_grpo("--out", out, *shape, ranks=ranks)
        assert result.returncode == 0, result.stderr
    a, b = read_metrics(one)[0], read_metrics(two)[0]
    for key in a.keys() - {"seconds", "memory"}:
        assert a[key] == pytest.approx(b[key], abs=1e-5), key
    a, b = (load(str(out / "step_000001")).state_dict() for out in (one, two))
    moved = load(small).state_dict()
    assert any(not torch.equal(a[name], moved[name]) for name in a)
    for name in a:  # Adam's first step is lr * sign(gradient), so a gradient of the wrong sign would show as 2e-3
        assert (a[name] - b[name]).abs().mean() < 1e-5, name


def test_resume_continues_the_run(finished, tmp_path):
    """Cut off after the second step's checkpoint, a run that goes on gives the four-step run's metrics and weights."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out, ignore=shutil.ignore_patterns("step_000004"))
    result = run_grpo("--resume", out)
    assert result.returncode == 0, result.stderr
    for resumed, straight in zip(read_metrics(out), read_metrics(finished[0]), strict=True):
        assert {**resumed, "seconds": 0, "memory": 0} == {**straight, "seconds": 0, "memory": 0}
    a, b = (load(str(folder / "step_000004")).state_dict() for folder in (out, finished[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert run_grpo("--resume", out, "--steps", 5).returncode == 0
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4, 5] and (out / "step_000005").exists()


def complain(result, code, *words):
    """The exit code, and one line on stderr that says these words; no traceback."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("usage:") and not line.startswith(" ")]
    assert result.returncode == code and len(lines) == 1, result.stderr
    for word in words:
        assert word in lines[0]


BOTH_WRONG = [
    (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--steps", "0"], "--steps"),
    (["--steps", "2.5"], "--steps"),
    (["--beta", "-0.1"], "--beta"),
    (["--temperature", "0"], "--temperature"),
    (["--group", "0"], "--group"),
    (["--mode", "three-stage"], "'two-stage', 'end-to-end'"),
    (["--tau", "0"], "--tau"),
    (["--picture-clip", "0"], "--picture-clip"),
    (["--image-weight", "-1"], "--image-weight"),
    (["--answer-weight", "-1"], "--answer-weight"),
    (["--answer-weight", "nan"], "--answer-weight"),
    (["--image-weight", "0", "--answer-weight", "0"], "nothing would be trained"),
    (["--freeze", "nose"], "generation_head"),
    (["--judge", "detector"], "frozen"),
    (["--prompt", "8"], "unrecognized"),
]
GRPO_WRONG = [(["--group", "1"], "at least 2"), (["--reward", "detector"], "likelihood")]
SFT_WRONG = [(["--caption-dropout", "1.5"], "--caption-dropout"), (["--replay", "0"], "--replay")]


@pytest.mark.parametrize("script, arguments, words", [
    *((grpo, *wrong) for wrong in BOTH_WRONG + GRPO_WRONG), *((sft, *wrong) for wrong in BOTH_WRONG + SFT_WRONG),
])
def test_wrong_flags_exit_with_2_and_say_why(script, arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_a_users_mistakes_get_one_line(small, finished, tmp_path):
    complain(run_grpo("--group", 1), 2, "at least 2")
    complain(run_grpo("--model", "janus-9b", "--out", tmp_path / "a"), 1, "janus-9b", "tiny", "folder")
    complain(run_grpo("--model", small, "--out", finished[0]), 1, "already holds a run", "--resume")
    complain(run_grpo("--resume", tmp_path / "nothing"), 1, "no run")
    assert not (tmp_path / "a").exists()


def main_here(monkeypatch, *arguments, script=grpo):
    """The script in this process, which gets its handlers of signals back."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_batch_that_cannot_be_split_is_refused():
    for arguments, ranks, words in (
        (["--prompts", "3", "--group", "3"], 2, "cannot be split over 2 ranks"),
        (["--prompts", "3", "--group", "4", "--micro-batch", "4"], 2, "--micro-batch 4 does not divide a rank's 6"),
    ):
        with pytest.raises(UserError, match=words):
            fill_in(grpo.parse_args([*arguments, "--guidance", "3"]), grpo.REAL, None, ranks)


def test_steps_without_spread_stop_the_run(small, tmp_path, monkeypatch):
    """Ten steps in a row whose groups all earn the same: stopped, with advice, and the metrics are there."""
    monkeypatch.setattr(grpo, "self_reward", lambda judge, rollout, world, kind: [1.0] * len(rollout.tasks))
    with pytest.raises(UserError, match="no group had answers of different reward"):
        main_here(monkeypatch, "--model", small, "--out", tmp_path, "--steps", 20, "--prompts", 1, "--group", 2, "--beta", 0, *SHORT)
    lines = read_metrics(tmp_path)
    assert len(lines) == 10 and all(line["zero_spread"] == 1 and line["grad_norm"] == 0 for line in lines)


def test_a_loss_that_is_not_finite_is_skipped_and_five_stop_the_run(small, tmp_path, monkeypatch):
    """One broken step leaves weights and Adam's moments as they were, is counted and followed by others; five in a row
    stop the run, what was sampled is written down, and the checkpoint before them is whole."""
    true, calls, broken_at = grpo.objective, [], {3}

    def broken(*arguments):
        calls.append(1)
        loss, sums = true(*arguments)
        bad = len(calls) in broken_at or len(calls) > 6
        return (loss * float("nan"), {**sums, "loss": sums["loss"] * float("nan")}) if bad else (loss, sums)

    monkeypatch.setattr(grpo, "objective", broken)
    with user_error("stopped at step 11, 5 such steps in a row: loss nan"):
        main_here(monkeypatch, "--model", small, "--out", tmp_path, "--steps", 12, "--save-every", 1, "--keep", 0, "--prompts", 1, "--group", 2, *SHORT)
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    two, three, four = (load_file(tmp_path / f"step_{step:06d}" / "model.safetensors") for step in (2, 3, 4))
    assert all(torch.equal(two[name], three[name]) for name in two) and any(not torch.equal(three[name], four[name]) for name in two)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "step_000010" / "model.safetensors").values())
    assert resume.last_whole(tmp_path) == 10
    assert load_file(tmp_path / "failed_batch_rank0.safetensors")["0.codes"].shape == (2, 36)


# ---------------------------------------------------------------------------------------------------------------------
# Through the image: the relaxed image, sft.py, and the end-to-end modes


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """Asymptotic p-value that `values` come from Gumbel(0, 1)."""
    cdf = np.exp(-np.exp(-np.sort(values)))
    ranks = np.arange(len(values) + 1) / len(values)
    distance = max((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max()) * len(values) ** 0.5
    terms = np.arange(1, 101)
    return float(2 * ((-1.0) ** (terms - 1) * np.exp(-2 * terms**2 * distance**2)).sum())


def sampled_codes(images: int = 100, tokens: int = 1000):
    """1e5 codes out of five, from logits that differ by 4 nats, and a seed for every hundredth of them."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).expand(images, tokens, 5)
    uniforms = torch.rand(images * tokens, generator=torch.Generator().manual_seed(0))
    return logits, draw(logits.flatten(0, 1), uniforms)[0].view(images, tokens), range(images)


def test_conditional_gumbel_noise_is_won_by_the_sampled_code_and_is_gumbel_noise():
    """The arg-max is the sampled code in all of 1e5 draws; over sampled codes every code's noise is Gumbel(0, 1) and
    that of two codes is uncorrelated."""
    logits, codes, seeds = sampled_codes()
    noise = gumbel_given(logits, codes, seeds)
    assert ((logits + noise).argmax(-1) == codes).all()
    for v in range(5):
        assert kolmogorov_smirnov(noise[..., v].flatten().double().numpy()) > 0.001
    correlations = np.corrcoef(noise.flatten(0, 1).T.numpy()) - np.eye(5)
    assert np.abs(correlations).max() < 4.5 / 1e5**0.5


@pytest.mark.parametrize("fault", ["winner raised above the rest", "rest not cut off", "plain noise"])
def test_biased_conditional_noise_is_seen(fault):
    """Noise that only makes the right code win, as one is tempted to write it, is not Gumbel noise."""
    logits, codes, _ = sampled_codes()
    plain = -torch.empty_like(logits).exponential_(generator=torch.Generator().manual_seed(1)).log()
    noise, chosen = plain.clone(), codes[..., None]
    if fault == "winner raised above the rest":
        noise.scatter_(-1, chosen, (logits + plain).amax(-1, keepdim=True) + 0.1 - logits.gather(-1, chosen))
    elif fault == "rest not cut off":
        noise.scatter_(-1, chosen, logits.logsumexp(-1, keepdim=True) + plain.gather(-1, chosen) - logits.gather(-1, chosen))
    wins = ((logits + noise).argmax(-1) == codes).all()
    assert not wins or min(kolmogorov_smirnov(noise[..., v].flatten().double().numpy()) for v in range(5)) < 1e-6


def some_rollout(script, model, count=3, guidance=3.0):
    """Fresh images of tiny's prompts, with greedy answers of eight tokens."""
    tasks = [draw_task(shapes.VOCABULARY, np.random.default_rng(i)) for i in range(count)]
    args = flags(guidance=guidance, no_compile=True, max_tokens=8)
    return script.roll_out(model, model, tasks, list(range(count)), args)


@torch.no_grad()
def test_relaxed_image_is_the_sampled_image_bit_for_bit(tiny):
    rollout = some_rollout(sft, tiny)
    logits = image_logits(tiny, rollout.images, 3.0, 1.0)
    for tau in (0.1, 1.0, 5.0):
        relaxed = relaxed_codes(logits, rollout.images.codes, tau, rollout.seeds)
        assert torch.equal(relaxed, F.one_hot(rollout.images.codes, tiny.num_codes).float())
        assert torch.equal(tiny.to_pixels(relaxed), rollout.seen)


MICRO = dict(image_size=8, patch_size=2, channels=(1, 2), codes=7, layers=1)


@pytest.mark.parametrize("kind", ["janus", "show-o"])
@pytest.mark.parametrize("logprob", ["guided", "detached", "conditional"])
def test_end_to_end_gradient_equals_finite_differences(logprob, kind):
    """In float64, along a random direction of each part: the straight-through gradient is the derivative of the answer's
    loss about the image `hard + soft(weights) - soft(here)`, written out here, the noise held fixed."""
    model = (small_janus(**MICRO) if kind == "janus" else small_show_o(tokens=4, steps=2)).double()
    tasks = [make_task("colors", [{"class": "ring", "count": 1, "color": "red"}])] * 2
    images, seeds, tau = random_images(model, ["a red ring", "a"]), [3, 4], 0.7
    images.steps = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0]])  # of the Show-o's four codes
    scale, unguided = model.conditional_weight(3.0), 1 - model.conditional_weight(0.0)
    rollout = sft.Rollout(tasks, seeds, images, None, None)
    logits = image_logits(model, images, 3.0, 1.0, logprob)
    loss = sft.answer_loss(model, rollout, model.see(relaxed_codes(logits, images.codes, tau, seeds))).sum()
    noise = gumbel_given(logits.detach(), images.codes, seeds)
    hard = F.one_hot(images.codes, model.num_codes)
    here = ((logits.detach() + noise) / tau).softmax(-1)
    # `detached` takes no gradient through the unconditional branch, so there this branch is held where it is.
    cond = image_logits(model, images, unguided, 1.0).detach()
    uncond = (logits.detach() - scale * cond) / (1 - scale)

    @torch.no_grad()
    def moved():
        now = image_logits(model, images, 3.0, 1.0, logprob)
        if logprob == "detached":
            now = uncond + scale * (image_logits(model, images, unguided, 1.0) - uncond)
        soft = ((now + noise) / tau).softmax(-1)
        return sft.answer_loss(model, rollout, model.see(hard + soft - here)).sum()

    generator, step = torch.Generator().manual_seed(0), 1e-6
    names = {"janus": ("generation_head", "generation_embeddings", "generation_aligner"), "show-o": ("lm_head",)}[kind]
    parts = [getattr(model, name) for name in (*names, "language_model")]
    gradients = [torch.autograd.grad(loss, list(part.parameters()), retain_graph=True) for part in parts]
    for part, grads in zip(parts, gradients):
        weights = list(part.parameters())
        direction = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
        slope = sum((g * d).sum() for g, d in zip(grads, direction)).item()
        values = []
        for sign in (step, -2 * step):
            with torch.no_grad():
                for weight, d in zip(weights, direction):
                    weight.add_(sign * d)
            values.append(moved().item())
        with torch.no_grad():
            for weight, d in zip(weights, direction):
                weight.add_(step * d)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4), part
        assert slope != 0


def test_bound_gradient_shortens_the_long_ones_and_keeps_their_direction():
    images = torch.ones(3, 2, 2, requires_grad=True)
    pulls = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.3, 0.0], [0.4, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    bounded = sample.bound_gradient(images * 1.0, 1.0)
    assert torch.equal(bounded, images)
    (grad,) = torch.autograd.grad((bounded * pulls).sum(), images)
    assert torch.allclose(grad, torch.stack([pulls[0] / 5, pulls[1], pulls[2]]))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("judge", ["policy", "frozen"])
def test_end_to_end_gradient_reaches_what_learns_and_nothing_else(tiny, judge, recompute):
    """Head, trunk and generation embedding get a gradient through the picture alone (answers weighted 0 under a frozen
    judge); SigLIP, the image tokenizer and the judge get none. Recomputing activations changes nothing."""
    policy = copy.deepcopy(tiny)
    policy.vision_model.requires_grad_(False), policy.vqmodel.requires_grad_(False)
    reference = frozen_copy(policy)
    rollout = some_rollout(sft, policy)
    args = flags(mode="end-to-end", guidance=3.0, tau=1.0, answer_weight=float(judge == "policy"))

    def gradients(recompute):
        policy.zero_grad(), policy.recompute(recompute)
        sft.objective(policy, policy if judge == "policy" else reference, reference, rollout, [], None, args)[0].backward()
        return {name: weight.grad for name, weight in policy.named_parameters()}

    for name, grad in gradients(recompute).items():
        frozen = name.startswith(("vision_model", "vqmodel"))
        understanding = name.startswith(("lm_head", "aligner"))
        if frozen or (understanding and judge == "frozen"):
            assert grad is None or (grad == 0).all(), name
        elif name != "vision_model":
            assert (grad != 0).any(), name
    assert all(weight.grad is None for weight in reference.parameters())
    if recompute:
        for (name, mine), plain in zip(gradients(True).items(), gradients(False).values()):
            assert mine is None or torch.allclose(mine, plain, atol=1e-6), name


def kept_for_backward(model, images: int, recompute: bool) -> int:
    """Bytes of activations that an end-to-end step on so many images keeps for its backward pass."""
    model.recompute(recompute)
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)  # or a freed address would be counted once for two tensors
        return tensor

    alive = []
    task = make_task("colors", [{"class": "ring", "count": 1, "color": "red"}])
    sampled = random_images(model, ["a red ring"] * images)
    rollout = sft.Rollout([task] * images, list(range(images)), sampled, None, None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = image_logits(model, sampled, 3.0, 1.0)
        relaxed = relaxed_codes(logits, sampled.codes, 1.0, rollout.seeds)
        loss = sft.answer_loss(model, rollout, model.to_pixels(relaxed)).sum()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    loss.backward()
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_an_end_to_end_step_is_linear_in_batch_and_image_tokens(recompute):
    """What is kept for two, four and six images lies on a line, and so does it for 16, 64 and 144 image tokens but for
    the attention masks, which are quadratic; recomputing keeps less than half."""
    two, four, six = (kept_for_backward(small_janus(), images, recompute) for images in (2, 4, 6))
    assert six - four == pytest.approx(four - two, rel=0.02) and two > 0
    sizes = [kept_for_backward(small_janus(image_size=side), 2, recompute) for side in (16, 32, 48)]
    assert (sizes[2] - sizes[1]) / (144 - 64) == pytest.approx((sizes[1] - sizes[0]) / (64 - 16), rel=0.15)
    if recompute:
        assert four < 0.5 * kept_for_backward(small_janus(), 4, False)


def test_expert_iterations_gradient_equals_the_enumerated_one(monkeypatch):
    """Cross-entropy of the right images, each as often as it is sampled, has the gradient of minus the expected share
    of right images (over the number of tokens), which autograd computes through the probabilities themselves."""
    weights, codes, probabilities = enumerated_policy(monkeypatch)
    right = torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0, 1], dtype=torch.float64)
    exact = torch.autograd.grad(-(probabilities * right).sum() / 2, weights, retain_graph=True)
    prompts = torch.zeros(9, 3, dtype=torch.long)
    policy = argparse.Namespace(
        generation_prompt=lambda texts: (prompts, prompts == 0), unconditional=lambda *row: row, steps=None
    )
    losses = sft.replay_loss(
        policy, [sft.Kept("", row, row) for row in codes], torch.zeros(9, dtype=torch.bool), list(range(9)), flags()
    )
    loss = (losses * (probabilities * right).detach()).sum()
    for mine, true in zip(torch.autograd.grad(loss, weights), exact):
        assert torch.allclose(mine, true, atol=1e-12)


def test_dropped_captions_teach_the_unconditional_branch(tiny):
    """A replayed picture whose caption is dropped is scored given guidance's empty prompt."""
    rollout = some_rollout(sft, tiny, 2, guidance=1.0)
    kept = [sft.Kept(task.prompt, codes, codes) for task, codes in zip(rollout.tasks, rollout.images.codes)]
    with torch.no_grad():
        losses = sft.replay_loss(tiny, kept, torch.tensor([False, True]), [0, 1], flags())
        blank = copy.copy(rollout.images)
        blank.ids, blank.mask = tiny.unconditional(blank.ids, blank.mask)
        for images, row in ((rollout.images, 0), (blank, 1)):
            expected = -token_logprobs(image_logits(tiny, images, 1.0, 1.0), images.codes).mean(1)[row]
            assert losses[row].item() == pytest.approx(expected.item(), abs=1e-5)


OTHERS = [("sft", "two-stage"), ("sft", "end-to-end"), ("grpo", "end-to-end")]
QUICK = ["--no-compile", "--eval-every", "0", "--eval-images", "1", "--micro-batch", "6", "--warmup", "0"]


@pytest.fixture(scope="module", params=OTHERS, ids="-".join)
def other(request, tmp_path_factory):
    """Two steps of the tiny model by another script or mode, one checkpoint a step."""
    script, mode = request.param
    out = tmp_path_factory.mktemp("runs") / "one"
    shape = ["--mode", mode, "--prompts", 6, "--group", 2, "--steps", 2, "--save-every", 1, *QUICK]
    result = run_grpo("--out", out, *shape, script=script)
    assert result.returncode == 0, result.stderr
    return script, mode, out, shape


def test_the_other_modes_write_what_they_promise(other):
    script, mode, out, _ = other
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mode"] == mode and {"before", "after", "seconds"} <= summary.keys()
    documented = {"sft": sft, "grpo": grpo}[script].__doc__
    lines = read_metrics(out)
    for key in lines[-1]:
        assert key in documented or key.startswith("reward_") or key == "step", f"{key} is not documented"
    assert lines[0]["rollout_difference"] < 1e-4 and lines[0]["kl_image"] < 1e-7 and lines[0]["grad_norm"] > 0
    assert mode == "end-to-end" or lines[-1]["buffer"] > 0 and lines[-1]["loss_image"] > 0
    load(str(out / "step_000002"))


def test_the_other_modes_resume_to_the_bit(other, tmp_path):
    script, mode, out, _ = other
    shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("step_000002"))
    result = run_grpo("--resume", tmp_path / "run", script=script)
    assert result.returncode == 0, result.stderr
    for resumed, straight in zip(read_metrics(tmp_path / "run"), read_metrics(out), strict=True):
        assert {**resumed, "seconds": 0, "memory": 0} == {**straight, "seconds": 0, "memory": 0}
    a, b = (load(str(folder / "step_000002")).state_dict() for folder in (tmp_path / "run", out))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_other_modes_on_two_ranks_equal_one(other, tmp_path):
    script, mode, out, shape = other
    result = run_grpo("--out", tmp_path / "two", *shape, script=script, ranks=2)
    assert result.returncode == 0, result.stderr
    for one, two in zip(read_metrics(out), read_metrics(tmp_path / "two"), strict=True):
        for key in one.keys() - {"seconds", "memory"}:
            assert one[key] == pytest.approx(two[key], abs=1e-4 if key == "grad_norm" else 1e-5), key


def test_a_run_is_resumed_by_its_own_script_and_mode(other):
    script, mode, out, _ = other
    wrong = "grpo" if script == "sft" else "sft"
    complain(run_grpo("--resume", out, "--steps", 3, script=wrong), 1, f"{script}.py", "resume it with that")
    another = ({"two-stage", "end-to-end"} - {mode}).pop()
    complain(run_grpo("--resume", out, "--steps", 3, "--mode", another, script=script), 1, f"--mode {mode}", another)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters, shards, and how a run stops and goes on


def test_untouched_adapters_change_nothing_and_merged_ones_are_what_was_trained(janus, show_o):
    """Logits to the bit before training; after every adapter has moved, an ordinary model with the merged weights gives
    them within 1e-5; the reference has the base's own tensors and does not move."""
    for model in (janus, show_o):
        policy = copy.deepcopy(model)
        policy.requires_grad_(False)
        reference = frozen_copy(policy)
        images = sample_images(policy, PROMPTS, [1, 2, 3], 3.0, compiled=False)
        base = image_logits(policy, images, 3.0, 1.0)
        model_module.add_adapters(policy, 4)
        assert torch.equal(image_logits(policy, images, 3.0, 1.0), base)
        learn = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        linear = sum(isinstance(m, torch.nn.Linear) for m in model.language_model.layers.modules())
        assert len(learn) == 2 * linear > 0 and all(".lora_" in name for name in learn)
        own = {weight.data_ptr() for weight in policy.parameters()}
        assert all(weight.data_ptr() in own for weight in reference.parameters()), "the reference is no second copy"
        image_logits(policy, images, 3.0, 1.0).square().mean().backward()
        assert all(learn[name].grad.abs().max() > 0 for name in learn if name.endswith("lora_up"))
        with torch.no_grad():
            for i, weight in enumerate(learn.values()):
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
            adapted = image_logits(policy, images, 3.0, 1.0)
            plain = copy.deepcopy(model)
            plain.load_state_dict(model_module.merged(policy.state_dict()))
            assert (adapted - base).abs().max() > 0.1
            assert (image_logits(plain, images, 3.0, 1.0) - adapted).abs().max() < 1e-5 * adapted.abs().max()
            assert torch.equal(image_logits(reference, images, 3.0, 1.0), base)


def settings_of(**changes):
    """What training.prepare and training.update look at."""
    return flags(**{**dict(freeze=["vqmodel"], recompute=False, lora=None, shard=False, bf16=False, sample_bf16=False, judge="policy", lr=1e-3, beta=0.1,
                   group=2, prompts=2, answer_weight=0.3, tau=1.0, no_compile=True, max_tokens=4, guidance=2.0), **changes})


def step_of(rank: int, ranks: int, model, changes: dict) -> dict:
    """One update of a rank's share of four trajectories; its means, gradients and weights, whole."""
    args, device = settings_of(**changes), torch.device("cpu")
    reference, sampler = training.prepare(model, args, device, None)
    optimizer = training.make_optimizer(model, args)
    tasks = [draw_task(shapes.VOCABULARY, np.random.default_rng(i)) for i in range(4)]
    share = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    judge, asked = (reference, reference) if args.judge == "frozen" else (model, sampler)
    training.refresh(sampler, model)
    compute = torch.autocast("cpu", torch.bfloat16, enabled=args.bf16)
    with compute:
        rollout = grpo.roll_out(sampler, asked, tasks[share], [5, 6, 7, 8][share], args)
        grpo.score_by_reference(reference, rollout, args)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])[share]
    parts = [lambda: grpo.objective(model, judge, rollout, advantages, args)]
    means = training.update(optimizer, parts, 4, args.lr, 1e9, compute)
    grads = {name: resume.whole(w.grad) for name, w in model.named_parameters() if w.grad is not None}
    training.refresh(sampler, model)
    with compute:
        drawn = sample_images(sampler, PROMPTS, [1, 2, 3], 2.0, compiled=False)
    return {"means": means, "grads": grads, "weights": resume.gather_to_first(model.state_dict().items()), "codes": drawn.codes}


def a_shard(rank: int, ranks: int, port: int, kind: str, changes: dict, path: str) -> None:
    join(rank, ranks, port)
    result = step_of(rank, ranks, small_janus() if kind == "janus" else small_show_o(), {**changes, "shard": True})
    if rank == 0:
        torch.save(result, path)
    torch.distributed.destroy_process_group()


SHARDED = [("janus", {}), ("janus", dict(mode="end-to-end", judge="frozen", recompute=True)), ("janus", dict(lora=4)),
           ("show-o", dict(recompute=True)), ("show-o", dict(mode="end-to-end", judge="frozen"))]


@pytest.mark.parametrize("kind, changes", SHARDED, ids=str)
def test_a_sharded_step_is_that_of_one_process(kind, changes, tmp_path):
    """Two gloo ranks with FSDP2: loss, KL, gradient norm, every gradient and the codes that the updated policy draws are
    those of one process, within 1e-5."""
    one, port = step_of(0, 1, small_janus() if kind == "janus" else small_show_o(), changes), free_port()
    workers = [CHILDREN.Process(target=a_shard, args=(rank, 2, port, kind, changes, str(tmp_path / "two"))) for rank in range(2)]
    ended(workers, [0, 0])
    two = torch.load(tmp_path / "two", weights_only=True)
    for key, value in one["means"].items():
        assert two["means"][key] == pytest.approx(value, abs=1e-5, rel=1e-5), key
    assert one["grads"].keys() == two["grads"].keys() and any(grad.abs().max() > 1e-3 for grad in one["grads"].values())
    for name, grad in one["grads"].items():
        assert (two["grads"][name] - grad).abs().max() < 1e-5 * max(1, grad.abs().max().item()), name
    assert torch.equal(one["codes"], two["codes"])


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize("kind", ["janus", "show-o"])
def test_bfloat16_scores_what_it_sampled_and_learns_in_float32(kind, lora):
    """Under autocast, and with blocks in bfloat16 below the adapters: on policy but for rounding, near float32's loss."""
    model = small_janus() if kind == "janus" else small_show_o()
    wide = step_of(0, 1, copy.deepcopy(model), dict(lora=lora))
    half = step_of(0, 1, model, dict(lora=lora, bf16=True, sample_bf16=True))
    assert half["means"]["rollout_difference"] < 0.1 and half["means"]["kl_image"] == 0 and half["means"]["skipped"] == 0
    assert half["means"]["grad_norm"] == pytest.approx(wide["means"]["grad_norm"], rel=0.5)
    assert all(weight.dtype == torch.float32 for name, weight in model.named_parameters() if weight.requires_grad)
    frozen = {weight.dtype for name, weight in model.language_model.layers.named_parameters() if ".lora_" not in name}
    assert frozen == {torch.bfloat16 if lora else torch.float32}


@pytest.mark.parametrize("lora", [[], ["--lora", "4"]], ids=["all weights", "lora"])
def test_a_sharded_run_is_saved_as_an_ordinary_one(small, tmp_path, lora):
    """Four steps on two ranks with --shard: the metrics of one process, a checkpoint that opens in transformers with
    the very tensors, and the last two steps again to the bit, on two ranks; and on one, but for rounding."""
    one, two = tmp_path / "one", tmp_path / "two"
    shape = ["--model", small, "--steps", 4, "--save-every", 2, "--prompts", 3, "--group", 2, *lora, *SHORT]
    lives(one, *shape, ranks=1), lives(two, *shape, "--shard", ranks=2)
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        for key in a.keys() - {"seconds", "memory"}:
            assert b[key] == pytest.approx(a[key], abs=1e-4), key
    folder = two / "step_000004"
    theirs, ours = JanusForConditionalGeneration.from_pretrained(folder).state_dict(), load(str(folder)).state_dict()
    assert all(torch.equal(tensor, ours[name.removeprefix("model.")]) for name, tensor in theirs.items())
    for name, ranks in (("again", 2), ("fewer", 1)):
        again = shutil.copytree(two, tmp_path / name, ignore=shutil.ignore_patterns("step_000004", "summary.json"))
        if ranks == 1:
            edit_json(again / "args.json", shard=False)
        lives(again, ranks=ranks)
        assert ranks == 1 or contents(again / "step_000004") == contents(folder)
        for step, line in zip(read_metrics(again), read_metrics(two), strict=True):
            assert step["loss"] == pytest.approx(line["loss"], abs=1e-4)


# -- processes that are forked from one that has imported everything, so that a run takes a second or two


CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["test_unirl"])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def join(rank: int, ranks: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    sample.start_ranks()


def ended(workers, codes, seconds=120):
    """Starts them unless they are, waits, and checks their exit codes."""
    for worker in workers:
        worker.pid or worker.start()
    limit = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0, limit - time.monotonic()))
    found = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert found == codes


def a_life(script: str, arguments: list[str], rank: int, ranks: int, port: int, log: str) -> None:
    """A rank of a run, from start to end, scored on a prompt of each category."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.pop("RANK", None)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    every = shapes.held_out_tasks
    evaluate_module.shapes.held_out_tasks = lambda: every()[::20]
    sys.argv = [f"{script}.py", *arguments]
    sample.run({"grpo": grpo, "sft": sft}[script].main)


def begin(out: Path, *arguments, ranks=1, script="grpo") -> list:
    """Starts the ranks of a run into this folder, or of the run that is in it."""
    arguments = ["--resume", out] if (out / "args.json").exists() else ["--out", out, *arguments]
    port, log = free_port(), out.with_suffix(".log")
    workers = [CHILDREN.Process(target=a_life, args=(script, [*map(str, arguments)], rank, ranks, port, str(log)))
               for rank in range(ranks)]
    for worker in workers:
        worker.start()
    return workers


def lives(out: Path, *arguments, ranks=1, script="grpo") -> str:
    """A run to its end, which must be a good one; what it said."""
    workers = begin(out, *arguments, ranks=ranks, script=script)
    for worker in workers:
        worker.join(180)
    said = out.with_suffix(".log").read_text()
    assert [worker.exitcode for worker in workers] == [0] * ranks, said
    return said


def contents(folder: Path) -> dict[str, str]:
    """What a checkpoint is, as checksums."""
    return {str(path.relative_to(folder)): checkpoint.sha256(path) for path in folder.rglob("*") if path.is_file()}


def wait_for(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


KILLS = int(os.environ.get("KILLS", 3))  # of each of the two below
LIFE = ["--steps", 8, "--save-every", 1, "--keep", 2, "--prompts", 3, "--group", 2, "--timeout", 40, *SHORT]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(small, tmp_path, ranks):
    """Processes killed with SIGKILL, every other time while a checkpoint is being written: each resume goes on, and the
    last checkpoint, with the optimizer's state, is that of a run that nobody killed, to the bit. On two ranks one of
    them or both are killed; one that is left ends by itself. `KILLS=15 pytest -k killed` kills 30 times."""
    ended([CHILDREN.Process(target=int)], [0])  # imports everything, once
    start = time.monotonic()
    lives(tmp_path / "straight", "--model", small, *LIFE, ranks=ranks)
    seconds, expected = time.monotonic() - start, contents(tmp_path / "straight" / "step_000008")
    rng, kills, while_saving, folder = np.random.default_rng(ranks), 0, 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed{folder}"
        workers = begin(out, "--model", small, *LIFE, ranks=ranks)
        wait = rng.random() * seconds
        if kills % 2:
            wait_for(lambda: list(out.glob("step_*.partial")) or not workers[0].is_alive())
            wait = rng.random() * 0.03
        time.sleep(wait)
        victims = [workers, workers[:1], workers[1:]][rng.integers(3)] if ranks == 2 else workers
        saving = bool(list(out.glob("step_*.partial")))
        alive = any(worker.is_alive() for worker in victims)
        for worker in victims:
            worker.kill()
        for worker in workers:
            worker.join(90)
            assert worker.exitcode is not None, "a rank hangs after the other one has died"
        if alive:
            kills, while_saving = kills + 1, while_saving + saving
        if (out / "summary.json").exists() or kills >= KILLS:
            if not (out / "summary.json").exists():
                lives(out, "--model", small, *LIFE, ranks=ranks)
            assert contents(out / "step_000008") == expected
            assert [line["step"] for line in read_metrics(out)] == list(range(1, 9))
            assert not list(out.glob("*.partial*")) and len(list(out.glob("step_*"))) == 2
            folder += 1
    print(f"{kills} kills on {ranks} ranks, {while_saving} of them while saving, {folder} runs to their end")


def save_show_o(folder: Path) -> Path:
    """A small random Show-o that lives in the shapes world."""
    magvit = {**SMALL_MAGVIT, **{key: [1, 1, 1] for key in SMALL_MAGVIT if key.endswith(("multipliers", "blocks"))}}
    save(small_show_o(tokens=36, steps=3, guidance=1.0, world="shapes", vqmodel=MAGVITv2(magvit)), folder)
    return folder


@pytest.mark.parametrize("script, kind, more", [
    ("sft", "janus", []), ("grpo", "janus", ["--mode", "end-to-end"]),
    ("grpo", "show-o", ["--reward", "likelihood", "--lora", "2"]), ("sft", "show-o", ["--answer-weight", "0.3", "--shard"]),
])
def test_two_ranks_resume_to_the_bit(tmp_path, script, kind, more):
    """Two ranks, gone after a step; sft's replayed pictures, the answers' generators, adapters and shards are back."""
    model = "tiny" if kind == "janus" else save_show_o(tmp_path / "model")
    shape = ["--model", model, *more, "--steps", 4, "--save-every", 2, "--prompts", 4, "--group", 2, *QUICK]
    out = tmp_path / "run"
    lives(out, *shape, ranks=2, script=script)
    again = shutil.copytree(out, tmp_path / "again", ignore=shutil.ignore_patterns("step_000004", "summary.json"))
    lives(again, ranks=2, script=script)
    assert contents(again / "step_000004") == contents(out / "step_000004")


# -- damaged checkpoints, full disks


DAMAGE = {
    "torn weights": lambda f: os.truncate(f / "model.safetensors", 1000),
    "a flipped bit": lambda f: flip(f / "trainer" / "optimizer.safetensors", 5000),
    "no optimizer": lambda f: (f / "trainer" / "optimizer.safetensors").unlink(),
    "another step's state": lambda f: edit_json(f / "trainer" / "state.json", step=3),
    "torn manifest": lambda f: os.truncate(f / "manifest.json", 10),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "empty manifest": lambda f: (f / "manifest.json").write_text('{"sha256": {}}'),
    "another config": lambda f: edit_json(f / "config.json", model_type="llama"),
    "a renamed checkpoint": lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("step_000002"), f)),
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
}


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(finished, damage, tmp_path, capfd):
    out = shutil.copytree(finished[0], tmp_path / "run")
    DAMAGE[damage](out / "step_000004")
    assert resume.last_whole(out) == 2
    assert "step_000004 is damaged, looking for the one before" in capfd.readouterr().err
    assert (out / "step_000004.damaged").exists() and resume.checkpoints(out) == [2]
    shutil.rmtree(out / "step_000002" / "trainer")
    with user_error("none of its checkpoints is whole", "step_000002"):
        resume.last_whole(out)


def test_a_run_with_a_damaged_checkpoint_ends_as_it_did(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "summary.json").unlink()
    flip(out / "step_000004" / "model.safetensors", 999_999)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "rew')  # as a killed process leaves it
    assert "step_000004 is damaged" in run_grpo("--resume", out).stderr
    assert contents(out / "step_000004") == contents(finished[0] / "step_000004")
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3, 4]


def limited(*arguments) -> None:
    """A run whose files may have at most 5 MB, less than a checkpoint's: a write fails midway, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
    a_life(*arguments)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(small, tmp_path):
    """While a checkpoint is written: one line, exit code 1, nothing half written, the one before still good."""
    out = tmp_path / "run"
    lives(out, "--model", small, *LIFE, "--steps", 2)
    (out / "summary.json").unlink()
    edit_json(out / "args.json", steps=4)
    log = str(tmp_path / "full.log")
    worker = CHILDREN.Process(target=limited, args=("grpo", ["--resume", str(out)], 0, 1, 0, log))
    ended([worker], [1])
    said = [line for line in Path(log).read_text().splitlines() if "error" in line.lower()]
    assert len(said) == 1 and "step_000003: cannot be written" in said[0] and "the last checkpoint is step_000002" in said[0]
    assert not list(out.glob("*.partial")) and resume.last_whole(out) == 2
    lives(out)


def test_a_folder_without_room_or_rights_stops_before_training(small, tmp_path, monkeypatch):
    shape = ["--model", small, *LIFE]
    (tmp_path / "file").touch()
    with user_error("file/run: cannot be written"):
        main_here(monkeypatch, "--out", tmp_path / "file" / "run", *shape)
    with user_error("/proc/run: cannot be written"):
        main_here(monkeypatch, "--out", "/proc/run", *shape)
    full = argparse.Namespace(free=20_000_000)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: full)
    with user_error("3 checkpoints of 0.01", "0.02 GB left", "--keep"):
        main_here(monkeypatch, "--out", tmp_path / "run", *shape)
    assert not (tmp_path / "run" / "args.json").exists()


# -- signals, and ranks that die


def steps_done(out: Path) -> int:
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(small, tmp_path, number, ranks):
    """One rank gets it, both stop after the same step with exit code 0; what goes on is the run that was not stopped."""
    out = tmp_path / "run"
    shape = ["--model", small, *LIFE, "--save-every", 100]
    lives(tmp_path / "straight", *shape, ranks=ranks)
    workers = begin(out, *shape, ranks=ranks)
    wait_for(lambda: steps_done(out) >= 2)
    os.kill(workers[-1].pid, number)
    os.kill(workers[-1].pid, number)  # at once: the same signal, passed on by somebody else
    ended(workers, [0] * ranks)
    done, said = steps_done(out), out.with_suffix(".log").read_text()
    assert said.count(f"stopped after step {done}, which is saved; go on with: torchrun grpo.py --resume {out}") == 1
    assert 2 <= done < 8 and resume.last_whole(out) == done
    lives(out, ranks=ranks)
    assert contents(out / "step_000008") == contents(tmp_path / "straight" / "step_000008")


def test_a_second_signal_ends_a_run_at_once(small, tmp_path, monkeypatch):
    """In a step that does not end: the first waits for it, the second, some time later, does not."""
    out = tmp_path / "run"
    (worker,) = begin(out, "--model", small, *LIFE, "--prompts", 720)  # a step of a good while
    wait_for(lambda: (out / "before.json").exists())
    time.sleep(1)
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(1.5)
    assert worker.is_alive()
    os.kill(worker.pid, signal.SIGTERM)
    ended([worker], [128 + signal.SIGTERM], seconds=5)


def test_a_signal_before_the_first_step_leaves_at_once(small, tmp_path):
    out = tmp_path / "run"
    (worker,) = begin(out, "--model", small, *LIFE, "--eval-images", 500)
    wait_for(lambda: (out / "args.json").exists())
    time.sleep(1)
    os.kill(worker.pid, signal.SIGTERM)
    ended([worker], [0], seconds=5)
    assert "nothing was lost; go on with: torchrun grpo.py --resume" in out.with_suffix(".log").read_text()


@pytest.mark.parametrize("fate, rank", [("dies", 0), ("dies", 1), ("falls silent", 1)])
def test_a_lost_rank_ends_the_others_with_one_message(small, tmp_path, fate, rank):
    """A killed rank is noticed at once, one that says nothing after --timeout."""
    out = tmp_path / "run"
    workers = begin(out, "--model", small, *LIFE, "--steps", 1000, "--save-every", 1000, "--timeout", 5, ranks=2)
    wait_for(lambda: steps_done(out) >= 2)
    os.kill(workers[rank].pid, signal.SIGKILL if fate == "dies" else signal.SIGSTOP)
    workers[1 - rank].join(30)
    assert workers[1 - rank].exitcode == 1
    workers[rank].kill()
    errors = [line for line in out.with_suffix(".log").read_text().splitlines() if line.startswith("error")]
    assert len(errors) == 1 and f"rank {1 - rank} lost another rank" in errors[0] and "--resume" in errors[0]
    assert "Traceback" not in out.with_suffix(".log").read_text()


def test_torchrun_passes_a_signal_on(small, tmp_path):
    """torchrun itself reports the signal with an exit code of its own; its ranks have saved and said how to go on."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "grpo.py", "--model", small,
               "--out", out, *LIFE, "--steps", 1000, "--save-every", 1000]
    process = subprocess.Popen(map(str, command), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    wait_for(lambda: steps_done(out) >= 2, 120)
    process.terminate()
    said = process.communicate(timeout=60)[0]
    assert resume.last_whole(out) == steps_done(out) >= 2 and "which is saved; go on with: torchrun grpo.py" in said


# -- steps that are not well


def test_kl_and_entropy_out_of_bounds_stop_a_run():
    """Three steps in a row, with the numbers; two, and then a good one, do not."""
    args = argparse.Namespace(out="run", max_kl=2.0, entropy=[0.1, 0.9])
    good = {"step": 1, "kl_image": 0.5, "entropy_image": 1.0, "skipped": 0, "loss": 0.0, "grad_norm": 1.0}
    for wrong, words in (({"kl_image": 2.5}, ["KL", "2.5", "--max-kl 2"]), ({"entropy_image": 0.01}, ["entropy 0.01", "0.208"]),
                         ({"entropy_image": 2.0}, ["entropy 2", "0.208 to 1.87"])):
        health = training.Health(args, 8)
        for line in (wrong, wrong, {}, wrong, wrong):
            health.check({**good, **line}, False, "", [], 0)
        again = training.Health(args, 8, json.loads(json.dumps(health.counts)))  # as a resumed run has it
        with user_error(*words, "step 1", "3 such steps in a row"):
            again.check({**good, **wrong}, False, "", [], 0)
    unbounded = training.Health(argparse.Namespace(out="run", max_kl=0.0, entropy=[0.0, 1.0]), 8)
    for _ in range(5):
        unbounded.check({**good, "kl_image": 1e9, "entropy_image": 0.0}, False, "", [], 0)


# -- the user's own prompts


OWN = [
    {"tag": "single_object", "prompt": "A gold submarine at night", "facts": [{"class": "submarine", "count": 1}]},
    {"tag": "colors", "prompt": "a teal ring", "facts": [{"class": "ring", "count": 1, "color": "teal"}], "question": "Which color is it?"},
    {"tag": "position", "prompt": "a submarine over a ring", "answer": "The submarine is over the ring.",
     "facts": [{"class": "ring", "count": 1}, {"class": "submarine", "count": 1, "position": ["above", 0]}]},
    {"tag": "counting", "prompt": "seven submarines", "facts": [{"class": "submarine", "count": 7}]},
]


def lines_of(rows) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def test_own_prompts_are_read_with_what_was_left_out():
    tasks, vocabulary = read_tasks(lines_of([*OWN[:2], b"", *OWN[2:]]), shapes.VOCABULARY)
    assert [task.prompt for task in tasks] == [row["prompt"] for row in OWN]
    assert [task.question for task in tasks[:2]] == [reward.QUESTIONS["single_object"], "Which color is it?"]
    assert [task.answer for task in tasks] == ["submarine", "teal", "The submarine is over the ring.", "seven submarines"]
    assert set(vocabulary.objects) - set(shapes.VOCABULARY.objects) == {"submarine"} and "teal" in vocabulary.colors
    assert score("a submarine", tasks[0], vocabulary) == 1 and score("a ring", tasks[0], vocabulary) == 0


def test_the_documented_own_prompts_are_good():
    readme, docs = (ROOT / "README.md").read_text(), read_tasks.__doc__
    shown = [text[text.index('{"tag"') :].split(end)[0] for text, end in ((readme, "```"), (docs, "\n\n"))]
    for text, count in zip(shown, (2, 1)):
        rows = " ".join(text.split()).replace('} {"tag"', '}\n{"tag"')
        assert len(read_tasks(rows.encode(), REAL)[0]) == count


FAULTY = [
    (b"{not json", "Expecting"), (b"[1]", "no JSON object"), (b"\xff\xfe", "utf-8"), (b'"' + b"[" * 5000, ""),
    ({**OWN[0], "tag": "colour"}, "unknown tag 'colour'"), ({**OWN[0], "tag": []}, "unknown tag"), ({}, "unknown tag None"),
    ({**OWN[0], "prompt": ""}, "prompt is no text"), ({**OWN[0], "prompt": 3}, "prompt is no text"),
    ({k: v for k, v in OWN[0].items() if k != "prompt"}, "has no prompt"), ({**OWN[0], "answer": None}, "answer is no text"),
    ({**OWN[0], "wieght": 2}, "unknown key 'wieght'"), ({**OWN[0], "facts": []}, "cannot have these objects under facts"),
    ({**OWN[0], "facts": [{"class": "Big Ship", "count": 1}]}, "'Big Ship' is not a name"),
    ({**OWN[1], "facts": [{"class": "ring", "count": 1}]}, "should have the keys class, color, count"),
    ({**OWN[1], "facts": [{"class": "ring", "count": 1, "color": 3}]}, "3 is not a name"),
    ({**OWN[3], "facts": [{"class": "ring", "count": 70}]}, "no number word"), ({**OWN[3], "facts": 7}, "cannot have"),
    ({**OWN[2], "facts": [{"class": "ring", "count": 1}, {"class": "star", "count": 1, "position": [["above"], 0]}]}, "position"),
    ({**OWN[0], "answer": "a ring"}, "would earn nothing"), ({**OWN[0], "answer": "maybe a submarine"}, "would earn nothing"),
    ({"tag": "single_object", "prompt": "my bench", "facts": [{"class": "bench", "count": 1}]}, "test prompt"),
    ({"tag": "two_object", "prompt": "A black apple and a purple wine glass",  # whatever its facts leave out
      "facts": [{"class": "apple", "count": 1}, {"class": "wine glass", "count": 1}]}, "test prompt"),
]


@pytest.mark.parametrize("row, words", FAULTY, ids=lambda value: str(value)[:40])
def test_every_fault_of_own_prompts_is_named_with_its_line(row, words):
    with pytest.raises(ValueError) as caught:
        read_tasks(lines_of([OWN[0], row, OWN[1], b"", row]), shapes.VOCABULARY)
    first, *lines = str(caught.value).splitlines()
    assert first == "2 faults" and [line[:9] for line in lines] == ["  line 2:", "  line 5:"] and words in lines[0]


def test_a_run_on_own_prompts_draws_from_them_alone(small, tmp_path, monkeypatch):
    """Checked whole before anything starts; drawn from in training; the same file on resume, or one line."""
    path, drawn = tmp_path / "own.jsonl", []
    held_out = shapes.held_out_tasks()[0]
    path.write_bytes(lines_of([*OWN, {"tag": held_out.tag, "prompt": "x", "facts": list(held_out.facts)}]))
    shape = ["--model", small, *LIFE, "--steps", 2, "--tasks", path, "--out", tmp_path / "run"]
    with user_error("--tasks", "own.jsonl", "line 5: asks for what a test prompt asks for"):
        main_here(monkeypatch, *shape)
    assert not (tmp_path / "run").exists()
    path.write_bytes(lines_of(OWN))
    true = grpo.roll_out
    monkeypatch.setattr(grpo, "roll_out", lambda *a: drawn.extend(a[2]) or true(*a))
    main_here(monkeypatch, *shape)
    assert {task.prompt for task in drawn} <= {row["prompt"] for row in OWN} and len({task.prompt for task in drawn}) > 1
    path.write_bytes(lines_of(OWN[:2]))
    with user_error("own.jsonl", "not the file that the run began with"):
        main_here(monkeypatch, "--resume", tmp_path / "run", "--steps", 3)
    with user_error("missing.jsonl", "cannot be read"):
        main_here(monkeypatch, *shape, "--tasks", tmp_path / "missing.jsonl", "--out", tmp_path / "b")


def test_own_prompts_too_long_for_a_show_o_are_named(show_o, tmp_path):
    (tmp_path / "own.jsonl").write_bytes(lines_of([OWN[0], {**OWN[0], "prompt": "submarine " * 60}]))
    args = argparse.Namespace(tasks=str(tmp_path / "own.jsonl"), resume=None)
    with user_error("line 2: the prompt 'submarine", "text window 100"):
        training.task_stream(args, show_o, world_of(show_o))


# -- what --resume refuses


def test_resume_takes_the_runs_own_flags(finished, tmp_path, monkeypatch):
    out = shutil.copytree(finished[0], tmp_path / "run")
    args = grpo.parse_args(["--resume", str(out), "--steps", "9", "--keep", "1"])
    saved = json.loads((finished[0] / "args.json").read_text())
    assert {**saved, "steps": 9, "keep": 1, "out": str(out), "resume": str(out)} == {k: v for k, v in vars(args).items() if k in saved}
    edit_json(out / "args.json", **{**saved, "max_kl": 1.0, "entropy": [0.1, 0.5], "stop_on_gap": True})
    args = grpo.parse_args(["--resume", str(out), "--max-kl", "10", "--entropy", "0.002", "0.99", "--no-stop-on-gap"])
    assert (args.max_kl, args.entropy, args.stop_on_gap) == (10, [0.002, 0.99], False), "the script's defaults count, if given"
    edit_json(out / "args.json", **saved)
    for wrong, words in ((["--lr", "1"], "leave out --lr"), (["--shard", "--seed", "3"], "leave out --seed, --shard"),
                         (["--model", "tiny"], "leave out --model"), (["--mode", "end-to-end"], "cannot go on as end-to-end")):
        with user_error(words):
            grpo.parse_args(["--resume", str(out), *wrong])
    for change, words in (({"lr": -1}, "-1"), ({"mode": "x"}, "mode"), ({"recompute": "yes"}, "recompute"), ({"freeze": 3}, "freeze"),
                          ({"steps": None, "beta": "a"}, "--beta"), ({"entropy": [1]}, "--entropy")):
        edit_json(out / "args.json", **{**saved, **change})
        with user_error("args.json", words):
            grpo.parse_args(["--resume", str(out)])
    edit_json(out / "args.json", **{**saved, "model": str(tmp_path / "gone")})
    with user_error("only with its starting model", "gone"):
        main_here(monkeypatch, "--resume", out, "--steps", 9)
    (out / "args.json").write_text("{")
    with user_error("args.json", "JSON"):
        grpo.parse_args(["--resume", str(out)])


# -- whatever is wrong: one clear line, or a good run


FUZZ = int(os.environ.get("FUZZ", 24))  # cases; `FUZZ=300 pytest -k fuzz` tries more
JUNK = [None, True, -1, 0, 1, 3, 7, 1000, 0.5, 1e30, float("nan"), "x", "", "0", [], {}, [1], [None, "a"], {"a": 1}]


def values_of(content, path=()):
    """The place of every value in nested JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*path, key)
        yield from values_of(value, (*path, key))


def mutate_json(path: Path, rng) -> str:
    """Another value, or none, in one place."""
    content = json.loads(path.read_text())
    places = list(values_of(content))
    *inner, last = places[rng.integers(len(places))]
    parent = content
    for key in inner:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[last]
        change = "left out"
    else:
        parent[last] = change = JUNK[rng.integers(len(JUNK))]
    path.write_text(json.dumps(content))
    return f"{path.name}: {[*inner, last]} {change!r}"


def mutate_bytes(path: Path, rng) -> str:
    """Torn, emptied, removed, replaced by rubbish, a bit flipped, or a piece missing."""
    data, kind = path.read_bytes(), ["torn", "empty", "gone", "rubbish", "flipped", "shorter"][rng.integers(6)]
    at = int(rng.integers(len(data)))
    if kind == "gone":
        path.unlink()
    elif kind == "flipped":
        flip(path, at)
    else:
        path.write_bytes({"torn": data[:at], "empty": b"", "rubbish": rng.bytes(200), "shorter": data[:at] + data[at + 7:]}[kind])
    return f"{path.name} {kind} at {at}"


FLAGS = {  # a good value and others; what is not here is tried by name alone
    "--mode": ["two-stage", "end-to-end", "x"], "--seed": ["3", "-1", "99999999999999999999"], "--steps": ["2", "0", "1.5"],
    "--save-every": ["1", "0"], "--keep": ["0", "1", "-2"], "--eval-every": ["1", "-1"], "--eval-images": ["1", "0"], "--bf16": [None],
    "--shard": [None], "--timeout": ["5", "0", "nan"], "--prompts": ["2", "7", "x"], "--tasks": ["own.jsonl", "nowhere", "."],
    "--group": ["2", "3", "1"], "--micro-batch": ["1", "4", "5", "1000000"], "--guidance": ["1", "0", "-1", "1e30"],
    "--temperature": ["0.5", "1e-30", "1e30", "0"], "--draw-steps": ["2", "36", "99"], "--max-tokens": ["1", "40"],
    "--reward": ["exact", "partial", "likelihood", ""], "--logprob": ["guided", "detached", "conditional"], "--estimator": ["remask", "replay"],
    "--replay-steps": ["0", "1", "50"], "--lr": ["1e-3", "1e30", "inf"], "--warmup": ["0", "5"], "--beta": ["0", "1e30"],
    "--clip": ["0.1", "1e30"], "--epochs": ["2", "0"], "--image-weight": ["0", "1", "1e38"], "--answer-weight": ["0", "1", "1e38"],
    "--tau": ["0.1", "1e-30", "1e30"], "--picture-clip": ["1", "1e-30"], "--judge": ["policy", "frozen"], "--max-grad-norm": ["1", "1e-30"],
    "--max-kl": ["0", "1e-30"], "--entropy": ["0 1", "1 0", "0.5"], "--lora": ["1", "2", "100", "0"], "--replay": ["1", "100"],
    "--freeze": ["", "language_model", "lm_head aligner", "vision_model", "language_model lm_head generation_head generation_embeddings "
                 "generation_aligner aligner vision_model vqmodel"],
    "--recompute": [None], "--no-recompute": [None], "--caption-dropout": ["0", "1", "2"], "--out": ["/proc/x", "file"], "--prompt": ["a"],
    "--model": ["tiny-show-o", "nowhere", "."], "--resume": ["nowhere", "."],
}


def fuzz_case(kind: str, rng, folder: Path, models: dict[str, str], finished_run: Path) -> tuple[list[str], str, str]:
    """Flags of a short run, whose script, and what is wrong with it."""
    script, out = ["grpo", "sft"][rng.integers(2)], folder / "run"
    model = Path(shutil.copytree(models[["janus", "show-o"][rng.integers(2)]], folder / "model"))
    (folder / "own.jsonl").write_bytes(lines_of(OWN)), (folder / "file").touch()
    shape = ["--out", "run", "--model", "model", "--steps", "1", "--prompts", "2", "--group", "2", "--no-compile", "--eval-images", "1",
             "--max-tokens", "2"]
    if kind == "config":
        files = [path for path in sorted(model.rglob("*.json")) if path.name not in ("tokenizer.json", "manifest.json")]
        return shape, script, mutate_json(files[rng.integers(len(files))], rng)
    if kind == "weights":
        files = sorted(path for path in model.rglob("*") if path.is_file())
        return shape, script, mutate_bytes(files[rng.integers(len(files))], rng)
    if kind == "checkpoint":
        shutil.copytree(finished_run, out)
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.suffix not in (".png", ".jinja"))
        files += [out / "args.json"] * 8
        path = files[rng.integers(len(files))]
        change = mutate_json(path, rng) if path.suffix == ".json" and rng.random() < 0.7 else mutate_bytes(path, rng)
        return ["--resume", "run", "--steps", "5"], "grpo", f"{path.parent.name}/{change}"
    if kind == "prompts":
        path = folder / "own.jsonl"
        if rng.random() < 0.3:
            change = mutate_bytes(path, rng)
        else:
            rows = path.read_bytes().splitlines()
            (folder / "row.json").write_bytes(rows[row := int(rng.integers(len(rows)))])
            change = f"line {row + 1} of {mutate_json(folder / 'row.json', rng)}"
            rows[row] = (folder / "row.json").read_bytes()
            path.write_bytes(b"\n".join(rows))
        return [*shape, "--tasks", "own.jsonl"], script, change
    words = []
    for flag in rng.choice([*FLAGS], size=rng.integers(1, 6), replace=False):
        value = FLAGS[flag][rng.integers(len(FLAGS[flag]))]
        words += [str(flag), *([] if value is None else value.split(" "))]
    return [*shape, *words], script, " ".join(words)


@pytest.mark.parametrize("kind", ["flags", "config", "weights", "checkpoint", "prompts"])
def test_fuzz(kind, small, finished, tmp_path, monkeypatch, capsys):
    """Mutated flags, configurations, weights, runs and prompts, each on a short run of one of the two scripts and models:
    a good run, whose last checkpoint is whole, or one line. No other exception, no checkpoint that is not whole, no
    summary of a run that failed."""
    save_show_o(tmp_path / "show-o")
    every = shapes.held_out_tasks
    monkeypatch.setattr(evaluate_module.shapes, "held_out_tasks", lambda: every()[::20])
    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    failures = []
    for number in range(-(-FUZZ // 5)):
        rng, folder = np.random.default_rng((number, len(kind))), tmp_path / str(number)
        folder.mkdir()
        arguments, script, change = fuzz_case(kind, rng, folder, {"janus": small, "show-o": str(tmp_path / "show-o")}, finished[0])
        monkeypatch.chdir(folder)
        capsys.readouterr()
        began = time.monotonic()
        try:
            main_here(monkeypatch, *arguments, script={"grpo": grpo, "sft": sft}[script])
            outcome = "a good run"
        except UserError as error:
            outcome = str(error)
            assert outcome and ("\n" not in outcome or "faults\n" in outcome), (change, outcome)
        except SystemExit as stop:
            outcome = capsys.readouterr().err.splitlines()[-1]
            assert stop.code == 2 and "error: " in outcome, (change, stop.code, outcome)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"FAILED at {Path(where.filename).name}:{where.lineno}, {type(error).__name__}: {error}"
            failures.append(f"{kind} {number}, {script} {' '.join(arguments)}: {change}: {outcome}")
        out = folder / "run"
        for step in resume.checkpoints(out):
            if kind != "checkpoint" or step == 5:
                checkpoint.check_manifest(resume.place(out, step))
        if outcome == "a good run":
            assert read_metrics(out)[-1]["step"] == json.loads((out / "summary.json").read_text())["steps"], change
            assert resume.last_whole(out) == read_metrics(out)[-1]["step"], change
        elif kind != "checkpoint":
            assert not (out / "summary.json").exists(), change
        assert not list(out.glob("*.partial")), change
        with capsys.disabled():
            print(f"\n{kind} {number} ({time.monotonic() - began:.1f} s) {script} {change}: {outcome[:230]}" if FUZZ > 50 else "", end="")
        monkeypatch.chdir(ROOT)
        shutil.rmtree(folder)
    assert not failures, "\n".join(failures)


# ---------------------------------------------------------------------------------------------------------------------
# tiny/: the shapes world


def test_the_worlds_detector_reads_true_pictures_and_no_others():
    """All true pictures are judged right; pictures of other tasks seldom, by chance."""
    rng, suite = np.random.default_rng(0), shapes.held_out_tasks()
    tasks = [task for task in suite for _ in range(3)]
    found = [[Detection(**d) for d in one] for one in shapes.detect(np.stack([shapes.render(t, rng) for t in tasks]))]
    lines = [geneval_metadata(task) for task in tasks]
    right = [judge(m, d, shapes.MIN_OVERLAP, shapes.MIN_OVERLAP)[0] for m, d in zip(lines, found)]
    assert np.mean(right) == 1
    shuffled = rng.permutation(len(tasks))
    wrong = [judge(m, found[i], shapes.MIN_OVERLAP, shapes.MIN_OVERLAP)[0] for m, i in zip(lines, shuffled)]
    assert np.mean(wrong) < 0.1


def test_no_two_shapes_look_alike_to_the_detector():
    for name, template in shapes.TEMPLATES.items():
        scores = shapes.overlaps(np.pad(template, 8))
        assert scores.pop(name) == 1 and max(scores.values()) < 0.8


def test_training_never_draws_a_held_out_task():
    suite = shapes.held_out_tasks()
    held_out = {task_key(task) for task in suite}
    rng = np.random.default_rng(0)
    assert all(task_key(draw_task(shapes.VOCABULARY, rng, held_out)) not in held_out for _ in range(3000))
    for tag in TAGS:
        assert sum(task.tag == tag for task in suite) == 20


def test_every_known_answer_of_the_world_is_right():
    rng = np.random.default_rng(0)
    for _ in range(500):
        task = draw_task(shapes.VOCABULARY, rng)
        assert score(task.answer, task, shapes.VOCABULARY) == 1, task.answer


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py


def thing(name, left, top, color=None, confidence=0.9, size=10):
    return Detection(name, confidence, (left, top, left + size, top + size), None, color)


def dog(left=0, top=0, color=None, confidence=0.95, size=10):
    return thing("dog", left, top, color, confidence, size)


def cat(left=0, top=0, color=None, confidence=0.95, size=10):
    return thing("cat", left, top, color, confidence, size)


def beside(relation):
    """A dog in this relation to a cat."""
    return [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": [relation, 0]}]


ONE = [{"class": "dog", "count": 1}]
PAIR = [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]
TWO, THREE, FOUR = ([{"class": "dog", "count": count}] for count in (2, 3, 4))
RED = [{"class": "dog", "count": 1, "color": "red"}]
COLORED = [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}]
VERDICTS = [  # tag, facts, detections, the reason ("" where the picture is right), worked out by hand
    ("single_object", ONE, [dog()], ""),
    ("single_object", ONE, [], "expected dog >= 1, found 0"),
    ("single_object", ONE, [cat()], "expected dog >= 1, found 0"),
    ("single_object", ONE, [dog(), cat(20)], ""),  # what else is there does not matter
    ("single_object", ONE, [dog(), dog(20), dog(40)], ""),  # nor how many
    ("single_object", ONE, [dog(confidence=0.3)], "expected dog >= 1, found 0"),  # must exceed the threshold
    ("single_object", ONE, [dog(confidence=0.31)], ""),
    ("single_object", ONE, [dog(confidence=0.89)], ""),  # the stricter threshold is for counting alone
    ("single_object", ONE, [cat(confidence=0.99), dog(confidence=0.4)], ""),  # on the same spot: nothing is suppressed
    ("two_object", PAIR, [dog(), cat(20)], ""),
    ("two_object", PAIR, [cat(), dog(20)], ""),
    ("two_object", PAIR, [dog()], "expected cat >= 1, found 0"),
    ("two_object", PAIR, [cat()], "expected dog >= 1, found 0"),
    ("two_object", PAIR, [], "expected dog >= 1, found 0; expected cat >= 1, found 0"),
    ("two_object", PAIR, [dog(), dog(20)], "expected cat >= 1, found 0"),
    ("two_object", PAIR, [dog(), cat()], ""),  # the same box twice
    ("two_object", PAIR, [dog(confidence=0.3), cat()], "expected dog >= 1, found 0"),
    ("two_object", PAIR, [dog(), cat(confidence=0.3001)], ""),
    ("counting", TWO, [dog(), dog(20)], ""),
    ("counting", TWO, [dog()], "expected dog >= 2, found 1"),
    ("counting", TWO, [], "expected dog >= 2, found 0"),
    ("counting", TWO, [dog(), dog(20), dog(40)], "expected dog < 3, found 3"),
    ("counting", TWO, [dog(), dog(20), dog(40, confidence=0.9)], ""),  # exactly .9 does not count
    ("counting", TWO, [dog(), dog(20), dog(40, confidence=0.91)], "expected dog < 3, found 3"),
    ("counting", TWO, [dog(), dog(20, confidence=0.9)], "expected dog >= 2, found 1"),
    ("counting", TWO, [dog(), dog(), cat(), cat(20)], ""),  # overlapping wholly; cats are not asked about
    ("counting", TWO, [dog(), cat(20)], "expected dog >= 2, found 1"),
    ("counting", THREE, [dog(), dog(20), dog(40)], ""),
    ("counting", THREE, [dog(), dog(20)], "expected dog >= 3, found 2"),
    ("counting", THREE, [dog(20 * i) for i in range(4)], "expected dog < 4, found 4"),
    ("counting", FOUR, [dog(20 * i) for i in range(4)], ""),
    ("counting", FOUR, [dog(20 * i) for i in range(5)], "expected dog < 5, found 5"),
    ("counting", FOUR, [dog(20 * i) for i in range(20)], "expected dog < 5, found 16"),  # at most 16 of a class
    ("counting", FOUR, [dog(20 * i, confidence=0.8) for i in range(4)], "expected dog >= 4, found 0"),
    ("colors", RED, [dog(color="red")], ""),
    ("colors", RED, [dog(color="blue")], "expected red dog >= 1, found blue"),
    ("colors", RED, [], "expected dog >= 1, found 0"),
    ("colors", RED, [cat(color="red")], "expected dog >= 1, found 0"),
    ("colors", RED, [dog(0, color="blue", confidence=0.95), dog(20, color="red", confidence=0.5)],
     "expected red dog >= 1, found blue"),  # only the most confident one is looked at
    ("colors", RED, [dog(0, color="blue", confidence=0.5), dog(20, color="red", confidence=0.95)], ""),
    ("colors", RED, [dog(0, color="red"), dog(20, color="blue")], ""),  # equals: the first; the benchmark (argsort) leaves it open
    ("colors", RED, [dog(0, color="blue"), dog(20, color="red")], "expected red dog >= 1, found blue"),
    ("colors", RED, [dog(color="red", confidence=0.3)], "expected dog >= 1, found 0"),
    ("color_attr", COLORED, [dog(color="red"), cat(20, color="blue")], ""),
    ("color_attr", COLORED, [dog(color="blue"), cat(20, color="red")],
     "expected red dog >= 1, found blue; expected blue cat >= 1, found red"),
    ("color_attr", COLORED, [dog(color="red"), cat(20, color="red")], "expected blue cat >= 1, found red"),
    ("color_attr", COLORED, [dog(color="green"), cat(20, color="blue")], "expected red dog >= 1, found green"),
    ("color_attr", COLORED, [dog(color="red")], "expected cat >= 1, found 0"),
    ("color_attr", COLORED, [cat(color="red")], "expected dog >= 1, found 0; expected blue cat >= 1, found red"),
    ("color_attr", COLORED, [], "expected dog >= 1, found 0; expected cat >= 1, found 0"),
    ("color_attr", COLORED, [dog(color="red"), dog(20, color="blue"), cat(40, color="blue")], ""),
    # boxes of ten pixels; the offset of centres loses a tenth of the two sizes, two pixels, on each axis
    ("position", beside("right of"), [dog(40), cat()], ""),
    ("position", beside("left of"), [dog(), cat(40)], ""),
    ("position", beside("above"), [dog(0, 0), cat(0, 40)], ""),
    ("position", beside("below"), [dog(0, 40), cat(0, 0)], ""),
    ("position", beside("right of"), [dog(), cat(40)], "expected dog right of target, found left of"),
    ("position", beside("above"), [dog(0, 40), cat()], "expected dog above target, found below"),
    ("position", beside("right of"), [dog(0, 40), cat()], "expected dog right of target, found below"),
    ("position", beside("right of"), [dog(), cat()], "expected dog right of target, found neither side"),
    ("position", beside("right of"), [dog(2), cat()], "expected dog right of target, found neither side"),  # 2 - 2 = 0
    ("position", beside("right of"), [dog(4), cat()], "expected dog right of target, found neither side"),  # 2 / 4
    ("position", beside("right of"), [dog(5), cat()], ""),  # 3 / 5 of the way, though the boxes overlap by half
    ("position", beside("right of"), [dog(40, 40), cat()], ""),  # on a diagonal two relations hold,
    ("position", beside("below"), [dog(40, 40), cat()], ""),
    ("position", beside("left of"), [dog(40, 40), cat()], "expected dog left of target, found below and right of"),
    ("position", beside("below"), [dog(40, 20), cat()], "expected dog below target, found right of"),  # 18 / 44.7
    ("position", beside("right of"), [dog(40)], "expected cat >= 1, found 0; no target for dog to be right of"),
    ("position", beside("right of"), [cat()], "expected dog >= 1, found 0"),
    ("position", beside("right of"), [], "expected cat >= 1, found 0; expected dog >= 1, found 0"),
    ("position", beside("right of"), [dog(40, confidence=0.5), dog(0, confidence=0.9), cat(20)],
     "expected dog right of target, found left of"),  # the most confident dog
    ("position", beside("right of"), [dog(40), cat(0, confidence=0.9), cat(80, confidence=0.5)], ""),
    ("position", beside("right of"), [dog(-8, size=40), cat(0, 15)],
     "expected dog right of target, found neither side"),  # around it: (7 - 5) / 7
]


@pytest.mark.parametrize("tag, facts, detections, reason", VERDICTS)
def test_genevals_rules(tag, facts, detections, reason):
    assert judge(geneval_metadata(make_task(tag, facts)), detections) == (not reason, reason)


def test_there_are_rules_of_every_category():
    tags = [tag for tag, *_ in VERDICTS]
    assert len(tags) >= 60 and all(tags.count(tag) >= 8 for tag in TAGS)


def test_rules_that_no_prompt_of_the_suite_needs():
    """Anybody's metadata: several objects with a color each, relations to each of several, exclusions of other things."""
    line = {"tag": "color_attr", "include": [{"class": "dog", "count": 2, "color": "red"}], "exclude": [
        {"class": "cat", "count": 1}]}
    assert judge(line, [dog(color="red"), dog(20, color="red")]) == (True, "")
    assert judge(line, [dog(color="red"), dog(20, color="blue")]) == (False, "expected red dog >= 2, found red, blue")
    assert judge(line, [dog(color="red"), dog(20, color="red"), cat(40)]) == (False, "expected cat < 1, found 1")
    line = {"tag": "position", "include": [
        {"class": "cat", "count": 2}, {"class": "dog", "count": 1, "position": ["left of", 0]}]}
    assert judge(line, [dog(), cat(20), cat(40)]) == (True, "")
    assert judge(line, [dog(20), cat(0), cat(40)]) == (False, "expected dog left of target, found right of")


# -- the detector: Mask2Former's head, CLIP's colors, a folder of pictures


def bilinear(image, height, width):
    """An image [h, w] resized in numpy: pixel centres at (i + 0.5) * h / height - 0.5, edges repeated."""

    def weights(small, large):
        at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, None)
        low = np.minimum(at.astype(int), small - 1)
        high, part, rows = np.minimum(low + 1, small - 1), at - low, np.arange(large)
        matrix = np.zeros((large, small))
        np.add.at(matrix, (rows, low), 1 - part)
        np.add.at(matrix, (rows, high), part)
        return matrix

    return weights(image.shape[0], height) @ image @ weights(image.shape[1], width).T


def test_the_instance_head_equals_a_computation_in_numpy():
    """Class logits and mask logits to detections, of an image that is not square, with padding on one side."""
    rng = np.random.default_rng(0)
    Q, C, padded, resized, size = 30, 80, (64, 96), (64, 90), (40, 56)
    classes, masks = 2 * rng.normal(size=(Q, C + 1)), 3 * rng.normal(size=(Q, 8, 12)) - 1
    for query in range(0, Q, 2):
        classes[query, rng.choice(C, 2, replace=False)] += 8  # half of the queries are sure, some of two classes
    masks[4] = -1  # sure of its class, but with an empty mask
    expected = []
    probability = np.exp(classes) / np.exp(classes).sum(1, keepdims=True)
    for flat in np.argsort(-probability[:, :C].ravel())[:100]:
        query, label = divmod(int(flat), C)
        mask = bilinear(bilinear(masks[query], *padded)[: resized[0], : resized[1]], *size)
        inside = mask > 0
        score = probability[query, label] * ((1 / (1 + np.exp(-mask)))[inside].sum() / (inside.sum() + 1e-6))
        if score > 0.3:
            rows, columns = np.nonzero(inside)
            expected.append((GENEVAL.objects[label], score, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), inside))
    found = geneval.instances(torch.tensor(classes), torch.tensor(masks), padded, resized, size)
    assert len(found) == len(expected) >= 8
    for ours, (name, score, box, mask) in zip(found, expected):
        assert ours.name == name and ours.score == pytest.approx(score, abs=1e-5) and ours.box == box
        assert np.array_equal(ours.mask, mask)


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """Folders of a small random Mask2Former and a small random CLIP. The detector's heads are made to be sure of its
    queries: each is a dog or a cat."""
    root = tmp_path_factory.mktemp("scorers")
    torch.manual_seed(0)
    backbone = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=6,
                               encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
                               dim_feedforward=32, num_labels=80)
    segmenter = Mask2FormerForUniversalSegmentation(config)
    segmenter.save_pretrained(root / "unsure")
    with torch.no_grad():
        head, one, other = segmenter.class_predictor, GENEVAL.objects.index("dog"), GENEVAL.objects.index("cat")
        head.bias[[one, other]] += 12
        head.weight[one] += 3 * torch.randn(32)
        head.weight[other] = -head.weight[one]
        for name, weight in segmenter.named_parameters():
            if "mask_embedder" in name and name.endswith("weight"):
                weight *= 40  # or every mask would be half sure of every pixel
    segmenter.save_pretrained(root / "detector")
    words = sorted(bytes_to_unicode().values())
    vocabulary = {w: i for i, w in enumerate([*words, *(w + "</w>" for w in words), "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(root / "clip")
    text = dict(vocab_size=len(vocabulary), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=77, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for name, weight in clip.named_parameters():
            if "vision_model" in name and weight.dim() > 1:
                weight *= 20  # or all pictures would look the same to it
    clip.save_pretrained(root / "clip")
    return root


def put(folder, lines, images):
    """A folder in GenEval's layout: a list of pictures for every line."""
    for i, (line, pictures) in enumerate(zip(lines, images)):
        (folder / f"{i:05d}" / "samples").mkdir(parents=True)
        (folder / f"{i:05d}" / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        for k, image in enumerate(pictures):
            Image.fromarray(image).save(folder / f"{i:05d}" / "samples" / f"{k:04d}.png")
    return folder


def call_evaluate(*arguments):
    """evaluate.py's command line in this process, with what it printed and its exit code."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        patch.setattr(geneval, "snapshot_download", offline)
        try:
            sample.run(evaluate_module.main)
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else 1
            err.write("" if isinstance(exit.code, int) else exit.code)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def offline(name, **settings):
    raise OSError("no network")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two pictures of noise, of two sizes, for five of GenEval's prompts."""
    rng, suite = np.random.default_rng(0), geneval_suite()
    tasks = [suite[0], suite[100], suite[200], suite[300], suite[500]]
    images = [[rng.integers(0, 256, (48, 48 + 16 * k, 3), dtype=np.uint8) for k in range(2)] for _ in tasks]
    return put(tmp_path_factory.mktemp("drawn"), [geneval_metadata(task) for task in tasks], images)


def test_from_pictures_to_results(drawn, scorers, tmp_path):
    """PNG files through Mask2Former and CLIP to results.json; what is written there follows from GenEval's rules."""
    result = call_evaluate("--images", drawn, "--detector", scorers / "detector", "--clip", scorers / "clip", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    Image.open(tmp_path / "report.png").verify()
    assert len(results["images"]) == 10 and results["conditions"]["suite"]["prompts"] == 5
    assert results["conditions"]["versions"]["torch"] == torch.__version__
    for record in results["images"]:
        line = json.loads((Path(record["file"]).parent.parent / "metadata.jsonl").read_text())
        detections = [Detection(d["name"], d["score"], tuple(d["box"]), None, d["color"]) for d in record["detections"]]
        assert {"dog", "cat"} >= {d.name for d in detections} and detections
        assert judge(line, detections) == (record["drawn"], record["reason"])
        assert record["answer"] is None
    assert results["scores"] == summarize(results["images"])
    assert results["scores"]["understanding"]["own_images"] is None


def test_a_blind_detector_is_called_broken_and_not_a_score_of_zero(drawn, scorers, tmp_path):
    result = call_evaluate("--images", drawn, "--detector", scorers / "unsure", "--clip", scorers / "clip", "--out", tmp_path)
    complain(result, 1, "found nothing", "100%", "broken")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["scores"]["generation"]["overall"] is None and results["conditions"]["nothing_found"] == 1


def test_colors_are_zero_shot_clip_on_the_masked_crop(scorers):
    """The color that the detector reports against an independent computation: PIL's composite and crop, CLIP's own
    preprocessing and logits, prompt ensembles averaged in numpy."""
    detector = load_detector(str(scorers / "detector"), str(scorers / "clip"))
    rng = np.random.default_rng(3)
    line = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}
    colors = set()
    for _ in range(8):
        tint = rng.integers(0, 256, 3)
        image = (rng.integers(0, 256, (48, 64, 3)) * 0.3 + 0.7 * tint).astype(np.uint8)
        with torch.no_grad():
            [plain], [found] = detector.segment(image[None]), detector([image], [line])
        best = max((d for d in plain if d.name == "dog"), key=lambda d: d.score)
        [ours] = [d for d in found if d.color]
        assert ours.box == best.box and ours.score == best.score
        blank = Image.new("RGB", (64, 48), "#999")
        crop = Image.composite(Image.fromarray(image), blank, Image.fromarray(best.mask)).crop(best.box)
        pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})(
            images=crop, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            scores = []
            for color in GENEVAL.colors:
                texts = [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"]
                out = detector.clip(pixel_values=pixels, **detector.tokenizer(texts, padding=True, return_tensors="pt"))
                mean = out.text_embeds.numpy().mean(0)  # of unit vectors
                scores.append((mean / np.linalg.norm(mean)) @ out.image_embeds[0].numpy())
        assert ours.color == GENEVAL.colors[int(np.argmax(scores))]
        colors.add(ours.color)
    assert len(colors) > 1, "the test would not notice a constant"


@pytest.mark.parametrize("height, width", [(1, 40), (3, 40), (40, 3), (1, 1), (100, 231), (231, 100), (32, 32)])
def test_crops_of_any_shape_reach_clip_as_open_clip_makes_them(scorers, height, width):
    """Rows of one or three pixels are no channels, and the centre is torchvision's: half a pixel rounds to even."""
    detector = load_detector(str(scorers / "detector"), str(scorers / "clip"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    large = image.resize((32, int(32 * height / width)) if width < height else (int(32 * width / height), 32), Image.BICUBIC)
    left, top = int(round((large.width - 32) / 2.0)), int(round((large.height - 32) / 2.0))
    expected = np.asarray(large)[top : top + 32, left : left + 32] / 255
    expected = (expected - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert np.abs(detector.clip_pixels(image).numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


def test_the_detectors_preprocessing(scorers, monkeypatch):
    """The shorter side becomes 800 unless the longer would exceed 1333; ImageNet's mean and deviation; zeros to a
    multiple of 32. transformers' own processor agrees on the square, which needs no padding."""
    detector, seen = load_detector(str(scorers / "detector"), str(scorers / "clip")), []
    monkeypatch.setattr(geneval, "instances", lambda classes, masks, *sizes: seen.append(sizes))
    original = detector.segmenter.forward
    inputs = []
    monkeypatch.setattr(detector.segmenter, "forward", lambda pixel_values: inputs.append(pixel_values) or original(
        pixel_values=pixel_values))
    rng = np.random.default_rng(0)
    square, wide = (rng.integers(0, 256, (1, *size, 3), dtype=np.uint8) for size in ((96, 96), (60, 160)))
    with torch.no_grad():
        detector.segment(square), detector.segment(wide)
    assert seen == [((800, 800), (800, 800), (96, 96)), ((512, 1344), (500, 1333), (60, 160))]
    theirs = Mask2FormerImageProcessorPil()(images=square[0], return_tensors="pt")["pixel_values"]
    assert (inputs[0] - theirs).abs().max() < 1e-4
    assert inputs[1].shape[2:] == (512, 1344) and not inputs[1][0, :, 500:].any() and not inputs[1][0, :, :, 1333:].any()
    large = rng.integers(0, 256, (1, 1600, 1600, 3), dtype=np.uint8)
    with torch.no_grad():
        detector.segment(large)
    halved = large[0].reshape(800, 2, 800, 2, 3).mean((1, 3)).round()  # between two pixels each way: no antialiasing
    expected = (halved - np.float32(geneval.MEAN)) / np.float32(geneval.STD)
    assert np.abs(inputs[2][0].permute(1, 2, 0).numpy() - expected).max() < 1e-4


@pytest.fixture(scope="module")
def true_pictures():
    """(lines, pictures) of the shapes world's held-out tasks, two each."""
    rng, tasks = np.random.default_rng(0), shapes.held_out_tasks()
    return [geneval_metadata(task) for task in tasks], [[shapes.render(task, rng) for _ in range(2)] for task in tasks]


def test_a_folder_of_perfect_pictures_scores_one_and_a_shuffled_one_at_chance(true_pictures, tmp_path):
    """The key is fabricated here: the chance level is the share of all pairs (prompt, another prompt's picture), in each
    category, that the rules call right."""
    lines, images = true_pictures
    perfect = call_evaluate("--images", put(tmp_path / "perfect", lines, images), "--out", tmp_path / "a")
    assert perfect.returncode == 0, perfect.stderr
    scores = json.loads((tmp_path / "a" / "results.json").read_text())["scores"]["generation"]
    assert all(value == 1 for value in scores.values())
    found = [[Detection(**d) for d in one] for one in shapes.detect(np.stack([image for pair in images for image in pair]))]
    least = (shapes.MIN_OVERLAP, shapes.MIN_OVERLAP)
    hits = np.array([[judge(line, one, *least)[0] for one in found] for line in lines])  # [prompts, pictures]
    order = np.random.default_rng(1).permutation(len(lines))
    shuffled = put(tmp_path / "shuffled", lines, [images[i] for i in order])
    assert call_evaluate("--images", shuffled, "--out", tmp_path / "b").returncode == 0
    scores = json.loads((tmp_path / "b" / "results.json").read_text())["scores"]["generation"]
    chance = np.mean([hits[[line["tag"] == tag for line in lines]].mean() for tag in TAGS])
    assert 0.01 < chance < 0.1 and abs(scores["overall"] - chance) < 0.04
    exact = np.mean([[hits[p, 2 * order[p] + k] for k in range(2)] for p in range(len(lines))])
    assert scores["overall"] == pytest.approx(exact)  # categories are equally large


def test_a_models_pictures_in_genevals_layout_can_be_interrupted(tiny, tmp_path, monkeypatch):
    """Drawing goes on where it stopped, gives the same pictures, and refuses to mix conditions."""
    world = evaluate_module.World("shapes", shapes.VOCABULARY, shapes.held_out_tasks()[:7])
    draw = lambda folder, guidance=3.0: evaluate_module.draw_folder(tiny, world, folder, 2, guidance, 1.0, 0, 4, False, "tiny")
    draw(tmp_path / "whole")
    read = lambda folder: {f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    whole, cut = read(tmp_path / "whole"), tmp_path / "cut"
    assert len([path for path in whole if path.suffix == ".png"]) == 14
    assert whole[Path("00003/metadata.jsonl")] == (json.dumps(geneval_metadata(world.suite[3])) + "\n").encode()
    saved, calls = Image.Image.save, []

    def failing(image, *arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        saved(image, *arguments)

    monkeypatch.setattr(Image.Image, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        draw(cut)
    with pytest.raises(UserError, match="9 of 14 pictures are missing"):
        evaluate_module.read_folder(cut)
    draw(cut)
    assert read(cut) == whole
    with pytest.raises(UserError, match="other conditions"):
        draw(cut, guidance=2.0)


def test_two_ranks_draw_and_score_as_one(tmp_path):
    """The same pictures, the same scores, and a record for every picture once."""
    arguments = ["--images-per-prompt", 1, "--batch", 60, "--no-compile"]
    for name, ranks in (("one", 0), ("two", 2)):
        result = run_grpo("--out", tmp_path / name, *arguments, ranks=ranks, script="evaluate")
        assert result.returncode == 0, result.stderr
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    assert results[0]["scores"] == results[1]["scores"]
    parts = [sorted((r["index"], Path(r["file"]).name, r["drawn"], r["answer"]) for r in one["images"]) for one in results]
    assert parts[0] == parts[1] and len(parts[0]) == 120
    for file in (tmp_path / "one" / "images").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes()


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f / "00001" / "metadata.jsonl").write_text("{nonsense"), ["00001/metadata.jsonl:1", "not a line"]),
    (lambda f: (f / "00001" / "metadata.jsonl").write_text('{"tag": "smell"}'), ["00001/metadata.jsonl:1", "unknown tag 'smell'"]),
    (lambda f: (f / "00001" / "metadata.jsonl").write_text('{"tag": "colors", "prompt": "x", "include": [{"class": "dog"}]}'),
     ["00001/metadata.jsonl:1", "should have the keys class, color, count"]),
    (lambda f: (f / "00001" / "metadata.jsonl").write_text("[]"), ["00001/metadata.jsonl:1"]),
    (lambda f: (f / "00001" / "metadata.jsonl").unlink(), ["00001/metadata.jsonl:1", "No such file"]),
    (lambda f: (f / "00001" / "metadata.jsonl").write_text(
        '{"tag": "single_object", "prompt": "a photo of a yeti", "include": [{"class": "yeti", "count": 1}]}'), ["yeti"]),
    (lambda f: (f / "00002" / "samples" / "0001.png").write_bytes((f / "00002" / "samples" / "0001.png").read_bytes()[:900]),
     ["00002/samples/0001.png", "draw it again"]),
    (lambda f: (f / "00002" / "samples" / "0001.png").unlink(), ["interrupted: 1 of 10"]),
    (lambda f: shutil.rmtree(f / "00002"), ["interrupted: 2 of 10"]),
    (lambda f: [path.unlink() for path in f.rglob("*.png")], ["has no pictures"]),
    (lambda f: (f / "conditions.json").write_text("{x"), ["conditions.json: damaged"]),
    (lambda f: (f / "00001" / "metadata.jsonl").write_text('{"tag": "colors",\n "prompt" 3}'), ["00001/metadata.jsonl:2"]),
    (lambda f: (f / "00001" / "metadata.jsonl").write_text('{"tag": "single_object", "prompt": "x", "exclude": null, '
     '"include": [{"class": "dog", "count": 1}]}'), ["00001/metadata.jsonl:1", "under exclude"]),
    (lambda f: [shutil.rmtree(path) for path in f.glob("0*")], ["GenEval's layout"]),
])
def test_a_damaged_folder_is_one_line(drawn, tmp_path, damage, words):
    folder = tmp_path / "copy"
    shutil.copytree(drawn, folder)
    damage(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    complain(call_evaluate("--images", folder, "--out", tmp_path / "out", "--detector", "none"), 1, *words)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_detectors_that_are_not_at_hand_or_not_detectors(drawn, scorers, tmp_path):
    common = ["--images", drawn, "--out", tmp_path / "out"]
    complain(call_evaluate(*common), 1, "cannot download facebook/mask2former-swin-small-coco-instance", "--detector FOLDER")
    complain(call_evaluate(*common, "--detector", scorers / "detector"), 1, "openai/clip-vit-large-patch14", "--clip FOLDER")
    complain(call_evaluate(*common, "--detector", "/nowhere"), 1, "--detector /nowhere: no such folder")
    complain(call_evaluate(*common, "--detector", scorers / "clip"), 1, "--detector", "clip")
    lacking = tmp_path / "lacking"
    shutil.copytree(scorers / "detector", lacking)
    tensors = load_file(lacking / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    complain(call_evaluate(*common, "--detector", lacking), 1, "class_predictor.weight is missing")
    other = tmp_path / "other"
    shutil.copytree(scorers / "detector", other)
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {str(i): f"thing {i}" for i in range(80)}
    (other / "config.json").write_text(json.dumps(config))
    complain(call_evaluate(*common, "--detector", other), 1, "not COCO's 80")


def test_write_suite(tmp_path):
    subprocess.run([sys.executable, "evaluate.py", "--write-suite", tmp_path / "suite.jsonl"], check=True, cwd=ROOT)
    content = (tmp_path / "suite.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    complain(call_evaluate("--write-suite", tmp_path / "no" / "suite.jsonl"), 1, "cannot be written")


def test_a_models_answers_about_a_folders_pictures(true_pictures, tmp_path):
    """--images with --model: the tiny model understands true pictures of its world nearly always."""
    lines, images = true_pictures
    folder = put(tmp_path / "images", lines[::4], images[::4])
    assert call_evaluate("--images", folder, "--model", "tiny", "--out", tmp_path / "out").returncode == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["scores"]["understanding"]["own_images"] > 0.95 and results["scores"]["generation"]["overall"] == 1
    assert all(score(r["answer"], make_task(r["tag"], lines[4 * r["index"]]["include"]), shapes.VOCABULARY) == r["answered"]
               for r in results["images"])


def fake_results(path, rates, seed=0, prompts=40, sha="x"):
    """results.json of four pictures a prompt, each drawn right with its prompt's own probability around the rate."""
    rng, records = np.random.default_rng(seed), []
    for i, tag in enumerate(np.repeat(TAGS, prompts)):
        p = np.clip(rates.get(tag, 0.5) + rng.normal(0, 0.2), 0, 1)
        records += [{"index": i, "tag": tag, "drawn": bool(rng.random() < p), "answered": bool(rng.random() < 0.6)} for _ in range(4)]
    path.write_text(json.dumps({"images": records, "conditions": {"suite": {"name": "n", "prompts": 6 * prompts, "sha256": sha}}}))
    return records


def test_compare_finds_the_difference_and_only_that(tmp_path):
    a, b, other = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    first, second = fake_results(a, {}), fake_results(b, {"counting": 0.9}, seed=1)
    result = call_evaluate("--compare", a, b)
    assert result.returncode == 0, result.stderr
    rows = {line[:34].strip(): line[34:].split() for line in result.stdout.splitlines()[1:-1]}
    for name, records in (("A", first), ("B", second)):
        scores = summarize([{**r, "answered_true": None} for r in records])
        column = 0 if name == "A" else 1
        assert float(rows["generation overall"][column]) == pytest.approx(scores["generation"]["overall"], abs=5e-4)
        assert float(rows["understanding own_images"][column]) == pytest.approx(scores["understanding"]["own_images"], abs=5e-4)
        for key in ("answered_given_drawn", "drawn_given_answered", "disagreement"):
            assert float(rows[key][column]) == pytest.approx(scores["imbalance"][key], abs=5e-4)
    interval = lambda name: (float(rows[name][3]), float(rows[name][5]))
    assert interval("generation counting")[0] > 0.1
    low, high = interval("generation colors")
    assert low < 0 < high
    fake_results(other, {}, sha="y")
    complain(call_evaluate("--compare", a, other), 1, "different suites")
    complain(call_evaluate("--compare", a, tmp_path / "nothing.json"), 1, "holds no results")


def test_the_bootstraps_interval_has_the_right_width():
    """For a mean over prompts the bootstrap's interval is close to 1.96 standard errors, computed from the variances."""
    rng = np.random.default_rng(0)
    records = [[{"index": i, "tag": tag, "drawn": bool(rng.random() < 0.3 + 0.4 * (i % 2)), "answered": True}
                for i, tag in enumerate(np.repeat(TAGS, 100)) for _ in range(4)] for _ in range(2)]
    means = [{tag: c[:, 1] / c[:, 0] for tag, c in evaluate_module.tally(r).items()} for r in records]
    error = np.sqrt(sum((means[1][tag] - means[0][tag]).var(ddof=1) / 100 for tag in TAGS)) / 6
    paths = []
    with tempfile.TemporaryDirectory() as folder:
        for name, one in zip("ab", records):
            paths.append(f"{folder}/{name}.json")
            Path(paths[-1]).write_text(json.dumps({"images": one, "conditions": {"suite": {"sha256": "x"}}}))
        [line] = [line for line in evaluate_module.compare(paths).splitlines() if line.startswith("generation overall")]
    low, high = float(line.split()[-3]), float(line.split()[-1])
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_imbalance_by_hand():
    """Of ten images: 4 drawn and answered, 2 drawn only, 1 answered only, 3 neither."""
    pairs = [(True, True)] * 4 + [(True, False)] * 2 + [(False, True)] + [(False, False)] * 3
    scores = summarize([{"tag": "counting", "drawn": d, "answered": a, "answered_true": True} for d, a in pairs])
    assert scores["generation"]["counting"] == pytest.approx(0.6) and scores["generation"]["position"] is None
    expected = {"answered_given_drawn": 4 / 6, "drawn_given_answered": 4 / 5, "disagreement": 0.3,
                "drawn_not_understood": 0.2, "understood_not_drawn": 0.1}
    by_category = scores["imbalance"].pop("by_category")
    assert scores["imbalance"] == pytest.approx(expected) and by_category["counting"] == pytest.approx(expected)
    assert set(by_category["position"].values()) == {None}


@pytest.mark.parametrize("name", ["tiny", "tiny-show-o"])
def test_a_committed_checkpoint_is_a_fair_start(name):
    """Neither hopeless nor solved at drawing, far ahead at understanding."""
    model = load(name)
    scores, records = evaluate(model, world_of(model), model.guidance, images_per_prompt=2, compiled=False)
    assert 0.3 < scores["generation"]["overall"] < 0.7
    assert scores["understanding"]["ground_truth"] > 0.95
    assert min(scores["understanding"]["ground_truth_by_category"].values()) > 0.9
    assert len(records) == 2 * len(shapes.held_out_tasks())


# ---------------------------------------------------------------------------------------------------------------------
# Show-o: the trunk, masks, layouts, mask-predict and its log-probabilities

PHI = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


class BitPixels(torch.nn.Module):
    """An image tokenizer of 2-bit codes whose picture is a pixel a code: red and green are its bits, blue is red."""

    BITS = torch.tensor([[-1.0, -1, -1], [-1, 1, -1], [1, -1, 1], [1, 1, 1]])  # [V, 3]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        pixels = codes @ self.BITS.to(codes) if codes.is_floating_point() else self.BITS[codes]  # [B, N, 3]
        return pixels.transpose(1, 2).unflatten(2, (math.isqrt(codes.shape[1]), -1))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        bits = (pixels[:, :2] > 0).long().flatten(2)
        return 2 * bits[:, 0] + bits[:, 1]


def show_o_tokenizer() -> PreTrainedTokenizerFast:
    """As Phi's, <bos> and <eos> are one token; [PAD] and Show-o's own are the last."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe([BOS, EOS]), bos_token=EOS, eos_token=EOS)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(list(SHOW_O_TOKENS), special_tokens=True)
    return tokenizer


def small_show_o(seed: int = 0, codes: int = 4, tokens: int = 9, vqmodel: torch.nn.Module | None = None, **settings) -> ShowO:
    """Random weights large enough that the logits are far from uniform, so that mistakes show."""
    tokenizer = show_o_tokenizer()
    settings = {
        "vocab_size": len(tokenizer) + codes + 1, "llm_vocab_size": len(tokenizer) - 10, "codebook_size": codes,
        "num_vq_tokens": tokens, "phi_config": PHI, "max_seq_length": 100, "steps": 5, **settings,
    }
    model = ShowO(settings, tokenizer, vqmodel or BitPixels()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
            else:
                weight.copy_(noise if "embed" in name else noise * weight.shape[1] ** -0.5)
        model.lm_head.weight.mul_(2)
    return model


@pytest.fixture(scope="module")
def show_o():
    return small_show_o()


@pytest.mark.parametrize("kv_heads, rotary", [(4, 0.5), (2, 0.25)])
def test_phi_trunk_equals_transformers(kv_heads, rotary):
    """With query/key layer norm; dense and cached, and with a mask that is not causal."""
    config = PhiConfig(
        vocab_size=50, **PHI, num_key_value_heads=kv_heads, qk_layernorm=True, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary},
    )
    theirs, ours = PhiModel(config).eval(), Phi(copy.deepcopy(config))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        ours.load_state_dict({name.replace("final_layernorm", "norm"): t for name, t in theirs.state_dict().items()})
        ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(7).expand(2, -1)
        mask = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.6
        mask |= torch.eye(7, dtype=torch.bool)
        bias = torch.zeros(2, 1, 7, 7).masked_fill(~mask, -1e9)
        hidden = theirs(input_ids=ids, attention_mask=bias, position_ids=positions).last_hidden_state
        x = ours.embed_tokens(ids)
        close(ours(x, positions, mask), hidden)
        assert (hidden - theirs(input_ids=ids).last_hidden_state).abs().max() > 1e-2  # the mask was not ignored
        look = F.pad(torch.ones(7, 7, dtype=torch.bool).tril(), (0, 2)).expand(2, 1, -1, -1)
        cache = ours.new_cache(2, 9)
        parts = [ours(x[:, s], positions[:, s], look[:, :, s], cache, torch.arange(7)[s]) for s in (slice(4), slice(4, 7))]
        close(torch.cat(parts, 1), theirs(input_ids=ids).last_hidden_state)


def test_generation_mask_by_hand():
    """Two padding, two text and three image tokens: text is causal, the image sees all but the padding."""
    assert generation_mask(torch.tensor([[False, False, True, True]]), 3)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
    ]


def test_understanding_mask_by_hand(show_o):
    """[PAD] mmu soi code eoi text text: everything up to the first eoi is seen by all, the rest is causal."""
    pad = show_o.tokenizer.pad_token_id
    ids = torch.tensor([[pad, show_o.mmu, show_o.soi, show_o.mask_id, show_o.eoi, 30, show_o.eoi]])
    assert show_o.question_mask(ids, ids != pad)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 1],
    ]


def test_prompts_are_laid_out_as_published(show_o):
    """As UniversalPrompting.t2i_gen_prompt and inference_mmu.py of showlab/Show-o have them."""
    tokens = show_o.tokenizer
    assert show_o.first_code == show_o.config.llm_vocab_size + 10 == tokens.pad_token_id + 10
    ids, mask = show_o.generation_prompt(["a", "a red circle"])
    text = [tokens.encode(prompt, add_special_tokens=False) for prompt in ("a", "a red circle")]
    bos = eos = tokens.eos_token_id
    rows = [[show_o.t2i, bos, *row, eos] for row in text]
    rows[0] = [tokens.pad_token_id] * (len(rows[1]) - len(rows[0])) + rows[0]
    assert ids.tolist() == rows and torch.equal(mask, ids != tokens.pad_token_id)
    blank, seen = show_o.unconditional(ids, mask)
    empty = [tokens.pad_token_id] * (ids.shape[1] - 3) + [show_o.t2i, bos, eos]
    assert blank.tolist() == [empty, empty] and torch.equal(seen, blank != tokens.pad_token_id)
    canvas = show_o.embed_canvas(torch.arange(9)[None] % 4, torch.arange(9)[None] < 2)
    row = torch.tensor([[show_o.soi, show_o.first_code, show_o.first_code + 1, *[show_o.mask_id] * 7, show_o.eoi]])
    assert show_o.mask_id == show_o.first_code + 4 and torch.equal(canvas, show_o.embed_text(row))
    ids, _ = show_o.question_prompt(["What?"])
    asked = tokens.encode("USER: \nWhat? ASSISTANT:", add_special_tokens=False)
    assert ids.tolist() == [[show_o.mmu, show_o.soi, *[show_o.mask_id] * 9, show_o.eoi, bos, *asked]]


def test_show_o_has_the_published_sizes_and_ids(tmp_path):
    """configs/showo_demo_512x512.yaml and UniversalPrompting of showlab/Show-o, written out: Phi's tokenizer has 50,295
    tokens; [PAD] comes next, then the special ones in this order, the codes, the mask."""
    words = Tokenizer(models.WordLevel({EOS if i == 50256 else f"w{i}": i for i in range(50295)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=EOS, eos_token=EOS).save_pretrained(tmp_path)
    settings = {"vocab_size": 58498, "codebook_size": 8192, "num_vq_tokens": 1024}
    tokens = checkpoint.read_show_o_tokenizer(tmp_path, settings)
    order = "[PAD] <|soi|> <|eoi|> <|sov|> <|eov|> <|t2i|> <|mmu|> <|t2v|> <|v2v|> <|lvg|>".split()
    assert tokens.convert_tokens_to_ids(order) == list(range(50295, 50305))
    with torch.device("meta"):
        model = ShowO(settings, tokens, MAGVITv2({}))
    assert (model.soi, model.eoi, model.t2i, model.mmu, model.first_code, model.mask_id) == (
        50296, 50297, 50300, 50301, 50305, 58497
    )
    trunk, layer = model.language_model, model.language_model.layers[23]
    assert len(trunk.layers) == 24 and trunk.rotary == 32 and layer.self_attn.head_dim == 64
    assert layer.mlp.fc1.weight.shape == (8192, 2048) and model.lm_head.weight.shape == (58498, 2048)
    assert layer.self_attn.k_layernorm.eps == layer.input_layernorm.eps == trunk.norm.eps == 1e-5
    assert trunk.config.rope_parameters["rope_theta"] == 10000 and layer.self_attn.k_proj.weight.shape == (2048, 2048)
    assert (model.guidance, model.steps, model.config.max_seq_length) == (5.0, 50, 128)


def test_padding_does_not_matter_to_show_o(show_o):
    """The hidden states of a prompt's image do not depend on how far the prompt is padded."""
    codes, known = torch.arange(9)[None] % 4, torch.arange(9)[None] % 2 == 0
    ids, mask = show_o.generation_prompt(["a ring"])
    with torch.no_grad():
        alone = show_o.canvas_hidden(ids, mask, codes, known)
        pad = show_o.tokenizer.pad_token_id
        close(show_o.canvas_hidden(F.pad(ids, (5, 0), value=pad), F.pad(mask, (5, 0)), codes, known), alone, 1e-5)
        other = show_o.canvas_hidden(ids, mask, (codes + ~known) % 4, known)
    close(other, alone, 0)  # what is masked is not seen


def test_images_of_a_question_may_be_codes_one_hots_or_pixels(show_o):
    codes = torch.randint(4, (2, 9), generator=torch.Generator().manual_seed(0))
    ids, mask = show_o.question_prompt(["What?", "How many?"])
    expected = ids.clone()
    expected[ids == show_o.mask_id] = (codes + show_o.first_code).flatten()
    for image in (codes, F.one_hot(codes, 4).float(), show_o.to_pixels(codes)):
        close(show_o.embed_question(ids, image), show_o.embed_text(expected), 1e-6)
    assert torch.equal(show_o.see(codes), codes)


# ---- mask-predict ---------------------------------------------------------------------------------------------------

DRAWS = [(0.0, 1.0), (2.0, 0.8)]  # guidance, temperature


@pytest.mark.parametrize("guidance, temperature", DRAWS)
@pytest.mark.parametrize("mode", ["guided", "detached"])
def test_replayed_log_probs_are_the_recorded_ones(show_o, guidance, temperature, mode):
    """Prompts of unequal lengths, so that two rows are padded."""
    images = sample_images(show_o, PROMPTS, [1, 2, 3], guidance, temperature, compiled=False)
    logits = image_logits(show_o, images, guidance, temperature, mode)
    assert logits.requires_grad
    close(images.score(logits)[0], images.logprobs)
    assert (images.logprobs < -0.05).any(1).all()  # not a trivial distribution


def test_replay_sees_planted_faults(show_o, monkeypatch):
    images = sample_images(show_o, PROMPTS, [1, 2, 3], 2.0, 0.8, compiled=False)

    def gap(images=images, guidance=2.0, temperature=0.8, mode="guided"):
        with torch.no_grad():
            return (images.score(image_logits(show_o, images, guidance, temperature, mode))[0] - images.logprobs).abs().max()

    wrong_steps = copy.copy(images)
    wrong_steps.steps = (images.steps + 1) % 5
    assert min(gap(wrong_steps), gap(guidance=1.0), gap(temperature=1.0), gap(mode="conditional")) > 1e-2
    monkeypatch.setattr(sample, "causal", lambda mask, right=sample.causal: right(torch.ones_like(mask)))
    monkeypatch.setattr(sample, "positions_of", lambda mask, right=sample.positions_of: 2 * right(mask))
    assert gap() > 1e-2


@pytest.mark.parametrize("tokens, steps", [(9, 5), (9, 1), (9, 9), (36, 12), (1024, 50)])
def test_mask_schedule_is_the_published_cosine(tokens, steps):
    left, unknown = sample.mask_schedule(tokens, steps), tokens
    for step, masked in enumerate(left[:-1]):
        share = torch.cos(torch.tensor((step + 1) / steps) * math.pi * 0.5)
        assert masked == max(1, min(unknown - 1, int((tokens * share).floor())))
        unknown = masked
    assert sample.mask_schedule(9, 5) == [8, 7, 5, 2, 0]  # 9 cos(18, 36, 54, 72 degrees) is 8.6, 7.3, 5.3, 2.8
    assert left[-1] == 0 and len(left) == steps and (np.diff([tokens, *left]) < 0).all()


def test_more_steps_than_tokens_are_refused():
    with pytest.raises(UserError, match="10 mask-predict steps.* 9 tokens"):
        sample.mask_schedule(9, 10)
    with pytest.raises(UserError, match="10 mask-predict steps.* 9 tokens"):
        small_show_o(steps=10)


def canvases(model, monkeypatch, **settings):
    """The images drawn, and the inputs and outputs of each step."""
    calls, step = [], sample.step_canvas

    def spy(model, cache, codes, known, *rest):
        out = step(model, cache, codes, known, *rest)
        calls.append((codes.clone(), known.clone(), *out))
        return out

    monkeypatch.setattr(sample, "step_canvas", spy)
    return sample_images(model, PROMPTS, [4, 5, 6], 2.0, 1.0, compiled=False), calls


def test_commits_follow_the_schedule_and_never_change(show_o, monkeypatch):
    images, calls = canvases(show_o, monkeypatch)
    left = sample.mask_schedule(9, 5)
    for step, (codes, known, drawn, logprobs, commit) in enumerate(calls):
        assert not (known & commit).any()
        assert (9 - (known | commit).sum(1) == left[step]).all()
        assert torch.equal(images.codes[known], codes[known])
        assert torch.equal(images.codes[commit], drawn[commit]) and (images.steps[commit] == step).all()
        assert torch.equal(images.logprobs[commit], logprobs[commit])
    assert len(calls) == 5 and images.replay is None  # every step's codes are scored


def test_the_most_confident_are_committed_with_the_published_noise(show_o, monkeypatch):
    """log-prob + temperature x Gumbel, the temperature multiplied by (1 - ratio) at every step; recomputed from the
    images' own random numbers."""
    _, calls = canvases(show_o, monkeypatch)
    temperature, left = 1.0, sample.mask_schedule(9, 5)
    for step, (_, known, _, logprobs, commit) in enumerate(calls):
        temperature = temperature * (1.0 - (step + 1) / 5)
        for row, seed in enumerate([4, 5, 6]):
            numbers = torch.rand(5 * 2 * 9, generator=sample.generator(seed, sample.IMAGE)).view(5, 2, 9)[step, 1]
            confidence = logprobs[row] + temperature * -torch.log(-torch.log(numbers))
            unknown = [n for n in range(9) if not known[row, n]]
            best = sorted(unknown, key=lambda n: -confidence[n])[: len(unknown) - left[step]]
            assert sorted(best) == commit[row].nonzero().flatten().tolist()


@pytest.mark.parametrize("compiled", [False, True])
def test_one_step_draws_every_code_independently(compiled):
    """With one step, all codes at once: chi-square of pairs of codes against the product of their softmaxes."""
    model = small_show_o(tokens=4, steps=1)
    images = sample_images(model, ["a"] * 4000, range(4000), 1.0, 1.0, compiled)
    with torch.no_grad():
        ids, mask = model.generation_prompt(["a"])
        branches = [
            model.generation_head(model.canvas_hidden(*row, images.codes[:1], torch.zeros(1, 4, dtype=torch.bool)))
            for row in ((ids, mask), model.unconditional(ids, mask))
        ]
    p = (2 * branches[0] - branches[1]).softmax(-1)[0].double()  # [4, V]: (1 + w) l_cond - w l_uncond, w = 1
    for a, b in ((0, 1), (2, 3), (0, 3)):
        expected = 4000 * p[a][:, None] * p[b]
        counts = torch.zeros(4, 4, dtype=torch.double)
        counts.index_put_((images.codes[:, a], images.codes[:, b]), torch.ones(4000, dtype=torch.double), accumulate=True)
        likely = expected > 2
        assert counts[~likely].sum() < 40
        assert ((counts - expected) ** 2 / expected)[likely].sum() < 45  # chi-square of 15 degrees: 1e-4 at 44


def test_same_seed_same_image_whatever_the_batch(show_o):
    together = sample_images(show_o, PROMPTS, [7, 8, 9], 2.0, 1.0, compiled=False)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, [7, 8, 9])):
        alone = sample_images(show_o, [prompt], [seed], 2.0, 1.0, compiled=False)
        assert torch.equal(alone.codes[0], together.codes[row]) and torch.equal(alone.steps[0], together.steps[row])
        close(alone.logprobs[0], together.logprobs[row])
    other = sample_images(show_o, PROMPTS, [17, 18, 19], 2.0, 1.0, compiled=False)
    assert not torch.equal(other.codes, together.codes)


def test_compiled_mask_predict_draws_the_same_codes(show_o):
    eager, compiled = (sample_images(show_o, PROMPTS, [1, 2, 3], 2.0, 1.0, compiled=on) for on in (False, True))
    assert torch.equal(eager.codes, compiled.codes) and torch.equal(eager.steps, compiled.steps)
    close(eager.logprobs, compiled.logprobs)


def test_answers_of_show_o_are_scored_as_they_were_drawn(show_o):
    """With a cache, the image first and padded questions; and greedy equals decoding without a cache."""
    codes = torch.randint(4, (3, 9), generator=torch.Generator().manual_seed(0))
    answers = sample_answers(show_o, codes, QUESTIONS, [1, 2, 3], 0.9, max_tokens=6)
    logits = answer_logits(show_o, codes, QUESTIONS, answers.ids)
    close(token_logprobs(logits / 0.9, answers.ids) * answers.mask, answers.logprobs)
    greedy = sample_answers(show_o, codes, QUESTIONS, max_tokens=6)
    for row, question in enumerate(QUESTIONS):
        ids, mask = show_o.question_prompt([question])
        for token in greedy.ids[row][greedy.mask[row]]:
            x = show_o.embed_question(ids, codes[row : row + 1])
            look = show_o.question_mask(ids, mask)
            hidden = show_o.language_model(x, torch.arange(ids.shape[1])[None], look)
            assert token == show_o.lm_head(hidden[:, -1]).argmax()
            if token == show_o.mask_id:  # which stands for the image in this test's loop
                break
            ids, mask = F.pad(ids, (0, 1), value=token.item()), F.pad(mask, (0, 1), value=True)


def test_weights_of_a_random_subset_are_unbiased(show_o):
    """Over all subsets of the steps the weighted mean is, on average, the mean over all codes; and each subset's scored
    log-probs are the recorded ones."""
    images = sample_images(show_o, PROMPTS, [1, 2, 3], 2.0, 1.0, compiled=False)
    means = []
    for subset in combinations(range(5), 2):
        replay = torch.tensor(subset).expand(3, -1)
        weights = 5 / 2 * (images.steps[..., None] == replay[:, None]).any(-1)
        part = dataclasses.replace(images, replay=replay, weights=weights)
        means.append(part.mean(images.logprobs))
    close(torch.stack(means).mean(0), images.mean(images.logprobs), 1e-6)
    close(images.mean(images.logprobs), images.logprobs.mean(1), 1e-6)
    seeds = range(300)
    many = sample_images(show_o, ["a"] * 300, seeds, 0.0, 1.0, compiled=False)
    some = sample.choose_scored(show_o, many, seeds, "replay", 2)
    drawn = Counter(tuple(sorted(row)) for row in some.replay.tolist())
    assert len(drawn) == 10 and sum((n - 30) ** 2 / 30 for n in drawn.values()) < 34  # chi-square of 9 degrees
    with torch.no_grad():
        close(some.score(image_logits(show_o, some, 0.0, 1.0))[0], some.logprobs)
    assert torch.equal(some.weights, 2.5 * (many.steps[..., None] == some.replay[:, None]).any(-1))
    assert torch.equal(some.logprobs != 0, some.weights > 0)


def test_remasking_scores_what_is_masked_given_the_rest(show_o):
    images = sample_images(show_o, PROMPTS, [1, 2, 3], 2.0, 1.0, compiled=False)
    again = sample.choose_scored(show_o, images, [1, 2, 3], "remask", None, 2.0, 1.0, "guided")
    for row in range(3):
        hidden = [n for n in range(9) if again.weights[row, n] > 0]
        assert again.weights[row, hidden].tolist() == pytest.approx([9 / len(hidden)] * len(hidden))
        known = torch.tensor([[n not in hidden for n in range(9)]])
        ids, mask = images.ids[row : row + 1], images.mask[row : row + 1]
        with torch.no_grad():
            cond, uncond = (
                show_o.generation_head(show_o.canvas_hidden(*rows, images.codes[row : row + 1], known))[0]
                for rows in ((ids, mask), show_o.unconditional(ids, mask))
            )
        expected = (3 * cond - 2 * uncond).log_softmax(-1)
        for n in range(9):
            value = expected[n, images.codes[row, n]].item() if n in hidden else 0.0
            assert again.logprobs[row, n].item() == pytest.approx(value, abs=1e-4)
    many = sample.choose_scored(show_o, sample_images(show_o, ["a"] * 400, range(400), 0.0, compiled=False), range(400),
                                "remask", None, 0.0, 1.0, "guided")
    sizes = (many.weights > 0).sum(1).double()
    u = torch.linspace(0, 1, 100_001, dtype=torch.double)
    expected = (9 * torch.cos(math.pi / 2 * u)).round().clamp(1, 9)
    assert abs(sizes.mean() - expected.mean()) < 4 * expected.std() / 20
    assert ((many.weights > 0).double().mean(0) - expected.mean() / 9).abs().max() < 0.1  # every place alike


# ---- both estimators on a toy, and in the trainers ------------------------------------------------------------------

ORDER = torch.tensor([1, 0, 0, 1])  # which step commits which of the toy's four codes
ALL_IMAGES = torch.tensor(list(product(range(2), repeat=4)))  # [16, 4]


@pytest.fixture
def toy():
    """Sixteen images of four codes of two kinds, drawn in two steps."""
    return small_show_o(codes=2, tokens=4, steps=2).double()


def toy_probabilities(model: ShowO, weight: float = 3.0) -> torch.Tensor:
    """Of each image, given the order: the first step's codes given masks alone, the second's given the first's."""
    ids, mask = (rows.expand(16, -1) for rows in model.generation_prompt(["a"]))
    total = 0.0
    for step in (0, 1):
        known = (ORDER < step).expand(16, -1)
        cond, uncond = (
            model.lm_head(model.canvas_hidden(*rows, ALL_IMAGES, known))[..., model.first_code : -1]
            for rows in ((ids, mask), model.unconditional(ids, mask))
        )
        logprobs = (uncond + weight * (cond - uncond)).log_softmax(-1)
        for n in (ORDER == step).nonzero().flatten():
            total = total + logprobs[range(16), n, ALL_IMAGES[:, n]]
    return total.exp()


def toy_images(model: ShowO) -> Images:
    ids, mask = (rows.expand(16, -1) for rows in model.generation_prompt(["a"]))
    images = Images(ALL_IMAGES, torch.zeros(16, 4), ids, mask, ORDER.expand(16, -1))
    with torch.no_grad():
        return dataclasses.replace(images, logprobs=images.score(image_logits(model, images, 2.0, 1.0))[0])


def test_replayed_trajectories_have_their_enumerated_probabilities(toy):
    probabilities = toy_probabilities(toy)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-12)
    assert torch.allclose(toy_images(toy).logprobs.sum(1).exp(), probabilities, atol=1e-12)


def test_policy_gradient_through_replay_equals_the_enumerated_one(toy):
    """Weighting each image's advantage by its probability, the objective's gradient is that of minus the expected
    reward, over the number of tokens; so is the mean over the subsets of one step."""
    rewards = torch.rand(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights, probabilities = list(toy.language_model.parameters()), toy_probabilities(toy)
    exact = torch.autograd.grad(-(probabilities * rewards).sum() / 4, weights)
    images = toy_images(toy)
    subsets = [images]
    for step in (0, 1):
        counts = 2.0 * (images.steps == step)
        subsets.append(dataclasses.replace(
            images, replay=torch.full((16, 1), step), weights=counts, logprobs=images.logprobs * (counts > 0)
        ))
    gradients = []
    for part in subsets:
        rollout = grpo.Rollout([], [], part, None, None, reference_images=part.logprobs)
        loss, _ = grpo.objective(toy, toy, rollout, (probabilities * rewards).detach(), flags(guidance=2.0))
        gradients.append(torch.autograd.grad(loss, weights))
    for whole, first, second, true in zip(*gradients, exact):
        assert torch.allclose(whole, true, atol=1e-10) and torch.allclose((first + second) / 2, true, atol=1e-10)
    assert max((first - second).abs().max() for _, first, second in zip(*gradients)) > 1e-3  # they are different


def test_remasking_has_its_enumerated_mean(toy):
    """Over sizes and places of the mask: E of the mean log-prob of what is masked given the rest."""
    codes = ALL_IMAGES[9:10]
    ids, mask = toy.generation_prompt(["a"])
    share = torch.linspace(0, 1, 400_001, dtype=torch.double)
    sizes = (4 * torch.cos(math.pi / 2 * share)).round().clamp(1, 4)
    exact = 0.0
    with torch.no_grad():
        for m in range(1, 5):
            for hidden in map(list, combinations(range(4), m)):
                known = torch.tensor([[n not in hidden for n in range(4)]])
                logits = toy.generation_head(toy.canvas_hidden(ids, mask, codes, known))
                value = token_logprobs(logits, codes)[0, hidden].mean()
                exact += (sizes == m).double().mean() / math.comb(4, m) * value
        B = 3000
        images = Images(*(rows.expand(B, -1) for rows in (codes, codes, ids, mask, ORDER[None])))
        images = sample.choose_scored(toy, images, range(B), "remask", None, 0.0, 1.0, "guided")
        values = images.mean(images.logprobs)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(B) and values.std() > 0.1


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sampler_draws_trajectories_with_their_enumerated_probabilities(compiled):
    """Two codes in two steps, which code comes first included: that is by confidence, whose Gumbel noise is halved, so
    with probability sigmoid(difference of the log-probs / 0.5)."""
    model = small_show_o(2, codes=2, tokens=2, steps=2).double()
    with torch.no_grad():
        model.lm_head.weight *= 0.35
        rows = model.generation_prompt(["a"])

        def logprobs(codes, known):
            cond, uncond = (
                model.generation_head(model.canvas_hidden(*r, torch.tensor([codes]), torch.tensor([known])))[0]
                for r in (rows, model.unconditional(*rows))
            )
            return (2 * cond - uncond).log_softmax(-1)

        first, expected = logprobs([0, 0], [False, False]), torch.zeros(2, 2, 2, dtype=torch.double)  # [first place, codes]
        for codes in product(range(2), repeat=2):
            drawn = [first[n, codes[n]] for n in (0, 1)]
            for place in (0, 1):
                chosen = (sum(drawn)).exp() * torch.sigmoid((drawn[place] - drawn[1 - place]) / 0.5)
                second = logprobs(list(codes), [n == place for n in (0, 1)])[1 - place].exp()
                for other in (0, 1):
                    image = [codes[place] if n == place else other for n in (0, 1)]
                    expected[place, image[0], image[1]] += chosen * second[other]
        images = sample_images(model, ["a"] * 8000, range(8000), 1.0, 1.0, compiled)
    counts = torch.zeros_like(expected)
    counts.index_put_((images.steps[:, 0], *images.codes.T), torch.ones(8000, dtype=torch.double), accumulate=True)
    assert expected.sum().item() == pytest.approx(1, abs=1e-9) and (expected * 8000).min() > 5
    assert ((counts - expected * 8000) ** 2 / (expected * 8000)).sum() < 30  # chi-square of 7 degrees: 1e-4 at 29.9


ESTIMATORS = [dict(), dict(replay_steps=2), dict(estimator="remask")]


@pytest.mark.parametrize("mode", ["two-stage", "end-to-end"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_first_update_of_show_o_is_on_policy(show_o, estimator, mode):
    """Ratio 1 and KL 0 to the reference, whatever part of the trajectory is scored."""
    args = flags(guidance=2.0, temperature=0.9, no_compile=True, max_tokens=4, tau=1.0, mode=mode, beta=0.1,
                 answer_weight=1.0, **estimator)
    tasks = [draw_task(shapes.VOCABULARY, np.random.default_rng(i)) for i in range(3)]
    rollout = grpo.roll_out(show_o, show_o, tasks, [5, 6, 7], args)
    grpo.score_by_reference(frozen_copy(show_o), rollout, args)
    loss, sums = grpo.objective(show_o, show_o, rollout, torch.tensor([1.0, -1.0, 0.5]), args)
    assert sums["ratio"].item() == pytest.approx(3, abs=1e-4)
    for key in ("kl_image", "kl_answer", "rollout_difference", "clipped"):
        assert sums[key].item() == pytest.approx(0, abs=1e-4)
    gradients = torch.autograd.grad(loss, list(show_o.parameters()))
    assert all(g.isfinite().all() for g in gradients) and any(g.abs().max() > 1e-4 for g in gradients)


@pytest.mark.parametrize("mode", ["two-stage", "end-to-end"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_sft_objective_of_show_o(show_o, estimator, mode):
    args = flags(guidance=2.0, no_compile=True, max_tokens=4, tau=1.0, mode=mode, beta=0.1, **estimator)
    tasks = [draw_task(shapes.VOCABULARY, np.random.default_rng(i)) for i in range(3)]
    rollout = sft.roll_out(show_o, show_o, tasks, [5, 6, 7], args)
    kept = [sft.Kept(task.prompt, *row) for task, *row in zip(tasks, rollout.images.codes, rollout.images.steps)]
    empty = torch.tensor([False, True, False])
    loss, sums = sft.objective(show_o, show_o, frozen_copy(show_o), rollout, kept, empty, args)
    assert sums["kl_image"].item() == pytest.approx(0, abs=1e-4)
    assert sums["rollout_difference"].item() == pytest.approx(0, abs=1e-4)
    if mode == "two-stage":  # the same pictures: minus their recorded log-probs, but for the one without its prompt
        mean = -rollout.images.mean(rollout.images.logprobs)
        losses = sft.replay_loss(show_o, kept, empty, rollout.seeds, args)
        close(losses[[0, 2]], mean[[0, 2]])
        assert abs(losses[1] - mean[1]) > 1e-3 and sums["loss_image"].item() == pytest.approx(losses.sum().item())
    loss.backward()
    assert all(w.grad.isfinite().all() for w in show_o.parameters())
    show_o.zero_grad()


def test_relaxed_gradient_counts_each_code_as_often_as_its_weight():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codes, target = torch.tensor([[0, 1, 2], [3, 0, 1]]), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([[2.0, 0, 1], [0, 3, 0.5]])
    plain, weighted = (
        torch.autograd.grad((relaxed_codes(logits, codes, 1.0, [1, 2], w) * target).sum(), logits)[0] for w in (None, weights)
    )
    close(weighted, plain * weights[..., None], 1e-6)
    assert torch.equal(relaxed_codes(logits, codes, 1.0, [1, 2], weights), F.one_hot(codes, 4).float())


@pytest.mark.parametrize("script", ["grpo", "sft"])
def test_end_to_end_gradient_of_subsets_is_that_of_all_steps(show_o, script):
    """Of the answer's loss through the picture, averaged over the replayed step."""
    judge, task = frozen_copy(show_o), draw_task(shapes.VOCABULARY, np.random.default_rng(0))
    args = flags(guidance=2.0, mode="end-to-end", beta=0.0, tau=1.0, answer_weight=float(script == "grpo"), image_weight=1.0,
                 picture_clip=1e9, prompts=1, group=1, no_compile=True, max_tokens=4, judge="frozen")
    rollout = grpo.roll_out(show_o, judge, [task], [5], args)
    whole, gradients = rollout.images, []
    for subset in (range(5), *([step] for step in range(5))):
        replay = torch.tensor([list(subset)])
        weights = 5 / len(subset) * (whole.steps[..., None] == replay[:, None]).any(-1)
        rollout.images = dataclasses.replace(whole, replay=replay, weights=weights, logprobs=whole.logprobs * (weights > 0))
        if script == "grpo":
            grpo.score_by_reference(judge, rollout, args)
            loss, _ = grpo.objective(show_o, judge, rollout, torch.ones(1), args)
        else:
            loss, _ = sft.objective(show_o, judge, judge, rollout, [], torch.tensor([False]), args)
        gradients.append(torch.autograd.grad(loss, show_o.lm_head.weight)[0])
    close(torch.stack(gradients[1:]).mean(0), gradients[0], 1e-5)
    assert gradients[0].abs().max() > 1e-4


def test_flags_without_meaning_are_refused(show_o, tiny):
    def fill(model, *arguments):
        args = grpo.parse_args(["--prompts", "2", "--group", "2", *arguments])
        fill_in(args, grpo.TINY, model, 1)
        return args

    for arguments in (["--draw-steps", "4"], ["--estimator", "replay"], ["--replay-steps", "2"]):
        with pytest.raises(UserError, match=f"{arguments[0]} .*no meaning for a Janus"):
            fill(tiny, *arguments)
    for arguments, words in (
        (["--draw-steps", "10"], "10 mask-predict steps.* 9 tokens"),
        (["--replay-steps", "6"], "--replay-steps 6.* drawn in 5 steps"),
        (["--replay-steps", "2", "--estimator", "remask"], "no meaning with --estimator remask"),
        (["--freeze", "vision_model"], "--freeze vision_model: tiny has vqmodel, language_model, lm_head"),
    ):
        with pytest.raises(UserError, match=words):
            fill(show_o, *arguments)
    model = copy.deepcopy(show_o)
    args = fill(model, "--draw-steps", "7", "--replay-steps", "6")
    assert (args.draw_steps, model.steps, args.replay_steps, args.freeze) == (7, 7, 6, ["vqmodel"])
    assert fill(show_o).replay_steps == 3 and fill(show_o, "--replay-steps", "0").replay_steps == 0
    assert fill(show_o, "--estimator", "remask").replay_steps is None
    assert fill(tiny).replay_steps is None and fill(tiny).freeze == ["vision_model", "vqmodel"]


def test_prompt_longer_than_the_text_window_is_refused():
    model = small_show_o(max_seq_length=4)
    model.generation_prompt(["a"])
    with pytest.raises(UserError, match="'a red circle'.* text window 4"):
        model.generation_prompt(["a", "a red circle"])


# ---------------------------------------------------------------------------------------------------------------------
# watch.py: whether a run fools itself


def gauge(self_reward, detector, true_pictures):
    return {"self-reward": self_reward, "detector": detector, "true pictures": true_pictures}


@pytest.mark.parametrize("now, images, margin, expected", [
    ((0.6, 0.5, 1.0), 240, 0.02, []),  # all is well
    ((0.6, 0.3, 1.0), 240, 0.02, ["detector"]),
    ((0.6, 0.5, 0.95), 240, 0.02, ["true pictures"]),
    ((0.6, 0.3, 0.9), 240, 0.02, ["detector", "true pictures"]),
    ((0.5, 0.3, 0.9), 240, 0.02, ["detector", "true pictures"]),  # it does not notice
    ((0.3, 0.3, 0.9), 240, 0.02, []),  # worse, but it knows
    ((0.6, 0.45, 1.0), 240, 0.02, []),  # within two standard errors: 2 sqrt(0.25 / 720 + 0.2475 / 240) = 0.074
    ((0.6, 0.42, 1.0), 240, 0.02, ["detector"]),
    ((0.6, 0.42, 1.0), 240, 0.1, []),  # within the margin
    ((0.6, 0.5, 0.985), 10_000, 0.02, []),
    ((0.6, None, 0.95), 240, 0.02, ["true pictures"]),  # no detector
    ((0.6, None, None), 240, 0.02, []),
])
def test_what_fell_while_the_self_reward_did_not(now, images, margin, expected):
    before = gauge(0.5, 0.5, 1.0)
    before = {name: None if value is None else before[name] for name, value in gauge(*now).items()}
    counts = [dict.fromkeys(gauge(0, 0, 0), n) for n in (720, images)]
    assert watch.falls(before, gauge(*now), counts, margin) == expected


def test_chance_alone_is_seldom_called_a_gap():
    """Two samples of pictures of one and the same model differ by more than two standard errors downwards in about 2.3 %
    of the cases (the normal distribution's tail), were there no margin at all."""
    rng, false = np.random.default_rng(0), 0
    counts = [dict.fromkeys(gauge(0, 0, 0), n) for n in (720, 240)]
    for _ in range(20_000):
        first, second = rng.binomial(720, 0.5) / 720, rng.binomial(240, 0.5) / 240
        false += bool(watch.falls(gauge(0.5, first, None), gauge(0.6, second, None), counts, 0.0))
    assert abs(false / 20_000 - 0.0228) < 0.004


def fooled_after(well, script, monkeypatch):
    """All measurements but the first `well` say that the model sees less and believes more."""
    true, calls = evaluate, []

    def measured(*a, **k):
        scores, records = true(*a, **k)
        calls.append(scores)
        if len(calls) > well:
            scores["understanding"] |= {"own_images": 1.0, "ground_truth": 0.1}
        else:
            scores["understanding"] |= {"own_images": 0.5, "ground_truth": 0.9}
        return scores, records

    monkeypatch.setattr(script, "evaluate", measured)


@pytest.mark.parametrize("script", [grpo, sft])
def test_a_run_that_fools_itself_says_so_and_can_stop(script, small, tmp_path, monkeypatch, capsys):
    """Start, step 1 well, step 2 not: a warning, or with --stop-on-gap an end that is saved; the run then goes on."""
    every = shapes.held_out_tasks()
    monkeypatch.setattr(shapes, "held_out_tasks", lambda: every[::20])
    life = ["--steps", 3, "--prompts", 2, "--group", 3, "--eval-every", 1, "--eval-images", 1, "--no-compile", "--max-tokens", 4]
    start = ["--model", small, *life, "--out", tmp_path / "run"]
    fooled_after(2, script, monkeypatch)
    with user_error("stopped after step 2, which is saved", "self-reward 0.500 -> 1.000", "true pictures 0.900 -> 0.100"):
        main_here(monkeypatch, *start, "--stop-on-gap", script=script)
    assert [line.get("held_out", {}).get("parted") for line in read_metrics(tmp_path / "run")] == [[], ["true pictures"]]
    assert resume.last_whole(tmp_path / "run") == 2
    fooled_after(0, script, monkeypatch)
    main_here(monkeypatch, "--resume", tmp_path / "run", "--no-stop-on-gap", script=script)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["parted"] == {"2": ["true pictures"], "3": ["true pictures"]}
    said = capsys.readouterr()
    assert "warning: step 2" in said.out + said.err and "had parted at step 2, 3" in said.out
    red = np.asarray(Image.open(tmp_path / "run" / "curves.png")) == (0xD0, 0x30, 0x30)
    assert red.all(-1).any(), "the curves show where they parted"


def test_metrics_and_sheets_reach_tensorboard(small, tmp_path, monkeypatch):
    """Every number of metrics.jsonl and the sheets; where it is not installed, one line before anything starts."""
    every = shapes.held_out_tasks()
    monkeypatch.setattr(shapes, "held_out_tasks", lambda: every[::20])
    start = ["--model", small, *LIFE, "--steps", 2, "--eval-every", 1, "--tensorboard", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(watch.importlib.util, "find_spec", lambda name: None)
        with user_error("--tensorboard", "pip install tensorboard"):
            main_here(patch, *start, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main_here(monkeypatch, *start, tmp_path / "run")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for line in read_metrics(tmp_path / "run"):
        for key in ("reward", "loss", "kl_image", "lr"):
            assert [e.value for e in events.Scalars(key) if e.step == line["step"]] == [pytest.approx(line[key], rel=1e-6)]
    assert len(events.Scalars("held_out/self_reward")) == 1
    assert [e.step for e in events.Images("samples")] == [1, 2] and [e.step for e in events.Images("after")] == [2]


def test_the_gauge_of_a_real_model_takes_a_detector_and_a_folder(small, scorers, true_pictures, tmp_path, monkeypatch, capsys):
    """Understanding of a folder's pictures is the share of right answers to its questions, one by one; the detector is
    evaluate.py's. With neither the run says that nothing independent is measured."""
    model = load(small)
    lines, images = true_pictures
    folder = put(tmp_path / "true", lines[::15], images[::15])
    tasks = shapes.held_out_tasks()[::15]
    world = dataclasses.replace(world_of(model), suite=shapes.held_out_tasks()[::30])
    args = argparse.Namespace(detector=None, detector_clip=None, true_images=str(folder), tensorboard=False)
    watch.add_measures(world, args, torch.device("cpu"))
    scores, _ = evaluate(model, world, 3.0, images_per_prompt=1, compiled=False)
    right = [[score(sample_answers(model, to_pixels(picture[None], model.device), [task.question]).texts[0], task, shapes.VOCABULARY) == 1
              for picture in pictures] for task, pictures in zip(tasks, images[::15])]
    by_tag = {tag: np.mean([r for r, task in zip(right, tasks) if task.tag == tag]) for tag in TAGS}
    assert scores["understanding"]["ground_truth_by_category"] == pytest.approx(by_tag)
    assert scores["understanding"]["ground_truth"] == pytest.approx(np.mean(list(by_tag.values())))

    real = tmp_path / "real"
    save(small_janus(), real)  # lives in no world of its own
    suite = geneval_suite()[::60]
    monkeypatch.setattr(evaluate_module, "geneval_suite", lambda: suite)
    shape = ["--model", real, *LIFE, "--steps", 2, "--eval-every", 1, "--micro-batch", 6]
    main_here(monkeypatch, *shape, "--out", tmp_path / "blind")
    assert "nothing independent is measured" in capsys.readouterr().err
    assert read_metrics(tmp_path / "blind")[0]["held_out"]["detector"] is None
    main_here(monkeypatch, *shape, "--out", tmp_path / "seen", "--detector", scorers / "detector", "--detector-clip", scorers / "clip")
    assert "nothing independent" not in capsys.readouterr().err
    assert 0 <= read_metrics(tmp_path / "seen")[0]["held_out"]["detector"] <= 1
    with user_error("asks for", "the geneval world does not know"):
        main_here(monkeypatch, *shape, "--out", tmp_path / "no", "--true-images", folder)
    with user_error("is not in GenEval's layout"):
        main_here(monkeypatch, *shape, "--out", tmp_path / "no", "--true-images", tmp_path)
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------------------
# ablate.py and report.py: many runs, and what is made of them


def test_students_quantiles():
    """The integral of the density of Student's t from minus to plus each quantile is 0.95."""
    for freedom, quantile in enumerate(report.STUDENT, 1):
        at = np.linspace(-quantile, quantile, 200_001)
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        density = scale * (1 + at**2 / freedom) ** (-(freedom + 1) / 2)
        inside = float(((density[1:] + density[:-1]) / 2).sum() * (at[1] - at[0]))
        assert inside == pytest.approx(0.95, abs=1e-4), freedom


def test_the_interval_holds_the_mean_in_19_of_20_cases():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(4000):
        mean, half = report.interval(rng.normal(0.3, 0.1, 5))
        hits += abs(mean - 0.3) <= half
    assert abs(hits / 4000 - 0.95) < 0.012
    assert math.isnan(report.interval([0.1])[1]) and math.isnan(report.interval([])[0])


def test_every_ablation_is_a_command_that_its_script_takes():
    jobs = ablate.jobs(ablate.MODELS, None, 2)
    assert len(set(jobs)) == len(jobs) and len({job.folder for job in jobs}) == len(jobs)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs), "every cell gets seed 0 first"
    for job in jobs:
        script = {"grpo.py": grpo, "sft.py": sft}[job.command[0]]
        args = script.parse_args(job.command[1:])
        assert (args.model, args.seed) == (job.model, job.seed)
        if job.full:
            assert args.steps is args.prompts is args.lr is None, "the script's own"
        else:
            assert args.prompts * args.group == ablate.IMAGES
    for model in ablate.MODELS:
        named = [name for names in report.tables(model).values() for name in names]
        assert set(named) == set(ablate.cells(model)), "every cell stands in a table"


STUB = """
import json, pathlib, sys
words = sys.argv
out = pathlib.Path(words[words.index("--resume" if "--resume" in words else "--out") + 1])
with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
    calls.write(" ".join([*words[1:], "before" * (out / "before.json").exists()]) + chr(10))
trouble = pathlib.Path(__file__).with_name("trouble")
what = trouble.read_text() if trouble.exists() and "seed1" in str(out) else ""
out.mkdir(parents=True, exist_ok=True)
scores = {"generation": {"overall": 0.5}, "understanding": {"ground_truth": 1.0, "own_images": 0.5},
          "imbalance": dict.fromkeys(["answered_given_drawn", "drawn_given_answered", "disagreement"], 0.25)}
(out / "args.json").write_text('{"prompts": 4, "group": 3}')
(out / "before.json").write_text(json.dumps(scores)), (out / "before.png").write_text("")
line = {"step": 1, "reward": 0.5, "kl_image": 0.1, "entropy_image": 1.0, "seconds": 30.0}
(out / "metrics.jsonl").write_text(json.dumps(line) + chr(10))
if what:
    sys.exit(None if what == "signal" else what)
scores = {**scores, "generation": {"overall": 0.75}}
(out / "summary.json").write_text(json.dumps({"before": json.loads((out / "before.json").read_text()), "after": scores}))
"""


def test_the_runs_of_the_ablations_can_be_stopped_and_called_again(tmp_path, monkeypatch):
    """With a stand-in for the trainers: what was interrupted is resumed, what is done is not done again, the scores of the
    start are measured once a model, a run's own stop is a result, a fault ends everything with its last line."""
    for script in ("grpo.py", "sft.py"):
        (tmp_path / script).write_text(STUB)
    monkeypatch.setattr(ablate, "HERE", tmp_path)
    monkeypatch.setattr(ablate.os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(ablate.os, "sched_setaffinity", lambda pid, cores: None, raising=False)
    path, runs, jobs = tmp_path / "results.json", tmp_path / "runs", ablate.jobs(["tiny"], ["grpo", "beta 0"], 2)
    calls = lambda: (tmp_path / "calls").read_text().splitlines()
    (tmp_path / "trouble").write_text("signal")
    ablate.perform_all(jobs, path, runs)
    results = lambda: {(r["cell"], r["seed"]): r for r in ablate.read_results(path)["runs"]}
    assert set(results()) == {("grpo", 0), ("beta 0", 0)} and len(calls()) == 4
    assert [line.endswith("before") for line in calls()] == [False, True, True, True]
    (tmp_path / "trouble").write_text("error: stopped at step 1: the KL is out of bounds")
    ablate.perform_all(jobs, path, runs)
    assert len(results()) == 4 and all("--resume" in line for line in calls()[4:]) and len(calls()) == 6
    assert results()["grpo", 1]["stopped"].startswith("stopped at step 1") and "after" not in results()["grpo", 1]
    assert results()["grpo", 0]["after"]["generation"]["overall"] == 0.75 and results()["grpo", 0]["images"] == 12
    ablate.perform_all(jobs, path, runs)
    assert len(calls()) == 6, "nothing is run twice"
    assert any(" 1 (1 stopped) |" in row for row in report.table(list(results().values()), "tiny", ["grpo"]))
    (tmp_path / "trouble").write_text("ZeroDivisionError: division by zero")
    with user_error("failed: ZeroDivisionError", "seed1.log"):
        ablate.perform_all(ablate.jobs(["tiny"], ["sft"], 2), path, runs)
    called = len(calls())
    ablate.perform_all(jobs[:2], tmp_path / "again.json", runs)
    assert len(calls()) == called and len(ablate.read_results(tmp_path / "again.json")["runs"]) == 2, "what ended is read"
    monkeypatch.setattr(ablate, "COMMON", {**ablate.COMMON, "tiny": "--steps 1"})
    with user_error("was run with other flags"):
        ablate.perform_all(jobs, path, runs)
    with user_error("begun with other flags", "--runs"):
        ablate.perform_all(jobs, tmp_path / "other.json", runs)
    (tmp_path / "again.json").write_text('{"runs": []}')
    with user_error("again.json", "no results"):
        ablate.read_results(tmp_path / "again.json")


def fake_run(cell, seed, after, model="tiny"):
    scores = lambda overall: {"generation": {"overall": overall}, "ground_truth": 1.0, "own_images": 0.6, "disagreement": 0.1}
    return {"model": model, "cell": cell, "seed": seed, "before": scores(0.5), "after": scores(after), "seconds": [60.0, 60.0],
            "reward": [0.5, 0.6], "images": 96, "held_out": [[1, 0.55, 0.6, 1.0]]}


def test_tables_hold_means_and_intervals():
    """By hand: changes 0.1, 0.2, 0.3 have mean 0.2, deviation 0.1 and so 4.303 x 0.1 / sqrt(3) = 0.248; against the other
    cell, seed by seed, 0.1, 0.1, 0.1."""
    results = [fake_run("grpo", s, 0.6 + 0.1 * s) for s in range(3)] + [fake_run("beta 0", s, 0.7 + 0.1 * s) for s in range(3)]
    rows = report.table(results, "tiny", ["grpo", "beta 0", "beta 0.1"])
    assert len(rows) == 4 and "| 3 | 0.500 | +0.200 ± 0.248 |  | +0.000 ± 0.000 | +0.000 ± 0.000 |" in rows[2]
    assert rows[2].endswith("| 2.0 |") and "| +0.300 ± 0.248 | +0.100 ± 0.000 |" in rows[3]
    assert "| beta 0 | +0.100 ± 0.000 (3 seeds) | - |" in report.settings_table(results)
    assert any(row.startswith("| GRPO two-stage | 3 | +0.200 ± 0.248 |") for row in report.methods_table(results))
    results += [fake_run("full sft", s, 0.9) for s in range(12)]
    results += [fake_run("guidance 2", 0, 0.7)]
    full = report.table(results, "tiny", report.tables("tiny")[report.FULL])
    assert "| 12 | 0.500 | +0.400 ± 0.000 |" in full[2] and len(full) == 3, "beyond the table of quantiles, too"
    assert "| guidance 2 | 0.500 → 0.700 (1 seeds) | - |" in report.settings_table(results)


def test_a_readme_without_the_marks_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with user_error("README.md", "lacks the marks", "full"):
        report.write_readme({"runs": []}, tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_readmes_tables_are_those_of_the_results(tmp_path):
    """What report.py would write into README.md and figures/ablation.md is what stands there."""
    content = ablate.read_results(ROOT / "figures" / "ablation.json")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    report.write_readme(content, tmp_path / "README.md")
    report.write_tables(content, tmp_path / "ablation.md")
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "ablation.md").read_text() == (ROOT / "figures" / "ablation.md").read_text()
    commands = {(job.model, job.cell, job.seed): job.line for job in ablate.jobs(ablate.MODELS, None, 100)}
    assert all(commands[r["model"], r["cell"], r["seed"]] == r["command"] for r in content["runs"])


def test_a_pair_is_of_the_same_prompts_and_seeds(small, tmp_path, monkeypatch):
    """Rows in turn of the first model's and of the second one's pictures, of the same prompts: equal where they are one
    model, and else not."""
    sheets = []
    monkeypatch.setattr(report, "contact_sheet", lambda *sheet: sheets.append(sheet))
    for other in ("tiny", small):
        report.draw_pair(["tiny", other], tmp_path / "pair.png", each=2)
    for (images, captions, _, columns), same in zip(sheets, (True, False)):
        assert len(images) == len(captions) == 4 * columns == 24
        for top in (0, 2 * columns):
            before, after = (slice(top + at, top + at + columns) for at in (0, columns))
            prompts = [[text.split("\n")[0].split(": ")[1] for text in captions[part]] for part in (before, after)]
            assert prompts[0] == prompts[1] and len(set(prompts[0])) == columns
            assert np.array_equal(images[before], images[after]) == same
    save(small_janus(), tmp_path / "real")
    with user_error("has no world with a detector"):
        report.draw_pair(["tiny", str(tmp_path / "real")], tmp_path / "pair.png")


def test_the_figures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    names = [*report.METHODS, *(f"full {name}" for name in report.METHODS), "broken", "sft, answers trained"]
    runs = [fake_run(name, seed, 0.6 + 0.1 * seed, model) for name in names for seed in range(2) for model in ablate.MODELS]
    report.figures({"runs": runs}, tmp_path)
    for name in ("ablation", "learning", "learning_short", "hacking"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")).std() > 5


# =====================================================================================================================
# MAGVIT-v2


MAGVIT_SMALL = {"channels": 32, "encoder_multipliers": [1, 1, 2], "encoder_blocks": [2, 1, 2],
                "decoder_multipliers": [1, 2, 2], "decoder_blocks": [1, 2, 1], "bits": 5}


@pytest.fixture(scope="module")
def magvit():
    torch.manual_seed(0)
    model = model_module.MAGVITv2(MAGVIT_SMALL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)  # norms that do something
    return model


def test_magvits_codes_are_the_signs_of_its_latents(magvit, monkeypatch):
    """Written out by hand: the first bit is the highest, and zero is not positive."""
    bits = torch.tensor([[-1, -1, -1, -1, -1], [-1, -1, -1, -1, 1], [1, -1, -1, -1, -1], [1, -1, 1, 1, -1]])
    latents = (bits * 0.3).T.reshape(1, 5, 2, 2)  # four pixels, a code each
    latents[0, 1, 0, 0] = 0.0
    monkeypatch.setattr(magvit.encoder, "forward", lambda pixels: latents)
    assert magvit.encode(torch.zeros(1, 3, 8, 8)).tolist() == [[0, 1, 16, 22]]
    assert torch.equal(magvit.codebook(latents)[[0, 1, 16, 22]], bits.float())


def independent_magvit(weights, x, multipliers, blocks, decode):
    """The published computation, from a state dict, function by function."""

    def conv(name, x, **settings):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **settings)

    def norm(name, x):
        return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)

    def resnet(name, x):
        h = norm(f"{name}.norm1", x)
        h = norm(f"{name}.norm2", conv(f"{name}.conv1", h * torch.sigmoid(h), padding=1))
        h = conv(f"{name}.conv2", h * torch.sigmoid(h), padding=1)
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # [B, C, H W]
        weight = torch.einsum("bci,bcj->bij", q, k).div(q.shape[1] ** 0.5).softmax(2)
        return x + conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weight, v).view_as(x))

    def middle(x):
        return resnet("mid.block_2", attention("mid.attn_1", resnet("mid.block_1", x)))

    last = len(multipliers) - 1
    if decode:
        x = middle(conv("conv_in", conv("post_quant_conv", x), padding=1))
        for level in range(last, -1, -1):
            for block in range(blocks[level]):
                x = resnet(f"up.{level}.block.{block}", x)
            if level:
                x = conv(f"up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    else:
        x = conv("conv_in", x, padding=1)
        for level in range(last + 1):
            for block in range(blocks[level]):
                x = resnet(f"down.{level}.block.{block}", x)
            if level < last:
                x = conv(f"down.{level}.downsample.conv", torch.nn.ZeroPad2d((0, 1, 0, 1))(x), stride=2)
        x = middle(x)
    x = norm("norm_out", x)
    x = conv("conv_out", x * torch.sigmoid(x), padding=1)
    return x if decode else conv("quant_conv", x)


def test_magvit_equals_an_independent_computation(magvit):
    pixels = torch.randn(3, 3, 24, 24)
    with torch.no_grad():
        latents = independent_magvit(magvit.encoder.state_dict(), pixels, [1, 1, 2], [2, 1, 2], decode=False)
        codes = sum((latents[:, bit] > 0).long() << (4 - bit) for bit in range(5)).flatten(1)
        assert codes.unique().numel() > 3 and (latents - magvit.encoder(pixels)).abs().max() < 1e-4
        assert torch.equal(magvit.encode(pixels), codes)
        codes = torch.randint(32, (2, 36))
        bits = torch.tensor([[[1.0 if code >> (4 - bit) & 1 else -1.0 for code in row] for bit in range(5)] for row in codes.tolist()])
        expected = independent_magvit(magvit.decoder.state_dict(), bits.view(2, 5, 6, 6), [1, 2, 2], [1, 2, 1], decode=True)
        assert (magvit.decode(codes) - expected).abs().max() < 1e-4
        assert torch.equal(magvit.decode(F.one_hot(codes, 32).float()), magvit.decode(codes))


def test_magvits_gradient_in_one_hots(magvit):
    """Finite differences in float64."""
    model = copy.deepcopy(magvit).double()
    one_hots = F.one_hot(torch.randint(32, (1, 4)), 32).double().requires_grad_()
    weight = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    value = lambda x: (model.decode(x) * weight).sum()
    [gradient] = torch.autograd.grad(value(one_hots), one_hots)
    for n, v in [(0, 0), (1, 17), (3, 31)]:
        step = torch.zeros_like(one_hots)
        step[0, n, v] = 1e-5
        with torch.no_grad():
            slope = (value(one_hots + step) - value(one_hots - step)) / 2e-5
        assert gradient[0, n, v].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)


def test_the_published_magvit(magvit, tmp_path):
    """The published sizes, some of its names and shapes; a folder in its layout, its two lookup tables among the
    tensors, is read to the bit, and a tensor too few or too many is named."""
    with torch.device("meta"):
        shapes_ = {name: list(tensor.shape) for name, tensor in model_module.MAGVITv2({}).state_dict().items()}
    assert len(shapes_) == 380
    for name, shape in {
        "encoder.conv_in.weight": [128, 3, 3, 3], "encoder.down.0.block.3.conv2.weight": [128, 128, 3, 3],
        "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1], "encoder.down.3.downsample.conv.bias": [512],
        "encoder.down.4.block.3.norm1.weight": [512], "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "encoder.conv_out.weight": [13, 512, 3, 3], "encoder.quant_conv.weight": [13, 13, 1, 1],
        "decoder.post_quant_conv.weight": [13, 13, 1, 1], "decoder.conv_in.weight": [512, 13, 3, 3],
        "decoder.up.4.block.2.conv1.weight": [512, 512, 3, 3], "decoder.up.4.upsample.conv.weight": [512, 512, 3, 3],
        "decoder.up.3.block.0.nin_shortcut.weight": [256, 512, 1, 1], "decoder.up.0.block.3.conv1.weight": [128, 128, 3, 3],
        "decoder.conv_out.weight": [3, 128, 3, 3],
    }.items():
        assert shapes_[name] == shape, name
    assert not any(name.startswith(("encoder.down.4.downsample", "decoder.up.0.upsample")) for name in shapes_)
    folder = tmp_path / "magvitv2"
    folder.mkdir()
    checkpoint.save_magvit(magvit, folder)
    tensors = load_file(folder / "pytorch_model.safetensors")
    tables = {"quantize.embedding": torch.zeros(32, 5), "quantize.power_vals": torch.zeros(5, dtype=torch.long)}
    save_file({**tensors, **tables}, folder / "pytorch_model.safetensors")
    again = checkpoint.load_magvit(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), magvit.state_dict().values()))
    save_file({**tensors, "encoder.extra": torch.zeros(1)}, folder / "pytorch_model.safetensors")
    with pytest.raises(UserError, match="encoder.extra"):
        checkpoint.load_magvit(folder)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, folder / "pytorch_model.safetensors")
    with pytest.raises(UserError, match="decoder.conv_out.bias' is missing"):
        checkpoint.load_magvit(folder)


# ---- Show-o's checkpoints -------------------------------------------------------------------------------------------

SMALL_MAGVIT = {"channels": 32, "bits": 2, **{
    f"{part}_{what}": [1, 1] for part in ("encoder", "decoder") for what in ("multipliers", "blocks")
}}


@pytest.fixture(scope="module")
def saved_show_o(tmp_path_factory):
    """A model with guidance and steps of its own, and the folder that it was saved in."""
    model = small_show_o(vqmodel=MAGVITv2(SMALL_MAGVIT), guidance=1.5, steps=4, world="shapes")
    folder = tmp_path_factory.mktemp("checkpoints") / "show-o"
    save(model, folder)
    return model, folder


@pytest.fixture
def copy_of_show_o(saved_show_o, tmp_path):
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(saved_show_o[1], tmp_path / "copy"))


def test_saved_show_o_loads_as_it_was(saved_show_o, tmp_path):
    model, folder = saved_show_o
    again = load(str(folder))
    same_tensors(model, again)
    assert (again.guidance, again.steps, again.config.world, again.num_image_tokens) == (1.5, 4, "shapes", 9)
    assert vars(again.config).items() >= vars(model.config).items() and not again.training
    for left, right in zip(model.generation_prompt(PROMPTS), again.generation_prompt(PROMPTS)):
        assert torch.equal(left, right)
    first, second = (sample_images(m, PROMPTS, [1, 2, 3], 1.5, compiled=False) for m in (model, again))
    assert torch.equal(first.codes, second.codes)
    again.steps, again.guidance = 3, 2.0
    save(again, tmp_path / "again", {"more.safetensors": {"a": torch.ones(1)}})
    assert load(str(tmp_path / "again")).steps == 3 and (tmp_path / "again" / "more.safetensors").exists()


PUBLISHED = {  # names and shapes of the published classes' state dict, at PHI's sizes
    "showo.model.embed_tokens.weight": (303, 32),
    "showo.model.layers.{}.self_attn.q_proj.weight": (32, 32), "showo.model.layers.{}.self_attn.q_proj.bias": (32,),
    "showo.model.layers.{}.self_attn.k_proj.weight": (32, 32), "showo.model.layers.{}.self_attn.k_proj.bias": (32,),
    "showo.model.layers.{}.self_attn.v_proj.weight": (32, 32), "showo.model.layers.{}.self_attn.v_proj.bias": (32,),
    "showo.model.layers.{}.self_attn.dense.weight": (32, 32), "showo.model.layers.{}.self_attn.dense.bias": (32,),
    "showo.model.layers.{}.self_attn.q_layernorm.weight": (8,), "showo.model.layers.{}.self_attn.q_layernorm.bias": (8,),
    "showo.model.layers.{}.self_attn.k_layernorm.weight": (8,), "showo.model.layers.{}.self_attn.k_layernorm.bias": (8,),
    "showo.model.layers.{}.mlp.fc1.weight": (48, 32), "showo.model.layers.{}.mlp.fc1.bias": (48,),
    "showo.model.layers.{}.mlp.fc2.weight": (32, 48), "showo.model.layers.{}.mlp.fc2.bias": (32,),
    "showo.model.layers.{}.input_layernorm.weight": (32,), "showo.model.layers.{}.input_layernorm.bias": (32,),
    "showo.model.final_layernorm.weight": (32,), "showo.model.final_layernorm.bias": (32,),
    "showo.lm_head.weight": (303, 32), "showo.lm_head.bias": (303,),
}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors"])
def test_published_show_o_layout_loads_with_every_key_used(copy_of_show_o, saved_show_o, file, monkeypatch):
    """As showlab/show-o-512x512 and UniRL's checkpoints have it: without tokenizers, which come from the hub, here from
    folders that stand for it; Phi's own text tokenizer lacks Show-o's tokens."""
    folder, (model, _) = copy_of_show_o, saved_show_o
    settings = json.loads((folder / "config.json").read_text())
    left_to_the_code = {key: settings.pop(key) for key in ("guidance", "steps", "world", "max_seq_length")}
    settings |= {"load_from_showo": True, "use_mod": True, "_diffusers_version": "0.30.1", "llm_model_path": "microsoft/phi-1_5"}
    (folder / "config.json").write_text(json.dumps({**settings, "steps": 4}))
    tensors = load_file(folder / "pytorch_model.safetensors")
    names = {name.format(i): shape for name, shape in PUBLISHED.items() for i in range(2)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == names
    tensors["showo.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # of older transformers
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "pytorch_model.safetensors").unlink()
    (save_file if file.endswith("safetensors") else torch.save)(tensors, folder / file)
    hub = {"showlab/magvitv2": folder.parent / "magvitv2", "microsoft/phi-1_5": folder.parent / "phi"}
    (folder / "magvitv2").rename(hub["showlab/magvitv2"])
    phi = PreTrainedTokenizerFast(tokenizer_object=bpe([BOS, EOS]), bos_token=EOS, eos_token=EOS)
    phi.save_pretrained(hub["microsoft/phi-1_5"])
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, allow_patterns: str(hub[name]))
    again = load(str(folder))
    same_tensors(model, again)
    assert again.guidance == 5.0 and again.config.max_seq_length == 128 and left_to_the_code["steps"] == 4
    assert again.question_prompt(QUESTIONS)[0].tolist() == model.question_prompt(QUESTIONS)[0].tolist()


def spoil_config(**changes):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def spoil_tensors(change):
    def spoil(folder):
        path = folder / "pytorch_model.safetensors"
        save_file(change(load_file(path)), path)

    return spoil


BAD_SHOW_O = {
    "no text tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(), "copy: has no tokenizer.json.*cannot download microsoft/phi-1_5"
    ),
    "no image tokenizer": (
        lambda folder: shutil.rmtree(folder / "magvitv2"),
        "copy: has no image tokenizer; give it a folder magvitv2.*cannot download showlab/magvitv2",
    ),
    "image tokenizer without weights": (
        lambda folder: (folder / "magvitv2" / "pytorch_model.safetensors").unlink(), "copy/magvitv2: holds no model.safe"
    ),
    "more steps than tokens": (spoil_config(steps=10), "10 mask-predict steps.*9 tokens"),
    "another vocabulary": (spoil_config(vocab_size=304), "are not the 304 rows"),
    "another codebook": (spoil_config(codebook_size=8, vocab_size=307), "8 codes.*image tokenizer 4"),
    "CLIP": (spoil_config(w_clip_vit=True), "copy: .*through CLIP"),
    "no number": (spoil_config(num_vq_tokens="nine"), "num_vq_tokens 'nine' is not a whole number"),
    "half a step": (spoil_config(steps=2.5), "steps 2.5 is not a whole number"),
    "no square": (spoil_config(num_vq_tokens=8), r"8 image tokens.*not a square"),
    "another activation": (spoil_config(phi_config={**PHI, "hidden_act": "relu"}), "'relu' for gelu_new"),
    "missing tensor": (
        spoil_tensors(lambda t: {k: v for k, v in t.items() if k != "showo.lm_head.bias"}), "'lm_head.bias' is missing"
    ),
    "unexpected tensor": (
        spoil_tensors(lambda t: {**t, "mm_projector.0.weight": torch.ones(1)}), "'mm_projector.0.weight' is not one of"
    ),
    "wrong shape": (spoil_tensors(lambda t: {**t, "showo.lm_head.bias": torch.ones(3)}), r"'lm_head.bias' has shape \[3\]"),
}


@pytest.mark.parametrize("fault", BAD_SHOW_O)
def test_bad_show_o_is_refused_in_one_line(copy_of_show_o, fault, monkeypatch):
    def offline(*args, **settings):
        raise OSError("no network")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    spoil, words = BAD_SHOW_O[fault]
    spoil(copy_of_show_o)
    with pytest.raises(UserError, match=words) as error:
        load(str(copy_of_show_o))
    assert "\n" not in str(error.value)


def test_pictures_are_cut_to_show_os_square(saved_show_o, tmp_path):
    """The shorter side becomes the model's, the middle stays; mean and deviation 0.5 as published."""
    model, _ = saved_show_o
    stripes = np.zeros((12, 36, 3), np.uint8)
    stripes[:, 12:24] = 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    pixels = sample.read_image(model, tmp_path / "wide.png")
    assert pixels.shape == (1, 3, 6, 6) and (pixels[..., 1:-1] > 0.9).all()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (11, 16, 3), np.uint8))  # 6 x 8.7: 6 x 8, 1 cut off
    expected = np.asarray(noise.resize((8, 6), Image.BICUBIC))[:, 1:7]  # torchvision's Resize and CenterCrop
    assert torch.equal(model.preprocess(noise)[0].permute(1, 2, 0), torch.from_numpy(expected.copy()).float() / 127.5 - 1)


def test_grpo_runs_on_a_show_o(tmp_path):
    """Two steps in the shapes world: on policy, a gradient, and a checkpoint that draws as it was trained to."""
    save_show_o(tmp_path / "show-o")
    done = run_grpo(
        "--model", tmp_path / "show-o", "--out", tmp_path / "run", "--steps", 2, "--prompts", 2, "--group", 2, *SHORT,
        "--reward", "likelihood", "--draw-steps", 4, "--replay-steps", 2, "--max-tokens", 4, "--guidance", 0.5,
    )
    assert done.returncode == 0, done.stderr
    first, second = read_metrics(tmp_path / "run")
    assert first["kl_image"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-4) and first["rollout_difference"] < 1e-4
    assert first["grad_norm"] > 0 and second["step"] == 2 and "4 mask-predict steps" in done.stdout
    trained = load(str(tmp_path / "run" / "step_000002"))
    assert trained.steps == 4 and trained.guidance == 0.5 and not torch.equal(trained.lm_head.weight, load(str(tmp_path / "show-o")).lm_head.weight)
