"""Mixtures of experts: transformers holds all experts of a block in one parameter (experts, out, in), which no rule can claim."""

import re


def fused_experts(model):
    """{name: (experts, out, in)} of such parameters."""
    return {
        f"{name}.{own}": tuple(parameter.shape)
        for name, module in model.named_modules()
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and "Expert" in type(module).__name__
    }


def about_experts(model):
    """A line for an error message about the parameters that no rule can claim; "" where there are none."""
    seen = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in fused_experts(model))
    return f"Experts fused into one 3-D parameter cannot be replaced: {', '.join(seen)}.\n" if seen else ""
