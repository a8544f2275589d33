"""The classes that a sequence or token classifier predicts."""

import torch
from tqdm.auto import tqdm

from tnlib.losses import IGNORE
from tnlib.modes import eval_mode
from tnlib.windows import check_windows


def predict(model, data, batch=32, progress=False):
    """The class that a classifier finds most likely for each example, or for each token.

    model: a sequence or token classifier of transformers
    data: dictionary of tensors as from encode_task: input_ids and perhaps attention_mask, token_type_ids (n, context)
    batch: examples a forward pass; they are run in the order of their length, and padding they do not need is left out
    Returns: (n,) int64, or for a token classifier (n, context), -100 on padding; the model's modes are as before
    Raises: ValueError for ids or context beyond the model's, a model that is no classifier, or logits not finite
    Exact: but for rounding the result does not depend on `batch`, and row i belongs to row i of the data.
    """
    data = {name: tensor.cpu() for name, tensor in data.items()}
    ids = data["input_ids"]
    check_windows("predict", model, ids)
    mask = data.get("attention_mask", torch.ones_like(ids)) != 0
    inputs = {name: data[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in data}
    ends = (mask * torch.arange(1, ids.shape[1] + 1)).amax(1).clamp(min=1)  # (n,): place after the last token
    parts = ends.argsort(descending=True).split(batch)  # the longest first: what does not fit is known at once
    device, found = next(model.parameters()).device, []
    with eval_mode(model), torch.inference_mode():
        for some in tqdm(parts, "predict", disable=not progress):
            given = {name: tensor[some, : int(ends[some].max())].to(device).long() for name, tensor in inputs.items()}
            logits = model(**given).logits  # (batch, classes) or (batch, longest, classes)
            _check_logits(model, logits, some)
            found.append(logits.argmax(-1).cpu())
    classes = torch.full(ids.shape[: found[0].dim()], IGNORE)
    for some, best in zip(parts, found):
        classes[(some, slice(best.shape[1])) if best.dim() == 2 else some] = best
    return classes if classes.dim() == 1 else classes.masked_fill(~mask, IGNORE)


def _check_logits(model, logits, some):
    """Refuse logits that are not those of a classifier, or not finite."""
    classes, wanted = logits.shape[-1], getattr(model.config, "num_labels", None)
    if classes < 2 or classes != wanted:
        raise ValueError(
            f"predict: {type(model).__name__} gives logits {tuple(logits.shape)} with num_labels {wanted}; needed a classifier of "
            "two classes or more. Load it with load_model(name, task='sequence-classification', num_labels=...)."
        )
    if not (finite := logits.isfinite().flatten(1).all(1).cpu()).all():
        raise ValueError(
            f"predict: {type(model).__name__} gave logits not finite for example {int(some[~finite][0])}; needed finite ones. "
            "Repair the weights, or evaluate in float32."
        )
