"Break the layer on purpose, one way at a time, in a copy, and record which tests notice: `python tools/mutations.py` writes tests/MUTATIONS.md, `python tools/mutations.py WORD …` only the rows with one of those words in their name"
import os,re,subprocess,sys,tempfile
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent
kernels = ['tests/test_kernels.py','-k','formulas or 300_steps or parts_are or rounded or large_mean or half_precision or of_any_kind']
small = ['tests/test_kernels.py','-k','small_variance']
versions = ['tests/test_kernels.py','-k','version or evaluation_and_its or chosen_anew']
formulas = [*(f'tests/test_{o}.py' for o in ('lockstep','properties','add_up','no_sync','paths','kernels','notebooks')),
    '-k','lockstep and formulas or properties or several or no_host or cuda_stood or every_call or 02_formulas']
quick = [f'tests/test_{o}.py' for o in ('equations','lockstep','properties','state','numerics','autograd','no_sync','paths')]
few = [f'tests/test_{o}.py' for o in ('equations','numerics','autograd')]
compiled = ['tests/test_compile.py','-k','compiled_equals_eager and aot_eager or checkpoints or what_they_say']
twins = ['tests/test_notebooks.py','tests/test_contract.py','-k','05_twins or test_contract and timm']
triton = ['tests/test_triton.py','-x','-k','stays_out or is_last or large_mean or does_not_compile or parts_are or 30_steps and last']
others = ['tests/test_triton.py','-n0','-k','(others_write or overflows) and not split']
graphs = ['tests/test_graph.py','-n0']
others_in_c = ['tests/test_kernels.py','-n0','-k','others_write or overflows']
ends = ['tests/test_contract.py','-k','ends_with_its_backward']
learners = ['tests/test_learner.py','-k',
    'filters_keep_their_means_on or means_of_filters and plain']
filters = ['tests/test_filters.py','-n0']
looks = ['tests/test_interpret.py']
tiles = ['tests/test_interpret.py','-n0','-k','tiles']
lightning = ['tests/test_integration.py','-n0','-k','lightning_hears']
loops = ['tests/test_distributed.py','-k','other_loops and lightning']
ranks = ['tests/test_distributed.py','-k','(written_out or one_process) and default or may_read or nan or last_batches or add_up or held_layers']
adapts = ['tests/test_distributed.py','-k','adaptive']
contract = ['tests/test_contract.py','-k','not compiled and not point_net and not lightning and not accelerate and not scale']
peers = ['tests/test_peers.py','-n0','-k','not ddp and not timm and not compiled']
peers_compiled = ['tests/test_peers.py','-n0','-k','compiled and MABN']
adds = ['tests/test_add_up.py','-k','several_backwards or any_order or found_again']
scales = ['tests/test_contract.py','-k','scale or lightning or accelerate or float16']

# what is broken, the module, the code as it is, the code as it should not be, the tests that could notice
mutations = [
    ("the batch's weight taken for its share ρ", 'moments', 'return count, added/count',
        'return count, a*torch.ones_like(count)', formulas),
    ('innovations in deviations of the batch, not of the window', 'moments',
        'e = (m-mean)*(var+eps).rsqrt()', 'e = (m-mean)*(v+eps).rsqrt()', formulas),
    ('a window learns from a batch that is not finite', 'moments',
        '(count!=0) & (e*e<math.inf) & (v<math.inf)', '(count!=0)', formulas),
    ('a window that lags grows longer', 'moments', 'n*(1-step+step*step/2)',
        'n*(1+step+step*step/2)', formulas),
    ('what is known of innovations stays where others write', 'formulas',
        'seeds = *seeds,(s.innovations,0.)', 'pass', contract),
    ('the last innovation in the place of their trace', 'moments', 'trace+e-a*trace', 'e',
        formulas),
    ('squares of innovations remembered for 33 batches', 'moments', 'clamp(min=1/32)',
        'clamp(min=1/33)', formulas),
    ('a trace that is as long as an average', 'moments', '*(a*(2-a)).sqrt()', '',
        formulas),
    ('C: the last innovation in the place of their trace', 'kernels/cpu.c',
        'trace[c] + e - a[c] * trace[c]', 'e', kernels),
    ('Triton: the last innovation in the place of their trace', 'kernels/cuda',
        'trace+e-a*trace', 'e', triton),
    ('ranks: an adaptive window that learns nothing', 'distributed',
        'torch.where((longest>0)&(bs>0), new, old.innovations)', 'old.innovations', adapts),
    ('no spread between batches in the merged variance', 'moments', '.addcmul(step, d-step)', '',
        formulas),
    ('unbiased batch variance', 'moments', 'correction=0',
        'correction=min(1, x.numel()//x.shape[1]-1)', formulas),
    ('a floor under the variance in evaluation', 'layers', 'F.batch_norm(x, mean, var, self.weight',
        'F.batch_norm(x, mean, var.clamp_min(.01), self.weight', quick),
    ('a recomputed forward merged again', 'layers',
        'again = not compiling and self.recent.is_asked()', 'again = False', few),
    ('the newest batch taken for the one recomputed', 'layers', '.argmin(0, keepdim=True)',
        '.argmin(0, keepdim=True)*0', quick),
    ('half() narrows the window', 'layers', 'new.itemsize<4', 'False', quick),
    ('evaluation follows the training window', 'layers',
        'average = None if eval_window is None else at_most_1(bs/eval_window)', 'average = None',
        quick),
    ('a second derivative without a word', 'functional',
        'if ctx.call.state is None: grads = *_Once.apply(*tensors[:2], dy, *grads[:3]),*grads[3:]',
        'pass', few),
    ('tracers see no operator', 'functional',
        "is_traced() and (backend!='formulas' or torch.compiler.is_compiling())", 'False', quick),
    ('a debt that was found on the device stays', 'layers',
        'for i,s in enumerate(saved): s.data[-1].mul_(nearest!=i)', 'pass', adds),
    ('the scale that a scaler tells not minded', 'functional',
        'if cls.now is not None or torch.is_tensor(said):', 'if torch.is_tensor(said):', scales),
    ('kernel: statistics in half precision not written', 'kernels/cpu',
        'if t is not new: t.copy_(new)', 'pass', kernels),
    ('kernel: a gradient in another layout read as it lies', 'kernels/cpu',
        '(dy.stride()==x.stride() or layout(dy)==last)', 'True', kernels),
    ('kernel: a minus that autograd has only noted not minded', 'kernels/cpu',
        'not dy.is_neg() and ', '', kernels),
    ('twins: activated twice', 'twins',
        'return y if inside and x.numel() else self.act(self.drop(y))',
        'return self.act(self.drop(y))', twins),
    ('twins: not activated in evaluation', 'twins',
        'if not layer.training or layer.running_mean is None: return None',
        'if layer.running_mean is None: return None', twins),
    ('twins: hooks on the activation see nothing', 'twins',
        'if is_hooked(layer.drop) or is_hooked(layer.act): return None', 'pass', twins),
    ('twins: nothing is dropped', 'twins', 'type(layer.drop) is not nn.Identity', 'False', twins),
    ("twins: timm's momentum taken for one that was set", 'twins', 'momentum=auto_momentum, *args',
        'momentum=.1, *args', twins),
    ('ranks: merged into what the buffers hold by then', 'distributed',
        '_merge(self.norms, sent.settings, sent.shared, sent.sums)',
        '_merge(self.norms, sent.settings, self.norms.read(), sent.sums)', ranks),
    ('ranks: all batches weigh the same', 'distributed', 'd,n = m-mean,self.norms.expand(M)',
        'd,n = m-mean,self.norms.expand((M>0).to(M.dtype)*M.max())', ranks),
    ('ranks: channels that are not finite sent', 'distributed',
        'torch.where(q<math.inf, torch.stack((n, n*d, n*q)), 0)', 'torch.stack((n, n*d, n*q))',
        ranks),
    ("ranks: one rank's weight for the batch of all", 'distributed',
        'return window_weight(rule, bs, M)', 'return window_weight(rule, bs/2, M)', ranks),
    ("ranks: the shared window's count for a rank's own", 'distributed', 'count=f.count/self.world',
        'count=f.count', ranks),
    ('ranks: values counted in every backward', 'distributed', 'M*unpaid))', 'M))', ranks),
    ('ranks: gradients of a later backward lost', 'distributed',
        'return left+self.last_share*g/self.last_values.clamp(min=1)',
        'new = left+self.last_share*g/self.last_values.clamp(min=1)\n'
        '        return torch.where(n>0, new, shared.grad)',
        ranks),
    ('ranks: a collective overwrites what others wrote', 'distributed',
        'self.norms.write(self.norms.unless_changed(new))', 'self.norms.write(new)', ranks),
    ('ranks: sent with each batch that is accumulated', 'distributed',
        'if not self.waits: self.send()', 'self.send()', ranks),
    ('ranks: the running gradient not merged', 'distributed',
        'new = new._replace(grad=self.merged_grad(sent.shared, sent.sums, share))', 'pass', ranks),
    ('filters: gradients not centred', 'filters', 'w.grad.sub_(_mean(w.grad, nonzero))', 'pass',
        learners),
    ('filters: not centred after a step', 'filters', 'w.sub_(_mean(w, nonzero)-mean)', 'pass',
        learners),
    ('filters: half at zero in trained nets too', 'filters',
        'after in norms and _untrained(after)', 'after in norms', filters),
    ('filters: none at zero', 'filters', 'mean[::2] = 0', 'pass', filters),
    ('filters: all at zero', 'filters', 'mean[::2] = 0', 'mean[:] = 0', filters),
    ('filters: depthwise ones too', 'filters', 'w.shape[1]==1 and conv.groups>1', 'False',
        filters),
    ('filters: whatever stands before whatever', 'filters',
        "return '' if followed else", "return '' if True else", filters),
    ('filters: the last ones too', 'filters', "if after is None: return 'last'",
        "if after is None: return ''", filters),
    ('filters: layers follow each other as they are registered', 'filters',
        'if taker is not None or originals[root] is model:', 'if False:', filters),
    ('filters: the last that takes an output counts', 'filters', 'min(filter(None, users)',
        'max(filter(None, users)', filters),
    ('filters: hooks are called in a trace', 'filters', "if k.endswith('_hooks')",
        'if False', filters),
    ('filters: a trace leaves things in lists', 'filters',
        'copy(v) if isinstance(v, (dict,list,set)) else v', 'v', filters),
    ('filters: a trace draws random numbers', 'filters',
        'with torch.random.fork_rng(devices=[]): graphs', 'graphs', filters),
    ('filters: a copy cleans up when it goes', 'filters', "if not hasattr(cls, '__del__'): return cls",
        'return cls', filters),
    ('filters: compiled modules are traced', 'filters', 'if not _is_wrapper(m):', 'if True:', filters),
    ('filters: means from before the model has moved', 'callback',
        'self.means = None # not chosen yet', 'self.means = self._filter_means()', learners),
    ('interpretation leaves the model in evaluation', 'interpret',
        'for m,mode in modes: m.training = mode', 'pass', looks),
    ("interpretation trains the model's own norms", 'interpret', 'return deepcopy(m, {',
        'return m.train() or (m, {', looks),
    ('the gap of a layer alone on inputs that the others changed', 'interpret',
        "differ(n, 'alone', _training(n, alone[n], x.clone()), y)",
        "differ(n, 'alone', _training(n, together[n], x.clone()), y)", looks),
    ('the gap over sums that are not centred', 'interpret', "(s['square']-s['mean']**2/s['count'])",
        "s['square']", looks),
    ("the table's ρ is the weight of the batch", 'interpret',
        'return float(a*M/((1-a)*n+a*M))', 'return float(a)', looks),
    ('floor hits counted with the batch at hand', 'interpret',
        'm.samples_seen if m.clamp_inclusive else m.samples_seen-bs', 'm.samples_seen', looks),
    ('margins of tiles looked at', 'interpret', '((i<margin) | (i>=s-margin))', '(i<0)', tiles),
    ('one tiling twice', 'interpret', 'for s in ([0]*len(tile),starts)', 'for s in ([0]*len(tile),)*2',
        tiles),
    ('train/eval disparity of evaluation and itself', 'interpret', 'return _training(n, copies[n], x)',
        'return None', tiles),
    ('Lightning: samples not told', 'lightning', 'if bs!=self._bs and bs>0: set_batch_size(pl_module, bs)',
        'pass', lightning),
    ('Lightning: filters do not keep their means', 'lightning', 'FilterMeans(pl_module, norms, params).on(opt)',
        'FilterMeans(pl_module, norms, params)', loops),
    ('Lightning: a window for each rank', 'lightning', 'if trainer.world_size>1 else None',
        'if trainer.world_size<1 else None', loops),
    ('contract: track_running_stats not minded', 'layers',
        'return not self.track_running_stats or self', 'return self', contract),
    ('contract: converters put their norms in place', 'layers',
        'if new.running_mean is old.running_mean:', 'if False:', contract),
    ('contract: thawed norms stay plain', 'layers', 'if cls and isinstance(new, _BatchNorm)',
        'if False and isinstance(new, _BatchNorm)', contract),
    ('contract: rows taken for samples', 'layers',
        'if self.batch_size is not None: return min(rows, self.batch_size)',
        'if self.batch_size is not None: return rows', contract),
    ('contract: many rows taken for samples', 'layers',
        'if x.ndim!=2 or rows<=_many_rows: return rows', 'return rows', contract),
    ('contract: zeros of pruned filters move', 'filters', 'nonzero = None if w.all() else w!=0',
        'nonzero = None', contract),
    ('contract: shared filters move', 'filters', "if shared[id(w)]>1: return 'shared'", 'pass',
        contract),
    ('contract: filters move that the optimizer does not have', 'filters',
        "if trained is not None and id(w) not in trained: return 'not in the optimizer'", 'pass',
        contract),
    ('contract: a scale left behind by an error', 'layers',
        'LossScale.end() # where a backward ended in an error', 'pass', scales),
    ('the running term in full, whatever running_grad is', 'formulas',
        '(s.unpaid*step.running_grad)', 's.unpaid', formulas),
    ('the statistics not detached', 'formulas', '@torch.no_grad()\n    def forward', 'def forward',
        formulas),
    ('moments that are not finite merged', 'formulas', 'ok = var<math.inf', 'ok = (var==var)|True',
        formulas),
    ('gradients that are not finite averaged', 'formulas',
        'torch.where(g.abs()<math.inf, new, running)', 'new', formulas),
    ('the variance reacts at its floor', 'formulas', 'sums[1]*(s.factor>0)', 'sums[1]', formulas),
    ('the average for evaluation shorter than the window', 'moments',
        '.clamp(min=a).clamp(max=rho)', '.clamp(min=a)', formulas),
    ('the clamp counts the batch at hand', 'formulas', 'if step.inclusive: seen', 'if True: seen',
        formulas),
    ('the scale of G on CUDA', 'kernels/aten', 'G[1]/rstd', 'G[1]*rstd', formulas),
    ('the floor looked up on the host', 'formulas',
        'floors.index_select(0, seen.clamp(max=len(floors)-1)).squeeze(0)',
        'floors[min(int(seen.amax()), len(floors)-1)]', formulas),
    ('the floor not applied', 'formulas', 'var = torch.maximum(var, floor)', 'pass', formulas),
    ('the running term not clipped', 'formulas', '(step.clip/mean_square).clamp(max=step.clip_max)',
        'torch.ones_like(mean_square)', formulas),
    ("SiLU's slope without its sigmoid's", 'formulas', 'return dy*s*(1+z*(1-s))', 'return dy*s',
        formulas),
    ('a channel that is not finite written', 'formulas',
        'torch.where(ok, mean, s.mean),torch.where', 'mean,torch.where', formulas),
    ('a biased variance in the average of a momentum that was set', 'formulas', 'v*M/(M-1+(M==1))',
        'v', formulas),
    ('compiled: a forward that is done again merged again', 'functional',
        'if torch._C._current_graph_task_id()!=-1: raise RuntimeError(_no_recompute)', 'pass',
        compiled),
    ('compiled: the running gradient not named as written', 'functional',
        'Tensor(running!) running', 'Tensor running', compiled),
    ('the scale of a loss stays after its backward', 'functional',
        'Variable._execution_engine.queue_callback(cls.end)', 'pass', ends),
    ('kernel: the version counters of the statistics stay', 'kernels/cpu',
        'written(state[:9]) # all', 'pass # all', versions),
    ('kernel: the version counter of innovations stays', 'kernels/cpu',
        'if step.longest is not None: written((state.innovations,))', 'pass', versions),
    ('kernel: the version counter of the running gradient stays', 'kernels/cpu',
        'if grad is running: increment_version(running)', 'if grad is running: pass', versions),
    ('how is not chosen anew where a setting has changed', 'layers', 'type(momentum), *settings)',
        'type(momentum))', versions),
    ('how is not chosen anew where the state has changed', 'layers', 'last[0] is state and ', '',
        versions),
    ('a momentum that equals the default not told from it', 'layers', 'type(momentum), *settings)',
        '*settings)', versions),
    ('twins: torch.fx looks into the layer', 'twins',
        'if isinstance(x, Proxy): return self.as_leaf(x)', 'pass', contract),
    ('ranks: a frozen layer noted', 'distributed', 'if step.update:\n            s,M',
        'if True:\n            s,M', ranks),
    ("ranks: a rank's own count of values in the pooled gradient", 'distributed',
        'n = torch.where(n>0, n, math.nan)', 'n = n*0+x.numel()//x.shape[1]', ranks),
    ('contract: the running term in every backward', 'formulas', 'saved.data[-1] = 0.', 'pass',
        formulas),
    ('contract: a later backward adds nothing to the running gradient', 'formulas',
        'new = left+(own if scale is None else own/scale)',
        'new = left+s.unpaid*(own if scale is None else own/scale)', formulas),
    ('contract: a frozen layer updates its running gradient', 'formulas',
        'if step.update:\n        new', 'if True:\n        new', formulas),
    ('contract: a frozen layer updates its statistics', 'layers', 'not self.is_frozen()', 'True',
        contract),
    ('contract: what others write is not seen', 'formulas',
        'None if state.known_mean is None else seed(state, changed(state))', 'None', formulas),
    ('contract: the layer takes what it wrote for written by others', 'formulas',
        's.known_mean.copy_(s.avg_mean)', 'pass', formulas),
    ("contract: a momentum that was set is not BatchNorm's", 'formulas',
        'share = torch.full_like(share, momentum)', 'pass', formulas),
    ("contract: the spread between batches in BatchNorm's average", 'formulas',
        'new_var = torch.lerp(var, unbiased, share)', 'pass', formulas),
    ('contract: torch.fx looks into the layer', 'layers',
        'if isinstance(input, Proxy): return self.as_leaf(input)', 'pass', contract),
    ('contract: a window on meta stays uninitialised', 'layers',
        "filled = old['window_mean'].is_meta and not self.window_mean.is_meta", 'filled = False',
        contract),
    ('contract: the running gradient in the unit of the scaled loss', 'formulas',
        'own if scale is None else own/scale', 'own', formulas),
    ('contract: the running term is not scaled', 'formulas',
        'running_term = running_term*scale', 'pass', formulas),
    ('graph: what recording has written stays', 'graph', 'for b,old in kept: b.copy_(old)', 'pass',
        graphs),
    ('graph: recorded for buffers that are elsewhere now', 'graph',
        'tuple(b.data_ptr() for b in model.buffers()),', '', graphs),
    ('graph: recorded for other settings', 'graph',
        'tuple(tuple(map(_fixed, _settings(vars(m)))) for m in self.norms)', '', graphs),
    ('graph: a partial batch recorded', 'graph',
        'if not again or len(self.graphs)>=self.most', 'if len(self.graphs)>=self.most', graphs),
    ('graph: it stays when the batch is done', 'graph', 'if self.once: self.remove()', 'pass',
        graphs),
    ('graph: it stays when the batch is cancelled', 'graph',
        'if self.graphed is not None: self.graphed.remove()', 'pass', graphs),
    ("graph: a scaler's own word recorded", 'graph', 'm.scaler_tells = False', 'pass', graphs),
    ('peers: the variance averaged, not the deviation', 'peers', 'sd_new**2-self.eps',
        'self.running_var.lerp(v.to(sd), self.momentum)', peers),
    ('peers: r not limited from below', 'peers', '.clamp(1/r_max, r_max)', '.clamp(max=r_max)',
        peers),
    ('peers: limits that open at once', 'peers', 'max(end-self.start, 1)', '1', peers),
    ("peers: MABN's gradient by the batch alone", 'peers',
        'psi = _recent_mean(ctx.recent_psi, psi, turn, averaged)', 'pass', peers),
    ('peers: MABN has a window of one row', 'peers', '(t%self.window)[None]', '(t*0)[None]', peers),
    ('peers: second derivatives of MABN without a word', 'peers',
        '@once_differentiable # the average of Ψ is no function of this batch alone', '', peers),
    ('peers: MABN compiled in one graph', 'peers',
        'if torch.compiler.is_compiling(): torch._dynamo.graph_break()', 'pass', peers_compiled),
    ('peers: an infinite limit taken', 'peers', 'and math.isfinite(value)', '', peers),
    ('peers: a limit that is there before it begins', 'peers',
        '_check(self, name, self.start, advice', '_check(self, name, 0, advice', peers),
    ('peers: use_norm takes over all of the state', 'peers', 'if k in keep and k in has', 'if k in has',
        peers),
    ('peers: filters not centred on the way back', 'peers',
        'for w in weights: w.copy_(centre_weight(w))', 'pass', peers),
    ('peers: windows left behind on the way back', 'peers', 'if hasattr(m, name): delattr(m, name)',
        'pass', peers)]

# the same in Triton, in its interpreter
in_triton = [
    ("Triton: the batch's weight taken for its share", 'kernels/cuda', 'share = a*M/n',
        'share = a+n*0.', triton),
    ('Triton: lanes that have had a turn less counted in full', 'kernels/cuda',
        '(hi-lo-tl.arange(0, BLOCK)+BLOCK-1)//BLOCK', '(hi-lo+BLOCK-1)//BLOCK', triton),
    ('Triton: no spread between lanes', 'kernels/cuda', 'tl.where(n>0., n*d*d, 0.)', '0.', triton),
    ('Triton: no spread between chunks', 'kernels/cuda', 'squares+n*d*d', 'squares', triton),
    ('Triton: the first to be done puts chunks together', 'kernels/cuda',
        'last = tl.atomic_add(own, 1)==n-1', 'last = tl.atomic_add(own, 1)==0', triton),
    ('Triton: the integers are not 0 again', 'kernels/cuda', 'if last: tl.store(own, 0)',
        'last = last', triton),
    ('Triton: a channel that is not finite written', 'kernels/cuda', 'ok = new_var<INF',
        'ok = new_var==new_var', others),
    ('Triton: the window not seeded from what others wrote', 'kernels/cuda',
        'mean,var = tl.where(new, avg_mean, mean),tl.where(new, avg_var, var)',
        'mean,var = mean,var', others),
    ('Triton: a window that lags grows longer', 'kernels/cuda', 'n*(1.-step+step*step/2.)',
        'n*(1.+step+step*step/2.)', triton),
    ('Triton: a debt paid twice', 'kernels/cuda', '_put(saved+6*C, c, C, tl.zeros_like(share))',
        'pass', triton),
    ('Triton: the scale of the loss left in the running gradient', 'kernels/cuda', 'left2+G2/by',
        'left2+G2', others),
    ('Triton: the second launch left out', 'kernels/cuda',
        'return cls.normalize(x, weight, bias, saved, step) if later else y', 'return y', triton),
    ('Triton: a kernel that fails to compile is an error', 'kernels/cuda',
        'except NotCompiled as e:\n', 'except NotImplementedError as e:\n', triton),
    ('Triton: formulas compute, and the path says otherwise', 'kernels/cuda',
        "cls.broken,cls.name = True,'formulas'", 'cls.broken = True', triton)]

# the same in C, for which the kernel is compiled anew
in_c = [
    ('C: the shift left out of the moments', 'kernels/cpu.c', 'about /= near;', 'about = 0;',
        kernels),
    ('C: the shift left out of the moments, channels last', 'kernels/cpu.c',
        'k[c] = k[c] - k[c] == 0 ? k[c] / near : 0;', 'k[c] = 0;', kernels),
    ('C: the shift left in the variance', 'kernels/cpu.c', 'square = square / p->M - sum * sum;',
        'square = square / p->M;', kernels),
    ('C: the shift left in the variance, channels last', 'kernels/cpu.c',
        'q = p->part[C + c] / p->M - s * s;', 'q = p->part[C + c] / p->M;', kernels),
    ('C: the last values of a row summed twice', 'kernels/cpu.c',
        'a.s[1] += F(pick)(fresh, e, (V){});', 'a.s[1] += e;', kernels),
    ('C: the last chunk left out, channels last', 'kernels/cpu.c',
        'for (i64 j = 1; j < p->chunks; j++)', 'for (i64 j = 1; j < p->chunks - 1; j++)', kernels),
    ('C: a chunk ends a row early, channels last', 'kernels/cpu.c',
        'end = least(p->M * C, (chunk + 1) * p->rows * D);',
        'end = least(p->M * C, (chunk + 1) * p->rows * D - (chunk + 1 < p->chunks) * D);', kernels),
    ('C: bfloat16 cut off, not rounded', 'kernels/cpu.c',
        'u = (nan & ((u >> 16) | 64)) | (~nan & ((u + 0x7fff + ((u >> 16) & 1)) >> 16));',
        'u = u >> 16;', kernels),
    ("C: the batch's weight taken for its share ρ", 'kernels/cpu.c', 'rho = a * M / n;', 'rho = a;',
        kernels),
    ('C: no spread between batches in the merged variance', 'kernels/cpu.c',
        'F(between)(var[c], v, rho) + go * (d - go);', 'F(between)(var[c], v, rho);', kernels),
    ('C: a share near 1 loses small variances', 'kernels/cpu.c',
        't < .5f ? a + t * (b - a) : b - (1 - t) * (b - a)', 'a + t * (b - a)', small),
    ('C: moments that are not finite merged', 'kernels/cpu.c', 'int ok = var1 < (T)INFINITY;',
        'int ok = 1;', kernels),
    ('C: a channel that is not finite written', 'kernels/cpu.c', 'mean1 = ok ? mean1 : mean[c];',
        '', kernels),
    ('C: batches that were left out not counted', 'kernels/cpu.c', '*p->skipped += p->left_out;',
        '', kernels),
    ('C: the average for evaluation shorter than the window', 'kernels/cpu.c',
        'share = share < rho ? share : rho;', '', kernels),
    ("C: a momentum that was set is not BatchNorm's", 'kernels/cpu.c',
        'share = set ? momentum : share;', '', kernels),
    ("C: the spread between batches in BatchNorm's average", 'kernels/cpu.c',
        'T spread = set ? 0 : go * (d - go)', 'T spread = go * (d - go)', kernels),
    ("C: a biased variance in BatchNorm's average", 'kernels/cpu.c', 'v1 = set ? v * unbias : v;',
        'v1 = v;', kernels),
    ('C: the clamp counts the batch at hand', 'kernels/cpu.c',
        'own = p->flags & INCLUSIVE ? p->samples : 0', 'own = p->samples', kernels),
    ('C: the floor not applied', 'kernels/cpu.c',
        'var1 = floored && !(var1 >= floor) ? floor : var1;', '', kernels),
    ('C: the variance reacts at its floor', 'kernels/cpu.c', '* (factor[c] > 0) / M', '/ M',
        kernels),
    ('C: the running term not clipped', 'kernels/cpu.c',
        'factor = clipped ? (factor > clip_max ? clip_max : factor) : 1;', 'factor = 1;', kernels),
    ('C: the running term in full, whatever running_grad is', 'kernels/cpu.c',
        'pays = p->pays * p->scale,', 'pays = p->scale,', kernels),
    ('C: the running term is not scaled', 'kernels/cpu.c', 'pays = p->pays * p->scale,',
        'pays = p->pays,', kernels),
    ('C: the running gradient in the unit of the scaled loss', 'kernels/cpu.c',
        'unscale = 1 / p->scale', 'unscale = 1', kernels),
    ('C: the running term in every backward', 'kernels/cpu.c', 'unpaid[c] = 0;', '', kernels),
    ('C: a later backward adds nothing to the running gradient', 'kernels/cpu.c',
        'T new1 = left1 + own1 * unscale,', 'T new1 = left1 + due * own1 * unscale,', kernels),
    ('C: gradients that are not finite averaged', 'kernels/cpu.c',
        'update && g1 - g1 == 0 ? new1 : old1', 'update ? new1 : old1', kernels),
    ('C: a frozen layer updates its running gradient', 'kernels/cpu.c',
        'update && g1 - g1 == 0 ? new1 : old1', 'g1 - g1 == 0 ? new1 : old1', kernels),
    ('C: a frozen layer updates its statistics', 'kernels/cpu.c',
        'mean[c] = update ? mean1 : mean[c];', 'mean[c] = mean1;', kernels),
    ('C: a window that lags grows longer', 'kernels/cpu.c', 'n * (1 - step + step * step / 2)',
        'n * (1 + step + step * step / 2)', kernels),
    ('C: a window learns from a batch that is not finite', 'kernels/cpu.c',
        ' && e * e < (T)INFINITY && bvar[c] < (T)INFINITY', '', kernels),
    ('C: a frozen layer learns of its windows', 'kernels/cpu.c', 'learns = update && count',
        'learns = count', kernels),
    ('C: a frozen layer counts', 'kernels/cpu.c', 'if (update) {', 'if (1) {', kernels),
    ('C: a mean that others have changed not noticed', 'kernels/cpu.c',
        'memcmp(amean + c0, kmean + c0, bytes) || ', '', kernels),
    ('C: the layer takes what it wrote for written by others', 'kernels/cpu.c',
        'memcpy(kmean + c0, amean + c0, (c1 - c0) * sizeof(T));', '', kernels),
    ('C: the window not seeded from what others wrote', 'kernels/cpu.c',
        'kmean[c] = mean[c] = amean[c];', 'kmean[c] = amean[c];', kernels),
    ('C: the floor of a channel that others wrote not its own', 'kernels/cpu.c',
        'floor[c] = trained ? p->full_floor : p->fresh_floor;', '', others_in_c),
    ('C: samples seen not set where others wrote', 'kernels/cpu.c',
        '*p->seen = p->written & TRAINED ? FULL_SAMPLES : 0;', '', kernels),
    ("C: ReLU's slope is 1 everywhere", 'kernels/cpu.c',
        'if (act == RELU) return F(pick)(z <= 0, (V){}, dy);', 'if (act == RELU) return dy;',
        kernels),
    ("C: SiLU's slope without its sigmoid's", 'kernels/cpu.c',
        'V s = F(sigmoid)(z);\n    return dy * s * (1 + z * (1 - s));',
        'V s = F(sigmoid)(z);\n    return dy * s;', kernels)]

flags = '-std=gnu11 -O1 -fno-math-errno -fno-trapping-math -fopenmp-simd -fPIC -shared -w -Wno-psabi'.split() # quick to compile

def build(folder):
    "Compile the kernel there, where pip would put it"
    d = folder/'fastai_runbn'/'kernels'
    subprocess.run([os.environ.get('CC', 'cc'), *flags, d/'cpu.c', '-o', d/'runbn_cpu.abi3.so', '-lm'], check=True)

def source(package, module):
    "The file of a module of `package`, or of its kernel in C"
    return package/(module if module.endswith('.c') else f'{module}.py')

def copy(to):
    "What git tracks or would, in another folder"
    files = subprocess.run(['git','ls-files','--cached','--others','--exclude-standard'], cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    for f in files:
        if (root/f).is_file():
            (to/f).parent.mkdir(parents=True, exist_ok=True)
            (to/f).write_bytes((root/f).read_bytes())

def failures(folder, tests):
    "Names of the tests that fail there, and pytest's closing line"
    env = {**os.environ, 'PYTHONPATH':str(folder)}
    done = subprocess.run([sys.executable,*'-m pytest -q -rfE --show-capture=no -p no:cacheprovider --hypothesis-seed=0'.split(),*tests], cwd=folder, env=env,
        capture_output=True, text=True)
    out = done.stdout
    if done.returncode<0: return ['a crash'],f'ended by signal {-done.returncode}'
    return [l.split()[1] for l in out.splitlines() if re.match(r'(FAILED|ERROR) ', l)],out.strip().splitlines()[-1]

def _row(what, module, old, new, names):
    "The table's row: what was broken, and the tests `names` (how often each) that noticed"
    def code(s): return f"`{' '.join(s.split())}`".replace('|','\\|') if s.strip() else 'nothing'
    caught = ', '.join(f'{n}{f" ×{k}" if k>1 else ""}' for n,k in names.most_common(4)) + (f' and {len(names)-4} more tests' if len(names)>4 else '')
    return f'|{what}|{module}|{code(old)}|{code(new)}|{caught or "**nothing**"}|'

report = root/'tests'/'MUTATIONS.md'
head = ['# Mutations', '', 'The layer broken on purpose, one way at a time, in a scratch copy: which tests noticed. '
    'Made by `python tools/mutations.py`; × is the number of cases of a test.', '', '|broken|in|from|to|caught by|', '|---|---|---|---|---|']
def record(what, row):
    "Put the row of a mutation into the report, in the place that it has here"
    rows = {l.split('|')[1]:l for l in report.read_text().splitlines() if l.startswith('|')} if report.exists() else {}
    rows[what] = row
    report.write_text('\n'.join(head+[rows[m[0]] for m in mutations+in_triton+in_c if m[0] in rows])+'\n')

def main(*words):
    chosen,missed = [m for m in mutations+in_triton+in_c if not words or any(w in m[0] for w in words)],[]
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(d)
        build(d)
        for tests in {id(m[-1]):m[-1] for m in chosen}.values():
            failed,last = failures(d, tests)
            if failed: sys.exit(f'tests fail before anything is broken: {failed}')
            print(f'unbroken: {last}', flush=True)
        for what,module,old,new,tests in chosen:
            f = source(d/'fastai_runbn', module)
            sound = f.read_text()
            if sound.count(old)!=1: sys.exit(f'{what}: {old!r} stands {sound.count(old)} times in {f.name}, not once')
            f.write_text(sound.replace(old, new))
            if f.suffix=='.c': build(d)
            failed,_ = failures(d, tests)
            f.write_text(sound)
            if f.suffix=='.c': build(d)
            record(what, _row(what, module, old, new, Counter(n.split('[')[0].replace('tests/','') for n in failed)))
            if not failed: missed.append(what)
            print(f'{len(failed):4} failed: {what}', flush=True)
    if missed: sys.exit(f'not caught: {missed}')

if __name__=='__main__': main(*sys.argv[1:])
