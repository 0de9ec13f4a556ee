"""Strict reading: every quirk of the real files, and every error a user can meet."""

import csv
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from fastlora.data.reading import encode_rows, read_rows
from fastlora.data.source import resolve
from fastlora.data.tasks import BUILTIN, Task
from fastlora.data.token_cache import load_tasks
from fastlora.data.tokenizer import Encoded, Tokenizer
from fastlora.errors import UserError

SST, QUORA, STS = BUILTIN["sst"], BUILTIN["quora"], BUILTIN["sts"]
SIBLING = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = Path(os.environ.get("FASTLORA_DATA", SIBLING))
needs_real_data = pytest.mark.skipif(
    not (REAL / "quora-train.csv").is_file(), reason=f"no CS224N files in {REAL} (FASTLORA_DATA)"
)
HEADER = "\tid\tsentence\tsentiment\n"
PAIRS = "\tid\tsentence1\tsentence2\tis_duplicate\n"


def write(folder, text, name="ids-sst-train.csv", encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def complaint(path, task=SST, **options):
    with pytest.raises(UserError) as error:
        read_rows(path, task, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), path.name)


class LetterTokenizer:
    """One token a letter; what encode_rows needs of a tokenizer."""

    def encode(self, texts, second=None, max_length=6):
        if second is not None:
            return self.encode([x + y for x, y in zip(texts, second, strict=True)], None, 512)
        lengths = [min(len(text) + 2, max_length) for text in texts]
        offsets = np.cumsum([0, *lengths])
        cut = sum(len(text) + 2 > max_length for text in texts)
        ids = np.arange(offsets[-1], dtype=np.int32)
        return Encoded(ids, offsets, np.zeros(len(ids), np.int8), cut)


def test_plain_rows(tmp_path):
    rows = read_rows(write(tmp_path, HEADER + "0\tab\t Fine .\t3\n1\tcd\tNA\t0.0\n"), SST)
    assert (rows.ids, rows.texts) == (["ab", "cd"], (["Fine .", "NA"],))
    assert rows.labels.dtype == np.float64
    assert (rows.labels.tolist(), rows.skipped, rows.empty) == ([3, 0], 0, 0)


def test_paths_may_be_strings(tmp_path, tiny_model, minilm):
    path = write(tmp_path, HEADER + "0\tab\tgood\t3\n")
    assert read_rows(str(path), SST).ids == ["ab"]
    tokenizer = Tokenizer.from_folder(str(tiny_model))
    data = load_tasks(str(tmp_path), [SST], "train", tokenizer)
    assert data["sst"].ids == ["ab"]
    assert resolve(minilm) == resolve(str(minilm))


def test_a_limit_takes_rows_from_the_whole_file(tmp_path):
    lines = [f"{i}\tid{i}\ttext {i}\t{i // 2}\n" for i in range(10)]
    path = write(tmp_path, HEADER + "".join(lines))
    rows = read_rows(path, SST, limit=5)
    assert rows.labels.tolist() == [0, 1, 2, 3, 4]
    assert (rows.ids[1], rows.texts[0][1]) == ("id2", "text 2")
    assert len(read_rows(path, SST, limit=99).ids) == 10


def test_bom_crlf_and_quotes(tmp_path):
    text = "\ufeff" + HEADER + '0\ta\t"He said ""no"",\nand left"\t1\n1\tb\tdon"t\t2\n'
    rows = read_rows(write(tmp_path, text.replace("\n", "\r\n")), SST)
    assert rows.texts == (['He said "no",\r\nand left', 'don"t'],)
    assert rows.labels.tolist() == [1, 2]


def test_only_newlines_and_returns_end_a_line(tmp_path):
    rows = read_rows(write(tmp_path, HEADER + "0\ta\tone\u2028two\x0bthree\x85four\t1\n"), SST)
    assert rows.texts[0] == ["one\u2028two\x0bthree\x85four"]


def test_columns_are_found_by_name(tmp_path):
    test_file = write(tmp_path, "0\t\tid\tsentence\n0\t0\tab\tNo label here .\n")
    rows = read_rows(test_file, SST, labelled=False)
    assert (rows.ids, rows.texts, rows.labels) == (["ab"], (["No label here ."],), None)
    swapped = "is_duplicate,sentence2,sentence1\n1,B,A\n"
    rows = read_rows(write(tmp_path, swapped, "pairs.csv"), QUORA)
    assert (rows.texts, rows.ids) == ((["A"], ["B"]), ["0"])


def test_tsv_with_one_column_keeps_commas_and_blank_lines(tmp_path):
    rows = read_rows(write(tmp_path, "sentence\nyes, it is\n\nno\n", "x.tsv"), SST, labelled=False)
    assert rows.texts[0] == ["yes, it is", "", "no"]
    assert (rows.ids, rows.empty) == (["0", "1", "2"], 1)


def test_jsonl(tmp_path):
    lines = [
        {"id": 7, "sentence1": "A", "sentence2": "", "similarity": 4.2},
        {"sentence1": "C\u2028c", "sentence2": "D", "similarity": "3", "more": None},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    rows = read_rows(write(tmp_path, text, "x.JSONL"), STS)
    assert (rows.ids, rows.texts) == (["7", "1"], (["A", "C\u2028c"], ["", "D"]))
    assert rows.labels == pytest.approx([4.2, 3])
    assert rows.empty == 1


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{", "not a JSON object: Expecting property name"),
        ('[{"sentence": "x"}]', """it is [{"sentence": "x"}] (expected one object on each line)"""),
        ("[" * 100_000, "not a JSON object: maximum recursion depth"),
        (r'{"sentence": "\uD83d", "sentiment": 1}', "object: 'utf-8' codec can't encode"),
        ('{"sentence": "x", "sentiment": 1, "sentiment": 2}', "key 'sentiment' is there twice"),
        ('{"sentence": "x"}', "column 'sentiment' is missing"),
        ('{"sentence": null, "sentiment": 1}', "column 'sentence' is null"),
        ('{"sentence": "x", "sentiment": NaN}', "column 'sentiment' is NaN (expected text"),
        ('{"sentence": NaN, "sentiment": 1}', "column 'sentence' is NaN (expected text"),
        ('{"sentence": "x", "sentiment": -Infinity}', "column 'sentiment' is -Infinity"),
        ('{"sentence": "x", "sentiment": true}', "column 'sentiment' is 'true'"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, found):
    good = '{"sentence": "x", "sentiment": 1}\n'
    path = write(tmp_path, good + line + "\n" + good, "x.jsonl")
    message = complaint(path)
    assert message.startswith("x.jsonl:2: ")
    assert found in message
    assert read_rows(path, SST, bad_rows="skip").ids == ["0", "2"]
    assert read_rows(path, SST, bad_rows="skip", limit=1).ids == ["0"]


def test_bad_label_names_the_line_after_a_quoted_newline(tmp_path):
    text = PAIRS + '0\ta\t"one\ntwo"\tx\t1\n1\tb\tp\tq\t\n2\tc\tp\tq\t\n3\td\tp\tq\t\n'
    path = write(tmp_path, text, "quora-train.csv")
    assert complaint(path, QUORA) == (
        "quora-train.csv:4: column 'is_duplicate' is '' (expected 0 or 1). "
        "3 such rows; fix them or pass --bad-rows skip"
    )
    rows = read_rows(path, QUORA, bad_rows="skip")
    assert (rows.ids, rows.skipped) == (["a"], 3)


def test_one_bad_row_and_rows_bad_in_two_ways(tmp_path):
    one = write(tmp_path, HEADER + "0\ta\tx\t1\n1\tb\tx\t9\n")
    assert complaint(one) == (
        "ids-sst-train.csv:3: column 'sentiment' is '9' (expected 0, 1, 2, 3 or 4). "
        "1 such row; fix it or pass --bad-rows skip"
    )
    two = write(tmp_path, HEADER + "0\ta\tx\ty\t1\n\n1\tb\tx\t9\n2\tc\tx\t1\n")
    assert complaint(two) == (
        "ids-sst-train.csv:2: 5 fields (the header has 4). "
        "2 bad rows; fix them or pass --bad-rows skip"
    )
    assert read_rows(two, SST, bad_rows="skip").skipped == 2


LINE = re.compile(r"\.(?:csv|tsv):(\d+): ")
# Files whose quotes are not those of the CSV format: the line to name, and the labels of the rows
# that are good nevertheless.
STRAY = {
    "open, with a quoted row below": ('a\t1\n"b\t1\n"c"\t2\n', 3, [1, 2]),
    "open on the last line": ('a\t1\nb\t2\n"c\t3\n', 4, [1, 2]),
    "open on the last line, without its end": ('a\t1\n"b\t2', 3, [1]),
    "closed before its field ends": ('"good" film\t1\nb\t2\n', 2, [2]),
    "two, rows apart": ('"a\t1\nb\t2\nc"\t3\nd\t4\n', 2, [2, 3, 4]),
    "two, in lines that follow": ('"a\t1\nb"\t2\nc\t3\n', 2, [2, 3]),
    "three": ('"a\t1\nb"\t2\n"c\t3\nd\t4\n', 2, [2, 4]),
    "two, with CRLF": ('"a\t1\r\nb"\t2\r\nc\t3\r\n', 2, [2, 3]),
    "two, with commas": ('"a,1\nb,2\nc",3\nd,4\n', 2, [2, 3, 4]),
}


@pytest.mark.parametrize("case", STRAY)
def test_stray_quotes_lose_no_row(tmp_path, case):
    body, line, rest = STRAY[case]
    header = "sentence\tsentiment\n" if "\t" in body else "sentence,sentiment\n"
    path = write(tmp_path, header + body)
    message = complaint(path)
    assert LINE.search(message)[1] == str(line)
    assert "--quoting none" in message
    rows = read_rows(path, SST, bad_rows="skip")
    assert rows.labels.tolist() == rest
    assert rows.skipped == len(body.splitlines()) - len(rest)
    plain = read_rows(path, SST, quoting="none")
    cells = [re.split("[\t,]", row) for row in body.splitlines()]
    assert plain.texts[0] == [text for text, _ in cells]
    assert plain.labels.tolist() == [int(label) for _, label in cells]


def test_stray_quotes_between_the_last_and_the_first_column(tmp_path):
    body = 'x\t1\t"a\ny"\t0\tb\nz\t1\tc\n'
    path = write(tmp_path, "sentence1\tis_duplicate\tsentence2\n" + body)
    assert complaint(path, QUORA).startswith("ids-sst-train.csv:2: the quotes do not balance")
    rows = read_rows(path, QUORA, bad_rows="skip")
    assert (rows.texts, rows.skipped) == ((['y"', "z"], ["b", "c"]), 1)
    assert complaint(path, QUORA, labelled=False).startswith("ids-sst-train.csv:2: ")


def test_a_text_of_many_lines_is_called_long(tmp_path):
    path = write(tmp_path, 'sentence,sentiment\n"' + "a film\n" * 20_000 + '",1\n')
    assert "csv:2: a text is long (it is safe in JSONL), or the quotes" in complaint(path)


@pytest.mark.parametrize("text", ["Dear sir,\nbye", "Dear sir, 3rd\nyes, 4 times\nbye", "1,\n2"])
def test_quoted_texts_of_several_lines_are_read_whole(tmp_path, text):
    for header, row in (("sentence,sentiment", '"{}",1'), ("sentiment\tsentence", '1\t"{}"')):
        body = "".join(f"{row.format(text)}\n" for _ in range(3))
        rows = read_rows(write(tmp_path, f"{header}\n{body}"), SST)
        assert rows.texts == ([text] * 3,)
        rows = read_rows(write(tmp_path, f"{header}\n{body}"), SST, labelled=False)
        assert rows.texts == ([text] * 3,)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("x.tsv", 'sentence\n"good\nbad\nfine"\nlast\n'),
        ("x.csv", 'sentence\n"good\nbad, so bad\nfine"\nlast\n'),
        ("x.csv", 'id,sentence\n1,"good\n2,bad"\n3,fine\n'),
        ("x.csv", 'id,sentence\n1,"good, ok\n2,bad"\n3,fine\n'),
        ("x.csv", 'id,sentence,sentiment\n1,"good,\n2,bad",\n3,fine,\n'),
    ],
)
def test_without_labels_lines_in_quotes_are_refused_where_they_may_be_rows(tmp_path, name, body):
    path = write(tmp_path, body, name)
    message = complaint(path, labelled=False)
    assert message.startswith(f"{name}:2: ")
    assert "--quoting none" in message and "JSONL" in message
    split = write(tmp_path, 'id,sentence\n1,"good\nbad"\n', "split.csv")  # bad" is no row
    assert read_rows(split, SST, labelled=False).texts == (["good\nbad"],)


SPANS = {  # for `text,label`, whether the quotes of the first row may join several rows
    '"good,a\nbad,b\nfine",c\nx,b\ny,c': True,  # the class "a" is in the first line alone
    '"good,a\r\nbad,b\r\n\r\nfine",c\nx,b\ny,c': True,
    '"paid 1,234\nfine",c\nx,b': True,
    '"Dear sir, well\nfine, bye",c\nx,b': False,
    '"Dear sir,\nbye",c\nx,b': False,
    '"good,well\nbad\nbye",c\nx,b': False,
}


@pytest.mark.parametrize("body", SPANS)
@pytest.mark.parametrize("labels", [(), ("b", "c")])
def test_quotes_that_may_join_rows_are_refused_whatever_the_classes(tmp_path, body, labels):
    path = write(tmp_path, f"text,label\n{body}\n", "x.csv")
    task = Task("own", "classification", ("text",), "label", {}, labels)
    if SPANS[body]:
        message = complaint(path, task, labelled=bool(labels))
        assert message.startswith("x.csv:2: ") and "pass --quoting none" in message
        rows = read_rows(path, task, labelled=False, bad_rows="skip")
        assert len(rows.ids) == len([line for line in body.splitlines() if line]) - 1
    else:
        assert len(read_rows(path, task, labelled=bool(labels)).ids) == 2


def test_a_row_with_too_many_fields_in_two_lines_loses_one_line(tmp_path):
    body = 'id\tsentence\tsentiment\n0\ta\t"1\n1"\tb\t2\n2\tc\t3\n'
    rows = read_rows(write(tmp_path, body), SST, bad_rows="skip")
    assert (rows.skipped, rows.labels.tolist()) == (1, [2, 3])


def test_a_header_with_stray_quotes_is_refused(tmp_path):
    path = write(tmp_path, 'sentence\t"sentiment\nx\t1\n')
    for policy in ("error", "skip"):
        assert ":1: the header's quotes do not balance" in complaint(path, bad_rows=policy)


def test_many_stray_quotes_do_not_slow_reading_down(tmp_path):
    body = "".join(f'"{i}\t{i % 5}\n' for i in range(50_000))
    path = write(tmp_path, "sentence\tsentiment\nx\t1\n" + body)
    start = time.process_time()
    rows = read_rows(path, SST, bad_rows="skip")
    assert (rows.skipped, len(rows.ids)) == (50_000, 1)
    assert time.process_time() - start < 5


def test_a_text_may_be_longer_than_the_csv_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    text = "good " * 30_000
    rows = read_rows(write(tmp_path, f"id\tsentence\tsentiment\n1\t{text}\t3\n", "x.TSV"), SST)
    assert rows.texts[0] == [text.strip()] and csv.field_size_limit() == limit


def test_json_values_are_the_text_that_the_file_has(tmp_path):
    lines = [
        '{"id": 1e3, "sentence": 1.50, "sentiment": 3.0}',
        '{"sentence": true, "sentiment": 1}',
        r'{"sentence": "\uD83d\ude00", "sentiment": 0}',
    ]
    rows = read_rows(write(tmp_path, "\n".join(lines), "x.jsonl"), SST)
    assert (rows.ids, rows.texts) == (["1e3", "1", "2"], (["1.50", "true", "😀"],))
    assert rows.labels.tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", ":1: 0 columns named 'sentence' in [] (expected 1)"),
        ("\ufeff\n\n", ":1: 0 columns named 'sentence' in [] (expected 1)"),
        (HEADER, "ids-sst-train.csv: no rows"),
        ("\tid\tsentence\n0\ta\tx\n", "0 columns named 'sentiment' in ['', 'id', 'sentence']"),
        (HEADER[:-1] + "\tsentiment\n", ":1: 2 columns named 'sentiment'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, found):
    assert found in complaint(write(tmp_path, text), bad_rows="skip")


def test_wrong_encodings_and_missing_files(tmp_path):
    latin = write(tmp_path, HEADER + "0\ta\tcafé\t1\n", encoding="latin-1")
    assert "ids-sst-train.csv:2: not UTF-8" in complaint(latin)
    text = "\ufeff".encode().decode("latin-1") + "sentence,sentiment\ncafé"
    marked = write(tmp_path, text, encoding="latin-1")
    assert "ids-sst-train.csv:2: not UTF-8" in complaint(marked)
    assert complaint(tmp_path / "no.csv") == "no.csv: cannot be read: No such file or directory"
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv: cannot be read" in complaint(tmp_path / "folder.csv")
    os.mkfifo(tmp_path / "pipe.csv")  # reading it would wait for ever
    assert "pipe.csv: cannot be read: not a regular file" in complaint(tmp_path / "pipe.csv")


def test_reading_the_size_of_quora_takes_about_a_second(tmp_path):
    row = "\t0123456789abcdef012345678\tWhat is it like to be a whale ?\tHow are whales ?\t1.0\n"
    path = write(tmp_path, PAIRS + "".join(f"{i}{row}" for i in range(150_000)))
    start = time.process_time()  # not the clock's: other tests run beside it
    assert len(read_rows(path, QUORA).ids) == 150_000
    assert time.process_time() - start < 5


def test_encoding_pairs_apart_and_joint(tmp_path):
    rows = read_rows(write(tmp_path, PAIRS + "0\ta\tabc\tde\t1\n1\tb\tabcdef\t\t0\n"), QUORA)
    apart = encode_rows(rows, QUORA, LetterTokenizer())
    assert (len(apart), len(apart.columns), apart.truncated, apart.empty) == (2, 2, 1, 1)
    assert [np.diff(column.offsets).tolist() for column in apart.columns] == [[5, 6], [4, 2]]
    joint = encode_rows(rows, QUORA, LetterTokenizer(), pairs="joint")
    assert (len(joint.columns), joint.columns[0].offsets[1]) == (1, 7)


@needs_real_data
@pytest.mark.parametrize(
    ("name", "split", "count", "first"),
    [
        ("sst", "train", 8544, 3),
        ("sst", "dev", 1101, 3),
        ("cfimdb", "train", 1707, None),
        ("quora", "dev", 3000, 1),
        ("sts", "train", 5440, 2.0),
    ],
)
def test_real_files(name, split, count, first):
    task = BUILTIN[name]
    rows = read_rows(REAL / task.files[split], task)
    assert (len(rows.ids), rows.skipped, rows.empty) == (count, 0, 0)
    assert first is None or rows.labels[0] == first


@needs_real_data
def test_the_two_unlabelled_quora_rows():
    path = REAL / "quora-bad-rows.csv"
    assert "quora-bad-rows.csv:2: column 'is_duplicate' is '' (expected 0 or 1). 2 such rows" in (
        complaint(path, QUORA)
    )
    assert "no rows" in complaint(path, QUORA, bad_rows="skip")
    rows = read_rows(path, QUORA, labelled=False)
    assert (len(rows.ids), rows.empty) == (2, 1)


def starter_text(text, pair):
    """Prepare a text as the CS224N starter code does."""
    text = text.lower()
    for mark in ".?,'" if pair else "":
        text = text.replace(mark, f" {mark}")
    return " ".join(text.split()) if pair else text.strip()


@needs_real_data
@pytest.mark.parametrize("name", list(BUILTIN))
def test_the_starters_preparation_changes_no_token(name):
    tokenizer = Tokenizer.from_folder(resolve("minilm").folder)
    task = BUILTIN[name]
    rows = read_rows(REAL / task.files["dev"], task)
    for texts in rows.texts:
        ours = tokenizer.encode(texts[:1000])
        theirs = tokenizer.encode([starter_text(text, task.is_pair) for text in texts[:1000]])
        assert np.array_equal(ours.offsets, theirs.offsets)
        assert np.array_equal(ours.ids, theirs.ids)
