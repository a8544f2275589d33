"""One subclass of transformers.Trainer: the losses, groups and schedules of a Heal, exact resume, rows of a history."""

import os
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer

from tnlib import losses
from tnlib.examples import stack, stack_trimmed, trim
from tnlib.keeper import Keeper
from tnlib.objective import Objective
from tnlib.resume import load_weights_, save_weights
from tnlib.schedule import parameter_groups, rate


class HealTrainer(Trainer):
    """Trains `student` by a Heal for a Budget. Use through heal(), which prepares and restores the models."""

    loss_is_scaled_for_ga = True  # compute_loss divides by counts of the whole accumulated batch

    def __init__(self, student, teacher, examples, validation, heal, budget, args, folder, progress):
        kept = teacher is not None and not isinstance(teacher, torch.nn.Module)  # its logits were written untrimmed
        collate = stack if kept else stack_trimmed
        super().__init__(model=student, args=args, train_dataset=examples, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.heal, self.budget, self.folder, self.validation = heal, budget, folder, validation
        self.layers = getattr(student.config, "num_hidden_layers", 0)
        self.objective = Objective(heal, self.layers, self._loss_shifts_labels)
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
            state.fsdp_plugin.cpu_ram_efficient_loading = False  # it would load twice, and untie factors
            self._take_first_process_weights()

    def _take_first_process_weights(self):
        """Start every process from the first one's student, as DDP does by itself: fits may differ in their last bits."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            moved = tensor.detach().to(self.args.device, copy=True, memory_format=torch.contiguous_format)
            torch.distributed.broadcast(moved, src=0)
            tensor.data.copy_(moved)

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
        wanted = self.objective.wanted()
        task = {"labels": labels} if "task" in self.heal.weights else {}
        ours = model(**inputs, **wanted, **task)
        terms = self.objective.terms(self.state.global_step, ours, self._teach(inputs, window, wanted), inputs, labels)
        total = self.objective.total(terms)
        self.keeper.add(total, terms)
        total = total * self.accelerator.num_processes  # gradients are averaged over processes, our counts are of all
        return (total, ours) if return_outputs else total

    def _teach(self, inputs, window, wanted):
        """The teacher's outputs, without a graph; None where no loss asks for them."""
        if not any(name in self.heal.weights for name in self.heal.needs_teacher):
            return None
        if not isinstance(self.teacher, torch.nn.Module):
            return self.teacher.batch(window, self.args.device)
        with torch.no_grad():
            return self.teacher(**inputs, **wanted)

    def _get_num_items_in_batch(self, batch_samples, device):
        """Count what all micro-batches of a step, on all processes, hold: the divisors of the losses."""
        sums = self.objective.count(batch_samples).to(device)
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        self.objective.set_counts(sums)
        return sums[0]

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
                some = trim(some)
                labels = some.pop("labels")
                task = "task" in self.heal.weights and "next_token" not in self.heal.weights
                out = model(**some, use_cache=False, **({"labels": labels} if task else {}))
                count = self.objective.predicted(labels)
                total = out.loss * count if task else losses.next_token(out.logits, labels, 1)
                sums += torch.stack([total.float(), count.float()]) * alive
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
