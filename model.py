"""Janus and Show-o in plain PyTorch: one trunk that reads text, reads images and writes image tokens.

    prompt  -> embed_text -> trunk -> generation_head -> image codes -> vqmodel.decode -> pixels       (generation)
    pixels  -> vision_model (SigLIP) -> aligner -> trunk -> lm_head -> answer         (understanding, Janus)
    pixels  -> vqmodel.encode -> image codes -> embed_codes -> trunk -> lm_head -> answer     (understanding, Show-o)

Janus' trunk is a LLaMA, which writes an image's codes one after the other; Show-o's is a Phi, which fills in masked
codes, all of which see each other. What differs between the two stays behind methods of the same names.

Nothing here knows about sampling, rewards or training, nor about files (checkpoint.py). Modules carry the names of the
transformers layout (`JanusForConditionalGeneration`) and of Show-o's own classes.

Written against, and tested to agree with, transformers 5.23.0 (models/janus, models/phi), github.com/deepseek-ai/Janus
and github.com/showlab/Show-o.
"""

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import JanusConfig, JanusProcessor, PhiConfig, PreTrainedTokenizerFast

PARTS = (  # of a Janus, which train or stay frozen as a whole
    "language_model", "lm_head", "vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner",
    "generation_head",
)


class UserError(Exception):
    """A mistake of the user's: scripts print it as one line and exit with 1, without a traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# The trunks: LLaMA and Phi, with grouped-query attention and a static key-value cache


def run_block(block: nn.Module, *inputs) -> Tensor:
    """block(*inputs). Where `UnifiedModel.recompute` asked for it, what happens inside is not kept for the backward
    pass but computed again there: memory for a third more time."""
    if block.recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def widen(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# A step of sampling, compiled for a CPU. Few rows make it a matter of memory bandwidth, of which the library's products
# and attention use a third at best: their blocks are made for many rows. Written as sums of products they become the
# compiler's own loops, which read every weight once, in order.


def generates_cpu_code(x: Tensor) -> bool:
    """Whether this is being compiled for a CPU, without gradient, so that sums of products become loops."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not torch.is_grad_enabled()


def stored(x: Tensor) -> Tensor:
    """x as a tensor in memory: else the compiler may compute it again in every iteration of the loop that reads it."""
    return x.as_strided(x.shape, x.stride())


def attend_with_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """scaled_dot_product_attention [B, 1, H * d] of one query a head [B, H, 1, d]."""
    B, H, _, d = q.shape
    q = stored(widen(q).view(B, k.shape[1], -1, 1, d))  # [B, Hkv, H / Hkv, 1, d]
    scores = (q * widen(k)[:, :, None]).sum(-1) * d**-0.5  # [B, Hkv, H / Hkv, S]
    weights = stored(scores.masked_fill(~mask, -torch.inf).softmax(-1))
    # Sums over tiles of a vector's width share one loop, which reads v in the order in which it lies in memory.
    out = [(weights[..., None] * widen(tile)[:, :, None]).sum(-2) for tile in v.split(16, -1)]
    return torch.cat(out, dim=-1).view(B, 1, H * d).to(v.dtype)  # from [B, Hkv, H / Hkv, d]


library = torch.library.Library("unirl", "DEF")
library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(library, "linear", "CPU")
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32 by oneDNN instead of MKL, which F.linear takes and which is slower on few rows of large
    weights. (An operator of its own, as the compiler has it for constant weights only.)"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


torch.library.register_fake("unirl::linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))


class Linear(nn.Linear):
    """A linear layer of the trunk or of what draws."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


FEW = {torch.float32: 8, torch.bfloat16: 4}  # rows, up to which loops beat the library's products
L1 = 8192  # numbers that stay next to the processor, where each is read again for every column
BIG = 2**18  # weights that do not


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear(x, weight, bias)."""
    R, K = x.numel() // x.shape[-1], x.shape[-1]
    if not generates_cpu_code(x) or torch.is_autocast_enabled("cpu") or weight.numel() < BIG:
        return F.linear(x, weight, bias)
    if R > FEW.get(weight.dtype, 0) or R * K > L1:
        onednn = weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
        return torch.ops.unirl.linear(x, weight, bias) if onednn else F.linear(x, weight, bias)
    x = x.contiguous()
    rows = [widen(x.as_strided((K,), (1,), row * K)) for row in range(R)]
    # A few columns at once, as many as registers hold the sums of, share what is read of x.
    columns = weight.chunk(max(1, min(4, 16 // R)))
    out = torch.cat([torch.stack([(widen(part) * row).sum(-1) for row in rows]) for part in columns], dim=1)
    return (out if bias is None else out + bias).to(x.dtype).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)  # bf16 would lose the mean
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [B, H, T, d] by angles cos, sin [B, 1, T, d]; halves, not pairs, as in LLaMA's
    transformers weights."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


Cache = tuple[Tensor, Tensor] | None  # a layer's keys and values


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, past: Cache, slots: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention [B, T, H * d] of queries [B, H, T, d] over keys and values [B, Hkv, T, d] (which come back as well), or
    over those of `past` and these: `past` is a cache, into whose columns `slots` [T] they are written, and of which as
    many columns are read as `mask` has; or, without `slots`, what stands before them."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the rotation, or a norm before it, is float32
    own = k, v
    if slots is not None:
        k, v = (old.index_copy_(2, slots, new).narrow(2, 0, mask.shape[-1]) for old, new in zip(past, own))
    elif past is not None:
        k, v = (torch.cat(parts, dim=2) for parts in zip(past, own))  # [B, Hkv, S, d]
    if q.shape[2] == 1 and generates_cpu_code(q):
        return attend_with_one(q, k, v, mask), own
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2), own


def causal(mask: Tensor) -> Tensor:
    """Attention mask [B, 1, T, T] of left-padded rows with mask [B, T]: every token sees itself and what stands before
    it, but no padding. (Padding sees itself, because a softmax over nothing is not a number.)"""
    T = mask.shape[1]
    look = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril() & mask[:, None, :]
    return (look | torch.eye(T, dtype=torch.bool, device=mask.device))[:, None]


def positions_of(mask: Tensor) -> Tensor:
    """Rotary positions [B, T], counted from each row's first real token."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache, slots: Tensor | None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)  # [B, Hkv, T, d]
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        out, own = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask, past, slots)
        return self.o_proj(out), own


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    recompute = False

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache, slots: Tensor | None):
        """The next x, and this layer's keys and values of the tokens."""
        seen, own = self.self_attn(self.input_layernorm(x), cos, sin, mask, past, slots)
        x = x + seen
        return x + self.mlp(self.post_attention_layernorm(x)), own


Cache = list[tuple[Tensor, Tensor]]  # one (keys, values) a layer, each [B, Hkv, S, d]


class LanguageModel(nn.Module):
    """The LLaMA trunk without its head. `config` is transformers' LlamaConfig."""

    def __init__(self, config):
        super().__init__()
        if config.rope_parameters.get("rope_type", "default") != "default" or config.attention_bias or config.mlp_bias:
            raise UserError("this LLaMA has scaled rotary embeddings or biases; no published Janus does, not supported")
        if config.hidden_act != "silu":
            raise UserError(f"this LLaMA has {config.hidden_act!r} for silu; no published Janus does, not supported")
        self.config, self.rotary = config, config.head_dim  # dimensions of a head that are rotated
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def new_cache(self, rows: int, length: int) -> Cache:
        """Zeros for `rows` sequences of at most `length` tokens, on the trunk's device and in its compute dtype."""
        config, like = self.config, next(self.layers.parameters())
        shape = (rows, config.num_key_value_heads, length, config.head_dim)
        kind = like.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype
        return [(like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)) for _ in self.layers]

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, past: Cache | None = None, slots: Tensor | None = None,
        keep: Cache | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the last norm.

        Args:
            x: input embeddings [B, T, D].
            positions: rotary position of every token [B, T].
            mask: [B, 1, T, S], True where a token may look; S = T, or that plus the tokens of `past`, or at most the
                cache's length.
            past: keys and values of what stands before x; or, with `slots`, the cache that x' are written into.
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
            x, own = run_block(layer, x, cos, sin, mask, past[i] if past else None, slots)
            if keep is not None:
                keep.append(own)
        return self.norm(x.to(outer))


class LayerNorm(nn.LayerNorm):
    """In at least float32, also where the input is that and the weights are bfloat16, which PyTorch refuses on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        wide = F.layer_norm(widen(x), self.normalized_shape, widen(self.weight), widen(self.bias), self.eps)
        return wide.to(x.dtype)


class PhiAttention(nn.Module):
    """With biases, a layer norm of every query and key, and rotary embeddings on a head's first dimensions only."""

    def __init__(self, config):
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dim
        kv_width = config.num_key_value_heads * self.head_dim
        self.q_proj, self.dense = Linear(width, width), Linear(width, width)
        self.k_proj, self.v_proj = Linear(width, kv_width), Linear(width, kv_width)
        self.q_layernorm, self.k_layernorm = (LayerNorm(self.head_dim, config.layer_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache, slots: Tensor | None):
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)  # [B, H, T, d]
        d = cos.shape[-1]
        q, k = (
            torch.cat((rotate(y[..., :d], cos, sin), y[..., d:]), dim=-1)
            for y in (self.q_layernorm(q), self.k_layernorm(k))
        )
        out, own = attend(q, k, v, mask, past, slots)
        return self.dense(out), own


class PhiMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class PhiLayer(nn.Module):
    """Attention and MLP side by side, of the same normalised input."""

    recompute = False

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn, self.mlp = PhiAttention(config), PhiMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Cache, slots: Tensor | None):
        h = self.input_layernorm(x)
        seen, own = self.self_attn(h, cos, sin, mask, past, slots)
        return x + seen + self.mlp(h), own


class Phi(LanguageModel):
    """The Phi trunk without its head, run as LanguageModel is. `config` is transformers' PhiConfig."""

    def __init__(self, config):
        nn.Module.__init__(self)
        if config.rope_parameters.get("rope_type", "default") != "default":
            raise UserError("this Phi has scaled rotary embeddings; no published Show-o does, not supported")
        if config.hidden_act not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"this Phi has {config.hidden_act!r} for gelu_new; no published Show-o does, not supported")
        config.head_dim = config.hidden_size // config.num_attention_heads
        self.config, self.rotary = config, int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PhiLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)


# ---------------------------------------------------------------------------------------------------------------------
# Understanding: SigLIP and the aligner


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.projection_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projections)  # [B, H, M, d]
        return self.projection_layer(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionLayer(nn.Module):
    recompute = False

    def __init__(self, config):
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = VisionAttention(width, config.num_attention_heads)
        self.mlp = VisionMLP(width, int(width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionModel(nn.Module):
    """SigLIP without its pooling head: pixels [B, 3, H, W] in [-1, 1] -> features [B, M, C], M = patches."""

    def __init__(self, config):
        super().__init__()
        if config.use_qk_norm or config.hidden_act != "gelu":
            raise UserError("this vision model has query/key norms or another activation than gelu, not supported")
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)
        self.embeddings.position_embedding = nn.Embedding(
            (config.image_size // config.patch_size) ** 2, config.hidden_size
        )
        self.encoder.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, M, C]
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = run_block(layer, x)
        return self.post_layernorm(x)


class Aligner(nn.Module):
    """MLP with gelu between its `depth` layers, from image features or codebook vectors to the trunk's width."""

    def __init__(self, width_in: int, width: int, depth: int):
        super().__init__()
        self.fc1 = Linear(width_in, width)
        self.hidden_layers = nn.ModuleList(Linear(width, width) for _ in range(1, depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        for layer in self.hidden_layers:
            x = layer(F.gelu(x))
        return x


# ---------------------------------------------------------------------------------------------------------------------
# Image tokens: Janus' VQ-16 of LlamaGen, and Show-o's MAGVIT-v2, made of the same blocks


class ResnetBlock(nn.Module):
    recompute = False

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, c_in, eps=1e-6), nn.GroupNorm(32, c_out, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    recompute = False

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (p(h).flatten(2).transpose(1, 2) for p in (self.q, self.k, self.v))  # [B, H * W, C], one head
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(h.transpose(1, 2).view_as(x))


class Resample(nn.Module):
    """Halves or doubles height and width."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Mid(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block_1, self.attn_1, self.block_2):
            x = run_block(block, x)
        return x


class Level(nn.Module):
    """Residual blocks of one resolution (with attention at the lowest) and the step to the next resolution."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, resample: str | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        if resample:
            setattr(self, resample, Resample(c_out, up=resample == "upsample"))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = run_block(block, x)
            if len(self.attn):
                x = run_block(self.attn[i], x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)] if i else config.base_channels,
                width,
                config.num_res_blocks,
                attention=i == last,
                resample="downsample" if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Mid(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.base_channels * m for m in reversed(config.channel_multiplier)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = Mid(widths[0])
        self.up = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.num_res_blocks + 1,
                attention=i == 0,
                resample="upsample" if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQModel(nn.Module):
    """Pixels <-> codes. Codebook and latents live on the unit sphere (vq_model.py of the original)."""

    def __init__(self, config):
        super().__init__()
        self.grid = config.num_patches  # codes a side
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(config.num_embeddings, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)

    def codebook(self) -> Tensor:
        """The code vectors [V, E], each of length one."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B, N] of pixels [B, 3, H, W] in [-1, 1]. Both sides of the nearest-code search are normalised, as in
        the original; transformers 5.23.0 normalises neither here and so finds other codes."""
        latents = F.normalize(self.quant_conv(self.encoder(pixels)), dim=1).flatten(2)  # [B, E, N]
        return (self.codebook() @ latents).argmax(dim=1)  # on the sphere the nearest is the most aligned; [B, N]

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of codes [B, N], or, differentiably, of one-hots or mixtures over codes [B, N, V]."""
        if codes.is_floating_point():
            vectors = codes @ self.codebook().to(codes.dtype)  # [B, N, E]
        else:
            vectors = self.codebook()[codes]
        latents = vectors.transpose(1, 2).unflatten(2, (self.grid, self.grid))  # [B, E, h, w]
        return self.decoder(self.post_quant_conv(latents))


MAGVIT = {  # the published sizes, which its config.json does not name (modeling_magvitv2.py of showlab/Show-o)
    "channels": 128,
    "encoder_multipliers": [1, 2, 2, 4, 4],
    "encoder_blocks": [4, 3, 4, 3, 4],
    "decoder_multipliers": [1, 1, 2, 2, 4],
    "decoder_blocks": [4, 4, 3, 4, 3],
    "bits": 13,
}


class MAGVITEncoder(nn.Module):
    """Pixels [B, 3, H, W] -> latents [B, bits, h, w], one number a bit."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i - 1] if i else channels, width, blocks[i], False, "downsample" if i < last else None)
            for i, width in enumerate(widths)
        )
        self.mid = Mid(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class MAGVITDecoder(nn.Module):
    """Bits [B, bits, h, w], each -1 or 1 -> pixels [B, 3, H, W]. Levels are numbered from the highest resolution. They
    double it by nearest neighbours and a convolution: the published code has a depth-to-space block too, and never uses
    it (models/common_modules.py)."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], bits: int):
        super().__init__()
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1])
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], width, blocks[i], False, "upsample" if i else None)
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(x)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class MAGVITv2(nn.Module):
    """Pixels <-> codes without a codebook to look up: a code's bits are the signs of the latents, the first the highest
    (modeling_magvitv2.py of showlab/Show-o). `settings`: MAGVIT's keys, where its values are not wanted."""

    def __init__(self, settings: dict):
        super().__init__()
        self.settings = {**MAGVIT, **{key: settings[key] for key in MAGVIT if key in settings}}
        sizes = self.settings
        self.bits = sizes["bits"]
        self.encoder, self.decoder = (
            kind(sizes["channels"], sizes[f"{name}_multipliers"], sizes[f"{name}_blocks"], self.bits)
            for kind, name in ((MAGVITEncoder, "encoder"), (MAGVITDecoder, "decoder"))
        )
        self.stride: int = 2 ** (len(sizes["encoder_multipliers"]) - 1)  # pixels a code, each way

    def powers(self, like: Tensor) -> Tensor:
        """What each bit counts [bits]."""
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=like.device)

    def codebook(self, like: Tensor) -> Tensor:
        """The bits [V, bits] of every code, as -1 and 1."""
        codes = torch.arange(2**self.bits, device=like.device)
        return ((codes[:, None] & self.powers(like)) > 0).to(like.dtype) * 2 - 1

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B, N] of pixels [B, 3, H, W] in [-1, 1]."""
        positive = self.encoder(pixels) > 0  # [B, bits, h, w]
        return (positive * self.powers(pixels)[:, None, None]).sum(1).flatten(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of codes [B, N] of a square, or, differentiably, of one-hots or mixtures [B, N, V]."""
        weight = self.decoder.conv_in.weight
        signs = self.codebook(weight)
        bits = codes.to(weight.dtype) @ signs if codes.is_floating_point() else signs[codes]
        side = math.isqrt(codes.shape[1])
        return self.decoder(bits.transpose(1, 2).unflatten(2, (side, side)))


class GenerationHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj_out = Linear(config.image_token_embed_dim, config.projection_dim)
        self.vision_head = Linear(config.projection_dim, config.num_embeddings)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(F.gelu(self.proj_out(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Janus


class UnifiedModel(nn.Module):
    """What Janus and Show-o have in common: `language_model`, `lm_head`, `vqmodel` and `tokenizer`."""

    steps: int | None = None  # of mask-predict; a Janus has none

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    def recompute(self, on: bool) -> None:
        """Gradient checkpointing of every block of trunk, SigLIP and image tokenizer."""
        for module in self.modules():
            if isinstance(getattr(module, "recompute", None), bool):
                module.recompute = on

    def embed_text(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]"""
        return self.language_model.embed_tokens(ids)

    def to_pixels(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of codes [B, N] or one-hots [B, N, V] (differentiable in the one-hots)."""
        return self.vqmodel.decode(codes).clamp(-1, 1)

    def show(self, seen: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of what `see` gave."""
        return seen if seen.dim() == 4 else self.to_pixels(seen)

    def left_pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids [B, T] of rows of unequal length, and mask [B, T], True on what is not padding."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device) >= longest - lengths[:, None]


class Janus(UnifiedModel):
    """The unified model with tokenizer, prompt format and default guidance. `config` is transformers' JanusConfig."""

    def __init__(self, config: JanusConfig, processor: JanusProcessor, guidance: float = 5.0):
        super().__init__()
        self.guidance = guidance
        text, vision, vq = config.text_config, config.vision_config, config.vq_config
        self.config, self.processor, self.tokenizer = config, processor, processor.tokenizer
        self.language_model = LanguageModel(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.vision_model = VisionModel(vision)
        self.aligner = Aligner(vision.hidden_size, vision.projection_dim, vision.depth)
        self.vqmodel = VQModel(vq)
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner = Aligner(vq.embed_dim, vq.projection_dim, vq.num_hidden_layers)
        self.generation_head = GenerationHead(vq)
        self.num_image_tokens: int = vq.num_patches**2  # N: codes an image
        self.num_codes: int = vq.num_embeddings  # V
        if config.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The trunk's input for image codes that were generated: [B, N] -> [B, N, D]"""
        return self.generation_aligner(self.generation_embeddings(codes))

    def image_features(self, image: Tensor) -> Tensor:
        """The trunk's input [B, M, D] for an image that is looked at: pixels [B, 3, H, W] in [-1, 1] or `look`'s."""
        return self.aligner(image if image.dim() == 3 else self.look(image))

    def look(self, pixels: Tensor) -> Tensor:
        """SigLIP's features [B, M, C] of pixels [B, 3, H, W], which need not be computed again while it is frozen."""
        return self.vision_model(pixels.to(self.dtype))

    def see(self, codes: Tensor) -> Tensor:
        """What understanding is given of an image of codes [B, N] or one-hots [B, N, V]: its pixels."""
        return self.to_pixels(codes)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels [1, 3, H, W] of a picture, resized and padded to the model's square."""
        return self.processor.image_processor(images=image, return_tensors="pt")["pixel_values"].flatten(0, -4)

    def conditional_weight(self, guidance: float) -> float:
        """c of the guided logits l_uncond + c (l_cond - l_uncond)."""
        return guidance

    # -- prompts -------------------------------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [B, T], left-padded, each row starting with the begin-of-sentence token, and mask [B, T], True on
        what is not padding."""
        bos = self.tokenizer.bos_token_id
        # The begin-of-sentence token is added here: whether a tokenizer adds it by itself varies between checkpoints.
        return self.left_pad([[bos, *self.tokenizer.encode(text, add_special_tokens=False)] for text in texts])

    def chat(self, content: list[dict[str, str]]) -> str:
        """One user turn in the checkpoint's own format, open for the assistant's reply."""
        turn = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)

    def generation_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of prompts to draw; the last token of every row is the begin-of-image tag."""
        start = self.tokenizer.boi_token
        return self.encode([self.chat([{"type": "text", "text": prompt}]) + start for prompt in prompts])

    def unconditional(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of the guidance's other branch: every prompt token replaced by pad, but for the first and
        the last (generation_inference.py of the original). The pads are looked at, so the mask stays."""
        first = mask & (mask.cumsum(1) == 1)
        keep = first | ~mask
        keep[:, -1] = True
        return ids.where(keep, self.tokenizer.pad_token_id), mask

    def question_prompt(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, Q] of questions about one image each; where the image goes, its placeholder token stands
        once for every image feature."""
        tokens = self.tokenizer
        slots = tokens.boi_token + tokens.image_token * self.num_image_tokens + tokens.eoi_token
        texts = []
        for question in questions:
            text = self.chat([{"type": "image"}, {"type": "text", "text": question}])
            if self.processor.use_default_system_prompt:
                text = SYSTEM_PROMPT + text
            texts.append(text.replace(tokens.image_token, slots))
        return self.encode(texts)

    def question_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Attention mask [B, 1, T, T] of questions and answers with ids and mask [B, T]."""
        return causal(mask)

    def embed_question(self, ids: Tensor, image: Tensor) -> Tensor:
        """Trunk input [B, Q, D] for `question_prompt`'s ids, with the features of the image in their place: of pixels
        [B, 3, H, W], or those that `look` gave."""
        x = self.embed_text(ids)
        features = self.image_features(image)  # [B, M, D]
        return x.masked_scatter((ids == self.config.image_token_id)[..., None], features.to(x.dtype))


SYSTEM_PROMPT = (  # the original's, kept word for word because the weights were trained with it
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language.\n\n"
)


# ---------------------------------------------------------------------------------------------------------------------
# Show-o

SHOW_O = {  # what Show-o's published config.json leaves to its code and to the settings of its scripts
    "llm_model_path": "microsoft/phi-1_5",
    "phi_config": {},  # sizes of the trunk, where they are not Phi-1.5's (which are transformers' defaults)
    "max_seq_length": 128,  # text tokens of a prompt, including <bos> and <eos>
    "guidance": 5.0,
    "steps": 50,  # of mask-predict: the published commands draw with 50, though its function's default is 18
}
SHOW_O_TOKENS = ("<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")


class ShowO(UnifiedModel):
    """The unified model with tokenizers, prompt format, default guidance and default number of mask-predict steps.

    One vocabulary for everything: text, [PAD] and SHOW_O_TOKENS, then the image codes, last the mask. The rows are

        <|t2i|> <bos> prompt <eos> | <|soi|> codes <|eoi|>                            (generation)
        <|mmu|> <|soi|> codes <|eoi|> <bos> USER: \n question ASSISTANT: | answer <eos>     (understanding)

    left-padded, and the omni-attention is causal for text, whereas in generation the image (everything right of the
    bar) sees the prompt and all of itself, and in understanding everything up to <|eoi|> is seen by everything.
    Padding is seen by nothing, so that a row's width does not matter; the published code always pads to the window.

    Args:
        settings: SHOW_O's keys and those of a published config.json.
        tokenizer: with [PAD] and SHOW_O_TOKENS.
        vqmodel: the image tokenizer.
    """

    def __init__(self, settings: dict, tokenizer: PreTrainedTokenizerFast, vqmodel: nn.Module):
        super().__init__()
        config = SimpleNamespace(**{**SHOW_O, **settings})
        for key in ("num_vq_tokens", "codebook_size", "vocab_size", "max_seq_length", "steps"):
            if type(value := getattr(config, key)) is not int or value < 1:
                raise UserError(f"{key} {value!r} is not a whole number above 0")
        self.config, self.tokenizer, self.vqmodel = config, tokenizer, vqmodel
        self.guidance, self.steps = config.guidance, config.steps
        if not 0 < self.steps <= config.num_vq_tokens:
            raise UserError(f"{self.steps} mask-predict steps (steps), but an image has {config.num_vq_tokens} tokens")
        phi = PhiConfig(**{**config.phi_config, "vocab_size": config.vocab_size})
        self.language_model = Phi(phi)
        self.lm_head = nn.Linear(phi.hidden_size, phi.vocab_size)
        self.num_image_tokens: int = config.num_vq_tokens  # N: codes an image
        self.num_codes: int = config.codebook_size  # V
        self.first_code: int = len(tokenizer)  # id of code 0
        self.mask_id: int = config.vocab_size - 1
        self.soi, self.eoi, _, _, self.t2i, self.mmu, *_ = tokenizer.convert_tokens_to_ids(SHOW_O_TOKENS)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """The trunk's input for image codes [B, N], or, differentiably, for one-hots [B, N, V]: [B, N, D]"""
        if codes.is_floating_point():
            vectors = self.embed_text(torch.arange(self.num_codes, device=codes.device) + self.first_code)  # [V, D]
            return codes.to(vectors.dtype) @ vectors
        return self.embed_text(codes + self.first_code)

    def generation_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the image codes, from hidden states [..., D]: the head's columns for these."""
        codes = slice(self.first_code, self.first_code + self.num_codes)
        return linear(hidden, self.lm_head.weight[codes], self.lm_head.bias[codes])

    def see(self, codes: Tensor) -> Tensor:
        """What understanding is given of an image of codes [B, N] or one-hots [B, N, V]: these themselves."""
        return codes

    def preprocess(self, image: Image.Image) -> Tensor:
        """Pixels [1, 3, H, W] of a picture, its shorter side resized to the model's square and the rest cut off."""
        side = math.isqrt(self.num_image_tokens) * self.vqmodel.stride
        long = int(side * max(image.size) / min(image.size))
        w, h = (side, long) if image.width <= image.height else (long, side)
        left, top = round((w - side) / 2), round((h - side) / 2)  # whole pixels, as torchvision's CenterCrop
        image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + side, top + side))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # [1, 3, H, W]

    def conditional_weight(self, guidance: float) -> float:
        """c of the guided logits l_uncond + c (l_cond - l_uncond), which is (1 + w) l_cond - w l_uncond."""
        return 1 + guidance

    # -- prompts -------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def generation_prompt(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of prompts to draw. Raises UserError where one is longer than the text window; the
        published code cuts it off without a word."""
        bos, eos, window = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.config.max_seq_length
        rows = [[self.t2i, bos, *self.encode(prompt), eos] for prompt in prompts]
        for row, prompt in zip(rows, prompts):
            if len(row) > window + 1:
                raise UserError(f"the prompt {prompt[:40]!r}... has {len(row) - 1} tokens with its begin and end, and "
                                f"this Show-o's text window {window}")
        return self.left_pad(rows)

    def unconditional(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, P] of the guidance's other branch: the empty prompt in place of every prompt."""
        row, _ = self.generation_prompt([""])  # [1, 3]
        missing = ids.shape[1] - row.shape[1]
        ids = F.pad(row, (missing, 0), value=self.tokenizer.pad_token_id).expand(len(ids), -1)
        return ids, (torch.arange(ids.shape[1], device=ids.device) >= missing).expand(len(ids), -1)

    def embed_canvas(self, codes: Tensor, known: Tensor) -> Tensor:
        """Trunk input [B, N + 2, D] of partly masked images: <|soi|>, codes [B, N] where `known` [B, N] and else the
        mask, <|eoi|>."""
        ids = (codes + self.first_code).where(known, self.mask_id)
        return self.embed_text(F.pad(F.pad(ids, (1, 0), value=self.soi), (0, 1), value=self.eoi))

    def canvas_hidden(self, ids: Tensor, mask: Tensor, codes: Tensor, known: Tensor) -> Tensor:
        """Hidden states [B, N, D] that predict every code of partly masked images of prompts [B, P], in one pass."""
        x = torch.cat((self.embed_text(ids), self.embed_canvas(codes, known)), dim=1)  # [B, P + N + 2, D]
        image = codes.shape[1] + 2
        positions = positions_of(F.pad(mask, (0, image), value=True))
        hidden = self.language_model(x, positions, generation_mask(mask, image))
        return hidden[:, 1 - image : -1]

    def question_prompt(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, Q] of questions about one image each; where its codes go stand masks."""
        image = [self.mmu, self.soi, *[self.mask_id] * self.num_image_tokens, self.eoi]
        begin = self.tokenizer.bos_token_id
        return self.left_pad([[*image, begin, *self.encode(f"USER: \n{text} ASSISTANT:")] for text in questions])

    def question_mask(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Attention mask [B, 1, T, T] of questions and answers with ids and mask [B, T]: causal, but for everything up
        to the end of the image, which every token sees."""
        end = (ids == self.eoi).int()
        image = mask & (end.cumsum(1) == end)  # up to the first <|eoi|>
        return causal(mask) | (image[:, None, :] & mask[:, :, None])[:, None]

    def embed_question(self, ids: Tensor, image: Tensor) -> Tensor:
        """Trunk input [B, Q, D] for `question_prompt`'s ids, with the image in its place: codes [B, N], one-hots
        [B, N, V] or pixels [B, 3, H, W]."""
        codes = self.vqmodel.encode(image.to(self.dtype)) if image.dim() == 4 else image
        x = self.embed_text(ids)
        return x.masked_scatter((ids == self.mask_id)[..., None], self.embed_codes(codes).to(x.dtype))


def generation_mask(mask: Tensor, image: int) -> Tensor:
    """Attention mask [B, 1, P + M, P + M] of prompts with mask [B, P] and M = `image` tokens: text is causal, the image
    sees its prompt and all of itself."""
    look = F.pad(causal(mask), (0, image))  # text does not see the image
    rows = F.pad(mask, (0, image), value=True)[:, None, None].expand(-1, -1, image, -1)
    return torch.cat((look, rows), dim=2)


def frozen_copy(model: UnifiedModel) -> UnifiedModel:
    """A copy of the whole model that never learns. The KL is to what it thinks through its *own* embeddings, aligners
    and heads; weights that do not learn in the model either are shared, to save memory."""
    kept = (*model.parameters(), *model.buffers())
    shared = {id(weight): weight for weight in kept if not weight.requires_grad}
    others = getattr(model, "processor", None), model.tokenizer, model.config
    return copy.deepcopy(model, shared | {id(thing): thing for thing in others}).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Low-rank adapters (Hu et al. 2021)


class Adapted(Linear):
    """A linear layer that stays as it is, plus a product of two thin matrices that learns. `lora_up` starts at zero, so that
    an untouched adapter changes nothing."""

    def __init__(self, layer: nn.Linear, rank: int, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        down = torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5
        self.lora_down = nn.Parameter(down.to(layer.weight.device))  # float32 whatever the layer's own weight is
        self.lora_up = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_down), self.lora_up)


def add_adapters(model: UnifiedModel, rank: int) -> None:
    """Freezes the model and gives every linear layer of its trunk an adapter, the same ones at every call."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parent in list(model.language_model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(parent, name, Adapted(layer, rank, generator))


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its adapters added into the weights that they belong to, in float32: an ordinary one."""
    plain = {n: widen(t) if t.is_floating_point() else t for n, t in state.items() if ".lora_" not in n}
    for name in state.keys() - plain:
        layer, _, part = name.rpartition(".")
        if part == "lora_up":
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + state[name] @ state[f"{layer}.lora_down"]
    return plain
