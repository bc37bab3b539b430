/* Codes of two and three bits, and planes of signs that add to codes of two: each group of weights has a table of all numbers that its
   bits can mean, at most 32 of them, which the bits of a weight look up.

   The bits of a weight are its code, then a sign for each plane that is there. codes/levels.py defines the sum. */

#pragma once

#include "../ahead.h"
#include "quick_few_bits.h"
#include "scales.h"

static inline int code_bits(const struct stored_matrix *m) { return m->parameter[CODE_KIND] == OFFSET2 ? 2 : 3; }

static inline int num_planes(const struct stored_matrix *m) {
    int n = 0;
    while (n < MOST_PLANES && m->part[PLANES + n]) n++;
    return n;
}

static inline float float_at(const uint8_t *part, int64_t place) {
    uint16_t stored;
    memcpy(&stored, part + 2 * place, 2);
    return load_bf16(stored);
}

/* What each value of the bits means in the group at one place of the grid. */
static inline void fill_few_table(const struct stored_matrix *m, int bits, int planes, int64_t place, uint16_t table[MOST_FEW_VALUES]) {
    const int codes = 1 << bits;
    const float scale = float_at(m->part[SCALES], place), zero = zero_kind(m) == ZERO_FLOATS ? float_at(m->part[ZEROS], place) : 0;
    for (int index = 0; index < codes << planes; index++) {
        float sum = less_zero(m, (float)((index & (codes - 1)) - codes / 2), zero) * scale;
        if (is_sum(m)) sum = 0.0f + sum;
        for (int plane = 0; plane < planes; plane++) {
            float size = float_at(plane_scales(m, plane), place);
            sum += index & codes << plane ? size : -size;
        }
        table[index] = round_product(m, sum);
    }
}

/* The bits of one weight. */
static inline int few_bits_at(const struct stored_matrix *m, int bits, int planes, int64_t row, int64_t column) {
    const int64_t first = column * bits;
    const uint8_t *codes = m->part[CODES] + row * m->row_bytes + first / 8;
    /* a code of three bits may reach into the next byte, which is there then */
    int index = codes[0] >> first % 8;
    if (first % 8 + bits > 8) index |= codes[1] << (8 - first % 8);
    index &= (1 << bits) - 1;
    for (int plane = 0; plane < planes; plane++)
        index |= (m->part[PLANES + plane][row * sign_bytes(m) + column / 8] >> column % 8 & 1) << (bits + plane);
    return index;
}

/* Rows of columns that are all of one group. */
static inline __attribute__((always_inline)) void few_rows(const struct stored_matrix *m, const int bits, const int planes, int64_t row,
                                                           int64_t rows, int64_t column, int64_t columns, uint16_t *out, int64_t stride) {
#ifdef HAS_QUICK_FEW_BITS
    /* those of three bits are read two by two */
    const int64_t unit = bits == 3 ? 2 * FEW_COLUMNS : FEW_COLUMNS, pieces = column % unit == 0 ? columns / unit * unit / FEW_COLUMNS : 0;
    if (pieces) quick_few_rows(m, bits, planes, 1, pieces, row, rows, column, out, stride);
    column += pieces * FEW_COLUMNS, columns -= pieces * FEW_COLUMNS, out += pieces * FEW_COLUMNS;
    if (!columns) return;
#endif
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        uint16_t table[MOST_FEW_VALUES];
        fill_few_table(m, bits, planes, r * m->across + group_of(m, column), table);
        for (int64_t c = 0; c < columns; c++) out[c] = table[few_bits_at(m, bits, planes, r, column + c)];
    }
}

/* Rows row .. row + rows - 1, columns column .. column + columns - 1 as bfloat16, rows `stride` elements apart. */
static void expand_few_bits(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t *out,
                            int64_t stride) {
    const int kind = 10 * code_bits(m) + num_planes(m);
    for (int64_t begin = column, end = column + columns, stop; begin < end; out += stop - begin, begin = stop) {
        const int64_t group_end = (group_of(m, begin) + 1) * m->parameter[GROUP_COLUMNS];
        stop = group_end < end ? group_end : end;
        switch (kind) {
        case 20: few_rows(m, 2, 0, row, rows, begin, stop - begin, out, stride); break;
        case 21: few_rows(m, 2, 1, row, rows, begin, stop - begin, out, stride); break;
        case 22: few_rows(m, 2, 2, row, rows, begin, stop - begin, out, stride); break;
        case 23: few_rows(m, 2, 3, row, rows, begin, stop - begin, out, stride); break;
        default: few_rows(m, 3, 0, row, rows, begin, stop - begin, out, stride);
        }
    }
}

/* The next strip's codes, signs and numbers, a line of the cache for each row of a span; without those of this strip's next span, whose
   asking took longer than their waiting. Planes have half of the bytes of codes of two bits. */
static inline void ask_few_ahead(const struct stored_matrix *m, int planes, int64_t rows, struct ahead ahead) {
    const int64_t codes = ahead.next_strip - m->part[CODES], numbers = ahead.next_scales - m->part[SCALES];
    for (int64_t r = 0; r < rows; r++) __builtin_prefetch(ahead.next_strip + r * ahead.span_bytes, 0, 2);
    for (int plane = 0; plane < planes; plane++)
        for (int64_t r = 0; r < rows; r += 2) __builtin_prefetch(m->part[PLANES + plane] + (codes + r * ahead.span_bytes) / 2, 0, 2);
    if (!ahead.scale_bytes) return;
    __builtin_prefetch(m->part[SCALES] + numbers, 0, 2);
    if (zero_kind(m) == ZERO_FLOATS) __builtin_prefetch(m->part[ZEROS] + numbers, 0, 2);
    for (int plane = 0; plane < planes; plane++) __builtin_prefetch(plane_scales(m, plane) + numbers, 0, 2);
}

/* Rows of a span of a strip. */
static inline __attribute__((always_inline)) void expand_few_span(const struct stored_matrix *m, const int bits, const int planes, int64_t row,
                                                                  int64_t rows, int64_t column, int64_t columns, uint16_t *out,
                                                                  int64_t stride, struct ahead ahead) {
    ask_few_ahead(m, planes, rows, ahead);
#ifdef HAS_QUICK_FEW_BITS
    if (columns == FEW_SPAN && quick_span_of(bits, planes)(m, row, rows, column, out, stride)) return;
#endif
    expand_few_bits(m, row, rows, column, columns, out, stride);
}
