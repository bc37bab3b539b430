/* Codes of two and three bits and signs as unsigned bytes, 256 columns of a row at a time, for sums of integers.

   Byte j of quarter k is column 4 j + k of the span. So four bytes of each quarter, a lane, are of 16 neighbours, which 32 bits of a
   register can add; and codes of two bits need no shuffle. */

#pragma once

#include "few_bits.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define HAS_QUICK_INTEGERS 1
#endif

enum { QUARTERS = 4, QUARTER = FEW_SPAN / QUARTERS };

#ifdef HAS_QUICK_INTEGERS
struct few_integers {
    __m512i quarter[QUARTERS];
};

/* Where in words of 64 bits the bits of each byte begin: signs, then codes of three bits whose words begin with the first or the second
   four bytes of 32 columns. A sign stands at bit 1, for twice its value. */
static uint8_t sign_starts[QUARTERS][QUARTER] __attribute__((aligned(64))), three_starts[2][QUARTERS][QUARTER] __attribute__((aligned(64)));

/* Words of four bytes that 32 columns of codes of three bits begin with, and those that follow. */
static int32_t three_words[2][QUARTER / 4] __attribute__((aligned(64)));

enum { LATE_BYTES = 0xe0 }; /* of 32 columns in a quarter: those whose three bits are not in the first word */

static __attribute__((constructor)) void fill_few_starts(void) {
    for (int k = 0; k < QUARTERS; k++)
        for (int j = 0; j < QUARTER; j++) {
            const int column = 4 * (j % 8) + k;
            sign_starts[k][j] = (uint8_t)((column + 32 * (j / 8 % 2) - 1) & 63);
            three_starts[0][k][j] = (uint8_t)(3 * column & 63);
            three_starts[1][k][j] = (uint8_t)((3 * column - 32) & 63);
        }
    for (int second = 0; second < 2; second++)
        for (int word = 0; word < QUARTER / 4; word++) three_words[second][word] = 3 * (word / 2) + word % 2 + second;
}

static inline __attribute__((always_inline)) struct few_integers few_codes(const int bits, const uint8_t *from) {
    struct few_integers found;
    const __m512i codes = _mm512_loadu_si512(from);
    if (bits == 2) {
#pragma GCC unroll 4
        for (int k = 0; k < QUARTERS; k++)
            found.quarter[k] = _mm512_and_si512(_mm512_srli_epi16(codes, 2 * k), _mm512_set1_epi8(3));
        return found;
    }
    const __m512i last = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(from + 64)));
    const __m512i first_words = _mm512_permutex2var_epi32(codes, _mm512_load_si512(three_words[0]), last);
    const __m512i second_words = _mm512_permutex2var_epi32(codes, _mm512_load_si512(three_words[1]), last);
    const __mmask64 late = 0x0101010101010101ull * LATE_BYTES;
#pragma GCC unroll 4
    for (int k = 0; k < QUARTERS; k++) {
        __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_load_si512(three_starts[0][k]), first_words);
        bytes = _mm512_mask_multishift_epi64_epi8(bytes, late, _mm512_load_si512(three_starts[1][k]), second_words);
        found.quarter[k] = _mm512_and_si512(bytes, _mm512_set1_epi8(7));
    }
    return found;
}

/* 2 where a bit is 1, else 0. */
static inline __attribute__((always_inline)) struct few_integers few_signs(const uint8_t *from) {
    struct few_integers found;
    const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from));
    const __m512i signs = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), all);
#pragma GCC unroll 4
    for (int k = 0; k < QUARTERS; k++) {
        const __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_load_si512(sign_starts[k]), signs);
        found.quarter[k] = _mm512_and_si512(bytes, _mm512_set1_epi8(2));
    }
    return found;
}

static inline struct few_integers few_ones(void) {
    const __m512i ones = _mm512_set1_epi8(1);
    return (struct few_integers){{ones, ones, ones, ones}};
}
#else
struct few_integers {
    uint8_t quarter[QUARTERS][QUARTER];
};

static inline struct few_integers few_codes(const int bits, const uint8_t *from) {
    struct few_integers found;
    for (int j = 0; j < QUARTER; j++) {
        uint32_t four = 0;
        for (int byte = 0; byte < (4 * bits + 7) / 8; byte++) four |= (uint32_t)from[4 * bits * j / 8 + byte] << 8 * byte;
        four >>= 4 * bits * j % 8;
        for (int k = 0; k < QUARTERS; k++) found.quarter[k][j] = four >> bits * k & ((1u << bits) - 1);
    }
    return found;
}

/* 2 where a bit is 1, else 0. */
static inline struct few_integers few_signs(const uint8_t *from) {
    struct few_integers found;
    for (int j = 0; j < QUARTER; j++)
        for (int k = 0; k < QUARTERS; k++) found.quarter[k][j] = (from[j / 2] >> (4 * (j % 2) + k) & 1) << 1;
    return found;
}

static inline struct few_integers few_ones(void) {
    struct few_integers found;
    memset(&found, 1, sizeof found);
    return found;
}
#endif
