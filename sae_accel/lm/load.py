"""
Loads a recipe's LM and its tokenizer.

`load_architecture` builds the LM without weights, so that a wrong recipe is refused before anything large is read.
`load_lm` then reads the weights, quantised, placed on devices, sharded or with an adapter, as the recipe says. The LM
is frozen: its own weights never train.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from ..common.errors import InputError
from ..loading.head_files import check_devices
from ..processes.agreement import say, this_process
from ..recipe.arguments import ModelArguments
from ..recipe.checks import check_sharding
from .bitsandbytes_backend import keep_unpacked, require_bitsandbytes
from .modality import check_reads_text
from .refusals import lm_errors
from .sharding import modules_to_shard, shard_in_turn
from .source import check_runs_no_code, check_source, check_weights_fit


if TYPE_CHECKING:
    from .adapter import Adapter, AutoClass


# Every tokenizer has at least one of these files.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_architecture(arguments: ModelArguments, *, with_lm_head: bool = False) -> PreTrainedModel:
    """
    Builds the LM without weights, on the meta device, so that a recipe is checked before anything large is read.

    Args:
        arguments ([`ModelArguments`]): The LM.
        with_lm_head (`bool`, defaults to `False`): Whether to keep the LM's own head, which an end-to-end loss needs.

    Raises:
        `InputError`: if the model does not exist, lacks a head for the next token where one is needed, does not fit
            its adapter, or cannot be quantised on this machine or sharded in this run.
    """
    if arguments.quantization is not None:
        require_bitsandbytes("model.quantization", arguments.quantization)
    if arguments.shard:
        check_sharding(with_lm_head=with_lm_head, processes=this_process().num_processes)
    check_source(arguments)
    _check_placement(arguments)
    if arguments.trust_remote_code:
        say(f"Code of {arguments.name_or_path!r}, if it has any, will run: model.trust_remote_code is true.")
    with lm_errors(arguments):
        config = AutoConfig.from_pretrained(arguments.name_or_path, **_source(arguments))
        check_runs_no_code(config, arguments)
        if with_lm_head:
            _check_predicts(config, arguments)
        adapter = _adapter(arguments)
        # The choice of an expert's tokens needs values, which the meta device lacks, so experts run on whole batches.
        experts = {"experts_implementation": "batched_mm"} if hasattr(config, "_experts_implementation") else {}
        with torch.device("meta"):
            model = _auto_class(config, adapter, with_lm_head).from_config(
                config, trust_remote_code=arguments.trust_remote_code, **_attention(arguments), **experts
            )
    check_reads_text(model, arguments.name_or_path)
    if adapter is not None:
        adapter.check(model)
    if arguments.shard:
        modules_to_shard(model)
    return model


def load_lm(
    arguments: ModelArguments, *, with_lm_head: bool = False, device: torch.device | str | None = None
) -> PreTrainedModel:
    """
    Loads the frozen LM in evaluation mode, with its adapter if the recipe names one.

    Args:
        arguments ([`ModelArguments`]): The LM and its precision. With `shard`, every process must call this function.
        with_lm_head (`bool`, defaults to `False`): Whether to keep the LM's own head, which an end-to-end loss needs.
        device (`torch.device`, *optional*): Device of a quantised LM, if the recipe has no `device_map`.

    Raises:
        `InputError`: if the model does not exist, cannot be read, lacks weights of a head that is needed, or cannot be
            sharded in this run. With `shard`, all processes raise if one does.
    """
    if arguments.shard:
        check_sharding(with_lm_head=with_lm_head, processes=this_process().num_processes)
        whole = replace(arguments, shard=False)
        return shard_in_turn(lambda: load_lm(whole, with_lm_head=with_lm_head, device=device))
    if arguments.quantization is not None:
        require_bitsandbytes("model.quantization", arguments.quantization)
    with lm_errors(arguments):
        config = AutoConfig.from_pretrained(arguments.name_or_path, **_source(arguments))
        check_runs_no_code(config, arguments)
        adapter = _adapter(arguments)
        # With `output_loading_info` transformers returns a pair, which its types do not say.
        model, report = cast(Any, _auto_class(config, adapter, with_lm_head)).from_pretrained(
            arguments.name_or_path,
            dtype=arguments.dtype,
            output_loading_info=True,
            # `check_weights_fit` refuses these and names them; transformers' own error does not.
            ignore_mismatched_sizes=True,
            **_source(arguments),
            **_attention(arguments),
            **_placement(arguments, config, device),
        )
    check_weights_fit(report, arguments.name_or_path)
    if with_lm_head and (missing := sorted(report["missing_keys"])):
        raise InputError(
            f"training.loss: the files of {arguments.name_or_path!r} lack {missing[0]!r}, which the LM needs to "
            "predict tokens. Use files with the LM's head, or set --training.loss fvu."
        )
    if arguments.quantization == "4bit":
        keep_unpacked(model)
    if adapter is not None:
        adapter.put_onto(model)
    return model.requires_grad_(False).eval()


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase | None:
    """
    Loads the LM's tokenizer. Returns None if the LM has none: token ids can be trained on without one.

    Raises:
        `InputError`: if there is a tokenizer that cannot be loaded.
    """
    try:
        with lm_errors(arguments):
            tokenizer = AutoTokenizer.from_pretrained(arguments.name_or_path, **_source(arguments))
            # A damaged tokenizer may fail only at its first text.
            tokenizer("text", add_special_tokens=False, verbose=False)
            return tokenizer
    except InputError:
        if arguments.gguf_file is not None or _has_file_of_tokenizer(arguments):
            raise
        return None


def _has_file_of_tokenizer(arguments: ModelArguments) -> bool:
    source = {name: value for name, value in _source(arguments).items() if name in ("revision", "token")}
    with lm_errors(arguments):
        # A file that does not exist is no error here; a Hub that gives no answer is.
        return any(
            cached_file(arguments.name_or_path, name, _raise_exceptions_for_missing_entries=False, **source)
            for name in _TOKENIZERS
        )


def _adapter(arguments: ModelArguments) -> "Adapter | None":
    """The adapter that the recipe names, if any. PEFT is imported only then, since the import takes time."""
    if arguments.adapter is None:
        return None
    from .adapter import Adapter

    return Adapter(arguments)


def _auto_class(config: PreTrainedConfig, adapter: "Adapter | None", with_lm_head: bool) -> "AutoClass":
    """The class that loads the LM: without its head, unless a loss or the names in an adapter's files need it."""
    if with_lm_head:
        return AutoModelForCausalLM
    return AutoModel if adapter is None else adapter.auto_class(config)


def _check_predicts(config: PreTrainedConfig, arguments: ModelArguments) -> None:
    name, kind = arguments.name_or_path, type(config)
    reason = None
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        reason = f"a {config.model_type} model does not predict the next token"
    elif kind in MODEL_FOR_MASKED_LM_MAPPING and not config.is_decoder:
        reason = f"a {config.model_type} model predicts masked tokens, not the next one"
    else:
        bare = [known for known in config.architectures or [] if known.endswith("Model") and "LMHead" not in known]
        if bare and not config.get_text_config().tie_word_embeddings:
            reason = f"its files are those of a {bare[0]}, which has no LM head"
    if reason is not None:
        raise InputError(
            f"training.loss: ce and kl need an LM with its head, and {name!r} has none: {reason}. Set "
            "--training.loss fvu, or use another LM."
        )


def _source(arguments: ModelArguments) -> dict[str, Any]:
    options = {
        "revision": arguments.revision or "main",
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }
    return options | ({"gguf_file": arguments.gguf_file} if arguments.gguf_file else {})


def _placement(
    arguments: ModelArguments, config: PreTrainedConfig, device: torch.device | str | None
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if arguments.device_map is not None:
        options["device_map"] = arguments.device_map
    elif arguments.quantization is not None and device is not None:
        options["device_map"] = {"": device}
    if arguments.max_memory is not None:
        options["max_memory"] = {int(k) if k.isdigit() else k: memory for k, memory in arguments.max_memory.items()}
    if arguments.quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif arguments.quantization == "4bit":
        # Matrix products run in the precision of the other weights; the default of bitsandbytes is float32.
        dtype = config.dtype if arguments.dtype == "auto" else arguments.dtype
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return options


def _check_placement(arguments: ModelArguments) -> None:
    try:
        check_devices(arguments.device_map)
    except ValueError as error:
        raise InputError(f"model.{error}") from error
    for device, memory in (arguments.max_memory or {}).items():
        if device not in ("cpu", "disk", "mps", *map(str, range(torch.cuda.device_count()))):
            raise InputError(
                f"model.max_memory: there is no device {device!r} on this machine, which has "
                f"{torch.cuda.device_count()} GPUs. Use the number of a GPU, cpu, disk or mps."
            )
        try:
            convert_file_size_to_int(memory)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"model.max_memory: {memory!r} is no size. Write a size such as 20GiB.") from error


def _attention(arguments: ModelArguments) -> dict[str, str]:
    chosen = arguments.attn_implementation
    return {} if chosen is None else {"attn_implementation": chosen}
