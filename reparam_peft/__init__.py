"""Compress pretrained transformers by low-rank reparameterisation, as a PEFT method.

Importing the package registers the method REPARAM with PEFT.
"""

from __future__ import annotations

from importlib.metadata import version

from .registration import register

register()

from .blockwise.anchoring import Anchoring  # noqa: E402  the enum's member must exist first
from .blockwise.refinement import Refinement  # noqa: E402
from .calibration.self_written import self_written  # noqa: E402
from .calibration.statistics import Statistics  # noqa: E402
from .compression.compress import calibrate, compress, plan  # noqa: E402
from .compression.streaming import compress_checkpoint  # noqa: E402
from .compression.truncation import retruncate  # noqa: E402
from .config.reparam_config import ReparamConfig  # noqa: E402
from .evaluation.perplexity import perplexity  # noqa: E402
from .evaluation.speed import Benchmark, benchmark  # noqa: E402
from .evaluation.text import text_batches  # noqa: E402
from .healing.trainer import HealingTrainer  # noqa: E402
from .numerics.angles import principal_angles  # noqa: E402
from .numerics.decompositions import Factors, factorize  # noqa: E402
from .planning.plan import Plan  # noqa: E402
from .report.angles import input_angles  # noqa: E402
from .report.page import write_report  # noqa: E402
from .report.plots import plot_effective_ranks, plot_spectra  # noqa: E402
from .report.record import Record  # noqa: E402
from .searching.result import SearchResult, Trial  # noqa: E402
from .searching.search import search  # noqa: E402
from .tuner.model import ReparamModel  # noqa: E402
from .tuner.sizes import MatrixSize, SizeReport  # noqa: E402

__version__ = version("reparam_peft")
__all__ = [
    "Anchoring",
    "Benchmark",
    "Factors",
    "HealingTrainer",
    "MatrixSize",
    "Plan",
    "Record",
    "Refinement",
    "ReparamConfig",
    "ReparamModel",
    "SearchResult",
    "SizeReport",
    "Statistics",
    "Trial",
    "benchmark",
    "calibrate",
    "compress",
    "compress_checkpoint",
    "factorize",
    "input_angles",
    "perplexity",
    "plan",
    "plot_effective_ranks",
    "plot_spectra",
    "principal_angles",
    "retruncate",
    "search",
    "self_written",
    "text_batches",
    "write_report",
]
