/* Whole matrices of ternary weights, from words that nobody has checked; forms/ternary.h expands them. */

#include "forms/ternary.h"

enum { TURNED_ROWS = 32 };

static int64_t within(int64_t value, int64_t least, int64_t most) { return value < least ? least : value > most ? most : value; }

/* A matrix [rows, columns] written to `out` row by row, or as its transpose; parts may begin at any byte. */
void expertier_expand_ternary(const uint8_t *low, const uint8_t *high, const uint8_t *start, const uint8_t *word, int64_t words,
                              const uint64_t *dictionary, int64_t rows, int64_t columns, uint16_t *out, int is_transposed) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < rows; first += TURNED_ROWS)
        for (int64_t row = first; row < first + TURNED_ROWS && row < rows; row++) {
            uint16_t turned[is_transposed ? columns : 1];
            struct ternary_row at = {0};
            int32_t bounds[2];
            memcpy(bounds, start + 4 * row, sizeof bounds);
            int64_t begin = within(bounds[0], 0, words);
            at.word = word + 2 * begin;
            at.end = word + 2 * within(bounds[1], begin, words);
            ternary_values(low, high, row, at.value);
            ternary_columns(&at, dictionary, columns, is_transposed ? turned : out + row * columns);
            for (int64_t c = 0; is_transposed && c < columns; c++) out[c * rows + row] = turned[c];
        }
}
