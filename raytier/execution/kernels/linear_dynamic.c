/* Linear layers on weights in 8 bits with activations in 8 bits, for few rows: every row of x has a scale of its own
 * (`int8-dynamic`, see codecs/forms.py). Products are summed in 32 bits, exactly, and scaled once.
 *
 * By dot products with VPDPBUSD, which takes the activations as 0..255: 128 is added to them, and 128 times the sum of
 * the weights taken off again. By tiles with TDPBSSD, 16 rows of the weight by 64 columns as they lie in memory; the
 * activations are the second operand: tile (k, m) holds in row r the columns (4r .. 4r + 3) of 16 rows m.
 */
#pragma GCC target("avx512vnni,amx-int8")
#include "bf16.h"

#define TILES_AHEAD 4 /* tiles that are fetched ahead */

typedef struct {
    uint8_t *numbers;
    float *scales; /* [rows] */
} bytes_t;

static long rows_for(long M, int tiles) { return !tiles ? M : M <= 16 ? 16 : M <= 32 ? 32 : 64; }

long bytes_room(long M, long K, int tiles) { return (rows_for(M, tiles) * (K + 4) + 63) / 64 * 64; }

static inline bytes_t bytes_in(const void *room, long M, long K, int tiles)
{
    uint8_t *numbers = (uint8_t *)room;
    return (bytes_t){numbers, (float *)(numbers + rows_for(M, tiles) * K)};
}

/* 16 numbers of x / scale, and `add` to each. */
static inline __m128i quantised(const bf16 *x, __m512 inverse, __m512i add)
{
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(load16(x), inverse)), add));
}

void bytes_prepare(const bf16 *x, void *room, long M, long K, int tiles)
{
    const bytes_t to = bytes_in(room, M, K, tiles);
    const long MB = rows_for(M, tiles) / 16;
    const __m512i add = _mm512_set1_epi32(tiles ? 0 : 128);
    __m512 inverse[64];
    for (long m = 0; m < rows_for(M, tiles); m++) {
        __m512 most = _mm512_setzero_ps();
        for (long k = 0; m < M && k < K; k += 16)
            most = _mm512_max_ps(most, _mm512_abs_ps(load16(x + m * K + k)));
        const float scale = _mm512_reduce_max_ps(most) / 127;
        to.scales[m] = scale;
        inverse[m] = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
    }
    if (!tiles) {
        for (long m = 0; m < M; m++)
            for (long k = 0; k < K; k += 16)
                _mm_storeu_si128((__m128i *)(to.numbers + m * K + k), quantised(x + m * K + k, inverse[m], add));
        return;
    }
    for (long k = 0; k < K / 64; k++)
        for (long mb = 0; mb < MB; mb++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                const long m = mb * 16 + i;
                __m128i part[4];
                for (int j = 0; j < 4; j++)
                    part[j] = m < M ? quantised(x + m * K + k * 64 + 16 * j, inverse[m], add) : _mm_setzero_si128();
                r[i] = _mm512_inserti32x4(_mm512_castsi128_si512(part[0]), part[1], 1);
                r[i] = _mm512_inserti32x4(_mm512_inserti32x4(r[i], part[2], 2), part[3], 3);
            }
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(to.numbers + ((k * MB + mb) * 16 + i) * 64, r[i]);
        }
}

static inline const float *scales_of(const matrix_t *w)
{
    return (const float *)((const uint8_t *)w->data + (w->outputs * w->inputs + 63) / 64 * 64);
}

static inline __attribute__((always_inline)) void dots(const int M, const int R, const bytes_t x, const matrix_t *w,
                                                       long first, long width, bf16 *out, long S)
{
    const long K = w->inputs;
    const int8_t *weight = w->data;
    const float *scales = scales_of(w);
    const __m512i ones = _mm512_set1_epi8(1);
    for (long n = first; n < first + width; n += R) {
        __m512i sum[4][8], all[4];
        for (int r = 0; r < R; r++) {
            all[r] = _mm512_setzero_si512();
            for (int m = 0; m < M; m++)
                sum[r][m] = _mm512_setzero_si512();
        }
        for (long k = 0; k < K; k += 64) {
            __m512i row[4];
            for (int r = 0; r < R; r++) {
                const int8_t *p = weight + (n + r) * K + k;
                _mm_prefetch((const char *)p + R * K, _MM_HINT_T1);
                row[r] = _mm512_loadu_si512(p);
                all[r] = _mm512_dpbusd_epi32(all[r], ones, row[r]);
            }
            for (int m = 0; m < M; m++) {
                const __m512i v = _mm512_loadu_si512(x.numbers + m * K + k);
                for (int r = 0; r < R; r++)
                    sum[r][m] = _mm512_dpbusd_epi32(sum[r][m], v, row[r]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) {
                const int total = _mm512_reduce_add_epi32(sum[r][m]) - 128 * _mm512_reduce_add_epi32(all[r]);
                const float value = (float)total * scales[n + r] * x.scales[m];
                out[m * S + n - first + r] = narrow(value + bias_of(w->bias, n + r));
            }
    }
}

/* A tile of sums [16 n][16 m] of 32 bits into out[m * S + n]. */
static inline void finish(const int32_t *sums, const float *scales, const float *of_rows, const bf16 *bias, bf16 *out,
                          long m, long M, long S)
{
    __m512i r[16];
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_load_si512(sums + i * 16);
    transpose(r);
    const __m512 add = bias ? load16(bias) : _mm512_setzero_ps(), scale = _mm512_loadu_ps(scales);
    for (int i = 0; i < 16 && m + i < M; i++) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(of_rows[m + i]));
        store16(out + (m + i) * S, _mm512_fmadd_ps(_mm512_cvtepi32_ps(r[i]), both, add));
    }
}

#define TILES(MB, STEP)                                                                                                \
    static void tiles_##MB(const bytes_t x, const matrix_t *w, long first, long width, bf16 *out, long M, long S)      \
    {                                                                                                                  \
        int32_t sums[256] __attribute__((aligned(64)));                                                                \
        const long K = w->inputs, steps = K / 64;                                                                      \
        const float *scales = scales_of(w);                                                                            \
        for (long n = first; n < first + width; n += 16) {                                                             \
            const int8_t *here = (const int8_t *)w->data + n * K, *next = n + 16 < first + width ? here + 16 * K : here; \
            const bf16 *bias = w->bias ? w->bias + n : NULL;                                                           \
            bf16 *to = out + n - first;                                                                                \
            _tile_zero(0);                                                                                             \
            _tile_zero(1);                                                                                             \
            _tile_zero(2);                                                                                             \
            _tile_zero(3);                                                                                             \
            for (long k = 0; k < steps; k++) {                                                                         \
                const uint8_t *b = x.numbers + k * MB * 1024;                                                          \
                const int8_t *ahead = (k + TILES_AHEAD < steps ? here : next - K) + (k + TILES_AHEAD) * 64;            \
                for (int r = 0; r < 16; r++)                                                                           \
                    _mm_prefetch((const char *)(ahead + r * K), _MM_HINT_T1);                                          \
                _tile_loadd(4, here + k * 64, K);                                                                      \
                STEP                                                                                                   \
            }                                                                                                          \
            _tile_stored(0, sums, 64);                                                                                 \
            finish(sums, scales + n, x.scales, bias, to, 0, M, S);                                                     \
            if (MB > 1) {                                                                                              \
                _tile_stored(1, sums, 64);                                                                             \
                finish(sums, scales + n, x.scales, bias, to, 16, M, S);                                                \
            }                                                                                                          \
            if (MB > 2) {                                                                                              \
                _tile_stored(2, sums, 64);                                                                             \
                finish(sums, scales + n, x.scales, bias, to, 32, M, S);                                                \
                _tile_stored(3, sums, 64);                                                                             \
                finish(sums, scales + n, x.scales, bias, to, 48, M, S);                                                \
            }                                                                                                          \
        }                                                                                                              \
    }
#define MULTIPLY(i, tile)                                                                                              \
    _tile_loadd(tile, b + (i) * 1024, 64);                                                                             \
    _tile_dpbssd(i, 4, tile);

TILES(1, MULTIPLY(0, 5))
TILES(2, MULTIPLY(0, 5) MULTIPLY(1, 6))
TILES(4, MULTIPLY(0, 5) MULTIPLY(1, 6) MULTIPLY(2, 7) MULTIPLY(3, 5))

void dynamic_columns(const void *prepared, const matrix_t *w, long first, long width, bf16 *out, long M, long S,
                     int tiles)
{
    const bytes_t x = bytes_in(prepared, M, w->inputs, tiles);
    if (tiles && M <= 16)
        tiles_1(x, w, first, width, out, M, S);
    else if (tiles && M <= 32)
        tiles_2(x, w, first, width, out, M, S);
    else if (tiles)
        tiles_4(x, w, first, width, out, M, S);
    else
        switch (M) {
        case 1: dots(1, 4, x, w, first, width, out, S); break;
        case 2: dots(2, 4, x, w, first, width, out, S); break;
        case 3: dots(3, 4, x, w, first, width, out, S); break;
        case 4: dots(4, 4, x, w, first, width, out, S); break;
        case 5: dots(5, 2, x, w, first, width, out, S); break;
        case 6: dots(6, 2, x, w, first, width, out, S); break;
        case 7: dots(7, 2, x, w, first, width, out, S); break;
        case 8: dots(8, 2, x, w, first, width, out, S); break;
        }
}
