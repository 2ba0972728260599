"What a user types: `from fastai_runbn.all import *`"
from fastai_runbn.moments import AdaptiveWindow,lesson10_weight
from fastai_runbn.layers import LESSON10,RunningBatchNorm1d,RunningBatchNorm2d,RunningBatchNorm3d,follow_scaler,set_batch_size
from fastai_runbn.surgery import from_lesson10,register_norm,surgery_report,to_bn,to_runbn
from fastai_runbn.schedule import RunBNSchedule,WarmupClamp
from fastai_runbn.distributed import sync_window
from fastai_runbn.graph import GraphCallback,GraphedForward
from fastai_runbn.filters import FilterMeans
from fastai_runbn.callback import RunBNCallback
from fastai_runbn.interpret import RunBNInterpretation,RunBNRecorder

__all__ = ['AdaptiveWindow','lesson10_weight','LESSON10','RunningBatchNorm1d','RunningBatchNorm2d','RunningBatchNorm3d',
    'follow_scaler','set_batch_size','from_lesson10','register_norm','surgery_report','to_bn','to_runbn','RunBNSchedule',
    'WarmupClamp','sync_window','GraphCallback','GraphedForward','FilterMeans','RunBNCallback','RunBNInterpretation',
    'RunBNRecorder']
