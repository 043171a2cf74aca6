"""What `compress`, `plan` and `retruncate` go through: statistics, losses, ranks, and the product of each matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..arguments import ReparamWarning
from ..calibration.gather import gather_statistics
from ..calibration.self_written import SelfWritten
from ..calibration.statistics import Batches, Moments, Statistics
from ..config.reparam_config import ReparamConfig
from ..layers.kinds import stored_weight
from ..layers.neuron_groups import NeuronGroup
from ..layers.product import Product, empty_product, product_of, tensors_of
from ..numerics.decompositions import check_matrix
from ..planning.byte_options import Bytes
from ..planning.neurons import Losses
from ..planning.plan import Plan, make_plan
from ..planning.ranks import RankChooser, is_nested
from ..runtime import processes
from ..runtime.modules import abridged, naming
from ..runtime.processes import check_whole, fails_together
from ..tuner.matrices import base_dtype, own_bias, source_matrix
from ..tuner.opening import open_parameters
from ..tuner.selection import names_targets, select_targets, with_targets
from ..tuner.targets import Target
from ..tuner.tying import heads_of
from .choices import with_defaults
from .costs import costs_of
from .factorizing import Factorizer
from .found import Found
from .mlps import check_alike, find_mlps
from .neurons import Neurons
from .offered import offered
from .options import Options
from .parts import Part
from .passes import passes_within, room_for_graphs
from .pooling import Pool
from .weighing import Weigher, Weighing, mean_output


class Job:
    """The targets of one call, their statistics, ranks and products. Nothing of the model is changed.

    Args:
        model: that the batches are given to.
        config: with its method, allocation and form resolved.
        targets: by name.
        batches: keyword batches, or statistics.
        options: how the job runs.
        chooser: of the ranks.
        matrix_of: gives the matrix (out, in) that a target is factorised from.
        bias_of: gives the bias that is moved with a target's product; None where none is.
        passes: names of the targets whose statistics are gathered together; targets in none are not factorised.
        modules: what statistics are gathered of, by name; None: the modules of the targets.
        mlps: MLPs that may lose neurons.
        leaves_unreached: whether targets that no batch reaches are left out, until ranks are chosen; else they are an error.
        offered: what targets can be stored as, where numbers may be in few bits; else None.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        config: ReparamConfig,
        targets: Mapping[str, Target],
        batches: Batches,
        options: Options,
        chooser: RankChooser,
        matrix_of: Callable[[str], Tensor],
        bias_of: Callable[[str], Tensor | None],
        passes: Sequence[Sequence[str]],
        modules: Mapping[str, nn.Module] | None = None,
        mlps: Sequence[NeuronGroup] = (),
        leaves_unreached: bool = False,
        offered: Bytes | None = None,
    ) -> None:
        self.model, self.config, self.options, self.chooser = model, config, options, chooser
        self.targets = dict(targets)
        self.matrix_of, self.bias_of = matrix_of, bias_of
        self.modules = {name: target.module for name, target in targets.items()} if modules is None else dict(modules)
        self.storages = {name: target.storage for name, target in targets.items()}
        self.weigher, self.factorizer = Weigher.of(config), Factorizer.of(config)
        self.pool, self.found = Pool(self.storages, config), Found(self.factorizer)
        self.regroup(passes)
        check_whole(batches)
        # Batches are read once for each group, and the first of them to see what a graph takes.
        is_read_again = len(self.passes) > 1 or self.room is not None
        if is_read_again and not isinstance(batches, (Statistics, SelfWritten)):
            batches = list(batches)
        self.batches: Batches = batches
        self.seed = options.seed
        self.calibration_tokens = self.gradient_tokens = 0
        self.tokens: dict[str, int] = {}  # that reached each target
        self._at_hand: tuple[list[str], Statistics] | None = None
        self.kept_statistics: Callable[[Sequence[str], Callable[[], Statistics]], Statistics] | None = None
        self.gather: Callable[..., Statistics] = gather_statistics
        self.leaves_unreached, self.offered = leaves_unreached, offered
        self.unreached: list[str] = []  # targets that were left out
        self.neurons = Neurons(
            mlps, self.storages, matrix_of, self.weighing, self.factorizer, self.share_out, self.weigher.as_predicted
        )

    @classmethod
    @fails_together()
    def of_model(
        cls,
        model: nn.Module,
        config: ReparamConfig,
        batches: Batches,
        options: Options,
        *,
        adapter_name: str = "default",
        plan: Plan | None = None,
        blocks: Sequence[str] = (),
        moves_bias: bool = False,
        example: Mapping[str, Any] | None = None,
    ) -> Job:
        """A job on the weights of a model, with everything checked that can be checked before the data are read.

        Of the model nothing is changed, but that fused parameters among the targets are opened.

        Args:
            blocks: names of blocks, in each of which the statistics of all targets are needed together.
            moves_bias: whether biases are stored with the products for another reason than the method.
            example: a batch, where `batches` are statistics.
            model, config, batches, options, adapter_name, plan: as for `compress`.
        """
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise TypeError("`model` is wrapped by PEFT already; give the base model, or merge the adapter first.")
        if not isinstance(config, ReparamConfig):
            raise TypeError(f"`config` must be a ReparamConfig, got a {type(config).__name__}.")
        if plan is not None and not isinstance(plan, Plan):
            raise TypeError(f"`plan` must be a Plan, got a {type(plan).__name__}; read one with `Plan.load`.")
        forms = None if config.form is None else (config.form,)
        config = with_defaults(config, plan, moves_bias)
        open_parameters(config, model)
        targets = select_targets(model, config, adapter_name)
        leaves_unreached = config.unreached == "dense" or (config.unreached is None and not names_targets(config))
        if plan is not None:
            targets = {name: target for name, target in targets.items() if name not in plan.unreached}
        for name, target in targets.items():
            with naming(name):
                if target.keeps_codes:
                    raise ValueError(
                        "`form='corrected'` keeps a weight that arrives quantised as it is, so that there is nothing to fit a "
                        "correction to; use `get_peft_model`, which adds factors to be trained, or `budget='bytes'`."
                    )
                check_matrix(source_matrix(target.module))
        max_memory = options.max_memory
        storages = {name: target.storage for name, target in targets.items()}
        in_few_bits = offered(config, forms, targets)
        chooser = RankChooser.of(config, storages, of_bytes=in_few_bits if config.budget == "bytes" else None)
        if plan is None:
            if not (chooser.prescribed and config.budget in ("flops", "latency")):  # of which data say how much is held
                chooser.check()
        else:
            shapes = {name: storage.whole_shape for name, storage in storages.items()}
            has_bias = any(getattr(target.module, "bias", None) is not None for target in targets.values())
            plan.check_fits(shapes, config, chooser.prescribed if config.r is None else chooser.uniform, has_bias)
        mlps, batches = find_mlps(model, config, targets, batches, plan, blocks, example)
        return cls(
            model=model,
            config=config,
            targets=targets,
            batches=batches,
            options=options,
            chooser=chooser,
            matrix_of=lambda name: source_matrix(targets[name].module),
            bias_of=lambda name: own_bias(targets[name].module) if targets[name].storage.bias else None,
            passes=[list(targets)]
            if max_memory is None or isinstance(batches, Statistics)
            else passes_within(targets, max_memory, blocks, mlps, config.target_parameters or ()),
            mlps=mlps,
            leaves_unreached=leaves_unreached and plan is None,
            offered=in_few_bits,
        )

    def plan(self) -> Plan:
        """The ranks that the config and the statistics lead to."""
        losses = self.losses()  # first: it tells which targets no batch reached, which the chooser leaves out
        return self.plan_with(self.chooser, losses)

    def regroup(self, passes: Sequence[Sequence[str]]) -> None:
        """Gather statistics of other groups of targets together, before any are gathered."""
        self.passes = [list(group) for group in passes]
        self._whole_group = {name: group for group in map(tuple, self.passes) for name in group}
        self.room = room_for_graphs(self.passes, self.targets, self.options.max_memory)

    def losses(self) -> Losses:
        """What each direction of each target is predicted to cost, and numbers of neurons; empty without gradients."""
        losses: dict[str, Tensor] = {}
        of_options: dict[str, Tensor] = {}
        options = {} if self.offered is None else self.offered.options
        check_alike(list(self.neurons.mlps.values()))

        def compute(name: str) -> list[Tensor]:
            W, weighing = self.matrix_of(name), self.weighing(name)
            if name not in options:
                return [self.found.losses(name, W, weighing)]
            directions = self.found.directions(name, W, weighing)
            losses = self.factorizer.losses(W, weighing, directions)
            return [losses, self.factorizer.matrix(W, weighing, directions).losses(options[name], losses)]

        def room(name: str) -> list[Tensor]:
            sizes = [self.targets[name].storage.full_rank, *([len(options[name])] if name in options else [])]
            return [torch.empty(size, dtype=torch.float64, device="cpu") for size in sizes]

        for names_of_pass in list(self.passes) if self.weigher.gradients or self.leaves_unreached else ():
            names = self.reached(names_of_pass)
            if self.weigher.gradients and names:
                shared = self.share_out(names, "Planning", compute, room)
                losses.update({name: costs[0] for name, costs in shared.items()})
                of_options.update({name: costs[1] for name, costs in shared.items() if len(costs) > 1})
                self.neurons.weigh(names)
        if self.unreached:
            warnings.warn(
                f"No batch reached {len(self.unreached)} targets, beside {len(self.targets)} others. They stay dense and do "
                f"not count for `keep`: {', '.join(abridged(self.unreached))}.",
                ReparamWarning,
                stacklevel=4,
            )
        self.leaves_unreached = False
        return Losses(losses, self.neurons.offered(losses) if losses else {}, of_options)

    def plan_with(self, chooser: RankChooser, losses: Losses) -> Plan:
        """The ranks by a chooser, which may be one for another size.

        Raises:
            ValueError: the budget cannot be met.
        """
        chooser = replace(chooser, costs=costs_of(self.config, self.targets, self.tokens))
        for name in chooser.unreached(losses):
            warnings.warn(f"{name}: no gradient reaches its output, so that its rank is uniform.", ReparamWarning, stacklevel=4)
        allotment = chooser.ranks(losses)
        if chooser.bytes is None and self.offered is not None:
            points = {name: self.offered.point(name, losses.options.get(name)) for name in self.offered.options}
            allotment = replace(allotment, points=points)
        return make_plan(
            self.config,
            chooser.keep,
            self.storages,
            allotment,
            losses.directions,
            self.neurons.mlps,
            itemsizes={name: base_dtype(target.module).itemsize for name, target in self.targets.items()},
            tokens=self.tokens,
            calibration_tokens=self.calibration_tokens,
            gradient_tokens=self.gradient_tokens,
            seed=self.seed,
            unreached=self.unreached,
        )

    def ranked(self, plan: Plan) -> dict[str, Target]:
        """The targets with the ranks, forms and bits of a plan, and with what is left of those that lose neurons."""
        ranked = {}
        for module in plan.modules:
            target = self.targets[module.name]
            ranked[module.name] = replace(target, rank=module.rank, storage=plan.storage_of(module, target.storage))
        for group in plan.neurons:
            for name, storage in self.neurons.narrowed(self.neurons.mlps[group.consumer], group.kept).items():
                ranked[name] = replace(ranked[name], storage=storage)
        return ranked

    def products(
        self,
        targets: Mapping[str, Target],
        used_up: bool = False,
        keep: Callable[[dict[str, Product]], None] | None = None,
    ) -> dict[str, Product]:
        """The products of those targets that do not stay dense, factorised one-shot.

        Args:
            targets: with their ranks and storages.
            used_up: whether statistics that were gathered here are forgotten as products are made of them.
            keep: called with those of each pass, once they are finished.
        """
        products: dict[str, Product] = {}
        ranks = {name: target.rank for name, target in targets.items() if target.rank is not None}

        parts: dict[str, Part] = {}
        left = self.neurons.left({name: target.storage for name, target in targets.items()})

        def compute(name: str) -> list[Tensor]:
            W, bias, part, found = self.matrix_of(name), self.bias_of(name), parts.get(name, Part()), self.found.take(name)
            target = targets[name]
            in_few_bits = target.rank is not None and bool(target.storage.widths(target.rank))
            outputs = found is None or found.needs_output_gram or not part.is_whole or in_few_bits
            weighing = self.weighing(name, outputs=outputs)
            output_mean = None if bias is None else mean_output(W, bias, weighing.mean)
            mean = None if output_mean is None else part.of_outputs(output_mean)
            matrix = part.matrix(W, weighing.gram)
            made = self.factorizer.product_of_part(part, target, matrix, part.weighing(weighing), mean, found)
            if used_up:
                self.forget(name)
            return tensors_of(made)

        def room(name: str) -> list[Tensor]:
            target = targets[name]
            return empty_product(ranks[name], target.storage, base_dtype(target.module), self.factorizer.nested)

        # Those at hand are not gathered again.
        for group in sorted(self.passes, key=lambda group: self._at_hand is None or self._at_hand[0] != group):
            names = [name for name in group if name in ranks]
            if not names:
                continue
            self.statistics(group)
            parts.update(self.neurons.parts(names, left))
            shared = self.share_out(names, "Factorising", compute, room)
            made = {name: product_of(tensors, ranks[name], targets[name].storage) for name, tensors in shared.items()}
            if keep is not None:
                keep(made)
            products.update(made)
        return products

    def forget(self, name: str) -> None:
        """Drop the statistics at hand of a target that no other needs, unless they are the user's."""
        if self._at_hand and name in self._at_hand[0] and not (self._at_hand[1] is self.batches or self.pool.shares(name)):
            self._at_hand[1].forget(name)

    def weighing(
        self, name: str, moments: Moments | None = None, columns: Tensor | None = None, outputs: bool = True
    ) -> Weighing:
        """What a target's factorisation weighs errors by; with `moments`, of these in place of the inputs calibration saw.

        Args:
            name: of the target.
            moments: of the inputs.
            columns: indices of the inputs that are left, whose moments these are; None: all.
            outputs: whether the metric of outputs is wanted.
        """
        statistics = self.pool.pooled(name, self.statistics_of(name))
        return self.weigher.weighing(name, statistics, self.targets[name].storage.bias, moments, columns, outputs)

    def statistics_of(self, name: str) -> Statistics:
        """The statistics of the group that a target is in. Processes gather them together, where they are not at hand."""
        return self.statistics(next(group for group in self.passes if name in group))

    def reached(self, group: list[str]) -> list[str]:
        """The targets of a group, whose statistics are at hand then, but for those that are left out because no batch comes.

        Raises:
            ValueError: no batch reaches some that must not be left out, or any target at all.
        """
        statistics = self.statistics(group)
        pooled = self.pool.unreached(group, statistics)
        unreached = [name for name in statistics.unreached(group) if name not in pooled]
        if not unreached:
            return group
        with fails_together():
            if not self.leaves_unreached or len(unreached) == len(self.targets):
                statistics.check({name: self.modules[name] for name in unreached})
        names = [name for name in group if name not in unreached]
        self._leave_out(unreached)
        self._at_hand = (names, statistics)
        return names

    def _leave_out(self, names: Sequence[str]) -> None:
        """Go on with the other targets."""
        self.unreached += names
        self.targets = {name: target for name, target in self.targets.items() if name not in names}
        self.modules = {name: module for name, module in self.modules.items() if name not in names}
        self.storages = {name: storage for name, storage in self.storages.items() if name not in names}
        self.chooser = self.chooser.without(names)
        self.neurons.leave_out(names)
        left = ([name for name in group if name not in names] for group in self.passes)
        self.passes = [group for group in left if group]

    def resume(self, plan: Plan, finished: Container[str]) -> None:
        """Go on with a plan that this job made earlier; no statistics are gathered any more of targets that are finished."""
        self.calibration_tokens, self.gradient_tokens, self.seed = plan.calibration_tokens, plan.gradient_tokens, plan.seed
        self._leave_out(plan.unreached)
        self.leaves_unreached = False
        unfinished = ([name for name in group if name not in finished] for group in self.passes)
        self.passes = [group for group in unfinished if group]

    def statistics(self, group: list[str]) -> Statistics:
        """The statistics of a group of targets; those of the last group are at hand."""
        if self._at_hand is not None and self._at_hand[0] == group:
            return self._at_hand[1]
        self._at_hand = None  # memory holds those of one group at a time
        modules = {name: self.modules[name] for name in group}
        if isinstance(self.batches, Statistics):
            statistics = self.batches
        else:
            gather = partial(
                self.gather,
                self.model,
                modules,
                self.batches,
                gradients=self.weigher.gradients,
                seed=self.seed,
                progress=self.options.progress,
                starts=self.modules.values(),
                heads=heads_of(self.config, self.model, modules),
                objective=self.options.objective,
                room=self.room,
            )
            kept = self.kept_statistics
            statistics = gather() if kept is None else kept(self._whole_group[group[0]], gather)
        with fails_together():
            pooled = self.pool.unreached(modules, statistics)
            unreached = {*pooled, *(statistics.unreached(modules) if self.leaves_unreached else ())}
            statistics.check({n: m for n, m in modules.items() if n not in unreached}, self.weigher.gradients)
        if pooled:
            warnings.warn(
                f"No token of the batches reached {len(pooled)} experts, which get the statistics of the others of their "
                f"layers: {', '.join(abridged(pooled))}.",
                ReparamWarning,
                stacklevel=4,
            )
        self.calibration_tokens = max(self.calibration_tokens, statistics.tokens)
        self.tokens |= {name: 0 if name in unreached else statistics.input_rows(name) for name in modules}
        self.gradient_tokens = max(self.gradient_tokens, statistics.gradient_tokens)
        self.seed = statistics.seed
        self._at_hand = (group, statistics)
        return statistics

    def resolved(self, plan: Plan) -> ReparamConfig:
        """The config for the tuner: what was chosen, and where it came from."""
        config = with_targets(self.config, self.targets)
        config.rank_pattern, config.dense_modules = plan.ranks, plan.dense_modules
        config.form_pattern, config.bit_pattern, config.correction_bits = plan.forms, plan.bits, plan.correction_bits
        config.calibration_tokens, config.gradient_tokens = self.calibration_tokens, self.gradient_tokens
        config.seed = self.seed
        config.predicted_loss = plan.predicted_loss
        config.sizes = {m.name: list(m.size) for m in plan.modules if m.size is not None} or None
        config.smaller_keeps = config.smaller_ranks = None
        if is_nested(config):
            smaller = self.chooser.smaller(plan)
            config.smaller_keeps = list(smaller)
            config.smaller_ranks = {name: [ranks[name] for ranks in smaller.values()] for name in plan.ranks}
        return config

    def share_out(
        self, names: Iterable[str], what: str, compute: Callable[[str], list[Tensor]], room: Callable[[str], list[Tensor]]
    ) -> dict[str, list[Tensor]]:
        """`compute(name)` for each target, by one of the processes, in all of them; `room` makes memory to receive it."""
        return processes.share_out(
            list(names), what, compute, room, lambda name: stored_weight(self.modules[name]).device, self.options.progress
        )
