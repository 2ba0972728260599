"Small learners on embedded data, seeded and silent: the same weights, data and order every time"
import pandas as pd,torch
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet18
from fastai.callback.all import ShortEpochCallback
from fastai.basics import DataLoaders,default_device,set_seed
from fastai.tabular.all import CategoryBlock,Normalize,TabularDataLoaders,tabular_learner
from fastai.vision.all import CrossEntropyLossFlat,Learner,SGD,accuracy,unet_learner,vision_learner
from sklearn.datasets import load_digits
from fastai_runbn.bench.tasks import digits_dls,lesson10_convnet
from fastai_runbn.layers import RunningBatchNormMixin

def plain(cbs=None, bs=32, **kw):
    kw = {'opt_func':SGD, 'lr':.1, **kw}
    return Learner(digits_dls(bs), lesson10_convnet(),
        metrics=accuracy, cbs=cbs, **kw)

def _vision(arch, cbs, bs, kw):
    kw = {'lr':3e-3, **kw}
    dls = digits_dls(bs, size=32)
    return vision_learner(dls, arch, n_in=1, n_out=10,
        pretrained=False, normalize=False, metrics=accuracy, cbs=cbs, **kw)
def vision(cbs=None, bs=16, **kw):
    return _vision(resnet18, cbs, bs, kw)
def timm(cbs=None, bs=16, **kw):
    return _vision('lcnet_035', cbs, bs, kw)

def unet(cbs=None, bs=4, **kw):
    "Which pixels of a digit are ink"
    dls = digits_dls(16, size=32)
    x = torch.cat([b[0] for b in dls.valid])[:64]
    ink = (x[:,0]>.5).long()
    train = TensorDataset(x[:48], ink[:48])
    valid = TensorDataset(x[48:], ink[48:])
    dls = DataLoaders.from_dsets(train, valid, bs=bs, device=default_device())
    return unet_learner(dls, resnet18, n_in=1, n_out=2,
        pretrained=False, normalize=False, cbs=cbs,
        loss_func=CrossEntropyLossFlat(axis=1), **{'lr':1e-3, **kw})

def tabular(cbs=None, bs=32, **kw):
    "Digits from the pixels of their three middle rows"
    digits = load_digits()
    names = [f'p{i}' for i in range(20,44)]
    df = pd.DataFrame(digits.data[:640,20:44], columns=names)
    df = df.assign(y=digits.target[:640].astype(str))
    dls = TabularDataLoaders.from_df(df, procs=[Normalize],
        cont_names=names, y_names='y', y_block=CategoryBlock(),
        valid_idx=list(range(512,640)), bs=bs)
    dls.raw = df
    return tabular_learner(dls, layers=[32,16],
        metrics=accuracy, cbs=cbs, **{'lr':1e-2, **kw})

makers = dict(plain=plain, vision=vision, timm=timm,
    unet=unet, tabular=tabular)

def make(kind, cbs=None, seed=3, path=None, **kw):
    "A seeded learner that shows nothing"
    set_seed(seed)
    learn = makers[kind](cbs, **kw)
    if hasattr(learn, 'progress'): learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    if path: learn.path = path
    return learn

def short(pct=.05): return ShortEpochCallback(pct, short_valid=False)
def fit(learn, n=1, lr=1e-3, cbs=(), pct=.05):
    "A short one: `pct` of each epoch"
    learn.fit(n, lr, cbs=[short(pct),*cbs])

def of_class(model, cls):
    return [m for m in model.modules() if isinstance(m, cls)]
def norms(learn): return of_class(learn.model, nn.modules.batchnorm._BatchNorm)
def running(learn):
    return [m for m in norms(learn) if isinstance(m, RunningBatchNormMixin)]

def copied(named): return {k:v.clone() for k,v in named}
def state(model):
    "Of everything, to compare with"
    return copied((*model.named_parameters(),*model.named_buffers()))
def five(model):
    "Of what a checkpoint has, to compare with"
    return copied(model.state_dict().items())
def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a: assert torch.equal(a[k], b[k]), k
def trained_stats(model):
    "Statistics as after some training, so that nothing is at its initial value"
    g = torch.Generator().manual_seed(5)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(generator=g)
            m.running_var.uniform_(.5, 2, generator=g)
            m.num_batches_tracked.fill_(100)
