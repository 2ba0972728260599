import torch
from torch import Tensor
from fastai_runbn.formulas import Formulas


# %%
class SyncBatchNormParts(Formulas):
    "The kernels of PyTorch's SyncBatchNorm, on CUDA"
    name = 'aten'

    @classmethod
    def fits(cls, x, state):
        "Are these what the kernels can compute with?"
        T = state.mean.dtype
        half = T==torch.float32 and x.dtype in (torch.bfloat16,torch.float16)
        return x.is_cuda and state.mean.is_cuda and (x.dtype==T or half)

    @classmethod
    def moments(cls, x): return torch.batch_norm_update_stats(x, None, None, 0.)

    @classmethod
    def normalize(cls, x, weight, bias, saved, step):
        weight,bias = [t if t is None else t.to(saved.dtype) for t in (weight,bias)]
        rstd = (saved[1]+step.eps).rsqrt_()
        return torch.batch_norm_elemt(x, weight, bias, saved[0], rstd, step.eps)

    @classmethod
    def sums(cls, dy, x, weight, bias, saved, step):
        rstd = (saved[1]+step.eps).rsqrt_()
        sum_dy,sum_dy_xmu,_,_ = torch.batch_norm_backward_reduce(_laid_out_as(dy, x), x, saved[0],
            rstd, weight, True, False, False)
        return torch.stack((sum_dy, sum_dy_xmu*rstd))

    @classmethod
    def dx(cls, dy, x, weight, bias, saved, G, step):
        weight = weight if weight is None else weight.to(saved.dtype)
        rstd = (saved[1]+step.eps).rsqrt_()
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(_laid_out_as(dy, x), x, saved[0], rstd, weight,
            G[0].contiguous(), G[1]/rstd, one)

def _laid_out_as(dy, x):
    return dy if dy.stride()==x.stride() else torch.empty_like(x).copy_(dy)
