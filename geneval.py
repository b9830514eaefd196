"""GenEval's scorer without mmdetection: the benchmark's rules, and a detector of transformers' Mask2Former and CLIP.

    detector = load_detector(device="cuda")                      # or load_detector(FOLDER, CLIP_FOLDER)
    found = detector(images, metadata)                           # images: [H, W, 3] uint8; metadata: GenEval's lines
    right, reason = judge(metadata[0], found[0])

After evaluation/evaluate_images.py of github.com/djghosh13/geneval (Ghosh et al. 2023), with Mask2Former's instance
head as mmdetection 2 computes it (maskformer_fusion_head.py) and CLIP's zero-shot colors as CLIP_benchmark does. The
rules are the benchmark's own; the detector's weights are another training run of the same architecture, so that a
number for a paper wants the official scorer. `evaluate.py` is the command line.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

from model import UserError
from reward import GENEVAL

# ---------------------------------------------------------------------------------------------------------------------
# The rules: from detections to a verdict. They never know where the detections come from.


class Detection(NamedTuple):
    """One object that a detector found in a picture."""

    name: str  # class
    score: float  # confidence in [0, 1]
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: np.ndarray | None = None  # [H, W] bool
    color: str | None = None


THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence that an object must exceed; for counting, a stricter one
MAX_OBJECTS = 16  # of one class, the most confident ones
POSITION_THRESHOLD = 0.1  # share of the two boxes' sizes that an offset must exceed to count


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """What holds of box a seen from box b (`relative_position` of evaluate_images.py): the offset of the centres, less
    a tenth of the two sizes, over the distance of the centres; beyond 0.5 a direction holds, so that two can hold at
    once on a diagonal. Boxes that overlap almost wholly have no relation."""
    a, b = np.array(a).reshape(2, 2), np.array(b).reshape(2, 2)  # rows: left-top and right-bottom
    offset = a.mean(0) - b.mean(0)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    named = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in named.items() if holds}


def confident(
    metadata: dict, detections: Sequence[Detection], threshold: float, counting_threshold: float
) -> dict[str, list[Detection]]:
    """The objects that count, by class, the most confident first."""
    least = counting_threshold if metadata["tag"] == "counting" else threshold
    objects = {}
    for detection in sorted((d for d in detections if d.score > least), key=lambda d: -d.score):
        objects.setdefault(detection.name, []).append(detection)
    return {name: group[:MAX_OBJECTS] for name, group in objects.items()}


def judge(
    metadata: dict, detections: Sequence[Detection], threshold: float = THRESHOLD,
    counting_threshold: float = COUNTING_THRESHOLD,
) -> tuple[bool, str]:
    """GenEval's verdict on one picture, and the reason in words ("" when right).

    For every entry of `include` in turn, its `count` most confident objects of the class must be there, have the color,
    and stand in the relation to every object that an earlier entry matched. Of no entry of `exclude` may there be
    `count` objects or more.
    """
    objects = confident(metadata, detections, threshold, counting_threshold)
    matched, reasons = [], []
    for fact in metadata["include"]:
        name, count = fact["class"], fact["count"]
        group, problem = objects.get(name, [])[:count], ""
        if len(group) < count:
            problem = f"expected {name} >= {count}, found {len(group)}"
        elif "color" in fact and any(d.color != fact["color"] for d in group):
            problem = f"expected {fact['color']} {name} >= {count}, found " + ", ".join(str(d.color) for d in group)
        elif "position" in fact:
            relation, target = fact["position"]
            if matched[target] is None:
                problem = f"no target for {name} to be {relation}"
            else:
                seen = [relations(d.box, other.box) for d in group for other in matched[target]]
                wrong = next((" and ".join(sorted(s)) or "neither side" for s in seen if relation not in s), None)
                problem = f"expected {name} {relation} target, found {wrong}" if wrong else ""
        matched.append(None if problem else group)
        reasons += [problem] if problem else []
    for fact in metadata.get("exclude", []):
        found = len(objects.get(fact["class"], []))
        if found >= fact["count"]:
            reasons.append(f"expected {fact['class']} < {fact['count']}, found {found}")
    return not reasons, "; ".join(reasons)


# ---------------------------------------------------------------------------------------------------------------------
# The detector

DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
SHORT, LONG = 800, 1333  # pixels that the detector's input has at least, unless the longer side would exceed the other
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_DETECTIONS = 100  # of an image, over queries and classes
OUTSIDE = (0x99, 0x99, 0x99)  # what CLIP sees outside an object's mask
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def instances(
    class_logits: Tensor, mask_logits: Tensor, padded: tuple[int, int], resized: tuple[int, int], size: tuple[int, int]
) -> list[Detection]:
    """The objects of one image with a confidence above THRESHOLD, from Mask2Former's class logits [Q, C + 1] and mask
    logits [Q, h, w]; heights and widths of the detector's input with and without its padding, and of the image.

    As mmdetection's instance head: softmax over classes, of which the last means no object; the MAX_DETECTIONS highest
    of queries x classes; confidence = that probability x the mean mask probability inside the binary mask; box = the
    mask's extent. That mean is at most one, so what has too low a probability already needs no mask.
    """
    classes = class_logits.shape[-1] - 1
    scores = class_logits.float().softmax(-1)[:, :-1].flatten()  # [Q * C]
    scores, chosen = scores.topk(min(MAX_DETECTIONS, len(scores)))
    scores, chosen = scores[scores > THRESHOLD], chosen[scores > THRESHOLD]
    if not len(chosen):
        return []
    masks = F.interpolate(mask_logits[chosen // classes][None].float(), padded, mode="bilinear")
    masks = F.interpolate(masks[..., : resized[0], : resized[1]], size, mode="bilinear")[0]  # [K, H, W]
    binary = masks > 0
    inside = (masks.sigmoid() * binary).flatten(1).sum(1) / (binary.flatten(1).sum(1) + 1e-6)
    found = []
    for score, label, mask in zip((scores * inside).tolist(), (chosen % classes).tolist(), binary.cpu().numpy()):
        if score > THRESHOLD:
            columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
            box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            found.append(Detection(GENEVAL.objects[label], score, tuple(map(float, box)), mask))
    return found


class Detector:
    """Mask2Former and CLIP: pictures -> detections, with colors where the prompt asks for one."""

    def __init__(self, segmenter, clip, tokenizer):
        self.segmenter, self.clip, self.tokenizer = segmenter.eval(), clip.eval(), tokenizer
        self.classifiers = {}  # class -> [colors, D]

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], metadata: Sequence[dict]) -> list[list[Detection]]:
        """What is on each image [H, W, 3] uint8, asked for by the line of metadata of the same index. Images of one
        size share a pass."""
        found = [None] * len(images)
        for size in {image.shape for image in images}:
            rows = [i for i, image in enumerate(images) if image.shape == size]
            for i, detections in zip(rows, self.segment(np.stack([images[i] for i in rows]))):
                found[i] = detections
        return self.colored(images, metadata, found)

    def segment(self, images: np.ndarray) -> list[list[Detection]]:
        """Detections without color in images [B, H, W, 3] uint8 of one size."""
        size = height, width = images.shape[1:3]
        scale = min(LONG / max(size), SHORT / min(size))
        resized = int(height * scale + 0.5), int(width * scale + 0.5)
        padded = tuple(-(-side // 32) * 32 for side in resized)
        if scale < 1:  # without antialiasing, as OpenCV does it; Pillow would smooth
            x = torch.from_numpy(images).to(self.segmenter.device).permute(0, 3, 1, 2).float()
            x = F.interpolate(x, resized, mode="bilinear").round()
        else:
            large = np.stack([Image.fromarray(image).resize(resized[::-1], Image.BILINEAR) for image in images])
            x = torch.from_numpy(large).to(self.segmenter.device).permute(0, 3, 1, 2).float()
        x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
        x = F.pad(x, (0, padded[1] - resized[1], 0, padded[0] - resized[0]))  # [B, 3, H', W']
        out = self.segmenter(pixel_values=x)
        return [
            instances(classes, masks, padded, resized, size)
            for classes, masks in zip(out.class_queries_logits, out.masks_queries_logits)
        ]

    def colored(
        self, images: Sequence[np.ndarray], metadata: Sequence[dict], found: list[list[Detection]]
    ) -> list[list[Detection]]:
        """The same detections, with the colors of those that a prompt asks for: each one's crop, gray outside its mask,
        against CLIP's embeddings of the ten color words."""
        wanted = []  # (image, index of the detection in it)
        for i, line in enumerate(metadata):
            objects = confident(line, found[i], THRESHOLD, COUNTING_THRESHOLD)
            for fact in (fact for fact in line["include"] if "color" in fact):
                group = {id(d) for d in objects.get(fact["class"], [])[: fact["count"]]}
                wanted += [(i, k) for k, d in enumerate(found[i]) if id(d) in group and (i, k) not in wanted]
        crops = []
        for i, k in wanted:
            visible = np.where(found[i][k].mask[..., None], images[i], np.uint8(OUTSIDE))
            left, top, right, bottom = map(int, found[i][k].box)
            crops.append(self.clip_pixels(Image.fromarray(visible[top:bottom, left:right])))
        for start in range(0, len(crops), 16):
            pixels = torch.stack(crops[start : start + 16]).to(self.clip.device)
            features = F.normalize(self.clip.get_image_features(pixels).pooler_output, dim=-1)
            for (i, k), feature in zip(wanted[start : start + 16], features):
                best = (self.classifier(found[i][k].name) @ feature).argmax().item()
                found[i][k] = found[i][k]._replace(color=GENEVAL.colors[best])
        return found

    def clip_pixels(self, image: Image.Image) -> Tensor:
        """What CLIP sees of a picture [3, side, side], as open_clip makes it: the shorter side resized, the centre cut out
        (halves of a pixel rounded to even)."""
        side, short = self.clip.config.vision_config.image_size, min(image.size)
        size = tuple(side * edge // short for edge in image.size)
        left, top = (round((edge - side) / 2) for edge in size)
        cut = image.resize(size, Image.BICUBIC).crop((left, top, left + side, top + side))
        return torch.from_numpy((np.asarray(cut, np.float32) / 255 - CLIP_MEAN) / CLIP_STD).float().permute(2, 0, 1)

    def classifier(self, name: str) -> Tensor:
        """A unit vector for every color [10, D]: the mean of the normalised embeddings of its COLOR_PROMPTS."""
        if name not in self.classifiers:
            texts = [prompt.format(color=c, name=name) for c in GENEVAL.colors for prompt in COLOR_PROMPTS]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.clip.device)
            vectors = F.normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)  # [30, D]
            self.classifiers[name] = F.normalize(vectors.unflatten(0, (-1, len(COLOR_PROMPTS))).mean(1), dim=-1)
        return self.classifiers[name]


def load_detector(
    detector: str = DETECTOR, clip: str = CLIP, device: str | torch.device = "cpu",
    flags: tuple[str, str] = ("--detector", "--clip"),
) -> Detector:
    """The detector from two folders or hub ids, which the user gave by these flags.

    Raises:
        UserError: where one is not at hand (saying what to download), not of its kind, or lacks a tensor.
    """

    def read(kind: type, name: str, flag: str):
        folder = Path(name)
        if not folder.is_dir():
            if folder.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                raise UserError(f"{flag} {name}: no such folder, and no hub id (owner/name)")
            try:
                folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
            except Exception as error:  # offline, no such repository, no access: a dozen classes
                raise UserError(
                    f"cannot download {name} from the hub ({type(error).__name__}), which scoring pictures needs; "
                    f"download it elsewhere and give its folder: {flag} FOLDER"
                ) from None
        try:
            model, info = kind.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
        except Exception as error:  # of transformers, safetensors and JSON; the user needs the folder and one line
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{flag} {folder}: cannot be read as {kind.__name__} ({reason[0]})") from None
        lacking = sorted(map(str, {*info["missing_keys"], *info["mismatched_keys"]}))
        lacking = [name for name in lacking if not name.startswith("criterion.")]  # of the loss, not needed
        if lacking:
            raise UserError(f"{flag} {folder}: tensor {lacking[0]} is missing or of another shape")
        return model.to(device), folder

    segmenter, folder = read(Mask2FormerForUniversalSegmentation, detector, flags[0])
    names = segmenter.config.id2label
    # The published labels spell some classes otherwise ("aeroplane"), so that only the order of a few can be compared.
    anchors = {0: "person", 5: "bus", 22: "zebra", 53: "pizza", 79: "toothbrush"}
    if len(names) != len(GENEVAL.objects) or any(names[i] not in (name, f"LABEL_{i}") for i, name in anchors.items()):
        raise UserError(f"{flags[0]} {folder}: knows {len(names)} classes, which are not COCO's 80")
    encoder, folder = read(CLIPModel, clip, flags[1])
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # as above
        raise UserError(f"{flags[1]} {folder}: its tokenizer cannot be read ({str(error).splitlines()[0]})") from None
    return Detector(segmenter, encoder, tokenizer)
