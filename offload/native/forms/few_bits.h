/* Codes of two and three bits, and planes of signs that add to them: each group of weights has a table of all numbers that its bits can
   mean, at most 32 of them, which the bits of a weight look up.

   The bits of a weight are its code, then a sign for each plane that is there. codes/levels.py defines the sum. */

#pragma once

#include "../ahead.h"
#include "scales.h"

enum { FEW_VALUES = 1 << (3 + MOST_PLANES), FEW_COLUMNS = 32, FEW_SPAN = 128, PLANE_ALIGNMENT = 64 };

static inline int code_bits(const struct stored_matrix *m) { return m->parameter[CODE_KIND] == OFFSET2 ? 2 : 3; }

static inline int num_planes(const struct stored_matrix *m) {
    int n = 0;
    while (n < MOST_PLANES && m->part[PLANES + n]) n++;
    return n;
}

static inline int64_t sign_bytes(const struct stored_matrix *m) { return (m->columns + 7) / 8; }

/* The scales of a plane follow its signs, on a whole multiple of 64 bytes. */
static inline const uint8_t *plane_scales(const struct stored_matrix *m, int plane) {
    return m->part[PLANES + plane] + (m->rows * sign_bytes(m) + PLANE_ALIGNMENT - 1) / PLANE_ALIGNMENT * PLANE_ALIGNMENT;
}

static inline float float_at(const uint8_t *part, int64_t place) {
    uint16_t stored;
    memcpy(&stored, part + 2 * place, 2);
    return load_bf16(stored);
}

/* What each value of the bits means in the group at one place of the grid. */
static inline void few_table(const struct stored_matrix *m, int planes, int64_t place, uint16_t table[FEW_VALUES]) {
    const int bits = code_bits(m), codes = 1 << bits;
    const float scale = float_at(m->part[SCALES], place), zero = zero_kind(m) == ZERO_FLOATS ? float_at(m->part[ZEROS], place) : 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const int halves = (codes << planes) > 16 ? 2 : 1;
    for (int half = 0; half < halves; half++) {
        __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(16 * half));
        __m512i code = _mm512_sub_epi32(_mm512_and_si512(index, _mm512_set1_epi32(codes - 1)), _mm512_set1_epi32(codes / 2));
        __m512 value = _mm512_cvtepi32_ps(code);
        if (zero_kind(m) == ZERO_FLOATS) value = _mm512_sub_ps(value, _mm512_set1_ps(zero));
        __m512 sum = _mm512_mul_ps(value, _mm512_set1_ps(scale));
        if (is_sum(m)) sum = _mm512_add_ps(_mm512_setzero_ps(), sum);
        for (int plane = 0; plane < planes; plane++) {
            float size = float_at(plane_scales(m, plane), place);
            __mmask16 is_up = _mm512_test_epi32_mask(index, _mm512_set1_epi32(codes << plane));
            sum = _mm512_add_ps(sum, _mm512_mask_blend_ps(is_up, _mm512_set1_ps(-size), _mm512_set1_ps(size)));
        }
        _mm256_storeu_si256((__m256i *)(table + 16 * half), round_products(m, sum));
    }
#else
    for (int index = 0; index < codes << planes; index++) {
        float value = (float)((index & (codes - 1)) - codes / 2);
        float sum = (zero_kind(m) == ZERO_FLOATS ? value - zero : value) * scale;
        if (is_sum(m)) sum = 0.0f + sum;
        for (int plane = 0; plane < planes; plane++) {
            float size = float_at(plane_scales(m, plane), place);
            sum += index & codes << plane ? size : -size;
        }
        table[index] = round_product(m, sum);
    }
#endif
}

/* The bits of one weight. */
static inline int few_bits_at(const struct stored_matrix *m, int planes, int64_t row, int64_t column) {
    const int bits = code_bits(m);
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

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VBMI__)
#define HAS_QUICK_FEW_BITS 1

/* Where 32 codes stand among their bytes: which bytes each eight lanes take, and how far to shift them for each lane. */
struct few_places {
    __m512i spread, shifts, codes;
};

static inline struct few_places few_places(int bits) {
    uint8_t spread[64], shifts[64];
    for (int k = 0; k < 64; k++) {
        int first = k / 8 * 4 * bits; /* bits before the four codes of this lane of 64 */
        spread[k] = (uint8_t)(first / 8 + k % 8);
        shifts[k] = (uint8_t)(first % 8 + k % 8 / 2 * bits);
    }
    return (struct few_places){_mm512_loadu_si512(spread), _mm512_loadu_si512(shifts), _mm512_set1_epi16((short)((1 << bits) - 1))};
}

/* 32 columns of one row, all of one group. */
static inline void few_columns(const struct stored_matrix *m, const struct few_places *p, int planes, int64_t row, int64_t column,
                               const uint16_t table[FEW_VALUES], uint16_t *out) {
    const int bits = code_bits(m);
    __m512i codes = _mm512_maskz_loadu_epi8((1ull << 4 * bits) - 1, m->part[CODES] + row * m->row_bytes + column * bits / 8);
    __m512i index = _mm512_multishift_epi64_epi8(p->shifts, _mm512_permutexvar_epi8(p->spread, codes));
    index = _mm512_and_si512(index, p->codes);
    for (int plane = 0; plane < planes; plane++) {
        uint32_t signs;
        memcpy(&signs, m->part[PLANES + plane] + row * sign_bytes(m) + column / 8, 4);
        index = _mm512_or_si512(index, _mm512_maskz_set1_epi16(signs, (short)(1 << (bits + plane))));
    }
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, _mm512_loadu_si512(table)));
}
#endif

/* One row of some columns, group by group. */
static inline void few_row(const struct stored_matrix *m, int planes, int64_t row, int64_t column, int64_t columns, uint16_t *out) {
    int64_t end = column + columns;
#ifdef HAS_QUICK_FEW_BITS
    const struct few_places p = few_places(code_bits(m));
#endif
    for (int64_t begin = column, stop; begin < end; begin = stop) {
        uint16_t table[FEW_VALUES] __attribute__((aligned(64)));
        int64_t group = group_of(m, begin), group_end = (group + 1) * m->parameter[GROUP_COLUMNS], c = begin;
        stop = group_end < end ? group_end : end;
        few_table(m, planes, row * m->across + group, table);
#ifdef HAS_QUICK_FEW_BITS
        for (; c % FEW_COLUMNS == 0 && c + FEW_COLUMNS <= stop; c += FEW_COLUMNS)
            few_columns(m, &p, planes, row, c, table, out + c - column);
#endif
        for (; c < stop; c++) out[c - column] = table[few_bits_at(m, planes, row, c)];
    }
}

/* Rows row .. row + rows - 1, columns column .. column + columns - 1 as bfloat16, rows `stride` elements apart. */
static void expand_few_bits(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t *out,
                            int64_t stride, struct ahead ahead) {
    const int planes = num_planes(m);
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        ask_ahead(&ahead, m->part[CODES] + r * m->row_bytes + column * code_bits(m) / 8, 1);
        /* the same columns of the next strip's planes, which the processor does not follow by itself */
        for (int plane = 0; plane < planes; plane++)
            __builtin_prefetch(m->part[PLANES + plane] + (r + FEW_COLUMNS) * sign_bytes(m) + column / 8, 0, 2);
        few_row(m, planes, r, column, columns, out);
    }
}
