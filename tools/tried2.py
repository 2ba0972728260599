"""The plain loop of trials, second part; `lib` of a row: E10 energy of a batch bounded by 10 through its share; K16 never fewer than 16 values, S16 begins with 16; J innovations of mean and variance jointly; B1 (in JB1, MB1) lengthens by .1 of the step unless innovations agree, JT and MT that times M/32; MBE, JBE with the bound of 10 too"""
import sys,json,time,math,os,warnings
warnings.filterwarnings('ignore')
import torch,numpy as np
from torch import nn
import torch.nn.functional as F
torch.set_num_threads(1)
sys.path.insert(0,os.environ.get('LIB','/tmp/w/lib'))
from functools import lru_cache,partial
from fastai_runbn.bench import quality as q, tasks, peers
from fastai_runbn import layers as L, functional as fn, moments
from fastai_runbn.callback import FilterMeans
from fastai_runbn.surgery import to_runbn
from fastai.basics import set_seed
from fastai.callback.schedule import combined_cos
CIFAR,CLOTHES,VOLUMES = (os.environ.get(k) for k in ('PHOTOS','CLOTHES','VOLUMES'))

# ---------- V1
@lru_cache
def volumes(size=(40,56,40)):
    z=np.load(VOLUMES); ids=sorted(k[6:] for k in z if k.startswith('image_'))
    X,Y=[],[]
    for i in ids:
        x,y=z['image_'+i].astype(np.float32),z['label_'+i].astype(np.int64)
        x=(x-x.mean())/x.std()
        def fit(a,v):
            for d,n in enumerate(size):
                s=a.shape[d]
                if s>n: a=a.take(range((s-n)//2,(s-n)//2+n),d)
                elif s<n: p=[(0,0)]*3; p[d]=((n-s)//2,n-s-(n-s)//2); a=np.pad(a,p,constant_values=v)
            return a
        X.append(fit(x,x.min())); Y.append(fit(y,0))
    return torch.tensor(np.stack(X))[:,None],torch.tensor(np.stack(Y))
class UNet3d(nn.Module):
    def __init__(s,w=(8,16,32,64),n_out=3):
        super().__init__()
        def conv(i,o,stride=1): return nn.Sequential(nn.Conv3d(i,o,3,stride,1,bias=False),nn.BatchNorm3d(o),nn.LeakyReLU(.01,inplace=True))
        s.first=nn.Sequential(conv(1,w[0]),conv(w[0],w[0]))
        s.down=nn.ModuleList([nn.Sequential(conv(i,o,2),conv(o,o)) for i,o in zip(w,w[1:])])
        s.up=nn.ModuleList([nn.ConvTranspose3d(o,i,2,2) for i,o in zip(w,w[1:])])
        s.dec=nn.ModuleList([conv(2*i,i) for i in w[:-1]])
        s.out=nn.Conv3d(w[0],n_out,1)
    def forward(s,x):
        xs=[s.first(x)]
        for d in s.down: xs.append(d(xs[-1]))
        x=xs.pop()
        for u,d in zip(reversed(s.up),reversed(s.dec)): x=d(torch.cat([u(x),xs.pop()],1))
        return s.out(x)
def seg_loss(p,y):
    n=p.shape[1]; pr=p.softmax(1); t=F.one_hot(y,n).movedim(-1,1).float(); d=[0,*range(2,p.ndim)]
    dice=((2*(pr*t).sum(d)+1)/((pr+t).sum(d)+1))[1:].mean()
    return F.cross_entropy(p,y)+1-dice
def dice_score(logits,y):
    p=logits.argmax(1); return float(np.mean([float(2*((p==c)&(y==c)).sum()/((p==c).sum()+(y==c).sum()).clamp(min=1)) for c in (1,2)]))

# ---------- regimes: data (xtr,ytr,xva,yva,part), model, opt, epochs, schedule
def tensors(dls): 
    tr,va=dls.train,dls.valid
    return [t.as_subclass(torch.Tensor) for t in (*tr.dataset.tensors,*va.dataset.tensors)],getattr(tr,'part',None)
def load(reg,bs):
    r=reg.split(':')[0]
    if r=='V1':
        X,Y=volumes(); o=torch.randperm(len(X),generator=torch.Generator().manual_seed(42)); X,Y=X[o],Y[o]
        return (X[:100],Y[:100],X[100:150],Y[100:150]),None
    d=CLOTHES if r in('H1','H2','M1','M2','X1') else CIFAR
    rr={'R2S':'R2 SGD','R1c':'R1 constant','M1':'H2','M2':'H2','X1':'H2'}.get(r,r)
    if r in ('M2c','X1c'): return tensors(tasks.photos_dls(CIFAR,bs,part=3750))
    return tensors(q.regimes[rr].loaders(bs,d))
def make(reg):
    r=reg.split(':')[0]
    if r=='V1': return UNet3d()
    if r=='M1' or r=='M2c':
        from timm import create_model; return create_model('efficientnet_b0',num_classes=10,channel_multiplier=.25 if 0 else None) if 0 else effnet()
    if r in('X1','X1c'): return resnext()
    rr={'R2S':'R2 SGD','R1c':'R1 constant'}.get(r,r)
    return q.regimes[rr].model(CLOTHES if r[0]=='H' else CIFAR)
def effnet():
    from timm.models.efficientnet import EfficientNet
    from timm.models._efficientnet_builder import decode_arch_def,round_channels
    arch=[['ds_r1_k3_s1_e1_c16_se0.25'],['ir_r1_k3_s2_e6_c24_se0.25'],['ir_r2_k5_s1_e6_c40_se0.25'],['ir_r2_k3_s2_e6_c80_se0.25'],['ir_r1_k3_s1_e6_c96_se0.25']]
    return EfficientNet(decode_arch_def(arch),num_classes=10,stem_size=16,num_features=192,round_chs_fn=partial(round_channels,multiplier=.5),act_layer=nn.SiLU)
def resnext():
    from timm.models.resnet import ResNet,Bottleneck
    return ResNet(Bottleneck,(1,1,1),channels=(32,64,128),cardinality=8,base_width=8,num_classes=10,stem_width=16) if 0 else ResNet(Bottleneck,(1,1,1,1),cardinality=8,base_width=2,num_classes=10)
EPOCHS=dict(R1=4,R1c=4,R2=4,R2S=4,R3=4,R5=6,H1=4,H2=4,H3=4,M1=4,M2c=4,X1=4,X1c=4,V1=8)

# ---------- ours, variants
def win_const(n): return lambda bs,M: min(1.,bs/n)
def win_pow(n0,p,lo,hi,m0=32):
    "samples n = n0*(m0/M)^p in [lo,hi]"
    return lambda bs,M: min(1.,bs/max(lo,min(hi,n0*(m0/M)**p)))
class Keeper(fn.OwnWindow):
    def __init__(s,spec): s.spec=spec; s.st={}
    def __reduce__(self): return object.__reduce__(self)
    def forward(s,layer,how,x,weight,bias,state,step):
        sp=s.spec; M=x.numel()//x.shape[1]
        kw={}
        if 'clip' in sp: kw.update(clip=float(sp['clip'][0]),clip_max=float(sp['clip'][1]))
        if sp.get('notrust',True) and 'rg' not in sp: kw['running_grad']=1.
        a=step.weight; st=s.st.get(layer)
        if sp.get('adapt') and st is not None: kw['weight']=st['a']
        step=step._replace(**kw)
        if sp.get('adapt') in ('trigg','prod','cos'):
            mu0,var0=state.mean.clone(),state.var.clone()
            if st is None: st=s.st[layer]=dict(n=0,a=torch.ones(x.shape[1]))
            w_=st['a']
            if sp.get('N') and 'V' in st and st['n']>2:
                lo=min(1.,x.shape[0]/sp.get('nmax',200))
                w_=torch.maximum(w_,(1/(sp['N']*st['V'][0]+1e-9)).clamp(max=1.))
            step=step._replace(weight=w_)
        y,saved=how.forward(x,weight,bias,state,step)
        if sp.get('adapt')=='trigg': s.trigg(st,mu0,var0,saved,a,x.shape[0])
        elif sp.get('adapt') in ('prod','cos'): s.prod(st,mu0,var0,saved,a,x.shape[0])
        elif sp.get('adapt'): s.adapt(layer,state,saved,M,a)
        if k:=sp.get('kappa'):
            kk=k if k<1 else M/(M+k); saved[2].clamp_(min=min(1.,kk))
        return y,saved
    def backward(s,layer,how,dy,x,weight,bias,saved,running,step,scale,need):
        sp=s.spec;kw={}
        if 'clip' in sp: kw.update(clip=float(sp['clip'][0]),clip_max=float(sp['clip'][1]))
        if sp.get('notrust',True): kw['running_grad']=1.
        return how.backward(dy,x,weight,bias,saved,running,step._replace(**kw),scale,need)
    @torch.no_grad()
    def prod(s,st,mu0,var0,saved,a0,bs):
        sp=s.spec; st['n']+=1; t=st['n']-1
        if t==0: return
        m,v=saved[4],saved[5]; sd2=var0+1e-5
        d=m-mu0
        e=torch.stack((d*sd2.rsqrt(),(v+d*d-var0)/sd2))
        if sp.get('of','both')=='mean': e=e[:1]
        elif sp['of']=='var': e=e[1:]
        if t==1: st['V']=torch.zeros_like(e); st['e']=torch.zeros_like(e)
        eta=max(sp.get('eta',.01),(t+sp.get('head',100))**-.5)*sp.get('speed',1.)
        if sp['adapt']=='cos':
            if t>1:
                r=(e*st['e']).sum(1)/(e.norm(dim=1)*st['e'].norm(dim=1)+1e-12)
                st['a']=st['a']*torch.exp(eta*r.mean()*sp.get('boost',1.))
        else:
            st['V'].lerp_(e*e,max(sp.get('phi',1/32),1/t))
            if t>1:
                r=(e*st['e']/(st['V']+1e-12)).clamp(-1,1)
                st['a']=st['a']*torch.exp(eta*r.mean(0)*sp.get('boost',1.))
        st['e']=e
        lo=min(1.,bs/sp.get('nmax',200))
        st['a']=st['a'].clamp(min=lo,max=sp.get('amax',1.))
        if t%500==0: st.setdefault('hist',[]).append(round(float(st['a'].log().mean().exp()),3))
    @torch.no_grad()
    def trigg(s,st,mu0,var0,saved,a0,bs):
        sp=s.spec; st['n']+=1
        if st['n']==1: return
        m,v=saved[4],saved[5]; sd2=var0+1e-5
        d=m-mu0
        e=torch.stack((d*sd2.rsqrt(),(v+d*d-var0)/sd2))
        f=max(sp.get('phi',1/32),1/(st['n']-1))
        if st['n']==2: st['E']=torch.zeros_like(e); st['V']=torch.zeros_like(e)
        st['E'].lerp_(e,f); st['V'].lerp_(e*e,f)
        R=st['E']**2/(st['V']+1e-12)
        w=sp.get('of','max')
        R=R.amax(0) if w=='max' else R[0] if w=='mean' else R[1] if w=='var' else R.mean(0) 
        if sp.get('layer'): R=(st['E']**2/(st['V']+1e-12)).mean(1).max().expand_as(R).contiguous()
        R=R*sp.get('gain',1.)
        lo=min(1.,bs/sp.get('nmax',200))
        st['a']=R.clamp(min=lo,max=sp.get('amax',1.))
    @torch.no_grad()
    def adapt(s,layer,state,saved,M,a0):
        sp=s.spec; mode=sp['adapt']
        m,v=saved[4],saved[5]; C=len(m)
        st=s.st.get(layer)
        if st is None: st=s.st[layer]=dict(a=torch.full((C,),float(a0)),pm=m.clone(),pv=v.clone(),e=torch.zeros(C),ev=torch.zeros(C),sp=torch.zeros(C),n=0)
        if mode=='eff':   # window of N independent values, by differences of batch means
            N=sp['N']; st['n']+=1
            if st['n']>1:
                d2=(m-st['pm'])**2/2/(saved[1]+1e-5)     # variance of a batch mean in units of variance ~ 1/M_eff
                b=max(sp.get('beta',.05),1/(st['n']-1)); st['sp'].lerp_(d2,b)
                st['a']=(1/(st['sp']*N+1e-9)).clamp(min=sp.get('amin',.01),max=sp.get('amax',1.))
            st['pm'].copy_(m)
        elif mode=='sign':  # innovations of the same sign: lag
            eta=sp['eta']; mean,sd=state.mean,(saved[1]+1e-5).sqrt()
            # innovation before merge: m-mu_old = (m-mu_new)/(1-share)
            e=(m-mean)/sd; ev=(v-saved[1])
            st['n']+=1
            if st['n']>1:
                up=torch.sign(e*st['e'])
                if sp.get('both'): up=(up+torch.sign(ev*st['ev']))/2
                st['a'].mul_(torch.exp(eta*up)).clamp_(min=sp.get('amin',.01),max=sp.get('amax',1.))
            st['e']=e; st['ev']=ev

def centre_filters(model,rule):
    "returns KeptMean list [(w,mode)] by rule on convs"
    if rule in (None,'none'): return []
    out=[];convs=[(n,m) for n,m in model.named_modules() if isinstance(m,(nn.Conv2d,nn.Conv3d))]
    for i,(n,m) in enumerate(convs):
        w=m.weight; fan=w[0].numel()
        if w.shape[1]==1 and m.groups>1: continue
        r=rule.split('+')
        if 'first' in r and i==0: out.append((w,0)); continue
        if 'halfall' in r or 'half' in r and i==0: out.append((w,2)); continue
        if 'quarter' in r and i==0: out.append((w,4)); continue
        if 'shrink' in r and i==0: out.append((w,.25)); continue
        if 'inner' in r and i>0: out.append((w,0)); continue
        if 'all' in r: out.append((w,0)); continue
        if 'sp' in r and w[0,0].numel()>1: out.append((w,0)); continue
        if 'keep' in r: out.append((w,1)); continue
        if 'keepinner' in r and i>0: out.append((w,1)); continue
    return out
def fmean(w): return w.mean([*range(1,w.ndim)],keepdim=True)

def run(spec):
    sp=dict(spec); reg,bs,lr,seed=sp['reg'],sp['bs'],sp['lr'],sp['seed']; r=reg.split(':')[0]
    t0=time.perf_counter()
    set_seed(seed)
    model=make(reg)
    (xt,yt,xv,yv),part=load(reg,bs)
    ep=sp.get('epochs',EPOCHS[r]); per=math.ceil((min(part,len(xt)) if part else len(xt))/bs); steps=ep*per
    norm=sp['norm']; means=None; kept=[]
    rule=sp.get('centre','none')
    if norm=='ours':
        to_runbn(model)
        sp.setdefault('win',60)
        w=sp['win']
        f=moments.AdaptiveWindow(sp.get('nmax',200)) if w=='A' else win_const(w) if isinstance(w,(int,float)) else win_pow(*w)
        k=Keeper(sp)
        from fastai_runbn import formulas as FO
        d=dict(zip(FO.Step._fields[-len(FO.Step.__new__.__defaults__):],FO.Step.__new__.__defaults__))
        d['clip'],d['clip_max']=map(float,sp.get('clip',(4,1)))
        FO.Step.__new__.__defaults__=tuple(d.values())
        L.trust=lambda M: moments.at_most_1(M/sp.get('M0',32))
        for m in L.running_norms(model):
            m.set_settings(window=f,eval_window=sp.get('ew',200));
            if w!='A' and not sp.get('base'): m.keeper=k
            if sp.get('base'): m.set_settings(window=L.default_window)
            if 'rgs' in sp: m.set_settings(running_grad=sp['rgs'])
            if sp.get('noclamp'): m.set_settings(clamp=None)
    elif norm=='InstanceNorm':
        from fastai_runbn.bench.peers import use_norm
        use_norm(model,lambda C: (nn.InstanceNorm3d if r in('V1','H3') else nn.InstanceNorm2d)(C,affine=True))
    else: q.contenders[norm](model,steps)
    if rule=='lib': means=FilterMeans(model,None)
    else: kept=[(w,(fmean(w.detach()).clone()*(mode if mode<=1 else (torch.arange(len(w))%mode==mode-1).float().view(-1,*[1]*(w.ndim-1))) if mode else 0)) for w,mode in centre_filters(model,rule)]
    with torch.no_grad():
        for w,mu in kept: w.sub_(fmean(w)-mu)
    ps=list(model.parameters())
    wd=sp.get('wd',0)
    sgd=r in('R1','R1c','R2S')
    if r in('R1','R1c'): opt=torch.optim.SGD(ps,lr,fused=True)
    elif r=='R2S': opt=torch.optim.SGD(ps,lr,momentum=.9,fused=True)
    else: opt=torch.optim.Adam(ps,lr,betas=(.9,.99),eps=1e-5,fused=True)
    slr,sm=combined_cos(.25,lr/25,lr,lr/1e5),combined_cos(.25,.95,.85,.95)
    seg=yt.ndim>1
    lossf=seg_loss if r=='V1' else F.cross_entropy
    g=torch.Generator().manual_seed(1000+seed); it=0; tl=[]; acc=torch.zeros(()); q4=max(1,steps//4); bad=False
    acc_n=16 if r=='R3' else 1
    for e in range(ep):
        order=torch.randperm(len(xt),generator=g)[:part] if part else torch.randperm(len(xt),generator=g)
        model.train()
        for idx in order.split(bs):
            if r!='R1c':
                p=it/steps
                for gr in opt.param_groups:
                    gr['lr']=slr(p)
                    if 'betas' in gr: gr['betas']=(sm(p),.99)
                    elif gr['momentum']: gr['momentum']=sm(p)
            loss=lossf(model(xt[idx]),yt[idx]); loss.backward()
            acc+=loss.detach(); it+=1
            if it%q4==0:
                tl.append(round(float(acc)/q4,3)); acc.zero_()
                if not math.isfinite(tl[-1]): bad=True
            if it%acc_n==0:
                with torch.no_grad():
                    if means: means.before_step()
                    for w,_ in kept: w.grad.sub_(fmean(w.grad))
                opt.step(); opt.zero_grad()
                with torch.no_grad():
                    if means: means.after_step()
                    elif it%16==0:
                        for w,mu in kept: w.sub_(fmean(w)-mu)
            if bad: break
        if bad: break
    model.eval(); vb=10 if r=='V1' else 20 if seg else 256
    with torch.no_grad():
        out=[model(b) for b in xv.split(vb)]
        p=torch.cat(out); 
        vl=sum(float(lossf(o,y))*len(y) for o,y in zip(out,yv.split(vb)))/len(yv)
    if r=='V1': s=dice_score(p,yv)
    elif seg:
        pr=p.argmax(1); n=p.shape[1]; ious=[float(((pr==c)&(yv==c)).sum()/((pr==c)|(yv==c)).sum().clamp(min=1)) for c in range(n)]; s=float(np.mean(ious))
    else: s=float((p.argmax(1)==yv).float().mean())
    row=dict(spec,score=round(s,4),loss=round(vl,4) if math.isfinite(vl) else None,tl=tl,sec=round(time.perf_counter()-t0,1))
    if norm=='ours' and sp.get('adapt'):
        row['a']=[round(float(k.st[m]['a'].log().mean().exp()),3) for m in L.running_norms(model)]
        if 'hist' in k.st[L.running_norms(model)[0]]: row['a']=[k.st[m]['hist'][:: max(1,len(k.st[m]['hist'])//5)] for m in L.running_norms(model)]
    return row

if __name__=='__main__':
    specs=json.load(open(sys.argv[1])); out=sys.argv[2]
    me,of=int(os.environ.get('ME',0)),int(os.environ.get('OF',1))
    done=set()
    def key(s): return json.dumps({k:v for k,v in s.items() if k not in('score','loss','tl','sec','a')},sort_keys=True)
    if os.path.exists(out): done={key(json.loads(l)) for l in open(out)}
    for i,s in enumerate(specs):
        if i%of!=me or key(s) in done: continue
        try: row=run(s)
        except Exception as ex:
            import traceback; traceback.print_exc(); row=dict(s,score=None,loss=None,tl=[],sec=0)
        with open(out,'a') as f: f.write(json.dumps(row)+'\n')
        print(json.dumps(row),flush=True)
