"""Tasks with a known answer, and the score of a free-text answer against it.

A task is a text-to-image prompt built from known facts (GenEval's six categories), a question about
the image, and the answer that is right if the image shows what the prompt asked for. No label and no
judge model is needed: `score` reads the answer with a small lexicon and a few binding rules.

    task = draw_task(REAL, numpy.random.default_rng(0))    # never one of GenEval's 553 test prompts
    score("There is a bench and a ball.", task, REAL)      # 1.0 or 0.0; kind="partial" gives a share

How an answer is read: words -> longest lexicon match -> typed tokens (object, color, number, ...) ->
claims (this color on that object, this relation between those two) -> compared with the facts.
The reader is strict, because a policy trained on this score will find every loophole: a negation, a
hedge, an "or", a question mark, an object of the vocabulary that is not in the facts, or a claim that
disagrees with a fact makes the answer worth 0 in both kinds. Words outside the lexicon are ignored.
"""

import json
import re
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
QUESTIONS = {
    "single_object": "What is the main item in this image?",
    "two_object": "What are two items in this image?",
    "counting": "How many items in this image?",
    "colors": "What is the color of the object?",
    "position": "What are two objects and what is the position relationship between them? "
                "Use one sentence.",
    "color_attr": "What are two objects and the colors of the two objects in the image? "
                  "Use one sentence.",
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_DRAWS = 10_000  # draws of one tag before draw_task decides that nothing is left
MAX_WORDS = 60      # an answer of one sentence is far shorter; a longer one has lost its way


@dataclass(frozen=True)
class Vocabulary:
    """The words that tasks are built from, and that answers are read with."""
    objects: tuple[str, ...]
    colors: tuple[str, ...]
    counts: tuple[int, ...]
    relations: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A prompt, its question and known answer; facts are in the form of GenEval's `include`."""
    tag: str
    prompt: str
    question: str
    answer: str
    facts: tuple[dict, ...]


# GenEval spells and orders the 80 COCO classes like this; its suite depends on the order.
GENEVAL = Vocabulary(
    objects=tuple("""
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
    baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork,
    knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake,
    chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
    computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
    scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").strip().split(", ")),
    colors=tuple("red orange yellow green blue purple pink brown black white".split()),
    counts=(2, 3, 4),
    relations=("left of", "right of", "above", "below"))

# Ours avoid names that answers use in passing (plate, mirror), verbs (saw, watch) and kinds of the
# classes above (armchair, duck): each would turn an honest answer into one that names a second object.
OUR_OBJECTS = tuple("""
    rabbit, squirrel, fox, wolf, deer, lion, tiger, monkey, turtle, frog, octopus, crab, dolphin,
    butterfly, snail, camel, pineapple, strawberry, watermelon, lemon, pear, tomato, mushroom, pumpkin,
    avocado, eggplant, pretzel, croissant, hamburger, guitar, piano, violin, trumpet, drum, harp,
    accordion, hammer, screwdriver, axe, shovel, bucket, broom, ladder, paintbrush, wheelbarrow, lamp,
    candle, lantern, pillow, blanket, basket, teapot, frying pan, hourglass, bathtub, pencil, envelope,
    stapler, calculator, telescope, microscope, globe, compass, hat, boot, shirt, scarf, crown, helmet,
    sunglasses, helicopter, tractor, scooter, unicycle, rocket, tent, windmill, lighthouse, mailbox,
    anchor""".replace("\n    ", " ").strip().split(", "))
REAL = replace(GENEVAL, objects=GENEVAL.objects + OUR_OBJECTS)


# ---- tasks ------------------------------------------------------------------------------------------

MEASURES = {"scissors": "pair", "skis": "pair", "sunglasses": "pair", "broccoli": "head"}
IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice",
             "knife": "knives", "wolf": "wolves", "calf": "calves", "scarf": "scarves",
             "tomato": "tomatoes", "sheep": "sheep", "deer": "deer", "scissors": "scissors",
             "skis": "skis", "sunglasses": "sunglasses"}


def article(noun: str) -> str:
    """The noun, with its color if any, as one thing: 'an hourglass', 'a pair of red scissors'."""
    measure = MEASURES.get(noun.split()[-1])
    if measure:
        return f"a {measure} of {noun}"
    silent_h = noun.startswith(("hour", "heir", "honest"))
    sounds_like_you = noun.startswith(("uni", "uku", "use", "euro"))
    return f"an {noun}" if silent_h or noun[0] in "aeiou" and not sounds_like_you else f"a {noun}"


def plural(noun: str) -> str:
    """The noun as one counts it: 'knives', 'computer mice', 'pairs of scissors'."""
    measure = MEASURES.get(noun.split()[-1])
    return f"{measure}s of {noun}" if measure else _plural_word(noun)


def _plural_word(noun: str) -> str:
    head, space, last = noun.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return head + space + last


def _geneval_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _geneval_plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _phrases(facts, one) -> list[str]:
    return [one(" ".join(filter(None, (fact.get("color"), fact["class"])))) for fact in facts]


def _prompt(tag, facts, one, many) -> str:
    phrases = _phrases(facts, one)
    if tag == "counting":
        return f"a photo of {NUMBERS[facts[0]['count']]} {many(facts[0]['class'])}"
    if tag == "position":
        return f"a photo of {phrases[1]} {facts[1]['position'][0]} {phrases[0]}"
    return "a photo of " + " and ".join(phrases)


def _answer(tag, facts) -> str:
    def the(fact):  # the subject of a sentence, with its verb
        return f"{fact['class']} {'are' if MEASURES.get(fact['class']) == 'pair' else 'is'}"

    if tag == "single_object":
        return facts[0]["class"]
    if tag == "two_object":
        return "There is " + " and ".join(_phrases(facts, article))
    if tag == "counting":
        return f"{NUMBERS[facts[0]['count']]} {plural(facts[0]['class'])}"
    if tag == "colors":
        return facts[0]["color"]
    if tag == "position":
        return f"The {the(facts[1])} {facts[1]['position'][0]} the {facts[0]['class']}"
    first, second = facts
    return f"The {the(first)} {first['color']} and the {the(second)} {second['color']}"


def make_task(tag: str, facts: Collection[dict]) -> Task:
    """The task of these facts, with its prompt in correct English."""
    facts = tuple(facts)
    return Task(tag, _prompt(tag, facts, article, plural), QUESTIONS[tag], _answer(tag, facts), facts)


def _draw_facts(tag, vocabulary, rng) -> tuple[dict, ...]:
    """Uniform facts, by the very calls of GenEval's generator, so that geneval_suite can share them."""
    objects = vocabulary.objects
    if tag in ("colors", "color_attr"):  # as in GenEval, nobody is asked to draw a purple person
        objects = tuple(name for name in objects if name != "person")
    if tag in ("single_object", "counting", "colors"):
        facts = [{"class": objects[rng.choice(len(objects))], "count": 1}]
    else:
        facts = [{"class": objects[index], "count": 1}
                 for index in rng.choice(len(objects), size=2, replace=False)]
    if tag == "counting":
        facts[0]["count"] = vocabulary.counts[rng.choice(len(vocabulary.counts))]
    elif tag == "colors":
        facts[0]["color"] = vocabulary.colors[rng.choice(len(vocabulary.colors))]
    elif tag == "position":
        facts.reverse()  # the object drawn first stands right of, above, ... the other one
        facts[1]["position"] = [vocabulary.relations[rng.choice(len(vocabulary.relations))], 0]
    elif tag == "color_attr":
        for fact, index in zip(facts, rng.choice(len(vocabulary.colors), size=2, replace=False)):
            fact["color"] = vocabulary.colors[index]
    return tuple(facts)


def draw_task(vocabulary: Vocabulary, rng: np.random.Generator,
              exclude: Collection[Hashable] = frozenset(), tag: str | None = None) -> Task:
    """A random task that means neither a GenEval test prompt nor one of the task keys in `exclude`."""
    tag = tag or TAGS[rng.integers(len(TAGS))]
    for _ in range(MAX_DRAWS):
        facts = _draw_facts(tag, vocabulary, rng)
        key = _key(tag, facts)
        if key not in exclude and key not in _geneval_keys():
            return make_task(tag, facts)
    raise ValueError(f"no {tag} task left: {MAX_DRAWS} draws were all excluded or GenEval's own")


def task_key(task: Task) -> Hashable:
    """What the task means, whatever its wording: 'A left of B' and 'B right of A' share a key."""
    return _key(task.tag, task.facts)


def _key(tag, facts):
    if tag == "position":
        reference, subject = facts[0]["class"], facts[1]["class"]
        relation = facts[1]["position"][0]
        return (tag, *_canonical(subject, relation, reference))
    return (tag, *sorted((fact["class"], fact["count"], fact.get("color", "")) for fact in facts))


def _canonical(subject, relation, reference):
    """One spelling for each of the two ways to say where two things are."""
    if relation in ("right of", "below"):
        return reference, INVERSE[relation], subject
    return subject, relation, reference


# ---- GenEval's test prompts -------------------------------------------------------------------------

def geneval_suite() -> list[Task]:
    """GenEval's 553 test tasks, drawn anew from its seed; prompts keep its own naive grammar."""
    rng = np.random.default_rng(43)
    names = GENEVAL.objects
    draws = [("single_object", ({"class": names[index], "count": 1},))
             for index in rng.choice(len(names), size=len(names), replace=False)]
    draws += [(tag, _draw_facts(tag, GENEVAL, rng)) for tag in TAGS[1:] for _ in range(100)]
    tasks = {}
    for tag, facts in draws:
        prompt = _prompt(tag, facts, _geneval_article, _geneval_plural)
        tasks.setdefault(prompt, replace(make_task(tag, facts), prompt=prompt))
    return list(tasks.values())


def geneval_metadata(task: Task) -> dict:
    """The task as a line of GenEval's evaluation_metadata.jsonl."""
    line = {"tag": task.tag, "include": list(task.facts)}
    if task.tag == "counting":  # one more of them than asked for is wrong
        line["exclude"] = [{"class": task.facts[0]["class"], "count": task.facts[0]["count"] + 1}]
    return line | {"prompt": task.prompt}


def check_facts(tag, facts, key: str) -> None:
    """Raises ValueError saying what is wrong with a prompt's tag, or with the facts that stand under `key`."""
    if tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}: known are {', '.join(TAGS)}")
    wanted = {"colors": {"color"}, "color_attr": {"color"}}.get(tag, set())
    if not isinstance(facts, list) or len(facts) != (2 if tag in ("two_object", "position", "color_attr") else 1):
        raise ValueError(f"a {tag} prompt cannot have these objects under {key}: {facts}")
    for i, fact in enumerate(facts):
        keys = {"class", "count"} | wanted | ({"position"} if tag == "position" and i == 1 else set())
        if not isinstance(fact, dict) or fact.keys() != keys:
            raise ValueError(f"{fact} under {key} should have the keys {', '.join(sorted(keys))}")
        position = fact.get("position", ["above", 0])
        if not isinstance(fact["class"], str) or not isinstance(fact["count"], int) or fact["count"] < 1:
            raise ValueError(f"{fact} under {key}: class is a name, count a number of at least 1")
        if not isinstance(position, list) or len(position) != 2 or position[0] not in [*INVERSE] or position[1] != 0:
            raise ValueError(f"position {position} is not one of {', '.join(INVERSE)} and 0")
    if not 1 <= facts[0]["count"] < len(NUMBERS):
        raise ValueError(f"count {facts[0]['count']} has no number word here")


def task_of(metadata: dict) -> Task:
    """The task of a line of metadata, whoever wrote it: geneval_metadata backwards.

    Raises:
        ValueError: saying what in the line is not as it should be.
    """
    tag, facts = metadata.get("tag"), metadata.get("include")
    check_facts(tag, facts, "include")
    if not isinstance(metadata.get("prompt"), str):
        raise ValueError("no prompt")
    excluded = metadata.get("exclude", [])
    for fact in excluded if isinstance(excluded, list) else [excluded]:
        if not isinstance(fact, dict) or not isinstance(fact.get("class"), str) or type(fact.get("count")) is not int:
            raise ValueError(f"{fact} under exclude needs a class and a whole count")
    return replace(make_task(tag, facts), prompt=metadata["prompt"])


@lru_cache(maxsize=None)
def _geneval_keys() -> frozenset:
    return frozenset(task_key(task) for task in geneval_suite())


def is_geneval_prompt(prompt: str, objects: Collection[str] = ()) -> bool:
    """Whether the text asks for what one of the 553 test prompts asks for, in whatever wording.

    Words that are neither in REAL nor among `objects` are ignored, so a doubtful prompt counts as a test prompt.
    """
    tokens = _read(prompt, replace(REAL, objects=_with(REAL.objects, objects)))
    names = list(dict.fromkeys(token.value for token in tokens if token.kind == "object"))
    counts = {count for count, _ in _numbers(tokens) if count > 1}
    colors = _colors_of(tokens)
    relations = _relations(tokens, names) if len(names) == 2 else set()
    facts = [{"class": name, "count": 1} for name in names]
    for fact in facts:
        if len(colors.get(fact["class"], ())) == 1:
            fact["color"] = min(colors[fact["class"]])
    claimed = (len(names), len(counts), len(colors), len(relations))
    tag = {(1, 0, 0, 0): "single_object", (2, 0, 0, 0): "two_object", (1, 1, 0, 0): "counting",
           (1, 0, 1, 0): "colors", (2, 0, 0, 1): "position", (2, 0, 2, 0): "color_attr"}.get(claimed)
    if tag == "position":
        return (tag, *relations.pop()) in _geneval_keys()
    if tag == "counting":
        facts[0]["count"] = counts.pop()
    return tag is not None and _key(tag, facts) in _geneval_keys()


# ---- the user's own prompts -------------------------------------------------------------------------

def read_tasks(data: bytes, vocabulary: Vocabulary, exclude: Collection[Hashable] = frozenset(),
               check: Callable[[Task], None] = lambda task: None) -> tuple[list[Task], Vocabulary]:
    """Tasks from JSON lines, and the vocabulary with the objects and colors that they add to it. A line:

        {"tag": "position", "prompt": "A dog sits right of a kayak.",
         "facts": [{"class": "kayak", "count": 1},
                   {"class": "dog", "count": 1, "position": ["right of", 0]}],
         "question": "Where is the dog?", "answer": "The dog is right of the kayak"}

    `tag` is one of TAGS and says which facts are asked for; `facts` are objects as under GenEval's `include`: a `color`
    for colors and color_attr, a `position` for the second object of position, relative to the first. `question` and
    `answer` may be left out, and are then the tag's question and the facts' answer. Every answer must be right by
    `score`, and no task may be one of GenEval's or have a key in `exclude`. `check` raises ValueError on one more fault.

    Raises:
        ValueError: that names every faulty line.
    """
    rows, faults = [], []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            try:
                rows.append((number, _own_task(line)))
            except (ValueError, TypeError, RecursionError) as error:
                faults.append((number, error))
    facts = [fact for _, task in rows for fact in task.facts]
    vocabulary = replace(
        vocabulary, objects=_with(vocabulary.objects, (fact["class"] for fact in facts)),
        colors=_with(vocabulary.colors, (fact["color"] for fact in facts if "color" in fact)))
    for number, task in rows:
        try:
            key = task_key(task)
            if key in exclude or key in _geneval_keys() or is_geneval_prompt(task.prompt, vocabulary.objects):
                raise ValueError("asks for what a test prompt asks for")
            if score(task.answer, task, vocabulary) != 1:
                raise ValueError(f"its own answer {task.answer!r} does not state its facts, and would earn nothing")
            check(task)
        except ValueError as error:
            faults.append((number, error))
    if faults:
        faults.sort(key=lambda fault: fault[0])
        lines = [f"line {number}: {' '.join(str(error).split())[:300]}" for number, error in faults]
        raise ValueError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} faults", *lines]))
    if not rows:
        raise ValueError("holds no prompts")
    return [task for _, task in rows], vocabulary


def _own_task(line: bytes) -> Task:
    """The task of one line. Raises ValueError saying what is wrong with it."""
    entry = json.loads(line.decode())
    if not isinstance(entry, dict):
        raise ValueError("is no JSON object")
    if unknown := entry.keys() - {"tag", "prompt", "question", "answer", "facts"}:
        raise ValueError(f"unknown key {min(unknown)!r}: known are tag, prompt, question, answer, facts")
    check_facts(entry.get("tag"), entry.get("facts"), "facts")
    for fact in entry["facts"]:
        for name in filter(None, (fact["class"], fact.get("color", "red"))):
            if not re.fullmatch(r"[a-z]+( [a-z]+)*", name if isinstance(name, str) else ""):
                raise ValueError(f"{name!r} is not a name in small letters, words separated by a space")
    task = make_task(entry["tag"], entry["facts"])
    texts = {key: entry[key] for key in ("prompt", "question", "answer") if key in entry}
    for key, text in {"prompt": None, **texts}.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key} is no text" if key in texts else f"has no {key}")
    return replace(task, **texts)


def _with(known: tuple[str, ...], more) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*known, *more)))


# ---- reading an answer: words -> typed tokens -------------------------------------------------------

class Token(NamedTuple):
    kind: str  # object color number relation side article copula join stop pair refuse other
    value: str | int


# Other names of the objects; each is also known in its plural.
ALIASES = {name: tuple(aliases.split(", ")) for name, aliases in {
    "person": "man, woman, boy, girl, child, lady, guy, human", "bicycle": "bike, mountain bike",
    "car": "automobile, sedan, suv", "motorcycle": "motorbike, motor bike, motor cycle",
    "airplane": "plane, aeroplane, aircraft, jet", "train": "locomotive",
    "truck": "lorry, pickup, pickup truck, fire truck", "boat": "ship, sailboat, sail boat",
    "traffic light": "traffic signal, stoplight", "fire hydrant": "hydrant", "bench": "park bench",
    "parking meter": "meter", "bird": "duck, parrot, seagull, pigeon", "cat": "kitten",
    "dog": "puppy", "horse": "pony, foal", "sheep": "lamb", "cow": "bull, calf, cattle",
    "bear": "polar bear, grizzly bear", "backpack": "rucksack, back pack", "handbag": "purse",
    "tie": "necktie, bow tie", "suitcase": "luggage", "skis": "ski", "snowboard": "snow board",
    "sports ball": "ball, soccer ball, basketball, football, volleyball, tennis ball, baseball",
    "baseball bat": "bat", "baseball glove": "glove, baseball mitt", "surfboard": "surf board",
    "skateboard": "skate board", "tennis racket": "racket, tennis racquet, racquet",
    "wine glass": "glass of wine, glasses of wine, wineglass", "cup": "mug, coffee cup, teacup",
    "hot dog": "hotdog", "donut": "doughnut", "chair": "armchair", "couch": "sofa",
    "potted plant": "plant, houseplant, house plant", "dining table": "table, dinner table",
    "tv": "television, tv set, television set", "laptop": "laptop computer, notebook computer",
    "computer mouse": "mouse", "computer keyboard": "keyboard",
    "tv remote": "remote, remote control, tv remote control, television remote",
    "cell phone": "phone, cellphone, mobile phone, mobile, smartphone, smart phone, telephone",
    "microwave": "microwave oven", "oven": "stove", "refrigerator": "fridge", "scissors": "scissor",
    "teddy bear": "teddy, stuffed bear, toy bear", "toothbrush": "tooth brush",
    "hair drier": "hair dryer, hairdryer, hairdrier, blow dryer, dryer", "clock": "wall clock",
    "rabbit": "bunny", "turtle": "tortoise", "eggplant": "aubergine", "axe": "ax",
    "hamburger": "burger, cheeseburger", "frying pan": "pan, skillet", "bathtub": "tub",
    "mailbox": "mail box, letterbox", "shirt": "t shirt, tshirt",
    "circle": "disk, disc, dot", "cross": "plus, plus sign", "diamond": "rhombus", "ring": "hoop",
}.items()}
COLOR_ALIASES = {"grey": "gray", "violet": "purple", "lavender": "purple", "crimson": "red",
                 "scarlet": "red", "maroon": "red", "navy": "blue", "golden": "gold",
                 "jet black": "black", "lemon yellow": "yellow"}
# Known as colors in every vocabulary, so that "red and silver" never passes for red.
MORE_COLORS = tuple("red orange yellow green blue purple pink brown black white gray gold silver beige "
                    "tan cyan magenta turquoise teal rainbow multicolored".split())
# An underscore stands for the space inside a phrase.
FUNCTION_WORDS = {
    "refuse": "no not never none nothing neither nor without cannot cant isnt arent doesnt dont lacks "
              "lacking absent missing instead except unlike false wrong or either maybe perhaps possibly "
              "probably might may could if unless unsure unclear approximately at_least at_most up_to "
              "more_than less_than fewer_than rather_than other_than / ?",
    "join": "and with while but & ; ) ,", "stop": ". !", "pair": "pair_of pairs_of pair",
    "copula": "is s are was were : = (", "article": "a an the",
    # Phrases whose words would mean something else on their own; shades that change no color.
    "other": "there_is there_are that_is_right that_s_right all_right right_next_to right_beside right_in",
    "skip": "light dark bright deep pale vivid very solid colored coloured"}
PLACES = {"above": "above, over, on top of, on the top of, atop, higher than, right above",
          "below": "below, under, beneath, underneath, lower than, right below, right under"}
LONGEST = 6  # words of the longest phrase, "right hand side of this photograph"
FRAMES = "image", "picture", "photo", "photograph", "frame", "scene"


@lru_cache(maxsize=None)
def _lexicon(vocabulary: Vocabulary) -> dict[tuple[str, ...], Token]:
    """Every known phrase, as its words. Later entries win, and the vocabulary's own names come last."""
    entries = {}
    for kind, phrases in FUNCTION_WORDS.items():
        entries |= {word.replace("_", " "): Token(kind, word) for word in phrases.split()}
    numbers = [*enumerate(NUMBERS), (1, "single"), (1, "another"), (2, "couple of"), (12, "dozen"),
               (11, "eleven"), (12, "twelve"), (20, "twenty"), (100, "hundred")]
    entries |= {word: Token("number", number) for number, word in numbers}
    entries |= _place_entries()
    colors = {name: name for name in MORE_COLORS + vocabulary.colors} | COLOR_ALIASES
    entries |= {word: Token("color", color) for word, color in colors.items()}
    for names in ({a: n for n in vocabulary.objects for a in (*ALIASES.get(n, ()), n.replace(" ", ""))},
                  {name: name for name in vocabulary.objects}):
        for word, name in names.items():
            ambiguous = word in vocabulary.colors
            entries[word] = Token("ambiguous" if ambiguous else "object", name)
            for form in (_plural_word(word), _geneval_plural(word)):
                entries.setdefault(form, Token("object", name))
    return {tuple(phrase.split()): token for phrase, token in entries.items()}


def _place_entries() -> dict[str, Token]:
    """'left of' relates two objects; 'on the left (side of the image)' places one in the frame."""
    places = {phrase: relation for relation, phrases in PLACES.items() for phrase in phrases.split(", ")}
    entries = {"the top": Token("side", "above"), "the bottom": Token("side", "below")}
    for side in ("left", "right"):
        for phrase in (side, f"{side} side", f"{side} hand side"):
            places[f"{phrase} of"] = f"{side} of"
            frames = [f"{phrase} of {the} {frame}" for the in ("the", "this") for frame in FRAMES]
            entries |= dict.fromkeys([phrase, *frames], Token("side", f"{side} of"))
        # Where a thing looks is not where it is, and what 'its' is stays open.
        unread = [f"{verb} {to}{side}" for verb in ("pointing", "facing", "looking")
                  for to in ("", "to the ")]
        unread += [f"{owner} {side}" for owner in ("s", "its", "his", "her", "their")]
        entries |= dict.fromkeys(unread, Token("other", side))
    for phrase, relation in places.items():
        entries[phrase] = Token("relation", relation)
        for pronoun in ("it", "him", "her", "them", "each other"):
            entries[f"{phrase} {pronoun}"] = Token("other", pronoun)
    return entries


def _words(text: str) -> list[str]:
    text = text.lower().replace("’", "'").replace("n't", " not").replace("\n", " . ")
    text = re.sub(r"\s[-–—]\s|—", " : ", text)  # "apple - black" says that the apple is black
    return re.findall(r"[a-z]+|\d+|[.,;:!?/()=&]", text)


def _read(text: str, vocabulary: Vocabulary, tag: str = "") -> list[Token]:
    """The text as typed tokens, longest phrase first: a hot dog is no dog, a teddy bear no bear."""
    words, lexicon, tokens = _words(text), _lexicon(vocabulary), []
    while words:
        size = next((size for size in range(LONGEST, 1, -1) if tuple(words[:size]) in lexicon), 1)
        token = lexicon.get(tuple(words[:size]))
        if token is None and words[0].isdigit():
            token = Token("number", int(words[0][:9]))  # Python refuses to parse endless numbers
        tokens.append(token or Token("other", words[0]))
        del words[:size]
    tokens = [token for token in tokens if token.kind != "skip"]
    for index in reversed(range(len(tokens))):  # from the right: a word's reading hangs on the next one
        if tokens[index].kind == "ambiguous":
            kind = "color" if _is_color(tokens[:index], tokens[index + 1:], tag) else "object"
            tokens[index] = Token(kind, tokens[index].value)
    return _settle_pairs(tokens)


def _is_color(before: list[Token], after: list[Token], tag: str) -> bool:
    """Whether 'orange' between these tokens is the color rather than the fruit."""
    following = next((token for token in after if token.kind != "other"), None)
    if following and following.kind == "object" or after and after[0].value in ("color", "colour"):
        return True  # an orange (tabby) cat
    if [token.kind for token in after[:2]] == ["join", "color"]:
        return True  # orange and white
    if before and before[-1].kind in ("article", "number", "color"):
        return False  # an orange, two orange, a purple orange
    if after and after[0].kind == "copula":
        return False  # orange is ...
    if before and before[-1].kind == "copula" and _objects_beside(before, len(before), -1):
        return True  # the cat is orange
    return tag in ("colors", "color_attr")  # a bare word: the question decides


def _settle_pairs(tokens: list[Token]) -> list[Token]:
    """'A pair of scissors' is one thing, 'a pair of dogs' is two."""
    settled = []
    for index, token in enumerate(tokens):
        if token.kind == "pair":
            noun = next((after for after in tokens[index + 1:] if after.kind != "color"), token)
            if MEASURES.get(noun.value) == "pair":
                continue
            token = Token("number", 2)
        settled.append(token)
    return settled


# ---- reading an answer: tokens -> claims ------------------------------------------------------------

def _objects_beside(tokens: list[Token], index: int, step: int, until=("stop",)) -> list[str]:
    """The objects before (step -1) or after (step 1) a token in its sentence, nearest first."""
    names = []
    for token in tokens[index + 1:] if step > 0 else reversed(tokens[:index]):
        if token.kind in until:
            break
        if token.kind == "object" and token.value not in names:
            names.append(token.value)
    return names


def _numbers(tokens: list[Token]) -> list[tuple[int, str | None]]:
    """Each number with the object that it counts, if any; 'a clock' is one clock."""
    numbers = []
    for index, token in enumerate(tokens):
        after = [other for other in tokens[index + 1:] if other.kind != "color"][:1]
        noun = after[0].value if after and after[0].kind == "object" else None
        if token.kind == "number":
            follows = tokens[index + 1].kind if index + 1 < len(tokens) else "stop"
            pronoun = token.value == 1 and follows not in ("object", "number", "join", "stop")
            if noun or not pronoun:  # 'one on the left' counts nothing
                numbers.append((token.value, noun))
        elif noun and token in (Token("article", "a"), Token("article", "an")):
            numbers.append((1, noun))
    return numbers


def _colors_of(tokens: list[Token]) -> dict[str, set[str]]:
    """The colors that the text gives to each object."""
    found, index = {}, 0
    while index < len(tokens):
        start, index = index, index + 1
        if tokens[start].kind != "color":
            continue
        colors, end = {tokens[start].value}, index
        while end < len(tokens) and tokens[end].kind in ("color", "join"):  # 'red, white and blue'
            if tokens[end].kind == "color":
                colors.add(tokens[end].value)
                index = end + 1
            end += 1
        for name in _bearers(tokens, start, index):
            found.setdefault(name, set()).update(colors)
    return found


def _bearers(tokens: list[Token], start: int, end: int) -> list[str]:
    """The objects that the colors at start:end belong to."""
    if start and tokens[start - 1] == Token("copula", "are"):  # 'A and B are red'
        subjects = _objects_beside(tokens, start - 1, -1, until=("stop", "copula"))
    elif start and tokens[start - 1].kind == "copula":  # 'A is red', 'A: red', 'A (red)'
        subjects = _objects_beside(tokens, start - 1, -1)[:1]
    else:
        subjects = []
    if subjects:
        return subjects
    for token in tokens[end:]:  # 'a red wooden bench'
        if token.kind == "object":
            return [token.value]
        if token.kind != "other":
            break
    for token in reversed(tokens[:start]):  # 'a bench in red', 'the bench looks red'
        if token.kind == "object":
            return [token.value]
        if token.kind not in ("other", "article", "copula"):
            break
    return []


def _relations(tokens: list[Token], pair: Collection[str]) -> set[tuple]:
    """What the text says about where two objects are, as canonical (subject, relation, reference)."""
    claims = set()
    for index, token in enumerate(tokens):
        if token.kind not in ("relation", "side"):
            continue
        before, after = _objects_beside(tokens, index, -1), _objects_beside(tokens, index, 1)
        fronted = _opens_clause(tokens, index)
        if token.kind == "side":  # 'on the left is a dog', 'a dog on the left'
            for subject in (after if fronted else before)[:1]:
                claims |= {_canonical(subject, token.value, name) for name in pair if name != subject}
        elif fronted and len(after) > 1:  # 'left of the cat is a dog'
            claims.add(_canonical(after[1], token.value, after[0]))
        elif before and after:  # 'the dog is left of the cat'
            claims.add(_canonical(before[0], token.value, after[0]))
    return claims


def _opens_clause(tokens: list[Token], index: int) -> bool:
    """Whether a place comes before what it is the place of."""
    for token in reversed(tokens[:index]):
        if token.kind not in ("other", "article"):
            return token.kind in ("join", "stop")
    return True


# ---- the score --------------------------------------------------------------------------------------

def _stated_facts(tokens: list[Token], task: Task) -> list[bool]:
    """For each fact that the question asks for, whether it is stated; empty on any contradiction."""
    wanted = [fact["class"] for fact in task.facts]
    named = {token.value for token in tokens if token.kind == "object"}
    colors = {token.value for token in tokens if token.kind == "color"}
    numbers = _numbers(tokens)
    if named - set(wanted) or any(token.kind == "refuse" for token in tokens):
        return []
    if task.tag == "counting":
        return [True] if {count for count, _ in numbers} == {task.facts[0]["count"]} else []
    if any(noun and count != 1 for count, noun in numbers):
        return []
    if task.tag == "colors":
        return [True] if colors == {task.facts[0]["color"]} else []
    stated = [name in named for name in wanted]
    if task.tag == "position":
        claims, truth = _relations(tokens, wanted), task_key(task)[1:]
        return [] if claims - {truth} else stated + [truth in claims]
    if task.tag == "color_attr":
        given = _colors_of(tokens)
        truth = {fact["class"]: {fact["color"]} for fact in task.facts}
        if colors - set.union(*truth.values()) or any(given[name] != truth[name] for name in given):
            return []
        stated += [name in given for name in wanted]
    return stated


def _is_endless(text: str) -> bool:
    """Far too long, or one phrase three times in a row."""
    words = [word for word in _words(text) if word.isalnum() and word not in ("a", "an", "the", "and")]
    return len(words) > MAX_WORDS or any(
        words[at:at + size] == words[at + size:at + 2 * size] == words[at + 2 * size:at + 3 * size]
        for size in range(1, len(words) // 3 + 1) for at in range(len(words) - 3 * size + 1))


def score(answer: str, task: Task, vocabulary: Vocabulary,
          kind: Literal["exact", "partial"] = "exact") -> float:
    """How right the answer is: `exact` is 1 or 0, `partial` the share of the asked facts it states.

    Asked for are: the object (single_object), each object (two_object), the number (counting), the
    color (colors), each object and their relation (position), each object and each color on its object
    (color_attr). Both kinds are 0 on a contradiction, so listing words never pays.
    """
    if kind not in ("exact", "partial"):
        raise ValueError(f"kind must be 'exact' or 'partial', not {kind!r}")
    if _is_endless(answer):
        return 0.0
    stated = _stated_facts(_read(answer, vocabulary, task.tag), task)
    share = sum(stated) / max(len(stated), 1)
    return share if kind == "partial" else float(share == 1)
