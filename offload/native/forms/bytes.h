/* Codes of eight bits: each weight is computed from its code and the scale of its group. */

#pragma once

#include "scales.h"

static inline float byte_value(int kind, uint8_t code) {
    switch (kind) {
    case E4M3: return float_of_e4m3(code);
    case INT8: return (int8_t)code;
    case OFFSET8: return code - 128;
    default: return code;
    }
}

#if defined(__AVX512BW__) && defined(__AVX512VL__)
static inline __m512 byte_values(int kind, const uint8_t *codes) {
    __m128i byte = _mm_loadu_si128((const __m128i *)codes);
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte));
    if (kind == OFFSET8) return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(byte), _mm512_set1_epi32(128)));
    if (kind != E4M3) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(byte));
    /* as the bits of a float16 its exponent is 8 too low; that conversion takes denormal numbers at full speed */
    __m256i code = _mm256_cvtepu8_epi16(byte);
    __m256i half = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(127)), 7),
                                   _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(128)), 8));
    __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
    __mmask16 is_nan = _mm_cmpeq_epi8_mask(_mm_and_si128(byte, _mm_set1_epi8(127)), _mm_set1_epi8(127));
    return _mm512_mask_mov_ps(value, is_nan, _mm512_set1_ps(NAN));
}
#endif

/* Columns `begin` to `end` of one row, all of one group. */
static inline void scale_bytes(const struct stored_matrix *m, const uint8_t *codes, int64_t begin, int64_t end,
                               float scale, float zero, uint16_t *out) {
    int kind = m->parameter[CODE_KIND];
    int64_t c = begin;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    for (; c + 16 <= end; c += 16) {
        __m512 value = byte_values(kind, codes + c);
        if (zero_kind(m) != ZERO_NONE) value = _mm512_sub_ps(value, _mm512_set1_ps(zero));
        _mm256_storeu_si256((__m256i *)(out + c - begin), round_products(m, _mm512_mul_ps(value, _mm512_set1_ps(scale))));
    }
#endif
    for (; c < end; c++) {
        float value = byte_value(kind, codes[c]);
        out[c - begin] = round_product(m, (zero_kind(m) == ZERO_NONE ? value : value - zero) * scale);
    }
}

/* Rows row .. row + rows - 1, columns column .. column + columns - 1 as bfloat16, rows `stride` elements apart. */
static void expand_bytes(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                         uint16_t *out, int64_t stride) {
    int64_t group = m->parameter[GROUP_COLUMNS], end = column + columns, across = scales_across(m);
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = m->part[CODES] + r * row_bytes(m);
        int64_t down = r / m->parameter[GROUP_ROWS];
        for (int64_t begin = column, stop; begin < end; begin = stop) {
            stop = (begin / group + 1) * group < end ? (begin / group + 1) * group : end;
            int64_t place = begin / group;
            float zero = zero_kind(m) == ZERO_NONE ? 0 : byte_value(m->parameter[CODE_KIND], zero_code_at(m, down, place));
            scale_bytes(m, codes, begin, stop, scale_at(m, down * across + place), zero, out + begin - column);
        }
    }
}
