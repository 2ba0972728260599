"Everything a user needs: `from fastai_runbn.all import *`"
from fastai_runbn.moments import lesson10_momentum,window
from fastai_runbn.layers import *
from fastai_runbn.surgery import *
from fastai_runbn.schedule import *
from fastai_runbn.distributed import sync_window
from fastai_runbn.callback import *
from fastai_runbn.interpret import *
