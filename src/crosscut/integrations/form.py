"""What is known of logits that were not computed: a linear form, and what may be done to it.

    logits = movedim(cap · tanh((Σ_i scale_i · hidden_i @ classifier_i.T + bias) / cap), -1, vdim)

without the tanh where there is no cap, and ``factor · log_softmax`` of it where log-probabilities
are meant. Scalar factors go into the scales, views and slices of tokens to the hidden states,
slices of the vocabulary to the classifiers. :data:`RECORDED` names what a model or a loss may do
to logits without their being computed, :data:`REDUCED` what ends in numbers a token: the losses.
Everything else answers ``NotImplemented``, which means: compute the logits.

Plain PyTorch, in Python that ``torch.compile`` traces.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from crosscut import functional

_NOTHING_IGNORED = -(2**63)
"""An ``ignore_index`` that no index can have."""


@dataclass(frozen=True)
class Term:
    """One low- or full-rank part of the logits, ``scale * hidden @ classifier.T``.

    Attributes:
        hidden: the logits' shape with the hidden size in place of the vocabulary.
        classifier: ``[V, D]``.
        scale: a finite number.
    """

    hidden: Tensor
    classifier: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class LogitForm:
    """Logits that were not computed.

    Attributes:
        terms: at least one.
        bias: ``[V]``, added before the cap; None for none.
        cap: the softcap, None for none.
        vdim: the dimension of the vocabulary, from 0.
        dtype: of the logits, as the model would have them.
        compute_dtype: of the matmul, where autocast chose it; the tensors are cast to it when
            they are used.
        log_factor: None for logits; otherwise these are ``log_factor * log_softmax(logits)``.
        bias_scale: factor of the bias. Multiplied at once, it would round a bias that a softcap
            first divides and then multiplies by the same number.
        policy: how much of the softmax a gradient computes.
        backend: what computes the losses.
    """

    terms: tuple[Term, ...]
    bias: Tensor | None
    cap: float | None
    vdim: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    log_factor: float | None = None
    bias_scale: float = 1.0
    policy: str = "auto"
    backend: str = "auto"

    @property
    def num_classes(self) -> int:
        return self.terms[0].classifier.shape[0]

    @property
    def ndim(self) -> int:
        return self.terms[0].hidden.dim()

    @property
    def shape(self) -> torch.Size:
        sizes = list(self.terms[0].hidden.shape)
        sizes[self.vdim] = self.num_classes
        return torch.Size(sizes)

    @property
    def device(self) -> torch.device:
        return self.terms[0].hidden.device

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything a gradient may flow to: hidden states, classifiers, bias."""
        terms = self.terms
        return (*[t.hidden for t in terms], *[t.classifier for t in terms], self.bias)

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> LogitForm:
        """The same form of other tensors, in the order of :meth:`tensors`."""
        count = len(self.terms)
        terms = tuple(
            Term(cast(Tensor, tensors[i]), cast(Tensor, tensors[count + i]), term.scale)
            for i, term in enumerate(self.terms)
        )
        return replace(self, terms=terms, bias=tensors[-1])

    def detach(self) -> LogitForm:
        return self.with_tensors(tuple(x if x is None else x.detach() for x in self.tensors()))

    def map_hidden(self, change: Callable[[Tensor], Tensor]) -> LogitForm:
        """The form of ``change(logits)``, where it leaves the vocabulary alone and in place."""
        terms = tuple(Term(change(t.hidden), t.classifier, t.scale) for t in self.terms)
        return replace(self, terms=terms)

    def scaled(self, factor: float) -> LogitForm | Any:
        """The form of ``factor * logits``. The cap scales too: it is homogeneous."""
        if not math.isfinite(factor) or factor == 0:
            return NotImplemented
        if self.log_factor is not None:
            return replace(self, log_factor=self.log_factor * factor)
        terms = tuple(Term(t.hidden, t.classifier, t.scale * factor) for t in self.terms)
        cap = None if self.cap is None else self.cap * abs(factor)
        return replace(self, terms=terms, bias_scale=self.bias_scale * factor, cap=cap)

    def scaled_bias(self) -> Tensor | None:
        """The bias times its factor."""
        if self.bias is None or self.bias_scale == 1:
            return self.bias
        return self.bias * self.bias_scale

    def dense(self) -> Tensor:
        """Compute them, differentiably."""
        scale, hidden, classifier, bias = self._joined()
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden, classifier) * scale
            if bias is not None:
                logits = logits + bias
            if self.cap is not None:
                logits = self.cap * torch.tanh(logits / self.cap)
            logits = logits.to(self.dtype)
            if self.log_factor is not None:
                logits = self.log_factor * torch.log_softmax(logits, -1)
        return logits.movedim(-1, self.vdim)

    def cross_entropy(
        self,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        reduction: str = "none",
        ignore_index: int = _NOTHING_IGNORED,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """:func:`crosscut.linear_cross_entropy` of the logits, float32 or float64.

        Args:
            target: the logits' shape without the vocabulary.
            weight: class weights ``[V]``.
            reduction: as there.
            ignore_index: as there.
            label_smoothing: as there.
        """
        scale, hidden, classifier, bias = self._joined()
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear_cross_entropy(
                hidden,
                classifier,
                target,
                linear_bias=bias,
                weight=weight,
                reduction=cast(Any, reduction),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                softcap=self.cap,
                logit_scale=scale,
                policy=cast(Any, self.policy),
                backend=self.backend,
            )

    def lse(self, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-sum-exp and target logit of each token, in the shape without the vocabulary."""
        scale, hidden, classifier, bias = self._joined()
        if target is None:
            target = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            found = functional.token_statistics(
                hidden,
                classifier,
                target,
                linear_bias=bias,
                ignore_index=_NOTHING_IGNORED,
                softcap=self.cap,
                logit_scale=scale,
                policy=cast(Any, self.policy),
                backend=self.backend,
            )
        return found.lse, found.target_logit

    def logits_at(self, index: Tensor) -> Tensor:
        """Logits of one class a token; ``index`` has the shape without the vocabulary."""
        scale, hidden, classifier, bias = self._joined()
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = (hidden.to(wide) * classifier[index].to(wide)).sum(-1) * scale
        if bias is not None:
            logits = logits + bias[index]
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def _joined(self) -> tuple[float, Tensor, Tensor, Tensor | None]:
        """One term: scale, hidden ``[..., D]``, classifier ``[V, D]`` and bias in one dtype.

        Several terms stand side by side, as columns of one.
        """
        dtype, scale = self.compute_dtype, self.terms[0].scale
        hidden = [t.hidden.movedim(self.vdim, -1) for t in self.terms]
        # A factor of its own is that of the hidden states, which are the smaller.
        hidden = [
            x if t.scale == scale else x * (t.scale / scale)
            for x, t in zip(hidden, self.terms, strict=True)
        ]
        hidden = [x.to(dtype) for x in hidden]
        classifiers = [t.classifier.to(dtype) for t in self.terms]
        bias = self.scaled_bias()
        bias = None if bias is None else bias.to(dtype)
        if len(self.terms) == 1:
            return scale, hidden[0], classifiers[0], bias
        return scale, torch.cat(hidden, -1), torch.cat(classifiers, -1), bias


# What may be done to a form and gives a form. Each takes the form and the call's other arguments.


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def to_dtype(form: LogitForm, **_: Any) -> Any:
        return replace(form, dtype=dtype)

    return to_dtype


def _to(form: LogitForm, *args: Any, **kwargs: Any) -> Any:
    dtype = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype = value.dtype
            if value.device != form.device:
                return NotImplemented
        elif isinstance(value, (str, torch.device, int)) and not isinstance(value, bool):
            device = torch.device(value)
            if device.type != form.device.type or device.index not in (None, form.device.index):
                return NotImplemented
        elif not isinstance(value, (bool, torch.memory_format, type(None))):
            return NotImplemented
    if dtype is None:
        return form
    return replace(form, dtype=dtype) if dtype.is_floating_point else NotImplemented


def _type(form: LogitForm, dtype: Any = None, **_: Any) -> Any:
    dtype = dtype.dtype if isinstance(dtype, Tensor) else dtype  # type_as
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return replace(form, dtype=dtype)
    return NotImplemented


def _same(form: LogitForm, *_: Any, **__: Any) -> Any:
    return form


def _reshape(form: LogitForm, *shape: Any, **kwargs: Any) -> Any:
    if kwargs or not shape:
        return NotImplemented
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):  # a torch.Size is a tuple
        shape = tuple(shape[0])
    if not all(isinstance(size, (int, torch.SymInt)) for size in shape):
        return NotImplemented  # view(dtype)
    *batch, last = shape
    sizes = form.shape
    if form.vdim != form.ndim - 1 or 0 in sizes:
        return NotImplemented
    tokens = math.prod(sizes[:-1])
    known = math.prod([size for size in batch if size != -1])
    if -1 in batch:
        fits = last == sizes[-1] and tokens % known == 0
    else:
        fits = last in (-1, sizes[-1]) and tokens == known
    if not fits:
        return NotImplemented
    reshaped = form.map_hidden(lambda x: x.reshape(*batch, x.shape[-1]))
    return replace(reshaped, vdim=len(batch))


def _flatten(form: LogitForm, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = _dim(form, start_dim), _dim(form, end_dim)
    if start <= form.vdim <= end and start != end:
        return NotImplemented
    vdim = form.vdim - (end - start if form.vdim > end else 0)
    return replace(form.map_hidden(lambda x: x.flatten(start, end)), vdim=vdim)


def _transpose(form: LogitForm, dim0: int, dim1: int) -> Any:
    first, second = _dim(form, dim0), _dim(form, dim1)
    vdim = {first: second, second: first}.get(form.vdim, form.vdim)
    return replace(form.map_hidden(lambda x: x.transpose(first, second)), vdim=vdim)


def _permute(form: LogitForm, *dims: Any) -> Any:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    order = [_dim(form, dim) for dim in order]
    return replace(form.map_hidden(lambda x: x.permute(order)), vdim=order.index(form.vdim))


def _movedim(form: LogitForm, source: Any, destination: Any) -> Any:
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    order = [dim for dim in range(form.ndim) if dim != _dim(form, source)]
    order.insert(_dim(form, destination), _dim(form, source))
    return _permute(form, order)


def _unsqueeze(form: LogitForm, dim: int) -> Any:
    dim = dim + form.ndim + 1 if dim < 0 else dim
    vdim = form.vdim + (dim <= form.vdim)
    return replace(form.map_hidden(lambda x: x.unsqueeze(dim)), vdim=vdim)


def _squeeze(form: LogitForm, dim: Any = None) -> Any:
    if not isinstance(dim, int) or _dim(form, dim) == form.vdim:
        return NotImplemented
    dim = _dim(form, dim)
    gone = form.shape[dim] == 1
    vdim = form.vdim - (gone and dim < form.vdim)
    return replace(form.map_hidden(lambda x: x.squeeze(dim)), vdim=vdim)


def _getitem(form: LogitForm, index: Any) -> Any:
    """Slices, integers, None, Ellipsis, and at most one tensor, which picks tokens."""
    index = index if isinstance(index, tuple) else (index,)
    kinds = (int, slice, Tensor, type(None), type(Ellipsis))
    if any(isinstance(part, bool) or not isinstance(part, kinds) for part in index):
        return NotImplemented
    tensors = [part for part in index if isinstance(part, Tensor)]
    if len(tensors) > 1 or (tensors and any(isinstance(part, int) for part in index)):
        return NotImplemented

    def width(part: Any) -> int:
        """How many dimensions it reads."""
        if isinstance(part, Tensor) and part.dtype == torch.bool:
            return part.dim()
        return 0 if part is None or part is Ellipsis else 1

    missing = form.ndim - sum(width(part) for part in index)
    if missing < 0:
        return NotImplemented
    if not any(part is Ellipsis for part in index):
        index = (*index, Ellipsis)
    read, written, vdim, picked = 0, 0, -1, slice(None)
    expanded: list[Any] = []
    for part in index:
        parts: list[Any] = [slice(None)] * missing if part is Ellipsis else [part]
        for part in parts:
            one: Any = part
            until = read + width(one)
            if read <= form.vdim < until:
                if not isinstance(one, slice):
                    return NotImplemented
                vdim, picked, one = written, one, slice(None)
            read = until
            if isinstance(one, Tensor):
                if one.dtype not in (torch.bool, torch.int64, torch.int32):
                    return NotImplemented
                written += 1 if one.dtype == torch.bool else one.dim()
            else:
                written += not isinstance(one, int)
            expanded.append(one)
    places = tuple(expanded)
    found = replace(form.map_hidden(lambda x: x[places]), vdim=vdim)
    return found if picked == slice(None) else _pick_classes(found, picked)


def _pick_classes(form: LogitForm, picked: slice) -> Any:
    if form.log_factor is not None or not len(range(form.num_classes)[picked]):
        return NotImplemented
    terms = tuple(Term(t.hidden, t.classifier[picked], t.scale) for t in form.terms)
    return replace(form, terms=terms, bias=None if form.bias is None else form.bias[picked])


def _narrow(form: LogitForm, dim: int, start: Any, length: int) -> Any:
    if not isinstance(start, int) or start < 0:
        return NotImplemented
    part = slice(start, start + length)
    return _getitem(form, (*[slice(None)] * _dim(form, dim), part))


def _select(form: LogitForm, dim: int, index: int) -> Any:
    return _getitem(form, (*[slice(None)] * _dim(form, dim), index))


def _detach(form: LogitForm) -> Any:
    return form.detach()


def _multiply(form: LogitForm, other: Any) -> Any:
    return form.scaled(float(other)) if _is_number(other) else NotImplemented


def _divide(form: LogitForm, other: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None or not _is_number(other) or other == 0:
        return NotImplemented
    return form.scaled(1 / other)


def _negate(form: LogitForm) -> Any:
    return form.scaled(-1.0)


def _tanh(form: LogitForm) -> Any:
    if form.cap is not None or form.log_factor is not None:
        return NotImplemented
    return replace(form, cap=1.0)


def _add(form: LogitForm, other: Any, *, alpha: Any = 1) -> Any:
    """A bias of the vocabulary, or another low-rank part."""
    if form.cap is not None or form.log_factor is not None or alpha != 1:
        return NotImplemented
    if isinstance(other, LogitForm):
        return _add_form(form, other)
    if not isinstance(other, Tensor) or not other.is_floating_point():
        return NotImplemented
    if other.device != form.device or other.dim() > form.ndim:
        return NotImplemented
    place = other.dim() - (form.ndim - form.vdim)  # of the vocabulary, in the bias
    if place < 0 or other.shape[place] != form.num_classes or other.numel() != form.num_classes:
        return NotImplemented
    own, bias = form.scaled_bias(), other.reshape(-1)
    dtype = torch.promote_types(form.dtype, other.dtype)
    return replace(form, bias=bias if own is None else own + bias, bias_scale=1.0, dtype=dtype)


def _add_form(form: LogitForm, other: LogitForm) -> Any:
    if other.cap is not None or other.log_factor is not None:
        return NotImplemented
    if form.shape != other.shape or form.vdim != other.vdim or form.device != other.device:
        return NotImplemented
    if form.compute_dtype != other.compute_dtype:
        return NotImplemented
    biases = [x for x in (form.scaled_bias(), other.scaled_bias()) if x is not None]
    return replace(
        form,
        terms=(*form.terms, *other.terms),
        bias=sum(biases[1:], biases[0]) if biases else None,
        bias_scale=1.0,
        dtype=torch.promote_types(form.dtype, other.dtype),
    )


def _log_softmax(form: LogitForm, dim: int | None = None, dtype: Any = None, **kwargs: Any) -> Any:
    if form.log_factor is not None or dim is None or _dim(form, dim) != form.vdim:
        return NotImplemented
    wide = dtype or _result_dtype(torch.log_softmax, form, target=False)
    return replace(form, log_factor=1.0, dtype=wide)


RECORDED: dict[str, Callable[..., Any]] = {
    "float": _cast(torch.float32),
    "double": _cast(torch.float64),
    "half": _cast(torch.float16),
    "bfloat16": _cast(torch.bfloat16),
    "to": _to,
    "type": _type,
    "type_as": _type,
    "contiguous": _same,
    "clone": _same,
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "permute": _permute,
    "movedim": _movedim,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "__getitem__": _getitem,
    "narrow": _narrow,
    "select": _select,
    "detach": _detach,
    "mul": _multiply,
    "multiply": _multiply,
    "__mul__": _multiply,
    "__rmul__": _multiply,
    "div": _divide,
    "divide": _divide,
    "true_divide": _divide,
    "__truediv__": _divide,
    "neg": _negate,
    "__neg__": _negate,
    "tanh": _tanh,
    "add": _add,
    "__add__": _add,
    "__radd__": _add,
    "log_softmax": _log_softmax,
}
"""Name of a function or method -> what it makes of a form: a form, or NotImplemented."""


# What ends in numbers a token or one number. Each takes the form and the call's other arguments.


def _cross_entropy(
    form: LogitForm,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if form.log_factor is not None or size_average is not None or reduce is not None:
        return NotImplemented
    if not _is_target(form, target):
        return NotImplemented
    loss = form.cross_entropy(
        target,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss.to(_result_dtype(F.cross_entropy, form, target=True))


def _nll_loss(
    form: LogitForm,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if form.log_factor is None or size_average is not None or reduce is not None:
        return NotImplemented
    if not _is_target(form, target):
        return NotImplemented
    loss = form.cross_entropy(target, weight=weight, reduction=reduction, ignore_index=ignore_index)
    return (form.log_factor * loss).to(_result_dtype(F.nll_loss, form, target=True))


def _gather(form: LogitForm, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """One class a token."""
    sizes = list(form.shape)
    sizes[form.vdim] = 1
    if _dim(form, dim) != form.vdim or list(index.shape) != sizes or sparse_grad:
        return NotImplemented
    classes = index.squeeze(form.vdim)
    if form.log_factor is None:
        found = form.logits_at(classes)
    else:
        found = -form.log_factor * form.cross_entropy(classes)
    return found.unsqueeze(form.vdim).to(form.dtype)


def _logsumexp(form: LogitForm, dim: Any, keepdim: bool = False) -> Any:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if form.log_factor is not None or not isinstance(dim, int) or _dim(form, dim) != form.vdim:
        return NotImplemented
    lse, _ = form.lse()
    dtype = _result_dtype(torch.logsumexp, form, target=False)
    return (lse.unsqueeze(form.vdim) if keepdim else lse).to(dtype)


def _sum(form: LogitForm, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Of the log-probabilities over the vocabulary: what label smoothing asks for."""
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if form.log_factor is None or not isinstance(dim, int) or _dim(form, dim) != form.vdim:
        return NotImplemented
    first = torch.zeros(
        [size for i, size in enumerate(form.shape) if i != form.vdim],
        dtype=torch.int64,
        device=form.device,
    )
    # A target spread over all classes has the mean of -log_prob for its loss.
    mean = form.cross_entropy(first, label_smoothing=1.0)
    total = (-form.log_factor * form.num_classes) * mean
    dtype = dtype or _result_dtype(torch.sum, form, target=False)
    return (total.unsqueeze(form.vdim) if keepdim else total).to(dtype)


REDUCED: dict[str, Callable[..., Any]] = {
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll_loss,
    "gather": _gather,
    "logsumexp": _logsumexp,
    "sum": _sum,
}
"""Name of a function or method -> the numbers it makes of a form, or NotImplemented."""


def _keywords(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of its parameters; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


_KEYWORDS = {name: _keywords(function) for name, function in {**RECORDED, **REDUCED}.items()}


def knows_arguments(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether what is done to a form by this name takes these keywords (``axis=``, for one)."""
    known = _KEYWORDS.get(name)
    return known is None or all(keyword in known for keyword in kwargs)


def _dim(form: LogitForm, dim: int) -> int:
    return dim + form.ndim if dim < 0 else dim


def _is_number(value: Any) -> bool:
    """A number that is known without asking a device."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_target(form: LogitForm, target: Any) -> bool:
    """Whether these are class indices for the vocabulary where ``cross_entropy`` looks for it."""
    return (
        isinstance(target, Tensor)
        and target.dtype in (torch.int64, torch.int32)
        and form.vdim == (0 if form.ndim == 1 else 1)
        and target.dim() == form.ndim - 1
    )


def _result_dtype(function: Callable[..., Tensor], form: LogitForm, *, target: bool) -> torch.dtype:
    """Dtype that ``function`` gives the logits; autocast widens some, on some devices: ask it."""
    if form.dtype == torch.float64 or not torch.is_autocast_enabled(form.device.type):
        return form.dtype
    logits = torch.zeros(1, 1, dtype=form.dtype, device=form.device)
    second = torch.zeros(1, dtype=torch.int64, device=form.device) if target else -1
    return function(logits, second).dtype
