/* Codes of four bits, up to 128 columns of a row at a time, for AVX-512 with VBMI: a table of two times 16 weights, as bytes, answers
   32 codes in one instruction.

   Scales are such that every weight is a normal number; everything else is left to nibbles.h. */

#pragma once

#include "../ahead.h"
#include "scales.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAS_QUICK_NIBBLES 1

enum { QUICK_COLUMNS = 128, WORDS = 32, SIXTEENTHS = QUICK_COLUMNS / 16 };

/* --- tables ------------------------------------------------------------------------------------------------------- */

/* Weights of 16 codes: their low bytes, then their high ones. */
struct byte_table {
    uint8_t low[16], high[16];
};

/* For each exponent: the weights of E2M1 codes. One table for each kind of scale that is an exponent, which differ in what 255
   means, and in how they make the largest and the smallest weights. */
static struct byte_table e2m1_tables[3][256] __attribute__((aligned(64)));

static __attribute__((constructor)) void fill_e2m1_tables(void) {
    for (int kind = 0; kind < 3; kind++)
        for (int e = 0; e < 256; e++)
            for (int code = 0; code < 16; code++) {
                uint16_t weight = round_bf16(NIBBLE_VALUES[E2M1][code] * exponent_factor(SCALE_E8M0 + kind) *
                                             scale_of_exponent(SCALE_E8M0 + kind, (uint8_t)e));
                e2m1_tables[kind][e].low[code] = (uint8_t)weight;
                e2m1_tables[kind][e].high[code] = (uint8_t)(weight >> 8);
            }
}

/* --- look-up ------------------------------------------------------------------------------------------------------ */

/* Where the words of 32 columns stand among bytes: what each place takes of 64 bytes of codes, how far to shift it, and which table
   it means. */
struct places {
    __m512i spread[4], shifts, first, second, halves, split;
};

static uint8_t spread_bytes_of[4][64] __attribute__((aligned(64))), split_bytes[64] __attribute__((aligned(64)));

static __attribute__((constructor)) void fill_places(void) {
    for (int k = 0; k < 64; k++) {
        for (int j = 0; j < 4; j++) spread_bytes_of[j][k] = (uint8_t)(16 * j + k / 4);
        split_bytes[k] = (uint8_t)(k / 32 * 32 + k % 16 * 2 + k / 16 % 2);
    }
}

static inline struct places find_places(int high_first) {
    struct places p = {.shifts = _mm512_set1_epi32(high_first ? 4 : 4 << 16),
                       .first = _mm512_set1_epi16(0x1000),
                       .second = _mm512_set1_epi16(0x3020),
                       .split = _mm512_load_si512(split_bytes)};
    p.halves = _mm512_mask_mov_epi32(p.first, 0xff00, p.second);
    for (int j = 0; j < 4; j++) p.spread[j] = _mm512_load_si512(spread_bytes_of[j]);
    return p;
}

/* The weights of 32 columns, which are the j-th of `codes`. */
static inline __m512i look_up_words(const struct places *p, int j, __m512i codes, __m512i which, __m512i table) {
    __m512i index = _mm512_srlv_epi16(_mm512_permutexvar_epi8(p->spread[j], codes), p->shifts);
    index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi8(15), which, 0xea); /* (index & 15) | which */
    return _mm512_permutexvar_epi8(index, table);
}

/* --- scales ------------------------------------------------------------------------------------------------------- */

/* Kinds that a compiler knows in the functions that it makes for what is usual. */
struct kinds {
    int scale, zero, global, product;
};

/* The columns that are expanded together, at most QUICK_COLUMNS of them, and what is the same for all rows. */
struct nibble_span {
    int64_t column, place; /* the first scale of the span in its row of the grid */
    int count;             /* of 32 columns */
    int per;               /* scales of QUICK_COLUMNS: 8, 4, 2 or 1; 0 if all is left to nibbles.h */
};

static inline int is_exponent(int scale) { return scale == SCALE_EXP2 || scale == SCALE_LDEXP || scale == SCALE_E8M0; }

/* The tables of E2M1 with an exponent for each 32 columns, else NULL. */
static inline const struct byte_table *exponent_tables(const struct stored_matrix *m) {
    int is_usual_product = product_kind(m) != PRODUCT_F16 && product_kind(m) != PRODUCT_F127;
    int is_alone = zero_kind(m) == ZERO_NONE && global_kind(m) == GLOBAL_NONE && is_usual_product;
    int is_usual = m->parameter[CODE_KIND] == E2M1 && m->parameter[GROUP_COLUMNS] == WORDS && m->parameter[GROUP_ROWS] == 1;
    return is_alone && is_usual && is_exponent(scale_kind(m)) ? e2m1_tables[scale_kind(m) - SCALE_E8M0] : NULL;
}

static inline int scales_per_span(const struct stored_matrix *m, int64_t column, int64_t columns) {
    int64_t group = m->parameter[GROUP_COLUMNS];
    if (columns < WORDS || is_exponent(scale_kind(m)) || zero_kind(m) == ZERO_FLOATS || product_kind(m) == PRODUCT_F127) return 0;
    if (group_of(m, column) == group_of(m, column + columns - 1)) return 1;
    return (group == 16 || group == 32 || group == 64) && column % group == 0 ? QUICK_COLUMNS / (int)group : 0;
}

static inline struct nibble_span nibble_span(const struct stored_matrix *m, int64_t column, int64_t columns) {
    int count = columns < QUICK_COLUMNS ? (int)(columns / WORDS) : QUICK_COLUMNS / WORDS, per = scales_per_span(m, column, count * WORDS);
    return (struct nibble_span){column, group_of(m, column), count, per};
}

/* `count` scales from one place of the grid on; whether every product with a code's value is a normal number. */
static inline __attribute__((always_inline)) int load_scales(const struct stored_matrix *m, const struct kinds kinds, int64_t place, int count,
                                                             float *out) {
    const uint8_t *from = m->part[SCALES];
    const __mmask8 mask = (__mmask8)((1u << count) - 1);
    __m256 scale;
    switch (kinds.scale) {
    case SCALE_F32: scale = _mm256_maskz_loadu_ps(mask, from + 4 * place); break;
    case SCALE_BF16: scale = (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_maskz_loadu_epi16(mask, from + 2 * place)), 16); break;
    case SCALE_F16: scale = _mm256_cvtph_ps(_mm_maskz_loadu_epi16(mask, from + 2 * place)); break;
    default: scale = _mm256_i32gather_ps(e4m3_floats, _mm256_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from + place)), 4); /* SCALE_E4M3 */
    }
    if (kinds.global != GLOBAL_NONE) {
        float common;
        memcpy(&common, m->part[GLOBAL], 4);
        __m256 all = _mm256_set1_ps(common);
        scale = kinds.global == GLOBAL_MULTIPLIES ? _mm256_mul_ps(scale, all) : _mm256_div_ps(scale, all);
    }
    _mm256_store_ps(out, scale);
    /* each is spread over a register from memory: a shuffle takes the unit that looks weights up */
    __asm__("" : "+m"(*(float(*)[SIXTEENTHS])out));
    /* exponents from 2^-100 on, below 2^100; without a sign, which is shifted out */
    __m256i bits = _mm256_sub_epi32(_mm256_slli_epi32(_mm256_castps_si256(scale), 1), _mm256_set1_epi32(27 << 24));
    return (_mm256_cmplt_epu32_mask(bits, _mm256_set1_epi32((int)(200u << 24))) & mask) == mask;
}

static inline __attribute__((always_inline)) __m512 products(const struct kinds kinds, __m512 values, float zero, float scale) {
    if (kinds.zero != ZERO_NONE) values = _mm512_sub_ps(values, _mm512_set1_ps(zero));
    __m512 product = _mm512_mul_ps(values, _mm512_set1_ps(scale));
    return kinds.product == PRODUCT_F16 ? _mm512_cvtph_ps(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT)) : product;
}

/* The codes of `count` times 32 columns. */
static inline __attribute__((always_inline)) __m512i load_codes(const uint8_t *codes, const int count) {
    return count == 4 ? _mm512_loadu_si512(codes) : _mm512_maskz_loadu_epi8(~0ull >> (64 - 16 * count), codes);
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

/* Tables for two groups: the weights of the first, then those of the second. */
static inline __attribute__((always_inline)) __m512i two_tables(const struct kinds kinds, const struct places *p, __m512 values,
                                                                const float *scale, const float *zero, int first, int second) {
    __m512 low = products(kinds, values, zero[first], scale[first]);
    __m512 high = first == second ? low : products(kinds, values, zero[second], scale[second]);
    return _mm512_permutexvar_epi8(p->split, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

/* One row of a span; 0 if it is left to nibbles.h. */
static inline __attribute__((always_inline)) int scaled_row(const struct stored_matrix *m, const struct kinds kinds, const int per, const int count,
                                                            const struct nibble_span *span, const struct places *p, __m512i codes,
                                                            int64_t down, const float *values, uint16_t *out) {
    const int scales = per > 1 ? (count * per + 3) / 4 : 1;
    float scale[SIXTEENTHS] __attribute__((aligned(32))), zero[SIXTEENTHS] = {0};
    if (!load_scales(m, kinds, down * m->across + span->place, scales, scale)) return 0;
    if (kinds.zero != ZERO_NONE)
        for (int g = 0; g < scales; g++) zero[g] = values[zero_code_at(m, down, span->place + g)];
    const __m512 value = _mm512_loadu_ps(values);
    __m512i table = _mm512_setzero_si512();
    if (per == 1) table = two_tables(kinds, p, value, scale, zero, 0, 0);
    if (per == 2) table = two_tables(kinds, p, value, scale, zero, 0, 1);
#pragma GCC unroll 4
    for (int j = 0; j < count; j++) {
        if (per == 4 && j % 2 == 0) table = two_tables(kinds, p, value, scale, zero, j, j + 1);
        if (per == 8) table = two_tables(kinds, p, value, scale, zero, 2 * j, 2 * j + 1);
        const int is_second = per == 2 ? j / 2 : per == 4 ? j % 2 : 0;
        __m512i which = per == 8 ? p->halves : is_second ? p->second : p->first;
        _mm512_storeu_si512(out + j * WORDS, look_up_words(p, j, codes, which, table));
    }
    return 1;
}

static inline __attribute__((always_inline)) int64_t scaled_rows(const struct stored_matrix *m, const struct kinds kinds, const int per, const int count,
                                                                 const struct nibble_span *span, const float *values, int64_t row,
                                                                 int64_t rows, uint16_t *out, int64_t stride, struct ahead ahead) {
    const struct places p = find_places(is_high_first(m));
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *line = m->part[CODES] + r * m->row_bytes + span->column / 2;
        ask_ahead(&ahead, line, 1);
        if (!scaled_row(m, kinds, per, count, span, &p, load_codes(line, count), down_of(m, r), values, out)) return r - row;
    }
    return rows;
}

/* E2M1 with an exponent for each 32 columns, `count` times 32 columns: tables are there for every exponent. */
static inline __attribute__((always_inline)) void exponent_rows(const struct stored_matrix *m, const struct byte_table *tables, int64_t row,
                                                                int64_t rows, int64_t column, const int count, uint16_t *out,
                                                                int64_t stride, struct ahead ahead) {
    const struct places p = find_places(is_high_first(m));
    const uint8_t *codes = m->part[CODES] + row * m->row_bytes + column / 2;
    const uint8_t *exponents = m->part[SCALES] + row * m->across + column / WORDS;
    for (int64_t r = 0; r < rows; r++, codes += m->row_bytes, exponents += m->across, out += stride) {
        ask_ahead(&ahead, codes, 1);
        __m512i line = load_codes(codes, count);
#pragma GCC unroll 4
        for (int j = 0; j < count; j++) {
            __m512i table = _mm512_castsi256_si512(_mm256_load_si256((const __m256i *)(tables + exponents[j])));
            _mm512_storeu_si512(out + j * WORDS, look_up_words(&p, j, line, p.first, table));
        }
    }
}

/* Rows `row` on of a span; gives how many were done before one that is left to nibbles.h. */
static int64_t quick_nibbles(const struct stored_matrix *m, const struct nibble_span *span, const float *values, int64_t row, int64_t rows,
                             uint16_t *out, int64_t stride, struct ahead ahead) {
    const struct kinds kinds = {scale_kind(m), zero_kind(m), global_kind(m), product_kind(m)};
    if (!span->per) return 0;
#define ROWS_OF(scale, zero, global, product, per, count) \
    scaled_rows(m, (struct kinds){scale, zero, global, product}, per, count, span, values, row, rows, out, stride, ahead)
#define ROWS(scale, zero, global, product, per) ROWS_OF(scale, zero, global, product, per, QUICK_COLUMNS / WORDS)
    if (span->count * WORDS < QUICK_COLUMNS) return ROWS_OF(kinds.scale, kinds.zero, kinds.global, kinds.product, span->per, span->count);
    /* what is usual, known to the compiler: int4 with a scale for each 32 columns, or for 128 and more; NVFP4; GPTQ and AWQ */
    if (kinds.zero == ZERO_NONE && kinds.product != PRODUCT_F16 && kinds.global == GLOBAL_NONE && kinds.scale == SCALE_BF16) {
        if (span->per == 4) return ROWS(SCALE_BF16, ZERO_NONE, GLOBAL_NONE, PRODUCT_F32, 4);
        if (span->per == 1) return ROWS(SCALE_BF16, ZERO_NONE, GLOBAL_NONE, PRODUCT_F32, 1);
    }
    if (kinds.zero == ZERO_NONE && kinds.product != PRODUCT_F16 && kinds.scale == SCALE_E4M3 && span->per == 8)
        return ROWS(SCALE_E4M3, ZERO_NONE, kinds.global, PRODUCT_F32, 8);
    if (kinds.scale == SCALE_F16 && kinds.global == GLOBAL_NONE && span->per == 1)
        return ROWS(SCALE_F16, kinds.zero, GLOBAL_NONE, kinds.product, 1);
    return ROWS(kinds.scale, kinds.zero, kinds.global, kinds.product, span->per);
#undef ROWS
#undef ROWS_OF
}
#endif
