"""Published checkpoints of Janus and Show-o, read and written: `load` and `save`.

    from checkpoint import load, save
    model = load("tiny")                 # or another of NAMES, a hub id, a folder
    save(model, "somewhere")             # JanusForConditionalGeneration.from_pretrained("somewhere") opens it

Janus is read in the original DeepSeek layout (`ORIGINAL_NAMES`) and in that of transformers, and written in the latter;
Show-o is read and written in its own. Every tensor is used or named, files are written beside and renamed, and nothing
is unpickled but tensors.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, JanusConfig, JanusProcessor, PreTrainedTokenizerFast
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from model import SHOW_O, SHOW_O_TOKENS, Janus, MAGVITv2, ShowO, UnifiedModel, UserError

NAMES = {  # what --model takes, besides any hub id and any folder
    "tiny": str(Path(__file__).parent / "tiny" / "janus"),
    "janus": "deepseek-ai/Janus-1.3B",
    "janus-pro-1b": "deepseek-ai/Janus-Pro-1B",
    "janus-pro-7b": "deepseek-ai/Janus-Pro-7B",
    "tiny-show-o": str(Path(__file__).parent / "tiny" / "show-o"),
    "show-o": "showlab/show-o-512x512",
    "show-o-256": "showlab/show-o",
}

# DeepSeek's names -> transformers' names, first match wins; None: a tensor that Janus never uses.
ORIGINAL_NAMES = [
    (r"vision_model\.vision_tower\.attn_pool\..*", None),  # SigLIP's pooling head
    (r"gen_vision_model\.quantize\.codebook_used", None),  # a counter of the tokenizer's training
    (r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),  # recomputed
    (r"vision_model\.vision_tower\.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    (r"vision_model\.vision_tower\.patch_embed\.proj\.(.*)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"vision_model\.vision_tower\.norm\.(.*)", r"vision_model.post_layernorm.\1"),
    (r"vision_model\.vision_tower\.blocks\.(\d+)\.norm([12])\.(.*)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(.*)", r"vision_model.encoder.layers.\1.self_attn.qkv.\2"),
    (
        r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj\.(.*)",
        r"vision_model.encoder.layers.\1.self_attn.projection_layer.\2",
    ),
    (r"vision_model\.vision_tower\.blocks\.(\d+)\.mlp\.(.*)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"gen_vision_model\.(encoder|decoder)\.mid\.0\.(.*)", r"vqmodel.\1.mid.block_1.\2"),
    (r"gen_vision_model\.(encoder|decoder)\.mid\.1\.(.*)", r"vqmodel.\1.mid.attn_1.\2"),
    (r"gen_vision_model\.(encoder|decoder)\.mid\.2\.(.*)", r"vqmodel.\1.mid.block_2.\2"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.res\.(.*)", r"vqmodel.encoder.down.\1.block.\2"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.res\.(.*)", r"vqmodel.decoder.up.\1.block.\2"),
    (r"gen_vision_model\.encoder\.conv_blocks\.(.*)", r"vqmodel.encoder.down.\1"),
    (r"gen_vision_model\.decoder\.conv_blocks\.(.*)", r"vqmodel.decoder.up.\1"),
    (r"gen_vision_model\.(.*)", r"vqmodel.\1"),
    (r"gen_head\.output_mlp_projector\.(.*)", r"generation_head.proj_out.\1"),
    (r"gen_head\.(.*)", r"generation_head.\1"),
    (r"gen_embed\.(.*)", r"generation_embeddings.\1"),
    (r"language_model\.model\.(.*)", r"language_model.\1"),
    (r"language_model\.lm_head\.(.*)", r"lm_head.\1"),
]


def from_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the original layout under this module's names, SigLIP's fused qkv split in three. A name that
    the table does not know stays as it is, and the strict load reports it."""
    renamed = {}
    for name, tensor in tensors.items():
        aligner = re.fullmatch(r"(gen_)?aligner\.layers\.(\d+)\.(.*)", name)  # Linear, GELU, Linear, GELU, ...
        if aligner:
            prefix, layer = "generation_aligner" if aligner[1] else "aligner", int(aligner[2]) // 2
            new = f"{prefix}.hidden_layers.{layer - 1}.{aligner[3]}" if layer else f"{prefix}.fc1.{aligner[3]}"
        else:
            match = ((re.fullmatch(old, name), new) for old, new in ORIGINAL_NAMES)
            found, new = next(((m, new) for m, new in match if m), (None, name))
            new = found.expand(new) if found and new else new
        if new is None:
            continue
        if ".self_attn.qkv." in new:
            for part, piece in zip("qkv", tensor.chunk(3)):
                renamed[new.replace(".qkv.", f".{part}_proj.")] = piece.clone()  # or safetensors refuses to save it
        else:
            renamed[new] = tensor.squeeze(0) if new.endswith("position_embedding.weight") else tensor
    return renamed


def config_from_original(original: dict, tensors: dict[str, Tensor]) -> JanusConfig:
    """JanusConfig for DeepSeek's config.json and the tensors already under this module's names. The original's config
    names its vision tower and tokenizer instead of giving their sizes, so these are read off the tensors."""

    def count(pattern: str) -> int:
        return len({m[1] for m in (re.match(pattern, name) for name in tensors) if m})

    try:
        patch = tensors["vision_model.embeddings.patch_embedding.weight"]  # [C, 3, p, p]
        base = tensors["vqmodel.encoder.conv_in.weight"].shape[0]
        levels = count(r"vqmodel\.encoder\.down\.(\d+)\.")
        widths = [tensors[f"vqmodel.encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        hidden = tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        latent = tensors["vqmodel.encoder.conv_out.weight"].shape[0]
    except KeyError as missing:
        raise UserError(f"tensor {missing} is missing (by its transformers name)") from None
    params = {part: original[f"{part}_config"]["params"] for part in ("vision", "aligner", "gen_vision", "gen_aligner")}
    return JanusConfig(
        text_config={**original["language_config"], "model_type": "llama"},
        vision_config={
            "hidden_size": patch.shape[0],
            "patch_size": patch.shape[-1],
            "image_size": params["vision"]["image_size"],
            "num_hidden_layers": count(r"vision_model\.encoder\.layers\.(\d+)\."),
            "num_attention_heads": 16,  # of every SigLIP tower that Janus names (siglip_vit.py of the original)
            "mlp_ratio": hidden / patch.shape[0],
            "projection_dim": params["aligner"]["n_embed"],
            "depth": params["aligner"]["depth"],
            "num_image_tokens": (params["vision"]["image_size"] // patch.shape[-1]) ** 2,
        },
        vq_config={
            "embed_dim": params["gen_vision"]["n_embed"],
            "num_embeddings": params["gen_vision"]["image_token_size"],
            "latent_channels": latent,
            "base_channels": base,
            "channel_multiplier": [width // base for width in widths],
            "num_res_blocks": count(r"vqmodel\.encoder\.down\.0\.block\.(\d+)\."),
            "projection_dim": params["gen_aligner"]["n_embed"],
            "num_hidden_layers": params["gen_aligner"]["depth"],
            "image_token_embed_dim": original["gen_head_config"]["params"]["image_token_embed"],
        },
        tie_word_embeddings="lm_head.weight" not in tensors,
    )


def chat_template(user: str, assistant: str) -> str:
    """Jinja template of Janus' turns, `{user}: ...\\n\\n{assistant}:`, an image's placeholder on a line of its own."""
    return (
        "{% for message in messages %}"
        f"{{{{ '{user}: ' if message['role'] == 'user' else '{assistant}: ' }}}}"
        "{% for part in message['content'] %}"
        "{{ '<image_placeholder>\n' if part['type'] == 'image' else part['text'] | trim }}"
        "{% endfor %}"
        "{{ '\n\n' if message['role'] == 'user' else eos_token }}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{assistant}:' }}}}{{% endif %}}"
    )


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises UserError where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object")
    return content


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder: safetensors before .bin, sharded (by its index) or not, nothing unpickled
    but tensors. Raises UserError where a file is missing or damaged."""
    for single in ("model.safetensors", "pytorch_model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
        elif (folder / single).exists():
            files = [single]
        else:
            continue
        tensors = {}
        for name in progress(files, "reading weights", "file"):
            path = folder / Path(name).name
            try:
                if path.suffix == ".safetensors":
                    tensors |= load_file(path)
                else:
                    tensors |= torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # each format has its own; the user needs the file's name and one line
                raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
        return tensors
    raise UserError(f"{folder}: holds no model.safetensors, pytorch_model.bin or their index")


def progress(items: Iterable, what: str, unit: str) -> Iterable:
    """The items, behind a bar that appears after a second, on the first rank."""
    hide = True if os.environ.get("RANK", "0") != "0" else None
    return tqdm(items, what, unit=unit, delay=1, leave=False, disable=hide)


def find_folder(name: str, files: Sequence[str] = ("*.json", "*.safetensors", "*.bin", "*.jinja")) -> Path:
    """The local folder for `--model NAME`: a folder, a name of NAMES, or a hub id (its `files` downloaded, with
    progress)."""
    target = NAMES.get(name, name)
    folder = Path(target)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: has no config.json; --model takes a Janus checkpoint's folder, in the "
                            "transformers or the DeepSeek layout, or a Show-o's")
        return folder
    if folder.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", target):
        raise UserError(f"unknown model {name!r}: give one of {', '.join(NAMES)}, a hub id (owner/name), or a folder")
    try:
        return Path(snapshot_download(target, allow_patterns=list(files)))
    except Exception as error:  # offline, no such repository, no access: the hub client has a dozen classes for these
        raise UserError(
            f"cannot download {target} from the hub ({type(error).__name__}); download it elsewhere and give its "
            "folder: --model FOLDER"
        ) from None


def read_processor(folder: Path, config: JanusConfig) -> JanusProcessor:
    """Tokenizer, image preprocessing and chat template. Special tokens come from the tokenizer and are checked against
    the embedding; a Janus without its pad token would draw rubbish under guidance and say nothing."""
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder}: has no tokenizer.json")
    try:
        # The fast tokenizer takes tokenizer.json as it is, whatever class the folder's configuration names; but special
        # tokens that the configuration names and tokenizer.json lacks get new ids, so these are looked up there.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    except Exception as error:  # the Rust library has no classes for these
        raise UserError(f"{folder}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None
    tags = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tags = {key: getattr(tokenizer, key, None) or tag for key, tag in tags.items()}
    pad = tokenizer.pad_token or "<｜▁pad▁｜>"
    special = {"pad_token": pad, "bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, **tags}
    rows = config.text_config.vocab_size
    for name, token in special.items():
        if vocabulary.get(token) is None:
            raise UserError(f"{folder}: the tokenizer has no {name}" + (f" {token!r}" if token else ""))
    if max(vocabulary.values()) >= rows:
        token = max(vocabulary, key=vocabulary.get)
        raise UserError(f"{folder}: token {token!r} has id {vocabulary[token]}, outside the embedding of {rows} rows")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, pad_token=pad, extra_special_tokens=tags)
    path = folder / "processor_config.json"
    settings = read_json(path) if path.exists() else {}
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text()
    elif (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json")["chat_template"]
    else:
        template = settings.get("chat_template") or tokenizer.chat_template
    if template is None:  # the original: Janus-Pro has role tokens in its vocabulary, Janus-1.3B writes plain words
        pro = "<|User|>" in vocabulary and settings.get("sft_format") != "deepseek_old"
        template = chat_template("<|User|>", "<|Assistant|>") if pro else chat_template("User", "Assistant")
    size = config.vision_config.image_size
    return JanusProcessor(  # mean and deviation 0.5 put pixels in [-1, 1], where the image decoder's already are
        JanusImageProcessorPil(
            size={"height": size, "width": size}, min_size=min(14, size), image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer,
        chat_template=template,
        use_default_system_prompt=settings.get("use_default_system_prompt", "sft_format" in settings),
        num_image_tokens=config.vision_config.num_image_tokens,
    )


def load(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UnifiedModel:
    """A model from a name of NAMES, a hub id or a folder: a Janus in the transformers or the original DeepSeek layout,
    or a Show-o in its own.

    Every tensor of the checkpoint must be used, and every tensor of the model be there with its shape.

    Raises:
        UserError: with one line that says what is wrong with the name, the folder, a tensor or the tokenizer.
    """
    folder = find_folder(name)
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type")
    if "num_vq_tokens" not in settings and kind not in ("janus", "multi_modality"):
        raise UserError(f"{folder}: model_type {kind!r} is not a Janus ('janus' or 'multi_modality'), nor a Show-o")
    model = (load_show_o if "num_vq_tokens" in settings else load_janus)(folder, settings, device, dtype)
    try:
        model.generation_prompt(["?"]), model.question_prompt(["?"])
    except Exception as error:  # of the tokenizer, or a dozen classes of Jinja's
        raise UserError(f"{folder}: its tokenizer and chat template make no prompt ({one_line(error)})") from None
    return model


# What a configuration with a wrong value raises, here or in transformers.
BAD_CONFIG = (
    KeyError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError, RuntimeError, StrictDataclassError
)


def one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_guidance(path: Path, value) -> float:
    """A checkpoint's default guidance, 5 where it names none."""
    if value is not None and (not isinstance(value, (int, float)) or not 0 <= value < float("inf")):
        raise UserError(f"{path}: a guidance of {value!r} is not a number of at least 0")
    return 5.0 if value is None else float(value)


def load_janus(folder: Path, settings: dict, device: str | torch.device, dtype: torch.dtype) -> Janus:
    """A Janus of a folder in the transformers or the DeepSeek layout, whose config.json holds `settings`."""
    kind = settings["model_type"]
    tensors = read_tensors(folder)
    try:
        if kind == "multi_modality":
            tensors = from_original(tensors)
            config = config_from_original(settings, tensors)
        else:
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            config = JanusConfig.from_dict({**settings, "tie_word_embeddings": "lm_head.weight" not in tensors})
    except BAD_CONFIG as error:
        raise UserError(f"{folder}/config.json: not a Janus configuration ({one_line(error)})") from None
    processor = read_processor(folder, config)
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    generation = folder / "generation_config.json"
    guidance = read_guidance(generation, read_json(generation).get("guidance_scale") if generation.exists() else None)
    try:
        with torch.device("meta"):
            model = Janus(config, processor, guidance)
    except BAD_CONFIG as error:
        raise UserError(f"{folder}/config.json: not a Janus configuration ({one_line(error)})") from None
    if config.tie_word_embeddings and "language_model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["language_model.embed_tokens.weight"]
    check_tensors(folder, model.state_dict(), tensors)
    read = progress(tensors.items(), "loading", "tensor")  # where a file is mapped, its bytes are read only now
    model.load_state_dict({name: tensor.to(device, dtype) for name, tensor in read}, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.language_model.embed_tokens.weight
    return model.eval()


SHOW_O_NAMES = (  # its names -> this module's, by their beginnings; SHOW_O_UNUSED: a tensor that Show-o never uses
    ("showo.model.final_layernorm.", "language_model.norm."),
    ("showo.model.", "language_model."),
    ("showo.lm_head.", "lm_head."),
)
SHOW_O_UNUSED = re.compile(r".*\.rotary_emb\.inv_freq")  # recomputed


def rename(name: str, table: Sequence[tuple[str, str]]) -> str:
    """The name with the first beginning that the table knows replaced."""
    for old, new in table:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_show_o(folder: Path, settings: dict, device: str | torch.device, dtype: torch.dtype) -> ShowO:
    """The text tokenizer and MAGVIT-v2 come from the folder and its `magvitv2/`, or else, as the published code has it,
    from the hub."""
    if settings.get("w_clip_vit"):
        raise UserError(f"{folder}: this Show-o looks at images through CLIP (w_clip_vit), which is not supported")
    read = read_tensors(folder)
    tensors = {rename(name, SHOW_O_NAMES): tensor for name, tensor in read.items() if not SHOW_O_UNUSED.fullmatch(name)}
    try:
        tokenizer = read_show_o_tokenizer(folder, {**SHOW_O, **settings})
        vqmodel = load_magvit(magvit_folder(folder))
        if 2**vqmodel.bits != settings["codebook_size"]:
            raise UserError(f"{folder}: {settings['codebook_size']} codes, but its image tokenizer {2**vqmodel.bits}")
        with torch.device("meta"):
            model = ShowO(settings, tokenizer, vqmodel)
        read_guidance(folder / "config.json", model.guidance)
        if math.isqrt(model.num_image_tokens) ** 2 != model.num_image_tokens:
            raise UserError(f"{folder}: {model.num_image_tokens} image tokens (num_vq_tokens) are not a square")
    except BAD_CONFIG as error:
        raise UserError(f"{folder}/config.json: not a Show-o configuration ({one_line(error)})") from None
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("vqmodel.")}
    check_tensors(folder, expected, tensors)
    read = progress(tensors.items(), "loading", "tensor")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in read}, strict=False, assign=True)
    return model.to(device, dtype).eval()


def magvit_folder(folder: Path) -> Path:
    """Where the image tokenizer of the Show-o in `folder` is."""
    if (folder / "magvitv2").is_dir():
        return folder / "magvitv2"
    try:
        return find_folder("showlab/magvitv2")
    except UserError as error:
        raise UserError(f"{folder}: has no image tokenizer; give it a folder magvitv2, or let it come from the hub "
                        f"({error})") from None


MAGVIT_UNUSED = ("quantize.embedding", "quantize.power_vals")  # the codes' bits, written out


def load_magvit(folder: Path) -> MAGVITv2:
    """The image tokenizer in `folder`, of the published sizes unless its config.json says otherwise."""
    try:
        model = MAGVITv2(read_json(folder / "config.json"))
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"{folder}/config.json: not a MAGVIT-v2 configuration ({error})") from None
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name not in MAGVIT_UNUSED}
    check_tensors(folder, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model


def save_magvit(model: MAGVITv2, folder: Path) -> None:
    """In the published layout, with the sizes in config.json."""
    (folder / "config.json").write_text(json.dumps({"_class_name": "MAGVITv2", **model.settings}, indent=2) + "\n")
    weight = model.decoder.conv_in.weight
    tables = dict(zip(MAGVIT_UNUSED, (model.codebook(weight), model.powers(weight))))  # the published class wants them
    tensors = {name: tensor.contiguous() for name, tensor in {**model.state_dict(), **tables}.items()}
    save_file(tensors, folder / "pytorch_model.safetensors", metadata={"format": "pt"})


def read_show_o_tokenizer(folder: Path, settings: dict) -> PreTrainedTokenizerFast:
    """The text tokenizer with [PAD] and SHOW_O_TOKENS, which get the ids after its own unless it has them."""
    source = folder
    if not (folder / "tokenizer.json").exists():
        try:
            source = find_folder(settings["llm_model_path"], ["*.json"])
        except UserError as error:
            raise UserError(f"{folder}: has no tokenizer.json, and cannot take another ({error})") from None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.add_tokens(list(SHOW_O_TOKENS), special_tokens=True)
    except Exception as error:  # the Rust library has no classes for these
        raise UserError(f"{source}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"{source}: the tokenizer has no {name}")
    rows = settings["vocab_size"]
    if len(tokenizer) + settings["codebook_size"] + 1 != rows:
        raise UserError(f"{source}: {len(tokenizer)} text and special tokens, {settings['codebook_size']} codes and a "
                        f"mask are not the {rows} rows of the embedding")
    return tokenizer


def check_tensors(folder: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Raises UserError naming the first missing, unexpected or wrongly shaped tensor."""
    for what, names in {"missing": expected.keys() - found, "not one of the model's": found.keys() - expected}.items():
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{folder}: tensor {min(names)!r} is {what}{more}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, not {list(expected[name].shape)}"
            raise UserError(f"{folder}: tensor {name!r} has shape {shapes}")


MANIFEST = "manifest.json"  # of a checkpoint that a run can be resumed from: every file's sha256


def save(
    model: UnifiedModel, folder: str | os.PathLike, files: dict[str, dict] | None = None,
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """Writes the model beside `folder`, flushes it to the disk and then renames it, so that `folder` is whole or not
    there: a Janus in the transformers layout, a Show-o in its own.

    Args:
        files: more files by their names, of tensors (*.safetensors) or JSON; with them comes MANIFEST.
        tensors: the model's weights, where they are not those that it holds (sharded, or with adapters).
    """
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".partial")
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
    if files:
        sums = {str(path.relative_to(temporary)): sha256(path) for path in temporary.rglob("*") if path.is_file()}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1))
    for path in (*temporary.rglob("*"), temporary):  # on the disk before the name says so
        flush(path)
    old = folder.with_name(folder.name + ".old.partial")
    if folder.exists():
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


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_manifest(folder: Path) -> None:
    """Raises UserError that names the first file of a checkpoint which is missing, is not what was written, or was not
    written by `save`."""
    sums = read_json(folder / MANIFEST).get("sha256")
    if not isinstance(sums, dict):
        raise UserError(f"{folder / MANIFEST}: holds no checksums")
    for name, known in sums.items():
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: is missing")
        if sha256(folder / name) != known:
            raise UserError(f"{folder / name}: is not what was saved (its sha256 differs)")
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix in (".json", ".safetensors") and name not in sums and name != MANIFEST:
            raise UserError(f"{path}: is not in {MANIFEST}")


def write_janus(model: Janus, folder: Path, state: dict[str, Tensor]) -> None:
    """Weights in safetensors, sharded above 5 GB; config, tokenizer, processor and generation config."""
    config, tokens = model.config, model.tokenizer
    config.architectures = ["JanusForConditionalGeneration"]
    config.dtype = state["lm_head.weight"].dtype
    config.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    GenerationConfig(
        do_sample=True,
        guidance_scale=model.guidance,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        generation_kwargs={"boi_token_id": tokens.convert_tokens_to_ids(tokens.boi_token)},
    ).save_pretrained(folder)
    tensors = {n if n == "lm_head.weight" else f"model.{n}": t.contiguous() for n, t in state.items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_torch_state_dict(tensors, folder)


def write_show_o(model: ShowO, folder: Path, state: dict[str, Tensor]) -> None:
    """What Show-o's own class writes and opens, and beside it both tokenizers, so that the folder needs no other."""
    settings = {"_class_name": "Showo", "w_clip_vit": False, "mask_token_id": model.mask_id, **vars(model.config),
                "guidance": model.guidance, "steps": model.steps}
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    back = [(new, old) for old, new in SHOW_O_NAMES]
    tensors = {rename(n, back): t.contiguous() for n, t in state.items() if not n.startswith("vqmodel.")}
    save_file(tensors, folder / "pytorch_model.safetensors", metadata={"format": "pt"})  # one file, without an index
    model.tokenizer.save_pretrained(folder)
    (folder / "magvitv2").mkdir()
    save_magvit(model.vqmodel, folder / "magvitv2")
