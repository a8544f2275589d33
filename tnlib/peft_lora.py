"""LoRA of PEFT (extra "peft") beside compressed layers: they stay as they are, frozen, and small dense matrices learn the rest.

PEFT knows no layer but torch's and transformers' own, and asks a LoraConfig for further ones; register_peft_ tells it.
"""

import functools

from torch import nn

from tnlib.layers import FactorizedEmbedding, FactorizedLinear, SplitLinear
from tnlib.packing import QuantizedEmbedding, is_packed


def register_peft_(config):
    """Let a peft.LoraConfig target factorized and packed linear layers, in place; returns None.

    Call it before get_peft_model, and on the config that PeftModel.from_pretrained(model, folder, config=config) is given: PEFT
    does not save it. Factors, codes and scales are frozen; gradients reach the adapters only.
    Raises: ImportError without the extra. Later, from PEFT: ValueError for an embedding as target, for LoRA's variants (DoRA and
        others, which need a dense weight), and for merge_and_unload, which compressed layers cannot do. PEFT goes from layer to
        layer: dense ones before the first compressed one are merged by then, so save the adapter before you try
    Source: Hu et al. 2021 (LoRA), Dettmers et al. 2023 (QLoRA: the same beside 4 bits). Exact: as LoRA starts, B = 0, the model
        computes what it did.
    """
    lora = _lora_class()
    dense = {kind: functools.partial(_if_packed, lora) for kind in (nn.Linear, _conv1d())}
    tables = dict.fromkeys((FactorizedEmbedding, QuantizedEmbedding), _refuse_table)
    config._register_custom_module({FactorizedLinear: lora, SplitLinear: lora} | tables | dense)


@functools.cache
def _lora_class():
    """A class of PEFT's own kind; made at first use, as PEFT is an extra."""
    try:
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise ImportError(
            f"register_peft_: peft cannot be imported ({error}); needed the optional extra. Run: pip install 'tnlib[peft]'"
        ) from None

    class CompressedLora(Linear):
        """x -> layer(x) + scaling * B A x, for a layer whose weight is not stored as a matrix."""

        lora_variants = {(): None}  # noqa: RUF012  # all others change the weight, or need its norms

        def _get_in_out_features(self, module):
            out, width = getattr(module, "shape", None) or _dense_shape(module)
            return width, out

        def merge(self, safe_merge=False, adapter_names=None):
            """Refused. Raises: ValueError"""
            raise ValueError(_no_merge(self.get_base_layer(), self.in_features * self.out_features))

        def supports_lora_conversion(self, adapter_name="default"):
            return False

    return CompressedLora


def _if_packed(lora, target, adapter_name, **options):
    """Ours for a dense layer whose weight is packed, into which PEFT would merge without effect; None leaves it to PEFT."""
    layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    return lora(target, adapter_name, **options) if is_packed(layer) else None


def _dense_shape(layer):
    out, width = layer.parametrizations.weight[0].shape
    return (width, out) if isinstance(layer, _conv1d()) else (out, width)


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _no_merge(layer, numbers):
    if is_packed(layer):
        grid = layer.parametrizations.weight[0]
        held = f"codes of {grid.bits} bits, and weight plus adapter is not on their grid"
    else:
        form = layer.form if isinstance(layer, FactorizedLinear) else layer.parts[0].form
        held = f"factors of {form}, and weight plus adapter has none of these ranks"
    return (
        f"merge: a {type(layer).__name__} holds {held}; needed a dense layer, here of {numbers:,} numbers. Keep the adapter beside "
        "it, as save_pretrained stores it; or tn.densify_(model) first, load the adapter onto that and merge."
    )


def _refuse_table(target, adapter_name, **options):
    raise ValueError(
        f"LoRA {adapter_name!r}: got a {type(target).__name__} as target; needed a linear layer: PEFT's adapter of an embedding reads "
        "rows of a stored table. Leave it out of target_modules."
    )
