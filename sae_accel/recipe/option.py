from collections.abc import Iterable
from dataclasses import field
from typing import Any


class Help(str):
    """
    What a field means, with what else is known of it. `HfArgumentParser` gives a field's metadata to `argparse` as
    they are, so all of it goes under the one key `help`.

    Args:
        text (`str`): What `--help` prints.
        minimum (`float`, *optional*): The least value that is allowed.
        maximum (`float`, *optional*): The largest value that is allowed.
        above (`float`, *optional*): Values must be larger than this.
        secret (`bool`, defaults to `False`): Whether the value must never reach a file or a tracker.
        device_keys (`bool`, defaults to `False`): Whether it is a mapping by devices or modules, with their own names.
        choices (`Iterable[str]`, *optional*): The values that are allowed, looked up when they are needed.
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
    """A dataclass field with a [`Help`]; mutable defaults are copied for each instance."""
    metadata = {"help": Help(help, **known)}
    shown = not metadata["help"].secret
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata, repr=shown)
    return field(default=default, metadata=metadata, repr=shown)
