/* The rows that a matrix is multiplied with, laid out as an order of summation reads them. */

#pragma once

#include "../bfloat16.h"

enum { X_ROWS = 16 };

struct inputs {
    const uint16_t *x;    /* bfloat16, `columns` a row */
    const int64_t *token; /* which rows of x; the first ones if NULL */
    int64_t rows, columns;
    void *packed; /* see `pack_pairs`, `pack_lanes` and `pack_integers` */
};

static inline int64_t padded(int64_t columns) { return (columns + 63) / 64 * 64; }

static inline const uint16_t *input_row(const struct inputs *x, int64_t row) {
    return x->x + (x->token ? x->token[row] : row) * x->columns;
}

static inline int64_t num_groups(const struct inputs *x) { return (x->rows + X_ROWS - 1) / X_ROWS; }

/* Rows in each group: all of them if they fit in one, else 16, with zeros after the last row. */
static inline int64_t group_width(const struct inputs *x) { return x->rows < X_ROWS ? x->rows : X_ROWS; }

/* Pairs of columns of up to 16 rows side by side: [group][column / 2][row][2]. One whole row is so by itself. */
static inline int is_paired(const struct inputs *x) { return x->rows == 1 && x->columns % 64 == 0; }

static inline const uint32_t *pairs_of(const struct inputs *x, int64_t group) {
    if (is_paired(x)) return (const uint32_t *)input_row(x, 0);
    return (const uint32_t *)x->packed + group * group_width(x) * padded(x->columns) / 2;
}

static void pack_pairs(const struct inputs *x, int64_t group) {
    if (is_paired(x)) return;
    int64_t width = group_width(x), pairs = padded(x->columns) / 2, left = x->rows - group * X_ROWS;
    uint32_t *out = (uint32_t *)x->packed + group * width * pairs;
    const uint16_t *row[X_ROWS];
    for (int64_t i = 0; i < width && i < left; i++) row[i] = input_row(x, group * X_ROWS + i);
    memset(out, 0, (size_t)(width * pairs) * sizeof(uint32_t));
    for (int64_t pair = 0; pair < x->columns / 2; pair++)
        for (int64_t i = 0; i < width && i < left; i++) memcpy(out + pair * width + i, row[i] + 2 * pair, sizeof(uint32_t));
    if (x->columns % 2)
        for (int64_t i = 0; i < width && i < left; i++)
            memcpy(out + x->columns / 2 * width + i, row[i] + x->columns - 1, sizeof(uint16_t));
}

/* As float32: [row][column]. */
static inline const float *lanes_of(const struct inputs *x, int64_t row) {
    return (const float *)x->packed + row * padded(x->columns);
}

static void pack_lanes(const struct inputs *x, int64_t group) {
    int64_t end = (group + 1) * X_ROWS < x->rows ? (group + 1) * X_ROWS : x->rows;
    for (int64_t i = group * X_ROWS; i < end; i++) {
        const uint16_t *row = input_row(x, i);
        float *out = (float *)x->packed + i * padded(x->columns);
        for (int64_t c = 0; c < x->columns; c++) out[c] = load_bf16(row[c]);
        for (int64_t c = x->columns; c < padded(x->columns); c++) out[c] = 0;
    }
}
