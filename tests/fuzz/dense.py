"""The truth of a problem, from its full logits, and how far rounding takes PyTorch from it.

What each program computes is written out once, in operations that say where PyTorch rounds. The
first of many evaluations is exact, the others are not: see :mod:`.rounding`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fuzz.problem import Problem
from fuzz.rounding import Arithmetic


def evaluate(
    problem: Problem, draws: int, *, low: torch.dtype | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """All that a call and its backward give, ``draws`` times, the first time exactly.

    Args:
        problem: what to compute.
        draws: how many evaluations.
        low: dtype of the matmuls whose rounding is to be explained; that of the problem if None.
        seed: of the rounding.

    Returns:
        Value and gradients by name, ``[draws, ...]``, in the shapes of the problem's tensors.
    """
    arithmetic = Arithmetic(low or problem.low, draws, seed)
    tensors = {}
    leaves = problem.leaves if "upstream" in problem.tensors else []
    for name, values in problem.cast().items():
        wide = values.double() if values.is_floating_point() else values
        if name in leaves:
            wide = wide.expand(draws, *wide.shape).clone().requires_grad_()
        tensors[name] = wide
    with torch.enable_grad():
        value = _Dense(problem, tensors, arithmetic).value()
    of = {"value": value.detach()}
    if leaves and value.requires_grad:
        upstream = problem.tensors["upstream"].double()
        if upstream.dim():
            upstream = torch.where(_takes_part(problem), upstream, 0)
        grads = torch.autograd.grad(
            value, [tensors[n] for n in leaves], upstream.expand_as(value), allow_unused=True
        )
        for name, grad in zip(leaves, grads, strict=True):
            grad = torch.zeros_like(tensors[name]) if grad is None else grad
            dtype = problem.tensors[name].dtype
            rounds = name in ("linear_bias", "token_weight")
            of[f"d_{name}"] = arithmetic.rounded(grad, dtype) if rounds else grad
    return of


def logits(problem: Problem, draws: int) -> Tensor:
    """``[draws, B, T, V]``, each where the token's target stands; the first are exact."""
    arithmetic = Arithmetic(problem.low, draws)
    tensors = {k: v.double() for k, v in problem.cast().items() if v.is_floating_point()}
    return _Dense(problem, tensors, arithmetic).logits()


def _takes_part(problem: Problem) -> Tensor:
    """Where an upstream gradient is looked at, in the shape of the upstream gradient."""
    if problem.value_axes() == "b":
        return torch.ones_like(problem.tensors["upstream"], dtype=torch.bool)
    return problem.value_kept


class _Dense:
    """One problem's tensors, float64; those with a gradient ``[draws, ...]``."""

    def __init__(self, problem: Problem, tensors: dict[str, Tensor], a: Arithmetic) -> None:
        self.problem, self.tensors, self.a = problem, tensors, a
        self.kept = problem.kept.flatten()  # [N]
        self.shape = problem.tensors["input"].shape[:2]
        shift = problem.option("shift", 0)
        self.shift = min(shift, self.shape[1])
        target = problem.target
        if target is None:
            target = torch.zeros(self.shape, dtype=torch.int64)
        labels = target.masked_fill(target == problem.option("ignore_index", -100), -1).long()
        rest = (0, 0) * (labels.dim() - 2)
        labels = F.pad(labels[:, self.shift :], (*rest, 0, self.shift), value=-1)
        self.labels = labels.flatten(0, 1)  # [N] or [N, K], -1 where ignored

    def logits(self) -> Tensor:
        """Over the temperature, ``[draws, B, T, V]``."""
        options = self.problem.options
        z = self._logits(self.a, "input", "linear_weight", "linear_bias", options)
        return self._placed(self._tempered(z))

    def value(self) -> Tensor:
        """What the program gives, ``[draws, ...]``."""
        a, problem = self.a, self.problem
        z = self._logits(a, "input", "linear_weight", "linear_bias", problem.options)
        program = problem.program
        if program in ("linear_cross_entropy", "LinearCrossEntropy"):
            return self._cross_entropy(z)
        if program == "defer_logits":
            if problem.option("gathered"):
                return self._placed(self._at_labels(self._log_softmax(z)))
            return self._cross_entropy(z)
        if program == "linear_kl_div":
            return self._kl_div(z)
        z = self._tempered(z)
        log_p = self._log_softmax(z)
        if program == "linear_topk_kl_div":
            return self._placed(self._topk_kl_div(log_p))
        if program == "token_statistics":
            found = [a.logsumexp(z), self._at_labels(z), self._at_labels(self._log_softmax(z))]
            if problem.option("entropy"):
                found.append(self._entropy(self._log_softmax(z)))
            found = [torch.where(self.kept, x, 0) for x in found]
            return torch.stack([self._placed(x) for x in found], 1)
        log_prob = self._placed(self._at_labels(log_p))
        if program == "linear_log_probs" or program == "gradient_sparsity":
            return log_prob
        return policy_loss(program.removeprefix("losses."), log_prob, self.tensors, a)

    def _logits(self, a: Arithmetic, hidden: str, weight: str, bias: str, options: dict) -> Tensor:
        """[draws, N, V]."""
        tensors = self.tensors
        h, c = tensors[hidden], tensors[weight]
        h = h.reshape(*h.shape[:-3], -1, h.shape[-1])
        h = torch.where(self.kept[:, None], h, 0)  # an ignored one may be NaN
        h = h.expand(a.draws, *h.shape[-2:])
        z = a.linear(h, c.expand(a.draws, *c.shape[-2:]))
        scale, softcap = options.get("logit_scale", 1.0), options.get("softcap")
        if scale != 1:
            z = a.wide(scale * z)
        if bias in tensors:
            b = tensors[bias]
            z = a.wide(z + (b[:, None] if b.dim() == 2 else b))
        if softcap is not None:
            z = a.wide(softcap * a.tanh(a.wide(z / softcap)))
        return a.wide(z)

    def _tempered(self, z: Tensor, a: Arithmetic | None = None) -> Tensor:
        temperature = self.problem.option("temperature", 1.0)
        return z if temperature == 1 else (a or self.a).wide(z / temperature)

    def _log_softmax(self, z: Tensor, a: Arithmetic | None = None) -> Tensor:
        a = a or self.a
        highest = z.detach().amax(-1, keepdim=True)
        highest = torch.where(highest.isfinite(), highest, 0)
        below = a.wide(z - highest)
        mass = a.sum(a.exp(below))
        log_mass = a.wide(mass.log())
        return a.wide(below - log_mass[..., None])

    def _at_labels(self, values: Tensor) -> Tensor:
        """[draws, N, V] to [draws, N] or [draws, N, K]; 0 at what is ignored."""
        labels = self.labels if self.labels.dim() == 2 else self.labels[:, None]
        index = labels.clamp_min(0).expand(len(values), *labels.shape)
        found = torch.where(labels >= 0, values.gather(-1, index), 0)
        return found if self.labels.dim() == 2 else found[..., 0]

    def _placed(self, values: Tensor) -> Tensor:
        """[draws, N, ...] to [draws, B, T, ...], what is said of a target where it stands."""
        values = values.unflatten(1, self.shape)
        if not self.shift:
            return values
        rest = (0, 0) * (values.dim() - 3)
        return F.pad(values[:, :, : self.shape[1] - self.shift], (*rest, self.shift, 0))

    def _entropy(self, log_p: Tensor) -> Tensor:
        possible = log_p > -math.inf
        log_p = torch.where(possible, log_p, 0)
        p = torch.where(possible, self.a.exp(log_p), 0)
        return -self.a.sum(self.a.wide(p * log_p))

    def _cross_entropy(self, z: Tensor) -> Tensor:
        a, option = self.a, self.problem.option
        log_p = self._log_softmax(z)
        weight = self.tensors.get("weight")
        loss = -self._at_labels(log_p)
        share = self.kept.double()
        if weight is not None:
            share = torch.where(self.kept, weight[self.labels.clamp_min(0)], 0)
            loss = a.wide(loss * share)
        smoothing = option("label_smoothing", 0.0)
        if smoothing:
            all_of = log_p if weight is None else a.wide(weight * log_p)
            spread = a.wide(a.sum(all_of) * (-smoothing / log_p.shape[-1]))
            loss = a.wide(a.wide((1 - smoothing) * loss) + spread)
        if option("z_loss"):
            loss = a.wide(loss + a.wide(option("z_loss") * a.wide(a.logsumexp(z) ** 2)))
        return self._reduced(torch.where(self.kept, loss, 0), share)

    def _reduced(self, loss: Tensor, share: Tensor) -> Tensor:
        """Losses [draws, N] as the reduction wants them; ``share`` is what a mean is over."""
        a, option = self.a, self.problem.option
        token_weight = self.tensors.get("token_weight")
        if token_weight is not None:
            flat = F.pad(token_weight[..., self.shift :], (0, self.shift)).flatten(-2)
            flat = torch.where(self.kept, flat, 0)
            loss = a.wide(loss * flat)
            share = share * flat
        reduction = option("reduction", "mean")
        if reduction == "none":
            return self._placed(loss)
        total = a.sum(loss)
        if reduction == "sum":
            return total
        return a.wide(total / option("normalizer", a.wide(share.sum(-1).expand(a.draws))))

    def _kl_div(self, z: Tensor) -> Tensor:
        a, problem, option = self.a, self.problem, self.problem.option
        teacher = {k.removeprefix("teacher_"): v for k, v in problem.options.items()}
        teacher = {k: teacher[k] for k in teacher if f"teacher_{k}" in problem.options}
        stored = problem.tensors["teacher_input"].dtype
        own = Arithmetic(problem.autocast or stored, a.draws, a.seed + 1)
        t = self._logits(own, "teacher_input", "teacher_weight", "teacher_bias", teacher)
        log_p = self._log_softmax(self._tempered(z))
        log_q = self._log_softmax(self._tempered(t, own), own)
        kind, beta = option("divergence", "forward"), option("beta", 0.5)
        if kind == "forward":
            loss = self._kl(log_q, log_p)
        elif kind == "reverse":
            loss = self._kl(log_p, log_q)
        else:
            parts = a.wide(log_p + math.log1p(-beta)), a.wide(log_q + math.log(beta))
            log_m = a.wide(torch.logaddexp(*parts))
            loss = beta * self._kl(log_q, log_m) + (1 - beta) * self._kl(log_p, log_m)
            loss = a.wide(loss)
        hard = option("hard_weight", 0.0)
        if hard:
            surprise = -self._at_labels(self._log_softmax(z))
            loss = a.wide(a.wide((1 - hard) * loss) + a.wide(hard * surprise))
        loss = torch.where(self.kept, loss, 0)
        return self._reduced(loss, self.kept.double())

    def _kl(self, of: Tensor, to: Tensor) -> Tensor:
        """KL of one softmax to another, [draws, N], from their logarithms."""
        possible = of > -math.inf
        of, to = torch.where(possible, of, 0), torch.where(possible, to, 0)
        p = torch.where(possible, self.a.exp(of), 0)
        return self.a.sum(self.a.wide(p * self.a.wide(of - to)))

    def _topk_kl_div(self, log_p: Tensor) -> Tensor:
        a, problem = self.a, self.problem
        q = problem.tensors["teacher_prob"].double().flatten(0, 1)  # [N, K]
        q = torch.where(self.labels >= 0, q, 0)
        terms = torch.xlogy(q, q) - a.wide(torch.where(q > 0, q * self._at_labels(log_p), 0))
        loss = a.sum(a.wide(terms))
        if not problem.option("tail"):
            return loss
        rest = a.wide((1 - a.wide(q.sum(-1).expand(a.draws, -1))).clamp_min(0))
        named = torch.zeros(log_p.shape[1:])
        named.scatter_add_(1, self.labels.clamp_min(0), (self.labels >= 0).float())
        left = a.logsumexp(log_p.masked_fill(named > 0, -math.inf))
        loss = a.wide(loss + a.wide(torch.xlogy(rest, rest) - rest * left))
        return torch.where(self.kept, loss, 0)


def policy_loss(name: str, log_prob: Tensor, constants: dict[str, Tensor], a: Arithmetic) -> Tensor:
    """A loss of preferences or of policies as its paper writes it, with LOSS_CALLS' options.

    Args:
        name: of the loss.
        log_prob: ``[draws, B, T]``.
        constants: ``reference`` and ``advantage`` ``[B, T]``, where it has them.
        a: what rounds.
    """
    base = constants.get("reference", log_prob)
    if name == "kl_penalty":
        off = a.wide(base - log_prob)
        return a.wide(a.wide(off.expm1()) - off)
    if name == "clipped_surrogate":
        off = a.wide(log_prob - base)
        ratio, gain = a.exp(off), constants["advantage"]
        surrogate = -torch.minimum(a.wide(ratio * gain), ratio.clamp(0.8, 1.3) * gain)
        return a.wide(surrogate + a.wide(0.04 * policy_loss("kl_penalty", log_prob, constants, a)))
    chosen, rejected = a.sum(log_prob[..., ::2]), a.sum(log_prob[..., 1::2])
    near, far = base[..., ::2].sum(-1), base[..., 1::2].sum(-1)
    if name == "kto":
        off = a.wide(a.sum(log_prob) - base.sum(-1))
        gain = a.wide(0.3 * a.wide(off - 0.3))
        good, bad = 1.3 * a.sigmoid(-gain), 0.6 * a.sigmoid(gain)
        return a.wide(torch.where(base[:, 0] > -2, good, bad))
    if name == "orpo":
        odds = [a.wide(x - a.wide(a.wide(-a.wide(x.expm1())).log())) for x in (chosen, rejected)]
        return a.wide(-chosen - a.wide(0.4 * F.logsigmoid(a.wide(odds[0] - odds[1]))))
    margin = a.wide(chosen - rejected)
    if name in ("dpo", "ipo"):
        margin = a.wide(a.wide(chosen - near) - a.wide(rejected - far))
    if name == "ipo":
        return a.wide(a.wide(margin - 2.5) ** 2)
    if name == "simpo":
        return a.wide(-F.logsigmoid(a.wide(2.5 * margin - 1.4)))
    if name == "cpo":
        return a.wide(a.wide(-F.logsigmoid(a.wide(0.2 * margin))) - a.wide(0.7 * chosen))
    margin = a.wide(0.3 * margin)
    return a.wide(-0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin))
