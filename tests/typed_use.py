"""A user's code, and what a type checker says to it: `tests/test_types.py` has one read this file.
What is right is run too; in `wrong` each line is an error that is expected"""
from typing import Any
import pandas as pd
import torch
from torch import nn, Tensor
from torch.amp import GradScaler
from typing_extensions import assert_type
from fastai.learner import Learner
import fastai_runbn.all as typed
from fastai_runbn.all import *
from fastai_runbn.all import RunBNCallback,RunningBatchNorm2d,surgery_report,to_bn,to_runbn
from fastai_runbn.distributed import WindowSync
from fastai_runbn.filters import KeptMean
from fastai_runbn.functional import OwnWindow
from fastai_runbn.layers import RunningBatchNormMixin,runbn_settings,running_norms
from fastai_runbn.lightning import RunBNLightning
from fastai_runbn.surgery import NormRow,SurgeryReport

class Net(nn.Sequential): "A model of a class of its own, which converting keeps"
def net()->Net:
    return Net(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))

def models():
    "What goes in comes out, but for a dry run"
    model = net()
    assert_type(to_runbn(model, dry_run=True, window=60), SurgeryReport)
    assert_type(to_runbn(model), Net)
    assert_type(to_runbn(model, window=60, momentum=None, clamp=WarmupClamp()), Net)
    assert_type(to_runbn(model, '1', exclude=['3'], backend='formulas'), Net)
    assert_type(to_runbn(model, filter_fn=lambda m, name: m.training and name!='3'), Net)
    assert_type(to_runbn(model, **LESSON10), Net)
    assert_type(running_norms(model), list[RunningBatchNormMixin])
    assert_type(running_norms(model)[0].weight, nn.Parameter)
    assert_type(set_batch_size(model, 2), Net)
    assert_type(follow_scaler(model, GradScaler('cpu')), Net)
    assert_type(FilterMeans(model).on(torch.optim.SGD(model.parameters())), FilterMeans)
    assert_type(FilterMeans(model, ['1']).filters, dict[str,KeptMean])
    assert_type(sync_window(model, None), WindowSync|None)
    report = surgery_report(model, include='1')
    assert_type(report.rows, list[NormRow])
    assert_type(report.running[0].channels, int|None)
    assert_type(report.counts, str)
    assert_type(to_bn(model), Net)

def layers():
    "A layer is a BatchNorm, and has settings and buffers by name"
    layer = RunningBatchNorm2d(4, 1e-5, device='cpu', dtype=torch.float32, window=60)
    assert_type(layer, RunningBatchNorm2d)
    assert_type(layer.forward(torch.randn(2, 4, 3, 3)), Tensor)
    assert_type(layer.window_mean, Tensor)
    assert_type(layer.running_mean, Tensor|None)
    assert_type(layer.eval_window, int|None)
    assert_type(layer.path, str|None)
    assert_type(layer.keeper, OwnWindow)
    assert_type(layer.settings(), dict[str,Any])
    layer.running_grad = .5
    layer.set_settings(window=AdaptiveWindow(100), clamp=None)
    norm:nn.BatchNorm2d = layer
    return norm,RunningBatchNorm1d(4, **LESSON10),RunningBatchNorm3d(4, momentum=.1)

def callbacks():
    "They take the settings of layers as keywords"
    cb = RunBNCallback(window=60, running_grad=1, eval_window=None, exclude=('14',))
    assert_type(cb, RunBNCallback)
    assert_type(cb.means, FilterMeans|None)
    RunBNCallback(window=lesson10_weight, keep_means=True, graph=False, sync='layer')
    RunBNCallback(window=lambda bs, M: min(1., bs/60))
    RunBNCallback(**LESSON10)
    RunBNCallback(**LESSON10|{'window':60})
    RunBNCallback(**runbn_settings(clamp=[.01]))
    assert_type(RunBNSchedule(window=lambda pos: 20+80*pos), RunBNSchedule)
    assert_type(WarmupClamp(lambda pos: .01)[0], float)
    assert_type(GraphCallback(), GraphCallback)
    assert_type(RunBNLightning(window=60, batch_size=len), RunBNLightning)
    return [cb, RunBNRecorder(every=5)]

def looked_at(learn:Learner):
    "Of a Learner that has trained with `callbacks()`"
    interp = RunBNInterpretation.from_learner(learn)
    assert_type(interp, RunBNInterpretation)
    assert_type(interp.norms, dict[str,RunningBatchNormMixin])
    assert_type(interp.table(), pd.DataFrame)
    assert_type(interp.suggestions(), list[str])

def wrong(model:Net, learn:Learner, layer:RunningBatchNorm2d):
    "Never run"
    to_runbn(learn) # pyright: ignore[reportArgumentType]
    to_runbn(model, windw=60) # pyright: ignore[reportCallIssue]
    to_runbn(model, momentum='auto') # pyright: ignore[reportArgumentType]
    to_runbn(model, include=nn.BatchNorm2d) # pyright: ignore[reportArgumentType]
    to_runbn(model, dry_run=True).train() # pyright: ignore[reportAttributeAccessIssue]
    to_runbn(model, dry_run=True, windw=60) # pyright: ignore[reportCallIssue]
    surgery_report(model).count # pyright: ignore[reportAttributeAccessIssue]
    layer.set_settings(num_features=3) # pyright: ignore[reportCallIssue]
    RunningBatchNorm2d(4, windw=60) # pyright: ignore[reportCallIssue]
    RunningBatchNorm2d(4, window='long') # pyright: ignore[reportArgumentType]
    RunBNCallback(windw=60) # pyright: ignore[reportCallIssue]
    RunBNCallback(window=lambda bs: .1) # pyright: ignore[reportArgumentType]
    RunBNCallback(clamp=.01) # pyright: ignore[reportArgumentType]
    RunBNCallback(sync='steps') # pyright: ignore[reportArgumentType]
    RunBNCallback(backend='cuda') # pyright: ignore[reportArgumentType]
    RunBNLightning(graph=True) # pyright: ignore[reportCallIssue]
    RunBNSchedule(window=60) # pyright: ignore[reportArgumentType]
    sync_window(model, 'steps') # pyright: ignore[reportArgumentType]
    set_batch_size(model, 2.5) # pyright: ignore[reportArgumentType]
