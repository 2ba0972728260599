"A running norm under code that was written for BatchNorm: whatever that lets one do is honoured, with BatchNorm's meaning, or is an error that names the remedy"
import io,pickle,shutil,subprocess,sys,warnings
from copy import deepcopy
import pytest,timm,torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel,get_ema_multi_avg_fn,update_bn
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d
from fastai.basics import Callback,CancelStepException,CrossEntropyLossFlat,DataLoaders,Learner,SGD
from fastai_runbn import all as public
from fastai_runbn.all import FilterMeans,RunBNCallback,RunBNInterpretation,RunningBatchNorm1d,RunningBatchNorm2d,follow_scaler,set_batch_size,surgery_report,to_bn,to_runbn
from impls import backends
from fastai_runbn.moments import AdaptiveWindow,AutoMomentum

def norm(): return RunningBatchNorm2d(3, dtype=torch.float64)
def batch(bs=2, c=3, size=6): return torch.randn(bs,c,size,size, dtype=torch.float64)*2+1
def trained(m, steps=30, c=3):
    for _ in range(steps): m(batch(c=c)).pow(3).mean().backward()
    return m
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3,6,3,bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6,6,3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6,2)).double()
def norms(m): return [o for o in m.modules() if isinstance(o, _BatchNorm)]
def state(m): return {k:b.clone() for k,b in m.named_buffers()}
def same(a, b, tol=1e-12): torch.testing.assert_close(a, b, rtol=tol, atol=tol)
def unchanged(m, before): return [k for k,b in m.named_buffers() if not torch.equal(b, before[k])]==[]

# momentum

def test_momentum_is_a_number_to_those_who_read_it():
    m = norm()
    assert isinstance(m.momentum, float) and m.momentum==.1 and isinstance(m.momentum, AutoMomentum) and 'momentum=auto' in repr(m)
    for c in (deepcopy(m),pickle.loads(pickle.dumps(m))): assert isinstance(c.momentum, AutoMomentum)

@pytest.mark.parametrize('momentum', [.05,.3,1,1.,None], ids=str)
def test_momentum_that_is_set_is_batch_norms(momentum):
    "Before, during and after training: the weight of a batch in running_mean and running_var"
    m,bn = norm(),nn.BatchNorm2d(3).double()
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
    same(m.running_mean, x.mean((0,2,3))); same(m.running_var, x.var((0,2,3)))
    assert (m.window_mean-window).abs().max() < .5*(m.running_mean-window).abs().max()          # the window goes its own way

def test_momentum_goes_along_to_bn():
    m = to_runbn(nn.Sequential(nn.BatchNorm2d(3, momentum=.03), nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3)))
    m[2].momentum = .2
    assert [o.momentum for o in to_bn(m)] == [.03,None,.2]

def test_momentum_scaled_as_schedulers_do():
    m,bn = norm(),nn.BatchNorm2d(3).double()
    for o in (m,bn): o.momentum *= .5                                             # a float from now on
    x = batch()
    m(x); bn(x)
    same(m.running_mean, bn.running_mean)

def test_update_bn_puts_back_what_was():
    m = trained(norm())
    model = nn.Sequential(m)
    xs = [batch(4) for _ in range(5)]
    update_bn(xs, model)
    assert isinstance(m.momentum, AutoMomentum)
    same(m.running_mean, torch.stack([x.mean((0,2,3)) for x in xs]).mean(0))

def test_num_batches_tracked_set_to_0_begins_a_cumulative_average_anew():
    m,bn = trained(norm()),nn.BatchNorm2d(3, momentum=None).double()
    m.momentum = None
    bn.load_state_dict(m.state_dict())
    for n in (0,3):
        for o in (m,bn): o.num_batches_tracked.fill_(n)
        for _ in range(3):
            x = batch()
            m(x); bn(x)
            same(m.running_mean, bn.running_mean); same(m.running_var, bn.running_var)
            assert m.num_batches_tracked==bn.num_batches_tracked

def test_precise_statistics():
    "fvcore's update_bn_stats: momentum 1, and the mean over batches of what is in running_mean after each"
    m = trained(norm())
    m.momentum,xs,means = 1.,[batch(4) for _ in range(6)],[]
    for x in xs: m(x); means.append(m.running_mean.clone())
    m.running_mean,m.momentum = torch.stack(means).mean(0),.1
    same(m.running_mean, torch.cat(xs).mean((0,2,3)))
    m(batch()); assert (m.window_count>0).all()

# held

def hold_momentum(m): m.momentum = 0
def hold_momentum_float(m): m.momentum = 0.
def hold_tracking(m): m.track_running_stats = False
def hold_eval(m): m.eval()
@pytest.mark.parametrize('hold', [hold_momentum,hold_momentum_float,hold_tracking,hold_eval])
def test_held_layers_stay(hold):
    "Statistics, window, counters and running gradient, with gradients and without, in a second pass as SAM has it"
    m = trained(norm())
    before,kept = state(m),(m.momentum,m.track_running_stats)
    hold(m)
    for _ in range(3): m(batch().requires_grad_()).pow(3).sum().backward()
    with torch.no_grad(): m(batch())
    assert unchanged(m, before)
    m.momentum,m.track_running_stats = kept
    m.train()(batch())
    assert not unchanged(m, before) and m.num_batches_tracked==31

@pytest.mark.parametrize('hold', [hold_momentum,hold_tracking])
def test_a_held_output_and_gradient_are_what_they_would_be(hold):
    m = trained(norm())
    a,b = deepcopy(m),m
    hold(a)
    x = batch().requires_grad_()
    z = x.detach().clone().requires_grad_()
    ya,yb = a(x),b(z)
    same(ya, yb)
    for y in (ya,yb): (y**3).sum().backward()
    same(x.grad, z.grad)

@pytest.mark.parametrize('hold', [hold_momentum,hold_tracking])
def test_held_from_the_first_batch_on(hold):
    m = norm()
    hold(m)
    x = batch()
    same(m(x), nn.functional.batch_norm(x, None, None, training=True)*1.)
    assert m.num_batches_tracked==0 and (m.window_count==0).all()

def test_statistics_taken_away():
    "TENT: normalised with the batch, in training and in evaluation, as BatchNorm is"
    m,bn = trained(norm()),nn.BatchNorm2d(3).double()
    for o in (m,bn): o.track_running_stats,o.running_mean,o.running_var = False,None,None
    x = batch(8)
    same(m(x), bn(x)); same(m.eval()(x), bn.eval()(x))
    model = nn.Sequential(m)
    model.state_dict(); deepcopy(model); pickle.dumps(model); model.float()
    assert surgery_report(model).running
    m.reset_running_stats()
    assert type(to_bn(model)[0]) is nn.BatchNorm2d and model[0].running_mean is None

def test_a_layer_without_statistics_cannot_be_made():
    with pytest.raises(ValueError, match='has to track'): RunningBatchNorm2d(3, track_running_stats=False)

@pytest.mark.parametrize('name,value', [('eps',.5), ('affine',False), ('num_features',3), ('training',False), ('weight',None), ('bias',None)])
def test_other_attributes_are_batch_norms(name, value):
    m,bn = trained(norm()),nn.BatchNorm2d(3).double()
    for o in (m,bn): setattr(o, name, value)
    x = batch()
    with torch.no_grad(): y = m(x)
    for k in ('running_mean','running_var'): setattr(bn, k, getattr(m, k).clone())
    same(m.eval()(x), bn.eval()(x))
    if name=='eps': same(y.var((0,2,3), correction=0)*(m.window_var+.5), x.var((0,2,3), correction=0))

def test_parameters_frozen_and_thawed():
    m = trained(norm())
    m.requires_grad_(False)
    before = state(m)
    m(batch())
    assert not unchanged(m, before)                                               # as BatchNorm's statistics
    x = batch().requires_grad_(); m(x).sum().backward()
    assert m.weight.grad is not None and x.grad.isfinite().all()

# freezing and converters

@pytest.mark.parametrize('arch', ['resnet18','lcnet_035'])
def test_timm_freezes_and_thaws(arch):
    model = to_runbn(timm.create_model(arch, num_classes=3), eval_window=77).double()
    x = torch.randn(2,3,32,32).double()
    for _ in range(3): model(x)
    n,want = len(norms(model)),model.eval()(x)
    timm.layers.freeze_batch_norm_2d(model)
    assert not norms(model)
    same(model.train().eval()(x), want, 1e-6)
    model.train()
    timm.layers.unfreeze_batch_norm_2d(model)
    assert {type(m).__name__[:7] for m in norms(model)}=={'Running'} and len(norms(model))==n and {m.eval_window for m in norms(model)}=={77}
    same(model.eval()(x), want, 1e-6)
    model.train()(x).sum().backward()
    assert all((m.window_count>0).all() and m.skipped_batches==0 for m in norms(model))
    assert {type(m).__name__[:9] for m in norms(to_bn(model))}=={'BatchNorm'}

def test_torchvisions_frozen_norm_stays_one():
    model = to_runbn(net())
    frozen = FrozenBatchNorm2d(6)
    model[1] = frozen
    assert model[1] is frozen

@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm], ids=['torch','timm'])
@pytest.mark.parametrize('make', [net, lambda: timm.create_model('lcnet_035', num_classes=3)], ids=['plain','timm'])
def test_converters_to_sync_batch_norm_keep_running_norms(convert, make):
    model = to_runbn(make())
    before = list(model.modules())
    with pytest.warns(UserWarning, match='stays: .*sync_window.*to_bn'): assert convert(model) is model
    assert list(model.modules())==before

def test_lightnings_sync_batchnorm():
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
    model = to_runbn(net())
    with pytest.warns(UserWarning, match='sync_window'): TorchSyncBatchNorm().apply(model)
    assert {type(m) for m in norms(model)}=={RunningBatchNorm2d}

def test_a_norm_of_the_users_own_takes_the_place():
    model = to_runbn(net())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for new in (nn.SyncBatchNorm(6),nn.BatchNorm2d(6),nn.GroupNorm(2,6),nn.Identity()):
            model[1] = new
            assert model[1] is new

# tools

def test_fx_traces_it_as_one_module():
    model = to_runbn(net())
    for _ in range(5): model(batch())
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op=='call_module' and 'Norm' in type(traced.get_submodule(n.target)).__name__]==['1','4']
    x = batch()
    same(traced.eval()(x), model.eval()(x))
    traced.train()(batch()).sum().backward()
    assert model[1].num_batches_tracked==6

@pytest.mark.parametrize('act', [False,True])
def test_fx_of_timms_layer_activates_once(act):
    model = to_runbn(nn.Sequential(timm.layers.BatchNormAct2d(3, apply_act=act, act_layer=nn.SiLU))).double()
    traced = torch.fx.symbolic_trace(model).eval()
    x = batch()
    same(traced(x), model.eval()(x))

def test_feature_extractor():
    model = to_runbn(resnet18(num_classes=3))
    f = create_feature_extractor(model, {'layer1.0.bn1':'norm', 'layer2':'map'})
    x = torch.randn(2,3,32,32)
    out = f.train()(x)
    assert out['norm'].shape==(2,64,8,8) and out['map'].shape==(2,128,4,4) and f.get_submodule('layer1.0.bn1').num_batches_tracked==1
    torch.testing.assert_close(f.eval()(x)['map'], torch.nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2).eval()(x))

def test_jit_trace_in_evaluation():
    model = to_runbn(net()).eval()
    x = batch()
    same(torch.jit.trace(model, x)(x), model(x))

# state in every way

def teacher():
    torch.manual_seed(3)
    m = nn.Sequential(norm(), nn.Conv2d(3,3,3).double(), norm())
    for _ in range(60): m(batch()+5)
    return m

def copy_in_place(src, dst):
    with torch.no_grad():
        for k,v in dst.state_dict().items(): v.copy_(src.state_dict()[k])
def copy_data(src, dst):
    for a,b in zip(dst.buffers(), src.buffers()):
        if a.shape==b.shape: a.data.copy_(b.data)
    for a,b in zip(dst.parameters(), src.parameters()): a.data.copy_(b.data)
def copy_data_of_running_statistics(src, dst):
    for a,b in zip(norms(dst), norms(src)):
        for k in ('running_mean','running_var','num_batches_tracked'): getattr(a, k).data.copy_(getattr(b, k))
def new_buffers(src, dst):
    for a,b in zip(norms(dst), norms(src)):
        for k in ('running_mean','running_var','num_batches_tracked'): setattr(a, k, getattr(b, k).clone())
def data_assigned(src, dst):
    for a,b in zip(norms(dst), norms(src)):
        for k in ('running_mean','running_var','num_batches_tracked'): getattr(a, k).data = getattr(b, k).clone()
def swapped(src, dst):
    for a,b in zip(norms(deepcopy(src)), norms(dst)):
        for k in ('running_mean','running_var','num_batches_tracked'): torch.utils.swap_tensors(getattr(a, k), getattr(b, k))
def load(src, dst): dst.load_state_dict(src.state_dict())
def load_assign(src, dst): dst.load_state_dict({k:v.clone() for k,v in src.state_dict().items()}, assign=True)
def load_pieces(src, dst):
    for a,b in zip(norms(dst), norms(src)): a.load_state_dict(b.state_dict())
def load_batch_norms(src, dst): dst.load_state_dict(to_bn(deepcopy(src)).state_dict())
def through_numpy(src, dst):
    for a,b in zip(norms(dst), norms(src)):
        for k in ('running_mean','running_var'): getattr(a, k).numpy()[:] = getattr(b, k).numpy()
ways = [copy_in_place,copy_data,copy_data_of_running_statistics,new_buffers,data_assigned,swapped,load,load_assign,load_pieces,load_batch_norms,through_numpy]

@pytest.mark.parametrize('used', [False,True], ids=['fresh','trained'])
@pytest.mark.parametrize('way', ways, ids=lambda f: f.__name__)
def test_the_window_follows(way, used):
    "In the next training forward: full of what came, the batch merged in; and evaluation is the source's but for one batch"
    src,dst = teacher(),nn.Sequential(norm(), nn.Conv2d(3,3,3).double(), norm())
    if used:
        for _ in range(9): dst(batch()-3).sum().backward()
    way(src, dst)
    mean,x = src[0].running_mean.clone(),batch(1)+5
    y = dst.train()(x)
    rho = 1/dst[0].window.samples # the longest, as for trained statistics
    if way is copy_data: assert dst[0].window_count.min()>0                       # the window came too
    else: same(dst[0].window_mean, mean+rho*(x.mean((0,2,3))-mean))
    assert y.isfinite().all() and (dst[0].running_mean-mean).abs().max() < .35*(x.mean((0,2,3))-mean).abs().max()

@pytest.mark.parametrize('back', [copy_in_place,load,new_buffers], ids=lambda f: f.__name__)
def test_averages_swapped_in_and_out_leave_no_trace(back):
    a = teacher(); b = deepcopy(a)
    ema = AveragedModel(a, multi_avg_fn=get_ema_multi_avg_fn(.9), use_buffers=True)
    for _ in range(5): x = batch(); a(x); b(x); ema.update_parameters(a)
    backup = deepcopy(a)
    back(ema.module, a); a.eval()(batch()); a.train()
    back(backup, a)
    for _ in range(3):
        x = batch()
        same(a(x), b(x))
    for k,v in a.named_buffers(): same(v, dict(b.named_buffers())[k])

def test_an_average_trains_on():
    a = teacher()
    ema = AveragedModel(a, multi_avg_fn=get_ema_multi_avg_fn(.5), use_buffers=True)
    for _ in range(9): a(batch()+5); ema.update_parameters(a)
    count = ema.module[0].window_count.clone()
    ema.module.train()(batch()+5)
    assert (ema.module[0].window_count>0).all() and (count>0).all()               # not taken for a state from outside

@pytest.mark.parametrize('fill', ['assign','to_empty','setattr','empty windows'])
def test_made_on_the_meta_device(fill):
    "As from_pretrained does it; memory that nobody has filled is full of NaN here"
    sd = {k:v.clone() for k,v in teacher().state_dict().items()}
    with torch.device('meta'): m = nn.Sequential(norm(), nn.Conv2d(3,3,3, dtype=torch.float64), norm())
    def rubbish(t): return torch.full_like(t, float('nan') if t.is_floating_point() else 77, device='cpu')
    if fill=='assign': m.load_state_dict(sd, assign=True)
    elif fill=='to_empty':
        m._apply(rubbish)
        assert torch.equal(m[0].clamp_floor, norm().clamp_floor) and (m[0].window_grad==0).all()   # at once, where code may be compiled that cannot look
        m.load_state_dict(sd)
    else:
        for name,sub in m.named_modules():
            for k in [*sub._parameters,*sub._buffers]:
                full = f'{name}.{k}'
                if full in sd:
                    new = sd[full].clone()
                    setattr(sub, k, nn.Parameter(new) if k in sub._parameters else new)
                elif fill=='empty windows': sub._buffers[k] = rubbish(sub._buffers[k])
    src = teacher(); want = deepcopy(src)
    for o in norms(want): o.seed_window()
    x = batch()+5
    same(m(x), want(x))
    for _ in range(3): m(batch()+5).sum().backward()
    assert all(b.isfinite().all() for b in m.buffers()) and m[0].samples_seen>2**39

def test_to_empty_and_reset_parameters():
    with torch.device('meta'): m = norm()
    m.to_empty(device='cpu').reset_parameters()
    x = batch()
    same(m(x), norm()(x))

@pytest.mark.parametrize('copy', [deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch.load(io.BytesIO(dumped(m)), weights_only=False)], ids=['deepcopy','pickle','torch.save'])
def test_copies_go_on_as_the_original(copy):
    a = teacher(); b = copy(a)
    for _ in range(3):
        x = batch()
        assert torch.equal(a(x), b(x))
    assert unchanged(a, state(b))
def dumped(m):
    f = io.BytesIO(); torch.save(m, f)
    return f.getvalue()

def test_pruned_channels():
    m = trained(norm())
    keep = torch.tensor([0,2])
    m.num_features = 2
    for k in ('running_mean','running_var'): setattr(m, k, getattr(m, k)[keep])
    for k in ('weight','bias'): setattr(m, k, nn.Parameter(getattr(m, k)[keep].detach()))
    mean = m.running_mean.clone()
    m(batch(c=2))
    assert m.window_mean.shape==(2,) and (m.window_mean-mean).abs().max()<.2

@pytest.mark.parametrize('move', [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()], ids=['half','bfloat16','float'])
def test_a_change_of_type_is_not_a_change_of_state(move):
    m = trained(norm())
    move(m)
    before = m.window_mean.clone()
    m.refresh_window()
    assert torch.equal(m.window_mean, before) and (m.window_count>0).all()

def test_reset_running_stats_forgets_all():
    m = trained(norm())
    m.reset_running_stats()
    x = batch()
    same(m(x), norm()(x))

# samples

def test_rows_of_points():
    "One cloud a batch, its points as rows or as positions: alike, with a word; and as told"
    def outputs(shape, told=None):
        torch.manual_seed(0)
        m = set_batch_size(RunningBatchNorm1d(4), told)
        for _ in range(100): y = m(shape(torch.randn(2000,4)+torch.randn(1,4)))
        return y,m.window_mean
    rows,positions = (lambda o: o),(lambda o: o.T[None])
    with pytest.warns(UserWarning, match='2000 rows.*set_batch_size'): y,mean = outputs(rows)
    for other in (outputs(positions)[1],outputs(rows, 1)[1]): torch.testing.assert_close(mean, other, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(rows, 2000)[1], mean, atol=.05)

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
        with pytest.raises(ValueError, match='set_batch_size'): set_batch_size(RunningBatchNorm2d(3), n)

class Points(nn.Module):
    "A net over the points of clouds, `(B,P,3)`, with points as rows inside"
    def __init__(self):
        super().__init__()
        self.lin,self.bn,self.head = nn.Linear(3,8),nn.BatchNorm1d(8),nn.Linear(8,2)
    def forward(self, x): return self.head(self.bn(self.lin(x).flatten(0,1)).relu().view(*x.shape[:2],-1).amax(1))

def learner(model, xs, ys, bs, *cbs):
    from torch.utils.data import DataLoader,TensorDataset
    ds = TensorDataset(xs, ys)
    learn = Learner(DataLoaders(DataLoader(ds, batch_size=bs), DataLoader(ds, batch_size=4), device='cpu'), model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, cbs=cbs)
    learn.remove_cbs(learn.cbs.filter(lambda c: type(c).__name__=='ProgressCallback'))
    learn.logger = lambda *a: None
    return learn

def test_the_callback_tells_how_many_samples_a_batch_has():
    learn = learner(Points(), torch.randn(9,300,3), torch.arange(9)%2, 2, RunBNCallback())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1, .01)
    m = learn.model.bn
    assert m.samples_seen==9 and m.last_batch==(300,1,300) and m.batch_size is None
    row = learn.run_bn.report.running[0]
    assert (row.points,row.samples)==(300,1) and '300 rows, counted as 1 sample' in str(learn.run_bn.report)
    assert RunBNInterpretation(learn.model, bs=2).suggestions()==[]

def test_a_point_net_with_one_cloud_a_batch():
    "Clouds that differ in their size: BatchNorm, with one a batch, gives them all the same; and points as rows are no other net than points as positions"
    class Clouds(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.rows,self.conv,self.bn,self.head = rows,nn.Conv1d(3,16,1),nn.BatchNorm1d(16),nn.Linear(16,3)
        def forward(self, x):
            h = self.conv(x)
            h = self.bn(h.transpose(1,2).flatten(0,1)).view(len(x),-1,16).transpose(1,2) if self.rows else self.bn(h)
            return self.head(h.relu().mean(2))
    def accuracy(*cbs, rows=True):
        torch.manual_seed(0)
        y = torch.randint(3, (400,))
        learn = learner(Clouds(rows), torch.randn(400,3,200)*torch.tensor([.6,1.,1.6])[y][:,None,None], y, 1, *cbs)
        learn.fit(4, .02)
        return (learn.model.eval()(learn.dls.train_ds.tensors[0]).argmax(1)==y).float().mean().item()
    rows,positions = accuracy(RunBNCallback()),accuracy(RunBNCallback(), rows=False)
    assert rows>.8 and abs(rows-positions)<.03 and accuracy()<.6

def test_the_table_has_the_share_that_is():
    m = to_runbn(nn.Sequential(nn.BatchNorm1d(4)))
    for _ in range(300): m(torch.randn(256,4))
    seen = RunBNInterpretation(m, bs=1)
    assert seen.table().rho.item()==1 and 'rows are not samples' in seen.suggestions()[-1] and 'set_batch_size(model, 1)' in seen.suggestions()[-1]
    set_batch_size(m, 1)
    for _ in range(300): m(torch.randn(256,4))
    rho = RunBNInterpretation(m, bs=1).table().rho.item()
    old,x = m[0].window_mean.clone(),torch.randn(256,4)
    m(x)
    got = ((m[0].window_mean-old)/(x.mean(0)-old)).median().item()
    assert rho==pytest.approx(got, rel=1e-3) and 1/201<rho<.2

# filters

def test_zeros_of_pruned_nets_stay_and_the_rest_keeps_its_mean():
    model = to_runbn(net())
    for _ in range(3): model(batch())
    w = model[0].weight
    with torch.no_grad(): w *= w.abs()>w.abs().median()
    zeros,means = w==0,w.sum((1,2,3))
    opt = torch.optim.Adam(model.parameters(), .01)
    FilterMeans(model).on(opt)
    for _ in range(5):
        opt.zero_grad()
        model(batch()).square().mean().backward()
        w.grad *= ~zeros
        opt.step()
    assert torch.equal(w==0, zeros)
    same(w.sum((1,2,3)), means, 1e-9)

def left_alone(model, **kwargs): return {k.removesuffix('.weight'):why for k,why in FilterMeans(model, **kwargs).left.items()}
def test_filters_that_the_user_keeps_fixed():
    model = nn.Sequential(*[m for _ in range(4) for m in (nn.Conv2d(4,4,1), nn.BatchNorm2d(4))], nn.Conv2d(4,4,1), nn.BatchNorm2d(4))
    model[2].weight.requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[4])
    model[6].weight = model[8].weight                                             # tied
    to_runbn(model)
    assert left_alone(model)=={'2':'frozen','4':'parametrized','6':'shared','8':'shared'}
    assert left_alone(model, params=[])=={'0':'not in the optimizer','2':'frozen','4':'parametrized','6':'shared','8':'shared'}
    before = {k:v.clone() for k,v in model.state_dict().items()}
    means = FilterMeans(model)
    means.after_step()
    assert [k for k,v in model.state_dict().items() if not torch.equal(v, before[k])]==['0.weight']
    assert repr(means)=="Filters of convolutions: 1 keep their means, 1 left alone (frozen: 2), 1 left alone (parametrized: 4), 2 left alone (shared: 6, 8)"

def test_an_optimizer_without_some_filters():
    model = to_runbn(net())
    means = FilterMeans(model).on(torch.optim.SGD(model[3:].parameters(), .1))
    assert list(means.filters)==['3.weight'] and means.left=={'0.weight':'not in the optimizer'}

def test_a_pruned_net_under_the_callback():
    "Masked gradients, as sparsifying callbacks have it, and torch's own pruning"
    class Mask(Callback):
        def before_fit(self): self.masks = [(p,p!=0) for p in self.model.parameters() if p.ndim==4]
        def before_step(self): [p.grad.mul_(k) for p,k in self.masks]
    for pruned in (False,True):
        model = net().float()
        for _ in range(3): model(batch().float())
        if pruned:
            for m in (model[0],model[3]): prune.l1_unstructured(m, 'weight', .5)
        else:
            for m in (model[0],model[3]): m.weight.data *= m.weight.abs()>m.weight.abs().median()
        def share(): return [(m.weight==0).float().mean().item() for m in (model[0],model[3])]
        before,learn = share(),learner(model, torch.randn(8,3,6,6), torch.arange(8)%2, 2, RunBNCallback(), *([] if pruned else [Mask()]))
        learn.fit(2, .05)
        assert share()==before and all(s>.45 for s in before)
        assert ('2 with zeros that stay' if not pruned else "parametrized") in learn.run_bn.report.filters

# the loss scale

def grads_with(scaler, tell=False, events=()):
    torch.manual_seed(1)
    model = to_runbn(net()).float()
    opt,out = torch.optim.SGD(model.parameters(), 1e-3),[]
    if tell: follow_scaler(model, scaler)
    for i,(x,y) in enumerate(zip(torch.randn(60,2,3,8,8), torch.randint(2, (60,2)))):
        opt.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.unscale_(opt)
        out.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        if i in events: model[0].weight.grad[0] = float('inf') if scaler.is_enabled() else 0.
        if i in events and not scaler.is_enabled(): continue                      # the step that a scaler skips
        if i in events:
            scaler._per_optimizer_states[id(opt)]['found_inf_per_device'] = {torch.device('cpu'):torch.tensor(1.)}
        scaler.step(opt); scaler.update()
    return out,scaler.get_scale(),model

@pytest.mark.parametrize('tell', [False,True], ids=['by itself','told'])
def test_running_gradients_follow_a_scale_that_doubles_halves_and_skips(tell):
    plain,*_ = grads_with(torch.amp.GradScaler('cpu', enabled=False), events=(17,33))
    scaled,scale,model = grads_with(torch.amp.GradScaler('cpu', init_scale=2.**12, growth_interval=7), tell, (17,33))
    assert scale!=2.**12
    for i,(a,b) in enumerate(zip(plain, scaled)): assert (a-b).norm() < 1e-2*a.norm(), i
    assert max(m.window_grad.abs().max() for m in norms(model)) < 1               # in the unit of the loss itself

def test_running_gradients_follow_a_scale_in_the_callback():
    "As fastai's MixedPrecision scales, on a CPU; the scale grows, and one step overflows and is skipped"
    class Scaler(Callback):
        order = 10
        def __init__(self, enabled): self.enabled,self.seen = enabled,[]
        def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**12, growth_interval=5, enabled=self.enabled)
        def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
        def before_step(self):
            scale,skip = self.scaler.get_scale(),len(self.seen)==12
            for p in self.model.parameters(): p.grad /= scale
            self.seen.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]).clone())
            self.scales = getattr(self, 'scales', [])+[scale]
            if self.enabled: self.scaler.update(scale*(.5 if skip else 2. if len(self.seen)%5==0 else 1.))
            if skip: raise CancelStepException
        def after_fit(self): self.learn.scaler = None
    def run(enabled):
        torch.manual_seed(2)
        xs,scaler = torch.randn(80,3,8,8),Scaler(enabled)
        learner(net().float(), xs, torch.arange(80)%2, 2, RunBNCallback(), scaler).fit(1, .01)
        return scaler
    plain,scaled = run(False),run(True)
    assert len(plain.seen)==len(scaled.seen)==40 and len(set(scaled.scales))>4
    for i,(a,b) in enumerate(zip(plain.seen, scaled.seen)): assert (a-b).norm() < 1e-2*a.norm(), i

@pytest.mark.skipif(not (shutil.which('g++') or shutil.which('clang++')), reason='Inductor needs a C++ compiler')
def test_a_compiled_model_follows_the_scaler_that_it_was_told():
    torch._dynamo.reset()
    plain = to_runbn(net())
    scaled = follow_scaler(deepcopy(plain), scaler := torch.amp.GradScaler('cpu', init_scale=2.**8))
    compiled = torch.compile(scaled)
    for i in range(6):
        x = batch()
        for m in (plain,scaled): m.zero_grad()
        plain(x).square().mean().backward()
        scaler.scale(compiled(x).square().mean()).backward()
        for p,q in zip(plain.parameters(), scaled.parameters()): torch.testing.assert_close(q.grad/scaler.get_scale(), p.grad, rtol=1e-9, atol=1e-12)
        scaler._scale.mul_(4 if i%2 else .5)                                      # as update does, in place
    for a,b in zip(norms(plain), norms(scaled)): same(b.window_grad, a.window_grad, 1e-10)

def test_a_backward_that_ended_in_an_error_leaves_no_scale():
    m = norm()
    scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x*1
        @staticmethod
        def backward(ctx, g): raise KeyError('here')
    for _ in range(3): m(batch().requires_grad_()).sum().backward()
    with pytest.raises(KeyError): scaler.scale(Stop.apply(m(batch().requires_grad_())).pow(3).sum()).backward()
    twin = deepcopy(m)
    x = batch().requires_grad_()
    z = x.detach().clone().requires_grad_()
    (m(x)**3).sum().backward(); (twin(z)**3).sum().backward()
    same(x.grad, z.grad); same(m.window_grad, twin.window_grad)

def autocast_backward(m, dtype):
    with torch.autocast('cpu', dtype): loss = m(torch.randn(2,3,8,8)).float().square().mean()
    loss.backward()

def half_net(): return to_runbn(net()).float()
def test_float16_autocast_without_a_scale_is_a_warning():
    from fastai_runbn import functional
    functional._warn_of_no_scale.cache_clear()
    with pytest.warns(UserWarning, match=r'follow_scaler\(model, scaler\).*bfloat16 needs nothing') as w:
        model = half_net()
        for _ in range(2): autocast_backward(model, torch.float16)
    assert sum('follow_scaler' in str(o.message) for o in w)==1

@pytest.mark.parametrize('dtype,told', [(torch.bfloat16,False), (torch.float16,True)], ids=['bfloat16','told that there is none'])
def test_no_warning_where_there_is_nothing_to_say(dtype, told):
    from fastai_runbn import functional
    functional._warn_of_no_scale.cache_clear()
    model = half_net()
    if told: follow_scaler(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        autocast_backward(model, dtype)

def test_a_loop_without_the_scaler_after_one_with_it():
    "The scale of a scaler that was followed is not the scale of what is not scaled"
    scaler,m = torch.amp.GradScaler('cpu', init_scale=2.**16),norm()
    follow_scaler(m, scaler)
    for _ in range(5): scaler.scale(m(batch().requires_grad_()).pow(3).mean()).backward()
    twin = deepcopy(m)                                                            # which follows nothing
    x = batch().requires_grad_()
    z = x.detach().clone().requires_grad_()
    (m(x)**3).mean().backward(); (twin(z)**3).mean().backward()
    same(x.grad, z.grad); same(m.window_grad, twin.window_grad)

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
    subprocess.run([sys.executable,'-c',code], input=pickle.dumps(to_runbn(net())), check=True)

def test_a_scaler_without_a_scale_is_an_error():
    class Other:
        def is_enabled(self): return True
        def scale(self, x): return x
    with pytest.raises(TypeError, match='follow_scaler: Other'): follow_scaler(half_net(), Other())

def test_lightning_with_a_scaler():
    "Its own precision plugin, with a scaler on the CPU: gradients after unscaling, with and without"
    import lightning as L
    from lightning.pytorch.plugins import MixedPrecision
    from torch.utils.data import DataLoader,TensorDataset
    data = TensorDataset(torch.randn(80,3,8,8), torch.arange(80)%2)
    class Module(L.LightningModule):
        def __init__(self): super().__init__(); self.net,self.seen = to_runbn(net()).float(),[]
        def training_step(self, b, i): return nn.functional.cross_entropy(self.net(b[0]), b[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), 1e-3)
        def on_before_optimizer_step(self, opt): self.seen.append(torch.cat([p.grad.flatten() for p in self.parameters()]))
    class Plugin(MixedPrecision):
        def __init__(self, scaler): super().__init__('bf16-mixed', 'cpu'); self.scaler = scaler
        def forward_context(self): return torch.autocast('cpu', enabled=False)
    def run(scaler):
        module = Module()
        L.Trainer(max_epochs=1, accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, plugins=[Plugin(scaler)]).fit(module, DataLoader(data, batch_size=2))
        return module.seen
    plain,scaled = run(None),run(torch.amp.GradScaler('cpu', init_scale=2.**9, growth_interval=5))
    assert len(plain)==len(scaled)==40
    for a,b in zip(plain, scaled): assert (a-b).norm() < 1e-2*a.norm()

def test_accelerate_with_a_scaler():
    from accelerate import Accelerator
    def run(scaled):
        acc = Accelerator(cpu=True)
        if scaled: acc.scaler = torch.amp.GradScaler('cpu', init_scale=2.**9, growth_interval=5)
        model = to_runbn(net()).float()
        opt = torch.optim.SGD(model.parameters(), 1e-3)
        model,opt = acc.prepare(model, opt)
        torch.manual_seed(4)
        out = []
        for x,y in zip(torch.randn(40,2,3,8,8), torch.randint(2, (40,2))):
            opt.zero_grad()
            acc.backward(nn.functional.cross_entropy(model(x), y))
            if scaled: acc.scaler.unscale_(opt.optimizer)
            out.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
            opt.step()
        return out,acc.scaler and acc.scaler.get_scale()
    (plain,_),(scaled,scale) = run(False),run(True)
    assert scale>2.**9
    for a,b in zip(plain, scaled): assert (a-b).norm() < 1e-2*a.norm()

# names

def test_a_star_import_brings_what_a_user_types():
    names = {n for n in vars(public) if not n.startswith('_')}
    assert names=={'AdaptiveWindow','FilterMeans','GraphCallback','GraphedForward','LESSON10',
        'RunBNCallback','RunBNInterpretation','RunBNRecorder','RunBNSchedule','RunningBatchNorm1d',
        'RunningBatchNorm2d','RunningBatchNorm3d','WarmupClamp','follow_scaler',
        'from_lesson10','lesson10_weight','register_norm','set_batch_size','surgery_report',
        'sync_window','to_bn','to_runbn'}

def quantizable(train=False): return trained(to_runbn(net()).float(), 0).train(train)
@pytest.mark.parametrize('train', [False,True], ids=['eager','qat'])
def test_fusing_says_what_to_do(train):
    import torch.ao.quantization as q
    fuse = q.fuse_modules_qat if train else q.fuse_modules
    for names in (['0','1'],['0','1','2']):
        with pytest.raises(RuntimeError, match=r'RunningBatchNorm2d is not fused. `to_bn\(model\)` first'): fuse(quantizable(train), [names])
    assert type(fuse(to_bn(quantizable(train)), [['0','1','2']])[1]) is nn.Identity

def test_graph_mode_quantization_works_and_says_what_is_better():
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx,prepare_fx
    x = torch.randn(4,3,12,12)
    def off(model):
        p = prepare_fx(deepcopy(model), get_default_qconfig_mapping('fbgemm'), (x,))
        for _ in range(3): p(x)
        return ((convert_fx(p)(x)-model(x)).norm()/model(x).norm()).item()
    model = to_runbn(net()).float()
    for _ in range(9): model(torch.randn(4,3,12,12))
    model.eval()
    with pytest.warns(UserWarning, match=r'`to_bn\(model\)` first, then quantize'): assert off(model)<.2
    assert off(to_bn(model))<.2

def test_jit_script_says_what_to_do():
    for make in (net, lambda: nn.Sequential(timm.layers.BatchNormAct2d(3, act_layer=nn.SiLU)).double()):
        model = to_runbn(make()).eval()
        with pytest.raises(RuntimeError, match=r'torch.jit.script.*`to_bn\(model\)` first'): torch.jit.script(model)
    x = batch()
    want = model(x)
    same(torch.jit.script(to_bn(model))(x), want)

def test_scale_of_a_loss_ends_with_its_backward():
    "A loss that is not scaled after one that is, without a forward between them"
    x = torch.randn(2,3,4,5,5)
    def trained(*scales):
        norm = RunningBatchNorm2d(4)
        ys = [norm(o) for o in x]
        for y,scale in zip(ys, scales): scale(y.square().sum()).backward()
        return norm.window_grad
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    plain = nn.Identity()
    have = trained(lambda loss: scaler.scale(loss), plain)
    torch.testing.assert_close(have, trained(plain, plain))

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

@pytest.mark.parametrize('backend', backends)
def test_an_adaptive_window_forgets_channel_by_channel(backend):
    "What it knows of a channel is of the statistics that the channel had"
    layer = RunningBatchNorm2d(3, backend=backend, window=AdaptiveWindow())
    for t in range(20): layer(torch.randn(4,3,5,5)+t/5)
    known,length = layer.window_innovations.clone(),layer.window_innovations[0,0]
    assert (known[1]==19).all() and length<50
    layer.running_mean[1] += 7
    x = torch.randn(4,3,5,5)
    layer(x)
    assert layer.window_innovations[1].tolist()==[20,1,20]
    torch.testing.assert_close(layer.window_mean[1], layer.known_mean[1], rtol=1, atol=1)
    assert layer.window_innovations[0,1]==200 # the longest, as of a trained model
    layer.reset_running_stats()
    assert not layer.window_innovations.any()

@pytest.mark.parametrize('backend', backends)
def test_the_window_follows_channel_by_channel(backend):
    "Who writes statistics of some channels has the windows of those start anew, of no others"
    layer,x = RunningBatchNorm2d(3, backend=backend),torch.randn(4,3,5,5)
    for _ in range(8): layer(x)
    untouched = deepcopy(layer)
    layer.running_mean[1] += 7
    layer.refresh_window()
    assert layer.window_mean[1]==layer.running_mean[1] and layer.window_count[1]==-1
    assert (layer.window_grad[:,1]==0).all()
    layer,written = deepcopy(untouched),untouched.running_mean[1]+7
    layer.running_mean[1] = written
    for o in (layer,untouched): o(x)
    assert (layer.window_mean-untouched.window_mean).abs().tolist()[::2]==[0,0]
    torch.testing.assert_close(layer.window_mean[1], written+4/200*(x[:,1].mean()-written))
