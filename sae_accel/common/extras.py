"""Packages that only some need: which extra of sae_accel installs each, and the line that says so."""

from importlib.util import find_spec

from .errors import InputError


# By package the extra, as in `pip install "sae_accel[EXTRA]"`.
EXTRAS = {
    "bitsandbytes": "quantized",
    "deepspeed": "deepspeed",
    "gguf": "quickstart",
    "matplotlib": "plots",
    "peft": "lora",
    "tensorboard": "tensorboard",
}


def is_installed(package: str) -> bool:
    """Whether a package of `EXTRAS` can be imported. It is not imported."""
    assert package in EXTRAS, package
    return find_spec(package) is not None


def how_to_install(package: str) -> str:
    """The sentence that says how a package of `EXTRAS` is installed."""
    return f'Install it: pip install "sae_accel[{EXTRAS[package]}]"'


def require_extra(what: str, package: str) -> None:
    """
    Checks that a package is installed, before anything large is read.

    Args:
        what (`str`): What needs the package, such as `training.optim adam8bit`. The error begins with it.
        package (`str`): A package of `EXTRAS`.

    Raises:
        `InputError`: if the package is not installed.
    """
    if not is_installed(package):
        raise InputError(f"{what} needs {package}. {how_to_install(package)}")
