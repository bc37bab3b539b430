/* Types of GGUF with codes of four bits, for AVX-512 with VBMI: the 16 values of a group are computed once, rounded, and looked up, as
   in quick_nibbles.h. */

#pragma once

#include "quick_nibbles.h"

#ifdef HAS_QUICK_NIBBLES
#define HAS_QUICK_GGUF 1

/* What codes of IQ4 stand for, before they are scaled. */
static const float GGUF_IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Where the codes of 32 columns lie: in 16 bytes, low halves before high ones; or the low or the high halves of 32 bytes. */
static uint8_t gguf_low_then_high_bytes[64] __attribute__((aligned(64))), gguf_each_byte[64] __attribute__((aligned(64)));

/* As the tables of E2M1 by exponents, but for code 8, which is +0 here. */
static struct byte_table gguf_mxfp4_tables[256] __attribute__((aligned(64)));

static __attribute__((constructor)) void fill_gguf_tables(void) {
    for (int e = 0; e < 256; e++)
        for (int code = 0; code < 16; code++) {
            uint16_t weight = code == 8 ? 0 : round_bf16(NIBBLE_VALUES[E2M1][code] * 2 * half_of_exponent((uint8_t)e));
            gguf_mxfp4_tables[e].low[code] = (uint8_t)weight;
            gguf_mxfp4_tables[e].high[code] = (uint8_t)(weight >> 8);
        }
    for (int k = 0; k < 64; k++) {
        gguf_low_then_high_bytes[k] = (uint8_t)(k % 32 / 2);
        gguf_each_byte[k] = (uint8_t)(k / 2);
    }
}

/* The 16 weights of two groups: low and high bytes of the first, then of the second. */
static inline __attribute__((always_inline)) __m512i gguf_tables(const float *values, const float *scale, const float *minimum,
                                                                 const int has_minimum) {
    __m512 value = _mm512_loadu_ps(values);
    __m512 first = _mm512_mul_ps(value, _mm512_set1_ps(scale[0])), second = _mm512_mul_ps(value, _mm512_set1_ps(scale[1]));
    if (has_minimum) {
        first = _mm512_sub_ps(first, _mm512_set1_ps(minimum[0]));
        second = _mm512_sub_ps(second, _mm512_set1_ps(minimum[1]));
    }
    return _mm512_permutexvar_epi8(_mm512_load_si512(split_bytes), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

/* 32 columns whose codes are the low halves of the bytes in `index`, by the first or the second table. */
static inline void gguf_look_up_words(__m512i index, const int is_second, __m512i table, uint16_t *out) {
    const __m512i which = _mm512_set1_epi16(is_second ? 0x3020 : 0x1000);
    index = _mm512_ternarylogic_epi32(index, _mm512_set1_epi8(15), which, 0xea); /* (index & 15) | which */
    _mm512_storeu_si512(out, _mm512_permutexvar_epi8(index, table));
}

static inline __m512i gguf_low_then_high_index(const uint8_t *codes) {
    __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)codes));
    bytes = _mm512_permutexvar_epi8(_mm512_load_si512(gguf_low_then_high_bytes), bytes);
    return _mm512_mask_srli_epi16(bytes, 0xffff0000, bytes, 4);
}

/* A number of float16 in every place. */
static inline float gguf_scale_of(const uint8_t *stored) {
    uint16_t half;
    memcpy(&half, stored, 2);
    return _cvtsh_ss(half);
}

/* Two blocks of 32 columns that begin with a scale and maybe a minimum. */
static inline __attribute__((always_inline)) void gguf_small_pair(const uint8_t *stored, const int bytes, const float *values,
                                                                  const int has_minimum, uint16_t *out) {
    float scale[2] = {gguf_scale_of(stored), gguf_scale_of(stored + bytes)}, minimum[2] = {0};
    const int head = has_minimum ? 4 : 2;
    if (has_minimum)
        for (int k = 0; k < 2; k++) minimum[k] = -gguf_scale_of(stored + k * bytes + 2);
    __m512i table = gguf_tables(values, scale, minimum, has_minimum);
    gguf_look_up_words(gguf_low_then_high_index(stored + head), 0, table, out);
    gguf_look_up_words(gguf_low_then_high_index(stored + bytes + head), 1, table, out + 32);
}

/* The eight scales and minima of a Q4_K block: 6 bits each in 12 bytes, times two numbers of float16. */
static inline void gguf_k4_scales(const uint8_t *stored, float *scale, float *minimum) {
    uint32_t a, b, c;
    memcpy(&a, stored + 4, 4), memcpy(&b, stored + 8, 4), memcpy(&c, stored + 12, 4);
    uint32_t late_scales = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4, late_minima = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    uint64_t scales = (a & 0x3f3f3f3f) | (uint64_t)late_scales << 32, minima = (b & 0x3f3f3f3f) | (uint64_t)late_minima << 32;
    __m256 all_scales = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)scales)));
    __m256 all_minima = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)minima)));
    _mm256_storeu_ps(scale, _mm256_mul_ps(_mm256_set1_ps(gguf_scale_of(stored)), all_scales));
    _mm256_storeu_ps(minimum, _mm256_mul_ps(_mm256_set1_ps(gguf_scale_of(stored + 2)), all_minima));
    /* each is spread over a register from memory: a shuffle takes the unit that looks weights up */
    __asm__("" : "+m"(*(float(*)[8])scale), "+m"(*(float(*)[8])minimum));
}

static inline void gguf_quick_q4_k(const uint8_t *stored, uint16_t *out) {
    float scale[8], minimum[8];
    gguf_k4_scales(stored, scale, minimum);
    for (int pair = 0; pair < 4; pair++, out += 64) {
        __m512i table = gguf_tables(NIBBLE_VALUES[UINT4], scale + 2 * pair, minimum + 2 * pair, 1);
        __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(stored + 16 + 32 * pair)));
        bytes = _mm512_permutexvar_epi8(_mm512_load_si512(gguf_each_byte), bytes);
        gguf_look_up_words(bytes, 0, table, out);
        gguf_look_up_words(_mm512_srli_epi16(bytes, 4), 1, table, out + 32);
    }
}

static inline void gguf_quick_iq4_xs(const uint8_t *stored, uint16_t *out) {
    float scale[8], minimum[2] = {0}, d = gguf_scale_of(stored);
    uint16_t high;
    memcpy(&high, stored + 2, 2);
    for (int g = 0; g < 8; g++) {
        int low = stored[4 + g / 2] >> 4 * (g % 2) & 15;
        scale[g] = d * (float)((low | (high >> 2 * g & 3) << 4) - 32);
    }
    for (int g = 0; g < 8; g += 2, out += 64) {
        __m512i table = gguf_tables(GGUF_IQ4_VALUES, scale + g, minimum, 0);
        gguf_look_up_words(gguf_low_then_high_index(stored + 8 + 16 * g), 0, table, out);
        gguf_look_up_words(gguf_low_then_high_index(stored + 24 + 16 * g), 1, table, out + 32);
    }
}

static inline void gguf_quick_mxfp4(const uint8_t *stored, uint16_t *out) {
    const struct byte_table *weights = gguf_mxfp4_tables + stored[0];
    __m512i table = _mm512_castsi256_si512(_mm256_load_si256((const __m256i *)weights));
    gguf_look_up_words(gguf_low_then_high_index(stored + 1), 0, table, out);
}

/* All whole blocks of `columns` columns of a row, of the types that are here; gives how many columns were done. */
static inline __attribute__((always_inline)) int64_t gguf_quick_row(const int type, const uint8_t *stored, int64_t columns, uint16_t *out) {
    int64_t c = 0;
    switch (type) {
    case 2: for (; c + 64 <= columns; c += 64) gguf_small_pair(stored + c / 32 * 18, 18, NIBBLE_VALUES[OFFSET4], 0, out + c); break;
    case 3: for (; c + 64 <= columns; c += 64) gguf_small_pair(stored + c / 32 * 20, 20, NIBBLE_VALUES[UINT4], 1, out + c); break;
    case 20: for (; c + 64 <= columns; c += 64) gguf_small_pair(stored + c / 32 * 18, 18, GGUF_IQ4_VALUES, 0, out + c); break;
    case 12: for (; c < columns; c += 256) gguf_quick_q4_k(stored + c / 256 * 144, out + c); break;
    case 23: for (; c < columns; c += 256) gguf_quick_iq4_xs(stored + c / 256 * 136, out + c); break;
    case 39: for (; c < columns; c += 32) gguf_quick_mxfp4(stored + c / 32 * 17, out + c); break;
    }
    return c;
}
#endif
