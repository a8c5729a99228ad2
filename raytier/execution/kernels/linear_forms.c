/* Linear layers on weights of other forms than plain bf16 (codecs/forms.py has their layouts), for few rows.
 *
 * They take as long as their weights take to come from memory as well, and these are fewer bytes. Each form has a way to
 * bring the next 64 numbers of a row into two vectors of bf16; then they are multiplied as plain ones are: by dot products,
 * or by tiles, 16 rows by way of a buffer in the first cache. What a form adds (scales of rows) is applied to the sums.
 *
 * Rows lie one behind the other and are read 4, 2 or 16 at a time, so what comes next for one of these is as far ahead
 * as they are long together; it is fetched from there.
 */
#pragma GCC target("avx512vbmi,avx512vbmi2,avx512vnni,popcnt")
#include "bf16.h"

#define NO_COLUMN 0xffffffff
#define INLINE static inline __attribute__((always_inline))

/* Where a row is read, and what numbers stand for, where the form has such a table. `rare`: of a coded row, the weights
   whose exponents its table has not; in their places there are zeros. */
typedef struct {
    const uint8_t *p, *rare;
    __m512i table;
} cursor_t;

INLINE uint32_t word(const void *p)
{
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

INLINE const uint8_t *row_at(const int form, const matrix_t *w, long n)
{
    const long K = w->inputs;
    const uint8_t *data = w->data;
    switch (form) {
    case CODED: return data + 16L * word(data + 4 * n);
    case INT4_32: return data + n * (K / 64 * 40);
    case INT4_64: return data + n * (K / 64 * 36);
    case INT4_128: return data + n * (K / 128 * 68);
    default: return data + n * K;
    }
}

INLINE cursor_t begin(const int form, const matrix_t *w, long n)
{
    cursor_t c = {row_at(form, w, n), NULL, _mm512_setzero_si512()};
    if (form == CODED) {
        c.table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)c.p));
        c.rare = c.p += 16;
        while (word(c.p) != NO_COLUMN)
            c.p += 8;
        c.p += 8;
    }
    return c;
}

/* The 16 weights that the numbers 0..15 of a group stand for. */
INLINE __m512 int4_weights(const uint8_t *p)
{
    const __m512 numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i head = _mm512_set1_epi32((int)word(p));
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(head, 16));
    const __m512 least = _mm512_castsi512_ps(_mm512_and_si512(head, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_fmadd_ps(numbers, scale, least);
}

/* The same in bf16, twice. */
INLINE __m512i int4_table(const uint8_t *p)
{
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(int4_weights(p)));
}

INLINE __m512 float_bytes(const uint8_t *p)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

/* Weights k .. k + 31 and k + 32 .. k + 63 of a row whose cursor is there. */
INLINE void next(const int form, cursor_t *c, long k, __m512i *low, __m512i *high)
{
    const uint8_t *p = c->p;
    if (form == INT8) {
        *low = (__m512i)_mm512_cvtne2ps_pbh(float_bytes(p + 16), float_bytes(p));
        *high = (__m512i)_mm512_cvtne2ps_pbh(float_bytes(p + 48), float_bytes(p + 32));
        c->p = p + 64;
        return;
    }
    if (form != CODED) {
        __m512i second = _mm512_setzero_si512();
        if (form == INT4_32)
            second = int4_table(p + 4);
        if (form != INT4_128 || !(k & 64)) {
            c->table = int4_table(p);
            p += form == INT4_32 ? 8 : 4;
        }
        const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p));
        *low = _mm512_permutexvar_epi16(both, c->table); /* looks at 5 bits, and the table is there twice */
        *high = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), form == INT4_32 ? second : c->table);
        c->p = p + 32;
        return;
    }
    const __m512i spread = _mm512_setr_epi64(0x0100, 0x0302, 0x0504, 0x0706, 0x0908, 0x0b0a, 0x0d0c, 0x0f0e);
    const __m512i shifts = _mm512_set1_epi64(0x0e0c0a0806040200);
    const __m512i mantissa = _mm512_loadu_si512(p + 16);
    __m512i code = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p));
    code = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, code));
    /* Codes are 0x70 more than they mean: a shuffle looks at the lower half, and makes zero of 0x80, a rare exponent. */
    code = _mm512_ternarylogic_epi32(code, _mm512_set1_epi8(3), _mm512_set1_epi8(0x70), 0xea); /* (a & b) | c */
    const __mmask64 other = _mm512_cmpeq_epi8_mask(code, _mm512_set1_epi8(0x73));
    __m512i four = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(p + 80)));
    four = _mm512_ternarylogic_epi32(four, _mm512_slli_epi16(four, 4), _mm512_set1_epi8(15), 0xa8); /* (a | b) & c */
    const __m512i exponent =
        _mm512_shuffle_epi8(c->table, _mm512_add_epi8(code, _mm512_maskz_expand_epi8(other, four)));
    const __m512i a = _mm512_unpacklo_epi8(mantissa, exponent), b = _mm512_unpackhi_epi8(mantissa, exponent);
    *low = _mm512_shrdi_epi16(a, a, 1);
    *high = _mm512_shrdi_epi16(b, b, 1);
    c->p = p + 80 + ((_mm_popcnt_u64(other) + 1) >> 1);
}

INLINE const float *scales_of(const int form, const matrix_t *w)
{
    const long nbytes = w->outputs * w->inputs;
    return form == INT8 ? (const float *)((const uint8_t *)w->data + (nbytes + 63) / 64 * 64) : NULL;
}

INLINE __m512bh load(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* ---- dot products ---- */

INLINE void fetch(const int form, const uint8_t *p)
{
    _mm_prefetch((const char *)p, _MM_HINT_T1);
    if (form == CODED)
        _mm_prefetch((const char *)p + 64, _MM_HINT_T1);
}

/* M rows of x, at most 8, against R rows of coded weights, at most 4, at a time. The sizes of arrays are literals, for
   gcc keeps no others in registers. */
INLINE void coded_dots( const int M, const int R, const bf16 *x, const matrix_t *w, long first, long width,
                 bf16 *out, long S)
{
    const int form = CODED;
    const long K = w->inputs;
    for (long n = first; n < first + width; n += R) {
        __m512 sum[4][8];
        cursor_t c[4];
        const long ahead = row_at(form, w, n + R) - row_at(form, w, n);
        for (int r = 0; r < R; r++) {
            c[r] = begin(form, w, n + r);
            for (int m = 0; m < M; m++)
                sum[r][m] = _mm512_setzero_ps();
        }
        for (long k = 0; k < K; k += 64) {
            __m512i low[4], high[4];
            for (int r = 0; r < R; r++) {
                fetch(form, c[r].p + ahead);
                next(form, &c[r], k, &low[r], &high[r]);
            }
            for (int m = 0; m < M; m++) {
                const __m512bh a = load(x + m * K + k), b = load(x + m * K + k + 32);
                for (int r = 0; r < R; r++)
                    sum[r][m] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(sum[r][m], (__m512bh)low[r], a), (__m512bh)high[r], b);
            }
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                float total = _mm512_reduce_add_ps(sum[r][m]);
                for (const uint8_t *e = c[r].rare; word(e) != NO_COLUMN; e += 8)
                    total += wide(x[m * K + word(e)]) * wide((bf16)word(e + 4));
                out[m * S + n - first + r] = narrow(total + bias_of(w->bias, n + r));
            }
    }
}

/* Weights in integers against activations in 16 bits (VPDPWSSD), which takes half as long as to make fp32 or bf16 of the
   weights. Every 64 numbers of x share a scale, so that the largest has 15 bits: more than bf16 has. */

long words_room(long M, long K) { return (M * (2 * K + 4 * (K / 64) + 4 * (K / 32)) + 63) / 64 * 64; }

typedef struct {
    const int16_t *numbers; /* [M][K] */
    const float *scales;    /* [M][K / 64] */
    const float *sums;      /* [M][K / 32], of 32 numbers of x each, over 16 */
} words_t;

INLINE words_t words_in(const void *room, long M, long K)
{
    const int16_t *numbers = room;
    const float *scales = (const float *)(numbers + M * K);
    return (words_t){numbers, scales, scales + M * (K / 64)};
}

void words_prepare(const bf16 *x, void *room, long M, long K)
{
    const words_t to = words_in(room, M, K);
    for (long i = 0; i < M * K; i += 64) {
        __m512 v[4];
        for (int j = 0; j < 4; j++)
            v[j] = load16(x + i + 16 * j);
        const __m512 most = _mm512_max_ps(_mm512_max_ps(_mm512_abs_ps(v[0]), _mm512_abs_ps(v[1])),
                                          _mm512_max_ps(_mm512_abs_ps(v[2]), _mm512_abs_ps(v[3])));
        const float scale = _mm512_reduce_max_ps(most) / 32767, inverse = scale > 0 ? 1 / scale : 0;
        for (int j = 0; j < 4; j++) {
            const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(v[j], _mm512_set1_ps(inverse)));
            _mm256_storeu_si256((__m256i *)(to.numbers + i + 16 * j), _mm512_cvtsepi32_epi16(number));
        }
        ((float *)to.scales)[i / 64] = scale;
        ((float *)to.sums)[i / 32] = _mm512_reduce_add_ps(_mm512_add_ps(v[0], v[1])) / 16;
        ((float *)to.sums)[i / 32 + 1] = _mm512_reduce_add_ps(_mm512_add_ps(v[2], v[3])) / 16;
    }
}

INLINE void word_dots(const int form, const int M, const int R, const void *prepared, const matrix_t *w, long first,
                      long width, bf16 *out, long S)
{
    const long K = w->inputs, step = form == INT4_32 ? 8 : 4;
    const words_t x = words_in(prepared, M, K);
    const float *scales = scales_of(form, w);
    const __m512i zero = _mm512_setzero_si512(), upper = _mm512_set1_epi32((int)0xffff0000);
    for (long n = first; n < first + width; n += R) {
        __m512 sum[4][8];
        __m512i head[4], other[4];
        const uint8_t *p[4];
        const long ahead = row_at(form, w, n + R) - row_at(form, w, n);
        for (int r = 0; r < R; r++) {
            p[r] = row_at(form, w, n + r);
            head[r] = other[r] = zero;
            for (int m = 0; m < M; m++)
                sum[r][m] = _mm512_setzero_ps();
        }
        for (long k = 0; k < K; k += 64) {
            __m512i low[4], high[4];
            for (int r = 0; r < R; r++) {
                fetch(form, p[r] + ahead);
                if (form == INT8) {
                    low[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p[r]));
                    high[r] = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p[r] + 32)));
                    p[r] += 64;
                    continue;
                }
                if (form != INT4_128 || !(k & 64)) {
                    head[r] = _mm512_set1_epi32((int)word(p[r]));
                    if (form == INT4_32)
                        other[r] = _mm512_set1_epi32((int)word(p[r] + 4));
                    p[r] += step;
                }
                const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)p[r]));
                low[r] = _mm512_and_si512(both, _mm512_set1_epi16(15));
                high[r] = _mm512_srli_epi16(both, 4);
                p[r] += 32;
            }
            for (int m = 0; m < M; m++) {
                const __m512i a = _mm512_loadu_si512(x.numbers + m * K + k);
                const __m512i b = _mm512_loadu_si512(x.numbers + m * K + k + 32);
                const __m512 scale = _mm512_set1_ps(x.scales[(m * K + k) / 64]);
                const float *sums = x.sums + (m * K + k) / 32;
                for (int r = 0; r < R; r++) {
                    __m512i one = _mm512_dpwssd_epi32(zero, low[r], a);
                    if (form == INT8) {
                        one = _mm512_dpwssd_epi32(one, high[r], b);
                        sum[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), scale, sum[r][m]);
                        continue;
                    }
                    const __m512 wscale = _mm512_castsi512_ps(_mm512_slli_epi32(head[r], 16));
                    const __m512 least = _mm512_castsi512_ps(_mm512_and_si512(head[r], upper));
                    if (form == INT4_32) {
                        const __m512i two = _mm512_dpwssd_epi32(zero, high[r], b);
                        const __m512 wscale2 = _mm512_castsi512_ps(_mm512_slli_epi32(other[r], 16));
                        const __m512 least2 = _mm512_castsi512_ps(_mm512_and_si512(other[r], upper));
                        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(two), wscale2);
                        const __m512 both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(one), wscale, scaled);
                        sum[r][m] = _mm512_fmadd_ps(both, scale, sum[r][m]);
                        sum[r][m] = _mm512_fmadd_ps(least, _mm512_set1_ps(sums[0]), sum[r][m]);
                        sum[r][m] = _mm512_fmadd_ps(least2, _mm512_set1_ps(sums[1]), sum[r][m]);
                    } else {
                        one = _mm512_dpwssd_epi32(one, high[r], b);
                        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(one), scale);
                        sum[r][m] = _mm512_fmadd_ps(scaled, wscale, sum[r][m]);
                        sum[r][m] = _mm512_fmadd_ps(least, _mm512_set1_ps(sums[0] + sums[1]), sum[r][m]);
                    }
                }
            }
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                const float total = _mm512_reduce_add_ps(sum[r][m]) * (scales ? scales[n + r] : 1);
                out[m * S + n - first + r] = narrow(total + bias_of(w->bias, n + r));
            }
    }
}

/* ---- tiles ---- */

/* A tile of sums [16 n][16 m], as it was stored, into out[m * S + n]. */
static inline void finish(const float *sums, const float *scales, const bf16 *bias, bf16 *out, long m, long M, long S)
{
    __m512i r[16];
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_load_si512(sums + i * 16);
    transpose(r);
    const __m512 add = bias ? load16(bias) : _mm512_setzero_ps();
    const __m512 scale = scales ? _mm512_loadu_ps(scales) : _mm512_set1_ps(1);
    for (int i = 0; i < 16 && m + i < M; i++)
        store16(out + (m + i) * S, _mm512_fmadd_ps(_mm512_castsi512_ps(r[i]), scale, add));
}

/* 32 columns of 16 rows, by way of tile A, against MB tiles of activations; the first two are summed in tiles C, D. */
#define MULTIPLY(MB, rows, b, A, C, D)                                                                                 \
    do {                                                                                                               \
        _tile_loadd(A, rows, 64);                                                                                      \
        _tile_loadd(6, b, 64);                                                                                         \
        _tile_dpbf16ps(C, A, 6);                                                                                       \
        if (MB > 1) {                                                                                                  \
            _tile_loadd(7, (b) + 512, 64);                                                                             \
            _tile_dpbf16ps(D, A, 7);                                                                                   \
        }                                                                                                              \
        if (MB > 2) {                                                                                                  \
            _tile_loadd(6, (b) + 1024, 64);                                                                            \
            _tile_dpbf16ps(2, A, 6);                                                                                   \
            _tile_loadd(7, (b) + 1536, 64);                                                                            \
            _tile_dpbf16ps(3, A, 7);                                                                                   \
        }                                                                                                              \
    } while (0)
/* Both halves of 64 columns. For few tiles the second is summed by itself, so that it has not to wait for the first. */
#define FIRST_HALF(MB, rows, b) MULTIPLY(MB, (rows)[0], b, 4, 0, 1)
#define SECOND_HALF(MB, rows, b)                                                                                       \
    if (MB < 4)                                                                                                        \
        MULTIPLY(MB, (rows)[1], (b) + MB * 512, 5, 2, 3);                                                              \
    else                                                                                                               \
        MULTIPLY(MB, (rows)[1], (b) + MB * 512, 5, 0, 1)

INLINE void tiles(const int form, const int MB, const bf16 *x, const matrix_t *w, long first, long width, bf16 *out,
                  long M, long S)
{
    const long K = w->inputs;
    const float *scales = scales_of(form, w);
    bf16 rows[2][2][512] __attribute__((aligned(64)));
    float sums[256] __attribute__((aligned(64)));
    for (long n = first; n < first + width; n += 16) {
        cursor_t c[16];
        const long ahead = row_at(form, w, n + 16) - row_at(form, w, n);
        for (int r = 0; r < 16; r++)
            c[r] = begin(form, w, n + r);
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        /* The tiles of the columns before are multiplied among the rows of these. */
        for (long k = 0; k < K; k += 64) {
            bf16(*to)[512] = rows[k / 64 & 1], (*from)[512] = rows[~(k / 64) & 1];
            const bf16 *b = x + (k - 64) / 32 * MB * 512;
            for (int part = 0; part < 4; part++) {
                for (int r = 4 * part; r < 4 * part + 4; r++) {
                    __m512i low, high;
                    fetch(form, c[r].p + ahead);
                    next(form, &c[r], k, &low, &high);
                    _mm512_store_si512(to[0] + r * 32, low);
                    _mm512_store_si512(to[1] + r * 32, high);
                }
                if (k && part == 1)
                    FIRST_HALF(MB, from, b);
                if (k && part == 3) {
                    SECOND_HALF(MB, from, b);
                }
            }
        }
        const bf16 *b = x + (K - 64) / 32 * MB * 512;
        bf16(*from)[512] = rows[~(K / 64) & 1];
        FIRST_HALF(MB, from, b);
        SECOND_HALF(MB, from, b);
        for (int i = 0; i < MB; i++) {
            switch (i) {
            case 0: _tile_stored(0, sums, 64); break;
            case 1: _tile_stored(1, sums, 64); break;
            case 2: _tile_stored(2, sums, 64); break;
            case 3: _tile_stored(3, sums, 64); break;
            }
            if (MB < 4) {
                float odd[256] __attribute__((aligned(64)));
                if (i)
                    _tile_stored(3, odd, 64);
                else
                    _tile_stored(2, odd, 64);
                for (int j = 0; j < 256; j += 16)
                    _mm512_store_ps(sums + j, _mm512_add_ps(_mm512_load_ps(sums + j), _mm512_load_ps(odd + j)));
            }
            for (int r = 0; form == CODED && r < 16; r++)
                for (const uint8_t *e = c[r].rare; word(e) != NO_COLUMN; e += 8) {
                    const long k = word(e);
                    const bf16 *column = x + (k / 32 * MB + i) * 512 + k % 32 / 2 * 32 + k % 2;
                    for (int m = 0; m < 16; m++)
                        sums[16 * r + m] += wide(column[2 * m]) * wide((bf16)word(e + 4));
                }
            finish(sums, scales ? scales + n : NULL, w->bias ? w->bias + n : NULL, out + n - first, 16 * i, M, S);
        }
    }
}

#define BY_DOTS(function, ...)                                                                                         \
    switch (M) {                                                                                                       \
    case 1: function(__VA_ARGS__ 1, 4, DOTS); break;                                                                   \
    case 2: function(__VA_ARGS__ 2, 4, DOTS); break;                                                                   \
    case 3: function(__VA_ARGS__ 3, 4, DOTS); break;                                                                   \
    case 4: function(__VA_ARGS__ 4, 4, DOTS); break;                                                                   \
    case 5: function(__VA_ARGS__ 5, 2, DOTS); break;                                                                   \
    case 6: function(__VA_ARGS__ 6, 2, DOTS); break;                                                                   \
    case 7: function(__VA_ARGS__ 7, 2, DOTS); break;                                                                   \
    case 8: function(__VA_ARGS__ 8, 2, DOTS); break;                                                                   \
    }
#define DOTS x, w, first, width, out, S
#define BY_TILES(form)                                                                                                 \
    if (M <= 16)                                                                                                       \
        tiles(form, 1, x, w, first, width, out, M, S);                                                                 \
    else if (M <= 32)                                                                                                  \
        tiles(form, 2, x, w, first, width, out, M, S);                                                                 \
    else                                                                                                               \
        tiles(form, 4, x, w, first, width, out, M, S);
#define OF_INTEGERS(name, form)                                                                                        \
    static void name(const void *x, const matrix_t *w, long first, long width, bf16 *out, long M, long S, int by_tiles) \
    {                                                                                                                  \
        if (by_tiles) {                                                                                                \
            BY_TILES(form)                                                                                             \
        } else {                                                                                                       \
            BY_DOTS(word_dots, form, )                                                                                 \
        }                                                                                                              \
    }

OF_INTEGERS(int8, INT8)
OF_INTEGERS(int4_32, INT4_32)
OF_INTEGERS(int4_64, INT4_64)
OF_INTEGERS(int4_128, INT4_128)

static void coded(const bf16 *x, const matrix_t *w, long first, long width, bf16 *out, long M, long S, int by_tiles)
{
    if (by_tiles) {
        BY_TILES(CODED)
    } else {
        BY_DOTS(coded_dots, )
    }
}

void form_columns(const void *prepared, const matrix_t *w, long first, long width, bf16 *out, long M, long S, int tiles)
{
    switch (w->form) {
    case CODED: coded(prepared, w, first, width, out, M, S, tiles); break;
    case INT8: int8(prepared, w, first, width, out, M, S, tiles); break;
    case INT4_32: int4_32(prepared, w, first, width, out, M, S, tiles); break;
    case INT4_64: int4_64(prepared, w, first, width, out, M, S, tiles); break;
    case INT4_128: int4_128(prepared, w, first, width, out, M, S, tiles); break;
    }
}

/* Rows [first, first + count) of a weight that is not PLAIN, as plain bf16 [count][inputs]. */
#define DECODE(form)                                                                                                   \
    for (long n = first; n < first + count; n++) {                                                                     \
        cursor_t c = begin(form, w, n);                                                                                \
        bf16 *to = out + (n - first) * w->inputs;                                                                      \
        const float *scales = scales_of(form, w);                                                                      \
        for (long k = 0; k < w->inputs; k += 64) {                                                                     \
            __m512i half[2];                                                                                           \
            next(form, &c, k, &half[0], &half[1]);                                                                     \
            for (int i = 0; i < 2; i++)                                                                                \
                _mm512_storeu_si512(to + k + 32 * i, half[i]);                                                         \
            for (int i = 0; scales && i < 4; i++)                                                                      \
                store16(to + k + 16 * i, _mm512_mul_ps(load16(to + k + 16 * i), _mm512_set1_ps(scales[n])));           \
        }                                                                                                              \
        for (const uint8_t *e = c.rare; form == CODED && word(e) != NO_COLUMN; e += 8)                                 \
            to[word(e)] = (bf16)word(e + 4);                                                                           \
    }

static void decode_rows(const matrix_t *w, long first, long count, bf16 *out)
{
    switch (w->form) {
    case CODED: DECODE(CODED) break;
    case INT8: case INT8_DYNAMIC: DECODE(INT8) break;
    case INT4_32: DECODE(INT4_32) break;
    case INT4_64: DECODE(INT4_64) break;
    case INT4_128: DECODE(INT4_128) break;
    }
}

void raytier_decode_bf16(const matrix_t *w, long first, long count, bf16 *out, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < count; n += 16)
        decode_rows(w, first + n, count - n < 16 ? count - n : 16, out + n * w->inputs);
}
