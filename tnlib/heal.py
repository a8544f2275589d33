"""heal: train a factorized student back, by the losses and schedules of a recipe's Heal, for a Budget, resumably."""

import copy
import importlib.util
import os
import random
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.integrations import TensorBoardCallback

from tnlib.examples import Examples, split
from tnlib.history import History, read_history
from tnlib.layers import FactorizedEmbedding
from tnlib.local import fit_layers_
from tnlib.modes import eval_mode
from tnlib.resume import Folder, digest, fingerprint, only_one, put_weights_, weights
from tnlib.schedule import select_trainable_
from tnlib.trainer import HealTrainer, is_sharded
from tnlib.windows import check_windows


def heal(student, teacher, data, heal, budget, out=None, seed=0, progress=None, skip=0):
    """Train `student` back, in place.

    student: a causal language model of transformers, or another model when no loss is "next_token"
    teacher: the dense model, a PrecomputedTeacher, or None where no loss needs one; it is not changed
    data: windows (n, context) as from token_windows or load_windows, or a dictionary of tensors such as input_ids, attention_mask
        and labels with one example a row; or a pair of these: (train, validation)
    heal, budget: a Heal (a recipe's, or yours) and a Budget
    out: folder for checkpoints and history.csv. The same call goes on where it was stopped, or returns at once when it
        was finished; other arguments are refused. None: nothing is kept
    seed: order of the data, and dropout where the model's configuration has any
    progress: a bar, and in a notebook a curve (default: where someone watches)
    skip: examples at the start of the seed's order that are left out, as an earlier stage has read them
    Returns: History
    Raises: ValueError (RecipeError for names) with what was got and needed, FloatingPointError when a loss is not finite
    Trains where the student is, on one device; under `accelerate launch`, where accelerate puts it, batch shared out.
    Exact: interrupted anywhere and called again, one process ends with the bits of an uninterrupted run.
    """
    train, validation = split(data)
    _check(student, teacher, train, validation, heal, budget)
    world, main = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    if budget.batch % world:
        raise ValueError(f"heal: got batch={budget.batch} for {world} processes; needed a multiple. Change the batch.")
    folder, teacher = None, teacher if heal.needs_teacher else None
    with ExitStack() as stack:
        if out is not None:
            if main:
                stack.enter_context(only_one(out))
            folder = Folder(out, _arguments(student, teacher, train, validation, heal, budget, (seed, skip)), main)
            if folder.finished:
                folder.load(student)
                return read_history(folder.history)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="tnlib-heal-"))
        stack.enter_context(_random_state())
        for model in (student, teacher):
            if isinstance(model, torch.nn.Module):
                stack.enter_context(eval_mode(model))  # the Trainer then sets the student to train mode
                stack.enter_context(_as_before(model, "attention" in heal.weights))
        return _run(student, teacher, train, validation, heal, budget, folder, (seed, skip), progress, scratch)


def _run(student, teacher, train, validation, heal, budget, folder, order, progress, scratch):
    """Train, put the result into the student, and mark the folder as finished."""
    checkpoint, (seed, skip) = folder.latest() if folder else None, order
    if checkpoint is None and any(name == "local" for name, _ in heal.losses):
        read = budget.steps * budget.batch * budget.accumulate  # the fit sees no more text than the training does
        _fit_locally(student, teacher, train["input_ids"][:read].long(), budget, folder, seed, progress)
    select_trainable_(student, heal.train)
    trained = _to_shard(student) if is_sharded() else student
    examples = Examples(train, budget.steps * budget.batch * budget.accumulate, seed, skip)
    args = _training_arguments(student, heal, budget, seed, scratch)
    teacher = teacher if set(heal.needs_teacher) - {"local"} else None
    trainer = HealTrainer(trained, teacher, examples, validation, heal, budget, args, folder, progress)
    _log_to_tensorboard(trainer, folder)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        trainer.keeper.bar.close()
    best = trainer.keeper.best_weights
    if best is not None or trained is not student:
        put_weights_(student, weights(trained) if best is None else best, "heal")
    if folder and args.should_save:
        folder.finish(student, {"step": trainer.state.global_step, "best_validation_nll": trainer.keeper.best})
    trainer.accelerator.wait_for_everyone()
    return History(trainer.keeper.log.rows)


def _to_shard(student):
    """A copy for FSDP, which changes a model for good. Factors that embedding and head share stay in one group."""
    copied = copy.deepcopy(student)
    if isinstance(student.get_input_embeddings(), FactorizedEmbedding):
        copied.get_input_embeddings = copied.get_output_embeddings = lambda: None  # accelerate would part them
    return copied


def _check(student, teacher, train, validation, heal, budget):
    """Refuse what would fail later, or worse, not fail."""
    if not hasattr(student, "config"):
        raise ValueError(f"heal: student is a {type(student).__name__}; needed a transformers model. Wrap it in one.")
    if not heal.weights:
        raise ValueError("heal: got no loss but 'local'; needed one to train on. Call fit_layers_ for local alone.")
    if heal.needs_teacher and teacher is None:
        raise ValueError(
            f"heal: losses {', '.join(heal.needs_teacher)} need a teacher, got None. Give the dense model, or leave them out."
        )
    if teacher is student:
        raise ValueError(
            "heal: teacher and student are one model; needed two. Copy the dense model before factorizing it."
        )
    if not isinstance(teacher, (torch.nn.Module, type(None))):
        teacher.check(heal, train)
    if budget.eval_every and validation is None:
        raise ValueError(
            f"heal: got eval_every={budget.eval_every} without validation data. Give data=(train, validation)."
        )
    for tensors in (train, validation):
        if tensors is not None:
            check_windows("heal", student, tensors["input_ids"])


def _arguments(student, teacher, train, validation, heal, budget, order):
    """All that decides the result, as JSON data; how often it is saved does not."""
    amounts = {name: value for name, value in asdict(budget).items() if name not in ("save_every", "log_every")}
    theirs = fingerprint(teacher) if isinstance(teacher, torch.nn.Module) else teacher and teacher.fingerprint
    found = {"heal": {k: v for k, v in asdict(heal).items() if k != "source"}, "budget": amounts}
    found |= dict(zip(("seed", "skip"), order))
    found |= {"student": fingerprint(student), "teacher": theirs}
    for name, tensors in (("data", train), ("validation", validation)):
        found[name] = tensors and {key: digest(tensor) for key, tensor in tensors.items()}
    return found


def _training_arguments(student, heal, budget, seed, scratch):
    """The Trainer's settings; logging, evaluation and saving are ours, its own are off."""
    device = next(student.parameters()).device
    names = TrainingArguments.__dataclass_fields__
    recompute = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    args = TrainingArguments(
        output_dir=scratch,
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=budget.accumulate,
        max_grad_norm=heal.clip,
        bf16=budget.precision == "bf16",
        use_cpu=device.type == "cpu" and "LOCAL_RANK" not in os.environ,
        seed=seed,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,  # would look at every loss, a stop on a GPU; rows are checked
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=device.type == "cuda",
        **{recompute: budget.gradient_checkpointing},
    )
    args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would be used by DataParallel; accelerate launch is the way
    return args


def _log_to_tensorboard(trainer, folder):
    """Rows go to tensorboard as well where it is installed and there is a folder for it."""
    if folder and trainer.args.should_save and importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(folder.path / "tensorboard")))


def _fit_locally(student, teacher, windows, budget, folder, seed, progress):
    """The pass that the loss "local" stands for: each factorized layer on the teacher's activations, no full backward."""
    out = folder.path / "local" if folder else None
    fit_layers_(student, teacher, windows, steps=budget.local_steps, seed=seed, progress=progress, out=out)


@contextmanager
def _random_state():
    """Leave the global random states as they were: the Trainer seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _as_before(model, attention):
    """Give a model back as it came: gradients on or off, device, forward, cache; eager attention meanwhile if asked."""
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config, device, own = model.config, next(model.parameters()).device, dict(vars(model))
    cache, kernel = getattr(config, "use_cache", None), getattr(config, "_attn_implementation", None)
    if attention and kernel != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
            if name in own:
                vars(model)[name] = own[name]
        if attention and kernel not in (None, "eager"):
            model.set_attn_implementation(kernel)
        if cache is not None:
            config.use_cache = cache
        _stop_recomputing(model, hooked="_require_grads_hooks" in own)
        for parameter, needed in grads:
            parameter.requires_grad_(needed)
            parameter.grad = None
        model.to(device)


def _stop_recomputing(model, hooked):
    """Undo gradient checkpointing, under the name that this version of transformers gives it, and its hook."""
    names = ("activation", "gradient")
    kind = next((name for name in names if hasattr(model, f"{name}_checkpointing_disable")), None)
    if kind and getattr(model, f"is_{kind}_checkpointing", False):
        getattr(model, f"{kind}_checkpointing_disable")()
        if not hooked and getattr(model, "_require_grads_hooks", None):
            model.disable_input_require_grads()
            vars(model).pop("_require_grads_hooks", None)
