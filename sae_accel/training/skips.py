from dataclasses import dataclass


@dataclass
class Skips:
    """
    Counts of skipped steps and left-out tokens since the start of a run, because of numbers that are not finite.

    Args:
        steps (`int`): Skipped optimizer steps.
        in_a_row (`int`): Steps skipped since the last step that was taken.
        non_finite_tokens (`int`): Left-out tokens, also in skipped steps.
    """

    steps: int = 0
    in_a_row: int = 0
    non_finite_tokens: int = 0
