/* Residual blocks: a weight is a sum over levels, each its sign times the product of a few numbers of its row and of its column.
   codes/levels.py defines the sum: in float32, over the ranks of a level from the first to the last, then over the levels.

   `part` has the address of each level: signs, the numbers of rows, and those of columns, each on a whole multiple of 64 bytes.
   A product of two bfloat16 numbers is exact in float32, so that one instruction may multiply and add. */

#pragma once

#include "../bfloat16.h"
#include "../stored_matrix.h"
#include "scales.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_QUICK_BLOCKS 1
#endif

enum { RANKS, BLOCK_SPAN = 128, SOME_RANKS = 16, SOME_ROWS = 8, LEVEL_ALIGNMENT = 64 };

struct block_level {
    const uint8_t *signs, *left, *right;
};

static inline const uint8_t *aligned_after(const uint8_t *part, int64_t bytes) {
    return part + (bytes + LEVEL_ALIGNMENT - 1) / LEVEL_ALIGNMENT * LEVEL_ALIGNMENT;
}

static inline struct block_level block_level(const struct stored_matrix *m, int level) {
    struct block_level found = {.signs = m->part[level]};
    found.left = aligned_after(found.signs, m->rows * m->row_bytes);
    found.right = aligned_after(found.left, 2 * m->rows * m->parameter[RANKS]);
    return found;
}

static inline int num_levels(const struct stored_matrix *m) {
    int n = 0;
    while (n < PARTS && m->part[n]) n++;
    return n;
}

static inline float block_number(const uint8_t *part, int64_t place) {
    uint16_t stored;
    memcpy(&stored, part + 2 * place, 2);
    return load_bf16(stored);
}

/* Up to SOME_RANKS ranks of a span of columns, as float32, with zeros up to BLOCK_SPAN columns. */
static inline void widen_ranks(const struct stored_matrix *m, const uint8_t *right, int64_t rank, int64_t ranks, int64_t column,
                               int64_t columns, float wide[SOME_RANKS][BLOCK_SPAN]) {
    for (int64_t j = 0; j < ranks; j++) {
        uint16_t stored[BLOCK_SPAN] = {0};
        memcpy(stored, right + 2 * ((rank + j) * m->columns + column), (size_t)columns * 2);
        for (int c = 0; c < BLOCK_SPAN; c++) wide[j][c] = load_bf16(stored[c]);
    }
}

/* size += left[j] * wide[j], from the first rank to the last. */
static inline void add_ranks(const float left[SOME_RANKS], int64_t ranks, float wide[SOME_RANKS][BLOCK_SPAN], float size[BLOCK_SPAN]) {
#ifdef HAS_QUICK_BLOCKS
    enum { LANES_OF = 16, PIECES = BLOCK_SPAN / LANES_OF };
    __m512 sum[PIECES];
#pragma GCC unroll 8
    for (int k = 0; k < PIECES; k++) sum[k] = _mm512_loadu_ps(size + LANES_OF * k);
    for (int64_t j = 0; j < ranks; j++) {
        __m512 factor = _mm512_set1_ps(left[j]);
#pragma GCC unroll 8
        for (int k = 0; k < PIECES; k++) sum[k] = _mm512_fmadd_ps(factor, _mm512_loadu_ps(wide[j] + LANES_OF * k), sum[k]);
    }
#pragma GCC unroll 8
    for (int k = 0; k < PIECES; k++) _mm512_storeu_ps(size + LANES_OF * k, sum[k]);
#else
    for (int64_t j = 0; j < ranks; j++)
        for (int c = 0; c < BLOCK_SPAN; c++) size[c] += left[j] * wide[j][c];
#endif
}

/* sum += size where a bit is 1, sum -= size where it is 0; `signs` has BLOCK_SPAN bits. */
static inline void add_signed(const uint8_t signs[BLOCK_SPAN / 8], const float size[BLOCK_SPAN], float sum[BLOCK_SPAN]) {
#ifdef HAS_QUICK_BLOCKS
    const __m512i minus = _mm512_set1_epi32((int)0x80000000);
    for (int c = 0; c < BLOCK_SPAN; c += 16) {
        uint16_t bits;
        memcpy(&bits, signs + c / 8, 2);
        __m512i value = _mm512_castps_si512(_mm512_loadu_ps(size + c));
        value = _mm512_mask_xor_epi32(value, (__mmask16)~bits, value, minus);
        _mm512_storeu_ps(sum + c, _mm512_add_ps(_mm512_loadu_ps(sum + c), _mm512_castsi512_ps(value)));
    }
#else
    for (int c = 0; c < BLOCK_SPAN; c++) sum[c] += signs[c / 8] >> c % 8 & 1 ? size[c] : -size[c];
#endif
}

/* Some columns as bfloat16. */
static inline void round_span(const float sum[BLOCK_SPAN], int64_t columns, uint16_t *out) {
    int64_t c = 0;
#ifdef HAS_QUICK_BLOCKS
    for (; c + 16 <= columns; c += 16) _mm256_storeu_si256((__m256i *)(out + c), round_bf16s(_mm512_loadu_ps(sum + c)));
#endif
    for (; c < columns; c++) out[c] = round_bf16(sum[c]);
}

/* Up to SOME_ROWS rows of up to BLOCK_SPAN columns that begin at a whole byte of signs. */
static void expand_block_span(const struct stored_matrix *m, int levels, int64_t row, int64_t rows, int64_t column, int64_t columns,
                              uint16_t *out, int64_t stride) {
    float wide[SOME_RANKS][BLOCK_SPAN], size[SOME_ROWS][BLOCK_SPAN], sum[SOME_ROWS][BLOCK_SPAN];
    memset(sum, 0, sizeof sum);
    for (int level = 0; level < levels; level++) {
        const struct block_level of = block_level(m, level);
        const int64_t all = m->parameter[RANKS];
        memset(size, 0, sizeof size);
        for (int64_t rank = 0; rank < all; rank += SOME_RANKS) {
            int64_t ranks = all - rank < SOME_RANKS ? all - rank : SOME_RANKS;
            widen_ranks(m, of.right, rank, ranks, column, columns, wide);
            for (int64_t r = 0; r < rows; r++) {
                float left[SOME_RANKS];
                for (int64_t j = 0; j < ranks; j++) left[j] = block_number(of.left, (row + r) * all + rank + j);
                add_ranks(left, ranks, wide, size[r]);
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            uint8_t signs[BLOCK_SPAN / 8] = {0};
            memcpy(signs, of.signs + (row + r) * m->row_bytes + column / 8, (size_t)(columns + 7) / 8);
            add_signed(signs, size[r], sum[r]);
        }
    }
    for (int64_t r = 0; r < rows; r++) round_span(sum[r], columns, out + r * stride);
}

/* Rows row .. row + rows - 1, columns column .. column + columns - 1 as bfloat16, rows `stride` elements apart; `column` is a multiple
   of eight. */
static void expand_blocks(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns, uint16_t *out,
                          int64_t stride) {
    const int levels = num_levels(m);
    for (int64_t r = 0; r < rows; r += SOME_ROWS)
        for (int64_t c = 0; c < columns; c += BLOCK_SPAN) {
            int64_t some = rows - r < SOME_ROWS ? rows - r : SOME_ROWS, wide = columns - c < BLOCK_SPAN ? columns - c : BLOCK_SPAN;
            expand_block_span(m, levels, row + r, some, column + c, wide, out + r * stride + c, stride);
        }
}
