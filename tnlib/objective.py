"""Which losses of a Heal are active at a step, what they need from the models, and what each one counts."""

import torch

from tnlib import losses
from tnlib.schedule import curriculum_over, included_layers

STATES = {
    "hidden": losses.mean_square,
    "hidden_cosine": losses.cosine,
    "embedding": losses.mean_square,
    "embedding_cosine": losses.cosine,
}


class Objective:
    """The weighted sum that a Heal minimizes.

    layers: of the model; shifts: whether the model's own loss predicts each label from the position before it
    """

    def __init__(self, heal, layers, shifts):
        self.heal, self.layers = heal, layers
        self.names = heal.weights.keys()
        self.shifts = shifts or "next_token" in self.names
        self.counts = None  # of the optimizer step under way

    def wanted(self):
        """What models are asked to return besides logits."""
        asked = {"output_hidden_states": STATES.keys(), "output_attentions": {"attention"}}
        return {"use_cache": False} | {option: True for option, needed_by in asked.items() if self.names & needed_by}

    def count(self, batches):
        """Predicted labels, unmasked positions and examples in some micro-batches: (3,) int64."""
        sums = []
        for batch in batches:
            ids, seen = batch["input_ids"], batch.get("attention_mask")
            positions = ids.new_tensor(ids.numel()) if seen is None else seen.sum()
            sums.append(torch.stack([self.predicted(batch["labels"]), positions, ids.new_tensor(len(ids))]))
        return torch.stack(sums).sum(0)

    def set_counts(self, sums):
        """Take `count` of all micro-batches of the coming optimizer step, on all processes, as the losses' divisors."""
        self.counts = dict(zip(("predicted", "positions", "rows"), sums))

    def predicted(self, labels):
        """How many labels enter the model's loss: a causal model's first one never does."""
        shifted = labels[..., 1:] if labels.dim() > 1 and self.shifts else labels
        return (shifted != losses.IGNORE).sum()

    def terms(self, step, ours, theirs, inputs, labels):
        """Active loss terms by name, unweighted, each divided by its count.

        ours, theirs: outputs of student and teacher (None where no loss needs one)
        """
        found, depth = {}, included_layers(self.heal, step, self.layers)
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        if not self.heal.curriculum_steps or curriculum_over(self.heal, step, self.layers):
            if "next_token" in self.names:
                found["next_token"] = losses.next_token(ours.logits, labels, self.counts["predicted"])
            if "task" in self.names:
                found["task"] = ours.loss * (self.predicted(labels) / self.counts["predicted"])
            for name in self.names & {"logits", "logits_reverse"}:
                found[name] = self._logits(ours.logits, theirs, mask, name == "logits_reverse")
        if self.names & STATES.keys():
            found |= self._states(ours.hidden_states, theirs.hidden_states, mask, depth)
        if "attention" in self.names:
            pairs = list(zip(ours.attentions, theirs.attentions))[:depth]
            found["attention"] = _mean(losses.attention_kl(a, b, mask, self.counts["positions"]) for a, b in pairs)
        return found

    def _logits(self, ours, theirs, mask, reverse):
        options = {"temperature": self.heal.temperature, "reverse": reverse}
        classifier = ours.dim() == 2  # (batch, classes)
        mask, count = (None, self.counts["rows"]) if classifier else (mask, self.counts["positions"])
        if hasattr(theirs, "indices"):
            return losses.logits_kl_top(ours, theirs.values, theirs.indices, mask, count, **options)
        if ours.shape != theirs.logits.shape:
            raise ValueError(
                f"heal: student logits {tuple(ours.shape)}, teacher logits {tuple(theirs.logits.shape)}; needed one shape. "
                "Take the teacher that the student was made from."
            )
        return losses.logits_kl(ours, theirs.logits, mask, count, **options)

    def _states(self, ours, theirs, mask, depth):
        """Hidden states: the embedding's output first, then one a layer, a mean over the first `depth` layers."""
        if len(ours) != len(theirs):
            raise ValueError(
                f"heal: student has {len(ours) - 1} layers, teacher {len(theirs) - 1}; needed as many to match hidden states."
            )
        found = {}
        for name in self.names & STATES.keys():
            first, last = (0, 1) if name.startswith("embedding") else (1, depth + 1)
            pairs = list(zip(ours, theirs))[first:last]
            found[name] = _mean(STATES[name](a, b, mask, self.counts["positions"]) for a, b in pairs)
        return found

    def total(self, terms):
        """Weighted sum of the active terms."""
        return sum(weight * terms[name] for name, weight in self.heal.weights.items() if name in terms)


def _mean(values):
    values = list(values)
    return sum(values) / len(values)
