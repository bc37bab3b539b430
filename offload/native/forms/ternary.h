/* Ternary weights whose words of 16 bits name runs of weights; codes/ternary.py is the definition.

   An entry of the dictionary has the number of its pairs of weights in the lowest four bits, then two bits for each weight. Rows are
   read from left to right, and what a run has beyond the columns that were asked for is kept for those that come next. */

#pragma once

#include "../stored_matrix.h"

#include <string.h>

#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
#include <immintrin.h>
#endif

enum ternary_part { TERNARY_LOW, TERNARY_HIGH, TERNARY_STARTS, TERNARY_WORDS, TERNARY_DICTIONARY };
enum { RUN_LENGTH = 15, RUN_LENGTH_BITS = 4, RUN_ROOM = 32 };

/* Where one row is being read. */
struct ternary_row {
    const uint8_t *word, *end;
    uint64_t codes; /* of the run that was begun */
    int64_t left;   /* weights of it */
    uint16_t value[4];
};

/* The numbers of a row, for the two bits of a weight. */
static inline void ternary_values(const uint8_t *low, const uint8_t *high, int64_t row, uint16_t value[4]) {
    value[0] = value[3] = 0;
    memcpy(value + 1, high + 2 * row, 2);
    memcpy(value + 2, low + 2 * row, 2);
}

/* A row of a matrix whose starts have been checked. */
static inline struct ternary_row ternary_row(const struct stored_matrix *m, int64_t row) {
    struct ternary_row at = {0};
    int32_t bounds[2];
    memcpy(bounds, m->part[TERNARY_STARTS] + 4 * row, sizeof bounds);
    at.word = m->part[TERNARY_WORDS] + 2 * (int64_t)bounds[0];
    at.end = m->part[TERNARY_WORDS] + 2 * (int64_t)bounds[1];
    ternary_values(m->part[TERNARY_LOW], m->part[TERNARY_HIGH], row, at.value);
    return at;
}

/* The next columns of a row. Whatever the words are, nothing beyond them is written; what they leave over is zero. */
static inline void ternary_columns(struct ternary_row *at, const uint64_t *dictionary, int64_t columns, uint16_t *out) {
    int64_t c = 0;
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
    static const uint8_t place[64] = {0,  0, 2,  0, 4,  0, 6,  0, 8,  0, 10, 0, 12, 0, 14, 0, 16, 0, 18, 0, 20, 0,
                                      22, 0, 24, 0, 26, 0, 28, 0, 30, 0, 32, 0, 34, 0, 36, 0, 38, 0, 40, 0, 42, 0,
                                      44, 0, 46, 0, 48, 0, 50, 0, 52, 0, 54, 0, 56, 0, 56, 0, 56, 0, 56, 0};
    const __m512i places = _mm512_loadu_si512(place), three = _mm512_set1_epi16(3);
    uint64_t values;
    memcpy(&values, at->value, sizeof values);
    const __m512i table = _mm512_set1_epi64((long long)values);
#endif
    while (c < columns && (at->left || at->word < at->end)) {
        if (!at->left) {
            uint16_t word;
            memcpy(&word, at->word, 2);
            at->word += 2;
            at->left = 2 * (int64_t)(dictionary[word] & RUN_LENGTH);
            at->codes = dictionary[word] >> RUN_LENGTH_BITS;
        }
        int64_t room = columns - c, count = at->left < room ? at->left : room;
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
        __m512i index = _mm512_and_si512(_mm512_multishift_epi64_epi8(places, _mm512_set1_epi64((long long)at->codes)), three);
        __m512i weights = _mm512_permutexvar_epi16(index, table);
        /* whole stores where there is room for the longest run; the next one begins where this one ends */
        if (room >= RUN_ROOM)
            _mm512_storeu_si512(out + c, weights);
        else
            _mm512_mask_storeu_epi16(out + c, (__mmask32)((1ull << count) - 1), weights);
#else
        for (int64_t k = 0; k < count; k++) out[c + k] = at->value[at->codes >> 2 * k & 3];
#endif
        at->codes >>= 2 * count;
        at->left -= count;
        c += count;
    }
    if (c < columns) memset(out + c, 0, (size_t)(columns - c) * sizeof *out);
}
