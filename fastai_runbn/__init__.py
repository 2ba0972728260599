"""Running batch norm for fastai and PyTorch: train with 1, 2 or 4 images per batch, with one callback

Batch norm takes its mean and variance from the batch, and one or two images are too few for that.
With `fastai_runbn` a model's BatchNorm layers normalise with a *window* of recent batches instead.
Model, optimizer and checkpoints stay what they are.

Modules:

- `fastai_runbn.bench.families`: Does surgery fit real models? The families of timm, torchvision, fastai, segmentation_models_pytorch and MONAI, there and back, and what it costs
- `fastai_runbn.bench.quality`: How well does the layer train? Regimes, norms, batch sizes, learning rates and seeds, with real Learners
- `fastai_runbn.bench.speed`: How fast is the layer? Forward, backward and whole training steps, beside BatchNorm and the others, in one interleaved run
- `fastai_runbn.bench.tasks`: Small tasks on which norms are compared: digits, photographs, segmentations, and the nets that learn them
- `fastai_runbn.callback`: `RunBNCallback`: one argument, and a Learner trains with running batch norm
- `fastai_runbn.cli`: `runbn`: the command line
- `fastai_runbn.distributed`: One window on many processes, with one collective a step
- `fastai_runbn.filters`: The filters of convolutions keep their means
- `fastai_runbn.formulas`: A running norm in PyTorch's operators, forward and backward: what kernels have to equal
- `fastai_runbn.functional`: `running_norm`: the operation under the layers, for autograd, `torch.compile` and tracers
- `fastai_runbn.graph`: A model's forward and backward in a CUDA graph, where launches are what takes the time
- `fastai_runbn.interpret`: What the running norms of a model see: a table, plots and remarks on layers that look ill
- `fastai_runbn.kernels.aten`: On a GPU: the kernels of PyTorch's SyncBatchNorm
- `fastai_runbn.kernels.cpu`: A running norm in C: one call forward, one backward
- `fastai_runbn.kernels.cuda`: A running norm in Triton: one launch forward, one backward; two each for large maps
- `fastai_runbn.layers`: `RunningBatchNorm1d/2d/3d`: BatchNorm's place, arguments and checkpoints, with a window
- `fastai_runbn.lightning`: `RunBNLightning`: one callback, and a Trainer trains with running batch norm
- `fastai_runbn.moments`: The mean and variance of a batch, and merging them into a window
- `fastai_runbn.peers`: Batch renormalization and MABN as PyTorch layers, in one, two and three dimensions
- `fastai_runbn.reference`: Lesson 10's running batch norm in plain PyTorch: the layer that everything else here is compared with
- `fastai_runbn.schedule`: The small-batch warmup clamp: a floor under the variance until enough samples were seen
- `fastai_runbn.surgery`: Make every BatchNorm in a model a running norm, and back, in place and without losing anything
- `fastai_runbn.twins`: Running norms in the place of layers of timm and fastai, made when they are first asked for"""

__version__ = "0.1.0"
