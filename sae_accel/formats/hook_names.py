"""
Translates the names that other libraries give to places in an LM into modules, and back.

TransformerLens says `blocks.3.hook_mlp_out`; a Llama calls this place `layers.3.mlp`, and a GPT-2 `h.3.mlp`. So the
translation needs the name of the LM.
"""

import re
from collections.abc import Iterator


# A pattern of LM names, with the modules for a layer, its attention and its MLP.
_FAMILIES = (
    (r"gpt-?2|gpt-neo(?!x)|tiny-?stories", "h.{}", "attn", "mlp"),
    (r"pythia|neox", "layers.{}", "attention", "mlp"),
    (r"llama|mistral|qwen|gemma|deepseek|smollm|olmo|phi-?3", "layers.{}", "self_attn", "mlp"),
)
# These LMs normalise the outputs of attention and MLP before they add them to the residual stream.
_NORMED_OUTPUTS = re.compile(r"gemma-?(scope-)?[23]|gemma-scope")


def module_of(hook: str | None, lm: str | None) -> str | None:
    """
    Returns the module of an LM's base model whose output a hook of another library reads.

    Args:
        hook (`str`, *optional*): A hook such as `blocks.12.hook_resid_post` (TransformerLens) or
            `model.layers.12.output`.
        lm (`str`, *optional*): The LM's name, or a text that contains it.

    Returns:
        `str` or `None`: None if the LM is not known, or has no such module.
    """
    if hook is None:
        return None
    if match := re.fullmatch(r"(?:model\.|transformer\.)?((?:layers|h)\.\d+(?:\.\w+)*?)(?:\.output)?", hook):
        return None if hook.endswith(".input") else match[1]
    family = next((rest for pattern, *rest in _FAMILIES if re.search(pattern, (lm or "").lower())), None)
    match = re.fullmatch(r"blocks\.(\d+)\.(?:hook_)?(resid_pre|resid_post|mlp_out|attn_out)", hook)
    if family is None or match is None:
        return None
    layer, attention, mlp = family
    index, place = int(match[1]), match[2]
    if place == "resid_pre":
        return layer.format(index - 1) if index else None
    if place == "resid_post":
        return layer.format(index)
    if _NORMED_OUTPUTS.search((lm or "").lower()):
        mlp, attention = "post_feedforward_layernorm", "post_attention_layernorm"
    return f"{layer.format(index)}.{mlp if place == 'mlp_out' else attention}"


def inner_names(name: str) -> Iterator[str]:
    """
    Yields a name without its first modules: first without one, then without two, and so on.

    Args:
        name (`str`): A name or glob, such as `model.layers.3`, which gives `layers.3`.
    """
    parts = name.split(".")
    # A layer's number means nothing without the list before it.
    yield from (".".join(parts[i:]) for i in range(1, len(parts)) if re.match("[A-Za-z_]", parts[i]))


def lens_name(hookpoint: str, output: bool = True) -> str | None:
    """
    Returns the TransformerLens hook for a module's output, or for its input.

    Args:
        hookpoint (`str`): A module such as `layers.10` or `h.3.mlp`.
        output (`bool`, defaults to `True`): Whether the hook reads the module's output; if not, its input.

    Returns:
        `str` or `None`: None if TransformerLens has no such hook.
    """
    match = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?", hookpoint)
    if match is None:
        return None
    if match[2] is None:
        return f"blocks.{match[1]}.hook_resid_{'post' if output else 'pre'}"
    if not output:
        return f"blocks.{match[1]}.mlp.hook_in" if match[2] == "mlp" else None
    return f"blocks.{match[1]}.hook_{'mlp' if match[2] == 'mlp' else 'attn'}_out"
