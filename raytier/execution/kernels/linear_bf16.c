/* Linear layers in bf16 for few rows, as F.linear: out[m][n] = sum over k of x[m][k] * weight[n][k] (+ bias[n]).
 *
 * With few rows such a product takes as long as its weights take to come from memory, so the kernels are made for that:
 * weights are read once, in the layout that they have in a checkpoint, from wherever they lie, and fetched ahead.
 *
 * - By dot products: rows of the weight one after another with VDPBF16PS (AVX512_BF16), at most 8 rows of x.
 * - By tiles: 16 rows of the weight by 32 columns with TDPBF16PS (AMX); the activations are the second operand,
 *   brought into its layout first: tile (k, m) holds in row r the columns (2r, 2r + 1) of 16 rows m. At most 64 rows.
 *
 * Both accumulate in fp32 and round once. The threads are those of libgomp, which torch computes with too.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bf16.h"

#define DOT_AHEAD 512 /* columns that a row of the weight is fetched ahead: 1 KiB */
#define TILES_AHEAD 4 /* tiles that are */

/* What this processor and its system allow: bit 0 VDPBF16PS, bit 1 TDPBF16PS and TDPBSSD, bit 2 what other forms
   than bf16 need. */
int raytier_linear_features(void)
{
    int found = 0;
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"))
        found |= 1;
    unsigned a = 7, b, c = 0, d;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    if (((d >> 22) & 1) && ((d >> 24) & 1) && ((d >> 25) & 1) && (found & 1))
        if (syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0)
            found |= 2;
    if ((found & 1) && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt"))
        found |= 4;
    return found;
}

static inline __m512bh load(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }

/* M rows of x against R rows of the weight. */
#define DOT(M, R)                                                                                                      \
    static inline void dot_##M##_##R(const bf16 *x, const bf16 *w, const bf16 *next, const bf16 *bias, bf16 *out,      \
                                     long n, long S, long K)                                                           \
    {                                                                                                                  \
        __m512 sum[R][M];                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int m = 0; m < M; m++)                                                                                \
                sum[r][m] = _mm512_setzero_ps();                                                                       \
        for (long k = 0; k < K; k += 32) {                                                                             \
            const bf16 *ahead = k + DOT_AHEAD < K ? w + k + DOT_AHEAD : next + k + DOT_AHEAD - K;                      \
            __m512bh row[R];                                                                                           \
            for (int r = 0; r < R; r++) {                                                                              \
                _mm_prefetch((const char *)(ahead + r * K), _MM_HINT_T0);                                              \
                row[r] = load(w + r * K + k);                                                                          \
            }                                                                                                          \
            for (int m = 0; m < M; m++) {                                                                              \
                __m512bh v = load(x + m * K + k);                                                                      \
                for (int r = 0; r < R; r++)                                                                            \
                    sum[r][m] = _mm512_dpbf16_ps(sum[r][m], row[r], v);                                                \
            }                                                                                                          \
        }                                                                                                              \
        for (int r = 0; r < R; r++)                                                                                    \
            for (int m = 0; m < M; m++)                                                                                \
                out[m * S + n + r] = narrow(_mm512_reduce_add_ps(sum[r][m]) + bias_of(bias, n + r));                   \
    }                                                                                                                  \
    static void dots_##M##_##R(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, long N, long S, long K)      \
    {                                                                                                                  \
        for (long n = 0; n < N; n += R) {                                                                              \
            const bf16 *here = w + n * K;                                                                              \
            dot_##M##_##R(x, here, n + R < N ? here + R * K : here, bias, out, n, S, K);                               \
        }                                                                                                              \
    }

DOT(1, 4)
DOT(2, 4)
DOT(3, 4)
DOT(4, 4)
DOT(5, 2)
DOT(6, 2)
DOT(7, 2)
DOT(8, 2)

static void dots(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, long M, long N, long S, long K)
{
    switch (M) {
    case 1: dots_1_4(x, w, bias, out, N, S, K); break;
    case 2: dots_2_4(x, w, bias, out, N, S, K); break;
    case 3: dots_3_4(x, w, bias, out, N, S, K); break;
    case 4: dots_4_4(x, w, bias, out, N, S, K); break;
    case 5: dots_5_2(x, w, bias, out, N, S, K); break;
    case 6: dots_6_2(x, w, bias, out, N, S, K); break;
    case 7: dots_7_2(x, w, bias, out, N, S, K); break;
    case 8: dots_8_2(x, w, bias, out, N, S, K); break;
    }
}

/* ---- tiles ---- */

#define EIGHT(n) n, n, n, n, n, n, n, n
/* Eight tiles of 16 rows of 64 bytes. Not on the stack: gcc believes that LDTILECFG reads 8 bytes and leaves out what
   writes the others. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t colsb[16];
    uint8_t rows[16];
} CONFIG __attribute__((aligned(64))) = {1, 0, {0}, {EIGHT(64)}, {EIGHT(16)}};

static inline void configure(void) { _tile_loadconfig(&CONFIG); }

/* Tiles (k, m) of x: 512 numbers each, m innermost. */
static void arrange(const bf16 *x, bf16 *tiles, long steps, long M, long MB, long K)
{
    for (long k = 0; k < steps; k++)
        for (long mb = 0; mb < MB; mb++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = mb * 16 + i < M ? _mm512_loadu_si512(x + (mb * 16 + i) * K + k * 32) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(tiles + (k * MB + mb) * 512 + i * 32, r[i]);
        }
}

/* A tile of sums [16 n][16 m], as it was stored, into out[m * S + n]. */
static inline void finish(const float *sums, const bf16 *bias, bf16 *out, long n, long m, long M, long S)
{
    __m512i r[16];
    for (int i = 0; i < 16; i++)
        r[i] = _mm512_load_si512(sums + i * 16);
    transpose(r);
    __m512 add = bias ? widen(_mm256_loadu_si256((const __m256i *)(bias + n))) : _mm512_setzero_ps();
    for (int i = 0; i < 16 && m + i < M; i++) {
        __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(r[i]), add));
        _mm256_storeu_si256((__m256i *)(out + (m + i) * S + n), (__m256i)rounded);
    }
}

/* MB tiles of activations (rows that are not there are zeros) against one of the weight at a time, whose next columns
   are fetched a little ahead: further, or over more rows at once, was slower. */
#define TILES(MB, STEP)                                                                                                \
    static void tiles_##MB(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *out, long M, long N, long S,          \
                           long K)                                                                                     \
    {                                                                                                                  \
        float sums[256] __attribute__((aligned(64)));                                                                  \
        const long steps = K / 32;                                                                                     \
        for (long n = 0; n < N; n += 16) {                                                                             \
            const bf16 *here = w + n * K, *next = n + 16 < N ? here + 16 * K : here;                                   \
            _tile_zero(0);                                                                                             \
            _tile_zero(1);                                                                                             \
            _tile_zero(2);                                                                                             \
            _tile_zero(3);                                                                                             \
            for (long k = 0; k < steps; k++) {                                                                         \
                const bf16 *b = x + k * MB * 512;                                                                      \
                const bf16 *ahead = (k + TILES_AHEAD < steps ? here : next - K) + (k + TILES_AHEAD) * 32;              \
                for (int r = 0; r < 16; r++)                                                                           \
                    _mm_prefetch((const char *)(ahead + r * K), _MM_HINT_T1);                                          \
                _tile_loadd(4, here + k * 32, 2 * K);                                                                  \
                STEP                                                                                                   \
            }                                                                                                          \
            _tile_stored(0, sums, 64);                                                                                 \
            finish(sums, bias, out, n, 0, M, S);                                                                       \
            if (MB > 1) {                                                                                              \
                _tile_stored(1, sums, 64);                                                                             \
                finish(sums, bias, out, n, 16, M, S);                                                                  \
            }                                                                                                          \
            if (MB > 2) {                                                                                              \
                _tile_stored(2, sums, 64);                                                                             \
                finish(sums, bias, out, n, 32, M, S);                                                                  \
                _tile_stored(3, sums, 64);                                                                             \
                finish(sums, bias, out, n, 48, M, S);                                                                  \
            }                                                                                                          \
        }                                                                                                              \
    }
#define MULTIPLY(i, tile)                                                                                              \
    _tile_loadd(tile, b + (i) * 512, 64);                                                                              \
    _tile_dpbf16ps(i, 4, tile);

TILES(1, MULTIPLY(0, 5))
TILES(2, MULTIPLY(0, 5) MULTIPLY(1, 6))
TILES(4, MULTIPLY(0, 5) MULTIPLY(1, 6) MULTIPLY(2, 7) MULTIPLY(3, 5))

void linear_begin(int tiles)
{
    if (tiles)
        configure();
}

void linear_end(int tiles)
{
    if (tiles)
        _tile_release(); /* oneDNN has another configuration */
}

static long rows_for(long M) { return M <= 16 ? 16 : M <= 32 ? 32 : 64; }
#define WITH_WORDS (forms_of(INT8) | forms_of(INT4_32) | forms_of(INT4_64) | forms_of(INT4_128))

long linear_room(long M, long K, int tiles, int forms)
{
    long room = forms & forms_of(INT8_DYNAMIC) ? bytes_room(M, K, tiles) : 0;
    if (tiles)
        return room + (forms & ~forms_of(INT8_DYNAMIC) ? rows_for(M) * K * (long)sizeof(bf16) : 0);
    return room + (forms & WITH_WORDS ? words_room(M, K) : 0);
}

prepared_t linear_prepare(const bf16 *x, void *room, long M, long K, int tiles, int forms)
{
    prepared_t prepared = {x, NULL, NULL};
    if (forms & forms_of(INT8_DYNAMIC)) {
        bytes_prepare(x, room, M, K, tiles);
        prepared.bytes = room;
        room = (uint8_t *)room + bytes_room(M, K, tiles);
    }
    if (tiles && forms & ~forms_of(INT8_DYNAMIC)) {
        arrange(x, room, K / 32, M, rows_for(M) / 16, K);
        prepared.x = room;
    } else if (!tiles && forms & WITH_WORDS) {
        words_prepare(x, room, M, K);
        prepared.words = room;
    }
    return prepared;
}

void linear_columns(const prepared_t *prepared, const matrix_t *w, long first, long width, bf16 *out, long M, long S,
                    int tiles)
{
    const long K = w->inputs;
    const bf16 *weight = (const bf16 *)w->data + first * K, *bias = w->bias ? w->bias + first : NULL, *x = prepared->x;
    if (w->form == INT8_DYNAMIC)
        dynamic_columns(prepared->bytes, w, first, width, out, M, S, tiles);
    else if (w->form != PLAIN)
        form_columns(tiles || w->form == CODED ? x : prepared->words, w, first, width, out, M, S, tiles);
    else if (!tiles)
        dots(x, weight, bias, out, M, width, S, K);
    else if (M <= 16)
        tiles_1(x, weight, bias, out, M, width, S, K);
    else if (M <= 32)
        tiles_2(x, weight, bias, out, M, width, S, K);
    else
        tiles_4(x, weight, bias, out, M, width, S, K);
}

long linear_chunk(long N, int threads)
{
    const long chunk = (N / (8L * threads) + 15) / 16 * 16;
    return chunk < 64 ? 64 : chunk;
}

/* Bytes of scratch for `raytier_linear_bf16`. */
long raytier_linear_work_bf16(const matrix_t *w, long M, int threads, int tiles)
{
    return threads * linear_room(M, w->inputs, tiles, forms_of(w->form)) + 64;
}

/* out [M][outputs] = x [M][inputs] * weight^T + bias.
 *
 * scratch: each thread prepares x for itself: to get what another core has just written takes longer.
 */
void raytier_linear_bf16(const bf16 *x, const matrix_t *w, bf16 *out, uint8_t *scratch, long M, int threads, int tiles)
{
    const long N = w->outputs, K = w->inputs, chunk = linear_chunk(N, threads);
    const int forms = forms_of(w->form);
    scratch = (uint8_t *)(((uintptr_t)scratch + 63) / 64 * 64);
#pragma omp parallel num_threads(threads)
    {
        uint8_t *room = scratch + omp_get_thread_num() * linear_room(M, K, tiles, forms);
        const prepared_t prepared = linear_prepare(x, room, M, K, tiles, forms);
        linear_begin(tiles);
#pragma omp for schedule(dynamic) nowait
        for (long n = 0; n < N; n += chunk)
            linear_columns(&prepared, w, n, N - n < chunk ? N - n : chunk, out + n, M, N, tiles);
        linear_end(tiles);
    }
}
