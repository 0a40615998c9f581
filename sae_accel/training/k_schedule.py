from ..models import HeadConfig
from ..recipe.arguments import HeadArguments


def k_at(step: int, config: HeadConfig, arguments: HeadArguments) -> int:
    """
    Active latents of a head in an optimizer step, falling linearly from `min(10 * d_in, num_latents)` to the config's
    k.

    Args:
        step (`int`): Steps done before this one.
        config (`HeadConfig`): The head's, which is never changed.
        arguments (`HeadArguments`): Its `k_decay_steps`, and whether 4k latents must exist for Multi-TopK.
    """
    if step >= arguments.k_decay_steps:
        return config.trained_k
    start = min(10 * config.d_in, config.num_latents // 4 if arguments.multi_topk else config.num_latents)
    progress = step / arguments.k_decay_steps
    k = max(config.trained_k, round(start * (1 - progress) + config.trained_k * progress))
    if config.activation == "groupmax":
        # Groups must be equal, so k rises to the next number that divides the latents.
        k = next(divisor for divisor in range(k, config.num_latents + 1) if config.num_latents % divisor == 0)
    return k
