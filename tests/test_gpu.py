"""What only a GPU can show of the Triton backend. The conformance suite runs there too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import reference
from support.judging import (
    Head,
    LossFn,
    assert_as_accurate_as_pytorch,
    error,
    judge,
    make_head,
    outcome,
    rounding,
)

import crosscut
from crosscut.options import POLICIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def cuda_head(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16, ignored: float = 0.0
) -> Head:
    return make_head(shape, dtype, device="cuda", ignored=ignored)


def step(head: Head, **options) -> tuple[torch.Tensor, ...]:
    found = outcome(crosscut.linear_cross_entropy, head, backend="triton", **options)
    return found.loss, found.d_input, found.d_weight


@pytest.mark.parametrize("policy", POLICIES)
def test_twenty_calls_give_the_same_bits(policy):
    head = cuda_head((1111, 520, 9001), ignored=0.2)
    first = step(head, policy=policy)
    for _ in range(19):
        for one, again in zip(first, step(head, policy=policy), strict=True):
            assert torch.equal(one, again)


@pytest.mark.parametrize("hidden_size", [16, 24, 40, 100, 640, 2304, 5120, 8192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_hidden_sizes(hidden_size, dtype):
    head = cuda_head((300, hidden_size, 1111), dtype)
    assert_as_accurate_as_pytorch(head, backend="triton")


def test_more_than_2_31_logits():
    tokens, hidden_size, classes = 16_500, 64, 131_072
    assert tokens * classes > 2**31
    head = cuda_head((tokens, hidden_size, classes))
    theirs = outcome(reference.linear_cross_entropy, head)
    weight = head.linear_weight.double()
    loss, d_input, d_weight = 0.0, torch.zeros_like(head.input), torch.zeros_like(weight)
    d_input = d_input.double()
    for part in torch.arange(tokens).split(1000):
        hidden, rows = head.input[part].double(), torch.arange(len(part))
        z = hidden @ weight.t()
        loss += torch.nn.functional.cross_entropy(z, head.target[part], reduction="sum") / tokens
        dz = z.softmax(1)
        dz[rows, head.target[part]] -= 1
        d_weight += dz.t() @ hidden / tokens
        d_input[part] = dz @ weight / tokens
    exact = (loss, d_input, d_weight)
    for found, their, true in zip(step(head, policy="exact"), theirs[:3], exact, strict=True):
        assert error(found, true) <= 2 * error(their, true) + rounding(torch.bfloat16)


@pytest.mark.parametrize("frozen", ["input", "linear_weight"])
def test_a_frozen_side_takes_no_memory(frozen):
    head = cuda_head((512, 1024, 100_000))
    leaves = {"input": head.input, "linear_weight": head.linear_weight}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    crosscut.linear_cross_entropy(
        **leaves, target=head.target, backend="triton", policy="exact"
    ).backward()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    wanted = sum(leaf.nbytes for name, leaf in leaves.items() if name != frozen)
    workspace = 512 * 100_000 * 2 + 3 * head.input.nbytes + 2**22  # half of a frozen gradient
    assert taken <= wanted + workspace


@pytest.mark.parametrize("scale", [1, 6], ids=["flat", "peaked"])
def test_peak_memory(scale):
    """Gemma 2 2B's head: 128 MiB beyond the gradients, for any softmax."""
    head = cuda_head((8192, 2304, 256_000))
    head = replace(head, input=scale * head.input)
    gradients = head.input.nbytes + head.linear_weight.nbytes

    def peak(run) -> int:
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    @torch.no_grad()
    def forward() -> None:
        crosscut.linear_cross_entropy(head.input, head.linear_weight, head.target, backend="triton")

    def exact() -> None:
        step(head, policy="exact")

    assert peak(forward) <= 1.25 * 2**20
    copies = 2 * head.input.nbytes  # of the hidden states, and what rounding leaves of dH
    assert peak(exact) <= gradients + copies + 26 * 2**20
    assert peak(lambda: step(head)) <= gradients + 2**27
    before = crosscut.workspace_limit()
    crosscut.set_workspace_limit(2**24)
    try:
        assert peak(exact) <= gradients + copies + 6 * 2**20
    finally:
        crosscut.set_workspace_limit(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 100.0}, {"reduction": "none"}, {"z_loss": 0.01, "logit_scale": 0.9}],
    ids=lambda options: ", ".join(options) or "plain",
)
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_a_peaked_softmax_is_filtered(dtype, options, ignored):
    head = cuda_head((1111, 520, 50_001), dtype, ignored)
    head = replace(head, input=9 * head.input)  # logits of standard deviation 18
    likely = (head.input @ head.linear_weight.t()).argmax(1)  # as a trained model's targets are
    head = replace(head, target=torch.where(head.target < 0, head.target, likely))
    head_options = {key: options[key] for key in ("softcap", "logit_scale") if key in options}
    sparsity = crosscut.gradient_sparsity(
        head.input, head.linear_weight, head.target, backend="triton", **head_options
    )
    assert (sparsity.kept < 0.4) == (dtype == torch.bfloat16)  # in float16 nothing is left out
    assert_as_accurate_as_pytorch(head, factor=1.0, backend="triton", **options)


@pytest.mark.parametrize("scale", [0.05, 1.0])
def test_a_flat_softmax_gets_the_exact_gradient(scale):
    head = cuda_head((1111, 1032, 50_001))  # hidden size: both forwards have the same tiles
    head = replace(head, input=scale * head.input)
    for ours, exact in zip(step(head), step(head, policy="exact"), strict=True):
        assert torch.equal(ours, exact)


def log_prob_and_entropy(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, **options
) -> torch.Tensor:
    found = crosscut.token_statistics(
        input, linear_weight, target, entropy=True, ranks=True, backend="triton", **options
    )
    assert found.entropy is not None
    return torch.stack([found.log_prob, found.entropy])


def expected_log_prob_and_entropy(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, **options
) -> torch.Tensor:
    log_p = reference.logits(input, linear_weight, **options).log_softmax(-1)
    log_prob = log_p.gather(-1, target.clamp_min(0)[:, None])[:, 0]
    both = torch.stack([log_prob, -(log_p.exp() * log_p).sum(-1)])
    return torch.where(target == -100, 0, both)


def several_targets(head: Head, count: int) -> Head:
    """Random targets, a fifth ignored, some twice, and a token of none."""
    target = torch.randint(len(head.linear_weight), (len(head.input), count), device="cuda")
    target[torch.rand(target.shape, device="cuda") < 0.2] = -100
    target[0] = -100
    target[1] = target[1, :1]
    return replace(head, target=target)


def log_probs(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, **options
) -> torch.Tensor:
    return crosscut.linear_log_probs(input, linear_weight, target, backend="triton", **options)


def expected_log_probs(
    input: torch.Tensor, linear_weight: torch.Tensor, target: torch.Tensor, **options
) -> torch.Tensor:
    log_p = reference.logits(input, linear_weight, **options).log_softmax(-1)
    return torch.where(target == -100, 0, log_p.gather(-1, target.clamp_min(0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0], ids=str)
@pytest.mark.parametrize("which", ["entropy", "several targets"])
def test_other_losses_are_as_accurate_as_pytorch(dtype, softcap, which):
    head = cuda_head((1111, 520, 9001), dtype, ignored=0.2)
    ours, theirs = log_prob_and_entropy, expected_log_prob_and_entropy
    if which == "several targets":
        ours, theirs, head = log_probs, expected_log_probs, several_targets(head, 5)

    def without_bias(loss: LossFn) -> LossFn:
        return lambda *tensors, linear_bias: loss(*tensors, softcap=softcap)

    judge(without_bias(ours), without_bias(theirs), head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ranks(dtype):
    head = cuda_head((1111, 520, 9001), dtype, ignored=0.2)
    z = reference.logits(head.input, head.linear_weight)
    head.target[::3] = z.argmax(1)[::3]
    kept = head.target != -100

    def expected(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.sort(z, dim=-1, descending=True, stable=True).indices
        return order[:, 0][kept], (order == head.target[:, None]).double().argmax(-1)[kept]

    true = expected(reference.logits(head.input.double(), head.linear_weight.double()))
    found = crosscut.token_statistics(
        head.input, head.linear_weight, head.target, ranks=True, backend="triton"
    )
    assert found.argmax is not None
    assert found.target_rank is not None
    assert found.correct is not None
    ours = found.argmax[kept], found.target_rank[kept]
    for value, their, exact in zip(ours, expected(z), true, strict=True):
        # Of 9001 logits one is within a rounding of the target's for 1 % of the tokens.
        assert (value != exact).sum() <= 2 * (their != exact).sum() + 0.02 * len(exact)
    assert torch.equal(found.correct[kept], found.argmax[kept] == head.target[kept])
    assert found.correct[kept].float().mean() > 0.25


@pytest.mark.parametrize("which", ["entropy", "several targets"])
def test_other_losses_give_the_same_bits(which):
    head, loss = cuda_head((1111, 520, 9001), ignored=0.2), log_prob_and_entropy
    if which == "several targets":
        head, loss = several_targets(head, 7), log_probs

    def run() -> tuple[torch.Tensor, ...]:
        found = outcome(lambda *tensors, linear_bias: loss(*tensors), head)
        return found.loss, found.d_input, found.d_weight

    first = run()
    for _ in range(9):
        assert all(map(torch.equal, first, run()))


def test_forward_memory_of_the_other_losses():
    head = cuda_head((8192, 1024, 64_000))
    several = several_targets(head, 4)

    @torch.no_grad()
    def statistics() -> None:
        crosscut.token_statistics(
            head.input, head.linear_weight, head.target, entropy=True, ranks=True, backend="triton"
        )

    @torch.no_grad()
    def of_several() -> None:
        log_probs(several.input, several.linear_weight, several.target)

    for run in (statistics, of_several):
        run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= 2**22


def test_compiles_in_one_graph():
    head = cuda_head((512, 256, 5000))
    loss = torch.compile(crosscut.linear_cross_entropy, fullgraph=True)
    compiled = outcome(loss, head)
    for one, other in zip(compiled[:3], step(head), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_graph(policy):
    """Captured on some inputs and replayed on others, with other rows ignored."""
    head = cuda_head((700, 128, 3000), ignored=0.1)
    other = replace(make_head((700, 128, 3000), torch.bfloat16, device="cuda", ignored=0.6, seed=1))
    hidden, weight = (x.clone().requires_grad_() for x in (head.input, head.linear_weight))
    target = head.target.clone()

    def run() -> torch.Tensor:
        hidden.grad = weight.grad = None
        loss = crosscut.linear_cross_entropy(hidden, weight, target, policy=policy)
        loss.backward()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    with torch.no_grad():
        hidden.copy_(other.input)
        weight.copy_(other.linear_weight)
        target.copy_(other.target)
    graph.replay()
    assert hidden.grad is not None
    assert weight.grad is not None
    for found, eager in zip(
        (loss, hidden.grad, weight.grad), step(other, policy=policy), strict=True
    ):
        assert torch.equal(found, eager)


def test_cuda_graph_of_an_entropy():
    head = cuda_head((700, 128, 3000), ignored=0.1)
    hidden, weight = (x.clone().requires_grad_() for x in (head.input, head.linear_weight))

    def run() -> torch.Tensor:
        hidden.grad = weight.grad = None
        both = log_prob_and_entropy(hidden, weight, head.target)
        both.sum().backward()
        return both.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    found = captured.clone(), hidden.grad, weight.grad
    for value, eager in zip(found, (run(), hidden.grad, weight.grad), strict=True):
        assert value is not None
        assert eager is not None
        assert torch.equal(value, eager)


def test_two_streams():
    heads = [
        cuda_head((900, 256, 8000)),
        make_head((900, 256, 8000), torch.bfloat16, device="cuda", seed=3),
    ]
    expected = [step(head) for head in heads]
    streams = [torch.cuda.Stream() for _ in heads]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for head, stream in zip(heads, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(head))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    head = cuda_head((300, 64, 2000))
    away = Head(*(x.to("cuda:1") for x in (head.input, head.linear_weight, head.target)))
    for here, there in zip(step(head), step(away), strict=True):
        assert there.device == torch.device("cuda:1")
        assert torch.equal(here.cpu(), there.cpu())


def test_half_of_the_labels_ignored_is_half_of_the_batch():
    head = cuda_head((2000, 256, 9000))
    target = head.target.clone()
    target[::2] = -100
    sparse = replace(head, target=target)
    half = replace(head, input=head.input[1::2], target=head.target[1::2])
    ours, alone = step(sparse, policy="exact"), step(half, policy="exact")
    assert (ours[1][::2] == 0).all()
    assert torch.equal(ours[1][1::2], alone[1])
    assert torch.equal(ours[2], alone[2])


@pytest.mark.parametrize(
    ("shape", "ignored", "options"),
    [
        ((1500, 256, 20_000), 0.3, {"softcap": 50.0}),
        ((900, 250, 9001), 0.2, {}),  # whose rows TMA does not load
        ((8192, 256, 16_000), 0.0, {}),
    ],
    ids=str,
)
@pytest.mark.parametrize("fits", ["pairs", "nothing"])
def test_selected_pairs_that_do_not_fit(monkeypatch, shape, ignored, options, fits):
    """The sweep over pairs: for dC alone, or for dH too. The same bits each time, and as good."""
    from crosscut.backends import column_filter
    from crosscut.backends.triton import project, select

    monkeypatch.setattr(column_filter, "PAIR_SWEEP", True)
    if fits == "nothing":
        capacity = column_filter.Capacity(1, shape[2] // 8, shape[2], 0)
        monkeypatch.setattr(select, "capacity_for_pairs", lambda problem, lends: capacity)
    monkeypatch.setattr(project, "NONZEROS_PER_TOKEN", 0)
    head = cuda_head(shape, ignored=ignored)
    head = replace(head, input=5 * head.input)
    assert (
        0
        < crosscut.gradient_sparsity(head.input, head.linear_weight, head.target, **options).kept
        < 0.5
    )
    assert_as_accurate_as_pytorch(head, by_row=False, backend="triton", **options)
    first = step(head, **options)
    assert not torch.equal(first[2], step(head, policy="exact", **options)[2])
    for _ in range(5):
        for one, again in zip(first, step(head, **options), strict=True):
            assert torch.equal(one, again)
