from dataclasses import dataclass


@dataclass
class Skips:
    """
    What a run has left out since its start, because it is not finite.

    Args:
        steps (`int`): Optimizer steps that were passed over.
        in_a_row (`int`): How many of them came last, with no step taken since.
        non_finite_tokens (`int`): Tokens, also of steps that were passed over.
    """

    steps: int = 0
    in_a_row: int = 0
    non_finite_tokens: int = 0
