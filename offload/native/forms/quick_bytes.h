/* Codes of eight bits, 64 columns at a time, for AVX-512: E4M3 by a table of the 128 weights that a scale makes of them, integers
   by conversion. Only where every weight is a normal number; everything else is left to bytes.h. */

#pragma once

#include "scales.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAS_QUICK_BYTES 1

/* Low and high bytes of the weights of codes 0 to 127; codes 128 to 255 have the other sign. */
struct weight_table {
    __m512i low[2], high[2];
};

static inline int is_safe_scale(float scale) { return fabsf(scale) > 0x1p-100f && fabsf(scale) < 0x1p100f; }

static inline __m512 e4m3_products(int place, float scale) {
    return _mm512_mul_ps(_mm512_loadu_ps(e4m3_floats + place), _mm512_set1_ps(scale));
}

static inline struct weight_table weights_of_e4m3(float scale) {
    __m512i every = _mm512_setzero_si512(), odd;
    for (int k = 0; k < 64; k++) ((uint8_t *)&every)[k] = (uint8_t)(2 * k);
    odd = _mm512_add_epi8(every, _mm512_set1_epi8(1));
    struct weight_table table;
    for (int half = 0; half < 2; half++) {
        int at = 64 * half;
        __m512i first = (__m512i)_mm512_cvtne2ps_pbh(e4m3_products(at + 16, scale), e4m3_products(at, scale));
        __m512i second = (__m512i)_mm512_cvtne2ps_pbh(e4m3_products(at + 48, scale), e4m3_products(at + 32, scale));
        table.low[half] = _mm512_permutex2var_epi8(first, every, second);
        table.high[half] = _mm512_permutex2var_epi8(first, odd, second);
    }
    return table;
}

/* 64 columns of one row. Bytes are interleaved by eights, so that low and high ones join in the order of the columns. */
static inline void look_up_e4m3(const struct weight_table *table, const uint8_t *codes, uint16_t *out) {
    const __m512i by_eights = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i code = _mm512_permutexvar_epi64(by_eights, _mm512_loadu_si512(codes));
    __m512i low = _mm512_permutex2var_epi8(table->low[0], code, table->low[1]);
    __m512i high = _mm512_permutex2var_epi8(table->high[0], code, table->high[1]);
    high = _mm512_xor_si512(high, _mm512_and_si512(code, _mm512_set1_epi8((char)0x80)));
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, high));
}

/* Rows that share one scale: one table serves them all. */
static int64_t quick_e4m3(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, uint16_t *out, int64_t stride) {
    int64_t place = group_of(m, column), before = -1;
    struct weight_table table;
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        int64_t down = down_of(m, r);
        if (down != before) {
            float scale = scale_at(m, down * m->across + place);
            if (!is_safe_scale(scale)) return r - row;
            table = weights_of_e4m3(scale);
        }
        before = down;
        look_up_e4m3(&table, m->part[CODES] + r * m->row_bytes + column, out);
    }
    return rows;
}

static inline __m512 byte_numbers(int kind, const uint8_t *codes) {
    __m128i byte = _mm_loadu_si128((const __m128i *)codes);
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte));
    __m512i code = _mm512_cvtepu8_epi32(byte);
    return _mm512_cvtepi32_ps(kind == OFFSET8 ? _mm512_sub_epi32(code, _mm512_set1_epi32(128)) : code);
}

/* Integers, or E4M3 with a scale for each row: computed, not looked up. */
static int64_t quick_integers(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, uint16_t *out, int64_t stride) {
    int64_t place = group_of(m, column), kind = m->parameter[CODE_KIND];
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = m->part[CODES] + r * m->row_bytes + column;
        float scale = scale_at(m, down_of(m, r) * m->across + place);
        if (!is_safe_scale(scale)) return r - row;
        for (int c = 0; c < 64; c += 32) {
            __m512 low = _mm512_mul_ps(byte_numbers((int)kind, codes + c), _mm512_set1_ps(scale));
            __m512 high = _mm512_mul_ps(byte_numbers((int)kind, codes + c + 16), _mm512_set1_ps(scale));
            _mm512_storeu_si512(out + c, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
    return rows;
}

/* 64 columns of rows `row` on, all of one group of columns; gives how many rows were done before one that is left to bytes.h. */
static int64_t quick_bytes(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, uint16_t *out, int64_t stride) {
    if (zero_kind(m) != ZERO_NONE || product_kind(m) == PRODUCT_F16 || group_of(m, column) != group_of(m, column + 63)) return 0;
    if (m->parameter[CODE_KIND] != E4M3) return quick_integers(m, row, rows, column, out, stride);
    return m->parameter[GROUP_ROWS] >= 8 ? quick_e4m3(m, row, rows, column, out, stride) : 0;
}
#endif
