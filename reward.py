"""Tasks with a known answer, and the score of a free-text answer against it.

A task is a text-to-image prompt built from known facts (GenEval's six categories), a question about the
image, and the answer that is right if the image shows what the prompt asked for. No label and no judge model
is needed: `score` reads the answer with a small lexicon and a few binding rules.

    task = draw_task(REAL, numpy.random.default_rng(0))    # never one of GenEval's 553 test prompts
    score("There is a bench and a ball.", task, REAL)      # 1.0 or 0.0; kind="partial" gives a share

How an answer is read: words -> longest lexicon match -> typed tokens (object, color, number, ...), each as
what it is where it stands -> claims (this color on that object, this relation between those two) -> compared
with the facts. The reader is strict, because a policy trained on this score will find every loophole:

- A negation, a hedge, a time that is not now, an "or", a question mark, an object of the vocabulary that is
  not in the facts, or a claim that disagrees with a fact makes the answer worth 0 in both kinds. Denied may
  only be what nobody asked for: "not gray but pink", "yellow, not orange", "a dog without a collar".
- A claim is read from words that are understood. What an unknown word takes part in is no claim, neither for
  nor against: a "dog house", "the dog's collar" and "the leg of a dog" are no dogs, "two wheels" count
  nothing that is asked for, in "red hair" and "the wall is red" red is the color of something else, and in
  "walking to the left" left is no place. Unknown words that bind nothing are ignored.
- Parts must add up to what is said of the whole: "three people: two men and a woman".
"""

import json
import re
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from math import prod
from typing import Literal

import numpy as np

QUESTIONS = {
    "single_object": "What is the main item in this image?",
    "two_object": "What are two items in this image?",
    "counting": "How many items in this image?",
    "colors": "What is the color of the object?",
    "position": "What are two objects and what is the position relationship between them? Use one sentence.",
    "color_attr": "What are two objects and the colors of the two objects in the image? Use one sentence.",
}
TAGS = tuple(QUESTIONS)  # in GenEval's order, on which its suite depends
# What each fact of a task tells besides its class and count.
DETAILS = {"single_object": [set()], "two_object": [set(), set()], "counting": [set()], "colors": [{"color"}],
           "position": [set(), {"position"}], "color_attr": [{"color"}, {"color"}]}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MAX_DRAWS = 10_000  # draws of one tag before draw_task decides that nothing is left
MAX_WORDS = 60  # an answer of one sentence is far shorter; a longer one has lost its way


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
    objects=tuple(re.split(r",\s+", """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
    cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush""".strip())),
    colors=tuple("red orange yellow green blue purple pink brown black white".split()),
    counts=(2, 3, 4),
    relations=("left of", "right of", "above", "below"))
# Ours avoid names that answers use in passing (plate, mirror), verbs (saw, watch) and kinds of the classes
# above (armchair, duck): each would turn an honest answer into one that names a second object.
OUR_OBJECTS = tuple(re.split(r",\s+", """
    rabbit, squirrel, fox, wolf, deer, lion, tiger, monkey, turtle, frog, octopus, crab, dolphin, butterfly,
    snail, camel, pineapple, strawberry, watermelon, lemon, pear, tomato, mushroom, pumpkin, avocado,
    eggplant, pretzel, croissant, hamburger, guitar, piano, violin, trumpet, drum, harp, accordion, hammer,
    screwdriver, axe, shovel, bucket, broom, ladder, paintbrush, wheelbarrow, lamp, candle, lantern, pillow,
    blanket, basket, teapot, frying pan, hourglass, bathtub, pencil, envelope, stapler, calculator, telescope,
    microscope, globe, compass, hat, boot, shirt, scarf, crown, helmet, sunglasses, helicopter, tractor,
    scooter, unicycle, rocket, tent, windmill, lighthouse, mailbox, anchor""".strip()))
REAL = replace(GENEVAL, objects=GENEVAL.objects + OUR_OBJECTS)


# ---- tasks -------------------------------------------------------------------------------------------------

MEASURES = {"scissors": "pair", "skis": "pair", "sunglasses": "pair", "broccoli": "head"}
IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "mouse": "mice",
             "knife": "knives", "wolf": "wolves", "calf": "calves", "scarf": "scarves", "tomato": "tomatoes",
             "sheep": "sheep", "deer": "deer", "scissors": "scissors", "skis": "skis",
             "sunglasses": "sunglasses"}


def article(noun: str) -> str:
    """The noun, with its color if any, as one thing: 'an hourglass', 'a pair of red scissors'."""
    measure = MEASURES.get(noun.split()[-1])
    return f"a {measure} of {noun}" if measure else _article_word(noun)


def _article_word(noun: str) -> str:
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
        return head + space + IRREGULAR[last]
    if last.endswith("y") and last[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _naive_plural(noun: str) -> str:
    """As GenEval writes it: 'sheeps', 'knifes'."""
    return noun + ("es" if noun.endswith("s") else "s")


def _description(tag: str, facts: Sequence[dict], naive: bool = False) -> str:
    """What a picture of the facts shows, in correct English or in the naive one of GenEval."""
    one, many = (_article_word, _naive_plural) if naive else (article, plural)
    phrases = [one(" ".join(filter(None, (fact.get("color"), fact["class"])))) for fact in facts]
    if tag == "counting":
        return f"{NUMBERS[facts[0]['count']]} {many(facts[0]['class'])}"
    if tag == "position":
        return f"{phrases[1]} {facts[1]['position'][0]} {phrases[0]}"
    return " and ".join(phrases)


def make_task(tag: str, facts: Collection[dict]) -> Task:
    """The task of these facts, with its prompt in correct English."""
    facts = tuple(facts)
    first, last, shown = facts[0], facts[-1], _description(tag, facts)
    names = [fact["class"] for fact in facts]
    subjects = [f"{name} {'are' if MEASURES.get(name) == 'pair' else 'is'}" for name in names]
    match tag:
        case "single_object":
            answer = names[0]
        case "two_object":
            answer = f"There is {shown}"
        case "counting":
            answer = shown
        case "colors":
            answer = first["color"]
        case "position":
            answer = f"The {subjects[1]} {last['position'][0]} the {names[0]}"
        case _:
            answer = f"The {subjects[0]} {first['color']} and the {subjects[1]} {last['color']}"
    return Task(tag, f"a photo of {shown}", QUESTIONS[tag], answer, facts)


def _pick(values: Sequence, size: int, rng: np.random.Generator) -> list:
    """Different values, uniformly, by the very calls of GenEval's generator: its suite depends on them."""
    picked = [rng.choice(len(values))] if size == 1 else rng.choice(len(values), size=size, replace=False)
    return [values[index] for index in picked]


def _draw_facts(tag: str, vocabulary: Vocabulary, rng: np.random.Generator) -> tuple[dict, ...]:
    objects, size = vocabulary.objects, len(DETAILS[tag])
    if tag in ("colors", "color_attr"):  # as in GenEval, nobody is asked to draw a purple person
        objects = tuple(name for name in objects if name != "person")
    facts = [{"class": name, "count": 1} for name in _pick(objects, size, rng)]
    if tag == "counting":
        facts[0]["count"] = _pick(vocabulary.counts, 1, rng)[0]
    elif tag == "position":
        facts.reverse()  # the object drawn first stands right of, above, ... the other one
        facts[1]["position"] = [_pick(vocabulary.relations, 1, rng)[0], 0]
    elif tag in ("colors", "color_attr"):
        for fact, color in zip(facts, _pick(vocabulary.colors, size, rng)):
            fact["color"] = color
    return tuple(facts)


def draw_task(vocabulary: Vocabulary, rng: np.random.Generator,
              exclude: Collection[Hashable] = frozenset(), tag: str | None = None) -> Task:
    """A random task that means neither a GenEval test prompt nor one of the task keys in `exclude`.

    The tag, where none is given, and the facts are uniform. Raises ValueError where no such task is left.
    """
    tag = tag or TAGS[rng.integers(len(TAGS))]
    for _ in range(MAX_DRAWS):
        task = make_task(tag, _draw_facts(tag, vocabulary, rng))
        key = task_key(task)
        if key not in exclude and key not in _geneval_meanings():
            return task
    raise ValueError(f"no {tag} task left: {MAX_DRAWS} draws were all excluded or GenEval's own")


def task_key(task: Task) -> Hashable:
    """What the task means, whatever its wording: 'A left of B' and 'B right of A' share a key."""
    if task.tag == "position":
        reference, subject = task.facts
        return (task.tag, *_canonical(subject["class"], subject["position"][0], reference["class"]))
    return (task.tag, *sorted((fact["class"], fact["count"], fact.get("color", "")) for fact in task.facts))


def _canonical(subject: str, relation: str, reference: str) -> tuple[str, str, str]:
    """One spelling for each of the two ways to say where two things are."""
    if relation in ("right of", "below"):
        return reference, INVERSE[relation], subject
    return subject, relation, reference


# ---- GenEval's test prompts, and prompts of files ----------------------------------------------------------

def geneval_suite() -> list[Task]:
    """GenEval's 553 test tasks, drawn anew from its seed; prompts keep its own naive grammar."""
    rng = np.random.default_rng(43)
    names = _pick(GENEVAL.objects, len(GENEVAL.objects), rng)
    draws = [("single_object", ({"class": name, "count": 1},)) for name in names]
    draws += [(tag, _draw_facts(tag, GENEVAL, rng)) for tag in TAGS[1:] for _ in range(100)]
    tasks = {}
    for tag, facts in draws:
        prompt = "a photo of " + _description(tag, facts, naive=True)
        tasks.setdefault(prompt, replace(make_task(tag, facts), prompt=prompt))
    return list(tasks.values())


def geneval_metadata(task: Task) -> dict:
    """The task as a line of GenEval's evaluation_metadata.jsonl."""
    line = {"tag": task.tag, "include": list(task.facts)}
    if task.tag == "counting":  # one more of them than asked for is wrong
        line["exclude"] = [{"class": task.facts[0]["class"], "count": task.facts[0]["count"] + 1}]
    return line | {"prompt": task.prompt}


@cache
def _geneval_meanings() -> frozenset:
    """What the test prompts ask for: the keys of their facts, and what is read in their words."""
    suite = geneval_suite()
    return frozenset(map(task_key, suite)) | {_reading(task.prompt, REAL) for task in suite}


def _reading(prompt: str, vocabulary: Vocabulary) -> tuple[frozenset, ...]:
    """What a prompt asks for: objects, counts above one, colors of objects, and how two objects stand."""
    text = _read(prompt, vocabulary)
    names = _objects(text)
    counts = {count for count, _ in _numbers(text) if count > 1}
    relations = _relations(text, names) if len(names) == 2 else ()
    colors = {claim for claim in _colors_of(text) if claim[0]}
    return frozenset(names), frozenset(counts), frozenset(colors), frozenset(relations)


def is_geneval_prompt(prompt: str, objects: Collection[str] = ()) -> bool:
    """Whether the text asks for what one of the 553 test prompts asks for, in whatever wording.

    Words that are neither in REAL nor among `objects` are ignored: a doubtful prompt counts as a test prompt.
    """
    vocabulary = replace(REAL, objects=tuple(dict.fromkeys([*REAL.objects, *objects])))
    return _reading(prompt, vocabulary) in _geneval_meanings()


def _checked_task(line: dict, key: str, name_pattern: str) -> Task:
    """The task of a tag and of facts under `key`, whose names match the pattern; ValueError on a fault."""
    if not isinstance(line, dict):
        raise ValueError("is no JSON object")
    tag, facts = line.get("tag"), line.get(key)
    if tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}: known are {', '.join(TAGS)}")
    if not isinstance(facts, list) or len(facts) != len(DETAILS[tag]):
        raise ValueError(f"a {tag} prompt cannot have these objects under {key}: {facts!r}")
    for fact, details in zip(facts, DETAILS[tag]):
        keys = {"class", "count"} | details
        if not isinstance(fact, dict) or fact.keys() != keys:
            raise ValueError(f"{fact!r} under {key} should have the keys {', '.join(sorted(keys))}")
        for name in (fact["class"], fact.get("color", "red")):
            if not isinstance(name, str) or not re.fullmatch(name_pattern, name):
                raise ValueError(f"{name!r} is not a name in small letters, words separated by a space")
        placed = fact.get("position", ["above", 0]) in [[relation, 0] for relation in INVERSE]
        if not placed or not isinstance(fact["count"], int) or fact["count"] < 1:
            raise ValueError(f"{fact}: count is at least 1, position one of {', '.join(INVERSE)}, and 0")
    if facts[0]["count"] >= len(NUMBERS):
        raise ValueError(f"count {facts[0]['count']} has no number word here")
    return make_task(tag, facts)


def task_of(metadata: dict) -> Task:
    """The task of a line of metadata, whoever wrote it. Raises ValueError saying what is wrong with it."""
    task = _checked_task(metadata, "include", name_pattern=r"(?s).*\S.*")
    if not isinstance(metadata.get("prompt"), str):
        raise ValueError("no prompt")
    excluded = metadata.get("exclude", [])
    for fact in excluded if isinstance(excluded, list) else [None]:
        if not isinstance(fact, dict) or [type(fact.get(key)) for key in ("class", "count")] != [str, int]:
            raise ValueError("every object under exclude needs a class and a whole count")
    return replace(task, prompt=metadata["prompt"])


def read_tasks(
    data: bytes, vocabulary: Vocabulary, exclude: Collection[Hashable] = frozenset()
) -> tuple[list[Task], Vocabulary]:
    """Tasks from JSON lines, and the vocabulary with the objects and colors that they add to it. A line:

        {"tag": "position", "prompt": "A dog sits right of a kayak.",
         "facts": [{"class": "kayak", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
         "question": "Where is the dog?", "answer": "The dog is right of the kayak"}

    `tag` is one of TAGS and says which facts are asked for; `facts` are objects as under GenEval's `include`:
    a `color` for colors and color_attr, a `position` for the second object of position, relative to the
    first. `question` and `answer` may be left out, and are then the tag's question and the facts' answer.
    Every answer must be right by `score`, and no task may be one of GenEval's or have a key in `exclude`.
    Raises ValueError that names every faulty line.
    """
    tasks, faults = {}, {}  # by the number of their line
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line.strip():
                tasks[number] = _own_task(line)
        except (ValueError, RecursionError) as error:
            faults[number] = error
    facts = [fact for task in tasks.values() for fact in task.facts]
    objects = dict.fromkeys([*vocabulary.objects, *(fact["class"] for fact in facts)])
    colors = dict.fromkeys([*vocabulary.colors, *(fact["color"] for fact in facts if "color" in fact)])
    vocabulary = replace(vocabulary, objects=tuple(objects), colors=tuple(colors))
    for number, task in tasks.items():
        try:
            key = task_key(task)
            if key in exclude or key in _geneval_meanings() or is_geneval_prompt(task.prompt, objects):
                raise ValueError("asks for what a test prompt asks for")
            if score(task.answer, task, vocabulary) != 1:
                raise ValueError(f"its answer {task.answer!r} does not state its facts, would earn nothing")
        except ValueError as error:
            faults[number] = error
    if faults:
        lines = [f"line {number}: {' '.join(str(faults[number]).split())[:300]}" for number in sorted(faults)]
        raise ValueError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} faults", *lines]))
    if not tasks:
        raise ValueError("holds no prompts")
    return list(tasks.values()), vocabulary


def _own_task(line: bytes) -> Task:
    """The task of one line for read_tasks. Raises ValueError saying what is wrong with it."""
    entry = json.loads(line.decode())
    task = _checked_task(entry, "facts", name_pattern="[a-z]+( [a-z]+)*")
    if unknown := entry.keys() - {"tag", "prompt", "question", "answer", "facts"}:
        raise ValueError(f"unknown key {min(unknown)!r}: known are tag, prompt, question, answer, facts")
    if "prompt" not in entry:
        raise ValueError("has no prompt")
    texts = {key: entry[key] for key in ("prompt", "question", "answer") if key in entry}
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{key} is no text")
    return replace(task, **texts)


# ---- reading an answer: words -> typed tokens -> claims -> score -------------------------------------------

# Other names of the objects; each is also known in its plural.
ALIASES = {name: tuple(aliases.split(", ")) for name, aliases in {
    "person": "man, woman, boy, girl, child, lady, guy, human, toddler, surfer, cyclist, rider, player",
    "car": "automobile, sedan, suv, convertible, taxi", "motorcycle": "motorbike, motor bike, motor cycle",
    "airplane": "plane, aeroplane, aircraft, jet, airliner", "train": "locomotive", "cat": "kitten, kitty",
    "truck": "lorry, pickup, pickup truck, fire truck", "traffic light": "traffic signal, stoplight",
    "bicycle": "bike, mountain bike", "boat": "ship, sailboat, sail boat, rowboat, canoe, yacht",
    "fire hydrant": "hydrant", "bench": "park bench", "parking meter": "meter", "skis": "ski", "axe": "ax",
    "dog": "puppy, retriever, golden retriever, labrador, poodle, terrier, beagle, bulldog, husky, dachshund",
    "bird": "duck, parrot, seagull, pigeon, sparrow, owl, eagle", "horse": "pony, foal, stallion, mare",
    "cow": "bull, calf, cattle", "bear": "polar bear, grizzly bear, grizzly", "tie": "necktie, bow tie",
    "backpack": "rucksack, back pack", "suitcase": "luggage", "snowboard": "snow board", "couch": "sofa",
    "baseball bat": "bat", "baseball glove": "glove, baseball mitt", "surfboard": "surf board",
    "sports ball": "ball, soccer ball, basketball, football, volleyball, tennis ball, baseball",
    "skateboard": "skate board", "tennis racket": "racket, tennis racquet, racquet", "hot dog": "hotdog",
    "cup": "mug, coffee cup, teacup", "wine glass": "glass of wine, glasses of wine, wineglass",
    "donut": "doughnut", "chair": "armchair", "potted plant": "plant, houseplant, house plant",
    "dining table": "table, dinner table", "tv": "television, tv set, television set", "oven": "stove",
    "laptop": "laptop computer, notebook computer", "computer mouse": "mouse", "refrigerator": "fridge",
    "computer keyboard": "keyboard", "microwave": "microwave oven", "scissors": "scissor", "bathtub": "tub",
    "tv remote": "remote, remote control, tv remote control, television remote", "clock": "wall clock",
    "cell phone": "phone, cellphone, mobile phone, mobile, smartphone, smart phone, telephone",
    "teddy bear": "teddy, stuffed bear, toy bear", "toothbrush": "tooth brush", "rabbit": "bunny",
    "hair drier": "hair dryer, hairdryer, hairdrier, blow dryer, dryer", "turtle": "tortoise",
    "eggplant": "aubergine", "hamburger": "burger, cheeseburger", "frying pan": "pan, skillet",
    "mailbox": "mail box, letterbox", "shirt": "t shirt, tshirt", "handbag": "purse", "sheep": "lamb, ewe",
    "circle": "disk, disc, dot", "cross": "plus, plus sign", "diamond": "rhombus", "ring": "hoop"}.items()}
COLOR_ALIASES = {"grey": "gray", "violet": "purple", "lavender": "purple", "crimson": "red", "scarlet": "red",
                 "maroon": "red", "navy": "blue", "golden": "gold", "jet black": "black",
                 "lemon yellow": "yellow"}
# Known as colors in every vocabulary, so that "red and silver" never passes for red.
MORE_COLORS = GENEVAL.colors + tuple("gray gold silver beige tan cyan magenta turquoise teal khaki cream "
                                     "ivory olive bronze copper rainbow multicolored".split())
FUNCTION_WORDS = {  # by kind; an underscore stands for the space inside a phrase
    # What denies, doubts, corrects, or speaks of another time; REWRITES has more.
    "refuse": "no not never none nothing neither nor without cannot cant isnt arent doesnt dont absent "
              "missing instead except unlike false wrong or either perhaps might may could should would if "
              "unless until whether unsure unclear wait almost nearly at_least at_most up_to more_than "
              "less_than fewer_than rather_than other_than anything_but far_from used_to will was were "
              "having_been no_longer no_more has_been have_been already nowhere devoid hardly barely "
              "scarcely gone formerly previously once hard_to difficult_to impossible_to partly partially "
              "half_of word written reads / ?",
    "join": "and with while whereas but as_well_as & ) ,", "stop": ". ! ;",
    "copula": "is s are looks appears seems : = (",
    "article": "a an the this these those its his her their my your",
    "self": "it animal fruit shape vehicle instrument object objects item items thing things subject color "
            "colors colour colours answer total altogether",
    # What ends a noun phrase; then verbs that no ending tells.
    "prep": "of in on at high by near behind beside next to from for like as than about into onto around "
            "against along across through inside outside off up down toward towards during since that which "
            "who whose where when here he she they you we i has have had having can be being alone asleep "
            "upright outdoors indoors together nearby overhead away still now even too many few less more",
    "verb": "half sits stands lies rests hangs leans seen shown visible found worn held made stuck hung cut "
            "built kept drawn lit bent far open full s_left s_right its_left its_right",
    "pair": "pair_of pairs_of pair", "order": "respectively",
    # Phrases whose words would mean something else on their own.
    "other": "that_is_right that_s_right all_right right_next_to right_beside right_in right_now above_all "
             "from_above from_below over_there zebra_crossing sea_lion sea_horse fruit_bat power_plant",
    "skip": "rather very there colored coloured only just both each all also main primary dominant there_is "
            "there_are there_s here_is to_be of_them color_of colour_of colors_of shade_of hue_of fur_of "
            "photo_of picture_of image_of photograph_of not_only not_just not_hard_to hard_to_miss no_doubt "
            "without_a_doubt nothing_but nothing_else nothing_more no_more_and_no_fewer_than you_would"}
NUMBER_WORDS = {word: number for number, word in enumerate((*NUMBERS, "eleven", "twelve"))} | {
    "another": 1, "single": 1, "couple of": 2, "dozen": 12, "twenty": 20, "thirty": 30, "forty": 40,
    "fifty": 50, "hundred": 100, "thousand": 1000}
PLACES = {"above": "above, above of, over, on top of, atop, higher than",
          "below": "below, below of, under, beneath, underneath, lower than",
          "left of": "left of, the left of, left side of, the left side of, the left hand side of",
          "right of": "right of, the right of, right side of, the right side of, the right hand side of"}
FRAME = "<article><other:image|picture|photo|photograph|frame|scene>"
# What things lie on or wear: in passing, it is no second object.
SCENERY = {"dining table", "blanket", "shirt", "hat", "scarf", "helmet", "sunglasses", "tie"}
SPELLINGS = (  # mended before the text is cut into words
    ("’", "'"), ("n't", " not"), ("\n", " . "),
    (rf"-((?:{'|'.join(MORE_COLORS)}|colou?red|and-)\b)", r" \1"),  # black-and-white, red-colored
    (r"\b(and|not)-", r"\1 "))

# A text is read as a string of tokens 'kind:value', with a tab after each; `other` is a word that the lexicon
# doesn't know. REWRITES then turn each token into what it is where it stands, and claims are read off what is
# left. "A dog bowl, not red." about a bowl, before and after:
#
#     article:a  object:dog  object:bowl  join:,  refuse:not  color:red  stop:.
#     article:a  other:dog   object:bowl  join:,                         stop:.
#
# Patterns are regular expressions in which angle brackets stand for one token:
#
#     <object>      a token of this kind; <object:dog|cat> with one of these values, <object:(\S+)> with any
#     <join|stop>   a token of one of these kinds; <:on|in> of any kind, with one of these values; <> any
#     <one>         an object in the singular; <object> may also be in the plural, a token of kind `objects`
PHRASE = "<article|other|verb|color|number>*"  # what a noun has before it
COUNTED = "(?:<color|other|verb>)*<object>"  # 'red wooden chairs', after their number
COLORS = "<color>(?:(?:<color>|<join:and|,|&>)*<color>)?"  # 'red, white and blue'
PAINTED = "<article>|<:in|painted|dyed|upholstered>"  # between a thing and its color
SHOWING = "total|view|shot|close-?up|kind|type|breed|group|row|set|piece|bunch|herd|flock|front|side|number"
PLACED = ("sits?|sitting|stands?|standing|lies?|lying|rests?|resting|hangs?|hanging|located|positioned|"
          "placed|situated|perched|seated|seen|shown|visible|found|far")  # verbs of being somewhere
DENIED = "(?:(?!<refuse|join|stop|asked>)<>)+(?=<join|stop>)"  # up to the end of the clause

REWRITES = (  # in this order
    # DENIALS and doubts (`refuse`) make the whole answer worth nothing, unless they deny what nobody asked
    # for: a token `asked` stands before whatever is. "Yellow, not orange" is right of a yellow thing.
    (r"<other:(?:lack|fail|resembl|expect|pretend|disguis|mistak|vanish|disappear|remov|exclud|likel|presum|"
     r"suppos|guess|believ|think|confus|wish|dream|imagin|belong|intend|inspir|replac|imitat|probabl|possibl|"
     r"maybe|approximate)\S*>", "refuse:doubt\t"),
    (rf"<refuse:not>{DENIED}<join:but>", ""),  # (is) not gray but (pink)
    (rf"<refuse:no|without>{DENIED}", ""),  # (a dog) without a collar
    (rf"(<join|stop>)<refuse:not>{DENIED}", r"\1"),  # (yellow), not orange
    ("<asked>", ""),
    # WORDS that say nothing go; unknown words get a kind by their looks.
    (r"(?!<ambiguous>)(<>)\1", r"\1"),  # five five: a learner stutters, but not an orange orange
    (r"(<color>)(?=<article><object>)", r"\1join:,\t"),  # (the bar is) red the ring (is blue)
    (r"<other:(\d{1,9})\d*>", r"number:\1\t"),  # 12
    (rf"<skip>|<other:\S*ly>|<prep:in|of>{FRAME}", ""),  # clearly; in the image
    ("<pair>(?=<color|ambiguous>*<object:scissors|skis|sunglasses>)", ""),  # a pair of scissors is one thing,
    ("<other:heads?><prep:of>(?=<color|ambiguous>*<object:broccoli>)", ""),
    ("<pair>", "number:2\t"),  # a pair of dogs two
    (r"<other:(?!(?:paint|build|ceil|cloth|draw|carv|str|w)ing)(\S+-\S+|\S+ing|\S+ed)>", r"verb:\1\t"),
    # ORANGE is a color or a fruit, as any word that is both a color and an object of the vocabulary.
    (r"<ambiguous:(\S+)>(?=<self:colou?r>|<other|verb>*<object>|<join><color>)", r"color:\1\t"),  # orange cat
    (r"(<article|number|color>)<ambiguous:(\S+)>", r"\1object:\2\t"),  # an orange
    (r"(<object>(?:(?!<stop>)<>)*<copula>)<ambiguous:(\S+)>", r"\1color:\2\t"),  # the cat is orange
    (r"(^<stop:colors|color_attr>.*?)<ambiguous:(\S+)>", r"\1color:\2\t"),  # a color is asked for
    (r"<ambiguous:(\S+)>", r"object:\1\t"),
    # COMPOUNDS and objects that are not said to be there: they become an `other`, something unknown, so that
    # nothing is claimed of them, and naming them is no contradiction. In "a dog house" there is no dog.
    # `scenery` is an object that an answer to this question may name in passing, where a preposition does so.
    (rf"((?:<article>|<number:1>){COUNTED})<other:(\S*[^s]s)>", r"\1verb:\2\t"),  # a dog runs: no compound
    (rf"((?:<prep>|<:with|above|wearing|holding>){PHRASE})<scenery:(\S+)>(?!<object|other>)",
     r"\1other:\2\t"),  # (two cups) on a table
    (r"<scenery:(\S+)>", r"object:\1\t"),
    ("(?:<object>){3,}", "refuse:list\t"),  # dog cat bed
    (r"<object:(\S+)>(?=<object>)", r"other:\1\t"),  # dog (bowl)
    (r"<object:(\S+)><copula:s>(?=<color>*<other|object>)", r"other:\1\t"),  # the dog's (collar)
    (r"<one:(\S+)>(?=<other>)", r"other:\1\t"),  # dog (house)
    (rf"(<other|self:(?!(?:{SHOWING})s?\t)\S+><prep:of>{PHRASE})<object:(\S+)>", r"\1other:\2\t"),  # a leg of
    (rf"(<:for|like|as|than|about|called|named>{PHRASE})<object:(\S+)>", r"\1other:\2\t"),  # made for a cat
    (rf"(<:half|toy|fake|stuffed>{PHRASE})<object:(\S+)>", r"\1other:\2\t"),  # a toy car
    (rf"<:has|have|with>(?:<article|other|verb>)*({COLORS})<verb>*<:coat|fur|skin|paint|finish|body|colou?r>",
     r"copula:is\t\1join:while\t"),  # (a dog) with brown fur: the dog is brown
    # NUMBERS that count something else, or nothing for certain, become an `other` as well.
    ("(?:<number>){2,}", "other:number\t"),  # thirty two, three dozen
    (r"(<relation>|<:about|around|some|number|at|to|than>)<number:(\S+)>", r"\1other:\2\t"),  # over three
    (rf"(<article|color|other|side>)<number:1>(?!{COUNTED})", r"\1self:one\t"),  # the black one
    (rf"(<other|object>|<prep:(?!of\t)\S+>)<number:(\S+)>(?!{COUNTED})", r"\1other:\2\t"),  # line 4
    (rf"<number:(\S+)>(?!{COUNTED}|<stop|join|self>|<copula:[:=(]>)", r"other:\1\t"),  # two wheels
    # PLACES. 'left' is a side in "the dog is left", and none in "a man left" or "walking to the left". A side
    # relates to the other object; so does `its`, as in "above it".
    (rf"<relation:(\S+)>{FRAME}", r"side:\1\t"),  # on the left of the image
    (r"<bare:(\S+)>(?=<join|stop|self|object|copula>)", r"side:\1\t"),  # the dog is left.
    (r"(<copula>)<bare:(\S+)>(?=<article>)", r"\1side:\2\t"),  # the dog is left the cat: a learner's slip
    (rf"((?:<other|verb:(?!(?:{PLACED})\t)\S+>|<:has|have|looks>)(?:(?!<object|join|stop>)<>)*)<side>",
     r"\1"),  # walks to the left
    (r"<relation:(above|below)>(?=<join|stop>(?!<prep|article>*<relation>))", r"side:\1\t"),  # is above.
    (rf"(<:{PLACED}|is|are>)<prep:on>", r"\1relation:above\t"),  # sits on
)


@cache
def _pattern(rule: str) -> re.Pattern:
    """The regular expression of a pattern over tokens, in the notation explained above."""
    def token(match: re.Match) -> str:
        kinds = match[1].replace("object", "objects?").replace("one", "object") or "[a-z]+"
        values = (match[2] or r"\S+").replace(r"\S", r"[^\t]")  # a value may hold spaces: 'hot dog'
        return rf"(?:(?<![^\t])(?:{kinds}):(?:{values})\t)"
    return re.compile(re.sub(r"<([a-z|]*)(?::([^<>]*))?>", token, rule))


@cache
def _lexicon(vocabulary: Vocabulary) -> dict[str, str]:
    """The token of every known phrase. Later entries win, and the vocabulary's own names come last."""
    entries = {"the top": "side:above", "the bottom": "side:below"}
    for relation, phrases in PLACES.items():
        for phrase in phrases.split(", "):
            entries |= {phrase: f"relation:{relation}", f"{phrase} it": f"its:{relation}"}
    for side in ("left", "right"):
        entries |= {side: f"bare:{side} of", f"to its {side}": f"its:{side} of"}
        entries |= {f"the {side}{part}": f"side:{side} of" for part in ("", " side", " hand side")}
    for kind, phrases in FUNCTION_WORDS.items():
        entries |= {phrase.replace("_", " "): f"{kind}:{phrase}" for phrase in phrases.split()}
    entries |= {word: f"number:{number}" for word, number in NUMBER_WORDS.items()}
    entries |= {color: f"color:{color}" for color in MORE_COLORS + vocabulary.colors}
    entries |= {word: f"color:{color}" for word, color in COLOR_ALIASES.items()}
    nouns = [(word, name) for name in vocabulary.objects
             for word in (*ALIASES.get(name, ()), name.replace(" ", ""))]
    nouns += [(name, name) for name in vocabulary.objects]
    for word, name in nouns:
        entries[word] = f"ambiguous:{name}" if word in vocabulary.colors else f"object:{name}"
        for form in (_plural_word(word), _naive_plural(word)):
            entries.setdefault(form, f"objects:{name}")
    return {phrase: token + "\t" for phrase, token in entries.items()}


def _words(text: str) -> list[str]:
    text = reduce(lambda text, spelling: re.sub(*spelling, text), SPELLINGS, text.lower())
    number = r"(?:(?<!\S)[-+~<>$#])?\d+(?:[.,:/]\d+|[-–]?[a-z]+|[-–]\d+|[+%])*"  # or '3D', '2.5', '-3'
    return re.findall(rf"[a-z]+(?:-[a-z]+)*|[.,;:!?/()=&]|{number}", text)


def _read(text: str, vocabulary: Vocabulary, tag: str = "", facts: Sequence[dict] = ()) -> str:
    """The text as tokens, longest phrase first (a hot dog is no dog), each as what it is where it stands.

    Without facts it is a prompt.
    """
    words, lexicon, tokens = [*_words(text), "."], _lexicon(vocabulary), f"stop:{tag or '.'}\t"
    while words:
        phrases = [" ".join(words[:size]).replace("-", " ") for size in range(1, 8)]
        size = next((size for size in range(7, 0, -1) if phrases[size - 1] in lexicon), 1)
        tokens += lexicon.get(phrases[size - 1], f"other:{words[0]}\t")
        del words[:size]
    asked = {str(value) for fact in facts for value in fact.values() if value != 1}
    scenery = (set(vocabulary.objects) if tag == "colors" else SCENERY) - {fact["class"] for fact in facts}
    if facts:
        tokens = re.sub(rf"\b[a-z]+:({'|'.join(map(re.escape, asked))})\t", r"asked:!\t\g<0>", tokens)
        tokens = re.sub(rf"\bobjects?:({'|'.join(scenery)})\t", r"scenery:\1\t", tokens)
    else:  # a prompt: unknown words never hide what it asks for
        tokens = _pattern(r"(<color><other:(?!\d)\S+>)|<other:(?!\d)\S+>|<verb>|<prep:(?!that|which|who)\S+>"
                          ).sub(r"\1", tokens)
    for rule, replacement in REWRITES:
        tokens = _pattern(rule).sub(replacement, tokens)
    return tokens


def _objects(tokens: str) -> list[str]:
    """The different objects, in the order of the tokens."""
    return [*dict.fromkeys(_pattern(r"<object:(\S+)>").findall(tokens))]


def _numbers(tokens: str) -> list[tuple[int, str]]:
    """Each number with the object that it counts, if said: 'two: a dog and' -> (2, ""), (1, "dog")."""
    counts = _pattern(rf"(?:<number:(\d+)>|<article:an?>(?={COUNTED}))"
                      r"(?:(?:<color|other|verb>)*<object:(\S+)>)?")
    return [(int(count or 1), name) for count, name in counts.findall(tokens)]


def _noun(tokens: str, skipped: str = "other|verb|color|number") -> str | None:
    """What the phrase at the start of the tokens is about, past words of the skipped kinds.

    'the wooden bench is' -> "bench"; 'it is', 'red' -> "", nothing is named; 'the wall is' -> None, unknown.
    """
    words, name, it, prep = _pattern(rf"(?:<article|stop>|<prep:that>)*((?:<{skipped}>)*)"
                                     r"(?:<object:(\S+)>|(<self>)|(<prep>))?").match(tokens).groups()
    if name or it:
        return name or ""
    return None if prep or re.search("other:|verb:", words) else ""


def _subject(before: str, skipped: str = "other|verb|color|number") -> str | None:
    """What 'is' or a place is said of, given the tokens before it, as _noun tells it.

    'a cat and a dog that (is)' -> "dog"; 'The dog sits and (is)' -> "dog", of an earlier clause.
    """
    if relative := _pattern(r"<object:(\S+)>(?:<join|verb|other>)*<:that|which|who>$").search(before):
        return relative[1]
    for edge in ("<join|stop>|<copula::>", "<stop>"):
        clause = _pattern(edge).split(before)[-1]
        if re.search("object|self|other", clause):
            return _noun(clause, skipped)
    return ""


def _colors_of(tokens: str) -> set[tuple[str, str]]:
    """The colors that the text gives to things, as (object, color), of "" where the thing is only 'it'."""
    names, colors = _objects(tokens), _pattern(r"<color:(\S+)>").findall(tokens)
    if "order:" in tokens and len(names) == len(colors):
        return set(zip(names, colors))  # A and B are red and blue, respectively
    found = set()
    for run in _pattern(COLORS).finditer(tokens):
        before, after = tokens[:run.start()], tokens[run.end():]
        names = [name for name in _bearers(before, after) if name is not None]
        found |= {(name, color) for name in names for color in _pattern(r"<color:(\S+)>").findall(run[0])}
    return found


def _bearers(before: str, after: str) -> list[str | None]:
    """The things that a color between these tokens is said of, as _noun tells them."""
    if noun := _pattern(r"(?:<other|verb>)*<object:(\S+)>|<verb>*<other>").match(after):
        return [noun[1]]  # a red (wooden) bench; or something unknown
    if copula := _pattern(rf"(<copula>)(?:<other>|{PAINTED}|<join:,>(?=<other>))*$").search(before):
        before = before[:copula.start()]  # 'A is red', 'A: red', 'A (red)'
        names = _objects(_pattern("<stop|copula>").split(before)[-1])
        together = copula[1] == "copula:are\t" and len(names) > 1  # 'A and B are red'
        return names if together else [_subject(before)]
    bare = _pattern(rf"(?:<object:(\S+)>|<stop><article>*<other>?)(?:{PAINTED})*$").search(before)
    return [bare[1] or ""] if bare else []  # the bench red, a bench in red; red


def _relations(tokens: str, pair: Collection[str]) -> set[tuple[str, str, str]]:
    """What the text says about where the two objects are, as canonical (subject, relation, reference)."""
    claims = set()
    for place in re.finditer(r"\b(relation|its|side):([^\t]+)\t", tokens):
        before, after = tokens[:place.start()], _pattern("<stop>").split(tokens[place.end():])[0]
        references = pair  # 'on the left', 'to its left': of the other one
        if place[1] == "relation":  # 'left of B', 'above and left of B'
            references = [_noun(
                _pattern("^(?:(?:<article>|<join>+<prep|article>*)<relation>)*").sub("", after)
            )]
            after = _pattern("^.*?<object>").sub("", after)
        subject = _placed(before, after)
        claims |= {(subject, place[2], name) for name in references if subject and name}
    return {_canonical(*claim) for claim in claims if claim[0] != claim[2]}


def _placed(before: str, after: str) -> str | None:
    """What a place is said of, given the tokens before it and after its reference, as _noun tells it.

    'The dog is (left of the cat)' -> "dog"; '(Left of the cat) is a dog' -> "dog", fronted.
    """
    clause = _pattern("<join|stop>").split(before)[-1]
    if _pattern("^(?:<prep><article>?|<verb>)*$").match(clause):
        subject = _noun(_pattern("^(?:(?!<article|object>)<>)*").sub("", after))
        if subject != "":
            return subject
    return _subject(before, "article|other|verb|color|number")


def score(answer: str, task: Task, vocabulary: Vocabulary,
          kind: Literal["exact", "partial"] = "exact") -> float:
    """How right the answer is: `exact` is 1 or 0; `partial` is the chance of being all right if one guessed
    what the answer leaves out, and 0 where it states nothing.

    Asked for are: the object (single_object), each object (two_object), the number (counting), the color
    (colors), each object and their relation (position), each object and each color on its object
    (color_attr). A contradiction is worth 0, so listing words never pays. Another kind raises ValueError.
    """
    if kind not in ("exact", "partial"):
        raise ValueError(f"kind must be 'exact' or 'partial', not {kind!r}")
    words = [word for word in _words(answer) if word[-1].isalnum() and word not in ("a", "an", "the", "and")]
    if len(words) > MAX_WORDS or re.search(r"(?<!\S)((?:\S+ )+)\1\1", " ".join(words) + " "):
        return 0.0  # too long, or one phrase three times in a row
    tokens = _read(answer, vocabulary, task.tag, task.facts)
    wanted = [fact["class"] for fact in task.facts]
    named, numbers = _objects(tokens), _numbers(tokens)
    if set(named) - set(wanted) or "refuse:" in tokens:
        return 0.0
    if task.tag == "counting":  # of others than the number itself: 'three people: two men and a woman'
        count = task.facts[0]["count"]
        parts = [part if noun else np.inf for part, noun in numbers if part != count]
        return float(len(parts) < len(numbers) and sum(parts) in (0, count))
    if any(noun and count != 1 for count, noun in numbers):
        return 0.0
    colors = {claim for claim in _colors_of(tokens) if claim[0] in ("", *wanted)}
    if task.tag == "colors":
        return float({color for _, color in colors} == {task.facts[0]["color"]})
    claims, truths, choices = set(), set(), ()
    if task.tag == "position":
        claims, truths, choices = _relations(tokens, wanted), {task_key(task)[1:]}, vocabulary.relations
    if task.tag == "color_attr":
        truths = {(fact["class"], fact["color"]) for fact in task.facts}
        claims, choices = {claim for claim in colors if claim[0]}, vocabulary.colors
    if claims - truths:
        return 0.0
    chances = [1 if name in named else 1 / len(vocabulary.objects) for name in wanted]
    chances += [1 if truth in claims else 1 / len(choices) for truth in truths]
    if kind == "exact" or 1 not in chances:
        return float(set(chances) == {1})
    return prod(chances)
