/* Products that sum over the rows of a matrix: y[i][c] = sum_r x[i][r] w[r][c]. The matrix is read as it lies, once for all rows of x:
   a panel of it is made pairs of rows, in a room that stays in a core's second cache.

   A sum goes down the rows in one piece: AMX adds 32 rows at a time, AVX512_BF16 two. A row of x has the same sums however many
   others are multiplied with it. */

#pragma once

#include "amx.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define HAS_PANELS

/* Pieces of rows are long enough for a processor to foresee the next line; to ask for rows further on took longer. A stripe of a panel
   stays in the first cache for all rows of x. */
enum { PANEL_COLUMNS = 256, PANEL_ROWS = 256, STRIPE = 32, TILE_NUMBERS = 256, PAIRS_OF_TILE = 16 };

/* What a thread computes in: a panel in pairs of rows, [32 columns][32 rows][16 columns][pair of rows][column], and sums of it. */
struct panel_room {
    uint32_t pairs[PANEL_COLUMNS * PANEL_ROWS / 2] __attribute__((aligned(64)));
    float sums[] __attribute__((aligned(64)));
};

static inline size_t panel_room_bytes(int64_t rows) {
    return sizeof(struct panel_room) + (size_t)((rows + STRIPE - 1) / STRIPE * STRIPE * PANEL_COLUMNS) * sizeof(float);
}

static inline uint32_t *stripe_of(struct panel_room *room, int64_t column) { return room->pairs + column / STRIPE * (STRIPE * PANEL_ROWS / 2); }

static inline __m512i some_columns(const uint16_t *w, int64_t count) {
    return _mm512_maskz_loadu_epi16(count >= STRIPE ? ~0u : count > 0 ? (1u << count) - 1 : 0, w);
}

/* `rows` rows and `count` columns of a matrix whose rows are `stride` apart, with zeros up to whole tiles. */
static void fill_panel(const uint16_t *w, int64_t stride, int64_t rows, int64_t count, struct panel_room *room) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t row = 0; row < (rows + 31) / 32 * 32; row += 2) {
        const uint16_t *at = w + row * stride;
        uint32_t *out = room->pairs + row / 32 * 2 * TILE_NUMBERS + row % 32 / 2 * PAIRS_OF_TILE;
        for (int64_t c = 0; c < count; c += STRIPE, out += STRIPE * PANEL_ROWS / 2) {
            __m512i a = some_columns(at + c, row < rows ? count - c : 0), b = some_columns(at + stride + c, row + 1 < rows ? count - c : 0);
            _mm512_store_si512(out, _mm512_permutex2var_epi16(a, low, b));
            _mm512_store_si512(out + TILE_NUMBERS, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

static inline void store_sums(const float *sums, int64_t count, uint16_t *y) {
    for (int64_t c = 0; c < count; c++) y[c] = round_bf16(sums[c]);
}

/* --- AVX512_BF16: sums are [row of x][column] -------------------------------------------------------------------- */

enum { ROWS_AT_A_TIME = 12 };

/* `n` rows of x, `x_stride` apart, times the first `rows` rows of a stripe. */
static inline __attribute__((always_inline)) void add_stripe(const int n, const uint16_t *x, int64_t x_stride, const uint32_t *stripe,
                                                             int64_t rows, float *sums) {
    __m512 low[ROWS_AT_A_TIME], high[ROWS_AT_A_TIME];
#pragma GCC unroll 12
    for (int i = 0; i < n; i++) {
        low[i] = _mm512_load_ps(sums + i * PANEL_COLUMNS);
        high[i] = _mm512_load_ps(sums + i * PANEL_COLUMNS + PAIRS_OF_TILE);
    }
    for (int64_t row = 0; row < rows; row += 2) {
        const uint32_t *at = stripe + row / 32 * 2 * TILE_NUMBERS + row % 32 / 2 * PAIRS_OF_TILE;
        __m512bh w_low = (__m512bh)_mm512_load_si512(at), w_high = (__m512bh)_mm512_load_si512(at + TILE_NUMBERS);
#pragma GCC unroll 12
        for (int i = 0; i < n; i++) {
            uint32_t pair = x[i * x_stride + row];
            if (row + 1 < rows) memcpy(&pair, x + i * x_stride + row, sizeof pair);
            low[i] = _mm512_dpbf16_ps(low[i], w_low, (__m512bh)_mm512_set1_epi32((int)pair));
            high[i] = _mm512_dpbf16_ps(high[i], w_high, (__m512bh)_mm512_set1_epi32((int)pair));
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < n; i++) {
        _mm512_store_ps(sums + i * PANEL_COLUMNS, low[i]);
        _mm512_store_ps(sums + i * PANEL_COLUMNS + PAIRS_OF_TILE, high[i]);
    }
}

static void pairs_panel(const uint16_t *x, int64_t x_rows, int64_t x_stride, struct panel_room *room, int64_t rows, int64_t count) {
    for (int64_t c = 0; c < count; c += STRIPE) {
        const uint32_t *stripe = stripe_of(room, c);
        int64_t i = 0;
        for (; i + ROWS_AT_A_TIME <= x_rows; i += ROWS_AT_A_TIME)
            add_stripe(ROWS_AT_A_TIME, x + i * x_stride, x_stride, stripe, rows, room->sums + i * PANEL_COLUMNS + c);
        for (; i + 4 <= x_rows; i += 4) add_stripe(4, x + i * x_stride, x_stride, stripe, rows, room->sums + i * PANEL_COLUMNS + c);
        for (; i < x_rows; i++) add_stripe(1, x + i * x_stride, x_stride, stripe, rows, room->sums + i * PANEL_COLUMNS + c);
    }
}

static void store_pairs(const struct panel_room *room, int64_t x_rows, int64_t count, uint16_t *y, int64_t y_stride) {
    for (int64_t i = 0; i < x_rows; i++) store_sums(room->sums + i * PANEL_COLUMNS, count, y + i * y_stride);
}

/* --- AMX: sums are [32 rows of x][32 columns][16 rows][16 columns][row][column] ----------------------------------- */

static inline int64_t tiled(int64_t count) { return (count + STRIPE - 1) / STRIPE * STRIPE; }

/* Rows `begin` to `begin` + 31 of x as [32 columns][row][column], with zeros beyond x: tiles that lie in a row are read faster. */
static void tile_rows(const uint16_t *x, int64_t x_rows, int64_t columns, int64_t begin, uint16_t *out) {
    out += begin * tiled(columns);
    for (int64_t c = 0; c < columns; c += STRIPE)
        for (int64_t i = begin; i < begin + STRIPE; i++, out += STRIPE)
            _mm512_store_si512(out, some_columns(x + i * columns + c, i < x_rows ? columns - c : 0));
}

#ifdef HAS_AMX
static inline float *block_of(struct panel_room *room, int64_t row, int64_t column) {
    return room->sums + row * PANEL_COLUMNS + column / STRIPE * 4 * TILE_NUMBERS;
}

/* 32 rows of x from a row of the matrix on, times the first `rows` rows of a stripe. */
static inline void add_block(const uint16_t *x, const uint32_t *stripe, int64_t rows, float *sums) {
    _tile_loadd(SUM_0, sums, 2 * TILE_COLUMNS);
    _tile_loadd(SUM_1, sums + TILE_NUMBERS, 2 * TILE_COLUMNS);
    _tile_loadd(SUM_2, sums + 2 * TILE_NUMBERS, 2 * TILE_COLUMNS);
    _tile_loadd(SUM_3, sums + 3 * TILE_NUMBERS, 2 * TILE_COLUMNS);
    for (int64_t r = 0; r < rows; r += TILE_COLUMNS, x += STRIPE * TILE_COLUMNS, stripe += 2 * TILE_NUMBERS) {
        _tile_loadd(W_0, stripe, 2 * TILE_COLUMNS);
        _tile_loadd(X_0, x, 2 * TILE_COLUMNS);
        _tile_dpbf16ps(SUM_0, X_0, W_0);
        _tile_loadd(W_1, stripe + TILE_NUMBERS, 2 * TILE_COLUMNS);
        _tile_dpbf16ps(SUM_1, X_0, W_1);
        _tile_loadd(X_1, x + TILE_ROWS * TILE_COLUMNS, 2 * TILE_COLUMNS);
        _tile_dpbf16ps(SUM_2, X_1, W_0);
        _tile_dpbf16ps(SUM_3, X_1, W_1);
    }
    _tile_stored(SUM_0, sums, 2 * TILE_COLUMNS);
    _tile_stored(SUM_1, sums + TILE_NUMBERS, 2 * TILE_COLUMNS);
    _tile_stored(SUM_2, sums + 2 * TILE_NUMBERS, 2 * TILE_COLUMNS);
    _tile_stored(SUM_3, sums + 3 * TILE_NUMBERS, 2 * TILE_COLUMNS);
}

/* `x` as `tile_rows` has it, from row `row` of the matrix on. */
static void amx_panel(const uint16_t *x, int64_t x_rows, int64_t columns, int64_t row, struct panel_room *room, int64_t rows, int64_t count) {
    for (int64_t c = 0; c < count; c += STRIPE)
        for (int64_t i = 0; i < x_rows; i += STRIPE)
            add_block(x + i * tiled(columns) + row * STRIPE, stripe_of(room, c), rows, block_of(room, i, c));
}

static void store_tiled(struct panel_room *room, int64_t x_rows, int64_t count, uint16_t *y, int64_t y_stride) {
    for (int64_t i = 0; i < x_rows; i++)
        for (int64_t c = 0; c < count; c += TILE_ROWS) {
            int64_t tile = i / TILE_ROWS % 2 * 2 + c / TILE_ROWS % 2, left = count - c;
            const float *sums = block_of(room, i / STRIPE * STRIPE, c) + tile * TILE_NUMBERS + i % TILE_ROWS * TILE_ROWS;
            store_sums(sums, left < TILE_ROWS ? left : TILE_ROWS, y + i * y_stride + c);
        }
}
#else
static void amx_panel(const uint16_t *x, int64_t x_rows, int64_t columns, int64_t row, struct panel_room *room, int64_t rows, int64_t count) {}
static void store_tiled(struct panel_room *room, int64_t x_rows, int64_t count, uint16_t *y, int64_t y_stride) {}
#endif

/* Columns `column` to `column` + `count` - 1 of y = x w; `tiles` is x as `tile_rows` has it, NULL without AMX. */
static void multiply_panel(const uint16_t *x, const uint16_t *tiles, int64_t x_rows, const uint16_t *w, int64_t w_rows, int64_t columns,
                           int64_t column, int64_t count, struct panel_room *room, uint16_t *y) {
    memset(room->sums, 0, panel_room_bytes(x_rows) - sizeof *room);
    for (int64_t row = 0; row < w_rows; row += PANEL_ROWS) {
        int64_t rows = w_rows - row < PANEL_ROWS ? w_rows - row : PANEL_ROWS;
        fill_panel(w + row * columns + column, columns, rows, count, room);
        if (tiles)
            amx_panel(tiles, x_rows, w_rows, row, room, rows, count);
        else
            pairs_panel(x + row, x_rows, w_rows, room, rows, count);
    }
    if (tiles)
        store_tiled(room, x_rows, count, y + column, columns);
    else
        store_pairs(room, x_rows, count, y + column, columns);
}
#endif
