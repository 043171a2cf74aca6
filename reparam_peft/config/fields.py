"""The fields of `ReparamConfig`: their types, defaults and meanings, and the values that some of them may have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft import PeftConfig

from ..arguments import listed
from ..defaults import CALIBRATED, DATA_FREE, KEEP
from ..numerics.methods import MethodName, names_of_methods
from ..numerics.storage import AS_THE_MODEL, FEW_BITS, Form

Allocation = Literal["uniform", "loss"]
InputMetric = Literal["gram", "diagonal", "none"]
OutputMetric = Literal["fisher", "diagonal", "none"]
Unreached = Literal["dense", "error"]
Budget = Literal["parameters", "bytes", "flops", "latency"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
INPUT_METRICS: tuple[str, ...] = get_args(InputMetric)
OUTPUT_METRICS: tuple[str, ...] = get_args(OutputMetric)
BUDGETS: tuple[str, ...] = get_args(Budget)
ALL_EXPERTS = "all-experts"
UNREACHED: tuple[str, ...] = get_args(Unreached)
# Fields that have an effect with a calibrated method only, and with ranks by predicted loss only.
OF_METRICS = ("input_metric", "output_metric", "shrinkage", "output_shrinkage")
OF_ALLOCATION = ("rank_multiple", "floor", "ceiling")


@dataclass
class Fields(PeftConfig):
    """What a `ReparamConfig` holds beside the fields of every PEFT config; unchecked."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to factorise: a list of name endings, a regular expression, or 'all-linear'. An "
            "nn.MultiheadAttention is one, with all its matrices. None: the attention "
            "and MLP projections of the known architectures, of others all linear layers of the repeated blocks."
        },
    )
    target_parameters: list[str] | dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters to factorise beside `target_modules`: fused experts of mixtures, each of which becomes a "
            "matrix of its own; others that the model multiplies by itself; weights of layers. A list of name endings, as for "
            f"PEFT's LoRA, a regular expression, {ALL_EXPERTS!r}, or endings with how dimensions make a matrix, "
            "{'rel_attn.q': '(d) (n h)'}."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: a list of name endings or a regular expression."}
    )
    r: int | Literal["full"] | None = field(
        default=None,
        metadata={
            "help": "One rank for all targets; 'full': every matrix at rank min(out, in), exactly the original function; "
            "None: `keep` decides. A matrix that rank `r` would not make smaller stays dense."
        },
    )
    keep: float = field(
        default=KEEP,
        metadata={"help": "Fraction of the targeted parameters that is stored, 0 < keep <= 1. Used where `r` is None."},
    )
    budget: Budget | None = field(
        default=None,
        metadata={
            "help": "What `keep` is a fraction of: 'parameters', or with calibration data 'bytes' of the targets in the "
            "model's dtype, for which each matrix gets its form, its rank and the bits of its numbers by predicted loss; "
            "'flops', multiply-adds over these data; or 'latency', the time that the layers take for 256 rows on this machine, "
            "measured. None: 'parameters'."
        },
    )
    bits: tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "Which widths numbers may have, of 16 (the model's dtype), 8 (torchao's int8) and 4 (bitsandbytes' NF4), "
            "with `budget='bytes'`, where factors beside a corrected matrix have 8, or 16 where 8 is not allowed. With "
            "`form='corrected'` and `r` the least of them is that of the matrices, whose corrections have the model's dtype. "
            "None: all."
        },
    )
    method: MethodName | None = field(
        default=None,
        metadata={
            "help": f"How to factorise: {listed(map(repr, names_of_methods(needs_data=False)))}, or with calibration data "
            f"{listed(map(repr, names_of_methods(needs_data=True)))}. None: {DATA_FREE['method']!r} in `get_peft_model`, "
            f"{CALIBRATED['method']!r} in `compress`."
        },
    )
    allocation: Allocation | None = field(
        default=None,
        metadata={
            "help": "How to choose ranks: 'uniform', or with calibration data 'loss', by the predicted loss. None: "
            "'uniform' in `get_peft_model` and where `r` is given, 'loss' in `compress`."
        },
    )
    form: Form | None = field(
        default=None,
        metadata={
            "help": "How the product is stored: 'factors' (A, B); 'pivot': r of its rows and the coefficients of the others, "
            "which takes fewer numbers; or 'corrected': the matrix itself in few bits, and beside it factors of rank `r` that "
            "make up for its rounding. None: 'factors' in `get_peft_model`, 'pivot' in `compress`, and with "
            "`budget='bytes'` whichever is best for a matrix."
        },
    )
    input_metric: InputMetric | None = field(
        default=None,
        metadata={
            "help": "How a calibrated method weighs errors over the inputs: by their 'gram' matrix, with the 'fisher' output "
            "metric one tenth weighed by the gradients there; 'diagonal', by the root of its diagonal (ASVD); or 'none'. "
            "None: 'gram'."
        },
    )
    output_metric: OutputMetric | None = field(
        default=None,
        metadata={
            "help": "How a calibrated method weighs errors over the outputs: by the 'fisher' matrix of the gradients there; "
            "'diagonal', by its diagonal (FWSVD); or 'none' (SVD-LLM). None: 'fisher'."
        },
    )
    shrinkage: float | None = field(
        default=None,
        metadata={"help": "Part of the input metric, in [0, 1], replaced by the identity. None: by the number of tokens."},
    )
    output_shrinkage: float | None = field(
        default=None,
        metadata={"help": "Part of the output metric, in [0, 1], replaced by the identity. None: by the number of tokens."},
    )
    rank_multiple: int | None = field(
        default=None,
        metadata={
            "help": "What ranks are a multiple of with `allocation='loss'`. None: 8, and 1 for matrices with a side below 64."
        },
    )
    floor: float | None = field(
        default=None,
        metadata={"help": "The least fraction of a matrix that `allocation='loss'` stores, 0 <= floor < 1. None: 0."},
    )
    ceiling: float | None = field(
        default=None,
        metadata={
            "help": "The most that `allocation='loss'` stores of a matrix, floor <= ceiling <= 1; below 1 only matrices too "
            "small for any product stay dense. None: 1."
        },
    )
    neurons: bool | None = field(
        default=None,
        metadata={"help": "Whether MLPs may lose neurons, with calibration data and `allocation='loss'`. None: where it can."},
    )
    unreached: Unreached | None = field(
        default=None,
        metadata={
            "help": "What becomes of targets that no batch of calibration data reaches: 'dense', they are left out with a "
            "warning; or 'error'. None: 'error' where `target_modules` names them, else 'dense'."
        },
    )
    ensure_weight_tying: bool = field(
        default=False,
        metadata={
            "help": "Have one product serve the input embeddings and the head that shares their table, where `target_modules` "
            "names either. Else such a table is no target. It costs far more quality than it saves memory; "
            "`to_standalone(quantize_tables='int8')` does not."
        },
    )
    keep_base: bool = field(
        default=False,
        metadata={
            "help": "Keep W beside the factors, so that `disable_adapter()` and `unload()` work. This saves no memory; it "
            "gives a teacher."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Rank per module: exact names, or regular expressions that match the end of a name. Comes before `r` and "
            "`keep`, and is obeyed even where the factors are larger than the matrix."
        },
    )
    dense_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Exact names of targets that keep their dense weight; they count toward `keep` in full."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to factorise; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the module list that `layers_to_transform` counts in, e.g. 'layers' or 'h'."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved whole beside the factors, e.g. a new classifier."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "False: random factors of the weight's norm instead of its decomposition, for tests and baselines."},
    )
    dense_parameters: int | None = field(
        default=None, metadata={"help": "Filled in: parameters of the targeted matrices before."}
    )
    stored_parameters: int | None = field(
        default=None, metadata={"help": "Filled in: parameters stored for them, dense ones included."}
    )
    dense_bytes: int | None = field(default=None, metadata={"help": "Filled in: bytes of the targeted matrices before."})
    stored_bytes: int | None = field(
        default=None, metadata={"help": "Filled in: bytes stored for them in the base model's dtype, dense ones included."}
    )
    moved_bias: bool = field(
        default=False,
        metadata={"help": "Filled in: whether factorised modules with a bias hold one of their own, moved by E[(W - AB) x]."},
    )
    calibration_tokens: int | None = field(
        default=None, metadata={"help": "Filled in: input rows that the statistics were taken of."}
    )
    gradient_tokens: int | None = field(
        default=None, metadata={"help": "Filled in: labels sampled for the gradients that the statistics were taken of."}
    )
    seed: int | None = field(default=None, metadata={"help": "Filled in: the seed of the sampled labels."})
    predicted_loss: float | None = field(
        default=None, metadata={"help": "Filled in: predicted increase of the loss, nats per token."}
    )
    sizes: dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Filled in: of modules that lost neurons, how many rows and columns of the matrix are left, as name to "
            "[out, in]."
        },
    )
    form_pattern: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Filled in: of modules that are stored in another form than `form`, which one, by exact name; 'dense' is "
            "the matrix itself, in few bits."
        },
    )
    bit_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Filled in: of modules with numbers in 8 or 4 bits, how many, by exact name; of a corrected one, those of "
            "the matrix."
        },
    )
    correction_bits: int | None = field(
        default=None,
        metadata={"help": "Filled in: 8, where the factors beside corrected matrices are in 8 bits. None: the model's dtype."},
    )
    healed_for: str | None = field(
        default=None,
        metadata={"help": "Filled in: for which `quantize` of `HealingTrainer` the factors were last trained. None: for none."},
    )
    smaller_keeps: list[float] | None = field(
        default=None,
        metadata={
            "help": "Filled in: smaller sizes at which `from_pretrained(..., keep=...)` loads the adapter, from large to small."
        },
    )
    smaller_ranks: dict[str, list[int | None]] | None = field(
        default=None, metadata={"help": "Filled in: rank per module at each of these sizes; None: dense."}
    )
    base_sample: dict[str, list[float]] | None = field(
        default=None,
        metadata={
            "help": "Filled in: a few numbers of the base model, as name of a parameter to [index, number], by which loading "
            "warns of another base."
        },
    )
    evaluation: dict[str, float] | None = field(
        default=None,
        metadata={"help": "Figures for the model card, e.g. {'dense perplexity': 19.4, 'perplexity': 25.4}; set by you."},
    )

    @property
    def chooses_bits(self) -> bool:
        """Whether numbers are to be stored in few bits."""
        return self.budget == "bytes" or self.form == "corrected"

    @property
    def least_bits(self) -> int:
        """The least width that numbers may have, of those below the model's dtype."""
        return min(self.bits or FEW_BITS, default=AS_THE_MODEL)
