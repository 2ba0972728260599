"Interpretation on learners of every kind: it changes nothing, also where something fails, and its figures are labelled"
import random
import numpy as np,pytest,torch
import matplotlib.pyplot as plt
from torch import nn
from fastai_runbn.all import RunBNCallback,RunBNInterpretation,RunBNRecorder,to_runbn
from fastai_runbn.bench.peers import use_norm
from fastai_runbn.moments import AdaptiveWindow,lesson10_weight
from learners import assert_same,fit,make,running,trained_stats

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def everything(model): return {n:t.detach().clone() for n,t in (*model.named_parameters(),*model.named_buffers())}
def modes(model): return [m.training for m in model.modules()]
def n_hooks(model): return sum(len(m._forward_hooks) for m in model.modules())
def fitted(kind, n=1):
    learn = make(kind, [RunBNCallback(),RunBNRecorder(every=2)], bs=4)
    fit(learn, n)
    return learn

@pytest.mark.parametrize('kind', ['plain','vision','unet','tabular'])
def test_nothing_moves(kind):
    learn = fitted(kind)
    learn.model.train()
    interp = RunBNInterpretation.from_learner(learn)
    def state(): return everything(learn.model),modes(learn.model),n_hooks(learn.model)
    def numbers(): return random.getstate(),str(np.random.get_state()),torch.get_rng_state().tolist()
    (before,*rest),drawn = state(),numbers()
    df,gap = interp.table(),interp.gap(n_batches=3)
    interp.suggestions()
    interp.plot_gap(n_batches=2)
    interp.plot_window(n_batches=3)
    interp.plot_layers()
    interp.compare({'a':learn}, n_batches=2)
    after,*rest_after = state()
    assert_same(before, after)
    assert (rest,drawn) == (rest_after,numbers())
    assert len(df)==len(gap)==len(running(learn)) and gap.notna().all(axis=None)
    assert all(m.path is not None for m in running(learn))

def test_a_graph_in_a_hook_is_no_obstacle():
    "A U-Net's hooks hold activations with a graph after a training step, and deepcopy of the model would fail"
    learn = make('unet', RunBNCallback(), bs=2)
    fit(learn)
    learn.model.train()(next(iter(learn.dls.train))[0])
    assert len(RunBNInterpretation.from_learner(learn).gap(n_batches=2))==len(running(learn))

@pytest.mark.parametrize('method', ['gap','plot_window'])
def test_an_error_in_the_model_leaves_it_as_it_was(method):
    net = to_runbn(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(5,3,1))).train()
    before = everything(net)
    with pytest.raises(RuntimeError): getattr(RunBNInterpretation(net, [torch.randn(4,3,5,5)], bs=2), method)()
    assert_same(before, everything(net))
    assert all(modes(net)) and n_hooks(net)==0

def test_hooks_of_the_user_stay_and_copies_have_none():
    net,calls = to_runbn(nn.Sequential(nn.BatchNorm2d(3))),[]
    net[0].register_forward_hook(lambda m,x,y: calls.append(m))
    RunBNInterpretation(net, [torch.randn(4,3,5,5)], bs=2).gap()
    assert n_hooks(net)==1 and set(calls)=={net[0]}

def test_gap_is_the_difference_of_the_outputs():
    net,x = to_runbn(nn.Sequential(nn.BatchNorm2d(3))).double(),torch.randn(4,3,5,5).double()
    trained_stats(net)
    net[0].seed_window()
    df = RunBNInterpretation(net, [x], bs=4).gap()
    y = net.eval()(x)
    d = net.train()(x)-y
    want = (d.square().sum()/(y-y.mean((0,2,3), keepdim=True)).square().sum()).sqrt().item()
    assert df.loc['0'].tolist() == pytest.approx([want,want], rel=1e-4)

def test_inplace_activations():
    "An activation in place after the norm does not reach what was noted of its output"
    nets = [to_runbn(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=i), nn.BatchNorm2d(3))) for i in (False,True)]
    for n in nets:
        trained_stats(n)
        for m in (n[0],n[2]): m.seed_window()
    a,b = [RunBNInterpretation(n, [torch.ones(4,3,5,5)+torch.arange(4)[:,None,None,None]], bs=2).gap() for n in nets]
    assert a.equals(b)

def test_batchnorm_with_one_value_says_what_to_do():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12,4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match='`2`, a BatchNorm1d, cannot train on one value per channel'):
        RunBNInterpretation.compare({'bn':net}, dl=[torch.randn(4,3,2,2)], bs=1)

def test_without_data_or_norms():
    with pytest.raises(ValueError, match='has no running norm'): RunBNInterpretation(nn.Linear(2,2))
    interp = RunBNInterpretation(to_runbn(nn.Sequential(nn.BatchNorm1d(3))))
    assert interp.table().rho.tolist()==[1.]
    with pytest.raises(ValueError, match='give `dl`'): interp.gap()
    with pytest.raises(ValueError, match='neither running norms nor BatchNorm'): interp.compare({'x':nn.Linear(2,2)}, dl=[torch.randn(4,2)], bs=2)
    with pytest.raises(ValueError, match='one to 6 learners'): interp.compare({})

def test_table_of_a_loaded_checkpoint():
    net = to_runbn(nn.Sequential(nn.BatchNorm1d(3)))
    net.load_state_dict({**net.state_dict(), '0.num_batches_tracked':torch.tensor(50), '0.running_mean':torch.ones(3)})
    assert RunBNInterpretation(net, bs=2).table().rho.isna().all()              # of a window of unknown size

def test_rho_is_what_the_next_batch_gets():
    for window,trained in ((20,False),(lesson10_weight,False),(20,True)):
        net = nn.Sequential(nn.BatchNorm1d(3)).double()
        if trained: net[0].running_mean.fill_(1)                                # without `num_batches_tracked`
        to_runbn(net, window=window)
        if trained: net(torch.randn(2,3,4).double())
        for t in range(12):
            rho,old = RunBNInterpretation(net, bs=2).table().rho.item(),net[0].window_mean.clone()
            x = torch.randn(2,3,4).double()
            net(x)
            assert ((net[0].window_mean-old)/(x.mean((0,2))-old)).tolist() == pytest.approx([rho]*3, rel=2e-3), t

def test_rho_of_an_adaptive_window_is_that_of_its_median_channel():
    net = to_runbn(nn.Sequential(nn.BatchNorm1d(5)), window=AdaptiveWindow(50)).double()
    for t in range(300):
        rho = RunBNInterpretation(net, bs=2).table().rho.item() if t%20<2 else None
        x = torch.randn(2,5,4).double()+torch.tensor([0,0,.1,.5,1]).view(1,5,1)*t
        old = net[0].window_mean.clone()
        net(x)
        got = (net[0].window_mean-old)/(x.mean((0,2))-old)
        if rho: assert got.median().item()==pytest.approx(rho, rel=1e-6), t
    assert got[3:].min()>3*got[0]   # what moves has a shorter window

def test_rho_of_an_adaptive_window_from_a_file():
    "Which does not say how many values the last batch had"
    def net():
        kw = dict(window=AdaptiveWindow(50), persistent_window=True)
        return to_runbn(nn.Sequential(nn.BatchNorm1d(3)), **kw).double()
    trained,loaded = net(),net()
    for t in range(200): trained(torch.randn(2,3,4).double()+t)        # windows are short
    loaded.load_state_dict(trained.state_dict())
    rho = RunBNInterpretation(loaded, bs=2).table().rho.item()
    old,x = loaded[0].window_mean.clone(),torch.randn(2,3,4).double()+200
    loaded(x)
    got = (loaded[0].window_mean-old)/(x.mean((0,2))-old)
    assert rho==pytest.approx(got.median().item(), rel=1e-2)

def test_wrapped_models():
    net = to_runbn(nn.Sequential(nn.BatchNorm2d(3)))
    for wrapped in (torch.compile(net, backend='eager'), nn.DataParallel(net)): assert list(RunBNInterpretation(wrapped).norms)==['0']

def test_recorder_counts_floor_hits_and_goes_on():
    learn = make('plain', [RunBNCallback(clamp=[1e6]*8),RunBNRecorder(every=3)], bs=4)
    fit(learn, pct=.02)                                                       # 7 batches
    rec = learn.run_bn_recorder
    assert {n:int(h) for n,h in rec.floored.items()} == {n:2*m.num_features for n,m in RunBNInterpretation(learn.model).norms.items()}  # 8 samples
    assert rec.looked=={n:2*m.num_features for n,m in RunBNInterpretation(learn.model).norms.items()}
    batches = rec.batches
    learn.validate()
    assert rec.batches==batches
    fit(learn, pct=.02)
    assert rec.batches==2*batches and [s for s,_ in rec.history['2']]==list(range(1,2*batches+1,3))
    assert "variance at the floor: in the first samples `2`" in RunBNInterpretation.from_learner(learn).suggestions()[0]
    rec.reset()
    assert rec.batches==0 and not rec.history

def test_figures_are_labelled():
    learn = fitted('vision')
    interp = RunBNInterpretation.from_learner(learn)
    for plot in (interp.plot_gap,interp.plot_window,interp.plot_layers):
        plot()
        fig = plt.gcf()
        fig.canvas.draw()
        axs = fig.axes
        assert all(ax.get_title() for ax in axs[:1]) and axs[-1].get_xlabel() and axs[0].get_ylabel()
        assert fig.legends or all(ax.get_legend() for ax in axs)
        for ax in axs:
            for label in (ax.xaxis.label,ax.yaxis.label,ax.title): assert fig.bbox.padded(1).contains(*label.get_window_extent().min) and fig.bbox.padded(1).contains(*label.get_window_extent().max), label
            boxes = [t.get_window_extent() for t in ax.get_xticklabels() if t.get_text()]
            assert not any(a.overlaps(b) for a,b in zip(boxes, boxes[1:])), plot

def tiled(make=None):
    "Two convolutions and a norm between: a position sees two to each side"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1,4,3,padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4,3,3,padding=1))
    if make: net = make(net)
    for _ in range(20): net(torch.randn(2,1,8,12,12)+torch.arange(12))
    return net

def test_tiles_of_volumes():
    "Equal to the bit beyond what padding reaches where the norm does not look at the tile; in two axes, the first has one tile"
    nets = dict(bn=tiled(), ours=tiled(to_runbn), gn=tiled(lambda m: use_norm(m, lambda C: nn.GroupNorm(2, C))))
    images = [(torch.randn(1,1,8,24,24)+torch.arange(24),)*2 for _ in range(3)]
    def mismatch(margin): return RunBNInterpretation.tile_mismatch(nets, (8,16,12), images, margin)
    beyond,whole = mismatch(2),mismatch(0)
    assert beyond.bn==beyond.ours==0 and beyond.gn>.01 and (whole>.001).all()
    before = {n:everything(m) for n,m in nets.items()}
    apart = RunBNInterpretation.disparity(nets, images, bs=1)
    assert apart.bn>.001 and apart.ours>0 and apart.gn==0
    for n,m in nets.items():
        for k,v in everything(m).items(): assert torch.equal(v, before[n][k])
    RunBNInterpretation.plot_tiles(nets, (8,16,12), images, label=2)
    assert len(plt.gcf().axes)==12 and plt.gcf().axes[0].get_ylabel()=='bn'
