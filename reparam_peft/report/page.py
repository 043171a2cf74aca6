"""The report of a run: one self-contained HTML file, and its pictures as PNG files."""

from __future__ import annotations

import base64
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..display.tables import html_table
from ..planning.module_plan import ModulePlan
from ..planning.plan import Plan
from ..runtime.files import is_ours, write_whole, writing
from .plots import plot_angles, plot_blocks, plot_effective_ranks, plot_losses, plot_predictions, plot_spectra
from .record import Record

INDEX = "index.html"
TEMPLATE = "page.html.jinja"
GENERATOR = '<meta name="generator" content="reparam_peft">'  # by which a report is known


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Attributes:
        caption: what it shows.
        png: the file.
    """

    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """The file as text, for a page that holds it."""
        return base64.b64encode(self.png).decode()


def write_report(record: Record, folder: str | Path) -> Path:
    """Write a report that a browser shows without network: `index.html` with its pictures inside, and the same as PNG files.

    What the record does not know is left out. All is drawn before the first file is written.

    Args:
        record: of the run.
        folder: made where it does not exist; files of an earlier report in it are replaced.

    Returns:
        The path of `index.html`.

    Raises:
        FileExistsError: the folder holds other files and no report, or is a link.
        ImportError: matplotlib is not installed.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    check_report_folder(folder)
    pictures = {name: Picture(caption, _png(draw)) for name, caption, draw in _pictures(record)}
    page = _page(record, pictures)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / INDEX, page)  # first: by it the folder is known, whenever this is killed
        for name, picture in pictures.items():
            write_whole(folder / f"{name}.png", picture.png)
        for path in folder.glob("*.png"):
            if path.stem not in pictures and path.stem in _NAMES:
                path.unlink()
    return folder / INDEX


def check_report_folder(folder: Path) -> None:
    """Raise, before any work, what `write_report` would raise of a folder or of a library that is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("reports need matplotlib: pip install 'reparam_peft[plot]'")
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link, and nothing is written through links; give the folder that it leads to.")
    index = folder / INDEX
    ours = index.is_file() and GENERATOR in index.read_text(encoding="utf-8", errors="replace")
    if folder.exists() and (folder.is_file() or not (ours or all(map(is_ours, folder.iterdir())))):
        raise FileExistsError(f"{folder} holds other files and no report; give a new folder, or an empty one.")


_NAMES = {"ranks", "spectra", "effective_ranks", "predictions", "blocks", "training", "search", "angles"}


def _pictures(record: Record) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Name, caption and drawing of each picture that the record has the data for."""
    plan = record.plan
    if plan.modules:
        yield "ranks", "What is stored of each matrix: the ranks that were chosen, over depth.", plan.plot
    if record.search is not None:
        caption = "Size against quality: every trial of the search, and the front that no other trial beats in both."
        yield "search", caption, record.search.plot
    if _has_spectra(plan):
        yield (
            "spectra",
            "What each direction of each matrix is predicted to cost, from the first that is kept to the last. "
            "What is right of the red line is dropped.",
            lambda: plot_spectra(plan),
        )
        yield (
            "effective_ranks",
            "How many directions count: exp of the entropy of these costs. Large values resist compression.",
            lambda: plot_effective_ranks(plan),
        )
    if record.predictions:
        caption = "Predicted against measured loss. The prediction is a sum over matrices, each changed alone a little."
        yield "predictions", caption, lambda: plot_predictions(record.predictions)
    if record.blocks:
        yield "blocks", "Relative errors of the blocks' outputs on held-out data.", lambda: plot_blocks(record.blocks)
    if record.losses:
        yield "training", "The loss while the model was healed.", lambda: plot_losses(record.losses)
    if any(record.angles.values()):
        caption = (
            "How far neighbouring layers look at the same directions of their inputs: 0 where they share all, as layers "
            "that keep nearly every direction must."
        )
        yield "angles", caption, lambda: plot_angles(record.angles)


def _page(record: Record, figures: Mapping[str, Picture]) -> str:
    import jinja2  # with the report only, which few commands write
    from markupsafe import Markup

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    plan = record.plan
    hardest = plan.resistant(10) if _has_spectra(plan) else []
    return templates.get_template(TEMPLATE).render(
        generator=Markup(GENERATOR),
        figures=figures,
        model=record.model,
        summary=_summary(record),
        settings=list(_settings(record)),
        measures=list(_figures(record)),
        search=record.search,
        plan=plan,
        hardest=[(m.name, f"{m.effective_rank:.0f} of {min(m.shape)}", *_rank_and_energy(m)) for m in hardest],
        samples=[(sample["prompt"], sample["dense"], sample["compressed"]) for sample in record.samples],
        table=lambda rows, caption="": Markup(html_table(rows, caption)),
        every_matrix=Markup(plan._repr_html_()),
    )


def _summary(record: Record) -> str:
    plan = record.plan
    stored, dense, unit = plan.stored
    kept = stored / dense if dense else 1.0
    words = f"{len(plan.modules)} matrices with {dense:,} {unit}; {kept:.1%} of them are stored"
    words += f", {len(plan.dense_modules)} matrices stay dense."
    words += f" {plan.neurons_left}." if plan.neurons else ""
    if record.excess_loss is not None:
        words += f" The loss changed by {record.excess_loss:+.3f} nats per token."
    return words


def _settings(record: Record) -> Iterator[tuple[str, str]]:
    plan = record.plan
    yield from (("method", plan.method), ("allocation", plan.allocation), ("form", plan.form), ("keep", f"{plan.keep:g}"))
    if plan.calibration_tokens:
        yield "calibration tokens", f"{plan.calibration_tokens:,}"
    if plan.gradient_tokens:
        yield "labels sampled for gradients", f"{plan.gradient_tokens:,}, seed {plan.seed}"
    for key, value in record.settings.items():
        if key not in ("method", "allocation", "form", "keep"):
            yield key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, (list, tuple, set)) else str(value)


def _figures(record: Record) -> Iterator[tuple[str, ...]]:
    """Rows of dense against compressed."""
    for part, sizes in (record.sizes or {}).items():
        for unit in ("parameters", "bytes"):
            before, after = sizes[f"dense_{unit}"], sizes[f"stored_{unit}"]
            yield f"{unit} of the {part}", f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else ""
    yield from _measures(record.evaluation)
    if record.speed:
        yield from _speeds(record.speed, record.speed.get("baseline") or {})


def _measures(evaluation: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """First those that are known of both models, then those of one."""
    of_both = [name for name in evaluation if f"dense {name}" in evaluation]
    for name in of_both:
        dense, compressed = evaluation[f"dense {name}"], evaluation[name]
        ratio = f"{compressed / dense:.3f}" if dense and math.isfinite(compressed) else ""
        yield name, f"{dense:.5g}", f"{compressed:.5g}", ratio
    for name, value in evaluation.items():
        measure = name.removeprefix("dense ")
        if name not in of_both and measure not in of_both:
            yield measure, *((f"{value:.5g}", "") if name.startswith("dense ") else ("", f"{value:.5g}")), ""


def _speeds(compressed: Mapping[str, Any], dense: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    labels = (
        ("prefill_ms", "ms for a prompt"),
        ("decode_ms", "ms per generated token"),
        ("peak_bytes", "peak bytes beside the weights"),
    )
    for key, label in labels:
        before, after = dense.get(key), compressed.get(key)
        if after is not None:
            yield label, _cell(before), _cell(after), f"{after / before:.2f}" if before else ""


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def _rank_and_energy(module: ModulePlan) -> tuple[str, str]:
    if module.rank is None:
        return "dense", "100.0%"
    if module.form == "dense":
        return f"dense, {module.bits} bits", "100.0%"
    return str(module.rank), f"{module.energy(module.rank):.1%}"


def _has_spectra(plan: Plan) -> bool:
    return bool(plan.modules) and all(module.spectrum for module in plan.modules)


def _png(draw: Callable[[], Any]) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    with pyplot.rc_context({"text.parse_math": False}):  # a dollar in a name is a dollar
        drawn = draw()
        figure = getattr(drawn, "figure", None) or drawn  # axes have a figure; a figure has none above it
        figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
