/* Matrices of GGUF files as bfloat16 numbers, in parallel. */

#include "forms/gguf.h"

typedef void expander(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      uint16_t *out, int64_t stride);

enum { STRIP_ROWS = 32 };

/* By the number that GGUF files give a type; NULL for what is not expanded here. */
static expander *expander_of(int type) {
    switch (type) {
    case 2: return expand_q4_0;
    case 3: return expand_q4_1;
    case 6: return expand_q5_0;
    case 7: return expand_q5_1;
    case 8: return expand_q8_0;
    case 10: return expand_q2_k;
    case 11: return expand_q3_k;
    case 12: return expand_q4_k;
    case 13: return expand_q5_k;
    case 14: return expand_q6_k;
    case 20: return expand_iq4_nl;
    case 23: return expand_iq4_xs;
    case 39: return expand_mxfp4;
    default: return 0;
    }
}

int expertier_expands_gguf(int type) { return expander_of(type) != 0; }

/* All of a matrix; rows of `out` begin `stride` numbers apart. */
void expertier_expand_gguf(int type, const uint8_t *blocks, int64_t rows, int64_t columns, uint16_t *out,
                           int64_t stride) {
    struct stored_matrix m = {.rows = rows, .columns = columns, .part = {blocks}};
    expander *expand = expander_of(type);
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row += STRIP_ROWS) {
        int64_t count = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
        expand(&m, row, count, 0, columns, out + row * stride, stride);
    }
}
