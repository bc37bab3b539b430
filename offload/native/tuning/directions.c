/* Steps of bfloat16 weights along directions of signs, with the bits of torch's operations one after the other. */

#include "../bfloat16.h"

/* Signs 1 and -1 from bits, the highest of each byte first. */
void expertier_signs(const uint8_t *bits, int64_t count, int8_t *sign) {
#pragma omp parallel for schedule(static)
    for (int64_t byte = 0; byte < (count + 7) / 8; byte++)
        for (int64_t i = 8 * byte; i < 8 * byte + 8 && i < count; i++) sign[i] = (int8_t)(bits[byte] >> (7 - i % 8) & 1 ? 1 : -1);
}

/* out = w + size sign, rounded to nearest. */
void expertier_perturb(const uint16_t *w, const int8_t *sign, float size, int64_t count, uint16_t *out) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) out[i] = round_bf16(load_bf16(w[i]) + size * (float)sign[i]);
}

/* The same, rounded up or down by chance: `chance` is from -32768 to 32767, and what bfloat16 cuts off decides with it. */
void expertier_move(const uint16_t *w, const int8_t *sign, const int16_t *chance, float size, int64_t count, uint16_t *out) {
#pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < count; i++) {
        float moved = load_bf16(w[i]) + size * (float)sign[i];
        uint32_t bits;
        memcpy(&bits, &moved, sizeof bits);
        out[i] = (uint16_t)((bits + (uint32_t)(int32_t)chance[i] + (1u << 15)) >> 16);
    }
}
