/* bf16 with coded exponents: a lossless form, about 0.7 of the size, that kernels decode as fast as it comes from memory.
 *
 * The exponents of a row of weights are nearly all among a few neighbours. A row begins with a table of the 16 most
 * frequent ones, and the few weights that have none of them: column (32 bits), weight, 16 bits of zeros; column 2^32 - 1
 * ends these. Of every 64 weights follow: 2 bits each (which of the first three of the table, or 3: another one), 64 bytes
 * of mantissa and sign (the word rotated left by one: 7 bits of mantissa, then the sign), and 4 bits for each one that is
 * another: which of the rest of the table, or 13: none of them.
 *
 * The places of 64 weights are in the order in which kernels need them: `place` below.
 *
 * A piece of rows: offsets of the rows and of the end, in 16 bytes, each 32 bits; padding to 64 bytes; the rows, each a
 * multiple of 16 bytes; 64 bytes of zeros, for kernels read vectors.
 */
#include <stdint.h>
#include <string.h>
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

enum { TABLE = 16, FIRST = 3, RARE = 13, BLOCK = 64 };
static const uint32_t END = 0xFFFFFFFF;

static long header(long rows) { return (4 * (rows + 1) + 63) / 64 * 64; }

static uint32_t word(const uint8_t *p)
{
    uint32_t value;
    memcpy(&value, p, 4);
    return value;
}

static int place(int i) { return i % 32 / 8 * 16 + i / 32 * 8 + i % 8; }

#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)

/* rank[e]: where in `table` exponent e is, or TABLE. Returns how many weights have none of the table. */
static long rank_exponents(const uint16_t *w, long columns, uint8_t table[TABLE], uint8_t rank[256])
{
    uint32_t count[4][256];
    memset(count, 0, sizeof count);
    for (long k = 0; k < columns; k += 4)
        for (int i = 0; i < 4; i++)
            count[i][w[k + i] >> 7 & 255]++;
    for (int e = 0; e < 256; e++)
        count[0][e] += count[1][e] + count[2][e] + count[3][e];
    memset(rank, TABLE, 256);
    long rares = columns;
    for (int t = 0; t < TABLE; t++) {
        int most = 0;
        for (int e = 1; e < 256; e++)
            if (count[0][e] > count[0][most])
                most = e;
        table[t] = (uint8_t)most;
        if (count[0][most])
            rank[most] = (uint8_t)t;
        rares -= count[0][most];
        count[0][most] = 0;
    }
    return rares;
}

/* One row into `out`, which has room for `room` bytes; the bytes that it took, or -1. */
static long encode_row(const uint16_t *w, long columns, uint8_t *out, long room)
{
    uint8_t rank[256], *p = out + TABLE;
    if (room < TABLE)
        return -1;
    const long rares = rank_exponents(w, columns, out, rank);
    if (room < TABLE + 8 * (rares + 1))
        return -1;
    memset(p, 0, 8 * (size_t)rares);
    for (long k = 0, left = rares; left; k++)
        if (rank[w[k] >> 7 & 255] == TABLE) {
            const uint32_t column = (uint32_t)k;
            memcpy(p, &column, 4);
            memcpy(p + 4, w + k, 2);
            p += 8;
            left--;
        }
    memset(p, 255, 8);
    p += 8;
    __m512i ranks[4];
    for (int i = 0; i < 4; i++)
        ranks[i] = _mm512_loadu_si512(rank + 64 * i);
    const __m512i low = _mm512_set1_epi16(255), first = _mm512_set1_epi8(FIRST), rare = _mm512_set1_epi8(RARE);
    for (long k = 0; k < columns; k += BLOCK) {
        if (out + room - p < 80 + 32 + 16)
            return -1;
        __m512i a = _mm512_loadu_si512(w + k), b = _mm512_loadu_si512(w + k + 32);
        a = _mm512_shldi_epi16(a, a, 1);
        b = _mm512_shldi_epi16(b, b, 1);
        const __m512i mantissa = _mm512_packus_epi16(_mm512_and_si512(a, low), _mm512_and_si512(b, low));
        const __m512i exponent = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
        const __m512i lower = _mm512_permutex2var_epi8(ranks[0], exponent, ranks[1]);
        const __m512i upper = _mm512_permutex2var_epi8(ranks[2], exponent, ranks[3]);
        const __m512i code = _mm512_mask_blend_epi8(_mm512_movepi8_mask(exponent), lower, upper);
        const __mmask64 other = _mm512_cmpge_epu8_mask(code, first);
        __m512i two = _mm512_maddubs_epi16(_mm512_min_epu8(code, first), _mm512_set1_epi16(0x0401));
        two = _mm512_madd_epi16(two, _mm512_set1_epi32(0x00100001));
        _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(two));
        _mm512_storeu_si512(p + 16, mantissa);
        const __m512i four = _mm512_maskz_compress_epi8(other, _mm512_sub_epi8(code, first));
        const __m512i pairs = _mm512_maddubs_epi16(_mm512_min_epu8(four, rare), _mm512_set1_epi16(0x1001));
        _mm256_storeu_si256((__m256i *)(p + 80), _mm512_cvtepi16_epi8(pairs));
        p += 80 + (_mm_popcnt_u64(other) + 1) / 2;
    }
    const long end = (p - out + 15) / 16 * 16;
    memset(p, 0, (size_t)(out + end - p));
    return end;
}

/* w [rows][columns], columns a multiple of 64 below 2^21, into `out` with room for `room` bytes. The bytes that it took,
   or -1 where they are not enough. */
long raytier_coded_encode(const uint16_t *w, long rows, long columns, uint8_t *out, long room)
{
    long at = header(rows);
    if (room < at + 64)
        return -1;
    memset(out, 0, (size_t)at);
    for (long r = 0; r < rows; r++) {
        const uint32_t offset = (uint32_t)(at / 16);
        memcpy(out + 4 * r, &offset, 4);
        const long took = encode_row(w + r * columns, columns, out + at, room - at - 64);
        if (took < 0)
            return -1;
        at += took;
    }
    const uint32_t offset = (uint32_t)(at / 16);
    memcpy(out + 4 * rows, &offset, 4);
    memset(out + at, 0, 64);
    return at + 64;
}

#else

long raytier_coded_encode(const uint16_t *w, long rows, long columns, uint8_t *out, long room)
{
    (void)w, (void)rows, (void)columns, (void)out, (void)room;
    return -1;
}

#endif

/* Rows [first, first + count) back into w [count][columns]; on any processor. */
void raytier_coded_decode(const uint8_t *data, long first, long count, long columns, uint16_t *w)
{
    for (long r = first; r < first + count; r++, w += columns) {
        const uint8_t *table = data + 16L * word(data + 4 * r), *rare = table + TABLE, *p = rare;
        while (word(p) != END)
            p += 8;
        p += 8;
        for (long k = 0; k < columns; k += BLOCK) {
            const uint8_t *four = p + 80;
            uint8_t exponents[BLOCK];
            long others = 0;
            for (int q = 0; q < BLOCK; q++) {
                int code = p[q / 4] >> 2 * (q % 4) & 3;
                if (code == FIRST) {
                    code += four[others / 2] >> 4 * (others % 2) & 15;
                    others++;
                }
                exponents[q] = table[code & 15];
            }
            for (int i = 0; i < BLOCK; i++) {
                const int q = place(i);
                w[k + i] = (uint16_t)((p[16 + q] & 1) << 15 | exponents[q] << 7 | p[16 + q] >> 1);
            }
            p = four + (others + 1) / 2;
        }
        for (; word(rare) != END; rare += 8)
            memcpy(w + word(rare), rare + 4, 2);
    }
}
