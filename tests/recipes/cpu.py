"""What makes torch train small diffusion nets on CPU cores: a GroupNorm for narrow layers, attention as plain matrix
products, Muon, and single-threaded processes that average gradients or weights (threads of one process wait at every
barrier when the cores are shared)."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

# Without instructions for it, bfloat16 is several times slower than float32 (8 times in the VAE, on AVX2).
BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


class GroupNorm(torch.autograd.Function):
    """Over channels-last memory: statistics as column sums, so that a group of two channels costs no more than one of
    thirty. x: (B, C, h, w)."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps):
        B, C, h, w = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(B, h * w, C)
        n = h * w * C // groups
        total = flat.sum(1, dtype=torch.float32).view(B, groups, -1).sum(2)
        square = (flat * flat).sum(1, dtype=torch.float32).view(B, groups, -1).sum(2)
        mean = total / n
        rstd = (square / n - mean * mean + eps).rsqrt()  # (B, groups)
        scale = rstd[..., None] * weight.float().view(1, groups, -1)
        shift = bias.float().view(1, groups, -1) - mean[..., None] * scale
        y = torch.addcmul(shift.view(B, 1, C).to(x.dtype), flat, scale.view(B, 1, C).to(x.dtype))
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y.view(B, h, w, C).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        G, (B, C, h, w) = ctx.groups, x.shape
        n = h * w * C // G
        flat, grad = (t.permute(0, 2, 3, 1).reshape(B, h * w, C) for t in (x, dy))
        sum1 = grad.sum(1, dtype=torch.float32).view(B, G, -1)
        sum2 = (grad * flat).sum(1, dtype=torch.float32).view(B, G, -1)
        m, r = mean.view(B, G, 1), rstd.view(B, G, 1)
        gain = weight.float().view(1, G, C // G)
        of_square, of_sum = (gain * sum2).sum(2, keepdim=True), (gain * sum1).sum(2, keepdim=True)
        c2 = (of_sum * m - of_square) * r**3 / n
        c3 = -c2 * m - of_sum * r / n

        def spread(t):
            return t.expand(B, G, C // G).reshape(B, 1, C).to(x.dtype)

        dx = torch.addcmul(torch.addcmul(spread(c3), flat, spread(c2)), grad, spread(r * gain))
        dweight, dbias = ((sum2 - sum1 * m) * r).sum(0).reshape(C), sum1.sum(0).reshape(C)
        return dx.view(B, h, w, C).permute(0, 3, 1, 2), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The CPU flash kernel's backward was 40 % of a training step; the nets here have at most 256 positions."""
    if attn_mask is not None or is_causal:
        return _attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, H, N, d = q.shape
    k, v = (t.reshape(B * H, -1, d) for t in (k, v))
    weights = torch.softmax(torch.bmm((q * scale).reshape(B * H, N, d), k.transpose(1, 2)), -1)
    return torch.bmm(weights, v).view(B, H, N, d)


_attention, _group_norm = F.scaled_dot_product_attention, nn.GroupNorm.forward


def patch() -> None:
    def forward(self, x):
        narrow = torch.is_grad_enabled() and x.dim() == 4 and not x.is_contiguous()
        if narrow and x.is_contiguous(memory_format=torch.channels_last):
            return GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return _group_norm(self, x)

    nn.GroupNorm.forward = forward
    F.scaled_dot_product_attention = attention


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz. Jordan et al. 2024."""

    def __init__(self, params, lr, momentum, decay):
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:  # of a part that does not learn
                    continue
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                state["m"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["m"], group["momentum"]).flatten(1)
                rows, columns = update.shape
                update = orthogonal(update) * max(1, rows / columns) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update.reshape(p.shape), alpha=-group["lr"])


def orthogonal(g):
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = (x / (x.norm() + 1e-7)).to(torch.bfloat16 if BFLOAT16 else torch.float32).contiguous()
    for _ in range(4):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).float()


def optimizers(modules, lr: float, momentum: float, decay: float):
    """Muon for the inner matrices, AdamW for the rest (ends, embeddings, norms, biases)."""
    ends = "conv_in", "conv_out", "quant_conv", "embed", "time_embedding.linear_1"
    inner, rest = [], []
    for module in modules:
        for name, p in module.named_parameters():
            (inner if p.dim() >= 2 and not any(e in name for e in ends) else rest).append(p)
    return Muon(inner, lr, momentum, decay), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)


def average_gradients(params) -> None:
    flat = torch.cat([p.grad.reshape(-1) for p in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad.copy_(g.view_as(p))


@torch.no_grad()
def average_weights(params) -> None:
    flat = torch.cat([p.reshape(-1) for p in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.copy_(mean.view_as(p))


def agree(value: float) -> float:
    """Rank 0's number, on every rank: clocks differ, and all must stop at the same step."""
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def _start(rank, ranks, meeting, train, args):
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same initial weights everywhere
    patch()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    train(args, rank)
    dist.destroy_process_group()


def run(train, args, ranks: int) -> None:
    """train(args, rank) in `ranks` processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_start, (ranks, os.path.join(folder, "meeting"), train, args), nprocs=ranks)
