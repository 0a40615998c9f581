"""The definition of a recipe's field: its default, its meaning, and the limits of its value."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any


class Help(str):
    """
    The meaning of a field, and the limits of its value.

    It is a string that carries attributes. `HfArgumentParser` passes a field's metadata on to `argparse` unchanged, so
    all of it must lie under the one key `help`.

    Args:
        text (`str`): The text of `--help`.
        minimum (`float`, *optional*): The least allowed value.
        maximum (`float`, *optional*): The largest allowed value.
        above (`float`, *optional*): Values must be larger than this.
        secret (`bool`, defaults to `False`): Whether the value must never reach a file or a tracker.
        device_keys (`bool`, defaults to `False`): Whether the value is a mapping whose keys are devices or modules.
        choices (`Iterable[str]`, *optional*): The allowed values. They are read when a value is checked, so that kinds
            of heads can be added.
    """

    minimum: float | None
    maximum: float | None
    above: float | None
    secret: bool
    device_keys: bool
    choices: Iterable[str] | None

    def __new__(
        cls,
        text: str,
        minimum: float | None = None,
        above: float | None = None,
        secret: bool = False,
        device_keys: bool = False,
        choices: Iterable[str] | None = None,
        maximum: float | None = None,
    ) -> "Help":
        self = super().__new__(cls, text)
        self.minimum, self.above, self.secret, self.device_keys = minimum, above, secret, device_keys
        self.choices, self.maximum = choices, maximum
        return self


def option(default: Any, help: str, **known: Any) -> Any:
    """
    A dataclass field with a [`Help`]. Each instance gets its own copy of a mutable default.

    Args:
        default (`Any`): The default.
        help (`str`): The meaning of the field: one or two sentences with the unit and the rule for an unset value.
        known (*optional*): The limits, as in [`Help`].
    """
    metadata = {"help": Help(help, **known)}
    shown = not metadata["help"].secret
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata, repr=shown)
    return field(default=default, metadata=metadata, repr=shown)
