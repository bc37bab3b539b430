/* Weights of bfloat16 whose exponents are codes of 3 bits; compression.py says how they lie in memory.

   A block is 32 rows. Its head names the seven exponents that have codes and says where the others of the block stand, one
   byte each, in the order of the codes that say "another". */

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <stdint.h>
#include <string.h>

enum { BLOCK_ROWS = 32, SEGMENT_COLUMNS = 64, ROW_CODE_BYTES = 24, ANOTHER = 7 };
enum { SEGMENT_CODES = BLOCK_ROWS * SEGMENT_COLUMNS, SEGMENT_BYTES = SEGMENT_CODES + BLOCK_ROWS * ROW_CODE_BYTES };
enum { HEAD_ALIGNMENT = 64, PREFETCH_BYTES = 2 * SEGMENT_BYTES };

struct block_head {
    uint8_t exponents[8]; /* the last is 255, what ANOTHER looks like before it is filled in */
    uint32_t others;      /* where this block's other exponents begin, in bytes from the first head */
    uint32_t unused;
};

struct compressed_block {
    const struct block_head *head;
    const uint8_t *segments, *others;
};

static inline struct compressed_block compressed_block(const uint8_t *w, int64_t rows, int64_t columns, int64_t block) {
    const struct block_head *heads = (const struct block_head *)w;
    int64_t head_bytes = rows / BLOCK_ROWS * (int64_t)sizeof(struct block_head);
    const uint8_t *segments = w + (head_bytes + HEAD_ALIGNMENT - 1) / HEAD_ALIGNMENT * HEAD_ALIGNMENT;
    return (struct compressed_block){heads + block, segments + block * (columns / SEGMENT_COLUMNS) * SEGMENT_BYTES,
                                     w + heads[block].others};
}

/* Groups of eight weights of a row lie in the order 0, 4, 1, 5, 2, 6, 3, 7. */
static inline int group_column(int group) { return group % 2 * (SEGMENT_COLUMNS / 2) + group / 2 * 8; }

/* Write rows `begin` to `end` - 1 of a segment, 64 weights each, `stride` apart; gives the place after the other exponents that
   were used. */
#if defined(__AVX512BW__) && defined(__AVX512VBMI__) && defined(__AVX512VBMI2__)
static inline const uint8_t *expand_rows(const uint8_t *segment, const struct block_head *head, const uint8_t *others,
                                         int begin, int end, uint16_t *out, int64_t stride) {
    uint64_t table, lanes[8];
    memcpy(&table, head->exponents, 8);
    for (int lane = 0; lane < 8; lane++) lanes[lane] = (uint64_t)(3 * lane) | (uint64_t)(3 * lane + 1) << 8 | (uint64_t)(3 * lane + 2) << 16;
    const __m512i three_bytes = _mm512_loadu_si512(lanes), exponents = _mm512_set1_epi64((long long)table);
    const __m512i shifts = _mm512_set1_epi64(0x15120f0c09060300ll);
    const __m512i sign = _mm512_set1_epi8((char)0x80), unknown = _mm512_set1_epi8((char)0xff);
    for (int row = begin; row < end; row++) {
        const uint8_t *code = segment + SEGMENT_CODES + row * ROW_CODE_BYTES, *later = segment + PREFETCH_BYTES;
        _mm_prefetch((const char *)later + row * SEGMENT_COLUMNS, _MM_HINT_T1);
        if (row * HEAD_ALIGNMENT < SEGMENT_BYTES - SEGMENT_CODES)
            _mm_prefetch((const char *)later + SEGMENT_CODES + row * SEGMENT_COLUMNS, _MM_HINT_T1);
        __m512i rest = _mm512_load_si512(segment + row * SEGMENT_COLUMNS);
        __m512i codes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)code));
        codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(three_bytes, codes));
        /* each byte has its code in the low three bits; the table repeats every eight bytes, so the others do not matter */
        __m512i exponent = _mm512_permutexvar_epi8(codes, exponents);
        __mmask64 is_other = _mm512_cmpeq_epi8_mask(exponent, unknown);
        exponent = _mm512_mask_expand_epi8(exponent, is_other, _mm512_loadu_si512(others));
        others += _mm_popcnt_u64(is_other);
        /* high byte: sign and exponent >> 1; low byte: exponent << 7 and fraction */
        __m512i high = _mm512_ternarylogic_epi64(sign, rest, _mm512_srli_epi16(exponent, 1), 0xca);
        __m512i low = _mm512_ternarylogic_epi64(sign, _mm512_slli_epi16(exponent, 7), rest, 0xca);
        _mm512_storeu_si512(out + row * stride, _mm512_unpacklo_epi8(low, high));
        _mm512_storeu_si512(out + row * stride + SEGMENT_COLUMNS / 2, _mm512_unpackhi_epi8(low, high));
    }
    return others;
}
#elif defined(__AVX2__)
/* For each mask of eight bits: where the bytes of a stream go that belong to its ones; 0x80 elsewhere. */
static uint64_t spreads[256];

static __attribute__((constructor)) void fill_spreads(void) {
    for (int mask = 0; mask < 256; mask++)
        for (int place = 0, used = 0; place < 8; place++)
            spreads[mask] |= (uint64_t)(mask >> place & 1 ? used++ : 0x80) << 8 * place;
}

/* The next bytes of a stream, one at each one of `mask`; the stream goes on after them. */
static inline __m128i spread_bytes(const uint8_t **stream, uint32_t mask) {
    __m128i next = _mm_loadl_epi64((const __m128i *)*stream);
    *stream += __builtin_popcount(mask);
    return _mm_shuffle_epi8(next, _mm_cvtsi64_si128((long long)spreads[mask]));
}

/* The same for two groups at a time: a window of 16 bits around each code is shifted so that the code alone is left. */
static inline const uint8_t *expand_rows(const uint8_t *segment, const struct block_head *head, const uint8_t *others,
                                         int begin, int end, uint16_t *out, int64_t stride) {
    const __m256i windows = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, 3, 2, 3, 3, 4, 3, 4, 3, 4, 4, 5, 4, 5, 4, 5, 5, 6, 5, 6);
    const __m256i to_the_top = _mm256_broadcastsi128_si256(
        _mm_setr_epi16(1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8));
    const __m256i low_bytes = _mm256_set1_epi16((short)0x8000), fraction = _mm256_set1_epi16(0x7f), sign = _mm256_set1_epi16(0x80);
    uint64_t table;
    memcpy(&table, head->exponents, 8);
    const __m256i exponents = _mm256_set1_epi64x((long long)table), another = _mm256_set1_epi16(ANOTHER);
    for (int row = begin; row < end; row++) {
        const uint8_t *code = segment + SEGMENT_CODES + row * ROW_CODE_BYTES, *rest = segment + row * SEGMENT_COLUMNS;
        _mm_prefetch((const char *)(rest + PREFETCH_BYTES), _MM_HINT_T1);
        if (row * HEAD_ALIGNMENT < SEGMENT_BYTES - SEGMENT_CODES)
            _mm_prefetch((const char *)(segment + PREFETCH_BYTES + SEGMENT_CODES + row * HEAD_ALIGNMENT), _MM_HINT_T1);
        for (int pair = 0; pair < 4; pair++) {
            uint16_t *target = out + row * stride + pair * 8;
            int64_t six_bytes;
            memcpy(&six_bytes, code + 6 * pair, 8);
            __m256i codes = _mm256_shuffle_epi8(_mm256_set1_epi64x(six_bytes), windows);
            codes = _mm256_srli_epi16(_mm256_mullo_epi16(codes, to_the_top), 13);
            __m256i is_other = _mm256_cmpeq_epi16(codes, another);
            uint32_t mask = (uint32_t)_mm256_movemask_epi8(_mm256_packs_epi16(is_other, is_other));
            __m128i first = spread_bytes(&others, mask & 0xff), second = spread_bytes(&others, mask >> 16 & 0xff);
            __m256i exponent = _mm256_shuffle_epi8(exponents, _mm256_or_si256(codes, low_bytes));
            exponent = _mm256_blendv_epi8(exponent, _mm256_cvtepu8_epi16(_mm_unpacklo_epi64(first, second)), is_other);
            __m256i kept = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(rest + 16 * pair)));
            __m256i high = _mm256_or_si256(_mm256_slli_epi16(_mm256_and_si256(kept, sign), 8), _mm256_slli_epi16(exponent, 7));
            __m256i weights = _mm256_or_si256(high, _mm256_and_si256(kept, fraction));
            _mm_storeu_si128((__m128i *)target, _mm256_castsi256_si128(weights));
            _mm_storeu_si128((__m128i *)(target + SEGMENT_COLUMNS / 2), _mm256_extracti128_si256(weights, 1));
        }
    }
    return others;
}
#else
static inline const uint8_t *expand_rows(const uint8_t *segment, const struct block_head *head, const uint8_t *others,
                                         int begin, int end, uint16_t *out, int64_t stride) {
    for (int row = begin; row < end; row++)
        for (int group = 0; group < 8; group++) {
            const uint8_t *rest = segment + row * SEGMENT_COLUMNS + group * 8;
            const uint8_t *code = segment + SEGMENT_CODES + row * ROW_CODE_BYTES + group * 3;
            uint32_t codes = code[0] | code[1] << 8 | (uint32_t)code[2] << 16;
            uint16_t *target = out + row * stride + group_column(group);
            for (int j = 0; j < 8; j++) {
                int which = codes >> 3 * j & 7;
                uint16_t exponent = which == ANOTHER ? *others++ : head->exponents[which];
                target[j] = (uint16_t)((rest[j] & 0x80) << 8 | exponent << 7 | (rest[j] & 0x7f));
            }
        }
    return others;
}
#endif

static inline void expand_block(const struct compressed_block *w, uint16_t *out, int64_t columns) {
    const uint8_t *others = w->others;
    for (int64_t s = 0; s < columns / SEGMENT_COLUMNS; s++)
        others = expand_rows(w->segments + s * SEGMENT_BYTES, w->head, others, 0, BLOCK_ROWS, out + s * SEGMENT_COLUMNS,
                             columns);
}
