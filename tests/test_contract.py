"""A running norm under code that was written for BatchNorm: whatever that lets one do is honoured,
with BatchNorm's meaning, or is an error that names the remedy"""
import io,pickle,shutil,subprocess,sys,warnings
from copy import deepcopy
from inspect import signature
import pytest,timm,torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel,get_ema_multi_avg_fn,update_bn
from torch.testing import assert_close
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d
from timm.layers.norm_act import BatchNormAct2d,SyncBatchNormAct
from fastai.basics import Callback,CancelStepException,CrossEntropyLossFlat,DataLoaders,Learner,SGD
from fastai.layers import BatchNorm1dFlat
from fastai_runbn import peers,twins
from fastai_runbn import all as public
from fastai_runbn.all import FilterMeans,RunBNCallback,RunBNInterpretation
from fastai_runbn.all import RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d
from fastai_runbn.all import follow_scaler,set_batch_size,surgery_report,to_bn,to_runbn
from impls import backends
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum

parametrize = pytest.mark.parametrize
averages = 'running_mean','running_var'
statistics = *averages,'num_batches_tracked'

def norm(): return RunningBatchNorm2d(3, dtype=torch.float64)
def batch_norm(**kw): return nn.BatchNorm2d(3, **kw).double()
def batch(bs=2, c=3, size=6):
    "Activations with a mean of 1 and a deviation of 2"
    return torch.randn(bs, c, size, size, dtype=torch.float64)*2+1
def mean_of(x): return x.mean((0,2,3)) # of each channel
def var_of(x, **kw):
    return x.var((0,2,3), **kw)
def trained(m, steps=30, c=3):
    "`m` itself, after some steps"
    for _ in range(steps):
        loss = m(batch(c=c)).pow(3).mean()
        loss.backward()
    return m

def conv_norm_relu(ni, nf, **kw):
    return [nn.Conv2d(ni, nf, 3, **kw), nn.BatchNorm2d(nf), nn.ReLU()]
def net():
    "With two norms; always of the same weights"
    torch.manual_seed(0)
    blocks = conv_norm_relu(3, 6, bias=False)+conv_norm_relu(6, 6)
    head = nn.AdaptiveAvgPool2d(1),nn.Flatten(),nn.Linear(6,2)
    return nn.Sequential(*blocks, *head).double()

def norms(m):
    return [o for o in m.modules() if isinstance(o, _BatchNorm)]
def clones(named): return {k:t.clone() for k,t in named}
def state(m): return clones(m.named_buffers())
def leaf(x):
    "The same values, with a gradient of their own"
    return x.detach().clone().requires_grad_()
def same(a, b, tol=1e-12):
    assert_close(a, b, rtol=tol, atol=tol)
def unchanged(m, before):
    "Are all buffers as they were?"
    changed = [k for k,b in m.named_buffers() if not torch.equal(b, before[k])]
    return changed==[]
def pickled(m): return pickle.loads(pickle.dumps(m))
def name_of(f): return f.__name__
def float_net(): return to_runbn(net()).float()

# calls

@parametrize('ours,theirs', [
    (RunningBatchNorm1d,nn.BatchNorm1d), (RunningBatchNorm2d,nn.BatchNorm2d),
    (RunningBatchNorm3d,nn.BatchNorm3d), (twins.RunningBatchNormAct2d,BatchNormAct2d),
    (twins.RunningSyncBatchNormAct,SyncBatchNormAct),
    (twins.RunningBatchNorm1dFlat,BatchNorm1dFlat),
    (peers.BatchRenorm2d,nn.BatchNorm2d), (peers.MABN2d,nn.BatchNorm2d),
    (peers.CenConv2d,nn.Conv2d)], ids=lambda cls: cls.__name__)
def test_the_input_has_the_name_that_it_has_there(ours, theirs):
    names = [[*signature(cls.forward).parameters] for cls in (ours,theirs)]
    assert names[0]==names[1]

def test_an_input_can_be_given_by_name():
    x = batch()
    assert torch.equal(norm()(input=x), norm()(x))

# momentum

def test_momentum_is_a_number_to_those_who_read_it():
    m = norm()
    assert isinstance(m.momentum, float) and m.momentum==.1
    assert isinstance(m.momentum, AutoMomentum) and 'momentum=auto' in repr(m)
    for c in (deepcopy(m),pickled(m)):
        assert isinstance(c.momentum, AutoMomentum)

@parametrize('momentum', [.05,.3,1,1.,None], ids=str)
def test_momentum_that_is_set_is_batch_norms(momentum):
    "Before, during and after training: the weight of a batch in running_mean and running_var"
    m,bn = norm(),batch_norm()
    for steps in (0,7):
        trained(m, steps)
        m.momentum = bn.momentum = momentum
        bn.load_state_dict(m.state_dict())
        for _ in range(4):
            x = batch(16)
            m(x); bn(x)
            same(m.running_mean, bn.running_mean)
            same(m.running_var, bn.running_var)

def test_momentum_1_leaves_the_statistics_of_the_batch():
    m = trained(RunningBatchNorm2d(3, window=60, dtype=torch.float64))
    window = m.window_mean.clone()
    m.momentum = 1.
    m(x := batch(8))
    same(m.running_mean, mean_of(x))
    same(m.running_var, var_of(x))
    moved = (m.window_mean-window).abs().max() # the window goes its own way
    assert moved < .5*(m.running_mean-window).abs().max()

def test_momentum_goes_along_to_bn():
    m = to_runbn(nn.Sequential(nn.BatchNorm2d(3, momentum=.03),
        nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3)))
    m[2].momentum = .2
    assert [o.momentum for o in to_bn(m)] == [.03,None,.2]

def test_momentum_scaled_as_schedulers_do():
    m,bn = norm(),batch_norm()
    for o in (m,bn): o.momentum *= .5 # a float from now on
    x = batch()
    m(x); bn(x)
    same(m.running_mean, bn.running_mean)

def test_update_bn_puts_back_what_was():
    "And leaves the mean over the batches that it was given"
    m = trained(norm())
    model = nn.Sequential(m)
    xs = [batch(4) for _ in range(5)]
    update_bn(xs, model)
    assert isinstance(m.momentum, AutoMomentum)
    means = torch.stack([mean_of(x) for x in xs])
    same(m.running_mean, means.mean(0))

def test_num_batches_tracked_set_to_0_begins_a_cumulative_average_anew():
    m,bn = trained(norm()),batch_norm(momentum=None)
    m.momentum = None
    bn.load_state_dict(m.state_dict())
    for n in (0,3):
        for o in (m,bn): o.num_batches_tracked.fill_(n)
        for _ in range(3):
            x = batch()
            m(x); bn(x)
            same(m.running_mean, bn.running_mean)
            same(m.running_var, bn.running_var)
            assert m.num_batches_tracked==bn.num_batches_tracked

def test_precise_statistics():
    """fvcore's update_bn_stats: momentum 1, and the mean over batches of what is in running_mean
    after each"""
    m = trained(norm())
    m.momentum = 1.
    xs = [batch(4) for _ in range(6)]
    means = []
    for x in xs:
        m(x)
        means.append(m.running_mean.clone())
    m.running_mean = torch.stack(means).mean(0)
    m.momentum = .1
    same(m.running_mean, mean_of(torch.cat(xs)))
    m(batch())
    assert (m.window_count>0).all()

# held

def hold_momentum(m): m.momentum = 0
def hold_momentum_float(m): m.momentum = 0.
def hold_tracking(m): m.track_running_stats = False
def hold_eval(m): m.eval()
@parametrize('hold', [hold_momentum,hold_momentum_float,hold_tracking,hold_eval])
def test_held_layers_stay(hold):
    """Statistics, window, counters and running gradient, with gradients and without, in a second
    pass as SAM has it"""
    m = trained(norm())
    before = state(m)
    kept = m.momentum,m.track_running_stats
    hold(m)
    for _ in range(3):
        m(batch().requires_grad_()).pow(3).sum().backward()
    with torch.no_grad(): m(batch())
    assert unchanged(m, before)
    m.momentum,m.track_running_stats = kept
    m.train()(batch())
    assert not unchanged(m, before) and m.num_batches_tracked==31

@parametrize('hold', [hold_momentum,hold_tracking])
def test_a_held_output_and_gradient_are_what_they_would_be(hold):
    m = trained(norm())
    held = deepcopy(m)
    hold(held)
    x = batch().requires_grad_()
    z = leaf(x)
    y_held,y = held(x),m(z)
    same(y_held, y)
    for o in (y_held,y): (o**3).sum().backward()
    same(x.grad, z.grad)

@parametrize('hold', [hold_momentum,hold_tracking])
def test_held_from_the_first_batch_on(hold):
    "Normalised with the batch; the window stays empty"
    m = norm()
    hold(m)
    x = batch()
    want = nn.functional.batch_norm(x, None, None, training=True)
    same(m(x), want)
    assert m.num_batches_tracked==0 and (m.window_count==0).all()

def test_statistics_taken_away():
    "TENT: normalised with the batch, in training and in evaluation, as BatchNorm is"
    m,bn = trained(norm()),batch_norm()
    for o in (m,bn):
        o.track_running_stats = False
        o.running_mean = o.running_var = None
    x = batch(8)
    same(m(x), bn(x))
    same(m.eval()(x), bn.eval()(x))
    model = nn.Sequential(m)
    model.state_dict()
    deepcopy(model)
    pickle.dumps(model)
    model.float()
    assert surgery_report(model).running
    m.reset_running_stats()
    assert type(to_bn(model)[0]) is nn.BatchNorm2d
    assert model[0].running_mean is None

def test_a_layer_without_statistics_cannot_be_made():
    with pytest.raises(ValueError, match='has to track'):
        RunningBatchNorm2d(3, track_running_stats=False)

others = dict(eps=.5, affine=False, num_features=3,
    training=False, weight=None, bias=None)
@parametrize('name,value', others.items())
def test_other_attributes_are_batch_norms(name, value):
    m,bn = trained(norm()),batch_norm()
    for o in (m,bn): setattr(o, name, value)
    x = batch()
    with torch.no_grad(): y = m(x)
    for k in averages: setattr(bn, k, getattr(m, k).clone())
    same(m.eval()(x), bn.eval()(x))
    if name=='eps':
        scale = m.window_var+.5
        same(var_of(y, correction=0)*scale, var_of(x, correction=0))

def test_parameters_frozen_and_thawed():
    m = trained(norm())
    m.requires_grad_(False)
    before = state(m)
    m(batch())
    assert not unchanged(m, before) # as BatchNorm's statistics
    x = batch().requires_grad_()
    m(x).sum().backward()
    assert m.weight.grad is not None
    assert x.grad.isfinite().all()

# freezing and converters

def kinds(model, letters):
    "First letters of its norms' classes"
    return {type(m).__name__[:letters] for m in norms(model)}

@parametrize('arch', ['resnet18','lcnet_035'])
def test_timm_freezes_and_thaws(arch):
    model = timm.create_model(arch, num_classes=3)
    model = to_runbn(model, eval_window=77).double()
    x = torch.randn(2,3,32,32).double()
    for _ in range(3): model(x)
    n = len(norms(model))
    want = model.eval()(x)
    timm.layers.freeze_batch_norm_2d(model)
    assert not norms(model)
    same(model.train().eval()(x), want, 1e-6)
    model.train()
    timm.layers.unfreeze_batch_norm_2d(model)
    assert kinds(model, 7)=={'Running'} and len(norms(model))==n
    assert {m.eval_window for m in norms(model)}=={77}
    same(model.eval()(x), want, 1e-6)
    model.train()(x).sum().backward()
    for m in norms(model):
        assert (m.window_count>0).all() and m.skipped_batches==0
    assert kinds(to_bn(model), 9)=={'BatchNorm'}

def test_torchvisions_frozen_norm_stays_one():
    model = to_runbn(net())
    frozen = FrozenBatchNorm2d(6)
    model[1] = frozen
    assert model[1] is frozen

converters = [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm]
def timm_net(): return timm.create_model('lcnet_035', num_classes=3)
@parametrize('convert', converters, ids=['torch','timm'])
@parametrize('make', [net,timm_net], ids=['plain','timm'])
def test_converters_to_sync_batch_norm_keep_running_norms(convert, make):
    model = to_runbn(make())
    before = list(model.modules())
    with pytest.warns(UserWarning, match='stays: .*sync_window.*to_bn'):
        assert convert(model) is model
    assert list(model.modules())==before

def test_lightnings_sync_batchnorm():
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
    model = to_runbn(net())
    with pytest.warns(UserWarning, match='sync_window'): TorchSyncBatchNorm().apply(model)
    assert {type(m) for m in norms(model)}=={RunningBatchNorm2d}

def test_a_norm_of_the_users_own_takes_the_place():
    model = to_runbn(net())
    own = [nn.SyncBatchNorm(6), nn.BatchNorm2d(6),
        nn.GroupNorm(2,6), nn.Identity()]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for new in own:
            model[1] = new
            assert model[1] is new

# tools

def test_fx_traces_it_as_one_module():
    model = to_runbn(net())
    for _ in range(5): model(batch())
    traced = torch.fx.symbolic_trace(model)
    called = [n.target for n in traced.graph.nodes if n.op=='call_module']
    def is_norm(name): return 'Norm' in type(traced.get_submodule(name)).__name__
    assert [o for o in called if is_norm(o)]==['1','4']
    x = batch()
    same(traced.eval()(x), model.eval()(x))
    traced.train()(batch()).sum().backward()
    assert model[1].num_batches_tracked==6

def timm_norm(**kw):
    "timm's layer of a norm and SiLU, in a model"
    return nn.Sequential(timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU, **kw))

@parametrize('act', [False,True])
def test_fx_of_timms_layer_activates_once(act):
    model = to_runbn(timm_norm(apply_act=act)).double()
    traced = torch.fx.symbolic_trace(model).eval()
    x = batch()
    same(traced(x), model.eval()(x))

def test_feature_extractor():
    model = to_runbn(resnet18(num_classes=3))
    f = create_feature_extractor(model, {'layer1.0.bn1':'norm', 'layer2':'map'})
    x = torch.randn(2,3,32,32)
    out = f.train()(x)
    assert out['norm'].shape==(2,64,8,8)
    assert out['map'].shape==(2,128,4,4)
    assert f.get_submodule('layer1.0.bn1').num_batches_tracked==1
    stem = model.conv1,model.bn1,model.relu,model.maxpool
    start = nn.Sequential(*stem, model.layer1, model.layer2)
    assert_close(f.eval()(x)['map'], start.eval()(x))

def test_jit_trace_in_evaluation():
    model = to_runbn(net()).eval()
    x = batch()
    traced = torch.jit.trace(model, x)
    same(traced(x), model(x))

# state in every way

def two_norms():
    conv = nn.Conv2d(3,3,3).double()
    return nn.Sequential(norm(), conv, norm())
def teacher():
    "`two_norms`, trained; always the same"
    torch.manual_seed(3)
    m = two_norms()
    for _ in range(60): m(batch()+5)
    return m

def pairs_of_norms(a, b):
    return zip(norms(a), norms(b))
def copy_in_place(src, dst):
    with torch.no_grad():
        for k,v in dst.state_dict().items():
            v.copy_(src.state_dict()[k])
def copy_data(src, dst):
    for a,b in zip(dst.buffers(), src.buffers()):
        if a.shape==b.shape: a.data.copy_(b.data)
    for a,b in zip(dst.parameters(), src.parameters()):
        a.data.copy_(b.data)
def copy_data_of_running_statistics(src, dst):
    for a,b in pairs_of_norms(dst, src):
        for k in statistics:
            getattr(a, k).data.copy_(getattr(b, k))
def new_buffers(src, dst):
    for a,b in pairs_of_norms(dst, src):
        for k in statistics: setattr(a, k, getattr(b, k).clone())
def data_assigned(src, dst):
    for a,b in pairs_of_norms(dst, src):
        for k in statistics:
            getattr(a, k).data = getattr(b, k).clone()
def swapped(src, dst):
    for a,b in pairs_of_norms(deepcopy(src), dst):
        for k in statistics:
            torch.utils.swap_tensors(getattr(a, k), getattr(b, k))
def load(src, dst): dst.load_state_dict(src.state_dict())
def load_assign(src, dst):
    dst.load_state_dict(clones(src.state_dict().items()), assign=True)
def load_pieces(src, dst):
    for a,b in pairs_of_norms(dst, src): a.load_state_dict(b.state_dict())
def load_batch_norms(src, dst):
    plain = to_bn(deepcopy(src))
    dst.load_state_dict(plain.state_dict())
def through_numpy(src, dst):
    for a,b in pairs_of_norms(dst, src):
        for k in averages:
            getattr(a, k).numpy()[:] = getattr(b, k).numpy()
ways = [copy_in_place,copy_data,copy_data_of_running_statistics,
    new_buffers,data_assigned,swapped,load,load_assign,load_pieces,
    load_batch_norms,through_numpy]

@parametrize('used', [False,True], ids=['fresh','trained'])
@parametrize('way', ways, ids=name_of)
def test_the_window_follows(way, used):
    """In the next training forward: full of what came, the batch merged in; and evaluation is the
    source's but for one batch"""
    src,dst = teacher(),two_norms()
    if used:
        for _ in range(9):
            dst(batch()-3).sum().backward()
    way(src, dst)
    mean = src[0].running_mean.clone()
    x = batch(1)+5
    y = dst.train()(x)
    away = mean_of(x)-mean
    rho = 1/dst[0].window.samples # the longest, as for trained statistics
    if way is copy_data: assert dst[0].window_count.min()>0 # the window came too
    else: same(dst[0].window_mean, mean+rho*away)
    assert y.isfinite().all()
    moved = dst[0].running_mean-mean
    assert moved.abs().max() < .35*away.abs().max()

@parametrize('back', [copy_in_place,load,new_buffers], ids=name_of)
def test_averages_swapped_in_and_out_leave_no_trace(back):
    a = teacher()
    b = deepcopy(a)
    ema = AveragedModel(a, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True)
    for _ in range(5):
        x = batch()
        a(x); b(x)
        ema.update_parameters(a)
    backup = deepcopy(a)
    back(ema.module, a)
    a.eval()(batch())
    a.train()
    back(backup, a)
    for _ in range(3):
        x = batch()
        same(a(x), b(x))
    want = dict(b.named_buffers())
    for k,v in a.named_buffers(): same(v, want[k])

def test_an_average_trains_on():
    a = teacher()
    ema = AveragedModel(a, multi_avg_fn=get_ema_multi_avg_fn(.5), use_buffers=True)
    for _ in range(9):
        a(batch()+5)
        ema.update_parameters(a)
    count = ema.module[0].window_count.clone()
    ema.module.train()(batch()+5)
    assert (ema.module[0].window_count>0).all()
    assert (count>0).all() # not taken for a state from outside

def rubbish(t):
    "What nobody has filled, on the CPU"
    value = float('nan') if t.is_floating_point() else 77
    return torch.full_like(t, value, device='cpu')

@parametrize('fill', ['assign','to_empty','setattr','empty windows'])
def test_made_on_the_meta_device(fill):
    "As from_pretrained does it; memory that nobody has filled is full of NaN here"
    sd = clones(teacher().state_dict().items())
    with torch.device('meta'):
        conv = nn.Conv2d(3,3,3, dtype=torch.float64)
        m = nn.Sequential(norm(), conv, norm())
    if fill=='assign': m.load_state_dict(sd, assign=True)
    elif fill=='to_empty':
        m._apply(rubbish)
        # at once, where code may be compiled that cannot look
        assert torch.equal(m[0].clamp_floor, norm().clamp_floor)
        assert (m[0].window_grad==0).all()
        m.load_state_dict(sd)
    else:
        for name,sub in m.named_modules():
            for k in [*sub._parameters,*sub._buffers]:
                full = f'{name}.{k}'
                if full in sd:
                    new = sd[full].clone()
                    if k in sub._parameters: new = nn.Parameter(new)
                    setattr(sub, k, new)
                elif fill=='empty windows':
                    sub._buffers[k] = rubbish(sub._buffers[k])
    src = teacher()
    want = deepcopy(src)
    for o in norms(want): o.seed_window()
    x = batch()+5
    same(m(x), want(x))
    for _ in range(3):
        m(batch()+5).sum().backward()
    assert all(b.isfinite().all() for b in m.buffers())
    assert m[0].samples_seen>2**39

def test_to_empty_and_reset_parameters():
    "Make a layer like a new one"
    with torch.device('meta'): m = norm()
    m.to_empty(device='cpu').reset_parameters()
    x = batch()
    same(m(x), norm()(x))

def saved(m):
    "Through torch.save and torch.load"
    f = io.BytesIO()
    torch.save(m, f)
    return torch.load(io.BytesIO(f.getvalue()), weights_only=False)
@parametrize('copy', [deepcopy,pickled,saved], ids=['deepcopy','pickle','torch.save'])
def test_copies_go_on_as_the_original(copy):
    a = teacher()
    b = copy(a)
    for _ in range(3):
        x = batch()
        assert torch.equal(a(x), b(x))
    assert unchanged(a, state(b))

def test_pruned_channels():
    "Taken out of parameters and statistics; the window goes along"
    m = trained(norm())
    keep = torch.tensor([0,2])
    m.num_features = 2
    for k in averages: setattr(m, k, getattr(m, k)[keep])
    for k in ('weight','bias'):
        kept = getattr(m, k)[keep].detach()
        setattr(m, k, nn.Parameter(kept))
    mean = m.running_mean.clone()
    m(batch(c=2))
    assert m.window_mean.shape==(2,)
    assert (m.window_mean-mean).abs().max()<.2

moves = dict(half=lambda m: m.half(),
    bfloat16=lambda m: m.to(torch.bfloat16), float=lambda m: m.float())
@parametrize('move', moves.values(), ids=moves)
def test_a_change_of_type_is_not_a_change_of_state(move):
    m = trained(norm())
    move(m)
    before = m.window_mean.clone()
    m.refresh_window()
    assert torch.equal(m.window_mean, before)
    assert (m.window_count>0).all()

def test_reset_running_stats_forgets_all():
    m = trained(norm())
    m.reset_running_stats()
    x = batch()
    same(m(x), norm()(x))

# samples

def test_rows_of_points():
    "One cloud a batch, its points as rows or as positions: alike, with a word; and as told"
    def window_mean(shape, told=None):
        "After 100 clouds in that shape"
        torch.manual_seed(0)
        m = set_batch_size(RunningBatchNorm1d(4), told)
        for _ in range(100):
            cloud = torch.randn(2000,4)+torch.randn(1,4)
            m(shape(cloud))
        return m.window_mean
    def rows(cloud): return cloud
    def positions(cloud): return cloud.T[None]
    with pytest.warns(UserWarning, match='2000 rows.*set_batch_size'): mean = window_mean(rows)
    for other in (window_mean(positions),window_mean(rows, 1)):
        assert_close(mean, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(window_mean(rows, 2000), mean, atol=.05)

def test_few_rows_are_samples_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        m = RunningBatchNorm1d(4)
        m(torch.randn(256,4))
    assert m.samples_seen==256

def test_more_samples_than_rows_are_no_more_than_rows():
    m = set_batch_size(RunningBatchNorm2d(3), 8)
    m(torch.randn(2,3,4,4))
    assert m.samples_seen==2

def test_set_batch_size_is_checked():
    for n in (0,-1,.5,'two'):
        with pytest.raises(ValueError, match='set_batch_size'):
            set_batch_size(RunningBatchNorm2d(3), n)

class Points(nn.Module):
    "A net over the points of clouds, `(B,P,3)`, with points as rows inside"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3,8)
        self.bn = nn.BatchNorm1d(8)
        self.head = nn.Linear(8,2)
    def forward(self, x):
        rows = self.lin(x).flatten(0,1)
        rows = self.bn(rows).relu()
        clouds = rows.view(*x.shape[:2],-1)
        return self.head(clouds.amax(1))

def learner(model, xs, ys, bs, *cbs):
    "One that takes `xs` in their order and shows nothing"
    from torch.utils.data import DataLoader,TensorDataset
    ds = TensorDataset(xs, ys)
    train,valid = DataLoader(ds, batch_size=bs),DataLoader(ds, batch_size=4)
    dls = DataLoaders(train, valid, device='cpu')
    loss = CrossEntropyLossFlat()
    learn = Learner(dls, model, loss_func=loss, opt_func=SGD, cbs=cbs)
    def is_progress(cb): return type(cb).__name__=='ProgressCallback'
    learn.remove_cbs(learn.cbs.filter(is_progress))
    learn.logger = lambda *a: None
    return learn

def test_the_callback_tells_how_many_samples_a_batch_has():
    model = Points()
    clouds,labels = torch.randn(9,300,3),torch.arange(9)%2
    learn = learner(model, clouds, labels, 2, RunBNCallback())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, .01)
    m = learn.model.bn
    assert m.samples_seen==9 and m.last_batch==(300,1,300)
    assert m.batch_size is None
    row = learn.run_bn.report.running[0]
    assert (row.points,row.samples)==(300,1)
    assert '300 rows, counted as 1 sample' in str(learn.run_bn.report)
    assert RunBNInterpretation(learn.model, bs=2).suggestions()==[]

class Clouds(nn.Module):
    "A net over the points of clouds, `(B,3,P)`, that are rows to its norm, or positions"
    def __init__(self, rows):
        super().__init__()
        self.rows = rows
        self.conv = nn.Conv1d(3,16,1)
        self.bn = nn.BatchNorm1d(16)
        self.head = nn.Linear(16,3)
    def norm(self, h):
        if not self.rows: return self.bn(h)
        rows = self.bn(h.transpose(1,2).flatten(0,1))
        return rows.view(len(h),-1,16).transpose(1,2)
    def forward(self, x):
        h = self.norm(self.conv(x))
        return self.head(h.relu().mean(2))

def test_a_point_net_with_one_cloud_a_batch():
    """Clouds that differ in their size: BatchNorm, with one a batch, gives them all the same; and
    points as rows are no other net than points as positions"""
    def accuracy(*cbs, rows=True):
        torch.manual_seed(0)
        y = torch.randint(3, (400,))
        sizes = torch.tensor([.6,1.,1.6])[y]
        model = Clouds(rows)
        xs = torch.randn(400,3,200)*sizes[:,None,None]
        learn = learner(model, xs, y, 1, *cbs)
        learn.fit(4, .02)
        found = learn.model.eval()(xs).argmax(1)
        return (found==y).float().mean().item()
    rows = accuracy(RunBNCallback())
    positions = accuracy(RunBNCallback(), rows=False)
    assert rows>.8 and abs(rows-positions)<.03
    assert accuracy()<.6

def test_the_table_has_the_share_that_is():
    "Of a batch in the window; and says where rows were taken for one sample"
    m = to_runbn(nn.Sequential(nn.BatchNorm1d(4)))
    for _ in range(300): m(torch.randn(256,4))
    seen = RunBNInterpretation(m, bs=1)
    assert seen.table().rho.item()==1
    said = seen.suggestions()[-1]
    assert 'rows are not samples' in said and 'set_batch_size(model, 1)' in said
    set_batch_size(m, 1)
    for _ in range(300): m(torch.randn(256,4))
    rho = RunBNInterpretation(m, bs=1).table().rho.item()
    old = m[0].window_mean.clone()
    x = torch.randn(256,4)
    m(x)
    shares = (m[0].window_mean-old)/(x.mean(0)-old)
    assert rho==pytest.approx(shares.median().item(), rel=1e-3)
    assert 1/201<rho<.2

# filters

def sums(filters): return filters.sum((1,2,3))

def test_zeros_of_pruned_nets_stay_and_the_rest_keeps_its_mean():
    model = to_runbn(net())
    for _ in range(3): model(batch())
    w = model[0].weight
    with torch.no_grad():
        w *= w.abs()>w.abs().median()
    zeros,means = w==0,sums(w)
    opt = torch.optim.Adam(model.parameters(), .01)
    FilterMeans(model).on(opt)
    for _ in range(5):
        opt.zero_grad()
        model(batch()).square().mean().backward()
        w.grad *= ~zeros
        opt.step()
    assert torch.equal(w==0, zeros)
    same(sums(w), means, 1e-9)

def left_alone(model, **kwargs):
    "Filters that do not keep their means, and why"
    left = FilterMeans(model, **kwargs).left
    return {k.removesuffix('.weight'):why for k,why in left.items()}
def test_filters_that_the_user_keeps_fixed():
    layers = [m for _ in range(5) for m in (nn.Conv2d(4,4,1),nn.BatchNorm2d(4))]
    model = nn.Sequential(*layers)
    model[2].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[4])
    model[6].weight = model[8].weight # tied
    to_runbn(model)
    fixed = {'2':'frozen','4':'parametrized','6':'shared','8':'shared'}
    assert left_alone(model)==fixed
    assert left_alone(model, params=[])=={'0':'not in the optimizer', **fixed}
    before = clones(model.state_dict().items())
    means = FilterMeans(model)
    means.after_step()
    after = model.state_dict()
    assert [k for k,v in after.items() if not torch.equal(v, before[k])]==['0.weight']
    assert repr(means)==('Filters of convolutions: 1 keep their means, 1 left alone (frozen: 2), '
        '1 left alone (parametrized: 4), 2 left alone (shared: 6, 8)')

def test_an_optimizer_without_some_filters():
    model = to_runbn(net())
    opt = torch.optim.SGD(model[3:].parameters(), .1)
    means = FilterMeans(model).on(opt)
    assert list(means.filters)==['3.weight']
    assert means.left=={'0.weight':'not in the optimizer'}

def share_of_zeros(m):
    return (m.weight==0).float().mean().item()

def test_a_pruned_net_under_the_callback():
    "Masked gradients, as sparsifying callbacks have it, and torch's own pruning"
    class Mask(Callback):
        def before_fit(self):
            filters = [p for p in self.model.parameters() if p.ndim==4]
            self.masks = [(p,p!=0) for p in filters]
        def before_step(self):
            for p,mask in self.masks: p.grad.mul_(mask)
    for pruned in (False,True):
        model = net().float()
        for _ in range(3): model(batch().float())
        for m in (model[0],model[3]):
            if pruned: prune.l1_unstructured(m, 'weight', .5)
            else:
                sizes = m.weight.abs()
                m.weight.data *= sizes>sizes.median()
        def zeros(): return [share_of_zeros(m) for m in (model[0],model[3])]
        before = zeros()
        xs,ys = torch.randn(8,3,6,6),torch.arange(8)%2
        cbs = [RunBNCallback()] if pruned else [RunBNCallback(),Mask()]
        learn = learner(model, xs, ys, 2, *cbs)
        learn.fit(2, .05)
        assert zeros()==before and all(s>.45 for s in before)
        stay = 'parametrized' if pruned else '2 with zeros that stay'
        assert stay in learn.run_bn.report.filters

# the loss scale

def cpu_scaler(scale, **kw): return GradScaler('cpu', init_scale=scale, **kw)
def flat_grads(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])
def batches(n):
    "Pairs of two small images and their labels"
    xs = torch.randn(n,2,3,8,8)
    ys = torch.randint(2, (n,2))
    return zip(xs, ys)

def assert_near(plain, scaled):
    "Gradients of each step, without a scale and with one"
    for i,(a,b) in enumerate(zip(plain, scaled)):
        assert (a-b).norm() < 1e-2*a.norm(), i

def grads_with(scaler, tell=False, events=()):
    "Gradients of 60 steps, those at `events` skipped; the scale after them, and the model"
    torch.manual_seed(1)
    model = float_net()
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    out = []
    if tell: follow_scaler(model, scaler)
    for i,(x,y) in enumerate(batches(60)):
        opt.zero_grad()
        loss = cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        out.append(flat_grads(model))
        if i in events:
            if not scaler.is_enabled(): continue # the step that a scaler skips
            model[0].weight.grad[0] = float('inf')
            seen = scaler._per_optimizer_states[id(opt)]
            seen['found_inf_per_device'] = {torch.device('cpu'):torch.tensor(1.)}
        scaler.step(opt)
        scaler.update()
    return out,scaler.get_scale(),model

@parametrize('tell', [False,True], ids=['by itself','told'])
def test_running_gradients_follow_a_scale_that_doubles_halves_and_skips(tell):
    events = 17,33
    plain,*_ = grads_with(GradScaler('cpu', enabled=False), events=events)
    scaler = cpu_scaler(2.**12, growth_interval=7)
    scaled,scale,model = grads_with(scaler, tell, events)
    assert scale!=2.**12
    assert_near(plain, scaled)
    largest = max(m.window_grad.abs().max() for m in norms(model))
    assert largest < 1 # in the unit of the loss itself

def test_running_gradients_follow_a_scale_in_the_callback():
    """As fastai's MixedPrecision scales, on a CPU; the scale grows, and one step overflows and is
    skipped"""
    class Scaler(Callback):
        order = 10
        def __init__(self, enabled):
            self.enabled = enabled
            self.seen,self.scales = [],[]
        def before_fit(self):
            scaler = cpu_scaler(2.**12, growth_interval=5, enabled=self.enabled)
            self.learn.scaler = scaler
        def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        def before_step(self):
            scale = self.scaler.get_scale()
            skip = len(self.seen)==12
            for p in self.model.parameters(): p.grad /= scale
            self.seen.append(flat_grads(self.model))
            self.scales.append(scale)
            grows = len(self.seen)%5==0
            factor = .5 if skip else 2. if grows else 1.
            if self.enabled: self.scaler.update(scale*factor)
            if skip: raise CancelStepException
        def after_fit(self): self.learn.scaler = None
    def run(enabled):
        torch.manual_seed(2)
        xs,ys = torch.randn(80,3,8,8),torch.arange(80)%2
        scaler = Scaler(enabled)
        learn = learner(net().float(), xs, ys, 2, RunBNCallback(), scaler)
        learn.fit(1, .01)
        return scaler
    plain,scaled = run(False),run(True)
    assert len(plain.seen)==len(scaled.seen)==40
    assert len(set(scaled.scales))>4
    assert_near(plain.seen, scaled.seen)

compiler = shutil.which('g++') or shutil.which('clang++')
@pytest.mark.skipif(not compiler, reason='Inductor needs a C++ compiler')
def test_a_compiled_model_follows_the_scaler_that_it_was_told():
    torch._dynamo.reset()
    plain = to_runbn(net())
    scaler = cpu_scaler(2.**8)
    scaled = follow_scaler(deepcopy(plain), scaler)
    compiled = torch.compile(scaled)
    for i in range(6):
        x = batch()
        for m in (plain,scaled): m.zero_grad()
        plain(x).square().mean().backward()
        scaler.scale(compiled(x).square().mean()).backward()
        for p,q in zip(plain.parameters(), scaled.parameters()):
            unscaled = q.grad/scaler.get_scale()
            assert_close(unscaled, p.grad, rtol=1e-9, atol=1e-12)
        scaler._scale.mul_(4 if i%2 else .5) # as update does, in place
    for a,b in pairs_of_norms(plain, scaled):
        same(b.window_grad, a.window_grad, 1e-10)

class Stop(torch.autograd.Function):
    "An error in the backward"
    @staticmethod
    def forward(ctx, x): return x*1
    @staticmethod
    def backward(ctx, g): raise KeyError('here')

def test_a_backward_that_ended_in_an_error_leaves_no_scale():
    m = norm()
    scaler = cpu_scaler(2.**10)
    for _ in range(3):
        m(batch().requires_grad_()).sum().backward()
    y = Stop.apply(m(batch().requires_grad_()))
    with pytest.raises(KeyError): scaler.scale(y.pow(3).sum()).backward()
    twin = deepcopy(m)
    x = batch().requires_grad_()
    z = leaf(x)
    (m(x)**3).sum().backward()
    (twin(z)**3).sum().backward()
    same(x.grad, z.grad)
    same(m.window_grad, twin.window_grad)

def autocast_backward(m, dtype):
    with torch.autocast('cpu', dtype):
        y = m(torch.randn(2,3,8,8))
        loss = y.float().square().mean()
    loss.backward()

def test_float16_autocast_without_a_scale_is_a_warning():
    "One, however many steps there are"
    from fastai_runbn import functional
    functional._warn_of_no_scale.cache_clear()
    says = r'follow_scaler\(model, scaler\).*bfloat16 needs nothing'
    with pytest.warns(UserWarning, match=says) as w:
        model = float_net()
        for _ in range(2): autocast_backward(model, torch.float16)
    assert sum('follow_scaler' in str(o.message) for o in w)==1

silent = {'bfloat16':(torch.bfloat16,False), 'told that there is none':(torch.float16,True)}
@parametrize('dtype,told', silent.values(), ids=silent)
def test_no_warning_where_there_is_nothing_to_say(dtype, told):
    from fastai_runbn import functional
    functional._warn_of_no_scale.cache_clear()
    model = float_net()
    if told: follow_scaler(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        autocast_backward(model, dtype)

def test_a_loop_without_the_scaler_after_one_with_it():
    "The scale of a scaler that was followed is not the scale of what is not scaled"
    scaler,m = cpu_scaler(2.**16),norm()
    follow_scaler(m, scaler)
    for _ in range(5):
        loss = m(batch().requires_grad_()).pow(3).mean()
        scaler.scale(loss).backward()
    twin = deepcopy(m) # which follows nothing
    x = batch().requires_grad_()
    z = leaf(x)
    (m(x)**3).mean().backward()
    (twin(z)**3).mean().backward()
    same(x.grad, z.grad)
    same(m.window_grad, twin.window_grad)

def test_a_pickled_model_in_a_new_process():
    "Converters and scalers are minded there too"
    code = '''
import pickle,sys,warnings,torch
from torch import nn
m = pickle.loads(sys.stdin.buffer.read())
with warnings.catch_warnings(record=True) as w: nn.SyncBatchNorm.convert_sync_batchnorm(m)
from fastai_runbn.functional import LossScale
assert 'sync_window' in str(w[-1].message) and LossScale.watching and 'Running' in type(m[1]).__name__
'''
    model = pickle.dumps(to_runbn(net()))
    subprocess.run([sys.executable,'-c',code], input=model, check=True)

def test_a_scaler_without_a_scale_is_an_error():
    class Other:
        def is_enabled(self): return True
        def scale(self, x): return x
    with pytest.raises(TypeError, match='follow_scaler: Other'): follow_scaler(float_net(), Other())

def test_lightning_with_a_scaler():
    """Its own precision plugin, with a scaler on the CPU: gradients after unscaling, with and
    without"""
    import lightning as L
    from lightning.pytorch.plugins import MixedPrecision
    from torch.utils.data import DataLoader,TensorDataset
    xs = torch.randn(80,3,8,8)
    data = TensorDataset(xs, torch.arange(80)%2)
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = float_net()
            self.seen = []
        def training_step(self, b, i):
            x,y = b
            return cross_entropy(self.net(x), y)
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 1e-3)
        def on_before_optimizer_step(self, opt): self.seen.append(flat_grads(self))
    class Plugin(MixedPrecision):
        def __init__(self, scaler):
            super().__init__('bf16-mixed', 'cpu')
            self.scaler = scaler
        def forward_context(self): return torch.autocast('cpu', enabled=False)
    quiet = dict(logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False)
    def run(scaler):
        module = Module()
        plugins = [Plugin(scaler)]
        trainer = L.Trainer(max_epochs=1, accelerator='cpu', plugins=plugins, **quiet)
        trainer.fit(module, DataLoader(data, batch_size=2))
        return module.seen
    plain = run(None)
    scaled = run(cpu_scaler(2.**9, growth_interval=5))
    assert len(plain)==len(scaled)==40
    assert_near(plain, scaled)

def test_accelerate_with_a_scaler():
    from accelerate import Accelerator
    def run(scaled):
        acc = Accelerator(cpu=True)
        if scaled: acc.scaler = cpu_scaler(2.**9, growth_interval=5)
        model = float_net()
        opt = torch.optim.SGD(model.parameters(), 1e-3)
        model,opt = acc.prepare(model, opt)
        torch.manual_seed(4)
        out = []
        for x,y in batches(40):
            opt.zero_grad()
            acc.backward(cross_entropy(model(x), y))
            if scaled: acc.scaler.unscale_(opt.optimizer)
            out.append(flat_grads(model))
            opt.step()
        return out,acc.scaler and acc.scaler.get_scale()
    (plain,_),(scaled,scale) = run(False),run(True)
    assert scale>2.**9
    assert_near(plain, scaled)

# names

def test_a_star_import_brings_what_a_user_types():
    names = {n for n in vars(public) if not n.startswith('_')}
    assert names=={'AdaptiveWindow','FilterMeans','GraphCallback','GraphedForward','LESSON10',
        'RunBNCallback','RunBNInterpretation','RunBNRecorder','RunBNSchedule','RunningBatchNorm1d',
        'RunningBatchNorm2d','RunningBatchNorm3d','WarmupClamp','follow_scaler',
        'from_lesson10','lesson10_weight','register_norm','set_batch_size','surgery_report',
        'sync_window','to_bn','to_runbn'}

@parametrize('train', [False,True], ids=['eager','qat'])
def test_fusing_says_what_to_do(train):
    import torch.ao.quantization as q
    fuse = q.fuse_modules_qat if train else q.fuse_modules
    says = r'RunningBatchNorm2d is not fused. `to_bn\(model\)` first'
    for names in (['0','1'],['0','1','2']):
        with pytest.raises(RuntimeError, match=says): fuse(float_net().train(train), [names])
    fused = fuse(to_bn(float_net().train(train)), [['0','1','2']])
    assert type(fused[1]) is nn.Identity

def test_graph_mode_quantization_works_and_says_what_is_better():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx,prepare_fx
    x = torch.randn(4,3,12,12)
    def off(model):
        "What quantization changes, as a share of the output"
        config = get_default_qconfig_mapping('fbgemm')
        p = prepare_fx(deepcopy(model), config, (x,))
        for _ in range(3): p(x)
        quantized,y = convert_fx(p)(x),model(x)
        return ((quantized-y).norm()/y.norm()).item()
    model = float_net()
    for _ in range(9):
        model(torch.randn(4,3,12,12))
    model.eval()
    with pytest.warns(UserWarning, match=r'`to_bn\(model\)` first, then quantize'):
        assert off(model)<.2
    assert off(to_bn(model))<.2

def test_jit_script_says_what_to_do():
    for make in (net, lambda: timm_norm().double()):
        model = to_runbn(make()).eval()
        with pytest.raises(RuntimeError, match=r'torch.jit.script.*`to_bn\(model\)` first'):
            torch.jit.script(model)
    x = batch()
    want = model(x)
    same(torch.jit.script(to_bn(model))(x), want)

def test_scale_of_a_loss_ends_with_its_backward():
    "A loss that is not scaled after one that is, without a forward between them"
    x = torch.randn(2,3,4,5,5)
    def trained(*scales):
        norm = RunningBatchNorm2d(4)
        ys = [norm(o) for o in x]
        for y,scale in zip(ys, scales):
            scale(y.square().sum()).backward()
        return norm.window_grad
    scaler = cpu_scaler(1024.)
    plain = nn.Identity()
    have = trained(lambda loss: scaler.scale(loss), plain)
    assert_close(have, trained(plain, plain))

class Zeros(nn.Module):
    "Drops everything"
    def forward(self, x): return x*0

def test_timms_layer_drops_what_it_is_told_to():
    "Where something is dropped before the activation, the norm leaves that to timm's layer"
    layer = to_runbn(timm.layers.BatchNormAct2d(4, drop_layer=Zeros))
    assert type(layer).__name__=='RunningBatchNormAct2d'
    assert layer(torch.randn(2,4,3,3)).abs().max()==0
    layer.drop = nn.Identity()
    assert layer(torch.randn(2,4,3,3)).max()>0

@parametrize('backend', backends)
def test_an_adaptive_window_forgets_channel_by_channel(backend):
    "What it knows of a channel is of the statistics that the channel had"
    layer = RunningBatchNorm2d(3, backend=backend, window=AdaptiveWindow())
    for t in range(20):
        layer(torch.randn(4,3,5,5)+t/5)
    known = layer.window_innovations.clone()
    length = layer.window_innovations[0,0]
    assert (known[1]==19).all() and length<50
    layer.running_mean[1] += 7
    x = torch.randn(4,3,5,5)
    layer(x)
    assert layer.window_innovations[1].tolist()==[20,1,20]
    assert_close(layer.window_mean[1], layer.known_mean[1], rtol=1, atol=1)
    assert layer.window_innovations[0,1]==200 # the longest, as of a trained model
    layer.reset_running_stats()
    assert not layer.window_innovations.any()

@parametrize('backend', backends)
def test_the_window_follows_channel_by_channel(backend):
    "Who writes statistics of some channels has the windows of those start anew, of no others"
    layer = RunningBatchNorm2d(3, backend=backend)
    x = torch.randn(4,3,5,5)
    for _ in range(8): layer(x)
    untouched = deepcopy(layer)
    layer.running_mean[1] += 7
    layer.refresh_window()
    assert layer.window_mean[1]==layer.running_mean[1]
    assert layer.window_count[1]==-1
    assert (layer.window_grad[:,1]==0).all()
    layer = deepcopy(untouched)
    written = untouched.running_mean[1]+7
    layer.running_mean[1] = written
    for o in (layer,untouched): o(x)
    moved = (layer.window_mean-untouched.window_mean).abs()
    assert moved.tolist()[::2]==[0,0]
    merged = written+4/200*(x[:,1].mean()-written)
    assert_close(layer.window_mean[1], merged)
