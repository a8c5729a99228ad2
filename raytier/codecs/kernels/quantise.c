/* Scale, minimum and numbers of groups of weights in 4 bits: what `forms._fit_int4` does, in the first cache. */
#pragma GCC optimize("O3,associative-math,no-signed-zeros,no-trapping-math,no-math-errno")
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { LEVELS = 15, MOST = 128 };
static const float RANGES[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f};

static inline void assign(const float *w, int n, float scale, float least, float *numbers)
{
    const float inverse = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < n; i++) {
        const float number = rintf((w[i] - least) * inverse);
        numbers[i] = number < 0 ? 0 : number > LEVELS ? LEVELS : number;
    }
}

/* The scale and the minimum for which scale * numbers + minimum is nearest to w. */
static inline void least_squares(const float *w, const float *numbers, int n, float *scale, float *least)
{
    float mean = 0, centre = 0, spread = 0, joint = 0;
    for (int i = 0; i < n; i++) {
        mean += numbers[i];
        centre += w[i];
    }
    mean /= n;
    centre /= n;
    for (int i = 0; i < n; i++) {
        spread += (numbers[i] - mean) * (numbers[i] - mean);
        joint += (numbers[i] - mean) * (w[i] - centre);
    }
    *scale = spread > 0 ? joint / spread : 0;
    *least = centre - *scale * mean;
}

static uint16_t narrow(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float wide(uint16_t half)
{
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline __attribute__((always_inline)) void fit(const float *w, int n, uint16_t *pair, uint8_t *to)
{
    float numbers[MOST], low = w[0], high = w[0], best = FLT_MAX, scale = 0, least = w[0];
    for (int i = 0; i < n; i++) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    for (unsigned part = 0; part < sizeof RANGES / sizeof *RANGES; part++) {
        float s, l, error = 0;
        assign(w, n, (high - low) * (RANGES[part] / LEVELS), low * RANGES[part], numbers);
        least_squares(w, numbers, n, &s, &l);
        assign(w, n, s, l, numbers);
        for (int i = 0; i < n; i++)
            error += (w[i] - s * numbers[i] - l) * (w[i] - s * numbers[i] - l);
        if (error < best) {
            best = error;
            scale = s;
            least = l;
        }
    }
    pair[0] = narrow(scale);
    pair[1] = narrow(least);
    assign(w, n, wide(pair[0]), wide(pair[1]), numbers);
    for (int i = 0; i < n; i++)
        to[i] = (uint8_t)numbers[i];
}

/* weights [groups][group], pairs [groups][2] in bf16, numbers [groups][group]; group 32, 64 or 128. */
void raytier_fit_int4(const float *weights, long groups, long group, uint16_t *pairs, uint8_t *numbers)
{
    for (long g = 0; g < groups; g++, weights += group, pairs += 2, numbers += group)
        switch (group) {
        case 32: fit(weights, 32, pairs, numbers); break;
        case 64: fit(weights, 64, pairs, numbers); break;
        case 128: fit(weights, 128, pairs, numbers); break;
        }
}
