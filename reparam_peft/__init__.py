"""Compress pretrained transformers by low-rank reparameterisation, as a PEFT method.

Importing the package registers the method REPARAM with PEFT. Public names are imported when they are first asked for.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .blockwise.anchoring import Anchoring
    from .blockwise.refinement import Refinement
    from .calibration.self_written import self_written
    from .calibration.statistics import Statistics
    from .compression.compress import calibrate, compress, plan
    from .compression.streaming import compress_checkpoint
    from .compression.truncation import retruncate
    from .config.reparam_config import ReparamConfig
    from .evaluation.perplexity import perplexity
    from .evaluation.speed import Benchmark, benchmark
    from .evaluation.text import text_batches
    from .healing.trainer import HealingTrainer
    from .numerics.angles import principal_angles
    from .numerics.decompositions import Factors, factorize
    from .planning.plan import Plan
    from .report.angles import input_angles
    from .report.page import write_report
    from .report.plots import plot_effective_ranks, plot_spectra
    from .report.record import Record
    from .searching.result import SearchResult, Trial
    from .searching.search import search
    from .standalone.onnx_export import save_onnx
    from .standalone.self_contained import save_self_contained
    from .tuner.compressed_model import CompressedModel
    from .tuner.model import ReparamModel
    from .tuner.sizes import MatrixSize, SizeReport

__all__ = [
    "Anchoring",
    "Benchmark",
    "CompressedModel",
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
    "save_onnx",
    "save_self_contained",
    "search",
    "self_written",
    "text_batches",
    "write_report",
]

# Where each of them is defined.
_HOMES = {
    "Anchoring": "blockwise.anchoring",
    "Benchmark": "evaluation.speed",
    "CompressedModel": "tuner.compressed_model",
    "Factors": "numerics.decompositions",
    "HealingTrainer": "healing.trainer",
    "MatrixSize": "tuner.sizes",
    "Plan": "planning.plan",
    "Record": "report.record",
    "Refinement": "blockwise.refinement",
    "ReparamConfig": "config.reparam_config",
    "ReparamModel": "tuner.model",
    "SearchResult": "searching.result",
    "SizeReport": "tuner.sizes",
    "Statistics": "calibration.statistics",
    "Trial": "searching.result",
    "benchmark": "evaluation.speed",
    "calibrate": "compression.compress",
    "compress": "compression.compress",
    "compress_checkpoint": "compression.streaming",
    "factorize": "numerics.decompositions",
    "input_angles": "report.angles",
    "perplexity": "evaluation.perplexity",
    "plan": "compression.compress",
    "plot_effective_ranks": "report.plots",
    "plot_spectra": "report.plots",
    "principal_angles": "numerics.angles",
    "retruncate": "compression.truncation",
    "save_onnx": "standalone.onnx_export",
    "save_self_contained": "standalone.self_contained",
    "search": "searching.search",
    "self_written": "calibration.self_written",
    "text_batches": "evaluation.text",
    "write_report": "report.page",
}


def __getattr__(name: str) -> Any:
    """A public name, or the version (PEP 562). It is a plain attribute of the package from then on."""
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("reparam_peft")
    elif name in _HOMES:
        _register()
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


@cache
def _register() -> None:
    """Make PEFT and transformers know the method. What is a method of PEFT cannot be defined before."""
    from .registration import register

    register()


# The command `reparam` comes by `reparam_peft_command`, which stands beside the package to be told from other imports: its help
# and its completion do not wait for PEFT, which takes seconds, and it registers the method before a command does anything.
# All others find the method registered: PEFT must know it once a checkpoint of it is loaded, which asks for no name from here.
if "reparam_peft_command" not in sys.modules:
    _register()
