"`runbn` in a shell: interrupted, piped, on a terminal, with files that cannot be written"
import os,pty,re,select,signal,subprocess,sys,time
from pathlib import Path
import pytest,torch
from torch import nn
from fastai_runbn import cli
from fastai_runbn.all import RunningBatchNorm2d
from fastai_runbn.bench import quality
from fastai_runbn.reference import ReferenceRunningBatchNorm

root = Path(cli.__file__).resolve().parents[1]
main = 'import sys; from fastai_runbn.cli import main; main(sys.argv[1:])'
program = [sys.executable, '-c', main]
def start(*args, cwd, **kw):
    "The program in a process; `env`: what its environment has beside, or instead"
    env = {k:v for k,v in os.environ.items()
        if k not in ('FORCE_COLOR','NO_COLOR')}
    env |= {'PYTHONPATH':str(root), 'TERM':'xterm'}
    env |= kw.pop('env', {})
    def hear(): # a shell has what it starts in the background ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    kw = {'stdout':subprocess.PIPE, 'stderr':subprocess.PIPE,
        'text':True, **kw}
    return subprocess.Popen([*program,*args], cwd=cwd, env=env,
        start_new_session=True, preexec_fn=hear, **kw)

def run(capsys, *args):
    "Exit code, output and errors of `runbn args`, in this process"
    try:
        cli.main(list(args))
        code = 0
    except SystemExit as e: code = e.code
    return code,*capsys.readouterr()

def one_line(got, code, *says):
    "Of what `run` returns: this code, and one line of errors, which says this"
    code_,_,err = got
    assert (code_,len(err.splitlines()))==(code,1), got
    assert all(s in err for s in says), got

# interrupted

def test_ctrl_c_is_130_and_one_line(tmp_path):
    p = start('demo', '--epochs', '50', cwd=tmp_path)
    assert p.stdout.readline().startswith("Lesson 10's convnet")
    time.sleep(1)
    os.killpg(p.pid, signal.SIGINT)
    try: out,err = p.communicate(timeout=60)
    finally: p.kill()
    assert (p.returncode,err)==(130,'runbn demo: interrupted\n')
    assert 'Traceback' not in out
    assert not [*tmp_path.iterdir()]

def members(group):
    "Processes of a group that still run"
    def of(stat):
        try: return re.match(r'(\d+) \(.*\) (\S) \d+ (\d+)', stat.read_text(), re.S)
        except OSError: return None                                               # gone meanwhile
    found = map(of, Path('/proc').glob('[0-9]*/stat'))
    running = [s for s in found if s and s[2]!='Z']
    return [int(s[1]) for s in running if int(s[3])==group]

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize('wait', [.2,8], ids=['as they import','at work'])
def test_ctrl_c_stops_the_processes_of_a_study(tmp_path, wait):
    study = 'bench','quality','--quick','--jobs','2','--json','x.jsonl'
    p = start(*study, cwd=tmp_path)
    end = time.time()+60
    # it, two workers, and multiprocessing's tracker
    while len(members(p.pid))<4 and time.time()<end:
        time.sleep(.1)
    time.sleep(wait)
    os.killpg(p.pid, signal.SIGINT)
    try: out,err = p.communicate(timeout=40) # the trials take longer
    finally:
        if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    assert (p.returncode,err)==(130,'runbn bench: interrupted\n')
    end = time.time()+10
    # multiprocessing's tracker goes when it sees that the others have
    while members(p.pid) and time.time()<end:
        time.sleep(.2)
    assert not members(p.pid)

def test_an_interrupted_study_keeps_its_trials(tmp_path, monkeypatch, capsys):
    def study(path, names, **kw):
        Path(path).write_text('{}')
        raise KeyboardInterrupt
    monkeypatch.setattr(quality, 'bench_quality', study)
    code,out,err = run(capsys, 'bench', 'quality', '--json', f'{tmp_path}/x.jsonl')
    assert (code,err)==(130,'runbn bench: interrupted\n') and 'Trials so far: ' in out

@pytest.mark.parametrize('given,want',
    [([],'R1 H3 H9'),
    (['photos'],'R1 R2 H3 H6 H7 H9 H10'), (['photos','--only','H[1-8]$'],'H1 H2 H3 H4 H5 H6 H7'),
    (['roads'],'R1 H3 H8 H9 V2 V3'), (['a.npz'],'R1 H3 H9 V1 V1_MONAI')], ids=str)
def test_nets_on_clothes_do_not_get_photographs(given, want, tmp_path, monkeypatch, capsys):
    "Nor does anything run without the data that it needs"
    def study(path, names, **kw):
        ran.extend(names)
        raise KeyboardInterrupt
    ran = []
    monkeypatch.setattr(quality, 'bench_quality', study)
    if given:
        inside = 'labels' if given[0]=='roads' else 'dog'
        (tmp_path/given[0]/'train'/inside).mkdir(parents=True)
    args = ['--data',str(tmp_path/given[0]),*given[1:]] if given else []
    assert run(capsys, 'bench', 'quality', *args)[0]==130
    nets = [n.replace(' ', '_') for n in ran
        if n in ('R1','R2') or n[0] in 'HV']
    assert nets==want.split()

@pytest.mark.parametrize('command', ['demo','bench','convert'])
def test_every_command_has_it(command, monkeypatch, capsys):
    def interrupt(*args, **kw): raise KeyboardInterrupt
    for f in ('_contend','_bench_speed','_read'):
        monkeypatch.setattr(cli, f, interrupt)
    args = dict(demo=[], bench=['speed'], convert=[__file__,'x.pth'])
    got = run(capsys, command, *args[command])
    one_line(got, 130, f'runbn {command}: interrupted')

# pipes and terminals

def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    torch.save(nn.BatchNorm2d(3).state_dict(), tmp_path/'a.pth')
    read,write = os.pipe()
    os.close(read)
    p = start('convert', 'a.pth', 'b.pth', cwd=tmp_path, stdout=write)
    os.close(write)
    _,err = p.communicate(timeout=60)
    assert (err,p.returncode)==('',1)

def on_terminal(*args, cwd, **env):
    "What a terminal gets to see"
    master,slave = pty.openpty()
    p = start(*args, cwd=cwd, env=env,
        stdout=slave, stderr=slave, stdin=slave)
    os.close(slave)
    seen,end = b'',time.time()+120
    while time.time()<end and select.select([master], [], [], 60)[0]:
        try: new = os.read(master, 4096)
        except OSError: break # Linux: all ends closed
        if not new: break
        seen += new
    os.close(master)
    return p.wait(timeout=60),seen.decode()

colour = re.compile(r'\x1b\[[\d;]*\b(3[0-7]|9[0-7])m')
@pytest.mark.parametrize('env',
    [{},{'NO_COLOR':'1'}], ids=['colours','NO_COLOR'])
def test_a_terminal_has_a_bar_and_colours_unless_told_not_to(tmp_path, env):
    what = '--only','2x64x16x16 contiguous','--contenders','^ours$','--device','cpu'
    code,seen = on_terminal('bench', 'speed', '--quick', *what, cwd=tmp_path, **env)
    assert code==0 and 'cases' in seen, seen
    shown,hidden = '\x1b[?25h','\x1b[?25l'
    assert seen.rindex(shown)>seen.rindex(hidden), seen     # the cursor is back
    assert bool(colour.search(seen))==(not env), seen

# options

def test_help_of_every_command_names_every_option(capsys):
    for name,f in cli.commands.items():
        code,out,err = run(capsys, name, '--help')
        assert (code,err)==(0,'')
        assert f.__doc__.split(',')[0] in ' '.join(out.split())
        for k in f.__annotations__: assert k in out, (name,k)

def test_version(capsys):
    assert run(capsys, '--version')==(0,f'runbn {cli.__version__}\n','')
def test_unknown_option_names_the_command(capsys):
    got = run(capsys, 'bench', 'speed', '--nope')
    one_line(got, 2, 'runbn bench: unrecognized arguments: --nope', 'runbn bench --help')

def test_out_and_json_are_the_same_everywhere(capsys, tmp_path):
    (tmp_path/'d.png').mkdir()
    bad = {'x.jpg':'ends in .png', f'{tmp_path}/d.png':'a folder',
        f'{tmp_path}/no/x.png':'no folder'}
    for args in (['demo'],['bench','speed'],['bench','quality']):
        for out,says in bad.items():
            one_line(run(capsys, *args, '--out', out), 2, '--out', says)
    one_line(run(capsys, 'convert', __file__, str(tmp_path)), 2, 'a folder')

def test_no_permission(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    one_line(run(capsys, 'demo', '--out', f'{tmp_path}/x.png'), 2, 'no permission')

def test_a_full_disk_is_one_line_and_exit_1(capsys, monkeypatch):
    def full(*args, **kw): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(cli, '_read', full)
    one_line(run(capsys, 'convert', __file__, 'x.pth'), 1, 'runbn convert:', 'No space left')

some = '^[^,+]+$'
@pytest.mark.parametrize('given,seeds,jobs,norms',
    [([],3,2,''),
    (['--quick'],1,2,some),
    (['--quick','--seeds','2','--jobs','1'],2,1,some),
    (['--seeds','5','--contenders','MABN'],5,2,'MABN')])
def test_options_of_a_study_reach_it(given, seeds, jobs, norms, monkeypatch, capsys):
    got = {}
    def study(path, names, **kw):
        got.update(kw)
        raise KeyboardInterrupt
    monkeypatch.setattr(quality, 'bench_quality', study)
    assert run(capsys, 'bench', 'quality', *given)[0]==130
    assert (got['seeds'],got['jobs'],got['norms'])==(seeds,jobs,norms)

# convert

def checkpoint(path, **kw):
    m = RunningBatchNorm2d(3, persistent_window=True)
    m(torch.randn(2,3,4,4))
    sd = {f'0.{n}':v for n,v in m.state_dict().items()}
    nested = {k:sd for k in kw.pop('keys')}
    torch.save(nested | kw, path)

@pytest.mark.parametrize('key', ['model','state_dict'])
def test_nested_checkpoints(key, tmp_path, capsys):
    checkpoint(tmp_path/'a.pth', keys=[key], epoch=3)
    out = f'{tmp_path}/b.pth'
    said = f'{out}: the windows of 1 layer left out\n'
    assert run(capsys, 'convert', f'{tmp_path}/a.pth', out)==(0,said,'')
    got = torch.load(out)
    names = [f'0.{k}' for k in nn.BatchNorm2d(3).state_dict()]
    assert got['epoch']==3 and [*got[key]]==names

def test_lesson10(tmp_path, capsys):
    m = ReferenceRunningBatchNorm(3)
    m(torch.randn(2,3,4,4))
    sd = {f'0.{k}':v for k,v in m.state_dict().items()}
    torch.save(sd, tmp_path/'a.pth')
    code,out,err = run(capsys, 'convert', f'{tmp_path}/a.pth', f'{tmp_path}/b.pth')
    assert (code,err)==(0,'')
    assert "sums, squares and counts of 1 layer made BatchNorm's" in out
    net = nn.Sequential(nn.BatchNorm2d(3))
    net.load_state_dict(torch.load(tmp_path/'b.pth'))

def test_safetensors_hold_tensors_only(tmp_path, capsys):
    args = 'convert',f'{tmp_path}/a.pth',f'{tmp_path}/b.safetensors'
    torch.save({'w':torch.ones(2), 'epoch':3}, tmp_path/'a.pth')
    one_line(run(capsys, *args), 2, "'epoch' is none")
    t = torch.ones(3)
    torch.save({'a':t, 'b':t}, tmp_path/'a.pth')                                 # tied weights
    assert run(capsys, *args)[0]==0

def test_data_that_are_neither_folder_nor_tar(tmp_path, capsys):
    path = tmp_path/'a.zip'
    path.write_bytes(b'PK')
    code,out,err = run(capsys, 'bench', 'quality', '--data', str(path))
    expected = 'a folder, a tar or an .npz was expected.'
    assert (code,err)==(2,f'runbn bench: --data {path}: {expected}\n')
