from collections.abc import Iterable

from ..bank.plans import HeadPlan
from ..common.errors import InputError
from ..common.tables import aligned


# What a parameter costs in a step beside its part in the products with tokens: gradients, optimizer and norms pass
# over it some dozen times, which takes as long as this many tokens' products.
TOKENS_A_PARAMETER = 1000


def place_heads(plans: list[HeadPlan], processes: int, tokens: int) -> list[list[HeadPlan]]:
    """
    Deals heads to processes so that each has about as much to do as every other: the costliest first, each to the
    process with the least so far, or of several such the one that reads the same activations already.

    Args:
        plans (`list[HeadPlan]`): All heads of the run.
        processes (`int`): How many processes.
        tokens (`int`): Tokens of a batch, over all processes.

    Returns:
        `list[list[HeadPlan]]`: by process its heads, in the order of `plans`. The same on every process.

    Raises:
        `InputError`: if there are fewer heads than processes.
    """
    if len(plans) < processes:
        raise InputError(
            f"training.distribute_modules: there are {len(plans)} heads for {processes} processes, so that some would "
            f"hold none. Start at most {len(plans)}, train more heads, or use distribute_latents or plain DDP."
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
    """What a head's step on this many tokens costs, in multiplications."""
    config = plan.config
    return tokens * config.num_latents * config.d_in + TOKENS_A_PARAMETER * num_parameters([plan])


def num_parameters(plans: Iterable[HeadPlan]) -> int:
    """Weights of heads."""
    return sum(plan.config.num_parameters for plan in plans)


def placement_table(placed: list[list[HeadPlan]]) -> str:
    """One line for each process: its heads and their parameters."""
    rows = [("process", "parameters", "heads")]
    for index, plans in enumerate(placed):
        rows.append((str(index), f"{num_parameters(plans):,}", ", ".join(plan.name for plan in plans)))
    return "\n".join(["Heads by process:", *aligned(rows)])
