"""Janus and Show-o in plain PyTorch: one trunk that reads text, reads images and writes image tokens.

    prompt -> embed_text -> trunk -> generation_head -> codes -> vqmodel.decode -> pixels         (generation)
    pixels -> vision_model (SigLIP) -> aligner -> trunk -> lm_head -> answer         (understanding, Janus)
    pixels -> vqmodel.encode -> codes -> embed_codes -> trunk -> lm_head -> answer          (the same, Show-o)

Janus' trunk is a LLaMA, which writes an image's codes one after the other; Show-o's is a Phi, which fills in
masked codes, all of which see each other. What differs between them stays behind methods of the same names.

    model = load("tiny")                 # or another of NAMES, a hub id, a folder
    save(model, "somewhere")             # JanusForConditionalGeneration.from_pretrained("somewhere") opens it

Nothing here knows about sampling, rewards or training, nor about what makes them fast. Modules carry the
names of transformers' JanusForConditionalGeneration and, but for SHOW_O_NAMES, of Show-o's own classes.
Written against, and tested to agree with, transformers 5.23.0 (models/janus, models/phi),
github.com/deepseek-ai/Janus and github.com/showlab/Show-o.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import (
    HfApi, constants, hf_hub_download, hf_hub_url, save_torch_state_dict, snapshot_download,
)
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import GenerationConfig, JanusConfig, JanusProcessor, PhiConfig, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT


class UserError(Exception):
    """A mistake of the user's: scripts print it as one line and exit with 1, without a traceback."""


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def chain(**parts: nn.Module) -> nn.Sequential:
    """One part after the other, by their names in a checkpoint."""
    return nn.Sequential(OrderedDict(parts))


# ------------------------------------------------------------------------------------------------------------
# The trunks: LLaMA and Phi, with grouped-query attention and a static key-value cache


class Block(nn.Module):
    """Where `UnifiedModel.recompute` asked for it, what happens inside is not kept for the backward pass but
    computed again there: memory for a third more time."""

    recompute = False

    def __call__(self, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().__call__, *inputs, use_reentrant=False)
        return super().__call__(*inputs)


class RMSNorm(nn.RMSNorm):
    """As LLaMA's: the mean in at least float32, the product with the weight in its own and x' type."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """In at least float32: a CPU refuses float32 with bfloat16 weights, as those below adapters are."""

    def forward(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(widen(x), self.normalized_shape, widen(self.weight), widen(self.bias), self.eps)
        return wide.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first d dimensions of x [B, H, T, ...] by angles with cos and sin [B, 1, T, d];
    halves, not pairs, as in LLaMA's transformers weights."""
    d = cos.shape[-1]
    left, right = x[..., :d].chunk(2, dim=-1)
    turned = x[..., :d] * cos + torch.cat((-right, left), dim=-1) * sin
    return turned if x.shape[-1] == d else torch.cat((turned, x[..., d:]), dim=-1)


def causal_mask(mask: Tensor) -> Tensor:
    """Attention mask [B, 1, T, T] of left-padded rows with mask [B, T]: a token sees itself and what stands
    before it, but no padding (which sees itself, because a softmax over nothing is not a number)."""
    T = mask.shape[1]
    before = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
    return (before | torch.eye(T, dtype=torch.bool, device=mask.device))[:, None]


def positions_of(mask: Tensor) -> Tensor:
    """Rotary positions [B, T], counted from each row's first real token."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


KVCache = list[tuple[Tensor, Tensor]]  # one (keys, values) a layer, each [B, Hkv, S, d]


class Attention(nn.Module):
    """Grouped-query attention. Phi's has biases, and a layer norm of every query and key (`norm`)."""

    def __init__(self, config, bias: bool, norm: Callable[[], nn.Module]):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_width, bias) for _ in range(2))
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias)
        self.q_layernorm, self.k_layernorm = norm(), norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, kv, slots: Tensor | None):
        """Attention [B, T, D] of x, and the keys and values [B, Hkv, T, d] of x. `kv`: others or None;
        without `slots` they stand before those of x, with `slots` [T] they are a cache, into whose columns
        those of x are written, and of which as many columns are read as the mask has."""
        projections = self.q_proj, self.k_proj, self.v_proj  # each gives [B, heads, T, d]
        q, k, v = (p(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for p in projections)
        q, k = rotate(self.q_layernorm(q), cos, sin), rotate(self.k_layernorm(k), cos, sin)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the rotation, or a norm before it, is float32
        own = k, v
        if slots is not None:
            S = attention_mask.shape[-1]
            k, v = (old.index_copy_(2, slots, new).narrow(2, 0, S) for old, new in zip(kv, own))
        elif kv is not None:
            k, v = (torch.cat(parts, dim=2) for parts in zip(kv, own))  # [B, Hkv, S, d]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2)), own


class MLP(nn.Module):
    """LLaMA's gated layer (SwiGLU), [..., D] -> the same."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(Block):
    """LLaMA's: the next x [B, T, D], and the keys and values of this one."""

    def __init__(self, config):
        super().__init__()
        if config.attention_bias or config.mlp_bias or config.hidden_act != "silu":
            raise UserError("a LLaMA with biases or without silu is not supported; no Janus has one")
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.self_attn = Attention(config, bias=False, norm=nn.Identity)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, kv, slots: Tensor | None):
        out, own = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, kv, slots)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), own


class PhiLayer(Block):
    """The same of Phi: attention and MLP side by side, of the same normalised input."""

    def __init__(self, config):
        super().__init__()
        if config.hidden_act not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"a Phi with {config.hidden_act!r} for gelu_new is not supported")
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.input_layernorm = LayerNorm(width, eps)
        self.self_attn = Attention(config, bias=True, norm=partial(LayerNorm, config.head_dim, eps))
        self.mlp = chain(fc1=nn.Linear(width, hidden), gelu=nn.GELU("tanh"), fc2=nn.Linear(hidden, width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, kv, slots: Tensor | None):
        h = self.input_layernorm(x)
        out, own = self.self_attn(h, cos, sin, attention_mask, kv, slots)
        return x + out + self.mlp(h), own


class LanguageModel(nn.Module):
    """A trunk without its head: a LLaMA or a Phi, as `config` is transformers' LlamaConfig or PhiConfig."""

    def __init__(self, config):
        super().__init__()
        if config.rope_parameters.get("rope_type", "default") != "default":
            raise UserError("scaled rotary embeddings are not supported; no Janus or Show-o has any")
        width, phi = config.hidden_size, config.model_type == "phi"
        if phi:
            config.head_dim = width // config.num_attention_heads
        share = config.rope_parameters["partial_rotary_factor"] if phi else 1
        self.config, self.rotary = config, int(config.head_dim * share)  # rotated dimensions of a head
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        layer = PhiLayer if phi else DecoderLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps) if phi else RMSNorm(width, config.rms_norm_eps)

    def new_cache(self, rows: int, length: int) -> KVCache:
        """Zeros for `rows` rows of at most `length` tokens, on the trunk's device, in its compute dtype."""
        config, like = self.config, next(self.layers.parameters())
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return [(like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)) for _ in self.layers]

    def forward(self, x: Tensor, positions: Tensor, attention_mask: Tensor, kv_cache: KVCache | None = None,
                slots: Tensor | None = None, keep: KVCache | None = None) -> Tensor:
        """Hidden states [B, T, D] after the last norm, of input embeddings x [B, T, D].

        Args:
            positions: rotary position of every token [B, T].
            attention_mask: [B, 1, T, S], True where a token may look; S = T, or that plus the tokens of
                `kv_cache`, or with `slots` at most the cache's length.
            kv_cache: keys and values of what stands before x; or, with `slots`, the cache that takes x' too.
            slots: cache columns [T].
            keep: takes each layer's keys and values of x, with gradient.
        """
        outer = x.dtype
        if not torch.is_autocast_enabled(x.device.type):  # where the blocks are a sampler's, in bfloat16
            x = x.to(next(self.layers.parameters()).dtype)
        half = self.rotary // 2
        theta = self.config.rope_parameters["rope_theta"]
        speed = theta ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)  # [d / 2]
        angles = positions[:, None, :, None].float() * speed.repeat(2)  # [B, 1, T, d]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            x, own = layer(x, cos, sin, attention_mask, kv_cache[i] if kv_cache else None, slots)
            if keep is not None:
                keep.append(own)
        return self.norm(x.to(outer))


# ------------------------------------------------------------------------------------------------------------
# Understanding: SigLIP and the aligner


class VisionAttention(nn.Module):
    """SigLIP's, of every patch to every other: [B, M, C] -> the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.projection_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)  # [B, H, M, d]
        return self.projection_layer(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionLayer(Block):
    """SigLIP's, [B, M, C] -> the same."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.layer_norm1 = nn.LayerNorm(width, config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(width, config.layer_norm_eps)
        self.self_attn = VisionAttention(width, config.num_attention_heads)
        self.mlp = chain(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """SigLIP without its pooling head: pixels [B, 3, H, W] in [-1, 1] -> features [B, M, C], M = patches."""

    def __init__(self, config):
        super().__init__()
        if config.use_qk_norm or config.hidden_act != "gelu":
            raise UserError("a vision model with query/key norms or without gelu is not supported")
        width, patch = config.hidden_size, config.patch_size
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.embeddings.position_embedding = nn.Embedding((config.image_size // patch) ** 2, width)
        self.encoder.layers = nn.Sequential(*(VisionLayer(config) for _ in range(config.num_hidden_layers)))
        self.post_layernorm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, M, C]
        return self.post_layernorm(self.encoder.layers(x + self.embeddings.position_embedding.weight))


def aligner(width_in: int, width: int, depth: int) -> nn.Sequential:
    """MLP with gelu between its `depth` layers, from image features or code vectors to the trunk's width."""
    hidden = {}
    for i in range(depth - 1):
        hidden |= {f"gelu_{i}": nn.GELU(), str(i): nn.Linear(width, width)}
    return chain(fc1=nn.Linear(width_in, width), hidden_layers=chain(**hidden))


# ------------------------------------------------------------------------------------------------------------
# Image tokens: Janus' VQ-16 of LlamaGen, and Show-o's MAGVIT-v2, made of the same parts


class ResnetBlock(Block):
    """[B, c_in, H, W] -> [B, c_out, H, W]"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, eps=1e-6), nn.GroupNorm(32, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(Block):
    """One head over the H * W places: [B, C, H, W] -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).flatten(2).transpose(1, 2) for p in (self.q, self.k, self.v))  # [B, H * W, C]
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # one head
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention after each if asked for, and the step to the next."""

    def __init__(self, c_in: int, c: int, blocks: int, attention: bool, down: bool = False, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c if i else c_in, c) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c) for _ in range(blocks if attention else 0))
        self.downsample, self.upsample = nn.Identity(), nn.Identity()
        if down:
            self.downsample = chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))
        if up:
            self.upsample = chain(near=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def middle(c: int) -> nn.Sequential:
    """Between encoder or decoder and their levels: [B, c, h, w] -> the same."""
    return chain(block_1=ResnetBlock(c, c), attn_1=AttnBlock(c), block_2=ResnetBlock(c, c))


def encoder(channels: int, widths: list[int], blocks: list[int], latents: int, magvit: bool) -> nn.Sequential:
    """Pixels [B, 3, H, W] -> latents [B, `latents`, h, w]. `widths`, `blocks`: channels and residual blocks
    of every level, from the highest resolution to the lowest, which has attention, but not in MAGVIT-v2."""
    last, levels = len(widths) - 1, []
    for i, (c_in, width) in enumerate(zip([channels, *widths], widths)):
        levels.append(Level(c_in, width, blocks[i], attention=i == last and not magvit, down=i < last))
    parts = chain(
        conv_in=nn.Conv2d(3, channels, 3, padding=1),
        down=nn.Sequential(*levels),
        mid=middle(widths[-1]),
        norm_out=nn.GroupNorm(32, widths[-1], eps=1e-6), silu=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], latents, 3, padding=1),
    )
    if magvit:  # VQ-16's is outside
        parts.quant_conv = nn.Conv2d(latents, latents, 1)
    return parts


def decoder(widths: list[int], blocks: list[int], latents: int, magvit: bool) -> nn.Sequential:
    """Latents [B, `latents`, h, w] -> pixels [B, 3, H, W]. `widths`, `blocks`: as the encoder's, but from the
    lowest resolution to the highest, though MAGVIT-v2 names its levels from the highest. They double it by
    nearest neighbours and a convolution: MAGVIT-v2's published code has a depth-to-space block too, and never
    uses it (models/common_modules.py of Show-o)."""
    last, levels = len(widths) - 1, {}
    for i, (c_in, width) in enumerate(zip([widths[0], *widths], widths)):
        level = Level(c_in, width, blocks[i], attention=i == 0 and not magvit, up=i < last)
        levels[str(last - i if magvit else i)] = level
    first = {"post_quant_conv": nn.Conv2d(latents, latents, 1)} if magvit else {}  # VQ-16's is outside
    return chain(
        **first,
        conv_in=nn.Conv2d(latents, widths[0], 3, padding=1),
        mid=middle(widths[0]),
        up=chain(**levels),
        norm_out=nn.GroupNorm(32, widths[-1], eps=1e-6), silu=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 3, 3, padding=1),
    )


def code_vectors(codes: Tensor, codebook: Tensor) -> Tensor:
    """The rows of a codebook [V, E] that codes [B, N] name, as a square [B, E, h, w]; or, differentiably,
    those that one-hots or mixtures [B, N, V] do."""
    vectors = codes.to(codebook.dtype) @ codebook if codes.is_floating_point() else codebook[codes]
    side = math.isqrt(codes.shape[1])
    return vectors.transpose(1, 2).unflatten(2, (side, side))


class VQModel(nn.Module):
    """Pixels <-> codes. Codebook and latents live on the unit sphere (vq_model.py of the original)."""

    def __init__(self, config):
        super().__init__()
        channels, latents, blocks = config.base_channels, config.latent_channels, config.num_res_blocks
        widths = [channels * m for m in config.channel_multiplier]
        self.encoder = encoder(channels, widths, [blocks] * len(widths), latents, magvit=False)
        self.decoder = decoder(widths[::-1], [blocks + 1] * len(widths), latents, magvit=False)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.quant_conv = nn.Conv2d(latents, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, latents, 1)

    def codebook(self) -> Tensor:
        """The code vectors [V, E], each of length one."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B, N] of pixels [B, 3, H, W] in [-1, 1]. Both sides of the nearest-code search are
        normalised, as in the original; transformers 5.23.0 normalises neither and so finds other codes."""
        latents = F.normalize(self.quant_conv(self.encoder(pixels)), dim=1).flatten(2)  # [B, E, N]
        return (self.codebook() @ latents).argmax(dim=1)  # on the sphere the nearest is the most aligned

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of codes [B, N] or, differentiably, of one-hots or mixtures [B, N, V]."""
        return self.decoder(self.post_quant_conv(code_vectors(codes, self.codebook())))


MAGVIT = {  # published sizes, which the config.json does not name (modeling_magvitv2.py of showlab/Show-o)
    "channels": 128, "encoder_multipliers": [1, 2, 2, 4, 4], "encoder_blocks": [4, 3, 4, 3, 4],
    "decoder_multipliers": [1, 1, 2, 2, 4], "decoder_blocks": [4, 4, 3, 4, 3], "bits": 13,
}


class MAGVITv2(nn.Module):
    """Pixels <-> codes without a codebook to look up: a code's bits, highest first, are the latents' signs
    (modeling_magvitv2.py of showlab/Show-o). `settings`: MAGVIT's keys, where other values are wanted."""

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = sizes = {key: settings.get(key, published) for key, published in MAGVIT.items()}
        self.bits, channels = sizes["bits"], sizes["channels"]
        down = [channels * m for m in sizes["encoder_multipliers"]]
        up = [channels * m for m in reversed(sizes["decoder_multipliers"])]
        self.encoder = encoder(channels, down, sizes["encoder_blocks"], self.bits, magvit=True)
        self.decoder = decoder(up, sizes["decoder_blocks"][::-1], self.bits, magvit=True)
        self.stride: int = 2 ** (len(down) - 1)  # pixels a code, each way

    def powers(self) -> Tensor:
        """What each bit counts [bits]."""
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=self.decoder.conv_in.weight.device)

    def codebook(self) -> Tensor:
        """The bits [V, bits] of every code, as -1 and 1."""
        weight = self.decoder.conv_in.weight
        codes = torch.arange(2**self.bits, device=weight.device)
        return ((codes[:, None] & self.powers()) > 0).to(weight.dtype) * 2 - 1

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B, N] of pixels [B, 3, H, W] in [-1, 1]."""
        positive = self.encoder(pixels) > 0  # [B, bits, h, w]
        return (positive * self.powers()[:, None, None]).sum(1).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of codes [B, N] or, differentiably, of one-hots or mixtures [B, N, V]."""
        return self.decoder(code_vectors(codes, self.codebook()))


# ------------------------------------------------------------------------------------------------------------
# The unified models


def from_uint8(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in [-1, 1]"""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


class UnifiedModel(nn.Module):
    """What both have: `language_model`, `lm_head`, `vqmodel`, `tokenizer`, `config`, their own `guidance`."""

    draw_steps: int | None = None  # of mask-predict; a Janus has none

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def recompute(self, on: bool) -> None:
        """Gradient checkpointing of every block of trunk, SigLIP and image tokenizer."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = on

    def embed_text(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        return self.language_model.embed_tokens(ids)

    def to_pixels(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of codes [B, N] or, differentiably, of one-hots [B, N, V]."""
        with self.image_precision():
            return self.vqmodel.decode(codes).clamp(-1, 1)

    def image_precision(self) -> AbstractContextManager:
        """At least float32 for the image tokenizer, also where the rest computes in bfloat16: codes are signs
        or nearest neighbours, of which rounding its features to bfloat16 would change some percent. The trunk
        may: it moves tiny-show-o's guided distributions by a total variation of 0.003 (a temperature of 1.02
        does by 0.002), tiny's by 0.006; only Janus is published in bfloat16, Show-o in float32."""
        kind = self.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def left_pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids [B, T] of rows of unequal length, and mask [B, T], True on what is not padding."""
        longest = max(map(len, rows))
        missing = [longest - len(row) for row in rows]
        ids = [[self.tokenizer.pad_token_id] * pads + row for pads, row in zip(missing, rows)]
        mask = [[False] * pads + [True] * len(row) for pads, row in zip(missing, rows)]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)


PARTS = (  # of a Janus, which train or stay frozen as a whole
    "language_model", "lm_head", "vision_model", "aligner", "vqmodel", "generation_embeddings",
    "generation_aligner", "generation_head",
)


class Janus(UnifiedModel):
    """Janus or Janus-Pro, with tokenizer, prompt format (the processor's chat template) and default guidance.
    `config` is transformers', and gets the image placeholder's id from the tokenizer."""

    def __init__(self, config: JanusConfig, processor: JanusProcessor, guidance: float = 5.0):
        super().__init__()
        self.config, self.processor, self.tokenizer = config, processor, processor.tokenizer
        self.guidance = guidance
        config.image_token_id = self.tokenizer.convert_tokens_to_ids(self.tokenizer.image_token)
        text, vision, vq = config.text_config, config.vision_config, config.vq_config
        self.language_model = LanguageModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.vision_model = VisionModel(vision)
        self.aligner = aligner(vision.hidden_size, vision.projection_dim, vision.depth)
        self.vqmodel = VQModel(vq)
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner = aligner(vq.embed_dim, vq.projection_dim, vq.num_hidden_layers)
        self.generation_head = chain(
            proj_out=nn.Linear(vq.image_token_embed_dim, vq.projection_dim), gelu=nn.GELU(),
            vision_head=nn.Linear(vq.projection_dim, vq.num_embeddings),
        )
        self.num_image_tokens, self.num_codes = vq.num_patches**2, vq.num_embeddings  # N and V
        if config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The trunk's input for image codes that were generated: [B, N] -> [B, N, D]"""
        return self.generation_aligner(self.generation_embeddings(codes))

    def image_features(self, image: Tensor) -> Tensor:
        """SigLIP's features [B, M, C], which is what understanding keeps of an image: of codes [B, N],
        one-hots [B, N, V] (differentiably) or pixels [B, 3, H, W] in [-1, 1]."""
        pixels = image if image.dim() == 4 else self.to_pixels(image)
        return self.vision_model(pixels.to(self.dtype))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels [1, 3, H, W] of a picture, made to fit the model's square, on grey. Sizes are cut down to
        whole pixels, as in image_processing_vlm.py of the original; transformers 5.23.0 rounds them."""
        side = self.config.vision_config.image_size
        smallest = min(14, side)
        w, h = (max(int(length / max(image.size) * side), smallest) for length in image.size)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(image.resize((w, h), Image.BICUBIC), ((side - w) // 2, (side - h) // 2))
        return from_uint8(np.array(square)[None])

    def conditional_weight(self, guidance: float) -> float:
        """c of the guided logits l_uncond + c (l_cond - l_uncond)."""
        return guidance

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, T] of texts after a begin-of-sentence token, which not every tokenizer adds."""
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.left_pad([[self.tokenizer.bos_token_id, *row] for row in rows])

    def chat(self, content: list[dict[str, str]]) -> str:
        """One user turn in the checkpoint's own format, open for the assistant's reply."""
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    def generation_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of prompts to draw; the last token of every row is the begin-of-image tag."""
        start = self.tokenizer.boi_token
        return self.encode([self.chat([{"type": "text", "text": prompt}]) + start for prompt in prompts])

    def unconditional(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of the guidance's other branch: pads for every prompt token but the first and
        the last (generation_inference.py of the original). These pads are attended to, so the mask stays."""
        keep = ~mask | (mask.cumsum(1) == 1)
        keep[:, -1] = True
        return ids.where(keep, self.tokenizer.pad_token_id), mask

    def question_prompt(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, Q] of questions about one image each; where the image goes, its placeholder token
        stands once for every image feature."""
        tokens = self.tokenizer
        slots = tokens.boi_token + tokens.image_token * self.num_image_tokens + tokens.eoi_token
        system = DEFAULT_SYSTEM_PROMPT if self.processor.use_default_system_prompt else ""
        texts = [self.chat([{"type": "image"}, {"type": "text", "text": text}]) for text in questions]
        return self.encode([(system + text).replace(tokens.image_token, slots) for text in texts])

    def question_attention_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Attention mask [B, 1, T, T] of questions and answers with ids and mask [B, T]."""
        return causal_mask(mask)

    def embed_question(self, ids: Tensor, image_features: Tensor) -> Tensor:
        """Trunk input [B, Q, D] for `question_prompt`'s ids, the features [B, M, C] aligned and in place."""
        x = self.embed_text(ids)
        features = self.aligner(image_features)  # [B, M, D]
        return x.masked_scatter((ids == self.config.image_token_id)[..., None], features.to(x.dtype))


SHOW_O = {  # what Show-o's published config.json leaves to its code and to the settings of its scripts
    "llm_model_path": "microsoft/phi-1_5",
    "phi_config": {},  # sizes of the trunk: none are Phi-1.5's, which are transformers' defaults
    "max_seq_length": 128,  # text tokens of a prompt, including <bos> and <eos>
    "guidance": 5.0,
    "steps": 50,  # of mask-predict: published commands draw with 50, though its function's default is 18
}
SHOW_O_256 = {"guidance": 1.75, "steps": 18}  # its own command's, in README.md until Show-o 512 came out
SHOW_O_TOKENS = tuple(f"<|{name}|>" for name in "soi eoi sov eov t2i mmu t2v v2v lvg".split())


class ShowO(UnifiedModel):
    """Show-o, with tokenizer, prompt format, default guidance and default number of mask-predict steps.

    One vocabulary for all: text, [PAD] and SHOW_O_TOKENS, then the image codes, last the mask. The rows are

        <|t2i|> <bos> prompt <eos> | <|soi|> codes <|eoi|>                            (generation)
        <|mmu|> <|soi|> codes <|eoi|> <bos> USER: \\n question ASSISTANT: | answer <eos>     (understanding)

    left-padded, and the omni-attention is causal for text, whereas in generation the image (all to the right
    of the bar) sees the prompt and all of itself, and in understanding all up to <|eoi|> is seen by all.
    Padding is seen by nothing, so that a row's width does not matter; the original always pads to the window.
    `settings`: SHOW_O's keys and those of a published config.json; `tokenizer`: with [PAD] and SHOW_O_TOKENS.
    """

    def __init__(self, settings: dict, tokenizer: PreTrainedTokenizerFast, vqmodel: nn.Module):
        super().__init__()
        draws = SHOW_O_256 if settings["num_vq_tokens"] == 256 else {}
        config = SimpleNamespace(**{**SHOW_O, **draws, **settings})
        for key in ("num_vq_tokens", "codebook_size", "vocab_size", "max_seq_length", "steps"):
            if type(value := getattr(config, key)) is not int or value < 1:
                raise UserError(f"{key} {value!r} is not a whole number above 0")
        if config.steps > config.num_vq_tokens:
            raise UserError(f"{config.steps} mask-predict steps, but {config.num_vq_tokens} tokens an image")
        self.config, self.tokenizer, self.vqmodel = config, tokenizer, vqmodel
        self.guidance, self.draw_steps = config.guidance, config.steps
        phi = PhiConfig(**{**config.phi_config, "vocab_size": config.vocab_size})
        self.language_model = LanguageModel(phi)
        self.lm_head = nn.Linear(phi.hidden_size, phi.vocab_size)
        self.num_image_tokens, self.num_codes = config.num_vq_tokens, config.codebook_size  # N and V
        self.first_code: int = len(tokenizer)  # id of code 0
        self.mask_id: int = config.vocab_size - 1
        self.soi, self.eoi, _, _, self.t2i, self.mmu, *_ = tokenizer.convert_tokens_to_ids(SHOW_O_TOKENS)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The trunk's input for image codes [B, N], or, differentiably, for one-hots [B, N, V]: [B, N, D]"""
        if codes.is_floating_point():
            ids = torch.arange(self.num_codes, device=codes.device) + self.first_code
            vectors = self.embed_text(ids)  # [V, D]
            return codes.to(vectors.dtype) @ vectors
        return self.embed_text(codes + self.first_code)

    def generation_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the image codes, from hidden states [..., D]: the head's columns for these."""
        codes = slice(self.first_code, self.first_code + self.num_codes)
        return F.linear(hidden, self.lm_head.weight[codes], self.lm_head.bias[codes])

    def image_features(self, image: Tensor) -> Tensor:
        """What understanding keeps: codes [B, N], one-hots [B, N, V], or of pixels [B, 3, H, W] the codes."""
        if image.dim() != 4:
            return image
        with self.image_precision():
            return self.vqmodel.encode(image.to(torch.promote_types(self.dtype, torch.float32)))

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels [1, 3, H, W] of a picture, resized to cover the model's square, the rest cut off."""
        side = math.isqrt(self.num_image_tokens) * self.vqmodel.stride
        long = int(side * max(image.size) / min(image.size))
        w, h = (side, long) if image.width <= image.height else (long, side)
        left, top = round((w - side) / 2), round((h - side) / 2)  # whole pixels, as torchvision's CenterCrop
        image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + side, top + side))
        return from_uint8(np.array(image)[None])

    def conditional_weight(self, guidance: float) -> float:
        """c of the guided logits l_uncond + c (l_cond - l_uncond), which is (1 + w) l_cond - w l_uncond."""
        return 1 + guidance

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def generation_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of prompts to draw. Raises UserError where one is longer than the text window,
        which the published code cuts off without a word."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [[self.t2i, bos, *self.encode(prompt), eos] for prompt in prompts]
        length, longest = max((len(row) - 1, prompt) for row, prompt in zip(rows, prompts))
        if length > self.config.max_seq_length:
            raise UserError(f"the prompt {longest[:40]!r}... has {length} tokens with its begin and end, and "
                            f"this Show-o's text window {self.config.max_seq_length}")
        return self.left_pad(rows)

    def unconditional(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of the guidance's other branch: the empty prompt in place of every prompt."""
        row, real = self.generation_prompt([""])  # [1, 3]
        missing = ids.shape[1] - row.shape[1]
        row = F.pad(row, (missing, 0), value=self.tokenizer.pad_token_id)
        return row.expand(len(ids), -1), F.pad(real, (missing, 0)).expand(len(ids), -1)

    def embed_canvas(self, codes: Tensor, known: Tensor) -> Tensor:
        """Trunk input [B, N + 2, D]: <|soi|>, codes [B, N] where `known` [B, N], else the mask, <|eoi|>."""
        ids = (codes + self.first_code).where(known, self.mask_id)
        return self.embed_text(F.pad(F.pad(ids, (1, 0), value=self.soi), (0, 1), value=self.eoi))

    def canvas_hidden(self, ids: Tensor, mask: Tensor, codes: Tensor, known: Tensor) -> Tensor:
        """Hidden states [B, N, D] that predict every code of partly masked images of prompts [B, P]."""
        x = torch.cat((self.embed_text(ids), self.embed_canvas(codes, known)), dim=1)  # [B, P + N + 2, D]
        image = codes.shape[1] + 2
        positions = positions_of(F.pad(mask, (0, image), value=True))
        return self.language_model(x, positions, generation_mask(mask, image))[:, 1 - image : -1]

    def question_prompt(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, Q] of questions about one image each; where its codes go stand masks."""
        image = [self.mmu, self.soi, *[self.mask_id] * self.num_image_tokens, self.eoi]
        rows = [self.encode(f"USER: \n{question} ASSISTANT:") for question in questions]
        return self.left_pad([[*image, self.tokenizer.bos_token_id, *row] for row in rows])

    def question_attention_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Attention mask [B, 1, T, T] of questions and answers with ids and mask [B, T]: causal, but all up
        to the end of the image is seen by every token."""
        end = (ids == self.eoi).int()
        image = mask & (end.cumsum(1) == end)  # up to the first <|eoi|>
        return causal_mask(mask) | (image[:, None, :] & mask[:, :, None])[:, None]

    def embed_question(self, ids: Tensor, image_features: Tensor) -> Tensor:
        """Trunk input [B, Q, D] for `question_prompt`'s ids, codes [B, N] or one-hots [B, N, V] in place."""
        x = self.embed_text(ids)
        codes = self.embed_codes(image_features)  # [B, N, D]
        return x.masked_scatter((ids == self.mask_id)[..., None], codes.to(x.dtype))


def generation_mask(mask: Tensor, image: int) -> Tensor:
    """Attention mask [B, 1, P + M, P + M] of prompts with mask [B, P] and M = `image` tokens: text is causal,
    the image sees its prompt and all of itself."""
    text = F.pad(causal_mask(mask), (0, image))  # text does not see the image
    rows = F.pad(mask, (0, image), value=True)[:, None, None].expand(-1, -1, image, -1)
    return torch.cat((text, rows), dim=2)


# ------------------------------------------------------------------------------------------------------------
# Published checkpoints: a Janus is read in DeepSeek's layout and in that of transformers, and written in the
# latter; a Show-o in its own. Every tensor is used or named, and nothing is unpickled but tensors.

NAMES = {  # what --model takes, besides any hub id and any folder
    "tiny": str(Path(__file__).parent / "tiny" / "janus"),
    "janus": "deepseek-ai/Janus-1.3B",
    "janus-pro-1b": "deepseek-ai/Janus-Pro-1B",
    "janus-pro-7b": "deepseek-ai/Janus-Pro-7B",
    "tiny-show-o": str(Path(__file__).parent / "tiny" / "show-o"),
    "show-o": "showlab/show-o-512x512",
    "show-o-256": "showlab/show-o",
}

# Published names -> this module's: regular expressions (their dots mean dots), applied one after the other.
SHOW_O_NAMES = (
    ("showo.model.final_layernorm.", "language_model.norm."), ("showo.model.", "language_model."),
    ("showo.lm_head.", "lm_head."), ("self_attn.dense.", "self_attn.o_proj."),
)
DEEPSEEK_NAMES = (
    ("language_model.model.", "language_model."), ("language_model.lm_head.", "lm_head."),
    ("vision_tower.patch_embed.proj.", "embeddings.patch_embedding."),
    ("vision_tower.pos_embed", "embeddings.position_embedding.weight"),
    (r"vision_tower.blocks.(\d+).norm", r"encoder.layers.\1.layer_norm"),
    ("vision_tower.blocks.", "encoder.layers."), ("vision_tower.norm.", "post_layernorm."),
    (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection_layer."),
    ("aligner.layers.0.", "aligner.fc1."), ("aligner.layers.2.", "aligner.hidden_layers.0."),  # 1 is a GELU
    ("gen_vision_model.", "vqmodel."),
    ("encoder.conv_blocks.", "encoder.down."), ("decoder.conv_blocks.", "decoder.up."), (".res.", ".block."),
    (".mid.0.", ".mid.block_1."), (".mid.1.", ".mid.attn_1."), (".mid.2.", ".mid.block_2."),
    ("gen_embed.", "generation_embeddings."), ("gen_head.output_mlp_projector.", "gen_head.proj_out."),
    ("^gen_", "generation_"),
)
# Tensors without use: SigLIP's pooling head, a counter of VQ-16's training, and what is computed instead.
UNUSED = re.compile(r".*\.attn_pool\..*|.*\.codebook_used|.*\.inv_freq|quantize\.(embedding|power_vals)")


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    """The name after every (pattern, replacement) of the table, in order."""
    for old, new in table:
        name = re.sub(old, new, name)
    return name


@contextmanager
def user_error(what: str) -> Iterator[None]:
    """Whatever a library raises inside (tokenizers, Jinja and the hub have dozens of classes) becomes a
    UserError of one line that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({reason(error)})") from error


def reason(error: Exception) -> str:
    """A library's error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError where there is none."""
    with user_error(f"{path}: cannot be read as JSON"):
        content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def find_folder(name: str, advice: str = "give its folder: --model FOLDER", weights: bool = True) -> Path:
    """The local folder of a name of NAMES, a folder, or a hub id, of which `download` gets what is needed.
    Raises UserError where there is none, with what helps against the reason; `advice`: without the hub."""
    target = NAMES.get(name, name)
    if Path(target).is_dir():
        return Path(target)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", target):
        raise UserError(f"unknown model {name!r}: give one of {', '.join(NAMES)}, a hub id, or a folder")
    try:
        return download(target, weights)
    except UserError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, GatedRepoError):
            advice = f"accept its licence at {constants.ENDPOINT}/{target}, then log in: hf auth login"
        elif isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            advice = "check its name; if it is private, log in: hf auth login"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            advice = f"make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk"
        else:
            advice = f"check the connection and try again, which goes on where it stopped; or {advice}"
        raise UserError(f"{target}: cannot be downloaded; {advice} ({reason(error)})") from error


def download(target: str, weights: bool) -> Path:
    """The folder in the hub's cache that has a repository's settings and, if wanted, the weights that
    read_tensors reads, and no others. Without the hub it is as it was found last."""
    try:
        info = HfApi().model_info(target, files_metadata=True)
    except Exception:
        with suppress(Exception):
            return Path(snapshot_download(target, local_files_only=True, allow_patterns=["config.json"]))
        raise
    files = {file.rfilename: file for file in info.siblings}

    def get(name: str) -> Path:
        if name in files and files[name].lfs:
            download_blob(target, info.sha, name, files[name].lfs.sha256, files[name].size)
        return Path(hf_hub_download(target, name, revision=info.sha))

    chosen = [name for name in files if re.fullmatch(r"[^/]*\.(json|jinja)", name)]
    if weights:
        chosen += [path.name for path in weight_files(target, files, get)]
    return Path(snapshot_download(target, allow_patterns=chosen))


def download_blob(target: str, commit: str, name: str, sha256: str, size: int) -> None:
    """Puts a large file where the hub's cache has it. Its library (2.4.0) then need not download it, which
    would begin at 0 each time, not look at the sum, and not hear Ctrl-C before the end."""
    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=target, repo_type="model"), "blobs")
    blobs.mkdir(parents=True, exist_ok=True)
    part = blobs / f"{sha256}.incomplete"
    with WeakFileLock(blobs / f"{sha256}.lock"):  # ranks may want the same
        if (blobs / sha256).exists():
            return
        with open(part, "ab") as file:
            url, done = hf_hub_url(target, name, revision=commit), file.tell()
            constants.DOWNLOAD_CHUNK_SIZE = 2**20  # as much is lost at most where a connection drops
            http_get(url, file, resume_size=done, headers=build_hf_headers(), expected_size=size,
                     displayed_filename=name)
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise UserError(f"{target}: {name} came damaged (its sha256 is {found[:8]}..., not "
                            f"{sha256[:8]}...) and was thrown away: try again")
        part.rename(blobs / sha256)


WEIGHTS = [  # in this order, the first that is there
    f"{name}{end}" for name in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin")
    for end in (".index.json", "")
]


def weight_files(source: str | Path, names: Collection[str], get: Callable[[str], Path]) -> list[Path]:
    """The files of weights among the `names` that a folder or repository holds, by way of `get`: one, or the
    shards of an index."""
    first = next((name for name in WEIGHTS if name in names), None)
    if first is None:
        raise UserError(f"{source}: holds no model.safetensors, pytorch_model.bin or their index")
    path = get(first)
    if path.suffix != ".json":
        return [path]
    with user_error(f"{path}: is no index of weights"):
        shards = {Path(name).name for name in read_json(path)["weight_map"].values()}
    return [get(name) for name in sorted(shards)]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder that has a use: safetensors before .bin, sharded (by its index) or
    not. Files are mapped, not read. Raises UserError where one is missing or damaged."""
    tensors = {}
    for path in weight_files(folder, os.listdir(folder), folder.joinpath):
        with user_error(f"{path}: cannot be read"):
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:  # older ones are no zip archives, and cannot be mapped
                tensors |= torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return {name: tensor for name, tensor in tensors.items() if not UNUSED.fullmatch(name)}


def read_tokenizer(
    folder: Path, strict: Sequence[str], lenient: Sequence[str] = (), **special
) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, with `special` tokens, which get the ids after its own where it lacks them.
    Raises UserError where it cannot be read, or lacks a special token: a `strict` one must be in its
    tokenizer.json, as a new id would be that of an untrained row; a `lenient` one may come from its other
    settings."""
    with user_error(f"{folder}: tokenizer.json and its settings cannot be read"):
        # The fast tokenizer takes tokenizer.json as it is, whatever class the folder's settings name.
        read = PreTrainedTokenizerFast.from_pretrained
        stored = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        known = read(folder).get_vocab() if lenient else stored
        tokenizer = read(folder, **special)
    for names, vocabulary in ((strict, stored), (lenient, known)):
        for name in names:
            if getattr(tokenizer, name) not in vocabulary:
                raise UserError(f"{folder}: the tokenizer has no {name} ({getattr(tokenizer, name)})")
    return tokenizer


def check_tensors(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises UserError naming the first missing, unexpected or wrongly shaped tensor."""
    missing, surplus = expected.keys() - found, found.keys() - expected
    for names, what in ((missing, "missing"), (surplus, "not one of the model's")):
        if names:
            raise UserError(f"{folder}: tensor {min(names)!r} is {what} ({len(names)} in all)")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)}"
            raise UserError(f"{folder}: tensor {name!r} has shape {shapes}")


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UnifiedModel:
    """A model from a name of NAMES, a hub id or a folder: a Janus in transformers' or DeepSeek's layout, or a
    Show-o in its own. On device "meta" it has no content and the weights are not read: for a rank that gets
    them from another. The image tokenizer is at least float32. Raises UserError with a line on what is wrong
    with name, folder, tokenizer or tensors: each of the checkpoint must be used, and each of the model be
    there with its shape."""
    folder = find_folder(name)
    settings = read_json(folder / "config.json")
    build = build_show_o if "num_vq_tokens" in settings else build_janus
    with user_error(f"{folder}: a config.json in it is not that of a Janus or Show-o"):
        model, tensors = build(folder, settings, read_tensors(folder))
        if not 0 <= model.guidance < math.inf:
            raise UserError(f"{folder}: a guidance of {model.guidance} is not a number of at least 0")
    with user_error(f"{folder}: its tokenizer and chat template make no prompt"):
        model.generation_prompt(["?"]), model.question_prompt(["?"])
    check_tensors(folder, model.state_dict(), tensors)
    tied = model.lm_head.weight is model.language_model.embed_tokens.weight
    hide = True if os.environ.get("RANK", "0") != "0" else None
    read = tqdm(tensors.items(), "loading", unit="tensor", delay=1, leave=False, disable=hide)
    image = torch.promote_types(dtype, torch.float32)  # see UnifiedModel.image_precision
    kinds = {name: image if name.startswith("vqmodel.") else dtype for name in tensors}
    # Copied, so that the model does not change with its files, and that parts of one tensor can be saved.
    model.load_state_dict({name: t.to(device, kinds[name], copy=True) for name, t in read}, assign=True)
    if tied:
        model.lm_head.weight = model.language_model.embed_tokens.weight
    return model.eval()


def build_janus(folder: Path, settings: dict, tensors: dict[str, Tensor]) -> tuple[Janus, dict[str, Tensor]]:
    """A Janus without content for a config.json of either layout, and the tensors by its names."""
    kind = settings.get("model_type")
    if kind not in ("janus", "multi_modality"):
        raise UserError(f"{folder}: model_type {kind!r} is no Janus ('janus', 'multi_modality'), no Show-o")
    if kind == "multi_modality":
        tensors = from_deepseek(tensors)
        config = config_from_deepseek(settings, tensors)
    else:
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        config = JanusConfig.from_dict(settings)
    config.tie_word_embeddings = "lm_head.weight" not in tensors
    if config.tie_word_embeddings and "language_model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["language_model.embed_tokens.weight"]
    path = folder / "generation_config.json"
    guidance = read_json(path).get("guidance_scale") if path.exists() else None
    processor = read_processor(folder, config, settings if kind == "multi_modality" else None)
    with torch.device("meta"):
        return Janus(config, processor, 5.0 if guidance is None else guidance), tensors


def from_deepseek(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the original layout under this module's names, SigLIP's fused qkv split in three."""
    renamed = {}
    for name, tensor in tensors.items():
        name = rename(name, DEEPSEEK_NAMES)
        if ".qkv." in name:
            for part, piece in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            renamed[name] = tensor.squeeze(0) if name.endswith("position_embedding.weight") else tensor
    return renamed


def config_from_deepseek(original: dict, tensors: dict[str, Tensor]) -> JanusConfig:
    """JanusConfig for DeepSeek's config.json and the tensors already under this module's names. The original
    names its vision tower and tokenizer instead of giving their sizes, so these are read off the tensors."""

    def count(pattern: str) -> int:
        return len({m[1] for m in (re.match(pattern, name) for name in tensors) if m})

    try:
        width, _, _, patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape
        hidden = len(tensors["vision_model.encoder.layers.0.mlp.fc1.weight"])
        base, latents = (len(tensors[f"vqmodel.encoder.{conv}.weight"]) for conv in ("conv_in", "conv_out"))
        levels = range(count(r"vqmodel\.encoder\.down\.(\d+)\."))
        widths = [len(tensors[f"vqmodel.encoder.down.{i}.block.0.conv1.weight"]) for i in levels]
    except KeyError as missing:
        raise ValueError(f"tensor {missing} is missing (by its transformers name)") from None
    parts = ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
    vision, aligner, vq, generation, head = (original[f"{part}_config"]["params"] for part in parts)
    vision_config = {
        "hidden_size": width, "mlp_ratio": hidden / width, "patch_size": patch,
        "image_size": vision["image_size"], "num_image_tokens": (vision["image_size"] // patch) ** 2,
        "num_hidden_layers": count(r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": 16,  # of every tower that a Janus names (siglip_vit.py of the original)
        "projection_dim": aligner["n_embed"], "depth": aligner["depth"],
    }
    vq_config = {
        "embed_dim": vq["n_embed"], "num_embeddings": vq["image_token_size"], "latent_channels": latents,
        "base_channels": base, "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": count(r"vqmodel\.encoder\.down\.0\.block\.(\d+)\."),
        "projection_dim": generation["n_embed"], "num_hidden_layers": generation["depth"],
        "image_token_embed_dim": head["image_token_embed"],
    }
    text_config = {**original["language_config"], "model_type": "llama"}
    return JanusConfig(text_config=text_config, vision_config=vision_config, vq_config=vq_config)


def read_processor(folder: Path, config: JanusConfig, original: dict | None) -> JanusProcessor:
    """Tokenizer, image preprocessing and chat template; of DeepSeek's layout with its `original` config.json.
    Raises UserError where a special token is missing or outside the embedding: a Janus without its pad token
    would draw rubbish under guidance and say nothing."""
    settings, _ = JanusProcessor.get_processor_dict(folder)
    tags = dict(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    special = dict(pad_token=settings.get("pad_tag", "<｜▁pad▁｜>"), extra_special_tokens=tags)
    strict, lenient = ("bos_token", "eos_token"), ("pad_token", "boi_token", "eoi_token")
    if original is None:
        strict, lenient = (*strict, *lenient, "image_token"), ()
    # The original's processor adds the image's placeholder where it is missing.
    tokenizer = read_tokenizer(folder, strict, lenient, **special)
    vocabulary, rows = tokenizer.get_vocab(), config.text_config.vocab_size
    last = max(vocabulary, key=vocabulary.get)
    if vocabulary[last] >= rows:
        raise UserError(f"{folder}: token {last!r} is outside the embedding of {rows} rows")
    template = settings.get("chat_template")
    if original is not None:  # whose tokenizer may bring a language model's, which the original never reads
        template = chat_template(*role_names(folder, settings, original, vocabulary))
    vision, size = config.vision_config, config.vision_config.image_size
    scale = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # to [-1, 1], where decoded pixels are
    images = JanusImageProcessorPil(size={"height": size, "width": size}, min_size=min(14, size), **scale)
    system = settings.get("use_default_system_prompt", original is not None)
    return JanusProcessor(images, tokenizer, template, system, vision.num_image_tokens)


WORDS, TOKENS = ("User", "Assistant"), ("<|User|>", "<|Assistant|>")  # of a Janus, of a Janus-Pro


def role_names(folder: Path, settings: dict, original: dict, vocabulary: dict[str, int]) -> tuple[str, str]:
    """Whose turns are in DeepSeek's layout; said on stderr, as wrong ones cost quality and are not seen. The
    original leaves it to its scripts, which know the checkpoint's name: words for Janus-1.3B, tokens for
    Janus-Pro (generation_inference.py, demo/app_januspro.py). So here goes, in this order: a pair "roles" in
    processor_config.json, for whom the rest is wrong; its style "deepseek_old"; the last such name in
    config.json's _name_or_path and the folder's path; and without a name what the tokenizer knows."""
    names = re.findall(r"janus[-_]?(pro|1\.3b)", f"{original.get('_name_or_path')} {folder.absolute()}", re.I)
    pro = names[-1].lower() == "pro" if names else TOKENS[0] in vocabulary
    words = settings.get("sft_format") == "deepseek_old" or not pro
    user, assistant = settings.get("roles") or (WORDS if words else TOKENS)
    say(f'{folder}: turns of {user} and {assistant} ("roles" in processor_config.json sets others)')
    return user, assistant


@cache
def say(line: str) -> None:
    """On stderr, once a run."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def chat_template(user: str, assistant: str) -> str:
    """Jinja template of Janus' turns, `{user}: ...`, `{assistant}:`, the image's tag on a line of its own. A
    turn's content is stripped as a whole, and an empty one leaves nothing behind the colon, as in the
    original (conversation.py, processing_vlm.py)."""
    return (
        f"{{% for turn in messages %}}{{{{ '{user}:' if turn['role'] == 'user' else '{assistant}:' }}}}"
        "{% set content | trim %}{% for part in turn['content'] %}"
        "{{ '<image_placeholder>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endset %}"
        "{% if content %}{{ ' ' + content + ('\n\n' if turn['role'] == 'user' else eos_token) }}{% endif %}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{assistant}:' }}}}{{% endif %}}"
    )


def build_show_o(folder: Path, settings: dict, tensors: dict[str, Tensor]) -> tuple[ShowO, dict[str, Tensor]]:
    """A Show-o without content for its config.json, and the tensors by its names. Text tokenizer and
    MAGVIT-v2 come from the folder and its magvitv2/, or else, as in the published code, from the hub; the
    trunk's sizes likewise from "phi_config", or else from the language model's config.json."""
    if settings.get("w_clip_vit"):
        raise UserError(f"{folder}: a Show-o that looks through CLIP (w_clip_vit) is not supported")
    source, magvit = folder, folder / "magvitv2"
    language_model = settings.get("llm_model_path", SHOW_O["llm_model_path"])
    if not (folder / "tokenizer.json").exists():
        source = find_folder(language_model, f"put its tokenizer.json into {folder}", weights=False)
    if "phi_config" not in settings and language_model != SHOW_O["llm_model_path"]:
        advice = f'say its sizes as "phi_config" in {folder}/config.json'
        settings["phi_config"] = read_json(find_folder(language_model, advice, weights=False) / "config.json")
    if not magvit.is_dir():
        magvit = find_folder("showlab/magvitv2", f"put it into {magvit}")
    tokenizer = read_show_o_tokenizer(source)
    with torch.device("meta"):
        model = ShowO(settings, tokenizer, MAGVITv2(read_json(magvit / "config.json")))
    words, codes, rows = len(tokenizer), model.num_codes, settings["vocab_size"]
    if words + codes + 1 != rows:
        raise UserError(f"{source}: {words} text and special tokens, {codes} codes and a mask are not the "
                        f"{rows} rows of the embedding")
    if 2**model.vqmodel.bits != codes:
        raise UserError(f"{folder}: {codes} codes, but its image tokenizer {2**model.vqmodel.bits}")
    if math.isqrt(model.num_image_tokens) ** 2 != model.num_image_tokens:
        raise UserError(f"{folder}: {model.num_image_tokens} image tokens (num_vq_tokens) are not a square")
    tensors = {rename(name, SHOW_O_NAMES): tensor for name, tensor in tensors.items()}
    return model, tensors | {f"vqmodel.{name}": tensor for name, tensor in read_tensors(magvit).items()}


def read_show_o_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The text tokenizer with [PAD] and SHOW_O_TOKENS, which get the ids after its own unless it has them."""
    tokenizer = read_tokenizer(folder, ("bos_token", "eos_token"))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(list(SHOW_O_TOKENS), special_tokens=True)
    return tokenizer


def save(model: UnifiedModel, folder: str | os.PathLike, files: dict[str, dict] | None = None,
         tensors: dict[str, Tensor] | None = None) -> None:
    """Writes a Janus in the transformers layout, a Show-o in its own: beside `folder`, to the disk, and then
    it is renamed, so that `folder` is whole or not there. `files`: more files by their names, of tensors (for
    *.safetensors) or JSON; `tensors`: the weights, where the model's own are sharded or with adapters."""
    folder = Path(folder)
    temporary, old = (folder.with_name(folder.name + end) for end in (".partial", ".old.partial"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write = write_janus if isinstance(model, Janus) else write_show_o
    write(model, temporary, model.state_dict() if tensors is None else tensors)
    for name, content in (files or {}).items():
        (temporary / name).parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(content, temporary / name)
        else:
            (temporary / name).write_text(json.dumps(content))
    for path in (*temporary.rglob("*"), temporary):  # on the disk before the name says so
        flush(path)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """A file's content, or which names a folder has, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_janus(model: Janus, folder: Path, state: dict[str, Tensor]) -> None:
    """Weights in safetensors, sharded above 5 GB; config, tokenizer, processor and generation config."""
    config, tokens = model.config, model.tokenizer
    config.architectures = ["JanusForConditionalGeneration"]
    config.dtype = state["lm_head.weight"].dtype
    config.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    begin = {"boi_token_id": tokens.convert_tokens_to_ids(tokens.boi_token)}
    ids = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    settings = dict(do_sample=True, guidance_scale=model.guidance, generation_kwargs=begin, **ids)
    GenerationConfig(**settings).save_pretrained(folder)
    tensors = {n if n == "lm_head.weight" else f"model.{n}": t.contiguous() for n, t in state.items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_torch_state_dict(tensors, folder)


def write_show_o(model: ShowO, folder: Path, state: dict[str, Tensor]) -> None:
    """What Show-o's own classes write and open, and both tokenizers, so that the folder needs no other."""
    settings = {"_class_name": "Showo", "w_clip_vit": False, "mask_token_id": model.mask_id,
                **vars(model.config), "guidance": model.guidance, "steps": model.draw_steps}
    back = [(new, old) for old, new in SHOW_O_NAMES]
    trunk = {rename(n, back): t for n, t in state.items() if not n.startswith("vqmodel.")}
    image = {n.removeprefix("vqmodel."): t for n, t in state.items() if n.startswith("vqmodel.")}
    # The published class wants the codes' bits as well, written out.
    image |= {"quantize.embedding": model.vqmodel.codebook(), "quantize.power_vals": model.vqmodel.powers()}
    write_diffusers(folder, settings, trunk)
    write_diffusers(folder / "magvitv2", {"_class_name": "MAGVITv2", **model.vqmodel.settings}, image)
    model.tokenizer.save_pretrained(folder)


def write_diffusers(folder: Path, settings: dict, tensors: dict[str, Tensor]) -> None:
    """A config.json and the weights in one file, as diffusers' mixin of the published classes has them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "pytorch_model.safetensors", metadata={"format": "pt"})
