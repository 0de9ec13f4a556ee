"""The report of a run: what its pages, plots and model card say, with matplotlib and without."""

import base64
import json
import re
import subprocess
import sys
import types
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tomlkit
import torch
from huggingface_hub import ModelCard

from fastlora.errors import RunError
from fastlora.files import read_toml
from fastlora.multitask import predictor as evaluate
from fastlora.runs.pages import (
    NO_PLOTS,
    code,
    heading,
    plot,
    render,
    table,
    write_pages,
)
from fastlora.runs.session import run_training
from fastlora.training.config import TaskLoraConfig

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """The tags of a page, the texts of each tag's elements, and every address that it names."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.texts = [], [], defaultdict(list)
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.texts[tag].append("")
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset")]

    def handle_data(self, text):
        if self.tags and text.strip():
            self.texts[self.tags[-1]][-1] += text


def run(config):
    run_training(config, quiet=True)
    return config.out


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def plots_without_pixels():
    """Here plots are drawn."""


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


HOSTILE = "![a](../secret.txt) <script>alert(1)</script> `x` | *b* [c](javascript:d) $e$"


def test_text_is_text_in_markdown_and_html():
    """Read back by a Markdown and an HTML parser, every block says what it was given."""
    from markdown_it import MarkdownIt

    blocks = [
        heading(HOSTILE),
        f"# {HOSTILE}",
        [HOSTILE, "1. one", "-0.5"],
        table(["name", HOSTILE], [[HOSTILE, "0.5"]]),
        code(f"````\n{HOSTILE}\n</code>"),
    ]
    markdown = render("report.md", title=HOSTILE, blocks=blocks)
    pages = (
        MarkdownIt("commonmark").enable("table").render(markdown),
        render("report.html", title=HOSTILE, blocks=blocks),
    )
    for page in map(Page, pages):
        assert not {"img", "script", "a", "em", "strong"} & set(page.tags)
        assert page.texts["h1"] == page.texts["h2"] == page.texts["td"][:1] == [HOSTILE]
        assert page.texts["p"] == [f"# {HOSTILE}"]
        assert page.texts["li"] == [HOSTILE, "1. one", "-0.5"]
        assert page.texts["th"] == ["name", HOSTILE]
        assert page.texts["code"][0].rstrip("\n") == f"````\n{HOSTILE}\n</code>"


def test_columns_of_numbers_are_flush_right():
    block = table(["name", "score"], [["a", "0.5"], ["two\nlines", "n/a"]])
    markdown = render("report.md", title="x", blocks=[block])
    assert markdown.splitlines()[2:] == [
        "| name | score |",
        "| --- | ---: |",
        "| a | 0.5 |",
        "| two lines | n/a |",
    ]
    assert '<td class="number">n/a</td>' in render("report.html", title="x", blocks=[block])


def test_pages_embed_the_pictures_that_were_drawn(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    picture = plot(tmp_path, "losses", 1, lambda *_: None)
    write_pages(tmp_path, "Runs & more", [picture, None, "![x](secret.png)"])
    page = Page(read(tmp_path / "report.html"))
    (address,) = page.addresses
    shown = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert shown == (tmp_path / "plots" / "losses.png").read_bytes()
    assert page.texts["title"] == ["Runs & more"]
    assert "\n![losses](plots/losses.png)\n" in read(tmp_path / "report.md")
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"plots", "secret.png", "report.md", "report.html"}


def test_plot_leaves_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot(tmp_path, "x", 4, lambda _, panels: panels[3].set_title("$5 to $9"))
    assert (tmp_path / "plots" / "x.png").read_bytes().startswith(PNG)
    assert dict(matplotlib.rcParams) == before


def test_a_plot_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "plots" / "x.png"
    plot(tmp_path, "x", 1, lambda *_: None)
    before = path.read_bytes()

    def disk_is_full(self, file):
        file.write(PNG)
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        plot(tmp_path, "x", 1, lambda *_: None)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_report_of_a_shared_adapter(tiny_config, capsys):
    config = tiny_config(epochs=2)
    run_training(config)
    folder = config.out
    assert capsys.readouterr().out.rstrip().endswith(str(folder / "report.html"))
    result = json.loads(read(folder / "result.json"))
    text = read(folder / "report.md")
    count = result["parameters"]["lora"] + result["parameters"]["other trainable"]
    assert f"{count:,} trainable parameters" in text
    for name, metric in (("sst", "accuracy"), ("sts", "pearson")):
        assert f"| {name} | {metric} | {result['scores'][name]:.3f} |" in text
    assert re.search(r"\| epoch \| step \| sst .*\n.*\n\| 1 \| 15 .*\n\| 2 \| 30 ", text)
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    settings = read_toml(folder / "run.toml")
    shared = {key: Path(settings[key]).name for key in ("data", "model")}
    assert tomlkit.parse(toml).unwrap() == settings | shared
    assert f"| torch | {torch.__version__} |" in text
    plots = {f"plots/{name}.png" for name in ("training", "predictions")}
    assert {str(p.relative_to(folder)) for p in folder.glob("plots/*")} == plots
    page = Page(read(folder / "report.html"))
    assert len(page.addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_confusion_table_counts_the_dev_rows(tiny_config):
    folder = run(tiny_config())
    rows = [line.split(",") for line in read(folder / "predictions/quora-dev.csv").splitlines()[1:]]
    (found,) = re.findall(
        r"^\| quora: label .*\n.*\n((?:\|.*\n){2})", read(folder / "report.md"), re.M
    )
    cells = [[int(cell) for cell in re.findall(r"\d+", line)[1:]] for line in found.splitlines()]
    expected = [[sum(row[1:] == [b, a] for row in rows) for b in "01"] for a in "01"]
    assert cells == expected
    assert sum(map(sum, cells)) == 24


def test_report_of_adapters_by_task(tiny_config):
    config = tiny_config(adapters="per-task", tasks=("sst", "sts"), sst=TaskLoraConfig(r=1))
    folder = run(config)
    text = read(folder / "report.md")
    assert "[sst]\nr = 1\n" in text
    card = read(folder / "adapter" / "README.md")
    assert 'from_pretrained(encoder, "adapter/sst")' in card
    assert "adapters are in adapter/sts." in card


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_report_without_an_adapter(tiny_config, mode):
    folder = run(tiny_config(mode=mode))
    text = read(folder / "report.md")
    assert "LoRA" not in text
    parts = "heads" if mode == "frozen" else "encoder and heads"
    assert f"; {parts} in " in read(folder / "train.log").splitlines()[-1]
    assert {p.name for p in folder.glob("plots/*")} == {"training.png", "predictions.png"}
    card = read(folder / "adapter" / "README.md")
    assert "peft" not in card
    assert ModelCard(card).data.library_name == "fastlora"


def test_undefined_score_is_reported(tiny_config, monkeypatch):
    monkeypatch.setattr(evaluate.scoring, "metrics", lambda task, *_: {task.metric: None})
    folder = run(tiny_config(tasks=("sts",)))
    assert "| sts | pearson | n/a | n/a | n/a | 24 |" in read(folder / "report.md")


def test_without_matplotlib_the_report_says_so(tiny_config, without_matplotlib):
    folder = run(tiny_config())
    text = read(folder / "report.md")
    page = Page(read(folder / "report.html"))
    assert page.texts["p"].count(NO_PLOTS) == 1 and page.addresses == []
    assert "![" not in text and not (folder / "plots").exists()


@pytest.mark.slow
def test_training_starts_without_what_only_reports_need():
    code = (
        "import sys, fastlora.runs.session as _; print({'matplotlib', 'jinja2'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_card_of_both_kinds_of_adapters_says_that_both_belong(tiny_config):
    folder = run(tiny_config(adapters="shared+per-task", max_steps=1))
    assert "both: the shared adapter and the task's own" in read(folder / "adapter" / "README.md")


def test_model_card(tiny_config, tiny_model, tmp_path, monkeypatch):
    folder = run(tiny_config(out=tmp_path / "x <b>![y](z)"))
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.base_model is None  # a folder here, no model of the hub
    assert card.data.library_name == "peft"
    scores = json.loads(read(folder / "result.json"))["scores"]
    assert f"| sts | pearson | {scores['sts']:.3f} |" in card.text
    assert r"# x &lt;b&gt;!\[y\](z)" in card.text
    for name in ("report.md", "report.html", "adapter/README.md"):
        for path in (tiny_config().data, tiny_model, tmp_path, Path.home()):
            assert f"{path}/" not in read(folder / name) and str(path) not in read(folder / name)
    # The code is the card's own, run where it says.
    monkeypatch.chdir(folder)
    (lines,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names = {}
    exec(lines, names)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found = names["adapted"].eval()(ids).last_hidden_state
        expected = names["trained"].model.encoder(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # PEFT reads a card that is there, and writes it again with its own facts.
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text(str(card))
    names["adapted"].save_pretrained(tmp_path / "saved")
    assert "Scores on the dev data" in read(tmp_path / "saved" / "README.md")


def test_a_wrong_mplbackend_is_one_line(tmp_path, monkeypatch):
    def wrong(name):
        raise ValueError("Key backend: 'bogus' is not a valid value")

    broken = types.ModuleType("matplotlib")
    broken.__spec__, broken.__getattr__ = sys.modules[__name__].__spec__, wrong
    monkeypatch.setitem(sys.modules, "matplotlib", broken)
    with pytest.raises(RunError, match="matplotlib cannot be used: Key backend"):
        plot(tmp_path, "x", 1, lambda *_: None)
