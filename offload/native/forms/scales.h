/* Scales and zeros of stored matrices, and the one order in which a weight is rounded. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../bfloat16.h"
#include "../stored_matrix.h"

/* What a code of four bits stands for, before it is scaled. */
static const float NIBBLE_VALUES[4][16] = {
    [E2M1] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6},
    [OFFSET4] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    [UINT4] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    [NF4] = {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
             -0.18477343022823334f, -0.09105003625154495f, 0, 0.07958029955625534f, 0.16093020141124725f,
             0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f,
             0.7229568362236023f, 1},
};

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* 2 ** (e - 127), the smallest of which is a denormal number; 255 is infinity. */
static inline float float_of_exponent(uint8_t e) { return float_of_bits(e ? (uint32_t)e << 23 : 1u << 22); }

/* 2 ** (e - 128), which is finite for 255: where LDEXP multiplies, values are doubled before. */
static inline float half_of_exponent(uint8_t e) { return float_of_bits(e > 1 ? (uint32_t)(e - 1) << 23 : 1u << (21 + e)); }

/* What a scale that is an exponent multiplies with; values are multiplied by `exponent_factor` before. */
static inline float scale_of_exponent(int kind, uint8_t e) {
    if (kind == SCALE_LDEXP) return half_of_exponent(e);
    return kind == SCALE_E8M0 && e == 255 ? NAN : float_of_exponent(e);
}

static inline float exponent_factor(int kind) { return kind == SCALE_LDEXP ? 2.0f : 1.0f; }

static inline float float_of_e4m3(uint8_t code) {
    if ((code & 127) == 127) return NAN;
    /* as the bits of a float its exponent is 120 too low; without one it is eighths of 2^-6 (a float without one is slow) */
    float value = code & 0x78 ? float_of_bits(((uint32_t)(code & 127) << 20) + (120u << 23)) : (float)(code & 7) * 0x1p-9f;
    return code & 128 ? -value : value;
}

/* Of every code; a look-up instead of branches where there is a scale for each 16 weights. */
static float e4m3_floats[256];

static __attribute__((constructor)) void fill_e4m3_floats(void) {
    for (int code = 0; code < 256; code++) e4m3_floats[code] = float_of_e4m3((uint8_t)code);
}

static inline float float_of_f16(uint16_t bits) {
    float sign = bits >> 15 ? -1.0f : 1.0f;
    if ((bits & 0x7c00) == 0x7c00) return bits & 0x3ff ? NAN : sign * INFINITY;
    return sign * float_of_bits((uint32_t)(bits & 0x7fff) << 13) * 0x1p112f;
}

/* A float rounded to the nearest number of float16, ties to even. */
static inline float round_f16(float value) {
    float size = fabsf(value);
    if (!(size < 65520.0f)) return size >= 65520.0f ? copysignf(INFINITY, value) : value;
    /* adding and taking away a number whose last place is float16's rounds by the processor's own rule */
    int exponent;
    frexpf(size, &exponent);
    float large = ldexpf(1.5f, (exponent < -13 ? -13 : exponent) + 12);
    return copysignf(size + large - large, value);
}

/* One of several numbers of a kind of scales; half of it if it is LDEXP. */
static inline __attribute__((always_inline)) float number_at(const uint8_t *numbers, const int kind, int64_t place) {
    uint16_t half;
    float number;
    switch (kind) {
    case SCALE_F32: memcpy(&number, numbers + 4 * place, 4); return number;
    case SCALE_BF16: memcpy(&half, numbers + 2 * place, 2); return load_bf16(half);
    case SCALE_F16: memcpy(&half, numbers + 2 * place, 2); return float_of_f16(half);
    case SCALE_E4M3: return e4m3_floats[numbers[place]];
    default: return scale_of_exponent(kind, numbers[place]);
    }
}

/* The scale at one place of the grid, times or over the scale of scales. `kind` and `global` are scale_kind and global_kind, which a
   compiler may know. */
static inline __attribute__((always_inline)) float scale_as(const struct stored_matrix *m, const int kind, const int global, int64_t place) {
    float scale = number_at(m->part[SCALES], kind, place);
    if (global == GLOBAL_NONE) return scale;
    float common;
    memcpy(&common, m->part[GLOBAL], 4);
    return global == GLOBAL_MULTIPLIES ? scale * common : scale / common;
}

static inline float scale_at(const struct stored_matrix *m, int64_t place) { return scale_as(m, scale_kind(m), global_kind(m), place); }

/* What a code's value is multiplied by before anything else. */
static inline float value_factor(const struct stored_matrix *m) { return exponent_factor(scale_kind(m)); }

/* The code of the zero at one place of the grid. */
static inline int zero_code_at(const struct stored_matrix *m, int64_t down, int64_t across) {
    int64_t width = m->across;
    int bits = m->form == NIBBLES ? 4 : 8, in_word = 32 / bits;
    if (zero_kind(m) == ZERO_BYTES) return m->part[ZEROS][down * width + across] & ((1 << bits) - 1);
    uint32_t word;
    memcpy(&word, m->part[ZEROS] + 4 * (down / in_word * width + across), 4);
    return word >> bits * (down % in_word) & ((1u << bits) - 1);
}

static inline int is_zero_code(const struct stored_matrix *m) { return zero_kind(m) == ZERO_PACKED || zero_kind(m) == ZERO_BYTES; }

/* The zero at one place of the grid that is no code; 0 where there is none. */
static inline float zero_number_at(const struct stored_matrix *m, int64_t down, int64_t across) {
    return zero_kind(m) == ZERO_FLOATS ? number_at(m->part[ZEROS], scale_kind(m), down * m->across + across) : 0;
}

/* What products of LLM.int8 are multiplied by: bitsandbytes' own number for a 127th. */
#define PART_OF_127 7.874015718698502e-3f

/* A product of a value and its scale, rounded as its format does, and then to bfloat16. */
static inline uint16_t round_product(const struct stored_matrix *m, float product) {
    if (product_kind(m) == PRODUCT_F127) product *= PART_OF_127;
    if (product_kind(m) == PRODUCT_F16) product = round_f16(product);
    return round_bf16(product);
}

/* A value without its zero. A zero that is no code makes a difference that is rounded as the product is. */
static inline float less_zero(const struct stored_matrix *m, float value, float zero) {
    if (zero_kind(m) == ZERO_NONE) return value;
    value -= zero;
    if (zero_kind(m) == ZERO_FLOATS && product_kind(m) == PRODUCT_BF16) return load_bf16(round_bf16(value));
    return zero_kind(m) == ZERO_FLOATS && product_kind(m) == PRODUCT_F16 ? round_f16(value) : value;
}

#ifdef __AVX512BW__
#include <immintrin.h>

/* Sixteen numbers rounded as `round_bf16` does; integers, because vcvtneps2bf16 takes denormal numbers for zero. */
static inline __m256i round_bf16s(__m512 value) {
    __m512i bits = _mm512_castps_si512(value);
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, _mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(rounded);
}

/* The same for sixteen products. */
static inline __m256i round_products(const struct stored_matrix *m, __m512 product) {
    if (product_kind(m) == PRODUCT_F127) product = _mm512_mul_ps(product, _mm512_set1_ps(PART_OF_127));
    if (product_kind(m) == PRODUCT_F16) product = _mm512_cvtph_ps(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
    return round_bf16s(product);
}

static inline __m512 less_zeros(const struct stored_matrix *m, __m512 value, float zero) {
    if (zero_kind(m) == ZERO_NONE) return value;
    value = _mm512_sub_ps(value, _mm512_set1_ps(zero));
    if (zero_kind(m) == ZERO_FLOATS && product_kind(m) == PRODUCT_BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_products(m, value)), 16));
    if (zero_kind(m) == ZERO_FLOATS && product_kind(m) == PRODUCT_F16)
        return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return value;
}
#endif
