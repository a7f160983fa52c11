"""A plan in words: its summary, and its derivation line by line with sources, as scaling.cost prints them."""

from __future__ import annotations

from scaling import steptime as model
from scaling.accounting import count_params, flops_per_token
from scaling.goodput import DEVICE_MTBF_S, goodput, goodput_range
from scaling.layout import MFU_ERROR, USABLE_MEMORY, Plan, describe_layout
from scaling.text import readable_time


def summary(plan: Plan) -> list[str]:
    """Layout, memory, step time, MFU and goodput, a line each."""
    running = goodput(plan.layout.devices, plan.checkpoint_bytes)
    low, high = plan.mfu_range
    terms = sorted(vars(plan.step).items(), key=lambda term: -term[1])
    shares = ", ".join(f"{name} {seconds / plan.step.total:.1%}" for name, seconds in terms if seconds)
    return [
        f"layout      {describe_layout(plan.layout)}",
        f"memory      {plan.memory.total / 1e9:.1f} of {plan.device.memory_bytes / 1e9:.0f} GB",
        f"step        {plan.step.total:.3g} s for {plan.batch * plan.shape.seq_len:,} tokens: {shares}",
        f"MFU         {plan.mfu():.1%} ({low:.0%} to {high:.0%}; {plan.mfu(causal=False):.1%} with attention not halved)",
        f"goodput     {running.share:.1%}, a checkpoint every {readable_time(running.interval)}",
    ]


def derivation(plan: Plan) -> list[str]:
    """How the plan's figures come about: formula, numbers, result, and where the constants are from."""
    return [*_step_lines(plan), *_goodput_lines(plan)]


def _step_lines(plan: Plan) -> list[str]:
    device, layout, step, memory = plan.device, plan.layout, plan.step, plan.memory
    micro_batches = plan.batch // (layout.data * layout.micro_batch)
    base, inside, between = (1e6 * seconds for seconds in model.LATENCY_S)
    rate = device.matmul_peak(plan.dtype) * model.TRAINING_SHARE
    gb = {name: f"{value / 1e9:.1f}" for name, value in vars(memory).items()}
    return [
        f"  parameters = {count_params(plan.shape).total / 1e9:.4g}B; FLOPs a token = "
        f"{flops_per_token(plan.shape).train:.4g}; batch = {plan.batch:,} × {plan.shape.seq_len:,} tokens",
        f"  layout = {describe_layout(layout)}: the fastest of those that divide and fit",
        f"  memory = {' + '.join(f'{name} {value}' for name, value in gb.items())} = {memory.total / 1e9:.1f} GB of "
        f"{USABLE_MEMORY * device.memory_bytes / 1e9:.1f} usable ({USABLE_MEMORY:g} of the data sheet's)",
        f"    bytes a parameter: {model.WEIGHT_BYTES} bf16 weight, {model.GRADIENT_BYTES} fp32 gradient, "
        f"{model.STATE_BYTES} fp32 master and AdamW moments over {layout.shards:,} ranks",
        f"  matmul {step.matmul:.3g} s: FLOPs / {rate / 1e12:.4g} TFLOP/s + {1e6 * model.MATMUL_OVERHEAD_S:g} µs each "
        f"(cuBLAS by size, pyptx.dev); rate = {device.peak(plan.dtype) / 1e12:g} peak × "
        f"{device.matmul_peak(plan.dtype) / device.peak(plan.dtype):.3g} best matmul (mamf-finder) × "
        f"{model.TRAINING_SHARE:g} in training (calibrated on torchtitan's 8B, 8 H100)",
        f"  attention {step.attention:.3g} s: {plan.attention}, {model.ATTENTION_SHARE[plan.attention]:g} of the bf16 "
        f"peak, backward {model.ATTENTION_BACKWARD:g} × forward (arXiv 2307.08691, 2407.08608)",
        f"  element-wise {step.elementwise:.3g} s: bytes / ({model.MEMORY_SHARE:g} × {device.bandwidth / 1e12:g} TB/s)",
        f"  tensor {step.tensor:.3g} s, context {step.context:.3g} s: rings at {model.LINK_SHARE:g} × "
        f"{device.link / 1e9:g} GB/s in a server of {device.per_server} (NVIDIA/nccl issue 1281), "
        f"{model.NETWORK_SHARE:g} × {device.network / 1e9:g} GB/s a device between servers; latency {base:g} + "
        f"{inside:g} a hop + {between:g} a server, µs (NCCL tuning.cc); not overlapped",
        f"  pipeline {step.pipeline:.3g} s: {model.bubble_micro_batches(layout):.3g} idle of {micro_batches} "
        f"micro-batches ({layout.schedule}; arXiv 2104.04473, 2401.10241), fill, and the head's stage",
        f"  data {step.data:.3g} s: what gathers and reductions take longer than the micro-batch beside them; "
        f"optimizer {step.optimizer:.3g} s",
        f"  step = sum = {step.total:.4g} s; {plan.tokens_per_s:,.4g} tokens/s; {plan.flops_per_s() / 1e12:.4g} TFLOP/s "
        f"a device = {plan.mfu():.1%} MFU; published over predicted elsewhere: {MFU_ERROR[0]:g} to {MFU_ERROR[1]:g}",
    ]


def _goodput_lines(plan: Plan) -> list[str]:
    devices = plan.layout.devices
    running = goodput(devices, plan.checkpoint_bytes)
    low, high = goodput_range(devices, plan.checkpoint_bytes)
    return [
        f"  MTBF = {DEVICE_MTBF_S / 3600:,.0f} device-hours (Llama 3: 466 stops in 54 days of 16,384) / {devices:,} = "
        f"{readable_time(running.mtbf)}",
        f"  checkpoint δ = {plan.checkpoint_bytes / 1e9:,.0f} GB at 122 MB/s a device (Llama 3: 2 TB/s of 16,384) = "
        f"{running.checkpoint:.3g} s; interval τ = √(2·δ·MTBF) = {readable_time(running.interval)} (Young 1974, Daly 2006)",
        f"  goodput = 1/(1 + δ/τ {running.checkpoint_share:.2%} + τ/2·MTBF {running.rework_share:.2%} + restart "
        f"{running.restart:g} s/MTBF {running.restart_share:.2%} (MegaScale)) = {running.share:.1%} ({low:.0%} to {high:.0%})",
    ]
