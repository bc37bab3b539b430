/* Codes of eight bits: each weight is computed from its code and the scale of its group. */

#pragma once

#include "quick_bytes.h"
#include "scales.h"

static inline float byte_value(int kind, uint8_t code) {
    switch (kind) {
    case E4M3: return float_of_e4m3(code);
    case INT8: return (int8_t)code;
    case OFFSET8: return code - 128;
    default: return code;
    }
}

#ifdef __AVX512BW__
static inline __m512 byte_values(int kind, const uint8_t *codes) {
    __m128i byte = _mm_loadu_si128((const __m128i *)codes);
    if (kind == INT8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(byte));
    __m512i code = _mm512_cvtepu8_epi32(byte);
    if (kind == OFFSET8) return _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(128)));
    if (kind != E4M3) return _mm512_cvtepi32_ps(code);
    /* as the bits of a float its exponent is 120 too low; without one it is eighths of 2^-6 (a float without one is slow) */
    __m512i size = _mm512_and_si512(code, _mm512_set1_epi32(127));
    __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(size, 20), _mm512_set1_epi32(120 << 23));
    __mmask16 is_small = _mm512_cmplt_epi32_mask(size, _mm512_set1_epi32(8));
    __m512 small = _mm512_mul_ps(_mm512_cvtepi32_ps(size), _mm512_set1_ps(0x1p-9f));
    __m512 value = _mm512_mask_mov_ps(_mm512_castsi512_ps(bits), is_small, small);
    __m512i sign = _mm512_slli_epi32(_mm512_sub_epi32(code, size), 24);
    value = _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
    return _mm512_mask_mov_ps(value, _mm512_cmpeq_epi32_mask(size, _mm512_set1_epi32(127)), _mm512_set1_ps(NAN));
}
#endif

/* Columns `begin` to `end` of one row, all of one group. */
static inline void scale_bytes(const struct stored_matrix *m, const uint8_t *codes, int64_t begin, int64_t end,
                               float scale, float zero, uint16_t *out) {
    int kind = m->parameter[CODE_KIND];
    int64_t c = begin;
#ifdef __AVX512BW__
    for (; c + 16 <= end; c += 16) {
        __m512 value = less_zeros(m, byte_values(kind, codes + c), zero);
        _mm256_storeu_si256((__m256i *)(out + c - begin), round_products(m, _mm512_mul_ps(value, _mm512_set1_ps(scale))));
    }
#endif
    for (; c < end; c++) out[c - begin] = round_product(m, less_zero(m, byte_value(kind, codes[c]), zero) * scale);
}

static void scale_rows(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                         uint16_t *out, int64_t stride) {
    int64_t group = m->parameter[GROUP_COLUMNS], end = column + columns, across = m->across;
    for (int64_t r = row; r < row + rows; r++, out += stride) {
        const uint8_t *codes = m->part[CODES] + r * m->row_bytes;
        int64_t down = down_of(m, r);
        for (int64_t begin = column, stop; begin < end; begin = stop) {
            stop = (begin / group + 1) * group < end ? (begin / group + 1) * group : end;
            int64_t place = begin / group;
            float zero = is_zero_code(m) ? byte_value(m->parameter[CODE_KIND], zero_code_at(m, down, place)) : zero_number_at(m, down, place);
            scale_bytes(m, codes, begin, stop, scale_at(m, down * across + place), zero, out + begin - column);
        }
    }
}

#ifdef HAS_QUICK_BYTES
/* Rows of a span; those that are left are computed one by one. */
static void expand_byte_span(const struct stored_matrix *m, struct byte_span *span, int64_t row, int64_t rows, uint16_t *out,
                             int64_t stride, struct ahead ahead) {
    for (int64_t done = 0; done < rows; done++) {
        done += quick_bytes(m, span, row + done, rows - done, out + done * stride, stride, ahead);
        if (done < rows) scale_rows(m, row + done, 1, span->column, span->columns, out + done * stride, stride);
    }
}
#endif

/* Rows row .. row + rows - 1, columns column .. column + columns - 1 as bfloat16, rows `stride` elements apart. */
static void expand_bytes(const struct stored_matrix *m, int64_t row, int64_t rows, int64_t column, int64_t columns,
                         uint16_t *out, int64_t stride) {
#ifdef HAS_QUICK_BYTES
    for (int64_t some; columns >= 64; column += some, columns -= some, out += some) {
        struct byte_span span = byte_span(m, column, columns);
        some = span.columns;
        expand_byte_span(m, &span, row, rows, out, stride, nothing_ahead(m->part[CODES]));
    }
#endif
    if (columns) scale_rows(m, row, rows, column, columns, out, stride);
}
