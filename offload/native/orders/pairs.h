/* The order of summation of AVX512_BF16, which is that of oneDNN's products there: pairs of columns from left to right, one sum
   for each output, a fresh one every `block` columns; the sums of the blocks are added in order.

   The rows of a strip are lanes. A row of x has the same sums however many others are multiplied with it. */

#pragma once

#include "inputs.h"
#include "../strips.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
int expertier_has_pairs(void) { return 1; }

enum { LANES = 16, MOST_AT_ONCE = 8, AHEAD_COLUMNS = 4 * CHUNK };

/* 16 bytes of each of 16 rows: rows 0, 4, 8 and 12 from `w` on. */
static inline __m512i four_rows(const uint16_t *w, int64_t stride) {
    __m512i rows = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)w));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x00f0, _mm_loadu_si128((const __m128i *)(w + 4 * stride)));
    rows = _mm512_mask_broadcast_i32x4(rows, 0x0f00, _mm_loadu_si128((const __m128i *)(w + 8 * stride)));
    return _mm512_mask_broadcast_i32x4(rows, 0xf000, _mm_loadu_si128((const __m128i *)(w + 12 * stride)));
}

/* Eight columns of 16 rows as four registers, each with one pair of columns. */
static inline void transpose(const uint16_t *w, int64_t stride, __m512i pair[4]) {
    __m512i a = four_rows(w, stride), b = four_rows(w + stride, stride);
    __m512i c = four_rows(w + 2 * stride, stride), d = four_rows(w + 3 * stride, stride);
    __m512i ab_low = _mm512_unpacklo_epi32(a, b), ab_high = _mm512_unpackhi_epi32(a, b);
    __m512i cd_low = _mm512_unpacklo_epi32(c, d), cd_high = _mm512_unpackhi_epi32(c, d);
    pair[0] = _mm512_unpacklo_epi64(ab_low, cd_low);
    pair[1] = _mm512_unpackhi_epi64(ab_low, cd_low);
    pair[2] = _mm512_unpacklo_epi64(ab_high, cd_high);
    pair[3] = _mm512_unpackhi_epi64(ab_high, cd_high);
}

/* A chunk as [pair of columns][row]. */
static inline void pair_chunk(const uint16_t *w, int64_t stride, uint32_t *out) {
    for (int64_t c = 0; c < CHUNK; c += 8)
        for (int64_t half = 0; half < STRIP_ROWS; half += LANES) {
            __m512i pair[4];
            transpose(w + half * stride + c, stride, pair);
            for (int j = 0; j < 4; j++) _mm512_store_si512(out + (c / 2 + j) * STRIP_ROWS + half, pair[j]);
        }
}

static inline __attribute__((always_inline)) void add_rows(const int n, const uint32_t *w, const uint32_t *x, int64_t width, float *sums) {
    __m512 low[MOST_AT_ONCE], high[MOST_AT_ONCE];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        low[i] = _mm512_loadu_ps(sums + i * STRIP_ROWS);
        high[i] = _mm512_loadu_ps(sums + i * STRIP_ROWS + LANES);
    }
    for (int pair = 0; pair < CHUNK / 2; pair++) {
        __m512bh w_low = (__m512bh)_mm512_load_si512(w + pair * STRIP_ROWS);
        __m512bh w_high = (__m512bh)_mm512_load_si512(w + pair * STRIP_ROWS + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) {
            __m512bh x_pair = (__m512bh)_mm512_set1_epi32((int)x[pair * width + i]);
            low[i] = _mm512_dpbf16_ps(low[i], w_low, x_pair);
            high[i] = _mm512_dpbf16_ps(high[i], w_high, x_pair);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) {
        _mm512_storeu_ps(sums + i * STRIP_ROWS, low[i]);
        _mm512_storeu_ps(sums + i * STRIP_ROWS + LANES, high[i]);
    }
}

static void add_some_rows(int n, const uint32_t *w, const uint32_t *x, int64_t width, float *sums) {
    switch (n) {
    case 1: add_rows(1, w, x, width, sums); break;
    case 2: add_rows(2, w, x, width, sums); break;
    case 3: add_rows(3, w, x, width, sums); break;
    case 4: add_rows(4, w, x, width, sums); break;
    case 5: add_rows(5, w, x, width, sums); break;
    case 6: add_rows(6, w, x, width, sums); break;
    case 7: add_rows(7, w, x, width, sums); break;
    default: add_rows(8, w, x, width, sums);
    }
}

static inline void add_chunk(const uint32_t *w, int64_t column, const struct inputs *x, float *sums) {
    int64_t width = group_width(x);
    for (int64_t i = 0; i < x->rows; i += MOST_AT_ONCE) {
        int n = (int)(x->rows - i < MOST_AT_ONCE ? x->rows - i : MOST_AT_ONCE);
        const uint32_t *pairs = pairs_of(x, i / X_ROWS) + column / 2 * width + i % X_ROWS;
        add_some_rows(n, w, pairs, width, sums + i * STRIP_ROWS);
    }
}

/* Move finished sums of a block to the totals. */
static inline void end_block(float *sums, float *totals, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        totals[i] += sums[i];
        sums[i] = 0;
    }
}

/* Ask for the same rows further on, or for the next strip: 32 streams are more than a processor follows by itself. Without effect on
   the Xeon where it was tried; not tried on a processor without AMX. */
static inline void prefetch(const struct strip *s, int64_t column) {
    if (s->m->form != PLAIN) return;
    int64_t ahead = column + AHEAD_COLUMNS, columns = s->m->columns;
    int64_t skip = ahead < columns ? ahead : STRIP_ROWS * columns + ahead - columns;
    for (int64_t row = 0; row < s->rows; row++) {
        const char *place = (const char *)(plain_row(s, row) + skip);
        _mm_prefetch(place, _MM_HINT_T0);
        _mm_prefetch(place + 64, _MM_HINT_T0);
    }
}

static inline size_t pairs_sums(int64_t rows) { return 2 * (size_t)rows * STRIP_ROWS; }

/* y[i][row] for all rows i of x and the rows of one strip. A block of 0 columns means one block for all. */
static void pairs_strip(int64_t block, struct strip *s, const struct inputs *x, struct room *room, uint16_t *y, int64_t y_stride) {
    int64_t count = x->rows * STRIP_ROWS, columns = x->columns;
    float *sums = room->sums, *totals = sums + count;
    memset(sums, 0, 2 * (size_t)count * sizeof(float));
    for (int64_t c = 0; c < columns; c += CHUNK) {
        int64_t stride;
        prefetch(s, c);
        const uint16_t *w = read_chunk(s, c, room, &stride);
        pair_chunk(w, stride, room->pairs);
        add_chunk(room->pairs, c, x, sums);
        if (c + CHUNK >= columns || (block && (c + CHUNK) % block == 0)) end_block(sums, totals, count);
    }
    for (int64_t i = 0; i < x->rows; i++)
        for (int64_t row = 0; row < s->rows; row++) y[i * y_stride + row] = finish(s, row, totals[i * STRIP_ROWS + row]);
}
#else
int expertier_has_pairs(void) { return 0; }
static inline size_t pairs_sums(int64_t rows) { return 0; }
static void pairs_strip(int64_t block, struct strip *s, const struct inputs *x, struct room *room, uint16_t *y, int64_t y_stride) {}
#endif
