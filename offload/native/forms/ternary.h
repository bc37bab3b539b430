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

#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
/* Which bits of an entry the lower bytes of words take; what is above a weight's two bits does not matter. */
static uint8_t ternary_places[64] __attribute__((aligned(64)));

static __attribute__((constructor)) void fill_ternary_places(void) {
    for (int k = 0; k < 64; k++) ternary_places[k] = (uint8_t)((RUN_LENGTH_BITS + k / 2 * 2) & 63);
}

/* All weights of a run, and others after them. */
static inline __m512i ternary_run(uint64_t entry, __m512i values) {
    __m512i index = _mm512_multishift_epi64_epi8(_mm512_load_si512(ternary_places), _mm512_set1_epi64((long long)entry));
    return _mm512_permutexvar_epi16(index, values);
}
#endif

/* Whole runs, as long as there is room for the longest; gives how many columns they are. */
static inline int64_t ternary_runs(struct ternary_row *at, const uint64_t *dictionary, int64_t columns, uint16_t *out) {
    int64_t c = 0;
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
    uint64_t four;
    memcpy(&four, at->value, sizeof four);
    const __m512i values = _mm512_set1_epi64((long long)four);
    const uint8_t *word = at->word, *end = at->end;
    for (; c + RUN_ROOM <= columns && word < end; word += 2) {
        uint16_t number;
        memcpy(&number, word, 2);
        /* the whole register is stored: the next run begins where this one ends */
        _mm512_storeu_si512(out + c, ternary_run(dictionary[number], values));
        c += 2 * (int64_t)(dictionary[number] & RUN_LENGTH);
    }
    at->word = word;
#endif
    return c;
}

/* As many of the begun run's weights as there are columns left. */
static inline int64_t ternary_rest(struct ternary_row *at, int64_t columns, uint16_t *out) {
    int64_t count = at->left < columns ? at->left : columns;
#if defined(__AVX512BW__) && defined(__AVX512VBMI__)
    uint64_t four;
    memcpy(&four, at->value, sizeof four);
    _mm512_mask_storeu_epi16(out, (__mmask32)((1ull << count) - 1), ternary_run(at->codes << RUN_LENGTH_BITS, _mm512_set1_epi64((long long)four)));
#else
    for (int64_t k = 0; k < count; k++) out[k] = at->value[at->codes >> 2 * k & 3];
#endif
    at->codes >>= 2 * count;
    at->left -= count;
    return count;
}

/* The next columns of a row. Whatever the words are, nothing beyond them is written; what they leave over is zero. */
static inline void ternary_columns(struct ternary_row *at, const uint64_t *dictionary, int64_t columns, uint16_t *out) {
    int64_t c = at->left ? ternary_rest(at, columns, out) : 0;
    if (!at->left) c += ternary_runs(at, dictionary, columns - c, out + c);
    while (c < columns && at->word < at->end) {
        uint16_t word;
        memcpy(&word, at->word, 2);
        at->word += 2;
        at->left = 2 * (int64_t)(dictionary[word] & RUN_LENGTH);
        at->codes = dictionary[word] >> RUN_LENGTH_BITS;
        c += ternary_rest(at, columns - c, out + c);
    }
    if (c < columns) memset(out + c, 0, (size_t)(columns - c) * sizeof *out);
}
