/* Matrices of GGUF files: blocks of 32 or 256 columns, rows one after the other, in `part[0]`.

   Every type here is value = scale * code - minimum, with a scale and a minimum for each group of 16 or 32 columns.
   Both, and the value, are float32 numbers made in the order of `gguf.quants.dequantize`; the value is rounded to
   bfloat16 once. What has no minimum subtracts +0, which changes no number, not even -0.

   Source: the block layouts of ggml (ggml-quants.c) as the PyPI package `gguf` 0.19 reads them. */

#pragma once

#include <math.h>

#include "../ahead.h"
#include "../bfloat16.h"
#include "../stored_matrix.h"
#include "quick_gguf.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define GGUF_AVX512
#include <immintrin.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

enum { GGUF_SMALL = 32, GGUF_LARGE = 256 };

struct gguf_block {
    int8_t code[GGUF_LARGE];
    float scale[16], minimum[16];
};

typedef void gguf_decode(const uint8_t *stored, struct gguf_block *block);

static inline float gguf_f16(const uint8_t *stored) {
    uint16_t half;
    memcpy(&half, stored, 2);
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, bits = half & 0x7fff;
    float value;
    if (bits >= 0x7c00) {
        bits = 0x7f800000 | (bits & 0x3ff) << 13;
    } else if (bits >= 0x400) {
        bits = (bits << 13) + ((127 - 15) << 23);
    } else {
        value = (float)bits * 0x1p-24f; /* subnormal, or zero */
        memcpy(&bits, &value, 4);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

/* --- the write, shared by all types ------------------------------------------------------------------------------ */

#if defined(GGUF_AVX512) && defined(__AVX512BF16__)
static inline __attribute__((always_inline)) __m512 gguf_values(const int8_t *code, float scale, float minimum, const int has_minimum) {
    __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)code)));
    value = _mm512_mul_ps(_mm512_set1_ps(scale), value);
    return has_minimum ? _mm512_sub_ps(value, _mm512_set1_ps(minimum)) : value;
}
#endif

/* 16 columns. */
static inline void gguf_write_group(const int8_t *code, float scale, float minimum, uint16_t *out) {
#ifdef GGUF_AVX512
    __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)code)));
    value = _mm512_sub_ps(_mm512_mul_ps(_mm512_set1_ps(scale), value), _mm512_set1_ps(minimum));
    __m512i bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
    /* as `round_bf16`: half to even, and NaN stays NaN */
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    rounded = _mm512_srli_epi32(rounded, 16);
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((void *)out, _mm512_cvtepi32_epi16(rounded));
#else
    for (int i = 0; i < 16; i++) out[i] = round_bf16(scale * (float)code[i] - minimum);
#endif
}

/* 32 columns. Where scales are float16, every value is a multiple of 2^-24 and so no denormal number, which the processor's own rounding
   would take for zero. */
static inline __attribute__((always_inline)) void gguf_write_groups(const struct gguf_block *block, int at, const int group,
                                                                    const int has_minimum, const int is_f16, uint16_t *out) {
    const int8_t *code = block->code + at;
    const float *scale = block->scale, *minimum = block->minimum;
#if defined(GGUF_AVX512) && defined(__AVX512BF16__)
    if (is_f16) {
        __m512 low = gguf_values(code, scale[at / group], minimum[at / group], has_minimum);
        __m512 high = gguf_values(code + 16, scale[(at + 16) / group], minimum[(at + 16) / group], has_minimum);
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        return;
    }
#endif
    gguf_write_group(code, scale[at / group], minimum[at / group], out);
    gguf_write_group(code + 16, scale[(at + 16) / group], minimum[(at + 16) / group], out + 16);
}

/* Rows `row`.. and columns `column`.. of a matrix whose blocks of `size` columns take `bytes`. `group` columns share a
   scale. Inlined into each type, so that all numbers and the decoder are constants there. */
__attribute__((always_inline)) static inline void expand_gguf(
    const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t *out,
    int64_t stride, struct ahead ahead, int type, gguf_decode *decode, int size, int bytes, int group, int has_minimum, int is_f16) {
    int64_t row_bytes = m->columns / size * bytes;
    for (int64_t r = 0; r < rows; r++) {
        const uint8_t *stored = m->part[0] + (row + r) * row_bytes + column / size * bytes;
        uint16_t *target = out + r * stride;
        ask_ahead(&ahead, stored, (GGUF_LARGE / size * bytes + LINE_BYTES - 1) / LINE_BYTES);
        int64_t c = 0;
#ifdef HAS_QUICK_GGUF
        c = gguf_quick_row(type, stored, columns, target);
        stored += c / size * bytes;
#endif
        for (; c < columns; c += size, stored += bytes) {
            struct gguf_block block;
            decode(stored, &block);
            for (int i = 0; i < size; i += 32) gguf_write_groups(&block, i, group, has_minimum, is_f16, target + c + i);
        }
    }
}

/* --- codes of four bits ------------------------------------------------------------------------------------------ */

/* 16 bytes: their low and their high nibbles. */
static inline void gguf_split_16(const uint8_t *stored, int8_t *low, int8_t *high) {
#ifdef GGUF_AVX512
    __m128i both = _mm_loadu_si128((const void *)stored), mask = _mm_set1_epi8(15);
    _mm_storeu_si128((void *)low, _mm_and_si128(both, mask));
    _mm_storeu_si128((void *)high, _mm_and_si128(_mm_srli_epi16(both, 4), mask));
#else
    for (int i = 0; i < 16; i++) low[i] = stored[i] & 15, high[i] = stored[i] >> 4;
#endif
}

/* Low nibbles of a multiple of 16 bytes, then the high ones. */
static inline void gguf_split_nibbles(const uint8_t *stored, int8_t *code, int bytes) {
    for (int i = 0; i < bytes; i += 16) gguf_split_16(stored + i, code + i, code + bytes + i);
}

/* --- blocks of 32 columns ---------------------------------------------------------------------------------------- */

/* Columns 0-15 are the low nibbles of 16 bytes, columns 16-31 the high ones. */
static inline void gguf_low_then_high(const uint8_t *stored, int8_t *code) { gguf_split_16(stored, code, code + 16); }

/* In halves of 16, as they were stored: a wider load would wait for both stores to reach the cache. */
static inline void gguf_add_fifth_bits(const uint8_t *stored, int8_t *code) {
    for (int half = 0; half < 2; half++, code += 16) {
        uint16_t bits;
        memcpy(&bits, stored + 2 * half, 2);
#ifdef GGUF_AVX512
        __m128i low = _mm_loadu_si128((const void *)code);
        _mm_storeu_si128((void *)code, _mm_or_si128(low, _mm_maskz_set1_epi8(bits, 16)));
#else
        for (int i = 0; i < 16; i++) code[i] |= (bits >> i & 1) << 4;
#endif
    }
}

/* `columns` is a multiple of 16. */
static inline void gguf_add_to_codes(int8_t *code, int columns, int8_t offset) {
    for (int i = 0; i < columns; i += 16) {
#ifdef GGUF_AVX512
        __m128i sum = _mm_add_epi8(_mm_loadu_si128((const void *)(code + i)), _mm_set1_epi8(offset));
        _mm_storeu_si128((void *)(code + i), sum);
#else
        for (int j = i; j < i + 16; j++) code[j] += offset;
#endif
    }
}

static inline void gguf_decode_q4_0(const uint8_t *stored, struct gguf_block *block) {
    block->scale[0] = gguf_f16(stored), block->minimum[0] = 0;
    gguf_low_then_high(stored + 2, block->code);
    gguf_add_to_codes(block->code, 32, -8);
}

static inline void gguf_decode_q4_1(const uint8_t *stored, struct gguf_block *block) {
    block->scale[0] = gguf_f16(stored), block->minimum[0] = -gguf_f16(stored + 2);
    gguf_low_then_high(stored + 4, block->code);
}

static inline void gguf_decode_q5_0(const uint8_t *stored, struct gguf_block *block) {
    block->scale[0] = gguf_f16(stored), block->minimum[0] = 0;
    gguf_low_then_high(stored + 6, block->code);
    gguf_add_fifth_bits(stored + 2, block->code);
    gguf_add_to_codes(block->code, 32, -16);
}

static inline void gguf_decode_q5_1(const uint8_t *stored, struct gguf_block *block) {
    block->scale[0] = gguf_f16(stored), block->minimum[0] = -gguf_f16(stored + 2);
    gguf_low_then_high(stored + 8, block->code);
    gguf_add_fifth_bits(stored + 4, block->code);
}

static inline void gguf_decode_q8_0(const uint8_t *stored, struct gguf_block *block) {
    block->scale[0] = gguf_f16(stored), block->minimum[0] = 0;
    memcpy(block->code, stored + 2, 32);
}

/* Codes of FP4 (E2M1), doubled. */
static const int8_t GGUF_MXFP4_CODES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int8_t GGUF_IQ4_CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline void gguf_look_up(const int8_t *table, int8_t *code, int columns) {
#ifdef GGUF_AVX512
    __m128i wide = _mm_loadu_si128((const void *)table);
    for (int i = 0; i < columns; i += 16) {
        __m128i index = _mm_loadu_si128((const void *)(code + i));
        _mm_storeu_si128((void *)(code + i), _mm_shuffle_epi8(wide, index));
    }
#else
    for (int i = 0; i < columns; i++) code[i] = table[code[i]];
#endif
}

/* The scale is half of 2^(e - 127), because the codes are doubled; below e = 2 it is subnormal. */
static inline void gguf_decode_mxfp4(const uint8_t *stored, struct gguf_block *block) {
    uint32_t bits = stored[0] < 2 ? (uint32_t)0x00200000 << stored[0] : (uint32_t)(stored[0] - 1) << 23;
    memcpy(block->scale, &bits, 4);
    block->minimum[0] = 0;
    gguf_low_then_high(stored + 1, block->code);
    gguf_look_up(GGUF_MXFP4_CODES, block->code, 32);
}

static inline void gguf_decode_iq4_nl(const uint8_t *stored, struct gguf_block *block) {
    block->scale[0] = gguf_f16(stored), block->minimum[0] = 0;
    gguf_low_then_high(stored + 2, block->code);
    gguf_look_up(GGUF_IQ4_CODES, block->code, 32);
}


/* --- blocks of 256 columns --------------------------------------------------------------------------------------- */

static inline void gguf_decode_q2_k(const uint8_t *stored, struct gguf_block *block) {
    const uint8_t *low = stored + 16;
    float d = gguf_f16(stored + 80), dmin = gguf_f16(stored + 82);
    for (int g = 0; g < 16; g++) block->scale[g] = d * (stored[g] & 15), block->minimum[g] = dmin * (stored[g] >> 4);
    for (int half = 0; half < 2; half++)
        for (int shift = 0; shift < 4; shift++)
            for (int i = 0; i < 32; i++) block->code[128 * half + 32 * shift + i] = low[32 * half + i] >> 2 * shift & 3;
}

/* Scales have 6 bits: eight bytes hold the low four of all sixteen, four bytes the high two. A bit of the first 32
   bytes that is 0 takes 4 from its code. */
static inline void gguf_decode_q3_k(const uint8_t *stored, struct gguf_block *block) {
    const uint8_t *high = stored, *low = stored + 32, *scales = stored + 96;
    float d = gguf_f16(stored + 108);
    for (int g = 0; g < 16; g++) {
        int few = scales[g % 8] >> (g < 8 ? 0 : 4) & 15, many = scales[8 + g % 4] >> 2 * (g / 4) & 3;
        block->scale[g] = d * (float)((few | many << 4) - 32), block->minimum[g] = 0;
    }
    for (int part = 0; part < 8; part++)
        for (int i = 0; i < 32; i++)
            block->code[32 * part + i] =
                (low[32 * (part / 4) + i] >> 2 * (part % 4) & 3) - ((high[i] >> part & 1) ? 0 : 4);
}

/* Eight scales and eight minima of 6 bits in 12 bytes. */
static inline void gguf_scales_k4(const uint8_t *stored, struct gguf_block *block) {
    const uint8_t *s = stored + 4;
    float d = gguf_f16(stored), dmin = gguf_f16(stored + 2);
    for (int g = 0; g < 4; g++) {
        block->scale[g] = d * (s[g] & 63), block->minimum[g] = dmin * (s[g + 4] & 63);
        block->scale[g + 4] = d * ((s[g + 8] & 15) | (s[g] >> 6) << 4);
        block->minimum[g + 4] = dmin * ((s[g + 8] >> 4) | (s[g + 4] >> 6) << 4);
    }
}

static inline void gguf_decode_q4_k(const uint8_t *stored, struct gguf_block *block) {
    gguf_scales_k4(stored, block);
    for (int pair = 0; pair < 4; pair++) gguf_split_nibbles(stored + 16 + 32 * pair, block->code + 64 * pair, 32);
}

static inline void gguf_decode_q5_k(const uint8_t *stored, struct gguf_block *block) {
    gguf_scales_k4(stored, block);
    for (int pair = 0; pair < 4; pair++) gguf_split_nibbles(stored + 48 + 32 * pair, block->code + 64 * pair, 32);
    for (int part = 0; part < 8; part++)
        for (int i = 0; i < 32; i++) block->code[32 * part + i] |= (stored[16 + i] >> part & 1) << 4;
}

static inline void gguf_decode_q6_k(const uint8_t *stored, struct gguf_block *block) {
    const uint8_t *high = stored + 128;
    float d = gguf_f16(stored + 208);
    for (int g = 0; g < 16; g++) block->scale[g] = d * (float)(int8_t)stored[192 + g], block->minimum[g] = 0;
    for (int half = 0; half < 2; half++) {
        int8_t *code = block->code + 128 * half;
        gguf_split_nibbles(stored + 64 * half, code, 64);
        for (int part = 0; part < 4; part++)
            for (int i = 0; i < 32; i++) code[32 * part + i] |= (high[32 * half + i] >> 2 * part & 3) << 4;
    }
    gguf_add_to_codes(block->code, 256, -32);
}

static inline void gguf_decode_iq4_xs(const uint8_t *stored, struct gguf_block *block) {
    uint16_t high;
    float d = gguf_f16(stored);
    memcpy(&high, stored + 2, 2);
    for (int g = 0; g < 8; g++) {
        int low = stored[4 + g / 2] >> 4 * (g % 2) & 15;
        block->scale[g] = d * (float)((low | (high >> 2 * g & 3) << 4) - 32), block->minimum[g] = 0;
        gguf_low_then_high(stored + 8 + 16 * g, block->code + 32 * g);
    }
    gguf_look_up(GGUF_IQ4_CODES, block->code, 256);
}


/* --- the types ---------------------------------------------------------------------------------------------------- */

enum { NO_MINIMUM, MINIMUM };
enum { EXPONENT, F16 };

/* Number that GGUF files give it, name, columns and bytes of a block, columns that share a scale, whether there is a minimum, and
   what its scales are. */
#define GGUF_TYPES(TYPE)                        \
    TYPE(2, q4_0, 32, 18, 32, NO_MINIMUM, F16)  \
    TYPE(3, q4_1, 32, 20, 32, MINIMUM, F16)     \
    TYPE(6, q5_0, 32, 22, 32, NO_MINIMUM, F16)  \
    TYPE(7, q5_1, 32, 24, 32, MINIMUM, F16)     \
    TYPE(8, q8_0, 32, 34, 32, NO_MINIMUM, F16)  \
    TYPE(10, q2_k, 256, 84, 16, MINIMUM, F16)   \
    TYPE(11, q3_k, 256, 110, 16, NO_MINIMUM, F16) \
    TYPE(12, q4_k, 256, 144, 32, MINIMUM, F16)  \
    TYPE(13, q5_k, 256, 176, 32, MINIMUM, F16)  \
    TYPE(14, q6_k, 256, 210, 16, NO_MINIMUM, F16) \
    TYPE(20, iq4_nl, 32, 18, 32, NO_MINIMUM, F16) \
    TYPE(23, iq4_xs, 256, 136, 32, NO_MINIMUM, F16) \
    TYPE(39, mxfp4, 32, 17, 32, NO_MINIMUM, EXPONENT)

typedef void gguf_expander(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                           uint16_t *out, int64_t stride, struct ahead ahead);

#define EXPANDER(number, name, size, bytes, group, has_minimum, is_f16)                                          \
    static void expand_##name(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column,          \
                              int64_t columns, uint16_t *out, int64_t stride, struct ahead ahead) {             \
        expand_gguf(m, row, rows, column, columns, out, stride, ahead, number, gguf_decode_##name, size, bytes,  \
                    group, has_minimum, is_f16);                                                                 \
    }
GGUF_TYPES(EXPANDER)

/* NULL for what has no expander. */
static inline gguf_expander *gguf_expander_of(int type) {
#define EXPANDER_OF(number, name, size, bytes, group, has_minimum, is_f16) \
    case number: return expand_##name;
    switch (type) {
        GGUF_TYPES(EXPANDER_OF)
    default: return 0;
    }
}

/* Of a type that has an expander. */
static inline int64_t gguf_row_bytes(int type, int64_t columns) {
#define ROW_BYTES(number, name, size, bytes, group, has_minimum, is_f16) \
    case number: return columns / size * bytes;
    switch (type) {
        GGUF_TYPES(ROW_BYTES)
    default: return 0;
    }
}
