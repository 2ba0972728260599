"Break the layer on purpose, one way at a time, in a copy, and record which tests notice: `python tools/mutations.py` writes tests/MUTATIONS.md, `python tools/mutations.py WORD …` only the rows with one of those words in their name"
import os,re,subprocess,sys,tempfile
from collections import Counter
from pathlib import Path

root = Path(__file__).resolve().parent.parent
quick = ['-k','not compiled',*[f'tests/test_{o}.py' for o in ('equations','lockstep','properties','state','numerics','autograd','no_sync','paths')]]
few = ['-k','not compiled',*[f'tests/test_{o}.py' for o in ('equations','numerics','autograd')]]
compiled = ['tests/test_compile.py','-k','compiled_equals_eager and (lesson10 or default)']
learners = ['tests/test_learner.py','-k','filters_are_those or filters_keep_their_means_on or filters_without_a_norm or means_of_filters and plain']
looks = ['tests/test_interpret.py']
ranks = ['tests/test_distributed.py','-k','(written_out or one_process) and default or may_read or nan or last_batches or add_up or held_layers']
contract = ['tests/test_contract.py','-k','not compiled and not point_net and not lightning and not accelerate and not scale']
adds = ['tests/test_add_up.py','-k','several_backwards or any_order']
scales = ['tests/test_contract.py','-k','scale or lightning or accelerate or float16']

# what is broken, the module, the code as it is, the code as it should not be, the tests that could notice
mutations = [
    ("the batch's weight taken for its share ρ", 'moments', 'return count, added/count', 'return count, a*torch.ones_like(count)', quick),
    ('no spread between batches in the merged variance', 'moments', '.addcmul(step, d-step)', '', quick),
    ('no spread between images in the moments of a batch', 'functional', 'torch.add(between, v.sum(0), alpha=1/N)', 'v.sum(0)/N', quick),
    ('unbiased batch variance', 'moments', 'correction=0', 'correction=min(1, x.numel()//x.shape[1]-1)', quick),
    ('a floor under the variance in evaluation', 'layers', 'self.running_mean, self.running_var, self.weight', 'self.running_mean, self.running_var.clamp_min(.01), self.weight', quick),
    ('all of what is owed paid, whatever running_grad is', 'functional', '*share if torch.is_tensor(share) or share!=1 else', ' if True else', few),
    ("the window's own tensors saved for backward, no copy", 'functional', 'return mean[0],var[0],share[0],None', 'return means[0],vars[0],share[0],None', quick),
    ('the statistics not detached', 'layers', 'self._statistics(x.detach(), path, again, sync)', 'self._statistics(x, path, again, sync)', few),
    ('a recomputed forward merged again', 'layers', '        if again: return', '        if False: return', few),
    ('the newest batch taken for the one recomputed', 'layers', '.argmin(0, keepdim=True)', '.argmin(0, keepdim=True)*0', quick),
    ('moments that are not finite merged', 'functional', 'ok = var<math.inf', 'ok = (var==var)|True', quick),
    ('moments that are not finite merged, where one may look', 'functional', 'if look and math.isfinite(var.sum().item()):', 'if look:', quick),
    ('gradients that are not finite averaged', 'functional', 'torch.where(g.abs()<math.inf, new, running)', 'new', few),
    ('gradients that are not finite averaged, where one may look', 'functional', 'if not (look and math.isfinite(g.sum().item())): new', 'if not look: new', few),
    ('the variance reacts at its floor', 'functional', 'dweight*(factor>0) if clamped else dweight', 'dweight', few),
    ('the average for evaluation shorter than the window', 'functional', 'torch.minimum(share, share[0])', 'share', quick),
    ('the clamp counts the batch at hand', 'functional', 's.seen+bs if inclusive else', 's.seen+bs if True else', quick),
    ('half() narrows the window', 'layers', 'new.itemsize<4', 'False', quick),
    ('the count of samples read on the host', 'layers', 'path is not on_cpu or ', '', quick),
    ('evaluation follows the training window', 'layers', 'a_e = None if self.eval_window is None else _at_most_1(sizes[0]/self.eval_window)', 'a_e = None', quick),
    ('the scale of G on CUDA', 'functional', 'G2/rstd', 'G2*rstd', quick),
    ('a compiled backward computes the statistics again', 'functional', 'ts,flag = torch.ops.fastai_runbn.keep(torch.stack(ts))', 'ts,flag = torch.stack(ts),ts[0].new_ones(())', compiled),
    ('ranks: merged into what the buffers hold by then', 'distributed', 'self.pack.merge(base, sums[:3], head, rules)', 'self.pack.merge(self.pack.read(), sums[:3], head, rules)', ranks),
    ('ranks: all batches weigh the same', 'distributed', 'd,n = m-mean,self.expand(M)', 'd,n = m-mean,self.expand((M>0).to(M.dtype)*M.max())', ranks),
    ('ranks: channels that are not finite sent', 'distributed', 'torch.where(q<math.inf, torch.stack((n, n*d, n*q)), 0)', 'torch.stack((n, n*d, n*q))', ranks),
    ("ranks: one rank's weight for the batch of all", 'distributed', 'return window_weight(rule, bs, M)', 'return window_weight(rule, bs/2, M)', ranks),
    ("ranks: the shared window's count for a rank's own", 'distributed', 'count=f.count/self.world', 'count=f.count', ranks),
    ('ranks: values counted in every backward', 'distributed', 'M*unpaid))', 'M))', ranks),
    ('ranks: gradients of a later backward lost', 'distributed', 'return left+self.last_share*sums[4:]/self.last_count.clamp(min=1)', 'return torch.where(n>0, left+self.last_share*sums[4:]/self.last_count.clamp(min=1), base.grad)', ranks),
    ('ranks: a held layer noted', 'distributed', 'if update: self.forwards.append', 'self.forwards.append', ranks),
    ('ranks: a collective overwrites what others wrote', 'distributed', 'self.pack.write(self.pack.unless_changed(new))', 'self.pack.write(new)', ranks),
    ('ranks: sent with each batch that is accumulated', 'distributed', 'if not self.waits: self.send()', 'self.send()', ranks),
    ('ranks: the running gradient not merged', 'distributed', 'new = new._replace(grad=self.merged_grad(base, sums, share))', 'pass', ranks),
    ("ranks: a rank's own count of values in the pooled gradient", 'distributed', 'n = torch.where(sums[0]>0, sums[0], math.nan)', 'n = sums[0]*0+M', ranks),
    ('filters: gradients not centred', 'callback', 'w.grad.sub_(_mean(w.grad, nonzero))', 'pass', learners),
    ('filters: not centred after a step', 'callback', 'w.sub_(_mean(w, nonzero)-mean)', 'pass', learners),
    ('filters: at zero in trained nets too', 'callback', '0. if zero or untrained or', '0. if True or', learners),
    ('filters: where they are in untrained nets too', 'callback', ' or untrained', '', learners),
    ('filters: those of one channel each too', 'callback', "if w.shape[1]==1: return 'one input channel'", 'pass', learners),
    ('filters: whatever stands before whatever', 'callback', 'not why and not normed and not isinstance(after, (_ConvNd,nn.Linear,type(None)))', 'False', learners),
    ('filters: without a norm, not at zero', 'callback', 'self.filters.update(free)', 'pass', learners),
    ('filters: without a norm, at zero beside trained norms', 'callback', ' and not any(t.any() for t in stats)', '', learners),
    ('filters: without a norm, at zero where they are trained', 'callback', '<=2*sum(', '<=1e9*sum(', learners),
    ('filters: means from before the model has moved', 'callback', 'self.means = None # not chosen yet', 'self.keep_means()', learners),
    ('interpretation leaves the model in evaluation', 'interpret', 'for m,mode in modes: m.training = mode', 'pass', looks),
    ("interpretation trains the model's own norms", 'interpret', 'return deepcopy(m, {', 'return m.train() or (m, {', looks),
    ('the gap of a layer alone on inputs that the others changed', 'interpret', "differ(n, 'alone', _training(n, alone[n], x.clone()), y)", "differ(n, 'alone', _training(n, together[n], x.clone()), y)", looks),
    ('the gap over sums that are not centred', 'interpret', "(s['square']-s['mean']**2/s['count'])", "s['square']", looks),
    ("the table's ρ is the weight of the batch", 'interpret', 'return float(a*M/((1-a)*n+a*M)),float(M)', 'return float(a),float(M)', looks),
    ('floor hits counted with the batch at hand', 'interpret', 'm.samples_seen if m.clamp_inclusive else m.samples_seen-bs', 'm.samples_seen', looks),
    ('contract: what is owed is paid in every backward', 'functional', 'was,self.unpaid = self.unpaid,False', 'was = self.unpaid', adds),
    ('contract: a later backward adds nothing to the running gradient', 'functional', 'new = left+(own if scale is None else own/scale)', 'new = left if unpaid is False else left+(own if scale is None else own/scale)', adds),
    ('contract: a held layer updates its running gradient', 'layers', 'not self.is_held(), scale, pool)', 'True, scale, pool)', contract),
    ('contract: a held layer updates its statistics', 'layers', 'momentum,update = self.momentum,not self.is_held()', 'momentum,update = self.momentum,True', contract),
    ('contract: track_running_stats not minded', 'layers', 'return not self.track_running_stats or self', 'return self', contract),
    ('contract: what others write is not seen', 'layers', 'elif not all(map(torch.equal, now, known)): self.seed_window()', 'elif False: self.seed_window()', contract),
    ('contract: the layer takes what it wrote for written by others', 'functional', 'if s.known_mean is not None: torch._foreach_copy_', 'if False: torch._foreach_copy_', contract),
    ("contract: a momentum that was set is not BatchNorm's", 'functional', 'elif type(momentum) is not AutoMomentum: fixed = momentum', 'elif False: fixed = momentum', contract),
    ("contract: the spread between batches in BatchNorm's average", 'functional', 'if fixed is not None: var = torch.stack((var[0], plain_var))', 'pass', contract),
    ('contract: converters put their norms in place', 'layers', 'if new.running_mean is old.running_mean:', 'if False:', contract),
    ('contract: thawed norms stay plain', 'layers', 'if cls and isinstance(new, _BatchNorm)', 'if False and isinstance(new, _BatchNorm)', contract),
    ('contract: torch.fx looks into the layer', 'layers', 'if not (args and isinstance(args[0], Proxy)): return', 'if True: return', contract),
    ('contract: rows taken for samples', 'layers', 'if self.batch_size is not None: return min(rows, self.batch_size)', 'if self.batch_size is not None: return rows', contract),
    ('contract: many rows taken for samples', 'layers', 'if x.ndim!=2 or rows<=_many_rows: return rows', 'return rows', contract),
    ('contract: a window on meta stays uninitialised', 'layers', "if old['window_mean'].is_meta and not", 'if False and not', contract),
    ('contract: zeros of pruned filters move', 'callback', 'nonzero = None if w.all() else w!=0', 'nonzero = None', contract),
    ('contract: shared filters move', 'callback', "if shared[id(w)]>1: return 'shared'", 'pass', contract),
    ('contract: filters move that the optimizer does not have', 'callback', "if trained is not None and id(w) not in trained: return 'not in the optimizer'", 'pass', contract),
    ('contract: the running gradient in the unit of the scaled loss', 'functional', 'own if scale is None else own/scale', 'own', scales),
    ('contract: what is owed is not scaled', 'functional', 'if scale is not None: paid = paid*scale', 'pass', scales),
    ('contract: a scale left behind by an error', 'layers', 'LossScale.end() # where a backward ended in an error', 'pass', scales)]

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
    out = subprocess.run([sys.executable,*'-m pytest -q -rfE --show-capture=no -p no:cacheprovider --hypothesis-seed=0'.split(),*tests], cwd=folder, env=env,
        capture_output=True, text=True).stdout
    return [l.split()[1] for l in out.splitlines() if re.match(r'(FAILED|ERROR) ', l)],out.strip().splitlines()[-1]

def _row(what, module, old, new, names):
    "The table's row: what was broken, and the tests `names` (how often each) that noticed"
    def code(s): return f"`{s.strip()}`".replace('|','\\|') if s.strip() else 'nothing'
    caught = ', '.join(f'{n}{f" ×{k}" if k>1 else ""}' for n,k in names.most_common(4)) + (f' and {len(names)-4} more tests' if len(names)>4 else '')
    return f'|{what}|{module}|{code(old)}|{code(new)}|{caught or "**nothing**"}|'

def main(*words):
    report = root/'tests'/'MUTATIONS.md'
    kept = {l.split('|')[1]:l for l in report.read_text().splitlines() if l.startswith('|')} if words and report.exists() else {}
    chosen,rows = [m for m in mutations if not words or any(w in m[0] for w in words)],{}
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(d)
        for tests in (quick,few,compiled,ranks,learners,looks,contract,adds,scales):
            if not any(m[-1] is tests for m in chosen): continue
            failed,last = failures(d, tests)
            if failed: sys.exit(f'tests fail before anything is broken: {failed}')
            print(f'unbroken: {last}', flush=True)
        for what,module,old,new,tests in chosen:
            f = d/'fastai_runbn'/f'{module}.py'
            sound = f.read_text()
            if sound.count(old)!=1: sys.exit(f'{what}: {old!r} stands {sound.count(old)} times in {module}.py, not once')
            f.write_text(sound.replace(old, new))
            failed,_ = failures(d, tests)
            f.write_text(sound)
            rows[what] = _row(what, module, old, new, Counter(n.split('[')[0].replace('tests/','') for n in failed))
            print(f'{len(failed):4} failed: {what}', flush=True)
    lines = ['# Mutations', '']
    lines += ['The layer broken on purpose, one way at a time, in a scratch copy: which tests noticed. Made by `python tools/mutations.py`; × is the number of cases of a test.', '']
    lines += ['|broken|in|from|to|caught by|', '|---|---|---|---|---|']
    lines += [rows.get(m[0]) or kept[m[0]] for m in mutations if m[0] in rows or m[0] in kept]
    report.write_text('\n'.join(lines)+'\n')
    missed = [what for what,r in rows.items() if '**nothing**' in r]
    if missed: sys.exit(f'not caught: {missed}')

if __name__=='__main__': main(*sys.argv[1:])
