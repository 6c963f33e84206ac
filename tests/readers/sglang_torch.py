"""Plain torch in place of kernels that SGLang has for GPUs and AMX only, for the families whose CPU path lacks them.

Attention with sinks or of latents (GPT-OSS, DeepSeek V3), the Mamba-2 scan and experts without a gate (Nemotron-H).
Loaders, parameter layouts, routers, norms, rotary embeddings and linears stay SGLang's. Nothing is cached: a request is
one prefill, and each further token another. Shapes: N tokens of a batch, S of a sequence, H heads, P dims of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

import sglang_stubs  # before sglang
import torch
from sglang.srt.arg_groups import model_hook
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch.nn import functional as F

OPS = (
    "causal_conv1d_fwd_cpu",
    "causal_conv1d_update_cpu",
    "chunk_gated_delta_rule_cpu",
    "fused_gdn_gating_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
)
"""Operators of sgl_kernel that the module of linear attention looks up when it is imported; none is called."""
REPLACED = ("gpt_oss", "deepseek_v3", "nemotron_h")


def install(model_type: str) -> bool:
    """Replace what SGLang's CPU path lacks for this `model_type`; False, nothing replaced, where it lacks nothing."""
    if model_type not in REPLACED:
        return False
    # GPT-OSS asserts a backend that knows sinks: the attention below does.
    model_hook.attention_backends_of = lambda _view: ("triton", "triton")
    RadixAttention.forward = attention
    if model_type == "deepseek_v3":
        _install_plain_rope()
    if model_type == "nemotron_h":
        _install_mamba()
    return True


def attention(
    self: RadixAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    forward_batch: ForwardBatch,
    save_kv_cache: bool = True,  # noqa: ARG001 - nothing is cached
    *,
    sinks: torch.Tensor | None = None,
    **others: object,
) -> torch.Tensor:
    """Causal attention of whole prompts, with a sliding window and sinks: `[N, H * P]`."""
    if asked := [name for name, value in others.items() if value is not None and value is not False]:
        raise NotImplementedError(f"attention with {', '.join(asked)}")
    groups = self.tp_q_head_num // self.tp_k_head_num
    query = q.view(-1, self.tp_q_head_num, self.qk_head_dim)
    key = k.view(-1, self.tp_k_head_num, self.qk_head_dim).repeat_interleave(groups, dim=1)
    value = v.view(-1, self.tp_v_head_num, self.v_head_dim).repeat_interleave(groups, dim=1)
    outputs = []
    for part in _sequences(forward_batch):
        scores = torch.einsum("shp,thp->hst", query[part], key[part]) * self.scaling
        distance = torch.arange(scores.shape[1])[:, None] - torch.arange(scores.shape[2])
        seen = distance >= 0
        if self.sliding_window_size >= 0:
            seen &= distance <= self.sliding_window_size
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores).view(-1, 1, 1).expand(-1, scores.shape[1], 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : distance.shape[1]]
        outputs.append(torch.einsum("hst,thp->shp", weights, value[part]))
    return torch.cat(outputs).reshape(-1, self.tp_q_head_num * self.v_head_dim)


def _sequences(forward_batch: ForwardBatch) -> Iterator[slice]:
    """The rows of each request of a batch of prompts."""
    if not forward_batch.forward_mode.is_extend() or any(forward_batch.extend_prefix_lens.tolist()):
        raise NotImplementedError("a batch that is not one of whole prompts")
    for begin, end in pairwise(accumulate(forward_batch.extend_seq_lens.tolist(), initial=0)):
        yield slice(begin, end)


def _install_plain_rope() -> None:
    """DeepSeek's rotary embedding for a CPU knows YaRN only; without scaling it is the one of every other family."""
    from sglang.srt.layers import rotary_embedding
    from sglang.srt.models import deepseek_v2

    def get_rope(head_size: int, *, rope_scaling: dict[str, object] | None, device: str, **others: object) -> object:
        device = device if rope_scaling else "any"
        return rotary_embedding.get_rope_wrapper(head_size, rope_scaling=rope_scaling, device=device, **others)

    deepseek_v2.get_rope_wrapper = get_rope


def _install_mamba() -> None:
    for name in OPS:
        setattr(torch.ops.sgl_kernel, name, sglang_stubs.Stub(stub_name=f"torch.ops.sgl_kernel.{name}"))
    from sglang.srt.models import nemotron_h

    nemotron_h.NemotronHMambaDecoderLayer._forward_mamba = _forward_mamba
    nemotron_h.torch = _TorchWithMixedMatmul()
    native = fused_moe_native.moe_forward_native

    def experts(
        layer: torch.nn.Module, x: torch.Tensor, topk_output: StandardTopKOutput, moe_runner_config: MoeRunnerConfig
    ) -> torch.Tensor:
        gateless = moe_runner_config.activation == "relu2"
        return (_squared_relu_experts if gateless else native)(layer, x, topk_output, moe_runner_config)

    fused_moe_native.moe_forward_native = experts


class _TorchWithMixedMatmul:
    """`torch` as a module of SGLang sees it, whose `mm` takes `out_dtype`, which torch has on CUDA only."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    @staticmethod
    def mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        return torch.mm(a.to(out_dtype), b.to(out_dtype))


def _squared_relu_experts(
    layer: torch.nn.Module, x: torch.Tensor, topk_output: StandardTopKOutput, config: MoeRunnerConfig
) -> torch.Tensor:
    """`[N, D]`: down(relu(up x)^2) of every chosen expert, weighted; the CPU path has gated experts only."""
    weights, ids, _ = topk_output
    total = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        hidden = F.relu(F.linear(x[rows], layer.w13_weight[expert])).square()
        total.index_add_(0, rows, F.linear(hidden, layer.w2_weight[expert]) * weights[rows, slots, None].to(x))
    return total * (config.routed_scaling_factor or 1.0)  # the runner that this stands for multiplies it in


def _forward_mamba(self: torch.nn.Module, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
    """The Mamba-2 mixer around SGLang's projections: `[N, D]`, as in the paper (arXiv:2405.21060), token by token."""
    mixer = self.mixer
    states = mixer.n_groups * mixer.ssm_state_size
    projected, _ = mixer.in_proj(hidden_states)
    gate, mixed, steps = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
    outputs = []
    for part in _sequences(forward_batch):
        convolved = _causal_convolution(mixed[part], mixer.conv1d.weight, mixer.conv1d.bias)
        x, b, c = convolved.split([mixer.intermediate_size, states, states], dim=-1)
        outputs.append(_scan(mixer, x, b, c, F.softplus(steps[part] + mixer.dt_bias)))
    output, _ = mixer.out_proj(_gated_norm(mixer, torch.cat(outputs), gate))
    return output


def _causal_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[S, C]`: SiLU of a depthwise convolution over the tokens so far."""
    width = weight.shape[-1]
    return F.silu(F.conv1d(F.pad(x.T, (width - 1, 0)), weight.view(-1, 1, width), bias, groups=x.shape[1])).T


def _scan(
    mixer: torch.nn.Module, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """`[S, H * P]`: state = exp(step A) state + step x B^T; y = state C + D x."""
    heads = mixer.num_heads
    x = x.view(len(x), heads, -1)
    b, c = (part.view(len(x), mixer.n_groups, -1).repeat_interleave(heads // mixer.n_groups, dim=1) for part in (b, c))
    state = x.new_zeros(heads, x.shape[-1], b.shape[-1])
    outputs = []
    for token, step in enumerate(steps):
        state = state * (step * mixer.A).exp()[:, None, None] + torch.einsum("h,hp,hn->hpn", step, x[token], b[token])
        outputs.append(torch.einsum("hpn,hn->hp", state, c[token]) + mixer.D[:, None] * x[token])
    return torch.stack(outputs).flatten(1)


def _gated_norm(mixer: torch.nn.Module, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`[N, H * P]`: RMS norm of y silu(gate) in groups."""
    gated = (y * F.silu(gate)).unflatten(-1, (mixer.n_groups, -1))
    scale = torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + mixer.norm.variance_epsilon)
    return (gated * scale).flatten(-2) * mixer.norm.weight
