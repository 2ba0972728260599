"Checkpoints, copies, averages of models and the forms of BatchNorm: what goes in and out of a layer"
import io,pickle
from copy import deepcopy
import pytest,torch
from torch import nn
from torch.optim.swa_utils import AveragedModel,get_ema_multi_avg_fn,update_bn
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d,RunningBatchNormMixin,runbn_settings,window_buffers
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum
from fastai_runbn.surgery import to_bn,to_runbn

five = ['weight','bias','running_mean','running_var','num_batches_tracked']
def batch(bs=2, c=3): return torch.randn(bs,c,5,5)*2+1
def trained(layer, steps=20):
    for _ in range(steps): layer(batch()).sum().backward()
    return layer
def through_file(sd, **kwargs):
    f = io.BytesIO()
    torch.save(sd, f); f.seek(0)
    return torch.load(f, **{'weights_only':True, **kwargs})
def net(**settings): return nn.Sequential(nn.Conv2d(3,4,3), RunningBatchNorm2d(4, **settings), nn.ReLU(), nn.Flatten(), nn.Linear(36,2))
def same_state(a, b):
    for (k,p),q in zip(list(a.named_parameters())+list(a.named_buffers()), list(b.parameters())+list(b.buffers())): assert torch.equal(p, q), k

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
    plain = {k:v for k,v in kw.items() if k in ('affine','eps','dtype')}
    rbn,bn = RunningBatchNorm2d(3, **kw),nn.BatchNorm2d(3, **plain)
    x = batch().to(kw.get('dtype', torch.float32))
    x[:,0] *= .01                                                       # far below the clamp, which is for training only
    for _ in range(3): rbn(x)
    assert {k:(v.dtype,v.shape) for k,v in rbn.state_dict().items()} == {k:(v.dtype,v.shape) for k,v in bn.state_dict().items()}
    bn.load_state_dict(rbn.state_dict())
    assert torch.equal(rbn.eval()(x), bn.eval()(x)) and rbn(x).dtype == x.dtype

def test_bias_none():
    try: rbn = RunningBatchNorm2d(3, bias=False)
    except TypeError: pytest.skip("this PyTorch's BatchNorm has no `bias=`")
    assert rbn.bias is None and rbn.weight is not None
    x = batch().requires_grad_()
    rbn(x).pow(2).sum().backward()
    assert x.grad.isfinite().all() and rbn.weight.grad is not None
    assert type(to_bn(to_runbn(nn.BatchNorm2d(3, bias=False)))) is nn.BatchNorm2d

def test_momentum_none_is_the_mean_of_all_batches_as_in_batch_norm():
    rbn,bn = RunningBatchNorm2d(3, momentum=None, clamp=None, dtype=torch.float64),nn.BatchNorm2d(3, momentum=None, dtype=torch.float64)
    xs = [batch().double() for _ in range(7)]
    for x in xs: rbn(x); bn(x)
    torch.testing.assert_close(rbn.running_mean, bn.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rbn.running_var, bn.running_var, rtol=1e-12, atol=1e-12)

def test_update_bn_recomputes_them():
    n = net()
    for _ in range(5): n(batch())
    xs = [batch(8) for _ in range(4)]
    update_bn(xs, n)
    assert isinstance(n[1].momentum, AutoMomentum) and n[1].num_batches_tracked.item() == 4
    torch.testing.assert_close(n[1].running_mean, n[0](torch.cat(xs)).mean((0,2,3)))

@pytest.mark.parametrize('cls,shape,said', [(RunningBatchNorm1d,(2,3,4,4),'expected 2D or 3D input (got 4D input)'), (RunningBatchNorm2d,(2,3),'expected 4D input (got 2D input)'),
                                           (RunningBatchNorm3d,(2,3,4,4),'expected 5D input (got 4D input)')])
def test_wrong_rank_is_batch_norms_error(cls, shape, said):
    for training in (True,False):
        with pytest.raises(ValueError) as e: cls(3).train(training)(torch.randn(shape))
        assert str(e.value) == said

def test_wrong_channels_are_an_error():
    for c in (1,4):
        with pytest.raises(RuntimeError, match=f'3 channels got {c}'): RunningBatchNorm2d(3)(batch(c=c))

def test_no_tracking_is_an_error():
    with pytest.raises(ValueError, match='a running norm has to track'): RunningBatchNorm2d(3, track_running_stats=False)

def test_positional_arguments_are_batch_norms():
    rbn = RunningBatchNorm2d(3, 1e-3, .2, False, True, torch.device('meta'), torch.float64)
    assert (rbn.eps, rbn.momentum, rbn.affine, rbn.running_mean.is_meta, rbn.window_mean.is_meta, rbn.window_mean.dtype) == (1e-3,.2,False,True,True,torch.float64)

def test_repr_tells_every_setting():
    settings = dict(window=AdaptiveWindow(30), momentum=.03, running_grad=.25, eval_window=77, clamp=[.3,.2], clamp_inclusive=True, persistent_window=True, backend='formulas')
    assert settings.keys() == runbn_settings().keys()
    text = repr(RunningBatchNorm2d(3, **settings))
    for part in ('window=AdaptiveWindow(30)','momentum=0.03','running_grad=0.25','eval_window=77','clamp=0.3 to 0.2 in 2 samples','clamp_inclusive=True','persistent_window=True'): assert part in text

# files

@pytest.mark.parametrize('to', [nn.BatchNorm2d, RunningBatchNorm2d, lambda c: RunningBatchNorm2d(c, persistent_window=True)], ids=['bn','rbn','persistent'])
@pytest.mark.parametrize('frm', [nn.BatchNorm2d, RunningBatchNorm2d], ids=['bn','rbn'])
def test_strict_loads_in_all_directions(frm, to):
    a,b = trained(frm(3)),to(3)
    sd = through_file(a.state_dict())
    assert list(sd) == five
    b.load_state_dict(sd, strict=True)
    for k in five: assert torch.equal(getattr(a, k), getattr(b, k)), k
    x = batch()
    assert torch.equal(a.eval()(x), b.eval()(x))
    if isinstance(b, RunningBatchNormMixin):
        b.refresh_window()                                              # as the next training forward does
        assert torch.equal(b.window_mean, a.running_mean) and (b.window_count==-1).all()

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
    with pytest.raises(RuntimeError, match='Missing key.*running_var'): RunningBatchNorm2d(3).load_state_dict({k:v for k,v in sd.items() if k!='running_var'})
    with pytest.raises(RuntimeError, match='size mismatch for running_mean'): RunningBatchNorm2d(4).load_state_dict(sd)
    with pytest.raises(RuntimeError, match='Unexpected key.*sums'): RunningBatchNorm2d(3).load_state_dict({**sd, 'sums':torch.zeros(3)})
    part = {k:v for k,v in RunningBatchNorm2d(3, persistent_window=True).state_dict().items() if k!='window_var'}
    with pytest.raises(RuntimeError, match='Missing key.*window_var'): RunningBatchNorm2d(3, persistent_window=True).load_state_dict(part)

@pytest.mark.parametrize('opt', [lambda ps: torch.optim.SGD(ps, .05, momentum=.9), lambda ps: torch.optim.Adam(ps, 1e-2)], ids=['sgd','adam'])
def test_resume_is_bit_exact_with_a_persistent_window(opt):
    "50 steps are 25, a file, and 25 more"
    def steps(n, o, data):
        for x,y in data: o.zero_grad(); nn.functional.cross_entropy(n(x), y).backward(); o.step()
    data = [(batch(bs), torch.randint(2, (bs,))) for bs in torch.randint(1, 5, (50,)).tolist()]
    n = net(persistent_window=True)
    first = deepcopy(n.state_dict())
    o = opt(n.parameters())
    steps(n, o, data)
    half = net(persistent_window=True); half.load_state_dict(first)
    oh = opt(half.parameters())
    steps(half, oh, data[:25])
    saved = through_file(dict(model=half.state_dict(), opt=oh.state_dict()))
    rest = net(persistent_window=True); rest.load_state_dict(saved['model'])
    orest = opt(rest.parameters()); orest.load_state_dict(saved['opt'])
    steps(rest, orest, data[25:])
    same_state(n, rest)
    short = net(); short.load_state_dict({k:v for k,v in saved['model'].items() if k in net().state_dict()})
    assert not torch.equal(short[1].window_grad, half[1].window_grad)   # without it that is lost: the test can fail

def test_safetensors(tmp_path):
    import safetensors.torch as st
    for persistent in (False,True):
        a,b = trained(net(persistent_window=persistent), 0),net(persistent_window=persistent)
        for _ in range(5): a(batch())
        st.save_file(a.state_dict(), tmp_path/'m.safetensors')
        assert not b.load_state_dict(st.load_file(tmp_path/'m.safetensors')).missing_keys
        for k,v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k
        st.save_model(a, str(tmp_path/'n.safetensors')); st.load_model(b, str(tmp_path/'n.safetensors'))

def test_old_statistics_without_a_count_are_a_full_window():
    bn = nn.BatchNorm2d(3)
    bn.running_mean.fill_(2.)
    rbn = RunningBatchNorm2d(3)
    rbn.load_state_dict(bn.state_dict()); rbn.refresh_window()
    assert (rbn.window_count==-1).all() and (rbn.window_mean==2).all() and rbn.samples_seen.item() > 1e6
    rbn.load_state_dict(nn.BatchNorm2d(3).state_dict()); rbn.refresh_window()
    assert (rbn.window_count==0).all() and rbn.samples_seen.item() == 0

def test_made_on_meta_then_loaded():
    sd = trained(RunningBatchNorm2d(3)).state_dict()
    with torch.device('meta'): a,b = RunningBatchNorm2d(3),RunningBatchNorm2d(3)
    a.load_state_dict({k:v.clone() for k,v in sd.items()}, assign=True)
    b.to_empty(device='cpu').load_state_dict(sd)
    x = batch()
    c = RunningBatchNorm2d(3); c.load_state_dict(sd)
    want = c(x)
    for l in (a,b): assert torch.equal(l(x), want)

# copies and averages

@pytest.mark.parametrize('copy', [deepcopy, lambda l: pickle.loads(pickle.dumps(l)), lambda l: through_file(l, weights_only=False)], ids=['deepcopy','pickle','torch.save'])
def test_copies_after_a_training_forward(copy):
    a = trained(RunningBatchNorm2d(3, window=AdaptiveWindow(9)), 3)
    a(batch().requires_grad_())                                         # a graph is alive
    b = copy(a)
    same_state(a, b)
    assert not any(o.requires_grad for o in b.buffers()) and not b.recent.saved
    x = batch()
    assert torch.equal(a(x), b(x))
    same_state(a, b)
    assert not torch.equal(a(batch()), a(batch())) and not torch.equal(a.window_mean, b.window_mean) # they share nothing

@pytest.mark.parametrize('use_buffers', [False,True])
@pytest.mark.parametrize('pretrained', [False,True])
def test_average_of_a_model_stays_sane(use_buffers, pretrained):
    n = net()
    if pretrained: n[1].running_mean.fill_(.3); n[1].seed_window()
    ema = AveragedModel(n, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=use_buffers)
    for _ in range(60): n(batch()); ema.update_parameters(n)
    for k,b in ema.module.named_buffers(): assert torch.isfinite(b).all(), k
    x = batch()
    torch.testing.assert_close(ema.eval()(x), n.eval()(x), rtol=.2, atol=.2) # the weights stood still: only the statistics differ, by the lag of an average
    y = ema.train()(x)                                                   # and can be trained on
    assert y.isfinite().all() and (ema.module[1].window_count>0).all() and (ema.module[1].window_var>0).all()

def test_no_growth_over_steps():
    layer = RunningBatchNorm2d(3)
    trained(layer, 20)
    before = {k:v.shape for k,v in vars(layer).items() if torch.is_tensor(v)},len(pickle.dumps(layer))
    trained(layer, 200)
    assert ({k:v.shape for k,v in vars(layer).items() if torch.is_tensor(v)},len(pickle.dumps(layer))) == before

@pytest.mark.parametrize('move', [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)], ids=['half','bfloat16','to'])
def test_a_half_precision_module_keeps_a_float32_window(move):
    layer = trained(RunningBatchNorm2d(3))
    want = {k:getattr(layer, k).clone() for k in window_buffers if k[:5]!='known'}
    move(layer)
    assert torch.equal(layer.known_mean, layer.running_mean) and torch.equal(layer.known_var, layer.running_var) # narrowed alike: nothing to seed anew
    assert layer.running_mean.dtype in (torch.half,torch.bfloat16)
    for k,v in want.items(): assert torch.equal(getattr(layer, k), v) and getattr(layer, k).dtype==v.dtype, k
    x = batch().to(layer.running_mean.dtype)
    assert layer(x).dtype == x.dtype and layer.window_mean.dtype == torch.float32
    layer.double()
    assert layer.window_mean.dtype == torch.float64 and layer(batch().double()).dtype == torch.float64
