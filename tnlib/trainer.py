"""One subclass of transformers.Trainer: the losses, groups and schedules of a Heal, exact resume, rows of a history."""

import os
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer

from tnlib import losses
from tnlib.keeper import Keeper
from tnlib.resume import load_weights_, save_weights
from tnlib.schedule import curriculum_over, included_layers, parameter_groups, rate
from tnlib.treatment import AFTER_CURRICULUM

HIDDEN = {"hidden", "hidden_cosine", "embedding", "embedding_cosine"}


class Examples(Dataset):
    """All examples of a run in order: permutation after permutation of the data, each from its own seed.

    tensors: by name, first axis the example; length: examples in all
    Exact: item i depends on seed and i only, so any grouping into batches, processes or restarts sees the same order.
    """

    def __init__(self, tensors, length, seed):
        self.tensors, self.length, self.seed = tensors, length, seed
        self.size, self.epoch, self.order = len(next(iter(tensors.values()))), None, None

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        epoch, place = divmod(index, self.size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.epoch, self.order = epoch, torch.randperm(self.size, generator=generator)
        window = int(self.order[place])
        return {name: tensor[window] for name, tensor in self.tensors.items()} | {"window": torch.tensor(window)}


class HealTrainer(Trainer):
    """Trains `student` by a Heal for a Budget. Use through heal(), which prepares and restores the models."""

    loss_is_scaled_for_ga = True  # compute_loss divides by counts of the whole accumulated batch

    def __init__(self, student, teacher, examples, validation, heal, budget, args, folder, progress):
        super().__init__(model=student, args=args, train_dataset=examples, data_collator=_stack)
        self.remove_callback(PrinterCallback)
        self.heal, self.budget, self.folder, self.validation = heal, budget, folder, validation
        self.layers = getattr(student.config, "num_hidden_layers", 0)
        self.context = examples.tensors["input_ids"].shape[1]
        self.teacher = self._place(teacher)
        self.keeper = Keeper(self, progress)
        self.add_callback(self.keeper)

    def create_accelerator_and_postprocess(self):
        """FSDP on CPU as well: accelerate 1.15 heeds `--use_fsdp` on accelerators only, and would fall back to DDP."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            state.fsdp_plugin.cpu_ram_efficient_loading = False  # it would load the student twice, factors untied

    def _place(self, teacher):
        """The teacher on its device, in eval mode, under the student's precision; never sharded, never trained."""
        if not isinstance(teacher, torch.nn.Module):
            return teacher
        prepared = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self.accelerator._models.remove(prepared)  # or accelerate would clip its gradients and save it
        return prepared.to(self.args.device).eval()

    # ---- what is minimized

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum of the active losses; each is a sum over positions over the count of the whole optimizer step."""
        inputs = dict(inputs)
        window, labels = inputs.pop("window"), inputs.pop("labels")
        wanted = self._outputs()
        task = {"labels": labels} if "task" in self.heal.weights else {}
        ours = model(**inputs, **wanted, **task)
        terms = self._terms(ours, self._teach(inputs, window, wanted), inputs, labels)
        total = sum(weight * terms[name] for name, weight in self.heal.weights.items() if name in terms)
        self.keeper.add(total, terms)
        total = total * self.accelerator.num_processes  # gradients are averaged over processes, our counts are of all
        return (total, ours) if return_outputs else total

    def _outputs(self):
        names = set(self.heal.weights)
        asked = {"output_hidden_states": bool(names & HIDDEN), "output_attentions": "attention" in names}
        return {"use_cache": False} | {name: True for name, needed in asked.items() if needed}

    def _teach(self, inputs, window, wanted):
        """The teacher's outputs, without a graph; None where no loss asks for them."""
        if not any(name in self.heal.weights for name in self.heal.needs_teacher):
            return None
        if not isinstance(self.teacher, torch.nn.Module):
            return self.teacher.batch(window, self.args.device)
        with torch.no_grad():
            return self.teacher(**inputs, **wanted)

    def _terms(self, ours, theirs, inputs, labels):
        """Active loss terms by name, each already divided by its count."""
        step, counts, found = self.state.global_step, self.counts, {}
        mask = inputs["attention_mask"].bool() if "attention_mask" in inputs else None
        names = self.heal.weights
        if not self.heal.curriculum_steps or curriculum_over(self.heal, step, self.layers):
            if "next_token" in names:
                found["next_token"] = losses.next_token(ours.logits, labels, counts["predicted"])
            if "task" in names:
                found["task"] = ours.loss * (self._predicted(labels) / counts["predicted"])
            for name in names.keys() & {"logits", "logits_reverse"}:
                found[name] = self._logits(ours.logits, theirs, mask, name == "logits_reverse")
        rest = names.keys() - AFTER_CURRICULUM
        if rest & HIDDEN:
            _compare_layers(
                found, rest, ours.hidden_states, theirs.hidden_states, mask, counts["positions"], self._depth()
            )
        if "attention" in rest:
            pairs = list(zip(ours.attentions, theirs.attentions))[: self._depth()]
            found["attention"] = _mean(losses.attention_kl(a, b, mask, counts["positions"]) for a, b in pairs)
        return found

    def _logits(self, ours, theirs, mask, reverse):
        options = {"temperature": self.heal.temperature, "reverse": reverse}
        count = self.counts["rows"] if ours.dim() == 2 else self.counts["positions"]
        mask = None if ours.dim() == 2 else mask  # a classifier: (batch, classes)
        if hasattr(theirs, "indices"):
            return losses.logits_kl_top(ours, theirs.values, theirs.indices, mask, count, **options)
        theirs = theirs.logits
        if ours.shape != theirs.shape:
            raise ValueError(
                f"heal: student logits {tuple(ours.shape)}, teacher logits {tuple(theirs.shape)}; needed one shape. Take the "
                "teacher that the student was made from."
            )
        return losses.logits_kl(ours, theirs, mask, count, **options)

    def _depth(self):
        return included_layers(self.heal, self.state.global_step, self.layers)

    # ---- counts of the whole optimizer step

    def _get_num_items_in_batch(self, batch_samples, device):
        """Predicted tokens, unmasked positions and examples of all micro-batches, on all processes."""
        sums = torch.zeros(3, dtype=torch.long)
        for batch in batch_samples:
            ids, seen = batch["input_ids"], batch.get("attention_mask")
            positions = ids.numel() if seen is None else int(seen.sum())
            sums += torch.tensor([self._predicted(batch["labels"]), positions, len(ids)])
        sums = sums.to(device)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        self.counts = dict(zip(("predicted", "positions", "rows"), sums))
        return self.counts["predicted"]

    def _predicted(self, labels):
        """Labels that enter the model's loss: a causal model's first one never does."""
        shifts = labels.dim() > 1 and ("next_token" in self.heal.weights or self._loss_shifts_labels)
        return int(((labels[..., 1:] if shifts else labels) != losses.IGNORE).sum())

    # ---- optimizer, schedule, order of the data

    def create_optimizer(self, model=None):
        """AdamW over the Heal's parameter groups."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.heal)
            self.optimizer = torch.optim.AdamW(groups, betas=self.heal.betas, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The Heal's schedule, for every group in proportion to its peak."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate(self.heal, step, self.budget.steps, self.layers)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def floating_point_ops(self, inputs):
        """Not counted here: see tn.flops_per_token."""
        return 0

    # ---- evaluation

    def validation_nll(self):
        """Nats per predicted token on the validation windows, by all processes together; the task's loss for a task."""
        tensors, model, batch = self.validation, self.model_wrapped, self.budget.batch
        share = batch // self.args.world_size
        sums = torch.zeros(2, device=self.args.device)
        model.eval()
        with torch.no_grad():
            for start in range(0, len(tensors["input_ids"]), batch):
                own = slice(
                    start + share * self.args.process_index,
                    min(start + share * (self.args.process_index + 1), start + batch),
                )
                some = {name: tensor[own].to(self.args.device) for name, tensor in tensors.items()}
                alive = len(some["input_ids"]) > 0
                if not alive:  # every process must take part in a sharded model's forward
                    some = {name: tensor[:1].to(self.args.device) for name, tensor in tensors.items()}
                labels = some.pop("labels")
                task = "task" in self.heal.weights and "next_token" not in self.heal.weights
                out = model(**some, use_cache=False, **({"labels": labels} if task else {}))
                count = self._predicted(labels)
                total = out.loss * count if task else losses.next_token(out.logits, labels, 1)
                sums += torch.stack([total.float(), torch.tensor(float(count), device=total.device)]) * alive
        model.train()
        sums = self.accelerator.reduce(sums, "sum") if self.args.world_size > 1 else sums
        return float(sums[0] / sums[1])

    # ---- checkpoints

    def _save_checkpoint(self, model, trial=None):
        main = self.args.should_save
        self.keeper.pool()
        with self.folder.checkpoint(self.state.global_step, self.accelerator.wait_for_everyone) as part:
            if main and not self.is_fsdp_enabled:
                save_weights(self.model, part / "model.safetensors")
            self._save_optimizer_and_scheduler(str(part))  # with FSDP, the model too
            self._save_rng_state(str(part))
            if main:
                self.state.save_to_json(str(part / "trainer_state.json"))
                self.keeper.save(part)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return load_weights_(self.model, Path(resume_from_checkpoint) / "model.safetensors")


def is_sharded():
    """Whether `accelerate launch` asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def _stack(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _mean(values):
    values = list(values)
    return sum(values) / len(values)


def _compare_layers(found, names, ours, theirs, mask, count, depth):
    """Hidden states (embedding output first) of the first `depth` layers, a mean over layers."""
    if len(ours) != len(theirs):
        raise ValueError(
            f"heal: student has {len(ours) - 1} layers, teacher {len(theirs) - 1}; needed as many to match hidden states."
        )
    compare = {"hidden": losses.mean_square, "hidden_cosine": losses.cosine}
    for name in names & compare.keys():
        pairs = list(zip(ours, theirs))[1 : depth + 1]
        found[name] = _mean(compare[name](a, b, mask, count) for a, b in pairs)
    compare = {"embedding": losses.mean_square, "embedding_cosine": losses.cosine}
    for name in names & compare.keys():
        found[name] = compare[name](ours[0], theirs[0], mask, count)
