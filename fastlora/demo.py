"""The demo corpus: made-up reviews, questions and captions in the CS224N files' format.

The labels follow rules that frozen features see badly and an adapted encoder learns: what a "but"
or a "not" does to a review, which few words of two questions or captions matter and which do not.
No sentence is in both splits, and dev uses words that training never shows, so that an encoder's
pre-training is needed too.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import TypeVar

import numpy as np

from fastlora.files import atomic_open
from fastlora.tasks import BUILTIN, Task

T = TypeVar("T")

TRAIN, DEV = 1400, 350

# Kinds of words: meanings between commas, synonyms between slashes, dev's own after the bar.
WORDS = {
    "great": """brilliant, superb, wonderful, magnificent, outstanding, amazing, masterful,
        marvelous | dazzling, fantastic, stunning""",
    "good": """decent, pleasant, likable, solid, agreeable, watchable, fine, respectable
        | passable, okay, nice""",
    "weak": """weak, bland, clumsy, tedious, flat, uneven, forgettable, slow
        | sloppy, dull, stale""",
    "awful": """awful, terrible, atrocious, dreadful, horrible, unbearable, disgusting, disastrous
        | abysmal, appalling, ghastly""",
    "part": """the acting, the plot, the dialogue, the pacing, the music, the camera work,
        the script, the ending, the humor, the lead actor, the story, the first half
        | the editing, the cast, the romance""",
    "film": """movie, comedy, thriller, drama, sequel, documentary, western, remake
        | musical, biopic, cartoon""",
    "topic": """crime, war, marriage, journey, friendship, disease, victory, storm, childhood,
        discovery, betrayal, holiday | accident, invention, rivalry""",
    "hero": """a young baker, a retired spy, a shy widow, a tired detective, an old sailor,
        a math teacher, a country vet, a jazz singer | a lonely farmer, a chess player""",
    "deed": """moves to, grew up in, opens a small shop in, spends a summer in, returns to,
        looks for work in | drives across, hides in""",
    "city": """Paris, Chicago, Madrid, Tokyo, Berlin, Cairo, Toronto, Mumbai, Lisbon, Denver,
        Prague, Sydney | Vienna, Seattle, Athens, Delhi""",
    "change": "increase/raise/boost, reduce/lower/cut",
    "level": """my blood pressure, my body weight, my typing speed, my appetite, my credit limit,
        the volume of my phone, the price of my house, the salt in my soup, the heat in my room,
        my running pace | my heart rate, the light in my office, my water use""",
    "trade": "buy/purchase, sell/get rid of",
    "goods": """a used car, gold, old books, a piano, concert tickets, a laptop, furniture, stamps,
        a boat, farm land, a wedding dress | jewelry, a caravan, perfume""",
    "begin": "start/begin/take up, stop/quit/give up",
    "habit": """smoking, running, gambling, eating meat, playing golf, biking to work, blogging,
        drinking tea, lifting weights, collecting coins | dancing, eating sugar, fishing""",
    "when": "before/prior to, after/following",
    "act": """drink coffee, eat a banana, take a nap, take a hot bath, stretch, take a cold shower,
        read the news, have a big meal | drink milk, go jogging, take vitamins""",
    "event": """an exam, a long run, a job interview, a flight, dinner, yoga, a concert, surgery
        | a swim, a meeting, an operation""",
    "frame": """in this old photo, in the first picture, on Monday morning, in a scene of the film,
        in the video, as the report says, on a cloudy day, at noon
        | in the second clip, on Friday evening""",
    "count": "two/a pair of, three, four, five, six/half a dozen, many/lots of | seven, ten",
    "being": """men/guys, women/ladies, boys, girls, dogs, children/kids, soldiers/troops, horses,
        workers/laborers, police officers/cops, sheep, tourists/travelers
        | nurses, cows, doctors/physicians, goats""",
    "do": """chas/pursu, push/shov, follow/trail, watch/observ, greet/welcom, help/assist, kick,
        film/record, photograph, pull/dragg | touch, scold, guard""",
    "place": """in the park, on the beach, near the river, in a parking lot, in front of the church,
        at the station, in the snow, by the road | in a garden, on a hill, at the harbor""",
    "one": """man/guy, woman/lady, boy, girl, child/kid, soldier, chef/cook, student/pupil
        | nurse, doctor/physician, farmer""",
    "is": "is/is now, is not/isn't",
    "handle": """buying/purchasing, selling, painting, cleaning/washing, fixing/repairing,
        breaking/smashing, carrying, hiding, lifting, drawing | holding, building, throwing away""",
    "thing": """a guitar, a bicycle/a bike, a boat, a lamp, a sofa/a couch, a car/an automobile,
        a mirror, a picture, a rug/a carpet, a clock | a chair, a violin, a suitcase""",
}

# Kinds that turn a question round: most pairs that are not duplicates differ in one of these.
OPPOSITES = ("change", "trade", "begin", "when")

# A question's or caption's slots {name}, of the kind "name" less its digit, said in several ways.
QUESTIONS = [
    (
        "how can I {change} {level}?",
        "what is the easiest way to {change} {level}?",
        "is there a simple trick to {change} {level}?",
        "I want to {change} {level}. What should I do?",
    ),
    (
        "where can I {trade} {goods}?",
        "what is the right place to {trade} {goods}?",
        "which shop should I visit to {trade} {goods}?",
        "where do people {trade} {goods} these days?",
    ),
    (
        "how do I {begin} {habit}?",
        "what is the easiest way to {begin} {habit}?",
        "what should I do to {begin} {habit}?",
        "I want to {begin} {habit}. How does one do that?",
    ),
    (
        "is it a good idea to {act} {when} {event}?",
        "should I {act} {when} {event}?",
        "{when} {event}, is it fine to {act}?",
        "do you recommend that people {act} {when} {event}?",
    ),
]
REMARKS = (
    "I am {hero} in {city}. ",
    "My neighbor is {hero} from {city}. ",
    "I met {hero} in {city}. ",
    "This is from {hero} in {city}. ",
)
CAPTIONS = [
    (
        "{count} {being1} are {do}ing some {being2} {place}.",
        "{place}, some {being2} are being {do}ed by {count} {being1}.",
        "there are {count} {being1} {do}ing some {being2} {place}.",
        "some {being2} are {do}ed by {count} {being1} {place}.",
    ),
    (
        "a {one} {is} {handle} {thing} {place}.",
        "{place}, a {one} {is} {handle} {thing}.",
        "the {one} {place} {is} {handle} {thing}.",
    ),
]
SCENES = ("{frame}, ", "")
# What a change of a slot takes from the similarity of two captions, 5 when nothing differs.
COSTS = {
    "count": 1.4,
    "place": 0.2,
    "being1": 0.6,
    "being2": 0.6,
    "one": 0.6,
    "thing": 1.0,
    "do": 3.0,
    "handle": 3.0,
    "is": 3.0,
}
# A clause for or against a film, with its strength.
CLAUSES = [
    ("{part} is {strong}", 2),
    ("{part} is {strong}", 2),
    ("{part} is {mild}", 1),
    ("{part} is not {unlike}", 1),
]
SIDES = {
    1: {"strong": "great", "mild": "good", "unlike": "awful"},
    -1: {"strong": "awful", "mild": "weak", "unlike": "great"},
}
# Reviews of two clauses on opposite sides, and which of them decides.
REVIEWS = [
    ("{a}.", "a"),
    ("{a}, but {b}.", "b"),
    ("{a}, but {b}.", "b"),
    ("although {a}, {b}.", "b"),
    ("{a}, even though {b}.", "a"),
    ("{a} and at the same time {b}.", "neither"),
    ("{hero} {deed} {city}.", "neither"),
]
# What precedes a review may be emotional too, and does not count.
OPENINGS = (
    "",
    "in this {film} about the {great} {topic}, ",
    "in this {film} about the {awful} {topic}, ",
)

Meaning = tuple[str, ...]
Row = tuple[list[str], float]


def _meanings(text: str) -> list[Meaning]:
    words = (" ".join(word.split()) for word in text.split(","))
    return [tuple(word.split("/")) for word in words if word]


LEXICON = {kind: [_meanings(part) for part in text.split("|")] for kind, text in WORDS.items()}


class Writer:
    """Draws words and sentences of one split; only dev draws the words after the bar."""

    def __init__(self, seed: Sequence[int], dev: bool) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.dev = dev

    def one(self, items: Sequence[T]) -> T:
        """Draw one of the items."""
        return items[int(self.rng.random() * len(items))]

    def meaning(self, slot: str, unlike: Sequence[Meaning] = ()) -> Meaning:
        """Draw what a slot means, as its synonyms, different from the meanings given."""
        shown, *held = LEXICON[slot.rstrip("12")]
        pool = held[0] if held and self.dev and self.rng.random() < 0.4 else shown
        return self.one([meaning for meaning in pool if meaning not in unlike])

    def word(self, slot: str) -> str:
        """Draw a word for a slot."""
        return self.one(self.meaning(slot))

    def fill(self, forms: Sequence[str]) -> dict[str, Meaning]:
        """Draw a meaning for each slot of a question or caption."""
        slots: dict[str, Meaning] = {}
        for _, slot, _, _ in Formatter().parse(forms[0]):
            if slot:
                slots[slot] = self.meaning(slot, list(slots.values()))
        return slots

    def change(self, slots: dict[str, Meaning], among: list[str], count: int) -> dict[str, Meaning]:
        """Give another meaning to `count` of the slots named."""
        changed = dict(slots)
        for i in self.rng.permutation(len(among))[:count]:
            changed[among[i]] = self.meaning(among[i], [*slots.values(), *changed.values()])
        return changed

    def say(self, forms: Sequence[str], slots: dict[str, Meaning]) -> str:
        """Put the meanings in words."""
        words = {slot: self.one(meaning) for slot, meaning in slots.items()}
        return self.one(forms).format(**words)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def review(writer: Writer) -> Row:
    """Write a film review and its class, 0 (worst) to 4."""
    form, decides = writer.one(REVIEWS)
    opening = writer.one(OPENINGS)
    side = writer.one((1, -1))
    facts = {slot: writer.word(slot) for slot in ("hero", "deed", "city", "film", "topic")}
    facts |= {kind: writer.word(kind) for kind in ("great", "awful")}
    scores = {"neither": 0}
    for name, part in zip("ab", writer.fill(["{part1} {part2}"]).values(), strict=True):
        clause, strength = writer.one(CLAUSES)
        words = {slot: writer.word(kind) for slot, kind in SIDES[side].items()}
        facts[name] = clause.format(part=part[0], **words)
        scores[name] = side * strength
        side = -side
    return [_sentence((opening + form).format(**facts))], scores[decides] + 2


def question_pair(writer: Writer) -> Row:
    """Write two questions; they are duplicates (1) when every slot means the same in both."""
    forms = other = writer.one(QUESTIONS)
    slots = changed = writer.fill(forms)
    draw = writer.rng.random()
    if draw > 0.9:
        other = writer.one([question for question in QUESTIONS if question is not forms])
        changed = writer.fill(other)
    elif draw > 0.42:
        among = [slot for slot in slots if slot in OPPOSITES or draw < 0.55]
        changed = writer.change(slots, among, 1)
    label = float(other is forms and changed == slots)
    texts = [_sentence(writer.say(forms, slots)), _sentence(writer.say(other, changed))]
    return _introduce(writer, REMARKS, texts, label == 0), label


def caption_pair(writer: Writer) -> Row:
    """Write two captions and their similarity: 5 less the cost of each slot that differs."""
    forms = other = writer.one(CAPTIONS)
    slots = changed = writer.fill(forms)
    draw = writer.rng.random()
    if draw > 0.85:
        other = writer.one(CAPTIONS)
        changed = writer.fill(other)
    elif draw > 0.2:
        changed = writer.change(slots, list(slots), writer.one((1, 1, 2, 3)))
    cost = sum(COSTS[slot] for slot in slots if slots[slot] != changed.get(slot))
    texts = [writer.say(forms, slots), writer.say(other, changed)]
    return _introduce(writer, SCENES, texts, cost > 1), round(max(0.0, 5.0 - cost), 1)


def _introduce(writer: Writer, forms: Sequence[str], texts: list[str], differ: bool) -> list[str]:
    """Begin both texts with what does not matter: often the same when the rest differs."""
    begins = [writer.say(forms, writer.fill(forms)) for _ in texts]
    if differ and writer.rng.random() < 0.6:
        begins[1] = begins[0]
    return [_sentence(begin + text) for begin, text in zip(begins, texts, strict=True)]


AUTHORS = {"sst": review, "quora": question_pair, "sts": caption_pair}


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write train and dev files of sst, quora and sts; the same seed gives the same bytes."""
    for number, (name, author) in enumerate(AUTHORS.items()):
        seen: set[str] = set()
        for split, count in (("train", TRAIN), ("dev", DEV)):
            writer = Writer([seed, number, split == "dev"], split == "dev")
            rows: dict[tuple[str, ...], float] = {}
            while len(rows) < count:
                texts, label = author(writer)
                if len(set(texts)) == len(texts) and seen.isdisjoint(texts):
                    rows[tuple(texts)] = label
            seen = {text for texts in rows for text in texts}
            _write(Path(folder), BUILTIN[name], split, rows)


def _write(folder: Path, task: Task, split: str, rows: dict[tuple[str, ...], float]) -> None:
    with atomic_open(folder / task.files[split]) as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["", "id", *task.columns, task.label])
        for index, (texts, label) in enumerate(rows.items()):
            name = hashlib.sha256(f"{task.name} {split} {index}".encode()).hexdigest()[:25]
            table.writerow([index, name, *texts, label])
