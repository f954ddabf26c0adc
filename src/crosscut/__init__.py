"""Cross-entropy of a language model's output head, without ever storing the logits.

>>> loss = crosscut.linear_cross_entropy(hidden_states, lm_head.weight, labels)
>>> loss.backward()

The method is Cut Cross-Entropy (arXiv:2411.09009).
"""

from crosscut import losses as losses
from crosscut.backends import Explanation
from crosscut.distillation import explain_kl_div, linear_kl_div, linear_topk_kl_div
from crosscut.functional import (
    GradientSparsity,
    explain,
    gradient_sparsity,
    linear_cross_entropy,
    linear_log_probs,
    token_statistics,
)
from crosscut.integrations.huggingface import defer_logits, patch_trl, undefer_logits, unpatch_trl
from crosscut.module import LinearCrossEntropy
from crosscut.options import Divergence, GradientPolicy, set_workspace_limit, workspace_limit
from crosscut.statistics import TokenStatistics

__all__ = [
    "Divergence",
    "Explanation",
    "GradientPolicy",
    "GradientSparsity",
    "LinearCrossEntropy",
    "TokenStatistics",
    "defer_logits",
    "explain",
    "explain_kl_div",
    "gradient_sparsity",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "linear_topk_kl_div",
    "patch_trl",
    "set_workspace_limit",
    "token_statistics",
    "undefer_logits",
    "unpatch_trl",
    "workspace_limit",
]

__version__ = "0.1.0"
