/* Steps of bfloat16 weights along directions of signs, with the bits of torch's operations one after the other. */

#include "../bfloat16.h"

/* Eight signs, of the highest bit first: the product has a copy of the byte every nine bits, so that bit 7 of its byte i is bit 7 - i. */
static inline uint64_t signs_of(uint8_t byte) {
    uint64_t is_up = byte * 0x8040201008040201u >> 7 & 0x0101010101010101u;
    return (is_up ^ 0x0101010101010101u) * 0xff | is_up;
}

/* Signs 1 and -1 from bits, the highest of each byte first. */
void expertier_signs(const uint8_t *bits, int64_t count, int8_t *sign) {
#pragma omp parallel for schedule(static)
    for (int64_t byte = 0; byte < count / 8; byte++) {
        uint64_t eight = signs_of(bits[byte]);
        memcpy(sign + 8 * byte, &eight, sizeof eight);
    }
    if (count % 8 == 0) return;
    uint64_t last = signs_of(bits[count / 8]);
    memcpy(sign + count / 8 * 8, &last, (size_t)(count % 8));
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
