"""What `compress` returns, for type checkers: a `PeftModel` that hands on to its tuner what it does not know itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft import PeftModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibration.statistics import Statistics
    from ..layers.schemes import SchemeName
    from ..standalone.tables import TableScheme
    from .sizes import SizeReport

    class CompressedModel(PeftModel):
        """A `PeftModel`, or the class of it for a task, whose active adapter is one of a `ReparamConfig`."""

        def size_report(self, adapter_name: str | None = None) -> SizeReport:
            """As `ReparamModel.size_report`."""

        def to_standalone(
            self,
            quantize: SchemeName | None = None,
            quantize_tables: TableScheme | None = None,
            statistics: Statistics | None = None,
        ) -> PreTrainedModel:
            """As `ReparamModel.to_standalone`."""
else:
    CompressedModel = PeftModel
