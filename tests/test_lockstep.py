"""The layer with lesson 10's settings, step by step beside the reference:
outputs, gradients and state, float64"""
import numpy as np,pytest,torch
from fastai_runbn.layers import RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d,LESSON10
from fastai_runbn.reference import ReferenceRunningBatchNorm
from impls import backends,names

C = 5
cases = {
    '1d (N,C)':(RunningBatchNorm1d,()),
    '1d (N,C,L)':(RunningBatchNorm1d,(7,)),
    '2d':(RunningBatchNorm2d,(4,3)),
    '3d':(RunningBatchNorm3d,(2,3,2))}
layouts = (True,'contiguous'),(True,'channels_last'),(False,'contiguous')

def close(a, b, what):
    off = (a-b).abs()/b.abs().clamp(min=1)
    err = off.max().item()
    assert err < 1e-10, f'{what}: off by {err:.1e}'

each_backend = pytest.mark.parametrize('backend', backends)

@each_backend
@pytest.mark.parametrize('case,affine,layout',
    [(c,a,l) for c in cases for a,l in layouts
        if l=='contiguous' or c in ('2d','3d')])
def test_300_steps(case, affine, layout, backend):
    cls,space = cases[case]
    ours = cls(C, affine=affine, dtype=torch.float64,
        backend=backend, **LESSON10)
    ref = ReferenceRunningBatchNorm(C, affine=affine).double()
    if affine:
        pairs = (ours.weight,ref.mults),(ours.bias,ref.adds)
        with torch.no_grad():
            for o,r in pairs:
                v = torch.randn(C)+1
                o.copy_(v)
                r.copy_(v)
    scale = torch.rand(C).double()*3+.1
    shift = torch.randn(C).double()*2
    form = torch.channels_last if len(space)==2 else torch.channels_last_3d
    rng = np.random.default_rng(0)
    for step,bs in enumerate(rng.integers(1, 33, 300).tolist()):
        shape = (1,C)+(1,)*len(space)
        x = torch.randn(bs,C,*space).double()
        x = x*scale.view(shape) + shift.view(shape)
        if layout=='channels_last': x = x.to(memory_format=form)
        xo,xr = (x.clone().requires_grad_() for _ in range(2))
        dy = torch.randn_like(x)
        yo,yr = ours(xo),ref(xr)
        for p in (*ours.parameters(),*ref.parameters()):
            p.grad = None
        yo.backward(dy)
        yr.backward(dy)
        at = f'step {step}, bs {bs}'
        close(yo, yr, f'output, {at}')
        close(xo.grad, xr.grad, f'input gradient, {at}')
        if affine:
            close(ours.weight.grad, ref.mults.grad, f'γ gradient, {at}')
            close(ours.bias.grad, ref.adds.grad, f'β gradient, {at}')
        S,Q = ref.sums.detach(),ref.sqrs.detach()
        n = ref.count.detach()
        close(ours.window_mean, S/n, f'mean, {at}')
        close(ours.window_var, Q/n-(S/n)**2, f'variance, {at}')
        close(ours.window_count, n.expand(C), f'count, {at}')
        assert ours.samples_seen.item() == ref.batch.item()
        assert ours.num_batches_tracked.item() == ref.step.item()
    assert ours.path==names[backend]
    x = torch.randn(3,C,*space).double()
    close(ours.eval()(x), ref.eval()(x), 'output in evaluation')

@each_backend
def test_float32_agrees_to_float32(backend):
    """The same in float32, where the reference can do it:
    means of the order of the standard deviation"""
    ours = RunningBatchNorm2d(C, backend=backend, **LESSON10)
    ref = ReferenceRunningBatchNorm(C)
    for _ in range(100):
        x = torch.randn(2,C,4,4)
        torch.testing.assert_close(ours(x), ref(x), atol=1e-4, rtol=1e-4)
