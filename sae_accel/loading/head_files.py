"""
Reads one head from files that are on this machine.

Transformers fills a missing tensor with random numbers and only warns, which would give a head that looks loaded. So
the headers of the weights are compared with the config first, and every error names the head and the folder or repo
that it is from.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from ..common.errors import InputError, is_out_of_memory, one_line
from ..formats import Place
from ..models.configuration_head import HeadConfig
from ..models.modeling_head import HeadModel
from ..models.registry import known_config, model_of
from ..ops.finite import first_non_finite
from .repository import Repository


# Fields that a user may give because the files of a head's library do not tell them.
TELLING = ("apply_b_dec_to_input", "base_model_name_or_path", "encoder_only", "input_scale", "k", "normalize_input")
# Errors that readers run into when a file is damaged or holds something unexpected.
_BROKEN = (LookupError, TypeError, AttributeError, EOFError, ArithmeticError, AssertionError)
# Errors whose message says by itself what is wrong.
_TELLING = (OSError, ValueError, RuntimeError, ImportError, AssertionError, StrictDataclassError)
_FLOATS = ("F64", "F32", "F16", "BF16")
_DECODER = {"W_dec", "W_skip"}


@contextmanager
def head_errors(repository: Repository, name: str) -> Iterator[None]:
    """Turns errors while a head is read into one-line errors that name the head."""
    where = f"head {name!r} of {repository.name!r}" if name else repr(repository.name)
    try:
        yield
    except SafetensorError as error:
        raise InputError(
            f"{where} cannot be loaded, because its weights are damaged ({error}). Fetch them again."
        ) from error
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        if is_out_of_memory(error) or (isinstance(error, InputError) and repository.name in str(error)):
            raise
        raise InputError(f"{where} cannot be loaded: {reason_of(error)}") from error
    except _BROKEN as error:
        raise InputError(f"{where} cannot be loaded: {reason_of(error)}") from error


def stored_config(place: Place, options: dict[str, Any]) -> HeadConfig:
    """
    Returns the config of a head whose files are here, with the fields that the user gave. For our own layout only the
    config needs to be here.

    Raises:
        `ValueError`: if the config is not a head's, or a field that the user gave does not fit.
    """
    told = {key: value for key, value in options.items() if key in TELLING}
    if place.layout is not None:
        return place.layout.open_head(replace(place, given=told)).config
    if "input_scale" in told:
        raise ValueError("input_scale was given, but only heads of SAELens take it.")
    keys = place.json("config")
    config_class = known_config(keys.get("model_type"))
    if config_class is None:
        raise ValueError(f"it is a {keys.get('model_type')}, not an SAE or transcoder.")
    # AutoConfig would ask whether to run the code that an `auto_map` names.
    config = config_class.from_pretrained(place.paths["config"].parent)
    return config_class.from_dict(config.to_dict() | told) if told else config


def load_head(place: Place, options: dict[str, Any]) -> HeadModel:
    """
    Loads a head whose files are here.

    Args:
        place (`Place`): The head's files.
        options (`dict`): Options of transformers, and fields of the config that the user gave.

    Raises:
        `ValueError`: if config and weights disagree, or an option does not fit.
    """
    if place.layout is None:
        config = stored_config(place, options)
        check_weights(place, config)
        options = {key: value for key, value in options.items() if key not in TELLING}
        folder = place.paths["config"].parent
        return model_of(config).from_pretrained(folder, config=config, use_safetensors=True, **options)
    # Transformers takes the older name too.
    if "torch_dtype" in options:
        options["dtype"] = options.pop("torch_dtype")
    head = place.layout.open_head(
        replace(place, given={key: value for key, value in options.items() if key in TELLING})
    )
    tensors = head.read()
    options = {key: value for key, value in options.items() if key not in TELLING}
    options.setdefault("dtype", tensors["encoder.weight"].dtype)
    return model_of(head.config).from_pretrained(None, config=head.config, state_dict=tensors, **options)


def check_weights(place: Place, config: HeadConfig) -> None:
    """
    Compares the headers of a head's weights with its config; transformers would fill in a missing tensor.

    Raises:
        `ValueError`: if a tensor is missing, unknown, or of another shape or type.
        `SafetensorError`: if a file is damaged.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_of(config)(config).state_dict().items()}
    found = {
        name: head for role in place.paths if role.endswith(".safetensors") for name, head in _headers(place, role)
    }
    for name, (shape, kind, role) in found.items():
        if shape != expected.get(name, shape):
            raise ValueError(
                f"by config.json {name} should have shape {expected[name]}, but in {role} it has {shape}."
            )
        if kind not in _FLOATS:
            raise ValueError(f"{name} in {role} is of type {kind}; allowed are {', '.join(_FLOATS)}.")
    if missing := [name for name in expected if name not in found]:
        raise ValueError(f"by config.json it has {', '.join(missing)}, which its weights lack.")
    if unknown := sorted(found.keys() - expected.keys() - (_DECODER if config.encoder_only else set())):
        raise ValueError(f"its weights hold {', '.join(unknown)}, which no head with that config.json has.")


def refuse_non_finite(place: Place, where: str) -> None:
    """
    Checks that a head's weights are finite, one tensor at a time.

    Args:
        place (`Place`): The head's files.
        where (`str`): The head, as the first words of the error.

    Raises:
        `InputError`: if a number is NaN or infinite.
    """
    for role in place.paths:
        if role.endswith(".safetensors"):
            with safe_open(place.paths[role], framework="pt") as file:
                words = first_non_finite((name, file.get_tensor(name)) for name in file.keys())
            if words is not None:
                raise InputError(f"{where} cannot be released: {words}.")


def _headers(place: Place, role: str) -> Iterator[tuple[str, tuple[tuple[int, ...], str, str]]]:
    """Yields the name, shape and type of each tensor in a file, with the file's role."""
    with safe_open(place.paths[role], framework="pt") as file:
        for name in file.keys():
            tensor = file.get_slice(name)
            yield name, (tuple(tensor.get_shape()), tensor.get_dtype(), role)


def check_devices(device_map: Any) -> None:
    """
    Checks that the devices of a `device_map` exist, before files are fetched for them.

    Raises:
        `ValueError`: if one of the devices does not exist.
    """
    for device in device_map.values() if isinstance(device_map, dict) else [device_map]:
        if device in (None, "auto", "balanced", "balanced_low_0", "sequential", "disk"):
            continue
        try:
            if torch.device(device).type == "meta":
                raise ValueError(f"device_map is {device_map!r}, but a meta device holds no values.")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
            raise ValueError(f"device_map is {device_map!r}, but there is no such device here ({reason}).") from error


def reason_of(error: BaseException) -> str:
    """
    Returns in one line why a model's files cannot be read.

    Args:
        error (`BaseException`): The error of a reader. For a failed check of a config, the line holds the message
            without the name of the check; for an error with a bare message, it also holds the error's type.
    """
    says_much = isinstance(error, _TELLING)
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    text = one_line(error)
    if isinstance(error, json.JSONDecodeError):
        return f"one of its files is not valid JSON ({text})."
    if not says_much:
        return f"its files hold what they should not ({type(error).__name__}: {text})."
    if kinds := re.findall(r"Field '(\w+)' expected (\w+), got (\w+) \(value: (.*?)\)", text):
        name, _, kind, value = kinds[0]
        allowed = " or ".join(allowed for _, allowed, *_ in kinds).replace("NoneType", "null")
        return f"{name} is {value}, a {kind}; allowed is {allowed}."
    return text
