// Byte planes back to elements: out[i] = bytes i of all planes, the least significant one first.
// With `rotate`, an element was rotated left by one bit before it was split: sign and exponent had changed places.
#include <stdint.h>

typedef uint16_t __attribute__((aligned(1))) u16;
typedef uint32_t __attribute__((aligned(1))) u32;

void raytier_merge_2(const uint8_t *restrict p0, const uint8_t *restrict p1, uint8_t *restrict out, long n, int rotate) {
    u16 *restrict to = (u16 *)out;
    if (rotate) {
        for (long i = 0; i < n; i++) {
            uint16_t v = (uint16_t)(p0[i] | p1[i] << 8);
            to[i] = (uint16_t)(v >> 1 | v << 15);
        }
    } else {
        for (long i = 0; i < n; i++) to[i] = (uint16_t)(p0[i] | p1[i] << 8);
    }
}

void raytier_merge_4(const uint8_t *restrict p0, const uint8_t *restrict p1, const uint8_t *restrict p2,
                     const uint8_t *restrict p3, uint8_t *restrict out, long n, int rotate) {
    u32 *restrict to = (u32 *)out;
    if (rotate) {
        for (long i = 0; i < n; i++) {
            uint32_t v = (uint32_t)p0[i] | (uint32_t)p1[i] << 8 | (uint32_t)p2[i] << 16 | (uint32_t)p3[i] << 24;
            to[i] = v >> 1 | v << 31;
        }
    } else {
        for (long i = 0; i < n; i++)
            to[i] = (uint32_t)p0[i] | (uint32_t)p1[i] << 8 | (uint32_t)p2[i] << 16 | (uint32_t)p3[i] << 24;
    }
}
