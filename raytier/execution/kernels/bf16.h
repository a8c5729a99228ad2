/* What the kernels share: bf16 (the upper half of an fp32 number) in vectors of AVX512. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline __m512 widen(__m256i half)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

static inline float wide(bf16 value)
{
    const uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

static inline bf16 narrow(float value)
{
    __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(value));
    bf16 result;
    memcpy(&result, &rounded, 2);
    return result;
}

/* The transpose of 16 x 16 numbers of 32 bits. */
static inline void transpose(__m512i r[16])
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
        r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
    }
}

static inline __m512 load16(const bf16 *p) { return widen(_mm256_loadu_si256((const __m256i *)p)); }
static inline void store16(bf16 *p, __m512 v) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(v)); }
static inline __m512 rounded(__m512 v) { return widen((__m256i)_mm512_cvtneps_pbh(v)); }

/* ---- linear_bf16.c, linear_forms.c: what one thread does of a linear layer ---- */

/* How the numbers of a weight are written (codecs/forms.py). */
enum { PLAIN, CODED, INT8, INT4_32, INT4_64, INT4_128, INT8_DYNAMIC };

/* A weight [outputs][inputs] with its bias [outputs] or NULL; outputs a multiple of 16, inputs of 32, or of the blocks
   that the form has. */
typedef struct {
    const void *data;
    const bf16 *bias;
    long outputs, inputs;
    int form;
} matrix_t;

static inline float bias_of(const bf16 *bias, long n) { return bias ? wide(bias[n]) : 0; }

/* Before and after a thread computes by tiles. */
void linear_begin(int tiles);
void linear_end(int tiles);

/* Activations x [M][K] as the kernels of the forms take them, each where a weight needs it. */
typedef struct {
    const bf16 *x;     /* as they are, or arranged for tiles */
    const void *words; /* in 16 bits, for dot products with integers */
    const void *bytes; /* in 8 bits, for INT8_DYNAMIC */
} prepared_t;

/* Bytes of room, a multiple of 64, for `prepared_t` of M rows with K columns and weights of these forms. */
long linear_room(long M, long K, int tiles, int forms);
prepared_t linear_prepare(const bf16 *x, void *room, long M, long K, int tiles, int forms);
/* Forms of several weights, for the two above. */
static inline int forms_of(int form) { return 1 << form; }

/* out[m * S + n - first] for n in [first, first + width), multiples of 16. */
void linear_columns(const prepared_t *prepared, const matrix_t *w, long first, long width, bf16 *out, long M, long S,
                    int tiles);
/* The same for forms that are not PLAIN, and for INT8_DYNAMIC; `prepared` is what they need. */
void form_columns(const void *prepared, const matrix_t *w, long first, long width, bf16 *out, long M, long S, int tiles);
void dynamic_columns(const void *prepared, const matrix_t *w, long first, long width, bf16 *out, long M, long S,
                     int tiles);
/* Room in bytes for activations in 16 bits or in 8, and how they come there. */
long words_room(long M, long K);
void words_prepare(const bf16 *x, void *room, long M, long K);
long bytes_room(long M, long K, int tiles);
void bytes_prepare(const bf16 *x, void *room, long M, long K, int tiles);
/* So many columns of N at a time: small enough that threads of unequal speed end together. */
long linear_chunk(long N, int threads);

/* ---- decode_bf16.c ---- */

/* One layer of the pool: slot s of head h at keys[h * head + s * dim], values likewise. */
typedef struct {
    bf16 *keys, *values;
    long head;
} pool_t;

typedef struct {
    const int64_t *slots; /* of every token */
    long tokens, heads, kv_heads, dim;
    /* Single tokens that attend: row in the batch, and which runs (first slot, count) hold what they see. */
    long spans;
    const int64_t *row, *runs_begin, *runs;
    float scale;
    const bf16 *sinks; /* [heads] or NULL */
    int tiles;         /* whether the processor has them; then within linear_begin and linear_end */
} attend_t;

/* out = weight * bf16(x / sqrt(mean(x^2) + eps)); dim a multiple of 16. */
void norm_row(const bf16 *x, const bf16 *weight, bf16 *out, long dim, float eps);
/* out = bf16(silu(gate)) * up over n numbers, a multiple of 16. */
void silu_mul(const bf16 *gate, const bf16 *up, bf16 *out, long n);
/* to = from * cos + rotate_half(from) * sin, all [dim], a multiple of 32; `to` may be `from`. */
void rotate(const bf16 *from, bf16 *to, const bf16 *cos, const bf16 *sin, long dim);
/* Task i of spans * kv_heads: the queries of one KV head of one span; q and out [tokens][heads][dim]. */
void attend_task(const attend_t *a, const pool_t *pool, const bf16 *q, bf16 *out, long i, int threads);
