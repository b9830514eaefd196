"""The proofs. python -m pytest test_unirl.py

Parity with transformers and by independent computations; recorded against recomputed log-probabilities with
planted faults; enumerations, chi-squares and finite differences of what is sampled and learned; the reader of
answers, GenEval's rules and the gauge; whole runs: in process, on two ranks, killed, stopped and resumed.
"""

from collections import Counter
from contextlib import contextmanager, redirect_stdout
import copy
from dataclasses import fields, replace
import errno
from functools import cache, partial
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import io
from itertools import chain, combinations, product, repeat
import json
import math
import multiprocessing
import os
from pathlib import Path
import pickle
import re
import resource
import shutil
import signal
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import MagicMock, patch
from zlib import crc32

from huggingface_hub import constants
from PIL import Image
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from scipy import stats
from tokenizers import decoders, models, pre_tokenizers, processors, Tokenizer, trainers
import torch
from torch import Tensor
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import (
    CLIPConfig, CLIPModel, CLIPTokenizer, JanusConfig, JanusForConditionalGeneration, JanusProcessor,
    LogitsProcessorList, Mask2FormerConfig, Mask2FormerForUniversalSegmentation, PhiConfig, PhiModel,
    PreTrainedTokenizerFast, SwinConfig,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder, JanusVQVAEEncoder
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

import evaluate as evaluate_module
from evaluate import Detection, evaluate, Gauge, load_detector, read_folder, summarize, verdict, World
from experiments import race
from experiments.gradients import compare, estimates
import grpo
import model as model_module
from model import (
    chat_template, generation_mask, Janus, LanguageModel, load, MAGVITv2, save, SHOW_O_TOKENS, ShowO,
    UnifiedModel, UserError,
)
from reward import (
    draw_task, GENEVAL, geneval_metadata, geneval_suite, is_geneval_prompt, make_task, read_tasks, REAL,
    score, TAGS, task_key,
)
import sample
from sample import (
    answer_logprobs, Answers, choose_scored, draw, encode_answers, gumbel_given, image_logits, image_logprobs,
    Images, relaxed_codes, sample_answers, sample_images, score_logits,
)
import sft
from tiny import world as shapes

torch.set_num_threads(1)  # the models here are too small to gain from more
ROOT = Path(model_module.__file__).parent

PROMPTS = ["a red circle", "two blue squares left of a ring", "a"]  # of unequal lengths: two rows are padded
EQUAL = ["a red ring", "a red ring"]
QUESTIONS = ["What is it?", "How many blue squares are there in the picture?", "Which color?"]

# ------------------------------------------------------------------------------------------------------------
# Small models

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE_TAGS = dict(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
ROLES = ["<|User|>", "<|Assistant|>"]
SPECIAL = [BOS, EOS, PAD, *IMAGE_TAGS.values()]
KINDS = ["janus", "show-o"]


def bpe(special: list[str]) -> Tokenizer:
    """A byte-level tokenizer: the special tokens, the 256 bytes and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    settings = dict(vocab_size=288, special_tokens=special, show_progress=False, initial_alphabet=letters)
    tokenizer.train_from_iterator(PROMPTS + QUESTIONS, trainers.BpeTrainer(**settings))
    first = [(BOS, tokenizer.token_to_id(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=first)
    return tokenizer


@torch.no_grad()
def randomize(model: UnifiedModel, seed: int, head: float) -> None:
    """Random weights large enough that the logits are far from uniform, so that mistakes show."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
        elif "embed" in name and "patch" not in name:
            weight.copy_(noise)
        else:
            weight.copy_(noise * weight[0].numel() ** -0.5)
    model.lm_head.weight.mul_(head)


def small_janus(
    seed: int = 0, system_prompt=False, guidance=5.0, image_size=16, patch_size=4, channels=(1, 1, 2),
    codes=32, layers=2, kv_heads=2, vision_heads=4, depth=2, blocks=1, tied=False, text=None,
) -> Janus:
    width, half, count = 64, [0.5] * 3, (image_size // patch_size) ** 2
    trunk = dict(
        model_type="llama", vocab_size=300, hidden_size=width, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=512, **(text or {}),
    )
    vision = dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=vision_heads, image_size=image_size,
        patch_size=patch_size, mlp_ratio=3.0, projection_dim=width, depth=depth, num_image_tokens=count,
    )
    vq = dict(
        embed_dim=8, num_embeddings=codes, latent_channels=24, base_channels=32, num_res_blocks=blocks,
        channel_multiplier=list(channels), projection_dim=width, num_hidden_layers=depth,
        image_token_embed_dim=width,
    )
    config = JanusConfig(text_config=trunk, vision_config=vision, vq_config=vq, tie_word_embeddings=tied)
    names = dict(bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=IMAGE_TAGS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(SPECIAL + ROLES), **names)
    size = {"height": image_size, "width": image_size}
    images = JanusImageProcessorPil(size=size, min_size=4, image_mean=half, image_std=half)
    processor = JanusProcessor(images, tokenizer, chat_template(*ROLES), system_prompt, count)
    model = Janus(config, processor, guidance).eval()
    randomize(model, seed, 0.3 if tied else 2)
    model.generation_head.vision_head.weight.data.mul_(2)
    return model


PHI = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def show_o_tokenizer() -> PreTrainedTokenizerFast:
    """As Phi's, <bos> and <eos> are one token; [PAD] and Show-o's own are the last."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe([BOS, EOS]), bos_token=EOS, eos_token=EOS)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(list(SHOW_O_TOKENS), special_tokens=True)
    return tokenizer


def small_show_o(seed: int = 1, codes: int = 4, tokens: int = 9, **settings) -> ShowO:
    """Its MAGVIT-v2 halves the picture once."""
    tokenizer = show_o_tokenizer()
    words = len(tokenizer)
    settings = {
        "vocab_size": words + codes + 1, "llm_vocab_size": words - 10, "codebook_size": codes,
        "num_vq_tokens": tokens, "phi_config": PHI, "max_seq_length": 100, "steps": 5, **settings,
    }
    names = "encoder_multipliers", "encoder_blocks", "decoder_multipliers", "decoder_blocks"
    magvit = MAGVITv2({"channels": 32, "bits": codes.bit_length() - 1, **{name: [1, 1] for name in names}})
    model = ShowO(settings, tokenizer, magvit).eval()
    randomize(model, seed, 2)
    return model


def small_model(kind: str, **settings) -> UnifiedModel:
    """Of one of KINDS."""
    return small_janus(**settings) if kind == "janus" else small_show_o(**settings)


@pytest.fixture(scope="module")
def janus():
    return small_janus()


@pytest.fixture(scope="module")
def show_o():
    return small_show_o()


@pytest.fixture(scope="module", params=KINDS)
def either(request):
    """A small Janus, then a small Show-o: for what is claimed of both."""
    return small_model(request.param)


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


# ------------------------------------------------------------------------------------------------------------
# What many tests say


def random_pixels(model: UnifiedModel, count: int, seed: int = 1) -> Tensor:
    """Noise of the size of the model's pictures."""
    with torch.no_grad():
        shape = model.to_pixels(torch.zeros(1, model.num_image_tokens, dtype=torch.long)).shape[1:]
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_images(model: UnifiedModel, prompts: list[str], seed: int = 2) -> Images:
    """Any codes, as if they had been sampled; a Show-o's in turn by all its steps."""
    shape = B, N = len(prompts), model.num_image_tokens
    codes = torch.randint(model.num_codes, shape, generator=torch.Generator().manual_seed(seed))
    step = None if model.draw_steps is None else (torch.arange(N) % model.draw_steps).repeat(B, 1)
    return Images(codes, None, *model.generation_prompt(prompts), torch.full(shape, 1 / N), step)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance


def same_tensors(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@contextmanager
def user_error(*words: str):
    """The block raises a UserError of one line that holds all the words."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def offline(monkeypatch):
    unreachable = MagicMock(side_effect=ConnectionError("no route\nto host"))
    monkeypatch.setattr(model_module, "download", unreachable)


# ------------------------------------------------------------------------------------------------------------
# Parity with transformers' Janus and Phi, on what was saved here and opened there

CONFIGS = {
    "grouped": dict(),
    "tied": dict(tied=True, kv_heads=4, depth=1, image_size=8, patch_size=2, channels=(1, 2),
                 system_prompt=True,
                 text=dict(rms_norm_eps=1e-2, rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
    "deep": dict(kv_heads=1, depth=3, blocks=2, image_size=32, patch_size=16, channels=(1, 1, 2, 2, 4),
                 text=dict(head_dim=32)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """What is opened of a saved model, here and by transformers, and the folder."""
    saved = small_janus(**CONFIGS[request.param], guidance=2.5)
    folder = tmp_path_factory.mktemp("pair") / "saved"
    save(saved, folder)
    model = load(str(folder))
    same_tensors(saved, model)
    twin, report = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tied = model.lm_head.weight is model.language_model.embed_tokens.weight
    assert model.guidance == 2.5 and tied == model.config.tie_word_embeddings
    return model, twin, folder


def epsilons(module: nn.Module) -> list[float]:
    """Too small to be seen in values."""
    return sorted(part.eps for part in module.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm))


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits).log_prob(tokens)


@torch.no_grad()
def test_pictures_and_features_are_those_of_transformers(pair):
    model, twin, _ = pair
    codes, pixels = random_images(model, PROMPTS).codes, random_pixels(model, 2)
    theirs = twin.decode_image_tokens(codes).permute(0, 3, 1, 2)
    close(model.vqmodel.decode(codes), theirs)
    close(model.vqmodel.decode(torch.eye(model.num_codes)[codes]), theirs)
    assert theirs.std() > 0.1 and model.to_pixels(100 * torch.eye(model.num_codes)[codes]).abs().max() == 1
    for image, shown in ((pixels, pixels), (codes, theirs.clamp(-1, 1))):
        features = twin.model.get_image_features(shown).pooler_output
        close(model.aligner(model.image_features(image)), features)
    assert epsilons(model) == epsilons(twin)


@torch.no_grad()
def test_image_logits_are_those_that_transformers_draws_from(pair):
    """It draws greedily, with the guidance and the tokens that the saved generation config names, and shows
    the logits of both branches to whoever processes them."""
    model, twin, _ = pair
    images, seen = random_images(model, PROMPTS), []
    spy = LogitsProcessorList([lambda ids, logits: seen.append(logits) or logits])
    inputs = dict(input_ids=images.ids, attention_mask=images.mask.long(), logits_processor=spy)
    images.codes = twin.generate(**inputs, generation_mode="image", do_sample=False)
    conditional, unconditional = torch.stack(seen, 1).chunk(2)
    for guidance in (0.0, 1.0, 5.0):
        theirs = unconditional + guidance * (conditional - unconditional)
        close(0.7 * image_logits(model, images, guidance, 0.7), theirs)
    assert torch.equal(image_logits(model, images, 2.5, 1.0).argmax(-1), images.codes)
    assert conditional.std() > 0.5 and len(images.codes.unique(dim=0)) > 1


@torch.no_grad()
@pytest.mark.parametrize("pair", ["grouped", "deep"], indirect=True)  # the tied one repeats itself
def test_answers_and_their_logprobs_are_those_of_transformers(pair):
    """With the third greedy token of the first answer for end-of-sentence token, so that one ends early."""
    model, twin, _ = copy.deepcopy(pair)
    pixels, tokens = random_pixels(model, len(QUESTIONS)), model.tokenizer
    features = model.image_features(pixels)
    end = sample_answers(model, features, QUESTIONS, max_tokens=3).ids[0, 2].item()
    tokens.eos_token = tokens.convert_ids_to_tokens(end)
    ids, mask = model.question_prompt(QUESTIONS)
    inputs = dict(input_ids=ids, attention_mask=mask.long(), pixel_values=pixels)
    greedy = dict(generation_mode="text", do_sample=False, max_new_tokens=8, eos_token_id=end)
    theirs = twin.generate(**inputs, **greedy)[:, ids.shape[1] :]
    ours = sample_answers(model, features, QUESTIONS, max_tokens=8)
    assert torch.equal(ours.ids, theirs) and len((ours.weights > 0).sum(1).unique()) > 1
    assert ours.texts == [text.strip() for text in tokens.batch_decode(theirs, skip_special_tokens=True)]
    answers, real = encode_answers(model, ["ring", "two blue squares", "red"])
    mask = F.pad(mask, (0, answers.shape[1]), value=True).long()
    inputs = dict(inputs, input_ids=torch.cat((ids, answers), 1), attention_mask=mask)
    logits = twin(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, ids.shape[1] - 1 : -1]
    theirs = logprobs_of(logits, answers)[real]
    close(answer_logprobs(model, features, QUESTIONS, answers)[real], theirs)
    assert theirs.std() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("kv_heads, rotary", [(4, 0.5), (2, 0.25)])
def test_phi_trunk_equals_transformers(kv_heads, rotary):
    """With query/key layer norm, and with a mask that is not causal."""
    rope = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=rotary)
    more = dict(num_key_value_heads=kv_heads, qk_layernorm=True, rope_parameters=rope, layer_norm_eps=1e-2)
    config = PhiConfig(vocab_size=50, attn_implementation="eager", **PHI, **more)
    theirs, ours = PhiModel(config).eval(), LanguageModel(copy.deepcopy(config))
    random = torch.Generator().manual_seed(0)
    for weight in theirs.parameters():
        weight.add_(0.3 * torch.randn(weight.shape, generator=random))
    state = theirs.state_dict()
    names = {name: name.replace("final_layernorm", "norm").replace("dense", "o_proj") for name in state}
    ours.load_state_dict({names[name]: state[name] for name in state})
    ids, positions = torch.randint(50, (2, 7), generator=random), torch.arange(7).expand(2, -1)
    mask = (torch.rand(2, 1, 7, 7, generator=random) < 0.6) | torch.eye(7, dtype=torch.bool)
    bias = torch.zeros(2, 1, 7, 7).masked_fill(~mask, -1e9)
    hidden = theirs(input_ids=ids, attention_mask=bias, position_ids=positions).last_hidden_state
    close(ours(ours.embed_tokens(ids), positions, mask), hidden)


# ------------------------------------------------------------------------------------------------------------
# Image tokenizers


@torch.no_grad()
def test_image_encoder_takes_the_nearest_code_on_the_sphere(pair):
    """As the original; transformers 5.23.0 normalises neither side and so finds other codes."""
    (model, twin, _), pixels = pair, random_pixels(pair[0], 3)
    vq = twin.model.vqmodel
    latents = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, E]
    sphere = F.normalize(latents, dim=-1), F.normalize(vq.quantize.embedding.weight, dim=-1)
    nearest = torch.cdist(*sphere).argmin(-1)
    assert torch.equal(model.vqmodel.encode(pixels), nearest)
    assert not torch.equal(vq.encode(pixels).image_tokens.view_as(nearest), nearest)


@pytest.fixture(scope="module")
def magvit():
    levels = dict(encoder_multipliers=[1, 1, 2], encoder_blocks=[2, 1, 2],
                  decoder_multipliers=[1, 2, 2], decoder_blocks=[1, 2, 1])
    model, random = MAGVITv2({"channels": 32, "bits": 5, **levels}), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=random)  # norms that do something
    return model


@torch.no_grad()
def test_magvit_is_transformers_vq_without_some_blocks_and_its_codes_are_signs(magvit):
    """What MAGVIT-v2 lacks has zeros for weights there, and so changes nothing."""

    def twin(kind, widths, blocks, ours):
        config = dict(base_channels=32, latent_channels=5, channel_multiplier=widths, num_res_blocks=blocks)
        theirs = kind(JanusVQVAEConfig(**config)).eval()
        if kind is JanusVQVAEDecoder:  # MAGVIT-v2 names its levels from the highest resolution
            theirs.up = theirs.up[::-1]
        for weight in theirs.parameters():
            weight.zero_()
        surplus = theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys
        assert len(surplus) == 2 and all("quant_conv" in name for name in surplus)
        return theirs

    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    latents = magvit.encoder.quant_conv(twin(JanusVQVAEEncoder, [1, 1, 2], 2, magvit.encoder)(pixels))
    close(magvit.encoder(pixels), latents)
    codes = sum((latents[:, bit] > 0).long() << (4 - bit) for bit in range(5)).flatten(1)  # highest first
    assert torch.equal(magvit.encode(pixels), codes) and len(codes.unique()) > 3
    decoder = twin(JanusVQVAEDecoder, [1, 2, 2], 1, magvit.decoder)
    decoder.up = decoder.up[::-1]
    decoded = decoder(magvit.decoder.post_quant_conv((latents > 0).float() * 2 - 1))
    close(magvit.decode(codes), decoded)
    close(magvit.decode(torch.eye(32)[codes]), decoded)
    assert set(epsilons(magvit)) == {1e-6}


@torch.no_grad()
@pytest.mark.parametrize("layout", ["original", "show-o"])
def test_image_tokenizers_stay_float32_under_bfloat16(stored, layout):
    model = stored[layout][0]
    codes, pixels = random_images(model, PROMPTS).codes, random_pixels(model, 3)
    exact = model.to_pixels(codes), model.to_pixels(F.one_hot(codes, model.num_codes).float())
    features = model.image_features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.to_pixels(codes), exact[0])
        assert torch.equal(model.to_pixels(F.one_hot(codes, model.num_codes).bfloat16()), exact[1])
        assert torch.equal(model.image_features(pixels), features) == (layout == "show-o")


@pytest.mark.parametrize("kind", ["VQ-16", "MAGVIT-v2"])
def test_decoding_is_differentiable_in_one_hots(kind, janus, magvit):
    model = copy.deepcopy(janus.vqmodel if kind == "VQ-16" else magvit).double()
    one_hots = F.one_hot(torch.tensor([[3, 30, 7, 7]]), 32).double().requires_grad_()
    assert torch.autograd.gradcheck(model.decode, one_hots, fast_mode=True)  # against finite differences


# ------------------------------------------------------------------------------------------------------------
# Prompts, masks and padding


def rows_of(mask: Tensor) -> list[str]:
    return ["".join(map(str, row)) for row in mask.int().tolist()]


def test_masks_by_hand(show_o):
    """Two padding, two text and three image tokens: text is causal, the image sees all but the padding. Then
    [PAD] mmu soi code eoi text eoi: everything up to the first eoi is seen by all, the rest is causal."""
    rows = rows_of(generation_mask(torch.tensor([[False, False, True, True]]), 3)[0, 0])
    assert rows == ["1000000", "0100000", "0010000", "0011000", "0011111", "0011111", "0011111"]
    pad = show_o.tokenizer.pad_token_id
    ids = torch.tensor([[pad, show_o.mmu, show_o.soi, show_o.mask_id, show_o.eoi, 30, show_o.eoi]])
    rows = rows_of(show_o.question_attention_mask(ids, ids != pad)[0, 0])
    assert rows == ["1000000", "0111100", "0111100", "0111100", "0111100", "0111110", "0111111"]


def test_show_os_prompts_are_laid_out_as_published(show_o):
    """As UniversalPrompting.t2i_gen_prompt and inference_mmu.py of showlab/Show-o have them."""
    pad, end, first = show_o.tokenizer.pad_token_id, show_o.tokenizer.eos_token_id, show_o.first_code
    encode = partial(show_o.tokenizer.encode, add_special_tokens=False)
    assert first == show_o.config.llm_vocab_size + 10 == pad + 10 and show_o.mask_id == first + 4
    short, long = ([show_o.t2i, end, *encode(prompt), end] for prompt in ("a", "a red circle"))
    ids, mask = show_o.generation_prompt(["a", "a red circle"])
    assert ids.tolist() == [[pad] * (len(long) - len(short)) + short, long] and mask.equal(ids != pad)
    ids, mask = show_o.unconditional(ids, mask)
    assert ids.tolist() == [[pad] * (len(long) - 3) + [show_o.t2i, end, end]] * 2 and mask.equal(ids != pad)
    canvas = show_o.embed_canvas(torch.arange(9)[None] % 4, torch.arange(9)[None] < 2)
    row = [show_o.soi, first, first + 1, *[show_o.mask_id] * 7, show_o.eoi]
    assert torch.equal(canvas, show_o.embed_text(torch.tensor([row])))
    close(show_o.generation_head(canvas), show_o.lm_head(canvas)[..., first : first + 4], 1e-6)
    image = [show_o.mmu, show_o.soi, *[show_o.mask_id] * 9, show_o.eoi]
    short, long = ([*image, end, *encode(f"USER: \n{text} ASSISTANT:")] for text in ("Who?", "Which colour?"))
    ids, mask = show_o.question_prompt(["Who?", "Which colour?"])
    assert ids.tolist() == [[pad] * (len(long) - len(short)) + short, long] and mask.equal(ids != pad)
    codes = torch.arange(18).view(2, 9) % 4
    shown = ids.masked_scatter(ids == show_o.mask_id, codes + first)
    assert torch.equal(show_o.embed_question(ids, codes), show_o.embed_text(shown))


def test_show_o_has_the_published_sizes_and_ids(tmp_path):
    """configs/showo_demo_512x512.yaml and UniversalPrompting of showlab/Show-o, written out. Phi's tokenizer
    has 50,295 tokens; then come [PAD] and the special ones in this order, the codes, and the mask."""
    words = {EOS if i == 50256 else f"w{i}": i for i in range(50295)}
    words = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token=EOS, eos_token=EOS).save_pretrained(tmp_path)
    tokens = model_module.read_show_o_tokenizer(tmp_path)
    order = "[PAD] <|soi|> <|eoi|> <|sov|> <|eov|> <|t2i|> <|mmu|> <|t2v|> <|v2v|> <|lvg|>".split()
    assert tokens.convert_tokens_to_ids(order) == list(range(50295, 50305))
    with torch.device("meta"):
        model = ShowO(dict(vocab_size=58498, codebook_size=8192, num_vq_tokens=1024), tokens, MAGVITv2({}))
    ids = model.soi, model.eoi, model.t2i, model.mmu, model.first_code, model.mask_id
    assert ids == (50296, 50297, 50300, 50301, 50305, 58497)
    assert (model.guidance, model.draw_steps, model.config.max_seq_length) == (5.0, 50, 128)
    trunk, layer = model.language_model, model.language_model.layers[23]
    assert trunk.rotary == 32 and trunk.config.rope_parameters["rope_theta"] == 10000
    assert len(trunk.layers) == 24 and layer.self_attn.head_dim == 64
    assert layer.self_attn.k_proj.weight.shape == (2048, 2048)
    assert layer.mlp.fc1.weight.shape == (8192, 2048) and model.lm_head.weight.shape == (58498, 2048)
    assert set(epsilons(trunk)) == {1e-5}
    shapes = {name: list(tensor.shape) for name, tensor in model.vqmodel.state_dict().items()}
    published = {
        "encoder.conv_in.weight": [128, 3, 3, 3], "encoder.down.0.block.3.conv2.weight": [128, 128, 3, 3],
        "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1], "encoder.norm_out.bias": [512],
        "encoder.down.3.downsample.conv.bias": [512], "encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "encoder.conv_out.weight": [13, 512, 3, 3], "encoder.quant_conv.weight": [13, 13, 1, 1],
        "decoder.post_quant_conv.weight": [13, 13, 1, 1], "decoder.conv_in.weight": [512, 13, 3, 3],
        "decoder.up.4.block.2.conv1.bias": [512], "decoder.up.4.upsample.conv.weight": [512, 512, 3, 3],
        "decoder.up.3.block.0.nin_shortcut.bias": [256], "decoder.up.0.block.3.conv1.bias": [128],
    }
    assert len(shapes) == 380 and {name: shapes.get(name) for name in published} == published
    assert not any(name.startswith(("encoder.down.4.down", "decoder.up.0.up")) for name in shapes)


def test_a_prompt_longer_than_show_os_text_window_is_refused():
    model = small_show_o(max_seq_length=4)
    fits = model.generation_prompt(["aa"])[0]
    assert fits.shape == (1, 5)  # <|t2i|> is not counted
    with user_error("'two blue squares left of a ring'", "text window 4"):
        model.generation_prompt(["aa", PROMPTS[1]])


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: the layouts of transformers, of DeepSeek, of Show-o

TO_DEEPSEEK = [  # this module's names -> those of DeepSeek's classes
    (r"^language_model", "language_model.model"), (r"^lm_head", "language_model.lm_head"),
    (r"^vision_model", "vision_model.vision_tower"), (r"embeddings\.patch_embedding", "patch_embed.proj"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"), (r"post_layernorm", "norm"),
    (r"encoder\.layers", "blocks"), (r"(tower.*)self_attn\.q_proj", r"\1attn.qkv"),
    (r"self_attn\.projection_layer", "attn.proj"), (r"layer_norm(\d)", r"norm\1"),
    (r"^vqmodel", "gen_vision_model"), (r"\.(down|up)\.", ".conv_blocks."), (r"\.block\.", ".res."),
    (r"mid\.block_1", "mid.0"), (r"mid\.attn_1", "mid.1"), (r"mid\.block_2", "mid.2"),
    (r"aligner\.fc1", "aligner.layers.0"), (r"aligner\.hidden_layers\.0", "aligner.layers.2"),
    (r"^generation_embeddings", "gen_embed"), (r"head\.proj_out", "head.output_mlp_projector"),
    (r"^generation", "gen"),
]
ORIGINAL_CONFIG = {
    "model_type": "multi_modality",
    "language_config": dict(model_type="llama", vocab_size=300, hidden_size=64, intermediate_size=96,
                            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "vision_config": {"params": dict(image_size=16, model_name="siglip_large_patch16_384", select_layer=-1)},
    "aligner_config": {"params": dict(depth=2, input_dim=48, n_embed=64, projector_type="mlp_gelu")},
    "gen_aligner_config": {"params": dict(depth=2, input_dim=8, n_embed=64, projector_type="mlp_gelu")},
    "gen_vision_config": {"params": dict(image_token_size=32, n_embed=8)},
    "gen_head_config": {"params": dict(image_token_embed=64, image_token_size=32, n_embed=64)},
}


def original_tensors(model: Janus) -> dict[str, Tensor]:
    """As DeepSeek's classes name and shape them; with SigLIP's pooling head and a counter, of no use."""
    ours, renamed = model.state_dict(), {}
    for name, tensor in ours.items():
        if name.startswith("vision_model.encoder") and ".q_proj." in name:
            tensor = torch.cat([ours[name.replace(".q_", f".{part}_")] for part in "qkv"])
        for old, new in TO_DEEPSEEK:
            name = re.sub(old, new, name)
        renamed[name] = tensor[None] if name.endswith("pos_embed") else tensor.clone()
    tensors = {name: tensor for name, tensor in renamed.items() if not re.search(r"tower.*[kv]_proj", name)}
    unused = "vision_model.vision_tower.attn_pool.latent", "gen_vision_model.quantize.codebook_used"
    return {**tensors, **{name: torch.zeros(1, 1, 48) for name in unused}}


def write_weights(folder: Path, tensors: dict[str, Tensor], form: str) -> None:
    stem, ending = ("pytorch_model", "bin") if form.endswith("bin") else ("model", "safetensors")
    write = torch.save if ending == "bin" else save_file
    if "sharded" not in form:
        return write(tensors, folder / f"{stem}.{ending}")
    places = {name: f"{stem}-0000{1 + i % 3}-of-00003.{ending}" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        write({name: tensors[name] for name in tensors if places[name] == file}, folder / file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


def write_original(model: Janus, folder: Path, form="safetensors", roles=ROLES, style="deepseek") -> Path:
    """As DeepSeek published them; its tokenizer's settings name neither the pad token nor the image tags."""
    folder.mkdir()
    write_weights(folder, original_tensors(model), form)
    bpe(SPECIAL + roles).save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "LlamaTokenizerFast"}
    processor = {"processor_class": "VLChatProcessor", "sft_format": style}
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


LAYOUTS = ["transformers", "original", "show-o"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A model of each layout and the folder that it is stored in."""
    root = tmp_path_factory.mktemp("stored")
    model = small_show_o(world="shapes")
    model.guidance, model.draw_steps = 1.5, 4
    original = small_janus(vision_heads=16, system_prompt=True)  # SigLIP's heads
    models = dict(zip(LAYOUTS, (small_janus(), original, model)))
    for layout, write in zip(LAYOUTS, (save, write_original, save)):
        write(models[layout], root / layout)
    return {layout: (model, root / layout) for layout, model in models.items()}


@pytest.fixture
def copy_of(stored, tmp_path):
    """Of a layout's folder, that a test may spoil."""
    return lambda layout: Path(shutil.copytree(stored[layout][1], tmp_path / "copy"))


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_model_does_what_the_saved_one_did(stored, layout):
    model, folder = stored[layout]
    pixels = random_pixels(model, 1)

    def does(m):
        images = sample_images(m, PROMPTS, [1, 2, 3], m.guidance, compiled=False)
        answers = sample_answers(m, m.image_features(images.codes), QUESTIONS, max_tokens=4)
        return images.codes, m.vqmodel.encode(pixels), m.image_features(pixels), answers.ids, answers.logprobs

    again, half = load(str(folder)), load(str(folder), dtype=torch.bfloat16)
    same_tensors(model, again)
    rounded = copy.deepcopy(model).bfloat16()
    rounded.vqmodel = model.vqmodel  # never less than float32
    same_tensors(rounded, half)
    assert all(map(torch.equal, does(model), does(again))) and not again.training
    assert again.draw_steps == model.draw_steps and getattr(again.config, "world", "shapes") == "shapes"
    empty, full = load(str(folder), "meta").state_dict(), model.state_dict()
    assert {name: ("meta", tensor.shape) for name, tensor in full.items()} == {
        name: (tensor.device.type, tensor.shape) for name, tensor in empty.items()
    }


def test_save_replaces_what_was_there_and_keeps_more_files(janus, tmp_path):
    folder = tmp_path / "step"
    save(janus, folder, {"stale.json": {}})
    save(janus, folder, {"more/state.json": {"step": 7}})
    assert json.loads((folder / "more" / "state.json").read_text()) == {"step": 7}
    assert not (folder / "stale.json").exists() and os.listdir(tmp_path) == ["step"]


@pytest.mark.parametrize("form, roles, style, tags", [
    ("bin", ROLES, "deepseek", ROLES), ("sharded bin", [], "deepseek", ["User", "Assistant"]),
    ("sharded safetensors", ROLES, "deepseek_old", ["User", "Assistant"]),
])
def test_original_layout_in_its_other_forms_and_its_prompts(stored, tmp_path, form, roles, style, tags):
    """As loaded, and as saved in transformers' layout and loaded again."""
    original, (user, assistant) = stored["original"][0], tags
    model = load(str(write_original(original, tmp_path / "original", form, roles, style)))
    save(model, tmp_path / "saved")
    again = load(str(tmp_path / "saved"))
    image = f"<begin_of_image>{'<image_placeholder>' * 16}<end_of_image>\n"
    system = (
        "You are a helpful language and vision assistant. You are able to understand the visual content that "
        "the user provides, and assist the user with a variety of tasks using natural language."
    )
    for one in (model, again):
        same_tensors(original, one)
        [drawing], [asking] = one.generation_prompt(["a ring"])[0], one.question_prompt(["Which?"])[0]
        text = partial(one.tokenizer.decode, clean_up_tokenization_spaces=False)
        assert text(drawing) == f"{BOS}{user}: a ring\n\n{assistant}:<begin_of_image>"
        assert text(asking) == f"{BOS}{system}\n\n{user}: {image}Which?\n\n{assistant}:"
        special = [one.tokenizer.encode(tag, add_special_tokens=False) for tag in (user, "<begin_of_image>")]
        assert drawing[1 : 1 + len(special[0])].tolist() == special[0] and [drawing[-1]] == special[1]
        assert (len(special[0]) == 1) == (tags == ROLES) and (asking == one.config.image_token_id).sum() == 16


@pytest.mark.parametrize("lacks, settings", [
    (None, {}), (None, {"chat_template": "{{ messages[0]['content'] + 1 }}"}),
    ("<image_placeholder>", {}), (PAD, {"pad_token": PAD}),
], ids=["processor_config.json", "own template", "placeholder", "pad token"])
def test_what_the_originals_code_makes_good_or_does_not_read(stored, copy_of, lacks, settings):
    """A tokenizer.json that lacks a token, a language model's template, and no processor_config.json."""
    original, folder = stored["original"][0], copy_of("original")
    (folder / "processor_config.json").unlink()
    edit_json(folder / "tokenizer_config.json", **settings)
    if lacks:
        bpe([token for token in SPECIAL + ROLES if token != lacks]).save(str(folder / "tokenizer.json"))
    model = load(str(folder))
    prompts = [(*one.generation_prompt(["a ring"])[0], *one.question_prompt(["Which?"])[0])
               for one in (original, model)]
    assert list(map(original.tokenizer.decode, prompts[0])) == list(map(model.tokenizer.decode, prompts[1]))
    assert (prompts[1][1] == model.config.image_token_id).sum() == 16
    assert max(model.config.image_token_id, model.tokenizer.pad_token_id) < 300


@pytest.mark.parametrize("name, roles, changes, tags", [
    ("Janus-1.3B", ROLES, {}, ["User", "Assistant"]), ("Janus-Pro-1B", [], {}, ROLES),
    ("mine", [], {"_name_or_path": "deepseek-ai/Janus-Pro-1B"}, ROLES),
    ("models--deepseek-ai--Janus-1.3B/snapshots/12ab", ROLES, {}, ["User", "Assistant"]),
    ("mine", ROLES, {"roles": ["User", "Bot"]}, ["User", "Bot"]),
])
def test_who_speaks_goes_by_the_checkpoints_name(stored, tmp_path, capsys, name, roles, changes, tags):
    """And is said."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    folder = write_original(stored["original"][0], tmp_path / name, roles=roles)
    edit_json(folder / ("processor_config.json" if "roles" in changes else "config.json"), **changes)
    text = load(str(folder)).chat([{"type": "text", "text": "a"}])
    assert text == f"{tags[0]}: a\n\n{tags[1]}:" and f"{tags[0]} and {tags[1]}" in capsys.readouterr().err


def test_empty_and_spacious_turns_are_the_originals(stored):
    """conversation.py: nothing follows an empty turn's colon, and a turn is stripped as a whole."""
    chat, image = stored["original"][0].chat, {"type": "image"}
    empty, spacious = ({"type": "text", "text": text} for text in ("", " a "))
    assert chat([empty]) == "<|User|>:<|Assistant|>:"
    assert chat([spacious]) == "<|User|>: a\n\n<|Assistant|>:"
    assert chat([image, empty]) == "<|User|>: <image_placeholder>\n\n<|Assistant|>:"
    assert chat([image, spacious]) == "<|User|>: <image_placeholder>\n a\n\n<|Assistant|>:"


PUBLISHED = {  # shapes of the weights of the published class' layers, at PHI's sizes; its biases go with them
    **{f"self_attn.{part}": (32, 32) for part in ("q_proj", "k_proj", "v_proj", "dense")},
    "self_attn.q_layernorm": (8,), "self_attn.k_layernorm": (8,), "input_layernorm": (32,),
    "mlp.fc1": (48, 32), "mlp.fc2": (32, 48),
}


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model.safetensors", "model.safetensors"])
def test_show_os_published_layout_loads_with_every_key_used(copy_of, stored, file, tmp_path, monkeypatch):
    """As showlab/show-o-512x512 has it: without tokenizers, which come from the hub, here from folders that
    stand for it; Phi's own text tokenizer lacks Show-o's tokens."""
    folder, (model, _) = copy_of("show-o"), stored["show-o"]
    settings = json.loads((folder / "config.json").read_text())
    published = {name: settings[name] for name in settings.keys() - {"guidance", "world", "max_seq_length"}}
    (folder / "config.json").write_text(json.dumps({**published, "_diffusers_version": "0.30.1"}))
    tensors = load_file(folder / "pytorch_model.safetensors")
    layers = {f"showo.model.layers.{i}.{name}": shape for i in range(2) for name, shape in PUBLISHED.items()}
    layers |= {"showo.model.final_layernorm": (32,), "showo.lm_head": (303, 32)}
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes["showo.model.embed_tokens.weight"] = (303, 32)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    tensors["showo.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)  # of older transformers
    for path in (*folder.glob("*token*"), folder / "pytorch_model.safetensors"):
        path.unlink()
    (torch.save if file.endswith("bin") else save_file)(tensors, folder / file)
    hub = {"microsoft/phi-1_5": tmp_path, "showlab/magvitv2": tmp_path / "magvitv2"}
    (folder / "magvitv2").rename(tmp_path / "magvitv2")
    phi = PreTrainedTokenizerFast(tokenizer_object=bpe([BOS, EOS]), bos_token=EOS, eos_token=EOS)
    phi.save_pretrained(tmp_path)
    monkeypatch.setattr(model_module, "download", lambda name, weights: hub[name])
    again = load(str(folder))
    same_tensors(model, again)
    assert (again.guidance, again.draw_steps, again.config.max_seq_length) == (5.0, 4, 128)
    assert torch.equal(again.question_prompt(QUESTIONS)[0], model.question_prompt(QUESTIONS)[0])


def test_show_o_256_draws_as_its_own_published_command(copy_of):
    folder = copy_of("show-o")
    settings = {**json.loads((folder / "config.json").read_text()), "num_vq_tokens": 256}
    for left_out, drawn in (({"guidance", "steps"}, (1.75, 18)), (set(), (1.5, 4))):  # published; saved here
        kept = {name: settings[name] for name in settings.keys() - left_out}
        (folder / "config.json").write_text(json.dumps(kept))
        model = load(str(folder))
        assert (model.guidance, model.draw_steps) == drawn


def test_sizes_of_show_os_trunk_come_from_its_language_model(copy_of, stored, tmp_path, offline):
    folder, (model, _) = copy_of("show-o"), stored["show-o"]
    settings = json.loads((folder / "config.json").read_text())
    phi = {"model_type": "phi", "architectures": ["PhiForCausalLM"], "rope_scaling": None, "rope_theta": 1e4}
    (tmp_path / "phi").mkdir()
    (tmp_path / "phi" / "config.json").write_text(json.dumps({**phi, "vocab_size": 51200, **PHI}))
    published = {name: settings[name] for name in settings.keys() - {"phi_config"}}
    (folder / "config.json").write_text(json.dumps({**published, "llm_model_path": str(tmp_path / "phi")}))
    same_tensors(model, load(str(folder)))
    edit_json(folder / "config.json", llm_model_path="some/phi")
    with user_error("some/phi", "phi_config"):
        load(str(folder))


# ------------------------------------------------------------------------------------------------------------
# What is wrong with a checkpoint is one line that names it


def written(name: str, text: str):
    """A fault: what a file holds."""
    return lambda folder: (folder / name).write_text(text)


def missing(name: str):
    """A fault: no such file or folder."""
    return lambda folder: (folder / name).rename(folder / "elsewhere")


def configured(part: str = "", **changes):
    """A fault: values of config.json, or of a part of it."""

    def spoil(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        edit_json(folder / "config.json", **({part: {**old[part], **changes}} if part else changes))

    return spoil


def with_tensor(name: str, value: Tensor | None = None):
    """A fault: another tensor of that name, or none."""

    def spoil(folder: Path) -> None:
        [path] = folder.glob("*model.safetensors")
        tensors = load_file(path)
        tensors.pop(name, None)
        save_file(tensors if value is None else {**tensors, name: value}, path)

    return spoil


def without_token(token: str):
    """A fault: the tokenizer knows another in its place."""
    path = "tokenizer.json"
    return lambda folder: (folder / path).write_text((folder / path).read_text().replace(token, "<another>"))


SCALED_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
WITHOUT_TOKENS = [
    (without_token(token), name, token)
    for name, token in {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, **IMAGE_TAGS}.items()
]
INDEX = "model.safetensors.index.json"
BAD_FOLDERS = {  # layout: faults, and words of the message
    "transformers": [
        *WITHOUT_TOKENS,
        (written("config.json", "{"), "copy/config.json", "JSON"),
        (configured(model_type="llama"), "model_type 'llama'"),
        (configured("text_config", hidden_size="wide"), "copy", "config.json", "wide"),
        (configured("text_config", hidden_act="relu"), "silu"),
        (configured("text_config", rope_parameters=SCALED_ROPE), "scaled rotary"),
        (configured("text_config", vocab_size=287), "outside the embedding of 287 rows"),
        (configured("vision_config", use_qk_norm=True), "query/key norms"),
        (written("generation_config.json", '{"guidance_scale": -1.0}'), "guidance of -1.0"),
        (written("chat_template.jinja", "{{ nothing.of.this }}"), "make no prompt"),
        (missing("tokenizer.json"), "copy", "tokenizer.json"),
        (with_tensor("model.vqmodel.quant_conv.bias"), "'vqmodel.quant_conv.bias' is missing"),
        (with_tensor("model.more", torch.zeros(1)), "'more' is not one of the model's"),
        (with_tensor("model.aligner.fc1.bias", torch.zeros(3)), "'aligner.fc1.bias'", "[3], not [64]"),
        (missing("model.safetensors"), "copy", "model.safetensors", "pytorch_model.bin"),
        (written(INDEX, '{"weight_map": {"more": "model-2.safetensors"}}'), "copy/model-2.safetensors"),
        (written("model.safetensors", "rubbish" * 100), "copy/model.safetensors"),
    ],
    "original": [
        *(row for row in WITHOUT_TOKENS if row[1] != "image_token"),
        (lambda f: (WITHOUT_TOKENS[3][0](f), configured("language_config", vocab_size=287)(f)),
         "is outside the embedding of 287 rows"),
        (configured(gen_vision_config={}), "copy", "config.json", "params"),
        (with_tensor("language_model.model.norm.weight"), "'language_model.norm.weight' is missing"),
    ],
    "show-o": [
        (missing("tokenizer.json"), "microsoft/phi-1_5", "tokenizer.json", "copy"),
        (missing("magvitv2"), "showlab/magvitv2", "copy/magvitv2"),
        (configured(steps=10), "10 mask-predict steps", "9 tokens"),
        (configured(vocab_size=304), "are not the 304 rows"),
        (configured(codebook_size=8, vocab_size=307), "8 codes", "image tokenizer 4"),
        (configured(w_clip_vit=True), "through CLIP"),
        (configured(num_vq_tokens=8), "8 image tokens", "not a square"),
        (configured("phi_config", hidden_act="relu"), "'relu' for gelu_new"),
        (with_tensor("showo.lm_head.bias"), "'lm_head.bias' is missing"),
    ],
}


@pytest.mark.parametrize("layout, row", [(layout, row) for layout in LAYOUTS for row in BAD_FOLDERS[layout]])
def test_a_bad_checkpoint_is_refused_in_one_line(copy_of, offline, layout, row):
    folder, (fault, *words) = copy_of(layout), row
    fault(folder)
    with user_error(*words):
        load(str(folder))


def test_unknown_names_and_a_hub_out_of_reach(offline):
    with user_error("'no-such-model'", "tiny", "janus-pro-1b", "janus-pro-7b", "folder"):
        load("no-such-model")
    with user_error("deepseek-ai/Janus-Pro-1B", "--model FOLDER"):
        load("janus-pro-1b")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its library needs, for one repository a/b with files in memory."""

    def do_GET(self):
        hub, name, code, begin = self.server, Path(self.path.partition("?")[0]).name, 200, 0
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in hub.files.items()}
        headers = {"X-Repo-Commit": "a" * 40, "X-Error-Code": hub.refusal.get(name), "ETag": sums.get(name)}
        if name in hub.refusal:
            code, body = 403, b""
        elif name in hub.files:
            begin = int(re.findall(r"\d+", self.headers["Range"] or "0")[0])
            code, body = 206 if begin else 200, hub.files[name][begin:].replace(*hub.fault)
            hub.asked += [(name, begin)] if self.command == "GET" else []
        else:
            both = lambda file, size: dict(oid=sums[file], sha256=sums[file], size=size, pointerSize=1)
            files = [dict(both(file, len(content)), lfs=both(file, len(content)), path=file, rfilename=file,
                          type="file") for file, content in hub.files.items()]
            info = dict(id="a/b", sha="a" * 40, siblings=files)
            body = json.dumps(files if "/tree/" in self.path else info).encode()
        self.send_response(code)
        for header, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(header, str(value))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_GET
    log_message = lambda *_: None


@pytest.fixture
def hub(stored, tmp_path, monkeypatch):
    """A hub that has a Janus in original shards, and others in .bin; and an empty cache."""
    for form in "sharded safetensors", "sharded bin":
        write_weights(tmp_path, original_tensors(stored["original"][0]), form)
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    paths = *tmp_path.iterdir(), *stored["original"][1].glob("*.json")
    hub.files = {path.name: path.read_bytes() for path in paths}
    hub.asked, hub.refusal, hub.fault = [], {}, (b"", b"", 0)
    address, rest = f"http://127.0.0.1:{hub.server_port}", "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + rest)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()


def test_a_download_takes_what_is_read_goes_on_where_it_stopped_and_is_checked(hub, stored, tmp_path):
    first, second = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    part = tmp_path / "cache/models--a--b/blobs" / hashlib.sha256(hub.files[first]).hexdigest()
    part.parent.mkdir(parents=True)
    part.with_suffix(".incomplete").write_bytes(hub.files[first][:1000])
    hub.fault = hub.files[second][-9:], b"damaged, "
    with user_error(f"{second} came damaged", "try again"):
        load("a/b")
    hub.fault = b"", b"", 0
    same_tensors(stored["original"][0], load("a/b"))
    assert (first, 1000) in hub.asked and hub.asked.count((second, 0)) == 2
    assert not [name for name, _ in hub.asked if name.endswith(".bin")]
    hub.refusal, hub.asked = {"b": "RepoNotFound"}, []
    same_tensors(stored["original"][0], load("a/b"))  # without the hub: from the cache
    assert not hub.asked


@pytest.mark.parametrize("refusal, words", [
    ({"b": "RepoNotFound"}, "check its name"), ({"config.json": "GatedRepo"}, "accept its licence"),
    ({}, "set HF_HOME"),
])
def test_why_nothing_can_be_downloaded_decides_the_advice(hub, refusal, words, monkeypatch):
    hub.refusal = refusal
    if not refusal:
        monkeypatch.setattr(model_module, "http_get", MagicMock(side_effect=OSError(errno.ENOSPC, "full")))
    with user_error("a/b: cannot be downloaded", words):
        load("a/b")


@pytest.mark.parametrize("dump", [torch.save, pickle.dump], ids=["zipped", "bare"])
def test_nothing_but_tensors_is_unpickled(copy_of, dump):
    folder = copy_of("transformers")
    missing("model.safetensors")(folder)
    with open(folder / "pytorch_model.bin", "wb") as file:
        dump({"lm_head.weight": os.mkdir}, file)
    with user_error("pytorch_model.bin", "Weights only"):
        load(str(folder))


# ------------------------------------------------------------------------------------------------------------
# Image files, and the command line of sample.py


def noisy_picture(*size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def pixels_of(picture: np.ndarray) -> Tensor:
    """By hand, as the models want a picture [H, W, 3] uint8: [1, 3, H, W] in [-1, 1]."""
    return torch.tensor(picture).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_image_file_of_the_models_size_is_read_exactly(janus, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    Image.fromarray(np.rot90(noisy_picture(16, 16))).save(tmp_path / "noise.png", exif=turned)
    pixels = sample.read_image(janus, str(tmp_path / "noise.png"))
    close(pixels, pixels_of(noisy_picture(16, 16)), 1e-6)
    assert np.array_equal(sample.to_uint8(pixels)[0], noisy_picture(16, 16))
    Image.new("P", (16, 1)).save(tmp_path / "flat.png")
    assert sample.read_image(janus, str(tmp_path / "flat.png")).shape == (1, 3, 16, 16)


def test_pictures_are_cut_to_show_os_square(stored):
    """As by torchvision's Resize and CenterCrop: 6 x 8.7, so 6 x 8, of which 1 is cut off on each side."""
    picture = Image.fromarray(noisy_picture(11, 16))
    expected = np.asarray(picture.resize((8, 6), Image.BICUBIC))[:, 1:7]
    assert torch.equal(stored["show-o"][0].preprocess(picture), pixels_of(expected))


def test_pictures_are_cut_down_to_whole_pixels_of_janus_square(stored):
    """As image_processing_vlm.py: 40 x 37 becomes 16 x 14.8, so 16 x 14, in the middle of grey."""
    picture = Image.fromarray(noisy_picture(37, 40))
    expected = np.full((16, 16, 3), 127, np.uint8)
    expected[1:15] = np.asarray(picture.resize((16, 14), Image.BICUBIC))
    assert torch.equal(stored["original"][0].preprocess(picture), pixels_of(expected))


def test_a_file_that_is_no_image_is_refused(janus, tmp_path):
    Image.fromarray(noisy_picture(64, 64)).save(tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 3000)
    for name, words in {"cut.png": "truncated", "none.png": "such file"}.items():
        with user_error(str(tmp_path / name), words):
            sample.read_image(janus, str(tmp_path / name))


def run_sample(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    monkeypatch.setattr(sample, "pick_device", lambda: torch.device("cpu"))
    sample.run(sample.main)


@torch.no_grad()
def test_command_draws_a_sheet(stored, tmp_path, monkeypatch, capsys):
    (model, folder), shown = stored["transformers"], []
    monkeypatch.setattr(sample, "contact_sheet", lambda *arguments: shown.append(arguments))
    flags = "-n", 3, "--seed", 5, "--out", tmp_path / "sheet.png"
    run_sample(monkeypatch, "a red ring", *flags, "--model", folder)
    images = sample_images(model, ["a red ring"] * 3, [5, 6, 7], 5.0, compiled=False)
    [(pictures, captions, path)] = shown
    assert np.array_equal(pictures, sample.to_uint8(model.to_pixels(images.codes)))
    said = capsys.readouterr()
    assert "3 images" in said.out and captions == ["seed 5", "seed 6", "seed 7"]
    assert "compiling" not in said.err  # three do not pay for it, but as many as follow do
    assert sample.compiling_pays(model, sample.PAYS // model.num_image_tokens + 1)


def test_command_answers_a_question(stored, tmp_path, monkeypatch, capsys):
    model, folder = stored["transformers"]
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    run_sample(monkeypatch, "--image", tmp_path / "red.png", "--question", "Which color?", "--model", folder)
    with torch.no_grad():
        features = model.image_features(sample.read_image(model, str(tmp_path / "red.png")))
    assert capsys.readouterr().out == sample_answers(model, features, ["Which color?"]).texts[0] + "\n"


@pytest.mark.parametrize("arguments", ["a --image b --question c", "--question c", "a -n 0", "a --out b"])
def test_bad_usage_exits_with_2(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_sample(monkeypatch, *arguments.split())
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_gradients(loss: Tensor, true: Tensor, weights, tolerance: float = 1e-8) -> None:
    for gradients in zip(*(torch.autograd.grad(value, weights, retain_graph=True) for value in (loss, true))):
        close(*gradients, tolerance)


# ============================================================================================================
# Sampling: what is recorded, and from which distribution it is drawn


def image_gap(model, prompts, guidance, temperature, plant=lambda: None, scoring=None) -> float:
    """Largest difference between the log-probs that were recorded and those computed again."""
    images = sample_images(model, prompts, range(len(prompts)), guidance, temperature, compiled=False)
    assert images.logprobs.min() < -0.01  # nothing that is certain
    plant()
    settings = {"guidance": guidance, "temperature": temperature, **(scoring or {})}
    with torch.no_grad():
        return (image_logprobs(model, images, **settings)[0] - images.logprobs).abs().max().item()


@pytest.mark.parametrize("prompts", [EQUAL, PROMPTS], ids=["equal", "unequal"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_recorded_image_logprobs_are_those_computed_again(either, prompts, guidance, temperature):
    assert image_gap(either, prompts, guidance, temperature) <= 1e-4


def answer_gap(kind, seeds, plant=lambda: None) -> float:
    """The same of answers, some of which end early, and whose weights are a mean over their own tokens."""
    model = small_model(kind, seed=2)
    model.lm_head.weight.data[model.tokenizer.eos_token_id] *= 2
    features = model.image_features(random_pixels(model, 3))
    answers = sample_answers(model, features, QUESTIONS, seeds, max_tokens=6)
    ends = (answers.ids == model.tokenizer.eos_token_id).int()
    mask = ends.cumsum(1) - ends == 0
    assert torch.equal(answers.weights, mask / mask.sum(1, keepdim=True))
    assert not answers.logprobs[~mask].any() and not mask.all()
    plant()
    with torch.no_grad():
        gap = (answer_logprobs(model, features, QUESTIONS, answers.ids) - answers.logprobs).abs()
    return (gap * mask).max().item()


@pytest.mark.parametrize("seeds", [None, [1, 2, 4]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_answer_logprobs_are_those_computed_again(kind, seeds):
    assert answer_gap(kind, seeds) <= 1e-4


# Planted between sampling and scoring; the checks above must see each: of which models, whose function, and
# the wrong one in terms of the right one, f.
FAULTS = {
    "hidden states off by one": (
        KINDS, LanguageModel, "forward", lambda f: lambda *a, **k: f(*a, **k).roll(1, 1)),
    "codes shifted by one": (["janus"], Janus, "embed_codes", lambda f: lambda m, c: f(m, c.roll(1, 1))),
    "canvas shifted by one": (
        ["show-o"], ShowO, "embed_canvas", lambda f: lambda self, c, known: f(self, c.roll(1, 1), known)),
    "end of sentence for pad": (["janus"], Janus, "unconditional", lambda f: lambda self, ids, mask: (
        ids.where(f(self, ids, mask)[0] == ids, self.tokenizer.eos_token_id), mask)),
    "a token is hidden": (KINDS, sample, "causal_mask", lambda f: lambda m: f(m & (m.cumsum(1) != 2))),
    "prompts see padding": (KINDS, sample, "causal_mask", lambda f: lambda m: f(torch.ones_like(m))),
    "prompts see the future": (
        KINDS, sample, "causal_mask", lambda f: lambda m: m[:, None, None].expand(-1, -1, m.shape[1], -1)),
    "images see padding": (KINDS, sample, "after_prompts", lambda f: lambda model, x, m, *rest: f(
        model, x, m | (torch.arange(m.shape[-1]) < m.shape[-1] - x.shape[1]), *rest)),
    "images see the future": (["janus"], sample, "after_prompts", lambda f: lambda model, x, m, *rest: f(
        model, x, m | (torch.arange(m.shape[-1]) >= m.shape[-1] - x.shape[1]), *rest)),
    "prompts' positions doubled": (KINDS, sample, "positions_of", lambda f: lambda m: 2 * f(m)),
    "images' positions off by one": (
        KINDS, sample, "after_prompts", lambda f: lambda *a: f(*a[:-1], F.pad(a[-1], (1, 0), value=True))),
    "prompts exchanged": (
        KINDS, sample, "after_prompts", lambda f: lambda *a: f(*a[:-2], a[-2].roll(1), a[-1])),
    "guidance for temperature": (
        KINDS, sample, "guided_logits", lambda f: lambda model, h, w, T, *rest: f(model, h, T, w, *rest)),
    "branches swapped": (
        KINDS, sample, "guided_logits", lambda f: lambda model, h, *rest: f(model, h.flip(0), *rest)),
    "questions see padding": ([], model_module, "causal_mask", lambda f: lambda m: f(torch.ones_like(m))),
}


def plant_fault(monkeypatch, fault: str) -> None:
    _, owner, name, wrong = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))


@pytest.mark.parametrize("kind, fault", [(kind, fault) for fault in FAULTS for kind in FAULTS[fault][0]])
def test_planted_fault_in_image_scoring_is_seen(kind, fault, monkeypatch):
    assert image_gap(small_model(kind), PROMPTS, 5.0, 0.7, lambda: plant_fault(monkeypatch, fault)) > 1e-2


@pytest.mark.parametrize("fault", ["hidden states off by one", "questions see padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_fault_in_answer_scoring_is_seen(kind, fault, monkeypatch):
    assert answer_gap(kind, [1, 2, 4], lambda: plant_fault(monkeypatch, fault)) > 1e-2


@pytest.mark.parametrize("wrong", [{"logprob": "conditional"}, {"guidance": 1.0}, {"temperature": 1.0}])
def test_scoring_another_distribution_than_the_sampled_is_seen(either, wrong):
    assert image_gap(either, PROMPTS, 5.0, 0.7, scoring=wrong) > 1e-2


def test_each_different_prompt_is_read_once(either, monkeypatch):
    """Two groups of three images, guided: two prompts, and empty ones, a Janus' of two lengths."""
    read, right = [], LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda *a, **k: read.append(len(a[1])) or right(*a, **k))
    images = sample_images(either, ["a red circle"] * 3 + ["two rings"] * 3, range(6), compiled=False)
    image_logits(either, images, 5.0, 1.0)
    prompts, draws, scores = (4, 15, 1) if isinstance(either, Janus) else (3, 5, 5)
    assert read == [prompts, *[12] * draws, prompts, *[12] * scores]


def test_seed_decides_image_and_answer_whatever_else_is_in_the_batch(either):
    """Padding does not matter. Another seed gives another, each use of a seed other numbers, and nobody's own
    generator moves."""
    before = torch.get_rng_state()
    together = sample_images(either, [*PROMPTS, PROMPTS[0]], [7, 8, 9, 10], 1.0, 2.0, compiled=False)
    features = either.image_features(together.codes[:3])
    answers = sample_answers(either, features, QUESTIONS, [7, 8, 9], max_tokens=6)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, [7, 8, 9])):
        alone = sample_images(either, [prompt], [seed], 1.0, 2.0, compiled=False)
        assert torch.equal(alone.codes[0], together.codes[row])
        close(alone.logprobs[0], together.logprobs[row])
        answer = sample_answers(either, features[row, None], [QUESTIONS[row]], [seed], max_tokens=6)
        length = answer.ids.shape[1]
        assert torch.equal(answer.ids[0], answers.ids[row, :length])
        close(answer.logprobs[0], answers.logprobs[row, :length])
    assert not torch.equal(together.codes[0], together.codes[3])
    uses = sample.IMAGE, sample.ANSWER, sample.NOISE, sample.REPLAY
    numbers = [torch.rand(20, generator=sample.generator(seed, use)) for seed, use in product((1, 2), uses)]
    assert len(torch.cat(numbers).unique()) == 160
    assert torch.equal(torch.get_rng_state(), before)


# -- the draw ----------------------------------------------------------------------------------------------


def chi_square(counts, expected) -> float:
    """p-value of the counts, the cells expected fewer than 5 times taken together."""
    counts, expected = (np.asarray(cells, float).flatten() for cells in (counts, expected))
    rare = expected < 5
    if rare.any():
        counts, expected = (np.append(cells[~rare], cells[rare].sum()) for cells in (counts, expected))
    return stats.chisquare(counts, expected, sum_check=False).pvalue


def test_draw_follows_the_softmax_and_gives_its_logprobs():
    logits = 1.5 * torch.randn(16, generator=seeded(0))
    tokens, logprobs = draw(logits.expand(20_000, 16), torch.rand(20_000, generator=seeded(1)))
    counts, exact = torch.bincount(tokens, minlength=16), logits.double().log_softmax(0)
    assert chi_square(counts, 20_000 * exact.exp()) > 0.001
    assert chi_square(counts, 20_000 * (logits.double() / 1.1).softmax(0)) < 1e-9
    close(logprobs.double(), exact[tokens], 1e-5)


def test_draw_reaches_the_first_and_the_last_possible_code_and_no_impossible_one():
    logits = torch.randn(2000, 500, generator=seeded(0))
    logits[:, :3], logits[:, -2:] = -math.inf, -math.inf
    first, last = (draw(logits, torch.full((2000,), u))[0] for u in (0.0, 1 - 2**-24))
    assert (first == 3).all() and (last == 497).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_sampler_draws_the_same_images_which_follow_their_enumerated_probabilities(kind):
    """The same but where rounding decides, in one graph for prompts of different lengths, and a width of
    attention that grows twice in a Janus' 81 codes. Chi-square of its first three; of a Show-o's two and
    which came first, which is by confidence, whose Gumbel noise is halved in the first of two steps, so with
    probability sigmoid(difference of the log-probs / 0.5)."""
    if kind == "janus":
        count, model = 600, small_janus(layers=1, image_size=36, codes=3, text=dict(head_dim=24))
    else:
        settings = dict(codes=2, tokens=2, steps=2, phi_config={**PHI, "num_hidden_layers": 1})
        count, model = 3000, small_show_o(2, **settings).double()
        model.lm_head.weight.data *= 0.35
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompt in PROMPTS[:2]:
        settings = model, [prompt] * count, range(count), 1.0, 1.0
        plain, images = (sample_images(*settings, compiled) for compiled in (False, True))
        same = (plain.codes == images.codes).all(1)
        assert same.double().mean() > 0.99
        close(plain.logprobs[same], images.logprobs[same])
    size = model.num_codes
    cells, every = images.codes[:, :3], torch.tensor(list(product(range(size), repeat=3)))
    rows = images.ids[:1], images.mask[:1]
    if kind == "janus":
        many = Images(F.pad(every, (0, 78)), None, *(part.expand(27, -1) for part in rows), None)
        chances = score_logits(image_logits(model, many, 1.0, 1.0)[:, :3], every)[0].sum(1).exp()
    else:
        cells, chances = torch.cat((images.unmask_step[:, :1], cells), dim=1), torch.zeros(2, 2, 2)
        first = guided_by_hand(model, rows, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2) > 0, 2.0)
        for place, *codes in every.tolist():  # the place that comes first, and what is drawn for both
            drawn, known = first[[0, 1], codes], torch.arange(2)[None] == place
            chosen = drawn.sum().exp() * torch.sigmoid((drawn[place] - drawn[1 - place]) / 0.5)
            second = guided_by_hand(model, rows, torch.tensor([codes]), known, 2.0)[1 - place].exp()
            chances[place].select(place, codes[place]).add_(chosen * second)
    counts = torch.bincount(cells @ torch.tensor([size**2, size, 1]), minlength=size**3)
    expected = count * chances.flatten()
    assert expected.sum().item() == pytest.approx(count, rel=1e-5)
    assert chi_square(counts, expected) > 0.001 > chi_square(counts, [count / size**3] * size**3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -- mask-predict, its replay, and masking anew ------------------------------------------------------------


def guided_by_hand(model: ShowO, prompt, codes: Tensor, known: Tensor, weight: float) -> Tensor:
    """Log-probs [N, V] of one image's codes in one pass without a cache: c = `weight`."""
    branches = prompt, model.unconditional(*prompt)
    cond, uncond = (model.lm_head(model.canvas_hidden(*rows, codes, known))[0] for rows in branches)
    return (weight * cond + (1 - weight) * uncond)[:, model.first_code : model.mask_id].log_softmax(-1)


def test_mask_schedule_is_the_published_cosine():
    assert sample.mask_schedule(9, 5) == [8, 7, 5, 2, 0]  # 9 cos(18, 36, 54, 72 degrees): 8.6, 7.3, 5.3, 2.8
    assert sample.mask_schedule(9, 1) == [0] and sample.mask_schedule(9, 9) == list(range(9))[::-1]
    cosine = [int(1024 * torch.cos(torch.tensor(step / 50) * math.pi * 0.5)) for step in range(1, 50)]
    assert sample.mask_schedule(1024, 50) == [*cosine, 0]
    with user_error("10 mask-predict steps", "9 tokens"):
        sample.mask_schedule(9, 10)


def test_the_most_confident_codes_are_committed_on_schedule_and_never_change(show_o, monkeypatch):
    """By log-prob + temperature x Gumbel, the temperature multiplied by (1 - share of steps done) at every
    step; recomputed from the images' own random numbers."""
    calls, right, temperature, left = [], sample.step_canvas, 1.0, [9, *sample.mask_schedule(9, 5)]
    spy = lambda *inputs: calls.append((*inputs[2:4], *right(*inputs))) or calls[-1][2:]
    monkeypatch.setattr(sample, "step_canvas", spy)
    images = sample_images(show_o, PROMPTS, [4, 5, 6], 0.0, 4.0, compiled=False)
    uniforms = sample.uniform_numbers([4, 5, 6], sample.IMAGE, 5 * 2 * 9, "cpu").view(3, 5, 2, 9)
    for step, (codes, known, drawn, logprobs, commit) in enumerate(calls):
        assert torch.equal(images.codes[known], codes[known]) and (images.unmask_step[commit] == step).all()
        assert torch.equal(images.codes[commit], drawn[commit])
        assert torch.equal(images.logprobs[commit], logprobs[commit])
        temperature *= 1 - (step + 1) / 5
        confidence = logprobs - temperature * (-uniforms[:, step, 1].log()).log()
        best = confidence.masked_fill(known, -math.inf).topk(left[step] - left[step + 1]).indices
        assert torch.equal(commit, torch.zeros_like(known).scatter(1, best, True))
    assert len(calls) == 5 and images.replayed is None  # every step's codes are scored


def replay_only(images: Images, replayed: Tensor, of: int) -> Images:
    """The same, of which these steps [B, K] of so many are scored."""
    scored = (images.unmask_step[..., None] == replayed[:, None]).any(-1)
    weights = images.weights * scored * of / replayed.shape[1]
    return replace(images, replayed=replayed, weights=weights, logprobs=images.logprobs * scored)


def test_random_subsets_of_steps_are_drawn_evenly_and_scored_as_recorded(show_o):
    """Each image's own, whatever it looks like; by default all steps."""
    images = sample_images(show_o, ["a"] * 600, range(600), 0.0, 1.5, compiled=False)
    some = choose_scored(show_o, images, range(600), "replay", 2)
    expected = replay_only(images, some.replayed, 5)
    close(some.weights, expected.weights, 1e-6)
    assert torch.equal(some.logprobs, expected.logprobs)
    close(image_logprobs(show_o, some, 0.0, 1.5)[0], some.logprobs)
    for half in (images.codes.sum(1) % 2 == 0, images.codes.sum(1) % 2 == 1):
        drawn = Counter(tuple(sorted(row)) for row in some.replayed[half].tolist())
        counts = [drawn[pair] for pair in combinations(range(5), 2)]
        assert chi_square(counts, [half.sum() / 10] * 10) > 0.001
    assert all(choose_scored(show_o, images, [], None, count) is images for count in (None, 0, 5))


ORDER = torch.tensor([1, 0, 0, 1])  # which step commits which of the toy's four codes
ALL_IMAGES = torch.tensor(list(product(range(2), repeat=4)))  # [16, 4]


@pytest.fixture(scope="module")
def toy():
    """Two Show-os, a policy and a reference, that draw four codes of two kinds in two steps; of the sixteen
    images in one ORDER, the log-probs [16, 4, 2] of what each may draw for each code, the first step's given
    masks, the second's given the first's; the images, of the weight of their chance; these chances [16]."""
    models, tables = [small_show_o(seed, codes=2, tokens=4, steps=2).double() for seed in (6, 9)], []
    for model, codes in product(models, ALL_IMAGES):
        rows = model.generation_prompt(["a"])
        steps = [guided_by_hand(model, rows, codes[None], ORDER[None] < step, 3.0) for step in (0, 1)]
        tables.append(torch.stack(steps)[ORDER, range(4)])
    policy, reference = torch.stack(tables).split(16)
    logprobs = policy.gather(2, ALL_IMAGES[..., None])[..., 0]
    chances = logprobs.sum(1).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    rows, weights = (part.expand(16, -1) for part in rows), chances.detach()[:, None].expand(16, 4) / 4
    images = Images(ALL_IMAGES, logprobs.detach(), *rows, weights, ORDER.expand(16, -1))
    return models, (policy, reference.detach()), images, chances


def test_gradient_of_what_is_rewarded_equals_the_enumerated_one(toy):
    """That of minus the expected reward, over the number of tokens: GRPO's, whose advantages are the rewards;
    its mean over the subsets of one step; and expert iteration's, of rewarded pictures as often as drawn."""
    (policy, _), _, images, chances = toy
    rewards, settings, losses = torch.rand(16, generator=seeded(2)), objective_settings(guidance=2.0), []
    for part in (images, *(replay_only(images, torch.full((16, 1), step), 2) for step in (0, 1))):
        rollout = grpo.Rollout([], [], part, None, None, part.logprobs)
        losses.append(grpo.objective(policy, policy, rollout, rewards, settings)[0])
    kept, empty = [sft.Kept("a", codes, ORDER) for codes in ALL_IMAGES], torch.zeros(16, dtype=torch.bool)
    expert = (sft.replay_loss(policy, kept, empty, range(16), settings) * chances.detach() * rewards).sum()
    true, weights = -(chances * rewards).sum() / 4, list(policy.language_model.parameters())
    for loss in (losses[0], (losses[1] + losses[2]) / 2, expert):
        same_gradients(loss, true, weights)
    with pytest.raises(AssertionError):
        same_gradients(losses[1], true, weights, 1e-3)


@pytest.mark.parametrize("script", [grpo, sft])
def test_kl_gradient_equals_the_enumerated_one(script, toy, monkeypatch):
    """k3's gradient along samples of the policy is, on average, that of KL(reference || policy) of each token
    given those before it; the reference gets none."""
    (policy, reference), (p, r), images, chances = toy
    true = 0.5 * (chances.detach() * (r.exp() * (r - p)).sum((1, 2))).sum() / 4
    settings, zeros = objective_settings(guidance=2.0, beta=0.5, freeze=["vision_model"]), torch.zeros(16)
    rollout = grpo.Rollout([], [], images, None, None, r.gather(2, ALL_IMAGES[..., None])[..., 0])
    monkeypatch.setattr(sft, "answer_loss", lambda *_: zeros)
    if script is grpo:
        loss, _ = grpo.objective(policy, None, rollout, zeros, settings)
    else:
        loss, _ = sft.objective(policy, None, reference, rollout, (), None, settings)
    same_gradients(loss, true, list(policy.language_model.parameters()))
    others = torch.autograd.grad(loss, list(reference.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in others)


@torch.no_grad()
def test_remasking_has_its_enumerated_mean(toy):
    """Over sizes, a share of four codes uniform in [0.6, 1), and places of the mask: the mean log-prob of
    what is masked given the rest."""
    model, codes, exact = toy[0][0], ALL_IMAGES[9:10], 0.0
    rows = model.generation_prompt(["a"])
    sizes = (4 * torch.linspace(0.6, 1, 400_001)).round()
    for hidden in (list(places) for m in range(2, 5) for places in combinations(range(4), m)):
        known = ~torch.isin(torch.arange(4), torch.tensor(hidden))[None]
        value = guided_by_hand(model, rows, codes, known, 3.0)[hidden, codes[0, hidden]].mean()
        exact += (sizes == len(hidden)).double().mean() / math.comb(4, len(hidden)) * value
    images = Images(*(part.expand(3000, -1) for part in (codes, codes, *rows, codes, ORDER[None])))
    images = choose_scored(model, images, range(3000), "remask", None, 2.0, 1.0, "guided")
    values = (images.weights * images.logprobs).sum(1)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(3000) and values.std() > 0.1


@pytest.mark.parametrize("mode", ["guided", "detached", "conditional"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_in_pieces_are_those_of_whole_logits(kind, mode, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", 4)
    model = small_model(kind, codes=512, **({} if kind == "janus" else {"tokens": 16}))
    images = sample_images(model, PROMPTS, [1, 2, 3], 2.0, 0.8, compiled=False)
    images.weights[:, ::3], sizes = 0, []  # what is not scored
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logprobs, entropy = image_logprobs(model, images, 2.0, 0.8, mode)
    assert max(sizes) < images.codes.numel() * model.num_codes  # of the logits
    whole = torch.distributions.Categorical(logits=image_logits(model, images, 2.0, 0.8, mode))
    expected = whole.log_prob(images.codes) * (images.weights > 0)
    close(logprobs, expected, 1e-5)
    close(entropy, whole.entropy(), 1e-5)
    same_gradients(logprobs.mean(), expected.mean(), model.language_model.norm.weight, 1e-5)


# ============================================================================================================
# The objectives


def objective_settings(**changes) -> grpo.GRPOSettings:
    """Of one trajectory, whose tokens' advantage alone counts."""
    plain = dict(guidance=1.0, beta=0.0, answer_weight=0.0, judge="policy", prompts=1, group=1, freeze=[],
                 logprob="guided")
    return grpo.GRPOSettings(**{**plain, **changes})


def small_rollout(model: UnifiedModel, answerer: UnifiedModel, settings) -> grpo.Rollout:
    tasks = [draw_task(shapes.VOCABULARY, np.random.default_rng(i)) for i in range(3)]
    run = SimpleNamespace(sampler=model, answerer=answerer, settings=settings, compiled=False)
    rollout = grpo.roll_out(run, tasks, [5, 6, 7])
    with torch.no_grad():
        images, _, answers = grpo.trajectory_logprobs(model, rollout, settings)
    return replace(rollout, reference_images=images, reference_answers=answers)


def test_advantages_by_hand():
    """Rewards 0 and 1 have mean 0.5 and deviation 0.5; an all-equal group gives no gradient."""
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]), eps=1e-12)
    expected = torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 0], [-(3**-0.5), -(3**-0.5), -(3**-0.5), 3**0.5]])
    close(advantages, expected, 1e-6)


def test_objective_by_hand(monkeypatch):
    """Loss and everything logged where policy, sampler and reference are three models, and ratios are
    clipped: with A > 0 above 1.2, with A < 0 below 0.8. Its gradient against finite differences."""
    expected, A = Counter(), np.array([[1.5], [-0.5], [-1.0]])
    image, answer = torch.rand(4, 3, 6, generator=seeded(3), dtype=torch.double).split([4, 2], dim=2)
    images, answers = Images(None, image[1], None, None, image[3]), Answers([], None, answer[1], answer[3])
    rollout = grpo.Rollout([], [], images, None, answers, image[2], answer[2])

    def loss_of(*logprobs):
        monkeypatch.setattr(grpo, "trajectory_logprobs", lambda *_: (logprobs[0], image[0] + 1, logprobs[1]))
        settings = objective_settings(beta=0.3, answer_weight=0.7)
        return grpo.objective(None, None, rollout, torch.tensor(A[:, 0]), settings)

    for part, share, numbers in (("image", 1.0, image), ("answer", 0.7, answer)):
        p, old, r, weights = numbers.numpy()
        ratio, kl = np.exp(p - old), np.exp(r - p) - (r - p) - 1
        gain = np.where(A > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8)) * A
        expected["loss"] += share * (weights * (0.3 * kl - gain)).sum()
        expected[f"kl_{part}"] = (weights * kl).sum()
        if part == "image":
            logged = {"clipped": abs(ratio - 1) > 0.2, "ratio": ratio - 1, "entropy_image": p + 1,
                      "rollout_difference": abs(p - old)}
            expected |= {name: (weights * values).sum() for name, values in logged.items()}
            expected["ratio"] += 3
    loss, sums = loss_of(image[0], answer[0])
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(dict(expected))
    scores = image[0].clone().requires_grad_(), answer[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda *logprobs: loss_of(*logprobs)[0], scores)


# -- through the image -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["", "winner raised", "others not cut off", "not conditioned"])
def test_conditional_gumbel_noise_is_won_by_the_sampled_code_and_is_gumbel_noise(fault):
    """The arg-max is the sampled code in all of 1e5 draws; over these, every code's noise is Gumbel(0, 1),
    that of two uncorrelated. Noise that only makes the right code win, as one may write it, is not."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0]).expand(100, 1000, 5)  # 100 seeds
    codes = draw(logits.flatten(0, 1), torch.rand(100_000, generator=seeded(0)))[0].view(100, 1000)
    noise, chosen = gumbel_given(logits, codes, range(100)), codes[..., None]
    if fault:
        noise = -torch.empty_like(logits).exponential_(generator=seeded(1)).log()
        top = logits.logsumexp(-1, keepdim=True) + noise.gather(-1, chosen)
        if fault == "winner raised":
            top = (logits + noise).amax(-1, keepdim=True) + 0.1
        if fault != "not conditioned":
            noise = noise.scatter(-1, chosen, top - logits.gather(-1, chosen))
    wins = ((logits + noise).argmax(-1) == codes).all()
    noises = noise.flatten(0, 1).T.double().numpy()  # [5, 1e5]
    likely = min(stats.kstest(values, "gumbel_r").pvalue for values in noises) > 0.001
    correlated = np.abs(np.corrcoef(noises) - np.eye(5)).max() > 4.5 / 1e5**0.5
    assert (wins and likely and not correlated) == (not fault)


@torch.no_grad()
def test_relaxed_image_is_the_sampled_image_bit_for_bit(tiny):
    images = sample_images(tiny, PROMPTS, range(3), 3.0, compiled=False)
    for tau in (0.1, 1.0, 5.0):
        relaxed = relaxed_codes(image_logits(tiny, images, 3.0, 1.0), images.codes, tau, range(3))
        assert torch.equal(relaxed, F.one_hot(images.codes, tiny.num_codes).float())
        assert torch.equal(tiny.to_pixels(relaxed), tiny.to_pixels(images.codes))


def test_a_soft_image_lies_between_codes_and_softmax_where_codes_are_scored():
    logits, codes = torch.randn(2, 3, 5, generator=seeded(0)), torch.tensor([[0, 4, 2], [1, 1, 3]])
    hard, weights = F.one_hot(codes, 5).float(), torch.tensor([[0.5, 0.5, 0], [0, 1, 0]])
    relaxed = ((logits + gumbel_given(logits, codes, range(2))) / 0.7).softmax(-1)
    image = relaxed_codes(logits, codes, 0.7, range(2), 0.3, weights)
    close(image, (0.7 * hard + 0.3 * relaxed).where(weights[..., None] > 0, hard), 1e-6)


def test_bound_gradient_shortens_the_long_ones_and_keeps_their_direction():
    images = torch.ones(3, 2, 2, requires_grad=True)
    pulls = torch.tensor([[[3.0, 4.0], [0.0, 4.0]], [[0.3, 0.0], [0.6, 0.8]], [[0.0, 0.0], [0.0, 2.0]]])
    bounded = sample.bound_gradient(images * 1.0, 1.0)
    assert torch.equal(bounded, images)
    gradient = torch.autograd.grad((bounded * pulls).sum(), images)[0]
    close(gradient, pulls / torch.tensor([[5.0, 4.0], [1.0, 1.0], [1.0, 2.0]])[..., None], 1e-6)


TINIEST = {"janus": dict(image_size=8, patch_size=2, channels=(1, 2), codes=7, layers=1),
           "show-o": dict(tokens=4, steps=2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logprob", ["guided", "detached", "conditional"])
def test_end_to_end_gradient_equals_finite_differences(logprob, kind, monkeypatch):
    """In float64, along a random direction: the straight-through gradient is the derivative of the answer's
    loss about the image `(hard + soft(here)) / 2 + N weights (soft(model) - soft(here))`, written out here,
    the noise held."""
    model, bounds = small_model(kind, **TINIEST[kind]), []
    images = random_images(model.double(), ["a red ring", "a"])
    images.weights = torch.rand(images.codes.shape, generator=seeded(0))
    settings = objective_settings(guidance=3.0, tau=0.7, logprob=logprob, prompts=3, group=2)
    told = ("What is it?", "a red ring"), ("How many?", "one")
    tasks = [SimpleNamespace(question=question, answer=answer) for question, answer in told]
    rollout = grpo.Rollout(tasks, [3, 4], images, None, None)
    monkeypatch.setattr(grpo, "bound_gradient", lambda one_hots, norm: bounds.append(norm) or one_hots)
    features = grpo.straight_through(model, model, rollout, settings)[2]
    loss = sft.answer_loss(model, tasks, features).sum()
    assert bounds == [0.1 / 6]

    def logits_now():
        if logprob != "detached":
            return image_logits(model, images, 3.0, 1.0, logprob).detach()
        cond = image_logits(model, images, 3.0, 1.0, "conditional").detach()
        return uncond + model.conditional_weight(3.0) * (cond - uncond)  # where it stays

    def moved():
        soft = ((logits_now() + noise) / 0.7).softmax(-1)
        image = (hard + here) / 2 + model.num_image_tokens * images.weights[..., None] * (soft - here)
        return sft.answer_loss(model, tasks, model.image_features(image)).sum().item()

    uncond = image_logits(model, images, -model.conditional_weight(0), 1.0).detach()
    noise, hard = gumbel_given(logits_now(), images.codes, [3, 4]), F.one_hot(images.codes, model.num_codes)
    here = ((logits_now() + noise) / 0.7).softmax(-1)
    assert loss.item() == pytest.approx(moved(), abs=1e-9)
    weights, values = list(model.parameters()), []
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True, allow_unused=True)
    directions = [torch.randn(w.shape, generator=seeded(i), dtype=w.dtype) for i, w in enumerate(weights)]
    for step in (1e-6, -2e-6):
        for weight, direction in zip(weights, directions):
            weight.data += step * direction
        values.append(moved())
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions)).item()
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4) and slope != 0


def test_end_to_end_raises_the_log_probability_of_its_answers_in_proportion_to_their_advantage(monkeypatch):
    """Whatever it was when they were drawn, about the picture and not the one the judge is shown."""
    answers, A = Answers([], None, torch.rand(2, 3), torch.tensor([[0.5, 0.5, 0], [1, 0, 0]])), [2.0, -1.0]
    rollout = grpo.Rollout([], [], random_images(small_model("janus"), ["a", "b"]), None, answers)
    zeros, logprobs = torch.zeros(rollout.images.codes.shape), torch.rand(2, 3, requires_grad=True)
    rollout = replace(rollout, images=replace(rollout.images, logprobs=zeros), reference_images=zeros)
    monkeypatch.setattr(grpo, "straight_through", lambda *_: (zeros, zeros, None))
    monkeypatch.setattr(grpo, "answer_logprobs", lambda *_: logprobs)
    settings = objective_settings(mode="end-to-end", answer_weight=0.7)
    grpo.objective(None, None, rollout, torch.tensor(A), settings)[0].backward()
    close(logprobs.grad, -0.7 * answers.weights * torch.tensor(A)[:, None], 1e-6)


@pytest.mark.parametrize("judge", ["policy", "frozen"])
def test_end_to_end_gradient_reaches_what_learns_and_nothing_else(tiny, judge):
    """Head, trunk and generation embedding get a gradient through the picture alone; SigLIP, the image
    tokenizer and the reference get none, nor does what only answers, under a frozen judge. Recomputing
    activations changes nothing."""
    policy, advantages, gradients = copy.deepcopy(tiny), torch.tensor([1.0, -1.0, 0.5]), []
    settings = objective_settings(mode="end-to-end", answer_weight=1.0, judge=judge, freeze=None)
    grpo.recommend(settings, {}, policy)
    reference, _ = grpo.prepare(policy, settings, policy.device, torch.float32, None)
    answerer = policy if judge == "policy" else reference
    rollout = small_rollout(policy, answerer, settings)
    for recompute in (False, True):
        policy.zero_grad(), policy.recompute(recompute)
        grpo.objective(policy, answerer, rollout, advantages, settings)[0].backward()
        gradients.append({name: weight.grad for name, weight in policy.named_parameters()})
    idle = ("vision_model", "vqmodel", *(("lm_head", "aligner") if judge == "frozen" else ()))
    for name, gradient in gradients[0].items():
        assert name.startswith(idle) == (gradient is None or not gradient.any()), name
        if gradient is not None:
            close(gradients[1][name], gradient, 1e-6)
    assert all(weight.grad is None and not weight.requires_grad for weight in reference.parameters())


# -- one step of both trainers -----------------------------------------------------------------------------

STEPS = [("janus", {}), ("show-o", {}), ("show-o", {"replay_steps": 2}), ("show-o", {"estimator": "remask"})]


def one_step(model: UnifiedModel, mode: str, **changes):
    """A step of both trainers on three trajectories, and replayed the same pictures, of which the second
    without its caption: the rollout, and what grpo.objective and sft.objective give."""
    plain = dict(guidance=2.0, temperature=0.9, beta=0.1, answer_weight=1.0)
    settings = objective_settings(mode=mode, **plain, **changes)
    rollout = small_rollout(model, model, settings)
    images, empty = rollout.images, torch.tensor([False, True, False], device=model.device)
    advantages = torch.tensor([1.0, -1, 0.5], device=model.device)
    steps = [None] * 3 if images.unmask_step is None else images.unmask_step
    kept = [sft.Kept(task.prompt, *row) for task, *row in zip(rollout.tasks, images.codes, steps)]
    learned = grpo.objective(model, model, rollout, advantages, settings)
    return rollout, learned, sft.objective(model, model, model, rollout, kept, empty, settings)


@pytest.mark.parametrize("script, mode, given, estimator, logprob", [
    (sft, "two-stage", {}, "remask", "conditional"),
    (sft, "two-stage", {"replay_steps": 2}, "replay", "guided"),
    (sft, "two-stage", {"estimator": "replay"}, "replay", "guided"),
    (sft, "end-to-end", {}, "replay", "guided"),
    (grpo, "two-stage", {}, "replay", "guided"),
    (grpo, "two-stage", {"logprob": "detached"}, "replay", "detached"),
])
def test_what_scores_a_show_os_trajectory_by_default(script, mode, given, estimator, logprob):
    for world in ("shapes", "geneval"):
        settings = (sft.SFTSettings if script is sft else grpo.GRPOSettings)(mode=mode, **given)
        grpo.recommend(settings, grpo.preset(script.PRESETS, world, "ShowO", mode), small_model("show-o"))
        assert (settings.estimator, settings.logprob) == (estimator, logprob)
        assert (settings.replay_steps is None) == (estimator == "remask")


@pytest.mark.parametrize("mode", ["two-stage", "end-to-end"])
@pytest.mark.parametrize("kind, estimator", STEPS, ids=str)
def test_first_update_is_on_policy(kind, estimator, mode):
    """Ratio 1 and KL 0 to the reference, whatever part of the trajectory is scored, in both scripts; answers
    cost what each costs alone, replayed pictures what their captions say, but for one, which teaches none."""
    model = small_model(kind)
    rollout, *learned = one_step(model, mode, **estimator)
    for loss, sums in learned:
        for key in ("kl_image", "kl_answer", "rollout_difference", "clipped"):
            assert sums.get(key, torch.zeros(())).item() == pytest.approx(0, abs=1e-4)
        gradients = torch.autograd.grad(loss, list(model.language_model.parameters()))
        assert all(g.isfinite().all() for g in gradients) and max(g.abs().max() for g in gradients) > 1e-4
    assert learned[0][1]["ratio"].item() == pytest.approx(3, abs=1e-4)
    parts = grpo.split(rollout, 2)
    for name in ("tasks", "seeds", "questions"):
        assert sum((getattr(part, name) for part in parts), []) == getattr(rollout, name)
    assert torch.equal(torch.cat([part.images.codes for part in parts]), rollout.images.codes)
    for i, task in enumerate(rollout.tasks):  # of answers of different lengths, each the mean over its own
        ids, _ = encode_answers(model, [task.answer])
        alone = answer_logprobs(model, rollout.image_features[i : i + 1], [task.question], ids)
        sums["loss_answer"] = sums["loss_answer"] + alone.mean()
    assert sums["loss_answer"].item() == pytest.approx(0, abs=1e-4)
    words = ["a", "is", "the ring"]
    pairs = zip(rollout.questions, words)
    short = replace(rollout, tasks=[SimpleNamespace(question=asked, answer=word) for asked, word in pairs])
    lengths = encode_answers(model, words)[1].sum(1)
    chances = (-lengths * sft.answer_loss(model, short.tasks, rollout.image_features)).exp().tolist()
    run = SimpleNamespace(settings=grpo.GRPOSettings(reward="likelihood"), answerer=model)
    assert grpo.self_reward(run, short) == pytest.approx(chances, rel=1e-3, abs=1e-30)
    if mode == "two-stage":
        images = rollout.images
        ids, mask = model.unconditional(images.ids, images.mask)
        blank = replace(images, ids=ids, mask=mask)
        scores = (image_logprobs(model, part, 2.0, 0.9)[0] for part in (images, blank))
        captioned, empty = (-(images.weights * logprobs).sum(1) for logprobs in scores)
        expected = captioned[0] + empty[1] + captioned[2]
        assert sums["loss_image"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert abs(captioned[1] - empty[1]) > 1e-2


# -- devices -----------------------------------------------------------------------------------------------


class Far(Tensor):
    """A tensor that says it is on a device, computes on the CPU, and refuses to meet one that is not."""

    @staticmethod
    def __new__(cls, near: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype,
            device="far:0", requires_grad=near.requires_grad,
        )

    def __init__(self, near: Tensor):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute_far(func, args, kwargs or {})


def near(value):
    return value.near if isinstance(value, Far) else value


def far(value):
    return Far(value) if isinstance(value, Tensor) and not isinstance(value, Far) else value


def compute_far(func, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_far, device = any(isinstance(t, Far) for t in tensors), kwargs.get("device")
    if is_far and func.name() not in ("aten::_to_copy", "aten::copy_"):
        left = [tuple(t.shape) for t in tensors if t.dim() and not isinstance(t, Far)]
        assert not left, f"{func.name()}: a tensor on the CPU meets one on the device: {left}"
    if device is not None:
        is_far, kwargs = torch.device(device).type == "far", {**kwargs, "device": "cpu"}
    out = func(*tree_map(near, args), **tree_map(near, kwargs))
    if args and isinstance(args[0], Far) and func.name().endswith("_"):
        return args[0]
    return tree_map(far, out) if is_far else out


class FarDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute_far(func, args, kwargs or {})


class FarCalls(TorchFunctionMode):
    """What goes round the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.numpy):
            return func(near(args[0]))
        if func is torch.tensor:
            device = torch.device(kwargs.pop("device", None) or "cpu")
            return far(func(*args, **kwargs)) if device.type == "far" else func(*args, **kwargs)
        if func not in (Tensor.to, Tensor.cpu):
            return func(*args, **kwargs)
        words = ["cpu"] if func is Tensor.cpu else [*args[1:], *kwargs.values()]
        dtypes = [word for word in words if isinstance(word, torch.dtype)]
        devices = [torch.device(word).type for word in words if isinstance(word, str | torch.device)]
        out = Tensor.to(args[0], *dtypes) if dtypes else args[0]
        return {"far": far, "cpu": near}[devices[0]](out) if devices else out


@pytest.fixture(scope="module")
def far_device():
    torch.ones(1, requires_grad=True).sum().backward()  # autograd's threads start, before they know it
    _setup_privateuseone_for_python_backend("far")
    torch.far.get_amp_supported_dtype = lambda: [torch.bfloat16]  # for checkpoints, of later tests too


@pytest.mark.parametrize("kind, mode", [
    ("janus", "end-to-end"), ("show-o", "two-stage"), ("show-o", "end-to-end"),
])
def test_a_step_stays_on_the_models_device(kind, mode, far_device, monkeypatch):
    """Rollout, answers, scores, both objectives, forward only, and held-out scores are as on the CPU; and a
    tensor left there is seen."""
    right, changes = sample.generator, dict(replay_steps=2) if mode == "two-stage" else {}
    monkeypatch.setattr(sample, "generator", lambda seed, use, device="cpu": right(seed, use))
    for module in grpo, evaluate_module:
        monkeypatch.setattr(module, "sample_answers", partial(sample_answers, max_tokens=3))
    tasks = [draw_task(shapes.VOCABULARY, np.random.default_rng(i)) for i in range(2)]
    world = World("shapes", shapes.VOCABULARY, tasks)
    expected, model = one_step(small_model(kind), mode, **changes), small_model(kind)
    held_out = evaluate(model, world, 2.0, images_per_prompt=1, compiled=False)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(Far(weight.detach()))
    with FarCalls(), FarDevice():
        rollout, *learned = one_step(model, mode, **changes)
        again = evaluate(model, world, 2.0, images_per_prompt=1, compiled=False)
        for owner, name in ((sample, "uniform_numbers"), (sample, "positions_of"), (sft, "encode_answers")):
            with monkeypatch.context() as patch, pytest.raises(AssertionError, match="on the CPU meets"):
                patch.setattr(owner, name, lambda *a, right=getattr(owner, name): tree_map(near, right(*a)))
                one_step(model, mode, **changes)
    assert torch.equal(near(rollout.images.codes), expected[0].images.codes)
    assert rollout.answers.texts == expected[0].answers.texts
    assert repr(again) == repr(held_out)
    for (loss, _), (wanted, _) in zip(learned, expected[1:]):
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-5)


# ---- reward.py: tasks, prompts, answers --------------------------------------------------------------------

SHAPES = replace(shapes.VOCABULARY, objects=(  # of the table of answers
    "circle", "square", "triangle", "cross", "diamond", "ring", "heart", "arrow"))


def fact(name, count=1, **more):
    return {"class": name, "count": count, **more}


def place(subject, relation, reference):
    return [fact(reference), fact(subject, position=[relation, 0])]


DOG, CAT, RED_DOG, BLUE_CAT = fact("dog"), fact("cat"), fact("dog", color="red"), fact("cat", color="blue")


def test_task_key_is_the_meaning():
    meanings = [  # a tag, and facts of one meaning
        ("position", place("dog", "left of", "cat"), place("cat", "right of", "dog")),
        ("position", place("dog", "above", "cat"), place("cat", "below", "dog")),
        ("position", place("cat", "above", "dog")), ("two_object", [DOG, CAT], [CAT, DOG]),
        ("color_attr", [RED_DOG, BLUE_CAT], [BLUE_CAT, RED_DOG]), ("counting", [fact("dog", 2)]),
        ("color_attr", [fact("dog", color="blue"), fact("cat", color="red")]), ("counting", [fact("dog", 3)]),
    ]
    keys = [{task_key(make_task(tag, facts)) for facts in wordings} for tag, *wordings in meanings]
    assert all(len(one) == 1 for one in keys) and len(set.union(*keys)) == len(meanings)


def test_draws_are_uniform_and_neither_test_prompts_nor_what_is_excluded():
    rng, test_keys = np.random.default_rng(0), {task_key(task) for task in geneval_suite()}
    assert len(GENEVAL.objects) == 80 and len(set(REAL.objects)) == 160
    tasks = [draw_task(REAL, rng) for _ in range(6000)]
    counts = Counter(task.tag for task in tasks)
    assert [abs(counts[tag] - 1000) < 130 for tag in TAGS] == [True] * 6  # 4.5 standard deviations
    assert not [task for task in tasks if task_key(task) in test_keys or is_geneval_prompt(task.prompt)]
    halves = [shapes.held_out_tasks(part) for part in ("validation", "test")]
    for suite in halves:
        different = Counter(tag for tag, *_ in set(map(task_key, suite)))
        assert Counter(task.tag for task in suite) == dict.fromkeys(TAGS, 20) and min(different.values()) >= 4
    validation, test = (set(map(task_key, suite)) for suite in halves)
    held_out = validation | test
    assert not validation & test and set(map(task_key, evaluate_module.shapes_world().held_out)) == held_out
    drawn = {task_key(draw_task(shapes.VOCABULARY, rng, held_out)) for _ in range(2000)}
    assert not drawn & held_out
    with pytest.raises(ValueError, match="no single_object task left"):
        draw_task(shapes.VOCABULARY, rng, drawn | held_out, "single_object")


def test_suite_equals_the_official_files(tmp_path):
    call_evaluate("--write-suite", tmp_path / "evaluation_metadata.jsonl")
    lines = (tmp_path / "evaluation_metadata.jsonl").read_bytes()
    prompts = "".join(task.prompt + "\n" for task in geneval_suite()).encode()
    assert [hashlib.sha256(text).hexdigest() for text in (lines, prompts)] == [
        "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
        "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"]


def test_test_prompts_are_recognised_in_other_words_and_no_others():
    """All 80 classes are single-object test prompts; of the other categories the suite holds samples only."""
    wordings = """A bench. | An image of a sofa | scissors | one pair of scissors | a hot dog | an orange
        | A PHOTO OF PEOPLE | a bench and a sports ball | a sports ball and a bench | A ball, and a bench
        | two clocks | 2 clocks | a pair of clocks | three persons | a fire hydrant that is blue
        | a dog to the right of a teddy bear | a teddy bear to the left of the dog | a blue fire hydrant
        | To the left of a dog is a teddy bear | a black apple and a purple wine glass
        | a wine glass in purple and a black apple""".split("|")
    others = """an hourglass | a photo of a circle | | a photo of | a photo of a red circle and a blue square
        | a bench and an accordion | three clocks | a red fire hydrant | a blue hourglass
        | a dog above a teddy bear | a dog left of a teddy bear | a pizza on top of a toilet
        | a black wine glass and a purple apple | a photo of a purple wine glass and an apple""".split("|")
    for task in geneval_suite():
        prompt, correct = task.prompt, make_task(task.tag, task.facts).prompt
        wordings += [prompt, prompt.upper() + ".", prompt.replace(" ", "   "), prompt.replace(" a ", " the ")]
        wordings += [prompt.removeprefix("a photo of "), correct]
    assert not [text for text in wordings if not is_geneval_prompt(text)]
    assert not [text for text in others if is_geneval_prompt(text)]


OWN = [
    {"tag": "single_object", "prompt": "A gold submarine at night", "facts": [fact("submarine")]},
    {"tag": "colors", "prompt": "a teal ring", "question": "Color?", "facts": [fact("ring", color="teal")]},
    {"tag": "position", "prompt": "a submarine over a ring", "answer": "The submarine is over the ring.",
     "facts": place("submarine", "above", "ring")},
    {"tag": "counting", "prompt": "seven submarines", "facts": [fact("submarine", 7)]},
]


def lines_of(rows) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def test_own_prompts_are_read_with_what_was_left_out():
    tasks, vocabulary = read_tasks(lines_of([*OWN[:2], b"", *OWN[2:]]), SHAPES)
    assert [task.prompt for task in tasks] == [row["prompt"] for row in OWN]
    assert [task.question for task in tasks[:2]] == ["What is the main item in this image?", "Color?"]
    answers = ["submarine", "teal", "The submarine is over the ring.", "seven submarines"]
    assert [task.answer for task in tasks] == answers and "teal" in vocabulary.colors
    assert score("a submarine", tasks[0], vocabulary) == 1 and score("a ring", tasks[0], vocabulary) == 0
    documented = re.findall(r'(?s)(?=(\{"tag": ".*))', read_tasks.__doc__ + (ROOT / "README.md").read_text())
    rows = [json.JSONDecoder().raw_decode(text)[0] for text in documented]
    assert len(read_tasks(lines_of(rows), REAL)[0]) == len(rows)


@pytest.mark.parametrize("row, words", [
    (b"{not json", "Expecting"), (b"[1]", "no JSON object"), ({"tag": "colour"}, "unknown tag 'colour'"),
    ({"wieght": 2}, "'wieght'"), ({"tag": "colors"}, "should have the keys"),
    ({"facts": [fact("Big Ship")]}, "'Big Ship' is not a name"), ({"answer": "a ring"}, "earn nothing"),
    ({"facts": [fact("bench")]}, "test prompt"),  # by its facts,
    ({"prompt": "A black apple and a purple wine glass"}, "test prompt"),  # by its words,
    ({"facts": [fact("whale")]}, "test prompt"),  # or by what the caller excludes
], ids=lambda value: str(value)[:40])
def test_every_fault_of_own_prompts_is_named_with_its_line(row, words):
    row = {**OWN[0], **row} if isinstance(row, dict) else row
    whale = {task_key(make_task("single_object", [fact("whale")]))}
    with pytest.raises(ValueError) as caught:
        read_tasks(lines_of([OWN[0], row, OWN[1], b"", row]), SHAPES, whale)
    first, *lines = str(caught.value).splitlines()
    assert first == "2 faults" and words in lines[0]
    assert [line[:9] for line in lines] == ["  line 2:", "  line 5:"]


def table_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "tiny" / name).read_text().splitlines()]


def test_the_table_of_answers():
    """tiny/answers.jsonl, written by hand: an answer, its exact score, and its partial one where that is
    another. Where a row has a prompt, it and the answer are those that the facts make."""
    rows = table_rows("answers.jsonl")
    assert {(row["world"], row["tag"]) for row in rows} == set(product(("real", "shapes"), TAGS))
    for row in rows:
        task, vocabulary = make_task(row["tag"], row["facts"]), REAL if row["world"] == "real" else SHAPES
        scores = [score(row["answer"], task, vocabulary, kind) for kind in ("exact", "partial")]
        assert scores == pytest.approx([row["exact"], row.get("partial", row["exact"])], abs=1e-5), row
        assert "prompt" not in row or (row["prompt"], row["answer"]) == (task.prompt, task.answer)
    clocks, endless = make_task("counting", [fact("clock", 2)]), map("".join, product("bcdfghjk", "lmnpqrst"))
    assert score("2" * 5000, clocks, REAL) == score(" ".join(["two clocks", *endless]), clocks, REAL) == 0
    with pytest.raises(ValueError, match="kind"):
        score("two clocks", clocks, REAL, "strict")


def test_answers_that_no_rule_was_made_for_are_mostly_read_right():
    """tiny/answers_unseen.jsonl, written without a look at the rules, which were not changed for them: of 147
    wrong ones 7 earn 1, of 153 right ones 23 earn nothing."""
    misread = Counter()
    for row in table_rows("answers_unseen.jsonl"):
        task = make_task(row["tag"], row["facts"])
        misread[row["exact"]] += score(row["answer"], task, REAL) != row["exact"]
    assert misread[0] <= 7 and misread[1] <= 23


@pytest.mark.parametrize("vocabulary", [REAL, SHAPES, shapes.VOCABULARY], ids=["real", "shapes", "world"])
def test_known_answers_are_right_but_not_to_other_tasks_nor_in_lists_of_everything(vocabulary):
    rng, names = np.random.default_rng(1), vocabulary.objects[:20] + vocabulary.colors + vocabulary.relations
    lists = [separator.join((*names, *map(str, vocabulary.counts))) for separator in (" ", ", a ")]
    tasks = [draw_task(vocabulary, rng, tag=tag) for tag in TAGS for _ in range(25)]
    for task in tasks + geneval_suite()[::2] * (vocabulary is REAL):
        for text in task.answer, task.prompt:
            assert score(text, task, vocabulary) == score(text, task, vocabulary, "partial") == 1, task
        for text in *lists, f"{task.answer}, {lists[0]}":
            assert score(text, task, vocabulary, "partial") == 0, task
    for task, other in product(tasks, tasks):
        alike = task_key(task) == task_key(other) or task.answer == other.answer  # two red things: "red"
        if task.tag == other.tag and not alike:
            assert score(other.answer, task, vocabulary) == 0, (other.answer, task)


TOY = replace(shapes.VOCABULARY, objects=("ring", "cross", "square"), colors=("red", "blue", "green"),
              counts=(2, 3))


@cache
def toy_tasks(tag):
    """Every task of three objects and three colors, each as likely as any other."""
    rng = np.random.default_rng(0)
    drawn = [draw_task(TOY, rng, tag=tag) for _ in range(1000)]
    return list({str(task.facts): task for task in drawn}.values())


@pytest.mark.parametrize("tag", TAGS)
def test_no_constant_answer_beats_guessing_the_likeliest_fact(tag):
    tasks, (a, b, _) = toy_tasks(tag), TOY.objects
    known = {task.answer for task in tasks} | {"2", "3"}  # of items, whatever they are
    words = TOY.objects, TOY.colors, TOY.relations, "123", ("one", "two", "three"), TOY.objects + TOY.colors
    glues = " ", ", ", " and ", "/", ", not ", " but not ", ". ", " on a ", " of "
    texts = {glue.join(some[:size]) for glue in glues for some in words for size in (1, 2, 3, 6)}
    texts |= {f"{one}{glue}{other}" for one, other in product(sorted(known)[:4], repeat=2) for glue in glues}
    texts |= {"", "it", "an object", "3+", f"not a {a} but a {b}", f"a {a} on a {b}", "left", "to its left",
              f"three {a}s: two and one", f"two rows of two {a}s", f"three {a}s: two {a}s and a {a}",
              f"A {a} with a {b} on top of it", f"The {a} is left of the {b} and above the {b}",
              "The former is red, the latter blue", f"a {a} and a {b}, red and blue, respectively",
              f"a {a}, a {b}, left and right, respectively"}
    for kind in ("exact", "partial"):
        mean = {text: np.mean([score(text, task, TOY, kind) for task in tasks]) for text in texts | known}
        assert max(mean.values()) <= max(mean[text] for text in known) + 1e-9, max(mean, key=mean.get)


@pytest.mark.parametrize("tag, silent, guess", [
    ("single_object", "", "{x}"), ("two_object", "a ring", "a ring and a {x}"),
    ("counting", "rings", "{n} rings"), ("colors", "a ring", "a {c} ring"),
    ("position", "a ring and a cross", "The ring is {r} the cross"),
    ("position", "a ring", "The ring is {r} the {x}"),
    ("color_attr", "a red ring", "a red ring and a {c} {x}"),
    ("color_attr", "a red ring and a cross", "a red ring and a {c} cross"),
    ("color_attr", "a ring and a cross", "a {c} ring and a {d} cross")])
def test_leaving_a_fact_out_is_worth_no_more_than_guessing_it(tag, silent, guess):
    choices = dict(x=TOY.objects, c=TOY.colors, d=TOY.colors, n=TOY.counts, r=TOY.relations)
    choices = {name: values for name, values in choices.items() if f"{{{name}}}" in guess}
    guesses = [guess.format(**dict(zip(choices, picked))) for picked in product(*choices.values())]
    for task in toy_tasks(tag):
        guessed = np.mean([score(text, task, TOY, "partial") for text in guesses])
        assert score(silent, task, TOY, "partial") <= guessed + 1e-9, task


# ---- tiny/world.py, and evaluate.py's rules ----------------------------------------------------------------


def test_the_worlds_detector_reads_back_what_was_painted():
    rng = np.random.default_rng(0)
    scenes = [shapes.layout(task, rng) for task in shapes.held_out_tasks() for _ in range(3)]
    for scene, found in zip(scenes, shapes.detect(np.stack([shapes.paint(scene) for scene in scenes]))):
        places = [np.array(one["box"], int)[:2] // shapes.CELL for one in found]
        objects = [(one["name"], one["color"], y * shapes.GRID + x) for one, (x, y) in zip(found, places)]
        assert sorted(objects) == sorted(scene)


THING = re.compile(r"(\w+)(?:@(-?\d+),?(\d*))?(?:#(\d+))?(?:=(\w+))?(?:~([.\d]+))?")


def things(text):
    """Detections: "dog@40,20#30=red~.5" is at left 40, top 20, 30 pixels wide, red, of confidence 0.5."""
    found = []
    for name, left, top, size, color, confidence in THING.findall(text):
        left, top, size = int(left or 0), int(top or 0), int(size or 10)
        box = left, top, left + size, top + size
        found.append(Detection(name, float(confidence or 0.95), box, None, color or None))
    return found


NO_DOG, NO_CAT = "expected dog >= 1, found 0", "expected cat >= 1, found 0"
NOT_RED, NOT_BLUE = "expected red dog >= 1, found blue", "expected blue cat >= 1, found red"
LESS, MORE, NOT = map(lambda text: f"expected dog {text}".format, (
    ">= {}, found {}", "< {}, found {}", "{} target, found {}"))
VERDICTS = [  # detections and the reason ("" where the picture is right), worked out by hand
    ("single_object", [DOG], {
        "dog": "", "": NO_DOG, "cat": NO_DOG, "dog cat@20": "", "dog dog@20": "",  # more does not matter
        "dog~.3": NO_DOG, "dog~.31": "", "dog~.89": "",  # must exceed the threshold; counting has its own
        "cat~.99 dog~.4": ""}),  # on the same spot: nothing is suppressed
    ("two_object", [DOG, CAT], {
        "dog cat@20": "", "cat dog@20": "", "dog cat": "", "dog": NO_CAT, "cat": NO_DOG,
        "": f"{NO_DOG}; {NO_CAT}", "dog dog@20": NO_CAT, "dog~.3 cat": NO_DOG, "dog cat~.3001": ""}),
    ("counting", [fact("dog", 2)], {
        "dog dog@20": "", "dog": LESS(2, 1), "": LESS(2, 0), "dog cat@20": LESS(2, 1), "dog dog cat cat": "",
        "dog dog dog@40": MORE(3, 3), "dog dog@20 dog@40~.91": MORE(3, 3),
        "dog dog@20 dog@40~.9": "", "dog dog@20~.9": LESS(2, 1)}),  # exactly .9 does not count
    ("counting", [fact("dog", 4)], {
        "dog dog dog dog": "", "dog dog dog": LESS(4, 3), "dog " * 5: MORE(5, 5), "dog~.8 " * 4: LESS(4, 0),
        "dog " * 20: MORE(5, 16)}),  # at most 16 of a class
    ("colors", [RED_DOG], {
        "dog=red": "", "dog=blue": NOT_RED, "": NO_DOG, "cat=red": NO_DOG, "dog=red~.3": NO_DOG,
        "dog=blue dog@20=red~.5": NOT_RED, "dog=blue~.5 dog@20=red": "",  # the most confident one, and
        "dog=red dog@20=blue": "", "dog=blue dog@20=red": NOT_RED}),  # of equals the first
    ("color_attr", [RED_DOG, BLUE_CAT], {
        "dog=red cat=blue": "", "dog=red dog=blue cat=blue": "", "": f"{NO_DOG}; {NO_CAT}", "dog=red": NO_CAT,
        "dog=blue cat=red": f"{NOT_RED}; {NOT_BLUE}", "dog=red cat=red": NOT_BLUE,
        "cat=red": f"{NO_DOG}; {NOT_BLUE}", "dog=green cat=blue": "expected red dog >= 1, found green"}),
    ("position", place("dog", "right of", "cat"), {  # a tenth of both sizes, 2 pixels, is off the distance
        "dog@40 cat": "", "dog cat@40": NOT("right of", "left of"),
        "dog@0,40 cat": NOT("right of", "below"), "dog cat": NOT("right of", "neither side"),
        "dog@2 cat": NOT("right of", "neither side"), "dog@4 cat": NOT("right of", "neither side"),  # 2 / 4
        "dog@5 cat": "",  # 3 / 5, though they overlap by half
        "dog@-8#40 cat@0,15": NOT("right of", "neither side"),  # around it: (7 - 5) / 7
        "dog@40~.5 dog@0~.9 cat@20": NOT("right of", "left of"), "dog@40 cat~.9 cat@80~.5": "",  # the surest
        "dog@40,40 cat": "", "dog": f"{NO_CAT}; no target for dog to be right of", "cat": NO_DOG}),
    ("position", place("dog", "left of", "cat"), {
        "dog cat@40": "", "dog@40,40 cat": NOT("left of", "below and right of")}),  # two hold on a diagonal
    ("position", place("dog", "above", "cat"), {"dog cat@0,40": "", "dog@0,40 cat": NOT("above", "below")}),
    ("position", place("dog", "below", "cat"), {
        "dog@0,40 cat": "", "dog@40,40 cat": "", "dog@40,20 cat": NOT("below", "right of")}),  # 18 / 44.7
    # what no prompt of the suite needs: several of one color, a relation to each of several
    ("colors", [fact("dog", 2, color="red")], {
        "dog=red dog@20=red": "", "dog=red dog@20=blue": "expected red dog >= 2, found red, blue"}),
    ("position", [fact("cat", 2), fact("dog", position=["left of", 0])], {
        "dog cat@20 cat@40": "", "dog@20 cat cat@40": NOT("left of", "right of")}),
]


@pytest.mark.parametrize("tag, facts, verdicts", VERDICTS)
def test_genevals_rules(tag, facts, verdicts):
    line = geneval_metadata(make_task(tag, facts))
    expected = {text: (not reason, reason) for text, reason in verdicts.items()}
    assert {text: verdict(line, things(text)) for text in verdicts} == expected
    line["exclude"] = [fact("fox")]  # of anything
    assert verdict(line, things("fox~.91"))[1].endswith("expected fox < 1, found 1")


# ---- evaluate.py's detector --------------------------------------------------------------------------------


def test_the_instance_head_equals_a_computation_in_numpy():
    """Class logits and mask logits to detections, of an image that is not square and padded on one side."""
    rng, expected = np.random.default_rng(0), []
    Q, C, padded, resized, size = 30, 80, (64, 96), (64, 90), (80, 113)
    classes, masks = 2 * rng.normal(size=(Q, C + 1)), 3 * rng.normal(size=(Q, 8, 12)) - 1
    for query in range(0, Q, 2):
        classes[query, rng.choice(C, 2, replace=False)] += 8  # half the queries are sure, some of two classes
    masks[4] = -1  # sure of its class, but with an empty mask
    probability = np.exp(classes) / np.exp(classes).sum(1, keepdims=True)
    for flat in np.argsort(-probability[:, :C].ravel())[:100]:
        query, label = divmod(int(flat), C)
        mask = Image.fromarray(masks[query].astype(np.float32)).resize(padded[::-1], Image.BILINEAR)
        mask = np.array(mask.crop((0, 0, *resized[::-1])).resize(size[::-1], Image.BILINEAR), float)
        rows, columns = np.nonzero(mask > 0)
        inside = (1 / (1 + np.exp(-mask[rows, columns]))).sum() / (len(rows) + 1e-6)
        if probability[query, label] * inside > 0.3:
            confidence = pytest.approx(probability[query, label] * inside, abs=1e-5)
            box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            expected.append((GENEVAL.objects[label], confidence, box, (mask > 0).tolist()))
    found = evaluate_module.instances(torch.tensor(classes), torch.tensor(masks), padded, resized, size)
    assert [(one.name, one.score, one.box, one.mask.tolist()) for one in found] == expected
    assert len(expected) >= 8


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """Folders of a small random Mask2Former, made sure that every query is a dog or a cat, and of a small
    random CLIP."""
    root = tmp_path_factory.mktemp("scorers")
    torch.manual_seed(3)
    segmenter = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=64, embed_dim=16, depths=[1] * 4, num_heads=[1, 2, 4, 8],
                                   window_size=4, out_features=["stage1", "stage2", "stage3", "stage4"]),
        feature_size=32, mask_feature_size=32, hidden_dim=32, num_queries=6, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=4, dim_feedforward=32, num_labels=80))
    letters = sorted(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(root / "clip")
    layers = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(layers, vocab_size=len(words), bos_token_id=len(words) - 2, eos_token_id=len(words) - 1)
    vision = dict(layers, image_size=32, patch_size=8)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    head, cat, dog = segmenter.class_predictor, GENEVAL.objects.index("cat"), GENEVAL.objects.index("dog")
    with torch.no_grad():
        head.bias[[cat, dog]] += 12
        head.weight[dog] += 3 * torch.randn(32)
        head.weight[cat] = -head.weight[dog]
        for name, weight in (*segmenter.named_parameters(), *clip.named_parameters()):
            if weight.dim() > 1:  # or masks would be half sure of every pixel, and pictures look the same
                weight *= 40 if "mask_embedder" in name else 20 if "vision_model" in name else 1
    segmenter.save_pretrained(root / "detector")
    clip.save_pretrained(root / "clip")
    return root


@pytest.fixture(scope="module")
def detector(scorers):
    return load_detector(str(scorers / "detector"), str(scorers / "clip"))


def test_colors_are_zero_shot_clip_on_the_masked_crop(detector, monkeypatch):
    """Against PIL's composite and crop, CLIP's own embeddings, prompts averaged in numpy."""
    monkeypatch.setattr(evaluate_module, "SHORT", 160)
    rng, line, seen = np.random.default_rng(3), geneval_metadata(make_task("colors", [RED_DOG])), set()
    prompts = "a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"
    texts = [prompt.format(color) for color in GENEVAL.colors for prompt in prompts]
    tokens = detector.tokenizer(texts, padding=True, return_tensors="pt")
    for _ in range(6):
        noise, tint = rng.integers(0, 256, (48, 64, 3)), rng.integers(0, 256, 3)
        image = Image.fromarray((0.3 * noise + 0.7 * tint).astype(np.uint8))
        [found] = detector([np.asarray(image)], [line])
        best = max((one for one in found if one.name == "dog"), key=lambda one: one.score)
        gray = Image.new("RGB", image.size, "#999")
        crop = Image.composite(image, gray, Image.fromarray(best.mask)).crop(best.box)
        with torch.no_grad():
            out = detector.clip(pixel_values=detector.clip_pixels(crop)[None], **tokens)
        means = out.text_embeds.numpy().reshape(len(GENEVAL.colors), 3, -1).mean(1)  # of unit vectors
        likeness = means @ out.image_embeds[0].numpy() / np.linalg.norm(means, axis=1)
        assert best.color == GENEVAL.colors[likeness.argmax()]
        assert [one for one in found if one.color] == [best]
        seen.add(best.color)
    assert len(seen) > 1  # or the test would not notice a constant


@pytest.mark.parametrize("height, width", [(3, 40), (1, 1), (100, 231)])
def test_crops_of_any_shape_reach_clip_as_open_clip_makes_them(detector, height, width):
    """Rows of one or three pixels are no channels; half a pixel at the centre rounds to even."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    size = [int(32 * edge / min(height, width)) for edge in (width, height)]
    left, top = (int(round((edge - 32) / 2.0)) for edge in size)
    cut = np.asarray(image.resize(size, Image.BICUBIC))[top : top + 32, left : left + 32]
    expected = (cut / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    close(detector.clip_pixels(image), torch.tensor(expected).permute(2, 0, 1), 1e-6)


def test_the_detectors_preprocessing(detector, monkeypatch):
    """The shorter side becomes 800 unless the longer would exceed 1333; ImageNet's mean and deviation; zeros
    to a multiple of 32. transformers' own processor agrees on the square, which needs no padding."""
    rng, seen, sizes = np.random.default_rng(0), [], []
    none = SimpleNamespace(class_queries_logits=[None], masks_queries_logits=[None])
    monkeypatch.setattr(detector.segmenter, "forward", lambda pixel_values: seen.append(pixel_values) or none)
    monkeypatch.setattr(evaluate_module, "instances", lambda classes, masks, *rest: sizes.append(rest) or [])
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((96, 96, 3), (60, 160, 3))]
    detector(images, [{"tag": "colors", "include": []}] * 2)
    assert sizes == [((800, 800), (800, 800), (96, 96)), ((512, 1344), (500, 1333), (60, 160))]
    close(seen[0], Mask2FormerImageProcessorPil()(images=images[0], return_tensors="pt")["pixel_values"])
    assert seen[1].shape[2:] == (512, 1344)
    assert not seen[1][:, :, 500:].any() and not seen[1][..., 1333:].any()


# ---- evaluate.py's folders of pictures ---------------------------------------------------------------------


EVALUATE = ["--images-per-prompt", 1, "--batch", 15, "--no-compile"]
SUITE, CHECKPOINTS = shapes.held_out_tasks()[::4], ["tiny", "tiny-show-o"]


def call_evaluate(*arguments, out=None):
    """evaluate.py's command line in this process, of few of the tiny models' held-out prompts: what it
    printed, or what it wrote to results.json."""
    printed, folder = io.StringIO(), ["--out", out] if out else []
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, [*arguments, *folder])])
        patch.setattr(shapes, "held_out_tasks", lambda part: SUITE)
        evaluate_module.main()
    return json.loads((out / "results.json").read_text()) if out else printed.getvalue()


def put(folder, lines, images):
    """A folder in GenEval's layout: a list of pictures for every line."""
    for i, (line, pictures) in enumerate(zip(lines, images)):
        samples = folder / f"{i:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        for k, image in enumerate(pictures):
            Image.fromarray(image).save(samples / f"{k:04d}.png")
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two pictures of noise, of two sizes, for five of GenEval's prompts."""
    rng, suite = np.random.default_rng(0), geneval_suite()
    lines = [geneval_metadata(suite[i]) for i in (0, 100, 200, 300, 500)]
    images = [[rng.integers(0, 256, (48, width, 3), dtype=np.uint8) for width in (48, 64)] for _ in lines]
    return put(tmp_path_factory.mktemp("drawn"), lines, images)


def test_from_pictures_to_results(drawn, scorers, tmp_path, monkeypatch):
    """PNG files through Mask2Former and CLIP to results.json; what is written there follows from GenEval's
    rules. A blind detector is called broken and is no score of zero."""
    monkeypatch.setattr(evaluate_module, "SHORT", 160)
    flags = "--images", drawn, "--clip", scorers / "clip", "--detector"
    results = call_evaluate(*flags, scorers / "detector", out=tmp_path)
    Image.open(tmp_path / "report.png").verify()
    assert len(results["images"]) == 10 and results["conditions"]["suite"]["prompts"] == 5
    for record in results["images"]:
        line = json.loads((Path(record["file"]).parents[1] / "metadata.jsonl").read_text())
        found = [Detection(**{**one, "box": tuple(one["box"])}) for one in record["detections"]]
        assert found and {one.name for one in found} <= {"dog", "cat"} and record["answer"] is None
        assert verdict(line, found) == (record["drawn"], record["reason"])
    assert results["scores"] == summarize(results["images"])
    assert results["scores"]["understanding"]["own_images"] is None
    monkeypatch.setattr(evaluate_module, "THRESHOLD", 2.0)
    with user_error("found nothing", "100%", "broken"):
        call_evaluate(*flags, scorers / "detector", out=tmp_path)
    blind = json.loads((tmp_path / "results.json").read_text())
    assert blind["scores"]["generation"]["overall"] is None and blind["conditions"]["nothing_found"] == 1


def test_detectors_that_are_not_at_hand_or_not_detectors(drawn, scorers, tmp_path, monkeypatch):
    lacking, other = (shutil.copytree(scorers / "detector", tmp_path / name) for name in ("lacking", "other"))
    tensors = load_file(lacking / "model.safetensors")
    del tensors["class_predictor.weight"]
    save_file(tensors, lacking / "model.safetensors", {"format": "pt"})
    edit_json(other / "config.json", id2label={str(i): f"thing {i}" for i in range(80)})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for folder, *words in [
        ("no/detector", "--detector FOLDER"), (scorers / "detector", "no/clip", "--clip FOLDER"),
        (lacking, "class_predictor.weight is missing"), (other, "not COCO's 80"),
    ]:
        with user_error(*words):
            call_evaluate("--images", drawn, "--detector", folder, "--clip", "no/clip", out=tmp_path / "out")


LINE, PICTURE, ONE = "00001/metadata.jsonl", "00002/samples/0001.png", {"tag": "single_object", "prompt": "x"}


@pytest.mark.parametrize("file, content, words", [
    (LINE, "{nonsense", [LINE, "not a line"]), (LINE, '{"tag": "smell"}', [LINE, "tag 'smell'"]),
    (LINE, json.dumps({**ONE, "tag": "colors", "include": [DOG]}), [LINE, "should have the keys"]),
    (LINE, json.dumps({**ONE, "include": [fact("yeti")]}), ["yeti"]),
    (PICTURE, "no picture", [PICTURE, "draw it again"]), ("00002", None, ["interrupted, 2 of 10"]),
    ("0*", None, ["GenEval's layout"]),
])
def test_a_damaged_folder_is_one_line(drawn, tmp_path, file, content, words):
    folder = shutil.copytree(drawn, tmp_path / "copy")
    if content:
        (folder / file).write_text(content)
    for path in [] if content else folder.glob(file):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with user_error(*words):
        call_evaluate("--images", folder, "--detector", "none", out=tmp_path / "out")


def test_an_oracle_pays_what_the_detector_sees():
    """Pictures of their own prompts earn 1, each other's nothing, where no two ask for the same shape."""
    tasks = list({task.facts[0]["class"]: task for task in shapes.held_out_tasks()[:20]}.values())
    rng = np.random.default_rng(0)
    pixels = model_module.from_uint8(np.stack([shapes.render(task, rng) for task in tasks]))
    sampler = SimpleNamespace(to_pixels=lambda codes: pixels[codes[:, 0]])
    run = SimpleNamespace(settings=objective_settings(reward="oracle"), sampler=sampler,
                          world=evaluate_module.shapes_world())
    for moved in (0, 1):
        codes = torch.arange(len(tasks)).roll(moved)[:, None]
        images = Images(codes, codes, codes, codes, codes)
        rollout = grpo.Rollout(tasks, [], images, None, None)
        assert grpo.self_reward(run, rollout) == [1.0 - moved] * len(tasks)


def test_a_folder_of_perfect_pictures_scores_one_and_is_understood(tiny, tmp_path):
    """Each picture by its own prompt. A run that is given them as true pictures asks about the same ones."""
    tasks, rng = shapes.held_out_tasks()[::2], np.random.default_rng(0)
    images = [[shapes.render(task, rng)] for task in tasks]
    folder = put(tmp_path / "perfect", [geneval_metadata(task) for task in tasks], images)
    scores = call_evaluate("--model", "tiny", "--images", folder, out=tmp_path / "out")["scores"]
    assert set(scores["generation"].values()) == {1} and scores["understanding"]["own_images"] > 0.85
    world = World("shapes", shapes.VOCABULARY, tasks[:2], pictures=read_folder(folder))
    of_true, _ = evaluate(tiny, world, 3.0, images_per_prompt=1, compiled=False)
    assert of_true["understanding"]["ground_truth"] == scores["understanding"]["own_images"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_fair_start_is_scored_the_same_at_once_in_two_goes_and_by_two_ranks(name, two, tmp_path):
    """A committed checkpoint is neither hopeless nor solved at drawing, and ahead at understanding. Drawing
    goes on where it stopped, and refuses to mix conditions."""
    whole, cut = call_evaluate("--model", name, *EVALUATE, out=tmp_path / "whole"), tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    for picture in list(cut.glob("images/*/samples/*.png"))[:12]:
        picture.unlink()
    with user_error("12 of 30 pictures are missing"):
        read_folder(cut / "images")
    with user_error("other conditions"):
        call_evaluate("--model", name, *EVALUATE, "--guidance", 7, out=cut)
    again = call_evaluate("--model", name, *EVALUATE, out=cut)
    ranks, scores = json.loads((two / name / "results.json").read_text()), whole["scores"]
    for record in whole["images"] + again["images"] + ranks["images"]:
        record["file"] = Path(record["file"]).read_bytes()
    assert whole["images"] == again["images"] == sorted(ranks["images"], key=lambda record: record["index"])
    assert scores == again["scores"] == ranks["scores"]
    assert 0.3 < scores["generation"]["overall"] < 0.7 and scores["understanding"]["ground_truth"] > 0.9
    assert min(scores["understanding"]["ground_truth_by_category"].values()) > 0.5


# ---- evaluate.py's scores ----------------------------------------------------------------------------------


def test_scores_by_hand():
    """Of ten pictures of one category 4 are drawn and answered, 2 only drawn, 1 only answered."""
    counts = {("counting", 1, 1, 1): 4, ("counting", 1, 0, 1): 2, ("counting", 0, 1, 1): 1,
              ("counting", 0, 0, 1): 3, ("colors", 1, 1, 0): 1, ("colors", 1, 0, 0): 1}
    keys = ("answered_given_drawn", "drawn_given_answered", "disagreement", "drawn_not_understood",
            "understood_not_drawn")
    scores = summarize([dict(zip(("tag", "drawn", "answered", "answered_true"), row))
                        for row, count in counts.items() for _ in range(count)])
    by_category = scores["imbalance"].pop("by_category")
    shares = {**dict.fromkeys(TAGS), "counting": 0.6, "colors": 1.0, "overall": 0.8}  # a mean over categories
    assert scores["generation"] == pytest.approx(shares)
    assert scores["understanding"]["own_images"] == scores["understanding"]["ground_truth"] == 0.5
    assert scores["imbalance"] == pytest.approx(dict(zip(keys, (5 / 8, 5 / 6, 4 / 12, 3 / 12, 1 / 12))))
    assert by_category["counting"] == pytest.approx(dict(zip(keys, (4 / 6, 4 / 5, 0.3, 0.2, 0.1))))
    assert by_category["position"] == dict.fromkeys(keys)


def test_compare_gives_the_difference_and_its_interval(tmp_path):
    """Of 100 prompts a category, half of them easy, with four pictures each; the second draws `counting`
    better. For a mean over prompts the bootstrap's interval is close to 1.96 standard errors either way,
    computed from the variances of the prompts' differences within each category."""
    paths, counting = [tmp_path / name for name in ("a.json", "b.json", "c.json")], TAGS.index("counting")
    chances = np.zeros((3, 6, 100, 4)) + [[0.3], [0.6]] * 50
    chances[1, counting] += 0.25
    drawn = np.random.default_rng(0).random(chances.shape) < chances
    for path, suite, right in zip(paths, "xxy", drawn.tolist()):
        cells = [(i, tag, prompt) for tag, rows in zip(TAGS, right) for i, prompt in enumerate(rows)]
        records = [{"index": i, "tag": tag, "drawn": one} for i, tag, prompt in cells for one in prompt]
        path.write_text(json.dumps({"images": records, "conditions": {"suite": suite}}))
    printed = call_evaluate("--compare", *paths[:2]).splitlines()
    shares = drawn.mean(3)  # of each prompt's pictures
    errors = ((shares[1] - shares[0]).var(1, ddof=1) / 100) ** 0.5  # of the categories' means
    left, right, _ = np.insert(shares.mean(2), 0, shares.mean((1, 2)), axis=1)
    errors = [np.linalg.norm(errors) / 6, *errors]
    for name, a, b, error in zip(("overall", *TAGS), left, right, errors):
        [line] = [line for line in printed if line.startswith(f"generation {name} ")]
        *scores, change, low, high = map(float, re.findall(r"[+-]?\d\.\d+", line))
        assert [*scores, change] == pytest.approx([a, b, b - a], abs=2e-3)
        expected = [b - a - 1.96 * error, b - a + 1.96 * error]
        assert [low, high] == pytest.approx(expected, abs=0.2 * error) and (low > 0 or name != "counting")
    with user_error("different suites"):
        call_evaluate("--compare", *paths[1:])


# ---- evaluate.py's gap gauge -------------------------------------------------------------------------------

WORLD = World("shapes", shapes.VOCABULARY, shapes.held_out_tasks())  # 120 prompts


def measured(self_reward, detector, true_pictures):
    """Scores, as far as the gauge reads them."""
    understanding = {"own_images": self_reward, "ground_truth": true_pictures, "ground_truth_by_category": {}}
    return {"generation": {"overall": detector}, "understanding": understanding}


@pytest.mark.parametrize("now, images, parted, words", [
    ((0.6, 0.5, 1.0), 2, [], ""),  # all is well
    ((0.6, 0.3, 1.0), 2, ["detector"], "the detector's score fell 0.20 (0.50 -> 0.30)"),
    ((0.6, 0.5, 0.95), 2, ["true pictures"], "reward hacking: self-reward held (0.50 -> 0.60) while"),
    ((0.5, 0.3, 0.9), 2, ["detector", "true pictures"], "true pictures fell 0.10 (1.00 -> 0.90)"),
    ((0.3, 0.3, 0.9), 2, [], ""),  # worse, but it knows
    ((0.6, 0.43, 1.0), 2, [], ""),  # within two standard errors: 2 sqrt(0.25 / 720 + 0.2451 / 240) = 0.074
    ((0.6, 0.42, 1.0), 2, ["detector"], "fell 0.08"),
    ((0.6, 0.5, 0.985), 84, [], ""),  # not chance, but within the margin
    ((0.6, 0.5, 0.975), 84, ["true pictures"], "fell 0.0"),
    ((0.6, None, 0.95), 2, ["true pictures"], "fell 0.05"),  # no detector
    ((0.6, None, None), 2, [], ""),
])
def test_what_fell_while_the_self_reward_did_not(now, images, parted, words):
    before = [None if value is None else least for value, least in zip(now, (0.5, 0.5, 1.0))]
    gauge = Gauge(WORLD, measured(*before), 6)
    reading = gauge.read(measured(*now), images)
    assert reading == {"self_reward": now[0], "detector": now[1], "true_pictures": now[2], "parted": parted,
                       "true_pictures_by_category": {}}
    assert gauge.blind == (now[1:] == (None, None)) and f"{now[0]:.2f}" in gauge.text(reading)
    assert bool(gauge.warning(reading)) == bool(parted) and words in gauge.warning(reading)


# ------------------------------------------------------------------------------------------------------------
# Runs of grpo.py and sft.py

SHORT = ["--steps", 2, "--save-every", 1, "--keep", 0, "--prompts", 3, "--group", 2, "--micro-batch", 3,
         "--lr", "1e-3", "--no-compile", "--no-recompute", "--eval-images", 1]
BLIND = ["--eval-every", 0]
RUNS = {
    "grpo": (grpo, "janus", ["--eval-every", 1]),
    "grpo end-to-end": (grpo, "janus", ["--mode", "end-to-end", *BLIND]),
    "grpo none frozen": (grpo, "janus", ["--freeze", "none", *BLIND]),
    "grpo show-o lora": (grpo, "show-o", ["--lora", 2, *BLIND]),
    "sft": (sft, "janus", BLIND),
    "sft show-o": (sft, "show-o", BLIND),
    "sft show-o end-to-end": (sft, "show-o", ["--mode", "end-to-end", *BLIND]),
}


@pytest.fixture(scope="module")
def pocket(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket")  # of small random models, whose images are of 2 x 2 codes
    save(small_janus(image_size=8, layers=1, codes=8), folder / "janus")
    save(small_show_o(tokens=4, steps=2), folder / "show-o")
    return folder


def luck(answer, task, *_) -> float:
    """A reward, as small models know nothing."""
    return crc32(f"{answer}{task.prompt}".encode()) % 4 / 3


def call(*arguments, script=grpo) -> None:
    argv = [script.__name__, *map(str, arguments)]
    with patch.object(sys, "argv", argv), patch.object(script, "score", luck):
        with patch.object(grpo, "GAUGE_PROMPTS", 1):  # a category
            script.main()


@pytest.fixture(scope="module")
def done(pocket, tmp_path_factory):
    @cache
    def run_of(name: str) -> Path:  # the folder of one of RUNS
        (script, kind, more), out = RUNS[name], tmp_path_factory.mktemp("runs") / "run"
        call("--model", pocket / kind, "--out", out, *SHORT, *more, script=script)
        return out

    return run_of


def read_metrics(out: Path) -> list[dict]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{**line, "seconds": 0, "memory": 0} for line in lines]  # which no run has twice


def state_of(folder: Path) -> dict[str, Tensor]:
    return load(str(folder)).state_dict()


def contents(folder: Path) -> dict[str, int]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): crc32(path.read_bytes()) for path in files}


# A copy of a run as if it had been killed before its second checkpoint, and while it wrote a line.
def cut_short(out: Path, to: Path) -> Path:
    shutil.copytree(out, to, ignore=shutil.ignore_patterns("step_000002", "summary.json"))
    with open(to / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "rew')
    return to


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_what_it_promises_and_its_first_update_is_on_policy(name, done, pocket):
    """Before the first update policy, sampler and reference are one model: ratio 1, KL 0."""
    out, (script, kind, _) = done(name), RUNS[name]
    (first, second), summary = read_metrics(out), json.loads((out / "summary.json").read_text())
    for key in first.keys() - {"step"} - {f"reward_{tag}" for tag in TAGS}:
        assert re.search(rf"\b{key}\b", script.__doc__ + grpo.__doc__), f"{key} is not documented"
    assert (first["step"], second["step"], first["skipped"]) == (1, 2, 0) and 0 < first["reward"] < 1
    assert first["rollout_difference"] < 1e-4 and first["kl_image"] < 1e-7 and first["grad_norm"] > 0
    assert second["kl_image"] > 1e-8  # the reference does not move with the policy
    assert script is sft or abs(first["ratio"] - 1) < 1e-4 and first["clipped"] == 0
    assert name not in ("sft", "sft show-o") or second["buffer"] > 0 and second["loss_image"] > 0

    assert {"model", "mode", "seed", "steps", "seconds", "threads", "versions"} < summary.keys()
    assert summary["mode"] == ("end-to-end" if "end-to-end" in name else "two-stage")
    scores = [(out / file).exists() for file in ("before.json", "before.png", "after.png")]
    scores += [bool(summary["before"]), bool(summary["after"]), "held_out" in first]
    assert scores == [name == "grpo"] * 6
    for picture in ("curves.png", "samples/step_000001.png", "samples/step_000002.png"):
        Image.open(out / picture).verify()

    start, end = state_of(pocket / kind), state_of(out / "step_000002")
    moved = {key.split(".")[0] for key in start if not torch.equal(start[key], end[key])}
    frozen = set() if name == "grpo none frozen" else {"vision_model", "vqmodel"}
    assert "language_model" in moved and not moved & frozen and (frozen or "vision_model" in moved)
    if kind == "janus":
        theirs = JanusForConditionalGeneration.from_pretrained(out / "step_000002").state_dict()
        assert all(torch.equal(theirs[key], end[key.removeprefix("model.")]) for key in theirs)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_command_with_resume_goes_on_to_the_bit(name, done, pocket, tmp_path, capsys):
    """Adam's moments, random numbers, replayed pictures and adapters are as they were; metrics are cut."""
    out, (script, kind, more) = done(name), RUNS[name]
    run = cut_short(out, tmp_path / "run")
    call("--model", pocket / kind, "--out", run, *SHORT, *more, "--resume", run, script=script)
    assert read_metrics(run) == read_metrics(out)
    assert contents(run / "step_000002") == contents(out / "step_000002")
    said = capsys.readouterr()
    assert "nothing independent of the model is measured" in said.err and "warning" not in said.err
    assert "python sample.py" in said.out.splitlines()[-1]


def test_ten_steps_without_spread_stop_a_run_and_the_learning_rate_rises_and_falls(pocket, tmp_path):
    flags = *SHORT, *BLIND, "--steps", 12, "--prompts", 1, "--micro-batch", 2, "--beta", 0
    with patch.object(grpo, "self_reward", lambda run, rollout: [1.0] * len(rollout.tasks)):
        with user_error("stopped at step 10", "10 such steps", "no group had answers of different reward"):
            call("--model", pocket / "janus", "--out", tmp_path, *flags)
    lines, steps = read_metrics(tmp_path), np.arange(10)
    assert all(line["zero_spread"] == 1 and line["grad_norm"] == 0 for line in lines)
    rate = 1e-3 * np.minimum(1, (steps + 1) / 11) * (1 - steps / 12)
    assert [line["lr"] for line in lines] == pytest.approx(rate.tolist()) and rate[9] < rate[5] > rate[0]


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted(pocket, tmp_path):
    true, factors = grpo.objective, iter([1, 1, math.nan, 1, 1, 1])  # in the first half of the second step

    def broken(*arguments):
        factor, (loss, sums) = next(factors), true(*arguments)
        return loss * factor, {**sums, "loss": sums["loss"] * factor}

    with patch.object(grpo, "objective", broken):
        call("--model", pocket / "janus", "--out", tmp_path, *SHORT, *BLIND, "--steps", 3)
    lines = read_metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 0] and lines[1]["loss"] is None
    one, two, three = (contents(tmp_path / f"step_{step:06d}") for step in (1, 2, 3))
    for file in ("model.safetensors", "trainer/optimizer.safetensors"):
        assert one[file] == two[file] != three[file]


@pytest.mark.parametrize("lora", [[], ["--lora", 2]], ids=["all weights", "adapters"])
def test_bfloat16_draws_from_the_policy_as_it_is_and_learns_in_float32(lora, pocket, tmp_path):
    true, runs = grpo.roll_out, []

    def watched(run, *arguments):
        runs.append(run)
        for name, weight in run.sampler.language_model.layers.named_parameters():
            assert weight.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
            now = run.policy.language_model.layers.get_parameter(name)
            assert torch.equal(weight, now.to(weight.dtype))
        return true(run, *arguments)

    with patch.object(grpo, "roll_out", watched):
        call("--model", pocket / "janus", "--out", tmp_path, *SHORT, *BLIND, "--seed", 1, "--bf16", *lora)
    (first, second), policy = read_metrics(tmp_path), runs[1].policy
    learns = [weight for weight in policy.parameters() if weight.requires_grad]
    assert first["kl_image"] < 1e-7 and first["grad_norm"] > 0 and second["kl_image"] > 0
    assert max(first["rollout_difference"], second["rollout_difference"]) < 0.1
    saved = load_file(tmp_path / "step_000002" / "model.safetensors")
    assert {weight.dtype for weight in (*learns, *saved.values())} == {torch.float32}


def test_untouched_adapters_change_nothing_and_merged_ones_are_what_was_trained(either):
    policy, plain, images = copy.deepcopy(either), copy.deepcopy(either), random_images(either, PROMPTS)
    layers = either.language_model.layers.named_modules(prefix="language_model.layers")
    linear = [name for name, part in layers if isinstance(part, nn.Linear)]
    base = image_logits(either, images, 3.0, 1.0)
    grpo.add_adapters(policy, 4, None)
    assert torch.equal(image_logits(policy, images, 3.0, 1.0), base)
    learns = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    assert learns.keys() == {f"{name}.lora_{end}" for name in linear for end in ("up", "down")} and linear
    with torch.no_grad():
        for i, weight in enumerate(learns.values()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
        adapted = image_logits(policy, images, 3.0, 1.0)
        plain.load_state_dict(grpo.merged(policy.state_dict()))
        assert (adapted - base).abs().max() > 0.1
        close(image_logits(plain, images, 3.0, 1.0), adapted, 1e-5 * adapted.abs().max())


def test_a_run_on_own_prompts_draws_from_them_alone(pocket, tmp_path):
    path, true, drawn = tmp_path / "own.jsonl", grpo.roll_out, []
    names = {"A gold submarine": "submarine", "one kayak, please": "kayak"}
    rows = [{"tag": "single_object", "prompt": text, "facts": [fact(name)]} for text, name in names.items()]
    path.write_bytes(lines_of(rows))
    flags = "--tasks", path, "--out", tmp_path / "run", *SHORT, *BLIND, "--steps", 1, "--seed", 1
    with patch.object(grpo, "roll_out", lambda run, *mine: drawn.extend(mine[0]) or true(run, *mine)):
        call("--model", pocket / "janus", *flags)
    assert len(drawn) == 6 and {task.prompt for task in drawn} == names.keys()
    path.write_bytes(lines_of([*rows, {**rows[0], "prompt": "a kayak" * 100}]))
    too_long = refusal("--model", pocket / "show-o", "--tasks", path, *SHORT, "--out", tmp_path / "other")
    assert "this Show-o's text window" in too_long and not (tmp_path / "other").exists()


def test_sft_learns_from_pictures_that_were_answered_right_and_no_others(pocket, tmp_path):
    rollouts, replayed, draw, learn = [], [], sft.roll_out, sft.objective
    spy = lambda *a, **k: rollouts.append(draw(*a, **k)) or rollouts[-1]
    watch = lambda *inputs: replayed.extend(inputs[4]) or learn(*inputs)
    with patch.object(sft, "roll_out", spy), patch.object(sft, "objective", watch):
        call("--model", pocket / "show-o", "--out", tmp_path, *SHORT, *BLIND, "--steps", 1, script=sft)
    [rollout] = rollouts
    answered = zip(rollout.tasks, rollout.answers.texts, rollout.images.codes.tolist())
    right = [(task.prompt, codes) for task, text, codes in answered if luck(text, task) == 1]
    trainer = tmp_path / "step_000001" / "trainer"
    prompts = json.loads((trainer / "state.json").read_text())["prompts"]
    assert list(zip(prompts, load_file(trainer / "buffer.safetensors")["codes"].tolist())) == right
    assert 0 < len(right) < len(replayed) == 6
    assert all((kept.prompt, kept.codes.tolist()) in right for kept in replayed)


def test_possible_reward_hacking_is_said_and_can_end_a_run(pocket, tmp_path, capsys):
    life = "--model", pocket / "janus", *SHORT, "--eval-every", 1, "--save-every", 9, "--out"
    well = {"self_reward": 0.5, "detector": None, "true_pictures": 0.9}
    told = chain([well], repeat({**well, "self_reward": 1.0, "true_pictures": 0.1}))  # at the start, and then
    with patch.object(evaluate_module, "measures", lambda scores: next(told)):
        with user_error("stopped after step 1, which is saved: possible", "0.50 -> 1.00", "0.90 -> 0.10"):
            call(*life, tmp_path, "--stop-on-gap")
    assert "warning: step 1: possible" in capsys.readouterr().err and grpo.newest(tmp_path) == 1
    told = chain([well], repeat({**well, "true_pictures": 0.1}))
    with patch.object(evaluate_module, "measures", lambda scores: next(told)):
        call("--resume", tmp_path, "--steps", 3, "--no-stop-on-gap")
    said, lines = capsys.readouterr().err, read_metrics(tmp_path)
    assert [line.get("held_out", {}).get("parted") for line in lines] == [["true pictures"]] * 2 + [None]
    assert said.count("warning: step 2: possible") == said.count("\nwarning: possible") == 1  # and at the end


def test_metrics_and_sheets_reach_tensorboard(pocket, tmp_path):
    module, out = MagicMock(), tmp_path / "run"
    flags = "--model", pocket / "janus", *SHORT, "--tensorboard", "--out", out
    with patch.object(grpo, "find_spec", return_value=None):
        assert "pip install tensorboard" in refusal(*flags)
    assert not out.exists()
    with patch.object(grpo, "find_spec"), patch.dict(sys.modules, {"torch.utils.tensorboard": module}):
        call(*flags, "--eval-every", 1)
    board = module.SummaryWriter.return_value
    scalars = {(name, step): value for (name, value, step), _ in board.add_scalar.call_args_list}
    for line in read_metrics(out):
        assert scalars["loss", line["step"]] == line["loss"]
    assert ("held_out/self_reward", 1) in scalars and board.add_image.call_count == 2


def refusal(*arguments, script=grpo) -> str:
    with pytest.raises(SystemExit) as stop:
        sample.run(partial(call, *arguments, script=script))
    message = stop.value.code  # a text is printed, and the exit code is 1
    assert message.startswith("error: ") and "\n" not in message
    return message


@pytest.mark.parametrize("kind, flags, words", [
    ("janus", "--group 1", "at least 2"),
    ("janus", "--mode end-to-end --answer-weight 0", "leaves end-to-end nothing to train"),
    ("janus", "--judge frozen", "--answer-weight 0"),
    ("janus", "--micro-batch 4", "--micro-batch 4 does not divide a rank's 6 images"),
    ("janus", "--shard", "start it with torchrun"),
    ("janus", "--lora 2 --freeze language_model", "leaves --lora nothing"),
    ("janus", "--replay-steps 2", "no meaning for a Janus"),
    ("janus", "--draw-steps 2", "no meaning for a Janus"),
    ("janus", "--tasks nowhere", "--tasks nowhere"),
    ("janus", "--model janus-9b", "tiny"),
    ("janus", "--reward oracle", "--reward oracle has no detector here: give --detector"),
    ("janus", "--out /dev/null/run", "/dev/null/run"),
    ("show-o", "--replay-steps 3", "an image is drawn in 2 steps"),
])
def test_a_users_mistake_gets_one_line_before_anything_is_written(kind, flags, words, pocket, tmp_path):
    out = tmp_path / "run"
    assert words in refusal("--model", pocket / kind, "--out", out, *SHORT, *BLIND, *flags.split())
    assert not out.exists()


def test_another_runs_folder_and_what_would_make_it_another_run_are_refused(done, pocket, tmp_path):
    out, flags = done("grpo"), ["--model", pocket / "janus", *SHORT, *BLIND, "--group", 3, "--out"]
    assert "already holds a run" in refusal(*flags, out)
    with patch.object(grpo, "start_ranks", lambda: (0, 2, torch.device("cpu"))):
        assert "cannot be split over 2 ranks" in refusal(*flags, tmp_path / "run")
    for flag in ("--lr 1", "--shard", "--out elsewhere"):
        assert flag in refusal("--resume", out, *flag.split())
    assert "already has 2 steps" in refusal("--resume", out) + refusal("--resume", out, "--steps", 1)
    assert "holds no run of sft.py" in refusal("--resume", out, script=sft)
    assert "holds no run" in refusal("--resume", tmp_path)
    flags = "--steps 9 --save-every 3 --keep 1 --eval-every 4 --stop-on-gap".split()
    with patch.object(sys, "argv", ["grpo.py", "--resume", str(out), *flags]):
        settings = vars(grpo.read_settings("grpo.py", grpo.GRPOSettings, grpo.PRESETS))
    now = dict(steps=9, save_every=3, keep=1, eval_every=4, stop_on_gap=True, resume=str(out), out=str(out))
    assert {**settings, "script": "grpo.py"} == {**json.loads((out / "args.json").read_text()), **now}


@pytest.mark.parametrize("script, flags", [
    (grpo, "--lr -1"), (grpo, "--lr nan"), (grpo, "--steps 2.5"), (grpo, "--mode three-stage"),
    (grpo, "--buffer 1"), (sft, "--buffer 0"), (sft, "--reward exact"),
])
def test_wrong_flags_exit_with_2_and_are_named(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        call(*flags.split(), script=script)
    assert stop.value.code == 2 and flags.split()[0] in capsys.readouterr().err.splitlines()[-1]


# -- damaged checkpoints, full disks, signals


@pytest.mark.parametrize("damage", [
    lambda folder: os.truncate(folder / "model.safetensors", 1000),
    lambda folder: os.truncate(folder / "trainer" / "optimizer.safetensors", 5000),
    lambda folder: (folder / "trainer" / "state.json").unlink(),
    lambda folder: edit_json(folder / "trainer" / "state.json", step=1),  # a renamed checkpoint
    lambda folder: (shutil.rmtree(folder), folder.mkdir()),
])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(damage, done, tmp_path, capsys):
    out = shutil.copytree(done("grpo"), tmp_path / "run")
    capsys.readouterr()
    damage(out / "step_000002")
    assert grpo.newest(out) == 1
    said = capsys.readouterr().err
    assert said.startswith("step_000002 is damaged, looking for the one before: ") and said.count("\n") == 1
    shutil.rmtree(out / "step_000001")
    with user_error("none of its checkpoints loads"):
        grpo.newest(out)


def test_a_finished_run_goes_on_and_a_damaged_checkpoint_is_none_of_those_kept(done, tmp_path):
    out = shutil.copytree(done("grpo"), tmp_path / "run")
    (out / "step_000009").mkdir()
    call("--resume", out, "--steps", 3, "--keep", 1, "--eval-every", 9)
    assert grpo.newest(out) == 3 and not (out / "step_000002").exists() and not list(out.glob("*.partial"))
    assert [line["step"] for line in read_metrics(out)] == [1, 2, 3]


def test_a_disk_that_fills_up_leaves_what_was_saved(done, tmp_path):
    """A file may have 300 kB, less than the weights: one line, nothing half written."""
    run, (_, most) = cut_short(done("sft"), tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most))
    try:
        message = refusal("--resume", run, script=sft)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert "step_000002: cannot be written" in message and f"--resume {run}" in message
    assert [path.name for path in run.glob("step_*")] == ["step_000001"] and grpo.newest(run) == 1


@contextmanager
def struck(number: signal.Signals, step: int | None):
    true = grpo.Run.draw

    def draw(run, now):
        if now == step:
            signal.raise_signal(number)  # while it draws
        return true(run, now)

    with patch.object(grpo.Run, "draw", draw):
        yield


def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(done, pocket, tmp_path, capsys):
    start = "--model", pocket / "janus", "--out", tmp_path, *SHORT, "--mode", "end-to-end", *BLIND
    handler = signal.getsignal(signal.SIGTERM)
    with struck(signal.SIGTERM, 0), struck(signal.SIGTERM, 0), pytest.raises(SystemExit) as stop:
        call(*start, "--save-every", 9)
    assert stop.value.code == 0 and signal.getsignal(signal.SIGTERM) is handler
    said = f"stopped after step 1, which is saved; go on with: torchrun grpo.py --resume {tmp_path}"
    assert said in capsys.readouterr().out
    call("--resume", tmp_path)
    assert contents(tmp_path / "step_000002") == contents(done("grpo end-to-end") / "step_000002")


def test_a_second_signal_ends_a_run_at_once():
    run = SimpleNamespace(signalled=time.monotonic() - 2)
    with patch.object(os, "_exit") as leave:
        grpo.Run.receive(run, signal.SIGINT, None)
    leave.assert_called_once_with(128 + signal.SIGINT)


# -- two ranks, and runs that are killed: processes forked from one that has imported everything

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload([__name__, "torch._dynamo", "torch.distributed.fsdp"])
NOBODY = None, None, None
CALLS = {"grpo": call, "sft": partial(call, script=sft), "evaluate": call_evaluate}
STORES = []


def meeting_port() -> str:
    """Where ranks meet: this process listens there, as torchrun does, so that nobody else takes the port."""
    STORES.append(dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
    return str(STORES[-1].port)


# Runs, one after the other, as one of the ranks. Of each: the script, its arguments, and which rank gets
# which signal in which step.
def live(lives: list[tuple], rank: int, ranks: int, ports: list[str], log: Path) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for (script, arguments, (victim, number, step)), port in zip(lives, ports):
        os.environ["MASTER_PORT"] = port
        try:
            with struck(number, step if rank == victim else None):
                sample.run(partial(CALLS[script], *arguments))
        except SystemExit as end:
            if end.code:
                raise


def begin(ranks: int, log: Path, *lives: tuple) -> list:
    ports, workers = [meeting_port() for _ in lives], []
    for rank in range(ranks):
        workers.append(CHILDREN.Process(target=live, args=(lives, rank, ranks, ports, log), daemon=True))
        workers[-1].start()
    return workers


def ended(workers: list) -> list[int | None]:
    for worker in workers:
        worker.join(180)
    return [worker.exitcode for worker in workers]  # None of one that hangs


TWO = ["grpo", "grpo --shard", "grpo show-o lora --shard", "grpo end-to-end --shard", "sft show-o --shard"]


@pytest.fixture(scope="module")
def two(pocket, tmp_path_factory):
    """A folder of TWO, runs of two ranks, each again from its first step on; the first was stopped there by a
    signal to one rank; and of the scores of CHECKPOINTS."""
    root, log, starts = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("log") / "log", []
    for name in TWO:
        run, shard, _ = name.partition(" --shard")
        script, kind, flags = RUNS[run]
        command = ["--model", pocket / kind, *SHORT, *flags, *shard.split(), "--out"]
        starts.append((script.__name__, [*command, root / name], NOBODY))
    script, command, _ = starts[0]
    stopped = script, [*command[:-1], root / "grpo again"], (1, signal.SIGINT, 0)
    for name in CHECKPOINTS:
        starts.append(("evaluate", ["--model", name, *EVALUATE, "--out", root / name], NOBODY))
    assert ended(begin(2, log, *starts, stopped)) == [0, 0], log.read_text()
    assert log.read_text().count("stopped after step 1, which is saved") == 1
    assert not (root / "grpo again" / "step_000002").exists()
    for name in TWO[1:]:
        cut_short(root / name, root / f"{name} again")
    again = [(start[0], ["--resume", root / f"{name} again"], NOBODY) for start, name in zip(starts, TWO)]
    assert ended(begin(2, log, *again)) == [0, 0], log.read_text()
    return root


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_are_one_process_and_resume_to_the_bit(name, two, done, pocket):
    """Also where a group spans ranks, and with shards: metrics, and with them loss, gradient and rewards; and
    the weights, saved as ordinary ones. Rows are padded differently, so not to the bit."""
    single, both, again = done(name.removesuffix(" --shard")), two / name, two / f"{name} again"
    assert read_metrics(again) == read_metrics(both)
    assert contents(again / "step_000002") == contents(both / "step_000002")
    for ours, theirs in zip(read_metrics(single), read_metrics(both), strict=True):
        assert ours.pop("held_out", None) == theirs.pop("held_out", None)
        assert ours == pytest.approx(theirs, abs=1e-5)
    ours, theirs = state_of(single / "step_000002"), state_of(both / "step_000002")
    for key in ours:  # Adam's first step is lr * sign(gradient): a wrong sign would show as 2e-4
        assert (ours[key] - theirs[key]).abs().mean() < 1e-5, key


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_ends_the_other_with_one_line(lost, pocket, tmp_path):
    command = ["--model", pocket / "janus", "--out", tmp_path / "run", *SHORT, *BLIND]
    codes = ended(begin(2, tmp_path / "log", ("grpo", command, (lost, signal.SIGKILL, 1))))
    assert (codes[lost], codes[1 - lost]) == (-signal.SIGKILL, 1)
    said = (tmp_path / "log").read_text()
    (error,) = [line for line in said.splitlines() if line.startswith("error")]
    assert f"rank {1 - lost} lost another rank" in error and "--resume" in error
    assert "Traceback" not in said and grpo.newest(tmp_path / "run") == 1


def test_killed_while_it_saves_a_run_ends_as_if_it_had_not_been(done, pocket, tmp_path):
    out = tmp_path / "run"
    start = ["--model", pocket / "janus", "--out", out, *SHORT, *RUNS["grpo"][2]]
    [worker] = begin(1, tmp_path / "log", ("grpo", start, NOBODY))
    while worker.is_alive() and not list(out.glob("step_*.partial")):
        time.sleep(0.001)
    worker.kill()
    assert ended([worker]) == [-signal.SIGKILL]
    call("--resume", out)
    assert read_metrics(out) == read_metrics(done("grpo")) and not list(out.glob("*.partial*"))
    assert contents(out / "step_000002") == contents(done("grpo") / "step_000002")


# ------------------------------------------------------------------------------------------------------------
# The experiments


@pytest.mark.parametrize("best, tried", [(1.6e-3, 7), (1e-4, 5), (2.5e-5, 7)])
def test_a_search_of_the_race_goes_on_until_its_best_rate_is_inside(best, tried):
    """Pretended scores that fall with the distance from a best rate, which may lie outside the first five."""
    scores, runs = {}, []
    while jobs := race.search("tiny", "grpo", scores):
        if len(jobs) == 1 and jobs[0] in scores:
            break
        runs += [job for job in jobs if job not in scores]
        scores |= {job: -abs(math.log2(job.rate / best)) + ("24" in job.other) for job in jobs}
    rates = sorted(job.rate for job in runs if not job.other)
    assert min(rates) < best < max(rates) and len(rates) == tried and len(runs) == len(set(runs)) == tried + 2
    assert jobs == [race.Job("tiny", "grpo", best, "--prompts 4 --group 24")] and best in rates
    falling = {race.Job("tiny", "grpo", 5e-5 * 2**k): -k for k in range(-2, 5)}  # no rate is low enough
    assert [job.rate for job in race.search("tiny", "grpo", falling)[-2:]] == [1.25e-5, 1.25e-5]
    seeds = race.missing("tiny", "grpo", scores)
    assert [job.seed for job in seeds] == [1, 2, 3] and {job[:4] for job in seeds} == {jobs[0][:4]}


@pytest.mark.parametrize("cosine", [-0.5, 0, 0.8])
def test_compared_gradients_have_the_cosine_they_were_made_with(cosine):
    noise, D = torch.randn(2, 100, 300, generator=seeded(0)), 300
    axes = torch.eye(D)[:2]
    true, other = 20 * axes[0], 10 * (cosine * axes[0] + (1 - cosine**2) ** 0.5 * axes[1])
    said = compare(other + noise[0], true + 2 * noise[1])
    length = (10**2 + D) ** 0.5  # of one gradient with its noise
    for (value, error), expected in ((said["mean"], cosine), (said["batch"], 10 * cosine / length)):
        assert 0 < error < 0.02 and abs(value - expected) < 4 * error
    assert compare(noise[0, :3] - noise[0, :3].mean(0), noise[1, :3])["mean"] is None


def test_the_gradients_that_are_measured_are_those_that_train():
    policy, rng, seeds = small_model("show-o"), np.random.default_rng(0), range(6)
    policy.draw_steps = 3
    judge, tasks = copy.deepcopy(policy).requires_grad_(False), [draw_task(shapes.VOCABULARY, rng)] * 6
    ways = estimates(policy, judge, tasks, seeds, rng)
    images = sample_images(policy, [task.prompt for task in tasks], seeds, policy.guidance, compiled=False)
    rollout = grpo.Rollout(tasks, seeds, images, None, None)
    features = grpo.straight_through(policy, judge, rollout, objective_settings(guidance=policy.guidance))[2]
    weights, (reinforce, relaxed, other, *_) = list(policy.language_model.parameters()), ways.values()

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, weights, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    trained, exact = gradient(sft.answer_loss(judge, tasks, features).sum()), gradient(reinforce())
    close(gradient(relaxed()), trained, 1e-4 * trained.abs().max())
    scored = {flags: gradient(way()) for flags, way in ways.items() if "--" in flags}
    mean = scored.pop("REINFORCE, --replay-steps 3") * images.codes.shape[1]  # all steps' mean over codes
    close(mean, exact, 1e-4 * exact.abs().max())
    for wrong in (gradient(other()), *scored.values()):
        for right in (trained, exact):
            assert F.cosine_similarity(wrong, right, dim=0) < 0.999


# ------------------------------------------------------------------------------------------------------------
# The code as a text

SOURCES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(ROOT.glob("[a-z]*/*.py"))}
SOURCES |= {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
IMPORTS = {"model.py": "", "sample.py": "model", "reward.py": "", "tiny/world.py": "reward",
           "evaluate.py": "model reward sample tiny", "grpo.py": "evaluate model reward sample",
           "sft.py": "grpo model reward sample"}


@pytest.mark.parametrize("path", IMPORTS)
def test_nothing_imports_upwards(path):
    used = set(re.findall(r"^(?:import|from) (\w+)", SOURCES[path], re.M))
    ours = {"tiny", "experiments", *(Path(name).stem for name in SOURCES)}
    assert used & ours <= set(IMPORTS[path].split())


def test_the_readme_names_only_flags_that_exist():
    settings = [*fields(grpo.GRPOSettings), *fields(sft.SFTSettings)]
    ours = {f"--{setting.name.replace('_', '-')}" for setting in settings}
    written = set(re.findall(r'"(--[a-z-]+)"', "".join(SOURCES.values())))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", (ROOT / "README.md").read_text()))
    assert not {flag for flag in named - written - ours if "_" not in flag}  # torchrun's
