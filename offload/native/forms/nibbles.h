/* Codes of four bits: each group of weights has a table of sixteen bfloat16 numbers, which its codes look up. */

#pragma once

#include "quick_nibbles.h"
#include "scales.h"

/* The sixteen weights that codes of the group at (down, across) of the grid can have. */
static inline void nibble_table(const struct stored_matrix *m, int64_t down, int64_t across, uint16_t table[16]) {
    const float *values = NIBBLE_VALUES[m->parameter[CODE_KIND]];
    float scale = scale_at(m, down * m->across + across), factor = value_factor(m);
    float zero = is_zero_code(m) ? values[zero_code_at(m, down, across)] : zero_number_at(m, down, across);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __m512 value = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_set1_ps(factor));
    value = less_zeros(m, value, zero);
    _mm256_storeu_si256((__m256i *)table, round_products(m, _mm512_mul_ps(value, _mm512_set1_ps(scale))));
#else
    for (int k = 0; k < 16; k++) table[k] = round_product(m, less_zero(m, values[k] * factor, zero) * scale);
#endif
}

/* Columns `begin` to `end` of one row, all of one group. */
static inline void look_up(const uint16_t table[16], const uint8_t *codes, int64_t begin, int64_t end, int high_first,
                           uint16_t *out) {
    int64_t c = begin;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    __m256i entries = _mm256_loadu_si256((const __m256i *)table);
    for (; c % 2 == 0 && c + 16 <= end; c += 16) {
        __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(codes + c / 2)));
        __m256i index = high_first ? _mm256_or_si256(_mm256_srli_epi32(byte, 4), _mm256_slli_epi32(byte, 16))
                                   : _mm256_or_si256(byte, _mm256_slli_epi32(byte, 12));
        index = _mm256_and_si256(index, _mm256_set1_epi32(0x000f000f));
        _mm256_storeu_si256((__m256i *)(out + c - begin), _mm256_permutexvar_epi16(index, entries));
    }
#endif
    for (; c < end; c++) out[c - begin] = table[codes[c / 2] >> ((c % 2 != high_first) ? 4 : 0) & 15];
}

static void look_up_rows(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t *out,
                         int64_t stride) {
    int64_t group = m->parameter[GROUP_COLUMNS], end = column + columns;
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = m->part[CODES] + r * m->row_bytes;
        for (int64_t begin = column, stop; begin < end; begin = stop) {
            uint16_t table[16];
            stop = (begin / group + 1) * group < end ? (begin / group + 1) * group : end;
            nibble_table(m, down_of(m, r), begin / group, table);
            look_up(table, codes, begin, stop, is_high_first(m), out + begin - column);
        }
    }
}

#ifdef HAS_QUICK_NIBBLES
/* Rows of a span; those that are left are looked up one by one. */
static void expand_nibble_span(const struct stored_matrix *m, const struct nibble_span *span, int64_t row, int64_t rows, uint16_t *out,
                               int64_t stride, struct ahead ahead) {
    const float *values = NIBBLE_VALUES[m->parameter[CODE_KIND]];
    for (int64_t done = 0; done < rows; done++) {
        done += quick_nibbles(m, span, values, row + done, rows - done, out + done * stride, stride, ahead);
        if (done < rows) look_up_rows(m, row + done, 1, span->column, span->count * WORDS, out + done * stride, stride);
    }
}
#endif

/* Rows row .. row + rows - 1, columns column .. column + columns - 1 as bfloat16, rows `stride` elements apart. */
static void expand_nibbles(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                           uint16_t *out, int64_t stride) {
#ifdef HAS_QUICK_NIBBLES
    const struct byte_table *tables = exponent_tables(m);
    for (; tables && column % WORDS == 0 && columns >= WORDS; column += WORDS, columns -= WORDS, out += WORDS)
        exponent_rows(m, tables, row, rows, column, 1, out, stride, nothing_ahead(m->part[CODES]));
    for (int64_t some; columns >= WORDS; column += some, columns -= some, out += some) {
        const struct nibble_span span = nibble_span(m, column, columns);
        if (!span.per) break;
        some = span.count * WORDS;
        expand_nibble_span(m, &span, row, rows, out, stride, nothing_ahead(m->part[CODES]));
    }
#endif
    if (columns) look_up_rows(m, row, rows, column, columns, out, stride);
}
