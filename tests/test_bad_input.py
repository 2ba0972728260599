"Bad input: an error or a warning that names the thing and the remedy, and nothing half converted"
import warnings
from functools import partial
from copy import deepcopy
import pytest,torch
from torch import nn
from fastai_runbn.all import (RunBNCallback,RunBNSchedule,RunningBatchNorm2d,
    register_norm,surgery_report,to_bn,to_runbn)
from fastai_runbn.layers import RunningBatchNormMixin
from fastai_runbn.moments import AdaptiveWindow
from learners import fit,make,norms,running

def net():
    return nn.Sequential(
        nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4,4,3), nn.BatchNorm2d(4))
def untouched(model):
    "No norm is a running one, or has a buffer more"
    assert not any(isinstance(m, RunningBatchNormMixin) for m in model.modules())
    plain = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    assert all(len(list(m.buffers()))==3 for m in plain)

def test_a_model_without_norms_is_a_warning_that_names_those_it_has():
    said = 'Nothing to convert in Sequential.*1 GroupNorm, 1 LayerNorm.*surgery_report'
    model = nn.Sequential(nn.GroupNorm(2,4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match=said): to_runbn(model)
    learn = make('plain', RunBNCallback())
    learn.model = nn.Sequential(nn.Flatten(), nn.Linear(784,10))
    with pytest.warns(UserWarning, match='Nothing to convert'): fit(learn)

@pytest.mark.parametrize('f', [to_runbn,to_bn,surgery_report])
@pytest.mark.parametrize('bad',
    ['resnet18', None, nn.BatchNorm2d, [nn.BatchNorm2d(3)]],
    ids=['str','None','class','list'])
def test_what_is_no_model_is_an_error(f, bad):
    with pytest.raises(TypeError, match='model: an nn.Module was expected, not a'):
        f(bad)

@pytest.mark.parametrize('arg', ['include','exclude'])
def test_an_unknown_pattern_names_the_layers_there_are(arg):
    model = net()
    said = f"{arg}='bn7' matches no norm layer. Their names are '1', '4'"
    with pytest.raises(ValueError, match=said): to_runbn(model, **{arg:'bn7'})
    untouched(model)
    learn = make('plain', RunBNCallback(**{arg:'bn7'}))
    with pytest.raises(ValueError, match='matches no norm layer'): fit(learn)
    assert not running(learn)

def test_a_container_is_suggested_for_a_name_only():
    def said(pattern):
        with pytest.raises(ValueError) as e: to_runbn(net(), exclude=pattern)
        return str(e.value)
    assert said('head').endswith("a container's layers are 'head.*'.")
    assert said('head.*').endswith("Their names are '1', '4'.")

def test_a_converted_model_passed_twice_changes_nothing():
    model = to_runbn(net(), running_grad=.3)
    model(torch.randn(2,3,8,8))
    before = deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        to_runbn(model)
        to_runbn(model)
    for (k,a),b in zip(before.named_buffers(), model.buffers()):
        assert torch.equal(a, b), k
    assert model[1].running_grad == .3
    assert to_bn(to_bn(model)) is model

def test_a_lazy_layer_is_a_warning_with_the_remedy():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d())
    remedy = "'1'.*Run a batch through the model first, then convert"
    with pytest.warns(UserWarning, match=remedy): to_runbn(model)
    model(torch.randn(2,3,4,4))
    rows = surgery_report(to_runbn(model)).rows
    assert [r.status for r in rows] == ['running','running']

def test_a_callback_twice_is_a_warning_and_the_first_one_counts():
    callbacks = [RunBNCallback(running_grad=o) for o in (1.,0.)]
    learn = make('plain', callbacks)
    with pytest.warns(UserWarning, match='RunBNCallback is there twice.*remove_cb'):
        fit(learn)
    assert {m.running_grad for m in running(learn)} == {1.}

out_of_range = {
    'running_grad 2':dict(running_grad=2), 'window 0':dict(window=0),
    'window a word':dict(window='long'),
    'window gives 2':dict(window=lambda bs,M: 2.),
    'momentum 2':dict(momentum=2), 'eval_window 0':dict(eval_window=0),
    'clamp -1':dict(clamp=[-1]),
    'clamp nan':dict(clamp=[float('nan')])}
@pytest.mark.parametrize('kw', out_of_range.values(), ids=out_of_range)
def test_a_setting_out_of_range_is_an_error_at_once(kw):
    model = net()
    convert,layer = partial(to_runbn, model),partial(RunningBatchNorm2d, 3)
    for f in (convert,RunBNCallback,layer):
        with pytest.raises(ValueError, match=next(iter(kw))): f(**kw)
    untouched(model)
    with pytest.raises(TypeError, match='credti'): RunBNCallback(credti=1)

def test_missing_and_odd_keys_of_a_checkpoint_are_named(tmp_path):
    learn = make('plain', RunBNCallback(), path=tmp_path)
    fit(learn)
    learn.save('whole', with_opt=False)
    sd = torch.load(tmp_path/'models'/'whole.pth', weights_only=True)
    without = {k:v for k,v in sd.items() if k!='2.running_var'}
    odd = {**sd, '2.running_mean':torch.zeros(5)}
    cases = (('missing',without,'Missing key.*2.running_var'),
        ('odd',odd,'size mismatch for 2.running_mean'))
    for name,bad,said in cases:
        torch.save(bad, tmp_path/'models'/f'{name}.pth')
        with pytest.raises(RuntimeError, match=said):
            learn.load(name, with_opt=False)
    learn.load('whole', with_opt=False)

@pytest.mark.parametrize('at', [0,1,2])
def test_an_exception_in_the_middle_leaves_the_model_as_it_was(at, monkeypatch):
    model = nn.Sequential(*[nn.BatchNorm2d(3) for _ in range(3)])
    def look(m):
        buffers = [id(b) for b in m.buffers()]
        return type(m),m.momentum,sorted(vars(m)),buffers
    before = [look(m) for m in model]
    make_running,calls = RunningBatchNormMixin.make_running,[]
    def breaks(self, **kw):
        calls.append(self)
        if len(calls)==at+1: raise MemoryError('no memory')
        return make_running(self, **kw)
    monkeypatch.setattr(RunningBatchNormMixin, 'make_running', breaks)
    with pytest.raises(MemoryError): to_runbn(model)
    assert [look(m) for m in model] == before

def test_wrappers_for_many_gpus_are_refused_with_the_remedy():
    model = net()
    inside = nn.ModuleDict(dict(body=nn.DataParallel(model)))
    remedy = r'Convert before wrapping: `DataParallel\(to_runbn\(model\)\)`'
    for f in (to_runbn,to_bn,surgery_report):
        with pytest.raises(TypeError, match=remedy): f(nn.DataParallel(model))
        with pytest.raises(TypeError, match='`body` is wrapped in DataParallel'): f(inside)
    untouched(model)

def test_a_schedule_without_running_norms_does_no_harm():
    learn = make('plain', RunBNSchedule(running_grad=lambda pos: pos))
    fit(learn)
    assert not running(learn) and norms(learn)
    for bad in (dict(running_grad=.5),dict(floor='x')):
        with pytest.raises(TypeError, match='a schedule was expected'): RunBNSchedule(**bad)

def test_a_twin_that_is_none_is_an_error():
    class Mine(nn.BatchNorm2d): pass
    remedy = r'class RunningMine\(Mine, RunningBatchNorm2d\): pass'
    with pytest.raises(TypeError, match=remedy): register_norm(Mine, nn.BatchNorm2d)
    row = surgery_report(nn.Sequential(Mine(3))).rows[0]
    assert 'register_norm' in row.why

def test_an_adaptive_window_of_no_samples():
    with pytest.raises(ValueError) as e: AdaptiveWindow(0)
    assert str(e.value)=='AdaptiveWindow(0): a number of samples over 0 was expected.'
