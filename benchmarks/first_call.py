"""How long the first call takes on a GPU: seconds, by what Triton's cache holds already.

    python benchmarks/first_call.py

A process each: with an empty cache and its kernels compiled one by one, at their launches; with an
empty cache and all of them compiled ahead; with a full cache, both ways.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_call(one_by_one: bool) -> None:
    """Print what the first loss and gradients take, and the next."""
    import torch

    import crosscut
    from crosscut.backends.triton import compile_ahead

    compile_ahead.CAN_COMPILE_AHEAD = not one_by_one
    hidden = torch.randn(8192, 2304, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    classifier = torch.randn(256_000, 2304, dtype=torch.bfloat16, device="cuda") * 0.1
    classifier.requires_grad_()
    labels = torch.randint(256_000, (8192,), device="cuda")
    (hidden @ classifier[:1024].T).sum().backward()  # CUDA and cuBLAS are there
    for name in ("first", "next"):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = crosscut.linear_cross_entropy(hidden, classifier, labels)
        torch.cuda.synchronize()
        forward = time.perf_counter() - start
        loss.backward()
        torch.cuda.synchronize()
        both = time.perf_counter() - start
        print(f"  {name:5}  forward {forward:6.2f} s, with backward {both:6.2f} s", flush=True)


def main() -> None:
    """Run the four processes."""
    print(f"{os.cpu_count()} CPU cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for what, cache, how in (
            ("empty cache, one by one", "a", "one by one"),
            ("empty cache, ahead", "b", "ahead"),
            ("full cache, one by one", "b", "one by one"),
            ("full cache, ahead", "b", "ahead"),
        ):
            print(what, flush=True)
            environment = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder, cache))}
            subprocess.run([sys.executable, __file__, how], env=environment, check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        first_call(sys.argv[1] == "one by one")
    else:
        main()
