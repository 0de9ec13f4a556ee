"""Seeded inputs for readers: files in many spellings, and damaged ones."""

from __future__ import annotations

import csv
import io
import json
import random
from copy import deepcopy

TOKENS = [b"\x00", b"\xff", b"\xef\xbb\xbf", b'"', b'""', b"\t", b",", b"\n", b"\r\n", b"{", b"}"]
TOKENS += [b"[", b"]", b":", b"null", b"NaN", b"1e999", b"-1", b"9" * 30, b"\\ud800", b"true", b"="]
ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, 2**200, 0.5, 1e308, float("nan"), float("inf")]
ODD += ["", "x", "../..", "/dev/zero", "\ud800", "\u0000", "x" * 5000, [], {}, [[]], {"a": 1}]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """The content with one to four changes at random places."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(content) + 1)
        stop = min(len(content), place + rng.choice((1, 1, 4, 64)))
        kind = rng.randrange(7)
        if kind == 0 and place < len(content):
            changed = bytes([content[place] ^ 1 << rng.randrange(8)])
            content = content[:place] + changed + content[place + 1 :]
        elif kind == 1:
            content = content[:place] + rng.choice(TOKENS) + content[stop:]
        elif kind == 2:
            content = content[:place] + rng.choice(TOKENS) + content[place:]
        elif kind == 3:
            content = content[:place] + content[stop:]
        elif kind == 4:
            content = content[:stop] + content[place:]
        elif kind == 5 and rng.random() < 0.3:
            content = content[:place]
        else:
            content = content[:place] + rng.randbytes(stop - place) + content[stop:]
    return content


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON text with one to three values replaced, removed, renamed or nested deep."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        parent, key = value, None
        while isinstance(parent, (dict, list)) and parent:
            key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
            child = parent[key]
            if not (isinstance(child, (dict, list)) and child) or rng.random() < 0.3:
                break
            parent = child
        if key is None:
            return json.dumps(rng.choice(ODD)).encode()
        kind = rng.randrange(8)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice((f"x{key}", "", "\ud800"))] = parent.pop(key)
        elif kind == 2:
            nested: object = 1
            for _ in range(rng.choice((5, 300))):
                nested = [nested]
            parent[key] = nested
        elif kind == 3 and isinstance(parent[key], (int, float)):
            parent[key] = parent[key] * rng.choice((-1, 2, 0.5, 10**6)) + rng.choice((0, 1))
        else:
            parent[key] = deepcopy(rng.choice(ODD))  # which later changes may go into
    return json.dumps(value).encode()


def csv_text(rng: random.Random) -> tuple[list[tuple[str, int]], bytes, str]:
    """Rows of a text and a class, a file that spells them in some way, and its suffix."""
    parts = ["good", "bad", '"so"', "it's", "a,b", "c;d", "é", "東京", "😀", "x" * 40, "#", "\\n"]
    count = rng.randint(1, 6)
    rows = [
        (" ".join(rng.choices(parts, k=rng.randint(1, 5))), rng.randrange(5)) for _ in range(count)
    ]
    suffix = rng.choice((".csv", ".tsv"))
    delimiter = "\t" if suffix == ".tsv" else rng.choice((",", ";", "\t"))
    header = ["id", "sentence", "sentiment", *rng.sample(["note", "", "more"], rng.randint(0, 2))]
    order = rng.sample(range(len(header)), len(header))
    text = io.StringIO()
    how = {"delimiter": delimiter, "lineterminator": rng.choice(("\n", "\r\n"))}
    writer = csv.writer(text, quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), **how)
    writer.writerow([header[i] for i in order])
    for i, (sentence, label) in enumerate(rows):
        cells = [f"i{i}", sentence, str(label), "-", "-"]
        writer.writerow([cells[i] for i in order])
    return rows, rng.choice((b"", b"\xef\xbb\xbf")) + text.getvalue().encode(), suffix


def toml_text(rng: random.Random) -> bytes:
    """Settings of a run, each of a value that it may have or of an odd one."""
    values = {
        "r": (1, 8, 64),
        "alpha": (8, 16.5),
        "dropout": (0.0, 0.1),
        "lr": (1e-3, 5e-5),
        "epochs": (1, 10),
        "seed": (0, 7),
        "mode": ("lora", "full", "frozen"),
        "tasks": (["sst"], ["sst", "sts"]),
        "targets": (["query"], ["query", "value"]),
        "schedule": ("linear", "cosine"),
        "model": ("minilm", "some/where"),
        "tokens_per_batch": (1, 4096),
        "compile": (True, False),
    }
    lines = []
    for key in rng.sample(list(values), rng.randint(1, 8)):
        odd = rng.random() < 0.1
        value = rng.choice(ODD[1:12] if odd else values[key])
        lines.append(f"{key} = {json.dumps(value)}")
    if rng.random() < 0.3:
        lines.append(f"[sst]\nr = {rng.choice((1, 4, -1))}")
    return ("\n".join(lines) + "\n").encode()
