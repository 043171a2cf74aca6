"""The report of a run: one page without network that shows what the record holds, and nothing half-written."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import llama

from reparam_peft import Plan, Record, ReparamConfig, SearchResult, Trial, plan, write_report
from reparam_peft.report import page as report
from reparam_peft.runtime.files import unfinished, write_whole

BATCHES = [{"input_ids": torch.arange(3, 51).reshape(2, 24)}]
TRIALS = tuple(
    Trial("whitened", keep, int(86016 * keep), 20 / keep, keep > 0.6, 0.4 - keep / 3, 1.0) for keep in (0.5, 0.7, 0.9)
)


@pytest.fixture(scope="module")
def made() -> Plan:
    return plan(llama(), ReparamConfig(target_modules="all-linear", keep=0.6), BATCHES, progress=False)


@pytest.fixture(scope="module")
def record(made: Plan) -> Record:
    sizes = {"dense_parameters": 100, "stored_parameters": 60, "dense_bytes": 400, "stored_bytes": 240}
    return Record(
        made,
        model="a/<model>",
        settings={"keep": 0.6, "target_modules": ["q_proj", "v_proj"]},
        sizes={"targets": sizes, "model": sizes},
        evaluation={"dense perplexity": 20.0, "perplexity": 25.0, "accuracy": 0.5},
        search=SearchResult(TRIALS, TRIALS[1], "perplexity", 20.0, 86016, 30.0, False),
        blocks=[{"block": str(i), "original": 0.1 * i, "before": 0.1 * i + 0.1, "after": 0.1 * i + 0.05} for i in range(3)],
        losses=[3.0, 2.0],
        samples=[{"prompt": "<script>alert(1)</script>", "dense": "yes & no", "compressed": "no"}],
        speed={"prefill_ms": 10.0, "decode_ms": None, "peak_bytes": 7, "baseline": {"prefill_ms": 20.0, "peak_bytes": 0}},
        angles={"self_attn.q_proj": {0: 0.5}, "mlp.up_proj": {}},
    )


class Page(HTMLParser):
    """What a page refers to, and its text; every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_shows_what_the_record_holds(record: Record, tmp_path: Path) -> None:
    path = write_report(record, tmp_path / "report")
    assert path == tmp_path / "report" / "index.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    text = "\n".join(page.words)
    pictures = sorted(file.name for file in path.parent.glob("*.png"))
    assert pictures == sorted(f"{name}.png" for name in report._NAMES)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in path.parent.glob("*.png"))
    assert [link for link in page.links if not link.startswith("data:image/png;base64,")] == []
    assert len(page.links) == len(pictures)
    for shown in ("a/<model>", "<script>alert(1)</script>", "q_proj, v_proj", "1.250", "60.0%", "chosen", "+0.223", "0.50"):
        assert shown in text, shown
    assert "<script" not in path.read_text(encoding="utf-8")
    for module in record.plan.modules:
        assert module.name in text
    assert {file.name for file in path.parent.iterdir()} == {"index.html", *pictures}


def test_what_is_not_known_is_left_out(made: Plan, tmp_path: Path) -> None:
    bare = Plan(
        tuple(type(m)(m.name, m.shape, m.rank, m.stored_parameters) for m in made.modules), 0.6, "svd", "uniform", "factors"
    )
    page = write_report(Record(bare), tmp_path / "report").read_text(encoding="utf-8")
    assert {file.name for file in (tmp_path / "report").glob("*.png")} == {"ranks.png"}
    assert "No spectra" in page
    assert "Search" not in page


def test_a_report_replaces_an_earlier_one_and_nothing_else(
    record: Record, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_png", lambda draw: b"a picture")
    write_report(record, tmp_path / "report")
    (tmp_path / "report" / "own.png").write_bytes(b"mine")
    write_report(Record(made), tmp_path / "report")
    names = {file.name for file in (tmp_path / "report").glob("*.png")}
    assert names == {"ranks.png", "spectra.png", "effective_ranks.png", "own.png"}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my site")
    (tmp_path / "site" / "search.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="other files and no report"):
        write_report(record, tmp_path / "site")
    assert (tmp_path / "site" / "search.png").read_bytes() == b"mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="other files and no report"):
        write_report(record, tmp_path / "other")
    with pytest.raises(FileExistsError, match="no report"):
        write_report(record, tmp_path / "other" / "thesis.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="link is a link, and nothing is written through links"):
        write_report(record, tmp_path / "link")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_a_report_that_was_killed_is_written_again(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(report, "_png", lambda draw: b"a picture")

    def killed(path: Path, content: Any) -> None:
        if len(written) == before:
            raise KeyboardInterrupt
        written.append(path)
        write_whole(path, content)

    for before in (0, 1, 2):
        written.clear()
        with monkeypatch.context() as patches:
            patches.setattr(report, "write_whole", killed)
            with pytest.raises(KeyboardInterrupt):
                write_report(record, tmp_path / str(before))
        unfinished(tmp_path / str(before) / "index.html")
        assert write_report(record, tmp_path / str(before)).exists()


def test_a_drawing_that_fails_leaves_what_was_there(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    png = report._png
    monkeypatch.setattr(report, "_png", lambda draw: b"a picture")
    path = write_report(record, tmp_path / "report")
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    drawn: list[Any] = []

    def only_the_last(draw: Any) -> bytes:
        drawn.append(draw)
        return png(draw) if len(drawn) == len(before) - 1 else b"another picture"  # beside the page

    def fails(*_: object) -> None:
        raise MemoryError("no picture")

    monkeypatch.setattr(report, "_png", only_the_last)
    monkeypatch.setattr(report, "plot_angles", fails)
    with pytest.raises(MemoryError, match="no picture"):
        write_report(record, tmp_path / "report")
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_no_figure_stays_open(record: Record, tmp_path: Path) -> None:
    from matplotlib import pyplot

    pyplot.close("all")
    write_report(record, tmp_path / "report")
    assert pyplot.get_fignums() == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_all_pictures(record: Record, tmp_path: Path) -> None:
    path = write_report(record, tmp_path / "report")
    page = path.read_text(encoding="utf-8")
    # A page's own script counts what the browser could show, since a broken picture has no width.
    counts = "document.body.dataset.shown = [...document.images].filter(i => i.complete && i.naturalWidth > 100).length"
    (tmp_path / "counted.html").write_text(page.replace("</body>", f"<script>onload = () => {{ {counts} }}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    got = subprocess.run(
        ["chromium", *flags, f"file://{tmp_path / 'counted.html'}"], capture_output=True, text=True, timeout=120
    )
    assert re.search(r'data-shown="(\d+)"', got.stdout)[1] == str(len(report._NAMES))
