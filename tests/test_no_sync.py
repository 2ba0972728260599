"""Nothing in the training path reads a tensor's value on the host or moves it between devices:
either would make a GPU wait"""
import pytest,torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from fastai_runbn.layers import LESSON10,RunningBatchNorm2d
from fastai_runbn.reference import ReferenceRunningBatchNorm

aten = torch.ops.aten
reads = {'_local_scalar_dense','item','is_nonzero','nonzero','nonzero_static','masked_select',
    'equal','allclose','unique_dim','_unique2','unique_consecutive','bincount','repeat_interleave'}
of_tensors = ('item','tolist','cpu','cuda','numpy','nonzero','new_tensor',
    '__bool__','__float__','__int__','__index__')
methods = {getattr(torch.Tensor, n) for n in of_tensors}
methods |= {torch.nonzero,torch.tensor,torch.as_tensor,torch.equal,
    torch.allclose,torch.unique,torch.masked_select}

class NoReads(TorchDispatchMode):
    "Raises on every operator that reads a value, or copies to another device"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in reads: raise AssertionError(f'host read: {func}')
        if name=='index' and any(is_mask(i) for i in args[1]):
            raise AssertionError(f'size depends on values: {func} with a mask')
        if name in ('_to_copy','copy_'):
            there = kwargs.get('device') or args[0].device
            here = (args[1] if name=='copy_' else args[0]).device
            if torch.device(there).type != here.type:
                raise AssertionError(f'copy between devices: {func} {here} to {there}')
        return func(*args, **kwargs)

def is_mask(i):
    return torch.is_tensor(i) and i.dtype in (torch.bool,torch.uint8)

class NoCalls(TorchFunctionMode):
    "Raises on every Python call that reads a value, or makes a tensor of numbers in host memory"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in methods: raise AssertionError(f'host read: {func.__name__}')
        return func(*args, **(kwargs or {}))

def train(layer, x):
    y = layer(x)
    y.backward(torch.ones_like(y))

kinds = {'default':{}, 'lesson10':LESSON10,
    'cumulative':dict(momentum=None),
    'window':dict(window=20, clamp=None, persistent_window=True)}
settings = pytest.mark.parametrize('settings', kinds.values(), ids=kinds)

@settings
@pytest.mark.parametrize('how', ['plain','checkpointed'])
def test_no_host_read_with_the_plain_formulas(settings, how):
    "What other devices run, run here"
    layer = RunningBatchNorm2d(3, backend='formulas', **settings)
    def checkpointed(x):
        return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    f = layer if how=='plain' else checkpointed
    for bs in (1,2,5):
        x = torch.randn(bs,3,4,4, requires_grad=True)
        with NoCalls(),NoReads(): train(f, x)

@settings
def test_no_sync_on_a_stand_in_for_a_gpu(settings):
    """Fake CUDA tensors have no values to read, and refuse operators over two devices
    (the autograd engine wants a real GPU, so its part is called by hand)"""
    with FakeTensorMode():
        layer = RunningBatchNorm2d(3, device='cuda', **settings)
        for bs in (1,2,5):
            x = torch.randn(bs,3,4,4, device='cuda', requires_grad=True)
            with NoCalls(),NoReads():
                y = layer(x) # kept, or older versions free what the node saved
                node = y.grad_fn
                dx,*_ = node._forward_cls.backward(node, torch.ones_like(x))
        assert dx.device.type == layer.window_mean.device.type == 'cuda'

@pytest.mark.parametrize('bad',
    [lambda x: bool(x.sum()>0),
    lambda x: x.sum().item(),
    lambda x: x[x>0], lambda x: x.nonzero(),
    lambda x: x.tolist(), lambda x: torch.tensor([1.]),
    lambda x: float(x.sum()), lambda x: x.numpy()])
def test_the_modes_do_raise(bad):
    x = torch.randn(3)
    said = 'host read|depends on values'
    with pytest.raises(AssertionError, match=said), NoCalls(),NoReads():
        bad(x)

def test_the_published_layer_reads():
    layer,x = ReferenceRunningBatchNorm(3),torch.randn(2,3,4,4)
    with pytest.raises(AssertionError, match='host read'), NoCalls(),NoReads():
        train(layer, x)
