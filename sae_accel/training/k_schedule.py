from ..models import HeadConfig
from ..recipe.arguments import HeadArguments


def k_at(step: int, config: HeadConfig, arguments: HeadArguments) -> int:
    """
    The number of active latents per token in an optimizer step. It falls linearly from `min(10 * d_in, num_latents)`
    to the config's `k`, over `k_decay_steps` steps.

    Args:
        step (`int`): Steps done before this one.
        config (`HeadConfig`): The head's config, which stays unchanged.
        arguments (`HeadArguments`): Give `k_decay_steps`, and `multi_topk`, which needs `4 * k` latents.
    """
    if step >= arguments.k_decay_steps:
        return config.trained_k
    start = min(10 * config.d_in, config.num_latents // 4 if arguments.multi_topk else config.num_latents)
    progress = step / arguments.k_decay_steps
    k = max(config.trained_k, round(start * (1 - progress) + config.trained_k * progress))
    if config.activation == "groupmax":
        # Groups have equal size, so k rises to the next divisor of the number of latents.
        k = next(divisor for divisor in range(k, config.num_latents + 1) if config.num_latents % divisor == 0)
    return k
