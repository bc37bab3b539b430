/* A whole quantised matrix as bfloat16. codes/decode.py is the definition, forms/ has the expanders. */

#include <stdint.h>
#include <string.h>

#include "forms/blocks.h"
#include "forms/bytes.h"
#include "forms/few_bits.h"
#include "forms/nibbles.h"
#include "stored_matrix.h"

/* Rows of one task, and columns of one square that is turned: 4 KiB of bfloat16, in the first cache. A task that turns
   its rows takes more of them, because each of its columns goes to another page of memory: 256 rows took 20 ms where 32
   took 23 and 512 took 21 (5760 x 2880 weights, one core of a Xeon with AMX). */
enum { BLOCK_ROWS = 32, BLOCK_COLUMNS = 64, TURNED_ROWS = 256 };

static void expand_rows(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                        uint16_t *out, int64_t stride) {
    if (m->form == BLOCKS)
        expand_blocks(m, row, rows, column, columns, out, stride);
    else if (m->form == FEW_BITS)
        expand_few_bits(m, row, rows, column, columns, out, stride);
    else
        (m->form == NIBBLES ? expand_nibbles : expand_bytes)(m, row, rows, column, columns, out, stride);
}

#ifdef __SSE2__
#include <emmintrin.h>

/* Eight rows of eight numbers, as columns. */
static void turn_eight(const uint16_t *in, int64_t in_stride, uint16_t *out, int64_t out_stride) {
    __m128i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm_loadu_si128((const __m128i *)(in + i * in_stride));
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm_unpacklo_epi16(b[i], b[i + 4]);
        a[2 * i + 1] = _mm_unpackhi_epi16(b[i], b[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(out + 2 * i * out_stride), _mm_unpacklo_epi16(a[i], a[i + 4]));
        _mm_storeu_si128((__m128i *)(out + (2 * i + 1) * out_stride), _mm_unpackhi_epi16(a[i], a[i + 4]));
    }
}
#else
static void turn_eight(const uint16_t *in, int64_t in_stride, uint16_t *out, int64_t out_stride) {
    for (int r = 0; r < 8; r++)
        for (int c = 0; c < 8; c++) out[c * out_stride + r] = in[r * in_stride + c];
}
#endif

/* At most TURNED_ROWS rows, written as columns of `out`, whose rows have `stride` numbers. */
static void expand_turned(const struct stored_matrix *m, int64_t row, int64_t rows, uint16_t *out, int64_t stride) {
    uint16_t square[BLOCK_ROWS * BLOCK_COLUMNS] = {0}, turned[BLOCK_COLUMNS * TURNED_ROWS];
    for (int64_t column = 0; column < m->columns; column += BLOCK_COLUMNS) {
        int64_t columns = m->columns - column < BLOCK_COLUMNS ? m->columns - column : BLOCK_COLUMNS;
        for (int64_t first = 0; first < rows; first += BLOCK_ROWS) {
            int64_t count = rows - first < BLOCK_ROWS ? rows - first : BLOCK_ROWS;
            expand_rows(m, row + first, count, column, columns, square, BLOCK_COLUMNS);
            for (int64_t r = 0; r < count; r += 8)
                for (int64_t c = 0; c < columns; c += 8)
                    turn_eight(square + r * BLOCK_COLUMNS + c, BLOCK_COLUMNS, turned + c * TURNED_ROWS + first + r,
                               TURNED_ROWS);
        }
        for (int64_t c = 0; c < columns; c++)
            memcpy(out + (column + c) * stride + row, turned + c * TURNED_ROWS, rows * sizeof *out);
    }
}

/* A matrix [rows, columns] written to `out` row by row, or as its transpose. */
void expertier_expand_stored(int form, const uint8_t *const part[PARTS], const int32_t parameter[PARAMETERS], int64_t rows,
                             int64_t columns, uint16_t *out, int is_transposed) {
    struct stored_matrix m = {.form = form, .rows = rows, .columns = columns};
    int64_t most = is_transposed ? TURNED_ROWS : BLOCK_ROWS;
    memcpy(m.part, part, sizeof m.part);
    memcpy(m.parameter, parameter, sizeof m.parameter);
    measure(&m);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < (rows + most - 1) / most; block++) {
        int64_t row = block * most, count = rows - row < most ? rows - row : most;
        if (is_transposed)
            expand_turned(&m, row, count, out, rows);
        else
            expand_rows(&m, row, count, 0, columns, out + row * columns, columns);
    }
}
