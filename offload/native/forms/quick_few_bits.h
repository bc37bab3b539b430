/* Codes of two and three bits and planes of signs for AVX-512, 32 columns of a row at a time.

   The tables of four groups are made together: a quarter of a register has the sums of one group for four codes, and each sign that
   planes may have makes another register of such quarters. */

#pragma once

#include "scales.h"

enum { MOST_FEW_VALUES = 4 << MOST_PLANES, FEW_COLUMNS = 32, FEW_SPAN = 256, PLANE_ALIGNMENT = 64 };

static inline int64_t sign_bytes(const struct stored_matrix *m) { return (m->columns + 7) / 8; }

/* The scales of a plane follow its signs, on a whole multiple of 64 bytes. */
static inline const uint8_t *plane_scales(const struct stored_matrix *m, int plane) {
    return m->part[PLANES + plane] + (m->rows * sign_bytes(m) + PLANE_ALIGNMENT - 1) / PLANE_ALIGNMENT * PLANE_ALIGNMENT;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_QUICK_FEW_BITS 1

enum { FEW_GROUPS = 4, FEW_SUMS = MOST_FEW_VALUES / 4 };

/* --- places ------------------------------------------------------------------------------------------------------- */

/* Which bytes the words of 32 columns are made of, and how far each is shifted to the right. */
struct few_places {
    uint8_t bytes[64];
    uint16_t shifts[FEW_COLUMNS];
};

/* Signs by the bit of a word that they are to stand at, codes of two bits at bit 1, and the first and second 32 codes of three bits. */
static struct few_places sign_places[MOST_PLANES + 2] __attribute__((aligned(64))), code_places __attribute__((aligned(64))),
    three_places[2] __attribute__((aligned(64)));

/* Bytes of float32 numbers whose upper halves are bfloat16, and of words for all pairs of codes. */
static uint8_t upper_halves[64] __attribute__((aligned(64))), pair_places[64] __attribute__((aligned(64)));

/* Every `step` bits for a word, from its bit `at` on. */
static void fill_words(struct few_places *p, int step, int at) {
    for (int k = 0; k < FEW_COLUMNS; k++) {
#ifdef __AVX512VBMI__
        p->bytes[2 * k] = p->bytes[2 * k + 1] = (uint8_t)((k * step - at) & 63);
#else
        p->bytes[2 * k] = 0x80;
        p->bytes[2 * k + 1] = (uint8_t)(k * step / 8);
        p->shifts[k] = (uint16_t)(8 + k * step % 8 - at);
#endif
    }
}

static __attribute__((constructor)) void fill_few_places(void) {
    for (int at = 0; at < MOST_PLANES + 2; at++) fill_words(&sign_places[at], 1, at);
    fill_words(&code_places, 2, 1);
    for (int second = 0; second < 2; second++)
        for (int k = 0; k < FEW_COLUMNS; k++) {
            three_places[second].bytes[2 * k] = (uint8_t)(3 * k / 8 + 4 * second);
            three_places[second].bytes[2 * k + 1] = (uint8_t)(3 * k / 8 + 4 * second + 1);
            three_places[second].shifts[k] = (uint16_t)(3 * k % 8);
        }
    for (int k = 0; k < 64; k++) {
        upper_halves[k] = (uint8_t)(k % 4 < 2 ? 0x80 : k / 16 * 2 + k % 2);
        pair_places[k] = (uint8_t)((k % 4 < 2 ? k / 4 % 4 : k / 16) * 4 + k % 2);
    }
}

/* --- tables ------------------------------------------------------------------------------------------------------- */

/* A bfloat16 number of each of four groups, as float32 in the four lanes of that group: `in_row` of them are neighbours, the next ones
   stand `step` bytes further on, as often as there are rows `left`. */
static inline __attribute__((always_inline)) __m512 few_numbers(const uint8_t *numbers, const int in_row, int64_t step, int64_t left) {
    uint64_t four = 0;
#pragma GCC unroll 4
    for (int k = 0; k < FEW_GROUPS / in_row; k++) {
        uint64_t some = 0;
        memcpy(&some, numbers + (k < left ? k : left - 1) * step, 2 * in_row);
        four |= some << 16 * in_row * k % 64;
    }
    /* from memory, because spreading them takes the unit that looks weights up */
    __asm__("" : "+m"(four));
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64((long long)four), _mm512_load_si512(upper_halves)));
}

static inline __attribute__((always_inline)) __m512 less_few(const struct stored_matrix *m, __m512 value, __m512 zero) {
    if (zero_kind(m) != ZERO_FLOATS) return value;
    value = _mm512_sub_ps(value, zero);
    if (product_kind(m) != PRODUCT_BF16) return value;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(round_products(m, value)), 16));
}

/* The upper halves of these are bfloat16. NaN stays NaN: the lower half of one that comes of bfloat16 numbers is 0. */
static inline __m512i round_few(__m512 sum) {
    __m512i bits = _mm512_castps_si512(sum);
    __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(bits, last), _mm512_set1_epi32(0x7fff));
}

/* What the bits of a weight mean in four groups, a quarter of a register each. Without planes, codes of two bits are words 2 c and
   2 c + 1, those of three bits words c. With planes, word 2 c + s is code c with sign s of the first plane; each sign of the others
   has registers of its own. */
static inline __attribute__((always_inline)) void few_tables(const struct stored_matrix *m, const int bits, const int planes, const int in_row,
                                                             int64_t place, int64_t left, __m512i *table) {
    const int firsts = bits - 1, sums = firsts << planes;
    const int64_t step = 2 * m->across;
    __m512 sum[FEW_SUMS], zero = _mm512_setzero_ps();
    if (zero_kind(m) == ZERO_FLOATS) zero = few_numbers(m->part[ZEROS] + 2 * place, in_row, step, left);
    const __m512 scale = few_numbers(m->part[SCALES] + 2 * place, in_row, step, left);
#pragma GCC unroll 2
    for (int k = 0; k < firsts; k++) {
        const int least = k - (1 << (bits - 1));
        __m512 value = _mm512_set4_ps((float)(3 * firsts + least), (float)(2 * firsts + least), (float)(firsts + least), (float)least);
        sum[k] = _mm512_mul_ps(less_few(m, value, zero), scale);
        if (is_sum(m)) sum[k] = _mm512_add_ps(_mm512_setzero_ps(), sum[k]);
    }
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) {
        const __m512 size = few_numbers(plane_scales(m, plane) + 2 * place, in_row, step, left);
#pragma GCC unroll 4
        for (int k = 0; k < 1 << plane; k++) {
            sum[k | 1 << plane] = _mm512_add_ps(sum[k], size);
            sum[k] = _mm512_sub_ps(sum[k], size);
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < sums; k += 2) {
        const __m512i even = round_few(sum[k]), odd = sums > 1 ? round_few(sum[k + 1]) : even;
        table[k / 2] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
    }
}

/* The table of one of the four, repeated until it fills a register; without planes, codes of two bits have one of pairs. */
static inline __attribute__((always_inline)) __m512i few_table(const int bits, const int planes, const __m512i *tables, int group) {
    const __m128i *quarter = (const __m128i *)tables + group;
    __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(quarter));
    if (bits == 2 && planes == 0) return _mm512_shuffle_epi8(table, _mm512_load_si512(pair_places));
    if (planes == 2) return _mm512_mask_broadcast_i32x4(table, 0xf0f0, _mm_load_si128(quarter + 4));
    if (planes == 3) {
        table = _mm512_mask_broadcast_i32x4(table, 0x00f0, _mm_load_si128(quarter + 4));
        table = _mm512_mask_broadcast_i32x4(table, 0x0f00, _mm_load_si128(quarter + 8));
        table = _mm512_mask_broadcast_i32x4(table, 0xf000, _mm_load_si128(quarter + 12));
    }
    return table;
}

/* --- look-up ------------------------------------------------------------------------------------------------------ */

/* Words of these bytes; what is above and below their bits does not matter. */
static inline __m512i few_words(const struct few_places *p, __m512i bytes) {
#ifdef __AVX512VBMI__
    return _mm512_multishift_epi64_epi8(_mm512_load_si512(p->bytes), bytes);
#else
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, _mm512_load_si512(p->bytes)), _mm512_load_si512(p->shifts));
#endif
}

static inline __m512i code_words(const uint8_t *from) {
    long long codes;
    memcpy(&codes, from, 8);
    return few_words(&code_places, _mm512_set1_epi64(codes));
}

static inline __m512i sign_words(const uint8_t *from, int at) {
    int32_t signs;
    memcpy(&signs, from, 4);
    return few_words(&sign_places[at], _mm512_set1_epi32(signs));
}

/* 32 codes of three bits as words. Of two times 32, the second are read with the four bytes before them, so that none after them is. */
static inline __m512i three_bits(const uint8_t *from, int is_second) {
    const struct few_places *p = &three_places[is_second];
    __m512i codes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(from - 4 * is_second)));
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(codes, _mm512_load_si512(p->bytes)), _mm512_load_si512(p->shifts));
}

/* 16 pairs of codes of two bits, each at the lowest bits of 32. */
static inline __m512i two_bits(const uint8_t *from) {
    int32_t first, second;
    memcpy(&first, from, 4);
    memcpy(&second, from + 4, 4);
    __m512i both = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, second);
    return _mm512_srlv_epi32(both, _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0));
}

/* The j-th 32 columns; of codes of three bits there are an even number. */
static inline __attribute__((always_inline)) __m512i few_weights(const int bits, const int planes, const uint8_t *codes, const uint8_t *const *signs,
                                                                 int64_t j, __m512i table) {
    if (bits == 3) return _mm512_permutexvar_epi16(three_bits(codes + 12 * j, j % 2), table);
    if (planes == 0) return _mm512_permutexvar_epi32(two_bits(codes + 8 * j), table);
    __m512i index = code_words(codes + 8 * j);
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) {
        const int at = plane ? plane + 2 : 0;
        const __m512i bit = _mm512_set1_epi16((short)(1 << at)), sign = sign_words(signs[plane] + 4 * j, at);
        index = _mm512_ternarylogic_epi32(bit, sign, index, 0xca); /* sign where bit is 1, else index */
    }
    return _mm512_permutexvar_epi16(index, table);
}

/* Rows whose columns belong to `in_row` groups, each of `pieces` times 32 columns. */
static inline __attribute__((always_inline)) void quick_few_rows(const struct stored_matrix *m, const int bits, const int planes, const int in_row,
                                                                 const int64_t pieces, int64_t row, int64_t rows, int64_t column, uint16_t *out,
                                                                 int64_t stride) {
    const int at_once = FEW_GROUPS / in_row;
    int64_t place = row * m->across + group_of(m, column);
    const uint8_t *codes = m->part[CODES] + row * m->row_bytes + column * bits / 8, *signs[MOST_PLANES];
#pragma GCC unroll 3
    for (int plane = 0; plane < planes; plane++) signs[plane] = m->part[PLANES + plane] + row * sign_bytes(m) + column / 8;
    for (int64_t left = rows; left > 0; left -= FEW_GROUPS) {
        __m512i tables[FEW_GROUPS][FEW_SUMS / 2];
#pragma GCC unroll 4
        for (int k = 0; k < in_row; k++) {
            if (k * at_once >= left) break;
            few_tables(m, bits, planes, in_row, place, left - k * at_once, tables[k]);
            place += at_once * m->across;
        }
        __asm__("" : "+m"(tables)); /* for the same reason */
#pragma GCC unroll 4
        for (int down = 0; down < FEW_GROUPS; down++) {
            if (down >= left) break;
#pragma GCC unroll 4
            for (int g = 0; g < in_row; g++) {
                const int k = down * in_row + g;
                const __m512i table = few_table(bits, planes, tables[k / FEW_GROUPS], k % FEW_GROUPS);
#pragma GCC unroll 8
                for (int64_t j = g * pieces; j < (g + 1) * pieces; j++)
                    _mm512_storeu_si512(out + j * FEW_COLUMNS, few_weights(bits, planes, codes, signs, j, table));
            }
            codes += m->row_bytes;
            out += stride;
#pragma GCC unroll 3
            for (int plane = 0; plane < planes; plane++) signs[plane] += sign_bytes(m);
        }
    }
}

/* Rows of a whole span whose groups have 64 or 128 columns, or one scale for all of it; 0 if it is left to few_bits.h. */
static inline __attribute__((always_inline)) int quick_few_span(const struct stored_matrix *m, const int bits, const int planes, int64_t row,
                                                                int64_t rows, int64_t column, uint16_t *out, int64_t stride) {
    enum { PIECES = FEW_SPAN / FEW_COLUMNS };
    if (m->shift == 7)
        quick_few_rows(m, bits, planes, 2, PIECES / 2, row, rows, column, out, stride);
    else if (m->shift == 6)
        quick_few_rows(m, bits, planes, 4, PIECES / 4, row, rows, column, out, stride);
    else if (m->shift > 7 || m->across == 1)
        quick_few_rows(m, bits, planes, 1, PIECES, row, rows, column, out, stride);
    else
        return 0;
    return 1;
}

/* One function for each number of bits and planes, for all orders of summation: compiling them takes long. */
#define QUICK_FEW_SPAN(bits, planes)                                                                                                   \
    static __attribute__((noinline)) int quick_span_##bits##_##planes(const struct stored_matrix *m, int64_t row, int64_t rows,        \
                                                                      int64_t column, uint16_t *out, int64_t stride) {                 \
        return quick_few_span(m, bits, planes, row, rows, column, out, stride);                                                        \
    }
QUICK_FEW_SPAN(2, 0)
QUICK_FEW_SPAN(2, 1)
QUICK_FEW_SPAN(2, 2)
QUICK_FEW_SPAN(2, 3)
QUICK_FEW_SPAN(3, 0)
#undef QUICK_FEW_SPAN

typedef int quick_span(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, uint16_t *out, int64_t stride);

static inline __attribute__((always_inline)) quick_span *quick_span_of(const int bits, const int planes) {
    return bits == 3 ? quick_span_3_0 : planes == 0 ? quick_span_2_0 : planes == 1 ? quick_span_2_1 : planes == 2 ? quick_span_2_2 : quick_span_2_3;
}
#endif
