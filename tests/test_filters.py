"Which filters keep their means, and at which; what takes their output, against forwards with NaN"
import gc
import pytest,timm,torch
from torch import nn
from torchvision.models import resnet18
from fastai.vision.all import DynamicUnet,create_body
from fastai_runbn.all import to_runbn
from fastai_runbn.filters import FilterMeans,next_layers

def drawn(net):
    filters = {n:p.detach() for n,p in net.named_parameters() if p.ndim>2}
    return {n:w.mean([*range(1, w.ndim)], keepdim=True) for n,w in filters.items()}

def kept(net, *args): return {n:mean for n,(_,mean,_) in FilterMeans(net, *args).filters.items()}

def same_means(got, want):
    assert got.keys()==want.keys()
    for n in got: assert torch.equal(got[n], want[n]), n

def test_filters_are_those_that_are_not_depthwise_nor_before_another_norm():
    layers = [
        nn.Conv1d(2,4,3), nn.BatchNorm1d(4),            # 0
        nn.Conv1d(4,4,3,groups=4), nn.BatchNorm1d(4),   # 2
        nn.Conv1d(4,8,3), nn.ReLU(), nn.BatchNorm1d(8), # 4
        nn.Conv1d(8,3,1), nn.GroupNorm(1,3),            # 7
        nn.Conv1d(3,4,1), nn.Linear(5,8), nn.BatchNorm1d(4), # 9
        nn.Conv1d(4,3,1), nn.PReLU(),                   # 12
        nn.ConvTranspose1d(3,4,1), nn.BatchNorm1d(4),   # 14
        nn.Conv1d(4,2,1), nn.BatchNorm1d(6),            # 16
        nn.Conv1d(4,4,1)]                               # 18
    net = to_runbn(nn.Sequential(*layers))
    want = {f'{i}.weight':drawn(net)[f'{i}.weight'] for i in (0,4,9,16)}
    for i in (0,4,16): want[f'{i}.weight'][::2] = 0       # before a norm
    same_means(kept(net), want)
    assert FilterMeans(net).left=={'2.weight':'depthwise','7.weight':'before a GroupNorm',
        '12.weight':'before a PReLU','18.weight':'last'}
    assert not kept(net, [])
    net[1](torch.randn(2,4,5))                                   # now it is trained,
    want['0.weight'] = drawn(net)['0.weight']
    same_means(kept(net), want)                                 # and stays what it is
    same_means(kept(net, ['6']), {n:m for n,m in want.items() if n in ('4.weight','9.weight')})
    FilterMeans(net).after_step()
    for n,m in drawn(net).items(): assert n not in want or torch.allclose(m, want[n], atol=1e-7)

@pytest.mark.parametrize('net,zero', [
    (lambda: nn.Sequential(nn.Conv2d(1,6,3), nn.BatchNorm2d(6)), True), # one channel of grey
    (lambda: nn.Sequential(nn.Conv3d(2,6,3), nn.ReLU(), nn.BatchNorm3d(6)), True), # as in lesson 10
    # they may be of a trained encoder without norms
    (lambda: nn.Sequential(nn.Conv2d(3,6,3), nn.Conv2d(6,6,3), nn.Linear(3,3), nn.BatchNorm2d(6)),
        False)],
    ids=['grey','norm after ReLU','no norm'])
def test_every_second_filter_before_an_untrained_norm_has_a_mean_of_zero(net, zero):
    net = to_runbn(net())
    want = drawn(net)
    if zero: want['0.weight'][::2] = 0
    same_means(kept(net), want)

def test_nothing_is_kept_without_running_norms():
    assert not kept(nn.Sequential(nn.Conv2d(2,4,3), nn.BatchNorm2d(4), nn.Conv2d(4,4,3)))

def test_norms_of_any_kind_can_be_named():
    "And those without statistics are taken for untrained"
    net = nn.Sequential(nn.Conv2d(2,4,3), nn.GroupNorm(2,4), nn.Conv2d(4,4,3), nn.BatchNorm2d(4))
    want = drawn(net)
    for mean in want.values(): mean[::2] = 0
    same_means(kept(net, ['1','3']), want)

class Taken(Exception): "The layer behind was called: nothing more is to be seen in this forward"

def first_taker(model, x, layer):
    "The first layer with parameters that is called with NaN when `layer` returns nothing else"
    seen,handles = [],[]
    def fill(m, args, y):
        seen.append(m)
        return torch.full_like(y, torch.nan)
    def look(m, args):
        if seen and args[0].isnan().any():
            seen.append(m)
            raise Taken
    try:
        handles.append(layer.register_forward_hook(fill))
        for m in model.modules():
            if m._parameters: handles.append(m.register_forward_pre_hook(look))
        model(x)
    except Taken: pass
    finally:
        for h in handles: h.remove()
    return seen[1] if len(seen)==2 else None

@pytest.mark.parametrize('name', ['resnet18','resnetv2_18','res2net50_14w_8s','dpn48b',
    'densenet121','hrnet_w18_small','mobilenetv3_small_050','ghostnet_050'])
@torch.no_grad()
def test_what_follows_a_convolution_is_what_takes_its_output(name):
    model = timm.create_model(name).eval()
    x,followers = torch.randn(1,3,64,64),next_layers(model)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    names = {m:n for n,m in model.named_modules()}
    got = {names[m]:names.get(followers[m]) for m in convs}
    assert got=={names[m]:names.get(first_taker(model, x, m)) for m in convs}

@pytest.mark.parametrize('name,weights', [
    # a shortcut is registered behind them
    ('resnetv2_18', ['stages.0.blocks.1.conv2','stages.1.blocks.1.conv2']),
    # lists of convolutions and of norms
    ('res2net50_14w_8s', ['layer1.0.convs.0','layer4.2.convs.5']),
    # two paths out of one
    ('dpn48b', ['features.conv2_1.c1x1_c1'])],
    ids=lambda o: o if isinstance(o, str) else '')
def test_norms_count_in_the_order_of_calls(name, weights):
    "Where modules are registered in another: every second filter has a mean of zero"
    filters = FilterMeans(to_runbn(timm.create_model(name))).filters
    for w in weights: assert not filters[f'{w}.weight'].mean[::2].any(), w

class Busy(nn.Module):
    "Leaves things in itself, draws random numbers, calls one convolution twice, and had a module"
    def __init__(self):
        super().__init__()
        self.gone = nn.Identity()
        self.gone = None
        self.conv,self.norms = nn.Conv2d(4,4,1),nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.list,self.dict,self.calls = [],{},0
        self.own_hooks = slice(3) # no dict, and not made without arguments
    def forward(self, x):
        self.seen,self.calls = x,self.calls+1
        assert self.gone is None
        for norm in self.norms: x = norm(self.conv(x))
        self.list.append(x)
        self.dict[self.calls] = x
        return x*torch.rand(3).sum()

def test_a_trace_leaves_nothing_behind():
    busy,called = to_runbn(Busy()),[]
    model = nn.Sequential(busy, nn.ReLU())
    for m in model.modules():
        m.register_forward_hook(lambda *args: called.append('after'))
        m.register_forward_pre_hook(lambda *args: called.append('before'))
    before = {m:dict(vars(m)) for m in model.modules()}
    drawn = torch.get_rng_state()
    assert next_layers(model)[busy.conv] is busy.norms[0]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (called,busy.list,busy.dict,busy.calls)==([],[],{},0)
    for m,attributes in before.items():
        assert vars(m).keys()==attributes.keys()
        assert all(vars(m)[k] is v for k,v in attributes.items())

def test_a_copy_that_goes_does_not_clean_up():
    "fastai's U-Net removes its hooks when it is deleted, and its decoder needs them"
    body = create_body(resnet18(), 3, pretrained=False)
    unet = to_runbn(DynamicUnet(body, 5, (32,32)))
    FilterMeans(unet)
    gc.collect()
    assert all(h.hook is not None and not h.removed for h in unet.sfs)
    assert unet(torch.randn(2,3,32,32)).shape==(2,5,32,32)

def test_wrappers_are_looked_into_and_not_run():
    "Compiled as a whole, in place or in part; scripted; and with several devices"
    ran = []
    class Parallel(nn.DataParallel):
        def forward(self, x): ran.append(x)
    def net(): return nn.Sequential(nn.Conv2d(4,4,1), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    in_place = to_runbn(net())
    in_place.compile(backend='eager')
    part = nn.Sequential(torch.compile(to_runbn(net()), backend='eager'), nn.Conv2d(4,4,1))
    models = {'_orig_mod.0':torch.compile(to_runbn(net()), backend='eager'), '0':in_place,
        '0._orig_mod.0':part, 'module.0':Parallel(to_runbn(net()))}
    for name,model in models.items():
        model.register_forward_pre_hook(lambda *args: 1/0)
        key = f'{name}.weight'
        assert not FilterMeans(model).filters[key].mean[::2].any(), type(model)
    assert not ran and FilterMeans(part).left=={'1.weight':'last'}
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4,4,1), nn.ReLU()))
    mixed = to_runbn(nn.Sequential(nn.Conv2d(4,4,1), scripted, nn.Conv2d(4,4,1), nn.BatchNorm2d(4)))
    kept = FilterMeans(mixed)
    assert [*kept.filters]==['2.weight'] and kept.left=={'0.weight':'before a RecursiveScriptModule'}

def test_what_cannot_be_traced_counts_as_it_is_registered():
    class OnValues(nn.Sequential):
        def forward(self, x): return super().forward(x if x.mean()>0 else -x)
    net = OnValues(nn.Conv2d(4,4,1), nn.BatchNorm2d(4), nn.Conv2d(4,4,1))
    assert [*next_layers(net).values()]==[net[1],net[2],None]
