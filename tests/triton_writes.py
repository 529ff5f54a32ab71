"""What each Triton kernel writes.

torch.compile finds it out from a kernel's code. Where it did not, it would take every tensor of a
launch for written, and copy the inputs.
"""

OUTPUTS = {
    "layer_norm_fwd_kernel": {"y", "total", "mean", "rstd"},
    "layer_norm_bwd_kernel": {"dx", "dweight", "dbias"},
    "add_shares_kernel": {"out_a", "out_b"},
    "gemm_kernel": {"y", "pre"},
    "gemm_activation_bwd_kernel": {"g", "shares"},
    "product_kernel": {"out"},
    "attention_fwd_kernel": {"out", "lse"},
    "attention_join_kernel": {"out", "lse"},
    "attention_rows_kernel": {"tops", "shares", "deltas"},
    "attention_keys_kernel": {"dk", "dv"},
    "attention_queries_kernel": {"dq"},
    "attention_bias_kernel": {"dbias"},
    "linear_cross_entropy_fwd_kernel": {"parts"},
    "linear_cross_entropy_join_kernel": {"loss", "lse"},
    "linear_cross_entropy_bwd_kernel": {"g", "shares"},
}


def writes(kernel: str, given: dict) -> set[str]:
    """The names of what a launch writes of its arguments, those that are not None."""
    if "part" in given and kernel == "attention_fwd_kernel":
        return {"part", "part_top", "part_total"}  # the joining kernel writes the others
    if kernel == "gemm_activation_bwd_kernel" and given["ACTIVATION"] == "none":
        return {"shares"} & set(given)  # g is dy
    return OUTPUTS[kernel] & set(given)
