"""Compress pretrained transformers by low-rank reparameterisation, as a PEFT method.

Importing the package registers the method REPARAM with PEFT.
"""

from __future__ import annotations

from importlib.metadata import version

from .registration import register

register()

from .anchoring import Anchoring  # noqa: E402  the enum's member must exist first
from .angles import input_angles, principal_angles  # noqa: E402
from .compression import calibrate, compress, plan  # noqa: E402
from .config import ReparamConfig  # noqa: E402
from .decompositions import Factors, factorize  # noqa: E402
from .evaluation import Benchmark, MatrixSize, SizeReport, benchmark, perplexity, text_batches  # noqa: E402
from .healing import HealingTrainer  # noqa: E402
from .model import ReparamModel  # noqa: E402
from .planning import Plan  # noqa: E402
from .plotting import plot_effective_ranks, plot_spectra  # noqa: E402
from .records import Record  # noqa: E402
from .refinement import Refinement  # noqa: E402
from .report import write_report  # noqa: E402
from .searching import SearchResult, Trial, search  # noqa: E402
from .statistics import Statistics  # noqa: E402
from .streaming import compress_checkpoint  # noqa: E402
from .truncation import retruncate  # noqa: E402

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
    "text_batches",
    "write_report",
]
