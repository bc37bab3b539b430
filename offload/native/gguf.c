/* Matrices of GGUF files as bfloat16 numbers, in parallel. */

#include "forms/gguf.h"

enum { STRIP_ROWS = 32 };

int expertier_expands_gguf(int type) { return gguf_expander_of(type) != 0; }

/* All of a matrix; rows of `out` begin `stride` numbers apart. */
void expertier_expand_gguf(int type, const uint8_t *blocks, int64_t rows, int64_t columns, uint16_t *out,
                           int64_t stride) {
    struct stored_matrix m = {.rows = rows, .columns = columns, .part = {blocks}};
    gguf_expander *expand = gguf_expander_of(type);
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row += STRIP_ROWS) {
        int64_t count = rows - row < STRIP_ROWS ? rows - row : STRIP_ROWS;
        expand(&m, row, count, 0, columns, out + row * stride, stride, nothing_ahead(blocks));
    }
}
