"""Checkpoints, copies, averages of models and the forms of BatchNorm:
what goes in and out of a layer"""
import io,pickle
from copy import deepcopy
import pytest,torch
from torch import nn
from torch.optim.swa_utils import AveragedModel,get_ema_multi_avg_fn,update_bn
from fastai_runbn.layers import (LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d,
    RunningBatchNormMixin,runbn_settings,window_buffers)
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum
from fastai_runbn.surgery import to_bn,to_runbn

pytestmark = pytest.mark.usefixtures('each_path')

five = ['weight','bias','running_mean','running_var','num_batches_tracked']
def batch(bs=2, c=3): return torch.randn(bs,c,5,5)*2+1
def trained(layer, steps=20):
    for _ in range(steps): layer(batch()).sum().backward()
    return layer
def through_file(sd, **kwargs):
    f = io.BytesIO()
    torch.save(sd, f)
    f.seek(0)
    return torch.load(f, **{'weights_only':True, **kwargs})
def net(**settings):
    return nn.Sequential(nn.Conv2d(3,4,3), RunningBatchNorm2d(4, **settings),
        nn.ReLU(), nn.Flatten(), nn.Linear(36,2))
def same_state(a, b):
    params = zip(a.named_parameters(), b.parameters())
    buffers = zip(a.named_buffers(), b.buffers())
    for (k,p),q in (*params,*buffers): assert torch.equal(p, q), k

# forms of BatchNorm

@pytest.mark.parametrize('kw', [
    pytest.param(dict(affine=False), id='no affine'),
    pytest.param(dict(momentum=None), id='cumulative'),
    pytest.param(dict(momentum=.3, eps=1e-3), id='momentum'),
    pytest.param(dict(window=8), id='window'),
    pytest.param(dict(dtype=torch.float64), id='float64'),
    pytest.param(dict(dtype=torch.bfloat16), id='bfloat16'),
    pytest.param(dict(window=AdaptiveWindow(8)), id='adaptive'),
    pytest.param(LESSON10, id='lesson 10')])
def test_every_form_has_batch_norms_state_and_evaluation(kw):
    plain = {k:v for k,v in kw.items()
        if k in ('affine','eps','dtype')}
    rbn = RunningBatchNorm2d(3, **kw)
    bn = nn.BatchNorm2d(3, **plain)
    x = batch().to(kw.get('dtype', torch.float32))
    x[:,0] *= .01 # far below the clamp, which is for training only
    for _ in range(3): rbn(x)
    def form(layer):
        return {k:(v.dtype,v.shape) for k,v in layer.state_dict().items()}
    assert form(rbn) == form(bn)
    bn.load_state_dict(rbn.state_dict())
    assert torch.equal(rbn.eval()(x), bn.eval()(x))
    assert rbn(x).dtype == x.dtype

def test_bias_none():
    try: rbn = RunningBatchNorm2d(3, bias=False)
    except TypeError: pytest.skip("this PyTorch's BatchNorm has no `bias=`")
    assert rbn.bias is None and rbn.weight is not None
    x = batch().requires_grad_()
    rbn(x).pow(2).sum().backward()
    assert x.grad.isfinite().all()
    assert rbn.weight.grad is not None
    bn = to_bn(to_runbn(nn.BatchNorm2d(3, bias=False)))
    assert type(bn) is nn.BatchNorm2d

def test_momentum_none_is_the_mean_of_all_batches_as_in_batch_norm():
    kw = dict(momentum=None, dtype=torch.float64)
    rbn = RunningBatchNorm2d(3, clamp=None, **kw)
    bn = nn.BatchNorm2d(3, **kw)
    xs = [batch().double() for _ in range(7)]
    for x in xs:
        rbn(x)
        bn(x)
    tight = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rbn.running_mean, bn.running_mean, **tight)
    torch.testing.assert_close(rbn.running_var, bn.running_var, **tight)

def test_momentum_none_begins_with_the_next_batch_as_in_batch_norm():
    "Statistics without a count of batches, as those that were set by hand, are of none"
    kw = dict(momentum=None, dtype=torch.float64)
    rbn = RunningBatchNorm2d(3, clamp=None, **kw)
    bn = nn.BatchNorm2d(3, **kw)
    for m in (rbn,bn): m.running_mean.fill_(5.)
    for k in range(3):
        x = batch().double()
        rbn(x)
        bn(x)
        for name in ('running_mean','running_var'):
            have,want = getattr(rbn, name),getattr(bn, name)
            torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)

def test_update_bn_recomputes_them():
    n = net()
    for _ in range(5): n(batch())
    xs = [batch(8) for _ in range(4)]
    update_bn(xs, n)
    conv,norm = n[:2]
    assert isinstance(norm.momentum, AutoMomentum)
    assert norm.num_batches_tracked.item() == 4
    mean = conv(torch.cat(xs)).mean((0,2,3))
    torch.testing.assert_close(norm.running_mean, mean)

@pytest.mark.parametrize('cls,shape,said',
    [(RunningBatchNorm1d,(2,3,4,4),'expected 2D or 3D input (got 4D input)'),
    (RunningBatchNorm2d,(2,3),'expected 4D input (got 2D input)'),
    (RunningBatchNorm3d,(2,3,4,4),'expected 5D input (got 4D input)')])
def test_wrong_rank_is_batch_norms_error(cls, shape, said):
    for training in (True,False):
        layer = cls(3).train(training)
        with pytest.raises(ValueError) as e: layer(torch.randn(shape))
        assert str(e.value) == said

def test_wrong_channels_are_an_error():
    for c in (1,4):
        with pytest.raises(RuntimeError, match=f'3 channels got {c}'):
            RunningBatchNorm2d(3)(batch(c=c))

def test_no_tracking_is_an_error():
    with pytest.raises(ValueError, match='a running norm has to track'):
        RunningBatchNorm2d(3, track_running_stats=False)

def test_positional_arguments_are_batch_norms():
    positional = 3,1e-3,.2,False,True,torch.device('meta'),torch.float64
    rbn = RunningBatchNorm2d(*positional)
    assert (rbn.eps, rbn.momentum, rbn.affine) == (1e-3,.2,False)
    assert rbn.running_mean.is_meta and rbn.window_mean.is_meta
    assert rbn.window_mean.dtype == torch.float64

def test_repr_tells_every_setting():
    settings = dict(window=AdaptiveWindow(30), momentum=.03, running_grad=.25,
        eval_window=77, clamp=[.3,.2], clamp_inclusive=True,
        persistent_window=True, backend='formulas')
    assert settings.keys() == runbn_settings().keys()
    text = repr(RunningBatchNorm2d(3, **settings))
    parts = ('window=AdaptiveWindow(30)','momentum=0.03','running_grad=0.25','eval_window=77',
        'clamp=0.3 to 0.2 in 2 samples','clamp_inclusive=True','persistent_window=True')
    for part in parts: assert part in text
    assert 'momentum=auto,' in repr(RunningBatchNorm2d(3))

# files

def persistent_norm(c): return RunningBatchNorm2d(c, persistent_window=True)
@pytest.mark.parametrize('to',
    [nn.BatchNorm2d, RunningBatchNorm2d, persistent_norm], ids=['bn','rbn','persistent'])
@pytest.mark.parametrize('frm',
    [nn.BatchNorm2d, RunningBatchNorm2d], ids=['bn','rbn'])
def test_strict_loads_in_all_directions(frm, to):
    a,b = trained(frm(3)),to(3)
    sd = through_file(a.state_dict())
    assert list(sd) == five
    b.load_state_dict(sd, strict=True)
    for k in five:
        assert torch.equal(getattr(a, k), getattr(b, k)), k
    x = batch()
    assert torch.equal(a.eval()(x), b.eval()(x))
    if isinstance(b, RunningBatchNormMixin):
        b.refresh_window() # as the next training forward does
        assert torch.equal(b.window_mean, a.running_mean)
        assert (b.window_count==-1).all()

def test_a_file_with_the_window_restores_it_whatever_the_layers_setting():
    a = trained(RunningBatchNorm2d(3, persistent_window=True))
    sd = through_file(a.state_dict())
    assert list(sd) == five+list(window_buffers)
    b = RunningBatchNorm2d(3)
    b.load_state_dict(sd)
    same_state(a, b)
    assert list(b.state_dict()) == five

def test_missing_or_odd_keys_are_pytorchs_errors():
    sd = RunningBatchNorm2d(3).state_dict()
    def without(sd, key): return {k:v for k,v in sd.items() if k!=key}
    with pytest.raises(RuntimeError, match='Missing key.*running_var'):
        RunningBatchNorm2d(3).load_state_dict(without(sd, 'running_var'))
    with pytest.raises(RuntimeError, match='size mismatch for running_mean'):
        RunningBatchNorm2d(4).load_state_dict(sd)
    odd = {**sd, 'sums':torch.zeros(3)}
    with pytest.raises(RuntimeError, match='Unexpected key.*sums'):
        RunningBatchNorm2d(3).load_state_dict(odd)
    part = without(persistent_norm(3).state_dict(), 'window_var')
    with pytest.raises(RuntimeError, match='Missing key.*window_var'):
        persistent_norm(3).load_state_dict(part)

def sgd(params): return torch.optim.SGD(params, .05, momentum=.9)
def adam(params): return torch.optim.Adam(params, 1e-2)
@pytest.mark.parametrize('opt', [sgd,adam], ids=['sgd','adam'])
def test_resume_is_bit_exact_with_a_persistent_window(opt):
    "50 steps are 25, a file, and 25 more"
    def steps(n, o, data):
        for x,y in data:
            o.zero_grad()
            nn.functional.cross_entropy(n(x), y).backward()
            o.step()
    sizes = torch.randint(1, 5, (50,)).tolist()
    data = [(batch(bs), torch.randint(2, (bs,))) for bs in sizes]
    n = net(persistent_window=True)
    first = deepcopy(n.state_dict())
    o = opt(n.parameters())
    steps(n, o, data)
    half = net(persistent_window=True)
    half.load_state_dict(first)
    oh = opt(half.parameters())
    steps(half, oh, data[:25])
    saved = dict(model=half.state_dict(), opt=oh.state_dict())
    saved = through_file(saved)
    rest = net(persistent_window=True)
    rest.load_state_dict(saved['model'])
    orest = opt(rest.parameters())
    orest.load_state_dict(saved['opt'])
    steps(rest, orest, data[25:])
    same_state(n, rest)
    short = net()
    names = short.state_dict()
    short.load_state_dict({k:saved['model'][k] for k in names})
    # without it that is lost: the test can fail
    assert not torch.equal(short[1].window_grad, half[1].window_grad)

def test_safetensors(tmp_path):
    import safetensors.torch as st
    for persistent in (False,True):
        a = trained(net(persistent_window=persistent), 0)
        b = net(persistent_window=persistent)
        for _ in range(5): a(batch())
        st.save_file(a.state_dict(), tmp_path/'m.safetensors')
        assert not b.load_state_dict(st.load_file(tmp_path/'m.safetensors')).missing_keys
        for k,v in a.state_dict().items():
            assert torch.equal(v, b.state_dict()[k]), k
        path = str(tmp_path/'n.safetensors')
        st.save_model(a, path)
        st.load_model(b, path)

def test_old_statistics_without_a_count_are_a_full_window():
    bn = nn.BatchNorm2d(3)
    bn.running_mean.fill_(2.)
    rbn = RunningBatchNorm2d(3)
    rbn.load_state_dict(bn.state_dict())
    rbn.refresh_window()
    assert (rbn.window_count==-1).all()
    assert (rbn.window_mean==2).all()
    assert rbn.samples_seen.item() > 1e6
    rbn.load_state_dict(nn.BatchNorm2d(3).state_dict())
    rbn.refresh_window()
    assert (rbn.window_count==0).all()
    assert rbn.samples_seen.item() == 0

def test_made_on_meta_then_loaded():
    sd = trained(RunningBatchNorm2d(3)).state_dict()
    with torch.device('meta'):
        a,b = RunningBatchNorm2d(3),RunningBatchNorm2d(3)
    clones = {k:v.clone() for k,v in sd.items()}
    a.load_state_dict(clones, assign=True)
    b.to_empty(device='cpu').load_state_dict(sd)
    x = batch()
    c = RunningBatchNorm2d(3)
    c.load_state_dict(sd)
    want = c(x)
    for l in (a,b): assert torch.equal(l(x), want)

# copies and averages

def through_pickle(l): return pickle.loads(pickle.dumps(l))
def through_torch_save(l): return through_file(l, weights_only=False)
@pytest.mark.parametrize('copy',
    [deepcopy, through_pickle, through_torch_save], ids=['deepcopy','pickle','torch.save'])
def test_copies_after_a_training_forward(copy):
    a = trained(RunningBatchNorm2d(3, window=AdaptiveWindow(9)), 3)
    a(batch().requires_grad_()) # a graph is alive
    b = copy(a)
    same_state(a, b)
    assert not any(o.requires_grad for o in b.buffers())
    assert not b.recent.saved
    x = batch()
    assert torch.equal(a(x), b(x))
    same_state(a, b)
    # they share nothing
    assert not torch.equal(a(batch()), a(batch()))
    assert not torch.equal(a.window_mean, b.window_mean)

@pytest.mark.parametrize('use_buffers', [False,True])
@pytest.mark.parametrize('pretrained', [False,True])
def test_average_of_a_model_stays_sane(use_buffers, pretrained):
    n = net()
    if pretrained:
        n[1].running_mean.fill_(.3)
        n[1].seed_window()
    ema = AveragedModel(n, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=use_buffers)
    for _ in range(60):
        n(batch())
        ema.update_parameters(n)
    for k,b in ema.module.named_buffers():
        assert torch.isfinite(b).all(), k
    x = batch()
    # the weights stood still: only the statistics differ, by the lag of an average
    have,want = ema.eval()(x),n.eval()(x)
    torch.testing.assert_close(have, want, rtol=.2, atol=.2)
    y = ema.train()(x) # and can be trained on
    norm = ema.module[1]
    assert y.isfinite().all()
    assert (norm.window_count>0).all() and (norm.window_var>0).all()

def test_no_growth_over_steps():
    layer = RunningBatchNorm2d(3)
    trained(layer, 20)
    def sizes():
        shapes = {k:v.shape for k,v in vars(layer).items()
            if torch.is_tensor(v)}
        return shapes,len(pickle.dumps(layer))
    before = sizes()
    trained(layer, 200)
    assert sizes() == before

@pytest.mark.parametrize('move',
    [lambda m: m.half(), lambda m: m.bfloat16(),
    lambda m: m.to(torch.bfloat16)],
    ids=['half','bfloat16','to'])
def test_a_half_precision_module_keeps_a_float32_window(move):
    layer = trained(RunningBatchNorm2d(3))
    kept = [k for k in window_buffers if k[:5]!='known']
    want = {k:getattr(layer, k).clone() for k in kept}
    move(layer)
    # narrowed alike: nothing to seed anew
    assert torch.equal(layer.known_mean, layer.running_mean)
    assert torch.equal(layer.known_var, layer.running_var)
    assert layer.running_mean.dtype in (torch.half,torch.bfloat16)
    for k,v in want.items():
        have = getattr(layer, k)
        assert torch.equal(have, v) and have.dtype==v.dtype, k
    x = batch().to(layer.running_mean.dtype)
    assert layer(x).dtype == x.dtype
    assert layer.window_mean.dtype == torch.float32
    layer.double()
    assert layer.window_mean.dtype == torch.float64
    assert layer(batch().double()).dtype == torch.float64
