"""
Shards a frozen LM: each process keeps a part of every layer.

An LM that is too large for one GPU is cut by FSDP. Before a layer runs, the processes exchange their parts, so that
each holds the whole layer. After the layer, each process frees the other parts again. Heads and activations stay as
they are. Only layers, embeddings and the LM's head are cut, since they hold nearly all parameters.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from transformers import PreTrainedModel

from ..common.errors import InputError
from ..processes.agreement import gather_objects, raise_together, this_process
from .hooks import base_of, token_model
from .modules import layer_list


def shard_in_turn(load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """
    Loads a frozen LM and shards it. The processes of a machine load one after the other, so the machine never holds
    more than one whole LM beside the parts. Every process must call this function.

    Args:
        load (`Callable`): Loads the whole LM into the memory of the machine.

    Raises:
        `InputError`: on all processes, if `load` raises it on one.
    """
    process = this_process()
    mesh = init_device_mesh(process.device.type, (process.num_processes,))
    own = process.local_process_index
    turns = range(max(gather_objects(own)) + 1)
    return [raise_together((lambda: shard(load(), mesh)) if turn == own else lambda: None) for turn in turns][own]


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """
    Cuts an LM's modules in place, so that this process keeps its part of each. Each module moves to this process's
    device as it is cut, and the modules that stay whole follow.

    Each module is an FSDP root of its own. If the LM were the root, a forward pass that stops early would leave it in
    an unfinished state.

    Args:
        model (`PreTrainedModel`): The frozen LM, the same on every process.
        mesh (`DeviceMesh`): The processes that share it.
    """
    modules = modules_to_shard(model)
    whole = _stay_whole(model, modules)
    modules = [module for module in modules if not whole.issuperset(module.parameters())]
    for module in modules:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        module.register_forward_hook(_forget_order)
    # If each module had CUDA streams of its own, the next module could not reuse its memory for gathering.
    share_comm_ctx([module for module in modules if isinstance(module, FSDPModule)])
    return model.to(this_process().device)


def modules_to_shard(model: PreTrainedModel) -> list[nn.Module]:
    """
    The modules that hold nearly all of an LM's parameters. FSDP gathers each when it starts and frees it when it ends.
    The LM's head, and the decoder of an encoder-decoder model, never run and so are never gathered.

    Raises:
        `InputError`: if the LM's list of layers cannot be found.
    """
    running = cast(PreTrainedModel, token_model(base_of(model)))
    try:
        layers = cast(nn.ModuleList, running.get_submodule(layer_list(running)))
    except InputError as error:
        raise InputError(
            f"model.shard: the list of layers of {type(running).__name__} cannot be found, so the LM cannot be "
            "sharded. Remove model.shard, or use another LM."
        ) from error
    never_run = [model.get_output_embeddings()]
    if running is not base_of(model):
        never_run.append(base_of(model).get_decoder())
    return [module for module in (*layers, model.get_input_embeddings(), *never_run) if module is not None]


def _stay_whole(model: PreTrainedModel, modules: list[nn.Module]) -> set[nn.Parameter]:
    """Parameters that cannot be cut: they have no dimension, or belong to more than one module."""
    inside = {inner for module in modules for inner in module.modules()}
    owners = Counter(parameter for module in modules for parameter in set(module.parameters()))
    for outside in set(model.modules()) - inside:
        owners.update(outside.parameters(recurse=False))
    return {parameter for parameter, count in owners.items() if count > 1 or not parameter.ndim}


def _forget_order(module: nn.Module, *_: Any) -> None:
    """Clears FSDP's list of forward passes. It keeps them for a backward pass, which a frozen LM never has."""
    # Private names of torch: tests/lm/test_sharding.py fails if they change.
    group = cast(FSDPModule, module)._get_fsdp_state()._fsdp_param_group
    if group is None:
        return
    group.comm_ctx.post_forward_order.clear()
    group._post_forward_indices.clear()
