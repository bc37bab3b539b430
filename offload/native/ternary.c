/* Ternary weights whose words of 16 bits name runs of weights; codes/ternary.py is the definition.

   An entry of the dictionary has the number of its pairs of weights in the lowest four bits, then two bits for each weight. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

enum { TURNED_ROWS = 32, LENGTH = 15, LENGTH_BITS = 4 };

/* One row from its words. Whatever the words are, nothing beyond the row is written; what they leave over is zero. */
static void decode_row(const uint16_t *word, const uint16_t *end, const uint64_t *dictionary, const uint16_t value[4], int64_t columns,
                       uint16_t *out) {
    int64_t c = 0;
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
    uint8_t place[64] = {0};
    for (int j = 0; j < 32; j++) place[2 * j] = (uint8_t)((LENGTH_BITS + 2 * j) % 64);
    const __m512i places = _mm512_loadu_si512(place), three = _mm512_set1_epi16(3);
    uint64_t values;
    memcpy(&values, value, sizeof values);
    const __m512i table = _mm512_set1_epi64((long long)values);
    /* a store has room for the longest run; the next one begins where this one ends */
    for (; word < end && columns - c >= 32; word++) {
        uint64_t entry = dictionary[*word];
        __m512i index = _mm512_and_si512(_mm512_multishift_epi64_epi8(places, _mm512_set1_epi64((long long)entry)), three);
        _mm512_storeu_si512(out + c, _mm512_permutexvar_epi16(index, table));
        c += 2 * (int64_t)(entry & LENGTH);
    }
#endif
    for (; word < end && c < columns; word++) {
        uint64_t entry = dictionary[*word], code = entry >> LENGTH_BITS;
        for (int64_t stop = c + 2 * (int64_t)(entry & LENGTH); c < stop && c < columns; code >>= 2) out[c++] = value[code & 3];
    }
    memset(out + c, 0, (size_t)(columns - c) * sizeof *out);
}

static int64_t within(int64_t value, int64_t least, int64_t most) { return value < least ? least : value > most ? most : value; }

/* A matrix [rows, columns] written to `out` row by row, or as its transpose; parts may begin at any byte. */
void expertier_expand_ternary(const uint8_t *low, const uint8_t *high, const uint8_t *start, const uint16_t *word, int64_t words,
                              const uint64_t *dictionary, int64_t rows, int64_t columns, uint16_t *out, int is_transposed) {
#pragma omp parallel for schedule(static)
    for (int64_t first = 0; first < rows; first += TURNED_ROWS)
        for (int64_t row = first; row < first + TURNED_ROWS && row < rows; row++) {
            uint16_t value[4] = {0}, turned[is_transposed ? columns : 1];
            int32_t bounds[2];
            memcpy(value + 1, high + 2 * row, 2);
            memcpy(value + 2, low + 2 * row, 2);
            memcpy(bounds, start + 4 * row, sizeof bounds);
            int64_t begin = within(bounds[0], 0, words), end = within(bounds[1], begin, words);
            uint16_t *to = is_transposed ? turned : out + row * columns;
            decode_row(word + begin, word + end, dictionary, value, columns, to);
            for (int64_t c = 0; is_transposed && c < columns; c++) out[c * rows + row] = turned[c];
        }
}
