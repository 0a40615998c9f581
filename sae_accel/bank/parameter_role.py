from dataclasses import dataclass

from ..ops.rows import Cut


@dataclass
class ParameterRole:
    """
    What a parameter is to the optimizer. Each parameter has a group of its own, which holds this under the key `role`.

    Args:
        head (`str`): Name of the head that it is of, or `"lora"`.
        parameter (`str`): Its name in the head.
        whole_shape (`tuple[int, ...]`): Its shape, whatever part of it lies on this process.
        unit_norm (`bool`): Whether its rows stay at norm 1.
        relative (`bool`): Whether an update moves it by a part of itself, as thresholds do.
        is_part (`bool`): Whether this process holds a part of it only. Set where heads are spread.
        cut ([`Cut`], *optional*): Which flat piece that is, if it has no regard to rows. Set where heads are spread.
    """

    head: str = ""
    parameter: str = ""
    whole_shape: tuple[int, ...] = ()
    unit_norm: bool = False
    relative: bool = False
    is_part: bool = False
    cut: Cut | None = None
