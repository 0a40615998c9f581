"""What the optimizer knows of a parameter: its head, its name, and how an update must treat it."""

from dataclasses import dataclass

from ..ops.rows import Cut


@dataclass
class ParameterRole:
    """
    The facts that the optimizer needs of a parameter. Each parameter has its own group, which holds this under the key
    `role`.

    Args:
        head (`str`): Name of the parameter's head, or `"lora"`.
        parameter (`str`): Name of the parameter in its head.
        whole_shape (`tuple[int, ...]`): Shape of the whole parameter, even if this process holds a part of it.
        unit_norm (`bool`): Whether its rows stay at norm 1.
        relative (`bool`): Whether an update moves it in proportion to itself, as for thresholds.
        is_part (`bool`): Whether this process holds only a part of it. Set when heads are spread over processes.
        cut ([`Cut`], *optional*): The position of this process's flat piece, if it may cut rows. Set when heads are
            spread over processes.
    """

    head: str = ""
    parameter: str = ""
    whole_shape: tuple[int, ...] = ()
    unit_norm: bool = False
    relative: bool = False
    is_part: bool = False
    cut: Cut | None = None
