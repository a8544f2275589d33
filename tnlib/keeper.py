"""What happens between the steps of a healing: rows of its history, early stopping, progress, checkpoints."""

import json
import time

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerCallback

from tnlib.history import Curve, Log, is_interactive
from tnlib.resume import step_of, weights
from tnlib.schedule import rate

STATE, BEST = "heal_state.json", "best.safetensors"


class Keeper(TrainerCallback):
    """Adds up the loss terms, writes rows, evaluates, stops early, asks for checkpoints, shows the progress."""

    def __init__(self, trainer, progress):
        self.trainer, self.shown = trainer, is_interactive() if progress is None else progress
        self.names = ["loss", *trainer.heal.weights]
        self.sums, self.since = torch.zeros(len(self.names)), 0
        self.seconds, self.best, self.worse, self.best_weights = 0.0, None, 0, None
        self.bar = tqdm(disable=True)

    def add(self, total, terms):
        """One micro-batch's total and terms; a term that is not active yet adds nothing."""
        zero = total.new_zeros(())
        new = torch.stack([total.detach(), *(terms.get(name, zero).detach() for name in self.names[1:])]).float()
        self.sums = self.sums.to(new.device) + new

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the history and the bar, where the checkpoint left them."""
        trainer, main = self.trainer, args.should_save
        checkpoint = trainer.folder and trainer.folder.latest()
        if checkpoint and step_of(checkpoint) == state.global_step:
            self._restore(checkpoint)
        self.log = Log(trainer.folder.history if trainer.folder and main else None, state.global_step)
        self.curve = Curve(self.log, self.shown if main else False)
        self.bar = tqdm(
            desc="heal", total=state.max_steps, initial=state.global_step, disable=not (self.shown and main)
        )
        self.began = time.perf_counter() - self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        """Evaluate, write a row, stop or ask for a checkpoint, whatever is due at this step."""
        trainer, budget, step = self.trainer, self.trainer.budget, state.global_step
        self.since += 1
        last = step >= state.max_steps
        due = trainer.validation is not None and budget.eval_every and (step % budget.eval_every == 0 or last)
        nll = trainer.validation_nll() if due else None
        if due and budget.patience:
            control.should_training_stop |= self._stop(nll)
        if due or last or step % budget.every == 0:
            self._row(state, nll)
        self.bar.update()
        self.curve.draw(last)
        over = last or control.should_training_stop
        control.should_save = bool(trainer.folder and budget.save_every and step % budget.save_every == 0 and not over)

    def _row(self, state, nll):
        trainer = self.trainer
        sums = trainer.accelerator.reduce(self.sums, "sum") if trainer.args.world_size > 1 else self.sums
        self._refuse_nan(sums, state.global_step)
        values = dict(zip(self.names, (sums / self.since).tolist()))
        tokens = state.global_step * trainer.budget.batch * trainer.budget.accumulate * trainer.context
        row = {"step": state.global_step, "tokens": tokens, **values, "learning_rate": self._rate(state.global_step)}
        row |= {"seconds": round(time.perf_counter() - self.began, 3), "validation_nll": nll}
        self.log.add(row)
        trainer.log({name: value for name, value in row.items() if value is not None and name != "step"})
        self.bar.set_postfix(loss=f"{values['loss']:.4g}", refresh=False)
        self.sums, self.since = torch.zeros_like(self.sums), 0

    def _refuse_nan(self, sums, step):
        """Stop at a loss that is not finite, before a row or a checkpoint makes it look like progress."""
        if not torch.isfinite(sums).all():
            bad = [name for name, value in zip(self.names, sums.tolist()) if not abs(value) < float("inf")]
            raise FloatingPointError(
                f"heal: {', '.join(bad)} not finite by step {step}; needed finite losses. Lower the learning rate or the clip, "
                "use precision='fp32', or start from a better initialization."
            )

    def _rate(self, step):
        heal = self.trainer.heal
        return heal.learning_rate * rate(heal, step - 1, self.trainer.budget.steps, self.trainer.layers)

    def _stop(self, nll):
        """Whether patience is at its end; keeps the best weights in memory."""
        if self.best is None or nll < self.best:
            self.best, self.worse = nll, 0
            self.best_weights = {name: tensor.cpu().clone() for name, tensor in weights(self.trainer.model).items()}
        else:
            self.worse += 1
        return self.worse >= self.trainer.budget.patience

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the whole curve."""
        self.curve.draw(last=True)

    def pool(self):
        """Give the first process the sums of all of them, before it writes a checkpoint; all processes call it."""
        args, total = self.trainer.args, self.sums
        if args.world_size > 1:
            total = self.trainer.accelerator.reduce(self.sums, "sum")
        self._refuse_nan(total, self.trainer.state.global_step)
        if args.world_size > 1:
            self.sums = total if args.process_index == 0 else torch.zeros_like(total)

    def save(self, part):
        """What a checkpoint holds besides torch's files: sums since the last row, seconds, the best weights."""
        state = {"sums": self.sums.tolist(), "since": self.since, "best": self.best, "worse": self.worse}
        state["seconds"] = time.perf_counter() - self.began
        (part / STATE).write_text(json.dumps(state), encoding="utf-8")
        if self.best_weights is not None:
            save_file(self.best_weights, part / BEST)

    def _restore(self, checkpoint):
        state = json.loads((checkpoint / STATE).read_text("utf-8"))
        first = self.trainer.args.process_index == 0  # the sums of all processes were pooled in it
        self.sums, self.since = torch.tensor(state["sums"]) * first, state["since"]
        self.best, self.worse, self.seconds = state["best"], state["worse"], state["seconds"]
        if (checkpoint / BEST).exists():
            self.best_weights = load_file(checkpoint / BEST)
