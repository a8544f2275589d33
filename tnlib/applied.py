"""How a form computes: factors and tokens in, outputs out, by the plan that suits so many tokens."""

import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tnlib.assemble import chain_of
from tnlib.chain import Chain, run
from tnlib.choose import TRACED_TOKENS, Case, bucket, choose, traced_plan
from tnlib.contract import Arrangement, plans_of
from tnlib.links import Link
from tnlib.lookup import look_up, row_plans_of, tables
from tnlib.shapes import ShapeError


class Applied:
    """The part of a Form that touches tensors of tokens; shapes are (out, in) of the weight replaced."""

    def forward(self, x, factors, shape, bias=None, between=None, plan=None, kept=None, room=None):
        """x (…, in) -> (…, out), by the fastest plan for this many tokens: contract the factors, or rebuild the weight.

        between: a function of a tensor and its place, applied to the input and to each intermediate result; the plan is then
            always the first of `plans`, so that places mean the same for any number of tokens
        plan: name of the plan to take; None: the fastest, see choose.py
        kept, room: a Kept for what is built from the factors, and how many numbers it may hold (0: views of factors only;
            None: nothing is kept)
        """
        flat, sources = x if x.dim() == 2 else x.reshape(-1, shape[1]), factors  # (tokens, in)
        if (dtype := _autocast(x.device.type)) is not None:
            flat, factors, bias = _cast(dtype, flat, factors, bias)
        if between is not None:
            y = self.contract(between(flat, "input"), factors, shape, None, between, bias)
        elif torch.compiler.is_compiling() or x.device.type == "meta":
            y = self.contract(flat, factors, shape, plan or traced_plan(self, shape, x.device.type), bias=bias)
        else:
            chosen = self._plan_named(shape, plan) if plan else self.choose(flat, factors, shape, bias, kept, room)
            chain = self._kept_chain(sources, factors, shape, chosen, flat.dtype, kept, room)
            if room is not None and plan is None and factors is sources and not torch.is_grad_enabled():
                held = chain if chosen.held <= room else None
                kept.repeat(x, sources, self._repeated(x, sources, shape, chosen, held))
            y = self._through(flat, factors, shape, chain, bias)
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], shape[0])

    def _repeated(self, x, factors, shape, plan, chain):
        """(x, bias) -> y by a plan, for x of this shape (…, in), with nothing left to be found out; chain: None if it is not kept."""
        given, ends = (x.numel() // shape[1], shape[1]), (*x.shape[:-1], shape[0])
        if chain is not None and len(chain.links) == 1:
            matrix = chain.matrices[0]
            return lambda x, bias: F.linear(x, matrix, bias)
        if chain is not None and (direct := self._direct(chain, shape, given[0], x)) is not None:
            return lambda x, bias: direct(x.reshape(given).contiguous(), bias).view(ends)

        def through(x, bias):
            now = chain or self.chain(factors, shape, plan)
            return self._through(x.reshape(given), factors, shape, now, bias).reshape(ends)

        return through

    def _direct(self, chain, shape, tokens, like):
        """What takes up to so many tokens, and the bias, straight through a chain; None if there is more to do."""
        more = self.reordered or self._ends_elsewhere(shape) or not chain.one_group(tokens, like)
        return None if more and len(chain.links) > 1 else chain.prepared(tokens)

    def _kept_chain(self, sources, factors, shape, plan, dtype, kept, room):
        """The chain of a plan, out of `kept` if that may hold it."""
        if room is None or plan.held > room:
            return self.chain(factors, shape, plan)
        return kept.fetch((plan.name, dtype), sources.values(), plan.held, room, lambda: self.chain(factors, shape, plan))

    def contract(self, x, factors, shape, plan=None, between=None, bias=None):
        """x (tokens, in) -> (tokens, out) by the plan of that name (default: the first of `plans`).

        Raises: ShapeError for a plan that the form does not have
        Exact: the same for every plan, to rounding.
        """
        chain = self.chain(factors, shape, self._arrangement(shape, plan))
        if between is None:
            return self._through(x, factors, shape, chain, bias)
        places = self.places(shape)
        return self._through(x, factors, shape, chain, bias, lambda state, link: between(state, places[link]))

    def chain(self, factors, shape, plan):
        """The Chain that carries out a plan, see chain.py."""
        if plan.name == "rebuild":
            return Chain([Link(self.to_dense(factors, shape), 1)], (shape[1], shape[0]))
        return chain_of(self, factors, shape, plan)

    def places(self, shape):
        """Names of the intermediate results of the first plan, in order."""
        first = self._arrangement(shape, None)
        return tuple(f"core{k}" for k in range(len(first.groups) - 1))

    def rows(self, ids, factors, shape, plan=None, kept=None, room=None):
        """Rows `ids` (tokens,) of the weight, without building it: (tokens, in). plan, kept, room: as in `forward`."""
        if torch.compiler.is_compiling():  # a graph knows no prices
            groups = next(groups for name, groups in self.row_groups(shape) if plan in (None, name))
            return look_up(ids, tables(self.paired(factors), groups))
        every = row_plans_of(self, shape, TRACED_TOKENS)
        if plan is not None or len(every) == 1 or ids.device.type == "meta":
            chosen = next(found for found in every if plan in (None, found.name))
        else:
            chosen = self._choose_rows(ids, factors, shape, room)

        def build():
            return tables(self.paired(factors), chosen.groups)

        if room is not None and chosen.held <= room:
            found = kept.fetch(("rows", chosen.name), factors.values(), chosen.held, room, build)
        else:
            found = build()
        return look_up(ids, found)

    # What a form may have beside its cores: orders of rows and columns, rows of padding.

    def _enter(self, x, factors):
        return x

    def _leave(self, y, factors, shape):
        return y

    def _ends_elsewhere(self, shape):
        """Whether outputs have to be picked or put in order after the chain."""
        return False

    def _through(self, x, factors, shape, chain, bias=None, between=None):
        """x (tokens, in) through a chain, in the orders that the form has: (tokens, out)."""
        if len(chain.links) == 1:
            return run(x, chain, bias)
        x = self._enter(x, factors)
        if not self._ends_elsewhere(shape):
            return run(x, chain, bias, between)
        y = self._leave(run(x, chain, None, between), factors, shape)
        return y if bias is None else y + bias

    def _arrangement(self, shape, name):
        every = self.arrangements(shape)
        found = next((a for a in every if name in (None, a.name)), None)
        if found is None and name not in (None, "rebuild"):
            known = ", ".join(repr(a.name) for a in every)
            raise ShapeError(f"{type(self).__name__}: got plan {name!r}; needed one of {known}, 'rebuild'.")
        return found or Arrangement("rebuild", ())

    def _plan_named(self, shape, name):
        self._arrangement(shape, name)  # which says what is wrong with a name
        return next(plan for plan in plans_of(self, shape, 1) if plan.name == name)

    def choose(self, flat, factors, shape, bias, kept, room, grad=None):
        """The Plan that `forward` takes; grad: whether gradients are needed (None: what torch says)."""
        if grad is None:
            grad = torch.is_grad_enabled() and any(
                t is not None and t.requires_grad for t in (flat, bias, *factors.values())
            )
        quick = (bucket(flat.shape[0]), flat.dtype, flat.device, grad, room)
        found = None if kept is None else kept.plans.get(quick)
        if found is None:
            room = room if grad else room or 0  # so that without gradients training and evaluation give the same bits
            case = Case(self, shape, bucket(flat.shape[0]), str(flat.device), flat.dtype, grad, room)
            found = choose(case, lambda plan: self.attempt(plan, flat, factors, shape, bias, grad, case.keeps(plan)))
            if kept is not None:
                kept.plans[quick] = found
        return found

    def attempt(self, plan, flat, factors, shape, bias, grad, built):
        """A function that takes `plan` once: forward, and backward if there are gradients."""
        flat, bias = flat.detach(), None if bias is None else bias.detach()
        factors = {name: factor.detach() for name, factor in factors.items()}
        if not grad:
            chain = self.chain(factors, shape, plan) if built else None  # views of factors are always at hand
            if chain is not None and (direct := self._direct(chain, shape, bucket(flat.shape[0]), flat)) is not None:
                return lambda: direct(flat.contiguous(), bias)
            return lambda: self._through(flat, factors, shape, chain or self.chain(factors, shape, plan), bias)
        leaves = [flat, *(factor for factor in factors.values() if factor.is_floating_point())]

        def once():
            with torch.enable_grad(), saved_tensors_hooks(_as_is, _as_is):  # not those of a checkpointed block around this call
                for leaf in leaves:
                    leaf.requires_grad_()
                y = self._through(flat, factors, shape, self.chain(factors, shape, plan), bias)
                torch.autograd.grad(y, leaves, y.detach())

        return once

    def _choose_rows(self, ids, factors, shape, room):
        first = next(iter(factors.values()))
        grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors.values())
        case = Case(self, shape, bucket(len(ids)), str(ids.device), first.dtype, grad, room, rows=True)

        def attempt(plan):
            still = {name: factor.detach() for name, factor in factors.items()}
            found = tables(self.paired(still), plan.groups)
            if case.keeps(plan):
                return lambda: look_up(ids, found)
            return lambda: look_up(ids, tables(self.paired(still), plan.groups))

        return choose(case, attempt)


def _as_is(tensor):
    return tensor


def _autocast(device):
    """The dtype that autocast computes with on this type of device; None where it is off."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _cast(dtype, flat, factors, bias):
    """What autocast computes with; float64 stays, as it does in torch's own layers."""

    def cast(tensor):
        return tensor.to(dtype) if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) else tensor

    return cast(flat), {name: cast(factor) for name, factor in factors.items()}, None if bias is None else cast(bias)
