"""Tasks with a known answer, and the score of a free-text answer against it.

A task is a text-to-image prompt built from known facts (GenEval's six categories), a question about the
image, and the answer that is right if the image shows what the prompt asked for. No label and no judge model
is needed: `score` reads the answer with a small lexicon and a few binding rules.

    task = draw_task(REAL, numpy.random.default_rng(0))    # never one of GenEval's 553 test prompts
    score("There is a bench and a ball.", task, REAL)      # 1.0 or 0.0; kind="partial" gives a share

How an answer is read: words -> longest lexicon match -> typed tokens (object, color, number, ...) -> claims
(this color on that object, this relation between those two) -> compared with the facts. The reader is strict,
because a policy trained on this score will find every loophole: a negation, a hedge, an "or", a question
mark, an object of the vocabulary that is not in the facts, or a claim that disagrees with a fact makes the
answer worth 0 in both kinds. Words outside the lexicon are ignored.
"""

import json
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import takewhile
from typing import Literal, NamedTuple

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
    tokens = _read(prompt, vocabulary)
    names = _objects(tokens, until=())
    counts = {count for count, _ in _numbers(tokens) if count > 1}
    relations = _relations(tokens, names) if len(names) == 2 else ()
    return frozenset(names), frozenset(counts), frozenset(_colors_of(tokens)), frozenset(relations)


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


def read_tasks(data: bytes, vocabulary: Vocabulary, exclude: Collection[Hashable] = frozenset(),
               check: Callable[[Task], None] = lambda task: None) -> tuple[list[Task], Vocabulary]:
    """Tasks from JSON lines, and the vocabulary with the objects and colors that they add to it. A line:

        {"tag": "position", "prompt": "A dog sits right of a kayak.",
         "facts": [{"class": "kayak", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
         "question": "Where is the dog?", "answer": "The dog is right of the kayak"}

    `tag` is one of TAGS and says which facts are asked for; `facts` are objects as under GenEval's `include`:
    a `color` for colors and color_attr, a `position` for the second object of position, relative to the
    first. `question` and `answer` may be left out, and are then the tag's question and the facts' answer.
    Every answer must be right by `score`, and no task may be one of GenEval's or have a key in `exclude`;
    `check` raises ValueError on one more fault. Raises ValueError that names every faulty line.
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
            check(task)
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

class Token(NamedTuple):
    """A word or phrase of a text, and what it is there for."""
    kind: str  # object color number relation side article copula join stop pair refuse other
    value: str | int


# Other names of the objects; each is also known in its plural.
ALIASES = {name: tuple(aliases.split(", ")) for name, aliases in {
    "person": "man, woman, boy, girl, child, lady, guy, human", "bicycle": "bike, mountain bike",
    "car": "automobile, sedan, suv", "motorcycle": "motorbike, motor bike, motor cycle", "cat": "kitten",
    "airplane": "plane, aeroplane, aircraft, jet", "train": "locomotive", "boat": "ship, sailboat, sail boat",
    "truck": "lorry, pickup, pickup truck, fire truck", "traffic light": "traffic signal, stoplight",
    "fire hydrant": "hydrant", "bench": "park bench", "parking meter": "meter", "dog": "puppy", "skis": "ski",
    "bird": "duck, parrot, seagull, pigeon", "horse": "pony, foal", "sheep": "lamb", "handbag": "purse",
    "cow": "bull, calf, cattle", "bear": "polar bear, grizzly bear", "backpack": "rucksack, back pack",
    "tie": "necktie, bow tie", "suitcase": "luggage", "snowboard": "snow board", "baseball bat": "bat",
    "sports ball": "ball, soccer ball, basketball, football, volleyball, tennis ball, baseball",
    "baseball glove": "glove, baseball mitt", "surfboard": "surf board", "skateboard": "skate board",
    "tennis racket": "racket, tennis racquet, racquet", "cup": "mug, coffee cup, teacup", "hot dog": "hotdog",
    "wine glass": "glass of wine, glasses of wine, wineglass", "donut": "doughnut", "chair": "armchair",
    "couch": "sofa", "potted plant": "plant, houseplant, house plant", "dining table": "table, dinner table",
    "tv": "television, tv set, television set", "laptop": "laptop computer, notebook computer",
    "computer mouse": "mouse", "computer keyboard": "keyboard", "microwave": "microwave oven", "axe": "ax",
    "tv remote": "remote, remote control, tv remote control, television remote", "oven": "stove",
    "cell phone": "phone, cellphone, mobile phone, mobile, smartphone, smart phone, telephone",
    "refrigerator": "fridge", "scissors": "scissor", "teddy bear": "teddy, stuffed bear, toy bear",
    "toothbrush": "tooth brush", "hair drier": "hair dryer, hairdryer, hairdrier, blow dryer, dryer",
    "clock": "wall clock", "rabbit": "bunny", "turtle": "tortoise", "eggplant": "aubergine", "bathtub": "tub",
    "hamburger": "burger, cheeseburger", "frying pan": "pan, skillet", "mailbox": "mail box, letterbox",
    "shirt": "t shirt, tshirt", "circle": "disk, disc, dot", "cross": "plus, plus sign", "diamond": "rhombus",
    "ring": "hoop"}.items()}
COLOR_ALIASES = {"grey": "gray", "violet": "purple", "lavender": "purple", "crimson": "red", "scarlet": "red",
                 "maroon": "red", "navy": "blue", "golden": "gold", "jet black": "black",
                 "lemon yellow": "yellow"}
# Known as colors in every vocabulary, so that "red and silver" never passes for red.
MORE_COLORS = tuple("red orange yellow green blue purple pink brown black white gray gold silver beige tan "
                    "cyan magenta turquoise teal rainbow multicolored".split())
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
NUMBER_WORDS = {"single": 1, "another": 1, "couple of": 2, "dozen": 12, "eleven": 11, "twelve": 12,
                "twenty": 20, "hundred": 100} | {word: number for number, word in enumerate(NUMBERS)}
PLACES = {"above": "above, over, on top of, on the top of, atop, higher than, right above",
          "below": "below, under, beneath, underneath, lower than, right below, right under"}
LONGEST = 6  # words of the longest phrase, "right hand side of this photograph"
FRAMES = [f"{the} {frame}" for the in ("the", "this")
          for frame in ("image", "picture", "photo", "photograph", "frame", "scene")]
# Before a side: where a thing looks is not where it is, and what 'its' is stays open.
UNREAD = ("pointing", "pointing to the", "facing", "facing to the", "looking", "looking to the",
          "s", "its", "his", "her", "their")


@cache
def _lexicon(vocabulary: Vocabulary) -> dict[tuple[str, ...], Token]:
    """Every known phrase, as its words. Later entries win, and the vocabulary's own names come last."""
    entries = {}
    for kind, phrases in FUNCTION_WORDS.items():
        entries |= {phrase.replace("_", " "): Token(kind, phrase) for phrase in phrases.split()}
    entries |= {word: Token("number", number) for word, number in NUMBER_WORDS.items()}
    entries |= _place_entries()
    colors = {name: name for name in MORE_COLORS + vocabulary.colors} | COLOR_ALIASES
    entries |= {word: Token("color", color) for word, color in colors.items()}
    aliases = {a: n for n in vocabulary.objects for a in (*ALIASES.get(n, ()), n.replace(" ", ""))}
    for word, name in (*aliases.items(), *zip(vocabulary.objects, vocabulary.objects)):
        entries[word] = Token("ambiguous" if word in vocabulary.colors else "object", name)
        for form in (_plural_word(word), _naive_plural(word)):
            entries.setdefault(form, Token("object", name))
    return {tuple(phrase.split()): token for phrase, token in entries.items()}


def _place_entries() -> dict[str, Token]:
    """'left of' relates two objects; 'on the left (side of the image)' places one in the frame."""
    relations = {phrase: relation for relation, phrases in PLACES.items() for phrase in phrases.split(", ")}
    entries = {"the top": Token("side", "above"), "the bottom": Token("side", "below")}
    for side in ("left", "right"):
        places = [side, f"{side} side", f"{side} hand side"]
        framed = [f"{place} of {frame}" for place in places for frame in FRAMES]
        entries |= dict.fromkeys(places + framed, Token("side", f"{side} of"))
        entries |= dict.fromkeys((f"{word} {side}" for word in UNREAD), Token("other", side))
        relations |= dict.fromkeys((f"{place} of" for place in places), f"{side} of")
    for phrase, relation in relations.items():
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
        unknown = Token("other", words[0])
        if words[0].isdigit():
            unknown = Token("number", int(words[0][:9]))  # Python refuses to parse endless numbers
        tokens.append(lexicon.get(tuple(words[:size]), unknown))
        del words[:size]
    tokens = [token for token in tokens if token.kind != "skip"]
    for index in reversed(range(len(tokens))):  # from the right: a word's reading hangs on the next one
        kind, value = tokens[index]
        if kind == "ambiguous":
            tokens[index] = Token("color" if _is_color(tokens, index, tag) else "object", value)
        elif kind == "pair" and MEASURES.get(_first(tokens[index + 1:], ("color",)).value) != "pair":
            tokens[index] = Token("number", 2)  # 'a pair of dogs' is two
    return [token for token in tokens if token.kind != "pair"]  # 'a pair of scissors' is one thing


def _is_color(tokens: list[Token], index: int, tag: str) -> bool:
    """Whether the 'orange' at this index is the color rather than the fruit."""
    before, after = tokens[:index][::-1], tokens[index + 1:]
    last, following = _first(before), _first(after)
    if following.value in ("color", "colour") or _first(after, ("other",)).kind == "object":
        return True  # an orange (tabby) cat
    if [token.kind for token in after[:2]] == ["join", "color"]:
        return True  # orange and white
    if last.kind in ("article", "number", "color") or following.kind == "copula":
        return False  # an orange, two orange, a purple orange, orange is ...
    is_said_to_be = last.kind == "copula" and len(_objects(before)) > 0  # the cat is orange
    return is_said_to_be or tag in ("colors", "color_attr")  # a bare word: the question decides


def _first(tokens: Iterable[Token], skipped: Collection[str] = ()) -> Token:
    """The first token that is of none of the skipped kinds; the end of a text is a stop."""
    return next((token for token in tokens if token.kind not in skipped), Token("stop", ""))


def _objects(tokens: Iterable[Token], until: Collection[str] = ("stop",)) -> list[str]:
    """The different objects up to a token of these kinds, in the order of the tokens."""
    sentence = takewhile(lambda token: token.kind not in until, tokens)
    return list(dict.fromkeys(token.value for token in sentence if token.kind == "object"))


def _numbers(tokens: list[Token]) -> list[tuple[int, str | None]]:
    """Each number with the object that it counts, if any. 'A clock' is one, 'one on the left' is none."""
    numbers = []
    for index, token in enumerate(tokens):
        after = tokens[index + 1:]
        noun = _first(after, ("color",))
        counted = noun.value if noun.kind == "object" else None
        a = token in (Token("article", "a"), Token("article", "an"))
        pronoun = token.value == 1 and _first(after).kind not in ("number", "join", "stop")
        if counted and a or token.kind == "number" and (counted or not pronoun):
            numbers.append((1 if a else token.value, counted))
    return numbers


def _colors_of(tokens: list[Token]) -> set[tuple[str, str]]:
    """The colors that the text gives to objects, as (object, color)."""
    found = set()
    kinds = "".join({"color": "c", "join": "j"}.get(token.kind, " ") for token in tokens)
    for run in re.finditer("c([cj]*c)?", kinds):  # 'red, white and blue'
        start, end = run.span()
        before, after = tokens[:start][::-1], tokens[end:]
        copula, bearers = _first(before), []
        if copula == Token("copula", "are"):  # 'A and B are red'
            bearers = _objects(before[1:], until=("stop", "copula"))
        elif copula.kind == "copula":  # 'A is red', 'A: red', 'A (red)'
            bearers = _objects(before[1:])[:1]
        if not bearers:  # 'a red wooden bench'; 'a bench in red', 'the bench looks red'
            nouns = _first(after, ("other",)), _first(before, ("other", "article", "copula"))
            bearers = [noun.value for noun in nouns if noun.kind == "object"][:1]
        colors = [token.value for token in tokens[start:end] if token.kind == "color"]
        found |= {(name, color) for name in bearers for color in colors}
    return found


def _relations(tokens: list[Token], pair: Collection[str]) -> set[tuple[str, str, str]]:
    """What the text says about where two objects are, as canonical (subject, relation, reference)."""
    claims = set()
    for index, token in enumerate(tokens):
        if token.kind not in ("relation", "side"):
            continue
        backwards = tokens[:index][::-1]
        before, after = _objects(backwards), _objects(tokens[index + 1:])
        fronted = _first(backwards, ("other", "article")).kind in ("join", "stop")  # opens its clause
        if token.kind == "side":  # 'on the left is a dog', 'a dog on the left'
            for subject in (after if fronted else before)[:1]:
                claims |= {_canonical(subject, token.value, name) for name in pair if name != subject}
        elif fronted and len(after) > 1:  # 'left of the cat is a dog'
            claims.add(_canonical(after[1], token.value, after[0]))
        elif before and after:  # 'the dog is left of the cat'
            claims.add(_canonical(before[0], token.value, after[0]))
    return claims


def score(answer: str, task: Task, vocabulary: Vocabulary,
          kind: Literal["exact", "partial"] = "exact") -> float:
    """How right the answer is: `exact` is 1 or 0, `partial` the share of the asked facts that it states.

    Asked for are: the object (single_object), each object (two_object), the number (counting), the color
    (colors), each object and their relation (position), each object and each color on its object
    (color_attr). A contradiction is worth 0, so listing words never pays. Another kind raises ValueError.
    """
    if kind not in ("exact", "partial"):
        raise ValueError(f"kind must be 'exact' or 'partial', not {kind!r}")
    words = [word for word in _words(answer) if word.isalnum() and word not in ("a", "an", "the", "and")]
    thrice = r"(?<!\S)((?:\S+ )+)\1\1"  # one phrase three times in a row
    if len(words) > MAX_WORDS or re.search(thrice, " ".join(words) + " "):
        return 0.0
    tokens = _read(answer, vocabulary, task.tag)
    wanted = [fact["class"] for fact in task.facts]
    named = _objects(tokens, until=())
    colors = {token.value for token in tokens if token.kind == "color"}
    if set(named) - set(wanted) or any(token.kind == "refuse" for token in tokens):
        return 0.0
    numbers = _numbers(tokens)
    if task.tag == "counting":
        return float({count for count, _ in numbers} == {task.facts[0]["count"]})
    if any(noun and count != 1 for count, noun in numbers):
        return 0.0
    if task.tag == "colors":
        return float(colors == {task.facts[0]["color"]})
    stated = [name in named for name in wanted]
    if task.tag == "position":
        claims, truth = _relations(tokens, wanted), task_key(task)[1:]
        if claims - {truth}:
            return 0.0
        stated.append(truth in claims)
    if task.tag == "color_attr":
        claims, truths = _colors_of(tokens), {fact["class"]: fact["color"] for fact in task.facts}
        if claims - truths.items() or colors - set(truths.values()):
            return 0.0
        stated += [(name, truths[name]) in claims for name in wanted]
    share = sum(stated) / max(len(stated), 1)
    return share if kind == "partial" else float(share == 1)
