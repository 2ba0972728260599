"""Several gloo processes on this machine that stay up and run functions on request,
each in bounded time"""
import os,queue,tempfile,time,traceback
from datetime import timedelta
import torch, torch.distributed as dist, torch.multiprocessing as mp

def worker(rank, world, store, asked, answers, seconds):
    "Serve calls `(f, args)` until `None` comes"
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{store}',
        rank=rank, world_size=world, timeout=timedelta(seconds=seconds))
    while (call := asked.get()) is not None:
        f,args = call
        try: answers.put((rank, True, f(rank, world, *args)))
        except BaseException: answers.put((rank, False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()

class Ranks:
    """`world` processes; `ranks(f, *args)` runs `f(rank, world, *args)` in all of them
    and returns their results in order"""
    def __init__(self, world, seconds=30):
        self.world,self.seconds,self.procs = world,seconds,[]
    def start(self):
        ctx = mp.get_context('spawn')
        self.folder = tempfile.TemporaryDirectory()
        self.asked = [ctx.SimpleQueue() for _ in range(self.world)]
        self.answers = ctx.Queue()
        store = f'{self.folder.name}/store'
        def process(rank, asked):
            args = rank,self.world,store,asked,self.answers,self.seconds
            return ctx.Process(target=worker, args=args, daemon=True)
        self.procs = [process(r, q) for r,q in enumerate(self.asked)]
        for p in self.procs: p.start()

    def __call__(self, f, *args, timeout=90):
        got = self.all(f, *args, timeout=timeout)
        bad = [f'rank {r}: {res}'
            for r,(ok,res) in sorted(got.items()) if not ok]
        if bad:
            self.kill() # the others may be in the middle of something
            raise AssertionError('\n'.join(bad))
        return [got[r][1] for r in range(self.world)]

    def all(self, f, *args, timeout=90, but=()):
        """What each rank answered, `{rank: (went well, result or traceback)}`;
        those of `but` are not waited for"""
        if not self.procs: self.start()
        for q in self.asked: q.put((f, args))
        got,end = {},time.monotonic()+timeout
        while len(got)<self.world-len(but):
            left = max(.1, end-time.monotonic())
            try: rank,ok,res = self.answers.get(timeout=left)
            except queue.Empty:
                self.kill()
                silent = sorted({*range(self.world)}-{*got}-{*but})
                raise AssertionError(f'{f.__name__}: ranks {silent} gave no answer '
                    f'in {timeout} s; the others: {got}') from None
            got[rank] = ok,res
        return got

    def kill(self):
        for p in self.procs: p.kill()
        for p in self.procs: p.join(10)
        self.procs = []

    def stop(self):
        for q in self.asked if self.procs else (): q.put(None)
        for p in self.procs: p.join(20)
        self.kill()
