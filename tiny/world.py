"""The shapes world: scenes of coloured shapes, their renderer, and a detector that never learned anything.

A scene is a 3 x 3 grid of cells on a dark ground; an object is one of twelve shapes in one of six colours,
seven pixels wide, in a cell of its own. Every prompt of `reward.py`'s six categories can be drawn in it, and
`detect` reads the objects back from pixels alone (nearest palette colour, connected components, template
overlap), so that a picture is judged by something that took no part in the training. Only numpy; no model is
involved.
"""

import functools

import numpy as np

from reward import TAGS, Task, Vocabulary, draw_task, task_key

CELL, GRID = 8, 3
SIZE = CELL * GRID  # pixels a side
GROUND = (32, 32, 40)
PALETTE = {
    "red": (224, 48, 48),
    "green": (48, 192, 72),
    "blue": (56, 96, 240),
    "yellow": (240, 216, 56),
    "purple": (168, 64, 200),
    "white": (244, 244, 244),
}
GLYPHS = {  # seven by seven pixels each
    "circle": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "square": ("#######",) * 7,
    "triangle": ("...#...", "...#...", "..###..", "..###..", ".#####.", ".#####.", "#######"),
    "cross": ("##...##", "###.###", ".#####.", "..###..", ".#####.", "###.###", "##...##"),
    "ring": ("..###..", ".#...#.", "#.....#", "#.....#", "#.....#", ".#...#.", "..###.."),
    "diamond": ("...#...", "..###..", ".#####.", "#######", ".#####.", "..###..", "...#..."),
    "bar": (".......", ".......", "#######", "#######", "#######", ".......", "......."),
    "pillar": ("..###..",) * 7,
    "frame": ("#######", "#.....#", "#.....#", "#.....#", "#.....#", "#.....#", "#######"),
    "arch": ("..###..", ".#####.", "#######", "##...##", "##...##", "##...##", "##...##"),
    "hook": ("....##.", "....##.", "....##.", "....##.", "##..##.", "######.", ".####.."),
    "star": ("...#...", "...#...", "#######", ".#####.", "..###..", ".##.##.", "##...##"),
}
STEP = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (row, column)
VOCABULARY = Vocabulary(tuple(GLYPHS), tuple(PALETTE), (2, 3, 4, 5), tuple(STEP))
TEMPLATES = {name: np.array([[c == "#" for c in row] for row in rows]) for name, rows in GLYPHS.items()}
PLACES = [((y, 2 - y), (x, 2 - x)) for y in range(3) for x in range(3)]  # of seven pixels within nine
MOVED = np.array([[np.pad(t, place).ravel() for place in PLACES] for t in TEMPLATES.values()]).astype(int)
MIN_OVERLAP = 0.72  # intersection over union from which a component counts as an object
MIN_PIXELS = 9


@functools.cache
def different_tasks() -> dict[str, list[Task]]:
    """Of every category tasks that differ, the same in every run, all of those that have few."""
    rng, suite = np.random.default_rng(43), {}
    for tag in TAGS:
        tasks = {}
        for _ in range(2000):  # enough to meet every task of the small categories
            task = draw_task(VOCABULARY, rng, tag=tag)
            tasks.setdefault(task_key(task), task)
        suite[tag] = list(tasks.values())
    return suite


def held_out_tasks(part: str = "validation", each: int = 20) -> list[Task]:
    """Half of the world's held-out tasks, the same in every run: `each` entries a category. Settings are
    chosen on "validation", results reported on "test"; they share no task, and training draws none of either.
    (Their scenes do occur in pretraining, as a real model's contains what GenEval asks for.) A category with
    few tasks gives each half a quarter of them, at least four, and asks them repeatedly."""
    suite = []
    for tasks in different_tasks().values():
        size = min(each, max(4, len(tasks) // 4))
        start = {"validation": 0, "test": size}[part]
        suite += (tasks[start : start + size] * each)[:each]
    return suite


def paint(objects: list[tuple[str, str, int]]) -> np.ndarray:
    """A picture [24, 24, 3] uint8 of (shape, colour, cell) triples, cells counted in reading order."""
    image = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    image[:] = GROUND
    for shape, color, cell in objects:
        top, left = CELL * (cell // GRID), CELL * (cell % GRID)
        patch = image[top : top + 7, left : left + 7]
        patch[TEMPLATES[shape]] = PALETTE[color]
    return image


def layout(task: Task, rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """(shape, colour, cell) triples of which the task's facts are true, what it leaves open being random."""
    cells = rng.permutation(GRID * GRID)
    if task.tag == "position":  # in one row or column, or a second relation would hold too
        down, right = STEP[task.facts[1]["position"][0]]
        pairs = [
            (r * GRID + c, (r + k * down) * GRID + c + k * right)
            for r in range(GRID)
            for c in range(GRID)
            for k in (1, 2)
            if 0 <= r + k * down < GRID and 0 <= c + k * right < GRID
        ]
        cells = pairs[rng.integers(len(pairs))]
    names = [(fact["class"], fact.get("color")) for fact in task.facts for _ in range(fact["count"])]
    colors = list(PALETTE)
    return [(n, c or colors[rng.integers(len(colors))], int(cell)) for (n, c), cell in zip(names, cells)]


def render(task: Task, rng: np.random.Generator) -> np.ndarray:
    """A picture [24, 24, 3] uint8 that the task's prompt describes."""
    return paint(layout(task, rng))


def components(colors: np.ndarray) -> np.ndarray:
    """Labels of 8-connected regions of equal colour: [B, H, W] ints -> [B, H, W] ints, unique in an image."""
    B, H, W = colors.shape
    labels = np.broadcast_to(np.arange(H * W).reshape(1, H, W), colors.shape).copy()
    whole, head, tail = slice(None), slice(None, -1), slice(1, None)
    neighbours = [((whole, head), (whole, tail)), ((head, whole), (tail, whole)),
                  ((head, head), (tail, tail)), ((head, tail), (tail, head))]
    while True:  # the smallest label of a region floods it
        before = labels.copy()
        for (rows, columns), (near_rows, near_columns) in neighbours:
            a, b = (whole, rows, columns), (whole, near_rows, near_columns)
            low = np.minimum(labels[a], labels[b])
            same = colors[a] == colors[b]
            labels[a] = np.where(same, low, labels[a])
            labels[b] = np.where(same, low, labels[b])
        if (labels == before).all():
            return labels


def overlaps(mask: np.ndarray) -> dict[str, float]:
    """Intersection over union of a component [H, W] and each shape, at the best of nine positions around the
    common centre: the shape moves by up to a pixel each way in a window of nine pixels around it."""
    rows, columns = np.nonzero(mask)
    top, left = (rows.min() + rows.max()) // 2 - 4, (columns.min() + columns.max()) // 2 - 4
    window = np.pad(mask, 4)[top + 4 : top + 13, left + 4 : left + 13].ravel()
    both = MOVED @ window  # [shapes, 9]
    return dict(zip(TEMPLATES, (both / (len(rows) + MOVED.sum(-1) - both)).max(1)))


def detect(images: np.ndarray) -> list[list[dict]]:
    """The objects in pictures [B, 24, 24, 3] uint8, as the fields of `evaluate.Detection`: class by best
    template overlap (which is the score), colour by the palette, box (left, top, right, bottom) in pixels."""
    palette = np.array([*PALETTE.values(), GROUND])
    colors = ((images[..., None, :].astype(int) - palette) ** 2).sum(-1).argmin(-1)  # [B, H, W]
    found = []
    for color, label in zip(colors, components(colors)):
        detections = []
        for value in np.unique(label[color < len(PALETTE)]):
            mask = label == value
            if mask.sum() < MIN_PIXELS:
                continue
            scores = overlaps(mask)
            shape = max(scores, key=scores.get)
            if scores[shape] >= MIN_OVERLAP:
                rows, columns = np.nonzero(mask)
                box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
                fields = {"name": shape, "score": float(scores[shape]), "box": tuple(map(float, box))}
                detections.append({**fields, "mask": mask, "color": list(PALETTE)[color[mask][0]]})
        found.append(detections)
    return found
