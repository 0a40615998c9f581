"""The placement of whole heads on processes, so that each process has about the same amount of work."""

from collections.abc import Iterable

from ..bank.plans import HeadPlan
from ..common.errors import InputError
from ..common.tables import aligned


# Gradients, optimizer and norms pass over each parameter about a dozen times per step. This takes as long as the
# products with this many tokens.
TOKENS_A_PARAMETER = 1000


def place_heads(plans: list[HeadPlan], processes: int, tokens: int) -> list[list[HeadPlan]]:
    """
    Deals heads to processes so that each has about the same amount of work.

    The costliest head comes first, and each goes to the process with the least work so far. Among equals, the process
    that already reads the most of the head's activations gets it.

    Args:
        plans (`list[HeadPlan]`): All heads of the run.
        processes (`int`): Number of processes.
        tokens (`int`): Tokens per batch, over all processes.

    Returns:
        `list[list[HeadPlan]]`: the heads of each process, in the order of `plans`. It is the same on every process.

    Raises:
        `InputError`: if there are fewer heads than processes.
    """
    if len(plans) < processes:
        raise InputError(
            f"training.distribute_modules: there are {len(plans)} heads for {processes} processes, so some processes "
            f"would hold none. Start at most {len(plans)} processes, train more heads, or use "
            "--training.distribute_latents or DDP."
        )
    loads = [0] * processes
    sites: list[set] = [set() for _ in range(processes)]
    places: dict[str, int] = {}
    for plan in sorted(plans, key=lambda plan: -cost(plan, tokens)):
        own = set(plan.widths)
        index = min(range(processes), key=lambda i: (loads[i], -len(own & sites[i])))
        places[plan.name] = index
        loads[index] += cost(plan, tokens)
        sites[index] |= own
    return [[plan for plan in plans if places[plan.name] == index] for index in range(processes)]


def cost(plan: HeadPlan, tokens: int) -> int:
    """The cost of a head's training step on this number of tokens, in multiplications."""
    config = plan.config
    return tokens * config.num_latents * config.d_in + TOKENS_A_PARAMETER * num_parameters([plan])


def num_parameters(plans: Iterable[HeadPlan]) -> int:
    """The number of weights of some heads."""
    return sum(plan.config.num_parameters for plan in plans)


def placement_table(placed: list[list[HeadPlan]]) -> str:
    """A table with one line per process: its heads and the number of their parameters."""
    rows = [("process", "parameters", "heads")]
    for index, plans in enumerate(placed):
        rows.append((str(index), f"{num_parameters(plans):,}", ", ".join(plan.name for plan in plans)))
    return "\n".join(["Heads by process:", *aligned(rows)])
