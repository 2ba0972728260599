// Running batch norm on the CPU: one forward (moments, merge, normalise) and one backward (sums,
// reaction, gradient of x), which `formulas.py` has in PyTorch operators, name for name.
//
// Plain C11 with the vectors of gcc and clang; no headers of Python, PyTorch or OpenMP. The file
// includes itself: once for each instruction set, and in each once for each type of activations.
// Threads are those of the pool that `par` is the entry of (GOMP_parallel of PyTorch's libgomp);
// without it there is one. What is computed does not depend on how many there are.
#if !defined ISA // ------------------------------------------------------------ common to all
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined __x86_64__
#include <immintrin.h>
#endif

typedef int64_t i64;
typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

// One call, as Python packs it. Tensors are contiguous; those of a channel each are `T`: float, or
// double for double.
typedef struct {
    // the plan: what stays the same while settings and sizes do
    i64 type, isa, N, C, S, last, act, samples, flags;       // last: channels last
    double weight, average, momentum, eps, clip, clip_max, pays, longest;
    // this call
    i64 phases, threads, n_floors;
    double scale;                                            // of the loss
    parallel par;
    const void *x, *dy, *gamma, *beta;                       // (N,C,S) or (N,S,C); gamma, beta: or NULL
    void *y;                                                 // the result, or dx
    void *saved;                                             // (7,C), see below
    void *dbeta, *dgamma;                                    // sums of dz and dz times x-hat, (C,)
    void *G;                                                 // the statistics' reaction (2,C), or NULL
    const void *weights;                                     // a weight a channel, (C,), or NULL
    void *mean, *var, *count, *avg_mean, *avg_var, *steps;   // state, (C,) each
    i64 *batches, *seen, *skipped;
    const void *floors;                                      // (n_floors,)
    void *grad;                                              // running gradient (2,C)
    void *known_mean, *known_var;                            // or NULL: not kept
    void *innovations;                                       // (4,C), see below, or NULL
    // made here
    i64 M, block, D, width, rows, chunks, together, past, left_out, written;
    double floor, fresh_floor, full_floor;
    void *memory;
    double *part;
    void *coef, *lanes;
} call;

enum { MOMENTS = 1, MERGE = 2, NORMALISE = 4, SUMS = 8, REACT = 16, DX = 32 };  // phases
enum { LINEAR, RELU, SILU };                                                    // act
enum { UPDATE = 1, INCLUSIVE = 2, CLIPPED = 4, OWN_AVERAGE = 8, SET = 16, CUMULATIVE = 32,
       CLAMPED = 64, RUNNING = 128, ADAPTIVE = 256 };                           // flags
enum { LENGTH, INNOVATIONS, SQUARE, TRACE };                                    // of innovations
enum { MEAN, VAR, SHARE, FACTOR, BATCH_MEAN, BATCH_VAR, UNPAID };               // rows of saved
enum { ROWS = 4, PAST = 4 << 20 };                                              // see cl_sum, write
enum { HEAD_START = 9, FULL_STEPS = 1 << 24, ENOUGH = 16 };                     // as in Python
enum { DONE, NO_MEMORY };                                                       // what calls return
enum { BY_OTHERS = 1, TRAINED = 2 };                                            // written

#define FULL_SAMPLES ((i64)1 << 40)                                             // no floor any more
#define CAT_(a, b, c) a##_##b##_##c
#define CAT(a, b, c) CAT_(a, b, c)
#define INLINE static inline __attribute__((always_inline))
INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 parts(i64 n, i64 each) { return (n + each - 1) / each; }

// Each thread begins with a part of its own, so that what it has read before is in its cache; then
// it helps the others. `next` is how far each part is.
enum { MOST_THREADS = 64 };
typedef struct {
    void (*body)(call *, i64);
    call *p;
    i64 n, threads, came, next[MOST_THREADS];
} job;
INLINE i64 take(i64 *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }
static void work(void *job_) {
    job *j = job_;
    i64 own = take(&j->came);
    for (i64 k = own; k < own + j->threads; k++) {
        i64 part = k % j->threads, end = j->n * (part + 1) / j->threads;
        for (i64 i; (i = take(j->next + part)) < end;) j->body(j->p, i);
    }
#if defined __x86_64__
    _mm_sfence(); // what went past the caches is there
#endif
}
static void run(call *p, void (*body)(call *, i64), i64 n) {
    i64 threads = p->par ? most(1, least(least(p->threads, MOST_THREADS), n)) : 1;
    job j = {body, p, n, threads};
    for (i64 part = 1; part < threads; part++) j.next[part] = n * part / threads;
    if (threads > 1) p->par(work, &j, threads, 0); else work(&j);
}

#if defined __x86_64__ && !defined __clang__
#define AS_(x) _Pragma(#x)
#define BEGIN(target_) AS_(GCC push_options) AS_(GCC target(target_))
#define END AS_(GCC pop_options)
#elif defined __x86_64__
#define AS_(x) _Pragma(#x)
#define BEGIN(t) AS_(clang attribute push(__attribute__((target(t))), apply_to = function))
#define END AS_(clang attribute pop)
#endif

#define ISA base
#define BYTES 16
#include "cpu.c"
#undef ISA
#undef BYTES
#if defined __x86_64__
BEGIN("avx2,fma,f16c")
#define ISA avx2
#define BYTES 32
#include "cpu.c"
#undef ISA
#undef BYTES
END
BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#define ISA avx512
#define BYTES 64
#include "cpu.c"
#undef ISA
#undef BYTES
END
#define EACH(f) {f##_f32_base, f##_f64_base, f##_b16_base}, \
    {f##_f32_avx2, f##_f64_avx2, f##_b16_avx2}, {f##_f32_avx512, f##_f64_avx512, f##_b16_avx512}
enum { ISAS = 3 };
#else
#define EACH(f) {f##_f32_base, f##_f64_base, f##_b16_base}
enum { ISAS = 1 };
#endif

static int (*const forwards[ISAS][3])(call *) = {EACH(forward)};
static int (*const backwards[ISAS][3])(call *) = {EACH(backward)};
static int dispatch(int (*const by[ISAS][3])(call *), const void *packed) {
    call c;
    memcpy(&c, packed, offsetof(call, M));
    if (!c.x) return NO_MEMORY;
    c.memory = NULL;
    int res = by[least(c.isa, ISAS - 1)][c.type](&c);
    free(c.memory);
    return res;
}
int runbn_forward(const void *packed) { return dispatch(forwards, packed); }
int runbn_backward(const void *packed) { return dispatch(backwards, packed); }
int runbn_size(void) { return offsetof(call, M); }

#elif !defined X // ---------------------------------------------- an instruction set, all types
#define T float
#define I int32_t
#define X float
#define TYPE f32
#include "cpu.c"
#undef X
#undef TYPE
#define X uint16_t
#define TYPE b16
#define BF16
#include "cpu.c"
#undef X
#undef TYPE
#undef T
#undef I
#undef BF16
#define T double
#define I int64_t
#define X double
#define TYPE f64
#define DOUBLE
#include "cpu.c"
#undef X
#undef TYPE
#undef T
#undef I
#undef DOUBLE

#else // --------------------- activations X, computed with in T, by an instruction set
#define F(name) CAT(name, TYPE, ISA)
enum { F(L) = BYTES / sizeof(T) };
#define L F(L)
typedef T F(V) __attribute__((vector_size(BYTES)));
typedef I F(VI) __attribute__((vector_size(BYTES)));
typedef X F(VX) __attribute__((vector_size(L * sizeof(X)), aligned(1), may_alias));
typedef double F(VD) __attribute__((vector_size(L * 8)));
typedef T F(VU) __attribute__((vector_size(BYTES), aligned(1), may_alias));
#define V F(V)
#define VI F(VI)
#define VD F(VD)
#define AT(p) (*(F(VU) *)(p))

INLINE V F(all)(T v) { return v - (V){}; }
INLINE V F(pick)(VI where, V a, V b) { return (V)((where & (VI)a) | (~where & (VI)b)); }
INLINE double F(total)(VD v) {
    double a = 0, b = 0;
    #pragma GCC unroll 8
    for (int i = 0; i < L; i += 2) { a += v[i]; b += v[i + 1]; }
    return a + b;
}
INLINE VD F(wide)(V v) { return __builtin_convertvector(v, VD); }
#ifdef DOUBLE
INLINE T F(root)(T v) { return sqrt(v); }
INLINE T F(sigmoid1)(T z) { return 1 / (1 + exp(-z)); }
INLINE V F(sigmoid)(V z) { for (int i = 0; i < L; i++) z[i] = F(sigmoid1)(z[i]); return z; }
#else
INLINE T F(root)(T v) { return sqrtf(v); }
INLINE T F(sigmoid1)(T z) { return 1 / (1 + expf(-z)); }
INLINE V F(sigmoid)(V z) { // exp(t) = 2^n exp(r); log 2 in two parts, polynomial of Cephes' expf
    V t = F(pick)(z > 87, F(all)(-87), F(pick)(z < -87, F(all)(87), -z));
    V shifted = t * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
    V r = t - n * .693359375f + n * 2.12194440e-4f;
    V e = r * 1.9875691500e-4f + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * r * r + r + 1;
    VI power = ((VI)shifted - 0x4B400000) * (1 << 23) + 0x3f800000;
    return 1 / (1 + e * (V)power);
}
#endif

#ifdef BF16 // the upper half of a float; rounded to the nearest, ties to even, NaN stays NaN
typedef uint32_t F(VW) __attribute__((vector_size(BYTES)));
INLINE T F(get)(const X *p) { uint32_t u = (uint32_t)*p << 16; T v; memcpy(&v, &u, 4); return v; }
INLINE void F(put)(X *p, T v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    *p = v != v ? (u >> 16) | 64 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
INLINE V F(load)(const X *p) { return (V)(__builtin_convertvector(*(F(VX) *)p, F(VW)) << 16); }
INLINE void F(store)(X *p, V v) {
    F(VW) u = (F(VW))v, nan = (F(VW))(v != v);
    u = (nan & ((u >> 16) | 64)) | (~nan & ((u + 0x7fff + ((u >> 16) & 1)) >> 16));
    *(F(VX) *)p = __builtin_convertvector(u, F(VX));
}
#else
INLINE T F(get)(const X *p) { return *p; }
INLINE void F(put)(X *p, T v) { *p = v; }
INLINE V F(load)(const X *p) { return (V)*(F(VX) *)p; }
INLINE void F(store)(X *p, V v) { *(F(VX) *)p = (F(VX))v; }
#endif

// Of a large result: past the caches, which it would not stay in, and which would have to read it
INLINE void F(write)(X *p, V v, int past) {
#if BYTES == 64 && !defined BF16
    if (past) { _mm512_stream_si512((void *)p, (__m512i)v); return; }
#elif BYTES == 32 && !defined BF16
    if (past) { _mm256_stream_si256((void *)p, (__m256i)v); return; }
#endif
    F(store)(p, v);
}

// The activation and its gradient, of the normalised value z
INLINE V F(active)(V z, int act) {
    return act == RELU ? F(pick)(z <= 0, (V){}, z) : act == SILU ? z * F(sigmoid)(z) : z;
}
INLINE T F(active1)(T z, int act) {
    return act == RELU ? (z <= 0 ? 0 : z) : act == SILU ? z * F(sigmoid1)(z) : z;
}
INLINE V F(slope)(V dy, V z, int act) {
    if (act == RELU) return F(pick)(z <= 0, (V){}, dy);
    if (act == LINEAR) return dy;
    V s = F(sigmoid)(z);
    return dy * s * (1 + z * (1 - s));
}
INLINE T F(slope1)(T dy, T z, int act) {
    if (act == RELU) return z <= 0 ? 0 : dy;
    if (act == LINEAR) return dy;
    T s = F(sigmoid1)(z);
    return dy * s * (1 + z * (1 - s));
}

// ------------------------------------------------------------------- numbers of a channel
typedef struct { T mean, scale, shift, rstd; } F(affine); // z = (x-mean)*scale + shift
INLINE F(affine) F(affine_of)(call *p, i64 c) {
    const T *saved = p->saved, *gamma = p->gamma, *beta = p->beta;
    T rstd = 1 / F(root)(saved[VAR * p->C + c] + (T)p->eps);
    T scale = gamma ? rstd * gamma[c] : rstd;
    return (F(affine)){saved[MEAN * p->C + c], scale, beta ? beta[c] : 0, rstd};
}

// From a to b by the share t: from the nearer end, as torch.lerp does it, so that a small one stays
INLINE T F(between)(T a, T b, T t) { return t < .5f ? a + t * (b - a) : b - (1 - t) * (b - a); }

INLINE int F(differ)(T now, T known) { return now != known && (now == now || known == known); }

// Channels whose statistics others have written start from those (`seed` of formulas.py); floors
// of all channels, into the row UNPAID of saved
static void F(follow)(call *p, i64 c0, i64 c1) {
    const i64 C = p->C, bytes = (c1 - c0) * sizeof(T);
    const T *amean = p->avg_mean, *avar = p->avg_var, batches = *p->batches;
    T *mean = p->mean, *var = p->var, *count = p->count, *steps = p->steps, *grad = p->grad;
    T *kmean = p->known_mean, *kvar = p->known_var, *floor = (T *)p->saved + UNPAID * C;
    T *innovations = p->innovations;
    for (i64 c = c0; c < c1; c++) floor[c] = p->floor;
    if (!kmean || !(memcmp(amean + c0, kmean + c0, bytes) || memcmp(avar + c0, kvar + c0, bytes)))
        return;
    for (i64 c = c0; c < c1; c++) {
        if (!F(differ)(amean[c], kmean[c]) && !F(differ)(avar[c], kvar[c])) continue;
        const int trained = batches > 0 || amean[c] != 0 || avar[c] != 1;
        kmean[c] = mean[c] = amean[c];
        kvar[c] = var[c] = avar[c];
        count[c] = trained ? -1 : 0;
        steps[c] = batches > 0 ? HEAD_START + batches : trained ? FULL_STEPS : HEAD_START;
        grad[c] = grad[C + c] = 0;
        for (i64 row = LENGTH; innovations && row <= TRACE; row++) innovations[row * C + c] = 0;
        floor[c] = trained ? p->full_floor : p->fresh_floor;
        __atomic_fetch_or(&p->written, BY_OTHERS | (trained ? TRAINED : 0), __ATOMIC_RELAXED);
    }
}

// Weights of the batch in adaptive windows, for channels c0 to c1, into the row of their shares,
// and what its innovation says of their length
static void F(adapt)(call *p, i64 c0, i64 c1) {
    const i64 C = p->C;
    const int update = p->flags & UPDATE;
    const T bs = p->samples, longest = p->longest, eps = p->eps;
    const T first = p->M < ENOUGH ? bs * ENOUGH / p->M : bs;
    const T *restrict mean = p->mean, *restrict var = p->var, *restrict count = p->count;
    T *restrict length = p->innovations, *restrict batches = length + INNOVATIONS * C;
    T *restrict square = length + SQUARE * C, *restrict trace = length + TRACE * C;
    T *restrict s = p->saved, *restrict a = s + SHARE * C;
    const T *restrict bmean = s + BATCH_MEAN * C, *restrict bvar = s + BATCH_VAR * C;
    #pragma omp simd
    for (i64 c = c0; c < c1; c++) {
        T t = batches[c], n = t > 0 ? length[c] : count[c] < 0 ? longest : first;
        n = n < longest ? n : longest;
        a[c] = bs < n ? bs / n : 1;
        T e = (bmean[c] - mean[c]) / F(root)(var[c] + eps), t1 = t + 1;
        T part = 1 / t1;
        part = part > (T)(1. / 32) ? part : (T)(1. / 32);
        T square1 = F(between)(square[c], e * e, part);
        T lag = e * trace[c] * F(root)(a[c] * (2 - a[c])) / (square1 + (T)1e-12);
        lag = lag > 1 ? 1 : lag;
        lag = lag < -1 ? -1 : lag;
        T rate = 1 / F(root)(t1 + 100);
        T step = lag * (rate > (T).01 ? rate : (T).01);
        T n1 = n * (1 - step + step * step / 2);
        n1 = n1 > bs ? n1 : bs;
        n1 = n1 < longest ? n1 : longest;
        int learns = update && count[c] != 0 && e * e < (T)INFINITY && bvar[c] < (T)INFINITY;
        length[c] = learns ? n1 : length[c];
        batches[c] = learns ? t1 : t;
        square[c] = learns ? square1 : square[c];
        trace[c] = learns ? trace[c] + e - a[c] * trace[c] : trace[c];
    }
}

// Merge the batch into window and average, for channels c0 to c1; saves what to normalise with
static void F(merge)(call *p, i64 c0, i64 c1) {
    F(follow)(p, c0, c1);
    const int adaptive = p->flags & ADAPTIVE;
    if (adaptive) F(adapt)(p, c0, c1);
    const i64 C = p->C;
    const int update = p->flags & UPDATE, clipped = p->flags & CLIPPED, floored = p->flags & CLAMPED;
    const int own = p->flags & OWN_AVERAGE, set = p->flags & SET, cum = p->flags & CUMULATIVE;
    const int keep = update && p->known_mean;
    const T M = p->M, eps = p->eps, average = p->average, momentum = p->momentum;
    const T clip = p->clip, clip_max = p->clip_max, unbias = M > 1 ? M / (M - 1) : 1;
    const T batch = *p->batches + 1;
    const T *restrict weights = p->weights, weight = p->weight;
    T *restrict mean = p->mean, *restrict var = p->var, *restrict count = p->count;
    T *restrict amean = p->avg_mean, *restrict avar = p->avg_var, *restrict steps = p->steps;
    T *restrict kmean = p->known_mean, *restrict kvar = p->known_var;
    T *restrict s = p->saved, *restrict s_var = s + VAR * C, *restrict s_share = s + SHARE * C;
    T *restrict s_factor = s + FACTOR * C, *restrict s_unpaid = s + UNPAID * C;
    const T *restrict bmean = s + BATCH_MEAN * C, *restrict bvar = s + BATCH_VAR * C;
    i64 bad = 0;
    #pragma omp simd reduction(+:bad)
    for (i64 c = c0; c < c1; c++) {
        T m = bmean[c], v = bvar[c], a = adaptive ? s_share[c] : weights ? weights[c] : weight;
        // the window
        T n0 = count[c], n = (1 - a) * (n0 < -.5f ? M : n0) + a * M, rho = a * M / n;
        T d = m - mean[c], go = rho * d;
        T mean1 = mean[c] + go, var1 = F(between)(var[c], v, rho) + go * (d - go);
        int ok = var1 < (T)INFINITY;
        // the average
        T t = steps[c] + 1, cumulative = t - HEAD_START;
        T share = (HEAD_START + 1) / t;
        share = share > average ? share : average;
        share = share < rho ? share : rho;
        share = set ? momentum : share;
        share = cum ? 1 / (cumulative < batch ? cumulative : batch) : share;
        d = m - amean[c];
        go = share * d;
        T spread = set ? 0 : go * (d - go), v1 = set ? v * unbias : v;
        T amean1 = amean[c] + go, avar1 = F(between)(avar[c], v1, share) + spread;
        int ok2 = own ? avar1 < (T)INFINITY : ok;
        // what is not finite stays out
        rho = ok ? rho : 0;
        mean1 = ok ? mean1 : mean[c];
        var1 = ok ? var1 : var[c];
        amean1 = !ok2 ? amean[c] : own ? amean1 : mean1;
        avar1 = !ok2 ? avar[c] : own ? avar1 : var1;
        mean[c] = update ? mean1 : mean[c];
        var[c] = update ? var1 : var[c];
        count[c] = update && ok ? n : n0;
        amean[c] = update ? amean1 : amean[c];
        avar[c] = update ? avar1 : avar[c];
        steps[c] = update && ok2 ? t : steps[c];
        bad += !(ok && ok2);
        // the floor, and by what the batch is clipped
        T floor = s_unpaid[c];
        int above = !floored || var1 >= floor;
        var1 = floored && !(var1 >= floor) ? floor : var1;
        d = m - mean1;
        T factor = clip * (var1 + eps) / (v + d * d);
        factor = clipped ? (factor > clip_max ? clip_max : factor) : 1;
        s[c] = mean1;
        s_var[c] = var1;
        s_share[c] = rho;
        s_factor[c] = above ? factor : 0 * factor;
        s_unpaid[c] = 1;
    }
    if (keep) {
        memcpy(kmean + c0, amean + c0, (c1 - c0) * sizeof(T));
        memcpy(kvar + c0, avar + c0, (c1 - c0) * sizeof(T));
    }
    if (bad) __atomic_store_n(&p->left_out, 1, __ATOMIC_RELAXED);
}

// G from the sums, for channels c0 to c1: what is owed and the batch's own; the running gradient
static void F(react)(call *p, i64 c0, i64 c1) {
    const i64 C = p->C;
    const int running = p->flags & RUNNING, update = p->flags & UPDATE;
    const T M = p->M, pays = p->pays * p->scale, unscale = 1 / p->scale;
    T *restrict s = p->saved, *restrict unpaid = s + UNPAID * C;
    const T *restrict rho = s + SHARE * C, *restrict factor = s + FACTOR * C;
    const T *restrict db = p->dbeta, *restrict dw = p->dgamma;
    T *restrict r1 = p->grad, *restrict r2 = running ? r1 + C : 0;
    T *restrict G1 = p->G, *restrict G2 = G1 + C;
    #pragma omp simd
    for (i64 c = c0; c < c1; c++) {
        T g1 = db[c] / M, g2 = dw[c] * (factor[c] > 0) / M;
        T own1 = rho[c] * g1, own2 = rho[c] * g2;
        if (running) {
            T due = unpaid[c], left = 1 - rho[c] * due, old1 = r1[c], old2 = r2[c];
            T left1 = left * old1, left2 = left * old2;
            G1[c] = own1 + left1 * (due * pays);
            G2[c] = own2 + left2 * (due * pays * factor[c]);
            T new1 = left1 + own1 * unscale, new2 = left2 + own2 * unscale;
            r1[c] = update && g1 - g1 == 0 ? new1 : old1;
            r2[c] = update && g2 - g2 == 0 ? new2 : old2;
            unpaid[c] = 0;
        }
        else { G1[c] = own1; G2[c] = own2; }
    }
}

// ------------------------------- contiguous: a channel is N rows of S values, C*S apart
// A block of channels stays in the cache from the moments to the result, from the sums to dx.
enum { F(FOLD) = 2048 }; // 4096 values at most are summed in T before they go into doubles
#define FOLD F(FOLD)
#define STEP (4 * L)
typedef struct { V s[4], q[4]; VD sum, square; double sum1, square1; i64 since; } F(acc);
INLINE void F(fold)(F(acc) *a) {
    a->sum += F(wide)((a->s[0] + a->s[1]) + (a->s[2] + a->s[3]));
    a->square += F(wide)((a->q[0] + a->q[1]) + (a->q[2] + a->q[3]));
    for (int i = 0; i < 4; i++) a->s[i] = a->q[i] = (V){};
    a->since = 0;
}

// Sums over a channel of e and d*e, where d = x-mean, and e = dz (backward) or d (forward)
INLINE void F(nc_sum)(const X *x, const X *dy, i64 N, i64 apart, i64 S, F(affine) k, int act,
                      double *sum, double *square) {
    F(acc) a = {};
    V mean = F(all)(k.mean), scale = F(all)(k.scale), shift = F(all)(k.shift);
    VI lane;
    for (int i = 0; i < L; i++) lane[i] = i;
    for (i64 n = 0; n < N; n++, x += apart, dy += dy ? apart : 0) {
        i64 i = 0;
        while (i + STEP <= S) {
            i64 end = least(S, i + FOLD);
            for (; i + STEP <= end; i += STEP)
            #pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                V d = F(load)(x + i + j * L) - mean, e = d;
                if (dy) e = F(slope)(F(load)(dy + i + j * L), d * scale + shift, act);
                a.s[j] += e;
                a.q[j] += d * e;
            }
            if ((a.since += FOLD) > FOLD) F(fold)(&a);
        }
        for (; i + L <= S; i += L) {
            V d = F(load)(x + i) - mean, e = d;
            if (dy) e = F(slope)(F(load)(dy + i), d * scale + shift, act);
            a.s[0] += e;
            a.q[0] += d * e;
        }
        if (i < S && S >= L) { // the last L values, of which those that are summed count as 0
            VI fresh = lane >= (I)(L - (S - i));
            V d = F(load)(x + S - L) - mean, e = d;
            if (dy) e = F(slope)(F(load)(dy + S - L), d * scale + shift, act);
            a.s[1] += F(pick)(fresh, e, (V){});
            a.q[1] += F(pick)(fresh, d * e, (V){});
        }
        else for (; i < S; i++) {
            T d = F(get)(x + i) - k.mean, e = d;
            if (dy) e = F(slope1)(F(get)(dy + i), d * k.scale + k.shift, act);
            a.sum1 += e;
            a.square1 += d * e;
        }
        if (S < STEP && (a.since += S) > FOLD) F(fold)(&a);
    }
    F(fold)(&a);
    *sum = a.sum1 + F(total)(a.sum);
    *square = a.square1 + F(total)(a.square);
}
static void F(nc_moments)(call *p, const X *x, i64 c) {
    i64 C = p->C, S = p->S, near = least(S, 16), apart = S / near;
    double sum, square;
    T about = 0, *s = p->saved;
    for (i64 i = 0; i < near; i++) about += F(get)(x + i * apart);
    about /= near;
    if (!(about - about == 0)) about = 0;
    F(nc_sum)(x, 0, p->N, C * S, S, (F(affine)){about}, LINEAR, &sum, &square);
    sum /= p->M;
    square = square / p->M - sum * sum;
    s[BATCH_MEAN * C + c] = about + sum;
    s[BATCH_VAR * C + c] = square < 0 ? 0 : square;
}
INLINE void F(nc_affine)(call *p, i64 c, F(affine) k, int act) {
    const i64 S = p->S, apart = p->C * S;
    const int past = p->past;
    const X *restrict x = (const X *)p->x + c * S;
    X *restrict y = (X *)p->y + c * S;
    V mean = F(all)(k.mean), scale = F(all)(k.scale), shift = F(all)(k.shift);
    for (i64 n = 0; n < p->N; n++, x += apart, y += apart) {
        i64 i = 0;
        for (; i + 2 * L <= S; i += 2 * L)
        #pragma GCC unroll 2
        for (int j = 0; j < 2 * L; j += L)
            F(write)(y + i + j, F(active)((F(load)(x + i + j) - mean) * scale + shift, act), past);
        for (; i + L <= S || (i < S && S >= L); i += L) {
            i = least(i, S - L); // some values twice
            F(store)(y + i, F(active)((F(load)(x + i) - mean) * scale + shift, act));
        }
        for (; i < S; i++)
            F(put)(y + i, F(active1)((F(get)(x + i) - k.mean) * k.scale + k.shift, act));
    }
}
INLINE void F(nc_dx)(call *p, i64 c, F(affine) k, int act) {
    const i64 C = p->C, S = p->S, apart = C * S;
    const int past = p->past;
    const X *restrict x = (const X *)p->x + c * S, *dy = (const X *)p->dy + c * S;
    X *restrict dx = (X *)p->y + c * S;
    const T *G = p->G;
    T down = k.scale * G[c], by = k.scale * G[C + c] * k.rstd;
    V mean = F(all)(k.mean), scale = F(all)(k.scale), shift = F(all)(k.shift);
    for (i64 n = 0; n < p->N; n++, x += apart, dy += apart, dx += apart) {
        i64 i = 0;
        for (; i + 2 * L <= S; i += 2 * L)
        #pragma GCC unroll 2
        for (int j = 0; j < 2 * L; j += L) {
            V d = F(load)(x + i + j) - mean;
            V e = F(slope)(F(load)(dy + i + j), d * scale + shift, act);
            F(write)(dx + i + j, e * scale - (d * by + down), past);
        }
        for (; i + L <= S || (i < S && S >= L); i += L) {
            i = least(i, S - L);
            V d = F(load)(x + i) - mean, e = F(slope)(F(load)(dy + i), d * scale + shift, act);
            F(store)(dx + i, e * scale - (d * by + down));
        }
        for (; i < S; i++) {
            T d = F(get)(x + i) - k.mean, e = F(slope1)(F(get)(dy + i), d * k.scale + k.shift, act);
            F(put)(dx + i, e * k.scale - (d * by + down));
        }
    }
}
INLINE void F(nc_forward_)(call *p, i64 i, int act) {
    i64 c0 = i * p->block, c1 = least(p->C, c0 + p->block);
    if (p->phases & MOMENTS)
        for (i64 c = c0; c < c1; c++) F(nc_moments)(p, (const X *)p->x + c * p->S, c);
    if (p->phases & MERGE) F(merge)(p, c0, c1);
    if (p->phases & NORMALISE)
        for (i64 c = c0; c < c1; c++) F(nc_affine)(p, c, F(affine_of)(p, c), act);
}
INLINE void F(nc_backward_)(call *p, i64 i, int act) {
    i64 C = p->C, c0 = i * p->block, c1 = least(C, c0 + p->block);
    T *db = p->dbeta, *dw = p->dgamma;
    const X *x = p->x, *dy = p->dy;
    if (p->phases & SUMS) for (i64 c = c0; c < c1; c++) {
        double sum, square;
        F(affine) k = F(affine_of)(p, c);
        i64 at = c * p->S;
        F(nc_sum)(x + at, dy + at, p->N, C * p->S, p->S, k, act, &sum, &square);
        db[c] = sum;
        dw[c] = square * k.rstd;
    }
    if (p->phases & REACT) F(react)(p, c0, c1);
    if (p->phases & DX) for (i64 c = c0; c < c1; c++) F(nc_dx)(p, c, F(affine_of)(p, c), act);
}

// ---------------------- channels last: rows of C values; two passes, for no channel fits a cache
// `coef` holds numbers of each channel in rows of D >= C values: for few channels repeated, so that
// a row is long. One row after the other, with the sums in L1: four rows at a time take fewer
// instructions, but the prefetcher loses them (from memory 1.3 to 1.9 times as long).
enum { F(GROUP) = 128 }; // rows summed in T before they go into doubles
INLINE void F(cl_rows)(const X *x, const X *dy, i64 D, i64 n, const T *coef, i64 W, T *s, T *q,
                       int rows, int back, int act) {
    i64 c = 0;
    for (; c + L <= n; c += L) {
        V mean = AT(coef + c), scale = AT(coef + W + c), shift = AT(coef + 2 * W + c);
        V sum = AT(s + c), square = AT(q + c);
        #pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            V d = F(load)(x + r * D + c) - mean, e = d;
            if (back) e = F(load)(dy + r * D + c);
            if (act) e = F(slope)(e, d * scale + shift, act);
            sum += e;
            square += d * e;
        }
        AT(s + c) = sum;
        AT(q + c) = square;
    }
    for (; c < n; c++) for (int r = 0; r < rows; r++) {
        T d = F(get)(x + r * D + c) - coef[c], e = d;
        if (back) e = F(get)(dy + r * D + c);
        if (act) e = F(slope1)(e, d * coef[W + c] + coef[2 * W + c], act);
        s[c] += e;
        q[c] += d * e;
    }
}
INLINE void F(cl_sum)(call *p, i64 chunk, int back, int act) {
    const i64 C = p->C, D = p->D, W = p->width, end = least(p->M * C, (chunk + 1) * p->rows * D);
    const T *mean = p->coef;
    double *sum = p->part + 2 * C * chunk, *square = sum + C;
    T *s = (T *)p->lanes + 2 * W * chunk, *q = s + W;
    memset(sum, 0, 2 * C * sizeof(double));
    for (i64 i = chunk * p->rows * D; i < end;) {
        memset(s, 0, 2 * W * sizeof(T));
        for (int row = 0, rows; row < F(GROUP) && i < end; row += rows, i += rows * D) {
            const X *x = (const X *)p->x + i, *dy = (const X *)p->dy + i;
            const i64 n = least(D, end - i);
            rows = i + p->together * D <= end ? p->together : 1;
            if (rows == ROWS) F(cl_rows)(x, dy, D, n, mean, W, s, q, ROWS, back, act);
            else F(cl_rows)(x, dy, D, n, mean, W, s, q, rows = 1, back, act);
        }
        for (i64 j = 0; j < D; j += C)
            #pragma omp simd
            for (i64 c = 0; c < C; c++) {
                sum[c] += s[j + c];
                square[c] += q[j + c];
            }
    }
}
INLINE void F(cl_affine)(call *p, i64 chunk, int act) {
    const i64 D = p->D, W = p->width, end = least(p->M * p->C, (chunk + 1) * p->rows * D);
    const T *mean = p->coef, *scale = mean + W, *shift = scale + W;
    const int past = p->past;
    for (i64 i = chunk * p->rows * D; i < end; i += D) {
        const X *restrict x = (const X *)p->x + i;
        X *restrict y = (X *)p->y + i;
        i64 n = least(D, end - i), c = 0;
        for (; c + L <= n; c += L) {
            V z = (F(load)(x + c) - AT(mean + c)) * AT(scale + c) + AT(shift + c);
            F(write)(y + c, F(active)(z, act), past);
        }
        for (; c < n; c++)
            F(put)(y + c, F(active1)((F(get)(x + c) - mean[c]) * scale[c] + shift[c], act));
    }
}
INLINE void F(cl_dx)(call *p, i64 chunk, int act) {
    const i64 D = p->D, W = p->width, end = least(p->M * p->C, (chunk + 1) * p->rows * D);
    const T *mean = p->coef, *scale = mean + W, *shift = scale + W;
    const T *by = shift + W, *down = by + W;
    const int past = p->past;
    for (i64 i = chunk * p->rows * D; i < end; i += D) {
        const X *restrict x = (const X *)p->x + i, *dy = (const X *)p->dy + i;
        X *restrict dx = (X *)p->y + i;
        i64 n = least(D, end - i), c = 0;
        for (; c + L <= n; c += L) {
            V d = F(load)(x + c) - AT(mean + c), e = F(load)(dy + c), f = AT(scale + c);
            if (act) e = F(slope)(e, d * f + AT(shift + c), act);
            F(write)(dx + c, e * f - (d * AT(by + c) + AT(down + c)), past);
        }
        for (; c < n; c++) {
            T d = F(get)(x + c) - mean[c], e = F(get)(dy + c);
            if (act) e = F(slope1)(e, d * scale[c] + shift[c], act);
            F(put)(dx + c, e * scale[c] - (d * by[c] + down[c]));
        }
    }
}
static void F(cl_repeat)(call *p, int rows) {
    T *k = p->coef;
    for (int row = 0; row < rows; row++, k += p->width)
        for (i64 c = p->C; c < p->D; c++) k[c] = k[c - p->C];
}
static void F(cl_coef)(call *p, int dx) { // mean, scale, shift, rstd; for dx by, down in its place
    const i64 C = p->C, W = p->width;
    const T *G = p->G;
    T *k = p->coef;
    #pragma omp simd
    for (i64 c = 0; c < C; c++) {
        F(affine) a = F(affine_of)(p, c);
        k[c] = a.mean;
        k[W + c] = a.scale;
        k[2 * W + c] = a.shift;
        k[3 * W + c] = dx ? a.scale * a.rstd * G[C + c] : a.rstd;
        k[4 * W + c] = dx ? a.scale * G[c] : 0;
    }
    F(cl_repeat)(p, dx ? 5 : 3);
}
static void F(cl_add)(call *p) {
    for (i64 j = 1; j < p->chunks; j++)
        #pragma omp simd
        for (i64 c = 0; c < 2 * p->C; c++) p->part[c] += p->part[2 * p->C * j + c];
}

// One body for each activation, so that the compiler sees which it is
#define BODIES(name) \
    static void F(name##_linear)(call *p, i64 i) { F(name)(p, i, LINEAR); } \
    static void F(name##_relu)(call *p, i64 i) { F(name)(p, i, RELU); } \
    static void F(name##_silu)(call *p, i64 i) { F(name)(p, i, SILU); } \
    static void (*const F(name##_s)[])(call *, i64) = \
        {F(name##_linear), F(name##_relu), F(name##_silu)};
INLINE void F(cl_sums_)(call *p, i64 i, int act) { F(cl_sum)(p, i, 1, act); }
static void F(cl_moments)(call *p, i64 i) { F(cl_sum)(p, i, 0, LINEAR); }
BODIES(nc_forward_)
BODIES(nc_backward_)
BODIES(cl_sums_)
BODIES(cl_affine)
BODIES(cl_dx)

// ---------------------------------------------------------------------------- whole calls
static int F(begin)(call *p) {
    const i64 size = p->N * p->C * p->S, C = p->C;
    p->M = p->N * p->S;
    p->left_out = p->written = 0;
    p->floor = p->fresh_floor = p->full_floor = 0;
    const i64 row = (p->last ? C : p->S) * sizeof(X);
    p->past = size * sizeof(X) >= PAST && row % 64 == 0 && (uintptr_t)p->y % 64 == 0;
    if (size < 16384) p->threads = 1;
    const int needs_G = p->phases & REACT && !p->G;
    if (!p->last) { // as many channels as stay in 256 KB, and one for each thread
        i64 each = most(1, parts(C, most(1, p->threads)));
        p->block = (256 << 10) / (sizeof(X) * p->M * (p->dy ? 2 : 1));
        p->block = most(1, least(least(p->block, 64), each));
        if (needs_G && !(p->G = p->memory = malloc(2 * C * sizeof(T)))) return NO_MEMORY;
        return DONE;
    }
    p->D = C < 128 ? C * parts(128, C) : C;
    while (C < 128 && p->D % L && p->D < 8 * C) p->D += C;
    i64 rows = parts(size, p->D);
    p->chunks = most(least(size / 16384, 8), size / 65536);
    p->chunks = most(1, least(least(64, p->chunks), rows / 32));
    p->rows = parts(rows, p->chunks);
    p->chunks = parts(rows, p->rows);
    p->width = 64 * parts(p->D, 64); // rows of the vectors below begin in a cache line
    p->together = size * sizeof(X) * (p->dy ? 2 : 1) <= 8 << 20 ? ROWS : 1;
    const i64 sums = 2 * C * p->chunks * sizeof(double), lanes = 2 * p->width * p->chunks;
    p->memory = malloc(64 + (5 * p->width + lanes + 2 * C) * sizeof(T) + sums);
    if (!p->memory) return NO_MEMORY;
    p->coef = (void *)(((uintptr_t)p->memory + 63) & ~(uintptr_t)63);
    p->lanes = (T *)p->coef + 5 * p->width;
    p->part = (double *)((T *)p->lanes + lanes);
    if (needs_G) p->G = p->part + 2 * C * p->chunks;
    return DONE;
}
static void F(cl_mean_and_var)(call *p) {
    const i64 C = p->C, near = least(p->M, 16);
    const X *x = p->x;
    T *k = p->coef, *m = (T *)p->saved + BATCH_MEAN * C, *v = (T *)p->saved + BATCH_VAR * C;
    memset(k, 0, C * sizeof(T));
    for (i64 r = 0; r < near; r++)
        #pragma omp simd
        for (i64 c = 0; c < C; c++) k[c] += F(get)(x + r * C + c);
    #pragma omp simd
    for (i64 c = 0; c < C; c++) k[c] = k[c] - k[c] == 0 ? k[c] / near : 0;
    F(cl_repeat)(p, 1);
    run(p, F(cl_moments), p->chunks);
    F(cl_add)(p);
    #pragma omp simd
    for (i64 c = 0; c < C; c++) {
        double s = p->part[c] / p->M, q = p->part[C + c] / p->M - s * s;
        m[c] = k[c] + s;
        v[c] = q < 0 ? 0 : q;
    }
}
static int F(forward)(call *p) {
    const int merge = p->phases & MERGE, update = p->flags & UPDATE;
    p->dy = 0;
    if (F(begin)(p)) return NO_MEMORY;
    if (merge && p->flags & CLAMPED) {
        const T *floors = p->floors;
        const i64 own = p->flags & INCLUSIVE ? p->samples : 0, last = p->n_floors - 1;
        p->floor = floors[most(0, least(*p->seen + own, last))];
        p->fresh_floor = floors[least(own, last)];
        p->full_floor = floors[last];
    }
    if (!p->last) run(p, F(nc_forward__s)[p->act], parts(p->C, p->block));
    else {
        if (p->phases & MOMENTS) F(cl_mean_and_var)(p);
        if (merge) F(merge)(p, 0, p->C);
        if (p->phases & NORMALISE) { F(cl_coef)(p, 0); run(p, F(cl_affine_s)[p->act], p->chunks); }
    }
    if (!merge) return DONE;
    if (p->written) {
        *p->seen = p->written & TRAINED ? FULL_SAMPLES : 0;
        *p->skipped = 0;
    }
    if (update) {
        *p->skipped += p->left_out;
        *p->batches += 1;
        *p->seen += p->samples;
    }
    return DONE;
}
static int F(backward)(call *p) {
    const i64 C = p->C;
    if (F(begin)(p)) return NO_MEMORY;
    if (!p->last) { run(p, F(nc_backward__s)[p->act], parts(C, p->block)); return DONE; }
    T *db = p->dbeta, *dw = p->dgamma, *rstd = (T *)p->coef + 3 * p->width;
    if (p->phases & SUMS) {
        F(cl_coef)(p, 0);
        run(p, F(cl_sums__s)[p->act], p->chunks);
        F(cl_add)(p);
        #pragma omp simd
        for (i64 c = 0; c < C; c++) {
            db[c] = p->part[c];
            dw[c] = p->part[C + c] * rstd[c];
        }
    }
    if (p->phases & REACT) F(react)(p, 0, C);
    if (p->phases & DX) { F(cl_coef)(p, 1); run(p, F(cl_dx_s)[p->act], p->chunks); }
    return DONE;
}
#undef F
#undef L
#undef V
#undef VI
#undef VD
#undef AT
#undef FOLD
#undef STEP
#undef BODIES
#endif
