/* Codes of four bits, 64 columns at a time, for AVX-512: a table of 32 weights answers 32 codes in one instruction.

   Only where every weight is a normal number, which the scale tells; everything else is left to nibbles.h. */

#pragma once

#include "scales.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_QUICK_NIBBLES 1

enum { QUICK_COLUMNS = 64, HALF_COLUMNS = 32 };

/* The codes of 16 bytes as 32 words in the order of the columns; the bits above a code are not cleared. */
static inline __m512i code_words(const uint8_t *codes, int high_first) {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
    return high_first ? _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16))
                      : _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
}

/* For each exponent: what raises E2M1 values by it, twice in 32 bits, so that a load can spread it over a register. */
static uint32_t exponent_steps[256];

static __attribute__((constructor)) void fill_exponent_steps(void) {
    for (int e = 0; e < 256; e++) exponent_steps[e] = (uint16_t)((e - 127) * 128) * 0x10001u;
}

/* Whether all weights of a group are normal numbers. */
static inline int is_usual(uint8_t exponent) { return (uint8_t)(exponent - 2) <= 250; }

/* 32 columns of one row of E2M1 codes with one exponent. Zeros stay what they are. */
static inline void exponent_group(const uint8_t *codes, uint8_t exponent, __m512i values, int high_first, uint16_t *out) {
    __m512i step = _mm512_set1_epi32((int)exponent_steps[exponent]);
    __m512i weight = _mm512_permutexvar_epi16(code_words(codes, high_first), values);
    __mmask32 is_number = _mm512_test_epi16_mask(weight, _mm512_set1_epi16(0x7fff));
    _mm512_storeu_si512(out, _mm512_mask_add_epi16(weight, is_number, weight, step));
}

/* 64 columns. */
static inline int exponent_chunk(const uint8_t *codes, const uint8_t *scales, __m512i values, int high_first, uint16_t *out) {
    if (!(is_usual(scales[0]) && is_usual(scales[1]))) return 0;
    exponent_group(codes, scales[0], values, high_first, out);
    exponent_group(codes + 16, scales[1], values, high_first, out + HALF_COLUMNS);
    return 1;
}

/* Whether every product of a code's value and this scale is a normal number. */
static inline int is_safe(float scale) { return fabsf(scale) > 0x1p-100f && fabsf(scale) < 0x1p100f; }

static inline __m512 products(__m512 values, float zero, float scale) {
    /* taking away 0 changes no value, and the compiler may not leave it out */
    return _mm512_mul_ps(zero == 0 ? values : _mm512_sub_ps(values, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
}

/* 32 columns; a code has the weights of `table` from 0 on, or from 16 on where `is_high` is 16. */
static inline void look_up_words(const uint8_t *codes, __m512i table, __m512i is_high, int high_first, uint16_t *out) {
    __m512i code = _mm512_and_si512(code_words(codes, high_first), _mm512_set1_epi16(15));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_or_si512(code, is_high), table));
}

/* Where the scales of 64 columns stand in their row of the grid. Divisions are slow, so this is done once for all rows. */
struct scale_places {
    int64_t across, of[4]; /* for each 16 columns */
};

static inline struct scale_places places_of(const struct stored_matrix *m, int64_t column) {
    struct scale_places places = {.across = m->across};
    for (int k = 0; k < 4; k++) places.of[k] = group_of(m, column + 16 * k);
    return places;
}

/* 64 columns of one row, with a scale for each 16, 32 or more. */
static inline __attribute__((always_inline)) int scaled_chunk(const struct stored_matrix *m, const int scale_of, const int zero_of,
                                                              const int global_of, int64_t down, const struct scale_places *places,
                                                              const uint8_t *codes, __m512 values, const float *code_values,
                                                              int high_first, uint16_t *out) {
    const int step = places->of[0] == places->of[1] && places->of[2] == places->of[3] ? 2 : 1;
    __m512 product[4];
    for (int k = 0; k < 4; k += step) {
        float scale = scale_as(m, scale_of, global_of, down * places->across + places->of[k]);
        if (!is_safe(scale)) return 0;
        product[k] = products(values, zero_of == ZERO_NONE ? 0 : code_values[zero_code_at(m, down, places->of[k])], scale);
    }
    if (step == 2) { /* one table for both halves */
        __m512i table = (__m512i)_mm512_cvtne2ps_pbh(product[2], product[0]);
        look_up_words(codes, table, _mm512_setzero_si512(), high_first, out);
        look_up_words(codes + 16, table, _mm512_set1_epi16(16), high_first, out + HALF_COLUMNS);
        return 1;
    }
    const __m512i second_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    look_up_words(codes, (__m512i)_mm512_cvtne2ps_pbh(product[1], product[0]), second_half, high_first, out);
    look_up_words(codes + 16, (__m512i)_mm512_cvtne2ps_pbh(product[3], product[2]), second_half, high_first, out + HALF_COLUMNS);
    return 1;
}

/* As `scaled_chunk`, with what is usual known to the compiler. */
static inline int quick_scaled(const struct stored_matrix *m, int64_t down, const struct scale_places *places, const uint8_t *codes,
                               __m512 values, const float *code_values, uint16_t *out) {
    int scale = scale_kind(m), zero = zero_kind(m), global = global_kind(m), high = is_high_first(m);
#define WITH(scale, zero, global, high) scaled_chunk(m, scale, zero, global, down, places, codes, values, code_values, high, out)
    if (zero == ZERO_NONE && global == GLOBAL_NONE && !high) {
        if (scale == SCALE_BF16) return WITH(SCALE_BF16, ZERO_NONE, GLOBAL_NONE, 0);
        if (scale == SCALE_F16) return WITH(SCALE_F16, ZERO_NONE, GLOBAL_NONE, 0);
        if (scale == SCALE_F32) return WITH(SCALE_F32, ZERO_NONE, GLOBAL_NONE, 0);
    }
    if (zero == ZERO_NONE && scale == SCALE_E4M3 && !high) return WITH(SCALE_E4M3, ZERO_NONE, global, 0);
    return WITH(scale, zero, global, high);
#undef WITH
}

/* 64 columns of rows `row` on; gives how many rows were done before one that is left to nibbles.h. */
static inline int64_t quick_nibbles(const struct stored_matrix *m, const float *code_values, int64_t row, int64_t rows, int64_t column,
                                    uint16_t *out, int64_t stride) {
    int scale = scale_kind(m), is_exponent = scale == SCALE_EXP2 || scale == SCALE_LDEXP || scale == SCALE_E8M0;
    int64_t group = m->parameter[GROUP_COLUMNS], bytes = m->row_bytes, high = is_high_first(m);
    if (group % 16 || product_kind(m) == PRODUCT_F16) return 0;
    int is_e2m1 = is_exponent && group == HALF_COLUMNS && zero_kind(m) == ZERO_NONE && global_kind(m) == GLOBAL_NONE;
    if (is_exponent && !is_e2m1) return 0;
    const struct scale_places places = places_of(m, column);
    __m512 values = _mm512_loadu_ps(code_values);
    __m512i table = (__m512i)_mm512_cvtne2ps_pbh(values, values);
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = m->part[CODES] + r * bytes + column / 2;
        int64_t down = down_of(m, r);
        int is_done = is_e2m1 ? exponent_chunk(codes, m->part[SCALES] + down * places.across + places.of[0], table, (int)high, out)
                              : quick_scaled(m, down, &places, codes, values, code_values, out);
        if (!is_done) return r - row;
    }
    return rows;
}
#endif
