"""Kernels that can be compiled before they are needed, many at a time.

Triton compiles a kernel, and a launcher for it in C, when it is first launched: a call that needs
twenty waits for them one after the other. Within :func:`ahead` launches only compile, in threads:
run what launches them once on "meta" tensors, which have shapes and no data, and all of them are
compiled together.

    ahead(device, lambda: everything(tensors_on_meta))
    everything(tensors)

A launch that asks for more shared memory than the GPU has loads fewer steps ahead: slower, with the
same result to the bit, where Triton would raise an error in the middle of a training. Tables of
tiles are made so that it does not happen (tests compile all of them for every kind of GPU); who
brings other tiles or another compiler is not to lose a run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from crosscut.device import tuned

CAN_COMPILE_AHEAD = (
    not triton.knobs.runtime.interpret
    and "ignore_errors" in inspect.signature(triton.AsyncCompileMode).parameters
)
"""Since Triton 3.6, and not in its interpreter."""

_CHANGING = (
    "num_tokens", "num_labels", "num_rows", "num_blocks", "last_phase", "num_columns", "most_live",
    "deferred_from", "most_deferred", "most_hot",
    "stride_m", "stride_k", "stride_d_lse", "stride_d_target", "stride_d_log_prob", "stride_d_sum",
    "stride_d_entropy",
)  # fmt: skip
"""Sizes that follow the number of tokens, and strides of what may be expanded. Triton would compile
a kernel anew for those that are 1, for those that 16 divides and for all others: in the middle of a
training."""

_ANYWHERE = ("d_lse_ptr", "d_target_ptr", "d_log_prob_ptr", "d_sum_ptr", "d_entropy_ptr")
"""What may begin anywhere: views of other tensors. Triton would compile anew where it is not on 16
bytes."""

_device_ahead: ContextVar[torch.device | None] = ContextVar("device_ahead", default=None)


def real_device(device: torch.device) -> torch.device:
    """The device that "meta" tensors stand for, within :func:`ahead`; any other device itself."""
    return (device.type == "meta" and _device_ahead.get()) or device


def like_or(like: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """What ``make`` does of the shape and dtype of ``like``; without data, ``like`` itself.

    For PyTorch's arithmetic: on "meta" tensors its first use imports PyTorch's compiler.
    """
    return like if like.is_meta else make()


class _Kernel(triton.JITFunction):
    """A kernel whose launch fits, if it can, and only compiles it within :func:`ahead`."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._num_stages: dict[Hashable, int] = {}  # of launches that do not fit with those asked

    def __getitem__(self, grid: Any) -> Any:
        return functools.partial(self.run, grid=grid, warmup=_device_ahead.get() is not None)

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        """Launch with as many stages as asked for, or as fit; which is found out once."""
        if tuned.on_trial():  # `crosscut tune` rejects what does not fit
            return super().run(*args, grid=grid, warmup=warmup, **options)
        kind = driver.active.get_current_device(), *options.items()
        if kind in self._num_stages:
            options["num_stages"] = self._num_stages[kind]
        while True:
            try:
                return super().run(*args, grid=grid, warmup=warmup, **options)
            except triton.OutOfResources:
                if options.get("num_stages", 1) == 1:
                    raise
            options["num_stages"] -= 1
            self._num_stages[kind] = options["num_stages"]


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for what is launched; what kernels call wants no more than that."""
    if triton.knobs.runtime.interpret:
        return triton.jit(function)
    return _Kernel(function, do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_ANYWHERE)


class _Loading(ThreadPoolExecutor):
    """Compiles in threads, and makes ready for launch what was compiled."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(thread_name_prefix="crosscut-compile")
        self._device = device

    def submit(self, compile: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        def compile_and_load() -> Any:
            compiled = compile(*arguments, **options)
            with torch.cuda.device(self._device):
                compiled.run  # noqa: B018  (makes the launcher and loads the binary)
            return compiled

        return super().submit(compile_and_load)


def ahead(device: torch.device, call: Callable[[], object]) -> None:
    """Make a call whose launches compile for the device and do nothing else; wait for all of them.

    What does not compile raises its error when it is launched, not here. The call has a context of
    its own, so that an interrupt leaves no mode behind.
    """

    def compile_all() -> None:
        _device_ahead.set(device)
        with _Loading(device) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            call()

    Context().run(compile_all)
