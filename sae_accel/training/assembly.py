"""
How the parts of an optimizer step are put together: heads, activations, objective and optimizer.

The trainer runs the result, and `--dry-run` rehearses the same result on tensors without memory, so that both use the
same code.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..activations.running_lm import ActivationSource, RunningLM
from ..bank.bank import SaeBank
from ..lm.hooks import Site
from ..recipe.arguments import LoraArguments, SaeTrainingArguments
from ..spread.base import Spread
from .end_to_end_objective import EndToEndObjective
from .local_objective import LocalObjective
from .optim import build_optimizer
from .spliced_lm import SplicedLM


if TYPE_CHECKING:
    from peft import PeftModel


Objective = LocalObjective | EndToEndObjective


class Assembly(NamedTuple):
    """
    The parts that together take an optimizer step.

    Args:
        bank (`SaeBank`): The heads of this process, and the parameters of a LoRA.
        activations (`Callable`): Makes the heads' activations from a batch of tokens.
        objective ([`LocalObjective`] or [`EndToEndObjective`]): Computes the heads' gradients.
        args (`SaeTrainingArguments`): How the heads train.
        lora ([`LoraArguments`], *optional*): The LoRA.
    """

    bank: SaeBank
    activations: ActivationSource
    objective: Objective
    args: SaeTrainingArguments
    lora: LoraArguments | None

    def optimizer(self) -> torch.optim.Optimizer:
        """Makes an optimizer of the bank's parameters, which scales gradients by the objective's `scale`."""
        return build_optimizer(self.bank, self.args, self.lora, self.objective.scale)


def assemble(
    model: PreTrainedModel,
    args: SaeTrainingArguments,
    spread: Spread,
    widths: Mapping[Site, int],
    exclude_tokens: list[int],
    lora: LoraArguments | None = None,
    adapter: "PeftModel | None" = None,
) -> Assembly:
    """
    Puts together the parts that take an optimizer step.

    Args:
        model (`PreTrainedModel`): The LM, which is frozen except for a LoRA.
        args (`SaeTrainingArguments`): How to train.
        spread ([`Spread`]): How heads are spread over processes, and which this process holds.
        widths (`Mapping[Site, int]`): Every site that a head of the run reads or predicts, with its width.
        exclude_tokens (`list[int]`): Token ids that train nothing.
        lora ([`LoraArguments`], *optional*): A LoRA that trains around the heads.
        adapter (`PeftModel`, *optional*): The LM with that LoRA in it.
    """
    bank = spread.settle(SaeBank(spread.plans, build=spread.build))
    trained = [] if adapter is None else [p for p in adapter.parameters() if p.requires_grad]
    activations = spread.source(RunningLM(model, list(widths), exclude_tokens, widths))
    if lora is not None:
        # `RunningLM` froze the LM together with its LoRA.
        bank.adapter.extend(parameter.requires_grad_() for parameter in trained)
        bank.heads.requires_grad_(lora.train_heads)
    # By head, the factor of the last window's gradients: the objective sets it, the optimizer multiplies by it.
    scale: dict[str, Tensor] = {}
    local = LocalObjective(activations, spread, args.micro_batches, scale)
    if args.loss == "fvu":
        return Assembly(bank, activations, local, args, lora)
    spliced = SplicedLM(model, exclude_tokens, adapter)
    return Assembly(bank, activations, EndToEndObjective(spliced, local, args.loss, args.fvu_weight), args, lora)
