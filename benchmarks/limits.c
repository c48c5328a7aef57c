/* Hand-written twins of the generated AVX-512 kernels, and what the machine itself can do: the limits they are held to.
 *
 * The twins read the packed layouts of codegen/kernels/lut8.py and popcount.py and give the same bits. They take full
 * groups of 64 or 128 columns and rows that are a multiple of 32, without a bias. Every function that times something
 * does so in here, so that no foreign-function call is part of a limit.
 */
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define INLINE static inline __attribute__((always_inline))
#define TILE_TOKENS 10

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* ---- threads: workers spin for about a millisecond after a task, then sleep ---- */

enum { PAUSES = 4000, YIELDS = 2000 };

typedef void (*Task)(const void *argument, int thread);

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_ulong round;
    atomic_int busy, arrived;
    atomic_uint phase;
    Task task;
    const void *argument;
    int threads;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .threads = 1};

static void relax(int turn) {
    if (turn < PAUSES)
        _mm_pause();
    else
        sched_yield();
}

static void *worker(void *index) {
    for (unsigned long seen = 0;; seen++) {
        for (int turn = 0; atomic_load(&pool.round) == seen && turn < PAUSES + YIELDS; turn++) relax(turn);
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
        pthread_mutex_unlock(&pool.lock);
        pool.task(pool.argument, (int)(intptr_t)index);
        atomic_fetch_sub(&pool.busy, 1);
    }
    return NULL;
}

static void run(Task task, const void *argument) {
    pool.task = task;
    pool.argument = argument;
    atomic_store(&pool.busy, pool.threads - 1);
    if (pool.threads > 1) {
        pthread_mutex_lock(&pool.lock);
        atomic_fetch_add(&pool.round, 1);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.lock);
    }
    task(argument, 0);
    for (int turn = 0; atomic_load(&pool.busy); turn++) relax(turn);
}

static void barrier(void) {
    unsigned phase = atomic_load(&pool.phase);
    if (atomic_fetch_add(&pool.arrived, 1) + 1 == pool.threads) {
        atomic_store(&pool.arrived, 0);
        atomic_fetch_add(&pool.phase, 1);
    } else {
        for (int turn = 0; atomic_load(&pool.phase) == phase; turn++) relax(turn);
    }
}

/* Starts the workers; once per process. */
int limits_start(int threads) {
    pool.threads = threads;
    for (intptr_t i = 1; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)i)) return -1;
        pthread_detach(thread);
    }
    return 0;
}

/* ---- the linears ---- */

typedef struct {
    int rows, columns, group, tokens, prefetch;
    const int8_t *values;  /* [tokens][columns] */
    const float *x_scale;  /* [tokens][columns / group] */
    const uint8_t *packed;
    float *out;            /* [tokens][rows] */
    int8_t *staged;        /* [groups][tokens][group] */
    int32_t *sums;         /* [groups][tokens] */
    int32_t *zeros;        /* [groups] */
    uint32_t *planes;      /* [columns / 32][4] */
    float *scales;         /* [groups][tokens] */
} Call;


INLINE __m512i quad(const int8_t *values) {
    int32_t four;
    memcpy(&four, values, 4);
    return _mm512_set1_epi32(four);
}

INLINE __m512 halves(const uint8_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

static int32_t sum_bytes(const int8_t *values, int count) {
    __m512i total = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 64)
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), _mm512_loadu_si512(values + i));
    return _mm512_reduce_add_epi32(total);
}

typedef struct {
    __m512i by_row, by_level, low_mask, high_mask, row_high, row_low;
} Lut8;

INLINE Lut8 lut8_tables(const uint8_t *levels) {
    const __m512i swap = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    Lut8 t;
    t.by_row = _mm512_loadu_si512(levels);
    t.by_level = _mm512_shuffle_epi8(t.by_row, swap);
    t.low_mask = _mm512_set1_epi8(3);
    t.high_mask = _mm512_set1_epi8(12);
    t.row_high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    t.row_low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    return t;
}

/* The four fields of a slab of 16 columns, as offset bytes. */
INLINE void lut8_fields(const Lut8 *t, const uint8_t *codes, __m512i field[4]) {
    __m512i low = _mm512_loadu_si512(codes), high = _mm512_srli_epi16(low, 4);
    /* 0xEA: (a & b) | c */
    field[0] = _mm512_shuffle_epi8(t->by_row, _mm512_ternarylogic_epi32(low, t->low_mask, t->row_high, 0xEA));
    field[1] = _mm512_shuffle_epi8(t->by_level, _mm512_ternarylogic_epi32(low, t->high_mask, t->row_low, 0xEA));
    field[2] = _mm512_shuffle_epi8(t->by_row, _mm512_ternarylogic_epi32(high, t->low_mask, t->row_high, 0xEA));
    field[3] = _mm512_shuffle_epi8(t->by_level, _mm512_ternarylogic_epi32(high, t->high_mask, t->row_low, 0xEA));
}

INLINE void lut8_blocks(const Call *c, int first, int last, const int slabs) {
    const int groups = c->columns / c->group, bytes = slabs * 64 + 96;
    for (int block = first; block < last; block++) {
        const uint8_t *p = c->packed + (size_t)block * groups * bytes;
        const int8_t *values = c->values;
        __m512 y = _mm512_setzero_ps();
        for (int g = 0; g < groups; g++, p += bytes, values += slabs * 16) {
            Lut8 tables = lut8_tables(p);
            __m512i total[4] = {_mm512_set1_epi32(c->sums[g])};
            total[1] = total[2] = total[3] = _mm512_setzero_si512();
#pragma GCC unroll 8
            for (int t = 0; t < slabs; t++) {
                __m512i field[4];
                lut8_fields(&tables, p + 64 + t * 64, field);
                if (c->prefetch) _mm_prefetch((const char *)p + t * 64 + c->prefetch, _MM_HINT_T0);
#pragma GCC unroll 4
                for (int f = 0; f < 4; f++)
                    total[f] = _mm512_dpbusd_epi32(total[f], field[f], quad(values + t * 16 + f * 4));
            }
            __m512i sum = _mm512_add_epi32(_mm512_add_epi32(total[0], total[1]), _mm512_add_epi32(total[2], total[3]));
            __m512 scale = _mm512_mul_ps(_mm512_set1_ps(c->x_scale[g]), halves(p + slabs * 64 + 64));
            y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, y);
        }
        _mm512_storeu_ps(c->out + block * 16, y);
    }
}

static void lut8_task(const void *argument, int thread) {
    const Call *c = argument;
    int blocks = c->rows / 16, first = blocks * thread / pool.threads, last = blocks * (thread + 1) / pool.threads;
    if (c->group == 64)
        lut8_blocks(c, first, last, 4);
    else
        lut8_blocks(c, first, last, 8);
}

static void gemv_lut8(const Call *c) {
    for (int g = 0; g < c->columns / c->group; g++)
        c->sums[g] = -128 * sum_bytes(c->values + g * c->group, c->group);
    run(lut8_task, c);
}

static int8_t least(__m512i v) {
    __m256i half = _mm256_min_epi8(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    __m128i m = _mm_min_epi8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_min_epi8(m, _mm_srli_si128(m, 8));
    m = _mm_min_epi8(m, _mm_srli_si128(m, 4));
    m = _mm_min_epi8(m, _mm_srli_si128(m, 2));
    m = _mm_min_epi8(m, _mm_srli_si128(m, 1));
    return (int8_t)_mm_extract_epi8(m, 0);
}

static void stage_planes(const Call *c) {
    uint8_t order[64]; /* bit 8 * j + f of a word is column 4 * f + j */
    for (int i = 0; i < 64; i++) order[i] = (i & 32) + 4 * (i & 7) + (i >> 3 & 3);
    const __m512i permutation = _mm512_loadu_si512(order);
    for (int g = 0; g < c->columns / c->group; g++) {
        const int8_t *values = c->values + g * c->group;
        __m512i lowest = _mm512_setzero_si512();
        for (int i = 0; i < c->group; i += 64) lowest = _mm512_min_epi8(lowest, _mm512_loadu_si512(values + i));
        int zero = -least(lowest);
        c->zeros[g] = zero;
        c->sums[g] = sum_bytes(values, c->group);
        for (int i = 0; i < c->group; i += 64) {
            __m512i u = _mm512_add_epi8(_mm512_loadu_si512(values + i), _mm512_set1_epi8((char)zero));
            u = _mm512_permutexvar_epi8(permutation, u);
            uint32_t *word = c->planes + (g * c->group + i) / 32 * 4;
            for (int b = 0; b < 4; b++) {
                uint64_t bits = _mm512_test_epi8_mask(u, _mm512_set1_epi8((char)(1 << b)));
                word[b] = (uint32_t)bits;
                word[4 + b] = (uint32_t)(bits >> 32);
            }
        }
    }
}

INLINE void popcount_blocks(const Call *c, int first, int last, const int words) {
    const int groups = c->columns / c->group, bytes = words * 128 + 128;
    for (int block = first; block < last; block++) {
        const uint8_t *p = c->packed + (size_t)block * groups * bytes;
        const uint32_t *planes = c->planes;
        __m512 y = _mm512_setzero_ps();
        for (int g = 0; g < groups; g++, p += bytes, planes += words * 4) {
            __m512i count[3][4];
            if (c->prefetch)
                for (int line = 0; line < words * 2 + 2; line++)
                    _mm_prefetch((const char *)p + line * 64 + c->prefetch, _MM_HINT_T0);
#pragma GCC unroll 4
            for (int w = 0; w < words; w++) {
                __m512i mask[3] = {_mm512_load_si512(p + w * 128), _mm512_load_si512(p + w * 128 + 64)};
                mask[2] = _mm512_and_si512(mask[0], mask[1]);
#pragma GCC unroll 4
                for (int b = 0; b < 4; b++) {
                    __m512i plane = _mm512_set1_epi32((int)planes[w * 4 + b]);
#pragma GCC unroll 3
                    for (int k = 0; k < 3; k++) {
                        __m512i bits = _mm512_popcnt_epi8(_mm512_and_si512(mask[k], plane));
                        count[k][b] = w ? _mm512_add_epi8(count[k][b], bits) : bits;
                    }
                }
            }
            __m512i sum[3];
#pragma GCC unroll 3
            for (int k = 0; k < 3; k++) {
                sum[k] = _mm512_setzero_si512();
#pragma GCC unroll 4
                for (int b = 0; b < 4; b++)
                    sum[k] = _mm512_dpbusd_epi32(sum[k], count[k][b], _mm512_set1_epi8((char)(1 << b)));
            }
            const uint8_t *tail = p + words * 128;
            const __m512i byte = _mm512_set1_epi32(255), terms = _mm512_load_si512(tail);
            __m512i level = _mm512_srai_epi32(_mm512_slli_epi32(terms, 24), 24);
            __m512i a = _mm512_and_si512(_mm512_srli_epi32(terms, 8), byte);
            __m512i b = _mm512_and_si512(_mm512_srli_epi32(terms, 16), byte);
            __m512i rises = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i *)(tail + 96)));
            __m512i plus = _mm512_add_epi32(_mm512_mullo_epi32(a, sum[0]), _mm512_mullo_epi32(b, sum[1]));
            __m512i minus = _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(terms, 24), sum[2]),
                                             _mm512_mullo_epi32(rises, _mm512_set1_epi32(c->zeros[g])));
            plus = _mm512_add_epi32(plus, _mm512_mullo_epi32(level, _mm512_set1_epi32(c->sums[g])));
            __m512 scale = _mm512_mul_ps(_mm512_set1_ps(c->x_scale[g]), halves(tail + 64));
            y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(plus, minus)), scale, y);
        }
        _mm512_storeu_ps(c->out + block * 16, y);
    }
}

static void popcount_task(const void *argument, int thread) {
    const Call *c = argument;
    int blocks = c->rows / 16, first = blocks * thread / pool.threads, last = blocks * (thread + 1) / pool.threads;
    if (c->group == 64)
        popcount_blocks(c, first, last, 2);
    else
        popcount_blocks(c, first, last, 4);
}

static void gemv_popcount(const Call *c) {
    stage_planes(c);
    run(popcount_task, c);
}

/* As assembly, because GCC 12 copies and spills the accumulators of the intrinsic. */
INLINE void dot(__m512i *total, __m512i weights, __m512i values) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*total) : "v"(weights), "v"(values));
}

/* `count` tokens times 32 decoded rows of one group, in registers: named ones, because GCC keeps arrays in memory. */
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9)

INLINE void accumulate(float *y, __m512i total, float x_scale, __m512 w_scale) {
    __m512 scale = _mm512_mul_ps(_mm512_set1_ps(x_scale), w_scale);
    _mm512_store_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, _mm512_load_ps(y)));
}

INLINE void tile(const Call *c, const uint8_t *decoded, int g, int token, const int count, const int group, float *y,
                 const __m512 w[2]) {
    const int8_t *values = c->staged + ((size_t)g * c->tokens + token) * group;
    const int32_t *sums = c->sums + (size_t)g * c->tokens + token;
    const float *scales = c->scales + (size_t)g * c->tokens + token;
#define START(m) \
    __m512i a##m = _mm512_setzero_si512(), b##m = a##m; \
    if (m < count) a##m = b##m = _mm512_set1_epi32(sums[m]);
    EACH(START)
    for (int q = 0; q < group / 4; q++) {
        __m512i upper = _mm512_load_si512(decoded + q * 128), lower = _mm512_load_si512(decoded + q * 128 + 64);
#define MULTIPLY(m) \
    if (m < count) { \
        __m512i x = quad(values + m * group + q * 4); \
        dot(&a##m, upper, x); \
        dot(&b##m, lower, x); \
    }
        EACH(MULTIPLY)
    }
#define FINISH(m) \
    if (m < count) { \
        accumulate(y + m * 32, a##m, scales[m], w[0]); \
        accumulate(y + m * 32 + 16, b##m, scales[m], w[1]); \
    }
    EACH(FINISH)
}

INLINE void rest(const Call *c, const uint8_t *decoded, int g, int token, const int group, float *y,
                 const __m512 w[2]) {
    switch (c->tokens - token) {
#define CASE(n) case n: tile(c, decoded, g, token, n, group, y, w); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9)
#undef CASE
    }
}

INLINE void gemm_rows(const Call *c, int thread, const int group) {
    const int groups = c->columns / group, slabs = group / 16, bytes = slabs * 64 + 96;
    for (int m = c->tokens * thread / pool.threads; m < c->tokens * (thread + 1) / pool.threads; m++)
        for (int g = 0; g < groups; g++) {
            const int8_t *values = c->values + (size_t)m * c->columns + g * group;
            size_t where = (size_t)g * c->tokens + m;
            memcpy(c->staged + where * group, values, group);
            c->sums[where] = -128 * sum_bytes(values, group);
            c->scales[where] = c->x_scale[(size_t)m * groups + g];
        }
    barrier();
    uint8_t decoded[128 * 32] __attribute__((aligned(64)));
    float *y = aligned_alloc(64, (size_t)c->tokens * 128);
    const int pairs = c->rows / 32;
    for (int pair = pairs * thread / pool.threads; pair < pairs * (thread + 1) / pool.threads; pair++) {
        memset(y, 0, (size_t)c->tokens * 128);
        for (int g = 0; g < groups; g++) {
            __m512 w[2];
            for (int v = 0; v < 2; v++) {
                const uint8_t *p = c->packed + ((size_t)(pair * 2 + v) * groups + g) * bytes;
                Lut8 tables = lut8_tables(p);
                w[v] = halves(p + slabs * 64 + 64);
                for (int t = 0; t < slabs; t++) {
                    __m512i field[4];
                    lut8_fields(&tables, p + 64 + t * 64, field);
                    for (int f = 0; f < 4; f++) _mm512_store_si512(decoded + t * 512 + f * 128 + v * 64, field[f]);
                }
            }
            int m = 0;
            for (; m + TILE_TOKENS <= c->tokens; m += TILE_TOKENS)
                tile(c, decoded, g, m, TILE_TOKENS, group, y + m * 32, w);
            rest(c, decoded, g, m, group, y + m * 32, w);
        }
        for (int m = 0; m < c->tokens; m++)
            memcpy(c->out + (size_t)m * c->rows + pair * 32, y + m * 32, 128);
    }
    free(y);
}

static void gemm_task(const void *argument, int thread) {
    const Call *c = argument;
    if (c->group == 64)
        gemm_rows(c, thread, 64);
    else
        gemm_rows(c, thread, 128);
}

static void gemm_lut8(const Call *c) { run(gemm_task, c); }

enum { LUT8, POPCOUNT, GEMM };

/* Calls one twin `calls` times, cycling over `copies` of the packed weights, and stores the seconds each call took. */
int limits_time(int kernel, int rows, int columns, int group, int tokens, int prefetch, const int8_t *values,
                const float *x_scale, const uint8_t *const *packed, int copies, float *out, int calls, double *times) {
    void (*const kernels[])(const Call *) = {gemv_lut8, gemv_popcount, gemm_lut8};
    const size_t groups = columns / group;
    if (rows % 32 || columns % group || (group != 64 && group != 128) || (kernel != GEMM && tokens != 1)) return -1;
    Call c = {.rows = rows, .columns = columns, .group = group, .tokens = tokens, .prefetch = prefetch};
    c.values = values, c.x_scale = x_scale, c.out = out;
    c.staged = aligned_alloc(64, ((size_t)tokens * columns + 63) / 64 * 64);
    c.sums = malloc(groups * tokens * 4);
    c.zeros = malloc(groups * 4);
    c.planes = malloc((size_t)columns / 8 * 4);
    c.scales = malloc(groups * tokens * 4);
    for (int i = 0; i < calls; i++) {
        c.packed = packed[i % copies];
        double start = seconds();
        kernels[kernel](&c);
        times[i] = seconds() - start;
    }
    free(c.staged), free(c.sums), free(c.zeros), free(c.planes), free(c.scales);
    return 0;
}

/* ---- the machine ---- */

typedef struct {
    const uint8_t *buffer;
    size_t bytes;
    int repeats;
} Read;

static void read_task(const void *argument, int thread) {
    const Read *r = argument;
    size_t share = r->bytes / pool.threads / 256 * 256;
    const uint8_t *p = r->buffer + share * thread;
    __m512i sum[4] = {};
    for (int repeat = 0; repeat < r->repeats; repeat++)
        for (size_t i = 0; i < share; i += 256)
            for (int k = 0; k < 4; k++) {
                _mm_prefetch((const char *)p + i + k * 64 + 2048, _MM_HINT_T0);
                sum[k] = _mm512_xor_si512(sum[k], _mm512_load_si512(p + i + k * 64));
            }
    __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    __asm__ volatile("" ::"v"(all));
}

/* Bytes per second of reading `bytes` bytes, 64-byte aligned, `repeats` times in a row with all threads. */
double limits_bandwidth(const uint8_t *buffer, size_t bytes, int repeats) {
    Read r = {buffer, bytes, repeats};
    double start = seconds();
    run(read_task, &r);
    return (double)bytes * repeats / (seconds() - start);
}

static void dot_task(const void *argument, int thread) {
    (void)thread;
    __m512i total[20] = {}, a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (long i = 0; i < *(const long *)argument; i++)
#pragma GCC unroll 20
        for (int k = 0; k < 20; k++) {
            total[k] = _mm512_dpbusd_epi32(total[k], a, b);
            __asm__ volatile("" : "+v"(total[k]));
        }
}

/* Multiply-adds per second of 8-bit dot products in registers, all threads together. */
double limits_dot_peak(long rounds) {
    double start = seconds();
    run(dot_task, &rounds);
    return 20.0 * 64 * rounds * pool.threads / (seconds() - start);
}
