"""Write the demo corpus: made-up reviews, questions and captions in the CS224N files' format.

    python bench/make_demo.py fastlora/data/demo

The labels follow rules that frozen features see badly and an adapted encoder learns: what a "but"
or a "not" does to a review, which few words of two questions or captions matter and which do not.
No sentence is in both splits, and dev uses words that training never shows, so that an encoder's
pre-training is needed too.
"""

import csv
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np
import tomlkit

from fastlora.data.tasks import BUILTIN

TRAIN, DEV = 1400, 350

_TABLES = tomlkit.parse(Path(__file__).with_name("demo.toml").read_text(encoding="utf-8")).unwrap()
COSTS, FORMS = _TABLES["costs"], _TABLES["forms"]
SIDES = {1: _TABLES["for"], -1: _TABLES["against"]}

Meaning = tuple[str, ...]  # synonyms
Row = tuple[list[str], float]


def _meanings(text: str) -> list[Meaning]:
    words = (" ".join(word.split()) for word in text.split(","))
    return [tuple(word.split("/")) for word in words if word]


LEXICON = {
    kind: [_meanings(part) for part in text.split("|")] for kind, text in _TABLES["words"].items()
}


class Writer:
    """Draws words and sentences of one split; only dev draws the words after the bar."""

    def __init__(self, seed: Sequence[int], dev: bool) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.dev = dev

    def one(self, items: Sequence) -> Any:
        """Draw one of the items."""
        return items[int(self.rng.random() * len(items))]

    def meaning(self, slot: str, unlike: Sequence[Meaning] = ()) -> Meaning:
        """Draw what a slot means, different from the meanings given."""
        shown, *held = LEXICON[slot.rstrip("12")]
        pool = held[0] if held and self.dev and self.rng.random() < 0.4 else shown
        return self.one([meaning for meaning in pool if meaning not in unlike])

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

    def introduce(self, forms: Sequence[str], texts: list[str], differ: bool) -> list[str]:
        """Begin both texts with what does not matter: often the same when the rest differs."""
        begins = [self.say(forms, self.fill(forms)) for _ in texts]
        if differ and self.rng.random() < 0.6:
            begins[1] = begins[0]
        return [_sentence(begin + text) for begin, text in zip(begins, texts, strict=True)]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def review(writer: Writer) -> Row:
    """Write a film review and its class, 0 (worst) to 4."""
    form, decides = writer.one(FORMS["reviews"])
    opening = writer.one(FORMS["openings"])
    side = writer.one((1, -1))
    kinds = ("hero", "deed", "city", "film", "topic", "great", "awful")
    facts = {kind: writer.one(writer.meaning(kind)) for kind in kinds}
    scores = {"neither": 0}
    for name, part in zip("ab", writer.fill(["{part1} {part2}"]).values(), strict=True):
        clause, strength = writer.one(FORMS["clauses"])
        words = {slot: writer.one(writer.meaning(kind)) for slot, kind in SIDES[side].items()}
        facts[name] = clause.format(part=part[0], **words)
        scores[name] = side * strength
        side = -side
    return [_sentence((opening + form).format(**facts))], scores[decides] + 2


def question_pair(writer: Writer) -> Row:
    """Write two questions; they are duplicates (1) when every slot means the same in both."""
    forms = other = writer.one(FORMS["questions"])
    slots = changed = writer.fill(forms)
    draw = writer.rng.random()
    if draw > 0.9:
        other = writer.one([question for question in FORMS["questions"] if question is not forms])
        changed = writer.fill(other)
    elif draw > 0.42:
        among = [slot for slot in slots if slot in FORMS["opposites"] or draw < 0.55]
        changed = writer.change(slots, among, 1)
    label = float(other is forms and changed == slots)
    texts = [_sentence(writer.say(forms, slots)), _sentence(writer.say(other, changed))]
    return writer.introduce(FORMS["remarks"], texts, label == 0), label


def caption_pair(writer: Writer) -> Row:
    """Write two captions and their similarity: 5 less the cost of each slot that differs."""
    forms = other = writer.one(FORMS["captions"])
    slots = changed = writer.fill(forms)
    draw = writer.rng.random()
    if draw > 0.85:
        other = writer.one(FORMS["captions"])
        changed = writer.fill(other)
    elif draw > 0.2:
        changed = writer.change(slots, list(slots), writer.one((1, 1, 2, 3)))
    cost = sum(COSTS[slot] for slot in slots if slots[slot] != changed.get(slot))
    texts = [writer.say(forms, slots), writer.say(other, changed)]
    return writer.introduce(FORMS["scenes"], texts, cost > 1), round(max(0.0, 5.0 - cost), 1)


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write train and dev files of sst, quora and sts; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    authors = {"sst": review, "quora": question_pair, "sts": caption_pair}
    for number, (name, author) in enumerate(authors.items()):
        task, seen = BUILTIN[name], set[str]()
        for split, count in (("train", TRAIN), ("dev", DEV)):
            writer = Writer([seed, number, split == "dev"], split == "dev")
            rows: dict[tuple[str, ...], float] = {}
            while len(rows) < count:
                texts, label = author(writer)
                if len(set(texts)) == len(texts) and seen.isdisjoint(texts):
                    rows[tuple(texts)] = label
            seen = {text for texts in rows for text in texts}
            with (folder / task.files[split]).open("w", encoding="utf-8", newline="") as file:
                table = csv.writer(file, delimiter="\t", lineterminator="\n")
                table.writerow(["", "id", *task.columns, task.label])
                for index, (row, label) in enumerate(rows.items()):
                    identity = hashlib.sha256(f"{name} {split} {index}".encode()).hexdigest()[:25]
                    table.writerow([index, identity, *row, label])


if __name__ == "__main__":
    write_demo(Path(sys.argv[1]))
