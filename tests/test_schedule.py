"A clamp's picture, a schedule's errors, and what it leaves alone"
from types import SimpleNamespace
import matplotlib.pyplot as plt
import pytest,torch
from fastai.basics import Callback
from torch import nn
from fastai_runbn.callback import RunBNCallback
from fastai_runbn.layers import RunningBatchNorm1d,default_window
from fastai_runbn.schedule import RunBNSchedule,WarmupClamp
from learners import fit,make,running

parametrize = pytest.mark.parametrize

@parametrize('samples,beyond', [(10,4),(30,6)])
def test_a_clamps_picture(samples, beyond):
    "The floor by samples seen, as steps, and zeros a fifth beyond its end, four at least"
    clamp = WarmupClamp(lambda pos: .1*(1-pos), samples=samples)
    ax = clamp.plot(label='falls')
    line, = ax.lines
    x,y = line.get_data()
    assert list(x)==list(range(samples+beyond))
    assert list(y)==[*clamp]+[0]*beyond
    assert line.get_drawstyle()=='steps-post' and line.get_label()=='falls'
    assert (ax.get_xlabel(),ax.get_ylabel()) == ('samples seen','floor under the variance')
    assert clamp.plot(ax) is ax and len(ax.lines)==2
    plt.close('all')

def only_at(where, value): return lambda pos: value if pos==where else .5

errors = {
    'no schedule':(dict(), ValueError,
        r'^RunBNSchedule\(\): give at least one of window, running_grad and floor, '
        r'a fastai schedule each\.$'),
    'a constant':(dict(floor=.01), TypeError,
        r'^floor=0.01: a schedule was expected, such as SchedCos\(20, 100\); '
        r'a constant is a setting of RunBNCallback\.$'),
    'a floor below 0':(dict(floor=only_at(.5, -1.)), ValueError, 'clamp'),
    'wrong in the beginning':(dict(running_grad=only_at(0., 2.)), ValueError, 'running_grad=2.0'),
    'wrong in the end':(dict(running_grad=only_at(1., 2.)), ValueError, 'running_grad=2.0'),
    'an empty window':(dict(window=only_at(.25, 0.)), ValueError, 'window')}
@parametrize('settings,error,said', errors.values(), ids=errors)
def test_a_schedules_errors_come_before_the_fit(settings, error, said):
    with pytest.raises(error, match=said): RunBNSchedule(**settings)

class Look(Callback):
    "Settings of each running norm in every training step, as the forward finds them"
    order = RunBNSchedule.order+1
    def before_fit(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen += [self.settings(m) for m in running(self)]
    def settings(self, m):
        return SimpleNamespace(window=m.window, running_grad=m.running_grad,
            floor=m.clamp_floor.tolist(), names={*vars(m)})

def looked_at(learn, run):
    "What a `Look` has seen while `run` went on"
    look = Look()
    with learn.added_cbs(look): run()
    assert look.seen
    return look.seen

def test_a_floor_alone():
    "The other settings are left alone, and nothing else is written on a layer"
    learn = make('plain', RunBNCallback())
    fit(learn)
    usual = {*vars(running(learn)[0])}
    schedule = [RunBNSchedule(floor=lambda pos: .25)]
    for layer in looked_at(learn, lambda: fit(learn, cbs=schedule)):
        assert {*layer.floor}=={.25} # however many samples were seen
        assert (layer.window,layer.running_grad) == (default_window,1.)
        assert layer.names-usual=={'unscheduled'}

def test_a_learning_rate_search_schedules_nothing():
    "Its model and recorder are as without a schedule"
    learn = make('plain', [RunBNCallback(),RunBNSchedule(window=lambda pos: 50.)])
    def search(): learn.lr_find(num_it=5, show_plot=False, suggest_funcs=())
    for layer in looked_at(learn, search): assert not torch.is_tensor(layer.window)
    assert 'runbn_window' not in getattr(learn.recorder, 'hps', {})
    for layer in looked_at(learn, lambda: fit(learn)): assert torch.is_tensor(layer.window)
    assert 'runbn_window' in learn.recorder.hps

class Double(nn.Module):
    def forward(self, x): return x.double()

def test_each_dtype_has_a_tensor_of_its_own():
    learn = make('plain', RunBNSchedule(window=lambda pos: 50.))
    layers = RunningBatchNorm1d(10),RunningBatchNorm1d(10),RunningBatchNorm1d(10).double()
    learn.model = nn.Sequential(learn.model, *layers[:2], Double(), layers[2])
    windows = [layer.window for layer in looked_at(learn, lambda: fit(learn))[:3]]
    assert [w.dtype for w in windows]==[torch.float32,torch.float32,torch.float64]
    assert windows[0] is windows[1]
