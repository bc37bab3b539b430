/* Codes of eight bits, 64 columns at a time, for AVX-512 with VBMI: E4M3 by a table of the 128 weights that a scale makes of them,
   integers by conversion. Only where every weight is a normal number; everything else is left to bytes.h. */

#pragma once

#include "../ahead.h"
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

/* 64 columns of one row, as two times 32 weights. Bytes are interleaved by eights, so that low and high ones join in the order of the
   columns. */
static inline void look_up_e4m3(const struct weight_table *table, const uint8_t *codes, __m512i weights[2]) {
    const __m512i by_eights = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    __m512i code = _mm512_permutexvar_epi64(by_eights, _mm512_loadu_si512(codes));
    __m512i low = _mm512_permutex2var_epi8(table->low[0], code, table->low[1]);
    __m512i high = _mm512_permutex2var_epi8(table->high[0], code, table->high[1]);
    high = _mm512_xor_si512(high, _mm512_and_si512(code, _mm512_set1_epi8((char)0x80)));
    weights[0] = _mm512_unpacklo_epi8(low, high);
    weights[1] = _mm512_unpackhi_epi8(low, high);
}

/* --- spans -------------------------------------------------------------------------------------------------------- */

/* How weights are made: one by one in bytes.h; by a table for rows that share a scale; by a table and an exponent for each 32 columns;
   from integers; from integers whose scale is that of 127. */
enum byte_way { ONE_BY_ONE, BY_TABLE, BY_EXPONENTS, FROM_INTEGERS, FROM_127THS };

struct byte_span {
    enum byte_way way;
    int64_t column, columns, place; /* `place`: the first scale of the span in its row of the grid */
    int64_t down;                   /* the group of rows that `table` is of */
    struct weight_table table;
};

static inline int is_one_group(const struct stored_matrix *m, int64_t column, int64_t columns) {
    return group_of(m, column) == group_of(m, column + columns - 1);
}

static inline enum byte_way byte_way(const struct stored_matrix *m, int64_t column, int64_t columns) {
    int scale = scale_kind(m), is_exponent = scale == SCALE_E8M0 || scale == SCALE_EXP2;
    if (!columns || zero_kind(m) != ZERO_NONE || product_kind(m) == PRODUCT_F16) return ONE_BY_ONE;
    if (product_kind(m) == PRODUCT_F127)
        return m->parameter[CODE_KIND] == INT8 && is_one_group(m, column, columns) ? FROM_127THS : ONE_BY_ONE;
    if (m->parameter[CODE_KIND] != E4M3) return is_one_group(m, column, columns) ? FROM_INTEGERS : ONE_BY_ONE;
    int is_each_32 = m->parameter[GROUP_COLUMNS] == 32 && m->parameter[GROUP_ROWS] == 1 && column % 32 == 0;
    if (is_exponent && is_each_32 && global_kind(m) == GLOBAL_NONE) return BY_EXPONENTS;
    return m->parameter[GROUP_ROWS] >= 8 && is_one_group(m, column, columns) ? BY_TABLE : ONE_BY_ONE;
}

/* The columns from `column` on that are expanded together: a multiple of 64 of them. */
static inline struct byte_span byte_span(const struct stored_matrix *m, int64_t column, int64_t columns) {
    columns = columns / 64 * 64;
    enum byte_way way = byte_way(m, column, columns);
    if (way == ONE_BY_ONE && columns) way = byte_way(m, column, columns = 64);
    struct byte_span span = {.way = way, .column = column, .columns = columns, .place = group_of(m, column), .down = -1};
    if (way == BY_EXPONENTS) span.table = weights_of_e4m3(1);
    return span;
}

static inline const uint8_t *codes_of(const struct stored_matrix *m, const struct byte_span *span, int64_t row) {
    return m->part[CODES] + row * m->row_bytes + span->column;
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

static inline int64_t table_rows(const struct stored_matrix *m, struct byte_span *span, int64_t row, int64_t rows, uint16_t *out,
                                 int64_t stride, struct ahead ahead) {
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = codes_of(m, span, r);
        ask_ahead(&ahead, codes, 2);
        if (down_of(m, r) != span->down) {
            float scale = scale_at(m, down_of(m, r) * m->across + span->place);
            if (!is_safe_scale(scale)) return r - row;
            span->table = weights_of_e4m3(scale);
            span->down = down_of(m, r);
        }
        for (int64_t c = 0; c < span->columns; c += 64) {
            __m512i weights[2];
            look_up_e4m3(&span->table, codes + c, weights);
            _mm512_storeu_si512(out + c, weights[0]);
            _mm512_storeu_si512(out + c + 32, weights[1]);
        }
    }
    return rows;
}

/* With these exponents every number of E4M3 (2^-9 to 448) is a normal number of bfloat16. */
static inline int is_usual_exponent(uint8_t exponent) { return exponent >= 10 && exponent <= 245; }

static inline int has_nan(const uint8_t *codes) {
    const __m512i all = _mm512_set1_epi8(127);
    return _mm512_cmpeq_epi8_mask(_mm512_and_si512(_mm512_loadu_si512(codes), all), all) != 0;
}

/* Weights of 32 columns raised by an exponent; zeros stay what they are. */
static inline __m512i raise_weights(__m512i weight, uint8_t exponent) {
    __mmask32 is_number = _mm512_test_epi16_mask(weight, _mm512_set1_epi16(0x7fff));
    return _mm512_mask_add_epi16(weight, is_number, weight, _mm512_set1_epi16((int16_t)((exponent - 127) * 128)));
}

static inline int64_t raised_rows(const struct stored_matrix *m, const struct byte_span *span, int64_t row, int64_t rows, uint16_t *out,
                                  int64_t stride, struct ahead ahead) {
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = codes_of(m, span, r), *exponents = m->part[SCALES] + r * m->across + span->place;
        ask_ahead(&ahead, codes, 2);
        for (int64_t c = 0; c < span->columns; c += 64, exponents += 2) {
            if (!is_usual_exponent(exponents[0]) || !is_usual_exponent(exponents[1]) || has_nan(codes + c)) return r - row;
            __m512i weights[2];
            look_up_e4m3(&span->table, codes + c, weights);
            _mm512_storeu_si512(out + c, raise_weights(weights[0], exponents[0]));
            _mm512_storeu_si512(out + c + 32, raise_weights(weights[1], exponents[1]));
        }
    }
    return rows;
}

static inline __attribute__((always_inline)) __m512 byte_numbers(const int kind, const uint8_t *codes) {
    __m128i byte = _mm_loadu_si128((const __m128i *)codes);
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte));
    __m512i code = _mm512_cvtepu8_epi32(byte);
    return _mm512_cvtepi32_ps(kind == OFFSET8 ? _mm512_sub_epi32(code, _mm512_set1_epi32(128)) : code);
}

static inline __attribute__((always_inline)) __m512 byte_products(const int kind, const int is_of_127, const uint8_t *codes, __m512 scale) {
    __m512 product = _mm512_mul_ps(byte_numbers(kind, codes), scale);
    return is_of_127 ? _mm512_mul_ps(product, _mm512_set1_ps(PART_OF_127)) : product;
}

static inline __attribute__((always_inline)) int64_t integer_rows(const int kind, const int is_of_127, const struct stored_matrix *m,
                                                                  const struct byte_span *span, int64_t row, int64_t rows, uint16_t *out,
                                                                  int64_t stride, struct ahead ahead) {
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = codes_of(m, span, r);
        float scale = scale_at(m, down_of(m, r) * m->across + span->place);
        ask_ahead(&ahead, codes, 2);
        if (!is_safe_scale(scale)) return r - row;
        __m512 factor = _mm512_set1_ps(scale);
        for (int64_t c = 0; c < span->columns; c += 32) {
            __m512 low = byte_products(kind, is_of_127, codes + c, factor), high = byte_products(kind, is_of_127, codes + c + 16, factor);
            _mm512_storeu_si512(out + c, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
    return rows;
}

/* Rows `row` on of a span; gives how many were done before one that is left to bytes.h. */
static inline int64_t quick_bytes(const struct stored_matrix *m, struct byte_span *span, int64_t row, int64_t rows, uint16_t *out,
                                  int64_t stride, struct ahead ahead) {
    switch (span->way) {
    case BY_TABLE: return table_rows(m, span, row, rows, out, stride, ahead);
    case BY_EXPONENTS: return raised_rows(m, span, row, rows, out, stride, ahead);
    case FROM_INTEGERS:
        return m->parameter[CODE_KIND] == INT8 ? integer_rows(INT8, 0, m, span, row, rows, out, stride, ahead)
                                               : integer_rows(m->parameter[CODE_KIND], 0, m, span, row, rows, out, stride, ahead);
    case FROM_127THS: return integer_rows(INT8, 1, m, span, row, rows, out, stride, ahead);
    default: return 0;
    }
}
#endif
