/* What a decode step does between its linear layers, in bf16: rotary embedding, writing to and attending over paged KV,
 * RMS norm, SiLU. torch takes some twenty operations a layer for them, each with threads to start and results to store.
 *
 * Every result is rounded to bf16 where transformers' modules round it, so that it differs from theirs by the order of
 * summation and by the last bits of exp alone. The threads are those of libgomp, which torch computes with too.
 */
#include <math.h>
#include <omp.h>

#include "bf16.h"

/* Keys whose scores are held at a time; a multiple of 32. */
#define CHUNK 256
/* Keys that are fetched ahead of those whose scores are computed; a multiple of 16. */
#define AHEAD 32
/* Most query heads that share a KV head, and widest head. */
#define MOST_GROUP 32
#define MOST_DIM 256

/* e^x for x <= 0 (or NaN), by 2^n * 2^f with a polynomial in f of [-1/2, 1/2]: 2 ulp. */
static inline __m512 exp16(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x); /* e^-104 is 0 in fp32; a NaN stays */
    const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    /* x - n ln 2 in two parts, so that nothing is lost where n is large. */
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f); /* Cephes expf */
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(f, f), _mm512_add_ps(f, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* ---- norm and activation ---- */

void norm_row(const bf16 *x, const bf16 *weight, bf16 *out, long dim, float eps)
{
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < dim; i += 16) {
        const __m512 v = load16(x + i);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)dim + eps));
    for (long i = 0; i < dim; i += 16)
        store16(out + i, _mm512_mul_ps(load16(weight + i), rounded(_mm512_mul_ps(load16(x + i), scale))));
}

/* x and out [rows][dim]. */
void raytier_rms_norm_bf16(const bf16 *x, const bf16 *weight, bf16 *out, long rows, long dim, float eps, int threads)
{
#pragma omp parallel for num_threads(threads) if (rows > 4)
    for (long row = 0; row < rows; row++)
        norm_row(x + row * dim, weight, out + row * dim, dim, eps);
}

void silu_mul(const bf16 *gate, const bf16 *up, bf16 *out, long n)
{
    for (long i = 0; i < n; i += 16) {
        const __m512 x = load16(gate + i);
        /* e^-|x|, which exp16 is made for: 1 / (1 + e^-x) is 1 / (1 + e) or e / (1 + e). */
        const __m512 e = exp16(_mm512_or_ps(x, _mm512_set1_ps(-0.0f)));
        const __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
        const __m512 top = _mm512_mask_mov_ps(_mm512_set1_ps(1.0f), negative, e);
        const __m512 sigmoid = _mm512_div_ps(top, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
        store16(out + i, _mm512_mul_ps(rounded(_mm512_mul_ps(x, sigmoid)), load16(up + i)));
    }
}

void raytier_silu_mul_bf16(const bf16 *gate, const bf16 *up, bf16 *out, long n, int threads)
{
#pragma omp parallel num_threads(threads) if (n > 8192)
    {
        const long count = omp_get_num_threads(), self = omp_get_thread_num(), blocks = n / 16;
        const long begin = blocks * self / count * 16, end = blocks * (self + 1) / count * 16;
        silu_mul(gate + begin, up + begin, out + begin, end - begin);
    }
}

/* Numbers of tokens and heads: number d of head h of token t at p[t * token + h * head + d]. */
typedef struct {
    const bf16 *p;
    long token, head;
} rows_t;

/* ---- rotary embedding ---- */

void rotate(const bf16 *from, bf16 *to, const bf16 *cos, const bf16 *sin, long dim)
{
    const long half = dim / 2;
    for (long i = 0; i < half; i += 16) {
        const __m512 a = load16(from + i), b = load16(from + half + i);
        const __m512 left = rounded(_mm512_mul_ps(a, load16(cos + i)));
        const __m512 right = rounded(_mm512_mul_ps(b, load16(cos + half + i)));
        const __m512 minus = rounded(_mm512_mul_ps(_mm512_sub_ps(_mm512_setzero_ps(), b), load16(sin + i)));
        store16(to + i, _mm512_add_ps(left, minus));
        store16(to + half + i, _mm512_add_ps(right, rounded(_mm512_mul_ps(a, load16(sin + half + i)))));
    }
}

/* Queries and keys, rotated: to_q [tokens][heads][dim], to_k [tokens][kv_heads][dim]; cos and sin [tokens][dim]. */
void raytier_rotate_bf16(const rows_t *q, const rows_t *k, const bf16 *cos, const bf16 *sin, bf16 *to_q, bf16 *to_k,
                         long tokens, long heads, long kv_heads, long dim, int threads)
{
#pragma omp parallel for num_threads(threads) if (tokens * heads * dim > 8192)
    for (long t = 0; t < tokens; t++) {
        for (long h = 0; h < heads; h++)
            rotate(q->p + t * q->token + h * q->head, to_q + (t * heads + h) * dim, cos + t * dim, sin + t * dim, dim);
        for (long h = 0; h < kv_heads; h++)
            rotate(k->p + t * k->token + h * k->head, to_k + (t * kv_heads + h) * dim, cos + t * dim, sin + t * dim,
                   dim);
    }
}

/* ---- attention ---- */

/* Fetch rows [dim] into the second-level cache while something else is computed. */
static inline void fetch(const bf16 *const *row, long count, long dim)
{
    for (long j = 0; j < count; j++)
        for (long i = 0; i < dim; i += 32)
            _mm_prefetch((const char *)(row[j] + i), _MM_HINT_T1);
}

/* scores[g][16] of 16 keys: queries q[g][dim] against the rows of `key`, those from `valid` on being absent. */
static void score(const bf16 *q, const bf16 *const key[16], int valid, float *scores, long stride, long group, long dim,
                  __m512 scale)
{
    __m512i pairs[MOST_DIM / 2];
    for (long part = 0; part < dim; part += 32) {
        __m512i *r = pairs + part / 2;
        for (int j = 0; j < 16; j++)
            r[j] = j < valid ? _mm512_loadu_si512(key[j] + part) : _mm512_setzero_si512();
        transpose(r); /* r[i]: columns (2i, 2i + 1) of the 16 keys */
    }
    const __mmask16 absent = (__mmask16)~((1u << valid) - 1);
    for (long g = 0; g < group; g++) {
        const int32_t *two = (const int32_t *)(q + g * dim);
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (long i = 0; i < dim / 2; i += 2) {
            even = _mm512_dpbf16_ps(even, (__m512bh)pairs[i], (__m512bh)_mm512_set1_epi32(two[i]));
            odd = _mm512_dpbf16_ps(odd, (__m512bh)pairs[i + 1], (__m512bh)_mm512_set1_epi32(two[i + 1]));
        }
        const __m512 sum = _mm512_mul_ps(_mm512_add_ps(even, odd), scale);
        _mm512_store_ps(scores + g * stride, _mm512_mask_mov_ps(sum, absent, _mm512_set1_ps(-INFINITY)));
    }
}

/* The queries [group][dim] of one KV head as the second operand of tiles: one for each 16 of them and 32 columns. */
static void arrange_queries(const bf16 *q, bf16 *tiles, long group, long dim)
{
    for (long first = 0; first < group; first += 16)
        for (long part = 0; part < dim; part += 32, tiles += 512) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = first + i < group ? _mm512_loadu_si512(q + (first + i) * dim + part) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tiles + i * 32, r[i]);
        }
}

/* As `score`, of 16 keys that lie one after the other. */
static void score_by_tiles(const bf16 *tiles, const bf16 *key, float *scores, long stride, long group, long dim,
                           __m512 scale)
{
    float sums[256] __attribute__((aligned(64)));
    for (long first = 0; first < group; first += 16) {
        _tile_zero(0);
        for (long part = 0; part < dim; part += 32, tiles += 512) {
            _tile_loadd(1, key + part, 2 * dim);
            _tile_loadd(2, tiles, 64);
            _tile_dpbf16ps(0, 1, 2);
        }
        _tile_stored(0, sums, 64);
        __m512i r[16]; /* [key][query] */
        for (int i = 0; i < 16; i++)
            r[i] = _mm512_load_si512(sums + i * 16);
        transpose(r);
        for (int i = 0; i < 16 && first + i < group; i++)
            _mm512_store_ps(scores + (first + i) * stride, _mm512_mul_ps(_mm512_castsi512_ps(r[i]), scale));
    }
}

/* sums[g][dim] += weights[g][j] * value[j][dim], for G queries and PART columns at a time. */
#define GATHER(G, PART)                                                                                                \
    static void gather_##G(const bf16 *const *value, long count, const float *weights, float *sums, long dim)          \
    {                                                                                                                  \
        for (long part = 0; part < dim; part += PART) {                                                                \
            const int width = dim - part < PART ? (int)(dim - part) / 16 : PART / 16;                                  \
            __m512 sum[G][PART / 16];                                                                                  \
            for (int g = 0; g < G; g++)                                                                                \
                for (int i = 0; i < PART / 16; i++)                                                                    \
                    sum[g][i] = i < width ? _mm512_loadu_ps(sums + g * dim + part + i * 16) : _mm512_setzero_ps();     \
            for (long j = 0; j < count; j++) {                                                                         \
                __m512 row[PART / 16];                                                                                 \
                for (int i = 0; i < PART / 16; i++)                                                                    \
                    row[i] = i < width ? load16(value[j] + part + i * 16) : _mm512_setzero_ps();                       \
                for (int g = 0; g < G; g++) {                                                                          \
                    const __m512 weight = _mm512_set1_ps(weights[g * CHUNK + j]);                                      \
                    for (int i = 0; i < PART / 16; i++)                                                                \
                        sum[g][i] = _mm512_fmadd_ps(weight, row[i], sum[g][i]);                                        \
                }                                                                                                      \
            }                                                                                                          \
            for (int g = 0; g < G; g++)                                                                                \
                for (int i = 0; i < width; i++)                                                                        \
                    _mm512_storeu_ps(sums + g * dim + part + i * 16, sum[g][i]);                                       \
        }                                                                                                              \
    }

GATHER(1, 64)
GATHER(2, 64)
GATHER(4, 64)
GATHER(8, 32)

/* Fetch the first keys that task `i` will need. */
static inline void fetch_task(const attend_t *a, const pool_t *pool, long i)
{
    if (i >= a->spans * a->kv_heads)
        return;
    const int64_t *run = a->runs + 2 * a->runs_begin[i / a->kv_heads];
    const bf16 *key = pool->keys + i % a->kv_heads * pool->head + run[0] * a->dim;
    const long count = (run[1] < AHEAD ? run[1] : AHEAD) * a->dim;
    for (long j = 0; j < count; j += 32)
        _mm_prefetch((const char *)(key + j), _MM_HINT_T1);
}

/* Online softmax (Milakov and Gimelshein, 2018) of the queries q[group][dim] of one KV head over what a span sees. */
static void attend(const attend_t *a, const pool_t *pool, const bf16 *q, long span, long kv_head, bf16 *out)
{
    const long group = a->heads / a->kv_heads, dim = a->dim;
    float scores[MOST_GROUP * CHUNK] __attribute__((aligned(64)));
    float sums[MOST_GROUP * MOST_DIM] __attribute__((aligned(64)));
    bf16 arranged[MOST_GROUP * MOST_DIM] __attribute__((aligned(64)));
    float top[MOST_GROUP], total[MOST_GROUP];
    const bf16 *keys[CHUNK], *values[CHUNK];
    memset(sums, 0, sizeof(float) * (size_t)(group * dim));
    for (long g = 0; g < group; g++) {
        uint32_t bits = a->sinks ? (uint32_t)a->sinks[kv_head * group + g] << 16 : 0;
        memcpy(&top[g], &bits, 4);
        total[g] = 1.0f; /* a sink takes probability and gives no value */
        if (!a->sinks) {
            top[g] = -INFINITY;
            total[g] = 0.0f;
        }
    }
    if (a->tiles)
        arrange_queries(q, arranged, group, dim);
    long run = a->runs_begin[span], used = 0;
    const long last = a->runs_begin[span + 1];
    while (run < last) {
        long count = 0;
        while (run < last && count < CHUNK) {
            const long first = a->runs[2 * run] + used, left = a->runs[2 * run + 1] - used;
            const long take = left < CHUNK - count ? left : CHUNK - count;
            for (long j = 0; j < take; j++) {
                keys[count + j] = pool->keys + kv_head * pool->head + (first + j) * dim;
                values[count + j] = pool->values + kv_head * pool->head + (first + j) * dim;
            }
            count += take;
            used += take;
            if (take == left) {
                run++;
                used = 0;
            }
        }
        for (long j = 0; j < count; j += 16) {
            if (j + AHEAD < count)
                fetch(keys + j + AHEAD, count - j - AHEAD < 16 ? count - j - AHEAD : 16, dim);
            const int valid = count - j < 16 ? (int)(count - j) : 16;
            fetch(values + j, valid, dim);
            if (a->tiles && valid == 16 && keys[j + 15] - keys[j] == 15 * dim)
                score_by_tiles(arranged, keys[j], scores + j, CHUNK, group, dim, _mm512_set1_ps(a->scale));
            else
                score(q, keys + j, valid, scores + j, CHUNK, group, dim, _mm512_set1_ps(a->scale));
        }
        const long padded = (count + 15) / 16 * 16;
        for (long g = 0; g < group; g++) {
            float *of = scores + g * CHUNK;
            __m512 most = _mm512_set1_ps(top[g]);
            for (long j = 0; j < padded; j += 16)
                most = _mm512_max_ps(most, _mm512_load_ps(of + j));
            const float now = _mm512_reduce_max_ps(most);
            __m512 sum = _mm512_setzero_ps();
            for (long j = 0; j < padded; j += 16) {
                const __m512 e = exp16(_mm512_sub_ps(_mm512_load_ps(of + j), _mm512_set1_ps(now)));
                sum = _mm512_add_ps(sum, e);
                _mm512_store_ps(of + j, e);
            }
            const float shrink = expf(top[g] - now);
            if (shrink != 1.0f)
                for (long i = 0; i < dim; i += 16) {
                    const __m512 v = _mm512_loadu_ps(sums + g * dim + i);
                    _mm512_storeu_ps(sums + g * dim + i, _mm512_mul_ps(v, _mm512_set1_ps(shrink)));
                }
            total[g] = total[g] * shrink + _mm512_reduce_add_ps(sum);
            top[g] = now;
        }
        long g = 0;
        for (; g + 8 <= group; g += 8)
            gather_8(values, count, scores + g * CHUNK, sums + g * dim, dim);
        for (; g + 4 <= group; g += 4)
            gather_4(values, count, scores + g * CHUNK, sums + g * dim, dim);
        for (; g + 2 <= group; g += 2)
            gather_2(values, count, scores + g * CHUNK, sums + g * dim, dim);
        for (; g < group; g++)
            gather_1(values, count, scores + g * CHUNK, sums + g * dim, dim);
    }
    for (long g = 0; g < group; g++)
        for (long i = 0; i < dim; i += 16) {
            const __m512 v = _mm512_loadu_ps(sums + g * dim + i);
            store16(out + g * dim + i, _mm512_div_ps(v, _mm512_set1_ps(total[g])));
        }
}

void attend_task(const attend_t *a, const pool_t *pool, const bf16 *q, bf16 *out, long i, int threads)
{
    const long span = i / a->kv_heads, h = i % a->kv_heads;
    const long place = (a->row[span] * a->heads + h * (a->heads / a->kv_heads)) * a->dim;
    fetch_task(a, pool, i + threads);
    attend(a, pool, q + place, span, h, out + place);
}

/* Write keys and values of all tokens to their slots, and let single tokens attend. Tokens of longer spans are attended
 * to by whoever called.
 *
 * q and out [tokens][heads][dim], of which rows of single tokens alone are read and written. Keys and values are of
 * equal width; dim is a multiple of 32 and at most MOST_DIM, heads / kv_heads at most MOST_GROUP.
 */
void raytier_attend_bf16(const attend_t *a, const pool_t *pool, const bf16 *q, const rows_t *k, const rows_t *v,
                         bf16 *out, int threads)
{
    const long dim = a->dim;
    const size_t size = sizeof(bf16) * (size_t)dim;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long i = 0; i < a->tokens * a->kv_heads; i++) {
            const long t = i / a->kv_heads, h = i % a->kv_heads, place = h * pool->head + a->slots[t] * dim;
            memcpy(pool->keys + place, k->p + t * k->token + h * k->head, size);
            memcpy(pool->values + place, v->p + t * v->token + h * v->head, size);
        }
        linear_begin(a->tiles);
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < a->spans * a->kv_heads; i++)
            attend_task(a, pool, q, out, i, threads);
        linear_end(a->tiles);
    }
}
